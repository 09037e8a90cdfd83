"""What a test has left behind.

A `Watch` is begun before the test and ended after it. What was made in between, is still there and should not be, is a
`Leak`, with the stack that made it. It needs no pytest: the plugin `pytest_hygiene` begins and ends it.

What is no leak: whatever was there before; what comes and goes by itself (the janitor's thread, the writer of a
write-behind, the threads of an event loop's default executor, a log file); what a module made when it was imported, and
what `shared_resource` keeps, for both live as long as the process; what an older pool, executor or thread has opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from hygiene.closing import running_loop
from hygiene.janitor import alive
from hygiene.listeners import Listener, _Home
from hygiene.pool import _Pool
from hygiene.registry import Registry
from hygiene.shared import SharedResource
from hygiene.testing.recording import Frames, Recording, at_import, formatted
from hygiene.testing.settling import settle

__all__ = ["KINDS", "PATIENCE", "Leak", "Watch"]

KINDS: Final = ("leases", "sessions", "pools", "listeners", "registries", "threads", "tasks", "fds")
"""What a watch looks for, in the order in which it tells: what holds something comes before what is held."""

PATIENCE: Final = 1.0
"""
Seconds that what is about to end by itself is given.

Only a test that leaves something behind waits that long. A thread or task that was told to stop needs milliseconds,
on a machine that runs a test on each core tens of them.
"""

_BY_ITSELF = ("threads", "tasks", "fds")  # kinds that may go without anybody's doing
_STEP = 0.005  # seconds between two looks at what has nothing to wait for
_REACH = 50_000  # objects looked at to find what a fixture's value holds


@dataclass(frozen=True, slots=True)
class Leak:
    """One thing that was left behind."""

    kind: str
    """One of `KINDS`."""
    what: str
    """It in words."""
    frames: Frames = field(default=(), repr=False)
    """Where it was made: code objects and offsets, innermost first; empty if nobody has seen it being made."""

    def __str__(self) -> str:
        made = _MADE.get(self.kind, "made")
        return f"{self.what}; {made} at\n{formatted(self.frames)}" if self.frames else f"{self.what}\n"


_MADE = {"leases": "taken", "listeners": "added", "threads": "started", "tasks": "started", "fds": "opened"}


class Watch:
    """
    Sees what is left of what is made between `begin` and `end`.

    For the thread that runs the test. Watches may be nested.

    Args:
        kinds: What to look for, of `KINDS`.
        patience: Seconds to wait for what is about to end by itself.

    Raises:
        ValueError: a kind is unknown.
    """

    def __init__(self, kinds: Iterable[str] = KINDS, patience: float = PATIENCE) -> None:
        self._kinds = tuple(kinds)
        unknown = sorted(set(self._kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"wanted kinds of {', '.join(KINDS)}; found {', '.join(unknown)}")
        self._patience = patience
        self._recording = Recording()
        self._recording.abandoned = self._abandoned
        self._lost: list[Leak] = []
        self._roots: tuple[object, ...] = ()
        self._collected = False

    def begin(self) -> None:
        """Watch from now on."""
        self._recording.start()
        self._fds = _fds()
        self._lengths = {id(registry): len(registry) for registry in alive(Registry)}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A block that makes what is not the test's, such as a fixture of a whole module."""
        fds, lengths = _fds(), {id(registry): len(registry) for registry in alive(Registry)}
        try:
            with self._recording.paused():
                yield
        finally:
            self._fds |= _fds() - fds
            for registry in alive(Registry):
                grown = len(registry) - lengths.get(id(registry), 0)
                self._lengths[id(registry)] = self._lengths.get(id(registry), 0) + grown

    def cancel(self) -> None:
        """Watch no more, and tell nothing."""
        self._recording.stop()

    def end(self, roots: Iterable[object] = ()) -> list[Leak]:
        """
        Watch no more, and tell what was left behind.

        Args:
            roots: What the test's runner is about to drop, such as the values of its fixtures. A registry or listener
                that they hold is not left behind because of that.
        """
        self._roots = tuple(roots)
        pending: object = None
        try:
            leaks = self._look()
            if leaks:
                # Held, or the collection would destroy those that nobody else holds: they are left behind all the same.
                pending = self._tasks()
                self._settle()
                leaks = self._look()
            deadline = time.monotonic() + self._patience
            while (
                any(leak.kind in _BY_ITSELF and leak not in self._lost for leak in leaks)
                and (left := deadline - time.monotonic()) > 0
            ):
                self._wait(min(left, _STEP * 4))
                leaks = self._look()
                if not leaks or left <= _STEP * 4:
                    gc.collect()  # what a thread has held until now
                    leaks = self._look()
            return leaks
        finally:
            self._recording.stop()
            self._roots = ()
            del pending

    def _settle(self) -> None:
        """Let go what nobody holds, and have done what is due."""
        self._collected = True
        gc.collect()
        if running_loop() is None:
            with contextlib.suppress(TimeoutError):
                settle(max(self._patience, _STEP))
        gc.collect()

    def _wait(self, limit: float) -> None:
        """Wait for what ends, at most *limit* seconds."""
        for thread, _ in self._threads():
            thread.join(limit)
            return
        for task, _ in self._tasks():
            loop = task.get_loop()
            if not loop.is_running() and running_loop() is None:
                loop.run_until_complete(asyncio.wait([task], timeout=limit))
                return
        threading.Event().wait(min(limit, _STEP))

    # Looking.

    def _look(self) -> list[Leak]:
        finders: dict[str, Callable[[], Iterable[Leak]]] = {
            "leases": self._look_leases,
            "sessions": self._look_sessions,
            "pools": self._look_pools,
            "listeners": self._look_listeners,
            "registries": self._look_registries,
            "threads": self._look_threads,
            "tasks": self._look_tasks,
            "fds": self._look_fds,
        }
        return [leak for kind in KINDS if kind in self._kinds for leak in finders[kind]()]

    def _dropped(self, kind: str) -> Iterator[Leak]:
        return (Leak(kind, what, frames) for found, what, frames in self._recording.dropped if found == kind)

    def _look_leases(self) -> Iterator[Leak]:
        recording = self._recording
        for pool in alive(_Pool):
            for slot in pool._core.held():
                frames = recording.pool_leases.frames(slot)
                if frames is not None and not slot.leaving:
                    yield Leak("leases", f"a lease of pool {pool.name!r}, not released", frames)
        for reference, key, frames in [entry for entries in list(recording.leases.values()) for entry in entries]:
            registry = reference()
            if registry is not None and not recording.owned_elsewhere(frames):
                yield Leak("leases", f"the lease on {key!r:.100} of {_named(registry)}, not released", frames)

    def _look_sessions(self) -> Iterator[Leak]:
        for session, frames in self._recording.sessions.alive():
            if session._releases and not at_import(frames):
                yield Leak("sessions", f"{session!r}, not closed", frames)
        yield from self._dropped("sessions")

    def _look_pools(self) -> Iterator[Leak]:
        for pool, frames in self._recording.pools.alive():
            dropped = id(pool) not in self._recording.guards  # and told below; its own warning holds it
            if not (dropped or pool.closed or at_import(frames)) and pool._core.open:
                yield Leak("pools", f"{pool!r}, not closed", frames)
        yield from self._dropped("pools")

    def _look_listeners(self) -> Iterator[Leak]:
        made = [item for item in self._recording.listeners.alive() if item[0]._self_alive()]
        if not made or not (held := self._held_listeners()):
            return
        for listener, frames in made:
            if id(listener) in held and not at_import(frames):
                yield Leak("listeners", f"{listener!r} in {held[id(listener)]}, not removed", frames)

    def _held_listeners(self) -> dict[int, str]:
        """The listeners in containers that outlive the test, by identity, and what they are in."""
        dropping = self._dropping()
        held = {}
        for home in alive(_Home):
            container = home.container()
            if container is None or id(container) in dropping:
                continue
            for item in _listeners_in(container):
                held[id(item)] = home.label
        return held

    def _look_registries(self) -> Iterator[Leak]:
        shared = {id(resource._resources) for resource in alive(SharedResource)}
        for registry in alive(Registry):
            if id(registry) in shared or not len(registry):
                continue
            frames = self._recording.registries.frames(registry)
            before = self._lengths.get(id(registry))
            if frames is not None:
                if not self._recording.owned_elsewhere(frames) and not self._will_go(registry):
                    yield Leak("registries", f"{_named(registry)}, with {len(registry)} entries", frames)
            elif before is not None and len(registry) > before:
                newest = list(dict.keys(registry))[before - len(registry) :]
                keys = ", ".join(f"{key!r:.50}" for key in newest[:3]) + (", ..." if len(newest) > 3 else "")  # noqa: PLR2004
                yield Leak(
                    "registries",
                    f"{_named(registry)} grew from {before} to {len(registry)} entries; the newest: {keys}",
                )

    def _will_go(self, registry: Registry[Any, Any]) -> bool:
        """Whether nobody holds *registry* but the test's runner; told only after a collection, which is dear."""
        return self._collected and id(registry) in self._dropping()

    def _dropping(self) -> set[int]:
        """All that the test's runner holds and is about to drop, by identity."""
        passed = (type, types.FunctionType, types.BuiltinFunctionType, types.FrameType)
        found: set[int] = set()
        waiting = list(self._roots)
        while waiting and len(found) < _REACH:
            thing = waiting.pop()
            if id(thing) in found or isinstance(thing, passed):
                continue
            if isinstance(thing, types.ModuleType) and sys.modules.get(thing.__name__) is thing:
                continue  # what it holds stays
            found.add(id(thing))
            waiting.extend(gc.get_referents(thing))
        return found

    def _look_threads(self) -> Iterator[Leak]:
        for thread, frames in self._threads():
            daemon = "daemon thread" if thread.daemon else "thread"
            yield Leak("threads", f"{daemon} {thread.name!r}, still running", frames)

    def _threads(self) -> list[tuple[threading.Thread, Frames]]:
        return [
            (thread, frames)
            for thread, frames in self._recording.threads.alive()
            if thread.is_alive() and thread is not threading.current_thread() and not self._lingers(thread, frames)
        ]

    def _lingers(self, thread: threading.Thread, frames: Frames) -> bool:
        """Whether *thread* is of those that come and go by themselves."""
        if thread.name == "hygiene-janitor" or thread.name.startswith(("hygiene-writebehind-", "pytest_timeout")):
            return True
        if getattr(thread, "is_pydev_daemon_thread", False):
            return True  # of a debugger
        if type(thread).__module__.startswith("anyio."):
            return True  # anyio keeps its workers for the loop's next call
        executor = _executor_of(thread)
        if executor is not None and self._recording.executors.frames(executor) is None:
            return True  # of an executor that is older, or the default of a loop
        return self._recording.owned_elsewhere(frames)

    def _look_tasks(self) -> Iterator[Leak]:
        yield from self._lost
        for task, frames in self._tasks():
            yield _task_leak(task, frames)

    def _tasks(self) -> list[tuple[asyncio.Task[Any], Frames]]:
        return [
            (task, frames)
            for task, frames in self._recording.tasks.alive()
            if not task.done() and not task.get_loop().is_closed() and not _minds_itself(task)
        ]

    def _abandoned(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at what runs on the test's own *loop*, whose runner is about to cancel it."""
        if "tasks" not in self._kinds:
            return
        pending = [item for item in self._tasks() if item[0].get_loop() is loop]
        if pending:
            loop.run_until_complete(asyncio.wait([task for task, _ in pending], timeout=self._patience))
        self._lost += [_task_leak(task, frames) for task, frames in pending if not task.done()]

    def _look_fds(self) -> Iterator[Leak]:
        new = _fds() - self._fds
        if not new:
            return
        recording = self._recording
        sockets = {}
        for made, frames in recording.sockets.alive():
            with contextlib.suppress(OSError):
                sockets[made.fileno()] = frames
        opened = {os.path.realpath(path): frames for path, frames in recording.opened.items()}
        foreign = {os.path.realpath(path) for path in recording.foreign if isinstance(path, str)}
        foreign_sockets = {key for key in recording.foreign if isinstance(key, int)}
        strangers = _numbers_of(foreign_sockets) if foreign_sockets else set()
        logged = _log_files()
        for number, _, _ in sorted(new):
            target = _target(number)
            path = _opened_as(target)
            if number in logged or number in strangers or path in foreign:
                continue
            frames = sockets.get(number) or opened.get(path, ())
            if not recording.owned_elsewhere(frames):
                yield Leak("fds", f"file descriptor {number} ({target}), not closed", frames)


# --- In words ---------------------------------------------------------------------------------------------------------


def _named(registry: Registry[Any, Any]) -> str:
    owner = registry.owner
    of = "" if owner is None else f" of {type(owner).__qualname__}"
    return f"registry {registry._name!r}{of}" if registry._name else f"a registry{of}"


def _task_leak(task: asyncio.Task[Any], frames: Frames) -> Leak:
    coroutine: Any = task.get_coro()
    name = getattr(coroutine, "__qualname__", type(coroutine).__qualname__)
    frame = getattr(coroutine, "cr_frame", None)
    place = "" if frame is None else f" at {frame.f_code.co_filename}:{frame.f_lineno}"
    return Leak("tasks", f"task {task.get_name()!r}, still running {name}{place}", frames)


def _minds_itself(task: asyncio.Task[Any]) -> bool:
    """Whether *task* belongs to what is told in its place, or to the test's runner."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    module = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    if module.startswith("hygiene.") or module == "pytest_asyncio.plugin":
        return True
    return module.startswith("anyio.") and frame is not None and frame.f_code.co_name == "_run_tests_and_fixtures"


def _executor_of(thread: threading.Thread) -> Any:
    """The pool of threads that *thread* works for, if it does."""
    arguments = getattr(thread, "_args", None) or ()
    if not arguments or getattr(getattr(thread, "_target", None), "__module__", "") != "concurrent.futures.thread":
        return None
    return arguments[0]()


def _listeners_in(container: Any) -> list[Listener]:
    with container._hygiene.lock:
        if isinstance(container, list):
            items: list[Any] = list.copy(container)
        elif isinstance(container, dict):
            items = list(dict.values(container))
        else:
            items = list(frozenset(container))
    return [item for item in items if type(item) is Listener]


# --- File descriptors -------------------------------------------------------------------------------------------------

_FD_FOLDER = next((folder for folder in ("/proc/self/fd", "/dev/fd") if os.path.isdir(folder)), None)  # noqa: PTH112


def _fds() -> set[tuple[int, int, int]]:
    """The open file descriptors, with device and inode: a number that is used again is another one."""
    found: set[tuple[int, int, int]] = set()
    if _FD_FOLDER is None:
        return found  # not on Windows
    for name in os.listdir(_FD_FOLDER):  # noqa: PTH208 - names are all that is wanted
        if int(name) <= 2:  # noqa: PLR2004 - the standard streams, which pytest captures by exchanging them
            continue
        with contextlib.suppress(OSError):  # closed since, as the one that lists them
            status = os.fstat(int(name))
            found.add((int(name), status.st_dev, status.st_ino))
    return found


def _target(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")  # noqa: PTH115 - it may be no path
    except OSError:
        return "unknown"


def _opened_as(target: str) -> str:
    """The path under which *target* was opened: SQLite opens more files than it is told."""
    path = target.removesuffix(" (deleted)")
    for suffix in ("-wal", "-shm", "-journal"):
        path = path.removesuffix(suffix)
    return path


def _log_files() -> set[int]:
    """The numbers of the files that log handlers write to."""
    numbers = set()
    for reference in list(logging._handlerList):  # type: ignore[attr-defined] # all handlers, whatever logger they are at
        handler = reference()
        for stream in (getattr(handler, "stream", None), getattr(handler, "sock", None)):
            with contextlib.suppress(Exception):  # closed, or no file
                numbers.add(stream.fileno())  # type: ignore[union-attr]
    return numbers


def _numbers_of(identities: set[int]) -> set[int]:
    """The file descriptors of the sockets with these identities."""
    numbers = set()
    for thing in gc.get_objects():
        if id(thing) in identities and callable(getattr(thing, "fileno", None)):
            with contextlib.suppress(Exception):
                numbers.add(thing.fileno())
    return numbers
