"""Write-behind against a plain dict: over a real file, with failures, conflicts and restarts at random."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hygiene.errors import StoreError, StoreUnavailable, VersionConflict
from hygiene.stores import SaveLog, SQLiteStore
from hygiene.testing import ManualClock
from hygiene.writebehind import WriteBehind


def helper() -> Any:
    spec = importlib.util.spec_from_file_location("faulty", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Faulty = helper().Faulty
VALUES = st.sampled_from(["v1", "v2"])
LOGS = st.sampled_from(["l1", "l2"])
KEYS = st.one_of(VALUES, LOGS)
ITEMS = st.lists(st.integers(0, 9), max_size=4)
SMALL = 20


class Log:
    """What the model knows of a log: items by sequence number."""

    def __init__(self, items: list[int] | None = None) -> None:
        self.items = dict(enumerate(items or []))
        self.next = len(self.items)

    def extend(self, items: list[int]) -> None:
        self.items |= {self.next + n: item for n, item in enumerate(items)}
        self.next += len(items)


class Changed(RuleBasedStateMachine):
    """What is read is what was written last, saved or not; what is acknowledged is in the file."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model: dict[str, Any] = {}
        self.clock = ManualClock()
        self.open()

    def open(self) -> None:
        self.store = Faulty(SQLiteStore(self.folder / "chats.db", check=False))
        self.writer = WriteBehind(self.store, every=7, max_pending=SMALL, timer=self.clock)
        for key in ("v1", "v2", "l1", "l2"):
            record = self.store.store.load("default", key)
            self.writer.track(key, None if record is None else record.head)
            if record is not None and record.head.kind == "log":
                # The numbers of what was deleted and made anew begin at 0, as in the model.
                self.model[key].next = record.head.next

    def change(self, key: str, size: int, change: Any) -> bool:
        """Make *change*; whether it was accepted."""
        before = len(self.writer)
        try:
            change()
        except StoreUnavailable:
            assert self.writer.stats().outage, "refused, though the store saves"
            assert before + size > SMALL, "refused, though there was room"
            assert before == len(self.writer), "refused, and changed all the same"
            return False
        return True

    @rule(key=VALUES, value=ITEMS)
    def put(self, key: str, value: list[int]) -> None:
        if self.change(key, 1, lambda: self.writer.put(key, value)):
            self.model[key] = list(value)

    @rule(key=LOGS, items=ITEMS)
    def extend(self, key: str, items: list[int]) -> None:
        log = self.model.get(key) or Log()
        numbers: list[int | None] = []
        if self.change(key, len(items), lambda: numbers.append(self.writer.extend(key, items))) and items:
            assert [log.next] == numbers
            log.extend(items)
            self.model[key] = log

    @rule(key=LOGS, items=ITEMS)
    def replace(self, key: str, items: list[int]) -> None:
        if self.change(key, max(len(items), 1), lambda: self.writer.replace(key, items)):
            self.model[key] = Log(items)

    @rule(key=LOGS, start=st.integers(-1, 9), length=st.integers(0, 4))
    def drop(self, key: str, start: int, length: int) -> None:
        log = self.model.get(key)
        if log is not None and self.change(key, 1, lambda: self.writer.drop(key, start, start + length)):
            log.items = {n: item for n, item in log.items.items() if not start <= n < start + length}

    @rule(key=LOGS, place=st.integers(0, 9), item=st.integers(10, 19))
    def edit(self, key: str, place: int, item: int) -> None:
        log = self.model.get(key)
        if log is not None and place < log.next and self.change(key, 1, lambda: self.writer.edit(key, place, item)):
            log.items[place] = item

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        if self.change(key, 1, lambda: self.writer.delete(key)):
            self.model.pop(key, None)

    @rule()
    def break_down(self) -> None:
        self.store.error = StoreUnavailable("the disk is full")

    @rule()
    def mend(self) -> None:
        self.store.error = None

    @rule(seconds=st.integers(1, 400))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.writer.save_due()

    @rule()
    def flush(self) -> None:
        try:
            self.writer.flush()
        except StoreUnavailable:
            assert self.store.error is not None
        else:
            self.acknowledged()

    @rule(key=KEYS)
    def save(self, key: str) -> None:
        try:
            self.writer.save(key)
        except StoreUnavailable:
            assert self.store.error is not None
        else:
            assert key not in self.writer
            assert self.expected(key) == self.store.value(key)

    @rule(key=LOGS)
    def somebody_else_saves(self, key: str) -> None:
        """What is pending of it is rejected, nothing else is; then go on with what the other one saved."""
        self.store.store.save([SaveLog("default", key, None, [self.store.encode(99)], replace=True)])
        outage, self.store.error = self.store.error, None
        with contextlib.suppress(VersionConflict):
            self.writer.flush()
        assert [99] == self.store.value(key), "somebody else's save was overwritten"
        assert {one.key for one in self.writer.rejected} <= {key}
        self.writer.discard(key)
        self.writer.untrack(key)
        self.writer.track(key, self.store.store.load("default", key).head)
        self.model[key] = Log([99])
        self.store.error = outage

    @precondition(lambda self: self.store.error is None)
    @rule()
    def restart(self) -> None:
        self.writer.close()
        self.store.store.close()
        self.open()

    def expected(self, key: str) -> Any:
        value = self.model.get(key)
        return [value.items[n] for n in sorted(value.items)] if isinstance(value, Log) else value

    def acknowledged(self) -> None:
        assert 0 == len(self.writer)
        for key in ("v1", "v2", "l1", "l2"):
            assert self.expected(key) == self.store.value(key)

    @invariant()
    def reads_its_writes(self) -> None:
        for key in ("v1", "v2", "l1", "l2"):
            try:
                record = self.writer.load(key)
            except StoreError as error:
                raise AssertionError(f"{key}: {error}") from error
            assert self.expected(key) == (None if record is None else record.value)
            assert (record is not None) == self.writer.contains(key)
            if record is not None and record.head.kind == "log":
                log = self.model[key]
                assert (sorted(log.items), log.next) == (list(record.head.sequences), record.head.next)

    @invariant()
    def nothing_is_lost_from_the_books(self) -> None:
        stats = self.writer.stats()
        assert stats.changes == stats.saved + stats.superseded + stats.discarded + stats.unsaved
        assert stats.pending <= SMALL
        with self.writer._drive, self.writer._lock:  # nothing is under way
            assert len(self.writer) == sum(entry.count for entry in self.writer._pending.values())

    def teardown(self) -> None:
        if not hasattr(self, "writer"):
            return
        self.store.error = None
        self.writer.close()
        self.acknowledged()
        self.store.store.close()
        shutil.rmtree(self.folder)


TestChanged = Changed.TestCase
TestChanged.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
