"""Pools beside what people use today: what an acquisition costs alone, and how long it takes in a crowd.

Nothing is connected to anything: the connections are stubs that do nothing, and every pool is as it is by default, but
for its size. What is left is the pool. Some do more than others with a connection that comes back (a rollback, a
commit, a reset); so ours is measured with a ``reset`` and with ``leak_after``, too.

One thread's times are its own processor time, as for registries; waits and the times of four threads are the clock's,
and a busy machine is in them: it stops a thread in the middle of anything, while others wait for it. What is quoted is
the median over the rounds of the longest wait in a round; for ours the lower quartile, too, since a wait that is the
pool's own comes back in every round.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import itertools
import queue
import statistics
import threading
import time
from collections import deque
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from benchmarks.contenders import own
from benchmarks.registries import THREADS, Report, Row, Series, interleave, measure, ratio
from hygiene.pool import AsyncPool, Pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

__all__ = ["ABSENT", "ASYNC", "FULL", "QUICK", "SYNC", "Contender", "Sizes", "run"]

ABSENT: dict[str, str] = {}  # what cannot be imported here, and why
BARE = "bare hand-off"
OURS, OURS_ASYNC = "Pool", "AsyncPool"
SQLALCHEMY, PSYCOPG, PSYCOPG_ASYNC = "SQLAlchemy QueuePool", "psycopg_pool", "psycopg_pool, async"
SIZE = 10  # connections, where nobody waits or a crowd does
FEW = 2  # and where four threads want them
LONGEST_WAIT = 1000.0  # microseconds
SETTLING = 0.02  # seconds until four threads have got as far as waiting, on a busy machine
BLOCK = bytes(64 * 1024)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; numbers of rounds, operations, tasks, and seconds."""

    rounds: int = 51
    operations: int = 1_000  # a round takes ten milliseconds at most
    contended_rounds: int = 15
    contended: float = 0.1
    tasks: int = 1_000
    acquisitions: int = 5  # of each task
    crowd_rounds: int = 5


FULL = Sizes()
QUICK = Sizes(rounds=15, operations=300, contended_rounds=5, contended=0.05, crowd_rounds=1)


class Connection:
    """What pools of DB-API connections ask of one. It has no ``ping``: the DB-API knows none."""

    def commit(self) -> None:
        """Nothing was changed."""

    def rollback(self) -> None:
        """Nothing was changed."""

    def close(self) -> None:
        """Nothing is open."""


class AsyncConnection:
    """The same, to be awaited."""

    async def rollback(self) -> None:
        """Nothing was changed."""

    async def close(self) -> None:
        """Nothing is open."""


async def connect() -> AsyncConnection:
    """A connection, at once."""
    return AsyncConnection()


class Ticket:
    """A thread that waits for a resource."""

    __slots__ = ("gate", "resource")

    def __init__(self) -> None:
        self.gate = threading.Lock()
        self.gate.acquire()
        self.resource: Any = None


class HandOff:
    """
    A deque, a lock, and who waits: the least that is fair and loses nothing while nothing goes wrong.

    No timeout, no limit of any age, nothing opened or closed, and a release is believed, however often it comes.
    """

    def __init__(self, size: int) -> None:
        self.lock = threading.Lock()
        self.idle: deque[Any] = deque(Connection() for _ in range(size))
        self.waiting: deque[Ticket] = deque()

    def acquire(self) -> Any:
        """A resource."""
        with self.lock:
            if self.idle:
                return self.idle.pop()
            ticket = Ticket()
            self.waiting.append(ticket)
        ticket.gate.acquire()
        return ticket.resource

    def release(self, resource: Any) -> None:
        """Hand *resource* to who waits the longest."""
        with self.lock:
            if self.waiting:
                ticket = self.waiting.popleft()
                ticket.resource = resource
                ticket.gate.release()
            else:
                self.idle.append(resource)

    def borrow(self) -> Borrowed:
        """For a ``with`` statement."""
        return Borrowed(self)


class Borrowed:
    """A resource of a `HandOff`, for a block; both methods spelled out again, since a call would be the most of it."""

    __slots__ = ("pool", "resource")

    def __init__(self, pool: HandOff) -> None:
        self.pool = pool

    def __enter__(self) -> Any:
        pool = self.pool
        with pool.lock:
            if pool.idle:
                resource = self.resource = pool.idle.pop()
                return resource
            ticket = Ticket()
            pool.waiting.append(ticket)
        ticket.gate.acquire()
        self.resource = ticket.resource
        return self.resource

    def __exit__(self, *exc_info: object) -> None:
        pool = self.pool
        with pool.lock:
            if pool.waiting:
                ticket = pool.waiting.popleft()
                ticket.resource = self.resource
                ticket.gate.release()
            else:
                pool.idle.append(self.resource)


class AsyncHandOff:
    """A deque of resources and one of futures: `HandOff` for tasks. A task that is cancelled in time is skipped."""

    def __init__(self, size: int) -> None:
        self.idle: deque[Any] = deque(AsyncConnection() for _ in range(size))
        self.waiting: deque[asyncio.Future[Any]] = deque()

    async def acquire(self) -> Any:
        """A resource."""
        if self.idle:
            return self.idle.pop()
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        return await future

    def release(self, resource: Any) -> None:
        """Hand *resource* to who waits the longest."""
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                future.set_result(resource)
                return
        self.idle.append(resource)

    def borrow(self) -> AsyncBorrowed:
        """For an ``async with`` statement."""
        return AsyncBorrowed(self)


class AsyncBorrowed:
    """A resource of an `AsyncHandOff`, for a block."""

    __slots__ = ("pool", "resource")

    def __init__(self, pool: AsyncHandOff) -> None:
        self.pool = pool

    async def __aenter__(self) -> Any:
        pool = self.pool
        if pool.idle:
            resource = self.resource = pool.idle.pop()
            return resource
        future = asyncio.get_running_loop().create_future()
        pool.waiting.append(future)
        self.resource = await future
        return self.resource

    async def __aexit__(self, *exc_info: object) -> None:
        self.pool.release(self.resource)


class Queued:
    """The pool that people write on a ``queue.Queue``."""

    def __init__(self, size: int) -> None:
        self.queue: queue.Queue[Any] = queue.Queue()
        for _ in range(size):
            self.queue.put(Connection())
        self.get = partial(self.queue.get, timeout=30)
        self.put = self.queue.put

    @contextmanager
    def acquire(self) -> Iterator[Any]:
        """A resource, for a block."""
        resource = self.queue.get(timeout=30)
        try:
            yield resource
        finally:
            self.queue.put(resource)


class AsyncQueued:
    """The pool that people write on an ``asyncio.Queue``."""

    def __init__(self, size: int) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        for _ in range(size):
            self.queue.put_nowait(AsyncConnection())
        self.get, self.put = self.queue.get, self.queue.put

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        """A resource, for a block."""
        resource = await self.queue.get()
        try:
            yield resource
        finally:
            await self.queue.put(resource)


class Limited:
    """The pool that people write on a deque and something that lets no more than so many in."""

    def __init__(self, size: int, limiter: Any) -> None:
        self.limiter = limiter
        self.idle: deque[Any] = deque(AsyncConnection() for _ in range(size))

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        """A resource, for a block."""
        async with self.limiter:
            resource = self.idle.pop()
            try:
                yield resource
            finally:
                self.idle.append(resource)


# The loops: what users write. The turns of each contender run a copy of their own, see `own`.


def with_acquire(pool: Any, times: Iterable[int]) -> None:
    """``with pool.acquire()``."""
    for _ in times:
        with pool.acquire():
            pass


def with_borrow(pool: Any, times: Iterable[int]) -> None:
    """``with pool.borrow()``."""
    for _ in times:
        with pool.borrow():
            pass


def with_connect(pool: Any, times: Iterable[int]) -> None:
    """``with pool.connect()``."""
    for _ in times:
        with pool.connect():
            pass


def with_connection(pool: Any, times: Iterable[int]) -> None:
    """``with pool.connection()``."""
    for _ in times:
        with pool.connection():
            pass


def lease_release(pool: Any, times: Iterable[int]) -> None:
    """``lease()`` and ``release()``."""
    for _ in times:
        lease = pool.lease()
        lease.release()


def acquire_release(pool: Any, times: Iterable[int]) -> None:
    """``acquire()`` and ``release(resource)``."""
    for _ in times:
        resource = pool.acquire()
        pool.release(resource)


def connect_close(pool: Any, times: Iterable[int]) -> None:
    """``connect()`` and ``close()``."""
    for _ in times:
        connection = pool.connect()
        connection.close()


def connection_close(pool: Any, times: Iterable[int]) -> None:
    """``connection()`` and ``close()``."""
    for _ in times:
        connection = pool.connection()
        connection.close()


def getconn_putconn(pool: Any, times: Iterable[int]) -> None:
    """``getconn()`` and ``putconn(connection)``."""
    for _ in times:
        connection = pool.getconn()
        pool.putconn(connection)


def get_put(pool: Any, times: Iterable[int]) -> None:
    """``get()`` and ``put(resource)``."""
    for _ in times:
        resource = pool.get()
        pool.put(resource)


async def async_with_acquire(pool: Any, times: Iterable[int]) -> None:
    """``async with pool.acquire()``."""
    for _ in times:
        async with pool.acquire():
            pass


async def async_with_borrow(pool: Any, times: Iterable[int]) -> None:
    """``async with pool.borrow()``."""
    for _ in times:
        async with pool.borrow():
            pass


async def async_with_connection(pool: Any, times: Iterable[int]) -> None:
    """``async with pool.connection()``."""
    for _ in times:
        async with pool.connection():
            pass


async def async_lease_release(pool: Any, times: Iterable[int]) -> None:
    """``await lease()`` and ``release()``."""
    for _ in times:
        lease = await pool.lease()
        lease.release()


async def async_acquire_release(pool: Any, times: Iterable[int]) -> None:
    """``await acquire()`` and ``release(resource)``."""
    for _ in times:
        resource = await pool.acquire()
        pool.release(resource)


async def async_acquire_await_release(pool: Any, times: Iterable[int]) -> None:
    """``await acquire()`` and ``await release(resource)``."""
    for _ in times:
        resource = await pool.acquire()
        await pool.release(resource)


async def async_getconn_putconn(pool: Any, times: Iterable[int]) -> None:
    """``await getconn()`` and ``await putconn(connection)``."""
    for _ in times:
        connection = await pool.getconn()
        await pool.putconn(connection)


async def async_get_put(pool: Any, times: Iterable[int]) -> None:
    """``await get()`` and ``await put(resource)``."""
    for _ in times:
        resource = await pool.get()
        await pool.put(resource)


@dataclass(frozen=True, slots=True)
class Contender:
    """
    One way to share resources.

    Args:
        make: Takes how many there are, returns the pool; asynchronous for tasks.
        block: The loop that takes and gives back with a ``with`` statement.
        pair: The loop that does it with two calls; ``None`` where nobody writes that.
        enter: The name of the method that is in *block*.
        close: Closes the pool; asynchronous for tasks.
    """

    make: Callable[[int], Any]
    block: Callable[..., Any]
    pair: Callable[..., Any] | None
    enter: str = "acquire"
    close: Callable[[Any], Any] | None = None


def _pool(**options: Any) -> Contender:
    return Contender(
        lambda size: Pool(Connection, max_size=size, **options), with_acquire, lease_release, close=Pool.close
    )


def _async_pool(**options: Any) -> Contender:
    async def make(size: int) -> AsyncPool[AsyncConnection]:
        return AsyncPool(connect, max_size=size, **options)

    return Contender(make, async_with_acquire, async_lease_release, close=AsyncPool.aclose)


def _in_loop(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """*make*, called on the loop: what it makes may belong to one."""

    async def made(size: int) -> Any:
        return make(size)

    return made


def _sqlalchemy() -> dict[str, Contender]:
    module = importlib.import_module("sqlalchemy.pool")

    def make(size: int) -> Any:
        return module.QueuePool(Connection, pool_size=size, max_overflow=0)

    return {SQLALCHEMY: Contender(make, with_connect, connect_close, "connect", lambda pool: pool.dispose())}


def _dbutils() -> dict[str, Contender]:
    module = importlib.import_module("dbutils.pooled_db")
    errors = {name: type(name, (Exception,), {}) for name in ("OperationalError", "InterfaceError", "InternalError")}
    dbapi = SimpleNamespace(connect=Connection, threadsafety=1, **errors)

    def make(size: int) -> Any:
        return module.PooledDB(dbapi, maxconnections=size, maxcached=size, blocking=True)

    return {
        "DBUtils PooledDB": Contender(make, with_connection, connection_close, "connection", lambda pool: pool.close())
    }


class _Psycopg:
    """What psycopg's pools look at in a connection, and what its ``with`` does, to no end."""

    closed = False
    autocommit = False
    pgconn: Any  # says that it is idle
    _pool: Any = None

    def __init__(self) -> None:
        self.pgconn = SimpleNamespace(transaction_status=importlib.import_module("psycopg.pq").TransactionStatus.IDLE)


class PsycopgConnection(_Psycopg):
    """For threads."""

    @classmethod
    def connect(cls, *_: object, **__: object) -> Self:
        """A connection, at once."""
        return cls()

    def commit(self) -> None:
        """Nothing was changed."""

    def rollback(self) -> None:
        """Nothing was changed."""

    def close(self) -> None:
        """Nothing is open."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.closed:
            return
        if kind:
            self.rollback()
        else:
            self.commit()
        if not getattr(self, "_pool", None):
            self.close()


class AsyncPsycopgConnection(_Psycopg):
    """For tasks."""

    @classmethod
    async def connect(cls, *_: object, **__: object) -> Self:
        """A connection, at once."""
        return cls()

    async def commit(self) -> None:
        """Nothing was changed."""

    async def rollback(self) -> None:
        """Nothing was changed."""

    async def close(self) -> None:
        """Nothing is open."""
        self.closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        if self.closed:
            return
        if kind:
            await self.rollback()
        else:
            await self.commit()
        if not getattr(self, "_pool", None):
            await self.close()


def _psycopg() -> dict[str, Contender]:
    importlib.import_module("psycopg")  # without libpq this is what fails
    module = importlib.import_module("psycopg_pool")

    def make(size: int) -> Any:
        pool = module.ConnectionPool(connection_class=PsycopgConnection, min_size=size, max_size=size, open=False)
        pool.open(wait=True)
        return pool

    return {PSYCOPG: Contender(make, with_connection, getconn_putconn, "connection", lambda pool: pool.close())}


def _psycopg_async() -> dict[str, Contender]:
    importlib.import_module("psycopg")
    module = importlib.import_module("psycopg_pool")

    async def make(size: int) -> Any:
        kind = AsyncPsycopgConnection
        pool = module.AsyncConnectionPool(connection_class=kind, min_size=size, max_size=size, open=False)
        await pool.open(wait=True)
        return pool

    return {
        PSYCOPG_ASYNC: Contender(
            make, async_with_connection, async_getconn_putconn, "connection", lambda pool: pool.close()
        )
    }


class AsyncpgProtocol:
    """A server's side of an asyncpg connection: there, idle, and never busy."""

    queries_count = 0

    def __init__(self) -> None:
        self.connected = True

    def get_settings(self) -> Any:
        """What the server said of itself when it was connected to."""
        return SimpleNamespace(server_version="17.0")

    def is_connected(self) -> bool:
        """Until it is closed."""
        return self.connected

    def is_in_transaction(self) -> bool:
        """No."""
        return False

    def _is_cancelling(self) -> bool:
        return False

    async def close(self, _: float | None) -> None:
        """Nothing has to be said."""
        self.connected = False

    def abort(self) -> None:
        """Nothing has to be said."""
        self.connected = False


def _asyncpg() -> dict[str, Contender]:
    module: Any = importlib.import_module("asyncpg")

    class Stub(module.Connection):  # type: ignore[misc] # a class that is known only where it is installed
        """A connection of asyncpg's own, reset and all, but that no query is sent."""

        async def execute(self, *_: object, **__: object) -> str:
            """Done."""
            return ""

    config = SimpleNamespace(statement_cache_size=100, max_cached_statement_lifetime=300, command_timeout=None)

    async def connected(*_: object, loop: asyncio.AbstractEventLoop, **__: object) -> Stub:
        protocol = AsyncpgProtocol()
        return Stub(protocol, protocol, loop, ("nowhere", 0), config, SimpleNamespace())

    async def make(size: int) -> Any:
        return await module.create_pool(connect=connected, connection_class=Stub, min_size=size, max_size=size)

    return {
        "asyncpg": Contender(make, async_with_acquire, async_acquire_await_release, close=lambda pool: pool.close())
    }


def _anyio() -> dict[str, Contender]:
    module = importlib.import_module("anyio")
    make = _in_loop(lambda size: Limited(size, module.CapacityLimiter(size)))
    return {"anyio CapacityLimiter + deque": Contender(make, async_with_acquire, None)}


def _try(contenders: Callable[[], dict[str, Contender]], name: str, trial: Callable[[Contender], object]) -> Any:
    """*contenders*, unless they cannot be had or do not get through *trial*."""
    try:
        found = contenders()
        for contender in found.values():
            trial(contender)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one of them, the others are measured
        ABSENT[name] = f"{type(error).__name__}: {error}"
        return {}
    return found


def _trial(contender: Contender) -> None:
    """Take and give back once, each way: a release that no longer fits its stub shows here."""
    with opened({"": contender}, 1) as pools:
        for loop in filter(None, (contender.block, contender.pair)):
            loop(pools[""], range(1))


def _async_trial(contender: Contender) -> None:
    with asyncio.Runner() as runner, opened_on(runner.get_loop(), {"": contender}, 1) as pools:
        for loop in filter(None, (contender.block, contender.pair)):
            runner.run(loop(pools[""], range(1)))


@contextmanager
def opened(contenders: dict[str, Contender], size: int) -> Iterator[dict[str, Any]]:
    """A pool of each, with all of its resources open, closed at the end."""
    with ExitStack() as stack:
        pools: dict[str, Any] = {}
        for name, contender in contenders.items():
            pools[name] = pool = contender.make(size)
            if contender.close is not None:
                stack.callback(contender.close, pool)
            with ExitStack() as all_of_them:
                for _ in range(size):
                    all_of_them.enter_context(getattr(pool, contender.enter)())
        yield pools


@contextmanager
def opened_on(loop: asyncio.AbstractEventLoop, contenders: dict[str, Contender], size: int) -> Iterator[dict[str, Any]]:
    """`opened` for tasks of *loop*."""

    async def all_of_them(enter: Callable[[], Any]) -> None:
        everybody = asyncio.Barrier(size)

        async def hold() -> None:
            async with enter():
                await everybody.wait()

        await asyncio.gather(*(hold() for _ in range(size)))  # a task may have one token of a CapacityLimiter, not two

    with ExitStack() as stack:
        pools: dict[str, Any] = {}
        for name, contender in contenders.items():
            pools[name] = pool = loop.run_until_complete(contender.make(size))
            if contender.close is not None:
                stack.callback(lambda close, pool: loop.run_until_complete(close(pool)), contender.close, pool)
            loop.run_until_complete(all_of_them(getattr(pool, contender.enter)))
        yield pools


LEAK_AFTER = 60.0  # seconds; nothing is held for that long here

SYNC: dict[str, Contender] = {
    BARE: Contender(HandOff, with_borrow, acquire_release, "borrow"),
    OURS: _pool(),
    "Pool(reset)": _pool(reset=Connection.rollback),
    "Pool(leak_after)": _pool(leak_after=LEAK_AFTER),
    "queue.Queue by hand": Contender(Queued, with_acquire, get_put),
    **_try(_sqlalchemy, "SQLAlchemy", _trial),
    **_try(_psycopg, "psycopg_pool", _trial),
    **_try(_dbutils, "DBUtils", _trial),
}
ASYNC: dict[str, Contender] = {
    BARE: Contender(_in_loop(AsyncHandOff), async_with_borrow, async_acquire_release, "borrow"),
    OURS_ASYNC: _async_pool(),
    "AsyncPool(reset)": _async_pool(reset=AsyncConnection.rollback),
    "AsyncPool(leak_after)": _async_pool(leak_after=LEAK_AFTER),
    "asyncio.Queue by hand": Contender(_in_loop(AsyncQueued), async_with_acquire, async_get_put),
    "asyncio.Semaphore + deque": Contender(
        _in_loop(lambda size: Limited(size, asyncio.Semaphore(size))), async_with_acquire, None
    ),
    **_try(_psycopg_async, "psycopg_pool", _async_trial),
    **_try(_asyncpg, "asyncpg", _async_trial),
    **_try(_anyio, "anyio", _async_trial),
}


def run(sizes: Sizes, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything; *progress* is told what comes next."""
    return measure([alone, alone_async, threads, tasks], sizes, Report(absent=dict(ABSENT), base=BARE), progress)


def against(series: Series, ours: str, theirs: str, what: str, limit: float | None = None) -> Row:
    """One line of comparison; without a value where one of the two is absent."""
    if ours not in series or theirs not in series:
        return Row(what, None, "x", limit, note="not all of it is installed")
    return Row(what, ratio(series, ours, theirs), "x", limit)


def turns_of(
    contenders: dict[str, Contender], pools: dict[str, Any], kind: str, call: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """By contender, its loop (*kind*: ``"block"`` or ``"pair"``) over its pool."""
    found: dict[str, Callable[..., Any]] = {}
    for name, contender in contenders.items():
        loop = getattr(contender, kind)
        if loop is not None:
            found[name] = partial(call, own(loop), pools[name])
    return found


def alone(sizes: Sizes, report: Report) -> None:
    """Acquire and release, one thread."""
    count = sizes.operations
    passes = itertools.repeat((range(count),)).__next__
    with opened(SYNC, SIZE) as pools:
        found = {
            kind: interleave(
                turns_of(SYNC, pools, kind, lambda loop, pool, times: loop(pool, times)), passes, sizes.rounds, count
            )
            for kind in ("pair", "block")
        }
    report.note_times("acquire and release", found["pair"])
    report.note_times("with", found["block"])
    for kind, ours in (("pair", "lease() and release()"), ("block", "with")):
        series = found[kind]
        report.rows += [
            against(series, OURS, SQLALCHEMY, f"{ours}, against {SQLALCHEMY}", 0.3),
            against(series, "Pool(reset)", SQLALCHEMY, "- with a reset that rolls back, as it does"),
            against(series, OURS, BARE, f"{ours}, against a bare deque-and-lock hand-off", 1.3),
            against(series, OURS, PSYCOPG, f"{ours}, against {PSYCOPG}"),
        ]


def alone_async(sizes: Sizes, report: Report) -> None:
    """Acquire and release, one task."""
    count = sizes.operations
    passes = itertools.repeat((range(count),)).__next__
    with asyncio.Runner() as runner:
        loop = runner.get_loop()

        def call(coroutine: Callable[..., Any], pool: Any, times: Iterable[int]) -> None:
            loop.run_until_complete(coroutine(pool, times))

        with opened_on(loop, ASYNC, SIZE) as pools:
            found = {
                kind: interleave(turns_of(ASYNC, pools, kind, call), passes, sizes.rounds, count)
                for kind in ("pair", "block")
            }
    report.note_times("async: acquire and release", found["pair"])
    report.note_times("async with", found["block"])
    for kind, ours in (("pair", "await lease() and release()"), ("block", "async with")):
        series = found[kind]
        report.rows += [
            against(series, OURS_ASYNC, PSYCOPG_ASYNC, f"{ours}, against {PSYCOPG}", 0.25),
            against(series, OURS_ASYNC, BARE, f"{ours}, against a bare hand-off of futures"),
            against(series, OURS_ASYNC, "asyncio.Queue by hand", f"{ours}, against asyncio.Queue"),
        ]


def count_up() -> None:
    """A moment's work that keeps the interpreter's lock."""
    sum(range(50))


def digest() -> None:
    """Work that lets go of the interpreter's lock, as reading from a socket does."""
    hashlib.sha256(BLOCK).digest()


class Crowded(RuntimeError):
    """More hold a resource than there are."""


def contend(
    enter: Callable[[], Any], work: Callable[[], None], inside: list[None], span: list[int], waits: list[int]
) -> None:
    """Acquire again and again, and keep the nanoseconds that each took; *span* has begun when the first is served."""
    clock = time.perf_counter_ns
    start = end = 0
    while start <= end:
        with enter():
            served = clock()
            inside.append(None)
            if len(inside) > FEW:
                raise Crowded(f"{len(inside)} hold {FEW} resources")
            waits.append(served - (start or span[0]))
            work()
            inside.pop()
        end = span[1]
        start = clock()


def contended(
    loop: Callable[..., None], enter: Callable[[], Any], work: Callable[[], None], lasts: float
) -> tuple[float, list[int]]:
    """
    Nanoseconds an acquisition, of all threads together, and how long each waited.

    All threads wait already when the first resource comes free. Otherwise the first to start would have the pool for
    itself until the interpreter switches threads by force, in the middle of anything: milliseconds of whatever it is
    then doing, which are none of the pool's.

    Raises:
        Exception: what went wrong in one of the threads.
    """
    inside: list[None] = []
    waits: list[list[int]] = [[] for _ in range(THREADS)]
    errors: list[Exception] = []
    span: list[int] = []

    def thread(own_waits: list[int]) -> None:
        try:
            loop(enter, work, inside, span, own_waits)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            errors.append(error)

    workers = [threading.Thread(target=thread, args=(own_waits,), daemon=True) for own_waits in waits]
    with ExitStack() as all_of_them:
        for _ in range(FEW):
            all_of_them.enter_context(enter())
            inside.append(None)
            all_of_them.callback(inside.pop)
        for worker in workers:
            worker.start()
        time.sleep(SETTLING)
        began = time.perf_counter_ns()
        span += [began, began + int(lasts * 1e9)]
    for worker in workers:
        worker.join(60)
    took = time.perf_counter_ns() - began
    if errors:
        raise errors[0]
    if any(worker.is_alive() for worker in workers):
        raise TimeoutError("somebody waits for ever")
    together = sorted(itertools.chain.from_iterable(waits))
    return took / len(together), together


def permille(values: Sequence[int]) -> int:
    """Of sorted *values*, the one that at least 99.9 % are not above."""
    return values[-(-len(values) * 999 // 1000) - 1]


def threads(sizes: Sizes, report: Report) -> None:
    """Four threads want two resources, and want them again at once."""
    works = {"a moment each": count_up, "64 KiB hashed each": digest}
    for what, work in works.items():
        series: Series = {name: [] for name in SYNC}
        longest: dict[str, list[int]] = {name: [] for name in SYNC}
        within: dict[str, list[int]] = {name: [] for name in SYNC}
        wrong: dict[str, str] = {}
        names = list(SYNC)
        with opened(SYNC, FEW) as pools:
            loops = {name: own(contend) for name in names}
            for number in range(sizes.contended_rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    if name in wrong:
                        continue
                    try:
                        enter = getattr(pools[name], SYNC[name].enter)
                        took, waits = contended(loops[name], enter, work, sizes.contended)
                    except Exception as error:  # noqa: BLE001 - it is out, and the row says why
                        wrong[name] = f"wrong: {error!r}"
                        continue
                    series[name].append(took)
                    longest[name].append(waits[-1])
                    within[name].append(permille(waits))
        label = f"{THREADS} threads on {FEW} resources, {what}"
        right = {name: values for name, values in series.items() if name not in wrong}
        report.note_times(label, right)
        for name in names:
            row = f"{name}: longest wait, {label}"
            limit = LONGEST_WAIT if name == OURS else None
            if name in wrong:
                report.rows.append(Row(row, None, "us", limit, note=wrong[name]))
                continue
            rounds = sorted(longest[name])
            report.rows.append(
                Row(
                    row,
                    statistics.median(rounds) / 1000,
                    "us",
                    limit,
                    note=f"{rounds[0] / 1000:,.0f} to {rounds[-1] / 1000:,.0f} in {len(rounds)} rounds; "
                    f"99.9 % within {statistics.median(within[name]) / 1000:,.0f}; "
                    f"{1e9 / statistics.median(series[name]):,.0f} acquisitions a second",
                )
            )
            if name == OURS:
                calm = "lower quartile of the rounds: what else runs on the machine stops threads, too"
                report.rows.append(
                    Row("- in the calmer rounds", rounds[len(rounds) // 4] / 1000, "us", limit, note=calm)
                )


async def visit(enter: Callable[[], Any], times: int, waits: list[int], inside: list[None]) -> None:
    """One task of many: acquire, let the others run, and again."""
    clock = time.perf_counter_ns
    for _ in range(times):
        start = clock()
        async with enter():
            waits.append(clock() - start)
            inside.append(None)
            if len(inside) > SIZE:
                raise Crowded(f"{len(inside)} hold {SIZE} resources")
            await asyncio.sleep(0)
            inside.pop()


def tasks(sizes: Sizes, report: Report) -> None:
    """A thousand tasks want ten resources."""
    label = f"{sizes.tasks:,} tasks on {SIZE} resources"
    waits: dict[str, list[int]] = {name: [] for name in ASYNC}
    longest: dict[str, list[int]] = {name: [] for name in ASYNC}
    with asyncio.Runner() as runner:
        loop = runner.get_loop()

        async def crowd(name: str, enter: Callable[[], Any], visitor: Callable[..., Any]) -> None:
            took, inside = waits[name], list[None]()
            took.clear()
            await asyncio.gather(*(visitor(enter, sizes.acquisitions, took, inside) for _ in range(sizes.tasks)))
            longest[name].append(max(took))

        with opened_on(loop, ASYNC, SIZE) as pools:
            enters = {name: getattr(pool, ASYNC[name].enter) for name, pool in pools.items()}
            turns: dict[str, Callable[..., Any]] = {
                name: partial(lambda *given: loop.run_until_complete(crowd(*given)), name, enter, own(visit))
                for name, enter in enters.items()
            }
            count = sizes.tasks * sizes.acquisitions
            series = interleave(turns, tuple, sizes.crowd_rounds, count)
    report.note_times(label, series)
    for name in ASYNC:
        report.rows.append(
            Row(
                f"{name}: {label}, {sizes.acquisitions} times each",
                statistics.median(series[name]) * count / 1e6,
                "ms",
                note=f"longest wait {statistics.median(longest[name]) / 1e6:,.0f} ms",
            )
        )
    report.rows.append(against(series, OURS_ASYNC, PSYCOPG_ASYNC, f"{label}, against {PSYCOPG}"))
