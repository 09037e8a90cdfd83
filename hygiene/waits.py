"""
Callers that wait for one another, and the circles that must not form.

Theory of operation
===================

A caller waits for a *target*: the end of a creation, of a load or of a close that another thread or task is working on.
A target is *held up* by a wait if it cannot end before the wait does. If the wait of a caller holds up its own target,
over as many others as it takes, no one would ever go on, so that caller gets an error instead.

**What holds up what.** A thread that waits holds up everything that this thread works on, and, if it runs an event
loop, everything that tasks of this loop work on. A task that waits holds up what it works on itself, and what those
tasks work on that await it: directly, in ``gather``, or in a ``TaskGroup``. A thread that a task awaits (``to_thread``)
is known by the context that it was given. Other ways of waiting for somebody's result (``Thread.join``, an executor, a
queue) are not seen; a timeout ends those.

**When.** A wait is recorded before it is checked, both under one lock. So of the waits that close a circle the last
one sees all others, and of two that begin at the same instant one is last.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, Protocol, Self

from hygiene.closing import retrieve, running_loop
from hygiene.errors import LeaseTimeout
from hygiene.janitor import survive_fork

__all__ = ["Deadline", "Target", "Wait", "wait_here", "wait_in_task", "works_on"]

_PAUSES = (0.01, 0.05, 0.5)  # seconds until a wait that may come to close a circle is checked again; the last repeats

works_on: contextvars.ContextVar[weakref.ref[Any] | None] = contextvars.ContextVar("works_on", default=None)
"""The target that this context works on, and so do the threads and tasks that were given a copy of it."""


class Target(Protocol):
    """What a caller waits for, and who works on it."""

    key: Any
    """Of the entry."""
    name: str | None
    """Of the registry."""
    thread: Any
    """The thread that works on it; ``None``: the thread of *loop* will."""
    loop: asyncio.AbstractEventLoop | None
    """The event loop that runs in this thread, if one does."""
    task: Any
    """The task that works on it, if it is not *sync*."""

    @property
    def sync(self) -> bool:
        """True if a plain call works on it, and not a task that may be suspended."""
        ...

    @property
    def doing(self) -> str:
        """``"creating"``, ``"loading"`` or ``"closing"``."""
        ...

    @property
    def ended(self) -> bool:
        """True if no caller has to wait for it any longer."""
        ...


class Deadline:
    """The moment until which one caller waits for a lease."""

    __slots__ = ("_end", "_timeout")

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._end = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def missed(self, key: Any, why: str) -> LeaseTimeout:
        """The error for a lease of *key* that was not acquired until then."""
        return LeaseTimeout(f"the lease of {key!r} timed out after {self._timeout:g} s: {why}")


class Wait:
    """
    One caller that waits in this block for *target*.

    Raises:
        RuntimeError: (on entering) *target* cannot end before this caller goes on.
    """

    __slots__ = ("_for", "_places", "loop", "sync", "target", "task", "thread")

    def __init__(self, target: Target, *, sync: bool) -> None:
        self.target = target
        self.sync = sync
        self.thread = threading.get_ident()
        self.loop = loop = running_loop()
        self.task = None if loop is None else asyncio.current_task(loop)
        outer = works_on.get()
        self._for: Any = None if outer is None else outer()
        self._places: list[Any] = []

    def __enter__(self) -> Self:
        try:
            with _waits.lock:
                for place in self._find_places():
                    self._places.append(place)
                    _waits.waiting.setdefault(place, []).append(self)
            self.check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def check(self) -> None:
        """Raise if this wait holds up its own target."""
        with _waits.lock:
            circle = _waits.circle(self)
        if circle:
            message = _explain(self, circle)
            del self, circle  # the error may become the outcome of a target
            raise RuntimeError(message)

    @property
    def changes(self) -> bool:
        """True if it may come to hold up its target later: a thread runs before the task that started it awaits it."""
        return self._for is not None and self._for.thread != self.thread

    def __exit__(self, *exc_info: object) -> None:
        with _waits.lock:
            while self._places:
                place = self._places[-1]
                waits = _waits.waiting.get(place, [])
                if self in waits:
                    waits.remove(self)
                if not waits:
                    _waits.waiting.pop(place, None)
                self._places.pop()

    def _find_places(self) -> Iterator[Any]:
        """Under which this wait is found by `_Waits.holding_up`."""
        if self.sync:
            yield "thread", self.thread
        else:
            yield "tasks", self.thread
            yield from _ancestors(self.task)
        if self.changes:
            yield "for", self._for.thread, self._for.task


def wait_here(
    target: Target,
    ended: futures.Future[None],
    deadline: Deadline | None = None,
    assist: Callable[[], bool] | None = None,
) -> bool:
    """
    Wait for *target* in this thread, until *ended* is done; ``False``: it was not, at *deadline*.

    *assist* is called before and now and then while waiting; it returns whether to call it again.
    """
    again = assist is not None and assist()
    with Wait(target, sync=True) as wait:
        pauses = _pauses()
        while not ended.done():
            left = None if deadline is None else deadline.left()
            if left == 0:
                return False
            futures.wait([ended], _sooner(left, next(pauses) if wait.changes or again else None))
            if assist is not None and again:
                again = assist()
            if wait.changes and not ended.done():
                wait.check()
    return True


async def wait_in_task(
    target: Target,
    ended: futures.Future[None],
    deadline: Deadline | None = None,
    assist: Callable[[], bool] | None = None,
) -> bool:
    """As `wait_here`, in this task."""
    again = assist is not None and assist()
    with Wait(target, sync=False) as wait:
        pauses = _pauses()
        waiter = asyncio.wrap_future(ended)
        waiter.add_done_callback(retrieve)
        try:
            while not ended.done():
                left = None if deadline is None else deadline.left()
                if left == 0:
                    return False
                pause = next(pauses) if wait.changes or again else None
                await asyncio.wait([waiter], timeout=_sooner(left, pause))
                if assist is not None and again:
                    again = assist()
                if wait.changes and not ended.done():
                    wait.check()
        finally:
            waiter.cancel()
    return True


def _pauses() -> Iterator[float]:
    return itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1]))


def _sooner(*seconds: float | None) -> float | None:
    return min((limit for limit in seconds if limit is not None), default=None)


class _Waits:
    """All waits of this process."""

    def __init__(self) -> None:
        self._after_fork()
        survive_fork(self)

    def _after_fork(self) -> None:
        self.lock = threading.RLock()  # a collection, at any line, may run a finalizer that waits, too
        self.waiting: dict[Any, list[Wait]] = {}

    def circle(self, wait: Wait) -> list[Target]:
        """The targets from that of *wait* to the one that *wait* holds up; none if there is no such one."""
        paths, seen = [[wait.target]], {id(wait.target)}
        for path in paths:  # which grows
            target = path[-1]
            if target.ended:
                continue
            for other in self.holding_up(target):
                if other is wait:
                    return path
                if id(other.target) not in seen:
                    seen.add(id(other.target))
                    paths.append([*path, other.target])
        return []

    def holding_up(self, target: Target) -> list[Wait]:
        """The waits that have to end before *target* can."""
        thread, task = target.thread, target.task
        if thread is None:  # handed to a loop that runs in some thread
            blocking = [wait for place, waits in self.waiting.items() if place[0] == "thread" for wait in waits]
            return [wait for wait in blocking if wait.loop is target.loop]
        found = list(self.waiting.get(("thread", thread), ()))
        if target.sync:  # a loop that runs inside this call is another one than the call runs in, if it does
            found += [wait for wait in self.waiting.get(("tasks", thread), ()) if wait.loop is not target.loop]
        elif task is not None:
            awaited = _awaited_by(task)
            for one in awaited:
                found += self.waiting.get(("task", one), ())
            if any(map(_awaits_thread, awaited)):
                found += self.waiting.get(("for", thread, task), ())
        return found


_waits = _Waits()


def _ancestors(task: asyncio.Task[Any] | None) -> Iterator[Any]:
    """*task*, and the tasks whose ``TaskGroup`` it is in: they end after it."""
    seen: set[asyncio.Task[Any]] = set()
    while task is not None and task not in seen:
        seen.add(task)
        yield "task", task
        groups = (getattr(callback, "__self__", None) for callback in _callbacks(task))
        task = next(
            (getattr(group, "_parent_task", None) for group in groups if isinstance(group, asyncio.TaskGroup)), None
        )


def _awaited_by(task: asyncio.Task[Any]) -> list[asyncio.Task[Any]]:
    """*task*, and the tasks that it awaits, directly or in ``gather``."""
    tasks = [task]
    for one in tasks:  # which grows
        waiter = getattr(one, "_fut_waiter", None)
        for other in (waiter, *(getattr(waiter, "_children", None) or ())):
            if isinstance(other, asyncio.Task) and other not in tasks:
                tasks.append(other)
    return tasks


def _awaits_thread(task: asyncio.Task[Any]) -> bool:
    """True if *task* awaits the result of another thread, as in ``to_thread``."""
    waiter = getattr(task, "_fut_waiter", None)
    return any(getattr(callback, "__name__", "") == "_call_check_cancel" for callback in _callbacks(waiter))


def _callbacks(future: Any) -> Iterable[Any]:
    # Not public; without it only what is awaited in these ways would not be seen.
    return [callback for callback, _ in getattr(future, "_callbacks", None) or ()]


def _explain(wait: Wait, circle: list[Target]) -> str:
    target, last = circle[0], circle[-1]
    if target is last:
        if wait.thread == target.thread and wait.sync and not target.sync and wait.task is not target.task:
            return (
                f"{target.doing} {target.key!r} is the work of a task of this event loop, which a plain `with` would "
                "block: use `async with` to wait for it"
            )
        return f"{target.doing} {target.key!r} asks for {target.key!r} itself; it would wait for ever"
    several = len({target.name for target in circle}) > 1
    keys = [f"{one.key!r} of {one.name or 'another registry'}" if several else repr(one.key) for one in circle]
    steps = [f"{one.doing} {key} waits for {other}" for one, key, other in zip(circle, keys, keys[1:], strict=False)]
    return f"{last.doing} {keys[-1]} would wait for ever: it asks for {keys[0]}, and {', and '.join(steps)}"
