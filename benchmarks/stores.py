"""Stores beside what people keep conversations in today: time, and bytes written to disk.

A conversation is a list of messages. Who can add a message to it does so; who can only save it whole does that each
time, as programs do that use him. All are as they are by default, and each has got a message as far as it takes it when
a turn ends: ours is flushed, others commit each time they are called. What is written has then reached the operating
system, and with sqlitedict, whose default that is, the disk. Where bytes are held against a limit, ours is flushed
after each 50 messages: in a program with people a save is over before the next is due, and in a loop several would run
together and write less.

Times are those of the clock, since some work in another thread: a busy machine is in them. Contenders take turns
within each round, and what is quoted is the median over the rounds of the ratio within a round. Bytes are those that
the process has handed to the operating system (``wchar`` in Linux' ``/proc/self/io``), from the second message of a new
store until it is closed: log, pages, checkpoint and all, each as often as it was written. Pages that the system writes
of shared memory are not in them: SQLite's index of its log. For Redis, which writes in a process of its own, they are
the growth of its append-only file.
"""

from __future__ import annotations

import collections
import importlib
import random
import shelve
import shutil
import socket
import sqlite3
import statistics
import subprocess
import tempfile
import time
import warnings
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from benchmarks.registries import Report, Row, Series, measure, ratio
from hygiene import Registry
from hygiene.stores import Store, open_store
from hygiene.stores.protocol import SaveLog, SaveValue
from hygiene.writebehind import WriteBehind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["ABSENT", "FULL", "QUICK", "Sizes", "run"]

ABSENT: dict[str, str] = {}  # what cannot be measured here, and why
RAW, BLOB = "sqlite3", "sqlite3, one row"
OURS, ALONE, VALUE, REGISTRY = "WriteBehind", "SQLiteStore alone", "SQLiteStore, a value", "Registry(store)"
REDIS, OURS_REDIS = "redis-py", "WriteBehind on Redis"
APPENDING = (RAW, OURS, ALONE, REGISTRY, REDIS, OURS_REDIS)  # who can add a message to a conversation
BATCH = 50
ITEMS = 10  # of the conversation that is put and got: 2 KB
LONG, SHORT = 205, 48  # bytes of a message, encoded
WRITTEN = 5.0  # times the payload
COUNTED = Path("/proc/self/io")
FIRST = {"role": "user", "content": ""}
PATIENCE = 20.0  # seconds until a server answers

Message = dict[str, str]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; numbers of rounds, calls, messages, conversations."""

    rounds: int = 21
    calls: int = 50
    growing: int = 1_000
    growing_rounds: int = 3
    batches: int = 20
    batched_rounds: int = 15
    many: int = 20_000
    conversations: int = 1_000
    many_rounds: int = 3
    enqueued: int = 1_000
    enqueue_rounds: int = 51


FULL = Sizes()
QUICK = Sizes(
    rounds=5,
    calls=20,
    growing=200,
    growing_rounds=1,
    batches=10,
    batched_rounds=5,
    many=500,
    conversations=50,
    many_rounds=1,
    enqueue_rounds=15,
)


class Keeper(Protocol):
    """What is asked of everybody."""

    def put(self, key: str, messages: list[Message], /) -> object:
        """Save a conversation whole."""
        ...

    def get(self, key: str, /) -> list[Message]:
        """Load it."""
        ...

    def append(self, key: str, message: Message, /) -> object:
        """Add a message."""
        ...

    def extend(self, key: str, messages: list[Message], /) -> object:
        """Add several at once."""
        ...

    def flush(self) -> object:
        """Have everything saved."""
        ...

    def close(self) -> object:
        """Let go of it."""
        ...


class Raw:
    """The standard library's sqlite3, with a row for each message and a transaction for each call."""

    def __init__(self, folder: Path) -> None:
        self.connection = sqlite3.connect(folder / "raw.db", isolation_level=None)
        self.connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
            "CREATE TABLE messages (conversation TEXT, sequence INTEGER, data BLOB,"
            " PRIMARY KEY (conversation, sequence)) WITHOUT ROWID;"
        )
        self.lengths: dict[str, int] = {}  # a program knows how many it has

    def put(self, key: str, messages: list[Message]) -> None:
        """The old rows leave, the new ones come."""
        self.connection.execute("BEGIN")
        self.connection.execute("DELETE FROM messages WHERE conversation = ?", (key,))
        self.lengths[key] = 0
        self._insert(key, messages)
        self.connection.execute("COMMIT")

    def get(self, key: str) -> list[Message]:
        """Its rows in order."""
        select = "SELECT data FROM messages WHERE conversation = ? ORDER BY sequence"
        return [_decode(data) for (data,) in self.connection.execute(select, (key,))]

    def append(self, key: str, message: Message) -> None:
        """A row."""
        number = self.lengths.get(key, 0)
        self.connection.execute("INSERT INTO messages VALUES (?, ?, ?)", (key, number, _encode(message)))
        self.lengths[key] = number + 1

    def extend(self, key: str, messages: list[Message]) -> None:
        """Rows in one transaction."""
        self.connection.execute("BEGIN")
        self._insert(key, messages)
        self.connection.execute("COMMIT")

    def _insert(self, key: str, messages: list[Message]) -> None:
        number = self.lengths.get(key, 0)
        rows = [(key, place, _encode(message)) for place, message in enumerate(messages, number)]
        self.connection.executemany("INSERT INTO messages VALUES (?, ?, ?)", rows)
        self.lengths[key] = number + len(rows)

    def flush(self) -> None:
        """It is committed."""

    def close(self) -> None:
        """The log goes into the file."""
        self.connection.close()


class Whole:
    """Who saves a conversation whole: the program holds it, and saves it again after each change."""

    def __init__(self) -> None:
        self.held: dict[str, list[Message]] = {}

    def put(self, key: str, messages: list[Message]) -> None:
        """Save it whole."""
        raise NotImplementedError

    def append(self, key: str, message: Message) -> None:
        """Hold one more, save all."""
        self.extend(key, [message])

    def extend(self, key: str, messages: list[Message]) -> None:
        """Hold more, save all."""
        held = self.held.setdefault(key, [])
        held.extend(messages)
        self.put(key, held)

    def flush(self) -> None:
        """It is committed."""


class Blob(Whole):
    """The standard library's sqlite3, with a row for each conversation."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.connection = sqlite3.connect(folder / "blob.db", isolation_level=None)
        self.connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
            "CREATE TABLE conversations (name TEXT PRIMARY KEY, data BLOB) WITHOUT ROWID;"
        )

    def put(self, key: str, messages: list[Message]) -> None:
        """One row."""
        self.connection.execute("INSERT OR REPLACE INTO conversations VALUES (?, ?)", (key, _encode(messages)))

    def get(self, key: str) -> list[Message]:
        """One row."""
        select = "SELECT data FROM conversations WHERE name = ?"
        found: list[Message] = _decode(self.connection.execute(select, (key,)).fetchone()[0])
        return found

    def close(self) -> None:
        """The log goes into the file."""
        self.connection.close()


class Items(Whole):
    """Who is used as a dict that has to be told to keep what it holds."""

    def __init__(self, items: Any, commit: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.items, self.commit = items, commit

    def put(self, key: str, messages: list[Message]) -> None:
        """An item."""
        self.items[key] = messages
        self.commit()

    def get(self, key: str) -> list[Message]:
        """An item."""
        found: list[Message] = self.items[key]
        return found

    def close(self) -> None:
        """To the end."""
        self.items.close()


class LangGraph(Whole):
    """LangGraph's checkpointer, called as its graphs call it: a checkpoint after each message, and all are kept."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        saver: Any = _imported("langgraph.checkpoint.sqlite").SqliteSaver
        self.empty: Any = _imported("langgraph.checkpoint.base").empty_checkpoint
        self.connection = sqlite3.connect(folder / "graph.db", check_same_thread=False)
        self.saver = saver(self.connection)
        self.saver.setup()
        self.count = 0

    def put(self, key: str, messages: list[Message]) -> None:
        """A checkpoint."""
        self.count += 1
        version = f"{self.count:032}"
        checkpoint = {
            **self.empty(),
            "id": version,
            "channel_values": {"messages": messages},
            "channel_versions": {"messages": version},
        }
        config = {"configurable": {"thread_id": key, "checkpoint_ns": ""}}
        self.saver.put(config, checkpoint, {"source": "loop", "step": self.count}, {"messages": version})

    def get(self, key: str) -> list[Message]:
        """The latest checkpoint."""
        config = {"configurable": {"thread_id": key, "checkpoint_ns": ""}}
        found: list[Message] = self.saver.get_tuple(config).checkpoint["channel_values"]["messages"]
        return found

    def close(self) -> None:
        """The log goes into the file."""
        self.connection.close()


class RawRedis:
    """redis-py with a list for each conversation."""

    def __init__(self, url: str) -> None:
        self.client: Any = _imported("redis").Redis.from_url(url)
        self.client.flushdb()

    def put(self, key: str, messages: list[Message]) -> None:
        """The old list leaves, a new one comes."""
        with self.client.pipeline() as pipeline:
            pipeline.delete(key)
            pipeline.rpush(key, *map(_encode, messages))
            pipeline.execute()

    def get(self, key: str) -> list[Message]:
        """All of a list."""
        return [_decode(data) for data in self.client.lrange(key, 0, -1)]

    def append(self, key: str, message: Message) -> None:
        """To the end of a list."""
        self.client.rpush(key, _encode(message))

    def extend(self, key: str, messages: list[Message]) -> None:
        """The same."""
        self.client.rpush(key, *map(_encode, messages))

    def flush(self) -> None:
        """It has answered."""

    def close(self) -> None:
        """Let go of the connection."""
        self.client.close()


def _loaded(store: Store, key: str) -> list[Message]:
    record = store.load("default", key)
    if record is None:
        raise LookupError(f"{key} is not in {store!r}")
    found: list[Message] = record.value
    return found


class Behind:
    """Ours, as it is by default; a conversation is a log."""

    def __init__(self, address: str, **options: Any) -> None:
        self.store = open_store(address, **options)
        self.behind = WriteBehind(self.store)
        self.append, self.extend, self.put = self.behind.append, self.behind.extend, self.behind.replace
        self.flush = self.behind.flush

    def get(self, key: str) -> list[Message]:
        """From the store."""
        return _loaded(self.store, key)

    def close(self) -> None:
        """What is pending is saved."""
        self.behind.close()
        self.store.close()


class Alone:
    """Our store without anything before it: a save for each call."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(f"sqlite:{folder / 'alone.db'}")

    def put(self, key: str, messages: list[Message]) -> None:
        """A log anew."""
        self.store.save([SaveLog("default", key, append=list(map(self.store.encode, messages)), replace=True)])

    def get(self, key: str) -> list[Message]:
        """From the store."""
        return _loaded(self.store, key)

    def append(self, key: str, message: Message) -> None:
        """An item."""
        self.store.save([SaveLog("default", key, append=(self.store.encode(message),))])

    def extend(self, key: str, messages: list[Message]) -> None:
        """Items."""
        self.store.save([SaveLog("default", key, append=list(map(self.store.encode, messages)))])

    def flush(self) -> None:
        """It is committed."""

    def close(self) -> None:
        """The log goes into the file."""
        self.store.close()


class Value(Whole):
    """The same with conversations that are saved whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.store = open_store(f"sqlite:{folder / 'value.db'}")

    def put(self, key: str, messages: list[Message]) -> None:
        """A value."""
        self.store.save([SaveValue("default", key, self.store.encode(messages))])

    def get(self, key: str) -> list[Message]:
        """From the store."""
        return _loaded(self.store, key)

    def close(self) -> None:
        """The log goes into the file."""
        self.store.close()


class Kept:
    """A registry that keeps its conversations in a store."""

    def __init__(self, folder: Path) -> None:
        options: dict[str, Any] = {"store": f"sqlite:{folder / 'kept.db'}", "name": "kept"}
        self.registry: Registry[str, list[Message]] = Registry(maxsize=100_000, **options)
        self.put = self.registry.__setitem__
        self.flush: Callable[[], object] = self.registry.flush  # type: ignore[attr-defined, unused-ignore]

    def get(self, key: str) -> list[Message]:
        """From the store, since it has left."""
        self.registry.evict(key)
        return list(self.registry[key])

    def append(self, key: str, message: Message) -> None:
        """What a program does."""
        self.extend(key, [message])

    def extend(self, key: str, messages: list[Message]) -> None:
        """The same."""
        held = self.registry
        if key not in held:
            held[key] = []
        held[key].extend(messages)

    def close(self) -> None:
        """What is pending is saved."""
        self.registry.close()


def _imported(name: str) -> Any:
    """The module, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _diskcache(folder: Path) -> Keeper:
    return Items(_imported("diskcache").Cache(str(folder / "cache")))


def _sqlitedict(folder: Path) -> Keeper:
    items = _imported("sqlitedict").SqliteDict(str(folder / "dict.db"))
    return Items(items, items.commit)


def _shelve(folder: Path) -> Keeper:
    return Items(shelve.open(str(folder / "shelf")))  # noqa: S301 - its own files, just made


MAKERS: dict[str, Callable[[Path], Keeper]] = {
    RAW: Raw,
    BLOB: Blob,
    OURS: lambda folder: Behind(f"sqlite:{folder / 'ours.db'}"),
    ALONE: Alone,
    VALUE: Value,
    REGISTRY: Kept,
    "diskcache": _diskcache,
    "sqlitedict": _sqlitedict,
    "shelve": _shelve,
    "langgraph SqliteSaver": LangGraph,
}


class Server:
    """A Redis server of our own, with its append-only file synced every second, as is its default."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise FileNotFoundError("the program redis-server is not there")
        redis = _imported("redis")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        command += ["--appendonly", "yes", "--auto-aof-rewrite-percentage", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client: Any = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.client.ping()
            except redis.RedisError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.close()
                    raise
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.02)
            else:
                return

    def written(self) -> int:
        """Bytes of the append-only file."""
        return int(self.client.info("persistence")["aof_current_size"])

    def close(self) -> None:
        """The end of it."""
        self.client.close()
        self.process.kill()
        self.process.wait(PATIENCE)


def written() -> int:
    """Bytes that this process has handed to the system to write."""
    return int(COUNTED.read_text().split("wchar:")[1].split()[0])


class Bench:
    """
    Everybody who is there, in folders of their own.

    Args:
        absent: Is told who is not, and why.
    """

    def __init__(self, absent: dict[str, str]) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hygiene-stores-")))
        self._count = 0
        self.makers: dict[str, Callable[[Path], Keeper]] = {}
        self.counts: dict[str, Callable[[], int]] = {}
        makers = dict(MAKERS)
        try:
            server = self._stack.enter_context(closing(Server(self.folder)))
        except Exception as error:  # noqa: BLE001 - not there, not startable: either way it is named with the reason
            absent[REDIS] = absent[OURS_REDIS] = f"{type(error).__name__}: {error}"
        else:
            makers[REDIS] = lambda _: RawRedis(server.url)
            makers[OURS_REDIS] = lambda folder: Behind(server.url, prefix=folder.name)
            self.counts = {REDIS: server.written, OURS_REDIS: server.written}
        for name, make in makers.items():
            try:
                self.makers[name] = make  # who cannot do what is asked of all is left out
                self._try(name)
            except Exception as error:  # noqa: BLE001 - whatever it is
                del self.makers[name]
                absent[name] = f"{type(error).__name__}: {error}"

    def _try(self, name: str) -> None:
        messages = conversation(ITEMS, LONG)
        with self.opened(name) as keeper:
            keeper.put("key", messages[:1])
            keeper.append("other", messages[0])
            keeper.extend("other", messages[1:])
            keeper.flush()
            if keeper.get("key") != messages[:1] or keeper.get("other") != messages:
                raise LookupError("it gives back something else than was put")

    @contextmanager
    def opened(self, name: str) -> Iterator[Keeper]:
        """A new one of that name, in a new folder, which is deleted afterwards."""
        self._count += 1
        folder = self.folder / f"k{self._count}"
        folder.mkdir()
        try:
            with closing(self.makers[name](folder)) as keeper:
                yield keeper
        finally:
            shutil.rmtree(folder)

    def written(self, name: str) -> int:
        """Bytes written so far by whoever writes for *name*."""
        return self.counts.get(name, written)()

    def close(self) -> None:
        """The end of the server and of all folders."""
        self._stack.close()


_bench: list[Bench] = []  # of the run that is going on: a section is called with sizes and report only


def run(sizes: Sizes, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything; *progress* is told what comes next."""
    report = Report(absent=dict(ABSENT), base=RAW)
    progress("Who is there")
    with closing(Bench(report.absent)) as bench:
        _bench.append(bench)
        try:
            return measure([whole, growing, growing_short, batched, many, enqueue, edits], sizes, report, progress)
        finally:
            _bench.remove(bench)


def conversation(messages: int, size: int) -> list[Message]:
    """Messages of *size* bytes each, once encoded."""
    draw = random.Random(messages)
    # How many bytes the frame takes depends on how long the text is.
    length = next(n for n in range(size, 0, -1) if len(_encode({"role": "user", "content": "x" * n})) == size)
    found = []
    for number in range(messages):
        role = "user" if number % 2 == 0 else "bot."
        text = "".join(draw.choices("etaoin shrdlu", k=length))
        found.append({"role": role, "content": text})
    return found


def payload(messages: Sequence[Message]) -> int:
    """Bytes of *messages*, encoded one by one."""
    return sum(len(_encode(message)) for message in messages)


def take_turns(
    turns: dict[str, Callable[[int], object]],
    rounds: int,
    calls: int,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Series:
    """Nanoseconds a call, by contender and round; who begins changes from round to round."""
    names = list(turns)
    series: Series = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = clock()
            turns[name](number)
            series[name].append((clock() - start) / calls)
    return series


def against(series: Series, name: str, to: str, what: str, limit: float | None = None, note: str = "") -> Row:
    """How many times as long *name* took as *to*."""
    if name not in series or to not in series:
        return Row(what, None, "x", limit, note="not all of it is installed")
    return Row(what, ratio(series, name, to), "x", limit, note=note)


def whole(sizes: Sizes, report: Report) -> None:
    """Conversations of 2 KB, put and got."""
    bench, calls = _bench[-1], sizes.calls
    messages = conversation(ITEMS, LONG)
    with ExitStack() as stack:
        keepers = {name: stack.enter_context(bench.opened(name)) for name in bench.makers}

        def put(keeper: Keeper, number: int) -> None:
            for place in range(calls):
                keeper.put(f"{number}-{place}", messages)
            keeper.flush()

        def get(keeper: Keeper, number: int) -> None:
            for place in range(calls):
                keeper.get(f"{number}-{place}")

        puts = take_turns({name: partial(put, keeper) for name, keeper in keepers.items()}, sizes.rounds, calls)
        gets = take_turns({name: partial(get, keeper) for name, keeper in keepers.items()}, sizes.rounds, calls)
    report.note_times("put of a conversation of 2 KB", puts)
    report.note_times("get of it", gets)
    same = "with a row for each message"
    report.rows += [
        against(puts, OURS, RAW, f"put of a conversation of 2 KB, {ITEMS} messages, against sqlite3", note=same),
        against(gets, OURS, RAW, "rehydrating it from the store, against a sqlite3 read of it", 3.0, same),
        against(gets, VALUE, BLOB, "the same of one saved whole, against a sqlite3 read of it", 3.0, "one row each"),
        against(gets, REGISTRY, RAW, "the same through a registry", note="with the eviction before"),
    ]


def grow(sizes: Sizes, report: Report, size: int) -> None:
    """A conversation that grows message by message: what it takes, and what it writes."""
    bench, count = _bench[-1], sizes.growing
    messages = conversation(count, size)
    what = f"append, one at a time, to {count:,} messages of {size} bytes"

    def append(keeper: Keeper) -> None:
        for number, message in enumerate(messages, 1):
            keeper.append("conversation", message)
            if number % BATCH == 0:
                keeper.flush()  # or the saves that are due would run together, as they do not when people write
        keeper.flush()

    times, bytes_ = _fresh(bench, append, sizes.growing_rounds, count)
    report.note_times(what, times)
    report.rows.append(against(times, OURS, RAW, f"{what}: time, against sqlite3 with a commit each"))
    report.rows += _written(bytes_, payload(messages), what, (OURS, REGISTRY))


def growing(sizes: Sizes, report: Report) -> None:
    """A conversation that grows message by message."""
    grow(sizes, report, LONG)


def growing_short(sizes: Sizes, report: Report) -> None:
    """The same with short messages."""
    grow(sizes, report, SHORT)


def _fresh(
    bench: Bench, work: Callable[[Keeper], object], rounds: int, calls: int, *, names: Sequence[str] = ()
) -> tuple[Series, Series]:
    """Time a call and bytes in all, each time in a new store that has one message; the bytes until it is closed."""
    names = [name for name in names or bench.makers if name in bench.makers]
    times: Series = {name: [] for name in names}
    bytes_: Series = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with bench.opened(name) as keeper:
                # The first save of all begins the log, and waits for the disk to have its header.
                keeper.append("before", FIRST)
                keeper.flush()
                before = bench.written(name) if COUNTED.exists() else 0
                start = time.perf_counter_ns()
                work(keeper)
                times[name].append((time.perf_counter_ns() - start) / calls)
                keeper.close()  # again does nothing
                if COUNTED.exists():
                    bytes_[name].append(float(bench.written(name) - before))
    return times, bytes_


def _written(bytes_: Series, size: int, what: str, limited: Sequence[str]) -> Iterator[Row]:
    """Rows of what was written, in multiples of the payload; those of ours come first."""
    for name in (*limited, *(name for name in bytes_ if name not in limited)):
        limit = WRITTEN if name in limited else None
        row = f"{name}: written for {what}, times the payload"
        if not bytes_.get(name):
            note = "only Linux counts them" if name in bytes_ else "not all of it is installed"
            yield Row(row, None, "x", limit, note=note)
            continue
        note = "growth of the append-only file" if name in {REDIS, OURS_REDIS} else "wchar, until it is closed"
        yield Row(row, statistics.median(bytes_[name]) / size, "x", limit, note=note)


def batched(sizes: Sizes, report: Report) -> None:
    """Messages in batches of 50."""
    bench, count = _bench[-1], sizes.batches * BATCH
    messages = conversation(count, LONG)
    batches = [messages[start : start + BATCH] for start in range(0, count, BATCH)]

    def extend(keeper: Keeper) -> None:
        for batch in batches:
            keeper.extend("conversation", batch)
        keeper.flush()

    times, bytes_ = _fresh(bench, extend, sizes.batched_rounds, count, names=APPENDING)
    what = f"{count:,} messages in batches of {BATCH}"
    report.note_times(what, times)
    report.rows += [
        against(times, OURS, RAW, f"{what}, against sqlite3 with a commit a batch", 2.0),
        against(times, ALONE, RAW, "- and a save for each batch, nothing behind", 2.0),
        against(times, REGISTRY, RAW, "- through a registry"),
    ]
    report.rows += _written(bytes_, payload(messages), what, ())


def many(sizes: Sizes, report: Report) -> None:
    """Many messages over many conversations, one at a time."""
    bench, count = _bench[-1], sizes.many
    messages = conversation(count, LONG)
    draw = random.Random(count)
    keys = [f"user-{draw.randrange(sizes.conversations)}" for _ in range(count)]

    def append(keeper: Keeper) -> None:
        for key, message in zip(keys, messages, strict=True):
            keeper.append(key, message)
        keeper.flush()

    what = f"append of {count:,} messages to {sizes.conversations:,} conversations at random"
    # Who saves a conversation whole takes minutes for it, and once tells enough.
    times, bytes_ = _fresh(bench, append, 1, count)
    report.note_times(what, times)
    once = report.nanoseconds[what], report.ratios[what]
    times, more = _fresh(bench, append, sizes.many_rounds, count, names=APPENDING)
    report.note_times(what, times)
    report.nanoseconds[what] = once[0] | report.nanoseconds[what]
    report.ratios[what] = once[1] | report.ratios[what]
    bytes_ |= more
    report.rows.append(against(times, OURS, RAW, f"{what}: time, against sqlite3 with a commit each"))
    report.rows += _written(bytes_, payload(messages), what, ())

    def append_slowly(keeper: Keeper) -> None:
        for number, (key, message) in enumerate(zip(keys, messages, strict=True), 1):
            keeper.append(key, message)
            if number % BATCH == 0:
                keeper.flush()

    what = f"{what}, slowly"
    times, bytes_ = _fresh(bench, append_slowly, 1, count, names=(OURS, REGISTRY))
    slowly = "a save for each 50 messages, most of another conversation"
    report.rows += [replace(row, note=f"{row.note}; {slowly}") for row in _written(bytes_, payload(messages), what, ())]


def enqueue(sizes: Sizes, report: Report) -> None:
    """What the caller waits for, beyond the encoding."""
    count = sizes.enqueued
    (message,) = conversation(1, LONG)
    keys = [f"user-{number}" for number in range(count)]
    bench = _bench[-1]
    with ExitStack() as stack:
        store = stack.enter_context(open_store(f"sqlite:{bench.folder / 'enqueue.db'}"))
        behind = stack.enter_context(WriteBehind(store))
        encode = store.encode

        def encoding(_: int) -> None:
            for key in keys:
                encode(message, key)

        def append_one(_: int) -> None:
            for _key in keys:
                behind.append("conversation", message)

        def append_many(_: int) -> None:
            for key in keys:
                behind.append(key, message)

        def put(_: int) -> None:
            for key in keys:
                behind.put(f"v-{key}", message)

        turns = {
            "encoding alone": encoding,
            "append to one conversation": append_one,
            f"append to {count:,} conversations": append_many,
            f"put of {count:,} values": put,
        }
        series: Series = {name: [] for name in turns}
        names = list(turns)
        for number in range(sizes.enqueue_rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                behind.flush()
                # The thread's own time: that the writer works meanwhile is what it is there for.
                start = time.thread_time_ns()
                turns[name](number)
                series[name].append((time.thread_time_ns() - start) / count)
    report.note_times("enqueue", series)
    for name in names[1:]:
        beyond = statistics.median(a - b for a, b in zip(series[name], series[names[0]], strict=True)) / 1000
        note = f"{beyond:.2f} us, processor time of the caller; encoding 205 bytes takes another "
        note += f"{statistics.median(series[names[0]]) / 1000:.2f} us"
        report.rows.append(Row(f"enqueue, beyond encoding: {name}", beyond, "us", 2.0, note=note))


def edits(sizes: Sizes, report: Report) -> None:
    """What it costs to look for changes inside the messages of a conversation."""
    messages, bench = conversation(sizes.growing, 250), _bench[-1]
    times: Series = {"append": [], "encoding alone": [], "flush after a loop": [], "flush of what nobody has read": []}

    def each(do: Callable[[Message], object], items: Sequence[Message]) -> None:
        for message in items:
            do(message)

    def timed(name: str, calls: int, do: Callable[..., object], *arguments: Any) -> None:
        start = time.thread_time_ns()  # whatever else runs on the machine
        do(*arguments)
        times[name].append((time.thread_time_ns() - start) / calls)

    with ExitStack() as stack:
        store = stack.enter_context(open_store(f"sqlite:{bench.folder / 'edits.db'}"))
        writer = stack.enter_context(WriteBehind(store, space="edits", every=10**6, interval=10**6))
        chats: Registry[str, list[Message]] = stack.enter_context(Registry(maxsize=10**6, store=writer))
        for number in range(sizes.rounds):
            history = chats.setdefault(str(number), [])
            new = [dict(message) for message in messages]
            timed("encoding alone", len(new), each, store.encode, new)
            timed("append", len(new), each, history.append, new)
            del new
            chats.flush()
            chats.flush()
            timed("flush of what nobody has read", 1, chats.flush)
            collections.deque(history, maxlen=0)
            timed("flush after a loop", 1, chats.flush)
    report.note_times("edits", times)
    what = f"flush of {len(messages):,} messages of 250 bytes"
    for name in ("flush after a loop", "flush of what nobody has read"):
        report.rows.append(Row(f"{what}: {name}", min(times[name]) / 10**6, "ms", 2.0, note="processor time, the best"))
    beyond = statistics.median(a - b for a, b in zip(times["append"], times["encoding alone"], strict=True)) / 1000
    report.rows.append(Row("append to a stored history, beyond encoding", beyond, "us", None, note="processor time"))
