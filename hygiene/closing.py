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
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent import futures
from typing import Any

__all__ = ["Closer", "Releases", "check_closer", "find_closer", "running_loop"]

Closer = str | Callable[[Any], Any]
_SYNC = ("close", "aclose", "__exit__", "__aexit__", "terminate", "shutdown")
_ASYNC = ("aclose", "close", "__aexit__", "__exit__", "terminate", "shutdown")


def check_closer(close: object) -> None:
    """Raise ``TypeError`` unless *close* is a callable, a method's name or ``"auto"``."""
    if close is not None and not callable(close) and not (isinstance(close, str) and close.isidentifier()):
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


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, if one does."""
    return asyncio._get_running_loop()


class Releases:
    """
    Asynchronous releases on their way, so that they can be waited for.

    Thread-safe. `start` never raises what a release raises: that goes to *failed*.
    """

    def __init__(self, failed: Callable[[Any, BaseException], None]) -> None:
        self._failed = failed
        self._changed = threading.RLock()  # a collection, at any line, may run a finalizer that comes back here
        self._running: set[asyncio.Future[None]] = set()
        self._handed: dict[futures.Future[None], tuple[Any, Callable[[], Any], asyncio.AbstractEventLoop]] = {}
        self._waiting: deque[tuple[Any, Callable[[], Any]]] = deque()

    @property
    def unfinished(self) -> int:
        """Releases that run, or that wait for `drain`."""
        return len(self._running) + len(self._handed) + len(self._waiting)

    def start(
        self, value: Any, close: Closer, loop: asyncio.AbstractEventLoop | None, *, required: bool = False
    ) -> None:
        """
        Release *value*, which was put in from *loop* (``None``: from plain code).

        A named method that *value* does not have is a failure if it is *required*; ``None`` has nothing to release.
        """
        release = find_closer(value, close, prefer_async=loop is not None)
        if release is None:
            if required and close != "auto" and value is not None:
                self._failed(value, AttributeError(f"{type(value).__name__!r} object has no method {close!r}"))
            return
        if loop is None or loop is running_loop() or not loop.is_running():
            self._call(value, release)
            return
        # Another thread than the loop's: what belongs to a loop (a task, a transport) is not thread-safe.
        handed: futures.Future[None] = futures.Future()
        handed.set_running_or_notify_cancel()  # so that a drain which is cancelled cannot cancel it
        self._handed[handed] = (value, release, loop)
        try:
            loop.call_soon_threadsafe(self._take, handed)
        except RuntimeError:  # closed since
            self._take(handed)

    def _take(self, handed: futures.Future[None]) -> None:
        """Call what was handed over, here, unless somebody else has."""
        if item := self._handed.pop(handed, None):
            self._call(item[0], item[1])
            handed.set_result(None)

    def _call(self, value: Any, release: Callable[[], Any]) -> None:
        loop = running_loop()
        if loop is None and _is_async(release):
            self._waiting.append((value, release))  # not called: nothing here could await the coroutine
            return
        try:
            result = release()
        except Exception as error:
            self._failed(value, error)
            return
        if not inspect.isawaitable(result):
            return
        if loop is None:
            self._waiting.append((value, lambda: result))
            return
        task = loop.create_task(self._finish(value, result))
        with self._changed:
            self._running.add(task)
        task.add_done_callback(self._done)

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

    async def drain(self) -> None:
        """Wait for every release that was started, and run here those that have no running loop."""
        here = asyncio.get_running_loop()
        while self.unfinished:
            while self._waiting:
                self._call(*self._waiting.popleft())
            for handed, (_, _, loop) in list(self._handed.items()):
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


async def _wait(task: asyncio.Future[None]) -> None:
    await asyncio.wait([task])


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
