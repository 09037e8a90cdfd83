"""`managed_session` on an event loop: as in plain code, and whatever is cancelled."""
# ruff: noqa: PT012, PT031 - what a whole block raises is what a session is about

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from hygiene.pool import AsyncPool as RealAsyncPool
from hygiene.pool import Pool as RealPool
from hygiene.registry import Registry
from hygiene.session import AsyncSession, current_session, managed_session


class Client:
    """Writes down that it was closed."""

    def __init__(self, log: list[str], label: str) -> None:
        self.log = log
        self.label = label

    def close(self) -> None:
        self.log.append(f"{self.label} the wrong way")

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.log.append(self.label)


class AsyncPool:
    """The least that a session wants of a pool."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    @contextlib.asynccontextmanager
    async def acquire(self, timeout: Any = None) -> Any:
        self.log.append(f"acquire {timeout}")
        try:
            yield asyncio.current_task()
        finally:
            self.log.append("release")


class Pool:
    @contextlib.contextmanager
    def acquire(self, timeout: Any = None) -> Any:
        yield "resource"


@pytest.fixture
def log() -> list[str]:
    return []


async def connect(log: list[str], label: str) -> Client:
    await asyncio.sleep(0)
    return Client(log, label)


async def fail(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


async def until(condition: Callable[[], object]) -> None:
    """Let the others run until *condition* holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


# What is released, and when.


async def test_everything_is_released_in_reverse_order(log: list[str]) -> None:
    """Asynchronous and plain, last opened first."""

    @contextlib.asynccontextmanager
    async def manager(label: str) -> Any:
        yield label
        await asyncio.sleep(0)
        log.append(label)

    @contextlib.contextmanager
    def plain(label: str) -> Any:
        yield label
        log.append(label)

    async def flush(label: str) -> None:
        await asyncio.sleep(0)
        log.append(label)

    async with managed_session() as session:
        assert session is current_session()
        assert "1" == (await session.open(connect, log, "1")).label
        assert "2" == await session.enter(manager("2"))
        assert flush == session.callback(flush, label="3")
        assert "4" == (await session.open(Client, log, "4")).label
        assert "5" == await session.enter(plain("5"))
        session.callback(log.append, "6")
        assert "7" == await session.enter(manager("7"))
        assert [] == log

    assert ["7", "6", "5", "4", "3", "2", "1"] == log
    assert session.closed
    assert {asyncio.current_task()} == asyncio.all_tasks()


@pytest.mark.parametrize("factory", [connect, Client])
async def test_with_a_factory_it_yields_the_resource(log: list[str], factory: Any) -> None:
    async with managed_session(factory, log, label="db") as client:
        assert "db" == client.label

    assert ["db"] == log


async def test_a_closed_session_says_what_to_do(log: list[str]) -> None:
    session = AsyncSession(name="agents")
    session.callback(log.append, "released")
    await session.aclose()
    await session.aclose()

    assert ["released"] == log
    for use in (
        lambda: session.open(Client, log, "db"),
        lambda: session.enter(contextlib.nullcontext()),
        lambda: session.acquire(AsyncPool(log)),
        lambda: session.lease(Registry({"a": 1}), "a"),
        session.__aenter__,
    ):
        with pytest.raises(RuntimeError, match=r"session 'agents' is closed; open another with managed_session\(\)"):
            await use()
    with pytest.raises(RuntimeError, match="is closed"):
        session.callback(log.append, "never")
    assert ["released"] == log


async def test_leases_are_held_until_the_end(log: list[str]) -> None:
    """The caller's own task takes them: a pool and a registry may know their tasks."""
    registry: Registry[str, int] = Registry(maxsize=1)

    async def create() -> int:
        return 1

    async with managed_session() as session:
        assert 1 == await session.lease(registry, "a", create)
        assert asyncio.current_task() is await session.acquire(AsyncPool(log), timeout=3)
        registry["b"] = 2

        assert "a" in registry
        assert ["acquire 3"] == log

    assert 0 == registry.stats().leased
    assert ["acquire 3", "release"] == log


async def test_mistakes_are_told_at_once(log: list[str]) -> None:
    async with managed_session() as session:
        with pytest.raises(TypeError, match="wanted an AsyncPool; found Pool, which would block the event loop"):
            await session.acquire(Pool())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="wanted a function to call"):
            session.callback(3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="wanted a context manager; found a int"):
            await session.enter(3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"found a int\. Call it yourself"):
            await session.open(lambda: 3)
        with pytest.raises(TypeError, match=r"Use session\.enter\(\) instead of open\(\)"):
            await session.open(contextlib.asynccontextmanager(lambda: None))  # type: ignore[arg-type]
    managed = managed_session()
    with pytest.raises(RuntimeError, match="was not entered with `async with`"):
        await managed.__aexit__(None, None, None)
    async with managed:
        with pytest.raises(RuntimeError, match="is entered already"):
            await managed.__aenter__()
        with pytest.raises(RuntimeError, match="was not entered with `with`"):
            managed.__exit__(None, None, None)


async def test_what_could_not_be_opened_is_not_released(log: list[str]) -> None:
    with pytest.raises(OSError, match="refused"):
        async with managed_session() as session:
            await session.open(Client, log, "first")
            await session.open(fail, OSError("refused"))
    managed = managed_session(fail, OSError("refused"))
    with pytest.raises(OSError, match="refused"):
        async with managed:
            pass
    with pytest.raises(OSError, match="refused"):
        async with managed:
            pass

    assert ["first"] == log
    with pytest.raises(LookupError):
        current_session()


async def test_what_comes_when_the_session_was_closed_is_released_at_once(
    log: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Another task closed it while this one was opening."""
    gate = asyncio.Event()

    async def slow(label: str) -> Client:
        await gate.wait()
        return Client(log, label)

    class SlowPool:
        @contextlib.asynccontextmanager
        async def acquire(self, timeout: Any = None) -> Any:
            await gate.wait()
            yield
            log.append("lease")
            raise OSError("dead")

    session = AsyncSession()
    tasks = [asyncio.create_task(session.open(slow, "client")), asyncio.create_task(session.acquire(SlowPool()))]
    await asyncio.sleep(0)
    await session.aclose()
    gate.set()
    for task in tasks:
        with pytest.raises(RuntimeError, match="is closed; open another"):
            await task

    assert ["client", "lease"] == sorted(log)
    assert 1 == len(caplog.records)


async def test_another_task_may_close_it(log: list[str]) -> None:
    """Also when the task that opened it has ended."""
    session = AsyncSession()

    async def open_it() -> None:
        await session.__aenter__()
        await session.open(connect, log, "db")

    await asyncio.create_task(open_it())
    await asyncio.create_task(session.aclose())

    assert ["db"] == log


async def test_a_session_that_is_dropped_says_so(log: list[str]) -> None:
    session: AsyncSession | None = AsyncSession(name="forgotten")
    assert session is not None
    session.callback(log.append, "never")
    with pytest.warns(ResourceWarning, match=r"AsyncSession 'forgotten' was dropped with 1 to release"):
        del session
        gc.collect()


# Failures.


async def test_all_failures_come_as_one_group(log: list[str]) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with managed_session(name="job") as session:
            await session.open(connect, log, "first")
            session.callback(fail, OSError("disk is full"))
            session.callback(lambda: 1 / 0)
            await session.open(connect, log, "last")

    assert "2 of 4 releases of session 'job' failed" == caught.value.message
    assert [ZeroDivisionError, OSError] == [type(error) for error in caught.value.exceptions]
    assert ["while releasing fail, opened as 2 of 4 in session 'job'"] == caught.value.exceptions[1].__notes__
    assert ["last", "first"] == log


async def test_the_error_of_the_block_is_never_masked(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with managed_session() as session:
            await session.open(connect, log, "first")
            session.callback(fail, OSError("disk is full"))
            raise error

    assert error is caught.value
    assert ["OSError: disk is full (while releasing fail, opened as 2 of 2 in session)"] == error.__notes__
    assert ["first"] == log
    assert [("hygiene", logging.ERROR)] == [(record.name, record.levelno) for record in caplog.records]


async def test_an_interrupt_goes_on_by_itself_when_the_rest_has_run(log: list[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with managed_session() as session:
            await session.open(connect, log, "first")
            session.callback(interrupt)

    assert ["first"] == log


async def test_a_release_that_somebody_cancelled_has_failed(log: list[str]) -> None:
    """The task that closes was not cancelled, and is not told that it was."""
    with pytest.raises(ExceptionGroup) as caught:
        async with managed_session() as session:
            await session.open(connect, log, "first")
            session.callback(fail, asyncio.CancelledError())

    assert ["it was cancelled before it had ended"] == [str(error) for error in caught.value.exceptions]
    assert ["first"] == log


async def test_a_manager_sees_the_error_of_the_block_and_may_suppress_it() -> None:
    seen: list[Any] = []

    class Witness:
        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *exc_info: object) -> None:
            seen.append(exc_info[:2])

    @contextlib.asynccontextmanager
    async def suppressing() -> Any:
        with contextlib.suppress(KeyError):
            yield

    error = KeyError("mine")
    async with managed_session() as session:
        await session.enter(Witness())
        await session.enter(suppressing())
        await session.enter(Witness())
        raise error
    async with managed_session() as session:
        await session.enter(contextlib.suppress(KeyError))
        raise error

    assert [(KeyError, error), (None, None)] == seen


async def test_ten_releases_of_which_three_fail_and_one_hangs(log: list[str], advance: Any) -> None:
    """Six done, three reported, one named as timed out."""

    async def hanging() -> None:
        advance(31)
        await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        async with managed_session(timeout="30s", name="ten") as session:
            for number in range(10):
                if number in {2, 5, 8}:
                    session.callback(fail, OSError(str(number)))
                elif number == 6:
                    session.callback(hanging)
                else:
                    await session.open(connect, log, str(number))

    assert ["9", "7", "4", "3", "1", "0"] == log
    assert [OSError, TimeoutError, OSError, OSError] == [type(error) for error in caught.value.exceptions]
    assert "hanging timed out; it was cancelled" in str(caught.value.exceptions[1])


# Cancellation.


async def test_a_release_ends_although_its_task_is_cancelled_twice(log: list[str]) -> None:
    """Then the cancellation is delivered."""
    gate = asyncio.Event()
    begun = asyncio.Event()

    async def flush() -> None:
        begun.set()
        await gate.wait()
        log.append("flushed")

    async def work() -> None:
        async with managed_session() as session:
            await session.open(connect, log, "first")
            session.callback(flush)
        log.append("never")

    task = asyncio.create_task(work())
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert ["flushed", "first"] == log


async def test_failures_are_noted_on_the_cancellation(caplog: pytest.LogCaptureFixture) -> None:
    begun = asyncio.Event()
    gate = asyncio.Event()

    async def flush() -> None:
        begun.set()
        await gate.wait()
        raise OSError("disk is full")

    async def work() -> None:
        async with managed_session() as session:
            session.callback(flush)

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert "OSError: disk is full" in caught.value.__notes__[0]
    assert 1 == len(caplog.records)


@pytest.mark.parametrize("where", ["block", "release"])
async def test_what_hangs_after_a_cancellation_has_a_deadline(log: list[str], advance: Any, where: str) -> None:
    """And what was opened before it and needs no time is released all the same."""
    begun = asyncio.Event()

    async def hanging() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def release() -> None:
        begun.set()
        await cancelled.wait()
        advance(11)
        await asyncio.Event().wait()

    async def work() -> None:
        async with managed_session() as session:
            session.callback(log.append, "plain")
            session.callback(asynchronous)
            session.callback(release)
            if where == "block":
                await hanging()

    async def asynchronous() -> None:
        log.append("asynchronous")

    cancelled = asyncio.Event()
    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    cancelled.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    assert ["asynchronous", "plain"] == log
    assert "release was not done within its grace after a cancellation" in caught.value.__notes__[0]


async def test_a_timeout_around_a_session_still_works(log: list[str]) -> None:
    """`asyncio.timeout` sees its own cancellation come back, whether the block or a release was cut short."""
    for hanging_release in (False, True):
        gate = asyncio.Event()

        async def flush(gate: asyncio.Event = gate) -> None:
            await gate.wait()
            log.append("flushed")

        asyncio.get_running_loop().call_later(0.05, gate.set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001), managed_session() as session:
                session.callback(flush)
                if not hanging_release:
                    await asyncio.Event().wait()

    assert ["flushed", "flushed"] == log
    task = asyncio.current_task()
    assert task is not None
    assert 0 == task.cancelling()


async def test_a_cancel_scope_around_a_session_still_works(log: list[str]) -> None:
    """Anyio cancels a task again and again until it has left the scope."""
    with anyio.move_on_after(0.001) as scope:
        async with managed_session() as session:
            await session.open(connect, log, "first")
            session.callback(anyio.sleep, 0.01)
            await anyio.sleep_forever()

    assert scope.cancelled_caught
    assert ["first"] == log


@pytest.mark.parametrize("managed_factory", [False, True])
async def test_wherever_it_is_cancelled_nothing_stays_open(managed_factory: bool) -> None:
    """The task is cancelled after its first step, after its second, ...: what was opened is always closed, once."""

    @contextlib.asynccontextmanager
    async def manager(label: str) -> Any:
        await asyncio.sleep(0)
        balance[label] = balance.get(label, 0) + 1
        try:
            yield
        finally:
            await asyncio.sleep(0)
            balance[label] -= 1

    class Counted:
        def __init__(self, label: str) -> None:
            self.label = label
            balance[label] = balance.get(label, 0) + 1

        async def aclose(self) -> None:
            await asyncio.sleep(0)
            balance[self.label] -= 1

    async def make(label: str) -> Counted:
        await asyncio.sleep(0)
        return Counted(label)

    async def work() -> None:
        args: Any = (make, "factory") if managed_factory else ()
        async with managed_session(*args):
            session = current_session()
            assert isinstance(session, AsyncSession)
            await session.open(make, "1")
            await session.enter(manager("2"))
            await session.acquire(CountedPool())
            await session.enter(manager("3"))
            await asyncio.sleep(0)

    class CountedPool:
        def acquire(self, timeout: Any = None) -> Any:
            return manager("lease")

    step = 0
    finished = False
    while not finished:
        balance: dict[str, int] = {}
        task = asyncio.create_task(work())
        for _ in range(step):
            await asyncio.sleep(0)
        finished = task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: len(asyncio.all_tasks()) == 1)

        assert set(balance.values()) <= {0}, f"cancelled after {step} steps: {balance}"
        assert finished or task.cancelled()
        step += 1
        assert step < 500

    assert step > 10
    assert 4 + managed_factory == len(balance)


async def test_after_a_cancelled_session_there_is_no_current_one() -> None:
    async def work() -> None:
        try:
            async with managed_session():
                await asyncio.Event().wait()
        finally:
            with pytest.raises(LookupError):
                current_session()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_sees_the_session_it_was_created_in() -> None:
    """Until that is closed; then the one around it."""
    gate = asyncio.Event()
    found: list[Any] = []

    async def look() -> None:
        found.append(current_session())
        await gate.wait()
        found.append(current_session())

    async with managed_session() as outer:
        async with managed_session() as inner:
            task = asyncio.create_task(look())
            await asyncio.sleep(0)
        gate.set()
        await task

    assert [inner, outer] == found


async def test_a_session_is_a_block_by_itself(log: list[str]) -> None:
    async with AsyncSession(name="own") as session:
        session.callback(log.append, "released")
        assert session is current_session()
        with pytest.raises(RuntimeError, match="session 'own' is entered already"):
            await session.__aenter__()

    assert ["released"] == log


async def test_the_error_of_the_block_may_come_back_out_of_a_release() -> None:
    """That is no second failure."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with managed_session() as session:
            session.callback(fail, error)
            raise error

    assert error is caught.value
    assert not hasattr(error, "__notes__")


async def test_a_block_that_was_cancelled_may_be_cancelled_again(log: list[str]) -> None:
    """While it releases. Its first cancellation goes on."""
    begun, gate = asyncio.Event(), asyncio.Event()

    async def flush() -> None:
        begun.set()
        await gate.wait()
        log.append("flushed")

    async def work() -> None:
        async with managed_session() as session:
            session.callback(flush)
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel("first")
    await begun.wait()
    task.cancel("second")
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError, match="first"):
        await task

    assert ["flushed"] == log


async def test_resources_of_real_pools_go_back() -> None:
    pool = RealAsyncPool(list, max_size=1)
    async with managed_session() as session:
        first = await session.acquire(pool, timeout=1)
        assert 1 == pool.stats().in_use
    assert (0, 1) == (pool.stats().in_use, pool.stats().idle)
    async with managed_session(timeout=5) as session:
        assert first is await session.acquire(pool)
    with pytest.raises(TypeError, match="wanted a Pool; found AsyncPool"), managed_session() as plain:
        plain.acquire(pool)  # type: ignore[arg-type]
    await pool.aclose()

    blocking = RealPool(list, max_size=1)
    with managed_session() as plain:
        plain.acquire(blocking)
        assert 1 == blocking.stats().in_use
    assert 0 == blocking.stats().in_use
    async with managed_session() as session:
        with pytest.raises(TypeError, match="wanted an AsyncPool; found Pool"):
            await session.acquire(blocking)  # type: ignore[arg-type]
    blocking.close()


@pytest.mark.parametrize("kind", ["plain", "async", "manager", "failing callback", "failing manager"])
async def test_a_session_and_what_it_held_are_free_at_once(kind: str) -> None:
    """No cycle keeps them until the garbage collector comes round."""

    class Thing:
        def close(self) -> None: ...

    @contextlib.asynccontextmanager
    async def failing() -> Any:
        yield
        raise OSError("disk is full")

    async def fail_later() -> None:
        await asyncio.sleep(0)
        raise OSError("disk is full")

    async def use() -> list[Any]:
        if kind == "plain":
            with managed_session() as plain:
                return [weakref.ref(plain.open(Thing)), weakref.ref(plain)]
        try:
            async with managed_session() as session:
                held.extend([weakref.ref(await session.open(Thing)), weakref.ref(session)])
                if kind == "manager":
                    await session.enter(contextlib.nullcontext())
                if kind == "failing callback":
                    session.callback(fail_later)
                if kind == "failing manager":
                    await session.enter(failing())
        except ExceptionGroup:
            assert kind.startswith("failing")
        return held

    held: list[Any] = []
    gc.disable()
    try:
        held = await use()
        await asyncio.sleep(0)

        assert [None, None] == [reference() for reference in held]
    finally:
        gc.enable()
