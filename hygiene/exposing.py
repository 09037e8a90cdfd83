"""A socket at which the owner of this process, and nobody else, can see what it holds.

Theory of operation
-------------------
**Who may come.** The socket is a file of mode 0600 in a folder of mode 0700, and there is no TCP. Each side asks the
kernel who the other one is, and hangs up on any user but its own: a folder may have been made by somebody else, and
modes are changed by mistake.

**What it says.** Each message is its length, four bytes with the highest first, and so much JSON. Requests are small; a
length beyond 64 KiB ends the connection before anything of it is kept. So do rubbish, silence, and an answer that
nobody takes: each connection has so many seconds for a request and its answer, however the bytes trickle. No key is
ever sent.

**One thread** serves all connections, and never waits for one of them. What it calls of the process is the report,
which waits for nobody. To trim a registry runs hooks and closers, which are other people's code: that has a thread of
its own, one at a time.

**Whose file it is.** What binds a name holds a lock on the folder meanwhile, so of two processes that find the file of
a dead one, one takes its place. A file is dead if nobody accepts there. It is removed by who made it, in the process
that made it: a forked child lets go of the socket and leaves the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import selectors
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import msgspec

from hygiene.cleanup import close_at_shutdown
from hygiene.janitor import aside, survive_fork
from hygiene.registry import Registry
from hygiene.reporting import Report, SessionReport, _encoder, _Options, _program, _survey

__all__ = ["Exposure", "Frame", "Trimmed", "ask", "expose", "exposed"]

REQUEST: Final = 64 * 1024
"""Bytes of a request, at most."""
ANSWER: Final = 64 * 1024 * 1024
"""Bytes of an answer that a client takes, at most."""
PATIENCE: Final = 5.0
"""Seconds for a request to come and its answer to be taken."""
TRIMMING: Final = 60.0
"""Seconds for a registry to be trimmed: what leaves is saved and closed."""
_PEERS = 16  # connections at once
_LARGEST = 500  # registries that are told, the largest first
_CLEAN = 256  # files of dead processes that are removed when a new one comes
_LENGTH = struct.Struct("!I")
_PEERCRED: int | None = getattr(socket, "LOCAL_PEERCRED", None)  # what the BSDs have, macOS among them
_LOOKING = 0.01  # part of the time that looking for sessions may take

Doing = Literal["frame", "trim"]


class Request(msgspec.Struct, frozen=True):
    """What a client asks for."""

    do: Doing
    registry: int | None = None
    """The number that a frame gave it."""
    to: int | str | None = None
    """As `Registry.trim` takes it."""


class Frame(msgspec.Struct, frozen=True):
    """What a process holds at one moment."""

    report: Report
    numbers: tuple[int, ...]
    """Of the registries in the report: each has one of its own for as long as it is exposed."""
    unseen: int
    """Smaller registries that were left out."""
    may_trim: bool
    """Whether the process lets registries be trimmed from outside."""
    started: float
    """When it was exposed, in seconds since 1970."""


class Trimmed(msgspec.Struct, frozen=True):
    """What came of a trim."""

    entries: int
    """How many left."""


class Refused(msgspec.Struct, frozen=True):
    """Why there is no answer."""

    error: str


class Exposure:
    """
    A socket that shows this process to its owner. Made by `expose`; all attributes are for reading.

    It lives until `close`, the end of its ``with``, the shutdown or the exit. Safe to use from any thread. A forked
    child is not exposed by it; the parent goes on being so.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, trim: bool) -> None:
        if not _can_tell_peers():
            raise OSError(
                errno.ENOTSUP, f"wanted Unix sockets that tell who connects; {sys.platform} has none that we know of"
            )
        self.trim = trim
        """Whether registries may be trimmed from outside."""
        self._pid = os.getpid()
        self._started = time.time()
        # Reentrant: a signal handler may close what its thread is closing.
        self._lock = threading.RLock()
        self._closing = False
        self._peers: dict[int, _Peer] = {}
        self._numbers: dict[int, tuple[int, weakref.ref[Registry[Any, Any]]]] = {}
        self._next = 1
        self._look_at = 0.0
        self._sessions: tuple[SessionReport, ...] | None = None  # of the last time that they were looked for
        self._done: list[tuple[_Peer, bytes]] = []
        self._trimming = False
        self._paused_until: float | None = None
        self._listener, self.path, self._file = _bind(path)
        try:
            self._selector = selectors.DefaultSelector()
            self._inner, self._outer = socket.socketpair()  # a byte into the outer one wakes the thread
            for end in (self._listener, self._inner, self._outer):
                end.settimeout(0)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(self._inner, selectors.EVENT_READ)
            survive_fork(self)
            self._thread = threading.Thread(target=self._run, name="hygiene-expose", daemon=True)
            self._thread.start()
        except BaseException:  # no descriptor or thread is left
            self._closing = True
            self._let_go()
            raise
        self._forget = close_at_shutdown(self, f"exposed at {self.path}", priority=-1)

    # Life

    @property
    def closed(self) -> bool:
        """Whether nobody can connect any more."""
        return self._closing

    def close(self) -> None:
        """Hang up, and remove the file. Twice does no harm."""
        with self._lock:
            first, self._closing = not self._closing, True
        self._forget.cancel()
        if first:
            self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        may = ", may be trimmed" if self.trim else ""
        return f"<Exposure {self.path}: {'closed' if self._closing else 'open'}{may}>"

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread is about to wake up anyway. Closed: it has ended
            self._outer.send(b"\0")

    def _after_fork(self) -> None:
        # The descriptors are copies. To close them changes nothing for the parent, but to take one out of the selector
        # would: what it waits for belongs to both.
        self._lock = threading.RLock()
        self._closing = True
        self._hang_up()

    def _hang_up(self) -> None:
        for peer in list(self._peers.values()):
            peer.socket.close()
        self._peers.clear()
        # Not all are there if one could not be made.
        for end in ("_selector", "_listener", "_inner", "_outer"):
            if hasattr(self, end):
                getattr(self, end).close()

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._file:  # or somebody has put another one there
                os.unlink(self.path)  # noqa: PTH108 - a string, as the socket has it
        self._hang_up()

    # The thread

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        finally:
            if os.getpid() == self._pid:  # or the user's code that was called here has forked
                self._closing = True
                self._let_go()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._rest()):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._inner:
                with contextlib.suppress(OSError):
                    self._inner.recv(4096)
            else:
                self._serve(key.data)
        with self._lock:
            done, self._done = self._done, []
        for peer, answer in done:
            self._reply(peer, answer)
        now = time.monotonic()
        for peer in list(self._peers.values()):
            if now >= peer.deadline:
                self._drop(peer)
        if self._paused_until is not None and now >= self._paused_until and not self._closing:
            self._paused_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _rest(self) -> float | None:
        ends = [peer.deadline for peer in self._peers.values()]
        if self._paused_until is not None:
            ends.append(self._paused_until)
        return max(min(ends) - time.monotonic(), 0.0) if ends else None

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError:
            # No descriptor is free. The one who waits at the door would wake this thread again and again.
            self._selector.unregister(self._listener)
            self._paused_until = time.monotonic() + 1.0
            return
        if len(self._peers) >= _PEERS or _peer_of(connection) != os.geteuid():
            connection.close()
            return
        connection.settimeout(0)
        peer = self._peers[connection.fileno()] = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _drop(self, peer: _Peer) -> None:
        del self._peers[peer.number]
        with contextlib.suppress(KeyError, ValueError, OSError):
            self._selector.unregister(peer.socket)
        peer.socket.close()

    def _serve(self, peer: _Peer) -> None:
        try:
            if peer.out:
                self._send(peer)
                return
            request = peer.receive()
            if request is not None and peer.waiting:
                raise ValueError  # noqa: TRY301 - as everything else that is not what we speak
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, ValueError):  # gone, or not what we speak
            self._drop(peer)
            return
        if request is None:
            return
        try:
            asked = msgspec.json.decode(request, type=Request)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._drop(peer)
            return
        if asked.do == "frame":
            self._reply(peer, self._frame())
        else:
            self._trim(peer, asked)

    def _send(self, peer: _Peer) -> None:
        sent = peer.socket.send(peer.out[:REQUEST])
        peer.out = peer.out[sent:]
        if not peer.out:
            peer.deadline = time.monotonic() + PATIENCE
            self._selector.modify(peer.socket, selectors.EVENT_READ, peer)

    def _reply(self, peer: _Peer, answer: bytes) -> None:
        if self._peers.get(peer.number) is not peer:
            return  # gone while its registry was trimmed
        peer.waiting = False
        peer.out = memoryview(answer)
        peer.deadline = time.monotonic() + PATIENCE
        self._selector.modify(peer.socket, selectors.EVENT_WRITE, peer)

    # What is asked

    def _frame(self) -> bytes:
        """The answer, encoded."""
        try:
            began = time.monotonic()
            look = began >= self._look_at
            survey = _survey(_Options(keys=False, stacks=False, sessions=look))
            report = survey.report
            if look:  # seldom where there are so many objects that it takes long
                self._look_at = time.monotonic() + (time.monotonic() - began) / _LOOKING
                self._sessions = report.sessions
            pairs = sorted(
                zip(survey.registries, report.registries, strict=True), key=lambda pair: -pair[1].stats.entries
            )
            largest = pairs[:_LARGEST]
            frame = Frame(
                report=dataclasses.replace(
                    report, registries=tuple(told for _, told in largest), sessions=self._sessions
                ),
                numbers=tuple(self._number(registry) for registry, _ in largest),
                unseen=len(pairs) - len(largest),
                may_trim=self.trim,
                started=self._started,
            )
            return _message(frame)
        except Exception as error:  # the thread must go on whatever a program has made of its registries
            return _message(Refused(f"no report could be made: {type(error).__name__}"))

    def _number(self, registry: Registry[Any, Any]) -> int:
        """A number that no other registry gets, however often addresses are used anew."""
        known = self._numbers.get(id(registry))
        if known is not None and known[1]() is registry:
            return known[0]
        number, self._next = self._next, self._next + 1
        self._numbers[id(registry)] = number, weakref.ref(registry)
        if len(self._numbers) > 2 * _LARGEST:
            alive = {place: one for place, one in self._numbers.items() if one[1]() is not None}
            self._numbers = dict(list(alive.items())[-4 * _LARGEST :])
        return number

    def _trim(self, peer: _Peer, asked: Request) -> None:
        registry = next((one() for number, one in self._numbers.values() if number == asked.registry), None)
        if not self.trim:
            self._reply(peer, _message(Refused("it does not let others trim; expose(trim=True) would")))
            return
        if registry is None:
            self._reply(peer, _message(Refused("there is no such registry any more")))
            return
        if self._trimming:
            self._reply(peer, _message(Refused("a registry is being trimmed already")))
            return
        try:
            registry._target(asked.to)  # type: ignore[arg-type]  # that is what is found out
        except (TypeError, ValueError) as error:
            self._reply(peer, _message(Refused(str(error))))
            return
        self._trimming = True
        peer.waiting = True
        peer.deadline = time.monotonic() + TRIMMING

        def trim() -> None:
            # What a hook raises may name a key, so it goes into the log of this process and nowhere else.
            answer: Trimmed | Refused = Refused("it failed; the log of the process says why")
            try:
                answer = Trimmed(registry.trim(to=asked.to))  # type: ignore[arg-type]
            finally:
                with self._lock:
                    self._trimming = False
                    self._done.append((peer, _message(answer)))
                self._wake()

        aside(trim, "expose-trim")


class _Peer:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.number = connection.fileno()
        self.deadline = time.monotonic() + PATIENCE
        self.waiting = False
        """Whether what it has asked for is under way."""
        self.out: bytes | memoryview = b""
        self._buffer = bytearray()

    def receive(self) -> bytes | None:
        """A request, once it is complete; an error if it never will be."""
        got = self.socket.recv(REQUEST)
        if not got:
            raise ConnectionResetError
        self._buffer += got
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        end = _LENGTH.size + length
        # Nothing may follow: an answer is waited for before one asks again.
        if length > REQUEST or len(self._buffer) > end:
            raise ValueError
        if len(self._buffer) < end:
            return None
        request = bytes(self._buffer[_LENGTH.size :])
        self._buffer.clear()
        return request


def expose(path: str | os.PathLike[str] | None = None, *, trim: bool = False) -> Exposure:
    """
    Let ``hygiene top`` see what this process holds, from the same machine and by the same user only.

    A thread of its own answers until the process ends; it sleeps while nobody asks. Keys are never told, names are.

    Args:
        path: Of the socket. By default it is named by program and process, in a folder of the user's own under
            ``$XDG_RUNTIME_DIR`` or the folder for temporary files, where ``hygiene top`` looks.
        trim: Whether who connects may also trim a registry.

    Returns:
        A handle with ``close()``, good for a ``with``, too. Nobody has to hold it.

    Raises:
        FileExistsError: *path* is something else than a socket, or another process answers there.
        PermissionError: the folder belongs to somebody else, or is open to others.
        OSError: the folder cannot be made, the path is too long for a socket, or this system has no such sockets.
    """
    return Exposure(path, trim=trim)


# Files


def folder() -> Path:
    """Where sockets are by default; it need not exist."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "hygiene"
    return Path(tempfile.gettempdir()) / f"hygiene-{os.geteuid()}"


def _own(place: Path, *, make: bool) -> Path:
    """*place*, if it is a folder of ours that nobody else can enter. In /tmp anybody could have made it."""
    if make:
        with contextlib.suppress(FileExistsError):
            place.mkdir(0o700)
    found = os.lstat(place)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(
            errno.EACCES,
            f"wanted a folder of user {os.geteuid()} that nobody else can enter; found mode "
            f"{stat.S_IMODE(found.st_mode):o} of user {found.st_uid}. Remove it, or give expose() a path",
            str(place),
        )
    return place


def _bind(path: str | os.PathLike[str] | None) -> tuple[socket.socket, str, tuple[int, int]]:
    """A socket that listens, its path, and which file that is."""
    if path is None:
        place = _own(folder(), make=True)
        stem = f"{re.sub(r'[^A-Za-z0-9_.]', '_', _program())[:32]}-{os.getpid()}"
        # Another of this name may be alive: containers that share the folder count their processes alike.
        names: Iterator[str] = (f"{stem}{again}.sock" for again in ("", *(f"-{n}" for n in range(2, 100))))
    else:
        given = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100 - links stay as they are
        place, names = given.parent, iter([given.name])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(place):
            if path is None:
                _remove_dead(place)
            target = _first_free(str(place / name) for name in names)
            with contextlib.suppress(OSError):
                os.fchmod(listener.fileno(), 0o600)  # on Linux the file has it from the first moment on
            try:
                listener.bind(target)
            except OSError as error:
                if "too long" in str(error):
                    raise OSError(
                        errno.ENAMETOOLONG, "wanted a path of at most 100 bytes for a socket; found", target
                    ) from error
                raise
            os.chmod(target, 0o600)  # noqa: PTH101
            listener.listen()  # from here on others can connect
            found = os.lstat(target)
    except BaseException:
        listener.close()
        raise
    return listener, target, (found.st_dev, found.st_ino)


def _first_free(targets: Iterable[str]) -> str:
    target = ""
    for target in targets:
        if _is_free(target):
            return target
    raise FileExistsError(
        errno.EADDRINUSE, "wanted a socket of our own; found one where another process answers", target
    )


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """A block in which no other process looks for a name in this folder."""
    import fcntl  # noqa: PLC0415 - not on Windows

    number = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                # Somebody has stopped in the middle of it, or the file system has no locks: rather go on without.
                if time.monotonic() >= end:
                    break
                time.sleep(0.01)
        yield
    finally:
        os.close(number)


def _is_free(target: str) -> bool:
    """Whether *target* can be bound: what a dead process has left there is removed."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return True
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "wanted a path for a socket; found a file that is none", target)
    if _answers(target):
        return False
    os.unlink(target)  # noqa: PTH108
    return True


def _answers(target: str) -> bool:
    """Whether somebody listens at *target*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)
        try:
            probe.connect(target)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # too many wait there, or we may not: it is somebody's
            return True
        return True


def _remove_dead(place: Path) -> None:
    """Remove what processes have left that were killed."""
    with contextlib.suppress(OSError):
        for number, one in enumerate(place.glob("*.sock")):
            if number >= _CLEAN:
                return
            with contextlib.suppress(OSError):
                _is_free(str(one))


# Who it is


def _can_tell_peers() -> bool:
    return hasattr(socket, "AF_UNIX") and (hasattr(socket, "SO_PEERCRED") or _PEERCRED is not None)


def _peer_of(connection: socket.socket) -> int | None:
    """The user at the other end, as the kernel knows it; ``None`` if it does not say."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            size = struct.calcsize("iII")
            return int(struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])
        if _PEERCRED is None:
            return None
        found = connection.getsockopt(0, _PEERCRED, 76)  # struct xucred of the BSDs: version, user, groups
        return int(struct.unpack_from("II", found)[1])
    except (OSError, struct.error):
        return None


# The client


def exposed() -> list[str]:
    """The paths of the processes that can be seen, those of this user in the usual folder."""
    try:
        place = _own(folder(), make=False)
    except OSError:
        return []
    return sorted(str(one) for one in place.glob("*.sock") if _answers(str(one)))


def ask(path: str, request: Request, timeout: float = PATIENCE) -> Frame | Trimmed:
    """
    What the process at *path* answers.

    Args:
        path: Of its socket.
        request: What is asked for.
        timeout: Seconds to wait for the whole answer.

    Raises:
        PermissionError: another user answers there.
        OSError: nobody answers, or not in time.
        ValueError: it was refused, or what came back is no answer.
    """
    end = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(path)
        if (user := _peer_of(connection)) != os.geteuid():
            raise PermissionError(
                errno.EACCES, f"wanted a process of user {os.geteuid()}; found one of user {user}", path
            )
        connection.sendall(_message(request))
        (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, end))
        if length > ANSWER:
            raise ValueError(f"wanted an answer of at most {ANSWER:,} bytes, found one of {length:,}")
        answer = _exactly(connection, length, end)
    kind: type[Frame | Trimmed] = Frame if request.do == "frame" else Trimmed
    try:
        found: Frame | Trimmed = msgspec.json.decode(answer, type=kind)
    except msgspec.DecodeError as error:
        with contextlib.suppress(msgspec.DecodeError):
            raise ValueError(msgspec.json.decode(answer, type=Refused).error) from None
        raise ValueError(f"what came back is no answer of this version of hygiene: {error}") from error
    return found


def _exactly(connection: socket.socket, size: int, end: float) -> bytes:
    got = bytearray()
    while len(got) < size:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "the process did not answer in time")
        connection.settimeout(left)
        some = connection.recv(min(size - len(got), 1 << 20))
        if not some:
            raise ConnectionResetError(errno.ECONNRESET, "the process hung up")
        got += some
    return bytes(got)


def _message(content: object) -> bytes:
    encoded = _encoder.encode(content)
    return _LENGTH.pack(len(encoded)) + encoded
