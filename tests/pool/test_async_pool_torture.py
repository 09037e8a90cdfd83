"""The rarer accidents of a pool of tasks: loops that are gone, cancellations that nobody may swallow, late grants."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hygiene import AsyncPool
from hygiene import pool as module
from hygiene.leasing import Slot, Ticket

PATIENCE = 20.0  # seconds: a wait that takes longer than this on the slowest machine has been forgotten


def until(condition: Callable[[], bool]) -> None:
    """Let other threads go on until *condition* holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0)


async def steps(condition: Callable[[], object]) -> None:
    """Let the loop go on until *condition* holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


# Loops that are gone.


@pytest.mark.parametrize("how", ["dropped", "discarded"])
def test_a_lease_that_outlives_its_loop_is_forgotten_once(
    factory: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can close it any more; nobody is told more than once, and the janitor goes back to sleep."""
    pool = AsyncPool(factory)
    lease = asyncio.run(pool.lease())
    if how == "discarded":
        lease.release(discard=True)
    del lease
    until(lambda: pool.stats().in_use == 0)

    stats = pool.stats()
    assert (1, 1) == (stats.opened, stats.closed)
    assert stats.dropped == (how == "dropped") == len(caplog.records)
    assert [] == factory.closed

    async def use() -> None:
        async with pool, pool.acquire(timeout=0) as connection:
            assert 1 == connection.number

    asyncio.run(use())
    assert stats.dropped == pool.stats().dropped


def test_a_lease_that_comes_back_to_a_loop_that_is_gone_wants_no_reset(factory: Any) -> None:
    async def reset(connection: Any) -> None:
        raise AssertionError("there is no loop to run it")

    pool = AsyncPool(factory, reset=reset)
    lease = asyncio.run(pool.lease())
    lease.release()

    assert (1, 0) == (pool.stats().closed, pool.stats().in_use)


# Cancelled.


@pytest.mark.parametrize("again", [False, True])
async def test_a_cancellation_while_a_dead_one_is_closed_is_delivered(factory: Any, again: bool) -> None:
    """It is closed to the end, nothing is opened in its place, and the room is free for the next."""
    closing, go_on = asyncio.Event(), asyncio.Event()

    async def close(connection: Any) -> None:
        closing.set()
        await go_on.wait()
        connection.close()

    async with AsyncPool(factory, max_size=1, check=lambda c: c.number > 0, close=close) as pool:
        (await pool.lease()).release()
        task = asyncio.create_task(pool.lease())
        await closing.wait()
        task.cancel()
        await asyncio.sleep(0)
        if again:
            task.cancel()
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [0] == factory.closed
        assert 1 == len(factory.opened)
        async with pool.acquire(timeout=0) as connection:
            assert 1 == connection.number


async def test_a_dead_one_that_cannot_be_closed_within_the_grace_does_not_swallow_a_cancellation(
    factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up, and closed no second time."""
    closing = asyncio.Event()
    calls = []

    async def close(connection: Any) -> None:
        calls.append(connection.number)
        if connection.number == 0:
            closing.set()
            await asyncio.Event().wait()

    class Brief(module.Shield):
        def __init__(self) -> None:
            super().__init__(0.001)

    monkeypatch.setattr(module, "Shield", Brief)
    async with AsyncPool(factory, max_size=1, check=lambda c: c.number > 0, close=close) as pool:
        (await pool.lease()).release()
        task = asyncio.create_task(pool.lease())
        await closing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await steps(lambda: pool.stats().in_use == 0)
        assert [0] == calls
        (await pool.lease(timeout=0)).release()


@pytest.mark.usefixtures("cheap_collections")
async def test_what_is_granted_too_late_comes_back_without_a_collection(factory: Any) -> None:
    """A thread was just granting it when the task was cancelled: the slot goes with the ticket, and that at once."""
    async with AsyncPool(factory, max_size=1) as pool:
        core = pool._core
        lease = await pool.lease()
        task = asyncio.create_task(pool.lease())
        await steps(lambda: core.waiters)
        # The first half of a hand-off in another thread: the ticket has been taken out, and has no slot yet.
        ticket: Ticket[Any] | None
        ticket, _ = core.waiters.popitem(last=False)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        slot: Slot[Any] | None = lease._claim()
        # The second half.
        assert ticket is not None
        ticket.slot = slot
        ticket.wake()
        slot = ticket = None
        async with pool.acquire(timeout=PATIENCE) as connection:
            assert 1 == connection.number
        assert [0] == factory.closed


@pytest.mark.slow
async def test_a_task_in_another_thread_may_grant_while_the_first_is_cancelled(factory: Any) -> None:
    """Threads release, tasks are cancelled, and in the end there is full capacity."""
    async with AsyncPool(factory, max_size=2) as pool:
        for turn in range(200):
            leases = [await pool.lease(timeout=PATIENCE) for _ in range(2)]
            tasks = [asyncio.create_task(pool.lease(timeout=PATIENCE)) for _ in range(3)]
            await steps(lambda: pool.stats().waiting == 3)
            start = threading.Event()

            def release(leases: list[Any] = leases, start: threading.Event = start) -> None:
                start.wait(PATIENCE)
                while leases:
                    leases.pop().release()

            thread = threading.Thread(target=release)
            thread.start()
            start.set()
            tasks[turn % 3].cancel()
            for task in tasks:
                try:
                    (await task).release()
                except asyncio.CancelledError:
                    assert task is tasks[turn % 3]
            thread.join(PATIENCE)
        gc.collect()
        await steps(lambda: pool.stats().in_use == 0)
        full = [await pool.lease(timeout=PATIENCE) for _ in range(2)]
        for lease in full:
            lease.release()
