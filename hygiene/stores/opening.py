"""A store by its address."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from hygiene.stores.protocol import Store
from hygiene.stores.sqlite import SQLiteStore

__all__ = ["open_store"]

_EXTRAS = {
    "redis": "redis",
    "rediss": "redis",
    "valkey": "redis",
    "valkeys": "redis",
    "unix": "redis",
    "postgresql": "postgres",
    "postgres": "postgres",
}


def open_store(address: str, **options: Any) -> Store:
    """
    Open the store at *address*; it is created if it is not there.

    Args:
        address: ``"sqlite:chats.db"`` (from the current directory), ``"sqlite:/var/lib/bot/chats.db"``,
            ``"sqlite:~/chats.db"``, or ``"sqlite::memory:"``, which ends with the store; ``"redis://..."`` (extra
            ``redis``) or ``"postgresql://..."`` (extra ``postgres``), which several machines may share.
        options: What the store takes: see `SQLiteStore`, ``RedisStore``, ``PostgresStore``.

    Raises:
        ValueError: the address is not understood, or the extra for it is not installed.
        StoreUnavailable: it cannot be opened now: no such folder, no permission, locked.
        StoreError: it is there, but is not ours, is of a newer version, or is damaged. It was left as it is.
    """
    scheme, colon, place = address.partition(":")
    scheme = scheme.lower()
    if scheme in _EXTRAS and colon:
        return _server(scheme)(address, **options)
    if scheme != "sqlite" or not colon:
        raise ValueError(
            f"a store wants an address such as sqlite:chats.db; found {address!r}. Known: sqlite:PATH, "
            "sqlite::memory:, redis://HOST, postgresql://HOST/DATABASE"
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


def _server(scheme: str) -> Callable[..., Store]:
    """The store for servers of this kind, whose client comes with an extra: most programs have none."""
    extra = _EXTRAS[scheme]
    try:
        if extra == "redis":
            return importlib.import_module("hygiene.stores.redis").RedisStore  # type: ignore[no-any-return]
        return importlib.import_module("hygiene.stores.postgres").PostgresStore  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise ValueError(f"a store at {scheme}: needs the extra hygiene[{extra}]; install it ({error})") from error
