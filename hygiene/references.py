"""
How many references to a value come from its own parts.

A value that refers to itself has a higher reference count, although no other part of the program uses it: a client
whose handlers are bound methods of it, a node whose children know their parent, a list that contains itself. Who
decides by reference counts whether a value is in use subtracts these references.

Theory of operation
===================

This is what CPython's garbage collector does to find cycles, for one value instead of a generation, and without
collecting. The walk lists the objects that are reachable from the value, with the references between them. An object
with more references than the walk has found is also referenced from elsewhere, so it is no part of the value, and
neither is anything that is reachable from it. References that come from the remaining objects are the value's own.
If another part of the program holds a part of the value that refers back to it, the value is therefore in use.

`gc.get_referents` calls no Python code. The walk is bounded: it ends after `MOST` objects, and a container with more
items than that is not entered. References that it has not found count as foreign, so a bounded walk may take an
unused value for used, and never the reverse.
"""

from __future__ import annotations

import gc
from collections import deque
from sys import getrefcount
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["MOST", "own_references"]

MOST = 1000  # objects that one walk visits: at most about a millisecond
# Objects with more references than this are probably shared with other values, and are visited last.
_FEW = 16
_CONTAINERS: tuple[type[Any], ...] = (dict, list, tuple, set, frozenset, deque)
# Classes and modules belong to the program. They lead to everything else, and to no single value.
_PROGRAM = (type, ModuleType)
# What `getrefcount` returns for an object that only a list references.
_LISTED = next(map(getrefcount, [object()]))


def own_references(value: Any, most: int = MOST) -> int:
    """
    Number of references to *value* from parts of it that nothing else references, found in a walk over *most* objects.

    Call it without a lock: while it runs, other threads may drop their last references to parts of the value, and then
    the parts end here.
    """
    if not gc.is_tracked(value):
        return 0
    parts = [value]
    places = {id(value): 0}
    near, far = deque([0]), deque[int]()
    edges: dict[int, list[int]] = {}
    while near or far:
        place = (near or far).popleft()
        targets = edges[place] = []
        for part in _referents(parts[place]):
            target = places.get(id(part))
            if target is None:
                if len(parts) >= most or not gc.is_tracked(part) or issubclass(type(part), _PROGRAM):
                    continue
                target = places[id(part)] = len(parts)
                parts.append(part)
                (near if getrefcount(part) <= _FEW else far).append(target)
            targets.append(target)
    part = None  # or it had a reference more
    found = [0] * len(parts)
    for targets in edges.values():
        for target in targets:
            found[target] += 1
    if not found[0]:
        return 0
    counts = list(map(getrefcount, parts))
    shared = [place for place in range(1, len(parts)) if counts[place] - _LISTED > found[place]]
    foreign = {0, *shared}
    while shared:
        for target in edges[shared.pop()]:
            found[target] -= 1
            if target not in foreign:
                foreign.add(target)
                shared.append(target)
    return found[0]


def _referents(part: Any) -> list[Any]:
    kind = type(part)
    if kind is FunctionType:  # its globals are the program's
        return [own for own in (part.__closure__, part.__defaults__, part.__kwdefaults__) if own is not None]
    if issubclass(kind, _CONTAINERS):
        for container in _CONTAINERS:
            if issubclass(kind, container) and container.__len__(part) > MOST:
                return []
    return gc.get_referents(part)
