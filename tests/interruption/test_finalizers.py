"""A finalizer uses a registry in the middle of another operation of it, as the garbage collection may have it do."""

from __future__ import annotations

import itertools
from typing import Any

import cachetools
import pytest

from hygiene import Registry

SIZE = 6
POLICIES: dict[str, dict[str, Any]] = {
    "lfu": {"policy": "lfu"},
    "importance": {"policy": "importance", "importance": lambda entry: entry.value},
    "LFUCache": {"policy": cachetools.LFUCache},
    "LRUCache": {"policy": cachetools.LRUCache},
    "busy": {"busy": lambda entry: False},
}
CHANGES = {
    "pop": lambda registry: (registry.pop(0, None), registry.pop(SIZE - 1, None), registry.pop("new", None)),
    "clear": lambda registry: registry.clear(),
    "write": lambda registry: registry.update({1: 5, "other": 6, "another": 7}),
    "read": lambda registry: (registry.get(0), registry.get("new")),
}
OPERATIONS = {
    "write": lambda registry: registry.__setitem__("new", 1),
    "overwrite": lambda registry: registry.__setitem__(3, 1),
    "read": lambda registry: registry.get(0),
    "evict": lambda registry: registry.evict(0),
    "trim": lambda registry: registry.trim(5),
}


@pytest.mark.parametrize(
    ("policy", "change", "operation"),
    [
        pytest.param(*case, marks=() if case == ("lfu", "pop", "write") else pytest.mark.slow)
        for case in itertools.product(POLICIES, CHANGES, OPERATIONS)
    ],
)
def test_a_finalizer_may_change_the_registry_at_any_moment(policy, change, operation, at_moment):
    """A finalizer may remove and write entries in the middle of any operation, which does not raise for it."""
    for at in itertools.count(1):
        registry = Registry({number: number for number in range(SIZE)}, maxsize=SIZE, **POLICIES[policy])
        where = at_moment(
            lambda: OPERATIONS[operation](registry),  # noqa: B023 - called at once
            at,
            happens=lambda: CHANGES[change](registry),  # noqa: B023
        )
        registry.update((number, number) for number in range(100, 100 + 2 * SIZE))

        assert SIZE == len(registry), where
        assert all(key in registry._order for key in registry), where
        if where is None:
            break
