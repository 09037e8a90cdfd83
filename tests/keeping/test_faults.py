"""A registry whose store cannot: nothing is lost in silence, nothing leaves unsaved, and all is well afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import random
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene import Registry
from hygiene.cleanup import relieve
from hygiene.errors import NotStorable, StoreError, StoreUnavailable
from hygiene.stores import SQLiteStore

PATIENCE = 20.0
TEXTS = [
    "a\0b",
    "\0",
    "it's",
    '"quoted"',
    "two\nlines\r\n",
    "",
    " ",
    "x" * 1_000_000,
    "naïve 😀",
    "'; DROP TABLE heads",
]
TUPLES = [("guild", 7, ("channel", b"\0")), ("a",), (), ("a", "b"), ("ab",)]
KEYS: list[Any] = [*TEXTS, *TUPLES, b"", b"\0\xff\n'", 7, -(2**63), 2**63 - 1, 1.5, None]


class Gated(SQLiteStore):
    """A real store whose saves can be made to stop in the middle, and to fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def save(self, changes: Any, *, sync: bool = False) -> Any:
        self.begun.release()
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return super().save(changes, sync=sync)

    def hang(self) -> None:
        """The next save stops before it has saved."""
        self.gate.clear()
        while self.begun.acquire(blocking=False):
            pass


@pytest.fixture
def store(path: Path) -> Iterator[Gated]:
    """An empty store that can be made to hang and to fail."""
    with Gated(path) as opened:
        yield opened
        opened.gate.set()


def stored(path: Path, space: str = "chats") -> dict[Any, Any]:
    """What is in a space of the file."""
    with SQLiteStore(path) as store:
        assert store.report.clean, store.report
        return dict(store.items(space))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def within_bound(registry: Registry[Any, Any], bound: int) -> bool:
    """Whether what had to stay leaves once it is saved: the janitor sees to it."""
    deadline = time.monotonic() + PATIENCE
    while len(registry) > bound and time.monotonic() < deadline:
        time.sleep(0)
    return len(registry) <= bound


# The disk is full.

CHATS = {n: [f"message {i} of {n} " + "x" * 300 for i in range(8)] for n in range(12)}


def test_a_full_disk_loses_nothing_and_is_over_when_there_is_room(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be saved stays in memory, over the bound, and can be read; then it is saved and leaves."""
    with SQLiteStore(path) as store:
        chats: Registry[int, list[str]] = Registry(maxsize=2, store=store, name="chats")
        chats["before"] = ["saved"]  # type: ignore[index]
        chats.flush()
        assert store._writer is not None
        store._writer.execute(f"PRAGMA max_page_count = {path.stat().st_size // 2048 + 4}")
        for n, messages in CHATS.items():
            for message in messages:
                chats.setdefault(n, []).append(message)
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            chats.flush()

        assert len(chats) > 2
        assert CHATS == {n: chats[n] for n in CHATS}
        assert ["saved"] == chats["before"]  # type: ignore[index]
        assert "the disk is full" in caplog.text
        assert "or cannot be saved" in caplog.text

        store._writer.execute("PRAGMA max_page_count = 1000000")
        chats.flush()

        assert within_bound(chats, 2)
        assert CHATS == {n: chats[n] for n in CHATS}

        chats.close()
    assert {**CHATS, "before": ["saved"]} == stored(path)


# On a file system of its own that is too small, and where no file may grow: the system itself refuses to write.
FILLER = """
import os, resource, sys
from hygiene import Registry
from hygiene.errors import StoreUnavailable

path, limit = sys.argv[1], int(sys.argv[2])
chats = Registry(maxsize=2, store="sqlite:" + path, name="chats")
ballast = os.path.join(os.path.dirname(path), "ballast")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
else:
    with open(ballast, "wb") as file:
        file.write(bytes(1_300_000))
acknowledged, refused, n = 0, 0, 0
while refused < 5:
    for _ in range(5):
        chats.setdefault(n % 4, []).append([n, "x" * 3000])
        n += 1
    try:
        chats.flush()
        acknowledged = n
    except StoreUnavailable:
        refused += 1
assert all([i for i, _ in chats[k]] == list(range(k, n, 4)) for k in range(4)), "read what was written"
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
else:
    os.unlink(ballast)
if len(sys.argv) > 3:
    print(acknowledged, flush=True)
    os._exit(0)  # as if killed while the disk is full
chats.close()
print(n)
"""


def check_filled(path: Path, output: str, *, exact: bool) -> None:
    numbers = {key: [n for n, _ in chat] for key, chat in stored(path).items()}
    count = sum(map(len, numbers.values()))

    assert {key: list(range(key, count, 4)) for key in range(4)} == numbers
    assert (count == int(output)) if exact else (count >= int(output) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_file_that_may_not_grow_loses_nothing(path: Path, elsewhere: Any, killed: bool) -> None:
    """Everything is saved when it may grow again; and if the process ends before, what was acknowledged is there."""
    pytest.importorskip("resource")
    process = elsewhere(FILLER, path, 300_000, *["killed"] * killed)
    output, _ = process.communicate(timeout=PATIENCE)

    assert 0 == process.returncode
    check_filled(path, output, exact=not killed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a file system")
def test_a_file_system_that_is_full_loses_nothing(tmp_path: Path, elsewhere: Any) -> None:
    """A real one, of 2 MB, until somebody makes room."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", place], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a file system")
    try:
        process = elsewhere(FILLER, place / "chats.db", 0)
        output, _ = process.communicate(timeout=PATIENCE)

        assert 0 == process.returncode
        check_filled(place / "chats.db", output, exact=True)
    finally:
        subprocess.run(["umount", place], check=True)


# The file is locked, read-only, or not what it was.

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
connection.close()
"""


def test_a_file_that_another_process_has_locked_is_waited_out(path: Path, elsewhere: Any) -> None:
    """Reads go on, writes stay in memory, an acknowledgement is refused; afterwards all is saved by itself."""
    with SQLiteStore(path, timeout="20ms") as store:
        chats: Registry[int, list[int]] = Registry(maxsize=2, store=store, name="chats")
        for n in range(4):
            chats[n] = [n]
        holder = elsewhere(HOLDER, path)
        assert "held\n" == holder.stdout.readline()
        for n in range(4, 9):
            chats[n] = [n]
            chats[n].append(-n)

        assert ([0], [4, -4]) == (chats[0], chats[4])
        assert (True, False) == (1 in chats, 9 in chats)
        with pytest.raises(StoreUnavailable, match=r"another process holds it.*They stay pending"):
            chats.flush()
        assert len(chats) > 5

        holder.communicate("\n", timeout=PATIENCE)
        chats.flush(timeout=PATIENCE)

        assert within_bound(chats, 2)
        chats.close()
    assert {n: [n] if n < 4 else [n, -n] for n in range(9)} == stored(path)


READER = """
import os, sys, urllib.parse  # all modules now: who one becomes may not be allowed to read them
from hygiene import Registry, bounded_registry
from hygiene.errors import StoreUnavailable
from hygiene.stores import SQLiteStore

os.seteuid(65534)  # root may write wherever it likes
for name in ("new.db", "chats.db"):
    address = "sqlite:" + os.path.join(sys.argv[1], name)
    try:
        Registry({"b": 1}, maxsize=2, store=address, name="chats").flush()
    except StoreUnavailable as error:
        print(error)

    @bounded_registry("chats", store=address)
    class Bot:
        def __init__(self):
            self.chats = {}
    try:
        Bot().chats["b"] = 1
    except StoreUnavailable as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_written_to_is_said_at_once(tmp_path: Path, elsewhere: Any) -> None:
    """When the registry is made, not when the first message is lost; and nothing is touched."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with Registry({"a": 1}, maxsize=2, store=f"sqlite:{folder / 'chats.db'}", name="chats"):
        pass
    for above in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        above.chmod(0o755)
    folder.chmod(0o555)
    before = bytes_of(folder)
    process = elsewhere(READER, folder)
    output, _ = process.communicate(timeout=PATIENCE)
    lines = output.splitlines()

    assert (0, 4) == (process.returncode, len(lines)), output
    assert all("new.db" in line for line in lines[:2])
    assert all("chats.db" in line for line in lines[2:])
    assert before == bytes_of(folder)


def filled(path: Path) -> dict[Any, Any]:
    """A file with conversations and values; what is in it."""
    content: dict[Any, Any] = {f"user{n}": [f"message {i} of {n} " + "y" * 200 for i in range(20)] for n in range(20)}
    content |= {("settings", n): {"n": n, "text": "z" * 50} for n in range(20)}
    with Registry(content, maxsize=5, store=f"sqlite:{path}", name="chats"):
        pass
    return content


@pytest.mark.parametrize("length", [0, 1, 100, 2048, 10_000])
def test_a_truncated_file_is_an_error_and_left_as_it_is(path: Path, length: int) -> None:
    """A registry that began anew would be the loss of everything."""
    filled(path)
    os.truncate(path, length)
    before = path.read_bytes()

    with pytest.raises(StoreError, match=str(path)):
        Registry(maxsize=5, store=f"sqlite:{path}", name="chats")
    assert before == path.read_bytes()


def test_flipped_bits_cost_what_they_hit_and_nothing_else(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a conversation the damaged message; the rest is served and goes on, and the log says what happened."""
    expected = filled(path)
    damaged = path.read_bytes()
    place = damaged.index(b"message 7 of 3 ") + 12
    path.write_bytes(damaged[:place] + bytes([damaged[place] ^ 4]) + damaged[place + 1 :])

    chats: Registry[Any, Any] = Registry(maxsize=5, store=f"sqlite:{path}", name="chats")
    del expected["user3"][7]
    found = {key: copy.copy(chats[key]) for key in expected}
    chats["user3"].append("goes on")
    for key in expected:
        assert key in chats
        chats.get(key)  # user3 leaves
    back = chats["user3"]

    assert expected == found
    assert [*expected["user3"], "goes on"] == back
    assert "the checksum is wrong" in caplog.text

    chats.close()
    assert {**expected, "user3": back} == stored(path)


def test_a_damaged_head_is_a_missing_entry_that_can_be_written_anew(path: Path) -> None:
    """What is left of it is in quarantine; `setdefault` begins a new conversation beside it."""
    expected = filled(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("UPDATE heads SET state = zeroblob(30) WHERE key = x'a57573657235'")
    connection.close()

    with Registry[Any, Any](maxsize=5, store=f"sqlite:{path}", name="chats") as chats:
        assert "user5" not in chats
        assert chats.get("user5") is None
        chats.setdefault("user5", []).append("new")
    assert {**expected, "user5": ["new"]} == stored(path)
    with SQLiteStore(path) as store:
        assert 21 == len(list(store.quarantine()))


@pytest.mark.parametrize("what", ["item", "head"])
def test_damage_while_the_file_is_open_is_found_at_the_look_up(path: Path, what: str) -> None:
    """Of what is not in memory the whole part is served; what is in memory is not lost at all."""
    expected = filled(path)
    with SQLiteStore(path, check=False) as store:
        chats: Registry[Any, Any] = Registry(maxsize=1, store=store, name="chats")
        held = chats["user6"]
        statement = {
            "item": "UPDATE items SET data = zeroblob(9) WHERE id = (SELECT (id << 30) + 3 FROM heads WHERE key = ?)",
            "head": "UPDATE heads SET state = zeroblob(30) WHERE key = ?",
        }[what]
        connection = sqlite3.connect(path, isolation_level=None)
        for key in (b"\xa5user5", b"\xa5user6"):
            connection.execute(statement, (key,))
        connection.close()

        found = chats.get("user5")  # user6 leaves
        again = chats["user6"]

        assert ([m for n, m in enumerate(expected["user5"]) if n != 3] if what == "item" else None) == found
        assert held is again
        assert expected["user6"] == again
        chats.close()


@pytest.mark.slow
def test_no_flipped_bit_is_a_silent_loss(path: Path, tmp_path: Path) -> None:
    """At random places, one at a time: an error, or a report of what it hit; all else is as it was."""
    expected = filled(path)
    good = path.read_bytes()
    chance = random.Random(7)
    refused = hit = 0
    for n in range(40):
        place, bit = chance.randrange(len(good)), 1 << chance.randrange(8)
        copied = tmp_path / f"{n}.db"
        copied.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
        try:
            store = SQLiteStore(copied)
        except StoreError:
            refused += 1
            continue
        with store, Registry[Any, Any](maxsize=5, store=store, name="chats") as chats:
            wrong = [key for key, value in expected.items() if chats.get(key) != value]

            assert len(wrong) <= len(store.report.bad)  # not by name: it may have been the key that was hit
            hit += bool(wrong)

    assert (True, True) == (refused > 0, hit > 0)


# A value that cannot be stored.

REFUSALS: dict[str, Callable[[Registry[Any, Any]], object]] = {
    "put": lambda r: r.__setitem__("x", {"s": {1}}),
    "overwrite": lambda r: r.__setitem__("value", {"s": {1}}),
    "setdefault": lambda r: r.setdefault("x", {"s": {1}}),
    "setdefault of a list": lambda r: r.setdefault("x", [1, {1}]),
    "update": lambda r: r.update(x={1}),
    "or": lambda r: r.__ior__({"x": {1}}),
    "a factory": lambda r: r.lease("x", create=lambda: {1}).__enter__(),
    "append": lambda r: r["log"].append({1}),
    "extend": lambda r: r["log"].extend(["two", {1}]),
    "insert": lambda r: r["log"].insert(0, {1}),
    "edit": lambda r: r["log"].__setitem__(0, {1}),
    "slice": lambda r: r["log"].__setitem__(slice(0, 1), ["two", {1}]),
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_what_cannot_be_stored_is_refused_where_it_is_written(store: Gated, refused: str) -> None:
    """The error names key and type, and nothing has changed: not in memory, not in the store."""
    with Registry[Any, Any](maxsize=4, store=store, name="chats") as chats:
        chats["value"] = {"n": 1}
        chats["log"] = ["one"]
        key = {"append": "log", "extend": "log", "insert": "log", "edit": "log", "slice": "log", "overwrite": "value"}

        with pytest.raises(NotStorable, match=f"the value of '{key.get(refused, 'x')}'.*set"):
            REFUSALS[refused](chats)

        assert {"value": {"n": 1}, "log": ["one"]} == dict(chats)
        assert "x" not in chats
        chats.flush()
        assert {"value": {"n": 1}, "log": ["one"]} == dict(store.items("chats"))


def test_a_key_that_cannot_be_stored_is_refused(store: Gated) -> None:
    with Registry[Any, Any](maxsize=4, store=store, name="chats") as chats:
        for key in (frozenset({1}), "\ud800", 2**70, float("nan"), object()):
            with pytest.raises(NotStorable, match="a stored key must be"):
                chats[key] = 1

        assert {} == dict(chats)


def spoiled(store: Gated) -> Registry[Any, Any]:
    """A registry with a value that was changed in place into something that cannot be stored."""
    chats: Registry[Any, Any] = Registry(maxsize=2, store=store, name="chats")
    chats["a"] = {"n": 1}
    chats.flush()
    chats["a"]["s"] = {1}
    return chats


def test_an_entry_that_cannot_be_saved_does_not_leave(store: Gated, caplog: pytest.LogCaptureFixture) -> None:
    """The others do, within the bound; the log says once which it is and why."""
    with spoiled(store) as chats:
        for n in range(10):
            chats[n] = n

            assert 2 == len(chats)
        assert {"n": 1, "s": {1}} == dict.get(chats, "a")
        assert not chats.evict("a")
        chats.trim(0)
        relieve()
        assert ["a"] == list(chats)

        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert ["'a' cannot be saved, so it stays in memory: the value of 'a' must be plain data"] == [
            message.partition(" (")[0] for message in told
        ]
        assert "builtins.set" in told[0]

        del chats["a"]["s"]
        chats["b"], chats["c"] = 1, 2

        assert "a" not in list(chats)
        assert {"n": 1} == chats["a"]


def test_a_flush_names_what_cannot_be_saved_and_saves_the_rest(store: Gated) -> None:
    """It stays in memory until it can be, is overwritten, or removed."""
    with spoiled(store) as chats:
        chats["b"] = ["saved"]
        for _ in range(2):
            with pytest.raises(NotStorable, match=r"the value of 'a'.*builtins\.set"):
                chats.flush()

        assert {"n": 1, "s": {1}} == chats["a"]
        assert {"a": {"n": 1}, "b": ["saved"]} == dict(store.items("chats"))

        with pytest.raises(NotStorable, match=r"the value of 'a'.*builtins\.set"):
            chats.changed("a")
        chats["a"] = {"n": 2}
        chats.flush()
        assert {"a": {"n": 2}, "b": ["saved"]} == dict(store.items("chats"))


async def test_aflush_names_what_cannot_be_saved_too(store: Gated) -> None:
    chats = spoiled(store)
    chats["b"] = ["saved"]
    with pytest.raises(NotStorable, match=r"the value of 'a'.*builtins\.set"):
        await chats.aflush()
    assert ["saved"] == dict(store.items("chats"))["b"]
    with pytest.raises(NotStorable, match=r"the value of 'a'.*builtins\.set"):
        await chats.aclose()

    assert {"a": {"n": 1}, "b": ["saved"]} == dict(store.items("chats"))


def test_the_end_of_a_lease_names_what_cannot_be_saved(store: Gated) -> None:
    with Registry[Any, Any]({"a": {"n": 1}}, maxsize=2, store=store, name="chats") as chats:
        with pytest.raises(NotStorable, match=r"the value of 'a'.*builtins\.set"), chats.lease("a") as value:
            value["s"] = {1}

        assert {"n": 1, "s": {1}} == chats["a"]
        assert 0 == chats.stats().leased
        chats["a"] = 1


def test_an_error_in_a_lease_is_not_hidden_by_what_cannot_be_saved(store: Gated) -> None:
    """The block's own error goes on, and says on a note what else went wrong."""
    with Registry[Any, Any]({"a": {"n": 1}}, maxsize=2, store=store, name="chats") as chats:
        with pytest.raises(KeyError, match="the block's") as raised, chats.lease("a") as value:  # noqa: PT012 - both errors are of its end
            value["s"] = {1}
            raise KeyError("the block's")

        assert ["while the lease of 'a' ended"] == [note.partition(":")[0] for note in raised.value.__notes__]
        assert 0 == chats.stats().leased
        chats["a"] = 1


def test_close_names_what_cannot_be_saved_and_hands_it_to_the_hook(store: Gated) -> None:
    """All else is saved, and whoever listens gets the value; the store keeps its last good state."""
    gone: list[tuple[Any, Any]] = []
    chats: Registry[Any, Any] = Registry(
        maxsize=2, store=store, name="chats", on_evict=lambda removal: gone.append((removal.key, removal.value))
    )
    chats["a"], chats["b"] = {"n": 1}, ["saved"]
    chats.flush()
    chats["a"]["s"] = {1}
    chats["b"].append("at the end")
    with pytest.raises(NotStorable, match=r"the value of 'a'.*builtins\.set"):
        chats.close()
    chats.close()

    assert [("a", {"n": 1, "s": {1}}), ("b", ["saved", "at the end"])] == gone
    assert {"a": {"n": 1}, "b": ["saved", "at the end"]} == dict(store.items("chats"))


@pytest.mark.parametrize("how", ["put", "del", "pop", "clear"])
def test_what_the_store_refuses_can_be_replaced_and_removed(store: Gated, how: str) -> None:
    """Too large, and known only when it is saved: the error says so until something else takes its place."""
    store._most_bytes = 1000
    with Registry[Any, Any](maxsize=2, store=store, name="chats") as chats:
        chats["value"], chats["log"] = {"n": 1}, ["one"]
        chats.flush()
        chats["value"] = "x" * 2000
        chats["log"].append("y" * 2000)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"at most 1,000 bytes; found 2,00.*Put another value in its place"):
                chats.flush()
        chats["other"] = 1

        assert {"value": "x" * 2000, "log": ["one", "y" * 2000], "other": 1} == dict(chats)
        assert {"value": {"n": 1}, "log": ["one"]} == {
            key: value for key, value in store.items("chats") if key != "other"
        }

        if how == "put":
            chats["value"], chats["log"] = {"n": 2}, chats["log"][:1]
        elif how == "clear":
            chats.clear()
        else:
            for key in ("value", "log"):
                chats.pop(key) if how == "pop" else chats.__delitem__(key)
        chats.flush()

        kept = {"put": {"value": {"n": 2}, "log": ["one"], "other": 1}, "clear": {}}.get(how, {"other": 1})
        assert kept == dict(store.items("chats"))
        assert set(kept) == {key for key in ("value", "log", "other") if key in chats}


# Large values and strange keys.


@pytest.mark.slow
def test_a_value_of_100_mb_is_saved_and_comes_back(path: Path) -> None:
    """As a value and as one message of a conversation."""
    large = bytes(range(250)) * 400_000
    with Registry[Any, Any](maxsize=1, store=f"sqlite:{path}", name="chats") as chats:
        chats["value"] = large
        chats["log"] = ["small"]

        assert ["log"] == list(chats)

        chats["log"].append(large)
        chats["other"] = 1

        assert ["other"] == list(chats)
        assert ["small", large] == chats["log"]
    with Registry[Any, Any](maxsize=1, store=f"sqlite:{path}", name="chats") as chats:
        assert large == chats["value"]


def test_any_key_is_saved_and_comes_back_as_itself(path: Path) -> None:
    """NUL, quotes, newlines, a megabyte, tuples, bytes, numbers: none is taken for another."""
    with Registry[Any, Any](maxsize=2, store=f"sqlite:{path}", name="chats") as chats:
        for n, key in enumerate(KEYS):
            chats[key] = [n]
        for n, key in enumerate(KEYS):
            chats[key].append(-n)
    with Registry[Any, Any](maxsize=2, store=f"sqlite:{path}", name="chats") as chats:
        assert [[n, -n] for n in range(len(KEYS))] == [chats[key] for key in KEYS]
        assert sorted(map(repr, KEYS)) == sorted(map(repr, chats.stored()))
        for key in KEYS[::2]:
            del chats[key]
        assert [key in KEYS[1::2] for key in KEYS] == [key in chats for key in KEYS]
    assert {key: [n, -n] for n, key in enumerate(KEYS) if n % 2} == stored(path)


def test_keys_that_are_equal_are_one_key_in_the_store_too(path: Path) -> None:
    """As in a dict: 1, 1.0 and True."""
    with Registry[Any, Any]({1: "one"}, maxsize=1, store=f"sqlite:{path}", name="chats") as chats:
        chats["other"] = 1

        assert ("one", True, "one") == (chats[True], 1.0 in chats, chats.setdefault(1.0, "another"))


# Two registries on one file.


def test_two_registries_on_one_file_keep_a_space_each(path: Path) -> None:
    """The same keys, and one does not see the other's; the file stays open until both are closed."""
    one = Registry[str, Any](maxsize=1, store=f"sqlite:{path}", name="chats")
    other = Registry[str, Any](maxsize=1, store=f"sqlite:{path.parent}/./{path.name}", name="settings")
    for n in range(5):
        one.setdefault(f"user{n}", []).append(n)
        other[f"user{n}"] = {"n": n}
    one["user0"].append("more")
    one.clear()
    one["user1"] = ["again"]
    one.close()

    assert [{"n": n} for n in range(5)] == [other[f"user{n}"] for n in range(5)]

    other.close()
    assert {"user1": ["again"]} == stored(path, "chats")
    assert {f"user{n}": {"n": n} for n in range(5)} == stored(path, "settings")


def test_one_space_is_for_one_registry_at_a_time(path: Path) -> None:
    """The error names the space, the file and who keeps it; that one goes on, and when it is closed another may."""
    one = Registry[str, Any](maxsize=1, store=f"sqlite:{path}", name="chats")
    one["a"] = ["one"]

    with pytest.raises(StoreError, match=r"wanted the space 'chats' of .*chats\.db for one registry.*close\(\) that"):
        Registry(maxsize=1, store=f"sqlite:{path}", name="chats")

    one["a"].append("two")
    one.close()
    with Registry[str, Any](maxsize=1, store=f"sqlite:{path}", name="chats") as other:
        assert ["one", "two"] == other["a"]


# The store hangs.


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go round until *condition* holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0)


@contextlib.contextmanager
def released_if_stuck(store: Gated) -> Iterator[None]:
    """A block that must not wait for the store, which hangs: if it does, that is a failure, and no hang."""
    stuck: list[str] = []

    def release() -> None:
        stuck.append("something waited for the store")
        store.gate.set()

    watch = threading.Timer(PATIENCE / 2, release)
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        watch.join()
    assert [] == stuck


async def test_no_use_of_a_registry_blocks_the_loop_while_a_save_hangs(store: Gated) -> None:
    """
    Every look-up and every change returns while the store has not; what is to leave waits, and leaves afterwards.

    Those that say that they wait are for a thread, or have a twin: `flush`, `close`, `clear`, a critical item.
    """
    chats: Registry[Any, Any] = Registry(maxsize=2, store=store, name="chats")
    chats["stored"], chats["value"] = ["one"], {"n": 1}
    chats["gone"] = ["x"]
    await chats.aflush()
    await until(lambda: len(chats) <= 2)
    chats["hangs"] = [1]
    del chats["gone"]
    store.hang()
    flushing = asyncio.create_task(chats.aflush())
    await until(lambda: store.begun.acquire(blocking=False))

    with released_if_stuck(store):
        chats["hangs"].append(2)
        chats["new"] = [1]
        assert ["one"] == chats["stored"]
        assert {"n": 1} == chats.peek("value")
        assert ("value" in chats, "gone" in chats, "never" in chats) == (True, False, False)
        assert chats.get("gone") is None
        assert [] == chats.setdefault("gone", [])
        assert [1] == chats.pop("new")
        assert "new" not in chats
        assert [2] == chats.setdefault("new", [2])
        assert [1, 2] == chats.pop("hangs")  # while it is being saved
        assert chats.get("hangs") is None
        assert chats.peek("hangs") is None
        chats.setdefault("hangs", []).append(3)
        assert not chats.evict("hangs")
        chats.trim(0)
        chats.changed("hangs")
        chats.update(a=1, b=2)
        del chats["a"]
        assert "b" == chats.popitem()[0]
        chats.expire()
        assert {"stored", "value", "gone", "hangs", "new"} == set(chats.stored())
        async with chats.lease("value") as value:
            value["n"] += 1
        async with chats.lease("made", create=lambda: ["made"]) as made:
            made.append("more")
        assert len(chats) == chats.stats().entries
    assert not flushing.done()
    assert len(chats) > 2

    store.gate.set()
    await flushing
    await chats.aflush()
    await until(lambda: len(chats) <= 2)
    await chats.aclose()

    assert {
        "stored": ["one"],
        "value": {"n": 2},
        "gone": [],
        "new": [2],
        "hangs": [3],
        "made": ["made", "more"],
    } == dict(store.items("chats"))


async def test_the_loop_goes_on_while_evictions_wait(store: Gated) -> None:
    """Nothing leaves unsaved, nothing waits, and when the save is done all that is too much leaves by itself."""
    chats: Registry[int, list[int]] = Registry(maxsize=3, store=store, name="chats")
    store.hang()
    for n in range(40):
        chats.setdefault(n, []).append(n)
        await asyncio.sleep(0)
    await until(lambda: store.begun.acquire(blocking=False))

    assert 40 == len(chats)
    assert {} == dict(store.items("chats"))

    store.gate.set()
    await chats.aflush()
    await until(lambda: len(chats) <= 3)

    assert {n: [n] for n in range(40)} == dict(store.items("chats"))
    assert [[n] for n in range(40)] == [chats[n] for n in range(40)]
    await chats.aclose()


def test_a_save_that_hangs_holds_up_only_who_waits_for_it(store: Gated) -> None:
    """One thread waits to evict; the others read and write, over the bound until the save is done."""
    chats: Registry[Any, Any] = Registry(maxsize=1, store=store, name="chats")
    chats["stored"], chats["a"] = ["one"], []
    chats["a"].append(1)
    store.hang()
    waiting = threading.Thread(target=lambda: chats.__setitem__("b", [2]))
    waiting.start()
    assert store.begun.acquire(timeout=PATIENCE)

    with released_if_stuck(store):
        chats["a"].append(2)
        chats.setdefault("c", []).append(3)
        assert ["one"] == chats["stored"]
        assert [2] == chats.pop("b")
        assert "b" not in chats
        assert len(chats) > 1
    assert waiting.is_alive()

    store.gate.set()
    waiting.join(PATIENCE)
    chats.flush()

    assert within_bound(chats, 1)
    assert {"stored": ["one"], "a": [1, 2], "c": [3]} == dict(store.items("chats"))
    chats.close()


def test_an_outage_is_over_by_itself(store: Gated) -> None:
    """Nothing leaves, nothing is lost, and the first save that succeeds lets everything go that has to."""
    chats: Registry[int, list[int]] = Registry(maxsize=2, store=store, name="chats")
    store.error = StoreUnavailable("the file system failed")
    for n in range(10):
        chats[n] = [n]

    assert 10 == len(chats)
    with pytest.raises(StoreUnavailable, match="the file system failed"):
        chats.flush()

    store.error = None
    chats.flush(timeout=PATIENCE)

    assert within_bound(chats, 2)
    assert [[n] for n in range(10)] == [chats[n] for n in range(10)]
    chats.close()


def test_a_close_during_an_outage_says_so_and_can_be_repeated(store: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pending stays pending; the second `close` saves it."""
    chats: Registry[str, list[int]] = Registry(maxsize=2, store=store, name="chats")
    chats["a"] = [1]
    store.error = StoreUnavailable("the file system failed")
    with monkeypatch.context() as patch:  # for this close alone: the one that shall succeed may take its time
        patch.setattr("hygiene.keeping.GRACE", 0.05)
        with pytest.raises(StoreUnavailable, match="the file system failed"):
            chats.close()
    assert {} == dict(store.items("chats"))

    store.error = None
    chats.close()

    assert {"a": [1]} == dict(store.items("chats"))
