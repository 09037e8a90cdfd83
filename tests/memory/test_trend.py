"""Growth over hours: leaks are found, and a busy day is not one."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable

import pytest

from hygiene.trend import Growth, Trend, mann_kendall, theil_sen

DAY = 24 * 60
Series = Callable[[float], float]


def white(draw: random.Random) -> Series:
    return lambda minute: 500 + draw.gauss(0, 20)


def ar1(draw: random.Random, memory: float = 0.9) -> Series:
    state = 0.0

    def value(minute: float) -> float:
        nonlocal state
        state = memory * state + draw.gauss(0, 20 * math.sqrt(1 - memory * memory))
        return 500 + state

    return value


def sawtooth(draw: random.Random, period: float = 45) -> Series:
    phase = draw.random() * period
    return lambda minute: 500 + 200 * ((minute + phase) % period) / period + draw.gauss(0, 5)


def warm_up(draw: random.Random, minutes: float = 20) -> Series:
    return lambda minute: 200 + 400 * (1 - math.exp(-minute / minutes)) + draw.gauss(0, 10)


def leak(draw: random.Random) -> Series:
    return lambda minute: 500 + minute + draw.gauss(0, 20)


def changes(series: Series, minutes: int, a_minute: int = 1) -> list[tuple[float, Growth]]:
    """When something new was found, and what: minutes since the start."""
    trend = Trend()
    found, last = [], Growth.STEADY
    for reading in range(minutes * a_minute):
        growth = trend.add(60.0 * reading / a_minute, series(reading / a_minute))
        if growth is not last:
            found.append((reading / a_minute, growth))
            last = growth
    return found


def told(found: list[tuple[float, Growth]], growth: Growth) -> int:
    return [kind for _, kind in found].count(growth)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "kind",
    [
        white,
        ar1,
        lambda draw: ar1(draw, 0.97),
        sawtooth,
        lambda draw: sawtooth(draw, 180),
        warm_up,
        lambda draw: warm_up(draw, 60),
    ],
    ids=["white", "ar1", "ar1 slow", "sawtooth", "long sawtooth", "warm-up", "long warm-up"],
)
def test_a_day_without_a_leak_has_at_most_one_false_alarm(kind: Callable[[random.Random], Series], seed: int) -> None:
    """Noise, noise with a memory, work that comes and goes, and caches that fill: at most one alarm and one warning."""
    found = changes(kind(random.Random(seed)), DAY)

    assert told(found, Growth.GROWING) <= 1
    assert told(found, Growth.RISING) <= 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("a_minute", [1, 12], ids=["one reading a minute", "twelve"])
def test_a_leak_of_a_megabyte_a_minute_is_found_within_125_minutes(seed: int, a_minute: int) -> None:
    """Under noise of 20 MB."""
    found = changes(leak(random.Random(seed)), 126, a_minute)

    assert [Growth.GROWING] == [growth for minute, growth in found if growth is Growth.GROWING and minute <= 125]


def test_a_leak_is_found_under_work_that_comes_and_goes() -> None:
    """A sawtooth of 200 MB hides the slope for a while, and not the floor."""
    draw = random.Random(1)
    work = sawtooth(draw, 45)

    found = changes(lambda minute: work(minute) + 2 * minute, 200)

    assert [Growth.RISING] == [growth for _, growth in found]


@pytest.mark.slow
def test_a_leak_that_begins_late_is_found() -> None:
    draw = random.Random(2)

    found = changes(lambda minute: 500 + max(0.0, minute - 600) + draw.gauss(0, 5), 760)

    assert Growth.GROWING is found[-1][1]
    assert 600 < found[0][0] <= 725


@pytest.mark.slow
def test_what_grew_and_came_back_is_no_leak_and_does_not_alarm_again() -> None:
    """A job of three hours, every six hours: told once, until it needs more than it ever did."""
    draw = random.Random(3)

    def jobs(minute: float) -> float:
        within = minute % 360
        return 500 + (within if within < 180 else 0) + draw.gauss(0, 3)

    found = changes(jobs, DAY)

    assert 1 == told(found, Growth.GROWING)
    assert Growth.STEADY is found[-1][1]


def test_nothing_is_said_in_the_first_two_hours() -> None:
    assert [] == changes(lambda minute: 500 + 10 * minute, 120)


def test_readings_of_a_minute_count_with_their_least() -> None:
    """What is given back within the minute is no growth."""
    trend = Trend()
    for reading in range(12 * 180):
        trend.add(reading * 5.0, 500.0 if reading % 12 == 7 else 500.0 + reading)

    assert Growth.STEADY is trend.growth
    assert 0.0 == trend.rate


def test_the_rate_is_per_hour() -> None:
    trend = Trend()
    for minute in range(131):
        trend.add(60.0 * minute, 2.0 * minute)

    assert 120.0 == pytest.approx(trend.rate)
    assert 2.0 == trend.hours
    assert "<Trend growing, +120 an hour, 130 points>" == repr(trend)


def test_a_long_pause_is_forgotten_and_a_short_one_is_filled() -> None:
    """A machine that slept for a night knows nothing about the night."""
    trend = Trend()
    for minute in range(130):
        trend.add(60.0 * minute, 500.0)
    trend.add(60.0 * 140, 500.0)
    short = len(trend._points)
    trend.add(60.0 * 600, 900.0)

    assert 140 == short
    assert [] == list(trend._points)
    assert 0.0 == trend.rate


@pytest.mark.slow
def test_the_state_does_not_grow() -> None:
    """A month of readings leaves no more than a day of them."""
    trend = Trend()
    sizes = []
    for minute in range(3000):
        trend.add(60.0 * minute, 500.0 + minute % 7)
        sizes.append(len(trend._points) + sum(sys.getsizeof(value) for value in vars(trend).values()))

    assert sizes[1000] >= sizes[-1] - 64


def test_the_median_slope_does_not_care_about_outliers() -> None:
    values = [float(n) for n in range(50)]
    values[10], values[30] = 1e9, -1e9

    assert 1.0 == pytest.approx(theil_sen(values), rel=0.05)
    assert 0.0 == theil_sen([5.0])


def test_mann_kendall_is_sure_of_what_rises_and_not_of_what_is_flat() -> None:
    """Its figure is in standard deviations; a series that remembers is worth less."""
    rising = [float(n) for n in range(120)]

    assert 16 < mann_kendall(rising) < 17
    assert mann_kendall([-value for value in rising]) < -16
    assert 0.0 == mann_kendall([5.0] * 120)
    assert 0.0 == mann_kendall([1.0, 2.0])
    assert mann_kendall(rising, memory=0.9) < 4
