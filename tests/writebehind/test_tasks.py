"""On an event loop: it goes on while something is saved."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hygiene.errors import StoreUnavailable, VersionConflict
from hygiene.writebehind import WriteBehind

PATIENCE = 20.0
DOWN = StoreUnavailable("the disk is full")


@pytest.fixture
async def writer(store: Any) -> AsyncIterator[WriteBehind]:
    async with WriteBehind(
        store, every=1000, interval="1h", max_pending=1000, critical=lambda key, item: item == "now"
    ) as made:
        yield made
        store.error = None
        store.gate.set()


async def begun(store: Any) -> None:
    """Wait until a save has begun, in another thread."""
    await asyncio.to_thread(store.begun)


async def test_the_loop_goes_on_during_a_flush(writer: WriteBehind, store: Any) -> None:
    """The save is held up until another task of this very loop lets it go on."""
    writer.put("a", 1)
    store.gate.clear()
    flushing = asyncio.create_task(writer.aflush())
    await begun(store)

    assert not flushing.done()

    store.gate.set()
    await flushing

    assert 1 == store.value("a")

    await writer.aflush()


async def test_a_critical_item_is_awaited(writer: WriteBehind, store: Any) -> None:
    store.gate.clear()
    tasks = [asyncio.create_task(writer.aappend("log", "now")), asyncio.create_task(writer.aput("a", "now"))]
    await begun(store)

    assert [False, False] == [task.done() for task in tasks]

    store.gate.set()
    await asyncio.gather(*tasks)

    assert (["now"], "now", {True}) == (store.value("log"), store.value("a"), {sync for _, sync in store.batches})

    await writer.aput("a", "later")

    assert (None, 2) == (await writer.aappend("log", "later"), len(writer))


async def test_an_eviction_is_awaited(writer: WriteBehind, store: Any) -> None:
    writer.put("a", 1)
    writer.put("b", 1)
    await writer.asave("a")

    assert [(["a"], False)] == store.batches

    store.error = DOWN
    with pytest.raises(StoreUnavailable):
        await writer.asave("b")


async def test_a_task_that_is_cancelled_leaves_the_save_alone(writer: WriteBehind, store: Any) -> None:
    writer.put("a", 1)
    store.gate.clear()
    flushing = asyncio.create_task(writer.aflush())
    await begun(store)
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    store.gate.set()
    await writer.aflush()

    assert (1, []) == (store.value("a"), writer._waiters)


async def test_a_flush_ends_at_its_timeout(writer: WriteBehind, store: Any) -> None:
    writer.put("a", 1)
    store.gate.clear()

    with pytest.raises(StoreUnavailable, match="takes longer"):
        await writer.aflush("1ms")


async def test_at_the_limit_a_loop_is_not_blocked(store: Any) -> None:
    """A plain call is refused; the one that can be awaited waits until something is saved."""
    async with WriteBehind(store, every=1000, interval="1h", max_pending=2) as writer:
        writer.put("a", 1)
        writer.put("b", 1)

        with pytest.raises(StoreUnavailable, match="aput, aappend"):
            writer.put("c", 1)
        for n in range(20):
            await writer.aappend("log", n)
        await writer.aput("c", 1)

    assert (list(range(20)), 1) == (store.value("log"), store.value("c"))


async def test_a_failing_close_does_not_hide_the_error_of_the_block(store: Any) -> None:
    writer = WriteBehind(store)
    writer.put("a", 1)
    await writer.aflush()
    writer.track("a", None)
    writer.put("a", 2)
    mine = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with writer:
            raise mine

    assert "was rejected" in caught.value.__notes__[0]

    other = WriteBehind(store)
    other.track("a", None)
    other.put("a", 2)
    with pytest.raises(VersionConflict):
        async with other:
            pass


async def test_where_no_thread_can_be_started_the_task_saves(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    async with WriteBehind(store, interval="1h") as writer:
        with monkeypatch.context() as patch:
            patch.setattr("threading.Thread.start", refuse)
            writer.put("a", 1)
            await writer.aflush()

        assert 1 == store.value("a")


async def test_many_tasks_share_few_saves(writer: WriteBehind, store: Any) -> None:
    """Group commit: those who come while a save is under way are saved together by the next."""
    store.gate.clear()
    first = asyncio.create_task(writer.aappend("first", "now"))
    await begun(store)
    others = [asyncio.create_task(writer.aappend(n, "now")) for n in range(100)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert 101 == len(writer._waiters)
    store.gate.set()
    await asyncio.gather(first, *others)

    assert [1, 100] == [len(keys) for keys, _ in store.batches]


async def test_an_error_that_nobody_waits_for_any_more_is_not_reported(writer: WriteBehind, store: Any) -> None:
    """The task is cancelled just when the save has failed."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    writer.put("a", 1)
    store.error = DOWN
    store.gate.clear()
    flushing = asyncio.create_task(writer.aflush())
    await begun(store)
    waiter = writer._waiters[0]
    store.gate.set()
    assert waiter.future.exception(PATIENCE)  # the loop stands still meanwhile, and cannot hear of it
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    await asyncio.sleep(0)
    del flushing, waiter
    gc.collect()

    assert [] == complaints
