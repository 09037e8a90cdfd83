"""A pool for SQLAlchemy's engines, with the promises of `hygiene.Pool`.

Two pools meet here. SQLAlchemy's keeps what it knows of a connection in a *record*: when it was opened, whether it was
invalidated, who has it. `HygienePool` hands out records, and a `hygiene.Pool` inside decides who gets one, who waits,
and when one is closed. So reset on return, pre-ping, invalidation and the pool events are SQLAlchemy's own code.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable
from typing import Any

import sqlalchemy.pool
from sqlalchemy import exc
from sqlalchemy.pool.base import _ConnectionRecord

from hygiene.errors import PoolClosed, PoolFull, PoolTimeout
from hygiene.events import PoolStats
from hygiene.janitor import leave_alone
from hygiene.pool import Holder, Pool, PoolLease
from hygiene.units import Duration, seconds

__all__ = ["HygienePool"]

_SQLALCHEMY = os.path.dirname(sqlalchemy.__file__) + os.sep  # noqa: PTH120 - compared with the names in code objects


class _Record(_ConnectionRecord):
    """What SQLAlchemy knows of a connection, and the lease under which it is out."""

    __slots__ = ("lease",)

    # Here and not in a dict of the pool: a record that is lost between two lines (an interrupt) takes its lease with
    # it, and so the slot comes back.
    lease: PoolLease[_Record]


class HygienePool(sqlalchemy.pool.Pool):
    """
    A pool of connections for ``create_engine(url, poolclass=HygienePool)``.

    It takes the place of ``QueuePool`` and differs from it in this: a connection that comes back goes straight to the
    thread that has waited longest; one that is not needed is closed after *max_idle*; who holds one for too long is
    reported with the line that took it; a forked child opens its own and leaves those of the parent alone; and
    `shutdown` closes what is idle.

    The arguments are those of ``create_engine``: ``pool_size=``, ``max_overflow=``, ``pool_timeout=``,
    ``pool_recycle=``, ``pool_pre_ping=``, ``pool_use_lifo=``, ``pool_reset_on_return=``, ``pool_events=``,
    ``echo_pool=``, ``pool_logging_name=``, and as they are ``max_waiting=``, ``max_idle=``, ``leak_after=`` and
    ``timer=``.

    For threads, as any engine of ``create_engine`` is. An engine of ``create_async_engine`` refuses it with
    ``sqlalchemy.exc.ArgumentError``: leave ``poolclass`` out there, or use an `AsyncPool` of driver connections.

    A connection that is out while the process is forked belongs to the parent: the child must not use it, nor close it.

    Args:
        creator: Opens a connection; ``create_engine`` passes it.
        pool_size: With *max_overflow*, how many connections may be open at once: ``pool_size + max_overflow``. There
            is no other difference between the two, since what is not needed is closed when it grows old. 5 and 10, as
            ``QueuePool`` has them; 0 (no bound) is refused.
        max_overflow: See *pool_size*; -1 (no bound) is refused.
        timeout: Seconds (or "30s", a ``timedelta``) that a thread waits for a connection; 0 means not at all.
        use_lifo: Hand out what came back last, so that what is not needed grows old and is closed. Here it is the
            default; ``False`` lets all take turns.
        recycle: Seconds after which a connection is closed instead of being used again, whether or not somebody asks
            for it; up to 5 % less, at random, so that not all are opened anew at once. -1, the default, is never.
        max_waiting: How many threads may wait; the next is refused at once. ``None``: any number.
        max_idle: How long a connection may be idle before it is closed. 10 minutes, as in `Pool`; ``None`` is for ever.
        leak_after: Seconds after which a connection that is still out is reported in the log, with the stack that took
            it; ``None`` records nothing.
        timer: Returns monotonic seconds. Tests pass a `testing.ManualClock`, and call `expire`.
        **options: What every pool of SQLAlchemy takes: ``reset_on_return``, ``pre_ping``, ``events``, ``echo``,
            ``logging_name``.

    Raises:
        ValueError: *pool_size* or *max_overflow* gives no bound, or a number is out of range.

    A thread that gets no connection sees ``sqlalchemy.exc.TimeoutError``, as with ``QueuePool``, so that handlers go
    on working. Its ``__cause__`` is the `PoolTimeout` or `PoolFull` that it stands for, with the numbers. After
    `shutdown` it sees ``sqlalchemy.exc.InvalidRequestError``.
    """

    # As in QueuePool: create_async_engine looks at it, and refuses.
    _is_asyncio = False  # pyright: ignore[reportAssignmentType] # what it says of QueuePool, too

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: Duration | None = 30.0,
        use_lifo: bool = True,  # noqa: FBT001, FBT002 - SQLAlchemy's own signature
        recycle: Duration = -1,
        max_waiting: int | None = None,
        max_idle: Duration | None = 600.0,
        leak_after: Duration | None = None,
        timer: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        _check_bound(pool_size, max_overflow)
        # -1 is SQLAlchemy's word for never, and 0 its word for every time, which the record sees to.
        lifetime = None if isinstance(recycle, (int, float)) and recycle <= 0 else seconds(recycle, "recycle")
        super().__init__(creator, recycle=recycle if lifetime is None else lifetime, **options)  # type: ignore[arg-type]
        self._pool_size = pool_size
        self._own_options = {
            "pool_size": pool_size, "max_overflow": max_overflow, "timeout": timeout, "use_lifo": use_lifo,
            "recycle": recycle, "max_waiting": max_waiting, "max_idle": max_idle, "leak_after": leak_after,
            "timer": timer,
        }  # fmt: skip
        self._disposed = False
        self._records: Pool[_Record] = Pool(
            self._create_connection,
            max_size=pool_size + max_overflow,
            timeout=timeout,
            max_waiting=max_waiting,
            max_idle=max_idle,
            max_lifetime=lifetime,
            close=operator.methodcaller("close"),
            leak_after=leak_after,
            order="lifo" if use_lifo else "fifo",
            name=self._orig_logging_name or f"sqlalchemy {getattr(self._dialect, 'name', 'pool')}",
            timer=timer,
        )

    def _create_connection(self) -> _Record:
        return _Record(self)

    def _do_get(self) -> _Record:
        try:
            lease = self._records.lease()
        except (PoolTimeout, PoolFull) as error:
            raise exc.TimeoutError(str(error), code="3o7r") from error
        except PoolClosed as error:
            raise exc.InvalidRequestError(f"{error}: hygiene.shutdown() has closed it") from error
        record = lease.resource
        record.lease = lease
        slot = lease._slot
        if slot.frames is not None:  # whoever reads them asks for the line that wanted a connection
            slot.frames = _beyond(slot.frames)
        return record

    def _do_return_conn(self, record: Any) -> None:
        lease: PoolLease[_Record] = record.lease
        del record.lease  # or it and the record would hold each other
        if not lease._slot.of(self._records._core):
            # Taken before a fork. To collect it would say goodbye to a server that the parent is still talking to.
            leave_alone(record)
            return
        # A record whose connection was invalidated or detached stays, with its `record_info`, and counts as checked
        # in, as in QueuePool. It opens another connection when it is checked out.
        lease.release(discard=self._disposed)
        if self._disposed:  # meanwhile
            self._close_idle()

    def dispose(self) -> None:
        """
        Close the connections that are idle; those that are out are closed when they come back.

        ``engine.dispose()`` calls it, and goes on with a new pool. Threads that wait here are served here.
        """
        self._disposed = True
        self._close_idle()
        self.logger.info("Pool disposed. %s", self.status())

    def _close_idle(self) -> None:
        records = self._records
        records._retire_all(records._core.surplus(0, lambda _: True))

    def recreate(self) -> HygienePool:
        """A new pool with the same arguments and events."""
        self.logger.info("Pool recreating")
        return type(self)(
            self._creator,
            **self._own_options,  # type: ignore[arg-type] # they are what __init__ was given
            pre_ping=self._pre_ping,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def expire(self) -> int:
        """Close the idle connections whose time is over; returns how many. The janitor does this by itself."""
        return self._records.expire()

    def stats(self) -> PoolStats:
        """The numbers at this moment."""
        return self._records.stats()

    def holders(self) -> tuple[Holder, ...]:
        """Who holds a connection now, the longest first. With *leak_after*, each knows since when and where."""
        return self._records.holders()

    def status(self) -> str:
        """The numbers in words, those of ``QueuePool`` first."""
        stats = self.stats()
        return (
            f"Pool size: {self.size()}  Connections in pool: {stats.idle} Current Overflow: {self.overflow()} "
            f"Current Checked out connections: {stats.in_use} Waiting: {stats.waiting}"
        )

    def size(self) -> int:
        """The *pool_size*; ``stats().max_size`` is the bound."""
        return self._pool_size

    def timeout(self) -> float | None:
        """Seconds that a thread waits for a connection."""
        return self._records._timeout

    def checkedin(self) -> int:
        """Connections that are idle."""
        return self.stats().idle

    def checkedout(self) -> int:
        """Connections that are out."""
        return self.stats().in_use

    def overflow(self) -> int:
        """Open connections beyond *pool_size*; below it, a negative number, as in ``QueuePool``."""
        return self._records._core.open - self._pool_size


def _check_bound(pool_size: object, max_overflow: object) -> None:
    for what, number, least in (("pool_size", pool_size, 1), ("max_overflow", max_overflow, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(
                f"{what} must be a number of connections, {least} or more, since pool_size + max_overflow is the bound "
                f"of a HygienePool; found {number!r}"
            )


def _beyond(frames: tuple[tuple[Any, int], ...]) -> tuple[tuple[Any, int], ...]:
    """*frames* without those between the pool and whoever wants a connection; what SQLAlchemy generates has no file."""
    begin = 0
    for place, (code, _) in enumerate(frames, 1):
        name = code.co_filename
        if name == __file__ or name.startswith(_SQLALCHEMY):
            begin = place
        elif not name.startswith("<"):
            break
    return frames[begin:] or frames  # what is recorded may end before SQLAlchemy does
