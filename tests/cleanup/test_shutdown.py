"""The shutdown: everything, once, in order, within one deadline, and a report of what became of it."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from hygiene import Registry, cleanup
from hygiene.cleanup import ShutdownReport, ashutdown, close_at_shutdown, register_cleanup, shutdown
from hygiene.closing import Releases, Shield

PATIENCE = 20.0
Ending = Callable[..., Awaitable[ShutdownReport]]


async def end(timeout: Any = PATIENCE) -> ShutdownReport:
    """`shutdown()` in a thread, so that a test of both can wait for it."""
    return await asyncio.to_thread(shutdown, timeout)


@pytest.fixture(params=[end, ashutdown], ids=["shutdown", "ashutdown"])
def ending(request: pytest.FixtureRequest) -> Ending:
    """Either way to shut down."""
    found: Ending = request.param
    return found


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs, hangs on this. It is opened at the end, so that no thread is left."""
    gate = threading.Event()
    yield gate
    gate.set()


async def test_the_last_registered_runs_first(ending: Ending) -> None:
    """What was made last may use what was made before it."""
    ran: list[int] = []
    for number in range(5):
        register_cleanup(ran.append, number)
    report = await ending()

    assert [4, 3, 2, 1, 0] == ran
    assert report.ok
    assert 5 == len(report.finished)


async def test_a_higher_priority_runs_earlier(ending: Ending) -> None:
    ran: list[str] = []
    register_cleanup(ran.append, "first", priority=10)
    register_cleanup(ran.append, "last", priority=-1)
    register_cleanup(ran.append, "third")
    register_cleanup(ran.append, "second")
    await ending()

    assert ["first", "second", "third", "last"] == ran


async def test_sync_and_async_cleanups_keep_one_order() -> None:
    ran: list[str] = []

    async def later(what: str) -> None:
        await asyncio.sleep(0)
        ran.append(what)

    register_cleanup(ran.append, "d")
    register_cleanup(later, "c")
    register_cleanup(ran.append, "b")
    register_cleanup(later, "a")

    assert (await ashutdown()).ok
    assert ["a", "b", "c", "d"] == ran


async def test_one_that_raises_keeps_no_other_from_running(ending: Ending, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is reported under its name, with a note, and logged."""
    ran: list[str] = []

    def fail() -> None:
        raise ArithmeticError("no broom")

    register_cleanup(ran.append, "first made", name="first made")
    register_cleanup(fail, name="broken")
    register_cleanup(ran.append, "last made", name="last made")
    with caplog.at_level(logging.ERROR, logger="hygiene"):
        report = await ending()

    assert ["last made", "first made"] == ran
    assert ("last made", "first made") == report.finished
    assert ["broken"] == list(report.failed)
    assert not report.ok
    note = "while running cleanup 'broken', in a thread of its own (not in the one that registered it)"
    assert [note] == report.failed["broken"].__notes__
    assert "cleanup 'broken' failed" in caplog.text
    assert "no broom" in caplog.text


async def test_one_that_wants_to_end_the_program_does_not(ending: Ending) -> None:
    """A cleanup that calls ``sys.exit`` has failed; the others run."""
    ran: list[int] = []

    async def leave() -> None:
        sys.exit(3)

    register_cleanup(ran.append, 1)
    register_cleanup(sys.exit, 3, name="sync")
    if ending is ashutdown:
        register_cleanup(leave, name="async")
    report = await ending()

    assert [1] == ran
    assert all(isinstance(error, SystemExit) for error in report.failed.values())
    assert report.failed


async def test_ten_releases_three_fail_one_hangs(ending: Ending, gate: threading.Event) -> None:
    """Six are done, three reported, and the one that hangs is named, within the deadline."""
    ran: list[int] = []

    def release(number: int) -> None:
        if number in {1, 4, 8}:
            raise ValueError(number)
        if number == 6:
            gate.wait(PATIENCE)
        ran.append(number)

    for number in range(10):
        register_cleanup(release, number, name=f"release {number}")
    report = await ending(4)  # a quarter is left for those that come after the one that hangs

    assert [9, 7, 5, 3, 2, 0] == ran
    assert {"release 1", "release 4", "release 8"} == set(report.failed)
    assert {"release 6": "still running at the deadline, after 4 s"} == report.unfinished
    assert report.elapsed >= 4


async def test_ten_asynchronous_releases_three_fail_one_hangs() -> None:
    """The one that hangs is cancelled at the deadline."""
    ran: list[int] = []
    cancelled: list[int] = []

    async def release(number: int) -> None:
        if number in {1, 4, 8}:
            raise ValueError(number)
        if number == 6:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(number)
                raise
        ran.append(number)

    for number in range(10):
        register_cleanup(release, number, name=f"release {number}")
    report = await ashutdown(1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert [9, 7, 5, 3, 2, 0] == ran
    assert {"release 1", "release 4", "release 8"} == set(report.failed)
    assert ["release 6"] == list(report.unfinished)
    assert [6] == cancelled


async def test_each_may_have_a_timeout_of_its_own(ending: Ending, gate: threading.Event) -> None:
    """Then it is that one, and not the share of the whole, that ends the wait."""

    async def hang() -> None:
        await asyncio.Event().wait()

    register_cleanup(gate.wait, PATIENCE, timeout=0.02, name="sync")
    if ending is ashutdown:
        register_cleanup(hang, timeout="20ms", name="async")
    report = await ending(None)

    assert set(report.unfinished.values()) == {"timed out after 0.02 s"}
    assert "sync" in report.unfinished
    assert (ending is ashutdown) == ("async" in report.unfinished)


async def test_one_that_is_late_but_ends_is_reported_as_finished(ending: Ending, gate: threading.Event) -> None:
    """When it has used up its share, the others go on; it is waited for again at the end."""
    register_cleanup(gate.set, name="opens the gate")
    register_cleanup(gate.wait, PATIENCE, name="waits at the gate")
    report = await ending(2)

    assert report.ok
    assert ("opens the gate", "waits at the gate") == report.finished


async def test_what_the_deadline_left_no_time_for_runs_in_the_next_shutdown(
    ending: Ending, gate: threading.Event
) -> None:
    """It is reported, and stays registered: nothing is lost to a hang."""
    ran: list[str] = []
    register_cleanup(ran.append, "db", name="db")
    for number in range(40):  # each leaves a quarter of the time, so nothing is left before they are through
        register_cleanup(gate.wait, PATIENCE, name=f"hang {number}")
    report = await ending(0.05)

    assert [] == ran
    assert "not started: the deadline was over" in report.unfinished["db"]
    gate.set()
    assert (await ending()).ok
    assert ["db"] == ran


async def test_nothing_is_left_for_a_second_shutdown(ending: Ending) -> None:
    ran: list[int] = []
    handle = register_cleanup(ran.append, 1)
    assert handle.active
    await ending()
    report = await ending()

    assert [1] == ran
    assert (True, (), {}, {}) == (report.ok, report.finished, report.failed, report.unfinished)
    assert not handle.active


async def test_two_that_shut_down_at_once_get_one_report(ending: Ending, gate: threading.Event) -> None:
    """The second waits for the first; each cleanup runs once."""
    ran: list[int] = []
    inside = threading.Event()

    def slow() -> None:
        inside.set()
        gate.wait(PATIENCE)
        ran.append(1)

    register_cleanup(slow)
    first = asyncio.ensure_future(ending())
    assert await asyncio.to_thread(inside.wait, PATIENCE)
    second = asyncio.ensure_future(ending())
    third = asyncio.ensure_future(ashutdown())
    impatient = await ending(0.01)
    gate.set()
    reports = await asyncio.gather(first, second, third)

    assert [1] == ran
    assert reports[0] is reports[1] is reports[2]
    assert ["still running"] == list(impatient.unfinished.values())


async def test_a_shutdown_within_a_cleanup_does_not_wait_for_itself(ending: Ending) -> None:
    """As when a framework's stop is registered, and itself shuts down."""
    inner: list[ShutdownReport] = []

    async def again() -> None:
        inner.append(await ashutdown())

    register_cleanup(lambda: inner.append(shutdown()), name="sync")
    if ending is ashutdown:
        register_cleanup(again, name="async")
    report = await ending()

    assert report.ok
    assert {()} == {one.finished for one in inner}


async def test_what_a_cleanup_registers_runs_too(ending: Ending) -> None:
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        register_cleanup(ran.append, "meanwhile")

    register_cleanup(ran.append, "last")
    register_cleanup(first)
    await ending()

    assert ["first", "meanwhile", "last"] == ran


async def test_a_cancelled_cleanup_does_not_run(ending: Ending) -> None:
    ran: list[int] = []
    other = register_cleanup(ran.append, 1)
    handle = register_cleanup(lambda: ran.append(int(other.cancel()) + 1))
    gone = register_cleanup(ran.append, 3)

    assert gone.cancel()
    assert not gone.cancel()
    await ending()
    assert [2] == ran
    assert not handle.cancel()


async def test_two_of_one_name_are_told_apart(ending: Ending) -> None:
    register_cleanup(lambda: None, name="flush")
    register_cleanup(lambda: None, name="flush")

    assert ("flush", "flush (2)") == (await ending()).finished


async def test_a_plain_function_that_returns_an_awaitable_is_awaited(
    loop_elsewhere: asyncio.AbstractEventLoop,
) -> None:
    """``lambda: client.aclose()`` is as good as ``client.aclose``, where there is a loop."""
    ran: list[str] = []

    async def close(what: str) -> None:
        await asyncio.sleep(0)
        ran.append(what)

    async def register() -> None:
        register_cleanup(lambda: close("elsewhere"))

    register_cleanup(lambda: close("here"))
    await ashutdown()
    asyncio.run_coroutine_threadsafe(register(), loop_elsewhere).result(PATIENCE)
    await end()

    assert ["here", "elsewhere"] == ran


def test_where_no_loop_runs_it_says_what_to_do() -> None:
    """Nothing is lost: `ashutdown` can still run it."""
    ran: list[int] = []

    async def close() -> None:
        ran.append(1)

    register_cleanup(close, name="client")
    register_cleanup(lambda: close(), name="lambda")  # noqa: PLW0108 - the lambda is the case
    report = shutdown()

    assert dict.fromkeys(["lambda", "client"], "needs an event loop: await ashutdown()") == report.unfinished
    assert ("client",) == asyncio.run(ashutdown()).finished
    assert [1] == ran


async def test_an_asynchronous_cleanup_runs_on_its_own_loop(
    ending: Ending, loop_elsewhere: asyncio.AbstractEventLoop
) -> None:
    """Where it was registered, also when the shutdown is called in another thread or on another loop."""
    ran_on: list[asyncio.AbstractEventLoop] = []

    async def close() -> None:
        ran_on.append(asyncio.get_running_loop())

    async def register() -> None:
        register_cleanup(close)

    asyncio.run_coroutine_threadsafe(register(), loop_elsewhere).result(PATIENCE)
    report = await ending()

    assert report.ok
    assert [loop_elsewhere] == ran_on


async def test_a_loop_that_stops_meanwhile_is_not_waited_for(ending: Ending) -> None:
    """Even without a deadline: a task on a loop that has stopped never ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def close() -> None:
        loop.stop()
        await asyncio.Event().wait()

    async def register() -> None:
        register_cleanup(close, name="client")

    asyncio.run_coroutine_threadsafe(register(), loop).result(PATIENCE)
    report = await ending(None)
    thread.join(PATIENCE)
    for task in asyncio.all_tasks(loop):
        task.cancel()
    await asyncio.to_thread(loop.run_until_complete, asyncio.sleep(0))
    loop.close()

    assert {"client": "its event loop stopped before it was done"} == report.unfinished


async def test_shutdown_refuses_to_block_the_loop_that_it_needs() -> None:
    """Before anything has run."""
    ran: list[int] = []

    async def close() -> None: ...

    register_cleanup(close, name="client")
    register_cleanup(ran.append, 1)
    with pytest.raises(RuntimeError, match=r"cleanup 'client' runs on the event loop .* use `await ashutdown\(\)`"):
        shutdown()

    assert [] == ran
    assert (await ashutdown()).ok


async def test_shutdown_on_a_loop_is_fine_if_nothing_needs_the_loop() -> None:
    ran: list[int] = []
    register_cleanup(ran.append, 1)

    assert shutdown().ok
    assert [1] == ran


async def test_the_loop_goes_on_while_a_synchronous_cleanup_hangs(gate: threading.Event) -> None:
    register_cleanup(gate.wait, PATIENCE)
    task = asyncio.ensure_future(ashutdown())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    gate.set()

    assert (await task).ok


async def test_a_cancelled_shutdown_is_finished_first() -> None:
    """The cancellation is not swallowed: it arrives when everything has run. A second one changes nothing."""
    ran: list[str] = []
    go = asyncio.Event()
    inside = asyncio.Event()

    async def slow() -> None:
        inside.set()
        await go.wait()
        ran.append("slow")

    register_cleanup(ran.append, "last")
    register_cleanup(slow)
    task = asyncio.ensure_future(ashutdown())
    await inside.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    go.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert ["slow", "last"] == ran


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancellation_at_any_step_loses_nothing(steps: int) -> None:
    """Before the first step nothing has begun; from then on everything runs. Each runs once."""
    ran: list[int] = []

    async def close(number: int) -> None:
        await asyncio.sleep(0)
        ran.append(number)

    for number in range(3):
        register_cleanup(close, number)
    task = asyncio.ensure_future(ashutdown())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await ashutdown()

    assert [2, 1, 0] == ran


async def test_a_cancelled_shutdown_ends_when_its_grace_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be started stays registered."""
    ran: list[str] = []
    inside = asyncio.Event()

    async def hang() -> None:
        inside.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(cleanup, "Shield", lambda: Shield(0.01))
    register_cleanup(ran.append, "db", name="db")
    register_cleanup(hang, name="hang")
    task = asyncio.ensure_future(ashutdown())
    await inside.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert [] == ran
    assert ("db",) == (await ashutdown()).finished


def test_ctrl_c_while_it_waits_leaves_the_rest_registered(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """The interrupt goes to the caller; what has not been started can still be run."""
    ran: list[str] = []
    waits = 0
    wait = cleanup.futures.wait

    def interrupted(*args: Any) -> Any:
        nonlocal waits
        waits += 1
        if waits == 1:
            raise KeyboardInterrupt
        return wait(*args)

    monkeypatch.setattr(cleanup.futures, "wait", interrupted)
    register_cleanup(ran.append, "db", name="db")
    register_cleanup(gate.wait, PATIENCE, name="hang")

    with pytest.raises(KeyboardInterrupt):
        shutdown()
    gate.set()
    assert ("db",) == shutdown().finished
    assert ["db"] == ran


def test_the_report_is_written_for_a_person() -> None:
    report = ShutdownReport(("a", "b"), {"flush": OSError("disk full")}, {"bot": "timed out after 2 s"}, 2.5)

    assert (
        "shutdown: 2 finished, 1 failed, 1 unfinished in 2.50 s\n"
        "  failed: flush: OSError: disk full\n"
        "  unfinished: bot: timed out after 2 s"
    ) == str(report)


def test_what_did_not_go_well_is_logged(caplog: pytest.LogCaptureFixture, gate: threading.Event) -> None:
    register_cleanup(gate.wait, PATIENCE, timeout=0.01, name="stuck")
    with caplog.at_level(logging.WARNING, logger="hygiene"):
        report = shutdown()

    assert str(report) in caplog.text
    assert "unfinished: stuck: timed out after 0.01 s" in caplog.text


def test_what_is_bound_to_its_thread_says_so() -> None:
    """SQLite refuses another thread; the note says which thread it was."""
    connection = sqlite3.connect(":memory:")
    register_cleanup(connection.close, name="database")
    error = shutdown().failed["database"]
    connection.close()

    assert isinstance(error, sqlite3.ProgrammingError)
    assert "in a thread of its own" in error.__notes__[0]


class Owner:
    """Something with a lifetime, as a pool has it."""

    def __init__(self, log: list[str], home: asyncio.AbstractEventLoop | None = None) -> None:
        self.log = log
        self._home = home


class Sync(Owner):
    def close(self) -> None:
        self.log.append("close")


class Async(Owner):
    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.log.append("aclose" if self._home in {None, asyncio.get_running_loop()} else "wrong loop")


class Both(Sync, Async):
    pass


async def test_owners_are_closed_in_their_turn(ending: Ending) -> None:
    log: list[str] = []
    owner = Sync(log)
    register_cleanup(log.append, "last")
    close_at_shutdown(owner, "pool 'db'")
    register_cleanup(log.append, "first")
    report = await ending()

    assert ["first", "close", "last"] == log
    assert "pool 'db'" in report.finished


async def test_an_owner_is_closed_the_way_that_fits(loop_elsewhere: asyncio.AbstractEventLoop) -> None:
    """``aclose`` on its own loop, or where the shutdown is awaited; ``close`` where there is no loop."""
    log: list[str] = []
    owners: list[Owner] = [Async(log, loop_elsewhere), Both(log, loop_elsewhere)]
    for owner in owners:
        close_at_shutdown(owner, "elsewhere")
    await end()
    both = Both(log)
    close_at_shutdown(both, "from a thread")
    await end()
    owners = [Async(log), Both(log), Async(log, loop_elsewhere), Async(log, asyncio.get_running_loop())]
    for owner in owners:
        close_at_shutdown(owner, "awaited")
    await ashutdown()

    assert ["aclose", "aclose", "close", "aclose", "aclose", "aclose", "aclose"] == log


async def test_an_owner_of_this_loop_cannot_be_closed_by_blocking_it() -> None:
    owner = Async([], asyncio.get_running_loop())
    close_at_shutdown(owner, "pool")
    with pytest.raises(RuntimeError, match="'pool' runs on the event loop"):
        shutdown()

    await ashutdown()
    assert ["aclose"] == owner.log


async def test_an_owner_that_is_closed_already_is_left_out(ending: Ending) -> None:
    """At the exit nothing is said about a pool that was closed by its block."""
    log: list[str] = []
    owner = Async(log, asyncio.new_event_loop())
    assert owner._home is not None
    owner._home.close()
    owner.closed = True  # type: ignore[attr-defined]  # as pools have it
    close_at_shutdown(owner, "pool")
    report = await ending()

    assert [] == log
    assert ((), {}) == (report.finished, report.unfinished)


def test_an_owner_that_never_had_a_loop_is_not_complained_about() -> None:
    """An asynchronous pool that was made and not used has nothing open. It is still closed by an `ashutdown`."""
    log: list[str] = []
    owner = Async(log)
    close_at_shutdown(owner, "pool")

    assert shutdown().ok
    assert ("pool",) == asyncio.run(ashutdown()).finished
    assert ["aclose"] == log


async def test_what_an_owner_opens_after_a_shutdown_is_closed_by_the_next(ending: Ending) -> None:
    """As in a test suite, or a server that is started twice in one process."""
    closed: list[int] = []
    registry: Registry[str, int] = Registry(close=closed.append)
    registry["a"] = 1
    await ending()
    registry["b"] = 2
    await ending()

    assert [1, 2] == closed


def test_an_owner_is_not_kept_alive() -> None:
    """And one that is gone has nothing to close."""
    log: list[str] = []
    owner = Sync(log)
    other = Sync(log)
    close_at_shutdown(owner, "gone")
    handle = close_at_shutdown(other, "cancelled")
    assert handle.cancel()
    assert not handle.cancel()
    gc.disable()
    try:
        del owner
    finally:
        gc.enable()

    assert {} == cleanup._exit
    assert () == shutdown().finished


def releasing(*, fail: bool = False) -> Releases:
    """The asynchronous releases of a registry, say."""

    def failed(value: object, error: BaseException) -> None:
        assert fail, error

    return Releases(failed)


async def test_releases_that_are_under_way_are_waited_for(ending: Ending) -> None:
    """The asynchronous closers of a registry end before the shutdown does."""
    closed: list[int] = []

    async def close(value: int) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        closed.append(value)

    releases = releasing()
    releases.start(1, close, asyncio.get_running_loop())
    report = await ending()

    assert [1] == closed
    assert report.ok


async def test_releases_that_do_not_end_are_reported(ending: Ending) -> None:
    async def close(value: int) -> None:
        await asyncio.Event().wait()

    releases = releasing(fail=True)
    releases.start(1, close, asyncio.get_running_loop())
    report = await ending(0.05)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)

    assert ["1 asynchronous release(s)"] == list(report.unfinished)


def test_releases_without_a_loop_are_reported() -> None:
    closed: list[int] = []

    async def close(value: int) -> None:
        closed.append(value)

    releases = releasing()
    releases.start(1, close, None)
    report = shutdown()

    assert {"1 asynchronous release(s)": "needs an event loop: await ashutdown()"} == report.unfinished
    assert asyncio.run(ashutdown()).ok
    assert [1] == closed


async def test_a_registry_is_closed(ending: Ending) -> None:
    """With its asynchronous closers, on the loop that its values came from."""
    closed: list[int] = []
    here = asyncio.get_running_loop()

    async def close(value: int) -> None:
        await asyncio.sleep(0)
        assert asyncio.get_running_loop() is here
        closed.append(value)

    registry: Registry[str, int] = Registry(close=close)
    registry["a"] = 1
    registry["b"] = 2
    report = await ending()

    assert [1, 2] == sorted(closed)
    assert report.ok
    assert {} == registry


@pytest.mark.parametrize("timeout", [0, -1, "soon", True])
async def test_a_timeout_must_be_a_time(ending: Ending, timeout: Any) -> None:
    ran: list[int] = []
    handle = register_cleanup(ran.append, 1)
    with pytest.raises((ValueError, TypeError), match="timeout must be positive"):
        await ending(timeout)

    assert handle.active


def script(code: str, *, ok: bool = True) -> str:
    """What a program prints."""
    code = "from hygiene.cleanup import *\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=ok)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_exit_is_the_backstop() -> None:
    """Nobody has to call `shutdown`; and what it has run is not run again."""
    assert "b\na\n" == script("""
        register_cleanup(print, "a")
        register_cleanup(print, "b")
    """)
    assert "b\na\nend\n" == script("""
        register_cleanup(print, "a")
        register_cleanup(print, "b")
        shutdown()
        print("end")
    """)


@pytest.mark.slow
def test_the_exit_says_what_it_could_not_do() -> None:
    """Also in a program that has not set up logging."""
    out = script("""
        async def close(): ...
        def fail(): 1 / 0
        register_cleanup(close, name="client")
        register_cleanup(fail, name="broken")
    """)

    assert "unfinished: client: needs an event loop: await ashutdown()" in out
    assert "ZeroDivisionError" in out


@pytest.mark.slow
def test_nothing_starts_at_import() -> None:
    """No thread, no handler, nothing for the exit."""
    assert "1 0 True\n" == script(
        """
        import atexit, signal, threading
        print(threading.active_count(), atexit._ncallbacks() - before, signal.getsignal(15) is signal.SIG_DFL)
    """.replace("import atexit", "import atexit; import logging; before = atexit._ncallbacks(); import atexit")
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_none_of_the_cleanups_of_its_parent(tmp_path: Any) -> None:
    """A temporary folder is not deleted twice, nor a connection of the parent closed; the child's own run."""
    out = script("""
        import os, sys, warnings
        warnings.simplefilter("ignore")
        class Pool:
            def close(self): print("pool closed by", "parent" if os.getpid() == parent else "child", flush=True)
        parent = os.getpid()
        pool = Pool()
        close_at_shutdown(pool, "pool")
        register_cleanup(print, "the parent's", flush=True)
        child = os.fork()
        if not child:
            register_cleanup(print, "the child's", flush=True)
            sys.exit()
        os.waitpid(child, 0)
    """)

    assert ["the child's", "the parent's", "pool closed by parent"] == out.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_by_a_cleanup_can_shut_down() -> None:
    """The shutdown of the parent is not the child's: it neither waits for it nor takes itself for a part of it."""
    out = script("""
        import os, warnings
        warnings.simplefilter("ignore")
        def fork():
            child = os.fork()
            if not child:
                register_cleanup(print, "child", flush=True)
                os._exit(0 if shutdown().finished == ("print",) else 1)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        register_cleanup(print, "parent")
        register_cleanup(fork)
        shutdown()
    """)

    assert ["child", "0", "parent"] == out.splitlines()


async def test_an_error_that_takes_no_notes_keeps_no_cleanup_from_running(ending: Ending) -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    ran: list[int] = []

    def fail() -> None:
        raise Frozen(3)

    register_cleanup(ran.append, 1)
    register_cleanup(fail)
    report = await ending()

    assert [1] == ran
    assert [Frozen(3)] == list(report.failed.values())
