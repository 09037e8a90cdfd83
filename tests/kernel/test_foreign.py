"""Somebody goes past the registry: what a dict lets anybody do to it, and what it is worth afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from hygiene import Registry, compiled

needs_compiled = pytest.mark.skipif(not compiled, reason="who goes past the Python body is in no order")


def as_attributes(r: Any) -> None:
    """An object whose attributes are the entries: hot loops write them without a call."""
    holder = type("Holder", (), {})()
    holder.__dict__ = r
    for number in range(100):
        holder.x = number
    assert 99 == holder.x
    del holder.x
    holder.c = "new"


# ruff: noqa: PLW0108 - all are called with a registry, so each is written as a call

WAYS: dict[str, tuple[Callable[[Any], Any], dict[Any, Any]]] = {
    "setitem": (lambda r: dict.__setitem__(r, "b", "new"), {"a": 1, "b": "new"}),
    "setitem of a new key": (lambda r: dict.__setitem__(r, "c", "new"), {"a": 1, "b": 2, "c": "new"}),
    "delitem": (lambda r: dict.__delitem__(r, "a"), {"b": 2}),
    "update": (lambda r: dict.update(r, b="new", c="new"), {"a": 1, "b": "new", "c": "new"}),
    "pop": (lambda r: dict.pop(r, "a"), {"b": 2}),
    "popitem": (lambda r: dict.popitem(r), {"a": 1}),
    "clear": (lambda r: dict.clear(r), {}),
    "setdefault": (lambda r: dict.setdefault(r, "c", "new"), {"a": 1, "b": 2, "c": "new"}),
    "ior": (lambda r: dict.__ior__(r, {"c": "new"}), {"a": 1, "b": 2, "c": "new"}),
    "delitem and setitem": (lambda r: (dict.pop(r, "a"), dict.__setitem__(r, "a", "new")), {"b": 2, "a": "new"}),
    "locals": (lambda r: exec("c = 'new'; a = 5", {}, r), {"a": 5, "b": 2, "c": "new"}),
    "attributes": (as_attributes, {"a": 1, "b": 2, "c": "new"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_is_true(body: ModuleType, build: Callable[..., Any], way: str) -> None:
    """A value written past the registry is the value; what was deleted so is gone."""
    kernel = build(body)
    kernel["a"], kernel["b"] = 1, 2
    go, expected = WAYS[way]

    go(kernel)

    assert expected == {key: kernel.get(key) for key in ("b", "a", "c", "x") if key in kernel}
    assert expected == dict(dict.items(kernel))


@needs_compiled
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_the_bound_is_kept_again(way: str, policy: Any) -> None:
    """The next write sees to it that there are no more than there may be, and what it wrote stays."""
    registry: Registry[Any, Any] = Registry({"a": 1, "b": 2}, maxsize=2, policy=policy)
    WAYS[way][0](registry)

    for number in range(5):
        registry[number] = number
        assert number == registry[number]
        assert len(registry) <= 2
    assert [3, 4] == list(registry)


@needs_compiled
def test_what_was_just_written_does_not_leave_for_those_who_went_past() -> None:
    """Those who went past are in no order; they leave before all who came through the door."""
    registry: Registry[Any, Any] = Registry(maxsize=3)
    dict.update(registry, dict.fromkeys(range(10)))

    registry["a"] = 1

    assert [8, 9, "a"] == list(registry)
    registry.trim(0)
    assert {} == registry


@needs_compiled
def test_a_key_given_back_past_the_registry_is_another_object() -> None:
    """The dict has the newer of two equal keys, and both die with the registry."""

    class Key:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Key)

    old, new = Key(), Key()
    registry: Registry[Any, Any] = Registry({old: 1}, maxsize=2)
    dict.pop(registry, old)
    dict.__setitem__(registry, new, 2)

    assert 2 == registry[old]
    counts = sys.getrefcount(old), sys.getrefcount(new)
    registry.clear()
    del registry
    assert (counts[0] - 1, counts[1] - 1) == (sys.getrefcount(old), sys.getrefcount(new))
