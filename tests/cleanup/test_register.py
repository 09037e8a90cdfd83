"""Registering: the handle, bad input, intervals, and what runs when memory is short."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hygiene import cleanup
from hygiene.cleanup import Cleanup, ashutdown, register_cleanup, relieve, shutdown
from hygiene.janitor import Janitor

PATIENCE = 20.0


@pytest.fixture
def janitor(monkeypatch: pytest.MonkeyPatch) -> Janitor:
    """A janitor of this test's own, so that it can be asked whether it has gone."""
    janitor = Janitor()
    monkeypatch.setattr(cleanup, "janitor", janitor)
    return janitor


async def until(true: Callable[[], object]) -> None:
    """Wait until it is, with the loop going on."""
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - what is waited for happens in threads that know nothing of this loop
            await asyncio.sleep(0.001)


def gone(janitor: Janitor) -> bool:
    """Whether its thread goes by itself."""
    thread = janitor._thread
    if thread is not None:
        thread.join(PATIENCE)
    return not janitor.running


# The handle


def test_a_decorated_function_can_be_called_as_before() -> None:
    """It has its name, its signature and its documentation, too."""

    @register_cleanup
    def bare(number: int = 1) -> int:
        """Bare."""
        return number + 1

    @register_cleanup(on="pressure", priority=3, name="caches")
    def furnished() -> str:
        return "furnished"

    assert (3, 2, "furnished") == (bare(2), bare(), furnished())
    assert ("bare", "Bare.") == (bare.__name__, bare.__doc__)  # type: ignore[attr-defined]  # as functools.wraps
    assert ["number"] == list(inspect.signature(bare).parameters)
    assert "caches" == furnished.name


async def test_a_decorated_coroutine_function_can_be_awaited() -> None:
    @register_cleanup
    async def close() -> int:
        return 3

    assert 3 == await close()
    assert (await ashutdown()).ok


def test_arguments_are_given_at_the_call() -> None:
    got: list[Any] = []

    def take(*args: int, **kw: int) -> None:
        got.append((args, kw))

    handle = register_cleanup(take, 1, 2, a=3, priority=5)
    handle(4, b=5)
    shutdown()

    assert [((1, 2, 4), {"a": 3, "b": 5}), ((1, 2), {"a": 3})] == got


def test_the_handle_says_what_it_is() -> None:
    class Saver:
        def __call__(self) -> None: ...

    def flush() -> None: ...

    name = "test_the_handle_says_what_it_is.<locals>."
    assert f"<Cleanup '{name}flush' on exit, priority 0>" == repr(register_cleanup(flush))
    assert f"<Cleanup '{name}Saver' on exit, priority 0>" == repr(register_cleanup(Saver()))
    assert f"<Cleanup '{name}flush' on exit, priority 0>" == repr(register_cleanup(functools.partial(flush)))
    assert "<Cleanup 'print' on pressure, priority -1>" == repr(register_cleanup(print, on="pressure", priority=-1))
    handle = register_cleanup(flush, every="2m", name="flush")
    assert "<Cleanup 'flush' every 120 s, priority 0>" == repr(handle)
    handle.cancel()
    assert "<Cleanup 'flush' every 120 s, priority 0, gone>" == repr(handle)


def wrong() -> None: ...


class Bot:
    def close(self) -> None: ...


async def awrong() -> None: ...


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((3,), {}, TypeError, "a cleanup is a callable; found 3"),
        ((None, 1), {}, TypeError, "no function to give them to"),
        ((wrong,), {"on": "Exit"}, ValueError, 'on must be "exit", "pressure" or "interval"; found \'Exit\''),
        ((wrong,), {"on": "interval"}, ValueError, "needs every="),
        ((wrong,), {"on": "pressure", "every": 3}, ValueError, "leave one out"),
        ((wrong,), {"every": 0}, ValueError, "every must be positive"),
        ((wrong,), {"every": "often"}, ValueError, "every must be positive"),
        ((wrong,), {"timeout": -1}, ValueError, "timeout must be positive"),
        ((wrong,), {"timeout": object()}, TypeError, "timeout must be positive"),
        ((wrong,), {"priority": "high"}, TypeError, "priority must be a whole number"),
        ((wrong, 1), {}, TypeError, "'wrong' cannot be called with the arguments given here: too many positional"),
        ((wrong,), {"colour": 1}, TypeError, "unexpected keyword argument 'colour'"),
        ((Bot.close,), {}, TypeError, "'Bot.close' cannot be called .* missing a required argument: 'self'"),
        ((awrong,), {"on": "pressure"}, RuntimeError, "'awrong' needs an event loop to run on pressure"),
        ((awrong,), {"every": 3}, RuntimeError, "Register it in a coroutine"),
    ],
)
def test_a_mistake_is_told_at_once(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    """And nothing is registered then: at the exit nobody is there to mend it."""
    with pytest.raises(error, match=message):
        register_cleanup(*arguments, **keywords)

    assert not cleanup._exit
    assert not cleanup._pressure
    assert not cleanup._intervals


def test_a_decorator_with_a_mistake_fails_before_it_decorates() -> None:
    with pytest.raises(ValueError, match="on must be"):
        register_cleanup(on="never")  # type: ignore[call-overload]  # the mistake


@pytest.mark.slow
def test_a_handle_may_be_made_and_cancelled_while_others_run() -> None:
    """From many threads at once, without a lock: nothing is lost and nothing runs twice."""
    ran: list[int] = []
    start = threading.Barrier(5)

    def register(first: int) -> None:
        start.wait(PATIENCE)
        for number in range(first, first + 200):
            handle = register_cleanup(ran.append, number)
            if number % 2:
                handle.cancel()

    def end() -> None:
        start.wait(PATIENCE)
        for _ in range(10):
            shutdown()

    threads = [threading.Thread(target=register, args=(1000 * n,)) for n in range(4)] + [threading.Thread(target=end)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    shutdown()
    even = [number for number in ran if not number % 2]

    assert 400 == len(even) == len(set(even))
    assert len(ran) == len(set(ran))


# Intervals


def test_an_interval_runs_again_and_again_until_it_is_cancelled(janitor: Janitor) -> None:
    """Nobody has to hold the handle; and when the last is cancelled, the thread goes."""
    ran = threading.Semaphore(0)

    @register_cleanup(every=0.001)
    def sweep() -> None:
        ran.release()

    serial = sweep._serial
    del sweep
    for _ in range(3):
        assert ran.acquire(timeout=PATIENCE)
    handle = cleanup._intervals[serial]._cleanup

    assert handle.cancel()
    assert gone(janitor)
    assert 3 <= handle.runs
    assert 0 == handle.errors


def test_a_cancelled_interval_does_not_wait_for_its_next_turn(janitor: Janitor) -> None:
    """The janitor goes at once, although somebody still holds the handle."""
    handle = register_cleanup(print, every=3600)
    assert janitor.running
    handle.cancel()

    assert gone(janitor)


def test_an_interval_that_raises_goes_on(janitor: Janitor, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is counted, and logged under its name."""
    ran = threading.Semaphore(0)

    def fail() -> None:
        ran.release()
        raise ArithmeticError("no broom")

    with caplog.at_level(logging.ERROR, logger="hygiene"):
        handle = register_cleanup(fail, on="interval", every="1ms", name="sweep")
        for _ in range(3):
            assert ran.acquire(timeout=PATIENCE)
        handle.cancel()
        assert gone(janitor)

    assert handle.errors >= 2
    assert "cleanup 'sweep' failed" in caplog.text
    assert "no broom" in caplog.text


def test_an_interval_never_runs_twice_at_once(janitor: Janitor, caplog: pytest.LogCaptureFixture) -> None:
    """Its turn is skipped and that is said once; and whoever hangs holds up no other."""
    go, inside = threading.Event(), threading.Event()
    others = threading.Semaphore(0)

    def hang() -> None:
        inside.set()
        go.wait(PATIENCE)

    with caplog.at_level(logging.WARNING, logger="hygiene"):
        handle = register_cleanup(hang, every=0.001, name="sweep")
        assert inside.wait(PATIENCE)
        other = register_cleanup(others.release, every=0.001)
        for _ in range(20):
            assert others.acquire(timeout=PATIENCE)
        runs = handle.runs
        handle.cancel()
        other.cancel()
        go.set()
        assert gone(janitor)

    assert 1 == runs
    assert 1 == caplog.text.count("cleanup 'sweep' still runs 0.001 s after it was started: its turn is skipped")


async def test_an_asynchronous_interval_runs_on_its_loop(janitor: Janitor) -> None:
    here = asyncio.get_running_loop()
    ran_on: list[asyncio.AbstractEventLoop] = []

    @register_cleanup(every=0.001)
    async def sweep() -> None:
        await asyncio.sleep(0)
        ran_on.append(asyncio.get_running_loop())

    await until(lambda: len(ran_on) > 2)
    sweep.cancel()

    assert {here} == set(ran_on)


async def test_an_asynchronous_interval_is_cancelled_at_its_timeout(janitor: Janitor) -> None:
    """And its next turn comes."""

    @register_cleanup(every=0.001, timeout=0.001)
    async def hang() -> None:
        await asyncio.Event().wait()

    await until(lambda: hang.errors > 1)
    hang.cancel()
    await until(lambda: hang._task is None)


async def test_a_plain_function_that_returns_an_awaitable_runs_too(janitor: Janitor) -> None:
    ran: list[int] = []

    async def sweep() -> None:
        ran.append(1)

    handle = register_cleanup(lambda: sweep(), every=0.001)  # noqa: PLW0108 - the lambda is the case
    await until(lambda: len(ran) > 1)
    handle.cancel()
    await until(lambda: handle._task is None and handle._free.acquire(blocking=False))


def test_an_interval_ends_with_its_loop(janitor: Janitor, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and the janitor has nothing left to do."""

    async def sweep() -> None: ...

    async def main() -> Cleanup[[], Any]:
        return register_cleanup(sweep, every=0.05, name="sweep")

    with caplog.at_level(logging.ERROR, logger="hygiene"):
        handle = asyncio.run(main())
        assert gone(janitor)

    assert not handle.active
    assert "the event loop that it was registered on is closed" in caplog.text


def test_an_awaitable_without_a_loop_is_an_error(janitor: Janitor) -> None:
    async def sweep() -> None: ...

    handle = register_cleanup(lambda: sweep(), every=0.001)  # noqa: PLW0108 - the lambda is the case

    assert gone(janitor)
    assert 1 == handle.errors


def test_an_interval_does_not_run_during_a_shutdown(janitor: Janitor) -> None:
    """What it works on is being closed right then."""
    visits: list[float | None] = []
    handle = register_cleanup(print, every=3600)
    register_cleanup(lambda: visits.append(cleanup._intervals[handle._serial]._visit()))
    shutdown()

    assert [3600] == visits
    assert 0 == handle.runs
    assert handle.active
    handle.cancel()
    assert gone(janitor)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_intervals_and_pressure_go_on_in_a_forked_child() -> None:
    """Even if a run was under way at that moment: its thread does not exist in the child."""
    code = """
        import os, sys, threading, warnings
        from hygiene.cleanup import register_cleanup, relieve
        warnings.simplefilter("ignore")
        inside, ran = threading.Event(), threading.Event()
        parent = os.getpid()
        @register_cleanup(every=0.01)
        def sweep():
            inside.set()
            if os.getpid() == parent:
                threading.Event().wait()
            ran.set()
        register_cleanup(print, "relieved", on="pressure", flush=True)
        inside.wait()
        child = os.fork()
        if not child:
            relieve()
            os._exit(0 if ran.wait(20) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=True
    )

    assert "relieved\n0\n" == done.stdout


# Pressure


def test_pressure_runs_all_of_them_each_time(caplog: pytest.LogCaptureFixture) -> None:
    """In order; one that raises is logged and counted, and stops no other."""
    ran: list[str] = []

    def fail() -> None:
        raise ArithmeticError("no broom")

    register_cleanup(ran.append, "last", on="pressure", priority=-1)
    register_cleanup(ran.append, "second", on="pressure")
    failing = register_cleanup(fail, on="pressure", name="caches")
    register_cleanup(ran.append, "first", on="pressure", priority=1)
    with caplog.at_level(logging.ERROR, logger="hygiene"):
        assert 4 == relieve()
        assert 4 == relieve()

    assert ["first", "second", "last"] * 2 == ran
    assert (2, 2) == (failing.runs, failing.errors)
    assert "cleanup 'caches' failed" in caplog.text
    shutdown()
    assert 6 == len(ran)


def test_one_that_hangs_is_not_started_again(caplog: pytest.LogCaptureFixture) -> None:
    """It is not waited for longer than its timeout, and left out as long as it hangs."""
    go = threading.Event()
    ran: list[int] = []
    register_cleanup(ran.append, 1, on="pressure")
    register_cleanup(go.wait, PATIENCE, on="pressure", timeout=0.01, name="caches")
    with caplog.at_level(logging.WARNING, logger="hygiene"):
        assert 2 == relieve()
        assert 1 == relieve()
    go.set()

    assert [1, 1] == ran
    assert "cleanup 'caches' still runs after 0.01 s: it is not waited for" in caplog.text


async def test_asynchronous_ones_are_started_on_their_loop() -> None:
    """Also if this is where the pressure is noticed: it is not blocked."""
    ran: list[int] = []

    @register_cleanup(on="pressure")
    async def drop() -> None:
        await asyncio.sleep(0)
        ran.append(1)

    assert 1 == relieve()
    await until(lambda: ran)
    await until(lambda: drop._task is None)
    assert 1 == await asyncio.to_thread(relieve)
    await until(lambda: len(ran) == 2)
    assert 0 == drop.errors
