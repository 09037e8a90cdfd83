"""Live views of a registry whose iteration is a walk over a snapshot.

A loop over an ordinary dict raises when another thread, or the janitor, removes an entry meanwhile. These views
walk the keys as they stood when the walk began, in one C call, and skip what has left since.
"""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from reprlib import recursive_repr
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from hygiene.registry import Registry

__all__ = ["RegistryItems", "RegistryKeys", "RegistryValues"]

K = TypeVar("K")
V = TypeVar("V")


class RegistryKeys(KeysView[K]):
    """The keys of a registry; set-like and live."""

    __slots__ = ("_caller",)
    _mapping: Registry[K, Any]

    def __init__(self, registry: Registry[K, Any], caller: tuple[int, int] | None) -> None:
        super().__init__(registry)
        self._caller = caller

    @property
    def mapping(self) -> MappingProxyType[K, Any]:
        """The registry, read-only."""
        return MappingProxyType(self._mapping)

    def __iter__(self) -> Iterator[K]:
        frame = sys._getframe(1)
        if self._caller == (id(frame), frame.f_lasti):
            # ``keys()`` and this were called by one and the same instruction: C code such as ``dict(r)`` or ``{**r}``,
            # which fetches the keys, and then every value through ``__getitem__``.
            return iter(self._mapping._begin_copy(frame))
        return self._mapping._walk_keys()

    def __reversed__(self) -> Iterator[K]:
        return self._mapping._walk_keys(backwards=True)

    @recursive_repr()  # a registry may hold a view of itself
    def __repr__(self) -> str:
        return f"dict_keys({list(self)!r})"


class RegistryValues(ValuesView[V]):
    """The values of a registry; live."""

    __slots__ = ()
    _mapping: Registry[Any, V]

    @property
    def mapping(self) -> MappingProxyType[Any, V]:
        """The registry, read-only."""
        return MappingProxyType(self._mapping)

    def __contains__(self, value: object) -> bool:
        return any(held is value or held == value for held in self)

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping._walk_items())

    def __reversed__(self) -> Iterator[V]:
        return (value for _, value in self._mapping._walk_items(backwards=True))

    @recursive_repr()  # a registry may hold a view of itself
    def __repr__(self) -> str:
        return f"dict_values({list(self)!r})"


class RegistryItems(ItemsView[K, V]):
    """The entries of a registry; set-like and live."""

    __slots__ = ()
    _mapping: Registry[K, V]

    @property
    def mapping(self) -> MappingProxyType[K, V]:
        """The registry, read-only."""
        return MappingProxyType(self._mapping)

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:  # noqa: PLR2004 - a key and a value
            return False
        key, value = item
        missing = object()
        held = self._mapping.peek(key, missing)  # a look, not a use
        return held is not missing and (held is value or held == value)

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._mapping._walk_items()

    def __reversed__(self) -> Iterator[tuple[K, V]]:
        return self._mapping._walk_items(backwards=True)

    @recursive_repr()  # a registry may hold a view of itself
    def __repr__(self) -> str:
        return f"dict_items({list(self)!r})"
