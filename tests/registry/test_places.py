"""A full registry refuses before it calls a factory, and a value that is refused all the same is closed."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hygiene.errors import NotStorable, RegistryFull
from hygiene.group import Group
from hygiene.limits import Limits
from hygiene.registry import Registry

FULL: dict[str, dict[str, Any]] = {
    "nothing leaves": {"policy": "none"},
    "all leased": {},
    "fifo": {"policy": "fifo"},
    "lfu": {"policy": "lfu"},
    "all busy": {"busy": lambda entry: True},
    "timed": {"ttl": 60},
    "told": {"on_evict": lambda removal: None},
}


class Connections:
    """Makes connections and knows which of them are open."""

    def __init__(self) -> None:
        self.opened = 0
        self.open: list[Connection] = []

    def __call__(self) -> Connection:
        return Connection(self)

    async def later(self) -> Connection:
        await asyncio.sleep(0)
        return Connection(self)


class Connection:
    def __init__(self, connections: Connections) -> None:
        connections.opened += 1
        connections.open.append(self)
        self.connections = connections

    def close(self) -> None:
        self.connections.open.remove(self)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.close()


def by_lease(registry: Registry[str, Any], key: str, make: Callable[[], Any]) -> Any:
    with registry.lease(key, make) as value:
        return value


def by_look_up(registry: Registry[str, Any], key: str, make: Callable[[], Any]) -> Any:
    return registry[key]


def by_plain_lease(registry: Registry[str, Any], key: str, make: Callable[[], Any]) -> Any:
    with registry.lease(key) as value:
        return value


WAYS = {"lease": by_lease, "look-up": by_look_up, "lease by default_factory": by_plain_lease}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("limits", FULL.values(), ids=FULL)
def test_a_factory_is_not_called_for_a_refused_place(limits: dict[str, Any], way: Callable[..., Any]) -> None:
    connections = Connections()
    registry: Registry[str, Any] = Registry(
        maxsize=1, overflow="raise", close="close", default_factory=connections, **limits
    )
    with registry, registry.lease("ann", connections):
        for name in "bcd":
            with pytest.raises(RegistryFull, match=f"{name!r} was not added"):
                way(registry, name, connections)

        assert 1 == connections.opened
        assert ["ann"] == list(registry)
        assert {} == registry._flights

    assert [] == connections.open


async def test_tasks_are_refused_before_the_factory_is_called() -> None:
    """Twenty tasks ask for the last place with twenty keys: one factory runs, and 19 tasks are refused at once."""
    connections = Connections()
    registry: Registry[int, Any] = Registry(maxsize=2, overflow="raise", close="aclose")
    go = asyncio.Event()

    async def use(key: int) -> None:
        async with registry.lease(key, connections.later):
            await go.wait()

    async with asyncio.timeout(20), registry, registry.lease(-1, connections.later):
        tasks = [asyncio.create_task(use(key)) for key in range(20)]
        await asyncio.wait(tasks, timeout=10, return_when=asyncio.FIRST_EXCEPTION)
        await asyncio.sleep(0)
        go.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)

        assert 19 == sum(isinstance(outcome, RegistryFull) for outcome in outcomes)
        assert 2 == connections.opened

    assert [] == connections.open


def test_threads_that_create_different_keys_for_the_last_place(together: Callable[..., None]) -> None:
    """One factory runs for one place, although all threads ask at the same time."""
    connections = Connections()
    registry: Registry[int, Any] = Registry(maxsize=1, overflow="raise", close="close")
    refused = threading.Semaphore(0)

    def make() -> Connection:
        for _ in range(7):
            assert refused.acquire(timeout=10)  # the other threads are refused while this factory runs
        return connections()

    def use(key: int) -> Callable[[], None]:
        def run() -> None:
            try:
                with registry.lease(key, make):
                    assert [key] == list(registry)
            except RegistryFull:
                refused.release()

        return run

    together(*[use(key) for key in range(8)])

    assert 1 == connections.opened
    registry.close()
    assert [] == connections.open


def test_callers_of_the_same_key_share_one_place(together: Callable[..., None]) -> None:
    connections = Connections()
    registry: Registry[str, Any] = Registry(maxsize=1, overflow="raise", close="close")
    arrived = threading.Semaphore(0)

    def make() -> Connection:
        for _ in range(7):
            assert arrived.acquire(timeout=10)
        return connections()

    def use() -> None:
        arrived.release()
        with registry.lease("a", make):
            pass

    together(*[use] * 8)

    assert 1 == connections.opened == len(registry)


def fail() -> Any:
    raise ConnectionError("no server")


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, SystemExit])
def test_a_factory_that_fails_gives_its_place_back(error: type[BaseException]) -> None:
    connections = Connections()
    registry: Registry[str, Any] = Registry(maxsize=1, overflow="raise", close="close")

    def make() -> Any:
        raise error

    for name in "abc":
        with pytest.raises(error), registry.lease(name, make):
            pass
    with registry.lease("d", connections):
        assert ["d"] == list(registry)
    registry.close()

    assert [] == connections.open


def test_a_default_factory_that_fails_gives_its_place_back() -> None:
    failing = [True]

    def make() -> int:
        if failing:
            fail()
        return 1

    registry: Registry[str, int] = Registry(maxsize=1, overflow="raise", policy="none", default_factory=make)
    for name in "abc":
        with pytest.raises(ConnectionError):
            registry[name]
    failing.clear()

    assert 1 == registry["d"]


async def test_a_cancelled_factory_gives_its_place_back() -> None:
    registry: Registry[str, Any] = Registry(maxsize=1, overflow="raise", close="close")
    begun = asyncio.Event()

    async def never() -> Any:
        begun.set()
        await asyncio.Event().wait()

    async def use() -> None:
        async with registry.lease("a", never):
            pass

    async with asyncio.timeout(20):
        task = asyncio.create_task(use())
        await begun.wait()
        with pytest.raises(RegistryFull), registry.lease("b", dict):
            pass
        task.cancel()
        await asyncio.wait([task])
        async with registry.lease("c", dict):
            assert ["c"] == list(registry)


def test_a_place_ends_with_the_call_that_took_it() -> None:
    """An exception between taking a place and the first line that would give it back leaves the place free."""
    registry: Registry[str, Any] = Registry(maxsize=1, overflow="raise")
    place = registry._take_place("a")
    with pytest.raises(RegistryFull):
        registry["b"] = 1
    del place
    gc.collect()
    registry["b"] = 1

    assert {"b": 1} == registry


def test_a_plain_write_does_not_take_a_place_that_is_kept() -> None:
    """While a factory runs, its place is taken: another key is refused, its own key may be written."""
    registry: Registry[str, Any] = Registry(maxsize=1, overflow="raise", close="close")
    connections = Connections()

    def make() -> Connection:
        with pytest.raises(RegistryFull):
            registry["other"] = 1
        registry["a"] = written
        return connections()

    written = connections()
    with registry.lease("a", make) as value:
        assert written is value
        assert [written] == connections.open


@pytest.mark.parametrize("way", [by_lease, by_look_up], ids=["lease", "look-up"])
def test_a_made_value_is_closed_if_the_key_has_another_by_then(way: Callable[..., Any]) -> None:
    """A value that another caller put in meanwhile wins, and the one that the factory made is closed, not forgotten."""
    connections = Connections()

    def make() -> Connection:
        registry["a"] = registry.peek("a") or connections()
        return connections()

    registry: Registry[str, Any] = Registry(maxsize=3, close="close", default_factory=make)
    value = way(registry, "a", make)

    assert [value] == connections.open


def test_a_factory_may_put_its_value_in_by_itself() -> None:
    """The value that the registry holds already, under this key or another one, is not closed."""
    connections = Connections()
    registry: Registry[str, Any] = Registry(maxsize=3, close="close")

    def make() -> Connection:
        registry["a"] = made = connections()
        return made

    with registry.lease("a", make) as value:
        assert [value] == connections.open


def test_a_shared_value_that_is_refused_stays_open() -> None:
    connections = Connections()
    registry: Registry[str, Any] = Registry(max_bytes=10, getsizeof=lambda value: 10, overflow="raise", close="close")
    with registry.lease("a", connections) as shared:
        with pytest.raises(RegistryFull), registry.lease("b", lambda: shared):
            pass

        assert [shared] == connections.open


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_made_value_that_is_too_large_is_closed(way: Callable[..., Any]) -> None:
    connections = Connections()
    registry: Registry[str, Any] = Registry(
        max_bytes=10, getsizeof=lambda value: 20, overflow="raise", close="close", default_factory=connections
    )
    with pytest.raises(RegistryFull):
        way(registry, "a", connections)

    assert 1 == connections.opened
    assert [] == connections.open


async def test_an_asynchronous_close_of_a_refused_value_is_awaited() -> None:
    connections = Connections()
    async with Registry[str, Any](
        max_bytes=10, getsizeof=lambda value: 20, overflow="raise", close="aclose"
    ) as registry:
        with pytest.raises(RegistryFull):
            async with registry.lease("a", connections.later):
                pass

    assert 1 == connections.opened
    assert [] == connections.open


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_made_value_whose_conversion_fails_is_closed(way: Callable[..., Any]) -> None:
    connections = Connections()

    def convert(value: Any) -> Any:
        raise TypeError("no such value")

    registry: Registry[str, Any] = Registry(maxsize=2, close="close", default_factory=connections, values=convert)
    with pytest.raises(TypeError, match="no such value"):
        way(registry, "a", connections)

    assert 1 == connections.opened
    assert [] == connections.open
    assert 0 == registry.stats().leased


def test_a_made_value_that_no_store_takes_is_closed() -> None:
    connections = Connections()
    with (
        Registry[str, Any](maxsize=2, close="close", store="sqlite::memory:") as registry,
        pytest.raises(NotStorable),
        registry.lease("a", connections),
    ):
        pass

    assert 1 == connections.opened
    assert [] == connections.open


def test_a_converted_value_is_kept_open() -> None:
    """The value in the registry is another one than the factory made, which is part of it."""
    connections = Connections()

    class Session:
        def __init__(self, connection: Connection) -> None:
            self.connection = connection

        def close(self) -> None:
            self.connection.close()

    registry: Registry[str, Any] = Registry(maxsize=2, close="close", values=Session)
    with registry.lease("a", connections) as session:
        assert [session.connection] == connections.open
    registry.close()
    assert [] == connections.open


def test_setdefault_closes_the_default_that_a_full_registry_refuses() -> None:
    """``r.setdefault(key, Connection())`` hands the connection over; nobody else could close it."""
    connections = Connections()
    registry: Registry[str, Any] = Registry(maxsize=1, overflow="raise", close="close")
    with registry.lease("a", connections) as held:
        for name in "bcd":
            with pytest.raises(RegistryFull):
                registry.setdefault(name, connections())

        assert [held] == connections.open
        assert held is registry.setdefault("a", 1)
    assert 4 == connections.opened


def test_a_plain_write_that_is_refused_leaves_the_value_to_its_caller() -> None:
    connections = Connections()
    registry: Registry[str, Any] = Registry(maxsize=1, overflow="raise", policy="none", close="close")
    registry["a"] = connections()
    mine = connections()
    with pytest.raises(RegistryFull):
        registry["b"] = mine

    assert mine in connections.open


def test_without_a_way_to_make_a_value_nothing_leaves() -> None:
    """``lease(key)`` of a key that is not there raises KeyError, and takes no place."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1, overflow="raise")
    with pytest.raises(KeyError), registry.lease("b"):
        pass

    assert {"a": 1} == registry


def test_an_idle_entry_leaves_before_the_factory_is_called() -> None:
    """The bound holds while the factory runs: the value of the next one is not open beside all the others."""
    connections = Connections()
    registry: Registry[int, Any] = Registry(maxsize=2, overflow="raise", close="close")
    open_before: list[int] = []

    def make() -> Connection:
        open_before.append(len(connections.open))
        return connections()

    for key in range(4):
        with registry.lease(key, make):
            pass

    assert [0, 1, 1, 1] == open_before


def columns(**limits: Any) -> tuple[Group, Registry[Any, Any], Registry[Any, Any]]:
    group = Group(Limits.of(**limits), {"sessions": None, "blobs": lambda key: key[0]})
    return group, group.adopt("sessions", {}), group.adopt("blobs", {})


def test_columns_of_one_group_share_the_places() -> None:
    """A place is a row: one for both columns of a key, and none for another key."""
    connections = Connections()
    _, sessions, blobs = columns(maxsize=1, overflow="raise", close="close")

    def make() -> Connection:
        with pytest.raises(RegistryFull), blobs.lease(("other", 1), connections):
            pass
        with pytest.raises(RegistryFull), sessions.lease("other", connections):
            pass
        with blobs.lease(("ann", 1), connections):
            return connections()

    with sessions.lease("ann", make):
        assert (1, 1) == (len(sessions), len(blobs))
    assert 2 == connections.opened == len(connections.open)


def test_with_room_to_grow_everything_is_as_before() -> None:
    """``overflow="grow"`` refuses nothing, so nothing leaves before the new value is there."""
    registry: Registry[str, int] = Registry({"a": 1}, maxsize=1)

    def make() -> int:
        assert {"a": 1} == registry
        return 2

    with registry.lease("b", make):
        assert {"b": 2} == registry
    assert registry._places is None
