"""The rarer accidents of a pool of threads: interrupts between bytecodes, tracebacks that are kept, busy hooks."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hygiene import Pool, PoolTimeout
from hygiene import pool as module

PATIENCE = 20.0  # seconds: a wait that takes longer than this on the slowest machine has been forgotten


class Interrupt(BaseException):
    """What a signal handler of the test raises, as Ctrl-C does."""


class Caller:
    """A thread that does one thing; `result` gives what came of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._value: Any = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001 - it is raised again, where somebody sees it
            self._error = error

    def result(self) -> Any:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._value


def until(condition: Callable[[], bool]) -> None:
    """Let other threads go on until *condition* holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0)


def wait_for(pool: Pool[Any], waiting: int) -> None:
    until(lambda: pool.stats().waiting == waiting)


def check_capacity(pool: Pool[Any]) -> None:
    """As many as there may be can be taken, all different, and nothing is left of what was before."""
    until(lambda: pool.stats().in_use == pool.stats().opening == 0)  # what was lost is closed by the janitor
    stats = pool.stats()
    assert 0 == stats.waiting
    assert stats.opened == stats.idle + stats.closed
    leases = [pool.lease(timeout=PATIENCE) for _ in range(pool.max_size)]
    assert pool.max_size == len({id(lease.resource) for lease in leases})
    with pytest.raises(PoolTimeout):
        pool.lease(timeout=0)
    for lease in leases:
        lease.release()


# Interrupted.


def test_an_interrupt_right_after_a_resource_came_back_leaves_nobody_waiting(
    factory: Any, interrupted: Callable[..., bool]
) -> None:
    def interrupt() -> None:
        raise Interrupt

    for at in range(1, 4):
        with Pool(factory, max_size=1) as pool:
            lease = pool.lease()
            waiting = Caller(pool.lease)
            wait_for(pool, 1)
            with contextlib.suppress(Interrupt):
                interrupted(lease.release, at, interrupt, files={module.__file__}, anywhere=False)
            with contextlib.suppress(RuntimeError):
                lease.release()  # if it had not come to that
            waiting.result().release()


def test_a_grant_that_never_arrives_is_a_timeout_and_costs_nothing(
    factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was granting it was interrupted between two bytecodes."""
    monkeypatch.setattr(module, "_ON_ITS_WAY", 0.001)
    with Pool(factory, max_size=1) as pool:
        holder = pool.lease()
        leave = pool._core.leave

        def vanish(ticket: Any) -> bool:
            leave(ticket)
            return False

        pool._core.leave = vanish  # type: ignore[method-assign]
        with pytest.raises(PoolTimeout):
            pool.lease(timeout=0.001)
        del pool._core.leave
        holder.release()
        check_capacity(pool)


# Leases that nobody releases.


@pytest.mark.parametrize("cycle", [False, True])
def test_a_lease_dropped_without_release_is_reported_and_its_slot_comes_back(
    factory: Any, cycle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def forgets() -> None:
        held: list[Any] = [pool.lease()]
        if cycle:
            held.append(held)

    with Pool(factory, max_size=1, leak_after=3600, name="db") as pool:
        waiting = Caller(lambda: forgets() or pool.lease(timeout=PATIENCE))
        if cycle:
            wait_for(pool, 1)
            gc.collect()
        lease = waiting.result()
        assert 1 == lease.resource.number
        lease.release()
        until(lambda: pool.stats().dropped == 1)
        assert [0] == factory.closed
        assert "a lease of pool 'db' was dropped without having been released; its resource is closed" in caplog.text
        assert "in forgets\n" in caplog.text
        assert "held: list[Any] = [pool.lease()]" in caplog.text
        check_capacity(pool)


def test_a_dropped_lease_of_a_closed_pool_is_closed(factory: Any) -> None:
    pool = Pool(factory)
    lease = pool.lease()
    pool.close()
    del lease

    until(lambda: factory.closed == [0])
    assert 1 == pool.stats().dropped


def test_close_that_is_interrupted_forgets_nothing_and_blames_nobody(
    factory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The resources that it had taken out are closed all the same, and no lease is said to have been dropped."""
    closings = itertools.count()

    def close(connection: Any) -> None:
        if next(closings) == 0:
            raise Interrupt
        connection.close()

    pool = Pool(factory, close=close)
    for lease in [pool.lease() for _ in range(3)]:
        lease.release()
    with pytest.raises(Interrupt):
        pool.close()

    until(lambda: pool.stats().closed == 3)
    assert [1, 2] == factory.closed
    assert 0 == pool.stats().dropped
    assert "dropped" not in caplog.text


def test_resize_reports_no_lease_as_dropped(factory: Any, caplog: pytest.LogCaptureFixture) -> None:
    with Pool(factory, max_size=6) as pool:
        for lease in [pool.lease() for _ in range(6)]:
            lease.release()
        pool.resize(2)
        assert [0, 1, 2, 3] == factory.closed
        assert 0 == pool.stats().dropped
        assert "" == caplog.text
        check_capacity(pool)


def test_a_traceback_that_is_kept_hides_no_dropped_lease(
    factory: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler of the log, say, keeps an error, and with it the frames; but not the room that they had."""
    monkeypatch.setattr(logging.getLogger("hygiene"), "filters", [])  # which would let one a minute through
    kept = []
    fails = [True]

    def open_() -> Any:
        if fails:
            raise OSError(fails.pop())
        return factory()

    def close(connection: Any) -> None:
        connection.close()
        raise OSError

    pool = Pool(open_, max_size=1, close=close)
    try:
        pool.lease()
    except OSError as error:
        kept.append(error)
    for count in (1, 2):
        lease = pool.lease(timeout=PATIENCE)
        del lease
        until(lambda: pool.stats().dropped == count)  # noqa: B023 - called in this round
    pool.lease(timeout=PATIENCE).release(discard=True)
    check_capacity(pool)
    kept += [record.exc_info[1] for record in caplog.records if record.exc_info]
    with pytest.raises(ExceptionGroup):
        pool.close()

    assert 4 == len(kept)


# Inside itself.


def test_hooks_may_use_the_pool(factory: Any) -> None:
    """None of them is called while others have to wait for it."""

    def hook(*_: object) -> bool:
        with contextlib.suppress(PoolTimeout, RecursionError):
            if not busy:
                busy.append(True)
                with pool.acquire(timeout=0):
                    pass
                pool.stats()
                busy.pop()
        return True

    busy: list[bool] = []
    pool = Pool(lambda: hook() and factory(), max_size=2, check=hook, reset=hook, close=lambda c: hook() and c.close())
    for _ in range(3):
        with pool.acquire():
            pass
    pool.lease().release(discard=True)
    busy.clear()
    check_capacity(pool)
    pool.close()
    assert pool.stats().opened == len(factory.closed)


# Everything at once.


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", range(3))
def test_threads_with_timeouts_and_failures_lose_nothing(
    factory: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards there is full capacity, and no resource ever had two holders or was used after it was closed."""
    # What pytest keeps of the log are tracebacks: they hold the frames, and these the leases, that nobody else holds.
    monkeypatch.setattr(logging.getLogger("hygiene"), "propagate", False)
    chance = random.Random(seed)
    lock = threading.Lock()

    def happens(probability: float) -> bool:
        with lock:
            return chance.random() < probability

    def open_() -> Any:
        if happens(0.1):
            raise OSError
        with lock:
            return factory()

    def check(connection: Any) -> bool:
        if happens(0.02):
            raise OSError
        return not connection.dead

    def reset(connection: Any) -> None:
        if happens(0.05):
            raise OSError

    def close(connection: Any) -> None:
        connection.close()
        if happens(0.1):
            raise OSError

    with Pool(open_, max_size=3, check=check, reset=reset, close=close) as pool:

        def work() -> None:
            for _ in range(60):
                try:
                    lease = pool.lease(timeout=0.0002 if happens(0.5) else PATIENCE)
                except (PoolTimeout, OSError):
                    continue
                connection = lease.resource
                connection.take()
                connection.leave()
                connection.dead = happens(0.1)
                if happens(0.1):
                    del lease  # forgotten
                else:
                    lease.release(discard=happens(0.1))
                if happens(0.05):
                    pool.resize(2 + happens(0.5))

        for caller in [Caller(work) for _ in range(8)]:
            caller.result()
        pool.resize(3)
        until(lambda: pool.stats().in_use == 0)
        chance = random.Random(seed)
        chance.random = lambda: 1.0  # type: ignore[method-assign] # from now on nothing fails
        check_capacity(pool)

    stats = pool.stats()
    assert len(factory.opened) == stats.opened == stats.closed == len(factory.closed)
