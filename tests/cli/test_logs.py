"""A log is read for what it is: usable lines become messages, the others are counted and named."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from hygiene.cli.logs import InputError, Log

pytestmark = pytest.mark.once

NOON = 1_700_000_000.0


@pytest.fixture
def write(tmp_path):
    """Writes a log and returns its path; objects become JSON, text stays."""

    def write(*lines, name="log.jsonl"):
        path = tmp_path / name
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def times(log):
    return [message.when for message in log]


@pytest.mark.parametrize("name", ["log.jsonl", "log.jsonl.gz"])
def test_messages_come_out_as_they_were_written(write, name):
    """Plain and compressed logs read alike."""
    path = write({"user": "ann", "text": "hi", "ts": 5}, "", {"user": 7, "text": "ho", "ts": 6}, name=name)

    assert [("ann", 5.0, "hi"), (7, 6.0, "ho")] == list(Log(path))


def test_compression_is_told_from_the_content(write, tmp_path):
    """A compressed log without .gz in its name is read."""
    write({"user": "ann", "text": "hi"}, name="log.gz").rename(tmp_path / "log")

    assert [("ann", 0.0, "hi")] == list(Log(tmp_path / "log"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"day": "2023-11-14", "minute": 1333}, NOON - 20),
        ({"ts": NOON}, NOON),
        ({"ts": "1700000000.000200"}, NOON + 0.0002),
        ({"timestamp": 1_700_000_000_000}, NOON),
        ({"timestamp": "1700000000000000"}, NOON),
        ({"time": "2023-11-14T22:13:20Z"}, NOON),
        ({"time": "2023-11-14T22:13:20"}, NOON),
        ({"created_at": "2023-11-14T23:13:20+01:00"}, NOON),
        ({"date": "20231114"}, NOON - 22 * 3600 - 13 * 60 - 20),
        ({"ts": 1.0, "time": 2.0}, 1.0),
    ],
)
def test_time_is_read_in_the_forms_logs_use(write, fields, expected):
    """Day and minute, numbers since 1970 in any unit, and ISO 8601; without a zone it is UTC."""
    path = write({"user": "ann", "text": "hi", **fields})

    assert pytest.approx([expected]) == times(Log(path, timed=True))


def test_the_clock_never_goes_back(write):
    """A message older than one before it counts as just as late, and is counted."""
    log = Log(write({"user": "a", "ts": 50}, {"user": "b", "ts": 40}, {"user": "c", "ts": 60}))

    assert ([50.0, 50.0, 60.0], 1) == (times(log), log.out_of_order)


def test_a_message_without_text_keeps_its_whole_line(write):
    """Where the log has no text field, a bot would hold the message as it came."""
    (message,) = Log(write('{"user": "ann", "emoji": ":)"}'))

    assert '{"user": "ann", "emoji": ":)"}' == message.text.rstrip("\n")


def test_broken_lines_are_counted_named_and_left_out(write):
    """Reading goes on after a broken line; the first five are kept with their number and the reason."""
    log = Log(
        write(
            {"user": "ann", "text": "first"},
            "{half a line",
            [1],
            {"text": "nobody"},
            {"user": None},
            {"user": ["a", "list"]},
            {"user": True},
            {"user": "bob", "text": "last"},
        )
    )

    assert ["first", "last"] == [message.text for message in log]
    assert (6, 8) == (log.skipped, log.lines)
    assert [2, 3, 4, 5, 6] == [broken.line for broken in log.first_skipped]
    reasons = [broken.why for broken in log.first_skipped]
    assert reasons[0].startswith("not JSON (")
    assert [
        "wanted a JSON object, found a list",
        "wanted text or a whole number in the field 'user', which is missing",
        "wanted text or a whole number in the field 'user', found null",
        "wanted text or a whole number in the field 'user', found a list",
    ] == reasons[1:]


@pytest.mark.parametrize("value", ["yesterday", None, True, -1, [1], "nan"])
def test_a_line_without_a_usable_time_is_broken_when_time_is_needed(write, value):
    """With a time limit a line without a time cannot be used; without one it can."""
    path = write({"user": "ann", "ts": 5}, {"user": "bob", "ts": value})
    timed, untimed = Log(path, timed=True), Log(path)

    assert ([5.0], 1) == (times(timed), timed.skipped)
    assert f"found {value!r}" in timed.first_skipped[0].why
    assert ([5.0, 5.0], 0) == (times(untimed), untimed.skipped)


def test_day_and_minute_must_be_a_date_and_a_number(write):
    """Fields of these names that hold something else are no time."""
    log = Log(write({"user": "a", "day": "2024-01-31", "minute": 1}, {"user": "a", "day": 3, "minute": 1}), timed=True)

    assert 1 == len(list(log))
    assert "wanted a time in the fields day and minute, found 3 and 1" == log.first_skipped[0].why


def test_a_compressed_log_that_ends_early_is_used_up_to_there(write):
    """What could be read counts; that the rest is missing is told."""
    path = write(*({"user": number, "text": os.urandom(40).hex()} for number in range(2_000)), name="log.gz")
    path.write_bytes(path.read_bytes()[:-20_000])
    log = Log(path)

    found = len(list(log))

    assert 0 < found < 2_000
    assert 1 == log.skipped
    assert "cannot be read any further" in log.first_skipped[0].why


def test_a_compressed_file_without_content_is_no_trace(write):
    """A file that ends within its first block has no lines to tell a trace by; the error comes from reading it."""
    path = write({"user": "ann"}, name="log.gz")
    path.write_bytes(path.read_bytes()[:14])

    with pytest.raises(InputError, match=r"found none in the 1 lines .* cannot be read any further"):
        list(Log(path, allow_trace=True))


def test_a_second_reading_starts_anew(write):
    """The counts are those of the last reading."""
    log = Log(write({"user": "ann", "ts": 9}, "broken"))

    assert list(log) == list(log)
    assert (1, 2, 1) == (log.messages, log.lines, log.skipped)


def test_progress_reaches_one(write):
    """The progress is the part of the file that was read, also of a compressed one."""
    log = Log(write({"user": "ann"}, name="log.gz"))
    messages = iter(log)
    before = log.progress
    next(messages)

    assert (0.0, 1.0) == (before, log.progress)


def test_a_trace_is_one_key_a_line(write):
    """A file whose lines are no objects is a trace, if traces are allowed."""
    log = Log(write("17", "", "4", "17"), allow_trace=True)

    assert ["17", "4", "17"] == [message.key for message in log]
    assert (True, False) == (log.is_trace, log.has_time)


def test_a_log_with_a_broken_first_line_is_no_trace(write):
    """One object among the first lines makes it a log."""
    log = Log(write("#header", {"user": "ann"}), allow_trace=True)

    assert ["ann"] == [message.key for message in log]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([], {}, "wanted messages, found none: .* is empty. Check"),
        (["{", "x"], {}, r"wanted JSON lines, .* found none in the 2 lines of .* line 1: not JSON"),
        (
            [{"who": "ann", "text": "hi"}],
            {},
            "wanted messages with the field 'user', .* Fields there: who, text. Name the one .* with --key",
        ),
        ([{"user": "ann"}], {"timed": True}, "wanted messages with a time, because --idle .* Leave out --idle"),
    ],
)
def test_a_log_without_any_usable_line_is_an_error(write, lines, options, message):
    """The error says what was wanted, what was found and what to do."""
    log = Log(write(*lines), **options)

    with pytest.raises(InputError, match=message):
        list(log)


def test_a_file_that_cannot_be_read_is_an_error_at_once(tmp_path):
    """A missing file and a folder are refused before anything is replayed."""
    with pytest.raises(InputError, match=r"cannot be opened \(No such file or directory\). Check the path"):
        Log(tmp_path / "missing")
    with pytest.raises(InputError, match=r"cannot be opened \(Is a directory\)"):
        Log(tmp_path)


def test_a_pipe_is_refused(tmp_path):
    """A replay reads its log twice, so it must be a file."""
    if not Path(os.devnull).exists():
        pytest.skip("this system has no devices in its file tree")
    with pytest.raises(InputError, match="wanted a file that can be read twice"):
        Log(os.devnull)
