"""Durations and sizes: converted once, at the edge."""

from __future__ import annotations

import math
import re
from datetime import timedelta

__all__ = ["Duration", "Size", "nbytes", "seconds"]

Duration = float | int | str | timedelta
"""Seconds, a ``timedelta``, or a number with a unit: ``"90s"``, ``"30m"``, ``"2h"``, ``"1d"``."""
Size = int | str
"""Bytes, or a number with a unit: ``"500kB"``, ``"64MiB"``, ``"1GiB"``."""

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {
    "b": 1,
    **{prefix + "b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{prefix + "ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def seconds(value: object, what: str = "duration") -> float:
    """
    Seconds in *value*, which must be positive and finite.

    Args:
        value: A `Duration`: seconds, a ``timedelta``, or text such as ``"90s"``, ``"30m"``, ``"2h"``, ``"1d"``
            (also ``ms`` and ``w``).
        what: The argument's name, for the error.

    Raises:
        TypeError: *value* is none of these.
        ValueError: the text is not understood, or the time is not positive.
    """
    wanted = f'{what} must be positive: seconds, a timedelta, or text such as "90s", "30m", "2h" or "1d"'
    if isinstance(value, timedelta):
        result = value.total_seconds()
    elif isinstance(value, str):
        result = _parse(value, _SECONDS, "s", wanted)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        result = float(value)
    else:
        raise TypeError(f"{wanted}; found {value!r}")
    if not 0 < result < math.inf:
        raise ValueError(f"{wanted}; found {value!r}. Leave it out for no limit")
    return result


def nbytes(value: object, what: str = "size") -> int:
    """
    Bytes in *value*, which must be at least 1.

    Args:
        value: A `Size`: bytes, or text such as ``"500kB"`` (1,000) or ``"64MiB"`` (1,048,576).
        what: The argument's name, for the error.

    Raises:
        TypeError: *value* is neither.
        ValueError: the text is not understood, or the size is below one byte.
    """
    wanted = f'{what} must be at least 1: bytes, or text such as "500kB", "64MiB" or "1GiB"'
    if isinstance(value, str):
        result = int(_parse(value, _BYTES, "b", wanted))
    elif isinstance(value, int) and not isinstance(value, bool):
        result = value
    else:
        raise TypeError(f"{wanted}; found {value!r}")
    if result < 1:
        raise ValueError(f"{wanted}; found {value!r}. Leave it out for no limit")
    return result


def _parse(text: str, units: dict[str, float] | dict[str, int], default: str, wanted: str) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = (match[2].lower() or default) if match else ""
    if match is None or unit not in units:
        raise ValueError(f"{wanted}; found {text!r}")
    return float(match[1]) * units[unit]
