"""A `History` stays within its bounds by itself, is a list to everybody, and loses nothing untold."""

from __future__ import annotations

import asyncio
import copy
import gc
import gzip
import heapq
import json
import os
import pickle
import threading
import weakref
from collections import deque
from itertools import count, islice
from typing import get_overloads

import msgspec
import orjson
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hygiene.history import History, history_type
from hygiene.sizing import sizeof

list_tests = pytest.importorskip("test.list_tests", reason="this Python came without its own tests")

WAIT = 10  # seconds until a hang is a failure


class Tagged(list):
    """A list as people subclass it: attributes, a constructor of its own, methods that make another."""

    __slots__ = ("tag",)

    def __init__(self, items=(), tag="new"):
        super().__init__(items)
        self.tag = tag

    def append(self, item):
        super().append(str(item))

    def tagged(self, tag):
        return type(self)(self, tag=tag)


class Owner:
    """Somebody who archives what falls out."""

    def __init__(self):
        self.archived = []
        self.messages = History(maxlen=2, on_trim=self.archive)

    def archive(self, dropped):
        self.archived += dropped


class Message:
    """An item that compares by identity and can be weakly referenced."""


def number_of_letters(item):
    return len(item)


def shortest(dropped):
    return min(dropped, key=len)


# The window.


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda h: [h.append(n) for n in range(4, 9)], id="append"),
        pytest.param(lambda h: h.extend(range(4, 9)), id="extend"),
        pytest.param(lambda h: h.extend(n for n in range(4, 9)), id="extend by a generator"),
        pytest.param(lambda h: h.__iadd__([4, 5, 6, 7, 8]), id="+="),
        pytest.param(lambda h: h.__setitem__(slice(3, 3), [4, 5, 6, 7, 8]), id="slice assignment"),
        pytest.param(lambda h: [h.insert(len(h), n) for n in range(4, 9)], id="insert"),
        pytest.param(lambda h: h.__init__([1, 2, 3, 4, 5, 6, 7, 8]), id="__init__ again"),
    ],
)
def test_every_method_that_makes_it_longer_trims_it(write):
    """Whatever writes, the newest *maxlen* items are what is left."""
    history = History([1, 2, 3], maxlen=3)

    write(history)

    assert [6, 7, 8] == history


def test_repeating_it_in_place_trims_it():
    """``*=`` is bounded, too."""
    history = History([1, 2], maxlen=3)

    history *= 2

    assert [2, 1, 2] == history
    assert isinstance(history, History)


def test_what_is_there_at_the_start_is_trimmed():
    """More than *maxlen* items to begin with leave the newest."""
    assert [3, 4] == History([1, 2, 3, 4], maxlen=2)


def test_the_first_items_are_kept():
    """With *keep_first* the system prompt never leaves; the oldest behind it do."""
    history = History(["system"], maxlen=3, keep_first=1)

    history.extend(["a", "b", "c", "d"])

    assert ["system", "c", "d"] == history


def test_what_is_put_first_into_a_full_history_leaves_at_once():
    """The lowest index is the oldest, whenever it came."""
    dropped = []
    history = History("abc", maxlen=3, on_trim=dropped.extend)

    history.insert(0, "z")

    assert ["a", "b", "c"] == history
    assert ["z"] == dropped


def test_a_longer_head_can_be_put_in_front():
    """*keep_first* counts places: a new system prompt is kept, the former one becomes the oldest."""
    history = History(["old", "a", "b"], maxlen=3, keep_first=1)

    history.insert(0, "new")

    assert ["new", "a", "b"] == history


def test_an_endless_iterator_does_not_fill_memory():
    """What an iterator yields is trimmed while it is read: here the one item that would be the last stops it."""
    alive = weakref.WeakSet()

    def messages():
        for _ in range(5_000):
            message = Message()
            alive.add(message)
            yield message
        raise EOFError

    history = History(maxlen=10)

    with pytest.raises(EOFError):
        history.extend(messages())

    gc.collect()

    assert 10 == len(history)
    assert 10 >= len(alive) - 1  # the generator's own


def test_what_came_before_an_error_stays():
    """An iterator that fails leaves what it yielded, as in a list."""

    def failing():
        yield from "abc"
        raise EOFError

    history, plain = History(maxlen=5), []

    for target in (history, plain):
        with pytest.raises(EOFError):
            target.extend(failing())

    assert plain == history


def test_with_no_limit_it_is_a_list():
    """Nothing leaves a history without limits."""
    history = History(range(2_000))

    history += range(3)

    assert 2_003 == len(history)
    assert history.nbytes is None
    assert history.tokens is None


# Weights.


def test_tokens_are_bounded():
    """The sum of what *count_tokens* says stays within *max_tokens*."""
    history = History(max_tokens=10, count_tokens=len)

    history.extend(["aaaa", "bbbb", "cc"])
    full = history.tokens
    history.append("ddd")

    assert 10 == full
    assert ["bbbb", "cc", "ddd"] == history
    assert 9 == history.tokens


def test_bytes_are_bounded():
    """The sum of the items' bytes stays within *max_bytes*, whatever way they came."""
    history = History(max_bytes="4KiB")

    for n in range(20):
        history.append("x" * 1000 + str(n))
        history.insert(0, "y" * 500)

    assert 4096 >= history.nbytes
    assert sum(map(sizeof, history)) == history.nbytes
    assert history[-1].endswith("19")


def test_the_estimate_of_a_registry_reads_the_running_sum():
    """`sizeof` of a history with *max_bytes* does not walk it."""
    history = History([b"x" * 100], max_bytes=10_000, getsizeof=lambda item: 7_000)

    assert 7_000 == sizeof(history)


def test_each_item_is_counted_once():
    """Counting tokens is slow: an item is counted when it comes in and never again."""
    counted = []

    def count_tokens(item):
        counted.append(item)
        return 2

    history = History(max_tokens=8, count_tokens=count_tokens)

    history.extend([1, 2, 3])
    history.append(4)
    history.append(5)
    history.insert(2, 6)
    history[0] = 7
    history[1:2] = [8, 9]
    history.sort(reverse=True)
    history.reverse()
    del history[0]
    history.pop()

    assert [1, 2, 3, 4, 5, 6, 7, 8, 9] == counted
    assert 2 * len(history) == history.tokens


def test_the_newest_item_stays_even_if_it_alone_is_too_much():
    """A message that is too long for the limit is still there to be answered."""
    history = History(["s", "a", "b"], max_tokens=5, count_tokens=len, keep_first=1)

    history.append("c" * 100)

    assert ["s", "c" * 100] == history


def test_limits_combine():
    """The tighter limit decides."""
    history = History(maxlen=3, max_tokens=6, count_tokens=len, max_bytes="1MiB")

    history.extend(["a", "b", "c", "d"])
    by_length = history[:]
    history.append("eeeee")

    assert ["b", "c", "d"] == by_length
    assert ["d", "eeeee"] == history


def test_fractions_of_tokens_are_rounded_up():
    """A counter that divides letters by four is good enough."""
    history = History(["12345"], max_tokens=10, count_tokens=lambda item: len(item) / 4)

    assert 2 == history.tokens


@pytest.mark.parametrize("answer", [-1, "many", float("nan"), ZeroDivisionError])
def test_a_failing_counter_is_logged_and_the_item_is_not_lost(answer, caplog):
    """What *count_tokens* raises never reaches the writer; the item counts as 0."""

    def count_tokens(item):
        if isinstance(answer, type):
            raise answer
        return answer

    history = History(max_tokens=10, count_tokens=count_tokens)

    history.append("a")

    assert ["a"] == history
    assert 0 == history.tokens
    assert 1 == history.hook_errors
    assert "the tokens of an item could not be counted" in caplog.text


def test_what_c_code_writes_past_the_methods_is_caught_up_with():
    """``heapq`` writes into the storage of a list; the next change sees it."""
    history = History([1], max_tokens=3, count_tokens=lambda item: 1)

    for n in range(2, 6):
        heapq.heappush(history, n)
    history.append(9)

    assert 3 == len(history)
    assert 3 == history.tokens


# Telling.


def test_what_falls_out_is_told_once_and_in_order():
    """``on_trim`` gets lists of what left, oldest first."""
    told = []
    history = History(maxlen=2, on_trim=told.append)

    history.append(1)
    history.extend([2, 3, 4])
    history.append(5)

    assert [[1, 2], [3]] == told
    assert [4, 5] == history


def test_what_the_caller_takes_is_not_told():
    """``pop``, ``del``, ``remove``, ``clear`` and assignment are the caller's own decision."""
    told = []
    history = History(range(6), maxlen=6, on_trim=told.append)

    history.pop()
    del history[0]
    history.remove(3)
    history[0] = 9
    history[0:1] = []
    history.clear()

    assert [] == history
    assert [] == told


def test_a_raising_hook_is_logged_and_counted_and_never_reaches_the_writer(caplog):
    """The one who appends is innocent of what the archive does."""

    def on_trim(dropped):
        raise OSError("disk full")

    history = History(maxlen=1, on_trim=on_trim)

    history.extend("ab")
    history.append("c")

    assert ["c"] == history
    assert 2 == history.hook_errors
    assert "on_trim failed, and what it was handed is gone: 1 of the oldest items" in caplog.text
    assert "disk full" in caplog.text
    assert {"hygiene"} == {record.name for record in caplog.records}


def test_a_hook_that_is_interrupted_lets_the_next_one_run():
    """Ctrl-C passes, and the history goes on telling."""
    told = []

    def on_trim(dropped):
        told.extend(dropped)
        if dropped == [1]:
            raise KeyboardInterrupt

    history = History([1], maxlen=1, on_trim=on_trim)

    with pytest.raises(KeyboardInterrupt):
        history.append(2)
    history.append(3)

    assert [1, 2] == told


def test_a_hook_may_write_to_the_history():
    """A note about what left is one more item; what it pushes out is told with the next trim."""
    told = []

    def on_trim(dropped):
        told.append(dropped)
        history.append("note")

    history = History(maxlen=3, on_trim=on_trim)

    history.extend([1, 2, 3, 4])
    once = history[:], told[:]
    history.append(5)

    assert ([3, 4, "note"], [[1]]) == once
    assert [[1], [2, 3]] == told
    assert ["note", 5, "note"] == history


def test_a_hook_that_puts_everything_back_does_not_run_for_ever():
    """The bound holds whatever the hook wants."""
    calls = []

    def on_trim(dropped):
        calls.append(dropped)
        history.extend(dropped)

    history = History(maxlen=2, on_trim=on_trim)

    history.extend([1, 2, 3])

    assert 2 == len(history)
    assert [[1]] == calls


@pytest.mark.slow
def test_a_finalizer_may_write_to_the_history():
    """An item that dies may use the list that it was in: no lock is held."""

    class Last:
        def __del__(self):
            other = threading.Thread(target=history.insert, args=(0, "bye"), daemon=True)
            other.start()
            other.join(WAIT)
            heard.append(not other.is_alive())

    heard = []
    history = History(maxlen=3)

    history.append(Last())
    history.extend("abc")
    history[0] = Last()
    history[0] = "d"
    history[0:1] = [Last()]
    del history[0]
    history.append(Last())
    history.clear()
    gc.collect()

    assert [True] * 4 == heard


# Summaries.


def joined(dropped):
    return "(" + "".join(dropped) + ")"


def test_a_summary_stands_for_what_fell_out():
    """``summarize`` gets the earlier summary first, and what it returns takes its place."""
    history = History(["s"], maxlen=4, keep_first=1, summarize=joined)

    history.extend("abc")
    before = history[:]
    history.append("d")
    once = history[:]
    history.append("e")

    assert ["s", "a", "b", "c"] == before
    assert ["s", "(ab)", "c", "d"] == once
    assert ["s", "((ab)c)", "d", "e"] == history


def test_the_earlier_summary_stays_until_the_next_takes_its_place():
    """Whoever reads meanwhile finds one."""
    seen = []

    def summarize(dropped):
        seen.append(history[:])
        return joined(dropped)

    history = History("abc", maxlen=3, summarize=summarize)

    history.append("d")
    history.append("e")

    assert [["c", "d"], ["(ab)", "d", "e"]] == seen


def test_without_a_new_summary_the_earlier_one_stays():
    """A summarizer that has nothing to say leaves the history within its bounds."""
    history = History("abc", maxlen=3, summarize=lambda gone: None if gone[-1] == "c" else joined(gone))
    history.append("d")
    history.append("e")

    assert ["(ab)", "d", "e"] == history
    assert 0 == history.hook_errors


class Overloaded:
    """A summarizer that fails in the given calls, and joins in all others."""

    def __init__(self, *failing, error=TimeoutError):
        self.failing = failing
        self.error = error
        self.handed = []

    def __call__(self, dropped):
        self.handed.append(dropped)
        if len(self.handed) in self.failing:
            raise self.error("the model is overloaded")
        return [text for item in dropped for text in item]


LIMITS = {
    "maxlen": {"maxlen": 6},
    "max_tokens": {"max_tokens": 6, "count_tokens": lambda item: 1},
    "max_bytes": {"max_bytes": 6, "getsizeof": lambda item: 1},
    "compact": {"maxlen": 6, "compact": True},
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("failing", [(1,), (3, 4), (13, 14, 15)], ids=["first", "middle", "last"])
def test_what_a_summarizer_was_given_when_it_failed_stays(limits, failing, caplog):
    """No item is missing, all are in order, and the next trim hands them over again."""
    summarize = Overloaded(*failing)
    history = History([["s"]], keep_first=1, summarize=summarize, **limits)

    texts = [str(number) for number in range(20)]
    for text in texts:
        history.append([text])

    assert ["s", *texts] == [text for item in history for text in item]
    assert len(failing) == history.hook_errors
    assert 0 == history.given_up
    assert "will be given" in caplog.text
    assert (9 if failing[-1] == 15 else 6) == len(history)


def test_items_that_stay_are_handed_over_with_those_of_the_next_trim():
    """In one piece, with the earlier summary in front; until then the list is longer than its bound."""
    summarize = Overloaded(2)
    history = History([["a"], ["b"], ["c"]], maxlen=3, summarize=summarize)

    history.append(["d"])
    history.append(["e"])
    between = history[:]
    history.append(["f"])

    assert [["a", "b"], ["c"], ["d"], ["e"]] == between
    assert [[["a"], ["b"]], [["a", "b"], ["c"]], [["a", "b"], ["c"], ["d"]]] == summarize.handed
    assert [["a", "b", "c", "d"], ["e"], ["f"]] == history


def test_a_trim_by_hand_that_cannot_be_summarized_leaves_everything():
    """And says that nothing left; the next call hands the same items over."""
    summarize = Overloaded(1)
    history = History([[text] for text in "abcd"], summarize=summarize)

    failed = history.trim(to=1)
    between = history[:]
    done = history.trim(to=1)

    assert (0, 4) == (failed, done)
    assert [["a"], ["b"], ["c"], ["d"]] == between
    assert [["a", "b", "c", "d"]] == history


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, SystemExit])
def test_an_interrupted_summarizer_loses_nothing(error):
    """The interruption reaches whoever appended, and the items stay."""
    summarize = Overloaded(1, error=error)
    history = History([["a"], ["b"]], maxlen=2, summarize=summarize)

    with pytest.raises(error):
        history.append(["c"])
    between = history[:]
    history.append(["d"])

    assert [["a"], ["b"], ["c"]] == between
    assert [["a", "b", "c"], ["d"]] == history


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("on_trim", [True, False])
def test_a_history_that_nothing_summarizes_grows_to_four_times_its_bound(limits, on_trim, caplog):
    """Beyond it the oldest items go to ``on_trim``, are logged, and are counted."""
    told = []
    hook = {"on_trim": told.extend} if on_trim else {}
    history = History([["s"]], keep_first=1, summarize=Overloaded(*range(999)), **hook, **limits)

    for number in range(60):
        history.append([str(number)])

    assert 4 * 6 == len(history)
    assert [["s"], *([str(number)] for number in range(37, 60))] == history
    assert 37 == history.given_up
    assert ([[str(number)] for number in range(37)] if on_trim else []) == told
    assert "has outgrown 4 times its limits, because no summary could be made" in caplog.text


def test_what_is_given_up_is_gone_even_if_its_hook_fails(caplog):
    """As with any trim: that is logged and counted, and the bound of four windows holds."""

    def on_trim(dropped):
        raise OSError("disk full")

    history = History(maxlen=2, summarize=Overloaded(*range(99)), on_trim=on_trim)

    for number in range(12):
        history.append([number])

    assert [[number] for number in range(4, 12)] == history
    assert 4 == history.given_up
    assert "on_trim failed, and what it was handed is gone" in caplog.text


def test_what_falls_out_while_a_summarizer_fails_stays_in_order():
    """Also what it appends itself, and what other threads do."""
    calls = []

    def summarize(dropped):
        calls.append(dropped)
        if len(calls) == 1:
            history.extend([["x"], ["y"]])
            raise TimeoutError
        return [text for item in dropped for text in item]

    history = History([["a"], ["b"], ["c"]], maxlen=3, summarize=summarize)

    history.append(["d"])
    between = history[:]
    history.append(["e"])

    assert [["a"], ["b"], ["c"], ["d"], ["x"], ["y"]] == between
    assert [["a", "b", "c", "d", "x"], ["y"], ["e"]] == history


def test_a_conversation_that_was_cleared_while_its_summarizer_failed_is_over():
    """Its items do not come back into the next one."""

    def summarize(dropped):
        history.clear()
        history.append("new")
        raise TimeoutError

    history = History(maxlen=3, summarize=summarize)

    history.extend("abcd")

    assert ["new"] == history


def test_a_summary_counts_against_the_limit():
    """What it pushes out is handed over with the next trim, so nothing is missing from the summary in the end."""
    handed = []

    def summarize(dropped):
        handed.append(dropped)
        return "SSS"

    history = History(max_tokens=6, count_tokens=len, summarize=summarize)

    history.extend(["aa", "bb", "cc"])
    history.append("d")
    once = history[:]
    history.append("e")
    history.append("f")

    assert ["SSS", "cc", "d"] == once
    assert ["SSS", "d", "e", "f"] == history
    assert [["aa"], ["SSS", "bb", "cc"]] == handed
    assert 6 == history.tokens


def test_a_summary_that_can_never_fit_is_left_out(caplog):
    """A summarizer that only joins is told so, and what it was to sum up stays, as if it had failed."""
    calls = []

    def summarize(dropped):
        calls.append(dropped)
        return "S" * 50

    history = History(["s"], max_tokens=6, count_tokens=len, keep_first=1, summarize=summarize)

    history.extend(["aaa", "bbb"])

    assert ["s", "aaa", "bbb"] == history
    assert [["aaa"]] == calls
    assert 1 == history.hook_errors
    assert "a summary of 50 tokens does not fit into 6 beside 1 of the kept items" in caplog.text


def test_a_summary_gives_way_to_a_long_newest_item_and_comes_back():
    """It waits while one long message takes all the room, and the next summary knows it."""
    handed = []

    def summarize(dropped):
        handed.append(dropped)
        return f"S{len(handed)}"

    history = History(max_tokens=6, count_tokens=len, summarize=summarize)

    history.extend(["aaa", "bbb", "c"])
    summary = history[:]
    history.append("L" * 6)
    long = history[:]
    history.append("d")

    assert ["S1", "bbb", "c"] == summary
    assert ["LLLLLL"] == long
    assert ["S3", "d"] == history
    assert [["aaa"], ["S1", "bbb", "c"], ["S2", "LLLLLL"]] == handed


def test_an_emptied_history_hears_nothing_of_the_conversation_before():
    """A summary that is ready only after ``clear()`` is dropped."""

    def summarize(dropped):
        history.clear()
        history.append("new")
        return joined(dropped)

    history = History(maxlen=3, summarize=summarize)

    history.extend("abcd")

    assert ["new"] == history


def test_summaries_work_with_no_room_to_spare():
    """The smallest bound that there can be: a summary and the newest."""
    history = History(maxlen=2, summarize=len)

    history.extend("abcd")
    history.append("e")

    assert [2, "e"] == history


@pytest.mark.parametrize("name", ["on_trim", "summarize"])
def test_a_hook_that_returns_an_awaitable_is_refused(name, caplog):
    """Nothing would await it: it is closed, logged and counted."""

    async def work():
        raise AssertionError("nobody runs this")

    history = History("abc", maxlen=3, **{name: lambda dropped: work()})

    history.append("d")

    assert "d" == history[-1]
    assert 1 == history.hook_errors
    assert f"{name} must do its work when called" in caplog.text


async def test_a_hook_that_returns_a_future_is_refused(caplog):
    """A task is an awaitable, too."""
    future = asyncio.get_running_loop().create_future()
    history = History("abc", maxlen=3, summarize=lambda dropped: future)

    history.append("d")

    assert ["a", "b", "c", "d"] == history
    assert "which nothing would await" in caplog.text


# Trimming by hand.


@pytest.mark.parametrize(
    ("to", "left"), [(3, "sde"), ("50%", "sde"), (0, "s"), (1, "s"), ("0%", "s"), (99, "sabcde"), ("100%", "sabcde")]
)
def test_it_can_be_trimmed_to_a_number_or_a_share(to, left):
    """``trim`` drops the oldest, never the kept ones, and tells."""
    told = []
    history = History("sabcde", keep_first=1, on_trim=told.extend)

    dropped = history.trim(to=to)

    assert list(left) == history
    assert 6 - len(left) == dropped == len(told)


@pytest.mark.parametrize("to", [-1, "half", "101%", "", "5"])
def test_a_target_that_makes_no_sense_is_refused(to):
    """``trim`` says what it wants."""
    with pytest.raises(ValueError, match="number of items to leave, or a share") as caught:
        History("ab").trim(to=to)

    assert repr(to) in str(caught.value)


@pytest.mark.parametrize("to", [1.5, None, True])
def test_a_target_of_another_kind_is_refused(to):
    """``trim`` takes whole numbers and text."""
    with pytest.raises(TypeError, match="number of items to leave, or a share"):
        History("ab").trim(to=to)


# A list to everybody.


def test_it_is_a_list_to_everybody():
    """What checks, compares, prints or encodes a list does not notice."""
    items = [1, "two", [3]]
    history = History(items, maxlen=10, max_bytes="1MiB")

    assert isinstance(history, list)
    assert items == history
    assert history == items
    assert repr(items) == repr(history)
    assert json.dumps(items) == json.dumps(history)
    assert orjson.dumps(items) == orjson.dumps(history)
    assert msgspec.json.encode(items) == msgspec.json.encode(history)
    assert msgspec.msgpack.encode(items) == msgspec.msgpack.encode(history)
    assert sorted("cba") == sorted(History("cba"))
    with pytest.raises(TypeError, match="unhashable"):
        hash(history)


@pytest.mark.parametrize(
    "make", [lambda h: h.copy(), lambda h: h[1:], lambda h: h.__add__([4]), lambda h: h * 2, lambda h: 2 * h]
)
def test_what_a_list_makes_of_itself_is_a_plain_list(make):
    """Slices, copies, sums and products are unbounded, as for any subclass of list."""
    expected = make([1, 2, 3])

    actual = make(History([1, 2, 3], maxlen=3))

    assert expected == actual
    assert list is type(actual)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda h: h.pop(99),
        lambda h: History().pop(),
        lambda h: h.remove("x"),
        lambda h: h.__setitem__(99, 1),
        lambda h: h.__setitem__("a", 1),
        lambda h: h.__setitem__(slice(0, 2), 5),
        lambda h: h.__setitem__(slice(None, None, 2), [1]),
        lambda h: h.__delitem__(99),
        lambda h: h.__delitem__("a"),
        lambda h: h.insert("a", 1),
        lambda h: h.extend(5),
        lambda h: h.__imul__("a"),
        lambda h: h.sort(key=lambda item: item.nothing),
        lambda h: h.__init__(5),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"maxlen": 3}, {"max_tokens": 100, "count_tokens": lambda item: 1}])
def test_what_a_list_refuses_is_refused_and_changes_nothing(wrong, limits):
    """Errors are a list's own, and the weights stay in step."""
    plain, history = [1, 2, 3], History([1, 2, 3], **limits)
    with pytest.raises(Exception) as expected:
        wrong(plain)

    with pytest.raises(expected.type):
        wrong(history)

    assert plain == history
    assert (len(plain) if "max_tokens" in limits else None) == history.tokens


def test_it_is_sorted_and_turned_around_as_a_list():
    """``sort`` is stable, takes a key, and the weights follow their items."""
    words = ["ccc", "a", "bb", "A", "dd"]
    history = History(words, max_tokens=9, count_tokens=len)

    history.sort(key=len, reverse=True)
    ordered = history[:]
    history.reverse()
    history.append("z")

    assert sorted(words, key=len, reverse=True) == ordered
    assert ["a", "dd", "bb", "ccc", "z"] == history
    assert 9 == history.tokens


def test_sorting_notices_a_change_meanwhile():
    """As a list, it says so, and loses nothing."""
    history = History([2, 1])

    def key(item):
        history.append(0)
        return item

    with pytest.raises(ValueError, match="list modified during sort"):
        history.sort(key=key)

    assert [2, 1, 0, 0] == history


def test_removing_survives_items_whose_comparison_changes_the_list():
    """What equals is looked for with no lock held, and found again if it moved."""

    class Sly:
        def __eq__(self, other):
            if len(history) == 3:
                history.insert(0, "first")
            return other == "sly"

        __hash__ = None

    sly = Sly()
    history = History(["a", sly, "b"])

    history.remove("sly")

    assert ["first", "a", "b"] == history


def test_it_can_be_weakly_referenced():
    """So an evicted history that somebody holds is found again."""
    history = History()

    assert history is weakref.ref(history)()


def test_the_constructor_called_again_replaces_the_items():
    """Limits that are given replace the earlier ones; with none given they stay."""
    history = History("abc", maxlen=3)

    history.__init__("defgh")
    kept = history[:]
    history.__init__("defgh", maxlen=4)

    assert ["f", "g", "h"] == kept
    assert ["e", "f", "g", "h"] == history


# Copies.


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_survives_pickling_with_its_limits_and_named_hooks(protocol):
    """What is loaded is bounded as before, and its items are counted."""
    history = History(
        ["s", "aaa", "b"], maxlen=4, keep_first=1, max_tokens=5, count_tokens=number_of_letters, summarize=shortest
    )

    loaded = pickle.loads(pickle.dumps(history, protocol))
    same, tokens = loaded == history, loaded.tokens
    loaded.append("c")

    assert same
    assert History is type(loaded)
    assert 5 == tokens
    assert ["s", "aaa", "b"] == history
    assert ["s", "aaa", "c"] == loaded  # the summary is the dropped "aaa" itself, and "b" had to make room for it
    assert 5 == loaded.tokens


@pytest.mark.parametrize("hook", [lambda dropped: None, [].extend, Owner().archive])
def test_hooks_that_pickle_cannot_name_stay_behind(hook):
    """A history with a lambda or a method is pickled as the list it stands in for was."""
    one = {"count_tokens": lambda item: 1, "getsizeof": lambda item: 1}
    history = History("ab", maxlen=2, on_trim=hook, max_tokens=9, max_bytes=9, **one)

    loaded = pickle.loads(pickle.dumps(history))
    loaded.append("c")

    assert ["b", "c"] == loaded
    assert (None, None) == (loaded.tokens, loaded.nbytes)


def test_the_bytes_are_bounded_after_pickling():
    """The default measure needs no function to travel."""
    loaded = pickle.loads(pickle.dumps(History(["a" * 100], max_bytes="1KiB")))

    loaded.extend("b" * 400 for _ in range(3))

    assert ["b" * 400, "b" * 400] == loaded
    assert sum(map(sizeof, loaded)) == loaded.nbytes


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_copy_has_the_limits_and_hooks_and_a_life_of_its_own(make):
    """What the copy drops is the copy's, and neither counts by the other's weights."""
    told = []
    history = History([["a"], ["b"]], maxlen=2, max_tokens=9, count_tokens=len, on_trim=told.extend)

    twin = make(history)
    twin.append(["c"])

    assert [["a"], ["b"]] == history
    assert [["b"], ["c"]] == twin
    assert (2, 2) == (history.tokens, twin.tokens)
    assert (make is copy.copy) is (twin[0] is history[1])
    assert [["a"]] == told


def test_a_hook_that_is_a_method_follows_a_deep_copy_of_its_owner():
    """The copy's messages are archived by the copy."""
    owner = Owner()
    twin = copy.deepcopy(owner)

    twin.messages.extend([1, 2, 3])

    assert [1] == twin.archived
    assert [] == owner.archived


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_a_copy_knows_its_summary(make):
    """The next summary of a copy takes the place of the one that it came with."""
    history = History([["a"], ["b"], ["c"]], maxlen=3, summarize=concatenated)
    history.append(["d"])

    twin = make(history)
    twin.append(["e"])

    assert [["a", "b"], ["c"], ["d"]] == history
    assert [["a", "b", "c"], ["d"], ["e"]] == twin


def concatenated(dropped):
    return [letter for letters in dropped for letter in letters]


# Subclasses.


def test_a_users_subclass_of_list_keeps_its_ways():
    """Attributes, slots and methods stay; what writes with ``super()`` is bounded."""
    source = Tagged([1, 2, 3], tag="mine")
    kind = history_type(Tagged)

    history = kind(source, maxlen=2)
    history.append(4)
    other = history.tagged("other")

    assert [3, "4"] == history
    assert "mine" == history.tag
    assert isinstance(history, Tagged)
    assert isinstance(history, History)
    assert ("other", [3, "4"], kind) == (other.tag, other, type(other))


def test_the_class_of_a_subclass_is_made_once_and_not_kept():
    """Classes that are made and thrown away leave nothing behind."""
    passing = type("Passing", (list,), {})

    kind = history_type(passing)
    again = history_type(passing)
    gone = weakref.ref(kind)
    same = kind is again
    del passing, kind, again
    gc.collect()

    assert same
    assert gone() is None


def test_a_history_needs_no_other_class():
    """``list`` and histories are what they are."""
    assert History is history_type(list)
    assert history_type(Tagged) is history_type(history_type(Tagged))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_users_subclass_of_list_survives_pickling(protocol):
    """The combined class has no name of its own, and is found by the user's."""
    history = history_type(Tagged)(Tagged("ab", tag="mine"), maxlen=2)

    loaded = pickle.loads(pickle.dumps(history, protocol))
    loaded.append("c")

    assert ["b", "c"] == loaded
    assert "mine" == loaded.tag
    assert type(history) is type(loaded)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_users_subclass_of_list_survives_copying(make):
    """A copy is bounded and has the attributes."""
    history = history_type(Tagged)(Tagged("ab", tag="mine"), maxlen=2)

    twin = make(history)
    twin.append("c")

    assert (["a", "b"], ["b", "c"], "mine") == (history, twin, twin.tag)


class Rebuilt(list):
    """A list that says by itself how it is pickled."""

    def __reduce__(self):
        return Rebuilt, (list(self),)


def test_a_subclass_that_pickles_itself_is_left_to_it():
    """Its own class is what comes back."""
    loaded = pickle.loads(pickle.dumps(history_type(Rebuilt)(Rebuilt("abc"), maxlen=2)))

    assert (Rebuilt, ["b", "c"]) == (type(loaded), loaded)


# Wrong arguments.


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"maxlen": 0}, "maxlen must be at least 1; found 0"),
        (
            {"maxlen": 2, "keep_first": 2},
            "room for the keep_first=2 kept items and one more item.* at least 3; found 2",
        ),
        ({"maxlen": 1, "summarize": len}, "a summary and one more item, so be at least 2; found 1"),
        ({"keep_first": -1}, "keep_first must be at least 0; found -1"),
        ({"max_tokens": 0, "count_tokens": len}, "max_tokens must be at least 1; found 0"),
        ({"max_tokens": 5}, "max_tokens and count_tokens go together"),
        ({"count_tokens": len}, "max_tokens and count_tokens go together"),
        ({"getsizeof": len}, "getsizeof measures for max_bytes; found no max_bytes"),
        ({"max_bytes": "5 parsecs"}, "max_bytes must be at least 1.*found '5 parsecs'"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits, message):
    """What was wanted, what was found, what to do."""
    with pytest.raises(ValueError, match=message):
        History(**limits)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"maxlen": "5"}, "maxlen must be a whole number; found '5'"),
        ({"maxlen": True}, "maxlen must be a whole number; found True"),
        ({"keep_first": None}, "keep_first must be a whole number; found None"),
        ({"max_tokens": 1.5, "count_tokens": len}, "max_tokens must be a whole number"),
        ({"on_trim": "archive"}, "on_trim must be a function; found 'archive'"),
        ({"summarize": asyncio.sleep}, "summarize must be an ordinary function.*async"),
        ({"nothing": 1}, "nothing"),
    ],
)
def test_limits_of_another_kind_are_refused(limits, message):
    """At construction, not when the first item falls out."""
    with pytest.raises(TypeError, match=message):
        History(**limits)


# Threads.


def hammer(work, threads=8):
    """Run *work(number)* in threads at once, and raise what they raised."""
    errors = []
    start = threading.Barrier(threads)

    def run(number):
        try:
            start.wait(WAIT)
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in running)
    if errors:
        raise errors[0]


@pytest.mark.parametrize(
    "limits",
    [{"maxlen": 10}, {"max_tokens": 10, "count_tokens": lambda item: 1}, {"maxlen": 10, "max_bytes": "1MiB"}],
    ids=["maxlen", "tokens", "both"],
)
def test_eight_threads_lose_nothing(limits):
    """The bound holds at rest, nothing is raised, and each item is kept or told exactly once."""
    told = []
    history = History(on_trim=told.extend, keep_first=1, **limits)
    history.append("system")

    def work(thread):
        for number in range(300):
            if number % 50 == 0:
                history.extend((thread, number, part) for part in range(3))
            else:
                history.append((thread, number))

    hammer(work)

    kept = history[1:]
    assert "system" == history[0]
    assert 10 == len(history)
    assert 8 * (294 + 6 * 3) == len(kept) + len(told) == len({*kept, *told})


@pytest.mark.parametrize("limits", [{"maxlen": 10}, {"max_tokens": 10, "count_tokens": lambda item: 1}])
def test_eight_threads_that_write_anywhere_lose_nothing(limits):
    """Inserting, popping, replacing and turning around in all places at once: each item is somewhere, once."""
    told, taken = [], []
    history = History(on_trim=told.extend, **limits)
    put = [0] * 8

    def work(thread):
        for number in range(0, 300, 2):
            history.append((thread, number))
            history.insert(1, (thread, number + 1))
            put[thread] += 2
            if number % 6 == 0:
                history.reverse()
            if number % 10 == 0:
                taken.append(history.pop())

    hammer(work)

    assert 10 >= len(history)
    everything = [*history, *told, *taken]
    assert sum(put) == len(everything) == len(set(everything))
    assert (len(history) if "max_tokens" in limits else None) == history.tokens


def test_the_bound_holds_at_rest_without_hooks():
    """The fast way in: nobody is to be told, nothing to be counted."""
    history = History(maxlen=10)

    hammer(lambda thread: [history.append(number) for number in range(2_000)])

    assert 10 == len(history)


def test_what_falls_out_while_a_hook_runs_is_told_by_its_thread():
    """One hook at a time, in order; meanwhile the others go on and the bound holds."""
    told = []
    entered, leave = threading.Event(), threading.Event()

    def on_trim(dropped):
        told.append(dropped)
        entered.set()
        assert leave.wait(WAIT)

    history = History([0], maxlen=1, on_trim=on_trim)
    slow = threading.Thread(target=history.append, args=(1,), daemon=True)
    slow.start()
    assert entered.wait(WAIT)

    history.extend([2, 3])
    meanwhile = history[:], told[:]
    leave.set()
    slow.join(WAIT)

    assert ([3], [[0]]) == meanwhile
    assert [[0], [1, 2]] == told


def test_who_finds_the_broom_taken_goes_on():
    """An append does not wait for another thread's change; the holder sweeps when it is done."""
    history = History("abc", maxlen=3)
    held, release = threading.Event(), threading.Event()

    def change():
        with history._hygiene.lock:
            held.set()
            assert release.wait(WAIT)
        history.reverse()

    other = threading.Thread(target=change, daemon=True)
    other.start()
    assert held.wait(WAIT)
    history.extend("de")
    meanwhile = history[:]
    release.set()
    other.join(WAIT)

    assert ["a", "b", "c", "d", "e"] == meanwhile
    assert 3 == len(history)


@pytest.mark.parametrize("new", ["d", "de"])
def test_a_finalizer_in_the_middle_of_a_trim_only_adds(new):
    """A garbage collection may run code in our own thread between any two lines: it must not trim what we trim."""
    history = History("abc", maxlen=3)

    with history._hygiene.lock:
        history._hygiene.sweeping = True
        history.extend(new)
        meanwhile = len(history)
        history._hygiene.sweeping = False
    history.append("f")

    assert 3 + len(new) == meanwhile
    assert [*"abc", *new, "f"][-3:] == history


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have():
    """The lock may be held, and a hook be running, in a thread that was left behind."""
    told = []
    history = History(range(3), maxlen=3, on_trim=told.extend)
    held, release = threading.Event(), threading.Event()

    def hold():
        with history._hygiene.lock:
            history._hygiene.teller = threading.get_ident()
            held.set()
            release.wait(WAIT)
            history._hygiene.teller = None

    holder = threading.Thread(target=hold, daemon=True)
    holder.start()
    assert held.wait(WAIT)
    child = os.fork()
    if child == 0:
        history.append(3)
        history.insert(0, 4)
        os._exit(0 if (history, told) == ([1, 2, 3], [0, 4]) else 1)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        release.set()
        holder.join(WAIT)

    assert 0 == os.waitstatus_to_exitcode(status)


def test_a_deque_beside_it_does_the_same():
    """A deque bounds itself: with *maxlen* alone, both end alike."""
    history, window = History(maxlen=7), deque(maxlen=7)

    for target in (history, window):
        target.extend(islice(count(), 50))

    assert list(window) == history


@pytest.mark.slow
def test_on_real_traffic_each_user_has_the_last_fifty_messages(real_data):
    """221,056 messages of 17,777 users: every history ends as a deque of that length does."""
    histories, windows = {}, {}

    with gzip.open(real_data / "irc_messages.jsonl.gz") as log:
        for line in log:
            message = json.loads(line)
            user, text = message["user"], message["text"]
            histories.setdefault(user, History(maxlen=50)).append(text)
            windows.setdefault(user, deque(maxlen=50)).append(text)

    assert 17_777 == len(histories)
    assert {user: list(window) for user, window in windows.items()} == histories


# What CPython asks of its own lists.


class Unbounded(History):
    """No limits."""


class Roomy(History):
    """Limits that are never reached."""

    def __init__(self, source=()):
        super().__init__(source, maxlen=1_000_000, max_tokens=1_000_000, count_tokens=lambda item: 1)


class TestUnboundedLikeCPythons(list_tests.CommonTest):
    """A history without limits passes CPython's tests of lists."""

    type2test = Unbounded


class TestWeighedLikeCPythons(list_tests.CommonTest):
    """A history that counts passes CPython's tests of lists."""

    type2test = Roomy


# The laws, against a plain list.


class AgainstAList(RuleBasedStateMachine):
    """Items are kept or told, in order, and the bounds hold after each step."""

    keep_first = 0
    maxlen: int | None = None
    max_tokens: int | None = None

    def __init__(self):
        super().__init__()
        self.told = []
        self.serial = count()
        limits = {"maxlen": self.maxlen, "max_tokens": self.max_tokens, "keep_first": self.keep_first}
        if self.max_tokens is not None:
            limits["count_tokens"] = lambda item: item[1]
        self.history = History(on_trim=self.told.extend, **limits)
        self.model = []
        self.gone = []

    def trimmed(self):
        """What the window is, written down without any of its machinery."""
        model, keep = self.model, self.keep_first

        def over():
            by_length = self.maxlen is not None and len(model) > self.maxlen
            return by_length or (self.max_tokens is not None and sum(w for _, w in model) > self.max_tokens)

        while over() and len(model) > keep + 1:
            self.gone.append(model.pop(keep))

    def new(self, weight):
        return (next(self.serial), weight)

    def do(self, change):
        change(self.model)
        change(self.history)
        self.trimmed()

    weights = st.integers(0, 6)
    places = st.integers(-9, 9)

    @rule(weight=weights)
    def append(self, weight):
        item = self.new(weight)
        self.do(lambda items: items.append(item))

    @rule(weights=st.lists(weights, max_size=12), lazily=st.booleans())
    def extend(self, weights, lazily):
        new = [self.new(weight) for weight in weights]
        self.do(lambda items: items.extend(iter(new) if lazily else new))

    @rule(place=places, weight=weights)
    def insert(self, place, weight):
        item = self.new(weight)
        self.do(lambda items: items.insert(place, item))

    @rule(start=places, stop=places, weights=st.lists(weights, max_size=6))
    def replace_slice(self, start, stop, weights):
        new = [self.new(weight) for weight in weights]
        self.do(lambda items: items.__setitem__(slice(start, stop), new))

    @rule(start=places, stop=places, step=st.sampled_from([1, 2, -1]))
    def delete_slice(self, start, stop, step):
        self.do(lambda items: items.__delitem__(slice(start, stop, step)))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), weight=weights)
    def replace(self, data, weight):
        place, item = data.draw(st.integers(-len(self.model), len(self.model) - 1)), self.new(weight)
        self.do(lambda items: items.__setitem__(place, item))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def pop(self, data):
        place = data.draw(st.integers(-len(self.model), len(self.model) - 1))
        self.do(lambda items: items.pop(place))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        item = data.draw(st.sampled_from(self.model))
        self.do(lambda items: items.remove(item))

    @rule(times=st.integers(0, 3))
    def repeat(self, times):
        self.do(lambda items: items.__imul__(times))

    @rule()
    def reverse(self):
        self.do(lambda items: items.reverse())

    @rule(reverse=st.booleans())
    def sort(self, reverse):
        self.do(lambda items: items.sort(key=lambda item: item[1], reverse=reverse))

    @rule()
    def clear(self):
        self.do(lambda items: items.clear())

    @rule(to=st.integers(0, 9))
    def trim(self, to):
        while len(self.model) > max(to, self.keep_first):
            self.gone.append(self.model.pop(self.keep_first))
        self.history.trim(to=to)

    @invariant()
    def the_same_is_kept(self):
        assert self.model == self.history

    @invariant()
    def the_same_was_told(self):
        assert self.gone == self.told

    @invariant()
    def the_sum_is_right(self):
        expected = None if self.max_tokens is None else sum(weight for _, weight in self.model)

        assert expected == self.history.tokens


class ByTokens(AgainstAList):
    """With weights."""

    max_tokens = 12


class ByLengthBehindAHead(AgainstAList):
    """With kept first items."""

    maxlen, keep_first = 5, 2


class ByBothBehindAHead(AgainstAList):
    """With everything."""

    maxlen, max_tokens, keep_first = 6, 15, 1


class ByLength(AgainstAList):
    """With nothing else."""

    maxlen = 4


# Each runs a few thousand steps; what there is to find shows in far fewer.
few = settings(max_examples=40)
for machine in (ByLength, ByLengthBehindAHead, ByTokens, ByBothBehindAHead):
    machine.TestCase.settings = few

TestByLength = ByLength.TestCase
TestByLengthBehindAHead = ByLengthBehindAHead.TestCase
TestByTokens = ByTokens.TestCase
TestByBothBehindAHead = ByBothBehindAHead.TestCase


def test_what_a_history_is_made_without_is_anything_to_a_type_checker():
    """And not nothing, which no append would fit into. What the checkers say is in `typing_tests`."""
    without, hooked, filled = get_overloads(History.__init__)

    assert "History[Any]" == without.__annotations__["self"]
    assert {"on_trim", "summarize"} <= hooked.__annotations__.keys()
    assert "Iterable[T]" == filled.__annotations__["source"]


class WithSummaries(RuleBasedStateMachine):
    """Whatever the summarizer returns, bounds hold and each item is kept, summarized or yet to be."""

    def __init__(self):
        super().__init__()
        self.serial = count()
        self.size = 1
        self.put = 0
        self.history = History(
            maxlen=5, max_tokens=20, count_tokens=lambda item: item[1], keep_first=1, summarize=self.summarize
        )
        self.history.append(((-1,), 1))

    def summarize(self, dropped):
        return tuple(serial for serials, _ in dropped for serial in serials), self.size

    @rule(weight=st.integers(0, 9), size=st.integers(0, 18))
    def append(self, weight, size):
        self.size = size
        self.history.append(((next(self.serial),), weight))
        self.put += 1

    @rule(weights=st.lists(st.integers(0, 9), max_size=9))
    def extend(self, weights):
        self.history.extend([((next(self.serial),), weight) for weight in weights])
        self.put += len(weights)

    @invariant()
    def the_bounds_hold(self):
        assert 5 >= len(self.history)
        assert 20 >= self.history.tokens
        assert ((-1,), 1) == self.history[0]

    @invariant()
    def nothing_is_missing(self):
        waiting = self.history._hygiene.untold
        known = sorted(serial for serials, _ in [*self.history, *waiting] for serial in serials)

        assert list(range(-1, self.put)) == known


TestWithSummaries = WithSummaries.TestCase
