"""Pools of resources: threads wait at a `Pool`, tasks at an `AsyncPool`, and `leasing` decides for both.

What a pool does beside its state is here: open, check, reset and close, outside of anything that others wait for; wait,
in a thread or in a task; and look after what is idle or held for too long, which the janitor asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import random
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, cast, overload

from hygiene.cleanup import close_at_shutdown
from hygiene.closing import GRACE, Closer, Shield, check_closer, find_closer, note, running_loop
from hygiene.errors import PoolClosed, PoolFull, PoolTimeout
from hygiene.events import PoolStats
from hygiene.janitor import aside, janitor, leave_alone, survive_fork
from hygiene.leasing import VACANT, Leasing, Slot, Tally, Ticket
from hygiene.logs import logger
from hygiene.names import keywords_of, refuse_unknown, suggests
from hygiene.units import Duration, seconds

__all__ = ["AsyncPool", "AsyncPoolLease", "Holder", "Pool", "PoolLease", "managed_pool"]


R = TypeVar("R")

_ON_ITS_WAY = 5.0  # seconds for the few bytecodes between a decision and its wake-up, on a machine that is swapping
_DEPTH = 32  # frames that a lease records: enough to leave a web framework's middleware behind


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a resource. What it was taken for is recorded only in a pool with *leak_after*."""

    age: float | None
    """Seconds since it was taken."""
    thread: str | None
    """The name of the thread or task that took it."""
    frames: tuple[tuple[Any, int], ...] = field(default=(), repr=False)
    """Where: code objects and offsets, innermost first."""

    @property
    def stack(self) -> str:
        """Where it was taken, as a traceback shows it; empty if that was not recorded."""
        return _format(self.frames)


class _Lease(Generic[R]):
    """What the leases of both kinds of pool have in common."""

    __slots__ = ("__weakref__", "_pool", "_slot", "_timeout")

    _pool: _Pool[R]
    _slot: Slot[R]
    _timeout: Duration | None

    @property
    def resource(self) -> R:
        """
        What is leased.

        Raises:
            RuntimeError: it was released, not yet taken, or taken in the process that this one was forked from.
        """
        slot: Slot[R] | None = getattr(self, "_slot", None)
        if slot is None:
            raise RuntimeError(f"this lease of pool {self._pool.name!r} holds nothing: it was released, or never taken")
        if not slot.of(self._pool._core):
            raise RuntimeError(
                f"this lease of pool {self._pool.name!r} was taken before the process was forked or its event loop "
                "ended, and its resource belongs there: take another one"
            )
        return slot.resource

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):  # deleted when the lease is entered, or released
                raise AttributeError(name)
            raise AttributeError(f"a lease of pool {self._pool.name!r} has no attribute {name!r}. {self._advice()}")

        def __call__(self, *_: object, **__: object) -> Any:
            """Say how a lease is used."""
            raise TypeError(f"a lease of pool {self._pool.name!r} is not called. {self._advice()}")

    def _advice(self) -> str:
        waits = isinstance(self, AsyncPoolLease)
        block, taken = ("async with", "await pool.lease()") if waits else ("with", "pool.lease()")
        return f"Use the resource: `{block} pool.acquire() as resource:`, or `.resource` of what `{taken}` returns"

    def __repr__(self) -> str:
        slot = getattr(self, "_slot", None)
        held = "holds nothing" if slot is None else f"holds {slot.resource!r}"
        return f"<{type(self).__name__} of {self._pool.name!r}: {held}>"

    def _claim(self) -> Slot[R]:
        # Two threads may release at once. To delete the attribute is one operation, and only one of them succeeds.
        try:
            slot = self._slot
            del self._slot
        except AttributeError:
            raise RuntimeError(
                f"this lease of pool {self._pool.name!r} holds nothing: it was released before, or never taken"
            ) from None
        return slot

    def _used(self) -> RuntimeError:
        return RuntimeError(f"this lease of pool {self._pool.name!r} was used already; ask the pool for another one")


class PoolLease(_Lease[R]):
    """
    The right to use one resource of a `Pool` until it is released.

    Good for one ``with`` block, which yields the resource; `Pool.lease` returns one that is taken already. One that is
    dropped without having been released is noticed, logged, and its resource closed.
    """

    __slots__ = ()

    def __init__(self, pool: Pool[R], timeout: Duration | None) -> None:
        self._pool = pool
        self._timeout = timeout

    def __enter__(self) -> R:
        try:
            timeout = self._timeout
            del self._timeout
        except AttributeError:
            raise self._used() from None
        pool = self._pool
        if not pool._waiters and not pool._careful:
            try:
                slot = self._slot = pool._pick()
            except IndexError:
                pass
            else:
                slot.uses += 1
                return slot.resource
        try:
            self._slot = cast("Pool[R]", pool)._obtain(timeout)
            self._slot.uses += 1
            return self._slot.resource
        finally:
            del self  # see `Pool._prepare`

    def __exit__(self, *exc_info: object) -> None:
        try:
            slot = self._slot
            del self._slot
        except AttributeError:
            return  # released inside the block
        pool = self._pool
        slot.since = now = pool._timer()
        if pool._careful or now >= slot.expires:
            cast("Pool[R]", pool)._give_back(slot, discard=False)
            return
        try:
            pool._put(slot)
        finally:  # an interrupt right after it must not leave anybody waiting for what is there
            if pool._waiters or pool._core.winding:
                pool._retire_all(pool._core.settle())

    def release(self, *, discard: bool = False) -> None:
        """
        Give the resource back, from any thread.

        Args:
            discard: Close it instead of handing it to the next: it is broken, or in a state that nobody should see.

        Raises:
            RuntimeError: it was released before. That is a bug of the caller: somebody else may have it now.
        """
        slot = self._claim()
        pool = self._pool
        slot.since = now = pool._timer()
        if discard or pool._careful or now >= slot.expires:
            cast("Pool[R]", pool)._give_back(slot, discard=discard)
            return
        try:
            pool._put(slot)
        finally:  # an interrupt right after it must not leave anybody waiting for what is there
            if pool._waiters or pool._core.winding:
                pool._retire_all(pool._core.settle())


class AsyncPoolLease(_Lease[R]):
    """
    The right to use one resource of an `AsyncPool` until it is released.

    Good for one ``async with`` block, which yields the resource; `AsyncPool.lease` returns one that is taken already.
    One that is dropped without having been released is noticed, logged, and its resource closed.
    """

    __slots__ = ()

    def __init__(self, pool: AsyncPool[R], timeout: Duration | None) -> None:
        self._pool = pool
        self._timeout = timeout

    async def __aenter__(self) -> R:
        try:
            timeout = self._timeout
            del self._timeout
        except AttributeError:
            raise self._used() from None
        pool = self._pool
        if not pool._waiters and not pool._careful and running_loop() is pool._home:
            try:
                slot = self._slot = pool._pick()
            except IndexError:
                pass
            else:
                slot.uses += 1
                return slot.resource
        try:
            self._slot = await cast("AsyncPool[R]", pool)._obtain(timeout)
            self._slot.uses += 1
            return self._slot.resource
        finally:
            del self  # see `Pool._prepare`

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            slot = self._slot
            del self._slot
        except AttributeError:
            return  # released inside the block
        pool = self._pool
        slot.since = now = pool._timer()
        if pool._careful or now >= slot.expires:
            await cast("AsyncPool[R]", pool)._give_back(slot)
            return
        pool._put(slot)
        if pool._waiters or pool._core.winding:
            pool._retire_all(pool._core.settle())

    def release(self, *, discard: bool = False) -> None:
        """
        Give the resource back, from any task or thread, without waiting.

        What has to be awaited (``reset``, ``close``) runs in a task of the pool's loop, and `AsyncPool.aclose` waits
        for it.

        Args:
            discard: Close it instead of handing it to the next: it is broken, or in a state that nobody should see.

        Raises:
            RuntimeError: it was released before. That is a bug of the caller: somebody else may have it now.
        """
        slot = self._claim()
        pool = self._pool
        slot.since = now = pool._timer()
        if discard or pool._careful or now >= slot.expires:
            cast("AsyncPool[R]", pool)._give_back_soon(slot, discard=discard)
            return
        pool._put(slot)
        if pool._waiters or pool._core.winding:
            pool._retire_all(pool._core.settle())


class _Pool(Generic[R]):
    """What both kinds of pool are made of: the limits, the slots, and what the janitor does for them."""

    _home: asyncio.AbstractEventLoop | None = None

    def __init__(
        self,
        open: Callable[[], Any],  # noqa: A002, the word of the field
        *,
        max_size: int,
        min_size: int,
        timeout: Duration | None,
        max_waiting: int | None,
        max_idle: Duration | None,
        max_lifetime: Duration | None,
        check: Callable[[R], Any] | None,
        reset: Callable[[R], Any] | None,
        close: Closer,
        leak_after: Duration | None,
        order: str,
        name: str | None,
        timer: Callable[[], float],
    ) -> None:
        functions: dict[str, object] = {"open": open, "timer": timer, "check": check, "reset": reset}
        for what, function in functions.items():
            if not callable(function) and (function is not None or what in {"open", "timer"}):
                raise TypeError(f"{what} must be callable; found {function!r}")
        _check_sizes(max_size, min_size)
        if max_waiting is not None and not _is_number(max_waiting, 0):
            raise ValueError(f"max_waiting must be a number of callers, 0 or more, or None; found {max_waiting!r}")
        if order not in {"lifo", "fifo"}:
            raise ValueError(f'order must be "lifo" or "fifo"; found {order!r}')
        check_closer(close, required=True)
        self._open = open
        self._min_size = min_size
        self._max_size = max_size
        self._timeout = None if timeout is None else _wait(timeout)
        self._max_waiting = max_waiting
        self._max_idle = None if max_idle is None else seconds(max_idle, "max_idle")
        self._max_lifetime = None if max_lifetime is None else seconds(max_lifetime, "max_lifetime")
        # No resource is due sooner after it was opened or put back.
        self._soonest = min(filter(None, (self._max_idle, self._max_lifetime)), default=None)
        self._leak_after = None if leak_after is None else seconds(leak_after, "leak_after")
        self._check = check
        self._reset = reset
        self._close = close
        self._lifo = order == "lifo"
        self.name = name if name is not None else getattr(open, "__qualname__", type(open).__name__)
        self._timer = timer
        # Whether taking or giving back is more than moving a slot.
        self._careful = check is not None or reset is not None or leak_after is not None
        self._timeouts = Tally()
        self._dropped = Tally()
        self._hook_errors = Tally()
        self._known = False  # to `shutdown`, from the first resource on
        self._forget: Callable[[], object] = _nothing  # makes `shutdown` forget it
        self._drained: deque[Callable[[], object]] = deque()
        manual = getattr(timer, "manual", False)
        self._idle_duty = _Duty(self, "_visit_idle", manual=manual)
        self._leak_duty = _Duty(self, "_report_leaks", manual=manual)
        self._lost_duty = _Duty(self, "_visit_lost", manual=False)
        self._start(closed=False)
        survive_fork(self)

    def _start(self, *, closed: bool) -> None:
        duty = self._lost_duty  # not the pool itself, which a finalizer must not keep alive
        self._core: Leasing[R] = Leasing(self._max_size, lifo=self._lifo, notify=functools.partial(duty.due_in, 0.0))
        if closed:
            self._core.close()
        # The fast paths' short cuts to the parts of the state.
        self._waiters = self._core.waiters
        self._pick = self._core.pick
        self._put = self._core.idle.append

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._core.closed

    @property
    def max_size(self) -> int:
        """How many resources may be open at once; see `resize`."""
        return self._core.max_size

    def stats(self) -> PoolStats:
        """The numbers at this moment. While other threads use the pool, they may belong to neighbouring moments."""
        core = self._core
        idle, opened, closed = len(core.idle), int(core.opened), int(core.shut)
        return PoolStats(
            max_size=core.max_size,
            in_use=max(opened - closed - idle, 0),
            idle=idle,
            opening=core.opening,
            waiting=len(core.waiters),
            opened=opened,
            closed=closed,
            acquired=core.acquired,
            timeouts=int(self._timeouts),
            dropped=int(self._dropped),
            hook_errors=int(self._hook_errors),
        )

    def holders(self) -> tuple[Holder, ...]:
        """Who holds a resource now, the longest first. With *leak_after*, each knows since when and where."""
        if self._leak_after is None:
            return tuple(Holder(None, None) for _ in self._core.held())
        now = self._timer()
        held = [Holder(now - slot.since, slot.thread, slot.frames or ()) for slot in self._core.held()]
        return tuple(sorted(held, key=lambda holder: -(holder.age or 0.0)))

    def __repr__(self) -> str:
        stats = self.stats()
        state = "closed, " if self.closed else ""
        waiting = f", {stats.waiting} waiting" if stats.waiting else ""
        return (
            f"<{type(self).__name__} {self.name!r}: {state}{stats.in_use} in use, {stats.idle} idle, "
            f"max_size={stats.max_size}{waiting}>"
        )

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None and core.open and not core.closed:
            warnings.warn(
                f"pool {self.name!r} was dropped with {core.open} open: close it",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    # Taking.

    def _limit(self, timeout: Duration | None) -> float | None:
        return self._timeout if timeout is None else _wait(timeout)

    def _take_or_check(self, limit: float | None) -> Slot[R] | None:
        """A slot at once, or ``None`` if it is right to wait for one."""
        core = self._core
        self._refuse_closed()
        slot = core.take()
        if slot is None:
            if self._max_waiting is not None and len(core.waiters) >= self._max_waiting:
                stats = self.stats()
                raise PoolFull(
                    f"pool {self.name!r}: {stats.waiting} wait already, and max_waiting is {self._max_waiting}; "
                    f"{stats.in_use} of {stats.max_size} in use. Ask for less, or raise max_size.",
                    stats,
                )
            if limit == 0:
                self._time_out(limit)
        return slot

    def _refuse_closed(self) -> None:
        if self._core.closed:
            raise self._closed_error()

    def _closed_error(self) -> PoolClosed:
        return PoolClosed(
            f"pool {self.name!r} is closed, by itself or by shutdown(), and nothing can be taken from it. Make a new "
            "one, or make it in a lifespan, where it begins and ends with its users."
        )

    def _time_out(self, limit: float | None) -> NoReturn:
        self._timeouts.add()
        stats = self.stats()
        raise PoolTimeout(
            f"no resource from pool {self.name!r} after {limit:g} s: {stats.in_use} of {stats.max_size} in use, "
            f"{stats.opening} opening, {stats.waiting} waiting. {self._longest_holder()}",
            stats,
        )

    def _longest_holder(self) -> str:
        advice = "Return resources sooner, or raise max_size"
        holder = next(iter(self.holders()), None)
        if holder is None or holder.age is None or holder.thread is None:
            return f"{advice}; with leak_after= the pool says who holds them."
        place = ", ".join(f"taken at {_place(code, offset)}" for code, offset in holder.frames[:1])
        return f"The longest holder is {holder.thread}, for {holder.age:.1f} s{place and ', ' + place}. {advice}."

    def _opened(self, slot: Slot[R], resource: R) -> None:
        """The holder of *slot* has opened *resource*."""
        now = self._timer()
        if self._max_lifetime is None:
            slot.expires = float("inf")
        else:
            # Up to 5 % earlier than asked: what was opened together must not be opened anew together.
            slot.expires = now + self._max_lifetime * (1 - 0.05 * random.random())  # noqa: S311
        if self._leak_after is None:
            slot.since = now
        self._core.filled(slot, resource)
        if self._soonest is not None:
            self._idle_duty.due_in(self._soonest)
        if self._known:
            return
        self._known = True
        self._forget = close_at_shutdown(self, f"pool {self.name!r}").cancel

    def _record(self, slot: Slot[R]) -> None:
        """Note who takes *slot*: raw frames, which are formatted only if somebody asks."""
        if self._leak_after is None:
            return
        slot.since = self._timer()
        slot.thread = _who()
        slot.frames = _frames()
        slot.reported = False
        self._leak_duty.due_in(self._leak_after)

    # Giving back.

    def _returned(self, slot: Slot[R], now: float) -> None:
        """A recorded holder gives *slot* back."""
        if slot.reported:
            logger.warning(
                "the resource of pool %r that %s took was returned after all",
                self.name,
                slot.thread,
                extra={"event_name": "pool.returned_late", "pool": self.name},
            )
        slot.frames = slot.thread = None
        slot.reported = False
        slot.since = now

    def _retire_all(self, slots: Iterable[Slot[R]]) -> None:
        raise NotImplementedError

    def _vacate(self, slot: Slot[R]) -> None:
        core = self._core
        if slot.of(core):
            self._retire_all(core.vacate(slot))
        self._tell_drained()

    def _restore(self, slot: Slot[R]) -> None:
        """Give a slot back that nobody has used."""
        if slot.resource is VACANT:
            self._vacate(slot)
        else:
            self._retire_all(self._core.put(slot))

    def _begin_close(self) -> list[Slot[R]]:
        """Close the state; returns the slots whose resource is to be closed."""
        leaving = [*self._core.close(), *self._due_lost()]
        self._forget()
        return leaving

    def _tell_drained(self) -> None:
        core = self._core
        if core.closed and not core.open and not core.opening:
            while self._drained:
                with contextlib.suppress(IndexError):
                    self._drained.popleft()()

    def _find_closer(self, resource: R, *, prefer_async: bool) -> Callable[[], Any] | None:
        release = find_closer(resource, self._close, prefer_async=prefer_async)
        if release is None and self._close != "auto":
            raise AttributeError(f"{type(resource).__name__!r} object has no method {self._close!r}")
        return release

    def _failed(self, what: str, error: BaseException) -> None:
        self._hook_errors.add()
        logger.error(
            "%s of a resource of pool %r failed",
            what,
            self.name,
            exc_info=error,
            extra={"event_name": "pool.hook_failed", "pool": self.name, "hook": what, "of": (self, what)},
        )

    # What the janitor does.

    def _due_idle(self) -> list[Slot[R]]:
        """The idle resources whose time is over, taken out."""
        core, now, limit = self._core, self._timer(), self._max_idle
        keep = 0 if core.closed else self._min_size
        due = core.surplus(0, lambda slot: now >= slot.expires)
        if limit is not None:
            due += core.surplus(keep, lambda slot: now - slot.since >= limit)
        return due

    def _next_idle(self) -> float | None:
        """Seconds until an idle resource is due, at the earliest; ``None`` if none is open."""
        core, now = self._core, self._timer()
        if not core.open or core.closed:
            return None
        if self._soonest is None:
            return None
        delays = [self._soonest]  # for what is in use, and what is spared because of min_size
        for slot in list(core.idle):
            ends = slot.expires if self._max_idle is None else min(slot.expires, slot.since + self._max_idle)
            if ends > now:
                delays.append(ends - now)
        return min(delays)

    def _due_lost(self) -> list[Slot[R]]:
        """The slots of leases that nobody released, which are reported here."""
        lost: list[Slot[R]] = []
        while True:
            try:
                slot = self._core.lost.popleft()
            except IndexError:
                return lost
            lost.append(slot)
            if slot.leaving:
                continue  # taken out to be closed, and whoever was to do it was interrupted
            self._dropped.add()
            taken = (
                f" It was taken by {slot.thread} at\n{_format(slot.frames)}"
                if slot.frames
                else (" Give the pool leak_after= to see where it was taken.")
            )
            logger.warning(
                "a lease of pool %r was dropped without having been released; its resource is closed.%s",
                self.name,
                taken,
                extra={"event_name": "pool.lease_dropped", "pool": self.name, "of": self},
            )

    def _report_leaks(self) -> float | None:
        """Report who holds a resource for too long; returns seconds until the next is due."""
        if self._leak_after is None:
            return None
        now, delays = self._timer(), []
        for slot in self._core.held():
            if slot.frames is None or slot.reported:
                continue
            left = slot.since + self._leak_after - now
            if left > 0:
                delays.append(left)
                continue
            slot.reported = True
            logger.warning(
                "a resource of pool %r has been held for %.1f s by %s, which took it at\n%s",
                self.name,
                now - slot.since,
                slot.thread,
                _format(slot.frames),
                extra={"event_name": "pool.held_too_long", "pool": self.name, "held_for": now - slot.since},
            )
        return min(delays, default=None)

    def _after_fork(self) -> None:
        """Begin anew in a forked child, and leave what is open to the parent."""
        leave_alone(self._core)
        self._abandon()
        self._known = False

    def _abandon(self) -> None:
        """Begin anew; what is open belongs elsewhere, and is not closed."""
        core = self._core
        core._notify = _nothing
        for slot in core.slots():
            slot.expires = float("-inf")  # so that giving it back looks twice
        self._home = None
        self._drained.clear()
        self._start(closed=core.closed)


class Pool(_Pool[R]):
    """
    Up to *max_size* resources, opened when needed, for threads.

    Safe to use from any number of threads, from signal handlers and from finalizers: nothing in it waits for a lock.
    Who waits is served first in, first out, and what is given back goes straight to the first who waits. Nothing is
    opened before it is needed, and never while others have to wait for it. No slot is ever lost: whatever raises
    wherever, a resource is idle, held or closed. After ``fork`` the child opens its own, and leaves those of the parent
    alone.

    Args:
        open: Opens one resource; called in the thread that needs it. What it raises goes to that caller.
        max_size: How many may be open at once. 10, as SQLAlchemy's 5 with 10 overflow and psycopg's 4 suggest: enough
            for the threads of one web worker, few enough for a database that serves ten of them.
        min_size: How many stay open although they are idle. They are opened when the pool is entered with ``with``.
        timeout: Seconds (or "30s", a ``timedelta``) that a caller waits for a free resource, not counting the time to
            open it; 0 means not at all, ``None`` for ever. 30, as everywhere.
        max_waiting: How many may wait; the next is refused with `PoolFull`. ``None``: any number.
        max_idle: How long a resource may be idle before the janitor closes it. 10 minutes, as psycopg's: shorter than
            what firewalls and databases tolerate.
        max_lifetime: How long it may be open altogether; up to 5 % less, at random, so that not all are opened anew at
            once. An hour, so that a pool follows a server that moved. It is never closed while it is held; once idle it
            is, also where fewer than *min_size* are left.
        check: Called with a resource before it is handed out again; ``False``, or an exception, means that it is dead,
            and then it is closed and another one opened.
        reset: Called with a resource when it comes back, in the thread that gives it back; what raises is closed.
        close: Releases a resource: a callable, the name of a method, or "auto" (``close``, ``aclose``, ``__exit__``,
            ..., whichever it has). Errors are logged and counted, but those of `close` are raised there.
        leak_after: Seconds after which a resource that is still held is reported, with the stack that took it. It costs
            a few microseconds with each acquire, more the deeper the stack; ``None`` records nothing.
        order: "lifo" hands out what came back last, so that what is not needed grows old and is closed; "fifo" lets all
            take turns.
        name: What it is called in logs and errors; by default what *open* is called.
        timer: Returns monotonic seconds. Tests pass a `testing.ManualClock`, and call `expire`.

    Raises:
        TypeError: an argument is not of the kind that is described here.
        ValueError: a number is out of range.
    """

    @suggests
    def __init__(
        self,
        open: Callable[[], R],  # noqa: A002
        *,
        max_size: int = 10,
        min_size: int = 0,
        timeout: Duration | None = 30.0,
        max_waiting: int | None = None,
        max_idle: Duration | None = 600.0,
        max_lifetime: Duration | None = 3600.0,
        check: Callable[[R], Any] | None = None,
        reset: Callable[[R], Any] | None = None,
        close: Closer = "auto",
        leak_after: Duration | None = None,
        order: str = "lifo",
        name: str | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            open, max_size=max_size, min_size=min_size, timeout=timeout, max_waiting=max_waiting, max_idle=max_idle,
            max_lifetime=max_lifetime, check=check, reset=reset, close=close, leak_after=leak_after, order=order,
            name=name, timer=timer,
        )  # fmt: skip

    def acquire(self, timeout: Duration | None = None) -> PoolLease[R]:
        """
        A context manager that takes a resource, yields it, and gives it back.

        Args:
            timeout: Instead of the pool's.

        Raises:
            PoolTimeout: on entering: nothing became free in time.
            PoolFull: on entering: as many wait as may wait.
            PoolClosed: on entering: the pool was closed, before or meanwhile.
        """
        return PoolLease(self, timeout)

    def lease(self, timeout: Duration | None = None) -> PoolLease[R]:
        """
        Take a resource, for code that cannot use ``with``: call `PoolLease.release` when done.

        Raises what `acquire` raises.
        """
        lease = PoolLease(self, timeout)
        try:
            lease.__enter__()
            return lease
        finally:
            del lease

    def expire(self) -> int:
        """
        Close the idle resources whose time is over, and report what was leaked. The janitor does this by itself.

        Returns how many were closed.
        """
        self._report_leaks()
        due = self._due_lost() + self._due_idle()
        self._retire_all(due)
        return len(due)

    def resize(self, max_size: int) -> None:
        """
        Have room for *max_size*.

        If that is less, idle ones are closed here, and those in use when they come back.
        """
        _check_sizes(max_size, self._min_size)
        self._max_size = max_size
        self._retire_all(self._core.resize(max_size))

    def drain(self, grace: Duration = 10.0) -> bool:
        """
        Close, and wait until everything in use has come back and is closed, too.

        Args:
            grace: Seconds to wait at most; a third of what an orchestrator usually gives a process to stop.

        Returns whether everything is closed. What is not will be when it comes back.

        Raises what `close` raises.
        """
        limit = _wait(grace)
        self.close()
        gate = threading.Lock()
        gate.acquire()
        self._drained.append(gate.release)
        self._tell_drained()
        return gate.acquire(timeout=min(limit, threading.TIMEOUT_MAX))

    def close(self) -> None:
        """
        Close what is idle now, and what is in use when it comes back; who waits gets `PoolClosed`.

        Closing twice is fine.

        Raises:
            ExceptionGroup: resources that could not be closed; all have been tried.
        """
        errors = []
        for slot in self._begin_close():
            error = self._retire(slot)
            if error is not None:
                note(error, f"while closing a resource of pool {self.name!r}")
                errors.append(error)
        self._tell_drained()
        if errors:
            raise ExceptionGroup(f"{len(errors)} resource(s) of pool {self.name!r} could not be closed", errors)

    def __enter__(self) -> Pool[R]:
        leases: list[PoolLease[R]] = []
        try:
            while self._core.open < self._min_size:
                leases.append(self.lease())
        except BaseException:
            for lease in leases:
                lease.release()
            self.close()
            raise
        for lease in leases:
            lease.release()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _obtain(self, timeout: Duration | None) -> Slot[R]:
        limit = self._limit(timeout)
        slot = self._take_or_check(limit)
        if slot is None:
            slot = self._wait(limit)
        try:
            return self._prepare(slot)
        finally:
            del slot

    def _wait(self, limit: float | None) -> Slot[R]:
        core = self._core
        gate = threading.Lock()
        gate.acquire()
        ticket: Ticket[R] = Ticket(gate.release)
        slot: Slot[R] | None = None
        try:
            self._retire_all(core.join(ticket))
            woken = gate.acquire(timeout=-1 if limit is None else min(limit, threading.TIMEOUT_MAX))
            if not woken and core.leave(ticket):
                self._time_out(limit)
            # Granted in the last moment: the slot is there, or on its way, unless who was granting it was interrupted.
            if not woken and not gate.acquire(timeout=_ON_ITS_WAY):
                self._time_out(limit)
            slot, ticket.slot = ticket.slot, None
            if slot is None:
                raise self._closed_error()  # noqa: TRY301 - in here, so that no interrupt comes in between
            return slot  # noqa: TRY300 - as above
        except BaseException:
            # Interrupted. If it was granted meanwhile, the next one gets it; if it is just being granted, the slot is
            # let go of with the ticket, and its finalizer brings it back.
            if slot is None and not core.leave(ticket):
                slot, ticket.slot = ticket.slot, None
            if slot is not None:
                self._restore(slot)
            raise
        finally:
            del slot, ticket  # see `_prepare`

    def _prepare(self, slot: Slot[R]) -> Slot[R]:
        """Make sure that what *slot* holds is open and alive."""
        core = self._core
        try:
            if slot.resource is not VACANT and self._check is not None and not self._alive(slot.resource):
                try:
                    self._release(slot.resource)
                finally:
                    core.emptied(slot)  # it is not closed twice, whatever came of the first time
            if slot.resource is VACANT:
                slot.opening = True
                resource = self._open()
                if inspect.isawaitable(resource):
                    self._refuse_async(resource, "open")
                self._opened(slot, resource)
                self._refuse_closed()
            self._record(slot)
            return slot  # noqa: TRY300 - while the slot is still ours to give back
        except BaseException:
            self._retire(slot)
            raise
        finally:
            # What a hook raises, or logs, keeps the frames of all its callers. None of them may hold on to the slot or
            # to the lease, or nobody would notice if it is dropped.
            del slot

    def _alive(self, resource: R) -> bool:
        assert self._check is not None
        try:
            alive = self._check(resource)
        except Exception:
            logger.info(
                "a resource of pool %r did not pass its check; it is replaced",
                self.name,
                exc_info=True,
                extra={"event_name": "pool.check_failed", "pool": self.name, "of": self},
            )
            return False
        if inspect.isawaitable(alive):
            self._refuse_async(alive, "check")
        return alive is not False

    def _give_back(self, slot: Slot[R], *, discard: bool) -> None:
        core = self._core
        if not slot.of(core):
            slot.forget()
            leave_alone(slot)
            return  # taken before a fork: it belongs to the parent, and is not collected here either
        now = slot.since
        if self._leak_after is not None:
            self._returned(slot, now)
        if discard or core.closed or now >= slot.expires:
            self._retire(slot)
            return
        if self._reset is not None:
            try:
                done = self._reset(slot.resource)
                if inspect.isawaitable(done):
                    self._refuse_async(done, "reset")
            except Exception as error:
                self._failed("reset", error)
                self._retire(slot)
                return
            except BaseException:
                self._retire(slot)
                raise
            slot.since = self._timer()
        self._retire_all(core.put(slot))

    def _retire(self, slot: Slot[R]) -> Exception | None:
        """Close what *slot* holds, if anything, and free the room; returns what closing raised."""
        try:
            return None if slot.resource is VACANT else self._release(slot.resource)
        finally:
            self._vacate(slot)

    def _retire_all(self, slots: Iterable[Slot[R]]) -> None:
        for slot in slots:
            self._retire(slot)

    def _refuse_async(self, awaitable: Any, what: str) -> NoReturn:
        if isinstance(awaitable, Coroutine):
            awaitable.close()  # or the interpreter complains that nobody waited for it
        raise TypeError(f"{what} of pool {self.name!r} is asynchronous: use AsyncPool")

    def _release(self, resource: R) -> Exception | None:
        try:
            release = self._find_closer(resource, prefer_async=False)
            if release is None:
                return None
            done = release()
            if inspect.isawaitable(done):
                self._refuse_async(done, "close")
        except Exception as error:
            self._failed("close", error)
            return error
        return None

    def _visit_idle(self) -> float | None:
        due = self._due_idle()
        if due:
            # Not in the janitor's thread: a close that hangs must not keep it from everything else.
            aside(lambda: self._retire_all(due), f"pool-{self.name}")
        return self._next_idle()

    def _visit_lost(self) -> float | None:
        lost = self._due_lost()
        if lost:
            aside(lambda: self._retire_all(lost), f"pool-{self.name}")
        return None


class AsyncPool(_Pool[R]):
    """
    Up to *max_size* resources, opened when needed, for the tasks of one event loop.

    The promises of `Pool`, and: a task that is cancelled at any point (while it waits, while its resource is opened,
    between the hand-off and its next step, while it gives back) loses no slot, and what it was given goes to the next.
    `reset` and `close` run to their end although the task is cancelled, for at most `closing.GRACE` (10) seconds. The
    pool belongs to the loop that uses it first; leases may be released from any thread. If that loop is closed without
    the pool, the next loop finds an empty pool.

    Args:
        open: Opens one resource; a function or a coroutine function. What it raises goes to the caller who needs it.
        max_size: See `Pool`, as for the arguments that follow. *check*, *reset* and *close* may be asynchronous.
        min_size: How many stay open although they are idle. They are opened when the pool is entered with ``async
            with``.
        timeout: Seconds that a caller waits for a free resource, not counting the time to open it.
        max_waiting: How many may wait.
        max_idle: How long a resource may be idle.
        max_lifetime: How long a resource may be open.
        check: Tells whether a resource is alive, before it is handed out again.
        reset: Cleans a resource that comes back; it has 10 seconds.
        close: Releases a resource; "auto" takes ``aclose``, ``close``, ``__aexit__``, ..., whichever it has. It has 10
            seconds.
        leak_after: Seconds after which a holder is reported.
        order: "lifo" or "fifo".
        name: What it is called in logs and errors.
        timer: Returns monotonic seconds.

    Raises:
        TypeError: an argument is not of the kind that is described here.
        ValueError: a number is out of range.
    """

    @overload
    def __init__(
        self, open: Callable[[], Awaitable[R]], *, max_size: int = 10, min_size: int = 0,
        timeout: Duration | None = 30.0, max_waiting: int | None = None, max_idle: Duration | None = 600.0,
        max_lifetime: Duration | None = 3600.0, check: Callable[[R], Any] | None = None,
        reset: Callable[[R], Any] | None = None, close: Closer = "auto",
        leak_after: Duration | None = None, order: str = "lifo", name: str | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None: ...  # fmt: skip

    @overload
    def __init__(
        self, open: Callable[[], R], *, max_size: int = 10, min_size: int = 0,
        timeout: Duration | None = 30.0, max_waiting: int | None = None, max_idle: Duration | None = 600.0,
        max_lifetime: Duration | None = 3600.0, check: Callable[[R], Any] | None = None,
        reset: Callable[[R], Any] | None = None, close: Closer = "auto",
        leak_after: Duration | None = None, order: str = "lifo", name: str | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None: ...  # fmt: skip

    @suggests
    def __init__(
        self,
        open: Callable[[], Any],  # noqa: A002
        *,
        max_size: int = 10,
        min_size: int = 0,
        timeout: Duration | None = 30.0,
        max_waiting: int | None = None,
        max_idle: Duration | None = 600.0,
        max_lifetime: Duration | None = 3600.0,
        check: Callable[[R], Any] | None = None,
        reset: Callable[[R], Any] | None = None,
        close: Closer = "auto",
        leak_after: Duration | None = None,
        order: str = "lifo",
        name: str | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        super().__init__(
            open, max_size=max_size, min_size=min_size, timeout=timeout, max_waiting=max_waiting, max_idle=max_idle,
            max_lifetime=max_lifetime, check=check, reset=reset, close=close, leak_after=leak_after, order=order,
            name=name, timer=timer,
        )  # fmt: skip

    def acquire(self, timeout: Duration | None = None) -> AsyncPoolLease[R]:
        """
        An asynchronous context manager that takes a resource, yields it, and gives it back.

        Args:
            timeout: Instead of the pool's.

        Raises:
            PoolTimeout: on entering: nothing became free in time.
            PoolFull: on entering: as many wait as may wait.
            PoolClosed: on entering: the pool was closed, before or meanwhile.
            RuntimeError: on entering: the pool belongs to another event loop, which is still alive.
        """
        return AsyncPoolLease(self, timeout)

    async def lease(self, timeout: Duration | None = None) -> AsyncPoolLease[R]:
        """
        Take a resource, for code that cannot use ``async with``: call `AsyncPoolLease.release` when done.

        Raises what `acquire` raises.
        """
        lease = AsyncPoolLease(self, timeout)
        if (
            not self._waiters and not self._careful and running_loop() is self._home
        ):  # as in `AsyncPoolLease.__aenter__`
            try:
                slot = lease._slot = self._pick()
            except IndexError:
                pass
            else:
                del lease._timeout
                slot.uses += 1
                return lease
        try:
            await lease.__aenter__()
            return lease
        finally:
            del lease

    async def expire(self) -> int:
        """
        Close the idle resources whose time is over, and report what was leaked. The janitor does this by itself.

        Returns how many were closed.
        """
        self._report_leaks()
        due = self._due_lost() + self._due_idle()
        await self._retire_here(due)
        return len(due)

    async def resize(self, max_size: int) -> None:
        """
        Have room for *max_size*.

        If that is less, idle ones are closed here, and those in use when they come back.
        """
        _check_sizes(max_size, self._min_size)
        self._max_size = max_size
        await self._retire_here(self._core.resize(max_size))

    async def drain(self, grace: Duration = 10.0) -> bool:
        """
        Close, and wait until everything in use has come back and is closed, too.

        Args:
            grace: Seconds to wait at most; a third of what an orchestrator usually gives a process to stop.

        Returns whether everything is closed. What is not will be when it comes back.

        Raises what `aclose` raises.
        """
        limit = _wait(grace)
        await self.aclose()
        ticket = _AsyncTicket[R](asyncio.get_running_loop())
        self._drained.append(ticket.wake)
        self._tell_drained()
        return await ticket.decided(limit, lambda: True)

    async def aclose(self) -> None:
        """
        Close what is idle now, and what is in use when it comes back; who waits gets `PoolClosed`.

        Closing twice is fine.

        Waits for what is being reset and closed. Cancelling it does not keep anything from being closed.

        Raises:
            ExceptionGroup: resources that could not be closed; all have been tried.
        """
        errors = await self._retire_here(self._begin_close())
        await asyncio.sleep(0)  # what other threads have given back reaches this loop now
        while tasks := [task for task in self._tasks if task is not asyncio.current_task()]:
            await asyncio.wait(tasks)
        self._tell_drained()
        for error in errors:
            note(error, f"while closing a resource of pool {self.name!r}")
        if errors:
            raise ExceptionGroup(f"{len(errors)} resource(s) of pool {self.name!r} could not be closed", errors)

    async def __aenter__(self) -> AsyncPool[R]:
        leases: list[AsyncPoolLease[R]] = []
        try:
            while self._core.open < self._min_size:
                leases.append(await self.lease())
        except BaseException:
            for lease in leases:
                lease.release()
            await self.aclose()
            raise
        for lease in leases:
            lease.release()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _after_fork(self) -> None:
        # The parent's tasks never end here, and must not be collected: that would close what they are busy with.
        leave_alone(self._tasks)
        self._tasks = set()
        super()._after_fork()

    def _move_in(self) -> asyncio.AbstractEventLoop:
        """The running loop, which the pool belongs to from now on."""
        loop = asyncio.get_running_loop()
        home = self._home
        if home is not loop:
            if home is not None and not home.is_closed():
                raise RuntimeError(
                    f"pool {self.name!r} belongs to another event loop, which is still alive: close it there, or make "
                    "one pool for each loop"
                )
            if home is not None:
                if self._core.open:
                    logger.warning(
                        "the event loop of pool %r was closed before the pool; %d open resource(s) were forgotten",
                        self.name, self._core.open,
                        extra={"event_name": "pool.loop_gone", "pool": self.name},
                    )  # fmt: skip
                self._tasks.clear()
                for slot in self._core.slots():
                    slot.forget()  # what is still leased goes when its lease does
                self._abandon()
            self._home = loop
        return loop

    async def _obtain(self, timeout: Duration | None) -> Slot[R]:
        loop = self._move_in()
        limit = self._limit(timeout)
        slot = self._take_or_check(limit)
        if slot is None:
            slot = await self._wait(limit, loop)
        try:
            return await self._prepare(slot)
        finally:
            del slot

    async def _wait(self, limit: float | None, loop: asyncio.AbstractEventLoop) -> Slot[R]:
        core = self._core
        ticket = _AsyncTicket[R](loop)
        slot: Slot[R] | None = None
        try:
            self._retire_all(core.join(ticket))
            if not await ticket.decided(limit, lambda: core.leave(ticket)):
                self._time_out(limit)
            slot, ticket.slot = ticket.slot, None
            if slot is None:
                raise self._closed_error()  # noqa: TRY301 - as in `Pool._wait`
            return slot  # noqa: TRY300 - as in `Pool._wait`
        except BaseException:
            # Cancelled. If it was granted meanwhile, the next one gets it; if another thread is just granting it, the
            # slot is let go of with the ticket, and its finalizer brings it back.
            if slot is None and not core.leave(ticket):
                slot, ticket.slot = ticket.slot, None
            if slot is not None:
                self._restore(slot)
            raise
        finally:
            del slot  # see `_prepare`; the ticket is in the hands of the closure above

    async def _prepare(self, slot: Slot[R]) -> Slot[R]:
        """Make sure that what *slot* holds is open and alive."""
        core = self._core
        try:
            if slot.resource is not VACANT and self._check is not None and not await self._alive(slot.resource):
                shield = Shield()
                try:
                    with contextlib.suppress(TimeoutError):  # cancelled, and the grace is over: it is on its own now
                        await shield.run(self._release(slot.resource), "close")
                finally:
                    core.emptied(slot)
                shield.deliver()
            if slot.resource is VACANT:
                slot.opening = True
                resource = self._open()
                if inspect.isawaitable(resource):
                    resource = await resource
                self._opened(slot, resource)
                self._refuse_closed()
            self._record(slot)
            return slot  # noqa: TRY300 - while the slot is still ours to give back
        except BaseException:
            if slot.resource is VACANT:
                self._vacate(slot)
            else:  # cancelled in the middle of a check, say: nobody knows what it would answer next
                self._retire_all([slot])
            raise
        finally:
            del slot

    async def _alive(self, resource: R) -> bool:
        assert self._check is not None
        try:
            alive = self._check(resource)
            if inspect.isawaitable(alive):
                alive = await alive
        except Exception:
            logger.info(
                "a resource of pool %r did not pass its check; it is replaced",
                self.name,
                exc_info=True,
                extra={"event_name": "pool.check_failed", "pool": self.name, "of": self},
            )
            return False
        return alive is not False

    async def _give_back(self, slot: Slot[R]) -> None:
        if not (finishing := self._begin_give_back(slot, discard=False)):
            return
        # In a task of its own, which no cancellation reaches: neither the resource nor the slot may be left half-way.
        # It goes on after the grace is over, and ends by itself: each of its steps has a deadline.
        shield = Shield()
        with contextlib.suppress(TimeoutError):
            await shield.run(self._spawn(finishing), "giving back", leave=True)
        shield.deliver()

    def _give_back_soon(self, slot: Slot[R], *, discard: bool) -> None:
        finishing = self._begin_give_back(slot, discard=discard)
        if finishing and not self._spawn_anywhere(finishing):
            self._vacate(slot)

    def _begin_give_back(self, slot: Slot[R], *, discard: bool) -> Callable[[], Coroutine[Any, Any, Any]] | None:
        """What there is to await until *slot* is given back, or ``None``."""
        core = self._core
        if not slot.of(core):
            if slot.forget():
                leave_alone(slot)  # taken before a fork; what a loop left behind has been forgotten before
            return None
        now = slot.since
        if self._leak_after is not None:
            self._returned(slot, now)
        if discard or core.closed or now >= slot.expires:
            return functools.partial(self._retire, slot)
        if self._reset is None:
            self._retire_all(core.put(slot))
            return None
        return functools.partial(self._clean, slot)

    async def _clean(self, slot: Slot[R]) -> None:
        """Reset what *slot* holds and put it back."""
        assert self._reset is not None
        try:
            done = self._reset(slot.resource)
            if inspect.isawaitable(done):
                await Shield().run(done, "reset", GRACE)  # not `asyncio.timeout`: it may suppress its cancellation
        except BaseException as error:
            if isinstance(error, Exception):
                self._failed("reset", error)
            await self._retire(slot)
            if isinstance(error, Exception):
                return
            raise
        slot.since = self._timer()
        self._retire_all(self._core.put(slot))

    async def _retire(self, slot: Slot[R]) -> Exception | None:
        """Close what *slot* holds, if anything, and free the room; returns what closing raised."""
        try:
            return None if slot.resource is VACANT else await self._release(slot.resource)
        finally:
            self._vacate(slot)

    def _retire_all(self, slots: Iterable[Slot[R]]) -> None:
        for slot in slots:
            if not self._spawn_anywhere(functools.partial(self._retire, slot)):
                self._vacate(slot)  # its loop is gone, and nothing can close it: it is forgotten

    async def _retire_here(self, slots: Iterable[Slot[R]]) -> list[Exception]:
        """Close what *slots* hold, all at once; returns what that raised."""
        self._move_in()
        tasks = [self._spawn(functools.partial(self._retire, slot)) for slot in slots]
        if not tasks:
            return []
        shield = Shield()
        with contextlib.suppress(TimeoutError):  # cancelled, and the grace is over
            await shield.run(asyncio.wait(tasks), "closing")
        shield.deliver()
        return [error for task in tasks if (error := task.result()) is not None]

    async def _release(self, resource: R) -> Exception | None:
        try:
            release = self._find_closer(resource, prefer_async=True)
            if release is None:
                return None
            done = release()
            if inspect.isawaitable(done):
                await Shield().run(done, "close", GRACE)
        except Exception as error:
            self._failed("close", error)
            return error
        return None

    def _spawn(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
        """Run *function* in a task of the pool's loop, which is this thread's."""
        task = asyncio.get_running_loop().create_task(function())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _spawn_anywhere(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> bool:
        """Run *function* on the pool's loop, from any thread; ``False`` if that loop is gone."""
        home = self._home
        if home is None or home.is_closed():
            return False
        if home is running_loop():
            self._spawn(function)
            return True
        try:
            home.call_soon_threadsafe(self._spawn, function)
        except RuntimeError:  # closed right now
            return False
        return True

    def _visit_idle(self) -> float | None:
        due = self._due_idle()
        self._retire_all(due)
        return self._next_idle()

    def _visit_lost(self) -> float | None:
        self._retire_all(self._due_lost())
        return None


class managed_pool(Generic[R]):  # noqa: N801, it is used as a function
    """
    A pool that is closed at the end of its block.

    ``with managed_pool(connect, max_size=5) as pool`` gives a `Pool`, ``async with`` an `AsyncPool`. Takes what they
    take.
    """

    @overload
    def __init__(self, open: Callable[[], Awaitable[R]], **options: Any) -> None: ...
    @overload
    def __init__(self, open: Callable[[], R], **options: Any) -> None: ...
    def __init__(self, open: Callable[[], Any], **options: Any) -> None:  # noqa: A002
        refuse_unknown("managed_pool", options, keywords_of(AsyncPool.__init__))  # which takes what a `Pool` does
        self._open = open
        self._options = options
        self._pool: Pool[R] | AsyncPool[R] | None = None

    def __enter__(self) -> Pool[R]:
        self._pool = pool = Pool[R](self._open, **self._options)
        return pool.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        assert isinstance(self._pool, Pool)
        self._pool.close()

    async def __aenter__(self) -> AsyncPool[R]:
        self._pool = pool = AsyncPool[R](self._open, **self._options)
        return await pool.__aenter__()

    async def __aexit__(self, *exc_info: object) -> None:
        assert isinstance(self._pool, AsyncPool)
        await self._pool.aclose()


class _AsyncTicket(Ticket[R]):
    """A task that waits."""

    __slots__ = ("_future", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[bool] = loop.create_future()
        # Not a method: a ticket in a cycle would keep what it was granted too late until a collection.
        super().__init__(functools.partial(_wake, loop, self._future))

    def _expire(self, give_up: Callable[[], bool]) -> None:
        if give_up():
            _decide(self._future, decided=False)

    async def decided(self, limit: float | None, give_up: Callable[[], bool]) -> bool:
        """
        Wait until it is woken; ``False`` if *limit* seconds have passed and it could still give up.

        There is one future and one decision about it, so a timeout in the tick of the hand-off is either of the two,
        never both. (``asyncio.wait_for`` of Python 3.11 may lose a cancellation in that tick.)
        """
        if limit is None:
            return await self._future
        timer = self._loop.call_later(limit, self._expire, give_up)
        try:
            return await self._future
        finally:
            timer.cancel()


def _wake(loop: asyncio.AbstractEventLoop, future: asyncio.Future[bool]) -> None:
    if running_loop() is loop:
        _decide(future, decided=True)
    else:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(functools.partial(_decide, future, decided=True))


def _decide(future: asyncio.Future[bool], *, decided: bool) -> None:
    if not future.done():
        future.set_result(decided)


class _Duty:
    """
    One thing that the janitor does for a pool now and then.

    The janitor holds it weakly, and it holds the pool weakly: neither keeps a pool alive.
    """

    __slots__ = ("__weakref__", "_free", "_manual", "_method", "_pool")

    def __init__(self, pool: _Pool[Any], method: str, *, manual: bool) -> None:
        self._pool = weakref.ref(pool)
        self._method = method
        self._manual = manual
        self._free = deque([None])  # who takes it out schedules the visit: never two at once

    def due_in(self, delay: float) -> None:
        """See to it in *delay* seconds, unless a visit is scheduled already. Safe in finalizers."""
        if self._manual:
            return
        try:
            self._free.pop()
        except IndexError:
            return
        # No thread can be started while the interpreter goes down; then `shutdown` closes what there is.
        with contextlib.suppress(RuntimeError):
            janitor.watch(self, delay)

    def _visit(self) -> float | None:
        pool = self._pool()
        if pool is None:
            return None
        visit = getattr(pool, self._method)
        delay: float | None = visit()
        if delay is not None:
            return delay
        self._free.append(None)
        delay = visit()  # something may have come while we still seemed to be scheduled
        if delay is not None:
            try:
                self._free.pop()
            except IndexError:
                return None  # its sender has scheduled a visit
        return delay


def _nothing() -> None:
    """What is told where nobody has to be."""


def _check_sizes(max_size: object, min_size: object) -> None:
    if not _is_number(max_size, 1):
        raise ValueError(f"max_size must be a number of resources, at least 1; found {max_size!r}")
    if not _is_number(min_size, 0) or cast("int", min_size) > cast("int", max_size):
        raise ValueError(f"min_size must be from 0 to max_size ({max_size}); found {min_size!r}")


def _is_number(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _wait(timeout: Duration) -> float:
    """Seconds to wait, where 0 is not at all."""
    return 0.0 if timeout == 0 else seconds(timeout, "timeout")


def _who() -> str:
    loop = running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    return f"thread {threading.current_thread().name!r}" if task is None else f"task {task.get_name()!r}"


def _frames() -> tuple[tuple[Any, int], ...]:
    """The callers of this module, raw: to format a stack costs a hundred times what it costs to walk it."""
    frame = sys._getframe(1)
    here = frame.f_globals
    while frame.f_globals is here and frame.f_back is not None:
        frame = frame.f_back
    frames: list[tuple[Any, int]] = []
    walker: FrameType | None = frame
    while walker is not None and len(frames) < _DEPTH:
        frames.append((walker.f_code, walker.f_lasti))
        walker = walker.f_back
    return tuple(frames)


def _line(code: Any, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return int(line)
    return int(code.co_firstlineno)


def _place(code: Any, offset: int) -> str:
    return f"{code.co_filename}:{_line(code, offset)} in {code.co_name}"


def _format(frames: Iterable[tuple[Any, int]]) -> str:
    """Raw frames as a traceback shows them, innermost last."""
    summaries = []
    for code, offset in frames:
        summaries.append(traceback.FrameSummary(code.co_filename, _line(code, offset), code.co_name))
    return "".join(traceback.StackSummary.from_list(reversed(summaries)).format())
