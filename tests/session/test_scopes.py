"""Task groups and cancel scopes in an async session: exited by the task that entered them, whoever closes it."""
# ruff: noqa: PT012 - what a whole block raises is what a session is about

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from hygiene.session import AsyncSession, managed_session


@pytest.fixture
def log() -> list[str]:
    return []


async def until(condition: Callable[[], object]) -> None:
    """Let the others run until *condition* holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


async def elsewhere(coroutine: Any) -> Any:
    """Await *coroutine* in a task of its own."""
    return await asyncio.create_task(coroutine)


async def crash() -> None:
    raise OSError("connection lost")


def fail_in(group: Any) -> None:
    """Start a child that fails."""
    if isinstance(group, asyncio.TaskGroup):
        group.create_task(crash())
    else:
        group.start_soon(crash)


@contextlib.asynccontextmanager
async def transport(log: list[str], label: str = "transport", tasks: Any = None) -> Any:
    """As the clients of several SDKs: a task group around what is yielded."""
    async with anyio.create_task_group() as group:
        try:
            yield group
        finally:
            log.append(label)
            group.cancel_scope.cancel()


async def test_what_one_task_entered_another_may_close(log: list[str]) -> None:
    """With an `AsyncExitStack` anyio refuses: the scope belongs to the task that entered it."""
    stack = contextlib.AsyncExitStack()
    await stack.__aenter__()
    leaver = asyncio.create_task(stack.aclose())
    await leaver

    session = AsyncSession()
    group = await elsewhere(session.enter(transport(log, "first")))
    await session.enter(transport(log, "second"))
    group.start_soon(anyio.sleep_forever)
    await elsewhere(session.aclose())

    assert ["second", "first"] == log
    assert {asyncio.current_task()} == asyncio.all_tasks()


async def test_tasks_of_a_group_are_waited_for(log: list[str]) -> None:
    async def child() -> None:
        await asyncio.sleep(0)
        log.append("child")

    async with managed_session() as session:
        session.callback(log.append, "before")
        group = await session.enter(asyncio.TaskGroup())
        group.create_task(child())
        session.callback(log.append, "after")

    assert ["after", "child", "before"] == log


@pytest.mark.parametrize("kind", [asyncio.TaskGroup, anyio.create_task_group])
async def test_the_failure_of_a_child_is_told_at_the_end(kind: Any, log: list[str]) -> None:
    """Meanwhile everything is held, and nothing more is entered."""
    session = AsyncSession(name="agent")
    await session.enter(transport(log, "outer"))
    group = await session.enter(kind())
    session.callback(log.append, "plain")
    await session.enter(transport(log, "inner"))
    fail_in(group)
    await until(lambda: session._owner is not None and session._owner._broken)

    assert [] == log
    with pytest.raises(RuntimeError, match=r"session 'agent' takes no further context manager: .*TaskGroup.*transport"):
        await session.enter(transport(log))
    session.callback(log.append, "still taken")
    with pytest.raises(ExceptionGroup, match="1 of 5 releases of session 'agent' failed") as caught:
        await elsewhere(session.aclose())

    (failure,) = caught.value.exceptions
    assert isinstance(failure, ExceptionGroup)
    assert ["connection lost"] == [str(error) for error in failure.exceptions]
    assert "TaskGroup" in failure.__notes__[0]
    assert ["still taken", "inner", "plain", "outer"] == log
    assert {asyncio.current_task()} == asyncio.all_tasks()


@pytest.mark.parametrize("kind", [asyncio.TaskGroup, anyio.create_task_group])
async def test_the_error_of_the_block_comes_first(kind: Any, caplog: pytest.LogCaptureFixture, log: list[str]) -> None:
    """The failure of the child is noted on it. A group that merely wraps it has not failed."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with managed_session() as session:
            await session.enter(kind())
            raise error

    assert error is caught.value
    assert not hasattr(error, "__notes__")

    with pytest.raises(KeyError) as caught:
        async with managed_session() as session:
            group = await session.enter(kind())
            fail_in(group)
            await until(lambda: session._owner is not None and session._owner._broken)
            raise error

    assert error is caught.value
    assert 1 == len(error.__notes__)
    assert 1 == len(caplog.records)


async def test_a_scope_that_was_cancelled_is_left_quietly(log: list[str]) -> None:
    """To cancel a scope is no failure, as with a plain `async with`."""

    @contextlib.asynccontextmanager
    async def scoped() -> Any:
        with anyio.CancelScope() as scope:
            yield scope
        log.append(f"caught {scope.cancelled_caught}")

    async with managed_session() as session:
        session.callback(log.append, "first")
        scope = await session.enter(scoped())
        await session.enter(transport(log))
        scope.cancel()
        await until(lambda: session._owner is not None and session._owner._broken)

        assert [] == log

    assert ["transport", "caught True", "first"] == log


async def test_a_cancelled_scope_costs_nothing_while_it_is_held() -> None:
    """Anyio cancels a task in each step of the loop until it has left the scope; the session's does not notice."""

    @contextlib.asynccontextmanager
    async def scoped() -> Any:
        with anyio.CancelScope() as scope:
            yield scope

    async with managed_session() as session:
        scope = await session.enter(scoped())
        assert session._owner is not None
        scope.cancel()
        await until(lambda: session._owner is not None and session._owner._broken)
        waiting = session._owner._wake_up
        for _ in range(20):
            await asyncio.sleep(0)

        assert waiting is session._owner._wake_up


async def test_a_deadline_that_is_entered_is_told_at_the_end(log: list[str]) -> None:
    """It does not reach the block, which is another task; `async with asyncio.timeout()` around it does."""

    @contextlib.asynccontextmanager
    async def limited() -> Any:
        async with asyncio.timeout(0.001):
            yield

    with pytest.raises(ExceptionGroup) as caught:
        async with managed_session() as session:
            await session.enter(limited())
            await until(lambda: session._owner is not None and session._owner._broken)
            log.append("the block ends")

    assert [TimeoutError] == [type(error) for error in caught.value.exceptions]
    assert ["the block ends"] == log


async def test_a_scope_that_breaks_while_another_is_entered_breaks_that(log: list[str]) -> None:
    """The caller is told why, and is not cancelled itself."""
    entering = asyncio.Event()

    @contextlib.asynccontextmanager
    async def slow() -> Any:
        entering.set()
        try:
            await asyncio.Event().wait()
            yield
        finally:
            log.append("undone")

    with pytest.raises(ExceptionGroup, match="1 of 1"):
        async with managed_session() as session:
            group = await session.enter(asyncio.TaskGroup())
            task = asyncio.create_task(session.enter(slow()))
            await entering.wait()
            group.create_task(crash())
            with pytest.raises(RuntimeError, match="takes no further context manager"):
                await task

            assert ["undone"] == log


async def test_a_break_during_an_exit_reaches_the_scope(log: list[str]) -> None:
    """A child fails while a manager inside is being exited: the group reports its child."""
    exiting = asyncio.Event()

    @contextlib.asynccontextmanager
    async def slow() -> Any:
        yield
        exiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            log.append("cut short")

    session = AsyncSession()
    group = await session.enter(asyncio.TaskGroup())
    await session.enter(slow())
    task = asyncio.create_task(session.aclose())
    await exiting.wait()
    group.create_task(crash())
    with pytest.raises(ExceptionGroup, match="1 of 2") as caught:
        await task

    assert ["connection lost"] == [str(error) for error in caught.value.exceptions[0].exceptions]  # type: ignore[attr-defined]
    assert ["cut short"] == log


async def test_a_cancellation_by_a_stranger_is_told(log: list[str]) -> None:
    """No scope in the session claims it, so it would be lost."""
    with pytest.raises(ExceptionGroup) as caught:
        async with managed_session(name="agent") as session:
            await session.enter(contextlib.nullcontext())
            assert session._owner is not None
            session._owner._task.cancel()
            await until(lambda: session._owner is not None and session._owner._broken)

    assert ["what session 'agent' held was cancelled by somebody else"] == [
        str(error) for error in caught.value.exceptions
    ]


# Whoever enters is cancelled.


@contextlib.asynccontextmanager
async def slow_to_enter(log: list[str], steps: int = 3) -> Any:
    for _ in range(steps):
        await asyncio.sleep(0)
    log.append("in")
    try:
        yield
    finally:
        await asyncio.sleep(0)
        log.append("out")


async def test_cancelling_the_caller_cancels_the_entering(log: list[str]) -> None:
    """At each of its steps; the session goes on, and what had been entered in that very tick is exited at once."""
    async with managed_session() as session:
        outcomes = set()
        for step in range(20):
            log.clear()
            task = asyncio.create_task(session.enter(slow_to_enter(log)))
            for _ in range(step):
                await asyncio.sleep(0)
            done = task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

            assert done is not task.cancelled()
            assert (["in"] if done else log and ["in", "out"]) == log
            outcomes.add(tuple(log))
        task = asyncio.current_task()  # type: ignore[assignment]
        assert {(), ("in", "out"), ("in",)} == outcomes
        entered = len(session._releases or ())
        assert session._owner is not None
        assert 0 == session._owner._task.cancelling()
        log.clear()

    assert ["out"] * entered == log


async def test_cancelling_a_caller_who_waits_for_his_turn(log: list[str]) -> None:
    gate = asyncio.Event()

    @contextlib.asynccontextmanager
    async def slow() -> Any:
        await gate.wait()
        yield

    async with managed_session() as session:
        first = asyncio.create_task(session.enter(slow()))
        second = asyncio.create_task(session.enter(slow_to_enter(log)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        await first

    assert [] == log


async def test_a_cancelled_caller_breaks_nothing_for_the_others(log: list[str]) -> None:
    """A task group is shown the cancellation of the one who entered it, and raises it again."""
    for step in range(10):
        async with managed_session() as session:
            task = asyncio.create_task(session.enter(asyncio.TaskGroup()))
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            group = await session.enter(asyncio.TaskGroup())
            await group.create_task(asyncio.sleep(0))
            assert session._owner is not None
            assert session._owner.cancelled is None


async def test_callers_who_enter_at_once_and_are_cancelled_leave_nothing_behind(log: list[str]) -> None:
    """What is not the last any more is exited with the session, and in its turn."""

    @contextlib.asynccontextmanager
    async def quick(number: int) -> Any:
        log.append(f"in {number}")
        try:
            yield
        finally:
            log.append(f"out {number}")

    for step in range(10):
        log.clear()
        async with managed_session() as session:
            tasks = [asyncio.create_task(session.enter(quick(number))) for number in range(3)]
            for _ in range(step):
                await asyncio.sleep(0)
            tasks[0].cancel()
            await asyncio.wait(tasks)

        entered = [line.removeprefix("in ") for line in log if line.startswith("in ")]
        exited = [line.removeprefix("out ") for line in log if line.startswith("out ")]
        assert sorted(entered) == sorted(exited)
        assert entered[::-1] == exited


async def test_entering_that_will_not_be_cancelled_is_undone(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """It went on although the caller was cancelled, so nobody is there to use it."""

    @contextlib.asynccontextmanager
    async def stubborn() -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        try:
            yield
        finally:
            log.append("out")
            raise OSError("disk is full")

    async with managed_session() as session:
        task = asyncio.create_task(session.enter(stubborn()))
        await until(lambda: session._owner is not None and session._owner._running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task

        assert ["out"] == log
        assert "disk is full" in caught.value.__notes__[0]
        assert 1 == len(caplog.records)


async def test_entering_may_turn_its_cancellation_into_an_error() -> None:
    """As it may where it is awaited directly."""

    @contextlib.asynccontextmanager
    async def failing() -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise OSError("half open") from None
        yield

    async with managed_session() as session:
        task = asyncio.create_task(session.enter(failing()))
        await until(lambda: session._owner is not None and session._owner._running)
        task.cancel()
        with pytest.raises(OSError, match="half open"):
            await task


async def test_a_failing_manager_holds_up_nobody(log: list[str]) -> None:
    class Failing:
        async def __aenter__(self) -> None:
            raise KeyboardInterrupt

        async def __aexit__(self, *exc_info: object) -> None:
            log.append("never")

    async with managed_session() as session:
        with pytest.raises(KeyboardInterrupt):
            await session.enter(Failing())
        await session.enter(slow_to_enter(log))

    assert ["in", "out"] == log


async def test_closing_refuses_what_is_being_entered(log: list[str]) -> None:
    """And what waits for its turn. Nothing hangs, and nothing stays open."""
    for will_not_be_cancelled in (False, True):
        log.clear()

        @contextlib.asynccontextmanager
        async def slow(stubborn: bool = will_not_be_cancelled) -> Any:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if not stubborn:
                    raise
            log.append("in")
            yield
            log.append("out")

        session = AsyncSession(name="agent")
        await session.enter(contextlib.nullcontext())
        tasks = [asyncio.create_task(session.enter(slow())) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await session.aclose()
        for task in tasks:
            with pytest.raises(RuntimeError, match="session 'agent' was closed while it entered this"):
                await task

        assert (["in", "out"] if will_not_be_cancelled else []) == log


async def test_an_exit_that_hangs_is_cancelled_in_its_task(log: list[str], advance: Any) -> None:
    """The timeout is told; the rest is exited, in the same task as ever."""

    @contextlib.asynccontextmanager
    async def hanging() -> Any:
        yield
        advance(31)
        try:
            await asyncio.Event().wait()
        finally:
            log.append("cut short")

    with pytest.raises(ExceptionGroup, match="1 of 2") as caught:
        async with managed_session(timeout=30) as session:
            await session.enter(transport(log))
            await session.enter(hanging())

    assert [TimeoutError] == [type(error) for error in caught.value.exceptions]
    assert ["cut short", "transport"] == log


# The loop ends.


def test_a_loop_that_ends_is_not_held_up(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A session that nobody has closed lets go of its scopes when nobody is left who could; the rest is a warning."""

    @contextlib.asynccontextmanager
    async def failing() -> Any:
        try:
            yield
        finally:
            raise OSError("disk is full")

    async def main() -> AsyncSession:
        session = AsyncSession(name="forgotten")
        await session.enter(transport(log, "first"))
        await session.enter(failing())
        await session.enter(transport(log, "second"))
        return session

    session = asyncio.run(main())

    assert ["second", "first"] == log
    assert ["session 'forgotten' was not closed before its event loop; releasing "] == [
        record.getMessage().partition("test_")[0] for record in caplog.records
    ]

    async def close() -> None:
        with pytest.raises(RuntimeError, match=r"belongs to another event loop|takes no further"):
            await session.enter(transport(log))
        with pytest.raises(ExceptionGroup, match="1 of 3") as caught:
            await session.aclose()
        assert ["disk is full"] == [str(error) for error in caught.value.exceptions]

    asyncio.run(close())


def test_while_others_end_a_session_is_theirs_to_close(log: list[str]) -> None:
    """When the loop goes down, the tasks that are cancelled still close their sessions in order."""

    async def work(name: str) -> None:
        async with managed_session() as session:
            session.callback(log.append, f"{name} first")
            await session.enter(transport(log, f"{name} second"))
            session.callback(log.append, f"{name} third")
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(10):
                    await asyncio.sleep(0)

    async def main() -> None:
        tasks.update(asyncio.create_task(work(name)) for name in "abc")
        for _ in range(20):
            await asyncio.sleep(0)

    tasks: set[Any] = set()
    asyncio.run(main())

    for name in "abc":
        assert [f"{name} third", f"{name} second", f"{name} first"] == [line for line in log if line[0] == name]


def test_a_task_that_cancels_all_others_and_waits_for_them_is_not_held_up(log: list[str]) -> None:
    """The usual recipe for an end. Those who are cancelled close their sessions in order, the rest lets go."""

    async def work() -> None:
        async with managed_session() as session:
            await session.enter(transport(log, "work 1"))
            session.callback(log.append, "work 2")
            await asyncio.Event().wait()

    async def main(session: AsyncSession, wait: Any, pause: int) -> None:
        await session.enter(transport(log, "forgotten"))
        tasks.append(asyncio.create_task(work()))
        for _ in range(20):
            await asyncio.sleep(0)
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        for _ in range(pause):
            await asyncio.sleep(0)
        assert "forgotten" not in log
        await wait(others)

    async def gather(others: list[Any]) -> None:
        await asyncio.gather(*others, return_exceptions=True)

    async def one_by_one(others: list[Any]) -> None:
        for task in others:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    tasks: list[Any] = []
    for wait in (gather, asyncio.wait, one_by_one):
        for pause in (0, 1, 20):
            log.clear()
            session = AsyncSession()
            asyncio.run(main(session, wait, pause))
            asyncio.run(session.aclose())

            assert ["work 2", "work 1"] == [line for line in log if line != "forgotten"]
            assert 1 == log.count("forgotten")


def test_whoever_was_cancelled_and_waits_for_all_is_waited_for_only_so_long(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would wait for the other."""
    monkeypatch.setattr("hygiene.session.GRACE", 0.01)

    async def work(session: AsyncSession, main: Any) -> None:
        await session.enter(transport(log, "forgotten"))
        try:
            await asyncio.Event().wait()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task(), main}
            for task in others:
                task.cancel()
            await asyncio.wait(others)
            log.append("work")

    async def main() -> None:
        session = AsyncSession()
        task = asyncio.create_task(work(session, asyncio.current_task()))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await session.aclose()

    asyncio.run(main())

    assert ["forgotten", "work"] == log


def test_another_loop_is_told_where_to_go(log: list[str]) -> None:
    async def open_it() -> AsyncSession:
        session = AsyncSession()
        await session.enter(slow_to_enter(log))
        session.callback(log.append, "plain")
        return session

    async def close(session: AsyncSession) -> None:
        with pytest.raises(RuntimeError, match="belongs to another event loop; use and close it there"):
            await session.enter(slow_to_enter(log))
        with pytest.raises(ExceptionGroup, match="1 of 2") as caught:
            await session.aclose()
        assert "belongs to another event loop" in str(caught.value.exceptions[0])

    loop = asyncio.new_event_loop()
    session = loop.run_until_complete(open_it())
    asyncio.run(close(session))

    assert ["in", "plain"] == log
    assert session._owner is not None
    task = session._owner._task
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()

    assert ["in", "plain", "out"] == log


async def test_the_owner_does_not_outlive_its_session(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    session = AsyncSession()
    await session.enter(contextlib.nullcontext())
    assert session._owner is not None
    owner = session._owner._task
    assert not owner.done()
    await session.aclose()

    assert owner.done()
    assert not owner.cancelled()
