"""The programs of the pages on Gunicorn and Celery, in a real server: what it has acknowledged is stored."""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hygiene.stores import SQLiteStore

PATIENCE = 60.0
REQUESTS = 60

# No save but the last one: every 50 changes and five seconds would hide that it is missing.
LATE = """
import inspect
from hygiene.writebehind import WriteBehind
inspect.unwrap(WriteBehind.__init__).__kwdefaults__.update(interval=3600.0, every=100_000)
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="neither runs on Windows")]

Start = Callable[..., "subprocess.Popen[str]"]


def program(page: Path, name: str) -> str:
    """The block of *page* that is the file *name*."""
    found = re.search(rf"```python\n# {re.escape(name)}\n(.*?)```", page.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def run(tmp_path: Path, project_root: Path) -> Iterator[Start]:
    """Starts a module of Python's in the folder of the test; it does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(project_root)},
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Connection(http.client.HTTPConnection):
    """To a socket in a folder."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.path.relpath(self.path))  # the whole of it may be too long


def ask(path: Path, user: str) -> int:
    connection = Connection(path)
    try:
        connection.request("GET", f"/{user}?hello")
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


@pytest.mark.skipif(importlib.util.find_spec("gunicorn") is None, reason="gunicorn is not installed here")
@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
@pytest.mark.parametrize("kind", ["sync", "gthread", "gevent"])
def test_workers_of_gunicorn_save_at_sigterm(
    kind: str, preload: tuple[str, ...], tmp_path: Path, project_root: Path, run: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the master, which ends its workers in order."""
    if kind == "gevent":
        pytest.importorskip("gevent", reason="gevent is not installed here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text(LATE + program(project_root / "docs/how-to/gunicorn.md", "app.py"))
    # The server says when a worker listens.
    (tmp_path / "gunicorn.conf.py").write_text("def post_worker_init(worker):\n    open('ready', 'w').close()\n")
    server = run("gunicorn", "app:app", "-w", "2", "-k", kind, "-b", "unix:socket", "--threads", "4", *preload)
    pause = threading.Event()
    while not (tmp_path / "ready").exists():
        assert server.poll() is None, (tmp_path / "log").read_text()
        pause.wait(0.05)
    acknowledged = [
        f"user {n}" for n in range(REQUESTS) if ask(tmp_path / "socket", f"user%20{n}") == http.HTTPStatus.OK
    ]
    server.send_signal(signal.SIGTERM)

    assert 0 == server.wait(PATIENCE)
    assert REQUESTS == len(acknowledged)
    with SQLiteStore(tmp_path / "chats.db") as store:
        assert {user: ["hello"] for user in acknowledged} == dict(store.items("Bot.conversations"))
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(importlib.util.find_spec("celery") is None, reason="celery is not installed here")
@pytest.mark.parametrize("options", [(), ("--max-tasks-per-child", "5")], ids=["", "max-tasks"])
def test_children_of_celery_save_when_the_worker_ends(
    options: tuple[str, ...], tmp_path: Path, project_root: Path, run: Start
) -> None:
    """The prefork pool ends its children with ``os._exit``; the signal before that has them save."""
    text = program(project_root / "docs/how-to/celery.md", "tasks.py")
    address = re.compile(r'broker="[^"]*", backend="[^"]*"')
    (tmp_path / "results").mkdir()
    (tmp_path / "queue").mkdir()
    folders = f'"data_folder_in": {str(tmp_path / "queue")!r}, "data_folder_out": {str(tmp_path / "queue")!r}'
    (tmp_path / "tasks.py").write_text(
        LATE
        + address.sub(f'broker="filesystem://", backend="file://{tmp_path / "results"}"', text)
        + f"app.conf.broker_transport_options = {{{folders}}}\n"
    )
    # Another process sends: this one has no store open.
    sender = (
        "import tasks\ntasks.bot.conversations.close()\n"
        f"results = [tasks.on_message.delay(f'user {{n}}', 'hello') for n in range({REQUESTS})]\n"
        f"print(sum(result.get(timeout={PATIENCE}) for result in results))\n"
    )
    (tmp_path / "send.py").write_text(sender)
    worker = run("celery", "-A", "tasks", "worker", "-c", "2", "--without-gossip", "--without-mingle", *options)
    sent = subprocess.run(
        [sys.executable, "send.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(project_root)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )

    assert f"{REQUESTS}\n" == sent.stdout
    worker.send_signal(signal.SIGTERM)
    assert 0 == worker.wait(PATIENCE)
    with SQLiteStore(tmp_path / "chats.db") as store:
        assert {f"user {n}": ["hello"] for n in range(REQUESTS)} == dict(store.items("Bot.conversations"))


def test_the_pages_are_found(project_root: Path) -> None:
    """Whatever is installed here."""
    assert "def app(" in program(project_root / "docs/how-to/gunicorn.md", "app.py")
    assert "@app.task" in program(project_root / "docs/how-to/celery.md", "tasks.py")
