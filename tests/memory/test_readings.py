"""What the system says about memory, and all the ways in which it says nothing, or nonsense."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from hygiene.memory import readings
from hygiene.memory.readings import MemoryLimit, Readings, Stall, rss

MIB = 2**20
PAGE = readings._PAGE
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)


class Machine:
    """A tree of files that stands for ``/``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/self/statm", f"{400 * MIB // PAGE} {100 * MIB // PAGE} 10 1 0 5 0\n")
        self.write("proc/meminfo", f"MemTotal:       {8 * MIB} kB\nMemFree:  1 kB\n")

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def limit(self) -> MemoryLimit:
        return Readings(self.root).limits()[0]

    def sources(self) -> list[tuple[str, int]]:
        return [(limit.source, limit.size) for limit in Readings(self.root).limits()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@linux
def test_the_resident_size_is_that_of_this_process() -> None:
    """Within a few per cent of psutil's, which reads it a moment later."""
    assert psutil.Process().memory_info().rss == pytest.approx(rss(), rel=0.2)


@linux
def test_the_resident_size_rises_with_what_is_held() -> None:
    before = rss()
    held = b"x" * (64 * MIB)
    after = rss()

    assert after - before > 48 * MIB
    assert held


@linux
def test_a_reading_opens_no_file() -> None:
    rss()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(100):
        rss()

    assert before == len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@linux
def test_a_process_that_closes_all_files_can_still_be_read() -> None:
    """As a daemon does when it starts; the number of the file may belong to another by then."""
    code = """
        import os
        from hygiene.memory import rss
        rss()
        os.closerange(3, 256)
        assert rss() > 2**20
        os.closerange(3, 256)
        other = open("/dev/null")
        assert rss() > 2**20
        os.fstat(other.fileno())
        other.close()
        print("read")
    """
    done = run(code)

    assert "read\n" == done.stdout, done.stderr


@linux
def test_a_forked_child_reads_its_own_memory() -> None:
    """The kept file is the parent's; the child opens one of its own."""
    code = """
        import os
        from hygiene.memory import rss
        before = rss()
        child = os.fork()
        if child == 0:
            held = b"x" * 2**27
            os._exit(0 if rss() - before > 2**26 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert rss() - before < 2**26
        print("read")
    """
    done = run(code)

    assert "read\n" == done.stdout, done.stderr


def test_without_proc_psutil_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert psutil.Process().memory_info().rss == pytest.approx(Readings(tmp_path).rss(), rel=0.2)

    def refuse() -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "Process", refuse)

    assert Readings(tmp_path).rss() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@linux
@pytest.mark.parametrize("text", ["", "12", "a b c", "\x00\xff"])
def test_nonsense_in_statm_is_not_believed(machine: Machine, text: str) -> None:
    machine.write("proc/self/statm", text)

    assert Readings(machine.root).rss() > MIB


# Limits


def test_without_a_group_the_machine_is_the_limit(machine: Machine) -> None:
    assert MemoryLimit(8 * MIB * 1024, "the machine", 100 * MIB) == machine.limit()


def test_cgroup_v2_is_read_with_what_its_processes_use(machine: Machine) -> None:
    """Pages of files that were not used lately do not count: the kernel drops them first."""
    machine.write("proc/self/cgroup", "0::/app\n")
    machine.write("sys/fs/cgroup/app/memory.max", f"{500 * MIB}\n")
    machine.write("sys/fs/cgroup/app/memory.current", f"{450 * MIB}\n")
    machine.write("sys/fs/cgroup/app/memory.stat", f"anon 1\ninactive_file {150 * MIB}\n")

    limit = machine.limit()

    assert MemoryLimit(500 * MIB, "/sys/fs/cgroup/app/memory.max", 300 * MIB) == limit
    assert 0.6 == limit.share


def test_cgroup_v1_is_read_with_what_its_processes_use(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "5:devices:/x\n4:cpu,memory:/app\n0::/elsewhere\n")
    machine.write("sys/fs/cgroup/memory/app/memory.limit_in_bytes", f"{500 * MIB}\n")
    machine.write("sys/fs/cgroup/memory/app/memory.usage_in_bytes", f"{450 * MIB}\n")
    machine.write("sys/fs/cgroup/memory/app/memory.stat", f"inactive_file 5\ntotal_inactive_file {150 * MIB}\n")

    assert MemoryLimit(500 * MIB, "/sys/fs/cgroup/memory/app/memory.limit_in_bytes", 300 * MIB) == machine.limit()


@pytest.mark.parametrize("smallest", ["", "/kubepods", "/kubepods/pod1", "/kubepods/pod1/box"])
def test_the_smallest_limit_of_all_ancestors_counts(machine: Machine, smallest: str) -> None:
    """A pod's limit holds for its containers, whatever theirs says."""
    machine.write("proc/self/cgroup", "0::/kubepods/pod1/box\n")
    for group in ("", "/kubepods", "/kubepods/pod1", "/kubepods/pod1/box"):
        machine.write(f"sys/fs/cgroup{group}/memory.max", "max\n")
    machine.write(f"sys/fs/cgroup{smallest}/memory.max", f"{256 * MIB}\n")

    assert (f"/sys/fs/cgroup{smallest}/memory.max", 256 * MIB) == machine.sources()[0]


def test_a_group_that_is_throttled_is_limited(machine: Machine) -> None:
    """Above ``memory.high`` the kernel reclaims until nothing else gets done."""
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("sys/fs/cgroup/memory.max", f"{512 * MIB}\n")
    machine.write("sys/fs/cgroup/memory.high", f"{400 * MIB}\n")

    assert ("/sys/fs/cgroup/memory.high", 400 * MIB) == machine.sources()[0]


@pytest.mark.parametrize(
    "text", ["max\n", "", "-1\n", "0\n", "9223372036854771712\n", "9223372036854775807", "99999999999999999999999", "x"]
)
@pytest.mark.parametrize("version", [1, 2])
def test_what_says_unlimited_or_nonsense_is_no_limit(machine: Machine, version: int, text: str) -> None:
    machine.write("proc/self/cgroup", "0::/app\n" if version == 2 else "4:memory:/app\n")
    path = "app/memory.max" if version == 2 else "memory/app/memory.limit_in_bytes"
    machine.write(f"sys/fs/cgroup/{path}", text)

    assert [("the machine", 8 * MIB * 1024)] == machine.sources()


def test_a_container_that_sees_the_path_of_the_host_finds_its_group(machine: Machine) -> None:
    """Docker with cgroup v1: the file names the path outside, and the mount is the group itself."""
    machine.write("proc/self/cgroup", "4:memory:/docker/0123\n")
    machine.write(
        "proc/self/mountinfo",
        "35 31 0:32 /docker/0123 /sys/fs/cgroup/memory ro,relatime master:9 - cgroup cgroup rw,memory\n",
    )
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{64 * MIB}\n")

    assert ("/sys/fs/cgroup/memory/memory.limit_in_bytes", 64 * MIB) == machine.sources()[0]


@pytest.mark.parametrize("path", ["/../../other", "/docker/gone"])
def test_a_group_that_cannot_be_seen_leaves_the_mount(machine: Machine, path: str) -> None:
    machine.write("proc/self/cgroup", f"0::{path}\n")
    machine.write("sys/fs/cgroup/memory.max", f"{64 * MIB}\n")

    assert ("/sys/fs/cgroup/memory.max", 64 * MIB) == machine.sources()[0]


def test_a_hierarchy_that_is_mounted_elsewhere_is_found(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a/b\n")
    machine.write(
        "proc/self/mountinfo",
        "1 2 0:1 / / rw - ext4 /dev/sda rw\nbroken\n41 31 0:38 /a /mnt/my\\040groups rw - cgroup2 cgroup2 rw\n",
    )
    machine.write("mnt/my groups/b/memory.max", f"{64 * MIB}\n")

    assert ("/mnt/my groups/b/memory.max", 64 * MIB) == machine.sources()[0]


def test_a_limit_without_usage_is_held_against_the_resident_size(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("sys/fs/cgroup/memory.max", f"{200 * MIB}\n")

    assert 0.5 == machine.limit().share

    machine.write("sys/fs/cgroup/memory.current", "nonsense")

    assert 0.5 == machine.limit().share


def test_the_nearest_limit_comes_first(machine: Machine) -> None:
    """Not the smallest number: what is used up first. A group counts all that runs in it."""
    machine.write("proc/self/cgroup", "0::/pod/box\n")
    machine.write("sys/fs/cgroup/pod/box/memory.max", f"{200 * MIB}\n")
    machine.write("sys/fs/cgroup/pod/memory.max", f"{1000 * MIB}\n")
    machine.write("sys/fs/cgroup/pod/memory.current", f"{900 * MIB}\n")
    machine.write("sys/fs/cgroup/pod/memory.stat", "inactive_file 0\n")

    assert ("/sys/fs/cgroup/pod/memory.max", 1000 * MIB) == machine.sources()[0]


@linux
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_left_out(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("sys/fs/cgroup/memory.max", f"{200 * MIB}\n").chmod(0)

    assert "the machine" == machine.limit().source


@pytest.mark.parametrize(
    "path", ["proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup/memory.max", "proc/meminfo"]
)
def test_a_folder_where_a_file_should_be_is_left_out(machine: Machine, path: str) -> None:
    """Reading it raises what an unreadable file raises."""
    machine.write("proc/self/cgroup", "0::/\n")
    (machine.root / path).unlink(missing_ok=True)
    (machine.root / path).mkdir(parents=True)

    assert "the machine" == machine.limit().source
    assert machine.limit().size > 0


@linux
def test_an_address_space_that_is_limited_counts_addresses() -> None:
    code = """
        import resource
        from hygiene.memory.readings import Readings
        resource.setrlimit(resource.RLIMIT_AS, (2**33, resource.getrlimit(resource.RLIMIT_AS)[1]))
        print([(limit.size, limit.used > 2**20) for limit in Readings().limits() if limit.source == "RLIMIT_AS"])
    """
    done = run(code)

    assert "[(8589934592, True)]\n" == done.stdout, done.stderr


# Stalls and swap


def test_the_stall_of_the_group_comes_before_that_of_the_machine(machine: Machine) -> None:
    machine.write("proc/pressure/memory", "some avg10=2.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=1.00 total=0\n")

    assert Stall(2.5, 1.0, own=False) == Readings(machine.root).stall()

    machine.write("proc/self/cgroup", "0::/app\n")
    machine.write("sys/fs/cgroup/app/memory.pressure", "some avg10=20.00 avg60=1\nfull avg10=12.50 avg60=0.00\n")

    assert Stall(20.0, 12.5, own=True) == Readings(machine.root).stall()


@pytest.mark.parametrize("text", ["", "some avg10=x", "avg10", "full avg10=1.0"])
def test_without_a_word_on_stalls_there_is_none(machine: Machine, text: str) -> None:
    machine.write("proc/pressure/memory", text)

    assert Readings(machine.root).stall() is None


def test_swap_is_that_of_the_process(machine: Machine) -> None:
    assert Readings(machine.root).swap() is None

    machine.write("proc/self/status", "Name:\tpython\nVmSwap:\t    2048 kB\n")

    assert 2 * MIB == Readings(machine.root).swap()

    machine.write("proc/self/status", "VmSwap:\tmany\n")

    assert Readings(machine.root).swap() is None
