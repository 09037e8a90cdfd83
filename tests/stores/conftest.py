"""What the tests of the stores share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene.stores import SQLiteStore
from hygiene.testing import ManualClock

ROOT = Path(__file__).resolve().parent.parent.parent


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


@pytest.fixture
def elsewhere() -> Callable[..., subprocess.Popen[bytes]]:
    """Runs a piece of Python in another process, with the arguments in ``argv``; pipes are open on both sides."""

    def start(code: str, *argv: Any, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *map(str, argv)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            **options,
        )

    return start
