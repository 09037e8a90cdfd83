"""
Hints that an entry in memory is stale, because somebody else has saved it.

Theory of operation
===================

**A hint and no more.** What is right is decided by versions and tokens when something is saved. A hint only makes it
rarer that a process works on what is old. So it may come late, twice, or without need; and where one may have been
missed, because the connection was away, the answer is "anything may have changed".

**A line** is a connection of its own, on which a server tells what has changed (Redis), or is asked at intervals
(PostgreSQL, and a Redis that does not let itself be watched). A thread of its own holds it: it waits for most of the
time, and the callback is somebody else's code, for which nothing else should have to wait.

**Digests.** A server knows entries by digest. The watch keeps, for each key that its user has in memory, the digest,
the version and the beginning of the head, and nothing of other keys.

**No locks.** What several threads share are single operations of a ``dict`` and a ``SimpleQueue``: so `Watch.close` may
be called from anywhere, even by a collection at any line of the thread itself, and a fork finds nothing held.
"""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from types import TracebackType
from typing import Any, Final, Protocol, Self

import msgspec

from hygiene.errors import StoreError
from hygiene.janitor import leave_alone, survive_fork
from hygiene.logs import logger

__all__ = ["Line", "Probe", "Watch", "Watcher", "plug_of"]


ASKED: Final = 1000  # heads in one question: some milliseconds of the server, a tenth of a megabyte
_MARK: Final = 14  # bytes of a head that hold its checksum and the random number of the save that has written it
_FIRST_RETRY: Final = 0.1
_EARLIER: Final = 0.1  # of the interval: processes that were started together must not ask together for ever

_fields = msgspec.msgpack.Decoder(tuple[Any, ...]).decode


class Line(Protocol):
    """A connection on which what changes elsewhere comes in."""

    tells: bool
    """Whether it tells only what changes while it stands; otherwise it compares with what it knew before."""
    plug: socket.socket | None
    """The connection's socket, under a file descriptor of its own, to wake up who waits for it; if there is one."""

    def wait(self, watcher: Watcher) -> Collection[bytes] | None:
        """
        Wait for a while; return the digests that may have changed, or ``None`` if anything may have.

        Any exception means that the connection is of no use any more.
        """

    def close(self) -> None:
        """Let go of the connection."""


class Known:
    """What is known of an entry that somebody has in memory."""

    __slots__ = ("key", "mark", "version")

    def __init__(self, key: Any, version: int | None) -> None:
        self.key = key
        self.version = version
        self.mark: bytes | None = None

    def differs(self, row: bytes | None) -> bool:
        """Whether the head *row* is not the one that was known; it is from now on."""
        before, self.mark = self.mark, b"" if row is None else row[:_MARK]
        if before is None and self.version is not None:
            return self.version != _version_in(row)
        return before != self.mark


def _version_in(row: bytes | None) -> int:
    """The version in a head; it is not checked: what is damaged fits nothing, and whoever loads it will see."""
    if row is None:
        return 0
    try:
        return int(_fields(row[4:])[1])
    except (msgspec.MsgspecError, LookupError, TypeError, ValueError):
        return -1


class Probe:
    """A line on which heads are asked for at intervals."""

    tells = False

    def __init__(
        self, ask: Callable[[list[bytes]], list[bytes | None]], end: Callable[[], object], plug: socket.socket | None
    ) -> None:
        self._ask = ask
        self._end = end
        self.plug = plug
        self._refused = False

    def wait(self, watcher: Watcher) -> Collection[bytes] | None:
        """Wait for the interval, and then ask for the heads of all that is known."""
        watcher.sleep(watcher.interval * random.uniform(1 - _EARLIER, 1))  # noqa: S311 - no secret
        changed: list[bytes] = []
        known = list(watcher.known.items())
        for start in range(0, len(known), ASKED):
            if watcher.stopped():
                break
            part = known[start : start + ASKED]
            try:
                rows = self._ask([digest for digest, _ in part])
            except StoreError as error:
                # The connection stands and the server is only slow, or busy: what is missed now is seen next time. To
                # drop everything would only give it more to do.
                if not self._refused:
                    logger.warning(
                        "%s: cannot ask what has changed (%s); asks again",
                        watcher.name,
                        error,
                        extra={"event_name": "store.watch_failed", "store": watcher.name},
                    )
                self._refused = True
                break
            self._refused = False
            changed += [digest for (digest, entry), row in zip(part, rows, strict=True) if entry.differs(row)]
        return changed

    def close(self) -> None:
        """Let go of the connection."""
        self._end()


class Watcher:
    """What the thread of a `Watch` holds: all but the watch itself, so that its end is seen."""

    def __init__(
        self,
        name: str,
        open_line: Callable[[Watcher], Line],
        changed: Callable[[Sequence[Any] | None], object],
        interval: float,
    ) -> None:
        self.name = name
        self.interval = interval
        self.known: dict[bytes, Known] = {}
        self._stopped = False
        self.listening = False
        self.refused = False
        """Whether the server has refused to tell by itself; it is said once."""
        self._open_line = open_line
        self._changed = changed
        self._alarm: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._line: Line | None = None
        survive_fork(self)

    def run(self) -> None:
        """Hold a line, and open another when it breaks, until this is stopped."""
        failures, missed = 0, False
        while not self.stopped():
            try:
                self._line = line = self._open_line(self)
                try:
                    if not self.stopped():
                        self._begin(line, missed=missed)
                    while not self.stopped():
                        found = line.wait(self)
                        failures = 0  # not sooner: one that breaks as soon as it stands must not be asked in a loop
                        self._report(found)
                finally:
                    self.listening = False
                    self._line = None
                    _hang_up(line)
            except Exception as error:
                if not failures and not self.stopped():
                    logger.warning(
                        "%s: not told any more what changes elsewhere (%s: %s); tries again",
                        self.name, type(error).__name__, error,
                        extra={"event_name": "store.watch_lost", "store": self.name},
                    )  # fmt: skip
            if self.stopped():
                return
            failures += 1
            missed = True
            # Full jitter: processes that lost one server together must not come back to it together.
            self.sleep(random.uniform(0, min(_FIRST_RETRY * 2 ** min(failures, 30), self.interval)))  # noqa: S311

    def _begin(self, line: Line, *, missed: bool) -> None:
        self.listening = True
        if missed:
            logger.info(
                "%s: told again what changes elsewhere",
                self.name,
                extra={"event_name": "store.watch_back", "store": self.name},
            )
            self._tell(None)
        elif line.tells and self.known:
            self._report(list(self.known))  # they may have changed while the line was being opened

    def _report(self, digests: Collection[bytes] | None) -> None:
        if digests is None:
            self._tell(None)
            return
        # Looked up as late as can be: who loads an entry and adds it then may be a moment behind its change.
        known = map(self.known.get, digests)
        if keys := [entry.key for entry in known if entry is not None]:
            self._tell(keys)

    def _tell(self, keys: Sequence[Any] | None) -> None:
        if self.stopped():
            return
        try:
            self._changed(keys)
        except BaseException:  # nobody interrupts this thread: whatever it is, the callback has raised it
            logger.exception(
                "%s: the callback failed; the watch goes on",
                self.name,
                extra={"event_name": "store.callback_failed", "store": self.name, "of": self},
            )

    def stopped(self) -> bool:
        """Whether the thread is to end."""
        return self._stopped

    def sleep(self, delay: float) -> None:
        """Wait for *delay* seconds, or until this is stopped."""
        with contextlib.suppress(queue.Empty):
            self._alarm.get(timeout=delay)

    def stop(self) -> None:
        """Let the thread end; takes no lock, and does not wait for it."""
        self._stopped = True
        self.known.clear()
        self._alarm.put(None)
        # Behind the flag: either the thread sees that, or its line is here already.
        line = self._line
        if line is not None and line.plug is not None:
            with contextlib.suppress(OSError):
                line.plug.shutdown(socket.SHUT_RDWR)

    def _after_fork(self) -> None:
        # The thread is the parent's, and so is the line: not even a goodbye may be said on it.
        leave_alone(self._line)
        self._line = None
        self._stopped = True
        self.listening = False
        self.known.clear()


def _hang_up(line: Line) -> None:
    with contextlib.suppress(Exception):
        line.close()
    if line.plug is not None:
        line.plug.close()


class Watch:
    """
    Tells which of the entries that somebody has in memory may have changed elsewhere; made by ``store.watch``.

    It ends with `close`, with the store's `close`, and when nobody holds it any more. In a forked child it is closed:
    make another one there.

    Safe for threads. Nothing here blocks.
    """

    def __init__(
        self,
        name: str,
        digest: Callable[[Hashable], bytes],
        open_line: Callable[[Watcher], Line],
        changed: Callable[[Sequence[Any] | None], object],
        interval: float,
    ) -> None:
        self._digest = digest
        self._watcher = Watcher(name, open_line, changed, interval)
        self._end = weakref.finalize(self, self._watcher.stop)
        self._end.atexit = False  # the thread is a daemon
        try:
            threading.Thread(target=self._watcher.run, name="hygiene-watch", daemon=True).start()
        except BaseException:
            self._end.detach()
            raise

    def add(self, key: Hashable, version: int | None = None) -> None:
        """
        Tell of *key* from now on: it is in memory, or about to be loaded.

        Add it before it is loaded, or with the version that was loaded; else what changes in between is not noticed
        where the server tells of changes by itself. Again, with another version, after each save of one's own.

        Args:
            key: As the store takes it.
            version: What is in memory, if that is known. Without it, a server that is asked at intervals cannot say
                whether the entry has changed before it was asked first: the key is told once, to be on the safe side.
        """
        watcher = self._watcher
        if not watcher.stopped():
            watcher.known[self._digest(key)] = Known(key, version)
            if watcher.stopped():
                watcher.known.clear()  # it was closed in between, and nobody would take this out again

    def discard(self, key: Hashable) -> None:
        """Tell of *key* no more: it has left memory. If it was never added, nothing happens."""
        self._watcher.known.pop(self._digest(key), None)

    def close(self) -> None:
        """
        End it: at once, even if the server does not answer, and without waiting for a callback that is under way.

        Its thread and its connection go as soon as they can. Calling it again does nothing.
        """
        self._end()

    @property
    def closed(self) -> bool:
        """Whether it has ended: nothing is told any more."""
        return self._watcher.stopped()

    @property
    def listening(self) -> bool:
        """Whether the connection stands. While it does not nothing is told, and afterwards that anything may differ."""
        return self._watcher.listening

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "listening" if self.listening else "connecting"
        return f"<{type(self).__name__} {self._watcher.name}: {len(self._watcher.known)} keys, {state}>"


def plug_of(number: int) -> socket.socket:
    """The socket with this file descriptor, under another one: that cannot become somebody else's when it is closed."""
    return socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM)  # the family does not matter to a shutdown
