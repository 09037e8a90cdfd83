"""Evicted values that cannot be weakly referenced, and are still referenced: dicts, lists, instances with slots."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hygiene import Cause, Removal, SQLiteStore, bounded_registry
from hygiene.group import Group
from hygiene.janitor import janitor
from hygiene.limits import Limits
from hygiene.registry import Registry
from hygiene.testing import ManualClock

PATIENCE = 20.0
MOST = 1000


class Slotted:
    """Has no room for weak references."""

    __slots__ = ("__dict__", "part")

    def act(self) -> None: ...


class Stock(dict[str, int]):
    """A subclass of dict."""


class Record(list[int]):
    __slots__ = ()


KINDS: dict[str, Callable[[], Any]] = {
    "dict": dict,
    "list": list,
    "set": set,
    "deque": deque,
    "bytearray": bytearray,
    "defaultdict": lambda: defaultdict(list),
    "slots": Slotted,
    "dict subclass": Stock,
    "list subclass": Record,
    "tuple": lambda: ([], {}),
}
FLAVOURS: dict[str, dict[str, Any]] = {
    "lru": {},
    "fifo": {"policy": "fifo"},
    "lfu": {"policy": "lfu"},
    "ttl": {"ttl": 60},
    "idle": {"idle": 60},
    "told": {"on_evict": lambda removal: None},
    "bytes": {"max_bytes": 10**9},
    "busy": {"busy": lambda entry: False},
    "raise": {"overflow": "raise"},
}
LOOKUPS: dict[str, Callable[[Registry[Any, Any], Any], Any]] = {
    "[]": lambda r, key: r[key],
    "get": lambda r, key: r.get(key),
    "setdefault": lambda r, key: r.setdefault(key, {}),
    "peek": lambda r, key: r.peek(key),
    "lease": lambda r, key: r.lease(key).__enter__(),
    "lease with create": lambda r, key: r.lease(key, dict).__enter__(),
    "in, then []": lambda r, key: key in r and r[key],
    "pop": lambda r, key: r.pop(key),
}
WAYS: dict[str, Callable[[Registry[Any, Any]], Any]] = {
    "a write": lambda r: r.__setitem__("b", {}),
    "evict": lambda r: r.evict("a"),
    "trim": lambda r: r.trim(0),
    "trim to a share": lambda r: r.trim("0%"),
}


@pytest.fixture(params=FLAVOURS)
def limits(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FLAVOURS[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evicted_container_that_is_referenced_is_found_again(limits: dict[str, Any], kind: str) -> None:
    """Every lookup finds the object that another part of the program still works with."""
    for name, lookup in LOOKUPS.items():
        registry: Registry[str, Any] = Registry(maxsize=1, **limits)
        held = registry["a"] = KINDS[kind]()
        registry["b"] = KINDS[kind]()
        assert ["b"] == list(registry)

        assert held is lookup(registry, "a"), name
        assert len(registry) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_that_only_the_registry_references_leaves_immediately(limits: dict[str, Any], kind: str) -> None:
    """Nothing is kept aside, and no thread is started for it."""
    registry: Registry[str, Any] = Registry(maxsize=1, **limits)
    for key in "abc":
        registry[key] = KINDS[kind]()

    assert "a" not in registry
    assert registry.peek("b") is None
    assert not registry._tail or not (registry._tail.watched or registry._tail.data)


@pytest.mark.parametrize("way", WAYS)
def test_each_kind_of_eviction_keeps_a_referenced_value_aside(limits: dict[str, Any], way: str) -> None:
    registry: Registry[str, Any] = Registry(maxsize=1, **limits)
    held = registry["a"] = {}
    WAYS[way](registry)
    assert "a" not in list(registry)
    held["n"] = 1

    assert {"n": 1} == registry["a"]
    assert held is registry["a"]


def test_eviction_by_bytes_keeps_a_referenced_value_aside() -> None:
    registry: Registry[str, list[int]] = Registry(max_bytes=10, getsizeof=len)
    held = registry["a"] = [0] * 8
    registry["b"] = [0] * 8
    assert ["b"] == list(registry)

    assert held is registry["a"]


@pytest.mark.parametrize("kind", ["dict", "slots"])
def test_a_value_that_is_let_go_is_gone(limits: dict[str, Any], kind: str) -> None:
    """When the last other reference ends, the entry is not found any more, checked by the janitor or not."""
    for look in (lambda r: r.get("a"), lambda r: r.pop("a", None), lambda r: r.peek("a"), lambda r: "a" in r or None):
        registry: Registry[str, Any] = Registry(maxsize=1, **limits)
        held = registry["a"] = KINDS[kind]()
        registry["b"] = KINDS[kind]()
        del held

        assert look(registry) is None


def test_the_janitor_forgets_a_value_that_is_let_go() -> None:
    """It ends without a lookup, and the janitor stops when no value is left to check."""
    ended = threading.Event()

    class Part:
        def __del__(self) -> None:
            ended.set()

    registry: Registry[str, Any] = Registry(maxsize=1)
    held = registry["a"] = {"part": Part()}
    registry["b"] = {}
    tail = registry._tail
    assert tail is not None
    assert tail.watched
    assert janitor.running
    del held

    assert ended.wait(PATIENCE)
    assert not tail.data


def test_expire_checks_at_once_what_the_janitor_checks_later(clock: ManualClock) -> None:
    """A registry with a `ManualClock` is not visited by the janitor."""
    registry: Registry[str, Any] = Registry(maxsize=1, ttl=60, timer=clock)
    held = registry["a"] = {}
    registry["b"] = {}
    registry.expire()
    assert registry._tail is not None
    assert {"a"} == registry._tail.data.keys()
    del held
    registry.expire()

    assert not registry._tail.data


def cyclic(kind: str) -> Any:
    if kind == "list":
        value: Any = []
        value.append([value])
    elif kind == "dict":
        value = {"children": []}
        value["children"].append({"parent": value})
    else:
        value = Slotted()
        value.handler = value.act
        value.part = [value]
    return value


@pytest.mark.parametrize("kind", ["list", "dict", "slots"])
def test_values_that_refer_to_themselves_do_not_pile_up(limits: dict[str, Any], kind: str) -> None:
    """References from a value's own parts do not keep it aside."""
    registry: Registry[int, Any] = Registry(maxsize=10, **limits)
    most = 0
    for number in range(300):
        registry[number] = cyclic(kind)
        most = max(most, len(registry._tail.data) if registry._tail else 0)

    assert most <= 3
    assert [290] == [number for number in range(0, 295, 10) if number in list(registry)]
    registry.expire()
    assert not registry._tail or not registry._tail.data


@pytest.mark.parametrize("kind", ["list", "dict", "slots"])
def test_a_value_that_refers_to_itself_and_is_referenced_is_found_again(kind: str) -> None:
    registry: Registry[int, Any] = Registry(maxsize=1)
    held = registry[0] = cyclic(kind)
    for number in range(1, 10):
        registry[number] = cyclic(kind)
    registry.expire()

    assert held is registry[0]


@pytest.mark.parametrize("kind", [*KINDS, "weak"])
def test_one_object_under_many_keys_is_bounded(kind: str) -> None:
    """Of a default that all keys share, at most 1,000 evicted keys are kept aside; the rest is counted."""

    class Weak: ...

    shared = Weak() if kind == "weak" else KINDS[kind]()
    registry: Registry[int, Any] = Registry(maxsize=10)
    for number in range(3 * MOST):
        registry[number] = shared
    assert registry._tail is not None

    assert MOST == len(registry._tail.data)
    assert 2 * MOST - 10 == registry.stats().forgotten
    assert 0 not in registry
    assert 3 * MOST - 20 in registry
    del shared
    registry.clear()
    assert registry._tail is None


def test_forgetting_a_referenced_value_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    registry: Registry[int, Any] = Registry(maxsize=10, name="users")
    held = [registry.setdefault(number, {}) for number in range(MOST + 100)]

    assert 90 == registry.stats().forgotten
    assert ["registry.evicted_forgotten"] == [record.event_name for record in caplog.records]  # type: ignore[attr-defined]
    assert held[0] is not registry.get(0)
    assert held[100] is registry[100]


def test_a_larger_maxsize_keeps_more_aside() -> None:
    registry: Registry[int, Any] = Registry(maxsize=2 * MOST)
    held = [registry.setdefault(number, {}) for number in range(4 * MOST)]

    assert 0 == registry.stats().forgotten
    assert held[0] is registry[0]


@pytest.mark.parametrize("value", [None, 5, "text", b"bytes", 2.5, True, (1, "a"), ((), (2, (3,))), 10**30])
def test_constants_are_never_kept_aside(limits: dict[str, Any], value: Any) -> None:
    """An equal value does as well, and CPython references some of them for ever."""
    registry: Registry[str, Any] = Registry(maxsize=1, **limits)
    registry["a"] = value
    registry["b"] = value

    assert "a" not in registry


REMOVALS: dict[str, Callable[[Registry[Any, Any]], Any]] = {
    "pop": lambda r: r.pop("a"),
    "del": lambda r: r.__delitem__("a"),
    "clear": lambda r: r.clear(),
    "close": lambda r: r.close(),
    "overwriting": lambda r: (r.__setitem__("a", {"new": 1}), r.__delitem__("a")),
}


@pytest.mark.parametrize("removal", REMOVALS)
def test_removing_reaches_a_value_that_is_kept_aside(limits: dict[str, Any], removal: str) -> None:
    """After ``del r[k]`` the key is gone, whoever references the value."""
    registry: Registry[str, Any] = Registry(maxsize=1, **limits)
    held = registry["a"] = {}
    registry["b"] = {}
    REMOVALS[removal](registry)

    assert "a" not in registry
    assert held is not registry.get("a")


@pytest.mark.parametrize("limit", ["ttl", "idle"])
def test_a_value_that_is_kept_aside_expires(limit: str, clock: ManualClock) -> None:
    """The clock goes on for an evicted entry; the registry lets go of its value then."""
    registry: Registry[str, Any] = Registry(maxsize=1, **{limit: 10}, timer=clock)
    held = registry["a"] = {}
    clock.advance(5)
    registry["b"] = {}
    clock.advance(5)
    registry.expire()

    assert registry._tail is not None
    assert not registry._tail.data
    assert registry.pop("a", None) is None
    assert held == {}


def test_on_evict_is_called_once_for_each_removal() -> None:
    """An entry that was found again, and is evicted again, was removed twice."""
    removals: list[Removal[str, Any]] = []
    registry: Registry[str, Any] = Registry(maxsize=1, on_evict=removals.append)
    held = registry["a"] = {}
    registry["b"] = {}
    assert held is registry["a"]
    registry["b"] = {}
    del held
    removals = [removal for removal in removals if removal.key == "a"]

    assert [Cause.SIZE, Cause.SIZE] == [removal.cause for removal in removals]


@pytest.mark.parametrize("keywords", [{"close": lambda value: None}, {"revive": False}])
def test_a_registry_that_closes_or_does_not_revive_keeps_nothing_aside(keywords: dict[str, Any]) -> None:
    registry: Registry[str, Any] = Registry(maxsize=1, **keywords)
    held = registry["a"] = {}
    registry["b"] = {}

    assert held is not registry.get("a")
    assert registry._tail is None


def test_linked_dicts_keep_their_values_aside(clock: ManualClock) -> None:
    """Each column finds its own value again, with the time of its row."""
    group = Group(Limits.of(maxsize=1, ttl=10, timer=clock), {"states": None, "logs": lambda key: key[0]})
    states, logs = group.adopt("states", {}), group.adopt("logs", {})
    state, log = states["a"], logs["a", 1] = {}, []
    states["b"] = {}
    assert (state, log) == (states["a"], logs["a", 1])
    assert state is states["a"]
    assert log is logs["a", 1]
    states["b"] = {}
    clock.advance(10)

    assert "a" not in states
    assert ("a", 1) not in logs


def test_decorated_attributes_and_their_inner_dicts_keep_values_aside() -> None:
    @bounded_registry("users", maxsize=1)
    @bounded_registry("rooms", maxsize=1, depth=1)
    class Bot:
        def __init__(self) -> None:
            self.users: dict[str, Any] = {}
            self.rooms: dict[str, dict[str, Any]] = {}

    bot = Bot()
    user = bot.users["a"] = {}
    bot.users["b"] = {}
    bot.rooms["x"] = {}
    room = bot.rooms["x"]["a"] = {}
    bot.rooms["x"]["b"] = {}

    assert user is bot.users["a"]
    assert room is bot.rooms["x"]["a"]


def test_values_in_frames_closures_and_generators_are_referenced() -> None:
    """A reference is a reference, wherever it is."""
    registry: Registry[str, Any] = Registry(maxsize=1)
    entered, leave = threading.Event(), threading.Event()
    seen: list[int] = []

    def thread() -> None:
        mine = registry.setdefault("thread", {})
        entered.set()
        assert leave.wait(PATIENCE)
        seen.append(id(mine))

    def closure() -> Callable[[], Any]:
        mine = registry.setdefault("closure", {})
        return lambda: mine

    def generator() -> Iterator[Any]:
        mine = registry.setdefault("generator", {})
        while True:
            yield mine

    worker = threading.Thread(target=thread)
    worker.start()
    assert entered.wait(PATIENCE)
    close, walk = closure(), generator()
    next(walk)
    registry["last"] = {}
    registry.expire()
    found = id(registry["thread"])
    leave.set()
    worker.join(PATIENCE)

    assert [found] == seen
    assert close() is registry["closure"]
    assert next(walk) is registry["generator"]


async def test_a_task_that_waits_keeps_its_value() -> None:
    """Forty tasks change the state of five users while it is evicted all the time."""
    registry: Registry[int, dict[str, int]] = Registry(maxsize=2)
    done = 0

    async def turn(user: int) -> None:
        nonlocal done
        state = registry.setdefault(user, {"turns": 0})
        for _ in range(5):
            await asyncio.sleep(0)
        async with registry.lease(user) as leased:
            assert state is leased
        state["turns"] += 1
        assert state is registry[user]
        done += 1

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*[turn(number % 5) for number in range(40)])

    assert 40 == done


def test_threads_never_work_on_two_values_of_one_key(together: Callable[..., None], hasty: None) -> None:
    """The state that a thread references is the one that every other thread finds."""
    registry: Registry[int, list[int]] = Registry(maxsize=2)
    lock = threading.Lock()
    counted = [0] * 4
    kept: list[list[int]] = [registry.setdefault(key, []) for key in range(4)]

    def work(seed: int) -> None:
        for number in range(200):
            key = (seed + number * 7 + number // 3) % 4
            registry.setdefault(key, []).append(number)
            with lock:
                counted[key] += 1

    together(*[lambda seed=seed: work(seed) for seed in range(4)])

    assert counted == [len(value) for value in kept]


def test_copies_and_pickles_have_what_is_in_memory() -> None:
    """What is kept aside belongs to the registry that evicted it."""
    registry: Registry[str, Any] = Registry(maxsize=1)
    held = registry["a"] = {}
    registry["b"] = {}

    for twin in (registry.copy(), copy.deepcopy(registry), pickle.loads(pickle.dumps(registry))):
        assert ["b"] == list(twin)
        assert "a" not in twin
    assert held is registry["a"]


def test_the_value_of_a_collected_registry_is_not_kept() -> None:
    """The janitor does not keep a registry with values aside alive."""
    registry: Registry[str, Any] = Registry(maxsize=1)
    held = registry["a"] = {}
    registry["b"] = {}
    assert registry["a"] is held
    registry["b"] = {}
    count = len(gc.get_referrers(held))
    del registry
    gc.collect()

    assert len(gc.get_referrers(held)) < count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is not there")
@pytest.mark.slow
def test_a_forked_child_finds_what_was_kept_aside() -> None:
    registry: Registry[str, Any] = Registry(maxsize=1)
    held = registry["a"] = {}
    registry["b"] = {}
    child = os.fork()
    if child == 0:
        os._exit(0 if registry.get("a") is held else 1)

    assert 0 == os.waitpid(child, 0)[1]


# With a store.


@pytest.fixture
def store() -> Iterator[SQLiteStore]:
    with SQLiteStore(":memory:") as store:
        yield store


SAVES: dict[str, Callable[[Registry[Any, Any]], Any]] = {
    "flush": lambda r: r.flush(),
    "close": lambda r: r.close(),
    "the janitor's check": lambda r: (r._check_tail(), r._kept().writer.flush()),
    "changed": lambda r: (r.changed("a"), r._kept().writer.flush()),
}


@pytest.mark.parametrize("kind", ["dict", "list", "lists in a dict"])
@pytest.mark.parametrize("how", SAVES)
def test_changes_after_the_eviction_are_saved(store: SQLiteStore, how: str, kind: str) -> None:
    """A holder goes on working with an evicted value: ``flush``, ``close`` and the janitor save what it has changed."""
    registry: Registry[str, Any] = Registry(maxsize=1, store=store, name="states")
    held = registry.setdefault("a", {"dict": {}, "list": [], "lists in a dict": {"items": []}}[kind])
    registry["b"] = {}
    registry.flush()
    assert registry.evict("b") or "a" not in list(registry)
    assert registry.evict("a") or "a" not in list(registry)
    if isinstance(held, list):
        held.append("after")
    else:
        held.setdefault("items", []).append("after")
    SAVES[how](registry)
    record = store.load("states", "a")

    assert record is not None
    assert (["after"] if kind == "list" else {"items": ["after"]}) == record.value
    registry.close()


@pytest.mark.parametrize("cause", ["size", "idle", "evict"])
def test_changes_are_saved_when_the_value_is_let_go(store: SQLiteStore, clock: ManualClock, cause: str) -> None:
    """The last reference of the holder ends: the value is saved, and then forgotten."""
    registry: Registry[str, Any] = Registry(maxsize=1, idle=10, timer=clock, store=store, name="states")
    held = registry.setdefault("a", {"n": 0})
    registry.flush()
    if cause == "size":
        registry["b"] = {}
    elif cause == "idle":
        clock.advance(10)
        registry.expire()
    else:
        assert registry.evict("a")
    assert "a" not in list(registry)
    held["n"] = 1
    assert held is registry.peek("a")
    del held
    registry.expire()
    assert registry._tail is not None
    assert not registry._tail.data
    registry._kept().writer.flush()

    assert {"n": 1} == store.load("states", "a").value  # type: ignore[union-attr]
    assert {"n": 1} == registry["a"]
    registry.close()


def test_four_hundred_turns_on_held_states_are_all_saved(store: SQLiteStore) -> None:
    """Each turn reads the state, is pushed out of memory by another, and changes it."""
    registry: Registry[int, Any] = Registry(maxsize=2, store=store, name="states")
    for number in range(400):
        mine = registry.setdefault(number % 20, {"turns": 0})
        for other in range(3):
            registry.setdefault((number + other + 1) % 20, {"turns": 0})
        mine["turns"] += 1
    del mine
    registry.close()

    assert 400 == sum(store.load("states", number).value["turns"] for number in range(20))  # type: ignore[union-attr]


def test_the_oldest_of_too_many_is_saved_before_it_is_forgotten(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound its changes until then are in the store; a history refuses further ones."""
    monkeypatch.setattr("hygiene.registry._ASIDE", 2)
    registry: Registry[int, Any] = Registry(maxsize=1, store=store, name="states")
    held, messages = registry.setdefault(0, {}), registry.setdefault(1, [])
    registry[2] = {}
    held["n"] = 1
    rest = [registry.setdefault(number, {}) for number in range(2, 8)]
    registry.flush()

    assert {"n": 1} == store.load("states", 0).value  # type: ignore[union-attr]
    assert 2 == len(registry._tail.data)  # type: ignore[union-attr]
    with pytest.raises(Exception, match="out of date"):
        messages.append("lost")
    assert rest[-1] is registry[7]
    registry.close()


def test_a_value_that_was_written_over_is_not_saved_over_the_new_one(store: SQLiteStore) -> None:
    registry: Registry[str, Any] = Registry(maxsize=1, store=store, name="states")
    held = registry.setdefault("a", {"old": 0})
    registry["b"] = {}
    registry["a"] = {"new": 1}
    held["old"] = 1
    registry.flush()
    del registry["a"]
    held["old"] = 2
    registry.flush()

    assert store.load("states", "a") is None
    assert "a" not in registry
    registry.close()
