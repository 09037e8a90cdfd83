"""`report()` tells everything that is alive, and who holds what."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import re
import threading

import msgspec
import pytest

import hygiene
from hygiene import (
    AsyncPool,
    AsyncSession,
    MemoryBudget,
    MemoryMonitor,
    Pool,
    Registry,
    Report,
    Session,
    SQLiteStore,
    StoreUnavailable,
    WriteBehind,
    bounded_registry,
    managed_local,
    managed_session,
    register_cleanup,
    report,
    reporting,
    shared_resource,
)
from hygiene.testing import ManualClock

PATIENCE = 20.0


@pytest.fixture(autouse=True)
def everything(monkeypatch):
    """Texts are not cut: other tests may have left more than a text shows."""
    monkeypatch.setattr(reporting, "_SHOWN", 100_000)


def one(things, name):
    """The only one of this name."""
    (found,) = [thing for thing in things if thing.name == name]
    return found


class Bot:
    def __init__(self):
        self.chats = Registry(maxsize=2, idle="1h", name="bot chats")


def test_the_package_has_the_function_and_not_a_module_of_that_name():
    assert callable(hygiene.report)
    assert callable(hygiene.expose)


def test_a_registry_is_told_with_its_bounds_and_numbers():
    registry = Registry(maxsize=2, max_bytes="1MiB", ttl="5m", policy="fifo", name="seen chats")
    for number in range(3):
        registry[number] = "text"
    registry.get("nobody")

    told = one(report().registries, "seen chats")

    assert (2, 2**20, 300.0, None, "fifo") == (told.maxsize, told.max_bytes, told.ttl, told.idle, told.policy)
    assert registry.stats() == told.stats
    assert (None, None, ()) == (told.owner, told.store, told.columns)


def test_a_lease_is_told_with_its_key_and_how_many_hold_it():
    registry = Registry(name="leased chats")
    registry.update(ada=1, bob=2)

    with registry.lease("ada"), registry.lease("ada"):
        found = report()
        told = one(found.registries, "leased chats")

    assert [("'ada'", 2)] == [(lease.key, lease.holders) for lease in told.leases]
    assert "      'ada' is leased by 2\n" in found.text()
    assert () == one(report().registries, "leased chats").leases


def test_a_key_that_is_being_created_is_told():
    registry = Registry(name="slow chats")
    seen = []

    with registry.lease("ada", create=lambda: seen.append(report()) or 1):
        pass

    assert ("'ada'",) == one(seen[0].registries, "slow chats").creating
    assert "      'ada' is being created" in str(seen[0])


def test_the_type_of_the_owner_is_told():
    @bounded_registry("chats", maxsize=3)
    class Served:
        def __init__(self):
            self.chats = {}

    served = Served()
    served.chats["a"] = 1

    (told,) = [found for found in report().registries if (found.owner or "").endswith(".Served")]

    assert 1 == told.stats.entries


def test_several_dicts_that_share_one_life_are_told_once():
    @bounded_registry("seen_names", "seen_locks", maxsize=3)
    class Grouped:
        def __init__(self):
            self.seen_names = {}
            self.seen_locks = {}

    grouped = Grouped()
    grouped.seen_names["a"] = grouped.seen_locks["a"] = 1

    told = [found for found in report().registries if "seen_names" in found.columns]

    assert [("seen_names", "seen_locks")] == [found.columns for found in told]
    assert [1] == [found.stats.entries for found in told]
    assert not [found for found in report().registries if found.name == "seen_locks"]


def test_the_holder_of_a_resource_is_told_with_thread_age_and_stack():
    clock = ManualClock()
    with Pool(io.BytesIO, leak_after=60, name="watched pool", timer=clock) as pool:
        lease = pool.lease()
        clock.advance(7)
        found = report()
        lease.release()

    told = one(found.pools, "watched pool")
    (holder,) = told.holders
    assert ("Pool", False, 1) == (told.kind, told.closed, told.stats.in_use)
    assert (f"thread {threading.current_thread().name!r}", 7.0) == (holder.thread, holder.age)
    assert found.at - 7 == holder.since
    assert "in test_the_holder_of_a_resource_is_told" in holder.stack
    assert "      held for 7.0 s, since " in found.text()
    assert "lease = pool.lease()" in found.text()


def test_a_pool_that_records_nothing_says_how_to_have_it_recorded():
    with Pool(io.BytesIO, name="plain pool") as pool, pool.acquire():
        found = report()

    assert [(None, None, None, "")] == [
        (holder.thread, holder.age, holder.since, holder.stack) for holder in one(found.pools, "plain pool").holders
    ]
    assert "      by whom it is held is known with leak_after=\n" in found.text()


def test_stacks_can_be_left_out():
    with Pool(io.BytesIO, leak_after=60, name="quiet pool") as pool, pool.acquire():
        (holder,) = one(report(stacks=False).pools, "quiet pool").holders

    assert "" == holder.stack


async def test_asynchronous_pools_and_sessions_are_told():
    async def make():
        return io.BytesIO()

    async with (
        AsyncPool(make, leak_after=60, name="async pool") as pool,
        pool.acquire(),
        managed_session(name="async session") as session,
    ):
        await session.open(make)
        found = report()

    told = one(found.pools, "async pool")
    assert ("AsyncPool", 1) == (told.kind, told.stats.in_use)
    assert told.holders[0].thread.startswith("task ")
    assert ("AsyncSession", 1, ("BytesIO.close",)) == (
        one(found.sessions, "async session").kind,
        one(found.sessions, "async session").pending,
        one(found.sessions, "async session").releases,
    )


def test_a_session_is_told_with_what_it_will_release_in_that_order():
    class Own(Session):
        pass

    kept = Own(name="kept session")
    with managed_session(name="open session") as session, kept:
        session.callback(print)
        session.open(io.BytesIO)
        found = report()

    told = one(found.sessions, "open session")
    assert ("Session", 2, ("BytesIO.close", "print")) == (told.kind, told.pending, told.releases)
    assert ("Own", 0) == (one(found.sessions, "kept session").kind, one(found.sessions, "kept session").pending)
    assert "  Session open session: 2 to release: BytesIO.close, print\n" in found.text()
    assert not {"open session", "kept session"} & {one.name for one in report().sessions}


def test_sessions_are_not_looked_for_if_nobody_wants_to_know():
    with managed_session():
        assert report(sessions=False).sessions is None


def test_a_session_belongs_to_nobody_else_because_it_was_told():
    """To look for sessions leaves no reference behind, which would keep one alive."""
    session = AsyncSession(name="counted session")
    before = gc.get_referrers(session)

    found = report()

    assert one(found.sessions, "counted session")
    assert len(before) == len(gc.get_referrers(session))


def test_stores_are_told_with_what_saves_to_them(tmp_path):
    with SQLiteStore(tmp_path / "a.db") as store, WriteBehind(store, name="saver") as writer:
        writer.put("a", 1)
        registry = Registry(store=f"sqlite:{tmp_path / 'b.db'}", name="stored chats")
        found = report()
        registry.close()

    told = one(found.writers, "saver")
    assert {str(tmp_path / "a.db"), str(tmp_path / "b.db")} <= {store.address for store in found.stores}
    assert (str(tmp_path / "a.db"), "default", 10_000, False) == (
        told.store,
        told.space,
        told.max_pending,
        told.closed,
    )
    assert 1 == told.stats.changes
    assert str(tmp_path / "b.db") == one(found.registries, "stored chats").store
    assert f"  SQLiteStore {tmp_path / 'a.db'}\n      write-behind saver: " in found.text()


def test_a_store_of_ones_own_is_told_where_something_saves_to_it(tmp_path):
    class Plain:
        """Has what a store has, by way of one, and says nothing of itself."""

        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            if name in {"address", "path", "closed", "watch"}:
                raise AttributeError(name)
            return getattr(self._inner, name)

    with SQLiteStore(tmp_path / "a.db") as inner, WriteBehind(Plain(inner), name="own saver"):
        kinds = {(store.kind, store.address, store.closed) for store in report().stores}

    assert ("Plain", "Plain", False) in kinds


def test_what_saves_is_told_as_busy_if_its_lock_is_held(tmp_path):
    """A report waits for nobody; the rest is told."""
    held, told = threading.Event(), threading.Event()

    def hold():
        with writer._lock:
            held.set()
            told.wait(PATIENCE)

    with SQLiteStore(tmp_path / "a.db") as store, WriteBehind(store, name="held saver") as writer:
        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(PATIENCE)
        found = report()
        told.set()
        thread.join(PATIENCE)

    assert [
        "write-behind 'held saver': RuntimeError: busy at this moment: its lock was held for longer than 50 ms"
    ] == [problem for problem in found.problems if "held saver" in problem]
    assert str(tmp_path / "a.db") in {store.address for store in found.stores}
    assert "could not be looked at: write-behind 'held saver'" in found.text()


def test_budgets_and_monitors_are_told():
    budget = MemoryBudget("3MiB")
    chats = Registry(max_bytes=budget.share("seen share", "1MiB"), name="budgeted chats")
    chats["a"] = "x" * 1000
    monitor = MemoryMonitor("1TiB", name="seen monitor", timer=ManualClock())
    found = report()
    assert "monitor seen monitor: no reading yet" in found.text()
    monitor.check()
    found = report()

    (told,) = [one for one in found.budgets if one.total == 3 * 2**20]
    assert 2 * 2**20 == told.free
    assert [("seen share", 1)] == [(share.name, share.registries) for share in told.shares]
    level = one(found.monitors, "seen monitor")
    assert ("normal", False, 0, 2**40) == (level.level, level.running, level.sheds, level.reading.limit.size)
    assert "  budget of 3.0 MiB: 2.0 MiB in no share\n" in found.text()
    assert "monitor seen monitor: normal, 0% of 1,024.0 GiB (given), growth steady, not running" in found.text()


def test_cleanups_and_what_the_shutdown_will_close_are_told():
    def refused():
        raise ValueError

    tidy = register_cleanup(print, on="interval", every="30m", name="tidy seen", priority=3)
    relief = register_cleanup(print, on="pressure", timeout="2s", name="relief seen")
    last = register_cleanup(print, on="exit", name="last seen")
    try:
        with Pool(io.BytesIO, name="closed pool") as pool, pool.acquire():
            found = report()
    finally:
        for cleanup in (tidy, relief, last):
            cleanup.cancel()

    assert ("interval", 1800.0, 3, True) == (
        one(found.cleanups, "tidy seen").on,
        one(found.cleanups, "tidy seen").every,
        one(found.cleanups, "tidy seen").priority,
        one(found.cleanups, "tidy seen").registered,
    )
    assert ("pressure", 2.0) == (one(found.cleanups, "relief seen").on, one(found.cleanups, "relief seen").timeout)
    assert ("exit", 0, 0) == (
        one(found.cleanups, "last seen").on,
        one(found.cleanups, "last seen").runs,
        one(found.cleanups, "last seen").errors,
    )
    assert not one(found.cleanups, "pool 'closed pool'").registered
    assert "  tidy seen: every 30.0 min\n" in found.text()
    assert "closed at the shutdown:\n" in found.text()


def test_shared_and_local_resources_are_told():
    @shared_resource()
    def vectors(name):
        return io.BytesIO()

    @managed_local
    def connection():
        return io.BytesIO()

    connection()
    with vectors.lease("de"):
        found = report()
    vectors.close()
    connection.close()

    (told,) = [one for one in found.shared if one.name.endswith("vectors")]
    assert (1, [("('de',)", 1)]) == (told.open, [(lease.key, lease.holders) for lease in told.leases])
    assert [1] == [one.open for one in found.locals if one.name.endswith("connection")]
    assert not [one for one in found.registries if (one.name or "").endswith("vectors")]


def test_the_janitor_is_told():
    registry = Registry(ttl="1h", name="timed chats")
    registry["a"] = 1

    janitor = report().janitor

    assert (True, True) == (janitor.running, janitor.charges >= 1)
    assert "janitor: running, looks after " in str(report())


def test_the_process_is_told():
    found = report()

    assert os.getpid() == found.pid
    assert found.rss > 2**20
    assert threading.active_count() == found.threads
    assert str(found).startswith(f"{found.program} (process {found.pid}, Python {found.python}) at ")


def test_a_report_goes_through_json_and_comes_back_the_same():
    with Pool(io.BytesIO, leak_after=60, name="json pool") as pool, pool.acquire():
        registry = Registry(maxsize=1, name="json chats")
        registry.update(a=1, b=2)
        monitor = MemoryMonitor("1TiB", timer=ManualClock())
        monitor.check()
        found = report()

    back = msgspec.json.decode(found.json(), type=Report)

    assert found == back
    assert {"size": 1} == one(msgspec.json.decode(found.json(), type=Report).registries, "json chats").stats.evictions
    assert found.text() == back.text()


def test_a_report_cannot_be_changed():
    with pytest.raises(AttributeError):
        report().pid = 1


class Secret:
    """A key that must not be looked at."""

    def __repr__(self):
        raise AssertionError("somebody has looked")


def test_keys_are_not_looked_at_where_they_are_private():
    registry = Registry(name="private chats")
    key = Secret()
    registry[key] = 1
    with registry.lease(key):
        found = report(keys=False)
        shown = report()

    assert [(None, 1)] == [(lease.key, lease.holders) for lease in one(found.registries, "private chats").leases]
    assert "1 leased" in next(line for line in found.text().splitlines() if "private chats" in line)
    assert "is leased by" not in found.text()
    # And a key whose repr fails is still a key that is leased.
    assert ["<Secret that has no repr>"] == [lease.key for lease in one(shown.registries, "private chats").leases]


@pytest.mark.parametrize(
    ("key", "shown"),
    [("x" * 10_000_000, "'" + "x" * 58 + "…"), (("a", "b" * 100), "('a', '" + "b" * 52 + "…"), (b"raw", "b'raw'")],
)
def test_long_keys_are_cut(key, shown):
    registry = Registry(name="long chats")
    registry[key] = 1
    with registry.lease(key):
        told = one(report().registries, "long chats")

    assert [shown] == [lease.key for lease in told.leases]


def test_a_registry_that_each_object_has_takes_one_line():
    bots = [Bot() for _ in range(1_000)]
    for bot in bots:
        bot.chats["a"] = 1

    found = report()

    lines = [line for line in found.text().splitlines() if "bot chats" in line]
    assert ["  bot chats, 1,000 of them: 1,000 entries together"] == lines
    assert 1_000 == sum(one.name == "bot chats" for one in found.registries)


def test_long_lists_are_cut_in_the_text_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(reporting, "_SHOWN", 20)
    handles = [register_cleanup(print, on="pressure", name=f"many {number}") for number in range(50)]
    found = report()
    for handle in handles:
        handle.cancel()

    assert 50 == sum(one.name.startswith("many ") for one in found.cleanups)
    assert 20 >= sum("many " in line for line in found.text().splitlines())
    assert "  and " in found.text()


def test_what_cannot_be_told_is_named_and_the_rest_is_told():
    class Broken(Registry):
        def stats(self):
            raise ZeroDivisionError("of my own making")

    broken, whole = Broken(name="broken chats"), Registry(name="whole chats")

    found = report()

    assert "registry 'broken chats': ZeroDivisionError: of my own making" in found.problems
    assert one(found.registries, "whole chats")
    assert (broken, whole) == ({}, {})


@pytest.mark.slow
def test_a_report_is_safe_while_everything_comes_and_goes(tmp_path):
    """Other threads make, fill, close and drop what is being looked at."""
    over, failures, rounds = threading.Event(), [], []

    def churn(number):
        try:
            while not over.is_set():
                registry = Registry(maxsize=3, ttl="1h", name=f"churn {number}")
                with Pool(io.BytesIO, leak_after=60, name=f"churn {number}") as pool, managed_session() as session:
                    session.acquire(pool)
                    for key in range(6):
                        registry[key] = 1
                        session.lease(registry, key)
                registry.close()
                rounds.append(number)
        except Exception as error:  # noqa: BLE001 - asserted by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    found = []
    while len(rounds) < 100 and not failures:
        found.append(report())
        assert found[-1].text()
        msgspec.json.decode(found[-1].json(), type=Report)
    over.set()
    for thread in threads:
        thread.join(PATIENCE)

    assert [] == failures
    assert [] == [problem for one in found for problem in one.problems if "churn" in problem]


def test_a_report_does_not_wait_for_a_registry_that_is_locked():
    """What holds the lock may be what the report is to explain."""
    registry = Registry(name="locked chats")
    seen = []
    with registry._lock:
        thread = threading.Thread(target=lambda: seen.append(report()))
        thread.start()
        thread.join(PATIENCE)

    assert one(seen[0].registries, "locked chats")


async def test_a_report_on_an_event_loop_does_not_need_it():
    registry = Registry(name="loop chats")
    first, second = await asyncio.gather(asyncio.to_thread(report), asyncio.to_thread(report))

    assert one(first.registries, "loop chats") == one(second.registries, "loop chats")
    assert registry == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_tells_of_itself(tmp_path):
    registry = Registry(name="forked chats")
    registry["a"] = 1
    pid = os.fork()
    if not pid:
        try:
            (tmp_path / "told.json").write_bytes(report(sessions=False).json())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)

    told = msgspec.json.decode((tmp_path / "told.json").read_bytes(), type=Report)
    assert pid == told.pid
    assert 1 == one(told.registries, "forked chats").stats.entries


def test_what_goes_wrong_is_in_the_text(tmp_path):
    class Refusing(SQLiteStore):
        full = True

        def save(self, changes, *, sync=False):
            if self.full:
                raise StoreUnavailable("the disk is full")
            return super().save(changes, sync=sync)

    def fail(_):
        raise ValueError

    registry = Registry(maxsize=1, on_evict=fail, name="sick chats")
    registry.update(a=1, b=2)
    with Pool(io.BytesIO, max_size=1, name="sick pool") as pool, pool.acquire():
        with pytest.raises(TimeoutError):
            pool.lease(timeout=0)
        with Refusing(tmp_path / "a.db") as store, WriteBehind(store, name="sick saver") as writer:
            writer.put("a", 1)
            with pytest.raises(StoreUnavailable):
                writer.flush()
            text = report().text()
            store.full = False

    assert "sick chats: 1 of 1 entries, evicted 1 size, 1 hooks failed\n" in text
    assert "Pool sick pool: 1 of 1 in use, 0 idle, 1 timed out\n" in text
    assert re.search(
        r"write-behind sick saver: 1 of 10,000 pending, 0 changes saved, \d+ saves failed, the store does not save",
        text,
    )


def test_any_name_can_be_told():
    """A path may have bytes that are no text, and nothing keeps a name from being a number."""
    registries = [Registry(name="lone \udcff name"), Registry(name=17)]
    registries[0]["key \udcff"] = 1

    with registries[0].lease("key \udcff"):
        found = report()
    back = msgspec.json.decode(found.json(), type=Report)

    assert found == back
    assert ["'key \\udcff'"] == [lease.key for lease in one(back.registries, "lone \\udcff name").leases]
    assert one(back.registries, "17")


def test_numbers_of_another_kind_are_a_problem_and_no_harm():
    class Odd(Registry):
        def stats(self):
            return object()

    odd = Odd(name="odd numbers")

    assert "registry 'odd numbers': TypeError: its stats() returned object, not RegistryStats" in report().problems
    assert report().json()
    assert odd == {}


def test_dicts_that_share_one_life_are_listed_in_the_text():
    @bounded_registry("text_names", "text_locks", maxsize=3)
    class Grouped:
        def __init__(self):
            self.text_names = {}
            self.text_locks = {}

    grouped = Grouped()
    grouped.text_names["a"] = 1

    assert "      holds text_names, text_locks\n" in report().text()
