"""The bytes that a registry accounts for are those of the values that it holds, whatever happened to them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hygiene import bounded_registry
from hygiene.registry import Registry
from hygiene.testing import ManualClock

BOUND = 40
KEYS = st.integers(0, 6)
SIZES = st.integers(0, 12)


def weigh(value: Any) -> int:
    """Bytes of a value; ``None`` is no value that anybody put in."""
    assert value is not None
    return len(value)


class Pair:
    """Two dicts, whose values are weighed together or each by itself."""

    def __init__(self) -> None:
        self.chats: Any = {}
        self.files: Any = {}


class Deep:
    """Dicts in a dict, each with a bound of its own."""

    def __init__(self) -> None:
        self.rooms: Any = {}


def accounted(column: Registry[Any, Any]) -> Any:
    return (column if column.group is None else column.group).stats().bytes


def test_a_lease_in_a_group_leaves_the_bound_as_it_was() -> None:
    """Leases of linked attributes cost no accuracy: the bytes stay within max_bytes, and end at 0."""

    @bounded_registry("chats", "files", max_bytes=BOUND, getsizeof=weigh)
    class Bot(Pair):
        pass

    bot = Bot()
    for number in range(20):
        bot.chats[number] = "x" * 10
        with bot.chats.lease(number):
            bot.files[number] = "y" * 10

    assert BOUND == sum(map(len, bot.chats.values())) + sum(map(len, bot.files.values())) == accounted(bot.chats)
    for column in (bot.chats, bot.files):
        for number in list(column):
            del column[number]
    assert 0 == accounted(bot.chats)


def test_a_group_measures_no_row() -> None:
    """``getsizeof`` and ``importance`` are called with the values of the attributes, and with nothing else."""
    seen: list[Any] = []

    def rank(entry: Any) -> float:
        seen.append(entry.value)
        return 1.0

    @bounded_registry(
        "chats", "files", max_bytes=BOUND, getsizeof=lambda v: seen.append(v) or 1, policy="importance", importance=rank
    )
    class Bot(Pair):
        pass

    bot = Bot()
    bot.chats["a"] = "chat"
    with bot.files.lease("a", create=lambda: "file"):
        bot.chats["a"]
    bot.files.touch("a")

    assert {"chat", "file"} == set(seen)


def test_a_value_that_grew_in_another_attribute_counts_at_the_next_write() -> None:
    """In-place growth in one linked attribute is found when another one is written."""

    @bounded_registry("chats", "files", max_bytes=BOUND, getsizeof=weigh)
    class Bot(Pair):
        pass

    bot = Bot()
    for number in range(4):
        bot.chats[number] = [0] * 5
    bot.chats[1].extend([0] * 30)
    bot.files[9] = [0] * 5

    assert BOUND >= accounted(bot.chats) == sum(map(len, [*bot.chats.values(), *bot.files.values()]))


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("put", [{}, {7: "x" * 8}, None])
def test_an_attribute_that_is_assigned_again_weighs_what_it_holds_now(put: dict[int, str] | None, taken: bool) -> None:
    """The bytes of the old dict leave the account with it, even where another part of the program still holds it."""

    @bounded_registry("chats", "files", max_bytes=BOUND, getsizeof=weigh)
    class Bot(Pair):
        pass

    bot = Bot()
    for number in range(3):
        bot.chats[number] = "x" * 6
        bot.files[number] = "y" * 5
    group = bot.chats.group
    old = bot.chats if taken else None
    bot.chats = put
    if taken and put is not None:  # the holder's dict is no longer one of the linked attributes
        assert 15 + sum(map(len, put.values())) == group.stats().bytes
    del old
    gc.collect()

    assert 15 + sum(map(len, (put or {}).values())) == group.stats().bytes
    assert {0, 1, 2, *(put or {})} == set(group.rows)
    bot.files = None
    assert sum(map(len, (put or {}).values())) == group.stats().bytes


def test_the_same_entries_assigned_again_are_not_weighed_twice() -> None:
    """``bot.chats = dict(bot.chats)`` keeps every entry, with bytes for just these."""

    @bounded_registry("chats", "files", max_bytes=BOUND, getsizeof=weigh)
    class Bot(Pair):
        pass

    bot = Bot()
    for number in range(4):
        bot.chats[number] = "x" * 9
    bot.chats = dict(bot.chats)

    assert [0, 1, 2, 3] == list(bot.chats)
    assert 36 == accounted(bot.chats)


class Weighed(RuleBasedStateMachine):
    """Columns against a recount: after each step the account is exact, and at rest it is within the bound."""

    @initialize(kind=st.sampled_from(["alone", "linked", "derived", "deep"]), timed=st.booleans(), told=st.booleans())
    def begin(self, kind: str, timed: bool, told: bool) -> None:
        self.clock, self.kind = ManualClock(), kind
        limits: dict[str, Any] = {"max_bytes": BOUND, "getsizeof": weigh}
        if timed:
            limits |= {"ttl": 3600, "idle": 1800, "timer": self.clock}
        if told:
            limits |= {"on_evict": lambda removal: None}
        self.make(limits)

    def make(self, limits: dict[str, Any]) -> None:
        if self.kind == "deep":
            owner: Any = bounded_registry("rooms", depth=1, maxsize=None, **limits)(type("Deep", (Deep,), {}))()
            for room in "ab":
                owner.rooms[room] = {}
            self.columns = lambda: [owner.rooms["a"], owner.rooms["b"]]
            self.assign = lambda index, value: owner.rooms.__setitem__("ab"[index], {} if value is None else value)
            return
        cls: type[Any] = type("Bot", (Pair,), {})
        if self.kind == "alone":
            cls = bounded_registry("chats", maxsize=None, **limits)(
                bounded_registry("files", maxsize=None, **limits)(cls)
            )
        elif self.kind == "linked":
            cls = bounded_registry("chats", "files", maxsize=None, **limits)(cls)
        else:
            cls = bounded_registry("chats", "files", maxsize=None, key={"files": lambda k: k // 2}, **limits)(cls)
        bot: Any = cls()
        self.columns = lambda: [column for column in (bot.chats, bot.files) if column is not None]
        self.assign = lambda index, value: setattr(bot, ("chats", "files")[index], value)

    def column(self, index: int) -> Any:
        columns = self.columns()
        return columns[index % len(columns)]

    def teardown(self) -> None:
        if not hasattr(self, "columns"):
            return
        totals = [(column if column.group is None else column.group) for column in self.columns()]
        for column in self.columns():
            column.clear()

        assert [0] * len(totals) == [total.stats().bytes for total in totals]

    @rule(index=st.integers(0, 1), key=KEYS, size=SIZES)
    def write(self, index: int, key: int, size: int) -> None:
        self.column(index)[key] = bytearray(size)

    @rule(index=st.integers(0, 1), key=KEYS, size=SIZES)
    def setdefault(self, index: int, key: int, size: int) -> None:
        self.column(index).setdefault(key, bytearray(size))

    @rule(index=st.integers(0, 1), key=KEYS, by=SIZES, shrink=st.booleans())
    def change_in_place(self, index: int, key: int, by: int, shrink: bool) -> None:
        value = self.column(index).get(key)
        if value is not None:
            value[:] = value[by:] if shrink else value + bytearray(by)

    @rule(index=st.integers(0, 1), key=KEYS, size=SIZES, by=SIZES)
    def lease(self, index: int, key: int, size: int, by: int) -> None:
        with self.column(index).lease(key, create=lambda: bytearray(size)) as value:
            value.extend(bytearray(by))

    @rule(index=st.integers(0, 1), key=KEYS)
    def pop(self, index: int, key: int) -> None:
        self.column(index).pop(key, None)

    @rule(index=st.integers(0, 1))
    def popitem(self, index: int) -> None:
        if self.column(index):
            self.column(index).popitem()

    @rule(index=st.integers(0, 1))
    def clear(self, index: int) -> None:
        self.column(index).clear()

    @rule(index=st.integers(0, 1), to=st.sampled_from([0, 2, "50%", "10B"]))
    def trim(self, index: int, to: Any) -> None:
        self.column(index).trim(to)

    @rule(index=st.integers(0, 1), key=KEYS)
    def evict(self, index: int, key: int) -> None:
        self.column(index).evict(key)

    @rule(index=st.integers(0, 1), sizes=st.lists(SIZES, max_size=3))
    def assign_again(self, index: int, sizes: list[int]) -> None:
        self.assign(index, {number: bytearray(size) for number, size in enumerate(sizes)})

    @precondition(lambda self: self.kind in ("alone", "linked", "derived") and len(self.columns()) == 2)
    @rule(index=st.integers(0, 1))
    def assign_none(self, index: int) -> None:
        self.assign(index, None)

    @rule(minutes=st.integers(1, 40))
    def wait(self, minutes: int) -> None:
        self.clock.advance(60 * minutes)
        for column in self.columns():
            column.expire()

    @invariant()
    def account_is_exact(self) -> None:
        if not hasattr(self, "columns"):
            return
        columns = self.columns()
        for column in columns:
            (column if column.group is None else column.group.rows)._measure_lent()
        held = [sum(map(len, dict.values(column))) for column in columns]
        if self.kind in ("linked", "derived"):
            assert [sum(held)] * len(columns) == [column.group.stats().bytes for column in columns]
            largest = max((self.heaviest_row(columns, row) for row in columns[0].group.rows), default=0)
            held = [sum(held)]
        else:
            assert held == [column.stats().bytes for column in columns]
            largest = max((len(value) for column in columns for value in dict.values(column)), default=0)
        for size in held:
            assert size <= max(BOUND, largest)

    def heaviest_row(self, columns: list[Any], row: int) -> int:
        return sum(len(dict.__getitem__(column, key)) for column in columns for key in column._keys_of(row))


TestWeighed = pytest.mark.slow(Weighed.TestCase)
TestWeighed.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Quick(Weighed.TestCase):
    """The same in a second."""

    settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
