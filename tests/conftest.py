"""What every test may ask for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from hygiene.logs import Log

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is no bug: what is asserted is what happens, never how long it took.
settings.register_profile("hygiene", parent=settings(), deadline=None)
settings.load_profile("hygiene")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that trace, so that a run with coverage can leave them out."""
    for item in items:
        if "interrupted" in getattr(item, "fixturenames", ()) or "interruption" in item.path.parts:
            item.add_marker(pytest.mark.traced)


# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def lost_lines_are_failures() -> Iterator[None]:
    """A line that cannot be logged raises in tests: it may be the line that is wrong, and not a handler."""

    def lost(self: Log, text: str) -> None:
        raise  # noqa: PLE0704 - what is being handled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "_lost", lost)
        yield


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The checkout, wherever the tests were started from."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real input; it is kept beside the project and is no part of it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real input (../shared/data) is not on this machine")
    return folder


@pytest.fixture
def elsewhere() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Runs a piece of Python in another process, with the arguments in ``argv``; none of them outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *argv: Any, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, *map(str, argv)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], int]:
    """Calls a function in a forked child and returns the child's exit status: 0 if the function returned."""

    def run(function: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                function()
                status = 0
            except BaseException as error:  # noqa: BLE001 - it must not get back into pytest
                sys.stderr.write(f"in the child: {error!r}\n")
            finally:
                sys.stderr.flush()
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run
