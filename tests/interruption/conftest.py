"""What the tests of interruptions share: an exception at any moment at which CPython delivers a signal."""

from __future__ import annotations

import functools
import gc
import itertools
import pathlib
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import cachetools
import pytest

import hygiene

# A signal handler runs in Python code only; below the library there is code in Python, too.
_PLACES = (str(pathlib.Path(hygiene.__file__).parent), str(pathlib.Path(cachetools.__file__).parent), weakref.__file__)
_PATIENCE = 20.0  # seconds until a thread that does not answer is one that hangs


class Interrupted(BaseException):
    """What the signal handler raises: the timeout of a job, or Ctrl-C."""


@functools.cache
def is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(_PLACES)


def interrupt(call: Callable[[], object], at: int, happens: Callable[[], object] | None = None) -> str | None:
    """
    Run *call* and raise `Interrupted` at its moment number *at*; gives where that was, ``None`` if there are fewer.

    With *happens* that is called then instead, as a finalizer is. A call that raises something else has ended, too.
    """
    left, where = at, None

    def each(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left, where
        # The interpreter looks for signals where a function begins and where a call of C returns. (Also at the back
        # edges of loops, of which there is none here without a call in the loop.)
        if event in {"call", "c_return"} and left and is_ours(frame.f_code):
            left -= 1
            if not left:
                sys.setprofile(None)
                where = f"{pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                if happens is None:
                    raise Interrupted
                happens()

    before, hook = sys.getprofile(), sys.unraisablehook
    # In a finalizer an exception is lost, as any other there.
    sys.unraisablehook = lambda lost: None if isinstance(lost.exc_value, Interrupted) else hook(lost)
    try:
        sys.setprofile(each)
        call()
    except Interrupted:
        pass
    finally:
        sys.setprofile(before)
        sys.unraisablehook = hook
    return where


class OtherThread:
    """A thread that does what it is given, so that a lock or a table that was left behind shows as one that hangs."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            task, answer = self._tasks.get()
            try:
                answer.put((task(), None))
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits for it
                answer.put((None, error))
            del task, answer

    def __call__(self, task: Callable[[], Any]) -> Any:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._tasks.put((task, answer))
        try:
            result, error = answer.get(timeout=_PATIENCE)
        except queue.Empty:
            raise AssertionError("another thread hangs") from None
        if error is not None:
            raise error
        return result


@pytest.fixture(scope="session")
def elsewhere() -> OtherThread:
    """Run something in another thread; it may not hang."""
    return OtherThread()


def each_moment(
    make: Callable[[], Any],
    operate: Callable[[Any], object],
    check: Callable[[Any], object],
    *,
    most: int = 20_000,
    every: int = 1,
) -> int:
    """
    Interrupt *operate* at its first, second, ... moment, each time of a new subject, and *check* what is left.

    With *every* only each so many-th moment is tried. Returns how many there were.
    """
    for at in itertools.count(1, every):
        assert at < most, "the operation does not end"
        subject = make()
        where = interrupt(lambda: operate(subject), at)  # noqa: B023 - called at once
        try:
            check(subject)
        except Exception as error:
            error.add_note(f"interrupted at moment {at}, in {where}")
            raise
        finally:
            end = getattr(subject, "end", None)
            if end is not None:
                end()
        if where is None:
            return at - 1
    raise AssertionError("not reached")


@pytest.fixture
def interrupted_at_each_moment() -> Iterator[Callable[..., int]]:
    """See `each_moment`. Nothing is collected by itself: a finalizer of another test has moments, too."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield each_moment
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def at_moment() -> Iterator[Callable[..., str | None]]:
    """See `interrupt`."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield interrupt
    gc.enable()
    gc.unfreeze()
