"""Nothing is leaked and nothing is given up twice."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

KINDS = ["read", "overwrite", "evict", "delete", "expire", "lease", "clear", "past", "walk", "make_and_drop"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_references_after_as_before(run: Callable[..., str], pure: bool, kind: str) -> None:
    """Thousands of operations leave the references to keys and values, and the memory in use, as they were."""
    if pure and kind == "past":
        pytest.skip("who goes past the Python body is in no order")
    run("references.py", kind, 1_000, pure=pure)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_after_a_hundred_thousand(run: Callable[..., str], compiled: ModuleType, kind: str) -> None:
    """As above, for long enough that one in a thousand would be seen."""
    run("references.py", kind, 100_000)
