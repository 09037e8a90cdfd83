"""Hit ratios of an LRU registry for every size at once, from one pass over its accesses."""

# Theory of operation
#
# Stack distance. An LRU registry of S entries holds the S keys used last. So an access hits if and only if fewer than
# S other keys were used since the last access to its key; that number is its distance [1]. One pass that counts
# distances tells the hits of every size: hits(S) = the accesses with a distance below S.
#
# Idle. An entry also leaves once ``now - last use >= idle``. Entries expire in the order of their last use, which is
# the order of the stack: what expires is always its lower end, and nothing above a live entry is affected. So with both
# limits an access hits if and only if its distance is below S and its gap (time since the last access to its key) is
# below the idle limit, and the registry holds min(S, keys used within the idle limit). Both are exact.
#
# Counting. Each access gets the next position; only the last position of each key is live. The distance is the number
# of live positions after the key's last one, kept in a Fenwick tree [2]: O(log n) an access. Positions are renumbered
# when they run out, at most once every n accesses, so memory is O(keys) however long the log is.
#
# [1] R. L. Mattson, J. Gecsei, D. R. Slutz, I. L. Traiger: Evaluation techniques for storage hierarchies, IBM Systems
#     Journal 9(2), 1970.
# [2] P. M. Fenwick: A new data structure for cumulative frequency tables, Software: Practice and Experience 24(3),
#     1994.

from __future__ import annotations

from array import array
from bisect import bisect_right
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

__all__ = ["ReuseProfile"]

_SMALLEST_TREE = 1024


class ReuseProfile:
    """
    What an LRU registry of any size would have hit, with and without an idle limit.

    Memory grows with the distinct keys, not with the accesses. Not safe to share between threads.

    Args:
        idles: The idle limits to tell apart, in seconds; any order. They must be known before the pass, sizes need not.
    """

    def __init__(self, idles: Sequence[float] = ()) -> None:
        self.idles = sorted({float(idle) for idle in idles})
        self.accesses = 0
        self._now = 0.0
        self._last: dict[Hashable, int] = {}
        # Re-uses by distance, one histogram for each interval between two idle limits.
        self._reuses = [array("Q") for _ in range(len(self.idles) + 1)]
        self._capacity = _SMALLEST_TREE
        self._next = 1
        self._tree = [0] * (self._capacity + 1)
        self._times = array("d", bytes(8 * (self._capacity + 1)))
        self._live = bytearray(self._capacity + 1)
        # For each idle limit: the first position not yet looked at for expiry, keys held now, most keys held.
        self._oldest = [1] * len(self.idles)
        self._held = [0] * len(self.idles)
        self._most = [0] * len(self.idles)

    @property
    def keys(self) -> int:
        """Distinct keys seen."""
        return len(self._last)

    def access(self, key: Hashable, now: float = 0.0) -> None:
        """
        Count one access.

        Args:
            key: What was accessed.
            now: Seconds on any clock; a time before an earlier one counts as that one.
        """
        if self._next > self._capacity:
            self._renumber()
        self._now = now = max(now, self._now)
        self.accesses += 1
        position = self._next
        previous = self._last.get(key)
        if previous is None:
            self._arrived(len(self.idles), now)
            self._add(position)
        else:
            interval = bisect_right(self.idles, now - self._times[previous])
            histogram = self._reuses[interval]
            distance = self._between(previous, position)
            if distance >= len(histogram):
                histogram.frombytes(bytes(8 * (distance + 1 + len(histogram) // 8 - len(histogram))))
            histogram[distance] += 1
            # Before the old position dies: for these limits the key had expired, and must be counted out first.
            self._arrived(interval, now)
            self._live[previous] = 0
            self._move(previous, position)
        self._last[key] = position
        self._times[position] = now
        self._live[position] = 1
        self._next = position + 1

    def hit_curve(self, idle: float | None = None) -> list[int]:
        """
        Hits by size: item S is the number of accesses that a registry of *maxsize* S would have hit.

        The list ends where a larger size no longer helps, so its last item is the most that can hit.

        Args:
            idle: One of the limits given at the start, in seconds; ``None`` for no limit.

        Raises:
            ValueError: *idle* was not given at the start.
        """
        intervals = self._reuses if idle is None else self._reuses[: self._index(idle) + 1]
        curve = list(accumulate(map(sum, zip_longest(*intervals, fillvalue=0)), initial=0))
        while len(curve) > 1 and curve[-2] == curve[-1]:
            curve.pop()
        return curve

    def most_held(self, idle: float | None = None) -> int:
        """
        The most entries a registry without *maxsize* would have held at once.

        Args:
            idle: One of the limits given at the start, in seconds; ``None`` for no limit.

        Raises:
            ValueError: *idle* was not given at the start.
        """
        return self.keys if idle is None else self._most[self._index(idle)]

    def _index(self, idle: float) -> int:
        if idle not in self.idles:
            raise ValueError(
                f"idle must be one of the limits counted, {self.idles}; found {idle!r}. Name it before the pass"
            )
        return self.idles.index(idle)

    def _arrived(self, limits: int, now: float) -> None:
        """Count a key in for the first *limits* idle limits, which do not hold it, after what has expired by *now*."""
        times, live = self._times, self._live
        for index in range(limits):
            idle = self.idles[index]
            oldest, held = self._oldest[index], self._held[index]
            # The same subtraction as for the gap, so that rounding decides alike.
            while oldest < self._next and now - times[oldest] >= idle:
                held -= live[oldest]
                oldest += 1
            self._oldest[index], self._held[index] = oldest, held + 1
            self._most[index] = max(self._most[index], held + 1)

    def _between(self, previous: int, position: int) -> int:
        """Live positions after *previous* and before *position*."""
        tree = self._tree
        count, high, low = 0, position - 1, previous
        # Both prefix sums share their tail: stop where the paths meet, so near re-uses are cheap.
        while high > low:
            count += tree[high]
            high &= high - 1
        while low > high:
            count -= tree[low]
            low &= low - 1
        return count

    def _add(self, position: int) -> None:
        tree, capacity = self._tree, self._capacity
        while position <= capacity:
            tree[position] += 1
            position += position & -position

    def _move(self, previous: int, position: int) -> None:
        # The capacity is a power of two, which is on both paths: they always meet, and from there on nothing changes.
        tree = self._tree
        while previous != position:
            if previous < position:
                tree[previous] -= 1
                previous += previous & -previous
            else:
                tree[position] += 1
                position += position & -position

    def _renumber(self) -> None:
        """Give the live positions the numbers from 1 on, in order, with as much room again."""
        live = self._live
        before = list(accumulate(live))
        self._oldest = [before[oldest - 1] + 1 for oldest in self._oldest]
        order = sorted(self._last.items(), key=lambda item: item[1])
        self._last = {key: number for number, (key, _) in enumerate(order, 1)}
        count = len(order)
        while self._capacity < 2 * count:
            self._capacity *= 2
        room = self._capacity + 1
        times = array("d", bytes(8 * room))
        for number, (_, position) in enumerate(order, 1):
            times[number] = self._times[position]
        self._times = times
        self._live = bytearray(b"\0" + b"\1" * count + bytes(room - 1 - count))
        tree = [0] + [1] * count + [0] * (room - 1 - count)
        for index in range(1, room):
            parent = index + (index & -index)
            if parent < room:
                tree[parent] += tree[index]
        self._tree = tree
        self._next = count + 1
