"""Killed, forked, at the exit: what was acknowledged is there, and nothing twice."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hygiene.stores import SQLiteStore
from hygiene.writebehind import WriteBehind

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

InChild = Callable[[Callable[[], object]], int]

# Forks a writer, reads what it acknowledges, and kills it after a random number of acknowledgements and a random while.
KILLER = """
import os, random, select, sys
from hygiene.stores import SQLiteStore
from hygiene.writebehind import WriteBehind

path, rounds = sys.argv[1], int(sys.argv[2])
chance = random.Random(int(sys.argv[3]))

def write(acknowledge, n, last):
    store = SQLiteStore(path, check=False)
    writer = WriteBehind(store, every=5, interval=0.002, critical=lambda key, item: key == "log" and item % 13 == 0)
    while True:
        for _ in range(chance.choice([1, 1, 3, 20])):
            writer.append("log", n)
            writer.put("last", n)
            n += 1
            if (n - 1) % 13 == 0:
                os.write(acknowledge, b"%d 0\\n" % n)  # a critical item alone
        writer.flush()
        os.write(acknowledge, b"%d %d\\n" % (n, n))

known = last = 0
for round in range(rounds):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        chance.seed(round)
        os.close(reading)
        write(writing, known, last)
    os.close(writing)
    text = b""
    for _ in range(chance.randrange(12)):
        text += os.read(reading, 64)
    select.select([], [], [], chance.random() * 0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    while data := os.read(reading, 65536):
        text += data
    os.close(reading)
    for line in text.splitlines():
        number, flushed = map(int, line.split())
        known, last = max(known, number), max(last, flushed)
    with SQLiteStore(path) as store:
        assert store.report.clean, store.report
        record = store.load("default", "log")
        numbers = [] if record is None else record.value
        assert numbers == list(range(len(numbers))), "a gap, twice, or out of order"
        assert known <= len(numbers), (known, len(numbers))
        value = store.load("default", "last")
        assert last <= (0 if value is None else value.value + 1), (last, value)
        known = len(numbers)
print("survived", rounds)
"""


@pytest.mark.slow
@needs_fork
def test_nothing_acknowledged_is_lost_when_the_process_is_killed(path: Path, elsewhere: Callable[..., Any]) -> None:
    """60 times at random moments: each flush and each critical item is there, in order, and nothing twice."""
    process = elsewhere(KILLER, path, 60, int.from_bytes(os.urandom(2)))
    output, _ = process.communicate(timeout=50)

    assert (0, "survived 60\n") == (process.returncode, output)


LEAVER = """
import sys
from hygiene.stores import SQLiteStore
from hygiene.writebehind import WriteBehind

store = SQLiteStore(sys.argv[1])
writer = WriteBehind(store)
for n in range(20):
    writer.append("log", n)
__builtins__.kept = store, writer  # until the very end
import warnings; warnings.simplefilter("ignore")
"""


@pytest.mark.slow
def test_the_exit_of_the_interpreter_saves_what_is_pending(path: Path, elsewhere: Callable[..., Any]) -> None:
    """Nobody has to close anything, where the process ends by itself."""
    process = elsewhere(LEAVER, path)
    process.communicate(timeout=50)
    with SQLiteStore(path) as store:
        record = store.load("default", "log")

    assert (0, list(range(20))) == (process.returncode, record.value if record else None)


@needs_fork
def test_a_forked_child_has_nothing_pending(path: Path, in_child: InChild) -> None:
    """The parent saves its own; what the child changes then, the child saves."""
    with SQLiteStore(path) as store, WriteBehind(store, interval="1h") as writer:
        writer.append("log", "parent")
        writer.put("a", 1)

        def child() -> None:
            assert (0, 0) == (len(writer), writer.stats().changes)
            assert "a" not in writer
            writer.flush()
            writer.append("log", "child")
            writer.close()

        status = in_child(child)
        writer.flush()
        record = store.load("default", "log")

    assert (0, ["child", "parent"]) == (status, record.value if record else None)


@needs_fork
def test_a_fork_during_a_save_saves_once(store: Any, in_child: InChild) -> None:
    """Not in the child, too."""
    with WriteBehind(store, every=1) as writer:
        store.gate.clear()
        writer.append("log", 1)
        store.begun()

        def child() -> None:
            store.gate.set()
            writer.flush()
            writer.put("a", 1)
            writer.flush()

        status = in_child(child)
        store.gate.set()
        writer.flush()

        assert (0, [1], 1) == (status, store.value("log"), store.value("a"))
