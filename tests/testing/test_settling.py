"""Waiting for the background work: nothing sleeps, and what is due is done when the wait is over."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from hygiene import Registry
from hygiene.janitor import aside, janitor
from hygiene.testing import asettle, settle

PATIENCE = 20.0


class Charge:
    """Asks to be visited again at once, some times; then it has something done in a thread."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.gate = threading.Event()
        self.ended = False

    def _visit(self) -> float | None:
        self.left -= 1
        if self.left:
            return 0.0
        aside(self._end, "test")
        return None

    def _end(self) -> None:
        self.gate.wait(PATIENCE)
        self.ended = True


class Value:
    """Takes some turns of its loop to close."""

    def __init__(self) -> None:
        self.closed = 0

    async def aclose(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        self.closed += 1


def test_what_is_due_has_been_done() -> None:
    """Also what came of it, and what that has started in a thread."""
    charge = Charge(50)
    janitor.watch(charge, 0.0)
    charge.gate.set()

    settle()

    assert (0, True) == (charge.left, charge.ended)


def test_expired_entries_are_gone() -> None:
    registry: Registry[int, int] = Registry({1: 2}, ttl=1e-6)

    settle()

    assert 0 == len(registry)


def test_what_is_due_later_is_not_waited_for() -> None:
    registry: Registry[int, int] = Registry({1: 2}, ttl="1h")

    settle()

    assert 1 == len(registry)


def test_releases_on_another_threads_loop_have_ended() -> None:
    values = [Value() for _ in range(3)]
    ready, end = threading.Event(), threading.Event()
    registry: Registry[int, Value] = Registry(maxsize=3, close="aclose")

    async def serve() -> None:
        registry.update(enumerate(values))
        ready.set()
        await asyncio.to_thread(end.wait, PATIENCE)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(PATIENCE)
    registry.trim(to=0)

    settle()

    assert [1, 1, 1] == [value.closed for value in values]
    end.set()
    thread.join(PATIENCE)


async def test_on_a_loop_its_own_releases_have_ended() -> None:
    values = [Value() for _ in range(3)]
    registry: Registry[int, Value] = Registry(enumerate(values), maxsize=3, close="aclose")
    registry.trim(to=0)
    assert [0, 0, 0] == [value.closed for value in values]

    await asettle()

    assert [1, 1, 1] == [value.closed for value in values]


async def test_on_a_loop_releases_that_waited_for_one_are_run() -> None:
    value = Value()

    registry: Registry[int, Value] = Registry(maxsize=3, close="aclose")
    await asyncio.to_thread(registry.__setitem__, 1, value)
    await asyncio.to_thread(registry.trim, to=0)

    await asettle()

    assert 1 == value.closed


async def test_what_does_not_end_is_named() -> None:
    charge = Charge(1)
    janitor.watch(charge, 0.0)

    with pytest.raises(TimeoutError, match="not settled in time: thread 'hygiene-test' still runs"):
        await asettle(0.2)
    charge.gate.set()
    await asettle()

    assert charge.ended


def test_a_janitor_that_hangs_is_named() -> None:
    gate = threading.Event()

    class Hanging:
        def _visit(self) -> None:
            gate.wait(PATIENCE)

    charge: Any = Hanging()
    janitor.watch(charge, 0.0)
    with pytest.raises(TimeoutError, match="the janitor is still busy with Hanging"):
        settle(0.2)
    gate.set()
    settle()


async def test_a_release_that_hangs_is_told() -> None:
    gate = asyncio.Event()

    class Hanging:
        async def aclose(self) -> None:
            await gate.wait()

    registry: Registry[int, Any] = Registry({1: Hanging()}, maxsize=3, close="aclose")
    registry.trim(to=0)

    with pytest.raises(TimeoutError, match="a release on an event loop still runs"):
        await asettle(0.2)
    gate.set()
    await asettle()


async def test_the_loop_is_not_blocked() -> None:
    with pytest.raises(RuntimeError, match="use `await asettle"):
        settle()
