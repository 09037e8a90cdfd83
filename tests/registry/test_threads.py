"""Eight threads and two hundred tasks at one registry: no exception, no lost entry, the bound held."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.group import Group
from hygiene.limits import Limits
from hygiene.registry import Registry

THREADS = 8
ROUNDS = 150

FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {"maxsize": 20},
    "fifo": {"maxsize": 20, "policy": "fifo"},
    "ttl": {"maxsize": 20, "ttl": 0.001},
    "idle": {"maxsize": 20, "idle": 0.001},
    "bytes": {"max_bytes": 20, "getsizeof": lambda value: 1},
    "busy": {"maxsize": 20, "busy": lambda entry: entry.key % 7 == 0},
    "lfu": {"maxsize": 20, "policy": "lfu"},
    "importance": {"maxsize": 20, "policy": "importance", "importance": lambda entry: entry.key},
}


class Slim:
    """A value of which no two are equal, and which does not come back once it has left."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Ledger:
    """Counts what was put in and what was told to have left."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.told: list[int] = []

    def hear(self, removal: Any) -> None:
        with self.lock:
            self.told.append(id(removal.value))
            self.keep.append(removal.value)

    keep: list[Any]


def use(registry: Any, seed: int, mine: list[Slim], *, rounds: int = ROUNDS) -> None:
    """What a thread does: everything that a registry can do, in a random but reproducible order."""
    rng = random.Random(seed)
    for i in range(rounds):
        key = rng.randrange(60)
        action = rng.randrange(14)
        if action < 5:
            mine.append(value := Slim(i))
            registry[key] = value
        elif action < 7:
            registry.get(key)
        elif action == 7:
            registry.pop(key, None)
        elif action == 8:
            mine.append(value := Slim(i))
            if registry.setdefault(key, value) is not value:
                mine.pop()
        elif action == 9:
            mine.append(value := Slim(i))
            with registry.lease(key, lambda value=value: value) as held:
                if held is not value:
                    mine.pop()
                assert isinstance(held, Slim)
        elif action == 10:
            registry.touch(key)
            registry.peek(key)
        elif action == 11:
            registry.evict(key)
        elif action == 12:
            with contextlib.suppress(KeyError):
                registry[key]
        else:
            registry.trim(rng.randrange(15, 25))


def look(registry: Any, stop: threading.Event) -> None:
    """What others do meanwhile: loops, views, copies and serialising; none of them ever raises."""
    while not stop.is_set():
        for key in registry:
            assert key < 60
        for key, value in registry.items():
            assert isinstance(value, Slim), key
        assert len(list(registry.values())) <= 60
        keys = list(registry.keys())
        assert len(keys) == len(set(keys))
        assert len(dict(registry)) <= 60
        assert len({**registry}) <= 60
        assert len(copy.copy(registry)) <= 60
        assert len(registry | {}) <= 60
        repr(registry)
        json.dumps({str(key): value.number for key, value in registry.items()})
        registry.stats()
        assert registry != {"not": "there"}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_threads_lose_nothing(together: Callable[..., None], hasty: None, flavour: str) -> None:
    """What was put in is there or was told to have left, once; at rest the bound holds."""
    ledger = Ledger()
    ledger.keep = []  # so that no two values ever have the same id
    registry: Registry[int, Slim] = Registry(on_evict=ledger.hear, revive=False, **FLAVOURS[flavour])
    put: list[list[Slim]] = [[] for _ in range(THREADS)]
    stop = threading.Event()
    left = THREADS
    counting = threading.Lock()

    def work(i: int) -> None:
        nonlocal left
        try:
            use(registry, i, put[i])
        finally:
            with counting:
                left -= 1
                if not left:
                    stop.set()

    together(*[lambda i=i: work(i) for i in range(THREADS)], lambda: look(registry, stop))

    entered = sorted(id(value) for values in put for value in values)
    assert flavour == "busy" or len(registry) <= 20
    registry.clear()
    assert entered == sorted(ledger.told)
    assert 0 == registry.stats().hook_errors
    assert 0 == registry.stats().leased


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_threads_without_hooks_hold_the_bound(together: Callable[..., None], hasty: None, flavour: str) -> None:
    """The short ways of reading and writing, which take no lock, are safe, too."""
    registry: Registry[int, Slim] = Registry(**FLAVOURS[flavour])
    stop = threading.Event()

    def work(i: int) -> None:
        try:
            use(registry, i, [], rounds=4 * ROUNDS)
        finally:
            stop.set()

    together(*[lambda i=i: work(i) for i in range(THREADS)], lambda: look(registry, stop))

    assert flavour == "busy" or len(registry) <= 20
    assert len(list(registry)) <= len(registry)
    for key in range(1000, 1100):
        registry[key] = Slim(key)
    assert len(registry) <= 20 or flavour in {"importance", "busy"}
    registry.clear()
    assert 0 == len(registry)


def test_threads_at_a_group_keep_its_columns_in_step(together: Callable[..., None], hasty: None) -> None:
    """Rows leave all columns together, whoever writes and deletes meanwhile."""
    ledger = Ledger()
    ledger.keep = []
    group = Group(Limits.of(maxsize=20, on_evict=ledger.hear, revive=False), {"a": None, "b": None})
    columns = group.adopt("a", {}), group.adopt("b", {})
    put: list[list[Slim]] = [[] for _ in range(THREADS)]
    stop = threading.Event()

    def work(i: int) -> None:
        try:
            use(columns[i % 2], i, put[i])
        finally:
            stop.set()

    together(*[lambda i=i: work(i) for i in range(THREADS)], lambda: look(columns[0], stop))

    rows = set(columns[0]) | set(columns[1])
    assert rows == set(group.rows)
    assert len(rows) <= 20
    assert {} == group.rows._leases
    for column in columns:
        column.clear()
    assert sorted(id(value) for values in put for value in values) == sorted(ledger.told)
    assert 0 == len(group.rows)


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_two_hundred_tasks_lose_nothing(flavour: str) -> None:
    ledger = Ledger()
    ledger.keep = []
    registry: Registry[int, Slim] = Registry(on_evict=ledger.hear, revive=False, **FLAVOURS[flavour])
    put: list[Slim] = []

    async def create(number: int) -> Slim:
        await asyncio.sleep(0)
        return Slim(number)

    async def work(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(10):
            key = rng.randrange(60)
            if rng.random() < 0.5:
                put.append(value := Slim(i))
                registry[key] = value
            else:
                made: list[Slim] = []

                async def make(made: list[Slim] = made, i: int = i) -> Slim:
                    made.append(await create(i))
                    return made[0]

                async with registry.lease(key, make) as held:
                    if made and held is made[0]:
                        put.append(held)
                    await asyncio.sleep(0)
                    assert held is registry.peek(key) or registry.peek(key) is not None
            await asyncio.sleep(0)

    async with asyncio.timeout(40):
        await asyncio.gather(*[work(seed) for seed in range(200)])

    assert flavour == "busy" or len(registry) <= 20
    registry.clear()
    assert sorted(map(id, put)) == sorted(ledger.told)
    assert 0 == registry.stats().leased


def test_setdefault_in_many_threads_gives_all_the_same_value(together: Callable[..., None], hasty: None) -> None:
    """Whoever asks for a key at the same moment gets one and the same object."""
    for limits in ({}, {"maxsize": 100}, {"ttl": 60}, {"busy": lambda entry: False}, {"policy": "lfu"}):
        registry: Registry[int, object] = Registry(**limits)
        got: list[list[object]] = [[] for _ in range(THREADS)]

        def work(i: int, registry: Registry[int, object] = registry, got: list[list[object]] = got) -> None:
            for key in range(50):
                got[i].append(registry.setdefault(key, object()))

        together(*[lambda i=i: work(i) for i in range(THREADS)])

        assert all(values == got[0] for values in got)


def test_default_factory_in_many_threads_gives_all_the_same_value(together: Callable[..., None], hasty: None) -> None:
    registry: Registry[int, object] = Registry(maxsize=100, default_factory=object)
    got: list[list[object]] = [[] for _ in range(THREADS)]

    def work(i: int) -> None:
        for key in range(50):
            got[i].append(registry[key])

    together(*[lambda i=i: work(i) for i in range(THREADS)])

    assert all(values == got[0] for values in got)


def test_a_loop_sees_once_what_stayed(together: Callable[..., None], hasty: None) -> None:
    """While other threads insert, evict and expire, each entry that was there throughout is seen exactly once."""
    registry: Registry[Any, int] = Registry(maxsize=50, busy=lambda entry: isinstance(entry.key, str), ttl=60)
    stay = [f"stays {i}" for i in range(20)]
    registry.update(dict.fromkeys(stay, 0))
    stop = threading.Event()

    def churn(seed: int) -> None:
        try:
            for i in range(600):
                registry[seed * 1000 + i] = i
                registry.pop(seed * 1000 + i - 3, None)
        finally:
            stop.set()

    def walk() -> None:
        while not stop.is_set():
            for keys in (
                list(registry),
                list(registry.keys()),
                list(dict(registry)),
                [key for key, _ in registry.items()],
            ):
                assert stay == [key for key in keys if isinstance(key, str)]
                assert len(keys) == len(set(keys))

    together(*[lambda i=i: churn(i) for i in range(4)], walk, walk)


class Key:
    """A key whose hash and comparison are Python code, and all of whose hashes are equal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.number == other.number


@pytest.mark.parametrize("limits", [{}, {"ttl": 60}, {"policy": "lfu"}], ids=["plain", "ttl", "lfu"])
def test_keys_that_run_code_do_not_break_the_order(
    together: Callable[..., None], hasty: None, limits: dict[str, Any]
) -> None:
    """Threads that are switched in the middle of comparing keys leave a registry that works."""
    registry: Registry[Key, int] = Registry(maxsize=5, **limits)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(150):
            key = Key(rng.randrange(9))
            if rng.random() < 0.5:
                registry[key] = i
            elif rng.random() < 0.5:
                registry.get(key)
            else:
                registry.pop(key, None)

    together(*[lambda i=i: work(i) for i in range(4)])

    assert len(registry) <= 5
    for number in range(100, 110):
        registry[Key(number)] = number
    assert 5 == len(registry) == len(list(registry))
    assert "policy" in limits or [105, 106, 107, 108, 109] == [key.number for key in registry]
    assert Key(109) in registry
