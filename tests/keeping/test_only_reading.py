"""A registry on a store that was opened with ``read_only=True``: each change is refused where it is made."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hygiene import History, Registry, StoreError, WriteBehind, bounded_registry
from hygiene.stores import SQLiteStore

STORED = {"colour": "red", "size": {"v": 1}, "log": ["one", "two", "three"]}
refused = partial(pytest.raises, StoreError, match="read_only")


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    """A file with something in it, opened to be read only; it is the same afterwards."""
    with Registry(STORED, store=f"sqlite:{path}", name="settings"):
        pass
    with SQLiteStore(path, read_only=True) as opened:
        yield opened
        assert STORED == dict(opened.items("settings"))
    assert ["chats.db"] == [file.name for file in path.parent.iterdir()]


@pytest.fixture
def settings(store: SQLiteStore) -> Iterator[Registry[str, Any]]:
    """A registry on it."""
    with Registry(maxsize=5, store=store, name="settings") as registry:
        yield registry


async def _in_an_async_lease(settings: Any) -> None:
    async with settings.lease("new", create=dict):
        raise AssertionError


def _in_a_lease(settings: Any) -> None:
    with settings.lease("new", create=lambda: pytest.fail("nothing is to be made")):
        raise AssertionError


def _union(settings: Any) -> None:
    settings |= {"colour": "blue"}


WRITES: dict[str, Callable[[Any], Any]] = {
    "set": lambda s: s.__setitem__("colour", "blue"),
    "set a new key": lambda s: s.__setitem__("new", "blue"),
    "setdefault": lambda s: s.setdefault("new", "blue"),
    "update": lambda s: s.update(new=1),
    "union": _union,
    "del": lambda s: s.__delitem__("colour"),
    "pop": lambda s: s.pop("colour"),
    "pop with a default": lambda s: s.pop("colour", None),
    "popitem": lambda s: s.popitem(),
    "clear": lambda s: s.clear(),
    "changed": lambda s: s["log"] and s.changed("log"),
    "lease with create": _in_a_lease,
    "async lease with create": lambda s: asyncio.run(_in_an_async_lease(s)),
    "append": lambda s: s["log"].append("four"),
    "extend": lambda s: s["log"].extend(["four", "five"]),
    "extend by an iterator": lambda s: s["log"].extend(iter(["four"])),
    "insert": lambda s: s["log"].insert(0, "zero"),
    "+=": lambda s: s["log"].__iadd__(["four"]),
    "*=": lambda s: s["log"].__imul__(2),
    "set an item": lambda s: s["log"].__setitem__(0, "zero"),
    "set a slice": lambda s: s["log"].__setitem__(slice(0, 2), ["x"]),
    "del an item": lambda s: s["log"].__delitem__(0),
    "pop an item": lambda s: s["log"].pop(),
    "remove an item": lambda s: s["log"].remove("one"),
    "clear a list": lambda s: s["log"].clear(),
    "reverse": lambda s: s["log"].reverse(),
    "sort": lambda s: s["log"].sort(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("in_memory", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_each_change_is_refused_where_it_is_made_and_changes_nothing(
    write: Any, in_memory: bool, settings: Registry[str, Any]
) -> None:
    """Whether the entry is in memory or only in the store, and whether it is a value or a list."""
    if in_memory:
        assert STORED == {key: settings[key] for key in STORED}
    if not in_memory and write is WRITES["popitem"]:
        pytest.skip("there is nothing in memory to take")

    with refused():
        write(settings)

    assert STORED == {key: settings[key] for key in STORED}
    assert "new" not in settings
    settings.flush()


def test_a_default_is_not_made_for_a_place_that_is_refused(store: SQLiteStore) -> None:
    """`default_factory` is not called: nobody would close what it made."""
    with (
        Registry(store=store, name="settings", default_factory=lambda: pytest.fail("made")) as settings,
        refused(),
    ):
        settings["new"]


def test_what_was_changed_in_place_is_an_error_at_the_end_of_the_lease(settings: Registry[str, Any]) -> None:
    """The next look-up gets what is stored."""
    with refused(), settings.lease("size") as size:
        size["v"] = 2

    assert {"v": 1} == settings["size"]

    async def lease() -> None:
        async with settings.lease("size") as size:
            size["v"] = 2

    with refused():
        asyncio.run(lease())

    assert {"v": 1} == settings["size"]
    settings.flush()


def test_what_was_changed_in_place_is_an_error_at_the_flush_and_at_the_close(store: SQLiteStore) -> None:
    """As at the end of a lease."""
    settings: Registry[str, Any] = Registry(store=store, name="settings")
    settings["size"]["v"] = 2
    with refused():
        settings.flush()
    settings["size"]["v"] = 2
    with refused():
        asyncio.run(settings.aflush())

    assert {"v": 1} == settings["size"]

    settings["size"]["v"] = 2
    with refused():
        settings.close()


def test_reading_evicting_and_leasing_are_what_they_were(store: SQLiteStore) -> None:
    """Nothing is held back by a store that takes nothing."""
    with Registry(maxsize=1, store=store, name="settings", values=partial(History, maxlen=2)) as settings:
        assert ["red", ["two", "three"]] == [settings["colour"], settings["log"]]
        assert {"v": 1} == settings["size"]
        assert 1 == len(settings)
        with settings.lease("log") as log:
            assert "three" == log[-1]
        copied = copy.copy(settings["log"])
        copied.append("a copy is the caller's")
        assert 0 == settings["log"].trim(1)  # it leaves what may not leave
        assert settings.evict("log")
        settings.flush()


def test_an_entry_whose_time_has_passed_leaves_memory(path: Path) -> None:
    """The store is not asked to delete it."""
    from hygiene.testing import ManualClock  # noqa: PLC0415 - for this test alone

    with Registry({"a": 1}, store=f"sqlite:{path}", name="settings", ttl=3600):
        pass
    clock = ManualClock()
    with (
        SQLiteStore(path, read_only=True) as store,
        Registry(store=store, name="settings", ttl=3600, timer=clock) as settings,
    ):
        assert 1 == settings["a"]
        clock.advance(3600)
        assert 1 == settings.expire()
        assert 0 == len(settings)
        settings.flush()


def test_the_columns_of_a_group_and_a_decorated_attribute_refuse_too(store: SQLiteStore) -> None:
    """So does assigning content to the attribute; an empty dict is content enough to begin with."""

    @bounded_registry("settings", maxsize=5, store=store)
    class Alone:
        def __init__(self) -> None:
            self.settings: Any = {}

    @bounded_registry("settings", "notes", maxsize=5, store=store)
    class Both:
        def __init__(self) -> None:
            self.settings: Any = {}
            self.notes: Any = {}

    alone, both = Alone(), Both()
    for registry in (alone.settings, both.settings, both.notes):
        with refused():
            registry["new"] = 1
        with refused():
            registry.setdefault("log", []).append("four")
        registry.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.put("colour", "blue"),
        lambda w: w.append("log", "four"),
        lambda w: w.extend("log", ["four"]),
        lambda w: w.replace("log", ["four"]),
        lambda w: w.delete("colour"),
        lambda w: w.clear(),
        lambda w: asyncio.run(w.aput("colour", "blue")),
        lambda w: asyncio.run(w.aappend("log", "four")),
    ],
)
def test_a_writer_refuses_too(change: Any, store: SQLiteStore) -> None:
    """A `WriteBehind` on such a store takes nothing that it could never save."""
    with WriteBehind(store, space="settings") as writer:
        with refused():
            change(writer)

        assert 0 == len(writer)
