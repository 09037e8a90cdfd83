"""What the tests of the command share."""

from __future__ import annotations

import pytest

from hygiene.cli import main


@pytest.fixture
def hygiene(capsys, monkeypatch):
    """Runs the command in this process; returns its exit code, output and errors."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def hygiene(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return hygiene
