"""The exporter for OpenTelemetry, with its SDK."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
    Sum,
)

from hygiene import MemoryMonitor, Pool, Registry, RegistryStats
from hygiene.integrations.metrics import METRICS, OTHER
from hygiene.integrations.opentelemetry import HygieneInstrumentation, instrument

LIMIT = 30.0


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader])
    with instrument(provider, max_names=10_000):
        yield provider
    provider.shutdown()


def metrics_of(data: MetricsData | None) -> dict[str, Any]:
    assert data is not None
    return {
        metric.name: metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def numbers(reader: InMemoryMetricReader) -> dict[tuple[str, frozenset[tuple[str, Any]]], Any]:
    """What a collection says, by metric and attributes."""
    return {
        (metric.name, frozenset((point.attributes or {}).items())): point.value
        for metric in metrics_of(reader.get_metrics_data()).values()
        for point in metric.data.data_points
    }


def number(reader: InMemoryMetricReader, metric: str, **attributes: str) -> Any:
    return numbers(reader).get((metric, frozenset(attributes.items())))


@pytest.mark.usefixtures("provider")
def test_a_collection_says_what_a_registry_says_of_itself(reader: InMemoryMetricReader, name: str) -> None:
    """By the names of the reference; the registry's name is the only label that a program chooses."""
    chats: Registry[int, int] = Registry(maxsize=2, name=name)
    chats.update({n: n for n in range(5)})
    chats[4]
    chats.get(0)
    found = numbers(reader)
    of = ("name", name)

    assert 2 == found["hygiene.registry.entry.count", frozenset({of})]
    assert 1 == found["hygiene.registry.requests", frozenset({of, ("result", "hit")})]
    assert 1 == found["hygiene.registry.requests", frozenset({of, ("result", "miss")})]
    assert 3 == found["hygiene.registry.evictions", frozenset({of, ("cause", "size")})]
    assert {key for _, pairs in found for key, _ in pairs} <= {"name", "result", "cause", "state"}


@pytest.mark.usefixtures("provider")
def test_a_collection_says_what_pools_and_memory_say(reader: InMemoryMetricReader, name: str) -> None:
    monitor = MemoryMonitor("1TiB", name=name)
    monitor.check()
    with Pool(object, max_size=3, name=name) as pool, pool.acquire():
        found = numbers(reader)
    of = ("name", name)

    assert 1 == found["hygiene.pool.resource.count", frozenset({of, ("state", "used")})]
    assert 3 == found["hygiene.pool.resource.max", frozenset({of})]
    assert 2**40 == found["hygiene.memory.limit", frozenset({of})]
    assert 0 < found["hygiene.memory.usage", frozenset()]


@pytest.mark.usefixtures("provider")
def test_each_metric_has_its_kind_unit_and_description(reader: InMemoryMetricReader, name: str) -> None:
    """What adds up is a sum, what only rises is monotonic, and sums say so as the conventions want it."""
    monitor = MemoryMonitor("1TiB", name=name)
    monitor.check()
    chats: Registry[int, int] = Registry({1: 1}, name=name)
    found = metrics_of(reader.get_metrics_data())
    kinds = {
        metric.name: (
            "gauge" if not isinstance(metric.data, Sum) else "counter" if metric.data.is_monotonic else "updown"
        )
        for metric in found.values()
    }

    assert 1 == len(chats)
    assert {metric: METRICS[metric].kind for metric in found} == kinds
    assert {metric: (METRICS[metric].unit, METRICS[metric].text) for metric in found} == {
        metric.name: (metric.unit, metric.description) for metric in found.values()
    }
    assert {"hygiene.registry.requests", "hygiene.memory.limit", "hygiene.memory.usage"} <= set(found)


def test_names_are_as_the_conventions_want_them() -> None:
    """Lower case, dots between namespaces; counts in braces; sentences that end."""
    assert [] == [metric for metric in METRICS if not re.fullmatch(r"hygiene(\.[a-z_]+)+", metric)]
    assert [] == [metric.unit for metric in METRICS.values() if not re.fullmatch(r"\{[a-z]+\}|By|By/s|1", metric.unit)]
    assert [] == [metric.text for metric in METRICS.values() if not re.fullmatch(r"\w.*\.", metric.text)]
    # A metric's name must not be the namespace of another.
    assert [] == [one for one in METRICS for other in METRICS if other.startswith(f"{one}.")]


@pytest.mark.usefixtures("provider")
def test_counters_keep_what_the_dead_have_counted(reader: InMemoryMetricReader, name: str) -> None:
    found = []
    for _ in range(3):
        chats: Registry[int, int] = Registry(maxsize=1, name=name)
        chats.update({1: 1, 2: 2})
        found.append(number(reader, "hygiene.registry.evictions", name=name, cause="size"))
        del chats

    assert [1, 2, 3] == found


def test_names_are_few(reader: InMemoryMetricReader, name: str) -> None:
    provider = MeterProvider([reader])
    with instrument(provider, max_names=1):
        many = [Registry({1: 1}, name=f"{name}-{n}") for n in range(5)]
        found = numbers(reader)
    told = {dict(pairs)["name"] for metric, pairs in found if metric == "hygiene.registry.count"}
    provider.shutdown()

    assert 2 == len(told)
    assert OTHER in told
    assert len(many) - 1 <= found["hygiene.registry.count", frozenset({("name", OTHER)})]


class Asked(Registry[int, int]):
    """A registry that counts how often it is asked."""

    times = 0

    def stats(self) -> RegistryStats:
        self.times += 1
        return super().stats()


@pytest.mark.usefixtures("provider")
def test_one_collection_asks_once(reader: InMemoryMetricReader, name: str) -> None:
    """However many instruments there are; and the next one asks again."""
    asked = Asked(name=name)
    seen = [asked.times]
    for _ in range(2):
        reader.get_metrics_data()
        seen.append(asked.times)

    assert [0, 1, 2] == seen


def test_each_reader_gets_the_numbers_of_its_moment(name: str) -> None:
    """Two readers do not share what is old: the second sees what happened since the first."""
    one, other = InMemoryMetricReader(), InMemoryMetricReader()
    provider = MeterProvider([one, other])
    with instrument(provider, max_names=10_000):
        chats: Registry[int, int] = Registry({1: 1}, name=name)
        first = number(one, "hygiene.registry.entry.count", name=name)
        chats[2] = 2
        second = number(other, "hygiene.registry.entry.count", name=name)
    provider.shutdown()

    assert (1, 2) == (first, second)


def test_old_numbers_are_not_handed_out(provider: MeterProvider, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that asks for something else an hour later gets the numbers of then."""
    instrumentation = instrument(provider)
    asked = Asked(name=name)
    options: Any = None
    now = 0.0
    monkeypatch.setattr("hygiene.integrations.opentelemetry.time.monotonic", lambda: now)
    list(instrumentation._observe("hygiene.registry.count", options))
    now = 0.5
    list(instrumentation._observe("hygiene.pool.dropped", options))
    shared = asked.times
    now = 3600.0
    list(instrumentation._observe("hygiene.pool.timeouts", options))
    instrumentation.close()

    assert (1, 2) == (shared, asked.times)


def test_it_says_nothing_once_it_is_closed(reader: InMemoryMetricReader, name: str) -> None:
    """Twice does no harm."""
    provider = MeterProvider([reader])
    asked = Asked(name=name)
    with instrument(provider) as instrumentation:
        assert isinstance(instrumentation, HygieneInstrumentation)
        assert {} != numbers(reader)
    instrumentation.close()
    times = asked.times

    assert instrumentation.closed
    data = reader.get_metrics_data()
    assert None is data or {} == {
        metric.name: metric for metric in metrics_of(data).values() if metric.data.data_points
    }
    assert times == asked.times
    provider.shutdown()


@pytest.mark.parametrize("most", [0, True, "many"])
def test_a_number_of_names_is_a_number(most: Any) -> None:
    with pytest.raises(ValueError, match="max_names must be a number of names"):
        instrument(MeterProvider(), max_names=most)


# Faults


def test_an_exporter_that_raises_harms_nobody(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """What it could not send is in the next batch, since sums go on; the registry does not notice."""
    caplog.set_level(logging.CRITICAL, logger="opentelemetry")
    sent: list[Any] = []

    class Exporter(MetricExporter):
        fails = True

        def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_: Any) -> MetricExportResult:
            if self.fails:
                raise ConnectionError("the collector is down")
            sent.append(metrics_of(metrics_data))
            return MetricExportResult.SUCCESS

        def force_flush(self, timeout_millis: float = 10_000) -> bool:
            return True

        def shutdown(self, timeout_millis: float = 30_000, **_: Any) -> None: ...

    exporter = Exporter()
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=float("inf"))
    provider = MeterProvider([reader])
    with instrument(provider, max_names=10_000):
        chats: Registry[int, int] = Registry(maxsize=1, name=name)
        chats.update({1: 1, 2: 2})
        reader.collect()
        chats[3] = 3
        exporter.fails = False
        reader.collect()
    provider.shutdown()
    points = {
        point.attributes["cause"]: point.value
        for point in sent[0]["hygiene.registry.evictions"].data.data_points
        if point.attributes["name"] == name
    }

    assert {3: 3} == chats
    assert 2 == points["size"]


@pytest.mark.usefixtures("provider")
def test_what_cannot_be_asked_is_left_out(
    reader: InMemoryMetricReader, name: str, broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One object that fails costs its own numbers, and a line in the log."""
    sound = Registry({1: 1}, name=f"{name}-sound")
    found = numbers(reader)

    assert ("hygiene.registry.count", frozenset({("name", name)})) not in found
    assert 0 == len(broken)
    assert len(sound) == found["hygiene.registry.entry.count", frozenset({("name", f"{name}-sound")})]
    assert 1 == found["hygiene.scrape.errors", frozenset()]
    assert "cannot count" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on() -> None:
    """A fork in the middle of a collection leaves no lock behind."""
    code = """
    import os, sys
    from opentelemetry.sdk.metrics import MeterProvider
    from hygiene import Registry
    from hygiene.integrations.opentelemetry import instrument
    chats = Registry({1: 1}, name="chats")
    instrumentation = instrument(MeterProvider())
    instrumentation._lock.acquire()  # another thread is at it
    child = os.fork()
    if not child:
        print([one.value for one in instrumentation._observe("hygiene.registry.entry.count", None)])
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )

    assert "[1]\n" == done.stdout


@pytest.mark.slow
def test_the_global_provider_may_be_set_later() -> None:
    """Libraries instrument when they are imported, and applications configure when they start."""
    code = """
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from hygiene import Registry
    from hygiene.integrations.opentelemetry import instrument
    instrument()
    chats = Registry({1: 1}, name="chats")
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    names = {m.name for m in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics}
    print("hygiene.registry.entry.count" in names)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=LIMIT, check=True
    )

    assert "True\n" == done.stdout
