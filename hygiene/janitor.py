"""One background thread for all that falls due.

It is started when the first charge is watched, sleeps until one is due, and ends when none is left. It holds its
charges weakly. Waking it goes through a ``SimpleQueue``, whose ``put`` is reentrant, because the news that a charge
died comes from a weak reference's callback: in any thread, at any bytecode.
"""

from __future__ import annotations

import contextvars
import heapq
import itertools
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Protocol, TypeVar

import wrapt

from hygiene.logs import logger

__all__ = [
    "Charge",
    "Janitor",
    "alive",
    "aside",
    "everything_alive",
    "janitor",
    "leave_alone",
    "renew_locks",
    "retire",
    "survive_fork",
]


class Charge(Protocol):
    """What the janitor looks after."""

    def _visit(self) -> float | None:
        """Do what is due; return the seconds until the next visit, or ``None`` for no more of them."""


class Survivor(Protocol):
    """What holds locks that must be made anew in a forked child."""

    def _after_fork(self) -> None:
        """Replace every lock: the thread that held it does not exist in this process."""


class Janitor:
    """
    The thread that visits its charges when they are due.

    Safe to call from any thread, from finalizers and inside a charge's own lock: `watch` takes no lock. In a forked
    child it starts anew with what it was watching.
    """

    def __init__(self) -> None:
        self._serial = itertools.count()
        self._start()
        survive_fork(self)

    def _start(self) -> None:
        self._news: queue.SimpleQueue[tuple[float, int, weakref.ref[Charge]] | None] = queue.SimpleQueue()
        self._agenda: list[tuple[float, int, weakref.ref[Charge]]] = []
        self._visiting: tuple[float, int, weakref.ref[Charge]] | None = None
        self._replacing: set[int] = set()  # serials of announcements that replace the visits promised before
        self._stale = False
        # Who takes it out runs the thread. No lock: a finalizer may come back here while the thread is being started.
        self._vacancy = deque([None])
        self._thread: threading.Thread | None = None
        self.wakeups = 0
        """Times that the thread stopped sleeping: something was due, or there was news of a charge."""

    @property
    def running(self) -> bool:
        """Whether the thread exists."""
        return self._thread is not None

    def watch(self, charge: Charge, delay: float) -> None:
        """Visit *charge* in *delay* seconds, and then as often as it asks for."""
        self._schedule(weakref.ref(charge, self._died), delay)

    def watch_anew(self, charge: Charge, delay: float) -> None:
        """Like `watch`, but replaces the visit that *charge* has been promised, if any."""
        self._schedule(weakref.ref(charge, self._died), delay, replaces=True)

    def _schedule(self, charge: weakref.ref[Charge], delay: float, *, replaces: bool = False) -> None:
        serial = next(self._serial)
        if replaces:
            self._replacing.add(serial)
        self._news.put((time.monotonic() + max(delay, 0.0), serial, charge))
        try:
            self._vacancy.pop()
        except IndexError:
            return  # the thread runs, or is just being started
        try:
            self._thread = threading.Thread(target=self._run, name="hygiene-janitor", daemon=True)
            self._thread.start()
        except BaseException:  # no thread can be started now; whoever watches next tries again
            self._thread = None
            self._vacancy.append(None)
            raise

    def _died(self, _: weakref.ref[Charge]) -> None:
        self._news.put(None)

    def _run(self) -> None:
        inbox = self._news
        while (wait := self._next_wait()) is not None:
            try:
                news = inbox.get(timeout=wait)
            except queue.Empty:
                self.wakeups += 1
                if inbox is not self._news:
                    retire()
                    return
            else:
                if inbox is not self._news:
                    retire()  # another thread has its work: see `_renew_locks`
                    return
                self.wakeups += 1
                if news is None:
                    self._stale = True
                else:
                    if news[1] in self._replacing:
                        self._forget_visits_before(news)
                    heapq.heappush(self._agenda, news)
                continue  # there may be more news, and it costs nothing to look
            self._visit_due()

    def _forget_visits_before(self, news: tuple[float, int, weakref.ref[Charge]]) -> None:
        """Drop the visits that the charge of *news* was promised before."""
        self._replacing.discard(news[1])
        charge = news[2]()
        self._agenda[:] = [item for item in self._agenda if item[2]() is not charge]
        heapq.heapify(self._agenda)

    def _next_wait(self) -> float | None:
        """Seconds to sleep, or ``None`` when nothing is left (and then the thread has resigned)."""
        agenda = self._agenda
        if self._stale:
            self._stale = False
            agenda[:] = [item for item in agenda if item[2]() is not None]
            heapq.heapify(agenda)
        if agenda:
            return min(max(agenda[0][0] - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
        self._thread = None
        self._vacancy.append(None)
        # A charge is announced before its sender looks for a vacancy: either we see the news, or the sender starts a
        # thread. If both, one of the two takes the place.
        if self._news.empty():
            return None
        try:
            self._vacancy.pop()
        except IndexError:
            return None
        self._thread = threading.current_thread()
        return 0.0

    def _visit_due(self) -> None:
        now = time.monotonic()
        while self._agenda and self._agenda[0][0] <= now:
            # Noted first: a child that is forked during a visit, and does not have this thread, has to repeat it.
            self._visiting = self._agenda[0]
            reference = heapq.heappop(self._agenda)[2]
            charge = reference()
            if charge is None:
                continue
            try:
                delay = charge._visit()
            except BaseException:  # nobody interrupts this thread: whatever it is, a hook has raised it
                logger.exception(
                    "the visit of %r failed; it is tried again in a minute",
                    type(charge).__name__,
                    extra={"event_name": "janitor.visit_failed"},
                )
                delay = 60.0
            del charge  # or this frame would keep it alive until the next visit
            if delay is not None:
                heapq.heappush(self._agenda, (time.monotonic() + delay, next(self._serial), reference))
            self._visiting = None

    def _renew_locks(self) -> None:
        """Have a thread of the kind that `threading` makes now do the work; the one that waits ends."""
        inbox = self._news
        self._after_fork()
        inbox.put(None)

    def _after_fork(self) -> None:
        watched = [item for item in self._agenda if item[2]() is not None]
        if self._visiting is not None and self._visiting not in watched and self._visiting[2]() is not None:
            watched.append(self._visiting)
        while not self._news.empty():
            news = self._news.get_nowait()
            if news is not None:
                watched.append(news)
        self._start()
        for due, _, charge in watched:
            self._schedule(charge, due - time.monotonic())


def aside(function: Callable[[], object], name: str) -> None:
    """
    Call *function*, which is somebody else's code and may hang, in a daemon thread that lives for this one call.

    The janitor's own thread must never run such code: whoever hangs there stops all that is due later. Where no
    thread can be started any more (the interpreter is on its way out), it is called here. What it raises is logged.
    """
    context = contextvars.copy_context()

    def call() -> None:
        try:
            context.run(function)
        except BaseException:
            logger.exception("%s failed", name, extra={"event_name": "janitor.call_failed"})

    try:
        threading.Thread(target=call, name=f"hygiene-{name}", daemon=True).start()
    except RuntimeError:
        call()


_survivors: weakref.WeakValueDictionary[int, Survivor] = weakref.WeakValueDictionary()


def survive_fork(survivor: Survivor) -> None:
    """Give *survivor*, held weakly, new locks in every forked child."""
    _survivors[id(survivor)] = survivor


T = TypeVar("T")


def alive(kind: type[T]) -> list[T]:
    """Everything of this *kind* that was given to `survive_fork` and has not been collected, oldest first."""
    # The references are copied in one step: other threads make and drop survivors meanwhile.
    found = (reference() for reference in _survivors.valuerefs())
    return [survivor for survivor in found if isinstance(survivor, kind)]


def everything_alive() -> weakref.WeakValueDictionary[int, Survivor]:
    """Everything that was given to `survive_fork` and has not been collected, by its ``id``; held weakly."""
    return weakref.WeakValueDictionary(_survivors)


def leave_alone(thing: object) -> None:
    """
    Keep *thing* for ever, and do nothing with it: it belongs to the parent process, or to an event loop that is gone.

    To collect a connection may say goodbye to a server that the parent is still talking to.
    """
    _elsewhere.append(thing)


_elsewhere: list[object] = []


def _after_fork_in_child() -> None:
    # Registries first: the janitor, which is the oldest, would visit them at once.
    for survivor in reversed(list(_survivors.values())):
        try:
            survivor._after_fork()
        except Exception:
            logger.exception(
                "%r could not be made ready in a forked process",
                type(survivor).__name__,
                extra={"event_name": "fork.not_ready"},
            )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def renew_locks() -> None:
    """
    Have everything that outlives a fork take its locks and threads anew from `threading`, which was patched.

    gunicorn loads a program with ``--preload``, forks a worker, and only there has gevent replace locks and threads. A
    lock of before does not tell greenlets apart, and a thread of before, or whoever waits for it, stops all of them.
    """
    for survivor in reversed(list(_survivors.values())):
        renew = getattr(survivor, "_renew_locks", None)
        if renew is None:
            continue
        try:
            renew()
        except Exception:
            logger.exception(
                "%r could not take new locks after gevent's patch",
                type(survivor).__name__,
                extra={"event_name": "patch.not_ready"},
            )


_Queue = queue.SimpleQueue  # of before the patch


def retire() -> None:
    """
    Wait for ever, in a daemon thread that gevent's patch has left without work.

    If it ended, `threading` would look for it under the number of a greenlet, and print a traceback.
    """
    inbox: queue.SimpleQueue[None] = _Queue()
    while queue.SimpleQueue is not _Queue:
        inbox.get()


def _patched(event: object) -> None:
    """Called by gevent for each of its events: the last says that everything is patched."""
    if type(event).__name__ == "GeventDidPatchAllEvent":
        renew_locks()


def _listen_to_gevent(events: ModuleType) -> None:
    events.subscribers.append(_patched)


wrapt.register_post_import_hook(_listen_to_gevent, "gevent.events")

janitor = Janitor()
