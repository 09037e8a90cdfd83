"""What the system says: how much memory this process has, how much it may have, and how hard it is to get more.

Whatever cannot be read is left out. A file may be missing, unreadable, or say something that nobody expects, on the
next reading if not on this one; a monitor that fails for it would be worse than one that knows less.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hygiene.janitor import survive_fork

__all__ = ["MemoryLimit", "Readings", "Stall", "rss"]

_UNLIMITED = 2**60
"""What is above is a way to say "none": cgroup v1 says it as the largest multiple of a page that fits in 63 bits."""
_RESIDENT = 1
_VIRTUAL = 0
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One thing that memory is limited by."""

    size: int
    """Bytes that there may be."""
    source: str
    """What says so: the path of a cgroup's file, "RLIMIT_AS", "the machine", or "given"."""
    used: int
    """Bytes that count against it now: of a cgroup, those of all processes in it that cannot be dropped at once."""

    @property
    def share(self) -> float:
        """How much of it is used: 1.0 is all."""
        return self.used / self.size


@dataclass(frozen=True, slots=True)
class Stall:
    """Pressure stall information of Linux: the share of the last ten seconds in which tasks waited for memory."""

    some: float
    """Per cent of the time in which at least one waited."""
    full: float
    """Per cent of the time in which all did."""
    own: bool
    """Whether it is that of the cgroup of this process, and not that of the whole machine."""


class _Statm:
    """/proc/self/statm, kept open: to read it takes a third of opening it, reading and closing it."""

    def __init__(self) -> None:
        self._file: int | None = None
        survive_fork(self)

    def pages(self, field: int) -> int:
        """A number of pages; ``OSError`` or ``ValueError`` where there is none."""
        if self._file is not None:
            try:
                return int(os.pread(self._file, 128, 0).split(None, 2)[field])
            except (OSError, ValueError, IndexError):
                # Somebody has closed all files, as a daemon does when it starts, and the number may be another's by
                # now. So it is not closed, only forgotten.
                self._file = None
        self._file = os.open("/proc/self/statm", os.O_RDONLY)
        return int(os.pread(self._file, 128, 0).split(None, 2)[field])

    def _after_fork(self) -> None:
        # The file is that of the parent: "self" is looked up when it is opened.
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)


_statm = _Statm()


def rss() -> int:
    """
    Resident memory of this process in bytes, now. Takes under 2 us on Linux; safe in any thread, and after a fork.

    Counted are all its pages in RAM, shared ones too. It seldom falls when objects are freed: their memory stays with
    the process, for the next ones.
    """
    try:
        return _statm.pages(_RESIDENT) * _PAGE
    except (OSError, ValueError, IndexError):
        return _elsewhere().rss


def _virtual() -> int:
    try:
        return _statm.pages(_VIRTUAL) * _PAGE
    except (OSError, ValueError, IndexError):
        return _elsewhere().vms


@dataclass(frozen=True, slots=True)
class _Sizes:
    rss: int
    vms: int


def _elsewhere() -> _Sizes:
    """Where there is no /proc."""
    import psutil  # noqa: PLC0415 - takes 10 ms, and Linux does without

    try:
        found = psutil.Process().memory_info()
    except (psutil.Error, OSError):
        # As in a container that hides /proc: the highest that it has been is the best that is known.
        peak = _peak()
        return _Sizes(peak, peak)
    return _Sizes(found.rss, found.vms)


def _peak() -> int:
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


class Readings:
    """
    Reads the numbers; keeps nothing but where to look. Safe to use from any thread.

    Args:
        root: The folder that stands for ``/``: tests give one with files of their own under ``proc`` and ``sys``.
    """

    def __init__(self, root: str | os.PathLike[str] = "/") -> None:
        self._root = Path(root)
        self._real = self._root == Path("/")
        # To list all mounts takes longer than all the rest, and the group is mounted where it was as long as it is the
        # same group.
        self._known: dict[tuple[bool, str], list[Path]] = {}

    def rss(self) -> int:
        """Resident memory in bytes."""
        return self._pages(_RESIDENT)

    def swap(self) -> int | None:
        """Bytes of this process that are swapped out; ``None`` where that is not known."""
        return self._kilobytes("proc/self/status", "VmSwap")

    def limits(self) -> list[MemoryLimit]:
        """Every limit there is, the nearest first."""
        resident = self.rss()
        found = [*self._cgroups(resident), *self._address_space()]
        machine = self._kilobytes("proc/meminfo", "MemTotal") or _machine()
        if machine:
            found.append(MemoryLimit(machine, "the machine", resident))
        return sorted(found, key=lambda limit: (-limit.share, limit.size))

    def stall(self) -> Stall | None:
        """What has waited for memory; ``None`` where the kernel does not say."""
        for folder in self._folders(unified=True):
            if found := _stall(folder / "memory.pressure", own=True):
                return found
        return _stall(self._root / "proc/pressure/memory", own=False)

    # Files

    def _pages(self, field: int) -> int:
        if self._real:
            return rss() if field == _RESIDENT else _virtual()
        try:
            return int((self._root / "proc/self/statm").read_bytes().split()[field]) * _PAGE
        except (OSError, ValueError, IndexError):
            found = _elsewhere()
            return found.rss if field == _RESIDENT else found.vms

    def _kilobytes(self, path: str, name: str) -> int | None:
        for line in _lines(self._root / path):
            key, _, rest = line.partition(":")
            if key == name:
                try:
                    return int(rest.split()[0]) * 1024
                except (ValueError, IndexError):
                    return None
        return None

    def _address_space(self) -> Iterator[MemoryLimit]:
        try:
            import resource  # noqa: PLC0415 - not on Windows

            size, _ = resource.getrlimit(resource.RLIMIT_AS)
        except (ImportError, OSError, ValueError):
            return
        if 0 < size < _UNLIMITED and size != resource.RLIM_INFINITY:
            yield MemoryLimit(size, "RLIMIT_AS", self._pages(_VIRTUAL))

    # Control groups

    def _cgroups(self, resident: int) -> Iterator[MemoryLimit]:
        for unified in (True, False):
            for folder in self._folders(unified=unified):
                for name in _LIMITS[unified]:
                    size = _number(folder / name)
                    if size is not None:
                        used = self._used(folder, unified=unified)
                        path = folder / name
                        shown = path if self._real else Path("/", path.relative_to(self._root))
                        yield MemoryLimit(size, str(shown), resident if used is None else used)

    @staticmethod
    def _used(folder: Path, *, unified: bool) -> int | None:
        """
        What counts: without the pages of files that have not been used lately, which the kernel drops first.

        Kubernetes calls it the working set, and evicts by it.
        """
        charged = _number(folder / ("memory.current" if unified else "memory.usage_in_bytes"))
        if charged is None:
            return None
        wanted = "inactive_file" if unified else "total_inactive_file"
        for line in _lines(folder / "memory.stat"):
            name, _, count = line.partition(" ")
            if name == wanted and count.isdecimal():
                return max(charged - int(count), 0)
        return None

    def _folders(self, *, unified: bool) -> list[Path]:
        """The folder of this process's group, and of each group above it."""
        group = self._group(unified=unified)
        if group is None:
            return []
        known = self._known.get((unified, group))
        if known is None:
            if len(self._known) > 2:  # noqa: PLR2004 - it was moved to another group
                self._known.clear()
            known = self._known[unified, group] = self._find(group, unified=unified)
        return known

    def _find(self, group: str, *, unified: bool) -> list[Path]:
        for within, place in self._mounts(unified=unified):
            mount = self._root / place.lstrip("/")
            try:
                below = PurePosixPath(group).relative_to(within)
            except ValueError:
                # A container that sees the path which the host calls it by, and its own group at the mount itself.
                below = PurePosixPath()
            if ".." in below.parts:  # outside the namespace: nothing of it can be seen but the mount
                below = PurePosixPath()
            return [mount / below, *(mount / above for above in below.parents if above != below)]
        return []

    def _group(self, *, unified: bool) -> str | None:
        for line in _lines(self._root / "proc/self/cgroup"):
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if path.startswith("/") and (not controllers if unified else "memory" in controllers.split(",")):
                return path
        return None

    def _mounts(self, *, unified: bool) -> list[tuple[str, str]]:
        """Which part of the hierarchy is mounted, and where; the usual places if that cannot be read."""
        found = []
        for line in _lines(self._root / "proc/self/mountinfo"):
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if len(fields) < 5 or len(kind) < 3:  # noqa: PLR2004 - see proc(5)
                continue
            if kind[0] == "cgroup2" if unified else kind[0] == "cgroup" and "memory" in kind[2].split(","):
                found.append((_unescaped(fields[3]), _unescaped(fields[4])))
        return found or [("/", "/sys/fs/cgroup" if unified else "/sys/fs/cgroup/memory")]


_LIMITS = {True: ("memory.max", "memory.high"), False: ("memory.limit_in_bytes",)}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except (OSError, ValueError):
        return []


def _number(path: Path) -> int | None:
    """The bytes that a file of a cgroup says; ``None`` for "max", for what is as good as that, and for nonsense."""
    try:
        number = int(path.read_bytes())
    except (OSError, ValueError):
        return None
    return number if 0 < number < _UNLIMITED else None


def _stall(path: Path, *, own: bool) -> Stall | None:
    found = {}
    for line in _lines(path):
        kind, _, rest = line.partition(" ")
        for item in rest.split():
            name, _, value = item.partition("=")
            if name == "avg10":
                with contextlib.suppress(ValueError):
                    found[kind] = float(value)
    return Stall(found["some"], found.get("full", 0.0), own) if "some" in found else None


def _machine() -> int | None:
    import psutil  # noqa: PLC0415 - as above

    try:
        return int(psutil.virtual_memory().total)
    except (psutil.Error, OSError, ValueError):
        return None


def _unescaped(path: str) -> str:
    r"""A path of mountinfo, where a blank is written ``\040``."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
