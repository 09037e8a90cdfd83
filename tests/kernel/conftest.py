"""The bodies of the kernel side by side, whichever registries run on here."""

# ruff: noqa: SIM105 - what is skipped elsewhere is left out here

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROGRAMS = Path(__file__).with_name("programs")
ROOT = PROGRAMS.parent.parent.parent

_spec = importlib.util.spec_from_file_location("bare", PROGRAMS / "bare.py")
assert _spec is not None
assert _spec.loader is not None
_bare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_bare)


def _required() -> bool:
    """Whether a body that is not there is a failure: where CI has built it."""
    return bool(os.environ.get("CI")) and os.environ.get("HYGIENE_COMPILED") == "1"


def load_body(name: str) -> ModuleType:
    """This body; the test is skipped if it was not built."""
    try:
        body: ModuleType = _bare.load_body(name)
    except ImportError as error:
        if _required():
            pytest.fail(f"the {name} body should be here: {error}")
        pytest.skip(f"the {name} body is not built for this Python: {error}")
    return body


@pytest.fixture(params=["pure", "compiled"])
def body(request: pytest.FixtureRequest) -> ModuleType:
    """Each body of the kernel."""
    return load_body(request.param)


@pytest.fixture
def compiled() -> ModuleType:
    """The compiled body."""
    return load_body("compiled")


@pytest.fixture
def bodies() -> list[ModuleType]:
    """All that are built, the Python one first."""
    found = [_bare.load_body("pure")]
    try:
        found.append(load_body("compiled"))
    except pytest.skip.Exception:
        pass
    return found


@pytest.fixture
def build() -> Callable[..., Any]:
    """Makes a bare kernel on a body."""
    return _bare.build  # type: ignore[no-any-return]


@pytest.fixture
def bare_kernels() -> Callable[..., Any]:
    """Makes the classes of bare kernels on a body."""
    return _bare.bare_kernels  # type: ignore[no-any-return]


Run = Callable[..., str]


@pytest.fixture
def run() -> Run:
    """Runs a program of this folder, or a piece of code, in a process of its own; a crash shows with its end."""

    def run(program: str, *arguments: object, pure: bool = False, env: dict[str, str] | None = None) -> str:
        what = [str(PROGRAMS / program)] if program.endswith(".py") else ["-c", program]
        path = os.pathsep.join([str(ROOT), str(PROGRAMS)])
        result = subprocess.run(
            [sys.executable, "-P", "-X", "faulthandler", "-W", "error", *what, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "HYGIENE_PURE": str(int(pure)), **(env or {})},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        output = (result.stdout + result.stderr).replace("\r", "\n")
        if result.returncode:
            pytest.fail(f"{program} ended with {result.returncode}:\n" + "\n".join(output.splitlines()[-25:]))
        return output

    return run


@pytest.fixture(params=[False, True], ids=["compiled", "pure"])
def pure(request: pytest.FixtureRequest) -> bool:
    """Whether a process is to run on the Python body; the compiled one is skipped where it is not built."""
    if not request.param:
        load_body("compiled")
    return bool(request.param)
