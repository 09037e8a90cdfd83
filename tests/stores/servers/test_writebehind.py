"""Write-behind over real servers that fail: nothing acknowledged is lost, and nothing is there twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from hygiene.errors import StoreUnavailable
from hygiene.writebehind import WriteBehind

PATIENCE = 30.0
TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datid <> 0"

Wait = Callable[[Callable[[], object]], None]


class Chat(threading.Thread):
    """Says 0, 1, 2, ...: in a log that keeps all, in one that keeps five, and as a value; and what was acknowledged."""

    def __init__(self, writer: WriteBehind) -> None:
        super().__init__()
        self.writer, self.stop = writer, threading.Event()
        self.said = self.acknowledged = self.refused = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                # In an outage it goes on to talk for a while: what is pending then meets what may have been saved.
                for _ in range(3 if self.said < self.acknowledged + 60 else 0):
                    self.writer.append("log", self.said)
                    self.writer.append("window", self.said)
                    self.writer.put("last", self.said)
                    if self.said >= 5:
                        self.writer.drop("window", self.said - 5, self.said - 4)
                    self.said += 1
                try:
                    self.writer.flush()
                except StoreUnavailable:
                    self.refused += 1
                else:
                    self.acknowledged = self.said
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.problem = error


@pytest.fixture
def check() -> Callable[[Any, Chat], None]:
    def look(store: Any, chat: Chat) -> None:
        """Everything acknowledged is there, in order, once; and after a last flush, everything said."""
        chat.stop.set()
        chat.join(PATIENCE)
        assert chat.problem is None
        record = store.load("default", "log")
        assert record is not None
        assert list(range(len(record.value))) == record.value
        assert chat.acknowledged <= len(record.value) <= chat.said
        chat.writer.flush(timeout=PATIENCE)
        found = [entry and entry.value for entry in (store.load("default", key) for key in ("log", "window", "last"))]
        numbers = list(range(chat.said))

        assert [numbers, numbers[-5:], numbers[-1]] == found
        assert () == chat.writer.rejected
        assert store.recover().clean

    return look


@pytest.fixture
def start() -> Iterator[Callable[[Any], Chat]]:
    """Starts a chat with a write-behind that saves often; tracked, as a registry would."""
    writers: list[WriteBehind] = []
    chats: list[Chat] = []

    def begin(store: Any) -> Chat:
        writer = WriteBehind(store, every=5, interval=0.01)
        writers.append(writer)
        for key in ("log", "window", "last"):
            writer.track(key, None)
        chats.append(Chat(writer))
        chats[-1].start()
        return chats[-1]

    yield begin
    for chat in chats:
        chat.stop.set()
        chat.join(PATIENCE)
    for writer in writers:
        writer.close()


def some_more(chat: Chat, wait: Wait) -> None:
    before = chat.acknowledged
    wait(lambda: chat.acknowledged > before + 9 or chat.problem)


def a_refusal(chat: Chat, wait: Wait) -> None:
    before = chat.refused
    wait(lambda: chat.refused > before or chat.problem)


@pytest.mark.slow
def test_redis_killed_in_the_middle_of_saving(own_redis: Any, start: Any, check: Any, wait: Wait) -> None:
    """With SIGKILL, and started again from its append-only file."""
    with own_redis.open("t") as store:
        chat = start(store)
        for _ in range(4):
            some_more(chat, wait)
            own_redis.kill()
            a_refusal(chat, wait)
            own_redis.start()
        some_more(chat, wait)
        check(store, chat)
        chat.writer.close()


@pytest.mark.slow
def test_redis_stopped_for_longer_than_it_is_waited_for(own_redis: Any, start: Any, check: Any, wait: Wait) -> None:
    """What it was sent before it was stopped is saved when it goes on, although nobody waits for it any more."""
    with own_redis.open("t", timeout=0.05) as store:
        chat = start(store)
        for _ in range(4):
            some_more(chat, wait)
            own_redis.pause()
            a_refusal(chat, wait)
            own_redis.resume()
        some_more(chat, wait)
        check(store, chat)
        chat.writer.close()


@pytest.mark.slow
def test_postgres_backends_terminated_in_the_middle_of_saving(
    postgres_server: Any, prefix: str, start: Any, check: Any, wait: Wait
) -> None:
    """Whether the last transaction was committed is found out over a new connection."""
    with (
        postgres_server.open(prefix) as store,
        psycopg.connect(postgres_server.url, autocommit=True) as operator,
    ):
        chat = start(store)
        for _ in range(20):
            some_more(chat, wait)
            operator.execute(TERMINATE)
        some_more(chat, wait)
        check(store, chat)
        chat.writer.close()


@pytest.mark.slow
def test_postgres_restarted_in_the_middle_of_saving(
    postgres_server: Any, prefix: str, start: Any, check: Any, wait: Wait
) -> None:
    with postgres_server.open(prefix) as store:
        chat = start(store)
        for _ in range(2):
            some_more(chat, wait)
            postgres_server.stop()
            a_refusal(chat, wait)
            postgres_server.start()
        some_more(chat, wait)
        check(store, chat)
        chat.writer.close()
