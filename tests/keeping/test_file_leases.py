"""Registries of several processes on one file: while one has leased a key, no other one changes it."""

from __future__ import annotations

import asyncio
import gc
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene import Registry, WriteBehind, bounded_registry
from hygiene.errors import LeaseTimeout, OwnershipLost, StoreError, VersionConflict
from hygiene.stores import SQLiteStore
from hygiene.stores.owners import SUPPORTED
from hygiene.tenure import FileTenures

PATIENCE = 20.0
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="needs locks of the open file, which Linux has")

# Takes turns as it is told to: "in KEY" begins one with an append, "out" ends it, "turn KEY" does both.
WORKER = """
import contextlib, sys
import hygiene.tenure
from hygiene import HygieneError, Registry
url, name, term = sys.argv[1:]
hygiene.tenure._TTL = float(term)
chats = Registry(maxsize=5, store=url, name="chats")
with contextlib.ExitStack() as stack:
    for line in sys.stdin:
        verb, *key = line.split()
        try:
            if verb == "in":
                stack.enter_context(chats.lease(key[0], create=list)).append(name)
            elif verb == "out":
                stack.close()
            elif verb == "turn":
                with chats.lease(key[0], create=list) as chat:
                    chat.append(name)
            print(verb, flush=True)
        except HygieneError as error:
            print(type(error).__name__, flush=True)
chats.close()
"""
TURNS = """
import sys
from hygiene import Registry
url, name, count = sys.argv[1:]
with Registry(maxsize=5, store=url, name="chats") as chats:
    sys.stdin.readline()
    for turn in range(int(count)):
        for key in ("a", "b"):
            with chats.lease(key, create=list) as chat:
                chat[:] = [*chat, f"{name} {turn}"]
"""


class Worker:
    """Another process with a registry on the same file."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def send(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return str(self.process.stdout.readline().strip())

    def does(self, line: str) -> str:
        self.send(line)
        return self.answer()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats.db"


@pytest.fixture
def worker(path: Path, elsewhere: Callable[..., Any]) -> Callable[..., Worker]:
    def start(name: str, term: float = 30.0) -> Worker:
        return Worker(elsewhere(WORKER, f"sqlite:{path}", name, term))

    return start


@pytest.fixture
def two(path: Path) -> Iterator[tuple[Registry[str, list[Any]], Registry[str, list[Any]]]]:
    """Two registries with a store of their own each, as two processes have them."""
    with SQLiteStore(path) as one, SQLiteStore(path) as other:
        registries = [Registry[str, list[Any]](maxsize=5, store=store, name="chats") for store in (one, other)]
        yield registries[0], registries[1]
        for registry in registries:
            registry.close()


def stored(path: Path, key: Any, space: str = "chats") -> Any:
    with SQLiteStore(path, check=False) as store:
        record = store.load(space, key)
        return None if record is None else record.value


def test_a_lease_waits_for_the_one_of_another_process_and_sees_its_changes(two: Any, path: Path) -> None:
    """The second one comes in when the first is out, whatever it had in memory before."""
    one, other = two
    one["k"] = ["zero"]
    one.flush()
    assert ["zero"] == other["k"]
    inside = threading.Event()

    def second() -> None:
        with other.lease("k") as chat:
            inside.set()
            chat.append("second")

    thread = threading.Thread(target=second)
    with one.lease("k") as chat:
        thread.start()
        while not one._kept().store.is_awaited("chats", "k"):
            assert thread.is_alive()
            time.sleep(0.001)
        assert not inside.is_set()
        chat.append("first")
    thread.join(PATIENCE)

    assert ["zero", "first", "second"] == stored(path, "k")
    with one.lease("k") as chat:
        assert ["zero", "first", "second"] == chat


@pytest.mark.parametrize("value", [{"n": 0}, [0], 0], ids=["dict", "list", "plain"])
def test_turns_of_two_processes_lose_nothing(path: Path, value: Any) -> None:
    """Read, change, write back: for values of each kind, in threads that stand for processes."""
    turns = 20

    def work(registry: Registry[str, Any]) -> None:
        for _ in range(turns):
            with registry.lease("k"):
                found = registry["k"]
                if isinstance(found, int):
                    registry["k"] = found + 1
                elif isinstance(found, dict):
                    found["n"] += 1
                else:
                    found[0] += 1

    with SQLiteStore(path) as one, SQLiteStore(path) as other:
        registries = [Registry[str, Any](maxsize=5, store=store, name="chats") for store in (one, other)]
        registries[0]["k"] = value
        registries[0].flush()
        threads = [threading.Thread(target=work, args=(registry,)) for registry in registries]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        for registry in registries:
            registry.close()

    found = stored(path, "k")
    assert 2 * turns == (found if isinstance(found, int) else found["n"] if isinstance(found, dict) else found[0])


def test_tasks_wait_for_another_process_without_blocking_their_loop(two: Any, path: Path) -> None:
    one, other = two

    async def turns(registry: Any, name: str) -> None:
        for n in range(10):
            async with registry.lease("k", create=list) as chat:
                before = len(chat)
                await asyncio.sleep(0)
                chat.append([name, n])
                assert before + 1 == len(chat)

    async def both() -> None:
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(turns(one, "one"), turns(other, "other"))

    asyncio.run(both())
    found = stored(path, "k")

    assert sorted(found) == sorted([name, n] for name in ("one", "other") for n in range(10))


def test_a_task_that_is_cancelled_while_it_waits_leaves_nothing_behind(two: Any) -> None:
    one, other = two

    async def scene() -> None:
        with one.lease("k", create=list):
            task = asyncio.create_task(enter())
            while not one._kept().store.is_awaited("chats", "k"):  # noqa: ASYNC110 - the kernel sets no event
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not one._kept().store.is_awaited("chats", "k")
        async with other.lease("k", timeout=PATIENCE) as chat:
            chat.append("free")

    async def enter() -> None:
        async with other.lease("k"):
            pytest.fail("it is leased")

    asyncio.run(scene())


def test_a_lease_that_another_process_holds_too_long_times_out(two: Any) -> None:
    """By a thread and by a task; the others see no waiter any more, and the next attempt gets it."""
    one, other = two

    async def task() -> None:
        async with other.lease("k", timeout=0.01):
            pytest.fail("it is leased")

    with one.lease("k", create=list):
        with pytest.raises(LeaseTimeout, match="another process holds it"), other.lease("k", timeout=0.01):
            pytest.fail("it is leased")
        with pytest.raises(LeaseTimeout):
            asyncio.run(task())
        assert not one._kept().store.is_awaited("chats", "k")
    with other.lease("k", timeout=PATIENCE) as chat:
        assert [] == chat


def test_on_a_loop_a_plain_lease_works_unless_it_would_have_to_wait(two: Any) -> None:
    """Then it raises, and says what to write; the file of one process needs no wait."""
    one, other = two

    async def scene() -> None:
        with one.lease("k", create=list) as chat:
            chat.append("one")
            with pytest.raises(StoreError, match="would block the event loop: use `async with`"), other.lease("k"):
                pytest.fail("it is leased")
        async with asyncio.timeout(PATIENCE):
            async with other.lease("k") as chat:
                assert ["one"] == chat

    asyncio.run(scene())


def test_leases_in_a_file_that_one_process_uses_cost_no_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are saved later, with others, as without leases: by sync and async leases, in threads and nested."""
    commits: list[str] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.set_trace_callback(lambda said: commits.append(said) if said == "COMMIT" else None)
        return connection

    async def turns() -> None:
        for n in range(20):
            async with chats.lease(n % 4, create=list) as chat:
                chat.append(n)

    def thread() -> None:
        with chats.lease(5, create=list) as chat:
            chat.append("thread")

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    store = SQLiteStore(path)
    with WriteBehind(store, space="chats", every=1000, interval=3600) as writer:
        chats = Registry[int, list[Any]](maxsize=50, store=writer)
        commits.clear()
        for n in range(20):
            with chats.lease(n % 4, create=list) as chat, chats.lease(n % 4) as same:
                assert chat is same
                chat.append(n)
        asyncio.run(turns())
        other = threading.Thread(target=thread)
        other.start()
        other.join(PATIENCE)
        assert [] == commits
        chats.flush()
        assert ["COMMIT"] == commits
        chats.close()
    store.close()


def test_a_lease_that_is_kept_is_saved_and_given_back_when_another_process_comes(path: Path) -> None:
    """At most the interval of the janitor's checks after it has opened the file."""
    store = SQLiteStore(path)
    with WriteBehind(store, space="chats", every=1000, interval=3600) as writer:
        chats = Registry[str, list[Any]](maxsize=50, store=writer)
        for key in "ab":
            with chats.lease(key, create=list) as chat:
                chat.append("one")
        assert 0 == store.count("chats")
        with SQLiteStore(path) as second:
            other = Registry[str, list[Any]](maxsize=5, store=second, name="chats")
            with other.lease("a") as chat:
                assert ["one"] == chat
                chat.append("other")
            with chats.lease("a") as chat:
                assert ["one", "other"] == chat
            other.close()
        chats.close()
    store.close()
    assert ["one"] == stored(path, "b")


def test_a_kept_lease_is_given_back_when_it_is_saved_and_no_longer_used(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is checked any more then: an idle program does nothing."""
    monkeypatch.setattr("hygiene.tenure._KEPT", 0.0)
    with Registry[str, list[Any]](store=f"sqlite:{path}", name="chats") as chats:
        tenures = chats._kept().tenures
        assert isinstance(tenures, FileTenures)
        with chats.lease("k", create=list) as chat:
            chat.append("one")
        tenures.end_kept()
        assert tenures.has("k")
        chats.flush()
        tenures.end_kept()
        assert not tenures.has("k")
        assert not tenures.end_kept()
        deadline = time.monotonic() + PATIENCE
        while tenures._polls.running:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_two_registries_in_one_file_lease_their_own_keys(path: Path) -> None:
    url = f"sqlite:{path}"
    with (
        Registry[str, list[Any]](store=url, name="chats") as chats,
        Registry[str, list[Any]](store=url, name="users") as users,
        chats.lease("k", create=list) as chat,
        users.lease("k", create=list) as user,
    ):
        chat.append("chat")
        user.append("user")

    assert (["chat"], ["user"]) == (stored(path, "k"), stored(path, "k", "users"))


def test_changes_from_before_the_lease_are_saved_under_it_or_are_a_conflict(two: Any) -> None:
    one, other = two
    one["k"] = ["zero"]
    one.flush()
    other["k"].append("other")
    with other.lease("k") as chat:
        assert ["zero", "other"] == chat
    one["k"].append("too late")
    with pytest.raises(VersionConflict), one.lease("k"):
        pytest.fail("another process has saved it")
    with one.lease("k") as chat:
        assert ["zero", "other"] == chat


def test_a_store_in_memory_and_one_that_is_only_read_lease_within_the_registry(path: Path) -> None:
    with Registry[str, list[Any]](store="sqlite::memory:", name="chats") as chats:
        with chats.lease("k", create=list) as chat:
            chat.append("one")
        assert ["one"] == chats["k"]
    with Registry[str, list[Any]](store=f"sqlite:{path}", name="chats") as chats:
        chats["k"] = ["one"]
    with SQLiteStore(path, read_only=True) as store:
        registry = Registry[str, list[Any]](store=store, name="chats")
        with registry.lease("k") as chat:
            assert ["one"] == chat
        registry.close()


def test_closing_a_registry_gives_back_what_it_has_kept(path: Path) -> None:
    with SQLiteStore(path) as first, SQLiteStore(path) as second:
        chats = Registry[str, list[Any]](store=first, name="chats")
        with chats.lease("k", create=list) as chat:
            chat.append("one")
        chats.close()
        token = second.lease("chats", "k")
        assert token is not None
        record = second.load("chats", "k")
        assert record is not None
        assert ["one"] == record.value


def test_a_forked_child_takes_leases_of_its_own(path: Path, in_child: Callable[[Callable[[], object]], int]) -> None:
    """Inside a lease of its parent, which the child does not have, and waits for."""
    with Registry[str, list[Any]](store=f"sqlite:{path}", name="chats") as chats:
        with chats.lease("k", create=list) as chat:
            chat.append("parent")

            def child() -> None:
                with chats.lease("other", create=list) as found:
                    found.append("child")
                chats.flush()
                assert chats._kept().store.lease("chats", "k") is None

            assert 0 == in_child(child)
        chats.flush()

    assert (["parent"], ["child"]) == (stored(path, "k"), stored(path, "other"))


@pytest.mark.slow
def test_four_processes_take_turns_and_lose_nothing(path: Path, elsewhere: Callable[..., Any]) -> None:
    turns = 25
    workers = [elsewhere(TURNS, f"sqlite:{path}", name, turns) for name in range(4)]
    for process in workers:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in workers:
        process.communicate(timeout=60)
        assert 0 == process.returncode

    for key in "ab":
        found = stored(path, key)
        assert sorted(f"{name} {turn}" for name in range(4) for turn in range(turns)) == sorted(found)
        for name in range(4):  # each one's turns in their order
            mine = [item for item in found if item.startswith(f"{name} ")]
            assert [f"{name} {turn}" for turn in range(turns)] == mine


@pytest.mark.slow
def test_the_key_of_a_process_that_was_killed_in_a_turn_goes_to_the_next(
    path: Path, worker: Callable[..., Worker]
) -> None:
    """What it had not saved is lost; what it had saved is there, and nothing is mixed."""
    first, second = worker("first"), worker("second")
    assert "turn" == second.does("turn k")
    assert "turn" == first.does("turn k")
    assert "in" == first.does("in k")
    second.send("turn k")
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(PATIENCE)

    assert "turn" == second.answer()
    second.process.communicate(timeout=PATIENCE)
    assert ["second", "first", "second"] == stored(path, "k")


@pytest.mark.slow
def test_a_process_that_was_stopped_for_longer_than_the_term_finds_its_save_refused(
    path: Path, worker: Callable[..., Worker]
) -> None:
    """The next one gets the key when the term is over, and what it saves stands."""
    first, second = worker("first", 1.0), worker("second", 1.0)
    assert "turn" == second.does("turn k")
    assert "in" == first.does("in k")
    first.process.send_signal(signal.SIGSTOP)
    assert "turn" == second.does("turn k")
    first.process.send_signal(signal.SIGCONT)

    assert OwnershipLost.__name__ == first.does("out")
    assert "turn" == first.does("turn k")
    for each in (first, second):
        each.process.communicate(timeout=PATIENCE)
    assert ["second", "second", "first"] == stored(path, "k")


def test_a_registry_that_was_collected_or_replaced_leaves_no_lease(path: Path) -> None:
    """Its changes are saved, and the next registry of the space gets the key."""

    @bounded_registry("chats", maxsize=5, store=f"sqlite:{path}")
    class Bot:
        def __init__(self) -> None:
            self.chats: Any = {}

    def turn(registry: Any, name: str) -> None:
        with registry.lease("k", create=list) as chat:
            chat.append(name)

    bot = Bot()
    turn(bot.chats, "first")
    bot.chats = {}
    turn(bot.chats, "second")
    del bot
    gc.collect()
    bot = Bot()
    turn(bot.chats, "third")
    bot.chats.flush()

    assert ["first", "second", "third"] == bot.chats["k"]
    bot.chats.close()
