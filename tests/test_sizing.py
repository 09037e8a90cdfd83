"""The default estimate of a value's bytes: cheap, deep, and never an exception."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import pytest

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
    "value",
    [
        [TEXT],
        (TEXT,),
        {TEXT},
        frozenset([TEXT]),
        {"key": TEXT},
        {TEXT: "value"},
        deque([TEXT]),
        Plain(TEXT),
        Slotted(TEXT),
        [{"a": [Plain(Slotted(TEXT))]}],
    ],
)
def test_what_a_value_reaches_is_counted(value: Any) -> None:
    """Containers and attributes are followed."""
    assert 100_000 < sizeof(value) < 110_000


def test_what_is_met_twice_counts_once() -> None:
    shared = [TEXT]

    assert sizeof([shared, shared]) < 110_000


def test_a_cycle_ends() -> None:
    cycle: list[Any] = [TEXT]
    cycle.append(cycle)
    cycle.append({"back": cycle})

    assert 100_000 < sizeof(cycle) < 400_000


def test_a_long_list_is_estimated_from_its_first_items() -> None:
    """A conversation of ten thousand messages costs no more to measure than one of twenty-four."""
    looked_at = 0

    class Message:
        @property
        def nbytes(self) -> int:
            nonlocal looked_at
            looked_at += 1
            return 500

    conversation = [Message() for _ in range(10_000)]

    assert 4_500_000 < sizeof(conversation) < 6_000_000
    assert looked_at <= 24


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
