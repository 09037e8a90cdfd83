"""Memory that gets short: noticed before the kernel does, and answered once.

Theory of operation

Levels. The share of the nearest limit that is used decides: normal, warn, critical. A level is left a little below
where it was entered, or a share that lies on the line would be told with each reading.

Shedding. What is dropped is counted by our own accounts, never by the resident size: that hardly falls when objects
are freed, because allocators keep the memory for the next ones. A loop that drops until it falls would drop everything.
So: a quarter of the bytes, once. Again only after the cool-down, and only if the share has risen since, which says that
what was freed has been used up; or at once if a worse level is reached. At "critical" the cool-down does not count: a
burst fills what was freed within seconds. There, memory is shed again as soon as it has grown by what the last
shedding freed. If the allocator kept the freed memory, that is when the share rises above that of the last shedding; if
it did not, when the share has risen by the freed bytes above the lowest one since.

Threads. The janitor's thread reads and decides. Callbacks, hooks and closers are other people's code and may hang, so
what is decided is done in a thread of its own, one at a time. The callbacks are waited for before the registries are
trimmed, but not for long: what the kernel is about to kill has no time for one that hangs.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

from hygiene.cleanup import _pressure, relieve
from hygiene.closing import call_within
from hygiene.janitor import alive, aside, janitor, survive_fork
from hygiene.logs import logger
from hygiene.memory.readings import MemoryLimit, Readings, Stall
from hygiene.names import suggests
from hygiene.registry import Registry
from hygiene.sizing import sizeof
from hygiene.trend import Growth, Trend
from hygiene.units import Duration, Size, nbytes, seconds

__all__ = ["MemoryHealth", "MemoryLevel", "MemoryMonitor", "MemoryReading", "Shed"]


_PATIENCE = 5.0
"""Seconds that the callbacks may keep the registries waiting."""
_HASTE = 5
"""That many readings in the time of one, once memory is short."""
_MARGIN = 0.01
"""By how much of the limit memory has to have grown since it was shed, or there is no need to shed again."""
_ENOUGH = 0.5
"""Used share below which a stall is not the doing of this process, and shedding would not help."""
_SAMPLE = 16
"""Values of a registry without *max_bytes* that stand for the others."""
_SAMPLES = 2048
"""Values that are measured in one look at all registries: about 20 ms."""
_MINOR = 0.01
"""The smallest registries, with so much of the bytes between them, are left alone: it would not help."""


class MemoryLevel(enum.StrEnum):
    """How short memory is."""

    NORMAL = "normal"
    WARN = "warn"
    CRITICAL = "critical"


_RANK = {MemoryLevel.NORMAL: 0, MemoryLevel.WARN: 1, MemoryLevel.CRITICAL: 2}


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The numbers of one moment. Sizes are bytes."""

    rss: int
    """Resident memory of this process."""
    swap: int | None
    """What of it is swapped out; ``None`` where the system does not say."""
    limit: MemoryLimit | None
    """The nearest limit: of all, the one that is used most; ``None`` if there is none."""
    stall: Stall | None
    """How much time is lost waiting for memory; ``None`` where the system does not say."""
    level: MemoryLevel
    """What follows from that, and from the level before."""
    growth: Growth
    """What the readings of the last hours say."""
    rate: float
    """Bytes an hour that it grows by; 0.0 in the first two hours."""
    at: float = field(compare=False)
    """When it was taken, by the monitor's *timer*."""

    @property
    def share(self) -> float:
        """Used share of the nearest limit: 1.0 is all; 0.0 if there is none."""
        return self.limit.share if self.limit is not None else 0.0


@dataclass(frozen=True, slots=True)
class MemoryHealth:
    """Whether memory is all right, and why. True if it is; ``str`` is the reason."""

    ok: bool
    """Level normal, and no alarm for growth."""
    reason: str
    """What was found, and what to do: for a log, a health endpoint, a person."""
    reading: MemoryReading
    """The numbers."""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Shed:
    """What was given up to make room."""

    callbacks: int
    """Cleanups for "pressure" that were started."""
    entries: int
    """Entries that left the registries."""
    bytes: int
    """Their estimated bytes. The resident size need not fall by that: the memory is free for what comes next."""
    registries: Mapping[str, int]
    """Bytes by the name of the registry; those without a name stand together under ``"(unnamed)"``."""
    trimmed: bool | None = None
    """Whether ``malloc_trim`` gave anything back; ``None`` if it was not asked for, or there is none here."""


@dataclass(slots=True)
class _Holding:
    """One registry, or the rows of several that share one life."""

    registry: Registry[Any, Any]
    name: str
    entries: int
    bytes: int
    measured: bool


class _Rounds:
    """The janitor's charge for a monitor that was started. Its end is the end of the visits."""

    def __init__(self, monitor: MemoryMonitor) -> None:
        self._monitor = monitor

    def _visit(self) -> float | None:
        return self._monitor._round()


_started: dict[int, MemoryMonitor] = {}


class MemoryMonitor:
    """
    Knows how much memory this process has and may have, and makes room before it is killed for the lack of it.

    ``start()`` has the janitor take a reading every *interval* seconds (five times as often once memory is short);
    `close`, or leaving a ``with``, ends that. Without it, each `check` takes one. When a level is entered, the
    cleanups registered for "pressure" run (write-behind flushes there), then every registry that has a bound gives up
    *share* of its bytes: least recently used first, saved first if it has a store, busy and leased spared. At "warn" it
    sheds at most once per *cooldown*, and only if memory has grown since. At "critical" it sheds again as soon as
    memory has grown by what the last shedding freed. Nothing ever waits for the resident size to fall.

    Safe to use from any thread. In a forked child it goes on, with the child's own memory and a new trend.

    Args:
        limit: Bytes, or text such as ``"512MiB"``, for the resident memory of this process. ``"auto"``: the nearest of
            the limits of its cgroup and of those above it (v2 and v1; what counts is all that runs in the group),
            ``RLIMIT_AS`` (counts addresses) and the memory of the machine; read anew each time, since a limit may be
            lowered at any time.
        warn: Used share of the limit from which on it is "warn". 0.8: what a fifth of the memory is good for, an
            allocator can hold back.
        critical: The same for "critical".
        interval: Seconds, or text such as ``"5s"``, between two readings. One takes half a millisecond.
        cooldown: Seconds, or text, after one shedding before the next at "warn". At "critical" growth alone decides,
            because a burst within the cool-down would end the process. 30: time for what was freed to be used again.
        share: Part of the bytes of each registry that is given up. 0 leaves the registries alone.
        spare: Names of registries that are left alone.
        stall: Per cent of the last ten seconds that all tasks waited for memory, from which on it is "warn", if half
            of the limit is used at least; ``None``: never. Linux alone says it.
        collect: Whether to run ``gc.collect()`` after shedding. It frees cycles, and stops the process meanwhile.
        malloc_trim: Whether to call glibc's ``malloc_trim(0)`` after that. It gives whole free pages back, and holds
            the allocator's lock meanwhile.
        name: What logs call it.
        timer: Returns monotonic seconds.
        root: The folder that stands for ``/`` when files under ``/proc`` and ``/sys`` are read; for tests.

    Raises:
        ValueError: a share is not between 0 and 1, *critical* is not above *warn*, or a number is not positive.
        TypeError: an argument is of the wrong kind.
    """

    @suggests
    def __init__(
        self,
        limit: Size | Literal["auto"] = "auto",
        warn: float = 0.8,
        critical: float = 0.9,
        interval: Duration = 5.0,
        *,
        cooldown: Duration = 30.0,
        share: float = 0.25,
        spare: Collection[str] = (),
        stall: float | None = 10.0,
        collect: bool = False,
        malloc_trim: bool = False,
        name: str = "memory",
        timer: Callable[[], float] = time.monotonic,
        root: str | os.PathLike[str] = "/",
    ) -> None:
        if not 0 < warn < critical <= 1:
            raise ValueError(
                f"warn and critical are shares of the limit, 0 < warn < critical <= 1; found {warn!r} and {critical!r}"
            )
        if not 0 <= share <= 1:
            raise ValueError(f"share is the part of each registry that is given up, from 0 to 1; found {share!r}")
        if stall is not None and not 0 < stall <= 100:  # noqa: PLR2004 - per cent
            raise ValueError(f"stall is in per cent of the time, above 0 and at most 100, or None; found {stall!r}")
        if isinstance(spare, str):
            raise TypeError(f"spare takes several names, such as [{spare!r}]; found the text {spare!r}")
        self._given = None if limit == "auto" else nbytes(limit, "limit")
        self._thresholds = {MemoryLevel.WARN: warn, MemoryLevel.CRITICAL: critical}
        # Half the way to normal from a line that is close to it, at most five points.
        self._slack = min(0.05, (1 - warn) / 2, warn / 2)
        self._interval = seconds(interval, "interval")
        self._cooldown = seconds(cooldown, "cooldown")
        self._share = share
        self._spare = frozenset(spare)
        self._stall = stall
        self._collect = collect
        self._malloc_trim = malloc_trim
        self.name = name
        """What logs call it."""
        self._timer = timer
        self._readings = Readings(root)
        self._rounds: _Rounds | None = None
        self._begin()
        survive_fork(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._shedding = threading.Lock()  # taken by a shedding, never waited for
        self._trend = Trend()
        self._level = MemoryLevel.NORMAL
        self._growth = Growth.STEADY
        self._last: MemoryReading | None = None
        self._answered = MemoryLevel.NORMAL
        self._shed_at = -float("inf")
        self._mark = 0.0  # the share at which memory was shed last
        self._lowest = 0.0  # the lowest share read since
        self._stuck = False
        self.sheds = 0
        """Times that memory was shed."""
        self.last_shed: Shed | None = None
        """What came of it last."""

    def __repr__(self) -> str:
        last = self._last
        found = f", {_of(last)}" if last is not None else ""
        return f"<MemoryMonitor {self.name!r} {self._level}{found}{', running' if self.running else ''}>"

    # Life

    @property
    def running(self) -> bool:
        """Whether the janitor takes readings for it."""
        return self._rounds is not None

    def start(self) -> Self:
        """Take readings from now on; returns the monitor. It is kept alive until `close`. Twice does no harm."""
        with self._lock:
            if self._rounds is None:
                self._rounds = _Rounds(self)
                _started[id(self)] = self  # or `MemoryMonitor().start()` would end in the same line
                janitor.watch(self._rounds, 0.0)
        return self

    def close(self) -> None:
        """Take no more readings. Twice does no harm, and `start` begins again."""
        with self._lock:
            self._rounds = None
            _started.pop(id(self), None)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _round(self) -> float | None:
        if self._rounds is None:
            return None
        reading = self._look()
        if self._is_due(reading):
            aside(self._answer, "memory-pressure")
        return self._interval if reading.level is MemoryLevel.NORMAL else self._interval / _HASTE

    def _after_fork(self) -> None:
        self._begin()

    # Reading

    @property
    def level(self) -> MemoryLevel:
        """The level of the last reading: an attribute's worth of work, to refuse new work by."""
        return self._level

    def check(self) -> MemoryReading:
        """
        Take a reading now, and shed in this thread if it is time to.

        What that may take: the cleanups for "pressure" are waited for up to five seconds, and what leaves a registry
        is saved and closed here. From an event loop call it with ``asyncio.to_thread``, or `start` the monitor.
        """
        reading = self._look()
        if self._is_due(reading):
            self._answer()
        return reading

    def healthy(self) -> MemoryHealth:
        """
        Whether memory is all right; false for "warn", "critical" and an alarm for growth, with the reason.

        Sheds nothing. Uses the last reading if it is younger than *interval*, so to ask often costs little.
        """
        with self._lock:
            reading = self._last
        if reading is None or not 0 <= self._timer() - reading.at < self._interval:
            reading = self._look()
        ok = reading.level is MemoryLevel.NORMAL and reading.growth is not Growth.GROWING
        return MemoryHealth(ok, self._reason(reading), reading)

    def _look(self) -> MemoryReading:
        with self._lock:
            now = self._timer()
            resident, swap = self._readings.rss(), self._readings.swap()
            given = self._given
            limits = self._readings.limits() if given is None else [MemoryLimit(given, "given", resident)]
            limit = limits[0] if limits else None
            stall = self._readings.stall()
            # What is swapped out has not gone: a leak on a machine with swap has a steady resident size.
            growth = self._trend.add(now, resident + (swap or 0))
            before, self._level = self._level, self._find_level(limit, stall)
            reading = MemoryReading(resident, swap, limit, stall, self._level, growth, self._trend.rate, now)
            self._last = reading
            grown, self._growth = self._growth, growth
        if before is not reading.level:
            self._say(before, reading)
        if grown is not growth and growth is not Growth.STEADY:
            logger.warning("%s: %s", self.name, self._growth_of(reading), extra=_extra("memory.growth", reading))
        return reading

    def _find_level(self, limit: MemoryLimit | None, stall: Stall | None) -> MemoryLevel:
        share = limit.share if limit is not None else 0.0
        for level in (MemoryLevel.CRITICAL, MemoryLevel.WARN):
            slack = self._slack if _RANK[self._level] >= _RANK[level] else 0.0
            if share >= self._thresholds[level] - slack:
                return level
        stalled = self._stall is not None and stall is not None and stall.full >= self._stall
        return MemoryLevel.WARN if stalled and share >= _ENOUGH else MemoryLevel.NORMAL

    def _say(self, before: MemoryLevel, reading: MemoryReading) -> None:
        worse = _RANK[reading.level] > _RANK[before]
        logger.log(
            logging.WARNING if worse else logging.INFO,
            "%s is %s now (was %s): %s",
            self.name,
            reading.level,
            before,
            _of(reading),
            extra=_extra("memory.level", reading),
        )

    # Shedding

    def _is_due(self, reading: MemoryReading) -> bool:
        """Whether to shed now; who is told so has to."""
        with self._lock:
            cool = reading.at - self._shed_at >= self._cooldown
            self._lowest = min(self._lowest, reading.share)
            if reading.level is MemoryLevel.NORMAL:
                if cool:
                    self._answered, self._stuck = MemoryLevel.NORMAL, False
                return False
            worse = _RANK[reading.level] > _RANK[self._answered]
            grown = reading.share > self._mark + _MARGIN
            critical = reading.level is MemoryLevel.CRITICAL
            ready = (grown and (cool or critical)) or (critical and self._is_used_up(reading))
            if not worse and not ready:
                return False
            if self._shedding.locked():  # asked by a callback that it has called itself, or by another thread
                return False
            self._answered, self._shed_at = reading.level, reading.at
            self._mark = self._lowest = reading.share
            return True

    def _is_used_up(self, reading: MemoryReading) -> bool:
        """True if memory has grown by what the last shedding freed, above the lowest reading since."""
        shed, limit = self.last_shed, reading.limit
        if shed is None or limit is None or not shed.bytes:
            return False
        return reading.share - self._lowest >= max(shed.bytes / limit.size, _MARGIN)

    def _answer(self) -> None:
        try:
            self._shed(self._share)
        except Exception:  # out of memory, for one: what was begun is done, and the next reading sees what to do
            logger.exception(
                "%s: shedding failed",
                self.name,
                extra={"event_name": "memory.shed_failed", "monitor": self.name, "of": self},
            )

    def shed(self, share: float | None = None) -> Shed:
        """
        Shed now, whatever the level and the cool-down; returns what was given up.

        Args:
            share: Part of the bytes of each registry; the default is that of the monitor.

        Raises:
            ValueError: *share* is not between 0 and 1.
        """
        part = self._share if share is None else share
        if not 0 <= part <= 1:
            raise ValueError(f"share is the part of each registry that is given up, from 0 to 1; found {share!r}")
        return self._shed(part)

    def _shed(self, share: float) -> Shed:
        if not self._shedding.acquire(blocking=False):
            return _NOTHING  # one at a time; what it is called by is a part of the other
        try:
            started = _relieve()
            entries, freed = self._trim(share)
            if self._collect:
                gc.collect()
            trimmed = _malloc_trim() if self._malloc_trim else None
            shed = Shed(started, entries, sum(freed.values()), MappingProxyType(freed), trimmed)
            self.sheds += 1
            self.last_shed = shed
        finally:
            self._shedding.release()
        self._tell(shed)
        return shed

    def _trim(self, share: float) -> tuple[int, dict[str, int]]:
        entries = 0
        freed: dict[str, int] = {}
        holdings = [one for one in _holdings() if one.name not in self._spare and _may_shrink(one.registry)]
        minor = sum(one.bytes for one in holdings) * _MINOR
        while holdings and holdings[-1].bytes <= minor:  # the largest come first
            minor -= holdings.pop().bytes
        for one in holdings if share else ():
            try:
                left, size = _trim_one(one, share)
            except Exception:
                logger.exception(
                    "%s: registry %r could not be trimmed",
                    self.name,
                    one.name,
                    extra={"event_name": "memory.trim_failed", "registry": one.name, "of": one.registry},
                )
                continue
            if left:
                entries += left
                freed[one.name] = freed.get(one.name, 0) + size
        return entries, freed

    def _tell(self, shed: Shed) -> None:
        if shed.callbacks or shed.entries:
            self._stuck = False
            logger.warning(
                "%s: shed %d entries, about %s, and ran %d cleanups; by registry: %s",
                self.name,
                shed.entries,
                _text(shed.bytes),
                shed.callbacks,
                ", ".join(f"{name} {_text(size)}" for name, size in shed.registries.items()) or "none",
                extra={
                    "event_name": "memory.shed",
                    "shed_entries": shed.entries,
                    "shed_bytes": shed.bytes,
                    "callbacks": shed.callbacks,
                },
            )
        elif not self._stuck:
            self._stuck = True  # said once, until something can be shed or memory is no longer short
            held = [one for one in _holdings() if _may_shrink(one.registry)]
            logger.warning(
                "%s: nothing can be shed: %s",
                self.name,
                f"all that the {len(held)} registries hold is leased, busy or spared"
                if held
                else 'there is no bounded registry with entries, and no register_cleanup(on="pressure")',
                extra={"event_name": "memory.nothing_to_shed", "monitor": self.name},
            )

    # Reasons

    def _reason(self, reading: MemoryReading) -> str:
        parts = [f"memory is {reading.level}: {_of(reading)}"]
        if reading.swap:
            parts.append(f"{_text(reading.swap)} are swapped out")
        if reading.stall is not None and self._stall is not None and reading.stall.full >= self._stall:
            parts.append(f"all tasks waited for memory in {reading.stall.full:.0f} % of the last ten seconds")
        if reading.growth is not Growth.STEADY:
            parts.append(self._growth_of(reading))
        if reading.level is not MemoryLevel.NORMAL:
            parts.append(self._advice(reading))
        return ". ".join(part[0].upper() + part[1:] for part in parts) + "."

    def _growth_of(self, reading: MemoryReading) -> str:
        if reading.growth is Growth.RISING:
            return "the least of each of the last three hours is above that of the hour before: it may be growing"
        text = f"it has grown by {_text(reading.rate)} an hour for {self._trend.hours:.0f} h"
        if reading.limit is not None and reading.rate > 0:
            left = max(reading.limit.size - reading.limit.used, 0) / reading.rate
            text += f" and reaches the limit in {left:.1f} h"
        return f"{text}; hygiene.watch_growth() names what grows"

    def _advice(self, reading: MemoryReading) -> str:
        largest = [one for one in _holdings() if one.bytes > reading.rss * _MINOR][:3]
        if not largest:
            return (
                "no registry holds much of it: look with hygiene.watch_growth() for what does, or raise the limit "
                f"({reading.limit.source if reading.limit is not None else 'none'})"
            )
        held = ", ".join(f"{one.name} {_text(one.bytes)} in {one.entries:,} entries" for one in largest)
        return f"the largest registries are {held}: lower their bounds, or raise the limit"


_NOTHING = Shed(0, 0, 0, MappingProxyType({}))


def _relieve() -> int:
    """Run the cleanups for "pressure"; how many were started before their time was over."""
    cleanups = list(_pressure.values())
    if not cleanups:
        return 0  # where addresses are limited, a thread for nothing may be the last straw
    before = sum(one.runs for one in cleanups)
    try:
        call_within(relieve, _PATIENCE, 'the cleanups for "pressure"')
    except TimeoutError as error:
        logger.warning("%s; the registries are trimmed meanwhile", error, extra={"event_name": "memory.cleanups_late"})
    return sum(one.runs for one in cleanups) - before


def _may_shrink(registry: Registry[Any, Any]) -> bool:
    """Whether anything may leave by itself: nobody has agreed to lose what is in a dict without a bound."""
    limits = registry._limits
    return limits.policy != "none" and (limits.bounded or getattr(limits, "store", None) is not None)


def _trim_one(one: _Holding, share: float) -> tuple[int, int]:
    """Entries that left, and their bytes."""
    registry = one.registry
    if one.measured and one.entries * share >= 1:
        before = registry._bytes
        keep = int(before * (1 - share))
        left = registry.trim(to=f"{keep}B") if keep else registry.trim(to=0)
        return left, max(before - registry._bytes, 0)
    # Of a registry with one entry a quarter goes every fourth time. There may be thousands of them, and to round up
    # would empty them all.
    excess = int(one.entries * share + random.random())  # noqa: S311 - no secret
    left = registry.trim(to=max(len(registry) - excess, 0))
    return left, one.bytes * left // one.entries


def _holdings() -> list[_Holding]:
    """What the registries of this process hold, the largest first. The columns of one table are one."""
    found = []
    budget = _SAMPLES
    walked = counted = 0
    for registry in alive(Registry):
        if registry.group is not None or not (entries := len(registry)):
            continue
        name = registry._name or "(unnamed)"
        if registry._sizes is not None:
            found.append(_Holding(registry, name, entries, registry._bytes, measured=True))
            continue
        dicts = [registry, *getattr(registry, "_present", list)()]
        size = 0
        for one in dicts:
            values = _some(one, min(_SAMPLE, budget))
            if values:
                budget -= len(values)
                bytes_ = sum(map(sizeof, values))
                walked, counted = walked + bytes_, counted + len(values)
                size += bytes_ * len(one) // len(values)
            elif counted:  # looked at enough: it is taken to be as the others
                size += walked * len(one) // counted
        found.append(_Holding(registry, name, entries, size, measured=False))
    return sorted(found, key=lambda one: one.bytes, reverse=True)


def _some(registry: Registry[Any, Any], most: int) -> list[Any]:
    try:
        return list(islice(dict.values(registry), most))
    except RuntimeError:  # another thread changed it
        return []


def _malloc_trim() -> bool | None:
    """Give whole free pages back to the system, where the C library can."""
    import ctypes  # noqa: PLC0415 - only who asks for it pays for it

    with contextlib.suppress(AttributeError, OSError, TypeError):
        return bool(ctypes.CDLL(None).malloc_trim(0))
    return None


def _of(reading: MemoryReading) -> str:
    if reading.limit is None:
        return f"{_text(reading.rss)} resident, and no limit is known"
    limit = reading.limit
    what = "resident" if limit.used == reading.rss else f"({_text(reading.rss)} of them resident in this process)"
    return f"{_text(limit.used)} {what}, {limit.share:.0%} of {_text(limit.size)} ({limit.source})"


def _extra(event_name: str, reading: MemoryReading) -> dict[str, object]:
    return {
        "event_name": event_name,
        "rss": reading.rss,
        "share": reading.share,
        "level": str(reading.level),
        "growth": str(reading.growth),
    }


def _text(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":  # noqa: PLR2004 - the next unit
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError
