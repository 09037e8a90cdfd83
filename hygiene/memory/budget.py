"""One total for several components, each with its share.

Theory of operation

A share is a number, so a registry takes it as its *max_bytes* and asks nobody. The budget finds the registries whose
limit is one of its shares, looks at what they hold, and sets the bound of each: once a second, in the janitor's thread,
with a look at every registry of the process. The bounds of one share add up to what the share may have, so they hold
without another look, from one second to the next.

An elastic share may have more while others have less than theirs. What others hold, and an eighth of their share on
top, is not lent. What they claim after all they have at once, because their own bound is never lowered; the borrower
gives it back at the next look, and at once when memory is short.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from hygiene.cleanup import Cleanup, register_cleanup
from hygiene.janitor import alive, aside, janitor, survive_fork
from hygiene.registry import Registry
from hygiene.units import Duration, Size, nbytes, seconds

__all__ = ["MemoryBudget", "MemoryShare", "ShareUsage"]


_HEADROOM = 8
"""Which part of its share somebody who lends keeps on top of what he holds, for the second until the next look."""
_WANTS = 0.9
"""The part of its share from which on an elastic one is given more."""
_RESTRAINT = 60.0
"""Seconds after pressure in which nothing is lent."""


@dataclass(frozen=True, slots=True)
class ShareUsage:
    """What one component has, in bytes."""

    name: str
    size: int
    """What it is guaranteed."""
    allowed: int
    """What it may have now: more than its *size* if it borrows."""
    used: int
    """What its registries hold, by their own estimate."""
    registries: int
    """How many of them there are."""
    elastic: bool
    """Whether it may borrow."""


class MemoryShare(int):
    """
    A component's part of a `MemoryBudget`: a number of bytes, to be passed as *max_bytes*.

    Made by `MemoryBudget.share`. Several registries may have the same share; it is divided between them by what they
    hold. A copy in another process, by pickle, is a plain number.
    """

    name: str
    """What the component is called."""
    budget: MemoryBudget
    """What it is a part of."""
    elastic: bool
    """Whether it may borrow what others do not use."""
    _allowed: int

    def __new__(cls, size: int, name: str, budget: MemoryBudget, elastic: bool) -> Self:  # noqa: FBT001 - private
        """Not to be called: see `MemoryBudget.share`."""
        share = super().__new__(cls, size)
        share.name, share.budget, share.elastic, share._allowed = name, budget, elastic, size
        return share

    @property
    def allowed(self) -> int:
        """Bytes that it may have now; above its own number while it borrows."""
        return self._allowed

    @property
    def used(self) -> int:
        """Bytes that its registries hold."""
        return self.budget.usage()[self.name].used

    def __repr__(self) -> str:
        return f"<MemoryShare {self.name!r} of {int(self)} bytes{', elastic' if self.elastic else ''}>"

    __str__ = int.__repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


class MemoryBudget:
    """
    So much memory for all: components have shares of it, which together cannot be more.

    ``Registry(max_bytes=budget.share("chat", "200MiB"))``, and the same with the decorators. What counts is what
    registries with *max_bytes* measure: the estimated bytes of their values, not the resident size of the process.

    It holds registries weakly, and lives as long as anybody holds it or one of its shares. Safe to use from any
    thread, and after a fork.

    Args:
        total: Bytes, or text such as ``"512MiB"``. Leave room for what is in no registry: the interpreter and the
            modules take 30 to 300 MB.
        interval: Seconds, or text, between two looks at what is used. 1: for so long may an elastic share keep what
            others claim, and a share with several registries be exceeded by a new one.

    Raises:
        ValueError: a number is not positive, or text is not understood.
        TypeError: an argument is of the wrong kind.
    """

    def __init__(self, total: Size, *, interval: Duration = 1.0, timer: Callable[[], float] = time.monotonic) -> None:
        self.total = nbytes(total, "total")
        """Bytes for all."""
        self._interval = seconds(interval, "interval")
        self._timer = timer
        self._shares: dict[str, MemoryShare] = {}
        self._lock = threading.RLock()
        self._restrained_until = -float("inf")
        self._relief: Cleanup[..., Any] | None = None
        survive_fork(self)

    def __repr__(self) -> str:
        return f"<MemoryBudget {self.total - self.free} of {self.total} bytes in {len(self._shares)} shares>"

    def __str__(self) -> str:
        lines = [f"{self.total - self.free:,} of {self.total:,} bytes shared out, {self.used:,} used"]
        lines += [
            f"  {one.name}: {one.used:,} of {one.allowed:,}"
            f"{f' ({one.size:,} and borrowed)' if one.allowed > one.size else ''} in {one.registries} registries"
            for one in self.usage().values()
        ]
        return "\n".join(lines)

    @property
    def free(self) -> int:
        """Bytes that are in no share."""
        return self.total - sum(self._shares.values())

    @property
    def used(self) -> int:
        """Bytes that the registries of all shares hold."""
        return sum(one.used for one in self.usage().values())

    def share(self, name: str, size: Size, *, elastic: bool = False) -> MemoryShare:
        """
        A part of it, to be passed as *max_bytes*.

        Args:
            name: What the component is called; one name is given once.
            size: Bytes, or text such as ``"200MiB"``, that it can always have.
            elastic: Whether it may have more while others do not use theirs. It gives that back, by evicting, within
                the *interval* when they do, and at once when memory is short.

        Raises:
            ValueError: so much is not left, *name* is taken, or *size* is not positive.
        """
        wanted = nbytes(size, "size")
        with self._lock:
            if name in self._shares:
                raise ValueError(f"the budget has a share {name!r} already; give each component a name of its own")
            if wanted > self.free:
                raise ValueError(
                    f"share {name!r} of {wanted:,} bytes does not fit: {self.free:,} of {self.total:,} are left. "
                    f"Lower a share, or raise the total"
                )
            share = self._shares[name] = MemoryShare(wanted, name, self, elastic)
            if len(self._shares) == 1 and not getattr(self._timer, "manual", False):
                janitor.watch(self, self._interval)
            if elastic and self._relief is None:
                reference = weakref.ref(self)
                self._relief = register_cleanup(lambda: _give_back(reference), on="pressure", name="memory budget")
                weakref.finalize(self, self._relief.cancel)
        return share

    def usage(self) -> dict[str, ShareUsage]:
        """What each component has now, by name."""
        users = self._users()
        return {
            name: ShareUsage(
                name, int(share), share._allowed, sum(map(_bytes, users[name])), len(users[name]), share.elastic
            )
            for name, share in list(self._shares.items())
        }

    def balance(self) -> None:
        """
        Look at what is used, and set the bounds by it: what the janitor does once in an *interval*.

        What is over then is evicted here, so hooks and closers of the registries run in this thread.
        """
        self._sweep(self._balance())

    def give_back(self) -> None:
        """Have every share keep to its own size, now and for a minute. Runs by itself when memory is short."""
        with self._lock:
            self._restrained_until = self._timer() + _RESTRAINT
        self.balance()

    def _balance(self) -> list[Registry[Any, Any]]:
        """Set the bounds; returns what is over them."""
        over = []
        with self._lock:
            users = self._users()
            used = {name: sum(map(_bytes, registries)) for name, registries in users.items()}
            for name, allowed in self._allowances(used).items():
                self._shares[name]._allowed = allowed
                for registry, bound in _divided(users[name], allowed):
                    registry._byte_bound = bound
                    if registry._over() and not registry._overflowed:  # or all of it is leased, and was found so
                        over.append(registry)
        return over

    def _allowances(self, used: dict[str, int]) -> dict[str, int]:
        shares = self._shares
        if self._timer() < self._restrained_until:
            return {name: int(share) for name, share in shares.items()}
        hungry = {name: int(share) for name, share in shares.items() if share.elastic and used[name] >= _WANTS * share}
        kept = sum(
            int(share) if name in hungry else min(int(share), used[name] + int(share) // _HEADROOM)
            for name, share in shares.items()
        )
        spare, weight = self.total - kept, sum(hungry.values())
        return {
            name: int(share) + (spare * hungry[name] // weight if name in hungry else 0)
            for name, share in shares.items()
        }

    @staticmethod
    def _sweep(registries: list[Registry[Any, Any]]) -> None:
        for registry in registries:
            registry._sweep()

    def _users(self) -> dict[str, list[Registry[Any, Any]]]:
        """The registries of each share. Of columns that share one life the rows are meant."""
        users: dict[str, list[Registry[Any, Any]]] = {name: [] for name in list(self._shares)}
        for registry in alive(Registry):
            share = registry._limits.max_bytes
            if isinstance(share, MemoryShare) and share.budget is self and registry.group is None:
                users[share.name].append(registry)
        return users

    def _visit(self) -> float | None:
        if over := self._balance():
            aside(lambda: self._sweep(over), "memory-budget")  # hooks and closers may hang
        return self._interval

    def _after_fork(self) -> None:
        self._lock = threading.RLock()


def _give_back(reference: Callable[[], MemoryBudget | None]) -> None:
    if (budget := reference()) is not None:
        budget.give_back()


def _bytes(registry: Registry[Any, Any]) -> int:
    return registry._bytes


def _divided(registries: list[Registry[Any, Any]], allowed: int) -> list[tuple[Registry[Any, Any], int]]:
    """A bound for each, that add up to *allowed*: what it holds, less for the largest or more for all."""
    held = sorted(((registry, registry._bytes) for registry in registries), key=lambda one: one[1])
    free = allowed - sum(size for _, size in held)
    if free >= 0:
        more = free // len(held) if held else 0
        return [(registry, max(size + more, 1)) for registry, size in held]
    # Nobody is cut below an equal part: the smallest keep what they hold, and the rest is equal parts of the rest.
    bounds = []
    for place, (registry, size) in enumerate(held):
        bound = min(size, allowed // (len(held) - place))
        allowed -= bound
        bounds.append((registry, max(bound, 1)))
    return bounds
