"""What every store does; today that is SQLite, in a file and in memory."""

from __future__ import annotations

import gc
import pickle
import sqlite3
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from hygiene.errors import NotStorable, StoreError, StoreUnavailable, VersionConflict
from hygiene.stores import Delete, Head, Record, SaveLog, SaveValue, SQLiteStore, Store, open_store
from hygiene.stores.sqlite import _HEADS_OF
from hygiene.testing import ManualClock

PATIENCE = 20.0


def value_of(store: Store, space: str, key: Any) -> Any:
    record = store.load(space, key)
    return None if record is None else record.value


def put(store: Store, key: Any, value: Any, base: int | None = None, **more: Any) -> Head:
    (head,) = store.save([SaveValue("s", key, store.encode(value), base, **more)])
    assert head is not None
    return head


def append(store: Store, key: Any, *items: Any, base: int | None = None, **more: Any) -> Head:
    (head,) = store.save([SaveLog("s", key, base, [store.encode(item) for item in items], **more)])
    assert head is not None
    return head


def test_it_is_what_the_protocol_says(store: SQLiteStore) -> None:
    assert isinstance(store, Store)


def test_a_value_is_saved_whole_and_comes_back(store: SQLiteStore, clock: ManualClock) -> None:
    clock.advance(100)
    head = put(store, "a", {"n": [1, 2]})

    assert Head("s", "a", "value", 1, len(store.encode({"n": [1, 2]})), clock(), None) == head
    assert Record(head, {"n": [1, 2]}) == store.load("s", "a")
    assert 1 == head.count
    assert [0] == list(head.sequences)


def test_a_log_grows_by_rows_and_comes_back_as_a_list(store: SQLiteStore) -> None:
    """Appended items get the next sequence numbers; an empty log is an entry, too."""
    first = append(store, "a")
    second = append(store, "a", "x", "y", base=1)
    third = append(store, "a", {"n": 1}, base=2)

    assert [[], [0, 1], [0, 1, 2]] == [list(head.sequences) for head in (first, second, third)]
    assert (third.version, third.next, third.count, "log") == (3, 3, 3, third.kind)
    assert ["x", "y", {"n": 1}] == value_of(store, "s", "a")
    assert sum(len(store.encode(item)) for item in ["x", "y", {"n": 1}]) == third.bytes == store.nbytes("s")


def test_what_leaves_a_log_leaves_a_hole(store: SQLiteStore) -> None:
    """The others keep their numbers; a summary goes into a hole, an edited item in the place of the old one."""
    append(store, "a", *range(6))
    dropped = append(store, "a", drop=[(1, 4)])

    assert ((0, 1), (4, 6)) == dropped.spans
    assert [0, 4, 5] == value_of(store, "s", "a")

    changed = append(store, "a", 6, put={3: store.encode("summary"), 5: store.encode("edited")})

    assert ((0, 1), (3, 7)) == changed.spans
    assert [0, "summary", 4, "edited", 6] == value_of(store, "s", "a")
    assert sum(len(store.encode(item)) for item in [0, "summary", 4, "edited", 6]) == changed.bytes


def test_a_log_is_replaced_and_counts_from_0_again(store: SQLiteStore) -> None:
    append(store, "a", *range(3))
    head = append(store, "a", "new", replace=True)

    assert (((0, 1),), 1, 2) == (head.spans, head.next, head.version)
    assert ["new"] == value_of(store, "s", "a")


def test_dropping_what_is_not_there_changes_nothing_else(store: SQLiteStore) -> None:
    append(store, "a", 0, 1)
    head = append(store, "a", drop=[(-5, 1), (0, 1), (2, 99), (1, 1)])

    assert ((1, 2),) == head.spans
    assert [1] == value_of(store, "s", "a")


def test_all_may_be_dropped(store: SQLiteStore) -> None:
    append(store, "a", 0, 1)
    head = append(store, "a", drop=[(0, 2)])

    assert ((), 0, 0, 2) == (head.spans, head.count, head.bytes, head.next)
    assert [] == value_of(store, "s", "a")
    assert store.contains("s", "a")
    assert store.recover().clean


@pytest.mark.parametrize("sequence", [-1, 2, 99])
def test_nothing_can_be_put_behind_the_end(store: SQLiteStore, sequence: int) -> None:
    append(store, "a", 0, 1)
    with pytest.raises(ValueError, match=rf"put at 0 to 1; found {sequence}\. Append it"):
        append(store, "a", put={sequence: store.encode(0)})

    assert [0, 1] == value_of(store, "s", "a")


def test_a_value_takes_the_place_of_a_log_and_a_log_that_of_a_value_if_asked(store: SQLiteStore) -> None:
    append(store, "a", 1, 2)
    put(store, "a", "value")
    assert value_of(store, "s", "a") == "value"
    with pytest.raises(ValueError, match=r"found a value\. Save it with replace=True"):
        append(store, "a", 1)
    append(store, "a", 1, replace=True)

    assert [1] == value_of(store, "s", "a")
    assert store.recover().clean


def test_each_save_names_the_version_that_it_builds_on(store: SQLiteStore) -> None:
    """An update that somebody else has not seen is never overwritten: not a lost one, but an error."""
    assert 1 == put(store, "a", 1, base=0).version
    assert 2 == put(store, "a", 2, base=1).version
    with pytest.raises(VersionConflict, match="version 1 of 'a' in 's' was to be replaced; found version 2"):
        put(store, "a", 3, base=1)
    with pytest.raises(VersionConflict, match="version 0 of 'a'"):
        put(store, "a", 3, base=0)
    with pytest.raises(VersionConflict, match="found version 0"):
        store.save([Delete("s", "b", base=1)])

    assert 2 == value_of(store, "s", "a")
    assert 3 == put(store, "a", 3).version


def test_a_conflict_names_all_that_conflict_and_nothing_of_the_batch_is_saved(store: SQLiteStore) -> None:
    for key in "abc":
        put(store, key, 0)
    changes = [SaveValue("s", key, store.encode(1), base) for key, base in {"a": 1, "b": 5, "c": 0, "d": 0}.items()]
    with pytest.raises(VersionConflict, match="and 1 more") as caught:
        store.save(changes)

    assert (("s", "b", 5, 1), ("s", "c", 0, 1)) == caught.value.conflicts
    assert tuple(("s", key) for key in "abcd") == caught.value.unsaved
    assert [0, 0, 0, None] == [value_of(store, "s", key) for key in "abcd"]
    assert "VersionConflict" == type(pickle.loads(pickle.dumps(caught.value))).__name__


def test_a_batch_may_name_a_key_twice(store: SQLiteStore) -> None:
    heads = store.save(
        [
            SaveLog("s", "a", 0, [store.encode(1)]),
            SaveLog("s", "a", 1, [store.encode(2)]),
            Delete("s", "a", 2),
            SaveValue("s", "a", store.encode("new"), 0),
        ]
    )

    assert [1, 2, None, 3] == [head and head.version for head in heads]
    assert value_of(store, "s", "a") == "new"


def test_an_old_version_never_fits_again(store: SQLiteStore) -> None:
    """Who has not noticed that a key was deleted and came back cannot overwrite the new one."""
    put(store, "a", 1)
    put(store, "a", 2)
    store.save([Delete("s", "a")])
    put(store, "a", 3, base=0)
    with pytest.raises(VersionConflict):
        put(store, "a", 4, base=1)

    assert 3 == value_of(store, "s", "a")


def test_deleting_what_is_not_there_does_nothing(store: SQLiteStore) -> None:
    assert [None, None] == store.save([Delete("s", "a"), Delete("s", "b", base=0)])
    assert 0 == store.count("s")


def test_spaces_do_not_see_each_other(store: SQLiteStore) -> None:
    put(store, "a", 1)
    store.save([SaveValue("other", "a", store.encode(2), 0)])

    assert (1, 2) == (value_of(store, "s", "a"), value_of(store, "other", "a"))
    assert ["other", "s"] == store.spaces()
    assert (1, 1, 0) == (store.count("s"), store.count("other"), store.count("none"))
    store.save([Delete("other", "a")])
    assert 1 == value_of(store, "s", "a")
    assert ["s"] == store.spaces()


def test_iteration_goes_over_everything_and_holds_nothing_meanwhile(store: SQLiteStore) -> None:
    """A loop over thousands of entries may save and delete, and so may others."""
    store.save([SaveLog("s", n, 0, [store.encode(n)] * (n % 3)) for n in range(600)])
    seen = []
    for key, value in store.items("s"):
        seen.append(key)
        assert [key] * (key % 3) == value
        store.save([Delete("s", key), SaveValue("t", key, store.encode(key))])

    assert list(range(600)) == seen
    assert (0, 600) == (store.count("s"), store.count("t"))
    assert list(range(600)) == list(store.keys("t"))
    assert [("t", n, "value") for n in range(600)] == [(head.space, head.key, head.kind) for head in store.heads("t")]


def test_listing_keys_takes_work_in_proportion_to_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and heads are listed from one to the next: four times as many take about four times the work."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.set_progress_handler(count, 50)
        return connection

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    work = {}
    with SQLiteStore(path, check=False) as store:
        for space, number in (("few", 600), ("many", 2400)):
            store.save([SaveLog(space, f"user {n}") for n in range(number)])
            steps = 0
            listed = list(store.keys(space))
            work[space] = steps

            assert {f"user {n}" for n in range(number)} == set(listed)
            assert number == len(listed)
    assert 0 < work["few"]
    assert work["many"] < 6 * work["few"]


def test_a_slice_of_keys_is_read_from_the_index_without_sorting(path: Path) -> None:
    """Each slice begins in the index where the one before it ended."""
    with SQLiteStore(path) as store:
        store.save([SaveLog("s", n) for n in range(1000)])
        explain = "EXPLAIN QUERY PLAN " + _HEADS_OF
        plan = [row[3] for row in store._read(lambda c: c.execute(explain, (b"s", b"", 0.0, 256)).fetchall())]

    assert ["SEARCH heads USING INDEX heads_by_key (space=? AND key>?)"] == plan


def test_what_is_deleted_during_a_loop_is_left_out(store: SQLiteStore) -> None:
    for key in "ab":
        put(store, key, key)
    found = store.items("s")
    assert ("a", "a") == next(found)
    store.save([Delete("s", "b")])

    assert [] == list(found)


def test_what_is_over_is_absent_everywhere(store: SQLiteStore, clock: ManualClock) -> None:
    """Also before it is deleted; and its key begins anew."""
    put(store, "a", 1, expire_at=clock() + 10)
    put(store, "b", 2)
    clock.advance(9.999)
    assert store.contains("s", "a")
    clock.advance(0.001)

    assert store.load("s", "a") is None
    assert not store.contains("s", "a")
    assert (["b"], ["b"], 1) == (list(store.keys("s")), [key for key, _ in store.items("s")], store.count("s"))
    assert ["b"] == [head.key for head in store.heads("s")]
    assert len(store.encode(2)) == store.nbytes("s")
    with pytest.raises(VersionConflict, match="found version 0"):
        put(store, "a", 2, base=1)
    assert 2 == put(store, "a", 2, base=0).version


def test_each_save_sets_the_end_anew(store: SQLiteStore, clock: ManualClock) -> None:
    append(store, "a", 1, expire_at=clock() + 10)
    clock.advance(5)
    append(store, "a", 2, base=1, expire_at=clock() + 10)
    clock.advance(6)
    assert [1, 2] == value_of(store, "s", "a")
    append(store, "a", 3)
    clock.advance(1000)

    assert [1, 2, 3] == value_of(store, "s", "a")


def test_expire_gives_the_room_back_however_many_there_are(store: SQLiteStore, clock: ManualClock) -> None:
    ends = [SaveLog("s", n, 0, [store.encode(n)], expire_at=clock() + n) for n in range(600)]
    store.save(ends)
    clock.advance(549)

    assert 550 == store.expire()
    assert 0 == store.expire()
    assert 50 == store.count("s") == store.recover().entries == store.recover().items
    assert 10 == store.expire(now=clock() + 10)


def test_an_empty_batch_is_nothing_and_may_sync(store: SQLiteStore) -> None:
    put(store, "a", 1)

    assert [] == store.save([])
    assert [] == store.save([], sync=True)
    assert 1 == value_of(store, "s", "a")
    assert 2 == put(store, "a", 2, base=1).version


@pytest.mark.parametrize("key", ["\0'\"\n;--", "k" * 1_000_000, b"\xff\0", (), ("a", ("b", 1)), None, -7, 2.5])
def test_odd_keys_are_ordinary(store: SQLiteStore, key: Any) -> None:
    append(store, key, "x")
    store.save([SaveValue("sp\0ace'\n", key, store.encode(1))])

    assert ["x"] == value_of(store, "s", key)
    assert [key] == list(store.keys("s")) == list(store.keys("sp\0ace'\n"))
    assert store.contains("s", key)
    assert store.recover().clean


def test_a_key_that_cannot_be_stored_is_refused_by_name(store: SQLiteStore) -> None:
    for use in (store.load, store.contains):
        with pytest.raises(NotStorable, match=r"builtins\.object"):
            use("s", object())
    with pytest.raises(NotStorable, match=r"in \('a', b'', frozenset\(\)\)"):
        put(store, ("a", b"", frozenset()), 1)


@pytest.mark.slow
def test_a_value_of_100_mb_is_ordinary(path: Path) -> None:
    large = b"\0\xff" * 50_000_000
    with SQLiteStore(path) as store:
        append(store, "a", "small", large)

        assert ["small", large] == value_of(store, "s", "a")
        assert store.nbytes("s") > 100_000_000
        store.save([Delete("s", "a")])
        assert store.recover().clean


def test_a_value_that_is_too_large_is_refused_by_name(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite takes a gigabyte; the limit is lowered here so that the test does not need one."""
    monkeypatch.setattr(store, "_most_bytes", 100)
    with pytest.raises(NotStorable, match=r"'a' in 's' must have at most 100 bytes; found 206"):
        append(store, "a", "x", b"x" * 199)

    assert store.load("s", "a") is None


def test_a_log_has_an_end(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a billion items; lowered here."""
    monkeypatch.setattr("hygiene.stores.sqlite._MOST", 4)
    append(store, "a", 0, 1, 2)
    with pytest.raises(ValueError, match="room for 4 appended items"):
        append(store, "a", 3)
    append(store, "a", 3, replace=True)

    assert [3] == value_of(store, "s", "a")


def test_after_the_end_everything_is_refused(store: SQLiteStore) -> None:
    store.close()
    store.close()
    for use in (
        lambda: store.load("s", 1),
        lambda: put(store, 1, 1),
        lambda: store.save([], sync=True),
        lambda: list(store.keys("s")),
        store.recover,
        store.spaces,
    ):
        with pytest.raises(StoreError, match=r"is closed\. Open it again"):
            use()
    assert store.closed
    assert repr(store).endswith("closed>")


def test_readers_and_a_writer_do_not_disturb_each_other(store: SQLiteStore) -> None:
    """Whoever loads sees one moment: as many items as the head says, never half a batch."""
    append(store, "a")
    stop, problems = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            record = store.load("s", "a")
            if record is None or len(record.value) % 10 or record.value != list(range(len(record.value))):
                problems.append(record)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in range(30):
        append(store, "a", *range(n * 10, n * 10 + 10), base=n + 1)
    stop.set()
    for reader in readers:
        reader.join(PATIENCE)

    assert [] == problems
    assert list(range(300)) == value_of(store, "s", "a")


def test_threads_that_write_the_same_entry_lose_nothing(store: SQLiteStore) -> None:
    """Each builds on what it has loaded, and loads again when somebody was faster."""
    put(store, "n", 0)

    def count() -> None:
        for _ in range(25):
            while True:
                record = store.load("s", "n")
                assert record is not None
                try:
                    put(store, "n", record.value + 1, base=record.head.version)
                except VersionConflict:
                    continue
                break

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert 100 == value_of(store, "s", "n")


def test_it_is_all_there_after_it_was_closed(path: Path, clock: ManualClock) -> None:
    with SQLiteStore(path, timer=clock) as store:
        append(store, "a", 1, 2)
        append(store, "a", 3, drop=[(0, 1)], expire_at=clock() + 10)
        before = store.load("s", "a")
    with SQLiteStore(path, timer=clock) as store:
        assert before == store.load("s", "a")
        assert store.report.clean
        report = store.recover()
        assert (1, 2, True) == (report.entries, report.items, report.clean)
    assert [path] == list(path.parent.iterdir())


def test_threads_that_are_gone_leave_no_connections(path: Path) -> None:
    """There are as many as have read at the same instant, not as many as have ever read."""
    with SQLiteStore(path) as store:
        for _ in range(20):
            thread = threading.Thread(target=store.load, args=("s", "a"))
            thread.start()
            thread.join(PATIENCE)

        assert 1 == len(store._readers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
def test_who_forgets_to_close_it_is_told(path: Path) -> None:
    stores = [SQLiteStore(path)]
    with pytest.warns(ResourceWarning, match="was never closed"):
        stores.clear()
    gc.collect()  # the connections, which are held by the warning until here


def test_a_store_that_could_not_be_opened_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StoreUnavailable, match="no-such-folder"):
            SQLiteStore(tmp_path / "no-such-folder" / "chats.db")
        gc.collect()


class TestOpenStore:
    """`open_store` by address."""

    def test_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Relative, absolute, from the home folder, and with characters that mean something in a URL."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for place in ("a.db", f"{tmp_path}/b.db", "~/c.db", "d 100%?mode=ro#x.db"):
            with open_store(f"sqlite:{place}") as store:
                put(store, "a", place)
        found = sorted(path.name for path in tmp_path.iterdir())

        assert ["a.db", "b.db", "c.db", "d 100%?mode=ro#x.db"] == found

    def test_a_relative_path_stays_where_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that changes its folder afterwards goes on with the same file."""
        monkeypatch.chdir(tmp_path)
        with open_store("sqlite:a.db") as store:
            (tmp_path / "else").mkdir()
            monkeypatch.chdir(tmp_path / "else")
            put(store, "a", 1)
            assert value_of(store, "s", "a") == 1

        assert [] == list((tmp_path / "else").iterdir())

    def test_memory(self) -> None:
        with open_store("sqlite::memory:") as store:
            put(store, "a", 1)
            assert value_of(store, "s", "a") == 1
        with open_store("sqlite::memory:") as store:
            assert store.load("s", "a") is None

    @pytest.mark.parametrize(
        ("address", "what"),
        [
            ("chats.db", "Known: sqlite:PATH, sqlite::memory:"),
            ("mysql:chats", "such as sqlite:chats.db; found 'mysql:chats'"),
            ("sqlite", "Known: sqlite:PATH"),
            ("sqlite:", "a path is wanted"),
            ("sqlite:///chats.db", "Write sqlite:chats.db, or sqlite:/chats.db"),
            ("sqlite:a\0b", "without a NUL"),
        ],
    )
    def test_mistakes(self, address: str, what: str) -> None:
        with pytest.raises(ValueError, match=what):
            open_store(address)

    @pytest.mark.parametrize(
        ("address", "module", "extra"),
        [
            ("redis://localhost/0", "redis", r"hygiene\[redis\]"),
            ("postgresql://localhost/chats", "postgres", r"hygiene\[postgres\]"),
        ],
    )
    def test_a_client_that_is_missing_is_named(
        self, address: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, f"hygiene.stores.{module}", None)
        with pytest.raises(ValueError, match=f"needs the extra {extra}; install it"):
            open_store(address)

    def test_pickle_has_to_be_named_each_time(self, path: Path) -> None:
        """A file of pickles runs code in whoever opens it, so it is not opened by chance."""
        with open_store(f"sqlite:{path}", codec="pickle") as store:
            put(store, "a", {"t": (1, {2})})
        with pytest.raises(StoreError, match="found one with 'pickle'"):
            open_store(f"sqlite:{path}")
        with open_store(f"sqlite:{path}", codec="pickle") as store:
            assert {"t": (1, {2})} == value_of(store, "s", "a")
        with pytest.raises(ValueError, match="codec must be"):
            open_store(f"sqlite:{path}", codec="json")
