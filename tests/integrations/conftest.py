"""What the tests of the exporters share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from hygiene import Registry, RegistryStats

_serial = count()


class Broken(Registry[int, int]):
    """A registry that cannot be asked."""

    fails = True

    def stats(self) -> RegistryStats:
        if self.fails:
            raise ArithmeticError("cannot count")
        return super().stats()


@pytest.fixture
def name() -> str:
    """Other tests leave things behind that are alive, too."""
    return f"test-{next(_serial)}"


@pytest.fixture
def broken(name: str) -> Iterator[Broken]:
    """A registry that cannot be asked, until its ``fails`` is set to false."""
    registry = Broken(name=name)
    yield registry
    registry.fails = False  # the log has it, and so it may be alive in the tests that follow
