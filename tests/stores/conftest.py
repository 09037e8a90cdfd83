"""What the tests of the stores share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hygiene.stores import SQLiteStore
from hygiene.testing import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store may be made."""
    return tmp_path / "chats.db"


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, path: Path, clock: ManualClock) -> Iterator[SQLiteStore]:
    """An empty store of each kind."""
    with SQLiteStore(path if request.param == "file" else ":memory:", timer=clock) as opened:
        yield opened
