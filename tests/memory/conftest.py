"""A machine made of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from hygiene.memory.readings import _PAGE

MIB = 2**20


class Machine:
    """A tree of files that stands for ``/``: this process has 100 MiB, in a group that may have 1,000."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal:       {8 * MIB} kB\nMemFree:  1 kB\n")
        self.write("proc/self/cgroup", "0::/app\n")
        self.limit = 1000
        self.rss = 100

    def write(self, path: str, text: str) -> Path:
        """Write a file of the system, anew."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    @property
    def rss(self) -> float:
        """Resident MiB."""
        return self._rss

    @rss.setter
    def rss(self, size: float) -> None:
        self._rss = size
        pages = int(size * MIB) // _PAGE
        self.write("proc/self/statm", f"{4 * pages} {pages} 10 1 0 5 0\n")

    @property
    def limit(self) -> float:
        """MiB that the group may have."""
        return self._limit

    @limit.setter
    def limit(self, size: float) -> None:
        self._limit = size
        self.write("sys/fs/cgroup/app/memory.max", f"{int(size * MIB)}\n")

    def stall(self, full: float) -> None:
        """Let all tasks have waited for so many per cent of the time."""
        self.write("sys/fs/cgroup/app/memory.pressure", f"some avg10={full} total=1\nfull avg10={full} total=1\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine of this test's own."""
    return Machine(tmp_path)
