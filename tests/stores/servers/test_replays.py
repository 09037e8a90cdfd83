"""A replay keeps its conversations on a server as it does in a file."""

from __future__ import annotations

import json
from random import Random

import psycopg
import pytest

from hygiene.cli import replay as replaying
from hygiene.cli.ledger import SPACE
from hygiene.cli.replay import Job, compare, work
from hygiene.stores import open_store

pytestmark = pytest.mark.once


@pytest.fixture
def redis_address(own_redis):
    return own_redis.url


@pytest.fixture
def postgres_address(postgres_server, prefix):
    """A database with nothing in it, and a user with a password."""
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE replay_{prefix}")
    return f"postgresql://postgres:secret@127.0.0.1:{postgres_server.port}/replay_{prefix}"


@pytest.mark.slow
@pytest.mark.parametrize("server", ["redis", "postgres"])
def test_every_message_is_on_the_server_in_order(server, request, tmp_path, monkeypatch):
    """Two replays leave every message on the server twice, in order, and show no password."""
    monkeypatch.setattr(replaying, "replay", lambda job, *rest: work(job))  # in this process, which is faster
    address = request.getfixturevalue(f"{server}_address")
    path, random, texts = tmp_path / "chat.jsonl", Random(7), {}
    with path.open("w") as log:
        for number in range(150):
            user = random.randrange(20)
            texts.setdefault(user, []).append(f"message {number}")
            log.write(json.dumps({"user": user, "text": f"message {number}"}) + "\n")

    first = compare(Job(path=str(path), maxsize=5, store=address)).kept
    second = compare(Job(path=str(path), maxsize=5, store=address)).kept

    with open_store(address) as store:
        found = dict(store.items(SPACE))
        assert store.nbytes(SPACE) == second.size == 2 * first.size
    assert {user: own * 2 for user, own in texts.items()} == found
    assert (150, 0, 0) == (first.messages, first.messages_before, first.returned)
    assert (150, 150, 20) == (second.messages, second.messages_before, second.returned)
    assert second.rehydrated == first.rehydrated + 20
    assert "secret" not in second.address
    assert second.address.startswith(("redis://127.0.0.1:", "postgresql://127.0.0.1:"))
