"""Which lines of the program hold more memory at the end of a block than at its beginning."""

from __future__ import annotations

import functools
import gc
import inspect
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, Self, TypeVar, cast

from hygiene.logs import logger

__all__ = ["LineGrowth", "MemoryProfile", "profile_memory"]

P = ParamSpec("P")
R = TypeVar("R")


_START, _END = "start", "end"


class _Tracing:
    """Whether Python traces allocations because of us: from the first profile to the end of the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours = False

    def begin(self, frames: int) -> None:
        with self._lock:
            if not tracemalloc.is_tracing():
                tracemalloc.start(frames)
                self._ours = True
            self._users += 1

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            # Not when the first one ends: a profile in another thread may have begun since, and would lose its traces.
            if self._users == 0 and self._ours:
                self._ours = False
                tracemalloc.stop()


_tracing = _Tracing()


@dataclass(frozen=True, slots=True)
class LineGrowth:
    """What one line has allocated and not freed, between two snapshots."""

    file: str
    line: int
    grown: int
    """Bytes more than before."""
    blocks: int
    """Allocations more than before."""
    size: int
    """Bytes at the later snapshot."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.grown / 1024:+,.1f} KiB in {self.blocks:+,} blocks"


class MemoryProfile:
    """
    Snapshots of what each line holds, and what grew between two of them. Made by `profile_memory`.

    A context manager, for one use. Snapshots can be taken from any thread; they cover the whole process.
    """

    def __init__(self, frames: int = 1, *, collect: bool = True) -> None:
        if frames < 1:
            raise ValueError(f"frames must be at least 1: how many callers to record; found {frames!r}")
        self._frames = frames
        self._collect = collect
        self._snapshots: dict[str, tracemalloc.Snapshot] = {}
        self._state = "new"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the snapshots there are, in order; the first is ``"start"``, the last in the end ``"end"``."""
        return tuple(self._snapshots)

    def snapshot(self, label: str) -> None:
        """
        Remember what each line holds now, as *label*.

        Raises:
            ValueError: there is a snapshot of that name.
            RuntimeError: the profile is not running, or somebody has stopped ``tracemalloc`` meanwhile.
        """
        if label in self._snapshots or label == _END:
            raise ValueError(f"wanted a new name for a snapshot, found that there is one called {label!r}")
        self._snapshots[label] = self._take()

    def top(self, n: int = 10, *, since: str = _START, until: str | None = None) -> list[LineGrowth]:
        """
        The lines that grew most, the first of them most; lines that did not grow are left out.

        Args:
            n: How many at the most.
            since: The snapshot to compare with.
            until: The snapshot to look at; by default the end of the block, or now, while it is running.

        Raises:
            KeyError: there is no snapshot of that name.
            RuntimeError: the profile has not begun.
        """
        if self._state == "new":
            raise RuntimeError("wanted what grew, found that the profile has not begun. Enter it first: with ...")
        if until is None:
            later = self._take() if self._state == "running" else self._snapshots[_END]
        else:
            later = self._named(until)
        grown = [
            LineGrowth(
                file=difference.traceback[0].filename,
                line=difference.traceback[0].lineno,
                grown=difference.size_diff,
                blocks=difference.count_diff,
                size=difference.size,
            )
            for difference in later.compare_to(self._named(since), "lineno")
            if difference.size_diff > 0
        ]
        return sorted(grown, key=lambda line: line.grown, reverse=True)[:n]

    def _named(self, label: str) -> tracemalloc.Snapshot:
        if label not in self._snapshots:
            raise KeyError(f"no snapshot {label!r}; there are: {', '.join(self._snapshots)}")
        return self._snapshots[label]

    def _take(self) -> tracemalloc.Snapshot:
        if self._state != "running":
            raise RuntimeError(f"wanted a snapshot, found that the profile is {self._state}. Take it inside the block")
        if self._collect:
            gc.collect()  # what waits to be collected is no growth
        return tracemalloc.take_snapshot().filter_traces(
            (tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, __file__))  # noqa: FBT003
        )

    def __enter__(self) -> Self:
        if self._state != "new":
            raise RuntimeError(f"wanted to begin a profile, found that it is {self._state}. Make a new one")
        _tracing.begin(self._frames)
        self._state = "running"
        try:
            self._snapshots[_START] = self._take()
        except BaseException:
            self._state = "over"
            _tracing.end()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._snapshots[_END] = self._take()
        except RuntimeError:
            # Somebody has stopped tracemalloc. What the body raises is more important than that.
            self._snapshots[_END] = self._snapshots[_START]
            if kind is None:
                raise
        finally:
            self._state = "over"
            _tracing.end()

    def __repr__(self) -> str:
        return f"<profile_memory {self._state}, snapshots: {', '.join(self._snapshots) or 'none'}>"


def _log(profile: MemoryProfile, name: str) -> None:
    lines = "".join(f"\n  {line}" for line in profile.top(10))
    logger.info(
        "memory that %s left behind, by line:%s", name, lines or " none", extra={"event_name": "memory.profile"}
    )


class _Profiling(MemoryProfile):
    """What `profile_memory` returns: a profile for one block, or a decorator that makes one for each call."""

    def __init__(self, frames: int, *, collect: bool, report: Callable[[MemoryProfile], object] | None) -> None:
        super().__init__(frames, collect=collect)
        self._report = report

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        if self._report is not None:
            self._report(self)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Profile each call of *function*, and report it."""
        report = self._report or functools.partial(_log, name=getattr(function, "__qualname__", repr(function)))

        def fresh() -> _Profiling:
            return _Profiling(self._frames, collect=self._collect, report=report)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
                with fresh():
                    return await function(*args, **kwargs)

            return cast("Callable[P, R]", awaited)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            with fresh():
                return function(*args, **kwargs)

        return called


def profile_memory(
    frames: int = 1, *, collect: bool = True, report: Callable[[MemoryProfile], object] | None = None
) -> _Profiling:
    """
    Find out which lines hold more memory after a block, or a call, than before.

    ```python
    with profile_memory() as profile:
        serve()
    for line in profile.top(10):
        print(line.file, line.line, line.grown)
    ```

    It is a decorator, too, for functions and coroutine functions: ``@profile_memory()``. Each call is then a profile
    of its own, which goes to *report*.

    Python traces every allocation meanwhile (``tracemalloc``), in all threads, which takes several times as long and
    a good deal of memory: this is for a workbench, not for production. Tracing that was on already stays on. Profiles
    may be nested and may overlap in several threads; each sees what the whole process allocates.

    Args:
        frames: Callers to record with each allocation. One is enough for `MemoryProfile.top`.
        collect: Whether to run the garbage collector before each snapshot. Without it, what waits to be collected
            counts as growth.
        report: Called with the finished profile, also when the body has raised. By default a decorated function logs
            its ten top lines (level INFO, logger ``hygiene``), and a block reports nothing.

    Returns:
        A `MemoryProfile`, to be used in one ``with``, or as a decorator.

    Raises:
        ValueError: *frames* is below 1.
    """
    return _Profiling(frames, collect=collect, report=report)
