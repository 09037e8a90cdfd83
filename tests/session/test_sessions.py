"""`managed_session` in plain code: everything opened is released, in reverse order, and nothing is masked."""
# ruff: noqa: PT012, PT031 - what a whole block raises is what a session is about

from __future__ import annotations

import contextlib
import contextvars
import gc
import logging
import sqlite3
import threading
import warnings
from typing import Any

import pytest

from hygiene.registry import Registry
from hygiene.session import AsyncSession, Session, current_session, managed_session


class Resource:
    """Writes down that it was closed."""

    def __init__(self, log: list[str], label: str) -> None:
        self.log = log
        self.label = label

    def close(self) -> None:
        self.log.append(self.label)


class Pool:
    """The least that a session wants of a pool."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    @contextlib.contextmanager
    def acquire(self, timeout: Any = None) -> Any:
        self.log.append(f"acquire {timeout}")
        try:
            yield "resource"
        finally:
            self.log.append(f"release in {threading.current_thread().name}")


class AsyncPool:
    @contextlib.asynccontextmanager
    async def acquire(self, timeout: Any = None) -> Any:
        yield "resource"


@pytest.fixture
def log() -> list[str]:
    return []


def fail(error: BaseException) -> None:
    raise error


async def later() -> None:
    """An asynchronous function."""


# What is released, and when.


def test_everything_is_released_in_reverse_order(log: list[str]) -> None:
    """Resources, managers and callbacks, last opened first."""

    @contextlib.contextmanager
    def manager(label: str) -> Any:
        yield label
        log.append(label)

    with managed_session() as session:
        first = session.open(Resource, log, "first")
        second = session.enter(manager("second"))
        added = session.callback(log.append, "third")
        session.open(Resource, log, label="fourth")

        assert ("first", "second") == (first.label, second)
        assert log.append == added
        assert [] == log

    assert ["fourth", "third", "second", "first"] == log
    assert session.closed


def test_with_a_factory_it_yields_the_resource(log: list[str]) -> None:
    with managed_session(Resource, log, label="db") as resource:
        assert "db" == resource.label
        assert 1 == len(current_session()._releases or ())

    assert ["db"] == log


def test_what_c_made_is_released_too() -> None:
    """A method of an extension type is no Python function."""
    with managed_session(sqlite3.connect, ":memory:") as connection:
        assert (1,) == connection.execute("select 1").fetchone()

    with pytest.raises(sqlite3.ProgrammingError):
        connection.execute("select 1")


def test_an_object_may_be_used_again_one_after_the_other(log: list[str]) -> None:
    """Each use is a session of its own."""
    managed = managed_session(Resource, log, "db")
    with managed:
        with pytest.raises(RuntimeError, match=r"entered already; .* needs a managed_session\(\) of its own"), managed:
            pass
        assert [] == log
    with managed:
        assert ["db"] == log

    assert ["db", "db"] == log


def test_sessions_nest(log: list[str]) -> None:
    with managed_session() as outer:
        outer.callback(log.append, "outer")
        with managed_session() as inner:
            inner.callback(log.append, "inner")

            assert inner is current_session()
        assert outer is current_session()

    assert ["inner", "outer"] == log


def test_a_closed_session_says_what_to_do(log: list[str]) -> None:
    session = Session(name="agents")
    session.callback(log.append, "released")
    session.close()
    session.close()

    assert ["released"] == log
    assert session.closed
    for use in (
        lambda: session.open(Resource, log, "db"),
        lambda: session.enter(contextlib.nullcontext()),
        lambda: session.callback(fail),
        lambda: session.acquire(Pool(log)),
        lambda: session.lease(Registry({"a": 1}), "a"),
        session.__enter__,
    ):
        with pytest.raises(RuntimeError, match=r"session 'agents' is closed; open another with managed_session\(\)"):
            use()
    assert ["released"] == log


def test_what_comes_when_the_session_was_closed_is_released_at_once(log: list[str]) -> None:
    """The factory took so long that another thread has closed the session."""

    def connect() -> Resource:
        current_session().close()  # type: ignore[union-attr]
        return Resource(log, "late")

    class Late:
        def __enter__(self) -> None:
            current_session().close()  # type: ignore[union-attr]

        def __exit__(self, *exc_info: object) -> None:
            log.append("late")

    with managed_session() as session, pytest.raises(RuntimeError, match="is closed"):
        session.open(connect)
    with managed_session() as session, pytest.raises(RuntimeError, match="is closed"):
        session.enter(Late())
    with pytest.raises(RuntimeError, match="is closed"), managed_session(connect):
        pass

    assert ["late", "late", "late"] == log


@pytest.mark.parametrize("error", [OSError("refused"), KeyboardInterrupt()])
def test_what_could_not_be_opened_is_not_released(log: list[str], error: BaseException) -> None:
    """What was opened before is, and the error is the caller's."""
    with pytest.raises(type(error)) as caught, managed_session() as session:
        session.open(Resource, log, "first")
        session.open(fail, error)

    assert error is caught.value
    assert ["first"] == log

    managed = managed_session(fail, error)
    with pytest.raises(type(error)), managed:
        pass
    with pytest.raises(LookupError):
        current_session()


@pytest.mark.parametrize(
    ("close", "released"),
    [("auto", ["close"]), ("hang_up", ["hang_up"]), (lambda value: value.log.append("callable"), ["callable"])],
)
def test_the_session_says_how_its_resources_are_released(close: Any, released: list[str], log: list[str]) -> None:
    class Line:
        def __init__(self) -> None:
            self.log = log

        def close(self) -> None:
            log.append("close")

        def hang_up(self) -> None:
            log.append("hang_up")

    with managed_session(close=close) as session:
        session.open(Line)
    with managed_session(Line, close=close):
        pass

    assert released * 2 == log


# Leases.


def test_a_leased_entry_stays_until_the_end() -> None:
    registry: Registry[str, int] = Registry(maxsize=1)
    with managed_session() as session:
        assert 1 == session.lease(registry, "a", lambda: 1)
        registry["b"] = 2

        assert 1 == registry.stats().leased
        assert "a" in registry
        with pytest.raises(KeyError):
            session.lease(registry, "none")

    assert 0 == registry.stats().leased


def test_a_resource_of_a_pool_goes_back(log: list[str]) -> None:
    """In the calling thread, also if releases have a timeout: a pool has its own."""
    with managed_session(timeout=5) as session:
        assert "resource" == session.acquire(Pool(log), timeout=3)
        session.acquire(Pool(log))

    here = threading.current_thread().name
    assert ["acquire 3", "acquire None", f"release in {here}", f"release in {here}"] == log


# Refused.


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: 3, r"found a int\. Call it yourself, and say with session\.callback\(\) what undoes it"),
        (lambda: None, r"found a NoneType"),
        (later, r"later is asynchronous; use `async with managed_session\(\)`"),
        (contextlib.contextmanager(lambda: iter(())), r"not entered yet\. Use session\.enter\(\) instead of open\(\)"),
        (type("Client", (), {"aclose": later}), r"Client is released asynchronously; use `async with"),
        (type("Client", (), {"close": later}), r"Client is released asynchronously; use `async with"),
    ],
)
def test_what_cannot_be_released_is_refused(factory: Any, message: str) -> None:
    """At once, and not when it is too late."""
    with managed_session() as session, pytest.raises(TypeError, match=message):
        session.open(factory)
    with pytest.raises(TypeError, match=message), managed_session(factory):
        pass


def test_a_close_by_name_has_to_exist() -> None:
    with managed_session(close="hang_up") as session, pytest.raises(TypeError, match=r"with hang_up\(\); found a Res"):
        session.open(Resource, [], "line")


def test_mistakes_are_told_at_once(log: list[str]) -> None:
    with managed_session() as session:
        for mistake, message in (
            (lambda: session.callback(later), "later is asynchronous and this is a Session; use `async with"),
            (lambda: session.callback(3), "wanted a function to call when the session is closed; found 3"),  # type: ignore[arg-type]
            (lambda: session.enter(3), "wanted a context manager; found a int. Use open"),  # type: ignore[arg-type]
            (lambda: session.enter(AsyncPool().acquire()), "acquire is an asynchronous context manager; use an async"),
            (lambda: session.acquire(AsyncPool()), "wanted a Pool; found AsyncPool, which is asynchronous"),
            (lambda: managed_session(3), "factory must be callable; found 3"),
            (lambda: managed_session(None, 3), "wanted a factory for the arguments"),  # type: ignore[call-overload]
            (lambda: managed_session(close=3), "close must be a callable"),  # type: ignore[call-overload]
            (lambda: managed_session(close=None), "close must be a callable"),  # type: ignore[call-overload]
            (lambda: managed_session(timeout=0), "timeout must be positive"),
            (lambda: Session(close=None), "close must be a callable"),  # type: ignore[arg-type]
            (lambda: managed_session()(3), r"found 3. Decorate with parentheses: @managed_session\(\)"),  # type: ignore[arg-type]
            (lambda: managed_session()(Resource), "wanted a function to decorate; found the class Resource"),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                mistake()
        with pytest.raises(RuntimeError, match="is entered already"):
            session.__enter__()
    managed = managed_session(name="x")
    with pytest.raises(RuntimeError, match=r"managed_session\(name='x'\) was not entered with `with`"):
        managed.__exit__(None, None, None)


# Failures.


def test_all_releases_run_and_all_failures_are_told(log: list[str]) -> None:
    """One group, also of one, with a note for each that says which release it was."""

    def flush() -> None:
        raise OSError("disk is full")

    class Connection:
        def close(self) -> None:
            raise ValueError("line is dead")

    with pytest.raises(ExceptionGroup) as caught, managed_session(name="job") as session:
        session.open(Resource, log, "first")
        session.callback(flush)
        session.open(Connection)
        session.open(Resource, log, "last")

    assert "2 of 4 releases of session 'job' failed" == caught.value.message
    assert ["line is dead", "disk is full"] == [str(error) for error in caught.value.exceptions]
    assert [
        ["while releasing Connection.close, opened as 3 of 4 in session 'job'"],
        [f"while releasing {flush.__qualname__}, opened as 2 of 4 in session 'job'"],
    ] == [error.__notes__ for error in caught.value.exceptions]
    assert ["last", "first"] == log


def test_the_error_of_the_block_is_never_masked(log: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """What fails meanwhile is noted on it, and logged."""
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, managed_session() as session:
        session.open(Resource, log, "first")
        session.callback(fail, OSError("disk is full"))
        raise error

    assert error is caught.value
    assert ["OSError: disk is full (while releasing fail, opened as 2 of 2 in session)"] == error.__notes__
    assert ["first"] == log
    assert [("hygiene", logging.ERROR)] == [(record.name, record.levelno) for record in caplog.records]


def test_an_error_that_takes_no_notes_holds_up_nothing(log: list[str]) -> None:
    """A frozen dataclass as an exception, say."""

    class Frozen(Exception):
        def add_note(self, text: str) -> None:
            raise AttributeError("frozen")

    with pytest.raises(ExceptionGroup), managed_session() as session:
        session.callback(log.append, "first")
        session.callback(fail, Frozen())

    assert ["first"] == log


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_goes_on_by_itself_when_the_rest_has_run(log: list[str], interrupt: BaseException) -> None:
    with pytest.raises(type(interrupt)) as caught, managed_session() as session:
        session.callback(log.append, "first")
        session.callback(fail, OSError("disk is full"))
        session.callback(fail, interrupt)

    assert interrupt is caught.value
    assert ["first"] == log
    assert "OSError: disk is full (while releasing fail, opened as 2 of 3 in session)" == interrupt.__notes__[-1]


def test_an_interrupt_between_two_releases_loses_none(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come at any line, also in the session's own code."""
    interrupt = KeyboardInterrupt()
    session = Session()
    session.callback(log.append, "first")
    session.callback(fail, OSError("disk is full"))
    monkeypatch.setattr("hygiene.session._described", lambda release: fail(interrupt))
    with pytest.raises(KeyboardInterrupt):
        session.close()

    assert ["first"] == log


def test_a_manager_sees_the_error_of_the_block_and_may_suppress_it(log: list[str]) -> None:
    """As in an ExitStack. What was opened before it is released as if nothing had happened."""
    seen: list[Any] = []

    class Witness:
        def __enter__(self) -> None: ...

        def __exit__(self, *exc_info: object) -> None:
            seen.append(exc_info[:2])

    error = KeyError("mine")
    with managed_session() as session:
        session.enter(Witness())
        session.enter(contextlib.suppress(KeyError))
        session.enter(Witness())
        raise error

    assert [(KeyError, error), (None, None)] == seen


def test_a_suppressed_error_hides_no_failure(log: list[str]) -> None:
    with pytest.raises(ExceptionGroup, match="1 of 2 releases"), managed_session() as session:
        session.enter(contextlib.suppress(KeyError))
        session.callback(fail, OSError("disk is full"))
        raise KeyError("mine")


def test_a_manager_that_passes_the_error_on_has_not_failed() -> None:
    """A generator raises the very error that was thrown into it; a task group wraps it."""

    @contextlib.contextmanager
    def wrapping() -> Any:
        try:
            yield
        except KeyError as error:
            raise ExceptionGroup("wrapped", [error]) from None

    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, managed_session() as session:
        session.enter(contextlib.nullcontext())
        session.enter(wrapping())
        raise error

    assert error is caught.value
    assert not hasattr(error, "__notes__")


def test_of_a_group_around_the_error_the_rest_is_a_failure() -> None:
    @contextlib.contextmanager
    def wrapping() -> Any:
        try:
            yield
        except KeyError as error:
            raise ExceptionGroup("wrapped", [error, OSError("child")]) from None

    error = KeyError("mine")
    with pytest.raises(KeyError), managed_session() as session:
        session.enter(wrapping())
        raise error

    (note,) = error.__notes__
    assert "mine" not in note
    assert note.startswith("ExceptionGroup: wrapped")


def test_a_release_that_turns_out_to_be_asynchronous_has_failed() -> None:
    """Python's own complaint, that it was never awaited, would come too late."""

    def flush() -> Any:
        return later()

    with pytest.raises(ExceptionGroup) as caught, managed_session() as session:
        session.callback(flush)

    (error,) = caught.value.exceptions
    assert "it is asynchronous and this is a Session" in str(error)


def test_nothing_is_taken_while_a_session_closes(log: list[str]) -> None:
    with pytest.raises(ExceptionGroup, match="1 of 1"), managed_session() as session:
        session.callback(lambda: session.callback(log.append, "never") and None)

    assert [] == log


# Timeouts.


def test_ten_releases_of_which_three_fail_and_one_hangs(log: list[str]) -> None:
    """Six done, three reported, one named as timed out."""
    hang = threading.Event()

    def hanging() -> None:
        hang.wait(60)

    with pytest.raises(ExceptionGroup) as caught, managed_session(timeout="500ms", name="ten") as session:
        for number in range(10):
            if number in {2, 5, 8}:
                session.callback(fail, OSError(str(number)))
            elif number == 6:
                session.callback(hanging)
            else:
                session.callback(log.append, str(number))
    hang.set()

    assert ["9", "7", "4", "3", "1", "0"] == log
    assert [OSError, TimeoutError, OSError, OSError] == [type(error) for error in caught.value.exceptions]
    assert "hanging" in str(caught.value.exceptions[1])
    assert ["7 of 10" in error.__notes__[0] for error in caught.value.exceptions] == [False, True, False, False]


def test_a_manager_that_hangs_is_timed_out_too() -> None:
    hang = threading.Event()

    @contextlib.contextmanager
    def hanging() -> Any:
        yield
        hang.wait(60)

    with pytest.raises(ExceptionGroup) as caught, managed_session(timeout=0.05) as session:
        session.enter(hanging())
    hang.set()

    assert [TimeoutError] == [type(error) for error in caught.value.exceptions]


def test_without_a_timeout_the_calling_thread_releases() -> None:
    """A SQLite connection refuses any other."""
    threads: list[threading.Thread] = []
    with managed_session() as session:
        session.callback(lambda: threads.append(threading.current_thread()))
    with managed_session(timeout=30) as session:
        session.callback(lambda: threads.append(threading.current_thread()))

    assert threading.current_thread() is threads[0]
    assert threading.current_thread() is not threads[1]


# By hand, and the current session.


def test_another_thread_may_close_it(log: list[str]) -> None:
    session = managed_session().__enter__()
    session.callback(log.append, "released")
    thread = threading.Thread(target=session.close)
    thread.start()
    thread.join(20)

    assert ["released"] == log
    with pytest.raises(LookupError):
        current_session()


@pytest.mark.slow
def test_a_session_that_is_dropped_says_so(log: list[str]) -> None:
    """And one that holds nothing, or was closed, does not."""
    session: Session | None = Session(name="forgotten")
    assert session is not None
    session.callback(log.append, "never")
    with pytest.warns(ResourceWarning, match=r"Session 'forgotten' was dropped with 1 to release"):
        del session
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Session()
        closed = Session()
        closed.callback(log.append, "released")
        closed.close()
        del closed
        gc.collect()

    assert ["released"] == log


def test_without_a_session_there_is_none() -> None:
    # A context of its own: one in which other tests ran may have had a session that ended elsewhere.
    with pytest.raises(LookupError, match=r"wanted the current session; found none\. Call this inside"):
        contextvars.Context().run(current_session)


def test_a_new_thread_has_no_session() -> None:
    found: list[Any] = []

    def look() -> None:
        try:
            found.append(current_session())
        except LookupError as error:
            found.append(type(error))

    with managed_session():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(20)

    assert [LookupError] == found


def test_sessions_that_overlap_end_in_any_order() -> None:
    """Entered by hand, and the outer one ends first."""
    outer, inner = managed_session(), managed_session()
    first = outer.__enter__()
    second = inner.__enter__()
    outer.__exit__(None, None, None)
    assert second is current_session()
    inner.__exit__(None, None, None)

    assert first.closed
    with pytest.raises(LookupError):
        current_session()
    with managed_session() as third:
        assert third is current_session()


def test_a_session_is_a_block_by_itself(log: list[str]) -> None:
    with Session(name="own") as session:
        session.callback(log.append, "released")
        assert session is current_session()

    assert ["released"] == log


def test_the_reprs_say_what_is_there() -> None:
    session = Session(name="agents")
    session.callback(print)
    assert "<Session 'agents': 1 to release>" == repr(session)
    with contextlib.redirect_stdout(None):
        session.close()

    assert "<Session 'agents': closed>" == repr(session)
    assert "managed_session(Resource, name='a')" == repr(managed_session(Resource, [], "x", name="a"))
    assert "managed_session()" == repr(managed_session())


def test_a_decorator_without_parentheses_says_so_when_the_function_is_called() -> None:
    @managed_session
    def work() -> None: ...

    with pytest.raises(TypeError, match=r"Decorate with parentheses: @managed_session\(\)"):
        work()


@pytest.mark.parametrize("kind", [Session, AsyncSession, managed_session], ids=lambda kind: kind.__name__)
def test_a_function_may_return_out_of_a_block(kind: Any) -> None:
    """What type checkers take ``-> bool`` for is a block that swallows exceptions, after which a function goes on."""
    exits = [getattr(kind, name) for name in ("__exit__", "__aexit__") if hasattr(kind, name)]

    assert exits
    assert ["bool | None"] * len(exits) == [function.__annotations__["return"] for function in exits]
