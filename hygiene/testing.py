"""Helpers for the tests of code that uses hygiene."""

from __future__ import annotations

__all__ = ["ManualClock"]


class ManualClock:
    """
    A clock that stands still until it is told to go on: pass it as *timer*.

    The janitor leaves registries with such a clock alone, so that a test is the only one who moves anything.

    Args:
        now: Seconds to begin with.
    """

    manual = True
    """What keeps the janitor, which lives in real time, away: call ``expire()`` where a test needs it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Seconds now."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass; they cannot be negative."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock goes forwards; found {seconds} s")
        self.now += seconds

    def __repr__(self) -> str:
        return f"ManualClock({self.now})"
