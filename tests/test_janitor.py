"""The one background thread: it visits what is due, holds nothing alive, and goes when nothing is left."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import queue
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from hygiene import Registry
from hygiene.janitor import Janitor, aside

PATIENCE = 20.0


class Charge:
    """Counts its visits, and asks for the next one in *again* seconds."""

    def __init__(self, again: float | None = None, act: Callable[[], None] = lambda: None) -> None:
        self.again = again
        self.act = act
        self.visits = threading.Semaphore(0)

    def _visit(self) -> float | None:
        self.visits.release()
        self.act()
        return self.again


def ended(janitor: Janitor) -> bool:
    """Whether its thread goes by itself."""
    thread = janitor._thread
    if thread is not None:
        thread.join(PATIENCE)
    return not janitor.running


def test_a_charge_is_visited_when_it_is_due_and_then_the_thread_goes() -> None:
    janitor = Janitor()
    assert not janitor.running
    charge = Charge()
    janitor.watch(charge, 0.01)

    assert charge.visits.acquire(timeout=PATIENCE)
    assert ended(janitor)
    assert not charge.visits.acquire(blocking=False)


def test_a_charge_is_visited_as_often_as_it_asks() -> None:
    janitor = Janitor()
    charge = Charge(again=0.001)
    janitor.watch(charge, 0)
    for _ in range(5):
        assert charge.visits.acquire(timeout=PATIENCE)
    charge.again = None

    assert ended(janitor)


def test_the_soonest_comes_first() -> None:
    """A charge that is due soon is not kept waiting by one that is due late."""
    janitor = Janitor()
    late, soon = Charge(), Charge()
    janitor.watch(late, 3600)
    janitor.watch(soon, 0.01)

    assert soon.visits.acquire(timeout=PATIENCE)
    assert not late.visits.acquire(blocking=False)
    del late
    assert ended(janitor)


def test_a_charge_is_not_kept_alive() -> None:
    """Neither while it waits nor between two visits; when it dies, the thread wakes up and goes."""
    janitor = Janitor()
    waiting, visited = Charge(), Charge(again=3600)
    janitor.watch(waiting, 3600)
    janitor.watch(visited, 0)
    assert visited.visits.acquire(timeout=PATIENCE)
    references = [weakref.ref(waiting), weakref.ref(visited)]
    thread = janitor._thread
    gc.disable()  # so that it is the reference count that ends them
    try:
        del waiting, visited
        dead = [reference() for reference in references]
    finally:
        gc.enable()

    assert thread is not None
    thread.join(PATIENCE)
    assert [None, None] == dead
    assert not janitor.running


class Bed(queue.SimpleQueue[Any]):
    """What a janitor sleeps in. Writes down for how long it lies down."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        assert timeout is not None
        self.sleeps.append(timeout)
        return super().get(block, timeout)


def asleep(janitor: Janitor) -> int:
    """Its wake-ups so far, once it has looked at all the news and has gone to sleep again."""
    bed = janitor._news
    assert isinstance(bed, Bed)
    end = time.monotonic() + PATIENCE
    while not bed.empty() or len(bed.sleeps) <= janitor.wakeups:
        assert time.monotonic() < end
        os.sched_yield()
    return janitor.wakeups


def test_it_sleeps_until_something_is_due() -> None:
    """No polling: it wakes up for news and for what is due, and not otherwise."""
    janitor = Janitor()
    janitor._news = Bed()
    late, soon = Charge(), Charge()
    janitor.watch(late, 3600)
    janitor.watch(soon, 0.05)
    assert soon.visits.acquire(timeout=PATIENCE)

    # Two pieces of news and one visit. One more, should the clock of the lock be ahead of that of the agenda.
    assert asleep(janitor) in {3, 4}
    assert 3500 < janitor._news.sleeps[-1]
    del late
    assert ended(janitor)


def test_it_does_not_wake_up_in_an_idle_minute() -> None:
    """It lies down once, for longer than the minute, and nothing that happens meanwhile wakes it."""
    janitor = Janitor()
    bed = janitor._news = Bed()
    charges = [Charge() for _ in range(20)]
    for charge in charges:
        janitor.watch(charge, 61)
    before = asleep(janitor)
    slept = len(bed.sleeps)
    registry: Registry[int, int] = Registry(maxsize=10)  # whatever the process does: none of it is due
    for number in range(1000):
        registry[number] = number
        os.sched_yield()
    thread = janitor._thread

    assert thread is not None
    assert thread.is_alive()
    assert before == janitor.wakeups
    assert slept == len(bed.sleeps)
    assert 60 < bed.sleeps[-1] <= 61
    charges.clear()
    del charge
    assert ended(janitor)


def test_a_registry_in_use_does_not_wake_the_janitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of writes, reads and evictions are one entry on its agenda."""
    janitor = Janitor()
    bed = janitor._news = Bed()
    monkeypatch.setattr("hygiene.registry.janitor", janitor)
    registry: Registry[int, int] = Registry(maxsize=10, ttl=3600, idle=1800)
    registry[0] = 0
    before = asleep(janitor)
    for number in range(1000):
        registry[number] = number
        registry.get(number - 1)

    assert before == asleep(janitor)
    assert 60 < bed.sleeps[-1]
    del registry
    assert ended(janitor)


@pytest.mark.slow
def test_there_is_no_thread_until_it_is_needed() -> None:
    """Neither at import nor for a registry in which nothing can fall due."""
    code = """
        import threading
        from hygiene import Registry
        registry = Registry(maxsize=10)
        registry["a"] = 1
        before = threading.active_count()
        timed = Registry(ttl=60)
        timed["a"] = 1
        during = threading.active_count()
        thread = threading.enumerate()[-1]
        del timed
        thread.join(20)
        print(before, during, thread.name, threading.active_count())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )

    assert "1 2 hygiene-janitor 1\n" == done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_janitor_of_its_own() -> None:
    """It visits there what it was watching."""
    code = """
        import os, threading, warnings
        from hygiene.janitor import janitor
        warnings.simplefilter("ignore")
        parent = os.getpid()
        class Charge:
            visited = threading.Event()
            def _visit(self):
                if os.getpid() != parent:
                    self.visited.set()
                return 0.01
        charge = Charge()
        janitor.watch(charge, 0)
        child = os.fork()
        if not child:
            os._exit(0 if charge.visited.wait(20) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )

    assert "0\n" == done.stdout


def test_aside_calls_in_a_thread_of_its_own() -> None:
    """Which is a daemon, has a name, and sees the context of the caller."""
    found: list[Any] = []
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    done = threading.Event()

    def look() -> None:
        thread = threading.current_thread()
        found.extend([thread.name, thread.daemon, variable.get()])
        done.set()

    variable.set(3)
    aside(look, "sweep")

    assert done.wait(PATIENCE)
    assert ["hygiene-sweep", True, 3] == found


def test_what_raises_aside_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Also a SystemExit, which a thread would swallow."""
    threads: list[threading.Thread] = []

    def fail() -> None:
        threads.append(threading.current_thread())
        sys.exit("no broom")

    with caplog.at_level(logging.ERROR, logger="hygiene"):
        aside(fail, "sweep")
        end = time.monotonic() + PATIENCE
        while not threads and time.monotonic() < end:
            os.sched_yield()
        threads[0].join(PATIENCE)

    assert "sweep failed" in caplog.text
    assert "no broom" in caplog.text


def test_where_no_thread_can_start_it_is_called_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the exit of Python 3.12."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    found: list[threading.Thread] = []
    aside(lambda: found.append(threading.current_thread()), "sweep")

    assert [threading.current_thread()] == found


def test_a_thread_that_could_not_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is out of threads for a moment does not lose its janitor for good."""
    janitor, first, second = Janitor(), Charge(), Charge()

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            janitor.watch(first, 0)
    assert not janitor.running

    janitor.watch(second, 0)
    assert first.visits.acquire(timeout=PATIENCE)
    assert second.visits.acquire(timeout=PATIENCE)
    assert ended(janitor)


def test_a_charge_that_comes_while_the_thread_is_being_started_starts_no_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As from a finalizer, or a signal handler, in the middle of `watch`."""
    janitor, first, second = Janitor(), Charge(), Charge()
    start, started = threading.Thread.start, []

    def interrupted(self: threading.Thread) -> None:
        started.append(self)
        if len(started) == 1:
            janitor.watch(second, 0)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    janitor.watch(first, 0)

    assert first.visits.acquire(timeout=PATIENCE)
    assert second.visits.acquire(timeout=PATIENCE)
    assert 1 == len(started)
    assert ended(janitor)


def test_a_failing_visit_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged and tried again later; the other charges are visited."""

    def fail() -> None:
        raise ArithmeticError("no broom")

    janitor = Janitor()
    failing, other = Charge(act=fail), Charge(again=0.001)
    with caplog.at_level(logging.ERROR, logger="hygiene"):
        janitor.watch(failing, 0)
        assert failing.visits.acquire(timeout=PATIENCE)
        janitor.watch(other, 0)
        for _ in range(3):
            assert other.visits.acquire(timeout=PATIENCE)

    assert "the visit of 'Charge' failed" in caplog.text
    assert "no broom" in caplog.text


def test_a_charge_may_be_watched_from_within_a_visit() -> None:
    janitor = Janitor()
    second = Charge()
    first = Charge(act=lambda: janitor.watch(second, 0))
    janitor.watch(first, 0)

    assert second.visits.acquire(timeout=PATIENCE)
    assert ended(janitor)


def test_it_starts_again_after_it_went() -> None:
    janitor = Janitor()
    for _ in range(5):
        charge = Charge()
        janitor.watch(charge, 0)
        assert charge.visits.acquire(timeout=PATIENCE)
    assert ended(janitor)
    charge = Charge()
    janitor.watch(charge, 0)

    assert charge.visits.acquire(timeout=PATIENCE)
    assert ended(janitor)


def test_what_was_being_visited_during_a_fork_is_visited_in_the_child() -> None:
    """A charge is on the agenda at every moment, also while its visit runs."""
    janitor = Janitor()
    inside, go = threading.Event(), threading.Event()

    def act() -> None:
        inside.set()
        go.wait(PATIENCE)

    charge = Charge(again=3600, act=act)
    janitor.watch(charge, 0)
    assert inside.wait(PATIENCE)
    charge.act = lambda: None
    assert charge.visits.acquire(timeout=PATIENCE)
    janitor._after_fork()  # as in the child, where the thread that visits does not exist

    assert charge.visits.acquire(timeout=PATIENCE)
    go.set()


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_whatever_a_visit_raises_the_janitor_goes_on(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """The result of a future that was cancelled, asked for in a hook, is such an error."""

    def fail() -> None:
        raise error

    janitor, failing, other = Janitor(), Charge(act=fail), Charge()
    janitor.watch(failing, 0)
    assert failing.visits.acquire(timeout=PATIENCE)
    janitor.watch(other, 0)

    assert other.visits.acquire(timeout=PATIENCE)
    assert "it is tried again in a minute" in caplog.text
