"""OpenTelemetry: what `metrics` lists, as observable instruments."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Self

from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter_provider

from hygiene.integrations.metrics import METRICS, Census, Samples
from hygiene.janitor import survive_fork

__all__ = ["HygieneInstrumentation", "instrument"]

_SHARED = 1.0
"""Seconds for which the instruments of one collection share a census. A reader asks them right after each other."""


class HygieneInstrumentation:
    """
    Tells the readers of *meter*, when they collect, what everything that is alive says of itself.

    Made by `instrument`. Nothing is counted for it and nothing runs between two collections. Safe for threads, and
    after a fork.
    """

    def __init__(self, meter: Meter, *, max_names: int = 100) -> None:
        self._census = Census(max_names)
        self._samples: Samples = {}
        self._taken = 0.0
        self._begin()
        self.closed = False
        """Whether `close` was called."""
        makers = {
            "counter": meter.create_observable_counter,
            "updown": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for name, metric in METRICS.items():
            makers[metric.kind](
                name, callbacks=[partial(self._observe, name)], unit=metric.unit, description=metric.text
            )
        survive_fork(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._asked: set[str] = set(METRICS)

    def _observe(self, name: str, options: CallbackOptions) -> Iterable[Observation]:  # noqa: ARG002 - no deadline: short
        if self.closed:
            return []
        with self._lock:
            # One census for all instruments of a collection: whoever asks for the same again has begun another.
            if name in self._asked or time.monotonic() - self._taken > _SHARED:
                self._samples = self._census.take()
                self._taken = time.monotonic()
                self._asked.clear()
            self._asked.add(name)
            found = self._samples[name]
        labels = METRICS[name].labels
        return [Observation(value, dict(zip(labels, values, strict=True))) for values, value in found.items()]

    def close(self) -> None:
        """Observe nothing more; an instrument cannot be taken out of a meter. Twice does no harm."""
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _after_fork(self) -> None:
        self._begin()


def instrument(meter_provider: MeterProvider | None = None, *, max_names: int = 100) -> HygieneInstrumentation:
    """
    Export everything that is alive, from now on; to be called once for each meter provider.

    Args:
        meter_provider: Where the meter ``hygiene`` comes from; default: the global one, which may be set later.
        max_names: How many names of one kind are told apart; those that come later share "other". 100: with some
            fifteen series each that is what one dashboard and a small backend bear.

    Returns:
        What ends it: ``close()``, or leaving a ``with``.

    Raises:
        ValueError: *max_names* is not a number of names, at least 1.
    """
    provider = get_meter_provider() if meter_provider is None else meter_provider
    return HygieneInstrumentation(provider.get_meter("hygiene"), max_names=max_names)
