"""The recommended numbers follow from the log by the rule that is printed with them."""

from __future__ import annotations

import json

import pytest

from hygiene.cli.logs import Log
from hygiene.cli.sizes import choose, duration

pytestmark = pytest.mark.once

MINUTE = 60.0


@pytest.fixture
def sized(tmp_path):
    """Writes (user, minute) pairs as a log and weighs it."""

    def sized(accesses, text="x" * 51):
        path = tmp_path / "log.jsonl"
        lines = (json.dumps({"user": user, "ts": MINUTE * minute, "text": text}) for user, minute in accesses)
        path.write_text("\n".join(lines))
        return choose(Log(path, allow_trace=True))

    return sized


def test_the_recommended_maxsize_is_the_smallest_near_the_best(sized):
    """Ten users in turn need room for ten: with nine nobody is ever found."""
    sizing = sized((f"u{minute % 10}", minute) for minute in range(1_000))

    assert (10, 990, 0.99) == (sizing.recommended.maxsize, sizing.recommended.hits, sizing.best_hit_ratio)


def test_the_recommended_idle_limit_keeps_the_hits(sized):
    """Users who come back after ten minutes need fifteen, the next limit people write down."""
    sizing = sized((f"u{minute % 10}", minute) for minute in range(1_000))

    assert 15 * MINUTE == sizing.recommended.idle


def test_no_idle_limit_is_recommended_where_each_would_cost_hits(sized):
    """A log with returns as far apart as it is long recommends no idle limit."""
    sizing = sized([("a", 0), ("b", 1), ("a", 100), ("b", 100)])

    assert (2, None) == (sizing.recommended.maxsize, sizing.recommended.idle)


def test_limits_as_long_as_the_log_are_not_judged(sized):
    """A log of 100 minutes says nothing about limits of two hours and more."""
    sizing = sized([("a", 0), ("b", 1), ("a", 100)])

    assert {None, 1 * MINUTE, 5 * MINUTE, 15 * MINUTE, 30 * MINUTE, 60 * MINUTE} == {
        choice.idle for choice in sizing.choices
    }


def test_large_sizes_are_rounded_up_to_two_digits(sized):
    """Nobody writes maxsize=123, and a little more room costs no hits."""
    sizing = sized((f"u{minute % 123}", minute) for minute in range(1_230))

    assert (130, 1_107) == (sizing.recommended.maxsize, sizing.recommended.hits)


def test_memory_is_the_mean_conversation_times_the_entries(sized):
    """Twice the text is about twice the memory, for the entries that a limit lets live."""
    accesses = [(f"u{minute % 10}", minute) for minute in range(1_000)]
    short, long = sized(accesses, "x" * 2_000), sized(accesses, "x" * 4_000)

    assert 1.9 < long.bytes_an_entry / short.bytes_an_entry < 2.0
    assert 10 * short.bytes_an_entry == short.recommended.memory
    assert 1 * short.bytes_an_entry == next(c.memory for c in short.choices if c.idle == MINUTE and c.maxsize == 10)


def test_a_log_in_which_nobody_comes_back_still_gets_an_answer(sized):
    """Where nothing can hit, the smallest bound is as good as any."""
    sizing = sized((f"u{minute}", minute) for minute in range(100))

    assert (0.0, 1, 0) == (sizing.best_hit_ratio, sizing.recommended.maxsize, sizing.recommended.hits)


def test_a_trace_has_no_idle_limits_and_says_what_was_measured(tmp_path):
    """A trace tells neither times nor values: only maxsize is weighed, by the registry's own bytes."""
    path = tmp_path / "trace.txt"
    path.write_text("".join(f"{number % 3}\n" for number in range(30)))

    sizing = choose(Log(path, allow_trace=True))

    assert (3, None, 27) == (sizing.recommended.maxsize, sizing.recommended.idle, sizing.recommended.hits)
    assert {None} == {choice.idle for choice in sizing.choices}
    assert "a trace does not tell" in sizing.measured


def test_progress_is_told(tmp_path):
    """A long log says how far it is."""
    path = tmp_path / "trace.txt"
    path.write_text("".join(f"{number % 50}\n" for number in range(20_000)))
    told = []

    choose(Log(path, allow_trace=True), told.append)

    assert 4 == len(told)
    assert 0 < told[0] < told[1] < told[2] < told[3] < 1


def test_the_sizes_in_the_table_reach_from_poor_to_best(sized):
    """The largest size shown is as good as no bound, and there is never more than a screen of them."""
    sizing = sized((f"u{minute % 700}", minute) for minute in range(2_100))
    shown = sorted({choice.maxsize for choice in sizing.choices})
    largest = next(choice for choice in sizing.choices if choice.maxsize == shown[-1] and choice.idle is None)

    assert [1, 2, 5, 10, 20, 50, 100, 200, 500, 700, 1_000] == shown
    assert sizing.best_hit_ratio == largest.hit_ratio


@pytest.mark.parametrize(
    ("seconds", "expected"), [(90.0, "90s"), (300.0, "5m"), (7_200.0, "2h"), (86_400.0, "1d"), (0.5, "0.5s")]
)
def test_durations_are_written_as_the_limits_take_them(seconds, expected):
    """The line to copy has the form that the decorator reads."""
    assert expected == duration(seconds)
