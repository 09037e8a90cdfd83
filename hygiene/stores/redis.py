"""
A store in Redis, or in Valkey, for several processes and machines.

Theory of operation
===================

**Keys.** All keys of one conversation share a hash tag, a digest of its space and key: ``PREFIX:{DIGEST}:head``,
``:items`` (a hash, by sequence number) and ``:lease``. Beside them are one ordered set with the names of all entries,
in which `keys` goes from one to the next, one with the ends of those that have one, the floor, and the quarantine.

**All or none.** A batch is one script, whichever entries it names: it first compares all heads and leases, and only
then writes. Redis runs nothing else meanwhile. It looks at its memory limit before the first write of a script and not
after it, so that it does not stop in the middle. In a cluster no script can span several nodes; so a cluster is refused
rather than promised half.

**Ends.** The store itself decides by its clock whether an entry is over. Redis deletes it by itself a minute later, so
that clocks which differ do no harm, and the floor is lifted when the entry is saved, as nobody is told of its end.

**Tokens** come from a counter that is never behind the clock of the server in microseconds: a server that has lost its
data, or a replica that took over without the last write, does not give a token twice.

**Hints** of changes come from client tracking in broadcast mode: the server tells the names of all keys with our prefix
that change, and remembers nothing of who has read what. They come as messages of an older kind, RESP2, which any
version of redis-py reads as an ordinary reply. These go to a connection that is named by its number; that it may be the
one which has asked for them saves a second connection, and the case that only one of the two breaks.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, Final

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,  # noqa: A004 - redis-py calls it so
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)
from redis.retry import Retry

from hygiene.errors import StoreError, StoreUnavailable
from hygiene.logs import logger
from hygiene.stores.codec import decode_key
from hygiene.stores.servers import SLICE, BrokenError, Entry, MovedError, Plan, Reference, ServerStore, refer
from hygiene.stores.watching import Line, Probe, Watcher, plug_of
from hygiene.units import Duration, seconds

__all__ = ["RedisStore"]


_VERSION: Final = 1
_LONGER: Final = 60.0  # seconds that Redis keeps what is over: more than clocks on one network differ
_GATHER: Final = (
    0.05  # seconds in which changes come together: a busy writer costs twenty calls a second, not thousands
)
_LONGEST: Final = 10**14  # milliseconds; Redis refuses ends that do not fit in 63 bits
# What Redis says when waiting or a hand's turn of the operator helps.
_PASSING: Final = re.compile(
    r"OOM|MISCONF|READONLY|LOADING|BUSY|MASTERDOWN|NOREPLICAS|TRYAGAIN|CLUSTERDOWN|max number of"
)

# KEYS: floor, index, ends, quarantine; then head, items and lease of each entry.
# ARGV: floor that was read or "", new floor or "", rows for the quarantine; then expected head and token of each entry;
# then what becomes of each; then the rows.
_COMMIT: Final = """
local n = (#KEYS - 4) / 3
local lost = {'lost'}
local moved = ARGV[1] ~= '' and (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1]
for i = 1, n do
  local expected, token = ARGV[2 + 2 * i], ARGV[3 + 2 * i]
  if token ~= '' and redis.call('HGET', KEYS[4 + 3 * i], 'token') ~= token then
    lost[#lost + 1] = tostring(i)
  end
  if (redis.call('GET', KEYS[2 + 3 * i]) or '') ~= expected then
    moved = true
  end
end
-- Heads first: whose save was applied and whose reply was lost finds that out, even if his lease is over by now.
if moved then
  return {'moved'}
end
if #lost > 1 then
  return lost
end
local at = 4 + 2 * n
local function next_one()
  at = at + 1
  return ARGV[at - 1]
end
for i = 1, n do
  local head, items = KEYS[2 + 3 * i], KEYS[3 + 3 * i]
  local mode = next_one()
  if mode ~= 'keep' then
    local member, row, ending, life = next_one(), next_one(), next_one(), next_one()
    if next_one() == '1' then
      redis.call('DEL', items)
    end
    for _ = 1, tonumber(next_one()) do
      redis.call('HDEL', items, next_one())
    end
    for _ = 1, tonumber(next_one()) do
      local sequence = next_one()
      redis.call('HSET', items, sequence, next_one())
    end
    if mode == 'delete' then
      redis.call('DEL', head, items)
      redis.call('ZREM', KEYS[2], member)
      redis.call('ZREM', KEYS[3], member)
    else
      redis.call('SET', head, row)
      redis.call('ZADD', KEYS[2], 0, member)
      if life == '' then
        redis.call('PERSIST', items)
        redis.call('ZREM', KEYS[3], member)
      else
        redis.call('PEXPIRE', head, life)
        redis.call('PEXPIRE', items, life)
        redis.call('ZADD', KEYS[3], ending, member)
      end
    end
  end
end
if ARGV[2] ~= '' and tonumber(redis.call('GET', KEYS[1]) or '0') < tonumber(ARGV[2]) then
  redis.call('SET', KEYS[1], ARGV[2])
end
for _ = 1, tonumber(ARGV[3]) do
  redis.call('RPUSH', KEYS[4], next_one())
end
return {'done'}
"""
# A script, although MULTI would do: when Redis is short of memory it refuses even to read in a MULTI.
_LOAD: Final = """
return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2])}
"""
_LEASE: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  return ''
end
local now = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
local token = string.format('%.0f', math.max(last + 1, now[1] * 1000000 + now[2]))
redis.call('SET', KEYS[2], token)
redis.call('HSET', KEYS[1], 'token', token, 'owner', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return token
"""
_RENEW: Final = """
return redis.call('HGET', KEYS[1], 'token') == ARGV[1] and redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
_RELEASE: Final = """
return redis.call('HGET', KEYS[1], 'token') == ARGV[1] and redis.call('DEL', KEYS[1])
"""
_FORGET: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
return redis.call('ZREM', KEYS[4], ARGV[1])
"""

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(tuple[bytes, bytes, int | None, str, float, bytes]).decode


class RedisStore(ServerStore):
    """
    Entries in one Redis or Valkey server, or in its replicated primary; a `Store`. Needs the extra ``hygiene[redis]``.

    Safe for threads, and after ``fork`` on both sides. It connects again by itself when the server comes back.

    **What is kept when the server fails is what its configuration says.** Without ``appendonly yes`` a restart loses
    what came after the last snapshot. With ``appendfsync everysec`` the loss of power costs about a second. A fail-over
    to a replica can cost what was acknowledged and not yet copied, leases included.
    ``sync=True`` waits until the append-only file is on disk: with ``appendfsync always`` it is before any reply, else
    by ``WAITAOF``, which Redis has since 7.2. Where the server can do neither, `StoreError` says so before anything is
    written; with ``sync="as configured"`` it is taken for an ordinary save instead.

    Args:
        server: ``"redis://localhost:6379/0"``, ``"rediss://..."`` (TLS), ``"unix://..."``, ``"valkey://..."``, or a
            ``redis.Redis`` that remains yours: it is not closed, and its timeouts hold.
        prefix: Of all keys, so that several stores have room in one database.
        codec: ``"msgpack"``, or ``"pickle"``, with which anybody who can write to the server can run code in this
            process. It is settled when the store is first opened.
        timeout: Seconds (or ``"5s"``) to wait for a connection, and for each reply. 5 s, as `SQLiteStore` has.
        sync: What ``save(sync=True)`` does on a server that cannot wait for its disk: ``"strict"``, an error;
            ``"as configured"``, as if it were ``False``.
        timer: Returns seconds since 1970.

    Raises:
        ValueError: an argument is not understood.
        StoreError: what is there is of a newer version or has another codec, or access was refused.
        StoreUnavailable: the server cannot be reached.
    """

    _leaves_by_itself = True
    _most_bytes = 512 * 1024 * 1024 - 4096  # Redis' own limit for a string, proto-max-bulk-len

    def __init__(
        self,
        server: str | redis.Redis,
        *,
        prefix: str = "hygiene",
        codec: str = "msgpack",
        timeout: Duration = 5.0,
        sync: str = "strict",
        timer: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(codec=codec, timer=timer)
        if not prefix or "{" in prefix or "}" in prefix:
            # Braces would make another hash tag than that of the conversation.
            raise ValueError(f"prefix must be text without braces; found {prefix!r}")
        if sync not in {"strict", "as configured"}:
            raise ValueError(f'sync must be "strict" or "as configured"; found {sync!r}')
        self._strict = sync == "strict"
        self._prefix = prefix
        self._mine = isinstance(server, str)
        self._wait = seconds(timeout, "timeout")
        self._client: Any = self._connect(server) if isinstance(server, str) else server
        if not isinstance(self._client, redis.Redis):
            raise TypeError(
                f"a URL or a redis.Redis is wanted; found {type(self._client).__qualname__}. A cluster cannot save "
                f"several entries at once, and asyncio clients belong to one loop: give the URL of one server"
            )
        known = self._client.get_connection_kwargs()
        if known.get("decode_responses"):
            raise ValueError("a client that returns bytes is wanted; found decode_responses=True. Leave it out")
        place = known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
        self.address = f"redis://{place}/{known.get('db') or 0} ({prefix})"
        self._floor, self._index, self._ends, self._bad, self._settings, self._tokens = (
            f"{prefix}:{name}" for name in ("floor", "index", "ends", "quarantine", "settings", "tokens")
        )
        register = self._client.register_script
        self._run_load, self._run_commit, self._run_forget = map(register, (_LOAD, _COMMIT, _FORGET))
        self._run_lease, self._run_renew, self._run_release = map(register, (_LEASE, _RENEW, _RELEASE))
        try:
            self._settle()
            self._closed = False
        finally:
            if self._closed and self._mine:
                self._client.close()

    def _connect(self, address: str) -> Any:
        scheme, colon, rest = address.partition("://")
        scheme = {"valkey": "redis", "valkeys": "rediss"}.get(scheme.lower(), scheme.lower())
        if not colon or scheme not in {"redis", "rediss", "unix"}:
            raise ValueError(f"an address such as redis://localhost:6379/0 is wanted; found the scheme {scheme!r}")
        # What is sent again without our knowledge would be taken for somebody else's save.
        return redis.Redis.from_url(
            f"{scheme}://{rest}",
            decode_responses=False,
            socket_timeout=self._wait,
            socket_connect_timeout=self._wait,
            retry=Retry(NoBackoff(), 0),
        )

    def _settle(self) -> None:
        with self._failing("open"):
            self._client.hsetnx(self._settings, "version", _VERSION)
            self._client.hsetnx(self._settings, "codec", self._codec.name)
            version, codec = self._client.hmget(self._settings, "version", "codec")
        if int(version) != _VERSION:
            raise StoreError(
                f"a store of version {_VERSION} was wanted in {self.address}; found version {int(version)}. "
                f"Open it with the version of this library that wrote it, or with a newer one"
            )
        if codec.decode() != self._codec.name:
            raise StoreError(
                f"a store with codec {self._codec.name!r} was wanted in {self.address}; found one with "
                f"{codec.decode()!r}. Open it with codec={codec.decode()!r}, if you trust whoever can write to it, or "
                f"give another prefix"
            )
        policy = self._configured("maxmemory-policy")
        if policy.startswith("allkeys"):
            logger.warning(
                "store %s: the server has maxmemory-policy %s and will delete conversations when it is short of "
                "memory; set noeviction",
                self.address, policy,
                extra={"event_name": "store.server_evicts", "store": self.address},
            )  # fmt: skip

    def _configured(self, name: str) -> str:
        """A setting of the server; empty where it does not tell, as services often do not."""
        with self._failing("ask"):
            try:
                found = self._client.config_get(name)
            except ResponseError:
                return ""
        return str(found.get(name, ""))

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turn what redis-py raises into what a caller can act upon."""
        try:
            yield
        except RedisError as error:
            raise self._error(what, error) from error

    def _error(self, what: str, error: RedisError) -> StoreError:
        if isinstance(error, ReadOnlyError) and self._mine:
            # After a fail-over the primary is elsewhere, and only a new connection goes there.
            self._client.connection_pool.disconnect(inuse_connections=False)
        passing = isinstance(error, (BusyLoadingError, OutOfMemoryError, ReadOnlyError)) or _PASSING.match(str(error))
        if isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, AuthenticationError):
            return StoreUnavailable(
                f"cannot {what} store {self.address}: no answer from the server ({type(error).__name__}: {error}). "
                f"See that it runs and can be reached, and try again"
            )
        if passing:
            return StoreUnavailable(f"cannot {what} store {self.address}: {error}. See to the server, and try again")
        return StoreError(f"cannot {what} store {self.address}: {error}")

    # Reading

    def _names(self, ref: Reference) -> tuple[str, str, str]:
        stem = f"{self._prefix}:{{{ref.digest.hex()}}}:"
        return stem + "head", stem + "items", stem + "lease"

    def _heads(self, refs: Sequence[Reference]) -> tuple[int, list[bytes | None]]:
        with self._failing("read"):
            *rows, floor = self._client.mget([*(self._names(ref)[0] for ref in refs), self._floor])
        return int(floor or 0), rows

    def _lengths(self, wanted: Sequence[tuple[Reference, Sequence[int]]]) -> list[list[int]]:
        with self._failing("read"), self._client.pipeline(transaction=False) as pipeline:
            for ref, sequences in wanted:
                items = self._names(ref)[1]
                for sequence in sequences:
                    pipeline.hstrlen(items, sequence)
            found = iter(pipeline.execute())
        return [[next(found) for _ in sequences] for _, sequences in wanted]

    def _whole(self, ref: Reference) -> tuple[bytes | None, list[tuple[int, bytes]]]:
        head, items, _ = self._names(ref)
        with self._failing("read"):
            row, found = self._run_load([head, items])
        return row, sorted(zip(map(int, found[::2]), found[1::2], strict=True))

    def _slices(self, space: str | None) -> Iterator[tuple[Reference, bytes | None]]:
        self._check_open()
        start, stop = b"-", b"+"
        if space is not None:
            first = _pack(space.encode())
            start, stop = b"[" + first, b"(" + _behind(first)
        while True:
            with self._failing("read"):
                members = self._client.zrangebylex(self._index, start, stop, start=0, num=SLICE)
            if not members:
                return
            refs = [_reference(member) for member in members]
            yield from zip(refs, self._heads(refs)[1], strict=True)
            start = b"(" + members[-1]
            self._check_open()

    def spaces(self) -> list[str]:
        """Names of the spaces that have entries."""
        self._check_open()
        start = b"-"
        found: list[str] = []
        while True:
            with self._failing("read"):
                members = self._client.zrangebylex(self._index, start, b"+", start=0, num=1)
            if not members:
                return sorted(found)
            ref = _reference(members[0])
            if next(self.keys(ref.space), self) is not self:
                found.append(ref.space)
            start = b"[" + _behind(_pack(ref.raw_space))

    # Writing

    def _commit(self, plan: Plan, *, sync: bool) -> None:
        if sync:
            self._check_sync()
        entries = list(plan.entries.values())
        keys: list[Any] = [self._floor, self._index, self._ends, self._bad]
        values: list[Any] = [plan.floor if plan.creates else "", plan.lift or "", len(plan.quarantine)]
        for entry in entries:
            keys += self._names(entry.ref)
            values += (entry.expected or b"", "" if entry.token is None else entry.token)
        for entry in entries:
            values += _outcome(entry, plan.now)
        values += (_pack(row) for row in plan.quarantine)
        try:
            said, *lost = self._run_commit(keys, values)
        except (ConnectionError, TimeoutError) as error:
            if isinstance(error, (BusyLoadingError, AuthenticationError)):
                raise self._error("save to", error) from error
            raise BrokenError from error
        except RedisError as error:
            raise self._error("save to", error) from error
        if said == b"moved":
            raise MovedError
        if said == b"lost":
            raise self._ownership_lost((entries[int(i) - 1].ref for i in lost), "save")
        if sync:
            self._sync()

    def _check_sync(self) -> str:
        """How this server takes what was saved to its disk: ``"always"``, ``"WAITAOF"``, or not at all: ``""``."""
        if self._configured("appendonly") == "yes":
            if self._configured("appendfsync") == "always":
                return "always"
            with self._failing("ask"):
                version = str(self._client.info("server")["redis_version"])  # Valkey gives that of its Redis, too
            if tuple(map(int, version.split(".")[:2])) >= (7, 2):
                return "WAITAOF"
        if self._strict:
            raise StoreError(
                f"a save with sync=True was wanted in {self.address}; found a server that does not say that it keeps "
                f"an append-only file, or cannot be waited for. Nothing was saved. Set appendonly yes and appendfsync "
                f'always, take Redis 7.2 or newer, or open the store with sync="as configured" and accept the loss'
            )
        return ""

    def _sync(self) -> None:
        if self._check_sync() != "WAITAOF":
            return
        with self._failing("sync"), self._client.pipeline(transaction=False) as pipeline:
            # A write of this connection: it is that, and all before it, which WAITAOF waits for.
            pipeline.hincrby(self._settings, "syncs", 1)
            pipeline.waitaof(1, 0, max(int(self._wait * 900), 1))
            _, (local, _) = pipeline.execute()
        if not local:
            raise StoreUnavailable(
                f"store {self.address} has saved, but its disk did not follow within {self._wait:g} s. "
                f"Save again with sync=True"
            )

    def _ended(self, now: float) -> list[Reference]:
        with self._failing("read"):
            members = self._client.zrangebyscore(self._ends, "-inf", now, start=0, num=SLICE)
        return [_reference(member) for member in members]

    def _forget(self, ref: Reference) -> bool:
        head, items, _ = self._names(ref)
        with self._failing("expire in"):
            return bool(self._run_forget([head, items, self._index, self._ends], [_member(ref)]))

    def _quarantined(self, after: int) -> list[tuple[int, bytes, bytes, int | None, str, float, bytes | None]]:
        with self._failing("read"):
            rows = self._client.lrange(self._bad, after, after + 15)
        return [(number, *_unpack(row)) for number, row in enumerate(rows, after + 1)]

    # Leases

    def lease(self, space: str, key: Hashable, *, ttl: Duration = 30.0, owner: str | None = None) -> int | None:
        """Take the lease of an entry if nobody has it; see `ServerStore.lease`."""
        self._check_open()
        life, name = self._terms(ttl, owner)
        with self._failing("lease in"):
            token = self._run_lease([self._names(refer(space, key))[2], self._tokens], [_milliseconds(life), name])
        return int(token) if token else None

    def renew(self, space: str, key: Hashable, token: int, *, ttl: Duration = 30.0) -> None:
        """Let the lease with *token* hold for *ttl* from now; see `ServerStore.renew`."""
        self._check_open()
        ref = refer(space, key)
        with self._failing("renew a lease in"):
            held = self._run_renew([self._names(ref)[2]], [token, _milliseconds(seconds(ttl, "ttl"))])
        if not held:
            raise self._ownership_lost([ref], "renew it")

    def release(self, space: str, key: Hashable, token: int) -> bool:
        """Give the lease with *token* back: whether it still held."""
        self._check_open()
        with self._failing("release a lease in"):
            return bool(self._run_release([self._names(refer(space, key))[2]], [token]))

    def _lost(self, tokens: Sequence[tuple[Reference, int]]) -> list[Reference]:
        with self._failing("read"), self._client.pipeline(transaction=False) as pipeline:
            for ref, _ in tokens:
                pipeline.hget(self._names(ref)[2], "token")
            held = pipeline.execute()
        return [ref for (ref, token), found in zip(tokens, held, strict=True) if int(found or 0) != token]

    # Hints

    def _line(self) -> Callable[[Watcher], Line]:
        pool = self._client.connection_pool
        # The notices of maintenance need RESP3, and would come in between.
        options = {name: value for name, value in pool.connection_kwargs.items() if not name.startswith("maint")}
        options |= {
            "protocol": 2,
            "decode_responses": False,
            "socket_timeout": self._wait,
            "health_check_interval": 0,  # its replies would be taken for messages
            "retry": Retry(NoBackoff(), 0),  # to connect again unnoticed would be to miss something
        }
        return functools.partial(
            _open_line, functools.partial(pool.connection_class, **options), self._prefix, self._wait
        )

    def _disconnect(self) -> None:
        if self._mine:
            self._client.close()


class _Tracking:
    """A line on which the server tells of each change by itself."""

    tells = True

    def __init__(self, connection: Any, prefix: str, wait: float) -> None:
        self._connection = connection
        self._wait = wait
        self._head = re.compile(re.escape(f"{prefix}:{{".encode()) + rb"([0-9a-f]{40})\}:head")
        _call(connection, "CLIENT", "TRACKING", "ON", "REDIRECT", _call(connection, "CLIENT", "ID"), "BCAST",
              "PREFIX", f"{prefix}:{{")  # fmt: skip
        _call(connection, "SUBSCRIBE", "__redis__:invalidate")
        self.plug = _plug(connection)

    def wait(self, watcher: Watcher) -> Collection[bytes] | None:
        """Wait for messages, and then a little for more of them; whoever is silent for too long is asked."""
        connection = self._connection
        if not connection.can_read(timeout=watcher.interval):
            connection.send_command("PING")
            if not connection.can_read(timeout=self._wait):
                raise TimeoutError(f"no answer within {self._wait:g} s")
        found: set[bytes] = set()
        end = time.monotonic() + _GATHER
        while True:
            kind, *rest = connection.read_response()
            if kind == b"message":
                if rest[1] is None:
                    return None  # the server was emptied
                found.update(bytes.fromhex(name[1].decode()) for name in map(self._head.fullmatch, rest[1]) if name)
            left = end - time.monotonic()
            if (kind == b"pong" and not found) or left <= 0 or not connection.can_read(timeout=left):
                return found

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.disconnect()


def _call(connection: Any, *command: Any) -> Any:
    connection.send_command(*command)
    return connection.read_response()


def _plug(connection: Any) -> Any:
    # Not public. Without it a watch that is closed ends its thread a little later.
    found = getattr(connection, "_sock", None)
    return None if found is None else plug_of(found.fileno())


def _open_line(connect: Callable[[], Any], prefix: str, wait: float, watcher: Watcher) -> Line:
    """A connection that tells of changes; if the server refuses, or does not know how to, one to ask on."""
    connection = connect()
    try:
        connection.connect()
        try:
            return _Tracking(connection, prefix, wait)
        except ResponseError as error:
            if _PASSING.match(str(error)):
                raise
            if not watcher.refused:
                logger.warning(
                    "%s: the server does not tell of changes (%s); it is asked every %g s",
                    watcher.name, error, watcher.interval,
                    extra={"event_name": "store.watch_asks", "store": watcher.name},
                )  # fmt: skip
            watcher.refused = True
        # Anew: it may be half a listener by now.
        connection.disconnect()
        connection.connect()
        return Probe(functools.partial(_ask, connection, prefix), connection.disconnect, _plug(connection))
    except BaseException:
        connection.disconnect()
        raise


def _ask(connection: Any, prefix: str, digests: list[bytes]) -> list[bytes | None]:
    try:
        found: list[bytes | None] = _call(connection, "MGET", *(f"{prefix}:{{{d.hex()}}}:head" for d in digests))
    except ResponseError as error:
        raise StoreError(str(error)) from error
    return found


def _member(ref: Reference) -> bytes:
    """The entry's name in the index: those of one space side by side."""
    return _pack(ref.raw_space) + ref.raw_key


def _behind(first: bytes) -> bytes:
    """What comes behind all that begins with *first*, which is no row of 255 only: no space is that long."""
    short = first.rstrip(b"\xff")
    return short[:-1] + bytes([short[-1] + 1])


def _reference(member: bytes) -> Reference:
    size, start = _binary_header(member)
    raw_key = member[start + size :]
    return refer(member[start : start + size].decode(), decode_key(raw_key), raw_key)


def _binary_header(data: bytes) -> tuple[int, int]:
    """Length and beginning of the MessagePack binary that stands first in *data*."""
    width = {0xC4: 1, 0xC5: 2, 0xC6: 4}[data[0]]
    return int.from_bytes(data[1 : 1 + width], "big"), 1 + width


def _milliseconds(life: float) -> int:
    return min(max(int(life * 1000), 1), _LONGEST)


def _outcome(entry: Entry, now: float) -> list[Any]:
    """What becomes of *entry*, as the script reads it."""
    if not entry.changed and not entry.clear:
        return ["keep"]
    state = entry.state
    ending: Any = ""
    life: Any = ""
    if state is not None and state.expire_at is not None:
        ending = repr(state.expire_at)
        life = _milliseconds(state.expire_at - now + _LONGER)
    mode = "delete" if state is None else "save"
    values = [mode, _member(entry.ref), entry.sealed or b"", ending, life, "1" if entry.clear else "0"]
    values += [len(entry.drops), *entry.drops, len(entry.puts)]
    for sequence, data in entry.puts.items():
        values += (sequence, data)
    return values
