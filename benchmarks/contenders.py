"""Who is measured, and the loops that measure them.

A loop is the code that users write, with the operation spelled out in it. Each contender runs a copy of its own
(`own`): CPython specialises bytecode for the class it meets, and a loop shared by two classes would be slow for both.
"""

from __future__ import annotations

import importlib
import threading
import types
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cachetools

from hygiene import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["ABSENT", "CONTENDERS", "Contender", "Session", "own"]

HOUR = 3600.0  # seconds; nothing expires while reads and writes are timed
ABSENT: dict[str, str] = {}  # what cannot be imported here, and why


class Session:
    """A value that can be weakly referenced, as instances of most classes can."""


class ByHand:
    """The LRU that people write on top of an ``OrderedDict``; not safe to share between threads."""

    def __init__(self, maxsize: int) -> None:
        self.data: OrderedDict[Any, Any] = OrderedDict()
        self.maxsize = maxsize

    def __getitem__(self, key: Any) -> Any:
        value = self.data[key]
        self.data.move_to_end(key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.data[key] = value
        self.data.move_to_end(key)
        if len(self.data) > self.maxsize:
            self.data.popitem(last=False)

    def __len__(self) -> int:
        return len(self.data)

    def items(self) -> Iterable[tuple[Any, Any]]:
        """The entries, without counting as use."""
        return self.data.items()


class Locked:
    """A cachetools cache with the lock that its documentation asks for."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.cache)

    def items(self) -> Iterable[tuple[Any, Any]]:
        """The entries."""
        return list(self.cache.items())


def read_item(cache: Any, keys: Sequence[Any]) -> None:
    """``cache[key]``, found."""
    for key in keys:
        cache[key]


def write_item(cache: Any, keys: Sequence[Any], values: list[Any]) -> None:
    """``cache[key] = value``; *values* lets go of each, so that it dies when it is evicted, as in real life."""
    following = values.pop
    for key in keys:
        cache[key] = following()


def create_item(cache: Any, keys: Sequence[Any]) -> int:
    """Get or create; says how often it had to create."""
    misses = 0
    for key in keys:
        try:
            cache[key]
        except KeyError:
            misses += 1
            cache[key] = -key
    return misses


def read_locked(cache: Any, keys: Sequence[Any]) -> None:
    """`read_item` under the lock."""
    lock, inner = cache.lock, cache.cache
    for key in keys:
        with lock:
            inner[key]


def write_locked(cache: Any, keys: Sequence[Any], values: list[Any]) -> None:
    """`write_item` under the lock."""
    lock, inner = cache.lock, cache.cache
    following = values.pop
    for key in keys:
        with lock:
            inner[key] = following()


def create_locked(cache: Any, keys: Sequence[Any]) -> int:
    """`create_item` under the lock."""
    lock, inner = cache.lock, cache.cache
    misses = 0
    for key in keys:
        with lock:
            try:
                inner[key]
            except KeyError:
                misses += 1
                inner[key] = -key
    return misses


def read_method(cache: Any, keys: Sequence[Any]) -> None:
    """``cache.get(key)``, found."""
    for key in keys:
        cache.get(key)


def write_method(cache: Any, keys: Sequence[Any], values: list[Any]) -> None:
    """``cache.set(key, value)``."""
    following = values.pop
    for key in keys:
        cache.set(key, following())


def own(loop: Callable[..., Any] | None) -> Callable[..., Any]:
    """A copy of *loop* with bytecode of its own, to be specialised for one contender."""
    if not isinstance(loop, types.FunctionType):
        raise TypeError(f"wanted a Python function, whose bytecode can be copied; found {loop!r}")
    return types.FunctionType(loop.__code__.replace(), loop.__globals__, loop.__name__)


@dataclass(frozen=True, slots=True)
class Contender:
    """
    One way to keep entries.

    Args:
        make: Takes the bound, returns the container, empty.
        read: Looks up keys that are there.
        write: Stores values.
        create: Gets or creates; ``None`` where that is not one loop of item access.
        native: Its memory is not Python's: only the size of the process tells.
        unbounded: It never evicts.
    """

    make: Callable[[int], Any]
    read: Callable[..., None] = read_item
    write: Callable[..., None] = write_item
    create: Callable[..., int] | None = create_item
    native: bool = False
    unbounded: bool = False


def _locked(make: Callable[[int], Any]) -> Contender:
    return Contender(lambda bound: Locked(make(bound)), read_locked, write_locked, create_locked)


def _contenders() -> dict[str, Contender]:
    found = {
        "dict": Contender(lambda _: {}, unbounded=True),
        "OrderedDict LRU by hand": Contender(ByHand),
        "cachetools LRU": Contender(cachetools.LRUCache),
        "cachetools LRU + RLock": _locked(cachetools.LRUCache),
        "cachetools TTL": Contender(lambda bound: cachetools.TTLCache(bound, HOUR)),
        "cachetools TTL + RLock": _locked(lambda bound: cachetools.TTLCache(bound, HOUR)),
        "Registry": Contender(lambda bound: Registry(maxsize=bound)),
        "Registry(ttl)": Contender(lambda bound: Registry(maxsize=bound, ttl=HOUR)),
        "Registry(idle)": Contender(lambda bound: Registry(maxsize=bound, idle=HOUR)),
        "Registry(on_evict)": Contender(lambda bound: Registry(maxsize=bound, on_evict=_ignore)),
    }
    optional: dict[str, Callable[[Any], dict[str, Contender]]] = {
        "cachebox": lambda module: {
            "cachebox LRU": Contender(module.LRUCache, native=True),
            "cachebox TTL": Contender(lambda bound: module.TTLCache(bound, global_ttl=HOUR), native=True),
        },
        "lru": lambda module: {"lru-dict": Contender(module.LRU)},
        "expiringdict": lambda module: {"expiringdict": Contender(lambda bound: module.ExpiringDict(bound, HOUR))},
        "theine": lambda module: {
            "theine": Contender(module.Cache, read_method, write_method, create=None, native=True),
        },
    }
    for name, contenders in optional.items():
        try:
            module = importlib.import_module(name)
            made = contenders(module)
            for contender in made.values():
                contender.make(1)  # an older release may want other arguments
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one of them, the others are measured
            ABSENT[name] = f"{type(error).__name__}: {error}"
        else:
            found |= made
    return found


def _ignore(removal: object) -> None:
    """The least that a hook can do."""


CONTENDERS = _contenders()
