"""A history whose older items are kept compressed, and made anew when somebody reads them.

Theory of operation
===================

**Segments.** A run of older items is one `Segment`: MessagePack, compressed with zlib. It stands in the list's own
storage, once in the place of each of its items: eight bytes a slot. So the length is the list's own, all that History
does with indexes stays true, and what only moves or drops slots need not know what stands in them.

**Places.** Whatever leaves a run leaves it at its front (the window moves on); a change anywhere else in it lays it
open first. So the slots that hold one segment always stand for its *last* items, and which of them a slot stands for is
seen from the number of slots behind it that hold the same. That needs one slice of the storage, which is a single step
under the GIL. A reader in another thread never sees a segment, nor an item in the wrong place. All that changes places
takes the lock of the history: appending, and reading what is sealed, too.

**What is sealed.** Only what comes back equal and of the same types: dicts, lists, texts, numbers, bytes, ``None``. And
only what nobody else holds: whoever holds an item may change it, and then the change has to be seen here. That is
decided by counting references, *after* the segment was put in the place of the items: from then on nobody can come by
them any more, so who does not hold one by then never will. If somebody does, they are put back. The encoding is done
before that, without the lock.

**When.** The newest items and the kept ones are left alone. Each further item is tried once, a run at a time, while
others come in; mostly a request that is under way still holds some, so with these it waits for a while. What was left
open is tried again after half as many items have come as there are, so that trying stays cheap.

**Reading.** A sealed item that is handed out may be changed by its reader, so its run is laid open first, and it is the
object in the list that is handed out. It is sealed again, with what is in it by then, as soon as nobody else holds it:
by later appends, by each check for edits if there is a store, and by the loop that has unsealed it, when it has left
the run and finds nothing changed. Looks that hand nothing out (``in``, ``==``, ``repr``, ``index``, ``pickle``) make
new objects and leave what is sealed as it is.
"""

from __future__ import annotations

import copy
import math
import operator
import reprlib
import sys
import threading
import types
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, SupportsIndex, TypeVar, overload

import msgspec

from hygiene import history as _history
from hygiene.errors import HygieneError
from hygiene.history import History, history_type
from hygiene.sizing import sizeof

__all__ = ["CompactHistory"]

T = TypeVar("T")

# Measured with the messages of a chat, in bytes a message: runs of 32: 45, of 64: 40, of 256: 34, and each item that is
# read alone costs the decoding of its run.
_RUN = 64
_HOT = 32  # newest items that are never sealed: they are what is read
_LEAST = 16  # items: what a segment costs by itself has to be worth it
_PATIENCE = 64  # appends to wait for who holds an item,
_STEP = 8  # and of these, one in so many looks
_AGAIN = 1024  # items to come before those left open are tried again, or half as many as there are
# Level 6 takes twice as long for 6 % less.
_LEVEL = 1
_DEEPEST = 32

_get: Callable[[Any, Any], Any] = list.__getitem__
_set: Callable[[Any, Any, Any], None] = list.__setitem__
_refs = sys.getrefcount
_ALL = slice(None)
_FLAT: Final[frozenset[type]] = frozenset({str, int, float, bool, bytes, type(None)})
_KEYS: Final[frozenset[type]] = frozenset({str, int})
_FREE, _HELD, _OTHER = range(3)
_NOBODY: frozenset[int] = frozenset()

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Any]).decode


class Segment:
    """
    Some items, sealed.

    It is neither a dataclass nor a `msgspec.Struct`: an encoder in C that reads the storage of a list has to refuse it.
    """

    __slots__ = ("count", "packed")

    def __init__(self, items: list[Any]) -> None:
        self.count = len(items)
        self.packed = zlib.compress(_encode(items), _LEVEL)

    def __repr__(self) -> str:
        return f"<{self.count} sealed items of a compact History; list(history) has them>"

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sys.getsizeof(self) + sys.getsizeof(self.packed)

    @property
    def share(self) -> int:
        """Bytes of one item, with its slot."""
        return math.ceil(self.nbytes / self.count) + 8

    def items(self) -> list[Any]:
        """All of them, made anew."""
        try:
            return _decode(zlib.decompress(self.packed))
        except (zlib.error, msgspec.MsgspecError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> HygieneError:
        return HygieneError(
            f"{self.count} sealed items of a compact history must come back as they were; found that they cannot be "
            f"read: {error}. The memory of this process is damaged: end it, and load the history from where it is kept"
        )


class CompactHistory(History[T]):
    """
    What ``History(compact=True)`` is: a `History` whose older items are kept compressed.

    Read through its methods, and by all that reads a list through them (loops, ``list()``, ``json``, ``pickle``,
    ``sorted``, ``==`` from either side, ``[prompt] + history``), it is the list that it would be without. What is
    different:

    - **An item that is read is unsealed**, with up to 63 next to it, and sealed again once no other code refers to it:
      by later appends, by ``flush`` if it is in a store, or by the loop that has read it. A change inside it,
      ``history[3]["seen"] = True``, is kept. The newest 32 items, the kept ones, a summary, and each item that other
      code holds a reference to are never sealed.
    - **C code that reads the storage of a list itself** refuses it: ``orjson.dumps`` and ``msgspec.json.encode`` raise
      ``TypeError``. Give them ``list(history)``. So does ``list.copy(history)``, and all that is called by the name of
      list, return what stands in the storage, and what writes there is not noticed: use its methods.
    - Reading sealed items takes some microseconds each in a loop, and some 60 for one alone. ``list(history)`` unseals
      all, until later appends seal them again.

    Sealed is only what comes back equal and of exactly the same types: dicts with texts and whole numbers as keys,
    lists, texts, numbers, bytes and ``None``, in each other up to 32 deep. All else (tuples, dates, dataclasses,
    models) stays open, and costs what it always has.

    With *max_bytes*, measured by the default, a sealed item counts with its share of the compressed bytes: about ten
    times as many fit. A *getsizeof* of yours is asked once about each item, as ever.

    A list given at the start hands over its items: those that nobody but that list holds are sealed. With ``extend``
    that waits until the list is gone. ``copy.copy`` and ``copy.deepcopy`` share what is sealed.

    Safe to share between threads as any `History`. Safe after ``fork``.
    """

    # How it is read.

    _lends = True
    _sealed = Segment

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> T: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[T]: ...
    def __getitem__(self, index: Any, /) -> Any:
        found = _get(self, index)
        if (Segment in map(type, found)) if isinstance(index, slice) else type(found) is Segment:
            found = self._unseal(index)
        if self._hygiene.journal is not None:
            _history.lend(self, index, found)
        return found

    def _unseal(self, index: Any) -> Any:
        """The item or items at *index*, which stay in their places from now on: whoever reads one may change it."""
        with self._whole():
            places = range(len(self))[index]
            for place in places if isinstance(places, range) else (places,):
                self._lay_open_at(place)
            return _get(self, index)

    def _items(self, where: slice, /) -> list[T]:
        slots = _get(self, _ALL)
        start, stop, step = where.indices(len(slots))
        if step == 1:
            return _opened(slots, start, stop)
        return _opened(slots, 0, len(slots))[where]

    def __iter__(self) -> Iterator[T]:
        return self._walk(0)

    def _walk(self, index: int) -> Iterator[T]:
        """As an iterator over a list goes: by index, seeing each change. From *index* on."""
        token = _history.walking(self)
        try:
            _history.lend(self, _ALL, _get(self, _ALL))
            yield from self._steps(index)
        finally:
            _history.walked(self, token)

    def _steps(self, index: int) -> Iterator[T]:
        left: tuple[int, int, Segment] | None = None  # a run that was unsealed here, and that the loop has left
        while True:
            window = self._hygiene
            slots = _get(self, slice(index, index + _RUN))
            if not slots:
                return
            segment = slots[0]
            if type(segment) is Segment:
                with self._whole():
                    now = _get(self, slice(index, index + _RUN))
                    if len(now) != len(slots) or not all(map(operator.is_, now, slots)):
                        continue
                    del now
                    count = _run_length(slots, 0)
                    self._lay_open_at(index)
                    slots = _get(self, slice(index, index + count))
            else:
                segment = None
                del slots[next((place for place, slot in enumerate(slots) if type(slot) is Segment), _RUN) :]
            seen = window.moved
            first, count = index, len(slots)
            if window.journal is not None:
                _history.lend(self, slice(first, first + count), slots)
            slots.reverse()
            while slots:
                yield slots.pop()  # and no other reference to it stays here
                index += 1
                if window.moved != seen:  # by whoever was handed the item: so nothing is known any more
                    segment = None
                    break
                if left is not None:  # whoever loops has let go of its last item only now
                    self._seal_again(*left)
                    left, seen = None, window.moved
            left = None if segment is None else (first, count, segment)

    def _seal_again(self, start: int, count: int, segment: Segment) -> None:
        """Put *segment* back in the place of its *count* last items, if they are as they were and nobody holds one."""
        new = [segment] * count
        with self._whole() as window:
            items = _get(self, slice(start, start + count))
            if len(items) != count or Segment in map(type, items):
                return
            _set(self, slice(start, start + count), new)
            window.moved += 1
            # As in `_swap`: from here on nobody can come by one who does not hold one already.
            if any(_states(items, 0, _NOBODY)) or not _is_sealed_in(items, segment):
                _set(self, slice(start, start + count), items)

    def _values(self, index: int = 0) -> Iterator[T]:
        """As `_steps`, for a look that hands nothing out: sealed items are made for it, and stay sealed."""
        while True:
            window = self._hygiene
            seen = window.moved
            slots = _get(self, slice(index, index + _RUN))
            if not slots:
                return
            if type(slots[0]) is Segment:
                items = _opened(slots, 0, _run_length(slots, 0))
            else:
                stop = next((place for place, slot in enumerate(slots) if type(slot) is Segment), _RUN)
                items = slots[:stop]
            del slots
            for item in items:
                yield item
                index += 1
                if window.moved != seen:
                    break
            del items

    def __reversed__(self) -> Iterator[T]:
        index = len(self) - 1
        while 0 <= index < len(self):
            yield self[index]
            index -= 1

    def __contains__(self, item: object, /) -> bool:
        return any(one is item or one == item for one in self._values())

    def index(self, item: T, start: SupportsIndex = 0, stop: SupportsIndex = sys.maxsize, /) -> int:
        """
        The first index of an item equal to *item*, from *start* to before *stop*.

        Raises:
            ValueError: There is none.
        """
        first, last, _ = slice(start, stop).indices(len(self))
        for place, one in enumerate(self._values(first), first):
            if place >= last:
                break
            if one is item or one == item:
                return place
        raise ValueError(f"{item!r} is not in list")

    def count(self, item: T, /) -> int:
        """How many items are equal to *item*."""
        return sum(one is item or one == item for one in self._values())

    def copy(self) -> list[T]:
        """A plain list of all items."""
        return self[:]

    def __eq__(self, other: object, /) -> bool:
        if type(other) is list and len(other) != len(self):
            return False
        return self._items(_ALL) == other if isinstance(other, list) else NotImplemented

    def __ne__(self, other: object, /) -> bool:
        return not self == other if isinstance(other, list) else NotImplemented

    def __lt__(self, other: Any, /) -> bool:
        return self._items(_ALL) < other if isinstance(other, list) else NotImplemented

    def __le__(self, other: Any, /) -> bool:
        return self._items(_ALL) <= other if isinstance(other, list) else NotImplemented

    def __gt__(self, other: Any, /) -> bool:
        return self._items(_ALL) > other if isinstance(other, list) else NotImplemented

    def __ge__(self, other: Any, /) -> bool:
        return self._items(_ALL) >= other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment] # as a list's

    def __add__(self, other: Any, /) -> Any:
        return self[:] + other

    def __radd__(self, other: Any, /) -> Any:
        # Without this ``[prompt] + history`` would be a list of segments: list's own reads the storage.
        if not isinstance(other, list):
            return NotImplemented
        if _history._is_augmented(sys._getframe(1)):
            other.extend(self)
            return other
        return other[:] + self[:]

    def __mul__(self, times: SupportsIndex, /) -> list[T]:
        return self[:] * times

    __rmul__ = __mul__

    @reprlib.recursive_repr("[...]")
    def __repr__(self) -> str:
        return repr(self._items(_ALL))

    # How it is copied.

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        make, arguments, *rest = reduced
        if len(rest) > 1 and isinstance(rest[1], types.GeneratorType):
            rest[1] = self._values()  # what pickle holds for a moment need not be unsealed
        return make, arguments, *rest

    def __copy__(self) -> Any:
        _history.lend(self, _ALL, _get(self, _ALL))
        return self._twin(lambda part: part, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._twin(lambda part: copy.deepcopy(part, memo), memo)

    def _twin(self, copied: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
        """What `copy` would make, item by item; but segments, which never change, are shared."""
        slots = _get(self, _ALL)
        reduced: Any = self.__reduce_ex__(4)
        make, arguments, *rest = reduced
        state, items = (*rest, None, None)[:2]
        made = make(*copied(arguments))
        memo[id(self)] = made
        if state is None:
            pass
        elif hasattr(made, "__setstate__"):
            made.__setstate__(copied(state))
        else:
            own, parts = copied(state) if isinstance(state, tuple) else (copied(state), None)
            for name, value in {**(own or {}), **(parts or {})}.items():
                object.__setattr__(made, name, value)
        if items is None or not isinstance(made, CompactHistory):
            return made
        list.extend(made, [slot if type(slot) is Segment else copied(slot) for slot in slots])
        return made

    # How it is changed.

    def append(self, item: T, /) -> None:
        """Put *item* at the end; the oldest leave if need be."""
        window = self._hygiene
        if window.journal is None or window.scales:
            self._grow([item])
            return
        if window.untried >= _HOT + _RUN:
            self._seal(2)
        History.append(self, item)
        window.untried += 1

    def _grow(self, items: Iterable[T]) -> None:
        if items is self:
            items = self[:]
        window = self._hygiene
        count = len(items)  # type: ignore[arg-type] # who has no length comes in chunks
        if window.untried >= _HOT + _RUN:
            self._seal(2 + count // _RUN)
        super()._grow(items)
        # Two threads at once may count one too few: it is tried later.
        window.untried += count

    def _fill(self, source: Iterable[T]) -> None:
        window = self._hygiene
        beside = _NOBODY
        if isinstance(source, (list, tuple)) and len(source) >= _HOT + _RUN:
            # Of a list what stands in it, whatever a subclass makes of that.
            beside = frozenset(map(id, list.__iter__(source) if isinstance(source, list) else source))
        if window.journal is None and any(map(_by_share, window.scales)):
            # Weighed before they are sealed most would have to leave that fit after.
            list.extend(self, source)
            self._seal(sys.maxsize, beside, patient=False)
            with self._whole():
                self._align()
            self._sweep()
        else:
            History.extend(self, source)
            self._seal(sys.maxsize, beside, patient=False)

    def remove(self, item: T, /) -> None:
        """
        Take out the first item equal to *item*.

        Raises:
            ValueError: There is none.
        """
        while True:
            slots = _get(self, _ALL)
            before = _opened(slots, 0, len(slots))
            place = before.index(item)
            slot = slots[place]
            behind = _run_length(slots, place) if type(slot) is Segment else 1
            try:
                with self._whole():
                    # Comparing is the items' own code, so not under the lock; meanwhile it may have moved, or gone.
                    slots = _get(self, _ALL)
                    last = next((index for index in reversed(range(len(slots))) if slots[index] is slot), -1)
                    if type(slot) is not Segment:
                        last = next((index for index, one in enumerate(slots) if one is slot), -1)
                    index = last - behind + 1
                    if last >= 0 and index >= 0 and slots[index] is slot:
                        del slots, slot
                        self._apply(list.pop, index)
                        return
            finally:
                self._sweep()

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        """
        Sort in place; the lowest become the oldest.

        Raises:
            ValueError: The list was changed meanwhile; nothing was sorted.
        """
        with self._whole():
            self._lay_open()
        super().sort(key=key, reverse=reverse)

    def _make_way(self, method: Callable[..., Any], where: tuple[Any, ...]) -> None:
        self._hygiene.moved += 1
        if method is list.clear:
            return
        size = len(self)
        span = _history._span(method, where, size)
        if span is not None:
            # What is in between leaves as it is, and so does the front of the run behind.
            self._part(span[0])
            if method is list.pop:
                self._lay_open_at(span[0])
        elif method not in _history._AT_ONE or type(where[0]) is not int:
            self._lay_open()

    def _part(self, index: int) -> None:
        self._hygiene.moved += 1
        if index > 0 and (slots := _get(self, slice(index - 1, index + 1)))[1:] and slots[0] is slots[1]:
            self._lay_open_at(index)

    def _lay_open_at(self, index: int) -> None:
        """Put the items of a run in their places, under the lock."""
        segment = _get(self, index)
        if type(segment) is not Segment:
            return
        base = max(0, index - _RUN)
        slots = _get(self, slice(base, index + _RUN))
        start = index - base
        while start and slots[start - 1] is segment:
            start -= 1
        self._put_back(base + start, _opened(slots, start, start + _run_length(slots, start)))

    def _lay_open(self) -> None:
        """Put all items in their places, under the lock."""
        slots = _get(self, _ALL)
        if Segment in map(type, slots):
            self._put_back(0, _opened(slots, 0, len(slots)))

    def _put_back(self, start: int, items: list[T]) -> None:
        window = self._hygiene
        _set(self, slice(start, start + len(items)), items)
        window.moved += 1
        # Their weights stay what they were when sealed: soon they are again, and nothing must leave because of that.
        window.untried = max(window.untried, len(self) - start)

    def _rest(self) -> None:
        self._seal(sys.maxsize)

    def _align(self) -> None:
        window = self._hygiene
        for scale in window.scales:
            if len(scale.weights) != len(self):
                break
        else:
            return
        # A copy, or unpickled: sealed first, or most would have to leave that fit.
        self._seal(sys.maxsize, patient=False)
        for scale in window.scales:
            if len(scale.weights) != len(self):
                slots = _get(self, _ALL)
                if _by_share(scale):
                    weights = [s.share if type(s) is Segment else self._weight(scale, s) for s in slots]
                else:
                    weights = [self._weight(scale, item) for item in _opened(slots, 0, len(slots))]
                scale.weights[:] = weights
                scale.total = sum(weights)

    @property
    def nbytes(self) -> int:
        """
        Bytes of the items: a running sum with *max_bytes*, otherwise an estimate made when asked.

        So `hygiene.sizing.sizeof`, and a registry with *max_bytes*, counts each segment once.
        """
        told = super().nbytes
        if told is not None:
            return told
        slots = _get(self, _ALL)
        sealed = {id(slot): slot for slot in slots if type(slot) is Segment}
        left = sizeof([slot for slot in slots if id(slot) not in sealed])
        return sys.getsizeof(self) + sum(one.nbytes for one in sealed.values()) + left

    # How it is sealed.

    def _seal(self, most: int, beside: frozenset[int] = _NOBODY, *, patient: bool = True) -> None:
        """
        Seal up to *most* runs of those that were not yet tried.

        Args:
            most: So that nobody's append has to seal a whole conversation.
            beside: Ids of items that the list they came from may hold, too.
            patient: Wait, until a later call, for items that somebody else holds.
        """
        window = self._hygiene
        if not window.limits.compact:
            return  # it is just being unpickled
        with window.broom():
            # By another thread; or in this one, and a finalizer runs in the middle of it. Two at once do no harm.
            if window.sealing and patient:
                return
            if window.waiting and patient:
                window.waiting -= 1
                return
            window.sealing = True
        try:
            # Once a call, and not in the loop, which would never end with items that cannot be sealed.
            if window.tried >= max(len(self) // 2, _AGAIN):
                window.tried, window.untried = 0, len(self)
            while most > 0:
                size = len(self)
                untried = window.untried = min(window.untried, max(0, size - self._head()))
                if untried < _HOT + _RUN:
                    return
                place = size - untried
                slots = _get(self, slice(place, place + _RUN))
                if not slots:
                    return  # somebody has emptied it
                if type(slots[0]) is Segment:
                    window.untried -= _run_length(slots, 0)
                    continue
                stop = next((index for index, slot in enumerate(slots) if type(slot) is Segment), len(slots))
                del slots[stop:]
                if not self._seal_some(place, slots, beside, patient=patient):
                    return
                window.untried -= stop
                window.tried += stop
                most -= 1
        finally:
            window.sealing = False

    def _seal_some(self, place: int, slots: list[Any], beside: frozenset[int], *, patient: bool) -> bool:
        """Seal what can be of *slots*, a copy of those from *place* on; false: to be tried again."""
        window = self._hygiene
        states = _states(slots, 1, beside)
        if patient and _HELD in states and window.patience < _PATIENCE:
            window.patience += _STEP
            window.waiting = _STEP - 1
            return False
        window.patience = 0
        for start, stop in _stretches(states):
            sealed = _sealed(slots[start:stop])
            if sealed is not None:
                self._swap(place + start, slots[start:stop], *sealed, beside)
                continue
            # One of them does not come back: a number of more than 64 bits, one that is not equal to itself.
            alone = [_FREE if _sealed([slot]) else _OTHER for slot in slots[start:stop]]
            for first, last in _stretches(alone):
                items = slots[start + first : start + last]
                if (sealed := _sealed(items)) is not None:
                    self._swap(place + start + first, items, *sealed, beside)
        return True

    def _swap(self, place: int, items: list[Any], segment: Segment, values: list[Any], beside: frozenset[int]) -> None:
        """Put *segment* in the place of *items*, which stood at *place*, unless they, or their *values*, are in use."""
        new = [segment] * len(items)
        with self._whole() as window:
            seen = window.moved
            where = self._standing(place, items)
            # No call between this look and the change, so that neither a thread nor a finalizer comes in between.
            if where is None or window.moved != seen:
                return
            _set(self, where, new)
            if window.moved != seen or any(_states(items, 1, beside)) or values != items:
                slots = _get(self, _ALL)
                start = next((index for index, slot in enumerate(slots) if slot is segment), None)
                if start is not None:
                    self._put_back_as_were(start, _run_length(slots, start), items)
                return
            for scale in window.scales:
                if _by_share(scale) and len(scale.weights) == len(self):
                    scale.total += segment.share * len(items) - sum(scale.weights[where])
                    scale.weights[where] = [segment.share] * len(items)

    def _put_back_as_were(self, start: int, count: int, items: list[Any]) -> None:
        _set(self, slice(start, start + count), items[-count:])
        self._hygiene.moved += 1

    def _standing(self, place: int, items: list[Any]) -> slice | None:
        """Where *items* stand now, if not at *place*: further to the front, as the window has moved on."""
        while place >= 0:
            slots = _get(self, slice(place, place + len(items)))
            if len(slots) == len(items) and all(map(operator.is_, slots, items)):
                return slice(place, place + len(items))
            slots = _get(self, slice(place))
            place = next((index for index in reversed(range(len(slots))) if slots[index] is items[0]), -1)
        return None


def _run_length(slots: list[Any], place: int) -> int:
    """How many of *slots* from *place* on hold the segment that is there."""
    segment = slots[place]
    length = min(segment.count, len(slots) - place)
    while slots[place + length - 1] is not segment:
        length -= 1
    return int(length)


def _opened(slots: list[Any], start: int, stop: int) -> list[Any]:
    """The items that *slots* from *start* to before *stop* stand for. The last run must be there to its end."""
    items: list[Any] = []
    while start < stop:
        slot = slots[start]
        if type(slot) is not Segment:
            items.append(slot)
            start += 1
            continue
        left = _run_length(slots, start)
        take = min(left, stop - start)
        items += slot.items()[slot.count - left : slot.count - left + take]
        start += take
    return items


def _sealed(items: list[Any]) -> tuple[Segment, list[Any]] | None:
    """*items* as a segment, and what that gives back; ``None`` if that is not the same."""
    try:
        segment = Segment(items)
        values = segment.items()
        same = values == items
    except Exception:  # an item is changed by another thread at this moment, or nothing that MessagePack has
        return None
    return (segment, values) if same else None


def _is_sealed_in(items: list[Any], segment: Segment) -> bool:
    """Whether *items* are the last ones of *segment*, unchanged."""
    try:
        if len(items) == segment.count:
            return bool(_encode(items) == zlib.decompress(segment.packed))
        return bool(_encode(items) == _encode(segment.items()[-len(items) :]))
    except Exception:  # something was put into one that MessagePack does not have
        return False


def _stretches(states: list[int]) -> Iterator[tuple[int, int]]:
    """From and to where enough of them are free."""
    start = 0
    for place, state in enumerate([*states, _OTHER]):
        if state != _FREE:
            if place - start >= _LEAST:
                yield start, place
            start = place + 1


def _states(items: list[Any], holders: int, beside: frozenset[int]) -> list[int]:
    """
    Which of *items* are plain data that nobody else holds.

    Args:
        items: A list of them, made for this.
        holders: How many other lists hold them with our knowledge.
        beside: The ids of those that one more may hold.
    """
    states = []
    for item in items:
        if type(item) in _FLAT:  # never changes, so it may be anybody's
            states.append(_FREE)
            continue
        try:
            state = _state(item, _DEEPEST)
        except RuntimeError:  # changed size meanwhile
            state = _HELD
        if state == _FREE and _refs(item) > _SOLE + holders + (id(item) in beside):
            state = _HELD
        states.append(state)
    return states


def _state(value: Any, depth: int) -> int:
    kind = type(value)
    inner: Iterable[Any]
    if kind is dict:
        if not _KEYS.issuperset(map(type, value)):
            return _OTHER
        inner = value.values()
    elif kind is list:
        inner = value
    else:
        return _OTHER
    state = _FREE
    if not _FLAT.issuperset(map(type, inner)):  # mostly they are, and this needs no loop
        for one in inner:
            if type(one) not in _FLAT:
                state = _state(one, depth - 1) if depth else _OTHER
                if state == _FREE and _refs(one) > _SOLE:
                    state = _HELD
                if state != _FREE:
                    break
    return state


# What `_refs` says, in a loop over a list, of what only that list holds: since 3.14 an argument is lent.
_SOLE: Final = 3 if sys.version_info < (3, 14) else 2


def _by_share(scale: Any) -> bool:
    """Whether it measures bytes of memory, and not what a function of the user's takes for that."""
    return scale.measure is sizeof


# Both sides weak, as in `history_type`.
_types: weakref.WeakKeyDictionary[type[Any], weakref.ref[type[Any]]] = weakref.WeakKeyDictionary()
_types_lock = threading.Lock()


def _compacted(base: type[Any]) -> type[Any]:
    """The class that is both *base*, a kind of `History`, and `CompactHistory`."""
    if base is History:
        return CompactHistory
    if issubclass(base, CompactHistory):
        return base
    with _types_lock:
        known = _types.get(base)
        made = known() if known is not None else None
        if made is None:
            made = _combined(base)
            _types[base] = weakref.ref(made)
        return made


def _combined(base: type[Any]) -> type[Any]:
    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:  # noqa: N807
        # As in `history_type`: this class has no name to be found by.
        made, arguments, *rest = super(kind, self).__reduce_ex__(max(2, int(protocol)))
        if arguments and arguments[0] is kind:
            return _remake, (made, getattr(base, "_made_of", base), *arguments[1:]), *rest
        return made, arguments, *rest

    namespace = {
        "__slots__": (),
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    kind: Any = types.new_class(base.__name__, (base, CompactHistory), exec_body=lambda body: body.update(namespace))
    made: type[Any] = kind
    return made


def _remake(made: Callable[..., Any], base: type[list[Any]], *arguments: Any) -> Any:
    """Unpickle."""
    return made(_compacted(history_type(base)), *arguments)


_history._compacted = _compacted
