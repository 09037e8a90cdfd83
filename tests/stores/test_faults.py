"""What can go wrong with a file: never a silent loss, never a crash, and nothing of somebody else's touched."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hygiene.errors import StoreError, StoreUnavailable, VersionConflict
from hygiene.stores import BadRow, SaveLog, SaveValue, SQLiteStore, encode_key

PATIENCE = 20.0
ITEMS = [{"role": "user", "content": f"message {n} " + "x" * (n % 7 * 40)} for n in range(30)]


def fill(path: Path) -> dict[Any, Any]:
    """A store with conversations and values; what is in it."""
    expected: dict[Any, Any] = {f"user{n}": ITEMS[: n % 20 + 1] for n in range(40)}
    expected |= {("value", n): {"n": n, "text": "y" * n * 50} for n in range(20)}
    with SQLiteStore(path) as store:
        for key, value in expected.items():
            if isinstance(value, list):
                store.save([SaveLog("s", key, 0, [store.encode(item) for item in value])])
            else:
                store.save([SaveValue("s", key, store.encode(value), 0)])
    return expected


def change(path: Path, statement: str, *values: Any) -> None:
    """Do to the file what no store would do."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement, values)
    connection.close()


def value_of(store: SQLiteStore, key: Any) -> Any:
    record = store.load("s", key)
    return None if record is None else record.value


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


PLACE = "(SELECT (id << 30) + 3 FROM heads WHERE key = x'a57573657235')"  # item 3 of "user5"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("statement", "problem", "kept"),
    [
        (f"UPDATE items SET data = zeroblob(50) WHERE id = {PLACE}", "the checksum is wrong", True),
        (f"UPDATE items SET data = 'text' WHERE id = {PLACE}", "the checksum is wrong", True),
        (f"UPDATE items SET data = NULL WHERE id = {PLACE}", "the checksum is wrong", False),
        (f"DELETE FROM items WHERE id = {PLACE}", "the item is missing", False),
    ],
)
def test_a_damaged_item_is_put_away_and_the_rest_is_served(
    path: Path, check: bool, statement: str, problem: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """On opening, or when it is loaded if nobody has looked before; a log entry tells, and who had it whole is told."""
    fill(path)
    change(path, statement)
    with SQLiteStore(path, check=check) as store:
        record = store.load("s", "user5")
        assert record is not None
        assert [ITEMS[n] for n in (0, 1, 2, 4, 5)] == record.value
        assert ((0, 3), (4, 6)) == record.head.spans
        if check:
            assert (BadRow("s", "user5", 3, problem, kept),) == store.report.bad
        assert [("s", "user5", 3, problem)] == [(q.space, q.key, q.sequence, q.problem) for q in store.quarantine()]
        assert problem in caplog.text
        with pytest.raises(VersionConflict):
            store.save([SaveLog("s", "user5", 1, [store.encode("next")])])
        store.save([SaveLog("s", "user5", 2, [store.encode("next")])])
        assert store.recover().clean


def test_a_value_that_is_damaged_is_put_away_with_its_entry(path: Path) -> None:
    expected = fill(path)
    place = "(SELECT id << 30 FROM heads WHERE key = ?)"
    change(path, f"UPDATE items SET data = substr(data, 1, 20) WHERE id = {place}", encode_key(("value", 7)))
    with SQLiteStore(path) as store:
        (bad,) = store.report.bad
        assert (0, "the checksum is wrong", True) == (bad.sequence, bad.problem, bad.quarantined)
        assert not store.contains("s", bad.key)
        assert {key: value for key, value in expected.items() if key != bad.key} == dict(store.items("s"))
        store.save([SaveValue("s", bad.key, store.encode("again"), 0)])
        with pytest.raises(VersionConflict):  # who still has the old one must not take this for it
            store.save([SaveValue("s", bad.key, store.encode("old"), 1)])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE heads SET state = zeroblob(30) WHERE key = x'a57573657235'",
        "UPDATE heads SET state = NULL WHERE key = x'a57573657235'",
        "UPDATE heads SET state = (SELECT state FROM heads WHERE key = x'a57573657236') WHERE key = x'a57573657235'",
    ],
)
def test_an_entry_with_a_damaged_head_is_kept_in_quarantine(path: Path, check: bool, statement: str) -> None:
    """With all its items: what belongs to it cannot be known any more, but nothing is thrown away."""
    expected = fill(path)
    change(path, statement)
    with SQLiteStore(path, check=check) as store:
        assert store.load("s", "user5") is None
        rows = list(store.quarantine())
        assert [None, 0, 1, 2, 3, 4, 5] == [row.sequence for row in rows]
        assert {"the head of the entry is damaged"} == {row.problem for row in rows}
        assert {"user5"} == {row.key for row in rows}
        del expected["user5"]
        assert expected == dict(store.items("s"))
        with pytest.raises(VersionConflict):
            store.save([SaveLog("s", "user5", 1, [])])
        assert store.recover().clean


@pytest.mark.parametrize("number", [-(2**62), -3, 2**40, 2**62])
def test_a_head_under_a_wrong_number_is_found(path: Path, number: int) -> None:
    expected = fill(path)
    change(path, "UPDATE heads SET id = ? WHERE key = x'a57573657235'", number)
    with SQLiteStore(path) as store:
        assert {"the head of the entry is damaged", "items without a head"} == {bad.problem for bad in store.report.bad}
        assert 7 == len(store.report.bad) == len(list(store.quarantine()))
        del expected["user5"]
        assert expected == dict(store.items("s"))
        store.save([SaveValue("s", "new", store.encode(1), 0)])
        assert store.recover().clean


@pytest.mark.parametrize("number", [-(2**62), -3, 2**40, 2**62 + 5])
def test_items_of_nobody_are_found(path: Path, number: int) -> None:
    expected = fill(path)
    change(path, "INSERT INTO items VALUES (?, x'0102')", number)
    with SQLiteStore(path) as store:
        assert [(None, None, "items without a head")] == [(b.space, b.key, b.problem) for b in store.report.bad]
        assert expected == dict(store.items("s"))
        assert store.recover().clean


@pytest.mark.parametrize("statement", ["UPDATE heads SET expire_at = 5", "UPDATE heads SET bytes = 7"])
def test_what_stands_beside_a_head_is_written_anew(path: Path, statement: str) -> None:
    """A conversation must not be over because of a bit in the copy of its end."""
    expected = fill(path)
    change(path, statement)
    with SQLiteStore(path, check=False) as store:
        assert 0 == store.expire()
    change(path, statement)
    with SQLiteStore(path) as store:
        assert len(expected) == len(store.report.repaired)
        assert () == store.report.bad
        assert expected == dict(store.items("s"))
        assert store.recover().clean


def test_an_index_that_does_not_know_a_key_is_built_anew(path: Path) -> None:
    """The key would not be found, and a new conversation begun over a stored one."""
    expected = fill(path)
    with SQLiteStore(path) as store:
        page = store._read(lambda c: c.execute("PRAGMA page_size").fetchone()[0])
        root = store._read(
            lambda c: c.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'heads_by_key'").fetchone()[0]
        )
    data = bytearray(path.read_bytes())
    at = data.index(b"user5", (root - 1) * page)
    data[at + 1] ^= 1
    path.write_bytes(data)
    with SQLiteStore(path) as store:
        assert ("the indexes of the heads were built anew",) == store.report.repaired
        assert expected == dict(store.items("s"))


@pytest.mark.slow
def test_no_flipped_bit_is_a_silent_loss(path: Path, tmp_path: Path) -> None:
    """Any bit of the file: it is an error, or it is in the report, or everything is there."""
    expected = fill(path)
    whole = path.read_bytes()
    chance = random.Random(7)
    places = [*range(0, 100 * 8, 5), *(chance.randrange(len(whole) * 8) for _ in range(240))]
    outcomes = dict.fromkeys(("refused", "reported", "unharmed"), 0)
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            store = SQLiteStore(path)
        except StoreError:
            outcomes["refused"] += 1
        else:
            with store:
                found = dict(store.items("s"))
                harmed = {key for key in expected if found.get(key) != expected[key]} | (found.keys() - expected.keys())
                named = {bad.key for bad in store.report.bad}
                # A damaged key, or the number of a row, cannot be named; that something is wrong must be.
                assert not harmed or named, f"bit {place}: {harmed} differ, and the report says nothing"
                for key in harmed & found.keys() & expected.keys():
                    assert all(item in expected[key] for item in found[key]), f"bit {place}: {key} was made up"
                outcomes["reported" if not store.report.clean else "unharmed"] += 1
        for leftover in tmp_path.glob("chats.db?*"):
            leftover.unlink()

    assert min(outcomes.values()) > 10, outcomes


def test_a_truncated_file_is_an_error_and_left_as_it_is(path: Path) -> None:
    fill(path)
    whole = path.read_bytes()
    for length in (1, 50, 100, 2000, 2048, 5000, len(whole) // 2, len(whole) - 2048):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"damaged|truncated"):
            SQLiteStore(path)

        assert whole[:length] == path.read_bytes()
    path.write_bytes(whole[:-1])  # with all pages there, it is the row that was on the last byte
    with SQLiteStore(path) as store:
        assert ["the checksum is wrong"] == [bad.problem for bad in store.report.bad]


def test_an_empty_file_is_an_error_and_its_log_is_left_alone(path: Path) -> None:
    """SQLite would take it for new, and delete the log with what was saved last."""
    with SQLiteStore(path) as store:
        store.save([SaveValue("s", "a", store.encode("precious"))])
        shutil.copy(f"{path}-wal", f"{path}.copy")
    path.write_bytes(b"")
    Path(f"{path}.copy").rename(f"{path}-wal")
    before = bytes_of(path.parent)
    with pytest.raises(StoreError, match="found an empty file"):
        SQLiteStore(path)
    assert before == bytes_of(path.parent)
    path.unlink()
    with pytest.raises(StoreError, match=r"its log .*chats\.db-wal is there"):
        SQLiteStore(path)

    assert b"precious" in Path(f"{path}-wal").read_bytes()


def logged(path: Path, saves: int) -> None:
    """Files as a killed process leaves them: *saves* of them in the log."""
    with SQLiteStore(path) as store:
        for n in range(saves):
            store.save([SaveLog("s", "a", n, [store.encode("x" * 1000)])])
        for end in ("", "-wal"):
            shutil.copy(f"{path}{end}", f"{path}{end}.copy")
    for end in ("", "-wal"):
        Path(f"{path}{end}.copy").rename(f"{path}{end}")


@pytest.mark.parametrize("tail", [b"", bytes(100)])
def test_a_log_that_was_cut_off_in_the_middle_of_a_save_is_ordinary(path: Path, tail: bytes) -> None:
    """That save had not been acknowledged. The last frame may have its header and not yet its page."""
    logged(path, 20)
    log = Path(f"{path}-wal")
    log.write_bytes(log.read_bytes()[:-100] + tail)
    with SQLiteStore(path) as store:
        assert store.report.clean
        assert 19 == len(value_of(store, "a"))


@pytest.mark.parametrize("at", [12, 28, 0.3, 0.6])
def test_saves_that_are_lost_with_a_damaged_log_are_reported(path: Path, at: float) -> None:
    """SQLite drops in silence what stands behind the damage; the log is kept for whoever wants to look at it."""
    logged(path, 20)
    log = Path(f"{path}-wal")
    data = bytearray(log.read_bytes())
    data[at if isinstance(at, int) else int(len(data) * at)] ^= 4
    log.write_bytes(data)
    with SQLiteStore(path) as store:
        (bad,) = store.report.bad
        assert "saves at its end are lost" in bad.problem
        record = store.load("s", "a")
        assert (0 if record is None else len(record.value)) < 20
        store.save([SaveValue("s", "b", store.encode(1))])
    (kept,) = path.parent.glob("*.damaged-*")

    assert data == kept.read_bytes()
    with SQLiteStore(path) as store:
        assert store.report.clean


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.write_bytes(os.urandom(5000)), "not an SQLite database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(984)), "not an SQLite database, or a damaged one"),
        (lambda path: change(path, "CREATE TABLE theirs (a)"), r"another application \(application_id 0\)"),
        (lambda path: change(path, "PRAGMA application_id = 77"), r"another application \(application_id 77\)"),
        (
            lambda path: (fill(path), change(path, "PRAGMA user_version = 2")),
            "its format has version 2",
        ),
    ],
)
def test_what_is_not_ours_is_refused_untouched(path: Path, make: Callable[[Path], object], what: str) -> None:
    """Another application's database, a newer version's, any other file: not a byte changes, no file appears."""
    make(path)
    before = bytes_of(path.parent)
    with pytest.raises(StoreError, match=what):
        SQLiteStore(path)

    assert before == bytes_of(path.parent)


def test_a_database_that_another_application_has_open_is_left_alone(path: Path) -> None:
    theirs = sqlite3.connect(path, isolation_level=None)
    theirs.execute("PRAGMA journal_mode = WAL")
    theirs.execute("CREATE TABLE theirs (a)")
    theirs.execute("BEGIN IMMEDIATE")
    theirs.execute("INSERT INTO theirs VALUES (1)")
    with pytest.raises(StoreError, match="another application"):
        SQLiteStore(path)
    theirs.execute("COMMIT")

    assert [(1,)] == theirs.execute("SELECT * FROM theirs").fetchall()
    theirs.close()


def test_a_full_database_refuses_the_save_and_keeps_what_it_has(path: Path) -> None:
    """As on a full disk; and the same save succeeds when there is room again."""
    with SQLiteStore(path) as store:
        store.save([SaveValue("s", "a", store.encode(1))])
        store._writer.execute(f"PRAGMA max_page_count = {path.stat().st_size // 2048 + 10}")
        large = SaveLog("s", "b", 0, [store.encode("x" * 500)] * 200)
        for sync in (False, True):
            with pytest.raises(StoreUnavailable, match=r"the disk is full.*SQLITE_FULL"):
                store.save([SaveValue("s", "a", store.encode(2)), large], sync=sync)
            assert (1, None) == (value_of(store, "a"), value_of(store, "b"))
        store._writer.execute("PRAGMA max_page_count = 1000000")
        store.save([SaveValue("s", "a", store.encode(2), 1), large])

        assert (2, 200) == (value_of(store, "a"), len(value_of(store, "b")))
        assert store.recover().clean


FILLER = """
import resource, sys
from hygiene.errors import StoreUnavailable
from hygiene.stores import *

with SQLiteStore(sys.argv[1]) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
    saved, refused = 0, 0
    while refused < 3:
        try:
            store.save([SaveLog("s", "a", None, [store.encode([saved, "x" * 3000])] * 5)], sync=saved % 2 == 0)
            saved += 1
        except StoreUnavailable as error:
            refused += 1
            assert "file system failed" in str(error) or "disk is full" in str(error), error
    assert len(store.load("s", "a").value) == saved * 5
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.save([SaveLog("s", "a", None, [store.encode([saved, "more"])] * 5)])
    print(saved + 1)
"""


@pytest.mark.slow
def test_a_file_that_may_not_grow_keeps_what_was_acknowledged(path: Path, elsewhere: Callable[..., Any]) -> None:
    """The system itself refuses to write: in the log, in the middle of a save, or of its checkpoint."""
    pytest.importorskip("resource")
    output, _ = (process := elsewhere(FILLER, path)).communicate(timeout=PATIENCE)
    assert 0 == process.returncode
    with SQLiteStore(path) as store:
        assert [n for n in range(int(output)) for _ in range(5)] == [n for n, _ in value_of(store, "a")]
        assert store.report.clean


READER = """
import os, sys, urllib.parse  # all modules now: who one becomes may not be allowed to read them
from hygiene.errors import StoreUnavailable
from hygiene.stores import *

os.seteuid(65534)  # root may write wherever it likes
for name in ("new.db", "chats.db"):
    try:
        with SQLiteStore(os.path.join(sys.argv[1], name)) as store:
            store.save([SaveValue("s", "a", store.encode(2))])
    except StoreUnavailable as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_to_is_unavailable(tmp_path: Path, elsewhere: Callable[..., Any]) -> None:
    """The error says which, and what has to be allowed; nothing is created and nothing is lost."""
    folder = tmp_path / "folder"
    folder.mkdir()
    fill(folder / "chats.db")
    for above in (tmp_path, *tmp_path.parents):
        if above.is_relative_to(Path(tempfile.gettempdir()) / "."):
            above.chmod(above.stat().st_mode | 0o755)
    folder.chmod(0o555)
    before = bytes_of(folder)
    process = elsewhere(READER, folder)
    output, _ = process.communicate(timeout=PATIENCE)
    lines = output.splitlines()

    assert 0 == process.returncode
    assert 2 == len(lines)
    assert "new.db" in lines[0]
    assert "chats.db" in lines[1]
    assert "read-only" in lines[1] or "cannot be opened" in lines[1]
    assert before == bytes_of(folder)


def test_a_path_where_nothing_can_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "none" / "chats.db", tmp_path / "file" / "chats.db", Path("/proc/chats.db"), tmp_path):
        with pytest.raises((StoreUnavailable, StoreError), match=str(place)):
            SQLiteStore(place)


def test_a_value_that_cannot_be_encoded_never_reaches_the_store(path: Path) -> None:
    """It is refused while the caller has it in hand, and what was there stays."""
    with SQLiteStore(path) as store:
        store.save([SaveValue("s", "a", store.encode(1))])
        with pytest.raises(TypeError, match=r"the value of 'a'.*value\['when'\]"):
            store.save([SaveValue("s", "a", store.encode({"when": {1}}, "a"))])

        assert 1 == value_of(store, "a")
