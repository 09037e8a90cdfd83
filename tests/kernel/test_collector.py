"""The garbage collector sees what a registry holds, and takes registries that only they themselves hold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from hygiene import Registry


class Thing:
    """Something that can be weakly referenced, and refers to anything."""

    def __init__(self, what: Any = None) -> None:
        self.what = what


def left(kind: type[Any]) -> int:
    """How many of this class are alive: weak references end before what was found is freed, and if it never is."""
    gc.collect()
    gc.collect()
    return sum(type(one) is kind for one in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["key", "value", "timer", "keeper", "order", "attribute", "leases"])
def test_a_cycle_through_a_kernel_is_collected(body: ModuleType, bare_kernels: Callable[..., Any], where: str) -> None:
    """Wherever the kernel refers to itself, by a bound method as well, it does not live on for that."""

    class Cyclic(bare_kernels(body)[0]):  # type: ignore[misc]
        def now(self) -> float:
            return 0.0

    kernel = Cyclic()
    kernel._open(5, kernel.now if where == "timer" else None, written=True, used=True)
    if where == "key":
        body.store(kernel, Thing(kernel), 1)
    elif where == "value":
        body.store(kernel, 1, kernel)
    elif where == "keeper":
        kernel._keeper = kernel.now
    elif where == "order":
        order = body.LinkedOrder(kernel)
        body.store(kernel, 1, [kernel, order])
        del order
    elif where == "attribute":
        kernel.itself = kernel
    elif where == "leases":
        kernel._leases[Thing(kernel)] = 1
    assert 1 == left(Cyclic)

    del kernel

    assert 0 == left(Cyclic)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["key", "value", "hook", "timer", "busy", "factory", "view"])
def test_a_cycle_through_a_registry_is_collected(where: str) -> None:
    """A registry whose keys, values or hooks refer to it is freed when nobody else does."""

    class Cyclic(Registry[Any, Any]):
        def __init__(self) -> None:
            options: dict[str, Any] = {
                "hook": {"on_evict": self.one},
                "timer": {"timer": self.now, "ttl": 5},
                "busy": {"busy": self.one},
                "factory": {"default_factory": self.now},
            }.get(where, {})
            super().__init__(maxsize=3, **options)

        def one(self, what: Any) -> None:
            pass

        def now(self) -> float:
            return 0.0

    registry = Cyclic()
    for number in range(5):
        registry[Thing(registry) if where == "key" else number] = registry if where == "value" else number
    if where == "view":
        registry["view"] = [registry.keys(), iter(registry.values())]

    del registry

    assert 0 == left(Cyclic)


def test_the_collector_sees_keys_and_values(body: ModuleType, build: Callable[..., Any]) -> None:
    """``gc.get_referents`` names both, those of a key that went past as well."""
    kernel = build(body)
    key, value, gone = Thing(), Thing(), Thing()
    kernel[key] = value
    kernel[gone] = 1
    dict.__delitem__(kernel, gone)

    referents = gc.get_referents(kernel)

    assert any(one is key for one in referents)
    assert any(one is value for one in referents)


@pytest.mark.slow
def test_a_collection_in_the_middle_of_a_write_finds_what_is_there(body: ModuleType, build: Callable[..., Any]) -> None:
    """``gc.collect()`` from a comparison, or from what dies, neither crashes nor takes what is alive."""

    class Collecting:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            gc.collect(1)
            return self is other

        def __del__(self) -> None:
            gc.collect(1)

    kernel = build(body, bound=3)
    witnesses = []
    gc.collect()
    for _ in range(8):
        cycle = Thing()
        cycle.what = cycle
        key = Collecting()
        kernel[key] = cycle
        witnesses.append(weakref.ref(cycle))
        del cycle, key
    gc.collect()

    assert 3 == len(kernel)
    assert [False] * 5 + [True] * 3 == [witness() is not None for witness in witnesses]


def test_what_the_collector_has_cleared_can_still_be_asked(body: ModuleType, build: Callable[..., Any]) -> None:
    """A finalizer in the same cycle may use the registry, before it was cleared or after."""
    said: list[Any] = []

    class Last:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __del__(self) -> None:
            kernel = self.kernel
            said.append(len(kernel))
            kernel["new"] = 1
            said.append(kernel["new"])

    kernel = build(body, bound=10)
    kernel["last"] = Last(kernel)
    del kernel
    gc.collect()

    assert [1, 1] == said


def test_a_resurrected_registry_is_whole() -> None:
    """What a finalizer brings back has all its entries, and keeps its bound."""
    saved: list[Any] = []

    class Saved(Registry[Any, Any]):
        def __del__(self) -> None:
            saved.append(self)

    registry = Saved({1: 1, 2: 2}, maxsize=2)
    registry["itself"] = registry
    del registry
    gc.collect()

    (found,) = saved
    found[4] = 4
    assert [True, 4] == [found["itself"] is found, found[4]]
    assert 2 == len(found)
    found.clear()


@pytest.mark.slow
@pytest.mark.once
def test_nested_a_hundred_thousand_deep(run: Callable[..., str], pure: bool) -> None:
    """A registry in a registry in a registry: the last reference to the outermost does not overflow the stack."""
    run(
        "import hygiene\n"
        "r = None\n"
        "for number in range(100_000):\n"
        "    r = hygiene.Registry({'k': r if number % 2 else [r]}, maxsize=2)\n"
        "del r\n",
        pure=pure,
    )
