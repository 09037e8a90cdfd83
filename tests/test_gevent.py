"""gevent replaces locks and threads after the registry was made: nothing hangs, and nothing is lost."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hygiene import Registry
from hygiene.janitor import Janitor, renew_locks
from hygiene.stores import SQLiteStore
from hygiene.writebehind import WriteBehind

PATIENCE = 60.0

# What is loaded before the patch; then, in the process that is patched, thirty greenlets that save.
PROGRAM = """
import logging, os, sys, threading, time
logging.basicConfig()
from hygiene import Registry, bounded_registry, register_cleanup
from hygiene.cleanup import relieve
from hygiene.stores import SQLiteStore

file, when = sys.argv[1:]
url = "sqlite:" + file
gone = []
chats = Registry(maxsize=50, store=url, name="chats")
short = Registry(maxsize=50, ttl=0.3, name="short", on_evict=lambda removal: gone.append(removal.key))

@bounded_registry("logs", "states", maxsize=10, idle="1h", store=url, name="pair")
class Pair:
    def __init__(self):
        self.logs = {}
        self.states = {}

pair = Pair()
if "used" in when:
    chats.setdefault("before", []).append("loaded")
    short["before"] = 1
    pair.logs["before"] = ["loaded"]
if "fork" in when and os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
if "changed" in when:
    chats.setdefault("between", []).append("fork and patch")

from gevent import monkey
monkey.patch_all()
import gevent

def request(number):
    for turn in range(5):
        chats.setdefault(number, []).append(turn)
        chats.flush()
        pair.logs[number], pair.states[number] = [turn], {"turn": turn}
        with chats.lease(number) as chat:
            gevent.sleep(0)
            chat.append("leased")

greenlets = [gevent.spawn(request, number) for number in range(30)]
gevent.joinall(greenlets, timeout=30)
assert all(greenlet.successful() for greenlet in greenlets), [greenlet.exception for greenlet in greenlets]

turns = 0
def turn():
    global turns
    while True:
        gevent.sleep(0.01)
        turns += 1
gevent.spawn(turn)
short["after"] = 1
while "after" not in gone:
    gevent.sleep(0.01)
assert turns > 5, turns  # the thread that waits for the end of an entry has stopped nobody
register_cleanup(gevent.sleep, 0, on="pressure")
relieve()

for one in (chats, pair.logs, pair.states):
    one.close()
with SQLiteStore(file) as store:
    logs = dict(store.items("chats"))
    whole = [entry for turn in range(5) for entry in (turn, "leased")]
    assert all(logs[number] == whole for number in range(30)), logs
    assert ("changed" in when) == (logs.get("between") == ["fork and patch"])
    assert all(dict(store.items("pair.states"))[number] == {"turn": 4} for number in range(30))
print("right", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed here")
@pytest.mark.skipif(sys.platform == "win32", reason="fork")
@pytest.mark.parametrize("when", ["loaded", "used", "loaded fork", "used fork", "used fork changed", "loaded changed"])
def test_a_program_that_is_patched_late_works(tmp_path: Path, when: str, elsewhere: Callable[..., Any]) -> None:
    """Loaded, used, forked, changed: whatever came before the patch, as with ``gunicorn -k gevent --preload``."""
    process = elsewhere(f"import warnings; warnings.simplefilter('ignore')\n{PROGRAM}", tmp_path / "chats.db", when)
    out = process.communicate(timeout=PATIENCE)[0]

    assert ("right\n", 0) == (out, process.returncode)


# Without gevent: the same renewal, among ordinary threads.


def test_what_was_pending_is_saved_by_the_new_thread(tmp_path: Path) -> None:
    with Registry[str, Any](maxsize=10, store=f"sqlite:{tmp_path / 'chats.db'}", name="chats") as chats:
        chats["a"] = 1
        writer = chats._keeper.writer  # type: ignore[union-attr]
        thread, lock = writer._thread, writer._lock
        renew_locks()
        chats["b"] = 2
        chats.flush()

        assert writer._thread is not thread
        assert writer._lock is not lock
        assert {"a": 1, "b": 2} == dict(chats._keeper.store.items("chats"))  # type: ignore[union-attr]


def test_a_save_that_is_under_way_ends_before_its_locks_are_replaced(tmp_path: Path) -> None:
    """Or two threads would save the same changes."""
    with SQLiteStore(tmp_path / "chats.db") as store, WriteBehind(store, every=1) as writer:
        for number in range(50):
            writer.append("log", number)
            renew_locks()
        writer.flush()

        assert list(range(50)) == store.load("default", "log").value  # type: ignore[union-attr]
        assert 50 == writer.stats().saved


def test_the_janitor_goes_on_with_what_it_watches() -> None:
    visited = threading.Event()

    class Charge:
        def _visit(self) -> None:
            visited.set()

    mine, late, charge = Janitor(), Charge(), Charge()
    mine.watch(late, 3600.0)
    before = mine._thread
    mine._renew_locks()
    mine.watch(charge, 0.0)

    assert visited.wait(PATIENCE)
    assert before is not None
    assert mine._thread not in {before, None}
    before.join(PATIENCE)
    assert not before.is_alive()
