"""
Evicted values that another part of the program still references.

A value that can be weakly referenced is kept by a weak reference, and its entry ends with it. Any other value (a dict,
a list, an instance with ``__slots__``) is kept by a strong one, and has to be checked again: the last other reference
to it ends without notice. What is dropped here may run code of the program, so it goes to *dropped*, which is emptied
when no lock is held.
"""

from __future__ import annotations

import sys
import weakref
from sys import getrefcount
from typing import Any

from hygiene.references import MOST, own_references

__all__ = ["FOREVER", "Kept", "Tail", "is_constant"]

FOREVER = 2**30  # the reference count of a value that never ends is at least this, since Python 3.12
_LOCAL = 2 if sys.version_info < (3, 14) else 1  # what `getrefcount` returns for an object that one variable holds
_CONSTANTS = frozenset(
    {int, float, bool, str, bytes, complex, range, slice, type(None), type(...), type(NotImplemented)}
)


def is_constant(value: Any) -> bool:
    """True if *value* cannot be changed, and an equal one does as well."""
    kind = type(value)
    return kind in _CONSTANTS or (kind is tuple and all(map(is_constant, value)))


class _Weak(weakref.ref[Any]):
    """A value that ends by itself."""

    __slots__ = ()
    strong = False


class _Strong:
    """A value that is kept alive. Called, it returns the value, like a weak reference."""

    __slots__ = ("_value", "seen")
    strong = True

    def __init__(self, value: Any) -> None:
        self._value = value
        self.seen = 0  # reference count when the value was last found to be referenced elsewhere

    def __call__(self) -> Any:
        return self._value


Kept = _Weak | _Strong


class Tail:
    """
    The evicted values of one registry, by key, oldest first.

    What changes it is called with the registry's lock held; `get` and `references` need none. The janitor visits it
    while it has values to check.
    """

    __slots__ = (
        "__weakref__",
        "_ended",
        "_registry",
        "data",
        "dropped",
        "due",
        "fresh",
        "pause",
        "strong",
        "watched",
    )

    def __init__(self, registry: Any) -> None:
        self._registry = weakref.ref(registry)
        self.data: dict[Any, Kept] = {}
        self.dropped: list[Any] = []  # values that end when no lock is held
        self.fresh: list[Any] = []  # keys of values kept a moment ago: the code that evicts them still has them
        self.due: list[Any] = []  # keys of values kept by an earlier call, and not checked yet
        self.strong = False  # whether there may be values to check
        self.watched = False  # whether the janitor visits it
        self.pause = 0.0  # seconds between the last check and the next
        self._ended: list[Any] = []  # keys whose weak reference has ended

    def _visit(self) -> float | None:
        registry = self._registry()
        return None if registry is None else registry._check_tail()

    def keep(self, key: Any, value: Any) -> None:
        """Keep *value* for *key*, instead of an earlier one."""
        self.discard(key)
        self.bury()
        if type(value).__weakrefoffset__:
            ended = self._ended  # not the tail itself: its references would make a cycle with it
            self.data[key] = _Weak(value, lambda _: ended.append(key))
        else:
            self.data[key] = _Strong(value)
            self.fresh.append(key)
            self.strong = True
            self.pause = 0.0

    def get(self, key: Any, default: Any = None) -> Any:
        """The value that is kept for *key*, or *default*."""
        kept = self.data.get(key)
        value = None if kept is None else kept()
        return default if value is None else value

    def discard(self, key: Any) -> None:
        """Keep no value for *key*; it ends later."""
        kept = self.data.pop(key, None)
        if kept is not None:
            self.dropped.append(kept())

    def pop(self, key: Any, default: Any = None) -> Any:
        """Take out the value that is kept for *key*, or *default*. Needs no lock."""
        kept = self.data.pop(key, None)
        value = None if kept is None else kept()
        return default if value is None else value

    def bury(self) -> None:
        """Forget the entries whose values have ended."""
        while self._ended:
            key = self._ended.pop()
            kept = self.data.get(key)
            if kept is not None and kept() is None:
                del self.data[key]

    def references(self, kept: Kept, most: int = MOST, *, hasty: bool = False) -> int:
        """
        Reference count of a value that nothing but the tail and its own parts references; 0 for any other value.

        *most* bounds the search for its own parts, see `own_references`. A *hasty* caller takes a value that the tail
        keeps for several keys for referenced, unless it has such parts. No lock is held.
        """
        value = kept()
        count = getrefcount(value)
        if isinstance(kept, _Strong):
            if count == kept.seen:  # as when it was last found to be referenced
                return 0
            alone = _LOCAL + 1
        else:
            if value is None:
                return count
            alone = _LOCAL
        if count > alone:
            own = own_references(value, most)
            if count != getrefcount(value) or (hasty and not own):  # it is just being used
                return 0
            # Counted last: what leaves the tail meanwhile makes the value seem referenced, and not the reverse.
            if kept.strong:
                alone = _LOCAL + sum(other() is value for other in list(self.data.values()) if other.strong)
            if count - own > alone:
                if isinstance(kept, _Strong):
                    kept.seen = count
                return 0
        return count

    def drop(self, key: Any, kept: Kept, count: int) -> bool:
        """Discard *kept* if its value has at most *count* references, as `references` said; returns whether it did."""
        value = kept()
        if self.data.get(key) is not kept or (value is not None and getrefcount(value) > count):
            return False
        self.discard(key)
        return True
