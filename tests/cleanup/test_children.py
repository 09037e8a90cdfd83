"""Children of multiprocessing, and forked ones: what a child has changed is saved at its end, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hygiene import Registry, register_cleanup
from hygiene.stores import SQLiteStore
from hygiene.writebehind import WriteBehind

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork, and signals of POSIX")

PATIENCE = 60.0

METHODS = ["fork", "forkserver", "spawn"]
START = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"

Run = Callable[..., tuple[dict[str, dict[Any, Any]], list[str]]]

# `PARENT` is what the parent has loaded and changed when the child begins; each function is a child.
PROGRAM = """
import asyncio, concurrent.futures, inspect, multiprocessing, os, sys, threading, time
from hygiene import History, Registry, bounded_registry, register_cleanup, shutdown
from hygiene.stores import open_store
from hygiene.writebehind import WriteBehind

inspect.unwrap(WriteBehind.__init__).__kwdefaults__["interval"] = 3600.0
ADDRESS = "sqlite:" + sys.argv[1]

@bounded_registry("chats", "settings", maxsize=100, store=ADDRESS, name="linked")
class Linked:
    def __init__(self):
        self.chats = {}
        self.settings = {}

if sys.argv[4:] == ["preload"] or __name__ == "__main__":
    chats = Registry(maxsize=100, store=ADDRESS, name="chats")
    linked = Linked()

if __name__ == "__main__":
    chats["parent"] = {"n": 1}
    chats["shared"] = {"n": 1}
    chats["log"] = ["parent"]
    chats["both"] = ["parent"]
    chats.flush()
    chats["parent"]["n"] = 2  # found at the parent's flush, and not the child's to save
    chats["both"].append("late")  # the same
    register_cleanup(print, "cleanup of the parent")

def own():
    mine = Registry(maxsize=100, store=ADDRESS, name="own")
    mine["value"] = {"n": 1}
    mine["value"]["n"] = 2
    mine.setdefault("log", []).append("x")
    mine["history"] = History(["a"], maxlen=3)
    mine["history"].append("b")
    alone = WriteBehind(open_store(ADDRESS), space="alone")
    alone.put("value", 1)
    alone.append("log", "x")
    register_cleanup(print, "cleanup of the child")
    globals().update(kept=(mine, alone))

def inherited():
    chats["shared"]["n"] = 2
    chats["log"].append("child")
    chats["new"] = [1]
    linked.chats["ann"] = ["x"]
    linked.settings["ann"] = {"n": 1}
    linked.settings["ann"]["n"] = 2

def inplace():
    chats["shared"]["n"] = 2

def threads():
    mine = Registry(maxsize=100, store=ADDRESS, name="own")
    mine["log"] = []
    gate = threading.Event()
    def late():
        gate.wait(20)
        mine["log"].append("late")
    pool = concurrent.futures.ThreadPoolExecutor()
    pool.submit(time.sleep, 0)
    threading.Thread(target=late).start()
    threading.Timer(0.3, gate.set).start()
    globals().update(kept=(mine, pool))

def task():
    async def main():
        mine = Registry(maxsize=100, store=ADDRESS, name="own")
        async with mine.lease("log", create=list) as log:
            log.append("x")
        mine["log"].append("y")
        globals().update(kept=mine)
    asyncio.run(main())

def raises():
    own()
    raise SystemExit(3)

def one(number):
    mine = globals().get("mine") or Registry(maxsize=100, store=ADDRESS, name=f"own {os.getpid()}")
    globals()["mine"] = mine
    mine[number] = [number]
    return number

if __name__ == "__main__":
    method, what = sys.argv[2:4]
    context = multiprocessing.get_context(method) if method != "bare" else None
    if what == "executor":
        with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
            assert [0, 1, 2, 3] == list(pool.map(one, range(4)))
    elif what == "pool":
        pool = context.Pool(2, maxtasksperchild=2)
        assert [0, 1, 2, 3] == pool.map(one, range(4), chunksize=1)
        pool.close()
        pool.join()
    elif method == "bare":
        if os.fork() == 0:
            globals()[what]()
            sys.exit(0)
        os.wait()
    else:
        process = context.Process(target=globals()[what])
        process.start()
        process.join(40)
        print("exit code", process.exitcode, flush=True)
    os._exit(0)  # what the parent has not saved is not to be mistaken for what the child has
"""


@pytest.fixture
def run(tmp_path: Path, elsewhere: Callable[..., Any]) -> Run:
    """Runs a child; gives what is stored by space, and the lines that were printed."""
    script, file = tmp_path / "program.py", tmp_path / "chats.db"
    script.write_text(PROGRAM)

    def start(method: str, what: str, *options: str) -> tuple[dict[str, dict[Any, Any]], list[str]]:
        process = elsewhere(START, script, file, method, what, *options, cwd=tmp_path)
        out = process.communicate(timeout=PATIENCE)[0]

        assert 0 == process.returncode
        with SQLiteStore(file) as store:
            return {space: dict(store.items(space)) for space in store.spaces()}, out.splitlines()

    return start


OF_THE_PARENT = {"parent": {"n": 1}, "shared": {"n": 1}, "log": ["parent"], "both": ["parent"]}
OWN = {"value": {"n": 2}, "log": ["x"], "history": ["a", "b"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "bare"])
def test_a_child_saves_what_it_has_changed_in_what_it_has_made(run: Run, method: str) -> None:
    """However it was started: values, edits in place, lists, histories, and a write-behind alone."""
    stored, lines = run(method, "own")

    assert (OWN, {"value": 1, "log": ["x"]}) == (stored["own"], stored["alone"])
    assert OF_THE_PARENT == stored["chats"]
    assert ["cleanup of the child"] == [line for line in lines if line.startswith("cleanup")]
    assert method == "bare" or "exit code 0" in lines


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "bare"])
def test_a_child_saves_its_changes_of_what_its_module_has_made(run: Run, method: str) -> None:
    """What the parent had unsaved at the fork is not among them."""
    stored, lines = run(method, "inherited", "preload")

    assert OF_THE_PARENT | {"shared": {"n": 2}, "log": ["parent", "child"], "new": [1]} == stored["chats"]
    assert ({"ann": ["x"]}, {"ann": {"n": 2}}) == (stored["linked.chats"], stored["linked.settings"])
    assert [] == [line for line in lines if line.startswith("cleanup")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "bare"])
def test_an_edit_in_place_alone_is_found(run: Run, method: str) -> None:
    """No write has told that the child changed anything."""
    stored, _ = run(method, "inplace")

    assert OF_THE_PARENT | {"shared": {"n": 2}} == stored["chats"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_threads_of_a_child_end_before_its_registries_are_closed(run: Run, method: str) -> None:
    """As at the exit of an interpreter, which waits for them first."""
    stored, lines = run(method, "threads")

    assert (["late"], True) == (stored["own"]["log"], "exit code 0" in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_child_that_runs_an_event_loop_saves(run: Run, method: str) -> None:
    stored, _ = run(method, "task")

    assert {"log": ["x", "y"]} == stored["own"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_child_that_exits_with_a_code_saves_and_keeps_the_code(run: Run, method: str) -> None:
    stored, lines = run(method, "raises")

    assert (OWN, True) == (stored["own"], "exit code 3" in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["executor", "pool"])
def test_workers_of_a_pool_save_when_they_end(run: Run, method: str, what: str) -> None:
    """Of `ProcessPoolExecutor`, and of `Pool` with ``maxtasksperchild``."""
    stored, _ = run(method, what)
    found = {
        key: value for space, entries in stored.items() if space.startswith("own") for key, value in entries.items()
    }

    assert {n: [n] for n in range(4)} == found


def test_a_forked_child_saves_its_changes_at_its_end(tmp_path: Path) -> None:
    """The parent's unsaved changes stay the parent's, and so do its cleanups."""
    context, said = multiprocessing.get_context("fork"), tmp_path / "said"
    with Registry[str, Any](maxsize=10, store=f"sqlite:{tmp_path / 'chats.db'}", name="chats") as chats:
        chats["a"], chats["b"] = {"n": 1}, ["one"]
        chats.flush()
        chats["parent"] = 1
        handle = register_cleanup(said.touch)

        def child() -> None:
            chats["a"]["n"] = 2
            chats["b"].append("two")

        process = context.Process(target=child)
        process.start()
        process.join(PATIENCE)
        handle.cancel()

        assert (0, False) == (process.exitcode, said.exists())
        assert {"a": {"n": 2}, "b": ["one", "two"]} == dict(chats._keeper.store.items("chats"))  # type: ignore[union-attr]


def test_inherited_values_stay_open_at_the_end_of_a_forked_child(tmp_path: Path) -> None:
    """To close them may say goodbye to a server that the parent still talks to."""
    closed = tmp_path / "closed"

    class Client:
        def close(self) -> None:
            closed.write_text(f"{closed.read_text() if closed.exists() else ''}x")

    clients = Registry[str, Client](maxsize=10, close="close", name="clients")
    clients["parent"] = Client()

    def child() -> None:
        clients["child"] = Client()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(PATIENCE)

    assert (0, False) == (process.exitcode, closed.exists())
    clients.close()
    assert "x" == closed.read_text()


class Stuck(SQLiteStore):
    """A store that hangs in the process that is not its maker's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.maker = os.getpid()

    def save(self, *args: Any, **options: Any) -> Any:
        if os.getpid() != self.maker:
            threading.Event().wait()
        return super().save(*args, **options)


@pytest.mark.slow
def test_the_end_of_a_child_is_bounded_in_time(tmp_path: Path) -> None:
    """A store that hangs holds it for the ten seconds of the exit, and not longer."""
    with Stuck(tmp_path / "chats.db") as store:
        writer = WriteBehind(store)

        def child() -> None:
            writer.put("a", 1)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(PATIENCE)

        assert 0 == process.exitcode
        writer.close()
