"""
The kernel in Python.

An ``OrderedDict`` by construction, because the two things that CPython keeps for one are the two that a bounded dict
needs: a dict's own storage in insertion order, and a C linked list beside it, which nobody sees and which is the order
of recency. A read is then two C calls. Times are ``OrderedDict``s beside it, write times in the order of writing.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable
from operator import length_hint
from typing import Any, TypeVar, overload

__all__ = [
    "ATOMIC",
    "CROWDED",
    "FRAMES",
    "INTERFACE",
    "MISSING",
    "PARKS",
    "STATE",
    "STRONG",
    "Kernel",
    "LinkedOrder",
    "by_recency",
    "contains_timed",
    "get_timed",
    "is_atomic",
    "move",
    "oldest",
    "quicken",
    "read_timed",
    "store",
    "take",
    "take_oldest",
]

K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")
T = TypeVar("T")

# Counts what changes in the package's description of a kernel, so that a body that was built before is not taken.
INTERFACE = 3
# What a look-up finds where there is nothing, since ``None`` is a value.
MISSING: Any = object()
# Types of most keys whose comparison is C code.
ATOMIC = frozenset({str, int, bytes, float, bool, type(None)})
# Types of values that never come back once they were evicted, since an equal one does as well.
STRONG = frozenset({int, float, bool, str, bytes, type(None)})
CROWDED: Any = object()
# Frames between who looks something up and `_lookup`.
FRAMES = 2
# Whether the order of the kernel itself can have an entry out of it: then a `LinkedOrder` is a view of that.
PARKS = False

# The vocabulary: single C calls, atomic under the GIL, which keep both orders in step.
store = OrderedDict.__setitem__
take = OrderedDict.pop
take_oldest = OrderedDict.popitem
move = OrderedDict.move_to_end
by_recency = OrderedDict.__iter__

_fetch = dict.__getitem__
_look = dict.get
_has = dict.__contains__


def oldest(kernel: Any) -> Any:
    """The key that is least recent, `MISSING` if there is none."""
    while True:
        try:
            return next(by_recency(kernel), MISSING)
        except RuntimeError:  # a read, which takes no lock, moved a key between the two calls
            continue


def is_atomic(key: Any) -> bool:
    """
    Whether comparing this key runs no Python code, so that one C call on an ``OrderedDict`` is atomic under the GIL.

    Where it does, another thread may change the dict in the middle of the comparison. A dict survives that; an
    ``OrderedDict`` of CPython 3.11 to 3.13 goes on with an index into a table that is gone, and crashes the process.
    (A hash in Python is harmless: it is asked for before anything else.)
    """
    kind = type(key)
    if kind is tuple and ATOMIC.issuperset(map(type, key)):  # (chat, user): the usual case, at the price of two calls
        return True
    if type(kind.__eq__) is not types.WrapperDescriptorType:
        return False
    if isinstance(key, (tuple, frozenset)):
        return all(type(part) in ATOMIC or is_atomic(part) for part in key)
    return True


class Kernel(OrderedDict[K, V]):
    """The entries of a registry; see the package for what it has and asks for."""

    __slots__ = (
        "_asking",
        "_bound",
        "_clocked",
        "_due",
        "_evicted",
        "_held",
        "_keeper",
        "_leases",
        "_light",
        "_mortal",
        "_tail",
        "_tally",
        "_ticks",
        "_timer",
        "_used",
        "_uses_in_order",
        "_wasted",
        "_watched",
        "_written",
    )

    def _open(self, bound: int, timer: Callable[[], float] | None, *, written: bool, used: bool) -> None:
        """Begin: with times of writing or of use where they are wanted."""
        self._bound = bound
        self._leases: dict[Any, int] = {}
        self._tail: Any = None
        self._keeper: Any = None
        self._timer = timer
        self._clocked = timer is not None
        self._due = float("inf")
        self._written: OrderedDict[Any, float] | None = OrderedDict() if written else None
        self._used: OrderedDict[Any, float] | None = OrderedDict() if used else None
        self._uses_in_order = False
        self._ticks = itertools.repeat(None, sys.maxsize)
        self._evicted = itertools.repeat(None, sys.maxsize)  # counts as `_tally` does
        self._tally: Iterable[None] = ()
        self._light = self._mortal = False  # `_mortal`: values came whose end may run code
        self._wasted = 0

    def _keep_times(self, timer: Callable[[], float], *, written: bool, used: bool) -> None:
        """From now on keep times of writing or of use. Entries that have none count from now. The lock is held."""
        now = timer()
        keys = list(dict.keys(self))
        if written and self._written is None:
            self._written = OrderedDict.fromkeys(keys, now)
        if used and self._used is None:
            self._used = OrderedDict.fromkeys(keys, now)
        self._timer = timer
        self._clocked, self._light = True, False

    def _take_paths(
        self,
        *,
        reads: bool,
        misses: bool,  # noqa: ARG002 - for the compiled body
        writes: bool,
        moves: bool,
        uses_in_order: bool,
    ) -> None:
        """
        Decide which short ways are open.

        Args:
            reads: A hit is found and moved, and nothing else.
            misses: What is not here is nowhere, and nothing is made for it. (Looked at by the compiled body only.)
            writes: What is written is stored and moved, the oldest evicted, and nothing else.
            moves: Who is used or written becomes the most recent. (Where not, this body has no short ways.)
            uses_in_order: Times of use are kept in an order of their own, since that of the entries is another.
        """
        self._tally = self._ticks if reads and moves else ()
        self._light = writes and moves and not self._clocked
        self._uses_in_order = uses_in_order

    def _counted(self) -> tuple[int, int, int]:
        """Hits, misses and evictions on the short ways."""
        return sys.maxsize - length_hint(self._ticks) - self._wasted, 0, sys.maxsize - length_hint(self._evicted)

    # Reading. `_tally` counts hits: a C iterator whose length hint says how often it was asked, which is cheaper than
    # adding one to an attribute and atomic besides. Emptied, it sends every read the general way.

    def __getitem__(self, key: K) -> V:
        try:
            for _ in self._tally:
                move(self, key)
                return _fetch(self, key)
        except KeyError:
            _set_wasted(self, self._wasted + 1)
        except BaseException:  # an unhashable key, or one whose comparison raised, is no hit
            _set_wasted(self, self._wasted + 1)
            raise
        return self._lookup(key)

    @overload
    def get(self, key: K, default: None = None, /) -> V | None: ...
    @overload
    def get(self, key: K, default: V, /) -> V: ...
    @overload
    def get(self, key: K, default: D, /) -> V | D: ...
    def get(self, key: K, default: Any = None, /) -> Any:
        """The value of *key*, or *default*; a hit counts as use."""
        try:
            for _ in self._tally:
                move(self, key)
                return _fetch(self, key)
        except KeyError:
            _set_wasted(self, self._wasted + 1)
        except BaseException:  # an unhashable key, or one whose comparison raised, is no hit
            _set_wasted(self, self._wasted + 1)
            raise
        value = self._find(key)
        return default if value is MISSING else value

    def __contains__(self, key: object) -> bool:
        if _has(self, key):
            return True
        if self._tail is not None or self._keeper is not None:
            return self._has_elsewhere(key)
        return False

    def __delitem__(self, key: K) -> None:
        self._remove(key)

    # Writing.

    def __setitem__(self, key: K, value: V) -> None:
        if (
            not self._light
            or (type(key) not in ATOMIC and not is_atomic(key))
            or (type(value) not in STRONG and self._tail is None and self._comes_back(value))
        ):
            self._put(key, value)
            return
        if self._mortal or type(value) not in STRONG:
            if not self._mortal:
                self._mortal = True
            # What is overwritten dies last: an OrderedDict that its ``__del__`` changes in the middle of a write keeps
            # a key that the dict has no more, which breaks the bound, and crashes ``popitem`` of CPython 3.13.0.
            held = _look(self, key)  # noqa: F841
        try:
            store(self, key, value)
            move(self, key)
            tail = self._tail
            if tail is not None and tail.data:  # asking for its length runs Python code
                tail.data.pop(key, None)  # one call of C, unlike its own `pop`: no signal handler runs in the middle
            # Everybody who inserts looks, so nobody's surplus stays. Threads that look at the same moment may evict
            # one entry more than they had to, never one less.
            if len(self) > self._bound and not self._leases:
                if tail is not None:
                    if self._evict_into_tail():
                        for _ in self._evicted:
                            break
                else:
                    oldest_key, evicted = take_oldest(self, False)  # noqa: FBT003 - by keyword it costs a fifth more
                    # Leased between the two lines: the lease is right.
                    if self._leases and oldest_key in self._leases:
                        store(self, oldest_key, evicted)
                    else:
                        for _ in self._evicted:
                            break
        except KeyError:  # evicted already, by threads that inserted more than the bound meanwhile
            return
        except BaseException:  # a signal handler has raised: the bound holds all the same
            if len(self) > self._bound:
                self._sweep(key)
            raise
        if len(self) > self._bound:
            self._sweep(key)

    # What the registry adds.

    def _lookup(self, key: K) -> V:
        raise NotImplementedError

    def _find(self, key: K) -> Any:
        raise NotImplementedError

    def _has_elsewhere(self, key: object) -> bool:
        raise NotImplementedError

    def _put(self, key: K, value: V) -> Any:
        raise NotImplementedError

    def _comes_back(self, value: V) -> bool:
        raise NotImplementedError

    def _evict_into_tail(self) -> bool:
        raise NotImplementedError

    def _sweep(self, newest: Any = MISSING) -> None:
        raise NotImplementedError

    def _settle(self, key: Any) -> None:
        raise NotImplementedError

    def _remove(self, key: Any) -> Any:
        raise NotImplementedError

    # Leaving.

    def _extract(self, key: Any) -> tuple[Any, float | None, float | None] | None:
        """Take *key* out: its value and its times of writing and of use; ``None`` if it is not here."""
        value = take(self, key, MISSING)
        if value is MISSING:
            return None
        written = None if self._written is None else self._written.pop(key, None)
        return value, written, None if self._used is None else self._used.pop(key, None)

    def _extract_oldest(self) -> tuple[Any, Any, float | None, float | None]:
        """Take out who is least recent, as `_extract` does; ``KeyError`` if there is nobody."""
        key, value = take_oldest(self, last=False)
        written = None if self._written is None else self._written.pop(key, None)
        return key, value, written, None if self._used is None else self._used.pop(key, None)

    def _step_to_free(self, newest: Any, most: int) -> Any:
        """
        The least recent key that is neither leased nor *newest*.

        Those before it are most recent from now on, which is where the end of their lease will put them anyway.

        `MISSING` if there is none, `CROWDED` if more than *most* were in the way.
        """
        skipped = 0
        while skipped <= len(self):
            key = oldest(self)
            if key is MISSING:
                break
            if key not in self._leases and not _same(key, newest):
                return key
            move(self, key)
            skipped += 1
            if skipped > most:
                return CROWDED
        return MISSING

    # Times. The lock of the registry is held where an order changes.

    def _stamp_write(self, key: Any) -> float:
        """*key* was written and used now, which is returned."""
        assert self._timer is not None
        now = self._timer()
        if self._written is not None:
            self._written[key] = now
            self._written.move_to_end(key)
        if self._used is not None:
            self._used[key] = now
            if self._uses_in_order:
                self._used.move_to_end(key)
        return now

    def _stamp_use(self, key: Any) -> None:
        """*key* was used now, if it has a time of use."""
        used = self._used
        if used is not None and key in used:
            assert self._timer is not None
            used[key] = self._timer()
            if self._uses_in_order:
                try:
                    used.move_to_end(key)
                except KeyError:  # another thread removed it
                    return
            if not _has(self, key):  # removed between the lines above, and the stamp came after
                used.pop(key, None)

    def _unstamp(self, key: Any) -> None:
        """Forget the times of a key that is not here: a read may have left one while it was removed."""
        if self._written is not None:
            self._written.pop(key, None)
        if self._used is not None:
            self._used.pop(key, None)

    def _written_at(self, key: Any) -> float | None:
        return None if self._written is None else self._written.get(key)

    def _used_at(self, key: Any) -> float | None:
        return None if self._used is None else self._used.get(key)

    def _first_written(self) -> tuple[Any, float] | None:
        """Who was written first of all, and when."""
        if self._written is not None:
            for key in self._written:
                return key, self._written[key]
        return None

    def _first_used(self) -> tuple[Any, float] | None:
        """Who was used first of all, and when."""
        used = self._used
        if used is not None:
            first = oldest(used if self._uses_in_order else self)
            stamp = used.get(first)
            if stamp is not None:
                return first, stamp
        return None

    def _write_as(self, key: Any, when: float) -> None:
        """*key*, which has a time of writing, was written then; its place in the order of writes stays."""
        if self._written is not None and key in self._written:
            self._written[key] = when

    def _unwrite(self, key: Any) -> float | None:
        """Take *key* out of the order of writes, and say when it was written."""
        return None if self._written is None else self._written.pop(key, None)

    def _write_first(self, key: Any, when: float) -> None:
        """Put *key* back into the order of writes, as the first."""
        if self._written is not None and _has(self, key):
            self._written[key] = when
            self._written.move_to_end(key, last=False)

    def _reinsert(self, key: Any) -> None:
        """Put an entry that is here at the end of the order of insertion, which everybody sees, and of recency."""
        value = _fetch(self, key)
        try:
            take(self, key)
        finally:  # also if a signal handler raises right after that
            store(self, key, value)

    def _order_uses(self) -> None:
        """From now on times of use have an order of their own, which begins as that of the entries."""
        if self._used is not None:
            for key in list(by_recency(self)):
                if key in self._used:
                    self._used.move_to_end(key)
        self._uses_in_order = True


# Past ``__setattr__`` of the registry, which is Python code and would double the price of a miss.
_set_wasted = Kernel.__dict__["_wasted"].__set__


def read_timed(self: Any, key: Any) -> Any:
    """``r[key]`` where entries have times: a comparison of the clock with the next expiry comes first."""
    for _ in self._tally:
        timer = self._timer
        now = timer()
        if now < self._due:
            try:
                move(self, key)
                used = self._used
                if used is not None and key in used:
                    used[key] = now
                return _fetch(self, key)
            except KeyError:
                pass
            except BaseException:  # as in `Kernel`
                _set_wasted(self, self._wasted + 1)
                raise
        _set_wasted(self, self._wasted + 1)
        break
    return self._lookup(key)


def get_timed(self: Any, key: Any, default: Any = None, /) -> Any:
    """The value of *key*, or *default*; a hit counts as use."""
    for _ in self._tally:
        timer = self._timer
        now = timer()
        if now < self._due:
            try:
                move(self, key)
                used = self._used
                if used is not None and key in used:
                    used[key] = now
                return _fetch(self, key)
            except KeyError:
                pass
            except BaseException:  # as in `Kernel`
                _set_wasted(self, self._wasted + 1)
                raise
        _set_wasted(self, self._wasted + 1)
        break
    value = self._find(key)
    return default if value is MISSING else value


def contains_timed(self: Any, key: object) -> bool:
    """Whether *key* is here and its time is not over."""
    self._settle(key)
    return _has(self, key) or ((self._tail is not None or self._keeper is not None) and self._has_elsewhere(key))


def quicken(cls: type[T]) -> type[T]:
    """Make reading instances of this very class as fast as can be; there is nothing to do where it is Python."""
    return cls


def _same(key: Any, other: Any) -> bool:
    # As in a dict: keys are compared only where their hashes are equal.
    return key is other or (other is not MISSING and hash(key) == hash(other) and bool(key == other))


class LinkedOrder:
    """
    Least recently used first; with *moves* false, first in first out. See `hygiene.recency.Order`.

    `touch` is a single C call, and needs no lock.
    """

    def __init__(self, kernel: Any, *, moves: bool = True) -> None:  # noqa: ARG002 - the order stands by itself here
        self._keys: OrderedDict[Hashable, None] = OrderedDict()
        self._moves = moves

    def touch(self, key: Hashable) -> bool:
        """Count *key* as used; ``False`` if it is not in the order."""
        if not self._moves:
            return key in self._keys
        try:
            self._keys.move_to_end(key)
        except KeyError:
            return False
        return True

    def add(self, key: Hashable) -> None:
        """Put *key* in, as just used; if it is in already, count the write."""
        self._keys[key] = None
        if self._moves:
            self._keys.move_to_end(key)

    def put_back(self, key: Hashable) -> None:
        """Put *key* in as the next to leave."""
        self._keys[key] = None
        self._keys.move_to_end(key, last=False)

    def discard(self, key: Hashable) -> None:
        """Take *key* out, if it is in."""
        self._keys.pop(key, None)

    def pop(self) -> Any:
        """Take out the key that leaves next; ``KeyError`` if there is none."""
        return self._keys.popitem(last=False)[0]

    def reconcile(self, keys: Collection[Hashable]) -> None:
        """Hold exactly *keys* from now on: add those that are missing, and discard every other key."""
        for key in [key for key in list(self._keys) if key not in keys]:
            self.discard(key)
        for key in keys:
            if key not in self._keys:
                self.add(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys


# The names of a kernel's own attributes: what an instance knows about itself, and no subclass may use.
STATE = frozenset(Kernel.__slots__)
