"""`managed_session` as a decorator: one session for each call."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import anyio
import pytest

from hygiene.session import AsyncSession, Session, current_session, managed_session


@pytest.fixture
def log() -> list[str]:
    return []


def here() -> Session:
    session = current_session()
    assert isinstance(session, Session)
    return session


def async_here() -> AsyncSession:
    session = current_session()
    assert isinstance(session, AsyncSession)
    return session


def current() -> Any:
    try:
        return current_session()
    except LookupError:
        return None


def test_each_call_of_a_function_is_a_session(log: list[str]) -> None:
    """Also when it calls itself."""

    @managed_session(name="job")
    def work(depth: int) -> int:
        """Works."""
        here().callback(log.append, f"released {depth}")
        if depth:
            work(depth - 1)
        log.append(f"worked {depth}")
        return depth

    assert 1 == work(1)
    assert ["worked 0", "released 0", "worked 1", "released 1"] == log
    assert ("work", "Works.", "(depth: 'int') -> 'int'") == (work.__name__, work.__doc__, str(inspect.signature(work)))
    assert current() is None


async def test_each_call_of_an_async_function_is_a_session(log: list[str]) -> None:
    """Also of those that run at the same time."""

    @managed_session()
    async def work(number: int) -> int:
        async_here().callback(log.append, f"released {number}")
        await asyncio.sleep(0)
        log.append(f"worked {number}")
        return number

    assert inspect.iscoroutinefunction(work)
    assert [0, 1, 2] == await asyncio.gather(*(work(number) for number in range(3)))
    assert {"released 0", "released 1", "released 2"} < set(log)
    assert 6 == len(log)


def test_methods_of_all_kinds_can_be_decorated(log: list[str]) -> None:
    class Agent:
        @managed_session()
        def run(self) -> Any:
            return self, here()

        @managed_session()
        @classmethod
        def make(cls) -> Any:
            return cls, here()

        @managed_session()
        @staticmethod
        def help() -> Any:
            return None, here()

    agent = Agent()
    for (owner, session), expected in ((agent.run(), agent), (agent.make(), Agent), (Agent.help(), None)):
        assert expected is owner
        assert session.closed


async def test_what_is_called_as_a_function_is_one(log: list[str]) -> None:
    """A partial of an async function, and an object with an async `__call__`."""

    async def work(number: int) -> int:
        assert async_here()
        return number

    class Callee:
        async def __call__(self, number: int) -> int:
            assert async_here()
            return number

    assert 3 == await managed_session()(functools.partial(work, 3))()
    with pytest.raises(AttributeError):
        Callee().__name__  # type: ignore[attr-defined]  # noqa: B018 - it has none, and needs none
    assert 4 == await managed_session()(Callee())(4)


def test_a_factory_opens_its_resource_for_each_call(log: list[str]) -> None:
    @managed_session(
        contextlib.closing, type("Client", (), {"close": lambda self: log.append("closed")})(), close="hang"
    )
    def never() -> None: ...

    with pytest.raises(TypeError, match=r"with hang\(\)"):
        never()

    class Client:
        def close(self) -> None:
            log.append("closed")

    @managed_session(Client)
    def work() -> None:
        log.append("worked")

    work()
    work()

    assert ["worked", "closed"] * 2 == log


# Generators.


def test_the_session_of_a_generator_lives_as_long_as_it(log: list[str]) -> None:
    """And is current only while its own code runs, not in the loop that consumes it."""

    @managed_session()
    def rows(count: int) -> Iterator[int]:
        session = here()
        session.callback(log.append, "released")
        for number in range(count):
            assert session is current()
            yield number
        assert session is current()

    assert inspect.isgeneratorfunction(rows)
    with managed_session() as consumer:
        for number in rows(2):
            log.append(f"{number}")
            assert consumer is current()
        assert consumer is current()

    assert ["0", "1", "released"] == log


def test_generators_that_take_turns_do_not_mix_their_sessions(log: list[str]) -> None:
    @managed_session()
    def rows(name: str) -> Iterator[Session]:
        mine = here()
        while True:
            assert mine is current()
            yield mine

    first, second = rows("a"), rows("b")
    sessions = [next(rows) for _ in range(3) for rows in (first, second)]
    assert current() is None
    first.close()  # type: ignore[attr-defined]

    assert 2 == len(set(map(id, sessions)))
    assert [True, False] == [sessions[0].closed, sessions[1].closed]
    second.close()  # type: ignore[attr-defined]


def test_a_generator_is_driven_as_if_it_were_not_decorated(log: list[str]) -> None:
    """What is sent and thrown arrives, what it returns comes out."""

    @managed_session()
    def echo() -> Generator[str, str, str]:
        assert here()
        received = yield "ready"
        try:
            received = yield received
        except KeyError as error:
            assert here()
            received = yield f"caught {error.args[0]}"
        return received

    generator = echo()
    assert "ready" == next(generator)
    assert "hello" == generator.send("hello")
    assert "caught mine" == generator.throw(KeyError("mine"))
    with pytest.raises(StopIteration) as caught:
        generator.send("bye")

    assert "bye" == caught.value.value


def test_the_error_of_a_generator_is_its_own(log: list[str]) -> None:
    @managed_session()
    def rows() -> Iterator[int]:
        here().callback(log.append, "released")
        yield 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(rows())

    assert ["released"] == log


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_generator_that_is_left_early_releases(log: list[str], how: str) -> None:
    """First its own `finally`, in its session, then what the session holds."""

    @managed_session()
    def rows() -> Iterator[int]:
        here().callback(log.append, "released")
        try:
            while True:
                yield 1
        finally:
            assert not here().closed
            log.append("finally")

    generator = rows()
    next(generator)
    assert [] == log
    if how == "close":
        generator.close()  # type: ignore[attr-defined]
    del generator
    gc.collect()

    assert ["finally", "released"] == log


def test_whoever_closes_a_generator_hears_of_failures() -> None:
    """A note on a GeneratorExit would be seen by nobody."""

    @managed_session()
    def rows() -> Iterator[int]:
        here().callback(lambda: 1 / 0)
        yield 1

    generator = rows()
    next(generator)
    with pytest.raises(ExceptionGroup, match="1 of 1 releases"):
        generator.close()  # type: ignore[attr-defined]


def test_a_generator_that_was_never_started_opens_nothing(log: list[str]) -> None:
    @managed_session(lambda: log.append("opened"))
    def rows() -> Iterator[int]:
        yield 1

    generator = rows()
    generator.close()  # type: ignore[attr-defined]

    assert [] == log


async def test_the_session_of_an_async_generator_lives_as_long_as_it(log: list[str]) -> None:
    @managed_session()
    async def rows(count: int) -> AsyncIterator[int]:
        session = async_here()
        session.callback(log.append, "released")
        for number in range(count):
            await asyncio.sleep(0)
            assert session is current()
            yield number
        assert session is current()

    assert inspect.isasyncgenfunction(rows)
    async with managed_session() as consumer:
        async for number in rows(2):
            log.append(f"{number}")
            assert consumer is current()
        assert consumer is current()

    assert ["0", "1", "released"] == log


async def test_an_async_generator_is_driven_as_if_it_were_not_decorated(log: list[str]) -> None:
    @managed_session()
    async def echo() -> Any:
        async_here().callback(log.append, "released")
        received = yield "ready"
        try:
            received = yield received
        except KeyError as error:
            assert async_here()
            yield f"caught {error.args[0]}"

    generator = echo()
    assert "ready" == await anext(generator)
    assert "hello" == await generator.asend("hello")
    assert "caught mine" == await generator.athrow(KeyError("mine"))
    with pytest.raises(StopAsyncIteration):
        await anext(generator)

    assert ["released"] == log


async def test_an_async_generator_that_is_left_early_releases(log: list[str]) -> None:
    """Also where another task closes it, although it holds a task group."""

    @managed_session()
    async def rows() -> AsyncIterator[int]:
        session = async_here()
        session.callback(log.append, "released")
        await session.enter(anyio.create_task_group())
        try:
            while True:
                yield 1
        finally:
            assert async_here()
            log.append("finally")

    generator: Any = rows()
    await anext(generator)
    assert [] == log
    await asyncio.create_task(generator.aclose())
    assert ["finally", "released"] == log

    log.clear()
    generator = rows()
    await anext(generator)
    del generator
    gc.collect()
    for _ in range(50):
        await asyncio.sleep(0)

    assert ["finally", "released"] == log
    assert {asyncio.current_task()} == asyncio.all_tasks()
