"""Who holds a resource, and who waits for one: the state of a pool, without a lock, a clock, a thread or a loop.

Theory of operation
-------------------

*Slots.* A pool of ten is ten `Slot` objects, and a slot is somewhere exactly once: in `Leasing.vacant` (nothing is open
there), in `Leasing.idle` (its resource is free), with a `Ticket` (on its way to the caller who waited), or with the one
caller who took it. To move it is to take it out of one place and to put it into the next, and each of these is one
operation of a C container, which the interpreter does not interrupt. So there is no lock to wait for, and nothing is
half changed at any bytecode: a signal handler, or a finalizer that a collection runs in the middle of any of these
methods, may use the same pool.

*Lost slots.* Nothing but its place refers to a slot strongly. One that is let go of anywhere (a lease that nobody
released, an exception between two bytecodes) is therefore collected, and its finalizer hands what it held to
`Leasing.lost`. That is how "a slot is never lost" holds by construction, and not by care.

*Waiting.* Who finds nothing joins `Leasing.waiters` and then looks again (`settle`); who puts something back looks for
waiters after it has. One of the two sees the other, as in Dekker's algorithm. To have taken a ticket out of `waiters`
is the right to decide about it: who grants it has taken it out, and so has who gives up.

*Order.* Waiters are served first in, first out, and while any wait nobody else is served: a caller looks at `waiters`
before it looks at `idle`, so who releases and asks again at once comes last.
"""

from __future__ import annotations

import itertools
import operator
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

__all__ = ["VACANT", "Leasing", "Slot", "Tally", "Ticket"]

R = TypeVar("R")

VACANT: Any = type("Vacant", (), {"__slots__": (), "__repr__": lambda _: "VACANT"})()
"""What a slot holds while nothing is open there, since ``None`` may be a resource."""

_MISSING = object()


class Tally:
    """A count that threads, signal handlers and finalizers may add to at once: each step is one of a C iterator."""

    __slots__ = ("_ticks", "add")

    add: Callable[[], None]

    def __init__(self) -> None:
        self._ticks = itertools.repeat(None, sys.maxsize)
        self.add = self._ticks.__next__

    def __int__(self) -> int:
        return sys.maxsize - operator.length_hint(self._ticks)


class Slot(Generic[R]):
    """Room for one resource. Whoever refers to it holds it, see the theory of operation."""

    __slots__ = (
        "__weakref__",
        "_leasing",
        "expires",
        "frames",
        "leaving",
        "opening",
        "reported",
        "resource",
        "since",
        "thread",
        "uses",
    )

    def __init__(self) -> None:
        self._leasing: Callable[[], Leasing[R] | None] = _nowhere
        self.resource: R = VACANT
        self.opening = False
        self.leaving = False
        """Whether its resource was taken out to be closed, so that nobody needs to be told if it is dropped."""
        self.expires = 0.0
        """When the resource has been open for long enough."""
        self.since = 0.0
        """When it was put back; while it is held and holders are recorded, when it was taken."""
        self.uses = 0
        """How often it was handed out. Only its holder adds to it."""
        self.frames: tuple[tuple[Any, int], ...] | None = None
        """Where it was taken, if that is recorded: code objects and offsets, innermost first."""
        self.reported = False
        """Whether somebody was told that it is held for too long."""
        self.thread: str | None = None
        """The thread or task that took it, if that is recorded."""

    def __repr__(self) -> str:
        return f"<Slot {self.resource!r}>"

    def __del__(self) -> None:
        # The finalizer of last resort; a slot that leaves as it should has forgotten its pool before.
        # (One whose making was interrupted has none.)
        leasing = getattr(self, "_leasing", _nowhere)()
        if leasing is not None:
            leasing._lose(self)

    def of(self, leasing: Leasing[R]) -> bool:
        """Whether this is a slot of *leasing*; after a fork, the slots of the parent are not the child's."""
        return self._leasing() is leasing

    def forget(self) -> bool:
        """Belong to no pool any more; whether it did before."""
        belonged = self._leasing is not _nowhere
        self._leasing = _nowhere
        return belonged


def _nowhere() -> None:
    """Where a slot belongs that was retired: a weak reference that is dead from the start."""


class Ticket(Generic[R]):
    """
    One caller who waits.

    Args:
        wake: Called once, when the ticket is decided: by any thread, perhaps in a finalizer, so it must not wait.
    """

    __slots__ = ("slot", "wake")

    def __init__(self, wake: Callable[[], object]) -> None:
        self.wake = wake
        self.slot: Slot[R] | None = None
        """What was granted; ``None`` after it was woken means that the pool was closed."""


class Leasing(Generic[R]):
    """
    The slots of one pool and the queue for them.

    Any thread may call anything at any time. Nothing here waits, and nothing opens or closes a resource: what is to be
    closed is returned.

    Args:
        max_size: How many slots there are.
        lifo: Whether the resource that came back last is handed out first: it is the warmest, and those that are not
            needed become old enough to be closed. Otherwise they take turns.
        notify: Called without arguments when a slot was lost, from a finalizer.
    """

    def __init__(self, max_size: int, *, lifo: bool = True, notify: Callable[[], object] = lambda: None) -> None:
        # Held here, too: a collector clears the weak references that are garbage themselves before it runs finalizers,
        # and the only slot of a pool may be part of a cycle.
        self._reference = weakref.ref(self)
        self.max_size = max_size
        self.idle: deque[Slot[R]] = deque()
        self.vacant: deque[Slot[R]] = deque()
        self.waiters: OrderedDict[Ticket[R], None] = OrderedDict()
        self.lost: deque[Slot[R]] = deque()
        self.closed = False
        self.winding = False
        """Whether something that comes back may have to be closed: the pool is closed, or too large since `resize`."""
        self.opened = Tally()
        self.shut = Tally()
        """Resources that were closed, or forgotten because nothing could close them."""
        # By identity, and in a dict: to copy it is one operation, which a WeakSet cannot promise.
        self._slots: dict[int, weakref.ref[Slot[R]]] = {}
        self._retired_uses: deque[int] = deque()
        self._excess: deque[None] = deque()  # one for each slot that is to go
        self._wishes: deque[int] = deque()
        self._resizing: deque[None] = deque([None])  # who takes it out resizes: never two at once
        self._notify = notify
        self.pick: Callable[[], Slot[R]] = self.idle.pop if lifo else self.idle.popleft
        """Take an idle slot; ``IndexError`` if there is none. Look at `waiters` first."""
        for _ in range(max_size):
            self._add()

    # Taking.

    def take(self) -> Slot[R] | None:
        """
        A slot at once, unless there is none or somebody waits.

        It may be vacant (its ``resource`` is `VACANT`): then who gets it opens the resource, and calls `filled` or
        `vacate`.
        """
        return None if self.waiters or self.closed else self._any()

    def join(self, ticket: Ticket[R]) -> list[Slot[R]]:
        """Wait with *ticket*, which may be decided before this returns; returns what is to be closed, as `put` does."""
        self.waiters[ticket] = None
        return self.settle()  # what came back between the look and the queue

    def leave(self, ticket: Ticket[R]) -> bool:
        """Stop waiting; ``False`` if *ticket* is decided already: it was woken, or is just about to be."""
        return self.waiters.pop(ticket, _MISSING) is not _MISSING

    # Giving back.

    def filled(self, slot: Slot[R], resource: R) -> None:
        """The holder of a vacant slot has opened *resource* there, and goes on to hold it."""
        slot.resource = resource
        slot.opening = False
        self.opened.add()

    def emptied(self, slot: Slot[R]) -> None:
        """The holder of *slot* has closed its resource, and goes on to hold the slot."""
        if slot.resource is not VACANT:
            slot.resource = VACANT
            self.shut.add()

    def put(self, slot: Slot[R]) -> list[Slot[R]]:
        """Give an open resource back; returns what is to be closed, which its caller holds from then on."""
        try:
            self.idle.append(slot)
        except BaseException:
            self.settle()  # interrupted right after it: nobody may be left waiting for what is there
            raise
        return self.settle() if self.waiters or self.winding else []

    def vacate(self, slot: Slot[R]) -> list[Slot[R]]:
        """
        The resource of *slot* has been closed, or could not be opened: the room is free again.

        Returns what is to be closed, as `put` does.
        """
        if not slot.of(self):
            return []
        self.emptied(slot)
        # An exception that somebody keeps (a handler of the log, a future) keeps the frames that it went through, and
        # the slot in them. What is handed out next must be held by its holder alone, or nobody would notice its loss.
        slot = self._renew(slot)
        try:
            self._excess.pop()
        except IndexError:
            self.vacant.append(slot)
        else:
            self._retire(slot)
        return self.settle()

    def settle(self) -> list[Slot[R]]:
        """Serve who waits, as far as there is room; returns what is to be closed, as `put` does."""
        self._serve()
        return self._wind() if self.winding else []

    # Changing as a whole.

    def close(self) -> list[Slot[R]]:
        """Hand out nothing any more, and wake who waits; returns the slots to be closed."""
        self.closed = self.winding = True
        return self.settle()

    def resize(self, max_size: int) -> list[Slot[R]]:
        """
        Have *max_size* slots; returns those to be closed. What is in use above that leaves when it comes back.

        If another thread is resizing, it does this when it has done that.
        """
        self._wishes.append(max_size)
        while self._wishes:
            try:
                self._resizing.pop()
            except IndexError:
                break  # whoever is at it looks for wishes after it has put the token back
            try:
                while self._wishes:
                    self._resize(self._wishes.popleft())
            finally:
                self._resizing.append(None)
        return self.settle()

    def _resize(self, max_size: int) -> None:
        change, self.max_size = max_size - self.max_size, max_size
        for _ in range(change):
            try:
                self._excess.pop()
            except IndexError:
                self._add()
        for _ in range(-change):
            self._excess.append(None)
        if self._excess:
            self.winding = True

    def surplus(self, keep: int, due: Callable[[Slot[R]], bool]) -> list[Slot[R]]:
        """
        Take the idle slots that are *due* out, the longest idle first, while more than *keep* resources are open.

        Their caller holds them from then on.
        """
        taken: list[Slot[R]] = []
        for slot in list(self.idle):
            if self.open - len(taken) <= keep:
                break
            if due(slot):
                try:
                    self.idle.remove(slot)
                except (ValueError, IndexError):  # handed out since
                    continue
                slot.leaving = True
                taken.append(slot)
        return taken

    # Looking.

    @property
    def open(self) -> int:
        """Resources that are open: idle or held."""
        return int(self.opened) - int(self.shut)

    @property
    def opening(self) -> int:
        """Slots whose resource is being opened."""
        return sum(slot.opening for slot in self.slots())

    @property
    def in_use(self) -> int:
        """Resources that somebody holds; those of lost leases count until they are closed."""
        return max(self.open - len(self.idle), 0)

    @property
    def acquired(self) -> int:
        """How often a slot was handed out."""
        return sum(self._retired_uses.copy()) + sum(slot.uses for slot in self.slots())

    def slots(self) -> list[Slot[R]]:
        """Every slot, wherever it is at this moment."""
        found = (reference() for reference in list(self._slots.values()))
        return [slot for slot in found if slot is not None and slot.of(self)]

    def held(self) -> Iterator[Slot[R]]:
        """The slots whose resource somebody holds, at this moment."""
        free = {id(slot) for slot in list(self.idle)}
        for slot in self.slots():
            if slot.resource is not VACANT and id(slot) not in free:
                yield slot

    def _any(self) -> Slot[R] | None:
        try:
            return self.pick()
        except IndexError:
            pass
        try:
            return self.vacant.pop()
        except IndexError:
            return None

    def _back(self, slot: Slot[R]) -> None:
        (self.vacant if slot.resource is VACANT else self.idle).append(slot)

    def _add(self) -> None:
        slot: Slot[R] = Slot()
        self._slots[id(slot)] = weakref.ref(slot)
        slot._leasing = self._reference
        self.vacant.append(slot)

    def _renew(self, slot: Slot[R]) -> Slot[R]:
        """A new slot in the place of *slot*, which belongs nowhere from then on."""
        heir: Slot[R] = Slot()
        heir.uses = slot.uses
        self._slots[id(heir)] = weakref.ref(heir)
        # Two stores with nothing in between that could raise: whatever interrupts this, one of the two comes back.
        heir._leasing, slot._leasing = self._reference, _nowhere
        self._slots.pop(id(slot), None)
        return heir

    def _retire(self, slot: Slot[R]) -> None:
        self._retired_uses.append(slot.uses)
        self._slots.pop(id(slot), None)
        slot.forget()

    def _serve(self) -> None:
        waiters = self.waiters
        while waiters:
            slot = None if self.closed else self._any()
            if slot is None and not self.closed:
                return
            try:
                ticket, _ = waiters.popitem(last=False)
            except KeyError:
                # The last one has left since. The next round sees whoever came while the slot was in our hands.
                if slot is not None:
                    self._back(slot)
                continue
            ticket.slot = slot
            ticket.wake()

    def _wind(self) -> list[Slot[R]]:
        """What a closed or shrunken pool lets go of."""
        leaving: list[Slot[R]] = []
        while True:
            self._drop_vacant()
            # What is on its way out counts, or each one that comes back meanwhile would take another one with it.
            while self.closed or len(self._excess) > sum(slot.leaving for slot in self.slots()):
                try:
                    slot = self.idle.popleft()
                except IndexError:
                    break
                slot.leaving = True
                leaving.append(slot)
            self.winding = winding = self.closed or bool(self._excess)
            # To compute it and to store it are two steps, and what was stored may be out of date: then nobody but us
            # looks at what was put back since.
            if winding or not (self.closed or self._excess):
                return leaving

    def _drop_vacant(self) -> None:
        while self.closed or self._excess:
            try:
                slot = self.vacant.pop()
            except IndexError:
                return
            if not self.closed:
                try:
                    self._excess.pop()
                except IndexError:
                    # Not too many any more. Who joined while the slot was in our hands has not seen it.
                    self.vacant.append(slot)
                    self._serve()
                    continue
            self._retire(slot)

    def _lose(self, slot: Slot[R]) -> None:
        """Keep what a collected slot held, in a slot of the same place. Called by its finalizer."""
        heir = self._renew(slot)
        heir.resource, heir.expires, heir.since = slot.resource, slot.expires, slot.since
        heir.frames, heir.thread, heir.leaving = slot.frames, slot.thread, slot.leaving
        lost = self.vacate(heir) if heir.resource is VACANT else [heir]
        if lost:
            self.lost.extend(lost)
            self._notify()
