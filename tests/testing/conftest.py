"""A pytest to run inside of the test, with the plugin."""

from __future__ import annotations

from collections.abc import Callable

import pytest

NAMED_ALIKE = ("-p", "pytest_hygiene")  # where hygiene is installed it is there already, under the same name


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pytest.RunResult]:
    """Run this source as a test file of its own, in a project that makes warnings errors."""
    pytester.makeini(
        """
        [pytest]
        addopts = --strict-markers --strict-config
        filterwarnings = error
        asyncio_mode = auto
        asyncio_default_fixture_loop_scope = function
        """
    )

    monkeypatch.setenv("COLUMNS", "200")  # no line is cut short

    def run_source(source: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_file=source)
        return pytester.runpytest_inprocess(*NAMED_ALIKE, "-p", "no:cacheprovider", *options)

    return run_source
