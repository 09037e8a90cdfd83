"""A million of one kind of operation leave nothing behind: ``references.py KIND TIMES``."""

# ruff: noqa: SIM105 - a program

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

from hygiene import Registry

key, value, other = object(), object(), object()
now = [0.0]


def timer() -> float:
    """A clock that is turned by hand."""
    return now[0]


timer.manual = True  # type: ignore[attr-defined]


def make(**options: Any) -> Registry[Any, Any]:
    """A registry of four."""
    return Registry(maxsize=4, timer=timer, **options)


plain, timed, tailed = make(), make(ttl=5, idle=5), make(on_evict=lambda removal: None)
foreign = make()
scratch: Registry[Any, Any] = make()
for r in (plain, timed, tailed, foreign):
    r[key] = value


def read() -> None:
    plain[key], plain.get(key), plain.get(other), timed[key]
    try:
        plain[other]
    except KeyError:
        pass


def overwrite() -> None:
    plain[key] = timed[key] = tailed[key] = value


def evict() -> None:
    for number in range(5):
        plain[number] = timed[number] = tailed[number] = value
    plain[key] = timed[key] = tailed[key] = value


def delete() -> None:
    for r in (plain, timed, tailed):
        del r[key]
        r[key] = value
        r.pop(key)
        r[key] = value


def expire() -> None:
    timed[key] = value
    now[0] += 6
    timed.get(key)
    timed.expire()
    timed[key] = value


def lease() -> None:
    with plain.lease(key), timed.lease(key):
        pass


def clear() -> None:
    scratch[key] = value
    scratch.clear()


def past() -> None:
    dict.__setitem__(foreign, key, value)
    foreign[1] = value
    dict.__delitem__(foreign, key)
    foreign[2] = value
    dict.update(foreign, {other: key})
    for number in range(6):
        foreign[number] = value
    foreign[key] = value


def walk() -> None:
    list(plain), list(plain.items()), dict(plain), plain.copy()


def make_and_drop() -> None:
    Registry({key: value, 1: value}, maxsize=2)


def counts() -> tuple[int, ...]:
    """References to the witnesses, and memory blocks."""
    gc.collect()
    witnesses = sys.getrefcount(key), sys.getrefcount(value), sys.getrefcount(other), sys.getrefcount(None) % 2**30
    blocks = sys.getallocatedblocks()
    total = sys.gettotalrefcount() if hasattr(sys, "gettotalrefcount") else 0  # type: ignore[attr-defined]
    return (*witnesses, blocks, total)


kind: Callable[[], None] = globals()[sys.argv[1]]
times = int(sys.argv[2])
for _ in range(300):
    kind()
before = counts()
for _ in range(times):
    kind()
after = counts()
allowed = (3, 3, 3, 50, 100, 300)  # far below one for each turn
over = [b - a for a, b in zip(before, after, strict=True)]
assert all(abs(change) <= most for change, most in zip(over, allowed, strict=True)), (before, after)
