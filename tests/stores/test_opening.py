"""Opening a file: what is checked, and what a file of an earlier format needs."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hygiene import Registry
from hygiene.errors import StoreError
from hygiene.stores import Delete, SaveLog, SaveValue, SQLiteStore

FORMATS = Path(__file__).parent / "formats"  # a file of each release, as that release has left it


def fill(path: Path, count: int = 20) -> None:
    with SQLiteStore(path) as store:
        store.save([SaveLog("s", f"user {n}", append=[store.encode(n)] * 3) for n in range(count)])


def checked(path: Path, **options: Any) -> int:
    """Open and close the store, and return the number of entries that were checked."""
    with SQLiteStore(path, **options) as store:
        return store.report.entries


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_that_was_closed_cleanly_is_opened_without_reading_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """The number of rows does not matter: no statement names their tables, and none checks the whole file."""
    statements: list[str] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.set_trace_callback(statements.append)
        return connection

    real = sqlite3.connect
    fill(path)
    monkeypatch.setattr(sqlite3, "connect", connect)
    for _ in range(3):
        assert 0 == checked(path, read_only=read_only)

    assert statements
    assert [] == [said for said in statements if any(word in said for word in ("heads", "items", "k_check", "y_check"))]


def test_opening_and_closing_a_clean_file_writes_nothing(path: Path) -> None:
    fill(path)
    before, modified = path.read_bytes(), path.stat().st_mtime_ns
    with SQLiteStore(path) as store:
        assert 20 == store.count("s")

    assert (before, modified) == (path.read_bytes(), path.stat().st_mtime_ns)


def test_a_file_that_was_not_closed_is_checked(path: Path, in_child: Callable[[Callable[[], object]], int]) -> None:
    """A process that ends without closing the store leaves a log, and the next one checks every row."""

    def crash() -> None:
        store = SQLiteStore(path)
        store.save([SaveLog("s", "late", append=[store.encode(1)])])
        os._exit(0)

    fill(path)
    assert 0 == in_child(crash)

    assert 21 == checked(path)
    assert 0 == checked(path)


def test_a_crash_of_a_process_that_saved_nothing_leaves_the_file_clean(
    path: Path, in_child: Callable[[Callable[[], object]], int]
) -> None:
    fill(path)
    kept: list[SQLiteStore] = []

    def crash() -> None:
        kept.append(SQLiteStore(path))
        os._exit(0)

    assert 0 == in_child(crash)
    assert 0 == checked(path)


def _copied(path: Path) -> None:
    copy = path.with_name("copy.db")
    shutil.copy2(path, copy)
    copy.replace(path)


def _restored(path: Path) -> None:
    backup = path.read_bytes()
    fill(path)
    path.write_bytes(backup)


def _touched(path: Path) -> None:
    first = path.read_bytes()[:1]
    with path.open("r+b") as file:
        file.write(first)


@pytest.mark.parametrize(
    "change",
    [
        _copied,
        _restored,
        _touched,
        lambda path: change(path, "DELETE FROM items WHERE id % 3 = 0"),
        lambda path: change(path, "VACUUM"),
    ],
    ids=["copied", "restored", "written to", "changed with SQL", "vacuumed"],
)
def test_a_file_that_another_program_has_changed_is_checked(path: Path, change: Callable[[Path], None]) -> None:
    """Also directly after it was closed; afterwards it is clean again, unless something was damaged."""
    fill(path)
    change(path)

    assert 20 == checked(path)


def test_a_file_in_which_damage_was_found_is_checked_until_nothing_is_found(path: Path) -> None:
    fill(path)
    change(path, "UPDATE items SET data = zeroblob(9) WHERE id & 3 = 1 AND id >> 30 = 5")
    with SQLiteStore(path, check=False) as store:
        record = store.load("s", "user 4")
        assert record is not None
        assert 2 == len(record.value)

    assert 20 == checked(path)
    assert 0 == checked(path)


def test_without_a_check_a_file_does_not_become_clean(path: Path) -> None:
    """``check=False`` leaves it to the next store to check what was not closed cleanly."""
    fill(path)
    change(path, "VACUUM")
    with SQLiteStore(path, check=False) as store:
        store.save([SaveLog("s", "new")])

    assert 21 == checked(path)
    with SQLiteStore(path, check=False) as store:
        store.save([SaveLog("s", "newer")])
    assert 0 == checked(path)


def test_the_last_of_several_stores_leaves_the_file_clean(path: Path) -> None:
    """Whichever of them has written, and in which order they are closed."""
    fill(path)
    for writing, closing in ((0, 0), (0, 1), (1, 0), (1, 1)):
        stores = [SQLiteStore(path, check=False), SQLiteStore(path, check=False)]
        stores[writing].save([SaveLog("s", "more")])
        stores[closing].close()
        stores[1 - closing].close()

        assert 0 == checked(path), (writing, closing)


def test_a_store_that_closes_does_not_mark_a_file_that_another_has_begun_to_write(path: Path) -> None:
    """The other one opened it between the last two steps of the first; then it is for the other one to mark it."""
    first = SQLiteStore(path)
    first.save([SaveLog("s", "a")])
    stamp, first._stamp_file = first._stamp_file, lambda: None  # type: ignore[method-assign]
    first.close()
    second = SQLiteStore(path)
    before = path.stat().st_mtime_ns
    stamp()
    assert before == path.stat().st_mtime_ns
    second.save([SaveLog("s", "b")])
    second.close()

    assert 0 == checked(path)


def test_a_file_system_with_coarse_times_has_its_files_checked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the time that was set does not come back exactly, a change might not be noticed."""
    real = os.utime

    def coarse(place: str, *, ns: tuple[int, int]) -> None:
        real(place, ns=(ns[0], ns[1] // 10**9 * 10**9))

    monkeypatch.setattr(os, "utime", coarse)
    fill(path)

    assert 20 == checked(path)
    assert 20 == checked(path)


def test_a_file_stays_clean_over_a_fork(path: Path, in_child: Callable[[Callable[[], object]], int]) -> None:
    """The parent leaves it clean if the child has only closed its store, and so does a child that closes it last."""
    with SQLiteStore(path) as store:
        store.save([SaveLog("s", "a")])
        assert 0 == in_child(store.close)
    assert 0 == checked(path)

    store = SQLiteStore(path)

    def save_and_close() -> None:
        store.save([SaveLog("s", "b")])
        store.close()

    assert 0 == in_child(save_and_close)
    store.close()
    assert 0 == checked(path)


@pytest.fixture(params=sorted(FORMATS.glob("*.db")), ids=lambda file: file.stem)
def released(request: pytest.FixtureRequest, path: Path) -> Path:
    """A copy of a file of each release that had a format."""
    return Path(shutil.copy(request.param, path))


def content(store: SQLiteStore) -> dict[tuple[str, Any], tuple[str, int, Any]]:
    found = {}
    for space in store.spaces():
        for head in store.heads(space):
            record = store.load(space, head.key)
            assert record is not None
            found[space, head.key] = head.kind, head.version, record.value
    return found


EVERYTHING = {
    ("chats", "ann"): ("log", 2, ["edited", "three", "four"]),
    ("chats", 7): ("log", 1, []),
    ("settings", ("a", 1, None)): (
        "value",
        1,
        {"when": dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC), "raw": b"\0\1", "n": [1.5, None, True]},
    ),
    ("settings", "lives on"): ("value", 1, 1),
}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_of_each_release_opens_without_loss(released: Path, read_only: bool) -> None:
    """Values, logs with holes, keys of every kind, ends and versions: everything is there, and nothing is damaged."""
    with SQLiteStore(released, read_only=read_only, timer=lambda: 1.8e9) as store:
        assert store.report.clean
        assert 5 == store.report.entries  # with the one that is over
        assert EVERYTHING == content(store)
        record = store.load("settings", "lives on")
        assert record is not None
        assert 4e9 == record.head.expire_at


def test_a_file_of_each_release_can_be_written_from_then_on(released: Path) -> None:
    """Versions count on from where they were, also for an entry that was deleted before."""
    with SQLiteStore(released, timer=lambda: 1.8e9) as store:
        (head,) = store.save([SaveLog("chats", "ann", 2, append=[store.encode("five")])])
        assert head is not None
        assert (3, 5) == (head.version, head.next)
        (head,) = store.save([SaveValue("settings", "deleted", store.encode(2), 0)])
        assert head is not None
        assert 2 == head.version
        assert 1 == store.expire()
        store.save([Delete("settings", "deleted")])
        expected = {**EVERYTHING, ("chats", "ann"): ("log", 3, ["edited", "three", "four", "five"])}
        assert expected == content(store)
    with Registry[Any, Any](store=f"sqlite:{released}", name="chats") as chats:
        assert ["edited", "three", "four", "five"] == chats["ann"]


def test_a_file_of_a_newer_format_is_refused_by_name_and_left_as_it_is(path: Path) -> None:
    fill(path)
    change(path, "PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=r"its format has version 2, and this release of hygiene reads version 1\. Install the release"
    ):
        SQLiteStore(path)

    assert before == path.read_bytes()
