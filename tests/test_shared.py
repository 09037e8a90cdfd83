"""One resource for all, or one for each thread and task: made once, closed once, by itself."""

from __future__ import annotations

import asyncio
import gc
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene.shared import ManagedLocal, SharedResource, managed_local, shared_resource
from hygiene.testing import ManualClock


class Client:
    """What is expensive to connect. Its parts refer back to it, as parts do."""

    def __init__(self, log: list[tuple[str, Any]], name: Any = None) -> None:
        self.log = log
        self.name = name
        self.transport = [self]
        self.closed = False
        log.append(("open", name))

    def close(self) -> None:
        self.closed = True
        self.log.append(("close", self.name))


class AsyncClient(Client):
    close = None  # type: ignore[assignment]

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.closed = True
        self.log.append(("close", self.name))


@pytest.fixture
def log() -> list[tuple[str, Any]]:
    return []


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def in_threads(function: Callable[[], Any], count: int = 8) -> list[Any]:
    """What *function* gives in *count* threads that begin at once."""
    barrier = threading.Barrier(count)
    results: list[Any] = []

    def run() -> None:
        barrier.wait(20)
        results.append(function())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert count == len(results)
    return results


# One for all.


def test_everybody_gets_the_same_one(log: list[tuple[str, Any]]) -> None:
    """A vector store that every request loaded is loaded once."""

    @shared_resource()
    def index() -> Client:
        return Client(log)

    first = index()

    assert first is index()
    assert {first} == set(in_threads(index))
    assert [("open", None)] == log


def test_each_set_of_arguments_has_its_own(log: list[tuple[str, Any]]) -> None:
    @shared_resource()
    def client(host: str, port: int = 80) -> Client:
        return Client(log, (host, port))

    assert client("a") is client("a")
    assert client("a") is not client("b")
    assert client("a", port=81) is client("a", port=81)
    assert [("open", ("a", 80)), ("open", ("b", 80)), ("open", ("a", 81))] == log


def test_arguments_must_be_hashable(log: list[tuple[str, Any]]) -> None:
    @shared_resource()
    def client(hosts: list[str]) -> Client:
        return Client(log, hosts)

    with pytest.raises(TypeError, match="unhashable"):
        client(["a"])

    assert [] == log


def test_threads_that_ask_at_once_load_it_once(log: list[tuple[str, Any]]) -> None:
    """The others wait for the first, however long it takes."""
    loading, loaded = threading.Event(), threading.Event()

    @shared_resource()
    def index() -> Client:
        loading.set()
        assert loaded.wait(20)
        return Client(log)

    found: list[Client] = []
    threads = [threading.Thread(target=lambda: found.append(index())) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert loading.wait(20)
    loaded.set()
    for thread in threads:
        thread.join(20)

    assert 5 == len(found)
    assert 1 == len(set(found))
    assert [("open", None)] == log


async def test_tasks_that_ask_at_once_load_it_once(log: list[tuple[str, Any]]) -> None:
    @shared_resource()
    async def client() -> AsyncClient:
        await asyncio.sleep(0)
        return AsyncClient(log)

    found = await asyncio.gather(*(client() for _ in range(10)))

    assert 1 == len(set(found))
    assert [("open", None)] == log
    await client.aclose()
    assert [("open", None), ("close", None)] == log


def test_a_factory_that_raises_is_asked_again(log: list[tuple[str, Any]]) -> None:
    attempts: list[int] = []

    @shared_resource()
    def client() -> Client:
        attempts.append(1)
        if len(attempts) == 1:
            raise ConnectionError("not yet")
        return Client(log)

    with pytest.raises(ConnectionError, match="not yet"):
        client()

    assert client() is client()
    assert 2 == len(attempts)


async def test_a_loader_that_is_cancelled_leaves_it_to_the_next(log: list[tuple[str, Any]]) -> None:
    entered = asyncio.Event()

    @shared_resource()
    async def client() -> AsyncClient:
        if not entered.is_set():
            entered.set()
            await asyncio.Event().wait()
        return AsyncClient(log)

    first = asyncio.ensure_future(client())
    await entered.wait()
    second = asyncio.ensure_future(client())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first

    assert isinstance(await second, AsyncClient)
    await client.aclose()


def test_it_is_closed_when_nobody_has_used_it_for_a_while(log: list[tuple[str, Any]], clock: ManualClock) -> None:
    """The client of a request is closed ten minutes after the last request, and not after each."""

    @shared_resource(idle="10m", timer=clock)
    def client() -> Client:
        return Client(log)

    client()
    clock.advance(599)
    client()
    clock.advance(599)
    assert 0 == client.expire()

    clock.advance(2)
    assert 1 == client.expire()
    assert [("open", None), ("close", None)] == log

    assert not client().closed
    assert 2 == log.count(("open", None))


def test_who_refers_to_it_keeps_it_open(log: list[tuple[str, Any]], clock: ManualClock) -> None:
    @shared_resource(idle=60, timer=clock)
    def client() -> Client:
        return Client(log)

    held = client()
    clock.advance(61)
    assert 0 == client.expire()
    assert not held.closed
    assert held is client()

    del held
    clock.advance(61)
    assert 1 == client.expire()
    assert ("close", None) == log[-1]


async def test_a_coroutine_that_awaits_something_of_it_keeps_it_open(
    log: list[tuple[str, Any]], clock: ManualClock
) -> None:
    gate = asyncio.Event()

    class Slow(AsyncClient):
        async def get(self) -> str:
            await gate.wait()
            return "closed" if self.closed else "open"

    @shared_resource(idle=60, timer=clock)
    async def client() -> Slow:
        return Slow(log)

    async def request() -> str:
        return await (await client()).get()

    task = asyncio.ensure_future(request())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    clock.advance(61)
    assert 0 == client.expire()

    gate.set()
    assert "open" == await task
    del task
    clock.advance(61)
    assert 1 == client.expire()
    await client.aclose()
    assert ("close", None) == log[-1]


def test_a_lease_keeps_it_open(log: list[tuple[str, Any]], clock: ManualClock) -> None:
    @shared_resource(idle=60, timer=clock)
    def client() -> Client:
        return Client(log)

    with client.lease():
        clock.advance(61)
        assert 0 == client.expire()

    clock.advance(61)
    assert 1 == client.expire()


async def test_an_asynchronous_one_has_leases_too(log: list[tuple[str, Any]], clock: ManualClock) -> None:
    @shared_resource(idle=60, timer=clock)
    async def client(name: str) -> AsyncClient:
        return AsyncClient(log, name)

    async with client.lease("a") as leased:
        assert "a" == leased.name
        assert leased is await client("a")
    await client.aclose()

    assert [("open", "a"), ("close", "a")] == log


def test_each_event_loop_has_its_own(log: list[tuple[str, Any]]) -> None:
    """A client belongs to the loop that it was connected on; that of a loop that is gone is let go of."""

    @shared_resource()
    async def client() -> AsyncClient:
        return AsyncClient(log)

    async def main() -> AsyncClient:
        assert await client() is await client()
        return await client()

    first, second = asyncio.run(main()), asyncio.run(main())

    assert first is not second
    assert "<shared_resource 'test_each_event_loop_has_its_own.<locals>.client': 1 open>" == repr(client)
    asyncio.run(client.aclose())
    assert [second] == [one for one in (second,) if one.closed]


def test_closing_is_said_how(log: list[tuple[str, Any]]) -> None:
    closed: list[Client] = []

    @shared_resource(close=closed.append)
    def client() -> Client:
        return Client(log)

    one = client()
    client.close()
    client.close()

    assert [one] == closed
    assert not one.closed


def test_a_closer_that_is_missing_is_logged(log: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    @shared_resource(close="hang_up")
    def client() -> Client:
        return Client(log)

    client()
    client.close()

    assert "has no method 'hang_up'" in caplog.text


def test_a_resource_with_nothing_to_close_is_forgotten() -> None:
    @shared_resource()
    def numbers() -> list[int]:
        return [1]

    numbers().append(2)
    numbers.close()

    assert [1] == numbers()


def test_it_looks_like_its_factory() -> None:
    @shared_resource()
    def client() -> list[int]:
        """The client of the payment service."""
        return []

    assert "client" == client.__name__
    assert "The client of the payment service." == client.__doc__
    assert isinstance(client, SharedResource)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"idle": 0}, ValueError, "idle must be positive"),
        ({"idle": "soon"}, ValueError, "idle must be positive"),
        ({"idle": list}, TypeError, "takes its arguments first: write @shared_resource()"),
        ({"close": 3}, TypeError, "close must be a callable"),
        ({"close": None}, TypeError, "close must be a callable"),
    ],
)
def test_bad_arguments_are_refused_at_decoration(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        shared_resource(**arguments)

    assert message in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_after_fork_the_child_makes_its_own_and_closes_only_that(log: list[tuple[str, Any]]) -> None:
    read, write = os.pipe()

    class Reporting(Client):
        def close(self) -> None:
            os.write(write, f"closed {self.name} ".encode())

    @shared_resource()
    def client() -> Reporting:
        return Reporting(log, "parent" if os.getpid() == parent else "child")

    parent = os.getpid()
    mine = client()
    child = os.fork()
    if not child:
        fresh = client()
        os.write(write, f"has {fresh.name} ".encode())
        client.close()
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        assert b"has child closed child " == said.read()
    assert mine is client()
    write = os.open(os.devnull, os.O_WRONLY)  # for the close at exit


@pytest.mark.slow
def test_without_a_loop_shutdown_says_that_an_asynchronous_one_needs_one() -> None:
    """Nothing is reported as finished, and no coroutine is made that nobody awaits."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", ASYNC_END],
        check=True,
        capture_output=True,
        text=True,
        timeout=50,
    )

    assert "" == done.stderr
    assert ["{\"shared resource 'client'\": 'needs an event loop: await ashutdown()'}", "closed"] == (
        done.stdout.splitlines()
    )


ASYNC_END = """
import asyncio
import logging

from hygiene import ashutdown, shared_resource, shutdown

logging.getLogger("hygiene").setLevel(logging.CRITICAL)

class Client:
    async def aclose(self):
        print("closed")

@shared_resource()
async def client():
    return Client()

async def main():
    await client()

asyncio.run(main())
print(dict(shutdown().unfinished))
asyncio.run(ashutdown())
"""


# One for each.


def test_each_thread_has_its_own_and_it_is_closed_when_the_thread_ends(log: list[tuple[str, Any]]) -> None:
    """The thread-local state of threads that ended does not stay."""

    @managed_local
    def client() -> Client:
        return Client(log)

    ours = client()
    found = in_threads(lambda: (client(), client()))

    assert all(first is second for first, second in found)
    assert 9 == len({ours, *(first for first, _ in found)})
    assert all(first.closed for first, _ in found)
    assert not ours.closed
    assert 1 == len(client)
    client.close()
    assert ours.closed


def test_a_thread_closes_its_own_in_itself(tmp_path: Path) -> None:
    """SQLite refuses a connection in another thread than the one that opened it."""
    ended: list[int] = []

    class Connection(sqlite3.Connection):
        def close(self) -> None:
            ended.append(threading.get_ident())
            super().close()

    local = managed_local(lambda: sqlite3.connect(tmp_path / "test.db", factory=Connection))
    idents = in_threads(lambda: (local().execute("select 1").fetchall(), threading.get_ident())[1], count=3)

    assert sorted(idents) == sorted(ended)


async def test_each_task_has_its_own_and_it_is_closed_when_the_task_ends(log: list[tuple[str, Any]]) -> None:
    client = managed_local(lambda: Client(log))

    async def work() -> Client:
        first = client()
        await asyncio.sleep(0)
        assert first is client()
        return first

    found = await asyncio.gather(work(), work())
    await asyncio.sleep(0)

    assert 2 == len(set(found))
    assert all(one.closed for one in found)
    assert 0 == len(client)


async def test_an_asynchronous_one_is_closed_on_the_loop(log: list[tuple[str, Any]]) -> None:
    @managed_local
    async def client() -> AsyncClient:
        await asyncio.sleep(0)
        return AsyncClient(log)

    async def work() -> AsyncClient:
        return await client()

    one = await asyncio.create_task(work())
    await client.aclose()

    assert one.closed
    assert [("open", None), ("close", None)] == log


async def test_a_task_that_is_cancelled_closes_its_own(log: list[tuple[str, Any]]) -> None:
    client = managed_local(lambda: Client(log))
    begun = asyncio.Event()

    async def work() -> None:
        client()
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)

    assert [("open", None), ("close", None)] == log


def test_after_close_the_next_call_makes_another(log: list[tuple[str, Any]]) -> None:
    client = managed_local(lambda: Client(log))
    first = client()
    client.close()
    client.close()

    assert first.closed
    assert first is not client()
    assert "<managed_local" in repr(client)
    client.close()


@pytest.mark.slow
def test_collecting_the_local_closes_what_is_left(log: list[tuple[str, Any]]) -> None:
    client = managed_local(lambda: Client(log))
    client()
    del client
    gc.collect()

    assert [("open", None), ("close", None)] == log


def test_a_class_with_a_close_of_its_own_can_be_the_factory() -> None:
    class Parser:
        closed = 0

        def close(self) -> None:
            Parser.closed += 1

    local, shared = managed_local(Parser), shared_resource()(Parser)
    local()
    shared()
    local.close()
    shared.close()

    assert 2 == Parser.closed


def test_what_closing_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(value: object) -> None:
        raise OSError("no line")

    local = managed_local(dict, close=fail)
    local()
    local.close()

    assert "no line" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3,), "needs a factory"), ((dict, 3), "close must be a callable"), ((dict, None), "close must be a callable")],
)
def test_a_bad_local_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        managed_local(*arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_after_fork_the_childs_thread_has_its_own(log: list[tuple[str, Any]]) -> None:
    local: ManagedLocal[Client] = managed_local(lambda: Client(log, os.getpid()))
    mine = local()
    child = os.fork()
    if not child:
        os._exit(0 if local().name == os.getpid() and not mine.closed else 1)

    assert 0 == os.waitpid(child, 0)[1]
    assert mine is local()
    local.close()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A factory of one test is collected before the next begins."""
    yield
    gc.collect()
