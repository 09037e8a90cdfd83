"""Hints that an entry has changed elsewhere, and the versions that they are compared with."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import redis

from hygiene.errors import StoreError
from hygiene.stores import Delete, SaveLog, SaveValue
from hygiene.stores.postgres import PostgresStore
from hygiene.stores.redis import RedisStore
from hygiene.stores.servers import ServerStore, State, refer
from hygiene.stores.watching import Known, Probe, Watch, Watcher
from hygiene.testing import ManualClock

PATIENCE = 30.0
NEVER = 1000.0  # seconds: what waits for that long has to be woken up

Wait = Callable[[Callable[[], object]], None]

TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datid <> 0"


class Told:
    """What a watch has called, to be waited for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.news = threading.Condition()

    def __call__(self, keys: Any) -> None:
        with self.news:
            self.calls.append(keys)
            self.news.notify_all()

    @property
    def keys(self) -> set[Any]:
        return {key for keys in self.calls if keys is not None for key in keys}

    def wait(self, look: Callable[[], object]) -> None:
        with self.news:
            assert self.news.wait_for(look, PATIENCE), f"it never came to that; told {self.calls}"

    def wait_for_anything(self) -> None:
        """Until "anything may have changed" was told."""
        self.wait(lambda: None in self.calls)


@pytest.fixture
def told() -> Told:
    return Told()


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "hygiene-watch"}


@pytest.fixture
def watching(wait: Wait) -> Iterator[Callable[..., Watch]]:
    """Makes watches that listen already and are closed in the end, and waits for their threads."""
    before = threads()
    made: list[weakref.ref[Watch]] = []

    def make(store: ServerStore, changed: Any, interval: float = 0.02) -> Watch:
        watch = store.watch("s", changed, interval=interval)
        made.append(weakref.ref(watch))
        wait(lambda: watch.listening)
        return watch

    yield make
    for reference in made:
        if (watch := reference()) is not None:
            watch.close()
    for thread in threads() - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def put(store: ServerStore, *keys: Any, space: str = "s") -> list[int]:
    """Save something under each of *keys*; the new versions."""
    heads = store.save([SaveValue(space, key, store.encode(os.urandom(8).hex())) for key in keys])
    return [head.version for head in heads if head is not None]


def do(operator: psycopg.Connection[Any], statement: Any) -> None:
    operator.execute(statement)


def break_connections(server: Any) -> None:
    """What an operator does to all that are connected."""
    if server.url.startswith("redis"):
        with redis.Redis(port=server.port) as client:
            client.client_kill_filter(_type="pubsub")
            client.client_kill_filter(_type="normal", skipme=True)
    else:
        with psycopg.connect(server.url, autocommit=True) as operator:
            operator.execute(TERMINATE)


class TestVersions:
    def test_they_are_those_of_the_heads_and_0_where_nothing_is(self, store: ServerStore) -> None:
        """In the order in which they were asked for."""
        put(store, "a", "b")
        put(store, "a")
        store.save([SaveLog("s", (1, "log"), 0, [store.encode(1)]), SaveValue("other", "c", store.encode(1))])
        store.save([Delete("s", "b")])

        assert [2, 0, 0, 1, 2] == store.versions("s", ["a", "b", "c", (1, "log"), "a"])
        assert [] == store.versions("s", [])

    def test_what_is_over_has_none(self, store: ServerStore, clock: ManualClock) -> None:
        store.save([SaveValue("s", "a", store.encode(1), expire_at=clock() + 10)])
        before = store.versions("s", ["a"])
        clock.advance(10)

        assert ([1], [0]) == (before, store.versions("s", ["a"]))

    def test_thousands_are_asked_for_in_slices(self, store: ServerStore) -> None:
        put(store, *range(0, 2500, 2))

        assert [1, 0] * 1250 == store.versions("s", range(2500))

    def test_a_damaged_entry_has_none(self, redis_server: Any, prefix: str) -> None:
        """Whoever has it in memory will load it, and that puts it in order."""
        with redis_server.open(prefix) as store:
            put(store, "a")
            name = store._names(refer("s", "a"))[0]
            store._client.set(name, store._client.get(name)[:-1] + b"?")

            assert [0] == store.versions("s", ["a"])

    def test_a_closed_store_has_none(self, real: ServerStore) -> None:
        real.close()
        with pytest.raises(StoreError, match="is closed"):
            real.versions("s", ["a"])


class TestHints:
    def test_a_change_elsewhere_is_told(
        self, server: Any, real: ServerStore, prefix: str, watching: Any, told: Told
    ) -> None:
        """Whoever makes it, and whatever it is: a save, a deletion, a first save."""
        watch = watching(real, told)
        versions = put(real, "value", "gone")
        watch.add("value", versions[0])
        watch.add("gone", versions[1])
        watch.add(("new", 1), 0)
        with server.open(prefix) as other:
            put(other, "value")
            other.save([Delete("s", "gone"), SaveLog("s", ("new", 1), 0, [other.encode("hello")])])
        told.wait(lambda: told.keys >= {"value", "gone", ("new", 1)})

        assert None not in told.calls

    def test_only_what_was_added_is_told(self, real: ServerStore, watching: Any, told: Told) -> None:
        """Other keys, the same key in another space, and what has left memory cost nothing."""
        watch = watching(real, told)
        for key in ("a", "left"):
            watch.add(key, 0)
        watch.discard("left")
        watch.discard("never added")
        put(real, "left", "never added")
        put(real, "a", space="elsewhere")
        put(real, "a")
        told.wait(lambda: "a" in told.keys)
        put(real, "left")
        put(real, "a")
        told.wait(lambda: len(told.calls) > 1)

        assert {"a"} == told.keys

    @pytest.mark.slow
    def test_a_burst_of_writes_is_a_few_calls(self, real: ServerStore, watching: Any) -> None:
        """A callback that takes long does not have them pile up either."""
        gate, told = threading.Event(), Told()

        def slow(keys: Any) -> None:
            told(keys)
            assert gate.wait(PATIENCE)

        watch = watching(real, slow)
        for n in range(300):
            watch.add(n, 0)
        put(real, 0)
        told.wait(lambda: told.calls)
        for n in range(300):
            put(real, n)
        gate.set()
        told.wait(lambda: told.keys == set(range(300)))

        assert len(told.calls) < 30

    def test_a_callback_that_raises_is_logged_and_the_watch_goes_on(
        self, real: ServerStore, watching: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        told = Told()

        def raising(keys: Any) -> None:
            told(keys)
            raise SystemExit("whatever")

        watch = watching(real, raising)
        watch.add("a", 0)
        put(real, "a")
        told.wait(lambda: len(told.calls) == 1)
        put(real, "a")
        told.wait(lambda: len(told.calls) >= 2)

        assert "the callback failed; the watch goes on" in caplog.text

    def test_a_version_that_was_old_when_it_was_added_is_told(
        self, postgres_server: Any, prefix: str, watching: Any, told: Told
    ) -> None:
        """Where the server is asked, nothing between loading and adding is missed."""
        with postgres_server.open(prefix) as store:
            watch = watching(store, told)
            put(store, "stale", "fresh", "unknown")
            put(store, "stale")
            watch.add("stale", 1)
            watch.add("fresh", 1)
            watch.add("absent", 0)
            watch.add("unknown")
            told.wait(lambda: {"stale", "unknown"} <= told.keys)
            put(store, "fresh")
            told.wait(lambda: "fresh" in told.keys)

            assert {"stale", "unknown", "fresh"} == told.keys
            assert sorted(key for keys in told.calls for key in keys) == ["fresh", "stale", "unknown"]

    def test_ones_own_save_is_not_told_if_its_version_was_added(
        self, postgres_server: Any, prefix: str, watching: Any, told: Told
    ) -> None:
        with postgres_server.open(prefix) as store:
            watch = watching(store, told, 0.2)
            watch.add("own", 0)
            watch.add("other", 0)
            (version,) = put(store, "own")
            watch.add("own", version)
            put(store, "other")
            told.wait(lambda: "other" in told.keys)
            put(store, "other")
            told.wait(lambda: len(told.calls) > 1)

            assert {"other"} == told.keys

    def test_what_was_added_before_the_connection_stood_is_told(self, redis_server: Any, prefix: str) -> None:
        """It may have changed meanwhile."""
        told = Told()
        with redis_server.open(prefix) as store, store.watch("s", told) as watch:
            while not told.calls:
                watch.add("a")
                put(store, "a")
            told.wait(lambda: "a" in told.keys)

        assert {"a"} == told.keys

    def test_an_emptied_redis_tells_that_anything_has_changed(self, own_redis: Any, watching: Any, told: Told) -> None:
        with own_redis.open("t") as store:
            watch = watching(store, told)
            watch.add("a")
            store._client.flushall()
            told.wait_for_anything()

    def test_a_client_of_ones_own_is_watched_with(
        self, redis_server: Any, prefix: str, told: Told, watching: Any
    ) -> None:
        """Over a connection like its own, whatever that has for settings."""
        with (
            redis.Redis(port=redis_server.port, health_check_interval=1, protocol=3) as client,
            RedisStore(client, prefix=prefix) as store,
        ):
            watch = watching(store, told)
            watch.add("a")
            put(store, "a")
            told.wait(lambda: "a" in told.keys)

        assert None not in told.calls

    def test_other_keys_of_the_same_prefix_are_nobodys(
        self, redis_server: Any, prefix: str, watching: Any, told: Told
    ) -> None:
        """Somebody else's key that looks like ours, and the lease of an entry."""
        with redis_server.open(prefix) as store:
            watch = watching(store, told)
            watch.add("a")
            watch.add("b")
            store._client.set(f"{prefix}:{{nobody}}:head", 1)
            store.lease("s", "b")
            put(store, "a")
            told.wait(lambda: "a" in told.keys)

        assert [["a"]] == told.calls


@pytest.mark.parametrize("rules", [["-client"], ["-client|tracking"], ["-subscribe"], ["resetchannels"]])
def test_a_redis_that_does_not_let_itself_be_watched_is_asked(
    own_redis: Any, rules: list[str], watching: Any, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, however often the connection breaks."""
    with redis.Redis(port=own_redis.port) as operator:
        operator.execute_command("ACL", "SETUSER", "bot", "on", ">secret", "~*", "&*", "+@all", *rules)
    with RedisStore(f"redis://bot:secret@127.0.0.1:{own_redis.port}/0", prefix="t") as store:
        watch = watching(store, told)
        (version,) = put(store, "a")
        watch.add("a", version)
        watch.add("b", 0)
        put(store, "a")
        told.wait(lambda: "a" in told.keys)
        break_connections(own_redis)
        told.wait_for_anything()
        put(store, "b")
        told.wait(lambda: "b" in told.keys)

    assert 1 == caplog.text.count("the server does not tell of changes")


def test_a_redis_that_refuses_to_be_asked_is_asked_again(
    own_redis: Any, watching: Any, told: Told, caplog: pytest.LogCaptureFixture, wait: Wait
) -> None:
    """The refusal is said once, and once it is over everything that was missed is told."""
    with own_redis.open("t") as store, redis.Redis(port=own_redis.port) as operator:
        operator.execute_command("ACL", "SETUSER", "bot", "on", ">secret", "~*", "&*", "+@all", "-client|tracking")
        with RedisStore(f"redis://bot:secret@127.0.0.1:{own_redis.port}/0", prefix="t") as limited:
            watch = watching(limited, told)
            watch.add("a", 0)
            operator.execute_command("ACL", "SETUSER", "bot", "-mget")
            wait(lambda: "cannot ask what has changed" in caplog.text)
            before = operator.info("commandstats")["cmdstat_mget"]["rejected_calls"]
            wait(lambda: operator.info("commandstats")["cmdstat_mget"]["rejected_calls"] > before)
            put(store, "a")
            operator.execute_command("ACL", "SETUSER", "bot", "+mget")
            told.wait(lambda: "a" in told.keys)

    assert None not in told.calls
    assert 1 == caplog.text.count("cannot ask what has changed")


def test_a_redis_that_is_busy_is_waited_for(
    own_redis: Any, told: Told, caplog: pytest.LogCaptureFixture, wait: Wait
) -> None:
    """It is not taken for one that does not tell of changes."""
    with own_redis.open("t") as store, redis.Redis(port=own_redis.port) as operator:
        operator.config_set("busy-reply-threshold", 1)

        def keep_busy() -> None:
            with redis.Redis(port=own_redis.port) as client, contextlib.suppress(redis.ResponseError):
                client.eval("while true do end", 0)

        thread = threading.Thread(target=keep_busy)
        thread.start()
        wait(lambda: says_busy(operator))
        with store.watch("s", told, interval=0.02):
            wait(lambda: "not told any more what changes elsewhere (ResponseError: BUSY" in caplog.text)
            operator.script_kill()
            thread.join(PATIENCE)
            told.wait_for_anything()

    assert "the server does not tell of changes" not in caplog.text


def says_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False


class TestFaults:
    def test_after_a_broken_connection_anything_may_have_changed(
        self, server: Any, real: ServerStore, watching: Any, told: Told, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An operator ends it; the watch connects again, says so, and goes on."""
        caplog.set_level(logging.INFO, "hygiene")
        watch = watching(real, told)
        watch.add("a", 0)
        break_connections(server)
        told.wait_for_anything()
        put(real, "a")
        told.wait(lambda: "a" in told.keys)

        assert 1 == told.calls.count(None)
        assert 1 == caplog.text.count("not told any more what changes elsewhere")
        assert 1 == caplog.text.count("told again what changes elsewhere")

    @pytest.mark.slow
    def test_a_server_that_was_restarted_is_found_again(
        self,
        request: pytest.FixtureRequest,
        server: Any,
        watching: Any,
        told: Told,
        wait: Wait,
    ) -> None:
        redis_one = server.url.startswith("redis")
        server = request.getfixturevalue("own_redis") if redis_one else server
        with server.open("restarted") as store:
            watch = watching(store, told)
            watch.add("a", *store.versions("s", ["a"]))
            (server.kill if redis_one else server.stop)()
            wait(lambda: not watch.listening)
            calls = list(told.calls)
            server.start()
            told.wait_for_anything()
            wait(lambda: put(store, "a"))
            told.wait(lambda: "a" in told.keys)

            assert None not in calls
            assert watch.listening

    def test_a_server_that_is_away_at_first_is_waited_for(self, own_redis: Any, told: Told) -> None:
        with own_redis.open("t") as store:
            own_redis.kill()
            with store.watch("s", told, interval=0.02) as watch:
                assert not watch.listening
                own_redis.start()
                told.wait_for_anything()

                assert watch.listening

    def test_a_redis_that_falls_silent_is_left(self, own_redis: Any, watching: Any, told: Told, wait: Wait) -> None:
        """The connection stands, but nothing answers: after the interval and the timeout that is an outage."""
        with own_redis.open("t", timeout=0.1) as store:
            watch = watching(store, told)
            own_redis.pause()
            wait(lambda: not watch.listening)
            own_redis.resume()
            told.wait_for_anything()

    def test_silence_alone_is_no_outage(self, redis_server: Any, prefix: str, watching: Any, told: Told) -> None:
        """A server with nothing to tell is asked whether it is there, and is."""
        with redis_server.open(prefix) as store:
            watch = watching(store, told, 0.001)
            watch.add("a")
            for _ in range(3):
                before = len(told.calls)
                put(store, "a")
                told.wait(lambda before=before: len(told.calls) > before)

        assert None not in told.calls

    def test_a_slow_server_is_no_outage(
        self,
        postgres_server: Any,
        prefix: str,
        watching: Any,
        told: Told,
        caplog: pytest.LogCaptureFixture,
        wait: Wait,
    ) -> None:
        """What could not be asked now is asked later: to drop everything would only give it more to do."""
        with postgres_server.open(prefix, timeout=0.05) as store, postgres_server.open(prefix) as other:
            watch = watching(store, told)
            watch.add("a", 0)
            with psycopg.connect(postgres_server.url) as operator:
                do(operator, f"LOCK TABLE {prefix}_heads")
                wait(lambda: "cannot ask what has changed" in caplog.text)
            put(other, "a")
            told.wait(lambda: "a" in told.keys)

        assert None not in told.calls


class TestTheEnd:
    def test_a_closed_watch_tells_nothing_and_its_thread_goes(
        self, real: ServerStore, watching: Any, told: Told
    ) -> None:
        """At once, not at the end of the interval."""
        before = threads()
        watch = watching(real, told, NEVER)
        (thread,) = threads() - before
        watch.add("a", 0)
        watch.close()
        watch.close()
        thread.join(PATIENCE)
        watch.add("b")
        watch.discard("b")
        put(real, "a", "b")

        assert not thread.is_alive()
        assert (True, False, []) == (watch.closed, watch.listening, told.calls)
        assert {} == watch._watcher.known

    def test_close_does_not_wait_for_a_server_that_is_away(self, own_redis: Any, told: Told) -> None:
        before = threads()
        with own_redis.open("t") as store:
            own_redis.kill()
            watch = store.watch("s", told, interval=NEVER)
            (thread,) = threads() - before
            watch.close()
        thread.join(PATIENCE)

        assert not thread.is_alive()

    def test_close_does_not_wait_for_a_redis_that_does_not_answer(
        self, own_redis: Any, watching: Any, told: Told
    ) -> None:
        before = threads()
        with own_redis.open("t", timeout=NEVER) as store:
            watch = watching(store, told, 0.01)
            (thread,) = threads() - before
            own_redis.pause()
            watch.close()
            thread.join(PATIENCE)
            own_redis.resume()

            assert not thread.is_alive()

    def test_close_does_not_wait_for_an_answer_of_postgres(
        self, postgres_server: Any, prefix: str, watching: Any, told: Told, wait: Wait
    ) -> None:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        before = threads()
        with postgres_server.open(prefix, timeout=NEVER) as store:
            watch = watching(store, told)
            (thread,) = threads() - before
            with (
                psycopg.connect(postgres_server.url) as operator,
                psycopg.connect(postgres_server.url, autocommit=True) as looking,
            ):
                do(operator, f"LOCK TABLE {prefix}_heads")
                watch.add("a", 0)
                wait(lambda: looking.execute(waiting).fetchone() == (1,))
                watch.close()
                thread.join(PATIENCE)

                assert not thread.is_alive()

    def test_a_watch_may_be_closed_in_its_own_callback(self, real: ServerStore, watching: Any, told: Told) -> None:
        def close(keys: Any) -> None:
            watch.close()
            told(keys)

        before = threads()
        watch = watching(real, close)
        (thread,) = threads() - before
        watch.add("a", 0)
        put(real, "a")
        told.wait(lambda: told.calls)
        thread.join(PATIENCE)

        assert not thread.is_alive()

    @pytest.mark.slow
    def test_a_watch_that_nobody_holds_ends(self, real: ServerStore, watching: Any) -> None:
        """A registry that is dropped without a word, for example: the thread keeps neither it nor the watch."""

        class Holder:
            def __init__(self) -> None:
                mine = weakref.ref(self)
                self.watch = watching(real, lambda keys: mine() and None, NEVER)

        before = threads()
        holder = Holder()
        (thread,) = threads() - before
        gone = weakref.ref(holder)
        del holder
        gc.collect()
        thread.join(PATIENCE)

        assert gone() is None
        assert not thread.is_alive()

    def test_the_end_of_the_store_is_that_of_its_watches(self, real: ServerStore, watching: Any, told: Told) -> None:
        watch = watching(real, told, NEVER)
        real.close()

        assert watch.closed
        with pytest.raises(StoreError, match="is closed"):
            real.watch("s", told)

    @pytest.mark.slow
    def test_a_watch_holds_no_store(self, server: Any, prefix: str, watching: Any, told: Told) -> None:
        """A store that nobody holds is collected (and warns that it was not closed) even while it is watched."""
        store = server.open(prefix)
        watch = watching(store, told, NEVER)
        gone = weakref.ref(store)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one that is kept would keep the store, too
            del store
            gc.collect()

        assert gone() is None
        assert not watch.closed

    @pytest.mark.slow
    def test_after_a_fork_the_watch_is_the_parents(
        self, real: ServerStore, watching: Any, told: Told, wait: Wait
    ) -> None:
        """In the child it is closed, and a new one can be made; that of the parent does not notice."""
        watch = watching(real, told)
        watch.add("a", 0)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert watch.closed
                watch.add("b")
                watch.close()
                del watch
                gc.collect()
                mine = Told()
                with real.watch("s", mine, interval=0.02) as again:
                    wait(lambda: again.listening)
                    again.add("c", 0)
                    put(real, "c")
                    mine.wait(lambda: "c" in mine.keys)
                real.close()
                status = 0
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        put(real, "a")
        told.wait(lambda: "a" in told.keys)

        assert 0 == code
        assert (False, {"a"}) == (None in told.calls, told.keys)

    def test_where_no_thread_can_be_started_that_is_an_error(
        self, real: ServerStore, monkeypatch: pytest.MonkeyPatch, told: Told
    ) -> None:
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                real.watch("s", told)


class ALine:
    """A line that does what the test says."""

    tells = False
    plug: socket.socket | None = None

    def __init__(self, waits: Callable[[Watcher], Any]) -> None:
        self.waits = waits
        self.closed = False

    def wait(self, watcher: Watcher) -> Any:
        return self.waits(watcher)

    def close(self) -> None:
        self.closed = True
        raise OSError("it is broken anyway")


class TestClosedInBetween:
    """Whenever a watch is closed, nothing is told any more."""

    def test_while_the_line_is_opened(self, told: Told) -> None:
        def open_line(watcher: Watcher) -> ALine:
            watcher.stop()
            return line

        line = ALine(lambda watcher: None)
        Watcher("w", open_line, told, NEVER).run()

        assert ([], True) == (told.calls, line.closed)

    def test_while_something_comes_in(self, told: Told) -> None:
        def wait(watcher: Watcher) -> None:
            watcher.stop()

        line = ALine(wait)
        Watcher("w", lambda watcher: line, told, NEVER).run()

        assert ([], True) == (told.calls, line.closed)

    def test_while_the_server_is_asked(self, told: Told) -> None:
        """It is asked no further."""
        asked: list[int] = []

        def ask(digests: list[bytes]) -> list[bytes | None]:
            asked.append(len(digests))
            watcher.stop()
            return [None] * len(digests)

        line = Probe(ask, lambda: None, None)
        watcher = Watcher("w", lambda watcher: line, told, 0.001)
        watcher.known = {bytes([n // 256, n % 256]): Known(n, 1) for n in range(1500)}
        watcher.run()

        assert ([1000], []) == (asked, told.calls)

    def test_while_a_key_is_added(self, told: Told, watching: Any) -> None:
        def digest(key: Any) -> bytes:
            watch.close()
            return b"digest"

        line = ALine(lambda watcher: watcher.sleep(NEVER))
        watch = Watch("w", digest, lambda watcher: line, told, NEVER)
        watch.add("a")

        assert {} == watch._watcher.known


def test_in_a_forked_child_the_line_is_left_alone(told: Told) -> None:
    """It is the parent's: not even a goodbye may be said on it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = ALine(lambda watcher: None)
        line.plug = ours
        watcher = Watcher("w", lambda watcher: line, told, NEVER)
        watcher._line = line
        watcher._after_fork()
        watcher.stop()
        theirs.send(b"still there")

        assert b"still there" == ours.recv(99)
        assert (True, False) == (watcher.stopped(), line.closed)


def test_a_line_that_breaks_at_once_is_opened_later_and_later(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a proxy whose server is away: it lets everybody in."""
    delays: list[float] = []

    def refuse(watcher: Watcher) -> None:
        raise OSError("broken")

    def sleep(delay: float) -> None:
        delays.append(delay)
        if len(delays) == 8:
            watcher.stop()

    monkeypatch.setattr("hygiene.stores.watching.random.uniform", lambda low, high: high)
    watcher = Watcher("w", lambda watcher: ALine(refuse), told, 5.0)
    monkeypatch.setattr(watcher, "sleep", sleep)
    watcher.run()

    assert [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0] == delays
    assert [None] * 7 == told.calls


def test_what_it_says_of_itself(redis_server: Any, prefix: str, watching: Any, told: Told) -> None:
    with redis_server.open(prefix) as store:
        watch = watching(store, told, NEVER)
        watch.add("a")
        name = f"<Watch store {store.address}: watch of 's'"
        found = repr(watch)
        watch.close()

        assert f"{name}: 1 keys, listening>" == found
        assert f"{name}: 0 keys, closed>" == repr(watch)


def test_wrong_arguments_are_said_at_once(real: ServerStore, told: Told) -> None:
    with pytest.raises(TypeError, match="changed must be callable; found 5"):
        real.watch("s", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="interval must be positive"):
        real.watch("s", told, interval=0)


@pytest.mark.parametrize(
    ("version", "rows", "expected"),
    [
        (None, "ab", [True, True]),
        (None, "a-", [True, True]),
        (7, "aa-", [False, False, True]),
        (7, "ca", [False, True]),
        (7, "b", [True]),
        (0, "-a-", [False, True, True]),
        (7, "!!", [True, False]),
        (7, "?", [True]),
    ],
    ids=str,
)
def test_a_head_is_known_again_by_who_saved_it(version: int | None, rows: str, expected: list[bool]) -> None:
    """The same version by another save, as after a fail-over, is another one; a damaged head fits nothing."""
    ref = refer("s", "k")
    heads = {
        "a": State(1, 7, False, 1, 1, 0.0, None, ()).seal(ref),
        "b": State(2**62, 8, False, 1, 1, 0.0, None, ()).seal(ref),
        "c": State(2**62 + 1, 7, False, 1, 1, 0.0, None, ()).seal(ref),
        "!": b"\0\0\0\0\xc1",
        "?": b"\0\0\0\0\x90",
        "-": None,
    }
    known = Known("k", version)

    assert expected == [known.differs(heads[name]) for name in rows]


@pytest.mark.slow
def test_postgres_asks_for_no_more_than_it_has_to(postgres_server: Any, prefix: str) -> None:
    """Heads are found by an index, a thousand with one question."""
    with postgres_server.open(prefix) as store:
        assert isinstance(store, PostgresStore)
        put(store, *range(3000))
        with psycopg.connect(postgres_server.url, autocommit=True) as operator:
            do(operator, f"ANALYZE {prefix}_heads")
        digests = [refer("s", n).digest for n in range(20)]
        plan = store._rows("EXPLAIN SELECT digest, state FROM {0}_heads WHERE digest = ANY(%s)", (digests,))

        assert f"{prefix}_heads_digest_key" in str(plan)
