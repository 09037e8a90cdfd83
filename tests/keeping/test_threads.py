"""Eight threads at one registry and its store: no message lost or doubled, and one load for all who ask."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hygiene import History, Registry
from hygiene.stores import SQLiteStore

THREADS = 8
ROUNDS = 120
KEYS = 6
PATIENCE = 20.0


class Watched:
    """A real store that counts its loads, and can be stopped in the middle of one, or of a save."""

    def __init__(self, store: SQLiteStore) -> None:
        self.store = store
        self.loads: Counter[Any] = Counter()
        self.loading, self.may_load = threading.Event(), threading.Event()
        self.saving, self.may_save = threading.Event(), threading.Event()
        self.may_load.set()
        self.may_save.set()

    def load(self, space: str, key: Any) -> Any:
        self.loads[key] += 1
        record = self.store.load(space, key)
        self.loading.set()
        assert self.may_load.wait(PATIENCE)
        return record

    def save(self, changes: Any, *, sync: bool = False) -> Any:
        self.saving.set()
        assert self.may_save.wait(PATIENCE)
        return self.store.save(changes, sync=sync)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """An empty store that can be stopped."""
    with SQLiteStore(tmp_path / "chats.db") as opened:
        watched = Watched(opened)
        yield watched
        watched.may_load.set()
        watched.may_save.set()


class Elsewhere:
    """A function that runs in another thread from now on."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, args=(function,), daemon=True)
        self.thread.start()

    def run(self, function: Callable[[], Any]) -> None:
        try:
            self.result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised again, where somebody sees it
            self.error = error

    def join(self) -> Any:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "a thread hangs"
        if self.error is not None:
            raise self.error
        return self.result


def together(function: Callable[[int], Any]) -> list[Any]:
    """What *function* returns in each of the threads, which begin at the same moment."""
    start = threading.Barrier(THREADS)

    def begin(number: int) -> Any:
        start.wait(PATIENCE)
        return function(number)

    return [thread.join() for thread in [Elsewhere(partial(begin, number)) for number in range(THREADS)]]


def in_order(messages: list[list[int]]) -> bool:
    """Whether each thread's messages come in the order in which it wrote them."""
    return all(
        numbers == sorted(numbers)
        for numbers in ([n for thread, n in messages if thread == who] for who in range(THREADS))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits", [{"maxsize": 2}, {"maxsize": 2, "policy": "lfu"}, {"maxsize": 50}, {"max_bytes": 2000}]
)
def test_no_message_is_lost_or_doubled_whoever_appends_where_it_is_evicted_all_the_time(
    store: Any, limits: dict[str, Any]
) -> None:
    """`registry.setdefault(key, []).append(message)` is safe in any thread, however small the bound."""
    registry: Registry[int, list[list[int]]] = Registry(store=store, name="chats", **limits)

    def chat(who: int) -> None:
        rng = random.Random(who)
        for number in range(ROUNDS):
            registry.setdefault(rng.randrange(KEYS), []).append([who, number])
            if number % 20 == 0:
                registry.trim(1)

    together(chat)
    registry.flush()
    found = [message for _, messages in store.items("chats") for message in messages]

    assert sorted([who, number] for who in range(THREADS) for number in range(ROUNDS)) == sorted(found)
    assert all(in_order(messages) for _, messages in store.items("chats"))
    registry.close()


def test_a_message_is_in_the_conversation_that_was_taken_or_in_the_one_that_is_left(store: Any) -> None:
    """`pop` takes a conversation as a whole: what is appended meanwhile is in it, or begins the next one."""
    registry: Registry[int, list[list[int]]] = Registry(store=store, name="chats", maxsize=2)
    taken: list[list[list[int]]] = []

    def chat(who: int) -> None:
        rng = random.Random(who)
        for number in range(ROUNDS):
            registry.setdefault(rng.randrange(KEYS), []).append([who, number])
            if number % 7 == 0 and (messages := registry.pop(rng.randrange(KEYS), None)) is not None:
                taken.append(messages)

    together(chat)
    registry.flush()
    found = [message for messages in taken for message in messages]
    found += [message for _, messages in store.items("chats") for message in messages]

    assert sorted([who, number] for who in range(THREADS) for number in range(ROUNDS)) == sorted(found)
    registry.close()


@pytest.mark.slow
def test_whatever_threads_do_memory_and_store_agree_in_the_end(store: Any) -> None:
    """Puts, appends, removals, clears, trims and leases of eight threads leave one dict, and not two."""
    registry: Registry[int, Any] = Registry(store=store, name="chats", maxsize=3)

    def use(who: int) -> None:
        rng = random.Random(who)
        for number in range(ROUNDS):
            key = rng.randrange(KEYS)
            match rng.randrange(12):
                case 0:
                    registry[key] = [[who, number]]
                case 1:
                    registry.pop(key, None)
                case 2:
                    registry.trim(1)
                case 3 if number % 10 == 0:
                    registry.clear()
                case 4:
                    registry.evict(key)
                case 5:
                    with registry.lease(key, list) as messages:
                        messages.append([who, number])
                case 6:
                    assert registry.get(key) is None or key in range(KEYS)
                case 7 if number % 10 == 0:
                    registry.flush()
                case _:
                    registry.setdefault(key, []).append([who, number])

    together(use)
    read = {key: list(registry[key]) for key in list(registry.stored())}
    registry.flush()

    assert read == dict(store.items("chats"))
    assert set(registry) <= set(read)
    assert all(in_order(messages) for messages in read.values())
    assert len(registry) <= 3
    for messages in read.values():
        assert len(messages) == len({tuple(message) for message in messages})
    registry.close()


def test_a_miss_loads_once_however_many_threads_ask(store: Any) -> None:
    """Eight threads that ask for one evicted conversation get one and the same object, loaded once."""
    with Registry(store=store, name="chats") as earlier:
        earlier["alice"] = ["hello"]
    store.loads.clear()
    registry: Registry[str, list[str]] = Registry(store=store, name="chats", maxsize=5)
    store.may_load.clear()
    threads = [Elsewhere(lambda: registry["alice"]) for _ in range(THREADS)]
    assert store.loading.wait(PATIENCE)
    store.may_load.set()
    found = [thread.join() for thread in threads]

    assert {"alice": 1} == store.loads
    assert all(value is found[0] for value in found)
    assert ["hello"] == found[0]
    registry.close()


def test_eight_who_create_one_conversation_get_the_same(store: Any) -> None:
    """Where it is neither in memory nor in the store, one of those who create it at once wins, and all get that."""
    registry: Registry[int, list[int]] = Registry(store=store, name="chats", maxsize=1, default_factory=list)
    for key in range(10):
        found = together(lambda who, key=key: registry.setdefault(key, [who]) if who % 2 else registry[key])  # type: ignore[misc]

        assert all(value is found[0] for value in found)
        del found
    registry.close()


def late(store: Any, **limits: Any) -> tuple[Registry[str, Any], Elsewhere]:
    """A registry whose load of "alice" has read the store and is stopped before it puts in what it has read."""
    with Registry(store=store, name="chats") as earlier:
        earlier["alice"] = ["old"] * 5
    registry: Registry[str, Any] = Registry(store=store, name="chats", maxsize=5, **limits)
    store.loading.clear()
    store.may_load.clear()
    loader = Elsewhere(lambda: registry.get("alice"))
    assert store.loading.wait(PATIENCE)
    return registry, loader


def test_what_was_put_meanwhile_is_not_undone_by_a_late_load(store: Any) -> None:
    """A load that has read the old value finds the new one."""
    registry, loader = late(store)
    registry["alice"] = ["new"]
    registry.flush()
    store.may_load.set()

    assert ["new"] == loader.join() == registry["alice"]
    assert ["new"] == store.store.load("chats", "alice").value
    registry.close()


def test_what_was_cleared_meanwhile_is_not_brought_back_by_a_late_load(store: Any) -> None:
    """A load that has read what is being removed finds nothing, and brings nothing back."""
    registry, loader = late(store)
    registry.clear()
    store.may_load.set()

    assert loader.join() is None
    assert "alice" not in registry
    assert [] == list(store.keys("chats"))
    registry.close()


def test_a_late_load_that_trims_does_not_write_over_what_was_put_meanwhile(store: Any) -> None:
    """What a load has to trim is saved only if the load counts."""
    gate, reached = threading.Event(), threading.Event()
    with Registry(store=store, name="chats") as earlier:
        earlier["alice"] = ["old"] * 5

    def trimmed(value: Any) -> Any:
        if len(value) == 5:
            reached.set()
            assert gate.wait(PATIENCE)
        return History(value, maxlen=3)

    registry: Registry[str, Any] = Registry(store=store, name="chats", maxsize=5, values=trimmed)
    loader = Elsewhere(lambda: registry.get("alice"))
    assert reached.wait(PATIENCE)
    registry.clear()
    gate.set()

    assert loader.join() is None
    registry.flush()
    assert [] == list(store.keys("chats"))
    registry.close()


def test_what_is_appended_while_everything_is_cleared_does_not_bring_it_back(store: Any) -> None:
    """Who holds a conversation while another thread clears has a list of his own afterwards."""
    registry: Registry[str, list[str]] = Registry(store=store, name="chats", maxsize=5)
    held = registry.setdefault("alice", [])
    held.append("before")
    registry.flush()
    store.may_save.clear()
    store.saving.clear()
    clearing = Elsewhere(registry.clear)
    assert store.saving.wait(PATIENCE)
    held.append("meanwhile")
    store.may_save.set()
    clearing.join()
    registry.flush()

    assert "alice" not in registry
    assert [] == list(store.keys("chats"))
    assert ["before", "meanwhile"] == held
    registry.close()


def test_who_waits_for_a_flush_is_answered_when_everything_is_cleared_instead(store: Any) -> None:
    """What is cleared need not be saved: nobody waits for it for ever."""
    registry: Registry[str, list[str]] = Registry(store=store, name="chats", maxsize=5)
    registry["alice"] = ["hello"]
    registry.flush()
    registry["bob"] = ["hello"]
    store.may_save.clear()
    store.saving.clear()
    clearing = Elsewhere(registry.clear)
    assert store.saving.wait(PATIENCE)
    flushing = Elsewhere(registry._kept().writer.flush)
    store.may_save.set()
    clearing.join()

    flushing.join()
    assert [] == list(store.keys("chats"))
    registry.close()


def test_an_entry_that_was_put_and_evicted_meanwhile_is_not_overwritten_by_who_found_nothing(store: Any) -> None:
    """`setdefault` puts its default in only if there is still nothing, in memory and in the store."""
    registry: Registry[str, Any] = Registry(store=store, name="chats", maxsize=5)
    made = threading.Event()

    def default() -> list[str]:
        # Between the look-up that finds nothing and the put: another thread puts, saves and evicts.
        def other() -> None:
            registry["alice"] = ["theirs"]
            assert registry.evict("alice")

        Elsewhere(other).join()
        made.set()
        return []

    with registry.lease("alice", default) as value:
        assert ["theirs"] == value
    assert made.is_set()
    registry.close()
