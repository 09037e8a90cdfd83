"""The state of a pool, without a pool: who holds a slot, who waits for one, and that none is ever lost."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import queue
import random
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hygiene import leasing as module
from hygiene.leasing import VACANT, Leasing, Slot, Tally, Ticket

PATIENCE = 10.0  # seconds: a wait that takes longer than this on the slowest machine has been forgotten


class Waiter(Ticket[str]):
    """A ticket that counts how often it was woken."""

    def __init__(self) -> None:
        self._wakes = Tally()  # not a method of its own: in a cycle, it would hold its slot until a collection
        super().__init__(self._wakes.add)

    @property
    def woken(self) -> int:
        return int(self._wakes)


def waiting(leasing: Leasing[str], count: int = 1) -> list[Waiter]:
    """So many who wait, in this order."""
    waiters = [Waiter() for _ in range(count)]
    for waiter in waiters:
        assert leasing.take() is None
        assert [] == leasing.join(waiter)
    return waiters


def opened(leasing: Leasing[str], *resources: str) -> list[Slot[str]]:
    """The slots of these resources, opened by whoever holds them."""
    slots = []
    for resource in resources:
        slot = leasing.take()
        assert slot is not None
        assert slot.resource is VACANT
        leasing.filled(slot, resource)
        slots.append(slot)
    return slots


class Interrupted(deque[Any]):
    """A deque where something else happens in the middle of one operation, once."""

    def __init__(self, items: deque[Any], operation: str, then: Callable[[], object], *, first: bool = False) -> None:
        super().__init__(items)
        self._operation, self._then, self._first = operation, then, first

    def _interrupt(self, operation: str, *args: Any) -> Any:
        due = operation == self._operation
        if due:
            self._operation = ""
        if due and self._first:
            self._then()
        result = getattr(deque, operation)(self, *args)
        if due and not self._first:
            self._then()
        return result

    def pop(self) -> Any:  # type: ignore[override]
        return self._interrupt("pop")

    def append(self, item: Any) -> None:
        self._interrupt("append", item)

    def __len__(self) -> int:
        return int(self._interrupt("__len__"))


# Taking and giving back.


def test_the_first_to_come_gets_room_at_once() -> None:
    leasing: Leasing[str] = Leasing(1)
    slot = leasing.take()

    assert slot is not None
    assert slot.resource is VACANT
    assert "<Slot VACANT>" == repr(slot)
    assert leasing.take() is None


def test_what_was_put_back_is_handed_out_before_anything_is_opened() -> None:
    leasing: Leasing[str] = Leasing(3)
    (first,) = opened(leasing, "a")

    assert [] == leasing.put(first)
    assert first is leasing.take()
    assert 1 == leasing.open


@pytest.mark.parametrize(("lifo", "expected"), [(True, "b"), (False, "a")])
def test_the_order_says_who_is_handed_out_first(lifo: bool, expected: str) -> None:
    leasing: Leasing[str] = Leasing(2, lifo=lifo)
    for slot in opened(leasing, "a", "b"):
        leasing.put(slot)
    slot = leasing.take()

    assert slot is not None
    assert expected == slot.resource


def test_a_lease_granted_to_a_cancelled_waiter_goes_to_the_next() -> None:
    """Cancelled between the hand-off and its next step: it gives back what it was granted."""
    leasing: Leasing[str] = Leasing(1)
    (first,) = opened(leasing, "conn")
    second, third = waiting(leasing, 2)
    leasing.put(first)  # granted to second, who is just being cancelled

    assert not leasing.leave(second)
    assert second.slot is first
    leasing.put(first)

    assert third.slot is first
    assert [1, 1] == [second.woken, third.woken]


def test_a_waiter_who_leaves_is_not_served() -> None:
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "conn")
    first, second = waiting(leasing, 2)

    assert leasing.leave(first)
    assert not leasing.leave(first)
    leasing.put(held)

    assert first.slot is None
    assert 0 == first.woken
    assert second.slot is held


def test_who_releases_and_asks_again_does_not_overtake() -> None:
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "conn")
    first, second = waiting(leasing, 2)
    leasing.put(held)
    (again,) = waiting(leasing)

    assert first.slot is held
    leasing.put(held)
    assert second.slot is held
    assert again.slot is None
    leasing.put(held)
    assert again.slot is held


def test_nobody_overtakes_while_one_waits_although_there_is_room() -> None:
    """Between a slot that comes back and its hand-off, a newcomer that looks sees who was first."""
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "conn")
    (first,) = waiting(leasing)
    leasing.idle.append(held)  # the first half of `put`

    assert leasing.take() is None
    leasing.settle()
    assert first.slot is held


def test_a_resource_that_could_not_be_opened_leaves_its_room_to_the_next() -> None:
    leasing: Leasing[str] = Leasing(1)
    slot = leasing.take()
    assert slot is not None
    slot.opening = True
    first, second = waiting(leasing, 2)

    assert 1 == leasing.opening
    assert [] == leasing.vacate(slot)
    assert first.slot is not None
    assert first.slot.resource is VACANT
    assert 0 == leasing.opening
    leasing.filled(first.slot, "conn")
    leasing.put(first.slot)
    assert second.slot is first.slot
    assert (1, 0, 1) == (int(leasing.opened), int(leasing.shut), leasing.in_use)


def test_a_resource_is_counted_as_closed_once() -> None:
    leasing: Leasing[str] = Leasing(1)
    (slot,) = opened(leasing, "conn")
    leasing.emptied(slot)
    leasing.emptied(slot)
    leasing.vacate(slot)
    leasing.vacate(slot)

    assert (1, 1, 0) == (int(leasing.opened), int(leasing.shut), leasing.open)
    assert 1 == len(leasing.slots())


def test_room_that_is_free_again_is_held_by_nobody_who_had_it_before() -> None:
    """A traceback that somebody keeps refers to what went wrong, and not to what is handed out next."""
    leasing: Leasing[str] = Leasing(1)
    (kept,) = opened(leasing, "conn")
    leasing.vacate(kept)
    (held,) = opened(leasing, "another")
    del held

    assert not kept.of(leasing)
    assert ["another"] == [slot.resource for slot in leasing.lost]
    assert [] == leasing.vacate(kept)
    assert 1 == len(leasing.slots())


def test_a_tally_counts() -> None:
    tally = Tally()
    for _ in range(3):
        tally.add()

    assert 3 == int(tally)


def test_an_interrupt_right_after_a_resource_came_back_leaves_nobody_waiting() -> None:
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "conn")
    (waiter,) = waiting(leasing)

    def interrupt() -> None:
        raise KeyboardInterrupt

    leasing.idle = Interrupted(leasing.idle, "append", interrupt)
    leasing.pick = leasing.idle.pop
    with pytest.raises(KeyboardInterrupt):
        leasing.put(held)

    assert waiter.slot is held
    assert 1 == waiter.woken


# Close.


def test_close_wakes_every_waiter_with_nothing_and_hands_out_nothing_more() -> None:
    leasing: Leasing[str] = Leasing(2)
    held, free = opened(leasing, "a", "b")
    first, second = waiting(leasing, 2)

    assert [] == leasing.close()
    assert [(1, None), (1, None)] == [(waiter.woken, waiter.slot) for waiter in (first, second)]
    assert leasing.take() is None
    late = Waiter()
    assert [] == leasing.join(late)
    assert (1, None) == (late.woken, late.slot)
    assert [held] == leasing.put(held)
    assert [free] == leasing.put(free)
    for slot in (held, free):
        assert [] == leasing.vacate(slot)
    assert [] == leasing.slots()
    assert [] == leasing.close()


def test_close_returns_what_is_idle_and_forgets_what_is_vacant() -> None:
    leasing: Leasing[str] = Leasing(3)
    held, idle = opened(leasing, "a", "b")
    leasing.put(idle)

    assert [idle] == leasing.close()
    assert {id(held), id(idle)} == {id(slot) for slot in leasing.slots()}


def test_a_waiter_at_a_pool_that_closes_while_it_is_looked_for_room_is_woken() -> None:
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "a")
    (waiter,) = waiting(leasing)
    pick = leasing.pick

    def closing() -> Slot[str]:
        leasing.pick = pick
        leasing.closed = leasing.winding = True  # the first half of `close`
        return pick()

    leasing.pick = closing
    assert [] == leasing.settle()

    assert (1, None) == (waiter.woken, waiter.slot)
    assert [held] == leasing.put(held)


def test_a_pool_that_closes_while_a_slot_is_in_hand_gets_it_back() -> None:
    """Whoever was about to grant it finds nobody any more, and is told to close it."""
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "a")
    (waiter,) = waiting(leasing)
    pick = leasing.pick

    def picking() -> Slot[str]:
        slot = pick()
        leasing.pick = pick
        assert [] == leasing.close()
        return slot

    leasing.pick = picking
    assert [held] == leasing.put(held)
    assert (1, None) == (waiter.woken, waiter.slot)


class Fleeting(OrderedDict[Ticket[str], None]):
    """A queue whose first one leaves just before somebody is about to decide about it."""

    def popitem(self, last: bool = True) -> tuple[Ticket[str], None]:
        super().clear()
        return super().popitem(last=last)


def test_the_last_to_leave_a_pool_that_is_being_closed_is_not_missed() -> None:
    leasing: Leasing[str] = Leasing(1)
    leasing.waiters = Fleeting()
    opened(leasing, "a")
    waiting(leasing)

    assert [] == leasing.close()
    assert not leasing.waiters


def test_who_comes_while_a_slot_is_offered_to_one_who_left_is_served() -> None:
    """The newcomer finds nothing, because the slot is in somebody's hands; whose hands they are looks again."""
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "a")
    (gone,) = waiting(leasing)
    late = Waiter()
    pick = leasing.pick

    def picking() -> Slot[str]:
        slot = pick()
        leasing.pick = pick
        assert leasing.leave(gone)
        leasing.idle = Interrupted(leasing.idle, "append", lambda: leasing.join(late), first=True)
        leasing.pick = leasing.idle.pop
        return slot

    leasing.pick = picking
    assert [] == leasing.put(held)
    assert late.slot is held


# Resize.


def test_a_larger_pool_serves_who_waits() -> None:
    leasing: Leasing[str] = Leasing(1)
    opened(leasing, "a")
    (held,) = leasing.held()
    first, second, third = waiting(leasing, 3)

    assert [] == leasing.resize(3)
    assert [True, True, False] == [waiter.slot is not None for waiter in (first, second, third)]
    assert 3 == leasing.max_size
    leasing.put(held)
    assert third.slot is held


def test_a_smaller_pool_closes_what_is_idle_and_later_what_comes_back() -> None:
    leasing: Leasing[str] = Leasing(4)
    held, idle, other = opened(leasing, "a", "b", "c")
    leasing.put(idle)

    assert [idle] == leasing.resize(1)
    assert [other] == leasing.put(other)
    assert [] == leasing.put(held)
    for slot in (idle, other):
        assert [] == leasing.vacate(slot)
    assert [held] == leasing.slots()
    assert held is leasing.take()
    assert [] == leasing.put(held)
    assert not leasing.winding


def test_a_smaller_pool_closes_no_more_than_it_has_to() -> None:
    """What is on its way out counts: the ones that come back meanwhile stay."""
    leasing: Leasing[str] = Leasing(4)
    slots = opened(leasing, "a", "b", "c", "d")
    for slot in slots[:3]:
        leasing.put(slot)

    assert slots[:1] == leasing.resize(3)
    assert [] == leasing.put(slots[3])
    assert [] == leasing.settle()
    assert [] == leasing.vacate(slots[0])
    assert 3 == len(leasing.idle)
    assert [] == list(leasing.lost)


def test_room_that_was_taken_away_and_given_back_was_never_gone() -> None:
    leasing: Leasing[str] = Leasing(2)
    first, second = opened(leasing, "a", "b")
    leasing.resize(1)
    leasing.resize(2)

    assert [] == leasing.put(first)
    assert [] == leasing.put(second)
    assert 2 == len(leasing.slots())


def test_a_resize_in_the_middle_of_another_is_not_lost() -> None:
    """A signal handler, say: the one it interrupted does both, one after the other."""
    leasing: Leasing[str] = Leasing(3)
    leasing._excess = Interrupted(leasing._excess, "append", lambda: leasing.resize(5))
    leasing.resize(2)

    assert 5 == leasing.max_size
    assert 5 == len(leasing.slots()) - len(leasing._excess)


def test_a_pool_that_grows_while_it_lets_go_of_room_serves_who_came_meanwhile() -> None:
    leasing: Leasing[str] = Leasing(2)
    waiter = Waiter()

    def grow() -> None:
        # The vacant slot is in the hands of the one who shrinks the pool: the newcomer finds nothing, and waits.
        leasing._excess.clear()
        assert leasing.take() is None
        leasing.join(waiter)

    (held,) = opened(leasing, "a")
    leasing.vacant = Interrupted(leasing.vacant, "pop", grow)
    leasing.resize(1)

    assert 1 == waiter.woken
    assert waiter.slot not in {None, held}


def test_a_pool_that_is_closed_while_another_thread_ends_its_shrinking_stays_closed() -> None:
    """The flag that is stored last may be out of date: nothing that comes back then is kept open."""
    leasing: Leasing[str] = Leasing(2)
    first, second = opened(leasing, "a", "b")
    leasing.put(first)
    closed: list[Slot[str]] = []
    looks = iter(range(10))

    def close() -> None:
        closed.extend(leasing.close())
        leasing.winding = False  # what the interrupted one is about to store
        closed.extend(leasing.put(second))

    class Last(deque[None]):
        def __len__(self) -> int:
            if next(looks) == 2:  # the one whose outcome is stored
                close()
            return 0

    leasing.winding = True
    leasing._excess = Last()
    closed.extend(leasing.settle())

    assert {id(first), id(second)} == {id(slot) for slot in closed}
    assert leasing.winding


# Leases that nobody released.


def test_a_dropped_slot_comes_out_of_lost_with_what_it_held() -> None:
    noticed = []
    leasing: Leasing[str] = Leasing(1, notify=lambda: noticed.append(True))
    (held,) = opened(leasing, "conn")
    held.since, held.expires, held.uses = 1.0, 2.0, 3
    held.frames, held.thread = (), "me"
    (waiter,) = waiting(leasing)
    del held

    assert [True] == noticed
    lost = leasing.lost.popleft()
    assert ("conn", 1.0, 2.0, 3, (), "me") == (
        lost.resource, lost.since, lost.expires, lost.uses, lost.frames, lost.thread
    )  # fmt: skip
    assert lost.of(leasing)
    assert [lost] == leasing.slots()
    assert [] == leasing.vacate(lost)
    assert waiter.slot is not None
    assert 3 == leasing.acquired


def test_dropped_room_goes_to_the_next_at_once() -> None:
    leasing: Leasing[str] = Leasing(1)
    held = leasing.take()
    assert held is not None
    held.opening = True
    (waiter,) = waiting(leasing)
    del held

    assert waiter.slot is not None
    assert 0 == len(leasing.lost)
    assert 0 == leasing.opening


def test_dropped_room_of_a_closed_pool_is_gone() -> None:
    leasing: Leasing[str] = Leasing(1)
    held = leasing.take()
    leasing.close()
    del held

    assert [] == leasing.slots()
    assert 0 == len(leasing.lost)


def test_dropped_room_brings_out_what_has_to_be_closed() -> None:
    """A finalizer cannot return anything: what it is told to close comes out of `lost`."""
    leasing: Leasing[str] = Leasing(2)
    held, idle = leasing.take(), leasing.take()
    assert held is not None
    assert idle is not None
    leasing.filled(idle, "a")
    leasing.closed = leasing.winding = True  # the first half of `close`
    leasing.idle.append(idle)  # the first half of `put`
    del held

    assert [idle] == list(leasing.lost)
    assert idle.leaving


def test_a_granted_slot_whose_waiter_vanished_is_not_lost() -> None:
    leasing: Leasing[str] = Leasing(1)
    (held,) = opened(leasing, "conn")
    waiting(leasing)  # nobody keeps the ticket
    leasing.put(held)
    del held

    assert ["conn"] == [slot.resource for slot in leasing.lost]


def test_a_slot_that_was_dropped_on_its_way_out_says_so() -> None:
    """Whoever was closing it was interrupted: nobody has forgotten to release it."""
    leasing: Leasing[str] = Leasing(1)
    (slot,) = opened(leasing, "conn")
    leasing.put(slot)
    del slot
    leasing.close()

    (lost,) = leasing.lost
    assert lost.leaving


def test_slots_outlive_their_pool_in_peace() -> None:
    leasing: Leasing[str] = Leasing(2)
    (held,) = opened(leasing, "conn")
    del leasing

    assert not held.of(Leasing(1))
    del held


# Surplus.


def test_surplus_takes_what_is_due_and_keeps_as_many_as_it_is_told() -> None:
    leasing: Leasing[str] = Leasing(4)
    held, *idle = opened(leasing, "held", "a", "b", "c")
    for since, slot in enumerate(idle):
        slot.since = since
        leasing.put(slot)

    assert [] == leasing.surplus(4, lambda slot: True)
    assert idle[1:] == leasing.surplus(2, lambda slot: slot.since > 0)
    assert idle[:1] == list(leasing.idle)
    assert {id(held), id(idle[1]), id(idle[2])} == {id(slot) for slot in leasing.held()}


def test_surplus_leaves_what_was_handed_out_since() -> None:
    leasing: Leasing[str] = Leasing(2)
    first, second = opened(leasing, "a", "b")
    leasing.put(first)
    leasing.put(second)
    taken: list[Slot[str] | None] = []

    def due(slot: Slot[str]) -> bool:
        if not taken:
            taken.extend([leasing.take(), leasing.take()])
        return True

    assert [] == leasing.surplus(0, due)
    assert [second, first] == taken


# Against a model.


class Leased(RuleBasedStateMachine):
    """
    What the pool does is what a model says that knows numbers and names, and no slots.

    ``opened == in use + idle + closed``; nobody waits while there is room; never more than *max_size*, or than there
    were before it was lowered; first come, first served; no slot with two holders; each ticket is woken once.
    """

    @initialize(size=st.integers(1, 4), lifo=st.booleans())
    def begin(self, size: int, lifo: bool) -> None:
        self.notified = 0
        self.leasing: Leasing[str] = Leasing(size, lifo=lifo, notify=self.notice)
        self.lifo = lifo
        self.names = map(str, itertools.count())
        # The model.
        self.size = self.ceiling = size
        self.total = size
        self.vacant = size
        self.idle: list[str] = []
        self.queue: list[Waiter] = []
        self.expected: dict[int, str | None] = {}  # by the ticket's id: what it was granted, None for room
        self.open = self.shut = 0
        self.closed = False
        # The slots, by where they are.
        self.held: list[Slot[str]] = []
        self.rooms: list[Slot[str]] = []
        self.granted: list[Waiter] = []
        self.leaving: list[Slot[str]] = []
        self.lost: list[str] = []
        self.gone: list[Waiter] = []
        self.taken = 0

    def notice(self) -> None:
        self.notified += 1

    # What the model expects.

    def first_free(self) -> tuple[str | None] | None:
        """What is handed out next: the name of a resource, ``None`` for room; nothing if there is nothing."""
        if self.idle:
            return (self.idle.pop(-1 if self.lifo else 0),)
        if self.vacant:
            self.vacant -= 1
            return (None,)
        return None

    def serve(self, closing: list[Slot[str]]) -> None:
        """Let the model do what a change makes possible, and compare what is to be closed."""
        while self.queue and not self.closed and (found := self.first_free()):
            waiter = self.queue.pop(0)
            self.expected[id(waiter)] = found[0]
            self.granted.append(waiter)
        if self.closed:
            self.total -= self.vacant
            self.vacant = 0
            self.gone += self.queue
            self.queue = []
        gone = min(self.vacant, max(self.total - self.size, 0))
        self.vacant -= gone
        self.total -= gone
        count = len(self.idle) if self.closed else self.total - self.size - len(self.leaving) - self.dropped_leaving
        expected = [self.idle.pop(0) for _ in range(min(max(count, 0), len(self.idle)))]

        assert expected == [slot.resource for slot in closing]
        self.leaving += closing

    @property
    def dropped_leaving(self) -> int:
        return sum(slot.leaving for slot in self.leasing.lost)

    def freed(self) -> None:
        """One slot has become vacant."""
        if self.closed or self.total > self.size:
            self.total -= 1
        else:
            self.vacant += 1

    def got(self, slot: Slot[str], expected: str | None) -> None:
        assert (VACANT if expected is None else expected) == slot.resource
        slot.uses += 1
        self.taken += 1
        (self.rooms if expected is None else self.held).append(slot)
        slot.opening = expected is None

    # What callers do.

    @rule()
    def request(self) -> None:
        slot = self.leasing.take()
        expected = None if self.queue or self.closed else self.first_free()
        if expected is None:
            assert slot is None
            waiter = Waiter()
            self.queue.append(waiter)
            self.serve(self.leasing.join(waiter))
        else:
            assert slot is not None
            self.got(slot, expected[0])

    @precondition(lambda self: self.granted)
    @rule(at=st.integers(0, 9))
    def resume(self, at: int) -> None:
        waiter = self.granted.pop(at % len(self.granted))
        self.gone.append(waiter)
        slot, waiter.slot = waiter.slot, None
        assert slot is not None
        self.got(slot, self.expected.pop(id(waiter)))

    @precondition(lambda self: self.granted)
    @rule(at=st.integers(0, 9))
    def resume_cancelled(self, at: int) -> None:
        waiter = self.granted.pop(at % len(self.granted))
        self.gone.append(waiter)
        assert not self.leasing.leave(waiter)
        slot, waiter.slot = waiter.slot, None
        assert slot is not None
        name = self.expected.pop(id(waiter))
        if name is None:
            self.freed()
            self.serve(self.leasing.vacate(slot))
        else:
            self.idle.append(name)
            self.serve(self.leasing.put(slot))

    @precondition(lambda self: self.granted)
    @rule(at=st.integers(0, 9))
    def vanish_when_granted(self, at: int) -> None:
        waiter = self.granted.pop(at % len(self.granted))
        self.gone.append(waiter)
        name = self.expected.pop(id(waiter))
        self.vanished(name)
        waiter.slot = None
        self.serve([])

    @precondition(lambda self: self.queue)
    @rule(at=st.integers(0, 9))
    def leave(self, at: int) -> None:
        waiter = self.queue.pop(at % len(self.queue))
        assert self.leasing.leave(waiter)
        assert 0 == waiter.woken

    @precondition(lambda self: self.rooms)
    @rule(at=st.integers(0, 9))
    def open_a_resource(self, at: int) -> None:
        slot = self.rooms.pop(at % len(self.rooms))
        self.leasing.filled(slot, next(self.names))
        self.open += 1
        self.held.append(slot)

    @precondition(lambda self: self.rooms)
    @rule(at=st.integers(0, 9))
    def fail_to_open(self, at: int) -> None:
        slot = self.rooms.pop(at % len(self.rooms))
        self.freed()
        self.serve(self.leasing.vacate(slot))

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 9))
    def put(self, at: int) -> None:
        slot = self.held.pop(at % len(self.held))
        self.idle.append(slot.resource)
        self.serve(self.leasing.put(slot))

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 9))
    def discard(self, at: int) -> None:
        slot = self.held.pop(at % len(self.held))
        self.shut += 1
        self.leasing.emptied(slot)
        self.freed()
        self.serve(self.leasing.vacate(slot))

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 9))
    def reopen(self, at: int) -> None:
        """It was dead: its holder closes it and opens another one in the same slot."""
        slot = self.held.pop(at % len(self.held))
        self.leasing.emptied(slot)
        self.shut += 1
        slot.opening = True
        self.rooms.append(slot)

    @precondition(lambda self: self.leaving)
    @rule(at=st.integers(0, 9))
    def close_what_leaves(self, at: int) -> None:
        slot = self.leaving.pop(at % len(self.leaving))
        self.shut += 1
        self.freed()
        self.serve(self.leasing.vacate(slot))

    # Slots that are let go of.

    def vanished(self, name: str | None) -> None:
        if name is None:
            self.freed()
        else:
            self.lost.append(name)

    @precondition(lambda self: self.held or self.rooms or self.leaving)
    @rule(at=st.integers(0, 9))
    def drop(self, at: int) -> None:
        places = [place for place in (self.held, self.rooms, self.leaving) if place]
        place = places[at % len(places)]
        self.vanished(None if place is self.rooms else place[-1].resource)
        notified = self.notified
        place.pop()  # the last reference
        self.serve([])

        assert notified + (place is not self.rooms) == self.notified

    @precondition(lambda self: self.lost)
    @rule()
    def close_what_was_lost(self) -> None:
        slot = self.leasing.lost.popleft()
        assert self.lost.pop(0) == slot.resource
        self.shut += 1
        self.freed()
        self.serve(self.leasing.vacate(slot))

    # Changes as a whole.

    @rule(size=st.integers(1, 5))
    def resize(self, size: int) -> None:
        more = max(size - max(self.total, self.size), 0) if self.total < size else 0
        self.total += more
        self.vacant += more
        self.ceiling = max(self.ceiling, size)
        self.size = size
        self.serve(self.leasing.resize(size))

    @precondition(lambda self: not self.closed)
    @rule(sure=st.integers(0, 9))
    def close(self, sure: int) -> None:
        if sure:  # or nothing else would be seen for long
            return
        self.closed = True
        self.serve(self.leasing.close())

    @rule(keep=st.integers(0, 4), odd=st.booleans())
    def surplus(self, keep: int, odd: bool) -> None:
        room = self.open - self.shut - keep
        due = [name for name in self.idle if int(name) % 2 == odd][: max(room, 0)]
        taken = self.leasing.surplus(keep, lambda slot: int(slot.resource) % 2 == odd)

        assert due == [slot.resource for slot in taken]
        self.idle = [name for name in self.idle if name not in due]
        self.leaving += taken

    @rule()
    def settle(self) -> None:
        self.serve(self.leasing.settle())

    # What always holds.

    @invariant()
    def every_number_is_right(self) -> None:
        leasing = self.leasing
        in_use = len(self.held) + len(self.leaving) + len(self.lost)
        in_use += sum(name is not None for name in self.expected.values())

        assert self.idle == [slot.resource for slot in leasing.idle]
        assert self.vacant == len(leasing.vacant)
        assert self.lost == [slot.resource for slot in leasing.lost]
        assert (self.open, self.shut) == (int(leasing.opened), int(leasing.shut))
        assert in_use == leasing.in_use
        assert leasing.open == leasing.in_use + len(leasing.idle)
        assert len(self.rooms) == leasing.opening
        assert self.taken == leasing.acquired
        assert in_use == len(list(leasing.held()))

    @invariant()
    def nobody_waits_while_there_is_room(self) -> None:
        assert self.queue == list(self.leasing.waiters)
        if self.queue:
            assert not self.leasing.closed
            assert not self.leasing.idle
            assert not self.leasing.vacant

    @invariant()
    def never_more_than_there_may_be(self) -> None:
        leasing = self.leasing
        self.ceiling = max(self.size, min(self.ceiling, self.total))

        assert self.total == len(leasing.slots())
        assert self.closed or max(self.total - self.size, 0) == len(leasing._excess)
        assert leasing.open + leasing.opening <= self.total <= self.ceiling

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        leasing = self.leasing
        places = [leasing.idle, leasing.vacant, leasing.lost, self.held, self.rooms, self.leaving]
        slots = [id(slot) for place in places for slot in place]
        slots += [id(waiter.slot) for waiter in self.granted]

        assert len(slots) == len(set(slots))
        assert sorted(slots) == sorted(id(slot) for slot in leasing.slots())

    @invariant()
    def each_ticket_is_woken_once(self) -> None:
        assert all(waiter.woken == 0 for waiter in self.queue)
        assert all(waiter.woken == 1 for waiter in (*self.granted, *self.gone))
        assert all(waiter.slot is not None for waiter in self.granted)


TestLeased = Leased.TestCase


# At any bytecode.


class Bystander:
    """Several callers of one pool, any of whom may act in the middle of what another one does."""

    def __init__(self, size: int) -> None:
        self.leasing: Leasing[str] = Leasing(size)
        self.held: list[Slot[str]] = []
        self.rooms: list[Slot[str]] = []
        self.closing: list[Slot[str]] = []
        self.waiters: list[Waiter] = []
        self.left: list[Waiter] = []
        self.names = map(str, itertools.count())
        self.sizes = [size]
        self.opened = self.shut = 0

    # Each takes what it acts upon out of its list first, in one step, so that nobody acts upon the same.

    def got(self, slot: Slot[str]) -> None:
        (self.rooms if slot.resource is VACANT else self.held).append(slot)

    def request(self) -> None:
        slot = self.leasing.take()
        if slot is not None:
            self.got(slot)
            return
        waiter = Waiter()
        self.waiters.append(waiter)
        self.closing += self.leasing.join(waiter)

    def fill(self) -> None:
        if self.rooms:
            slot = self.rooms.pop()
            self.opened += 1
            self.leasing.filled(slot, next(self.names))
            self.held.append(slot)

    def put(self) -> None:
        if self.held:
            self.closing += self.leasing.put(self.held.pop())

    def discard(self) -> None:
        if self.held:
            slot = self.held.pop()
            self.shut += 1
            self.leasing.emptied(slot)
            self.closing += self.leasing.vacate(slot)

    def fail(self) -> None:
        if self.rooms:
            self.closing += self.leasing.vacate(self.rooms.pop())

    def leave(self) -> None:
        """The one who waits longest gives up, though it may just have been granted a slot."""
        if self.waiters:
            waiter = self.waiters.pop(0)
            if self.leasing.leave(waiter):
                self.left.append(waiter)
            else:
                self.waiters.append(waiter)

    def drop(self) -> None:
        if self.held:
            self.held.pop()

    def drop_room(self) -> None:
        if self.rooms:
            self.rooms.pop()

    def resize_up(self) -> None:
        self.sizes.append(4)
        self.closing += self.leasing.resize(4)

    def resize_down(self) -> None:
        self.sizes.append(1)
        self.closing += self.leasing.resize(1)

    def close(self) -> None:
        self.closing += self.leasing.close()

    def surplus(self) -> None:
        self.closing += self.leasing.surplus(0, lambda slot: True)

    def look(self) -> None:
        leasing = self.leasing
        assert leasing.in_use >= 0
        assert leasing.acquired >= 0
        assert len(list(leasing.held())) <= 4 + len(self.sizes) * 4

    OPERATIONS = (
        request, fill, put, discard, fail, leave, drop, drop_room, resize_up, resize_down, close, surplus, look
    )  # fmt: skip

    def check(self) -> None:
        """Let everybody finish, and see that nothing is missing, doubled or forgotten."""
        leasing = self.leasing
        # Nothing that is not caused by what has been done so far: nobody settles here for those who should have.
        free = not leasing.closed and bool(leasing.idle or leasing.vacant)
        assert not (leasing.waiters and free), "somebody waits while there is room"
        if leasing.closed:
            assert not leasing.waiters, "somebody waits at a closed pool"
            assert not leasing.idle, "something in a closed pool will never be closed"
        while self.closing or leasing.lost:
            slot = self.closing.pop() if self.closing else leasing.lost.popleft()
            self.shut += slot.resource is not VACANT
            self.closing += leasing.vacate(slot)
        granted = [waiter.slot for waiter in self.waiters if waiter.slot is not None]
        places = [leasing.idle, leasing.vacant, leasing.lost, self.held, self.rooms, granted]
        slots = [id(slot) for place in places for slot in place]

        assert len(slots) == len(set(slots)), "a slot has two holders"
        assert sorted(slots) == sorted(id(slot) for slot in leasing.slots()), "a slot is lost"
        assert leasing.max_size in self.sizes
        if leasing.closed:
            assert not leasing.vacant
        else:
            assert len(slots) - len(leasing._excess) == leasing.max_size
        for waiter in self.waiters:
            assert (waiter in leasing.waiters) == (waiter.woken == 0)
            assert waiter.woken <= 1
        assert all(waiter.woken == 0 for waiter in self.left)
        assert (self.opened, self.shut) == (int(leasing.opened), int(leasing.shut))
        assert leasing.open == sum(slot.resource is not VACANT for slot in leasing.slots())


def roomy() -> Bystander:
    """One held, one being opened, one idle, one vacant."""
    caller = Bystander(4)
    for step in (caller.request, caller.fill, caller.request, caller.fill, caller.put, caller.request, caller.request):
        step()
    caller.put()
    return caller


def crowded() -> Bystander:
    """One held, one being opened, two who wait."""
    caller = Bystander(2)
    for step in (caller.request, caller.fill, caller.request, caller.request, caller.request):
        step()
    return caller


def contended() -> Bystander:
    """Nothing free, one who waits: whoever grants it something may find that it has gone."""
    caller = Bystander(1)
    for step in (caller.request, caller.fill, caller.request):
        step()
    return caller


def shrunken() -> Bystander:
    """Three held and two of them too many."""
    caller = Bystander(3)
    for step in (caller.request, caller.fill) * 3:
        step()
    caller.resize_down()
    return caller


FILES = {module.__file__}
SITUATIONS = (roomy, crowded, contended, shrunken)


@pytest.mark.slow
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("outer", Bystander.OPERATIONS)
def test_any_operation_may_happen_in_the_middle_of_any_other(
    situation: Callable[[], Bystander], outer: Callable[[Bystander], None], interrupted: Callable[..., bool]
) -> None:
    """As a signal handler does, or a finalizer that a collection runs: at each bytecode of the module."""
    for inner in Bystander.OPERATIONS[:-1]:  # without the one that only looks
        for at in itertools.count(1):
            caller = situation()
            happened = interrupted(functools.partial(outer, caller), at, functools.partial(inner, caller), files=FILES)
            try:
                caller.check()
            except AssertionError as error:
                error.add_note(f"{inner.__name__} at bytecode {at} of {outer.__name__}")
                raise
            if not happened:
                break


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_collections")
@pytest.mark.parametrize("outer", Bystander.OPERATIONS)
def test_a_collection_may_find_a_slot_at_any_bytecode(
    outer: Callable[[Bystander], None], interrupted: Callable[..., bool]
) -> None:
    """A lease in a reference cycle comes back while its own thread is inside the pool."""
    for at in itertools.count(1):
        caller = crowded()
        cycle: list[Any] = [caller.held.pop()]
        cycle.append(cycle)
        del cycle
        happened = interrupted(functools.partial(outer, caller), at, gc.collect, files=FILES)
        gc.collect()
        caller.check()
        if not happened:
            break


@pytest.mark.parametrize("outer", ["request", "put", "discard", "fail", "leave"])
@pytest.mark.parametrize("situation", [roomy, crowded, contended])
def test_an_interrupt_at_any_bytecode_loses_no_slot(
    situation: Callable[[], Bystander], outer: str, interrupted: Callable[..., bool]
) -> None:
    """Ctrl-C wherever a signal handler may run: whatever was in hand then is collected, and comes back."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    happened = True
    for at in itertools.count(1):
        caller = situation()
        with contextlib.suppress(KeyboardInterrupt):
            happened = interrupted(
                getattr(caller, outer), at, interrupt, files=FILES, anywhere=False,
                spared={"__del__"},  # the interpreter swallows what is raised in a finalizer
            )  # fmt: skip
        leasing = caller.leasing
        while leasing.lost:
            leasing.vacate(leasing.lost.popleft())
        leasing.settle()

        granted = [waiter.slot for waiter in caller.waiters if waiter.slot is not None]
        places = [leasing.idle, leasing.vacant, caller.held, caller.rooms, granted]
        slots = [id(slot) for place in places for slot in place]
        assert len(slots) == len(set(slots)), at
        assert sorted(slots) == sorted(id(slot) for slot in leasing.slots()), at
        assert leasing.max_size == len(slots), at
        if not happened:
            break


# Threads.


class Crowd:
    """Threads that take, wait, give up, give back, discard and drop; a resource notices a second holder."""

    def __init__(self, size: int) -> None:
        self.news: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.leasing: Leasing[list[int]] = Leasing(size, notify=lambda: self.news.put(True))
        self.errors: list[BaseException] = []
        self.served: Counter[str] = Counter()

    def run(self, threads: int, rounds: int, also: Callable[[random.Random], object] = lambda rng: None) -> None:
        start = threading.Barrier(threads)

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                start.wait(PATIENCE)
                for _ in range(rounds):
                    self.use(rng)
                    also(rng)
            except BaseException as error:  # noqa: BLE001 - it is raised again, where somebody sees it
                self.errors.append(error)

        workers = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(threads)]
        # A dropped slot is collected where its last reference was, perhaps by a thread that has just granted it.
        janitor = threading.Thread(target=self.collect, daemon=True)
        for worker in (*workers, janitor):
            worker.start()
        for worker in workers:
            worker.join(3 * PATIENCE)
        self.news.put(False)
        janitor.join(PATIENCE)
        assert not any(worker.is_alive() for worker in workers), "a thread hangs"
        if self.errors:
            raise self.errors[0]

    def collect(self) -> None:
        while self.news.get():
            while self.leasing.lost:
                self.retire([self.leasing.lost.popleft()])

    def use(self, rng: random.Random) -> None:
        slot = self.leasing.take() or self.wait(rng)
        if slot is None:
            return
        if slot.resource is VACANT:
            if rng.random() < 0.1:
                self.served["failed"] += 1
                self.retire(self.leasing.vacate(slot))
                return
            self.leasing.filled(slot, [])
        holders = slot.resource
        holders.append(threading.get_ident())
        assert [threading.get_ident()] == holders, "a resource has two holders"
        assert [threading.get_ident()] == holders
        holders.clear()
        chance = rng.random()
        if chance < 0.1:
            self.retire([slot])
        elif chance < 0.2:
            self.served["dropped"] += 1
        else:
            self.retire(self.leasing.put(slot))
        self.served["used"] += 1

    def wait(self, rng: random.Random) -> Slot[list[int]] | None:
        gate = threading.Lock()
        gate.acquire()
        ticket: Ticket[list[int]] = Ticket(gate.release)
        self.retire(self.leasing.join(ticket))
        if rng.random() < 0.3 and self.leasing.leave(ticket):
            self.served["left"] += 1
            return None
        assert gate.acquire(timeout=PATIENCE), "a wake-up is lost"
        assert not gate.acquire(blocking=False)
        slot, ticket.slot = ticket.slot, None
        if slot is not None and rng.random() < 0.1:  # cancelled after it was granted
            self.retire(self.leasing.vacate(slot) if slot.resource is VACANT else self.leasing.put(slot))
            return None
        return slot

    def retire(self, slots: list[Slot[list[int]]]) -> None:
        for slot in slots:
            self.leasing.emptied(slot)
            self.retire(self.leasing.vacate(slot))

    def check(self) -> None:
        leasing = self.leasing
        self.retire([leasing.lost.popleft() for _ in range(len(leasing.lost))])
        free = [id(slot) for slot in (*leasing.idle, *leasing.vacant)]

        assert len(free) == len(set(free))
        assert sorted(free) == sorted(id(slot) for slot in leasing.slots())
        assert 0 == len(leasing.waiters)
        assert 0 == leasing.in_use
        assert leasing.open == len(leasing.idle)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("threads", "size"), [(4, 2), (8, 3), (6, 1)])
def test_threads_lose_nothing_and_forget_nobody(threads: int, size: int) -> None:
    crowd = Crowd(size)
    crowd.run(threads, 300)
    crowd.check()

    assert crowd.served["dropped"] > 0
    assert size == len(crowd.leasing.idle) + len(crowd.leasing.vacant)
    assert crowd.served["used"] > 0


@pytest.mark.usefixtures("hasty")
def test_threads_may_resize_at_once() -> None:
    crowd = Crowd(3)

    def resize(rng: random.Random) -> None:
        if rng.random() < 0.3:
            crowd.retire(crowd.leasing.resize(rng.randint(1, 5)))

    crowd.run(6, 200, resize)
    crowd.retire(crowd.leasing.resize(4))
    crowd.check()

    assert 4 == len(crowd.leasing.idle) + len(crowd.leasing.vacant)


@pytest.mark.usefixtures("hasty")
def test_threads_may_close_what_others_use() -> None:
    """Nobody is left waiting, and nothing is left open."""
    for seed in range(20):
        crowd = Crowd(2)
        rounds = itertools.count()

        def close(rng: random.Random) -> None:
            if next(rounds) == 30 + seed:  # noqa: B023 - called in this round
                crowd.retire(crowd.leasing.close())  # noqa: B023

        crowd.run(4, 20, close)
        crowd.check()

        assert [] == crowd.leasing.slots()
        assert 0 == crowd.leasing.open
