"""Who leaves next: the orders in which entries may be evicted.

An order holds keys only, the evictable ones: what is leased or busy is taken out by its owner and put back when it is
free. No lock, no clock, no I/O; the owner calls it under its own lock, except `touch` of a `LinkedOrder`.

The plain LRU and FIFO registries need none of these: the kernel keeps that order by itself. An order *beside* it is for
policies that are not a list, and where entries must leave the order without leaving the registry; for these there is
the kernel's `LinkedOrder`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import cachetools

__all__ = ["CachetoolsOrder", "ImportanceOrder", "Order"]


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

    def __contains__(self, key: object) -> bool: ...


class CachetoolsOrder:
    """The order that a cachetools cache keeps: an LFU, or any class of the reader's own.

    The cache holds keys without a bound of its own and is asked only for its next victim (``popitem``).
    """

    def __init__(self, cache: Callable[..., cachetools.Cache[Any, None]]) -> None:
        self._cache = cache(maxsize=math.inf)

    def touch(self, key: Hashable) -> bool:
        try:
            self._cache[key]
        except KeyError:
            return False
        return True

    def add(self, key: Hashable) -> None:
        self._cache[key] = None

    put_back = add

    def discard(self, key: Hashable) -> None:
        self._cache.pop(key, None)

    def pop(self) -> Any:
        return self._cache.popitem()[0]

    def __contains__(self, key: object) -> bool:
        return key in self._cache


class ImportanceOrder:
    """
    Least important first; among equals the one that was ranked first.

    A heap with lazy deletion: `rank` pushes a fresh item and forgets the old one, `pop` skips what is stale, so both
    are O(log n). Stale items are swept out when they outnumber the live ones.
    """

    def __init__(self) -> None:
        self._ranks: dict[Hashable, tuple[float, int]] = {}
        self._known: dict[Hashable, float] = {}  # also of what was popped, and may come back
        self._heap: list[tuple[float, int, Any]] = []
        self._serial = 0

    def rank(self, key: Hashable, importance: float) -> None:
        """Put *key* in with this importance, or change it."""
        self._serial += 1
        self._ranks[key] = (importance, self._serial)
        self._known[key] = importance
        heapq.heappush(self._heap, (importance, self._serial, key))
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [(*rank, key) for key, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def touch(self, key: Hashable) -> bool:
        return key in self._ranks

    def add(self, key: Hashable) -> None:
        """Put *key* back in, as important as it was last; one that was never ranked, as most important."""
        if key not in self._ranks:
            self.rank(key, self._known.get(key, math.inf))

    put_back = add

    def discard(self, key: Hashable) -> None:
        self._ranks.pop(key, None)
        self._known.pop(key, None)

    def pop(self) -> Any:
        while self._heap:
            importance, serial, key = heapq.heappop(self._heap)
            if self._ranks.get(key) == (importance, serial):
                del self._ranks[key]
                return key
        raise KeyError("nothing may leave")

    def __contains__(self, key: object) -> bool:
        return key in self._ranks
