"""`HygienePool` under an engine of SQLAlchemy, on SQLite in a file."""

from __future__ import annotations

import gc
import logging
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc, orm

from hygiene.cleanup import shutdown
from hygiene.errors import PoolClosed, PoolFull, PoolTimeout
from hygiene.integrations.sqlalchemy import HygienePool, _beyond
from hygiene.testing import ManualClock

LIMIT = 30.0


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'data.db'}"


@pytest.fixture
def make(url: str) -> Iterator[Callable[..., sa.Engine]]:
    """Makes engines, with a table of items; all are disposed of at the end."""
    engines: list[sa.Engine] = []

    def make(**options: Any) -> sa.Engine:
        engine = sa.create_engine(url, poolclass=HygienePool, **options)
        engines.append(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql("create table if not exists items (name text)")
        return engine

    yield make
    for engine in engines:
        engine.dispose()


def pool_of(engine: sa.Engine) -> HygienePool:
    assert isinstance(engine.pool, HygienePool)
    return engine.pool


def names(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.scalars(sa.text("select name from items")))


def insert(connection: sa.Connection, name: str) -> None:
    connection.execute(sa.text("insert into items values (:name)"), {"name": name})


def raw(connection: sa.Connection) -> Any:
    """The driver's connection."""
    return connection.connection.driver_connection


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0)


class Asking:
    """A thread that asks *engine* for a connection and keeps it until it is told to let go."""

    def __init__(self, engine: sa.Engine, name: str = "", served: list[str] | None = None) -> None:
        self.error: BaseException | None = None
        self.raw: Any = None
        self.has, self.let_go = threading.Event(), threading.Event()
        self._engine, self._name, self._served = engine, name, served
        self._thread = threading.Thread(target=self._run, daemon=True)
        waiting = pool_of(engine).stats().waiting
        self._thread.start()
        wait_until(lambda: self.has.is_set() or pool_of(engine).stats().waiting > waiting)

    def _run(self) -> None:
        try:
            with self._engine.connect() as connection:
                self.raw = raw(connection)
                if self._served is not None:
                    self._served.append(self._name)
                self.has.set()
                assert self.let_go.wait(LIMIT)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self.has.set()

    def finish(self) -> None:
        self.let_go.set()
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()


# As any pool.


def test_a_connection_is_opened_when_needed_and_used_again(make) -> None:
    engine = make()
    with engine.connect() as connection:
        first = raw(connection)
    with engine.connect() as connection:
        second = raw(connection)

    assert first is second
    assert 1 == pool_of(engine).stats().opened


def test_the_bound_is_pool_size_and_max_overflow_together(make) -> None:
    engine = make(pool_size=2, max_overflow=1, pool_timeout=0)
    held = [engine.connect() for _ in range(3)]

    assert 3 == pool_of(engine).stats().max_size
    with pytest.raises(exc.TimeoutError):
        engine.connect()
    for connection in held:
        connection.close()


def test_the_numbers_mean_what_those_of_a_queue_pool_mean(url: str, make) -> None:
    """Monitoring that reads size, checkedin, checkedout and overflow goes on working."""

    def numbers(pool: Any) -> list[tuple[int, ...]]:
        seen, held = [], []
        for step in (1, 1, 1, -1, -1):
            if step > 0:
                held.append(pool.connect())
            else:
                held.pop().close()
            seen.append((pool.size(), pool.checkedin(), pool.checkedout(), pool.overflow(), pool.timeout()))
        while held:
            held.pop().close()
        return seen

    theirs = sa.create_engine(url, poolclass=sa.QueuePool, pool_size=3, max_overflow=2)
    expected = numbers(theirs.pool)
    status = theirs.pool.status()
    theirs.dispose()
    ours = sa.create_engine(url, poolclass=HygienePool, pool_size=3, max_overflow=2)
    actual = numbers(ours.pool)

    assert expected == actual
    assert f"{status} Waiting: 0" == ours.pool.status()
    ours.dispose()


def test_threads_share_the_connections(make) -> None:
    """Forty transactions in eight threads over two connections: each is there, and never more were open."""
    engine = make(pool_size=2, max_overflow=0, connect_args={"timeout": LIMIT})
    turn = threading.Lock()  # SQLite lets one write at a time, and is not fair about it

    def work(number: int) -> None:
        with engine.connect() as connection, turn, connection.begin():
            insert(connection, f"{number:02}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(40)))

    assert [f"{number:02}" for number in range(40)] == names(engine)
    stats = pool_of(engine).stats()
    assert (0, 0) == (stats.in_use, stats.waiting)
    assert stats.opened <= 2


def test_what_was_not_committed_is_rolled_back_on_return(make) -> None:
    engine = make(pool_size=1, max_overflow=0)
    with engine.connect() as connection:
        insert(connection, "lost")
    with engine.begin() as connection:
        insert(connection, "kept")
    bare = engine.raw_connection()  # no Connection of SQLAlchemy around it: only the pool's reset is left
    bare.cursor().execute("insert into items values ('lost, too')")
    bare.close()

    assert ["kept"] == names(engine)


def test_reset_on_return_can_commit(make) -> None:
    engine = make(pool_reset_on_return="commit")
    bare = engine.raw_connection()
    bare.cursor().execute("insert into items values ('kept')")
    bare.close()

    assert ["kept"] == names(engine)


def test_a_transaction_that_raises_gives_its_connection_back(make) -> None:
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    for _ in range(3):
        with pytest.raises(exc.OperationalError), engine.begin() as connection:  # noqa: PT012
            insert(connection, "lost")
            connection.exec_driver_sql("no such statement")

    assert [] == names(engine)


def test_an_orm_session_works(make) -> None:
    class Base(orm.DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = "users"
        id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
        name: orm.Mapped[str]

    User.__annotations__.clear()  # they were read, and their names are those of this function
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    Base.metadata.create_all(engine)
    for name in ("ann", "bob"):
        with orm.Session(engine) as session, session.begin():
            session.add(User(name=name))
    with orm.Session(engine) as session:
        found = [user.name for user in session.scalars(sa.select(User).order_by(User.name))]

    assert ["ann", "bob"] == found
    assert 0 == pool_of(engine).checkedout()


# Waiting.


def test_who_waited_longest_is_served_first(make) -> None:
    engine = make(pool_size=1, max_overflow=0)
    served: list[str] = []
    threads = [Asking(engine, name, served) for name in ("a", "b", "c", "d")]
    for thread in threads:
        thread.finish()

    assert ["a", "b", "c", "d"] == served


def test_who_asks_again_at_once_does_not_overtake(make) -> None:
    """The connection goes straight to the thread that waits; whoever gave it back comes after it."""
    engine = make(pool_size=1, max_overflow=0)
    served: list[str] = []
    mine = engine.connect()
    waiter = Asking(engine, "waiter", served)
    mine.close()
    again = Asking(engine, "again", served)
    waiter.finish()
    again.finish()

    assert ["waiter", "again"] == served


def test_a_timeout_is_the_error_that_sqlalchemy_raises(make) -> None:
    """`sqlalchemy.exc.TimeoutError`, as with a QueuePool; the numbers are in its cause."""
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0.01)
    with engine.connect(), pytest.raises(exc.TimeoutError, match="1 of 1 in use") as caught:
        engine.connect()

    cause = caught.value.__cause__
    assert isinstance(cause, PoolTimeout)
    assert cause.stats is not None
    assert (1, 1) == (cause.stats.in_use, cause.stats.max_size)
    assert pool_of(engine).stats().timeouts == 1


def test_more_than_max_waiting_are_refused_at_once(make) -> None:
    engine = make(pool_size=1, max_overflow=0, max_waiting=1)
    with engine.connect():
        waiter = Asking(engine)
        with pytest.raises(exc.TimeoutError, match="max_waiting is 1") as caught:
            engine.connect()
    waiter.finish()

    assert isinstance(caught.value.__cause__, PoolFull)
    assert waiter.error is None


def test_a_failed_connect_gives_its_place_back(make) -> None:
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    fail = True

    @sa.event.listens_for(engine, "do_connect")
    def refuse(*_: object) -> None:
        if fail:
            raise ConnectionError("the server is away")

    engine.dispose()
    for _ in range(3):
        with pytest.raises(ConnectionError):
            engine.connect()
    fail = False

    assert [] == names(engine)


# Connections that are gone.


def test_an_invalidated_connection_is_replaced(make) -> None:
    engine = make(pool_size=1, max_overflow=0)
    with engine.connect() as connection:
        first = raw(connection)
        connection.invalidate()
    with engine.connect() as connection:
        second = raw(connection)

    assert first is not second
    assert [] == names(engine)
    assert (1, 1) == (pool_of(engine).stats().opened, pool_of(engine).stats().idle)


@pytest.mark.parametrize("ending", ["invalidate", "soft", "detach", "failed reconnect"])
def test_what_is_noted_in_the_record_outlives_the_connection(ending: str) -> None:
    """`record_info` belongs to the place in the pool, as in QueuePool, and the place counts as checked in."""
    down = threading.Event()

    def connect() -> sqlite3.Connection:
        if down.is_set():
            raise sqlite3.OperationalError("down")
        return sqlite3.connect(":memory:", check_same_thread=False)

    pool = HygienePool(connect, pool_size=1, max_overflow=0)
    connection = pool.connect()
    connection.record_info["tenant"] = "ann"
    if ending == "detach":
        connection.detach()
    else:
        connection.invalidate(soft=ending == "soft")
    connection.close()
    checked_in = pool.checkedin()
    if ending == "failed reconnect":
        down.set()
        with pytest.raises(sqlite3.OperationalError):
            pool.connect()
        down.clear()
    again = pool.connect()
    kept = dict(again.record_info)
    again.close()
    pool.dispose()

    assert (1, {"tenant": "ann"}) == (checked_in, kept)


def test_an_invalidated_connection_is_opened_anew_by_its_holder(make) -> None:
    """SQLAlchemy reconnects in place; the pool counts on with one place in use."""
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    with engine.connect() as connection:
        connection.invalidate()
        insert(connection, "x")
        connection.commit()

        assert 1 == pool_of(engine).checkedout()
    assert ["x"] == names(engine)


def test_a_soft_invalidated_connection_is_replaced_when_it_is_next_taken(make) -> None:
    engine = make(pool_size=1, max_overflow=0)
    with engine.connect() as connection:
        first = raw(connection)
        connection.connection.invalidate(soft=True)
        assert 1 == connection.scalar(sa.text("select 1"))
        # What was opened and invalidated in one tick of a coarse clock counts as younger.
        wait_until(lambda: time.time() > connection.connection._connection_record.starttime)
    with engine.connect() as connection:
        second = raw(connection)

    assert first is not second


def test_pre_ping_replaces_what_died_while_it_was_idle(make) -> None:
    engine = make(pool_size=1, max_overflow=0, pool_pre_ping=True)
    with engine.connect() as connection:
        first = raw(connection)
    real, pinged = engine.dialect.do_ping, []

    def ping(connection: Any) -> bool:
        pinged.append(connection)
        return len(pinged) > 1 and real(connection)

    engine.dialect.do_ping = ping  # type: ignore[method-assign]
    with engine.connect() as connection:
        assert 1 == connection.scalar(sa.text("select 1"))
        assert raw(connection) is not first

    assert [first] == pinged[:1]
    assert (0, 1) == (pool_of(engine).checkedout(), pool_of(engine).checkedin())


def test_a_detached_connection_frees_its_place(make) -> None:
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    detached = engine.connect()
    detached.detach()
    with engine.connect() as other:
        assert raw(other) is not raw(detached)
    detached.close()

    assert (0, 1) == (pool_of(engine).checkedout(), pool_of(engine).checkedin())


def test_a_connection_that_nobody_closed_comes_back(make) -> None:
    """SQLAlchemy's own finalizer resets it and gives it back."""
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    insert(engine.connect(), "lost")
    gc.collect()

    assert [] == names(engine)
    assert 0 == pool_of(engine).checkedout()


@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")  # the collector met it before the pool did
def test_a_record_that_is_lost_gives_its_place_back(make, caplog: pytest.LogCaptureFixture) -> None:
    """An interrupt between the pool and SQLAlchemy loses what it took; the place is there again, and it is logged."""
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    pool = pool_of(engine)
    pool._do_get()
    with caplog.at_level(logging.WARNING, "hygiene"):
        gc.collect()
        wait_until(lambda: pool.stats().closed == 1)

    assert [] == names(engine)
    assert "was dropped without having been released" in caplog.text


# Time.


def test_idle_connections_are_closed(make) -> None:
    clock = ManualClock()
    engine = make(timer=clock, max_idle="10m")
    clock.advance(599)
    pool_of(engine).expire()
    assert 1 == pool_of(engine).checkedin()
    clock.advance(2)

    assert 1 == pool_of(engine).expire()
    assert 0 == pool_of(engine).checkedin()


def test_recycle_closes_an_old_connection_whether_or_not_somebody_asks(make) -> None:
    clock = ManualClock()
    engine = make(timer=clock, pool_recycle=300, max_idle=None)
    clock.advance(284)
    assert 0 == pool_of(engine).expire()
    clock.advance(16)

    assert 1 == pool_of(engine).expire()


def test_recycle_zero_never_uses_a_connection_twice(make) -> None:
    """As in SQLAlchemy, where each moment is later than the one before."""
    engine = make(pool_recycle=0, max_idle=None)
    with engine.connect() as connection:
        first = raw(connection)
        wait_until(lambda: time.time() > connection.connection._connection_record.starttime)
    with engine.connect() as connection:
        assert raw(connection) is not first


@pytest.mark.parametrize(("lifo", "expected"), [(True, "last"), (False, "first")])
def test_use_lifo_says_which_one_is_handed_out(make, lifo: bool, expected: str) -> None:
    engine = make(pool_use_lifo=lifo)
    connections = {"first": engine.connect(), "last": engine.connect()}
    raws = {name: raw(connection) for name, connection in connections.items()}
    for connection in connections.values():
        connection.close()
    with engine.connect() as connection:
        assert raws[expected] is raw(connection)


def take_and_forget(engine: sa.Engine) -> sa.Connection:
    """A line that a report has to name."""
    return engine.connect()


def test_a_connection_held_for_too_long_is_reported_with_its_line(make, caplog: pytest.LogCaptureFixture) -> None:
    """The stack ends at the line that asked for a connection, not inside of SQLAlchemy."""
    clock = ManualClock()
    engine = make(timer=clock, leak_after=60)
    connection = take_and_forget(engine)
    clock.advance(61)
    with caplog.at_level(logging.WARNING, "hygiene"):
        pool_of(engine).expire()
        connection.close()

    report = caplog.messages[0]
    assert "has been held for 61.0 s by thread 'MainThread'" in report
    assert report.rstrip().endswith("return engine.connect()")
    assert "in take_and_forget" in report
    assert "was returned after all" in caplog.messages[1]


def test_holders_say_who_has_a_connection(make) -> None:
    clock = ManualClock()
    engine = make(timer=clock, leak_after=60)
    with take_and_forget(engine), orm.Session(engine) as session:
        clock.advance(5)
        session.execute(sa.text("select 1"))
        older, newer = pool_of(engine).holders()

    assert (5.0, 0.0) == (older.age, newer.age)
    assert "take_and_forget" in older.stack
    assert newer.stack.rstrip().endswith('session.execute(sa.text("select 1"))')


def test_a_stack_of_nothing_but_sqlalchemy_is_shown_as_it_is() -> None:
    """The pool records so many frames and no more."""
    inside = ((sa.create_engine.__code__, 0), (sa.Engine.connect.__code__, 0))
    mine = (take_and_forget.__code__, 0)

    assert inside == _beyond(inside)
    assert (mine,) == _beyond((*inside, mine))


# The end.


def test_dispose_closes_what_is_idle_and_goes_on_with_a_new_pool(make) -> None:
    engine = make(pool_size=2, max_overflow=0, max_idle=77, leak_after=5, pool_use_lifo=False, max_waiting=3)
    old = pool_of(engine)
    engine.dispose()

    assert 0 == old.checkedin()
    assert [] == names(engine)
    new = pool_of(engine)
    assert new is not old
    assert old._own_options == new._own_options
    assert old._records.name == new._records.name


def test_what_is_out_at_dispose_is_closed_when_it_comes_back(make) -> None:
    engine = make(pool_size=1, max_overflow=0)
    connection = engine.connect()
    driver, old = raw(connection), pool_of(engine)
    engine.dispose()
    assert 1 == connection.scalar(sa.text("select 1"))
    connection.close()

    assert (0, 0) == (old.checkedin(), old.checkedout())
    with pytest.raises(Exception, match="closed database"):
        driver.execute("select 1")


def test_who_waits_at_dispose_is_served(make) -> None:
    engine = make(pool_size=1, max_overflow=0)
    connection = engine.connect()
    old = pool_of(engine)
    waiter = Asking(engine)
    engine.dispose()
    connection.close()
    waiter.finish()

    assert waiter.error is None
    assert (0, 0) == (old.checkedin(), old.checkedout())


def test_a_disposed_pool_keeps_nothing_although_somebody_returns_meanwhile(make) -> None:
    """Whoever gives a connection back in the moment of `dispose` looks again."""
    engine = make(pool_size=1, max_overflow=0)
    old = pool_of(engine)
    connection = engine.connect()
    record = connection.connection._connection_record
    release = record.lease.release

    class Lease:
        _slot = record.lease._slot

        def release(self, *, discard: bool) -> None:
            release(discard=discard)
            old._disposed = True  # after it was looked at, before it is looked at again

    record.lease = Lease()
    connection.close()

    assert (0, 0) == (old.checkedin(), old.checkedout())


def test_pool_events_are_told(make) -> None:
    engine = make(pool_size=1, max_overflow=0)
    engine.dispose()
    told: list[str] = []
    for name in ("connect", "checkout", "checkin", "reset", "invalidate", "close"):
        sa.event.listen(engine, name, lambda *_, name=name: told.append(name))
    with engine.connect():
        pass
    with engine.connect() as connection:
        connection.invalidate()
    engine.dispose()
    with engine.connect():
        pass

    once = ["connect", "checkout", "reset", "checkin"]
    assert [*once, "checkout", "invalidate", "close", "checkin", *once] == told


def test_events_given_to_the_engine_are_listened_to(make) -> None:
    opened: list[Any] = []
    engine = make(pool_events=[(lambda connection, record: opened.append(connection), "connect")])
    with engine.connect() as connection:
        assert [raw(connection)] == opened


def test_shutdown_closes_the_idle_and_says_so_to_who_comes_later(make) -> None:
    engine = make(pool_logging_name="orders")
    assert 1 == pool_of(engine).checkedin()
    report = shutdown()

    assert "pool 'orders'" in report.finished
    assert 0 == pool_of(engine).checkedin()
    with pytest.raises(exc.InvalidRequestError, match=r"shutdown\(\) has closed it") as caught:
        engine.connect()
    assert isinstance(caught.value.__cause__, PoolClosed)


def test_an_engine_that_is_dropped_with_open_connections_warns(url: str) -> None:
    engine = sa.create_engine(url, poolclass=HygienePool, pool_logging_name="orders")
    with engine.connect():
        pass
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del engine
        gc.collect()

    assert any("pool 'orders' was dropped with 1 open" in str(warning.message) for warning in caught)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_its_own(make) -> None:
    """It gets a connection of its own, and giving back what the parent had out neither closes it nor hands it on."""
    engine = make(pool_size=1, max_overflow=1, pool_timeout=0)
    closed: list[Any] = []
    sa.event.listen(engine, "close", lambda connection, record: closed.append(connection))
    held, idle = engine.connect(), engine.connect()
    mine = {id(raw(held)), id(raw(idle))}
    idle.close()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        verdict = "died"
        try:
            with engine.connect() as first, engine.connect() as second:
                fresh = mine.isdisjoint({id(raw(first)), id(raw(second))})
            held.close()
            gc.collect()
            idle_now = pool_of(engine).checkedin()
            verdict = f"fresh={fresh} closed={len(closed)} idle={idle_now}"
        finally:
            os.write(writing, verdict.encode())
            os._exit(0)
    os.waitpid(child, 0)
    verdict = os.read(reading, 1000).decode()
    os.close(reading)
    os.close(writing)

    assert "fresh=True closed=0 idle=2" == verdict
    assert 1 == held.scalar(sa.text("select 1"))
    held.close()
    assert 2 == pool_of(engine).checkedin()


def test_what_was_out_at_the_fork_is_kept_but_not_pooled(make) -> None:
    """To give it back in the child leaves it open and alone; here without a child."""
    engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
    connection = engine.connect()
    driver = raw(connection)
    pool_of(engine)._records._after_fork()
    connection.close()

    assert (0, 0) == (pool_of(engine).checkedin(), pool_of(engine).checkedout())
    assert (1,) == driver.execute("select 1").fetchone()
    driver.close()


# Refused.


def test_an_async_engine_is_refused() -> None:
    """SQLAlchemy says so when the engine is made."""

    class Driver(ModuleType):
        """Has whatever a dialect looks for; nothing of it is used."""

        def __getattr__(self, name: str) -> Any:
            return getattr(sqlite3, name, True)

    with pytest.raises(exc.ArgumentError, match="HygienePool cannot be used with asyncio engine"):
        sa.create_engine("sqlite+aiosqlite:///never.db", module=Driver("aiosqlite"), poolclass=HygienePool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 0}, "pool_size must be a number of connections, 1 or more"),
        ({"max_overflow": -1}, "max_overflow must be a number of connections, 0 or more"),
        ({"pool_size": 2.5}, "found 2.5"),
        ({"max_waiting": -1}, "max_waiting"),
        ({"max_idle": "soon"}, "max_idle"),
        ({"pool_recycle": "soon"}, "recycle"),
    ],
)
def test_a_pool_without_a_bound_and_other_nonsense_is_refused(url: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sa.create_engine(url, poolclass=HygienePool, **options)
