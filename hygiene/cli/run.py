"""Run a script or a module with guards loaded first, as if Python had been given it."""

# ruff: noqa: PTH100, PTH109, PTH112, PTH120  # what Python puts into sys.path and __file__ is made of strings, and pathlib would tidy them

from __future__ import annotations

import atexit
import builtins
import importlib.util
import io
import os
import sys
import traceback
import types
import zipfile
from importlib.machinery import PathFinder, SourceFileLoader
from typing import TYPE_CHECKING

from hygiene.cli.logs import InputError
from hygiene.errors import HygieneError
from hygiene.guards import EXAMPLE, Guard, load_guards
from hygiene.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

__all__ = ["USAGE", "main"]

_Facts = dict[str, object]

USAGE = """\
usage: hygiene run [--config FILE] SCRIPT [ARGS...]
       hygiene run [--config FILE] -m MODULE [ARGS...]

Load the guards in FILE (hygiene.toml), then run SCRIPT or MODULE as Python would.
Everything after SCRIPT or MODULE is its own.
"""


def main(arguments: Sequence[str]) -> int:
    """
    Load the guards, then run what *arguments* name; its ``SystemExit`` and its exceptions pass.

    ``sys.argv``, ``sys.path[0]`` and the module ``__main__`` are what they would be without us, and stay so: threads
    that outlive the script's last line still find their ``__main__``.

    Returns:
        0 once the script has ended by itself, 2 if the guards or the script cannot be loaded (told on standard error).
    """
    try:
        config, is_module, rest = _parse(arguments)
        if config is None:
            print(USAGE, end="")
            return 0
        main_module = types.ModuleType("__main__")
        found = None if is_module else _find_script(rest)
        if is_module:
            _enter(rest, os.getcwd())
        # Before the guards are loaded, because one may wait for a class in it. Not runpy.run_path: it puts our own
        # __main__ back when the script's last line is done, although its threads may go on, and pickle and
        # multiprocessing look classes up in whatever is __main__ then.
        sys.modules["__main__"] = main_module
        guards = _load_guards(config)
        code, facts = found or _find_module(rest[0])
    except InputError as problem:
        print(f"hygiene: {printable(str(problem), lines=True)}", file=sys.stderr)
        return 2
    _describe(main_module, facts)
    # At the very end, when its threads have ended, too: until then a module may still be imported.
    atexit.register(_tell_waiting, guards)
    try:
        exec(code, main_module.__dict__)  # noqa: S102  # running the user's script is the whole point
    except (AttributeError, TypeError, ValueError) as problem:
        if not _comes_from_a_guard(problem):
            raise
        atexit.unregister(_tell_waiting)
        print(f"hygiene: {printable(str(problem), lines=True)}", file=sys.stderr)
        return 2
    return 0


def _load_guards(config: str) -> list[Guard]:
    try:
        return load_guards(config)
    except FileNotFoundError as problem:
        raise InputError(
            f"cannot read the guards: there is no file {config!r} here. "
            f"Name another one with --config, or write it. For example:{EXAMPLE}"
        ) from problem
    except (HygieneError, ValueError, TypeError, AttributeError, ImportError, OSError) as problem:
        raise InputError(f"{problem}. {'. '.join(getattr(problem, '__notes__', []))}".rstrip(" .")) from problem


def _comes_from_a_guard(problem: Exception) -> bool:
    """Whether a guard whose target was imported just now did not find what it shall bound."""
    ours = (Guard._apply.__code__, Guard._apply_in.__code__)
    return any(frame.f_code in ours for frame, _ in traceback.walk_tb(problem.__traceback__))


def _tell_waiting(guards: list[Guard]) -> None:
    """A guard that found nothing to bound is most often a name with a typing error in it."""
    for guard in guards:
        if not guard.applied:
            what = f"{', '.join(guard.attributes)} of {guard.target}"
            text = f"hygiene: wanted to bound {what}, found that nothing of that name came up"
            print(printable(text), file=sys.stderr)


def _parse(arguments: Sequence[str]) -> tuple[str | None, bool, list[str]]:
    """The configuration (``None``: only help was wanted), whether a module is named, what to run with its arguments."""
    rest = list(arguments)
    config = "hygiene.toml"
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        name, equals, value = option.partition("=")
        if option in ("-h", "--help"):
            return None, False, []
        if name == "--config":
            if not equals and not rest:
                raise InputError("wanted a file after --config, found nothing. Name the TOML file with the guards")
            config = value if equals else rest.pop(0)
        elif option.startswith("-m"):
            # As with Python itself, -m ends our options: what follows the module is the module's.
            rest = [option[2:], *rest] if option != "-m" else rest
            return config, True, _something(rest)
        elif option == "--":
            break
        else:
            raise InputError(
                f"wanted --config or -m before the script, found {option!r}. Options of the script go after it"
            )
    return config, False, _something(rest)


def _something(rest: list[str]) -> list[str]:
    if not rest:
        raise InputError(f"wanted a script or a module to run, found none.\n{USAGE}".rstrip())
    return rest


def _find_script(arguments: list[str]) -> tuple[types.CodeType, _Facts]:
    """Its code and what its module is told about itself; enters it."""
    path = arguments[0]
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        _enter(arguments, path)
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None:
            raise InputError(f"wanted a __main__.py to run, found none in {path!r}. Name the script in it")
        return _load(spec)
    absolute = os.path.abspath(path)
    try:
        with io.open_code(absolute) as source:
            code = compile(source.read(), absolute, "exec", dont_inherit=True)
    except OSError as problem:
        raise InputError(
            f"wanted a script to run, found that {path!r} cannot be read ({problem.strerror}). "
            "Check the path, or use -m for a module"
        ) from problem
    # Python follows a link to the script before it takes its directory.
    _enter(arguments, os.path.dirname(os.path.realpath(path)))
    return code, {"__file__": absolute, "__cached__": None, "__loader__": SourceFileLoader("__main__", absolute)}


def _find_module(name: str) -> tuple[types.CodeType, _Facts]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as problem:
        raise InputError(f"wanted a module to run, found that {name!r} cannot be imported: {problem}") from problem
    if spec is None:
        raise InputError(
            f"wanted a module to run, found no {name!r} (or no __main__ in it). Check the name and the directory"
        )
    sys.argv[0] = spec.origin or name
    return _load(spec)


def _load(spec: ModuleSpec) -> tuple[types.CodeType, _Facts]:
    get_code = getattr(spec.loader, "get_code", None)
    code = get_code(spec.name) if get_code is not None else None
    if code is None:
        raise InputError(
            f"wanted Python code to run, found none in {spec.name!r} ({spec.origin}). Name a module written in Python"
        )
    return code, {
        "__file__": spec.origin,
        "__cached__": spec.cached,
        "__loader__": spec.loader,
        "__package__": spec.parent,
        "__spec__": spec,
    }


def _describe(main_module: types.ModuleType, facts: _Facts) -> None:
    """Tell a module about itself, as this Python tells one that it runs."""
    main_module.__dict__.update(facts, __builtins__=builtins)
    if sys.version_info < (3, 14):  # since then they are made when somebody asks
        main_module.__dict__.update(__annotations__={})
    if sys.version_info >= (3, 15):
        main_module.__dict__.pop("__cached__", None)


def _enter(arguments: list[str], directory: str) -> None:
    """Make ``sys.argv`` and ``sys.path`` the script's; guards are looked up on the same path as its own imports."""
    sys.argv[:] = arguments
    # With -P or PYTHONSAFEPATH there is no such place in front, and there shall be none.
    if not sys.flags.safe_path:
        sys.path[0] = directory
