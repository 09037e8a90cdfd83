"""
What the stores on a server have in common: everything but the words that the server understands.

Theory of operation
===================

**Read, decide here, compare and set there.** A save reads the heads of its entries, decides in Python what each of them
becomes, and sends that together with the heads that it has read. The server compares and applies in one step: a script
in Redis, a transaction in PostgreSQL. If a head is not the one that was read, nothing is applied and all is decided
anew. So the rules of a log are written once, and the server needs to know none of them.

**Lost replies.** A connection can break when a save was sent and its reply did not come. Whether it was applied is then
unknown. Each head carries a random number of the save that has written it: a look at the heads tells. If there is no
connection any more to look with, the save is remembered, and the same save asked for again first looks.

**Versions.** An entry that is new begins behind the *floor*: the highest version that any deleted entry had. A save
that creates one compares the floor, too.

**Damage.** The checksum of a head covers the space and the key; that of an item its content, and the head says which
items there are. What does not fit is moved into quarantine, as in SQLite.

**Hints** that an entry has changed elsewhere come over a connection of their own: see `hygiene.stores.watching`.
"""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import socket
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, NamedTuple, Self
from zlib import crc32

import msgspec
from msgspec.structs import replace

from hygiene.errors import OwnershipLost, StoreError, StoreUnavailable, VersionConflict
from hygiene.logs import logger
from hygiene.stores.codec import codec_named, decode, decode_key, encode_key, fits
from hygiene.stores.protocol import BadRow, Change, Delete, Head, Kind, Record, RecoveryReport, SaveLog, SaveValue
from hygiene.stores.sqlite import (
    Quarantined,
    _as_key,
    _as_text,
    _check_place,
    _check_replaces,
    _check_sizes,
    _conflict,
    _OpenStore,
    _shown,
    _with,
    _without,
)
from hygiene.stores.watching import ASKED, Line, Watch, Watcher
from hygiene.units import Duration, seconds

__all__ = ["ServerStore"]


_TRIES: Final = 200  # others were faster that often: somebody always gets on, but here it was never us
_REMEMBERED: Final = 1000  # saves with an unknown end; each is asked for again, or its caller is gone
SLICE: Final = 256

_pack = msgspec.msgpack.Encoder().encode


class MovedError(Exception):
    """A head is not the one that was read any more; nothing was applied."""


class BrokenError(Exception):
    """The connection broke in the middle; what was sent may have been applied, or not."""


class Reference(NamedTuple):
    """An entry by name, in the forms that a server needs."""

    space: str
    key: Any
    raw_space: bytes
    raw_key: bytes
    digest: bytes
    """Short and of one length, whatever the key is; 160 bits, so that no two have the same."""


class State(msgspec.Struct, frozen=True, array_like=True):
    """A head as the server has it."""

    nonce: int
    version: int
    is_log: bool
    next: int
    size: int
    saved_at: float
    expire_at: float | None
    spans: tuple[tuple[int, int], ...]

    def seal(self, ref: Reference) -> bytes:
        """The head as a row; the checksum is over everything that says whose it is, too."""
        body = _pack(self)
        return crc32(ref.raw_key, crc32(ref.raw_space, crc32(body))).to_bytes(4, "big") + body

    def over(self, now: float) -> bool:
        """Whether its time has come."""
        return self.expire_at is not None and self.expire_at <= now

    def head(self, ref: Reference) -> Head:
        """The head as users see it."""
        kind: Kind = "log" if self.is_log else "value"
        return Head(
            ref.space, ref.key, kind, self.version, self.size, self.saved_at, self.expire_at, self.spans, self.next
        )

    def shared(self, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
        """The sequence numbers in *ranges* that it has; takes time in proportion to those only."""
        for low, high in ranges:
            for start, stop in self.spans:
                yield from range(max(low, start), min(high, stop))


_unpack = msgspec.msgpack.Decoder(State).decode


def unseal(ref: Reference, row: bytes) -> State | None:
    """The head in *row*, or ``None`` if it is damaged."""
    body = row[4:]
    if int.from_bytes(row[:4], "big") != crc32(ref.raw_key, crc32(ref.raw_space, crc32(body))):
        return None
    try:
        return _unpack(body)
    except msgspec.MsgspecError as error:
        raise StoreError(
            f"a head that this version can read was wanted for {_shown(ref.key)} in {ref.space!r}; found one of a "
            f"newer version of this library ({error}). It was left as it is"
        ) from error


def refer(space: str, key: Any, raw_key: bytes | None = None) -> Reference:
    """The reference to *key* in *space*."""
    raw_space = space.encode()
    raw_key = encode_key(key) if raw_key is None else raw_key
    # The length first: "ab" + "c" is not "a" + "bc".
    digest = blake2b(len(raw_space).to_bytes(8, "big") + raw_space + raw_key, digest_size=20).digest()
    return Reference(space, key, raw_space, raw_key, digest)


@dataclass(slots=True)
class Entry:
    """What becomes of one entry."""

    ref: Reference
    expected: bytes | None
    """The head that was read; ``None``: there was none."""
    state: State | None
    """The new head; ``None``: the entry is deleted, or stays absent."""
    token: int | None = None
    clear: bool = False
    """Whether all items go first."""
    drops: set[int] = field(default_factory=set)
    puts: dict[int, bytes] = field(default_factory=dict)
    changed: bool = False
    sealed: bytes | None = None


@dataclass(slots=True)
class Plan:
    """What a save does, all of it or nothing."""

    entries: dict[bytes, Entry]
    floor: int
    """The floor that was read."""
    now: float
    results: list[Head | None] = field(default_factory=list)
    creates: bool = False
    """Whether the floor must still be what was read."""
    lift: int = 0
    """What the floor must at least be afterwards."""
    quarantine: list[tuple[bytes, bytes, int | None, str, float, bytes]] = field(default_factory=list)

    def seal(self) -> Self:
        """Make the rows of the heads, each with the number of this save."""
        nonce = secrets.randbits(63)
        for entry in self.entries.values():
            if entry.state is not None and entry.changed:
                entry.state = replace(entry.state, nonce=nonce)
                entry.sealed = entry.state.seal(entry.ref)
        return self

    def landed(self, rows: Mapping[bytes, bytes | None]) -> bool:
        """Whether it was applied, given the heads as they are now. All or nothing was: one that is there tells."""
        sealed = [(digest, entry.sealed) for digest, entry in self.entries.items() if entry.sealed is not None]
        if sealed:
            return any(rows.get(digest) == row for digest, row in sealed)
        return all(rows.get(digest) is None for digest in self.entries)


class ServerStore(_OpenStore):
    """
    Entries on a server; the part of a `Store` that does not depend on which.

    Safe for threads, and after ``fork`` on both sides.
    """

    address: str
    """The server, without a password."""
    _leaves_by_itself = False
    """Whether the server deletes what is over without telling; its version must be below the floor before."""
    _most_bytes: int

    def __init__(self, *, codec: str, timer: Callable[[], float]) -> None:
        self._codec = codec_named(codec)
        self._timer = timer
        self._unsure: dict[tuple[bytes, ...], tuple[list[Change], list[Plan]]] = {}
        self._unsure_lock = threading.Lock()
        self._watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()
        self.encode = self._codec.encode
        self.decode = functools.partial(decode, self._codec)
        _everywhere.add(self)

    @property
    def _place(self) -> str:
        return self.address

    # What each server does in its own words. All raise StoreUnavailable if it cannot be reached.

    @abstractmethod
    def _heads(self, refs: Sequence[Reference]) -> tuple[int, list[bytes | None]]:
        """The floor, and the head of each entry. The floor is not read before the heads."""

    @abstractmethod
    def _lengths(self, wanted: Sequence[tuple[Reference, Sequence[int]]]) -> list[list[int]]:
        """The length of each item, 0 if it is not there."""

    @abstractmethod
    def _whole(self, ref: Reference) -> tuple[bytes | None, list[tuple[int, bytes]]]:
        """The head of an entry and its items in order, as of one moment."""

    @abstractmethod
    def _commit(self, plan: Plan, *, sync: bool) -> None:
        """Apply *plan*; raises `MovedError`, `BrokenError`, `OwnershipLost`."""

    @abstractmethod
    def _sync(self) -> None:
        """Return when everything saved before is on disk."""

    @abstractmethod
    def _slices(self, space: str | None) -> Iterator[tuple[Reference, bytes | None]]:
        """Entries of one space, or of all; the head is ``None`` if the server has deleted it by itself."""

    @abstractmethod
    def _ended(self, now: float) -> list[Reference]:
        """A slice of entries of which the server says that they are over at *now*."""

    @abstractmethod
    def _forget(self, ref: Reference) -> bool:
        """Remove what is left of an entry that has no head: whether there was something, and still is no head."""

    @abstractmethod
    def _quarantined(self, after: int) -> list[tuple[int, bytes, bytes, int | None, str, float, bytes | None]]:
        """A slice of the quarantine, behind the row *after*; the number of each row first."""

    @abstractmethod
    def _lost(self, tokens: Sequence[tuple[Reference, int]]) -> list[Reference]:
        """Of which entries the lease is not that of the token any more."""

    @abstractmethod
    def _line(self) -> Callable[[Watcher], Line]:
        """What opens a connection that tells of changes. It must not hold the store."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Let go of all connections."""

    # Reading

    def load(self, space: str, key: Hashable) -> Record | None:
        """The entry, or ``None`` if it is not there; see `Store.load`."""
        self._check_open()
        ref = refer(space, key)
        for _ in range(_TRIES):
            row, rows = self._whole(ref)
            if row is None:
                return None
            state = unseal(ref, row)
            if state is not None and state.over(self._timer()):
                return None
            if state is not None and [n for n, _ in rows] == list(state.head(ref).sequences):
                values = self._codec.decode_rows(rows)
                if values is not None:
                    return Record(state.head(ref), values if state.is_log else values[0])
            self._mend(ref, [])
        raise self._busy(f"load {_shown(key)} of {space!r} from")

    def contains(self, space: str, key: Hashable) -> bool:
        """Whether the entry is there."""
        self._check_open()
        ref = refer(space, key)
        (row,) = self._heads([ref])[1]
        if row is None:
            return False
        state = unseal(ref, row)
        return state is None or not state.over(self._timer())

    def versions(self, space: str, keys: Iterable[Hashable]) -> list[int]:
        """
        The version of each of *keys*, in their order; 0 where there is no entry, or one that is damaged.

        One round trip for a thousand keys. Nothing of their content is read.
        """
        self._check_open()
        refs = [refer(space, key) for key in keys]
        now = self._timer()
        found: list[int] = []
        for start in range(0, len(refs), ASKED):
            part = refs[start : start + ASKED]
            for ref, row in zip(part, self._heads(part)[1], strict=True):
                state = None if row is None else unseal(ref, row)
                found.append(0 if state is None or state.over(now) else state.version)
        return found

    def keys(self, space: str) -> Iterator[Any]:
        """Keys of *space*; see `Store.keys`."""
        for ref, row in self._slices(space):
            if row is not None and ((state := unseal(ref, row)) is None or not state.over(self._timer())):
                yield ref.key

    def heads(self, space: str) -> Iterator[Head]:
        """Heads of *space*; see `Store.heads`. One that is damaged is left out: `recover` puts it in quarantine."""
        for ref, row in self._slices(space):
            if row is not None and (state := unseal(ref, row)) is not None and not state.over(self._timer()):
                yield state.head(ref)

    def count(self, space: str) -> int:
        """Number of entries in *space*."""
        return sum(1 for _ in self.keys(space))

    def nbytes(self, space: str) -> int:
        """Encoded size of everything in *space*, without keys."""
        return sum(head.bytes for head in self.heads(space))

    # Writing

    def save(
        self,
        changes: Sequence[Change],
        *,
        sync: bool = False,
        fence: Mapping[tuple[str, Any], int] | None = None,
    ) -> list[Head | None]:
        """
        Save all *changes*, in their order, or none of them; see `Store.save`.

        If the connection breaks in the middle, and the server cannot be asked any more, `StoreUnavailable` leaves open
        whether it was saved. The same call with the same changes finds out, and does not save twice.

        Args:
            changes: As in `Store.save`.
            sync: As in `Store.save`, as far as the server can; see the class.
            fence: Tokens of leases, as `lease` gave them, by ``(space, key)``. A change of an entry named here is saved
                only while that lease holds. Others are not looked at.

        Raises:
            OwnershipLost: a lease in *fence* is over, or somebody else has it. Nothing was saved.
        """
        self._check_open()
        refs = [self._prepare(change) for change in changes]
        if not refs:
            if sync:
                self._sync()
            return []
        unique = {ref.digest: ref for ref in refs}
        tokens = {refer(space, key).digest: token for (space, key), token in (fence or {}).items()}
        name = tuple(ref.digest for ref in refs)
        attempts = self._recall(name, changes)
        for _ in range(_TRIES):
            try:
                floor, found = self._heads(list(unique.values()))
            except StoreUnavailable as error:
                if attempts:
                    self._remember(name, changes, attempts)
                    error.uncertain = True
                    error.add_note("whether this was saved is not known; the same call again finds out")
                raise
            rows = dict(zip(unique, found, strict=True))
            for plan in attempts:
                if plan.landed(rows):
                    if sync:
                        self._sync()
                    return plan.results
            states = {digest: row and unseal(unique[digest], row) for digest, row in rows.items()}
            damaged = [digest for digest, state in states.items() if state is None and rows[digest] is not None]
            if damaged:
                for digest in damaged:
                    self._mend(unique[digest], [])
                continue
            try:
                plan = self._plan(changes, refs, floor, rows, states)
            except VersionConflict:
                # Whose lease is over is told that, and not that somebody else was faster: it is why.
                held = [(ref, tokens[digest]) for digest, ref in unique.items() if digest in tokens]
                if held and (lost := self._lost(held)):
                    raise self._ownership_lost(lost, "save") from None
                raise
            for digest, entry in plan.entries.items():
                entry.token = tokens.get(digest)
            try:
                self._commit(plan.seal(), sync=sync)
            except MovedError:
                continue
            except BrokenError:
                attempts.append(plan)
                continue
            return plan.results
        raise self._busy("save to")

    def _prepare(self, change: Change) -> Reference:
        _check_sizes(change, self._most_bytes)
        return refer(change.space, change.key)

    def _recall(self, name: tuple[bytes, ...], changes: Sequence[Change]) -> list[Plan]:
        """Attempts at the same save of which the end is not known."""
        if not self._unsure:
            return []
        with self._unsure_lock:
            before, plans = self._unsure.pop(name, ([], []))
        return plans if before == list(changes) else []

    def _remember(self, name: tuple[bytes, ...], changes: Sequence[Change], plans: list[Plan]) -> None:
        with self._unsure_lock:
            self._unsure[name] = (list(changes), plans)
            while len(self._unsure) > _REMEMBERED:
                del self._unsure[next(iter(self._unsure))]

    def _plan(
        self,
        changes: Sequence[Change],
        refs: Sequence[Reference],
        floor: int,
        rows: Mapping[bytes, bytes | None],
        states: Mapping[bytes, Any],
    ) -> Plan:
        """What becomes of each entry, or the conflicts."""
        now = self._timer()
        plan = Plan({}, floor, now)
        for ref in refs:
            state: State | None = states[ref.digest]
            if ref.digest not in plan.entries:
                entry = plan.entries[ref.digest] = Entry(ref, rows[ref.digest], state)
                if state is not None and state.over(now):
                    plan.lift = max(plan.lift, state.version)
                    entry.state, entry.clear, entry.changed = None, True, True
        lengths = self._old_lengths(changes, refs, plan)
        conflicts: list[tuple[str, Any, int, int]] = []
        for change, ref in zip(changes, refs, strict=True):
            entry = plan.entries[ref.digest]
            found = 0 if entry.state is None else entry.state.version
            if change.base is not None and change.base != found:
                conflicts.append((change.space, change.key, change.base, found))
                continue
            plan.results.append(self._change(plan, entry, change, lengths.get(ref.digest, {})))
        if conflicts:
            raise _conflict(conflicts, changes)
        if self._leaves_by_itself:
            ending = (
                s.version for e in plan.entries.values() if (s := e.state) is not None and s.expire_at is not None
            )
            plan.lift = max(plan.lift, *ending, 0)
        return plan

    def _old_lengths(
        self, changes: Sequence[Change], refs: Sequence[Reference], plan: Plan
    ) -> dict[bytes, dict[int, int]]:
        """How long the items are that will go, asked for all at once."""
        wanted: dict[bytes, dict[int, None]] = {}
        for change, ref in zip(changes, refs, strict=True):
            state = plan.entries[ref.digest].state
            if isinstance(change, SaveLog) and state is not None and not change.replace:
                ranges = itertools.chain(change.drop, ((n, n + 1) for n in change.put))
                wanted.setdefault(ref.digest, {}).update(dict.fromkeys(state.shared(ranges)))
        asked = [(plan.entries[digest].ref, list(sequences)) for digest, sequences in wanted.items() if sequences]
        if not asked:
            return {}
        return {
            ref.digest: dict(zip(sequences, lengths, strict=True))
            for (ref, sequences), lengths in zip(asked, self._lengths(asked), strict=True)
        }

    def _change(self, plan: Plan, entry: Entry, change: Change, lengths: Mapping[int, int]) -> Head | None:
        """Write *change* down in *entry*, upon what earlier changes of the batch have made of it."""
        state = entry.state
        if isinstance(change, Delete):
            if state is not None:
                plan.lift = max(plan.lift, state.version)
                entry.changed = True
            self._empty(entry)
            entry.state = None
            return None
        is_log = isinstance(change, SaveLog)
        if isinstance(change, SaveLog) and state is not None and not state.is_log:
            _check_replaces(change)
        if state is None:
            plan.creates = True
            # A row that is there without its head, or behind one that is over, is none of the new entry's.
            entry.clear = True
            state = State(0, max(plan.floor, plan.lift), is_log, 0, 0, 0.0, None, ())
        if isinstance(change, SaveValue):
            self._empty(entry)
            entry.puts[0] = change.data
            spans: tuple[tuple[int, int], ...] = ((0, 1),)
            following, size = 1, len(change.data)
        else:
            spans, following, size = self._write_log(entry, change, state, lengths)
        entry.state = State(0, state.version + 1, is_log, following, size, plan.now, change.expire_at, spans)
        entry.changed = True
        return entry.state.head(entry.ref)

    @staticmethod
    def _empty(entry: Entry) -> None:
        entry.clear = True
        entry.drops.clear()
        entry.puts.clear()

    def _write_log(
        self, entry: Entry, change: SaveLog, state: State, lengths: Mapping[int, int]
    ) -> tuple[tuple[tuple[int, int], ...], int, int]:
        spans, following, size = state.spans, state.next, state.size

        def length(sequence: int) -> int:
            if sequence in entry.puts:
                return len(entry.puts[sequence])
            return 0 if entry.clear or sequence in entry.drops else lengths.get(sequence, 0)

        if change.replace:
            self._empty(entry)
            spans, following, size = (), 0, 0
        for low, high in change.drop:
            for sequence in list(replace(state, spans=spans).shared([(low, high)])):
                size -= length(sequence)
                entry.puts.pop(sequence, None)
                entry.drops.add(sequence)
            spans = _without(spans, low, high) if low < high else spans
        for sequence, data in change.put.items():
            _check_place(change, sequence, following)
            size += len(data) - length(sequence)
            entry.puts[sequence] = data
            entry.drops.discard(sequence)
            spans = _with(spans, sequence, sequence + 1)
        if change.append:
            entry.puts.update(enumerate(change.append, following))
            stop = following + len(change.append)
            size += sum(map(len, change.append))
            spans = _with(spans, following, stop)
            following = stop
        return spans, following, size

    def expire(self, now: float | None = None) -> int:
        """Delete what is over, in slices, and return how many entries that were; see `Store.expire`."""
        self._check_open()
        now = self._timer() if now is None else now
        total = 0
        while refs := self._ended(now):
            for ref in refs:
                total += self._end(ref, now)
        return total

    def _end(self, ref: Reference, now: float) -> bool:
        """Delete the entry if it is over: whether it was."""
        for _ in range(_TRIES):
            floor, (row,) = self._heads([ref])
            if row is None:
                return self._forget(ref)
            state = unseal(ref, row)
            if state is None or not state.over(now):
                self._mend(ref, [], rewrite=True)  # only the server's own note says that it is over
                return False
            plan = Plan({ref.digest: Entry(ref, row, None, clear=True, changed=True)}, floor, now, lift=state.version)
            try:
                self._commit(plan, sync=False)
            except (MovedError, BrokenError):
                continue
            return True
        raise self._busy("expire in")

    # Leases

    @abstractmethod
    def lease(self, space: str, key: Hashable, *, ttl: Duration = 30.0, owner: str | None = None) -> int | None:
        """
        Take the lease of an entry, which need not exist, if nobody has it.

        A lease does not keep others from loading or saving; it says who is meant to. What protects the entry is its
        version, and the token in ``save(fence=...)``: when the lease is over, because it was not renewed in time, such
        a save is refused even if its process does not know yet (it was stopped, or the network was).

        Args:
            space: Of the entry.
            key: Of the entry.
            ttl: Seconds (or ``"30s"``) that it holds if it is not renewed, by the server's clock. 30, as it is
                usual: longer than a pause of the garbage collector or of a virtual machine, shorter than patience.
            owner: Kept beside it for whoever looks at the server; by default the host and the process.

        Returns:
            The fencing token, greater than all before it for this entry; ``None`` if somebody has the lease.
        """

    @abstractmethod
    def renew(self, space: str, key: Hashable, token: int, *, ttl: Duration = 30.0) -> None:
        """
        Let the lease with *token* hold for *ttl* from now.

        Raises:
            OwnershipLost: it is over.
        """

    @abstractmethod
    def release(self, space: str, key: Hashable, token: int) -> bool:
        """Give the lease with *token* back: whether it still held."""

    @staticmethod
    def _terms(ttl: Duration, owner: str | None) -> tuple[float, str]:
        return seconds(ttl, "ttl"), f"{socket.gethostname()}:{os.getpid()}" if owner is None else owner

    def _ownership_lost(self, refs: Iterable[Reference], what: str) -> OwnershipLost:
        names = ", ".join(f"{_shown(ref.key)} in {ref.space!r}" for ref in refs)
        return OwnershipLost(
            f"the lease of {names} was wanted to {what}; found that it is over, or that somebody else has it. Nothing "
            f"was changed. Take the lease again and load what is there now"
        )

    # Hints

    def watch(
        self, space: str, changed: Callable[[Sequence[Any] | None], object], *, interval: Duration = 5.0
    ) -> Watch:
        """
        Have *changed* called when entries of *space* may have changed elsewhere; `Watch.add` says which ones matter.

        It is a hint: it comes late, or without need, also after one's own saves, and several changes come as one.
        Compare `versions`, or load again. What protects an entry is its version when it is saved, and not this.

        Redis tells of changes by itself (client tracking), and they arrive within a tenth of a second. PostgreSQL, and
        a Redis that refuses that, are asked for the heads of the added keys at each *interval*.

        Args:
            space: Of the entries.
            changed: Called with a list of keys, of those added; or with ``None`` if any of them may have changed,
                because the connection was away. It is called in the thread of the watch, one call at a time, and may
                block. What it raises is logged. The thread holds it as long as the watch lives: it must not hold the
                watch, nor what holds the watch, but weakly.
            interval: Seconds, or text such as ``"5s"``, between two questions; from a Redis that tells by itself, how
                long silence is trusted. 5 s: as long as a caller waits for a server.

        Returns:
            The `Watch`. Each has a thread and a connection of its own, which is opened in that thread: this call does
            not block, and a server that is away now is waited for.

        Raises:
            TypeError: *changed* cannot be called.
            ValueError: *interval* is not understood.
        """
        self._check_open()
        if not callable(changed):
            raise TypeError(f"changed must be callable; found {changed!r}")
        name = f"store {self.address}: watch of {space!r}"
        watch = Watch(name, lambda key: refer(space, key).digest, self._line(), changed, seconds(interval, "interval"))
        self._watches[id(watch)] = watch
        return watch

    # Recovery

    def recover(self) -> RecoveryReport:
        """Look at every row, put what does not fit in quarantine, and report it; see `Store.recover`."""
        self._check_open()
        entries = items = 0
        bad: list[BadRow] = []
        for ref, head in self._slices(None):
            if head is None:
                continue
            row, rows = self._whole(ref)
            if row is None:
                continue
            entries += 1
            items += len(rows)
            state = unseal(ref, row)
            if (
                state is None
                or [n for n, _ in rows] != list(state.head(ref).sequences)
                or not all(fits(data) for _, data in rows)
            ):
                self._mend(ref, bad)
        return RecoveryReport(entries, items, tuple(bad))

    def _mend(self, ref: Reference, bad: list[BadRow], *, rewrite: bool = False) -> None:
        """Make the head of an entry and its items agree: what does not fit goes into quarantine."""
        for _ in range(_TRIES):
            row, rows = self._whole(ref)
            if row is None:
                return
            floor = self._heads([ref])[0]
            now = self._timer()
            state = unseal(ref, row)
            plan = Plan({}, floor, now)
            entry = plan.entries[ref.digest] = Entry(ref, row, None, changed=True)
            found: list[tuple[int | None, str, bytes | None]] = []
            if state is None:
                problem = "the head of the entry is damaged"
                found = [(None, problem, row), *((n, problem, data) for n, data in rows)]
                entry.clear = True
                # Its version is not known, and its successor must not be taken for it: further than anybody counts.
                plan.lift = int(time.time() * 1000)
            else:
                entry.state = self._mended(entry, state, rows, found)
                if entry.state is None:
                    plan.lift = state.version  # a value without its content is no entry
                if not found and not rewrite:
                    return
            plan.quarantine = [
                (ref.raw_space, ref.raw_key, n, problem, now, data) for n, problem, data in found if data is not None
            ]
            try:
                self._commit(plan.seal(), sync=False)
            except (MovedError, BrokenError):
                continue
            for sequence, problem, data in found:
                bad.append(BadRow(ref.space, ref.key, sequence, problem, data is not None))
                logger.warning(
                    "store %s: %s: space %r, key %s, item %s",
                    self.address, problem, ref.space, _shown(ref.key), sequence,
                    extra={"event_name": "store.quarantined", "store": self.address, "of": self},
                )  # fmt: skip
            return
        raise self._busy("repair")

    @staticmethod
    def _mended(
        entry: Entry, state: State, rows: Iterable[tuple[int, bytes]], found: list[tuple[int | None, str, bytes | None]]
    ) -> State | None:
        """The head without the items that do not fit, which are added to *found*; ``None`` if nothing is left."""
        expected = set(state.head(entry.ref).sequences)
        spans, size = state.spans, 0
        for sequence, data in rows:
            known = sequence in expected
            expected.discard(sequence)
            if known and fits(data):
                size += len(data)
                continue
            found.append((sequence, "the checksum is wrong" if known else "the head does not know of this item", data))
            entry.drops.add(sequence)
            spans = _without(spans, sequence, sequence + 1)
        for sequence in sorted(expected):
            found.append((sequence, "the item is missing", None))
            spans = _without(spans, sequence, sequence + 1)
        if not state.is_log and not spans:
            return None
        # A new version: who still has the whole in memory must not take this for what he saved.
        return replace(state, version=state.version + bool(found), spans=spans, size=size)

    def quarantine(self) -> Iterator[Quarantined]:
        """What recovery has taken out of service, oldest first, in slices as in `keys`."""
        self._check_open()
        last = 0
        while rows := self._quarantined(last):
            for number, space, key, sequence, problem, found_at, data in rows:
                last = number
                yield Quarantined(_as_text(space), _as_key(key), sequence, problem, found_at, data)

    # Errors

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"store {self.address} is closed. Open it again, or close it later")

    def _busy(self, what: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"cannot {what} store {self.address}: others changed the same entries {_TRIES} times in a row. Try again"
        )

    # The end

    def close(self) -> None:
        """End all watches and let go of the connections; those in use when they come back. Again does nothing."""
        if not self._closed:
            self._closed = True
            for reference in self._watches.valuerefs():
                if (watch := reference()) is not None:
                    watch.close()
            self._disconnect()


_everywhere: weakref.WeakSet[ServerStore] = weakref.WeakSet()  # for reports


def reference_of(raw_space: bytes, raw_key: bytes) -> Reference:
    """The reference to an entry that a server has named."""
    return refer(raw_space.decode(), decode_key(raw_key), raw_key)
