"""What an earlier release has left on a server is there for this one."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from hygiene.stores import SaveLog, SaveValue
from hygiene.stores.servers import ServerStore

FORMATS = Path(__file__).parent.parent / "formats"
PREFIX = "v010"  # stands in the dumps
EVERYTHING = {
    ("chats", "ann"): ("log", 2, ["edited", "three", "four"]),
    ("chats", 7): ("log", 1, []),
    ("settings", ("a", 1, None)): (
        "value",
        1,
        {"when": dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC), "raw": b"\0\1", "n": [1.5, None, True]},
    ),
    ("settings", "lives on"): ("value", 1, 1),
}

pytestmark = pytest.mark.slow


def content(store: ServerStore) -> dict[tuple[str, Any], tuple[str, int, Any]]:
    found = {}
    for space in store.spaces():
        for head in store.heads(space):
            record = store.load(space, head.key)
            assert record is not None
            found[space, head.key] = head.kind, head.version, record.value
    return found


def check(store: ServerStore) -> None:
    """Read everything, and count on from there."""
    assert store.recover().clean
    assert EVERYTHING == content(store)
    token = store.lease("chats", "ann")
    assert token is not None
    change = SaveLog("chats", "ann", 2, append=[store.encode("five")])
    (head,) = store.save([change], fence={("chats", "ann"): token})
    assert head is not None
    assert (3, 5) == (head.version, head.next)
    (head,) = store.save([SaveValue("settings", "deleted", store.encode(2), 0)])
    assert head is not None
    assert 2 == head.version
    record = store.load("chats", "ann")
    assert record is not None
    assert ["edited", "three", "four", "five"] == record.value


def test_what_0_1_0_left_in_redis_opens_without_loss(own_redis: Any) -> None:
    with own_redis.open("another", timer=lambda: 1.8e9) as other:
        client = other._client
        for key, (kind, value) in json.loads((FORMATS / "0.1.0.redis.json").read_text()).items():
            if kind == "string":
                client.set(key, bytes.fromhex(value))
            elif kind == "hash":
                client.hset(key, mapping={bytes.fromhex(k): bytes.fromhex(v) for k, v in value.items()})
            elif kind == "zset":
                client.zadd(key, {bytes.fromhex(member): score for member, score in value})
            else:
                client.rpush(key, *map(bytes.fromhex, value))
    with own_redis.open(PREFIX, timer=lambda: 1.8e9) as store:
        check(store)


def test_what_0_1_0_left_in_postgresql_opens_without_loss(postgres_server: Any) -> None:
    with postgres_server.open("another") as other:
        conninfo = other._conninfo
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute((FORMATS / "0.1.0.postgres.sql").read_text())  # type: ignore[arg-type]
    with postgres_server.open(PREFIX, timer=lambda: 1.8e9) as store:
        check(store)
