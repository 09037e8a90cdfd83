"""What is put is saved, when it is due, or stays where it is."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from hygiene.cleanup import relieve
from hygiene.errors import NotStorable, OwnershipLost, StoreError, StoreUnavailable, VersionConflict
from hygiene.stores import SaveValue
from hygiene.testing import ManualClock
from hygiene.writebehind import Rejected, WriteBehind

PATIENCE = 20.0
DOWN = StoreUnavailable("the disk is full")

Make = Callable[..., WriteBehind]


@pytest.fixture
def make(store: Any, clock: ManualClock) -> Iterator[Make]:
    """Makes writers on the store, with a clock that stands still."""
    made: list[WriteBehind] = []

    def build(**options: Any) -> WriteBehind:
        made.append(WriteBehind(store, **{"every": 1000, "timer": clock, **options}))
        return made[-1]

    yield build
    store.error = None
    store.poison.clear()
    store.gate.set()
    for writer in made:
        for one in writer.rejected:
            writer.discard(one.key)
        writer.close()
        assert writer.stats().changes == writer.stats().saved + writer.stats().superseded + writer.stats().discarded


def within(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def fails(error: type[Exception], function: Callable[..., Any], *args: Any) -> threading.Thread:
    """A thread in which *function* raises *error*; where it does not, the test fails by the thread's own error."""

    def call() -> None:
        with pytest.raises(error):
            function(*args)

    return within(call)


def ended(thread: threading.Thread) -> bool:
    thread.join(PATIENCE)
    return not thread.is_alive()


# Triggers


def test_nothing_is_saved_before_it_is_due(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    writer.append("log", "x")

    assert ([], 2, None) == (store.batches, len(writer), store.value("a"))


def test_a_save_is_due_after_so_many_changes_over_all_entries(make: Make, store: Any) -> None:
    """The loss window is a number that does not depend on how many entries there are."""
    writer = make(every=3)
    writer.put("a", 1)
    writer.append("log", "x")
    writer.append("log", "y")
    store.begun()
    writer.flush()

    assert [(["a", "log"], False)] == store.batches
    assert ["x", "y"] == store.value("log")


def test_a_save_is_due_some_time_after_the_oldest_change(make: Make, store: Any, clock: ManualClock) -> None:
    writer = make(interval="5m")
    writer.put("a", 1)
    clock.advance(299)

    assert not writer.save_due()

    writer.put("b", 2)
    clock.advance(1)

    assert writer.save_due()
    assert [(["a", "b"], False)] == store.batches
    assert not writer.save_due()


def test_a_change_waits_five_seconds_by_default_and_an_idle_program_writes_nothing(
    make: Make, store: Any, clock: ManualClock
) -> None:
    """The interval counts from the oldest unsaved change, not from the last save."""
    writer = make()
    clock.advance(3600)

    assert not writer.save_due()

    writer.put("a", 1)
    clock.advance(4.9)

    assert not writer.save_due()

    clock.advance(0.2)

    assert writer.save_due()
    assert 1 == len(store.batches)

    clock.advance(3600)

    assert not writer.save_due()


def test_the_writer_keeps_the_time_by_itself(store: Any) -> None:
    """With a clock that runs, nobody has to ask."""
    with WriteBehind(store, interval="20ms") as writer:
        writer.put("a", 1)
        store.begun()
        writer.flush()

    assert [(["a"], False)] == store.batches


def test_a_critical_item_is_synced_before_the_call_returns(make: Make, store: Any) -> None:
    """What is not critical goes on waiting: it is cheaper to save with more of its kind."""
    writer = make(critical=lambda key, item: item == "paid")
    writer.append("other", "x")
    writer.append("log", "x")
    writer.append("log", "paid")

    assert [(["log"], True)] == store.batches

    writer.put("v", "paid")
    writer.replace("log", ["paid"])
    writer.track("log", store.store.load("default", "log").head)
    writer.edit("log", 0, "paid")

    assert [True] * 4 == [sync for _, sync in store.batches]
    assert 1 == len(writer)


def test_memory_pressure_saves_everything(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    relieve()

    assert (1, 0) == (store.value("a"), len(writer))

    store.error = DOWN
    writer.put("a", 2)
    relieve()

    assert (1, True) == (len(writer), writer.stats().outage)


def test_an_eviction_saves_its_own_entry_only(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    writer.put("b", 2)
    writer.save("b")
    writer.save("b")
    writer.save("nobody")

    assert [(["b"], False)] == store.batches


def test_closing_saves_and_refuses_what_comes_later(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    writer.close()
    writer.close()

    assert (1, True) == (store.value("a"), writer.closed)
    with pytest.raises(StoreError, match="is closed"):
        writer.put("a", 2)
    assert "<WriteBehind 'default': closed>" == repr(writer)


def test_durability_of_the_machine_syncs_every_save(make: Make, store: Any) -> None:
    writer = make(durability="machine")
    writer.put("a", 1)
    writer.flush()

    assert [(["a"], True)] == store.batches


@pytest.mark.slow
def test_a_large_backlog_is_saved_in_slices(make: Make, store: Any) -> None:
    writer = make(every=10_000)
    for n in range(2500):
        writer.put(n, n)
    writer.flush()

    assert [1000, 1000, 500] == [len(keys) for keys, _ in store.batches]


# What is pending


def test_a_value_that_is_put_again_is_saved_once(make: Make, store: Any) -> None:
    writer = make()
    for n in range(5):
        writer.put("a", n)
    writer.append("log", "gone")
    writer.replace("log", ["x"])
    writer.append("log", "y")
    writer.delete("b")
    writer.append("b", "z")
    before = writer.stats()
    writer.flush()

    assert (4, 3, 5) == (before.pending, before.keys, before.superseded)
    assert [(["a", "log", "b"], False)] == store.batches
    assert (4, ["x", "y"], ["z"]) == (store.value("a"), store.value("log"), store.value("b"))


def test_what_is_pending_is_read_over_what_is_stored(make: Make, store: Any) -> None:
    writer = make()
    writer.replace("log", ["a", "b", "c"])
    writer.flush()
    writer.track("log", store.store.load("default", "log").head)
    numbers = [writer.append("log", "d"), writer.extend("log", ["e", "f"]), writer.extend("log", [])]
    writer.drop("log", -5, 1)
    writer.drop("log", 9, 12)
    writer.edit("log", 1, "B")
    writer.edit("log", 3, "D")
    writer.put("value", {"x": 1})
    writer.append("new", "n")
    read = writer.load("log")

    assert ([3, 4, None], ["B", "c", "D", "e", "f"]) == (numbers, read.value if read else None)
    assert {"x": 1} == writer.load("value").value  # type: ignore[union-attr]
    assert ["n"] == writer.load("new").value  # type: ignore[union-attr]
    assert None is writer.load("nobody")

    writer.flush()
    stored = store.store.load("default", "log")

    assert stored.value == read.value  # type: ignore[union-attr]
    assert (stored.head.spans, stored.head.next) == (read.head.spans, read.head.next)  # type: ignore[union-attr]


def test_items_that_leave_before_they_were_saved_keep_their_numbers(make: Make, store: Any) -> None:
    """A window that slides over what is pending: dropped items use up their numbers, as saved ones do."""
    writer = make()
    writer.replace("log", [])
    for n in range(10):
        assert n == writer.append("log", n)
        writer.drop("log", 0, n - 2)
    writer.edit("log", 8, "eight")
    read = writer.load("log")
    writer.flush()
    stored = store.store.load("default", "log")

    assert [7, "eight", 9] == stored.value
    assert (((7, 10),), 10) == (stored.head.spans, stored.head.next)
    assert (stored.value, stored.head.spans) == (read.value, read.head.spans)  # type: ignore[union-attr]


def test_what_was_edited_and_dropped_is_dropped(make: Make, store: Any) -> None:
    writer = make()
    writer.replace("log", ["a", "b", "c", "d"])
    writer.flush()
    writer.track("log", store.store.load("default", "log").head)
    writer.edit("log", 1, "B")
    writer.edit("log", 1, "BB")
    writer.drop("log", 0, 2)
    writer.drop("log", 3, 4)
    read = writer.load("log")
    writer.flush()

    assert (["c"], ["c"]) == (store.value("log"), read.value if read else None)
    assert ((2, 3),) == read.head.spans  # type: ignore[union-attr]


def test_a_deletion_that_is_pending_hides_what_is_stored(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    writer.flush()
    writer.delete("a")

    assert (None, False, True) == (writer.load("a"), writer.contains("a"), store.contains("default", "a"))

    writer.flush()

    assert (None, False) == (writer.load("a"), writer.contains("a"))


def test_a_save_under_way_is_not_read_around(make: Make, store: Any) -> None:
    """The state between: what a save has in hand is neither the old version nor lost."""
    writer = make()
    writer.put("a", "old")
    writer.flush()
    store.begun()
    store.gate.clear()
    writer.put("a", "new")
    writer.append("log", "x")
    found: list[Any] = []
    flushing = within(writer.flush)
    store.begun()
    reading = within(lambda: found.append(writer.load("log").value))  # type: ignore[union-attr]
    changes = writer.pending("a")
    in_hand = writer.load("a").value  # type: ignore[union-attr] # all there is to know of it is here: nothing to wait for
    writer.put("a", "newest")
    writer.append("log", "y")

    assert ("new", "newest") == (in_hand, writer.load("a").value)  # type: ignore[union-attr]
    assert ["new"] == [store.decode(change.data) for change in changes if isinstance(change, SaveValue)]
    assert (True, True, "old") == ("a" in writer, writer.contains("a"), store.value("a"))
    assert 2 == len(writer.pending("log"))

    store.gate.set()

    assert ended(flushing)
    assert ended(reading)
    assert [["x", "y"]] == found

    writer.flush()

    assert ("newest", ["x", "y"]) == (store.value("a"), store.value("log"))
    assert () == writer.pending("a")


def test_what_is_saved_during_a_read_is_not_read_twice(make: Make, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read looks at the store just after the pending item got there."""
    writer = make()
    writer.append("log", "x")

    def load(space: str, key: Any) -> Any:
        writer.flush()
        return store.store.load(space, key)

    monkeypatch.setattr(store, "load", load, raising=False)

    assert ["x"] == writer.load("log").value  # type: ignore[union-attr]


def test_what_cannot_be_stored_is_refused_when_it_is_put(make: Make) -> None:
    writer = make()

    with pytest.raises(NotStorable, match="'a'"):
        writer.put("a", {1, 2})
    with pytest.raises(NotStorable):
        writer.append("log", object())
    with pytest.raises(NotStorable, match="stored key"):
        writer.put(object(), 1)
    with pytest.raises(NotStorable, match="stored key"):
        writer.append(("a", frozenset()), 1)
    assert (0, 0) == (len(writer), writer.stats().changes)


def test_a_value_is_no_log(make: Make, store: Any) -> None:
    """It is said at once where it is known, and nothing is left behind."""
    writer = make()
    writer.put("a", 1)

    with pytest.raises(ValueError, match="should be a log"):
        writer.append("a", 1)
    with pytest.raises(ValueError, match="track"):
        writer.drop("a", 0, 1)
    writer.flush()
    writer.track("a", store.store.load("default", "a").head)
    with pytest.raises(ValueError, match="should be a log"):
        writer.append("a", 1)
    with pytest.raises(ValueError, match="track"):
        writer.edit("other", 0, 1)
    writer.replace("log", ["x"])
    with pytest.raises(ValueError, match="0 to 0"):
        writer.edit("log", 1, "y")
    writer.track("new", None)
    writer.drop("new", 0, 5)
    with pytest.raises(ValueError, match="0 to -1"):
        writer.edit("new", 0, "y")
    assert (1, "log" in writer, "new" in writer) == (len(writer), True, False)


# Failures


def test_a_save_that_fails_stays_pending_in_its_order(make: Make, store: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Logged once for each outage, and counted each time."""
    caplog.set_level(logging.INFO, "hygiene")
    writer = make()
    writer.append("log", 1)
    writer.put("v", 1)
    store.error = DOWN
    for n in (2, 3):
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            writer.flush()
        writer.append("log", n)
        writer.put("v", n)
    outage = writer.stats()

    assert (2, True, 4) == (outage.failures, outage.outage, outage.pending)
    assert "<WriteBehind 'default': 4 pending, the store does not save>" == repr(writer)
    assert [1, 2, 3] == writer.load("log").value  # type: ignore[union-attr]

    store.error = None
    writer.flush()

    assert ([1, 2, 3], 3) == (store.value("log"), store.value("v"))
    assert ["WARNING", "INFO"] == [record.levelname for record in caplog.records]
    assert not writer.stats().outage


def test_changes_meet_again_whatever_they_are(make: Make, store: Any) -> None:
    """Those of a save that failed, and those that came while it was under way."""
    writer = make()
    writer.replace("log", ["a", "b", "c"])
    writer.flush()
    store.begun()
    writer.track("log", store.store.load("default", "log").head)
    for key in ("gone", "whole"):
        writer.append(key, "x")
    writer.delete("back")
    writer.append("log", "d")
    store.error, _ = DOWN, store.gate.clear()
    flushing = fails(StoreUnavailable, writer.flush)
    store.begun()
    writer.drop("log", 0, 1)
    writer.drop("log", 3, 4)
    writer.edit("log", 1, "B")
    assert 4 == writer.append("log", "e")
    writer.delete("gone")
    writer.put("whole", 1)
    assert 0 == writer.append("back", "y")
    store.gate.set()

    assert ended(flushing)
    assert ["B", "c", "e"] == writer.load("log").value  # type: ignore[union-attr]
    assert sum(entry.count for entry in writer._pending.values()) == len(writer)

    store.error = None
    writer.flush()

    assert ["B", "c", "e"] == store.value("log")
    assert (None, 1, ["y"]) == (store.value("gone"), store.value("whole"), store.value("back"))


def test_what_failed_comes_before_what_came_later(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    store.error = DOWN
    store.gate.clear()
    flushing = fails(StoreUnavailable, writer.flush)
    store.begun()
    writer.put("b", 1)
    store.gate.set()

    assert ended(flushing)

    store.error = None
    writer.flush()

    assert [(["a", "b"], False)] == store.batches


def test_a_critical_item_is_synced_later_with_what_it_met(make: Make, store: Any) -> None:
    """It came while a save of the same entry was under way, and both failed."""
    writer = make(critical=lambda key, item: item == "now")
    writer.append("log", "x")
    store.error = DOWN
    store.gate.clear()
    threads = [fails(StoreUnavailable, writer.flush)]
    store.begun()
    threads.append(fails(StoreUnavailable, writer.append, "log", "now"))
    for _ in range(100_000):
        if len(writer._waiters) == 2:
            break
        threading.Event().wait(0.0001)
    assert 2 == len(writer._waiters)
    store.gate.set()

    assert all(map(ended, threads))

    store.error = None
    writer.flush()

    assert [(["log"], True)] == store.batches


def test_what_failed_is_tried_again_by_itself(store: Any) -> None:
    """Long before it would have been due."""
    with WriteBehind(store, interval="1h") as writer:
        writer.put("a", 1)
        store.error = DOWN
        with pytest.raises(StoreUnavailable):
            writer.save("a")
        store.error = None
        store.begun()
        store.begun()
        with writer._drive:  # until it has ended
            assert (1, 0) == (store.value("a"), len(writer))


def test_it_is_tried_again_later_and_later(
    make: Make, store: Any, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest pause is a minute; how much of it is waited is drawn, so that not all come back at once."""
    drawn: list[float] = []
    monkeypatch.setattr("random.uniform", lambda low, high: drawn.append(high) or high)
    writer = make()
    writer.put("a", 1)
    store.error = DOWN
    clock.advance(300)
    for _ in range(12):
        assert writer.save_due()
        assert not writer.save_due()
        clock.advance(drawn[-1])

    assert [0.1, 0.2, 0.4] == pytest.approx(drawn[:3])
    assert 60 == max(drawn) == drawn[-1]

    store.error = None

    assert writer.save_due()
    assert (1, False) == (store.value("a"), writer.stats().outage)


def test_a_flush_with_a_timeout_sits_out_a_short_outage(store: Any) -> None:
    store.error = DOWN
    with WriteBehind(store, interval="1h") as writer:
        writer.put("a", 1)
        with pytest.raises(StoreUnavailable):
            writer.flush()
        with pytest.raises(StoreUnavailable):
            writer.save("a")
        flushing = within(lambda: writer.flush(PATIENCE))
        for _ in range(3):
            store.begun()
        store.error = None

        assert ended(flushing)
        assert 1 == store.value("a")


def test_who_flushes_during_an_attempt_gets_one_of_his_own(store: Any) -> None:
    """What began before he asked, and failed, says nothing about now."""
    passing = threading.Semaphore(0)
    store.gate = SimpleNamespace(
        wait=lambda timeout: passing.acquire(timeout=timeout), set=lambda: passing.release(1_000)
    )
    store.error = DOWN
    with WriteBehind(store, interval="1h") as writer:
        writer.put("a", 1)
        first = fails(StoreUnavailable, writer.flush)
        store.begun()
        saved: list[None] = []
        second = within(lambda: saved.append(writer.flush()))
        deadline = time.monotonic() + PATIENCE
        while len(writer._waiters) < 2:
            assert time.monotonic() < deadline
            time.sleep(0)
        passing.release()
        assert ended(first)
        store.begun()
        store.error = None
        passing.release()

        assert ended(second)
        assert [None] == saved
        assert 1 == store.value("a")
        passing.release(1_000)


def test_a_flush_does_not_wait_longer_than_it_may(make: Make, store: Any) -> None:
    """A store that hangs cannot be stopped; it may still save it."""
    writer = make()
    writer.put("a", 1)
    store.gate.clear()

    with pytest.raises(StoreUnavailable, match="takes longer"):
        writer.flush("1ms")
    assert [] == writer._waiters


def test_a_critical_item_that_cannot_be_saved_is_not_acknowledged(make: Make, store: Any) -> None:
    """It stays pending, and is synced when it can be."""
    writer = make(critical=lambda key, item: True)
    store.error = DOWN

    with pytest.raises(StoreUnavailable, match="stay pending"):
        writer.append("log", "x")
    store.error = None
    writer.flush()
    assert [(["log"], True)] == store.batches


def test_at_the_limit_writers_are_refused_and_nothing_is_changed(make: Make, store: Any) -> None:
    writer = make(max_pending=3)
    store.error = DOWN
    writer.put("a", 1)
    with pytest.raises(StoreUnavailable):
        writer.flush()
    writer.extend("log", [1, 2])

    with pytest.raises(StoreUnavailable, match=r"room for 3.*the disk is full"):
        writer.append("log", 3)
    with pytest.raises(StoreUnavailable):
        writer.put("b", 1)
    writer.put("a", 2)  # takes the place of the other one
    writer.delete("a")
    store.error = None
    writer.flush()
    assert ([1, 2], None) == (store.value("log"), store.value("a"))
    writer.extend("log", [3, 4, 5, 6])  # alone, it would never find more room
    assert 4 == len(writer)


def test_plain_code_waits_for_room_while_the_store_is_well(make: Make, store: Any) -> None:
    """A loop that is faster than the disk is slowed down, not refused."""
    writer = make(max_pending=2)
    for n in range(50):
        writer.append("log", n)
    writer.flush()

    assert list(range(50)) == store.value("log")


def test_a_store_that_takes_too_long_refuses_in_the_end(
    make: Make, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hygiene.writebehind._PATIENCE", 0.01)
    writer = make(max_pending=1)
    writer.put("a", 1)
    store.gate.clear()

    with pytest.raises(StoreUnavailable, match="slower than the changes"):
        writer.put("b", 1)


def test_a_close_that_fails_can_be_repeated(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    store.error = DOWN

    with pytest.raises(StoreUnavailable):
        writer.close("10ms")
    assert (False, 1) == (writer.closed, len(writer))
    store.error = None
    writer.close()
    assert (True, 1) == (writer.closed, store.value("a"))


def test_a_store_that_was_closed_too_early_does_not_keep_the_process(make: Make, store: Any) -> None:
    """Trying again would not help, so the end is not put off for it."""
    writer = make()
    writer.put("a", 1)
    store.error = StoreError("store chats.db is closed")

    with pytest.raises(StoreUnavailable, match=r"chats.db is closed. They stay pending"):
        writer.close()
    assert 1 == len(writer)


def test_a_failing_close_does_not_hide_the_error_of_the_block(make: Make, store: Any) -> None:
    writer = make()
    writer.put("a", 1)
    writer.flush()
    writer.track("a", None)
    writer.put("a", 2)
    mine = KeyError("mine")
    with pytest.raises(KeyError) as caught, writer:
        raise mine

    assert "was rejected" in caught.value.__notes__[0]

    other = make()
    other.track("a", None)
    with pytest.raises(VersionConflict), other:
        other.put("a", 2)

    assert (True, ["a"]) == (other.closed, [one.key for one in other.rejected])
    other.close()


# Conflicts


def test_of_a_batch_only_what_conflicts_is_rejected(make: Make, store: Any) -> None:
    """What somebody else has saved is never overwritten."""
    writer = make()
    for key in "abc":
        writer.track(key, None)
        writer.put(key, "mine")
    store.store.save([SaveValue("default", "b", store.encode("theirs"))])
    with pytest.raises(VersionConflict, match="'b' was rejected") as caught:
        writer.flush()

    assert ["mine", "theirs", "mine"] == [store.value(key) for key in "abc"]
    assert (("default", "b", 0, 1),) == caught.value.conflicts
    assert "<WriteBehind 'default': 1 pending, 1 rejected>" == repr(writer)
    for use in (lambda: writer.put("b", 2), lambda: writer.load("b"), lambda: writer.save("b"), writer.flush):
        with pytest.raises(VersionConflict):
            use()
    writer.put("a", "more")

    gone = writer.discard("b")
    writer.put("b", "again")
    writer.flush()

    assert ["mine"] == [store.decode(change.data) for change in gone.changes]  # type: ignore[union-attr]
    assert ("again", "more", ()) == (store.value("b"), store.value("a"), writer.rejected)
    assert None is writer.discard("b")


def test_a_tracked_entry_builds_on_what_it_saved_last(make: Make, store: Any) -> None:
    writer = make()
    writer.track("a", None)
    for value in (1, 2):
        writer.put("a", value)
        writer.save("a")
    writer.put("a", 3)
    with pytest.raises(ValueError, match="nothing pending"):
        writer.track("a", None)
    writer.untrack("a")

    assert 2 == writer.tracked("a").version  # type: ignore[union-attr]

    writer.flush()

    assert (None, 3) == (writer.tracked("a"), store.value("a"))

    writer.untrack("a")


def test_who_asked_for_it_is_told_of_a_conflict(make: Make, store: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It may put the entry again, and even wait for that."""
    told: list[Rejected] = []
    here: list[WriteBehind] = []

    def merge(one: Rejected) -> None:
        told.append(one)
        here[0].put(one.key, "merged")
        here[0].save(one.key)

    writer = make(on_conflict=merge)
    here.append(writer)
    store.store.save([SaveValue("default", "a", store.encode("theirs"))])
    writer.track("a", None)
    writer.put("a", "mine")
    writer.flush()

    assert ("merged", ["a"]) == (store.value("a"), [one.key for one in told])
    assert (1, 0, 1) == (writer.stats().conflicts, writer.stats().rejected, writer.stats().discarded)
    assert isinstance(told[0].error, VersionConflict)


def test_a_conflict_that_nobody_could_take_is_kept(make: Make, store: Any) -> None:
    writer = make(on_conflict=lambda one: 1 / 0)
    writer.track("a", None)
    store.store.save([SaveValue("default", "a", store.encode("theirs"))])
    writer.put("a", "mine")

    with pytest.raises(VersionConflict):
        writer.flush()
    assert (1, 1, 1) == (len(writer), writer.stats().rejected, writer.stats().hook_errors)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OwnershipLost("the lease is over"), OwnershipLost),
        (ValueError("a value is no log"), StoreError),
        (NotStorable("too large"), StoreError),
        (VersionConflict("of something else", (("elsewhere", "b", 1, 2),)), VersionConflict),
    ],
)
def test_one_entry_that_cannot_be_saved_does_not_keep_the_others(
    make: Make, store: Any, error: Exception, raised: type[Exception]
) -> None:
    """Where the store does not say which one it is, each is tried by itself."""
    writer = make()
    for key in "abc":
        writer.append(key, "x")
    store.poison["b"] = error

    with pytest.raises(raised, match="rejected"):
        writer.flush()
    with pytest.raises(raised):
        writer.append("b", "y")
    assert (["x"], None, ["x"]) == (store.value("a"), store.value("b"), store.value("c"))


def test_a_change_that_came_during_the_rejected_save_is_rejected_with_it(make: Make, store: Any) -> None:
    writer = make(critical=lambda key, item: item == "now")
    writer.append("log", "x")
    store.poison["log"] = ValueError("no")
    store.gate.clear()
    flushing = fails(StoreError, writer.flush)
    store.begun()
    critical = fails(StoreError, writer.append, "log", "now")
    for _ in range(100_000):
        if len(writer._waiters) == 2:
            break
        threading.Event().wait(0.0001)
    assert 2 == len(writer._waiters)
    store.gate.set()

    assert ended(flushing)
    assert ended(critical)
    assert ["x", "now"] == [store.decode(item) for item in writer.rejected[0].changes[0].append]  # type: ignore[union-attr]


# The writer


def test_many_threads_lose_nothing(store: Any) -> None:
    """A thousand appends in four threads, with flushes between: all there, each thread's in order."""
    with WriteBehind(store, every=7) as writer:

        def work(name: int) -> None:
            for n in range(250):
                writer.append("shared", [name, n])
                writer.append(name, n)
                if n % 50 == 0:
                    writer.flush()
                    assert store.value(name)[-1] >= n

        threads = [within(lambda name=name: work(name)) for name in range(4)]  # type: ignore[misc]
        assert all(map(ended, threads))

    shared = store.value("shared")

    assert [list(range(250))] * 4 == [store.value(name) for name in range(4)]
    assert [list(range(250))] * 4 == [[n for who, n in shared if who == name] for name in range(4)]


def test_the_thread_goes_when_there_is_nothing_to_do(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes back with the next change; nothing is started before the first."""
    monkeypatch.setattr("hygiene.writebehind._LINGER", 0.001)
    writer = make()

    assert None is writer._thread
    for n in range(3):
        writer.put("a", n)
        writer.flush()
        thread = writer._thread
        if thread is not None:
            assert ended(thread)
        assert None is writer._thread


def test_closing_ends_the_thread_at_once(make: Make) -> None:
    writer = make()
    writer.put("a", 1)
    writer.flush()
    thread = writer._thread
    writer.close()

    assert thread is not None
    assert ended(thread)


@pytest.mark.slow
def test_what_is_pending_is_not_collected(store: Any) -> None:
    """Who forgets the writer does not lose what it was to save; when that is done, it goes."""
    writer = WriteBehind(store, interval="20ms")
    writer.put("a", 1)
    reference = weakref.ref(writer)
    del writer
    gc.collect()
    store.begun()
    kept = reference()
    thread = None
    if kept is not None:
        kept.close()
        thread = kept._thread
    assert thread is None or ended(thread)
    del kept, thread
    gc.collect()

    assert (1, None) == (store.value("a"), reference())


def test_where_no_thread_can_be_started_who_waits_does_it(
    make: Make, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter on its way out starts none."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    writer = make()
    writer.put("a", 1)
    writer.flush()

    assert 1 == store.value("a")

    store.error = DOWN
    writer.put("a", 2)
    with pytest.raises(StoreUnavailable):
        writer.flush("1s")
    store.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    store.error = None
    writer.close()
    assert 2 == store.value("a")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be"),
        ({"max_pending": True}, ValueError, "max_pending must be"),
        ({"interval": 0}, ValueError, "interval must be positive"),
        ({"durability": "for ever"}, ValueError, "durability must be"),
        ({"critical": 1}, TypeError, "critical must be callable"),
        ({"on_conflict": "name"}, TypeError, "on_conflict must be callable"),
    ],
)
def test_wrong_arguments_are_said_at_once(store: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WriteBehind(store, **options)


def test_the_numbers_add_up(make: Make, store: Any) -> None:
    """Keys may be long; the log shows their beginning."""
    writer = make(space="chats", name="bot")
    writer.put("a", 1)
    writer.put("a", 2)
    writer.append("l" * 200, 1)
    stats = writer.stats()

    assert (2, 2, 2, 3, 1) == (stats.pending, stats.keys, stats.unsaved, stats.changes, stats.superseded)
    assert (0, 0, False) == (stats.saved, stats.saves, stats.outage)
    assert "<WriteBehind 'bot': 2 pending>" == repr(writer)
    assert bool(writer)
    store.poison["l" * 200] = ValueError("no")
    with pytest.raises(StoreError, match=r"'lll.*\.\.\. was rejected"):
        writer.flush()
