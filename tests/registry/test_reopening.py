"""A key is not opened again before its previous value has been closed: there are never two of one key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene.errors import LeaseTimeout, RegistryFull
from hygiene.events import Cause
from hygiene.group import Group
from hygiene.limits import Limits
from hygiene.registry import Registry
from hygiene.shared import shared_resource
from hygiene.testing import ManualClock
from hygiene.waits import _waits

PATIENCE = 20.0


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Each wait is taken out of the table, however it ended."""
    yield

    assert {} == _waits.waiting


class Services:
    """Opens services, of which each key may have one at a time; a close lasts until `go` is set."""

    def __init__(self) -> None:
        self.live: dict[Any, int] = {}
        self.twice: list[Any] = []
        self.closing = threading.Event()
        self.go = threading.Event()

    def open(self, key: Any) -> Callable[[], Service]:
        return lambda: Service(self, key)


class Service:
    def __init__(self, services: Services, key: Any) -> None:
        self.services, self.key = services, key
        services.live[key] = services.live.get(key, 0) + 1
        if services.live[key] > 1:
            services.twice.append(key)

    def close(self) -> None:
        self.services.closing.set()
        assert self.services.go.wait(PATIENCE)
        self.services.live[self.key] -= 1

    async def aclose(self) -> None:
        self.services.closing.set()
        while not self.services.go.is_set():  # noqa: ASYNC110 - set by whichever thread
            await asyncio.sleep(0)
        self.services.live[self.key] -= 1


def until_waiting(count: int = 1) -> None:
    """Return when so many callers wait."""
    begun = time.monotonic()
    while sum(map(len, list(_waits.waiting.values()))) < count:
        assert time.monotonic() - begun < PATIENCE, "no caller waits"
        time.sleep(0.001)


def by_size(registry: Registry[Any, Any], clock: ManualClock) -> None:
    registry["x"] = registry["y"] = None


def by_ttl(registry: Registry[Any, Any], clock: ManualClock) -> None:
    clock.advance(60)
    registry.expire()


def by_trim(registry: Registry[Any, Any], clock: ManualClock) -> None:
    registry.trim(0)


def by_evict(registry: Registry[Any, Any], clock: ManualClock) -> None:
    registry.evict("a")


def by_close(registry: Registry[Any, Any], clock: ManualClock) -> None:
    registry.close()


def by_replaced_bytes(registry: Registry[Any, Any], clock: ManualClock) -> None:
    registry["heavy"] = b"x" * 200_000


CAUSES: dict[str, tuple[dict[str, Any], Callable[..., None]]] = {
    "size": ({"maxsize": 1}, by_size),
    "fifo": ({"maxsize": 1, "policy": "fifo"}, by_size),
    "lfu": ({"maxsize": 1, "policy": "lfu"}, by_size),
    "busy": ({"maxsize": 1, "busy": lambda entry: False}, by_size),
    "told": ({"maxsize": 1, "on_evict": lambda removal: None}, by_size),
    "bytes": ({"max_bytes": 200_000}, by_replaced_bytes),
    "ttl": ({"ttl": 60}, by_ttl),
    "idle": ({"idle": 60}, by_ttl),
    "trim": ({}, by_trim),
    "evict": ({}, by_evict),
    "close": ({}, by_close),
}


@pytest.mark.parametrize(("limits", "remove"), CAUSES.values(), ids=CAUSES)
def test_a_lease_waits_until_the_previous_value_is_closed(
    limits: dict[str, Any], remove: Callable[..., None], clock: ManualClock, together: Callable[..., None]
) -> None:
    """Whatever the registry removes it for, the next value of the key is made when the previous one is closed."""
    services = Services()
    registry: Registry[Any, Any] = Registry(close="close", timer=clock, **limits)
    with registry.lease("a", services.open("a")):
        pass

    def reopen() -> None:
        assert services.closing.wait(PATIENCE)
        threading.Thread(target=lambda: (until_waiting(), services.go.set())).start()
        with registry.lease("a", services.open("a")):
            assert services.go.is_set()
            assert 1 == services.live["a"]

    together(lambda: remove(registry, clock), reopen)

    assert [] == services.twice
    registry.close()
    assert {} == registry._closings


async def test_tasks_wait_until_the_previous_value_is_closed() -> None:
    """Five keys in turn, room for three, and closes that take a while: each key has one value at a time."""
    services = Services()
    services.go.set()
    async with asyncio.timeout(PATIENCE), Registry[int, Any](maxsize=3, close="aclose") as registry:
        for _ in range(3):
            for key in range(5):
                async with registry.lease(key, services.open(key)):
                    pass

    assert [] == services.twice
    assert not any(services.live.values())
    assert {} == registry._closings


async def test_many_waiters_share_the_one_that_is_made() -> None:
    services = Services()
    made: list[Any] = []

    def make() -> Service:
        made.append(Service(services, "a"))
        return made[-1]

    registry: Registry[str, Any] = Registry(close="aclose")
    async with asyncio.timeout(PATIENCE):
        async with registry.lease("a", make):
            pass
        registry.trim(0)

        async def use() -> Any:
            async with registry.lease("a", make) as value:
                return value

        tasks = [asyncio.create_task(use()) for _ in range(20)]
        while not services.closing.is_set():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.wait([tasks[3]])
        services.go.set()
        values = await asyncio.gather(*tasks, return_exceptions=True)

    assert tasks[3].cancelled()
    assert [made[1]] * 19 == [value for value in values if isinstance(value, Service)]
    assert 2 == len(made)
    assert [] == services.twice
    await registry.aclose()


def test_a_thread_waits_for_a_close_on_a_loop() -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="aclose")

    def use() -> None:
        with registry.lease("a", services.open("a")):
            pass

    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            async with registry.lease("a", services.open("a")):
                pass
            registry.trim(0)
            thread = asyncio.create_task(asyncio.to_thread(use))
            await asyncio.to_thread(until_waiting)
            services.go.set()
            await thread

    asyncio.run(main())
    asyncio.run(registry.aclose())

    assert [] == services.twice


# How long.


@pytest.mark.parametrize("timeout", [0, 0.02, "20ms"])
def test_a_lease_waits_for_a_close_no_longer_than_its_timeout(timeout: Any, together: Callable[..., None]) -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="close", name="services")
    with registry.lease("a", services.open("a")):
        pass

    def reopen() -> None:
        assert services.closing.wait(PATIENCE)
        try:
            with (
                pytest.raises(LeaseTimeout, match=r"lease of 'a' timed out after 0.* s: its previous value is still"),
                registry.lease("a", services.open("a"), timeout=timeout),
            ):
                pass
            assert 0 == registry.stats().leased
        finally:
            services.go.set()

    together(lambda: registry.trim(0), reopen)
    with registry.lease("a", services.open("a"), timeout=timeout):
        assert 1 == services.live["a"]


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_a_task_waits_for_a_close_no_longer_than_its_timeout(timeout: Any) -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="aclose")
    async with asyncio.timeout(PATIENCE):
        async with registry.lease("a", services.open("a")):
            pass
        registry.trim(0)
        with pytest.raises(LeaseTimeout):
            async with registry.lease("a", services.open("a"), timeout=timeout):
                pass
        services.go.set()
        async with registry.lease("a", services.open("a"), timeout=10):
            assert [] == services.twice
        await registry.aclose()


# Waits that could not end.


@pytest.mark.parametrize("close", ["sync", "async"])
async def test_a_closer_that_leases_its_own_key_is_told(close: str, caplog: pytest.LogCaptureFixture) -> None:
    """It would wait for itself. The error is the closer's, and the close counts as done."""

    def closer(value: Any) -> None:
        with registry.lease("a", dict):
            pass

    async def acloser(value: Any) -> None:
        async with registry.lease("a", dict):
            pass

    registry: Registry[str, Any] = Registry(close=closer if close == "sync" else acloser)
    async with asyncio.timeout(PATIENCE):
        async with registry.lease("a", dict):
            pass
        registry.trim(0)
        await registry.drain()
        assert "closing 'a' asks for 'a' itself; it would wait for ever" in caplog.text
        async with registry.lease("a", dict):
            pass


def test_a_hook_that_leases_the_key_that_it_is_told_of_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def told(removal: Any) -> None:
        with registry.lease(removal.key, dict):
            pass

    registry: Registry[str, Any] = Registry(close=lambda value: None, on_evict=told)
    registry["a"] = 1
    registry.trim(0)

    assert "closing 'a' asks for 'a' itself" in caplog.text


async def test_a_plain_lease_on_the_loop_that_runs_the_close_is_told() -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="aclose")
    async with asyncio.timeout(PATIENCE):
        async with registry.lease("a", services.open("a")):
            pass
        registry.trim(0)
        with (
            pytest.raises(RuntimeError, match=r"closing 'a' is the work of a task of this event loop.*`async with`"),
            registry.lease("a", services.open("a")),
        ):
            pass
        services.go.set()
        async with registry.lease("a", services.open("a")):
            assert [] == services.twice
        await registry.aclose()


def test_a_close_that_waits_for_drain_is_run_by_an_asynchronous_lease() -> None:
    """Plain code cannot await it and is told; a task runs it by itself."""
    services = Services()
    services.go.set()
    registry: Registry[str, Any] = Registry(close="aclose")
    registry["a"] = Service(services, "a")
    registry.trim(0)
    with pytest.raises(RuntimeError, match=r"'a' is not closed yet.*`async with`.*drain"), registry.lease("a", dict):
        pass

    async def main() -> None:
        async with asyncio.timeout(PATIENCE):
            async with registry.lease("a", services.open("a")):
                pass
            await registry.aclose()

    asyncio.run(main())

    assert [] == services.twice
    assert 0 == services.live["a"]
    assert {} == registry._closings


async def test_a_plain_lease_runs_the_close_that_another_thread_has_handed_to_its_loop() -> None:
    """The janitor hands the close of a value to the loop it came from; a plain lease on this loop need not wait."""
    services = Services()
    services.go.set()
    registry: Registry[str, Any] = Registry(close="close")
    registry["a"] = Service(services, "a")
    thread = threading.Thread(target=registry.trim, args=(0,))
    thread.start()
    thread.join(PATIENCE)  # the loop has no turn meanwhile
    assert 1 == services.live["a"]
    with registry.lease("a", services.open("a")):
        assert [] == services.twice
        assert 1 == services.live["a"]


def test_a_close_on_a_loop_that_has_ended_counts_as_done() -> None:
    class Stubborn:
        async def aclose(self) -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    registry: Registry[str, Any] = Registry(close="aclose")

    async def main() -> None:
        registry["a"] = Stubborn()
        registry.trim(0)
        await asyncio.sleep(0)

    asyncio.run(main())
    with registry.lease("a", dict, timeout=PATIENCE) as value:
        assert {} == value


def test_a_close_on_a_loop_that_does_not_run_is_told() -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="aclose")
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        registry["a"] = Service(services, "a")
        registry.trim(0)
        await asyncio.sleep(0)

    loop.run_until_complete(begin())
    with pytest.raises(RuntimeError, match="an event loop that does not run now"), registry.lease("a", dict):
        pass
    services.go.set()
    loop.run_until_complete(registry.aclose())
    loop.close()
    with registry.lease("a", dict) as value:
        assert {} == value


async def test_a_close_that_fails_counts_as_done(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def aclose(self) -> None:
            raise TimeoutError("no answer")

    registry: Registry[str, Any] = Registry(close="aclose")
    async with asyncio.timeout(PATIENCE):
        async with registry.lease("a", Broken):
            pass
        registry.trim(0)
        async with registry.lease("a", dict) as value:
            assert {} == value
    caplog.set_level(logging.CRITICAL)


def test_a_circle_of_closes_and_factories_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The factory of "b" waits for the close of "a", which leases "b"."""
    others: Registry[str, Any] = Registry(name="others")
    closing, making = threading.Event(), threading.Event()

    def closer(value: Any) -> None:
        closing.set()
        assert making.wait(PATIENCE)
        with others.lease("b", dict):
            pass

    registry: Registry[str, Any] = Registry(close=closer, name="services")
    registry["a"] = 1
    told: list[str] = []

    def make_b() -> Any:
        making.set()
        with registry.lease("a", dict) as value:
            return value

    thread = threading.Thread(target=registry.trim, args=(0,), daemon=True)
    thread.start()
    assert closing.wait(PATIENCE)
    try:
        with others.lease("b", make_b):
            pass
    except RuntimeError as error:
        told.append(str(error))
    thread.join(PATIENCE)

    assert not thread.is_alive()
    assert "would wait for ever" in "".join(told) + caplog.text


# What does not wait.


def test_a_plain_write_does_not_wait(together: Callable[..., None]) -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="close")
    registry["a"] = Service(services, "a")

    def write() -> None:
        assert services.closing.wait(PATIENCE)
        try:
            registry["a"] = 1
            assert 1 == registry.setdefault("a", 2)
            with registry.lease("a", dict) as value:  # it is there
                assert 1 == value
        finally:
            services.go.set()

    together(lambda: registry.trim(0), write)


def test_all_closes_of_a_key_are_waited_for(together: Callable[..., None]) -> None:
    """A plain write does not wait, so two values of one key may be closing: a lease waits for both."""
    services = Services()
    first, second = threading.Event(), threading.Event()
    closed: list[int] = []

    def closer(value: int) -> None:
        assert (first if value == 1 else second).wait(PATIENCE)
        closed.append(value)

    registry: Registry[str, Any] = Registry(close=closer)
    registry["a"] = 1
    one = threading.Thread(target=registry.trim, args=(0,), daemon=True)
    one.start()
    while registry:
        time.sleep(0.001)
    registry["a"] = 2
    two = threading.Thread(target=registry.trim, args=(0,), daemon=True)
    two.start()
    while registry:
        time.sleep(0.001)

    def reopen() -> None:
        with registry.lease("a", services.open("a")):
            assert [2, 1] == closed

    def let_go() -> None:
        until_waiting()
        second.set()
        two.join(PATIENCE)
        first.set()

    together(reopen, let_go)


def test_without_a_way_to_make_a_value_there_is_nothing_to_wait_for(together: Callable[..., None]) -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="close")
    registry["a"] = Service(services, "a")

    def look() -> None:
        assert services.closing.wait(PATIENCE)
        try:
            with pytest.raises(KeyError), registry.lease("a"):
                pass
        finally:
            services.go.set()

    together(lambda: registry.trim(0), look)


def test_a_registry_without_close_keeps_no_books() -> None:
    registry: Registry[str, Any] = Registry({"a": 1, "b": 2}, maxsize=2)
    registry["c"] = 3

    assert registry._closings is None


# Elsewhere.


async def test_the_close_of_a_refused_value_is_waited_for() -> None:
    services = Services()
    size = [20]
    registry: Registry[str, Any] = Registry(
        max_bytes=10, getsizeof=lambda value: size[0], overflow="raise", close="aclose"
    )
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(RegistryFull):
            async with registry.lease("a", services.open("a")):
                pass
        size[0] = 5
        with pytest.raises(LeaseTimeout):
            async with registry.lease("a", services.open("a"), timeout=0.01):
                pass
        services.go.set()
        async with registry.lease("a", services.open("a")):
            assert [] == services.twice
        await registry.aclose()


def test_a_shared_resource_is_not_opened_again_while_it_is_closing(
    clock: ManualClock, together: Callable[..., None]
) -> None:
    services = Services()

    @shared_resource(idle=60, timer=clock)
    def client() -> Service:
        return Service(services, "client")

    client()
    clock.advance(60)

    def reopen() -> None:
        assert services.closing.wait(PATIENCE)
        threading.Thread(target=lambda: (until_waiting(), services.go.set())).start()
        client()
        assert 1 == services.live["client"]

    together(client.expire, reopen)

    assert [] == services.twice
    client.close()


async def test_an_asynchronous_shared_resource_is_not_opened_again_while_it_is_closing(clock: ManualClock) -> None:
    services = Services()

    @shared_resource(idle=60, timer=clock)
    async def client() -> Service:
        return Service(services, "client")

    async with asyncio.timeout(PATIENCE):
        await client()
        clock.advance(60)
        client.expire()
        tasks = [asyncio.ensure_future(client()) for _ in range(5)]
        await asyncio.sleep(0.01)
        services.go.set()
        await asyncio.gather(*tasks)
        assert 1 == services.live["client"]
        assert [] == services.twice
        await client.aclose()


def test_a_column_waits_for_its_own_values(together: Callable[..., None]) -> None:
    services = Services()
    group = Group(Limits.of(maxsize=1, close="close"), {"sessions": None, "notes": None})
    sessions, notes = group.adopt("sessions", {}), group.adopt("notes", {})
    sessions["a"] = Service(services, "a")

    def reopen() -> None:
        assert services.closing.wait(PATIENCE)
        with notes.lease("a", lambda: None):  # another column, where nothing is closing
            pass
        threading.Thread(target=lambda: (until_waiting(), services.go.set())).start()
        with sessions.lease("a", services.open("a")):
            assert [] == services.twice

    together(lambda: group.rows.trim(0), reopen)


def test_with_a_store_the_stored_value_comes_back_when_the_previous_one_is_closed(
    tmp_path: Path, together: Callable[..., None]
) -> None:
    closing, go = threading.Event(), threading.Event()
    closed: list[Any] = []

    def closer(value: Any) -> None:
        if not closed:
            closing.set()
            assert go.wait(PATIENCE)
        closed.append(value)

    with Registry[str, Any](store=f"sqlite:{tmp_path / 'chats.db'}", close=closer) as registry:
        registry["a"] = {"n": 1}
        registry.flush()

        def reopen() -> None:
            assert closing.wait(PATIENCE)
            threading.Thread(target=lambda: (until_waiting(), go.set())).start()
            with registry.lease("a") as value:
                assert [{"n": 1}] == closed
                assert {"n": 1} == value

        together(lambda: registry.trim(0), reopen)


def test_a_forked_child_does_not_wait_for_a_close_of_its_parent(in_child: Callable[..., int]) -> None:
    services = Services()
    registry: Registry[str, Any] = Registry(close="close")
    registry["a"] = Service(services, "a")
    thread = threading.Thread(target=registry.trim, args=(0,), daemon=True)
    thread.start()
    assert services.closing.wait(PATIENCE)

    def use() -> None:
        with registry.lease("a", dict, timeout=5) as value:
            assert {} == value

    assert 0 == in_child(use)
    services.go.set()
    thread.join(PATIENCE)


def test_a_close_that_was_never_begun_holds_nobody_up() -> None:
    """The registry refers weakly to a close: if its record is lost, no caller waits for it."""
    registry: Registry[str, Any] = Registry({"a": 1}, close=lambda value: None)
    gone: list[Any] = []
    with registry._lock:
        registry._discard("a", Cause.SIZE, gone)
    with pytest.raises(RuntimeError, match="closing 'a' asks for 'a' itself"), registry.lease("a", dict):
        pass
    gone.clear()
    with registry.lease("a", dict) as value:
        assert {} == value
