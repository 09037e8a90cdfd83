"""Bad input is a clear error (what was wanted, what was found, what to do), and changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import cachetools
import pytest

from hygiene.errors import HygieneError, RegistryFull
from hygiene.kernel import compiled
from hygiene.registry import Registry

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"maxsize": 0}, ValueError, r"maxsize must be at least 1, or None for no bound; found 0"),
    ({"maxsize": -5}, ValueError, r"maxsize must be at least 1.*found -5"),
    ({"maxsize": 1.5}, TypeError, r"maxsize must be a whole number of entries.*found 1\.5"),
    ({"maxsize": "many"}, TypeError, r"maxsize must be a whole number.*found 'many'"),
    ({"maxsize": True}, TypeError, r"maxsize must be a whole number.*found True"),
    ({"ttl": -1}, ValueError, r"ttl must be positive: seconds, a timedelta, or text.*found -1"),
    ({"ttl": 0}, ValueError, r"ttl must be positive.*found 0\. Leave it out for no limit"),
    ({"ttl": float("nan")}, ValueError, r"ttl must be positive.*found nan"),
    ({"ttl": float("inf")}, ValueError, r"ttl must be positive.*found inf"),
    ({"ttl": "5 parsecs"}, ValueError, r'ttl must be positive.*"90s", "30m", "2h" or "1d"; found \'5 parsecs\''),
    ({"ttl": ""}, ValueError, r"ttl must be positive.*found ''"),
    ({"ttl": [1]}, TypeError, r"ttl must be positive.*found \[1\]"),
    ({"ttl": True}, TypeError, r"ttl must be positive.*found True"),
    ({"idle": timedelta(seconds=-1)}, ValueError, r"idle must be positive"),
    ({"idle": "-2h"}, ValueError, r"idle must be positive.*found '-2h'"),
    ({"max_bytes": 0}, ValueError, r"max_bytes must be at least 1: bytes, or text.*found 0"),
    ({"max_bytes": "64 potatoes"}, ValueError, r"max_bytes must be at least 1.*found '64 potatoes'"),
    ({"max_bytes": 1.5}, TypeError, r"max_bytes must be at least 1.*found 1\.5"),
    ({"getsizeof": len}, ValueError, r"getsizeof measures for max_bytes; found no max_bytes\. Give one"),
    ({"getsizeof": 3, "max_bytes": 9}, TypeError, r"getsizeof must be callable, or None; found 3"),
    (
        {"policy": "random"},
        ValueError,
        r"policy must be one of lru, fifo.*subclass of cachetools\.Cache; found 'random'",
    ),
    ({"policy": dict}, ValueError, r"policy must be one of.*found <class 'dict'>"),
    ({"policy": cachetools.LRUCache(3)}, (TypeError, ValueError), r"policy must be one of"),
    ({"policy": "importance"}, ValueError, r"importance=callable go together"),
    ({"importance": len}, ValueError, r"importance=callable go together"),
    ({"policy": "none"}, ValueError, r'policy="none" drops nothing, so it needs overflow="raise"'),
    ({"overflow": "explode"}, ValueError, r'overflow must be "grow" or "raise"; found \'explode\''),
    ({"busy": 3}, TypeError, r"busy must be a callable.*found 3"),
    ({"busy": "is running"}, TypeError, r"busy must be a callable.*found 'is running'"),
    ({"on_evict": 3}, TypeError, r"on_evict must be a callable.*found 3"),
    ({"close": 3}, TypeError, r"close must be a callable, the name of a method, or \"auto\"; found 3"),
    ({"values": 3}, TypeError, r"values must be callable, or None; found 3"),
    ({"default_factory": 3}, TypeError, r"default_factory must be callable, or None; found 3"),
    ({"timer": 3}, TypeError, r"timer must be callable and return seconds; found 3"),
    ({"max_size": 3}, TypeError, r"max_size"),
]


@pytest.mark.parametrize(("limits", "error", "message"), BAD, ids=[str(limits) for limits, _, _ in BAD])
def test_a_wrong_argument_is_named(limits: dict[str, Any], error: type[Exception], message: str) -> None:
    """Complained about where it is given, not when it would first matter."""
    with pytest.raises(error, match=message):
        Registry({"a": 1}, **limits)


WRITES: dict[str, Callable[[Any], Any]] = {
    "[]": lambda r: r.__setitem__([], 1),
    "setdefault": lambda r: r.setdefault([], 1),
    "update": lambda r: r.update([([], 1)]),
    "del": lambda r: r.__delitem__([]),
    "pop": lambda r: r.pop([]),
    "pop with default": lambda r: r.pop([], None),
    "read": lambda r: r[[]],
    "get": lambda r: r.get([]),
    "in": lambda r: [] in r,
    "peek": lambda r: r.peek([]),
    "touch": lambda r: r.touch([]),
    "evict": lambda r: r.evict([]),
    "lease": lambda r: r.lease([], lambda: 1).__enter__(),
}
FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {"maxsize": 2},
    "ttl": {"ttl": 60},
    "told": {"on_evict": lambda removal: None},
    "bytes": {"max_bytes": 100, "getsizeof": lambda value: 1},
    "busy": {"maxsize": 2, "busy": lambda entry: False},
    "lfu": {"maxsize": 2, "policy": "lfu"},
    "raise": {"maxsize": 2, "overflow": "raise"},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("write", WRITES)
def test_an_unhashable_key_is_refused_and_changes_nothing(write: str, flavour: str) -> None:
    registry: Registry[Any, int] = Registry({"a": 1, "b": 2}, **FLAVOURS[flavour])
    before = registry.stats()
    with pytest.raises(TypeError, match="unhashable"):
        WRITES[write](registry)

    assert {"a": 1, "b": 2} == registry
    assert before == registry.stats()


class Moody:
    """A key that may refuse to be hashed or compared."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.refuses_hash = self.refuses_eq = False

    def __hash__(self) -> int:
        if self.refuses_hash:
            raise ArithmeticError("not now")
        return 7  # all the same, so that every look-up has to compare

    def __eq__(self, other: object) -> bool:
        if self.refuses_eq:
            raise ArithmeticError("not now")
        return isinstance(other, Moody) and self.number == other.number


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("mood", ["refuses_hash", "refuses_eq"])
def test_a_key_that_raises_loses_nothing(flavour: str, mood: str) -> None:
    """The caller gets the key's own exception; afterwards everything is there, and the bound works."""
    keys = [Moody(i) for i in range(2)]
    registry: Registry[Moody, int] = Registry({key: key.number for key in keys}, **FLAVOURS[flavour])
    bad = Moody(9)
    moody = [bad] if mood == "refuses_hash" else keys
    for key in moody:
        setattr(key, mood, True)
    for write in (
        lambda: registry.__setitem__(bad, 1),
        lambda: registry[bad],
        lambda: registry.get(bad),
        lambda: registry.pop(bad, None),
        lambda: registry.touch(bad),
        lambda: registry.setdefault(bad, 1),
        lambda: registry.lease(bad, lambda: 1).__enter__(),
    ):
        with pytest.raises(ArithmeticError, match="not now"):
            write()
    for key in moody:
        setattr(key, mood, False)

    assert [0, 1] == [registry[key] for key in keys]
    assert 2 == len(registry)
    assert 0 == registry.stats().leased
    for i in range(20, 30):
        registry[Moody(i)] = i
    assert len(registry) == 2 or "maxsize" not in FLAVOURS[flavour]


@pytest.mark.parametrize("to", [-1, "many", "-5%", "150%", "5 parsecs", "nan%"])
def test_trim_names_what_it_takes(to: Any) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, max_bytes=1000)
    with pytest.raises(
        ValueError, match=r"trim\(to=...\) takes a number of entries, a share|to must be at least 1: bytes"
    ):
        registry.trim(to)

    assert {"a": 1} == registry


@pytest.mark.parametrize("to", [None, 1.5, True, [1]])
def test_trim_to_what_is_no_target(to: Any) -> None:
    registry: Registry[str, int] = Registry({"a": 1})
    with pytest.raises(TypeError, match=r"trim\(to=...\) takes.*found"):
        registry.trim(to)

    assert {"a": 1} == registry


def test_trim_to_bytes_needs_a_registry_that_measures() -> None:
    registry: Registry[str, int] = Registry({"a": 1})
    with pytest.raises(
        ValueError, match=r"found '10MiB' for a registry without max_bytes, which does not measure bytes"
    ):
        registry.trim("10MiB")


def test_popitem_takes_no_number() -> None:
    registry: Registry[str, int] = Registry({"a": 1})
    with pytest.raises(TypeError, match=r"popitem\(\) takes last=True or last=False; found 42"):
        registry.popitem(42)  # type: ignore[arg-type]

    assert {"a": 1} == registry


@pytest.mark.parametrize("source", [3, [1, 2], "abc", [(1, 2, 3)]])
def test_a_source_that_is_no_mapping(source: Any) -> None:
    """As for a dict."""
    registry: Registry[Any, Any] = Registry({"a": 1})
    with pytest.raises((TypeError, ValueError)):
        registry.update(source)

    assert {"a": 1} == registry


def test_refusals_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(RegistryFull("no room")))

    assert isinstance(error, HygieneError)
    assert "no room" == str(error)


class Comparing:
    """A key that does something when it is compared."""

    happens: Any = None

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        if Comparing.happens is not None:
            Comparing.happens()
        return isinstance(other, Comparing) and self.number == other.number


COUNTED: dict[str, dict[str, Any]] = {
    "lfu": {"policy": "lfu"},
    "importance": {"policy": "importance", "importance": lambda entry: 1.0},
    "LFUCache": {"policy": cachetools.LFUCache},
    "busy": {"busy": lambda entry: False},
    "max_bytes": {"max_bytes": 500, "getsizeof": lambda value: 100},
    "ttl": {"ttl": 60},
    "lru": {},
}


@pytest.mark.parametrize("limits", COUNTED.values(), ids=COUNTED)
# An OrderedDict, on which the kernel in Python stands, does not survive a comparison that changes it.
@pytest.mark.parametrize("change", ["raise", "clear", "pop", "write"] if compiled else ["raise"])
def test_a_key_may_raise_or_change_the_registry_when_it_is_compared(limits: dict[str, Any], change: str) -> None:
    """The key's own exception comes through, or the write succeeds; then the bound and the counts are right."""
    for at in range(1, 25):
        registry: Registry[Any, Any] = Registry({Comparing(i): i for i in range(5)}, maxsize=5, **limits)
        seen = 0

        def happens(at: int = at, registry: Registry[Any, Any] = registry) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                Comparing.happens = None
                if change == "raise":
                    raise InterruptedError
                if change == "clear":
                    registry.clear()
                elif change == "pop":
                    registry.pop(Comparing(0), None)
                else:
                    registry.update({Comparing(20 + i): i for i in range(6)})

        Comparing.happens = happens
        try:
            registry[Comparing(9)] = 9
        except InterruptedError:
            assert change == "raise"
        finally:
            Comparing.happens = None
        registry.update({Comparing(30 + i): i for i in range(12)})

        assert 5 == len(registry)
        assert registry.stats().bytes in (None, 500)
