"""Signals end a process in order: `with` and `finally`, then the cleanups, and in any case within the deadline.

Each is a program of its own that gets a real signal once it has said that it is ready.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hygiene import cleanup
from hygiene.cleanup import SignalHandlers, install_signal_handlers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")

PATIENCE = 40.0
BOTH = pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda one: one.name)

START = """
import asyncio, signal, sys, threading, time
from contextlib import asynccontextmanager, contextmanager
from hygiene.cleanup import ashutdown, install_signal_handlers, register_cleanup, shutdown

def say(*what):
    print(*what, flush=True)

@contextmanager
def block(what="block"):
    try:
        yield
    finally:
        say(what, "left")

@asynccontextmanager
async def ablock(what="async block"):
    try:
        yield
    finally:
        await asyncio.sleep(0)
        say(what, "left")

async def aclean():
    await asyncio.sleep(0)
    say("async cleanup")

register_cleanup(say, "cleanup")
"""


def wait_until_asleep(process: subprocess.Popen[str]) -> None:
    """
    Wait until the main thread of *process* sleeps.

    A signal that comes right before a sleep is seen after it: Python looks for signals before the call and after it,
    and between the look and the call there is a gap.
    """
    state = Path(f"/proc/{process.pid}/stat")
    seen = 0
    while seen < 3 and process.poll() is None and state.exists():
        seen = seen + 1 if state.read_text().rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.001)


def program(code: str, signum: int, *, times: int = 1, preexec: Any = None) -> tuple[list[str], int]:
    """What *code* prints after it was sent *signum* at each line "ready", its log included, and its exit code."""
    with subprocess.Popen(
        [sys.executable, "-c", START + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=preexec,  # noqa: PLW1509 - sets a signal handler, and nothing else runs here
    ) as process:
        end = threading.Timer(PATIENCE, process.kill)
        end.start()
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if lines[-1] == "ready" and times:
                times -= 1
                wait_until_asleep(process)
                process.send_signal(signum)
        code_found = process.wait()
        end.cancel()
    return lines, code_found


def expected_code(signum: int) -> int:
    """What a shell sees: Python ends itself with SIGINT after a KeyboardInterrupt that nobody caught."""
    return -signal.SIGINT if signum == signal.SIGINT else 128 + signum


def without_traceback(lines: list[str]) -> list[str]:
    """What the program itself has printed."""
    other = re.compile(r"Traceback|\s|[\w.]+(Error|Interrupt|Exit)\b|During handling|The above exception|$")
    return [line for line in lines if not other.match(line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "wait"),
    [
        (signal.SIGINT, "time.sleep(60)"),
        (signal.SIGTERM, "time.sleep(60)"),
        (signal.SIGTERM, "lock = threading.Lock(); lock.acquire(); lock.acquire()"),
        (signal.SIGTERM, "threading.Event().wait()"),
    ],
    ids=["SIGINT-sleep", "SIGTERM-sleep", "lock", "event"],
)
def test_a_plain_program_leaves_its_blocks_first(signum: int, wait: str) -> None:
    lines, code = program(
        f"""
        install_signal_handlers()
        with block():
            say("ready")
            {wait}
        """,
        signum,
    )

    assert ["ready", "block left", "cleanup"] == without_traceback(lines)
    assert expected_code(signum) == code


@pytest.mark.slow
@BOTH
def test_a_program_with_worker_threads_waits_for_their_work(signum: int) -> None:
    """Python itself does so before the exit, and the cleanups come after it."""
    lines, code = program(
        """
        from concurrent.futures import ThreadPoolExecutor
        install_signal_handlers()
        go = threading.Event()
        def work():
            go.wait(30)
            say("work done")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work)
            try:
                say("ready")
                time.sleep(60)
            finally:
                go.set()
        """,
        signum,
    )

    assert ["ready", "work done", "cleanup"] == without_traceback(lines)
    assert expected_code(signum) == code


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_an_event_loop_ends_its_tasks_and_then_runs_asynchronous_cleanups(signum: int, where: str) -> None:
    """Installed before `asyncio.run` or in a coroutine: the cleanups are awaited on the loop that is still alive."""
    lines, code = program(
        f"""
        async def worker():
            async with ablock("worker"):
                await asyncio.Event().wait()
        async def main():
            {"install_signal_handlers()" if where == "inside" else ""}
            register_cleanup(aclean)
            task = asyncio.create_task(worker())
            async with ablock():
                await asyncio.sleep(0)
                say("ready")
                await asyncio.Event().wait()
        {"install_signal_handlers()" if where == "outside" else ""}
        asyncio.run(main())
        """,
        signum,
    )
    said = without_traceback(lines)

    assert ["async cleanup", "cleanup"] == said[3:]
    assert {"async block left", "worker left"} == set(said[1:3])
    assert expected_code(signum) == code


@pytest.mark.slow
def test_the_signal_reaches_a_loop_that_is_about_to_end() -> None:
    """The task that does the cleanups is cancelled before its first step, and does them nevertheless."""
    lines, code = program(
        """
        async def main():
            register_cleanup(aclean)
            signal.raise_signal(signal.SIGTERM)
        install_signal_handlers()
        asyncio.run(main())
        """,
        signal.SIGTERM,
    )

    assert ["async cleanup", "cleanup"] == lines
    assert 143 == code


@pytest.mark.slow
def test_a_program_that_cancels_its_own_tasks_is_not_waited_for() -> None:
    """Whoever cancels all tasks and waits for them waits for the cleanups, too; not the other way round."""
    lines, code = program(
        """
        async def main():
            register_cleanup(aclean)
            stop = asyncio.Event()
            signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(stop.set))
            loop = asyncio.get_running_loop()
            install_signal_handlers()
            asyncio.create_task(asyncio.sleep(1000))
            say("ready")
            await stop.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.wait(others)
            say("all ended")
        asyncio.run(main())
        """,
        signal.SIGTERM,
    )

    assert ["ready", "async cleanup", "cleanup", "all ended"] == lines
    assert 0 == code


@pytest.mark.slow
def test_a_handler_that_is_there_already_is_asked() -> None:
    """It stops the program in its own way; the cleanups follow at the exit."""
    lines, code = program(
        """
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda signum, frame: stop.set())
        handlers = install_signal_handlers()
        say("ready")
        stop.wait(60)
        say("stopped", handlers.stopping)
        """,
        signal.SIGTERM,
    )

    assert ["ready", "stopped True", "cleanup"] == lines
    assert 0 == code


@pytest.mark.slow
@BOTH
def test_a_handler_of_the_loop_works_beside_it(signum: int) -> None:
    """As a framework sets it with ``loop.add_signal_handler``, before."""
    lines, code = program(
        """
        async def main():
            stop = asyncio.Event()
            register_cleanup(aclean)
            for one in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(one, stop.set)
            install_signal_handlers()
            say("ready")
            await stop.wait()
            say("stopped")
        asyncio.run(main())
        """,
        signum,
    )

    assert ["ready", "stopped", "async cleanup", "cleanup"] == lines
    assert 0 == code


UVICORN = """
import socket, uvicorn
from starlette.applications import Starlette

@asynccontextmanager
async def lifespan(app):
    {inside}
    register_cleanup(aclean)
    asyncio.get_running_loop().call_later(0.05, say, "ready")
    async with ablock("lifespan"):
        yield

app = Starlette(lifespan=lifespan)
{before}
listening = socket.create_server(("127.0.0.1", 0))
config = uvicorn.Config(app, log_level="error")
uvicorn.run(app, fd=listening.detach(), log_level="error")
say("after run")
"""


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("where", ["before", "inside", "both"])
def test_uvicorn_stops_gracefully_and_then_the_cleanups_run(signum: int, where: str) -> None:
    """Installed before the server has set its own handlers, in the lifespan, or both."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    install = "install_signal_handlers()"
    lines, code = program(
        UVICORN.format(before=install if where != "inside" else "", inside=install if where != "before" else "pass"),
        signum,
    )
    said = without_traceback(lines)

    assert ["ready", "lifespan left", "async cleanup", "cleanup"] == [line for line in said if line != "after run"]
    assert code in {0, expected_code(signum)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "hang"),
    [
        (signal.SIGTERM, 'register_cleanup(time.sleep, 60, name="the hanging one"); say("ready"); time.sleep(60)'),
        (signal.SIGINT, "try: say('ready'); time.sleep(60)\nfinally: time.sleep(60)"),
        (signal.SIGTERM, "threading.Thread(target=time.sleep, args=(60,)).start(); say('ready'); time.sleep(60)"),
    ],
    ids=["cleanup", "finally", "thread"],
)
def test_a_hang_ends_at_the_deadline_and_keeps_no_cleanup_from_running(signum: int, hang: str) -> None:
    """A cleanup, a `finally`, a thread that Python waits for: the process ends, and says what was not done."""
    if "cleanup" in hang and sys.version_info[:2] == (3, 12):
        pytest.skip("3.12 starts no threads at the exit, so the deadline there is that of the process")
    lines, code = program("install_signal_handlers(timeout=0.8)\n" + hang, signum)
    out = "\n".join(lines)

    assert "cleanup" in lines
    if "the hanging one" in hang:
        assert re.search("unfinished: the hanging one: still running at the deadline|Not done: the hanging one", out)
    else:
        assert f"{signal.Signals(signum).name}, and the process has not ended within 0.8 s" in out
        assert 128 + signum == code


@pytest.mark.slow
def test_where_no_thread_can_start_the_process_still_ends() -> None:
    """Of a hang at the exit itself on Python 3.12."""
    lines, code = program(
        """
        import threading
        install_signal_handlers(timeout=0.5)
        register_cleanup(time.sleep, 60, name="the hanging one")
        real = threading.Thread.start
        def start(self):
            if threading.current_thread() is threading.main_thread():
                raise RuntimeError("can't create new thread at interpreter shutdown")
            real(self)
        threading.Thread.start = start
        say("ready")
        time.sleep(60)
        """,
        signal.SIGTERM,
    )
    out = "\n".join(lines)

    assert 143 == code
    assert "Not done: the hanging one, say." in out
    assert "in _attempt" in out


@pytest.mark.slow
def test_a_task_that_hangs_does_not_keep_the_asynchronous_cleanups_from_running() -> None:
    lines, code = program(
        """
        async def stubborn():
            while True:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    say("cancelled")
        async def main():
            register_cleanup(aclean)
            task = asyncio.create_task(stubborn())
            await asyncio.sleep(0)
            say("ready")
            await asyncio.Event().wait()
        install_signal_handlers(timeout=1)
        asyncio.run(main())
        """,
        signal.SIGTERM,
    )
    out = "\n".join(lines)

    assert ["ready", "cancelled", "async cleanup", "cleanup"] == lines[:4]
    assert "SIGTERM, and the process has not ended within 1 s. It is ended now. Not done: no cleanup." in out
    assert 143 == code


@pytest.mark.slow
def test_a_cleanup_that_raises_changes_nothing_for_the_others() -> None:
    lines, code = program(
        """
        def fail(): raise ArithmeticError("no broom")
        async def main():
            register_cleanup(aclean)
            register_cleanup(fail)
            say("ready")
            await asyncio.Event().wait()
        install_signal_handlers()
        asyncio.run(main())
        """,
        signal.SIGTERM,
    )

    assert "ArithmeticError: no broom" in lines
    assert {"async cleanup", "cleanup"} <= set(lines)
    assert 143 == code


@pytest.mark.slow
def test_a_second_ctrl_c_interrupts_at_once() -> None:
    lines, code = program(
        """
        install_signal_handlers()
        try:
            say("ready")
            time.sleep(60)
        finally:
            say("ready")
            time.sleep(60)
        """,
        signal.SIGINT,
        times=2,
    )

    assert ["ready", "ready", "cleanup"] == [line for line in lines if line in {"ready", "cleanup"}]
    assert -signal.SIGINT == code


@pytest.mark.slow
def test_a_second_sigterm_ends_the_process_at_once() -> None:
    lines, code = program(
        """
        install_signal_handlers()
        try:
            say("ready")
            time.sleep(60)
        finally:
            say("ready")
            time.sleep(60)
        """,
        signal.SIGTERM,
        times=2,
    )

    assert ["ready", "ready"] == lines
    assert -signal.SIGTERM == code


@pytest.mark.slow
@BOTH
def test_a_signal_during_the_exit_does_not_break_off_the_cleanups(signum: int) -> None:
    lines, code = program(
        """
        install_signal_handlers()
        def slow():
            say("ready")
            while not install_signal_handlers.__globals__["_handlers"].stopping:
                time.sleep(0.001)
        register_cleanup(slow)
        """,
        signum,
    )

    assert ["ready", "cleanup"] == lines
    assert 0 == code


@pytest.mark.slow
def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    """As with ``nohup``."""
    lines, code = program(
        """
        handlers = install_signal_handlers([signal.SIGHUP])
        say("ready")
        say(handlers)
        """,
        signal.SIGHUP,
        preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )

    assert ["ready", "<SignalHandlers none, timeout 10 s>", "cleanup"] == lines
    assert 0 == code


@pytest.mark.slow
def test_a_forked_child_stops_by_itself() -> None:
    """It has the handlers of its parent, and cleanups of its own only."""
    lines, code = program(
        """
        import os, warnings
        warnings.simplefilter("ignore")
        install_signal_handlers()
        child = os.fork()
        if not child:
            register_cleanup(say, "cleanup of the child")
            with block():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        say("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        signal.SIGTERM,
    )

    assert ["block left", "cleanup of the child", "child: 143", "cleanup"] == lines
    assert 0 == code


@pytest.mark.slow
def test_uninstalled_handlers_are_gone_and_a_stop_is_called_off() -> None:
    """The program goes on, as long as it likes."""
    lines, code = program(
        """
        handlers = install_signal_handlers(timeout=0.2)
        try:
            say("ready")
            time.sleep(60)
        except KeyboardInterrupt:
            handlers.uninstall()
            handlers.uninstall()
        time.sleep(1)  # longer than the process would have been left alive
        say(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        """,
        signal.SIGINT,
    )

    assert ["ready", "True", "cleanup"] == lines
    assert 0 == code


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The handlers of the test runner are put back."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    monkeypatch.setattr(cleanup, "_handlers", None)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.usefixtures("untouched")
def test_installing_twice_is_installing_once() -> None:
    """The same handle, with the further signals and the new time."""
    handlers = install_signal_handlers([signal.SIGUSR1])
    again = install_signal_handlers([signal.SIGUSR1, signal.SIGUSR2], timeout="5s")

    assert handlers is again
    assert (signal.SIGUSR1, signal.SIGUSR2) == handlers.signals
    assert "<SignalHandlers SIGUSR1, SIGUSR2, timeout 5 s>" == repr(handlers)
    handlers.uninstall()
    assert signal.SIG_DFL == signal.getsignal(signal.SIGUSR1)
    assert () == handlers.signals
    assert install_signal_handlers([signal.SIGUSR1]) is not handlers


@pytest.mark.usefixtures("untouched")
def test_a_handler_that_was_put_over_ours_is_left_alone() -> None:
    """And if it puts ours back afterwards, the signal is passed on to what was there before."""
    got: list[int] = []
    signal.signal(signal.SIGUSR1, lambda signum, frame: got.append(signum))
    handlers = install_signal_handlers([signal.SIGUSR1])
    ours = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    handlers.uninstall()

    assert signal.SIG_IGN == signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, ours)
    signal.raise_signal(signal.SIGUSR1)
    assert [signal.SIGUSR1] == got


@pytest.mark.usefixtures("untouched")
def test_what_cannot_be_handled_is_refused() -> None:
    """And nothing has been changed then."""
    before = signal.getsignal(signal.SIGTERM)
    for signals, message in (([signal.SIGTERM, signal.SIGKILL], "SIGKILL cannot be handled"), ([15, 4711], "4711")):
        with pytest.raises(ValueError, match=message):
            install_signal_handlers(signals)
    with pytest.raises(ValueError, match="timeout must be positive"):
        install_signal_handlers(timeout=0)

    assert before == signal.getsignal(signal.SIGTERM)
    assert cleanup._handlers is None


def test_only_the_main_thread_can() -> None:
    """It says so, and installs nothing."""
    raised: list[str] = []

    def elsewhere() -> None:
        for attempt in (install_signal_handlers, SignalHandlers().uninstall):
            try:
                attempt()
            except RuntimeError as error:
                raised.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(PATIENCE)

    assert 2 == len(raised)
    assert "install_signal_handlers() must be called in the main thread" in raised[0]
    assert cleanup._handlers is None
