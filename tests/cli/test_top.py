"""`hygiene top` shows a process that is exposed, and does what its keys say."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from hygiene import MemoryMonitor, Pool, Registry, SQLiteStore, WriteBehind, expose
from hygiene.cli.top import View, _trim, sparkline
from hygiene.exposing import Frame, Request, ask
from hygiene.testing import ManualClock

pytestmark = pytest.mark.once

PATIENCE = 30.0
UP, DOWN = "\x1b[A", "\x1b[B"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]|\x1b[=>]")

PROGRAM = """
    import io, sys
    from hygiene import Pool, Registry, expose
    bots = [Registry(maxsize=size, name=name) for name, size in (("alpha", 100), ("beta", 200), ("gamma", None))]
    for number, bot in enumerate(bots):
        bot.update((key, key) for key in range(10 * (number + 1)))
    bots[0].get("nobody")
    pool = Pool(io.BytesIO, max_size=2, name="db")
    lease = pool.lease()
    with expose(trim="trim" in sys.argv) as exposure:
        print(exposure.path, flush=True)
        for line in sys.stdin:
            print(*map(len, bots), flush=True)
    lease.release()
    pool.close()
"""


@pytest.fixture(autouse=True)
def home(monkeypatch):
    """A folder of one's own for sockets."""
    with tempfile.TemporaryDirectory(prefix="hy") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        yield Path(place)


def environment(**more):
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error", "TERM": "xterm-256color", **more}


@contextlib.contextmanager
def program(*arguments):
    """A program that is exposed, and the path of its socket."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.communicate(timeout=PATIENCE)


def sizes(process):
    """Entries of its registries."""
    process.stdin.write("\n")
    process.stdin.flush()
    return [int(size) for size in process.stdout.readline().split()]


def top(*arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "hygiene", "top", *map(str, arguments)],
        env=environment(**more),
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


class Terminal:
    """`hygiene top` in a terminal of its own."""

    def __init__(self, *arguments, width=80, height=24):
        self.main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.before = termios.tcgetattr(other)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hygiene", "top", *map(str, arguments)],
            env={key: value for key, value in environment().items() if key not in {"COLUMNS", "LINES"}},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        self.other = other
        self.written = ""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self.main)
        os.close(self.other)

    def press(self, keys):
        self.written = ""
        os.write(self.main, keys.encode())

    def text(self):
        """What was written since the last key, without what the terminal obeys."""
        return ESCAPES.sub("", self.written)

    def sees(self, pattern):
        """Whether it comes to be written there."""
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.text()):
            left = end - time.monotonic()
            ready, _, _ = select.select([self.main], [], [], max(left, 0.0))
            if not ready:
                raise AssertionError(f"{pattern!r} was not seen in {self.text()[-2000:]!r}")
            try:
                self.written += os.read(self.main, 65_536).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended before {pattern!r} was seen in {self.text()[-2000:]!r}") from None
        return True

    def code(self):
        """Its exit code. What it still writes is taken, or it would wait for that."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.main], [], [], 0.05)[0]:
                self.written += os.read(self.main, 65_536).decode(errors="replace")
        return self.process.wait(1)


def frame(path):
    found = ask(path, Request("frame"), PATIENCE)
    assert isinstance(found, Frame)
    return found


def drawn(view, width=80, height=24):
    """What stands there, line by line."""
    console = Console(file=io.StringIO(), width=width, height=height or 1000, color_system=None)
    console.print(view.draw(width, height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def rows(view, **size):
    """The names of the registries, from top to bottom."""
    lines = drawn(view, **size)
    first = next(number for number, line in enumerate(lines) if line.startswith("registry"))
    return [line.split("  ")[0] for line in lines[first + 1 : lines.index("", first)]]


@pytest.fixture
def view():
    """A view of registries of this process."""
    held = [Registry(maxsize=size, name=name) for name, size in (("v-alpha", 5), ("v-beta", 30), ("v-gamma", None))]
    for number, registry in enumerate(held):
        registry.update((key, key) for key in range(10 * (number + 1)))
    held[1].get(1), held[2].get(1), held[2].get("nobody")
    with expose(trim=True) as exposure:
        found = frame(exposure.path)
    view = View()
    view.show(only(found, held))
    view.held = held
    yield view
    for registry in held:
        registry._name = "gone"  # the next test has others of these names, and a failure keeps the frames of this one


def only(found, held):
    """The frame without registries that others have left here."""
    names = {registry._name for registry in held}
    pairs = [
        (one, number) for one, number in zip(found.report.registries, found.numbers, strict=True) if one.name in names
    ]
    report = msgspec.structs.replace(found, numbers=tuple(number for _, number in pairs))
    object.__setattr__(report.report, "registries", tuple(one for one, _ in pairs))
    for field in ("pools", "stores", "writers", "monitors", "cleanups", "problems"):
        object.__setattr__(report.report, field, ())
    return report


# The keys


def test_registries_stand_there_by_their_size(view):
    assert ["v-gamma", "v-beta", "v-alpha"] == rows(view)


def test_s_sorts_by_the_next_column_and_r_turns_it_round(view):
    orders = []
    for _ in range(6):
        view.press("s")
        mark = re.search(r"(\w+) [▼▲]", "\n".join(drawn(view)))
        orders.append((mark[1], rows(view)))

    assert ["bytes", "hits", "evicted", "leased", "registry", "entries"] == [name for name, _ in orders]
    assert ["v-beta", "v-gamma", "v-alpha"] == orders[1][1]
    assert "v-alpha" == orders[2][1][0]
    assert ["v-alpha", "v-beta", "v-gamma"] == orders[4][1]
    assert ["v-gamma", "v-beta", "v-alpha"] == orders[5][1]

    view.press("r")
    assert ["v-alpha", "v-beta", "v-gamma"] == rows(view)
    view.press("S")
    assert "registry ▲" in "\n".join(drawn(view))


def test_a_filter_shows_what_has_that_in_its_name(view):
    for key in "/V-Bx":
        view.press(key)
    assert ["none of that name"] == rows(view)
    view.press("\x7f")
    assert ["v-beta"] == rows(view)
    assert drawn(view)[-1].startswith("/V-B▏")

    view.press("\r")
    assert ["v-beta"] == rows(view)
    assert "only /V-B" in drawn(view)[-1]
    view.press("\x1b")
    assert 3 == len(rows(view))
    for key in ("/", "x", "\x1b"):
        view.press(key)
    assert 3 == len(rows(view))


def test_in_a_filter_every_key_is_a_letter(view):
    for key in "/qstr":
        view.press(key)

    assert not view.over
    assert ["none of that name"] == rows(view)


def test_q_ends_it(view):
    view.press("q")

    assert view.over


def test_a_key_that_means_nothing_does_nothing(view):
    before = drawn(view)
    for key in ("z", "\x1b[5~", "\r", "€"):
        view.press(key)

    assert before == drawn(view)
    assert not view.over


def test_the_chosen_registry_is_trimmed_after_a_question(view):
    view.press(DOWN)
    view.press("t")
    assert "Trim v-beta to half of its 20 entries? y/N" == drawn(view)[-1]
    assert view.wanted is None
    view.press("y")

    number = dict(zip((one.name for one in view._frame.report.registries), view._frame.numbers, strict=True))["v-beta"]
    assert (number, "v-beta") == view.wanted


@pytest.mark.parametrize("key", ["n", "\r", "\x1b", "q", " "])
def test_any_other_answer_than_yes_is_no(view, key):
    view.press("t")
    view.press(key)

    assert view.wanted is None
    assert not view.over
    assert "nothing was trimmed" == drawn(view)[-1]


def test_a_yes_is_for_the_registry_that_was_asked_about(view):
    """Whatever the process holds by then."""
    view.press("t")
    view.show(only(view._frame, view.held[:2]))
    view.press("y")

    assert view.wanted is None
    assert "nothing was trimmed" == drawn(view)[-1]


def test_where_nobody_may_trim_nothing_is_asked(view):
    view.show(msgspec.structs.replace(view._frame, may_trim=False))
    assert "t trim" not in drawn(view, width=120)[-1]
    view.press("t")

    assert "this process lets nobody trim: it would have to call expose(trim=True)" == drawn(view)[-1]


def test_the_arrows_choose_and_stay_on_what_they_have_chosen(view):
    for key in (UP, DOWN, "j", DOWN, "k"):
        view.press(key)
    view.press("r")
    view.press("t")

    assert drawn(view)[-1].startswith("Trim v-beta ")


# The picture


def test_a_picture_fits_into_its_terminal(view):
    """However small it is, and with more registries than lines."""
    many = [Registry(name=f"many {number}") for number in range(100)]
    with expose() as exposure, Pool(io.BytesIO, name="picture pool") as pool, pool.acquire():
        monitor = MemoryMonitor("1TiB", timer=ManualClock())
        monitor.check()
        found = frame(exposure.path)
    mine = tuple(one for one in found.report.pools if one.name == "picture pool")
    object.__setattr__(found.report, "pools", mine)
    view.show(found)
    for width, height in ((80, 24), (120, 50), (60, 20), (40, 9)):
        lines = drawn(view, width, height)

        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)
        assert lines[-1].startswith("q quit   s sort")
        assert (height > 9) == any(line.startswith("picture p") for line in lines)
    assert 100 == len(many)


def test_the_chosen_one_is_in_the_picture(view):
    many = [Registry(name=f"many {number:03}") for number in range(100)]
    with expose() as exposure:
        view.show(frame(exposure.path))
    for key in "/many\r":
        view.press(key)
    view.press("S")
    for _ in range(60):
        view.press(DOWN)

    assert "many 060" in rows(view)
    assert "many 000" not in rows(view)
    assert 100 == len(many)


def test_names_cannot_speak_to_the_terminal(view):
    evil = Registry(name="evil \x1b]0;title\x07 \x9b2J name")
    with expose() as exposure:
        view.show(only(frame(exposure.path), [evil]))

    (line,) = [line for line in drawn(view) if line.startswith("evil")]
    assert line.startswith(r"evil \x1b]0;title\x07 \x9b2J na")


def test_a_wide_terminal_shows_how_fast_entries_leave(view):
    (alpha, *_) = view.held
    found = view._frame
    with expose() as exposure:
        alpha.update((key, key) for key in range(100, 150))
        later = only(frame(exposure.path), [alpha])
    object.__setattr__(later.report, "at", found.report.at + 10)
    number = dict(zip((one.name for one in found.report.registries), found.numbers, strict=True))["v-alpha"]
    view.show(msgspec.structs.replace(later, numbers=(number,)))

    (line,) = [line for line in drawn(view, width=120) if line.startswith("v-alpha")]
    assert ["v-alpha", "5", "5", "-", "-", "55", "5.0", "-", "-"] == line.split()


@pytest.mark.slow
def test_stores_are_shown_with_what_waits_to_be_saved(view, tmp_path):
    with (
        SQLiteStore(tmp_path / "bare.db"),
        SQLiteStore(tmp_path / "chats.db") as store,
        WriteBehind(store, name="saver") as writer,
        expose() as exposure,
    ):
        writer.put("a", 1)
        writer.flush()
        view.show(frame(exposure.path))

    lines = drawn(view, width=200, height=None)
    (saved,) = [line.split() for line in lines if f"{tmp_path.name}/chats.db" in line]
    (bare,) = [line.split() for line in lines if f"{tmp_path.name}/bare.db" in line]
    assert ["saver", "0", "1", "0", "0", "open"] == saved[1:]
    assert ["-", "-", "-", "-", "-", "open"] == bare[1:]


def test_a_limit_that_is_near_is_shown(view):
    monitor = MemoryMonitor("1MiB", timer=ManualClock(), share=0, name="near")
    monitor.check()
    with expose() as exposure:
        found = frame(exposure.path)
    mine = tuple(one for one in found.report.monitors if one.name == "near")
    object.__setattr__(found.report, "monitors", mine)
    view.show(found)

    assert re.search(r"critical [\d,]+% of 1\.0 MiB, growth steady", drawn(view, width=120)[1])


def test_what_was_left_out_is_said(view):
    object.__setattr__(view._frame.report, "problems", ("registry 'odd': TypeError",))
    view.show(msgspec.structs.replace(view._frame, unseen=1_200))

    (line,) = [line for line in drawn(view, width=140) if line.startswith("sessions ")]
    assert "   1,200 smaller registries left out   1 could not be looked at" in line


def test_a_view_of_nothing_yet_takes_keys():
    view = View()
    for key in (DOWN, "t", "s", "y"):
        view.press(key)

    assert ["waiting for the process"] == drawn(view)
    assert view.wanted is None


def test_a_registry_that_is_gone_is_not_trimmed():
    view = View()
    with expose(trim=True) as exposure:
        view.wanted = 999_999, "gone chats"
        _trim(view, exposure.path)

    assert "gone chats was not trimmed: there is no such registry any more" == view.message
    assert view.wanted is None


def test_memory_is_drawn_as_bars():
    assert "" == sparkline([])
    assert "▁▁▁" == sparkline([5, 5, 5])
    assert "▁▄█▁" == sparkline([0, 40, 100, 0])
    assert "▁▁▁▅█" == sparkline([1000, 1001, 1000, 1030, 1050])


def test_a_little_noise_does_not_look_like_a_mountain():
    assert "▁▁▁▃" == sparkline([100_000, 100_001, 100_000, 100_500])


# The command


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_once_prints_one_picture(width):
    with program() as (process, path):
        by_number, by_path = top(process.pid, "--once", COLUMNS=str(width)), top(path, COLUMNS=str(width))

    assert [(0, ""), (0, "")] == [(done.returncode, done.stderr) for done in (by_number, by_path)]
    lines = by_number.stdout.splitlines()
    assert lines[0].startswith(f"python  process {process.pid}, Python 3.")
    assert lines[1].startswith("memory ")
    assert max(map(len, lines)) <= width
    assert ["gamma", "beta", "alpha"] == [line.split()[0] for line in lines[4:7]]
    assert ["alpha", "10", "100", "-", "0.0%", "-"] == lines[6].split()[:6]
    assert ["db", "1/2", "0", "0", "0", "0", "-"] == lines[9].split()
    assert "q quit" not in by_number.stdout
    assert by_number.stdout.splitlines()[3:] == by_path.stdout.splitlines()[3:]


@pytest.mark.slow
def test_without_a_process_those_that_can_be_seen_are_listed():
    assert "No process of yours can be seen: one has to call hygiene.expose().\n" == top().stdout
    with program() as (first, one), program() as (second, two):
        listed = top(COLUMNS="40")

    assert (0, "") == (listed.returncode, listed.stderr)
    head, *lines = [line.split() for line in listed.stdout.splitlines()]
    assert ["process", "program", "memory", "registries", "pools", "socket"] == head
    assert {(str(first.pid), one), (str(second.pid), two)} == {(line[0], line[-1]) for line in lines}
    assert {("python", "3", "1")} == {(line[1], line[4], line[5]) for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["999999999"], "wanted process 999999999, found that it cannot be seen. It has to call hygiene.expose()"),
        (["/no/such.sock"], "wanted a process that is exposed at '/no/such.sock', found: No such file or directory"),
        (["1", "--every", "soon"], '--every must be positive: seconds, a timedelta, or text such as "90s"'),
    ],
)
def test_what_cannot_be_seen_is_told_in_a_sentence(arguments, said):
    done = top(*arguments)

    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith(f"hygiene: {said}")
    assert 1 == done.stderr.count("\n")


@pytest.mark.slow
def test_in_a_terminal_the_keys_do_what_they_say():
    with program("trim") as (process, path), Terminal(path, "--every", "50ms") as terminal:
        assert terminal.sees("gamma +30 ")
        assert terminal.sees("t trim")
        terminal.press("/beta\r")
        assert terminal.sees("only /beta")
        terminal.press("t")
        assert terminal.sees(r"Trim beta to half of its 20 entries\? y/N")
        assert [10, 20, 30] == sizes(process)
        terminal.press("y")
        assert terminal.sees("10 entries have left beta")
        assert [10, 10, 30] == sizes(process)
        terminal.press("\x1b")
        assert terminal.sees("alpha +10 ")
        terminal.press("s")
        assert terminal.sees("bytes ▼")
        terminal.press("q")

        assert 0 == terminal.code()
        assert terminal.before == termios.tcgetattr(terminal.other)
        assert "\x1b[?1049l" in terminal.written


@pytest.mark.slow
def test_ctrl_c_is_another_way_out():
    with program() as (_, path), Terminal(path) as terminal:
        assert terminal.sees("q quit")
        terminal.process.send_signal(signal.SIGINT)

        assert 0 == terminal.code()
        assert terminal.before == termios.tcgetattr(terminal.other)
        assert "Traceback" not in terminal.written


@pytest.mark.slow
def test_it_ends_with_the_process_that_it_watches():
    with contextlib.ExitStack() as stack:
        process, path = stack.enter_context(program())
        terminal = stack.enter_context(Terminal(path, "--every", "50ms"))
        assert terminal.sees("q quit")
        process.stdin.close()
        process.stdin = None

        assert terminal.sees(f"hygiene: process {process.pid} has ended, or is exposed no more")
        assert 0 == terminal.code()


@pytest.mark.slow
def test_a_process_that_stands_still_is_waited_for():
    with program() as (process, path), Terminal(path, "--every", "50ms") as terminal:
        assert terminal.sees("q quit")
        process.send_signal(signal.SIGSTOP)
        try:
            terminal.written = ""
            assert terminal.sees("no answer: ")
        finally:
            process.send_signal(signal.SIGCONT)
        terminal.written = ""
        assert terminal.sees("q quit")
        terminal.press("q")

        assert 0 == terminal.code()


@pytest.mark.slow
def test_in_the_list_a_process_of_another_kind_is_told_as_such(home):
    (home / "hygiene").mkdir(0o700)
    path = str(home / "hygiene" / "odd-1.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve():
            for _ in range(2):  # the first one looks whether anybody is there
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1000)
                    connection.sendall(b"\0\0\0\x02{}")

        thread = threading.Thread(target=serve)
        thread.start()
        listed = top()
        thread.join(PATIENCE)

    assert (0, "") == (listed.returncode, listed.stderr)
    assert f"{path}: what came back is no answer of this version of hygiene" in listed.stdout


@pytest.mark.slow
def test_a_window_that_changes_its_size_gets_another_picture():
    with program() as (_, path), Terminal(path, "--every", "50ms") as terminal:
        assert terminal.sees("q quit")
        assert "a second" not in terminal.written
        fcntl.ioctl(terminal.other, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))

        assert terminal.sees("a second")
        terminal.press("q")
        assert 0 == terminal.code()
