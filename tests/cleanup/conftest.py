"""An empty list of cleanups for each test, and a loop in another thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from hygiene import cleanup, closing

PATIENCE = 20.0


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What other tests have registered is not this test's to shut down, and the other way round."""
    monkeypatch.setattr(closing, "_everywhere", {})
    for name in ("_exit", "_pressure", "_intervals", "_current"):
        monkeypatch.setattr(cleanup, name, {})
    yield
    cleanup._intervals.clear()


@pytest.fixture
def loop_elsewhere() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE)
    loop.close()
