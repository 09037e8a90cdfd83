"""For the tests of code that uses hygiene: a clock to turn by hand, and waiting for background work without sleeping.

The pytest plugin, which fails a test that leaves something behind, is the module `pytest_hygiene`; what it looks for is
in `hygiene.testing.leaks`.
"""

from __future__ import annotations

from hygiene.testing.settling import asettle, settle

__all__ = ["ManualClock", "asettle", "settle"]


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
