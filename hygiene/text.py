"""Text that a person reads in a terminal: safe to print, and with numbers that are easy to read."""

from __future__ import annotations

import re

__all__ = ["json_printable", "per_time", "plural", "printable"]

# C0 and C1 control characters, DEL, the line and paragraph separators, the characters that reverse the direction of the
# text after them, and half surrogate pairs, which no terminal encoding can write.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
_SECOND, _MINUTE, _HOUR, _DAY = 1.0, 60.0, 3_600.0, 86_400.0


def printable(text: str, *, lines: bool = False) -> str:
    """
    Return *text* with each character that could change the terminal written as an escape sequence of Python.

    Names and keys in a store, in a log and in another process are chosen by other people: an escape sequence in one
    could clear the screen, set the window's title or hide a line.

    Args:
        text: Any text.
        lines: Whether line feeds and tabs stay. By default they are escaped, because a name belongs on one line.
    """
    return (_UNSAFE_LINES if lines else _UNSAFE).sub(_escaped, text)


def json_printable(text: str) -> str:
    r"""
    Return the JSON *text* with the same characters as `printable` written as ``\uXXXX``; it means the same.

    JSON escapes only the first 32 control characters. The remaining ones occur within its strings only.
    """
    return _UNSAFE_LINES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def per_time(rate: float) -> str:
    """
    Return *rate*, in items a second, in the unit of time in which it is a readable number: ``"+18,800 a second"``.

    Args:
        rate: Items a second; negative where they become fewer.
    """
    span, unit = _DAY, "a day"
    for shorter, name in ((_SECOND, "a second"), (_MINUTE, "a minute"), (_HOUR, "an hour")):
        if abs(rate) * shorter >= 1:
            span, unit = shorter, name
            break
    number = rate * span
    whole = abs(number) >= 10 or abs(number - round(number)) < 0.05  # noqa: PLR2004 - two digits are enough
    return f"{number:+,.0f} {unit}" if whole else f"{number:+.1f} {unit}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """Return *count* with the noun that fits it: ``"1 key"``, ``"2 keys"``; *many* is *one* with an s if omitted."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
