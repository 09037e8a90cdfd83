"""Durations and sizes are converted once, at the edge."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene.units import nbytes, seconds


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (90, 90.0), (0.5, 0.5), ("90s", 90.0), ("90", 90.0), ("30m", 1800.0), ("30min", 1800.0),
        ("2h", 7200.0), ("1.5h", 5400.0), ("1d", 86_400.0), ("1w", 604_800.0), ("250ms", 0.25),
        (" 2 H ", 7200.0), (timedelta(minutes=1), 60.0), (timedelta(milliseconds=5), 0.005),
    ],
)  # fmt: skip
def test_a_duration_in_seconds(text: Any, wanted: float) -> None:
    assert wanted == seconds(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (1, 1), ("1", 1), ("10B", 10), ("500kB", 500_000), ("500KB", 500_000), ("64MiB", 67_108_864),
        ("1GiB", 2**30), ("1.5 kib", 1536), ("2TB", 2 * 10**12), ("1TiB", 2**40),
    ],
)  # fmt: skip
def test_a_size_in_bytes(text: Any, wanted: int) -> None:
    assert wanted == nbytes(text)


@pytest.mark.parametrize("value", [0, -1, 0.0, "0s", float("inf"), float("nan"), timedelta(0), timedelta(days=-1)])
def test_a_duration_is_positive_and_finite(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"idle must be positive: seconds, a timedelta, or text.*found .*Leave it out for no limit"
    ):
        seconds(value, "idle")


@pytest.mark.parametrize("text", ["", "h", "2 parsecs", "2h30m", "-2h", "1e3s", "2h ago", "½h", "٣x"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"ttl must be positive.*\"2h\".*found"):
        seconds(text, "ttl")


@pytest.mark.parametrize("text", ["", "MiB", "64 potatoes", "-1kB", "1e3", "0", "0.4"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"max_bytes must be at least 1.*\"64MiB\".*found"):
        nbytes(text, "max_bytes")


@pytest.mark.parametrize("value", [None, [], True, b"1s"])
def test_what_is_of_the_wrong_kind(value: Any) -> None:
    with pytest.raises(TypeError, match="found"):
        seconds(value)
    with pytest.raises(TypeError, match="found"):
        nbytes(value)
    with pytest.raises(TypeError, match=r"found 1\.5"):
        nbytes(1.5)  # type: ignore[arg-type]


@given(st.text())
def test_any_text_is_converted_or_refused(text: str) -> None:
    """Nothing but a positive number, or the documented error."""
    for convert in (seconds, nbytes):
        message = "found"
        converted: float = 1
        try:
            converted = convert(text)
        except ValueError as error:
            message = str(error)
        assert converted > 0
        assert "found" in message


@given(st.integers(1, 10**9), st.sampled_from(["s", "m", "h", "d"]))
def test_text_and_timedelta_agree(number: int, unit: str) -> None:
    one = {"s": 1, "m": 60, "h": 3600, "d": 86_400}[unit]

    assert float(number * one) == seconds(f"{number}{unit}") == seconds(number * one)
