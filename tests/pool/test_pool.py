"""What a pool opens, hands out, keeps and closes: examples, for threads and for tasks."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import logging
import pickle
import re
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from hygiene import AsyncPool, Pool, PoolClosed, PoolFull, PoolStats, PoolTimeout, managed_pool
from hygiene.testing import ManualClock


class Connection:
    """A resource that knows its number and whether it is open."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = False
        self.resets = 0

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def __repr__(self) -> str:
        return f"c{self.number}"


class Factory:
    """Opens connections, and keeps them to look at."""

    def __init__(self) -> None:
        self.opened: list[Connection] = []

    def __call__(self) -> Connection:
        self.opened.append(Connection(len(self.opened)))
        return self.opened[-1]

    async def aopen(self) -> Connection:
        await asyncio.sleep(0)
        return self()

    @property
    def closed(self) -> list[int]:
        return [connection.number for connection in self.opened if connection.closed]


@pytest.fixture
def factory() -> Factory:
    return Factory()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


# What it opens, and when.


def test_nothing_is_opened_before_it_is_needed(factory: Factory) -> None:
    pool = Pool(factory)
    assert [] == factory.opened

    with pool.acquire() as connection:
        assert [connection] == factory.opened
    with pool.acquire() as again:
        assert connection is again
    pool.close()


def test_there_are_as_many_as_are_needed_at_once(factory: Factory) -> None:
    with managed_pool(factory, max_size=3) as pool:
        leases = [pool.lease() for _ in range(3)]
        assert {0, 1, 2} == {lease.resource.number for lease in leases}
        for lease in leases:
            lease.release()
        assert 3 == len(factory.opened)

    assert [0, 1, 2] == factory.closed


def test_min_size_is_opened_on_entering_and_spared(factory: Factory, clock: ManualClock) -> None:
    with Pool(factory, min_size=2, max_idle=60, max_lifetime=None, timer=clock) as pool:
        assert 2 == len(factory.opened)
        leases = [pool.lease() for _ in range(4)]
        for lease in leases:
            lease.release()
        clock.advance(61)
        assert 2 == pool.expire()
        assert 0 == pool.expire()
        assert 2 == pool.stats().idle


def test_what_was_opened_is_closed_if_entering_fails() -> None:
    opened: list[Connection] = []

    def flaky() -> Connection:
        if len(opened) == 2:
            raise ConnectionError("full")
        opened.append(Connection(len(opened)))
        return opened[-1]

    with pytest.raises(ConnectionError, match="full"), Pool(flaky, min_size=3):
        pass

    assert [True, True] == [connection.closed for connection in opened]


async def test_an_asynchronous_pool_opens_min_size_too(factory: Factory) -> None:
    async with managed_pool(factory.aopen, min_size=2) as pool:
        assert 2 == len(factory.opened)
        async with pool.acquire() as connection:
            assert connection in factory.opened

    assert [0, 1] == factory.closed


# Which one is handed out.


@pytest.mark.parametrize(("order", "expected"), [("lifo", 2), ("fifo", 0)])
def test_order_says_which_idle_one_is_next(factory: Factory, order: str, expected: int) -> None:
    with Pool(factory, order=order) as pool:
        leases = [pool.lease() for _ in range(3)]
        for lease in leases:
            lease.release()
        with pool.acquire() as connection:
            assert expected == connection.number


def test_discard_closes_it_and_makes_room(factory: Factory) -> None:
    with Pool(factory, max_size=1) as pool:
        lease = pool.lease()
        lease.release(discard=True)
        assert [0] == factory.closed
        with pool.acquire() as connection:
            assert 1 == connection.number


def test_a_lease_can_be_given_back_inside_its_block(factory: Factory) -> None:
    with Pool(factory, max_size=1) as pool:
        lease = pool.acquire()
        with lease as connection:
            assert 0 == connection.number
            lease.release(discard=True)
            with pool.acquire(timeout=0) as another:
                assert 1 == another.number
        assert [0] == factory.closed


def test_a_lease_is_good_for_one_block(factory: Factory) -> None:
    with Pool(factory) as pool:
        lease = pool.acquire()
        with lease:
            pass
        with pytest.raises(RuntimeError, match="was used already; ask the pool for another one"), lease:
            pass
        assert 1 == pool.stats().idle


# Time.


def test_what_is_idle_for_too_long_is_closed(factory: Factory, clock: ManualClock) -> None:
    with Pool(factory, max_idle="10m", timer=clock) as pool:
        first, second = pool.lease(), pool.lease()
        first.release()
        clock.advance(599)
        second.release()
        assert 0 == pool.expire()
        clock.advance(1)
        assert 1 == pool.expire()
        assert [0] == factory.closed
        assert 1 == pool.stats().idle


def test_what_is_old_is_closed_when_it_comes_back(factory: Factory, clock: ManualClock) -> None:
    """Never while it is held; and up to 5 % earlier than asked."""
    with Pool(factory, max_lifetime=1000, max_idle=None, timer=clock) as pool:
        with pool.acquire():
            clock.advance(949)
        assert [] == factory.closed
        with pool.acquire():
            clock.advance(51)
            pool.expire()
            assert [] == factory.closed
        assert [0] == factory.closed


def test_lifetimes_differ_so_that_not_all_end_at_once(factory: Factory, clock: ManualClock) -> None:
    with Pool(factory, max_size=50, max_lifetime=1000, timer=clock) as pool:
        leases = [pool.lease() for _ in range(50)]
        for lease in leases:
            lease.release()
        ends = {slot.expires for slot in pool._core.slots()}

        assert 950 <= min(ends) < max(ends) <= 1000
        assert 40 < len(ends)


def test_the_janitor_closes_what_is_idle(factory: Factory) -> None:
    """Nobody has to call anything, and a close that hangs holds nobody up."""
    closed = threading.Event()
    with Pool(factory, max_idle=0.01, close=lambda _: closed.set()) as pool:
        with pool.acquire():
            pass
        assert closed.wait(20)


async def test_the_janitor_closes_on_the_loop(factory: Factory) -> None:
    closed = asyncio.Event()

    async def close(_: Connection) -> None:
        closed.set()

    async with AsyncPool(factory.aopen, max_idle=0.01, close=close) as pool:
        async with pool.acquire():
            pass
        async with asyncio.timeout(20):
            await closed.wait()


# Check and reset.


def test_reset_cleans_what_comes_back(factory: Factory) -> None:
    def reset(connection: Connection) -> None:
        connection.resets += 1

    with Pool(factory, reset=reset) as pool:
        for _ in range(3):
            with pool.acquire() as connection:
                pass
        assert 3 == connection.resets


async def test_check_reset_and_close_may_be_asynchronous(factory: Factory) -> None:
    said: list[str] = []

    async def check(connection: Connection) -> bool:
        said.append(f"check {connection}")
        return connection.number > 0

    async def reset(connection: Connection) -> None:
        said.append(f"reset {connection}")

    async def close(connection: Connection) -> None:
        said.append(f"close {connection}")

    async with AsyncPool(factory.aopen, check=check, reset=reset, close=close) as pool:
        async with pool.acquire() as first:
            assert 0 == first.number
        async with pool.acquire() as second:
            assert 1 == second.number

    assert ["reset c0", "check c0", "close c0", "reset c1", "close c1"] == said


@pytest.mark.parametrize("hook", ["open", "check", "reset", "close"])
def test_asynchronous_hooks_are_refused_by_the_threads_pool(
    factory: Factory, hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def asynchronous(*_: object) -> None:
        raise AssertionError("is not awaited")

    options: dict[str, Any] = {"open": factory, hook: asynchronous}
    pool = Pool(options.pop("open"), **options)
    message = f"{hook} of pool {pool.name!r} is asynchronous: use AsyncPool"
    if hook in {"open", "check"}:
        if hook == "check":
            pool.lease().release()
        with pytest.raises(TypeError) as caught:
            pool.lease()
        assert message == str(caught.value)
    else:
        pool.lease().release(discard=hook == "close")
        assert message in caplog.text
    pool.close()
    assert pool.stats().opened == pool.stats().closed


# Waiting.


def test_a_timeout_says_what_to_do(factory: Factory) -> None:
    with Pool(factory, max_size=1, name="db") as pool, pool.acquire():
        with pytest.raises(PoolTimeout) as caught, pool.acquire(timeout=0):
            pass
        assert (
            "no resource from pool 'db' after 0 s: 1 of 1 in use, 0 opening, 0 waiting. Return resources sooner, "
            "or raise max_size; with leak_after= the pool says who holds them."
        ) == str(caught.value)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.stats == pool.stats()
        assert 1 == pool.stats().timeouts
        assert str(caught.value) == str(pickle.loads(pickle.dumps(caught.value)))


def test_a_timeout_names_the_longest_holder(factory: Factory) -> None:
    """Who has held a resource longest, for how long, and the line that took it, where the pool records them."""
    clock = ManualClock()
    with Pool(factory, max_size=2, name="db", leak_after=3600, timer=clock) as pool, pool.acquire():
        clock.advance(12)
        with pool.acquire(), pytest.raises(PoolTimeout) as caught, pool.acquire(timeout=0):
            pass

    assert re.search(
        r"The longest holder is thread 'MainThread', for 12\.0 s, taken at .*test_pool\.py:\d+ in "
        r"test_a_timeout_names_the_longest_holder\. Return resources sooner, or raise max_size\.$",
        str(caught.value),
    )


async def test_a_timeout_names_the_task_that_holds_longest(factory: Factory) -> None:
    async with AsyncPool(factory.aopen, max_size=1, leak_after=3600) as pool, pool.acquire():
        with pytest.raises(
            PoolTimeout, match=r"The longest holder is task 'Task-\d+', for .* s, taken at .* in test_a"
        ):
            async with pool.acquire(timeout=0):
                pass


def test_an_acquisition_that_is_not_entered_says_what_to_do(factory: Factory) -> None:
    with Pool(factory, max_size=1, name="db") as pool:
        lease: Any = pool.acquire()
        advice = r"`with pool.acquire\(\) as resource:`, or `.resource` of what `pool.lease\(\)` returns"
        with pytest.raises(AttributeError, match=f"a lease of pool 'db' has no attribute 'execute'. Use .*{advice}"):
            lease.execute("select 1")
        with pytest.raises(TypeError, match=f"a lease of pool 'db' is not called. Use .*{advice}"):
            lease()
        assert not hasattr(lease, "execute")
        assert 0 == pool.stats().in_use
        taken: Any = pool.lease()
        with pytest.raises(AttributeError, match=advice):
            taken.execute("select 1")
        taken.release()


async def test_an_asynchronous_acquisition_that_is_not_entered_says_what_to_do(factory: Factory) -> None:
    async with AsyncPool(factory.aopen, max_size=1, name="db") as pool:
        lease: Any = pool.acquire()
        advice = r"`async with pool.acquire\(\) as resource:`, or `.resource` of what `await pool.lease\(\)` returns"
        with pytest.raises(AttributeError, match=advice):
            lease.execute("select 1")
        with pytest.raises(TypeError, match=advice):
            lease()


async def test_the_timeout_is_the_pools_unless_it_is_said(factory: Factory) -> None:
    async with AsyncPool(factory, max_size=1, timeout=0.001) as pool, pool.acquire():
        with pytest.raises(PoolTimeout, match=r"after 0\.001 s"):
            await pool.lease()
        with pytest.raises(PoolTimeout, match=r"after 0\.002 s"):
            await pool.lease(timeout="2ms")


def test_max_waiting_refuses_at_once(factory: Factory) -> None:
    with Pool(factory, max_size=1, max_waiting=0, name="gpu") as pool, pool.acquire():
        with pytest.raises(PoolFull) as caught:
            pool.lease()
        assert (
            "pool 'gpu': 0 wait already, and max_waiting is 0; 1 of 1 in use. Ask for less, or raise max_size."
        ) == str(caught.value)
        assert caught.value.stats == pool.stats()


async def test_max_waiting_lets_that_many_wait(factory: Factory) -> None:
    async with AsyncPool(factory, max_size=1, max_waiting=1) as pool:
        holder = await pool.lease()
        waiter = asyncio.ensure_future(pool.lease())
        await asyncio.sleep(0)
        with pytest.raises(PoolFull):
            await pool.lease()
        holder.release()
        (await waiter).release()


# Changing.


def test_resize_up_serves_those_who_wait(factory: Factory) -> None:
    with Pool(factory, max_size=1) as pool:
        first = pool.lease()
        served = threading.Event()

        def wait() -> None:
            with pool.acquire(timeout=20):
                served.set()

        thread = threading.Thread(target=wait)
        thread.start()
        while not pool.stats().waiting and thread.is_alive():
            pass
        pool.resize(2)
        assert served.wait(20)
        thread.join(20)
        first.release()
        assert 2 == pool.max_size == pool.stats().max_size


def test_resize_down_closes_idle_ones_now_and_others_when_they_come_back(factory: Factory) -> None:
    with Pool(factory, max_size=4) as pool:
        leases = [pool.lease() for _ in range(4)]
        leases[0].release()
        pool.resize(2)
        assert [0] == factory.closed
        leases[1].release()
        assert [0, 1] == factory.closed
        leases[2].release()
        leases[3].release()
        assert [0, 1] == factory.closed
        assert 2 == pool.stats().idle
        with pytest.raises(ValueError, match="max_size must be"):
            pool.resize(0)


def test_drain_waits_for_what_is_in_use(factory: Factory) -> None:
    pool = Pool(factory)
    idle, held = pool.lease(), pool.lease()
    idle.release()
    assert not pool.drain(grace=0)
    assert [0] == factory.closed

    thread = threading.Thread(target=held.release)
    thread.start()
    assert pool.drain(grace=20)
    thread.join(20)
    assert [0, 1] == factory.closed
    assert pool.drain(grace=0)


async def test_an_asynchronous_drain_waits_for_what_is_in_use(factory: Factory) -> None:
    pool = AsyncPool(factory.aopen)
    held = await pool.lease()
    assert not await pool.drain(grace=0)

    asyncio.get_running_loop().call_soon(held.release)
    assert await pool.drain(grace=20)
    assert [0] == factory.closed


def test_closing_twice_is_fine_and_nothing_can_be_taken_then(factory: Factory) -> None:
    pool = Pool(factory, name="db")
    pool.lease().release()
    pool.close()
    pool.close()

    assert pool.closed
    assert [0] == factory.closed
    with pytest.raises(
        PoolClosed,
        match=r"pool 'db' is closed, by itself or by shutdown\(\), and nothing can be taken from it\. Make a new",
    ):
        pool.lease()


def test_close_tells_what_could_not_be_closed() -> None:
    class Stubborn:
        def close(self) -> None:
            raise OSError("no")

    pool = Pool(Stubborn, name="db")
    leases = [pool.lease() for _ in range(2)]
    for lease in leases:
        lease.release()
    with pytest.raises(ExceptionGroup, match=r"2 resource\(s\) of pool 'db' could not be closed") as caught:
        pool.close()

    assert [["while closing a resource of pool 'db'"]] * 2 == [error.__notes__ for error in caught.value.exceptions]
    assert 2 == pool.stats().closed == pool.stats().hook_errors


# Who holds what.


def test_a_leak_is_reported_with_the_stack_that_took_it(
    factory: Factory, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    def forgets() -> Any:
        return pool.lease()

    with Pool(factory, leak_after="1m", name="db", timer=clock) as pool:
        lease = forgets()
        clock.advance(59)
        pool.expire()
        assert "" == caplog.text

        clock.advance(1)
        pool.expire()
        pool.expire()
        assert 1 == caplog.text.count("a resource of pool 'db' has been held for 60.0 s by thread 'MainThread'")
        assert "in forgets\n" in caplog.text
        assert "return pool.lease()" in caplog.text
        assert "hygiene/pool.py" not in caplog.text

        lease.release()
        assert "the resource of pool 'db' that thread 'MainThread' took was returned after all" in caplog.text


async def test_a_task_that_leaks_is_named(caplog: pytest.LogCaptureFixture, factory: Factory) -> None:
    reported = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "has been held" in record.getMessage():
                loop.call_soon_threadsafe(reported.set)

    handler = Handler()
    logging.getLogger("hygiene").addHandler(handler)
    try:
        async with AsyncPool(factory, leak_after=0.01) as pool:
            asyncio.current_task().set_name("chat")  # type: ignore[union-attr]
            async with pool.acquire():
                async with asyncio.timeout(20):
                    await reported.wait()
    finally:
        logging.getLogger("hygiene").removeHandler(handler)

    assert "by task 'chat'" in caplog.text


def test_holders_says_who_holds_a_resource(factory: Factory, clock: ManualClock) -> None:
    with Pool(factory, leak_after=3600, timer=clock) as pool:
        first = pool.lease()
        clock.advance(5)
        with pool.acquire():
            older, younger = pool.holders()
            assert [5, 0] == [older.age, younger.age]
            assert "thread 'MainThread'" == older.thread
            assert "test_holders_says_who_holds_a_resource" in older.stack
            assert "first = pool.lease()" in older.stack
        first.release()
        assert () == pool.holders()


def test_without_leak_after_holders_are_only_counted(factory: Factory) -> None:
    with Pool(factory) as pool, pool.acquire():
        (holder,) = pool.holders()
        assert (None, None, "") == (holder.age, holder.thread, holder.stack)


# How it is seen.


def test_stats_add_up(factory: Factory) -> None:
    with Pool(factory, max_size=3) as pool:
        leases = [pool.lease() for _ in range(3)]
        leases[0].release(discard=True)
        leases[1].release()
        stats = pool.stats()

        assert (
            PoolStats(
                max_size=3, in_use=1, idle=1, opening=0, waiting=0, opened=3, closed=1, acquired=3, timeouts=0,
                dropped=0, hook_errors=0,
            )
            == stats
        )  # fmt: skip
        assert stats.opened == stats.in_use + stats.idle + stats.closed
        leases[2].release()


def test_repr_says_what_matters(factory: Factory) -> None:
    pool = Pool(factory, name="db", max_size=2)
    lease = pool.acquire()
    assert "<PoolLease of 'db': holds nothing>" == repr(lease)
    with lease:
        assert "<Pool 'db': 1 in use, 0 idle, max_size=2>" == repr(pool)
        assert "<PoolLease of 'db': holds c0>" == repr(lease)
    pool.close()
    assert "<Pool 'db': closed, 0 in use, 0 idle, max_size=2>" == repr(pool)


def test_it_is_called_what_open_is_called() -> None:
    assert "Connection" == Pool(Connection).name  # type: ignore[arg-type]
    assert "Factory" == Pool(Factory()).name
    assert "db" == AsyncPool(Factory(), name="db").name


def test_a_pool_that_is_dropped_open_is_noticed(factory: Factory) -> None:
    pool = Pool(factory, name="db")
    pool.lease().release()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del pool
        gc.collect()

    assert ["pool 'db' was dropped with 1 open: close it"] == [str(warning.message) for warning in caught]


# Bad input.


@pytest.mark.parametrize("kind", [Pool, AsyncPool])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"open": 3}, TypeError, "open must be callable; found 3"),
        ({"check": "ping"}, TypeError, "check must be callable; found 'ping'"),
        ({"reset": 1}, TypeError, "reset must be callable; found 1"),
        ({"timer": None}, TypeError, "timer must be callable; found None"),
        ({"close": 3}, TypeError, "close must be a callable"),
        ({"close": None}, TypeError, "close must be a callable"),
        ({"max_size": 0}, ValueError, "max_size must be a number of resources, at least 1; found 0"),
        ({"max_size": 1.5}, ValueError, "max_size must be"),
        ({"max_size": True}, ValueError, "max_size must be"),
        ({"min_size": -1}, ValueError, "min_size must be from 0 to max_size (10); found -1"),
        ({"min_size": 11}, ValueError, "min_size must be from 0 to max_size (10); found 11"),
        ({"timeout": -1}, ValueError, "timeout must be positive"),
        ({"timeout": "soon"}, ValueError, "timeout must be positive"),
        ({"max_waiting": -1}, ValueError, "max_waiting must be a number of callers, 0 or more, or None; found -1"),
        ({"max_waiting": "few"}, ValueError, "max_waiting must be"),
        ({"max_idle": 0}, ValueError, "max_idle must be positive"),
        ({"max_lifetime": "x"}, ValueError, "max_lifetime must be positive"),
        ({"leak_after": []}, TypeError, "leak_after must be positive"),
        ({"order": "random"}, ValueError, 'order must be "lifo" or "fifo"; found \'random\''),
    ],
)
def test_bad_arguments_are_refused_at_once(
    kind: Callable[..., Any], arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        kind(**{"open": list, **arguments})

    assert message in str(caught.value)


async def test_a_pool_belongs_to_one_loop(factory: Factory) -> None:
    async with AsyncPool(factory.aopen, name="db") as pool:
        async with pool.acquire():
            pass

        def elsewhere() -> str:
            with pytest.raises(RuntimeError) as caught:
                asyncio.run(pool.lease())
            return str(caught.value)

        assert "pool 'db' belongs to another event loop, which is still alive" in await asyncio.to_thread(elsewhere)


def test_the_next_loop_finds_an_empty_pool(factory: Factory, caplog: pytest.LogCaptureFixture) -> None:
    """A pool of a module survives the loops that use it, one after another."""
    pool = AsyncPool(factory.aopen, name="db")

    async def use() -> int:
        async with pool.acquire() as connection:
            return connection.number

    assert [0, 1] == [asyncio.run(use()), asyncio.run(use())]
    assert "the event loop of pool 'db' was closed before the pool; 1 open resource(s) were forgotten" in caplog.text

    asyncio.run(pool.aclose())
    assert pool.closed


def test_both_pools_take_and_offer_the_same() -> None:
    """Whoever knows one knows the other."""

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    public = {name for name in dir(Pool) if not name.startswith("_")}

    assert public - {"close"} == {name for name in dir(AsyncPool) if not name.startswith("_")} - {"aclose"}
    assert parameters(Pool) == parameters(AsyncPool)
    for name in public - {"close", "closed", "max_size"}:
        assert parameters(getattr(Pool, name)) == parameters(getattr(AsyncPool, name)), name


def test_a_lifetime_ends_for_what_min_size_spares_too(factory: Factory, clock: ManualClock) -> None:
    with Pool(factory, min_size=1, max_idle=None, max_lifetime=100, timer=clock) as pool:
        clock.advance(101)
        assert 1 == pool.expire()
        with pool.acquire() as connection:
            assert 1 == connection.number


def test_a_loop_that_ends_without_its_pool_leaves_nothing_behind() -> None:
    """A program that calls ``asyncio.run`` for each of its jobs does not keep what each of them opened."""

    class Resource:
        pass

    opened: list[weakref.ref[Resource]] = []
    late: list[Any] = []

    async def connect() -> Resource:
        resource = Resource()
        opened.append(weakref.ref(resource))
        return resource

    pool = AsyncPool(connect)

    async def job() -> None:
        late.append(await pool.lease())
        async with pool.acquire():
            pass

    for _ in range(3):
        asyncio.run(job())
    for lease in late[:-1]:
        lease.release()
    del lease
    late.clear()
    asyncio.run(pool.aclose())
    gc.collect()

    assert [None] * 6 == [resource() for resource in opened]


def test_an_error_that_takes_no_notes_is_told_like_any_other() -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    class Stubborn:
        def close(self) -> None:
            raise Frozen(3)

    pool = Pool(Stubborn)
    pool.lease().release()
    with pytest.raises(ExceptionGroup) as caught:
        pool.close()

    assert (Frozen(3),) == caught.value.exceptions
