"""Waiting until the background work is done: what the janitor has to do, and what event loops have to release."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hygiene.closing import running_loop, unfinished_releases
from hygiene.janitor import alive, janitor
from hygiene.pool import AsyncPool
from hygiene.units import Duration, seconds

__all__ = ["asettle", "settle"]


def settle(timeout: Duration = 10.0) -> None:
    """
    Return when all that is due by now has been done in the background, and what came of it.

    That is: the janitor has visited whatever is due (expired entries are dropped, idle resources are closed, interval
    cleanups have run), what it has started in threads has ended, and so have the asynchronous releases on event loops
    that run in other threads. Releases that wait for an event loop to be run are left to ``drain()`` or `asettle`.

    Things with a `ManualClock` are not the janitor's business: call their ``expire()``.

    Args:
        timeout: Seconds (or ``"10s"``) to wait at most. 10, as `shutdown` gives: more than anything that works takes.

    Raises:
        TimeoutError: it was not done in time. The message says what is still under way.
        RuntimeError: called in an event loop, which it would block: use `asettle`.
    """
    if running_loop() is not None:
        raise RuntimeError("settle() would block the event loop: use `await asettle()`")
    _settle_threads(time.monotonic() + seconds(timeout, "timeout"))


async def asettle(timeout: Duration = 10.0) -> None:
    """
    Return when all that is due by now has been done in the background, and every asynchronous release has ended.

    As `settle`, in an event loop: releases that wait for a loop are run in this one.

    Args:
        timeout: Seconds (or ``"10s"``) to wait at most.

    Raises:
        TimeoutError: it was not done in time. The message says what is still under way.
    """
    loop = asyncio.get_running_loop()
    end = time.monotonic() + seconds(timeout, "timeout")
    while True:
        outcome = loop.create_future()

        def wait(outcome: asyncio.Future[None] = outcome) -> None:
            error: BaseException | None = None
            try:
                _settle_threads(end)
            except BaseException as caught:
                error = caught
            if not loop.is_closed():
                loop.call_soon_threadsafe(_tell, outcome, error)

        # A thread of its own, which this loop does not wait for when it is closed.
        threading.Thread(target=wait, name="hygiene-settle", daemon=True).start()
        await outcome
        left = [releases for releases in unfinished_releases() if releases.unfinished]
        if not left:
            return
        try:
            async with asyncio.timeout(max(end - time.monotonic(), 0.0)):
                for releases in left:
                    await releases.drain()
        except TimeoutError:
            unfinished = sum(releases.unfinished for releases in left)
            raise TimeoutError(f"not settled in time: {unfinished} asynchronous release(s) still run") from None


def _tell(outcome: asyncio.Future[None], error: BaseException | None) -> None:
    if outcome.done():
        return
    if error is None:
        outcome.set_result(None)
    else:
        outcome.set_exception(error)


def _settle_threads(end: float) -> None:
    """Wait for the janitor, its threads and the running loops, until none of them has caused the next one work."""
    busy = True
    while busy:
        _settle_janitor(end)
        busy = False
        for thread in _asides():
            busy = True
            thread.join(max(end - time.monotonic(), 0.0))
            if thread.is_alive():
                raise TimeoutError(f"not settled in time: thread {thread.name!r} still runs")
        for loop, tasks in _releasing():
            busy = True
            waiting = asyncio.run_coroutine_threadsafe(_ended(tasks), loop)
            try:
                waiting.result(max(end - time.monotonic(), 0.0))
            except TimeoutError:
                waiting.cancel()
                raise TimeoutError("not settled in time: a release on an event loop still runs") from None


class _Last:
    """A charge that is visited when nothing else is due."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def _visit(self) -> float | None:
        agenda = janitor._agenda  # this is the janitor's own thread
        if not janitor._news.empty() or (agenda and agenda[0][0] <= time.monotonic()):
            return 0.0
        self.reached.set()
        return None


def _settle_janitor(end: float) -> None:
    if not janitor.running:
        return  # nobody is watched
    last = _Last()
    janitor.watch(last, 0.0)
    if last.reached.wait(max(end - time.monotonic(), 0.0)):
        return
    visiting = janitor._visiting
    charge = None if visiting is None else visiting[2]()
    what = "" if charge is None or charge is last else f" with {type(charge).__name__}"
    raise TimeoutError(f"not settled in time: the janitor is still busy{what}")


def _asides() -> list[threading.Thread]:
    """The threads in which the janitor has somebody else's code run."""
    here = threading.current_thread()
    return [
        thread
        for thread in threading.enumerate()
        if thread is not here
        and getattr(getattr(thread, "_target", None), "__qualname__", "") == "aside.<locals>.call"
        and thread.name.startswith("hygiene-")
    ]


def _releasing() -> Iterator[tuple[asyncio.AbstractEventLoop, Callable[[], list[asyncio.Future[Any]]]]]:
    """The running loops that have something to release, and what tells their tasks for it."""
    here = running_loop()
    for releases in unfinished_releases():
        if (loop := releases.somewhere()) is not None and loop is not here:

            def running(releases: Any = releases, loop: Any = loop) -> list[asyncio.Future[Any]]:
                return [task for task in list(releases._running) if task.get_loop() is loop]

            yield loop, running
    for pool in alive(AsyncPool):
        home = pool._home
        if pool._tasks and home is not None and home.is_running() and home is not here:
            yield home, functools.partial(list, pool._tasks)


async def _ended(tasks: Callable[[], list[asyncio.Future[Any]]]) -> None:
    while waited := tasks():
        await asyncio.wait(waited)
