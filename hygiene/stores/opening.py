"""A store by its address."""

from __future__ import annotations

from typing import Any

from hygiene.stores.protocol import Store
from hygiene.stores.sqlite import SQLiteStore

__all__ = ["open_store"]

_LATER = {"redis": "redis", "rediss": "redis", "valkey": "redis", "postgresql": "postgres", "postgres": "postgres"}


def open_store(address: str, **options: Any) -> Store:
    """
    Open the store at *address*; it is created if it is not there.

    Args:
        address: ``"sqlite:chats.db"`` (from the current directory), ``"sqlite:/var/lib/bot/chats.db"``,
            ``"sqlite:~/chats.db"``, or ``"sqlite::memory:"``, which ends with the store.
        options: What the store takes: see `SQLiteStore`.

    Raises:
        ValueError: the address is not understood.
        StoreUnavailable: it cannot be opened now: no such folder, no permission, locked.
        StoreError: it is there, but is not ours, is of a newer version, or is damaged. It was left as it is.
    """
    scheme, colon, place = address.partition(":")
    scheme = scheme.lower()
    if scheme in _LATER and colon:
        raise ValueError(
            f"a store wants an address that this version can open; found {scheme}:, which will come with the extra "
            f"hygiene[{_LATER[scheme]}] and is not in this version. Use sqlite:PATH"
        )
    if scheme != "sqlite" or not colon:
        raise ValueError(
            f"a store wants an address such as sqlite:chats.db; found {address!r}. Known: sqlite:PATH, sqlite::memory:"
        )
    if place.startswith("//"):
        # To some that is an absolute path and to others a relative one: opening the wrong one would show no error.
        raise ValueError(
            f"the path stands right behind the colon; found {address!r}. "
            f"Write sqlite:chats.db, or sqlite:/{place.lstrip('/')} for an absolute path"
        )
    if not place:
        raise ValueError(f"a path is wanted behind the colon; found {address!r}. Write sqlite:chats.db")
    return SQLiteStore(place, **options)
