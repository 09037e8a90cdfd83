"""The lifespan: what it opens and closes, in which order, and under a real uvicorn that is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hygiene.cleanup import register_cleanup
from hygiene.integrations import asgi
from hygiene.integrations.asgi import lifespan
from hygiene.session import AsyncSession, current_session

LIMIT = 40.0

Log = list[str]


class Resource:
    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log
        log.append(f"open {name}")

    async def aclose(self) -> None:
        self.log.append(f"close {self.name}")


def opening(name: str, log: Log) -> Callable[..., Any]:
    """An opener of one resource."""

    async def open_one(app: Any, session: AsyncSession) -> dict[str, Resource]:
        return {name: await session.open(Resource, name, log)}

    return open_one


# Opening and closing.


async def test_what_is_opened_in_order_is_closed_in_reverse() -> None:
    log: Log = []
    async with lifespan(opening("db", log), opening("cache", log))("app") as state:
        assert ["db", "cache"] == list(state)
        assert ["open db", "open cache"] == log

    assert ["close cache", "close db"] == log[2:]


async def test_cleanups_run_after_the_session_is_closed() -> None:
    """What is registered with `register_cleanup` may still be needed by what the session holds."""
    log: Log = []
    register_cleanup(log.append, "cleanup")

    async def async_cleanup() -> None:
        log.append("async cleanup")

    register_cleanup(async_cleanup)
    async with lifespan(opening("db", log))("app"):
        pass

    assert ["open db", "close db", "async cleanup", "cleanup"] == log


async def test_openers_get_what_they_have_parameters_for() -> None:
    got: dict[str, Any] = {}

    def nothing() -> None:
        got["nothing"] = ()

    def only_app(application: Any) -> None:
        got["app"] = application

    async def only_session(session: AsyncSession) -> None:
        got["session"] = session

    def both(app: Any, session: AsyncSession, *, more: int = 3) -> None:
        got["both"] = (app, session, current_session())

    async with lifespan(nothing, only_app, only_session, both)("app") as state:
        assert state is None
        session = got["session"]
        assert isinstance(session, AsyncSession)
        assert {"nothing": (), "app": "app", "session": session, "both": ("app", session, session)} == got
    assert session.closed


async def test_an_existing_lifespan_can_be_one_of_the_openers() -> None:
    """A function decorated with `asynccontextmanager` is entered, and what it yields is state."""
    log: Log = []

    @contextlib.asynccontextmanager
    async def theirs(app: Any) -> AsyncIterator[dict[str, Any]]:
        log.append(f"begin {app}")
        yield {"theirs": 1}
        log.append("end")

    async with lifespan(opening("db", log), theirs)("app") as state:
        assert 1 == state["theirs"]

    assert ["open db", "begin app", "end", "close db"] == log


async def test_it_decorates_one_function() -> None:
    log: Log = []

    @lifespan
    async def life(app: Any, session: AsyncSession) -> None:
        """Opens the database."""
        await session.open(Resource, "db", log)

    async with life("app"):
        pass

    assert ["open db", "close db"] == log
    assert ("life", "Opens the database.") == (life.__name__, life.__doc__)  # type: ignore[attr-defined]
    assert repr(life).endswith("life)")


async def test_each_start_is_a_new_session() -> None:
    log: Log = []
    life = lifespan(opening("db", log))
    async with life("one"), life("two"):
        assert ["open db", "open db"] == log
    async with life("three"):
        pass

    assert ["open db", "open db", "close db", "close db", "open db", "close db"] == log


# What goes wrong.


async def test_an_opener_that_raises_closes_what_was_opened() -> None:
    """The error is its own; cleanups run, too."""
    log: Log = []
    register_cleanup(log.append, "cleanup")

    async def fail() -> None:
        raise ConnectionError("no cache")

    with pytest.raises(ConnectionError, match="no cache"):
        async with lifespan(opening("db", log), fail, opening("never", log))("app"):
            log.append("never")

    assert ["open db", "close db", "cleanup"] == log


async def test_an_opener_that_is_cancelled_closes_what_was_opened() -> None:
    log: Log = []
    inside = asyncio.Event()

    async def hang() -> None:
        inside.set()
        await asyncio.Event().wait()

    async def start() -> None:
        async with lifespan(opening("db", log), hang)("app"):
            log.append("never")

    task = asyncio.create_task(start())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ["open db", "close db"] == log


async def test_releases_that_fail_come_as_one_group_and_the_rest_runs() -> None:
    log: Log = []
    register_cleanup(log.append, "cleanup")

    def fail(session: AsyncSession) -> None:
        session.callback(int, "no number")

    with pytest.raises(ExceptionGroup, match="1 of 2 releases of session 'lifespan' failed"):
        async with lifespan(opening("db", log), fail)("app"):
            pass

    assert ["open db", "close db", "cleanup"] == log


async def test_a_release_that_hangs_is_named_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that come after the deadline, as far as they need no waiting."""
    monkeypatch.setattr(asgi, "_RESERVE", 0.98)  # what hangs is given up soon, and the cleanups have time
    log: Log = []
    register_cleanup(log.append, "cleanup")

    async def hang() -> None:
        log.append("hang")
        await asyncio.Event().wait()

    def hanging(session: AsyncSession) -> None:
        session.callback(hang)

    with pytest.raises(ExceptionGroup) as caught:
        async with lifespan(opening("db", log), hanging, hanging, timeout=20)("app"):
            pass

    assert ["TimeoutError", "TimeoutError"] == [type(error).__name__ for error in caught.value.exceptions]
    assert "hang" in str(caught.value.exceptions[0])
    assert ["open db", "hang", "hang", "close db", "cleanup"] == log


async def test_without_a_timeout_a_release_takes_as_long_as_it_needs() -> None:
    log: Log = []

    async def slow() -> None:
        for _ in range(100):
            await asyncio.sleep(0)
        log.append("slow")

    async with lifespan(lambda session: session.callback(slow) and None, timeout=None)("app"):
        pass

    assert ["slow"] == log


async def test_a_resource_that_nobody_would_close_is_refused() -> None:
    """An opener that returns what it opened is told to open it in the session."""

    def forgetful() -> object:
        return object()

    with pytest.raises(TypeError, match=r"found a object, which nobody.*session\.open"):
        async with lifespan(forgetful)("app"):
            pass


async def test_two_openers_cannot_give_the_same_key() -> None:
    with pytest.raises(ValueError, match=r"gives \['db'\] to the state"):
        async with lifespan(lambda: {"db": 1}, lambda: {"db": 2})("app"):
            pass


async def generator(app: Any) -> AsyncIterator[None]:
    yield


def wants_three(app: Any, session: AsyncSession, third: Any) -> None: ...


def wants_a_keyword(app: Any, *, key: str) -> None: ...


@pytest.mark.parametrize(
    ("opener", "message"),
    [
        (3, "an opener must be a function; found 3"),
        (generator, r"found the generator generator\. Decorate it with contextlib\.asynccontextmanager"),
        (dict, "dict does not tell what it takes"),
        (wants_three, r"found wants_three\(app.*third"),
        (wants_a_keyword, r"found wants_a_keyword\(app.*key"),
    ],
)
def test_what_is_no_opener_is_refused_at_once(opener: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lifespan(opener)


def test_a_decorator_with_nothing_but_a_timeout_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"lifespan\(.*opener, timeout=\.\.\.\)"):

        @lifespan(timeout=3)
        def opener(app: Any) -> None: ...


def test_a_timeout_must_be_one() -> None:
    with pytest.raises(ValueError, match="timeout"):
        lifespan(timeout=0)


@pytest.mark.slow
def test_the_module_imports_no_framework() -> None:
    code = (
        "import sys, hygiene.integrations.asgi\n"
        "print(sorted({'starlette', 'fastapi', 'uvicorn', 'anyio'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)

    assert "[]" == done.stdout.strip()


# A real server.

APP = """
import asyncio, logging, os, socket, sys, threading
import uvicorn
from {framework} import {kind} as Application
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from hygiene.cleanup import install_signal_handlers, register_cleanup
from hygiene.integrations.asgi import lifespan

def say(text):
    print(text, flush=True)

class Resource:
    def __init__(self, name):
        self.name = name
        say(f"open {{name}}")
    async def aclose(self):
        await asyncio.sleep(0)
        say(f"close {{self.name}}")

async def open_db(app, session):
    return {{"db": await session.open(Resource, "db")}}

async def open_cache(app, session):
    return {{"cache": await session.open(Resource, "cache")}}

async def hang_async(session):
    session.callback(asyncio.Event().wait)

async def hang_sync(session):
    session.callback(threading.Event().wait)

async def fail():
    raise ConnectionError("no cache today")

async def name(request):
    return PlainTextResponse(request.state.db.name)

async def slow(request):
    say("request begins")
    await asyncio.to_thread(sys.stdin.readline)
    say("request ends")
    return PlainTextResponse(f"{{request.state.cache.name}} still open")

register_cleanup(say, "cleanup")

@register_cleanup
async def async_cleanup():
    await asyncio.sleep(0)
    say("async cleanup")

if {install}:
    install_signal_handlers(timeout={deadline})
app = Application(routes=[Route("/", name), Route("/slow", slow)], lifespan=lifespan({openers}, timeout={timeout}))
listening = socket.create_server(("127.0.0.1", 0))
say(f"port {{listening.getsockname()[1]}}")
try:
    uvicorn.run(app, fd=listening.fileno())
finally:
    say("main ends")
"""

CLOSED = ["close cache", "close db", "async cleanup", "cleanup"]


class Server:
    """A server in a process of its own; reads what it prints, line by line."""

    def __init__(self, script: Path) -> None:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )  # fmt: skip
        self.seen: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def read_until(self, pattern: str | None) -> str:
        """The line that matches *pattern*; ``None`` reads to the end."""
        while True:
            line = self._lines.get(timeout=LIMIT)
            if line is None:
                assert pattern is None, "\n".join(["it ended:", *self.seen])
                return ""
            self.seen.append(line)
            if pattern is not None and re.search(pattern, line):
                return line

    def start(self) -> None:
        self.url = f"http://127.0.0.1:{self.read_until('^port ').split()[1]}"
        self.read_until("Uvicorn running")

    def stop(self, signum: int) -> int:
        self.process.send_signal(signum)
        return self.end()

    def end(self) -> int:
        """Its exit code."""
        self.read_until(None)
        return self.process.wait(LIMIT)

    @property
    def said(self) -> list[str]:
        """What it said itself, without the server's log."""
        ours = ("open", "close", "request", "cleanup", "async cleanup", "main")
        return [line for line in self.seen if line.startswith(ours)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers; they are gone afterwards."""
    servers: list[Server] = []

    def serve(openers: str = "open_db, open_cache", **options: Any) -> Server:
        settings = {
            "framework": "starlette.applications", "kind": "Starlette", "install": False, "deadline": 20,
            "timeout": 10, "openers": openers,
        }  # fmt: skip
        script = tmp_path / f"server{len(servers)}.py"
        script.write_text(textwrap.dedent(APP).format(**{**settings, **options}))
        servers.append(Server(script))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


@pytest.mark.slow
def test_a_startup_that_fails_closes_what_was_opened_and_ends_the_server(serve) -> None:
    server = serve("open_db, fail, open_cache")
    code = server.end()

    assert 3 == code  # uvicorn's own for a startup that failed
    assert ["open db", "close db", "async cleanup", "cleanup", "main ends"] == server.said
    assert any("ConnectionError: no cache today" in line for line in server.seen)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
class TestStoppedByASignal:
    """SIGTERM is what an orchestrator sends, SIGINT is Ctrl-C."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("signum", "install", "code", "rest"),
        [
            (signal.SIGTERM, False, -signal.SIGTERM, []),  # uvicorn sends it on to itself in the end
            (signal.SIGTERM, True, 128 + signal.SIGTERM, ["main ends"]),
            (signal.SIGINT, False, 0, ["main ends"]),  # uvicorn.run takes the KeyboardInterrupt for its own
            (signal.SIGINT, True, 0, ["main ends"]),
        ],
    )
    def test_everything_is_closed_once_and_in_order(
        self, serve, signum: signal.Signals, install: bool, code: int, rest: list[str]
    ) -> None:
        """With and without `install_signal_handlers` before ``uvicorn.run``."""
        server = serve(install=install)
        server.start()
        assert "db" == httpx.get(server.url, timeout=LIMIT).text

        assert code == server.stop(signum), "\n".join(server.seen)
        assert ["open db", "open cache", *CLOSED, *rest] == server.said

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", [("starlette.applications", "Starlette"), ("fastapi", "FastAPI")])
    def test_a_request_under_way_finishes_before_anything_is_closed(self, serve, kind: tuple[str, str]) -> None:
        framework, name = kind
        server = serve(framework=framework, kind=name)
        server.start()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(httpx.get, f"{server.url}/slow", timeout=LIMIT)
            server.read_until("request begins")
            server.process.send_signal(signal.SIGTERM)
            server.read_until("Shutting down")
            assert "close cache" not in server.said
            server.process.stdin.write("go on\n")
            server.process.stdin.flush()
            assert "cache still open" == answer.result(LIMIT).text
        server.end()

        assert ["request begins", "request ends", *CLOSED] == server.said[2:8]

    @pytest.mark.slow
    def test_a_release_that_hangs_ends_at_the_deadline(self, serve) -> None:
        """What hangs is named in the log, and what was opened before it is closed."""
        server = serve("open_db, hang_async, open_cache", timeout=3)
        server.start()
        server.stop(signal.SIGTERM)

        assert CLOSED == server.said[2:6]
        assert any("Event.wait timed out" in line for line in server.seen)

    @pytest.mark.slow
    def test_a_release_that_blocks_the_loop_ends_with_the_process(self, serve) -> None:
        """Nothing on the loop can stop it; `install_signal_handlers`, if it is installed in the lifespan, can."""
        server = serve("lambda: install_signal_handlers(timeout=1) and None, open_db, hang_sync, open_cache")
        server.start()
        code = server.stop(signal.SIGTERM)

        assert 128 + signal.SIGTERM == code
        assert "close cache" == server.said[2]
        assert "close db" not in server.said
