"""A program that SIGTERM would end without a save is told so once, after five seconds of unsaved changes."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hygiene import writebehind
from hygiene.stores import SQLiteStore
from hygiene.writebehind import WriteBehind

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

PATIENCE = 30.0
EVENT = "store.sigterm_unhandled"

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """The warnings of a process that has not been warned, and whose SIGTERM has its default action."""
    monkeypatch.setattr(writebehind, "_warned_of_sigterm", None)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record) if record.event_name == EVENT else None  # type: ignore[attr-defined,func-returns-value,method-assign]
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("hygiene").addHandler(handler)
    yield records
    logging.getLogger("hygiene").removeHandler(handler)
    signal.signal(signal.SIGTERM, before)


def save(store: Any, **options: Any) -> None:
    """Have the writer thread save one change, and wait until that thread has ended."""
    writer = WriteBehind(store, **{"interval": "1ms", **options})
    writer.put("a", 1)
    thread = writer._thread
    assert thread is not None
    store.begun()
    writer.close()
    thread.join(PATIENCE)

    assert not thread.is_alive()


def test_the_first_save_by_the_interval_warns_that_sigterm_loses_changes(store: Any, warnings: Any) -> None:
    save(store, name="chats")

    assert ["WARNING"] == [one.levelname for one in warnings]
    assert "chats" == warnings[0].saver
    assert "hygiene.install_signal_handlers()" in warnings[0].getMessage()


def test_one_process_warns_once(store: Any, warnings: Any) -> None:
    save(store)
    save(store, space="other")

    assert 1 == len(warnings)


def test_sigterm_ignore_turns_the_warning_off(store: Any, warnings: Any) -> None:
    save(store, sigterm="ignore")

    assert [] == warnings


def test_a_handler_of_any_kind_is_enough(store: Any, warnings: Any) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    save(store)

    assert [] == warnings


def test_a_save_that_the_number_of_changes_caused_does_not_check(store: Any, warnings: Any) -> None:
    """A server installs its handlers after it has opened its stores, and may have filled them at the start."""
    save(store, every=1, interval="1h")

    assert [] == warnings


@pytest.mark.parametrize("package", ["multiprocessing", "billiard"])
def test_a_child_of_multiprocessing_is_not_warned(
    package: str, store: Any, warnings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent ends it, and SIGTERM is what `Process.terminate` sends."""
    child = SimpleNamespace(current_process=lambda: SimpleNamespace(name="Process-1"))
    monkeypatch.setitem(sys.modules, f"{package}.process", child)
    save(store)

    assert [] == warnings


def test_a_program_that_waits_for_the_signal_is_not_warned(store: Any, warnings: Any) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        save(store)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    assert [] == warnings


@pytest.mark.parametrize("wrong", ["raise", None, True, ""])
def test_anything_else_is_refused(store: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match='`sigterm` must be "warn" or "ignore", got'):
        WriteBehind(store, sigterm=wrong)


# Prints a line when it has 30 unsaved conversations, and one when the warning comes.
BOT = """
import inspect, logging, sys, threading
import hygiene
from hygiene import bounded_registry
from hygiene.writebehind import WriteBehind

path, how = sys.argv[1:]
inspect.unwrap(WriteBehind.__init__).__kwdefaults__["interval"] = 3600.0 if how == "handlers" else 0.2

@bounded_registry("conversations", maxsize=1000, store="sqlite:" + path, name="conversations")
class Bot:
    def __init__(self):
        self.conversations = {}

warned = threading.Event()
handler = logging.Handler()
handler.emit = lambda record: record.event_name == "store.sigterm_unhandled" and warned.set()
logging.getLogger("hygiene").addHandler(handler)
if how == "handlers":
    hygiene.install_signal_handlers()
bot = Bot()
for number in range(30):
    bot.conversations.setdefault(f"u{number}", []).append("hello")
if how == "plain":
    print(warned.wait(20), flush=True)
else:
    print("ready", flush=True)
threading.Event().wait(60)
"""


@pytest.mark.slow
def test_with_handlers_sigterm_loses_nothing(path: Path, elsewhere: Start) -> None:
    process = elsewhere(BOT, path, "handlers")
    assert "ready\n" == process.stdout.readline()  # type: ignore[union-attr]
    process.terminate()

    assert 143 == process.wait(PATIENCE)
    with SQLiteStore(path) as store:
        assert 30 == sum(1 for _ in store.keys("conversations"))


@pytest.mark.slow
def test_without_handlers_the_program_says_so_before_it_is_stopped(path: Path, elsewhere: Start) -> None:
    process = elsewhere(BOT, path, "plain")

    assert "True\n" == process.stdout.readline()  # type: ignore[union-attr]
    process.terminate()
    assert -signal.SIGTERM == process.wait(PATIENCE)
