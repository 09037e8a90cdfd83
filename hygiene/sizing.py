"""How many bytes a value holds: an estimate that is cheap enough to ask on every write."""

from __future__ import annotations

import sys
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["sizeof"]

# A container's first items stand for the rest of it: a conversation's messages are of one kind, and walking all of
# them on every write would make a put as slow as the list is long.
_SAMPLE = 24
_DEPTH = 8
_SHELL = 64  # bytes of an object that cannot say
_FLAT = (int, float, complex, bool, str, bytes, bytearray, type(None), type, range)
_FOREIGN = (ModuleType, FunctionType, BuiltinFunctionType, CodeType)


def sizeof(value: Any) -> int:
    """
    Estimated bytes of *value* with everything it alone reaches.

    Containers are sampled (24 items) and scaled, attributes in ``__dict__`` and ``__slots__`` are followed, an object
    met twice counts once. Classes, functions and modules are shared by nature and count as their own shell. A value
    that says its size in an ``nbytes`` attribute (an array, a `History`) is believed. Never raises for what it walks
    over: a value that cannot be measured counts as its shell.
    """
    return _sizeof(value, set(), _DEPTH)


def _sizeof(value: Any, seen: set[int], depth: int) -> int:
    try:
        size = sys.getsizeof(value, _SHELL)
        kind = type(value)
        if kind in _FLAT or isinstance(value, _FOREIGN):
            return size
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if depth == 0:
            return size
        told = getattr(value, "nbytes", None) if hasattr(kind, "nbytes") else None
        if isinstance(told, int):
            return max(size, told)
        if isinstance(value, dict):
            pairs = _sample(value.items() if kind is dict else dict.items(value))
            walked = sum(_sizeof(k, seen, depth - 1) + _sizeof(v, seen, depth - 1) for k, v in pairs)
            size += _scaled(walked, len(pairs), dict.__len__(value))
        elif isinstance(value, (list, tuple, set, frozenset)) or hasattr(kind, "appendleft"):
            items = _sample(value)
            size += _scaled(sum(_sizeof(item, seen, depth - 1) for item in items), len(items), len(value))
        return size + sum(_sizeof(part, seen, depth - 1) for part in _attributes(value, kind))
    except Exception:  # the value's own code, which is asked in passing
        return _SHELL


def _sample(items: Iterable[Any]) -> list[Any]:
    try:
        return list(islice(items, _SAMPLE))
    except RuntimeError:  # another thread changed it; an estimate may miss a reading
        return []


def _scaled(walked: int, sampled: int, length: int) -> int:
    return walked * length // sampled if sampled else 0


def _attributes(value: Any, kind: type) -> Iterable[Any]:
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        yield from _sample(own.values())
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in {"__dict__", "__weakref__"} and (part := getattr(value, name, None)) is not None:
                yield part
