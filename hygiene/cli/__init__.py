"""
The command ``hygiene``: see what a bound does to real traffic, choose its numbers, apply it to a script.

This module imports nothing but the standard library, so that the command can say what to install where its own
dependencies (the extra ``cli``) are missing.
"""

from __future__ import annotations

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
        The exit code: 0 done, 1 stopped by the user, 2 something in what was given must be mended.

    Raises:
        SystemExit: A script under ``run`` asked for it, or the command ended in another way.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["run"]:
        # Not through typer: the script's own options are none of its business, and the script's process must not carry
        # the memory of a command line that it never uses.
        from hygiene.cli.run import main as run

        return run(arguments[1:])
    if arguments[:1] == ["watch"]:
        from hygiene.cli.watch import main as watch

        return watch(arguments[1:])
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
    sys.exit(app(args=arguments, prog_name="hygiene"))
