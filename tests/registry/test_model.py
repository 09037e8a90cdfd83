"""A registry against a plain model, over all policies and limits, with a clock that advances."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import cachetools
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hygiene.errors import RegistryFull
from hygiene.events import Cause, Entry, Removal
from hygiene.registry import Registry
from hygiene.testing import ManualClock

KEYS = st.integers(0, 7)
WEIGHTS = st.integers(1, 5)
POLICIES = st.sampled_from(["lru", "fifo", "lfu", "importance", "none", cachetools.LRUCache])
# Hours, so that the janitor, whose clock is the real one, does not come in between.
HOUR = 3600
TIMES = st.one_of(st.none(), st.integers(1, 12).map(HOUR.__mul__))


class Value:
    """A value with a weight; no two are equal, and none can be weakly referenced."""

    __slots__ = ("weight",)

    def __init__(self, weight: int) -> None:
        self.weight = weight


@dataclass
class Record:
    """What the model knows of an entry."""

    value: Value
    written: float
    used: float
    rank: tuple[float, int] = (0, 0)
    leased_since_use: bool = False
    busy_since_use: bool = False  # who is met in use when its time is over counts as used then


class Told(RuleBasedStateMachine):
    """Everything that leaves is told once, with its cause and times; nothing in use leaves; the order is exact."""

    @initialize(
        policy=POLICIES,
        maxsize=st.one_of(st.none(), st.integers(1, 6)),
        max_bytes=st.one_of(st.none(), st.integers(5, 15)),
        ttl=TIMES,
        idle=TIMES,
        overflow=st.sampled_from(["grow", "raise"]),
        asks=st.booleans(),
    )
    def begin(
        self,
        policy: Any,
        maxsize: int | None,
        max_bytes: int | None,
        ttl: int | None,
        idle: int | None,
        overflow: Any,
        asks: bool,
    ) -> None:
        self.clock = ManualClock()
        self.policy, self.maxsize, self.max_bytes, self.ttl, self.idle = policy, maxsize, max_bytes, ttl, idle
        self.overflow = "raise" if policy == "none" else overflow
        self.asks = asks
        limits: dict[str, Any] = {}
        if max_bytes is not None:
            limits |= {"max_bytes": max_bytes, "getsizeof": lambda value: value.weight}
        if policy == "importance":
            limits |= {"importance": lambda entry: entry.value.weight}
        if asks:
            limits |= {"busy": self.is_busy}
        self.registry: Registry[int, Value] = Registry(
            maxsize=maxsize,
            ttl=ttl,
            idle=idle,
            policy=policy,
            overflow=self.overflow,  # type: ignore[arg-type]
            on_evict=self.hear,
            timer=self.clock,
            **limits,
        )
        self.model: dict[int, Record] = {}
        self.order: list[int] = []  # least recently used, or first in, first
        self.busy: set[int] = set()
        self.leases: list[tuple[int, Any]] = []
        self.heard: list[Removal[int, Value]] = []
        self.causes: Counter[Cause] = Counter()
        self.puts = self.told = self.serial = 0
        self.newest: int | None = None
        # LFU and importance forget what they knew of an entry that had to be stepped over.
        self.exact = not asks and policy in ("lru", "fifo", cachetools.LRUCache)
        # First in, first out: what had to be stepped over for its lease has lost its place.
        self.stepped_over = False

    def is_busy(self, entry: Entry[int, Value]) -> bool:
        return entry.key in self.busy

    def hear(self, removal: Removal[int, Value]) -> None:
        self.heard.append(removal)

    # What the model does.

    def in_use(self, key: int) -> bool:
        return key in self.busy or any(key == leased for leased, _ in self.leases)

    def is_leased(self, key: int) -> bool:
        return any(key == leased for leased, _ in self.leases)

    def is_over(self, key: int) -> Cause | None:
        record, now = self.model[key], self.clock.now
        if self.is_leased(key):
            return None
        if self.ttl is not None and now - record.written >= self.ttl:
            return Cause.EXPIRED
        if self.idle is not None and now - record.used >= self.idle:
            return Cause.IDLE
        return None

    def use(self, key: int) -> None:
        record = self.model[key]
        record.used = self.clock.now
        record.leased_since_use = self.is_leased(key)
        record.busy_since_use = key in self.busy
        if self.policy != "fifo":
            self.order.remove(key)
            self.order.append(key)

    def settle(self) -> None:
        """Take note of what has been told since the last step, and check that it was right to leave."""
        for removal in self.heard:
            key, cause = removal.key, removal.cause
            if cause is Cause.REPLACED:
                self.told += 1
                self.causes[cause] += 1
                continue
            assert key in self.model, f"{removal} was told, and is not there"
            record = self.model[key]
            assert record.value is removal.value
            assert self.clock.now - record.written == removal.age
            unused = self.clock.now - record.used
            if self.asks or record.leased_since_use:
                assert removal.idle_for is not None
                assert removal.idle_for <= unused
            else:
                assert unused == removal.idle_for
            if cause in (Cause.SIZE, Cause.BYTES, Cause.PRESSURE):
                assert not self.in_use(key), f"{key} was in use, and has left"
                assert key != self.newest
                self.check_victim(key)
            elif cause is Cause.EXPIRED:
                assert not self.in_use(key)
                assert self.ttl is not None
                assert self.clock.now - record.written >= self.ttl
            elif cause is Cause.IDLE:
                assert not self.in_use(key)
                assert self.idle is not None
                assert unused >= self.idle
            self.told += 1
            self.causes[cause] += 1
            del self.model[key]
            self.order.remove(key)
        self.heard.clear()

    def check_victim(self, key: int) -> None:
        if not self.exact or self.stepped_over:
            return
        while self.is_leased(self.order[0]) or self.order[0] == self.newest:
            self.order.append(self.order.pop(0))  # stepped over, so it comes last
        assert self.order[0] == key, f"{key} has left, and it was the turn of {self.order[0]}"

    def written(self, key: int, value: Value, old: Value | None, lease: Any = None) -> None:
        """The registry holds *value*, and nobody has been told yet that the old one left."""
        fresh = key not in self.model or (old is None and any(removal.key == key for removal in self.heard))
        self.puts += 1
        self.newest = key
        if fresh:
            # What was over has left before the new one came: told, under the same key.
            gone = [removal for removal in self.heard if removal.key == key]
            later = [removal for removal in self.heard if removal.key != key]
            self.heard = gone
            self.newest = None
            self.settle()
            self.newest = key
            self.heard = later
            if lease is not None:
                self.leases.append((key, lease))
                self.stepped_over = self.policy == "fifo"
            self.model[key] = Record(value, self.clock.now, self.clock.now, busy_since_use=key in self.busy)
            self.order.append(key)
        else:
            record = self.model[key]
            replaced = [removal for removal in self.heard if removal.cause is Cause.REPLACED]
            assert [record.value] == [removal.value for removal in replaced]
            assert self.clock.now - record.written == replaced[0].age
            record.value, record.written = value, self.clock.now
            self.use(key)
        self.model[key].leased_since_use = self.is_leased(key)
        self.settle()
        self.newest = None

    # What may happen.

    @rule(key=KEYS, weight=WEIGHTS)
    def put(self, key: int, weight: int) -> None:
        value = Value(weight)
        present = key in self.model and self.is_over(key) is None
        before = dict(self.model)
        try:
            self.registry[key] = value
        except RegistryFull:
            assert self.overflow == "raise"
            self.settle()
            left = before.keys() - self.model.keys()
            assert all(before[gone].value is not None for gone in left)
            assert not any(removal for removal in self.heard)
            self.refused(key, weight, left)
            return
        self.written(key, value, self.model[key].value if present else None)
        self.check_bounds(key)

    def refused(self, key: int, weight: int, left: set[int]) -> None:
        """A refusal has changed nothing, and was necessary."""
        assert not left or self.ttl is not None or self.idle is not None
        for record_key in list(self.model):
            assert self.registry.peek(record_key) is self.model[record_key].value or self.is_over(record_key)
        movable = [k for k in self.model if k != key and not self.in_use(k)] if self.policy != "none" else []
        too_many = (
            self.maxsize is not None and key not in self.model and len(self.model) >= self.maxsize and not movable
        )
        stay = sum(r.value.weight for k, r in self.model.items() if k not in movable and k != key)
        too_heavy = self.max_bytes is not None and stay + weight > self.max_bytes
        assert too_many or too_heavy

    def check_bounds(self, newest: int) -> None:
        """Whoever still exceeds a bound after a write is in use, or was just written."""
        movable = [key for key in self.model if key != newest and not self.in_use(key)]
        if self.maxsize is not None and len(self.model) > self.maxsize:
            assert self.overflow == "grow"
            assert not movable
        if self.max_bytes is not None and sum(record.value.weight for record in self.model.values()) > self.max_bytes:
            assert self.overflow == "grow"
            assert not movable

    @rule(key=KEYS, how=st.sampled_from(["[]", "get"]))
    def read(self, key: int, how: str) -> None:
        value = self.registry.get(key) if how == "get" else None
        if how == "[]":
            with contextlib.suppress(KeyError):
                value = self.registry[key]
        self.settle()
        if key in self.model and (self.in_use(key) or self.is_over(key) is None):
            assert self.model[key].value is value
            self.use(key)
        else:
            assert value is None

    @rule(key=KEYS)
    def look(self, key: int) -> None:
        value, present = self.registry.peek(key), key in self.registry
        self.settle()
        wanted = self.model[key].value if key in self.model else None

        assert wanted is value
        assert (wanted is not None) is present

    @rule(key=KEYS)
    def touch(self, key: int) -> None:
        touched = self.registry.touch(key)
        self.settle()
        assert (key in self.model) is touched
        if touched:
            self.use(key)

    @rule(key=KEYS)
    def pop(self, key: int) -> None:
        value = self.registry.pop(key, None)
        deleted = [removal for removal in self.heard if removal.cause is Cause.DELETED]
        assert [value] * (value is not None) == [removal.value for removal in deleted]
        self.settle()
        assert key not in self.model

    @rule(key=KEYS)
    def evict(self, key: int) -> None:
        exact, self.exact = self.exact, False  # this one was chosen by the caller
        present = key in self.model and (self.in_use(key) or self.is_over(key) is None)  # or it expires instead
        evicted = self.registry.evict(key)
        self.settle()
        self.exact = exact
        assert evicted is (present and not self.in_use(key))

    @rule(to=st.integers(0, 6))
    def trim(self, to: int) -> None:
        before = self.causes[Cause.PRESSURE]
        trimmed = self.registry.trim(to)
        self.settle()
        assert self.causes[Cause.PRESSURE] - before == trimmed
        if len(self.model) > to:
            assert all(self.in_use(key) for key in self.model)

    @rule()
    def expire(self) -> None:
        before = self.told
        expired = self.registry.expire()
        self.settle()
        assert self.told - before == expired
        stays = [key for key in self.model if self.is_over(key) is not None and not self.in_use(key)]
        assert all(self.model[key].busy_since_use for key in stays)

    @rule()
    def clear(self) -> None:
        self.registry.clear()
        self.settle()
        assert {} == self.model

    @rule(hours=st.integers(0, 6))
    def advance(self, hours: int) -> None:
        self.clock.advance(hours * HOUR)

    @rule(key=KEYS)
    def begin_lease(self, key: int) -> None:
        lease = self.registry.lease(key)
        try:
            value = lease.__enter__()
        except KeyError:
            self.settle()
            assert key not in self.model
            return
        self.settle()
        assert self.model[key].value is value
        self.use(key)
        self.leases.append((key, lease))
        self.stepped_over = self.policy == "fifo"
        self.model[key].leased_since_use = True

    @rule(key=KEYS, weight=WEIGHTS)
    def begin_lease_of_new(self, key: int, weight: int) -> None:
        value = Value(weight)
        lease = self.registry.lease(key, lambda: value)
        held = object()
        with contextlib.suppress(RegistryFull):
            held = lease.__enter__()
        if held is value:
            # It was leased before anything could leave for it.
            self.written(key, value, None, lease)
            return
        self.settle()
        if key in self.model:
            assert self.model[key].value is held
            self.use(key)
            self.leases.append((key, lease))
            self.stepped_over = self.policy == "fifo"
            self.model[key].leased_since_use = True

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        key, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        if key in self.model:
            self.use(key)
        lease.__exit__()
        self.settle()
        if not self.is_leased(key) and key in self.model:
            over = self.is_over(key)
            assert over is None or key in self.busy, "it ran out of time under its lease"

    @precondition(lambda self: self.asks)
    @rule(key=KEYS)
    def change_busy(self, key: int) -> None:
        self.busy ^= {key}
        if key in self.busy and key in self.model:
            self.model[key].busy_since_use = True

    # What always holds.

    @invariant()
    def nothing_is_lost(self) -> None:
        """*puts = alive + removed*, and what is alive is what the model holds."""
        assert self.puts == dict.__len__(self.registry) + self.told
        assert {key: record.value for key, record in self.model.items()} == dict(dict.items(self.registry))

    @invariant()
    def nothing_that_is_over_is_seen(self) -> None:
        if self.asks:
            return  # a busy one is seen although its time is over
        seen = dict(self.registry)
        assert {key: record.value for key, record in self.model.items() if self.is_over(key) is None} == seen

    @invariant()
    def the_numbers_are_right(self) -> None:
        stats = self.registry.stats()
        assert len(self.model) == stats.entries
        assert len({key for key, _ in self.leases}) == stats.leased
        assert 0 == stats.hook_errors
        ours = {cause: n for cause, n in self.causes.items() if cause.ours and n}
        assert ours == dict(stats.evictions)
        if self.max_bytes is not None:
            assert sum(record.value.weight for record in self.model.values()) == stats.bytes


class Plain(RuleBasedStateMachine):
    """Without hooks and times, where reads and writes go the short way: the very same entries stay as in the model."""

    @initialize(
        policy=st.sampled_from(["lru", "fifo", "lfu", "importance", cachetools.LRUCache, cachetools.LFUCache]),
        maxsize=st.integers(1, 5),
    )
    def begin(self, policy: Any, maxsize: int) -> None:
        importance: Any = (lambda entry: entry.value.weight) if policy == "importance" else None
        self.policy, self.maxsize = policy, maxsize
        self.registry: Registry[int, Value] = Registry(maxsize=maxsize, policy=policy, importance=importance)
        self.model: dict[int, Record] = {}
        self.leases: list[tuple[int, Any]] = []
        self.serial = 0
        self.hits = self.misses = 0

    def rank(self, key: int, *, written: bool = False, touched: bool = False) -> None:
        """Give an entry its place: who has the smallest rank leaves first."""
        self.serial += 1
        record = self.model[key]
        uses = record.rank[0]
        if self.policy in ("lfu", cachetools.LFUCache):
            record.rank = (uses + 1, self.serial)
        elif self.policy == "importance":
            if written or touched:
                record.rank = (record.value.weight, self.serial)
        elif self.policy != "fifo" or not uses:
            record.rank = (1, self.serial)

    def evict(self, newest: int | None) -> None:
        leased = {key for key, _ in self.leases}
        while len(self.model) > self.maxsize:
            candidates = [key for key in self.model if key != newest and key not in leased]
            if not candidates:
                return
            del self.model[min(candidates, key=lambda key: self.model[key].rank)]

    @rule(key=KEYS, weight=WEIGHTS, how=st.sampled_from(["[]", "update", "ior", "setdefault"]))
    def put(self, key: int, weight: int, how: str) -> None:
        value = Value(weight)
        if how == "[]":
            self.registry[key] = value
        elif how == "update":
            self.registry.update({key: value})
        elif how == "ior":
            self.registry |= {key: value}
        else:
            held = self.registry.setdefault(key, value)
            self.hits += key in self.model
            self.misses += key not in self.model
            if key in self.model:
                assert self.model[key].value is held
                self.rank(key)
                return
        if key in self.model:
            self.model[key].value = value
        else:
            self.model[key] = Record(value, 0, 0)
        self.rank(key, written=True)
        self.evict(key)

    @rule(key=KEYS, how=st.sampled_from(["[]", "get"]))
    def read(self, key: int, how: str) -> None:
        value = self.registry.get(key) if how == "get" else None
        if how == "[]":
            with contextlib.suppress(KeyError):
                value = self.registry[key]
        if key in self.model:
            self.hits += 1
            assert self.model[key].value is value
            self.rank(key)
        else:
            self.misses += 1
            assert value is None

    @rule(key=KEYS)
    def touch(self, key: int) -> None:
        assert (key in self.model) is self.registry.touch(key)
        if key in self.model:
            self.rank(key, touched=True)

    @rule(key=KEYS)
    def look(self, key: int) -> None:
        assert (key in self.model) is (key in self.registry)
        assert (self.model[key].value if key in self.model else None) is self.registry.peek(key)

    @rule(key=KEYS)
    def pop(self, key: int) -> None:
        record = self.model.pop(key, None)
        assert (record.value if record else None) is self.registry.pop(key, None)

    @rule()
    def popitem(self) -> None:
        if self.model:
            key, record = self.model.popitem()
            assert (key, record.value) == self.registry.popitem()

    @rule(to=st.integers(0, 5))
    def trim(self, to: int) -> None:
        maxsize, self.maxsize = self.maxsize, to
        self.evict(None)
        self.maxsize = maxsize
        self.registry.trim(to)

    @rule()
    def copy(self) -> None:
        assert {key: record.value for key, record in self.model.items()} == dict(self.registry) == {**self.registry}

    @precondition(lambda self: self.policy in ("lru", cachetools.LRUCache))
    @rule(key=KEYS)
    def begin_lease(self, key: int) -> None:
        value = Value(1)
        lease = self.registry.lease(key, lambda: value)
        held = lease.__enter__()
        new = key not in self.model
        self.hits += not new
        self.misses += new
        self.model.setdefault(key, Record(value, 0, 0))
        assert self.model[key].value is held
        self.rank(key)
        self.leases.append((key, lease))
        if new:
            self.evict(key)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        key, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.__exit__()
        if key in self.model:
            self.rank(key)
        if not any(key == leased for leased, _ in self.leases):
            self.evict(None)

    @invariant()
    def the_same_entries_stay(self) -> None:
        assert {key: record.value for key, record in self.model.items()} == dict(dict.items(self.registry))
        assert list(self.model) == list(self.registry)

    @invariant()
    def lookups_are_counted(self) -> None:
        stats = self.registry.stats()
        assert (self.hits, self.misses) == (stats.hits, stats.misses)


TestTold = Told.TestCase
TestTold.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, report_multiple_bugs=False)
TestPlain = Plain.TestCase
TestPlain.settings = settings(max_examples=50, stateful_step_count=30, deadline=None, report_multiple_bugs=False)
