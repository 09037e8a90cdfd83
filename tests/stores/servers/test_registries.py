"""Registries of several processes that share one store: leases, fencing, and what is stale in memory."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent import futures
from typing import Any

import pytest

from hygiene import History, OwnershipLost, Registry, StoreError, StoreUnavailable, VersionConflict
from hygiene.keeping import Keeper, _hinted

PATIENCE = 30.0
SOON = 10.0  # a lease that is not given back holds three times as long


Open = Callable[..., Registry[Any, Any]]


@pytest.fixture
def bots(server: Any, prefix: str) -> Iterator[Open]:
    """Registries as several processes would have them, each with a connection of its own."""
    opened: list[tuple[Registry[Any, Any], Any]] = []

    def bot(**limits: Any) -> Registry[Any, Any]:
        store = server.open(prefix)
        registry: Registry[Any, Any] = Registry(store=store, name="chats", **limits)
        opened.append((registry, store))
        return registry

    yield bot
    for registry, store in opened:
        try:
            registry.close()
        except StoreError:  # the test has made it so
            pass
        finally:
            store.close()


COUNT = """
import sys
from hygiene import Registry, open_store
address, prefix, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open_store(address, prefix=prefix) as store, Registry(store=store, name="chats") as chats:
    for _ in range(times):
        with chats.lease("counter", create=dict) as counter:
            counter["n"] = counter.get("n", 0) + 1
print("done")
"""


@pytest.mark.slow
def test_four_processes_count_together(server: Any, prefix: str, elsewhere: Any, bots: Open) -> None:
    """Under the lease each sees what the last one saved: four times 100 is 400, and no update is lost."""
    processes = [elsewhere(COUNT, server.url, prefix, 100) for _ in range(4)]
    assert ["done"] * 4 == [process.communicate(timeout=55)[0].strip() for process in processes]

    assert {"n": 400} == bots()["counter"]


async def test_a_lease_is_for_the_whole_cluster(bots: Open) -> None:
    """While one process has the entry, another one waits; then it finds what the first one saved."""
    here, there = bots(), bots()
    inside, order = asyncio.Event(), []

    async def second() -> None:
        await inside.wait()
        async with there.lease("alice", create=list) as messages:
            order.append("second")
            messages.append("from there")

    task = asyncio.create_task(second())
    async with here.lease("alice", create=list) as messages:
        inside.set()
        messages.append("from here")
        while there._keeper is None or "alice" not in there._keeper.tenures._held:  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0)  # the other one has asked
        order.append("first")
    await task

    assert ["first", "second"] == order
    async with here.lease("alice") as messages:
        assert ["from here", "from there"] == messages


async def test_leases_of_one_process_overlap(bots: Open) -> None:
    """Ten tasks of one process share the lease, and it is given back when the last of them goes."""
    here, there = bots(), bots()

    async def one(n: int) -> None:
        async with here.lease("alice", create=list) as messages:
            messages.append(n)
            await asyncio.sleep(0)

    await asyncio.gather(*map(one, range(10)))

    async with there.lease("alice") as messages:
        assert set(range(10)) == set(messages)


async def test_a_blocking_read_on_a_loop_names_the_lease(bots: Open) -> None:
    """On an event loop a read that would wait for the network is refused; the error says what to write instead."""
    here, there = bots(), bots()
    async with here.lease("alice", create=list) as messages:
        messages.append("hello")

    for read in (
        lambda: there["alice"],
        lambda: there.get("alice"),
        lambda: "alice" in there,
        lambda: there.pop("alice"),
    ):
        with pytest.raises(StoreError, match=r"async with registry\.lease\('alice'\)"):
            read()
    with pytest.raises(StoreError, match="async with"), there.lease("alice"):
        pass
    async with there.lease("alice") as found:
        assert ["hello"] == found == there["alice"]  # now it is in memory


@pytest.mark.slow
def test_a_late_save_of_a_paused_owner_is_refused(server: Any, prefix: str, elsewhere: Any, bots: Open) -> None:
    """A process is stopped for longer than its lease lasts; its save is refused, and the new owner's data stands."""
    paused = elsewhere(
        """
import sys
import hygiene.tenure
hygiene.tenure._TTL = 0.5
from hygiene import OwnershipLost, Registry, VersionConflict, open_store
with open_store(sys.argv[1], prefix=sys.argv[2]) as store, Registry(store=store, name="chats") as chats:
    try:
        with chats.lease("alice", create=list) as messages:
            messages.append("from the owner that was stopped")
            print("inside", flush=True)
            sys.stdin.readline()
    except (OwnershipLost, VersionConflict) as error:
        print(type(error).__name__, flush=True)
    print(list(chats["alice"]), flush=True)
""",
        server.url,
        prefix,
    )
    assert "inside" == paused.stdout.readline().strip()
    paused.send_signal(signal.SIGSTOP)
    try:
        here = bots()
        with here.lease("alice", create=list) as messages:  # waits until the other's lease is over
            messages.append("from the new owner")
    finally:
        paused.send_signal(signal.SIGCONT)
    said, _ = paused.communicate("\n", timeout=PATIENCE)

    assert ["OwnershipLost", "['from the new owner']"] == said.splitlines()
    assert ["from the new owner"] == here["alice"]


def test_without_a_lease_a_lost_update_is_an_error(bots: Open) -> None:
    """Two processes change what both have in memory: the slower one is told, and then sees what was saved."""
    here, there = bots(), bots()
    here["alice"] = ["hello"]
    here.flush()
    stale = there["alice"]
    here["alice"].append("from here")
    here.flush()

    with pytest.raises(VersionConflict):  # noqa: PT012 - at once if the hint came, else when it is saved
        stale.append("from there")
        there.flush()

    assert ["hello", "from here"] == _again(there, "alice")
    with pytest.raises(VersionConflict):
        stale.append("once more")  # what was held is out of date, and says so
    assert ["hello", "from here"] == here["alice"]


def _again(registry: Registry[Any, Any], key: Any) -> Any:
    """Look up after a conflict, which the first look-up may still tell of."""
    try:
        return registry[key]
    except VersionConflict:
        return registry[key]


def test_a_hint_drops_what_is_stale(server: Any, prefix: str, bots: Open, wait: Any) -> None:
    """What another process has saved is seen without a lease, a moment later."""
    here, there = bots(), bots()
    here["alice"] = ["hello"]
    here.flush()
    assert ["hello"] == there["alice"]

    here["alice"].append("how are you")
    here.flush()
    wait(lambda: ["hello", "how are you"] == there["alice"])

    del here["alice"]
    here.flush()
    wait(lambda: "alice" not in there)


def test_what_is_created_twice_is_a_conflict(bots: Open) -> None:
    """Two processes find nothing and create: the second is told, instead of overwriting the first."""
    here, there = bots(), bots()
    assert "alice" not in here
    assert "alice" not in there
    here["alice"] = ["from here"]
    here.flush()
    there["alice"] = ["from there"]

    with pytest.raises(VersionConflict):
        there.flush()

    assert ["from here"] == _again(there, "alice")


def test_who_changes_under_a_lost_lease_is_told(bots: Open) -> None:
    """The lease has ended without our knowledge: the save is refused, and memory has what the server has."""
    here, there = bots(), bots()
    with pytest.raises(OwnershipLost), here.lease("alice", create=list) as messages:  # noqa: PT012 - at its end
        messages.append("too late")
        keeper = here._keeper
        assert keeper is not None
        tenure = keeper.tenures._held["alice"]
        keeper.store.release("chats", "alice", tenure.token)  # what its end does
        with there.lease("alice", create=list) as fresh:
            fresh.append("in time")

    assert ["in time"] == here["alice"] == there["alice"]


async def test_a_cancelled_lease_gives_the_key_back(bots: Open) -> None:
    """Wherever a task that leases is cancelled, the next one gets the key at once."""
    here, there = bots(), bots()
    for steps in range(0, 60, 3):
        inside = asyncio.Event()

        async def one(inside: asyncio.Event = inside) -> None:
            async with here.lease("alice", create=list):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(one())
        for _ in range(steps):
            await asyncio.sleep(0)
        if steps > 30:
            await asyncio.wait_for(inside.wait(), PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with asyncio.timeout(20), there.lease("alice", create=list):
        pass


async def test_what_the_body_raised_is_what_comes_out(bots: Open) -> None:
    """A save that fails at the end of a lease does not hide the error of the body; it is noted on it."""
    here, there = bots(), bots()
    with pytest.raises(ValueError, match="the body's") as raised:  # noqa: PT012 - at the end of the lease
        async with here.lease("alice", create=list) as messages:
            messages.append("lost")
            keeper = here._keeper
            assert keeper is not None
            keeper.store.release("chats", "alice", keeper.tenures._held["alice"].token)
            async with there.lease("alice", create=list) as fresh:
                fresh.append("kept")
            raise ValueError("the body's")

    assert any("while the lease of 'alice' ended" in line for line in raised.value.__notes__)


def test_threads_share_a_lease(bots: Open) -> None:
    """Eight threads lease one key of one process, and nothing that they append is lost."""
    here, there = bots(), bots()
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for n in range(10):
                with here.lease("alice", create=list) as messages:
                    messages.append((thread * 100) + n)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert [] == errors
    with there.lease("alice") as messages:
        assert isinstance(messages, History)
        assert 80 == len(set(messages)) == len(messages)


def _keeper(registry: Registry[Any, Any]) -> Keeper:
    keeper = registry._keeper
    assert keeper is not None
    return keeper


def _without_hints(registry: Registry[Any, Any]) -> None:
    hints = _keeper(registry)._hints
    assert hints is not None
    hints.close()


def _soon(function: Callable[[], object]) -> None:
    """Call it in a thread, which must end before a lease that was forgotten would."""
    error: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as raised:  # noqa: BLE001 - shown by the test
            error.append(raised)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SOON)

    assert [] == error
    assert not thread.is_alive()


def test_a_deletion_in_vain_is_no_absence(bots: Open) -> None:
    """What could not be deleted, because another process had changed it, is there, and is not created over."""
    here, there = bots(), bots()
    here["alice"] = ["hello"]
    here.flush()
    assert ["hello"] == there["alice"]
    _without_hints(there)
    here["alice"].append("from here")
    here.flush()
    del there["alice"]
    with pytest.raises(VersionConflict):
        there.flush()

    with there.lease("alice", create=list) as messages:
        assert ["hello", "from here"] == messages


def test_a_lease_tells_of_a_conflict_once(bots: Open) -> None:
    """What was changed without a lease, and too late, is an error of the next lease; the one after that goes on."""
    here, there = bots(), bots()
    here["alice"] = ["hello"]
    here.flush()
    stale = there["alice"]
    _without_hints(there)
    here["alice"].append("from here")
    here.flush()
    stale.append("too late")
    with pytest.raises(VersionConflict), there.lease("alice"):
        pass

    with there.lease("alice") as messages:
        assert ["hello", "from here"] == messages


async def test_the_body_of_a_lease_may_remove_the_entry(bots: Open) -> None:
    """On an event loop, too: what is removed under its lease is known to be absent, and may be put and leased anew."""
    here = bots()
    async with here.lease("alice", create=list) as messages:
        messages.append("first")
        del here["alice"]

        assert "alice" not in here
        assert here.get("alice") is None

        async with here.lease("alice", create=list) as again:
            again.append("second")

        assert ["second"] == here.pop("alice")
        assert ["third"] == here.setdefault("alice", ["third"])

    async with here.lease("alice") as messages:
        assert ["third"] == messages


async def test_a_lease_needs_no_thread_of_the_loop(bots: Open) -> None:
    """All threads of the loop may be waiting, perhaps for this very lease: it is taken and given back all the same."""
    here = bots()
    loop, over = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(futures.ThreadPoolExecutor(1))
    waiting = loop.run_in_executor(None, over.wait, PATIENCE)
    try:
        async with asyncio.timeout(SOON), here.lease("alice", create=list) as messages:
            messages.append("hello")
    finally:
        over.set()
        await waiting

    assert {} == _keeper(here).tenures._held  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_lease_whose_loop_is_gone_is_given_back(bots: Open) -> None:
    """A task is dropped with its loop, in the middle of its lease: what it changed is saved, and nobody has to wait."""
    here, there = bots(), bots()
    loop = asyncio.new_event_loop()

    async def hold(inside: asyncio.Event) -> None:
        async with here.lease("alice", create=list) as messages:
            messages.append("from the task")
            inside.set()
            await asyncio.Event().wait()

    async def begin() -> asyncio.Task[None]:
        inside = asyncio.Event()
        task = asyncio.create_task(hold(inside))
        await inside.wait()
        return task

    task = loop.run_until_complete(begin())
    task._log_destroy_pending = False  # type: ignore[attr-defined] # it is what is tested
    loop.close()
    del task
    gc.collect()

    def lease() -> None:
        for bot in (there, here):
            with bot.lease("alice") as messages:
                assert ["from the task"] == messages

    _soon(lease)


async def test_a_generator_that_is_closed_gives_its_lease_back(bots: Open) -> None:
    """An asynchronous generator is closed in the middle of its lease: when that is done, so is the save."""
    here, there = bots(), bots()

    async def stream() -> AsyncGenerator[Any, None]:
        async with here.lease("alice", create=list) as messages:
            messages.append("from the stream")
            yield messages

    opened = stream()
    await anext(opened)
    await opened.aclose()

    assert {} == _keeper(here).tenures._held  # type: ignore[union-attr]
    async with asyncio.timeout(SOON), there.lease("alice") as messages:
        assert ["from the stream"] == messages


def test_a_forked_child_leaves_the_lease_to_its_parent(bots: Open) -> None:
    """A child comes out of the block without an error, whoever had a lock meanwhile, and its parent has the lease."""
    here, there = bots(), bots()
    reading, writing = os.pipe()
    locked, over = threading.Event(), threading.Event()
    child = -1
    found: list[Any] = []

    def hold() -> None:
        with _keeper(here).writer._lock:
            locked.set()
            over.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    try:
        with here.lease("alice", create=list) as messages:
            thread.start()
            locked.wait(PATIENCE)
            child = os.fork()
            if child:
                over.set()
                thread.join(PATIENCE)
                messages.append("from the parent")
                found = select.select([reading], [], [], SOON)[0]
                assert _keeper(there).store.lease("chats", "alice") is None  # type: ignore[attr-defined]
    except BaseException as error:
        if child == 0:
            os.write(writing, repr(error).encode())
            os._exit(1)
        raise
    if child == 0:
        os.write(writing, b"left")
        os._exit(0)
    if not found:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    assert found
    assert b"left" == os.read(reading, 1000)
    with there.lease("alice") as messages:
        assert ["from the parent"] == messages
    for end in (reading, writing):
        os.close(end)


@pytest.mark.parametrize("how", ["close", "aclose"])
def test_closing_gives_leases_back(server: Any, prefix: str, bots: Open, how: str) -> None:
    """A registry and its store are closed in the middle of a lease: it is saved, and nobody has to wait."""
    there = bots()
    with server.open(prefix) as store:
        here: Registry[Any, Any] = Registry(store=store, name="chats")
        lease = here.lease("alice", create=list)
        lease.__enter__().append("hello")
        if how == "close":
            here.close()
        else:
            asyncio.run(here.aclose())
    lease.__exit__(None, None, None)

    _soon(lambda: there.lease("alice").__enter__())
    assert ["hello"] == there["alice"]


def test_a_save_that_its_lease_has_overtaken_is_saved(bots: Open) -> None:
    """A lease is given back while what was changed after it is being saved: that is no loss of ownership."""
    here = bots()
    keeper = _keeper(here)
    store: Any = keeper.store
    save = store.save

    def late(changes: Any, **options: Any) -> Any:
        if options.get("fence"):
            assert keeper.tenures is not None
            token = keeper.tenures._held["alice"].token
            keeper.writer.fence("alice", None)  # what the end of the lease does, just now
            store.release("chats", "alice", token)
        return save(changes, **options)

    with here.lease("alice", create=list) as messages:
        messages.append("hello")
        store.save = late
        here.flush()

    assert ["hello"] == store.load("chats", "alice").value


def test_a_hint_is_not_missed_while_the_store_is_away(bots: Open, wait: Any) -> None:
    """The server tells of a change, and cannot be asked for it at once: it is asked again."""
    here, there = bots(), bots()
    here["alice"] = ["hello"]
    here.flush()
    assert ["hello"] == there["alice"]
    store: Any = _keeper(there).store
    versions, asked = store.versions, threading.Event()

    def away(*_: Any) -> Any:
        store.versions = versions
        asked.set()
        raise StoreUnavailable("away for a moment")

    _without_hints(there)
    store.versions = away
    here["alice"].append("how are you")
    here.flush()
    hinted = threading.Thread(target=_hinted, args=(weakref.ref(_keeper(there)), ["alice"]))
    hinted.start()
    asked.wait(PATIENCE)

    wait(lambda: ["hello", "how are you"] == there["alice"])
    hinted.join(PATIENCE)


def test_what_is_stale_is_not_saved_while_it_leaves(bots: Open) -> None:
    """A value is changed at the moment at which it is found to be stale: what another process has saved stands."""
    here, there = bots(), bots()
    here["alice"] = {"n": 1}
    here.flush()
    stale = there["alice"]
    _without_hints(there)
    here["alice"] = {"n": 2}
    here.flush()
    keeper = _keeper(there)
    untrack = keeper.writer.untrack

    def untracked(key: Any) -> None:
        untrack(key)
        stale["n"] = 99
        if dict.__contains__(there, key):
            there.changed(key)

    keeper.writer.untrack = untracked  # type: ignore[method-assign]
    keeper.refresh(["alice"])
    there.flush()

    assert {"n": 2} == there["alice"]
