"""How a value is released, on the thread or event loop where that is right.

A *closer* is a callable, the name of a method, or ``"auto"``. A synchronous one runs at once. One that returns an
awaitable is run by the event loop that the value belongs to; where that loop is not running, it waits until somebody
drains. None is ever lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent import futures
from typing import Any, TypeVar

from hygiene.errors import HOOK_ERRORS

__all__ = [
    "GRACE",
    "Closer",
    "Closing",
    "Releases",
    "Shield",
    "anyio_shield",
    "call_within",
    "check_closer",
    "find_closer",
    "is_async",
    "note",
    "retrieve",
    "running_loop",
    "unfinished_releases",
]

T = TypeVar("T")

GRACE = 10.0
"""
Seconds for which releases go on after their task was cancelled.

A third of the 30 s that Kubernetes gives a process between SIGTERM and SIGKILL, as in `shutdown`.
"""

Closer = str | Callable[[Any], Any]
_Handed = tuple[Any, Callable[[], Any], "Closing | None", asyncio.AbstractEventLoop]
_SYNC = ("close", "aclose", "__exit__", "__aexit__", "terminate", "shutdown")
_ASYNC = ("aclose", "close", "__aexit__", "__exit__", "terminate", "shutdown")


def check_closer(close: object, *, required: bool = False) -> None:
    """Raise ``TypeError`` unless *close* is a callable, a method's name or "auto"; ``None`` if it is not *required*."""
    if close is None and not required:
        return
    if not callable(close) and not (isinstance(close, str) and close.isidentifier()):
        raise TypeError(f'close must be a callable, the name of a method, or "auto"; found {close!r}')


def find_closer(value: Any, close: Closer, *, prefer_async: bool) -> Callable[[], Any] | None:
    """
    What releases *value* when called, or ``None`` if it has nothing of the kind.

    Args:
        value: What is to be released.
        close: A callable that takes *value*, the name of a method, or ``"auto"``: the first it has of ``close``,
            ``aclose``, ``__exit__``, ``__aexit__``, ``terminate``, ``shutdown``.
        prefer_async: Whether "auto" takes the asynchronous twin first: right for a value that lives on a loop.
    """
    if callable(close):
        return functools.partial(close, value)
    names = (_ASYNC if prefer_async else _SYNC) if close == "auto" else (close,)
    for name in names:
        method = getattr(value, name, None)
        if callable(method):
            return functools.partial(method, None, None, None) if name in {"__exit__", "__aexit__"} else method
    return None


def note(error: BaseException, text: str) -> None:
    """Add a note to *error*, if it takes any: a frozen dataclass does not, and what failed must not stop the rest."""
    with contextlib.suppress(Exception):
        error.add_note(text)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, if one does."""
    return asyncio._get_running_loop()


class Closing:
    """
    The close of one removed value, from its removal until it has ended: a `hygiene.waits.Target`.

    The registry finds it by its key and holds it weakly. The record of the removal holds it, and then the release.

    Args:
        key: Of the removed entry.
        home: The event loop that the value was put in from, if any.
        table: Where the registry finds it.
        lock: Of the registry; it is held now.
        name: Of the registry.
    """

    doing = "closing"
    ended = False
    sync = True
    task: asyncio.Task[None] | None = None
    releases: Releases | None = None  # knows it, if it cannot be called here and now
    handed: futures.Future[None] | None = None  # to the thread of `home`
    waiting = False  # for `drain`
    _before: weakref.ref[Closing] | None = None  # of the same key
    _promise: futures.Future[None] | None = None

    def __init__(
        self,
        key: Any,
        home: asyncio.AbstractEventLoop | None,
        table: dict[Any, weakref.ref[Closing]],
        lock: threading.RLock,
        name: str | None,
    ) -> None:
        self.key = key
        self.home = home
        self.name = name
        self.thread: int | None = threading.get_ident()
        self.loop = running_loop()
        self._lock = lock
        self._table: dict[Any, weakref.ref[Closing]] | None = table
        earlier = table.get(key)
        if earlier is not None and (other := earlier()) is not None and not other.ended:
            self._before = earlier
        table[key] = weakref.ref(self)

    @property
    def unfinished(self) -> Closing | None:
        """This one, or an earlier one of the same key, if there is one that has not ended. The lock is held."""
        if not self.ended:
            return self
        earlier = None if self._before is None else self._before()
        return None if earlier is None else earlier.unfinished

    @property
    def promise(self) -> futures.Future[None]:
        """Done when this has ended."""
        with self._lock:
            promise = self._promise
            if promise is None:
                promise = self._promise = futures.Future()
                promise.set_running_or_notify_cancel()  # so that a cancelled waiter cannot cancel it
                if self.ended:
                    promise.set_result(None)
        return promise

    def begin(self) -> None:
        """This thread calls the release now."""
        self.thread, self.loop, self.handed, self.waiting = threading.get_ident(), running_loop(), None, False

    def finish(self, *_: object) -> None:
        """The close has ended, or there is nothing to close."""
        table = self._table
        if self.ended or table is None:
            self.ended = True
            return
        with self._lock:
            self.ended = True
            reference = table.get(self.key)
            if reference is not None and (newest := reference()) is not None and newest.unfinished is None:
                del table[self.key]
            promise = self._promise
            if promise is not None and not promise.done():
                promise.set_result(None)

    def forget(self) -> None:
        """The process was forked: whoever closes it, and whoever holds the lock, is in the parent."""
        self._table = None
        self.ended = True

    def assist(self) -> bool:
        """
        Do in this thread or task what has to be done so that this ends; returns whether to look again later.

        Raises:
            RuntimeError: nothing that runs now will close it, and nothing here can.
        """
        here = running_loop()
        releases, handed, task = self.releases, self.handed, self.task
        if self.ended:
            return False
        if handed is not None and releases is not None and self.home is not None:
            if self.home is here or not self.home.is_running():
                releases._take(handed)
            return True
        if self.waiting and releases is not None:
            if not releases._take_waiting(self):
                raise RuntimeError(
                    f"the previous value of {self.key!r} is not closed yet, and no event loop closes it: use "
                    "`async with` for the lease, which does, or await drain() or aclose() before"
                )
            return True
        if task is None:
            return True
        loop = task.get_loop()
        if task.done() or loop.is_closed():
            self.finish()
        elif not loop.is_running():
            raise RuntimeError(
                f"the previous value of {self.key!r} is being closed by a task of an event loop that does not run now, "
                "so waiting for it would not end"
            )
        return loop is not here


class Releases:
    """
    Asynchronous releases on their way, so that they can be waited for.

    Thread-safe. `start` never raises what a release raises: that goes to *failed*.
    """

    def __init__(self, failed: Callable[[Any, BaseException], None]) -> None:
        self._failed = failed
        self._changed = threading.RLock()  # a collection, at any line, may run a finalizer that comes back here
        self._running: set[asyncio.Future[None]] = set()
        self._handed: dict[futures.Future[None], _Handed] = {}
        self._waiting: deque[tuple[Any, Callable[[], Any], Closing | None]] = deque()
        serial, forget = next(_serial), _everywhere.pop
        _everywhere[serial] = weakref.ref(self, lambda _: forget(serial, None))

    @property
    def unfinished(self) -> int:
        """Releases that run, or that wait for `drain`."""
        return len(self._running) + len(self._handed) + len(self._waiting)

    def somewhere(self) -> asyncio.AbstractEventLoop | None:
        """A loop that runs in another thread and has something of this to finish, if there is one."""
        with self._changed:
            loops = [task.get_loop() for task in self._running]
        loops += [loop for _, _, _, loop in list(self._handed.values())]
        here = running_loop()
        return next((loop for loop in loops if loop.is_running() and loop is not here), None)

    def start(
        self,
        value: Any,
        close: Closer,
        loop: asyncio.AbstractEventLoop | Closing | None,
        *,
        required: bool = False,
        claim: tuple[list[Any], int] | None = None,
    ) -> None:
        """
        Release *value*, which was put in from *loop* (``None``: from plain code), or the `home` of a `Closing`.

        A named method that *value* does not have is a failure if it is *required*; ``None`` has nothing to release.

        *claim* is a place in a list. It becomes ``None`` immediately before the release is called, or is kept here to
        be called later. So a caller that was interrupted by a signal handler knows whether to call `start` again.
        """
        closing = None
        if isinstance(loop, Closing):
            closing, loop = loop, loop.home
        release = find_closer(value, close, prefer_async=loop is not None)
        if release is None:
            if required and close != "auto" and value is not None:
                self._failed(value, AttributeError(f"{type(value).__name__!r} object has no method {close!r}"))
            if closing is not None:
                closing.finish()
            return
        if loop is None or loop is running_loop() or not loop.is_running():
            self._call(value, release, closing, claim)
            return
        # Another thread than the loop's: what belongs to a loop (a task, a transport) is not thread-safe.
        handed: futures.Future[None] = futures.Future()
        handed.set_running_or_notify_cancel()  # so that a drain which is cancelled cannot cancel it
        self._handed[handed] = (value, release, closing, loop)
        if closing is not None:
            closing.releases, closing.handed, closing.thread, closing.loop = self, handed, None, loop
        if claim is not None:
            claim[0][claim[1]] = None  # no signal handler runs between these lines
        try:
            loop.call_soon_threadsafe(self._take, handed)
        except RuntimeError:  # closed since
            self._take(handed)

    def _take(self, handed: futures.Future[None]) -> None:
        """Call what was handed over, here, unless somebody else has."""
        if item := self._handed.pop(handed, None):
            self._call(*item[:3])
            handed.set_result(None)

    def _take_waiting(self, closing: Closing) -> bool:
        """Call here the release of *closing*, which waits for `drain`; ``False`` if no event loop runs here."""
        if running_loop() is None:
            return False
        with self._changed:
            place = next((place for place, item in enumerate(list(self._waiting)) if item[2] is closing), None)
            if place is None:
                return True  # taken by another caller
            item = self._waiting[place]
            del self._waiting[place]
        self._call(*item)
        return True

    def _call(
        self,
        value: Any,
        release: Callable[[], Any],
        closing: Closing | None = None,
        claim: tuple[list[Any], int] | None = None,
    ) -> None:
        loop = running_loop()
        later = loop is None and is_async(release)
        claimed, place = ([None], 0) if claim is None else claim
        if later:
            claimed[place] = None
            self._wait_for_drain(value, release, closing)  # not called: nothing here could await the coroutine
            return
        ended = True
        try:
            if closing is not None:
                closing.begin()
            claimed[place] = None
            result = release()
            ended = not inspect.isawaitable(result)
        except HOOK_ERRORS as error:
            self._failed(value, error)
            return
        finally:
            if ended and closing is not None:
                closing.finish()
        if ended:
            return
        if loop is None:
            self._wait_for_drain(value, lambda: result, closing)
            return
        task = None
        try:
            task = loop.create_task(self._finish(value, result))
            with self._changed:
                self._running.add(task)
            task.add_done_callback(self._done)
        except BaseException:  # a signal handler has raised
            if task is None:
                self._wait_for_drain(value, lambda: result, closing)
            else:
                task.add_done_callback(self._done)
            raise
        finally:
            if task is not None and closing is not None:
                closing.task, closing.sync = task, False
                task.add_done_callback(closing.finish)

    def _wait_for_drain(self, value: Any, release: Callable[[], Any], closing: Closing | None) -> None:
        self._waiting.append((value, release, closing))
        if closing is not None:
            closing.releases, closing.handed, closing.waiting = self, None, True

    async def _finish(self, value: Any, result: Awaitable[Any]) -> None:
        try:
            await result
        except Exception as error:
            self._failed(value, error)
        except asyncio.CancelledError as error:  # its loop is going down; somebody must hear of it
            self._failed(value, error)
            raise

    def _done(self, task: asyncio.Future[None]) -> None:
        with self._changed:
            self._running.discard(task)

    def _after_fork(self) -> None:
        """Forget what runs in the parent, on loops that do not run here."""
        self._changed = threading.RLock()
        self._running, self._handed = set(), {}

    async def drain(self) -> None:
        """Wait for every release that was started, and run here those that have no running loop."""
        here = asyncio.get_running_loop()
        while self.unfinished:
            while self._waiting:
                with self._changed:
                    item = self._waiting.popleft() if self._waiting else None
                if item is not None:
                    self._call(*item)
            for handed, (_, _, _, loop) in list(self._handed.items()):
                if loop.is_running() and loop is not here:
                    await asyncio.wrap_future(handed)
                else:
                    self._take(handed)
            with self._changed:
                running = list(self._running)
            for task in running:
                await self._ended(task, here)

    async def _ended(self, task: asyncio.Future[None], here: asyncio.AbstractEventLoop) -> None:
        loop = task.get_loop()
        if loop is here:
            await asyncio.wait([task])
        elif loop.is_running():
            with contextlib.suppress(RuntimeError):  # it stops right now: looked at again in the next round
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_wait(task), loop))
        else:
            self._done(task)  # its loop stopped with the task unfinished: nothing can finish it


# For `shutdown`. Filled when a registry is made, not when a release is under way, so that it costs no release anything.
_serial = itertools.count()
_everywhere: dict[int, weakref.ref[Releases]] = {}


def unfinished_releases() -> list[Releases]:
    """All that have something under way, wherever they are."""
    found = (reference() for reference in list(_everywhere.values()))
    return [releases for releases in found if releases is not None and releases.unfinished]


async def _wait(task: asyncio.Future[None]) -> None:
    await asyncio.wait([task])


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling *function* gives something to await, as far as can be told before."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def call_within(function: Callable[[], T], timeout: float, what: str) -> T:
    """
    What *function* returns or raises, if that takes at most *timeout* seconds.

    It is called in a thread of its own, because there is no other way to go on without it: a call that hangs is left
    to itself. Where no thread can be started any more (the interpreter is on its way out), it is called here.

    Raises:
        TimeoutError: it still runs after *timeout* seconds. The message names *what*.
    """
    outcome: futures.Future[T] = futures.Future()
    try:
        threading.Thread(target=_settle, args=(outcome, function), name=f"hygiene-{what}", daemon=True).start()
    except RuntimeError:
        return function()
    # Not `result(timeout)`: since 3.11 its TimeoutError is the one that the function may raise itself.
    if not futures.wait([outcome], timeout).done:
        raise TimeoutError(f"{what} timed out: it was given {timeout:g} s and still runs")
    return outcome.result()


def _settle(outcome: futures.Future[T], function: Callable[[], T]) -> None:
    try:
        outcome.set_result(function())
    except BaseException as error:
        outcome.set_exception(error)


class Shield:
    """
    Lets awaitables end although their task is cancelled, and gives them a deadline from then on.

    One shield serves one task for one series of releases: the deadline is counted from the first cancellation, and
    further ones change nothing. The cancellation is not swallowed, only late: call `deliver` at the end.

    Args:
        grace: Seconds that are left, all together, once the task has been cancelled.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self._grace = grace
        self._deadline: float | None = None
        self._cancelled: asyncio.CancelledError | None = None

    async def run(self, awaitable: Awaitable[T], what: str, timeout: float | None = None, *, leave: bool = False) -> T:
        """
        What *awaitable* returns or raises; it runs in a task of its own, unless it is one.

        Raises:
            TimeoutError: it took longer than *timeout* seconds, or than what was left after a cancellation. It was
                cancelled then, unless *leave* says to leave it alone, and is not waited for any longer. The message
                names *what*.
        """
        loop = asyncio.get_running_loop()
        task: asyncio.Future[T] = asyncio.ensure_future(awaitable)
        end = None if timeout is None else loop.time() + timeout
        begun = False
        while not task.done():
            ends = [moment for moment in (end, self._deadline) if moment is not None]
            left = min(ends) - loop.time() if ends else None
            if left is not None and left <= 0 and begun:  # else one that needs no time would not even be called
                if not leave:
                    task.cancel()
                task.add_done_callback(retrieve)
                given = "was not done within its grace after a cancellation" if end is None else "timed out"
                raise TimeoutError(f"{what} {given}; it was {'left alone' if leave else 'cancelled'}")
            try:
                with anyio_shield():
                    await asyncio.wait([task], timeout=None if left is None else max(left, 0.0))
            except asyncio.CancelledError as error:
                if self._cancelled is None:
                    self._cancelled = error
                    self.begin_grace()
            begun = True
        try:
            return task.result()
        finally:
            del task  # it holds the exception, whose traceback holds this frame

    def begin_grace(self) -> None:
        """Count the deadline from now, unless it is counted already: the task was cancelled before it came here."""
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._grace

    @property
    def cancelled(self) -> bool:
        """Whether a cancellation is waiting to be delivered."""
        return self._cancelled is not None

    def deliver(self) -> None:
        """Raise the cancellation that arrived meanwhile, if one did."""
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            raise cancelled


def retrieve(task: asyncio.Future[Any]) -> None:
    """Look at the outcome of a task that nobody waits for, so that the loop does not complain about it."""
    if not task.cancelled():
        task.exception()


def anyio_shield() -> contextlib.AbstractContextManager[object]:
    """
    A scope that keeps anyio's cancellation out, in a process that uses it.

    Its scopes cancel a task anew at each step of the loop until it has left them. Without this a release that takes a
    second in a handler of Starlette would turn the loop as fast as it can for that second.
    """
    anyio = sys.modules.get("anyio")
    return contextlib.nullcontext() if anyio is None else anyio.CancelScope(shield=True)
