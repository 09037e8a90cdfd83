"""Limits that are assigned on a living registry are in force at once; a misspelt one is an error."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene import bounded_registry, ttl_registry
from hygiene.adoption import adopt
from hygiene.events import Cause
from hygiene.janitor import janitor
from hygiene.limits import Limits
from hygiene.registry import Registry, Timed
from hygiene.testing import ManualClock

FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lru": {"maxsize": 50},
    "fifo": {"maxsize": 50, "policy": "fifo"},
    "lfu": {"maxsize": 50, "policy": "lfu"},
    "importance": {"maxsize": 50, "policy": "importance", "importance": lambda entry: entry.key},
    "told": {"on_evict": lambda removal: None},
    "idle": {"idle": 7200},
    "ttl": {"ttl": 7200},
    "bytes": {"max_bytes": 10_000, "getsizeof": len},
    "busy": {"maxsize": 50, "busy": lambda entry: False},
}


def made(flavour: str, clock: ManualClock, **more: Any) -> Registry[Any, Any]:
    registry: Registry[Any, Any] = Registry(**FLAVOURS[flavour] | more, timer=clock)
    for number in range(10):
        registry[number] = "x" * 10
    return registry


every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


@every_flavour
def test_a_lower_maxsize_evicts_at_once(flavour: str, clock: ManualClock) -> None:
    """The oldest leave, and later writes keep to the new bound; ``None`` takes the bound away."""
    registry = made(flavour, clock)
    registry.maxsize = 3

    assert (3, 3) == (registry.maxsize, len(registry))
    for number in range(10, 20):
        registry[number] = "y"
    assert 3 == len(registry)
    registry.maxsize = None
    for number in range(20, 40):
        registry[number] = "z"
    assert (None, 23) == (registry.maxsize, len(registry))


def test_what_a_lower_bound_evicts_is_told_and_closed(clock: ManualClock) -> None:
    told: list[Any] = []
    closed: list[Any] = []
    registry: Registry[int, str] = Registry(
        {1: "a", 2: "bb", 3: "ccc"},
        on_evict=lambda removal: told.append((removal.key, removal.cause)),
        close=closed.append,
        timer=clock,
    )
    registry.maxsize = 2
    registry.max_bytes = 60
    registry.max_bytes = None
    clock.advance(5)
    registry[4] = "d"
    registry.ttl = 5

    assert [(1, Cause.SIZE), (2, Cause.BYTES), (3, Cause.EXPIRED)] == told
    assert ["a", "bb", "ccc"] == closed
    assert {4: "d"} == registry


@every_flavour
def test_max_bytes_weighs_what_is_here(flavour: str, clock: ManualClock) -> None:
    """Values that came before the limit are measured now, and those that come later as always."""
    registry = made(flavour, clock)
    whole = sum(map(registry._weigh, registry, registry.values()))
    registry.max_bytes = whole // 2

    assert 5 == len(registry)
    assert registry.stats().bytes == sum(map(registry._weigh, registry, registry.values())) <= whole // 2
    registry[100] = "x" * 10
    assert 5 == len(registry)
    registry.max_bytes = None
    for number in range(20, 40):
        registry[number] = "x" * 10
    assert (None, None, 25) == (registry.max_bytes, registry.stats().bytes, len(registry))
    assert copy.copy(registry) == registry


@every_flavour
def test_ttl_counts_from_the_last_write(flavour: str, clock: ManualClock) -> None:
    """Where times were kept; otherwise from the change."""
    registry = made(flavour, clock)
    times = registry._written_at(0) is not None
    clock.advance(40)
    registry[10] = "later"
    registry.ttl = "1m"
    assert 60 == registry.ttl
    clock.advance(20)

    assert ([10] if times else list(range(11))) == list(registry)
    clock.advance(40)
    assert [] == list(registry)
    assert registry.get(10) is None


@every_flavour
def test_idle_counts_from_the_last_use(flavour: str, clock: ManualClock) -> None:
    registry = made(flavour, clock)
    times = registry._used_at(0) is not None
    clock.advance(40)
    registry[3]
    registry.idle = 60
    clock.advance(20)

    assert ([3] if times else list(range(10))) == list(registry)
    registry[3]
    clock.advance(59)
    assert [3] == list(registry)
    clock.advance(1)
    assert [] == list(registry)


@every_flavour
@pytest.mark.parametrize("limit", ["ttl", "idle"])
def test_a_shorter_time_expires_at_once_and_none_ends_it(flavour: str, limit: str, clock: ManualClock) -> None:
    registry = made(flavour, clock)
    setattr(registry, limit, 3600)
    clock.advance(100)
    registry["new"] = "new"
    setattr(registry, limit, 100)

    assert ["new"] == list(dict.keys(registry))
    setattr(registry, limit, None)
    clock.advance(7100)
    assert "new" in registry


def test_a_longer_time_prolongs_what_was_in_use_when_the_old_one_ended(clock: ManualClock) -> None:
    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, ttl=60, timer=clock)
    with registry.lease("a"):
        clock.advance(60)
        registry.expire()
        registry.ttl = 100

    assert {"a": 1} == registry
    clock.advance(39)
    assert ["a"] == list(registry)
    clock.advance(1)
    assert [] == list(registry)


def test_a_value_that_was_found_again_keeps_its_time(clock: ManualClock) -> None:
    class Value:
        pass

    registry: Registry[str, Value] = Registry(maxsize=1, ttl=60, timer=clock)
    held = registry["a"] = Value()
    registry["b"] = Value()
    clock.advance(30)
    assert registry["a"] is held
    registry.ttl = 40
    clock.advance(9)
    assert ["a"] == list(registry)
    clock.advance(1)

    assert [] == list(registry)


def test_the_janitor_comes_for_a_new_time_and_once_only() -> None:
    """Nobody has to read for the new limit; a visit that was promised for later is brought forward."""
    gone = threading.Event()
    registry: Registry[str, int] = Registry({"a": 1}, ttl=3600, on_evict=lambda removal: gone.set())
    for seconds in (3000, 2000, 0.05):
        registry.ttl = seconds

    assert gone.wait(10)
    assert 1 >= sum(item[2]() is registry for item in list(janitor._agenda))


def test_the_janitor_is_promised_one_visit_for_linked_attributes() -> None:
    """However many writes there are."""

    @bounded_registry("a", "b", ttl=3600)
    class Pair:
        def __init__(self) -> None:
            self.a: Any = {}
            self.b: Any = {}

    pair = Pair()
    promised: list[object] = []
    watch, janitor.watch = janitor.watch, lambda charge, delay: promised.append(charge)  # type: ignore[method-assign]
    try:
        for number in range(5):
            pair.a[number] = pair.b[number] = 1
    finally:
        del janitor.watch
    assert janitor.watch == watch

    assert 1 == len(promised)


@pytest.mark.parametrize(
    ("limit", "value", "error"),
    [
        ("maxsize", 0, ValueError),
        ("maxsize", "5", TypeError),
        ("maxsize", True, TypeError),
        ("max_bytes", "some", ValueError),
        ("max_bytes", 0, ValueError),
        ("ttl", -1, ValueError),
        ("ttl", [], TypeError),
        ("idle", "5 parsecs", ValueError),
        ("default_factory", 5, TypeError),
    ],
)
@every_flavour
def test_a_wrong_value_changes_nothing(
    flavour: str, limit: str, value: Any, error: type[Exception], clock: ManualClock
) -> None:
    registry = made(flavour, clock)
    before = type(registry), registry._limits, registry.stats()
    with pytest.raises(error, match=limit):
        setattr(registry, limit, value)

    assert before == (type(registry), registry._limits, registry.stats())
    assert 10 == len(registry)


@every_flavour
def test_default_factory_works_from_the_assignment_on(flavour: str, clock: ManualClock) -> None:
    registry = made(flavour, clock)
    registry.default_factory = lambda: "made"
    assert "made" == registry["absent"]
    registry.default_factory = None

    with pytest.raises(KeyError):
        registry["other"]
    assert registry.default_factory is None


@pytest.mark.parametrize("limits", [{"maxsize": 5}, {"maxsize": 5, "ttl": 60}])
def test_a_decorated_defaultdict_can_be_frozen(limits: dict[str, Any]) -> None:
    """``d.default_factory = None`` ends the making of values, in any decorated attribute, alone or linked."""

    class Grouped:
        def __init__(self) -> None:
            self.groups: Any = defaultdict(list)
            self.others: Any = defaultdict(list)

    for names in (("groups",), ("groups", "others")):
        owner = bounded_registry(*names, **limits)(type("Grouped", (Grouped,), {}))()
        owner.groups["a"].append(1)
        owner.groups.default_factory = None
        owner.others["b"].append(2)
        with pytest.raises(KeyError):
            owner.groups["typo"]

        assert ({"a": [1]}, {"b": [2]}) == (owner.groups, owner.others)
        owner.groups.default_factory = dict
        assert {} == owner.groups["c"]


def test_a_subclass_of_defaultdict_can_be_frozen() -> None:
    class Own(defaultdict[str, int]):
        pass

    registry: Any = adopt(Own(int), Limits.of(maxsize=3))
    assert 0 == registry["a"]
    registry.default_factory = None
    with pytest.raises(KeyError):
        registry["b"]


def test_limits_of_linked_attributes_are_those_of_the_key(clock: ManualClock) -> None:
    """Assigned on one attribute, a limit counts for all of them, and for a dict that is assigned later."""

    @bounded_registry("a", "b", maxsize=10, getsizeof=None, timer=clock)
    class Pair:
        def __init__(self) -> None:
            self.a: Any = {}
            self.b: Any = {}

    pair = Pair()
    for number in range(6):
        pair.a[number] = pair.b[number] = bytes(100)
    pair.a.maxsize = 4
    assert ([2, 3, 4, 5], [2, 3, 4, 5]) == (list(pair.a), list(pair.b))
    weight = pair.a._weigh(2, bytes(100))
    pair.b.max_bytes = 5 * weight
    assert ([4, 5], [4, 5], 4 * weight) == (list(pair.a), list(pair.b), pair.a.group.stats().bytes)
    pair.a.ttl = 60
    clock.advance(30)
    pair.b[5] = b"new"
    clock.advance(30)
    assert ([5], [5]) == (list(pair.a), list(pair.b))
    assert (4, 5 * weight, 60.0, None) == (pair.b.maxsize, pair.b.max_bytes, pair.b.ttl, pair.b.idle)
    pair.b = dict.fromkeys(range(9), b"")
    assert [5, 6, 7, 8] == list(pair.b)
    pair.b.idle = 10
    clock.advance(10)

    assert ([], []) == (list(pair.a), list(pair.b))
    pair.a.max_bytes = None
    assert pair.b.group.stats().bytes is None


def test_a_dict_of_the_class_takes_limits(clock: ManualClock) -> None:
    @bounded_registry("cache", maxsize=10, timer=clock)
    class Shared:
        cache: Any = {}  # noqa: RUF012 - what people write

    Shared.cache.update(dict.fromkeys(range(9)))
    Shared.cache.maxsize = 3
    Shared.cache.ttl = 60
    assert [6, 7, 8] == list(Shared.cache)
    Shared().cache = {1: 1}
    clock.advance(60)

    assert [] == list(Shared.cache)


def test_the_registry_stays_the_same_object_and_is_copied_with_its_new_limits(clock: ManualClock) -> None:
    registry: Registry[int, int] = Registry({1: 1, 2: 2})
    registry.ttl, registry.maxsize = "1h", 7

    assert Timed is type(registry)
    for twin in (copy.copy(registry), copy.deepcopy(registry), pickle.loads(pickle.dumps(registry))):
        assert ({1: 1, 2: 2}, 3600, 7) == (twin, twin.ttl, twin.maxsize)


def test_a_registry_that_refuses_keeps_what_it_has() -> None:
    registry: Registry[int, int] = Registry(dict.fromkeys(range(5), 1), maxsize=5, policy="none", overflow="raise")
    registry.maxsize = 3
    registry[4] = 2

    assert [0, 1, 2, 3, 4] == list(registry)


def test_leased_entries_stay_when_the_bound_is_lowered() -> None:
    registry: Registry[int, int] = Registry(dict.fromkeys(range(5), 1), maxsize=5)
    with registry.lease(0), registry.lease(1):
        registry.maxsize = 1
        assert [0, 1] == list(registry)

    assert 1 == len(registry)


@pytest.mark.parametrize("limits", [{}, {"maxsize": 5}, {"ttl": 60}, {"max_bytes": 100}])
@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_size", "maxsize"), ("maxlen", "maxsize"), ("iddle", "idle"), ("TTL", "ttl"), ("maxbytes", "max_bytes")],
)
def test_an_unknown_attribute_is_an_error_that_suggests_the_right_one(
    limits: dict[str, Any], name: str, meant: str
) -> None:
    registry: Any = Registry(**limits)
    with pytest.raises(AttributeError, match=f"no attribute '{name}' to set. Did you mean '{meant}'?"):
        setattr(registry, name, 5)
    assert not hasattr(registry, name)
    with pytest.raises(AttributeError, match="no attribute 'colour' to set"):
        registry.colour = "red"


def test_linked_and_shared_registries_refuse_unknown_attributes() -> None:
    @bounded_registry("a", "b", maxsize=3)
    @ttl_registry("shared", ttl=60)
    class Owner:
        shared: Any = {}  # noqa: RUF012 - what people write

        def __init__(self) -> None:
            self.a: Any = {}
            self.b: Any = {}

    for registry in (Owner().a, Owner.shared):
        with pytest.raises(AttributeError, match="Did you mean 'maxsize'"):
            registry.max_size = 5


def test_a_subclass_has_attributes_of_its_own() -> None:
    class Named(Registry[Any, Any]):
        def __init__(self, maxsize: int) -> None:
            self.title = "before"
            self.maxsize = maxsize
            self.ttl = 60
            super().__init__(name="named")
            self.extra = 1

    registry = Named(2)
    registry.update(a=1, b=2, c=3)

    assert ("before", 1, 2, 60.0) == (registry.title, registry.extra, registry.maxsize, registry.ttl)
    assert ["b", "c"] == list(registry)
    assert 1 == copy.copy(registry).extra


class OwnSize(dict[Any, Any]):
    """A dict with a bound of its own, as people write it."""

    def __init__(self, maxsize: int) -> None:
        super().__init__()
        self.maxsize = maxsize

    def full(self) -> bool:
        return len(self) >= self.maxsize


class AttributeDict(dict[Any, Any]):
    """A dict whose entries are attributes."""

    __setattr__ = dict.__setitem__  # type: ignore[assignment] # a common idiom

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_an_attribute_of_an_adopted_dict_stays_its_own() -> None:
    """A dict that has a ``maxsize`` already keeps its meaning; the registry's bound is another number."""
    registry: Any = adopt(OwnSize(2), Limits.of(maxsize=5))
    registry.update(a=1, b=2, c=3)
    assert (2, True) == (registry.maxsize, registry.full())
    registry.maxsize = 9

    assert (9, False, 3) == (registry.maxsize, registry.full(), len(registry))
    assert 9 == copy.copy(registry).maxsize
    entries: Any = adopt(AttributeDict(), Limits.of(maxsize=5))
    entries.ttl = 7
    assert (7, {"ttl": 7}) == (entries.ttl, entries)


@given(
    st.lists(st.tuples(st.sampled_from(["put", "get", "maxsize", "ttl", "idle", "wait", "none"]), st.integers(1, 9)))
)
def test_any_sequence_of_changes_keeps_to_the_limits_of_the_moment(steps: list[tuple[str, int]]) -> None:
    """Against a model that keeps all times from the beginning."""
    clock = ManualClock()
    registry: Registry[int, int] = Registry(on_evict=lambda removal: None, timer=clock)
    model: OrderedDict[int, list[float]] = OrderedDict()  # key: written, used; least recent first
    maxsize: int | None = None
    limits: dict[str, float | None] = {"ttl": None, "idle": None}
    for step, number in steps:
        if step == "wait":
            clock.advance(600 * number)
        elif step == "put":
            registry[number] = number
            model[number] = [clock(), clock()]
            model.move_to_end(number)
        elif step == "get":
            registry.get(number)
        elif step == "maxsize":
            registry.maxsize = maxsize = number
        else:
            name = step if step != "none" else ("ttl", "idle")[number % 2]
            limits[name] = None if step == "none" else 1000 * number
            setattr(registry, name, limits[name])
        for key, (written, used) in list(model.items()):
            if clock() - written >= (limits["ttl"] or 1e9) or clock() - used >= (limits["idle"] or 1e9):
                del model[key]
        if step == "get" and number in model:
            model[number][1] = clock()
            model.move_to_end(number)
        while maxsize is not None and len(model) > maxsize:
            model.popitem(last=False)

        assert set(model) == set(registry)


def test_lowering_from_many_threads_keeps_the_last_bound(together: Callable[..., None]) -> None:
    registry: Registry[int, int] = Registry(maxsize=1000)

    def write() -> None:
        for number in range(300):
            registry[number] = number

    def lower() -> None:
        for bound in range(100, 9, -1):
            registry.maxsize = bound

    together(write, write, lower)
    registry[0] = 0

    assert (10, 10) == (registry.maxsize, len(registry))
