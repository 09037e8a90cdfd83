"""A lease says "I am using this": the entry neither evicts nor expires, and is created once for all who ask."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.errors import RegistryFull
from hygiene.registry import Registry
from hygiene.testing import ManualClock

FLAVOURS: dict[str, dict[str, Any]] = {
    "lru": {},
    "fifo": {"policy": "fifo"},
    "lfu": {"policy": "lfu"},
    "importance": {"policy": "importance", "importance": lambda entry: 0},
    "ttl": {"ttl": 60},
    "told": {"on_evict": lambda removal: None},
    "busy": {"busy": lambda entry: False},
}


@pytest.fixture(params=FLAVOURS)
def limits(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FLAVOURS[request.param]


def test_a_leased_entry_stays_and_the_next_one_leaves(limits: dict[str, Any]) -> None:
    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, maxsize=2, **limits)
    with registry.lease("a") as value:
        registry["c"] = 3
        registry["d"] = 4

        assert 1 == value
        assert {"a": 1, "d": 4} == registry
        assert 1 == registry.stats().leased
        assert not registry.evict("a")
        assert 1 == registry.trim(0)
        assert {"a": 1} == registry
    registry.update(x=1, y=2)

    assert {"x": 1, "y": 2} == registry
    assert 0 == registry.stats().leased


def test_the_end_of_a_lease_counts_as_use() -> None:
    """After a lease the entry is the most recently used one."""
    registry: Registry[str, int] = Registry({"a": 1, "b": 2, "c": 3}, maxsize=3)
    with registry.lease("a"):
        registry["b"]
        registry["c"]
    registry.update(x=0, y=0)

    assert {"a", "x", "y"} == registry.keys()


def test_creating_and_holding_is_one_step(limits: dict[str, Any]) -> None:
    """With room for one, a new entry that is leased is there although everything else comes and goes."""
    registry: Registry[str, int] = Registry({"old": 0}, maxsize=1, **limits)
    with registry.lease("new", lambda: 1) as value:
        assert {"new": 1} == registry
        registry["other"] = 2
        assert 1 == registry["new"]
    assert 1 == value
    assert 1 == len(registry)


def test_what_is_written_while_all_are_leased_stays_for_its_writer(limits: dict[str, Any]) -> None:
    """``r[k] = v`` is followed by ``r[k]``: the newest entry does not leave for want of another victim."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, **limits)
    with registry.lease("a"):
        registry["b"] = 2

        assert 2 == registry["b"]
        assert 1 == registry.stats().overflowing
    assert 1 == len(registry)


def test_leases_overlap() -> None:
    """The entry is held until the last lease ends, in whatever order they do."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1)
    first, second = registry.lease("a"), registry.lease("a")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    registry["b"] = 2

    assert "a" in registry
    assert 1 == registry.stats().leased
    second.__exit__(None, None, None)
    second.__exit__(None, None, None)
    registry["c"] = 3

    assert {"c": 3} == registry
    assert 0 == registry.stats().leased


def test_a_lease_is_good_for_one_use() -> None:
    registry: Registry[str, int] = Registry({"a": 1})
    lease = registry.lease("a")
    with lease:
        pass

    with pytest.raises(RuntimeError, match=r"the lease on 'a' was used already; ask the registry for another one"):
        lease.__enter__()
    assert 0 == registry.stats().leased


def test_a_lease_on_nothing_is_a_key_error(limits: dict[str, Any]) -> None:
    registry: Registry[str, int] = Registry(maxsize=1, **limits)
    with pytest.raises(KeyError, match="nobody"), registry.lease("nobody"):
        pass

    assert 0 == registry.stats().leased
    assert {} == registry


def test_the_default_factory_serves_a_lease() -> None:
    registry: Registry[str, list[int]] = Registry(maxsize=1, default_factory=list)
    with registry.lease("a") as value:
        value.append(1)

    assert {"a": [1]} == registry


def test_a_failing_body_ends_the_lease() -> None:
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1)
    with pytest.raises(ArithmeticError), registry.lease("a"):
        raise ArithmeticError

    assert 0 == registry.stats().leased


def test_an_entry_may_be_deleted_while_it_is_leased(limits: dict[str, Any]) -> None:
    """A lease keeps the registry from dropping an entry, not the caller from taking it."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=2, **limits)
    with registry.lease("a") as value:
        assert 1 == registry.pop("a")
        assert 1 == value
    registry.update(x=1, y=2, z=3)

    assert {"y": 2, "z": 3} == registry
    assert 0 == registry.stats().leased


def test_a_leased_entry_may_be_replaced(limits: dict[str, Any]) -> None:
    """The key is held: the new value under it is, too."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, **limits)
    with registry.lease("a"):
        registry["a"] = 2
        registry["b"] = 3
        assert 2 == registry["a"]
    registry["c"] = 4

    assert {"c": 4} == registry


def test_no_room_for_a_new_lease_changes_nothing() -> None:
    """With ``overflow="raise"`` the refused key is neither there nor leased, and may be asked for again."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, overflow="raise")
    with registry.lease("a"):
        with pytest.raises(RegistryFull), registry.lease("b", lambda: 2):
            pass
        assert 1 == registry.stats().leased
    with registry.lease("b", lambda: 2) as value:
        assert 2 == value

    assert {"b": 2} == registry


# Time.


def test_neither_ttl_nor_idle_ends_what_is_leased(clock: ManualClock) -> None:
    """While it is held, an entry has time; the lookups of others find it, too."""
    registry: Registry[str, int] = Registry({"a": 1}, ttl=10, idle=5, timer=clock)
    with registry.lease("a"):
        clock.advance(100)
        assert 0 == registry.expire()
        assert 1 == registry["a"]
        assert "a" in registry
        assert ["a"] == list(registry)


def test_the_ttl_that_ran_out_meanwhile_ends_with_the_lease(clock: ManualClock) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, ttl=10, timer=clock)
    with registry.lease("a"):
        clock.advance(10)

    assert 0 == len(registry)


def test_the_idle_time_begins_with_the_end_of_the_lease(clock: ManualClock) -> None:
    """Holding is using: an entry that was held for longer than *idle* is fresh when it is let go."""
    registry: Registry[str, int] = Registry({"a": 1}, idle=10, timer=clock)
    with registry.lease("a"):
        clock.advance(50)
    assert 1 == len(registry)
    clock.advance(9)
    assert 1 == registry.peek("a")
    clock.advance(1)

    assert registry.peek("a") is None


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
def test_idle_time_under_overlapping_leases(clock: ManualClock, policy: Any) -> None:
    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, idle=10, timer=clock, policy=policy, maxsize=2)
    first, second = registry.lease("a"), registry.lease("a")
    first.__enter__()
    clock.advance(8)
    second.__enter__()
    clock.advance(8)
    first.__exit__()
    assert 1 == registry.expire()
    clock.advance(8)
    second.__exit__()
    clock.advance(9)

    assert {"a": 1} == registry
    assert 0 == registry.expire()


def test_a_write_under_a_lease_starts_the_ttl_anew(clock: ManualClock) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, ttl=10, timer=clock)
    with registry.lease("a"):
        clock.advance(20)
        registry.expire()
        registry["a"] = 2
    clock.advance(9)

    assert 2 == registry["a"]
    clock.advance(1)
    assert "a" not in registry


# Many leases.


class CountingOrder:
    """Counts how often an order is asked for its next victim."""

    def __init__(self, order: Any) -> None:
        self._asked_order = order
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._asked_order, name)

    def __contains__(self, key: object) -> bool:
        return key in self._asked_order

    def pop(self) -> Any:
        self.asked += 1
        return self._asked_order.pop()


@pytest.mark.slow
@pytest.mark.parametrize("asked_for", [None, lambda entry: False], ids=["plain", "busy"])
def test_many_leases_cost_each_insertion_a_constant(asked_for: Any) -> None:
    """With 9,999 of 10,000 entries leased, each of 10,000 insertions looks at a few entries, and the bound is exact."""
    registry: Registry[int, int] = Registry({i: i for i in range(10_000)}, maxsize=10_000, busy=asked_for)
    leases = [registry.lease(i) for i in range(9_999)]
    for lease in leases:
        lease.__enter__()
    registry[-1] = registry[-2] = 0  # from here on the order is kept beside
    assert registry._order is not None
    order = registry._order = CountingOrder(registry._order)  # type: ignore[assignment]
    for i in range(10_000, 20_000):
        registry[i] = i
        assert 10_000 == len(registry)

    assert order.asked < 3 * 10_000
    assert all(i in registry for i in range(9_999))
    for lease in leases:
        lease.__exit__()
    assert 10_000 == len(registry)
    for i in range(20_000, 30_000):
        registry[i] = i
    assert list(range(20_000, 30_000)) == list(registry)


# Single flight.


async def test_ten_tasks_call_the_factory_once() -> None:
    """Whoever asks for a key that is being created waits for it, and gets the same object."""
    registry: Registry[str, object] = Registry(maxsize=1)
    calls: list[object] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def create() -> object:
        calls.append(made := object())
        begun.set()
        await go.wait()
        return made

    async def use() -> object:
        async with registry.lease("a", create) as value:
            return value

    async with asyncio.timeout(20):
        tasks = [asyncio.create_task(use()) for _ in range(10)]
        await begun.wait()
        go.set()
        values = await asyncio.gather(*tasks)

    assert 1 == len(calls)
    assert calls * 10 == values
    assert 0 == registry.stats().leased


def test_ten_threads_call_the_factory_once(together: Callable[..., None]) -> None:
    registry: Registry[str, object] = Registry(maxsize=1)
    calls: list[object] = []
    values: list[object] = []
    arrived = threading.Semaphore(0)

    def create() -> object:
        calls.append(made := object())
        for _ in range(9):
            assert arrived.acquire(timeout=10)  # all the others are on their way
        return made

    def use() -> None:
        arrived.release()
        with registry.lease("a", create) as value:
            values.append(value)

    together(*[use] * 10)

    assert 1 == len(calls)
    assert calls * 10 == values


async def test_a_failing_factory_fails_for_all_who_wait() -> None:
    """Those who wait get the same exception, and the next one who asks tries again."""
    registry: Registry[str, int] = Registry(maxsize=1)
    calls = 0
    begun, go = asyncio.Event(), asyncio.Event()

    async def create() -> int:
        nonlocal calls
        calls += 1
        begun.set()
        await go.wait()
        raise ConnectionError("no server")

    async def use() -> int:
        async with registry.lease("a", create) as value:
            return value

    async with asyncio.timeout(20):
        tasks = [asyncio.create_task(use()) for _ in range(5)]
        await begun.wait()
        go.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert 1 == calls
    assert ["no server"] * 5 == [str(outcome) for outcome in outcomes]
    async with registry.lease("a", lambda: 7) as value:
        assert 7 == value


@pytest.mark.parametrize("survivors", [0, 1, 5])
async def test_a_cancelled_creator_hands_over(survivors: int) -> None:
    """If the one who creates is cancelled, one of those who wait creates in its place."""
    registry: Registry[str, int] = Registry(maxsize=1)
    calls = 0
    begun, go = asyncio.Event(), asyncio.Event()

    async def create() -> int:
        nonlocal calls
        calls += 1
        begun.set()
        await go.wait()
        return calls

    async def use() -> int:
        async with registry.lease("a", create) as value:
            return value

    async with asyncio.timeout(20):
        creator = asyncio.create_task(use())
        await begun.wait()
        waiting = [asyncio.create_task(use()) for _ in range(survivors)]
        await asyncio.sleep(0)
        creator.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creator
        go.set()
        values = await asyncio.gather(*waiting)

    assert [2] * survivors == values
    assert {} == registry._flights
    assert 0 == registry.stats().leased


async def test_a_cancelled_waiter_disturbs_nobody() -> None:
    registry: Registry[str, int] = Registry(maxsize=1)
    calls = 0
    begun, go = asyncio.Event(), asyncio.Event()

    async def create() -> int:
        nonlocal calls
        calls += 1
        begun.set()
        await go.wait()
        return calls

    async def use() -> int:
        async with registry.lease("a", create) as value:
            return value

    async with asyncio.timeout(20):
        creator = asyncio.create_task(use())
        await begun.wait()
        waiters = [asyncio.create_task(use()) for _ in range(3)]
        await asyncio.sleep(0)
        waiters[1].cancel()
        await asyncio.wait([waiters[1]])
        go.set()
        values = await asyncio.gather(creator, waiters[0], waiters[2])

    assert waiters[1].cancelled()
    assert [1, 1, 1] == values
    assert 0 == registry.stats().leased


async def test_a_creation_that_asks_for_itself_is_refused() -> None:
    """It would wait for ever, so it is told."""
    registry: Registry[str, int] = Registry(maxsize=1)

    def create() -> int:
        with registry.lease("a", create) as value:
            return value

    async def acreate() -> int:
        async with registry.lease("b", acreate) as value:
            return value

    with pytest.raises(RuntimeError, match="creating 'a' asks for 'a' itself"), registry.lease("a", create):
        pass
    with pytest.raises(RuntimeError, match="creating 'b' asks for 'b' itself"):
        async with asyncio.timeout(20), registry.lease("b", acreate):
            pass

    assert {} == registry._flights


async def test_a_plain_with_does_not_wait_for_its_own_loop() -> None:
    """``with`` in a task cannot wait for another task of the same loop: it says to use ``async with``."""
    registry: Registry[str, int] = Registry(maxsize=1)
    started, go = asyncio.Event(), asyncio.Event()

    async def create() -> int:
        started.set()
        await go.wait()
        return 1

    async def use() -> int:
        async with registry.lease("a", create) as value:
            return value

    async with asyncio.timeout(20):
        creator = asyncio.create_task(use())
        await started.wait()
        with pytest.raises(RuntimeError, match="use `async with`"), registry.lease("a", lambda: 2):
            pass
        go.set()
        assert 1 == await creator


async def test_an_asynchronous_factory_needs_async_with() -> None:
    registry: Registry[str, Any] = Registry(maxsize=1)

    async def create() -> int:
        return 1

    with (
        pytest.raises(TypeError, match=r"create for key 'a' is asynchronous: use `async with`"),
        registry.lease("a", create),
    ):
        pass
    gc.collect()  # a coroutine that was never awaited would warn here

    assert {} == registry


async def test_a_thread_waits_for_a_task_and_a_task_for_a_thread() -> None:
    """Creation is single across threads and loops."""
    registry: Registry[str, str] = Registry(maxsize=2)
    started, go = asyncio.Event(), asyncio.Event()
    begun, proceed = threading.Event(), threading.Event()

    async def in_task() -> str:
        started.set()
        await go.wait()
        return "made by a task"

    def in_thread() -> str:
        begun.set()
        assert proceed.wait(10)
        return "made by a thread"

    def lease(key: str, create: Callable[[], str]) -> str:
        with registry.lease(key, create) as value:
            return value

    async def alease(key: str, create: Any) -> str:
        async with registry.lease(key, create) as value:
            return value

    async with asyncio.timeout(20):
        task = asyncio.create_task(alease("a", in_task))
        await started.wait()
        thread = asyncio.create_task(asyncio.to_thread(lease, "a", lambda: "never"))
        await asyncio.sleep(0)
        go.set()
        assert ["made by a task"] * 2 == await asyncio.gather(task, thread)

        thread = asyncio.create_task(asyncio.to_thread(lease, "b", in_thread))
        await asyncio.to_thread(begun.wait, 10)
        task = asyncio.create_task(alease("b", lambda: "never"))
        await asyncio.sleep(0)
        proceed.set()
        assert ["made by a thread"] * 2 == await asyncio.gather(task, thread)


async def test_a_lease_may_end_in_another_task() -> None:
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1)
    lease = registry.lease("a")
    await asyncio.create_task(lease.__aenter__())
    assert 1 == registry.stats().leased
    await asyncio.create_task(lease.__aexit__(None, None, None))

    assert 0 == registry.stats().leased


def test_a_lease_may_end_in_another_thread(elsewhere: Callable[..., Any]) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1)
    lease = registry.lease("a")
    elsewhere(lease.__enter__)
    lease.__exit__()

    assert 0 == registry.stats().leased


def test_a_factory_runs_with_the_lock_free(elsewhere: Callable[..., Any]) -> None:
    """Creating one key keeps nobody from using others."""
    registry: Registry[str, int] = Registry(maxsize=3)

    def create() -> int:
        elsewhere(registry.__setitem__, "other", 1)
        with registry.lease("nested", lambda: 2):
            return elsewhere(lambda: registry.lease("other").__enter__())  # type: ignore[no-any-return]

    with registry.lease("a", create) as value:
        assert 1 == value


def test_a_value_written_while_it_is_created_wins() -> None:
    """The lease gets what is in the registry, never a second object beside it."""
    registry: Registry[str, object] = Registry(maxsize=1)
    written = object()

    def create() -> object:
        registry["a"] = written
        return object()

    with registry.lease("a", create) as value:
        assert written is value
        assert written is registry["a"]


def test_a_finished_lease_keeps_nothing_alive(no_collector: None) -> None:
    class Value:
        pass

    registry: Registry[str, Value] = Registry(maxsize=1)
    lease = registry.lease("a", Value)
    with lease as value:
        watched = weakref.ref(value)
    del value
    registry["b"] = Value()

    assert watched() is None


async def test_a_failed_creation_keeps_nothing_alive(no_collector: None) -> None:
    """Neither the flight nor its exception holds the registry."""
    registry: Registry[str, int] = Registry(maxsize=1)
    watched = weakref.ref(registry)

    def fail() -> int:
        raise ConnectionError

    try:
        with registry.lease("a", fail):
            pass
    except ConnectionError:
        pass
    del registry

    assert watched() is None


@pytest.mark.parametrize("limits", [{}, {"maxsize": 2}, {"idle": 60, "on_evict": print}])
def test_a_lease_whose_finalizer_was_faster_ends_once(limits: dict[str, Any]) -> None:
    """A collection may run the finalizer of a dropped task's lease before the end of its block."""
    registry: Registry[str, list[str]] = Registry(**limits)
    lease = registry.lease("ann", create=list)
    lease.__enter__()
    with registry.lease("ann"):
        lease.__del__()  # type: ignore[attr-defined] # an entered lease has one
        lease.__exit__(None, None, None)

        assert 1 == registry.stats().leased
    assert 0 == registry.stats().leased
