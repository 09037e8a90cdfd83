"""What the tests of the registry share."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hygiene.testing import ManualClock

PATIENCE = 10.0  # seconds: a wait that takes longer than this on the slowest machine is a deadlock


def run_elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """What *function* returns in another thread; a lock that this thread holds would make it time out."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((function(*args), None))
        except BaseException as error:  # noqa: BLE001 - it is raised again, where somebody sees it
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not outcome:
        raise TimeoutError("the other thread is still waiting: somebody holds the lock")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def run_together(*functions: Callable[[], Any]) -> None:
    """Run each function in a thread of its own, all at once; the first exception is raised here."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> None:
        try:
            start.wait(PATIENCE)
            function()
        except BaseException as error:  # noqa: BLE001 - it is raised again, where somebody sees it
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.fixture
def clock() -> ManualClock:
    """A clock that the test moves by hand."""
    return ManualClock(1000.0)


@pytest.fixture
def elsewhere() -> Callable[..., Any]:
    """Run a function in another thread, with a timeout."""
    return run_elsewhere


@pytest.fixture
def together() -> Callable[..., None]:
    """Run functions in threads of their own, all at once."""
    return run_together


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that are switched at nearly every opportunity, so that races come up in a short test."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The cycle collector switched off: what dies now dies by its reference count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
