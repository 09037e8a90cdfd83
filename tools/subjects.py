"""Run the published packages that hygiene has to bound, each in an environment that has it.

    python tools/subjects.py                  all of them
    python tools/subjects.py --ci             the eight that are quickest to install
    python tools/subjects.py huey_memory      the ones named

The packages' drivers, and the `run.py` that bounds one package and says what came of it, are kept beside the
project in `../shared/subjects`. They are not part of it: where the folder is absent, there is nothing to run
and that is said.

Packages share one environment as long as pip can install them together. Where it cannot, the set is halved
until it can, so nobody has to keep a list of what clashes with what. Environments are kept between runs under
the hash of their interpreter and requirements; hygiene itself is installed anew, editable, in each run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT.parent / "shared" / "subjects"
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hygiene-subjects"

# Under 2 MB each with all they need, and nothing to compile: together they install in seconds.
LIGHTEST = (
    "aiodataloader_cache",
    "beaker_memory_sessions",
    "dogpile_memory",
    "huey_memory",
    "paho_offline_publish",
    "prometheus_labels",
    "starsessions_memory",
    "transitions_models",
)

RUN_TIMEOUT = 120.0  # seconds; the slowest takes ten, most of it importing aiogram
INSTALL_TIMEOUT = 900.0  # seconds; all of them together take one minute from a near index


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one subject said: a row of the table, and why it failed if it did."""

    name: str
    seconds: float = 0.0
    retained: int | None = None
    bounded: bool = False
    hazard_ok: bool = False
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Bounded, right in the dangerous situation, and ended as it should."""
        return self.bounded and self.hazard_ok and not self.failure


class InstallError(Exception):
    """Pip could not install a set of requirements together."""


def listed(python: str, folder: Path) -> dict[str, list[str]]:
    """The subjects of *folder* and what each needs installed."""
    command = [python, str(folder / "run.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=RUN_TIMEOUT)
    return {name: needs for name, *needs in map(str.split, done.stdout.splitlines())}


def share(
    subjects: Mapping[str, Sequence[str]], install: Callable[[frozenset[str]], str]
) -> Iterator[tuple[str, str | InstallError]]:
    """Give each subject an interpreter that has what it needs, in as few environments as pip allows.

    Args:
        subjects: Names, and what each needs installed.
        install: Installs a set of requirements and returns the interpreter that sees them.

    Yields:
        A name with its interpreter, or with the error of installing what it needs, and only that.
    """
    try:
        python = install(frozenset(need for needs in subjects.values() for need in needs))
    except InstallError as error:
        # Equal needs stay together: no split can part what one subject asks for.
        kinds = sorted({tuple(sorted(needs)) for needs in subjects.values()})
        if len(kinds) == 1:
            yield from ((name, error) for name in subjects)
            return
        first = set(kinds[: len(kinds) // 2])
        for half in (True, False):
            part = {name: n for name, n in subjects.items() if (tuple(sorted(n)) in first) is half}
            yield from share(part, install)
    else:
        yield from ((name, python) for name in subjects)


def environment(base: str, folder: Path, needs: frozenset[str]) -> str:
    """The interpreter of an environment under *folder* with *needs* and this project installed.

    Raises:
        InstallError: pip cannot install them together; it carries the end of what pip said.
    """
    identity = subprocess.run(
        [base, "-c", "import sys; print(sys.version, sys.base_prefix)"],
        capture_output=True, text=True, check=True, timeout=RUN_TIMEOUT,
    ).stdout  # fmt: skip
    home = folder / hashlib.sha256("\n".join([identity, *sorted(needs)]).encode()).hexdigest()[:16]
    ready, clash = home / "ready", home.with_suffix(".clash")
    if clash.exists():
        raise InstallError(clash.read_text())
    python = str(home / ("Scripts" if os.name == "nt" else "bin") / "python")
    try:
        # Without the mark the last run was interrupted half-way, and what is there cannot be trusted.
        if not ready.exists():
            print(f"installing {len(needs)} packages into {home}", file=sys.stderr)
            _run([base, "-m", "venv", "--clear", str(home)])
        _run([python, "-m", "pip", "install", "--quiet", *sorted(needs), "--editable", str(ROOT)])
    except InstallError as error:
        # Only a verdict of the resolver is remembered: a missing network is over tomorrow.
        if "ResolutionImpossible" in str(error):
            clash.write_text(str(error))
        raise
    ready.write_text("\n".join(sorted(needs)))
    return python


def run(name: str, python: str, folder: Path, timeout: float = RUN_TIMEOUT) -> Outcome:
    """Bound and drive one subject in a process of its own; *timeout* is in seconds."""
    started = time.monotonic()
    command = [python, str(folder / "run.py"), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Outcome(name, time.monotonic() - started, failure=f"still running after {timeout:.0f} s")
    seconds = time.monotonic() - started
    try:
        said = json.loads(done.stdout.splitlines()[-1])
        retained, bounded, hazard_ok = said["retained"], said["bounded"], said["hazard_ok"]
    except (IndexError, KeyError, ValueError):
        return Outcome(name, seconds, failure=_end(done.stderr) or f"no result, exit code {done.returncode}")
    failure = "" if done.returncode == 0 else f"hazard: {said.get('hazard')!r}\n{_end(done.stderr)}".rstrip()
    return Outcome(name, seconds, retained, bounded, hazard_ok, failure)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a subject, and below it why the failed ones failed."""
    lines = [f"{'subject':28} {'retained':>8}  {'bounded':7}  {'hazard ok':9}  {'seconds':>7}"]
    for o in outcomes:
        retained = "-" if o.retained is None else o.retained
        said = {True: "yes", False: "NO"}
        lines.append(f"{o.name:28} {retained:>8}  {said[o.bounded]:7}  {said[o.hazard_ok]:9}  {o.seconds:7.1f}")
    failed = [o for o in outcomes if not o.passed]
    lines += [f"\n{o.name} failed:\n{o.failure or 'not bounded, or the hazard went wrong'}" for o in failed]
    lines.append(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} subjects passed")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 if all passed or there is nothing to run, 1 if any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="subjects to run (default: all)")
    parser.add_argument("--ci", action="store_true", help="run the eight that are quickest to install")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the subjects are (%(default)s)")
    parser.add_argument("--envs", type=Path, default=ENVIRONMENTS, help="keeps environments (%(default)s)")
    parser.add_argument("--python", default=sys.executable, help="interpreter to use (%(default)s)")
    args = parser.parse_args(argv)

    if not (args.folder / "run.py").exists():
        print(f"skipped: there are no subjects to run, {args.folder} is not on this machine")
        return 0
    known = listed(args.python, args.folder)
    names = [*args.names, *(LIGHTEST if args.ci else ())] or list(known)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no subject named {', '.join(unknown)}; there are: {', '.join(known)}")

    args.envs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name, python in share(
        {name: known[name] for name in names}, lambda needs: environment(args.python, args.envs, needs)
    ):
        if isinstance(python, InstallError):
            outcomes.append(Outcome(name, failure=f"cannot be installed\n{python}"))
        else:
            outcomes.append(run(name, python, args.folder))
    print(table(sorted(outcomes, key=lambda outcome: outcome.name)))
    return 0 if all(o.passed for o in outcomes) else 1


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT)
    except subprocess.TimeoutExpired as expired:
        raise InstallError(f"still installing after {INSTALL_TIMEOUT:.0f} s") from expired
    if done.returncode:
        raise InstallError(_end(done.stdout + done.stderr))


def _end(text: str, lines: int = 15) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())
