"""A pool of threads where everything goes wrong: raising, hanging, dying, interrupted, forked; no slot is ever lost."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dis
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import hygiene.leasing
import hygiene.pool
from hygiene import Pool, PoolClosed, PoolTimeout
from hygiene.leasing import Leasing
from hygiene.testing import ManualClock

LIMIT = 20  # seconds that a wait may take before it counts as a hang


class Connection:
    """A resource that knows who holds it, and is closed at most once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = 0
        self.holders = 0

    def close(self) -> None:
        self.closed += 1

    def __repr__(self) -> str:
        return f"c{self.number}"


class Factory:
    """Opens connections, unless *failures* says what to raise, and keeps them to look at."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []
        self.failures: deque[BaseException] = deque()

    def __call__(self) -> Connection:
        if self.failures:
            raise self.failures.popleft()
        connection = Connection(len(self.opened))
        self.opened.append(connection)
        return connection

    @property
    def closed(self) -> list[int]:
        assert all(connection.closed <= 1 for connection in self.opened), "closed twice"
        return [connection.number for connection in self.opened if connection.closed]


class Call:
    """One call in a thread of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._outcome: list[Any] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self._function())
        except BaseException as error:  # noqa: BLE001 - it is the outcome
            self._outcome.append(error)

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def outcome(self) -> Any:
        """What it returned or raised."""
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "hangs"
        return self._outcome[0]


def until(condition: Callable[[], object]) -> None:
    """Let the other threads run until *condition* holds."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0)


def settled(pool: Pool[Any]) -> None:
    """Wait until every slot is back in its place: what was dropped is closed by another thread."""
    until(lambda: len(pool._core.idle) + len(pool._core.vacant) == pool.max_size)


def waiting(pool: Pool[Any], number: int) -> None:
    until(lambda: pool.stats().waiting == number)


def assert_full_capacity(pool: Pool[Any]) -> None:
    """Each slot can be taken, no more than there are, and every resource is accounted for."""
    gc.collect()
    leases = [pool.lease(timeout=LIMIT) for _ in range(pool.max_size)]
    with pytest.raises(PoolTimeout):
        pool.lease(timeout=0)
    assert pool.max_size == len({lease.resource.number for lease in leases})
    for lease in leases:
        assert not lease.resource.closed
        lease.release()
    stats = pool.stats()

    assert (0, 0, 0) == (stats.in_use, stats.opening, stats.waiting)
    assert stats.opened == stats.in_use + stats.idle + stats.closed


@pytest.fixture
def factory() -> Factory:
    return Factory()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


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


# Opening.


def test_the_first_acquire_on_an_empty_pool_opens_at_once(factory: Factory) -> None:
    """It does not wait for anything, not even if it may wait: a timeout of 0 is enough."""
    with Pool(factory, max_size=1) as pool, pool.acquire(timeout=0) as connection:
        assert [connection] == factory.opened


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, asyncio.CancelledError, SystemExit])
def test_open_that_raises_gives_the_slot_back(factory: Factory, error: type[BaseException]) -> None:
    with Pool(factory, max_size=1) as pool:
        for _ in range(3):
            failure = error("no")
            factory.failures.append(failure)
            with pytest.raises(error) as caught, pool.acquire(timeout=0):
                pass
            assert failure is caught.value

        assert_full_capacity(pool)
        assert 1 == pool.stats().opened


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_if_open_fails_the_next_who_waits_opens(factory: Factory, error: type[BaseException]) -> None:
    opening, go = threading.Event(), threading.Event()

    def fails() -> Connection:
        opening.set()
        assert go.wait(LIMIT)
        raise error("no")

    openers: deque[Callable[[], Connection]] = deque([fails, factory])
    with Pool(lambda: openers.popleft()(), max_size=1) as pool:  # noqa: PLW0108 - the next one each time
        first = Call(pool.lease)
        assert opening.wait(LIMIT)
        second = Call(pool.lease)
        waiting(pool, 1)
        assert 1 == pool.stats().opening
        go.set()

        assert isinstance(first.outcome(), error)
        assert 0 == second.outcome().resource.number
        second.outcome().release()


def test_others_use_the_pool_while_one_opens(factory: Factory) -> None:
    opening, go = threading.Event(), threading.Event()

    def slow() -> Connection:
        opening.set()
        assert go.wait(LIMIT)
        return factory()

    openers: deque[Callable[[], Connection]] = deque([slow, factory])
    with Pool(lambda: openers.popleft()(), max_size=2) as pool:  # noqa: PLW0108 - the next one each time
        first = Call(pool.lease)
        assert opening.wait(LIMIT)
        for _ in range(3):
            with pool.acquire(timeout=0) as connection:
                assert 0 == connection.number
        go.set()
        first.outcome().release()


# What died while it was leased or idle.


@pytest.mark.parametrize("raising", [False, True])
def test_a_resource_that_died_is_not_handed_out(factory: Factory, raising: bool) -> None:
    def check(connection: Connection) -> bool:
        if connection.number == 0 and raising:
            raise ConnectionResetError
        return connection.number > 0

    with Pool(factory, max_size=1, check=check) as pool:
        with pool.acquire() as dead:
            assert 0 == dead.number
        with pool.acquire(timeout=0) as connection:
            assert 1 == connection.number
            assert [0] == factory.closed
        assert_full_capacity(pool)


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_a_resource_that_died_and_cannot_be_replaced_leaves_its_slot(
    factory: Factory, error: type[BaseException]
) -> None:
    with Pool(factory, max_size=1, check=lambda connection: connection.number > 0) as pool:
        pool.lease().release()
        factory.failures.append(error("no"))
        with pytest.raises(error):
            pool.lease(timeout=0)
        assert [0] == factory.closed
        assert_full_capacity(pool)


def test_a_check_that_is_interrupted_leaves_its_slot(factory: Factory) -> None:
    """Nobody knows what it would have answered, so the resource is closed."""

    def check(connection: Connection) -> bool:
        if connection.number == 0:
            raise KeyboardInterrupt
        return True

    with Pool(factory, max_size=1, check=check) as pool:
        pool.lease().release()
        with pytest.raises(KeyboardInterrupt):
            pool.lease(timeout=0)
        assert [0] == factory.closed
        assert_full_capacity(pool)


def test_a_close_that_is_interrupted_is_not_repeated(factory: Factory) -> None:
    """Also where it was replaced because it was dead."""

    def close(connection: Connection) -> None:
        connection.close()
        if connection.number == 0:
            raise KeyboardInterrupt

    with Pool(factory, max_size=1, check=lambda connection: connection.number > 0, close=close) as pool:
        pool.lease().release()
        with pytest.raises(KeyboardInterrupt):
            pool.lease(timeout=0)
        assert [0] == factory.closed
        assert_full_capacity(pool)


# Reset and close.


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_what_cannot_be_reset_is_closed(factory: Factory, error: type[BaseException]) -> None:
    """An error is logged, since the caller has nothing to do with it; an interruption goes on to whoever it is for."""
    with Pool(factory, max_size=1, reset=lambda connection: (_ for _ in ()).throw(error("no"))) as pool:
        caught = None
        try:
            with pool.acquire():
                pass
        except KeyboardInterrupt as interruption:
            caught = interruption
        assert (error is KeyboardInterrupt) == (caught is not None)
        assert [0] == factory.closed
        stats = pool.stats()

        assert (1, 1, 0) == (stats.opened, stats.closed, stats.idle)
        assert int(error is ConnectionError) == stats.hook_errors
        pool._reset = lambda connection: None
        assert_full_capacity(pool)


def test_a_reset_that_hangs_holds_its_own_slot_and_nobody_else(factory: Factory) -> None:
    hanging, go = threading.Event(), threading.Event()

    def reset(connection: Connection) -> None:
        if connection.number == 0:
            hanging.set()
            assert go.wait(LIMIT)

    with Pool(factory, max_size=2, reset=reset) as pool:
        lease = pool.lease()
        giving_back = Call(lease.release)
        assert hanging.wait(LIMIT)
        for _ in range(3):
            with pool.acquire(timeout=0) as connection:
                assert 1 == connection.number
                with pytest.raises(PoolTimeout, match="2 of 2 in use"):
                    pool.lease(timeout=0)
        go.set()

        assert giving_back.outcome() is None
        assert_full_capacity(pool)
        assert 2 == len(factory.opened)


def test_a_close_that_hangs_holds_its_own_slot_and_nobody_else(factory: Factory) -> None:
    hanging, go = threading.Event(), threading.Event()

    def close(connection: Connection) -> None:
        connection.close()
        if connection.number == 0:
            hanging.set()
            assert go.wait(LIMIT)

    with Pool(factory, max_size=2, close=close) as pool:
        lease = pool.lease()
        giving_back = Call(lambda: lease.release(discard=True))
        assert hanging.wait(LIMIT)
        with pool.acquire(timeout=0), pytest.raises(PoolTimeout):
            pool.lease(timeout=0)
        go.set()

        assert giving_back.outcome() is None
        assert_full_capacity(pool)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_close_that_raises_leaves_its_slot(
    factory: Factory, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def close(connection: Connection) -> None:
        connection.close()
        if connection.number == 0:
            raise error("no")

    with Pool(factory, max_size=1, close=close, name="db") as pool:
        lease = pool.lease()
        with contextlib.suppress(KeyboardInterrupt):
            lease.release(discard=True)
        assert (error is OSError) == ("close of a resource of pool 'db' failed" in caplog.text)
        assert_full_capacity(pool)
        assert [0] == factory.closed


# Releasing.


def test_a_second_release_is_an_error_and_changes_nothing(factory: Factory) -> None:
    with Pool(factory, max_size=2, name="db") as pool:
        lease = pool.lease()
        lease.release()
        with pool.acquire() as connection:
            for discard in (False, True):
                with pytest.raises(RuntimeError, match="this lease of pool 'db' holds nothing: it was released before"):
                    lease.release(discard=discard)
            with pytest.raises(RuntimeError, match="this lease of pool 'db' holds nothing: it was released"):
                _ = lease.resource
            assert not connection.closed
            assert 1 == pool.stats().in_use
        assert_full_capacity(pool)


def test_of_threads_that_release_at_once_exactly_one_succeeds(factory: Factory, hasty: None) -> None:
    with Pool(factory, max_size=1) as pool:
        for _ in range(50):
            lease = pool.lease(timeout=0)
            barrier = threading.Barrier(4)

            def release(lease: Any = lease, barrier: Any = barrier) -> None:
                barrier.wait(LIMIT)
                lease.release()

            outcomes = [call.outcome() for call in [Call(release) for _ in range(4)]]
            assert [None] == [outcome for outcome in outcomes if not isinstance(outcome, RuntimeError)]
            assert 1 == pool.stats().idle
        assert_full_capacity(pool)
        assert 1 == len(factory.opened)


def test_another_thread_may_release(factory: Factory) -> None:
    with Pool(factory, max_size=1) as pool:
        lease = pool.lease()
        waiter = Call(pool.lease)
        waiting(pool, 1)
        assert Call(lease.release).outcome() is None
        assert 0 == waiter.outcome().resource.number
        Call(waiter.outcome().release).outcome()
        assert_full_capacity(pool)


@pytest.mark.parametrize("discard", [False, True])
def test_what_comes_back_after_close_is_closed(factory: Factory, discard: bool) -> None:
    pool = Pool(factory, reset=lambda connection: pytest.fail("nobody will use it again"))
    lease = pool.lease()
    with pool.acquire():
        pool.close()
        assert [] == factory.closed
    assert [1] == factory.closed
    lease.release(discard=discard)
    assert [0, 1] == factory.closed
    with pytest.raises(RuntimeError, match="released before"):
        lease.release()
    assert pool.stats().opened == pool.stats().closed == 2


def test_close_wakes_everyone_who_waits_with_an_error(factory: Factory) -> None:
    pool = Pool(factory, max_size=1, name="db", timeout=None)
    lease = pool.lease()
    waiters = [Call(pool.lease) for _ in range(5)]
    waiting(pool, 5)
    pool.close()

    assert [PoolClosed] * 5 == [type(waiter.outcome()) for waiter in waiters]
    said = str(waiters[0].outcome())
    assert said.startswith("pool 'db' is closed, by itself or by shutdown(), and nothing can be taken from it")
    assert [] == factory.closed
    lease.release()
    assert [0] == factory.closed


def test_what_is_opened_while_the_pool_is_closed_is_closed(factory: Factory) -> None:
    opening, go = threading.Event(), threading.Event()

    def slow() -> Connection:
        opening.set()
        assert go.wait(LIMIT)
        return factory()

    pool = Pool(slow)
    opener = Call(pool.lease)
    assert opening.wait(LIMIT)
    pool.close()
    draining = Call(lambda: pool.drain(grace=LIMIT))
    until(lambda: pool._drained)
    go.set()

    assert isinstance(opener.outcome(), PoolClosed)
    assert draining.outcome() is True
    assert [0] == factory.closed


def test_who_releases_and_asks_again_at_once_does_not_overtake(factory: Factory, hasty: None) -> None:
    """Whoever waits comes first, in the order in which they came, however fast the releaser is."""
    with Pool(factory, max_size=1) as pool:
        for _ in range(20):
            served: list[str] = []

            def use(name: str, served: list[str] = served) -> None:
                with pool.acquire(timeout=LIMIT):
                    served.append(name)

            lease = pool.lease()
            waiters = []
            for number, name in enumerate("abc", 1):
                waiters.append(Call(lambda name=name, use=use: use(name)))
                waiting(pool, number)
            lease.release()
            use("releaser")
            for waiter in waiters:
                waiter.outcome()

            assert ["a", "b", "c", "releaser"] == served


# The last moment of a timeout.


def test_what_is_granted_in_the_tick_of_the_timeout_is_taken(factory: Factory) -> None:
    with Pool(factory, max_size=1) as pool:
        lease = pool.lease()
        core = pool._core

        def leave(ticket: Any) -> bool:
            if pool.stats().waiting:
                lease.release()  # the time is over already, and the waiter has not yet looked
            return Leasing.leave(core, ticket)

        core.leave = leave  # type: ignore[method-assign]
        with pool.acquire(timeout=0.001) as connection:
            assert 0 == connection.number
        assert 0 == pool.stats().timeouts
        del core.leave  # type: ignore[method-assign]
        assert_full_capacity(pool)


def test_what_is_granted_after_the_timeout_goes_to_the_next(factory: Factory) -> None:
    with Pool(factory, max_size=1) as pool:
        lease = pool.lease()
        core = pool._core

        def leave(ticket: Any) -> bool:
            left = Leasing.leave(core, ticket)
            if left:
                lease.release()
            return left

        core.leave = leave  # type: ignore[method-assign]
        with pytest.raises(PoolTimeout):
            pool.lease(timeout=0.001)
        assert 1 == pool.stats().idle
        assert_full_capacity(pool)


# Dropped.


@pytest.mark.slow
@pytest.mark.parametrize("cycle", [False, True])
def test_a_dropped_lease_is_reported_with_the_stack_that_took_it_and_its_slot_comes_back(
    factory: Factory, caplog: pytest.LogCaptureFixture, cycle: bool
) -> None:
    def forgets() -> None:
        lease = pool.lease()
        if cycle:
            ring: list[Any] = [lease]
            ring.append(ring)

    with Pool(factory, max_size=1, leak_after="1h", name="db") as pool:
        with told("was dropped") as reported:
            forgets()
            gc.collect()
            with pool.acquire(timeout=LIMIT) as connection:
                assert 1 == connection.number
        assert reported.is_set()
        assert [0] == factory.closed
        assert 1 == pool.stats().dropped
        assert 1 == caplog.text.count("a lease of pool 'db' was dropped without having been released")
        assert "It was taken by thread 'MainThread' at\n" in caplog.text
        assert "in forgets\n" in caplog.text
        assert_full_capacity(pool)


def test_a_lease_dropped_by_a_thread_that_died_comes_back(factory: Factory) -> None:
    def dies() -> None:
        pool.lease()
        raise ValueError("dies")

    with Pool(factory, max_size=1) as pool:
        with told("was dropped") as reported:
            died = Call(dies)
            assert isinstance(died.outcome(), ValueError)
            died._outcome.clear()  # its traceback holds the frame, and the frame the lease
            assert reported.wait(LIMIT)
        assert_full_capacity(pool)


def test_who_waits_gets_the_slot_of_a_dropped_lease(factory: Factory) -> None:
    with Pool(factory, max_size=1) as pool:
        lease = pool.lease()
        waiter = Call(pool.lease)
        waiting(pool, 1)
        del lease

        assert 1 == waiter.outcome().resource.number
        waiter.outcome().release()


# Interrupted.

TRACED = {hygiene.pool.__file__, hygiene.leasing.__file__}


class Interrupt:
    """
    Calls *action* just before the *n*-th instruction that the block runs in the code of pools.

    With *breaks*, only those instructions count before which the interpreter looks for signals: at the begin of a
    function, at the end of a loop's round, and after a call. Nothing is collected meanwhile: finalizers of what other
    tests left have instructions, too.
    """

    def __init__(self, n: int, action: Callable[[], object], *, breaks: bool = False) -> None:
        self.left = n
        self.action = action
        self.breaks = breaks
        self._previous: tuple[Any, int] = (None, 0)

    @property
    def over(self) -> bool:
        """Whether the block ended before it had come so far."""
        return self.left > 0

    def _call(self, frame: Any, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._step

    def _step(self, frame: Any, event: str, arg: object) -> Any:
        if event == "opcode":
            code = frame.f_code
            before, self._previous = self._previous, (code, code.co_code[frame.f_lasti])
            if not self.breaks or self._breaks(frame, before):
                self.left -= 1
                if self.left == 0:
                    self.action()
        return self._step

    def _breaks(self, frame: Any, before: tuple[Any, int]) -> bool:
        code = frame.f_code
        if before[0] is not code or dis.opname[code.co_code[frame.f_lasti]] == "PUSH_EXC_INFO":
            return False  # the call raised
        if not dis.opname[before[1]].startswith(("RESUME", "JUMP_BACKWARD", "CALL")):
            return False
        while frame is not None and frame.f_code.co_filename in TRACED:
            if frame.f_code.co_name == "__del__":
                return False  # the interpreter would swallow it
            frame = frame.f_back
        return True

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        self._collects = gc.isenabled()
        gc.disable()
        sys.settrace(self._call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self._before)
        if self._collects:
            gc.enable()


def take_idle(pool: Pool[Connection]) -> None:
    with pool.acquire(timeout=0):
        pass


def open_and_take(pool: Pool[Connection]) -> None:
    first, second = pool.lease(timeout=0), pool.lease(timeout=0)
    first.release()
    second.release()


def discard(pool: Pool[Connection]) -> None:
    lease = pool.lease(timeout=0)
    lease.release(discard=True)


def time_out(pool: Pool[Connection]) -> None:
    with pool.acquire(timeout=0), pool.acquire(timeout=0), contextlib.suppress(PoolTimeout):
        pool.lease(timeout=1e-6)


def wait(pool: Pool[Connection]) -> None:
    """Wait for what another thread gives back, and give something back to another thread that waits."""
    leases = [pool.lease(timeout=0) for _ in range(2)]

    def give_back() -> None:
        until(lambda: pool.stats().waiting or done)
        leases[0].release()

    done: list[bool] = []
    giver = Call(give_back)
    try:
        with pool.acquire(timeout=LIMIT):
            leases.pop().release()
    finally:
        done.append(True)
        giver.outcome()


def expire(pool: Pool[Connection]) -> None:
    clock = pool._timer
    assert isinstance(clock, ManualClock)
    pool.lease(timeout=0).release()
    clock.advance(1000)
    pool.expire()


OPERATIONS = [take_idle, open_and_take, discard, time_out, expire]


def hooked(factory: Factory) -> Pool[Connection]:
    """A pool with everything that makes its paths long."""
    return Pool(
        factory, max_size=2, timer=ManualClock(), max_idle=600, leak_after=3600,
        check=lambda connection: True, reset=lambda connection: None,
    )  # fmt: skip


def plain(factory: Factory) -> Pool[Connection]:
    return Pool(factory, max_size=2, timer=ManualClock(), max_idle=600)


@pytest.mark.traced
@pytest.mark.slow
@pytest.mark.parametrize("kind", [plain, hooked])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_signal_handler_uses_the_pool_wherever_it_interrupts_it(
    kind: Callable[[Factory], Pool[Connection]], operation: Callable[[Pool[Connection]], None], factory: Factory
) -> None:
    """A real signal before each instruction in turn; the handler takes, gives back and discards, and never waits."""
    handled: list[int] = []

    def handler(number: int, frame: object) -> None:
        handled.append(number)
        for give_up in (False, True):
            with contextlib.suppress(PoolTimeout):
                pool.lease(timeout=0).release(discard=give_up)

    before = signal.signal(signal.SIGUSR1, handler)
    n = rounds = ends = 0
    stride = 1 if kind is plain else 5  # as many as fit into a second
    try:
        with kind(factory) as pool:
            while ends < 3:  # once may be a mistake: Python 3.13 now and then traces nothing for one round
                n += stride
                # The handler may hold what the interrupted code asks for with a timeout of 0.
                interrupt = Interrupt(n, lambda: signal.raise_signal(signal.SIGUSR1))
                with contextlib.suppress(PoolTimeout), interrupt:
                    operation(pool)
                ends = ends + 1 if interrupt.over else 0
                rounds += not interrupt.over
                assert rounds == len(handled)
                assert pool.stats().opened == pool.stats().in_use + pool.stats().idle + pool.stats().closed
            assert_full_capacity(pool)
    finally:
        signal.signal(signal.SIGUSR1, before)

    assert n > 50
    assert len(factory.opened) == len(factory.closed)


@pytest.mark.slow
def test_a_signal_handler_may_come_at_any_time(factory: Factory) -> None:
    """A timer fires while the pool is in full use."""
    calls: list[int] = []

    def handler(number: int, frame: object) -> None:
        calls.append(number)
        with contextlib.suppress(PoolTimeout), pool.acquire(timeout=0):
            pass

    before = signal.signal(signal.SIGVTALRM, handler)
    with Pool(factory, max_size=2, reset=lambda connection: None) as pool:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
        try:
            for number in range(200_000):
                with pool.acquire():
                    pass
                if len(calls) >= 30 and number > 1000:
                    break
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        assert len(calls) >= 30
        assert_full_capacity(pool)


class Farewell:
    """Garbage whose finalizer uses a pool."""

    def __init__(self, pool: Pool[Connection], said: list[int], *, leak: bool) -> None:
        self.me = self  # so that only a collection finds it
        self.pool = pool
        self.said = said
        self.lease = pool.lease(timeout=0) if leak else None

    def __del__(self) -> None:
        self.said.append(1)
        with contextlib.suppress(PoolTimeout), self.pool.acquire(timeout=0):
            pass


@pytest.mark.traced
@pytest.mark.slow
@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_finalizer_uses_the_pool_wherever_a_collection_interrupts_it(
    operation: Callable[[Pool[Connection]], None], factory: Factory, leak: bool
) -> None:
    """The garbage is collected before each instruction in turn; it may hold a lease that nobody has released."""
    said: list[int] = []
    gc.collect()
    gc.freeze()  # or each collection looks at everything that was ever imported
    gc.disable()
    try:
        with Pool(factory, max_size=4, timer=ManualClock(), max_idle=600) as pool:
            n = ends = 0
            while ends < 3:  # as above
                n += 3 if leak else 1
                Farewell(pool, said, leak=leak)
                with Interrupt(n, gc.collect) as interrupt:
                    operation(pool)
                gc.collect()
                if leak:
                    settled(pool)
                ends = ends + 1 if interrupt.over else 0
            assert len(said) == (n if not leak else n // 3)
            assert_full_capacity(pool)
    finally:
        gc.enable()
        gc.unfreeze()

    assert len(factory.opened) == len(factory.closed)


def interruptions(pool: Pool[Connection], operation: Callable[[Pool[Connection]], None]) -> Iterator[bool]:
    """Run *operation* again and again, interrupted at the first chance, the second, ...; tells if it was."""

    def action() -> None:
        raise KeyboardInterrupt

    n = over = 0
    # An exception from a trace function makes Python 3.13 miss events in the next round, now and then.
    while over < 3:
        n += 1
        caught = False
        with Interrupt(n, action, breaks=True) as interrupt:
            try:
                operation(pool)
            except KeyboardInterrupt:  # not kept: it holds the frames, and what was in their hands
                caught = True
        over = over + 1 if interrupt.over else 0
        yield caught


@pytest.mark.traced
@pytest.mark.slow
@pytest.mark.parametrize("kind", [plain, hooked])
@pytest.mark.parametrize("operation", [*OPERATIONS, wait])
def test_who_is_interrupted_anywhere_loses_no_slot(
    kind: Callable[[Factory], Pool[Connection]], operation: Callable[[Pool[Connection]], None], factory: Factory
) -> None:
    """``KeyboardInterrupt`` before each instruction in turn; what was in flight comes back."""
    with kind(factory) as pool:
        interrupted = 0
        for caught in interruptions(pool, operation):
            interrupted += caught
            settled(pool)
        assert interrupted > 2
        stats = pool.stats()
        assert (0, 0, 0) == (stats.in_use, stats.opening, stats.waiting)
        assert_full_capacity(pool)


def test_ctrl_c_in_a_thread_that_waits_gives_its_place_up(factory: Factory) -> None:
    """A real signal, whose handler raises as Python's own does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Pool(factory, max_size=1) as pool:
            lease = pool.lease()

            def press() -> None:
                waiting(pool, 1)
                signal.pthread_kill(main, signal.SIGUSR1)

            main = threading.get_ident()
            pressing = Call(press)
            with pytest.raises(KeyboardInterrupt):
                pool.lease(timeout=LIMIT)
            assert pressing.outcome() is None
            assert 0 == pool.stats().waiting

            lease.release()
            assert 1 == pool.stats().idle
            assert_full_capacity(pool)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_who_is_interrupted_between_the_hand_off_and_its_next_step_passes_it_on(factory: Factory) -> None:
    """
    The exception is set for a thread that waits in C, so it is raised when that has been handed the resource.

    The next who waits gets it, and it is the same one.
    """
    if sys.gettrace() is not None:
        pytest.skip("a traced thread turns on the spot while an exception is set for another one")
    with Pool(factory, max_size=1) as pool:
        lease = pool.lease()
        first = Call(pool.lease)
        waiting(pool, 1)
        second = Call(pool.lease)
        waiting(pool, 2)
        ident = ctypes.c_ulong(first.ident)
        assert 1 == ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))
        lease.release()

        assert isinstance(first.outcome(), KeyboardInterrupt)
        first._outcome[0] = None
        granted = second.outcome()
        granted.release()
        assert_full_capacity(pool)
        assert 0 == pool.stats().waiting


# Fork.

FORK = """
import gc, logging, os, signal, sys, threading
import pytest
from hygiene import Pool, PoolTimeout

signal.alarm(50)  # a hang is a failure
logging.disable()  # what is dropped is told

class Connection:
    def __init__(self):
        self.opened_in = os.getpid()
        self.closed = False
    def close(self):
        assert self.opened_in == os.getpid(), "closed the parent's"
        assert not self.closed
        self.closed = True
    def __del__(self):
        if self.opened_in != os.getpid():
            os.write(2, b"collected the parent's\\n")
            os._exit(3)

def in_child(function):
    child = os.fork()
    if not child:
        code = 1
        try:
            function()
            gc.collect()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0

def fresh(pool):
    leases = [pool.lease(timeout=0) for _ in range(pool.max_size)]
    assert all(lease.resource.opened_in == os.getpid() for lease in leases)
    try:
        pool.lease(timeout=0)
    except PoolTimeout:
        pass
    else:
        raise AssertionError("too many")
    for lease in leases:
        lease.release()
    stats = pool.stats()
    assert stats.opened == stats.idle == pool.max_size and stats.closed == 0, stats
"""


def run_forking(script: str) -> None:
    """Run *script* in an interpreter of its own: a fork of the tests' would take their threads' locks along."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(FORK) + textwrap.dedent(script)],
        check=False, capture_output=True, text=True, timeout=55,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (0, "") == (done.returncode, done.stderr)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.mark.slow
@forks
@pytest.mark.parametrize("options", ["", "leak_after=60, reset=lambda c: None, check=lambda c: True"])
def test_a_forked_child_opens_its_own_and_leaves_those_of_the_parent_alone(options: str) -> None:
    """Neither what was idle, nor what was held: it is not used, closed or collected there."""
    run_forking(f"""
        pool = Pool(Connection, max_size=2, name="db", {options})
        held, idle = pool.lease(), pool.lease()
        idle.release()

        def child():
            global held
            assert pool.stats().opened == 0, pool.stats()
            with pytest.raises(RuntimeError, match="was taken before the process was forked"):
                held.resource
            fresh(pool)
            pool.expire()
            if number == 0:
                held.release()
                with pytest.raises(RuntimeError, match="released before"):
                    held.release()
            elif number == 1:
                held.release(discard=True)
            elif number == 2:
                del held
            gc.collect()
            assert pool.stats().in_use == 0 and pool.stats().dropped == 0
            fresh(pool)
            pool.close()
            assert pool.stats().closed == 2

        for number in range(4):
            in_child(child)
        assert not held.resource.closed
        held.release()
        fresh(pool)
        pool.close()
    """)


@pytest.mark.slow
@forks
def test_a_forked_child_may_leave_the_block_of_its_parent() -> None:
    """The resource stays the parent's, whoever leaves the block first."""
    run_forking("""
        pool = Pool(Connection, max_size=1)
        with pool.acquire() as connection:
            child = os.fork()
            inside = os.getpid()
        if not child:
            assert pool.stats().idle == 0
            fresh(pool)
            pool.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pool.acquire() as again:
            assert again is connection
        pool.close()
        assert connection.closed
    """)


@pytest.mark.slow
@forks
def test_a_program_that_forks_while_threads_wait() -> None:
    """The child, where nobody waits, is served at once; in the parent they are served as if nothing had been."""
    run_forking("""
        pool = Pool(Connection, max_size=1)
        held = pool.lease()
        served = []

        def wait():
            with pool.acquire(timeout=20) as connection:
                served.append(connection)

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        while pool.stats().waiting < 3:
            pass

        def child():
            assert pool.stats().waiting == 0
            fresh(pool)
            held.release()
            fresh(pool)
            pool.close()

        in_child(child)
        assert pool.stats().waiting == 3
        connection = held.resource
        held.release()
        for thread in threads:
            thread.join(20)
        assert served == [connection] * 3
        pool.close()
    """)


@pytest.mark.slow
@forks
def test_a_forked_child_has_a_janitor_of_its_own() -> None:
    """What the child leaves idle, and what it drops, is closed there."""
    run_forking("""
        closed = []
        pool = Pool(Connection, max_size=1, max_idle=0.01, close=lambda c: (c.close(), closed.append(os.getpid())))
        held = pool.lease()

        def child():
            pool.lease().release()
            while not closed:
                pass
            pool.lease()
            while len(closed) < 2:
                pass
            assert closed == [os.getpid()] * 2
            pool.close()

        in_child(child)
        held.release()
        pool.close()
    """)


# At random.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_threads_with_tiny_timeouts_leave_full_capacity_and_never_share(
    factory: Factory, seed: int, hasty: None
) -> None:
    failing = random.Random(seed)
    shared: list[Connection] = []

    def open_() -> Connection:
        if failing.random() < 0.1:
            raise ConnectionError
        return factory()

    def use(number: int) -> tuple[int, int]:
        rng = random.Random(seed * 1000 + number)
        served = missed = 0
        for _ in range(150):
            try:
                lease = pool.lease(timeout=rng.choice([0, 1e-6, 1e-4, 1e-3, LIMIT]))
            except PoolTimeout:
                missed += 1
                continue
            except ConnectionError:
                continue
            connection = lease.resource
            connection.holders += 1
            if rng.random() < 0.5:
                time.sleep(0)
            if connection.holders != 1 or connection.closed:
                shared.append(connection)
            connection.holders -= 1
            del connection
            fate = rng.random()
            if fate < 0.9:
                lease.release(discard=fate < 0.1)
            del lease  # dropped, one in ten
            served += 1
        return served, missed

    with Pool(open_, max_size=3, reset=lambda connection: None) as pool:
        outcomes = [call.outcome() for call in [Call(lambda n=number: use(n)) for number in range(8)]]
        served, missed = map(sum, zip(*outcomes, strict=True))
        pool._open = factory
        assert_full_capacity(pool)

        assert [] == shared
        assert 0 == pool.stats().in_use == pool.stats().waiting
        assert missed + 1 == pool.stats().timeouts  # and the one above
        assert served > 0
    assert len(factory.opened) == len(factory.closed)


def test_threads_that_are_closed_under_their_hands_all_end(factory: Factory, hasty: None) -> None:
    for _ in range(20):
        pool = Pool(factory, max_size=2)
        begun = threading.Barrier(5)

        def use(pool: Pool[Connection] = pool, begun: threading.Barrier = begun) -> None:
            begun.wait(LIMIT)
            while True:
                with pool.acquire(timeout=LIMIT) as connection:
                    assert not connection.closed

        users = [Call(use) for _ in range(4)]
        begun.wait(LIMIT)
        until(lambda pool=pool: pool.stats().acquired > 5)
        assert pool.drain(grace=LIMIT)

        assert [PoolClosed] * 4 == [type(user.outcome()) for user in users]
        assert pool.stats().opened == pool.stats().closed
    assert len(factory.opened) == len(factory.closed)


# A model.


class PoolModel(RuleBasedStateMachine):
    """
    One thread, whatever it does, and what must be true of the pool then.

    The model is a list of what is held, one of what is idle (the longest first) with the time it came back, and a
    count of what was closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.opened: list[Connection] = []
        self.held: list[tuple[Any, Connection]] = []
        self.idle: list[tuple[Connection, float]] = []
        self.born: dict[int, float] = {}
        self.gone = 0
        self.size = 3
        self.errors = 0
        self.closed = False
        self.fail: set[str] = set()
        self.pool = Pool(
            self._open, max_size=3, min_size=1, max_idle=100, max_lifetime=1000, timer=self.clock,
            check=lambda connection: self._hook("check"), reset=lambda connection: self._hook("reset"),
            close=self._close,
        )  # fmt: skip

    def _open(self) -> Connection:
        self._hook("open")
        self.opened.append(Connection(len(self.opened)))
        self.born[self.opened[-1].number] = self.clock()
        return self.opened[-1]

    def _hook(self, name: str) -> None:
        if name in self.fail:
            raise OSError(name)

    def _close(self, connection: Connection) -> None:
        connection.close()
        self._hook("close")

    def _leave(self) -> None:
        """One more was closed."""
        self.gone += 1
        self.errors += "close" in self.fail

    @property
    def total(self) -> int:
        return len(self.held) + len(self.idle)

    def _old(self, connection: Connection) -> bool:
        """Whether it is over in any case; asserted nowhere near the edge, which is drawn at random."""
        return self.clock() - self.born[connection.number] >= 1000

    @rule(name=st.sampled_from(["open", "check", "reset", "close"]))
    def begin_to_fail(self, name: str) -> None:
        self.fail.add(name)

    @rule()
    def work_again(self) -> None:
        self.fail.clear()

    @rule()
    def acquire(self) -> None:
        if self.closed:
            with pytest.raises(PoolClosed):
                self.pool.lease(timeout=0)
            return
        if not self.idle and self.total >= self.size:
            with pytest.raises(PoolTimeout):
                self.pool.lease(timeout=0)
            return
        expected = None
        if self.idle:
            expected, _ = self.idle.pop()
            if "check" in self.fail:
                self._leave()
                expected = None
        if expected is None and "open" in self.fail:
            with pytest.raises(OSError, match="open"):
                self.pool.lease(timeout=0)
            return
        lease = self.pool.lease(timeout=0)
        assert lease.resource is (self.opened[-1] if expected is None else expected)
        self.held.append((lease, lease.resource))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), discard=st.booleans())
    def release(self, data: st.DataObject, discard: bool) -> None:
        lease, connection = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        lease.release(discard=discard)
        if discard or self.closed or self._old(connection):
            self._leave()
        elif "reset" in self.fail:
            self.errors += 1
            self._leave()
        else:
            self.idle.append((connection, self.clock()))
            if self.total > self.size:  # it was made smaller meanwhile: the one that is idle longest goes
                self.idle.pop(0)
                self._leave()
        with pytest.raises(RuntimeError, match="released before"):
            lease.release()

    @rule(seconds=st.sampled_from([1, 50, 100, 2000]))
    def advance(self, seconds: float) -> None:
        # Up to 5 % earlier at random: nothing may be asserted of what is in between.
        if not any(900 < self.clock() + seconds - born < 1000 for born in self.born.values()):
            self.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        count = 0

        def leaves(item: tuple[Connection, float]) -> None:
            nonlocal count
            self.idle.remove(item)
            self._leave()
            count += 1

        for item in [item for item in self.idle if self._old(item[0])]:  # however few are left
            leaves(item)
        for item in list(self.idle):
            if self.total > (0 if self.closed else 1) and self.clock() - item[1] >= 100:
                leaves(item)
        assert count == self.pool.expire()

    @rule(size=st.integers(1, 5))
    def resize(self, size: int) -> None:
        self.pool.resize(size)
        if self.closed:
            return
        self.size = size
        while self.total > size and self.idle:
            self.idle.pop(0)
            self._leave()

    @precondition(lambda self: len(self.opened) > 8)
    @rule()
    def close(self) -> None:
        expected = len(self.idle) if "close" in self.fail else 0
        failures = 0
        try:
            self.pool.close()
        except ExceptionGroup as group:
            failures = len(group.exceptions)
        assert expected == failures
        for _ in self.idle:
            self._leave()
        self.idle.clear()
        self.closed = True

    @invariant()
    def nothing_is_lost(self) -> None:
        stats = self.pool.stats()
        assert len(self.opened) == stats.opened == stats.in_use + stats.idle + stats.closed
        assert (len(self.held), len(self.idle), self.gone) == (stats.in_use, stats.idle, stats.closed)
        assert (0, 0, self.errors) == (stats.opening, stats.waiting, stats.hook_errors)

    @invariant()
    def nothing_is_closed_twice_or_while_it_is_held(self) -> None:
        assert self.gone == sum(connection.closed for connection in self.opened)
        assert all(connection.closed <= 1 for connection in self.opened)
        assert not any(connection.closed for _, connection in self.held)
        assert len(self.held) == len({connection.number for _, connection in self.held})

    def teardown(self) -> None:
        self.fail.clear()
        for lease, _ in self.held:
            lease.release()
        self.pool.close()
        assert all(connection.closed == 1 for connection in self.opened)


PoolModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPoolModel = PoolModel.TestCase


# Collected.


def test_a_pool_that_was_used_and_closed_is_collected(factory: Factory) -> None:
    """Neither the janitor, nor the shutdown, nor a waiter that went keeps it."""
    pool = Pool(factory, max_size=1, max_idle=60, leak_after=60)
    with pool.acquire(), pytest.raises(PoolTimeout):
        pool.lease(timeout=0.001)
    pool.close()
    reference = weakref.ref(pool)
    del pool
    gc.collect()

    assert reference() is None
