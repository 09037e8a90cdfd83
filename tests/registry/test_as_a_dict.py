"""Code that was written for a dict sees a dict with the true contents, and looking is no use."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import attrs
import msgspec
import orjson
import pydantic
import pytest

from hygiene.adoption import adopt
from hygiene.errors import RegistryFull
from hygiene.events import Cause
from hygiene.limits import Limits
from hygiene.registry import Registry
from hygiene.testing import ManualClock

CONTENT = {"a": 1, "b": 2, "c": 3}

FLAVOURS: dict[str, dict[str, Any]] = {
    "unbounded": {},
    "lru": {"maxsize": 10},
    "fifo": {"maxsize": 10, "policy": "fifo"},
    "lfu": {"maxsize": 10, "policy": "lfu"},
    "importance": {"maxsize": 10, "policy": "importance", "importance": lambda entry: entry.value},
    "refusing": {"maxsize": 10, "policy": "none", "overflow": "raise"},
    "ttl": {"ttl": 60},
    "idle": {"idle": 60},
    "told": {"maxsize": 10, "on_evict": print},
    "bytes": {"max_bytes": 1000, "getsizeof": lambda value: 1},
    "busy": {"maxsize": 10, "busy": lambda entry: True},
    "closing": {"maxsize": 10, "close": "close"},
}


@pytest.fixture(params=FLAVOURS)
def registry(request: pytest.FixtureRequest) -> Registry[str, int]:
    """A registry of each flavour, that holds `CONTENT`; ``b`` was used last."""
    registry: Registry[str, int] = Registry(CONTENT, **FLAVOURS[request.param])
    registry["b"]
    return registry


def keywords(**given: int) -> dict[str, int]:
    return given


@dataclasses.dataclass
class Record:
    values: dict[str, int]


@attrs.define
class AttrsRecord:
    values: dict[str, int]


class Model(pydantic.BaseModel):
    values: dict[str, int]


class Struct(msgspec.Struct):
    values: dict[str, int]


def iterated(registry: Registry[str, int]) -> dict[str, int]:
    return {key: value for key, value in registry.items()}  # noqa: C416 - the loop is under test


def from_generator(registry: Registry[str, int]) -> dict[str, int]:
    def generate() -> Iterator[dict[str, int]]:
        yield dict(registry)

    return next(generate())


READERS: dict[str, Callable[[Any], Any]] = {
    "json": lambda r: json.loads(json.dumps(r)),
    "json with an indent": lambda r: json.loads(json.dumps(r, indent=2)),
    "json sorted": lambda r: json.loads(json.dumps(r, sort_keys=True)),
    "orjson": lambda r: orjson.loads(orjson.dumps(r)),
    "msgspec json": lambda r: msgspec.json.decode(msgspec.json.encode(r)),
    "msgspec msgpack": lambda r: msgspec.msgpack.decode(msgspec.msgpack.encode(r)),
    "msgspec struct": lambda r: msgspec.json.decode(msgspec.json.encode(Struct(r)))["values"],
    "msgspec convert": lambda r: msgspec.convert(r, dict[str, int]),
    "msgspec builtins": msgspec.to_builtins,
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "copy": lambda r: r.copy(),
    "pydantic": lambda r: Model(values=r).values,
    "pydantic dump": lambda r: Model.model_construct(values=r).model_dump()["values"],
    "pydantic json": lambda r: json.loads(Model.model_construct(values=r).model_dump_json())["values"],
    "dataclasses.asdict": lambda r: dataclasses.asdict(Record(r))["values"],
    "dataclasses.replace": lambda r: dataclasses.replace(Record(r)).values,
    "attrs.asdict": lambda r: attrs.asdict(AttrsRecord(r))["values"],
    "dict": dict,
    "{**r}": lambda r: {**r},
    "f(**r)": lambda r: keywords(**r),
    "dict(**r)": lambda r: dict(**r),
    "f(k=..., **r)": lambda r: {k: v for k, v in keywords(z=9, **r).items() if k != "z"},
    "dict.update": lambda r: (d := {}, d.update(r))[0],
    "dict |": lambda r: {} | r,
    "| dict": lambda r: r | {},
    "r | r": lambda r: r | r,
    "|= into a dict": lambda r: (d := {}, d.__ior__(r))[0],
    "OrderedDict": OrderedDict,
    "Counter": Counter,
    "defaultdict": lambda r: defaultdict(int, r),
    "MappingProxyType": lambda r: dict(MappingProxyType(r)),
    "map(dict, ...)": lambda r: next(iter(map(dict, [r]))),
    "a generator": from_generator,
    "items": iterated,
    "zip(keys, values)": lambda r: dict(zip(r.keys(), r.values(), strict=True)),
    "dict(items)": lambda r: dict(r.items()),
    "dict.copy": dict.copy,
    "dict.items": lambda r: dict(dict.items(r)),
}


# These read the storage itself, where an entry stays until it is dropped.
READ_BY_C = ("msgspec", "pydantic", "orjson", "dict.copy", "dict.items")


def order_of_leaving(registry: Registry[str, int]) -> list[str]:
    """The keys, in the order in which the bound would drop them."""
    left = []
    while registry:
        before = set(registry)
        if not registry.trim(len(registry) - 1):
            break
        left += before - set(registry)
    return left


@pytest.mark.parametrize("reader", READERS)
def test_readers_see_the_true_content(registry: Registry[str, int], reader: str) -> None:
    """Serialisers, copies, unpacking and unions see what the registry holds, in its order of insertion."""
    seen = READERS[reader](registry)

    assert CONTENT == seen
    assert list(CONTENT) == list(seen)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_reading_it_whole_is_no_use(reader: str, policy: Any) -> None:
    """Copying or serialising a registry changes neither who leaves next nor the count of hits."""
    read: Registry[str, int] = Registry(CONTENT, maxsize=10, policy=policy)
    unread: Registry[str, int] = Registry(CONTENT, maxsize=10, policy=policy)
    for registry in (read, unread):
        registry["c"]
        registry["a"]
    READERS[reader](read)

    assert unread.stats() == read.stats()
    assert order_of_leaving(unread) == order_of_leaving(read)


@pytest.mark.parametrize("reader", READERS)
def test_reading_it_whole_prolongs_nothing(reader: str, clock: ManualClock) -> None:
    """A registry that is only copied or serialised is idle."""
    registry: Registry[str, int] = Registry(CONTENT, idle=10, timer=clock)
    clock.advance(9)
    READERS[reader](registry)
    clock.advance(1)

    assert [] == list(registry)


@pytest.mark.parametrize("reader", [name for name in READERS if not name.startswith(READ_BY_C)])
def test_what_is_over_is_not_read(reader: str, clock: ManualClock) -> None:
    """Python code that copies a registry does not get entries whose time is over."""
    registry: Registry[str, int] = Registry({"old": 0}, ttl=10, timer=clock)
    clock.advance(10)
    registry.update(CONTENT)
    clock.advance(9)

    assert CONTENT == READERS[reader](registry)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_brings_back_content_and_limits(protocol: int) -> None:
    """What is loaded holds the same entries and is bounded as before; hooks are code and stay behind."""
    registry: Registry[str, int] = Registry(
        CONTENT, maxsize=3, ttl="1h", name="sessions", on_evict=print, close="close"
    )
    loaded = pickle.loads(pickle.dumps(registry, protocol))
    loaded["d"] = 4

    assert isinstance(loaded, Registry)
    assert {"b": 2, "c": 3, "d": 4} == loaded
    assert 3600 == loaded._limits.ttl
    assert loaded._limits.on_evict is None


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_can_be_pickled(flavour: str) -> None:
    """Whatever limits a registry has, it is pickled, copied and deep-copied like a dict."""
    registry: Registry[str, int] = Registry(CONTENT, **FLAVOURS[flavour])
    loaded = pickle.loads(pickle.dumps(registry))

    assert (CONTENT, True) == (loaded, isinstance(loaded, Registry))


class Named(Registry[str, int]):
    """A user's own subclass, which gives its limits itself and takes other arguments."""

    def __init__(self, title: str, size: int, **limits: Any) -> None:
        self.title = title
        super().__init__(maxsize=size, **limits)


@pytest.mark.parametrize("limits", [{}, {"ttl": 60}], ids=["plain", "timed"])
@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_subclass_is_copied_with_its_attributes(twin: Callable[[Any], Any], limits: dict[str, Any]) -> None:
    """A subclass keeps class, attributes and bound through copies, whatever its ``__init__`` takes."""
    registry = Named("users", 3, **limits)
    registry.update(CONTENT)
    copied = twin(registry)
    copied["d"] = 4

    assert isinstance(copied, Named)
    assert "users" == copied.title
    assert {"b": 2, "c": 3, "d": 4} == copied
    assert CONTENT == registry


def test_a_subclass_may_set_time_limits_itself(clock: ManualClock) -> None:
    """Limits that a subclass passes to ``super().__init__`` hold, although its caller did not name them."""

    class Sessions(Registry[str, int]):
        def __init__(self) -> None:
            super().__init__(ttl=10, timer=clock)

    sessions = Sessions()
    sessions["a"] = 1
    clock.advance(10)

    assert isinstance(sessions, Sessions)
    assert "a" not in sessions
    assert sessions.get("a") is None


def test_copies_are_independent(registry: Registry[str, int]) -> None:
    """What happens to a copy does not happen to the original, and the other way round."""
    for twin in (registry.copy(), copy.copy(registry), copy.deepcopy(registry), pickle.loads(pickle.dumps(registry))):
        del twin["a"]
        twin["z"] = 26
        registry["y"] = 25

        assert {"b": 2, "c": 3, "z": 26} == twin
        assert CONTENT | {"y": 25} == registry
        del registry["y"]


def test_a_copy_has_the_bound_and_not_the_hooks() -> None:
    """Values belong to the registry they were put in: a copy neither tells nor closes them."""
    told: list[Any] = []
    registry: Registry[str, int] = Registry(CONTENT, maxsize=3, on_evict=told.append, close=told.append)
    copied = registry.copy()
    copied["d"] = 4

    assert 3 == len(copied)
    assert [] == told


def test_deepcopy_of_a_cycle() -> None:
    """A registry that holds itself is copied as one that holds itself."""
    registry: Registry[str, Any] = Registry(maxsize=5)
    registry["self"] = registry
    registry["list"] = [registry]
    twin = copy.deepcopy(registry)

    assert twin is not registry
    assert twin["self"] is twin
    assert twin["list"][0] is twin


def test_deepcopy_shares_what_the_original_shared() -> None:
    """A value met twice is one value in the copy, too."""
    shared = [1]
    registry: Registry[str, Any] = Registry({"a": shared, "b": shared}, maxsize=5)
    twin = copy.deepcopy(registry)

    assert twin["a"] is twin["b"]
    assert twin["a"] is not shared


def test_repr_is_that_of_a_dict(registry: Registry[str, int]) -> None:
    assert repr(CONTENT) == repr(registry) == str(registry)


def test_repr_of_a_registry_that_holds_itself() -> None:
    registry: Registry[str, Any] = Registry(maxsize=5)
    registry["me"] = registry

    assert "{'me': {...}}" == repr(registry)


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_repr_of_a_registry_that_holds_a_view_of_itself(registry: Registry[str, Any], view: str) -> None:
    """It ends with ``...``, as that of a dict does."""
    plain: dict[str, Any] = dict(CONTENT)
    plain["view"], registry["view"] = getattr(plain, view)(), getattr(registry, view)()

    assert repr(plain) == repr(registry)
    assert repr(plain["view"]) == repr(registry["view"])


def test_equality_is_that_of_a_dict(registry: Registry[str, int]) -> None:
    """Equal to a dict or an OrderedDict with the same entries, in any order; not hashable."""
    backwards = dict(reversed(CONTENT.items()))

    assert registry == backwards
    assert backwards == registry
    assert registry == OrderedDict(backwards)
    assert not registry != backwards  # noqa: SIM202 - the operator is under test
    assert registry != {"a": 1}
    with pytest.raises(TypeError, match="unhashable"):
        hash(registry)


def test_it_is_a_dict_by_every_test(registry: Registry[str, int]) -> None:
    assert isinstance(registry, dict)
    assert isinstance(registry, MutableMapping)
    match registry:
        case {"a": first, **rest}:
            assert (1, {"b": 2, "c": 3}) == (first, rest)
        case _:
            pytest.fail("no mapping pattern matches it")


def test_iteration_is_in_insertion_order_whatever_was_read(registry: Registry[str, int]) -> None:
    """Reads never reorder what a reader sees."""
    for key in ("c", "a", "b", "a"):
        registry[key]
        registry.get(key)
        registry.touch(key)

    assert ["a", "b", "c"] == list(registry)
    assert ["c", "b", "a"] == list(reversed(registry))
    assert ["a", "b", "c"] == list(registry.keys())
    assert [("c", 3), ("b", 2), ("a", 1)] == list(reversed(registry.items()))
    assert [3, 2, 1] == list(reversed(registry.values()))
    assert b'{"a":1,"b":2,"c":3}' == orjson.dumps(registry)
    registry["a"] = 10

    assert ["a", "b", "c"] == list(registry)


def test_union_gives_a_dict(registry: Registry[str, int]) -> None:
    """The union of two may exceed the bound, so it is a plain dict; in place it is an update."""
    assert {**CONTENT, "d": 4} == registry | {"d": 4}
    assert {"d": 4, **CONTENT} == {"d": 4} | registry
    assert ["d", "a", "b", "c"] == list({"d": 4} | registry)
    assert {**CONTENT, "a": 9} == registry | {"a": 9}
    same = registry
    same |= [("d", 4)]

    assert same is registry
    assert {**CONTENT, "d": 4} == registry
    with pytest.raises(TypeError):
        registry | [("d", 4)]


def test_fromkeys_gives_a_registry_without_limits(registry: Registry[str, int]) -> None:
    made = registry.fromkeys("xyz", 0)

    assert {"x": 0, "y": 0, "z": 0} == made
    assert 0 == made["x"]
    assert 0 == made.get("y")
    assert isinstance(made, Registry)


def test_views_are_live_and_like_sets(registry: Registry[str, int]) -> None:
    """A view follows the registry, takes part in set operations, and shows itself as a dict's does."""
    keys, values, items = registry.keys(), registry.values(), registry.items()
    del registry["a"]

    assert (2, 2, 2) == (len(keys), len(values), len(items))
    assert {"b", "c"} == keys == {"b": 0, "c": 0}.keys()
    assert {"b"} == keys & {"b", "z"}
    assert {"c"} == keys - {"b"}
    assert {("b", 2)} == items & {("b", 2), ("c", 9)}
    assert ("b", 2) in items
    assert ("b", 3) not in items
    assert "b" not in items
    assert 2 in values
    assert 9 not in values
    assert "b" in keys
    assert keys.isdisjoint({"z"})
    assert "dict_keys(['b', 'c'])" == repr(keys)
    assert "dict_values([2, 3])" == repr(values)
    assert "dict_items([('b', 2), ('c', 3)])" == repr(items)
    assert {"b": 2, "c": 3} == keys.mapping == values.mapping == items.mapping
    with pytest.raises(TypeError):
        keys.mapping["b"] = 3  # type: ignore[index]


def test_looking_at_views_is_no_use() -> None:
    """Neither walking a view nor asking whether something is in it counts as use."""
    registry: Registry[str, int] = Registry(CONTENT, maxsize=3)
    assert "a" in registry
    assert "a" in registry.keys()  # noqa: SIM118 - the view is under test
    assert ("a", 1) in registry.items()
    assert 1 in registry.values()
    assert registry.peek("a") == 1
    assert list(registry.items())
    assert registry == CONTENT
    assert repr(registry)
    registry["d"] = 4

    assert ["b", "c", "d"] == list(registry)
    assert 0 == registry.stats().hits


@pytest.mark.parametrize("walk", [iter, reversed, lambda r: iter(r.keys()), lambda r: reversed(r.keys())])
def test_a_loop_skips_what_has_left_and_never_raises(registry: Registry[str, int], walk: Any) -> None:
    """Entries may leave, and new ones may come, while a loop is at work: what stayed is seen once."""
    seen = []
    for key in walk(registry):
        seen.append(key)
        registry.pop("b", None)
        registry[f"new {key}"] = 0

    assert ["a", "c"] == sorted(seen)


@pytest.mark.parametrize("walk", [lambda r: iter(r.items()), lambda r: reversed(r.items())])
def test_a_loop_over_items_sees_the_present_values(registry: Registry[str, int], walk: Any) -> None:
    seen = []
    for item in walk(registry):
        seen.append(item)
        registry["b"] = 20
        registry.pop("a" if item[0] == "c" else "c", None)

    assert {("b", 20)} < set(seen)
    assert 2 == len(seen)


def test_a_loop_over_values_ends_after_clear(registry: Registry[str, int]) -> None:
    values = iter(registry.values())
    first = next(values)
    registry.clear()

    assert (1, []) == (first, list(values))


class Sensitive:
    """A key that runs something whenever it is hashed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.on_hash: Callable[[], Any] = lambda: None

    def __hash__(self) -> int:
        self.on_hash()
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sensitive) and self.name == other.name

    def __repr__(self) -> str:
        return f"Sensitive({self.name!r})"


def test_a_copy_is_complete_although_entries_leave_halfway(elsewhere: Callable[..., Any]) -> None:
    """``dict(r)`` shows the registry as it stood when the copying began, whatever leaves meanwhile."""
    keys = [Sensitive(name) for name in "abcd"]
    registry: Registry[Any, int] = Registry(dict.fromkeys(keys, 0), maxsize=4)
    left = []

    def leave() -> None:
        if not left:
            left.append(True)
            elsewhere(registry.trim, 1)

    copied: dict[Any, int] = {}
    keys[1].on_hash = lambda: copied and leave()
    copied.update(registry)

    assert 1 == len(registry)
    assert dict.fromkeys(keys, 0) == copied


def abandon(registry: Registry[Any, Any], key: Sensitive, how: Callable[..., Any] = dict.update) -> None:
    """Begin a copy that fails when it comes to *key*, which must not be the first."""
    copied: dict[Any, Any] = {}

    def fail() -> None:
        if copied:
            raise InterruptedError

    key.on_hash = fail
    with pytest.raises(InterruptedError):
        how(copied, registry)
    key.on_hash = lambda: None


def test_a_copy_that_is_abandoned_halfway_leaves_nothing_behind() -> None:
    """After a copy that failed in its middle, lookups see the present values, and count."""
    keys = [Sensitive(name) for name in "abcd"]
    registry: Registry[Any, int] = Registry(dict.fromkeys(keys, 0), maxsize=4)
    abandon(registry, keys[2])
    registry[keys[3]] = 99

    assert 99 == registry[keys[3]]
    assert 99 == registry[keys[3]]
    assert 2 == registry.stats().hits


def test_an_abandoned_copy_holds_no_value_once_the_registry_is_read() -> None:
    """A value that leaves after a failed copy is freed."""

    class Value:
        pass

    keys = [Sensitive(name) for name in "abc"]
    registry: Registry[Any, Any] = Registry({key: Value() for key in keys}, maxsize=3)
    watched = weakref.ref(registry.peek(keys[2]))
    abandon(registry, keys[1])
    registry[keys[0]]
    del registry[keys[2]]
    gc.collect()

    assert watched() is None


@pytest.mark.parametrize("end", [lambda r, key: r[key], lambda r, key: dict(r)], ids=["a read", "a copy"])
def test_a_value_left_by_an_abandoned_copy_dies_outside_the_lock(
    elsewhere: Callable[..., Any], end: Callable[[Any, Any], Any]
) -> None:
    """A copy that failed halfway gives up the values it had gathered with the lock free."""
    ended: list[bool] = []

    class Last:
        def __del__(self) -> None:
            try:
                elsewhere(lambda: registry.lease("used", lambda: 1).__enter__())
                ended.append(True)
            except TimeoutError:
                ended.append(False)

    keys = [Sensitive(name) for name in "abc"]
    registry: Registry[Any, Any] = Registry({keys[0]: 0, keys[1]: 0, keys[2]: Last()})
    abandon(registry, keys[1])
    del registry[keys[2]]
    end(registry, keys[0])

    assert [True] == ended


def test_nested_copies() -> None:
    """Copies within copies, of the same registry and of registries inside registries."""
    inner: Registry[str, int] = Registry(CONTENT, maxsize=5)
    outer: Registry[str, Any] = Registry({"x": inner, "y": inner}, maxsize=5)
    copied = {key: dict(value) for key, value in dict(outer).items()}
    unpacked = {**outer, **{"z": {**inner}}}  # noqa: PIE800 - the nesting is under test

    assert {"x": CONTENT, "y": CONTENT} == copied
    assert {"x": CONTENT, "y": CONTENT, "z": CONTENT} == unpacked
    assert (0, 0) == (inner.stats().hits, outer.stats().hits)


def test_copying_in_many_threads_counts_nothing(together: Callable[..., None], hasty: None) -> None:
    """Threads that copy at once get the whole content each, and no copy counts as a hit."""
    registry: Registry[int, int] = Registry({i: i for i in range(100)}, maxsize=100)
    wanted = {i: i for i in range(100)}

    def copy_often() -> None:
        for _ in range(30):
            assert wanted == dict(registry)
            assert wanted == {**registry}

    together(*[copy_often] * 4)

    assert 0 == registry.stats().hits
    assert 0 == registry[0]
    assert 1 == registry.stats().hits


def test_lookups_between_copies_count(registry: Registry[str, int]) -> None:
    """``r[k]`` in the very function that copies is a lookup."""
    before = registry.stats().hits
    for _ in range(3):
        copied = dict(registry)
        registry["a"]
        assert copied == {**registry}
        registry.get("a")

    assert before + 6 == registry.stats().hits


def test_every_way_to_write_is_bounded() -> None:
    """No way of writing gets past the bound, and the oldest leave first."""
    pairs = [(i, i) for i in range(10)]
    wanted = [7, 8, 9]
    registries: list[Registry[Any, Any]] = [Registry(maxsize=3) for _ in range(6)]
    registries[0].update(pairs)
    registries[1].update(dict(pairs))
    registries[2] |= dict(pairs)
    for key, value in pairs:
        registries[3].setdefault(key, value)
        registries[4][key] = value
    registries[5].update(Registry(pairs))
    registries.append(Registry(pairs, maxsize=3))
    registries.append(Registry(dict(pairs), maxsize=3))
    registries.append(Registry(iter(pairs), maxsize=3))
    registries[6].__init__(pairs)  # type: ignore[misc] # as for a dict, an update

    assert [wanted] * 9 == [list(registry) for registry in registries]


def test_keywords_of_update() -> None:
    registry: Registry[str, int] = Registry(maxsize=2)
    registry.update({"a": 1}, b=2, c=3)

    assert {"b": 2, "c": 3} == registry
    with pytest.raises(TypeError):
        registry.update({}, {})


@pytest.mark.parametrize("word", ["self", "other", "source", "key", "args", "kwargs"])
def test_any_word_is_a_keyword_of_update(registry: Registry[str, int], word: str) -> None:
    """``update(self=1)`` puts the key ``"self"``."""
    registry.update(**{word: 4})

    assert {**CONTENT, word: 4} == registry


@pytest.mark.parametrize("limits", [{}, {"maxsize": 5}, {"ttl": 60}, {"maxsize": 5, "on_evict": print}])
def test_the_constructor_and_ior_do_not_call_an_overridden_update(limits: dict[str, Any]) -> None:
    """As in a dict: only a call of ``update`` calls it."""

    class Loud(Registry[str, int]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("update was called")

    registry = Loud(CONTENT, **limits)
    registry |= {"d": 4}

    assert {**CONTENT, "d": 4} == registry == copy.copy(registry) == copy.deepcopy(registry)
    with pytest.raises(AssertionError, match="update was called"):
        registry.update(e=5)


def test_update_from_a_dict_that_changes_meanwhile() -> None:
    """``update`` takes its source as it is at the call, as a dict does, whoever changes it in the middle."""
    source = {"a": 1, "b": 2}

    def convert(value: int) -> int:
        source[f"later {value}"] = 0
        return value

    registry: Registry[str, int] = Registry(maxsize=10, values=convert)
    registry.update(source)

    assert {"a": 1, "b": 2} == registry


def test_setdefault_is_a_lookup_and_a_write() -> None:
    registry: Registry[str, Any] = Registry({"a": 1, "b": 2}, maxsize=2)

    assert 1 == registry.setdefault("a", 9)
    assert 3 == registry.setdefault("c", 3)
    assert {"a": 1, "c": 3} == registry
    assert registry.setdefault("d") is None
    stats = registry.stats()
    assert (1, 2) == (stats.hits, stats.misses)


def test_missing_of_a_subclass_is_asked() -> None:
    """A ``__missing__`` of the user's own works as on a dict."""

    class Doubling(Registry[int, int]):
        def __missing__(self, key: int) -> int:
            return 2 * key

    registry = Doubling(maxsize=2)

    assert (8, None, {}) == (registry[4], registry.get(4), registry)


@pytest.mark.parametrize("limits", [{}, {"maxsize": 5}, {"ttl": 60}, {"maxsize": 5, "policy": "lfu"}])
def test_missing_of_an_instance_has_no_effect(limits: dict[str, Any]) -> None:
    """``__missing__`` counts where the class has it, as on an OrderedDict."""
    registry: Any = Registry(**limits)
    registry.__missing__ = lambda key: key
    with pytest.raises(KeyError, match="a"):
        registry["a"]

    assert {} == registry


def test_default_factory_makes_what_is_missing() -> None:
    registry: Registry[str, list[int]] = Registry(maxsize=2, default_factory=list)
    registry["a"].append(1)

    assert {"a": [1]} == registry
    assert registry.get("b") is None
    assert list is registry.default_factory
    assert not hasattr(Registry, "default_factory")


def test_a_default_that_cannot_be_made_changes_nothing() -> None:
    def fail() -> int:
        raise LookupError("no default today")

    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, default_factory=fail)
    with pytest.raises(LookupError, match="no default today"):
        registry["b"]

    assert {"a": 1} == registry


def test_popitem_takes_the_last_or_the_first() -> None:
    registry: Registry[str, int] = Registry(CONTENT, maxsize=3)
    registry["a"]

    assert ("c", 3) == registry.popitem()
    assert ("a", 1) == registry.popitem(last=False)
    assert ("b", 2) == registry.popitem(False)
    with pytest.raises(KeyError, match="empty"):
        registry.popitem()


@pytest.mark.parametrize("flavour", ["lru", "fifo", "lfu", "ttl", "told", "bytes", "busy"])
def test_move_to_end_changes_what_loops_see(flavour: str) -> None:
    """For code that was written for an OrderedDict."""
    registry: Registry[str, int] = Registry(CONTENT, **FLAVOURS[flavour])
    registry.move_to_end("a")
    assert ["b", "c", "a"] == list(registry)
    registry.move_to_end("c", last=False)

    assert ["c", "b", "a"] == list(registry)
    assert CONTENT == registry
    with pytest.raises(KeyError):
        registry.move_to_end("z")


def test_values_converts_what_is_put_in() -> None:
    """A class converts instances of its base only; a function converts everything."""

    class Messages(list[str]):
        pass

    registry: Registry[str, Any] = Registry({"a": ["x"]}, values=Messages)
    registry["b"] = ("not", "a", "list")
    registry.setdefault("c", ["y"])
    own = registry["d"] = Messages()

    assert [Messages, tuple, Messages] == [type(registry[key]) for key in "abc"]
    assert own is registry["d"]
    assert {"n": 3} == Registry({"n": "3"}, values=lambda value: len(value) + 2)


def test_a_value_that_cannot_be_converted_changes_nothing() -> None:
    registry: Registry[str, int] = Registry({"a": "1"}, maxsize=1, values=int.__call__)
    with pytest.raises(ValueError, match="invalid literal"):
        registry["b"] = "two"  # type: ignore[assignment]

    assert {"a": 1} == registry


class Shelf(dict[str, int]):
    """A dict of somebody's own."""

    shelf_mark = "Q 3"

    def total(self) -> int:
        return sum(self.values())


@pytest.mark.parametrize("limits", [{"maxsize": 2}, {"maxsize": 2, "ttl": 60}, {"maxsize": 2, "busy": "x"}])
def test_adopting_keeps_class_and_attributes(limits: dict[str, Any]) -> None:
    """A subclass of dict stays one, with its methods and attributes, and is bounded."""
    shelf = Shelf(CONTENT)
    shelf.shelf_mark = "R 7"
    registry: Any = adopt(shelf, Limits.of(**limits))
    loaded = pickle.loads(pickle.dumps(registry))

    for bounded in (registry, loaded, copy.copy(registry), copy.deepcopy(registry)):
        assert isinstance(bounded, Shelf)
        assert isinstance(bounded, Registry)
        assert (5, "R 7", {"b": 2, "c": 3}) == (bounded.total(), bounded.shelf_mark, bounded)
        bounded["d"] = 4
        assert {"c": 3, "d": 4} == bounded
    assert CONTENT == shelf


@pytest.mark.parametrize("source", [OrderedDict(CONTENT), Counter(CONTENT), defaultdict(int, CONTENT)])
def test_adopting_the_dicts_of_the_library(source: dict[str, int]) -> None:
    """OrderedDict, Counter and defaultdict keep what they can do."""
    registry: Any = adopt(source, Limits.of(maxsize=2))

    assert {"b": 2, "c": 3} == registry
    if isinstance(source, Counter):
        registry.update("bb")
        assert [("b", 4), ("c", 3)] == registry.most_common()
        assert 0 == registry["nobody"]
    elif isinstance(source, defaultdict):
        assert 0 == registry["new"]
        assert {"c": 3, "new": 0} == registry
    else:
        registry.move_to_end("b")
        assert ["c", "b"] == list(registry)


def test_adopting_names_a_class_that_cannot_be_extended() -> None:
    class Slotted(dict[str, int]):
        __slots__ = ("extra",)

    with pytest.raises(TypeError, match=r"wanted a dict.*that can be extended.*found .*Slotted"):
        adopt(Slotted(), Limits.of(maxsize=2))


def test_a_full_registry_that_refuses_is_copied_whole() -> None:
    """Copying is no way to lose entries, and no way past the bound."""
    registry: Registry[str, int] = Registry(CONTENT, maxsize=3, policy="none", overflow="raise")
    for twin in (registry.copy(), copy.deepcopy(registry), pickle.loads(pickle.dumps(registry))):
        assert CONTENT == twin
        with pytest.raises(RegistryFull):
            twin["d"] = 4


def test_a_mapping_that_is_no_dict_is_taken() -> None:
    proxy: Mapping[str, int] = MappingProxyType(CONTENT)

    assert CONTENT == Registry(proxy, maxsize=5)
    assert CONTENT == Registry(Registry(CONTENT), maxsize=5)


def test_a_replaced_value_is_told_as_replaced() -> None:
    told: list[Any] = []
    registry: Registry[str, int] = Registry({"a": 1}, on_evict=told.append)
    registry["a"] = 2
    registry |= {"a": 3}
    registry.update(a=4)

    assert [(1, Cause.REPLACED), (2, Cause.REPLACED), (3, Cause.REPLACED)] == [(r.value, r.cause) for r in told]


class AttributeDict(dict[str, Any]):
    """A dict whose attributes are its entries, as many people write it."""

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_a_dict_whose_attributes_are_entries_is_bounded() -> None:
    """What the registry knows about itself is no entry; what is assigned is one, and counts."""
    adopted: Any = adopt(AttributeDict(a=1), Limits.of(maxsize=2))
    adopted.b = 2
    adopted.c = 3

    assert {"b": 2, "c": 3} == adopted
    assert (2, 3) == (adopted.b, adopted["c"])
    with pytest.raises(AttributeError, match="a"):
        _ = adopted.a


class Counting(dict[str, int]):
    """A user's class that happens to call an attribute as a registry calls one."""

    def hit(self) -> None:
        self._hits = getattr(self, "_hits", 0) + 1


def test_attributes_that_would_clash_are_refused() -> None:
    """Two owners of one attribute would overwrite each other without a word."""
    with pytest.raises(TypeError, match="Counting, which uses _hits, as a registry does"):
        adopt(Counting(a=1), Limits.of(maxsize=2))
