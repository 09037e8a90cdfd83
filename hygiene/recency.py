"""Who leaves next: the orders in which entries may be evicted.

An order holds keys only, the evictable ones: what is leased or busy is taken out by its owner and put back when it is
free. No lock, no clock, no I/O; the owner calls it under its own lock, except `touch` of a `LinkedOrder`.

The plain LRU and FIFO registries need none of these: the kernel keeps that order by itself. An order *beside* it is for
policies that are not a list, and where entries must leave the order without leaving the registry; for these there is
the kernel's `LinkedOrder`.

An order survives code that runs in the middle of its methods: the ``__eq__`` and ``__hash__`` of keys, a finalizer that
the garbage collector runs, and a signal handler that raises. Such code may remove other keys from the same order, or
add some. Each change is therefore one operation of a C container. `Order.reconcile` makes an order agree with the keys
of the registry again if an exception came between two of these operations.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Hashable
from typing import Any, Protocol

import cachetools

__all__ = ["CachetoolsOrder", "FrequencyOrder", "ImportanceOrder", "Order"]


class Order(Protocol):
    """The evictable keys, in the order in which they leave."""

    def touch(self, key: Hashable) -> bool:
        """Count *key* as used; ``False`` if it is not in the order."""
        ...

    def add(self, key: Hashable) -> None:
        """Put *key* in, as just used; if it is in already, count the write."""

    def put_back(self, key: Hashable) -> None:
        """Put back what was popped and may not leave yet: it is next again, where the order can do that."""

    def discard(self, key: Hashable) -> None:
        """Take *key* out, if it is in."""

    def pop(self) -> Any:
        """Take out the key that leaves next; ``KeyError`` if there is none."""

    def reconcile(self, keys: Collection[Hashable]) -> None:
        """Hold exactly *keys* from now on: add those that are missing, and discard every other key."""

    def __contains__(self, key: object) -> bool: ...


class CachetoolsOrder:
    """The order that a cachetools cache keeps: any class that the application names.

    The cache holds keys without a bound of its own and is asked only for its next victim (``popitem``). Its methods are
    Python code that expects no other change of the same cache while it runs. A change that comes in the middle of
    another is therefore deferred until that has ended. After an exception in the middle of a change the cache may be
    damaged, so the next one begins with a new cache.
    """

    def __init__(self, cache: Callable[..., cachetools.Cache[Any, None]]) -> None:
        self._make = cache
        self._cache = cache(maxsize=math.inf)
        self._changing = False
        self._damaged = False
        self._deferred: list[tuple[Callable[[Any], object], Any]] = []

    def touch(self, key: Hashable) -> bool:
        if key not in self:
            return False
        self._change(self._touch, key)
        return True

    def add(self, key: Hashable) -> None:
        self._change(self._add, key)

    put_back = add

    def discard(self, key: Hashable) -> None:
        self._change(self._discard, key)

    def pop(self) -> Any:
        if self._changing:
            raise KeyError("the order is being changed")
        popped: list[Any] = []
        self._change(self._pop, popped)
        return popped[0]

    def reconcile(self, keys: Collection[Hashable]) -> None:
        if self._changing:
            return
        if self._damaged:
            self._cache = self._make(maxsize=math.inf)
            self._damaged = False
        for key in [key for key in list(self._cache) if key not in keys]:
            self.discard(key)
        for key in keys:
            if key not in self._cache:
                self.add(key)

    def __contains__(self, key: object) -> bool:
        return key in self._cache

    def _touch(self, key: Hashable) -> None:
        if key in self._cache:
            self._cache[key]

    def _add(self, key: Hashable) -> None:
        self._cache[key] = None

    def _discard(self, key: Hashable) -> None:
        self._cache.pop(key, None)

    def _pop(self, popped: list[Any]) -> None:
        popped.append(self._cache.popitem()[0])

    def _change(self, change: Callable[[Any], object], argument: Any) -> None:
        if self._changing:  # a finalizer, or the comparison of a key, in the middle of another change
            self._deferred.append((change, argument))
            return
        if self._damaged:
            self.reconcile(set(self._cache))
        size = len(self._cache)
        self._changing = self._damaged = True
        try:
            change(argument)
            self._changing = self._damaged = False
        except KeyError:
            if change == self._pop:
                self._damaged = size > 0  # nothing to pop is no damage
                raise
            # The cache lost a key that it counts on. It begins again with the next change.
        finally:
            self._changing = False
        while self._deferred:
            self._change(*self._deferred.pop(0))


class _HeapOrder:
    """
    Lowest rank first: a heap with lazy deletion.

    A rank is a tuple of numbers that ends with a serial number. The heap holds for each key at least one rank that is
    not above its present one; `pop` replaces those that are out of date. So a change of a rank upwards costs no more
    than an entry in a dict, and every other change O(log n). Items of keys that were discarded are swept out when they
    outnumber the keys.
    """

    def __init__(self) -> None:
        self._ranks: dict[Hashable, tuple[float, int]] = {}
        self._heap: list[tuple[tuple[float, int], Any]] = []
        self._serials = itertools.count(1)

    def _push(self, key: Hashable, rank: tuple[float, int]) -> None:
        # No signal handler and no finalizer runs between these two lines.
        self._ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))
        while len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap_anew()

    def _heap_anew(self) -> None:
        old = self._heap
        size = len(old)
        items = [(rank, key) for key, rank in list(self._ranks.items())]
        heapq.heapify(items)
        if self._heap is old and len(old) == size:  # otherwise a finalizer has pushed another item
            self._heap = items

    def touch(self, key: Hashable) -> bool:
        return key in self._ranks

    def discard(self, key: Hashable) -> None:
        """Take *key* out, if it is in."""
        self._ranks.pop(key, None)

    def pop(self) -> Any:
        while self._heap or self._ranks:
            if not self._heap:
                self._heap_anew()  # the comparison of a key has emptied the order in the middle of a change
            heap = self._heap
            if not heap:
                continue
            top = heap[0]
            key = top[1]
            rank = self._ranks.get(key)
            if not heap or heap[0] is not top or self._heap is not heap:
                continue  # the comparison of a key has changed the order
            if rank is not None and rank != top[0]:
                heapq.heapreplace(heap, (rank, key))
                continue
            if rank is not None:
                self._ranks.pop(key, None)
            item = heapq.heappop(heap)
            if item is not top:
                heapq.heappush(heap, item)  # another one came meanwhile; that of *key* is out of date by now
            if rank is not None:
                return key
        raise KeyError("nothing may leave")

    def reconcile(self, keys: Collection[Hashable]) -> None:
        """Hold exactly *keys* from now on: add those that are missing, and discard every other key."""
        for key in [key for key in list(self._ranks) if key not in keys]:
            self.discard(key)
        for key in keys:
            if key not in self._ranks:
                self.add(key)
        self._heap_anew()

    def add(self, key: Hashable) -> None:
        raise NotImplementedError

    def __contains__(self, key: object) -> bool:
        return key in self._ranks


class FrequencyOrder(_HeapOrder):
    """Least frequently used first; among equals the one that was used longest ago."""

    def touch(self, key: Hashable) -> bool:
        rank = self._ranks.get(key)
        if rank is None:
            return False
        rank = (rank[0] + 1, next(self._serials))
        # Not without a look: a finalizer may have taken it out since.
        if key in self._ranks:
            self._ranks[key] = rank
        return True

    def add(self, key: Hashable) -> None:
        """Put *key* in, as used once; if it is in already, count the write."""
        if not self.touch(key):
            self._push(key, (1, next(self._serials)))

    put_back = add


class ImportanceOrder(_HeapOrder):
    """Least important first; among equals the one that was ranked first."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Hashable, float] = {}  # also of what was popped, and may come back

    def rank(self, key: Hashable, importance: float) -> None:
        """Put *key* in with this importance, or change it."""
        serial = next(self._serials)
        self._known[key] = importance
        self._push(key, (importance, serial))

    def add(self, key: Hashable) -> None:
        """Put *key* back in, as important as it was last; one that was never ranked, as most important."""
        if key not in self._ranks:
            self.rank(key, self._known.get(key, math.inf))

    put_back = add

    def discard(self, key: Hashable) -> None:
        self._ranks.pop(key, None)
        self._known.pop(key, None)

    def reconcile(self, keys: Collection[Hashable]) -> None:
        super().reconcile(keys)
        for key in [key for key in list(self._known) if key not in keys]:
            self._known.pop(key, None)
