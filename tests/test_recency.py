"""The orders in which entries leave, each against a model."""

from __future__ import annotations

from typing import Any

import cachetools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene import Registry
from hygiene.kernel import LinkedOrder
from hygiene.recency import CachetoolsOrder, FrequencyOrder, ImportanceOrder

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


@given(ACTIONS)
def test_least_frequently_used_first_and_among_equals_the_oldest_use(actions: list[tuple[str, int]]) -> None:
    """A write counts as a use; a key that was taken out begins again."""
    order = FrequencyOrder()
    ranks: dict[int, tuple[int, int]] = {}
    for serial, (action, key) in enumerate(actions):
        if action == "add":
            order.add(key)
            ranks[key] = (ranks.get(key, (0, 0))[0] + 1, serial)
        elif action == "touch":
            assert (key in ranks) is order.touch(key)
            if key in ranks:
                ranks[key] = (ranks[key][0] + 1, serial)
        elif action == "discard":
            order.discard(key)
            ranks.pop(key, None)
        elif ranks:
            victim = min(ranks, key=lambda key: ranks[key])
            assert victim == order.pop()
            del ranks[victim]
        else:
            with pytest.raises(KeyError):
                order.pop()
        assert [key in ranks for key in range(6)] == [key in order for key in range(6)]


def test_using_one_key_for_ever_takes_no_memory() -> None:
    """A use changes a number; only a key that comes anew enters the heap."""
    order = FrequencyOrder()
    for i in range(10_000):
        order.add(i % 10)
    for i in range(10_000):
        order.discard(i % 10)
        order.add(i % 10)

    assert len(order._heap) <= 2 * 10 + 65


@pytest.mark.parametrize("order", [FrequencyOrder(), ImportanceOrder(), CachetoolsOrder(cachetools.LFUCache)])
def test_an_order_is_reconciled_with_the_keys_there_are(order: Any) -> None:
    """Keys that are missing come in, all others leave."""
    for key in range(6):
        order.add(key)
    order.discard(5)

    order.reconcile({2, 3, 4, 5, 6})

    assert [key in order for key in range(8)] == [False, False, True, True, True, True, True, False]
    assert {order.pop() for _ in range(5)} == {2, 3, 4, 5, 6}


def test_a_cachetools_class_is_made_anew_after_an_exception_in_the_middle_of_it() -> None:
    """A cache that was interrupted may be damaged; the next change begins with a new one."""

    class Fragile(cachetools.LRUCache):
        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            if key == "interrupted" and len(interruptions) < 1:
                interruptions.append(key)
                raise InterruptedError

    interruptions: list[Any] = []
    order = CachetoolsOrder(Fragile)
    order.add("one")
    damaged = order._cache
    with pytest.raises(InterruptedError):
        order.add("interrupted")
    order.add("two")

    assert order._cache is not damaged
    assert "one" in order
    assert "two" in order
