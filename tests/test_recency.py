"""The orders in which entries leave, each against a model."""

from __future__ import annotations

from typing import Any

import cachetools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene import Registry
from hygiene.kernel import LinkedOrder
from hygiene.recency import CachetoolsOrder, ImportanceOrder

ACTIONS = st.lists(st.tuples(st.sampled_from(["add", "touch", "discard", "pop"]), st.integers(0, 5)))


def run(order: Any, actions: list[tuple[str, int]], *, moves: bool) -> None:
    model: list[int] = []
    for action, key in actions:
        if action == "add":
            order.add(key)
            if moves and key in model:
                model.remove(key)
            if key not in model:
                model.append(key)
        elif action == "touch":
            assert (key in model) is order.touch(key)
            if moves and key in model:
                model.remove(key)
                model.append(key)
        elif action == "discard":
            order.discard(key)
            if key in model:
                model.remove(key)
        elif model:
            assert model.pop(0) == order.pop()
        else:
            with pytest.raises(KeyError):
                order.pop()
        assert [key in model for key in range(6)] == [key in order for key in range(6)]


def run_linked(actions: list[tuple[str, int]], *, moves: bool) -> None:
    """The order of a kernel's entries, of which none is in it at first."""
    kernel: Registry[int, None] = Registry.fromkeys(range(6))
    order = LinkedOrder(kernel, moves=moves)
    for key in kernel:
        order.discard(key)
    run(order, actions, moves=moves)


@pytest.mark.slow
@given(ACTIONS)
def test_a_linked_order_is_least_recently_used_first(actions: list[tuple[str, int]]) -> None:
    run_linked(actions, moves=True)


@pytest.mark.slow
@given(ACTIONS)
def test_a_linked_order_that_does_not_move_is_first_in_first_out(actions: list[tuple[str, int]]) -> None:
    run_linked(actions, moves=False)


@pytest.mark.slow
@given(ACTIONS)
def test_a_cachetools_class_gives_its_own_order(actions: list[tuple[str, int]]) -> None:
    run(CachetoolsOrder(cachetools.LRUCache), actions, moves=True)


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(["rank", "discard", "pop", "add"]), st.integers(0, 5), st.integers(0, 3))))
def test_least_important_first_and_among_equals_the_oldest(actions: list[tuple[str, int, int]]) -> None:
    """What was popped and is added again is as important as it was."""
    order = ImportanceOrder()
    ranks: dict[int, tuple[float, int]] = {}
    known: dict[int, float] = {}
    for serial, (action, key, importance) in enumerate(actions):
        if action == "rank":
            order.rank(key, importance)
            known[key] = importance
            ranks[key] = (importance, serial)
        elif action == "discard":
            order.discard(key)
            ranks.pop(key, None)
            known.pop(key, None)
        elif action == "add":
            order.add(key)
            known.setdefault(key, float("inf"))
            ranks.setdefault(key, (known[key], serial))
        elif ranks:
            victim = min(ranks, key=lambda key: ranks[key])
            assert victim == order.pop()
            del ranks[victim]
        else:
            with pytest.raises(KeyError):
                order.pop()
        assert [key in ranks for key in range(6)] == [order.touch(key) for key in range(6)]


def test_ranking_one_key_for_ever_takes_no_memory() -> None:
    """What is outdated in the heap is swept out when it outnumbers what is not."""
    order = ImportanceOrder()
    for i in range(10_000):
        order.rank(i % 10, i)

    assert len(order._heap) <= 2 * 10 + 65
    assert list(range(10)) == [order.pop() for _ in range(10)]
