"""
A store in one file of SQLite, for the processes of one machine.

Theory of operation
===================

**Rows.** An entry is one row of ``heads`` and its content rows of ``items``. The row number of an item is the number of
its head and its sequence number side by side, so that the items of one conversation lie together, no two can have one
place, and no index has to be written for them.

**Writing.** One connection writes, under one lock, and each `SQLiteStore.save` is one transaction. The file is in WAL
mode, with ``synchronous=NORMAL``: a commit has reached the operating system when it returns, and outlives the process.
For ``sync=True`` the transaction runs with ``synchronous=FULL``: SQLite then syncs the log before the commit returns,
which takes all earlier commits to the disk with it, since they stand before it in the same file.

**Reading.** Readers take a connection from a stack, use it for one short transaction and put it back. They never wait
for the writer, nor it for them, and no transaction is open while the caller has control. There are as many as threads
have read at the same instant, not as many as threads have ever read.

**Pages of 2 KiB.** A commit writes whole pages, and a batch of 50 messages fills few of them. Measured with 50 messages
of 280 bytes a commit, log, checkpoint and all: pages of 4 KiB wrote 3.8 times the payload, of 2 KiB 3.2, of 1 KiB 2.9;
below 2 KiB a message of ordinary length no longer fits in one page.

**A file that was closed cleanly** is not checked again. The last store that closes it writes the row ``clean``: the
number of the inode and a modification time, which the file then gets. The row matches the file until the next write,
because every write of any program changes the modification time, and until it is copied or restored, because a copy has
another inode. A log that is not empty outlives a crash. The time is finer than the clock of the kernel, so that a write
in the same tick does change it. Where a file system does not store such times, the row never matches.

**Leases** are locks of the kernel on a side file (see `hygiene.stores.owners`), so taking and releasing one needs no
commit. A save under a lease checks that this store has the lock, and reads the epoch of the entry in its transaction.
The epoch counts how often the lease was taken from a process that had not renewed it in time. It is a row of
``settings``, written only then: such a process may still believe that it has the lease, and its save is refused.

**fork.** SQLite keeps a process-wide table of the locks that it holds on each file, and a forked child inherits the
table but not the locks. Whatever the child then opens on the same file runs without them, and the log is deleted under
its feet as soon as the parent closes: reproduced, with commits lost. So all connections are closed before a fork, and
opened anew afterwards, on either side, when they are needed.

**The file may go away.** A program may delete the file, move it or put another one in its place while it is open here,
and SQLite then goes on writing to a file without a name. So each save compares
the path with the open file (device and inode), and so the log and its index. A file that has become shorter is read
through a new connection first. Until the file is back under its name, each save is an error.

**Whose file it is** is looked up with ``immutable=1``, which reads the file through SQLite (so that its table of locks
stays right) but writes nothing, not even a lock. A new store is made under another name and then linked to its own:
nobody ever sees half of one, and a file of length zero is not a store that was about to be made.

**Only looking** (``read_only=True``) must change nothing, and a reader of SQLite's does: it makes a log and an index of
it where there are none, and leaves them behind. So a file without a log is read as one that does not change, and
whether that was true is seen afterwards: a writer makes a log first, and what it leaves is a file with another time.
Where there is a log, the connection may not write, and SQLite then neither moves the log into the file nor deletes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import shutil
import sqlite3
import struct
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar
from zlib import crc32

import msgspec
from msgspec.structs import replace

from hygiene.errors import NotStorable, OwnershipLost, StoreError, StoreUnavailable, VersionConflict
from hygiene.logs import logger
from hygiene.stores.codec import codec_named, decode, decode_key, encode_key, fits
from hygiene.stores.owners import SUPPORTED, Owners, byte_of
from hygiene.stores.protocol import BadRow, Change, Delete, Head, Kind, Record, RecoveryReport, SaveLog, SaveValue
from hygiene.units import Duration, seconds

__all__ = ["Quarantined", "SQLiteStore"]

T = TypeVar("T")


_APPLICATION: Final = 0x48594749  # "HYGI"
_VERSION: Final = 1
_INDEXES: Final = """
CREATE UNIQUE INDEX heads_by_key ON heads (space, key);
CREATE INDEX heads_by_end ON heads (expire_at) WHERE expire_at IS NOT NULL;
"""
_SCHEMA: Final = f"""
PRAGMA page_size = 2048;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
BEGIN;
CREATE TABLE heads (id INTEGER PRIMARY KEY, space BLOB, key BLOB, expire_at REAL, bytes INTEGER, state BLOB);
{_INDEXES}
CREATE TABLE items (id INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE quarantine
    (id INTEGER PRIMARY KEY, space BLOB, key BLOB, sequence INTEGER, problem TEXT, found_at REAL, data BLOB);
CREATE TABLE settings (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
COMMIT;
PRAGMA journal_mode = WAL;
"""
# A place is 63 bits: 33 for the head, 30 for the sequence number. A conversation of a message a second is full after
# 34 years, and then `SaveLog(replace=True)` counts from 0 again.
_BITS: Final = 30
_MOST: Final = 1 << _BITS
_HEADS: Final = 1 << (63 - _BITS)
# The head of an entry and then its items in order, in one statement: a transaction around two costs a third more.
_LOAD: Final = """
SELECT id, state FROM heads WHERE space = ? AND key = ?
UNION ALL
SELECT i.id, i.data FROM heads h CROSS JOIN items i ON i.id BETWEEN h.id << 30 AND (h.id << 30) + (1 << 30) - 1
WHERE h.space = ? AND h.key = ?
"""
# From one key to the next in the index. By row number, SQLite would read and sort all rows of the space for each slice.
_HEADS_OF: Final = """
SELECT id, key, state FROM heads INDEXED BY heads_by_key
WHERE space = ? AND key > ? AND (expire_at IS NULL OR expire_at > ?) ORDER BY key LIMIT ?
"""
_TERM: Final = 30.0  # seconds that a lease holds if nobody knows when its owner has renewed it
_ANY_EPOCH: Final = "SELECT 1 FROM settings WHERE name > 'epoch ' AND name < 'epoch!' LIMIT 1"
_READ_MARK: Final = "SELECT value FROM settings WHERE name = 'clean'"
_FIRST: Final = -(1 << 63)
_SLICE: Final = 256
_NO_FILE: Final = (-1, -1)  # device and inode of no file
_SHOWN: Final = 80  # characters of a key in a message
_LOOKS: Final = 20  # at a file that nobody seemed to write to, and somebody did
# What SQLite says when waiting or a hand's turn of the operator helps; everything else is damage or a mistake.
_PASSING: Final = {
    sqlite3.SQLITE_BUSY: "another process holds it for long. Try again, or raise timeout=",
    sqlite3.SQLITE_LOCKED: "another connection is writing to it. Try again",
    sqlite3.SQLITE_FULL: "the disk is full. Make room",
    sqlite3.SQLITE_IOERR: "the file system failed. Look at the disk, its quota, and the limit on file sizes",
    sqlite3.SQLITE_READONLY: "it, or its folder, is read-only. SQLite writes beside the file, too: allow both",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. See that the folder exists and may be written to",
    sqlite3.SQLITE_PERM: "access was refused. See that file and folder may be written to",
    sqlite3.SQLITE_NOMEM: "memory ran out. Save in smaller batches",
}

# After any other error the file may be damaged.
_HARMLESS: Final = _PASSING.keys() - {sqlite3.SQLITE_IOERR}

_pack = msgspec.msgpack.Encoder().encode

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that was taken out of service because it did not fit."""

    space: str | None
    key: Any
    sequence: int | None
    """The place in the log; ``None`` for the head of an entry."""
    problem: str
    found_at: float
    """Seconds since 1970."""
    data: bytes | None
    """The row as it was found."""


class _State(msgspec.Struct, frozen=True, array_like=True):
    """A head as the file has it."""

    id: int
    version: int
    is_log: bool
    next: int
    size: int
    saved_at: float
    expire_at: float | None
    spans: Spans

    def seal(self, space: bytes, key: bytes) -> bytes:
        """The head as a row; the checksum is over everything that says whose it is, too."""
        body = _pack(self)
        return crc32(key, crc32(space, crc32(body))).to_bytes(4, "big") + body

    @classmethod
    def unseal(cls, number: int, space: Any, key: Any, row: Any) -> _State | None:
        """The head in *row* number *number*, or ``None`` if it is damaged."""
        if not (type(row) is type(space) is type(key) is bytes):
            return None
        body = row[4:]
        if int.from_bytes(row[:4], "big") != crc32(key, crc32(space, crc32(body))):
            return None
        state = _unpack(body)
        return state if state.id == number else None

    def head(self, space: str, key: Any) -> Head:
        """The head as users see it."""
        kind: Kind = "log" if self.is_log else "value"
        return Head(space, key, kind, self.version, self.size, self.saved_at, self.expire_at, self.spans, self.next)


_unpack = msgspec.msgpack.Decoder(_State).decode


class _Prepared(NamedTuple):
    """A change with its key encoded and its sizes checked, before any lock is taken."""

    change: Change
    space: bytes
    key: bytes


@dataclass(slots=True)
class _Held:
    """A lease that this store has."""

    digest: bytes
    token: int
    epoch: int
    end: float
    """When another store may take it, by the monotonic clock."""


@dataclass(slots=True)
class _Findings:
    """What recovery has come across so far."""

    entries: int = 0
    items: int = 0
    bad: list[BadRow] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


class _OpenStore(ABC):
    """What every store is, wherever it keeps its entries: open until it is closed."""

    _closed = True  # so that a failed __init__ does not warn

    @property
    @abstractmethod
    def _place(self) -> str:
        """Where the entries are, as a message may name it."""

    @abstractmethod
    def load(self, space: str, key: Hashable) -> Record | None:
        """The entry, or ``None`` if it is not there; see `Store.load`."""

    @abstractmethod
    def keys(self, space: str) -> Iterator[Any]:
        """Keys of *space*; see `Store.keys`."""

    def items(self, space: str) -> Iterator[tuple[Any, Any]]:
        """Keys and values of *space*; see `Store.items`."""
        for key in self.keys(space):
            if (record := self.load(space, key)) is not None:
                yield key, record.value

    @abstractmethod
    def close(self) -> None:
        """Let go of what is open. Again does nothing."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._place}: {'closed' if self._closed else 'open'}>"

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(
                f"store {self._place} was never closed; use `with`", ResourceWarning, stacklevel=2, source=self
            )


class SQLiteStore(_OpenStore):
    """
    Entries in one SQLite file; a `Store`.

    Safe for threads. Several stores may be open on one file, in one process or in several on one machine; a save that
    finds another one at work waits for it, for at most *timeout*. Not for network file systems: SQLite needs locks that
    work. May be used after ``fork`` on both sides.

    Args:
        path: The file; it is created if it is not there, the folder is not. ``":memory:"`` ends with the store.
        codec: ``"msgpack"``, or ``"pickle"``, with which anybody who can write to the file can run code in this
            process. It is settled when the file is made.
        timeout: Seconds (or ``"5s"``) to wait for another process that writes. The 5 s of the standard library.
        check: Whether to check every row on opening, as `recover` does, unless the file was closed cleanly and nothing
            has changed it since. The check reads the whole file, about a second for each 200 MB. Without it, damage is
            found when the entry is loaded.
        read_only: Change nothing: neither the file nor its log, whoever else writes to them and however that ended. The
            file must be there. Damage is reported in `report` and not put in quarantine; to load what is damaged, or to
            save, is a `StoreError`.
        timer: Returns seconds since 1970.

    Raises:
        StoreError: the file is not a store, is of a newer version, has another codec, or is damaged in its structure.
            It was left as it is.
        StoreUnavailable: it cannot be opened now: no such folder, no permission, locked.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        codec: str = "msgpack",
        timeout: Duration = 5.0,
        check: bool = True,
        read_only: bool = False,
        timer: Callable[[], float] = time.time,
    ) -> None:
        self._codec = codec_named(codec)
        self._timeout = seconds(timeout, "timeout")
        self._timer = timer
        self._memory = os.fspath(path) == ":memory:"
        # Made absolute now: the current directory may be another one when a connection is opened.
        self.path = ":memory:" if self._memory else str(Path(path).expanduser().absolute())
        if read_only and self._memory:
            raise ValueError("a store in memory begins empty; found read_only=True. Give the path of a file")
        self._read_only = read_only
        self._at_rest: dict[sqlite3.Connection, tuple[int, ...]] = {}  # of a file without a log: how it was
        self._lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._file: tuple[int, ...] | None = None  # device and inode of the open file
        self._beside: tuple[tuple[str, tuple[int, ...]], ...] = ()  # the same of the log and its index
        self._lengths = 0, 0  # of the file and of the log, after the last save
        self._opening = threading.Lock()
        self._readers: set[sqlite3.Connection] = set()
        self._idle: deque[sqlite3.Connection] = deque()
        self._forked = ""
        self._clean = False  # the row ``clean`` matches the file, as far as this store knows
        self._checked = False  # nothing is known to be damaged, since it was checked or closed cleanly
        self._child = False  # after a fork: the parent writes the row, unless the child has saved something
        self._mark = ""
        self._stamp = 0  # the modification time that the file gets when its last connection is closed
        self._forking = self._held = self._quiet = False
        self._leases: dict[tuple[bytes, bytes], _Held] = {}
        self._leasing = threading.Lock()
        self._asked: dict[tuple[bytes, bytes], float] = {}  # when a lease was first found taken, its end unknown
        self._last_token = 0
        self._said_shared = False
        self.owners: Owners | None = None
        """The locks that leases are; ``None`` where leases hold in this store only."""
        self.encode = self._codec.encode
        self.decode = functools.partial(decode, self._codec)
        _stores.add(self)
        with self._lock, self._failing("open"):  # the lock keeps a fork out
            if not self._memory and not self._belongs_to_us():
                if read_only:
                    raise StoreError(f"a store was wanted in {self.path}; found no such file. Give the path of one")
                self._create()
                self._belongs_to_us()  # somebody else may have made something else of it meanwhile
                self._checked = True
            self._checked = self._checked or self._clean
            if read_only:
                self._most_bytes = 0
            else:
                self._writer = self._connect_to_write()
                self._most_bytes = self._writer.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - 4096
            self._closed = False
        try:
            if SUPPORTED and not read_only and not self._memory:
                self._open_owners()
            self._settle_codec()
            lost = () if self._memory or read_only or self._clean else self._look_at_log()
            report = self.recover() if check and not self._clean else RecoveryReport(0, 0)
            self.report = dataclasses.replace(report, bad=(*lost, *report.bad))
            """What was found on opening; nothing was checked if the file was closed cleanly."""
            self._checked = self._checked or check
        except BaseException:
            self.close()
            raise

    @property
    def _place(self) -> str:
        return self.path

    # Opening

    def _belongs_to_us(self) -> bool:
        """Whether the file is a store, ``False`` if there is none; raises if it is something else. Changes nothing."""
        if "\0" in self.path:
            raise ValueError(f"a path without a NUL is wanted; found {self.path!r}")
        try:
            length = Path(self.path).stat().st_size
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreUnavailable(
                f"cannot open store {self.path}: {error.strerror}. See that it may be read"
            ) from error
        if length < _SHORTEST:
            # SQLite would take it for a new database, and delete the log beside it with all that is in there.
            with Path(self.path).open("rb") as file:
                beginning = file.read(16)
            if not b"SQLite format 3\x00".startswith(beginning):
                raise StoreError(
                    f"cannot open store {self.path}: the file is not a SQLite database ({length} bytes). "
                    "Choose another path"
                )
            found = f"a file of {length} bytes" if length else "an empty file"
            raise StoreError(
                f"a store was wanted in {self.path}; found {found}. A store never is: it was truncated, or made by "
                f"something else. Restore it from a backup, or delete it (and {self.path}-wal) to begin anew"
            )
        try:
            with contextlib.closing(
                sqlite3.connect(Path(self.path).as_uri() + "?mode=ro&immutable=1", uri=True)
            ) as peek:
                # Somebody who was killed while he moved the log into the file has left it without its last pages, which
                # are in the log still. That is for the log to settle, not for this look at the first page.
                peek.execute("PRAGMA writable_schema = ON")
                application = peek.execute("PRAGMA application_id").fetchone()[0]
                version = peek.execute("PRAGMA user_version").fetchone()[0]
                self._clean = application == _APPLICATION and self._was_closed_cleanly(peek)
        except sqlite3.DatabaseError as error:
            if _primary(error) in _PASSING:
                raise
            raise StoreError(
                f"a store was wanted in {self.path}; found a file that is not an SQLite database, or a damaged one "
                f"({error}). Give another path, or restore it from a backup"
            ) from error
        if application != _APPLICATION:
            raise StoreError(
                f"a store was wanted in {self.path}; found the SQLite database of another application "
                f"(application_id {application}). Give another path"
            )
        if version != _VERSION:
            raise StoreError(
                f"Cannot open store {self.path}: its format has version {version}, and this release of hygiene reads "
                f"version {_VERSION}. Install the release that wrote it, or a newer one: "
                f"pip install --upgrade resource-hygiene"
            )
        return True

    def _was_closed_cleanly(self, peek: sqlite3.Connection) -> bool:
        """Whether the file is as the last store left it that closed it, with everything in the file and checked."""
        with contextlib.suppress(OSError):
            if Path(os.path.realpath(self.path) + "-wal").stat().st_size:
                return False
        try:
            found = Path(self.path).stat()
            row = peek.execute(_READ_MARK).fetchone()
        except (OSError, sqlite3.Error):
            return False
        self._mark = _mark(found.st_ino, found.st_mtime_ns)
        return bool(row == (self._mark,))

    def _create(self) -> None:
        """Make the file, complete, under another name, and give it its own; somebody else may have been faster."""
        if Path(self.path + "-wal").exists() and not Path(self.path).exists():
            raise StoreError(
                f"cannot make a store in {self.path}: there is no such file, but its log {self.path}-wal is there, "
                f"with what was saved last. Restore the file beside it, or delete the log to begin anew"
            )
        temporary = f"{self.path}.new-{os.getpid()}-{threading.get_ident()}"
        try:
            with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as made:
                made.executescript(_SCHEMA)
                made.execute("INSERT INTO settings VALUES ('codec', ?), ('floor', 0)", (self._codec.name,))
            with contextlib.suppress(FileExistsError):
                try:
                    os.link(temporary, self.path)
                except FileExistsError:
                    raise
                except OSError:  # a file system without hard links
                    if not Path(self.path).exists():
                        Path(temporary).rename(self.path)
            _sync_folder(Path(self.path).parent)
        except OSError as error:
            raise StoreUnavailable(
                f"cannot make store {self.path}: {error.strerror}. See that its folder allows it"
            ) from error
        finally:
            for end in ("", "-journal", "-wal", "-shm"):
                with contextlib.suppress(OSError):
                    Path(temporary + end).unlink()

    def _connect(self) -> sqlite3.Connection:
        """A new connection with our settings; it may be used by any thread, one at a time."""
        if self._read_only:
            return self._connect_to_look()
        connection = self._connect_to_file()
        try:
            if self._memory:
                connection.executescript(_SCHEMA)
                connection.execute("INSERT INTO settings VALUES ('codec', ?), ('floor', 0)", (self._codec.name,))
            connection.executescript(
                "PRAGMA synchronous = NORMAL;"
                "PRAGMA fullfsync = ON;"  # macOS: else fsync() leaves it to the drive
                "PRAGMA wal_autocheckpoint = 2000;"  # pages: 4 MB, as SQLite's own default with its larger pages
                "PRAGMA journal_size_limit = 16777216;"  # bytes of log kept after one very large save
                "PRAGMA mmap_size = 0;"  # a truncated file is an error then, and not a SIGBUS
                "PRAGMA cell_size_check = ON;"
                "PRAGMA trusted_schema = OFF;"
            )
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_to_file(self) -> sqlite3.Connection:
        """A new connection to the file that this store has had open from the beginning."""
        address = ":memory:" if self._memory else Path(self.path).as_uri() + "?mode=rw"
        for _ in range(_LOOKS):
            before = self._identity()
            connection = sqlite3.connect(
                address, uri=True, timeout=self._timeout, isolation_level=None, check_same_thread=False
            )
            after = self._identity()
            if self._memory or after == self._file:
                return connection
            connection.close()
            if self._file is not None:
                raise self._lost("use", self.path, after)
            # A file of a lower layer of an overlay is copied when it is first opened for writing.
            if before == after:
                self._file = after
        raise StoreUnavailable(f"cannot open store {self.path}: the file is replaced again and again. Try again")

    def _connect_to_write(self) -> sqlite3.Connection:
        """A new connection for saves. From now on a log and an index that are not those it has open are an error."""
        connection = self._connect()
        if self._memory:
            return connection
        try:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
            connection.execute("SELECT count(*) FROM settings").fetchone()  # opens the log
            real = os.path.realpath(self.path)  # SQLite follows links, and then puts the log beside the file
            ends = ("-wal", "-shm") if mode == "wal" else ()
            self._beside = tuple((real + end, _found(real + end)[:2]) for end in ends)
            self._lengths = 0, 0
            self._note_log()
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def read_only(self) -> bool:
        """True if it was opened with ``read_only=True``."""
        return self._read_only

    # Whether the path still names the open file

    def _identity(self) -> tuple[int, ...]:
        return _found(self.path)[:2]

    @property
    def replaced(self) -> bool:
        """True if the path no longer names the file that is open: it was deleted, moved, or replaced by another one."""
        return not self._closed and self._file is not None and self._identity() != self._file

    def check_file(self) -> None:
        """
        Raise `StoreError` unless saves of this store are in the file that its path names.

        Each save checks this itself. `Registry.flush` also checks it when there is nothing to save.
        """
        if self._closed:
            return
        if self._lock.acquire(blocking=False):
            try:
                self._check_files("save to")
            finally:
                self._lock.release()
        elif self.replaced:  # a save is under way, and checks the log; or a fork, which closes it
            raise self._lost("save to", self.path, self._identity())

    def _check_files(self, what: str) -> None:
        if self._file is None:  # in memory, or read only
            return
        *identity, length = _found(self.path)
        if tuple(identity) != self._file:
            raise self._lost(what, self.path, identity)
        if self._writer is None:  # closed for a fork: the next one opens the log that is there
            return
        lengths = [length]
        for path, known in self._beside:
            *identity, size = _found(path)
            if not known[1] or tuple(identity) != known:
                raise self._lost(what, path, identity)
            lengths.append(size)
        if length < _SHORTEST or length < self._lengths[0] or (self._beside and lengths[1] < self._lengths[1]):
            self._check_shortened(what, length)
        self._lengths = length, lengths[1] if self._beside else 0

    def _check_shortened(self, what: str, length: int) -> None:
        """The file or its log is shorter than after the last save: another program has cut it, or tidied it up."""
        problem = f"it has {length} bytes"
        if length >= _SHORTEST:
            try:
                with contextlib.closing(self._connect()) as other:  # one that has no pages of it in memory
                    problem = other.execute("PRAGMA quick_check(1)").fetchone()[0]
            except sqlite3.Error as error:
                problem = str(error)
        if problem != "ok":
            raise StoreError(
                f"cannot {what} store {self.path}: the file or its log was truncated while it was open ({problem}). "
                f"Nothing was saved, and unsaved changes stay in memory. Restore the file from a backup, and open it "
                f"again"
            )

    def _note_log(self) -> None:
        if self._beside:
            self._lengths = self._lengths[0], _found(self._beside[0][0])[2]

    def _lost(self, what: str, path: str, found: Sequence[int]) -> StoreError:
        happened = "was replaced by another file" if any(found) else "was deleted or moved"
        return StoreError(
            f"cannot {what} store {self.path}: {path} {happened} while it was open. Nothing was saved, and unsaved "
            f"changes stay in memory. Put the file back under its name to have them saved, or open a new store and "
            f"copy them there"
        )

    def abandon(self) -> None:
        """Treat the path as that of another file from now on: another store was opened there."""
        with self._opening, self._lock:  # in the order in which a fork takes them
            self._close_idle()
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            # With the last connection the system gives the number of the inode to the next file, which may be that one.
            self._file = _NO_FILE

    def _connect_to_look(self) -> sqlite3.Connection:
        """A new connection that cannot write."""
        how = self._rest()
        address = f"{Path(self.path).as_uri()}?mode=ro{'&immutable=1' if how else ''}"
        connection = sqlite3.connect(
            address, uri=True, timeout=self._timeout, isolation_level=None, check_same_thread=False
        )
        connection.executescript(
            "PRAGMA query_only = ON; PRAGMA mmap_size = 0; PRAGMA cell_size_check = ON; PRAGMA trusted_schema = OFF;"
        )
        if how:
            self._at_rest[connection] = how
        return connection

    def _rest(self) -> tuple[int, ...]:
        """How the file is, if nobody writes to it; empty if somebody may: there is a log."""
        if Path(self.path + "-wal").exists():
            return ()
        try:
            found = Path(self.path).stat()
        except OSError:
            return ()  # it is gone: whoever opens it is told
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _look_at_log(self) -> tuple[BadRow, ...]:
        """
        Whether saves at the end of the log were lost, asked before anything is written over them.

        SQLite reads the log up to the first frame that does not fit, and takes the rest for a commit that was never
        finished. If whole commits stand behind it, it was finished, and was lost with them: the power failed before
        they were on disk, or the file was damaged. Without the frame before them they cannot be served.
        """
        log = self.path + "-wal"
        lost = False
        # Under the lock of a writer nobody else changes the log. If somebody has it, he has looked before us.
        with self._lock, self._failing("open"), contextlib.closing(self._connect()) as other:
            writer = self._writer
            assert writer is not None
            writer.execute("PRAGMA busy_timeout = 0")
            try:
                writer.execute("BEGIN IMMEDIATE")
                busy, frames, _ = other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                lost = not busy and _commits_behind(log, frames)
                writer.execute("ROLLBACK")
            except sqlite3.OperationalError as error:
                if _primary(error) != sqlite3.SQLITE_BUSY:
                    raise
            writer.execute(f"PRAGMA busy_timeout = {int(self._timeout * 1000)}")
        if not lost:
            return ()
        kept = f"{log}.damaged-{time.time_ns()}"
        with contextlib.suppress(OSError):
            shutil.copyfile(log, kept)
        problem = f"the log was damaged, and saves at its end are lost; it is kept in {kept}"
        logger.warning(
            "store %s: %s", self.path, problem, extra={"event_name": "store.log_damaged", "store": str(self.path)}
        )
        return (BadRow(None, None, None, problem, quarantined=True),)

    def _settle_codec(self) -> None:
        found = self._read(lambda c: c.execute("SELECT value FROM settings WHERE name = 'codec'").fetchone())
        name = found[0] if found else None
        if name != self._codec.name:
            raise StoreError(
                f"a store with codec {self._codec.name!r} was wanted in {self.path}; found one with {name!r}. "
                f"Open it with codec={name!r}, if you trust whoever can write to it, or give another path"
            )

    def _open_owners(self) -> None:
        try:
            self.owners = Owners(self.path)
        except OSError as error:
            logger.warning(
                "store %s: leases exclude no other process, because the file %s-owners cannot be opened (%s). Allow to "
                "read and write it",
                self.path,
                self.path,
                error.strerror or error,
                extra={"event_name": "store.leases_local", "store": str(self.path), "of": self},
            )

    # Errors

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Turn what SQLite raises into what a caller can act upon."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(what, error) from error

    def _error(self, what: str, error: sqlite3.Error) -> StoreError:
        code = _primary(error)
        if code not in _HARMLESS:
            self._checked = False  # the next store checks everything
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if advice := _PASSING.get(code):
            return StoreUnavailable(f"cannot {what} store {self.path}: {advice}. ({name}: {error})")
        return StoreError(
            f"cannot {what} store {self.path}: its structure is damaged or not as expected ({name}: {error}). "
            f"Nothing was changed. Stop every process that uses it, keep a copy, and restore it from a backup or run "
            f"`sqlite3 FILE .recover`"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"store {self.path} is closed. Open it again, or close it later")
        if self._forked:
            raise StoreError(self._forked)

    def _only_looking(self, what: str) -> StoreError:
        return StoreError(f"cannot {what} store {self.path}: it was opened to be read only. Open it without read_only=")

    # Connections

    def _read(self, function: Callable[[sqlite3.Connection], T], *, snapshot: bool = False) -> T:
        """What *function* returns, called with a connection; with *snapshot* it sees one moment of the store."""
        if self._memory:
            with self._lock:
                self._check_open()
                assert self._writer is not None
                return function(self._writer)
        for _ in range(_LOOKS):
            connection = self._take()
            how = self._at_rest.get(connection)
            if how is None:
                return self._read_with(connection, function, snapshot=snapshot)
            if how != self._rest():
                self._discard(connection)  # it has pages of a file that has changed since
                continue
            try:
                result = self._read_with(connection, function, snapshot=snapshot)
            except StoreError:
                if how == self._rest():
                    raise
            else:
                if how == self._rest():
                    return result
        raise StoreUnavailable(f"cannot read store {self.path}: it was changed {_LOOKS} times in a row. Try again")

    def _read_with(
        self, connection: sqlite3.Connection, function: Callable[[sqlite3.Connection], T], *, snapshot: bool
    ) -> T:
        try:
            if snapshot:
                connection.execute("BEGIN")
            result = function(connection)
            if snapshot:
                connection.execute("COMMIT")
        except BaseException as error:
            self._discard(connection)  # in whatever state it is
            if isinstance(error, sqlite3.Error):
                raise self._error("read", error) from error
            raise
        self._idle.append(connection)
        if self._closed:
            self._close_idle()
            self._stamp_file()
        return result

    def _take(self) -> sqlite3.Connection:
        self._check_open()
        # A connection that comes back is taken again at once, before a fork that waits for it could get at it.
        if not self._forking:
            with contextlib.suppress(IndexError):
                return self._idle.pop()
        with self._opening, self._failing("open"):  # held during a fork, when none may be opened
            self._check_open()
            connection = self._connect()
            self._readers.add(connection)
            return connection

    def _discard(self, connection: sqlite3.Connection) -> None:
        connection.close()
        self._at_rest.pop(connection, None)
        self._readers.discard(connection)  # afterwards: while it is there, a fork waits

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._discard(self._idle.pop())

    @contextlib.contextmanager
    def _writing(self, what: str, *, sync: bool = False) -> Iterator[sqlite3.Connection]:
        """The connection that writes, in a transaction that is committed at the end or did not happen."""
        if self._read_only:
            raise self._only_looking(what)
        with self._opening:
            pass  # a turnstile: while a fork waits for its turn, nobody overtakes it
        with self._lock:
            self._check_open()
            with self._failing(what):
                if self._writer is None:
                    self._writer = self._connect_to_write()
                if self.owners is not None:
                    with contextlib.suppress(OSError):  # in a forked child; to lease says what is wrong
                        self.owners.open()
                connection = self._writer
                try:
                    if sync:
                        connection.execute("PRAGMA synchronous = FULL")
                    # IMMEDIATE: what is read to decide upon must not change before it is acted upon.
                    connection.execute("BEGIN IMMEDIATE")
                    self._check_files(what)  # here: to begin may have meant to wait for another process for seconds
                    if self._clean:
                        # Before the file changes: a store that is just closing it may give it that time afterwards.
                        connection.execute("DELETE FROM settings WHERE name = 'clean'")
                    yield connection
                    connection.execute("COMMIT")
                    self._clean = False
                    self._note_log()
                    if sync:
                        connection.execute("PRAGMA synchronous = NORMAL")
                except BaseException:
                    self._undo(connection)
                    raise

    def _undo(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            connection.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error:
            if not self._memory:
                # The next save begins with a new one; closing it undoes what it had begun.
                self._writer = None
                connection.close()

    # Reading

    def load(self, space: str, key: Hashable) -> Record | None:
        """The entry, or ``None`` if it is not there; see `Store.load`."""
        name, raw = space.encode(), encode_key(key)
        for _ in range(3):
            rows = self._read(lambda c: c.execute(_LOAD, (name, raw, name, raw)).fetchall())
            if not rows:
                return None
            number, sealed = rows.pop(0)
            state = _State.unseal(number, name, raw, sealed)
            if state is not None and state.expire_at is not None and state.expire_at <= self._timer():
                return None
            if state is not None and _complete(state, rows):
                values = self._codec.decode_rows(rows)
                if values is not None:
                    return Record(state.head(space, key), values if state.is_log else values[0])
            if self._read_only:
                raise StoreError(
                    f"cannot load {_shown(key)} of {space!r} from store {self.path}: it is damaged, and was left as it "
                    f"is. Open the store without read_only=, and what is left of it is served"
                )
            self._repair(number, _Findings())
        raise StoreError(
            f"cannot load {_shown(key)} of {space!r} from store {self.path}: it is damaged again and again"
        )

    def contains(self, space: str, key: Hashable) -> bool:
        """Whether the entry is there."""
        name, raw, now = space.encode(), encode_key(key), self._timer()
        select = "SELECT 1 FROM heads WHERE space = ? AND key = ? AND (expire_at IS NULL OR expire_at > ?)"
        return self._read(lambda c: c.execute(select, (name, raw, now)).fetchone()) is not None

    def keys(self, space: str) -> Iterator[Any]:
        """Keys of *space*; see `Store.keys`."""
        name = space.encode()
        for number, key, sealed in self._slices(space):
            if _State.unseal(number, name, key, sealed) is not None:
                yield decode_key(key)

    def heads(self, space: str) -> Iterator[Head]:
        """Heads of *space*; see `Store.heads`. One that is damaged is left out: `recover` puts it in quarantine."""
        name = space.encode()
        for number, key, sealed in self._slices(space):
            if (state := _State.unseal(number, name, key, sealed)) is not None:
                yield state.head(space, decode_key(key))

    def _slices(self, space: str) -> Iterator[tuple[int, bytes, bytes]]:
        name, last = space.encode(), b""  # no key is empty
        while True:
            values = (name, last, self._timer(), _SLICE)
            rows = self._read(lambda c, values=values: c.execute(_HEADS_OF, values).fetchall())  # type: ignore[misc]
            for row in rows:
                last = row[1]
                yield row
            if len(rows) < _SLICE:
                return

    def spaces(self) -> list[str]:
        """Names of the spaces that have entries."""
        select = "SELECT DISTINCT space FROM heads WHERE expire_at IS NULL OR expire_at > ?"
        rows = self._read(lambda c: c.execute(select, (self._timer(),)).fetchall())
        return sorted(space.decode() for (space,) in rows)

    def count(self, space: str) -> int:
        """Number of entries in *space*."""
        return self._total("count(*)", space)

    def nbytes(self, space: str) -> int:
        """Encoded size of everything in *space*, without keys."""
        return self._total("coalesce(sum(bytes), 0)", space)

    def _total(self, what: str, space: str) -> int:
        select = f"SELECT {what} FROM heads WHERE space = ? AND (expire_at IS NULL OR expire_at > ?)"  # noqa: S608
        values = (space.encode(), self._timer())
        return int(self._read(lambda c: c.execute(select, values).fetchone())[0])

    # Writing

    def versions(self, space: str, keys: Iterable[Hashable]) -> list[int]:
        """Return the version of each of *keys*, in their order; 0 where there is no entry, or one that is damaged."""
        name, raws, now = space.encode(), [encode_key(key) for key in keys], self._timer()
        select = "SELECT id, state FROM heads WHERE space = ? AND key = ?"

        def look(connection: sqlite3.Connection) -> list[int]:
            found = []
            for raw in raws:
                row = connection.execute(select, (name, raw)).fetchone()
                state = None if row is None else _State.unseal(row[0], name, raw, row[1])
                over = state is None or (state.expire_at is not None and state.expire_at <= now)
                found.append(0 if state is None or over else state.version)
            return found

        return self._read(look)

    def save(
        self,
        changes: Sequence[Change],
        *,
        sync: bool = False,
        fence: Mapping[tuple[str, Any], int] | None = None,
    ) -> list[Head | None]:
        """
        Save all *changes*, in their order, or none of them; see `Store.save`.

        Args:
            changes: As in `Store.save`.
            sync: As in `Store.save`.
            fence: Tokens of leases, as `lease` returned them, by ``(space, key)``. Nothing is saved unless this store
                still has each of these leases.

        Raises:
            OwnershipLost: a lease in *fence* has ended, or another store has taken it. Nothing was saved.
        """
        if self._read_only:
            raise self._only_looking("save to")
        prepared = [self._prepare(change) for change in changes]
        if not prepared and not sync:
            return []
        fences = {
            (space.encode(), encode_key(key)): (space, key, token) for (space, key), token in (fence or {}).items()
        }
        if prepared and not self._said_shared:
            self._say_if_shared(prepared, fences)
        results: list[Head | None] = []
        conflicts: list[tuple[str, Any, int, int]] = []
        with self._writing("save to", sync=sync) as connection:
            now = self._timer()
            if fences:
                self._check_leases(connection, fences)
            for item in prepared:
                state = self._current(connection, item.space, item.key, now)
                change, found = item.change, 0 if state is None else state.version
                if change.base is not None and change.base != found:
                    conflicts.append((change.space, change.key, change.base, found))
                    continue
                results.append(self._apply(connection, item, state, now))
            if conflicts:
                # Raised in here, so that nothing of the batch is saved: it may be one thing in several entries.
                raise _conflict(conflicts, [item.change for item in prepared])
            if not prepared:
                # Something for the sync to wait for; SQLite leaves out a write that changes nothing.
                connection.execute(
                    "INSERT INTO settings VALUES ('syncs', 1) ON CONFLICT (name) DO UPDATE SET value = value + 1"
                )
        return results

    def _prepare(self, change: Change) -> _Prepared:
        raw = encode_key(change.key)
        _check_sizes(change, self._most_bytes)
        return _Prepared(change, change.space.encode(), raw)

    def _current(self, connection: sqlite3.Connection, space: bytes, key: bytes, now: float) -> _State | None:
        """The head as it is now; one that is over or damaged is cleared away first."""
        row = connection.execute("SELECT id, state FROM heads WHERE space = ? AND key = ?", (space, key)).fetchone()
        if row is None:
            return None
        state = _State.unseal(row[0], space, key, row[1])
        if state is None:
            self._mend(connection, row[0], _Findings())
            return None
        if state.expire_at is not None and state.expire_at <= now:
            self._remove(connection, state)
            return None
        return state

    def _remove(self, connection: sqlite3.Connection, state: _State) -> None:
        first = state.id << _BITS
        connection.execute("DELETE FROM items WHERE id BETWEEN ? AND ?", (first, first + _MOST - 1))
        connection.execute("DELETE FROM heads WHERE id = ?", (state.id,))
        self._raise_floor(connection, state.version)  # its successor counts on from there

    def _apply(self, connection: sqlite3.Connection, item: _Prepared, state: _State | None, now: float) -> Head | None:
        change = item.change
        if isinstance(change, Delete):
            if state is not None:
                self._remove(connection, state)
            return None
        is_log = isinstance(change, SaveLog)
        if isinstance(change, SaveLog) and state is not None and not state.is_log:
            _check_replaces(change)
        new = state is None
        if state is None:
            number, floor = connection.execute(
                "SELECT max(coalesce((SELECT max(id) FROM heads), 0), "
                "coalesce((SELECT max(id) >> ? FROM items), 0)) + 1, "
                "(SELECT value FROM settings WHERE name = 'floor' AND typeof(value) = 'integer')",
                (_BITS,),
            ).fetchone()
            if number >= _HEADS:
                raise StoreError(
                    f"store {self.path} has room for {_HEADS:,} entries; found number {number:,}. recover() it"
                )
            state = _State(number, floor or 0, is_log=False, next=0, size=0, saved_at=0.0, expire_at=None, spans=())
        first = state.id << _BITS
        if isinstance(change, SaveValue):
            if state.is_log:
                connection.execute("DELETE FROM items WHERE id BETWEEN ? AND ?", (first, first + _MOST - 1))
            connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?)", (first, change.data))
            spans: Spans = ((0, 1),)
            following, size = 1, len(change.data)
        else:
            spans, following, size = self._write_log(connection, change, state)
        state = _State(state.id, state.version + 1, is_log, following, size, now, change.expire_at, spans)
        self._write_head(connection, item.space, item.key, state, new=new)
        return state.head(change.space, change.key)

    def _write_log(self, connection: sqlite3.Connection, change: SaveLog, state: _State) -> tuple[Spans, int, int]:
        """Write the rows of *change*; its spans, next sequence number and size from then on."""
        first, spans, following, size = state.id << _BITS, state.spans, state.next, state.size
        if change.replace:
            if spans:
                connection.execute("DELETE FROM items WHERE id BETWEEN ? AND ?", (first, first + _MOST - 1))
            spans, following, size = (), 0, 0
        for low, high in change.drop:
            start, stop = max(low, 0), min(high, following)
            if start < stop:
                size -= _length(connection, first + start, first + stop - 1)
                connection.execute("DELETE FROM items WHERE id BETWEEN ? AND ?", (first + start, first + stop - 1))
                spans = _without(spans, start, stop)
        for sequence, data in change.put.items():
            _check_place(change, sequence, following)
            size += len(data) - _length(connection, first + sequence, first + sequence)
            connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?)", (first + sequence, data))
            spans = _with(spans, sequence, sequence + 1)
        if change.append:
            stop = following + len(change.append)
            if stop >= _MOST:
                raise ValueError(
                    f"the log {_shown(change.key)} in {change.space!r} has room for {_MOST:,} appended items; "
                    f"found {stop:,}. Save it with replace=True, which counts from 0 again"
                )
            rows = zip(range(first + following, first + stop), change.append, strict=True)
            connection.executemany("INSERT INTO items VALUES (?, ?)", rows)
            size += sum(map(len, change.append))
            spans = _with(spans, following, stop)
            following = stop
        return spans, following, size

    def _write_head(
        self, connection: sqlite3.Connection, space: bytes, key: bytes, state: _State, *, new: bool
    ) -> None:
        sealed = state.seal(space, key)
        if new:
            row = (state.id, space, key, state.expire_at, state.size, sealed)
            connection.execute("INSERT INTO heads VALUES (?, ?, ?, ?, ?, ?)", row)
        else:
            values = (state.expire_at, state.size, sealed, state.id)
            connection.execute("UPDATE heads SET expire_at = ?, bytes = ?, state = ? WHERE id = ?", values)

    def expire(self, now: float | None = None) -> int:
        """Delete what is over, in slices, and return how many entries that were; see `Store.expire`."""
        if self._read_only:
            raise self._only_looking("expire in")
        now = self._timer() if now is None else now
        select = "SELECT id, space, key, state FROM heads WHERE expire_at <= ? LIMIT ?"
        total = 0
        while self._read(lambda c: c.execute(select, (now, 1)).fetchone()) is not None:
            with self._writing("expire in") as connection:
                rows = connection.execute(select, (now, _SLICE)).fetchall()
                for number, space, key, sealed in rows:
                    state = _State.unseal(number, space, key, sealed)
                    if state is None or state.expire_at is None or state.expire_at > now:
                        self._mend(connection, number, _Findings())  # only the column says that it is over
                    else:
                        self._remove(connection, state)
                        total += 1
        return total

    # Leases

    def lease(self, space: str, key: Hashable, *, ttl: Duration = 30.0, owner: str | None = None) -> int | None:  # noqa: ARG002 - as on servers, where operators read it
        """
        Take the lease of an entry, which need not exist, unless another store has it.

        The stores may be in one process or in several on one machine. A lease does not keep others from loading or
        saving. The version of the entry protects it, and so does the token in ``save(fence=...)``. The lease ends when
        it is released, when the store is closed, when its process ends, and when another store asks for it after *ttl*
        seconds without `renew`.

        It costs a lock of the kernel and a read, but no commit. In memory, and on platforms without locks of the open
        file (all but Linux), it excludes no other store.

        Args:
            space: Of the entry.
            key: Of the entry.
            ttl: Seconds (or ``"30s"``) after which another store may take the lease if it was not renewed.
            owner: Ignored; servers store it.

        Returns:
            The fencing token, greater than each earlier one of this store; ``None`` if the lease is taken.
        """
        self._check_open()
        if self._read_only:
            raise self._only_looking("lease in")
        life, place = seconds(ttl, "ttl"), (space.encode(), encode_key(key))
        digest = _digest(place)
        with self._leasing:
            held = self._leases.get(place)
            if held is not None:
                if held.end > time.monotonic():
                    return None
                self._drop(place)
            epoch = self._take_lock(place, digest)
            if epoch is None:
                return None
            self._asked.pop(place, None)
            end = time.monotonic() + life
            if self.owners is not None:
                self.owners.set_end(byte_of(digest, epoch), end)
            token = self._last_token = max(time.time_ns() // 1000, self._last_token + 1)
            self._leases[place] = _Held(digest, token, epoch, end)
            return token

    def _take_lock(self, place: tuple[bytes, bytes], digest: bytes) -> int | None:
        """Lock the byte of the entry and return its epoch; ``None`` if another store has the lock, and may keep it."""
        if self.owners is None:
            return 0
        guess = 0
        try:
            while True:
                byte = byte_of(digest, guess)
                taken = self.owners.take(byte)
                # Read with the lock: whoever raises the epoch takes another lock.
                epoch = self._read(lambda connection: _epoch(connection, digest))
                if epoch == guess:
                    if taken:
                        return epoch
                    if not self._is_over(place, byte):
                        return None
                    self._raise_epoch(digest, epoch)
                    guess = epoch + 1
                    continue
                if taken:
                    self.owners.drop(byte)
                guess = epoch
        except OSError as error:
            raise self._owners_failed(error) from error

    def _is_over(self, place: tuple[bytes, bytes], byte: int) -> bool:
        """Whether the lease that another store has was not renewed in time."""
        assert self.owners is not None
        now, end = time.monotonic(), self.owners.end_of(byte)
        if end is None:
            end = self._asked.setdefault(place, now) + _TERM
        else:
            self._asked.pop(place, None)
        return end <= now

    def _raise_epoch(self, digest: bytes, epoch: int) -> None:
        with self._writing("lease in") as connection:
            if _epoch(connection, digest) == epoch:
                connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (_epoch_name(digest), epoch + 1))

    def _drop(self, place: tuple[bytes, bytes]) -> None:
        held = self._leases.pop(place)
        if self.owners is not None:
            with contextlib.suppress(OSError):  # it holds until its term is over
                self.owners.drop(byte_of(held.digest, held.epoch))

    def renew(self, space: str, key: Hashable, token: int, *, ttl: Duration = 30.0) -> None:
        """
        Let the lease with *token* hold for *ttl* seconds from now.

        Raises:
            OwnershipLost: it has ended, or another store has taken it.
        """
        self._check_open()
        life, place = seconds(ttl, "ttl"), (space.encode(), encode_key(key))
        with self._leasing:
            held = self._leases.get(place)
            if held is None or held.token != token or self._was_taken(held):
                raise self._lease_lost([(space, key)], "renew the lease in")
            held.end = time.monotonic() + life
            if self.owners is not None:
                self.owners.set_end(byte_of(held.digest, held.epoch), held.end)

    def release(self, space: str, key: Hashable, token: int) -> bool:
        """Give the lease with *token* back, and return whether this store still had it."""
        self._check_open()
        place = space.encode(), encode_key(key)
        with self._leasing:
            held = self._leases.get(place)
            if held is None or held.token != token:
                return False
            # Within its term no other store can have taken it.
            had = time.monotonic() < held.end or not self._was_taken(held)
            self._drop(place)
            return had

    def _was_taken(self, held: _Held) -> bool:
        if self.owners is None:
            return False
        return self._read(lambda connection: _epoch(connection, held.digest)) != held.epoch

    def _check_leases(
        self, connection: sqlite3.Connection, fences: Mapping[tuple[bytes, bytes], tuple[str, Any, int]]
    ) -> None:
        lost = []
        # Mostly no lease was ever taken over: one look for all of them.
        none = connection.execute(_ANY_EPOCH).fetchone() is None
        for place, (space, key, token) in fences.items():
            held = self._leases.get(place)
            epoch = 0 if none or held is None else _epoch(connection, held.digest)
            if held is None or held.token != token or held.epoch != epoch:
                lost.append((space, key))
        if lost:
            raise self._lease_lost(lost, "save to")

    def _lease_lost(self, lost: Sequence[tuple[str, Any]], what: str) -> OwnershipLost:
        names = ", ".join(f"{_shown(key)} in {space!r}" for space, key in lost)
        return OwnershipLost(
            f"cannot {what} store {self.path}: the lease of {names} has ended, or another process has taken it. "
            f"Nothing was changed. Take the lease again, and load what is stored now"
        )

    def _owners_failed(self, error: OSError) -> StoreUnavailable:
        return StoreUnavailable(
            f"cannot lease in store {self.path}: the file {self.path}-owners failed ({error.strerror or error}). "
            f"Allow to read and write it"
        )

    def wait_for(self, space: str, key: Hashable, *, waits: bool) -> None:
        """Show to other stores, or show no longer, that a caller waits for the lease of an entry."""
        if self.owners is None:
            return
        digest = _digest((space.encode(), encode_key(key)))
        try:
            if waits:
                self.owners.wait_for(digest)
            else:
                self.owners.stop_waiting_for(digest)
        except OSError as error:
            raise self._owners_failed(error) from error

    def is_awaited(self, space: str, key: Hashable) -> bool:
        """Whether another store waits for the lease of an entry."""
        if self.owners is None:
            return False
        try:
            return self.owners.is_awaited(_digest((space.encode(), encode_key(key))))
        except OSError as error:
            raise self._owners_failed(error) from error

    @property
    def shared(self) -> bool:
        """True if another store has the file open, in this process or in another one, and leases can exclude it."""
        if self.owners is None:
            return False
        try:
            return self.owners.shared()
        except OSError as error:
            raise self._owners_failed(error) from error

    def _say_if_shared(self, prepared: Iterable[_Prepared], fences: Mapping[tuple[bytes, bytes], Any]) -> None:
        if any((item.space, item.key) not in fences for item in prepared) and self.shared:
            self._said_shared = True
            logger.warning(
                "store %s is in use by another process, and this one saves entries without a lease. If both change an "
                "entry, one of them gets a VersionConflict. Use `with registry.lease(key)`",
                self.path,
                extra={"event_name": "store.shared_without_lease", "store": str(self.path), "of": self},
            )

    # Recovery

    def recover(self) -> RecoveryReport:
        """
        Look at every row, put what does not fit in quarantine, and report it; see `Store.recover`.

        With ``read_only=True`` it is reported only, an entry a line.

        Raises:
            StoreError: the structure of the file is damaged. Nothing was changed.
        """
        findings = _Findings()
        self._check_structure()
        self._check_indexes(findings)
        last, done = _FIRST, False
        while not done:
            look = functools.partial(self._inspect, last=last)
            last, done, suspects, entries, items = self._read(look, snapshot=True)
            findings.entries += entries
            findings.items += items
            for number in suspects:
                if self._read_only:
                    findings.bad.append(self._suspect(number))
                else:
                    self._repair(number, findings)
        return RecoveryReport(findings.entries, findings.items, tuple(findings.bad), tuple(findings.repaired))

    def _suspect(self, number: int) -> BadRow:
        select = "SELECT space, key FROM heads WHERE id = ?"
        row = self._read(lambda c: c.execute(select, (number,)).fetchone())
        if row is None:
            return BadRow(None, None, None, "items without a head", quarantined=False)
        problem = "the head or an item of the entry is damaged"
        return BadRow(_as_text(row[0]), _as_key(row[1]), None, problem, quarantined=False)

    def _check_structure(self) -> None:
        problems = self._read(lambda c: [row[0] for row in c.execute("PRAGMA quick_check(5)")])
        if problems != ["ok"]:
            raise self._error("open", sqlite3.DatabaseError("; ".join(map(str, problems))))

    def _check_indexes(self, findings: _Findings) -> None:
        """
        Build the indexes of the heads anew if they do not say what the heads say.

        A key that is flipped in the index only would not be found any more: lost in silence. The quick check does not
        look at that, and the full one of everything is slow; the heads are few.
        """
        if self._read(lambda c: [row[0] for row in c.execute("PRAGMA integrity_check('heads')")]) == ["ok"]:
            return
        if self._read_only:
            findings.bad.append(BadRow(None, None, None, "the indexes of the heads are damaged", quarantined=False))
            return
        with self._writing("repair") as connection:
            # First: a row is not deleted if its index does not know of it.
            connection.execute("DROP INDEX heads_by_key")
            connection.execute("DROP INDEX heads_by_end")
            # Two rows with one key, because the index did not show the first when the second was made.
            seen: dict[tuple[bytes, bytes], _State] = {}
            rows = connection.execute("SELECT id, space, key, state FROM heads").fetchall()
            for number, space, key, sealed in rows:
                state = _State.unseal(number, space, key, sealed)
                if state is None:
                    self._mend(connection, number, findings)
                elif (other := seen.get((space, key))) is not None:
                    older = min(state, other, key=lambda s: s.version)
                    self._quarantine_entry(connection, older.id, "there is a newer one with the same key", findings)
                    seen[space, key] = max(state, other, key=lambda s: s.version)
                else:
                    seen[space, key] = state
            for statement in filter(str.strip, _INDEXES.split(";")):
                connection.execute(statement)
        findings.repaired.append("the indexes of the heads were built anew")
        logger.warning(
            "store %s: the indexes of the heads were damaged and have been built anew",
            self.path,
            extra={"event_name": "store.repaired", "store": str(self.path)},
        )

    def _inspect(self, connection: sqlite3.Connection, last: int) -> tuple[int, bool, list[int], int, int]:
        """
        Look at the heads after *last* and at the items up to the next slice.

        Returns:
            Where it ended, whether that was the end, what to repair, and how many heads and items there were.
        """
        heads = connection.execute(
            "SELECT id, space, key, state, expire_at, bytes FROM heads WHERE id > ? ORDER BY id LIMIT ?", (last, _SLICE)
        ).fetchall()
        done = len(heads) < _SLICE
        low = _FIRST if last < -_HEADS else min(last + 1, _HEADS - 1) << _BITS
        high = -_FIRST - 1 if done else max(min((heads[-1][0] + 1) << _BITS, -_FIRST), _FIRST + 1) - 1
        rows = connection.execute("SELECT id, data FROM items WHERE id BETWEEN ? AND ? ORDER BY id", (low, high))
        suspects: dict[int, None] = {}
        present: dict[int, list[int]] = {}
        items = 0
        for place, data in rows:
            items += 1
            number = place >> _BITS
            present.setdefault(number, []).append(place)
            if not fits(data):
                suspects[number] = None
        known = set()
        for number, space, key, sealed, expire_at, size in heads:
            known.add(number)
            state = _State.unseal(number, space, key, sealed)
            places = [(place, b"") for place in present.get(number, [])]
            if state is None or (state.expire_at, state.size) != (expire_at, size) or not _complete(state, places):
                suspects[number] = None
        suspects.update(dict.fromkeys(number for number in present if number not in known))
        return heads[-1][0] if heads else last, done, list(suspects), len(heads), items

    def _repair(self, number: int, findings: _Findings) -> None:
        with self._writing("repair") as connection:
            self._mend(connection, number, findings)

    def _mend(self, connection: sqlite3.Connection, number: int, findings: _Findings) -> None:
        """Make head *number* and its items agree: what does not fit goes into quarantine. Looks again at everything."""
        select = "SELECT space, key, state, expire_at, bytes FROM heads WHERE id = ?"
        row = connection.execute(select, (number,)).fetchone()
        state = None if row is None else _State.unseal(number, *row[:3])
        if row is None or state is None:
            problem = "items without a head" if row is None else "the head of the entry is damaged"
            self._quarantine_entry(connection, number, problem, findings)
            return
        first = number << _BITS
        expected = set(state.head("", None).sequences)
        bad: list[tuple[int | None, str, Any]] = []
        size = 0
        select = "SELECT id, data FROM items WHERE id BETWEEN ? AND ?"
        for place, data in connection.execute(select, (first, first + _MOST - 1)).fetchall():
            sequence = place - first
            known = sequence in expected
            expected.discard(sequence)
            if known and fits(data):
                size += len(data)
                continue
            problem = "the checksum is wrong" if known else "the head does not know of this item"
            bad.append((sequence, problem, data))
            connection.execute("DELETE FROM items WHERE id = ?", (place,))
            state = replace(state, spans=_without(state.spans, sequence, sequence + 1))
        for sequence in sorted(expected):
            bad.append((sequence, "the item is missing", None))
            state = replace(state, spans=_without(state.spans, sequence, sequence + 1))
        space, key, _, *columns = row
        if not bad:
            if columns != [state.expire_at, state.size]:
                self._write_head(connection, space, key, state, new=False)
                findings.repaired.append(
                    f"what the file says beside the head of {_shown(_as_key(key))} was written anew"
                )
                logger.warning(
                    "store %s: %s",
                    self.path,
                    findings.repaired[-1],
                    extra={"event_name": "store.repaired", "store": str(self.path), "of": self},
                )
            return
        for sequence, problem, data in bad:
            self._quarantine(connection, space, key, sequence, problem, data, findings)
        if not state.is_log and not state.spans:
            self._remove(connection, state)  # a value without its content is no entry
        else:
            # A new version: who still has the whole in memory must not take this for what he saved.
            state = replace(state, version=state.version + 1, size=size)
            self._write_head(connection, space, key, state, new=False)

    def _quarantine_entry(self, connection: sqlite3.Connection, number: int, problem: str, findings: _Findings) -> None:
        """Move the head *number*, if there is one, and all its items."""
        row = connection.execute("SELECT space, key, state FROM heads WHERE id = ?", (number,)).fetchone()
        space, key, sealed = (None, None, None) if row is None else row
        if row is not None:
            self._quarantine(connection, space, key, None, problem, sealed, findings)
            connection.execute("DELETE FROM heads WHERE id = ?", (number,))
        if -_HEADS <= number < _HEADS:  # a number that is damaged itself has no items that could be found by it
            first = number << _BITS
            select = "SELECT id, data FROM items WHERE id BETWEEN ? AND ?"
            for place, data in connection.execute(select, (first, first + _MOST - 1)).fetchall():
                self._quarantine(connection, space, key, place - first, problem, data, findings)
            connection.execute("DELETE FROM items WHERE id BETWEEN ? AND ?", (first, first + _MOST - 1))
        # Its version is not known, and its successor must not be taken for it: further than anybody can have counted.
        self._raise_floor(connection, int(time.time() * 1000))

    def _raise_floor(self, connection: sqlite3.Connection, version: int) -> None:
        """Let new entries begin behind *version*."""
        connection.execute(
            "INSERT INTO settings VALUES ('floor', ?) "
            "ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)",
            (version,),
        )

    def _quarantine(
        self,
        connection: sqlite3.Connection,
        space: bytes | None,
        key: bytes | None,
        sequence: int | None,
        problem: str,
        data: Any,
        findings: _Findings,
    ) -> None:
        connection.execute(
            "INSERT INTO quarantine (space, key, sequence, problem, found_at, data) VALUES (?, ?, ?, ?, ?, ?)",
            (space, key, sequence, problem, self._timer(), data),
        )
        self._checked = False  # where one row is damaged, others may be
        bad = BadRow(_as_text(space), _as_key(key), sequence, problem, data is not None)
        findings.bad.append(bad)
        logger.warning(
            "store %s: %s: space %r, key %s, item %s",
            self.path,
            problem,
            bad.space,
            _shown(bad.key),
            sequence,
            extra={"event_name": "store.quarantined", "store": str(self.path), "of": self},
        )

    def quarantine(self) -> Iterator[Quarantined]:
        """What recovery has taken out of service, oldest first, in slices as in `keys`."""
        last = 0
        select = "SELECT * FROM quarantine WHERE id > ? ORDER BY id LIMIT 16"
        while rows := self._read(lambda c, last=last: c.execute(select, (last,)).fetchall()):  # type: ignore[misc]
            for number, space, key, sequence, problem, found_at, data in rows:
                last = number
                yield Quarantined(_as_text(space), _as_key(key), sequence, problem, found_at, data)

    # The end

    def close(self) -> None:
        """Let go of the file, after what is being saved; what is being read is finished. Again does nothing."""
        with self._opening, self._lock:  # in the order in which a fork takes them
            if not self._closed and not self._read_only and not self._memory:
                self._mark_clean()
            self._closed = True
            self._leases.clear()
            if self.owners is not None:
                self.owners.close()
            self._close_idle()
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            self._stamp_file()

    def _mark_clean(self) -> None:
        """Write the row that lets the next store skip the check, unless something may be damaged."""
        if not self._checked or (self._writer is None and (self._clean or self._child)):
            return
        stamp = time.time_ns() // 1000 * 1000  # some file systems store microseconds
        with contextlib.suppress(OSError, sqlite3.Error, StoreError):
            self._check_files("close")
            mark = _mark(Path(self.path).stat().st_ino, stamp)
            writer = self._writer = self._writer or self._connect()
            if self._clean and writer.execute(_READ_MARK).fetchone() == (self._mark,):
                return  # no store has written to the file
            # Another process that is writing closes the file after this one.
            writer.execute("PRAGMA busy_timeout = 0")
            writer.execute("INSERT OR REPLACE INTO settings VALUES ('clean', ?)", (mark,))
            self._stamp, self._mark = stamp, mark

    def _stamp_file(self) -> None:
        """Give the file the time that the row ``clean`` names, if this store has closed its last connection."""
        if not self._stamp or Path(os.path.realpath(self.path) + "-wal").exists():
            return
        with contextlib.suppress(OSError):  # it belongs to another user, say
            found = Path(self.path).stat()
            if _mark(found.st_ino, self._stamp) == self._mark:
                os.utime(self.path, ns=(found.st_atime_ns, self._stamp))

    # fork

    def _before_fork(self) -> None:
        """Close every connection, and keep others from opening one until the fork is over."""
        deadline = time.monotonic() + self._timeout + 1.0
        self._opening.acquire()
        self._forking, self._held, self._quiet = True, False, False
        while not self._quiet:
            self._held = self._held or self._lock.acquire(timeout=0.001)
            with contextlib.suppress(sqlite3.Error):
                if not self._memory:  # no file, no locks: the child has a copy of its own
                    self._close_idle()
                    if self._held and self._writer is not None:
                        self._writer.close()
                        self._writer = None
            self._quiet = self._held and not self._readers
            if time.monotonic() > deadline:
                break  # the child is told
            if self._readers:
                time.sleep(0.0005)  # another thread is reading

    def _after_fork_in_parent(self) -> None:
        self._forking = False
        self._opening.release()
        if self._held:
            self._lock.release()

    def _after_fork_in_child(self) -> None:
        if not self._quiet:
            # Not closed either, now or at exit: SQLite would do that with locks that only the parent has.
            _immortal.extend((self._writer, *self._readers))
            _keep_alive(_immortal)
            self._writer, self._readers = None, set()
            self._idle.clear()
            self._forked = (
                f"store {self.path} was in use by another thread when this process was forked, and cannot be used "
                f"here. Open it anew, or start the process by spawning it"
            )
        self._forking, self._child = False, True
        self._leasing = threading.Lock()
        self._leases.clear()  # they are the parent's
        if self.owners is not None:
            self.owners.forget()
        self._lock = threading.Lock()
        self._opening = threading.Lock()


_stores: weakref.WeakSet[SQLiteStore] = weakref.WeakSet()
_immortal: list[Any] = []
_forking: list[SQLiteStore] = []


def _keep_alive(value: object) -> None:
    """Keep *value* from being finalized, even at the end of the interpreter."""
    with contextlib.suppress(ImportError, AttributeError):
        import ctypes  # noqa: PLC0415 - needed once in a blue moon

        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _before_fork() -> None:
    for store in list(_stores):
        store._before_fork()
        _forking.append(store)


def _after_fork_in_parent() -> None:
    while _forking:
        _forking.pop()._after_fork_in_parent()


def _after_fork_in_child() -> None:
    while _forking:
        _forking.pop()._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _digest(place: tuple[bytes, bytes]) -> bytes:
    space, key = place
    return blake2b(len(space).to_bytes(8, "big") + space + key, digest_size=16).digest()


def _epoch_name(digest: bytes) -> str:
    return f"epoch {digest.hex()}"


def _epoch(connection: sqlite3.Connection, digest: bytes) -> int:
    """How often the lease of an entry was taken from a store that had not renewed it."""
    row = connection.execute("SELECT value FROM settings WHERE name = ?", (_epoch_name(digest),)).fetchone()
    return 0 if row is None else int(row[0])


def _mark(inode: int, modified: int) -> str:
    """The row ``clean`` of a file; *modified* is in nanoseconds since 1970."""
    return f"{inode} {modified}"


def _found(path: str) -> tuple[int, int, int]:
    """Device, inode and length of the file that *path* names; zeros if there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - each save asks four times, and a Path costs as much as the call
    except OSError:
        return 0, 0, 0
    return found.st_dev, found.st_ino, found.st_size


def _primary(error: sqlite3.Error) -> int:
    """SQLite's code for *error* without its details."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


def _complete(state: _State, rows: list[tuple[int, bytes]]) -> bool:
    """Whether *rows*, in order, are the items that the head names."""
    first, spans = state.id << _BITS, state.spans
    if len(spans) == 1:  # numbers are unique and ascending: the ends and the number of them settle it
        start, stop = spans[0]
        return len(rows) == stop - start and rows[0][0] == first + start and rows[-1][0] == first + stop - 1
    sequences = itertools.chain.from_iterable(itertools.starmap(range, spans))
    return [place - first for place, _ in rows] == list(sequences)


def _length(connection: sqlite3.Connection, first: int, last: int) -> int:
    """Bytes of the items from *first* to *last*; SQLite reads that from the row's header."""
    select = "SELECT coalesce(sum(length(data)), 0) FROM items WHERE id BETWEEN ? AND ?"
    return int(connection.execute(select, (first, last)).fetchone()[0])


def _without(spans: Spans, start: int, stop: int) -> Spans:
    """*spans* less those from *start* to before *stop*."""
    left: list[tuple[int, int]] = []
    for low, high in spans:
        left += [part for part in ((low, min(high, start)), (max(low, stop), high)) if part[0] < part[1]]
    return tuple(left)


def _with(spans: Spans, start: int, stop: int) -> Spans:
    """*spans* and those from *start* to before *stop*; what touches is joined."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted((*spans, (start, stop))):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return tuple(joined)


def _as_text(space: Any) -> str | None:
    return space.decode(errors="replace") if type(space) is bytes else None


def _as_key(key: Any) -> Any:
    try:
        return decode_key(key)
    except Exception:  # damaged: whatever msgspec makes of it
        return key


def _check_sizes(change: Change, most_bytes: int) -> None:
    datas: Iterable[bytes] = ()
    if isinstance(change, SaveValue):
        datas = (change.data,)
    elif isinstance(change, SaveLog):
        datas = itertools.chain(change.append, change.put.values())
    for data in datas:
        if len(data) > most_bytes:
            raise NotStorable(
                f"an item of {_shown(change.key)} in {change.space!r} must have at most {most_bytes:,} bytes; "
                f"found {len(data):,}. Store it in parts, or in a file of its own"
            )


def _check_replaces(change: SaveLog) -> None:
    """What is there is a value, of which nothing can be kept in a log."""
    if not change.replace:
        raise ValueError(
            f"{_shown(change.key)} in {change.space!r} should be a log to be changed as one; found a value. "
            f"Save it with replace=True"
        )


def _check_place(change: SaveLog, sequence: int, following: int) -> None:
    if not 0 <= sequence < following:
        raise ValueError(
            f"an item of {_shown(change.key)} in {change.space!r} can be put at 0 to {following - 1}; "
            f"found {sequence}. Append it"
        )


def _conflict(conflicts: list[tuple[str, Any, int, int]], batch: Sequence[Change]) -> VersionConflict:
    space, key, base, found = conflicts[0]
    more = f" (and {len(conflicts) - 1} more)" if len(conflicts) > 1 else ""
    return VersionConflict(
        f"version {base} of {_shown(key)} in {space!r} was to be replaced; found version {found}{more}: somebody "
        f"else has saved it, or 0: it is gone. None of the {len(batch)} change(s) was saved. Load it again and decide",
        tuple(conflicts),
        tuple((change.space, change.key) for change in batch),
    )


def _shown(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _sync_folder(folder: Path) -> None:
    """Take a new name in *folder* to the disk, where the system lets folders be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_SHORTEST: Final = 512  # bytes: the smallest page that SQLite has
_LOG_HEADER: Final = 32  # bytes, as SQLite's file format has it
_FRAME_HEADER: Final = 24


def _commits_behind(log: str, frames: int) -> bool:
    """Whether the file *log* has a commit behind its first *frames*, which are all that SQLite takes from it."""
    # The log, unlike the file and its index, may be opened and closed by hand: SQLite holds no locks on it.
    try:
        with Path(log).open("rb") as file:
            header = file.read(_LOG_HEADER)
            if len(header) < _LOG_HEADER:
                return False
            magic, _, page, _, salts = struct.unpack(">IIII8s", header[:24])
            before = header[24:]
            if _log_checksum(magic, header[:24]) != struct.unpack(">II", before):
                return bool(file.read(1))
            size = page + _FRAME_HEADER
            if frames > 0:
                file.seek(_LOG_HEADER + (frames - 1) * size + 16)
                before = file.read(8)
            file.seek(_LOG_HEADER + max(frames, 0) * size)
            # Frames from before the log was begun anew have other salts; a commit says how many pages there are.
            while len(frame := file.read(size)) == size:
                if frame[8:16] == salts and frame[4:8] != b"\0\0\0\0":
                    # Its header may have been written and its page not, by somebody who was killed in between. If it
                    # goes on from the frame before it, it was written whole, and so was everything before it.
                    chained = _log_checksum(magic, frame[:8] + frame[_FRAME_HEADER:], *struct.unpack(">II", before))
                    if chained == struct.unpack(">II", frame[16:24]):
                        return True
                before = frame[16:24]
    except FileNotFoundError:
        pass
    return False


def _log_checksum(magic: int, data: bytes, first: int = 0, second: int = 0) -> tuple[int, int]:
    """The checksum of *data* as SQLite writes it into its log, going on from *first* and *second*."""
    words = struct.unpack(f"{'>' if magic & 1 else '<'}{len(data) // 4}I", data)
    for left, right in zip(words[::2], words[1::2], strict=True):
        first = (first + left + second) & 0xFFFFFFFF
        second = (second + right + first) & 0xFFFFFFFF
    return first, second
