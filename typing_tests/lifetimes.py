"""What a type checker sees of sessions, pools, cleanups and what is made of them. Checked, never run."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from typing import assert_type

from fastapi import FastAPI
from starlette.applications import Starlette

from hygiene import (
    AsyncPool,
    AsyncPoolLease,
    AsyncSession,
    Holder,
    ManagedLocal,
    MemoryMonitor,
    Pool,
    PoolLease,
    PoolStats,
    PoolTimeout,
    Registry,
    SharedResource,
    ShutdownReport,
    Store,
    WriteBehind,
    ashutdown,
    current_session,
    expose,
    managed_local,
    managed_pool,
    managed_session,
    open_store,
    owns,
    profile_memory,
    register_cleanup,
    shared_resource,
    shutdown,
    watch_growth,
    weak_listeners,
)
from hygiene import Session as OpenSession
from hygiene.integrations.asgi import lifespan
from hygiene.integrations.sqlalchemy import HygienePool


class Session:
    """A resource as users have them."""

    async def aclose(self) -> None: ...


async def connect() -> Session:
    return Session()


registry: Registry[str, int] = Registry()


# Sessions.


def use_sessions(pool: Pool[str]) -> None:
    with managed_session() as session:
        assert_type(session, OpenSession)
        assert_type(session.open(sqlite3.connect, ":memory:"), sqlite3.Connection)
        assert_type(session.open(Session), Session)
        assert_type(session.enter(nullcontext(3)), int)
        assert_type(session.callback(len, "three")("four"), int)
        assert_type(session.lease(registry, "a"), int)
        assert_type(session.lease(registry, "a", lambda: 1), int)
        assert_type(session.acquire(pool, timeout="5s"), str)
    with managed_session(sqlite3.connect, ":memory:", close="close", timeout="5s", name="db") as connection:
        assert_type(connection, sqlite3.Connection)
    assert_type(current_session(), OpenSession | AsyncSession)


async def use_async_sessions(pool: AsyncPool[str]) -> None:
    async with managed_session() as session:
        assert_type(session, AsyncSession)
        assert_type(await session.open(connect), Session)
        assert_type(await session.open(Session), Session)
        assert_type(await session.enter(asyncio.TaskGroup()), asyncio.TaskGroup)
        assert_type(await session.enter(nullcontext(3)), int)
        assert_type(session.callback(len, "three")("four"), int)
        assert_type(await session.lease(registry, "a"), int)
        assert_type(await session.acquire(pool, timeout=5), str)
    async with managed_session(connect) as resource:
        assert_type(resource, Session)
    async with managed_session(Session) as resource:
        assert_type(resource, Session)


@managed_session()
def decorated(number: int) -> str:
    return str(number)


@managed_session(timeout=5)
async def async_decorated(number: int) -> str:
    return str(number)


@managed_session()
def generated(number: int) -> Iterator[int]:
    yield number


@managed_session(sqlite3.connect, ":memory:")
async def async_generated(number: int) -> AsyncIterator[int]:
    yield number


class Agent:
    @managed_session()
    def run(self, number: int) -> str:
        return str(number)


assert_type(decorated(3), str)
assert_type(Agent().run(3), str)
assert_type(generated(3), Iterator[int])
assert_type(async_generated(3), AsyncIterator[int])


async def f() -> None:
    assert_type(await async_decorated(3), str)


# Pools.


def use_pool() -> None:
    pool = Pool(lambda: sqlite3.connect("a.db"), max_size=5, check=lambda connection: connection.total_changes >= 0)
    assert_type(pool, Pool[sqlite3.Connection])
    with pool.acquire() as connection:
        assert_type(connection, sqlite3.Connection)
    lease = pool.lease(timeout="5s")
    assert_type(lease, PoolLease[sqlite3.Connection])
    assert_type(lease.resource, sqlite3.Connection)
    lease.release(discard=True)
    assert_type(pool.stats(), PoolStats)
    assert_type(pool.holders(), tuple[Holder, ...])
    with managed_pool(Session, max_size=2) as sessions:
        assert_type(sessions, Pool[Session])
    try:
        pool.lease()
    except PoolTimeout as timeout:
        assert_type(timeout.stats, PoolStats | None)


async def use_async_pool() -> None:
    pool = AsyncPool(connect, min_size=1)
    assert_type(pool, AsyncPool[Session])
    assert_type(AsyncPool(Session), AsyncPool[Session])
    async with pool.acquire(timeout=1) as session:
        assert_type(session, Session)
    lease = await pool.lease()
    assert_type(lease, AsyncPoolLease[Session])
    lease.release()
    async with managed_pool(connect) as sessions:
        assert_type(sessions, AsyncPool[Session])


# A function that returns out of a block returns on each path: no block swallows what its body raises.


def return_from_sessions() -> int:
    if os.environ:
        with managed_session():
            return 1
    if os.environ:
        with managed_session(sqlite3.connect, ":memory:"):
            return 2
    with OpenSession():
        return 3


async def return_from_async_sessions() -> int:
    if os.environ:
        async with managed_session():
            return 1
    if os.environ:
        async with managed_session(connect):
            return 2
    async with AsyncSession():
        return 3


def return_from_a_pool(pool: Pool[Session]) -> int:
    if os.environ:
        with pool:
            return 1
    if os.environ:
        with pool.acquire():
            return 2
    if os.environ:
        with pool.lease():
            return 3
    with managed_pool(Session):
        return 4


async def return_from_an_async_pool(pool: AsyncPool[Session]) -> int:
    if os.environ:
        async with pool:
            return 1
    if os.environ:
        async with pool.acquire():
            return 2
    async with managed_pool(connect):
        return 3


def return_from_a_registry() -> int:
    if os.environ:
        with registry:
            return 1
    with registry.lease("a"):
        return 2


async def return_from_an_async_registry() -> int:
    if os.environ:
        async with registry:
            return 1
    async with registry.lease("a"):
        return 2


def return_from_a_shared_resource() -> int:
    with index.lease("a"):
        return 1


async def return_from_an_async_shared_resource() -> int:
    async with client.lease():
        return 1


def return_from_a_store() -> int:
    if os.environ:
        with open_store("sqlite:a.db") as store:
            assert_type(store, Store)
            return 1
    with WriteBehind(open_store("sqlite:a.db")):
        return 2


async def return_from_a_writer() -> int:
    async with WriteBehind(open_store("sqlite:a.db")):
        return 1


def return_from_what_watches() -> int:
    if os.environ:
        with MemoryMonitor():
            return 1
    if os.environ:
        with profile_memory():
            return 2
    if os.environ:
        with watch_growth():
            return 3
    with expose("a.socket"):
        return 4


# Cleanups.


@register_cleanup
def flush(path: str = "") -> int:
    return len(path)


@register_cleanup(on="interval", every="30m", priority=1)
def tidy() -> None: ...


assert_type(flush("a"), int)
register_cleanup(flush, "a").cancel()
assert_type(shutdown(timeout=5), ShutdownReport)


async def end() -> None:
    assert_type(await ashutdown(), ShutdownReport)


# Shared, local, weak and owned.


def open_index(path: str) -> Session:  # noqa: ARG001
    return Session()


@shared_resource(idle="10m")
def index(path: str) -> Session:
    return open_index(path)


@shared_resource()
async def client() -> Session:
    return Session()


shared: SharedResource[[str], Session] = index
assert_type(index("a"), Session)
parser = managed_local(Session)
assert_type(parser, ManagedLocal[Session])
assert_type(parser(), Session)


async def use_client() -> None:
    assert_type(await client(), Session)


@owns("db")
@weak_listeners("listeners")
class Bus:
    def __init__(self) -> None:
        self.listeners: list[Callable[[str], None]] = []
        self.db: Session | None = None


assert_type(Bus().listeners, list[Callable[[str], None]])
assert_type(owns("db")(Bus), type[Bus])


# Integrations.


async def open_db(app: FastAPI, session: AsyncSession) -> dict[str, int]:  # noqa: ARG001
    return {"db": 1}


FastAPI(lifespan=lifespan(open_db, timeout="10s"))
Starlette(lifespan=lifespan(open_db))


@lifespan
async def life(app: FastAPI) -> None: ...


FastAPI(lifespan=life)
assert_type(life, lifespan)

pool = HygienePool(lambda: sqlite3.connect("a.db"), pool_size=5, leak_after="1m", max_waiting=3)
assert_type(pool.stats(), PoolStats)
assert_type(pool.holders(), tuple[Holder, ...])
assert_type(pool.recreate(), HygienePool)
