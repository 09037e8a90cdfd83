"""What a registry was asked to keep to: validated once, merged when decorators are stacked."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable
from typing import Any, Literal

import cachetools

from hygiene.closing import Closer, check_closer
from hygiene.events import Entry
from hygiene.units import nbytes, seconds

__all__ = ["KEYWORDS", "LIVE", "Busy", "Limits", "Overflow", "Policy"]

Policy = Literal["lru", "fifo", "lfu", "importance", "none"] | type[cachetools.Cache[Any, Any]]
Overflow = Literal["grow", "raise"]
Busy = str | Callable[[Entry[Any, Any]], Any]
LIVE = ("maxsize", "max_bytes", "ttl", "idle", "default_factory")
"""The limits that may be assigned on a living registry."""
_POLICIES = ("lru", "fifo", "lfu", "importance", "none")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """
    The keywords of a `Registry`, checked. Durations are seconds, sizes are bytes from here on.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range, or two contradict each other.
    """

    maxsize: int | None = None
    max_bytes: int | None = None
    getsizeof: Callable[[Any], int] | None = None
    ttl: float | None = None
    idle: float | None = None
    policy: Policy = "lru"
    importance: Callable[[Entry[Any, Any]], float] | None = None
    busy: Busy | None = None
    on_evict: Callable[[Any], Any] | str | None = None
    close: Closer | None = None
    overflow: Overflow = "grow"
    revive: bool = True
    store: Any = None
    values: Callable[[Any], Any] | None = None
    default_factory: Callable[[], Any] | None = None
    name: str | None = None
    timer: Callable[[], float] = time.monotonic
    given: frozenset[str] = frozenset()
    """The keywords that were passed, so that a merge knows defaults from choices."""

    @classmethod
    def of(cls, **keywords: Any) -> Limits:
        """The limits that these keywords of `Registry` ask for."""
        unknown = sorted(keywords.keys() - KEYWORDS)
        if unknown:
            raise TypeError(f"unknown limit {unknown[0]!r}; a registry takes {', '.join(sorted(KEYWORDS))}")
        chosen = dict(keywords)
        maxsize: object = chosen.get("maxsize")
        if maxsize is not None:
            if not isinstance(maxsize, int) or isinstance(maxsize, bool):
                raise TypeError(f"maxsize must be a whole number of entries, or None for no bound; found {maxsize!r}")
            if maxsize < 1:
                raise ValueError(f"maxsize must be at least 1, or None for no bound; found {maxsize}")
        if chosen.get("max_bytes") is not None:
            chosen["max_bytes"] = nbytes(chosen["max_bytes"], "max_bytes")
        for what in ("ttl", "idle"):
            if chosen.get(what) is not None:
                chosen[what] = seconds(chosen[what], what)
        limits = cls(**chosen, given=frozenset(keywords))
        limits._check()
        return limits

    def merge(self, **keywords: Any) -> Limits:
        """These limits with *keywords* on top; the explicit ones win."""
        kept = {name: getattr(self, name) for name in self.given}
        return Limits.of(**{**kept, **keywords})

    def changed(self, name: str, value: Any) -> Limits:
        """These limits with another value for one that may change during the life of a registry."""
        checked = getattr(Limits.of(**{name: value}), name)
        given = self.given | {name}
        if name == "max_bytes" and self.getsizeof is not None:  # it measures for max_bytes, and for nothing else
            given = given - {"getsizeof"} if checked is None else given | {"getsizeof"}
        return dataclasses.replace(self, **{name: checked}, given=given)

    @property
    def bounded(self) -> bool:
        """Whether anything can make an entry leave by itself."""
        return not (self.maxsize is self.max_bytes is self.ttl is self.idle is None)

    def _check(self) -> None:
        for what in ("getsizeof", "importance", "values", "default_factory"):
            found = getattr(self, what)
            if found is not None and not callable(found):
                raise TypeError(f"{what} must be callable, or None; found {found!r}")
        if not callable(self.timer):
            raise TypeError(f"timer must be callable and return seconds; found {self.timer!r}")
        if self.busy is not None and not callable(self.busy) and not _is_name(self.busy):
            raise TypeError(
                "busy must be a callable that takes an entry, the name of an attribute or method of the value, "
                f"or hygiene.referenced; found {self.busy!r}"
            )
        if self.on_evict is not None and not callable(self.on_evict) and not _is_name(self.on_evict):
            raise TypeError(
                "on_evict must be a callable that takes a removal, or the name of a method of the owner; "
                f"found {self.on_evict!r}"
            )
        for what in ("busy", "on_evict", "importance", "getsizeof"):
            if inspect.iscoroutinefunction(getattr(self, what)):
                raise TypeError(
                    f"{what} must be an ordinary function; found {getattr(self, what)!r}, which is async, and nothing "
                    f"would await it. Give a function that starts a task of yours; what releases a value goes to close="
                )
        check_closer(self.close)
        if self.store is not None and not isinstance(self.store, str) and not hasattr(self.store, "load"):
            raise TypeError(
                f'store must be an address such as "sqlite:chats.db", a store, or a WriteBehind; found {self.store!r}'
            )
        if self.overflow not in ("grow", "raise"):
            raise ValueError(f'overflow must be "grow" or "raise"; found {self.overflow!r}')
        if not (
            self.policy in _POLICIES or (inspect.isclass(self.policy) and issubclass(self.policy, cachetools.Cache))
        ):
            raise ValueError(
                f"policy must be one of {', '.join(_POLICIES)}, or a subclass of cachetools.Cache; "
                f"found {self.policy!r}"
            )
        if (self.policy == "importance") != (self.importance is not None):
            raise ValueError(
                'policy="importance" and importance=callable go together; '
                f"found policy={self.policy!r} and importance={self.importance!r}"
            )
        if self.policy == "none" and self.overflow != "raise":
            raise ValueError(
                'policy="none" drops nothing, so it needs overflow="raise" to keep its bound; found overflow="grow"'
            )
        if self.getsizeof is not None and self.max_bytes is None:
            raise ValueError("getsizeof measures for max_bytes; found no max_bytes. Give one, or leave getsizeof out")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isidentifier()


KEYWORDS = frozenset(field.name for field in dataclasses.fields(Limits)) - {"given"}
"""The names of all limits."""
