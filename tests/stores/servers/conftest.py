"""Real servers, started for the tests and ended with them."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from hygiene.errors import StoreUnavailable
from hygiene.stores.postgres import PostgresStore
from hygiene.stores.redis import RedisStore
from hygiene.stores.servers import ServerStore
from hygiene.testing import ManualClock

PATIENCE = 30.0

_numbers = itertools.count()


def program(name: str, *places: str) -> str:
    """Where *name* is; without it the test is skipped, but not where all tests have to run."""
    if found := shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places])):
        return found
    message = f"needs {name}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[Any], look: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            look()
        except (redis.RedisError, psycopg.Error):
            assert process.poll() is None, f"the server has ended with {process.returncode}"
            assert time.monotonic() < deadline, "the server does not answer"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        else:
            return


class Server:
    """A server that can be killed, stopped, and started again on the same port with the same data."""

    process: subprocess.Popen[bytes]
    port: int

    def start(self) -> None:
        raise NotImplementedError

    def open(self, prefix: str, **options: Any) -> ServerStore:
        raise NotImplementedError

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGINT)  # what PostgreSQL takes for a fast shutdown
        self.process.wait(PATIENCE)

    def end(self) -> None:
        if self.process.poll() is None:
            self.stop()


class RedisServer(Server):
    def __init__(self, folder: Path, *options: str) -> None:
        self.program = program("redis-server")
        self.folder, self.options, self.port = folder, options, free_port()
        self.start()

    def start(self) -> None:
        command = [self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as client:
            wait_until_ready(self.process, client.ping)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def open(self, prefix: str, **options: Any) -> ServerStore:
        return RedisStore(self.url, prefix=prefix, **options)


class PostgresServer(Server):
    def __init__(self) -> None:
        places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
        self.program, initdb = program("postgres", *places), program("initdb", *places)
        # Not below pytest's folder, which nobody else may enter: PostgreSQL refuses to run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="hygiene-postgres-"))
        self.who: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            self.who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        environment = {**os.environ, "LC_ALL": "C"}
        self.how: dict[str, Any] = {"cwd": self.folder, "env": environment, "stdout": subprocess.DEVNULL, **self.who}
        command = [initdb, "-D", str(self.folder / "data"), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(command, check=True, timeout=PATIENCE, **self.how)
        self.port = free_port()
        self.start()

    def start(self) -> None:
        # Nothing of this outlives the machine.
        options = ("fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories=", f"port={self.port}")
        command = [self.program, "-D", str(self.folder / "data"), *(f"--{option}" for option in options)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **self.how)
        wait_until_ready(self.process, lambda: psycopg.connect(self.url, connect_timeout=5).close())

    def end(self) -> None:
        super().end()
        shutil.rmtree(self.folder)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def open(self, prefix: str, **options: Any) -> ServerStore:
        return PostgresStore(self.url, prefix=prefix, **options)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.end()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.end()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that the test may kill."""
    server = RedisServer(tmp_path)
    yield server
    server.end()


@pytest.fixture(params=["redis", "postgres"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each server in turn."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture
def prefix() -> str:
    """A name that no other test has."""
    return f"t{next(_numbers)}"


@pytest.fixture
def store(server: Server, prefix: str, clock: ManualClock) -> Iterator[ServerStore]:
    """An empty store on each server."""
    with server.open(prefix, timer=clock) as opened:
        yield opened


@pytest.fixture
def real(server: Server, prefix: str) -> Iterator[ServerStore]:
    """The same with a clock that goes."""
    with server.open(prefix) as opened:
        yield opened


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def until(look: Callable[[], object]) -> None:
    """Wait until *look* says so, and the server can be reached."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(StoreUnavailable):
            if look():
                return
        assert time.monotonic() < deadline, "it never came to that"
        os.sched_yield()


@pytest.fixture
def wait() -> Callable[[Callable[[], object]], None]:
    return until
