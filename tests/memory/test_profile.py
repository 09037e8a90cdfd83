"""Which lines hold more memory than before, and tracing that ends when nobody needs it any more."""

from __future__ import annotations

import functools
import gc
import logging
import re
import threading
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from hygiene.memory.profile import LineGrowth, MemoryProfile, profile_memory

PATIENCE = 20.0
KEPT: list[Any] = []


@pytest.fixture(autouse=True)
def untraced() -> Iterator[None]:
    """Nobody traces before or after a test."""
    assert not tracemalloc.is_tracing()
    yield
    KEPT.clear()
    assert not tracemalloc.is_tracing()


def keep(size: int) -> None:
    KEPT.append(bytearray(size))


def drop() -> None:
    KEPT.clear()


# The line in `keep` that allocates.
LINE = keep.__code__.co_firstlineno + 1


@pytest.mark.slow
def test_the_line_that_holds_more_than_before_comes_first() -> None:
    """With its file, its number, and the bytes it has not given back."""
    with profile_memory() as profile:
        keep(500_000)
        keep(500_000)
        small = [str(n) for n in range(10)]

    first = profile.top(10)[0]

    assert (__file__, LINE) == (first.file, first.line)
    assert 1_000_000 <= first.grown < 1_010_000
    assert 2 <= first.blocks < 10
    assert first.size >= first.grown
    assert len(small) == 10
    assert f"{__file__}:{LINE}: +976." in str(first)


@pytest.mark.slow
def test_what_was_given_back_is_not_named() -> None:
    """A line that ends where it began has not grown; one that shrank has not either."""
    with profile_memory() as outer:
        keep(400_000)
        with profile_memory() as inner:
            drop()
            list(range(1_000))

    assert [] == [line for line in inner.top(100) if line.line == LINE]
    assert [] == [line for line in outer.top(100) if line.line == LINE]


@pytest.mark.slow
def test_top_is_as_long_as_asked_for_and_in_order() -> None:
    """The first grew most."""
    with profile_memory() as profile:
        KEPT.append(bytearray(10_000))
        KEPT.append(bytearray(30_000))
        KEPT.append(bytearray(20_000))

    three = profile.top(3)

    assert [30, 20, 10] == [round(line.grown / 1_000) for line in three]
    assert three[:1] == profile.top(1)
    assert isinstance(three[0], LineGrowth)


@pytest.mark.slow
def test_labelled_snapshots_can_be_compared() -> None:
    """What a warm-up takes is no leak: compare with the time after it."""
    with profile_memory() as profile:
        keep(100_000)
        profile.snapshot("after warm-up")
        keep(200_000)
        profile.snapshot("after work")
        keep(400_000)
        running = held(profile.top(100))

    assert ("start", "after warm-up", "after work", "end") == profile.labels
    assert 700 == running
    assert 700 == held(profile.top(100))
    assert 600 == held(profile.top(100, since="after warm-up"))
    assert 200 == held(profile.top(100, since="after warm-up", until="after work"))
    assert 100 == held(profile.top(100, until="after warm-up"))


def held(lines: list[LineGrowth]) -> int:
    """Thousands of bytes that `keep` holds."""
    return round(sum(line.grown for line in lines if line.line == LINE) / 1_000)


@pytest.mark.slow
def test_neither_tracing_nor_the_profile_itself_is_named() -> None:
    """What the measuring takes is left out."""
    with profile_memory() as profile:
        profile.snapshot("one")
        profile.snapshot("two")

    files = {line.file for line in profile.top(1_000)}

    assert not any(file.endswith(("tracemalloc.py", "memory/profile.py")) for file in files)


@pytest.mark.slow
def test_tracing_that_was_on_stays_on() -> None:
    """It is stopped by who has started it, and keeps its number of frames."""
    tracemalloc.start(7)
    try:
        with profile_memory() as profile:
            keep(1_000_000)

        assert tracemalloc.is_tracing()
        assert 7 == tracemalloc.get_traceback_limit()
        assert 1_000 == held(profile.top())
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_profiles_may_be_nested() -> None:
    """The inner one ends without taking the outer one's traces."""
    with profile_memory(frames=3) as outer:
        keep(100_000)
        with profile_memory() as inner:
            keep(200_000)
        assert tracemalloc.is_tracing()
        keep(400_000)

    assert (700, 200) == (held(outer.top(100)), held(inner.top(100)))


@pytest.mark.slow
def test_profiles_in_several_threads_may_overlap() -> None:
    """The first to begin may be the first to end."""
    first_over, second_begun = threading.Event(), threading.Event()
    second: list[MemoryProfile] = []

    def run() -> None:
        with profile_memory() as profile:
            second_begun.set()
            first_over.wait(PATIENCE)
            keep(300_000)
        second.append(profile)

    thread = threading.Thread(target=run)
    with profile_memory():
        thread.start()
        assert second_begun.wait(PATIENCE)
    first_over.set()
    thread.join(PATIENCE)

    assert 300 == held(second[0].top(100))


@pytest.mark.slow
def test_a_body_that_raises_is_profiled_and_its_error_goes_on() -> None:
    """The numbers are there afterwards, and tracing has ended."""
    profile = profile_memory()

    def body() -> None:
        with profile:
            keep(100_000)
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        body()

    assert 100 == held(profile.top(100))


@pytest.mark.slow
def test_somebody_else_who_stops_tracing_is_told() -> None:
    """But not instead of the error of the body."""
    with pytest.raises(RuntimeError, match="tracemalloc"), profile_memory():
        tracemalloc.stop()
    profile = profile_memory()

    def body() -> None:
        with profile:
            tracemalloc.stop()
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        body()

    assert [] == profile.top()


@pytest.mark.slow
def test_garbage_does_not_count_unless_it_is_wanted() -> None:
    """What waits for the collector is no growth."""

    def profiled(*, collect: bool) -> int:
        gc.collect()
        gc.disable()
        try:
            with profile_memory(collect=collect) as profile:
                keep(100_000)
                KEPT.append(KEPT)
                KEPT[:] = [[KEPT[0]]]
                KEPT[0].append(KEPT[0])
                KEPT.clear()
        finally:
            gc.enable()
        return held(profile.top(100))

    assert (0, 100) == (profiled(collect=True), profiled(collect=False))


@pytest.mark.slow
def test_a_function_is_profiled_at_each_call() -> None:
    """Each call is a profile of its own; arguments, result and name are the function's."""
    reports: list[int] = []

    @profile_memory(report=lambda profile: reports.append(held(profile.top(100))))
    def work(size: int, *, twice: bool = False) -> str:
        """Works."""
        keep(size)
        if twice:
            work(size)
        return "done"

    assert "done" == work(100_000)
    assert "done" == work(200_000, twice=True)
    assert [100, 200, 400] == reports
    assert ("work", "Works.") == (work.__name__, work.__doc__)


@pytest.mark.slow
async def test_a_coroutine_function_is_profiled_until_it_ends() -> None:
    """Not until its coroutine is made."""
    reports: list[int] = []

    @profile_memory(report=lambda profile: reports.append(held(profile.top(100))))
    async def work() -> str:
        keep(100_000)
        return "done"

    assert "done" == await work()
    assert [100] == reports


@pytest.mark.slow
def test_a_call_that_raises_is_reported_too() -> None:
    """What failed may have left something behind."""
    reports: list[MemoryProfile] = []

    @profile_memory(report=reports.append)
    def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        fail()

    assert 1 == len(reports)


@pytest.mark.slow
def test_without_a_report_a_decorated_function_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Its top lines, at level INFO; a block says nothing by itself."""
    caplog.set_level(logging.INFO, logger="hygiene")

    profile_memory()(functools.partial(keep, 100_000))()
    with profile_memory():
        keep(100_000)

    (record,) = caplog.records
    assert re.search(rf"{re.escape(__file__)}:{LINE}: \+97\.\d KiB", record.getMessage())  # a bytearray has a head, too


@pytest.mark.slow
def test_a_profile_is_for_one_use_and_says_so() -> None:
    """Each mistake has a sentence."""
    profile = profile_memory()
    with pytest.raises(RuntimeError, match="the profile has not begun"):
        profile.top()
    with pytest.raises(RuntimeError, match="the profile is new"):
        profile.snapshot("early")
    assert "<profile_memory new, snapshots: none>" == repr(profile)
    with profile:
        with pytest.raises(ValueError, match="there is one called 'start'"):
            profile.snapshot("start")
        with pytest.raises(ValueError, match="there is one called 'end'"):
            profile.snapshot("end")
        with pytest.raises(KeyError, match="no snapshot 'lunch'; there are: start"):
            profile.top(since="lunch")
    with pytest.raises(RuntimeError, match="the profile is over"):
        profile.snapshot("late")
    with pytest.raises(RuntimeError, match="it is over"):
        profile.__enter__()
    with pytest.raises(ValueError, match="frames must be at least 1"):
        profile_memory(frames=0)

    assert "<profile_memory over, snapshots: start, end>" == repr(profile)


def test_a_start_that_fails_leaves_nothing_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even tracing."""

    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(tracemalloc, "take_snapshot", fail)
    with pytest.raises(MemoryError), profile_memory():
        pass

    assert not tracemalloc.is_tracing()
