"""Exceptions: one root, few leaves.

A wrong argument is a plain ``ValueError`` or ``TypeError``; a class of our own exists only where somebody would
write an ``except`` for it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hygiene.events import PoolStats, RegistryStats

__all__ = [
    "HOOK_ERRORS",
    "HygieneError",
    "LeaseTimeout",
    "NotStorable",
    "OwnershipLost",
    "PoolClosed",
    "PoolFull",
    "PoolTimeout",
    "RegistryFull",
    "StoreError",
    "StoreUnavailable",
    "VersionConflict",
]


HOOK_ERRORS = (Exception, asyncio.CancelledError, SystemExit)
"""
What a hook of the user may raise without the caller hearing of it. Only Ctrl-C goes through.

The result of a future that was cancelled is a ``CancelledError`` in code that nobody has cancelled.
"""


class HygieneError(Exception):
    """Root of every exception that this library raises on its own account."""


class RegistryFull(HygieneError):
    """
    A new entry was refused, and nothing was changed: the registry is at its bound and nothing in it may leave.

    Raised only with ``overflow="raise"``. The numbers ride along in *stats*.
    """

    def __init__(self, message: str, stats: RegistryStats | None = None) -> None:
        super().__init__(message)  # one required argument, so the error survives pickling
        self.stats = stats


class LeaseTimeout(HygieneError, TimeoutError):
    """
    A lease was not acquired within its *timeout*: another caller, or another process, did not finish in time.

    It is a ``TimeoutError``, too. No factory was called for it, and nothing has to be released. *stats* has the
    registry's numbers.
    """

    def __init__(self, message: str, stats: RegistryStats | None = None) -> None:
        super().__init__(message)
        self.stats = stats


class PoolTimeout(HygieneError, TimeoutError):
    """
    No resource became free before the deadline. The numbers ride along in *stats*.

    It is a ``TimeoutError``, too. Nothing was taken, so nothing has to be given back.
    """

    def __init__(self, message: str, stats: PoolStats | None = None) -> None:
        super().__init__(message)
        self.stats = stats


class PoolFull(HygieneError):
    """
    Refused at once: as many callers wait already as the pool lets wait (*max_waiting*).

    The numbers ride along in *stats*.
    """

    def __init__(self, message: str, stats: PoolStats | None = None) -> None:
        super().__init__(message)
        self.stats = stats


class PoolClosed(HygieneError):
    """The pool was closed, before the call or while it waited."""


class StoreError(HygieneError):
    """A store cannot do what was asked, and asking again does not help: closed, damaged, of another version."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, or not be written to, now: locked, disk full, read-only. Asking again may help."""

    uncertain: bool = False
    """Whether a save may have been applied although it raised: its reply was lost. The same call again finds out."""


class VersionConflict(StoreError):
    """
    Somebody else has saved the entry since the version that a save was built on. Nothing was saved.

    Load it again and decide. What conflicts rides along in *conflicts*, the whole rejected batch in *unsaved*.
    """

    def __init__(
        self,
        message: str,
        conflicts: tuple[tuple[str, Any, int, int], ...] = (),
        unsaved: tuple[tuple[str, Any], ...] = (),
    ) -> None:
        super().__init__(message)
        self.conflicts = conflicts
        """Space, key, the version that was built on, and the version found; 0: no such entry."""
        self.unsaved = unsaved
        """Space and key of each change that was not saved because of it."""


class OwnershipLost(StoreError):
    """A save came too late: the lease it was made under is over, and somebody else owns the entry."""


class NotStorable(HygieneError, TypeError):
    """A value or key that a store could not give back as it is. It is a ``TypeError``, too."""
