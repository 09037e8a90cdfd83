"""Whatever is released, in whatever order and way it goes wrong: all run once, in reverse, and failures are exact."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hygiene.session import AsyncSession, Session, managed_session

OUTCOMES = ("return", "raise", "hang")
SYNC_WAYS = ("open", "enter", "callback")
ASYNC_WAYS = ("open", "enter", "callback", "acquire", "plain enter", "plain callback")


class Failure(Exception):
    """Raised by a release, which it names."""


def expected(kinds: list[tuple[str, str]]) -> list[tuple[int, type[Exception]]]:
    """The failures that have to be told, in the order of the releases."""
    return [
        (number, Failure if outcome == "raise" else TimeoutError)
        for number, (_, outcome) in reversed(list(enumerate(kinds)))
        if outcome != "return"
    ]


def told(notes: list[str], total: int) -> list[int]:
    """Which releases the notes speak of."""
    return [next(n for n in range(total) if f"opened as {n + 1} of {total} " in note) for note in notes]


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(SYNC_WAYS), st.sampled_from(OUTCOMES[:2])), max_size=8), st.booleans())
def test_releases_of_a_session(kinds: list[tuple[str, str]], raising: bool) -> None:
    released: list[int] = []
    body = KeyError("mine")

    def add(session: Session, number: int, way: str, outcome: str) -> None:
        def release() -> None:
            released.append(number)
            if outcome == "raise":
                raise Failure

        @contextlib.contextmanager
        def manager() -> Any:
            try:
                yield
            finally:
                release()

        if way == "open":
            session.open(type("Resource", (), {"close": lambda self: release()}))
        elif way == "enter":
            session.enter(manager())
        else:
            session.callback(release)

    caught: BaseException | None = None
    try:
        with managed_session() as session:
            for number, (way, outcome) in enumerate(kinds):
                add(session, number, way, outcome)
            if raising:
                raise body
    except (KeyError, ExceptionGroup) as error:
        caught = error
    check(caught, body if raising else None, kinds, released)


@settings(max_examples=5)
@given(
    st.lists(st.tuples(st.sampled_from(SYNC_WAYS[2:]), st.sampled_from(OUTCOMES)), max_size=6).filter(
        lambda kinds: ["hang"] == [outcome for _, outcome in kinds if outcome == "hang"]
    )
)
def test_releases_of_a_session_that_may_hang(kinds: list[tuple[str, str]]) -> None:
    released: list[int] = []
    gate = threading.Event()

    def release(number: int, outcome: str) -> None:
        released.append(number)
        if outcome == "raise":
            raise Failure
        if outcome == "hang":
            gate.wait(60)

    session = Session(timeout=0.5)
    for number, (_, outcome) in enumerate(kinds):
        session.callback(release, number, outcome)
    caught: BaseException | None = None
    try:
        session.close()
    except ExceptionGroup as error:
        caught = error
    gate.set()
    check(caught, None, kinds, released)


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(ASYNC_WAYS), st.sampled_from(OUTCOMES)).filter(
            lambda kind: not (kind[0].startswith("plain") and kind[1] == "hang")
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_releases_of_an_async_session(with_clock: Any, kinds: list[tuple[str, str]], raising: bool) -> None:
    released: list[int] = []
    body = KeyError("mine")

    async def add(session: AsyncSession, number: int, way: str, outcome: str, advance: Any) -> None:
        def plain() -> None:
            released.append(number)
            if outcome == "raise":
                raise Failure

        async def release() -> None:
            plain()
            if outcome == "hang":
                advance(31)
                await asyncio.Event().wait()
            await asyncio.sleep(0)

        @contextlib.asynccontextmanager
        async def manager(timeout: Any = None) -> Any:
            try:
                yield
            finally:
                await release()

        @contextlib.contextmanager
        def plain_manager() -> Any:
            try:
                yield
            finally:
                plain()

        if way == "open":
            await session.open(type("Resource", (), {"aclose": lambda self: release()}))
        elif way == "enter":
            await session.enter(manager())
        elif way == "acquire":
            pool: Any = type("Pool", (), {"acquire": staticmethod(manager)})
            await session.acquire(pool)
        elif way == "plain enter":
            await session.enter(plain_manager())
        else:
            session.callback(plain if way == "plain callback" else release)

    async def main(advance: Any) -> BaseException | None:
        try:
            async with managed_session(timeout=30) as session:
                for number, (way, outcome) in enumerate(kinds):
                    await add(session, number, way, outcome, advance)
                if raising:
                    raise body
        except (KeyError, ExceptionGroup) as error:
            return error
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            assert {asyncio.current_task()} == asyncio.all_tasks()
        return None

    check(with_clock(main), body if raising else None, kinds, released)


def check(
    caught: BaseException | None, body: BaseException | None, kinds: list[tuple[str, str]], released: list[int]
) -> None:
    wanted = expected(kinds)

    assert list(reversed(range(len(kinds)))) == released
    if body is not None:
        assert body is caught
        notes = list(getattr(body, "__notes__", []))
        assert [number for number, _ in wanted] == told(notes, len(kinds))
        assert [kind.__name__ for _, kind in wanted] == [note.partition(":")[0] for note in notes]
    elif wanted:
        assert isinstance(caught, ExceptionGroup)
        found = [(told(error.__notes__, len(kinds))[0], type(error)) for error in caught.exceptions]
        assert wanted == found
    else:
        assert caught is None
