"""An expired entry is not returned by any method, wherever its value still is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from hygiene import SQLiteStore
from hygiene.group import Group
from hygiene.limits import Limits
from hygiene.registry import Registry
from hygiene.testing import ManualClock

LIFE = 10.0
ABSENT: Any = object()


class Value:
    """Can be weakly referenced."""


def raises_key_error(call: Callable[[], Any]) -> bool:
    """True if *call* raises KeyError."""
    try:
        call()
    except KeyError:
        return True
    return False


# Each method returns True if it did not find the key.
METHODS: dict[str, Callable[[Registry[Any, Any]], bool]] = {
    "[]": lambda r: raises_key_error(lambda: r["ann"]),
    "get": lambda r: r.get("ann", ABSENT) is ABSENT,
    "in": lambda r: "ann" not in r,
    "setdefault": lambda r: r.setdefault("ann", ABSENT) is ABSENT,
    "peek": lambda r: r.peek("ann", ABSENT) is ABSENT,
    "pop": lambda r: raises_key_error(lambda: r.pop("ann")),
    "pop with a default": lambda r: r.pop("ann", ABSENT) is ABSENT,
    "del": lambda r: raises_key_error(lambda: r.__delitem__("ann")),
    "popitem": lambda r: not len(r) or raises_key_error(lambda: [r.popitem() for _ in range(3)]),
    "popitem, first": lambda r: raises_key_error(lambda: [r.popitem(last=False) for _ in range(3)]),
    "touch": lambda r: not r.touch("ann"),
    "evict": lambda r: not r.evict("ann"),
    "move_to_end": lambda r: raises_key_error(lambda: r.move_to_end("ann")),
    "lease": lambda r: raises_key_error(lambda: r.lease("ann").__enter__()),
    "lease with create": lambda r: r.lease("ann", lambda: ABSENT).__enter__() is ABSENT,
    "a loop": lambda r: "ann" not in list(r),
    "a loop backwards": lambda r: "ann" not in list(reversed(r)),
    "keys": lambda r: "ann" not in list(r.keys()),
    "values": lambda r: list(r.values()) == list(reversed(r.values())) == [],
    "items": lambda r: list(r.items()) == list(reversed(r.items())) == [],
    "a copy": lambda r: {**r} == dict(r) == r.copy() == {},
    "or": lambda r: (r | {}) == ({} | r) == {},
    "update of another": lambda r: Registry(r) == {},
}


def single(**limits: Any) -> Registry[Any, Any]:
    return Registry(**limits)


def grouped(**limits: Any) -> Registry[Any, Any]:
    """One of two linked dicts, whose keys are alike."""
    group = Group(Limits.of(**limits), {"sessions": None, "locks": None})
    return group.adopt("sessions", {})


def derived(**limits: Any) -> Registry[Any, Any]:
    """One of two linked dicts, whose rows have other keys."""
    group = Group(Limits.of(**limits), {"sessions": lambda key: key[0], "locks": None})
    return group.adopt("sessions", {})


@pytest.mark.parametrize("limit", ["ttl", "idle"])
@pytest.mark.parametrize("make", [single, grouped, derived])
def test_an_expired_entry_in_memory_is_not_returned(
    make: Callable[..., Registry[Any, Any]], limit: str, clock: ManualClock
) -> None:
    """From the moment of its expiry an entry is absent for every method, before the janitor drops it."""
    for name, misses in METHODS.items():
        registry = make(**{limit: LIFE}, timer=clock)
        held = registry["ann"] = Value()
        clock.advance(LIFE)

        assert misses(registry), name
        assert held is not registry.get("ann")


@pytest.mark.parametrize("limit", ["ttl", "idle"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("make", [single, grouped, derived])
def test_an_expired_entry_that_was_evicted_is_not_returned(
    make: Callable[..., Registry[Any, Any]], policy: str, limit: str, clock: ManualClock
) -> None:
    """Another part of the program still references the value of an evicted entry: it expires all the same."""
    for name, misses in METHODS.items():
        registry = make(maxsize=1, policy=policy, **{limit: LIFE}, timer=clock)
        held = registry["ann"] = Value()
        clock.advance(LIFE / 2)
        registry["bob"] = Value()
        del registry["bob"]
        clock.advance(LIFE / 2)

        assert misses(registry), name
        assert held is not registry.get("ann")


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("make", [single, grouped, derived])
def test_an_expired_entry_of_a_store_is_not_returned(
    make: Callable[..., Registry[Any, Any]], kind: type, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store counts the same time, whether the value of the entry is still referenced or not."""
    start = time.time()
    monkeypatch.setattr("time.time", lambda: start + clock.now)
    with SQLiteStore(":memory:", timer=lambda: start + clock.now) as store:
        registry = make(ttl=LIFE, timer=clock, store=store, name="sessions")
        for name, misses in METHODS.items():
            held = registry["ann"] = kind()
            registry["eve"] = kind()
            registry.flush()
            assert registry.evict("ann")
            assert registry.evict("eve")
            clock.advance(LIFE)
            if "setdefault" not in name and "create" not in name:  # ABSENT cannot be stored
                assert misses(registry), name

            assert registry.get("ann", ABSENT) is ABSENT
            assert registry.peek("eve", ABSENT) is registry.pop("eve", ABSENT) is ABSENT
            del held
        registry.flush()
        assert [] == list(registry.stored())
        registry.close()


def test_reading_an_evicted_entry_again_does_not_prolong_its_time(clock: ManualClock) -> None:
    """``ttl`` counts from the last write, also where the entry was evicted and found again; in a group, too."""
    for make in single, grouped, derived:
        registry = make(maxsize=1, ttl=LIFE, timer=clock)
        held = registry["ann"] = Value()
        clock.advance(LIFE / 2)
        registry["bob"] = Value()
        assert held is registry["ann"]
        clock.advance(LIFE / 2)

        assert registry.pop("ann", None) is None


def test_a_row_that_comes_back_column_by_column_is_as_old_as_its_last_write(clock: ManualClock) -> None:
    """Finding the second value of a row again is not a write of the row either."""
    group = Group(Limits.of(maxsize=1, ttl=LIFE, timer=clock), {"sessions": None, "locks": None})
    sessions, locks = group.adopt("sessions", {}), group.adopt("locks", {})
    held = sessions["ann"], locks["ann"] = Value(), Value()
    sessions["bob"] = Value()
    clock.advance(LIFE / 2)
    assert held == (sessions["ann"], locks["ann"])
    clock.advance(LIFE / 2)

    assert "ann" not in sessions
    assert "ann" not in locks


def test_evicting_an_expired_entry_reports_its_expiry(clock: ManualClock) -> None:
    """The hook receives the cause that ended the entry, once."""
    causes: list[str] = []
    registry: Registry[str, Value] = Registry(
        ttl=LIFE, timer=clock, on_evict=lambda removal: causes.append(removal.cause.value)
    )
    registry["ann"] = Value()
    clock.advance(LIFE)

    assert not registry.evict("ann")
    assert ["expired"] == causes


async def test_an_async_lease_does_not_return_an_expired_entry(clock: ManualClock) -> None:
    """``async with`` expires an entry like ``with`` does, evicted or not."""
    registry: Registry[str, Value] = Registry(maxsize=1, ttl=LIFE, timer=clock)
    held = registry["ann"] = Value()
    for evict in False, True:
        if evict:
            registry["ann"] = held
            registry["bob"] = Value()
        clock.advance(LIFE)
        with pytest.raises(KeyError):
            async with registry.lease("ann"):
                pass
