"""What a registry with a store promises, one example each."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import json
import pickle
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pydantic
import pytest

from hygiene import History, Registry, bounded_history, bounded_registry, guard, load_guards
from hygiene.cleanup import ashutdown, relieve, shutdown
from hygiene.errors import NotStorable, StoreError, StoreUnavailable, VersionConflict
from hygiene.events import Cause, Removal
from hygiene.group import Group
from hygiene.keeping import _openings
from hygiene.limits import Limits
from hygiene.stores import SaveLog, SQLiteStore
from hygiene.testing import ManualClock
from hygiene.writebehind import WriteBehind

PATIENCE = 20.0


class Faulty:
    """A real store that can be told to fail, or to stop in the middle of a save."""

    def __init__(self, store: SQLiteStore) -> None:
        self.store = store
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def save(self, changes: Any, *, sync: bool = False) -> Any:
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.store.save(changes, sync=sync)

    def value(self, key: Any, space: str = "chats") -> Any:
        """What is stored, whatever is pending."""
        record = self.store.load(space, key)
        return None if record is None else record.value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture
def address(tmp_path: Path) -> str:
    """Where a store may be made."""
    return f"sqlite:{tmp_path / 'chats.db'}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """An empty store that can be made to fail."""
    with SQLiteStore(tmp_path / "chats.db") as opened:
        faulty = Faulty(opened)
        yield faulty
        faulty.gate.set()


def eventually(condition: Any) -> None:
    """Something is still to be done by a thread of the library."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0)


# Reading what was written


def test_what_was_evicted_comes_back_when_it_is_asked_for(store: Any) -> None:
    """Evicting a conversation costs nothing."""
    with Registry[str, Any](maxsize=1, store=store, name="chats") as chats:
        chats["alice"] = ["hello"]
        chats["bob"] = {"language": "en"}
        chats["carol"] = None

        assert 1 == len(chats)
        assert ["hello"] == chats["alice"]
        assert {"language": "en"} == chats["bob"]
        assert chats["carol"] is None
        assert 3 == chats.stats().rehydrated


def test_a_restart_loses_nothing_that_was_closed(address: str) -> None:
    """The next process goes on where this one ended."""
    with Registry[str, Any](maxsize=2, store=address, name="chats") as chats:
        for number in range(20):
            chats.setdefault(f"user {number % 5}", []).append(number)
    with Registry[str, Any](maxsize=2, store=address, name="chats") as chats:
        assert 0 == len(chats)
        assert {f"user {user}": [user, user + 5, user + 10, user + 15] for user in range(5)} == {
            key: chats[key] for key in chats.stored()
        }


def test_in_del_pop_setdefault_and_clear_mean_memory_and_store_together(store: Any) -> None:
    """For these it does not matter where an entry is; `len` and loops mean memory."""
    with Registry[int, Any](maxsize=1, store=store, name="chats") as chats:
        for key in range(6):
            chats[key] = [key]

        assert 3 in chats
        assert [3] == chats.setdefault(3, ["another"])
        assert [2] == chats.pop(2)
        del chats[1]
        assert [key for key in range(6) if key in chats] == [0, 3, 4, 5] == sorted(chats.stored())
        with pytest.raises(KeyError):
            del chats[1]
        assert "nothing" == chats.pop(2, "nothing")
        assert 1 == len(chats) == len(list(chats))

        chats.clear()
        assert [] == list(chats.stored())
        assert 4 not in chats


def test_looking_does_not_load_and_peeking_gives_a_copy(store: Any) -> None:
    """`in` and `peek` leave what is in the store where it is."""
    with Registry[str, Any](maxsize=1, store=store, name="chats") as chats:
        chats["alice"] = ["hello"]
        chats["bob"] = []

        assert "alice" in chats
        chats.peek("alice").append("nobody sees this")
        assert ["bob"] == list(chats)
        assert ["hello"] == chats["alice"]


# Saving


def test_what_leaves_by_itself_was_saved_before_anybody_is_told(store: Any) -> None:
    """Whoever hears of an eviction finds the entry in the store."""
    found: list[Any] = []

    def hear(removal: Removal[str, Any]) -> None:
        found.append((removal.cause, store.value(removal.key)))

    chats: Registry[str, Any] = Registry(maxsize=1, store=store, name="chats", on_evict=hear)
    chats["alice"] = ["hello"]
    chats["bob"] = ["hi"]
    chats.evict("bob")
    chats["carol"] = ["hey"]
    chats.close()

    assert [(Cause.SIZE, ["hello"]), (Cause.PRESSURE, ["hi"]), (Cause.CLOSED, ["hey"])] == found


def test_a_value_is_released_after_it_was_saved(store: Any) -> None:
    """`close=` gets a value of which nothing is unsaved any more, at an eviction and at the end."""
    released: list[Any] = []
    chats: Registry[str, Any] = Registry(
        maxsize=1, store=store, name="chats", close=lambda value: released.append(store.value(value["name"]) == value)
    )
    chats["alice"] = {"name": "alice"}
    chats["bob"] = {"name": "bob"}
    chats["bob"]["age"] = 7
    chats.close()

    assert [True, True] == released


def test_many_bytes_leave_for_the_store_too(store: Any) -> None:
    """`max_bytes` bounds a conversation that grows in place: it is saved, and comes back."""
    with Registry[str, Any](max_bytes=20_000, store=store, name="chats") as chats:
        for number in range(100):
            chats.setdefault(f"user {number % 4}", []).append("x" * 500 + str(number))
        chats["last"] = []

        assert 20_000 >= (chats.stats().bytes or 0)
        assert chats.stats().evictions[Cause.BYTES]
        assert all(25 == len(chats[f"user {user}"]) for user in range(4))


def test_idle_is_the_end_in_memory_only(store: Any) -> None:
    """A conversation that nobody has used for a while makes room, and is there when somebody does."""
    clock = ManualClock()
    with Registry[str, Any](idle=60, timer=clock, store=store, name="chats") as chats:
        chats["alice"] = ["hello"]
        clock.advance(61)
        chats.expire()

        assert 0 == len(chats)
        assert {Cause.IDLE: 1} == chats.stats().evictions
        assert ["hello"] == chats["alice"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """A clock that those of the wall go by, too; see `wall`."""
    clock = ManualClock()
    ours = SimpleNamespace(time=lambda: wall(clock), monotonic=time.monotonic, sleep=time.sleep)
    for module in ("hygiene.keeping.time", "hygiene.writebehind.time"):
        monkeypatch.setattr(module, ours)
    return clock


def wall(clock: ManualClock) -> float:
    return 1_000_000.0 + clock.now


def test_ttl_is_the_end_in_the_store_too(tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """What is over is found nowhere, and nobody is told that something went wrong."""
    with SQLiteStore(tmp_path / "chats.db", timer=lambda: wall(clock)) as store:
        chats: Registry[str, Any] = Registry(ttl=60, maxsize=1, timer=clock, store=store, name="chats")
        chats["alice"] = ["hello"]
        clock.advance(30)
        chats["bob"] = ["hi"]
        clock.advance(29)
        assert ["hello"] == chats["alice"]
        clock.advance(2)

        assert "alice" not in chats
        assert ["hi"] == chats["bob"]
        assert 1 == chats.expire() + len(chats)
        clock.advance(60)
        assert 1 == chats.expire()
        chats.flush()
        assert [] == list(chats.stored())
        assert set() == chats._kept()._expiring
        chats.close()
    assert [] == caplog.records


def test_an_entry_can_be_written_again_when_its_time_is_over(tmp_path: Path, clock: ManualClock) -> None:
    """That the store has let go of it by then is nobody else's doing."""
    with (
        SQLiteStore(tmp_path / "chats.db", timer=lambda: wall(clock)) as store,
        Registry[str, Any](ttl=60, timer=clock, store=store, name="chats") as chats,
    ):
        chats["alice"] = {"n": 1}
        chats.flush()
        clock.advance(61)
        chats["alice"] = {"n": 2}
        chats.flush()
        assert {"n": 2} == chats["alice"]


def test_what_is_in_use_beyond_its_time_may_be_changed_until_it_is_not(tmp_path: Path, clock: ManualClock) -> None:
    """A lease keeps an entry alive in memory; what is told meanwhile is no conflict, and ends with it."""
    with (
        SQLiteStore(tmp_path / "chats.db", timer=lambda: wall(clock)) as store,
        Registry[str, Any](ttl=60, timer=clock, store=store, name="chats") as chats,
    ):
        chats["alice"] = ["hello"]
        chats.flush()
        with chats.lease("alice") as messages:
            clock.advance(61)
            for text in ("still", "here"):
                messages.append(text)
                chats.flush()
            assert ["hello", "still", "here"] == chats["alice"]
        assert "alice" not in chats


def test_a_change_in_place_does_not_make_an_entry_live_longer(tmp_path: Path, clock: ManualClock) -> None:
    """`ttl` counts from the last write, in the store as in memory."""
    with (
        SQLiteStore(tmp_path / "chats.db", timer=lambda: wall(clock)) as store,
        Registry[str, Any](ttl=60, timer=clock, store=store, name="chats") as chats,
    ):
        chats["alice"] = {"n": 1}
        clock.advance(30)
        chats["alice"]["n"] = 2
        chats.flush()
        record = store.load("chats", "alice")

        assert record is not None
        assert wall(clock) + 30 == record.head.expire_at


def test_a_shorter_ttl_counts_for_what_was_saved_under_a_longer_one(tmp_path: Path, clock: ManualClock) -> None:
    """What is too old for this registry is not there, in whatever way it is looked for."""
    with SQLiteStore(tmp_path / "chats.db", timer=lambda: wall(clock)) as store:
        with Registry[str, Any](store=store, name="chats") as chats:
            chats["alice"] = ["hello"]
        clock.advance(61)
        with Registry[str, Any](ttl=60, timer=clock, store=store, name="chats") as chats:
            assert "alice" not in chats
            assert chats.peek("alice") is None
            assert chats.get("alice") is None
            assert chats.pop("alice", None) is None


def test_a_list_becomes_a_history_whose_items_are_saved_one_by_one(store: Any) -> None:
    """`registry[key].append(message)` is seen, and costs the message and not the conversation."""
    with Registry[str, Any](store=store, name="chats") as chats:
        chats["alice"] = []
        held = chats["alice"]
        chats.flush()
        held.append("hello")
        change = chats._kept().writer.pending("alice")[0]

        assert isinstance(held, History)
        assert isinstance(change, SaveLog)
        assert 1 == len(change.append)
        assert not change.replace


def test_an_evicted_entry_that_somebody_holds_ends_with_its_ttl(store: Any, clock: ManualClock) -> None:
    """It is found as long as it lives; then `peek` sees it as little as any other look-up."""
    with Registry(store=store, name="chats", ttl=10, timer=clock) as chats:
        chats[1] = ["hello"]
        held = chats[1]
        chats.flush()
        assert chats.evict(1)
        clock.advance(9)
        assert held is chats.peek(1)
        clock.advance(1)

        assert chats.peek(1) is None
        assert 1 not in chats


@pytest.mark.parametrize("value", [2, "two", [2]])
def test_what_comes_after_a_dict_is_saved_once(store: Any, value: Any) -> None:
    """A dict is looked at for changes in place; what takes its place is not taken for a changed dict at each look."""
    with Registry(store=store, name="chats") as chats:
        chats[1] = {"n": 1}
        chats.flush()
        chats[1] = value
        chats.flush()
        saved = store.load("chats", 1).head.version
        chats.flush()
        with chats.lease(1):
            pass
        chats.flush()

        assert saved == store.load("chats", 1).head.version


@pytest.mark.parametrize("how", ["told", "leased", "flushed", "evicted", "closed"])
def test_a_change_in_place_reaches_the_store(store: Any, how: str) -> None:
    """`changed(key)` says so; at the end of a lease, an eviction, `flush` and `close` it is found."""
    chats: Registry[str, Any] = Registry(store=store, name="chats")
    chats["alice"] = {"n": 1}
    chats.flush()
    if how == "leased":
        with chats.lease("alice") as value:
            value["n"] = 2
    else:
        chats["alice"]["n"] = 2
    if how == "told":
        chats.changed("alice")
    if how in ("told", "leased"):
        chats._kept().writer.flush()
    elif how == "flushed":
        chats.flush()
    elif how == "evicted":
        assert chats.evict("alice")
    if how == "closed":
        chats.close()

    assert {"n": 2} == store.value("alice")
    chats.close()


def test_a_critical_item_is_on_disk_when_the_call_returns(store: Any) -> None:
    """An order is not acknowledged before it is saved."""
    with (
        WriteBehind(store, space="chats", every=1000, critical=lambda key, item: "order" in item) as writer,
        Registry[str, Any](store=writer) as chats,
    ):
        chats["alice"] = ["hello"]
        assert store.value("alice") is None
        chats["alice"].append("order 7")
        assert ["hello", "order 7"] == store.value("alice")
        chats["bob"] = {"order": 8}
        assert {"order": 8} == store.value("bob")


# When the store cannot save


def test_what_cannot_be_saved_stays_and_leaves_when_it_can(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    """While the disk is full, the bound is exceeded and nothing is lost."""
    chats: Registry[int, Any] = Registry(maxsize=2, store=store, name="chats")
    chats[0], chats[1] = [0], [1]
    chats.flush()
    store.error = StoreUnavailable("the disk is full")
    for key in range(2, 6):
        chats[key] = [key]
    assert {2, 3, 4, 5} == set(chats)
    assert [0] == chats[0]
    with pytest.raises(StoreUnavailable, match="disk is full"):
        chats.flush()

    store.error = None
    chats.flush()
    eventually(lambda: len(chats) <= 2)
    assert [[key] for key in range(6)] == [chats[key] for key in range(6)]
    chats.close()
    assert any("disk is full" in record.getMessage() for record in caplog.records)


def test_a_small_registry_keeps_its_short_paths_while_nothing_can_leave(store: Any) -> None:
    """To find that nobody may leave, nobody is asked twice."""
    chats: Registry[int, Any] = Registry(maxsize=1, store=store, name="chats")
    store.error = StoreUnavailable("the disk is full")
    for key in range(5):
        chats[key] = [key]

    assert chats._order is None
    assert 5 == len(chats)
    store.error = None
    chats.close()


def test_one_entry_that_cannot_be_saved_does_not_keep_the_others(store: Any) -> None:
    """Its neighbours are saved and evicted."""
    with Registry[int, Any](maxsize=2, store=store, name="chats") as chats:
        chats[0] = {"n": 0}
        chats[0]["n"] = object()
        for key in range(1, 5):
            chats[key] = [key]

        assert {0, 4} == set(chats)
        with pytest.raises(NotStorable, match="0"):
            chats.flush()
        chats[0]["n"] = 1


def test_a_clear_that_fails_changes_nothing(store: Any) -> None:
    """Neither in memory, nor of what was waiting to be saved."""
    chats: Registry[str, Any] = Registry(maxsize=1, store=store, name="chats")
    chats["alice"] = ["hello"]
    chats["bob"] = {"n": 1}
    chats.flush()
    chats["bob"] = {"n": 2}
    store.error = StoreUnavailable("the disk is full")
    with pytest.raises(StoreUnavailable):
        chats.clear()
    store.error = None
    chats.flush()

    assert {"n": 2} == chats["bob"] == store.value("bob")
    assert ["hello"] == chats["alice"] == store.value("alice")
    chats.close()


def test_hooks_of_a_clear_may_wait_for_other_threads(store: Any) -> None:
    """They run when all locks are free."""
    done: list[bool] = []

    def hear(removal: Removal[str, Any]) -> None:
        thread = threading.Thread(target=lambda: chats.setdefault("bob", []))
        thread.start()
        thread.join(PATIENCE)
        done.append(not thread.is_alive() and removal.cause is Cause.CLEARED)

    chats: Registry[str, Any] = Registry(store=store, name="chats", on_evict=hear)
    chats["alice"] = ["hello"]
    chats.clear()

    assert [True] == done
    chats._limits = dataclasses.replace(chats._limits, on_evict=None)
    chats.close()


# On an event loop


async def test_on_a_loop_an_eviction_waits_for_its_save_and_the_loop_for_nothing(store: Any) -> None:
    """The entry stays until it is saved, and then leaves by itself."""
    chats: Registry[int, Any] = Registry(maxsize=1, store=store, name="chats")
    store.gate.clear()
    for key in range(4):
        chats[key] = [key]
    assert 4 == len(chats)
    store.gate.set()
    deadline = time.monotonic() + PATIENCE
    while len(chats) > 1 and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody tells when an entry has left
        await asyncio.sleep(0)

    assert 1 == len(chats)
    assert [[key] for key in range(4)] == [chats[key] for key in range(4)]
    await chats.aclose()


async def test_aflush_acknowledges_and_aclose_saves(store: Any) -> None:
    """As `flush` and `close` do where nothing else is to go on."""
    chats: Registry[str, Any] = Registry(store=store, name="chats")
    chats["alice"] = ["hello"]
    await chats.aflush()
    assert ["hello"] == store.value("alice")
    chats["alice"].append("bye")
    await chats.aclose()
    assert ["hello", "bye"] == store.value("alice")


# Held by somebody


def test_an_evicted_conversation_that_somebody_holds_is_the_same_object_again(store: Any) -> None:
    """Two who talk in one conversation never talk in two."""
    with Registry[str, Any](maxsize=1, store=store, name="chats") as chats:
        held = chats.setdefault("alice", [])
        chats["bob"] = []
        assert ["bob"] == list(chats)
        held.append("hello")

        assert chats["alice"] is held
        chats.flush()
        assert ["hello"] == store.value("alice")


def test_what_was_taken_is_a_list_of_its_own(store: Any) -> None:
    """Whoever took, replaced or cleared a conversation may go on with it: the store does not hear of that."""
    with Registry[str, Any](store=store, name="chats") as chats:
        chats["alice"] = chats["bob"] = chats["carol"] = []
        taken, replaced, cleared = chats.pop("alice"), chats["bob"], chats["carol"]
        chats["bob"] = ["new"]
        replaced.append("mine")
        del chats["carol"]
        for mine in (taken, cleared):
            mine.append("mine")
        chats.flush()

        assert ["new"] == chats["bob"] == store.value("bob")
        assert ["bob"] == list(chats.stored())


def test_stored_keys_with_a_prefix_are_texts_that_start_with_it(tmp_path: Path) -> None:
    """Keys in the store and keys that wait to be saved, each once; a key that is not text has no prefix."""
    with Registry[Any, list[str]](maxsize=2, store=f"sqlite:{tmp_path}/a.db", name="chats") as chats:
        for key in ("user:1", "user:2", "room:1", 7, ("user:", 3), b"user:4", None, "us"):
            chats[key] = ["hello"]
        chats.flush()
        chats["user:5"] = ["not saved yet"]
        del chats["user:2"]

        assert ["user:1", "user:5"] == sorted(chats.stored_keys(prefix="user:"))
        assert {"user:1", "user:5", "room:1", "us"} == set(chats.stored_keys(prefix=""))
        assert {"user:1", "user:5", "room:1", "us", 7, ("user:", 3), b"user:4", None} == set(chats.stored_keys())
        assert sorted(map(repr, chats.stored_keys())) == sorted(map(repr, chats.stored()))
        with pytest.raises(TypeError, match=r"`prefix` must be text or None, got 7\."):
            chats.stored_keys(prefix=7)  # type: ignore[arg-type]


def test_stored_keys_needs_a_store() -> None:
    """A registry without a store says so at the call, and not at the first step of the loop."""
    with pytest.raises(ValueError, match="without a store"):
        Registry[str, int]().stored_keys()


@pytest.mark.parametrize("how", ["put", "setdefault", "default_factory", "update", "append", "extend", "item"])
def test_a_linked_attribute_that_cannot_be_stored_is_named_with_what_to_do(tmp_path: Path, how: str) -> None:
    """The error names the attribute and not only the key, and the other attributes go on."""

    @bounded_registry("chats", "locks", maxsize=2, store=f"sqlite:{tmp_path}/a.db")
    class Bot:
        def __init__(self) -> None:
            self.chats: dict[str, list[str]] = {}
            self.locks: dict[str, Any] = defaultdict(threading.Lock)

    bot = Bot()
    bot.chats["ann"] = ["hello"]
    bot.locks["ben"] = [1]
    ways: dict[str, Any] = {
        "put": lambda: bot.locks.__setitem__("ann", threading.Lock()),
        "setdefault": lambda: bot.locks.setdefault("ann", threading.Lock()),
        "default_factory": lambda: bot.locks["ann"],
        "update": lambda: bot.locks.update(ann=threading.Lock()),
        "append": lambda: bot.locks["ben"].append(threading.Lock()),
        "extend": lambda: bot.locks["ben"].extend([1, threading.Lock()]),
        "item": lambda: bot.locks["ben"].__setitem__(0, threading.Lock()),
    }
    with pytest.raises(NotStorable, match=r"Attribute 'locks' cannot be stored: .* without store=: @bounded_registry"):
        ways[how]()
    bot.locks["ann"] = 1
    shutdown()

    with Registry[str, list[str]](store=f"sqlite:{tmp_path}/a.db", name="chats") as chats:
        assert ["hello"] == chats["ann"]


def test_each_linked_attribute_lists_its_own_stored_keys(tmp_path: Path) -> None:
    """Attributes that are evicted together are stored in spaces of their own."""

    @bounded_registry("seen", "chats", maxsize=2, store=f"sqlite:{tmp_path}/a.db")
    class Bot:
        def __init__(self) -> None:
            self.seen: dict[str, int] = {}
            self.chats: dict[str, list[str]] = {}

    bot = Bot()
    for n in range(4):
        bot.seen[f"user:{n}"] = n
    bot.chats["user:0"] = ["hello"]
    keys: Any = (bot.seen, bot.chats)

    assert ["user:0", "user:1", "user:2", "user:3"] == sorted(keys[0].stored_keys("user:"))
    assert ["user:0"] == list(keys[1].stored_keys())
    shutdown()


def test_one_list_under_two_keys_becomes_two(store: Any) -> None:
    """An entry is a log of its own."""
    with Registry[str, Any](store=store, name="chats") as chats:
        chats["alice"] = ["hello"]
        chats["bob"] = chats["alice"]
        chats["bob"].append("bye")

        assert (["hello"], ["hello", "bye"]) == (chats["alice"], chats["bob"])


# Several processes, several registries


def other_process(store: Any, key: str, *items: str) -> None:
    """What another process does."""
    store.store.save([SaveLog("chats", key, None, [store.encode(item) for item in items])])


def test_what_another_process_saved_is_an_error_once_and_then_what_is_read(store: Any) -> None:
    """Neither is overwritten; the copy in memory that is out of date takes no more changes."""
    chats: Registry[str, Any] = Registry(store=store, name="chats")
    chats["alice"] = ["hello"]
    chats.flush()
    held = chats["alice"]
    other_process(store, "alice", "theirs")
    held.append("ours")
    with pytest.raises(VersionConflict):
        chats.flush()

    assert ["hello", "theirs"] == chats["alice"]
    with pytest.raises(VersionConflict, match="out of date"):
        held.append("ours")
    chats["alice"].append("ours")
    chats.flush()
    assert ["hello", "theirs", "ours"] == store.value("alice")
    chats.close()


def test_one_registry_at_a_time_keeps_a_space(store: Any) -> None:
    """The error names the space and the one who keeps it."""
    with Registry[str, Any](store=store, name="chats") as chats:
        with pytest.raises(StoreError, match=r"'chats'.*registry chats keeps it"):
            Registry(store=store, name="chats")
        with Registry[str, Any](store=store, name="settings") as settings:
            settings["alice"] = 1
            assert "alice" not in chats
    with Registry[str, Any](store=store, name="chats"):
        pass


@pytest.mark.slow
def test_who_takes_over_from_a_registry_that_was_forgotten_misses_nothing(store: Any) -> None:
    """A registry that was collected with changes pending hands them on."""
    for number in range(40):
        forgotten: Registry[str, Any] = Registry(store=store, name="chats")
        forgotten["n"] = number
        del forgotten
        chats: Registry[str, Any] = Registry(store=store, name="chats")
        assert number == chats["n"]
        chats["m"] = number
        chats.flush()
        del chats
    gc.collect()
    with Registry[str, Any](store=store, name="chats") as chats:
        assert 39 == chats["m"]


def test_a_closed_registry_says_so(address: str) -> None:
    """Nobody would save what is put in."""
    chats: Registry[str, Any] = Registry(store=address, name="chats")
    chats["alice"] = ["hello"]
    chats.close()
    chats.close()

    assert 0 == len(chats)
    for use in (
        lambda: chats["alice"],
        lambda: "alice" in chats,
        lambda: chats.update(alice=[]),
        lambda: chats.pop("alice"),
        chats.clear,
    ):
        with pytest.raises(StoreError, match="was closed"):
            use()
    assert {} == _openings._opened


def test_copies_have_no_store(store: Any) -> None:
    """A copy, deep or not, a pickle and a plain dict are the entries in memory, and save nothing."""
    with Registry[str, Any](maxsize=5, store=store, name="chats") as chats:
        chats["alice"] = ["hello"]
        chats.flush()
        for twin in (chats.copy(), copy.deepcopy(chats), pickle.loads(pickle.dumps(chats)), dict(chats)):
            twin["bob"] = ["hi"]
            twin.pop("alice")
        assert "bob" not in chats
        assert ["hello"] == chats["alice"]
        assert '{"alice": ["hello"]}' == json.dumps(chats)


# Decorators and guards


def test_a_decorated_attribute_survives_a_restart_and_a_rebinding(address: str) -> None:
    """Assigning the attribute anew hands the store over; the file is closed with the last who uses it."""

    @bounded_registry("conversations", "settings", maxsize=2, store=address, name="bot")
    class Bot:
        def __init__(self) -> None:
            self.conversations: Any = {}
            self.settings: Any = {}

    bot = Bot()
    for user in range(5):
        bot.conversations[user] = [user]
        bot.settings[user] = {"n": user}
    bot.conversations = {}
    assert [3] == bot.conversations[3]
    assert {"n": 3} == bot.settings[3]
    bot.conversations.close()
    bot.settings.close()
    assert {} == _openings._opened

    bot = Bot()
    assert ([[user] for user in range(5)], [{"n": user} for user in range(5)]) == (
        [bot.conversations[user] for user in range(5)],
        [bot.settings[user] for user in range(5)],
    )
    bot.conversations.close()
    bot.settings.close()


def test_a_lease_of_one_column_finds_what_was_changed_in_place(address: str) -> None:
    """Also where several dicts share one life."""

    @bounded_registry("first", "second", maxsize=2, store=address)
    class Bot:
        def __init__(self) -> None:
            self.first: Any = {}
            self.second: Any = {}

    bot = Bot()
    bot.first[1] = {"n": 1}
    bot.first.flush()
    with bot.first.lease(1) as value:
        value["n"] = 2
    bot.first._kept().writer.flush()
    assert {"n": 2} == bot.first._kept().store.load("first", 1).value
    bot.first.close()
    bot.second.close()


def test_columns_are_within_their_bound_when_an_outage_is_over(store: Any, clock: ManualClock) -> None:
    """What had to stay because it could not be saved leaves when it is, although nobody writes any more."""
    limits = Limits.of(maxsize=1, policy="importance", importance=lambda entry: 0, store=store, timer=clock)
    group = Group(limits, {"first": None, "second": None})
    columns = {name: group.adopt(name, {}) for name in ("first", "second")}
    store.error = StoreUnavailable("the disk is full")
    columns["first"][1] = [1]
    columns["second"][2] = [2]
    columns["second"][3] = [3]
    assert [1, 2] == [len(column) for column in columns.values()]

    store.error = None
    for column in columns.values():
        column.flush()

    eventually(lambda: 1 == sum(map(len, columns.values())))
    for column in columns.values():
        column.close()


@dataclasses.dataclass
class Plain:
    chats: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Slotted:
    chats: dict[str, Any] = dataclasses.field(default_factory=dict)


class Shared:
    chats: ClassVar[Any] = {}


class Model(pydantic.BaseModel):
    chats: dict[str, Any] = pydantic.Field(default_factory=dict)


class Defaulting:
    def __init__(self) -> None:
        self.chats: Any = defaultdict(list)


@pytest.mark.parametrize("kind", [Plain, Slotted, Shared, Model, Defaulting])
def test_every_kind_of_class_keeps_its_dict_in_a_store(kind: Any, address: str) -> None:
    """Dataclasses, slots, dicts of the class, pydantic models, default dicts."""
    made = type(kind)(kind.__name__, (kind,), {"__module__": __name__, "__qualname__": kind.__name__})
    if kind is Shared:
        made.chats = {}
    bounded_registry("chats", maxsize=1, store=address)(made)
    thing = made()
    for user in ("alice", "bob", "carol"):
        if kind is Defaulting:
            thing.chats[user].append(user)
        else:
            thing.chats.setdefault(user, []).append(user)

    assert 1 == len(thing.chats)
    assert [["alice"], ["bob"], ["carol"]] == [thing.chats[user] for user in ("alice", "bob", "carol")]
    thing.chats.close()


def test_a_factory_is_asked_only_for_what_is_not_stored(store: Any) -> None:
    """As in a `defaultdict`."""
    with Registry[str, Any](maxsize=1, store=store, name="chats", default_factory=list) as chats:
        chats["alice"].append("hello")
        chats["bob"].append("hi")
        chats["alice"].append("bye")

        assert ["hello", "bye"] == chats["alice"]


def test_a_window_holds_in_memory_and_in_the_store(store: Any) -> None:
    """`values=partial(History, maxlen=...)` trims what is put in, what grows, and what comes from the store."""
    with Registry[str, Any](store=store, name="chats") as chats:
        chats["alice"] = list(range(100))
    window = partial(History, maxlen=50)
    with Registry[str, Any](maxsize=1, store=store, name="chats", values=window) as chats:
        assert list(range(50, 100)) == chats["alice"]
        chats.flush()
        assert list(range(50, 100)) == store.value("alice")
        chats["alice"].append(100)
        chats["bob"] = list(range(60))
        assert list(range(51, 101)) == chats["alice"] == store.value("alice")
        assert list(range(10, 60)) == chats["bob"]


def test_a_guard_keeps_the_dict_of_code_that_is_not_yours(address: str) -> None:
    """`guard(..., store=)`, for a class and for one object."""

    class Theirs:
        def __init__(self) -> None:
            self.sessions: Any = {}

    guard(Theirs, "sessions", maxsize=1, store=address)
    theirs = Theirs()
    for user in range(3):
        theirs.sessions[user] = [user]
    assert [[0], [1], [2]] == [theirs.sessions[user] for user in range(3)]
    theirs.sessions.close()


def test_an_operator_keeps_a_dict_without_touching_the_code(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`store =` in a TOML file."""
    (tmp_path / "their_keeping_module.py").write_text(
        "class Server:\n    def __init__(self):\n        self.chats = {}\n"
    )
    config = tmp_path / "hygiene.toml"
    config.write_text(
        textwrap.dedent(f"""
        [[guard]]
        target = "their_keeping_module:Server"
        attributes = ["chats"]
        maxsize = 1
        store = {json.dumps(address)}
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    load_guards(config)
    import their_keeping_module  # type: ignore[import-not-found] # noqa: PLC0415 - made just now

    server = their_keeping_module.Server()
    for user in range(3):
        server.chats[user] = [user]
    assert [[0], [1], [2]] == [server.chats[user] for user in range(3)]
    server.chats.close()
    sys.modules.pop("their_keeping_module")


def test_a_bounded_history_of_its_own_stays_what_it_is(store: Any) -> None:
    """A history that was made elsewhere keeps its window when it is put in."""

    @bounded_history("messages", maxlen=3)
    class Chat:
        def __init__(self) -> None:
            self.messages: Any = []

    with Registry[str, Any](store=store, name="chats") as chats:
        messages = Chat().messages
        chats["alice"] = messages
        for number in range(5):
            messages.append(number)
        assert [2, 3, 4] == chats["alice"]
        chats.flush()
        assert [2, 3, 4] == store.value("alice")


# Pressure, and the end


def test_memory_pressure_saves_what_is_pending(store: Any) -> None:
    """What waits to be saved is the first thing to give back."""
    with Registry[str, Any](store=store, name="chats") as chats:
        chats["alice"] = ["hello"]
        relieve()
        eventually(lambda: store.value("alice") == ["hello"])

        assert ["hello"] == store.value("alice")


def test_trimming_saves_what_leaves(store: Any) -> None:
    """Whoever is short of memory may trim without asking what is in there."""
    with Registry[int, Any](store=store, name="chats") as chats:
        for key in range(10):
            chats[key] = [key]
        assert 8 == chats.trim("20%")
        assert [[key] for key in range(10)] == [chats[key] for key in range(10)]


@pytest.mark.parametrize("awaited", [False, True])
def test_a_shutdown_saves_the_registry_before_its_writer_closes(store: Any, awaited: bool) -> None:
    """What was changed in place and told nobody is saved at the end, whoever forgot to close."""
    chats: Registry[str, Any] = Registry(store=WriteBehind(store, space="chats"))
    chats["alice"] = {"n": 1}
    chats["alice"]["n"] = 2
    report = asyncio.run(ashutdown()) if awaited else shutdown()

    assert {"n": 2} == store.value("alice")
    assert not report.failed
