"""The pytest plugin: a test fails if it leaves something behind. See `hygiene.testing`.

A module beside the package, because pytest imports the plugins of all that is installed at its start: to import
anything of the package imports the whole of it, which takes long, and too early for those who measure their coverage.
So nothing of it is imported here before the first test that is watched.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from hygiene.testing.leaks import Leak, Watch

__all__ = ["no_leaks"]

_MARK = "no_leaks"
_INI = "hygiene_no_leaks"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the setting that watches every test."""
    parser.addini(
        _INI, "fail every test that leaves something behind, as if marked with no_leaks", "bool", default=False
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        "no_leaks(watch=True, *, patience=1.0, leases=True, sessions=True, pools=True, listeners=True, "
        "registries=True, threads=True, tasks=True, fds=True): fail the test if it leaves one of these behind "
        "(hygiene).",
    )


@pytest.fixture
def no_leaks(request: pytest.FixtureRequest) -> None:
    """Fail the test if it leaves leases, sessions, threads, tasks, files or the like behind; see the marker."""
    state = request.node.stash.get(_STATE, None)
    if state is None:  # asked for by getfixturevalue(): what was made before is not seen
        _begin(request.node, wanted=True)


class _State:
    """What is known of one test that is watched."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.failed = False  # for its own reasons
        self.raised = False
        self.leaks = ""


_STATE = pytest.StashKey[_State]()


def _options(item: pytest.Item, *, wanted: bool = False) -> dict[str, Any] | None:
    """What the markers say, the closest last; ``None`` if *item* is not to be watched."""
    marks = list(item.iter_markers(_MARK))
    if not (wanted or marks or _MARK in getattr(item, "fixturenames", ()) or item.config.getini(_INI)):
        return None
    options: dict[str, Any] = {}
    for mark in reversed(marks):
        if len(mark.args) > 1:
            options["wrong"] = mark.args
        options["watch"] = bool(mark.args[0]) if mark.args else True
        options.update(mark.kwargs)
    return options if options.pop("watch", True) else None


def _watch(*, patience: Any = None, wrong: object = None, **kinds: object) -> Watch:
    from hygiene.testing.leaks import KINDS, PATIENCE, Watch  # noqa: PLC0415 - not before it is needed
    from hygiene.units import seconds  # noqa: PLC0415

    if wrong is not None:
        raise TypeError(f"it takes one argument without a name; found {wrong!r}")
    unknown = sorted(kinds.keys() - set(KINDS))
    if unknown:
        raise TypeError(f"wanted watch=, patience=, {'=, '.join(KINDS)}=; found {', '.join(unknown)}")
    limit = PATIENCE if patience is None else seconds(patience, "patience")
    return Watch([kind for kind in KINDS if kinds.get(kind, True)], limit)


def _begin(item: pytest.Item, *, wanted: bool = False) -> None:
    found = _options(item, wanted=wanted)
    if found is None:
        return
    try:
        watch = _watch(**found)
    except (TypeError, ValueError) as error:
        raise pytest.fail.Exception(f"the marker no_leaks is not understood: {error}", pytrace=False) from None
    # For its own hooks, and for those of fixtures that are of no test.
    state = item.stash[_STATE] = item.config.stash[_STATE] = _State(watch)
    state.watch.begin()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Watch from before the first fixture on."""
    # No wrapper: where one raises, those further in have not begun what they end in the teardown.
    _begin(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Leave out what belongs to more than one test."""
    state = None if fixturedef.scope == "function" else request.config.stash.get(_STATE, None)
    if state is None:
        return (yield)
    with state.watch.aside():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Tell what is left when the fixtures of the test are gone."""
    state = item.stash.get(_STATE, None)
    if state is None:
        return (yield)
    try:
        result = yield
    except (KeyboardInterrupt, SystemExit, pytest.exit.Exception):  # the session ends: no time to wait for anything
        state.watch.cancel()
        _forget(item)
        raise
    except BaseException:  # also what pytest.fail() raises
        _end(item, state)
        raise
    _end(item, state)
    if state.leaks and not state.failed:
        state.raised = True
        pytest.fail(state.leaks, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what was left to the report of a test that failed anyway: its own failure comes first."""
    report = yield
    state = item.stash.get(_STATE, None)
    if state is None:
        return report
    if call.when == "call":
        state.failed = report.failed or hasattr(report, "wasxfail")
    elif call.when == "teardown":
        _forget(item)
        if state.leaks and not state.raised:
            report.sections.append(("Left behind, found at teardown", state.leaks))
    return report


def _forget(item: pytest.Item) -> None:
    del item.stash[_STATE]
    del item.config.stash[_STATE]


def _end(item: pytest.Item, state: _State) -> None:
    funcargs = getattr(item, "funcargs", None) or {}
    leaks = state.watch.end([*funcargs.values(), getattr(item, "instance", None)])
    if state.failed:
        # The traceback of a test that failed holds what its variables held.
        leaks = [leak for leak in leaks if leak.kind not in {"registries", "listeners"}]
    if leaks:
        state.leaks = _text(leaks)


def _text(leaks: list[Leak]) -> str:
    # The first line stands alone in pytest's summary.
    counts = Counter(leak.kind for leak in leaks)
    found = ", ".join(f"{count} {_ONE[kind] if count == 1 else kind}" for kind, count in counts.items())
    found = found.replace("fds", "file descriptors")
    parts = [f"{number}. {leak}" for number, leak in enumerate(leaks, 1)]
    return f"left behind: {found}\n\n" + "\n".join(parts)


_ONE = {
    "leases": "lease",
    "sessions": "session",
    "pools": "pool",
    "listeners": "listener",
    "registries": "registry",
    "threads": "thread",
    "tasks": "task",
    "fds": "file descriptor",
}
