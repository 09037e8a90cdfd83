"""What is left behind, kind by kind: it is found, and named with the stack that made it; what is right is not."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import logging
import os
import socket
import sqlite3
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import hygiene.testing.recording as recordings
from hygiene import (
    AsyncPool,
    AsyncSession,
    Pool,
    Registry,
    Session,
    managed_pool,
    managed_session,
    shared_resource,
    weak_listeners,
)
from hygiene.testing.leaks import KINDS, Leak, Watch

PATIENCE = 20.0


@contextmanager
def watched(*kinds: str, patience: float = 0.01, roots: Callable[[], list[object]] = list) -> Iterator[list[Leak]]:
    """A block, and what it leaves behind."""
    watch = Watch(kinds or KINDS, patience)
    found: list[Leak] = []
    watch.begin()
    try:
        yield found
    except BaseException:
        watch.cancel()
        raise
    found += watch.end(roots())


def words(found: list[Leak]) -> list[str]:
    return [leak.what for leak in found]


def here(leak: Leak) -> bool:
    """Whether the stack says that this file made it, and says no more than is of use."""
    return f'File "{__file__}"' in str(leak) and str(Path(recordings.__file__).parent) not in str(leak)


# --- Leases and pools -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lease_of_a_pool_is_found() -> None:
    with managed_pool(object, name="db") as pool:
        with watched() as found:
            lease = pool.lease()
        lease.release()

    assert ["a lease of pool 'db', not released"] == words(found)
    assert here(found[0])


@pytest.mark.slow
async def test_a_lease_of_an_async_pool_is_found() -> None:
    async with AsyncPool(object, name="db") as pool:
        with watched() as found:
            lease = await pool.lease()
        lease.release()

    assert ["a lease of pool 'db', not released"] == words(found)
    assert here(found[0])


def test_a_lease_that_was_there_before_is_not() -> None:
    with managed_pool(object, max_size=2) as pool:
        before = pool.lease()
        with watched() as found, pool.acquire():
            pass
        before.release()

    assert [] == found


@pytest.mark.slow
def test_a_pool_that_is_not_closed_is_found() -> None:
    with watched() as found:
        pool = Pool(object, name="db")
        with pool.acquire():
            pass
    pool.close()

    assert ["<Pool 'db': 0 in use, 1 idle, max_size=10>, not closed"] == words(found)
    assert here(found[0])


@pytest.mark.slow
def test_a_pool_that_is_dropped_open_is_found_and_warns_as_ever() -> None:
    with pytest.warns(ResourceWarning, match="dropped with 1 open"), watched() as found:  # noqa: PT031
        pool = Pool(object, name="db")
        with pool.acquire():
            pass
        del pool
        gc.collect()

    assert ["pool 'db' was dropped with 1 open"] == words(found)
    assert here(found[0])


def test_a_pool_with_nothing_open_is_not() -> None:
    with watched() as found:
        pool = Pool(object)

    assert [] == found
    assert not pool.closed


@pytest.mark.slow
def test_a_lease_of_a_registry_is_found() -> None:
    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, name="users")
    with watched() as found:
        lease = registry.lease("a")
        lease.__enter__()
        with registry.lease("a"), registry.lease("b"):
            pass
    lease.__exit__(None, None, None)

    assert ["the lease on 'a' of registry 'users', not released"] == words(found)
    assert here(found[0])


@pytest.mark.slow
async def test_a_lease_of_a_registry_in_a_task_is_found() -> None:
    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, name="users")
    with watched() as found:
        lease = registry.lease("a")
        await lease.__aenter__()
        async with registry.lease("b"):
            pass
    await lease.__aexit__(None, None, None)

    assert ["the lease on 'a' of registry 'users', not released"] == words(found)
    assert here(found[0])


# --- Sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_session_that_is_not_closed_is_found() -> None:
    with watched() as found:
        session = Session(name="job")
        session.callback(int)
        with managed_session() as inner:
            inner.callback(int)
    session.close()

    assert ["<Session 'job': 1 to release>, not closed"] == words(found)
    assert here(found[0])


@pytest.mark.slow
def test_the_session_of_a_generator_that_waits_is_found() -> None:
    @managed_session(name="rows")
    def rows() -> Iterator[int]:
        hygiene_session = sys.modules["hygiene"].current_session()
        hygiene_session.callback(int)
        yield 1

    with watched() as found:
        generator = rows()
        next(generator)
    generator.close()  # type: ignore[attr-defined]

    assert ["<Session 'rows': 1 to release>, not closed"] == words(found)
    assert here(found[0])


@pytest.mark.slow
async def test_an_async_session_that_is_dropped_is_found() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        with watched() as found:
            session = AsyncSession(name="job")
            session.callback(int)
            del session

    assert ["AsyncSession 'job' was dropped with 1 to release"] == words(found)
    assert here(found[0])


# --- Listeners and registries -----------------------------------------------------------------------------------------


@weak_listeners("on_message")
class Bus:
    def __init__(self) -> None:
        self.on_message: Any = []


class Player:
    def hear(self) -> None: ...


@pytest.mark.slow
def test_a_listener_is_found() -> None:
    bus, player, gone = Bus(), Player(), Player()
    with watched() as found:
        bus.on_message.append(player.hear)
        bus.on_message.append(gone.hear)
        bus.on_message.remove(gone.hear)

    assert ["<weak listener Player.hear> in Bus.on_message, not removed"] == words(found)
    assert here(found[0])


def test_a_listener_that_goes_with_its_owner_is_not() -> None:
    bus = Bus()
    with watched() as found:
        bus.on_message.append(Player().hear)

    assert [] == found


@pytest.mark.slow
def test_a_registry_that_has_grown_is_found() -> None:
    """With the keys that are new: there is no stack of what was put into a dict."""
    registry: Registry[str, int] = Registry({"a": 1}, name="users")
    with watched() as found:
        registry.update(b=2, c=3)
        registry["d"] = 4
        del registry["d"]

    assert ["registry 'users' grew from 1 to 3 entries; the newest: 'b', 'c'"] == words(found)


@pytest.mark.slow
def test_a_registry_that_somebody_keeps_is_found() -> None:
    with watched() as found:
        kept: Registry[str, int] = Registry({"a": 1}, name="users")
        Registry({"b": 2})

    assert ["registry 'users', with 1 entries"] == words(found)
    assert here(found[0])
    assert 1 == len(kept)


@pytest.mark.slow
def test_a_registry_that_the_runner_is_about_to_drop_is_not() -> None:
    """The values of fixtures are held until after the test."""
    kept: list[Any] = []
    with watched(roots=lambda: kept) as found:
        kept.append({"bot": Registry({"a": 1})})

    assert [] == found


def test_what_shared_resource_keeps_is_not() -> None:
    @shared_resource()
    def file() -> Any:
        return open(__file__, encoding="utf-8")  # noqa: PTH123

    with watched() as found:
        file()
    file.close()

    assert [] == found


# --- Threads and tasks ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thread_is_found() -> None:
    gate = threading.Event()
    with watched() as found:
        thread = threading.Thread(target=gate.wait, name="worker")
        thread.start()
    gate.set()
    thread.join(PATIENCE)

    assert ["thread 'worker', still running"] == words(found)
    assert here(found[0])


@pytest.mark.slow
def test_a_thread_that_is_about_to_end_is_waited_for() -> None:
    gate = threading.Event()
    with watched(patience=PATIENCE) as found:
        threading.Thread(target=gate.wait).start()
        threading.Thread(target=gate.set).start()

    assert [] == found


@pytest.mark.slow
def test_the_threads_of_an_executor_are_found_unless_it_is_older() -> None:
    with ThreadPoolExecutor() as older:
        with watched() as found:
            older.submit(int).result(PATIENCE)
            own = ThreadPoolExecutor(thread_name_prefix="own")
            own.submit(int).result(PATIENCE)
        own.shutdown()

    assert ["thread 'own_0', still running"] == words(found)


@pytest.mark.slow
def test_what_an_older_thread_makes_is_not_the_tests() -> None:
    """A server that was there before opens connections when it likes to."""
    begin, made = threading.Event(), threading.Event()
    kept: list[Any] = []

    def serve() -> None:
        begin.wait(PATIENCE)
        kept.extend((socket.socket(), open(__file__, encoding="utf-8"), threading.Thread(target=end.wait)))  # noqa: PTH123, SIM115
        kept[2].start()
        made.set()

    end = threading.Event()
    server = threading.Thread(target=serve)
    server.start()
    with watched() as found:
        begin.set()
        made.wait(PATIENCE)
    end.set()
    kept[0].close()
    kept[1].close()
    kept[2].join(PATIENCE)
    server.join(PATIENCE)

    assert [] == found


@pytest.mark.slow
def test_a_task_on_a_loop_that_goes_on_is_found() -> None:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()

        async def leave() -> asyncio.Task[Any]:
            asyncio.get_running_loop().create_task(asyncio.sleep(0))
            return asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="left")

        with watched("tasks") as found:
            task = loop.run_until_complete(leave())
        task.cancel()

    assert 1 == len(found)
    assert found[0].what.startswith("task 'left', still running Event.wait at ")
    assert here(found[0])


@pytest.mark.slow
def test_a_task_that_nobody_holds_is_found() -> None:
    """The collection before the last look does not destroy it."""
    with asyncio.Runner() as runner:

        async def leave() -> None:
            asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="left")

        with watched("tasks") as found:
            runner.get_loop().run_until_complete(leave())

    assert 1 == len(found)


# --- File descriptors -------------------------------------------------------------------------------------------------

fds = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")  # noqa: PTH112


@pytest.mark.slow
@fds
def test_files_and_sockets_are_found(tmp_path: Path) -> None:
    with watched("fds") as found:
        file = (tmp_path / "notes.txt").open("w")
        plug = socket.socket()
        with (tmp_path / "other.txt").open("w"):
            pass
    number = plug.fileno()
    file.close()
    plug.close()

    assert sorted([f"file descriptor {number} (", f"({tmp_path}/notes.txt), not closed"]) == sorted(
        next(part for part in (f"file descriptor {number} (", f"({tmp_path}/notes.txt), not closed") if part in what)
        for what in words(found)
    )
    assert all(here(leak) for leak in found)


@pytest.mark.slow
@fds
def test_a_database_is_found_with_all_its_files(tmp_path: Path) -> None:
    with watched("fds") as found:
        database = sqlite3.connect(tmp_path / "chats.db")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE t (c)")
    database.close()

    assert {f"{tmp_path}/chats.db{end}" for end in ("", "-wal", "-shm")} == {
        what.partition("(")[2].partition(")")[0] for what in words(found)
    }
    assert all(here(leak) for leak in found)


@pytest.mark.slow
@fds
def test_what_nobody_sees_being_opened_is_found_without_a_stack() -> None:
    with watched("fds") as found:
        ends = os.pipe()
    for end in ends:
        os.close(end)

    assert 2 == len(found)
    assert all("pipe:" in leak.what and leak.frames == () for leak in found)


@fds
def test_a_log_file_is_not(tmp_path: Path) -> None:
    with watched() as found:
        handler = logging.FileHandler(tmp_path / "log")
    handler.close()

    assert [] == found


@fds
def test_what_an_older_pool_opens_is_the_pools() -> None:
    with managed_pool(Path(__file__).open) as pool, watched() as found, pool.acquire():
        pass

    assert [] == found


# --- In general -------------------------------------------------------------------------------------------------------


def test_what_a_module_makes_when_it_is_imported_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives as long as the process, whoever is the first to import it."""
    (tmp_path / "kept_by_a_module.py").write_text(
        "import threading, hygiene\n"
        "cache = hygiene.Registry({1: 2})\n"
        "file = open(__file__)\n"
        "gate = threading.Event()\n"
        "thread = threading.Thread(target=gate.wait)\n"
        "thread.start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with watched() as found:
        module = importlib.import_module("kept_by_a_module")
    module.gate.set()
    module.thread.join(PATIENCE)
    module.file.close()
    monkeypatch.delitem(sys.modules, "kept_by_a_module")

    assert [] == found


def test_watching_keeps_nothing_alive() -> None:
    with watched() as found:
        things: list[Any] = [Pool(object), Registry({1: 2}), Session(), threading.Thread(target=int), Player()]
        things[3].start()
        things[3].join(PATIENCE)
        references = [weakref.ref(thing) for thing in things]
        things.clear()
        gc.collect()

        assert [None] * 5 == [reference() for reference in references]

    assert [] == found


def test_afterwards_everything_is_as_it_was() -> None:
    """Nothing stays wrapped; not even if somebody has wrapped it in between."""
    before = [vars(place)[name] for place, name, _ in recordings._WRAPPERS]
    with watched(), watched():
        assert all(
            vars(place)[name] is not old for (place, name, _), old in zip(recordings._WRAPPERS, before, strict=True)
        )

    assert before == [vars(place)[name] for place, name, _ in recordings._WRAPPERS]


def test_what_somebody_wraps_meanwhile_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = vars(threading.Thread)["start"]
    with watched():
        ours = vars(threading.Thread)["start"]
        theirs = functools.partialmethod(ours)
        monkeypatch.setattr(threading.Thread, "start", theirs)

    assert theirs is vars(threading.Thread)["start"]

    thread = threading.Thread(target=int)
    thread.start()
    thread.join(PATIENCE)
    monkeypatch.setattr(threading.Thread, "start", original)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"wanted kinds of leases, .*; found forks"):
        Watch(["threads", "forks"])


def test_only_what_is_asked_for_is_told() -> None:
    with watched("threads", "fds") as found:
        session = Session()
        session.callback(int)
    session.close()

    assert [] == found


@pytest.mark.slow
def test_watches_nest() -> None:
    gate = threading.Event()
    with watched() as outer:
        with watched() as inner:
            thread = threading.Thread(target=gate.wait)
            thread.start()
        with watched() as next_one:
            pass
    gate.set()
    thread.join(PATIENCE)

    assert (1, 0, 1) == (len(inner), len(next_one), len(outer))


def test_an_error_in_what_is_watched_goes_through() -> None:
    with suppress(ZeroDivisionError), watched():
        _ = 1 / 0

    assert [] == recordings._on
