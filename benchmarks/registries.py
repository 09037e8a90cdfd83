"""Registries beside what people use today: time, memory, and the longest that a single call takes.

Contenders take turns within each round, and what is quoted is the median over the rounds of the ratio within a round.
One thread's times are its own processor time, so that other programs are not in them; those of four threads are the
clock's, and a busy machine is in them. The garbage collector is off. Loops count with what they loop over, which moves
every ratio towards 1.

Where single calls are looked at, the same sequence of calls runs several times from the same start, and each call
counts with the least it took: an interruption by the machine does not hit the same call again, a stall of the container
does.
"""

from __future__ import annotations

import gc
import gzip
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
import timeit
import tracemalloc
from array import array
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import cachetools
import psutil

from benchmarks.contenders import ABSENT, CONTENDERS, REGISTRIES, Contender, Session, own
from hygiene import bounded_registry
from hygiene.testing import ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FULL", "QUICK", "Report", "Row", "Sizes", "run"]

S = TypeVar("S")  # how much a suite measures

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
STALL = 100.0  # microseconds: the limit for a single operation, and what counts as a stall of a plain dict
THREADS = 4
OURS, IN_PYTHON = "Registry", "Registry in Python"  # the compiled body, and the one that is always there
OURS_TIMED, IN_PYTHON_TIMED = "Registry(ttl)", "Registry(ttl) in Python"
LRU, LRU_LOCKED, TTL = "cachetools LRU", "cachetools LRU + RLock", "cachetools TTL"
BOX, BOX_TTL = "cachebox LRU", "cachebox TTL"
BY_HAND = "OrderedDict LRU by hand"
# Whose memory is counted at every size.
MANY = (OURS, OURS_TIMED, IN_PYTHON, IN_PYTHON_TIMED, LRU, TTL, BOX, "lru-dict")
MISSING = "not all of it is installed"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; everything is a number of entries, operations or repetitions."""

    rounds: int = 101
    operations: int = 1_000  # a round takes a millisecond at most, far above what reading the clock does
    small: int = 1_000
    large: int = 1_000_000
    single: int = 420_000  # operations timed one by one: at 1e6 entries a dict rebuilds its table once in these
    repeats: int = 3
    memory: tuple[int, ...] = (100_000, 1_000_000)
    expiring: int = 100_000
    shared: int = 100_000
    shared_rounds: int = 11
    trace_rounds: int = 5
    trace_requests: int | None = None  # all


FULL = Sizes()
QUICK = Sizes(
    rounds=15,
    operations=500,
    large=50_000,
    single=40_000,
    repeats=3,
    memory=(20_000,),
    expiring=20_000,
    shared=40_000,
    shared_rounds=5,
    trace_rounds=3,
    trace_requests=20_000,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: what was measured, and what was promised."""

    what: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the promise is kept; ``None`` where nothing was promised, or nothing measured."""
        if self.limit is None or self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


Series = dict[str, list[float]]  # nanoseconds an operation, by contender, round by round


@dataclass(slots=True)
class Report:
    """
    What a run found.

    Args:
        rows: What was promised, and what else belongs beside it.
        nanoseconds: By operation and contender: the median of an operation.
        ratios: By operation and contender: against *base*.
        absent: Contenders that could not be imported, and why.
        base: The contender that the others are compared with.
    """

    rows: list[Row] = field(default_factory=list)
    nanoseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=lambda: dict(ABSENT))
    base: str = LRU

    def note_times(self, what: str, series: Series) -> None:
        """Keep the medians of *series*."""
        self.nanoseconds[what] = {name: statistics.median(values) for name, values in series.items()}
        if self.base in series:
            self.ratios[what] = {name: ratio(series, name, self.base) for name in series}


def run(sizes: Sizes, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything; *progress* is told what comes next."""
    sections = [operations, growth, single_operations, memory, expiry, alone, threads, attribute, traces]
    return measure(sections, sizes, Report(), progress)


def measure(
    sections: Sequence[Callable[[S, Report], None]], sizes: S, report: Report, progress: Callable[[str], None]
) -> Report:
    """Run *sections* one after the other, with the garbage collector off; each is announced by its first line."""
    for section in sections:
        progress((section.__doc__ or "").strip().partition("\n")[0].rstrip("."))
        gc.collect()
        gc.disable()
        try:
            section(sizes, report)
        finally:
            gc.enable()
    return report


def key_of(index: int) -> int:
    """Keys all over the hash table, as those of strings are; small integers in a row would be neighbours in it."""
    return index * 0x9E3779B97F4A7C15 % (1 << 61)


def filled(contender: Contender, entries: int) -> Any:
    """A container at its bound, with keys 0 to *entries*."""
    cache = contender.make(entries)
    contender.write(cache, [key_of(i) for i in range(entries)], [float(i) for i in range(entries)])
    return cache


def interleave(
    turns: dict[str, Callable[..., Any]], arguments: Callable[[], tuple[Any, ...]], rounds: int, operations: int
) -> Series:
    """
    Nanoseconds an operation, by contender and round.

    The thread's own processor time is taken: what others do on the machine meanwhile is not in it. Each turn begins
    with an untimed one, so that nobody pays for what the contender before has put out of the processor's caches.

    Args:
        turns: By contender, what to time.
        arguments: Makes what a turn is called with.
        rounds: How often each has its turn.
        operations: How many one turn does.
    """
    names = list(turns)
    series: Series = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turn, first, second = turns[name], arguments(), arguments()
            turn(*first)
            start = time.thread_time_ns()
            turn(*second)
            series[name].append((time.thread_time_ns() - start) / operations)
    return series


def ratio(series: Series, name: str, to: str) -> float:
    """How many times as long, in the middle of the rounds."""
    return statistics.median(a / b for a, b in zip(series[name], series[to], strict=True))


def bind(loop: Callable[..., Any], cache: Any) -> Callable[..., Any]:
    """A *loop* of its own over *cache*."""
    loop = own(loop)
    return lambda *arguments: loop(cache, *arguments)


def against(series: Series, name: str, what: str, to: str, limit: float | None = None, note: str = "") -> Row:
    """The row of *name* and *to*; without a value where one of them is not installed."""
    label = f"{name}: {what}, against {to}"
    if name in series and to in series:
        return Row(label, ratio(series, name, to), "x", limit, note=note)
    return Row(label, None, "x", limit, note=MISSING)


def operations(sizes: Sizes, report: Report) -> None:
    """Reads and writes, one thread."""
    rounds, count, entries = sizes.rounds, sizes.operations, sizes.small
    draw = random.Random(1)
    caches = {name: filled(contender, entries) for name, contender in CONTENDERS.items()}

    def turns(loop: str, *, bounded: bool = False) -> dict[str, Callable[..., Any]]:
        """By contender, that *loop* of it, where it has one."""
        return {
            name: bind(getattr(contender, loop), caches[name])
            for name, contender in CONTENDERS.items()
            if getattr(contender, loop) is not None and not (bounded and contender.unbounded)
        }

    keys = [key_of(i) for i in range(entries)]
    unused = map(key_of, itertools.count(entries))

    def present() -> list[int]:
        return draw.choices(keys, k=count)

    def absent() -> list[int]:
        return [-1 - key for key in present()]

    def fresh() -> list[int]:
        return list(itertools.islice(unused, count))

    def floats() -> list[Any]:
        return [float(i) for i in range(count)]

    def objects() -> list[Any]:
        return [Session() for _ in range(count)]

    # What each operation is, and makes its arguments. Those that evict come last: they put other keys in.
    measured: dict[str, tuple[dict[str, Callable[..., Any]], Callable[[], tuple[Any, ...]]]] = {
        "read hit": (turns("read"), lambda: (present(),)),
        "get": (turns("get"), lambda: (present(),)),
        "in": (turns("find"), lambda: (present(),)),
        "in, not there": (turns("find"), lambda: (absent(),)),
        "set of an existing key": (turns("write"), lambda: (present(), floats())),
        "set with eviction": (turns("write", bounded=True), lambda: (fresh(), floats())),
        "set with eviction, of objects": (turns("write", bounded=True), lambda: (fresh(), objects())),
    }
    found = {what: interleave(loops, arguments, rounds, count) for what, (loops, arguments) in measured.items()}
    for what, series in found.items():
        report.note_times(what, series)
    weak = "values that can be weakly referenced, dying as they are evicted"
    promises: list[tuple[str, str, str, float | None, str]] = [
        (OURS, "read hit", BOX, 1.0, ""),
        (OURS, "read hit", "dict", 1.5, ""),
        (OURS_TIMED, "read hit", BOX_TTL, 1.0, ""),
        ("Registry(idle)", "read hit", BOX_TTL, None, ""),
        (OURS, "get", BOX, 1.0, ""),
        (OURS, "in", BOX, 1.0, ""),
        (OURS, "set of an existing key", BOX, 1.0, ""),
        (OURS, "set with eviction", BOX, 2.0, "1.5 is aimed for; values are floats"),
        (OURS, "set with eviction, of objects", BOX, None, weak),
        (OURS_TIMED, "set with eviction", BOX_TTL, None, ""),
        ("Registry(on_evict)", "set with eviction", BOX, None, ""),
        (IN_PYTHON, "read hit", LRU, 0.9, ""),
        (IN_PYTHON, "read hit", LRU_LOCKED, 0.4, "the lock that it needs among threads"),
        (IN_PYTHON_TIMED, "read hit", TTL, 0.5, ""),
        ("Registry(idle) in Python", "read hit", TTL, None, ""),
        (IN_PYTHON, "set of an existing key", LRU, None, ""),
        (IN_PYTHON, "set with eviction", LRU, 0.5, "values are floats"),
        (IN_PYTHON, "set with eviction, of objects", LRU, 0.5, weak),
        (IN_PYTHON_TIMED, "set with eviction", TTL, None, ""),
        ("Registry(on_evict) in Python", "set with eviction", LRU, None, ""),
    ]
    report.rows.extend(
        against(found[what], name, what, to, limit, note)
        for name, what, to, limit, note in promises
        if name in CONTENDERS
    )


def timed(name: str) -> str:
    """The contender that is the registry *name* with a ttl."""
    return {OURS: OURS_TIMED, IN_PYTHON: IN_PYTHON_TIMED}[name]


def growth(sizes: Sizes, report: Report) -> None:
    """Reads of random keys, few entries and many."""
    small, large = (random_reads(entries, sizes, report) for entries in (sizes.small, sizes.large))
    for name in small:
        if name != "dict":
            report.rows.append(
                Row(
                    f"{name}: its ratio to a dict at {sizes.large:,} entries, against that at {sizes.small:,}",
                    large[name] / small[name],
                    "x",
                    1.3 if name in REGISTRIES else None,
                    note=f"read hit of random keys: {small[name]:.1f} and {large[name]:.1f} times a dict",
                )
            )


def random_reads(entries: int, sizes: Sizes, report: Report) -> dict[str, float]:
    """How many times as long as in a dict of the same size a read takes."""
    draw = random.Random(2)
    names = [name for name in ("dict", BY_HAND, LRU, BOX, "lru-dict", OURS, IN_PYTHON) if name in CONTENDERS]
    keys = [key_of(i) for i in range(entries)]
    readers = {name: bind(CONTENDERS[name].read, filled(CONTENDERS[name], entries)) for name in names}
    series = interleave(readers, lambda: (draw.choices(keys, k=sizes.operations),), sizes.rounds, sizes.operations)
    report.note_times(f"read hit at {entries:,} entries", series)
    return {name: ratio(series, name, "dict") for name in names}


def time_reads(cache: Any, keys: Sequence[Any], out: array[int]) -> None:
    """The nanoseconds of each ``cache[key]``."""
    clock = time.perf_counter_ns
    for i, key in enumerate(keys):
        start = clock()
        cache[key]
        out[i] = clock() - start


def time_writes(cache: Any, keys: Sequence[Any], out: array[int]) -> None:
    """The nanoseconds of each ``cache[key] = value``."""
    clock = time.perf_counter_ns
    for i, key in enumerate(keys):
        start = clock()
        cache[key] = i
        out[i] = clock() - start


def time_churn(cache: Any, keys: Sequence[Any], out: array[int]) -> None:
    """The same for a plain dict, which has to be told what to drop: the oldest, as an LRU without reads does."""
    clock = time.perf_counter_ns
    oldest = iter(list(cache))
    for i, key in enumerate(keys):
        start = clock()
        cache[key] = i
        del cache[next(oldest)]
        out[i] = clock() - start


def least(repeats: int, once: Callable[[array[int]], None], count: int) -> array[int]:
    """What each operation of a sequence took at least."""
    best = array("q", [sys.maxsize]) * count
    for _ in range(repeats):
        out = array("q", [0]) * count
        once(out)
        best = array("q", map(min, best, out))
    return best


def each_operation(contender: Contender, sizes: Sizes) -> dict[str, array[int]]:
    """The nanoseconds of every single operation, by kind."""
    draw = random.Random(3)
    entries, count = sizes.large, sizes.single
    keys = draw.choices([key_of(i) for i in range(entries)], k=count)
    fresh = [key_of(i) for i in range(entries, entries + count)]
    cache = filled(contender, entries)
    reads, writes = own(time_reads), own(time_writes)
    insert = own(time_churn) if contender.unbounded else writes
    return {
        "reads": least(sizes.repeats, lambda out: reads(cache, keys, out), count),
        "overwrites": least(sizes.repeats, lambda out: writes(cache, keys, out), count),
        "sets with eviction": least(sizes.repeats, lambda out: insert(filled(contender, entries), fresh, out), count),
    }


def single_operations(sizes: Sizes, report: Report) -> None:
    """The slowest single operation among many entries."""
    rebuilt: set[int] = set()
    for name in ["dict", OURS, OURS_TIMED, IN_PYTHON, LRU, BOX]:
        if name not in CONTENDERS:
            continue
        took_each = each_operation(CONTENDERS[name], sizes)
        slowest = {what: max(took) / 1000 for what, took in took_each.items()}
        limit = STALL if name in REGISTRIES else None
        report.rows.append(
            Row(
                f"{name}: slowest operation at {sizes.large:,} entries",
                max(slowest.values()),
                "us",
                limit,
                note=", ".join(f"{what} {took:,.0f}" for what, took in slowest.items()),
            )
        )
        if name == "dict":
            rebuilt = {i for i, took in enumerate(took_each["sets with eviction"]) if took > STALL * 1000}
            continue
        others = (took for i, took in enumerate(took_each["sets with eviction"]) if i not in rebuilt)
        report.rows.append(
            Row(
                "- without the sets at which a plain dict stalls too",
                max(slowest["reads"], slowest["overwrites"], max(others, default=0) / 1000),
                "us",
                limit,
                note=f"left out: {len(rebuilt)} of {sizes.single:,}, at which a dict with the same inserts and "
                f"deletes took over {STALL:.0f} us, because it rebuilt its table",
            )
        )


def bytes_held(name: str, entries: int, size: Callable[[], int]) -> tuple[float, float]:
    """Bytes an entry by what *size* says: when the container is full, and when each entry has been replaced once."""
    contender = CONTENDERS[name]
    keys = [key_of(i) for i in range(2 * entries)]  # keys and values belong to the user: they exist before
    before = size()
    cache = contender.make(entries)
    contender.write(cache, keys[:entries], [None] * entries)
    full = size() + contender.beside(cache) - before
    if contender.unbounded:
        for old, new in zip(keys[:entries], keys[entries:], strict=True):
            cache[new] = None
            del cache[old]
    else:
        contender.write(cache, keys[entries:], [None] * entries)
    return full / entries, (size() + contender.beside(cache) - before) / entries


def allocated(name: str, entries: int) -> tuple[float, float]:
    """`bytes_held` by Python's own count of what it allocated."""
    gc.collect()  # the container before this one
    tracemalloc.start()
    try:
        return bytes_held(name, entries, lambda: tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()


def resident(name: str, entries: int) -> tuple[float, float]:
    """`bytes_held` by the size of this process."""
    process = psutil.Process()
    return bytes_held(name, entries, lambda: process.memory_info().rss)


def resident_alone(name: str, entries: int) -> tuple[float, float]:
    """`resident` in a process of its own, whose size nothing else has changed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(resident, name, entries).result(timeout=300)


def memory(sizes: Sizes, report: Report) -> None:
    """Bytes of an entry."""
    # glibc would keep the tables that a growing container has left; told so, it gives them back at once.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    for entries in sizes.memory:
        of_dict = allocated("dict", entries)
        for name, contender in CONTENDERS.items():
            if contender.unbounded or name.endswith("RLock") or (entries > sizes.memory[0] and name not in MANY):
                continue
            held = resident_alone(name, entries) if contender.native else allocated(name, entries)
            new, churned = (total - own_part for total, own_part in zip(held, of_dict, strict=True))
            how = "; by the size of a process" if contender.native else ""
            if name == OURS:
                how = "; 60 is aimed for"
            report.rows.append(
                Row(
                    f"{name}: beyond a dict's own, {entries:,} entries",
                    max(new, churned),
                    "bytes",
                    80.0 if name in REGISTRIES else None,
                    note=f"new {new:.0f}, each entry replaced once {churned:.0f}{how}",
                )
            )


def expired_at_once(make: Callable[[ManualClock], Any], sizes: Sizes) -> float:
    """Microseconds of the slowest call after everything has expired: reads that miss and new entries, in turn."""
    count = 2 * (sizes.expiring // 50)

    def once(out: array[int]) -> None:
        clock = ManualClock()
        cache = make(clock)
        for i in range(sizes.expiring):
            cache[i] = i
        clock.advance(120)
        fresh = itertools.count(sizes.expiring)
        now = time.perf_counter_ns
        for i in range(0, count, 2):
            start = now()
            cache.get(i)
            out[i] = now() - start
            key = next(fresh)
            start = now()
            cache[key] = i
            out[i + 1] = now() - start

    return max(least(sizes.repeats, once, count)) / 1000


def expired_with_janitor(kind: type[Any], sizes: Sizes) -> tuple[float, float]:
    """
    Microseconds of the slowest call while the janitor works, and of processor time in the call that had most of it.

    Only one call each half millisecond, or the caller's own slices of the work would leave the janitor none.
    """
    clock = ManualClock()
    registry = kind(maxsize=2 * sizes.expiring, ttl=0.5, timer=lambda: clock.now)
    for i in range(sizes.expiring):
        registry[i] = i
    clock.advance(1.0)  # the janitor is due half a second after the first entry came
    slowest, busiest, deadline = 0, 0, time.monotonic() + 20
    while len(registry) and time.monotonic() < deadline:
        start, busy = time.perf_counter_ns(), time.thread_time_ns()
        registry.get(0)
        busiest = max(busiest, time.thread_time_ns() - busy)
        slowest = max(slowest, time.perf_counter_ns() - start)
        time.sleep(0.0005)
    return slowest / 1000, busiest / 1000


def _with_ttl(kind: type[Any], bound: int, clock: ManualClock) -> Any:
    return kind(maxsize=bound, ttl=60, timer=clock)


def expiry(sizes: Sizes, report: Report) -> None:
    """Many entries expiring at once."""
    what = f"{sizes.expiring:,} entries expire at once"
    note = "slowest of the calls that follow"
    bound = 2 * sizes.expiring
    theirs = expired_at_once(lambda clock: cachetools.TTLCache(bound, 60, timer=clock), sizes)
    report.rows.append(Row(f"{TTL}: {what}", theirs, "us", note=note))
    for name, kind in REGISTRIES.items():
        ours = expired_at_once(partial(_with_ttl, kind, bound), sizes)
        runs = [expired_with_janitor(kind, sizes) for _ in range(2 * sizes.repeats)]
        slowest, busiest = (min(values) for values in zip(*runs, strict=True))
        report.rows += [
            Row(f"{timed(name)}: {what}", ours, "us", 1000.0, note=note),
            Row(
                "- with the janitor at work in its thread",
                slowest,
                "us",
                1000.0,
                note=f"least of {len(runs)} runs; {busiest:,.0f} us of work, the rest is waiting, also for the machine",
            ),
        ]


def together(loop: Callable[..., int], cache: Any, parts: Sequence[Sequence[int]]) -> tuple[float, list[BaseException]]:
    """Nanoseconds until one thread for each part has gone through it, and what they raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(parts) + 1)

    def work(part: Sequence[int]) -> None:
        barrier.wait(60)
        try:
            loop(cache, part)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
            errors.append(error)

    workers = [threading.Thread(target=work, args=(part,)) for part in parts]
    for worker in workers:
        worker.start()
    barrier.wait(60)
    start = time.perf_counter_ns()
    for worker in workers:
        worker.join()
    return float(time.perf_counter_ns() - start), errors


def zipf(sizes: Sizes) -> tuple[list[int], int]:
    """Requests as they come to a cache, a few keys most of the time; and the bound that is given to it."""
    draw = random.Random(4)
    population, bound = sizes.shared // 2, sizes.shared // 20
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(population)))
    return draw.choices(range(population), cum_weights=weights, k=sizes.shared), bound


def creators(bound: int) -> dict[str, tuple[Callable[..., Any], Any]]:
    """By contender, its loop for get or create, and a container."""
    names = [OURS, OURS_TIMED, IN_PYTHON, IN_PYTHON_TIMED, LRU, LRU_LOCKED, BY_HAND, BOX, BOX_TTL, "lru-dict"]
    return {name: (own(CONTENDERS[name].create), CONTENDERS[name].make(bound)) for name in names if name in CONTENDERS}


def alone(sizes: Sizes, report: Report) -> None:
    """Get or create on a Zipf workload, one thread."""
    requests, bound = zipf(sizes)
    turns = {name: bind(loop, cache) for name, (loop, cache) in creators(bound).items()}
    what = "get or create, Zipf"
    # The two that the limit compares are that close to each other that it takes more rounds to tell.
    series = interleave(turns, lambda: (requests,), 3 * sizes.shared_rounds, len(requests))
    report.note_times(what, series)
    report.rows.extend(
        against(series, name, what, to, limit)
        for name, to, limit in [(OURS, BOX, 1.0), (OURS_TIMED, BOX_TTL, None), (IN_PYTHON, LRU, None)]
        if name in CONTENDERS
    )


def threads(sizes: Sizes, report: Report) -> None:
    """Get or create on a Zipf workload, one thread and four."""
    requests, bound = zipf(sizes)
    parts = [requests[i::THREADS] for i in range(THREADS)]
    made = creators(bound)
    rates: dict[str, list[float]] = {name: [] for name in made}
    wrong: dict[str, str] = {}
    for _ in range(sizes.shared_rounds):
        for name, (loop, cache) in made.items():
            if name in wrong:
                continue
            alone_took, errors = together(loop, cache, [requests])
            took, more = together(loop, cache, parts)
            rates[name].append(alone_took / took)
            if errors or more:
                wrong[name] = f"raised {(errors + more)[0]!r}"
            elif len(cache) > bound:
                wrong[name] = f"holds {len(cache):,} entries, {bound:,} were allowed"
            elif any(value != -key for key, value in cache.items()):
                wrong[name] = "holds a value that belongs to another key"
    for name in made:
        fine = name not in wrong
        report.rows.append(
            Row(
                f"{name}: {THREADS} threads together, against one thread's rate",
                statistics.median(rates[name]) if fine else None,
                "x",
                0.8 if name in REGISTRIES else None,
                at_least=True,
                note="bound held, nothing raised" if fine else f"wrong: {wrong[name]}",
            )
        )


class Plain:
    """A class as it is."""

    def __init__(self) -> None:
        self.conversations: dict[int, int] = {}


@bounded_registry("conversations", maxsize=10)
class Decorated(Plain):
    """The same, bounded."""


class Bare:
    """A descriptor that only sets, and does nothing else."""

    def __set__(self, owner: object, value: object) -> None:
        owner.__dict__["conversations"] = value


class Described(Plain):
    """What any descriptor without a ``__get__`` costs, ours or another."""

    conversations = Bare()  # type: ignore[assignment] # the attribute is a dict all the same


def attribute(sizes: Sizes, report: Report) -> None:
    """Reading a decorated attribute."""
    count = sizes.operations * 10
    for reads, what in ((1, "reading an attribute"), (50, "reading an attribute, fifty times in a line")):
        turns: dict[str, Callable[..., Any]] = {
            kind.__name__: timeit.Timer("bot.conversations;" * reads, "bot = made", globals={"made": kind()}).timeit
            for kind in (Plain, Described, Decorated)
        }
        passes = (count // reads,)
        series = interleave(turns, itertools.repeat(passes).__next__, sizes.rounds, count)
        report.note_times(what, series)
        bare = ratio(series, "Described", "Plain")
        report.rows.append(
            Row(
                f"{what}: decorated against undecorated",
                ratio(series, "Decorated", "Plain"),
                "x",
                3.0 if reads == 1 else None,
                note=f"a bare descriptor that has `__set__` only: {bare:.2f}",
            )
        )


def replay(requests: list[int], bound: int, rounds: int) -> tuple[Series, dict[str, int]]:
    """The times of get or create for *requests*, from empty, and the misses."""
    names = [LRU, LRU_LOCKED, BY_HAND, OURS, OURS_TIMED, IN_PYTHON, IN_PYTHON_TIMED, BOX, "lru-dict"]
    misses: dict[str, int] = {}

    def turn(name: str) -> Callable[[], None]:
        loop = own(CONTENDERS[name].create)

        def once() -> None:
            misses[name] = loop(CONTENDERS[name].make(bound), requests)

        return once

    turns = {name: turn(name) for name in names if name in CONTENDERS}
    return interleave(turns, tuple, rounds, len(requests)), misses


def traces(sizes: Sizes, report: Report) -> None:
    """Get or create over real traces."""
    paths = sorted(DATA.glob("trace_*.txt.gz"))
    if not paths:
        report.rows.append(Row("get or create over traces", None, note="skipped: the traces are not on this machine"))
    for path in paths:
        with gzip.open(path, "rt") as lines:
            requests = [int(line) for line in itertools.islice(lines, sizes.trace_requests)]
        bound = max(1, len(set(requests)) // 10)
        series, misses = replay(requests, bound, sizes.trace_rounds)
        label = f"get or create, {path.name.removeprefix('trace_').removesuffix('.txt.gz')}"
        report.note_times(label, series)
        hits = {name: f"{1 - missed / len(requests):.2%}" for name, missed in misses.items()}
        for name in REGISTRIES:
            report.rows += [
                against(series, name, label, LRU, note=f"a tenth of the keys fit: {bound:,}"),
                Row(
                    f"{name}: {label}, difference in hits to {LRU}, which is exact",
                    abs(misses[name] - misses[LRU]),
                    "hits",
                    0,
                    note=f"of {len(requests):,} requests hit {hits[name]}, there {hits[LRU]}",
                ),
            ]
