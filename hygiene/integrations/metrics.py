"""What can be measured, by what names, and a census of it: what the exporters have in common.

Theory of operation
-------------------

*Nothing is counted for the exporters.* Registries, pools and savers count for their own ``stats()``; a census reads
those when somebody scrapes. So a read or a write costs the same with and without an exporter.

*Counters never fall.* What a census has seen of each object is remembered beside a weak reference, and only what came
since is added to the sum of its name. When the object is collected its part stays in the sum. What it counted between
the last census and its end is not in there: nobody can ask it any more.

*Names are few.* Objects of one name are added up, so ten thousand instances of a class with a bounded attribute are one
series. Beyond *max_names* of one kind, the names that came last share ``"other"``. A key is never a label.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hygiene.events import Cause
from hygiene.group import _Column
from hygiene.janitor import alive, survive_fork
from hygiene.logs import logger
from hygiene.memory import MemoryBudget, MemoryLevel, MemoryMonitor
from hygiene.memory.readings import rss
from hygiene.pool import _Pool
from hygiene.registry import Registry
from hygiene.trend import Growth
from hygiene.writebehind import WriteBehind

__all__ = ["METRICS", "OTHER", "UNNAMED", "Census", "Metric", "Samples"]


OTHER = "other"
"""The name that those share which came after *max_names* others."""
UNNAMED = "(unnamed)"
"""The name of registries that were given none."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, as OpenTelemetry's conventions describe it."""

    name: str
    """Its name in OpenTelemetry."""
    kind: Literal["counter", "updown", "gauge"]
    """A counter never falls; an up-down counter can be added up over objects; a gauge cannot."""
    unit: str
    """After UCUM, as OpenTelemetry has it: ``By``, ``1``, or what is counted in braces."""
    text: str
    """What it says."""
    labels: tuple[str, ...] = ()
    """The names of its attributes."""

    @property
    def prometheus(self) -> str:
        """
        Its name in Prometheus: what OpenTelemetry's own rules make of it.

        So one dashboard fits, whichever of the two delivers.
        """
        name = self.name.replace(".", "_") + _SUFFIXES.get(self.unit, "")
        return f"{name}_total" if self.kind == "counter" else name


_SUFFIXES = {"By": "_bytes", "By/s": "_bytes_per_second", "1": "_ratio"}

_ALL = (
    Metric("hygiene.registry.count", "updown", "{registry}", "Registries that are alive.", ("name",)),
    Metric("hygiene.registry.entry.count", "updown", "{entry}", "Entries held.", ("name",)),
    Metric("hygiene.registry.size", "updown", "By", "Estimated size of the values, where max_bytes is set.", ("name",)),
    Metric("hygiene.registry.leased", "updown", "{entry}", "Entries that somebody holds a lease on.", ("name",)),
    Metric(
        "hygiene.registry.overflow", "updown", "{entry}", "Entries beyond maxsize: all older are in use.", ("name",)
    ),
    Metric("hygiene.registry.requests", "counter", "{request}", "Lookups, by how they ended.", ("name", "result")),
    Metric("hygiene.registry.evictions", "counter", "{entry}", "Entries dropped, by cause.", ("name", "cause")),
    Metric("hygiene.registry.hook.errors", "counter", "{error}", "Hooks that raised.", ("name",)),
    Metric("hygiene.pool.resource.count", "updown", "{resource}", "Resources, by what they are in.", ("name", "state")),
    Metric("hygiene.pool.resource.max", "updown", "{resource}", "Resources that may be open at once.", ("name",)),
    Metric("hygiene.pool.pending_requests", "updown", "{request}", "Callers who wait for a resource.", ("name",)),
    Metric("hygiene.pool.acquisitions", "counter", "{request}", "Times that a resource was handed out.", ("name",)),
    Metric("hygiene.pool.timeouts", "counter", "{timeout}", "Callers who waited in vain.", ("name",)),
    Metric("hygiene.pool.resource.opened", "counter", "{resource}", "Resources opened.", ("name",)),
    Metric("hygiene.pool.resource.closed", "counter", "{resource}", "Resources closed or forgotten.", ("name",)),
    Metric("hygiene.pool.dropped", "counter", "{lease}", "Leases collected without having been released.", ("name",)),
    Metric("hygiene.pool.hook.errors", "counter", "{error}", "check, reset or close raised or was late.", ("name",)),
    Metric("hygiene.saver.pending", "updown", "{item}", "Items and values that wait to be saved.", ("name",)),
    Metric("hygiene.saver.unsaved", "updown", "{change}", "Changes accepted and not saved yet.", ("name",)),
    Metric("hygiene.saver.rejected", "updown", "{entry}", "Entries that the store refused, not yet taken.", ("name",)),
    Metric("hygiene.saver.outage", "updown", "{saver}", "Savers whose last save failed.", ("name",)),
    Metric("hygiene.saver.changes", "counter", "{change}", "Changes, by what became of them.", ("name", "result")),
    Metric("hygiene.saver.saves", "counter", "{save}", "Calls of the store, by how they ended.", ("name", "result")),
    Metric("hygiene.saver.conflicts", "counter", "{entry}", "Entries that the store refused.", ("name",)),
    Metric("hygiene.saver.hook.errors", "counter", "{error}", "Times that on_conflict raised.", ("name",)),
    Metric("hygiene.memory.usage", "updown", "By", "Resident memory of the process."),
    Metric("hygiene.memory.limit", "gauge", "By", "The nearest limit that a monitor found.", ("name",)),
    Metric("hygiene.memory.utilization", "gauge", "1", "Used share of that limit.", ("name",)),
    Metric("hygiene.memory.level", "gauge", "{level}", "0 normal, 1 warn, 2 critical.", ("name",)),
    Metric("hygiene.memory.alarm", "gauge", "{alarm}", "1 while the memory grows like a leak.", ("name",)),
    Metric("hygiene.memory.growth", "gauge", "By/s", "How fast the memory grows, over hours.", ("name",)),
    Metric("hygiene.memory.sheds", "counter", "{shed}", "Times that memory was shed.", ("name",)),
    Metric("hygiene.memory.budget.usage", "updown", "By", "What a share of a budget holds.", ("name",)),
    Metric("hygiene.memory.budget.limit", "updown", "By", "What a share of a budget may hold now.", ("name",)),
    Metric("hygiene.scrape.errors", "counter", "{error}", "Objects that could not be asked for their numbers."),
)
METRICS = {metric.name: metric for metric in _ALL}
"""Every metric by its name."""

Series = tuple[str, ...]
"""The name of a metric, and the values of its labels, in their order."""
Samples = dict[str, dict[tuple[str, ...], float]]
"""By the name of the metric and the values of its labels. Each metric is there."""


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What one object says. The place of a number says which it is."""

    name: str
    counters: tuple[float, ...]
    gauges: tuple[float | None, ...]  # None: there is none


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of object. Its series leave out the name, which comes first among the labels."""

    what: str
    counters: tuple[Series, ...]
    gauges: tuple[Series, ...]
    read: Callable[[Any], Iterable[_Numbers]]
    restarting: Collection[int] = ()
    """The places of those counters that begin at zero again when there is another *epoch*."""
    epoch: Callable[[Any], object] | None = None
    """What such counters live in; ``None``: the process, so a forked child begins again."""


_CAUSES = tuple(sorted(cause for cause in Cause if cause.ours))


def _read_registry(registry: Registry[Any, Any]) -> Iterable[_Numbers]:
    stats = registry.stats()
    # The dicts of one group are one table: it is asked for through them, and what it holds and drops are rows.
    column = isinstance(registry, _Column)
    name = registry._rows._name if isinstance(registry, _Column) else registry._name
    found = max(stats.hits - stats.rehydrated, 0)
    dropped = (0,) * len(_CAUSES) if column else tuple(stats.evictions.get(cause, 0) for cause in _CAUSES)
    held = (None,) * 5 if column else (1, stats.entries, stats.bytes, stats.leased, stats.overflowing)
    counters = (found, stats.rehydrated, stats.misses, *dropped, stats.hook_errors)
    return (_Numbers(name or UNNAMED, counters, held),)


def _read_pool(pool: _Pool[Any]) -> Iterable[_Numbers]:
    stats = pool.stats()
    counters = (stats.acquired, stats.timeouts, stats.opened, stats.closed, stats.dropped, stats.hook_errors)
    gauges = (stats.in_use, stats.idle, stats.opening, 0 if pool.closed else stats.max_size, stats.waiting)
    return (_Numbers(pool.name, counters, gauges),)


def _read_saver(saver: WriteBehind) -> Iterable[_Numbers]:
    stats = saver.stats()
    settled = (stats.saved, stats.superseded, stats.discarded)
    counters = (*settled, stats.saves, stats.failures, stats.conflicts, stats.hook_errors)
    return (_Numbers(saver.name, counters, (stats.pending, stats.unsaved, stats.rejected, int(stats.outage))),)


_LEVELS = list(MemoryLevel)


def _read_monitor(monitor: MemoryMonitor) -> Iterable[_Numbers]:
    reading = monitor._last  # a scrape takes none of its own: a reading may end in a warning
    if reading is None:
        return ()
    limit = reading.limit
    gauges = (
        None if limit is None else limit.size,
        None if limit is None else limit.share,
        _LEVELS.index(reading.level),
        int(reading.growth is Growth.GROWING),
        reading.rate / 3600,
    )
    return (_Numbers(monitor.name, (monitor.sheds,), gauges),)


def _read_budget(budget: MemoryBudget) -> Iterable[_Numbers]:
    return [_Numbers(share.name, (), (share.used, share.allowed)) for share in budget.usage().values()]


_KINDS: tuple[tuple[type[Any], _Kind], ...] = (
    (
        Registry,
        _Kind(
            "registry",
            (
                *(("hygiene.registry.requests", result) for result in ("hit", "rehydrated", "miss")),
                *(("hygiene.registry.evictions", str(cause)) for cause in _CAUSES),
                ("hygiene.registry.hook.errors",),
            ),
            (
                ("hygiene.registry.count",),
                ("hygiene.registry.entry.count",),
                ("hygiene.registry.size",),
                ("hygiene.registry.leased",),
                ("hygiene.registry.overflow",),
            ),
            _read_registry,
        ),
    ),
    (
        _Pool,
        _Kind(
            "pool",
            (
                ("hygiene.pool.acquisitions",),
                ("hygiene.pool.timeouts",),
                ("hygiene.pool.resource.opened",),
                ("hygiene.pool.resource.closed",),
                ("hygiene.pool.dropped",),
                ("hygiene.pool.hook.errors",),
            ),
            (
                *(("hygiene.pool.resource.count", state) for state in ("used", "idle", "opening")),
                ("hygiene.pool.resource.max",),
                ("hygiene.pool.pending_requests",),
            ),
            _read_pool,
            restarting=(0, 2, 3),
            epoch=operator.attrgetter("_core"),  # another after a fork, and for another event loop
        ),
    ),
    (
        WriteBehind,
        _Kind(
            "saver",
            (
                *(("hygiene.saver.changes", result) for result in ("saved", "superseded", "discarded")),
                *(("hygiene.saver.saves", result) for result in ("ok", "failed")),
                ("hygiene.saver.conflicts",),
                ("hygiene.saver.hook.errors",),
            ),
            (
                ("hygiene.saver.pending",),
                ("hygiene.saver.unsaved",),
                ("hygiene.saver.rejected",),
                ("hygiene.saver.outage",),
            ),
            _read_saver,
            restarting=range(7),
        ),
    ),
    (
        MemoryMonitor,
        _Kind(
            "monitor",
            (("hygiene.memory.sheds",),),
            (
                ("hygiene.memory.limit",),
                ("hygiene.memory.utilization",),
                ("hygiene.memory.level",),
                ("hygiene.memory.alarm",),
                ("hygiene.memory.growth",),
            ),
            _read_monitor,
            restarting=(0,),
        ),
    ),
    (
        MemoryBudget,
        _Kind("budget", (), (("hygiene.memory.budget.usage",), ("hygiene.memory.budget.limit",)), _read_budget),
    ),
)


class _Era:
    """One life of the process: a forked child begins another."""


class Census:
    """
    Adds up, by name, what is alive now and what was counted so far.

    Safe for threads, and after a fork. Takes about 15 us for each object that is alive; see the module for what its
    counters promise.

    Args:
        max_names: How many names of one kind are told apart; those that come later share "other". 100: with some
            fifteen series each that is what one dashboard and a small Prometheus bear. Names in code are fewer.

    Raises:
        ValueError: *max_names* is not a number of names, at least 1.
    """

    def __init__(self, max_names: int = 100) -> None:
        given: object = max_names
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ValueError(f"max_names must be a number of names, at least 1; found {max_names!r}")
        self._most = max_names
        self._names: dict[str, set[str]] = {}
        # By id, since a registry, being a dict, has no hash. What was seen, its epoch, and the counters as they were.
        self._seen: dict[int, tuple[weakref.ref[Any], weakref.ref[Any], tuple[float, ...]]] = {}
        self._counted: dict[Series, float] = {("hygiene.scrape.errors",): 0}
        self._gauges: dict[Series, float] = {}
        self._begin()
        survive_fork(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._era = _Era()

    def take(self) -> Samples:
        """The numbers of this moment. What cannot be asked is left out, logged, and counted as an error."""
        # Asked for before the lock and let go after it: an object that is given up meanwhile dies with this list, and
        # what its values do then is not ours to know. Nothing else here may refer to one of them: who keeps the log's
        # records keeps the frames of an exception, and this is one of them.
        things = [(kind, thing) for thing in alive(object) for type_, kind in _KINDS if isinstance(thing, type_)]
        failed = []
        with self._lock:
            # Those that can be added up are zero when nobody has them any more; a limit is not.
            self._gauges = {series: 0 for series in self._gauges if METRICS[series[0]].kind == "updown"}
            for place in range(len(things)):
                if (error := self._ask(*things[place])) is not None:
                    self._counted["hygiene.scrape.errors",] += 1
                    failed.append((*things[place], error))
            self._gauges["hygiene.memory.usage",] = rss()
            for number in [number for number, (reference, *_) in self._seen.items() if reference() is None]:
                del self._seen[number]
            samples: Samples = {name: {} for name in METRICS}
            for series, value in (*self._gauges.items(), *self._counted.items()):
                samples[series[0]][series[1:]] = value
        things.clear()
        error = None
        while failed:
            _say(*failed.pop())
        return samples

    def _ask(self, kind: _Kind, thing: Any) -> Exception | None:
        try:
            for numbers in kind.read(thing):
                self._add(kind, thing, numbers)
        except Exception as error:
            return error
        return None

    def _add(self, kind: _Kind, thing: Any, numbers: _Numbers) -> None:
        name = self._admit(kind.what, str(numbers.name))
        for (metric, *labels), value in zip(kind.gauges, numbers.gauges, strict=True):
            if value is not None:
                series = (metric, name, *labels)
                so_far = self._gauges.get(series, 0)
                # Two monitors of one name look at one process: of a limit the sum says nothing.
                self._gauges[series] = so_far + value if METRICS[metric].kind == "updown" else max(so_far, value)
        if kind.counters:
            self._count(kind, thing, name, numbers.counters)

    def _count(self, kind: _Kind, thing: Any, name: str, counters: tuple[float, ...]) -> None:
        epoch = self._era if kind.epoch is None else kind.epoch(thing)
        seen = self._seen.get(id(thing))
        if seen is None or seen[0]() is not thing:  # new, perhaps where another has been
            seen = weakref.ref(thing), weakref.ref(epoch), (0.0,) * len(kind.counters)
        reference, lived_in, before = seen
        if lived_in() is not epoch:
            lived_in = weakref.ref(epoch)
            before = tuple(0.0 if place in kind.restarting else old for place, old in enumerate(before))
        # Numbers that are read while other threads count may be less than they were, for a moment.
        now = tuple(map(max, counters, before))
        self._seen[id(thing)] = (reference, lived_in, now)
        for (metric, *labels), new, old in zip(kind.counters, now, before, strict=True):
            series = (metric, name, *labels)
            self._counted[series] = self._counted.get(series, 0) + new - old

    def _admit(self, what: str, name: str) -> str:
        names = self._names.setdefault(what, set())
        if name not in names:
            if len(names) >= self._most:
                return OTHER
            names.add(name)
        return name

    def _after_fork(self) -> None:
        self._begin()


def _say(kind: _Kind, thing: object, error: Exception) -> None:
    logger.error(
        "a %s could not be asked for its numbers",
        kind.what,
        exc_info=error,
        extra={"event_name": "metrics.source_failed", "of": thing},
    )
