"""Who is measured, and the loops that measure them.

A loop is the code that users write, with the operation spelled out in it. Each contender runs a copy of its own
(`own`): CPython specialises bytecode for the class it meets, and a loop shared by two classes would be slow for both.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import types
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cachetools

import hygiene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["ABSENT", "CONTENDERS", "REGISTRIES", "Contender", "Session", "own"]

HOUR = 3600.0  # seconds; nothing expires while reads and writes are timed
ABSENT: dict[str, str] = {}  # what cannot be imported here, and why


def _in_python() -> type[Any]:
    """`Registry` on the Python kernel: from a second copy of the library, whatever this installation has."""

    def is_ours(name: str) -> bool:
        return name.partition(".")[0] == hygiene.__name__

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    asked = os.environ.get("HYGIENE_PURE")
    os.environ["HYGIENE_PURE"] = "1"
    try:
        copy = importlib.import_module(hygiene.__name__)
    finally:
        if asked is None:
            del os.environ["HYGIENE_PURE"]
        else:
            os.environ["HYGIENE_PURE"] = asked
        for name in filter(is_ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(kept)
    if copy.compiled:
        raise RuntimeError("HYGIENE_PURE=1 asked for the Python kernel, and the compiled one came")
    kind: type[Any] = copy.Registry
    return kind


def _registries() -> dict[str, type[Any]]:
    if hygiene.compiled:
        return {"Registry": hygiene.Registry, "Registry in Python": _in_python()}
    ABSENT["Registry"] = (
        "the compiled kernel: it was not built, or HYGIENE_PURE is set, so there is Registry in Python only"
    )
    return {"Registry in Python": hygiene.Registry}


# By the body of the kernel: "Registry" is the compiled one.
REGISTRIES = _registries()


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


def write_method(cache: Any, keys: Sequence[Any], values: list[Any]) -> None:
    """``cache.set(key, value)``."""
    following = values.pop
    for key in keys:
        cache.set(key, following())


def get_item(cache: Any, keys: Sequence[Any]) -> None:
    """``cache.get(key)``."""
    for key in keys:
        cache.get(key)


def find_item(cache: Any, keys: Sequence[Any]) -> None:
    """``key in cache``."""
    for key in keys:
        key in cache  # noqa: B015 # pyright: ignore[reportUnusedExpression] # what it costs is the question


def get_locked(cache: Any, keys: Sequence[Any]) -> None:
    """`get_item` under the lock."""
    lock, inner = cache.lock, cache.cache
    for key in keys:
        with lock:
            inner.get(key)


def find_locked(cache: Any, keys: Sequence[Any]) -> None:
    """`find_item` under the lock."""
    lock, inner = cache.lock, cache.cache
    for key in keys:
        with lock:
            key in inner  # noqa: B015 # pyright: ignore[reportUnusedExpression]


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
        get: Looks up keys by the method ``get``; ``None`` where there is none.
        find: Asks whether keys are there; ``None`` where that cannot be asked.
        beside: Bytes that a container has from the C library and not from Python, where it knows them.
        native: Its memory is not Python's, and it does not know it: only the size of the process tells.
        unbounded: It never evicts.
    """

    make: Callable[[int], Any]
    read: Callable[..., None] = read_item
    write: Callable[..., None] = write_item
    create: Callable[..., int] | None = create_item
    get: Callable[..., None] | None = get_item
    find: Callable[..., None] | None = find_item
    beside: Callable[[Any], int] = lambda _: 0
    native: bool = False
    unbounded: bool = False


def _locked(make: Callable[[int], Any]) -> Contender:
    return Contender(
        lambda bound: Locked(make(bound)), read_locked, write_locked, create_locked, get_locked, find_locked
    )


def _registry(kind: type[Any], **limits: Any) -> Contender:
    return Contender(lambda bound: kind(maxsize=bound, **limits), beside=_arrays)


def _arrays(registry: Any) -> int:
    """The arrays of the compiled kernel; the Python one has none."""
    return int(registry.__sizeof__() - OrderedDict.__sizeof__(registry))


def _contenders() -> dict[str, Contender]:
    found = {
        "dict": Contender(lambda _: {}, unbounded=True),
        "OrderedDict LRU by hand": Contender(ByHand, get=None, find=None),
        "cachetools LRU": Contender(cachetools.LRUCache),
        "cachetools LRU + RLock": _locked(cachetools.LRUCache),
        "cachetools TTL": Contender(lambda bound: cachetools.TTLCache(bound, HOUR)),
        "cachetools TTL + RLock": _locked(lambda bound: cachetools.TTLCache(bound, HOUR)),
    }
    for name, kind in REGISTRIES.items():
        body = name.removeprefix("Registry")
        found[name] = _registry(kind)
        found[f"Registry(ttl){body}"] = _registry(kind, ttl=HOUR)
        found[f"Registry(idle){body}"] = _registry(kind, idle=HOUR)
        found[f"Registry(on_evict){body}"] = _registry(kind, on_evict=_ignore)
    optional: dict[str, Callable[[Any], dict[str, Contender]]] = {
        "cachebox": lambda module: {
            "cachebox LRU": Contender(module.LRUCache, native=True),
            "cachebox TTL": Contender(lambda bound: module.TTLCache(bound, global_ttl=HOUR), native=True),
        },
        "lru": lambda module: {"lru-dict": Contender(module.LRU)},
        "expiringdict": lambda module: {"expiringdict": Contender(lambda bound: module.ExpiringDict(bound, HOUR))},
        "theine": lambda module: {
            "theine": Contender(module.Cache, get_item, write_method, create=None, find=None, native=True),
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
