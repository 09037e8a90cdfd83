"""The same messages through an ordinary chat bot, once as it is and once bounded, each in a process of its own."""

# Theory of operation
#
# Memory. The resident memory of a process tells what was done before as well, because freed memory is seldom handed
# back. So each bot lives in a fresh process, which reads the log itself, holds one batch of it at a time, and measures
# itself. The two run one after the other, so that neither takes the processor from the other.
#
# Protocol. A worker is told what to do by one JSON argument and answers on its standard output with JSON lines:
# {"progress": 0.25} now and then, at the end {"outcome": {...}}, or {"error": "..."} for what the user can mend.
#
# Store. The bounded bot may keep its conversations in a store. What must be in it afterwards is counted from the log by
# the process that asked, which then reads the store back: not by the bot, which could believe what it has in memory.
#
# Time. The registry's timer is the log's own clock, so an idle limit of two hours means two hours in the log.

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, cast

import msgspec
import psutil

from hygiene.cli.ledger import SPACE, Kept, Ledger, opened, place, size
from hygiene.cli.logs import InputError, Log, Message, Skipped
from hygiene.cli.traffic import Traffic
from hygiene.decorators import bounded_registry
from hygiene.history import History
from hygiene.writebehind import WriteBehind

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ChatBot",
    "Comparison",
    "Job",
    "Outcome",
    "Reading",
    "Run",
    "Sample",
    "boot",
    "bounded_bot",
    "compare",
    "replay",
    "work",
]

_BATCH = 256
"""Messages between two measurements: reading the memory takes about 10 us, so 256 of them keep it under 1 %."""
_SAMPLES = 400
"""Points of a curve: more than a phone has pixels to tell them apart."""
_PROGRESS_EVERY = 0.1
"""Seconds between two words about the progress: fluent to the eye, and nothing beside the work."""
# A worker gets our module path word by word, as multiprocessing does it: it must import the same hygiene, and (with -P)
# must not pick up a json.py that lies about in the current directory.
_BOOT = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(sys.argv[3])"
)


class ChatBot:
    """A bot as people write it: one list of messages for each user, and nothing that ever empties the dict."""

    def __init__(self) -> None:
        self.conversations: dict[str | int, list[str]] = {}

    def on_message(self, user: str | int, text: str) -> None:
        """Keep what *user* said."""
        history = self.conversations.setdefault(user, [])
        history.append(text)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """
    What one worker shall do.

    Args:
        path: The log; ``None`` for the demo's traffic.
        key: The field that tells conversations apart.
        maxsize: Conversations held at most; ``None`` for the bot as it is.
        idle: Seconds of the log's clock after which an unused conversation leaves.
        history: Messages held of each conversation at most.
        store: The address of a store to keep conversations in.
    """

    path: str | None
    key: str = "user"
    maxsize: int | None = None
    idle: float | None = None
    history: int | None = None
    store: str | None = None
    timed: bool = False
    """A line without a time cannot be used. Told to both bots, so that both are given the same messages."""


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One measurement: after how many messages, at what time of the log, how many bytes, how many conversations."""

    messages: int
    when: float
    rss: int
    held: int


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """
    What became of one bot. Memory is resident memory in bytes.

    A message whose conversation is held is a hit, any other a miss. *seconds* is the time the bot took, without reading
    the log. *held* and *final_rss* are those at the end, after everything whose time was over has left. Of the misses,
    *rehydrated* were loaded from the store; *saved* changes have gone into it, in so many *saves*.
    """

    messages: int
    hits: int
    misses: int
    held: int
    max_held: int
    evictions: dict[str, int]
    start_rss: int
    peak_rss: int
    final_rss: int
    seconds: float
    rate: float
    curve: list[Sample]
    rehydrated: int = 0
    saved: int = 0
    saves: int = 0


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in the log; the same for both bots."""

    lines: int
    messages: int
    skipped: int
    first_skipped: list[Skipped]
    out_of_order: int
    has_time: bool


class Outcome(msgspec.Struct, frozen=True):
    """What a worker answers in the end."""

    run: Run
    reading: Reading


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """
    The same messages through both bots.

    Args:
        log: The file; ``None`` for the demo's traffic.
        idle: Seconds.
        first_skipped: The first of the *skipped* lines, with the reason.
        out_of_order: Messages with a time before that of an earlier one.
        kept: What the store holds afterwards; ``None``: there was none.
    """

    log: str | None
    key: str
    maxsize: int
    idle: float | None
    history: int | None
    messages: int
    lines: int
    skipped: int
    first_skipped: list[Skipped]
    out_of_order: int
    has_time: bool
    plain: Run
    bounded: Run
    kept: Kept | None = None


class _LogClock:
    """The time of the message that is being handled."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Curve:
    """Measurements evenly spread over a run whose length is not known before: when full, every other one goes."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.peak = 0
        self._stride = 1
        self._measured = 0
        self._process = psutil.Process()

    def measure(self, messages: int, when: float, held: int, *, keep: bool = False) -> int:
        rss = int(self._process.memory_info().rss)
        self.peak = max(self.peak, rss)
        if keep or self._measured % self._stride == 0:
            self.samples.append(Sample(messages, when, rss, held))
        self._measured += 1
        if len(self.samples) >= _SAMPLES:
            del self.samples[1::2]
            self._stride *= 2
        return rss


def work(job: Job, tell: Callable[[float], None] = lambda progress: None) -> Outcome:
    """
    Put every message through one bot, in this process.

    Args:
        job: What to do.
        tell: Called with the progress, from 0 to 1, about ten times a second.

    Raises:
        InputError: The log or the store cannot be used.
    """
    if job.store is None:
        return _work(job, None, tell)
    with opened(job.store) as store:
        writer = WriteBehind(store, space=SPACE, sigterm="ignore")
        outcome = _work(job, writer, tell)
        # Not where it failed: closing goes on trying for a while, and whoever waits wants to know why.
        writer.close()
        return outcome


def _work(job: Job, writer: WriteBehind | None, tell: Callable[[float], None]) -> Outcome:
    log = _messages_of(job)
    clock = _LogClock()
    if job.maxsize is not None:
        bot = bounded_bot(job.maxsize, idle=job.idle, history=job.history, store=writer, timer=clock)
    else:
        bot = ChatBot()
    hits = max_held = 0
    seconds, told = 0.0, time.perf_counter()
    curve = _Curve()
    start_rss = curve.measure(0, 0.0, 0)
    messages = iter(log)
    batch: list[Message] = []
    while batch := list(islice(messages, _BATCH)):
        began = time.perf_counter()
        for key, when, text in batch:
            clock.now = when
            # `in` does not count as a use, so looking does not change what is held. It finds what is in a store, too.
            hits += key in bot.conversations
            bot.on_message(key, text)
            max_held = max(max_held, len(bot.conversations))
        now = time.perf_counter()
        seconds += now - began
        curve.measure(log.messages, clock.now, len(bot.conversations))
        if now - told > _PROGRESS_EVERY:
            tell(log.progress)
            told = now
    evictions: dict[str, int] = {}
    rehydrated = 0
    if job.maxsize is not None:
        evictions, rehydrated = _settle(bot.conversations)
    held = len(bot.conversations)
    final_rss = curve.measure(log.messages, clock.now, held, keep=True)
    saved = saves = 0
    if writer is not None:
        # A bot that ends has saved everything: that is part of its work.
        began = time.perf_counter()
        cast("Any", bot.conversations).close()
        seconds += time.perf_counter() - began
        saved, saves = writer.stats().saved, writer.stats().saves
    hits -= rehydrated
    run = Run(
        messages=log.messages,
        hits=hits,
        misses=log.messages - hits,
        held=held,
        max_held=max_held,
        evictions=evictions,
        start_rss=start_rss,
        peak_rss=curve.peak,
        final_rss=final_rss,
        seconds=seconds,
        rate=log.messages / max(seconds, 1e-9),
        curve=curve.samples,
        rehydrated=rehydrated,
        saved=saved,
        saves=saves,
    )
    reading = Reading(
        lines=log.lines,
        messages=log.messages,
        skipped=log.skipped,
        first_skipped=log.first_skipped,
        out_of_order=log.out_of_order,
        has_time=log.has_time,
    )
    return Outcome(run, reading)


def _messages_of(job: Job) -> Log | Traffic:
    return Traffic() if job.path is None else Log(job.path, key=job.key, timed=job.timed)


def bounded_bot(
    maxsize: int,
    *,
    idle: float | None = None,
    history: int | None = None,
    store: str | WriteBehind | None = None,
    timer: Callable[[], float] = time.monotonic,
) -> ChatBot:
    """
    A `ChatBot` whose conversations are bounded, and kept in a store if there is one.

    Args:
        maxsize: Conversations held at most.
        idle: Seconds after which an unused conversation leaves.
        history: Messages held of each conversation at most.
        store: An address, or what saves there.
        timer: The clock for *idle*.
    """
    bound = bounded_registry(
        "conversations",
        maxsize=maxsize,
        idle=idle,
        values=partial(History, maxlen=history) if history is not None else None,
        store=store,
        name=SPACE if store is not None else None,
        timer=timer,
    )
    # The decorator changes the class it is given, so it gets one of its own and ChatBot stays as it is.
    bot: ChatBot = bound(type("BoundedChatBot", (ChatBot,), {}))()
    return bot


def _settle(registry: Any) -> tuple[dict[str, int], int]:
    """Let everything leave whose time is over; how many left of which cause, and how many came back from a store."""
    registry.expire()
    stats = registry.stats()
    return {cause.value: count for cause, count in stats.evictions.items() if count}, stats.rehydrated


def compare(job: Job, on_progress: Callable[[str, float], None] = lambda which, progress: None) -> Comparison:
    """
    Put every message through both bots, one after the other, each in a process of its own.

    Args:
        job: What the bounded bot does; the other one is the same without the limits.
        on_progress: Called with the bot, ``"plain"`` or ``"bounded"``, and its progress from 0 to 1; then, if there
            is a store, with ``"kept"``, while it is read back.

    Raises:
        InputError: The log or the store cannot be used, a process was killed, or the store does not hold every message.
        ValueError: *job* has no *maxsize*.
    """
    maxsize = job.maxsize
    if maxsize is None:
        raise ValueError("a comparison needs a bounded bot; found a job without maxsize. Give it one")
    # With an idle limit, a line without a time is of no use to the bounded bot; the other one must not have it either.
    job = msgspec.structs.replace(job, timed=job.idle is not None)
    unbounded = msgspec.structs.replace(job, maxsize=None, idle=None, history=None, store=None)
    ledger = _begin_ledger(job)
    plain = replay(unbounded, partial(on_progress, "plain"))
    bounded = replay(job, partial(on_progress, "bounded"))
    reading = plain.reading
    if reading != bounded.reading:
        raise InputError(
            f"wanted the same log for both bots, found {reading.messages:,} messages first and "
            f"{bounded.reading.messages:,} then in {job.path!r}. Replay a copy that nobody writes to"
        )
    return Comparison(
        log=job.path,
        key=job.key,
        maxsize=maxsize,
        idle=job.idle,
        history=job.history,
        plain=plain.run,
        bounded=bounded.run,
        kept=_read_back(job, ledger, bounded.run, partial(on_progress, "kept")) if ledger is not None else None,
        **msgspec.structs.asdict(reading),
    )


def _begin_ledger(job: Job) -> Ledger | None:
    if job.store is None:
        return None
    with opened(job.store) as store:
        return Ledger(store, job.history)


def _read_back(job: Job, ledger: Ledger, run: Run, on_progress: Callable[[float], None]) -> Kept:
    """Compare the store with the log."""
    assert job.store is not None
    log = _messages_of(job)
    for key, _, text in log:
        ledger.add(key, text)
        if not log.messages % _BATCH:
            on_progress(log.progress)
    with opened(job.store) as store:
        different = ledger.differences(store)
        bytes_kept = size(store)
    if different:
        raise InputError(
            f"wanted every message of the log in {place(job.store)}, in order, found {len(different):,} conversations "
            f"that differ, the first of them {different[0]!r}. See that nobody else replays into it"
        )
    return Kept(
        address=place(job.store),
        space=SPACE,
        messages=ledger.messages,
        users=ledger.users,
        history=job.history,
        messages_before=ledger.messages_before,
        returned=ledger.returned,
        rehydrated=run.rehydrated,
        saved=run.saved,
        saves=run.saves,
        size=bytes_kept,
    )


def boot(module: str, argument: str) -> list[str]:
    """The command that runs ``main(argument)`` of the *module* of this package in a fresh process."""
    return [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path), f"hygiene.cli.{module}", argument]


def replay(job: Job, on_progress: Callable[[float], None] = lambda progress: None) -> Outcome:
    """
    Put every message through one bot, in a fresh process.

    The process is ended when this call is, however that happens.

    Args:
        job: What to do.
        on_progress: Called in this thread with the progress, from 0 to 1.

    Raises:
        InputError: The log cannot be used, or the process was killed.
    """
    command = boot("replay", msgspec.json.encode(job).decode())
    answer = _Answer()
    # A group of its own: an interrupt from the keyboard is for us, who then end the worker.
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0) as process:
        try:
            for line in cast("IO[bytes]", process.stdout):
                answer = msgspec.json.decode(line, type=_Answer)
                on_progress(answer.progress)
        except BaseException:
            # Whatever it was, an interrupt included: leaving the block waits for the process.
            process.kill()
            raise
    if answer.outcome is not None:
        return answer.outcome
    raise InputError(answer.error or _why_ended(job, process.returncode, answer.progress))


def _why_ended(job: Job, code: int, progress: float) -> str:
    which = "plain" if job.maxsize is None else "bounded"
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return (
        f"wanted the {which} bot to handle the whole log, found that its process {how} after {progress:.0%} of it. "
        "If it ran out of memory, try a shorter log or a machine with more"
    )


class _Answer(msgspec.Struct, omit_defaults=True):
    progress: float = 0.0
    outcome: Outcome | None = None
    error: str | None = None


def main(argument: str) -> None:
    """Be the worker: do the job in *argument*, answer on the standard output."""

    def say(answer: _Answer) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()

    logging.getLogger("hygiene").addHandler(logging.NullHandler())  # the command tells what fails
    # Nobody reads any more: the one who asked has ended, and so do we.
    with contextlib.suppress(BrokenPipeError):
        try:
            job = msgspec.json.decode(argument, type=Job)
            say(_Answer(progress=1.0, outcome=work(job, lambda progress: say(_Answer(progress=progress)))))
        except InputError as problem:
            say(_Answer(error=str(problem)))
            # What the store did not take, the exit tries to save once more; that it fails again has been said.
            logging.disable()
