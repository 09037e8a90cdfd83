"""
The processes that use one file of SQLite: locks of the kernel on a side file.

Theory of operation
===================

**One lock for one lease.** The owner of an entry holds an exclusive lock on one byte of the side file ``FILE-owners``;
the number of the byte is a digest of the space and the key. Taking and dropping it costs one system call and no commit.
The kernel drops it when its process ends, however that ends. The number of a process is never used: numbers are reused,
and containers that share a file count their processes separately.

**Locks of the open file** (``F_OFD_SETLK`` of Linux) belong to one opening of the side file, and not to the process. So
two stores of one process exclude each other as two processes do, and a forked child that closes the inherited file
drops no lock of its parent. Where the kernel has no such locks, there are no leases between processes.

**The term.** A process that was stopped keeps its locks. So the end of each lease is written into a slot of the side
file, by the monotonic clock, which all processes of one machine share. A store that finds a lock taken and its end
passed raises the *epoch* of the entry in the store (see `SQLiteStore.lease`). The byte depends on the epoch, and so the
next lock is another one; a save under the old epoch is refused. Two entries may share a slot, so it also names its
byte. If it names another one, the term counts from the first time that the lock was found taken.

**Presence.** Each store holds a shared lock on one byte as long as it is open. Its owner is alone if no other one does.
The last one deletes the side file; a store that opened it in that moment notices, and opens it again.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import struct
import sys
import threading
import time
from typing import Any, Final

__all__ = ["SUPPORTED", "Owners", "byte_of"]

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

# The layout of ``struct flock`` is that of a 64-bit Linux: type, whence, start, length, process.
_FLOCK: Final = struct.Struct("@hhqqi4x")
SUPPORTED: Final = sys.platform.startswith("linux") and sys.maxsize > 1 << 32 and hasattr(fcntl, "F_OFD_SETLK")
"""Whether there are leases between processes on this platform."""
_PRESENCE: Final = 1 << 62
_FIRST: Final = 1 << 61  # locks of entries begin behind the contents of the file ...
_WAITING: Final = (1 << 62) + (1 << 61)  # ... and so do those that say that a process waits for an entry
_SLOT: Final = struct.Struct("<Qd")
_SLOTS: Final = 4096  # 64 KiB at most, and only where leases overlap in time do two of one slot matter
_ATTEMPTS: Final = 200
_STEP: Final = 0x9E3779B97F4A7C15  # the golden ratio: the bytes of successive epochs lie far apart


def byte_of(digest: bytes, epoch: int) -> int:
    """Return the byte whose lock is the lease of an entry with this *digest* in this *epoch*."""
    return _FIRST + ((int.from_bytes(digest[:8], "big") + epoch * _STEP) & (_FIRST - 1))


class Owners:
    """
    The side file of one store, opened by it; see the module.

    Args:
        path: Of the store.

    Raises:
        OSError: the side file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._store = os.path.realpath(path)  # two processes may have come by two links
        self.path = self._store + "-owners"
        self._file = -1
        self._closed = False
        self._opening = threading.Lock()
        self.open()

    def open(self) -> None:
        """Open the side file, unless it is open. A forked child opens its own."""
        if self._file >= 0:
            return
        with self._opening:
            if self._closed:
                raise OSError(errno.EBADF, "the store is closed")
            for attempt in range(_ATTEMPTS if self._file < 0 else 0):
                file = self._open()
                if self._lock(file, fcntl.F_RDLCK, _PRESENCE) and self._is_there(file):
                    self._file = file
                    return
                os.close(file)  # another store was deleting it in this moment
                time.sleep(0.0001 * attempt)
        if self._file >= 0:  # by another thread
            return
        raise OSError(f"{self.path} is deleted again and again")

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # users of the store may lease; SQLite does the same with its log
            os.fchmod(file, os.stat(self._store).st_mode & 0o777)  # noqa: PTH116 - beside the other calls of os
        return file

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file))  # noqa: PTH116 - as above
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Drop everything; the last one deletes the side file. Calling it again does nothing."""
        with self._opening:
            self._closed = True
            file, self._file = self._file, -1
        if file < 0:
            return
        with contextlib.suppress(OSError):
            # Exclusive: no other store has it open, and one that opens it now finds out that it was deleted.
            if self._lock(file, fcntl.F_WRLCK, _PRESENCE) and self._is_there(file):
                os.unlink(self.path)  # noqa: PTH108 - as above
        os.close(file)

    def forget(self) -> None:
        """Close what a forked child has inherited. The locks are the parent's, which still has it open."""
        self._opening = threading.Lock()
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def shared(self) -> bool:
        """Whether another store has the file open, in this process or in another one."""
        return self._file >= 0 and self._conflicts(_PRESENCE)

    # Leases

    def take(self, byte: int) -> bool:
        """Lock *byte*, unless another store has it."""
        self.open()
        return self._lock(self._file, fcntl.F_WRLCK, byte)

    def drop(self, byte: int) -> None:
        """Unlock *byte*."""
        if self._file >= 0:
            self._lock(self._file, fcntl.F_UNLCK, byte)

    def wait_for(self, digest: bytes) -> None:
        """Show that this store waits for an entry, until `stop_waiting_for`."""
        self.open()
        self._lock(self._file, fcntl.F_RDLCK, self._waiting(digest))

    def stop_waiting_for(self, digest: bytes) -> None:
        """Take back what `wait_for` has shown."""
        self.drop(self._waiting(digest))

    def is_awaited(self, digest: bytes) -> bool:
        """Whether another store waits for an entry."""
        return self._file >= 0 and self._conflicts(self._waiting(digest))

    @staticmethod
    def _waiting(digest: bytes) -> int:
        return _WAITING + byte_of(digest, 0) - _FIRST

    # The term

    def set_end(self, byte: int, end: float) -> None:
        """Write down when the lease of *byte* ends, by the monotonic clock."""
        with contextlib.suppress(OSError):  # the disk is full, say: then the term counts from when it was found taken
            os.pwrite(self._file, _SLOT.pack(byte, end), byte % _SLOTS * _SLOT.size)

    def end_of(self, byte: int) -> float | None:
        """Return when the lease of *byte* ends; ``None`` if its slot is another one's."""
        found = os.pread(self._file, _SLOT.size, byte % _SLOTS * _SLOT.size)
        if len(found) < _SLOT.size:
            return None
        named, end = _SLOT.unpack(found)
        return end if named == byte else None

    # The kernel

    def _lock(self, file: int, kind: int, byte: int) -> bool:
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _conflicts(self, byte: int) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = _FLOCK.unpack(fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, asked))
        return bool(answer[0] != fcntl.F_UNLCK)
