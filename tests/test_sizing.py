"""The default estimate of a value's bytes: cheap, deep, and never an exception."""

from __future__ import annotations

import asyncio
import enum
import gc
import gzip
import json
import logging
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import msgspec
import pydantic
import pytest

from hygiene import History, Registry
from hygiene.sizing import sizeof


class Plain:
    def __init__(self, content: Any) -> None:
        self.content = content


class Slotted:
    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


class Array:
    """Says its own size, as arrays do."""

    nbytes = 10_000_000


@pytest.mark.parametrize("value", [0, 1.5, True, None, "text", b"bytes", int])
def test_a_flat_value_is_its_own_size(value: Any) -> None:
    assert sys.getsizeof(value) == sizeof(value)


TEXT = "x" * 100_000


@pytest.mark.parametrize(
    "hold",
    [
        lambda text: [text],
        lambda text: (text,),
        lambda text: {text},
        lambda text: frozenset([text]),
        lambda text: {"key": text},
        lambda text: {text: "value"},
        lambda text: deque([text]),
        lambda text: defaultdict(list, key=[text]),
        lambda text: OrderedDict(key=text),
        lambda text: History([text]),
        lambda text: Registry({"key": text}),
        lambda text: {"key": {text} | {str(number) for number in range(100)}},
        lambda text: {text: 0} | {str(number): number for number in range(20)},
        Plain,
        Slotted,
        lambda text: [{"a": [Plain(Slotted(text))]}],
    ],
)
def test_what_a_value_reaches_is_counted(hold: Any) -> None:
    """Containers and attributes are followed."""
    assert 100_000 < sizeof(hold("x" * 100_000)) < 115_000


def test_what_is_met_twice_counts_once() -> None:
    shared = [TEXT]

    assert sizeof([shared, shared]) < 110_000


def test_a_cycle_ends() -> None:
    cycle: list[Any] = [TEXT]
    cycle.append(cycle)
    cycle.append({"back": cycle})

    assert 100_000 < sizeof(cycle) < 400_000


def test_of_a_long_list_few_items_are_asked() -> None:
    """A list of ten thousand objects that say their size costs no more to measure than one of a few hundred."""
    looked_at = 0

    class Message:
        @property
        def nbytes(self) -> int:
            nonlocal looked_at
            looked_at += 1
            return 500

    conversation = [Message() for _ in range(10_000)]

    assert 4_500_000 < sizeof(conversation) < 6_000_000
    assert looked_at <= 300


def test_a_size_that_is_told_is_believed() -> None:
    assert 10_000_000 == sizeof(Array())
    assert sizeof([Array()]) > 10_000_000


def test_shared_things_count_as_their_shell() -> None:
    """Functions, classes and modules belong to the program, not to the value."""

    def function() -> str:
        return TEXT

    assert sizeof([function, sys, Plain, len, function.__code__]) < 5000


def test_depth_is_limited() -> None:
    nested: list[Any] = [TEXT]
    for _ in range(1000):
        nested = [nested]

    assert sizeof(nested) < 5000


@pytest.mark.parametrize("broken", ["__len__", "__sizeof__", "nbytes", "__dict__", "slot"])
def test_a_value_that_cannot_be_measured_counts_as_its_shell(broken: str) -> None:
    """Whatever the value does when it is looked at, the estimate is a number."""

    def fail(self: Any) -> Any:
        raise ArithmeticError("do not touch me")

    namespace: dict[str, Any] = {broken: fail if broken.startswith("__") and broken != "__dict__" else property(fail)}
    if broken == "slot":
        namespace = {"__slots__": (), "slot": property(fail)}
    kind: Any = type("Broken", (list,), namespace)

    assert sizeof(kind()) >= 0
    assert sizeof([kind()]) >= 0


# A walk over everything, to compare with: each object once, what belongs to the program left out.

PROGRAM = (type, ModuleType, FunctionType, logging.Logger, enum.Enum)


def walked(value: Any) -> int:
    """All bytes of *value*; what shares it with the program is for the tests to know."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, PROGRAM) or item is None:
            continue
        seen[id(item)] = item
        # Attributes without a dict get one here: so it is when anybody looks at it.
        waiting += gc.get_referents(item)
        waiting += [vars(item)] if hasattr(item, "__dict__") else []
        waiting += dict.keys(item) if isinstance(item, dict) else []
    return sum(map(sys.getsizeof, seen.values()))


def text(draw: random.Random, mean: float, spread: float) -> str:
    """Lengths that have a long tail, as those of messages do."""
    return "x" * max(1, int(mean * draw.lognormvariate(-spread * spread / 2, spread)))


@dataclass
class Record:
    role: str
    content: str
    at: float
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class SlottedRecord:
    role: str
    content: str
    at: float


class Model(pydantic.BaseModel):
    role: str
    content: str
    at: float
    tags: list[str] = []


class Struct(msgspec.Struct):
    role: str
    content: str
    at: float


def messages(draw: random.Random, count: int, spread: float = 1.0) -> list[Any]:
    return [{"role": ("user", "assistant")[i % 2], "content": text(draw, 300, spread)} for i in range(count)]


def with_tools(draw: random.Random, count: int) -> list[Any]:
    """A conversation with an agent: questions, calls, results and answers, each of another form."""

    def message(i: int) -> Any:
        if i % 4 == 1:
            arguments = json.dumps({"query": text(draw, 60, 0.5), "limit": i})
            call = {"id": f"call_{i}", "type": "function", "function": {"name": "search", "arguments": arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        if i % 4 == 2:
            return {"role": "tool", "tool_call_id": f"call_{i - 1}", "content": text(draw, 2000, 1.3)}
        return {"role": ("user", "", "", "assistant")[i % 4], "content": [{"type": "text", "text": text(draw, 300, 1)}]}

    return [message(i) for i in range(count)]


def of_records(make: Any) -> Any:
    return lambda draw, count: [make(role="user", content=text(draw, 300, 1.0), at=i + 0.5) for i in range(count)]


CONVERSATIONS: dict[str, Any] = {
    "dicts": messages,
    "dicts of very different lengths": lambda draw, count: messages(draw, count, 1.5),
    "parsed one by one": lambda draw, count: [json.loads(json.dumps(item)) for item in messages(draw, count)],
    "after a long prompt": lambda draw, count: [{"role": "system", "content": "p" * 20_000}, *messages(draw, count)],
    "tools": with_tools,
    "in a session": lambda draw, count: {
        "id": "s",
        "model": "m",
        "state": {"step": 1},
        "messages": messages(draw, count),
    },
    "by id": lambda draw, count: {f"message-{i}": item for i, item in enumerate(messages(draw, count))},
    "texts": lambda draw, count: [text(draw, 300, 1.5) for _ in range(count)],
    "tuples": lambda draw, count: [("user", text(draw, 300, 1.2), i + 0.5) for i in range(count)],
    "pairs": lambda draw, count: [[text(draw, 100, 1), text(draw, 900, 1)] for _ in range(count)],
    "dataclasses": of_records(Record),
    "dataclasses with dicts": lambda draw, count: [
        Record("user", text(draw, 300, 1), i + 0.5, {"id": i + 1000, "by": f"user {i}"}) for i in range(count)
    ],
    "slots": of_records(SlottedRecord),
    "models": of_records(Model),
    "structs": of_records(Struct),
    "a deque": lambda draw, count: deque(messages(draw, count)),
    "a history": lambda draw, count: History(messages(draw, count), maxlen=100_000),
    "of all kinds": lambda draw, count: [
        draw.choice(
            [*messages(draw, 1), text(draw, 300, 1), (i, text(draw, 300, 1)), Struct("a", text(draw, 300, 1), 0.1)]
        )
        for i in range(count)
    ],
}


@pytest.mark.parametrize("count", [1, 3, 10, 24, 27, 60, 300, 2100])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_estimate_is_within_15_percent_of_a_full_walk(kind: str, count: int) -> None:
    """Whatever messages are made of, and however their lengths differ."""
    conversation = CONVERSATIONS[kind](random.Random(f"{kind} {count}"), count)
    if count == 1:
        conversation = [conversation]

    expected = walked(conversation)
    # Keys and roles are the program's. They are most of a message that says nothing.
    assert 0.85 * expected - 700 <= sizeof(conversation) <= 1.15 * expected + 300


@pytest.mark.slow
def test_real_conversations_are_within_15_percent(real_data: Path) -> None:
    """The messages of each user of a chat, those of a few words and those who never stop."""
    users: defaultdict[str, list[Any]] = defaultdict(list)
    with gzip.open(real_data / "irc_messages.jsonl.gz", "rt") as lines:
        for line in islice(lines, 60_000):
            message = json.loads(line)
            users[message.pop("user")].append(message)
    chosen = [items for items in users.values() if len(items) >= 10][:400]
    chosen += sorted(users.values(), key=len)[-20:]

    wrong = [error for items in chosen if abs(error := sizeof(items) / walked(items) - 1) > 0.15]
    assert 420 == len(chosen)
    assert [] == wrong


@pytest.mark.parametrize("place", [0, 1, 57, 500])
def test_a_prompt_in_every_entry_is_not_counted_in_each(place: int) -> None:
    """What more than some sixteen entries hold is the program's."""
    prompt = "p" * 50_000
    entries = [messages(random.Random(place), 600) for _ in range(40)]
    for entry in entries[1:]:
        entry.insert(place, {"role": "system", "content": prompt})

    assert sizeof(entries[1]) == pytest.approx(sizeof(entries[0]), rel=0.02)
    del entries[3:], entry
    assert sizeof(entries[1]) == pytest.approx(sizeof(entries[0]) + 50_000, rel=0.15)


def test_what_many_hold_counts_if_they_are_all_in_the_value() -> None:
    """A tool result that a conversation quotes thirty times counts, and counts once."""
    result = "r" * 50_000
    conversation = [{"role": "tool", "content": result} for _ in range(30)]
    rows = [[1.5] * 20 for _ in range(5)]
    table = [rows] * 300
    del result, rows

    assert 50_000 < sizeof(conversation) < 60_000
    assert 300 * 8 < sizeof(table) < 5_000


def test_a_client_that_all_sessions_hold_is_not_counted() -> None:
    """Nor is all that it leads to."""
    client = Plain([Plain(str(number) * 500) for number in range(1000)])
    sessions = [Plain([client, {"user": str(number)}]) for number in range(100)]

    assert sizeof(sessions[0]) < 2_000
    assert sizeof(client) > 1_000_000


async def test_what_leads_to_the_program_ends_the_walk() -> None:
    """A session with a loop, a task, a thread, a logger, a method and a member of an enumeration is still small."""

    class Colour(enum.Enum):
        RED = "x" * 100_000

    task = asyncio.ensure_future(asyncio.sleep(0, "x" * 100_000))
    logger = logging.getLogger("x" * 100_000)
    loop = asyncio.get_running_loop()
    value = [task, logger, loop, threading.current_thread(), Colour.RED, Plain(TEXT * 2).__init__]

    assert sizeof(value) < 5_000
    assert sizeof([value]) < 5_000
    await task


def test_keys_are_not_counted_in_each_entry() -> None:
    """A small dict costs what its own values do."""
    entries = [{"a long name of a key, which is the same in all": number + 0.5} for number in range(1000)]

    assert sys.getsizeof(entries[0]) + sys.getsizeof(0.5) == sizeof(entries[0])


def test_measuring_a_value_does_not_make_it_larger() -> None:
    """Objects without a ``__dict__`` are not made to have one, which looking at it would do."""
    objects = [Plain(None) for _ in range(1000)]

    sizeof(objects)

    assert not any(isinstance(part, dict) for item in objects for part in gc.get_referents(item))


def test_no_code_of_the_value_runs() -> None:
    """But ``nbytes`` and ``__sizeof__``: not its length, iteration, comparison, hash, attributes or class."""

    def fail(*arguments: Any) -> Any:
        raise AssertionError("called")

    names = ("__len__", "__iter__", "__getitem__", "__eq__", "__hash__", "__getattr__", "__bool__", "__contains__")
    for base in (object, list, dict, tuple, set, deque):
        kind: Any = type("Quiet", (base,), dict.fromkeys(names, fail) | {"__class__": property(fail)})
        for count in (1, 30, 300):
            filled: Any = [kind() for _ in range(count)]
            if base in (list, deque):
                base.extend(filled[0], ["x" * 1000] * 40)

            assert sizeof(filled) >= count * 40


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda inner: [inner] * 3, lambda inner: [[inner] for _ in range(40)], Plain])
def test_the_work_is_bounded(make: Any) -> None:
    """However wide and deep: not all of a hundred thousand objects are asked."""
    asked = 0

    class Part:
        def __sizeof__(self) -> int:
            nonlocal asked
            asked += 1
            return 100

    cube = make([[[[Part() for _ in range(30)] for _ in range(30)] for _ in range(30)] for _ in range(10)])

    assert sizeof(cube) > 100_000
    assert asked < 30_000


@pytest.mark.slow
def test_a_class_that_is_gone_is_forgotten() -> None:
    """What is known of classes keeps none of them alive, and is not mixed up with that of a later one."""
    for number in range(3000):
        kind: Any = type("Passing", (), {"nbytes": 10_000 + number} if number % 2 else {})
        value = kind()

        assert (sizeof(value) >= 10_000) == (number % 2)
    del kind, value
    gc.collect()

    assert [] == [kind for kind in object.__subclasses__() if kind.__name__ == "Passing"]


@pytest.mark.slow
def test_a_value_may_change_while_it_is_measured() -> None:
    """Another thread appends, deletes and replaces meanwhile."""
    value: dict[str, Any] = {"messages": [{"role": "user", "content": str(number)} for number in range(200)]}
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            value[f"key {number % 300}"] = ["x" * (number % 100)]
            value["messages"].append({"role": "user", "content": str(number)})
            if len(value["messages"]) > 1000:
                del value["messages"][:900]
                value.pop(next(iter(value)) if len(value) > 200 else "", None)
                value.setdefault("messages", [])

    thread = threading.Thread(target=change)
    thread.start()
    try:
        sizes = [sizeof(value) for _ in range(300)]
    finally:
        stop.set()
        thread.join(10)

    assert min(sizes) > 0
