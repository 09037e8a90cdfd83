"""Time limits: nothing is returned after its time, and what is over leaves memory without a reader."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from hygiene.events import Cause, Entry
from hygiene.registry import Registry
from hygiene.testing import ManualClock

PATIENCE = 20.0

LOOKUPS: dict[str, Callable[[Any], Any]] = {
    "[]": lambda r: r["a"] if "a" in dict.keys(r) and not r.touch("b") and r.get("a") is not None else None,
    "get": lambda r: r.get("a"),
    "peek": lambda r: r.peek("a"),
    "in": lambda r: ("a" in r) or None,
    "setdefault": lambda r: r.setdefault("a", None),
    "pop": lambda r: r.pop("a", None),
    "iteration": lambda r: list(r) or None,
    "reversed": lambda r: list(reversed(r)) or None,
    "keys": lambda r: list(r.keys()) or None,
    "values": lambda r: list(r.values()) or None,
    "items": lambda r: list(r.items()) or None,
    "in items": lambda r: (("a", 1) in r.items()) or None,
    "in values": lambda r: (1 in r.values()) or None,
    "touch": lambda r: r.touch("a") or None,
    "copy": lambda r: r.copy() or None,
    "dict": lambda r: dict(r) or None,
    "|": lambda r: (r | {}) or None,
}


@pytest.mark.parametrize("limits", [{"ttl": 10}, {"idle": 10}, {"ttl": 10, "idle": 99}, {"ttl": 99, "idle": 10}])
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_no_lookup_returns_what_is_over(clock: ManualClock, lookup: str, policy: Any, limits: dict[str, Any]) -> None:
    """To the very second: just before it is there, at its time it is not."""
    registry: Registry[str, int] = Registry({"a": 1}, policy=policy, timer=clock, **limits)
    clock.advance(9.999)
    assert 1 == registry.peek("a")
    assert {"a": 1} == dict(registry)
    clock.advance(0.001)

    assert LOOKUPS[lookup](registry) is None


def test_a_lookup_of_what_is_over_is_a_key_error_and_a_miss(clock: ManualClock) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, ttl=10, timer=clock)
    clock.advance(10)
    with pytest.raises(KeyError, match="a"):
        registry["a"]

    assert (0, 1) == (registry.stats().hits, registry.stats().misses)
    assert 0 == len(registry)


@pytest.mark.parametrize("limit", [10, 10.0, "10s", "10000ms", timedelta(seconds=10)])
def test_durations_are_understood(clock: ManualClock, limit: Any) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, ttl=limit, timer=clock)
    clock.advance(9.9)
    assert "a" in registry
    clock.advance(0.1)

    assert "a" not in registry


def test_reading_prolongs_idle_and_not_ttl(clock: ManualClock) -> None:
    idle: Registry[str, int] = Registry({"a": 1}, idle=10, timer=clock)
    ttl: Registry[str, int] = Registry({"a": 1}, ttl=10, timer=clock)
    for _ in range(3):
        clock.advance(9)
        idle["a"]
        ttl.get("a")

    assert ({"a": 1}, {}) == (dict(idle), dict(ttl))


@pytest.mark.parametrize(
    "use",
    [
        lambda r: r["a"],
        lambda r: r.get("a"),
        lambda r: r.setdefault("a", 2),
        lambda r: r.touch("a"),
        lambda r: r.lease("a").__enter__(),
    ],
)
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
def test_what_counts_as_use(clock: ManualClock, use: Callable[[Any], Any], policy: Any) -> None:
    registry: Registry[str, int] = Registry({"a": 1, "b": 2}, idle=10, policy=policy, timer=clock)
    clock.advance(9)
    use(registry)
    clock.advance(9)

    assert ["a"] == list(registry)


@pytest.mark.parametrize(
    "look",
    [
        lambda r: "a" in r,
        len,
        list,
        repr,
        dict,
        lambda r: r == {},
        lambda r: r.peek("a"),
        lambda r: list(r.items()),
        lambda r: r.stats(),
    ],
)
def test_what_does_not(clock: ManualClock, look: Callable[[Any], Any]) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, idle=10, timer=clock)
    clock.advance(9)
    look(registry)
    clock.advance(1)

    assert "a" not in registry


def test_writing_starts_both_anew(clock: ManualClock) -> None:
    registry: Registry[str, int] = Registry({"a": 1}, ttl=10, idle=10, timer=clock)
    clock.advance(9)
    registry["a"] = 2
    clock.advance(9)

    assert 2 == registry["a"]


def test_the_order_of_expiry_is_by_use_and_not_by_insertion(clock: ManualClock) -> None:
    """Each entry leaves at its own time, whatever was done with the others in between."""
    told: list[Any] = []
    registry: Registry[int, int] = Registry(idle=10, timer=clock, on_evict=told.append)
    for i in range(5):
        registry[i] = i
        clock.advance(1)
    for i in (3, 0, 2):
        registry[i]
        clock.advance(1)
    left: list[tuple[float, int]] = []
    while registry:
        clock.advance(1)
        registry.expire()
        left += [(clock.now - 1000, removal.key) for removal in told]
        told.clear()

    assert [(11, 1), (14, 4), (15, 3), (16, 0), (17, 2)] == left


# Many at once.


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.get(99_999),
        lambda r: r.get(-1),
        lambda r: r.__setitem__(-1, 0),
        lambda r: 5 in r,
        lambda r: r.pop(7, None),
        lambda r: r.setdefault(-1, 0),
        lambda r: r.peek(3),
        lambda r: r.update({-1: 0}),
        lambda r: r.touch(4),
        lambda r: r.trim(10**6),
    ],
)
@pytest.mark.parametrize("limits", [{"ttl": 3600}, {"idle": 3600}])
def test_no_call_pays_for_all_that_expires_at_once(
    clock: ManualClock, call: Callable[[Any], Any], limits: dict[str, Any]
) -> None:
    """Ten thousand entries fall due at one instant: each call drops a bounded slice, and returns none of them."""
    registry: Registry[int, int] = Registry({i: i for i in range(10_000)}, timer=clock, **limits)
    clock.advance(3600)
    before = dict.__len__(registry)
    call(registry)

    assert before - 130 <= dict.__len__(registry)
    assert [] == [key for key in registry if key >= 0]


@pytest.mark.slow
def test_a_hundred_thousand_at_once_are_dropped_by_expire(clock: ManualClock) -> None:
    told = 0

    def count(removal: Any) -> None:
        nonlocal told
        told += 1

    registry: Registry[int, int] = Registry({i: i for i in range(100_000)}, ttl=3600, timer=clock, on_evict=count)
    clock.advance(3600)

    assert 100_000 == registry.expire()
    assert 100_000 == told
    assert 0 == len(registry)
    assert 0 == registry.expire()


@pytest.mark.slow
def test_a_hundred_thousand_at_once_are_dropped_by_the_janitor(clock: ManualClock) -> None:
    """Nobody reads, writes or sweeps: they leave."""
    empty = threading.Event()
    told = 0

    def count(removal: Any) -> None:
        nonlocal told
        told += 1
        if told == 100_000:
            empty.set()

    # Not the clock itself, which the janitor would leave alone.
    registry: Registry[int, int] = Registry(ttl=0.3, timer=lambda: clock.now, on_evict=count)
    registry.update({i: i for i in range(100_000)})
    clock.advance(1)

    assert empty.wait(2 * PATIENCE)
    assert 0 == dict.__len__(registry)


# The janitor.


@pytest.mark.parametrize("limits", [{"ttl": 0.05}, {"idle": 0.05}])
def test_the_janitor_drops_what_nobody_asks_for(limits: dict[str, Any]) -> None:
    """By the real clock, without anyone reading, writing or sweeping; the value is freed."""
    left = threading.Event()
    causes: list[Cause] = []

    def hear(removal: Any) -> None:
        causes.append(removal.cause)
        left.set()

    class Value:
        pass

    registry: Registry[str, Value] = Registry(on_evict=hear, **limits)
    registry["a"] = Value()
    watched = weakref.ref(registry.peek("a")) if "a" in registry else None

    assert left.wait(PATIENCE)
    assert [Cause.EXPIRED if "ttl" in limits else Cause.IDLE] == causes
    assert 0 == len(registry)
    assert watched is None or registry.peek("a") is None


def test_the_janitor_comes_again_for_what_was_busy() -> None:
    """What is in use when its time is over leaves soon after it is free."""
    asked, left = threading.Event(), threading.Event()
    busy = True

    def is_busy(entry: Entry[str, int]) -> bool:
        asked.set()
        return busy

    registry: Registry[str, int] = Registry({"a": 1}, ttl=0.05, busy=is_busy, on_evict=lambda removal: left.set())
    assert asked.wait(PATIENCE)
    assert not left.is_set()
    busy = False

    assert left.wait(PATIENCE)
    assert 0 == len(registry)


def test_the_janitor_comes_for_what_is_put_in_later() -> None:
    """A registry that was empty for a while is looked after again when it is used again."""
    left = threading.Semaphore(0)
    registry: Registry[str, int] = Registry(ttl=0.05, on_evict=lambda removal: left.release())
    for key in "abc":
        registry[key] = 1
        assert left.acquire(timeout=PATIENCE)

    assert 0 == len(registry)


def test_a_registry_with_times_is_freed_at_once(no_collector: None) -> None:
    """Neither the janitor nor a cycle keeps a registry, or what is in it, alive."""

    class Value:
        pass

    flavours: list[dict[str, Any]] = [
        {},
        {"maxsize": 2},
        {"ttl": 3600},
        {"idle": 3600},
        {"on_evict": lambda removal: None},
        {"max_bytes": 10**9},
        {"busy": lambda entry: False},
        {"policy": "lfu", "maxsize": 2},
        {"close": lambda value: None},
        {"default_factory": Value},
    ]
    kept = []
    for limits in flavours:
        registry: Registry[str, Value] = Registry(**limits)
        for key in "abc":
            registry[key] = Value()
            registry[key]
        with registry.lease("c"):
            dict(registry)
            list(registry.items())
        watched = [weakref.ref(registry), weakref.ref(registry.peek("c"))]
        del registry
        if any(reference() is not None for reference in watched):
            kept.append(limits)

    assert [] == kept


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout.strip()


@pytest.mark.slow
def test_a_process_without_time_limits_starts_no_thread() -> None:
    code = """
import threading
from hygiene.registry import Registry, referenced
size = {"maxsize": 2}
for limits in ({}, size, {"max_bytes": 100}, {**size, "busy": referenced}, {**size, "on_evict": print.__eq__},
               {**size, "policy": "lfu"}, {**size, "close": "auto"}):
    registry = Registry(**limits)
    for i in range(10):
        registry[i] = [i]
        registry.get(i)
        with registry.lease(i):
            pass
    registry.trim(1)
    registry.close()
print(threading.active_count())
"""
    assert "1" == run_python(code)


@pytest.mark.slow
def test_the_thread_ends_when_nothing_is_left() -> None:
    """When the last registry with times is gone, or holds nothing, the thread goes; and it comes again."""
    code = """
import threading
from hygiene.janitor import janitor
from hygiene.registry import Registry
left = threading.Semaphore(0)
first = Registry(ttl=3600)
first["a"] = 1
thread = janitor._thread
assert thread is not None and thread.daemon
del first
thread.join(20)
assert not thread.is_alive() and not janitor.running
second = Registry(ttl=0.05, on_evict=lambda removal: left.release())
second["a"] = 1
thread = janitor._thread
assert left.acquire(timeout=20)
thread.join(20)
assert not thread.is_alive() and not janitor.running
print(threading.active_count(), len(second))
"""
    assert "1 0" == run_python(code)


@pytest.mark.slow
def test_a_process_ends_although_much_is_watched() -> None:
    code = """
from hygiene.registry import Registry
registry = Registry({i: i for i in range(100)}, ttl=3600)
print("done")
"""
    assert "done" == run_python(code)


# Other threads in the middle of things.


@pytest.mark.parametrize("when", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
def test_an_entry_removed_while_it_is_used_leaves_no_trace(policy: Any, when: int) -> None:
    """A read that is overtaken by a removal leaves no stamp behind that could never expire."""

    class Interfering(ManualClock):
        armed = 0

        def __call__(self) -> float:
            if self.armed and not registry._lock._is_owned():
                self.armed -= 1
                if not self.armed:
                    registry.pop("a", None)  # as another thread would, between any two lines without the lock
            return super().__call__()

    clock = Interfering()
    registry: Registry[str, int] = Registry(idle=3600, ttl=7200, timer=clock, policy=policy)

    def lease(key: str) -> None:
        with registry.lease(key):
            pass

    for use in (registry.get, registry.touch, registry.peek, lease):
        registry["a"] = 1
        registry["b"] = 2
        clock.armed = when
        with contextlib.suppress(KeyError):
            use("a")
    clock.armed = 0
    clock.advance(7200)
    registry.expire()

    assert 0 == len(registry)
    assert registry._first_used() is None
    assert registry._first_written() is None


# Fork.

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

FORKED = """
import contextlib, os, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 on: forking with threads is what is under test
from hygiene.group import Group
from hygiene.janitor import janitor
from hygiene.limits import Limits
from hygiene.registry import Registry

def in_child(check):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def with_timeout(function):
    done = []
    thread = threading.Thread(target=lambda: done.append(function()), daemon=True)
    thread.start()
    thread.join(20)
    assert done, "it hangs"
"""


@pytest.mark.slow
@needs_fork
def test_locks_work_after_a_fork_while_another_thread_held_them() -> None:
    """A child of ``fork`` can use every registry, although whoever held its lock does not exist there."""
    code = (
        FORKED
        + """
plain, told = Registry(maxsize=3), Registry(maxsize=3, on_evict=lambda removal: None)
busy = Registry(maxsize=3, busy=lambda entry: False)
group = Group(Limits.of(maxsize=3), {"a": None, "b": None})
columns = group.adopt("a", {}), group.adopt("b", {})
held, release = threading.Event(), threading.Event()

def hold():
    with contextlib.ExitStack() as stack:
        for registry in (plain, told, busy, group.rows):
            stack.enter_context(registry._lock)
            registry._broom[0] = []
        held.set()
        release.wait(30)

thread = threading.Thread(target=hold)
thread.start()
assert held.wait(20)

def use():
    for registry in (plain, told, busy, *columns):
        for i in range(10):
            registry[i] = i
            with registry.lease(i):
                pass
        assert [7, 8, 9] == list(registry), registry
        registry.clear()
    assert columns[0]._lock is columns[1]._lock is group.rows._lock
    return True

status = in_child(lambda: with_timeout(use))
release.set()
thread.join()
print(status)
"""
    )
    assert "0" == run_python(code)


@pytest.mark.slow
@needs_fork
def test_the_janitor_works_in_a_forked_child() -> None:
    """What the parent put in expires in the child, too, and what the child puts in."""
    code = (
        FORKED
        + """
left = threading.Semaphore(0)
registry = Registry(ttl=0.5, on_evict=lambda removal: left.release())
registry["from the parent"] = 1

def check():
    assert janitor.running
    assert left.acquire(timeout=20)
    assert not len(registry)
    registry["from the child"] = 1
    assert left.acquire(timeout=20)
    assert not len(registry)

status = in_child(check)
assert left.acquire(timeout=20)
print(status, len(registry))
"""
    )
    assert "0 0" == run_python(code)


@pytest.mark.slow
@needs_fork
def test_a_creation_that_was_under_way_is_not_waited_for_in_a_child() -> None:
    """The thread that creates a key exists in the parent only: the child creates its own."""
    code = (
        FORKED
        + """
registry = Registry(maxsize=3)
begun, release = threading.Event(), threading.Event()

def create():
    begun.set()
    release.wait(30)
    return "parent's"

def lease(create):
    with registry.lease("a", create) as value:
        return value

thread = threading.Thread(target=lease, args=(create,))
thread.start()
assert begun.wait(20)

def check():
    with_timeout(lambda: lease(lambda: "child's"))
    assert "child's" == registry["a"]

status = in_child(check)
release.set()
thread.join()
print(status, registry["a"])
"""
    )
    assert "0 parent's" == run_python(code)
