"""Callers that wait for one another are told, instead of waiting for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from hygiene.keeping import Loading
from hygiene.registry import Registry
from hygiene.shared import shared_resource
from hygiene.waits import Wait, _waits

PATIENCE = 20.0


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    """Each wait is taken out of the table, however it ended."""
    yield

    assert {} == _waits.waiting


def run_all(*functions: Callable[[], Any]) -> list[Any]:
    """What each function returned or raised, each in a thread of its own; a hang is a failure."""
    outcomes: list[Any] = [None] * len(functions)

    def run(number: int) -> None:
        try:
            outcomes[number] = functions[number]()
        except Exception as error:  # noqa: BLE001 - it is looked at by the test
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    return outcomes


def until_a_caller_waits() -> None:
    """Return when some caller waits for another one."""
    begun = time.monotonic()
    while not _waits.waiting:
        assert time.monotonic() - begun < PATIENCE, "no caller waits"
        time.sleep(0.001)


def errors_in(outcomes: list[Any]) -> list[str]:
    return [str(outcome) for outcome in outcomes if isinstance(outcome, RuntimeError)]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("several", [False, True], ids=["one registry", "several registries"])
def test_factories_in_threads_that_lease_each_others_keys_are_told(count: int, several: bool) -> None:
    """Each factory leases the next one's key: no thread hangs, and the error names the keys."""
    shared: Registry[int, Any] = Registry(name="users")
    registries = [Registry[int, Any](name=f"part {i}") if several else shared for i in range(count)]
    begun = threading.Barrier(count, timeout=PATIENCE)

    def load(own: int) -> Callable[[], Any]:
        other = (own + 1) % count

        def create() -> Any:
            begun.wait()
            with registries[other].lease(other, create=lambda: other):
                return own

        def run() -> Any:
            with registries[own].lease(own, create=create) as value:
                return value

        return run

    outcomes = run_all(*map(load, range(count)))

    assert errors_in(outcomes)
    assert all("would wait for ever: it asks for" in error for error in errors_in(outcomes))
    assert several == ("of part 1" in errors_in(outcomes)[0])
    assert all({} == registry._flights for registry in registries)


def test_the_error_says_which_keys_wait_for_which() -> None:
    registry: Registry[str, str] = Registry()
    asks = threading.Event()

    def first() -> str:
        assert asks.wait(PATIENCE)
        with registry.lease("b", lambda: "b") as value:
            return value

    def waits_for_b() -> Any:
        with registry.lease("a", first):
            pass

    def second() -> str:
        asks.set()
        until_a_caller_waits()
        with registry.lease("a", lambda: "a") as value:
            return value

    def waits_for_a() -> Any:
        with registry.lease("b", second):
            pass

    outcomes = run_all(waits_for_b, waits_for_a)

    assert {"creating 'b' would wait for ever: it asks for 'a', and creating 'a' waits for 'b'"} == {
        *errors_in(outcomes)
    }


@pytest.mark.parametrize("count", [2, 3])
async def test_factories_in_tasks_that_lease_each_others_keys_are_told(count: int) -> None:
    registry: Registry[int, Any] = Registry()
    begun = asyncio.Barrier(count)

    def load(own: int) -> Any:
        async def create() -> Any:
            await begun.wait()
            async with registry.lease((own + 1) % count, create=lambda: None):
                return own

        async def run() -> Any:
            async with registry.lease(own, create=create) as value:
                return value

        return run()

    async with asyncio.timeout(PATIENCE):
        outcomes = await asyncio.gather(*map(load, range(count)), return_exceptions=True)

    assert errors_in(list(outcomes))
    assert {} == registry._flights


async def in_task(registry: Registry[str, Any], key: str) -> None:
    async with registry.lease(key, lambda: key):
        pass


async def in_group(registry: Registry[str, Any], key: str) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(in_task(registry, key))


async def in_gather(registry: Registry[str, Any], key: str) -> None:
    await asyncio.gather(in_task(registry, key), asyncio.sleep(0))


async def in_awaited_task(registry: Registry[str, Any], key: str) -> None:
    await asyncio.create_task(in_task(registry, key))


async def in_group_in_gather(registry: Registry[str, Any], key: str) -> None:
    await asyncio.gather(in_group(registry, key))


async def in_worker(registry: Registry[str, Any], key: str) -> None:
    def work() -> None:
        with registry.lease(key, lambda: key):
            pass

    await asyncio.to_thread(work)


ASKS = {
    "itself": in_task,
    "group": in_group,
    "gather": in_gather,
    "awaited task": in_awaited_task,
    "group in gather": in_group_in_gather,
    "to_thread": in_worker,
}


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
async def test_work_that_a_factory_awaits_counts_as_its_own(asks: Any) -> None:
    """A factory may ask for other keys in tasks and threads; if it awaits them, they are part of the circle."""
    registry: Registry[str, Any] = Registry()
    begun = asyncio.Barrier(2)

    def load(own: str, other: str) -> Any:
        async def create() -> str:
            await begun.wait()
            await asks(registry, other)
            return own

        async def run() -> Any:
            async with registry.lease(own, create=create) as value:
                return value

        return run()

    async with asyncio.timeout(PATIENCE):
        outcomes = await asyncio.gather(load("a", "b"), load("b", "a"), return_exceptions=True)

    assert any("would wait for ever" in repr(getattr(outcome, "exceptions", outcome)) for outcome in outcomes)
    assert {} == registry._flights


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
async def test_a_factory_that_asks_for_its_own_key_is_told(asks: Any) -> None:
    registry: Registry[str, Any] = Registry()

    async def create() -> None:
        await asks(registry, "a")

    with pytest.raises((RuntimeError, ExceptionGroup)) as caught:
        async with asyncio.timeout(PATIENCE), registry.lease("a", create):
            pass

    assert "creating 'a' asks for 'a' itself" in repr(getattr(caught.value, "exceptions", caught.value))


async def test_a_thread_and_a_task_that_wait_for_each_other_are_told() -> None:
    registry: Registry[str, Any] = Registry()
    begun = threading.Barrier(2, timeout=PATIENCE)

    async def in_this_task() -> Any:
        await asyncio.to_thread(begun.wait)
        async with registry.lease("thread", lambda: 1) as value:
            return value

    def in_that_thread() -> Any:
        begun.wait()
        with registry.lease("task", lambda: 1) as value:
            return value

    def run() -> Any:
        with registry.lease("thread", in_that_thread):
            pass

    async def arun() -> Any:
        async with registry.lease("task", in_this_task):
            pass

    async with asyncio.timeout(PATIENCE):
        outcomes = await asyncio.gather(asyncio.to_thread(run), arun(), return_exceptions=True)

    assert errors_in(list(outcomes))


async def test_a_plain_lease_that_blocks_the_loop_of_what_it_waits_for_is_told() -> None:
    """Task 1 creates "a", which a thread needs for "b"; a plain ``with`` for "b" in task 2 would block task 1."""
    registry: Registry[str, Any] = Registry()
    a_begun, go = asyncio.Event(), asyncio.Event()
    b_begun = threading.Event()

    async def create_a() -> str:
        a_begun.set()
        await go.wait()
        return "a"

    def create_b() -> Any:
        b_begun.set()
        with registry.lease("a", dict) as value:
            return value

    def in_thread() -> Any:
        with registry.lease("b", create_b) as value:
            return value

    async def in_task_1() -> Any:
        async with registry.lease("a", create_a) as value:
            return value

    async with asyncio.timeout(PATIENCE):
        first = asyncio.create_task(in_task_1())
        await a_begun.wait()
        thread = asyncio.create_task(asyncio.to_thread(in_thread))
        await asyncio.to_thread(b_begun.wait, PATIENCE)
        await asyncio.to_thread(until_a_caller_waits)
        with pytest.raises(RuntimeError, match="creating 'a' would wait for ever: it asks for 'b'"):
            registry.lease("b", dict).__enter__()
        go.set()

        assert ["a", "a"] == await asyncio.gather(first, thread)


def test_a_loop_inside_a_factory_is_part_of_it() -> None:
    registry: Registry[str, Any] = Registry()

    def create() -> None:
        asyncio.run(in_task(registry, "a"))

    with pytest.raises(RuntimeError, match="creating 'a' asks for 'a' itself"), registry.lease("a", create):
        pass


def test_default_factories_that_lease_each_others_keys_are_told() -> None:
    begun = threading.Barrier(2, timeout=PATIENCE)
    others = {"a": "b", "b": "a"}
    mine = threading.local()

    def make() -> Any:
        begun.wait()
        with registry.lease(others[mine.key], lambda: 1):
            return mine.key

    registry: Registry[str, Any] = Registry(default_factory=make)

    def use(key: str) -> Callable[[], Any]:
        def run() -> Any:
            mine.key = key
            with registry.lease(key) as value:
                return value

        return run

    assert errors_in(run_all(use("a"), use("b")))


def test_shared_resources_that_need_each_other_are_told() -> None:
    begun = threading.Barrier(2, timeout=PATIENCE)

    @shared_resource()
    def database() -> Any:
        begun.wait()
        return [cache()]

    @shared_resource()
    def cache() -> Any:
        begun.wait()
        return [database()]

    outcomes = run_all(database, cache)

    assert any("waits for" in error and "database" in error and "cache" in error for error in errors_in(outcomes))


def test_a_shared_resource_that_needs_itself_is_told() -> None:
    @shared_resource()
    def client() -> Any:
        return [client()]

    with pytest.raises(RuntimeError, match=r"creating .* asks for .* itself"):
        client()


async def test_asynchronous_shared_resources_that_need_each_other_are_told() -> None:
    begun = asyncio.Barrier(2)

    @shared_resource()
    async def database() -> Any:
        await begun.wait()
        return [await cache()]

    @shared_resource()
    async def cache() -> Any:
        await begun.wait()
        return [await database()]

    async with asyncio.timeout(PATIENCE):
        outcomes = await asyncio.gather(database(), cache(), return_exceptions=True)

    assert errors_in(list(outcomes))


def test_loads_from_a_store_that_wait_for_a_factory_are_told() -> None:
    """One thread loads "a", whose conversion leases "b"; the factory of "b" in another thread looks up "a"."""
    begun = threading.Barrier(2, timeout=PATIENCE)
    stored: list[str] = []

    def convert(value: Any) -> Any:
        if stored:
            stored.clear()  # the next load is an ordinary one
            begun.wait()
            with others.lease("b", dict):
                pass
        return value

    with ExitStack() as closing:
        chats: Registry[str, Any] = Registry(store="sqlite::memory:", values=convert, name="chats")
        closing.callback(chats.close)
        others: Registry[str, Any] = Registry(name="others")
        chats["a"] = {"name": "a"}
        chats.flush()
        chats.trim(0)
        stored.append("a")

        def make_b() -> Any:
            begun.wait()
            return chats["a"]

        def lease_b() -> Any:
            with others.lease("b", make_b) as value:
                return value

        outcomes = run_all(lambda: chats["a"], lease_b)

    assert any("'a' of chats" in error and "'b' of others" in error for error in errors_in(outcomes))


# No false alarm.


def test_chains_of_factories_are_no_circles() -> None:
    """Ten factories, each of which waits for the next one, end when the last one does."""
    registry: Registry[int, int] = Registry()
    begun = threading.Barrier(10, timeout=PATIENCE)

    def load(own: int) -> Callable[[], Any]:
        def create() -> int:
            begun.wait()
            if own == 9:
                return 9
            with registry.lease(own + 1, create=lambda: -1) as value:
                return value

        def run() -> int:
            with registry.lease(own, create=create) as value:
                return value

        return run

    assert [9] * 10 == run_all(*map(load, range(10)))


async def test_a_task_that_a_factory_starts_may_wait_for_it() -> None:
    """The factory does not await the task, so the task gets the value when it is there."""
    registry: Registry[str, Any] = Registry()
    tasks = []

    async def create() -> str:
        tasks.append(asyncio.create_task(in_task(registry, "a")))
        tasks.append(asyncio.create_task(in_worker(registry, "a")))
        for _ in range(3):
            await asyncio.sleep(0)
        return "made"

    async with asyncio.timeout(PATIENCE):
        async with registry.lease("a", create) as value:
            assert "made" == value
        await asyncio.gather(*tasks)


async def test_many_tasks_may_wait_for_each_others_keys_in_one_direction() -> None:
    registry: Registry[int, int] = Registry()

    async def create(own: int) -> int:
        await asyncio.sleep(0)
        if own:
            async with registry.lease(own - 1, lambda: create(own - 1)) as value:
                return value + 1
        return 0

    async def use(own: int) -> int:
        async with registry.lease(own, lambda: create(own)) as value:
            return value

    async with asyncio.timeout(PATIENCE):
        values = await asyncio.gather(*[use(own) for own in reversed(range(30)) for _ in range(3)])

    assert [own for own in reversed(range(30)) for _ in range(3)] == values


def test_after_an_error_the_keys_are_free() -> None:
    registry: Registry[str, Any] = Registry()

    def create() -> Any:
        with registry.lease("a", create):
            pass

    with pytest.raises(RuntimeError), registry.lease("a", create):
        pass
    with registry.lease("a", lambda: 1) as value:
        assert 1 == value


def test_an_error_keeps_nothing_alive() -> None:
    registry: Registry[str, Any] = Registry()
    watched = weakref.ref(registry)

    def create() -> Any:
        with found().lease("a", create):
            pass

    found: Any = watched
    with pytest.raises(RuntimeError), registry.lease("a", create):
        pass
    del registry
    gc.collect()

    assert watched() is None


def test_a_wait_that_is_interrupted_leaves_nothing_behind() -> None:
    target = Loading("a", None)
    target.thread = -1
    wait = Wait(target, sync=True)
    wait.__enter__()
    assert 1 == len(_waits.waiting)
    wait.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_a_forked_child_has_no_waits(in_child: Callable[..., int]) -> None:
    target = Loading("a", None)
    target.thread = -1

    def look() -> None:
        assert {} == _waits.waiting

    with Wait(target, sync=True):
        assert 0 == in_child(look)
