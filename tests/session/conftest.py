"""A clock for event loops, so that a test for a timeout takes no time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest


def clock_of(loop: asyncio.AbstractEventLoop) -> Callable[[float], None]:
    """What moves the clock of *loop* forwards by some seconds; what is due by then happens in its next step."""
    ahead = 0.0
    real = loop.time
    changed: Any = loop
    changed.time = lambda: real() + ahead

    def advance(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    return advance


@pytest.fixture
async def advance() -> Callable[[float], None]:
    """Moves the clock of the test's event loop forwards."""
    return clock_of(asyncio.get_running_loop())


@pytest.fixture
def with_clock() -> Callable[[Callable[[Callable[[float], None]], Any]], Any]:
    """Runs an async function, which is given what moves its loop's clock, as `asyncio.run` does."""

    def run(main: Callable[[Callable[[float], None]], Any]) -> Any:
        with asyncio.Runner() as runner:
            return runner.run(main(clock_of(runner.get_loop())))

    return run
