"""The pytest plugin: whose failure is shown, which tests are watched, and with whom it gets along."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., pytest.RunResult]

LEAKS = """
import pytest
from conftest import start

QUICK = pytest.mark.no_leaks(patience=0.01)
"""
STARTS = """
import threading

GATE = threading.Event()


def start(name):
    threading.Thread(target=GATE.wait, name=name, daemon=True).start()


def pytest_unconfigure():
    GATE.set()
"""


@pytest.fixture
def in_source(pytester: pytest.Pytester) -> Callable[[str], str]:
    """Makes a source that has a way to leave a thread behind until pytest ends, and a mark for little patience."""
    pytester.makeconftest(STARTS)
    return lambda tests: LEAKS + textwrap.dedent(tests)


def lines_of(result: pytest.RunResult) -> str:
    return result.stdout.str()


@pytest.mark.slow
def test_a_test_that_leaves_something_fails_and_says_what_and_where(run: Run, in_source: Callable[[str], str]) -> None:
    """The thread is named, with the line that started it."""
    result = run(
        in_source("""
    @QUICK
    def test_it():
        start("forgotten")
    """)
    )

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_it*",
            "left behind: 1 thread",
            "1. daemon thread 'forgotten', still running; started at",
            "*in test_it",
            '    start("forgotten")',
            "*in start",
            "ERROR *::test_it - Failed: left behind: 1 thread",
        ]
    )
    assert "_pytest" not in lines_of(result)


@pytest.mark.parametrize(
    "tests",
    [
        "def test_it(): start('x')",
        "@pytest.mark.no_leaks(threads=False)\ndef test_it(): start('x')",
        "@pytest.mark.no_leaks(False)\ndef test_it(no_leaks): start('x')",
        "@QUICK\nclass TestIt:\n    @pytest.mark.no_leaks(threads=False)\n    def test_it(self): start('x')",
        "@QUICK\ndef test_it(): pytest.skip('start(x)')",
    ],
    ids=["plain", "not-threads", "not-at-all", "closer", "skipped"],
)
def test_a_test_that_is_not_watched_passes(run: Run, in_source: Callable[[str], str], tests: str) -> None:
    """Only what is asked for is looked at, and the closest marker wins."""
    result = run(in_source(tests))

    assert 0 == result.parseoutcomes().get("errors", 0)
    assert 0 == result.ret


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tests", "options"),
    [
        ("def test_it(no_leaks): start('x')", []),
        ("@pytest.mark.no_leaks\ndef test_it(): start('x')", []),
        ("def test_it(): start('x')", ["-o", "hygiene_no_leaks=true"]),
        ("def test_it(request):\n    request.getfixturevalue('no_leaks')\n    start('x')", []),
        ("@QUICK\nclass TestIt:\n    def test_it(self): start('x')", []),
        ("import unittest\nclass TestIt(unittest.TestCase):\n    @QUICK\n    def test_it(self): start('x')", []),
    ],
    ids=["fixture", "marker", "setting", "late", "class", "unittest"],
)
def test_a_test_is_watched_who_asks_for_it(
    run: Run, in_source: Callable[[str], str], tests: str, options: list[str]
) -> None:
    """By fixture, marker or setting."""
    result = run(in_source(tests), *options)

    assert 1 == result.parseoutcomes()["errors"]
    result.stdout.fnmatch_lines(["ERROR *test_it - Failed: left behind: 1 thread"])


@pytest.mark.slow
def test_the_failure_of_the_test_itself_comes_first(run: Run, in_source: Callable[[str], str]) -> None:
    """What it left is added to its report, and is no second failure."""
    result = run(
        in_source("""
    @QUICK
    def test_it():
        start("forgotten")
        assert "wanted" == "found"
    """)
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *AssertionError*", "*Left behind, found at teardown*", "*'forgotten', still running*", "FAILED *wanted*"]
    )


@pytest.mark.slow
def test_a_failure_in_setup_or_teardown_comes_first(run: Run, in_source: Callable[[str], str]) -> None:
    """Neither is replaced by what was left."""
    result = run(
        in_source("""
    @pytest.fixture
    def broken():
        start("first")
        raise ValueError("setup is broken")

    @pytest.fixture
    def breaks():
        yield
        pytest.fail("teardown is broken")

    @QUICK
    def test_setup(broken): ...

    @QUICK
    def test_teardown(breaks):
        start("second")
    """),
        "-p",
        "no:randomly",
    )

    found = lines_of(result)
    assert found.index("setup is broken") < found.index("'first', still running")
    assert found.index("teardown is broken") < found.index("'second', still running")
    result.stdout.fnmatch_lines(["ERROR *test_teardown - Failed: teardown is broken"])


@pytest.mark.slow
def test_an_expected_failure_stays_one(run: Run, in_source: Callable[[str], str]) -> None:
    """A test that is known to fail may leave its things."""
    result = run(
        in_source("""
    @QUICK
    @pytest.mark.xfail
    def test_it():
        start("forgotten")
        assert 0
    """)
    )

    result.assert_outcomes(xfailed=1)


def test_a_marker_that_is_not_understood_fails_its_test(run: Run) -> None:
    """A slip of the pen must not switch anything off in silence."""
    result = run(
        """
        import pytest

        @pytest.mark.no_leaks(thread=False)
        def test_name(): ...

        @pytest.mark.no_leaks(patience="soon")
        def test_patience(): ...

        @pytest.mark.no_leaks(True, False)
        def test_two(): ...
        """,
        "-p",
        "no:randomly",
    )

    result.assert_outcomes(errors=3)
    result.stdout.fnmatch_lines(["*is not understood*found thread", "*is not understood*patience*", "*one argument*"])


@pytest.mark.slow
def test_the_next_test_is_not_blamed(run: Run, in_source: Callable[[str], str]) -> None:
    """A thread that one test has left is there before the next one begins."""
    result = run(
        in_source("""
    @QUICK
    def test_it():
        start("forgotten")

    @QUICK
    def test_next(): ...
    """),
        "-p",
        "no:randomly",
    )

    result.assert_outcomes(passed=2, errors=1)


@pytest.mark.slow
def test_what_a_fixture_of_more_than_one_test_makes_is_not_the_tests(run: Run) -> None:
    """Whichever test is the first to ask for it, even in its middle."""
    result = run(
        """
        import threading

        import pytest

        from hygiene import Pool, Registry

        pytestmark = pytest.mark.no_leaks(patience=0.01)
        CACHE = Registry(maxsize=10)

        @pytest.fixture(scope="session")
        def server():
            gate = threading.Event()
            thread = threading.Thread(target=gate.wait)
            thread.start()
            yield
            gate.set()
            thread.join()

        @pytest.fixture(scope="module")
        def pool(server):
            with Pool(lambda: open(__file__), max_size=2) as pool:
                CACHE["made"] = pool.stats()
                yield pool

        def test_one(pool):
            with pool.acquire():
                pass

        def test_two(request):
            pool = request.getfixturevalue("pool")
            with pool.acquire(), pool.acquire():  # a second file is opened, which is the pool's
                pass

        @pytest.fixture(scope="class")
        def kept():
            CACHE["kept"] = open(__file__)
            yield
            CACHE["kept"].close()

        @pytest.mark.usefixtures("kept")
        class TestThree:
            def test_three(self):
                self.registry = Registry({1: 2})
        """
    )

    result.assert_outcomes(passed=3)


@pytest.mark.slow
def test_what_a_fixture_of_the_test_releases_is_not_left(run: Run) -> None:
    """It is looked when the test's own fixtures are gone, and their values are about to be."""
    result = run(
        """
        import asyncio
        import threading

        import pytest

        from hygiene import Registry

        pytestmark = pytest.mark.no_leaks(patience=0.01)

        @pytest.fixture
        def sessions():
            return Registry({"a": 1}, maxsize=3)

        @pytest.fixture
        async def server():
            task = asyncio.create_task(asyncio.Event().wait())
            yield
            task.cancel()

        @pytest.fixture
        def file(tmp_path):
            with open(tmp_path / "file", "w") as file:
                yield file

        def test_registry(sessions): ...

        async def test_task(server): ...

        def test_file(file): ...
        """
    )

    result.assert_outcomes(passed=3)


@pytest.mark.slow
def test_the_tests_of_anyio_and_unittest_are_watched(run: Run) -> None:
    """The loop that a test's runner makes is looked at before it cancels what is left; one of the test's own is not."""
    result = run(
        """
        import asyncio
        import unittest

        import pytest

        pytestmark = pytest.mark.no_leaks(patience=0.01)

        def leak():
            asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="left")

        async def soon():
            for _ in range(10):
                await asyncio.sleep(0)

        class TestUnit(unittest.IsolatedAsyncioTestCase):
            async def test_leak(self):
                leak()

            async def test_clean(self):
                asyncio.get_running_loop().create_task(soon())
                await asyncio.to_thread(int)

        async def test_leak():
            leak()

        async def test_clean():
            asyncio.get_running_loop().create_task(soon())
            await asyncio.to_thread(int)

        @pytest.mark.asyncio(loop_scope="module")
        async def test_module_leak():
            leak()

        @pytest.mark.asyncio(loop_scope="module")
        async def test_module_clean():
            asyncio.get_running_loop().create_task(soon())
            await asyncio.to_thread(int)

        def test_own():
            async def main():
                leak()

            asyncio.run(main())
        """
    )

    assert {"passed": 7, "errors": 3} == {
        name: count for name, count in result.parseoutcomes().items() if name in {"passed", "errors"}
    }
    assert {"TestUnit::test_leak", "test_leak", "test_module_leak"} == set(
        re.findall(r"ERROR \S+?\.py::(\S+) - Failed: left behind: 1 task", lines_of(result))
    )


@pytest.mark.slow
def test_anyio_runs_its_own(run: Run) -> None:
    """In strict mode of the other plugin, so that this one has the test."""
    result = run(
        """
        import asyncio

        import anyio
        import anyio.to_thread
        import pytest

        pytestmark = [pytest.mark.anyio, pytest.mark.no_leaks(patience=0.01)]

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.fixture
        async def server():
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.sleep_forever)
                yield
                group.cancel_scope.cancel()

        async def test_clean():
            await anyio.to_thread.run_sync(int)

        async def test_with_fixture(server): ...

        async def test_leak():
            asyncio.create_task(anyio.sleep_forever())

        async def test_leak_with_fixture(server):
            asyncio.create_task(anyio.sleep_forever())
        """,
        "-o",
        "asyncio_mode=strict",
    )

    result.assert_outcomes(passed=4, errors=2)


@pytest.mark.slow
def test_with_xdist(run: Run, in_source: Callable[[str], str]) -> None:
    """The workers find what is left, and the report arrives."""
    pytest.importorskip("xdist")
    result = run(
        in_source("""
    @QUICK
    def test_it():
        start("forgotten")

    @QUICK
    def test_own():
        start("another")
        assert 0, "its own"

    @QUICK
    def test_clean(): ...
    """),
        "-n",
        "2",
    )

    assert {"passed": 2, "failed": 1, "errors": 1} == {
        name: count for name, count in result.parseoutcomes().items() if name in {"passed", "failed", "errors"}
    }
    result.stdout.fnmatch_lines_random(["*'forgotten', still running*", "*'another', still running*", "*its own*"])


@pytest.mark.slow
def test_nothing_of_the_library_is_imported_before_a_test_is_watched(
    pytester: pytest.Pytester, project_root: Path
) -> None:
    """Who does not use the plugin does not pay for it."""
    pytester.makepyfile("import sys\n\ndef test_it(): assert 'hygiene' not in sys.modules")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pytest_hygiene", "-p", "no:cacheprovider"],
        env={**os.environ, "PYTHONPATH": str(project_root)},
        cwd=pytester.path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert "1 passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
def test_interrupted_it_ends_at_once(run: Run, in_source: Callable[[str], str]) -> None:
    """Who stops the tests does not wait for what one of them may have left."""
    result = run(
        in_source("""
    @pytest.fixture
    def stops():
        yield
        pytest.exit("enough")

    @pytest.mark.no_leaks(patience="1h")
    def test_it(stops):
        start("forgotten")
    """),
        "-p",
        "no:randomly",
    )

    assert pytest.ExitCode.INTERRUPTED == result.ret
    result.stdout.fnmatch_lines(["*enough*"])
    assert "forgotten" not in lines_of(result)


@pytest.mark.slow
def test_our_own_tests_leave_nothing(project_root: Path) -> None:
    """Nothing is found where nothing is. One test drops a pool on purpose."""
    suites = ["tests/pool/test_pool.py", "tests/session/test_scopes.py", "tests/test_listeners.py"]
    result = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-x", "-p", "pytest_hygiene", "-p", "no:cacheprovider"),
            *("-o", "hygiene_no_leaks=true", "--deselect", f"{suites[0]}::test_a_pool_that_is_dropped_open_is_noticed"),
            *suites,
        ],
        env={**os.environ, "PYTHONPATH": str(project_root)},
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == result.returncode, result.stdout[-3000:]
