"""Each removal is told exactly once, with the lock free, and user code that fails loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.events import Cause, Removal
from hygiene.registry import Registry
from hygiene.testing import ManualClock

Elsewhere = Callable[..., Any]


def told_of(removals: list[Removal[Any, Any]]) -> list[tuple[Any, Any, Cause]]:
    return [(removal.key, removal.value, removal.cause) for removal in removals]


def test_every_cause_is_told_once_with_its_times(clock: ManualClock) -> None:
    """Whatever made an entry leave, ``on_evict`` hears of it once: key, value, cause, age and idle time."""
    told: list[Removal[str, int]] = []
    registry: Registry[str, int] = Registry(maxsize=4, ttl=100, idle=50, on_evict=told.append, timer=clock)
    registry.update(dict.fromkeys("abcd", 0))
    clock.advance(10)
    registry["b"]
    registry["a"] = 1  # replaced
    registry["e"] = 0  # c leaves for want of room
    del registry["d"]
    registry.pop("a")
    registry["x"] = registry["y"] = 7
    registry.trim(3)  # b, the oldest
    clock.advance(50)
    registry.expire()  # e, x, y: idle
    registry["k"] = registry["l"] = 8
    for _ in range(3):
        clock.advance(30)
        registry.get("k")  # and l leaves, which is idle
    clock.advance(10)
    registry.expire()  # k: its ttl
    registry["m"] = 9
    registry.clear()
    registry["n"] = 9
    registry.close()
    registry["o"] = registry["p"] = 1
    assert registry.evict("o")
    assert registry.popitem() == ("p", 1)

    wanted = [
        ("a", 0, Cause.REPLACED, 10, 10),
        ("c", 0, Cause.SIZE, 10, 10),
        ("d", 0, Cause.DELETED, 10, 10),
        ("a", 1, Cause.DELETED, 0, 0),
        ("b", 0, Cause.PRESSURE, 10, 0),
        ("e", 0, Cause.IDLE, 50, 50),
        ("x", 7, Cause.IDLE, 50, 50),
        ("y", 7, Cause.IDLE, 50, 50),
        ("l", 8, Cause.IDLE, 60, 60),
        ("k", 8, Cause.EXPIRED, 100, 10),
        ("m", 9, Cause.CLEARED, 0, 0),
        ("n", 9, Cause.CLOSED, 0, 0),
        ("o", 1, Cause.PRESSURE, 0, 0),
        ("p", 1, Cause.DELETED, 0, 0),
    ]
    assert wanted == [(r.key, r.value, r.cause, r.age, r.idle_for) for r in told]
    assert {Cause.SIZE: 1, Cause.PRESSURE: 2, Cause.IDLE: 4, Cause.EXPIRED: 1} == dict(registry.stats().evictions)


def test_bytes_are_a_cause_of_their_own() -> None:
    told: list[Removal[str, str]] = []
    registry: Registry[str, str] = Registry(max_bytes=10, getsizeof=len, on_evict=told.append)
    registry.update(a="xxxx", b="xxxx", c="xxxx")

    assert [("a", "xxxx", Cause.BYTES)] == told_of(told)
    assert 8 == registry.stats().bytes


def test_writing_the_same_object_again_is_no_removal() -> None:
    """``d = r.setdefault(k, d)`` and the like write what is there: nothing has left."""
    told: list[Any] = []
    value: list[int] = []
    registry: Registry[str, Any] = Registry({"a": value}, on_evict=told.append)
    registry["a"] = value
    registry.update(a=value)
    registry |= {"a": value}

    assert [] == told


REMOVERS: dict[str, Callable[[Registry[Any, Any]], Any]] = {
    "del": lambda r: r.__delitem__("a"),
    "pop": lambda r: r.pop("a"),
    "popitem": lambda r: r.popitem(),
    "clear": lambda r: r.clear(),
    "close": lambda r: r.close(),
    "replace": lambda r: r.__setitem__("a", 2),
    "update": lambda r: r.update(a=2),
    "ior": lambda r: r.__ior__({"a": 2}),
    "evict": lambda r: r.evict("a"),
    "trim": lambda r: r.trim(0),
    "size": lambda r: r.__setitem__("b", 2),
    "setdefault": lambda r: r.setdefault("b", 2),
    "lease": lambda r: r.lease("b", lambda: 2).__enter__(),
    "expire": lambda r: (r._timer.advance(60), r.expire()),
    "lookup of what is over": lambda r: (r._timer.advance(60), r.get("a")),
    "in after expiry": lambda r: (r._timer.advance(60), "a" in r),
    "write after expiry": lambda r: (r._timer.advance(60), r.__setitem__("z", 1)),
}


@pytest.mark.parametrize("limits", [{}, {"busy": lambda entry: False}, {"policy": "lfu"}], ids=["lru", "busy", "lfu"])
@pytest.mark.parametrize("remover", REMOVERS)
def test_hooks_run_with_the_lock_free(
    clock: ManualClock, elsewhere: Elsewhere, remover: str, limits: dict[str, Any]
) -> None:
    """A hook may use the registry from any thread, and wait for it."""
    seen: list[Any] = []

    def use_it_elsewhere(removal: Removal[str, int]) -> None:
        def use() -> None:
            if not seen:
                seen.append(removal.key)
                registry["from the hook"] = 1
                with registry.lease("from the hook"):
                    registry.pop("from the hook")
                dict(registry)
                registry.expire()

        elsewhere(use)

    registry: Registry[str, int] = Registry(
        {"a": 1}, maxsize=1, ttl=60, timer=clock, on_evict=use_it_elsewhere, **limits
    )
    REMOVERS[remover](registry)

    assert ["a"] == seen
    assert 0 == registry.stats().hook_errors
    assert len(registry) <= 1


def test_a_hook_may_clear_the_registry() -> None:
    """Each entry is told once, although the hook empties the registry in the middle of an eviction."""
    told: list[str] = []

    def empty(removal: Removal[str, int]) -> None:
        told.append(removal.key)
        registry.clear()

    registry: Registry[str, int] = Registry(dict.fromkeys("abc", 0), maxsize=3, on_evict=empty)
    registry["d"] = 0

    assert ["a", "b", "c", "d"] == told
    assert {} == registry


def test_a_hook_may_put_the_entry_back() -> None:
    """An entry that its hook writes again is an entry like any other, and the bound holds."""
    returned: list[str] = []

    def put_back(removal: Removal[str, int]) -> None:
        if removal.key not in returned:
            returned.append(removal.key)
            registry[removal.key] = removal.value

    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, maxsize=2, on_evict=put_back)
    registry["c"] = 3

    assert 2 == len(registry)
    assert ["a", "b", "c"] == returned


def test_a_raising_hook_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The writer whose entry pushed another out does not get the hook's exception."""

    def fail(removal: Removal[str, int]) -> None:
        raise ArithmeticError("hook out of order")

    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, on_evict=fail, name="sessions")
    registry["b"] = 2
    registry["b"] = 3

    assert {"b": 3} == registry
    assert 2 == registry.stats().hook_errors
    assert ["hygiene"] == [record.name for record in caplog.records]  # once a minute
    assert "on_evict of registry sessions raised for key 'a'" in caplog.text
    assert "hook out of order" in caplog.text


def test_one_failing_hook_does_not_silence_the_others() -> None:
    """Of several that leave in one step each is told, whatever the first hook did."""
    told: list[str] = []

    def fail(removal: Removal[str, int]) -> None:
        told.append(removal.key)
        raise ArithmeticError

    registry: Registry[str, int] = Registry(dict.fromkeys("abc", 0), on_evict=fail)
    registry.clear()

    assert ["a", "b", "c"] == told
    assert 3 == registry.stats().hook_errors


def test_a_method_name_needs_an_owner() -> None:
    """A hook given by name is a method of the owner; a registry made by itself has none, which is said at once."""
    with pytest.raises(ValueError, match=r"on_evict='dropped' names a method of the owner.*Pass the method"):
        Registry({"a": 1}, on_evict="dropped")


# Values whose end is user code.


class Last:
    """A value whose ``__del__`` uses the registry from another thread, and waits for it."""

    def __init__(self, use: Callable[[], Any], ended: list[bool], elsewhere: Elsewhere) -> None:
        self.use = use
        self.ended = ended
        self.elsewhere = elsewhere

    def __del__(self) -> None:
        try:
            self.elsewhere(self.use)
            self.ended.append(True)
        except TimeoutError:
            self.ended.append(False)


DROPPERS: dict[str, Callable[[Registry[Any, Any]], Any]] = {
    "del": lambda r: r.__delitem__("a"),
    "pop": lambda r: r.pop("a") and None,
    "popitem": lambda r: r.popitem() and None,
    "clear": lambda r: r.clear(),
    "close": lambda r: r.close(),
    "replace": lambda r: r.__setitem__("a", 2),
    "update": lambda r: r.update(a=2),
    "evict": lambda r: r.evict("a"),
    "trim": lambda r: r.trim(0),
    "size": lambda r: r.update(b=2, c=3),
    "lease": lambda r: r.lease("b", lambda: 2).__enter__(),
}


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"ttl": 60},
        {"busy": lambda entry: False},
        {"policy": "lfu"},
        {"max_bytes": 100},
        {"close": lambda value: None},
    ],
    ids=["lru", "ttl", "busy", "lfu", "bytes", "close"],
)
@pytest.mark.parametrize("dropper", DROPPERS)
def test_the_last_reference_never_dies_inside_the_lock(
    elsewhere: Elsewhere, dropper: str, limits: dict[str, Any]
) -> None:
    """A value's ``__del__`` may use the registry from another thread, and wait for it."""
    ended: list[bool] = []

    def use() -> None:
        with registry.lease("used", lambda: 1):
            pass
        registry.trim(1)

    registry: Registry[str, Any] = Registry(maxsize=1, **limits)
    registry["a"] = Last(use, ended, elsewhere)
    DROPPERS[dropper](registry)

    assert [True] == ended


def test_values_evicted_together_die_outside_the_lock(elsewhere: Elsewhere) -> None:
    """Several values that leave in one step (here: after others were in the way) all die with the lock free."""
    ended: list[bool] = []
    registry: Registry[int, Any] = Registry(maxsize=4)

    def use() -> None:
        with registry.lease("used", lambda: 1):
            pass

    registry.update({i: Last(use, ended, elsewhere) for i in range(4)})
    leases = [registry.lease(i) for i in range(4)]
    for lease in leases:
        lease.__enter__()
    registry.update({"x": 1, "y": 2, "z": 3})
    for lease in leases:
        lease.__exit__()
    registry.update({"p": 1, "q": 2, "r": 3, "s": 4})

    assert [True] * 4 == ended


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit])
def test_a_hook_that_raises_what_is_no_exception_is_logged_too(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """The others that left with it are told, and the writer hears nothing of it."""
    told: list[int] = []

    def hook(removal: Removal[int, int]) -> None:
        told.append(removal.key)
        raise error

    registry = Registry(dict.fromkeys(range(5), 0), maxsize=5, on_evict=hook)
    registry.trim(0)

    assert [0, 1, 2, 3, 4] == told
    assert 5 == registry.stats().hook_errors
    assert "on_evict of registry" in caplog.text
