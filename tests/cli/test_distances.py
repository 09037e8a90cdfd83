"""What `hygiene size` says about every size at once is what a real LRU of that size would have done."""

from __future__ import annotations

import gzip
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene.cli.distances import ReuseProfile

pytestmark = pytest.mark.once


def replay(accesses, maxsize, idle=None):
    """Hits and the most entries held by an LRU as one writes it by hand."""
    last_use: OrderedDict[object, float] = OrderedDict()
    hits = most = 0
    for key, now in accesses:
        while idle is not None and last_use and now - next(iter(last_use.values())) >= idle:
            last_use.popitem(last=False)
        hits += key in last_use
        last_use[key] = now
        last_use.move_to_end(key)
        if maxsize is not None and len(last_use) > maxsize:
            last_use.popitem(last=False)
        most = max(most, len(last_use))
    return hits, most


def profiled(accesses, idles=()):
    profile = ReuseProfile(idles)
    for key, now in accesses:
        profile.access(key, now)
    return profile


def hits_at(curve, maxsize):
    return curve[min(maxsize, len(curve) - 1)]


IDLES = (1.0, 2.5, 4.0, 10.0)
STEPS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.0, 0.5, 1.0, 3.0])), max_size=300)


@pytest.mark.slow
@given(STEPS)
def test_hits_of_every_size_and_idle_limit_equal_a_replay(steps):
    """One pass gives the hits and the most entries held for each combination of the limits."""
    now, accesses = 0.0, []
    for key, step in steps:
        now += step
        accesses.append((key, now))
    combinations = [(maxsize, idle) for maxsize in range(1, 15) for idle in (None, *IDLES)]
    expected = [replay(accesses, maxsize, idle) for maxsize, idle in combinations]

    profile = profiled(accesses, IDLES)
    curves = {idle: profile.hit_curve(idle) for idle in (None, *IDLES)}
    actual = [(hits_at(curves[idle], maxsize), min(maxsize, profile.most_held(idle))) for maxsize, idle in combinations]

    assert expected == actual


@pytest.mark.slow
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(40, 80))
def test_positions_are_renumbered_without_changing_the_counts(pattern, repeats):
    """A log longer than the tree has room for is counted alike."""
    accesses = [(key, float(now)) for now, key in enumerate(pattern * repeats)]
    expected = [replay(accesses, maxsize, 25.0) for maxsize in (1, 3, 10, 50)]

    profile = profiled(accesses, [25.0])
    curve, most = profile.hit_curve(25.0), profile.most_held(25.0)
    actual = [(hits_at(curve, maxsize), min(maxsize, most)) for maxsize in (1, 3, 10, 50)]

    assert expected == actual


def test_memory_does_not_grow_with_the_accesses():
    """A hundred keys need the same room after ten thousand accesses as after one thousand."""
    profile = profiled((number % 100, 0.0) for number in range(1_000))
    expected = len(profile._tree)

    for number in range(9_000):
        profile.access(number % 100)

    assert expected == len(profile._tree)


def test_a_clock_that_goes_back_stands_still():
    """An access with an earlier time counts as one at the latest time."""
    profile = profiled([("a", 100.0), ("b", 40.0), ("a", 105.0), ("b", 109.0)], [10.0])

    assert [0, 0, 2] == profile.hit_curve(10.0)


def test_no_accesses_hit_nothing():
    """An empty profile answers instead of failing."""
    profile = ReuseProfile([1.0])

    assert ([0], [0], 0) == (profile.hit_curve(), profile.hit_curve(1.0), profile.most_held(1.0))


def test_an_idle_limit_that_was_not_counted_is_refused():
    """Idle limits must be named before the pass; the error lists the ones that were."""
    with pytest.raises(ValueError, match=r"one of the limits counted, \[60\.0\]; found 90"):
        ReuseProfile([60]).hit_curve(90)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cloudphysics", "sprite", "web12"])
def test_real_traces_equal_a_replay(name, real_data):
    """The hits on real traces are those of a replay, at a small and at a large size."""
    with gzip.open(real_data / f"trace_{name}.txt.gz") as lines:
        accesses = [(line, float(number)) for number, line in enumerate(lines)]
    idle = 5_000.0
    sizes = [100, 3_000]
    expected = [replay(accesses, size, limit)[0] for size in sizes for limit in (None, idle)]

    profile = profiled(accesses, [idle])
    actual = [hits_at(profile.hit_curve(limit), size) for size in sizes for limit in (None, idle)]

    assert expected == actual
