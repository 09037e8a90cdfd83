"""One total, and shares that keep to it."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import time
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hygiene import History, MemoryBudget, MemoryMonitor, MemoryShare, Registry, bounded_registry
from hygiene.memory.budget import ShareUsage, _divided
from hygiene.testing import ManualClock

KIB = 1024
PATIENCE = 20.0


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run *code* in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)


def measure(value: bytes) -> int:
    return len(value)


def fill(registry: Registry[Any, bytes], kib: int) -> None:
    for n in range(len(registry), len(registry) + kib):
        registry[n] = bytes(KIB)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def budget(clock: ManualClock) -> MemoryBudget:
    """400 KiB; a test says when it looks."""
    return MemoryBudget("400KiB", timer=clock)


def held(registry: Registry[Any, Any]) -> int:
    """KiB in *registry*."""
    return (registry.stats().bytes or 0) // KIB


def of(share: MemoryShare) -> Registry[Any, bytes]:
    return Registry(max_bytes=share, getsizeof=measure)


# Shares


def test_a_share_is_a_bound(budget: MemoryBudget) -> None:
    """It is a number, so whatever takes *max_bytes* takes it."""
    chats = of(budget.share("chat", "200KiB"))
    fill(chats, 300)

    assert 200 == held(chats)


def test_a_share_bounds_what_a_decorator_bounds(budget: MemoryBudget) -> None:
    share = budget.share("chat", "100KiB")

    @bounded_registry("chats", "files", max_bytes=share, getsizeof=measure)
    class Bot:
        def __init__(self) -> None:
            self.chats: dict[int, bytes] = {}
            self.files: dict[int, bytes] = {}

    bot = Bot()
    for n in range(100):
        bot.chats[n] = bot.files[n] = bytes(KIB)

    assert 50 == len(bot.chats)
    assert ShareUsage("chat", 100 * KIB, 100 * KIB, 100 * KIB, 1, elastic=False) == budget.usage()["chat"]
    assert share.used == budget.used == 100 * KIB


def test_more_than_there_is_cannot_be_shared_out(budget: MemoryBudget) -> None:
    budget.share("chat", "300KiB")

    with pytest.raises(ValueError, match="'embeddings' of 153,600 bytes does not fit: 102,400 of 409,600 are left"):
        budget.share("embeddings", "150KiB")

    budget.share("embeddings", "100KiB")

    assert 0 == budget.free


def test_each_component_has_a_name_of_its_own(budget: MemoryBudget) -> None:
    budget.share("chat", 1)

    with pytest.raises(ValueError, match="a share 'chat' already"):
        budget.share("chat", 1)


def test_usage_is_told_by_component(budget: MemoryBudget) -> None:
    chats, files = of(budget.share("chat", "200KiB")), of(budget.share("files", "50KiB"))
    fill(chats, 20)
    fill(files, 10)

    assert ["chat", "files"] == list(budget.usage())
    assert [20 * KIB, 10 * KIB] == [one.used for one in budget.usage().values()]
    assert "<MemoryBudget 256000 of 409600 bytes in 2 shares>" == repr(budget)
    assert (
        "256,000 of 409,600 bytes shared out, 30,720 used\n"
        "  chat: 20,480 of 204,800 in 1 registries\n"
        "  files: 10,240 of 51,200 in 1 registries"
    ) == str(budget)


def test_registries_are_held_weakly(budget: MemoryBudget) -> None:
    share = budget.share("chat", "200KiB")
    chats = of(share)
    fill(chats, 5)
    reference = weakref.ref(chats)
    del chats
    gc.collect()

    assert reference() is None
    assert 0 == budget.usage()["chat"].registries


def test_a_budget_that_nobody_uses_dies() -> None:
    """Though the janitor has looked after it, and memory pressure would call it."""
    budget = MemoryBudget("1MiB")
    budget.share("chat", "10KiB", elastic=True)
    reference, relief = weakref.ref(budget), budget._relief
    del budget
    gc.collect()

    assert reference() is None
    assert relief is not None
    assert not relief.active


def test_a_share_is_a_plain_number_elsewhere(budget: MemoryBudget) -> None:
    """In another process there is no budget; in this one a copy is the same share."""
    share = budget.share("chat", 1000, elastic=True)
    there = pickle.loads(pickle.dumps(share))

    assert (int, 1000) == (type(there), there)
    assert share is copy.copy(share) is copy.deepcopy(share)
    assert "<MemoryShare 'chat' of 1000 bytes, elastic>" == repr(share)
    assert "1000" == str(share) == f"{share}"


def test_a_share_bounds_a_history(budget: MemoryBudget) -> None:
    """Anything that takes bytes; what it holds is not counted for the component, since it is no registry."""
    history = History(max_bytes=budget.share("log", "1KiB"))
    history.extend("x" * 100 for _ in range(100))

    assert len(history) < 10
    assert 0 == budget.used


@pytest.mark.parametrize("wrong", [{"total": 0}, {"total": "much"}, {"total": 10, "interval": 0}])
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="found"):
        MemoryBudget(**wrong)


# Several registries, one share


def test_registries_with_one_share_have_it_together(budget: MemoryBudget) -> None:
    """At the next look what is over goes, from the largest; then each may grow by an equal part of what is left."""
    share = budget.share("chat", "100KiB")
    large, small = of(share), of(share)
    fill(large, 100)
    fill(small, 20)
    budget.balance()

    assert (80, 20) == (held(large), held(small))

    for n in range(60):
        del large[next(iter(large))]
        assert n >= 0
    budget.balance()
    fill(large, 100)
    fill(small, 100)

    assert (50, 50) == (held(large), held(small))


@pytest.mark.slow
@given(sizes=st.lists(st.integers(0, 1000), max_size=8), allowed=st.integers(8, 3000))
def test_bounds_of_one_share_never_add_up_to_more(sizes: list[int], allowed: int) -> None:
    """And nobody is cut who holds less than an equal part."""
    registries = [Registry({0: size}, max_bytes=10**9, getsizeof=lambda value: value) for size in sizes]

    bounds = _divided(registries, allowed)

    assert len(sizes) == len(bounds)
    assert sum(bound for _, bound in bounds) <= allowed + len(sizes)  # none is below one byte
    for registry, bound in bounds:
        size = registry.stats().bytes or 0
        assert bound >= min(size, allowed // len(sizes))


# Elastic shares


def test_an_elastic_share_borrows_what_others_do_not_use(budget: MemoryBudget) -> None:
    """All that is in no share, and of the others' what they do not hold, but an eighth of it."""
    chats, files = of(budget.share("chat", "100KiB", elastic=True)), of(budget.share("files", "200KiB"))
    fill(files, 75)
    fill(chats, 100)
    budget.balance()
    fill(chats, 500)

    assert 400 - 75 - 25 == held(chats)
    assert 300 * KIB == budget.usage()["chat"].allowed
    assert "chat: 307,200 of 307,200 (102,400 and borrowed)" in str(budget)


def test_what_was_lent_is_there_at_once_and_given_back_at_the_next_look(budget: MemoryBudget) -> None:
    """A share is a promise: who has it need not wait for the borrower."""
    chats, files = of(budget.share("chat", "100KiB", elastic=True)), of(budget.share("files", "200KiB"))
    fill(chats, 100)
    budget.balance()
    fill(chats, 500)
    fill(files, 200)
    claimed = held(files)
    budget.balance()

    assert 200 == claimed == held(files)
    assert 200 == held(chats)


def test_a_share_that_is_not_elastic_never_borrows(budget: MemoryBudget) -> None:
    chats = of(budget.share("chat", "100KiB"))
    fill(chats, 100)
    budget.balance()
    fill(chats, 100)

    assert 100 == held(chats)


def test_borrowers_have_parts_by_their_shares(budget: MemoryBudget) -> None:
    chats = of(budget.share("chat", "100KiB", elastic=True))
    files = of(budget.share("files", "50KiB", elastic=True))
    fill(chats, 100)
    fill(files, 50)
    budget.balance()

    allowed = {name: one.allowed for name, one in budget.usage().items()}

    assert 400 * KIB >= sum(allowed.values()) > 399 * KIB
    assert 2.0 == pytest.approx(allowed["chat"] / allowed["files"], rel=0.01)


def test_under_pressure_all_is_given_back_and_nothing_lent_for_a_minute(
    budget: MemoryBudget, clock: ManualClock
) -> None:
    """A monitor that sheds tells the budget as it tells everybody."""
    chats = of(budget.share("chat", "100KiB", elastic=True))
    fill(chats, 100)
    budget.balance()
    fill(chats, 300)
    before = held(chats)
    MemoryMonitor(share=0).shed()
    after = held(chats)
    budget.balance()
    restrained = budget.usage()["chat"].allowed
    clock.advance(61)
    budget.balance()

    assert (400, 100) == (before, after)
    assert (100 * KIB, 400 * KIB) == (restrained, budget.usage()["chat"].allowed)


def test_leased_entries_stay_though_what_was_borrowed_is_claimed(budget: MemoryBudget) -> None:
    """It is over its bound then, says so once, and no thread is started for it again and again."""
    chats = of(budget.share("chat", "2KiB", elastic=True))
    fill(chats, 2)
    budget.balance()
    fill(chats, 2)
    with chats.lease(0), chats.lease(1), chats.lease(2), chats.lease(3):
        budget.give_back()

        assert 4 == len(chats)
        assert [] == budget._balance()

    assert 2 == held(chats)


def test_the_janitor_looks_by_itself() -> None:
    budget = MemoryBudget("400KiB", interval=0.01)
    chats = of(budget.share("chat", "100KiB", elastic=True))
    fill(chats, 100)
    end = time.monotonic() + PATIENCE
    while chats._limits.max_bytes == chats._byte_bound:
        assert time.monotonic() < end
        time.sleep(0)
    fill(chats, 100)

    assert 200 == held(chats)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork")
def test_a_budget_goes_on_in_a_forked_child() -> None:
    code = """
        import os, time, warnings
        from hygiene import MemoryBudget, Registry

        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with a thread is what is tested
        budget = MemoryBudget(4000, interval=0.01)
        chats = Registry(max_bytes=budget.share("chat", 1000, elastic=True), getsizeof=lambda value: value)
        chats[0] = 500
        child = os.fork()
        if child == 0:
            chats[1] = 500
            end = time.monotonic() + 20
            while budget.usage()["chat"].allowed < 4000 and time.monotonic() < end:
                time.sleep(0)
            os._exit(0 if budget.usage()["chat"].allowed == 4000 else 1)
        print(os.waitpid(child, 0)[1], budget.usage()["chat"].allowed)
    """
    done = run(code)

    assert "0 1000\n" == done.stdout, done.stderr
