"""Several processes on one file: killed, forked, or at the same time."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hygiene.errors import StoreError, StoreUnavailable
from hygiene.stores import Delete, SaveLog, SaveValue, SQLiteStore
from hygiene.testing import ManualClock

PATIENCE = 20.0

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

InChild = Callable[[Callable[[], object]], int]


def value_of(store: SQLiteStore, key: Any) -> Any:
    record = store.load("s", key)
    return None if record is None else record.value


# Forks a writer, reads what it acknowledges, and kills it after a random number of acknowledgements and a random while.
KILLER = """
import os, random, select, signal, sys
from hygiene.stores import *

path, rounds = sys.argv[1], int(sys.argv[2])
chance = random.Random(int(sys.argv[3]))

def write(acknowledge, beginning):
    with SQLiteStore(path, check=False) as store:
        store._writer.execute("PRAGMA wal_autocheckpoint = 8")  # so that some are killed during a checkpoint
        n = beginning
        while True:
            batch = chance.choice([1, 1, 5, 50])
            items = [store.encode([n + i, "x" * chance.choice([5, 200, 3000])]) for i in range(batch)]
            changes = [SaveLog("s", "log", None, items), SaveValue("s", "last", store.encode(n + batch))]
            if n % 7 == 0:
                changes.append(SaveLog("s", "window", None, items, drop=[(0, max(n - 60, 0))]))
            if n % 11 == 0:
                changes += [Delete("s", "flicker"), SaveValue("s", "flicker", store.encode("y" * 5000))]
            store.save(changes, sync=n % 5 == 0)
            n += batch
            os.write(acknowledge, b"%d\\n" % n)

known = 0
for round in range(rounds):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        chance.seed(round)
        os.close(reading)
        write(writing, known)
    os.close(writing)
    acknowledged = open(reading, "rb")
    for _ in range(chance.randrange(12)):
        known = int(acknowledged.readline())
    select.select([], [], [], chance.random() * 0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    known = max([known, *map(int, acknowledged.read().split())])
    acknowledged.close()
    with SQLiteStore(path) as store:
        assert store.report.clean, store.report
        record = store.load("s", "log")
        numbers = [] if record is None else [n for n, _ in record.value]
        assert numbers == list(range(len(numbers))), "a gap, or out of order"
        # One save may have been finished and not have been acknowledged.
        assert known <= len(numbers) <= known + 50, (known, len(numbers))
        last = store.load("s", "last")
        assert (0 if last is None else last.value) == len(numbers), "half a batch"
        known = len(numbers)
print("survived", rounds)
"""


@pytest.mark.slow
@needs_fork
def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(path: Path, elsewhere: Callable[..., Any]) -> None:
    """60 times at random moments, some of them in a checkpoint: all there, in order, no gap, no half batch."""
    process = elsewhere(KILLER, path, 60, int.from_bytes(os.urandom(2)))
    output, _ = process.communicate(timeout=50)

    assert (0, "survived 60\n") == (process.returncode, output)


COUNTER = """
import sys
from hygiene.errors import VersionConflict
from hygiene.stores import *

with open_store("sqlite:" + sys.argv[1], timeout=40, check=False) as store:
    sys.stdin.readline()
    for _ in range(int(sys.argv[2])):
        while True:
            record = store.load("s", "n")
            base, n = (0, 0) if record is None else (record.head.version, record.value)
            try:
                store.save([SaveValue("s", "n", store.encode(n + 1), base)])
            except VersionConflict:
                continue
            break
"""


@pytest.mark.slow
def test_four_processes_that_count_together_lose_nothing(path: Path, elsewhere: Callable[..., Any]) -> None:
    """500 times each with compare and set: 2,000. They make the file together, too: whoever comes first."""
    processes = [elsewhere(COUNTER, path, 500) for _ in range(4)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    codes = [(process.communicate(timeout=50), process.returncode)[1] for process in processes]

    assert [0] * 4 == codes
    with SQLiteStore(path) as store:
        assert 2000 == value_of(store, "n")
        assert store.report.clean
    assert [path] == list(path.parent.iterdir())


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
connection.close()
"""


def test_a_locked_file_is_waited_for_and_then_unavailable(path: Path, elsewhere: Callable[..., Any]) -> None:
    """Nothing was changed, readers go on, and the same save succeeds when the other process is done."""
    with SQLiteStore(path, timeout="20ms") as store:
        store.save([SaveValue("s", "a", store.encode(1))])
        holder = elsewhere(HOLDER, path)
        assert holder.stdout.readline() == "held\n"
        change = SaveLog("s", "b", 0, [store.encode(2)])
        for sync in (False, True):
            with pytest.raises(StoreUnavailable, match=r"another process holds it for long.*SQLITE_BUSY"):
                store.save([change], sync=sync)
        assert 1 == value_of(store, "a")
        assert store.load("s", "b") is None
        holder.communicate("\n", timeout=PATIENCE)
        store.save([change])

        assert [2] == value_of(store, "b")


@needs_fork
def test_a_child_opens_its_own_and_both_go_on(path: Path, in_child: InChild) -> None:
    with SQLiteStore(path) as store:
        store.save([SaveLog("s", "a", 0, [store.encode(1)])])
        store.load("s", "a")

        def go_on() -> None:
            assert [1] == value_of(store, "a")
            store.save([SaveLog("s", "a", 1, [store.encode(2)])])
            store.close()

        assert 0 == in_child(go_on)
        assert [1, 2] == value_of(store, "a")
        store.save([SaveLog("s", "a", 2, [store.encode(3)])])
    with SQLiteStore(path) as store:
        assert [1, 2, 3] == value_of(store, "a")


@needs_fork
def test_a_parent_that_closes_takes_nothing_from_its_child(path: Path) -> None:
    """With connections that were open across the fork the log is deleted under the child's feet."""
    store = SQLiteStore(path)
    store.save([SaveLog("s", "a", 0, [store.encode(1)])])
    go_reading, go_writing = os.pipe()
    done_reading, done_writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            store.save([SaveLog("s", "a", 1, [store.encode(2)])])
            os.write(done_writing, b"2")
            os.read(go_reading, 1)
            store.save([SaveLog("s", "a", 2, [store.encode(3)])])
            status = 0
        finally:
            os._exit(status)  # killed, as it were: nothing is closed
    assert os.read(done_reading, 1) == b"2"
    store.close()
    os.write(go_writing, b"3")
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for end in (go_reading, go_writing, done_reading, done_writing):
        os.close(end)
    with SQLiteStore(path) as store:
        assert [1, 2, 3] == value_of(store, "a")
        assert store.report.clean


@pytest.mark.slow
@needs_fork
def test_a_fork_waits_for_threads_that_read_and_write(path: Path, in_child: InChild) -> None:
    """None of them notices, and each child finds a store that works."""
    with SQLiteStore(path) as store:
        store.save([SaveLog("s", "a", 0)])
        stop, problems = threading.Event(), []

        def work(use: Callable[[], Any]) -> None:
            try:
                while not stop.is_set():
                    use()
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                problems.append(error)

        uses = [lambda: store.load("s", "a"), lambda: store.save([SaveLog("s", "a", None, [store.encode(0)])])]
        threads = [threading.Thread(target=work, args=(use,)) for use in uses * 2]
        for thread in threads:
            thread.start()
        codes = [in_child(lambda: store.save([SaveLog("s", "child", None, [store.encode(1)])])) for _ in range(10)]
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)

        assert ([], [0] * 10) == (problems, codes)
        assert [1] * 10 == value_of(store, "child")
        assert store.recover().clean


@needs_fork
def test_a_child_that_was_forked_in_the_middle_of_a_save_is_told(path: Path, in_child: InChild) -> None:
    """The fork cannot wait for ever, and a connection in the middle of something cannot be closed for the child."""
    with SQLiteStore(path, timeout=0.01) as store:
        inside, go = threading.Event(), threading.Event()

        def save() -> None:
            with store._writing("save to") as connection:
                connection.execute("INSERT INTO quarantine (problem) VALUES ('test')")
                inside.set()
                assert go.wait(PATIENCE)

        thread = threading.Thread(target=save)
        thread.start()
        assert inside.wait(PATIENCE)

        def look() -> None:
            for use in (lambda: store.load("s", "a"), lambda: store.save([Delete("s", "a")])):
                with pytest.raises(StoreError, match="in use by another thread when this process was forked"):
                    use()
            with SQLiteStore(path.parent / "another.db") as another:
                another.save([SaveValue("s", "a", another.encode(1))])

        code = in_child(look)
        go.set()
        thread.join(PATIENCE)

        assert 0 == code
        assert ["test"] == [row.problem for row in store.quarantine()]


@needs_fork
def test_a_store_in_memory_is_copied_by_a_fork(clock: ManualClock, in_child: InChild) -> None:
    with SQLiteStore(":memory:") as store:
        store.save([SaveValue("s", "a", store.encode(1))])

        def go_on() -> None:
            assert 1 == value_of(store, "a")
            store.save([SaveValue("s", "a", store.encode(2), 1)])
            assert 2 == value_of(store, "a")

        assert 0 == in_child(go_on)
        assert 1 == value_of(store, "a")


def test_two_stores_on_one_file_see_each_other(path: Path) -> None:
    with SQLiteStore(path) as one, SQLiteStore(path) as other:
        one.save([SaveLog("s", "a", 0, [one.encode(1)])])
        other.save([SaveLog("s", "a", 1, [other.encode(2)]), SaveValue("t", "b", other.encode(3))])

        assert [1, 2] == value_of(one, "a")
        assert ["s", "t"] == one.spaces()
        one.close()
        assert [1, 2] == value_of(other, "a")
        other.save([SaveLog("s", "a", 2, [other.encode(3)])])
    with SQLiteStore(path) as store:
        assert [1, 2, 3] == value_of(store, "a")


@pytest.mark.slow
def test_a_process_that_is_terminated_loses_nothing(path: Path, elsewhere: Callable[..., Any]) -> None:
    """SIGTERM without a handler is a crash like any other: what was acknowledged is there."""
    code = """
import sys
from hygiene.stores import *
store = SQLiteStore(sys.argv[1])
store.save([SaveValue("s", "a", store.encode(1))])
print("saved", flush=True)
sys.stdin.readline()
"""
    process = elsewhere(code, path)
    assert process.stdout.readline() == "saved\n"
    process.terminate()
    process.communicate(timeout=PATIENCE)

    assert -signal.SIGTERM == process.returncode
    with SQLiteStore(path) as store:
        assert 1 == value_of(store, "a")


@pytest.mark.slow
def test_what_was_synced_is_on_disk_before_the_call_returns(path: Path, elsewhere: Callable[..., Any]) -> None:
    """Looked at from outside: after the write to the log comes an fsync of it, and only then the acknowledgement."""
    strace = next((p for p in ("/usr/bin/strace", "/bin/strace") if os.access(p, os.X_OK)), None)
    if strace is None:
        pytest.skip("needs strace")
    code = """
import os, sys
from hygiene.stores import *
store = SQLiteStore(sys.argv[1])
def mark(text): os.write(2, text)
store.save([SaveValue("s", "a", store.encode(0))])  # the first one of a log syncs its header
mark(b"MARK plain\\n"); store.save([SaveValue("s", "a", store.encode(1))])
mark(b"MARK synced\\n"); store.save([SaveValue("s", "a", store.encode(2))], sync=True)
mark(b"MARK empty\\n"); store.save([], sync=True)
mark(b"MARK plain again\\n"); store.save([SaveValue("s", "a", store.encode(3))])
mark(b"MARK end\\n"); store.close()
"""
    trace = path.parent / "trace"
    calls = "trace=pwrite64,write,fsync,fdatasync"
    command = (strace, "-f", "-y", "-e", calls, "-o", trace, sys.executable, "-W", "error", "-c", code, path)
    process = elsewhere("import os, sys; os.execv(sys.argv[1], sys.argv[1:])", *command)
    process.communicate(timeout=PATIENCE)
    if process.returncode and "MARK" not in trace.read_text():
        pytest.skip("strace may not trace here")

    assert 0 == process.returncode
    parts: dict[str, list[str]] = {}
    part = "opening"
    for line in trace.read_text().splitlines():
        if "MARK" in line:
            part = line.split("MARK ")[1].split("\\n")[0]
        elif "-wal>" in line:
            parts.setdefault(part, []).append("sync" if "sync(" in line else "write")

    assert {"write"} == set(parts["plain"]) == set(parts["plain again"])
    assert ("sync", "sync") == (parts["synced"][-1], parts["empty"][-1])


def test_a_reader_that_stays_does_not_keep_a_save_out(path: Path) -> None:
    """As a backup or a shell does: it sees its moment, and the saves go on."""
    with SQLiteStore(path, timeout=0.01) as store:
        store.save([SaveValue("s", "a", store.encode(1))])
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        assert (1,) == reader.execute("SELECT count(*) FROM heads").fetchone()
        for n in range(20):
            store.save([SaveValue("s", n, store.encode(n))], sync=n % 5 == 0)
        assert (1,) == reader.execute("SELECT count(*) FROM heads").fetchone()
        reader.close()

        assert 21 == store.count("s")
