"""One case in which code ran at a bad moment once: ``after.py NAME``. It is fine if the process lives."""

# ruff: noqa: B009, B023, SIM105 - each case is read and run once

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

from bare import build, load_body

import hygiene

body = load_body("compiled" if hygiene.compiled else "pure")


class Key:
    """All of one hash; a comparison runs `act` once the countdown is over."""

    countdown = -1
    act: Any = None

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        Key.countdown -= 1
        if Key.countdown == 0:
            Key.act()
        return isinstance(other, Key) and self.number == other.number


def adopt() -> None:
    """A comparison fills the room that was made for a key that went past."""
    for countdown in range(1, 9):
        for many in range(1, 45):
            kernel = build(body)
            for number in range(2):
                kernel[Key(number)] = number
            for number in range(6):
                kernel[number] = number
            order = body.LinkedOrder(kernel)
            for key in list(dict.keys(kernel)):
                order.discard(key)
            dict.__setitem__(kernel, Key(2), 1)

            def fill(kernel: Any = kernel, many: int = many) -> None:
                for number in range(many):
                    kernel[number + 100] = number

            Key.countdown, Key.act = countdown, fill
            body.oldest(kernel)
            Key.countdown = -1


def reinsert() -> None:
    """A comparison empties everything while an entry is on its way to the end."""
    for countdown in range(1, 60):
        kernel = build(body)
        for number in range(8):
            kernel[Key(number)] = number

        def empty(kernel: Any = kernel) -> None:
            dict.clear(kernel)
            kernel._open(5, None, written=False, used=False)
            dict.__setitem__(kernel, Key(5), 7)

        Key.countdown, Key.act = countdown, empty
        try:
            kernel._reinsert(Key(5))
        except KeyError:
            pass
        Key.countdown = -1


def dying() -> None:
    """A key that dies with the registry follows a weak reference to it."""
    found: list[Any] = []

    class Follower:
        def __del__(self) -> None:
            found.append(reference())

    for _ in range(50):
        kernel = build(body)
        reference = weakref.ref(kernel)
        follower = Follower()
        kernel[follower] = 1
        dict.__delitem__(kernel, follower)
        del follower, kernel
    assert [None] * 50 == found, found


def order() -> None:
    """The order of a registry is used by what dies with it."""
    bare = type(build(body))

    class Holder(bare):  # type: ignore[misc, valid-type]
        __slots__ = ("last",)

    class User:
        def __del__(self) -> None:
            try:
                view.add(1)
                said.append("added")
            except ReferenceError:
                said.append("refused")

    said: list[str] = []
    kernel = build(body, kind=Holder)
    kernel[1] = 1
    view = body.LinkedOrder(kernel)
    kernel.last = User()
    del kernel
    gc.collect()
    assert said in (["refused"], ["added"]), said


def oldest() -> None:
    """A ghost's key dies between two looks for the oldest, and changes what is there."""
    for take in ("take_oldest", "_extract_oldest"):

        class Emptier:
            def __del__(self, take: str = take) -> None:
                while len(kernel):
                    dict.popitem(kernel)
                    getattr(kernel, "_extract_oldest")()

        kernel = build(body)
        for _ in range(3):
            key = Emptier()
            kernel[key] = 1
            dict.__delitem__(kernel, key)
            del key
        for number in range(5):
            kernel[number] = number
        try:
            body.take_oldest(kernel) if take == "take_oldest" else kernel._extract_oldest()
        except KeyError:
            pass


def overwritten() -> None:
    """What is overwritten writes so much as its last act that its own key is evicted."""

    class Busy:
        __slots__ = ()

        def __del__(self) -> None:
            for number in range(10):
                registry[number] = number

    registry: hygiene.Registry[Any, Any] = hygiene.Registry(maxsize=2)
    registry["a"] = Busy()
    registry["a"] = 1
    for number in range(20, 25):
        registry[number] = number
    assert {23: 23, 24: 24} == registry, registry


globals()[sys.argv[1]]()
