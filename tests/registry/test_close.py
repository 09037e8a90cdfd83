"""A value that the registry drops by its own decision is released, once, where that is right."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hygiene.registry import Registry
from hygiene.testing import ManualClock


class Connection:
    """Knows how, where and how often it was closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def close(self) -> None:
        self.closed.append("close")

    def hang_up(self) -> None:
        self.closed.append("hang_up")


class AsyncConnection:
    """Can be closed on a loop only."""

    def __init__(self) -> None:
        self.closed_on: list[asyncio.AbstractEventLoop] = []

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.closed_on.append(asyncio.get_running_loop())


class Both(Connection, AsyncConnection):
    def __init__(self) -> None:
        Connection.__init__(self)
        AsyncConnection.__init__(self)


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs elsewhere."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return function()

    return asyncio.run_coroutine_threadsafe(run(), loop).result(20)


OURS: dict[str, Callable[[Registry[Any, Any]], Any]] = {
    "size": lambda r: r.__setitem__("b", Connection()),
    "expired": lambda r: (r._timer.advance(60), r.expire()),
    "trim": lambda r: r.trim(0),
    "evict": lambda r: r.evict("a"),
    "close": lambda r: r.close(),
    "with": lambda r: r.__exit__(None, None, None),
}
THEIRS: dict[str, Callable[[Registry[Any, Any]], Any]] = {
    "del": lambda r: r.__delitem__("a"),
    "pop": lambda r: r.pop("a"),
    "popitem": lambda r: r.popitem(),
    "clear": lambda r: r.clear(),
    "replace": lambda r: r.__setitem__("a", Connection()),
}


@pytest.mark.parametrize("cause", OURS)
@pytest.mark.parametrize(
    ("close", "wanted"),
    [("auto", "close"), ("close", "close"), ("hang_up", "hang_up"), (Connection.hang_up, "hang_up")],
)
def test_what_the_registry_drops_is_closed_once(clock: ManualClock, cause: str, close: Any, wanted: str) -> None:
    """By a callable, a method's name, or whichever way the value has."""
    registry: Registry[str, Connection] = Registry(maxsize=1, ttl=60, close=close, timer=clock)
    connection = registry["a"] = Connection()
    OURS[cause](registry)
    registry.close()
    registry.close()

    assert [wanted] == connection.closed


@pytest.mark.parametrize("cause", THEIRS)
def test_what_the_caller_took_is_his(cause: str) -> None:
    registry: Registry[str, Connection] = Registry(maxsize=2, close="close")
    connection = registry["a"] = Connection()
    THEIRS[cause](registry)

    assert [] == connection.closed


def test_values_with_nothing_to_close_simply_leave() -> None:
    registry: Registry[str, Any] = Registry({"a": 1, "b": [2], "c": {"d": 3}}, close="auto")
    registry.close()

    assert 0 == registry.stats().hook_errors
    assert {} == registry


def test_a_closed_registry_goes_on_working() -> None:
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=2)
    with registry as same:
        assert same is registry
    registry.update(x=1, y=2, z=3)

    assert {"y": 2, "z": 3} == registry


def test_a_failing_closer_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The writer that pushed the value out is not disturbed, and the others are closed all the same."""
    closed: list[int] = []

    def close(value: int) -> None:
        closed.append(value)
        raise OSError("line is dead")

    registry: Registry[str, int] = Registry({"a": 1, "b": 2, "c": 3}, maxsize=3, close=close)
    registry["d"] = 4
    with caplog.at_level(logging.ERROR, logger="hygiene"):
        registry.close()

    assert [1, 2, 3, 4] == closed
    assert 4 == registry.stats().hook_errors
    assert "line is dead" in caplog.text


def test_closers_run_with_the_lock_free(elsewhere: Callable[..., Any]) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, close=lambda value: elsewhere(registry.pop, "x", None))
    registry["b"] = 2
    registry.close()

    assert 0 == registry.stats().hook_errors


# On a loop.


async def test_an_asynchronous_closer_runs_on_its_loop_and_is_awaited() -> None:
    """``drain`` returns when every release that was started has ended."""
    registry: Registry[str, AsyncConnection] = Registry(maxsize=1, close="aclose")
    connection = registry["a"] = AsyncConnection()
    registry["b"] = AsyncConnection()
    assert [] == connection.closed_on
    async with asyncio.timeout(20):
        await registry.drain()

    assert [asyncio.get_running_loop()] == connection.closed_on


async def test_aclose_waits_for_all() -> None:
    registry: Registry[int, AsyncConnection] = Registry(close="auto")
    connections = [registry.setdefault(i, AsyncConnection()) for i in range(5)]
    async with asyncio.timeout(20), registry as same:
        assert same is registry

    assert [1] * 5 == [len(connection.closed_on) for connection in connections]
    assert {} == registry


async def test_auto_prefers_the_asynchronous_way_on_a_loop() -> None:
    """A value that has both is closed by ``aclose`` if it was put in from a loop, and by ``close`` otherwise."""
    registry: Registry[str, Both] = Registry(close="auto")
    on_loop = registry["a"] = Both()
    plain = Both()
    thread = threading.Thread(target=registry.__setitem__, args=("b", plain))
    thread.start()
    thread.join(20)
    async with asyncio.timeout(20):
        await registry.aclose()

    assert (1, []) == (len(on_loop.closed_on), on_loop.closed)
    assert (0, ["close"]) == (len(plain.closed_on), plain.closed)


def test_a_value_is_released_on_the_loop_it_was_put_in_from() -> None:
    """Wherever the eviction happens, what belongs to a loop is closed by that loop."""
    with loop_in_a_thread() as loop:
        registry: Registry[str, AsyncConnection] = Registry(maxsize=1, close="aclose")
        connection = AsyncConnection()
        in_loop(loop, lambda: registry.__setitem__("a", connection))
        registry["b"] = AsyncConnection()  # in this thread, which has no loop
        registry.pop("b")
        asyncio.run(registry.drain())

        assert [loop] == connection.closed_on


def test_a_synchronous_closer_too_runs_on_the_loop_of_its_value() -> None:
    """A task or a transport is not thread-safe: it is closed where it lives."""
    where: list[int] = []
    with loop_in_a_thread() as loop:
        home = in_loop(loop, threading.get_ident)
        registry: Registry[str, int] = Registry(maxsize=1, close=lambda value: where.append(threading.get_ident()))
        in_loop(loop, lambda: registry.__setitem__("a", 1))
        registry["b"] = 2
        registry.pop("b")
        asyncio.run(registry.drain())

    assert [home] == where


def test_a_value_from_plain_code_waits_for_drain(caplog: pytest.LogCaptureFixture) -> None:
    """There is no loop that an asynchronous closer could run on: it is kept, and ``close`` says so."""
    registry: Registry[str, AsyncConnection] = Registry(maxsize=1, close="aclose", name="lines")
    connections = [registry.setdefault(key, AsyncConnection()) for key in "ab"]
    with caplog.at_level(logging.WARNING, logger="hygiene"):
        registry.close()
    assert "registry lines was closed with 2 asynchronous releases that have no loop to run on" in caplog.text
    assert [0, 0] == [len(connection.closed_on) for connection in connections]
    asyncio.run(registry.drain())

    assert [1, 1] == [len(connection.closed_on) for connection in connections]


def test_a_loop_that_is_gone_does_not_lose_the_release() -> None:
    """The loop that the value was put in from is closed: the release waits for whoever drains."""
    registry: Registry[str, AsyncConnection] = Registry(maxsize=1, close="aclose")
    connection = AsyncConnection()

    async def put() -> None:
        registry["a"] = connection

    asyncio.run(put())
    registry["b"] = AsyncConnection()
    registry.pop("b")
    assert [] == connection.closed_on
    asyncio.run(registry.drain())

    assert 1 == len(connection.closed_on)


async def test_a_failing_asynchronous_closer_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(value: int) -> None:
        raise OSError("line is dead")

    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, close=fail)
    async with asyncio.timeout(20):
        await registry.aclose()

    assert 2 == registry.stats().hook_errors
    assert "line is dead" in caplog.text


async def test_a_drain_that_is_cancelled_loses_nothing() -> None:
    """Who gives up waiting takes nothing with him: the release goes on, and the next drain waits for it."""
    registry: Registry[str, int] = Registry({}, close=lambda value: release())
    started, go = asyncio.Event(), asyncio.Event()
    done: list[bool] = []

    async def release() -> None:
        started.set()
        await go.wait()
        done.append(True)

    registry["a"] = 1
    registry.close()
    draining = asyncio.create_task(registry.drain())
    async with asyncio.timeout(20):
        await started.wait()
        await asyncio.sleep(0)
        draining.cancel()
        await asyncio.wait([draining])
        go.set()
        await registry.drain()

    assert [True] == done


def test_a_cancelled_drain_of_another_loops_release_loses_nothing() -> None:
    """Also where the release was handed over to a loop that is busy."""
    entered, go = threading.Event(), threading.Event()
    closed: list[int] = []
    with loop_in_a_thread() as loop:
        registry: Registry[str, int] = Registry(close=closed.append)
        in_loop(loop, lambda: registry.__setitem__("a", 1))

        def block() -> None:
            entered.set()
            go.wait(20)

        loop.call_soon_threadsafe(block)
        assert entered.wait(20)
        registry.close()

        async def give_up() -> None:
            draining = asyncio.create_task(registry.drain())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            draining.cancel()
            await asyncio.wait([draining])

        asyncio.run(give_up())
        go.set()

        async def drain() -> None:
            async with asyncio.timeout(20):
                await registry.drain()

        asyncio.run(drain())

    assert [1] == closed
    assert 0 == registry.stats().hook_errors
