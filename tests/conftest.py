"""What every test may ask for."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is no bug: what is asserted is what happens, never how long it took.
settings.register_profile("hygiene", parent=settings(), deadline=None)
settings.load_profile("hygiene")


# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every program that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
