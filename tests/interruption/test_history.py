"""A signal handler raises in the middle of a change of a History: it stays within its bounds, and nothing is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from hygiene import History


class Subject:
    """A history, and what was trimmed from it."""

    def __init__(self, **limits: Any) -> None:
        self.told: list[int] = []
        if limits.pop("told", False):
            limits["on_trim"] = self.told.extend
        if limits.pop("summary", False):
            limits["summarize"] = lambda items: -1
        self.history: History[int] = History(range(5), **limits)


KINDS: dict[str, dict[str, Any]] = {
    "maxlen": {"maxlen": 5},
    "on_trim": {"maxlen": 5, "told": True},
    "tokens": {"max_tokens": 5, "count_tokens": lambda item: 1, "told": True},
    "bytes": {"max_bytes": 50, "getsizeof": lambda item: 10},
    "summary": {"maxlen": 5, "summary": True},
}
OPERATIONS: dict[str, Callable[[History[int]], object]] = {
    "append": lambda history: history.append(5),
    "extend": lambda history: history.extend([5, 6, 7]),
    "insert": lambda history: history.insert(3, 5),
    "slice": lambda history: history.__setitem__(slice(1, 3), [5, 6, 7]),
    "del": lambda history: history.__delitem__(2),
    "pop": History.pop,
    "trim": lambda history: history.trim(2),
    "sort": lambda history: history.sort(reverse=True),
    "clear": History.clear,
}
QUICK = [("maxlen", "append"), ("on_trim", "extend"), ("tokens", "append")]


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(KINDS, OPERATIONS)
    ],
)
def test_an_interruption_leaves_a_history_whole(kind, operation, elsewhere, interrupted_at_each_moment):
    """After an exception of a signal handler any thread can change the history, within its bounds."""

    def check(subject: Subject) -> None:
        history = subject.history

        def use() -> None:
            before = {*history, *subject.told}
            history.append(100)
            history.extend(range(101, 110))
            assert len(history) <= 5
            if "told" in KINDS[kind]:
                assert before <= {*history, *subject.told}
            history.append(110)
            assert 110 == history[-1]
            assert (None if kind != "tokens" else len(history)) == history.tokens
            assert (None if kind != "bytes" else 10 * len(history)) == history.nbytes

        elsewhere(use)
        assert len(subject.told) == len(set(subject.told)), "told twice"
        if "told" in KINDS[kind] and operation in {"append", "extend", "trim", "sort"}:
            assert set(range(5)) <= {*history, *subject.told}, "lost"

    interrupted_at_each_moment(
        lambda: Subject(**KINDS[kind]), lambda subject: OPERATIONS[operation](subject.history), check
    )
