"""What is in use is not taken away: it is skipped, and the next one leaves."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.errors import HygieneError, RegistryFull
from hygiene.events import Cause, Entry
from hygiene.registry import Registry, referenced
from hygiene.testing import ManualClock

POLICIES: dict[str, dict[str, Any]] = {
    "lru": {},
    "fifo": {"policy": "fifo"},
    "lfu": {"policy": "lfu"},
    "importance": {"policy": "importance", "importance": lambda entry: 0},
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> dict[str, Any]:
    return POLICIES[request.param]


class Session:
    """A value that knows whether it is in use, in several ways."""

    def __init__(self, *, running: bool = False) -> None:
        self.running = running

    def is_running(self) -> bool:
        return self.running


WAYS: dict[str, Any] = {
    "callable": lambda entry: entry.value.running,
    "attribute": "running",
    "method": "is_running",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_busy_entry_is_skipped(policy: dict[str, Any], way: str) -> None:
    """Whether it says so by a callable, an attribute or a method: it stays, and the next one leaves."""
    registry: Registry[str, Session] = Registry(maxsize=2, busy=WAYS[way], **policy)
    registry["busy"] = Session(running=True)
    registry["free"] = Session()
    for i in range(5):
        registry[f"new {i}"] = Session()

    assert "busy" in registry
    assert 2 == len(registry)
    registry.peek("busy").running = False
    for i in range(5, 25):
        registry[f"new {i}"] = Session()

    assert "busy" not in registry
    assert 2 == len(registry)


def test_a_lock_that_is_held_stays() -> None:
    registry: Registry[str, Any] = Registry(maxsize=1, busy="locked", revive=False)
    registry["a"] = lock = threading.Lock()
    with lock:
        registry["b"] = threading.Lock()
        assert lock is registry.peek("a")
    registry["c"] = threading.Lock()
    registry["d"] = threading.Lock()

    assert registry.peek("a") is None
    assert 1 == len(registry)


def test_the_callable_is_given_key_value_and_owner() -> None:
    asked: list[Entry[str, int]] = []

    def busy(entry: Entry[str, int]) -> bool:
        asked.append(entry)
        return False

    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, busy=busy)
    registry["b"] = 2

    assert [Entry("a", 1, None)] == asked


def test_values_without_the_attribute_are_free() -> None:
    """A name given for *busy* applies to the values that have it."""
    registry: Registry[str, Any] = Registry({"a": 1, "b": Session(running=True)}, maxsize=2, busy="is_running")
    registry["c"] = 3

    assert {"b", "c"} == registry.keys()


def test_busy_when_met_counts_as_used() -> None:
    """What the sweep finds busy is as recent as if it had been used at that moment."""
    busy_ones = {"a"}
    registry: Registry[str, int] = Registry(
        dict.fromkeys("abcd", 0), maxsize=4, busy=lambda entry: entry.key in busy_ones
    )
    registry["e"] = 0  # meets a, takes b
    busy_ones.clear()
    registry["f"] = 0
    registry["g"] = 0

    assert {"a", "e", "f", "g"} == registry.keys()


# All of them.


def test_all_busy_grows_beyond_the_bound_and_says_so_once(
    caplog: pytest.LogCaptureFixture, policy: dict[str, Any]
) -> None:
    """Nothing in use is lost: the bound is exceeded, counted, and logged once until it holds again."""
    busy = True
    registry: Registry[int, int] = Registry(maxsize=2, busy=lambda entry: busy, name="sessions", **policy)
    with caplog.at_level(logging.WARNING, logger="hygiene"):
        for i in range(5):
            registry[i] = i
        assert 5 == len(registry)
        assert 3 == registry.stats().overflowing
        assert 1 == len(caplog.records)
        assert "registry sessions exceeds its bound" in caplog.text
        assert {"registry": "sessions", "entries": 3}.items() <= caplog.records[0].__dict__.items()
        busy = False
        for i in range(5, 8):
            registry[i] = i
        assert 2 == len(registry)
        assert 0 == registry.stats().overflowing
        busy = True
        registry[8] = 8
        assert 2 == len(caplog.records)


def test_the_bound_is_restored_when_they_are_free() -> None:
    """However many were busy: once they are not, writes bring the registry back to its bound."""
    busy = True
    registry: Registry[int, int] = Registry(maxsize=10, busy=lambda entry: busy)
    for i in range(500):
        registry[i] = i
    assert 500 == len(registry)
    busy = False
    for i in range(500, 600):
        registry[i] = i

    assert list(range(590, 600)) == list(registry)


def test_all_busy_can_refuse_the_new(policy: dict[str, Any]) -> None:
    """With ``overflow="raise"`` the writer is told, and nothing has changed."""
    told: list[Any] = []
    busy = True
    registry: Registry[str, int] = Registry(
        {"a": 1, "b": 2},
        maxsize=2,
        busy=lambda entry: busy,
        overflow="raise",
        on_evict=told.append,
        name="outbox",
        **policy,
    )
    before = registry.stats()
    with pytest.raises(
        RegistryFull, match=r"registry outbox is full, so 'c' was not added: 2 of 2 entries.*raise maxsize"
    ) as caught:
        registry["c"] = 3
    with pytest.raises(RegistryFull):
        registry.setdefault("c", 3)
    with pytest.raises(RegistryFull):
        registry.update(c=3)

    assert isinstance(caught.value, HygieneError)
    assert before == caught.value.stats
    assert {"a": 1, "b": 2} == registry
    assert [] == told
    registry["a"] = 10  # a present key needs no room
    busy = False
    registry["c"] = 3
    assert 2 == len(registry)
    assert [Cause.REPLACED, Cause.SIZE] == [removal.cause for removal in told]


def test_policy_none_refuses_the_new_instead_of_dropping_the_old() -> None:
    """An unsent message must not vanish."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, policy="none", overflow="raise")
    with pytest.raises(RegistryFull):
        registry["b"] = 2
    assert {"a": 1} == registry
    registry["a"] = 2
    del registry["a"]
    registry["b"] = 2

    assert {"b": 2} == registry


def test_refused_for_its_bytes_changes_nothing() -> None:
    """If not enough can leave for a large value, nothing leaves."""
    told: list[Any] = []
    registry: Registry[str, str] = Registry(
        max_bytes=10, getsizeof=len, overflow="raise", on_evict=told.append, busy=lambda entry: entry.key == "busy"
    )
    registry["free"] = "xxx"
    registry["busy"] = "xxxxxx"
    with pytest.raises(RegistryFull):
        registry["large"] = "xxxxxxx"
    with pytest.raises(RegistryFull):
        registry["free"] = "xxxxxxx"
    with pytest.raises(RegistryFull):
        registry["huge"] = "x" * 11

    assert {"free": "xxx", "busy": "xxxxxx"} == registry
    assert 9 == registry.stats().bytes
    assert [] == told
    registry["fits"] = "xxxx"
    assert {"busy": "xxxxxx", "fits": "xxxx"} == registry


def test_refused_for_its_bytes_beside_a_lease_changes_nothing() -> None:
    told: list[Any] = []
    registry: Registry[str, str] = Registry(
        {"free": "xxx", "leased": "xxxxxx"}, max_bytes=10, getsizeof=len, overflow="raise", on_evict=told.append
    )
    with registry.lease("leased"), pytest.raises(RegistryFull):
        registry["large"] = "xxxxxxx"

    assert {"free": "xxx", "leased": "xxxxxx"} == registry
    assert [] == told


# Time.


@pytest.mark.parametrize("limits", [{"ttl": 10}, {"idle": 10}, {"ttl": 10, "idle": 10}])
def test_a_busy_entry_does_not_expire(clock: ManualClock, limits: dict[str, Any], policy: dict[str, Any]) -> None:
    """Expiry asks, too; the entry leaves when its time is over and it is free."""
    busy = True
    registry: Registry[str, int] = Registry({"a": 1}, busy=lambda entry: busy, timer=clock, **limits, **policy)
    clock.advance(10)
    assert 0 == registry.expire()
    assert 1 == registry["a"]
    clock.advance(10)
    assert "a" in registry
    busy = False
    clock.advance(10)

    assert "a" not in registry
    assert 0 == len(registry)


def test_busy_counts_as_use_for_the_idle_time(clock: ManualClock) -> None:
    """The idle time begins when it was last found busy."""
    busy = True
    registry: Registry[str, int] = Registry({"a": 1}, busy=lambda entry: busy, idle=10, timer=clock)
    clock.advance(10)
    assert 0 == registry.expire()
    busy = False
    clock.advance(9)
    assert "a" in registry
    clock.advance(1)

    assert "a" not in registry


# Cost.


def test_busy_is_asked_a_constant_number_of_times() -> None:
    """With 990 of 1,000 entries busy, each insertion asks about a handful, not about all of them."""
    asked = 0

    def busy(entry: Entry[int, int]) -> bool:
        nonlocal asked
        asked += 1
        return entry.key < 990

    registry: Registry[int, int] = Registry({i: i for i in range(1000)}, maxsize=1000, busy=busy)
    asked = 0
    for i in range(1000, 3000):
        registry[i] = i
    assert 1000 == len(registry)

    assert asked < 2000 * 25


def test_reads_ask_nothing() -> None:
    asked: list[Any] = []
    registry: Registry[int, int] = Registry({i: i for i in range(10)}, maxsize=10, busy=asked.append)
    for i in range(10):
        registry[i]
        registry.get(i)
        assert i in registry

    assert [] == asked


# Failing and calling back.


def test_a_raising_busy_keeps_the_entry(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot answer is treated as busy: nothing in use may be lost. The writer is not disturbed."""

    def busy(entry: Entry[str, int]) -> bool:
        if entry.key == "odd":
            raise ArithmeticError("cannot say")
        return False

    registry: Registry[str, int] = Registry({"odd": 1, "b": 2}, maxsize=2, busy=busy, name="sessions")
    registry["c"] = 3

    assert {"odd", "c"} == registry.keys()
    assert registry.stats().hook_errors >= 1
    assert "busy of registry sessions raised for key 'odd'" in caplog.text


def test_busy_runs_with_the_lock_free(
    elsewhere: Callable[..., Any], policy: dict[str, Any], clock: ManualClock
) -> None:
    """The answer may come from another thread that uses the registry."""
    inside: list[Any] = []

    def busy(entry: Entry[str, int]) -> bool:
        if not inside:
            inside.append(entry.key)
            elsewhere(registry.get, "b")
            elsewhere(registry.__setitem__, "b", 3)
            elsewhere(lambda: registry.lease("b").__enter__())
        return False

    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, maxsize=2, ttl=60, timer=clock, busy=busy, **policy)
    registry["c"] = 3

    assert inside
    assert "b" in registry
    assert 0 == registry.stats().hook_errors
    assert len(registry) <= 2


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda r: r["a"],
        lambda r: r.__setitem__("a", 9),
        lambda r: r.touch("a"),
        lambda r: r.lease("a").__enter__(),
    ],
    ids=["read", "write", "touch", "lease"],
)
def test_what_is_used_while_it_is_asked_about_stays(meanwhile: Callable[[Any], Any]) -> None:
    """Between the question and the eviction the entry may come into use: then it stays."""
    asked: list[str] = []

    def busy(entry: Entry[str, int]) -> bool:
        asked.append(entry.key)
        if asked == ["a"]:
            user = threading.Thread(target=meanwhile, args=(registry,))
            user.start()
            user.join(10)
        return False

    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, maxsize=2, busy=busy)
    registry["c"] = 3

    assert {"a", "c"} == registry.keys()


def test_what_is_deleted_while_it_is_asked_about_is_told_once() -> None:
    told: list[Any] = []

    def busy(entry: Entry[str, int]) -> bool:
        registry.pop(entry.key, None)
        return False

    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, maxsize=2, busy=busy, on_evict=told.append)
    registry["c"] = 3

    assert [("a", Cause.DELETED)] == [(removal.key, removal.cause) for removal in told]
    assert {"b", "c"} == registry.keys()


# Held by reference.


class Plain:
    pass


@pytest.mark.parametrize(
    "make", [dict, list, set, Plain, lambda: [[1], {"a": 2}]], ids=["dict", "list", "set", "object", "nested"]
)
@pytest.mark.parametrize(
    "limits",
    [{}, {"ttl": 60}, {"max_bytes": 10**9}, {"on_evict": lambda removal: None}],
    ids=["plain", "ttl", "bytes", "told"],
)
@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_a_value_that_somebody_holds_stays(make: Callable[[], Any], limits: dict[str, Any], policy: Any) -> None:
    """``busy=referenced`` works for plain dicts and lists, which cannot be weakly referenced."""
    registry: Registry[str, Any] = Registry(maxsize=2, busy=referenced, revive=False, policy=policy, **limits)
    registry["held"] = make()
    held = registry["held"]
    for i in range(10):
        registry[f"free {i}"] = make()
        assert len(registry) <= 2

    assert held is registry.peek("held")
    del held
    for i in range(20):
        registry[f"free again {i}"] = make()

    assert "held" not in registry
    assert 2 == len(registry)


def test_values_that_nobody_holds_are_free_from_the_start() -> None:
    registry: Registry[int, dict[str, int]] = Registry(maxsize=3, busy=referenced)
    for i in range(10):
        registry[i] = {"n": i}

    assert [7, 8, 9] == list(registry)


def test_shared_constants_do_not_count_as_held() -> None:
    """``None`` and small numbers belong to CPython: everybody holds them, so nobody does."""
    registry: Registry[int, Any] = Registry(maxsize=2, busy=referenced)
    for i in range(6):
        registry[i] = None

    assert len(registry) == 2 or referenced(Entry(0, None))


def test_referenced_asks_for_trim_and_evict_too() -> None:
    registry: Registry[str, list[int]] = Registry({"a": [1], "b": [2]}, busy=referenced)
    held = registry["a"]

    assert not registry.evict("a")
    assert registry.evict("b")
    assert 0 == registry.trim(0)
    assert held == [1]
    del held
    assert registry.evict("a")


async def test_a_task_that_holds_a_value_across_await_keeps_it() -> None:
    """The turn of a conversation: fetched, awaited, changed; meanwhile hundreds of others come by."""
    registry: Registry[int, list[str]] = Registry(maxsize=5, busy=referenced, default_factory=list)

    async def turn(user: int) -> None:
        messages = registry[user]
        for i in range(3):
            await asyncio.sleep(0)
            messages.append(f"message {i}")
        assert messages is registry[user]

    async with asyncio.timeout(20):
        await asyncio.gather(*[turn(user) for user in range(50)])
    for user in range(1000, 1100):
        registry[user]

    assert 5 == len(registry)


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
@pytest.mark.parametrize("limits", [{}, {"ttl": 60}, {"idle": 60}], ids=["size", "ttl", "idle"])
def test_busy_may_look_into_its_own_registry(policy: Any, limits: dict[str, Any], clock: ManualClock) -> None:
    """To be asked about is no use: `busy=lambda e: e.owner.locks[e.key].locked()` asks once, and gets its answer."""
    asked: list[int] = []

    def busy(entry: Entry[int, str]) -> bool:
        asked.append(entry.key)
        return registry[entry.key] == "busy" or registry.get(entry.key) == "busy" or entry.key not in registry

    registry: Registry[int, str] = Registry(maxsize=3, busy=busy, policy=policy, timer=clock, **limits)
    for key in range(20):
        registry[key] = "busy" if key == 1 else "free"
    clock.advance(60)
    registry.expire()

    assert "busy" == registry.peek(1)
    assert len(registry) == (1 if limits else 3)
    assert len(asked) < 200
