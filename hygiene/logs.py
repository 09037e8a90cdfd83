"""The logger ``hygiene``, how often one event is said, and that it does no harm to say it.

Each line is one event, and carries its name as ``event_name``. (Not ``event``: that is where structlog keeps the text.)
What can fail in a loop says ``of=`` whom it speaks: such a line comes once a minute for each of them.

The logger has no handler of its own, not even a `logging.NullHandler`: so Python prints warnings to stderr in a program
that has not configured logging, and a mistake does not stay silent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from hygiene.errors import HOOK_ERRORS
from hygiene.text import printable

__all__ = ["LastResort", "Log", "Repeats", "logger"]


class Repeats(logging.Filter):
    """
    Lets a line that says ``of=`` whom it speaks through once in *interval* for each event and object.

    The next one that comes through says how many did not, in its text and as ``suppressed``. Objects are held weakly;
    ``of`` is taken off the record, which a handler may keep or send elsewhere. ``of=(thing, detail)`` tells details
    of one thing apart.

    It takes no lock, since a line may be logged by a finalizer or in a child that was just forked; so two threads that
    fail in the same instant may both be heard.

    Args:
        interval: Seconds. 60: a person who watches sees that it goes on, and a disk does not fill.
        timer: Returns monotonic seconds.
    """

    def __init__(self, interval: float = 60.0, timer: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._interval = interval
        self._timer = timer
        self._said: dict[tuple[Any, ...], _Said] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether *record* is to be logged."""
        of = record.__dict__.pop("of", None)
        if of is None:
            return True
        thing, *details = of if isinstance(of, tuple) else (of,)
        key = (getattr(record, "event_name", record.msg), id(thing), *details)
        said, now = self._said.get(key), self._timer()
        if said is not None and said.thing() is thing:
            if now < said.until:
                said.suppressed += 1
                return False
            suppressed, said.suppressed, said.until = said.suppressed, 0, now + self._interval
            if suppressed:
                record.msg = f"{record.getMessage()} ({suppressed:,} more like this were not logged)"
                record.args = ()
            record.suppressed = suppressed
            return True
        forget = self._said.pop
        with contextlib.suppress(TypeError):  # a class with slots may not take weak references, and is heard each time
            self._said[key] = _Said(weakref.ref(thing, lambda _: forget(key, None)), now + self._interval)
        return True


class _Said:
    """Who was spoken of, until when it is not to be repeated, and how often it would have been."""

    __slots__ = ("suppressed", "thing", "until")

    def __init__(self, thing: weakref.ref[Any], until: float) -> None:
        self.thing = thing
        self.until = until
        self.suppressed = 0


class LastResort(logging.Filter):
    """
    Prepares what reaches a person in a program that has not configured logging.

    While neither the logger nor a parent has a handler, Python's last-resort handler prints warnings and errors to
    stderr, as bare text. There, each line begins with ``hygiene:``, so that a reader knows its origin, and an event is
    printed at most once in *interval* for each object. Where a handler is configured, records pass unchanged.

    Takes no lock, like `Repeats`.

    Args:
        interval: Seconds. 60: as for `Repeats`.
        timer: Returns monotonic seconds.
    """

    def __init__(self, interval: float = 60.0, timer: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._interval = interval
        self._timer = timer
        self._printed: dict[tuple[str, ...], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether *record* is logged."""
        if record.levelno < logging.WARNING or _target.hasHandlers():
            return True
        now = self._timer()
        args = record.args if isinstance(record.args, tuple) else ()
        # Numbers change with each repetition; names do not.
        key = (str(getattr(record, "event_name", record.msg)), *(arg for arg in args if isinstance(arg, str)))
        if now < self._printed.get(key, now):
            return False
        if len(self._printed) >= _REMEMBERED:
            self._printed = {known: until for known, until in list(self._printed.items()) if now < until}
        if len(self._printed) < _REMEMBERED:
            self._printed[key] = now + self._interval
        record.msg, record.args = f"hygiene: {record.getMessage()}", ()
        return True


def _safe(arg: object) -> object:
    """*arg* without control characters: names and errors may hold text that other people chose."""
    if isinstance(arg, (str, BaseException, os.PathLike)):
        text = str(arg)
        safe = printable(text, lines=True)  # a stack has several lines
        return arg if safe == text else safe
    return arg


_REMEMBERED = 1_000  # events that were printed within the interval; beyond that, more are printed, not fewer


class Log:
    """
    The logger ``hygiene`` for those who must go on, whatever becomes of what they say.

    `logging` catches what a handler raises only if the handler was written so, and what a filter raises never: one
    that asks for the request that is being served, say, and fails in a thread that serves none. Who speaks here is a
    thread that others wait for, or in the middle of somebody's write. So nothing comes out; that a line was lost, and
    why, goes to stderr, where `logging` has it, too (and not if `logging.raiseExceptions` is off).
    """

    def __init__(self, target: logging.Logger) -> None:
        self._target = target

    def debug(self, text: str, *args: object, **options: Any) -> None:
        """Log at this level, as `logging.Logger.debug` does."""
        self._say(logging.DEBUG, text, args, options)

    def info(self, text: str, *args: object, **options: Any) -> None:
        """Log at this level, as `logging.Logger.info` does."""
        self._say(logging.INFO, text, args, options)

    def warning(self, text: str, *args: object, **options: Any) -> None:
        """Log at this level, as `logging.Logger.warning` does."""
        self._say(logging.WARNING, text, args, options)

    def error(self, text: str, *args: object, **options: Any) -> None:
        """Log at this level, as `logging.Logger.error` does."""
        self._say(logging.ERROR, text, args, options)

    def exception(self, text: str, *args: object, **options: Any) -> None:
        """Log an error with the exception that is being handled."""
        self._say(logging.ERROR, text, args, {"exc_info": True, **options})

    def critical(self, text: str, *args: object, **options: Any) -> None:
        """Log at this level, as `logging.Logger.critical` does."""
        self._say(logging.CRITICAL, text, args, options)

    def log(self, level: int, text: str, *args: object, **options: Any) -> None:
        """Log at *level*."""
        self._say(level, text, args, options)

    def _say(self, level: int, text: str, args: tuple[object, ...], options: dict[str, Any]) -> None:
        try:
            if self._target.isEnabledFor(level):
                self._target.log(level, text, *map(_safe, args), stacklevel=3, **options)
        except HOOK_ERRORS:  # a handler that ends the program at an error would end a thread of ours instead
            self._lost(text)

    def _lost(self, text: str) -> None:
        with contextlib.suppress(Exception):  # there may be no stderr, or a closed one
            if logging.raiseExceptions:
                sys.stderr.write(f"hygiene: a line could not be logged: {text}\n{traceback.format_exc()}")


_target = logging.getLogger("hygiene")
# The logger outlives the module. A program that reloads the library, or has two copies of it, has one filter of each
# kind all the same: a second one would count what the first suppressed as nothing.
if not any(type(known).__module__ == __name__ for known in _target.filters):
    _target.addFilter(Repeats())
    _target.addFilter(LastResort())
logger = Log(_target)
