"""
User code in the middle of everything, drawn at random: ``fuzz.py bare|registry SEED ROUNDS``.

Keys whose hashes are equal, and keys, values and hooks that use the registry while it works, go past it, raise, or
have the garbage collected. After each round the books must balance. A crash ends the process, so it runs in its own.
"""

# ruff: noqa: C901, PLR0912, PLW0603, SIM105, T201 - a program: what happens in the middle is global, and it prints

from __future__ import annotations

import gc
import logging
import random
import sys
from collections.abc import Callable
from typing import Any

from bare import build, load_body

import hygiene

draw = random.Random()
PURE = False  # which body it is
CALM = False  # whether comparisons keep to themselves what is raised in them
plain = False  # whether keys are strings, numbers and tuples only
depth = 0
budget = 0
trap: Callable[[], None] | None = None


class Refused(Exception):
    """What user code raises."""


def spring(chance: float) -> None:
    """Run what is to happen in the middle: three deep and 300 times at most, or it would not end."""
    global depth, budget
    if trap is None or depth >= 3 or budget <= 0 or draw.random() >= chance:
        return
    budget -= 1
    depth += 1
    try:
        trap()
    except (AttributeError, KeyError, Refused, hygiene.RegistryFull):
        if not CALM:
            raise
    finally:
        depth -= 1


class Key:
    """Two hashes for all, and a comparison that may do anything."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        spring(0.01)
        return self.number % 2

    def __eq__(self, other: object) -> bool:
        spring(0.08)
        return isinstance(other, Key) and self.number == other.number

    def __del__(self) -> None:
        try:
            spring(0.05)
        except Exception:  # noqa: BLE001
            pass

    def __repr__(self) -> str:
        return f"Key({self.number})"


class Value:
    """Knows whose it is, and may use the registry as its last act."""

    def __init__(self, key: Any) -> None:
        self.of = key

    def __del__(self) -> None:
        try:
            spring(0.1)
        except Exception:  # noqa: BLE001
            pass


def a_key() -> Any:
    number = draw.randrange(12)
    kind = draw.choice((0, 1, 3)) if plain else draw.randrange(4)
    return (str(number), number, Key(number), (number, str(number)))[kind]


def name_of(key: Any) -> Any:
    return ("Key", key.number) if isinstance(key, Key) else key


def a_value(key: Any) -> Any:
    value = Value(name_of(key))
    if draw.random() < 0.1:
        value.cycle = value  # type: ignore[attr-defined]
    return value


def check_value(key: Any, value: Any) -> None:
    if value.of != name_of(key):
        print(f"WRONG VALUE: {key!r} has that of {value.of!r}", flush=True)
        sys.exit(3)


def foreign(r: Any) -> None:
    """Go past the registry."""
    key = a_key()
    choice = draw.randrange(8)
    if choice == 0:
        dict.__setitem__(r, key, a_value(key))
    elif choice == 1:
        dict.pop(r, key, None)
    elif choice == 2:
        dict.update(r, {key: a_value(key)})
    elif choice == 3:
        dict.setdefault(r, key, a_value(key))
    elif choice == 4:
        if len(r):
            dict.popitem(r)
    elif choice == 5:
        # Not in the middle of a comparison: a plain dict does not survive that either (it then takes any key for text).
        if depth == 0 and draw.random() < 0.1:
            dict.clear(r)
    elif choice == 6:
        dict.__delitem__(r, key)
    else:
        hot = type("Anything", (), {})()
        hot.__dict__ = r  # a specialised STORE_ATTR writes into the entries without a call
        for number in range(3):
            hot.attribute = a_value("attribute")
            if number == 1:
                del hot.attribute


def on_bare(body: Any, r: Any, foreigners: bool) -> None:
    key = a_key()
    choice = draw.randrange(22)
    if choice < 4:
        r[key] = a_value(key)
    elif choice < 7:
        value = r.get(key)
        if value is not None:
            check_value(key, value)
    elif choice == 7:
        check_value(key, r[key])
    elif choice == 8:
        del r[key]
    elif choice == 9:
        held = dict.get(r, key)  # the caller of the vocabulary sees to it that what is overwritten dies last
        body.store(r, key, a_value(key))
        del held
    elif choice == 10:
        value = body.take(r, key, None)
        r._unstamp(key)
        if value is not None:
            check_value(key, value)
    elif choice == 11:
        key, value = body.take_oldest(r)
        r._unstamp(key)
        check_value(key, value)
    elif choice == 12:
        body.move(r, key)
    elif choice == 13:
        body.oldest(r)
        list(body.by_recency(r))
    elif choice == 14:
        found = r._extract(key)
        if found is not None:
            check_value(key, found[0])
    elif choice == 15:
        key, value, *_ = r._extract_oldest()
        check_value(key, value)
    elif choice == 16:
        r._step_to_free(key, draw.randrange(5))
    elif choice == 17:
        r._stamp_write(key) if r._clocked and key in r else None
        r._stamp_use(key) if r._clocked else None
    elif choice == 18:
        r._first_written(), r._first_used()
        r._written_at(key), r._used_at(key)
        r._write_as(key, 1.0)
    elif choice == 19:
        when = r._unwrite(key)
        if when is not None:
            r._write_first(key, when)
        if draw.random() < 0.02:
            r._order_uses()
    elif choice == 20:
        r._reinsert(key)
    elif foreigners:
        foreign(r)


def run_bare(body: Any) -> None:
    """A bare kernel for a while, and then the books."""
    global trap
    timed = draw.random() < 0.5
    foreigners = not PURE and draw.random() < 0.5
    bound = draw.choice((1, 3, 8, 20, 100))
    written, used = draw.random() < 0.6, draw.random() < 0.6
    r = build(body, bound=bound, timer=(lambda: 1.0) if timed else None, written=timed and written, used=timed and used)

    def inside() -> None:
        choice = draw.random()
        if choice < 0.05:
            raise Refused
        if choice < 0.1:
            gc.collect(draw.randrange(3))
        elif choice < 0.2:
            for number in range(draw.randrange(60)):
                r[number + 1000] = a_value(number + 1000)
        elif choice < 0.25:
            while len(r):
                body.take_oldest(r)
        else:
            on_bare(body, r, foreigners)

    order = None
    if draw.random() < 0.3 and body.PARKS and not foreigners:
        order = body.LinkedOrder(r, moves=draw.random() < 0.5)
    trap = inside
    for _ in range(draw.randrange(150)):
        try:
            if order is not None and draw.random() < 0.2:
                key = a_key()
                draw.choice((order.touch, order.add, order.put_back, order.discard, order.__contains__))(key)
            else:
                on_bare(body, r, foreigners)
        except (AttributeError, KeyError, Refused):
            pass
    trap = None
    for key, value in list(dict.items(r)):
        check_value(key, value)
    settle_bare(body, r, bound)


def settle_bare(body: Any, r: Any, bound: int) -> None:
    """With nobody in the way the bound is kept again, and everybody can leave."""
    if body.PARKS:
        order = body.LinkedOrder(r)
        for key in list(dict.keys(r)):
            order.add(key)  # who was parked may leave again
    for number in range(3):
        r[number + 500] = a_value(number + 500)
    if len(r) > bound and body.PARKS:
        print(f"OVER: {len(r)} of {bound}", flush=True)
        sys.exit(4)
    if not body.PARKS:
        return
    alive = {id(key) for key in dict.keys(r)}
    for _ in range(10_000):
        try:
            body.take_oldest(r)
        except KeyError:
            break
    if len(r):
        print(f"STUCK: {dict.copy(r)} of {len(alive)}", flush=True)
        sys.exit(5)
    if body.oldest(r) is not body.MISSING or list(body.by_recency(r)) or list(dict.keys(r)):
        print("GHOSTS", flush=True)
        sys.exit(6)


def a_registry(clock: list[float]) -> hygiene.Registry[Any, Any]:
    """Any policy, any limits."""
    options: dict[str, Any] = {"maxsize": draw.choice((1, 2, 5, 9, 30)), "revive": draw.random() < 0.5}
    policy = draw.choice(("lru", "lru", "lru", "fifo", "lfu", "importance"))
    options["policy"] = policy
    if policy == "importance":
        options["importance"] = lambda entry: (spring(0.05), draw.random())[1]
    if draw.random() < 0.3:
        options["ttl"] = draw.choice((1, 5, 50))
    if draw.random() < 0.3:
        options["idle"] = draw.choice((1, 5, 50))
    if draw.random() < 0.3:
        options["on_evict"] = lambda removal: (check_value(removal.key, removal.value), spring(0.1))
    if draw.random() < 0.3:
        options["busy"] = lambda entry: (spring(0.05), draw.random() < 0.2)[1]
    if draw.random() < 0.2:
        options["max_bytes"] = 500
        options["getsizeof"] = lambda value: (spring(0.05), draw.randrange(200))[1]

    def timer() -> float:
        return clock[0]

    timer.manual = True  # type: ignore[attr-defined]
    return hygiene.Registry(timer=timer, **options)


def on_registry(r: Any, clock: list[float], leases: list[Any] | None, foreigners: bool) -> None:
    key = a_key()
    choice = draw.randrange(24)
    if choice < 5:
        r[key] = a_value(key)
    elif choice < 8:
        value = r.get(key)
        if value is not None:
            check_value(key, value)
    elif choice == 8:
        check_value(key, r[key])
    elif choice == 9:
        del r[key]
    elif choice == 10:
        value = r.pop(key, None)
        if value is not None:
            check_value(key, value)
    elif choice == 11:
        check_value(*r.popitem(last=draw.random() < 0.5))
    elif choice == 12:
        if draw.random() < 0.2:
            r.clear()
    elif choice == 13:
        for name, value in r.items():
            check_value(name, value)
    elif choice == 14:
        r.trim(draw.randrange(6))
    elif choice == 15:
        r.evict(key)
    elif choice == 16:
        clock[0] += draw.choice((0.1, 1, 10))
        r.expire()
    elif choice == 17:
        check_value(key, r.setdefault(key, a_value(key)))
    elif choice == 18:
        r.touch(key)
        r.peek(key)
        key in r  # noqa: B015
    elif choice == 19:
        r.move_to_end(key, last=draw.random() < 0.5)
    elif choice == 20:
        r.copy()
        dict(r)
    elif choice in {21, 22} and leases is None:
        r.touch(key)
    elif choice == 21:
        lease = r.lease(key)
        lease.__enter__()
        leases.append(lease)
    elif choice == 22:
        if leases:
            leases.pop(draw.randrange(len(leases))).__exit__(None, None, None)
    elif foreigners:
        foreign(r)


def run_registry() -> None:
    """A registry for a while, and then the books."""
    global trap, plain, CALM
    clock = [0.0]
    r = a_registry(clock)
    # An order beside the kernel's own takes a key out and may lose it, if to compare it raises.
    # So does a lease that was about to begin.
    leasing = draw.random() < 0.5
    CALM = PURE or leasing or r._limits.policy in {"lfu", "importance"} or r._limits.busy is not None
    # Neither cachetools nor the heap of importance can be used from the middle of itself.
    plain = PURE or r._limits.policy in {"lfu", "importance"}
    leases: list[Any] = []
    foreigners = not PURE and draw.random() < 0.4

    def inside() -> None:
        choice = draw.random()
        if choice < 0.05:
            raise Refused
        if choice < 0.1:
            gc.collect(draw.randrange(3))
        else:
            on_registry(r, clock, leases if leasing else None, foreigners)

    trap = inside
    for _ in range(draw.randrange(120)):
        try:
            on_registry(r, clock, leases if leasing else None, foreigners)
        except (AttributeError, KeyError, Refused, hygiene.RegistryFull):
            pass
    trap = None
    while leases:
        leases.pop().__exit__(None, None, None)
    for key, value in list(dict.items(r)):
        check_value(key, value)
    # At rest: once more through the door, so that who went past is seen.
    for _ in range(40):
        clock[0] += 0.001
        r[99] = a_value(99)
        r[98] = a_value(98)
    maxsize = r._limits.maxsize
    if not foreigners and r._limits.busy is None and len(r) > maxsize:
        print(f"OVER: {len(r)} of {maxsize}", flush=True)
        sys.exit(4)
    if not foreigners and r._limits.busy is None:
        r.trim(0)
        if len(r):
            print(f"STUCK: {dict.copy(r)}", flush=True)
            sys.exit(5)
    elif not PURE and r._limits.busy is None and r._limits.policy in {"lru", "fifo"}:
        r.trim(0)
        if len(r):
            print(f"STUCK AFTER FOREIGN: {dict.copy(r)} {r._limits}", flush=True)
            sys.exit(7)


def main() -> None:
    """Rounds from one seed; each is named, so that the one that fails can be run alone."""
    global PURE, CALM, plain, budget
    what, seed = sys.argv[1], int(sys.argv[2])
    logging.disable()
    body = load_body("compiled" if hygiene.compiled else "pure")
    PURE = not hygiene.compiled
    first, _, last = sys.argv[3].rpartition(":")
    for number in range(int(first or 0), int(last)):
        draw.seed(seed * 1_000_003 + number)
        # Python's garbage collector runs in the middle of a comparison that is Python code, and with it any finalizer;
        # an OrderedDict that is changed there crashes, which is why there is a compiled body.
        CALM = plain = PURE
        budget = 300
        print(f"\r{what} {seed} {number}", end="", flush=True)
        if what == "bare":
            run_bare(body)
        else:
            run_registry()
    print("\nall rounds done", flush=True)


if __name__ == "__main__":
    main()
