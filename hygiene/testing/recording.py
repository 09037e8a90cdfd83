"""Where things were made while a test runs: raw frames, noted by what makes them, formatted only if somebody asks.

Nothing is recorded, and nothing is wrapped, unless a `Recording` is on. What is recorded is held weakly: a test that
is watched sees its objects die when they would have died anyway.

The audit hook is the exception: Python cannot take one out again. It is put in by the first recording of the process,
and costs each audited event (an import, an ``open``) the call of a function that looks at one list.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any, Generic, TypeVar

from hygiene import pool as pools
from hygiene.leasing import Slot
from hygiene.listeners import Listener
from hygiene.pins import Lease
from hygiene.pool import AsyncPoolLease, PoolLease, _Pool
from hygiene.registry import Registry
from hygiene.session import AsyncSession, Session, _Base, _Guard, managed_session

__all__ = ["Book", "Frames", "Recording", "at_import", "formatted", "passes"]

T = TypeVar("T")

Frames = tuple[tuple[CodeType, int], ...]
"""A stack: code objects and offsets, innermost first."""

_DEPTH = 64  # frames: a test's own are the innermost, and pytest's begin about 30 further out
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # noqa: PTH100, PTH120


# --- Stacks -----------------------------------------------------------------------------------------------------------


def _frames(frame: FrameType | None) -> Frames:
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < _DEPTH:
        if frame.f_code.co_filename != __file__:
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


_RUNNERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("_pytest", "pluggy", "unittest", "pytest_asyncio"))
_LOOP = os.path.join("asyncio", "events.py")  # noqa: PTH118 - the end of a path


def _own(frames: Frames) -> Frames:
    """The part of *frames* that the test runner, or an event loop, has called."""
    own: list[tuple[CodeType, int]] = []
    for code, offset in frames:
        if any(part in code.co_filename for part in _RUNNERS):
            break
        if code.co_name == "_run" and code.co_filename.endswith(_LOOP):
            break
        own.append((code, offset))
    return tuple(own)


def formatted(frames: Frames) -> str:
    """*frames* as a traceback shows them, innermost last, without those of the test runner and of this package."""
    own = _own(frames) or frames
    inner = next((depth for depth, (code, _) in enumerate(own) if not code.co_filename.startswith(_PACKAGE)), 0)
    summaries = []
    for code, offset in own[inner:]:
        lines = (line for start, end, line in code.co_lines() if start <= offset < end and line is not None)
        summaries.append(traceback.FrameSummary(code.co_filename, next(lines, code.co_firstlineno), code.co_name))
    return "".join(traceback.StackSummary.from_list(reversed(summaries)).format())


def at_import(frames: Frames) -> bool:
    """Whether a module was being imported: what it makes then lives as long as the process."""
    return any(code.co_filename == "<frozen importlib._bootstrap>" for code, _ in _own(frames))


def passes(frames: Frames, *modules: str) -> bool:
    """Whether one of the *frames* is in one of this package's *modules* (``"shared.py"``)."""
    return any(code.co_filename.startswith(_PACKAGE) and code.co_filename.endswith(modules) for code, _ in frames)


# --- What is noted ----------------------------------------------------------------------------------------------------


class Book(Generic[T]):
    """Where things were made, by identity, and only as long as they live."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], Frames]] = {}

    def note(self, thing: T, frames: Frames) -> None:
        """*thing* was made there."""
        key, entries = id(thing), self._entries
        entries[key] = (weakref.ref(thing, lambda _: entries.pop(key, None)), frames)

    def frames(self, thing: T) -> Frames | None:
        """Where *thing* was made; ``None`` if that was not while this recording was on."""
        entry = self._entries.get(id(thing))
        return entry[1] if entry is not None and entry[0]() is thing else None

    def alive(self) -> list[tuple[T, Frames]]:
        """What lives, oldest first."""
        found = [(reference(), frames) for reference, frames in list(self._entries.values())]
        return [(thing, frames) for thing, frames in found if thing is not None]


class Recording:
    """
    What is made from now on, and where, by this thread and by those that are started from now on.

    What an older thread makes belongs to whoever started it.
    """

    def __init__(self) -> None:
        here = threading.get_ident()
        # With the thread objects: the number of a thread that has ended is given to a new one.
        self._older = {ident: _thread(ident) for ident in sys._current_frames() if ident != here}
        self._paused = 0
        self.threads: Book[threading.Thread] = Book()
        self.executors: Book[ThreadPoolExecutor] = Book()
        self.tasks: Book[asyncio.Task[Any]] = Book()
        self.sockets: Book[Any] = Book()
        self.pools: Book[_Pool[Any]] = Book()
        self.pool_leases: Book[Slot[Any]] = Book()
        self.registries: Book[Registry[Any, Any]] = Book()
        self.sessions: Book[Session | AsyncSession] = Book()
        self.listeners: Book[Listener] = Book()
        self.opened: dict[str, Frames] = {}
        """Where each path was last opened."""
        self.leases: dict[int, list[tuple[weakref.ref[Registry[Any, Any]], Any, Frames]]] = {}
        """
        Leases that were entered and not left, by identity: registry, key and stack.

        More than one of an identity, if one was dropped without having been left: then that is free for the next.
        """
        self.guards: dict[int, Frames] = {}
        """What tells of a session or pool that is dropped, by identity; it takes itself out."""
        self.dropped: list[tuple[str, str, Frames]] = []
        """Kind, words and stack of what was dropped with something left to release."""
        self.foreign: set[int | str] = set()
        """What was opened on behalf of somebody older: paths, and the identities of sockets."""
        self.abandoned: Callable[[asyncio.AbstractEventLoop], object] = lambda loop: None
        """Told of an event loop of the test's, whose tasks are about to be cancelled."""

    def start(self) -> None:
        """Begin to record."""
        _install()
        _on.append(self)

    def stop(self) -> None:
        """Record nothing more; nobody else's wrapping is undone."""
        _on.remove(self)
        if not _on:
            _uninstall()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block in which nothing is recorded."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @property
    def mine(self) -> bool:
        """Whether what this thread makes now is to be recorded."""
        ident = threading.get_ident()
        return not self._paused and (ident not in self._older or self._older[ident]() is not _thread(ident)())

    def owned_elsewhere(self, frames: Frames) -> bool:
        """Whether what was made there has an owner that outlives any test."""
        return at_import(frames) or passes(frames, "shared.py", "readings.py", "watching.py")


def _thread(ident: int) -> Callable[[], threading.Thread | None]:
    """A weak reference to the thread with this number; `threading.current_thread` would make up one that it misses."""
    thread = threading._active.get(ident)  # type: ignore[attr-defined] # there is no other way to ask by number
    return _nobody if thread is None else weakref.ref(thread)


def _nobody() -> None:
    """A thread that was started by other means than `threading`."""


_on: list[Recording] = []  # more than one: a test of a plugin runs tests


def _note(take: Callable[[Recording, Frames], object], frame: FrameType | None) -> None:
    frames: Frames | None = None
    for recording in _on.copy():
        if recording.mine:
            if frames is None:
                frames = _frames(frame)
            take(recording, frames)


# --- The audit hook: files, sockets -----------------------------------------------------------------------------------


def _heard_open(args: tuple[Any, ...], frame: FrameType) -> None:
    path = args[0]
    if isinstance(path, (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - a Path costs five times as much
        _heard(path, frame, lambda recording, frames: recording.opened.__setitem__(path, frames))


def _heard_socket(args: tuple[Any, ...], frame: FrameType) -> None:
    _heard(id(args[0]), frame, lambda recording, frames: recording.sockets.note(args[0], frames))


def _heard(key: int | str, frame: FrameType, take: Callable[[Recording, Frames], object]) -> None:
    frames: Frames | None = None
    for recording in _on.copy():
        recording.foreign.discard(key)
        if not recording.mine or _for_older_pool(frame, recording):
            recording.foreign.add(key)
        else:
            frames = frames or _frames(frame)
            take(recording, frames)


def _for_older_pool(frame: FrameType | None, recording: Recording) -> bool:
    """Whether a pool that is older than the recording opens a resource, which is the pool's then."""
    depth = 0
    while frame is not None and depth < _DEPTH:
        if frame.f_code.co_filename == pools.__file__ and frame.f_code.co_name == "_prepare":
            pool = frame.f_locals.get("self")
            return isinstance(pool, _Pool) and recording.pools.frames(pool) is None
        frame, depth = frame.f_back, depth + 1
    return False


_HEARD: dict[str, Callable[[tuple[Any, ...], FrameType], None]] = {
    "open": _heard_open,
    "sqlite3.connect": _heard_open,
    "socket.__new__": _heard_socket,
}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _on or event not in _HEARD:
        return
    with contextlib.suppress(Exception):  # what is watched must not fail because of the watching
        _HEARD[event](args, sys._getframe(1))


# --- Wrapping what hygiene and asyncio make ---------------------------------------------------------------------------


def _create_task(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_task(self: Any, coro: Any, **kwargs: Any) -> Any:
        task = original(self, coro, **kwargs)
        _note(lambda recording, frames: recording.tasks.note(task, frames), sys._getframe(1))
        return task

    return create_task


def _cancel_all_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
        if _by_test_runner(sys._getframe(1)):
            for recording in _on.copy():
                recording.abandoned(loop)
        original(loop)

    return cancel_all_tasks


def _by_test_runner(frame: FrameType | None) -> bool:
    """Whether the loop belongs to what runs the test, and not to an ``asyncio.run`` in it, which ends its own tasks."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in {"asyncio.runners", "contextlib"}:
            return name.partition(".")[0] in {"anyio", "pytest_asyncio"} or name == "unittest.async_case"
        frame = frame.f_back
    return False


def _init(record: Callable[[Recording, Any, Frames], object]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps an ``__init__``, or what is like it: *record* is called after it."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            _note(lambda recording, frames: record(recording, self, frames), sys._getframe(1))

        return init

    return wrap


def _made_executor(recording: Recording, executor: ThreadPoolExecutor, frames: Frames) -> None:
    # The default executor of a loop goes with the loop.
    if not frames or frames[0][0].co_name != "run_in_executor":
        recording.executors.note(executor, frames)


def _made_pool(recording: Recording, pool: _Pool[Any], frames: Frames) -> None:
    recording.pools.note(pool, frames)
    recording.guards[id(pool)] = frames


def _made_session(recording: Recording, session: Any, frames: Frames) -> None:
    recording.sessions.note(session, frames)
    recording.guards[id(session._guard)] = frames


def _guarded(words: Callable[[Any], tuple[str, str] | None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a ``__del__`` that warns; *words* says of what kind it is and what it warns of, if it does."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def delete(self: Any) -> None:
            found = words(self)
            for recording in _on.copy():
                frames = recording.guards.pop(id(self), None)
                if found is not None and frames is not None:
                    recording.dropped.append((*found, frames))
            original(self)

        return delete

    return wrap


def _dropped_session(guard: Any) -> tuple[str, str] | None:
    releases = guard._releases
    return ("sessions", f"{guard._session} was dropped with {len(releases)} to release") if releases else None


def _dropped_pool(pool: Any) -> tuple[str, str] | None:
    core = getattr(pool, "_core", None)
    if core is None or core.closed or not core.open:
        return None
    return "pools", f"pool {pool.name!r} was dropped with {core.open} open"


def _enter_session(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def enter(self: Any) -> Any:
        value = original(self)
        session = self._session
        _note(lambda recording, frames: recording.sessions.note(session, frames), sys._getframe(1))
        return value

    return enter


def _enter_pool_lease(original: Callable[..., Any]) -> Callable[..., Any]:
    leased, caller = _leased, sys._getframe

    def enter(self: Any) -> Any:
        try:
            value = original(self)
            leased(self, caller(1))
            return value
        finally:
            del self  # as in the pool: an exception that is kept must not keep the lease

    return _of_pool(original, enter)


def _aenter_pool_lease(original: Callable[..., Any]) -> Callable[..., Any]:
    leased, caller = _leased, sys._getframe

    async def enter(self: Any) -> Any:
        try:
            value = await original(self)
            leased(self, caller(1))
            return value
        finally:
            del self

    return _of_pool(original, enter)


def _of_pool(original: Callable[..., Any], wrapper: Any) -> Callable[..., Any]:
    """*wrapper* as a function of the pool's module, which leaves its own out of the stacks that it records."""
    made = FunctionType(wrapper.__code__, pools.__dict__, wrapper.__name__, None, wrapper.__closure__)
    return functools.update_wrapper(made, original)


def _leased(lease: Any, frame: FrameType) -> None:
    slot = lease._slot
    _note(lambda recording, frames: recording.pool_leases.note(slot, frames), frame)


def _enter_lease(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def enter(self: Any) -> Any:
        try:
            value = original(self)
            _note(functools.partial(_entered, self), sys._getframe(1))
            return value
        finally:
            del self

    return enter


def _aenter_lease(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def enter(self: Any) -> Any:
        try:
            value = await original(self)
            _note(functools.partial(_entered, self), sys._getframe(1))
            return value
        finally:
            del self

    return enter


def _entered(lease: Any, recording: Recording, frames: Frames) -> None:
    entry = (weakref.ref(lease._registry), lease._key, frames)
    recording.leases.setdefault(id(lease), []).append(entry)


def _left(lease: Any) -> None:
    for recording in _on.copy():
        entries = recording.leases.get(id(lease))
        if entries:
            entries.pop()  # the newest: an older one is of a lease that was dropped
            if not entries:
                recording.leases.pop(id(lease), None)


def _exit_lease(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def leave(self: Any, *exc_info: object) -> Any:
        _left(self)
        return original(self, *exc_info)

    return leave


def _aexit_lease(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def leave(self: Any, *exc_info: object) -> Any:
        _left(self)
        return await original(self, *exc_info)

    return leave


_WRAPPERS: tuple[tuple[Any, str, Callable[[Callable[..., Any]], Callable[..., Any]]], ...] = (
    # Not by the audit hook: CPython 3.11 does not tell it of threads.
    (threading.Thread, "start", _init(lambda recording, thread, frames: recording.threads.note(thread, frames))),
    (asyncio.BaseEventLoop, "create_task", _create_task),
    (asyncio.runners, "_cancel_all_tasks", _cancel_all_tasks),
    (ThreadPoolExecutor, "__init__", _init(_made_executor)),
    (_Pool, "__init__", _init(_made_pool)),
    (_Pool, "__del__", _guarded(_dropped_pool)),
    (PoolLease, "__enter__", _enter_pool_lease),
    (AsyncPoolLease, "__aenter__", _aenter_pool_lease),
    (Registry, "_configure", _init(lambda recording, made, frames: recording.registries.note(made, frames))),
    (Lease, "__enter__", _enter_lease),
    (Lease, "__exit__", _exit_lease),
    (Lease, "__aenter__", _aenter_lease),
    (Lease, "__aexit__", _aexit_lease),
    (_Base, "__init__", _init(_made_session)),
    (managed_session, "__enter__", _enter_session),
    (_Guard, "__del__", _guarded(_dropped_session)),
    (Listener, "__init__", _init(lambda recording, made, frames: recording.listeners.note(made, frames))),
)
_installed: list[tuple[Any, str, Any, Any]] = []
_hooked: list[None] = []


def _install() -> None:
    if _on:
        return
    if not _hooked:
        _hooked.append(None)
        sys.addaudithook(_audit)
    for place, name, wrap in _WRAPPERS:
        original = vars(place)[name]
        wrapped = wrap(original)
        setattr(place, name, wrapped)
        _installed.append((place, name, original, wrapped))


def _uninstall() -> None:
    while _installed:
        place, name, original, wrapped = _installed.pop()
        # Where somebody has wrapped ours, it stays: it does nothing while no recording is on.
        if vars(place)[name] is wrapped:
            setattr(place, name, original)
