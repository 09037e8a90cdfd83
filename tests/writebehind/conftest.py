"""What the tests of write-behind share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene.stores import SQLiteStore
from hygiene.testing import ManualClock

PATIENCE = 20.0


class Faulty:
    """A real store that can be told to fail, and to stop in the middle of a save."""

    def __init__(self, store: SQLiteStore) -> None:
        self.store = store
        self.error: BaseException | None = None
        """What each save raises, in the place of saving."""
        self.poison: dict[Any, Exception] = {}
        """What a save raises that has one of these keys in it."""
        self.gate = threading.Event()
        """Each save waits for it."""
        self.gate.set()
        self.entered = threading.Semaphore(0)
        """Counts the saves that have begun."""
        self.batches: list[tuple[list[Any], bool]] = []
        """Keys and ``sync`` of each save that succeeded."""

    def save(self, changes: Any, *, sync: bool = False) -> Any:
        self.entered.release()
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        for change in changes:
            if change.key in self.poison:
                raise self.poison[change.key]
        heads = self.store.save(changes, sync=sync)
        self.batches.append(([change.key for change in changes], sync))
        return heads

    def begun(self) -> None:
        """Wait until one more save has begun."""
        assert self.entered.acquire(timeout=PATIENCE)

    def decode(self, data: bytes) -> Any:
        return self.store.decode(data)

    def value(self, key: Any) -> Any:
        """What is stored, whatever is pending."""
        record = self.store.load("default", key)
        return None if record is None else record.value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store may be made."""
    return tmp_path / "chats.db"


@pytest.fixture
def store(path: Path) -> Iterator[Faulty]:
    """An empty store that can be made to fail."""
    with SQLiteStore(path) as opened:
        faulty = Faulty(opened)
        yield faulty
        faulty.gate.set()


@pytest.fixture
def make_faulty() -> type[Faulty]:
    return Faulty
