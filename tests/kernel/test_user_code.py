"""User code in the middle of everything. What crashes is seen as a failing test: each runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bare", "registry"])
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_registry_survives_what_is_done_to_it_from_within(
    run: Callable[..., str], pure: bool, what: str, seed: int
) -> None:
    """Keys, values and hooks may use the registry, go past it, raise and collect garbage while it works.

    No value is wrong then, nothing is lost to the order of eviction, and the bound is kept again.
    """
    assert "all rounds done" in run("fuzz.py", what, seed, 250, pure=pure)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("what", ["bare", "registry"])
def test_a_registry_survives_it_for_long(run: Callable[..., str], pure: bool, what: str) -> None:
    """As above, two thousand times."""
    assert "all rounds done" in run("fuzz.py", what, 77, 2_000, pure=pure)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adopt", "dying", "oldest", "order", "overwritten", "reinsert"])
def test_code_that_runs_at_a_bad_moment_does_no_harm(run: Callable[..., str], pure: bool, case: str) -> None:
    """Each of these crashed a kernel once, or broke its bound."""
    if pure and case in {"adopt", "oldest", "reinsert"}:
        pytest.skip("an OrderedDict itself does not survive this")
    run("after.py", case, pure=pure)


@pytest.mark.slow
def test_threads_with_any_kind_of_key_keep_the_bound(run: Callable[..., str], pure: bool) -> None:
    """Four threads at once, keys that compare in C and in Python: values are true, and the bound holds at rest."""
    run("threads.py", pure=pure)
