"""Memory beside ``psutil``, ``pympler`` and ``objgraph``: what it costs to know how much there is, and what grows.

The estimate of a value's bytes is held against a full walk, for how true it is, and against `asizeof`, for how long
it takes. What grows is looked for in a process that holds millions of objects.
"""

from __future__ import annotations

import gc
import gzip
import importlib
import itertools
import json
import random
import statistics
import sys
import time
import types
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import own
from benchmarks.registries import Report, Row, interleave, measure, ratio
from hygiene.memory import growth, rss
from hygiene.sizing import sizeof

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["FULL", "QUICK", "Sizes", "run"]

THEIRS, OURS, WALK = "pympler.asizeof", "sizeof", "a full walk"
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "irc_messages.jsonl.gz"
ERROR, COST, READING, SLICE, CORE = 15, 0.05, 2_000, 5_000, 600
REASON = "not all of it is installed"
NOT_HERE = "the real messages are not at hand"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    rounds: int = 41
    readings: int = 2_000
    messages: int = 500
    conversations: int = 1_000
    lines: int = 221_056
    objects: int = 5_000_000


FULL = Sizes()
QUICK = Sizes(rounds=11, readings=500, conversations=200, lines=40_000, objects=500_000)


def run(sizes: Sizes, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything; *progress* is told what comes next."""
    return measure([readings, estimates, puts, walks], sizes, Report(absent={}, base=WALK), progress)


def repeatedly(read: Callable[[], Any], times: Iterable[int]) -> None:
    """Ask again and again."""
    for _ in times:
        read()


def readings(sizes: Sizes, report: Report) -> None:
    """A reading of the resident memory."""
    turns: dict[str, Callable[..., Any]] = {"hygiene.memory.rss()": partial(own(repeatedly), rss)}
    try:
        import psutil  # noqa: PLC0415 - the library does without on Linux
    except ImportError as error:
        report.absent["psutil"] = f"{type(error).__name__}: {error}"
    else:
        process = psutil.Process()
        turns["psutil, a Process that is kept"] = partial(own(repeatedly), lambda: process.memory_info().rss)
    passes = itertools.repeat((range(sizes.readings),)).__next__
    series = interleave(turns, passes, sizes.rounds, sizes.readings)
    report.note_times("a reading", series)
    found = statistics.median(series["hygiene.memory.rss()"])
    report.rows.append(Row("a reading of the resident memory", found, "ns", READING))


def full_walk(value: Any) -> int:
    """All bytes of *value*, each object once, without what belongs to the program."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or item is None or isinstance(item, (type, types.ModuleType, types.FunctionType)):
            continue
        seen[id(item)] = item
        waiting += gc.get_referents(item)
        if isinstance(item, dict):
            waiting += item  # the collector does not see keys if all are texts
        elif hasattr(item, "__dict__"):
            waiting.append(vars(item))
    return sum(map(sys.getsizeof, seen.values()))


@dataclass(slots=True)
class Message:
    """One of an application's own."""

    role: str
    content: str
    at: float


def texts(draw: random.Random, mean: float, spread: float) -> Iterator[str]:
    """Lengths have a long tail."""
    while True:
        yield "x" * max(1, int(mean * draw.lognormvariate(-spread * spread / 2, spread)))


def calls(draw: random.Random, count: int) -> list[Any]:
    """An agent's: a question, a call, its result, an answer."""
    said, found = texts(draw, 300, 1.0), texts(draw, 2_000, 1.3)

    def message(number: int) -> dict[str, Any]:
        if number % 4 == 1:
            function = {"name": "search", "arguments": json.dumps({"query": next(said)})}
            return {"role": "assistant", "content": None, "tool_calls": [{"id": f"{number}", "function": function}]}
        if number % 4 == 2:  # noqa: PLR2004 - the third of four
            return {"role": "tool", "tool_call_id": f"{number - 1}", "content": next(found)}
        return {"role": "assistant" if number % 4 else "user", "content": [{"type": "text", "text": next(said)}]}

    return [message(number) for number in range(count)]


def made(draw: random.Random, count: int) -> dict[str, Any]:
    """Conversations of several makes."""
    even, tailed = texts(draw, 300, 1.0), texts(draw, 300, 1.5)
    roles = itertools.cycle(("user", "assistant"))
    return {
        "dicts": [{"role": next(roles), "content": next(even)} for _ in range(count)],
        "dicts of very different lengths": [{"role": next(roles), "content": next(tailed)} for _ in range(count)],
        "dicts after a long prompt": [
            {"role": "system", "content": "p" * 20_000},
            *({"role": next(roles), "content": next(even)} for _ in range(count)),
        ],
        "objects with slots": [Message(next(roles), next(even), number + 0.5) for number in range(count)],
        "texts": [next(tailed) for _ in range(count)],
        "tool calls": calls(draw, count),
    }


def real(sizes: Sizes) -> list[Any]:
    """The messages of each user of a chat; none where the data is not at hand."""
    if not DATA.is_file():
        return []
    users: defaultdict[str, list[Any]] = defaultdict(list)
    with gzip.open(DATA, "rt") as lines:
        for line in itertools.islice(lines, sizes.lines):
            message = json.loads(line)
            users[message.pop("user")].append(message)
    return sorted(users.values(), key=len)[-sizes.conversations :]


def worst(conversations: Iterable[Any]) -> float:
    """The largest error of the estimate, in percent."""
    return max(abs(sizeof(value) / full_walk(value) - 1) * 100 for value in conversations)


def estimates(sizes: Sizes, report: Report) -> None:
    """The estimate of a conversation's bytes: how true, and how fast."""
    draw = random.Random(5)
    conversations = made(draw, sizes.messages)
    some = [value for seed in range(5) for value in made(random.Random(seed), sizes.messages).values()]
    report.rows.append(Row(f"sizeof: largest error, {len(some)} made-up conversations", worst(some), "%", ERROR))
    people = real(sizes)
    note = "" if people else NOT_HERE
    error = worst(people) if people else None
    report.rows.append(Row("sizeof: largest error, real conversations", error, "%", ERROR, note=note))
    full: Callable[[Any], int] | None = None
    try:
        full = importlib.import_module("pympler.asizeof").asizeof  # one of the contenders
    except ImportError as missing:
        report.absent[THEIRS] = f"{type(missing).__name__}: {missing}"
    conversations["real messages"] = people[-1][: sizes.messages] if people else None
    for kind, value in conversations.items():
        what = f"sizeof of {kind}, against {THEIRS}"
        if value is None:
            report.rows.append(Row(what, None, "x", COST, note=NOT_HERE))
            continue
        turns: dict[str, Callable[..., Any]] = {OURS: sizeof, WALK: full_walk}
        if full is not None:
            turns[THEIRS] = full
        series = interleave(turns, itertools.repeat((value,)).__next__, sizes.rounds, 1)
        report.note_times(f"{len(value)} {kind}", series)
        cost = ratio(series, OURS, THEIRS) if full is not None else None
        wrong = f"{(sizeof(value) / full_walk(value) - 1) * 100:+.1f} % beside a full walk"
        report.rows.append(Row(what, cost, "x", COST, note=REASON if cost is None else wrong))


def puts(sizes: Sizes, report: Report) -> None:
    """The estimate of small values, which a registry with a bound in bytes asks for with each write."""
    draw = random.Random(6)
    values: dict[str, Any] = {
        "a number": 7**20,
        "a text": "x" * 50,
        "a small dict": {"user": "u", "count": 3.5},
        "10 messages": made(draw, 10)["dicts"],
    }
    for what, value in values.items():
        count = max(1, sizes.readings // 10)
        series = interleave(
            {OURS: partial(own(repeatedly), partial(sizeof, value))},
            itertools.repeat((range(count),)).__next__,
            sizes.rounds,
            count,
        )
        report.note_times(f"sizeof of {what}", series)


def walks(sizes: Sizes, report: Report) -> None:
    """One walk over a process with millions of objects, for what grows."""
    # Each message is a dict, a text and a number; as a program would hold them, by name and user.
    held = types.ModuleType("benchmarks_held")
    users = max(1, sizes.objects // 300)
    held.conversations = {  # type: ignore[attr-defined]
        f"user {user}": [{"role": "user", "content": f"{user} {number}", "at": number + 0.5} for number in range(100)]
        for user in range(users)
    }
    sys.modules[held.__name__] = held
    pauses: list[float] = []
    try:
        walk = growth._Walk()  # noqa: SLF001 - a slice at a time, which the janitor calls otherwise
        done = False
        while not done:
            # Its own processor time: what others do on the machine meanwhile is no pause of ours.
            start = time.thread_time()
            done = walk.go_on(0.0, growth._SLICE)  # noqa: SLF001
            pauses.append((time.thread_time() - start) * 1e6)
        spent = walk.spent * 1e3
        try:
            import objgraph  # type: ignore[import-untyped]  # noqa: PLC0415 - one of the contenders
        except ImportError as error:
            report.absent["objgraph"] = f"{type(error).__name__}: {error}"
            theirs = ""
        else:
            start = time.perf_counter()
            objgraph.typestats()
            theirs = f"; objgraph.typestats() stops everything for {(time.perf_counter() - start) * 1e3:,.0f} ms"
    finally:
        del sys.modules[held.__name__]
    objects = users * 300
    report.rows += [
        Row(f"watch_growth, {objects:,} objects: slowest slice", max(pauses), "us", SLICE, note=f"of {len(pauses)}"),
        Row(
            f"watch_growth, {objects:,} objects: at the default interval, of one core",
            spent,
            "ms a minute",
            CORE,
            note=f"a walk a minute{theirs}",
        ),
    ]
