"""What the stores on servers have of their own: addresses, damage, ends, and what a disk has seen."""

from __future__ import annotations

import gc
import logging
from typing import Any
from zlib import crc32

import psycopg
import pytest
import redis

from hygiene.errors import NotStorable, StoreError, StoreUnavailable
from hygiene.stores import Delete, SaveLog, SaveValue
from hygiene.stores.postgres import PostgresStore
from hygiene.stores.redis import RedisStore
from hygiene.stores.servers import ServerStore, refer
from hygiene.testing import ManualClock


def value_of(store: ServerStore, space: str, key: Any) -> Any:
    record = store.load(space, key)
    return None if record is None else record.value


def write_row(store: ServerStore, what: str, key: Any, sequence: int, data: bytes | None) -> None:
    """Change what the server has of an entry in space "s", as damage would; ``None`` removes it."""
    ref = refer("s", key)
    if isinstance(store, RedisStore):
        head, items, _ = store._names(ref)
        if what == "head":
            assert data is not None
            store._client.set(head, data, keepttl=True)
        elif data is None:
            store._client.hdel(items, sequence)
        else:
            store._client.hset(items, sequence, data)
        return
    assert isinstance(store, PostgresStore)
    with psycopg.connect(store._conninfo, autocommit=True) as connection:
        if what == "head":
            sql, values = "UPDATE {0}_heads SET state = %s WHERE digest = %s", (data, ref.digest)
        else:
            number = connection.execute(store._sql("SELECT id FROM {0}_heads WHERE digest = %s"), (ref.digest,))
            place = (*(number.fetchone() or ()), sequence)
            connection.execute(store._sql("DELETE FROM {0}_items WHERE head = %s AND sequence = %s"), place)
            if data is None:
                return
            sql, values = "INSERT INTO {0}_items VALUES (%s, %s, %s)", (*place, data)
        connection.execute(store._sql(sql), values)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.slow
def test_a_loop_may_save_and_delete(store: ServerStore) -> None:
    """A loop over thousands of entries holds nothing meanwhile, and what stays comes exactly once."""
    store.save([SaveLog("s", n, 0, [store.encode(n)] * (n % 3)) for n in range(600)])
    seen = []
    for key, value in store.items("s"):
        seen.append(key)
        assert [key] * (key % 3) == value
        if key % 100 == 0:
            store.save([Delete("s", key), SaveValue("t", key, store.encode(key))])

    assert list(range(600)) == sorted(seen)
    assert (594, 6) == (store.count("s"), store.count("t"))
    assert ["s", "t"] == store.spaces()


def test_a_damaged_item_goes_into_quarantine_and_the_rest_is_served(store: ServerStore) -> None:
    store.save([SaveLog("s", "a", 0, [store.encode(n) for n in range(4)])])
    bad = flipped(store.encode(1))
    write_row(store, "item", "a", 1, bad)
    write_row(store, "item", "a", 3, None)
    record = store.load("s", "a")

    assert record is not None
    assert ([0, 2], 2) == (record.value, record.head.version)
    assert [("s", "a", 1, "the checksum is wrong", bad)] == [
        (row.space, row.key, row.sequence, row.problem, row.data) for row in store.quarantine()
    ]
    assert store.recover().clean


def test_recovery_reports_everything_and_a_value_without_content_is_gone(store: ServerStore) -> None:
    """Damaged heads, rows that no head knows of, and values."""
    store.save([SaveLog("s", key, 0, [store.encode(key)]) for key in "abc"])
    store.save([SaveValue("s", "d", store.encode("d"))])
    write_row(store, "head", "a", 0, b"nonsense")
    write_row(store, "item", "b", 7, store.encode("who?"))
    write_row(store, "item", "d", 0, flipped(store.encode("d")))
    assert store.contains("s", "a")
    assert ["b", "c", "d"] == sorted(head.key for head in store.heads("s"))
    report = store.recover()

    assert (4, 5) == (report.entries, report.items)
    assert {
        ("a", None, "the head of the entry is damaged"),
        ("a", 0, "the head of the entry is damaged"),
        ("b", 7, "the head does not know of this item"),
        ("d", 0, "the checksum is wrong"),
    } == {(row.key, row.sequence, row.problem) for row in report.bad}
    assert [None, ["b"], ["c"], None] == [value_of(store, "s", key) for key in "abcd"]
    assert 4 == len(list(store.quarantine()))
    assert store.recover().clean


def test_the_successor_of_a_damaged_entry_is_not_taken_for_it(store: ServerStore) -> None:
    for n in range(5):
        store.save([SaveValue("s", "a", store.encode(n))])
    write_row(store, "head", "a", 0, b"nonsense")
    (head,) = store.save([SaveValue("s", "a", store.encode("new"), 0)])

    assert head is not None
    assert 1000 < head.version


def test_a_head_of_a_newer_version_is_left_as_it_is(store: ServerStore) -> None:
    ref = refer("s", "a")
    store.save([SaveValue("s", "a", store.encode(1))])
    body = b"\x91\xa3new"
    write_row(store, "head", "a", 0, crc32(ref.raw_key, crc32(ref.raw_space, crc32(body))).to_bytes(4, "big") + body)
    with pytest.raises(StoreError, match="newer version"):
        store.load("s", "a")

    assert [] == list(store.quarantine())


@pytest.mark.parametrize("kind", ["value", "log"])
def test_a_large_value_is_ordinary(real: ServerStore, kind: str) -> None:
    large = b"\0\xff" * 10_000_000
    data = real.encode(large)
    real.save([SaveValue("s", "a", data) if kind == "value" else SaveLog("s", "a", append=[data])])

    assert (large if kind == "value" else [large]) == value_of(real, "s", "a")


def test_a_value_that_is_too_large_is_refused_by_name(store: ServerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_most_bytes", 100)
    with pytest.raises(NotStorable, match=r"'a' in 's' must have at most 100 bytes; found 206"):
        store.save([SaveLog("s", "a", append=[store.encode(b"x" * 199)])])


@pytest.mark.slow
def test_who_forgets_to_close_it_is_told(server: Any, prefix: str) -> None:
    store = server.open(prefix)
    connections = store._client if isinstance(store, RedisStore) else store._pool
    stores = [store]
    del store
    with pytest.warns(ResourceWarning, match="was never closed"):
        stores.clear()
    gc.collect()
    connections.close()


def test_pickle_has_to_be_named_each_time(server: Any, prefix: str) -> None:
    with server.open(prefix, codec="pickle") as store:
        store.save([SaveValue("s", "a", store.encode((1, {2})))])
        assert (1, {2}) == value_of(store, "s", "a")
    with pytest.raises(StoreError, match="found one with 'pickle'"):
        server.open(prefix)


def test_a_store_of_a_newer_version_is_refused(server: Any, prefix: str) -> None:
    with server.open(prefix) as store:
        if isinstance(store, RedisStore):
            store._client.hset(f"{prefix}:settings", "version", 2)
        else:
            store._run("x", lambda c: c.execute(f"UPDATE {prefix}_settings SET value = '2' WHERE name = 'version'"))
    with pytest.raises(StoreError, match=r"a store of version 1 was wanted in .*; found version 2"):
        server.open(prefix)


def test_a_mistake_in_the_address_is_told_at_once() -> None:
    for address in ("localhost", "http://localhost", "redis:localhost"):
        with pytest.raises(ValueError, match="such as redis://localhost:6379/0"):
            RedisStore(address)
    with pytest.raises(ValueError, match="without braces"):
        RedisStore("redis://localhost", prefix="a{b}")
    with pytest.raises(ValueError, match='sync must be "strict"'):
        RedisStore("redis://localhost", sync="yes")
    with pytest.raises(ValueError, match="such as postgresql://"):
        PostgresStore("mysql://localhost")
    for prefix in ("", "a b", "a;b", "a.b.c", "x" * 41):
        with pytest.raises(ValueError, match="plain name"):
            PostgresStore("postgresql://localhost/x", prefix=prefix)


class TestRedis:
    """`RedisStore` alone."""

    def test_a_client_of_ones_own_is_used_and_not_closed(self, redis_server: Any, prefix: str) -> None:
        with redis.Redis(port=redis_server.port) as client:
            with RedisStore(client, prefix=prefix) as store:
                store.save([SaveValue("s", "a", store.encode(1))])
            assert client.ping()
        with (
            redis.Redis(port=redis_server.port, decode_responses=True) as client,
            pytest.raises(ValueError, match="decode_responses"),
        ):
            RedisStore(client)
        with pytest.raises(TypeError, match=r"a URL or a redis\.Redis is wanted; found int"):
            RedisStore(5)  # type: ignore[arg-type]

    def test_valkey_is_spoken_to_in_the_same_way(self, redis_server: Any, prefix: str) -> None:
        with RedisStore(redis_server.url.replace("redis:", "valkey:"), prefix=prefix) as store:
            store.save([SaveValue("s", "a", store.encode(1))])
            assert repr(store) == f"<RedisStore redis://127.0.0.1:{redis_server.port}/0 ({prefix}): open>"

    def test_the_keys_of_one_entry_share_a_hash_tag(self, redis_server: Any, prefix: str) -> None:
        with redis_server.open(prefix) as store:
            store.save([SaveLog("s", "}a{", 0, [store.encode(1)])])
            store.lease("s", "}a{")
            names = [key.decode() for key in store._client.scan_iter(f"{prefix}:{{*")]
            tags = {name.partition("{")[2].partition("}")[0] for name in names}

        assert ["head", "items", "lease"] == sorted(name.rpartition(":")[2] for name in names)
        assert [refer("s", "}a{").digest.hex()] == list(tags)

    def test_redis_deletes_what_is_over_by_itself(
        self, redis_server: Any, prefix: str, clock: ManualClock
    ) -> None:  # fmt: skip
        """A minute later, so that clocks may differ; `expire` then clears the index, and versions go on."""
        with redis_server.open(prefix, timer=clock) as store:
            (head,) = store.save([SaveLog("s", "a", 0, [store.encode(1)], expire_at=clock() + 10)])
            names = store._names(refer("s", "a"))[:2]
            lives = [store._client.pttl(name) for name in names]
            assert all(60_000 < life <= 70_000 for life in lives)
            store._client.delete(*names)  # as Redis does when it is over
            assert ([], [], 0) == (list(store.keys("s")), store.spaces(), store.count("s"))
            clock.advance(10)
            assert (1, 0) == (store.expire(), store.expire())
            (successor,) = store.save([SaveLog("s", "a", 0, [store.encode(2)])])

            assert head.version < successor.version
            assert [-1, -1] == [store._client.pttl(name) for name in names]

    def test_a_note_of_an_end_that_is_wrong_is_put_right(
        self, redis_server: Any, prefix: str, clock: ManualClock
    ) -> None:  # fmt: skip
        with redis_server.open(prefix, timer=clock) as store:
            store.save([SaveValue("s", "a", store.encode(1), expire_at=clock() + 10)])
            for member in store._client.zrange(f"{prefix}:ends", 0, -1):
                store._client.zadd(f"{prefix}:ends", {member: 0})

            assert 0 == store.expire()
            assert 1 == value_of(store, "s", "a")
            assert clock() + 10 == store._client.zrange(f"{prefix}:ends", 0, -1, withscores=True)[0][1]

    def test_a_sync_that_the_server_cannot_do_is_refused_before_anything_is_saved(self, own_redis: Any) -> None:
        """An ordinary save is taken for it only if that was said."""
        with own_redis.open("t") as store:
            store.save([SaveValue("s", "a", store.encode(1))], sync=True)
            store._client.config_set("appendonly", "no")
            with pytest.raises(StoreError, match=r"Nothing was saved\. Set appendonly yes"):
                store.save([SaveValue("s", "a", store.encode(2))], sync=True)
            assert 1 == value_of(store, "s", "a")
        with own_redis.open("t", sync="as configured") as store:
            store.save([SaveValue("s", "a", store.encode(2))], sync=True)
            assert 2 == value_of(store, "s", "a")

    def test_a_sync_waits_for_the_append_only_file(self, own_redis: Any) -> None:
        """Where the server does not do that before each reply by itself."""
        with own_redis.open("t") as store:
            version = store._client.info("server")["redis_version"]
            if tuple(map(int, version.split(".")[:2])) < (7, 2):
                pytest.skip(f"WAITAOF is new in Redis 7.2; found {version}")
            store._client.config_set("appendfsync", "everysec")
            store.save([SaveValue("s", "a", store.encode(1))], sync=True)
            store.save([], sync=True)

            assert store._client.info("commandstats")["cmdstat_waitaof"]["calls"] == 2

    def test_a_server_that_may_delete_conversations_is_reported(
        self, own_redis: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with redis.Redis(port=own_redis.port) as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
        with caplog.at_level(logging.WARNING, "hygiene"), own_redis.open("t"):
            pass

        assert "maxmemory-policy allkeys-lru" in caplog.text

    def test_a_wrong_password_is_an_error_and_is_not_shown(self, own_redis: Any) -> None:
        with redis.Redis(port=own_redis.port) as client:
            client.config_set("requirepass", "right")
        with pytest.raises(StoreError) as caught:
            RedisStore(f"redis://:wrong@127.0.0.1:{own_redis.port}/0")
        with RedisStore(f"redis://:right@127.0.0.1:{own_redis.port}/0") as store:
            assert "right" not in repr(store)

        assert not isinstance(caught.value, StoreUnavailable)
        assert "wrong@" not in str(caught.value)


class TestPostgres:
    """`PostgresStore` alone."""

    def test_a_schema_may_be_named(self, postgres_server: Any, prefix: str) -> None:
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA schema_{prefix}")
        with postgres_server.open(f"schema_{prefix}.bot") as store, postgres_server.open(f"{prefix}_bot") as other:
            store.save([SaveValue("s", "a", store.encode(1))])

            assert (1, None) == (value_of(store, "s", "a"), value_of(other, "s", "a"))

    def test_sync_waits_for_the_disk_even_where_nobody_else_does(
        self, postgres_server: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And what waits for a replica goes on waiting for it."""
        seen: list[str] = []
        write = PostgresStore._write

        def look(self: PostgresStore, connection: Any, plan: Any, *, sync: bool) -> None:
            write(self, connection, plan, sync=sync)
            seen.append(connection.execute("SHOW synchronous_commit").fetchone()[0])

        monkeypatch.setattr(PostgresStore, "_write", look)
        for setting in ("off", "local", "on", "remote_apply"):
            options = f"?options=-csynchronous_commit%3D{setting}"
            with PostgresStore(postgres_server.url + options, prefix=prefix) as store:
                for sync in (False, True):
                    store.save([SaveValue("s", "a", store.encode(1))], sync=sync)
                store.save([], sync=True)

        assert ["off", "on", "local", "on", "on", "on", "remote_apply", "remote_apply"] == seen

    def test_old_leases_are_cleared_away(self, postgres_server: Any, prefix: str) -> None:
        with postgres_server.open(prefix) as store:
            for key in "ab":
                store.lease("s", key)
            old = f"UPDATE {prefix}_leases SET expires_at = now() - interval '2 days' WHERE digest = %s"
            store._run("x", lambda c: c.execute(old, (refer("s", "a").digest,)))
            store.expire()

            assert [(refer("s", "b").digest,)] == store._rows("SELECT digest FROM {0}_leases")

    def test_a_database_that_is_not_there_is_unavailable(self, postgres_server: Any) -> None:
        with pytest.raises(StoreUnavailable, match='database "nowhere" does not exist'):
            PostgresStore(postgres_server.url.removesuffix("postgres") + "nowhere")
