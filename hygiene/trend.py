"""Is it growing? Statistics over hours of readings, in a state of fixed size, with few false alarms.

Theory of operation

Readings are gathered into minutes, and a minute counts with its least reading: what is given back within the minute is
no growth. The last three hours of minutes are kept, 180 numbers, and looked at once a minute.

Two questions are asked of them. *Floor*: is the least of the last hour above that of the hour before, and that above
the one before it, by more than the noise explains? Work that comes and goes leaves the floor where it is. That is worth
a warning. *Slope*, over two hours: the Theil-Sen estimate [1], the median of the slopes of all pairs, does not care
about outliers; the Mann-Kendall statistic [2] says whether so many pairs rise by chance. Memory remembers, one reading
predicts the next, and then chance rises and falls for longer: so the statistic is divided by what an AR(1) process of
the same autocorrelation does to its spread [3]. If the last hour goes on at much the same slope (what warms up does
not), that is an alarm.

A cycle that is longer than the window cannot be told from a leak while it rises for the first time. The height that
was reached is remembered for a day, and below it nothing alarms again.

[1] P. K. Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 63 (1968).
[2] H. B. Mann, Nonparametric tests against trend, Econometrica 13 (1945).
[3] K. H. Hamed and A. R. Rao, A modified Mann-Kendall trend test for autocorrelated data, J. Hydrology 204 (1998).
"""

from __future__ import annotations

import enum
import math
import statistics
from collections import deque
from collections.abc import Sequence
from itertools import islice, pairwise

__all__ = ["Growth", "Trend", "mann_kendall", "theil_sen"]

_SURE = 3.6
"""Mann-Kendall: that far from zero once in a thousand windows without a trend, to either side."""
_CLEAR = 4.0
"""Growth over the window, in standard deviations of the noise, below which it is not worth an alarm."""
_LIFT = 1.25
"""Rise of the floor from hour to hour, in the same measure; the noise of a floor is half of that of a reading."""
_SMALL = 0.02
"""Growth over the window, as a part of what there is, that nobody has to hear of."""
_MEMORY = 0.9
"""The autocorrelation that is believed at most, or the surest of all trends would not be sure any more."""
_STILL = 0.6
"""The slope of the last hour, as a part of the whole one, below which it is levelling off."""
_CALM = 30
"""Minutes without a reason, after which a state is left: one crossing of a threshold is told once."""
_DAY = 24 * 60
_BACK = 5
"""Points in a row that have fallen by half of the growth: then it has come back."""
_GAP = 30
"""Points without a reading that are taken to be as the last one was."""


class Growth(enum.StrEnum):
    """What the readings of the last hours say."""

    STEADY = "steady"
    """No growth that noise does not explain, or not enough readings yet."""
    RISING = "rising"
    """The floor has risen twice: the least of each of the last three hours is above the one before. A warning."""
    GROWING = "growing"
    """It grows, and goes on growing. An alarm."""


def theil_sen(values: Sequence[float]) -> float:
    """
    The slope of *values*, which are equally spaced in time, per step: the median slope of all pairs.

    Up to 29 % of the values may be arbitrarily wrong. Takes O(n^2); 0.0 for less than two values.
    """
    n = len(values)
    slopes = [(values[j] - values[i]) / (j - i) for i in range(n) for j in range(i + 1, n)]
    return statistics.median(slopes) if slopes else 0.0


def mann_kendall(values: Sequence[float], memory: float = 0.0) -> float:
    """
    How sure a trend in *values* is, in standard deviations: positive if they rise, about within 2 if by chance.

    Args:
        values: Equally spaced in time. Ties count for neither side.
        memory: Autocorrelation from one value to the next, from 0 to below 1: the more, the less is a rise worth.
    """
    n = len(values)
    if n < 3:  # noqa: PLR2004 - two points always have a trend
        return 0.0
    score = sum((b > a) - (b < a) for i, a in enumerate(values) for b in islice(values, i + 1, None))
    spread = math.sqrt(n * (n - 1) * (2 * n + 5) / 18 * (1 + memory) / (1 - memory))
    return (score - math.copysign(1, score)) / spread if score else 0.0


class Trend:
    """
    The growth of one quantity, such as resident memory, over hours: a warning for its floor, an alarm for its slope.

    Not thread-safe; it takes what it is given and asks no clock. Its state is a few hundred numbers, however long it
    lives. It says nothing in its first two hours.

    Args:
        step: Seconds that are one point of the series. 60: then a window is 120 points and costs 2 ms a minute at most.
        window: Points of the slope; the floor uses three halves of it. 120: a leak of 1 MB a minute stands out from
            noise of 20 MB, and a cycle of an hour is seen as one.
    """

    def __init__(self, step: float = 60.0, window: int = 120) -> None:
        self._step = step
        self._window = window
        self._points: deque[float] = deque(maxlen=window * 3 // 2)
        self._current = math.inf
        self._until: float | None = None
        self._calm = 0
        self._base = -math.inf
        self._peak = -math.inf
        self._ceiling = -math.inf
        self._ceiling_for = 0
        self.growth = Growth.STEADY
        """What was found at the last full minute."""
        self._slope: float | None = None

    def __repr__(self) -> str:
        return f"<Trend {self.growth}, {self.rate:+.3g} an hour, {len(self._points)} points>"

    @property
    def rate(self) -> float:
        """The slope per hour, as of the last full minute; 0.0 until there is a full window."""
        if len(self._points) < self._window:
            return 0.0
        if self._slope is None:
            self._slope = theil_sen(list(self._points)[-self._window :])
        return self._slope * 3600 / self._step

    @property
    def hours(self) -> float:
        """Hours that the slope is taken over: the window."""
        return self._window * self._step / 3600

    def add(self, now: float, value: float) -> Growth:
        """
        Take a reading; returns `growth`.

        Args:
            now: Seconds of any monotonic clock.
            value: What is watched, in any unit.
        """
        if self._until is None:
            self._until = now + self._step
        if now >= self._until:
            late = int((now - self._until) / self._step)
            if late > _GAP:
                self._points.clear()  # the machine slept, or nobody asked: nothing is known about that time
            else:
                self._points.extend([self._current] * (late + 1))
            self._until += (late + 1) * self._step
            self._current = math.inf
            self._look()
        self._current = min(self._current, value)
        return self.growth

    def _look(self) -> None:
        points = list(self._points)
        if self.growth is not Growth.STEADY:
            self._peak = max(self._peak, points[-1])
            if max(points[-_BACK:]) < (self._base + self._peak) / 2:
                self._leave()  # what had grown has come back: it was no leak
        self._ceiling_for -= 1
        if self._ceiling_for < 0:
            self._ceiling = -math.inf
        self._slope = None
        found = self._judge(points) if len(points) >= self._window else Growth.STEADY
        if found is not Growth.STEADY and self.growth is Growth.STEADY:
            self._base, self._peak = statistics.median(points[: len(points) // 4]), max(points)
        if _RANK[found] >= _RANK[self.growth]:
            self.growth = found
            self._calm = 0
        else:
            self._calm += 1
            if self._calm >= _CALM:
                self._leave()

    def _leave(self) -> None:
        """Back to steady; only beyond the height that was reached is there anything new to tell."""
        self._ceiling, self._ceiling_for = max(self._peak * (1 + _SMALL), self._ceiling), _DAY
        self.growth = Growth.STEADY
        self._calm = 0

    def _judge(self, kept: list[float]) -> Growth:
        points = kept[-self._window :]
        half, third = len(points) // 2, len(points) // 3
        level = statistics.median(points[half:])
        if level <= self._ceiling:
            return Growth.STEADY
        # All pairs are 7,000: most minutes are clear without them.
        rough = (statistics.median(points[-third:]) - statistics.median(points[:third])) / (len(points) - third)
        noise, memory = _noise(points, rough)
        if rough * len(points) > self._worth(level, noise) / 2:
            slope = self._slope = theil_sen(points)
            noise, memory = _noise(points, slope)
            if (
                slope * len(points) > self._worth(level, noise)
                and mann_kendall(points, memory) > _SURE
                and theil_sen(points[half:]) > _STILL * slope
            ):
                return Growth.GROWING
        if len(kept) < 3 * half:
            return Growth.STEADY
        first, second, last = (min(kept[start : start + half]) for start in (0, half, 2 * half))
        lift = max(_SMALL * abs(level), _LIFT * noise)
        return Growth.RISING if second - first > lift and last - second > lift else Growth.STEADY

    @staticmethod
    def _worth(level: float, noise: float) -> float:
        """Growth over the window that is worth an alarm."""
        return max(_SMALL * abs(level), _CLEAR * noise)


_RANK = {Growth.STEADY: 0, Growth.RISING: 1, Growth.GROWING: 2}


def _noise(points: list[float], slope: float) -> tuple[float, float]:
    """Standard deviation of *points* around a line of *slope*, and their autocorrelation."""
    rest = [value - slope * i for i, value in enumerate(points)]
    mean = statistics.fmean(rest)
    rest = [value - mean for value in rest]
    square = math.fsum(value * value for value in rest)
    n = len(rest)
    if square <= 0:
        return 0.0, 0.0
    memory = math.fsum(a * b for a, b in pairwise(rest)) / square
    memory += (1 + 4 * memory) / n  # the estimate from a short series is too small by that much
    return math.sqrt(square / n), min(max(memory, 0.0), _MEMORY)
