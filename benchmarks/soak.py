"""Everything together for as long as one likes: what does not show in a second shows in ten minutes.

Made-up users write to a bot, from threads and from the tasks of an event loop. A few of them write most of what is
written, and new ones come all the time. With hygiene, a message opens a managed session, takes a resource of a pool,
leases the user's conversation (a `History` in a `Registry` in front of an SQLite file) and adds to it; who wrote last
is in a second registry, each with a cleanup for the exit. Without, the same is in dicts and lists, and none is saved.

Each has a process of its own, and they take turns of a second: with hygiene as many messages as fit, then the very same
ones without. Now and then there is a night in which nobody writes. The resident memory is read after each turn.

Nothing may be lost: each message has a number, and who adds one looks at that of the last. At the end the file is
opened anew, and has to hold the last messages of each user who ever wrote, in order, as many as a history keeps.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.registries import Report, Row
from hygiene import AsyncPool, History, Pool, Registry, WriteBehind, managed_session, register_cleanup, shutdown
from hygiene.errors import StoreUnavailable
from hygiene.janitor import janitor
from hygiene.memory import rss
from hygiene.stores import SQLiteStore
from hygiene.trend import mann_kendall, theil_sen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

__all__ = ["FULL", "QUICK", "Ending", "Sample", "Sizes", "Soak", "chart", "growth", "run"]

OURS, PLAIN = "with hygiene", "without"
MIB = 2**20
GROWTH, CORE = 2.0, 1.0  # percent: of the resident memory over the last half, and of one core
NEW = 0.05  # of the messages are somebody's first
RECENT = 0.4  # of the others come from who is new rather than from who has been here for long
LENGTH = 120  # letters, on average
BUFFER = 16_384  # bytes of a resource
STEPS = 8  # a latency is known to within a factor of 2 ** (1 / 8), which is 9 %
TASKS_POOL, THREADS_POOL = 4, 2  # fewer than who wants one
PATIENCE = 120.0  # seconds beyond its turn, after which a process is taken to hang
TASK = Path("/proc/self/task")

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured; times are seconds of the clock."""

    seconds: float = 600.0
    turn: float = 1.0
    day: float = 45.0
    night: float = 5.0
    idle: float = 3.0
    # So small that the windows of those who seldom write are full after the first half, too: what grows then is a leak.
    maxsize: int = 500
    maxlen: int = 20
    threads: int = 3
    tasks: int = 8
    users: int = 100_000  # of each thread and task, at most: what the check has to know of them has its room at once
    ceiling: int = 6 * 2**30  # bytes of resident memory at which the one without hygiene is stopped


FULL = Sizes()
QUICK = Sizes(seconds=20.0, day=8.0, night=2.5, idle=1.5, users=20_000)


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at the end of a turn."""

    seconds: float
    """That it has worked, so far."""
    done: tuple[int, ...]
    """Messages of each thread and task in this turn."""
    rss: int
    entries: int
    """Conversations in memory."""
    held: int
    """Messages in them."""
    blocks: int
    """Pieces of memory that Python's own allocator has given out: an object is one or a few."""
    janitor: float | None
    """Seconds of processor time that the janitor's thread has had; ``None`` where the system does not tell."""
    started: float = 0.0
    """When the turn began, in seconds since the run began; set by who asked for it."""


@dataclass(slots=True)
class Ending:
    """What a process has to say at its end."""

    latencies: dict[str, list[int]] = field(default_factory=dict)
    """By threads and tasks: messages by time taken, see `percentile`."""
    counts: dict[str, int] = field(default_factory=dict)
    said: str = ""


class Tally:
    """How many were opened and closed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.opened = self.closed = self.faults = 0

    def open(self) -> None:
        """One more."""
        with self._lock:
            self.opened += 1

    def close(self, *, again: bool) -> None:
        """One less, or a fault if it was closed before."""
        with self._lock:
            self.closed += not again
            self.faults += again

    def fault(self) -> None:
        """Something that must not happen."""
        with self._lock:
            self.faults += 1


class Counted:
    """Something that has to be closed once."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._closed = False
        tally.open()

    def close(self) -> None:
        """Say so."""
        again, self._closed = self._closed, True
        self._tally.close(again=again)


class Resource(Counted):
    """A connection, say: for one user at a time, and not for nothing."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally)
        self._buffer = bytearray(BUFFER)
        self._free = [None]

    def take(self) -> None:
        """Nobody else may have it."""
        try:
            self._free.pop()
        except IndexError:
            self._tally.fault()

    def give(self, message: Message) -> None:
        """Use it, and let it go."""
        text = message["text"].encode()
        self._buffer[: len(text)] = text[:BUFFER]
        self._free.append(None)


class Presence(Counted):
    """Who is there: somebody to say goodbye to, if the program ends before he leaves."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally)
        self.cleanup = register_cleanup(self.goodbye, name="goodbye")

    def goodbye(self) -> None:
        """The program ends."""

    def close(self) -> None:
        """Forget the goodbye, too."""
        self.cleanup.cancel()
        super().close()


class Actor:
    """
    One thread, or one task: it alone writes for its users, so what it has written is in order.

    It draws from a sequence of its own, so that the same is done with and without hygiene. What it has to know of its
    users takes the same memory from the beginning to the end.
    """

    def __init__(self, number: int, sizes: Sizes) -> None:
        self.number = number
        self.written = array("I", bytes(4 * sizes.users))
        self.known = 0
        self.wrong = 0
        self.refused = 0
        self.latencies = [0] * (64 * STEPS)
        self._draw = random.Random(number)

    def key(self, index: int) -> str:
        """The user's name."""
        return f"user {self.number}.{index}"

    def next(self) -> tuple[int, Message]:
        """Who writes, and what."""
        draw = self._draw.random
        if self.known == 0 or (draw() < NEW and self.known < len(self.written)):
            index = self.known
            self.known += 1
        else:
            # Zipf's law with an exponent of 1: what is n-th in popularity comes with a frequency of 1 / n.
            rank = int(self.known ** draw()) - 1
            index = self.known - 1 - rank if draw() < RECENT else rank
        length = 1 + int(self._draw.expovariate(1 / LENGTH))
        return index, {"number": self.written[index], "role": "user", "text": "x" * length}

    def check(self, conversation: Sequence[Message], message: Message) -> None:
        """Whether the last message is there."""
        last = conversation[-1]["number"] if conversation else -1
        self.wrong += last != message["number"] - 1

    def note(self, index: int, started: int) -> None:
        """It is done."""
        self.written[index] += 1
        taken = max(1, time.perf_counter_ns() - started)  # a clock may stand still for that long
        self.latencies[int(STEPS * math.log2(taken))] += 1


class World:
    """One process: the actors, and what they need. What differs is how a message is dealt with."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        actors = [Actor(number, sizes) for number in range(sizes.threads + sizes.tasks)]
        self.actors, self.threaded, self.tasked = actors, actors[: sizes.threads], actors[sizes.threads :]
        self.sessions, self.resources, self.presences = Tally(), Tally(), Tally()
        self._threads = ThreadPoolExecutor(sizes.threads)
        self._loop = asyncio.new_event_loop()
        self._looping = threading.Thread(target=self._loop.run_forever, name="loop", daemon=True)
        self._looping.start()
        self._worked = 0.0
        self._janitor: threading.Thread | None = None
        self._seen = self._had = 0.0

    def turn(self, order: float | tuple[int, ...]) -> Sample:
        """Work for so many seconds, or on so many messages each."""
        began = time.monotonic()
        shares: Sequence[float]
        if isinstance(order, tuple):
            until, shares = math.inf, order
        else:
            until, shares = began + order, (math.inf,) * len(self.actors)
        done: tuple[int, ...] = ()
        if order:
            tasks = asyncio.run_coroutine_threadsafe(self._play_tasks(until, shares[self.sizes.threads :]), self._loop)
            played = self._threads.map(partial(self._play, until), self.threaded, shares)
            done = (*played, *tasks.result())
        self._worked += time.monotonic() - began
        return Sample(self._worked, done, rss(), *self.held(), sys.getallocatedblocks(), self._janitor_time())

    def _play(self, until: float, actor: Actor, share: float) -> int:
        done = 0
        while done < share and time.monotonic() < until:
            index, message = actor.next()
            user, started = actor.key(index), time.perf_counter_ns()
            while not self.answer(actor, user, message):
                actor.refused += 1
                self.catch_up()
            actor.note(index, started)
            done += 1
        return done

    async def _play_tasks(self, until: float, shares: Sequence[float]) -> list[int]:
        return await asyncio.gather(*map(partial(self._play_task, until), self.tasked, shares))

    async def _play_task(self, until: float, actor: Actor, share: float) -> int:
        done = 0
        while done < share and time.monotonic() < until:
            index, message = actor.next()
            user, started = actor.key(index), time.perf_counter_ns()
            while not await self.answer_in_task(actor, user, message):
                actor.refused += 1
                await self.catch_up_in_task()
            actor.note(index, started)
            done += 1
        return done

    def _janitor_time(self) -> float | None:
        if not TASK.is_dir():
            return None
        thread = janitor._thread  # noqa: SLF001 - nobody else needs it
        if thread is None:
            return self._had
        # It ends when nothing is left to do, perhaps right now, and then another one begins, from zero.
        with suppress(FileNotFoundError):
            fields = (TASK / str(thread.native_id) / "stat").read_text().rpartition(")")[2].split()
            time_of_it = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime
            if thread is not self._janitor:
                self._janitor, self._seen = thread, 0.0
            self._had += time_of_it - self._seen
            self._seen = time_of_it
        return self._had

    def held(self) -> tuple[int, int]:
        """Conversations in memory, and messages in them."""
        raise NotImplementedError

    def answer(self, actor: Actor, user: str, message: Message) -> bool:
        """Deal with a message, in a thread; says whether it was accepted."""
        raise NotImplementedError

    async def answer_in_task(self, actor: Actor, user: str, message: Message) -> bool:
        """The same on the loop."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Wait until messages are accepted again."""

    async def catch_up_in_task(self) -> None:
        """The same on the loop."""

    def finish(self, ending: Ending) -> None:
        """Close everything, and look whether all is as it should be."""

    def end(self) -> Ending:
        """Nobody writes any more."""
        ending = Ending(counts={"processor": time.process_time_ns()})
        for name, actors in (("a thread", self.threaded), ("a task", self.tasked)):
            ending.latencies[name] = [sum(counts) for counts in zip(*(one.latencies for one in actors), strict=True)]
        self.finish(ending)
        self._threads.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._looping.join()
        self._loop.close()
        ending.counts |= {
            "users": sum(actor.known for actor in self.actors),
            "wrong": sum(actor.wrong for actor in self.actors),
            "refused": sum(actor.refused for actor in self.actors),
        }
        for name in ("sessions", "resources", "presences"):
            tally: Tally = getattr(self, name)
            ending.counts |= {
                name: tally.opened,
                f"{name} left": abs(tally.opened - tally.closed) + tally.faults,
            }
        return ending


class Plain(World):
    """What one writes first."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:  # noqa: ARG002 - it saves nothing
        super().__init__(sizes)
        self.conversations: dict[str, list[Message]] = {}
        self.there: dict[str, Counted] = {}
        self.free: list[Resource] = []
        self.free_for_tasks: list[Resource] = []

    def held(self) -> tuple[int, int]:
        """All that there ever were."""
        return len(self.conversations), sum(map(len, self.conversations.values()))

    def _take(self, free: list[Resource]) -> Resource:
        try:
            resource = free.pop()
        except IndexError:
            resource = Resource(self.resources)
        resource.take()
        return resource

    def answer(self, actor: Actor, user: str, message: Message) -> bool:
        """No session, no bound, no end."""
        with closing(Counted(self.sessions)):
            resource = self._take(self.free)
            conversation = self.conversations.setdefault(user, [])
            actor.check(conversation, message)
            conversation.append(message)
            resource.give(message)
            self.free.append(resource)
        if user not in self.there:
            self.there[user] = Counted(self.presences)
        return True

    async def answer_in_task(self, actor: Actor, user: str, message: Message) -> bool:
        """The same; the others have their turn while it has the resource."""
        with closing(Counted(self.sessions)):
            resource = self._take(self.free_for_tasks)
            conversation = self.conversations.setdefault(user, [])
            actor.check(conversation, message)
            await asyncio.sleep(0)
            conversation.append(message)
            resource.give(message)
            self.free_for_tasks.append(resource)
        if user not in self.there:
            self.there[user] = Counted(self.presences)
        return True


class Bounded(World):
    """The same with hygiene."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        super().__init__(sizes)
        self.path = folder / "soak.db"
        self.store = SQLiteStore(self.path)
        self.writer = WriteBehind(self.store, space="conversations")
        self.conversations: Registry[str, list[Message]] = Registry(
            maxsize=sizes.maxsize,
            idle=sizes.idle,
            store=self.writer,
            values=partial(History, maxlen=sizes.maxlen),
            name="conversations",
        )
        self.there: Registry[str, Presence] = Registry(
            maxsize=sizes.maxsize, idle=sizes.idle / 2, close="close", name="there"
        )
        opening = partial(Resource, self.resources)
        # Resources come and go, too: in a run of seconds as in the hours for which the defaults are meant.
        self.pool = Pool(opening, max_size=THREADS_POOL, max_lifetime=sizes.idle, name="threads")
        self.pool_of_tasks = AsyncPool(opening, max_size=TASKS_POOL, max_lifetime=sizes.idle, name="tasks")
        self.acknowledged = self.missing = 0
        self._draw = random.Random("who is looked at")
        self._acknowledging = register_cleanup(self.acknowledge, every=sizes.turn, name="acknowledge")

    def held(self) -> tuple[int, int]:
        """Those in memory."""
        return len(self.conversations), sum(map(len, self.conversations.values()))

    def _present(self, user: str) -> None:
        if self.there.get(user) is None:
            self.there[user] = Presence(self.presences)

    def answer(self, actor: Actor, user: str, message: Message) -> bool:
        """All that is opened here is closed here."""
        try:
            with managed_session() as session:
                session.open(Counted, self.sessions)
                resource = session.acquire(self.pool)
                resource.take()
                session.callback(resource.give, message)
                conversation = session.lease(self.conversations, user, list)
                actor.check(conversation, message)
                conversation.append(message)
        except StoreUnavailable:
            return False
        self._present(user)
        return True

    async def answer_in_task(self, actor: Actor, user: str, message: Message) -> bool:
        """The same; the others have their turn while it has resource and lease."""
        try:
            async with managed_session() as session:
                await session.open(Counted, self.sessions)
                resource = await session.acquire(self.pool_of_tasks)
                resource.take()
                session.callback(resource.give, message)
                conversation = await session.lease(self.conversations, user, list)
                actor.check(conversation, message)
                await asyncio.sleep(0)
                conversation.append(message)
        except StoreUnavailable:
            return False
        self._present(user)
        return True

    def catch_up(self) -> None:
        """Too much is waiting to be saved."""
        self.conversations.flush(PATIENCE)

    async def catch_up_in_task(self) -> None:
        """The same on the loop."""
        await self.conversations.aflush(PATIENCE)

    def acknowledge(self) -> None:
        """What has been flushed is in the store, whatever goes on meanwhile."""
        looked = []
        for actor in self.actors:
            if actor.known:
                index = self._draw.randrange(actor.known)
                looked.append((actor.key(index), actor.written[index]))
        self.conversations.flush(PATIENCE)
        for user, written in looked:
            record = self.store.load("conversations", user)
            numbers = [] if record is None else [message["number"] for message in record.value]
            last = numbers[-1] if numbers else -1
            self.acknowledged += 1
            self.missing += last < written - 1 or numbers != list(range(last + 1 - len(numbers), last + 1))

    def finish(self, ending: Ending) -> None:
        """Shut down, and open the file anew."""
        self._acknowledging.cancel()
        stats = self.conversations.stats()
        cleared = shutdown(PATIENCE)
        saves = self.writer.stats().saves
        self.store.close()
        with SQLiteStore(self.path) as store:
            lost = lost_in(store, self.actors, self.sizes.maxlen)
        ending.counts |= {
            "lost": lost,
            "missing": self.missing,
            "acknowledged": self.acknowledged,
            "messages": sum(sum(actor.written) for actor in self.actors),
            "saves": saves,
            "rehydrated": stats.rehydrated,
            "evicted": sum(stats.evictions.values()),
            "hook errors": stats.hook_errors + self.there.stats().hook_errors,
            "not shut down": len(cleared.failed) + len(cleared.unfinished),
        }
        ending.said = "" if cleared.ok else str(cleared)


def lost_in(store: SQLiteStore, actors: Sequence[Actor], maxlen: int) -> int:
    """Users of whom *store* does not have the last *maxlen* messages in order, and rows that it cannot read."""
    by_number = {str(actor.number): actor for actor in actors}
    right = 0
    for key, kept in store.items("conversations"):
        number, _, index = key.removeprefix("user ").partition(".")
        written = by_number[number].written[int(index)]
        right += [message["number"] for message in kept] == list(range(max(0, written - maxlen), written))
    return sum(actor.known for actor in actors) - right + len(store.report.bad)


def serve(kind: type[Plain | Bounded], sizes: Sizes, folder: Path, connection: Connection) -> None:
    """A process: turns until there are no more of them, and an ending."""
    world = kind(sizes, folder)
    while (order := connection.recv()) is not None:
        connection.send(world.turn(order))
    connection.send(world.end())


class Apart:
    """A world in a process of its own, seen from outside."""

    def __init__(self, name: str, kind: type[Plain | Bounded], sizes: Sizes, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._name = name
        self._process = context.Process(target=serve, args=(kind, sizes, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()  # or its end would go unnoticed

    def ask(self, order: float | tuple[int, ...] | None) -> Any:
        """What it answers."""
        try:
            self._connection.send(order)
            if not self._connection.poll(PATIENCE + (order if isinstance(order, float) else PATIENCE)):
                raise RuntimeError(f"the process {self._name} does not answer any more")
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"the process {self._name} has ended; what it raised is above") from error

    def close(self) -> None:
        """It ends by itself if it was asked to."""
        self._process.join(timeout=PATIENCE / 10)
        self._process.kill()
        self._process.join()
        self._connection.close()


@dataclass(slots=True)
class Soak(Report):
    """
    What a run found.

    Args:
        samples: By process, turn by turn.
        nights: Conversations in memory at the end of each night.
        endings: By process.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    nights: list[int] = field(default_factory=list)
    endings: dict[str, Ending] = field(default_factory=dict)

    @property
    def curves(self) -> dict[str, list[tuple[float, int, int]]]:
        """By process and turn: seconds since the beginning, messages so far, resident bytes."""
        return {
            name: [
                (round(one.started, 1), messages, one.rss)
                for one, messages in zip(samples, accumulate(sum(one.done) for one in samples), strict=True)
            ]
            for name, samples in self.samples.items()
        }


def run(sizes: Sizes, progress: Callable[[str], None] = lambda _: None) -> Soak:
    """Run both side by side; *progress* is told how it goes, about once a minute."""
    soak = Soak(absent={}, base=PLAIN, samples={OURS: [], PLAIN: []})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worlds = {
            name: stack.enter_context(closing(Apart(name, kind, sizes, folder)))
            for name, kind in ((OURS, Bounded), (PLAIN, Plain))
        }
        for world in worlds.values():
            world.ask(0.0)  # it is there
        play(sizes, soak, {name: world.ask for name, world in worlds.items()}, progress)
        for name, world in worlds.items():
            soak.endings[name] = world.ask(None)
    conclude(sizes, soak)
    return soak


def play(
    sizes: Sizes, soak: Soak, ask: dict[str, Callable[[Any], Any]], progress: Callable[[str], None] = lambda _: None
) -> None:
    """Turns until the time is over."""
    began = time.monotonic()
    dusk = tell = 0.0
    full = False
    while (now := time.monotonic() - began) < sizes.seconds:
        if now >= tell:
            shown = ", ".join(f"{one[-1].rss / MIB:.0f} MiB {name}" for name, one in soak.samples.items() if one)
            progress(f"Soaking for {(sizes.seconds - now) / 60:.1f} more minutes{shown and ': '}{shown}")
            tell += 60.0
        sample = _at(ask[OURS](sizes.turn), now)
        soak.samples[OURS].append(sample)
        if not full:
            plain = _at(ask[PLAIN](sample.done), now)
            soak.samples[PLAIN].append(plain)
            full = plain.rss > sizes.ceiling
        if now - dusk >= sizes.day:
            time.sleep(sizes.night)
            soak.nights.append(ask[OURS](0.0).entries)
            dusk = time.monotonic() - began


def _at(sample: Sample, started: float) -> Sample:
    return replace(sample, started=started)


@dataclass(frozen=True, slots=True)
class Growth:
    """How the resident memory went over the last half of a run."""

    bytes: float
    """The slope, times the length."""
    level: float
    """The median."""
    noise: float
    """Of a single reading around the slope; a standard deviation, estimated by the median deviation."""
    sure: float
    """Mann and Kendall's statistic, in standard deviations, with what one reading says about the next."""
    messages: int
    seconds: float


def growth(samples: Sequence[Sample]) -> Growth:
    """The last half of *samples*: a line through the medians, which a single jump does not bend."""
    half = samples[len(samples) // 2 :]
    values = [float(one.rss) for one in half]
    slope = theil_sen(values)
    rest = [value - slope * number for number, value in enumerate(values)]
    middle = statistics.median(rest)
    rest = [value - middle for value in rest]
    square = math.fsum(one * one for one in rest)
    memory = math.fsum(a * b for a, b in pairwise(rest)) / square if square else 0.0
    return Growth(
        slope * (len(values) - 1),
        statistics.median(values),
        1.4826 * statistics.median(map(abs, rest)),
        mann_kendall(values, min(max(memory, 0.0), 0.9)),
        max(1, sum(sum(one.done) for one in half[1:])),
        half[-1].started - half[0].started,
    )


def percentile(counts: Sequence[int], share: float) -> float:
    """Nanoseconds that *share* of the messages kept to, from their numbers by step of the logarithm."""
    wanted = share * sum(counts)
    reached = next(step for step, so_far in enumerate(accumulate(counts)) if so_far >= wanted)
    return float(2 ** ((reached + 0.5) / STEPS))


def conclude(sizes: Sizes, soak: Soak) -> None:
    """The rows."""
    ours, plain = soak.samples[OURS], soak.samples[PLAIN]
    counts, theirs = soak.endings[OURS].counts, soak.endings[PLAIN].counts
    flat, rising = growth(ours), growth(plain)
    messages = sum(sum(one.done) for one in ours)
    worked = ours[-1].seconds
    last = f"the last half: {flat.seconds / 60:.1f} minutes, {flat.messages:,} messages"
    said = (
        f"{last}; {flat.bytes / MIB:+.2f} MiB or {flat.bytes / flat.messages:+.2f} bytes a message, "
        f"a reading is within {flat.noise / MIB:.2f} MiB of the line, Mann-Kendall {flat.sure:+.1f}"
    )
    used = [float(one.blocks) for one in ours[len(ours) // 2 :]]
    blocks, in_use = theil_sen(used) * (len(used) - 1), statistics.median(used)
    limit = GROWTH * flat.level / 100 / flat.messages
    soak.rows += [
        Row(f"{OURS}: growth of the resident memory", 100 * flat.bytes / flat.level, "%", GROWTH, note=said),
        Row(
            "- growth of what Python has in use",
            100 * blocks / in_use,
            "%",
            note=f"{blocks:+,.0f} of {in_use:,.0f} pieces of memory, or {blocks / flat.messages:+.4f} a message",
        ),
        Row("- a leak that this would not show", limit, "bytes a message", note=f"{GROWTH:g} % over {last}"),
        Row(
            f"{PLAIN}: growth of the resident memory",
            100 * rising.bytes / rising.level,
            "%",
            note=f"{rising.bytes / MIB:+,.0f} MiB or {rising.bytes / rising.messages:+,.0f} bytes a message",
        ),
        *(
            Row(
                f"{kind}: resident memory at the end", one[-1].rss / MIB, "MiB", note=f"at first {one[0].rss / MIB:.0f}"
            )
            for kind, one in soak.samples.items()
        ),
        Row(
            "messages",
            messages,
            note=f"of {counts['users']:,} users; {messages / worked:,.0f} a second; processor time of each "
            f"{counts['processor'] / messages / 1e3:,.0f} us, {PLAIN} {theirs['processor'] / messages / 1e3:,.0f} us",
        ),
        Row(
            "users whose messages are not in the store, all of them and in order",
            counts["lost"],
            limit=0,
            note=f"of {counts['messages']:,} messages, the last {sizes.maxlen} of each of {counts['users']:,} users",
        ),
        Row(
            "- not there when a flush had acknowledged them",
            counts["missing"],
            limit=0,
            note=f"of {counts['acknowledged']:,} users looked at, while others wrote; {counts['saves']:,} saves",
        ),
        Row(
            "messages after another one than the last",
            counts["wrong"],
            limit=0,
            note=f"{counts['evicted']:,} conversations were evicted, and {counts['rehydrated']:,} came back; "
            f"{counts['refused']:,} messages had to wait for the store",
        ),
        *(
            Row(
                f"{what} not closed, or not once",
                counts[f"{key} left"],
                limit=0,
                note=f"of {counts[key]:,}" + (f"; {PLAIN} {theirs[f'{key} left']:,}" if theirs[f"{key} left"] else ""),
            )
            for key, what in (
                ("sessions", "sessions"),
                ("resources", "resources of a pool"),
                ("presences", "values of a registry"),
            )
        ),
        Row(
            "cleanups and hooks that failed",
            counts["not shut down"] + counts["hook errors"],
            limit=0,
            note=soak.endings[OURS].said.replace("\n", "; "),
        ),
        _of_the_janitor(ours),
        Row(
            "conversations in memory after a turn, at most",
            max(one.entries for one in ours),
            limit=sizes.maxsize,
            note=f"{_middle(ours[len(ours) // 4 : len(ours) // 2]):,.0f} messages in them in the second quarter of the "
            f"run, {_middle(ours[-(len(ours) // 4) - 1 :]):,.0f} in the last",
        ),
        Row(
            "- at the end of a night, at most",
            max(soak.nights, default=None),
            limit=0,
            note=f"of {len(soak.nights)}" if soak.nights else "too short for a night",
        ),
    ]
    for who in ("a thread", "a task"):
        for share, name in ((0.5, "median"), (0.99, "99 %"), (0.999, "99.9 %")):
            found = {kind: percentile(soak.endings[kind].latencies[who], share) for kind in (OURS, PLAIN)}
            soak.nanoseconds[f"a message in {who}, {name}"] = found
            soak.ratios[f"a message in {who}, {name}"] = {kind: found[kind] / found[PLAIN] for kind in found}


def _middle(samples: Sequence[Sample]) -> float:
    return statistics.median(one.held for one in samples) if samples else 0.0


def _of_the_janitor(samples: Sequence[Sample]) -> Row:
    what = "the janitor's thread, of one core"
    last = samples[-1]
    if last.janitor is None:
        return Row(what, None, "%", CORE, note="only Linux counts them: the times of one thread")
    share = 100 * last.janitor / last.seconds
    return Row(what, share, "%", CORE, note=f"{last.janitor:.2f} s in {last.seconds:.0f} s of work")


def chart(soak: Soak) -> str:
    """Both curves of the resident memory as an SVG picture; needs ``pygal``, of the extra ``cli``."""
    import pygal  # noqa: PLC0415 - who wants no picture does without
    from pygal.style import Style  # noqa: PLC0415

    from hygiene.cli.html import _heights, _quiet  # noqa: PLC0415

    # Grey letters can be read on a white page and on a black one: a picture that a page shows does not know which.
    grey = "#808080"
    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground=grey,
        foreground_strong=grey,
        foreground_subtle=grey,
        guide_stroke_color=grey,
        major_guide_stroke_color=grey,
        font_family="system-ui, sans-serif",
        label_font_size=14,
        major_label_font_size=14,
        legend_font_size=14,
        title_font_size=15,
        opacity=".1",
        colors=("#c2410c", "#0d9488"),
        stroke_width="3",
    )
    lines = {name: [(at / 60, size / MIB) for at, _, size in soak.curves[name]] for name in (PLAIN, OURS)}
    most = max(at for line in lines.values() for at, _ in line)
    picture = pygal.XY(
        width=640,
        height=340,
        explicit_size=False,
        style=style,
        js=[],
        title="Resident memory in MiB, the same messages; minutes",
        show_dots=False,
        legend_at_bottom=True,
        y_labels=_heights(max(size for line in lines.values() for _, size in line)),
        x_labels=[most * step / 5 for step in range(6)],
        x_value_formatter=lambda value: f"{value:.1f}".removesuffix(".0"),
        value_formatter=lambda value: f"{value:,.0f}",
        truncate_legend=-1,
        truncate_label=-1,
    )
    for name, line in lines.items():
        picture.add(name, line)
    picture.add_xml_filter(partial(_quiet, "Resident memory with hygiene and without"))
    drawn: str = picture.render(is_unicode=True, disable_xml_declaration=True)
    return drawn + "\n"
