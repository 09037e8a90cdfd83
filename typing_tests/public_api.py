"""What a type checker sees of the public API. Checked by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from functools import partial
from typing import Any, assert_type

import hygiene
from hygiene import (
    Cause,
    Entry,
    History,
    HygieneError,
    Registry,
    RegistryFull,
    RegistryStats,
    Removal,
    bounded_history,
    bounded_registry,
    guard,
    load_guards,
    referenced,
    registry_of,
    ttl_registry,
)
from hygiene.testing import ManualClock


class Session:
    """A value as users have them."""

    running: bool = False

    async def aclose(self) -> None: ...


async def connect() -> Session:
    return Session()


# A registry is a dict of what it says.

sessions: Registry[str, Session] = Registry(maxsize=500, idle="2h", busy="running", close="aclose")
as_dict: dict[str, Session] = sessions

assert_type(sessions["a"], Session)
assert_type(sessions.get("a"), Session | None)
assert_type(sessions.get("a", Session()), Session)
assert_type(sessions.get("a", 0), Session | int)
assert_type(sessions.setdefault("a", Session()), Session)
assert_type(sessions.pop("a"), Session)
assert_type(sessions.popitem(), tuple[str, Session])
assert_type(list(sessions), list[str])
assert_type(dict(sessions), dict[str, Session])
assert_type(sessions.copy(), Registry[str, Session])
assert_type(sessions | {"b": Session()}, dict[str, Session])
assert_type(sessions.touch("a"), bool)
assert_type(sessions.evict("a"), bool)
assert_type(sessions.expire(), int)
assert_type(sessions.trim(to="50%"), int)
assert_type(sessions.stats(), RegistryStats)
assert_type(sessions.stats().evictions[Cause.SIZE], int)

keys: KeysView[str] = sessions.keys()
values: ValuesView[Session] = sessions.values()
items: ItemsView[str, Session] = sessions.items()

from_pairs: Registry[str, int] = Registry([("a", 1)], maxsize=2)
assert_type(from_pairs["a"], int)


def on_evict(removal: Removal[str, Session]) -> None:
    assert_type(removal.key, str)
    assert_type(removal.value, Session)
    assert_type(removal.cause, Cause)
    assert_type(removal.age, float | None)


def busy(entry: Entry[str, Session]) -> bool:
    assert_type(entry.key, str)
    assert_type(entry.value, Session)
    return entry.value.running


hooked: Registry[str, Session] = Registry(maxsize=2, on_evict=on_evict, busy=busy)
in_use: Registry[str, Session] = Registry(maxsize=2, busy=referenced)
clocked: Registry[str, Session] = Registry(ttl="90s", timer=ManualClock())


# A lease yields the value, whoever makes it.

with sessions.lease("a") as held:
    assert_type(held, Session)

with sessions.lease("a", create=Session) as created:
    assert_type(created, Session)


async def leasing() -> None:
    async with sessions.lease("a", create=Session) as made:
        assert_type(made, Session)
    async with sessions.lease("a", create=connect) as connected:
        assert_type(connected, Session)
    await sessions.drain()
    await sessions.aclose()


assert_type(asyncio.run(leasing()), None)


# A history is a list of what it says.

history: History[str] = History(maxlen=50, keep_first=1)
as_list: list[str] = history

assert_type(history[0], str)
assert_type(list(history), list[str])
assert_type(history.pop(), str)

# What it is made without does not make it one of nothing.

unknown = History(maxlen=3)
assert_type(unknown, History[Any])
unknown.append("hello")
unknown += [1]
nothing_yet = History((), max_bytes="64KiB", keep_first=1, compact=True)
assert_type(nothing_yet, History[Any])
nothing_yet.append(b"hello")
unbounded = History()
unbounded.append(1.5)
narrow: History[str] = History(maxlen=3)
narrow.append(3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def shorten(gone: list[str]) -> str:
    return " ".join(gone)


def tokens(text: str) -> int:
    return len(text)


assert_type(History(maxlen=3, summarize=shorten), History[str])
assert_type(History(max_tokens=3, count_tokens=tokens), History[str])
assert_type(History(["a"], maxlen=3), History[str])


class Transcript(History[str]):
    def __init__(self) -> None:
        super().__init__(maxlen=3)
        self.notes: list[int] = History(maxlen=2)


assert_type(Transcript()[0], str)
assert_type(Transcript().notes, list[int])

chats: Registry[str, list[str]] = Registry(maxsize=2, values=partial(History, maxlen=50))
assert_type(chats["a"], list[str])


# Decorators keep the class.


@bounded_registry("sessions", "locks", maxsize=500, busy="running", close="aclose")
@ttl_registry("sessions", idle="2h")
@bounded_history("messages", maxlen=50)
class Bot:
    def __init__(self, token: str) -> None:
        self.token = token
        self.sessions: dict[str, Session] = {}
        self.locks: dict[str, asyncio.Lock] = {}
        self.messages: list[str] = []


made_by_type: type[Bot] = Bot
bot = Bot("token")
assert_type(bot, Bot)
assert_type(bot.sessions, dict[str, Session])
assert_type(bounded_registry("sessions")(Bot), type[Bot])

# The registry in a decorated attribute, with the types of the dict that the class declares.
assert_type(registry_of(bot.sessions), Registry[str, Session])
assert_type(registry_of(bot.sessions).stats(), RegistryStats)
registry_of(bot.messages)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

# Limits of a living registry: any duration or size is taken, and a number comes back.
live = registry_of(bot.sessions)
live.ttl, live.max_bytes, live.maxsize = "2h", "64MiB", None


def read_limits(live: Registry[str, Session]) -> None:
    assert_type(live.ttl, float | None)
    assert_type(live.max_bytes, int | None)
    assert_type(live.maxsize, int | None)


live.default_factory = None
live.maxsize = "5"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]

# The signature is kept: a token is missing.
Bot()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
# A misspelt limit is seen by the checker.
bounded_registry("sessions", maxsiz=5)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


# Guards and errors.

guard(Bot, "sessions", maxsize=5)
guard("package.module:Class", "sessions", idle="2h")
load_guards("hygiene.toml")

try:
    sessions["b"] = Session()
except RegistryFull as full:
    root: HygieneError = full
    assert_type(full.stats, RegistryStats | None)


def every_public_name() -> Iterator[Any]:
    for name in hygiene.__all__:
        yield getattr(hygiene, name)
