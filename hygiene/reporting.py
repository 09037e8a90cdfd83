"""What is alive in this process, and who holds what: as records, as text for a person, as JSON for a program.

Theory of operation
-------------------
Nothing is counted or kept for a report. Who owns something registers for the sake of forks, weakly, and is found there.
Only sessions are not: one in a `with` costs as little as a list, and to register it would cost a tenth more. They are
looked for among the objects that the garbage collector knows, which is one pass in C.

Whatever is looked at may be changed, closed or collected by another thread meanwhile. So every part is copied in one
step, read without its lock (but for a write-behind, whose lock is waited for only briefly), and looked at by itself:
what goes wrong with one is a line in `Report.problems`, and the others are still told.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

import msgspec

from hygiene.cleanup import Cleanup, _exit, _Interval, _Owned, _pressure
from hygiene.cleanup import _intervals as _every
from hygiene.events import PoolStats, RegistryStats
from hygiene.janitor import alive, janitor
from hygiene.keeping import Keeper
from hygiene.memory import MemoryBudget, MemoryMonitor, MemoryReading, ShareUsage, rss
from hygiene.pool import AsyncPool, Pool
from hygiene.registry import Registry
from hygiene.session import AsyncSession, Session, _described
from hygiene.shared import ManagedLocal, SharedResource
from hygiene.stores import sqlite
from hygiene.writebehind import WriteBehind, WriteBehindStats

__all__ = [
    "BudgetReport",
    "CleanupReport",
    "HolderReport",
    "JanitorReport",
    "LeaseReport",
    "LocalReport",
    "MonitorReport",
    "PoolReport",
    "RegistryReport",
    "Report",
    "SessionReport",
    "SharedReport",
    "StoreReport",
    "WriteBehindReport",
    "report",
]

T = TypeVar("T")

_KEY = 60  # characters of a key: enough to know a user or a channel by
_NAMED = 100  # leases, or releases of one session, that are told one by one
_SHOWN = 20  # of each kind in the text
_MANY = 3  # registries of one name that the text still tells one by one
_PATIENCE = 0.05  # seconds for a lock that is held for microseconds


@dataclass(frozen=True, slots=True)
class LeaseReport:
    """A key that is leased."""

    key: str | None
    """Its ``repr``, cut; ``None`` with ``keys=False``."""
    holders: int
    """Leases on it now."""


@dataclass(frozen=True, slots=True)
class RegistryReport:
    """A registry, or the rows of several that share one life."""

    name: str | None
    owner: str | None
    """Type of the object whose attribute it is."""
    columns: tuple[str, ...]
    """Of a group, the names of its registries, which are not told again by themselves."""
    maxsize: int | None
    max_bytes: int | None
    """The bound that holds now: a share of a budget may have borrowed."""
    ttl: float | None
    """Seconds."""
    idle: float | None
    """Seconds."""
    policy: str
    store: str | None
    """The address of its store."""
    stats: RegistryStats
    leases: tuple[LeaseReport, ...]
    """The first hundred."""
    creating: tuple[str | None, ...]
    """Keys whose value is being created now; ``None`` with ``keys=False``."""


@dataclass(frozen=True, slots=True)
class HolderReport:
    """Who holds a resource of a pool. Known in a pool with *leak_after*."""

    thread: str | None
    """Name of the thread or task that took it."""
    age: float | None
    """Seconds since then."""
    since: float | None
    """The same as seconds since 1970."""
    stack: str
    """Where, as a traceback shows it; empty if that was not recorded."""


@dataclass(frozen=True, slots=True)
class PoolReport:
    """A pool."""

    name: str
    kind: str
    """``Pool`` or ``AsyncPool``."""
    closed: bool
    stats: PoolStats
    holders: tuple[HolderReport, ...]
    """The longest first."""


@dataclass(frozen=True, slots=True)
class SessionReport:
    """A session that is not closed."""

    name: str | None
    kind: str
    """``Session`` or ``AsyncSession``."""
    pending: int
    """Releases that are to come."""
    releases: tuple[str, ...]
    """What they are, in the order in which they will run; the first hundred."""


@dataclass(frozen=True, slots=True)
class StoreReport:
    """A store."""

    kind: str
    address: str
    """File or server, without a password."""
    closed: bool


@dataclass(frozen=True, slots=True)
class WriteBehindReport:
    """What saves to a store in the background."""

    name: str
    space: str
    store: str
    """The address."""
    closed: bool
    max_pending: int
    stats: WriteBehindStats


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A memory budget, in bytes."""

    total: int
    free: int
    """In no share."""
    shares: tuple[ShareUsage, ...]


@dataclass(frozen=True, slots=True)
class MonitorReport:
    """A memory monitor."""

    name: str
    running: bool
    level: str
    reading: MemoryReading | None
    """The last one; ``None`` before the first."""
    sheds: int
    """Times that memory was shed."""


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """What runs at an occasion. What is closed by the shutdown because it is alive is one of them."""

    name: str
    on: str
    """"exit", "pressure" or "interval"."""
    every: float | None
    """Seconds."""
    priority: int
    timeout: float | None
    """Seconds."""
    runs: int
    errors: int
    running: bool
    registered: bool
    """Whether somebody has registered it; ``False`` for what is closed by itself at the shutdown."""


@dataclass(frozen=True, slots=True)
class SharedReport:
    """A shared resource."""

    name: str
    open: int
    """How many there are now: one for each set of arguments."""
    leases: tuple[LeaseReport, ...]
    """The key is the arguments."""


@dataclass(frozen=True, slots=True)
class LocalReport:
    """A value for each thread or task."""

    name: str
    open: int


@dataclass(frozen=True, slots=True)
class JanitorReport:
    """The background thread."""

    running: bool
    charges: int
    """What it looks after, weakly."""
    wakeups: int
    next_due: float | None
    """Seconds until it wakes up; ``None`` if nothing is due."""


@dataclass(frozen=True, slots=True)
class Report:
    """
    Everything alive at one moment. ``str(report)`` is written for a person.

    While other threads go on, the numbers may belong to neighbouring moments.
    """

    program: str
    pid: int
    python: str
    """Version of the interpreter."""
    at: float
    """Seconds since 1970."""
    rss: int
    """Resident memory of the process in bytes."""
    threads: int
    """Threads of Python that are running."""
    registries: tuple[RegistryReport, ...]
    pools: tuple[PoolReport, ...]
    sessions: tuple[SessionReport, ...] | None
    """``None`` if they were not looked for."""
    stores: tuple[StoreReport, ...]
    writers: tuple[WriteBehindReport, ...]
    budgets: tuple[BudgetReport, ...]
    monitors: tuple[MonitorReport, ...]
    cleanups: tuple[CleanupReport, ...]
    shared: tuple[SharedReport, ...]
    locals: tuple[LocalReport, ...]
    janitor: JanitorReport
    problems: tuple[str, ...] = ()
    """What could not be looked at, and why; as a rule nothing."""

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """For a person: what there is, the numbers that tell how it is, and who holds what for how long."""
        return "\n".join(_lines(self))

    def json(self) -> bytes:
        """For a program: the fields of this record, in JSON. Units are those of the fields."""
        return _encoder.encode(self)


def report(*, keys: bool = True, stacks: bool = True, sessions: bool = True) -> Report:
    """
    What this library knows to be alive in this process: registries, pools, sessions, stores, cleanups and the rest.

    Safe in any thread, and on an event loop. It raises nothing because something is closed or collected meanwhile, and
    waits for nobody. It costs nothing when it is not called. Names are shown as they were given.

    Args:
        keys: Whether to show the keys that are leased, by their ``repr``. Keys may be names of people: with ``False``
            no key is looked at.
        stacks: Whether to show where a resource of a pool was taken, which may read source files.
        sessions: Whether to look for sessions. All objects of the process are looked at for that, in C: some 20 ms for
            a million objects, during which no other thread runs.
    """
    return _survey(_Options(keys=keys, stacks=stacks, sessions=sessions)).report


@dataclass(frozen=True, slots=True)
class _Options:
    keys: bool
    stacks: bool
    sessions: bool


@dataclass(frozen=True, slots=True)
class _Survey:
    report: Report
    registries: list[Registry[Any, Any]]
    """In the order of those in the report."""


def _survey(options: _Options) -> _Survey:
    now = time.time()
    problems: list[str] = []

    def each(things: Callable[[], Iterable[Any]], tell: Callable[[Any], T | None], what: str) -> list[tuple[Any, T]]:
        """What *tell* says of each thing; what cannot be told of one does not keep the others from being told."""
        told = []
        try:
            found = list(things())
        except Exception as error:
            problems.append(f"{what}: {_said(error)}")
            return []
        for thing in found:
            try:
                one = tell(thing)
            except Exception as error:
                problems.append(f"{what} {_name_of(thing)}: {_said(error)}")
            else:
                if one is not None:
                    told.append((thing, one))
        return told

    def records(things: Callable[[], Iterable[Any]], tell: Callable[[Any], T | None], what: str) -> tuple[T, ...]:
        return tuple(one for _, one in each(things, tell, what))

    inner: set[int] = set()
    shared = records(lambda: alive(SharedResource), lambda one: _shared(one, options, inner), "shared resource")
    registries = each(
        lambda: (one for one in alive(Registry) if id(one) not in inner),
        lambda one: _registry(one, options),
        "registry",
    )
    found = Report(
        program=_program(),
        pid=os.getpid(),
        python=sys.version.partition(" ")[0],
        at=now,
        rss=_or(rss, 0),
        threads=threading.active_count(),
        registries=tuple(one for _, one in registries),
        pools=records(lambda: [*alive(Pool), *alive(AsyncPool)], lambda one: _pool(one, options, now), "pool"),
        sessions=records(_sessions, _session, "session") if options.sessions else None,
        stores=records(_stores, _store, "store"),
        writers=records(lambda: alive(WriteBehind), _writer, "write-behind"),
        budgets=records(lambda: alive(MemoryBudget), _budget, "memory budget"),
        monitors=records(lambda: alive(MemoryMonitor), _monitor, "memory monitor"),
        cleanups=records(_cleanups, _cleanup, "cleanup"),
        shared=shared,
        locals=records(
            lambda: alive(ManagedLocal), lambda one: LocalReport(_text(one._name), len(one)), "managed local"
        ),
        janitor=_or(_janitor, JanitorReport(running=janitor.running, charges=0, wakeups=0, next_due=None)),
        problems=tuple(problems),
    )
    return _Survey(found, [one for one, _ in registries])


def _program() -> str:
    """What the process runs: its script, or the package that was started with ``-m``."""
    path = PurePath(sys.argv[0] if sys.argv else "")
    name = path.parent.name if path.name == "__main__.py" else path.name
    return "python" if name in {"", "-c", "-m"} else _text(name)


def _or(function: Callable[[], T], default: T) -> T:
    try:
        return function()
    except Exception:
        return default


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {_text(_or(lambda: str(error), '?'))[: 2 * _KEY]}"


def _name_of(thing: object) -> str:
    name = _or(lambda: getattr(thing, "_name", None) or getattr(thing, "name", None), None)
    return _text(repr(name)) if isinstance(name, str) else type(thing).__name__


def _text(name: object) -> str:
    """*name* as text that can be encoded: paths may have bytes that no text has, and a name may be anything."""
    text = name if isinstance(name, str) else _or(lambda: repr(name), "?")
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _named(name: object) -> str | None:
    return None if name is None else _text(name)


def _cut(text: str) -> str:
    return text if len(text) <= _KEY else f"{text[: _KEY - 1]}…"


def _shown(key: Any, options: _Options) -> str | None:
    """A key as the report has it. The ``repr`` of a key is its own code, and may do anything."""
    if not options.keys:
        return None
    if type(key) in {str, bytes}:
        return _cut(repr(key[:_KEY]))
    try:
        return _text(_cut(repr(key)))
    except Exception:
        return f"<{type(key).__name__} that has no repr>"


# One record of each kind.


def _registry(registry: Registry[Any, Any], options: _Options) -> RegistryReport | None:
    if registry.group is not None:
        return None  # a column: its rows are told
    limits = registry._limits
    keeper = registry._keeper
    columns: Iterable[Registry[Any, Any]] = getattr(registry, "_present", tuple)()
    owner = registry.owner
    stats = registry.stats()
    if not isinstance(stats, RegistryStats):
        raise TypeError(f"its stats() returned {type(stats).__name__}, not RegistryStats")
    return RegistryReport(
        name=_named(registry._name),
        owner=None if owner is None else type(owner).__qualname__,
        columns=tuple(_text(column._name or "?") for column in columns),
        maxsize=None if registry._bound == sys.maxsize else int(registry._bound),
        max_bytes=None if registry._byte_bound is None else int(registry._byte_bound),
        ttl=limits.ttl,
        idle=limits.idle,
        policy=limits.policy if isinstance(limits.policy, str) else limits.policy.__name__,
        store=None if keeper is None else _address(keeper.store),
        stats=stats,
        leases=_leases(registry, options),
        creating=tuple(_shown(key, options) for key in list(registry._flights)[:_NAMED]),
    )


def _leases(registry: Registry[Any, Any], options: _Options) -> tuple[LeaseReport, ...]:
    leases = list(registry._leases.items())[:_NAMED]
    return tuple(LeaseReport(_shown(key, options), count) for key, count in leases)


def _pool(pool: Any, options: _Options, now: float) -> PoolReport:
    holders = tuple(
        HolderReport(
            thread=_named(holder.thread),
            age=holder.age,
            since=None if holder.age is None else now - holder.age,
            stack=_text(holder.stack) if options.stacks else "",
        )
        for holder in pool.holders()
    )
    return PoolReport(_text(pool.name), type(pool).__name__, pool.closed, pool.stats(), holders)


def _sessions() -> list[Session | AsyncSession]:
    kinds = list(_kinds(Session, AsyncSession))
    # Instances refer to their class. One pass in C, which makes no list of all objects.
    return [one for one in gc.get_referrers(*kinds) if type(one) in kinds]


def _kinds(*classes: type[Any]) -> Iterator[type[Any]]:
    for one in classes:
        yield one
        yield from _kinds(*one.__subclasses__())


def _session(session: Session | AsyncSession) -> SessionReport | None:
    releases = getattr(session, "_releases", None)
    if releases is None:
        return None  # closed, or just being made
    listed = [_text(_cut(_described(release))) for release, _, _ in list(releases)[: -_NAMED - 1 : -1]]
    return SessionReport(_named(session.name), type(session).__name__, len(releases), tuple(listed))


def _stores() -> Iterator[Any]:
    """Ours, wherever they are, and others' that something here saves to."""
    told: set[int] = set()
    servers = sys.modules.get("hygiene.stores.servers")  # not imported unless somebody has such a store
    for found in (
        _copied(sqlite._stores),
        _copied(servers._everywhere) if servers is not None else (),
        [writer._store for writer in alive(WriteBehind)],
        [keeper.store for keeper in alive(Keeper)],
    ):
        for store in found:
            if id(store) not in told:
                told.add(id(store))
                yield store


def _copied(things: Iterable[T]) -> list[T]:
    for _ in range(3):
        try:
            return list(things)
        except RuntimeError:  # another thread has added one meanwhile
            continue
    return []


def _store(store: Any) -> StoreReport:
    return StoreReport(type(store).__name__, _address(store), getattr(store, "closed", False) is True)


def _address(store: Any) -> str:
    return _text(str(getattr(store, "address", None) or getattr(store, "path", None) or type(store).__name__))


def _writer(writer: WriteBehind) -> WriteBehindReport:
    lock = writer._lock
    if not lock.acquire(timeout=_PATIENCE):
        raise RuntimeError("busy at this moment: its lock was held for longer than 50 ms")
    try:
        stats = writer.stats()
    finally:
        lock.release()
    return WriteBehindReport(
        _text(writer.name), _text(writer._space), _address(writer._store), writer.closed, writer._max_pending, stats
    )


def _budget(budget: MemoryBudget) -> BudgetReport:
    return BudgetReport(budget.total, budget.free, tuple(budget.usage().values()))


def _monitor(monitor: MemoryMonitor) -> MonitorReport:
    return MonitorReport(_text(monitor.name), monitor.running, str(monitor.level), monitor._last, monitor.sheds)


def _cleanups() -> list[object]:
    return [*list(_exit.values()), *list(_pressure.values()), *list(_every.values())]


def _cleanup(item: object) -> CleanupReport | None:
    if isinstance(item, _Owned):
        if item._owner() is None:
            return None
        return CleanupReport(
            _text(item.name), "exit", None, item.priority, None, runs=0, errors=0, running=False, registered=False
        )
    one = item._cleanup if isinstance(item, _Interval) else item
    if not isinstance(one, Cleanup):
        return None
    return CleanupReport(
        name=_text(one.name),
        on=one.on,
        every=one._every,
        priority=one.priority,
        timeout=one.timeout,
        runs=one.runs,
        errors=one.errors,
        running=one._free.locked(),
        registered=True,
    )


def _shared(shared: SharedResource[Any, Any], options: _Options, inner: set[int]) -> SharedReport:
    resources = shared._resources
    inner.add(id(resources))
    return SharedReport(_text(shared._name), len(resources), _leases(resources, options))


def _janitor() -> JanitorReport:
    agenda = list(janitor._agenda)
    due = max(min(item[0] for item in agenda) - time.monotonic(), 0.0) if agenda else None
    return JanitorReport(
        running=janitor.running,
        charges=sum(item[2]() is not None for item in agenda),
        wakeups=janitor.wakeups,
        next_due=due,
    )


# The text.


def _lines(one: Report) -> Iterator[str]:
    at = time.strftime("%H:%M:%S", time.localtime(one.at))
    yield (
        f"{one.program} (process {one.pid}, Python {one.python}) at {at}: {_size(one.rss)} resident, "
        f"{one.threads} threads"
    )
    yield from _section("registries", _registry_lines(one.registries))
    yield from _section("pools", [_pool_lines(pool) for pool in one.pools])
    yield from _section("sessions", [_session_lines(session) for session in one.sessions or ()])
    yield from _section("stores", [_store_lines(store, one.writers) for store in one.stores])
    yield from _section("memory", [*map(_monitor_lines, one.monitors), *map(_budget_lines, one.budgets)])
    yield from _section(
        "shared", [*map(_shared_lines, one.shared), *([f"{x.name}: {x.open} open"] for x in one.locals)]
    )
    yield from _section("cleanups", [[_cleanup_line(item)] for item in one.cleanups if item.registered])
    closing = [item.name for item in one.cleanups if not item.registered]
    if closing:
        yield from _section("closed at the shutdown", [[name] for name in closing])
    janitor_ = one.janitor
    due = "" if janitor_.next_due is None else f", next due in {_span(janitor_.next_due)}"
    yield f"janitor: {'running' if janitor_.running else 'not running'}, looks after {janitor_.charges}{due}"
    for problem in one.problems:
        yield f"could not be looked at: {problem}"


def _section(title: str, things: list[list[str]]) -> Iterator[str]:
    if not things:
        return
    yield f"{title}:"
    for lines in things[:_SHOWN]:
        yield from (f"  {line}" for line in lines)
    if len(things) > _SHOWN:
        yield f"  and {len(things) - _SHOWN:,} more"


def _registry_lines(registries: Iterable[RegistryReport]) -> list[list[str]]:
    named: dict[tuple[str | None, str | None], list[RegistryReport]] = {}
    for one in registries:
        named.setdefault((one.name, one.owner), []).append(one)
    # The largest first, and one line for a registry that each of a thousand objects has.
    groups = sorted(named.values(), key=lambda group: -sum(one.stats.entries for one in group))
    told = []
    for group in groups:
        if len(group) <= _MANY:
            told += [_registry_line(one) for one in group]
            continue
        entries = sum(one.stats.entries for one in group)
        leased = sum(one.stats.leased for one in group)
        line = f"{_registry_name(group[0])}, {len(group):,} of them: {entries:,} entries together"
        told.append([line + (f", {leased:,} leased" if leased else "")])
    return told


def _registry_name(one: RegistryReport) -> str:
    return (one.name or "(unnamed)") + (f" of {one.owner}" if one.owner else "")


def _registry_line(one: RegistryReport) -> list[str]:
    stats = one.stats
    bound = "" if one.maxsize is None else f" of {one.maxsize:,}"
    parts = [f"{stats.entries:,}{bound} entries"]
    if stats.bytes is not None:
        parts.append(f"{_size(stats.bytes)} of {_size(one.max_bytes or 0)}")
    lookups = stats.hits + stats.misses
    if lookups:
        parts.append(f"{stats.hits / lookups:.1%} hits")
    if stats.evictions:
        causes = ", ".join(f"{count:,} {cause}" for cause, count in stats.evictions.items())
        parts.append(f"evicted {causes}")
    if stats.overflowing:
        parts.append(f"{stats.overflowing:,} beyond its bound")
    if stats.hook_errors:
        parts.append(f"{stats.hook_errors:,} hooks failed")
    if stats.forgotten:
        parts.append(f"{stats.forgotten:,} forgotten while referenced")
    if one.store is not None:
        parts.append(f"stored in {one.store}")
    if stats.leased:
        parts.append(f"{stats.leased:,} leased")
    lines = [f"{_registry_name(one)}: {', '.join(parts)}"]
    if one.columns:
        lines.append(f"    holds {', '.join(one.columns)}")
    lines += [f"    {lease.key} is leased by {lease.holders}" for lease in one.leases[:_SHOWN] if lease.key is not None]
    lines += [f"    {key} is being created" for key in one.creating[:_SHOWN] if key is not None]
    return lines


def _pool_lines(one: PoolReport) -> list[str]:
    stats = one.stats
    parts = [f"{stats.in_use} of {stats.max_size} in use, {stats.idle} idle"]
    for count, what in (
        (stats.opening, "opening"),
        (stats.waiting, "waiting"),
        (stats.timeouts, "timed out"),
        (stats.dropped, "dropped without release"),
        (stats.hook_errors, "hooks failed"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    lines = [f"{one.kind} {one.name}: {'closed, ' if one.closed else ''}{', '.join(parts)}"]
    for holder in one.holders[:_SHOWN]:
        if holder.age is None:
            continue
        since = "" if holder.since is None else time.strftime(", since %H:%M:%S", time.localtime(holder.since))
        lines.append(f"    held for {_span(holder.age)}{since} by {holder.thread or 'somebody'}")
        lines += [f"      {line}" for line in holder.stack.splitlines()]
    unknown = sum(holder.age is None for holder in one.holders)
    if unknown:
        lines.append(f"    by whom {'it is' if unknown == 1 else 'they are'} held is known with leak_after=")
    return lines


def _session_lines(one: SessionReport) -> list[str]:
    name = one.kind + ("" if one.name is None else f" {one.name}")
    listed = ", ".join(one.releases[:_SHOWN])
    more = one.pending - min(len(one.releases), _SHOWN)
    return [
        f"{name}: {one.pending} to release{f': {listed}' if listed else ''}{f', and {more} more' if more > 0 else ''}"
    ]


def _store_lines(one: StoreReport, writers: Iterable[WriteBehindReport]) -> list[str]:
    lines = [f"{one.kind} {one.address}{': closed' if one.closed else ''}"]
    for writer in writers:
        if writer.store != one.address:
            continue
        stats = writer.stats
        parts = [f"{stats.pending:,} of {writer.max_pending:,} pending", f"{stats.saved:,} changes saved"]
        if stats.rejected:
            parts.append(f"{stats.rejected:,} rejected")
        if stats.failures:
            parts.append(f"{stats.failures:,} saves failed")
        if stats.outage:
            parts.append("the store does not save")
        lines.append(f"    write-behind {writer.name}: {'closed, ' if writer.closed else ''}{', '.join(parts)}")
    return lines


def _monitor_lines(one: MonitorReport) -> list[str]:
    reading = one.reading
    if reading is None:
        return [f"monitor {one.name}: no reading yet"]
    limit = reading.limit
    used = "" if limit is None else f", {limit.share:.0%} of {_size(limit.size)} ({limit.source})"
    shed = f", shed {one.sheds} times" if one.sheds else ""
    state = "" if one.running else ", not running"
    return [f"monitor {one.name}: {one.level}{used}, growth {reading.growth}{shed}{state}"]


def _budget_lines(one: BudgetReport) -> list[str]:
    lines = [f"budget of {_size(one.total)}: {_size(one.free)} in no share"]
    lines += [
        f"    {share.name}: {_size(share.used)} of {_size(share.allowed)}, {share.registries} registries"
        for share in one.shares
    ]
    return lines


def _shared_lines(one: SharedReport) -> list[str]:
    lines = [f"{one.name}: {one.open} open"]
    return lines + [f"    {lease.key} is leased by {lease.holders}" for lease in one.leases if lease.key is not None]


def _cleanup_line(one: CleanupReport) -> str:
    occasion = f"every {_span(one.every)}" if one.every is not None else f"on {one.on}"
    runs = f", {one.runs:,} runs" if one.runs else ""
    failed = f", {one.errors:,} failed" if one.errors else ""
    return f"{one.name}: {occasion}{runs}{failed}{', running' if one.running else ''}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":  # noqa: PLR2004 - the next unit
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError


def _span(span: float) -> str:
    for size, unit in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if span >= size:
            return f"{span / size:,.1f} {unit}"
    return f"{span:,.1f} s"


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} does not go into JSON")


_encoder = msgspec.json.Encoder(enc_hook=_plain)
