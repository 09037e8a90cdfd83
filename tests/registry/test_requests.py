"""What is asked of a registry by name: trim, evict, touch, peek, stats; bytes; and policies by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import cachetools
import pytest

from hygiene.events import Cause, RegistryStats
from hygiene.registry import Registry
from hygiene.testing import ManualClock


def numbers(count: int, **limits: Any) -> Registry[int, int]:
    return Registry({i: i for i in range(count)}, **limits)


@pytest.mark.parametrize(
    ("to", "left"),
    [(3, 3), (0, 0), (10, 10), (99, 10), ("50%", 5), ("0%", 0), ("100%", 10), ("33.3%", 3), (" 20% ", 2)],
)
def test_trim_evicts_down_to_its_target(to: Any, left: int) -> None:
    """A number of entries, or a share of those present; the least recently used leave."""
    registry = numbers(10)

    assert 10 - left == registry.trim(to)
    assert list(range(10 - left, 10)) == list(registry)
    assert {Cause.PRESSURE: 10 - left} if left < 10 else {} == dict(registry.stats().evictions)


def test_trim_to_bytes() -> None:
    registry: Registry[int, str] = Registry(dict.fromkeys(range(10), "xx"), max_bytes="1kB", getsizeof=len)

    assert 5 == registry.trim("10B")
    assert 10 == registry.stats().bytes


def test_trim_drops_many_that_were_busy() -> None:
    """Hundreds that were busy and are free now leave at one request."""
    busy = True
    registry = numbers(0, maxsize=10, busy=lambda entry: busy)
    registry.update({i: i for i in range(500)})
    assert 500 == len(registry)
    busy = False

    assert 490 == registry.trim(10)
    assert 10 == len(registry)


def test_evict_drops_one() -> None:
    told: list[Any] = []
    registry = numbers(3, on_evict=told.append, close=told.append)

    assert registry.evict(1)
    assert not registry.evict(1)
    assert not registry.evict(99)
    assert {0: 0, 2: 2} == registry
    assert Cause.PRESSURE is told[0].cause
    assert 1 == told[1]


def test_touch_counts_as_use_and_not_as_a_hit() -> None:
    registry = numbers(3, maxsize=3)

    assert registry.touch(0)
    assert not registry.touch(99)
    registry[3] = 3
    assert {0, 2, 3} == registry.keys()
    assert (0, 0) == (registry.stats().hits, registry.stats().misses)


def test_peek_is_neither() -> None:
    registry = numbers(3, maxsize=3)

    assert 0 == registry.peek(0)
    assert registry.peek(99) is None
    assert "none" == registry.peek(99, "none")
    registry[3] = 3
    assert {1, 2, 3} == registry.keys()
    assert (0, 0) == (registry.stats().hits, registry.stats().misses)


def test_expire_without_time_limits_drops_nothing() -> None:
    assert 0 == numbers(3).expire()


def test_stats_are_a_frozen_snapshot(clock: ManualClock) -> None:
    registry = numbers(3, maxsize=3, ttl=60, timer=clock)
    registry[0]
    registry.get(99)
    registry[3] = 3
    with registry.lease(3):
        stats = registry.stats()

    wanted = RegistryStats(
        entries=3,
        bytes=None,
        hits=2,
        misses=1,
        rehydrated=0,
        evictions={Cause.SIZE: 1},
        leased=1,
        overflowing=0,
        hook_errors=0,
    )
    assert wanted == stats
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.hits = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        stats.evictions[Cause.SIZE] = 0  # type: ignore[index]


# Policies by hand.


def test_lru_is_exact() -> None:
    registry = numbers(4, maxsize=4)
    for key in (0, 2, 0):
        registry[key]
    registry.get(1)
    registry.setdefault(3, 9)
    order = []
    for new in range(10, 14):
        before = set(registry)
        registry[new] = 0
        order += before - set(registry)

    assert [2, 0, 1, 3] == order


def test_fifo_ignores_use_and_overwriting() -> None:
    registry = numbers(3, maxsize=3, policy="fifo")
    registry[0]
    registry[0] = 9
    registry.touch(0)
    registry[3] = 3

    assert [1, 2, 3] == list(registry)


def test_lfu_keeps_what_is_used_most() -> None:
    registry = numbers(3, maxsize=3, policy="lfu")
    for key in (0, 0, 2):
        registry[key]
    registry[3] = 3
    registry[4] = 4

    assert {0, 2, 4} == registry.keys()


def test_importance_keeps_what_matters_most() -> None:
    """Least important first, among equals the oldest; `touch` asks anew."""
    ranks = {i: i % 3 for i in range(6)}
    registry = numbers(0, maxsize=6, policy="importance", importance=lambda entry: ranks[entry.key])
    registry.update({i: i for i in range(6)})
    ranks[0] = 9
    registry.touch(0)

    assert 3 == registry.trim(3)
    assert {0, 2, 5} == registry.keys()


def test_a_low_newcomer_leaves_with_the_next_write() -> None:
    """The newest entry stays for its writer; after that, its importance is what counts."""
    ranks = {"high": 9, "middle": 5, "low": 1, "next": 7}
    registry: Registry[str, int] = Registry(maxsize=2, policy="importance", importance=lambda entry: ranks[entry.key])
    registry.update(high=0, middle=0)
    registry["low"] = 0
    assert {"high", "low"} == registry.keys()
    registry["next"] = 0

    assert {"high", "next"} == registry.keys()


def test_a_raising_importance_keeps_the_entry() -> None:
    """What cannot be ranked is not lost for it; the writer is not disturbed."""
    registry = numbers(0, maxsize=2, policy="importance", importance=lambda entry: 1 / entry.key)
    registry.update({0: 0, 1: 1, 2: 2, 3: 3})

    assert 0 in registry
    assert 2 == len(registry)
    assert 1 == registry.stats().hook_errors


class NewestFirst(cachetools.Cache[Any, Any]):
    """A policy of somebody's own: the key that sorts last leaves first."""

    def popitem(self) -> Any:
        if not self:
            raise KeyError("empty")
        key = max(self)
        return key, self.pop(key)


class Forgetful(cachetools.Cache[Any, Any]):
    """A cache that drops keys by itself."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) > 2:
            self.clear()
        super().__setitem__(key, value)


def test_a_cachetools_class_decides() -> None:
    registry = numbers(3, maxsize=3, policy=NewestFirst)
    registry[-1] = 0
    registry[5] = 5

    assert {0, -1, 5} == registry.keys()


def test_a_cache_that_forgets_keeps_the_bound() -> None:
    """What a foreign policy has lost from sight leaves oldest first; nothing stays for ever."""
    registry = numbers(0, maxsize=5, policy=Forgetful)
    for i in range(50):
        registry[i] = i
        assert len(registry) <= 5

    assert 49 in registry


@pytest.mark.parametrize("policy", [cachetools.LRUCache, cachetools.LFUCache, cachetools.FIFOCache, cachetools.RRCache])
def test_the_caches_of_cachetools_serve(policy: Any) -> None:
    registry = numbers(0, maxsize=5, policy=policy)
    for i in range(50):
        registry[i] = i
        registry.get(i - 2)
        assert len(registry) <= 5

    assert 49 in registry


# Bytes.


def test_bytes_are_counted_with_every_change() -> None:
    registry: Registry[str, str] = Registry(max_bytes=100, getsizeof=len)
    registry.update(a="x" * 10, b="x" * 20)
    assert 30 == registry.stats().bytes
    registry["a"] = "x" * 5
    assert 25 == registry.stats().bytes
    del registry["b"]
    assert 5 == registry.stats().bytes
    registry.clear()

    assert 0 == registry.stats().bytes


def test_a_value_that_grows_in_place_is_measured_again() -> None:
    """A conversation grows after it was put in: the end of a lease, reads and writes take note of it."""
    registry: Registry[str, list[int]] = Registry({"a": [], "b": [0] * 40}, max_bytes=100, getsizeof=len)
    with registry.lease("a") as value:
        value.extend(range(90))
    del value

    assert {"a"} == registry.keys()
    assert 90 == registry.stats().bytes
    registry["a"].extend(range(20))
    registry["c"] = [1]
    registry["d"] = [1]

    assert "a" not in registry
    assert 2 == registry.stats().bytes


def test_the_newest_stays_although_it_alone_is_too_large() -> None:
    """A value larger than the bound is kept for its writer, and leaves with the next write."""
    registry: Registry[str, str] = Registry({"a": "x"}, max_bytes=10, getsizeof=len)
    registry["large"] = "x" * 50
    assert {"large"} == registry.keys()
    registry["b"] = "x"

    assert {"b"} == registry.keys()


def test_a_read_value_does_not_make_the_newest_leave() -> None:
    """What a write evicts is the old, also where a value was read before and is measured again."""
    registry: Registry[str, str] = Registry(maxsize=1, max_bytes=5, getsizeof=len)
    with registry.lease("held", lambda: "x"):
        registry["held"]
        registry["new"] = "x"

        assert {"held", "new"} == registry.keys()


def test_getsizeof_that_fails_is_replaced_by_the_estimate(caplog: pytest.LogCaptureFixture) -> None:
    """A value that cannot be measured is put in all the same, and counted."""

    def measure(value: object) -> Any:
        if value == "bad":
            raise ArithmeticError("no scales")
        return -1 if value == "negative" else 1.5 if value == "odd" else 1

    registry: Registry[int, str] = Registry(max_bytes=10_000, getsizeof=measure, name="weighed")
    registry.update(enumerate(["good", "bad", "negative", "odd"]))

    assert 4 == len(registry)
    assert 3 == registry.stats().hook_errors
    assert (registry.stats().bytes or 0) > 100
    assert "getsizeof of registry weighed raised for key 1" in caplog.text
    registry.clear()
    assert 0 == registry.stats().bytes
