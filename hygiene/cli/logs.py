"""Reading logs of messages and access traces: what can be used is yielded, the rest is counted and named."""

from __future__ import annotations

import gzip
import zlib
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import msgspec

from hygiene.errors import HygieneError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

__all__ = ["TIME_FIELDS", "InputError", "Log", "Message", "Skipped"]

TIME_FIELDS = ("ts", "time", "timestamp", "date", "created_at")
TEXT_FIELDS = ("text", "content", "message", "body")
_LATEST = 1e11
"""Seconds since 1970 stay below this until the year 5138: a larger number counts milliseconds, or smaller units."""
LONGEST_LINE = 16 * 2**20
"""Bytes of a line that are read. A longer line is skipped: a small compressed file may hold gigabytes in one."""
NAMED_LINES = 5
"""How many broken lines are named: enough to see the pattern, few enough to read."""


class InputError(HygieneError, ValueError):
    """The command cannot do what was asked with what it was given; told in one sentence, without a traceback."""


class Message(NamedTuple):
    """
    One message, or one access of a trace.

    Args:
        key: Who it belongs to: text or a whole number.
        when: Seconds since 1970 by the log's own clock, never less than the one before; 0 where the log has no time.
        text: What was said; empty in a trace.
    """

    key: str | int
    when: float
    text: str


class Skipped(msgspec.Struct, frozen=True):
    """A line that could not be used, by its number (from 1) and the reason."""

    line: int
    why: str


class Log:
    """
    The messages of a file, one at a time: JSON lines, or a trace with one key a line; plain or gzip.

    The format is taken from the content, not from the name. Iterating holds one line at a time, so a log may be
    larger than the memory. The time is read from the fields ``day`` and ``minute``, otherwise from the first of ``ts``,
    ``time``, ``timestamp``, ``date`` and ``created_at`` that is there: seconds, milli-, micro- or nanoseconds since
    1970, or ISO 8601, UTC where it names no zone. A time before the one of an earlier message counts as that one.

    Each iteration starts anew. Not safe to iterate twice at once.

    Args:
        path: The file.
        key: The field that tells conversations apart. A trace has no fields and does not need it.
        timed: A line without a time cannot be used, because a time limit will be applied.
        allow_trace: Also read a file whose lines are keys and not JSON objects.

    Raises:
        InputError: There is no such file, it cannot be read, or (while iterating) no line of it can be used.
    """

    def __init__(
        self, path: str | PathLike[str], *, key: str = "user", timed: bool = False, allow_trace: bool = False
    ) -> None:
        self.path = Path(path)
        self.key = key
        self.timed = timed
        try:
            # A pipe's content would be gone after a look at it, and a replay reads its log twice.
            if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
                raise InputError(
                    f"wanted a file that can be read twice, found that '{path}' is none. Save its content to a file"
                )
            with self.path.open("rb") as raw:
                self._compressed = raw.read(2) == b"\x1f\x8b"
            self._size = max(self.path.stat().st_size, 1)
            self.is_trace = allow_trace and self._looks_like_a_trace()
        except OSError as problem:
            raise InputError(
                f"wanted a log to read, found that '{self.path}' cannot be opened ({problem.strerror or problem}). "
                "Check the path"
            ) from problem
        self._reset()

    def _reset(self) -> None:
        self._raw: IO[bytes] | None = None
        self.messages = 0
        self.lines = 0
        self.skipped = 0
        self.first_skipped: list[Skipped] = []
        self.out_of_order = 0
        self.has_time = False
        self.has_text = False
        self._clock = 0.0
        self._untimed = 0
        self._fields: tuple[str, ...] | None = None

    @property
    def progress(self) -> float:
        """How much of the file has been read, from 0 to 1."""
        if self._raw is None:
            return 0.0
        return 1.0 if self._raw.closed else min(self._raw.tell() / self._size, 1.0)

    def __iter__(self) -> Iterator[Message]:
        self._reset()
        read = self._read_trace if self.is_trace else self._read_json
        with self.path.open("rb") as self._raw:
            for message in read(self._lines(self._raw)):
                self.messages += 1
                yield message
        if not self.messages:
            raise InputError(self._why_nothing())

    def _looks_like_a_trace(self) -> bool:
        with self.path.open("rb") as raw:
            try:
                head = [line for line in self._head(raw) if line.strip()]
            except (EOFError, zlib.error):
                return False
        # One object among the first lines makes it a log, so that a log with a broken first line stays one.
        if not head or any(line.lstrip(b"\xef\xbb\xbf \t")[:1] == b"{" for line in head):
            return False
        if (other := _other_format(head)) is not None:
            raise InputError(
                f"'{self.path}' is {other}. Give a log of messages (JSON lines), or a trace with one key a line"
            )
        return True

    def _head(self, raw: IO[bytes]) -> list[bytes]:
        stream = gzip.GzipFile(fileobj=raw) if self._compressed else raw
        return stream.read(65_536).splitlines()[:20]

    def _lines(self, raw: IO[bytes]) -> Iterator[bytes]:
        stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if self._compressed else raw
        while True:
            try:
                line = stream.readline(LONGEST_LINE)
                if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                    while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                    self.lines += 1
                    self._skip(f"longer than {LONGEST_LINE >> 20} MiB")
                    continue
                if not line:
                    return
            except (EOFError, OSError, zlib.error) as problem:
                # A log that was copied while it was being written ends in the middle: what came before is good.
                self.lines += 1
                self._skip(f"the file cannot be read any further ({problem})")
                return
            self.lines += 1
            if line.strip():
                yield line

    def _read_trace(self, lines: Iterator[bytes]) -> Iterator[Message]:
        for line in lines:
            yield Message(line.decode(errors="backslashreplace").strip(), 0.0, "")

    def _read_json(self, lines: Iterator[bytes]) -> Iterator[Message]:
        decode = msgspec.json.Decoder().decode
        for line in lines:
            try:
                record = decode(line.lstrip(b"\xef\xbb\xbf") if self.lines == 1 else line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
                self._skip(f"not JSON ({problem})")
                continue
            try:
                yield self._message(record, line)
            except _Unusable as problem:
                self._skip(str(problem))

    def _message(self, record: Any, line: bytes) -> Message:
        if not isinstance(record, dict):
            raise _Unusable(f"wanted a JSON object, found {_kind(record)}")
        if self._fields is None:
            self._fields = tuple(record)
        key = record.get(self.key)
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            found = f"found {_kind(key)}" if self.key in record else "which is missing"
            raise _Unusable(f"wanted text or a whole number in the field {self.key!r}, {found}")
        when = self._when(record)
        for field in TEXT_FIELDS:
            text = record.get(field)
            if isinstance(text, str):
                self.has_text = True
                return Message(key, when, text)
        # A bot that is sent something else keeps the message as it came.
        return Message(key, when, line.decode(errors="replace"))

    def _when(self, record: dict[str, Any]) -> float:
        try:
            when = _instant_of(record)
        except (ValueError, OverflowError) as problem:
            if self.timed:
                self._untimed += 1
                raise _Unusable(str(problem)) from None
            return self._clock
        self.has_time = True
        if when < self._clock:
            self.out_of_order += 1
            return self._clock
        self._clock = when
        return when

    def _skip(self, why: str) -> None:
        self.skipped += 1
        if len(self.first_skipped) < NAMED_LINES:
            self.first_skipped.append(Skipped(self.lines, why))

    def _why_nothing(self) -> str:
        if not self.first_skipped:
            return f"wanted messages, found none: '{self.path}' is empty. Check that it is the right file"
        first = self.first_skipped[0]
        summary = f"found none in the {self.lines:,} lines of '{self.path}'; line {first.line}: {first.why}"
        if self._fields is None:
            example = f'{{"{self.key}": ..., "text": ...}}'
            return f"wanted JSON lines, one {example} a line, {summary}. Check that it is the right file"
        fields = ", ".join(self._fields) or "none"
        if self._untimed:
            return (
                f"wanted messages with a time, because --idle was given, {summary}. Fields there: {fields}. "
                "Leave out --idle, or add one of these fields to the log"
            )
        return (
            f"wanted messages with the field {self.key!r}, {summary}. Fields there: {fields}. "
            "Name the one that tells conversations apart with --key"
        )


def _other_format(head: list[bytes]) -> str | None:
    """What the first lines of a file are, if they are no keys of a trace; ``None`` if they may be."""
    if any(byte < 9 or 13 < byte < 32 for line in head for byte in line):  # noqa: PLR2004 - control characters
        return "a binary file"
    for separator, name in ((b",", "comma"), (b"\t", "tab"), (b";", "semicolon")):
        columns = {line.count(separator) for line in head}
        if len(head) > 1 and len(columns) == 1 and columns != {0}:
            return f"a table with {name}-separated columns"
    if sum(len(line.split()) > 2 for line in head) * 2 > len(head):  # noqa: PLR2004 - more than a name and a surname
        return "a text with several words in a line"
    return None


class _Unusable(Exception):
    """This line cannot be used; the reason is the message."""


def _instant_of(record: dict[str, Any]) -> float:
    if "day" in record and "minute" in record:
        day, minute = record["day"], record["minute"]
        if isinstance(day, str) and isinstance(minute, (int, float)):
            return _midnight(day) + 60.0 * minute
        raise ValueError(f"wanted a time in the fields day and minute, found {day!r} and {minute!r}")
    for field in TIME_FIELDS:
        if field in record:
            return _instant(record[field], field)
    raise ValueError(f"wanted a time in the fields day and minute, or in one of {', '.join(TIME_FIELDS)}, found none")


@lru_cache(maxsize=8)  # a log stays on one day for thousands of lines
def _midnight(day: str) -> float:
    return _instant(day, "day")


def _instant(value: object, field: str) -> float:
    """Seconds since 1970."""
    problem = f"wanted a time in the field {field!r}, as seconds since 1970 or ISO 8601, found {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(problem)  # noqa: TRY004  # it came out of a file, where a wrong type is a wrong value
    # Eight digits are a day (20240131). Any other number is one, even as text: Slack writes "1712345678.000200".
    if isinstance(value, str) and not (len(value) == len("20240131") and value.isdigit()):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(problem) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not isfinite(value) or value < 0:
        raise ValueError(problem)
    while value > _LATEST:
        value /= 1000
    return float(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}")
