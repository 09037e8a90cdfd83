"""Several dicts with one life: a use of any is a use of all, and a row leaves all of them together."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.errors import RegistryFull
from hygiene.events import Cause
from hygiene.group import Group
from hygiene.limits import Limits
from hygiene.registry import Registry
from hygiene.testing import ManualClock


def pair(**limits: Any) -> tuple[Group, Registry[Any, Any], Registry[Any, Any]]:
    """A group of two columns that are keyed alike."""
    group = Group(Limits.of(**limits), {"sessions": None, "locks": None})
    return group, group.adopt("sessions", {}), group.adopt("locks", {})


def derived(**limits: Any) -> tuple[Group, Registry[Any, Any], Registry[Any, Any]]:
    """Threads by name, and blobs by (thread, number)."""
    group = Group(Limits.of(**limits), {"threads": None, "blobs": lambda key: key[0]})
    return group, group.adopt("threads", {}), group.adopt("blobs", {})


def test_a_row_leaves_all_columns_together() -> None:
    _, sessions, locks = pair(maxsize=2)
    for key in "abc":
        sessions[key] = f"session {key}"
        locks[key] = f"lock {key}"

    assert ["b", "c"] == list(sessions) == list(locks)


def test_a_use_of_one_column_is_a_use_of_the_row() -> None:
    _, sessions, locks = pair(maxsize=2)
    for key in "ab":
        sessions[key] = locks[key] = key
    locks["a"]
    sessions["c"] = "c"

    assert ["a", "c"] == list(sessions)
    assert ["a"] == list(locks)


def test_the_bound_counts_rows() -> None:
    """Two columns of two rows are two, whatever is in which."""
    group, sessions, locks = pair(maxsize=2)
    sessions["a"] = locks["b"] = 1
    assert (1, 1, 2) == (len(sessions), len(locks), len(group.rows))
    sessions["c"] = 1

    assert ({"c": 1}, {"b": 1}) == (sessions, locks)
    assert 2 == group.stats().entries


def test_each_value_is_told_by_itself(clock: ManualClock) -> None:
    told: list[Any] = []
    _, sessions, locks = pair(maxsize=1, ttl=3600, on_evict=told.append, timer=clock)
    sessions["a"], locks["a"] = "session", "lock"
    clock.advance(5)
    sessions["b"] = "other"

    assert {("a", "session", Cause.SIZE, 5.0), ("a", "lock", Cause.SIZE, 5.0)} == {
        (r.key, r.value, r.cause, r.age) for r in told
    }
    assert 2 == len(told)


def test_deleting_in_one_column_leaves_the_others() -> None:
    """``del`` takes one value; the row ends with its last."""
    group, sessions, locks = pair(maxsize=5)
    sessions["a"] = locks["a"] = 1
    del sessions["a"]
    assert ({}, {"a": 1}, 1) == (sessions, locks, len(group.rows))
    locks.pop("a")

    assert 0 == len(group.rows)


@pytest.mark.parametrize("end", [lambda r: r.clear(), lambda r: r.close(), lambda r: r.popitem()])
def test_the_end_of_one_column_leaves_the_others(end: Callable[[Any], Any]) -> None:
    group, sessions, locks = pair(maxsize=5)
    sessions["a"] = locks["a"] = 1
    end(sessions)

    assert ({}, {"a": 1}, 1) == (sessions, locks, len(group.rows))


def test_a_row_is_busy_if_any_of_its_values_is() -> None:
    class Lock:
        held = False

    _, sessions, locks = pair(maxsize=1, busy="held", revive=False)
    sessions["a"], locks["a"] = "session", Lock()
    locks["a"].held = True
    sessions["b"] = "other"

    assert "a" in sessions
    assert not sessions.evict("a")
    locks["a"].held = False
    assert sessions.evict("a")
    assert "a" not in locks


def test_all_busy_can_refuse_a_row() -> None:
    """Nothing has changed in any column, and a present row takes more values."""
    group, sessions, locks = pair(maxsize=1, busy=lambda entry: True, overflow="raise")
    sessions["a"] = 1
    locks["a"] = 2
    with pytest.raises(RegistryFull):
        locks["b"] = 3

    assert ({"a": 1}, {"a": 2}, 1) == (sessions, locks, len(group.rows))


def test_the_bytes_of_a_row_are_those_of_its_values() -> None:
    group, sessions, locks = pair(max_bytes=10, getsizeof=len)
    sessions["a"], locks["a"] = "xxx", "xx"
    sessions["b"] = "xxxx"
    assert 9 == group.stats().bytes
    locks["b"] = "xx"

    assert ({"b": "xxxx"}, {"b": "xx"}) == (sessions, locks)
    assert 6 == group.stats().bytes
    sessions["b"] = "x"
    assert 3 == group.stats().bytes
    del sessions["b"], locks["b"]
    assert 0 == group.stats().bytes


def test_refused_for_its_bytes_changes_no_column() -> None:
    _, sessions, locks = pair(max_bytes=10, getsizeof=len, overflow="raise", busy=lambda entry: entry.key == "busy")
    sessions["free"], locks["busy"] = "xxx", "xxxxxx"
    with pytest.raises(RegistryFull):
        locks["large"] = "xxxxxxx"

    assert ({"free": "xxx"}, {"busy": "xxxxxx"}) == (sessions, locks)


def test_ttl_counts_from_the_last_write_to_the_row(clock: ManualClock) -> None:
    _, sessions, locks = pair(ttl=3600, timer=clock)
    sessions["a"] = 1
    clock.advance(3000)
    locks["a"] = 2
    clock.advance(3599)
    assert 1 == sessions["a"]
    clock.advance(1)

    assert "a" not in sessions
    assert locks.get("a") is None
    assert [] == list(sessions) == list(locks)


def test_idle_counts_from_the_last_use_of_the_row(clock: ManualClock) -> None:
    group, sessions, locks = pair(idle=3600, timer=clock)
    sessions["a"] = locks["a"] = 1
    clock.advance(3000)
    locks.get("a")
    clock.advance(3599)
    assert 1 == sessions.peek("a")
    clock.advance(1)

    assert 1 == group.rows.expire()
    assert ({}, {}) == (sessions, locks)


def test_a_group_expires_without_a_reader() -> None:
    left = threading.Semaphore(0)
    _, sessions, locks = pair(ttl=0.05, on_evict=lambda removal: left.release())
    with sessions.lease("a", lambda: 1):
        locks["a"] = 2

    assert left.acquire(timeout=20)
    assert left.acquire(timeout=20)
    assert 0 == dict.__len__(sessions) == dict.__len__(locks)


def test_a_lease_on_one_column_pins_the_row() -> None:
    group, sessions, locks = pair(maxsize=1)
    sessions["a"] = locks["a"] = 1
    with locks.lease("a"):
        sessions["b"] = 2
        assert ({"a": 1, "b": 2}, {"a": 1}) == (sessions, locks)
        assert 1 == sessions.stats().leased
        assert 0 == sessions.trim(1) or "a" in sessions

    assert 1 == len(group.rows)


def test_creating_under_a_lease_in_a_full_group() -> None:
    _, sessions, locks = pair(maxsize=1)
    sessions["a"] = locks["a"] = 1
    with sessions.lease("b", lambda: 2) as value:
        locks["b"] = 3
        assert 2 == value

    assert ({"b": 2}, {"b": 3}) == (sessions, locks)


def test_each_column_revives_its_own() -> None:
    class Value:
        pass

    _, sessions, locks = pair(maxsize=1)
    session, lock = sessions["a"], locks["a"] = Value(), Value()
    sessions["b"] = Value()

    assert "a" not in dict(sessions)
    assert session is sessions["a"]
    assert lock is locks["a"]
    assert "b" not in sessions


def test_trim_and_expire_speak_of_rows(clock: ManualClock) -> None:
    group, sessions, locks = pair(ttl=3600, timer=clock)
    for key in range(10):
        sessions[key] = locks[key] = key

    assert 4 == sessions.trim(6)
    assert 3 == locks.trim("50%")
    assert [7, 8, 9] == list(sessions) == list(locks)
    clock.advance(3600)
    assert 3 == sessions.expire()
    assert 0 == len(group.rows)


def test_stats_of_a_column_count_its_own_lookups() -> None:
    group, sessions, locks = pair(maxsize=2)
    sessions["a"] = locks["a"] = 1
    sessions["a"]
    sessions.get("z")
    locks["a"]
    locks.update(b=1, c=1)

    assert (1, 1) == (sessions.stats().hits, sessions.stats().misses)
    assert (1, 0) == (locks.stats().hits, locks.stats().misses)
    assert {Cause.SIZE: 1} == dict(sessions.stats().evictions) == dict(locks.stats().evictions)
    assert 2 == group.stats().entries


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
def test_policies_order_rows(policy: Any) -> None:
    _, sessions, locks = pair(maxsize=2, policy=policy)
    for key in "ab":
        sessions[key] = locks[key] = key
    for _ in range(3):
        locks["a"]
    sessions["c"] = "c"

    assert (["b"] if policy == "fifo" else ["a"]) == list(locks)


# Keys that differ.


def test_a_derived_key_joins_many_entries_to_a_row() -> None:
    group, threads, blobs = derived(maxsize=2)
    for name in "abc":
        threads[name] = name
        for number in range(3):
            blobs[name, number] = number

    assert ["b", "c"] == list(threads)
    assert {("b", n) for n in range(3)} | {("c", n) for n in range(3)} == set(blobs)
    assert 2 == group.stats().entries


def test_a_use_of_a_derived_key_is_a_use_of_its_row() -> None:
    _, threads, blobs = derived(maxsize=2)
    for name in "ab":
        threads[name] = name
        blobs[name, 1] = 1
    blobs["a", 1]
    threads["c"] = "c"

    assert ["a", "c"] == list(threads)
    assert [("a", 1)] == list(blobs)


def test_a_row_of_derived_keys_ends_with_its_last_entry() -> None:
    group, _, blobs = derived(maxsize=2)
    blobs["a", 1] = blobs["a", 2] = 0
    del blobs["a", 1]
    assert 1 == len(group.rows)
    del blobs["a", 2]

    assert 0 == len(group.rows)
    assert {} == blobs._members


def test_a_lease_on_a_derived_key_pins_the_row() -> None:
    _, threads, blobs = derived(maxsize=1)
    threads["a"] = blobs["a", 1] = blobs["a", 2] = 0
    with blobs.lease(("a", 1)):
        threads["b"] = 1
        assert {"a": 0, "b": 1} == threads
        assert {("a", 1), ("a", 2)} == blobs.keys()


def test_a_key_that_cannot_be_derived_is_a_row_of_its_own() -> None:
    """The function's exception is logged and counted; the writer is not disturbed, and the bound holds."""
    group, _, blobs = derived(maxsize=2)
    for number in range(5):
        blobs[number] = number

    assert [3, 4] == list(blobs)
    assert 2 == len(group.rows)
    assert blobs.stats().hook_errors >= 1


# A dict like any other.


@dataclasses.dataclass
class Record:
    values: dict[str, int]


@pytest.mark.parametrize(
    "read",
    [
        copy.copy,
        copy.deepcopy,
        dict,
        lambda r: {**r},
        lambda r: r | {},
        lambda r: pickle.loads(pickle.dumps(r)),
        lambda r: dataclasses.asdict(Record(r))["values"],
        lambda r: r.copy(),
    ],
    ids=["copy", "deepcopy", "dict", "**", "|", "pickle", "asdict", "r.copy"],
)
@pytest.mark.parametrize(
    "limits", [{}, {"ttl": 3600}, {"on_evict": lambda removal: None}], ids=["plain", "ttl", "told"]
)
def test_a_column_is_copied_out_of_its_group(read: Callable[[Any], Any], limits: dict[str, Any]) -> None:
    """A copy has the entries and stands alone; making it is no use of the rows."""
    group, sessions, locks = pair(maxsize=3, **limits)
    for key in "abc":
        sessions[key] = locks[key] = 1
    copied = read(sessions)
    copied["z"] = 26

    assert {"a": 1, "b": 1, "c": 1} == sessions
    assert copied["z"] == 26
    assert 0 == sessions.stats().hits
    assert 3 == len(group.rows)
    sessions["d"] = 1
    assert "a" not in sessions


def test_columns_keep_their_classes() -> None:
    """A defaultdict goes on making defaults, under the bound of the group."""
    group = Group(Limits.of(maxsize=2), {"lists": None, "counts": None})
    lists = group.adopt("lists", defaultdict(list, {"a": [1]}))
    group.adopt("counts", {"a": 1, "b": 2})
    lists["b"].append(2)
    lists["c"].append(3)

    assert {"b": [2], "c": [3]} == lists


def test_content_beyond_the_bound_leaves_when_it_is_adopted() -> None:
    group = Group(Limits.of(maxsize=2), {"sessions": None, "locks": None})
    sessions = group.adopt("sessions", dict.fromkeys("abcd", 0))

    assert ["c", "d"] == list(sessions)


def test_a_column_that_is_gone_is_forgotten(no_collector: None) -> None:
    """A column dies with its last reference; the others go on."""
    group, sessions, locks = pair(maxsize=2)
    sessions["a"] = locks["a"] = 1
    del sessions
    locks["b"] = 2
    locks["c"] = 3

    assert {"b": 2, "c": 3} == locks
    assert 2 == len(group.rows)


def test_an_unknown_column_is_named() -> None:
    group, _, _ = pair(maxsize=2)
    with pytest.raises(ValueError, match="wanted one of the columns sessions, locks; found 'session'"):
        group.adopt("session", {})


def test_hooks_run_with_the_lock_of_the_group_free(elsewhere: Callable[..., Any]) -> None:
    told: list[Any] = []

    def hear(removal: Any) -> None:
        told.append(removal.value)
        elsewhere(locks.get, "x")
        elsewhere(lambda: sessions.lease("y", lambda: 1).__enter__().__str__())
        locks.pop("y", None)

    _, sessions, locks = pair(maxsize=2, on_evict=hear)
    sessions["a"] = locks["a"] = 1
    sessions["b"] = 2
    del sessions["b"]

    assert [2] == told[:1]
    assert 0 == sessions.stats().hook_errors


def test_the_function_that_derives_a_row_runs_without_the_lock() -> None:
    """It is code of yours: it may wait for another thread that uses the table."""
    waited: list[bool] = []

    def derive(key: tuple[str, int]) -> str:
        reader = threading.Thread(target=lambda: table.rows.expire() or storage.pop("nobody", None))
        reader.start()
        reader.join(10)
        waited.append(not reader.is_alive())
        return key[0]

    table = Group(Limits.of(maxsize=1), {"storage": None, "blobs": derive})
    storage = table.adopt("storage", {})
    blobs = table.adopt("blobs", {})
    blobs["a", 1] = "x"
    blobs["a", 1] = "y"
    blobs["b", 1] = "z"
    del blobs["b", 1]

    assert waited
    assert all(waited)
    assert {} == blobs == blobs._derived
