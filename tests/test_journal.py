"""A `Journal` tells a log what changes in a history: the log is what the list is, at every moment."""

from __future__ import annotations

import copy
import gc
import heapq
import logging
import os
import pickle
import threading
import weakref
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hygiene.errors import NotStorable, StoreError, StoreUnavailable, VersionConflict
from hygiene.history import History, attach, detach, history_type
from hygiene.journal import Journal
from hygiene.stores import SQLiteStore
from hygiene.testing import ManualClock
from hygiene.writebehind import WriteBehind

WAIT = 10  # seconds until a hang is a failure
KEY = "chat"


class Recording(SQLiteStore):
    """A real store that keeps the changes it was given, and can be told to fail."""

    def __init__(self, path=":memory:"):
        super().__init__(path)
        self.given = []
        self.error = None

    def save(self, changes, *, sync=False):
        if self.error is not None:
            raise self.error
        heads = super().save(changes, sync=sync)
        self.given += [(change, sync) for change in changes]
        return heads

    @property
    def rows(self):
        """How many items were written."""
        return sum(len(change.append) + len(change.put) for change, _ in self.given)

    @property
    def replaced(self):
        """How often the whole was."""
        return sum(change.replace for change, _ in self.given)


class Kept:
    """A history with a journal, as a registry keeps it."""

    def __init__(self, source=(), *, store=None, key=KEY, **limits):
        names = {"every", "critical", "max_pending"}
        options = {name: limits.pop(name) for name in names & limits.keys()}
        self.store = Recording() if store is None else store
        self.key = key
        self.writer = WriteBehind(self.store, timer=ManualClock(), **{"every": 10_000, **options})
        self.history = History(source, **limits)
        self.open()

    def open(self):
        record = self.store.load("default", self.key)
        self.writer.track(self.key, None if record is None else record.head)
        self.journal = Journal(self.writer, self.key, numbers=() if record is None else record.head.spans)
        attach(self.history, self.journal)
        self.journal.check(self.history)

    @property
    def log(self):
        """What the log will be once everything is saved."""
        record = self.writer.load(self.key)
        return [] if record is None else record.value

    @property
    def stored(self):
        self.writer.flush()
        record = self.store.load("default", self.key)
        return [] if record is None else record.value

    def close(self):
        self.writer.close()
        self.store.close()


@pytest.fixture
def keep():
    """Makes a history that is kept, with everything saved so far and nothing recorded."""
    made = []

    def make(source=(), **options):
        kept = Kept(source, **options)
        made.append(kept)
        kept.writer.flush()
        kept.store.given.clear()
        return kept

    yield make
    for kept in made:
        kept.store.error = None
        kept.close()


def change_only(kept):
    """The one change that is to be saved."""
    [change] = kept.writer.pending(KEY)
    return change


# What becomes of what.


def test_a_thousand_appends_write_a_thousand_rows(keep):
    """However long a conversation gets, each message is written once and the others are left alone."""
    kept = keep(every=50)

    for number in range(1_000):
        kept.history.append({"role": "user", "content": number})

    assert kept.history == kept.stored
    assert 1_000 == kept.store.rows
    assert 0 == kept.store.replaced
    assert ((0, 1_000),) == kept.journal.numbers


def test_a_window_that_moves_on_drops_and_appends(keep):
    """A bounded conversation writes what comes and drops what leaves, whether that was saved yet or not."""
    kept = keep(maxlen=50, keep_first=1, every=20)

    for number in range(500):
        kept.history.append(number)

    assert kept.history == kept.stored
    assert [0, *range(451, 500)] == kept.history
    assert 500 == kept.store.rows
    assert 0 == kept.store.replaced


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        pytest.param(lambda h: h.__setitem__(1, "new"), 1, id="an item"),
        pytest.param(lambda h: h.__setitem__(-1, "new"), 1, id="the last"),
        pytest.param(lambda h: h.__setitem__(slice(2, 4), ["x", "y"]), 2, id="a slice"),
        pytest.param(lambda h: h.__setitem__(slice(None), [h[0], *h[-2:]]), 0, id="all, by some of it"),
        pytest.param(lambda h: h.__setitem__(slice(None), h[-3:]), 0, id="all, by the last three"),
        pytest.param(lambda h: h.__setitem__(slice(None, None, 2), "xyz"), 3, id="each second"),
        pytest.param(lambda h: h.__delitem__(0), 0, id="del"),
        pytest.param(lambda h: h.__delitem__(slice(1, 3)), 0, id="del, a slice"),
        pytest.param(lambda h: h.__delitem__(slice(None, None, 2)), 0, id="del, each second"),
        pytest.param(lambda h: h.pop(), 0, id="pop"),
        pytest.param(lambda h: h.pop(0), 0, id="pop, the first"),
        pytest.param(lambda h: h.remove("c"), 0, id="remove"),
        pytest.param(lambda h: h.insert(9, "new"), 1, id="insert, at the end"),
        pytest.param(lambda h: h.insert(-1, "new"), 2, id="insert, before the last"),
        pytest.param(lambda h: h.__imul__(2), 6, id="*= 2"),
        pytest.param(lambda h: h.extend(iter("gh")), 2, id="extend"),
        pytest.param(lambda h: h.__iadd__("gh"), 2, id="+="),
        pytest.param(lambda h: h.reverse(), 6, id="reverse"),
        pytest.param(lambda h: h.sort(key="abcdfe".index), 2, id="sort, two of six"),
        pytest.param(lambda h: h.sort(), 0, id="sort, what is sorted"),
        pytest.param(lambda h: h.trim(to="50%"), 0, id="trim"),
    ],
)
def test_each_change_writes_the_rows_that_it_is_about(change, rows, keep):
    """No change of a few items writes the others again."""
    kept = keep("abcdef")

    change(kept.history)

    assert kept.history == kept.log == kept.stored
    assert rows == kept.store.rows
    assert 0 == kept.store.replaced


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda h: h.insert(0, "new"), id="insert, in front of all"),
        pytest.param(lambda h: h.clear(), id="clear"),
        pytest.param(lambda h: h.__imul__(0), id="*= 0"),
        pytest.param(lambda h: h.__init__("xy"), id="__init__ again"),
    ],
)
def test_where_nothing_else_helps_the_whole_is_written(change, keep):
    """Where there is no number for it, or all has gone, the log begins anew."""
    kept = keep("abcdef")

    change(kept.history)

    assert kept.history == kept.stored
    assert 1 == kept.store.replaced
    assert kept.store.load("default", KEY).head.spans == (kept.journal.numbers or ())


def test_what_is_put_where_something_has_left_takes_its_number(keep):
    """A hole in the numbers is used: an insertion there writes one row."""
    kept = keep("abcdef")
    del kept.history[:3]
    del kept.history[1:2]

    kept.history.insert(1, "new")
    kept.history.insert(0, "first")

    assert ["first", "d", "new", "f"] == kept.history == kept.stored
    assert 2 == kept.store.rows
    assert ((2, 6),) == kept.journal.numbers


def test_a_summary_takes_a_number_of_what_it_sums_up(keep):
    """A summary is one row more, and the next one takes its place."""
    kept = keep("abc", maxlen=4, keep_first=1, summarize="".join)

    kept.history.extend("de")
    kept.history.extend("f")

    assert ["a", "bcd", "e", "f"] == kept.history == kept.stored
    assert 0 == kept.store.replaced


def test_an_item_put_in_its_own_place_is_written(keep):
    """``h[i] = h[i]`` after an edit inside the item saves it, as people do it with shelve."""
    kept = keep([{"n": 1}, {"n": 2}])
    kept.history[1]["n"] = 3

    kept.history[1] = kept.history[1]

    assert [{"n": 1}, {"n": 3}] == kept.stored
    assert 1 == kept.store.rows


def test_what_was_edited_in_place_is_told_with_all_the_rest(keep):
    """`rewrite` is for edits that nobody sees."""
    kept = keep([{"n": 1}, {"n": 2}])
    kept.history[1]["n"] = 3

    kept.journal.rewrite(kept.history)

    assert [{"n": 1}, {"n": 3}] == kept.stored


def test_what_asks_an_index_of_somebody_asks_once(keep):
    """An ``__index__`` that never says the same twice cannot make log and list differ."""

    class Index:
        values = count()

        def __index__(self):
            return next(self.values)

    kept = keep("abcdef")

    kept.history.pop(Index())
    kept.history[Index()] = "new"
    del kept.history[Index() : 5]

    assert kept.history == kept.stored


@pytest.mark.parametrize(
    "wrong",
    [
        lambda h: h.pop(9),
        lambda h: h.__delitem__(-7),
        lambda h: h.__setitem__(6, 1),
        lambda h: h.__setitem__(slice(None, None, 2), "toomany"),
        lambda h: h.insert("a", 1),
        lambda h: h.remove("z"),
        lambda h: h.__imul__("a"),
        lambda h: h.sort(key=lambda item: item if item > "c" else 1),
    ],
)
def test_what_a_list_refuses_is_not_told(wrong, keep):
    """A wrong index changes neither list nor log."""
    kept = keep("abcdef")

    with pytest.raises((IndexError, ValueError, TypeError)):
        wrong(kept.history)

    assert list("abcdef") == kept.history
    assert KEY not in kept.writer


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.extend(()),
        lambda h: h.extend(iter(())),
        lambda h: h.__setitem__(slice(2, 2), ()),
        lambda h: h.__setitem__(slice(None), h[:]),
        lambda h: h.__delitem__(slice(9, None)),
        lambda h: h.__imul__(1),
    ],
)
def test_what_changes_nothing_saves_nothing(change, keep):
    """Nothing is pending after it."""
    kept = keep("abc")

    change(kept.history)

    assert KEY not in kept.writer


def test_the_time_when_it_is_over_goes_along(keep):
    """Each change says anew when the entry expires."""
    kept = keep("ab")
    times = count(2_000_000_000.0)
    attach(kept.history, Journal(kept.writer, KEY, numbers=[(0, 2)], expire_at=lambda: next(times)))

    kept.history.append("c")
    first = change_only(kept).expire_at
    kept.history.append("d")
    second = change_only(kept).expire_at
    kept.history.pop(0)
    third = change_only(kept).expire_at
    kept.history.__init__("x")

    assert [2e9, 2e9 + 1, 2e9 + 2] == [first, second, third]
    assert change_only(kept).expire_at > third


# Refusals: the list is what the log is.


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.append(object()),
        lambda h: h.extend([1, object()]),
        lambda h: h.insert(1, object()),
        lambda h: h.__setitem__(0, object()),
        lambda h: h.__setitem__(slice(1), [object()]),
    ],
)
def test_what_cannot_be_stored_does_not_come_in(change, keep):
    """What the store could not give back is refused where it is put, and nothing has changed."""
    kept = keep("abc")

    with pytest.raises(NotStorable):
        change(kept.history)

    assert list("abc") == kept.history == kept.log
    assert KEY not in kept.writer


CHANGES = [
    lambda h: h.append(1),
    lambda h: h.extend([1, 2]),
    lambda h: h.extend(iter([1, 2])),
    lambda h: h.insert(1, 1),
    lambda h: h.__setitem__(0, 1),
    lambda h: h.__delitem__(1),
    lambda h: h.pop(),
    lambda h: h.remove("b"),
    lambda h: h.reverse(),
    lambda h: h.sort(reverse=True),
    lambda h: h.__imul__(2),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_writer_has_no_room_for_is_not_done(change, keep):
    """At *max_pending* during an outage each method raises, and nothing has changed: neither is there more to save."""
    kept = keep("abc", max_pending=3)
    kept.store.error = StoreUnavailable("the disk is full")
    kept.writer.put("another", 1)
    with pytest.raises(StoreUnavailable):
        kept.writer.flush()
    kept.writer.append("one more", 1)
    kept.writer.append("and another", 1)

    with pytest.raises(StoreUnavailable):
        change(kept.history)

    assert list("abc") == kept.history == kept.log
    assert KEY not in kept.writer


def test_a_trim_that_is_refused_is_made_up_for(keep, caplog):
    """The writer whose change made the list too long hears nothing; it is trimmed as soon as that can be saved."""
    kept = keep("abc", maxlen=3, max_pending=3)
    kept.store.error = StoreUnavailable("the disk is full")
    with pytest.raises(StoreUnavailable):
        kept.writer.put("another", 1) or kept.writer.flush()
    with caplog.at_level(logging.WARNING, "hygiene"):
        kept.history.extend("de")
        refused = kept.history.trim(to=1)
    too_long = list(kept.history)

    kept.store.error = None
    kept.writer.flush()
    kept.history.append("f")

    assert list("abcde") == too_long
    assert 0 == refused
    assert list("def") == kept.history == kept.stored
    assert 1 == sum("not trimmed" in record.message for record in caplog.records)


def test_a_summary_that_is_refused_is_made_again(keep, caplog):
    """What it would have summed up is summed up with what falls out next, and is not lost."""
    kept = keep("abcd", maxlen=4, keep_first=1, summarize="".join, max_pending=5)
    kept.writer.put("another", 1)
    kept.writer.put("one more", 1)
    kept.writer.put("and another", 1)
    kept.store.error = StoreUnavailable("the disk is full")

    kept.history.append("e")  # there is room for it and for the trim, and for no summary
    between = list(kept.history)
    kept.store.error = None
    kept.writer.flush()
    kept.history.extend("fg")

    assert ["a", "d", "e"] == between
    assert ["a", "bcde", "f", "g"] == kept.history == kept.stored
    assert "summary is not put in" in caplog.text


def test_a_summary_that_cannot_be_stored_is_left_out(keep, caplog):
    """It is logged and counted as a summarizer that failed, and the items stay, in the list and in the store."""
    kept = keep("abcd", maxlen=4, keep_first=1, summarize=lambda dropped: object())

    kept.history.append("e")

    assert ["a", "b", "c", "d", "e"] == kept.history == kept.stored
    assert 1 == kept.history.hook_errors
    assert "cannot be kept" in caplog.text


def test_items_that_could_not_be_summarized_stay_in_the_store(keep):
    """With the same numbers, so that nothing else is written; and so does what the next summary leaves."""
    calls = []

    def summarize(dropped):
        calls.append(dropped)
        if len(calls) == 2:
            raise TimeoutError
        return "".join(dropped)

    kept = keep("abcd", maxlen=4, keep_first=1, summarize=summarize)

    kept.history.append("e")
    kept.writer.flush()
    once = kept.stored
    kept.history.append("f")
    kept.writer.flush()
    twice = kept.stored
    kept.history.append("g")

    assert ["a", "bc", "d", "e"] == once
    assert ["a", "bc", "d", "e", "f"] == twice
    assert ["a", "bcde", "f", "g"] == kept.history == kept.stored


def test_items_that_the_store_does_not_take_back_go_to_the_next_summary(keep, caplog):
    """They wait in memory, in front of what falls out next."""
    failing = [True]

    def summarize(dropped):
        if failing.pop():
            kept.writer.put("another", 1)
            kept.writer.put("one more", 1)
            kept.store.error = StoreUnavailable("the disk is full")
            raise TimeoutError
        return "".join(dropped)

    kept = keep("abcd", maxlen=4, keep_first=1, summarize=summarize, max_pending=4)

    kept.history.append("e")
    between = list(kept.history)
    failing.append(False)
    kept.store.error = None
    kept.writer.flush()
    kept.history.extend("fg")

    assert ["a", "d", "e"] == between
    assert ["a", "bcde", "f", "g"] == kept.history == kept.stored
    assert "are not put back" in caplog.text


def test_a_closed_writer_refuses_every_change(keep):
    """What nobody would save does not happen."""
    kept = keep("abc")
    kept.writer.close()

    with pytest.raises(StoreError, match="closed"):
        kept.history.append("d")

    assert list("abc") == kept.history


def test_what_another_process_has_changed_is_not_overwritten(keep):
    """After a conflict each change raises it, until the entry is loaded anew."""
    kept = keep("abc")
    with WriteBehind(kept.store) as other:
        other.append(KEY, "theirs")
    kept.history.append("ours")
    with pytest.raises(VersionConflict):
        kept.writer.flush()

    with pytest.raises(VersionConflict):
        kept.history.append("d")
    with pytest.raises(VersionConflict):
        kept.journal.rewrite(kept.history)
    kept.writer.discard(KEY)
    with pytest.raises(StoreError, match="Load it again"):
        kept.history.append("d")

    assert [*"abc", "ours"] == kept.history
    assert [*"abc", "theirs"] == kept.stored


# Critical items.


def test_a_critical_item_is_on_disk_before_the_call_returns(keep):
    """Whichever method puts it in, it waits, and for its own list only."""
    kept = keep("a", critical=lambda key, item: item == "!")
    saved = []

    for change in (
        lambda h: h.append("!"),
        lambda h: h.extend(["b", "!"]),
        lambda h: h.insert(1, "!"),
        lambda h: h.__setitem__(0, "!"),
        lambda h: h.__setitem__(slice(1, 2), ["!", "c"]),
    ):
        kept.writer.append("another", 1)
        change(kept.history)
        saved.append(kept.store.load("default", KEY).value == kept.history)

    assert [True] * 5 == saved
    assert "another" in kept.writer
    assert {True} == {sync for _, sync in kept.store.given}


def test_a_critical_item_that_cannot_be_saved_is_there_and_stays_pending(keep):
    """The writer gets the error, and the change stands: it is tried again."""
    kept = keep("a", critical=lambda key, item: item == "!")
    kept.store.error = StoreUnavailable("the disk is full")

    with pytest.raises(StoreUnavailable):
        kept.history.append("!")
    with pytest.raises(StoreUnavailable):
        kept.history.insert(0, "!")
    kept.store.error = None

    assert ["!", "a", "!"] == kept.history == kept.stored


def test_what_is_no_item_of_their_own_keeps_nobody_waiting(keep):
    """A hook that writes a critical item waits for it; the writer that made it run does not wait twice."""
    kept = keep("abc", maxlen=3, critical=lambda key, item: item == "!", on_trim=lambda gone: None)

    kept.history.append("d")

    assert KEY in kept.writer


# Past the methods.


def test_what_is_written_past_the_methods_is_told_with_the_next_change(keep):
    """It shows in the length, and everything is written anew."""
    kept = keep([3, 2, 1])

    heapq.heappush(kept.history, 0)
    kept.history.append(9)

    assert kept.history == kept.log == kept.stored
    assert 1 == kept.store.replaced


@pytest.mark.parametrize("change", [*CHANGES, lambda h: h.clear(), lambda h: h.trim(to=1)])
def test_each_change_notices_what_was_written_past_it(change, keep):
    """Whichever method comes next, log and list agree after it."""
    kept = keep(["a", "b", "c"])
    list.append(kept.history, "d")

    change(kept.history) if change is not CHANGES[9] else kept.history.sort(key=str)

    assert kept.history == kept.stored


def test_a_check_tells_what_was_written_past_the_methods(keep):
    """A registry asks before it saves an entry for good."""
    kept = keep("abc")
    good = kept.journal.check(kept.history)
    list.append(kept.history, "d")

    found = kept.journal.check(kept.history)

    assert (True, False, True) == (good, found, kept.journal.check(kept.history))
    assert kept.history == kept.stored


def test_what_past_the_methods_cannot_be_stored_is_said_by_the_check(keep):
    """Nothing is changed by it."""
    kept = keep("abc")
    list.append(kept.history, object())

    with pytest.raises(NotStorable):
        kept.journal.check(kept.history)

    assert list("abc") == kept.stored


def test_a_users_subclass_of_list_is_told(keep):
    """Its own methods come first; what they write with ``super()`` is told."""

    class Tagged(list):
        def append(self, item):
            super().append(str(item))

    kept = keep()
    kept.history = history_type(Tagged)(["a"], maxlen=2)
    attach(kept.history, kept.journal)

    kept.history.append(1)
    kept.history.append(2)

    assert ["1", "2"] == kept.history == kept.stored


# Attaching and detaching.


def test_a_detached_history_writes_nothing(keep):
    """What was taken out of a registry is the caller's."""
    kept = keep("abc")

    detach(kept.history)
    kept.history.append(object())
    kept.history.insert(0, 1)

    assert 5 == len(kept.history)
    assert list("abc") == kept.stored


def test_a_closed_journal_is_silent(keep):
    """It need not be detached: nobody has to have the history at hand."""
    kept = keep("abc")

    kept.journal.close()
    for change in (*CHANGES[:-1], lambda h: h.append(object()), lambda h: h.trim(to=1)):
        kept.history[:] = list("abc") if change is CHANGES[9] else [*"abc", *kept.history[3:]]
        change(kept.history)
    silent = kept.journal.check(kept.history)
    kept.journal.rewrite(kept.history)

    assert silent
    assert kept.journal.closed
    assert list("abc") == kept.stored


@pytest.mark.parametrize("item", ["d", object()])
def test_a_journal_whose_entry_is_nobodys_is_silent(item, keep):
    """*dead* is asked with each change, and once it said so, never again."""
    kept = keep("abc")
    answers = iter([False, False, True])
    journal = Journal(kept.writer, KEY, numbers=[(0, 3)], dead=lambda: next(answers))
    attach(kept.history, journal)

    kept.history.pop()
    while not journal.closed:
        kept.history.append(item if len(kept.history) > 2 else "c")
    kept.history.append(item)

    assert list("abc") == kept.log[:3]
    assert item not in kept.log[3:-1]


def test_a_later_journal_takes_the_place_of_the_earlier(keep):
    """One list has one log."""
    kept = keep("abc")
    former = kept.journal
    kept.writer.track("other", None)
    attach(kept.history, Journal(kept.writer, "other"))

    kept.history.append("d")

    assert list("abcd") == kept.writer.load("other").value
    assert list("abc") == kept.stored
    assert ((0, 3),) == former.numbers


def test_histories_without_limits_do_not_share_a_journal(keep):
    """They share their limits, which are none; a journal is one history's own."""
    kept = keep("abc")
    other = History("abc")

    other.append(object())
    kept.history.append("d")

    assert list("abcd") == kept.stored
    assert 4 == len(other)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h)), History])
@pytest.mark.parametrize("limits", [{}, {"maxlen": 5}])
def test_a_copy_has_no_journal(make, limits, keep):
    """The log is the original's."""
    kept = keep("abc", **limits)

    make(kept.history).append(object())

    assert KEY not in kept.writer


def test_the_constructor_called_again_goes_on_telling(keep):
    """With other limits, too."""
    kept = keep("abc", maxlen=5)

    kept.history.__init__("uvwxyz", maxlen=3)
    kept.history.append("!")

    assert list("yz!") == kept.history == kept.stored


def test_a_history_that_is_kept_can_be_collected(keep):
    """Neither journal nor writer holds it."""
    kept = keep("abc")
    kept.history.append("d")
    reference = weakref.ref(kept.history)

    kept.history = None
    gc.collect()

    assert reference() is None
    assert list("abcd") == kept.stored


def test_a_log_is_known_again_when_it_is_loaded(tmp_path):
    """The numbers are those of the store, holes and all."""
    with Recording(tmp_path / "chats.db") as store:
        first = Kept("abcdef", store=store)
        del first.history[1]
        first.history.pop()
        first.writer.close()
    with Recording(tmp_path / "chats.db") as store:
        again = Kept(store.load("default", KEY).value, store=store)

        again.history.insert(1, "new")
        again.history.append("last")
        again.writer.close()
        record = store.load("default", KEY)

    assert ["a", "new", "c", "d", "e", "last"] == again.history == record.value
    assert ((0, 5), (6, 7)) == record.head.spans == again.journal.numbers
    assert 2 == store.rows


def test_its_repr_says_whose_it_is(keep):
    """A closed one says so."""
    kept = keep("abc")
    before = repr(kept.journal)
    kept.journal.close()

    assert "<Journal of 'chat': 3 items>" == before
    assert "<Journal of 'chat': closed>" == repr(kept.journal)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_finds_that_its_writer_knows_nothing_of_the_last_items(tmp_path):
    """What the parent is about to save is not pending in the child: it tells everything anew, on the same version."""
    store = Recording(tmp_path / "chats.db")
    kept = Kept("abc", store=store)
    kept.writer.flush()
    kept.history.append("d")
    child = os.fork()
    if not child:
        code = 1
        try:
            kept.history.append("e")
            code = 0 if kept.log == kept.history == list("abcde") else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)

    assert 0 == os.waitstatus_to_exitcode(status)
    assert list("abcd") == kept.stored
    kept.close()


# Threads.


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{}, {"maxlen": 40, "keep_first": 2}])
def test_eight_threads_leave_log_and_list_in_the_same_order(limits, keep):
    """Who appends first is first in both."""
    kept = keep(every=25, **limits)
    start = threading.Barrier(8)

    def work(who):
        start.wait(WAIT)
        for number in range(150):
            kept.history.append([who, number])
            if number % 10 == who:
                kept.history.extend([[who, number, "a"], [who, number, "b"]])
            if number % 7 == who % 7 and len(kept.history) > 3:
                kept.history.pop(2)
            if number % 50 == who:
                kept.history.insert(1, [who, number, "first"])

    threads = [threading.Thread(target=work, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)

    assert kept.history == kept.stored
    assert kept.journal.numbers == kept.store.load("default", KEY).head.spans


def test_attaching_and_detaching_may_happen_while_others_write(keep):
    """Once it is attached for good, the next check finds what went past it, if anything did."""
    kept = keep()
    done = threading.Event()

    def work():
        for number in range(2_000):
            kept.history.append(number)
            if number % 5 == 0:
                kept.history.insert(len(kept.history), number)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        detach(kept.history)
        attach(kept.history, kept.journal)
    thread.join(WAIT)
    kept.journal.check(kept.history)

    assert 2_400 == len(kept.history)
    assert kept.history == kept.stored


def test_when_close_returns_no_change_is_being_told(keep):
    """A registry may delete the log right after: nothing makes it anew."""
    kept = keep("abc")
    ready = threading.Event()
    over = threading.Event()

    def work():
        while not over.is_set():
            kept.history.append(1)
            kept.history.pop(0)
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(WAIT)

    kept.journal.close()
    kept.writer.delete(KEY)
    ready.clear()
    assert ready.wait(WAIT)
    over.set()
    thread.join(WAIT)

    assert kept.writer.load(KEY) is None


# The laws.


class Machine(RuleBasedStateMachine):
    """After each step the log is what the list is, and the list what it would be without a log."""

    limits = {}  # noqa: RUF012 - read only
    failing = False

    def __init__(self):
        super().__init__()
        # Where it matters what there is room for, nothing is saved at moments of its own choice.
        options = {"every": 10_000, "max_pending": 12} if self.failing else {"every": 9}
        self.kept = Kept(**options, **self.limits)
        self.twin = History(**self.limits)

    def teardown(self):
        self.kept.store.error = None
        assert self.kept.history == self.kept.stored
        assert self.spans(self.kept.store.load("default", KEY)) == self.kept.journal.numbers
        self.kept.close()

    @staticmethod
    def spans(record):
        return () if record is None else record.head.spans

    def do(self, change):
        history = self.kept.history
        if self.failing and self.kept.store.error is None:
            self.kept.writer.flush()
        before = list(history)
        try:
            change(history)
        except StoreUnavailable:
            assert self.kept.store.error is not None
            assert self.limits or before == history
        else:
            if not self.failing:
                change(self.twin)

    items = st.integers(0, 5)
    places = st.integers(-9, 9)

    @rule(item=items)
    def append(self, item):
        self.do(lambda h: h.append(item))

    @rule(items=st.lists(items, max_size=12), lazily=st.booleans())
    def extend(self, items, lazily):
        self.do(lambda h: h.extend(iter(items) if lazily else items))

    @rule(place=places, item=items)
    def insert(self, place, item):
        self.do(lambda h: h.insert(place, item))

    @rule(start=places, stop=places, items=st.lists(items, max_size=6))
    def replace_slice(self, start, stop, items):
        self.do(lambda h: h.__setitem__(slice(start, stop), items))

    @rule(start=places, stop=places)
    def keep_a_slice(self, start, stop):
        self.do(lambda h: h.__setitem__(slice(None), [*h[:1], *h[start:stop]]))

    @rule(start=places, stop=places, step=st.sampled_from([None, 1, 2, -1]))
    def delete_slice(self, start, stop, step):
        self.do(lambda h: h.__delitem__(slice(start, stop, step)))

    @precondition(lambda self: self.kept.history)
    @rule(data=st.data(), item=items)
    def replace(self, data, item):
        size = len(self.kept.history)
        place = data.draw(st.integers(-size, size - 1))
        self.do(lambda h: h.__setitem__(place, item))

    @precondition(lambda self: self.kept.history)
    @rule(data=st.data())
    def pop(self, data):
        size = len(self.kept.history)
        place = data.draw(st.integers(-size, size - 1))
        self.do(lambda h: h.pop(place))

    @precondition(lambda self: self.kept.history)
    @rule(data=st.data())
    def remove(self, data):
        item = data.draw(st.sampled_from(list(self.kept.history)))
        self.do(lambda h: h.remove(item))

    @rule(times=st.integers(0, 2))
    def repeat(self, times):
        if len(self.kept.history) < 200:
            self.do(lambda h: h.__imul__(times))

    @rule()
    def reverse(self):
        self.do(lambda h: h.reverse())

    @rule(reverse=st.booleans())
    def sort(self, reverse):
        self.do(lambda h: h.sort(reverse=reverse))

    @rule()
    def clear(self):
        self.do(lambda h: h.clear())

    @rule(to=st.integers(0, 9))
    def trim(self, to):
        self.do(lambda h: h.trim(to=to))

    @rule(item=items)
    def initialise(self, item):
        self.do(lambda h: h.__init__([item]))

    @rule(item=items)
    def past_the_methods(self, item):
        list.append(self.kept.history, item)
        if self.failing and self.kept.store.error is None:
            self.kept.writer.flush()
        try:
            self.kept.journal.check(self.kept.history)
        except StoreUnavailable:
            list.pop(self.kept.history)
        else:
            list.append(self.twin, item)
        self.do(lambda h: h.extend(()))

    @rule()
    def unstorable(self):
        before = list(self.kept.history)
        with pytest.raises(NotStorable):
            self.kept.history.extend([1, object()])

        assert self.failing or before == self.kept.history  # what was too long may have been trimmed

    @precondition(lambda self: self.kept.store.error is None)
    @rule()
    def flush(self):
        assert self.kept.history == self.kept.stored

    @precondition(lambda self: self.kept.store.error is None)
    @rule()
    def reload(self):
        self.kept.writer.flush()
        self.kept.writer.untrack(KEY)
        self.kept.journal.close()
        self.kept.open()

    @precondition(lambda self: self.failing and self.kept.store.error is None)
    @rule()
    def fail(self):
        self.kept.writer.flush()
        self.kept.store.error = StoreUnavailable("the disk is full")
        self.kept.writer.put("another", 1)
        with pytest.raises(StoreUnavailable):
            self.kept.writer.flush()

    @precondition(lambda self: self.failing)
    @rule()
    def recover(self):
        self.kept.store.error = None
        self.kept.writer.flush()

    @invariant()
    def the_log_is_what_the_list_is(self):
        record = self.kept.writer.load(KEY)

        assert self.kept.history == ([] if record is None else record.value)
        assert self.kept.journal.numbers == self.spans(record)

    @invariant()
    def the_list_is_what_it_would_be_without_a_log(self):
        assert self.failing or self.twin == self.kept.history


class ByLength(Machine):
    """With a window behind a head."""

    limits = {"maxlen": 6, "keep_first": 1}  # noqa: RUF012


class ByTokens(Machine):
    """With weights."""

    limits = {"max_tokens": 15, "count_tokens": int}  # noqa: RUF012


class WithSummaries(Machine):
    """With summaries."""

    limits = {"maxlen": 7, "keep_first": 2, "summarize": lambda dropped: max(dropped) + 1}  # noqa: RUF012


class Failing(Machine):
    """With a store that fails, and little room."""

    failing = True


class FailingByLength(ByLength):
    """The same, with a window."""

    failing = True


class FailingWithSummaries(WithSummaries):
    """The same, with summaries."""

    failing = True


# Each runs a few thousand steps; what there is to find shows in far fewer.
few = settings(max_examples=25, stateful_step_count=30, deadline=None)
for machine in (Machine, ByLength, ByTokens, WithSummaries, Failing, FailingByLength, FailingWithSummaries):
    machine.TestCase.settings = few

TestMachine = Machine.TestCase
TestByLength = ByLength.TestCase
TestByTokens = ByTokens.TestCase
TestWithSummaries = WithSummaries.TestCase
TestFailing = Failing.TestCase
TestFailingByLength = FailingByLength.TestCase
TestFailingWithSummaries = FailingWithSummaries.TestCase
