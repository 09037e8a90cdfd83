"""What leaves a registry, and why: the records that hooks are handed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

__all__ = ["Cause", "Entry", "RegistryStats", "Removal"]

K = TypeVar("K")
V = TypeVar("V")


class Cause(enum.StrEnum):
    """Why an entry left."""

    SIZE = "size"
    """Evicted: the registry held more than *maxsize* entries."""
    BYTES = "bytes"
    """Evicted: the registry held more than *max_bytes*."""
    EXPIRED = "expired"
    """Its *ttl* was over: that long ago it was last written."""
    IDLE = "idle"
    """Its *idle* time was over: that long ago it was last used."""
    PRESSURE = "pressure"
    """Evicted by request: ``trim()`` or ``evict()``."""
    REPLACED = "replaced"
    """Another value was written under its key."""
    DELETED = "deleted"
    """The caller took it: ``del``, ``pop``, ``popitem``."""
    CLEARED = "cleared"
    """``clear()``."""
    CLOSED = "closed"
    """The registry was closed, or its attribute rebound."""

    # Counting by cause is on the path of every eviction, and Enum's own hash is a Python function.
    __hash__ = str.__hash__

    @property
    def ours(self) -> bool:
        """Whether the registry decided (so it releases the value), not the caller."""
        return self in _OURS


_OURS = frozenset({Cause.SIZE, Cause.BYTES, Cause.EXPIRED, Cause.IDLE, Cause.PRESSURE, Cause.CLOSED})


@dataclass(frozen=True, slots=True)
class Entry(Generic[K, V]):
    """One key and its value, as *busy* and *importance* callables are asked about it."""

    key: K
    value: V
    owner: Any = None
    """The object whose attribute the registry is, or ``None``."""


@dataclass(frozen=True, slots=True)
class Removal(Generic[K, V]):
    """
    One entry that has left, told to ``on_evict`` exactly once, after the registry's lock was released.

    The times are seconds of the registry's *timer*.
    """

    key: K
    value: V
    cause: Cause
    owner: Any = None
    """The object whose attribute the registry is, or ``None``."""
    age: float | None = None
    """Seconds since it was last written."""
    idle_for: float | None = None
    """Seconds since it was last used."""
    name: str | None = field(default=None, compare=False)
    """What the registry is called: of several attributes with one hook, the one that it left."""


@dataclass(frozen=True, slots=True)
class RegistryStats:
    """A registry's numbers at one moment."""

    entries: int
    """Entries held now, counting those whose time is over and that have not been dropped yet."""
    bytes: int | None
    """Estimated bytes held; ``None`` without *max_bytes*."""
    hits: int
    """Lookups (``r[k]``, ``get``, ``setdefault``, ``lease``) that found their entry."""
    misses: int
    """Lookups that did not."""
    rehydrated: int
    """Lookups answered by an evicted value that was still alive, or by a store; counted as hits too."""
    evictions: Mapping[Cause, int]
    """What the registry dropped by its own decision; a cause that never happened is absent."""
    leased: int
    """Entries that somebody holds a lease on."""
    overflowing: int
    """Entries beyond *maxsize* now, because everything older is busy or leased."""
    hook_errors: int
    """Hooks (``on_evict``, ``close``, ``busy``, ``getsizeof``, ...) that raised; logged, of each once a minute."""
    forgotten: int = 0
    """Evicted values that were still referenced, and are not found again because more were evicted after them."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """
    A pool's numbers at one moment.

    ``opened == in_use + idle + closed``, and ``in_use + idle + opening <= max_size`` unless `resize` has just lowered
    it. A resource that is being checked, reset or closed counts as in use.
    """

    max_size: int
    """Resources that may be open at once."""
    in_use: int
    """Resources that somebody holds."""
    idle: int
    """Resources that are open and free."""
    opening: int
    """Resources that are being opened."""
    waiting: int
    """Callers who wait."""
    opened: int
    """Resources opened since the pool was made."""
    closed: int
    """Resources closed since then, or forgotten because nothing could close them."""
    acquired: int
    """Times that a resource was handed out."""
    timeouts: int
    """Callers who waited in vain."""
    dropped: int
    """Leases that were collected without having been released."""
    hook_errors: int
    """Times that ``check``, ``reset`` or ``close`` raised or took too long; logged, of each once a minute."""
