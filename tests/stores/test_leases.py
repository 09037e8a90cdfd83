"""Leases of a file: one store has an entry, and a late save of another one is refused."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene.errors import OwnershipLost, StoreError
from hygiene.stores import Delete, SaveValue, SQLiteStore
from hygiene.stores.owners import SUPPORTED, Owners

PATIENCE = 20.0
needs_locks = pytest.mark.skipif(not SUPPORTED, reason="needs locks of the open file, which Linux has")

HOLDER = """
import sys
from hygiene.stores import SaveValue, SQLiteStore

store = SQLiteStore(sys.argv[1])
token = store.lease("s", "a", ttl=float(sys.argv[2]))
print(token, flush=True)
for line in sys.stdin:
    try:
        store.save([SaveValue("s", "a", store.encode(line))], fence={("s", "a"): token})
        print("saved", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture
def both(path: Path) -> Iterator[tuple[SQLiteStore, SQLiteStore]]:
    """Two stores on one file."""
    with SQLiteStore(path) as one, SQLiteStore(path) as other:
        yield one, other


def change(store: SQLiteStore, value: Any, base: int | None = None, key: Any = "a") -> SaveValue:
    return SaveValue("s", key, store.encode(value), base)


def value_of(store: SQLiteStore, key: Any = "a") -> Any:
    record = store.load("s", key)
    return None if record is None else record.value


@needs_locks
def test_one_store_has_the_lease_and_each_token_is_greater(both: tuple[SQLiteStore, SQLiteStore]) -> None:
    """Also of two stores in one process; other entries are not affected."""
    one, other = both
    first = one.lease("s", "a")
    assert first is not None
    assert one.lease("s", "a") is other.lease("s", "a") is None
    assert other.lease("s", "b") is not None
    assert other.lease("another space", "a") is not None
    assert one.release("s", "a", first)
    assert not one.release("s", "a", first)
    assert other.lease("s", "a") is not None
    assert one.lease("s", "a") is None


def test_tokens_of_one_store_grow(store: SQLiteStore) -> None:
    """In a file and in memory, where a lease excludes callers of the same store only."""
    first = store.lease("s", "a")
    assert first is not None
    assert store.lease("s", "a") is None
    store.renew("s", "a", first, ttl="1m")
    assert store.release("s", "a", first)
    second = store.lease("s", "a")

    assert second is not None
    assert first < second
    with pytest.raises(OwnershipLost, match="the lease of 'a' in 's' has ended"):
        store.renew("s", "a", first)
    with pytest.raises(OwnershipLost):
        store.save([change(store, 1)], fence={("s", "a"): first})
    store.save([change(store, 2)], fence={("s", "a"): second})
    assert 2 == value_of(store)


def test_a_lease_costs_no_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to take it, nor to renew it, nor to give it back; the first lease of an entry included."""
    said: list[str] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.set_trace_callback(said.append)
        return connection

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    with SQLiteStore(path) as store:
        said.clear()
        for key in range(20):
            token = store.lease("s", key)
            assert token is not None
            store.renew("s", key, token)
            assert store.release("s", key, token)

    assert [] == [statement for statement in said if "BEGIN" in statement or "INSERT INTO" in statement]


@needs_locks
def test_a_lost_lease_refuses_the_whole_batch_and_names_it(both: tuple[SQLiteStore, SQLiteStore]) -> None:
    """Also if the version would not fit either: what the process has to know is that its lease is over."""
    one, other = both
    tokens = {("s", key): one.lease("s", key) or 0 for key in "ab"}
    assert one.release("s", "b", tokens["s", "b"])
    token = other.lease("s", "b")
    assert token is not None
    other.save([change(other, "new", 0, "b")], fence={("s", "b"): token})
    for late in (change(one, 1, 0, "b"), Delete("s", "b")):
        with pytest.raises(OwnershipLost, match="the lease of 'b' in 's'"):
            one.save([change(one, 1), late], fence=tokens)

    assert (None, "new") == (value_of(one), value_of(one, "b"))


@needs_locks
def test_a_lease_that_is_not_renewed_is_taken_over_and_its_late_save_refused(
    both: tuple[SQLiteStore, SQLiteStore],
) -> None:
    """Its store may still believe that it has it, as a process does that was stopped for longer than the term."""
    one, other = both
    old = one.lease("s", "a", ttl=0.001)
    assert old is not None
    while (new := other.lease("s", "a")) is None:
        os.sched_yield()
    other.save([change(other, "new", 0)], fence={("s", "a"): new})

    with pytest.raises(OwnershipLost, match="has ended, or another process has taken it"):
        one.save([change(one, "old", 1)], fence={("s", "a"): old})
    with pytest.raises(OwnershipLost):
        one.renew("s", "a", old)
    assert not one.release("s", "a", old)
    assert one.lease("s", "a") is None  # the lock of the old lease does not count
    assert "new" == value_of(one)


@needs_locks
def test_a_lease_that_is_renewed_is_not_taken_over(both: tuple[SQLiteStore, SQLiteStore]) -> None:
    one, other = both
    token = one.lease("s", "a", ttl=0.001)
    assert token is not None
    one.renew("s", "a", token, ttl=60)
    deadline = time.monotonic() + 0.01
    while time.monotonic() < deadline:
        assert other.lease("s", "a") is None
    one.save([change(one, 1)], fence={("s", "a"): token})


@needs_locks
def test_two_entries_that_share_a_slot_keep_their_terms(
    both: tuple[SQLiteStore, SQLiteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the one is not taken for the end of the other: then the term counts from the first question."""
    monkeypatch.setattr("hygiene.stores.owners._SLOTS", 1)
    one, other = both
    assert one.lease("s", "long", ttl=60) is not None
    assert one.lease("s", "short", ttl=0.001) is not None
    while other.lease("s", "short") is None:
        os.sched_yield()
    assert other.lease("s", "long") is None
    monkeypatch.setattr("hygiene.stores.sqlite._TERM", 0.0)
    assert other.lease("s", "long") is not None


@needs_locks
@pytest.mark.slow
def test_the_lease_of_a_process_that_was_killed_is_free_at_once(path: Path, elsewhere: Callable[..., Any]) -> None:
    """The kernel has dropped its lock, long before the term is over."""
    holder = elsewhere(HOLDER, path, 3600)
    assert holder.stdout.readline().strip().isdigit()
    with SQLiteStore(path) as store:
        assert store.lease("s", "a") is None
        holder.kill()
        holder.wait(PATIENCE)
        assert store.lease("s", "a") is not None


@needs_locks
@pytest.mark.slow
def test_a_process_that_was_stopped_for_longer_than_its_term_is_refused(
    path: Path, elsewhere: Callable[..., Any]
) -> None:
    holder = elsewhere(HOLDER, path, 0.5)
    assert holder.stdout.readline().strip().isdigit()
    holder.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + PATIENCE
    with SQLiteStore(path) as store:
        while (token := store.lease("s", "a")) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        store.save([change(store, "new", 0)], fence={("s", "a"): token})
        holder.send_signal(signal.SIGCONT)
        holder.stdin.write("late\n")
        holder.stdin.flush()

        assert "OwnershipLost" == holder.stdout.readline().strip()
        assert "new" == value_of(store)


@needs_locks
def test_a_forked_child_has_none_of_its_parents_leases(
    path: Path, in_child: Callable[[Callable[[], object]], int]
) -> None:
    """Neither does it give them back when it ends."""
    with SQLiteStore(path) as store:
        token = store.lease("s", "a")
        assert token is not None

        def look() -> None:
            assert store.lease("s", "a") is None
            with pytest.raises(OwnershipLost):
                store.save([change(store, "child")], fence={("s", "a"): token})
            assert not store.release("s", "a", token)
            assert store.lease("s", "b") is not None
            assert store.shared
            store.close()

        assert 0 == in_child(look)
        assert not store.shared
        store.save([change(store, "parent")], fence={("s", "a"): token})
        with SQLiteStore(path) as other:
            assert other.lease("s", "a") is None
            assert other.lease("s", "b") is not None


@needs_locks
def test_the_side_file_is_there_while_a_store_is_open(path: Path) -> None:
    """The last store deletes it; who may use the file may use it, too; looking only makes none."""
    side = path.with_name("chats.db-owners")
    with SQLiteStore(path) as one:
        path.chmod(0o640)
        assert not one.shared
        with SQLiteStore(path) as other, SQLiteStore(path, read_only=True):
            assert one.shared
            assert other.shared
            assert side.exists()
        assert not one.shared
        assert side.exists()
    assert [path] == list(path.parent.iterdir())
    with SQLiteStore(path):
        assert side.stat().st_mode & 0o777 == 0o640
    with SQLiteStore(path, read_only=True) as store:
        assert not side.exists()
        with pytest.raises(StoreError, match="it was opened to be read only"):
            store.lease("s", "a")


@needs_locks
def test_two_links_to_one_file_lead_to_one_side_file(path: Path, tmp_path: Path) -> None:
    """As SQLite itself, which keeps its log beside the file and not beside the link."""
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "link.db"
    link.symlink_to(path)
    with SQLiteStore(path) as one, SQLiteStore(link) as other:
        assert one.lease("s", "a") is not None
        assert other.lease("s", "a") is None
    assert [link] == list(link.parent.iterdir())


@needs_locks
def test_a_store_that_is_closed_stays_closed(path: Path) -> None:
    """A lease that another thread takes in that moment opens no side file again."""
    store = SQLiteStore(path)
    assert store.owners is not None
    store.close()
    with pytest.raises(OSError, match="the store is closed"):
        store.owners.take(5)
    assert [path] == list(path.parent.iterdir())


@needs_locks
def test_a_side_file_that_is_deleted_in_the_moment_it_is_opened_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stores never hold locks on two side files."""
    path.touch()
    first = Owners(str(path))
    real = Owners._open

    def late(self: Owners) -> int:
        file = real(self)
        first.close()
        return file

    monkeypatch.setattr(Owners, "_open", late)
    second = Owners(str(path))
    monkeypatch.undo()
    third = Owners(str(path))

    assert second.shared()
    assert second.take(5)
    assert not third.take(5)
    second.close()
    third.close()


@needs_locks
def test_a_side_file_that_cannot_be_opened_leaves_leases_in_the_process(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, with what to allow; the store works."""
    path.with_name("chats.db-owners").mkdir()
    with SQLiteStore(path) as store:
        token = store.lease("s", "a")
        assert token is not None
        assert store.lease("s", "a") is None
        store.save([change(store, 1)], fence={("s", "a"): token})
        assert not store.shared

    (line,) = caplog.messages
    assert "leases exclude no other process" in line
    assert "chats.db-owners" in line


@needs_locks
def test_threads_of_one_store_exclude_each_other(path: Path) -> None:
    with SQLiteStore(path) as store:
        taken: list[int | None] = []
        gate = threading.Barrier(8)

        def take() -> None:
            gate.wait(PATIENCE)
            taken.append(store.lease("s", "a"))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)

        assert 7 == taken.count(None)


@needs_locks
def test_a_second_process_that_saves_without_a_lease_is_logged_once(
    both: tuple[SQLiteStore, SQLiteStore], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = both
    token = one.lease("s", "a")
    assert token is not None
    one.save([change(one, 1)], fence={("s", "a"): token})
    assert [] == caplog.messages
    for store in (one, other, one, other):
        store.save([change(store, 2, key="b")])

    assert ["store.shared_without_lease"] * 2 == [getattr(record, "event_name", "") for record in caplog.records]
    assert "is in use by another process" in caplog.messages[0]


def test_versions_are_read_without_the_content(store: SQLiteStore) -> None:
    store.save([change(store, 1), change(store, 2), change(store, 1, key="over")])
    store.save([Delete("s", "over")])

    assert [2, 0, 0] == store.versions("s", ["a", "over", "never"])
