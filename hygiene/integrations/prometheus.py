"""Prometheus: what `metrics` lists, by ``prometheus_client``.

Outside multiprocess mode a collector looks when it is scraped. In multiprocess mode (``PROMETHEUS_MULTIPROC_DIR``) a
scrape is answered by whichever worker gets it, from files that direct instruments write; collectors of one's own are
not asked there at all. So each worker has direct instruments, and brings them up to date every few seconds.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hygiene.cleanup import register_cleanup
from hygiene.integrations.metrics import METRICS, Census
from hygiene.janitor import aside, janitor, survive_fork
from hygiene.units import Duration, seconds

__all__ = ["HygieneCollector", "HygieneInstruments", "instrument"]

_EXPORTERS: weakref.WeakKeyDictionary[CollectorRegistry, weakref.ref[_Exporter]] = weakref.WeakKeyDictionary()
_LAST = -1_000_000
"""The priority of a cleanup that comes after those of the application: what they do is to be counted."""


class _Exporter:
    """What `instrument` has put into a registry."""

    closed = False
    """Whether `close` was called."""

    def close(self) -> None:
        """Take everything out of the registry again. Twice does no harm."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class HygieneCollector(_Exporter, Collector):
    """
    Tells Prometheus, when it asks, what everything that is alive says of itself. Made by `instrument`.

    Nothing is counted for it and nothing runs between two scrapes. Safe for threads, and after a fork, where the child
    goes on from the parent's sums.

    Args:
        registry: The one that it puts itself into. It is held weakly.
        max_names: How many names of one kind are told apart; those that come later share "other".

    Raises:
        ValueError: *max_names* is not a number of names, at least 1, or another collector has taken one of the
            metrics' names.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, max_names: int = 100) -> None:
        self._census = Census(max_names)
        self._registry = weakref.ref(registry)
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """The names, without numbers: so that to register it takes no census."""
        yield from (self._family(name) for name in METRICS)

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        for name, samples in self._census.take().items():
            family = self._family(name)
            for labels, value in sorted(samples.items()):
                family.add_metric(labels, value)
            yield family

    @staticmethod
    def _family(name: str) -> CounterMetricFamily | GaugeMetricFamily:
        metric = METRICS[name]
        family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
        return family(metric.prometheus, metric.text, labels=metric.labels)

    def close(self) -> None:
        """Take it out of the registry again. Twice does no harm."""
        registry = self._registry()
        if not self.closed and registry is not None:
            registry.unregister(self)
        super().close()


class HygieneInstruments(_Exporter):
    """
    The same metrics as counters and gauges that are written down every *interval* seconds. Made by `instrument`.

    For multiprocess mode: gauges are those of the processes that live (``mark_process_dead`` takes a worker's away) and
    are added up over them, limits and levels the highest of all; counters keep what dead workers have counted. What was
    counted is written down at the shutdown, too; a worker that is killed costs the last *interval*.

    The janitor does it, in a thread that lives for one update. Safe for threads, and after a fork: a child counts on
    from zero in files of its own. It is kept alive until `close`.

    Args:
        registry: The one to put the instruments into.
        max_names: How many names of one kind are told apart; those that come later share "other".
        interval: Seconds, or text such as ``"15s"``, between two updates. 15: as often as Prometheus is usually told
            to scrape.

    Raises:
        ValueError: *max_names* or *interval* is not positive, or one of the metrics' names is taken in *registry*.
    """

    def __init__(
        self, registry: CollectorRegistry = REGISTRY, *, max_names: int = 100, interval: Duration = 15.0
    ) -> None:
        self._interval = seconds(interval, "interval")
        self._census = Census(max_names)
        self._registry = weakref.ref(registry)
        self._lock = threading.Lock()
        self._written: dict[tuple[str, ...], float] = {}
        self._instruments: dict[str, Counter | Gauge] = {}
        try:
            for name in METRICS:
                self._instruments[name] = self._make(name, registry)
        except BaseException:
            self._unregister()
            raise
        _living.add(self)
        survive_fork(self)
        self._at_exit = register_cleanup(self.update, on="exit", priority=_LAST, name="metrics")
        janitor.watch(self, 0.0)

    @staticmethod
    def _make(name: str, registry: CollectorRegistry) -> Counter | Gauge:
        metric = METRICS[name]
        if metric.kind == "counter":
            return Counter(metric.prometheus, metric.text, metric.labels, registry=registry)
        mode: Any = "livesum" if metric.kind == "updown" else "livemax"
        return Gauge(metric.prometheus, metric.text, metric.labels, registry=registry, multiprocess_mode=mode)

    def update(self) -> None:
        """Write down the numbers of this moment."""
        with self._lock:
            samples = {
                (name, *labels): value for name, found in self._census.take().items() for labels, value in found.items()
            }
            # A limit that nobody has any more cannot be taken back from the file.
            gone = {series: 0.0 for series in self._written if METRICS[series[0]].kind == "gauge"}
            for series, value in {**gone, **samples}.items():
                metric = self._instruments[series[0]]
                one = metric.labels(*series[1:]) if len(series) > 1 else metric
                if isinstance(one, Counter):
                    one.inc(value - self._written.get(series, 0.0))
                else:
                    one.set(value)
                self._written[series] = value

    def _visit(self) -> float | None:
        if self.closed:
            return None
        if not self._lock.locked():  # else the last one is still at it: the disk is slow
            aside(self.update, "metrics")
        return self._interval

    def close(self) -> None:
        """Write down nothing more, and take the instruments out of the registry. Twice does no harm."""
        if not self.closed:
            super().close()
            self._at_exit.cancel()
            _living.discard(self)
            self._unregister()

    def _unregister(self) -> None:
        registry = self._registry()
        if registry is not None:
            for instrument_ in self._instruments.values():
                registry.unregister(instrument_)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


_living: set[HygieneInstruments] = set()


def instrument(
    registry: CollectorRegistry = REGISTRY, *, max_names: int = 100, interval: Duration = 15.0
) -> HygieneCollector | HygieneInstruments:
    """
    Export everything that is alive, from now on; to be called once for each process, or as often as one likes.

    Args:
        registry: Where to put it. In multiprocess mode *not* the registry that is made for a scrape.
        max_names: How many names of one kind are told apart; those that come later share "other". 100: with some
            fifteen series each that is what one dashboard and a small Prometheus bear.
        interval: Seconds between two updates in multiprocess mode; elsewhere it means nothing, since a scrape looks.

    Returns:
        A `HygieneInstruments` in multiprocess mode, and else a `HygieneCollector`; the one that *registry* has
        already, if there is one. ``close()`` ends it.

    Raises:
        ValueError: a number is not positive, or somebody else has taken one of the metrics' names in *registry*.
    """
    with _lock:
        known = _EXPORTERS.get(registry)
        exporter = known() if known is not None else None
        if exporter is None or exporter.closed:
            exporter = (
                HygieneInstruments(registry, max_names=max_names, interval=interval)
                if _writes_files()
                else HygieneCollector(registry, max_names=max_names)
            )
            _EXPORTERS[registry] = weakref.ref(exporter)
        return exporter  # type: ignore[return-value] # nothing else is put there


_lock = threading.Lock()


def _writes_files() -> bool:
    # What prometheus_client has decided when it was imported. The variable may have been set, or taken away, since.
    return values.ValueClass is not values.MutexValue
