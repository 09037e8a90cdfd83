"""A registry and its store together are one dict, whatever is in memory, saved, evicted, or held by somebody."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hygiene import History, Registry
from hygiene.errors import StoreUnavailable
from hygiene.events import Cause, Entry, Removal
from hygiene.group import Group
from hygiene.limits import Limits
from hygiene.stores import SQLiteStore
from hygiene.testing import ManualClock
from hygiene.writebehind import WriteBehind

KEYS = st.sampled_from([0, 1, 2, 3, "four", ("five", 5)])
HOUR = 3600
WINDOW = 3
NOTHING: Any = object()
PATIENCE = 10.0
SAVED_FIRST = {Cause.SIZE, Cause.BYTES, Cause.IDLE, Cause.PRESSURE}


class Moody:
    """A real store that cannot save at times."""

    def __init__(self, store: SQLiteStore) -> None:
        self.store = store
        self.fails = False
        self.lock = threading.Lock()

    def be(self, *, able: bool) -> None:
        """From now on; a save that is under way has ended when this returns."""
        with self.lock:
            self.fails = not able

    def save(self, changes: Any, *, sync: bool = False) -> Any:
        with self.lock:
            if self.fails:
                raise StoreUnavailable("the disk is full")
            return self.store.save(changes, sync=sync)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@dataclass(eq=False)
class Known:
    """What the model knows of an entry."""

    value: Any
    written: float


def plain(value: Any) -> Any:
    """A copy that nobody changes."""
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


class Kept(RuleBasedStateMachine):
    """Whatever happens, what is read is what was written last, and the store has it when that was acknowledged."""

    @initialize(
        maxsize=st.integers(1, 4),
        policy=st.sampled_from(["lru", "lru", "fifo", "lfu", "importance"]),
        times=st.sampled_from(["", "", "ttl", "idle", "both"]),
        asks=st.booleans(),
        window=st.booleans(),
        revive=st.booleans(),
        grouped=st.booleans(),
        on_loop=st.booleans(),
        every=st.sampled_from([1, 3, 1000]),
    )
    def begin(
        self,
        maxsize: int,
        policy: Any,
        times: str,
        asks: bool,
        window: bool,
        revive: bool,
        grouped: bool,
        on_loop: bool,
        every: int,
    ) -> None:
        self.clock = ManualClock()
        self.patch = pytest.MonkeyPatch()
        clock = SimpleNamespace(time=self.wall, monotonic=time.monotonic, sleep=time.sleep)
        for module in ("hygiene.keeping.time", "hygiene.writebehind.time"):
            self.patch.setattr(module, clock)
        self.folder = Path(tempfile.mkdtemp(prefix="hygiene-model-"))
        self.busy: set[Any] = set()
        # A row of several columns, and what is busy, outlive their times in memory, but not in a store.
        self.ttl = 5 * HOUR if times in ("ttl", "both") and not grouped else None
        self.asks = asks and self.ttl is None
        self.window, self.grouped, self.on_loop, self.every = window, grouped, on_loop, every
        self.limits: dict[str, Any] = {
            "maxsize": maxsize,
            "policy": policy,
            "ttl": self.ttl,
            "idle": 3 * HOUR if times in ("idle", "both") else None,
            "revive": revive,
            "timer": self.clock,
            "on_evict": self.hear,
        }
        if policy == "importance":
            self.limits |= {"importance": lambda entry: len(str(entry.key))}
        if self.asks:
            self.limits |= {"busy": self.is_busy}
        if window:
            self.limits |= {"values": partial(History, maxlen=WINDOW)}
        self.runner = asyncio.Runner()
        self.names: tuple[str, ...] = ("first", "second") if grouped else ("first",)
        self.model: dict[str, dict[Any, Known]] = {name: {} for name in self.names}
        self.wrong: list[str] = []
        self.told = threading.Semaphore(0)
        self.serial = 0
        self.has_failed = False
        self.left_behind: list[Any] = []
        self.open()

    def open(self) -> None:
        self.store = Moody(SQLiteStore(self.folder / "chats.db", timer=self.wall))
        self.writer = None
        self.registries: dict[str, Registry[Any, Any]] = {}
        if self.grouped:
            # The columns of a group share their limits; each has a space of its own in one store.
            group = Group(Limits.of(**self.limits, store=self.store), dict.fromkeys(self.names))
            self.registries = {name: group.adopt(name, {}) for name in self.names}
        else:
            store: Any = self.store
            self.writer = WriteBehind(store, space="first", every=self.every)
            self.registries = {"first": Registry(name="first", store=self.writer, **self.limits)}
        self.puts = dict.fromkeys(self.names, 0)
        self.heard = dict.fromkeys(self.names, 0)
        self.leases: list[tuple[str, Any, Any]] = []
        self.holds: list[tuple[str, Any, Known, Any]] = []

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.be(able=True)
        self.release_all()
        self.left_behind.append((self.registries, self.writer, self.store))
        for left in self.left_behind:
            self.close(*left)
        self.runner.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    # What the model does.

    def wall(self) -> float:
        """The clock on the wall, which goes as the registry's."""
        return 1_000_000.0 + self.clock.now

    def do(self, step: Callable[[], Any]) -> Any:
        """Make *step*, on an event loop if this is about one."""
        if not self.on_loop:
            return step()

        async def on_loop() -> Any:
            return step()

        return self.runner.run(on_loop())

    def is_busy(self, entry: Entry[Any, Any]) -> bool:
        return entry.key in self.busy

    def hear(self, removal: Removal[Any, Any]) -> None:
        """What leaves by itself is in the store by now."""
        name = removal.name or "first"
        self.heard[name] += 1
        # In the writer's thread it is told while we may be writing it again.
        if removal.cause in SAVED_FIRST and threading.current_thread() is threading.main_thread():
            record = self.store.load(name, removal.key)
            if record is None or plain(removal.value) != record.value:
                self.wrong.append(f"{removal} was told with {record} in the store")

    def known(self, name: str, key: Any) -> Known | None:
        """What is to be found."""
        known = self.model[name].get(key)
        if known is not None and self.ttl is not None and self.clock.now - known.written >= self.ttl:
            del self.model[name][key]
            return None
        return known

    def expected(self, name: str, key: Any) -> Any:
        known = self.known(name, key)
        return NOTHING if known is None else known.value

    def wrote(self, name: str, key: Any, value: Any) -> None:
        self.model[name][key] = Known(plain(value), self.clock.now)
        self.puts[name] += 1

    def trimmed(self, value: Any) -> Any:
        return value[-WINDOW:] if self.window and isinstance(value, list) else value

    def fresh(self) -> int:
        self.serial += 1
        return self.serial

    def column(self, second: bool) -> tuple[str, Registry[Any, Any]]:
        name = self.names[-1] if second else "first"
        return name, self.registries[name]

    def release_all(self) -> None:
        while self.leases:
            lease = self.leases.pop()[2]
            self.do(lambda lease=lease: lease.__exit__(None, None, None))

    def close(self, registries: dict[str, Registry[Any, Any]], writer: WriteBehind | None, store: Moody) -> None:
        for registry in registries.values():
            registry.close()
            assert not len(registry)
        if writer is not None:
            writer.close()
        store.close()

    def eventually(self, condition: Callable[[], bool], what: str) -> None:
        """Something of what the writer's thread does has still to be done."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0)

    # What a program does.

    @rule(key=KEYS, second=st.booleans(), kind=st.sampled_from(["list", "dict", "number", "long"]))
    def put(self, key: Any, second: bool, kind: str) -> None:
        name, registry = self.column(second)
        number = self.fresh()
        values = {"list": [number], "dict": {"n": number}, "number": number}
        value: Any = values.get(kind, list(range(5)))
        self.do(lambda: registry.__setitem__(key, value))
        self.wrote(name, key, self.trimmed(value))

    def append(self, registry: Registry[Any, Any], key: Any, number: int) -> None:
        if self.limits["revive"]:
            registry.setdefault(key, []).append(number)
        else:  # what is evicted between the two steps is not found again
            with registry.lease(key, create=list) as messages:
                messages.append(number)

    @rule(key=KEYS, second=st.booleans())
    def say(self, key: Any, second: bool) -> None:
        """The idiom of every chat program."""
        name, registry = self.column(second)
        before = self.expected(name, key)
        if before is NOTHING or isinstance(before, list):
            number = self.fresh()
            self.do(partial(self.append, registry, key, number))
            if before is NOTHING:
                self.wrote(name, key, [])
            known = self.model[name][key]
            known.value = self.trimmed([*known.value, number])

    @rule(key=KEYS, second=st.booleans())
    def look_before_putting(self, key: Any, second: bool) -> None:
        name, registry = self.column(second)
        here = self.expected(name, key) is not NOTHING

        def step() -> bool:
            if found := key in registry:
                return found
            registry[key] = []
            return False

        assert here == self.do(step)
        if not here:
            self.wrote(name, key, [])

    @rule(key=KEYS, second=st.booleans())
    def read(self, key: Any, second: bool) -> None:
        name, registry = self.column(second)
        expected = self.expected(name, key)

        assert expected == self.do(lambda: registry.get(key, NOTHING))
        if expected is NOTHING:
            with pytest.raises(KeyError):
                self.do(lambda: registry[key])
        else:
            assert expected == self.do(lambda: registry[key])

    @rule(key=KEYS, second=st.booleans(), how=st.sampled_from(["silently", "told", "leased"]))
    def edit_in_place(self, key: Any, second: bool, how: str) -> None:
        name, registry = self.column(second)
        if isinstance(before := self.expected(name, key), dict):
            number = self.fresh()

            def step() -> None:
                if how == "leased":
                    with registry.lease(key) as value:
                        value["n"] = number
                    return
                registry[key]["n"] = number
                if how == "told":
                    registry.changed(key)

            self.do(step)
            before["n"] = number

    @rule(key=KEYS, second=st.booleans(), how=st.sampled_from(["del", "pop"]))
    def remove(self, key: Any, second: bool, how: str) -> None:
        name, registry = self.column(second)
        expected = self.expected(name, key)
        if how == "pop":
            assert expected == self.do(lambda: registry.pop(key, NOTHING))
        elif expected is not NOTHING:
            self.do(lambda: registry.__delitem__(key))
        else:
            with pytest.raises(KeyError):
                self.do(lambda: registry.__delitem__(key))
        self.model[name].pop(key, None)

    @rule(second=st.booleans())
    def take_any(self, second: bool) -> None:
        name, registry = self.column(second)
        try:
            key, value = self.do(registry.popitem)
        except KeyError:
            return
        assert self.expected(name, key) == value
        del self.model[name][key]

    @rule(second=st.booleans())
    def clear(self, second: bool) -> None:
        name, registry = self.column(second)
        if self.store.fails and list(self.store.keys(name)):
            with pytest.raises(StoreUnavailable):
                self.do(registry.clear)
            return
        self.do(registry.clear)
        self.model[name].clear()
        assert not len(registry)
        assert [] == list(registry.stored())

    @rule(key=KEYS, second=st.booleans())
    def hold(self, key: Any, second: bool) -> None:
        name, registry = self.column(second)
        if isinstance(self.expected(name, key), list) and self.limits["revive"]:
            value = self.do(lambda: registry[key])
            self.holds.append((name, key, self.model[name][key], value))

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def say_to_what_is_held(self, data: st.DataObject) -> None:
        name, key, known, value = data.draw(st.sampled_from(self.holds))
        number = self.fresh()
        current = self.known(name, key) is known
        self.do(lambda: value.append(number))
        if current:
            known.value = self.trimmed([*known.value, number])
            assert value is self.do(lambda: self.registries[name][key])

    @rule()
    def let_go(self) -> None:
        self.holds.clear()

    @rule(key=KEYS, second=st.booleans())
    def lease(self, key: Any, second: bool) -> None:
        name, registry = self.column(second)
        if self.expected(name, key) is NOTHING:
            self.wrote(name, key, [])
        lease = registry.lease(key, list)
        value = self.do(lease.__enter__)
        self.leases.append((name, key, lease))
        assert self.expected(name, key) == value

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        lease = self.leases.pop(0)[2]
        self.do(lambda: lease.__exit__(None, None, None))

    @precondition(lambda self: self.asks)
    @rule(key=KEYS)
    def work(self, key: Any) -> None:
        self.busy ^= {key}

    @rule(key=KEYS, second=st.booleans(), to=st.integers(0, 3))
    def make_room(self, key: Any, second: bool, to: int) -> None:
        _, registry = self.column(second)
        self.do(lambda: registry.evict(key))
        self.do(lambda: registry.trim(to))

    @precondition(lambda self: not (self.leases and self.ttl))
    @rule(hours=st.integers(1, 4))
    def wait(self, hours: int) -> None:
        self.clock.advance(hours * HOUR)

    @rule(second=st.booleans())
    def expire(self, second: bool) -> None:
        self.do(self.column(second)[1].expire)

    @rule(fails=st.booleans())
    def weather(self, fails: bool) -> None:
        self.store.be(able=not fails)
        self.has_failed = self.has_failed or fails

    @rule(how=st.sampled_from(["flush", "aflush"]))
    def acknowledge(self, how: str) -> None:
        """What was acknowledged is in the store, and nothing else."""
        for name, registry in self.registries.items():
            if self.store.fails and len(registry._kept().writer):
                with pytest.raises(StoreUnavailable):
                    registry.flush()
                continue
            if how == "flush":
                self.do(registry.flush)
            else:
                self.runner.run(registry.aflush())
            self.check_store(name)

    def check_store(self, name: str) -> None:
        for key in list(self.model[name]):
            self.known(name, key)
        stored = dict(self.store.items(name))

        assert {key: known.value for key, known in self.model[name].items()} == stored
        assert set(stored) == set(self.registries[name].stored())

    @rule(how=st.sampled_from(["close", "aclose", "kill"]))
    def restart(self, how: str) -> None:
        """Nothing that was saved is lost."""
        self.store.be(able=True)
        self.release_all()
        if how == "kill":
            for registry in self.registries.values():
                registry.flush()
        elif how == "aclose":
            for registry in self.registries.values():
                self.runner.run(registry.aclose())
        if how == "kill":
            self.left_behind.append((self.registries, self.writer, self.store))  # nobody closes them, for now
        else:
            self.close(self.registries, self.writer, self.store)
        for name in self.names:
            with contextlib.closing(SQLiteStore(self.folder / "chats.db", timer=self.wall)) as store:
                for key in list(self.model[name]):
                    self.known(name, key)
                assert {key: known.value for key, known in self.model[name].items()} == dict(store.items(name))
        self.open()

    # What is true at any time.

    @invariant()
    def what_is_read_was_written_last(self) -> None:
        for name, registry in getattr(self, "registries", {}).items():
            for key in (0, 1, 2, 3, "four", ("five", 5)):
                assert self.expected(name, key) == registry.peek(key, NOTHING)

    @invariant()
    def what_left_was_saved_first(self) -> None:
        assert not getattr(self, "wrong", [])

    @invariant()
    def what_came_in_is_there_or_was_told_to_have_left(self) -> None:
        for name, registry in getattr(self, "registries", {}).items():
            self.eventually(
                lambda name=name, registry=registry: (  # type: ignore[misc]
                    self.puts[name] + registry.stats().rehydrated == len(registry) + self.heard[name]
                ),
                f"{name}: {self.puts} put, {registry.stats()}, {self.heard} told",
            )

    @invariant()
    def the_bound_holds(self) -> None:
        if not hasattr(self, "registries") or self.asks:  # who is not busy any more leaves with the next write
            return
        used = {key for _, key, _ in self.leases}

        def holds() -> bool:
            keys = set().union(*(dict.keys(registry) for registry in self.registries.values()))
            return len(keys) <= max(self.limits["maxsize"], len(keys & used) + 1)

        if self.store.fails or any(len(registry._kept().writer) for registry in self.registries.values()):
            return
        if self.on_loop or self.has_failed:  # then the writer has it swept when it has saved
            self.eventually(holds, "what is saved stays")
        else:
            assert holds()


Kept.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKept = Kept.TestCase
