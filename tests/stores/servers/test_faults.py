"""What servers do to a store, and what it does about that."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from hygiene.errors import StoreError, StoreUnavailable
from hygiene.stores import Delete, SaveLog, SaveValue
from hygiene.stores.postgres import PostgresStore
from hygiene.stores.servers import BrokenError, ServerStore

pytestmark = pytest.mark.once

PATIENCE = 30.0


class Writer(threading.Thread):
    """Appends 0, 1, 2, ... and says what was acknowledged; asks again, with the same change, for what was not."""

    def __init__(self, store: ServerStore) -> None:
        super().__init__()
        self.store, self.stop, self.acknowledged, self.refused = store, threading.Event(), 0, 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            version = 0
            while not self.stop.is_set():
                change = SaveLog("s", "a", version, [self.store.encode(self.acknowledged)])
                while True:
                    try:
                        (head,) = self.store.save([change])
                    except StoreUnavailable:
                        self.refused += 1
                        continue
                    break
                assert head is not None
                version, self.acknowledged = head.version, self.acknowledged + 1
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.problem = error

    def check(self) -> None:
        self.stop.set()
        self.join(PATIENCE)
        assert self.problem is None
        record = self.store.load("s", "a")
        assert record is not None
        assert list(range(self.acknowledged)) == record.value


@pytest.mark.slow
def test_redis_killed_and_started_again_in_the_middle_of_writing(
    own_redis: Any, wait: Callable[[Callable[[], object]], None]
) -> None:
    """Nothing acknowledged is lost, and nothing that had to be asked for again is there twice."""
    with own_redis.open("t") as store:
        writer = Writer(store)
        writer.start()
        for _ in range(5):
            before = writer.acknowledged
            wait(lambda before=before: writer.acknowledged > before + 20 or writer.problem)
            refused = writer.refused
            own_redis.kill()
            wait(lambda refused=refused: writer.refused > refused or writer.problem)
            own_redis.start()
        writer.check()

        assert store.recover().clean


@pytest.mark.slow
def test_postgres_backends_terminated_in_the_middle_of_writing(
    postgres_server: Any, prefix: str, wait: Callable[[Callable[[], object]], None]
) -> None:
    """It connects again, and finds out which save was committed."""
    terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datid <> 0"
    with (
        postgres_server.open(prefix) as store,
        psycopg.connect(postgres_server.url, autocommit=True) as operator,
    ):
        writer = Writer(store)
        writer.start()
        for _ in range(20):
            before = writer.acknowledged
            wait(lambda before=before: writer.acknowledged > before + 5 or writer.problem)
            operator.execute(terminate)
        writer.check()

        assert store.recover().clean


@pytest.mark.slow
def test_postgres_restarted_in_the_middle_of_writing(
    postgres_server: Any, prefix: str, wait: Callable[[Callable[[], object]], None]
) -> None:
    with postgres_server.open(prefix) as store:
        writer = Writer(store)
        writer.start()
        for _ in range(2):
            before = writer.acknowledged
            wait(lambda before=before: writer.acknowledged > before + 20 or writer.problem)
            refused = writer.refused
            postgres_server.stop()
            wait(lambda refused=refused: writer.refused > refused or writer.problem)
            postgres_server.start()
        writer.check()


def test_without_a_server_everything_is_unavailable_and_comes_back(own_redis: Any) -> None:
    with own_redis.open("t") as store:
        store.save([SaveValue("s", "a", store.encode(1))])
        own_redis.kill()
        for use in (
            lambda: store.load("s", "a"),
            lambda: store.contains("s", "a"),
            lambda: store.save([SaveValue("s", "a", store.encode(2), 1)]),
            lambda: store.save([], sync=True),
            lambda: list(store.keys("s")),
            lambda: store.lease("s", "a"),
            lambda: store.renew("s", "a", 1),
            store.spaces,
            store.recover,
            store.expire,
            lambda: own_redis.open("t"),
        ):
            with pytest.raises(StoreUnavailable, match=r"no answer from the server.*try again"):
                use()
        own_redis.start()

        record = store.load("s", "a")
        assert record is not None
        assert (1, 1) == (record.value, record.head.version)


def test_a_port_where_nobody_listens_is_unavailable(own_redis: Any, postgres_server: Any) -> None:
    port = str(own_redis.port)
    own_redis.kill()
    with pytest.raises(StoreUnavailable, match=r"cannot open store postgresql://127.0.0.1:\d+/x \(hygiene\)"):
        PostgresStore(f"postgresql://somebody:secret@127.0.0.1:{port}/x")
    own_redis.start()


def _break_after(store: ServerStore, monkeypatch: pytest.MonkeyPatch, *, applied: bool) -> None:
    """Let the next save break, before or after it was applied, and the look that would tell fail, too."""
    commit, heads = store._commit, store._heads

    def break_it(plan: Any, *, sync: bool) -> None:
        monkeypatch.setattr(store, "_commit", commit)
        monkeypatch.setattr(store, "_heads", refuse)
        if applied:
            commit(plan, sync=sync)
        raise BrokenError

    def refuse(refs: Any) -> Any:
        monkeypatch.setattr(store, "_heads", heads)
        raise StoreUnavailable("not now")

    monkeypatch.setattr(store, "_commit", break_it)


@pytest.mark.parametrize("applied", [False, True])
def test_a_save_whose_reply_was_lost_is_not_saved_twice(
    store: ServerStore, monkeypatch: pytest.MonkeyPatch, applied: bool
) -> None:
    """The same call again finds out whether the first one was applied."""
    change = SaveLog("s", "a", 0, [store.encode("x")])
    _break_after(store, monkeypatch, applied=applied)
    with pytest.raises(StoreUnavailable, match="not now") as caught:
        store.save([change])
    assert ["whether this was saved is not known; the same call again finds out"] == caught.value.__notes__
    (head,) = store.save([change])
    record = store.load("s", "a")

    assert record is not None
    assert (["x"], head, 1) == (record.value, record.head, record.head.version)
    assert {} == store._unsure


def test_a_deletion_whose_reply_was_lost_is_found_out_too(store: ServerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save([SaveValue("s", "a", store.encode(1))])
    _break_after(store, monkeypatch, applied=True)
    with pytest.raises(StoreUnavailable):
        store.save([Delete("s", "a", 1)])

    assert [None] == store.save([Delete("s", "a", 1)])


COUNTER = """
import sys
from hygiene.errors import VersionConflict
from hygiene.stores import SaveValue
from hygiene.stores.postgres import PostgresStore
from hygiene.stores.redis import RedisStore

kind = RedisStore if sys.argv[1].startswith("redis") else PostgresStore
with kind(sys.argv[1], prefix=sys.argv[2], timeout=30) as store:
    sys.stdin.readline()
    for _ in range(int(sys.argv[3])):
        while True:
            record = store.load("s", "n")
            base, n = (0, 0) if record is None else (record.head.version, record.value)
            try:
                store.save([SaveValue("s", "n", store.encode(n + 1), base)])
            except VersionConflict:
                continue
            break
"""


@pytest.mark.slow
@pytest.mark.timeout(180)  # 2,000 commits of four that are in each other's way
def test_four_processes_that_count_together_lose_nothing(
    server: Any, real: ServerStore, prefix: str, elsewhere: Callable[..., Any]
) -> None:
    """500 times each with compare and set: 2,000."""
    processes = [elsewhere(COUNTER, server.url, prefix, 500) for _ in range(4)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    codes = [(process.communicate(timeout=170), process.returncode)[1] for process in processes]
    record = real.load("s", "n")

    assert [0] * 4 == codes
    assert record is not None
    assert (2000, 2000) == (record.value, record.head.version)


@pytest.mark.slow
def test_no_version_is_given_twice_however_often_an_entry_is_deleted(real: ServerStore) -> None:
    """Four threads save, delete and let end the same two entries: an old version never fits by chance."""
    versions: dict[str, list[int]] = {"a": [], "b": []}
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for n in range(40):
                key = "ab"[(n + number) % 2]
                end = 1.0 if n % 5 == 0 else None  # over when it is saved
                heads = real.save([SaveValue("s", key, real.encode(n), expire_at=end)])
                versions[key] += [head.version for head in heads if head is not None]
                if n % 3 == 0:
                    real.save([Delete("s", key)])
                if n % 7 == 0:
                    real.expire()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert [] == problems
    assert [80] * 2 == [len(set(found)) for found in versions.values()]
    assert real.recover().clean


def test_after_a_fork_both_sides_go_on(real: ServerStore) -> None:
    """Each with connections of its own."""
    real.save([SaveLog("s", "a", 0, [real.encode("parent")])])
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            record = real.load("s", "a")
            assert record is not None
            real.save([SaveLog("s", "a", record.head.version, [real.encode("child")])])
            real.close()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    real.save([SaveLog("s", "a", 2, [real.encode("parent again")])])
    record = real.load("s", "a")

    assert 0 == code
    assert record is not None
    assert ["parent", "child", "parent again"] == record.value


@pytest.mark.parametrize("first", ["append", "drop", "replace", "delete"])
def test_a_full_redis_refuses_a_save_or_saves_all_of_it(own_redis: Any, first: str) -> None:
    """Whatever comes first, even what gives room back, it does not stop in the middle."""
    with own_redis.open("t") as store:
        store.save([SaveLog("s", "a", 0, [store.encode(1)])])
        data = store.encode(2)
        change = {
            "append": SaveLog("s", "a", 1, [data]),
            "drop": SaveLog("s", "a", 1, [data], drop=[(0, 1)]),
            "replace": SaveLog("s", "a", 1, [data], replace=True),
            "delete": Delete("s", "a", 1),
        }[first]
        store._client.config_set("maxmemory", 1)
        saved = False
        with contextlib.suppress(StoreUnavailable):
            store.save([change, SaveValue("s", "b", data)])
            saved = True
        found = [record and record.value for record in (store.load("s", "a"), store.load("s", "b"))]
        after = {"append": [1, 2], "drop": [2], "replace": [2], "delete": None}[first]

        assert ([after, 2] if saved else [[1], None]) == found
        assert saved == (first in {"replace", "delete", "drop"})
        store._client.config_set("maxmemory", 0)
        assert store.recover().clean


def test_a_redis_that_became_a_replica_refuses_a_save_and_serves_what_it_has(own_redis: Any) -> None:
    """As after a fail-over; and it goes on where the primary is then."""
    with own_redis.open("t") as store:
        store.save([SaveValue("s", "a", store.encode(1), 0)])
        store._client.replicaof("127.0.0.1", 1)
        with pytest.raises(StoreUnavailable, match="read only replica"):
            store.save([SaveValue("s", "a", store.encode(2), 1)])
        record = store.load("s", "a")
        assert record is not None
        assert 1 == record.value
        store._client.replicaof("NO", "ONE")
        (head,) = store.save([SaveValue("s", "a", store.encode(2), 1)])

        assert head.version == 2


def test_a_read_only_postgres_refuses_a_save_and_serves_what_it_has(
    postgres_server: Any, real: ServerStore, prefix: str
) -> None:
    with postgres_server.open(prefix) as writable:
        writable.save([SaveValue("s", "a", writable.encode(1))])
    options = "?options=-cdefault_transaction_read_only%3Don"
    with PostgresStore(postgres_server.url + options, prefix=prefix) as store:
        with pytest.raises(StoreUnavailable, match="read-only"):
            store.save([SaveValue("s", "a", store.encode(2))])
        record = store.load("s", "a")

    assert record is not None
    assert 1 == record.value


def test_a_closed_store_stays_closed(real: ServerStore) -> None:
    real.close()
    for use in (lambda: real.lease("s", "a"), lambda: real.release("s", "a", 1), lambda: list(real.quarantine())):
        with pytest.raises(StoreError, match="is closed"):
            use()
