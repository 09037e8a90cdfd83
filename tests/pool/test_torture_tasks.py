"""A pool of tasks where everything goes wrong: raising, hanging, dying, cancelled at any step; no slot is ever lost."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import anyio
import pytest

import hygiene.pool
from hygiene import AsyncPool, PoolClosed, PoolTimeout
from hygiene.closing import Shield
from hygiene.leasing import Leasing

LIMIT = 20  # seconds that a wait may take before it counts as a hang


class Connection:
    """A resource that knows who holds it, and whose closing takes a few steps."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closing = 0
        self.closed = 0
        self.holders = 0

    async def aclose(self) -> None:
        self.closing += 1
        await step(2)
        self.closed += 1

    def __repr__(self) -> str:
        return f"c{self.number}"


class Factory:
    """Opens connections, unless *failures* says what to raise, and keeps them to look at."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.failures: deque[BaseException] = deque()

    async def __call__(self) -> Connection:
        await step(2)
        if self.failures:
            raise self.failures.popleft()
        connection = Connection(len(self.opened))
        self.opened.append(connection)
        return connection

    @property
    def closed(self) -> list[int]:
        assert all(connection.closing <= 1 for connection in self.opened), "closed twice"
        return [connection.number for connection in self.opened if connection.closed]


class Gate:
    """Stops who comes to it until it is opened, and tells that somebody has come."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, *_: object) -> None:
        self.reached.set()
        await self.open.wait()


async def step(number: int = 1) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Let the other tasks and threads run until *condition* holds."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0)


async def waiting(pool: AsyncPool[Any], number: int) -> None:
    await until(lambda: pool.stats().waiting == number)


async def settled(pool: AsyncPool[Any]) -> None:
    """Wait until every slot is back in its place."""
    await until(lambda: len(pool._core.idle) + len(pool._core.vacant) == pool.max_size)


async def assert_full_capacity(pool: AsyncPool[Any]) -> None:
    """Each slot can be taken, no more than there are, and every resource is accounted for."""
    gc.collect()
    await settled(pool)
    leases = [await pool.lease(timeout=0) for _ in range(pool.max_size)]
    with pytest.raises(PoolTimeout):
        await pool.lease(timeout=0)
    assert pool.max_size == len({lease.resource.number for lease in leases})
    for lease in leases:
        assert not lease.resource.closing
        lease.release()
    await settled(pool)
    stats = pool.stats()

    assert (0, 0, 0) == (stats.in_use, stats.opening, stats.waiting)
    assert stats.opened == stats.in_use + stats.idle + stats.closed


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel *task*, which has to end that way."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(task)


async def within(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(LIMIT):
        return await awaitable


@pytest.fixture
def factory() -> Factory:
    return Factory()


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs is given up soon."""
    monkeypatch.setattr(hygiene.pool, "GRACE", 0.01)
    monkeypatch.setattr(hygiene.pool, "Shield", functools.partial(Shield, 0.01))


# Opening.


async def test_the_first_acquire_on_an_empty_pool_opens_at_once(factory: Factory) -> None:
    """It does not wait for anything, not even if it may wait: a timeout of 0 is enough."""
    async with AsyncPool(factory, max_size=1) as pool, pool.acquire(timeout=0) as connection:
        assert [connection] == factory.opened


@pytest.mark.parametrize("error", [ConnectionError, asyncio.CancelledError])
async def test_open_that_raises_gives_the_slot_back(factory: Factory, error: type[BaseException]) -> None:
    async with AsyncPool(factory, max_size=1) as pool:
        for _ in range(3):
            failure = error("no")
            factory.failures.append(failure)
            with pytest.raises(error) as caught:
                await pool.lease(timeout=0)
            assert failure is caught.value

        await assert_full_capacity(pool)
        assert 1 == pool.stats().opened


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_open_that_is_interrupted_gives_the_slot_back(factory: Factory, error: type[BaseException]) -> None:
    """The interruption ends the loop's run; when that goes on, the slot is there."""
    loop = asyncio.new_event_loop()
    pool = AsyncPool(factory, max_size=1)
    factory.failures.append(error("no"))
    with pytest.raises(error):
        loop.run_until_complete(pool.lease(timeout=0))

    loop.run_until_complete(assert_full_capacity(pool))
    loop.run_until_complete(pool.aclose())
    loop.close()
    assert [0] == factory.closed


async def test_if_open_fails_the_next_who_waits_opens(factory: Factory) -> None:
    gate = Gate()

    async def fails() -> Connection:
        await gate()
        raise ConnectionError("no")

    openers: deque[Callable[[], Awaitable[Connection]]] = deque([fails, factory])
    async with AsyncPool(lambda: openers.popleft()(), max_size=1) as pool:  # noqa: PLW0108 - the next one each time
        first = asyncio.ensure_future(pool.lease())
        await within(gate.reached.wait())
        second = asyncio.ensure_future(pool.lease())
        await waiting(pool, 1)
        gate.open.set()

        with pytest.raises(ConnectionError):
            await within(first)
        lease = await within(second)
        assert 0 == lease.resource.number
        lease.release()


async def test_who_is_cancelled_while_opening_leaves_the_slot_to_the_next(factory: Factory) -> None:
    gate = Gate()

    async def slow() -> Connection:
        await gate()
        raise AssertionError("was cancelled")

    openers: deque[Callable[[], Awaitable[Connection]]] = deque([slow, factory])
    async with AsyncPool(lambda: openers.popleft()(), max_size=1) as pool:  # noqa: PLW0108 - the next one each time
        first = asyncio.ensure_future(pool.lease())
        await within(gate.reached.wait())
        second = asyncio.ensure_future(pool.lease())
        await waiting(pool, 1)
        await cancelled(first)

        (await within(second)).release()
        assert 0 == pool.stats().opening


# What died while it was leased or idle.


@pytest.mark.parametrize("raising", [False, True])
async def test_a_resource_that_died_is_not_handed_out(factory: Factory, raising: bool) -> None:
    async def check(connection: Connection) -> bool:
        await step()
        if connection.number == 0 and raising:
            raise ConnectionResetError
        return connection.number > 0

    async with AsyncPool(factory, max_size=1, check=check) as pool:
        async with pool.acquire() as dead:
            assert 0 == dead.number
        async with pool.acquire(timeout=0) as connection:
            assert 1 == connection.number
            assert [0] == factory.closed
        await assert_full_capacity(pool)


async def test_who_is_cancelled_in_the_check_leaves_the_slot(factory: Factory) -> None:
    """Nobody knows what it would have answered, so the resource is closed."""
    gate = Gate()
    async with AsyncPool(factory, max_size=1, check=gate) as pool:
        (await pool.lease()).release()
        task = asyncio.ensure_future(pool.lease())
        await within(gate.reached.wait())
        await cancelled(task)

        gate.open.set()
        await assert_full_capacity(pool)
        assert [0] == factory.closed


@pytest.mark.parametrize("times", [1, 2])
async def test_who_is_cancelled_while_the_dead_is_closed_stays_cancelled(factory: Factory, times: int) -> None:
    """The dead one is closed to the end, and the cancellation is late but not lost."""
    gate = Gate()

    async def close(connection: Connection) -> None:
        if connection.number == 0:
            await gate()
        await connection.aclose()

    async with AsyncPool(factory, max_size=1, check=lambda connection: connection.number > 0, close=close) as pool:
        (await pool.lease()).release()
        task = asyncio.ensure_future(pool.lease())
        await within(gate.reached.wait())
        for _ in range(times):
            task.cancel()
            await step(3)
        assert not task.done()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await within(task)

        await assert_full_capacity(pool)
        assert [0] == factory.closed


# Reset and close.


async def test_what_cannot_be_reset_is_closed(factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    async def reset(connection: Connection) -> None:
        await step()
        if connection.number == 0:
            raise ConnectionError("no")

    async with AsyncPool(factory, max_size=1, reset=reset, name="db") as pool:
        async with pool.acquire():
            pass
        assert [0] == factory.closed
        assert 1 == caplog.text.count("reset of a resource of pool 'db' failed")
        await assert_full_capacity(pool)
        assert 1 == pool.stats().hook_errors


@pytest.mark.parametrize("wait", [False, True])
async def test_a_reset_that_hangs_is_given_up(factory: Factory, wait: bool, short_grace: None) -> None:
    async def reset(connection: Connection) -> None:
        if connection.number == 0:
            await asyncio.Event().wait()

    async with AsyncPool(factory, max_size=1, reset=reset) as pool:
        if wait:
            async with pool.acquire():
                pass
        else:
            (await pool.lease()).release()
        await assert_full_capacity(pool)
        assert [0] == factory.closed
        assert 1 == pool.stats().hook_errors


async def test_a_reset_that_hangs_and_will_not_be_cancelled_holds_no_slot(factory: Factory, short_grace: None) -> None:
    go = asyncio.Event()

    async def reset(connection: Connection) -> None:
        for _ in range(3 if connection.number == 0 else 0):
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()

    async with AsyncPool(factory, max_size=1, reset=reset) as pool:
        async with pool.acquire():
            pass
        await assert_full_capacity(pool)
        assert [0] == factory.closed
        go.set()
        await step(3)


async def test_a_reset_that_hangs_holds_nobody_else(factory: Factory) -> None:
    gate = Gate()

    async def reset(connection: Connection) -> None:
        if connection.number == 0:
            await gate()

    async with AsyncPool(factory, max_size=2, reset=reset) as pool:
        (await pool.lease()).release()
        await within(gate.reached.wait())
        for _ in range(3):
            async with pool.acquire(timeout=0) as connection:
                assert 1 == connection.number
                with pytest.raises(PoolTimeout, match="2 of 2 in use"):
                    await pool.lease(timeout=0)
        gate.open.set()
        await assert_full_capacity(pool)
        assert 2 == len(factory.opened)


@pytest.mark.parametrize("hang", [False, True])
async def test_a_close_that_fails_leaves_its_slot(factory: Factory, hang: bool, short_grace: None) -> None:
    async def close(connection: Connection) -> None:
        connection.closing += 1
        connection.closed += 1
        if connection.number == 0:
            if hang:
                await asyncio.Event().wait()
            raise OSError("no")

    async with AsyncPool(factory, max_size=1, close=close) as pool:
        (await pool.lease()).release(discard=True)
        await assert_full_capacity(pool)
        assert 1 == pool.stats().hook_errors
        assert [0] == factory.closed


# Releasing.


@pytest.mark.parametrize("careful", [False, True])
async def test_a_second_release_is_an_error_and_changes_nothing(factory: Factory, careful: bool) -> None:
    reset = (lambda connection: step()) if careful else None
    async with AsyncPool(factory, max_size=2, name="db", reset=reset) as pool:
        lease = await pool.lease()
        lease.release()
        for discard in (False, True):
            with pytest.raises(RuntimeError, match="this lease of pool 'db' holds nothing: it was released before"):
                lease.release(discard=discard)
        with pytest.raises(RuntimeError, match="holds nothing"):
            _ = lease.resource
        await assert_full_capacity(pool)
        assert 0 == pool.stats().closed


async def test_of_threads_that_release_at_once_exactly_one_succeeds(factory: Factory) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        async with AsyncPool(factory, max_size=1, reset=lambda connection: step()) as pool:
            for _ in range(30):
                lease = await pool.lease(timeout=LIMIT)
                barrier = threading.Barrier(3)

                def release(lease: Any = lease, barrier: Any = barrier) -> None:
                    barrier.wait(LIMIT)
                    lease.release()

                outcomes = await asyncio.gather(*(asyncio.to_thread(release) for _ in range(3)), return_exceptions=True)
                assert [None] == [outcome for outcome in outcomes if not isinstance(outcome, RuntimeError)]
            await assert_full_capacity(pool)
            assert 1 == len(factory.opened)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("careful", [False, True])
async def test_another_thread_may_release(factory: Factory, careful: bool) -> None:
    reset = (lambda connection: step()) if careful else None
    async with AsyncPool(factory, max_size=1, reset=reset) as pool:
        lease = await pool.lease()
        waiter = asyncio.ensure_future(pool.lease())
        await waiting(pool, 1)
        await within(asyncio.to_thread(lease.release))
        assert 0 == (await within(waiter)).resource.number
        (await waiter).release()
        await assert_full_capacity(pool)


async def test_close_waits_for_what_another_thread_gave_back(factory: Factory) -> None:
    """Also if the loop has not run since."""
    cleaned = []

    async def reset(connection: Connection) -> None:
        await step(3)
        cleaned.append(connection)

    pool = AsyncPool(factory, reset=reset)
    lease, other = await pool.lease(), await pool.lease()
    for function in (lease.release, functools.partial(other.release, discard=True)):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join(LIMIT)
    await pool.aclose()

    assert [0, 1] == factory.closed
    assert 1 == len(cleaned)


@pytest.mark.parametrize("discard", [False, True])
async def test_what_comes_back_after_close_is_closed(factory: Factory, discard: bool) -> None:
    pool = AsyncPool(factory, reset=lambda connection: pytest.fail("nobody will use it again"))
    lease = await pool.lease()
    async with pool.acquire():
        await pool.aclose()
        assert [] == factory.closed
    assert [1] == factory.closed
    lease.release(discard=discard)
    await pool.aclose()
    assert [0, 1] == factory.closed
    with pytest.raises(RuntimeError, match="released before"):
        lease.release()
    assert pool.stats().opened == pool.stats().closed == 2


async def test_close_wakes_everyone_who_waits_with_an_error(factory: Factory) -> None:
    pool = AsyncPool(factory, max_size=1, name="db", timeout=None)
    lease = await pool.lease()
    waiters = [asyncio.ensure_future(pool.lease()) for _ in range(5)]
    await waiting(pool, 5)
    await pool.aclose()

    errors = await within(asyncio.gather(*waiters, return_exceptions=True))
    assert [PoolClosed] * 5 == [type(error) for error in errors]
    assert str(errors[0]).startswith("pool 'db' is closed, by itself or by shutdown(), and nothing can be taken")
    assert [] == factory.closed
    lease.release()
    assert await pool.drain(grace=LIMIT)
    assert [0] == factory.closed


async def test_what_is_opened_while_the_pool_is_closed_is_closed(factory: Factory) -> None:
    gate = Gate()

    async def slow() -> Connection:
        await gate()
        return await factory()

    pool = AsyncPool(slow)
    opener = asyncio.ensure_future(pool.lease())
    await within(gate.reached.wait())
    await pool.aclose()
    draining = asyncio.ensure_future(pool.drain(grace=LIMIT))
    await until(lambda: pool._drained)
    gate.open.set()

    with pytest.raises(PoolClosed):
        await within(opener)
    assert await within(draining)
    assert [0] == factory.closed


async def test_close_that_is_cancelled_closes_all_the_same(factory: Factory) -> None:
    gate = Gate()

    async def close(connection: Connection) -> None:
        await gate()
        await connection.aclose()

    pool = AsyncPool(factory, close=close)
    leases = [await pool.lease() for _ in range(3)]
    for lease in leases:
        lease.release()
    closing = asyncio.ensure_future(pool.aclose())
    await within(gate.reached.wait())
    closing.cancel()
    await step(3)
    closing.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await within(closing)
    await pool.aclose()

    assert [0, 1, 2] == factory.closed


async def test_who_releases_and_asks_again_at_once_does_not_overtake(factory: Factory) -> None:
    """Whoever waits comes first, in the order in which they came."""
    served: list[str] = []

    async def use(name: str) -> None:
        async with pool.acquire():
            served.append(name)

    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        waiters = [asyncio.ensure_future(use(name)) for name in "abc"]
        await waiting(pool, 3)
        lease.release()
        await within(use("releaser"))
        await within(asyncio.gather(*waiters))

    assert ["a", "b", "c", "releaser"] == served


# Cancelled.


async def test_who_is_cancelled_while_waiting_gives_its_place_up(factory: Factory) -> None:
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        first, second, third = (asyncio.ensure_future(pool.lease()) for _ in range(3))
        await waiting(pool, 3)
        await cancelled(second)
        assert 2 == pool.stats().waiting
        lease.release()
        (await within(first)).release()
        (await within(third)).release()
        await assert_full_capacity(pool)


@pytest.mark.parametrize("vacant", [False, True])
@pytest.mark.parametrize("times", [1, 2])
async def test_who_is_cancelled_between_the_hand_off_and_its_next_step_passes_it_on(
    factory: Factory, vacant: bool, times: int
) -> None:
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        first, second = (asyncio.ensure_future(pool.lease()) for _ in range(2))
        await waiting(pool, 2)
        lease.release(discard=vacant)
        await waiting(pool, 1)
        assert not first.done()
        for _ in range(times):
            first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(first)

        assert int(vacant) == (await within(second)).resource.number
        (await second).release()
        await assert_full_capacity(pool)
        assert 0 == pool.stats().dropped


async def test_all_who_wait_are_cancelled_in_the_tick_of_the_hand_off(factory: Factory) -> None:
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        tasks = [asyncio.ensure_future(pool.lease()) for _ in range(5)]
        await waiting(pool, 5)
        lease.release()
        for task in tasks:
            task.cancel()
        outcomes = await within(asyncio.gather(*tasks, return_exceptions=True))

        assert [asyncio.CancelledError] * 5 == [type(outcome) for outcome in outcomes]
        await assert_full_capacity(pool)
        assert 0 == pool.stats().dropped


@pytest.mark.parametrize("hook", ["reset", "close"])
@pytest.mark.parametrize("times", [1, 2])
async def test_who_is_cancelled_inside_release_ends_it_first(factory: Factory, hook: str, times: int) -> None:
    gate = Gate()

    async def close(connection: Connection) -> None:
        await gate()
        await connection.aclose()

    options: dict[str, Any] = {"reset": gate} if hook == "reset" else {"close": close, "max_lifetime": 1e-9}

    async def use() -> None:
        async with pool.acquire():
            pass

    pool = AsyncPool(factory, max_size=1, **options)
    task = asyncio.ensure_future(use())
    await within(gate.reached.wait())
    for _ in range(times):
        task.cancel()
        await step(3)
    assert not task.done()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await within(task)
    await settled(pool)

    assert int(hook == "reset") == pool.stats().idle
    assert ([] if hook == "reset" else [0]) == factory.closed
    pool._max_lifetime = None
    await assert_full_capacity(pool)
    await pool.aclose()


async def test_who_is_cancelled_inside_a_release_that_hangs_is_let_go_after_the_grace(
    factory: Factory, short_grace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release goes on by itself, until it ends or its own time is over."""
    monkeypatch.setattr(hygiene.pool, "GRACE", LIMIT)
    gate = Gate()

    async def use() -> None:
        async with pool.acquire():
            pass

    async with AsyncPool(factory, max_size=1, reset=gate) as pool:
        task = asyncio.ensure_future(use())
        await within(gate.reached.wait())
        await cancelled(task)
        assert 1 == pool.stats().in_use
        gate.open.set()
        await assert_full_capacity(pool)
        assert [] == factory.closed


class Step:
    """Cancels a task after its *n*-th step."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], n: int, twice: bool) -> None:
        self._coroutine = coroutine
        self.left = n
        self.twice = twice
        self.task: asyncio.Task[Any] | None = None

    def __await__(self) -> Any:
        awaited = self._coroutine.__await__()
        error: BaseException | None = None
        try:
            while True:
                try:
                    future = awaited.send(None) if error is None else awaited.throw(error)
                except StopIteration as stop:
                    return stop.value
                error = None
                self.left -= 1
                if self.left == 0 or (self.left == -1 and self.twice):
                    assert self.task is not None
                    # When the other tasks have had their turn, so that what it waits for may have come already.
                    asyncio.get_running_loop().call_soon(self.task.cancel)
                try:
                    yield future
                except BaseException as thrown:  # noqa: BLE001 - the coroutine decides
                    error = thrown
        finally:
            self._coroutine.close()

    @property
    def over(self) -> bool:
        return self.left > 0


@pytest.mark.parametrize("fails", ["", "open", "check", "reset", "close"])
@pytest.mark.parametrize("victim", range(5))
@pytest.mark.parametrize("twice", [False, True])
async def test_a_task_cancelled_after_any_of_its_steps_loses_nothing(victim: int, twice: bool, fails: str) -> None:
    """Two resources, five users, each hook asynchronous; one user is cancelled after its first step, its second, ..."""

    async def hook(name: str, connection: Connection | None = None) -> None:
        await step()
        if name == fails and (connection is None or connection.number % 2):
            raise OSError(name)

    async def run(n: int) -> bool:
        factory = Factory()
        shared: list[Connection] = []

        async def open_() -> Connection:
            connection = await factory()
            await hook("open", connection)
            return connection

        async def check(connection: Connection) -> bool:
            await hook("check", connection)
            return True

        async def close(connection: Connection) -> None:
            await connection.aclose()
            await hook("close", connection)

        async def use() -> None:
            for _ in range(2):
                with contextlib.suppress(OSError):
                    async with pool.acquire(timeout=LIMIT) as connection:
                        connection.holders += 1
                        if connection.holders > 1 or connection.closing:
                            shared.append(connection)
                        try:
                            await step(2)
                        finally:
                            connection.holders -= 1
            lease = None
            with contextlib.suppress(OSError):
                lease = await pool.lease(timeout=LIMIT)
            if lease is not None:
                lease.release(discard=True)

        pool = AsyncPool(open_, max_size=2, check=check, reset=functools.partial(hook, "reset"), close=close)
        user = Step(use(), n, twice)
        tasks = [asyncio.ensure_future(user if number == victim else use()) for number in range(5)]
        user.task = tasks[victim]
        outcomes = await within(asyncio.gather(*tasks, return_exceptions=True))
        await settled(pool)

        assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}, (n, outcomes)
        assert user.over or isinstance(outcomes[victim], asyncio.CancelledError), n
        assert [] == shared, n
        stats = pool.stats()
        assert (0, 0, 0) == (stats.in_use, stats.opening, stats.waiting), n
        assert 2 == len(pool._core.idle) + len(pool._core.vacant), n
        assert stats.opened == stats.idle + stats.closed, n
        await pool.aclose()
        never_handed_over = 0 if fails != "open" else sum(c.number % 2 for c in factory.opened)
        closed = len(factory.closed)
        # Who is cancelled in its own `open` has opened what the pool has never seen.
        assert len(factory.opened) - never_handed_over - 1 <= closed == pool.stats().closed, n
        return user.over

    n = 0
    while True:
        n += 1
        if await run(n):
            break
    assert n > 10


# The last moment of a timeout.


async def test_what_is_granted_in_the_tick_of_the_timeout_is_taken(factory: Factory) -> None:
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        core = pool._core

        def leave(ticket: Any) -> bool:
            if pool.stats().waiting:
                lease.release()  # the time is over already, and the waiter has not yet been told
            return Leasing.leave(core, ticket)

        core.leave = leave  # type: ignore[method-assign]
        async with pool.acquire(timeout=0.001) as connection:
            assert 0 == connection.number
        assert 0 == pool.stats().timeouts
        del core.leave  # type: ignore[method-assign]
        await assert_full_capacity(pool)


@pytest.mark.parametrize("cancel", [False, True])
async def test_what_is_granted_after_the_timeout_goes_to_the_next(factory: Factory, cancel: bool) -> None:
    """In the same tick, and although the task is cancelled in it, too: which is what it hears of then."""
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        core = pool._core

        def leave(ticket: Any) -> bool:
            left = Leasing.leave(core, ticket)
            if left:
                lease.release()
                if cancel:
                    task.cancel()
            return left

        core.leave = leave  # type: ignore[method-assign]
        task = asyncio.ensure_future(pool.lease(timeout=0.001))
        with pytest.raises(asyncio.CancelledError if cancel else PoolTimeout):
            await within(task)
        assert 1 == pool.stats().idle
        await assert_full_capacity(pool)


async def test_asyncio_timeout_around_acquire_gives_the_place_up(factory: Factory) -> None:
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.001), pool.acquire():
                pass
        assert not isinstance(caught.value, PoolTimeout)
        assert 0 == pool.stats().waiting
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):  # over before it begins
                await pool.lease()
        lease.release()
        await assert_full_capacity(pool)


async def test_asyncio_timeout_inside_release_ends_it_first(factory: Factory) -> None:
    done: list[Connection] = []

    async def reset(connection: Connection) -> None:
        timeout.reschedule(asyncio.get_running_loop().time())
        await step(5)
        done.append(connection)

    async with AsyncPool(factory, max_size=1, reset=reset) as pool:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as timeout, pool.acquire():
                pass
        assert [0] == [connection.number for connection in done]
        pool._reset = lambda connection: None
        await assert_full_capacity(pool)


@pytest.mark.parametrize("seed", range(3))
async def test_wait_for_loses_no_slot(factory: Factory, seed: int) -> None:
    """It may drop a lease that it was granted in its last tick; that is noticed, and its slot comes back."""
    rng = random.Random(seed)

    async def use() -> None:
        for _ in range(10):
            with contextlib.suppress(TimeoutError):
                lease = await asyncio.wait_for(pool.lease(), rng.choice([0, 1e-5, 1e-4, LIMIT]))
                await step(rng.randrange(3))
                lease.release()
                del lease

    async with AsyncPool(factory, max_size=2) as pool:
        await within(asyncio.gather(*(use() for _ in range(8))))
        await assert_full_capacity(pool)


# anyio.


async def test_an_anyio_scope_cancelled_around_acquire_gives_the_place_up(factory: Factory) -> None:
    """Its scopes cancel anew at each step until they are left."""
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                async with pool.acquire():
                    raise AssertionError("was cancelled")

            group.start_soon(wait)
            await waiting(pool, 1)
            group.cancel_scope.cancel()
        assert 0 == pool.stats().waiting
        lease.release()
        await assert_full_capacity(pool)


@pytest.mark.parametrize("hook", ["open", "check", "reset", "close", "body", "hand-off"])
async def test_an_anyio_scope_cancelled_anywhere_loses_no_slot(factory: Factory, hook: str) -> None:
    scope = anyio.CancelScope()
    armed = False
    ended: list[str] = []

    async def run(name: str) -> None:
        if name == hook and armed:
            scope.cancel()
        await step(3)
        ended.append(name)

    async def open_() -> Connection:
        await run("open")
        return await factory()

    async def close(connection: Connection) -> None:
        await run("close")
        await connection.aclose()

    pool = AsyncPool(
        open_, max_size=1, check=lambda connection: run("check"), reset=lambda connection: run("reset"), close=close
    )
    if hook != "open":
        (await pool.lease()).release()
        await settled(pool)
    ended.clear()
    armed = True
    blocker = await pool.lease() if hook == "hand-off" else None

    def hand_off() -> None:
        assert blocker is not None
        blocker.release()
        scope.cancel()

    if blocker is not None:
        asyncio.get_running_loop().call_soon(hand_off)
    with scope:
        lease = await pool.lease()
        if hook == "close":
            lease.release(discard=True)
            await anyio.sleep_forever()
        else:
            lease.release()
            async with pool.acquire():
                await run("body")
    assert scope.cancelled_caught
    await settled(pool)
    if hook in {"reset", "close"}:
        assert hook in ended, "it is run to its end"
    armed = False
    await assert_full_capacity(pool)
    await pool.aclose()
    assert len(factory.opened) == len(factory.closed)


async def test_an_anyio_scope_cancelled_while_giving_back_runs_reset_to_its_end(factory: Factory) -> None:
    gate = Gate()
    scope = anyio.CancelScope()

    async def cancel() -> None:
        await gate.reached.wait()
        scope.cancel()
        await step(5)
        assert 1 == pool.stats().in_use
        gate.open.set()

    async with AsyncPool(factory, max_size=1, reset=gate) as pool:
        helper = asyncio.ensure_future(cancel())
        with scope:
            async with pool.acquire():
                pass
            await anyio.sleep_forever()
        await within(helper)
        assert scope.cancelled_caught
        await assert_full_capacity(pool)
        assert 1 == len(factory.opened)


# Eager tasks.

eager = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")


@pytest.fixture
async def eager_loop() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    yield
    loop.set_task_factory(None)


@eager
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_loop_whose_tasks_start_at_once(factory: Factory, asynchronous: bool, eager_loop: None) -> None:
    said: list[str] = []

    async def hook(name: str, connection: Connection) -> bool:
        if asynchronous:
            await step()
        said.append(name)
        return True

    served: list[int] = []

    async def use(number: int) -> None:
        async with pool.acquire():
            served.append(number)

    async with AsyncPool(
        factory, max_size=1, check=functools.partial(hook, "check"), reset=functools.partial(hook, "reset"),
        close=functools.partial(hook, "close"),
    ) as pool:  # fmt: skip
        lease = await pool.lease()
        tasks = [asyncio.create_task(use(number)) for number in range(4)]
        assert 4 == pool.stats().waiting  # without a step of the loop
        tasks[2].cancel()
        lease.release()
        outcomes = await within(asyncio.gather(*tasks, return_exceptions=True))

        assert [0, 1, 3] == served
        assert isinstance(outcomes[2], asyncio.CancelledError)
        assert ["reset", *["check", "reset"] * 3] == said
        await assert_full_capacity(pool)
        (await pool.lease()).release(discard=True)
        await settled(pool)
    assert "close" == said[-1]


@eager
async def test_eager_tasks_cancelled_at_random_lose_nothing(factory: Factory, eager_loop: None) -> None:
    await cancel_at_random(factory, seed=7, tasks=60)


# Dropped.


class Told(logging.Handler):
    """Tells when something was logged that contains *text*."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.event.set()


@contextlib.contextmanager
def told(text: str) -> Iterator[threading.Event]:
    handler = Told(text)
    logging.getLogger("hygiene").addHandler(handler)
    try:
        yield handler.event
    finally:
        logging.getLogger("hygiene").removeHandler(handler)


@pytest.mark.slow
async def test_a_dropped_lease_is_reported_with_the_stack_that_took_it_and_its_slot_comes_back(
    factory: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    async def forgets() -> None:
        await pool.lease()

    async with AsyncPool(factory, max_size=1, leak_after="1h", name="db") as pool:
        with told("was dropped") as reported:
            await asyncio.create_task(forgets(), name="chat")
            gc.collect()
            async with pool.acquire(timeout=LIMIT) as connection:
                assert 1 == connection.number
        assert reported.is_set()
        assert [0] == factory.closed
        assert "It was taken by task 'chat' at\n" in caplog.text
        assert "in forgets\n" in caplog.text
        await assert_full_capacity(pool)


@pytest.mark.slow
def test_a_lease_that_outlives_its_loop_is_reported_once(factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can close its resource any more; the pool serves the next loop."""
    kept: list[Any] = []
    pool = AsyncPool(factory, max_size=1, name="db")

    async def keep() -> None:
        kept.append(await pool.lease())

    async def use() -> None:
        await assert_full_capacity(pool)
        await pool.aclose()

    asyncio.run(keep())
    with told("was dropped") as reported:
        kept.clear()
        gc.collect()
        assert reported.wait(LIMIT)
    asyncio.run(use())

    assert 1 == caplog.text.count("was dropped without having been released")
    assert [1] == factory.closed


@pytest.mark.slow
def test_releasing_when_the_loop_is_gone_is_harmless(factory: Factory) -> None:
    for options in ({}, {"reset": lambda connection: step()}):
        for discard in (False, True):
            pool = AsyncPool(factory, max_size=1, **options)  # type: ignore[arg-type]
            lease = asyncio.run(pool.lease())
            lease.release(discard=discard)
            with pytest.raises(RuntimeError, match="released before"):
                lease.release()
            asyncio.run(assert_full_capacity(pool))
            asyncio.run(pool.aclose())
            assert 0 == pool.stats().in_use


async def test_who_was_cancelled_leaves_no_garbage_behind(factory: Factory) -> None:
    """Nothing of a wait that is over depends on the next collection."""
    async with AsyncPool(factory, max_size=1) as pool:
        lease = await pool.lease()
        gc.collect()
        gc.disable()
        try:
            tickets = []
            for end in ("cancelled", "served"):
                task = asyncio.ensure_future(pool.lease())
                await waiting(pool, 1)
                tickets.append(weakref.ref(next(iter(pool._waiters))._future))  # type: ignore[attr-defined]
                if end == "cancelled":
                    await cancelled(task)
                else:
                    lease.release()
                    (await within(task)).release()
                del task
                await step(2)
            assert [None, None] == [ticket() for ticket in tickets]
        finally:
            gc.enable()


# Fork.


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_runs_a_loop_of_its_own_with_resources_of_its_own() -> None:
    """Although the parent holds one, waits for it, and is in the middle of resetting another."""
    script = """
        import asyncio, gc, logging, os, signal, sys
        from hygiene import AsyncPool

        signal.alarm(50)  # a hang is a failure
        logging.disable()

        class Connection:
            def __init__(self):
                self.opened_in = os.getpid()
                self.closed = False
            async def aclose(self):
                assert self.opened_in == os.getpid(), "closed the parent's"
                self.closed = True

        async def fresh(pool):
            leases = [await pool.lease(timeout=20) for _ in range(2)]
            assert all(lease.resource.opened_in == os.getpid() for lease in leases)
            for lease in leases:
                lease.release()

        async def child(pool, held):
            try:
                held.resource
            except RuntimeError as error:
                assert "before the process was forked" in str(error)
            else:
                raise AssertionError("usable")
            await fresh(pool)
            held.release()
            await fresh(pool)
            await pool.aclose()
            assert pool.stats().closed == 2, pool.stats()

        async def main():
            gate = asyncio.Event()
            parent = os.getpid()

            async def reset(connection):
                if connection.opened_in == parent == os.getpid():
                    await gate.wait()

            pool = AsyncPool(Connection, max_size=2, reset=reset)
            held, other = await pool.lease(), await pool.lease()
            other.release()
            waiter = asyncio.ensure_future(pool.lease())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert pool.stats().waiting == 1
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    asyncio.run(child(pool, held))
                    code = 0
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    os._exit(code)
            assert os.waitpid(pid, 0)[1] == 0
            assert pool.stats().waiting == 1
            gate.set()
            (await waiter).release()
            held.release()
            await fresh(pool)
            await pool.aclose()
            assert pool.stats().closed == 2

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
        check=False, capture_output=True, text=True, timeout=55,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)


# At random.


async def cancel_at_random(factory: Factory, seed: int, tasks: int) -> None:
    rng = random.Random(seed)
    shared: list[Connection] = []
    failing = True

    async def hook(name: str, connection: Connection | None = None) -> bool:
        await step(rng.randrange(3))
        if failing and rng.random() < 0.05:
            raise OSError(name)
        return True

    async def open_() -> Connection:
        await hook("open")
        return await factory()

    async def use() -> None:
        for _ in range(3):
            with contextlib.suppress(OSError):  # PoolTimeout is one, too
                lease = await pool.lease(timeout=rng.choice([0, 1e-4, LIMIT]))
                connection = lease.resource
                connection.holders += 1
                try:
                    if connection.holders > 1 or connection.closing:
                        shared.append(connection)
                    await step(rng.randrange(4))
                finally:
                    connection.holders -= 1
                    lease.release(discard=rng.random() < 0.1)
            with contextlib.suppress(OSError):
                async with pool.acquire(timeout=LIMIT) as connection:
                    connection.holders += 1
                    try:
                        if connection.holders > 1 or connection.closing:
                            shared.append(connection)
                        await step(rng.randrange(4))
                    finally:
                        connection.holders -= 1

    async with AsyncPool(
        open_, max_size=5, check=functools.partial(hook, "check"), reset=functools.partial(hook, "reset"),
    ) as pool:  # fmt: skip
        running = [asyncio.ensure_future(use()) for _ in range(tasks)]
        await step()
        while not all(task.done() for task in running):
            for task in rng.sample(running, 3):
                if rng.random() < 0.3:
                    task.cancel()
            await step(rng.randrange(1, 4))
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        failing = False

        assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
        assert [] == shared
        await assert_full_capacity(pool)
        assert 0 == pool.stats().dropped
    assert pool.stats().opened == pool.stats().closed == len(factory.closed) == len(factory.opened)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
async def test_300_tasks_with_random_cancellation_leave_full_capacity_and_never_share(
    factory: Factory, seed: int
) -> None:
    await cancel_at_random(factory, seed, tasks=300)
