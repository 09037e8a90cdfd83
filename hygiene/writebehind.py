"""
Between what changes in memory and the store that keeps it: saved soon, in batches, and nothing lost in silence.

Theory of operation
===================

**Encoded at once.** A change is made bytes in the thread that makes it. What cannot be stored is refused there, and
what waits to be saved cannot change any more.

**Three places.** An entry that has changed is *pending*; while a save has it in hand it is *saving*, and further
changes of it are pending beside that. So there is always one answer to what an entry is, and a reader never gets the
version before the one that is being saved. A save that fails puts both together again, in their order; but one of
which the store cannot say whether it was applied stays as it is until the same changes have been tried again, which the
store knows again: with others among them it would take them for somebody else's.

**One writer.** One daemon thread saves, started at the first change and gone when nothing has been pending for a while.
Not the janitor: a save may hang for as long as a store can, and everything else that is due in the process would hang
with it. Nor a thread for each save: starting one costs more than to enqueue the fifty changes that it would save. While
something is pending the thread holds the writer, so that what is not saved yet cannot be collected.

**Numbers.** Each change has a serial number. "Everything so far" is then one number, and since the pending entries are
ordered by their oldest change, whether it is saved is to be seen at the first of them.

**Failures** are of two kinds. The store cannot save: everything stays pending, and is tried again, later and later, at
random moments, because other processes may wait for the same store. Or one entry cannot be saved: somebody else has
saved another version, or it is not what a store takes. It is set apart as *rejected*, and the others are saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

from hygiene.cleanup import close_at_shutdown, register_cleanup
from hygiene.closing import GRACE, retrieve, running_loop
from hygiene.errors import NotStorable, OwnershipLost, StoreError, StoreUnavailable, VersionConflict
from hygiene.janitor import retire, survive_fork
from hygiene.logs import logger
from hygiene.names import suggests
from hygiene.stores.codec import encode_key
from hygiene.stores.protocol import Change, Delete, Head, Kind, Record, SaveLog, SaveValue, Store
from hygiene.units import Duration, seconds

__all__ = ["Rejected", "WriteBehind", "WriteBehindStats"]


Durability = Literal["process", "machine"]
Sigterm = Literal["warn", "ignore"]

_SLICE: Final = 1000  # changes in one save: some milliseconds, for which other users of the store wait
_LINGER: Final = 5.0  # seconds that the thread stays with nothing to do: starting one costs as much as 100 changes
_PATIENCE: Final = 1.0  # seconds that plain code waits for room while the store is well
_FIRST_RETRY: Final = 0.1
_LAST_RETRY: Final = 60.0
_SHOWN: Final = 80  # characters of a key in a message
_ALL: Final = object()
_ANY: Any = object()  # a head: whatever is there, until the first save tells
_CLOCKS_DIFFER: Final = 1.0  # seconds between the clock of a store and ours
_EXPIRE_EVERY: Final = 600.0  # seconds between two looks for what is over, if anything is ever over


@dataclass(frozen=True, slots=True)
class Rejected:
    """An entry that the store will not save, however often it is asked."""

    key: Any
    error: Exception
    """`VersionConflict`, `OwnershipLost`, or what the store says of a change that cannot be."""
    changes: tuple[Change, ...]
    """What was not saved, encoded."""


@dataclass(frozen=True, slots=True)
class WriteBehindStats:
    """
    The numbers of a `WriteBehind` at one moment.

    ``changes == saved + superseded + unsaved + discarded``, and unsaved ones are pending, saving or rejected.
    """

    pending: int
    """What is held: items and values, less than *max_pending* but for one change that is larger by itself."""
    keys: int
    """Entries that have changes that are not saved."""
    unsaved: int
    """Changes accepted and not saved yet, counting those that one value stands for."""
    rejected: int
    """Entries that wait for `WriteBehind.discard`."""
    changes: int
    """Changes accepted since the beginning."""
    saved: int
    """Of these, saved; of several changes of one value, that were saved as one, each counts."""
    superseded: int
    """Of these, never saved because a later one of the same entry took their place."""
    discarded: int
    """Of these, given back by `WriteBehind.discard` or to *on_conflict*."""
    saves: int
    """Calls of `Store.save` that succeeded."""
    failures: int
    """Calls of `Store.save` that failed because the store was not able to."""
    conflicts: int
    """Entries that were rejected since the beginning."""
    outage: bool
    """Whether the last save failed so."""
    hook_errors: int
    """Times that *on_conflict* raised; the log says so, once a minute."""


class _Part:
    """A change of one entry as one of the store's records will have it."""

    __slots__ = ("data", "drop", "edits", "items", "kind", "replace")

    def __init__(
        self, kind: str, data: bytes = b"", items: list[bytes] | None = None, *, replace: bool = False
    ) -> None:
        self.kind = kind
        self.data = data
        self.items: list[bytes] = [] if items is None else items
        self.drop: list[tuple[int, int]] = []
        self.edits: dict[int, bytes] = {}
        self.replace = replace


class _Entry:
    """The unsaved changes of one key. Belongs to the lock of its writer."""

    __slots__ = ("at", "changes", "count", "expire_at", "first", "kind", "next", "parts", "sync")

    def __init__(self, first: int, at: float, kind: str | None, following: int | None) -> None:
        self.first = first  # serial number of the oldest change
        self.at = at
        self.kind = kind  # "value", "log", "deleted", or None: not known
        self.next = following  # sequence number of the next item, or None: not known
        self.parts: list[_Part] = []
        self.count = 0  # what it holds
        self.changes = 0  # what that stands for
        self.sync = False
        self.expire_at: float | None = None

    @property
    def whole(self) -> bool:
        """Whether what is in the store does not matter."""
        return self.parts[0].kind != "log" or self.parts[0].replace

    def become(self, part: _Part) -> None:
        self.parts = [part]
        self.kind = part.kind
        self.next = len(part.items) if part.kind == "log" else 0
        self.count = max(len(part.items), 1)

    def extend(self, items: Sequence[bytes]) -> None:
        parts = self.parts
        if not parts:
            parts.append(_Part("log"))
        elif parts[-1].kind == "deleted":
            self.become(_Part("log", replace=True))
            parts = self.parts
            self.count = 0
        parts[-1].items.extend(items)
        self.kind = "log"
        if self.next is not None:
            self.next += len(items)
        self.count += len(items)

    def drop(self, start: int, stop: int) -> None:
        if not self.parts:
            self.parts.append(_Part("log"))
        part = self.parts[-1]
        assert self.next is not None
        if part.items and stop > self.next - len(part.items):
            # One record drops before it appends, and an item that is never appended would leave its number to the
            # next one: so it is appended by one record and dropped by another, both in the same save.
            part = _Part("log")
            self.parts.append(part)
        for sequence in [sequence for sequence in part.edits if start <= sequence < stop]:
            del part.edits[sequence]
            self.count -= 1
        low, high = part.drop[-1] if part.drop else (-1, -1)
        if start <= high and stop >= low:
            part.drop[-1] = (min(low, start), max(high, stop))  # a window that moves on
        else:
            part.drop.append((start, stop))
            self.count += 1

    def edit(self, sequence: int, data: bytes) -> None:
        if not self.parts:
            self.parts.append(_Part("log"))
        part = self.parts[-1]
        assert self.next is not None
        place = sequence - (self.next - len(part.items))
        if place >= 0:
            part.items[place] = data
        else:
            self.count += sequence not in part.edits
            part.edits[sequence] = data

    def clone(self) -> _Entry:
        """A copy whose changes can be added to."""
        twin = _Entry(self.first, self.at, self.kind, self.next)
        twin.count, twin.changes, twin.sync, twin.expire_at = self.count, self.changes, self.sync, self.expire_at
        for part in self.parts:
            copied = _Part(part.kind, part.data, list(part.items), replace=part.replace)
            copied.drop, copied.edits = list(part.drop), dict(part.edits)
            twin.parts.append(copied)
        return twin

    def follow(self, newer: _Entry) -> int:
        """Do what *newer* does after this; returns how many changes it took the place of."""
        superseded = 0
        for part in newer.parts:
            if part.kind != "log" or part.replace:
                superseded = self.changes
                self.changes = 0
                self.become(part)
                continue
            for start, stop in part.drop:
                self.drop(start, stop)
            for sequence, data in part.edits.items():
                self.edit(sequence, data)
            if part.items:
                self.extend(part.items)
        self.kind, self.next, self.expire_at = newer.kind, newer.next, newer.expire_at
        self.changes += newer.changes
        self.sync = self.sync or newer.sync
        return superseded


class _Waiter:
    """Somebody who waits until *key*, or everything, is saved up to the change number *goal*, since attempt *since*."""

    __slots__ = ("future", "goal", "key", "patient", "since")

    def __init__(self, key: Any, goal: int, since: int, *, patient: bool) -> None:
        self.key = key
        self.goal = goal
        self.since = since
        self.patient = patient
        self.future: futures.Future[None] = futures.Future()
        self.future.set_running_or_notify_cancel()  # so that a task which is cancelled cannot cancel it


class WriteBehind:
    """
    Saves to a store, in the background, what is put here: soon, in batches, and again if it failed.

    An entry is either a value, saved whole (`put`), or a log, whose items are saved one by one (`append`). A save is
    due as soon as *any* of these holds: *every* changes since the last one, *interval* since the oldest change that is
    not saved, a *critical* item, memory pressure, `flush`, `save`, `close`.

    What a crash costs: of the process, at most the last *every* changes, those of the last *interval* seconds, and what
    was changed while one save was under way. With ``durability="process"`` a crash of the machine costs what its
    system had not written to disk yet, too. What was acknowledged (`flush` or `save` returned, a critical item was put)
    is never lost by the former; a critical item, and everything with ``durability="machine"``, not by the latter.

    Safe for threads. Nothing here blocks for longer than to encode a value, but for what says that it waits. After
    ``fork`` the child has nothing pending: the parent saves it.

    Args:
        store: Where to save. It is not closed with this.
        every: Changes, over all entries, after which to save: what a crash may cost is then a number that does not
            depend on how many entries there are. 50 messages in a save write little more than their own size.
        interval: Seconds, or text such as ``"30s"``, that a change may wait, counted from the oldest unsaved change: an
            idle program writes nothing. The default is 5 seconds. A longer interval writes fewer bytes only where
            *every* is raised with it: see "Bytes written an hour" in the page on durability.
        critical: Called with key and item, or value, before it is accepted; if it returns true, the call returns only
            when it has been saved and synced to disk.
        max_pending: Items and values that may wait. What would go beyond is refused with `StoreUnavailable`, and
            changes nothing. 10,000 messages of 1 KB are 10 MB.
        durability: What a save survives: the end of the "process", or that of the "machine", for the price of a sync.
        space: The space in the store.
        on_conflict: Called with a `Rejected` when the store refuses one entry for good, in the writer's thread; what
            was not saved is its own from then on. Without it, the entry's next use raises.
        name: What it is called in the log; default: the space.
        timer: Returns monotonic seconds. With a `testing.ManualClock`, call `save_due`.
        sigterm: With "warn" (the default), the writer thread checks once, at its first save that *interval* caused,
            whether SIGTERM would end this process without a save, and logs one warning for the process if so. Children
            of `multiprocessing` are not checked. "ignore" turns the check off. See `install_signal_handlers`.

    Raises:
        ValueError: a number that is not positive, or an unknown *durability* or *sigterm*.
        TypeError: *critical* or *on_conflict* cannot be called.
    """

    _saves_in_child = True  # an inherited one is closed at the end of a forked child: see `hygiene.cleanup`

    @suggests
    def __init__(
        self,
        store: Store,
        *,
        every: int = 50,
        interval: Duration = 5.0,
        critical: Callable[[Any, Any], object] | None = None,
        max_pending: int = 10_000,
        durability: Durability = "process",
        space: str = "default",
        on_conflict: Callable[[Rejected], object] | None = None,
        name: str | None = None,
        timer: Callable[[], float] = time.monotonic,
        sigterm: Sigterm = "warn",
    ) -> None:
        numbers: dict[str, object] = {"every": every, "max_pending": max_pending}
        for what, number in numbers.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{what} must be a whole number of changes, at least 1; found {number!r}")
        for what, hook in (("critical", critical), ("on_conflict", on_conflict)):
            if hook is not None and not callable(hook):
                raise TypeError(f"{what} must be callable; found {hook!r}")
        if durability not in {"process", "machine"}:
            raise ValueError(f'durability must be "process" or "machine"; found {durability!r}')
        if sigterm not in {"warn", "ignore"}:
            raise ValueError(f'`sigterm` must be "warn" or "ignore", got {sigterm!r}.')
        self._store = store
        self._encode = store.encode
        self._every = every
        self._interval = seconds(interval, "interval")
        self._critical = critical
        self._max_pending = max_pending
        self._machine = durability == "machine"
        self._sigterm_unchecked = sigterm == "warn"  # until the first save that the interval caused
        self._interval_elapsed = False
        self._space = space
        self._on_conflict = on_conflict
        self.name = space if name is None else name
        """What it is called in the log."""
        self._timer = timer
        self._manual = bool(getattr(timer, "manual", False))
        self._closing = self._closed = False
        self._retired: threading.Thread | None = None  # since gevent's patch
        self._read_only = bool(getattr(store, "read_only", False))
        self._refusing = self._read_only  # or closing: each change is refused
        self._heads: dict[Any, Head | None] = {}
        self._leaving: set[Any] = set()
        self._fences: dict[Any, int] = {}
        self._keeper: Callable[[], _Keeper | None] = _nobody
        self._begin_anew()
        survive_fork(self)
        self._known = True  # what registers itself after this, such as a registry that saves here, is closed before it
        close_at_shutdown(self, f"write-behind {self.name!r}")
        reference = weakref.ref(self, lambda _: self_relief.cancel())
        self_relief = self._relief = register_cleanup(
            lambda: _relieve(reference), on="pressure", name=f"write-behind {self.name!r}"
        )

    def _make_locks(self) -> None:
        # Reentrant: a collection, at any line, may run a finalizer that puts something here.
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)  # for the writer
        self._settled = threading.Condition(self._lock)  # for those who wait for a save, or for room
        self._drive = threading.RLock()  # held around each save, hooks and all: one at a time, whoever does it

    def _begin_anew(self) -> None:
        self._make_locks()
        self._thread: threading.Thread | None = None
        self._pending: dict[Any, _Entry] = {}  # in the order of their oldest change
        self._saving: dict[Any, _Entry] = {}
        self._stuck = False  # what is saving may have been applied, and is tried again as it is
        self._expires = False  # something was saved that will be over one day
        self._expired_at = self._timer()
        self._rejected: dict[Any, tuple[Rejected, _Entry]] = {}
        self._urgent: set[Any] = set()
        self._waiters: list[_Waiter] = []
        self._attempts = 0  # to save a batch
        self._serial = 0  # of the last change
        self._goal = 0  # everything up to this one is due
        self._since = 0  # changes since the goal was set
        self._held = 0
        self._retries = 0
        self._retry_at = 0.0
        self._error: Exception | None = None  # while the store is not able to save
        self._saved = self._superseded = self._discarded = 0
        self._saves = self._failures = self._conflicts = self._hook_errors = 0

    def _renew_locks(self) -> None:
        """`threading` was patched: take locks, and a thread, of its kind. See `janitor.renew_locks`."""
        drive = self._drive
        if not drive.acquire(timeout=GRACE):
            return  # a save hangs in a thread of before, which needs the locks that it knows
        try:
            with self._lock:
                before = self._news, self._settled
                self._retired, self._thread = self._thread, None
                self._make_locks()
                for condition in before:
                    condition.notify_all()  # the thread of before wakes up, sees that it is not the writer, and ends
        finally:
            drive.release()
        with self._lock:
            if self._unsaved:
                self._rouse(timed=True)

    # Changes

    def put(self, key: Hashable, value: Any, *, expire_at: float | None = None) -> None:
        """
        Save *value* whole, in the place of whatever is there.

        Args:
            key: As a store takes it.
            value: As the store's ``encode`` takes it. It is encoded now: later changes of it are not seen.
            expire_at: When it is over, in seconds since 1970; ``None``: never.

        Raises:
            NotStorable: the store could not give it back as it is.
            StoreUnavailable: *max_pending* is reached: nothing was changed. Or it is critical and could not be saved:
                it stays pending.
            VersionConflict, StoreError: the entry is rejected (see `discard`), or this was closed.
        """
        self._wait(self._put(key, value, expire_at))

    async def aput(self, key: Hashable, value: Any, *, expire_at: float | None = None) -> None:
        """As `put`; for an event loop, which goes on while it waits for a critical value or for room."""
        await self._aroom()
        await self._await(self._put(key, value, expire_at))

    def _put(self, key: Hashable, value: Any, expire_at: float | None) -> _Waiter | None:
        data = self._encode(value, key)
        critical = self._critical is not None and bool(self._critical(key, value))
        with self._lock:  # as in `_become`, at half its cost
            pending = self._pending
            entry = pending.get(key)
            if (
                critical
                or self._refusing
                or self._rejected
                or self._held >= self._max_pending
                or (entry is not None and entry.kind != "value")
            ):
                return self._become(key, _Part("value", data), expire_at, critical=critical)
            if entry is None:
                encode_key(key)  # refused here, and not when it is saved
                entry = _Entry(self._serial + 1, self._timer(), "value", 0)
                entry.parts.append(_Part("value", data))
                entry.count = 1
                if not pending:
                    self._rouse(timed=True)
                pending[key] = entry
                self._held += 1
            else:
                entry.parts[0].data = data  # it was not saved yet, and will not be
                self._superseded += entry.changes
            entry.expire_at = expire_at
            entry.changes = 1
            self._serial += 1
            self._since += 1
            if self._since >= self._every:
                self._due()
            return None

    def append(self, key: Hashable, item: Any, *, expire_at: float | None = None) -> int | None:
        """
        Add *item* to the end of the log *key*, which is made if it is not there.

        Returns:
            The sequence number that it will have, if that can be known: the entry is tracked (see `track`), or was
            replaced or deleted by a change that is not saved yet.

        Raises:
            ValueError: the entry is known to be a value.
            NotStorable, StoreUnavailable, VersionConflict, StoreError: as `put` does.
        """
        data = self._encode(item, key)
        if self._critical is not None and self._critical(key, item):
            number, waiter = self._extend(key, (data,), expire_at, critical=True)
            self._wait(waiter)
            return number
        with self._lock:  # as in `_extend`, at half its cost: this is what is called for each message
            entry = self._entry(key, 1)
            parts = entry.parts
            if parts and entry.kind == "log":
                parts[-1].items.append(data)
                entry.count += 1
                number = entry.next
                if number is not None:
                    entry.next = number + 1
                self._held += 1
            else:
                before = entry.count
                number = self._first_items(key, entry, (data,))
                self._held += entry.count - before
            entry.expire_at = expire_at
            entry.changes += 1
            self._serial += 1
            self._since += 1
            if self._since >= self._every:
                self._due()
            return number

    def extend(self, key: Hashable, items: Iterable[Any], *, expire_at: float | None = None) -> int | None:
        """Add *items* to the end of the log *key* in one step; returns the number of the first, as `append`."""
        number, waiter = self._extended(key, items, expire_at)
        self._wait(waiter)
        return number

    async def aappend(self, key: Hashable, item: Any, *, expire_at: float | None = None) -> int | None:
        """As `append`; for an event loop, which goes on while it waits for a critical item or for room."""
        await self._aroom()
        number, waiter = self._extended(key, (item,), expire_at)
        await self._await(waiter)
        return number

    def _extended(
        self, key: Hashable, items: Iterable[Any], expire_at: float | None
    ) -> tuple[int | None, _Waiter | None]:
        datas, critical = self._encoded(key, items)
        return self._extend(key, datas, expire_at, critical=critical) if datas else (None, None)

    def _encoded(self, key: Hashable, items: Iterable[Any]) -> tuple[list[bytes], bool]:
        datas, critical = [], False
        for item in items:
            datas.append(self._encode(item, key))
            critical = critical or (self._critical is not None and bool(self._critical(key, item)))
        return datas, critical

    def _extend(
        self, key: Hashable, datas: Sequence[bytes], expire_at: float | None, *, critical: bool
    ) -> tuple[int | None, _Waiter | None]:
        with self._lock:
            entry = self._entry(key, len(datas))
            before = entry.count
            number = self._first_items(key, entry, datas)
            entry.expire_at = expire_at
            return number, self._changed(key, entry, before, len(datas), critical=critical)

    def _first_items(self, key: Hashable, entry: _Entry, datas: Sequence[bytes]) -> int | None:
        if entry.kind == "value":
            self._forget_empty(key, entry)
            raise ValueError(f"{_shown(key)} should be a log to be appended to; found a value. replace() it")
        number = entry.next
        entry.extend(datas)
        return number

    def replace(self, key: Hashable, items: Iterable[Any], *, expire_at: float | None = None) -> None:
        """Save a log anew with these *items*, in the place of whatever is there; they are numbered from 0."""
        datas, critical = self._encoded(key, items)
        with self._lock:
            waiter = self._become(key, _Part("log", items=datas, replace=True), expire_at, critical=critical)
        self._wait(waiter)

    def drop(self, key: Hashable, start: int, stop: int) -> None:
        """
        Take the items with the sequence numbers from *start* to before *stop* out of the log *key*.

        What is not there is ignored. The others keep their numbers.

        Raises:
            ValueError: the numbers of the log are not known here: it is not tracked (see `track`).
        """
        with self._lock:
            entry = self._numbered(key)
            assert entry.next is not None
            start, stop = max(start, 0), min(stop, entry.next)
            if start >= stop:
                self._forget_empty(key, entry)
                return
            before = entry.count
            entry.drop(start, stop)
            self._changed(key, entry, before, 1)

    def edit(self, key: Hashable, sequence: int, item: Any) -> None:
        """
        Put *item* in the place of the one with that *sequence* number in the log *key*.

        Raises:
            ValueError: there has never been such a number, or they are not known here: see `track`.
        """
        datas, critical = self._encoded(key, (item,))
        with self._lock:
            entry = self._numbered(key)
            assert entry.next is not None
            if not 0 <= sequence < entry.next:
                self._forget_empty(key, entry)
                raise ValueError(
                    f"an item of {_shown(key)} can be edited at 0 to {entry.next - 1}; found {sequence}. Append it"
                )
            before = entry.count
            entry.edit(sequence, datas[0])
            waiter = self._changed(key, entry, before, 1, critical=critical)
        self._wait(waiter)

    def delete(self, key: Hashable) -> None:
        """Remove the entry from the store, whatever it is; it need not be there."""
        with self._lock:
            self._become(key, _Part("deleted"), None)

    def clear(self) -> None:
        """
        Remove every entry of the space from the store, and forget what is pending; returns when that is done.

        Raises:
            StoreUnavailable: not all are removed. Calling it again goes on.
        """
        with self._drive:
            with self._lock:
                if self._refusing:
                    self._look(None, 0)
            try:
                self._clear_store(self._void)
                with self._lock:
                    # What was not in the store yet, and what was changed meanwhile.
                    self._void({*self._heads, *self._saving, *self._pending, *self._rejected})
            finally:
                self._answer({}, None)  # nobody else would, where nothing is left to save

    def _clear_store(self, gone: Callable[[Collection[Any]], object]) -> None:
        """Delete everything from the store; *gone* is told the keys of each part that is deleted."""
        keys = self._store.keys(self._space)
        while batch := list(itertools.islice(keys, _SLICE)):
            self._store.save([Delete(self._space, key) for key in batch])
            gone(batch)

    def _void(self, keys: Iterable[Any]) -> None:
        """Forget what is not saved of *keys*, which are not in the store any more; no save is under way."""
        with self._lock:
            for key in keys:
                for entries in (self._saving, self._pending):
                    if (entry := entries.pop(key, None)) is not None:
                        self._held -= entry.count
                        self._superseded += entry.changes
                self._release(key)
                if key in self._leaving:
                    self._leave(key)
                elif key in self._heads:
                    self._heads[key] = None
            self._stuck = self._stuck and bool(self._saving)
            self._settled.notify_all()

    def _revise(
        self,
        key: Hashable,
        following: int | None,
        expire_at: float | None,
        *,
        drop: Sequence[tuple[int, int]] = (),
        put: Mapping[int, bytes] | None = None,
        append: Sequence[bytes] = (),
        critical: bool = False,
        patient: bool = True,
        still: Callable[[], object] | None = None,
    ) -> tuple[int | None, _Waiter | None]:
        """
        Change a log, encoded, in one step: all of it, or nothing and an error. For a `journal.Journal`.

        Args:
            key: A log that is tracked.
            following: The number that the next item has to get; with another one, nothing is done.
            expire_at: As for `append`.
            drop: Leave first.
            put: Take their places then.
            append: Come last.
            critical: Whether somebody will wait for it.
            patient: Whether to wait a while for room.
            still: Asked once there is room; if it says no, nothing is done.

        Returns:
            The number before the change that the next item would have got, or ``None`` if nothing was done; and what
            to wait for, if it is critical.
        """
        changes = len(drop) + len(append) + (len(put) if put else 0)
        with self._lock:
            if not patient and 0 < self._held > self._max_pending - changes:
                self._due()
                raise StoreUnavailable(f"write-behind {self.name!r} has no room. Nothing was changed. {self._advice()}")
            entry = self._entry(key, changes)
            if entry.next != following or entry.kind == "value" or (still is not None and not still()):
                self._forget_empty(key, entry)
                return None, None
            before = entry.count
            for start, stop in drop:
                entry.drop(start, stop)
            for sequence, data in put.items() if put else ():
                entry.edit(sequence, data)
            if append:
                entry.extend(append)
            entry.expire_at = expire_at
            return following, self._changed(key, entry, before, changes, critical=critical)

    def _anew(
        self,
        key: Hashable,
        datas: list[bytes],
        expire_at: float | None,
        *,
        critical: bool = False,
        still: Callable[[], object] | None = None,
    ) -> _Waiter | None:
        """As `replace`, encoded, and without waiting for a critical item; *still* as in `_revise`."""
        with self._lock:
            entry = self._entry(key, max(len(datas), 1), whole=True)
            if still is not None and not still():
                self._forget_empty(key, entry)
                return None
            part = _Part("log", items=datas, replace=True)
            return self._become(key, part, expire_at, critical=critical)

    def _following(self, key: Hashable) -> int | None:
        """The number that the next item of the log *key* gets; ``None``: not known here."""
        with self._lock:
            entry = self._pending.get(key)
            return self._kind(key)[1] if entry is None else entry.next

    def _become(self, key: Hashable, part: _Part, expire_at: float | None, *, critical: bool = False) -> _Waiter | None:
        entry = self._entry(key, max(len(part.items), 1), whole=True)
        before = entry.count
        self._superseded += entry.changes
        entry.changes = 0
        entry.become(part)
        entry.expire_at = expire_at
        return self._changed(key, entry, before, max(len(part.items), 1), critical=critical)

    def _numbered(self, key: Hashable) -> _Entry:
        entry = self._entry(key, 1)
        if entry.next is None or entry.kind == "value":
            self._forget_empty(key, entry)
            raise ValueError(
                f"the sequence numbers of {_shown(key)} must be known here, and it must be a log. "
                f"Load it, and track() what came, before its items are dropped or edited"
            )
        return entry

    def _entry(self, key: Hashable, more: int, *, whole: bool = False) -> _Entry:
        """The pending entry of *key*, to be given *more* to hold."""
        entry = self._pending.get(key)
        if self._refusing or self._rejected or self._held + more > self._max_pending:
            self._look(key, more - entry.count if whole and entry is not None else more)
            entry = self._pending.get(key)  # it may have been saved while it was waited for room
        if entry is None:
            encode_key(key)  # refused here, and not when it is saved
            kind, following = self._kind(key)
            entry = _Entry(self._serial + 1, self._timer(), kind, following)
            if not self._pending:
                self._rouse(timed=True)
            self._pending[key] = entry
        return entry

    def _kind(self, key: Hashable) -> tuple[str | None, int | None]:
        """What *key* is, and its next sequence number, before any change that is pending."""
        saving = self._saving.get(key)
        if saving is not None:
            return saving.kind, saving.next
        head = self._heads.get(key, _ANY)
        if head is _ANY:
            return None, None
        return (None, 0) if head is None else (head.kind, head.next)

    def _look(self, key: Hashable, more: int) -> None:
        """Raise what is in the way of a change; wait a while for room, where that is allowed and of any use."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            if self._closing:
                raise StoreError(f"write-behind {self.name!r} is closed. Change things before, or close it later")
            if self._read_only:
                raise StoreError(
                    f"write-behind {self.name!r} cannot save {_shown(key)}: its store was opened with read_only=True. "
                    f"Nothing was changed. Open the store without read_only="
                )
            self._check(key)
            # A single change larger than all that may wait is taken when nothing else does.
            if more <= 0 or self._held == 0 or self._held + more <= self._max_pending:
                return
            self._due()
            left = deadline - time.monotonic()
            if self._error is not None or left <= 0 or running_loop() or threading.current_thread() is self._thread:
                raise StoreUnavailable(
                    f"write-behind {self.name!r} has room for {self._max_pending:,} changes that wait to be saved; "
                    f"found {self._held:,} of them. Nothing was changed. {self._advice()}"
                ) from self._error
            self._settled.wait(left)

    def _advice(self) -> str:
        if self._error is None:
            return "The store is slower than the changes come: wait (on a loop: aput, aappend), or raise max_pending="
        return f"The store does not save: {self._error}"

    def _check(self, key: Hashable) -> None:
        if found := self._rejected.get(key):
            raise self._refusal(found[0])

    def _forget_empty(self, key: Hashable, entry: _Entry) -> None:
        """Forget *entry* if nothing has come of it."""
        if not entry.parts and self._pending.get(key) is entry:
            del self._pending[key]

    def _changed(
        self, key: Hashable, entry: _Entry, before: int, changes: int, *, critical: bool = False
    ) -> _Waiter | None:
        """Account for a change of *entry*, which held as much as *before*."""
        self._held += entry.count - before
        entry.changes += changes
        self._serial += changes
        self._since += changes
        if self._since >= self._every:
            self._due()
        if not critical:
            return None
        entry.sync = True
        return self._hurry(key)

    # Saving

    def _due(self) -> None:
        """Have everything changed so far saved."""
        self._goal = self._serial
        self._since = 0
        self._rouse()

    def _hurry(self, key: Any, *, patient: bool = False) -> _Waiter:
        """Have *key*, or everything, saved now, and not only when an outage lets us try again."""
        waiter = _Waiter(key, self._serial, self._attempts, patient=patient)
        self._waiters.append(waiter)
        self._retry_at = -float("inf")
        if key is _ALL:
            self._due()
        else:
            # Alone: what else is pending is cheaper to save later, with more of its kind.
            self._urgent.add(key)
            self._rouse()
        return waiter

    def _rouse(self, *, timed: bool = False) -> None:
        """Wake the writer, or start it; *timed*: only for the sake of the clock."""
        if timed and self._manual:
            return
        if not self._known and not self._closing:  # a new process, or a shutdown that was survived
            self._known = True
            close_at_shutdown(self, f"write-behind {self.name!r}")
            if (keeper := self._keeper()) is not None:
                keeper._stand_before_writer()
        if self._thread is not None:
            self._news.notify()
            return
        thread = threading.Thread(target=self._run, name=f"hygiene-writebehind-{self.name}", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # the interpreter is on its way out: who waits does it himself
            self._thread = None

    def _run(self) -> None:
        here = threading.current_thread()
        try:
            self._work(here)
        finally:  # whatever a store may raise, the next change must start another one
            if self._thread is here:
                with self._lock:
                    if self._thread is here:
                        self._thread = None
        if self._retired is here:
            retire()

    def _work(self, here: threading.Thread) -> None:
        while self._thread is here:  # else another one has the work: see `_renew_locks`
            if self._step():
                if self._interval_elapsed and self._sigterm_unchecked:
                    self._sigterm_unchecked = False
                    _warn_of_sigterm(self.name)
                continue
            self._expire()
            with self._lock:
                pause = self._pause()
                if pause == 0:
                    continue
                if self._closed and not self._unsaved:
                    self._thread = None
                    return
                if not self._news.wait(pause) and not self._unsaved:
                    self._thread = None
                    return

    @property
    def _unsaved(self) -> bool:
        return bool(self._pending or self._saving)

    def _expire(self) -> None:
        """Now and then have the store give back the room of what is over."""
        if self._expires and self._error is None and self._timer() - self._expired_at >= _EXPIRE_EVERY:
            self._expired_at = self._timer()
            with contextlib.suppress(StoreError):
                self._store.expire()

    def _pause(self) -> float | None:
        """Seconds until something is due, as far as the clock knows; ``None``: when somebody says so."""
        if not self._unsaved:
            return _LINGER
        now = self._timer()
        if self._error is not None:
            due = self._retry_at
        elif self._stuck:
            return 0
        else:
            first = next(iter(self._pending.values()))
            if self._urgent or first.first <= self._goal:
                return 0
            due = first.at + self._interval
        if due <= now:
            return 0
        return None if self._manual else min(due - now, threading.TIMEOUT_MAX)

    def _take(self) -> dict[Any, _Entry]:
        """What is to be saved now."""
        pending = self._pending
        if not self._unsaved:
            self._urgent.clear()
            return {}
        now = self._timer()
        if self._error is not None and now < self._retry_at:
            return {}
        if self._stuck:
            return self._saving
        if not pending:
            return {}
        keys = [key for key in self._urgent if key in pending]
        self._urgent.clear()
        if not keys:
            first = next(iter(pending.values()))
            if first.first > self._goal:
                if now - first.at < self._interval:
                    return {}
                self._goal, self._since = self._serial, 0
                self._interval_elapsed = True
            count = 0
            for key, entry in pending.items():
                if entry.first > self._goal or count >= _SLICE:
                    break
                keys.append(key)
                count += entry.count
        return {key: pending.pop(key) for key in keys}

    def _step(self) -> bool:
        """Save one batch, if one is due, and tell who waits for it."""
        drive = self._drive
        with drive:
            if drive is not self._drive:
                return True  # `_renew_locks` has put another one in its place: wait for that one
            with self._lock:
                batch = self._take()
                if not batch:
                    return False
                self._saving, self._stuck = batch, False
                self._attempts += 1
            saved: dict[Any, Head | None] = {}
            refused: dict[Any, Exception] = {}
            try:
                failure = self._save(batch, saved, refused)
            except BaseException as error:  # somebody is interrupted who saves by himself
                failure = StoreError(f"the save was interrupted by {error!r}")
                self._settle(batch, saved, refused, failure)
                self._answer(refused, failure)
                raise
            rejected = self._settle(batch, saved, refused, failure)
            told = self._on_conflict is not None
            for one in rejected:
                self._tell(one)
                if told and (keeper := self._keeper()) is not None:
                    keeper._refused(one)  # before whoever waits hears that all is well
            self._answer(refused, failure)
        # With the drive free, unless *on_conflict* has led here: a keeper takes locks of its own.
        if (keeper := self._keeper()) is not None:
            for one in () if told else rejected:
                keeper._refused(one)
            if saved:
                keeper._saved()
        return True

    def _save(
        self, batch: dict[Any, _Entry], saved: dict[Any, Head | None], refused: dict[Any, Exception]
    ) -> Exception | None:
        """Save *batch*; what the store says of single entries goes to *saved* and *refused*, an outage is returned."""
        sync = self._machine or any(entry.sync for entry in batch.values())
        groups = [list(batch)]
        while groups:
            keys = groups.pop()
            changes: list[Change] = []
            ends: list[int] = []
            for key in keys:
                changes += self._changes(key, batch[key])
                ends.append(len(changes) - 1)
            guilty: Sequence[Any] = ()
            try:
                heads = self._write(keys, changes, sync=sync)
            except VersionConflict as error:
                wrong = {key: found for space, key, _, found in error.conflicts if space == self._space}
                over = [key for key in keys if wrong.get(key) == 0 and self._is_over(key, batch[key], saved)]
                guilty, refusal = [key for key in keys if key in wrong and key not in over], error
                if over and not guilty:
                    if left := [key for key in keys if key not in saved]:
                        groups.append(left)
                    continue
            except (ValueError, TypeError, OverflowError, OwnershipLost) as error:
                refusal = error  # type: ignore[assignment]
            except Exception as error:
                return error
            else:
                self._saves += 1
                saved.update((key, heads[end]) for key, end in zip(keys, ends, strict=True))
                continue
            if not guilty and len(keys) > 1:
                groups += [[key] for key in reversed(keys)]  # who it is will be seen
                continue
            guilty = guilty or keys
            refused.update(dict.fromkeys(guilty, refusal))
            if left := [key for key in keys if key not in refused and key not in saved]:
                groups.append(left)
        return None

    def _is_over(self, key: Any, entry: _Entry, saved: dict[Any, Head | None]) -> bool:
        """Whether it is all right that *key* is gone from the store; if nothing is left to do, it counts as *saved*."""
        if entry.parts[0].kind == "deleted":
            saved[key] = None
            return True
        with self._lock:
            head = self._heads.get(key)
            end = None if head is None or head is _ANY else head.expire_at
            if end is None or end > time.time() + _CLOCKS_DIFFER:
                return False
            # Its time is over, so nobody has removed it. Written anew it begins anew. What was added to what is gone,
            # by somebody who still has it in use, ends with it.
            self._heads[key] = None
        if not entry.whole:
            saved[key] = None
        return True

    def _write(self, keys: Sequence[Any], changes: list[Change], *, sync: bool) -> list[Head | None]:
        while fence := self._fences_of(keys):
            store: Any = self._store  # one that has leases
            try:
                heads: list[Head | None] = store.save(changes, sync=sync, fence=fence)
            except OwnershipLost:
                # A lease that was given back while the save was on its way is not lost, and not needed.
                if self._fences_of(keys) == fence:
                    raise
            else:
                return heads
        return self._store.save(changes, sync=sync)

    def _fences_of(self, keys: Sequence[Any]) -> dict[tuple[str, Any], int]:
        fences = self._fences
        if not fences:
            return {}
        with self._lock:
            return {(self._space, key): fences[key] for key in keys if key in fences}

    def _changes(self, key: Any, entry: _Entry) -> list[Change]:
        """The records for *entry*; the first of them says which version it builds on."""
        changes: list[Change] = []
        base: int | None = None
        head = self._heads.get(key, _ANY)
        if head is not _ANY:
            base = 0 if head is None else head.version
        for part in entry.parts:
            change: Change
            if part.kind == "value":
                change = SaveValue(self._space, key, part.data, base, entry.expire_at)
            elif part.kind == "deleted":
                change = Delete(self._space, key, base)
            else:
                change = SaveLog(
                    self._space, key, base, part.items, part.drop, part.edits, part.replace, entry.expire_at
                )
            changes.append(change)
            base = None
        return changes

    def _settle(
        self,
        batch: dict[Any, _Entry],
        saved: dict[Any, Head | None],
        refused: dict[Any, Exception],
        failure: Exception | None,
    ) -> list[Rejected]:
        """Enter in the books what has become of *batch*."""
        rejected = []
        uncertain = isinstance(failure, StoreUnavailable) and failure.uncertain
        with self._lock:
            back: dict[Any, _Entry] = {}
            for key, entry in batch.items():
                if key in saved:
                    self._held -= entry.count
                    self._saved += entry.changes
                    self._expires = self._expires or entry.expire_at is not None
                    if key in self._heads:
                        self._heads[key] = saved[key]
                        if key in self._leaving and key not in self._pending:
                            self._leave(key)
                    continue
                if uncertain and key not in refused:
                    back[key] = entry
                    continue
                newer = self._pending.pop(key, None)
                if newer is not None:
                    held = entry.count + newer.count
                    self._superseded += entry.follow(newer)
                    self._held += entry.count - held
                if key in refused:
                    one = Rejected(key, refused[key], tuple(self._changes(key, entry)))
                    self._rejected[key] = (one, entry)
                    self._conflicts += 1
                    rejected.append(one)
                else:
                    back[key] = entry
                    self._goal = max(self._goal, entry.first)
            if back and not uncertain:
                # They are older than all others, except where urgent ones overtook some.
                self._pending = dict(sorted([*back.items(), *self._pending.items()], key=lambda item: item[1].first))
                back = {}
            self._saving, self._stuck = back, bool(back)
            if failure is not None:
                self._failed(failure)
            elif self._error is not None and saved:
                logger.info(
                    "write-behind %r: saves again, after %d attempts",
                    self.name,
                    self._retries,
                    extra={"event_name": "saver.recovered", "saver": self.name},
                )
                self._error, self._retries = None, 0
            self._settled.notify_all()
        for one in rejected:
            logger.error(
                "write-behind %r: %s is rejected: %s",
                self.name,
                _shown(one.key),
                one.error,
                extra={"event_name": "saver.rejected", "saver": self.name, "of": self},
            )
        return rejected

    def _failed(self, failure: Exception) -> None:
        self._failures += 1
        if self._error is None:
            logger.warning(
                "write-behind %r: cannot save, %d change(s) stay pending and are tried again: %s",
                self.name,
                sum(entry.changes for entry in (*self._saving.values(), *self._pending.values())),
                failure,
                extra={"event_name": "saver.outage", "saver": self.name},
            )
        self._error = failure
        # Full jitter: processes that lost one server together must not come back to it together.
        most = min(_FIRST_RETRY * 2 ** min(self._retries, 20), _LAST_RETRY)
        self._retries += 1
        self._retry_at = self._timer() + random.uniform(0, most)  # noqa: S311 - no secret

    def _tell(self, one: Rejected) -> None:
        """Give *one* to who wants to know."""
        if self._on_conflict is None:
            return
        with self._lock:
            found = self._release(one.key)
        try:
            self._on_conflict(one)
        except Exception:
            logger.exception(
                "write-behind %r: on_conflict failed for %s",
                self.name,
                _shown(one.key),
                extra={"event_name": "saver.hook_failed", "saver": self.name, "of": self},
            )
            with self._lock:
                self._hook_errors += 1
                if found is not None and one.key not in self._rejected:  # nobody has taken it
                    self._rejected[one.key] = found
                    self._held += found[1].count
                    self._discarded -= found[1].changes

    def _answer(self, refused: dict[Any, Exception], failure: Exception | None) -> None:
        """Tell those who wait whether it was saved."""
        answers: list[tuple[_Waiter, Exception | None]] = []
        with self._lock:
            left = []
            for waiter in self._waiters:
                if waiter.key in refused:
                    answers.append((waiter, self._refusal(Rejected(waiter.key, refused[waiter.key], ()))))
                elif self._is_saved(waiter):
                    answers.append((waiter, self._verdict() if waiter.key is _ALL else None))
                elif failure is None or (waiter.patient and _may_pass(failure)):
                    left.append(waiter)
                elif waiter.since == self._attempts:  # who asked during this attempt is promised one of his own
                    left.append(waiter)
                    self._retry_at = -float("inf")
                else:
                    answers.append((waiter, self._unavailable(failure)))
            self._waiters = left
        for waiter, error in answers:
            if error is None:
                waiter.future.set_result(None)
            else:
                waiter.future.set_exception(error)

    def _is_saved(self, waiter: _Waiter) -> bool:
        for entries in (self._saving, self._pending):  # what has failed before comes first
            oldest = next(iter(entries.values()), None) if waiter.key is _ALL else entries.get(waiter.key)
            if oldest is not None and oldest.first <= waiter.goal:
                return False
        return True

    def _verdict(self) -> StoreError | None:
        """What there is to say when nothing is pending any more: of conflicts, all; else of the first entry."""
        ones = [one for one, _ in self._rejected.values()]
        conflicts = [one for one in ones if isinstance(one.error, VersionConflict)]
        if not ones:
            return None
        error = self._refusal((conflicts or ones)[0])
        if isinstance(error, VersionConflict):
            error.conflicts = tuple(conflict for one in conflicts if (conflict := self._conflict_of(one)) is not None)
        return error

    def _conflict_of(self, one: Rejected) -> tuple[str, Any, int, int] | None:
        """What the store has said of *one*, and not of others that were to be saved with it."""
        found: tuple[tuple[str, Any, int, int], ...] = getattr(one.error, "conflicts", ())
        return next((conflict for conflict in found if conflict[:2] == (self._space, one.key)), None)

    def _refusal(self, one: Rejected) -> StoreError:
        """A new error for *one*: it may be raised in several threads."""
        advice = "discard() it, and load it again"
        if self._keeper() is not None:
            passing = isinstance(one.error, (VersionConflict, OwnershipLost))
            advice = "Look it up again" if passing else "Put another value in its place, or delete it"
        because = str(one.error)
        conflict = self._conflict_of(one)
        if conflict is not None:
            _, _, base, found = conflict
            because = f"version {base} was to be replaced; found version {found}: somebody else has saved it"
            if not found:
                because = f"version {base} was to be replaced; found none: somebody else has removed it"
        message = f"{_shown(one.key)} was rejected: {because}. {advice}"
        error = StoreError(message)
        if isinstance(one.error, VersionConflict):
            error = VersionConflict(message, () if conflict is None else (conflict,), one.error.unsaved)
        elif isinstance(one.error, OwnershipLost):
            error = OwnershipLost(message)
        error.__cause__ = one.error
        return error

    def _unavailable(self, cause: Exception | None) -> StoreUnavailable:
        because = f": {cause}" if cause is not None else "; the save that is under way takes longer"
        error = StoreUnavailable(
            f"write-behind {self.name!r} could not save {self._held:,} change(s){because}. "
            f"They stay pending and are tried again"
        )
        error.__cause__ = cause
        return error

    # Waiting

    def _wait(self, waiter: _Waiter | None, timeout: float | None = None) -> None:
        if waiter is None:
            return
        try:
            # Within on_conflict, or where no thread can be started any more, nobody else would do it.
            if self._thread is None or self._thread is threading.current_thread():
                while not waiter.future.done() and self._step():
                    pass
                timeout = 0.0
            # Not `result(timeout)`: its TimeoutError is hard to tell from one of the store's.
            if not futures.wait([waiter.future], timeout).done:
                raise self._unavailable(self._error)
            waiter.future.result()
        finally:
            self._gone(waiter)

    async def _await(self, waiter: _Waiter | None, timeout: float | None = None) -> None:
        if waiter is None:
            return
        try:
            if self._thread is None or self._thread is threading.current_thread():
                self._wait(waiter, 0.0)
                return
            done = asyncio.wrap_future(waiter.future)
            done.add_done_callback(retrieve)  # who is cancelled here does not look at it
            if not (await asyncio.wait([done], timeout=timeout))[0]:
                raise self._unavailable(self._error)
            done.result()
        finally:
            self._gone(waiter)

    def _gone(self, waiter: _Waiter) -> None:
        with self._lock, contextlib.suppress(ValueError):  # answered
            self._waiters.remove(waiter)

    async def _aroom(self) -> None:
        if self._held >= self._max_pending:
            await self.aflush()

    def save(self, key: Hashable, timeout: Duration | None = None) -> None:
        """
        Return when the entry *key* is saved, with all its changes so far: what an eviction calls before it evicts.

        Args:
            key: The entry; if nothing of it is pending, there is nothing to do.
            timeout: Seconds to go on trying; ``None``: one attempt, made at once.

        Raises:
            StoreUnavailable: it could not be saved. It stays pending, and must stay in memory.
            VersionConflict, StoreError: it is rejected; see `discard`.
        """
        limit = None if timeout is None else seconds(timeout, "timeout")
        self._wait(self._waiter_for(key, patient=limit is not None), limit)

    async def asave(self, key: Hashable, timeout: Duration | None = None) -> None:
        """As `save`; for an event loop, which goes on meanwhile."""
        limit = None if timeout is None else seconds(timeout, "timeout")
        await self._await(self._waiter_for(key, patient=limit is not None), limit)

    def _waiter_for(self, key: Any, *, patient: bool) -> _Waiter | None:
        with self._lock:
            if key is not _ALL:
                self._check(key)
                busy = key in self._pending or key in self._saving
            else:
                busy = self._unsaved
                if not busy and (error := self._verdict()):
                    raise error
            return self._hurry(key, patient=patient) if busy else None

    def flush(self, timeout: Duration | None = None) -> None:
        """
        Return when everything changed so far is saved: the acknowledgement.

        Args:
            timeout: Seconds to go on trying; ``None``: one attempt for each batch, made at once.

        Raises:
            StoreUnavailable: not everything could be saved. It stays pending and is tried again.
            VersionConflict, StoreError: everything else is saved, and an entry is rejected; see `discard`.
            StoreError: nothing is pending, and the file of a `SQLiteStore` was deleted, moved, replaced or truncated.
        """
        if not self._flush(timeout):
            self._check_file()

    def _flush(self, timeout: Duration | None) -> bool:
        """As `flush`; says whether there was anything to save, which then was checked to be where it should."""
        limit = None if timeout is None else seconds(timeout, "timeout")
        waiter = self._waiter_for(_ALL, patient=limit is not None)
        self._wait(waiter, limit)
        return waiter is not None

    async def aflush(self, timeout: Duration | None = None) -> None:
        """As `flush`; for an event loop, which goes on meanwhile. If it is cancelled, the saving goes on."""
        if not await self._aflush(timeout):
            self._check_file()

    async def _aflush(self, timeout: Duration | None) -> bool:
        limit = None if timeout is None else seconds(timeout, "timeout")
        waiter = self._waiter_for(_ALL, patient=limit is not None)
        await self._await(waiter, limit)
        return waiter is not None

    def _check_file(self) -> None:
        """Raise if what was saved before is no longer where the store was opened: a file that was deleted, say."""
        check: Callable[[], object] | None = getattr(self._store, "check_file", None)
        if check is not None:
            check()

    def _soon(self) -> None:
        """Have everything changed so far saved in the background."""
        with self._lock:
            if self._pending:
                self._due()

    @property
    def _outage(self) -> bool:
        """Whether the last save failed because the store was not able to."""
        return self._error is not None

    def save_due(self) -> bool:
        """
        Save what is due by the clock, and return whether anything was; the writer does that by itself.

        For tests with a `testing.ManualClock`, which the writer leaves alone. Never raises because a save failed.
        """
        with self._lock:
            now = self._timer()
            if not self._unsaved:
                return False
            first = next(iter(self._pending.values()), None)
            due = self._retry_at if self._error is not None else first.at + self._interval if first is not None else now
            if due > now:
                return False
            waiter = self._hurry(_ALL)
        with contextlib.suppress(StoreError):
            self._wait(waiter)
        return True

    # Reading

    def load(self, key: Hashable) -> Record | None:
        """
        The entry as it will be once everything is saved: what is pending over what is stored.

        Waits for a save of this entry that is under way, unless what it has in hand is all there is to the entry. The
        head is the stored one, with the sequence numbers as they will be; its version is 0 where nothing is stored yet.

        Raises:
            StoreUnavailable: what is pending is not all there is to it, and the store cannot be read.
            VersionConflict, StoreError: the entry is rejected, or damaged.
        """
        return self._load(key)

    def _load(self, key: Hashable, *, track: bool = False) -> Record | None:
        """As `load`; with *track* what comes is tracked from the same moment on, unless something of it is pending."""
        while True:
            with self._lock:
                while True:
                    entry = self._unsaved_of(key)
                    # A save under way is not waited for if it is all there is to know: it may hang, and who asks may be
                    # an event loop that has removed the entry.
                    if entry is not None and entry.whole and key not in self._rejected:
                        if track:
                            self._leaving.discard(key)
                        return self._overlay(key, None, entry)
                    if key not in self._saving or self._stuck:
                        break
                    self._settled.wait()
                self._check(key)
                serial = self._saves
            record = self._store.load(self._space, key)
            with self._lock:
                # Nothing was saved meanwhile, so what is unsaved is not in what was loaded.
                if (self._saves != serial and (entry is not None or track)) or (
                    key in self._saving and not self._stuck
                ):
                    continue
                entry = self._unsaved_of(key)
                if entry is None:
                    if track:
                        self._heads[key] = None if record is None else record.head
                        self._leaving.discard(key)
                    return record
                if track:
                    self._leaving.discard(key)
                return self._overlay(key, record, self._unapplied(key, record, entry))

    def _unsaved_of(self, key: Hashable) -> _Entry | None:
        """All that is not saved of *key*, as one entry."""
        pending = self._pending.get(key)
        if (saving := self._saving.get(key)) is None or (pending is not None and pending.whole):
            return pending
        both = saving.clone()
        if pending is not None:
            both.follow(pending.clone())
        return both

    def _unapplied(self, key: Hashable, record: Record | None, entry: _Entry) -> _Entry | None:
        """*entry* without what the store has saved already, although it could not say so any more."""
        head = self._heads.get(key, _ANY)
        if not self._stuck or key not in self._saving or head is _ANY or record is None:
            return entry
        return entry if record.head.version == (0 if head is None else head.version) else self._pending.get(key)

    def _overlay(self, key: Hashable, record: Record | None, entry: _Entry | None) -> Record | None:
        decode = self._store.decode
        if entry is None:
            return record
        if entry.kind == "deleted":
            return None
        head = record.head if record is not None else None
        known = self.tracked(key) if head is None else head
        version, saved_at = (0, 0.0) if known is None else (known.version, known.saved_at)
        items: dict[int, Any] = {}
        following = 0
        if record is not None and record.head.kind == "log":
            items = dict(zip(record.head.sequences, record.value, strict=True))
            following = record.head.next
        spans: tuple[tuple[int, int], ...] = ((0, 1),)
        kind: Kind
        if entry.kind == "value":
            kind, following = "value", 1
            value, size = decode(entry.parts[0].data), len(entry.parts[0].data)
        else:
            size = head.bytes if head is not None else 0
            for part in entry.parts:
                if part.replace:
                    items, following, size = {}, 0, 0
                for start, stop in part.drop:
                    items = {sequence: item for sequence, item in items.items() if not start <= sequence < stop}
                items.update((sequence, decode(data)) for sequence, data in part.edits.items())
                items.update((following + n, decode(data)) for n, data in enumerate(part.items))
                following += len(part.items)
                size += sum(map(len, part.items))
            numbers = sorted(items)
            kind, spans, value = "log", _spans(numbers), [items[number] for number in numbers]
        made = Head(self._space, key, kind, version, size, saved_at, entry.expire_at, spans=spans, next=following)
        result: Record = Record(made, value)
        return result

    def contains(self, key: Hashable) -> bool:
        """Whether the entry will be there once everything is saved."""
        with self._lock:
            entry = self._pending.get(key) or self._saving.get(key)
            if entry is not None:
                return entry.kind != "deleted"
        return self._store.contains(self._space, key)

    def _explained(self, error: NotStorable) -> NotStorable:
        """*error*, with the name of the linked attribute if the registry is one of several."""
        explain: Callable[[NotStorable], NotStorable] | None = getattr(self._keeper(), "explain", None)
        return error if explain is None else explain(error)

    def pending(self, key: Hashable) -> tuple[Change, ...]:
        """What is not saved of *key*, encoded, and in order: what a save has in hand, then what came since."""
        with self._lock:
            found = [entry for entry in (self._saving.get(key), self._pending.get(key)) if entry is not None]
            return tuple(_frozen(change) for entry in found for change in self._changes(key, entry))

    def __contains__(self, key: object) -> bool:
        """Whether something of *key* is not saved."""
        return key in self._pending or key in self._saving or key in self._rejected

    def __len__(self) -> int:
        """Items and values that are not saved."""
        return self._held

    def __bool__(self) -> bool:
        return True

    # Versions

    def track(self, key: Hashable, head: Head | None) -> None:
        """
        From now on save *key* only on top of what *head* says; ``None``: only if it is not there.

        For who keeps the entry in memory: what somebody else saves meanwhile is then never overwritten, and the
        sequence numbers of a log are known. Call `untrack` when it leaves.

        Raises:
            ValueError: there are changes that are not saved, which did not build on this.
        """
        with self._lock:
            if key in self._pending or key in self._saving:
                raise ValueError(f"{_shown(key)} must have nothing pending to be tracked; save() it before")
            self._heads[key] = head
            self._leaving.discard(key)

    def untrack(self, key: Hashable) -> None:
        """Forget the version of *key*, as soon as all its changes are saved."""
        with self._lock:
            if key in self._pending or key in self._saving:
                self._leaving.add(key)
            else:
                self._leave(key)

    def _track_blindly(self, key: Hashable) -> None:
        """As `track`, for who is about to write *key* over whatever is there: the version is known once it is saved."""
        self._heads.setdefault(key, _ANY)
        self._leaving.discard(key)

    def _keep_head(self, key: Hashable, head: Head) -> None:
        """*key* came from the store with this *head*; if it was untracked since, it is not so any more."""
        with self._lock:
            self._leaving.discard(key)
            if key not in self._pending and key not in self._saving:
                self._heads.setdefault(key, head)

    def _is_tracked(self, key: Hashable) -> bool:
        return key in self._heads

    def fence(self, key: Hashable, token: int | None) -> None:
        """From now on save *key* only under the lease with this *token*; ``None``: without one. See `OwnershipLost`."""
        with self._lock:
            if token is None:
                self._fences.pop(key, None)
            else:
                self._fences[key] = token

    def _knows(self, key: Hashable) -> bool:
        """Whether `load` need not ask the store, because what is unsaved is all there is to know of *key*."""
        with self._lock:
            entry = self._unsaved_of(key)
            return entry is not None and entry.whole and key not in self._rejected

    def tracked(self, key: Hashable) -> Head | None:
        """The head of *key* as last saved here, or as given to `track`; ``None``: not known, or not there."""
        head = self._heads.get(key)
        return None if head is _ANY else head

    def _leave(self, key: Hashable) -> None:
        self._heads.pop(key, None)
        self._leaving.discard(key)

    # What the store has refused

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Entries that the store refuses for good. Each use of them raises, until `discard`."""
        with self._lock:
            return tuple(one for one, _ in self._rejected.values())

    def discard(self, key: Hashable) -> Rejected | None:
        """Give up the rejected changes of *key*, and hand them back; ``None`` if there are none. Load it anew then."""
        with self._lock:
            found = self._release(key)
        return None if found is None else found[0]

    def _release(self, key: Hashable) -> tuple[Rejected, _Entry] | None:
        found = self._rejected.pop(key, None)
        if found is not None:
            self._held -= found[1].count
            self._discarded += found[1].changes
            self._leave(key)
            self._settled.notify_all()
        return found

    # The end

    def close(self, timeout: Duration = GRACE) -> None:
        """
        Save everything and take no more changes. Again does nothing. Does not close the store.

        Args:
            timeout: Seconds to go on trying.

        Raises:
            StoreUnavailable: not everything could be saved. It stays pending, is tried again for as long as the process
                lives, and `close` may be called again.
            VersionConflict, StoreError: everything else is saved, and an entry is rejected: see `rejected`.
        """
        limit = seconds(timeout, "timeout")
        try:
            self._wait(self._last_waiter(), limit)
        except StoreUnavailable:
            raise
        except StoreError:
            pass  # an entry is rejected, which is said when the rest is over
        self._end()

    async def aclose(self, timeout: Duration = GRACE) -> None:
        """As `close`; for an event loop, which goes on meanwhile."""
        limit = seconds(timeout, "timeout")
        try:
            await self._await(self._last_waiter(), limit)
        except StoreUnavailable:
            raise
        except StoreError:
            pass  # as in close()
        self._end()

    def _last_waiter(self) -> _Waiter | None:
        with self._lock:
            self._closing = self._refusing = True
            return self._hurry(_ALL, patient=True) if self._unsaved else None

    def _end(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._relief.cancel()
            self._news.notify_all()
            if error := self._verdict():
                raise error

    @property
    def closed(self) -> bool:
        """Whether it was closed, with nothing pending."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        try:
            self.close()
        except StoreError as failed:
            if error is None:
                raise
            error.add_note(f"while closing write-behind {self.name!r}: {failed}")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        try:
            await self.aclose()
        except StoreError as failed:
            if error is None:
                raise
            error.add_note(f"while closing write-behind {self.name!r}: {failed}")

    def stats(self) -> WriteBehindStats:
        """The numbers of this moment."""
        with self._lock:
            entries = [
                *self._pending.values(),
                *self._saving.values(),
                *(entry for _, entry in self._rejected.values()),
            ]
            return WriteBehindStats(
                pending=self._held,
                keys=len({*self._pending, *self._saving, *self._rejected}),
                unsaved=sum(entry.changes for entry in entries),
                rejected=len(self._rejected),
                changes=self._serial,
                saved=self._saved,
                superseded=self._superseded,
                discarded=self._discarded,
                saves=self._saves,
                failures=self._failures,
                conflicts=self._conflicts,
                outage=self._error is not None,
                hook_errors=self._hook_errors,
            )

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._held:,} pending"
        outage = ", the store does not save" if self._error is not None else ""
        rejected = f", {len(self._rejected)} rejected" if self._rejected else ""
        return f"<WriteBehind {self.name!r}: {state}{rejected}{outage}>"

    def _after_fork(self) -> None:
        self._begin_anew()  # the thread, and what it was to save, are the parent's
        self._leaving.clear()
        self._known = False


class _Keeper(Protocol):
    """The registry's side of a writer, which is told what the writer alone can know. Called in its thread."""

    def _saved(self) -> None:
        """Something was saved."""

    def _refused(self, one: Rejected) -> None:
        """The entry was rejected."""

    def _stand_before_writer(self) -> None:
        """The writer is closed at the exit: have the registry's in-place changes saved before, in a forked child."""


def _nobody() -> None:
    return None


_warned_of_sigterm: int | None = None  # the process that has logged the warning; a forked child logs its own


def _warn_of_sigterm(name: str) -> None:
    """Log once per process that SIGTERM loses the unsaved changes, if it does. Called in a writer thread."""
    global _warned_of_sigterm  # noqa: PLW0603 - one process has one SIGTERM
    if _warned_of_sigterm == os.getpid() or not _sigterm_kills():
        return
    _warned_of_sigterm = os.getpid()
    logger.warning(
        "write-behind %r: SIGTERM would end this process without saving its unsaved changes. Call "
        "hygiene.install_signal_handlers() in the main thread, or flush() before the process ends. "
        'WriteBehind(sigterm="ignore") turns this warning off',
        name,
        extra={"event_name": "store.sigterm_unhandled", "saver": name},
    )


def _sigterm_kills() -> bool:
    """True if SIGTERM ends this process on the spot, and the process is not one that its parent ends in another way."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False
    # Not imported for this: a child of multiprocessing has it. `billiard` is the fork of it that Celery uses.
    for package in ("multiprocessing", "billiard"):
        process = sys.modules.get(f"{package}.process")
        if process is not None and type(process.current_process()).__name__ != "_MainProcess":
            return False
    # Blocked, a program waits for it with `signal.sigwait` or a file descriptor. Threads inherit the mask.
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return False
    # A handler that was not set from Python, such as gevent's. Only Linux shows it.
    with contextlib.suppress(OSError, ValueError, IndexError):
        caught = int(Path("/proc/self/status").read_text().split("\nSigCgt:")[1].split(maxsplit=1)[0], 16)
        return not caught >> (signal.SIGTERM - 1) & 1
    return True


def _relieve(reference: Callable[[], WriteBehind | None]) -> None:
    """Memory is short: what is pending would be the first thing to give back."""
    if (writer := reference()) is not None:
        with contextlib.suppress(StoreError):  # logged as an outage
            writer.flush()


def _may_pass(failure: Exception) -> bool:
    """Whether the store may be able to save soon; else (it is closed, or damaged) somebody has to do something."""
    return isinstance(failure, StoreUnavailable) or not isinstance(failure, StoreError)


def _frozen(change: Any) -> Any:
    """*change* with containers of its own: those of an entry go on changing."""
    if not hasattr(change, "append"):
        return change
    return dataclasses.replace(change, append=tuple(change.append), drop=tuple(change.drop), put=dict(change.put))


def _spans(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1] = (spans[-1][0], number + 1)
        else:
            spans.append((number, number + 1))
    return tuple(spans)


def _shown(key: object) -> str:
    text = repr(key)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
