"""An evicted value that somebody still holds is the same object on the next lookup."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.registry import Registry
from hygiene.testing import ManualClock


class Value:
    """Something that can be weakly referenced."""


FLAVOURS: dict[str, dict[str, Any]] = {
    "lru": {},
    "fifo": {"policy": "fifo"},
    "lfu": {"policy": "lfu"},
    "ttl": {"ttl": 60},
    "told": {"on_evict": lambda removal: None},
    "bytes": {"max_bytes": 10**9},
    "busy": {"busy": lambda entry: False},
    "raise": {"overflow": "raise"},
}


@pytest.fixture(params=FLAVOURS)
def limits(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FLAVOURS[request.param]


LOOKUPS: dict[str, Callable[[Registry[Any, Any], Any], Any]] = {
    "[]": lambda r, key: r[key],
    "get": lambda r, key: r.get(key),
    "setdefault": lambda r, key: r.setdefault(key, Value()),
    "lease": lambda r, key: r.lease(key).__enter__(),
    "lease with create": lambda r, key: r.lease(key, Value).__enter__(),
    "in, then []": lambda r, key: key in r and r[key],
    "pop": lambda r, key: r.pop(key),
}


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_an_evicted_value_that_is_held_is_found_again(limits: dict[str, Any], lookup: str) -> None:
    """Every way of looking a key up finds the value that others still work with."""
    registry: Registry[str, Value] = Registry(maxsize=1, **limits)
    held = registry["a"] = Value()
    registry["b"] = Value()
    assert ["b"] == list(registry)

    assert held is LOOKUPS[lookup](registry, "a")
    assert len(registry) <= 1


def test_a_revived_value_is_in_the_registry_again() -> None:
    """It is an entry like any other: bounded, the most recent, and counted."""
    registry: Registry[str, Value] = Registry(maxsize=2)
    held = [registry.setdefault(key, Value()) for key in "abc"]
    assert "a" in registry

    assert ["c", "a"] == list(registry)
    assert held[0] is registry["a"]
    assert (1, 1) == (registry.stats().rehydrated, registry.stats().hits)


def test_a_value_that_nobody_holds_is_gone(no_collector: None) -> None:
    """Reviving keeps nothing alive: the last reference of others is the end of the value."""
    registry: Registry[str, Value] = Registry(maxsize=1)
    held = registry["a"] = Value()
    watched = weakref.ref(held)
    registry["b"] = Value()
    del held

    assert watched() is None
    assert "a" not in registry
    assert registry.get("a") is None


@pytest.mark.parametrize(
    "remove", [lambda r: r.pop("a"), lambda r: r.clear(), lambda r: r.close(), lambda r: r.__delitem__("a")]
)
def test_what_the_caller_removed_is_not_revived(limits: dict[str, Any], remove: Callable[[Any], Any]) -> None:
    """``del`` means gone, whoever holds the value."""
    registry: Registry[str, Value] = Registry(maxsize=1, **limits)
    held = registry["a"] = Value()
    remove(registry)

    assert held is not registry.get("a")
    assert "a" not in registry


@pytest.mark.parametrize(
    "remove", [lambda r: r.pop("a"), lambda r: r.clear(), lambda r: r.close(), lambda r: r.__delitem__("a")]
)
def test_removing_reaches_the_evicted_too(limits: dict[str, Any], remove: Callable[[Any], Any]) -> None:
    """After ``del r[k]`` the key is gone, also where its value had been evicted and is still held."""
    registry: Registry[str, Value] = Registry(maxsize=1, **limits)
    held = registry["a"] = Value()
    registry["b"] = Value()
    remove(registry)

    assert "a" not in registry
    assert held is not registry.get("a")


def test_a_written_value_wins_over_the_evicted_one(limits: dict[str, Any]) -> None:
    registry: Registry[str, Value] = Registry(maxsize=1, **limits)
    old = registry["a"] = Value()
    registry["b"] = Value()
    new = registry["a"] = Value()
    registry["b"] = Value()

    assert new is registry["a"]
    assert old is not new


def test_an_expired_value_is_not_revived(clock: ManualClock) -> None:
    """Time is over for whoever holds the value, too."""
    registry: Registry[str, Value] = Registry(maxsize=1, ttl=10, timer=clock)
    held = registry["a"] = Value()
    clock.advance(10)

    assert registry.get("a") is None
    assert "a" not in registry
    assert held is not None


def test_an_evicted_value_is_not_revived_beyond_its_time(clock: ManualClock) -> None:
    """A lookup never returns what would have expired: eviction is no way to live longer."""
    registry: Registry[str, Value] = Registry(maxsize=1, ttl=10, timer=clock)
    held = registry["a"] = Value()
    clock.advance(5)
    registry["b"] = Value()
    clock.advance(5)

    assert registry.get("a") is not held


def test_reviving_is_no_write(clock: ManualClock) -> None:
    """``ttl`` counts from the last write, not from the return of an evicted value."""
    registry: Registry[str, Value] = Registry(maxsize=1, ttl=10, timer=clock)
    held = registry["a"] = Value()
    clock.advance(5)
    registry["b"] = Value()
    assert held is registry["a"]
    clock.advance(5)

    assert registry.get("a") is not held


def test_what_is_closed_is_not_revived() -> None:
    """Nobody is given a value that has been released."""
    closed: list[Value] = []
    registry: Registry[str, Value] = Registry(maxsize=1, close=closed.append)
    held = registry["a"] = Value()
    registry["b"] = Value()

    assert [held] == closed
    assert registry.get("a") is None


def test_a_value_comes_back_as_it_was_converted() -> None:
    """What *values* has made of it when it was put in is not converted a second time."""

    class Box:
        def __init__(self, content: object) -> None:
            self.content = content

    registry: Registry[str, Box] = Registry(maxsize=1, values=lambda value: Box(content=value))
    held = registry.setdefault("a", 1)
    registry["b"] = 2  # type: ignore[assignment]

    assert held is registry["a"]
    assert 1 == held.content


def test_what_was_evicted_while_a_default_was_made_is_the_value() -> None:
    """Between the look-up and the default, the value may have come and gone: whoever holds it decides."""

    class Value:
        pass

    held: list[Value] = []

    def make() -> Value:
        if not held:
            held.append(Value())
            registry["a"] = held[0]
            registry["b"] = Value()
        return Value()

    registry: Registry[str, Value] = Registry(maxsize=1, default_factory=make)
    registry.setdefault("c", Value())

    found = registry["a"]

    assert held[0] is found


def test_reviving_can_be_switched_off() -> None:
    registry: Registry[str, Value] = Registry(maxsize=1, revive=False)
    held = registry["a"] = Value()
    registry["b"] = Value()

    assert registry.get("a") is not held


@pytest.mark.parametrize("how", ["[]", "setdefault", "lease"])
@pytest.mark.parametrize("limits", [{}, {"policy": "lfu"}, {"ttl": 60}], ids=["lru", "lfu", "ttl"])
def test_locks_per_key_never_have_two_holders(
    together: Callable[..., None], hasty: None, limits: dict[str, Any], how: str
) -> None:
    """Eight threads over four keys with room for two: who holds a key's lock holds it alone."""
    locks: Registry[int, threading.Lock] = Registry(maxsize=2, default_factory=threading.Lock, **limits)
    holders = [0] * 4
    broken: list[int] = []

    def find(key: int) -> threading.Lock:
        if how == "[]":
            return locks[key]
        if how == "setdefault":
            return locks.setdefault(key, threading.Lock())
        with locks.lease(key) as lock:
            return lock

    def work(seed: int) -> None:
        for i in range(400):
            key = (seed + i * 7 + i // 3) % 4
            with find(key):
                holders[key] += 1
                if holders[key] != 1:
                    broken.append(key)
                holders[key] -= 1

    together(*[lambda seed=seed: work(seed) for seed in range(8)])

    assert [] == broken
    assert len(locks) <= 2


async def test_locks_per_key_for_tasks_never_have_two_holders() -> None:
    """A lock that a task is about to take is not replaced by another while it waits its turn."""
    locks: Registry[int, asyncio.Lock] = Registry(maxsize=2, default_factory=asyncio.Lock)
    holders = [0] * 5
    most = 0

    async def work(seed: int) -> None:
        nonlocal most
        for i in range(20):
            key = (seed + i) % 5
            lock = locks[key]
            await asyncio.sleep(0)  # fetched, not taken yet
            async with lock:
                holders[key] += 1
                most = max(most, holders[key])
                await asyncio.sleep(0)
                holders[key] -= 1

    async with asyncio.timeout(20):
        await asyncio.gather(*[work(seed) for seed in range(20)])

    assert 1 == most
    assert len(locks) <= 2
