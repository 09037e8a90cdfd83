"""The exporter for Prometheus: what a real scrape says, alone and with several processes."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
import urllib.request
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from hygiene import (
    AsyncPool,
    MemoryBudget,
    MemoryMonitor,
    Pool,
    Registry,
    RegistryStats,
    SQLiteStore,
    WriteBehind,
    bounded_registry,
)
from hygiene.integrations.metrics import METRICS, OTHER, UNNAMED, Census
from hygiene.integrations.prometheus import HygieneCollector, HygieneInstruments, instrument
from hygiene.janitor import janitor

LIMIT = 30.0


@pytest.fixture
def prometheus() -> Iterator[CollectorRegistry]:
    registry = CollectorRegistry()
    with instrument(registry, max_names=10_000):
        yield registry


class Numbers:
    """What a scrape has said: ``numbers("name", label=...)``."""

    def __init__(self, text: str) -> None:
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __call__(self, metric: str, **labels: str) -> float | None:
        return self.samples.get((metric, frozenset(labels.items())))

    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def scrape(registry: CollectorRegistry) -> Numbers:
    """Over HTTP, as Prometheus does."""
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=LIMIT) as answer:
            return Numbers(answer.read().decode())
    finally:
        server.shutdown()
        server.server_close()
        thread.join(LIMIT)


def everything(name: str, folder: Path) -> list[Any]:
    """One of each kind, in use: so that each metric has a number."""
    registry: Registry[int, int] = Registry(maxsize=2, max_bytes="1MiB", name=name)
    registry.update({n: n for n in range(5)})
    pool = Pool(object, max_size=2, name=name)
    with pool.acquire():
        pass
    store = SQLiteStore(folder / f"{name}.db")
    saver = WriteBehind(store, name=name)
    saver.put("key", 1)
    saver.flush()
    monitor = MemoryMonitor("1TiB", name=name)
    monitor.check()
    budget = MemoryBudget("1MiB")
    budget.share(name, "1KiB")
    return [registry, pool, saver, store, monitor, budget]


def end(things: list[Any]) -> None:
    for thing in things:
        if hasattr(thing, "close"):
            thing.close()


# One process


def test_a_scrape_says_what_a_registry_says_of_itself(prometheus: CollectorRegistry, name: str) -> None:
    """Entries, requests by result, evictions by cause."""
    chats: Registry[int, str] = Registry(maxsize=2, name=name)
    chats.update(dict.fromkeys(range(5), ""))
    chats[4]
    chats.get(0)
    with chats.lease(4):
        found = scrape(prometheus)

    assert 1 == found("hygiene_registry_count", name=name)
    assert 2 == found("hygiene_registry_entry_count", name=name)
    assert 1 == found("hygiene_registry_leased", name=name)
    assert 3 == found("hygiene_registry_evictions_total", name=name, cause="size")
    assert 0 == found("hygiene_registry_evictions_total", name=name, cause="idle")
    assert chats.stats().hits == found("hygiene_registry_requests_total", name=name, result="hit")
    assert 1 == found("hygiene_registry_requests_total", name=name, result="miss")
    assert None is found("hygiene_registry_size_bytes", name=name)  # nobody measures


def test_what_was_brought_back_is_no_plain_hit(prometheus: CollectorRegistry, name: str) -> None:
    """The results do not overlap: added up they are the lookups."""

    class Chat:
        pass

    chats: Registry[int, Chat] = Registry({1: Chat()}, maxsize=1, name=name)
    held = chats[1]
    chats[2] = Chat()

    assert held is chats[1]  # still somebody's, so it comes back
    found = scrape(prometheus)
    assert 1 == found("hygiene_registry_requests_total", name=name, result="hit")
    assert 1 == found("hygiene_registry_requests_total", name=name, result="rehydrated")


def test_registries_of_one_name_are_added_up(prometheus: CollectorRegistry, name: str) -> None:
    """An attribute of ten thousand objects is one series."""
    alike = [Registry({1: n}, maxsize=3, name=name) for n in range(7)]
    found = scrape(prometheus)

    assert 7 == found("hygiene_registry_count", name=name)
    assert len(alike) == found("hygiene_registry_entry_count", name=name)


def test_registries_without_a_name_are_one_series(prometheus: CollectorRegistry) -> None:
    before = scrape(prometheus)("hygiene_registry_count", name=UNNAMED) or 0
    unnamed = [Registry(maxsize=1) for _ in range(3)]

    assert before + len(unnamed) <= (scrape(prometheus)("hygiene_registry_count", name=UNNAMED) or 0)


def test_dicts_that_share_one_life_are_one_table(prometheus: CollectorRegistry, name: str) -> None:
    """What it holds and drops are rows; lookups in any of them are lookups."""

    @bounded_registry("sessions", "locks", maxsize=2, name=name)
    class Bot:
        def __init__(self) -> None:
            self.sessions: dict[int, int] = {}
            self.locks: dict[int, int] = {}

    bot = Bot()
    for n in range(3):
        bot.sessions[n] = bot.locks[n] = n
    bot.sessions[2]
    bot.locks[2]
    found = scrape(prometheus)

    assert 1 == found("hygiene_registry_count", name=name)
    assert 2 == found("hygiene_registry_entry_count", name=name)
    assert 1 == found("hygiene_registry_evictions_total", name=name, cause="size")
    assert 2 == found("hygiene_registry_requests_total", name=name, result="hit")


@pytest.mark.slow
def test_counters_keep_what_the_dead_have_counted(prometheus: CollectorRegistry, name: str) -> None:
    """A counter that falls looks like a restart, and what it was asked for is lost."""
    found = []
    for _ in range(3):
        chats: Registry[int, int] = Registry(maxsize=1, name=name)
        chats.update({1: 1, 2: 2})
        found.append(scrape(prometheus)("hygiene_registry_evictions_total", name=name, cause="size"))
        del chats
        gc.collect()
    last = scrape(prometheus)

    assert [1, 2, 3] == found
    assert 3 == last("hygiene_registry_evictions_total", name=name, cause="size")
    assert 0 == last("hygiene_registry_count", name=name)
    assert 0 == last("hygiene_registry_entry_count", name=name)


def test_a_number_that_falls_for_a_moment_is_no_restart(name: str) -> None:
    """Numbers are read while other threads count, so a hit may be seen that turns out to be none."""

    class Wavering(Registry[int, int]):
        hits = 10

        def stats(self) -> RegistryStats:
            return RegistryStats(0, None, self.hits, 0, 0, {}, 0, 0, 0)

    registry = Wavering(name=name)
    census = Census(10_000)
    found = []
    for registry.hits in (10, 9, 11):
        found.append(census.take()["hygiene.registry.requests"][name, "hit"])

    assert [10, 10, 11] == found


async def test_an_asynchronous_pool_that_moves_to_another_loop_counts_on(
    prometheus: CollectorRegistry, name: str
) -> None:
    """It begins anew there, and its own numbers with it; the sums do not."""

    async def opened() -> object:
        return object()

    async def use(times: int) -> None:
        for _ in range(times):
            async with pool.acquire():
                pass

    pool = AsyncPool(opened, max_size=1, name=name)
    await use(3)
    before = scrape(prometheus)("hygiene_pool_acquisitions_total", name=name)
    pool._abandon()  # what it does when its loop is gone
    await use(5)  # more than before, so that the number alone would not tell
    after = scrape(prometheus)("hygiene_pool_acquisitions_total", name=name)
    await pool.aclose()

    assert (3, 8) == (before, after)


def test_a_scrape_says_what_a_pool_says_of_itself(prometheus: CollectorRegistry, name: str) -> None:
    """As database clients are told about in OpenTelemetry: by state, with those who wait."""
    pool = Pool(object, max_size=3, name=name)
    with pool.acquire(), pool.acquire():
        pool.lease().release()
        found = scrape(prometheus)
    pool.close()

    assert 2 == found("hygiene_pool_resource_count", name=name, state="used")
    assert 1 == found("hygiene_pool_resource_count", name=name, state="idle")
    assert 0 == found("hygiene_pool_resource_count", name=name, state="opening")
    assert 3 == found("hygiene_pool_resource_max", name=name)
    assert 0 == found("hygiene_pool_pending_requests", name=name)
    assert 3 == found("hygiene_pool_acquisitions_total", name=name)
    assert 3 == found("hygiene_pool_resource_opened_total", name=name)
    assert 0 == scrape(prometheus)("hygiene_pool_resource_max", name=name)  # closed: nothing may be open


def test_a_scrape_says_what_a_saver_says_of_itself(prometheus: CollectorRegistry, name: str, tmp_path: Path) -> None:
    with SQLiteStore(tmp_path / "chats.db") as store:
        saver = WriteBehind(store, name=name)
        saver.put("a", 1)
        saver.flush()
        saver.put("a", 2)
        saver.put("a", 3)
        found = scrape(prometheus)
        saver.close()

    assert 1 == found("hygiene_saver_changes_total", name=name, result="saved")
    assert 1 == found("hygiene_saver_changes_total", name=name, result="superseded")
    assert 1 == found("hygiene_saver_saves_total", name=name, result="ok")
    assert 1 == found("hygiene_saver_pending", name=name)
    assert 0 == found("hygiene_saver_outage", name=name)


def test_a_scrape_says_how_much_memory_there_is(prometheus: CollectorRegistry, name: str) -> None:
    """The process's own without anybody's help; limits as the last reading of a monitor found them."""
    monitor = MemoryMonitor("1TiB", name=name)
    unread = scrape(prometheus)
    reading = monitor.check()
    found = scrape(prometheus)

    assert 0 < (found("hygiene_memory_usage_bytes") or 0)
    assert None is unread("hygiene_memory_limit_bytes", name=name)
    assert 2**40 == found("hygiene_memory_limit_bytes", name=name)
    assert pytest.approx(reading.share) == found("hygiene_memory_utilization_ratio", name=name)
    assert 0 == found("hygiene_memory_level", name=name)
    assert 0 == found("hygiene_memory_alarm", name=name)


def test_a_limit_of_nobody_is_not_told(prometheus: CollectorRegistry, name: str) -> None:
    """Zero would be a limit, and an alarm for whoever divides by it."""
    monitor = MemoryMonitor("1TiB", name=name)
    monitor.check()
    scrape(prometheus)
    del monitor
    gc.collect()

    assert None is scrape(prometheus)("hygiene_memory_limit_bytes", name=name)


def test_a_scrape_says_what_is_left_of_a_budget(prometheus: CollectorRegistry, name: str) -> None:
    budget = MemoryBudget("1MiB")
    chats: Registry[int, bytes] = Registry(max_bytes=budget.share(name, "1KiB"))
    chats[1] = bytes(500)
    found = scrape(prometheus)

    assert 1024 == found("hygiene_memory_budget_limit_bytes", name=name)
    assert budget.used == found("hygiene_memory_budget_usage_bytes", name=name)


def test_names_are_few(name: str) -> None:
    """Whoever names registries after users gets a hundred names, and the sum of the others."""
    registry = CollectorRegistry()
    with instrument(registry, max_names=2):
        many = [Registry({1: 1}, maxsize=1, name=f"{name}-{n}") for n in range(20)]
        first = scrape(registry)
        again = scrape(registry)
    told = {dict(labels)["name"] for metric, labels in first.samples if metric == "hygiene_registry_entry_count"}

    assert 3 == len(told)
    assert OTHER in told
    assert len(many) - 2 <= (first("hygiene_registry_count", name=OTHER) or 0)
    assert [key for key in first.samples if "registry" in key[0]] == [
        key for key in again.samples if "registry" in key[0]
    ]


@pytest.mark.parametrize("most", [0, -1, True, "many", 2.5])
def test_a_number_of_names_is_a_number(most: Any) -> None:
    with pytest.raises(ValueError, match=f"max_names must be a number of names, at least 1; found {most!r}"):
        instrument(CollectorRegistry(), max_names=most)


def test_each_metric_has_a_number(prometheus: CollectorRegistry, name: str, tmp_path: Path) -> None:
    """What the documentation lists is what a scrape gives, neither more nor less."""
    things = everything(name, tmp_path)
    found = scrape(prometheus)
    end(things)

    assert {metric.prometheus for metric in METRICS.values()} == found.names()


# Life


def test_to_instrument_twice_does_no_harm(prometheus: CollectorRegistry) -> None:
    """Applications are started again and again in one process: by tests, by reloaders."""
    first = instrument(prometheus)

    assert first is instrument(prometheus)
    first.close()
    first.close()
    assert "" == generate_latest(prometheus).decode()
    second = instrument(prometheus)
    assert first is not second
    assert "hygiene_memory_usage_bytes" in scrape(prometheus).names()
    second.close()


def test_it_ends_with_its_block() -> None:
    registry = CollectorRegistry()
    with instrument(registry) as exporter:
        assert isinstance(exporter, HygieneCollector)
        assert not exporter.closed

    assert exporter.closed
    assert "" == generate_latest(registry).decode()


def test_a_name_that_is_taken_is_said() -> None:
    registry = CollectorRegistry()
    Gauge("hygiene_registry_entry_count", "somebody else's", registry=registry)
    with pytest.raises(ValueError, match="hygiene_registry_entry_count"):
        instrument(registry)


def test_to_register_takes_no_census(name: str) -> None:
    """Whoever instruments at the start of a program does not wait for what is in it."""

    class Asked(Registry[int, int]):
        times = 0

        def stats(self) -> RegistryStats:
            type(self).times += 1
            return super().stats()

    asked = Asked(name=name)
    with instrument(CollectorRegistry()):
        assert 0 == asked.times


def test_nothing_runs_between_two_scrapes(prometheus: CollectorRegistry, name: str) -> None:
    """A read runs the same code with an exporter as without one, and the janitor has nothing more to do."""
    code = [getattr(Registry, method) for method in ("__getitem__", "get", "__setitem__", "setdefault")]
    agenda, threads = len(janitor._agenda), threading.active_count()
    chats: Registry[int, int] = Registry({1: 1}, maxsize=1, name=name)
    with instrument(CollectorRegistry()):
        after = [getattr(Registry, method) for method in ("__getitem__", "get", "__setitem__", "setdefault")]

        assert code == after
        assert type(chats) is Registry
        assert (agenda, threads) == (len(janitor._agenda), threading.active_count())


def test_the_exporter_keeps_nothing_alive(prometheus: CollectorRegistry, name: str) -> None:
    """What nobody holds any more goes, whether or not it was scraped."""

    class Value:
        alive = 0

        def __init__(self) -> None:
            Value.alive += 1

        def __del__(self) -> None:
            Value.alive -= 1

    chats: Registry[int, Value] = Registry({1: Value()}, name=name)
    scrape(prometheus)
    assert 1 == Value.alive
    del chats
    gc.collect()

    assert 0 == Value.alive


# Faults


def test_what_cannot_be_asked_is_left_out(
    prometheus: CollectorRegistry, name: str, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One object that fails costs its own numbers, and a line in the log once a minute."""
    sound = Registry({1: 1}, name=f"{name}-sound")
    first, second = scrape(prometheus), scrape(prometheus)
    broken.fails = False
    third = scrape(prometheus)

    assert None is first("hygiene_registry_count", name=name)
    assert len(sound) == first("hygiene_registry_entry_count", name=f"{name}-sound")
    assert (1, 2) == (first("hygiene_scrape_errors_total"), second("hygiene_scrape_errors_total"))
    assert ["metrics.source_failed"] == [
        record.event_name for record in caplog.records if getattr(record, "event_name", "").startswith("metrics")
    ]
    assert "cannot count" in caplog.text
    assert 1 == third("hygiene_registry_count", name=broken._name or "")


def test_an_error_that_is_kept_keeps_nothing_else_alive(name: str, broken: Any) -> None:
    """A handler may keep the records of the log, and with an exception what its frames know."""
    kept: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = kept.append  # type: ignore[method-assign]
    other = Registry({1: 1}, name=name)
    gone = weakref.ref(other)
    logging.getLogger("hygiene").addHandler(handler)
    try:
        Census().take()
    finally:
        logging.getLogger("hygiene").removeHandler(handler)
    del other
    gc.collect()

    assert any(record.exc_info for record in kept)
    assert None is gone()
    assert 0 == len(broken)


def test_a_collector_of_somebody_else_that_raises_costs_us_nothing(prometheus: CollectorRegistry, name: str) -> None:
    """The scrape fails, as it would without us; the next one that succeeds has lost nothing."""

    class Broken(Collector):
        def describe(self) -> list[Any]:
            return []

        def collect(self) -> Any:
            raise ArithmeticError("broken")

    chats: Registry[int, int] = Registry({1: 1, 2: 2}, maxsize=1, name=name)
    broken = Broken()
    prometheus.register(broken)
    with pytest.raises(ArithmeticError):
        generate_latest(prometheus)
    prometheus.unregister(broken)

    assert {2: 2} == chats
    assert 1 == scrape(prometheus)("hygiene_registry_evictions_total", name=name, cause="size")


@pytest.mark.slow
def test_a_scrape_while_registries_come_and_go(prometheus: CollectorRegistry, name: str) -> None:
    """Counters only rise, and each scrape is answered."""
    stop = threading.Event()
    begun = threading.Barrier(4)
    failed: list[BaseException] = []

    def churn(last: int) -> None:
        try:
            begun.wait(LIMIT)
            while not stop.is_set():
                chats: Registry[int, int] = Registry(maxsize=1, name=name)
                for n in range(last):
                    chats[n] = n
                    chats.get(n)
                pool = Pool(object, name=name)
                with pool.acquire():
                    pass
                pool.close()
        except BaseException as error:  # noqa: BLE001 - told to the test
            failed.append(error)

    threads = [threading.Thread(target=churn, args=(n,)) for n in (2, 5, 9)]
    for thread in threads:
        thread.start()
    begun.wait(LIMIT)
    rounds = [Numbers(generate_latest(prometheus).decode()) for _ in range(40)]
    stop.set()
    for thread in threads:
        thread.join(LIMIT)
    rises = [
        (metric, labels, before, after)
        for one, other in pairwise(rounds)
        for (metric, labels), before in one.samples.items()
        if metric.endswith("_total") and not before <= (after := other.samples.get((metric, labels), -1))
    ]

    assert [] == failed
    assert [] == rises
    assert 0 == rounds[-1]("hygiene_scrape_errors_total")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on() -> None:
    """Its lock is its own; its pools begin anew, and the sums do not fall."""
    out = run(
        """
        import threading
        from hygiene import Pool, Registry
        from hygiene.integrations.metrics import Census
        chats = Registry({1: 1, 2: 2}, maxsize=1, name="chats")
        pool = Pool(object, name="db")
        for _ in range(2): pool.lease().release()
        census = Census()
        census.take()
        census._lock.acquire()  # another thread is at it, when
        child = os.fork()
        if not child:
            chats[3] = 3
            for _ in range(5): pool.lease().release()
            found = census.take()
            print(found["hygiene.registry.evictions"]["chats", "size"], found["hygiene.pool.acquisitions"]["db",])
            pool.close()
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        pool.close()
        """
    )

    assert "2 7" == " ".join(f"{float(word):g}" for word in out.split())


# Several processes


def run(code: str, **environment: str) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", "import os, sys\n" + textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


WORKER = """
    from hygiene import MemoryMonitor, Registry
    from hygiene.integrations.prometheus import HygieneInstruments, instrument
    exporter = instrument(interval=3600)
    assert type(exporter) is HygieneInstruments and exporter is instrument()
    chats = Registry(maxsize=2, name="chats")
    chats.update({n: n for n in range(EVICTED + 2)})
    monitor = MemoryMonitor(2**40 * EVICTED, name="memory")
    monitor.check()
    exporter.update()
"""
SCRAPE = """
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print(generate_latest(registry).decode())
"""


def worker(evicted: int, then: str = "") -> str:
    return textwrap.dedent(WORKER).replace("EVICTED", str(evicted)) + textwrap.dedent(then)


@pytest.mark.slow
def test_workers_are_added_up(tmp_path: Path) -> None:
    """In multiprocess mode: counters of all, gauges of those that live, and of limits the highest."""
    fork = """
    sys.stdout.flush()
    here, there = os.pipe(), os.pipe()
    if not os.fork():
        # The child has what the parent had, and counts on from zero: what both remember is counted once.
        chats[100] = 1
        exporter.update()
        os.write(there[1], b"x")
        os.read(here[0], 1)
        os._exit(0)
    os.read(there[0], 1)
    """
    done = "\nos.write(here[1], b'x')\nos.wait()\n"
    folder = str(tmp_path)
    run(worker(3), PROMETHEUS_MULTIPROC_DIR=folder)  # has ended, without a word to anybody
    out = run(worker(5, fork) + textwrap.dedent(SCRAPE) + done, PROMETHEUS_MULTIPROC_DIR=folder)
    found = Numbers(out)

    assert 3 + 5 + 1 == found("hygiene_registry_evictions_total", name="chats", cause="size")
    assert 3 * 2**40 < (found("hygiene_memory_limit_bytes", name="memory") or 0)
    assert 3 * 2 == found("hygiene_registry_entry_count", name="chats")
    assert {metric.prometheus for metric in METRICS.values() if ".registry." in metric.name} - {
        "hygiene_registry_size_bytes"
    } == {name for name in found.names() if "_registry_" in name}


@pytest.mark.slow
def test_a_dead_worker_holds_nothing(tmp_path: Path) -> None:
    """Once it was marked as dead, as gunicorn's ``child_exit`` does."""
    pid = run(worker(3, "print(os.getpid())"), PROMETHEUS_MULTIPROC_DIR=str(tmp_path)).split()[-1]
    dead = f"from prometheus_client import multiprocess\nmultiprocess.mark_process_dead({pid})\n"
    found = Numbers(run(dead + textwrap.dedent(SCRAPE), PROMETHEUS_MULTIPROC_DIR=str(tmp_path)))

    assert None is found("hygiene_registry_entry_count", name="chats")
    assert 3 == found("hygiene_registry_evictions_total", name="chats", cause="size")


@pytest.mark.slow
def test_what_was_counted_is_written_down_at_the_end(tmp_path: Path) -> None:
    """A worker that is told to stop costs nothing of what it has counted since the last update."""
    run(worker(3, "chats[100] = 1"), PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    found = Numbers(run(SCRAPE, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)))

    assert 4 == found("hygiene_registry_evictions_total", name="chats", cause="size")


@pytest.mark.slow
def test_the_janitor_writes_down_without_being_told(tmp_path: Path) -> None:
    """Soon after the start and then every *interval*; after `close` no more."""
    out = run(
        """
        import threading, time
        from prometheus_client import CollectorRegistry
        from hygiene import Registry
        from hygiene.integrations.prometheus import HygieneInstruments
        class Told(Registry):
            asked = threading.Semaphore(0)
            def stats(self):
                self.asked.release()
                return super().stats()
        told = Told(name="told")
        registry = CollectorRegistry()
        exporter = HygieneInstruments(registry, interval=0.001)
        print(all(told.asked.acquire(timeout=20) for _ in range(3)))
        exporter.close()
        exporter.close()
        print(exporter._visit(), exporter.closed, list(registry.collect()))
        """,
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    )

    assert "True\nNone True []\n" == out


def test_a_limit_that_nobody_has_any_more_is_written_down_as_none() -> None:
    """An instrument cannot forget a series as a collector can."""
    registry = CollectorRegistry()
    with HygieneInstruments(registry, interval=3600) as exporter:
        monitor = MemoryMonitor("1TiB", name="passing")
        monitor.check()
        exporter.update()
        before = registry.get_sample_value("hygiene_memory_limit_bytes", {"name": "passing"})
        del monitor
        gc.collect()
        exporter.update()
        after = registry.get_sample_value("hygiene_memory_limit_bytes", {"name": "passing"})

    assert (2**40, 0) == (before, after)


def test_instruments_that_do_not_fit_leave_nothing_behind() -> None:
    registry = CollectorRegistry()
    taken = Gauge("hygiene_scrape_errors_total", "somebody else's", registry=registry)
    with pytest.raises(ValueError, match="hygiene_scrape_errors"):
        HygieneInstruments(registry)

    registry.unregister(taken)
    assert [] == list(registry.collect())


@pytest.mark.slow
def test_a_collector_says_nothing_in_multiprocess_mode(tmp_path: Path) -> None:
    """Why there are two ways: the files are all that such a scrape looks at."""
    code = """
    from prometheus_client import REGISTRY
    from hygiene import Registry
    from hygiene.integrations.prometheus import HygieneCollector
    chats = Registry(name="chats")
    HygieneCollector(REGISTRY)
    """
    out = run(textwrap.dedent(code) + textwrap.dedent(SCRAPE), PROMETHEUS_MULTIPROC_DIR=str(tmp_path))

    assert set() == Numbers(out).names()


# Documents


def test_the_reference_lists_each_metric(project_root: Path) -> None:
    """Name, kind, unit and labels, for both worlds."""
    rows = re.findall(
        r"^\| `(hygiene\.[\w.]+)` \| `(hygiene_\w+)` \| ([\w-]+) \| `([^`]+)` \| ([^|]*) \|",
        (project_root / "docs/reference/metrics.md").read_text(),
        re.MULTILINE,
    )
    kinds = {"counter": "counter", "updown": "up-down", "gauge": "gauge"}

    assert [
        (
            metric.name,
            metric.prometheus,
            kinds[metric.kind],
            metric.unit,
            ", ".join(f"`{one}`" for one in metric.labels),
        )
        for metric in METRICS.values()
    ] == [tuple(part.strip() for part in row) for row in rows]


def expressions(node: Any) -> Iterator[str]:
    """Every query in a dashboard."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in {"expr", "query", "definition"} and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for one in node:
            yield from expressions(one)


def asked_for(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics of a query, each with the labels that it chooses by."""
    for metric, chosen in re.findall(r"\b(hygiene_\w+)(?:\{([^}]*)\})?", expression):
        yield metric, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", chosen))


def test_the_dashboard_asks_for_what_a_scrape_gives(
    prometheus: CollectorRegistry, name: str, tmp_path: Path, project_root: Path
) -> None:
    """Each query names metrics that are there, and chooses by labels that they have."""
    things = everything(name, tmp_path)
    found = scrape(prometheus)
    end(things)
    labels: dict[str, set[str]] = {}
    for metric, pairs in found.samples:
        labels.setdefault(metric, {"job", "instance"}).update(dict(pairs))
    dashboard = json.loads((project_root / "docs/dashboards/hygiene.json").read_text())
    queries = [
        query for query in expressions(dashboard["panels"] + dashboard["templating"]["list"]) if query != "prometheus"
    ]
    wrong = [
        (query, metric, chosen)
        for query in queries
        for metric, chosen in asked_for(query)
        if metric not in labels or not chosen <= labels[metric]
    ]
    grouped = [
        (query, by)
        for query in queries
        for by in re.findall(r"by \(([^)]*)\)", query)
        for metric, _ in asked_for(query)
        if not set(re.split(r",\s*", by)) <= labels.get(metric, set())
    ]

    assert [] == wrong
    assert [] == grouped
    assert all(list(asked_for(query)) for query in queries)
    assert len(queries) > 10


def test_each_alert_asks_for_what_a_scrape_gives(project_root: Path) -> None:
    """The rules in the documentation name metrics that exist, with labels that they have."""
    text = (project_root / "docs/how-to/alerts.md").read_text()
    known = {metric.prometheus: {*metric.labels, "job", "instance"} for metric in METRICS.values()}
    rules = re.findall(r"^ +expr: (.+)$", text, re.MULTILINE)
    wrong = [
        (rule, metric)
        for rule in rules
        for metric, chosen in asked_for(rule)
        if metric not in known or not chosen <= known[metric]
    ]

    assert [] == wrong
    assert all(list(asked_for(rule)) for rule in rules)
    assert len(rules) >= 5


def test_the_log_is_quiet_where_nothing_fails(prometheus: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="hygiene"):
        scrape(prometheus)

    assert [] == [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
