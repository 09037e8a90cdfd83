"""A store that is only looked at: nothing of it changes, whoever else writes and however that ended."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hygiene.errors import StoreError, StoreUnavailable
from hygiene.stores import BadRow, Delete, SaveLog, SaveValue, SQLiteStore, encode_key, open_store
from hygiene.testing import ManualClock

PATIENCE = 20.0

# Appends numbers to a log, as many as it is told to, and says when they are saved.
WRITER = """
import sys
from hygiene.stores import SaveLog, SQLiteStore

with SQLiteStore(sys.argv[1]) as store:
    count = 0
    for line in sys.stdin:
        for _ in range(int(line)):
            store.save([SaveLog("s", "log", append=[store.encode(count)])])
            count += 1
        print("saved", flush=True)
"""


def fill(path: Path) -> None:
    with SQLiteStore(path) as store:
        for n in range(20):
            store.save([SaveLog("s", f"user{n}", append=[store.encode(m) for m in range(n + 1)])])


def change(path: Path, statement: str, *values: Any) -> None:
    """Do to the file what no store would do."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement, values)
    connection.close()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}


def append(path: Path, *items: Any) -> None:
    with SQLiteStore(path) as store:
        store.save([SaveLog("s", "user0", append=[store.encode(item) for item in items])])


def value_of(store: SQLiteStore, key: Any) -> Any:
    record = store.load("s", key)
    return None if record is None else record.value


def look_at_everything(path: Path) -> dict[Any, Any]:
    with SQLiteStore(path, read_only=True) as store:
        assert store.report.clean
        assert store.recover().clean
        assert [] == list(store.quarantine())
        assert store.count("s") == len(list(store.heads("s"))) == len(list(store.keys("s")))
        assert store.nbytes("s") == sum(head.bytes for head in store.heads("s"))
        return {key: value for space in store.spaces() for key, value in store.items(space)}


def tell(writer: subprocess.Popen[str], count: int) -> None:
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write(f"{count}\n")
    writer.stdin.flush()
    assert "saved\n" == writer.stdout.readline()


def test_a_look_leaves_nothing_behind(tmp_path: Path, path: Path) -> None:
    """The folder is the same afterwards, byte for byte: no log, no index, no other time of the file."""
    fill(path)
    before, at = bytes_of(tmp_path), path.stat().st_mtime_ns

    found = look_at_everything(path)

    assert {f"user{n}": list(range(n + 1)) for n in range(20)} == found
    assert ["chats.db"] == [name.name for name in tmp_path.iterdir()]
    assert (before, at) == (bytes_of(tmp_path), path.stat().st_mtime_ns)


@pytest.mark.slow
def test_a_look_at_a_file_that_another_process_writes_changes_neither_it_nor_its_log(
    tmp_path: Path, path: Path, elsewhere: Callable[..., subprocess.Popen[str]]
) -> None:
    """Everything saved so far is seen, and nothing is moved from the log into the file."""
    writer = elsewhere(WRITER, path)
    try:
        tell(writer, 30)
        before = bytes_of(tmp_path)
        assert b"" != before["chats.db-wal"]

        assert {"log": list(range(30))} == look_at_everything(path)
        with SQLiteStore(path, read_only=True) as store:
            assert before == bytes_of(tmp_path)
            tell(writer, 7)
            assert list(range(37)) == value_of(store, "log")
    finally:
        writer.communicate(timeout=PATIENCE)

    assert 0 == writer.returncode
    assert {"log": list(range(37))} == look_at_everything(path)


@pytest.mark.slow
def test_a_look_after_a_kill_leaves_the_log_as_it_is(
    tmp_path: Path, path: Path, elsewhere: Callable[..., subprocess.Popen[str]]
) -> None:
    """Everything acknowledged is seen in the log of a killed process, and the log is still there for the next one."""
    writer = elsewhere(WRITER, path)
    tell(writer, 25)
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=PATIENCE)
    before = bytes_of(tmp_path)
    assert b"" != before["chats.db-wal"]

    assert {"log": list(range(25))} == look_at_everything(path)
    assert before == bytes_of(tmp_path)
    path.with_name("chats.db-shm").unlink()  # as in a copy of the two files
    assert {"log": list(range(25))} == look_at_everything(path)
    assert before == bytes_of(tmp_path)
    with SQLiteStore(path) as store:
        assert list(range(25)) == value_of(store, "log")


def test_what_is_saved_between_two_looks_is_seen(path: Path) -> None:
    """Whether the other one is finished and has moved his log into the file, or is still at it."""
    fill(path)
    with SQLiteStore(path, read_only=True) as store:
        append(path, "more")
        assert [0, "more"] == value_of(store, "user0")
        with SQLiteStore(path) as other:
            other.save([SaveLog("s", "user0", append=[other.encode("and more")])])
            assert [0, "more", "and more"] == value_of(store, "user0")
        assert [0, "more", "and more"] == value_of(store, "user0")


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_that_changes_under_a_look_is_looked_at_again(path: Path, fails: bool) -> None:
    """What was read of a file that somebody wrote to meanwhile is not believed, nor is an error."""
    fill(path)
    looks = 0

    def look(connection: sqlite3.Connection) -> int:
        nonlocal looks
        looks += 1
        found = connection.execute("SELECT count(*) FROM items").fetchone()[0]
        if looks <= 2:
            append(path, looks)
            if fails:
                connection.execute("SELECT nothing")
        return int(found)

    with SQLiteStore(path, read_only=True) as store:
        assert 210 + 2 == store._read(look)
        assert 3 == looks


def test_a_file_that_always_changes_is_given_up(path: Path) -> None:
    """With an error that says that trying again may help."""
    fill(path)

    with (
        SQLiteStore(path, read_only=True) as store,
        pytest.raises(StoreUnavailable, match="changed 20 times in a row"),
    ):
        store._read(lambda connection: path.touch())


PLACE = "(SELECT (id << 30) + 3 FROM heads WHERE key = x'a57573657235')"  # item 3 of "user5"


@pytest.mark.parametrize(
    ("statement", "bad"),
    [
        (f"UPDATE items SET data = zeroblob(50) WHERE id = {PLACE}", ("s", "user5", "the head or an item")),
        (f"DELETE FROM items WHERE id = {PLACE}", ("s", "user5", "the head or an item")),
        ("UPDATE heads SET state = zeroblob(30) WHERE key = x'a57573657235'", ("s", "user5", "the head or an item")),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_damage_is_told_and_left(
    tmp_path: Path, path: Path, statement: str, bad: tuple[str, str, str], check: bool
) -> None:
    """It is in the report; to load that entry is an error, the others are served, nothing goes into quarantine."""
    fill(path)
    change(path, statement)
    before = bytes_of(tmp_path)

    with SQLiteStore(path, read_only=True, check=check) as store:
        assert check is not store.report.clean
        (row,) = store.recover().bad
        assert bad[:2] == (row.space, row.key)
        assert row.problem.startswith(bad[2])
        assert not row.quarantined
        with pytest.raises(StoreError, match=r"'user5' of 's'.*it is damaged, and was left as it is"):
            store.load("s", "user5")
        assert [0, 1, 2, 3, 4] == value_of(store, "user4")
        assert [] == list(store.quarantine())

    assert before == bytes_of(tmp_path)


def test_items_without_a_head_and_a_damaged_index_are_told_and_left(tmp_path: Path, path: Path) -> None:
    """What cannot be told whose it is has no space and no key."""
    fill(path)
    change(path, "DELETE FROM heads WHERE key = ?", encode_key("user7"))
    connection = sqlite3.connect(path, isolation_level=None)
    (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'heads_by_key'").fetchone()
    (page,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    data = bytearray(path.read_bytes())
    data[data.index(b"user5", (root - 1) * page)] ^= 1
    path.write_bytes(data)
    before = bytes_of(tmp_path)

    with SQLiteStore(path, read_only=True) as store:
        assert {
            BadRow(None, None, None, "items without a head", quarantined=False),
            BadRow(None, None, None, "the indexes of the heads are damaged", quarantined=False),
        } == set(store.report.bad)

    assert before == bytes_of(tmp_path)


def test_nothing_can_be_saved(tmp_path: Path, path: Path, clock: ManualClock) -> None:
    """Each method that would change something says so instead."""
    fill(path)
    before = bytes_of(tmp_path)

    with SQLiteStore(path, read_only=True, timer=clock) as store:
        for change_ in (SaveValue("s", "k", store.encode(1)), SaveLog("s", "k"), Delete("s", "user1")):
            with pytest.raises(StoreError, match="opened to be read only"):
                store.save([change_])
        with pytest.raises(StoreError, match="opened to be read only"):
            store.save([], sync=True)
        with pytest.raises(StoreError, match="opened to be read only"):
            store.expire()

    assert before == bytes_of(tmp_path)


def test_there_must_be_a_file(tmp_path: Path, path: Path) -> None:
    """A look makes none."""
    with pytest.raises(StoreError, match="found no such file"):
        SQLiteStore(path, read_only=True)
    with pytest.raises(ValueError, match="in memory begins empty"):
        SQLiteStore(":memory:", read_only=True)

    assert [] == list(tmp_path.iterdir())


def test_the_address_takes_it_too(path: Path) -> None:
    """As every option of the store."""
    fill(path)

    with open_store(f"sqlite:{path}", read_only=True) as store, pytest.raises(StoreError, match="read only"):
        store.save([Delete("s", "user1")])


def test_a_closed_one_is_closed(path: Path) -> None:
    """And lets go of the file."""
    fill(path)
    store = SQLiteStore(path, read_only=True)
    assert [0] == value_of(store, "user0")
    store.close()

    assert (set(), {}) == (store._readers, store._at_rest)
    with pytest.raises(StoreError, match="is closed"):
        store.load("s", "user0")
