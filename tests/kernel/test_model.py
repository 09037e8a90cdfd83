"""The kernel's interface beside a plain model: both bodies do the same, step by step."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

NOTHING = object()


class Same:
    """Equal to others of its number, and of the same hash as all."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.number == other.number

    def __repr__(self) -> str:
        return f"Same({self.number})"


KEYS = st.one_of(
    st.integers(0, 4),
    st.sampled_from(["a", "b", "ä", 1.0, True, None, (0, "a"), ("a", (1, 2)), frozenset({1})]),
    st.builds(Same, st.integers(0, 3)),
)
VALUES = st.integers(0, 9)


class Model:
    """What a kernel is: entries in the order of insertion, keys by recency, times."""

    def __init__(self, *, written: bool, used: bool, uses_in_order: bool) -> None:
        self.entries: dict[Any, Any] = {}
        self.recency: OrderedDict[Any, None] = OrderedDict()
        self.written: OrderedDict[Any, float] | None = OrderedDict() if written else None
        self.used: OrderedDict[Any, float] | None = OrderedDict() if used else None
        self.uses_in_order = uses_in_order
        self.puts = self.removed = 0

    def store(self, key: Any, value: Any) -> None:
        self.puts += key not in self.entries
        self.entries[key] = value
        self.recency.setdefault(key)

    def use(self, key: Any, now: float) -> None:
        self.recency.move_to_end(key)
        if self.used is not None and key in self.used:
            self.used[key] = now
            if self.uses_in_order:
                self.used.move_to_end(key)

    def stamp(self, key: Any, now: float) -> None:
        if self.written is not None:
            self.written[key] = now
            self.written.move_to_end(key)
        if self.used is not None:
            self.used[key] = now
            if self.uses_in_order:
                self.used.move_to_end(key)

    def take(self, key: Any) -> tuple[Any, float | None, float | None]:
        self.removed += 1
        del self.recency[key]
        written = None if self.written is None else self.written.pop(key, None)
        return self.entries.pop(key), written, None if self.used is None else self.used.pop(key, None)

    @property
    def oldest(self) -> Any:
        return next(iter(self.recency), NOTHING)


class Machine(RuleBasedStateMachine):
    """One sequence of calls on each body, and on the model."""

    bodies: list[ModuleType]
    build: Callable[..., Any]

    @initialize(
        bound=st.sampled_from([2, 4, 100]),
        timed=st.booleans(),
        written=st.booleans(),
        used=st.booleans(),
        in_order=st.booleans(),
    )
    def begin(self, bound: int, timed: bool, written: bool, used: bool, in_order: bool) -> None:
        self.now = 0.0
        self.bound = bound
        self.timed = timed
        options = {"written": timed and written, "used": timed and used, "uses_in_order": timed and in_order}
        self.model = Model(**options)
        self.kernels = [
            type(self).build(body, bound=bound, timer=(lambda: self.now) if timed else None, **options)
            for body in self.bodies
        ]

    def each(self, expected: Any, call: Callable[[ModuleType, Any], Any]) -> None:
        """What is expected is what each body gives; an exception class is what it raises."""
        for body, kernel in zip(self.bodies, self.kernels, strict=True):
            try:
                actual = call(body, kernel)
            except (KeyError, TypeError) as error:
                actual = type(error)
            if actual is body.MISSING:
                actual = NOTHING
            assert expected == actual, body.__name__

    @rule(seconds=st.integers(1, 9))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(key=KEYS, value=VALUES)
    def put(self, key: Any, value: Any) -> None:
        """As ``r[key] = value``: most recent, and the oldest leave over the bound."""
        model = self.model
        model.store(key, value)
        model.recency.move_to_end(key)
        model.stamp(key, self.now)
        while len(model.entries) > self.bound:
            model.take(model.oldest)
        self.each(None, lambda body, kernel: kernel.__setitem__(key, value))

    @rule(key=KEYS, value=VALUES)
    def store(self, key: Any, value: Any) -> None:
        self.model.store(key, value)
        self.each(None, lambda body, kernel: body.store(kernel, key, value))

    @rule(key=KEYS)
    def read(self, key: Any) -> None:
        expected = self.model.entries.get(key, KeyError)
        if expected is not KeyError:
            self.model.use(key, self.now)
        self.each(expected, lambda body, kernel: kernel[key])

    @rule(key=KEYS)
    def get(self, key: Any) -> None:
        expected = self.model.entries.get(key)
        if expected is not None:
            self.model.use(key, self.now)
        self.each(expected, lambda body, kernel: kernel.get(key))

    @rule(key=KEYS)
    def contains(self, key: Any) -> None:
        self.each(key in self.model.entries, lambda body, kernel: key in kernel)

    @rule(call=st.sampled_from(["__getitem__", "get", "__contains__"]))
    def an_unhashable_key_is_refused(self, call: str) -> None:
        self.each(TypeError, lambda body, kernel: getattr(kernel, call)([]))

    @rule(key=KEYS)
    def delete(self, key: Any) -> None:
        expected = None
        if key in self.model.entries:
            self.model.take(key)
        else:
            expected = KeyError
        self.each(expected, lambda body, kernel: kernel.__delitem__(key))

    @rule(key=KEYS)
    def take(self, key: Any) -> None:
        expected = self.model.take(key)[0] if key in self.model.entries else "default"
        self.each(expected, lambda body, kernel: body.take(kernel, key, "default"))
        self.each(None, lambda body, kernel: kernel._unstamp(key))

    @rule()
    def take_oldest(self) -> None:
        oldest = self.model.oldest
        expected = KeyError if oldest is NOTHING else (oldest, self.model.take(oldest)[0])
        self.each(expected, lambda body, kernel: body.take_oldest(kernel, last=False))
        if oldest is not NOTHING:
            self.each(None, lambda body, kernel: kernel._unstamp(oldest))

    @rule(key=KEYS)
    def move(self, key: Any) -> None:
        if key in self.model.recency:
            self.model.recency.move_to_end(key)
            self.each(None, lambda body, kernel: body.move(kernel, key))
        else:
            self.each(KeyError, lambda body, kernel: body.move(kernel, key))

    @rule(key=KEYS)
    def extract(self, key: Any) -> None:
        expected = self.model.take(key) if key in self.model.entries else None
        self.each(expected, lambda body, kernel: kernel._extract(key))

    @rule()
    def extract_oldest(self) -> None:
        oldest = self.model.oldest
        expected = KeyError if oldest is NOTHING else (oldest, *self.model.take(oldest))
        self.each(expected, lambda body, kernel: kernel._extract_oldest())

    @rule(key=KEYS, newest=KEYS, leased=st.sets(KEYS, max_size=4), most=st.integers(0, 5))
    def step_to_free(self, key: Any, newest: Any, leased: set[Any], most: int) -> None:
        """Who is leased or newest is stepped over, to the recent end."""
        for kernel in self.kernels:
            kernel._leases.update(dict.fromkeys(leased, 1))
        order, expected, skipped = self.model.recency, NOTHING, 0
        while skipped <= len(order) and order:
            oldest = self.model.oldest
            if oldest not in leased and oldest != newest:
                expected = oldest
                break
            order.move_to_end(oldest)
            skipped += 1
            if skipped > most:
                expected = self.bodies[0].CROWDED
                break
        self.each(expected, lambda body, kernel: kernel._step_to_free(newest, most))
        for kernel in self.kernels:
            kernel._leases.clear()

    @rule(key=KEYS)
    def stamp_write(self, key: Any) -> None:
        if self.timed and key in self.model.entries:
            self.model.stamp(key, self.now)
            self.each(self.now, lambda body, kernel: kernel._stamp_write(key))

    @rule(key=KEYS)
    def stamp_use(self, key: Any) -> None:
        used = self.model.used
        if used is not None and key in used:
            used[key] = self.now
            if self.model.uses_in_order:
                used.move_to_end(key)
        self.each(None, lambda body, kernel: kernel._stamp_use(key))

    @rule(key=KEYS, ago=st.integers(0, 5))
    def write_as(self, key: Any, ago: int) -> None:
        written = self.model.written
        if written is not None and key in written:
            written[key] = self.now - ago
        self.each(None, lambda body, kernel: kernel._write_as(key, self.now - ago))

    @rule(key=KEYS)
    def unwrite(self, key: Any) -> None:
        expected = None if self.model.written is None else self.model.written.pop(key, None)
        self.each(expected, lambda body, kernel: kernel._unwrite(key))

    @rule(key=KEYS, ago=st.integers(0, 5))
    def write_first(self, key: Any, ago: int) -> None:
        written = self.model.written
        if written is not None and key in self.model.entries:
            written[key] = self.now - ago
            written.move_to_end(key, last=False)
        self.each(None, lambda body, kernel: kernel._write_first(key, self.now - ago))

    @rule()
    def order_uses(self) -> None:
        model = self.model
        if model.uses_in_order or not self.timed:
            return
        model.uses_in_order = True
        if model.used is not None:
            for key in model.recency:
                if key in model.used:
                    model.used.move_to_end(key)
        self.each(None, lambda body, kernel: kernel._order_uses())
        for body, kernel in zip(self.bodies, self.kernels, strict=True):
            kernel._take_paths(reads=body.PARKS, misses=False, writes=True, moves=True, uses_in_order=True)

    @rule(key=KEYS)
    def reinsert(self, key: Any) -> None:
        if key in self.model.entries:
            stored = next(one for one in self.model.entries if one == key)
            self.model.entries[stored] = self.model.entries.pop(key)
            self.model.recency.move_to_end(key)
            self.each(None, lambda body, kernel: kernel._reinsert(key))

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        model = self.model
        written, used = model.written or {}, model.used or {}
        in_order = next(iter(used), NOTHING) if model.uses_in_order else model.oldest
        self.each(model.entries, lambda body, kernel: dict(dict.items(kernel)))
        self.each(list(model.entries), lambda body, kernel: list(dict.keys(kernel)))
        self.each(list(model.recency), lambda body, kernel: list(body.by_recency(kernel)))
        self.each(model.oldest, lambda body, kernel: body.oldest(kernel))
        self.each([written.get(key) for key in model.entries], lambda body, kernel: [*map(kernel._written_at, kernel)])
        self.each([used.get(key) for key in model.entries], lambda body, kernel: [*map(kernel._used_at, kernel)])
        self.each(next(iter(written.items()), None), lambda body, kernel: kernel._first_written())
        first = (in_order, used[in_order]) if in_order is not NOTHING and in_order in used else None
        self.each(first, lambda body, kernel: kernel._first_used())
        assert model.puts == len(model.entries) + model.removed


@pytest.mark.slow
def test_both_bodies_do_what_the_model_does(bodies: list[ModuleType], build: Callable[..., Any]) -> None:
    """Whatever is called in whatever order, a registry gives the same on either body."""
    machine = type("Here", (Machine,), {"bodies": bodies, "build": staticmethod(build)})

    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_an_order_with_entries_out_of_it_is_a_list(
    body: ModuleType, build: Callable[..., Any], moves: bool, seed: int
) -> None:
    """Who is discarded from a `LinkedOrder` does not leave; who is put back is next."""
    draw = random.Random(seed)
    kernel = build(body)
    order = body.LinkedOrder(kernel, moves=moves)
    model: OrderedDict[Any, None] = OrderedDict()
    for _ in range(300):
        key = draw.choice([draw.randrange(6), Same(draw.randrange(4))])
        action = draw.choice(["add", "touch", "discard", "pop", "put_back", "delete"])
        if action == "add":
            body.store(kernel, key, 1)
            order.add(key)
            model.setdefault(key)
            if moves:
                model.move_to_end(key)
        elif action == "touch":
            assert (key in model) is order.touch(key)
            if moves and key in model:
                model.move_to_end(key)
        elif action == "put_back" and key in kernel:
            order.put_back(key)
            model[key] = None
            model.move_to_end(key, last=False)
        elif action in {"discard", "delete"}:
            order.discard(key)
            model.pop(key, None)
            if action == "delete":
                body.take(kernel, key, None)
        elif action == "pop" and model:
            assert model.popitem(last=False)[0] == order.pop()
        elif action == "pop" and (not body.PARKS or not len(kernel)):
            with pytest.raises(KeyError):
                order.pop()
        assert all((one in model) is (one in order) for one in (*range(6), *map(Same, range(4))))


@pytest.mark.parametrize("times", [(False, False), (True, False), (True, True)])
def test_thousands_come_and_go(body: ModuleType, build: Callable[..., Any], times: tuple[bool, bool]) -> None:
    """A registry that was large and is small again has lost nothing, and its order and times are what they were."""
    draw = random.Random(1)
    now = [0.0]
    written, used = times
    kernel = build(body, timer=lambda: now[0], written=written, used=used)
    model: OrderedDict[Any, int] = OrderedDict()
    stamps: OrderedDict[Any, float] = OrderedDict()
    for goal in (5_000, 3, 2_000, 100, 0, 3_000, 1):
        while len(model) != goal:
            now[0] += 1
            key = draw.choice((int, str))(draw.randrange(20_000))
            if len(model) < goal:
                kernel[key] = model[key] = draw.randrange(100)
                model.move_to_end(key)
                stamps[key] = now[0]
                stamps.move_to_end(key)
            else:
                oldest, value = model.popitem(last=False)
                del stamps[oldest]
                assert (oldest, value) == kernel._extract_oldest()[:2]
        assert list(model.items()) == [(key, dict.__getitem__(kernel, key)) for key in body.by_recency(kernel)]
        if written:
            assert stamps == {key: kernel._written_at(key) for key in kernel}
            assert next(iter(stamps.items()), None) == kernel._first_written()


def test_room_is_given_back(compiled: ModuleType, build: Callable[..., Any]) -> None:
    """What was large and is small takes no more than what was always small, but for the dict's own table."""
    kernel = build(compiled, timer=lambda: 0.0, written=True, used=True)
    for number in range(20_000):
        kernel[number] = None
    large = kernel.__sizeof__()
    while len(kernel) > 10:
        compiled.take_oldest(kernel)

    assert large - 20_000 * 72 > kernel.__sizeof__()
