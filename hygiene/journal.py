"""What changes in a list, told to the log that keeps it: one row an item, and the whole only where nothing else helps.

Theory of operation
===================

**Numbers.** In a store each item of a log has a sequence number, which it keeps when others leave. A journal knows the
number of each item of its list, as spans: a conversation that only grows, or is trimmed at the front, is one span
however long it is.

**Places.** What is put at the end is appended, what leaves is dropped, what takes the place of something is edited in.
What is put in the middle gets a number that was dropped there, if there are enough of them (a summary takes that of an
item that it sums up); otherwise everything from there to the end moves on by edits, and if that is the whole list, it
is told anew. Items are compared by identity: ``==`` may be anybody's code, and slow.

**All or nothing.** Each change of the list is one step of the writer, taken before the list is changed and under the
list's own lock. The writer refuses it as a whole, then neither has changed; or takes it as a whole. So there is no
moment at which list and log would have to be made to agree again, and their order is the same whoever appends.

**Edits inside items.** An item that was lent (returned by a read, or appended by a caller who may still hold it) can be
changed in place at any time, and no method is called. So the journal has for each item a byte that is 1 while the item
may be in use elsewhere, and the hash of its last known encoding, made when it came in or was first lent. `find_edits`
encodes the lent items again, and tells those whose hash differs. An item that only the list refers to by then, by its
reference count and those of the containers in it, is not lent any more. Items that cannot be changed (texts, numbers)
are never lent. An iterator lends the whole list until it ends. If a user's class reads in ways of its own, each check
takes all items for lent.

**Past the methods.** C code (``heapq``) and ``list.append(history, item)`` write to a list without a word. It shows in
the length, and the whole is told anew with the next change. An item that is read out of the storage past the methods
(``list.__getitem__(history, 3)``) is not known to be lent: that is what `Journal.rewrite` is for. The same way a
journal finds that its numbers are not those of the writer any more, as in a forked child, whose writer has nothing of
what its parent is about to save.

**Locks.** The list's, then the writer's; never the other way round. The writer never calls a list.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import datetime
from itertools import chain, compress, starmap
from operator import is_
from typing import Any, Final

from hygiene.errors import HygieneError, NotStorable, StoreError
from hygiene.writebehind import WriteBehind

__all__ = ["Journal", "Prepared"]

_Spans = list[tuple[int, int]]

_CONSTANT: Final = frozenset({str, int, float, bool, bytes, type(None), datetime})  # cannot be changed in place
_FRESH: Final = 64  # encodings of appended items that are kept until they are hashed together, which costs less
_TRIES: Final = 3  # checks of items while others move them, before they are held up
_ALL: Final = slice(None)
# References to an item in a loop over a copy of the list, if only the list holds it; since 3.14 an argument is lent.
_SOLE: Final = 4 if sys.version_info < (3, 14) else 3


def _at(history: Any, where: slice) -> list[Any]:
    # Not ``history[where]``, which a subclass may have changed; and in its storage a compact one has something else.
    items: list[Any] = history._items(where)
    return items


class Prepared:
    """Items on their way into a list, encoded."""

    __slots__ = ("critical", "datas", "items")

    def __init__(self, items: Sequence[Any], datas: list[bytes], *, critical: bool) -> None:
        self.items = items
        self.datas = datas
        self.critical = critical


_NOTHING = Prepared((), [], critical=False)


class Journal:
    """
    Tells a `WriteBehind` what changes in one list, which a `History` does with every change of its own.

    The methods that take a *history* and return something to wait for are called under its lock, before it is changed.
    They raise what the writer raises, and then nothing was told. The others may be called from any thread.

    Args:
        writer: Where to save. The key has to be tracked there, for as long as this lives (`WriteBehind.track`).
        key: Of the log.
        numbers: The sequence numbers of the items of the list, as ``(first, one behind the last)``, ascending:
            `Head.spans`. If they are not as many as the list has items, the whole list is told with the next change, or
            by `check`.
        encoded: The items, with their encodings, if somebody may still hold them.
        expire_at: When the entry is over, in seconds since 1970, asked with each change; ``None``: never. If it raises,
            nothing is changed.
        dead: If it returns true, the entry is nobody's any more, and this goes silent for ever (as after `close`).
            Called under the locks of list and writer: it must not wait for anything.
    """

    __slots__ = (
        "_closed",
        "_count",
        "_dead",
        "_expire_at",
        "_fresh",
        "_hashes",
        "_lent",
        "_lent_now",
        "_next",
        "_refusal",
        "_spans",
        "_writer",
        "encode",
        "key",
        "moves",
    )

    def __init__(
        self,
        writer: WriteBehind,
        key: Hashable,
        *,
        numbers: Iterable[tuple[int, int]] = (),
        encoded: tuple[Sequence[Any], Sequence[bytes]] | None = None,
        expire_at: Callable[[], float | None] = lambda: None,
        dead: Callable[[], object] | None = None,
    ) -> None:
        self.key = key
        self._writer = writer
        self._spans: _Spans = [(start, stop) for start, stop in numbers if start < stop]
        self._count = sum(stop - start for start, stop in self._spans)
        self._expire_at = expire_at
        self._dead = dead
        self._closed = False
        self._refusal: Callable[[], Exception] | None = None  # makes the error that each change of the list raises
        # What an item that is alone is encoded with, by who asks for no more than that: nobody is to be asked about it.
        self.encode: Callable[[Any, Any], bytes] | None = writer._encode if writer._critical is None else None
        # Of each item, under the lock of the list: the hash of its encoding, 0 if not known, and whether it is lent.
        # What is appended is in `_fresh` first: its encoding, empty if it cannot be changed.
        self._hashes = array("q", bytes(8 * self._count))
        self._lent = bytearray(self._count)
        self._fresh: list[bytes] = []
        self._lent_now = False  # something was lent since the last check began
        self.moves = 0  # counts changes other than at the end
        if encoded is not None and len(encoded[1]) == self._count:
            self._remember(0, self._count, *encoded)
        following = writer._following(key)
        # The number that the next item gets. None: not known, so the first change tells everything.
        self._next = following if following is not None and following >= self._end else None

    @property
    def numbers(self) -> tuple[tuple[int, int], ...]:
        """The sequence numbers of the items, as `Head.spans` will have them once everything is saved."""
        return tuple(self._spans)

    @property
    def closed(self) -> bool:
        """Whether it tells nothing any more."""
        return self._closed

    def close(self) -> None:
        """Tell nothing from now on: the list is the caller's. When this returns, no change is being told any more."""
        with self._writer._lock:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._next = self.encode = None  # so that the paths that must be fast have that much less to look at

    def refuse(self, refusal: Callable[[], Exception]) -> None:
        """
        Raise what *refusal* returns at each change of the list from now on, also after `close`.

        When this returns, no change is being told any more. `check` and `rewrite` still tell what was changed before.
        """
        with self._writer._lock:
            self._refusal, self.encode = refusal, None
            self._dead = _always  # so that `added` has nothing more to check than it has

    def only_read(self, history: Sequence[Any], refusal: Callable[[], Exception]) -> None:
        """The log is never changed: `refuse` each change of the list, whatever the list has of the log."""
        self._count = len(history)
        self._spans = [(0, self._count)] if self._count else []
        self._next = _ELSEWHERE
        self._hashes = array("q", bytes(8 * self._count))
        self._lent = bytearray(self._count)
        self.refuse(refusal)

    def __repr__(self) -> str:
        return f"<Journal of {self.key!r}: {'closed' if self._closed else f'{self._count:,} items'}>"

    # What a history tells.

    def prepare(self, items: Sequence[Any]) -> Prepared:
        """
        Encode *items* that are to come in, with no lock held.

        Raises:
            NotStorable: the store could not give one of them back as it is.
            StoreError: the list must not be changed any more.
        """
        if self._refusal is not None:
            raise self._refusal()
        return self._prepared(items)

    def _prepared(self, items: Sequence[Any]) -> Prepared:
        if not self._alive():  # what the store would not take is none of its business any more
            return _NOTHING
        encode, critical, key = self._writer._encode, self._writer._critical, self.key
        try:
            datas = [encode(item, key) for item in items]
        except NotStorable as error:
            raise self._writer._explained(error) from None
        urgent = critical is not None and any(critical(key, item) for item in items)
        return Prepared(items, datas, critical=urgent)

    def added(self, history: list[Any], data: bytes, item: Any) -> bool:
        """
        Tell that one *item*, encoded with `encode`, is put at the end, if that is as simple as it mostly is.

        Otherwise nothing is told, and the item takes the other way: `prepare` and `grown`.
        """
        writer = self._writer
        with writer._lock:  # as in `WriteBehind.append`: this is what each message costs
            entry, following = writer._pending.get(self.key), self._next
            if (
                entry is None
                or following is None
                or entry.next != following
                or entry.kind != "log"
                or not entry.parts
                or len(history) != self._count
                or writer._held >= writer._max_pending
                or writer._refusing
                or writer._rejected
                or (self._dead is not None and self._dead())
            ):
                return False
            expire_at = self._expire_at()  # first: it may refuse
            entry.parts[-1].items.append(data)
            entry.next = self._next = following + 1
            entry.count += 1
            entry.expire_at = expire_at
            entry.changes += 1
            self._count += 1
            fresh = self._fresh
            fresh.append(b"" if type(item) in _CONSTANT else data)
            if len(fresh) > _FRESH:
                self._hash_fresh()
            spans = self._spans
            if spans and spans[-1][1] == following:
                spans[-1] = (spans[-1][0], following + 1)
            else:
                spans.append((following, following + 1))
            writer._held += 1
            writer._serial += 1
            writer._since += 1
            if writer._since >= writer._every:
                writer._due()
        return True

    def grown(self, history: list[Any], prepared: Prepared) -> Any:
        """Tell that the *prepared* items are put at the end."""
        writer = self._writer
        with writer._lock:
            self._check_changeable()
            following = self._next
            if not prepared.datas or following is None or len(history) != self._count:
                return self._told(history, len(history), len(history), prepared)
            done, waiter = writer._revise(
                self.key,
                following,
                self._expire_at(),
                append=prepared.datas,
                critical=prepared.critical,
                still=self._alive,
            )
            if done is None:
                return self._told(history, len(history), len(history), prepared)
            count = len(prepared.datas)
            self._next = following + count
            self._remember(self._count, self._count, prepared.items, prepared.datas)
            self._count += count
            spans = self._spans
            if spans and spans[-1][1] == following:
                spans[-1] = (spans[-1][0], self._next)
            else:
                spans.append((following, self._next))
            return waiter

    def spliced(self, history: list[Any], start: int, stop: int, prepared: Prepared) -> Any:
        """Tell that the *prepared* items take the place of those from index *start* to before *stop*."""
        return self._told(history, start, stop, prepared)

    def becomes(self, history: list[Any], after: list[Any], prepared: Prepared) -> Any:
        """Tell that the whole list becomes *after*, of which some items may be *prepared*."""
        waiter = self._told(history, 0, len(history), prepared, after)
        # A reader in another thread that takes no lock (`is_lent`) may see the list before this change.
        self._lent[:] = b"\1" * len(self._lent)
        return waiter

    def trimmed(self, history: list[Any], cut: slice) -> None:
        """Tell that the window moves on: *cut* leaves. It does not wait for room."""
        start, stop = cut.start, cut.stop
        with self._writer._lock:
            self._check_changeable()
            following, spans = self._next, self._spans
            if following is not None and len(history) == self._count > stop - start:
                leave = self._cut(start, stop)
                done, _ = self._writer._revise(
                    self.key, following, self._expire_at(), drop=leave, patient=False, still=self._alive
                )
                if done is not None:
                    if start == 0 and leave[0][1] < spans[0][1]:
                        spans[0] = (leave[0][1], spans[0][1])
                    else:
                        self._spans = [*self._cut(0, start), *self._cut(stop, self._count)]
                    self._forget(start, stop)
                    self._count -= stop - start
                    return
            self._told(history, start, stop, _NOTHING, patient=False)

    def settle(self, waiter: Any) -> None:
        """
        Wait for what a change has returned: a critical item, that has to be on disk. With no lock held.

        Raises:
            StoreUnavailable: it could not be saved. The change was made, and stays pending.
        """
        if waiter is not None:
            self._writer._wait(waiter)

    def doubt(self) -> None:
        """A change may have been told and not made, or half: the next change, or `check`, tells the whole anew."""
        if not self._closed:
            self._next = None

    # What a keeper asks for.

    def begin_anew(self, history: Sequence[Any]) -> None:
        """In a forked child: what the parent has not saved is not known here, so the next change tells the whole."""
        if not self._closed:  # no lock: there is one thread, and whoever held it was left behind
            self._count = len(history)
            self._spans = [(0, self._count)] if self._count else []
            self._next = _ELSEWHERE
            self._start_over()

    def edited_elsewhere(self, history: Any) -> None:
        """In a forked child: what was changed in place before the fork is the parent's to save."""
        if self._closed or len(history) != self._count:
            return
        self._hash_fresh()
        items = _at(history, _ALL)
        for place in compress(range(len(items)), self._lent):
            self._hashes[place] = self._hash_of(items[place])

    def check(self, history: Any) -> bool:
        """
        Whether log and list are equally long; if not, somebody wrote past the methods, and the whole is told anew.

        Raises:
            NotStorable, StoreUnavailable, VersionConflict, StoreError: it could not be told. Nothing was changed.
        """
        # First without locks, as it is asked for each entry that comes or leaves: a change that is just under way is
        # told by whoever makes it.
        if len(history) == self._count and self._next is not None:
            return True
        with history._whole():
            if not self._alive() or (len(history) == self._count and self._next is not None):
                return True
            self._anew(_at(history, slice(None)), _NOTHING)
        return False

    def is_lent(self, place: int, size: int, moves: int) -> bool:
        """
        Whether the item at *place* is known to be lent; without a lock.

        Args:
            place: Its index.
            size: How many items there were before it was read,
            moves: and what `moves` was.
        """
        self._lent_now = True  # before the look: `find_edits` clears before it looks at this
        lent = self._lent
        known = place >= len(lent) or lent[place]
        return bool(known) and moves == self.moves and size == self._count

    def lend(self, history: Any, index: Any, found: Any) -> None:
        """Note that *found*, the item or items at *index*, is handed out and may be changed from now on."""
        with history._whole():
            if self._closed or len(history) != self._count:
                return
            self._lent_now = True
            if self._fresh:
                self._hash_fresh()
            lent, size = self._lent, self._count
            if type(index) is not slice:
                place = index.__index__()
                place += size if place < 0 else 0
                if not (0 <= place < size and list.__getitem__(history, place) is found):
                    place = next((n for n, one in enumerate(list.__iter__(history)) if one is found), -1)  # it moved
                    if place < 0:
                        return
                if not lent[place] and type(found) not in _CONSTANT:
                    self._lend(place, found)
                return
            items = list.__getitem__(history, index)
            places = range(*index.indices(size))
            if len(items) != len(found) or not all(map(is_, items, found)):  # they have moved since they were read
                items, places = list.__getitem__(history, _ALL), range(size)
            sealed = history._sealed
            for place, item in zip(places, items, strict=True):
                if not lent[place] and type(item) not in _CONSTANT and type(item) is not sealed:
                    self._lend(place, item)

    def _lend(self, place: int, item: Any) -> None:
        if not self._hashes[place]:
            self._hashes[place] = self._hash_of(item)
        self._lent[place] = 1

    def find_edits(self, history: Any) -> None:
        """
        Tell which of the lent items were changed in place since they were told, and which are not lent any more.

        Returns when it is saved if one of the items is critical.

        Raises:
            NotStorable: an item became one that the store could not give back as it is; the others are told.
            StoreUnavailable, VersionConflict, StoreError: as `check`; the next call finds the same edits.
        """
        blind = not getattr(history, "_lends", True)
        if self._closed or not (blind or self._fresh or 1 in self._lent):
            return
        for _ in range(_TRIES):
            if self._looked(history, blind=blind):
                return
        with history._whole():  # no other thread moves the items this time
            self._looked(history, blind=blind)

    def _looked(self, history: Any, *, blind: bool) -> bool:
        """One try to `find_edits`; false: the items moved meanwhile."""
        with history._whole():
            if not self._alive() or len(history) != self._count or self._next is None:
                return True  # `check` tells the whole
            self._hash_fresh()
            moves, self._lent_now = self.moves, False
            lent = bytearray(b"\1") * self._count if blind else self._lent[:]
            first = lent.find(1)
            if first < 0:
                return True
            hashes = self._hashes[:]
            items = _at(history, slice(first, None))
        edits: dict[int, tuple[Any, bytes]] = {}
        failed: HygieneError | None = None
        encode, key = self._writer._encode, self.key
        for place in list(compress(range(first, len(lent)), lent[first:])):
            item = items[place - first]
            kind = type(item)
            if kind in _CONSTANT:
                continue
            # Looked at before it is encoded: an item that no other code holds by then cannot be changed after it.
            free = _refs(item) <= _SOLE
            if free:
                try:
                    # Mostly it is a dict of texts, and needs no call.
                    free = (kind is dict and _CONSTANT.issuperset(map(type, item.values()))) or not _is_held(item)
                except RuntimeError:  # it changes at this moment
                    free = False
            try:
                data = encode(item, key)
            except NotStorable as error:
                failed = failed or _unstorable(place, key, self._writer._explained(error))
                continue
            if free:
                lent[place] = 0
            if hash(data) != hashes[place]:
                edits[place] = item, data
        del items
        waiter = None
        with history._whole() as window:
            if self.moves != moves:
                return False
            if not self._alive():
                return True
            if edits:
                waiter = self._tell_edits(history, edits)
            if self.moves == moves and not window.walkers and not blind:
                before = self._lent[: len(lent)]
                self._lent[: len(lent)] = lent
                if self._lent_now:  # a reader that takes no lock may have seen that it was lent
                    self._lent[: len(lent)] = before
        self.settle(waiter)
        if failed is not None:
            raise failed
        return True

    def _tell_edits(self, history: Any, edits: dict[int, tuple[Any, bytes]]) -> Any:
        """Tell the items at some indexes anew, under the lock."""
        numbers = list(chain.from_iterable(starmap(range, self._spans)))
        critical = self._writer._critical
        done, waiter = self._writer._revise(
            self.key,
            self._next,
            self._expire_at(),
            put={numbers[place]: data for place, (_, data) in edits.items()},
            critical=critical is not None and any(critical(self.key, item) for item, _ in edits.values()),
            still=self._alive,
        )
        if done is None:
            return self._anew(_at(history, _ALL), _NOTHING)
        for place, (_, data) in edits.items():
            self._hashes[place] = hash(data)
        return waiter

    def _hash_of(self, item: Any) -> int:
        try:
            return hash(self._writer._encode(item, self.key))
        except NotStorable:  # put in past the methods; said at the next check
            return 0

    def _hash_fresh(self) -> None:
        """Put the items that were appended in order with the others."""
        fresh, self._fresh = self._fresh, []
        # By way of bytes: `array.extend` takes three times as long.
        self._hashes.frombytes(struct.pack(f"{len(fresh)}q", *map(hash, fresh)))
        self._lent += b"\1" * len(fresh) if all(fresh) else bytes(map(bool, fresh))

    def _remember(self, start: int, stop: int, items: Sequence[Any], datas: Sequence[bytes]) -> None:
        """The *items*, encoded, come in the place of those from index *start* to before *stop*; a caller holds them."""
        self._hash_fresh()
        self.moves += stop < self._count
        self._hashes[start:stop] = array("q", map(hash, datas))
        self._lent[start:stop] = bytes(type(item) not in _CONSTANT for item in items)

    def _forget(self, start: int, stop: int) -> None:
        self._hash_fresh()
        self.moves += 1
        del self._hashes[start:stop]
        del self._lent[start:stop]

    def _start_over(self) -> None:
        """Nothing is known of the items, as many as there are."""
        self._fresh = []
        self.moves += 1
        self._hashes = array("q", bytes(8 * self._count))
        self._lent = bytearray(b"\1") * self._count

    def rewrite(self, history: Any) -> None:
        """
        Tell the whole anew: for items that were edited in place, which nobody sees.

        Returns when it is saved if one of the items is critical.

        Raises:
            NotStorable, StoreUnavailable, VersionConflict, StoreError: as `check`; StoreUnavailable also as `settle`.
        """
        prepared = self._prepared(_at(history, slice(None)))
        with history._whole():
            waiter = self._anew(_at(history, slice(None)), prepared)
        self.settle(waiter)

    # How it is done.

    @property
    def _end(self) -> int:
        return self._spans[-1][1] if self._spans else 0

    def _alive(self) -> bool:
        if not self._closed and self._refusal is None and self._dead is not None and self._dead():
            self._close()
        return not self._closed

    def _check_changeable(self) -> None:
        """Raise if the list must not be changed any more. The writer's lock is held."""
        if self._refusal is not None:
            raise self._refusal()

    def _told(
        self,
        history: list[Any],
        start: int,
        stop: int,
        prepared: Prepared,
        new: Sequence[Any] | None = None,
        *,
        patient: bool = True,
    ) -> Any:
        """Tell that *new*, or the prepared items, come in the place of those from index *start* to before *stop*."""
        if new is None:
            new = prepared.items
        with self._writer._lock:
            self._check_changeable()
            if not self._alive():
                return None
            size = len(history)
            if size == self._count and self._next is not None:
                done, waiter = self._changed(history, start, stop, new, prepared, patient=patient)
                if done:
                    return waiter
            after = [*_at(history, slice(start)), *new, *_at(history, slice(stop, None))]
            return self._anew(after, prepared)

    def _changed(
        self, history: list[Any], start: int, stop: int, new: Sequence[Any], prepared: Prepared, *, patient: bool
    ) -> tuple[bool, Any]:
        """As `_told`, item by item; says whether that was possible."""
        old = _at(history, slice(start, stop))
        # An item put in its own place was edited, or why should one do that; in a slice the others are just there.
        if not len(old) == len(new) == 1:
            before, behind = _common(old, new)
            start, stop = start + before, stop - behind
            old, new = old[before : len(old) - behind], new[before : len(new) - behind]
        if not old and not new:
            return True, None
        if len(old) == self._count and not new:
            return False, None  # emptied: what is pending need not be saved before it leaves, either
        numbers = list(chain.from_iterable(starmap(range, self._cut(start, stop))))
        edited: list[tuple[int, Any]] = []
        added: list[Any] = []
        kept = _chosen(old, new)
        if kept is not None:
            left = [numbers[index] for index in kept]
        elif len(new) <= len(old):
            left = numbers[: len(new)]
            edited = [pair for index, pair in enumerate(zip(left, new, strict=True)) if _differs(old, index, new)]
        else:
            if stop < self._count:
                low = self._cut(start - 1, start)[0][1] if start else 0
                high = self._cut(stop, stop + 1)[0][0]
                if high - low >= len(new):
                    # At the front close to what follows, so that there is room before it next time, too.
                    low = low if start else high - len(new)
                    left = list(range(low, low + len(new)))
                    edited = list(zip(left, new, strict=True))
                    waiter = self._revise(start, stop, left, edited, [], prepared)
                    return waiter is not _MISFIT, waiter
                if not start:
                    return False, None
                behind_it = _at(history, slice(stop, None))
                old, new = [*old, *behind_it], [*new, *behind_it]
                numbers += chain.from_iterable(starmap(range, self._cut(stop, self._count)))
                stop = self._count
            left = numbers
            edited = [(number, new[index]) for index, number in enumerate(numbers) if _differs(old, index, new)]
            added = list(new[len(numbers) :])
        waiter = self._revise(start, stop, left, edited, added, prepared, patient=patient)
        return waiter is not _MISFIT, waiter

    def _revise(
        self,
        start: int,
        stop: int,
        left: list[int],
        edited: list[tuple[int, Any]],
        added: list[Any],
        prepared: Prepared,
        *,
        patient: bool = True,
    ) -> Any:
        """Have the items at *start* to before *stop* replaced by those with the numbers *left* and those *added*."""
        following = self._next
        assert following is not None
        encoded = self._encoded([item for _, item in edited] + added, prepared)
        stay = set(left)
        leave = _spans(
            number for number in chain.from_iterable(starmap(range, self._cut(start, stop))) if number not in stay
        )
        done, waiter = self._writer._revise(
            self.key,
            following,
            self._expire_at(),
            drop=leave,
            put=dict(zip([number for number, _ in edited], encoded[: len(edited)], strict=True)),
            append=encoded[len(edited) :],
            critical=prepared.critical and bool(encoded),
            patient=patient,
            still=self._alive,
        )
        if done is None:
            return _MISFIT
        self._next = following + len(added)
        self._hash_fresh()
        numbers = chain.from_iterable(starmap(range, self._cut(start, stop)))
        known = dict(zip(numbers, zip(self._hashes[start:stop], self._lent[start:stop], strict=True), strict=True))
        known |= {
            number: (hash(data), type(item) not in _CONSTANT)
            for (number, item), data in zip(edited, encoded, strict=False)  # the added come behind
        }
        after = [known[number] for number in left]
        after += [
            (hash(data), type(item) not in _CONSTANT) for item, data in zip(added, encoded[len(edited) :], strict=True)
        ]
        self.moves += 1
        self._hashes[start:stop] = array("q", [one for one, _ in after])
        self._lent[start:stop] = bytes(lent for _, lent in after)
        middle = _spans([*left, *range(following, self._next)])
        self._spans = _joined([*self._cut(0, start), *middle, *self._cut(stop, self._count)])
        self._count += len(left) + len(added) - (stop - start)
        return waiter

    def _anew(self, items: list[Any], prepared: Prepared) -> Any:
        """Tell that the whole list is *items*."""
        writer = self._writer
        with writer._lock:
            if not self._alive():
                return None
            if not writer._is_tracked(self.key):
                # It would be saved over whatever another process has saved meanwhile.
                raise StoreError(
                    f"{self.key!r} must be tracked to be changed; its changes were discarded. Load it again"
                )
            datas = list(self._encoded(items, prepared))  # the writer's own from now on
            hashes = array("q", map(hash, datas))
            waiter = writer._anew(
                self.key,
                datas,
                self._expire_at(),
                critical=prepared.critical,
                still=self._alive,
            )
            self._count = self._next = len(items)
            self._spans = [(0, len(items))] if items else []
            self._fresh = []
            self.moves += 1
            self._hashes = hashes
            self._lent = bytearray(type(item) not in _CONSTANT for item in items)
            return waiter

    def _encoded(self, items: list[Any], prepared: Prepared) -> list[bytes]:
        """*items* in bytes: as prepared, and what was in the list before, and has to move, encoded now."""
        if len(items) == len(prepared.items) and all(map(is_, items, prepared.items)):
            return prepared.datas
        known = {id(item): data for item, data in zip(prepared.items, prepared.datas, strict=True)}
        encode, key = self._writer._encode, self.key
        return [known.get(id(item)) or encode(item, key) for item in items]

    def _cut(self, start: int, stop: int) -> _Spans:
        """The numbers of the items from index *start* to before *stop*."""
        found: _Spans = []
        # From the front, where a window is cut. There are as many spans as gaps: mostly none, or one.
        for low, high in self._spans:
            if stop <= 0:
                break
            size = high - low
            if start < size:
                found.append((low + max(start, 0), low + min(stop, size)))
            start -= size
            stop -= size
        return found


_refs = sys.getrefcount


def _is_held(value: Any) -> bool:
    """True if a container inside *value* may be referenced from elsewhere."""
    kind = type(value)
    if kind is not dict and kind is not list:
        return True  # what it refers to is not known
    try:
        inner: Iterable[Any] = value.values() if kind is dict else value
        if _CONSTANT.issuperset(map(type, inner)):  # mostly they are
            return False
        # No loop variable of a comprehension, a generator or a caller refers to *one* beside this loop's.
        for one in inner:
            if type(one) not in _CONSTANT and (_refs(one) > _SOLE - 1 or _is_held(one)):
                return True
    except RuntimeError:  # it changes at this moment
        return True
    return False


def _unstorable(place: int, key: Any, error: NotStorable) -> NotStorable:
    failed = NotStorable(f"item {place} of {key!r} was changed in place and cannot be stored any more: {error}")
    failed.__cause__ = error
    return failed


_MISFIT: Any = object()
_ELSEWHERE: Final = -1  # a number that no writer gives: the first change finds that it does not fit


def _always() -> bool:
    return True


def _common(old: Sequence[Any], new: Sequence[Any]) -> tuple[int, int]:
    """How many items are the same at the beginning of both, and at the end of what is left."""
    before = _run(old, new)
    most = min(len(old), len(new)) - before
    return before, min(most, _run(old[::-1], new[::-1]))


def _run(old: Sequence[Any], new: Sequence[Any]) -> int:
    same = list(map(is_, old, new))
    return same.index(False) if False in same else len(same)


def _chosen(old: Sequence[Any], new: Sequence[Any]) -> list[int] | None:
    """Indexes of those in *old* that make *new*, if nothing but leaving has happened to them."""
    if len(new) >= len(old):
        return None
    found: list[int] = []
    for index, item in enumerate(old):
        if len(found) == len(new):
            break
        if item is new[len(found)]:
            found.append(index)
    return found if len(found) == len(new) else None


def _differs(old: Sequence[Any], index: int, new: Sequence[Any]) -> bool:
    return len(old) == len(new) == 1 or old[index] is not new[index]


def _spans(numbers: Iterable[int]) -> _Spans:
    return _joined((number, number + 1) for number in numbers)


def _joined(spans: Iterable[tuple[int, int]]) -> _Spans:
    """*spans* with neighbours put together."""
    joined: _Spans = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
