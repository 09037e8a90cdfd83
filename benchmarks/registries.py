"""Registries beside what people use today: time, memory, and the longest a single call takes.

Contenders take turns within each round, so that what else the machine does hits all of them; what is quoted is the median over the
rounds of the ratio within a round. The garbage collector is off while something is timed. Loops count with what they loop over,
about 10 ns an operation, which moves every ratio towards 1.

Where one call is looked at, the same sequence of calls runs several times from the same start, and each call counts with the
least it took: an interruption by the machine does not hit the same call again, a stall of the container does.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cachetools
import psutil

from benchmarks.contenders import ABSENT, CONTENDERS, Contender, Session, own
from hygiene.decorators import bounded_registry
from hygiene.registry import Registry
from hygiene.testing import ManualClock

__all__ = ["FULL", "QUICK", "Report", "Row", "Sizes", "run"]

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
STALL = 100.0  # microseconds: the limit for a single operation, and what counts as a stall of a plain dict
THREADS = 4
OURS = "Registry"
LRU, LRU_LOCKED, TTL = "cachetools LRU", "cachetools LRU + RLock", "cachetools TTL"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; everything is a number of entries, operations or repetitions."""

    rounds: int = 101
    operations: int = 2_000  # a round of a few hundred microseconds: most are not interrupted
    small: int = 1_000
    large: int = 1_000_000
    single: int = 500_000  # single operations timed one by one: at 1e6 entries a dict rebuilds its table once in these
    repeats: int = 4
    memory: tuple[int, ...] = (100_000, 1_000_000)
    expiring: int = 100_000
    shared: int = 100_000
    shared_rounds: int = 11
    trace_rounds: int = 5
    trace_requests: int | None = None  # all


FULL = Sizes()
QUICK = Sizes(
    rounds=15,
    operations=1_000,
    large=50_000,
    single=40_000,
    repeats=3,
    memory=(50_000,),
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


@dataclass(frozen=True, slots=True)
class Report:
    """
    What a run found.

    Args:
        rows: What was promised, and what else belongs beside it.
        nanoseconds: By operation and contender: the median of an operation.
        ratios: By operation and contender: against `LRU`.
        absent: Contenders that could not be imported, and why.
    """

    rows: list[Row]
    nanoseconds: dict[str, dict[str, float]]
    ratios: dict[str, dict[str, float]]
    absent: dict[str, str]


Series = dict[str, list[float]]


def run(sizes: Sizes, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything; *progress* is told what comes next."""
    report = Report([], {}, {}, dict(ABSENT))
    sections: list[Callable[[Sizes, Report], None]] = [
        operations,
        growth,
        single_operations,
        memory,
        expiry,
        threads,
        attribute,
        traces,
    ]
    for section in sections:
        progress((section.__doc__ or "").strip().rstrip("."))
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
    turns: dict[str, Callable[..., Any]], arguments: Callable[[int], tuple[Any, ...]], rounds: int, operations: int
) -> Series:
    """Nanoseconds an operation, by contender and round; each call gets arguments of its own, made outside the timing."""
    names = list(turns)
    series: Series = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            given = arguments(number)
            start = time.perf_counter_ns()
            turns[name](*given)
            series[name].append((time.perf_counter_ns() - start) / operations)
    return series


def ratio(series: Series, name: str, to: str) -> float:
    """How many times as long, in the middle of the rounds."""
    return statistics.median(a / b for a, b in zip(series[name], series[to], strict=True))


def bind(loop: Callable[..., Any], cache: Any) -> Callable[..., Any]:
    """A *loop* of its own over *cache*."""
    loop = own(loop)
    return lambda *arguments: loop(cache, *arguments)


def operations(sizes: Sizes, report: Report) -> None:
    """Reads and writes, one thread."""
    rounds, count, entries = sizes.rounds, sizes.operations, sizes.small
    draw = random.Random(1)
    caches = {name: filled(contender, entries) for name, contender in CONTENDERS.items()}
    bounded = {name: cache for name, cache in caches.items() if not CONTENDERS[name].unbounded}
    readers = {name: bind(CONTENDERS[name].read, cache) for name, cache in caches.items()}
    writers = {name: bind(CONTENDERS[name].write, cache) for name, cache in caches.items()}
    evictors = {name: bind(CONTENDERS[name].write, cache) for name, cache in bounded.items()}

    def present(_: int) -> list[int]:
        return [key_of(i) for i in draw.choices(range(entries), k=count)]

    def fresh(number: int) -> list[int]:
        first = entries + number * count
        return [key_of(i) for i in range(first, first + count)]

    read = interleave(readers, lambda number: (present(number),), rounds, count)
    write = interleave(writers, lambda number: (present(number), [float(i) for i in range(count)]), rounds, count)
    evict = interleave(evictors, lambda number: (fresh(number), [float(i) for i in range(count)]), rounds, count)
    objects = interleave(
        evictors, lambda number: (fresh(number + rounds), [Session() for _ in range(count)]), rounds, count
    )
    for what, series in {
        "read hit": read,
        "set of an existing key": write,
        "set with eviction": evict,
        "set with eviction, of objects": objects,
    }.items():
        report.nanoseconds[what] = {name: statistics.median(values) for name, values in series.items()}
        report.ratios[what] = {name: ratio(series, name, LRU) for name in series}
    weak = "values that can be weakly referenced, dying as they are evicted"
    report.rows.extend([
        Row(f"read hit, against {LRU} without a lock", ratio(read, OURS, LRU), "x", 0.9),
        Row("read hit, against it with the lock it needs", ratio(read, OURS, LRU_LOCKED), "x", 0.4),
        Row("ttl read hit, against cachetools' TTLCache", ratio(read, "Registry(ttl)", TTL), "x", 0.5),
        Row("idle read hit, against the same", ratio(read, "Registry(idle)", TTL), "x"),
        Row(f"set of an existing key, against {LRU}", ratio(write, OURS, LRU), "x"),
        Row(f"set with eviction, against {LRU}", ratio(evict, OURS, LRU), "x", 0.5, note="values are floats"),
        Row("set with eviction of objects, against the same", ratio(objects, OURS, LRU), "x", 0.5, note=weak),
        Row("ttl set with eviction, against TTLCache", ratio(evict, "Registry(ttl)", TTL), "x"),
        Row("on_evict set with eviction, against the same LRU", ratio(evict, "Registry(on_evict)", LRU), "x"),
    ])


def growth(sizes: Sizes, report: Report) -> None:
    """Reads of random keys, few entries and many."""
    draw = random.Random(2)
    names = ["dict", "OrderedDict LRU by hand", LRU, "cachebox LRU", "lru-dict", OURS]
    to_dict: dict[int, dict[str, float]] = {}
    for entries in (sizes.small, sizes.large):
        readers = {
            name: bind(CONTENDERS[name].read, filled(CONTENDERS[name], entries)) for name in names if name in CONTENDERS
        }
        keys = [key_of(i) for i in range(entries)]
        series = interleave(
            readers, lambda _, keys=keys: (draw.choices(keys, k=sizes.operations),), sizes.rounds, sizes.operations
        )
        to_dict[entries] = {name: ratio(series, name, "dict") for name in series}
        label = f"read hit at {entries:,} entries"
        report.nanoseconds[label] = {name: statistics.median(values) for name, values in series.items()}
        report.ratios[label] = {name: ratio(series, name, LRU) for name in series}
    small, large = to_dict[sizes.small], to_dict[sizes.large]
    for name in small:
        if name != "dict":
            report.rows.append(
                Row(
                    f"{name}: its ratio to a dict at {sizes.large:,} entries, against that at {sizes.small:,}",
                    large[name] / small[name],
                    "x",
                    1.3 if name == OURS else None,
                    note=f"read hit of random keys: {small[name]:.1f} and {large[name]:.1f} times a dict",
                )
            )


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


def single_operations(sizes: Sizes, report: Report) -> None:
    """The slowest single operation among many entries."""
    draw = random.Random(3)
    entries, count = sizes.large, sizes.single
    keys = draw.choices([key_of(i) for i in range(entries)], k=count)
    fresh = [key_of(i) for i in range(entries, entries + count)]
    rebuilt: set[int] = set()
    for name in ["dict", OURS, "Registry(ttl)", LRU, "cachebox LRU", "lru-dict"]:
        if name not in CONTENDERS:
            continue
        contender = CONTENDERS[name]
        cache = filled(contender, entries)
        timed = {
            "reads": least(sizes.repeats, lambda out, cache=cache: own(time_reads)(cache, keys, out), count),
            "overwrites": least(sizes.repeats, lambda out, cache=cache: own(time_writes)(cache, keys, out), count),
        }
        del cache
        insert = own(time_churn if contender.unbounded else time_writes)
        timed["sets with eviction"] = evictions = least(
            sizes.repeats, lambda out, c=contender, insert=insert: insert(filled(c, entries), fresh, out), count
        )
        if name == "dict":
            rebuilt = {i for i, took in enumerate(evictions) if took > STALL * 1000}
        slowest = {what: max(took) / 1000 for what, took in timed.items()}
        spread = ", ".join(f"{what} {took:.0f}" for what, took in slowest.items())
        limit = STALL if name == OURS else None
        report.rows.append(
            Row(f"{name}: slowest operation at {entries:,} entries", max(slowest.values()), "us", limit, note=spread)
        )
        if name != "dict":
            rest = max((took for i, took in enumerate(evictions) if i not in rebuilt), default=0) / 1000
            report.rows.append(
                Row(
                    "- the same without the sets at which a plain dict stalls too",
                    max(slowest["reads"], slowest["overwrites"], rest),
                    "us",
                    limit,
                    note=f"{len(rebuilt)} of {count:,} left out: a dict with the same inserts and deletes rebuilt its table there",
                )
            )


def bytes_held(name: str, entries: int, size: Callable[[], int]) -> tuple[float, float]:
    """Bytes an entry by what *size* says: when the container is full, and when each entry has been replaced once."""
    contender = CONTENDERS[name]
    keys = [key_of(i) for i in range(2 * entries)]  # keys and values belong to the user: they exist before
    before = size()
    cache = contender.make(entries)
    contender.write(cache, keys[:entries], [None] * entries)
    full = size() - before
    if contender.unbounded:
        for old, new in zip(keys[:entries], keys[entries:], strict=True):
            cache[new] = None
            del cache[old]
    else:
        contender.write(cache, keys[entries:], [None] * entries)
    return full / entries, (size() - before) / entries


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
            if contender.unbounded or name.endswith("RLock"):
                continue
            held = resident_alone(name, entries) if contender.native else allocated(name, entries)
            new, churned = (total - own_part for total, own_part in zip(held, of_dict, strict=True))
            how = "; by the size of a process" if contender.native else ""
            report.rows.append(
                Row(
                    f"{name}: beyond a dict's own, {entries:,} entries",
                    max(new, churned),
                    "bytes",
                    80.0 if name == OURS else None,
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


def expired_with_janitor(sizes: Sizes) -> float:
    """The same for a caller who comes by every half millisecond, until the janitor is done; nothing is left out but interruptions."""
    clock = ManualClock()
    registry: Registry[int, int] = Registry(maxsize=2 * sizes.expiring, ttl=0.5, timer=clock)
    for i in range(sizes.expiring):
        registry[i] = i
    clock.advance(1.0)  # the janitor is due half a second after the first entry came
    slowest, now, deadline = 0, time.perf_counter_ns, time.monotonic() + 20
    while len(registry) and time.monotonic() < deadline:
        start = now()
        registry.get(0)
        slowest = max(slowest, now() - start)
        time.sleep(0.0005)
    return slowest / 1000


def expiry(sizes: Sizes, report: Report) -> None:
    """Many entries expiring at once."""
    count = sizes.expiring
    bound = 2 * count
    note = "slowest of the calls that follow"
    report.rows.extend([
        Row(
            f"cachetools TTL: {count:,} entries expire at once",
            expired_at_once(lambda clock: cachetools.TTLCache(bound, 60, timer=clock), sizes),
            "us",
            note=note,
        ),
        Row(
            f"Registry(ttl): {count:,} entries expire at once",
            expired_at_once(lambda clock: Registry(maxsize=bound, ttl=60, timer=clock), sizes),
            "us",
            1000.0,
            note=note,
        ),
        Row(
            "- the same with the janitor at work in its thread",
            min(expired_with_janitor(sizes) for _ in range(sizes.repeats)),
            "us",
            1000.0,
            note=f"least of {sizes.repeats} runs: threads cannot be made to repeat themselves",
        ),
    ])


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


def threads(sizes: Sizes, report: Report) -> None:
    """Get or create on a Zipf workload, one thread and four."""
    draw = random.Random(4)
    population, bound = sizes.shared // 2, sizes.shared // 20
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(population)))
    requests = draw.choices(range(population), cum_weights=weights, k=sizes.shared)
    parts = [requests[i::THREADS] for i in range(THREADS)]
    names = [OURS, "Registry(ttl)", LRU, LRU_LOCKED, "OrderedDict LRU by hand", "cachebox LRU", "lru-dict"]
    caches = {name: CONTENDERS[name].make(bound) for name in names if name in CONTENDERS}
    loops = {name: own(CONTENDERS[name].create) for name in caches}  # type: ignore[arg-type] # none of these is without
    rates: dict[str, list[float]] = {name: [] for name in caches}
    wrong: dict[str, str] = {}
    for _ in range(sizes.shared_rounds):
        for name, cache in caches.items():
            if name in wrong:
                continue
            alone_took, errors = together(loops[name], cache, [requests])
            took, more = together(loops[name], cache, parts)
            rates[name].append(alone_took / took)
            if errors or more:
                wrong[name] = f"raised {(errors + more)[0]!r}"
            elif len(cache) > bound:
                wrong[name] = f"holds {len(cache):,} entries, {bound:,} were allowed"
            elif any(value != -key for key, value in cache.items()):
                wrong[name] = "holds a value that belongs to another key"
    for name in caches:
        fine = name not in wrong
        report.rows.append(
            Row(
                f"{name}: {THREADS} threads together, against one thread's rate",
                statistics.median(rates[name]) if fine else None,
                "x",
                0.8 if name == OURS else None,
                at_least=True,
                note="bound held, nothing raised" if fine else f"wrong: {wrong[name]}",
            )
        )


class Plain:
    """A class as it is."""

    def __init__(self) -> None:
        self.conversations: dict[int, int] = {}


@bounded_registry("conversations", maxsize=10)
class Decorated:
    """The same class, bounded."""

    def __init__(self) -> None:
        self.conversations: dict[int, int] = {}


def attribute(sizes: Sizes, report: Report) -> None:
    """Reading a decorated attribute."""
    timers = {
        kind.__name__: timeit.Timer("bot.conversations;" * 50, globals={"bot": kind()}) for kind in (Plain, Decorated)
    }
    turns: dict[str, Callable[..., Any]] = {name: timer.timeit for name, timer in timers.items()}
    series = interleave(turns, lambda _: (sizes.operations // 20,), sizes.rounds, sizes.operations // 20 * 50)
    what = "reading an attribute"
    report.nanoseconds[what] = {name: statistics.median(values) for name, values in series.items()}
    report.rows.append(
        Row("reading a decorated attribute, against an undecorated one", ratio(series, "Decorated", "Plain"), "x", 3.0)
    )


def traces(sizes: Sizes, report: Report) -> None:
    """Get or create over real traces."""
    names = [LRU, LRU_LOCKED, "OrderedDict LRU by hand", OURS, "Registry(ttl)", "cachebox LRU", "lru-dict"]
    paths = sorted(DATA.glob("trace_*.txt.gz"))
    if not paths:
        report.rows.append(Row("get or create over traces", None, note="skipped: the traces are not on this machine"))
    for path in paths:
        with gzip.open(path, "rt") as lines:
            requests = [int(line) for line in itertools.islice(lines, sizes.trace_requests)]
        bound = max(1, len(set(requests)) // 10)
        loops = {name: own(CONTENDERS[name].create) for name in names if name in CONTENDERS}  # type: ignore[arg-type]
        misses: dict[str, int] = {}

        def turn(name: str, loops: Any = loops, misses: Any = misses, bound: int = bound) -> Callable[..., Any]:
            def replay(requests: list[int]) -> None:
                misses[name] = loops[name](CONTENDERS[name].make(bound), requests)

            return replay

        series = interleave(
            {name: turn(name) for name in loops},
            lambda _, requests=requests: (requests,),
            sizes.trace_rounds,
            len(requests),
        )
        trace = path.name.removeprefix("trace_").removesuffix(".txt.gz")
        label = f"get or create, {trace}"
        report.nanoseconds[label] = {name: statistics.median(values) for name, values in series.items()}
        report.ratios[label] = {name: ratio(series, name, LRU) for name in series}
        hit = 1 - misses[OURS] / len(requests)
        report.rows.extend([
            Row(f"{label}: time against {LRU}", ratio(series, OURS, LRU), "x", note=f"a tenth of the keys fit: {bound:,}"),
            Row(
                f"{label}: hits that cachetools' exact LRU has and we have not, or the reverse",
                abs(misses[OURS] - misses[LRU]),
                "",
                0,
                note=f"both hit {hit:.1%} of {len(requests):,} requests" if misses[OURS] == misses[LRU] else "",
            ),
        ])
