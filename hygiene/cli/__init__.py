"""
The command ``hygiene``: see what a bound does to real traffic, choose its numbers, apply it to a script.

This module imports nothing but the standard library, so that the command can say what to install where its own
dependencies (the extra ``cli``) are missing.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        arguments: What follows the command's name; ``None`` for those of this process.

    Returns:
        The exit code: 0 done, 1 stopped by the user or by a full disk, 2 something in what was given must be mended.

    Raises:
        SystemExit: A script under ``run`` asked for it, or the command ended in another way.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["--version"], ["-V"]):
        arguments = ["--version"]
    elif arguments[:1] == ["run"]:
        # Not through typer: the script's own options are none of its business, and the script's process must not carry
        # the memory of a command line that it never uses.
        from hygiene.cli.run import main as run

        return run(arguments[1:])
    if arguments[:1] == ["watch"]:
        from hygiene.cli.watch import main as watch

        return watch(arguments[1:])
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only shows the rest as escapes
    try:
        status = _version() if arguments == ["--version"] else _call(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        return _give_up_output(1)
    except OSError as error:
        if sys.stderr is not None:
            print(f"hygiene: error: cannot write the output: {error.strerror}.", file=sys.stderr)
        return _give_up_output(1)
    if arguments != ["--version"]:
        sys.exit(status)
    return status


def _version() -> int:
    import platform

    package = sys.modules["hygiene"]  # loaded before this module of its own, which is below it
    kernel = "compiled kernel" if package.compiled else "kernel in Python"
    print(f"hygiene {package.__version__} ({kernel}, Python {platform.python_version()})")
    return 0


def _give_up_output(status: int) -> int:
    """Discard the rest of the output, which Python would write again, and complain about, when it exits."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (AttributeError, OSError, ValueError):  # there is no file behind it
        pass
    return status


def _call(arguments: list[str]) -> int:
    import logging

    # What fails is told in one sentence by the command itself. `run` and `watch` leave it to the user's program.
    logging.getLogger("hygiene").addHandler(logging.NullHandler())
    try:
        from hygiene.cli.app import app
    except ModuleNotFoundError as missing:
        if (missing.name or "hygiene").partition(".")[0] == "hygiene":
            raise
        print(
            f"hygiene: the command line needs typer, rich and pygal, found no {missing.name}. "
            "Install them: pip install 'hygiene[cli]'",
            file=sys.stderr,
        )
        return 2
    try:
        app(args=arguments, prog_name="hygiene")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    return 0
