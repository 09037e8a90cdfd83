"""What was found in programs out there, and how a session settles it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Self

import pytest

from hygiene.registry import Registry
from hygiene.session import AsyncSession, current_session, managed_session


class Client:
    """One session object per call of an SDK."""

    open = 0

    async def __aenter__(self) -> Self:
        type(self).open += 1
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        type(self).open -= 1

    async def complete(self, prompt: str) -> str:
        if prompt == "fail":
            raise OSError("rate limited")
        return prompt.upper()


@pytest.fixture(autouse=True)
def nothing_open() -> Any:
    Client.open = 0
    yield
    assert 0 == Client.open


async def test_a_client_for_each_call_is_closed_with_the_call() -> None:
    """Of the usual `Client().complete(prompt)` nobody closes the client."""

    @managed_session()
    async def ask(prompt: str) -> str:
        session = current_session()
        assert isinstance(session, AsyncSession)
        client = await session.enter(Client())
        return await client.complete(prompt)

    answers = await asyncio.gather(*(ask(f"hello {number}") for number in range(10)))
    with pytest.raises(OSError, match="rate limited"):
        await ask("fail")

    assert "HELLO 9" == answers[9]
    assert 0 == Client.open


async def test_agents_created_in_a_block_are_cleaned_up_at_its_end() -> None:
    """Also those that were created before one could not be, and those whose own cleanup comes after a failure."""
    log: list[str] = []

    class Agent:
        def __init__(self, name: str) -> None:
            self.name = name

        async def start(self) -> Agent:
            if self.name == "c":
                raise OSError("no such model")
            return self

        async def aclose(self) -> None:
            log.append(self.name)
            if self.name == "b":
                raise OSError("cannot delete thread")

    async def agent(name: str) -> Agent:
        return await Agent(name).start()

    with pytest.raises(OSError, match="no such model") as caught:  # noqa: PT012 - the block is what fails
        async with managed_session(name="crew") as crew:
            for name in "abc":
                await crew.open(agent, name)

    assert ["b", "a"] == log
    assert ["OSError: cannot delete thread (while releasing Agent.aclose, opened as 2 of 2 in session 'crew')"] == (
        caught.value.__notes__
    )


async def test_sessions_that_stay_to_listen_are_closed_when_nobody_needs_them() -> None:
    """One per user, kept in a registry that closes those that leave, in whichever task that happens."""
    listeners: Registry[str, AsyncSession] = Registry(maxsize=2, close="aclose")
    log: list[str] = []

    async def listen(user: str, events: asyncio.Queue[str]) -> None:
        try:
            while True:
                log.append(f"{user} {await events.get()}")
        finally:
            log.append(f"{user} gone")

    async def subscribe(user: str) -> AsyncSession:
        session = AsyncSession(name=user)
        await session.enter(Client())
        group = await session.enter(asyncio.TaskGroup())
        events: asyncio.Queue[str] = asyncio.Queue()
        session.callback(group.create_task(listen(user, events)).cancel)
        events.put_nowait("hello")
        return session

    for user in ("ann", "bob", "eve"):
        async with listeners.lease(user, create=lambda user=user: subscribe(user)):
            await asyncio.sleep(0)
    await listeners.drain()

    assert 2 == Client.open
    assert "ann gone" in log
    assert "bob gone" not in log

    await listeners.aclose()

    assert {"ann gone", "bob gone", "eve gone"} <= set(log)
    assert 0 == Client.open


async def test_of_several_cleanups_one_may_fail() -> None:
    """The others run, and one error says which."""
    log: list[str] = []
    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the block is what fails
        async with managed_session() as session:
            session.callback(log.append, "first")
            session.callback(lambda: 1 / 0)
            session.callback(log.append, "last")

    assert ["last", "first"] == log
    assert "opened as 2 of 3" in caught.value.exceptions[0].__notes__[0]


def test_nothing_is_left_where_the_loop_was_never_closed_properly() -> None:
    """A script that ends in the middle of a session's life releases what its scopes hold."""

    async def main() -> None:
        session = AsyncSession()
        await session.enter(Client())
        kept.append(session)

    kept: list[AsyncSession] = []
    asyncio.run(main())

    assert 0 == Client.open
    with contextlib.suppress(ExceptionGroup):
        asyncio.run(kept[0].aclose())
