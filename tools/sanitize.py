"""Run the tests on the compiled kernel with every access to memory checked.

    python tools/sanitize.py                            tests/kernel and tests/registry
    python tools/sanitize.py tests/kernel -k references  what pytest is to run instead
    python tools/sanitize.py --valgrind tests/kernel    under valgrind, some thirty times slower

The kernel is compiled anew, with AddressSanitizer and UndefinedBehaviorSanitizer, into a copy of the package that is
removed afterwards; what is installed or was built in place is left alone. Python itself stays as it is, but asks
``malloc`` for every object, so a reference that is read after its object has gone is seen as well. Where the compiler
has no sanitizers, valgrind is taken.

The last line sums up. The exit status is 1 if anything was reported, a test failed or none ran; 2 if there is nothing
to check with.

Needs Linux, gcc or clang, and Cython. Leaks are not looked for here: the interpreter keeps much until it ends. The
kernel's own tests count references instead.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent
KERNEL = Path("hygiene", "kernel")
TESTS = ("tests/kernel", "tests/registry")
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-fPIC", "-shared", "-w")
SANITIZERS = "-fsanitize=address,undefined"

# A test may take a minute otherwise; checked memory is three times slower, valgrind thirty.
TEST_TIMEOUT = {True: 1800, False: 300}
# A report's first line. Python's own interpreter is not compiled with the sanitizers, so all of these are the kernel's,
# or happen to memory that it has spoilt.
REPORT = re.compile(
    r"ERROR: AddressSanitizer|runtime error:|Invalid (read|write|free)|uninitialised value|Mismatched free"
)


@dataclass(frozen=True, slots=True)
class Checker:
    """What watches memory: AddressSanitizer with UndefinedBehaviorSanitizer, or valgrind."""

    name: str
    flags: tuple[str, ...] = ()
    preloaded: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


class NothingToCheckWithError(Exception):
    """Neither the sanitizers nor valgrind are here, or there is no compiler."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, run, and say what came of it."""
    parser = argparse.ArgumentParser(description="Run the tests on the compiled kernel with memory checked.")
    parser.add_argument("--valgrind", action="store_true", help="valgrind's memcheck instead of the sanitizers")
    options, chosen = parser.parse_known_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hygiene-sanitize-") as name:
        folder = Path(name)
        try:
            compiler = _compiler()
            checker = _choose(compiler, valgrind=options.valgrind)
            _build(folder, compiler, checker)
            status, tail = _run(folder, checker, chosen or [path for path in TESTS if (ROOT / path).exists()])
        except NothingToCheckWithError as error:
            print(f"sanitize: {error}")
            return 2
        reports = _reports(folder)
    for report in reports:
        print(report)
    print(
        f"sanitize: {len(reports)} report(s), {tail or f'pytest ended with {status}'}; {checker.name}, "
        f"CPython {platform.python_version()}, {time.monotonic() - began:.0f} s"
    )
    return 1 if reports or status else 0


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(command[0]) is None:
        raise NothingToCheckWithError(f"there is no compiler {command[0]!r}. Install gcc or clang, or name one in CC")
    return command


def _choose(compiler: list[str], *, valgrind: bool) -> Checker:
    if not valgrind:
        # The executable is not linked with their run-time libraries, so these come first of all into the process.
        libraries = tuple(filter(None, (_library(compiler, f"lib{name}.so") for name in ("asan", "ubsan"))))
        if len(libraries) == len(("asan", "ubsan")):
            version = subprocess.run([*compiler, "-dumpfullversion"], capture_output=True, text=True, check=False)
            name = (
                f"AddressSanitizer and UndefinedBehaviorSanitizer of {Path(compiler[0]).name} {version.stdout.strip()}"
            )
            return Checker(name, flags=(SANITIZERS,), preloaded=libraries)
        print("sanitize: this compiler has no sanitizers, so valgrind is taken")
    if (found := shutil.which("valgrind")) is None:
        raise NothingToCheckWithError("there is no valgrind")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    # Asking malloc for each object, CPython needs no suppressions: those that it ships are for its own arenas.
    command = (found, "--tool=memcheck", "--leak-check=no", "--trace-children=yes", "--quiet", "--num-callers=30")
    return Checker(version.stdout.strip(), command=command)


def _library(compiler: list[str], name: str) -> str:
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = found.stdout.strip()
    return path if Path(path).is_absolute() else ""  # a name that it does not know is given back as it is


def _build(folder: Path, compiler: list[str], checker: Checker) -> None:
    """A copy of the package with the kernel compiled for *checker*."""
    shutil.copytree(ROOT / "hygiene", folder / "hygiene", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    kernel = folder / KERNEL
    subprocess.run(
        [
            sys.executable,
            "-m",
            "cython",
            "-3",
            "--module-name",
            "hygiene.kernel.compiled",
            str(kernel / "compiled.pyx"),
        ],
        check=True,
    )
    subprocess.run(
        [
            *compiler,
            *FLAGS,
            *checker.flags,
            f"-I{sysconfig.get_path('include')}",
            str(kernel / "compiled.c"),
            "-o",
            str(kernel / f"compiled{sysconfig.get_config_var('EXT_SUFFIX')}"),
        ],
        check=True,
    )


def _run(folder: Path, checker: Checker, tests: Sequence[str]) -> tuple[int, str]:
    """Run pytest, and return its exit status and its last line."""
    valgrind = bool(checker.command)
    log = str(folder / "report")
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONSAFEPATH": "1",  # or what the tests start would import the package that is in the checkout
        "PYTHONMALLOC": "malloc",  # or freed objects stay in Python's own arenas, where reading them goes unseen
        "PYTHONFAULTHANDLER": "1",
        "HYGIENE_PURE": "0",
        "HYGIENE_COMPILED": "1",
        "LD_PRELOAD": " ".join(checker.preloaded),
        # Reports go to files: pytest captures what a test prints, and a test's child process may discard it.
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
    }
    command = [*checker.command, *([f"--log-file={log}.%p"] if valgrind else ()), sys.executable]
    say = "import hygiene; print(hygiene.compiled, hygiene.__file__)"
    loaded = subprocess.run([*command, "-c", say], capture_output=True, text=True, check=False, env=environment)
    if not loaded.stdout.startswith(f"True {folder}"):
        raise NothingToCheckWithError(f"the kernel that was built cannot be loaded: {loaded.stdout}{loaded.stderr}")
    ran = subprocess.Popen(
        [
            *[*command, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT[valgrind]}"],
            *["-m", "", "-n", "0", *tests],  # all tests, in the one process that is checked
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    last = ""
    for line in ran.stdout or ():
        print(line, end="", flush=True)
        last = line.strip() or last
    return ran.wait(), last.strip("= ") if re.search(r"\d+ (passed|failed|error)", last) else ""


def _reports(folder: Path) -> list[str]:
    """What the checker wrote of each process, where it had something to say."""
    texts = (path.read_text(errors="replace") for path in sorted(folder.glob("report.*")))
    return [text for text in texts if REPORT.search(text)]


if __name__ == "__main__":
    sys.exit(main())
