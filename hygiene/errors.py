"""Exceptions: one root, few leaves.

A wrong argument is a plain ``ValueError`` or ``TypeError``; a class of our own exists only where somebody would
write an ``except`` for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hygiene.events import RegistryStats

__all__ = ["HygieneError", "RegistryFull"]


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
