"""`expose()` shows a process to its owner, and to nobody else."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hygiene import Registry, expose, exposing, managed_session, shutdown
from hygiene.exposing import Frame, Request, Trimmed, ask, exposed

pytestmark = pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="the system does not say who connects")

PATIENCE = 30.0
NOBODY = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(autouse=True)
def home(monkeypatch):
    """A folder of one's own for sockets, with a path that is short enough for them."""
    with tempfile.TemporaryDirectory(prefix="hy") as place:
        monkeypatch.setenv("XDG_RUNTIME_DIR", place)
        yield Path(place)


def connect(path):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    connection.connect(str(path))
    return connection


def hung_up(connection):
    """Whether the other side has hung up, without a word."""
    with connection, contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def message(content):
    return struct.pack("!I", len(content)) + content


def frame(path):
    found = ask(str(path), Request("frame"), PATIENCE)
    assert isinstance(found, Frame)
    return found


def number_of(found, name):
    return next(number for one, number in zip(found.report.registries, found.numbers, strict=True) if one.name == name)


def start(source, *arguments, **options):
    """A Python process of its own, which says where it is exposed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "error"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
    return process, process.stdout.readline().strip()


def end(process):
    """Its exit code, once it has been told to go."""
    process.communicate(timeout=PATIENCE)
    return process.returncode


SERVER = """
    import sys
    from hygiene import expose
    print(expose(*sys.argv[1:]).path, flush=True)
    sys.stdin.read()
"""


def test_a_process_that_is_exposed_can_be_seen(home):
    registry = Registry(maxsize=3, name="exposed chats")
    registry["ada"] = 1
    with expose() as exposure, managed_session(name="exposed session"):
        found = frame(exposure.path)
        assert [exposure.path] == exposed()

    (told,) = [one for one in found.report.registries if one.name == "exposed chats"]
    assert (os.getpid(), 1, False) == (found.report.pid, told.stats.entries, found.may_trim)
    assert "exposed session" in {one.name for one in found.report.sessions}
    assert len(found.numbers) == len(set(found.numbers)) == len(found.report.registries)
    assert [] == exposed()
    assert not Path(exposure.path).exists()


def test_the_socket_is_for_its_owner_alone(home):
    old = os.umask(0)
    try:
        with expose() as exposure:
            path = Path(exposure.path)
            modes = [stat.S_IMODE(one.lstat().st_mode) for one in (path, path.parent)]
    finally:
        os.umask(old)

    assert [0o600, 0o700] == modes
    assert home / "hygiene" == path.parent


def test_without_a_runtime_folder_it_is_in_the_temporary_one(home, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(home))

    with expose() as exposure:
        assert [exposure.path] == exposed()
        assert home / f"hygiene-{os.geteuid()}" == Path(exposure.path).parent


def test_no_key_is_told():
    registry = Registry(name="private chats")
    registry["a name of somebody"] = 1
    with expose() as exposure, registry.lease("a name of somebody"), connect(exposure.path) as connection:
        connection.sendall(message(b'{"do":"frame"}'))
        (length,) = struct.unpack("!I", connection.recv(4))
        text = b""
        while len(text) < length:
            text += connection.recv(length)

    assert b"private chats" in text
    assert b"a name of somebody" not in text


def test_it_costs_a_thread_that_ends_with_it():
    before = set(threading.enumerate())
    exposure = expose()
    (thread,) = [thread for thread in threading.enumerate() if thread not in before]
    assert (True, "hygiene-expose") == (thread.daemon, thread.name)
    assert not exposure.closed

    exposure.close()
    exposure.close()

    assert (True, False) == (exposure.closed, thread.is_alive())
    assert f"<Exposure {exposure.path}: closed>" == repr(exposure)


def test_the_shutdown_ends_it():
    exposure = expose()

    assert f"exposed at {exposure.path}" in shutdown().finished
    assert exposure.closed
    assert not Path(exposure.path).exists()


def test_one_that_nobody_holds_goes_on():
    path = expose().path
    try:
        assert os.getpid() == frame(path).report.pid
    finally:
        shutdown()


@pytest.mark.slow
def test_a_process_that_ends_takes_its_file_along(home):
    process, path = start(SERVER)
    assert process.pid == frame(path).report.pid
    assert [path] == exposed()

    assert 0 == end(process)
    assert not Path(path).exists()


def test_one_connection_may_ask_many_times():
    with expose() as exposure, connect(exposure.path) as connection:
        for _ in range(3):
            connection.sendall(message(b'{"do":"frame"}'))
            (length,) = struct.unpack("!I", connection.recv(4))
            left = length
            while left:
                left -= len(connection.recv(left))


# Trimming


def test_a_registry_is_trimmed_where_the_process_allows_it():
    registry = Registry(maxsize=10, name="trimmed chats")
    registry.update((number, number) for number in range(10))
    with expose(trim=True) as exposure:
        found = frame(exposure.path)
        done = ask(exposure.path, Request("trim", number_of(found, "trimmed chats"), "50%"))

    assert found.may_trim
    assert Trimmed(5) == done
    assert [5, 6, 7, 8, 9] == list(registry)


def test_nothing_is_trimmed_where_it_does_not():
    registry = Registry(name="kept chats")
    registry["a"] = 1
    with expose() as exposure:
        number = number_of(frame(exposure.path), "kept chats")
        with pytest.raises(ValueError, match=r"expose\(trim=True\) would"):
            ask(exposure.path, Request("trim", number, 0))

    assert {"a": 1} == registry


@pytest.mark.parametrize("to", ["lots", -1, None])
def test_a_target_that_makes_no_sense_is_refused(to):
    registry = Registry(name="odd chats")
    registry["a"] = 1
    with expose(trim=True) as exposure:
        number = number_of(frame(exposure.path), "odd chats")
        with pytest.raises(ValueError, match="takes a number of entries"):
            ask(exposure.path, Request("trim", number, to))

    assert {"a": 1} == registry


def test_a_number_is_never_anothers():
    """Memory is used anew: what was chosen and is gone must not be mistaken for what lies there now."""
    with expose(trim=True) as exposure:
        numbers = set()
        for _ in range(5):
            registry = Registry(name="passing chats")
            numbers.add(number_of(frame(exposure.path), "passing chats"))
            del registry
        with pytest.raises(ValueError, match="no such registry any more"):
            ask(exposure.path, Request("trim", max(numbers), 0))

    assert 5 == len(numbers)


def test_a_hook_that_hangs_while_trimming_stops_nobody_else():
    entered, gate = threading.Event(), threading.Event()

    def hook(_):
        entered.set()
        gate.wait(PATIENCE)

    registry = Registry(maxsize=5, on_evict=hook, name="slow chats")
    registry["a"] = 1
    answers = []
    with expose(trim=True) as exposure:
        number = number_of(frame(exposure.path), "slow chats")
        asking = threading.Thread(
            target=lambda: answers.append(ask(exposure.path, Request("trim", number, 0), PATIENCE))
        )
        asking.start()
        assert entered.wait(PATIENCE)

        assert os.getpid() == frame(exposure.path).report.pid
        with pytest.raises(ValueError, match="being trimmed already"):
            ask(exposure.path, Request("trim", number, 0))
        gate.set()
        asking.join(PATIENCE)

    assert [Trimmed(1)] == answers


def test_who_hangs_up_or_asks_again_while_trimming_gets_no_answer_and_it_is_done():
    entered, gate, left = threading.Event(), threading.Event(), threading.Event()

    def hook(_):
        entered.set()
        gate.wait(PATIENCE)
        left.set()

    registry = Registry(maxsize=5, on_evict=hook, name="slow chats")
    registry["a"] = 1
    with expose(trim=True) as exposure:
        number = number_of(frame(exposure.path), "slow chats")
        connection = connect(exposure.path)
        connection.sendall(message(b'{"do":"trim","registry":%d,"to":0}' % number))
        assert entered.wait(PATIENCE)
        connection.sendall(message(b'{"do":"frame"}'))

        assert hung_up(connection)
        gate.set()
        assert left.wait(PATIENCE)
        assert os.getpid() == frame(exposure.path).report.pid


def test_an_error_while_trimming_is_told_without_its_words(caplog):
    """It may name a key; the log of the process has it."""

    class Own(Registry):
        def trim(self, to):
            raise LookupError("a name of somebody")

    registry = Own(name="failing chats")
    with expose(trim=True) as exposure:
        number = number_of(frame(exposure.path), "failing chats")
        with pytest.raises(ValueError, match=r"^it failed; the log of the process says why$"):
            ask(exposure.path, Request("trim", number, 0))
        limit = time.monotonic() + PATIENCE
        while not caplog.records and time.monotonic() < limit:
            time.sleep(0)

    assert registry == {}
    assert "a name of somebody" in caplog.text


# Peers that mean no good, or do not know what they do


@pytest.fixture
def hasty(monkeypatch):
    """Nobody is waited for, in tests that want to see the end of it."""
    monkeypatch.setattr(exposing, "PATIENCE", 0.2)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 1000,
        message(b"not JSON"),
        message(b"\xff\xfe"),
        message(b"[" * 65_000),
        message(b"{}"),
        message(b'{"do":"harm"}'),
        message(b'{"do":"frame","registry":"one"}'),
        message(b'{"do":"frame"}') * 2,
        message(b""),
    ],
)
def test_a_peer_that_sends_rubbish_is_dropped(rubbish):
    with expose(trim=True) as exposure:
        connection = connect(exposure.path)
        connection.sendall(rubbish)

        assert hung_up(connection)
        assert os.getpid() == frame(exposure.path).report.pid


def test_a_peer_that_sends_100_megabytes_is_dropped_before_they_are_taken():
    with expose() as exposure:
        connection = connect(exposure.path)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(message(b"x" * 100_000_000))
        connection.close()

        assert os.getpid() == frame(exposure.path).report.pid


def test_a_peer_that_sends_nothing_is_dropped(hasty):
    with expose() as exposure:
        assert hung_up(connect(exposure.path))
        assert os.getpid() == frame(exposure.path).report.pid


def test_a_peer_whose_request_trickles_in_is_dropped():
    """What counts is the time for the whole of it, not since the last byte."""
    with expose() as exposure, pytest.MonkeyPatch.context() as patch:
        patch.setattr(exposing, "PATIENCE", 0.5)
        connection = connect(exposure.path)
        connection.settimeout(0.01)
        over = False
        limit = time.monotonic() + PATIENCE
        connection.sendall(struct.pack("!I", 60_000))
        while not over and time.monotonic() < limit:
            try:
                connection.send(b"x")
                over = connection.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                over = True
        connection.close()

    assert over


def test_a_peer_that_does_not_take_its_answer_is_dropped(hasty):
    registries = [Registry(name=f"{'long name' * 100} {number}") for number in range(500)]
    with expose() as exposure:
        connection = connect(exposure.path)
        connection.sendall(message(b'{"do":"frame"}'))
        peers = exposure._peers
        limit = time.monotonic() + PATIENCE
        while not peers and time.monotonic() < limit:
            time.sleep(0)
        while peers and time.monotonic() < limit:
            time.sleep(0)

        assert {} == peers
        connection.close()
    assert 500 == len(registries)


def test_many_silent_peers_keep_nobody_out_for_long(hasty):
    with expose() as exposure:
        silent = [connect(exposure.path) for _ in range(40)]
        assert all(hung_up(connection) for connection in silent)

        assert os.getpid() == frame(exposure.path).report.pid


@pytest.mark.slow
def test_it_goes_on_when_no_descriptor_was_free():
    source = """
        import os, resource, sys
        from hygiene import expose
        exposure = expose()
        used = len(os.listdir("/proc/self/fd"))
        print(exposure.path, flush=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        print("none", flush=True)
        sys.stdin.readline()
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        sys.stdin.read()
        times = os.times()
        assert times.user + times.system < 20, times
    """
    process, path = start(source)
    assert "none\n" == process.stdout.readline()
    connection = connect(path)
    process.stdin.write("\n")
    process.stdin.flush()

    connection.sendall(message(b'{"do":"frame"}'))
    assert 4 == len(connection.recv(4))
    connection.close()
    assert 0 == end(process)


def open_to_all(path):
    """What a mistake, or a wrong umask, may do to the modes."""
    for place in (Path(path).parent.parent, Path(path).parent):
        place.chmod(0o777)
    Path(path).chmod(0o777)


@as_root
def test_another_user_is_dropped_even_where_the_modes_let_it_in():
    source = """
        import os, socket, sys
        os.setgid(65534), os.setuid(65534)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(sys.argv[1])
        print("connected", flush=True)
        sys.stdin.readline()
        try:
            connection.sendall(b'\\0\\0\\0\\x0e{"do":"frame"}')
            got = connection.recv(100)
        except OSError:
            got = b""
        print(got)
    """
    with expose(trim=True) as exposure:
        open_to_all(exposure.path)
        process, said = start(source, exposure.path)
        assert "connected" == said
        out, _ = process.communicate("\n", timeout=PATIENCE)

        assert "b''\n" == out
        assert os.getpid() == frame(exposure.path).report.pid


@as_root
def test_another_user_cannot_even_connect():
    source = """
        import os, socket, sys
        os.setgid(65534), os.setuid(65534)
        try:
            socket.socket(socket.AF_UNIX).connect(sys.argv[1])
        except PermissionError:
            print("refused")
    """
    with expose() as exposure:
        process, said = start(source, exposure.path)
        assert 0 == end(process)

    assert "refused" == said


@as_root
def test_the_answer_of_another_user_is_not_taken(home):
    """Somebody else may have put a socket where one looks."""
    source = """
        import os, socket, sys
        os.setgid(65534), os.setuid(65534)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(sys.argv[1])
        listener.listen()
        print("listening", flush=True)
        sys.stdin.read()
    """
    home.chmod(0o777)
    process, said = start(source, home / "trap.sock")
    assert "listening" == said

    with pytest.raises(PermissionError, match=r"wanted a process of user 0; found one of user 65534"):
        ask(str(home / "trap.sock"), Request("frame"))
    assert 0 == end(process)


@as_root
def test_a_folder_that_somebody_else_has_made_is_refused(home):
    (home / "hygiene").mkdir(0o700)
    os.chown(home / "hygiene", NOBODY, NOBODY)

    with pytest.raises(PermissionError, match=r"of user 65534\. Remove it, or give"):
        expose()
    assert [] == exposed()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_can_enter_is_refused(home, mode):
    (home / "hygiene").mkdir()
    (home / "hygiene").chmod(mode)

    with pytest.raises(PermissionError, match=f"that nobody else can enter; found mode {mode:o} of user"):
        expose()


def test_a_link_in_the_place_of_the_folder_is_refused(home):
    (home / "elsewhere").mkdir(0o700)
    (home / "hygiene").symlink_to(home / "elsewhere")

    with pytest.raises(PermissionError):
        expose()


def test_what_answers_nonsense_is_told_so(home):
    path = str(home / "odd.sock")
    answers = iter(
        [message(b"rubbish"), message(b'{"report":1}'), struct.pack("!I", 2**31), b"", struct.pack("!I", 10) + b"x"]
    )
    errors = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve():
            for answer in answers:
                connection, _ = listener.accept()
                connection.recv(1000)
                connection.sendall(answer)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(5):
            with pytest.raises((ValueError, ConnectionError)) as caught:
                ask(path, Request("frame"))
            errors.append(type(caught.value))
        thread.join(PATIENCE)

    assert [ValueError, ValueError, ValueError, ConnectionResetError, ConnectionResetError] == errors


def test_what_does_not_answer_is_not_waited_for(home):
    path = str(home / "mute.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        with pytest.raises(TimeoutError):
            ask(path, Request("frame"), 0.05)


# Files


@pytest.mark.slow
def test_the_file_of_a_killed_process_is_replaced(home):
    place = home / "own.sock"
    process, path = start(SERVER, place)
    assert str(place) == path
    process.send_signal(signal.SIGKILL)
    end(process)
    assert place.is_socket()
    with pytest.raises(ConnectionRefusedError):
        frame(place)

    with expose(place) as exposure:
        assert os.getpid() == frame(exposure.path).report.pid
    assert not place.exists()


@pytest.mark.slow
def test_the_files_of_killed_processes_are_removed_by_the_next_one(home):
    killed = [start(SERVER) for _ in range(2)]
    alive, kept = start(SERVER)
    for process, _ in killed:
        process.kill()
        end(process)

    with expose() as exposure:
        assert sorted([kept, exposure.path]) == sorted(str(path) for path in (home / "hygiene").iterdir())
    assert 0 == end(alive)


@pytest.mark.slow
def test_two_processes_of_one_name_get_different_files():
    """And so do two of one number, as two containers with one folder have them."""
    (first, one), (second, two) = start(SERVER), start(SERVER)
    assert one != two
    assert {first.pid, second.pid} == {frame(path).report.pid for path in (one, two)}
    end(first), end(second)

    with expose() as here, expose() as there:
        assert f"{here.path.removesuffix('.sock')}-2.sock" == there.path
        assert sorted([here.path, there.path]) == exposed()


@pytest.mark.slow
def test_a_path_at_which_another_process_answers_is_left_to_it(home):
    process, path = start(SERVER, home / "taken.sock")

    with pytest.raises(FileExistsError, match="found one where another process answers") as caught:
        expose(path)

    assert (errno.EADDRINUSE, path) == (caught.value.errno, caught.value.filename)
    assert process.pid == frame(path).report.pid
    assert 0 == end(process)


@pytest.mark.slow
def test_many_that_want_one_path_at_once_do_not_take_it_from_each_other(home):
    """The file of a dead one is there, and one of them takes its place."""
    process, path = start(SERVER, home / "wanted.sock")
    process.kill()
    end(process)
    source = """
        import sys
        from hygiene import expose
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            expose(sys.argv[1])
            print("mine", flush=True)
        except FileExistsError:
            print("taken", flush=True)
        sys.stdin.read()
    """
    started = [start(source, path)[0] for _ in range(4)]
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.stdout.readline().strip() for one in started]

    assert ["mine", "taken", "taken", "taken"] == sorted(said)
    assert started[said.index("mine")].pid == frame(path).report.pid
    for one in started:
        end(one)


def test_a_file_that_is_no_socket_is_left_alone(home):
    (home / "notes.txt").write_text("keep")

    with pytest.raises(FileExistsError, match="found a file that is none"):
        expose(home / "notes.txt")
    assert "keep" == (home / "notes.txt").read_text()


def test_a_file_that_somebody_has_put_there_since_is_left_alone(home):
    with expose(home / "own.sock"):
        (home / "own.sock").unlink()
        (home / "own.sock").write_text("another")

    assert "another" == (home / "own.sock").read_text()


def test_a_path_that_is_too_long_is_told_so(home):
    with pytest.raises(OSError, match="wanted a path of at most 100 bytes"):
        expose(home / ("x" * 200))


def test_odd_names_of_programs_make_good_names_of_files(home, monkeypatch):
    for name, expected in (
        ("/opt/my bot/run me.py", "run_me.py"),
        ("/srv/app/__main__.py", "app"),
        ("-c", "python"),
        ("", "python"),
        ("/x/" + "é" * 300, "_" * 32),
    ):
        monkeypatch.setattr(sys, "argv", [name])
        with expose() as exposure:
            assert f"{expected}-{os.getpid()}.sock" == Path(exposure.path).name


def test_a_failure_to_start_leaves_nothing_behind(home, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        expose()
    monkeypatch.undo()

    assert [] == list((home / "hygiene").iterdir())


# Forks


@pytest.mark.slow
def test_after_a_fork_the_child_lets_go_and_the_parent_goes_on(home):
    source = """
        import os, sys, warnings
        from hygiene import expose
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside a thread is what this is about
        exposure = expose()
        pid = os.fork()
        if not pid:
            sockets = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
                       and "socket:" in os.readlink(f"/proc/self/fd/{fd}")]
            exposure.close()
            code = 0 if exposure.closed and not sockets and os.path.exists(exposure.path) else 3
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(exposure.path, os.waitstatus_to_exitcode(status), flush=True)
        sys.stdin.read()
    """
    process, said = start(source)
    path, code = said.rsplit(" ", 1)

    assert "0" == code
    assert process.pid == frame(path).report.pid
    assert 0 == end(process)
    assert not Path(path).exists()


@pytest.mark.slow
def test_a_forked_child_can_be_exposed_by_itself(home):
    source = """
        import os, sys, warnings
        from hygiene import expose
        warnings.simplefilter("ignore", DeprecationWarning)
        exposure = expose()
        readable, writable = os.pipe()
        pid = os.fork()
        if not pid:
            print(exposure.path, expose().path, os.getpid(), flush=True)
            os.read(readable, 1)
            sys.exit(0)
        sys.stdin.read()
        os.write(writable, b"x")
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    process, said = start(source)
    parent, child, pid = said.split()

    assert (process.pid, int(pid)) == (frame(parent).report.pid, frame(child).report.pid)
    assert 0 == end(process)
    assert [] == list((home / "hygiene").iterdir())


def test_a_report_that_cannot_be_made_is_told_so_and_nothing_ends(monkeypatch):
    with expose() as exposure:
        with monkeypatch.context() as patch:
            patch.setattr(exposing, "_survey", None)
            with pytest.raises(ValueError, match=r"^no report could be made: TypeError$"):
                frame(exposure.path)

        assert os.getpid() == frame(exposure.path).report.pid


@pytest.mark.slow
def test_of_very_many_registries_the_largest_are_told():
    many = [Registry(name=f"many {number}") for number in range(1_200)]
    many[700].update((key, key) for key in range(5))
    with expose() as exposure:
        found = [frame(exposure.path) for _ in range(3)][-1]
        for one in many[:600]:
            one.update(a=1, b=2)
        later = frame(exposure.path)

    assert "many 700" in {one.name for one in found.report.registries}
    assert (500, 500) == (len(found.report.registries), len(later.report.registries))
    assert found.unseen >= 700
    assert number_of(found, "many 700") == number_of(later, "many 700")
