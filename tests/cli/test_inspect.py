"""A look into a store: what is printed, what is exported, and that nothing changes."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene.cli.contents import export, restored, told
from hygiene.errors import NotStorable, StoreUnavailable
from hygiene.stores import Delete, SaveLog, SaveValue, SQLiteStore

pytestmark = pytest.mark.once

VALUE = {
    "bytes": b"\x00\xff",
    "when": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    "local": datetime(2026, 1, 2),  # noqa: DTZ001 - one without a zone comes back without one
    "floats": [math.inf, -math.inf, -0.0, 1e-300],
    1: {"$bytes": "no bytes"},
    None: {"text": 'with "quotes", a\nnewline and ünïcödé'},
}


@pytest.fixture
def hygiene(hygiene, monkeypatch):
    """The command in a wider terminal: a row of these tables has many cells."""
    monkeypatch.setenv("COLUMNS", "100")
    return hygiene


@pytest.fixture
def chats(tmp_path):
    """A store with thirty conversations, each longer than the one before, and one user."""
    path = tmp_path / "chats.db"
    with SQLiteStore(path) as store:
        for n in range(30):
            items = [store.encode({"role": "user", "content": "x" * 90}) for _ in range(n + 1)]
            store.save([SaveLog("conversations", f"user{n}", append=items)])
        store.save([SaveValue("users", ("a", 1), store.encode(VALUE), expire_at=time.time() + 7200)])
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(path: Path, statement: str) -> None:
    """Do to the file what no store would do."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(statement)
    connection.close()


def cells(out: str) -> list[list[str]]:
    """The rows of the tables that rich has printed."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_the_largest_are_shown_first(hygiene, chats):
    """The sums of each space, then the largest entries with kind, size, age and end; the file stays as it is."""
    before = bytes_of(chats.parent)

    code, out, err = hygiene("inspect", chats, "--limit", 3)

    rows = cells(out)
    assert (0, "") == (code, err)
    assert before == bytes_of(chats.parent)
    assert [["conversations", "30", "465"], ["users", "1", "1"]] == [row[:3] for row in rows[:2]]
    assert ["'user29'", "'user28'", "'user27'"] == [row[1] for row in rows[2:]]
    assert ["conversations", "'user29'", "log", "30"] == rows[2][:4]
    assert "never" == rows[2][-1]
    assert rows[2][-2].endswith(" s ago")
    assert "In quarantine: nothing." in out


def test_one_space_can_be_asked_for(hygiene, chats):
    """What is shown, summed and exported is of that space; small sizes are bytes, an end is a while from now."""
    code, out, _ = hygiene("inspect", f"sqlite:{chats}", "--space", "users")

    rows = cells(out)
    assert 0 == code
    assert ["users"] * 2 == [row[0] for row in rows]
    assert ["('a', 1)", "value", "1"] == rows[1][1:4]
    assert rows[0][-1].endswith(" bytes")
    assert rows[1][-1] in {"in 2 h", "in 1 h"}


def test_json_is_one_object(hygiene, chats):
    """With what the picture shows, in bytes and seconds."""
    code, out, err = hygiene("inspect", chats, "--json", "--limit", 1)
    found = json.loads(out)

    assert (0, "") == (code, err)
    (entry,) = found["entries"]
    assert str(chats) == found["store"]
    assert {
        "space": "conversations",
        "key": "user29",
        "kind": "log",
        "version": 1,
        "items": 30,
    }.items() <= entry.items()
    assert entry["saved_at"] <= time.time()
    assert 0 <= entry["age"] < 3600
    assert ["conversations", "users"] == [space["name"] for space in found["spaces"]]
    assert ([], 0, []) == (found["quarantine"], found["quarantined"], found["damaged"])


def test_an_export_gives_everything_back(hygiene, chats, tmp_path):
    """One line of JSON for each entry, from which keys and values come back equal, types and all."""
    file = tmp_path / "all.jsonl"

    code, out, err = hygiene("inspect", chats, "--export", file)

    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert 0 == code
    assert "The largest" in out
    assert f"31 entries: {file}\n" == err
    assert 31 == len(lines)
    assert ["space", "key", "kind", "value", "version", "saved_at", "expire_at"] == list(lines[0])
    (user,) = [line for line in lines if line["space"] == "users"]
    assert (("a", 1), "value", 1) == (restored(user["key"]), user["kind"], user["version"])
    value = restored(user["value"])
    assert VALUE == value
    assert [str(number) for number in VALUE["floats"]] == [str(number) for number in value["floats"]]
    assert VALUE["when"].utcoffset() == value["when"].utcoffset()
    assert user["expire_at"] > time.time()
    (last,) = [line for line in lines if line["key"] == "user29"]
    assert 30 * [{"role": "user", "content": "x" * 90}] == last["value"]


def test_an_export_does_not_overwrite(hygiene, chats, tmp_path):
    """A file that is there, which may be the store, is left as it is."""
    before = bytes_of(tmp_path)

    code, _, err = hygiene("inspect", chats, "--export", chats)

    assert 2 == code
    assert f"wanted a new file for the export, found that '{chats}' exists" in err
    assert before == bytes_of(tmp_path)


def test_an_export_that_cannot_be_written_leaves_nothing(hygiene, chats, tmp_path):
    """One sentence, exit code 2."""
    code, _, err = hygiene("inspect", chats, "--export", tmp_path / "nowhere" / "all.jsonl")

    assert 2 == code
    assert "found that it cannot be done: No such file or directory" in err
    assert ["chats.db"] == [path.name for path in tmp_path.iterdir()]


def test_what_is_deleted_during_an_export_is_not_in_it(chats, tmp_path):
    """It is gone, and nothing is wrong."""

    class Changing(SQLiteStore):
        def keys(self, space):
            for key in list(super().keys(space)):
                if key == "user3":
                    self.save([Delete(space, key)])
                yield key

    with Changing(chats) as store:
        done = export(store, str(tmp_path / "all.jsonl"), "conversations")

    assert (29, []) == (done.entries, done.left_out)
    assert 29 == len((tmp_path / "all.jsonl").read_text().splitlines())


def test_a_store_that_fails_in_the_middle_leaves_no_half_of_an_export(chats, tmp_path):
    """What is not there cannot be taken for the whole."""

    class Failing(SQLiteStore):
        def load(self, space, key):
            if key == "user7":
                raise StoreUnavailable("the disk is gone")
            return super().load(space, key)

    with Failing(chats) as store, pytest.raises(StoreUnavailable, match="the disk is gone"):
        export(store, str(tmp_path / "all.jsonl"))

    assert ["chats.db"] == [path.name for path in tmp_path.iterdir()]


def test_what_is_damaged_is_named_and_the_rest_exported(hygiene, chats, tmp_path):
    """The picture counts it, the export leaves it out, says so and ends with 2; the file stays as it is."""
    file = tmp_path / "all.jsonl"
    change(chats, "UPDATE items SET data = zeroblob(9) WHERE id = (SELECT id << 30 FROM heads ORDER BY id LIMIT 1)")
    before = chats.read_bytes()

    code, out, err = hygiene("inspect", chats, "--export", file)

    assert 2 == code
    assert "Damaged, and not in quarantine yet: 1." in out
    assert "of the entry is damaged: 'user0' in 'conversations'" in out
    assert "cannot load 'user0' of 'conversations'" in err
    assert "found 1 that could not be written" in err
    assert 30 == len(file.read_text().splitlines())
    assert before == chats.read_bytes()


def test_the_quarantine_is_shown_the_newest_first(hygiene, chats, caplog):
    """How many rows there are, whose they are, what was wrong with them."""
    change(chats, "UPDATE items SET data = zeroblob(9) WHERE id IN (SELECT id << 30 FROM heads WHERE space = 'users')")
    for row in (0, 1, 2):
        change(
            chats, f"UPDATE items SET data = zeroblob(9) WHERE id = (SELECT (id << 30) + {row} FROM heads WHERE id = 9)"
        )
        SQLiteStore(chats).close()

    _, out, _ = hygiene("inspect", chats)
    found = json.loads(hygiene("inspect", chats, "--json", "--space", "conversations", "--limit", 2)[1])

    assert "In quarantine: 3 rows." in out
    assert "  the checksum is wrong: 9 bytes of 'user8' in 'conversations', item 2, " in out
    assert 3 == found["quarantined"]
    assert [("user8", 2, 9), ("user8", 1, 9)] == [
        (row["key"], row["sequence"], row["bytes"]) for row in found["quarantine"]
    ]


def test_a_key_is_shown_as_it_is_and_cut(hygiene, tmp_path):
    """Neither its markup nor its length nor its line breaks spoil the table."""
    path = tmp_path / "odd.db"
    with SQLiteStore(path) as store:
        store.save([SaveValue("[red]s", key, store.encode(1)) for key in ("[bold]k", "a\nb", "long" * 500)])

    _, out, _ = hygiene("inspect", path)

    assert {"'[bold]k'", "'a\\nb'"} <= {row[1] for row in cells(out)[1:]}
    assert "[red]s" == cells(out)[0][0]
    assert len(out) < 4000


def test_an_empty_store_is_no_error(hygiene, tmp_path):
    """It has no spaces and no entries."""
    SQLiteStore(tmp_path / "new.db").close()

    code, out, _ = hygiene("inspect", tmp_path / "new.db", "--export", tmp_path / "none.jsonl")

    assert 0 == code
    assert [] == cells(out)
    assert "" == (tmp_path / "none.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "told_"),
    [
        (["nowhere.db"], "found no such file"),
        (["sqlite::memory:"], "begins empty"),
        (["ftp://chats"], "an address such as sqlite:chats.db; found 'ftp://chats'"),
        (["chats.db", "--space", "nobody"], "found no entries in 'nobody'. There are: 'conversations', 'users'"),
        (["chats.db", "--codec", "pickle"], "found one with 'msgpack'"),
        (["chats.db", "--codec", "json"], "codec must be"),
        (["notes.txt"], "is not a SQLite database"),
        (["redis://127.0.0.1:1"], "no answer from the server"),
    ],
)
def test_what_cannot_be_looked_at_is_told_in_a_sentence(hygiene, chats, monkeypatch, arguments, told_):
    """Exit code 2, no traceback, no output, and nothing is made."""
    monkeypatch.chdir(chats.parent)
    Path("notes.txt").write_text("hello")

    code, out, err = hygiene("inspect", *arguments)

    assert (2, "") == (code, out)
    assert told_ in err
    assert err.startswith("hygiene: ")
    assert {"chats.db", "notes.txt"} == {path.name for path in chats.parent.iterdir()}


def test_values_that_only_pickle_takes_are_named_in_the_export(hygiene, tmp_path):
    """They have no form in JSON; a tuple and half of a surrogate pair have."""
    path, file = tmp_path / "pickled.db", tmp_path / "all.jsonl"
    values = {"set": {1}, "tuple": (1, "\ud800"), "plain": 2**70}
    with SQLiteStore(path, codec="pickle") as store:
        store.save([SaveValue("s", key, store.encode(value)) for key, value in values.items()])

    shown, out, _ = hygiene("inspect", path, "--codec", "pickle")
    code, _, err = hygiene("inspect", path, "--codec", "pickle", "--export", file)

    assert (0, 2) == (shown, code)
    assert ["s", "3", "3"] == cells(out)[0][:3]
    assert "'set' of 's' has no form in JSON: plain data was wanted; found builtins.set" in err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"tuple": (1, "\ud800"), "plain": 2**70} == {line["key"]: restored(line["value"]) for line in lines}


ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
DATES = st.datetimes() | st.datetimes(timezones=st.just(UTC))
KEYS = st.recursive(ATOMS, lambda keys: st.tuples(keys, keys), max_leaves=4)
VALUES = st.recursive(
    ATOMS | DATES, lambda values: st.lists(values) | st.dictionaries(ATOMS | st.just("$bytes"), values), max_leaves=10
)


@pytest.mark.slow
@given(KEYS | VALUES)
def test_whatever_a_store_takes_comes_back_from_json(value):
    """Equal, and with the same types inside."""
    again = restored(json.loads(json.dumps(told(value), allow_nan=False)))

    assert repr(value) == repr(again)


def test_what_has_no_form_in_json_is_refused():
    """By its type."""
    with pytest.raises(NotStorable, match=r"found builtins\.complex"):
        told({"a": [1j]})


def test_nan_comes_back_too():
    """It is equal to nothing, but it is a float."""
    assert math.isnan(restored(json.loads(json.dumps(told(math.nan), allow_nan=False))))


@pytest.mark.slow
def test_the_command_is_there_in_a_process_of_its_own(chats, project_root):
    """With standard output for the numbers alone."""
    command = [sys.executable, "-m", "hygiene", "inspect", str(chats), "--json", "--limit", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=project_root, check=False)

    assert (0, "") == (done.returncode, done.stderr)
    assert "user29" == json.loads(done.stdout)["entries"][0]["key"]
