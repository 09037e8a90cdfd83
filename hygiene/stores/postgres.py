"""
A store in PostgreSQL, for several processes and machines.

Theory of operation
===================

**Rows.** As in SQLite: a head for each entry, and its items beside it, by the number of the head and the sequence
number. An entry is found by a digest of its space and key, since an index cannot hold a key of any length.

**Saving** is one transaction. Each head is updated only where it still is the one that was read, in the order of the
digests, so that no two savers wait for each other. New ones are inserted where there is none, and the floor is
compared after that, when whoever has deleted such an entry has committed for sure.

**Tokens** of leases are never behind the clock of the server in microseconds, and always greater than the one before
of the same entry. A save under a token holds the row of its lease until it has committed: whoever takes the lease next
sees what was saved.

**Hints** of changes come from asking: once in a while, for the heads of what somebody has in memory. A ``NOTIFY`` for
each save would let all that save wait for one lock, and be lost with each connection all the same.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict

from hygiene.errors import PoolClosed, PoolTimeout, StoreError, StoreUnavailable
from hygiene.pool import Pool
from hygiene.stores.servers import SLICE, BrokenError, MovedError, Plan, Reference, ServerStore, refer, reference_of
from hygiene.stores.watching import Line, Probe, Watcher, plug_of
from hygiene.units import Duration, seconds

__all__ = ["PostgresStore"]

T = TypeVar("T")

_VERSION: Final = 1
# ``{0}`` is the prefix, which is checked to be a plain name.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS {0}_heads (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, digest bytea NOT NULL UNIQUE, space bytea NOT NULL,
    key bytea NOT NULL, expire_at double precision, bytes bigint NOT NULL, state bytea NOT NULL);
CREATE INDEX IF NOT EXISTS {0}_heads_by_space ON {0}_heads (space, id);
CREATE INDEX IF NOT EXISTS {0}_heads_by_end ON {0}_heads (expire_at) WHERE expire_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS {0}_items (
    head bigint NOT NULL, sequence bigint NOT NULL, data bytea NOT NULL, PRIMARY KEY (head, sequence));
CREATE TABLE IF NOT EXISTS {0}_leases (
    digest bytea PRIMARY KEY, token bigint NOT NULL, owner text NOT NULL, expires_at timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS {0}_quarantine (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, space bytea, key bytea, sequence bigint, problem text,
    found_at double precision, data bytea);
CREATE TABLE IF NOT EXISTS {0}_numbers (name text PRIMARY KEY, value bigint NOT NULL);
CREATE TABLE IF NOT EXISTS {0}_settings (name text PRIMARY KEY, value text NOT NULL);
INSERT INTO {0}_numbers VALUES ('floor', 0), ('syncs', 0) ON CONFLICT DO NOTHING;
INSERT INTO {0}_settings VALUES ('codec', '{1}'), ('version', '{2}') ON CONFLICT DO NOTHING;
"""
_LOCK: Final = 0x48594749  # "HYGI": PostgreSQL lets two make the same table at once, and then one of them fails
# What PostgreSQL says when waiting or a hand's turn of the operator helps, beside all that is an OperationalError.
_PASSING: Final = (psycopg.OperationalError, errors.ReadOnlySqlTransaction)
_RACES: Final = (errors.SerializationFailure, errors.DeadlockDetected, errors.UniqueViolation)


class PostgresStore(ServerStore):
    """
    Entries in one PostgreSQL database; a `Store`. Needs the extra ``hygiene[postgres]``.

    Safe for threads, and after ``fork`` on both sides: each process has connections of its own, in a `Pool`. Those that
    the server has closed are replaced.

    **What is kept when the server fails is what its configuration says.** A commit waits for the disk, as
    ``synchronous_commit`` has it, which is ``on`` if nobody has changed it. Who prefers speed sets it to ``off``, for a
    role, a database, or in *conninfo* with ``options=-csynchronous_commit=off``: then a crash of the server costs what
    came in the last 0.6 s, and ``sync=True`` still waits for the disk.

    Args:
        conninfo: ``"postgresql://user@host/database"``, or ``"host=... dbname=..."``.
        prefix: Of the tables, which are made if they are not there. Letters, digits and underscores; at most 40. May
            have a schema before it that exists: ``"bot.hygiene"``.
        codec: ``"msgpack"``, or ``"pickle"``, with which anybody who can write to the database can run code in this
            process. It is settled when the store is first opened.
        timeout: Seconds (or ``"5s"``) to wait for a connection, and for each statement. 5 s, as `SQLiteStore` has.
        max_size: Connections at most. 4: one saves, a few load; a server has 100 for all by default.
        timer: Returns seconds since 1970.

    Raises:
        ValueError: an argument is not understood.
        StoreError: what is there is of a newer version or has another codec, or access was refused.
        StoreUnavailable: the server cannot be reached.
    """

    _most_bytes = 1024**3 - 1024**2  # PostgreSQL's limit for a field, with room for the message around it

    def __init__(
        self,
        conninfo: str,
        *,
        prefix: str = "hygiene",
        codec: str = "msgpack",
        timeout: Duration = 5.0,
        max_size: int = 4,
        timer: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(codec=codec, timer=timer)
        # It stands in statements as it is.
        if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]{0,39}\.)?[A-Za-z_][A-Za-z0-9_]{0,39}", prefix):
            raise ValueError(f"prefix must be a plain name of at most 40 characters; found {prefix!r}")
        self._conninfo = conninfo
        self._wait = seconds(timeout, "timeout")
        try:
            known = conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError as error:
            raise ValueError(f"an address such as postgresql://user@host/database is wanted; {error}") from error
        place = f"{known.get('host', 'localhost')}:{known.get('port', 5432)}/{known.get('dbname', '')}"
        self.address = f"postgresql://{place} ({prefix})"
        self._prefix = prefix
        self._pool: Pool[psycopg.Connection[Any]] = Pool(
            functools.partial(_connect, conninfo, self._wait),
            max_size=max_size,
            timeout=self._wait,
            name=f"store {self.address}",
        )
        try:
            self._settle()
            self._closed = False
        finally:
            if self._closed:
                self._pool.close()

    def _sql(self, statement: str) -> Any:
        """*statement* with the names of our tables: ``{0}`` is the prefix."""
        return statement.format(self._prefix)

    def _settle(self) -> None:
        codec = self._codec.name
        index = self._prefix.rpartition(".")[2]

        def settle(connection: psycopg.Connection[Any]) -> dict[str, str]:
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                # Looked up first: a role that may only use the tables need not be allowed to make any.
                found = connection.execute("SELECT to_regclass(%s)", (f"{self._prefix}_settings",)).fetchone()
                if found is None or found[0] is None:
                    schema: Any = _SCHEMA.format(self._prefix, codec, _VERSION)
                    for name in ("by_space", "by_end"):  # an index has no schema of its own
                        schema = schema.replace(f"{self._prefix}_heads_{name}", f"{index}_heads_{name}")
                    connection.execute(schema)
                return dict(connection.execute(self._sql("SELECT name, value FROM {0}_settings")).fetchall())

        settings = self._run("open", settle)
        if settings.get("version") != str(_VERSION):
            raise StoreError(
                f"a store of version {_VERSION} was wanted in {self.address}; found version "
                f"{settings.get('version')}. Open it with the version of this library that wrote it, or a newer one"
            )
        if settings.get("codec") != codec:
            raise StoreError(
                f"a store with codec {codec!r} was wanted in {self.address}; found one with {settings.get('codec')!r}. "
                f"Open it with codec={settings.get('codec')!r}, if you trust whoever can write to it, or give another "
                f"prefix"
            )

    # Connections

    @contextlib.contextmanager
    def _using(self, what: str) -> Iterator[psycopg.Connection[Any]]:
        """A connection; `BrokenError` if it broke, and then it is not used again."""
        try:
            lease = self._pool.lease()
        except PoolTimeout as error:
            raise StoreUnavailable(f"cannot {what} store {self.address}: all its connections are in use") from error
        except PoolClosed:
            self._check_open()
            raise
        except psycopg.Error as error:
            raise self._error(what, error) from error
        discard = True
        connection = lease.resource
        try:
            yield connection
            discard = False
        except psycopg.Error as error:
            if connection.closed or connection.broken:
                raise BrokenError from error
            # After a fail-over the primary is elsewhere, and only a new connection goes there.
            discard = isinstance(error, errors.ReadOnlySqlTransaction)
            raise self._error(what, error) from error
        except (MovedError, StoreError):
            discard = False
            raise
        finally:
            lease.release(discard=discard)

    def _run(self, what: str, function: Callable[[psycopg.Connection[Any]], T]) -> T:
        """What *function* returns; for what may be done twice: with another connection if the first one broke."""
        error: BaseException | None = None
        # Each may be one that has been idle since before the server was restarted; the one after them is new.
        for _ in range(self._pool.stats().max_size + 1):
            try:
                with self._using(what) as connection:
                    return function(connection)
            except BrokenError as broken:
                error = broken.__cause__
        raise StoreUnavailable(
            f"cannot {what} store {self.address}: the server ends each connection. See to it, and try again ({error})"
        ) from error

    def _rows(self, statement: str, values: Sequence[Any] = (), *, what: str = "read") -> list[Any]:
        return self._run(what, lambda c: c.execute(self._sql(statement), values, binary=True).fetchall())

    def _error(self, what: str, error: psycopg.Error) -> StoreError:
        found = f"{type(error).__name__}: {str(error).strip()}"
        if isinstance(error, (errors.InvalidPassword, errors.InvalidAuthorizationSpecification)):
            return StoreError(f"cannot {what} store {self.address}: access was refused ({found})")
        if isinstance(error, _PASSING):
            return StoreUnavailable(
                f"cannot {what} store {self.address}: {found}. See that the server runs and can be written to, and try "
                f"again"
            )
        return StoreError(f"cannot {what} store {self.address}: {found}")

    # Reading

    def _heads(self, refs: Sequence[Reference]) -> tuple[int, list[bytes | None]]:
        digests = [ref.digest for ref in refs]
        rows = self._rows(
            "SELECT digest, state FROM {0}_heads WHERE digest = ANY(%s) "
            "UNION ALL SELECT NULL, convert_to(value::text, 'UTF8') FROM {0}_numbers WHERE name = 'floor'",
            (digests,),
        )
        found = dict(rows)
        return int(found.pop(None, b"0")), [found.get(digest) for digest in digests]

    def _lengths(self, wanted: Sequence[tuple[Reference, Sequence[int]]]) -> list[list[int]]:
        statement = (
            "SELECT sequence, length(data) FROM {0}_items WHERE head = (SELECT id FROM {0}_heads WHERE digest = %s) "
            "AND sequence = ANY(%s)"
        )
        return [
            [found.get(sequence, 0) for sequence in sequences]
            for ref, sequences in wanted
            for found in [dict(self._rows(statement, (ref.digest, list(sequences))))]
        ]

    def _whole(self, ref: Reference) -> tuple[bytes | None, list[tuple[int, bytes]]]:
        # One statement sees one moment.
        rows = self._rows(
            "SELECT NULL::bigint, state FROM {0}_heads WHERE digest = %s UNION ALL SELECT i.sequence, i.data "
            "FROM {0}_heads h JOIN {0}_items i ON i.head = h.id WHERE h.digest = %s ORDER BY 1 NULLS FIRST",
            (ref.digest, ref.digest),
        )
        return (rows[0][1], rows[1:]) if rows else (None, [])

    def _slices(self, space: str | None) -> Iterator[tuple[Reference, bytes | None]]:
        last, where = 0, "" if space is None else "AND space = %s "
        statement = f"SELECT id, space, key, state FROM {{0}}_heads WHERE id > %s {where}ORDER BY id LIMIT %s"  # noqa: S608
        while True:
            self._check_open()
            rows = self._rows(statement, (last, *(() if space is None else (space.encode(),)), SLICE))
            for number, raw_space, raw_key, state in rows:
                last = number
                yield reference_of(raw_space, raw_key), state
            if len(rows) < SLICE:
                return

    def spaces(self) -> list[str]:
        """Names of the spaces that have entries."""
        self._check_open()
        select = "SELECT DISTINCT space FROM {0}_heads WHERE expire_at IS NULL OR expire_at > %s"
        return sorted(space.decode() for (space,) in self._rows(select, (self._timer(),)))

    def count(self, space: str) -> int:
        """Number of entries in *space*."""
        return self._total("count(*)", space)

    def nbytes(self, space: str) -> int:
        """Encoded size of everything in *space*, without keys."""
        return self._total("coalesce(sum(bytes), 0)::bigint", space)

    def _total(self, what: str, space: str) -> int:
        self._check_open()
        select = f"SELECT {what} FROM {{0}}_heads WHERE space = %s AND (expire_at IS NULL OR expire_at > %s)"  # noqa: S608
        return int(self._rows(select, (space.encode(), self._timer()))[0][0])

    # Writing

    def _commit(self, plan: Plan, *, sync: bool) -> None:
        with self._using("save to") as connection:
            try:
                with connection.transaction():
                    self._write(connection, plan, sync=sync)
            except _RACES as error:
                raise MovedError from error

    def _write(self, connection: psycopg.Connection[Any], plan: Plan, *, sync: bool) -> None:
        if sync:
            _wait_for_disk(connection)
        entries = [plan.entries[digest] for digest in sorted(plan.entries)]
        tokens = [(entry.ref, entry.token) for entry in entries if entry.token is not None]
        if tokens and (lost := self._lost_in(connection, tokens)):
            raise self._ownership_lost(lost, "save")
        execute, drops, puts = connection.execute, [], []
        for entry in entries:
            if not entry.changed:
                continue
            ref, state = entry.ref, entry.state
            if state is None:
                statement = "DELETE FROM {0}_heads WHERE digest = %s AND state = %s RETURNING id"
                values: tuple[Any, ...] = (ref.digest, entry.expected)
            elif entry.expected is None:
                statement = (
                    "INSERT INTO {0}_heads (digest, space, key, expire_at, bytes, state) VALUES (%s, %s, %s, %s, %s, "
                    "%s) ON CONFLICT DO NOTHING RETURNING id"
                )
                values = (ref.digest, ref.raw_space, ref.raw_key, state.expire_at, state.size, entry.sealed)
            else:
                statement = (
                    "UPDATE {0}_heads SET expire_at = %s, bytes = %s, state = %s WHERE digest = %s AND state = %s "
                    "RETURNING id"
                )
                values = (state.expire_at, state.size, entry.sealed, ref.digest, entry.expected)
            row = None
            if state is not None or entry.expected is not None:
                row = execute(self._sql(statement), values).fetchone()
                if row is None:
                    raise MovedError
            if row is None:
                continue
            if state is None or (entry.clear and entry.expected is not None):
                execute(self._sql("DELETE FROM {0}_items WHERE head = %s"), row)
            drops += [(row[0], sequence) for sequence in entry.drops]
            puts += [(row[0], sequence, data) for sequence, data in entry.puts.items()]
        with connection.cursor() as cursor:
            if drops:
                cursor.executemany(self._sql("DELETE FROM {0}_items WHERE head = %s AND sequence = %s"), drops)
            if puts:
                put = (
                    "INSERT INTO {0}_items VALUES (%s, %s, %b) "
                    "ON CONFLICT (head, sequence) DO UPDATE SET data = excluded.data"
                )
                cursor.executemany(self._sql(put), puts)
            if plan.quarantine:
                insert = (
                    "INSERT INTO {0}_quarantine (space, key, sequence, problem, found_at, data) "
                    "VALUES (%s, %s, %s, %s, %s, %s)"
                )
                cursor.executemany(self._sql(insert), plan.quarantine)
        # Last: it is one row for all, and whoever changes it holds it until the end of his transaction.
        if plan.creates:
            found = execute(self._sql("SELECT value FROM {0}_numbers WHERE name = 'floor'")).fetchone()
            if found is None or found[0] != plan.floor:
                raise MovedError
        if plan.lift:
            lift = "UPDATE {0}_numbers SET value = %s WHERE name = 'floor' AND value < %s"
            execute(self._sql(lift), (plan.lift, plan.lift))

    def _sync(self) -> None:
        def write(connection: psycopg.Connection[Any]) -> None:
            with connection.transaction():
                _wait_for_disk(connection)
                # Something for the sync to wait for: it takes all that was committed before to the disk, too.
                connection.execute(self._sql("UPDATE {0}_numbers SET value = value + 1 WHERE name = 'syncs'"))

        self._run("sync", write)

    def _ended(self, now: float) -> list[Reference]:
        rows = self._rows(
            "SELECT space, key FROM {0}_heads WHERE expire_at <= %s ORDER BY expire_at LIMIT %s", (now, SLICE)
        )
        return [reference_of(space, key) for space, key in rows]

    def expire(self, now: float | None = None) -> int:
        """Delete what is over, in slices, and return how many entries that were; see `Store.expire`."""
        total = super().expire(now)
        # Long enough that nobody holds on to a token so old.
        old = "DELETE FROM {0}_leases WHERE expires_at < clock_timestamp() - interval '1 day'"
        self._run("expire in", lambda c: c.execute(self._sql(old)))
        return total

    def _forget(self, ref: Reference) -> bool:  # noqa: ARG002 - Redis looks at it
        return False  # a row of the index is the head itself

    def _quarantined(self, after: int) -> list[tuple[int, bytes, bytes, int | None, str, float, bytes | None]]:
        return self._rows("SELECT * FROM {0}_quarantine WHERE id > %s ORDER BY id LIMIT 16", (after,))

    # Leases

    def lease(self, space: str, key: Hashable, *, ttl: Duration = 30.0, owner: str | None = None) -> int | None:
        """Take the lease of an entry if nobody has it; see `ServerStore.lease`."""
        self._check_open()
        life, name = self._terms(ttl, owner)
        rows = self._rows(
            "INSERT INTO {0}_leases AS old VALUES (%s, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, %s, "
            "clock_timestamp() + make_interval(secs => %s)) ON CONFLICT (digest) DO UPDATE SET "
            "token = greatest(old.token + 1, excluded.token), owner = excluded.owner, "
            "expires_at = excluded.expires_at WHERE old.expires_at <= clock_timestamp() RETURNING token",
            (refer(space, key).digest, name, life),
            what="lease in",
        )
        return rows[0][0] if rows else None

    def renew(self, space: str, key: Hashable, token: int, *, ttl: Duration = 30.0) -> None:
        """Let the lease with *token* hold for *ttl* from now; see `ServerStore.renew`."""
        self._check_open()
        ref = refer(space, key)
        rows = self._rows(
            "UPDATE {0}_leases SET expires_at = clock_timestamp() + make_interval(secs => %s) "
            "WHERE digest = %s AND token = %s AND expires_at > clock_timestamp() RETURNING 1",
            (seconds(ttl, "ttl"), ref.digest, token),
            what="renew a lease in",
        )
        if not rows:
            raise self._ownership_lost([ref], "renew it")

    def release(self, space: str, key: Hashable, token: int) -> bool:
        """Give the lease with *token* back: whether it still held."""
        self._check_open()
        # The row stays for a while: the next token has to be greater.
        release = (
            "UPDATE {0}_leases SET expires_at = clock_timestamp() "
            "WHERE digest = %s AND token = %s AND expires_at > clock_timestamp() RETURNING 1"
        )
        return bool(self._rows(release, (refer(space, key).digest, token), what="release a lease in"))

    def _lost(self, tokens: Sequence[tuple[Reference, int]]) -> list[Reference]:
        return self._run("read", lambda c: self._lost_in(c, tokens))

    def _lost_in(self, connection: psycopg.Connection[Any], tokens: Sequence[tuple[Reference, int]]) -> list[Reference]:
        rows = connection.execute(
            self._sql(
                "SELECT digest, token FROM {0}_leases "
                "WHERE digest = ANY(%s) AND expires_at > clock_timestamp() ORDER BY digest FOR SHARE"
            ),
            ([ref.digest for ref, _ in tokens],),
        ).fetchall()
        held = dict(rows)
        return [ref for ref, token in tokens if held.get(ref.digest) != token]

    # Hints

    def _line(self) -> Callable[[Watcher], Line]:
        # One connection for each watch, and not one of the pool: there its end would be noticed by somebody else.
        select = "SELECT digest, state FROM {0}_heads WHERE digest = ANY(%s)"
        return functools.partial(_open_line, self._conninfo, self._wait, self._sql(select))

    def _disconnect(self) -> None:
        self._pool.close()


def _open_line(conninfo: str, wait: float, select: str, watcher: Watcher) -> Line:  # noqa: ARG001 - Redis looks at it
    """A connection to ask on what has changed."""
    connection = _connect(conninfo, wait)
    return Probe(functools.partial(_ask, connection, select), connection.close, plug_of(connection.fileno()))


def _ask(connection: psycopg.Connection[Any], select: Any, digests: list[bytes]) -> list[bytes | None]:
    try:
        found = dict(connection.execute(select, (digests,), binary=True).fetchall())
    except psycopg.Error as error:
        if connection.closed or connection.broken:
            raise
        raise StoreError(str(error)) from error
    return [found.get(digest) for digest in digests]


def _connect(conninfo: str, wait: float) -> psycopg.Connection[Any]:
    """A new connection. No method: the pool would keep a store alive of which nobody hears that it was not closed."""
    limit = max(int(wait), 2)  # libpq counts whole seconds, and takes 1 for 2
    connection = psycopg.connect(conninfo, autocommit=True, connect_timeout=limit, prepare_threshold=None)
    try:
        connection.execute("SELECT set_config('statement_timeout', %s, false)", (str(int(wait * 1000)),))
    except BaseException:
        connection.close()
        raise
    return connection


def _wait_for_disk(connection: psycopg.Connection[Any]) -> None:
    """Let this transaction be on disk when it is committed; what waits for more than that stays as it is."""
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', true) "
        "WHERE current_setting('synchronous_commit') IN ('off', 'local')"
    )
