"""A file that is deleted, moved, replaced or truncated while it is open: nothing is acknowledged, nothing forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hygiene import Registry, StoreError, WriteBehind, bounded_registry
from hygiene.stores import SQLiteStore
from hygiene.stores.protocol import SaveValue


def _delete(path: Path) -> None:
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


def _delete_file_only(path: Path) -> None:
    path.unlink()


def _move(path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))


def _move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def _move_folder_and_make_it_again(path: Path) -> None:
    _move_folder(path)
    path.parent.mkdir()


def _replace_by_another_store(path: Path) -> None:
    other = path.with_name("other.db")
    SQLiteStore(other).close()
    other.replace(path)


def _replace_by_a_copy(path: Path) -> None:
    copied = path.with_name("copy.db")
    shutil.copyfile(path, copied)
    copied.replace(path)


def _truncate(path: Path) -> None:
    os.truncate(path, 0)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _delete_log(path: Path) -> None:
    path.with_name(path.name + "-wal").unlink()


def _truncate_log(path: Path) -> None:
    os.truncate(path.with_name(path.name + "-wal"), 0)


def _delete_index(path: Path) -> None:
    path.with_name(path.name + "-shm").unlink()


QUICK = [_delete, _move, _replace_by_another_store, _truncate, _delete_log]
MORE = [
    _delete_file_only,
    _move_folder,
    _move_folder_and_make_it_again,
    _replace_by_a_copy,
    _halve,
    _truncate_log,
    _delete_index,
]
acts = pytest.mark.parametrize(
    "act", [*QUICK, *(pytest.param(act, marks=pytest.mark.slow) for act in MORE)], ids=lambda act: act.__name__[1:]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place in a folder that may be moved."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder / "chats.db"


def _leave(registry: Any) -> None:
    """End a registry that has something left which it cannot save."""
    keeper = registry._keeper
    keeper.writer._void([*keeper.writer._pending, *keeper.writer._saving])  # or the shutdown would try once more
    with contextlib.suppress(StoreError):
        registry.close()
    keeper.store.close()


@acts
def test_flush_acknowledges_nothing_that_no_file_under_that_name_has(act: Any, path: Path) -> None:
    """`flush` is an error as soon as the path names another file than the open one, or a damaged one."""
    chats: Registry[str, Any] = Registry(maxsize=2, store=f"sqlite:{path}", name="chats")
    chats["a"] = {"v": 1}
    chats["log"] = ["one"]
    chats.flush()
    act(path)
    chats["b"] = {"v": 2}
    chats["log"].append("two")

    with pytest.raises(StoreError, match="chats"):
        chats.flush()
    with pytest.raises(StoreError, match="chats"):
        asyncio.run(chats.aflush())

    assert {"b", "log"} == {key for key in ("a", "b", "log") if key in chats._keeper.writer}
    assert {"v": 2} == chats["b"]
    _leave(chats)


@acts
def test_flush_is_an_error_though_everything_was_saved_before_the_file_went(act: Any, path: Path) -> None:
    """What was saved into a file that is gone is not acknowledged either."""
    chats: Registry[str, Any] = Registry(store=f"sqlite:{path}", name="chats")
    chats["a"] = {"v": 1}
    chats.flush()
    act(path)

    with pytest.raises(StoreError):
        chats.flush()
    with pytest.raises(StoreError):
        asyncio.run(chats.aflush())
    _leave(chats)


@acts
def test_a_save_of_a_store_without_a_registry_is_an_error_too(act: Any, path: Path) -> None:
    """`SQLiteStore.save` and a `WriteBehind` raise, and the changes stay pending."""
    with SQLiteStore(path) as store:
        store.save([SaveValue("chats", "a", store.encode(1, "a"), None, None)])
        writer = WriteBehind(store, space="chats")
        act(path)
        writer.put("b", 2)

        with pytest.raises(StoreError):
            store.save([SaveValue("chats", "a", store.encode(2, "a"), None, None)])
        with pytest.raises(StoreError):
            writer.flush()
        with pytest.raises(StoreError):
            writer.save("b")
        with pytest.raises(StoreError):
            writer.close()

        assert 1 == len(writer)
        writer._void(["b"])
        writer.close()


@pytest.mark.parametrize("act", [_delete, _move, _replace_by_another_store, _delete_log])
def test_what_cannot_be_saved_does_not_leave_memory(act: Any, path: Path) -> None:
    """An eviction saves first: while the file is gone, an unsaved entry stays, and the bound is exceeded."""
    chats: Registry[str, Any] = Registry(maxsize=2, store=f"sqlite:{path}", name="chats")
    chats["a"] = {"v": 1}
    chats.flush()
    act(path)
    for number in range(5):
        chats[f"new {number}"] = {"v": number}

    assert [{"v": number} for number in range(5)] == [dict.get(chats, f"new {number}") for number in range(5)]
    _leave(chats)


def test_the_end_of_a_registry_is_an_error_with_something_unsaved_and_no_file(path: Path) -> None:
    """`close` and `aclose` raise too, and say what to do."""
    for end in (lambda chats: chats.close(), lambda chats: asyncio.run(chats.aclose())):
        chats: Registry[str, Any] = Registry(store=f"sqlite:{path}", name="chats")
        chats["a"] = {"v": 1}
        chats.flush()
        _delete(path)
        chats["a"]["v"] = 2  # in place

        with pytest.raises(StoreError, match="was deleted or moved while it was open"):
            end(chats)
        _leave(chats)


def test_a_file_that_is_back_under_its_name_gets_what_is_pending(path: Path) -> None:
    """As soon as the file is back, everything is saved into it, and nothing was lost."""
    chats: Registry[str, Any] = Registry(store=f"sqlite:{path}", name="chats")
    chats["log"] = ["one"]
    chats.flush()
    elsewhere = path.with_name("elsewhere.db")
    path.rename(elsewhere)
    chats["log"].append("two")
    with pytest.raises(StoreError):
        chats.flush()
    elsewhere.rename(path)
    chats["log"].append("three")
    chats.close()

    with Registry(store=f"sqlite:{path}", name="chats") as again:
        assert ["one", "two", "three"] == again["log"]


@pytest.mark.parametrize("act", [_delete, _replace_by_another_store, _replace_by_a_copy])
def test_a_new_registry_opens_the_file_that_is_there(act: Any, path: Path) -> None:
    """A path that is opened again in the same process means the file that it names now."""
    old: Registry[str, Any] = Registry(store=f"sqlite:{path}", name="chats")
    old["a"] = {"v": 1}
    old.flush()
    act(path)

    with Registry(store=f"sqlite:{path}", name="chats") as new:
        new["b"] = {"v": 2}
        new.flush()
        with pytest.raises(StoreError):
            old.flush()
    with Registry(store=f"sqlite:{path}", name="chats") as again:
        assert {"v": 2} == again["b"]
    _leave(old)


def test_what_is_loaded_never_comes_from_a_file_that_took_the_name(path: Path) -> None:
    """Once the path names another store, a load is an error, or comes from the file that was opened."""
    with Registry(store=f"sqlite:{path.with_name('other.db')}", name="chats") as other:
        other["a"] = "of the other store"
    chats: Registry[str, Any] = Registry(maxsize=1, store=f"sqlite:{path}", name="chats")
    chats["a"] = "mine"
    chats["b"] = "mine too"
    chats.flush()
    path.with_name("other.db").replace(path)
    chats._keeper.store._close_idle()  # as before a fork: the next load opens the path once more

    with pytest.raises(StoreError, match="was replaced by another file"):
        chats["a"]
    _leave(chats)


def test_the_attribute_of_a_decorated_class_is_no_exception(path: Path) -> None:
    """A decorated attribute, and the columns of a group, raise as a registry does."""

    @bounded_registry("chats", "notes", maxsize=5, store=f"sqlite:{path}", name="bot")
    class Bot:
        def __init__(self) -> None:
            self.chats: Any = {}
            self.notes: Any = {}

    bot = Bot()
    bot.chats["a"] = ["one"]
    bot.notes["a"] = {"v": 1}
    bot.chats.flush()
    bot.notes.flush()
    _delete(path)
    bot.chats["a"].append("two")

    with pytest.raises(StoreError):
        bot.chats.flush()
    with pytest.raises(StoreError):
        bot.notes.flush()
    for registry in (bot.chats, bot.notes):
        _leave(registry)


def test_a_link_and_a_relative_path_are_what_they_were_when_the_store_was_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later ``chdir`` changes nothing; a link that is made to point elsewhere is another file."""
    with Registry(store=f"sqlite:{path}", name="chats") as chats:
        chats["a"] = 1
    link = path.with_name("link.db")
    link.symlink_to(path)
    monkeypatch.chdir(path.parent)
    with Registry(store="sqlite:link.db", name="chats") as chats:
        monkeypatch.chdir("/")
        chats["b"] = 2
        chats.flush()
    with Registry(store=f"sqlite:{path}", name="chats") as chats:
        assert [1, 2] == [chats["a"], chats["b"]]

    linked: Registry[str, Any] = Registry(store=f"sqlite:{link}", name="chats")
    SQLiteStore(path.with_name("other.db")).close()
    link.unlink()
    link.symlink_to(path.with_name("other.db"))
    linked["c"] = 3
    with pytest.raises(StoreError, match="was replaced by another file"):
        linked.flush()
    _leave(linked)


def test_a_file_that_another_program_has_tidied_up_is_no_truncated_one(path: Path) -> None:
    """``VACUUM`` makes a file shorter, and nothing is wrong with it."""
    import sqlite3  # noqa: PLC0415 - another program, so to speak

    chats: Registry[str, Any] = Registry(maxsize=100, store=f"sqlite:{path}", name="chats")
    for number in range(100):
        chats[number] = "x" * 4000
    chats.flush()
    for number in range(90):
        del chats[number]
    chats.flush()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("VACUUM")
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    chats["new"] = 1
    chats.flush()
    chats.close()

    with Registry(store=f"sqlite:{path}", name="chats") as again:
        assert 1 == again["new"]


def test_a_store_in_memory_has_no_file_to_lose() -> None:
    """``sqlite::memory:`` is what it was."""
    with Registry(store="sqlite::memory:", name="chats") as chats:
        chats["a"] = 1
        chats.flush()
        chats.flush()

        assert 1 == chats["a"]
