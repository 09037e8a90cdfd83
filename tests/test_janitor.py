"""The one background thread: it visits what is due, holds nothing alive, and goes when nothing is left."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable

import pytest

from hygiene.janitor import Janitor

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


def test_it_sleeps_until_something_is_due() -> None:
    """No polling: it wakes up for what is due, and not otherwise."""
    janitor = Janitor()
    late, soon = Charge(), Charge()
    janitor.watch(late, 3600)
    janitor.watch(soon, 0.05)
    assert soon.visits.acquire(timeout=PATIENCE)

    assert janitor.wakeups <= 2
    del late
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
