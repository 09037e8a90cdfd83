"""SQLAlchemy's own tests of pools, with `HygienePool` instead of ``QueuePool``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import sqlalchemy

pytestmark = [pytest.mark.once, pytest.mark.slow]

INTERNALS = "looks at the attributes of QueuePool"
UNBOUNDED = "asks for a pool without a bound, which is refused"
OVERFLOW = "connections beyond pool_size are kept until max_idle has elapsed"
DISPOSE = "a disposed pool closes what is checked in afterwards"
DIFFERENT = {
    "PoolDialectTest::test_queue_pool": DISPOSE,
    "PoolTest::test_recreate_state[HygienePool-pool_args0]": INTERNALS,
    "PoolTest::test_recreate_state[HygienePool-pool_args1]": INTERNALS,
    "QueuePoolTest::test_connect_checkout_handler_always_gets_info": INTERNALS,
    "QueuePoolTest::test_connect_handler_not_called_for_recycled": INTERNALS,
    "QueuePoolTest::test_dispose_closes_pooled": DISPOSE,
    "QueuePoolTest::test_error_on_pooled_reconnect_cleanup_invalidate": INTERNALS,
    "QueuePoolTest::test_error_on_pooled_reconnect_cleanup_recycle": INTERNALS,
    "QueuePoolTest::test_error_on_pooled_reconnect_cleanup_wcheckout_event[base_exception]": INTERNALS,
    "QueuePoolTest::test_error_on_pooled_reconnect_cleanup_wcheckout_event[plain]": INTERNALS,
    "QueuePoolTest::test_fifo": "the connection that came back last is handed out first by default",
    "QueuePoolTest::test_overflow_no_gc": OVERFLOW,
    "QueuePoolTest::test_overflow_reset_on_failed_connect": INTERNALS,
    "QueuePoolTest::test_queuepool_close": UNBOUNDED,
    "QueuePoolTest::test_queuepool_del": UNBOUNDED,
    "QueuePoolTest::test_recreate": INTERNALS,
    "QueuePoolTest::test_unlimited[-5]": UNBOUNDED,
    "QueuePoolTest::test_unlimited[0]": UNBOUNDED,
    "QueuePoolTest::test_unlimited[1]": UNBOUNDED,
    "QueuePoolTest::test_unlimited[42]": UNBOUNDED,
    "QueuePoolTest::test_waiters_handled": UNBOUNDED,
}
"""The tests that fail, and why; docs/reference/integrations.md lists the same."""

PLUGIN = """
import json, os
OUTCOMES = {}
def pytest_collection(session):
    import sqlalchemy.pool, sqlalchemy.pool.impl
    from hygiene.integrations.sqlalchemy import HygienePool
    for module in (sqlalchemy, sqlalchemy.pool, sqlalchemy.pool.impl):
        module.QueuePool = HygienePool
def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid.partition("::")[2]] = report.outcome
def pytest_sessionfinish(session):
    open(os.environ["OUTCOMES"], "w").write(json.dumps(OUTCOMES))
"""


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The source release of the installed version, which has the tests."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-binary", "sqlalchemy", "-d", str(tmp_path), f"sqlalchemy=={sqlalchemy.__version__}"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    found = list(tmp_path.glob("*.tar.gz"))
    if not found:
        if os.environ.get("CI"):
            pytest.fail(f"the source release of SQLAlchemy could not be downloaded: {done.stderr[-500:]}")
        pytest.skip("the source release of SQLAlchemy cannot be downloaded here")
    with tarfile.open(found[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / found[0].name.removesuffix(".tar.gz")


@pytest.mark.timeout(360)
def test_all_of_sqlalchemys_pool_tests_pass_but_for_the_documented_differences(
    release: Path, project_root: Path
) -> None:
    (release / "swap_plugin.py").write_text(PLUGIN)
    options = ["-q", "-p", "swap_plugin", "-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    outcomes = release / "outcomes.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:pytest_hygiene", "test/engine/test_pool.py"],
        cwd=release,
        env={**os.environ, "PYTHONPATH": f"{release}{os.pathsep}{project_root}", "OUTCOMES": str(outcomes)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcomes.exists(), done.stdout[-2000:] + done.stderr[-2000:]

    found = json.loads(outcomes.read_text())

    assert set(DIFFERENT) == {name for name, outcome in found.items() if outcome == "failed"}
    assert 120 <= sum(outcome == "passed" for outcome in found.values())


def test_the_page_lists_the_differences(project_root: Path) -> None:
    page = (project_root / "docs/reference/integrations.md").read_text()

    for name in DIFFERENT:
        assert f"`{name.rpartition('::')[2].partition('[')[0]}`" in page
