"""Which numbers to choose: the hit ratio and the memory of each bound, from one pass over a log."""

from __future__ import annotations

import sys
from bisect import bisect_left
from typing import TYPE_CHECKING

import msgspec

from hygiene.cli.distances import ReuseProfile
from hygiene.cli.logs import InputError
from hygiene.text import plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from hygiene.cli.logs import Log, Skipped

__all__ = ["IDLES", "Choice", "Sizing", "choose", "duration"]

_MINUTE, _HOUR, _DAY = 60.0, 3_600.0, 86_400.0
IDLES = tuple(
    [minutes * _MINUTE for minutes in (1, 5, 15, 30)]
    + [hours * _HOUR for hours in (1, 2, 4, 12)]
    + [days * _DAY for days in (1, 2, 7, 14, 30, 90, 365)]
)
"""The idle limits that are told apart, in seconds: those people write down."""
_NEAR = 0.01
"""A maxsize is big enough once its hit ratio is this near to the best: the last point often costs as much
memory as all before it."""
_COVERED = 0.99
"""An idle limit is long enough once it keeps this part of the hits."""
_ENTRY_BYTES = 180
"""An entry without its key and value: about 100 bytes in a dict at its usual load, at most 80 for the order of use."""
_LIST_BYTES = sys.getsizeof([]) + 16
"""An empty list, and the garbage collector's part of it."""
_ITEM_BYTES = 9
"""A place in a list, with the eighth that lists grow ahead."""

_TELL_EVERY = 4_096
_RULE = (
    "the smallest maxsize whose hit ratio is within one point of the best, rounded up to two digits; "
    "the shortest idle limit that keeps 99 % of its hits"
)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """
    One pair of limits, and what it would have meant for this log.

    Args:
        maxsize: Entries held at most.
        idle: Seconds, or ``None`` for no limit.
        hits: Accesses that would have found their entry.
        hit_ratio: The same as a part of all accesses.
        most_held: Entries held at once, at most.
        memory: Bytes that so many entries take, estimated.
    """

    maxsize: int
    idle: float | None
    hits: int
    hit_ratio: float
    most_held: int
    memory: int


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """
    What a log says about the bounds to choose.

    Args:
        best_hit_ratio: With nothing ever dropped; the first access to each key misses even so.
        bytes_an_entry: The mean, estimated; *measured* says from what.
        choices: By maxsize, then by idle limit; *idle* is ``None`` first.
        recommended: One of the choices, or one in between.
    """

    accesses: int
    keys: int
    has_time: bool
    best_hit_ratio: float
    bytes_an_entry: int
    measured: str
    choices: list[Choice]
    recommended: Choice
    rule: str
    lines: int
    skipped: int
    first_skipped: list[Skipped]
    out_of_order: int


def choose(log: Log, tell: Callable[[float], None] = lambda progress: None) -> Sizing:
    """
    Read *log* once and weigh the bounds.

    Args:
        log: A log of messages, or a trace.
        tell: Called with the progress, from 0 to 1, every few thousand accesses.

    Raises:
        InputError: No line of the log can be used, or no key of a trace occurs twice.
    """
    profile = ReuseProfile(IDLES)
    content = key_bytes = 0
    first = last = 0.0
    for key, when, text in log:
        if log.messages == 1:
            first = when
        last = when
        known = profile.keys
        profile.access(key, when)
        if profile.keys > known:
            key_bytes += sys.getsizeof(key)
        content += sys.getsizeof(text) + _ITEM_BYTES
        if not log.messages % _TELL_EVERY:
            tell(log.progress)
    if log.is_trace and profile.keys == profile.accesses:  # any file of lines may look like a trace
        raise InputError(
            f"No key occurs twice in the {plural(log.lines, 'line')} of '{log.path}', so every limit has the same hit "
            "ratio: 0. Give a log in which users come back, or a trace with one key a line"
        )
    entry = _ENTRY_BYTES + key_bytes / profile.keys
    if log.is_trace:
        measured = "the registry's own bytes and the keys; a trace does not tell what the values take"
    else:
        entry += _LIST_BYTES + content / profile.keys
        measured = "the mean conversation in this log, as a list of str that is never trimmed"
    # A limit as long as the log drops nothing in it, so the log says nothing about it.
    idles = [idle for idle in IDLES if log.has_time and idle < last - first]
    choices, recommended = _weigh(profile, idles, round(entry))
    return Sizing(
        accesses=profile.accesses,
        keys=profile.keys,
        has_time=log.has_time,
        best_hit_ratio=profile.hit_curve()[-1] / profile.accesses,
        bytes_an_entry=round(entry),
        measured=measured,
        choices=choices,
        recommended=recommended,
        rule=_RULE,
        lines=log.lines,
        skipped=log.skipped,
        first_skipped=log.first_skipped,
        out_of_order=log.out_of_order,
    )


def _weigh(profile: ReuseProfile, idles: list[float], entry: int) -> tuple[list[Choice], Choice]:
    curves = {idle: profile.hit_curve(idle) for idle in (None, *idles)}

    def choice(maxsize: int, idle: float | None) -> Choice:
        curve = curves[idle]
        hits = curve[min(maxsize, len(curve) - 1)]
        most_held = min(maxsize, profile.most_held(idle))
        ratio = hits / profile.accesses
        return Choice(
            maxsize=maxsize, idle=idle, hits=hits, hit_ratio=ratio, most_held=most_held, memory=most_held * entry
        )

    unlimited = curves[None]
    near = unlimited[-1] - _NEAR * profile.accesses
    maxsize = _round_up(max(bisect_left(unlimited, near), 1))
    kept = _COVERED * choice(maxsize, None).hits
    idle = next((idle for idle in idles if choice(maxsize, idle).hits >= kept), None)
    sizes = sorted({*_sizes(len(unlimited) - 1), maxsize})
    return [choice(size, limit) for size in sizes for limit in curves], choice(maxsize, idle)


def _round_up(number: int) -> int:
    """To two digits: nobody writes maxsize=4873."""
    unit = int("1" + "0" * (len(str(number)) - 2))
    return -(-number // unit) * unit


def _sizes(most: int) -> list[int]:
    """1, 2, 5, 10, ... up to the first that is as good as no bound; a dozen at most."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * 2 if str(sizes[-1])[0] != "2" else sizes[-1] // 2 * 5)
    return sizes[-12:]


def duration(seconds: float) -> str:
    """*seconds* in the largest unit that divides it, as the limits are written: ``"90s"``, ``"2h"``."""
    for unit, size in (("d", _DAY), ("h", _HOUR), ("m", _MINUTE)):
        if seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"
