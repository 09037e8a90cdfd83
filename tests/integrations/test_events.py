"""The log: each event has a name that is documented, and none floods it."""

from __future__ import annotations

import ast
import copy
import functools
import gc
import json
import logging
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import structlog

from hygiene import Registry, logs
from hygiene.logs import LastResort, Repeats, logger
from hygiene.testing import ManualClock

METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
RESERVED = {*vars(logging.makeLogRecord({})), "message", "asctime"}


class Line:
    """One call of the logger in the library's code."""

    def __init__(self, where: str, call: ast.Call, scope: ast.AST) -> None:
        self.where = f"{where}:{call.lineno}"
        assert isinstance(call.func, ast.Attribute)
        method = call.func.attr
        if method == "log":  # logging.WARNING if worse else logging.INFO
            self.levels = {word.lower() for word in re.findall(r"logging\.([A-Z]+)", ast.unparse(call.args[0]))}
        else:
            self.levels = {"error" if method == "exception" else method}
        extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
        if isinstance(extra, ast.Name):  # given its value in the lines before
            extra = next(
                node.value
                for node in ast.walk(scope)
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == extra.id
            )
        self.event: str | None = None
        self.fields: set[str] = set()
        if isinstance(extra, ast.Dict):
            found = {
                key.value: value
                for key, value in zip(extra.keys, extra.values, strict=True)
                if isinstance(key, ast.Constant)
            }
            self.fields = {str(key) for key in found} - {"event_name", "of"}
            self.event = getattr(found.get("event_name"), "value", None)
        elif isinstance(extra, ast.Call):  # a function that makes the fields, and takes the name first
            self.event = getattr(extra.args[0], "value", None)


@functools.cache
def lines(root: Path) -> tuple[Line, ...]:
    return tuple(_lines(root))


def _lines(root: Path) -> Iterator[Line]:
    for path in sorted((root / "hygiene").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(scope):
                    if (
                        isinstance(node, ast.Call)
                        and isinstance(node.func, ast.Attribute)
                        and node.func.attr in METHODS
                        and isinstance(node.func.value, ast.Name)
                        and node.func.value.id == "logger"
                    ):
                        yield Line(str(path.relative_to(root)), node, scope)


def documented(root: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Each event of the reference with its levels and fields."""
    rows = re.findall(
        r"^\| `([\w.]+)` \| ([\w, ]+) \| ([^|]*) \| ", (root / "docs/reference/events.md").read_text(), re.MULTILINE
    )
    return {
        event: (set(levels.strip().split(", ")), set(re.findall(r"`(\w+)`", fields))) for event, levels, fields in rows
    }


@pytest.mark.slow
def test_each_line_has_the_name_of_its_event(project_root: Path) -> None:
    found = lines(project_root)

    assert [] == [line.where for line in found if line.event is None]
    assert len({line.where for line in found}) > 60


def test_the_reference_lists_each_event(project_root: Path) -> None:
    """Those that the code has with their levels, and no others."""
    levels: dict[str, set[str]] = {}
    for line in lines(project_root):
        levels.setdefault(str(line.event), set()).update(line.levels)

    assert levels == {event: found for event, (found, _) in documented(project_root).items()}


def test_the_reference_lists_each_field(project_root: Path) -> None:
    """What is beside the name, for whoever builds an alert on it."""
    known = documented(project_root)
    wrong = [
        (line.where, line.event, sorted(line.fields))
        for line in lines(project_root)
        if not line.fields <= known.get(str(line.event), (set(), set()))[1]
    ]
    none_of_them = [
        (event, field)
        for event, (_, fields) in known.items()
        for field in fields
        if not any(field in line.fields or not line.fields for line in lines(project_root) if line.event == event)
    ]

    assert [] == wrong
    assert [] == none_of_them


def test_no_field_is_one_of_the_record_itself(project_root: Path) -> None:
    """``logging`` refuses those when the line is logged: when something else has gone wrong already."""
    assert [] == [line.where for line in lines(project_root) if line.fields & RESERVED or "event" in line.fields]


def test_names_are_of_one_kind(project_root: Path) -> None:
    assert [] == [event for event in documented(project_root) if not re.fullmatch(r"[a-z]+\.[a-z_]+", event)]


# How often


class Thing:
    pass


class Slotted:
    __slots__ = ()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def heard() -> list[logging.LogRecord]:
    return []


@pytest.fixture
def log(clock: ManualClock, heard: list[logging.LogRecord]) -> logging.Logger:
    """A logger that works as the library's own does, by a clock that is turned by hand."""

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    log = logging.Logger("test")  # noqa: LOG001 - of this test alone
    log.addHandler(Keeps())
    log.addFilter(Repeats(60.0, timer=clock))
    return log


def test_what_fails_in_a_loop_is_said_once_a_minute(
    log: logging.Logger, clock: ManualClock, heard: list[logging.LogRecord]
) -> None:
    """The next line says how many there were in between."""
    thing = Thing()
    for _ in range(2):
        for n in range(1000):
            log.warning("attempt %d failed", n, extra={"event_name": "x.failed", "of": thing})
        clock.advance(60)
    log.warning("attempt %d failed", 1000, extra={"event_name": "x.failed", "of": thing})

    assert [
        "attempt 0 failed",
        "attempt 0 failed (999 more like this were not logged)",
        "attempt 1000 failed (999 more like this were not logged)",
    ] == [record.getMessage() for record in heard]
    assert [None, 999, 999] == [getattr(record, "suppressed", None) for record in heard]


def test_a_line_that_comes_seldom_is_as_it_was(
    log: logging.Logger, clock: ManualClock, heard: list[logging.LogRecord]
) -> None:
    thing = Thing()
    for n in range(3):
        log.warning("%d failed", n, extra={"event_name": "x.failed", "of": thing})
        clock.advance(60)

    assert ["0 failed", "1 failed", "2 failed"] == [record.getMessage() for record in heard]
    assert "%d failed" == heard[-1].msg


def test_each_event_of_each_object_is_heard(log: logging.Logger, heard: list[logging.LogRecord]) -> None:
    """One that fails all the time does not hide another, nor one hook of it another."""
    one, other = Thing(), Thing()
    for _ in range(5):
        for event, of in (("x.a", one), ("x.b", one), ("x.a", other), ("x.a", (one, "close")), ("x.a", (one, "busy"))):
            log.warning("failed", extra={"event_name": event, "of": of})

    assert ["x.a", "x.b", "x.a", "x.a", "x.a"] == [record.__dict__["event_name"] for record in heard]


def test_what_speaks_of_nobody_is_not_held_back(log: logging.Logger, heard: list[logging.LogRecord]) -> None:
    for _ in range(3):
        log.warning("said once by itself", extra={"event_name": "x.a"})
        log.warning("of nobody", extra={"event_name": "x.b", "of": None})
        log.warning("without a name")

    assert 9 == len(heard)


@pytest.mark.slow
def test_the_dead_are_forgotten(log: logging.Logger, heard: list[logging.LogRecord]) -> None:
    """A new object where another has been is another; and nothing is kept alive or remembered."""
    for _ in range(3):
        thing = Thing()
        log.warning("failed", extra={"event_name": "x.a", "of": thing})
        del thing
        gc.collect()
    (limit,) = log.filters

    assert 3 == len(heard)
    assert isinstance(limit, Repeats)
    assert {} == limit._said


def test_what_cannot_be_held_weakly_is_heard_each_time(log: logging.Logger, heard: list[logging.LogRecord]) -> None:
    thing = Slotted()
    for _ in range(2):
        log.warning("failed", extra={"event_name": "x.a", "of": thing})

    assert 2 == len(heard)


def test_the_object_does_not_travel_with_the_line(caplog: pytest.LogCaptureFixture) -> None:
    """A handler may keep the record, copy it, or send it to another process."""
    queue: SimpleQueue[Any] = SimpleQueue()
    handler = QueueHandler(queue)
    log = logging.getLogger("hygiene")
    log.addHandler(handler)
    try:
        fail_in_a_hook()
    finally:
        log.removeHandler(handler)
    record = queue.get_nowait()

    assert not hasattr(record, "of")
    assert record.getMessage() == pickle.loads(pickle.dumps(record)).getMessage()
    assert "registry.hook_failed" == copy.copy(record).event_name
    assert "test" == record.registry


def fail_in_a_hook(times: int = 1) -> None:
    def fail(_: Any) -> None:
        raise ArithmeticError("broken hook")

    registry: Registry[int, int] = Registry({0: 0}, maxsize=1, on_evict=fail, name="test")
    for n in range(1, times + 1):
        registry[n] = n
    assert times == registry.stats().hook_errors


def test_a_hook_that_fails_at_each_write_does_not_fill_the_disk(caplog: pytest.LogCaptureFixture) -> None:
    """Each is counted, and one a minute is logged."""
    fail_in_a_hook(1000)

    assert ["registry.hook_failed"] == [record.event_name for record in caplog.records]


# Who hears it


def program(code: str) -> str:
    """What a program writes to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stderr


FAILING = """
import logging
from hygiene import Registry, register_cleanup
def fail(*_): raise ArithmeticError("broken")
"""


WRITE = "Registry({1: 1}, maxsize=1, on_evict=fail)[2] = 2\n"


@pytest.mark.slow
def test_a_program_that_has_not_configured_logging_sees_warnings_on_stderr() -> None:
    """A mistake in a hook is not silent, and the line names its origin."""
    unset = program(FAILING + WRITE)
    configured = program(FAILING + "logging.basicConfig()\n" + WRITE)
    silenced = program(FAILING + "logging.getLogger('hygiene').addHandler(logging.NullHandler())\n" + WRITE)

    assert unset.startswith("hygiene: on_evict of registry")
    assert "ArithmeticError: broken" in unset
    assert "ERROR:hygiene:on_evict of registry" in configured
    assert 1 == configured.count("on_evict of registry")
    assert "" == silenced


@pytest.mark.slow
def test_an_application_under_plain_uvicorn_sees_them_as_well() -> None:
    """Plain uvicorn configures its own loggers only."""
    code = "import logging.config, uvicorn.config\nlogging.config.dictConfig(uvicorn.config.LOGGING_CONFIG)\n"

    assert "hygiene: on_evict of registry" in program(FAILING + code + WRITE)


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that the last-resort handler of a program without configured logging prints."""
    printed: list[str] = []
    last = logging.Handler(logging.WARNING)
    last.emit = lambda record: printed.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging, "lastResort", last)
    target = logging.Logger("alone")  # noqa: LOG001 - one without a parent: pytest has handlers at the root
    target.addFilter(Repeats())
    target.addFilter(LastResort())
    monkeypatch.setattr(logs, "_target", target)
    monkeypatch.setattr(logger, "_target", target)
    return printed


def test_without_configured_logging_lines_are_marked(unconfigured: list[str]) -> None:
    fail_in_a_hook()

    assert [
        "hygiene: on_evict of registry test raised for key 0; the entry is treated as if it had not been asked"
    ] == (unconfigured)


def test_without_configured_logging_an_event_is_printed_once_a_minute_for_each_object(unconfigured: list[str]) -> None:
    """Also an event that is no error of a hook: two registries that overflow again and again print two lines."""
    for name in ("one", "two"):
        registry: Registry[int, int] = Registry({0: 0}, maxsize=1, name=name)
        for n in range(1, 4):
            with registry.lease(0):
                registry[n] = n
                with registry.lease(n):
                    registry[-n] = n
            registry.trim(1)

    assert ["one", "two"] == [line.split()[2] for line in unconfigured]


def test_debug_and_info_are_not_printed(unconfigured: list[str]) -> None:
    logger.info("all is well with %s", "one")

    assert [] == unconfigured


def test_control_characters_do_not_reach_a_log(caplog: pytest.LogCaptureFixture) -> None:
    """Names and file names are chosen by other people: an escape sequence in one would change the terminal."""
    logger.warning("%s: %s of %s, %d", "a\x1b[2J\x9b", OSError("no\x07\nline"), Path("b\r"), 7)

    assert ["a\\x1b[2J\\x9b: no\\x07\nline of b\\r, 7"] == caplog.messages


@pytest.mark.slow
def test_how_a_process_ends_is_said_all_the_same() -> None:
    """Nobody can look at it later; and where logging is set up, it is said once."""
    code = "register_cleanup(fail, name='flush')\n"
    unset = program(FAILING + code)
    elsewhere = program(FAILING + "logging.basicConfig()\n" + code)
    own = program(FAILING + "logging.getLogger('hygiene').addHandler(logging.StreamHandler())\n" + code)
    unwanted = program(FAILING + "logging.getLogger('hygiene').addHandler(logging.NullHandler())\n" + code)

    assert 1 == unset.count("cleanup 'flush' failed")
    assert 1 == elsewhere.count("cleanup 'flush' failed")
    assert 1 == own.count("cleanup 'flush' failed")
    assert "" == unwanted


@pytest.mark.slow
def test_a_library_that_is_imported_again_says_the_same() -> None:
    """The logger outlives a reload: each filter is there once, and the last words are printed once."""
    again = """
    import importlib, logging, sys
    for name in [name for name in sys.modules if name.partition(".")[0] == "hygiene"]:
        {again}
    print(*map(len, (logging.getLogger("hygiene").handlers, logging.getLogger("hygiene").filters)), file=sys.stderr)
    """
    reloaded = again.format(again="if name in ('hygiene', 'hygiene.logs'): importlib.reload(sys.modules[name])")
    purged = again.format(again="del sys.modules[name]") + textwrap.indent(FAILING, "    ")

    for imported in (reloaded, purged):
        said = program(FAILING + textwrap.dedent(imported) + "register_cleanup(fail, name='flush')\n")
        assert 1 == said.count("cleanup 'flush' failed")
        assert "0 2" == said.splitlines()[0]


# What becomes of a line that cannot be logged


BROKEN = """
import logging, sys
from hygiene import Registry, register_cleanup
from hygiene.stores import SQLiteStore

class Context(logging.Filter):
    def filter(self, record):
        raise RuntimeError("working outside of request context")

def fail(removal): raise ArithmeticError("broken")

handler = logging.StreamHandler(sys.stdout)
handler.addFilter(Context())
logging.getLogger("hygiene").addHandler(handler)
"""


@pytest.mark.slow
def test_a_filter_that_raises_does_not_reach_who_writes() -> None:
    """The writer has done nothing wrong; what was to be said, and why it was not, is on stderr."""
    said = program(BROKEN + "r = Registry({1: 1}, maxsize=1, on_evict=fail)\nr[2] = 2\nassert r == {2: 2}")

    assert 1 == said.count("hygiene: a line could not be logged: %s of registry %s raised")
    assert "RuntimeError: working outside of request context" in said
    assert "ArithmeticError: broken" in said


@pytest.mark.slow
@pytest.mark.parametrize("error", ['RuntimeError("working outside of request context")', "SystemExit(1)"])
def test_a_filter_that_raises_does_not_stop_the_janitor(error: str) -> None:
    """Its thread serves no request, and does not end with the first error; what is due afterwards is done."""
    code = """
    class Charge:
        def __init__(self, visit): self._visit = visit
    from hygiene.janitor import janitor
    from threading import Event
    seen = Event()
    bad = Charge(lambda: fail(None))
    good = Charge(seen.set)
    janitor.watch(bad, 0)
    janitor.watch(good, 0.05)
    assert seen.wait(20)
    """
    broken = BROKEN.replace('RuntimeError("working outside of request context")', error)
    said = program(broken + textwrap.dedent(code))

    assert 1 == said.count("hygiene: a line could not be logged: the visit of")
    assert error.partition("(")[0] in said


@pytest.mark.slow
def test_a_filter_that_raises_does_not_stop_saving(tmp_path: Path) -> None:
    """An outage and its end are lines that cannot be logged, and everything is saved all the same."""
    code = f"""
    from hygiene.errors import StoreError
    class Away(SQLiteStore):
        times = 0
        def save(self, changes, *, sync=False):
            self.times += 1
            if self.times < 3:
                raise StoreError("away")
            return super().save(changes, sync=sync)
    store = Away({str(tmp_path / "chats.db")!r})
    r = Registry(maxsize=2, store=store, name="chats")
    for n in range(20): r[n] = [n]
    while True:
        try: r.flush(timeout=20)
        except StoreError: continue
        break
    assert store.times >= 3
    assert all(r[n] == [n] for n in range(20))
    r.close()
    store.close()
    """
    said = program(BROKEN + textwrap.dedent(code))

    assert "hygiene: a line could not be logged: write-behind" in said


@pytest.mark.slow
def test_nothing_is_said_where_logging_is_to_keep_quiet() -> None:
    """As with what a handler of Python's own catches: `logging.raiseExceptions` decides. Nor is stderr needed."""
    write = "r = Registry({1: 1}, maxsize=1, on_evict=fail)\nr[2] = 2\nassert r == {2: 2}"

    assert "" == program(BROKEN + "logging.raiseExceptions = False\n" + write)
    assert "" == program(BROKEN + "sys.stderr = None\n" + write)


def test_a_line_names_who_said_it(caplog: pytest.LogCaptureFixture) -> None:
    """The place in the code is that of the event, however many hands the line went through."""
    fail_in_a_hook(1)

    (record,) = caplog.records
    assert ("registry.py", "_hook_failed") == (record.filename, record.funcName)


# structlog


def test_structlog_renders_text_and_fields() -> None:
    """Through the standard library's handlers, with what its documentation shows."""
    handler = logging.StreamHandler()
    written: list[str] = []
    handler.emit = lambda record: written.append(handler.format(record))  # type: ignore[method-assign]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    log = logging.getLogger("hygiene")
    log.addHandler(handler)
    try:
        fail_in_a_hook()
    finally:
        log.removeHandler(handler)
    found = json.loads(written[0])
    found.pop("message", None)  # left on the record by another handler that was asked before

    assert "broken hook" in found.pop("exception")
    assert {
        "event": "on_evict of registry test raised for key 0; the entry is treated as if it had not been asked",
        "event_name": "registry.hook_failed",
        "registry": "test",
        "hook": "on_evict",
        "level": "error",
        "logger": "hygiene",
    } == found
