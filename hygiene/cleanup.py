"""What is to be done at the end, now and then, or when memory is short: once, in order, within a deadline.

Theory of operation

Order. Whatever is for the exit, functions as well as pools and registries, stands in one dict under a serial number.
Taking it out of that dict is the claim to run it, so nothing runs twice. Highest priority first, then last in, first
out: what was made last may use what was made before.

Concurrency. A signal handler or a finalizer may register and cancel at any bytecode, also while its own thread is in
the middle of doing the same. So there is no lock here: each change of a dict is one operation in C.

Deadline. Nobody can stop a function that hangs. It runs in a daemon thread of its own and is left behind there. It may
use up three quarters of the time that is left while others wait; then they have their turn, and it has what remains.

Signals. A handler runs between two bytecodes of the main thread, which may hold any lock. It therefore cleans nothing
up: it makes the program end in the ordinary way (an exception, or the framework's own graceful stop), so that `with`
and `finally` come first. A task on the event loop, and `atexit` without one, do the rest. A thread with a clock ends
the process if that takes too long.

Children. A forked child keeps nothing of its parent in that dict; each process arms its own exit with the first thing
that it registers. A child of multiprocessing ends with ``os._exit``, and until Python 3.13 without ``atexit``: there a
finalizer of `multiprocessing.util` does it, before those that end queues and pools. It is set in the hook that runs
when the child has cleared its finalizers. The processes of Celery's pool run none of them, but send a signal.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import contextlib
import contextvars
import functools
import inspect
import itertools
import math
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from hygiene.closing import Shield, is_async, note, retrieve, running_loop, unfinished_releases
from hygiene.janitor import aside, everything_alive, janitor, survive_fork
from hygiene.logs import logger
from hygiene.units import Duration, seconds

__all__ = [
    "Cleanup",
    "ShutdownReport",
    "SignalHandlers",
    "ashutdown",
    "close_at_shutdown",
    "install_signal_handlers",
    "register_cleanup",
    "relieve",
    "shutdown",
]

P = ParamSpec("P")
R = TypeVar("R")
Occasion = Literal["exit", "pressure", "interval"]


SHARE = 0.75
"""How much of the time that is left one may use up that keeps others waiting."""
NEEDS_LOOP = "needs an event loop: await ashutdown()"
STOPPED = "its event loop stopped before it was done"
OVER = "not started: the deadline was over. The next shutdown, or the exit, starts it"

_serial = itertools.count()
_exit: dict[int, _ForExit] = {}
_pressure: dict[int, Cleanup[..., Any]] = {}
_intervals: dict[int, _Interval] = {}
_current: dict[str, _Run] = {}
# The shutdown that runs this code. What a cleanup has started, or forked, may have it for longer than that goes on.
_within: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("hygiene_within_shutdown", default=None)


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """
    What became of each cleanup. Two of one name are told apart by a number: ``"flush"``, ``"flush (2)"``.

    ``str(report)`` is written for a person.
    """

    finished: tuple[str, ...]
    """Names of those that returned, in the order in which they did."""
    failed: Mapping[str, BaseException]
    """What the others raised, by name."""
    unfinished: Mapping[str, str]
    """Those that did not end, or could not start, by name: why."""
    elapsed: float
    """Seconds that it took."""

    @property
    def ok(self) -> bool:
        """Whether every one of them returned."""
        return not self.failed and not self.unfinished

    def __str__(self) -> str:
        counts = f"{len(self.finished)} finished, {len(self.failed)} failed, {len(self.unfinished)} unfinished"
        lines = [f"shutdown: {counts} in {self.elapsed:.2f} s"]
        lines += [f"  failed: {name}: {type(error).__name__}: {error}" for name, error in self.failed.items()]
        lines += [f"  unfinished: {name}: {why}" for name, why in self.unfinished.items()]
        return "\n".join(lines)


@dataclass(slots=True, eq=False)
class _Job:
    """One call that a shutdown has to make."""

    name: str
    function: Callable[[], Any]
    asynchronous: bool
    home: asyncio.AbstractEventLoop | None
    timeout: float | None = None

    def elsewhere(self) -> asyncio.AbstractEventLoop | None:
        """The loop it belongs to, if that runs in another thread."""
        home = self.home
        return home if home is not None and home.is_running() and home is not running_loop() else None


class _ForExit(Protocol):
    """What waits for the shutdown."""

    name: str
    priority: int
    _serial: int
    _pid: int

    def _job(self, *, in_loop: bool) -> _Job | None:
        """What to call; ``None`` if it died meanwhile."""

    def _blocks(self, here: asyncio.AbstractEventLoop) -> bool:
        """Whether it needs *here* to run, and a thread that waits for it there would wait for ever."""
        ...


class Cleanup(Generic[P, R]):
    """
    A registered cleanup. Calling it calls the function, so a decorated function can be used as before.

    Made by `register_cleanup`, and kept registered without anybody holding it. All attributes are for reading.
    """

    def __init__(
        self,
        function: Callable[P, R],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on: Occasion,
        every: float | None,
        priority: int,
        timeout: float | None,
        name: str,
    ) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function: Callable[..., R] = functools.partial(function, *args, **kwargs) if args or kwargs else function
        self._asynchronous = is_async(function)
        self._home = running_loop()
        self._serial = next(_serial)
        self._pid = os.getpid()
        self._every = every
        self._task: asyncio.Task[None] | None = None
        self._free = threading.Lock()  # taken by a run, never waited for
        self.on = on
        """The occasion: "exit", "pressure" or "interval"."""
        self.priority = priority
        """The higher, the earlier."""
        self.timeout = timeout
        """Seconds that it is given, within the deadline of all."""
        self.name = name
        """What logs and reports call it."""
        self.runs = 0
        """Times that it was started by its occasion."""
        self.errors = 0
        """Times that it raised then; logged, once a minute."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, here and now, whatever it is registered for."""
        return self._function(*args, **kwargs)

    @property
    def active(self) -> bool:
        """Whether it is going to run."""
        return any(self._serial in among for among in (_exit, _pressure, _intervals))

    def cancel(self) -> bool:
        """
        Forget it; return whether that was in time. One that runs at this moment goes on.

        Safe anywhere, also in a signal handler and in a finalizer.
        """
        found: list[object] = [among.pop(self._serial, None) for among in (_exit, _pressure, _intervals)]
        return any(one is not None for one in found)

    def __repr__(self) -> str:
        occasion = f"every {self._every:g} s" if self._every is not None else f"on {self.on}"
        counts = f", {self.runs} runs, {self.errors} failed" if self.runs else ""
        return f"<Cleanup {self.name!r} {occasion}, priority {self.priority}{counts}{'' if self.active else ', gone'}>"

    def _job(self, *, in_loop: bool) -> _Job:  # noqa: ARG002 - the other kind needs it
        return _Job(self.name, self._function, self._asynchronous, self._home, self.timeout)

    def _blocks(self, here: asyncio.AbstractEventLoop) -> bool:
        return self._asynchronous and (self._home is None or self._home is here)

    def _begin(self) -> bool:
        """Start it by itself, unless the last run still goes on; what comes of it is logged and counted."""
        if not self._free.acquire(blocking=False):
            if self._asynchronous and self._home is not None and self._home.is_closed():
                self.cancel()  # its last run was never begun, and never will be
            return False
        if not self.active:  # cancelled since its turn came
            self._free.release()
            return False
        self.runs += 1
        if not self._asynchronous:
            aside(self._go, self.name)
            return True
        self._on_home(self._function)
        return True

    def _go(self) -> None:
        """Run the synchronous function here."""
        try:
            result = self._function()
        except BaseException as error:
            self._ended(error)
            return
        if inspect.isawaitable(result):
            self._on_home(lambda: cast("Any", result))
        else:
            self._ended(None)

    def _on_home(self, function: Callable[[], Any]) -> None:
        home = self._home
        if home is None or home.is_closed():
            if function is not self._function:
                _discard(function())
            self.cancel()
            self._ended(RuntimeError("the event loop that it was registered on is closed (or was none): cancelled"))
            return

        def start() -> None:
            # The coroutine is made there, so that none is left over if the loop stops first. The task is kept because
            # the loop itself holds its tasks weakly.
            self._task = home.create_task(self._go_async(function))

        try:
            home.call_soon_threadsafe(start)
        except RuntimeError:  # closed since: the next visit finds out
            self._free.release()

    async def _go_async(self, function: Callable[[], Any]) -> None:
        error: BaseException | None = None
        try:
            async with asyncio.timeout(self.timeout):
                await function()
        except asyncio.CancelledError:
            raise
        except Exception as raised:
            error = raised
        finally:
            self._task = None
            self._ended(error)

    def _ended(self, error: BaseException | None) -> None:
        if error is not None:
            self.errors += 1
            logger.error(
                "cleanup %r failed",
                self.name,
                exc_info=error,
                extra={"event_name": "cleanup.failed", "cleanup": self.name, "of": self},
            )
        self._free.release()


class _Interval:
    """A charge of the janitor. Only the dict of intervals holds it, so it is gone as soon as it is cancelled."""

    def __init__(self, cleanup: Cleanup[..., Any], every: float) -> None:
        self._cleanup = cleanup
        self._every = every
        self._late = False

    def _visit(self) -> float | None:
        cleanup = self._cleanup
        if _current:
            return self._every  # what it works on is being closed right now
        if cleanup._begin():
            self._late = False
        elif not self._late:
            self._late = True  # said once, not at each visit
            logger.warning(
                "cleanup %r still runs %g s after it was started: its turn is skipped",
                cleanup.name,
                self._every,
                extra={"event_name": "cleanup.turn_skipped", "cleanup": cleanup.name},
            )
        return self._every


class _Owned:
    """A pool, a registry or the like that is closed at the shutdown, unless it is gone before."""

    def __init__(self, owner: object, name: str, priority: int) -> None:
        self.name = name
        self.priority = priority
        self._serial = serial = next(_serial)
        self._pid = os.getpid()
        self.inherited = _inherited.get(id(owner)) is owner and not hasattr(owner, "_saves_in_child")
        forget = _exit.pop
        self._owner = weakref.ref(owner, lambda _: forget(serial, None))

    def cancel(self) -> bool:
        """Forget it; return whether that was in time."""
        return _exit.pop(self._serial, None) is not None

    def _job(self, *, in_loop: bool) -> _Job | None:
        owner: Any = self._owner()
        if owner is None or getattr(owner, "closed", False) is True:
            return None
        if hasattr(owner, "_known"):
            owner._known = False
        close, aclose = getattr(owner, "close", None), getattr(owner, "aclose", None)
        job = _Job(self.name, lambda: None, asynchronous=True, home=getattr(owner, "_home", None))
        if aclose is not None and (in_loop or close is None or job.elsewhere() is not None):
            job.function = aclose
        elif close is not None:
            job.function, job.asynchronous = close, False
        return job

    def _blocks(self, here: asyncio.AbstractEventLoop) -> bool:
        owner = self._owner()
        return owner is not None and not hasattr(owner, "close") and getattr(owner, "_home", None) in {None, here}


@overload
def register_cleanup(
    fn: Callable[P, R],
    /,
    *,
    on: Occasion = "exit",
    every: Duration | None = None,
    priority: int = 0,
    timeout: Duration | None = None,
    name: str | None = None,
) -> Cleanup[P, R]: ...
@overload
def register_cleanup(
    fn: Callable[..., R],
    /,
    *args: Any,
    on: Occasion = "exit",
    every: Duration | None = None,
    priority: int = 0,
    timeout: Duration | None = None,
    name: str | None = None,
    **kw: Any,
) -> Cleanup[..., R]: ...
@overload
def register_cleanup(
    fn: None = None,
    /,
    *,
    on: Occasion = "exit",
    every: Duration | None = None,
    priority: int = 0,
    timeout: Duration | None = None,
    name: str | None = None,
) -> Callable[[Callable[P, R]], Cleanup[P, R]]: ...
def register_cleanup(
    fn: Callable[..., Any] | None = None,
    /,
    *args: Any,
    on: Occasion = "exit",
    every: Duration | None = None,
    priority: int = 0,
    timeout: Duration | None = None,
    name: str | None = None,
    **kw: Any,
) -> Any:
    """
    Have *fn* called at the exit, when memory is short, or at an interval. Also a decorator, with or without arguments.

    A synchronous function runs in a daemon thread of its own, because it may hang. One that has to run on an event
    loop is an ``async def``: it runs on the loop where it was registered. What it raises is logged and reported, and
    keeps no other from running. Safe to call from any thread, and from signal handlers and finalizers.

    Args:
        fn: What to call. Asynchronous functions are awaited.
        *args: What to call it with.
        on: "exit": by `shutdown`, `ashutdown`, or when the interpreter exits; once, in the process that registered
            it and not in one forked from it. "pressure": whenever memory is short. "interval": needs *every*.
        every: Seconds, or text such as ``"10m"``, between two starts; the first comes after that time. It never runs
            twice at once: its turn is skipped, and that is logged. Given alone it means ``on="interval"``.
        priority: The higher, the earlier. Of equal priority the last registered comes first, so what was made last
            may still use what was made before it.
        timeout: Seconds, or text, that one run may take. Without it a run may take what is left of the deadline of
            the whole. An asynchronous function is cancelled then; a synchronous one cannot be, and is left behind.
        name: What logs and reports call it. Default: the function's own name.
        **kw: What to call it with.

    Returns:
        A `Cleanup` handle with ``cancel()``. Calling the handle calls *fn*.

    Raises:
        TypeError: *fn* is not callable, or not with these arguments.
        ValueError: an unknown occasion, an interval without *every*, *every* for pressure, a time that is not positive.
        RuntimeError: an asynchronous function for "pressure" or "interval", and no event loop runs here to run it on.
    """
    if fn is None:
        if args:
            raise TypeError("register_cleanup(None, ...) has arguments, but no function to give them to")
        _check(on, every, priority, timeout)
        return functools.partial(
            register_cleanup, on=on, every=every, priority=priority, timeout=timeout, name=name, **kw
        )
    occasion, interval, limit = _check(on, every, priority, timeout)
    if not callable(fn):
        raise TypeError(f"a cleanup is a callable; found {fn!r}")
    # At the exit nobody is there any more to mend a wrong call; a method decorated in its class is one.
    with contextlib.suppress(ValueError):  # some builtins do not tell
        try:
            inspect.signature(fn).bind(*args, **kw)
        except TypeError as error:
            raise TypeError(f"{_name_of(fn)!r} cannot be called with the arguments given here: {error}") from None
    cleanup = Cleanup(fn, args, kw, occasion, interval, priority, limit, name or _name_of(fn))
    if occasion != "exit" and cleanup._asynchronous and cleanup._home is None:
        raise RuntimeError(
            f"the asynchronous cleanup {cleanup.name!r} needs an event loop to run on {occasion}, and none runs here. "
            f"Register it in a coroutine"
        )
    if occasion == "exit":
        _for_exit(cleanup)
    elif occasion == "pressure":
        _pressure[cleanup._serial] = cleanup
    else:
        assert interval is not None
        charge = _intervals[cleanup._serial] = _Interval(cleanup, interval)
        janitor.watch(charge, interval)
    return cleanup


def _check(
    on: Occasion, every: Duration | None, priority: int, timeout: Duration | None
) -> tuple[Occasion, float | None, float | None]:
    if on not in {"exit", "pressure", "interval"}:
        raise ValueError(f'on must be "exit", "pressure" or "interval"; found {on!r}')
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, the higher the earlier; found {priority!r}")
    interval = None if every is None else seconds(every, "every")
    limit = None if timeout is None else seconds(timeout, "timeout")
    if interval is None and on == "interval":
        raise ValueError('on="interval" needs every=: the time between two runs, such as "10m"')
    if interval is not None and on == "pressure":
        raise ValueError('every= makes an interval, and on="pressure" runs when memory is short: leave one out')
    return ("interval" if interval is not None else on), interval, limit


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def close_at_shutdown(owner: object, name: str, priority: int = 0) -> _Owned:
    """
    Have *owner* closed at the shutdown, in its turn among everything else, unless it is collected before.

    Held weakly, and only in the process that made it. Its ``aclose()`` is awaited on the loop in its attribute
    ``_home``, or where the shutdown is awaited; ``close()`` is called where it has no other or no loop can be had.
    Either must do no harm when it is closed already; if it has an attribute ``closed`` that is true, it is left out.
    An attribute ``_known``, if it has one, is set to false when its turn comes: what it opens later it has to announce
    again. One with nothing but ``aclose`` and a ``_home`` of ``None`` has not been used yet.
    """
    owned = _Owned(owner, name, priority)
    _for_exit(owned)
    return owned


_armed = False
_CHILD_PRIORITY = 100  # before the queues (10) and pools (15) of multiprocessing end: a cleanup may use them
# What a forked child has of its parent: its values are the parent's to close. Empty in a process that was not forked.
_inherited: Mapping[int, object] = {}


def _for_exit(item: _ForExit) -> None:
    global _armed  # noqa: PLW0603 - one process has one exit
    _exit[item._serial] = item
    if not _armed:
        _armed = True  # two threads at once may both get here; the second call finds nothing to do
        _arm()


def _arm() -> None:
    atexit.unregister(_at_exit)  # inherited by a fork, unless multiprocessing has cleared it
    atexit.register(_at_exit)
    # Not imported for this: a process that another one has started with multiprocessing has it.
    if (util := sys.modules.get("multiprocessing.util")) is not None:
        # A child of this process, or this one if it is still importing what a spawned child needs. Whatever is
        # registered with the module before that moment, the child clears.
        util.register_after_fork(_survivor, _arm_child)
        if _is_child("multiprocessing") or _is_child("billiard"):
            _arm_child(_survivor)


def _is_child(package: str) -> bool:
    """True if *package*, multiprocessing or the copy of it that Celery uses, has started this process."""
    process = sys.modules.get(f"{package}.process")
    return process is not None and type(process.current_process()).__name__ != "_MainProcess"


def _arm_child(_: object) -> None:
    """Have the end of this child of multiprocessing run what is for its exit."""
    util: Any = sys.modules["multiprocessing.util"]
    util.Finalize(None, _at_child_exit, exitpriority=_CHILD_PRIORITY)
    signals = sys.modules.get("celery.signals")
    if signals is not None and _is_child("billiard"):
        signals.worker_process_shutdown.connect(_at_celery_exit, weak=False, dispatch_uid="hygiene")


def _at_celery_exit(**_: object) -> None:
    _at_exit()


def _at_child_exit() -> None:
    """
    The end of a child of multiprocessing. Its threads may go on.

    At the end of an interpreter they have ended before. A child waits for them after its finalizers, so what is for the
    exit waits for them in a thread that the child waits for as well.
    """
    if _is_child("multiprocessing") and _other_threads():
        threading.Thread(target=_after_threads, name="hygiene-exit", daemon=False).start()
    else:
        _at_exit()


def _after_threads() -> None:
    while others := _other_threads():
        others[0].join()
    _at_exit()


def _other_threads() -> list[threading.Thread]:
    """The threads that an interpreter waits for, but for this one and the main thread."""
    here = {threading.current_thread(), threading.main_thread()}
    return [thread for thread in threading.enumerate() if not thread.daemon and thread not in here]


def _leave_inherited() -> None:
    """Take out registries and the like that hold values of the parent: this child saves, and closes nothing of it."""
    for item in list(_exit.values()):
        if getattr(item, "inherited", False):
            _exit.pop(item._serial, None)


def relieve() -> int:
    """
    Run the cleanups registered for "pressure"; return how many were started.

    Synchronous ones one after another, each in a thread of its own and waited for until its *timeout*, or for ten
    seconds; asynchronous ones are started on their loop. One whose last run has not ended is left out. Never raises
    what they raise: that is logged and counted by their handles.
    """
    started = 0
    for cleanup in sorted(list(_pressure.values()), key=_rank, reverse=True):  # noqa: C414 - the copy is one step
        if not cleanup._begin():
            continue
        started += 1
        limit = cleanup.timeout or 10.0
        if not cleanup._asynchronous:
            if cleanup._free.acquire(timeout=limit):
                cleanup._free.release()
            else:
                logger.warning(
                    "cleanup %r still runs after %g s: it is not waited for",
                    cleanup.name,
                    limit,
                    extra={"event_name": "cleanup.not_waited_for", "cleanup": cleanup.name},
                )
    return started


def _rank(item: _ForExit) -> tuple[int, int]:
    return item.priority, item._serial


# One shutdown


class _Run:
    """One shutdown: its deadline, and what has become of each cleanup so far."""

    def __init__(self, timeout: float | None) -> None:
        self._began = time.monotonic()
        self._timeout = timeout
        self._deadline = math.inf if timeout is None else self._began + timeout
        self._names: set[str] = set()
        self._numbers: dict[str, int] = {}  # how many of one name there are, so that thousands cost no search each
        self._finished: list[str] = []
        self._failed: dict[str, BaseException] = {}
        self._unfinished: dict[str, str] = {}
        self._plan: list[_ForExit] = []
        self._kept: list[_ForExit] = []
        self.running: dict[int, str] = {}
        self.outcome: futures.Future[ShutdownReport] = futures.Future()
        self.outcome.set_running_or_notify_cancel()  # so that no one who waits for it can cancel it

    @property
    def left(self) -> float:
        """Seconds until the deadline; ``inf`` without one."""
        return self._deadline - time.monotonic()

    def give_up(self) -> None:
        """Start nothing more, and wait for nothing more."""
        self._deadline = -math.inf

    def take(self) -> _ForExit | None:
        """The next one, which from now on is nobody else's."""
        while self.left > 0:
            # One was registered, cancelled or collected meanwhile: look again who is next.
            if len(self._plan) != len(_exit):
                self._plan = sorted(list(_exit.values()), key=_rank)  # noqa: C414 - the copy is one step
            if not self._plan:
                return None
            item = self._plan.pop()
            if _exit.pop(item._serial, None) is not None:
                return item
        return None

    def allowance(self, job: _Job) -> float:
        """Seconds to wait for *job* before others have their turn."""
        share = self.left * SHARE if _exit else self.left
        return min(share, math.inf if job.timeout is None else job.timeout)

    def ended(self, job: _Job, error: BaseException | None) -> None:
        """*job* returned, or raised *error*."""
        self.running.pop(id(job), None)
        name = self._called(job)
        if error is None:
            self._finished.append(name)
            return
        where = "" if job.asynchronous else ", in a thread of its own (not in the one that registered it)"
        note(error, f"while running cleanup {name!r}{where}")
        self._failed[name] = error
        logger.error("cleanup %r failed", name, exc_info=error, extra={"event_name": "cleanup.failed", "cleanup": name})

    def left_behind(self, job: _Job, why: str) -> None:
        """*job* did not end."""
        self.running.pop(id(job), None)
        self._unfinished[self._called(job)] = why

    def keep(self, item: _ForExit, why: str | None) -> None:
        """*item* could not be started; another shutdown may be able to. It is not worth a word without a reason."""
        if why is not None:
            self._unfinished[self._called(item)] = why
        self._kept.append(item)

    def too_late(self) -> str:
        """Why a job that still runs at the end is not waited for."""
        if self._deadline == -math.inf:
            return "still running when its task was cancelled for good"
        return f"still running at the deadline, after {self._timeout:g} s"

    def _called(self, job: _Job | _ForExit) -> str:
        while True:
            number = self._numbers[job.name] = self._numbers.get(job.name, 0) + 1
            name = job.name if number == 1 else f"{job.name} ({number})"
            if name not in self._names:
                self._names.add(name)
                return name

    def report(self) -> ShutdownReport:
        """What is known by now."""
        unfinished = self._unfinished | dict.fromkeys(list(self.running.values()), "still running")
        elapsed = time.monotonic() - self._began
        return ShutdownReport(tuple(self._finished), dict(self._failed), unfinished, elapsed)

    def end(self) -> ShutdownReport:
        """Say what came of it to all who wait."""
        if self.left <= 0:
            for item in sorted(list(_exit.values()), key=_rank, reverse=True):  # noqa: C414 - the copy is one step
                self._unfinished[self._called(item)] = OVER
        _exit.update((item._serial, item) for item in self._kept)
        report = self.report()
        _current.clear()
        self.outcome.set_result(report)
        if not report.ok:
            logger.warning("%s", report, extra={"event_name": "shutdown.incomplete"})
        return report


_Outcome = tuple[Any, BaseException | None]


def _attempt(function: Callable[[], Any]) -> _Outcome:
    _within.set(_current.get("run"))
    try:
        return function(), None
    except BaseException as error:
        return None, error


async def _attempt_async(function: Callable[[], Any]) -> _Outcome:
    _within.set(_current.get("run"))
    try:
        result = function()
        if inspect.isawaitable(result):
            await result
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        return None, error  # the loop would pass a SystemExit on at once, and all others with it
    return None, None


def _in_thread(job: _Job) -> futures.Future[_Outcome]:
    outcome: futures.Future[_Outcome] = futures.Future()
    outcome.set_running_or_notify_cancel()
    context = contextvars.copy_context()
    aside(lambda: outcome.set_result(context.run(_attempt, job.function)), job.name)
    return outcome


def _in_loop(job: _Job, loop: asyncio.AbstractEventLoop) -> futures.Future[_Outcome] | None:
    attempt = _attempt_async(job.function)
    try:
        return asyncio.run_coroutine_threadsafe(attempt, loop)
    except RuntimeError:  # closed since
        attempt.close()
        return None


def _discard(awaitable: object) -> None:
    """Let go of what nobody is going to await, without the warning that nobody did."""
    if isinstance(awaitable, Coroutine):
        awaitable.close()


def _awaiting(job: _Job, awaitable: Awaitable[Any]) -> _Job:
    """The second half of a plain function that returned an awaitable."""
    return _Job(job.name, lambda: awaitable, asynchronous=True, home=job.home, timeout=job.timeout)


def _drains() -> Iterable[_Job]:
    for releases in unfinished_releases():
        name = f"{releases.unfinished} asynchronous release(s)"
        yield _Job(name, releases.drain, asynchronous=True, home=releases.somewhere())


def shutdown(timeout: Duration | None = 10.0) -> ShutdownReport:
    """
    Run everything that is registered for the exit, in order, and say what became of it.

    It is done once, whoever asks: of two threads that call at once the second waits and gets the same report, and
    another call later finds nothing left. Called from within a cleanup, it returns an empty report at once. What
    cleanups register meanwhile is run, too. Asynchronous cleanups run on their event loop, which must be running in
    another thread; the others need `ashutdown`. Asynchronous releases of registries that are under way are waited for.

    Args:
        timeout: Seconds, or text such as ``"10s"``, for everything together; ``None`` for no limit. The default is a
            third of the 30 s that Kubernetes gives a process. While others wait, one may use up three quarters of
            what is left. Those that the deadline leaves no time for stay registered.

    Raises:
        RuntimeError: this is the thread of an event loop that asynchronous cleanups have to run on, or on which
            somebody else's shutdown may depend. Nothing was run: ``await ashutdown()`` there.
        KeyboardInterrupt: while it waited. What was not started yet stays registered.
    """
    limit = None if timeout is None else seconds(timeout, "timeout")
    run = _Run(limit)
    if _current and _within.get() is _current.get("run"):
        return run.report()
    if (here := running_loop()) is not None:
        blocked = [item.name for item in list(_exit.values()) if item._blocks(here)]
        if blocked or _current:
            what = f"the asynchronous cleanup {blocked[0]!r} runs" if blocked else "another shutdown may depend"
            raise RuntimeError(f"{what} on the event loop that shutdown() would block here: use `await ashutdown()`")
    if (other := _current.setdefault("run", run)) is not run:
        futures.wait([other.outcome], limit)
        return other.outcome.result() if other.outcome.done() else other.report()
    try:
        _shut_down(run)
    finally:
        report = run.end()
    return report


def _shut_down(run: _Run) -> None:
    late: list[tuple[_Job, futures.Future[_Outcome]]] = []
    while (item := run.take()) is not None:
        job = item._job(in_loop=False)
        if job is not None and job.asynchronous and job.elsewhere() is None:
            # A pool that never had a loop has nothing open: no reason to complain at the exit.
            run.keep(item, None if isinstance(item, _Owned) and job.home is None else NEEDS_LOOP)
        elif job is not None:
            _do(run, job, late)
    if run.left > 0:
        for job in _drains():
            _do(run, job, late)
    for job, future in late:
        if _wait(job, future, run.left):
            result, error = future.result()
            _discard(result)
            run.ended(job, error)
        else:
            run.left_behind(job, run.too_late())
            _cancel(job, future)


def _do(run: _Run, job: _Job, late: list[tuple[_Job, futures.Future[_Outcome]]]) -> None:
    run.running[id(job)] = job.name
    allowance = run.allowance(job)
    if job.asynchronous:
        loop = job.elsewhere()
        future = None if loop is None else _in_loop(job, loop)
        if future is None:
            run.left_behind(job, NEEDS_LOOP)
            return
    else:
        future = _in_thread(job)
    if not _wait(job, future, allowance):
        if job.asynchronous and job.home is not None and not job.home.is_running():
            run.left_behind(job, STOPPED)
        elif allowance == job.timeout:
            run.left_behind(job, f"timed out after {job.timeout:g} s")
            _cancel(job, future)
        else:
            late.append((job, future))
        return
    result, error = future.result()
    if error is None and inspect.isawaitable(result):
        run.running.pop(id(job), None)
        second = _awaiting(job, result)
        if second.elsewhere() is None:
            _discard(result)
        _do(run, second, late)
    else:
        run.ended(job, error)


def _wait(job: _Job, future: futures.Future[_Outcome], timeout: float) -> bool:
    """Whether *future* is done within *timeout*. Raises nothing but what a signal handler raises."""
    end = time.monotonic() + timeout
    loop = job.home if job.asynchronous else None
    while not future.done() and (left := end - time.monotonic()) > 0:
        if loop is not None and not loop.is_running():
            break
        # A loop that stops tells nobody, and its tasks never end: so look at it now and then.
        futures.wait([future], min(left, math.inf if loop is None else 0.2, threading.TIMEOUT_MAX))
    return future.done()


def _cancel(job: _Job, future: futures.Future[_Outcome]) -> None:
    if job.asynchronous and job.home is not None and not job.home.is_closed():
        future.cancel()


async def ashutdown(timeout: Duration | None = 10.0) -> ShutdownReport:
    """
    `shutdown` for asynchronous code: what belongs to this event loop, or to none, is awaited here.

    What belongs to another running loop is awaited there, and synchronous functions run in threads of their own, so
    the loop is not blocked. If the calling task is cancelled, the cleanups go on for up to ten seconds more, within
    the deadline; the cancellation is delivered after that.

    Args:
        timeout: Seconds, or text such as ``"10s"``, for everything together; ``None`` for no limit. See `shutdown`.
    """
    limit = None if timeout is None else seconds(timeout, "timeout")
    run = _Run(limit)
    if _current and _within.get() is _current.get("run"):
        return run.report()
    if (other := _current.setdefault("run", run)) is not run:
        await asyncio.wait([asyncio.wrap_future(other.outcome)], timeout=limit)
        return other.outcome.result() if other.outcome.done() else other.report()
    shield = Shield()
    try:
        await _ashut_down(run, shield)
    finally:
        report = run.end()
    shield.deliver()
    return report


async def _ashut_down(run: _Run, shield: Shield) -> None:
    late: list[tuple[_Job, asyncio.Future[_Outcome]]] = []
    try:
        while (item := run.take()) is not None:
            if (job := item._job(in_loop=True)) is not None:
                await _ado(run, job, late, shield)
        if run.left > 0:
            for job in _drains():
                job.home = None  # a drain knows by itself which loop has what
                await _ado(run, job, late, shield)
        for job, future in late:
            await _await(run, job, future, run.left, shield)
    finally:
        for job, future in late:
            if future.done() and not future.cancelled():
                result, error = future.result()
                _discard(result)
                run.ended(job, error)
            else:
                run.left_behind(job, run.too_late())
                future.cancel()
                future.add_done_callback(retrieve)


async def _ado(run: _Run, job: _Job, late: list[tuple[_Job, asyncio.Future[_Outcome]]], shield: Shield) -> None:
    run.running[id(job)] = job.name
    allowance = run.allowance(job)
    future: asyncio.Future[_Outcome]
    if not job.asynchronous:
        future = asyncio.wrap_future(_in_thread(job))
    else:
        loop = job.elsewhere()
        remote = None if loop is None else _in_loop(job, loop)
        if remote is None:
            job.home = None
            future = asyncio.get_running_loop().create_task(_attempt_async(job.function))
        else:
            future = asyncio.wrap_future(remote)
    await _await(run, job, future, allowance, shield)
    if not future.done():
        if job.asynchronous and job.home is not None and not job.home.is_running():
            run.left_behind(job, STOPPED)
        elif allowance == job.timeout:
            run.left_behind(job, f"timed out after {job.timeout:g} s")
        else:
            late.append((job, future))
            return
        future.cancel()
        future.add_done_callback(retrieve)
        return
    result, error = future.result()
    if error is None and inspect.isawaitable(result):
        run.running.pop(id(job), None)
        await _ado(run, _awaiting(job, result), late, shield)
    else:
        run.ended(job, error)


async def _await(run: _Run, job: _Job, future: asyncio.Future[_Outcome], timeout: float, shield: Shield) -> None:
    """Wait for *future*, at most *timeout* seconds, and although the task is cancelled."""
    end = time.monotonic() + timeout
    loop = job.home if job.asynchronous else None
    while not future.done() and (left := end - time.monotonic()) > 0:
        if loop is not None and not loop.is_running():
            return
        slot = min(left, math.inf if loop is None else 0.2)
        try:
            await shield.run(asyncio.wait([future], timeout=None if slot == math.inf else slot), job.name)
        except TimeoutError:  # cancelled, and the grace is over
            run.give_up()
            return


_exiting = False


def _at_exit() -> None:
    global _exiting  # noqa: PLW0603 - one process has one exit
    _exiting = True
    if _is_child("multiprocessing") or _is_child("billiard"):
        _leave_inherited()
    handlers = _handlers
    stop = None if handlers is None else handlers._stop
    left = 10.0 if stop is None else stop.deadline - time.monotonic()
    if _exit or unfinished_releases():
        shutdown(max(left, 0.001))


# Signals


@dataclass(slots=True, eq=False)
class _Stop:
    """One stop by a signal, from its arrival on."""

    signum: int
    deadline: float
    disarmed: _thread.LockType
    task: asyncio.Task[None] | None = None
    raise_last: object = None


class _Guardian(Coroutine[Any, Any, None]):
    """
    A coroutine that runs its first step even if its task is cancelled before it.

    A task that is cancelled so early ends without having run at all. And that is the rule here: the signal that makes
    the guardian also ends the loop, which then cancels every task.
    """

    def __init__(self, inner: Coroutine[Any, Any, None]) -> None:
        self._inner = inner
        self._started = False

    def send(self, value: Any) -> Any:
        self._started = True
        return self._inner.send(value)

    def throw(self, typ: Any, val: Any = None, tb: TracebackType | None = None) -> Any:
        if not self._started:
            self.send(None)
        return self._inner.throw(typ) if val is None else self._inner.throw(typ, val, tb)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, None]:
        return self._inner.__await__()


class SignalHandlers:
    """Installed signal handlers, made by `install_signal_handlers`. ``uninstall()`` puts back what was there."""

    def __init__(self) -> None:
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | signal.Handlers] = {}
        self._timeout = 0.0
        self._installed = True
        self._stop: _Stop | None = None

    @property
    def signals(self) -> tuple[signal.Signals, ...]:
        """The signals that are handled."""
        return tuple(map(signal.Signals, self._previous)) if self._installed else ()

    @property
    def stopping(self) -> bool:
        """Whether a signal has arrived."""
        return self._stop is not None

    def __repr__(self) -> str:
        names = ", ".join(one.name for one in self.signals) or "none"
        return f"<SignalHandlers {names}, timeout {self._timeout:g} s{', stopping' if self.stopping else ''}>"

    def uninstall(self) -> None:
        """
        Put back the handlers that were there before, where ours still stand. Twice does no harm.

        If a signal has arrived already, the process is not ended any more when its time is over.

        Raises:
            RuntimeError: this is not the main thread.
        """
        global _handlers  # noqa: PLW0603 - one process has one set of signal handlers
        _need_main_thread("uninstall()")
        self._installed = False
        if self._stop is not None:
            with contextlib.suppress(RuntimeError):  # released already
                self._stop.disarmed.release()
        for signum, previous in self._previous.items():
            # Who has put a handler over ours may put ours back later; then it passes the signal on.
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, previous)
        if _handlers is self:
            _handlers = None

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Make the program end. No logging, no lock: the code that was interrupted may hold any."""
        previous = self._previous[signum]
        if self._stop is not None or not self._installed:
            _pass_on(signum, frame, previous)
            return
        lock = _thread.allocate_lock()
        lock.acquire()
        stop = self._stop = _Stop(signum, time.monotonic() + self._timeout, lock)
        # Not threading.Thread, whose start takes a lock that the interrupted code may hold.
        with contextlib.suppress(RuntimeError):  # the interpreter is on its way out and starts none
            _thread.start_new_thread(self._watch, (stop,))
        if _exiting:
            return  # an exception would break off the cleanups that run
        loop = running_loop()
        if isinstance(previous, signal.Handlers) or previous is signal.default_int_handler:
            if loop is None:
                _raise(signum, previous)
            else:
                loop.call_soon_threadsafe(self._guard, stop, previous)
            return
        if loop is not None:
            loop.call_soon_threadsafe(self._guard, stop, None)
        _ask(previous, signum, frame)

    def _guard(self, stop: _Stop, previous: object) -> None:
        """On the loop: leave somebody there to do the cleanups, and end the loop if nobody else does."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(_Guardian(self._shut_down_loop(stop)), name="hygiene-shutdown")
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # a loop that just stops has no use for it
        stop.task = task
        if previous is not None:
            # Not in this step: the main task may have ended in the last one. Then the loop stops by itself after this
            # step, and an exception here would leave that stop over for whoever runs the loop next: the runner's close.
            loop.call_soon(self._end_loop, stop, previous)

    @staticmethod
    def _end_loop(stop: _Stop, previous: object) -> None:
        if stop.task is not None and stop.task.cancelling():
            stop.raise_last = previous  # the loop is at its end, and an exception here would break off the tasks
        else:
            # Out of run_forever, as asyncio does it: the runner cancels all tasks and waits until they have ended.
            _raise(stop.signum, previous)

    async def _shut_down_loop(self, stop: _Stop) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(asyncio.CancelledError):
            await loop.create_future()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)  # until `_end_loop` has run, if it is yet to run
        # The loop is at its end. Only those that were cancelled as this was: one that was not is the one that cancels,
        # and may be waiting for this task.
        ending = {task for task in asyncio.all_tasks() if task.cancelling()} - {asyncio.current_task()}
        # Less than the thread with the clock allows, which could not run what needs this loop.
        left = stop.deadline - time.monotonic() - self._timeout * (1 - SHARE + 0.1)
        if ending and left > 0:
            with contextlib.suppress(TimeoutError):
                await Shield().run(asyncio.wait(ending, timeout=left), "the end of the tasks")
        await ashutdown(max(stop.deadline - time.monotonic(), 0.001))
        if stop.raise_last is not None:
            await loop.shutdown_asyncgens()  # the runner will not come to that
            loop.call_soon(_raise, stop.signum, stop.raise_last)

    def _watch(self, stop: _Stop) -> None:
        """In a thread: end the process when its time is over, and do before what could still be done."""
        last_chance = (stop.deadline - time.monotonic()) * SHARE
        if stop.disarmed.acquire(timeout=last_chance):
            return
        # Something keeps the main thread from its exit: a `finally` that hangs, a thread that is waited for. What is
        # to be saved must not be lost for that.
        if _exit and not _current:
            with contextlib.suppress(BaseException):  # the process must end, whatever happens there
                shutdown(max(stop.deadline - time.monotonic(), 0.001))
        if stop.disarmed.acquire(timeout=max(stop.deadline - time.monotonic(), 0.0) + 0.5):
            return
        # Aside, because whoever hangs may hold the lock of the log or of stdout.
        said = threading.Event()
        aside(functools.partial(_last_words, stop.signum, self._timeout, said), "last-words")
        said.wait(1.0)
        os._exit(128 + stop.signum)


_handlers: SignalHandlers | None = None


def _last_words(signum: int, timeout: float, said: threading.Event) -> None:
    run = _current.get("run")
    names = [*(run.running.values() if run is not None else ()), *(item.name for item in list(_exit.values()))]
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    logger.critical(
        "%s, and the process has not ended within %g s. It is ended now. Not done: %s. The main thread is here:\n%s",
        signal.Signals(signum).name,
        timeout,
        ", ".join(names) or "no cleanup",
        "".join(traceback.format_stack(frame, limit=8)) if frame is not None else "(ended)",
        extra={"event_name": "shutdown.forced"},
    )
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    said.set()


def _raise(signum: int, previous: object) -> None:
    if callable(previous) and not isinstance(previous, signal.Handlers):
        previous(signum, None)  # raises KeyboardInterrupt
    raise SystemExit(128 + signum)


def _ask(previous: Callable[[int, FrameType | None], Any], signum: int, frame: FrameType | None) -> None:
    """Ask a framework, through its own handler, to stop."""
    server = getattr(previous, "__self__", None)
    if isinstance(getattr(server, "should_exit", None), bool):
        # uvicorn. Its handler does the same, but also sends itself the signal again once it has stopped; and by then
        # it has put back what it found before it started: mostly the default, which would kill the process right there.
        server.should_exit = True  # type: ignore[union-attr]  # it has one: see above
    else:
        previous(signum, frame)


def _pass_on(signum: int, frame: FrameType | None, previous: object) -> None:
    if callable(previous) and not isinstance(previous, signal.Handlers):
        previous(signum, frame)
    else:
        signal.signal(signum, cast("signal.Handlers", previous))
        signal.raise_signal(signum)


def _need_main_thread(what: str) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(f"{what} must be called in the main thread: Python sets signal handlers only there")


def install_signal_handlers(
    signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT), timeout: Duration = 10.0
) -> SignalHandlers:
    """
    Have these signals end the process in order: `with` and `finally` first, then every cleanup, within a deadline.

    In a plain program SIGTERM raises ``SystemExit(143)`` and SIGINT ``KeyboardInterrupt`` in the main thread; the
    cleanups run when the interpreter exits. Where an event loop runs there, all its tasks are cancelled, and the
    cleanups are awaited on the loop when they have ended. Another handler that is there already, such as a server's, is
    asked for its own graceful stop, and the cleanups come after it. A second signal goes straight to that handler, or
    to the default.

    When three quarters of *timeout* are over and the main thread has not come to the cleanups, they are run beside it.
    When it is over the process ends with ``os._exit(128 + signal)``, and a log entry that names what was not done and
    where the main thread was. A program that goes on after such a signal has to call ``uninstall()`` on what this
    returns.

    Opt-in: nothing else in this library touches signals. Call it in the main thread, early. Called again it returns
    the same handle, with further *signals* added and the new *timeout*.

    Args:
        signals: The signals. One that the process was started to ignore (``nohup``) stays ignored, and so does one
            whose handler was not set from Python.
        timeout: Seconds, or text such as ``"10s"``, from the signal to the end of the process. The default is a third
            of the 30 s after which Kubernetes kills it.

    Raises:
        RuntimeError: this is not the main thread.
        ValueError: no such signal, or one that nobody can handle.
    """
    global _handlers  # noqa: PLW0603 - one process has one set of signal handlers
    limit = seconds(timeout, "timeout")
    wanted = [signal.Signals(one) for one in signals]
    for one in wanted:
        if one.name in {"SIGKILL", "SIGSTOP"}:
            raise ValueError(f"{one.name} cannot be handled: the process is not asked")
    _need_main_thread("install_signal_handlers()")
    handlers = _handlers or SignalHandlers()
    handlers._timeout = limit
    for one in wanted:
        previous = signal.getsignal(one)
        if one in handlers._previous or previous is None or previous is signal.SIG_IGN:
            continue
        handlers._previous[one] = cast("Any", previous)  # before it can be called
        signal.signal(one, handlers._handle)
    _handlers = handlers
    return handlers


class _Survivor:
    """After a fork: what is for the exit of the parent is the parent's."""

    def _renew_locks(self) -> None:
        """`threading` was patched: see `janitor.renew_locks`."""
        for cleanup in [*_pressure.values(), *(interval._cleanup for interval in _intervals.values())]:
            if not cleanup._free.locked():
                cleanup._free = threading.Lock()

    def _after_fork(self) -> None:
        global _armed, _exiting, _inherited  # noqa: PLW0603 - one process has one exit
        here = os.getpid()
        for item in list(_exit.values()):  # what others, made ready before this, have registered is the child's
            if item._pid != here:
                _exit.pop(item._serial, None)
        _armed, _exiting = bool(_exit), False
        _inherited = everything_alive()
        if _armed:
            _arm()
        _current.clear()
        if _handlers is not None:
            _handlers._stop = None
        loop = running_loop()
        for serial, cleanup in [*_pressure.items(), *((s, i._cleanup) for s, i in _intervals.items())]:
            cleanup._free = threading.Lock()  # a run that was under way does not exist here
            if cleanup._asynchronous and cleanup._home is not loop:
                _pressure.pop(serial, None)  # the thread of its loop does not exist here either
                _intervals.pop(serial, None)


_survivor = _Survivor()
survive_fork(_survivor)
