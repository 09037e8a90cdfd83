"""Run a script or a module as Python would, and say on standard error which of its containers grow."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import types
from typing import TYPE_CHECKING

from hygiene.cli.logs import InputError
from hygiene.cli.run import _describe, _enter, _find_module, _find_script
from hygiene.memory.growth import GrowthWatch
from hygiene.text import per_time, plural, printable
from hygiene.units import seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hygiene.memory.growth import Grower, _Site

__all__ = ["USAGE", "main"]

USAGE = """\
usage: hygiene watch [--interval TIME] [--every TIME] SCRIPT [ARGS...]
       hygiene watch [--interval TIME] [--every TIME] [-m] MODULE [ARGS...]

Run SCRIPT or MODULE as Python would, and name the containers that grow on
standard error: every minute, or as often as --every says, and at the end.
Readings are taken every --interval; by default often at first, later once a minute.
Everything after SCRIPT or MODULE is its own.
"""

_TOP = 10
# Without --interval: a short program is told about as well, and a long one hardly notices.
_SHORTEST, _LONGEST = 0.25, 60.0
_PACE = 8  # readings at one interval before it is doubled


class _Widening(GrowthWatch):
    """Readings ever further apart, up to one a minute."""

    def __init__(self) -> None:
        super().__init__(_SHORTEST)

    def _note(self, sites: dict[str, _Site], growing: list[Grower]) -> None:
        super()._note(sites, growing)
        if self.readings % _PACE == 0:
            self.interval = min(self.interval * 2, _LONGEST)


class _Reporter:
    """
    Prints what grows, now and then and at the end.

    In a thread of its own, since standard error may be a pipe that nobody empties. It reports for one process: a
    child made by fork says nothing.
    """

    def __init__(self, growth: GrowthWatch, every: float) -> None:
        self._growth = growth
        self._every = every
        self._began = time.monotonic()
        self._pid = os.getpid()
        self._over = threading.Event()
        atexit.register(self.finish)
        threading.Thread(target=self._run, name="hygiene-watch", daemon=True).start()
        self._catch()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            if growers := self._growth.growers():
                self._print(f"after {time.monotonic() - self._began:,.0f} s, {_told(growers)}")

    def _catch(self) -> None:
        """Report before SIGTERM ends the process, too, unless the program takes it for itself."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminated)

    def _terminated(self, number: int, _frame: object) -> None:
        self.finish()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # whoever started us shall see that it was the signal

    def finish(self) -> None:
        """Report the containers that grew, with their sizes at the exit of the program."""
        if self._over.is_set() or os.getpid() != self._pid:
            return
        self._over.set()
        growers = self._growth.finish()
        readings = self._growth.readings
        if growers:
            said = _told(growers)
        elif readings < _ENOUGH:
            taken = f"{plural(readings, 'reading')} {'was' if readings == 1 else 'were'} taken"
            said = f"no more than {taken}: too few to tell what grows.\n"
        else:
            said = f"nothing kept growing in {readings:,} readings.\n"
        self._print(f"at the end, {said}")

    def _print(self, text: str) -> None:
        try:
            sys.stderr.write(
                f"hygiene: {printable(text, lines=True)}"
            )  # in one piece, because the program writes there, too
            sys.stderr.flush()
        except (AttributeError, OSError, ValueError):
            self._over.set()  # the program has closed it


_ENOUGH = 6


def _told(growers: list[Grower]) -> str:
    many = "1 container grows" if len(growers) == 1 else f"{len(growers)} containers grow, the fastest first"
    lines = [
        f"  {grower.path}: {plural(grower.size, 'item')}, {per_time(grower.rate)}\n      {grower.suggestion}\n"
        for grower in growers[:_TOP]
    ]
    return f"{many}:\n{''.join(lines)}"


def main(arguments: Sequence[str]) -> int:
    """
    Run what *arguments* name, and watch it; its ``SystemExit`` and its exceptions pass.

    Returns:
        0 once the program has ended by itself, 2 if it cannot be loaded (told on standard error).
    """
    try:
        interval, every, is_module, rest = _parse(arguments)
        if not rest:
            print(USAGE, end="")
            return 0
        # As `run` does it, and for the same reasons: see there.
        main_module = types.ModuleType("__main__")
        found = None if is_module else _find_script(rest)
        if is_module:
            _enter(rest, os.getcwd())  # noqa: PTH109 # what Python puts into sys.path is a string
        sys.modules["__main__"] = main_module
        code, facts = found or _find_module(rest[0])
    except InputError as problem:
        print(f"hygiene: {printable(str(problem), lines=True)}", file=sys.stderr)
        return 2
    _describe(main_module, facts)
    _Reporter(_Widening() if interval is None else GrowthWatch(interval), every)
    exec(code, main_module.__dict__)  # noqa: S102  # running the user's program is the whole point
    return 0


def _parse(arguments: Sequence[str]) -> tuple[float | None, float, bool, list[str]]:
    """Interval, time between reports, whether a module is named, what to run with its arguments (none: only help)."""
    rest = list(arguments)
    times: dict[str, float] = {}
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        name, equals, value = option.partition("=")
        if option in ("-h", "--help"):
            return None, 0.0, False, []
        if name in ("--interval", "--every"):
            if not equals and not rest:
                raise InputError(f"wanted a time after {name}, found nothing. Write {name} 30s")
            text = value if equals else rest.pop(0)
            try:
                times[name] = seconds(text, name)
            except ValueError as problem:
                raise InputError(str(problem)) from problem
        elif option.startswith("-m"):
            rest = [option[2:], *rest] if option != "-m" else rest
            return _timed(times, True, rest)
        elif option == "--":
            break
        else:
            raise InputError(
                f"wanted --interval, --every or -m before the program, found {option!r}. Options of its own go after it"
            )
    return _timed(times, bool(rest) and _is_module(rest[0]), rest)


def _timed(times: dict[str, float], is_module: bool, rest: list[str]) -> tuple[float | None, float, bool, list[str]]:
    if not rest:
        raise InputError(f"wanted a script or a module to run, found none.\n{USAGE}".rstrip())
    return times.get("--interval"), times.get("--every", 60.0), is_module, rest


def _is_module(name: str) -> bool:
    """Whether *name* is a module's: no file of that name, and nothing in it that only a path has."""
    if os.path.isdir(name):  # noqa: PTH112
        return os.path.isfile(os.path.join(name, "__init__.py")) and os.sep not in name  # noqa: PTH113, PTH118
    return not (os.path.exists(name) or name.endswith(".py") or os.sep in name)  # noqa: PTH110
