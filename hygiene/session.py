"""Sessions: what was opened together is released together, in reverse order, whatever goes wrong.

A `Session` owns a list of releases. It lets go when its block ends or when it is closed, and tells whoever closes it
what failed. An `AsyncSession` does the same on an event loop.

Theory of operation
===================

**Failures.** Every release runs. If the body raised, its exception goes on and the failures become notes on it;
otherwise they come as one group. What is no ``Exception`` (``KeyboardInterrupt``) goes on by itself, after the rest.

**Cancellation.** An async session releases behind one `Shield`: each release runs in a task of its own, so that a
cancellation of the task that closes reaches none of them, and is delivered when all have ended.

**The owner.** A cancel scope of anyio and a task group belong to the task that entered them. So that a session can be
closed from any task, one task of its own, the `_Owner`, enters and exits the async context managers of `enter`. A scope
that is cancelled, and a group whose child fails, cancel that task. It keeps the cancellation, which is the exception
that the scope wants to see when it is exited, goes on holding everything (the body may be using it) and takes nothing
more. It lets go by itself only where the loop is going down, for then somebody waits for all tasks, and so for it:
when those who were cancelled with it, and may close the session on their way out, have ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
import types
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    _AsyncGeneratorContextManager,
    _GeneratorContextManager,
)
from contextvars import ContextVar
from typing import Any, Generic, NoReturn, ParamSpec, Protocol, Self, TypeVar, cast, overload

from hygiene.closing import (
    GRACE,
    Closer,
    Shield,
    anyio_shield,
    call_within,
    check_closer,
    find_closer,
    is_async,
    note,
)
from hygiene.logs import logger
from hygiene.registry import Registry
from hygiene.units import Duration, seconds

__all__ = ["AsyncSession", "Session", "current_session", "managed_session"]


P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")
V = TypeVar("V")
S_co = TypeVar("S_co", covariant=True)
A_co = TypeVar("A_co", covariant=True)
T_co = TypeVar("T_co", covariant=True)

_NO_KEYWORDS: dict[str, Any] = {}
_NOTHING: Any = None  # what a function that was decorated without parentheses is called with
_COROUTINE = inspect.CO_COROUTINE
_FUNCTION = types.FunctionType

# A release: what to call, and with what. What was entered has ``None`` for its arguments: it is told of the error.
_Release = tuple[Any, tuple[Any, ...], dict[str, Any] | None]


class _SyncPool(Protocol[T_co]):
    def acquire(self, *, timeout: Any = None) -> AbstractContextManager[T_co]: ...


class _AsyncPool(Protocol[T_co]):
    def acquire(self, *, timeout: Any = None) -> AbstractAsyncContextManager[T_co]: ...


_current: ContextVar[Session | AsyncSession | None] = ContextVar("hygiene_session", default=None)


_current_or_none = _current.get
_make_current = _current.set


def current_session() -> Session | AsyncSession:
    """
    The innermost session that this thread or task has entered and that is not closed.

    A task sees the sessions of the code that created it, as with any ``ContextVar``; a new thread sees none.

    Raises:
        LookupError: there is none.
    """
    session = _live(_current.get())
    if session is None:
        ended = _current.get()
        if ended is not None:
            raise LookupError(
                f"wanted the current session; found that {ended._label()}, in which this began, is closed. Wait for "
                "what you start inside of its block, or open a session there"
            )
        raise LookupError(
            "wanted the current session; found none. Call this inside `with managed_session()`, or in a function that "
            "is decorated with it; a new thread has no session of its own"
        )
    return session


def _live(session: Session | AsyncSession | None) -> Session | AsyncSession | None:
    """*session*, or the next one around it that is not closed: one may be closed where its variable cannot be set."""
    while session is not None and session._releases is None:
        session = session._outer
    return session


class _Base:
    """What sessions have in common."""

    __slots__ = ("__weakref__", "_closer", "_guard", "_outer", "_releases", "_timeout", "name")

    def __init__(self, *, close: Closer = "auto", timeout: Duration | None = None, name: str | None = None) -> None:
        self._releases: list[_Release] | None = []
        self._outer: Session | AsyncSession | None  # there once it is entered
        if close != "auto":
            _check_closer(close)
        self._closer = close
        self._timeout = None if timeout is None else seconds(timeout, "timeout")
        self.name = name
        self._guard: _Guard | None = _Guard(self._releases, self._title())

    @property
    def closed(self) -> bool:
        """Whether it was closed; it is from the moment when closing begins."""
        return self._releases is None

    def __repr__(self) -> str:
        state = "closed" if self._releases is None else f"{len(self._releases)} to release"
        return f"<{self._title()}: {state}>"

    def _title(self) -> str:
        return type(self).__name__ + ("" if self.name is None else f" {self.name!r}")

    def _label(self) -> str:
        return "session" if self.name is None else f"session {self.name!r}"

    def _begin(self) -> None:
        """Become the current session."""
        if self._releases is None:
            self._refuse()
        if hasattr(self, "_outer"):
            raise RuntimeError(f"{self._label()} is entered already; nest another session of its own")
        outer = _current.get()
        self._outer = outer if outer is None or outer._releases is not None else _live(outer)
        _current.set(cast("Session | AsyncSession", self))

    def _leave(self) -> None:
        # Nothing is reset: a session may end in another context than it began in, where its token would be refused.
        if _current.get() is self:
            _current.set(self._outer)

    def _refuse(self) -> NoReturn:
        raise RuntimeError(f"{self._label()} is closed; open another with managed_session()")


class _Guard:
    """
    Warns if its session is dropped with something left to release.

    Beside the session, because ``with managed_session()`` can do without it: there the block's end is certain, and a
    finalizer would be a tenth of the price.
    """

    __slots__ = ("_releases", "_session")

    def __init__(self, releases: list[_Release], session: str) -> None:
        self._releases = releases
        self._session = session

    def __del__(self) -> None:
        if self._releases:
            warnings.warn(
                f"{self._session} was dropped with {len(self._releases)} to release; close it, or use it in a `with`",
                ResourceWarning,
                stacklevel=1,
            )


class Session(_Base):
    """
    Owns what is opened in it and releases it in reverse order, once, when its block ends or `close` is called.

    `managed_session` makes one. One that is made by calling the class, for an object that keeps it, is closed with
    `close` and becomes the `current_session` only if it is used in a ``with``.

    Every release runs, also if others fail. If the block raised, its exception goes on, and what failed meanwhile
    becomes notes on it and is logged; otherwise all failures come as one ``ExceptionGroup``, each with a note saying
    which release it was. A ``KeyboardInterrupt`` out of a release goes on by itself, after the rest has run.

    For one thread at a time; it may be closed from another thread than the one that opened it, if what it holds may.

    Args:
        close: How what `open` returns is released: a callable, a method's name or ``"auto"``: the first it has of
            ``close``, ``aclose``, ``__exit__``, ``__aexit__``, ``terminate``, ``shutdown``.
        timeout: Seconds (or ``"5s"``) that each release may take. With it each release but that of a lease runs in a
            thread of its own, since nothing else could go on without it. The default is none: the calling thread
            releases, as a SQLite connection or an ``RLock`` wants it.
        name: What messages call it.
    """

    __slots__ = ()

    def open(self, factory: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """
        What ``factory(*args, **kwargs)`` returns; it is released when the session is closed.

        If *factory* raises there is nothing to release.

        Raises:
            TypeError: the result has nothing to release, or nothing that works without an event loop; or it is a
                context manager of ``contextlib``, which is for `enter`.
            RuntimeError: the session is closed. If that happened while *factory* ran, its result was released.
        """
        if self._releases is None:
            self._refuse()
        value = factory(*args, **kwargs)
        release: Any = None
        try:  # the usual case, a plain method, costs two looks; what is another is looked up, and refused, over there
            release = value.close  # type: ignore[attr-defined]
            plain = self._closer == "auto" and not release.__func__.__code__.co_flags & _COROUTINE
        except AttributeError:
            plain = False
        releases: Any = self._releases
        if not plain or releases is None:
            return self._keep(value)
        releases.append((release, (), _NO_KEYWORDS))
        return value

    def _keep(self, value: T) -> T:
        release = _release_of(value, self._closer)
        releases = self._releases
        if releases is None:  # closed meanwhile: by another thread, or by the factory
            release()
            self._refuse()
        releases.append((release, (), _NO_KEYWORDS))
        return value

    def enter(self, manager: AbstractContextManager[T, Any], /) -> T:
        """
        Enter *manager*, and exit it when the session is closed; returns what entering it returned.

        It sees the exception of the session's block, and may suppress it, as in ``ExitStack``.

        Raises:
            TypeError: *manager* is no context manager, or only an asynchronous one.
            RuntimeError: the session is closed.
        """
        return cast("T", self._enter(manager, leased=False))

    def _enter(self, manager: Any, *, leased: bool) -> Any:
        if self._releases is None:
            self._refuse()
        kind = type(manager)
        if not (hasattr(kind, "__enter__") and hasattr(kind, "__exit__")):
            _refuse_manager(manager, "__aenter__", "use an async session: `async with managed_session()`")
        value = kind.__enter__(manager)
        releases = self._releases
        if releases is None:  # as in `open`
            kind.__exit__(manager, None, None, None)  # type: ignore[unreachable]
            self._refuse()
        releases.append((_Entered(manager, leased=leased), (), None))
        return value

    def callback(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """
        Call *function* with these arguments when the session is closed.

        Returns:
            *function*, so that this is a decorator, too.

        Raises:
            TypeError: *function* is not callable, or it is asynchronous, which needs an `AsyncSession`.
            RuntimeError: the session is closed.
        """
        releases = self._releases
        if releases is None:
            self._refuse()
        if type(function) is _FUNCTION:
            asynchronous: Any = function.__code__.co_flags & _COROUTINE
        else:
            _check_callable(function)
            asynchronous = is_async(function)
        if asynchronous:
            raise TypeError(
                f"{_described(function)} is asynchronous and this is a Session; use `async with managed_session()`"
            )
        releases.append((function, args, kwargs))
        return function

    def acquire(self, pool: _SyncPool[T], timeout: Duration | None = None) -> T:
        """
        A resource of *pool*, which goes back when the session is closed.

        Args:
            pool: A `Pool`, or what has such an ``acquire``.
            timeout: Seconds to wait for one; by default as long as the pool says.

        Raises:
            TypeError: *pool* is an `AsyncPool`.
            RuntimeError: the session is closed.
        """
        if self._releases is None:
            self._refuse()
        acquiring = pool.acquire(timeout=timeout)
        if not hasattr(type(acquiring), "__enter__"):
            _discard(acquiring)
            raise TypeError(
                f"wanted a Pool; found {type(pool).__name__}, which is asynchronous. "
                "Use `async with managed_session()`, or a Pool"
            )
        return cast("T", self._enter(acquiring, leased=True))

    @overload
    def lease(self, registry: Registry[K, V], key: K) -> V: ...
    @overload
    def lease(self, registry: Registry[K, V], key: K, create: Callable[[], V]) -> V: ...
    def lease(self, registry: Registry[K, V], key: K, create: Callable[[], V] | None = None) -> V:
        """
        The value of *key*, which stays in *registry* until the session is closed. See `Registry.lease`.

        Raises:
            KeyError: there is no such entry, and nothing to create it with.
            RuntimeError: the session is closed.
        """
        if self._releases is None:
            self._refuse()
        return cast("V", self._enter(registry.lease(key, cast("Any", create)), leased=True))

    def close(self) -> None:
        """
        Release everything, last opened first. Another call does nothing.

        Raises:
            ExceptionGroup: releases failed; the others have run.
        """
        self._leave()
        self._end(None)

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool | None:  # not bool: a type checker would take every block for one that may swallow exceptions
        self._leave()
        return self._end(error)

    def _end(self, error: BaseException | None) -> bool:
        """Release everything; says whether what was entered has suppressed *error*."""
        releases = self._releases
        if not releases:
            self._releases = None
            return False
        self._releases = None
        total = len(releases)
        timeout = self._timeout
        body = error
        failures: _Failures | None = None
        try:
            while releases:
                release, args, kwargs = releases.pop()
                try:
                    if kwargs is None:
                        if self._exit(release, error):
                            error = None
                        continue
                    if timeout is not None:
                        result = self._within(release, args, kwargs)
                    elif args or kwargs:
                        result = release(*args, **kwargs)
                    else:  # the usual case, for half the price
                        result = release()
                    if result is not None and type(result) is types.CoroutineType:
                        result.close()
                        raise TypeError(  # noqa: TRY301 - it is one of the failures
                            "it is asynchronous and this is a Session; use `async with managed_session()`"
                        )
                except BaseException as failure:
                    if failures is None:
                        failures = _Failures(self._label(), total)
                    failures.add(failure, release, len(releases) + 1, error)
            if failures is not None:
                failures.tell(error)
            return body is not None and error is None
        finally:
            if releases:  # Ctrl-C came between two of them
                self._releases = releases
                self._end(sys.exception())
            del failures, body, error  # their tracebacks hold this frame

    def _exit(self, entered: _Entered, error: BaseException | None) -> bool:
        manager = entered.manager
        leave = type(manager).__exit__
        info = (None, None, None) if error is None else (type(error), error, error.__traceback__)
        # A pool has timeouts of its own, and a lease is given back in no time.
        if self._timeout is None or entered.leased:
            return bool(leave(manager, *info))
        return bool(self._within(leave, (manager, *info), _NO_KEYWORDS, _described(entered)))

    def _within(
        self, release: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], what: str = ""
    ) -> Any:
        assert self._timeout is not None
        context = contextvars.copy_context()
        call = functools.partial(context.run, release, *args, **kwargs)
        return call_within(call, self._timeout, what or _described(release))


class AsyncSession(_Base):
    """
    Owns what is opened in it on an event loop and releases it in reverse order, once.

    It lets go when its block ends or `aclose` is called, from whichever task. Failures are told as by a `Session`.

    Releases are shielded from cancellation: after one (of the block, or of the task that closes) they have 10 seconds
    left, all together, and it is delivered at the end. What needs longer is cancelled and reported.

    Async context managers given to `enter` are entered and exited by one task that belongs to the session. So a task
    group or a cancel scope in it is exited by the task that entered it, as it must be, whoever closes the session; and
    a cancel scope or ``asyncio.timeout()`` given to `enter` does not reach the body, which runs in another task. If
    a scope in it is cancelled, or a child of a task group in it fails, the session goes on holding what it has, takes
    no further manager, and reports the failure when it is closed.

    For the tasks of one event loop.

    Args:
        close: How what `open` returns is released: a callable (which may be async), a method's name or ``"auto"``: the
            first it has of ``aclose``, ``close``, ``__aexit__``, ``__exit__``, ``terminate``, ``shutdown``.
        timeout: Seconds (or ``"5s"``) that each release may take; one that takes longer is cancelled and reported.
            The default is none. It is for what is awaited: a plain function runs on the loop's thread, where nothing
            can stop it.
        name: What messages call it.
    """

    __slots__ = ("_owner",)

    def __init__(self, *, close: Closer = "auto", timeout: Duration | None = None, name: str | None = None) -> None:
        super().__init__(close=close, timeout=timeout, name=name)
        self._owner: _Owner | None = None

    @overload
    async def open(self, factory: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    async def open(self, factory: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    async def open(self, factory: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """
        What ``factory(*args, **kwargs)`` returns, awaited if need be; it is released when the session is closed.

        If *factory* raises or is cancelled there is nothing to release.

        Raises:
            TypeError: the result has nothing to release; or it is a context manager of ``contextlib``, which is for
                `enter`.
            RuntimeError: the session is closed. If that happened while *factory* ran, its result was released.
        """
        if self._releases is None:
            self._refuse()
        value = factory(*args, **kwargs)
        if inspect.isawaitable(value):
            value = await value
        release = _release_of(value, self._closer, prefer_async=True)
        releases = self._releases
        if releases is None:  # closed meanwhile by another task
            await self._release_late(release)  # type: ignore[unreachable]
            self._refuse()
        releases.append((release, (), _NO_KEYWORDS))
        return value

    async def enter(self, manager: AbstractAsyncContextManager[T, Any] | AbstractContextManager[T, Any], /) -> T:
        """
        Enter *manager*, and exit it when the session is closed; returns what entering it returned.

        An asynchronous one is entered in the session's own task, a synchronous one right here. It sees the exception
        of the session's block, and may suppress it, as in ``AsyncExitStack``. If the caller is cancelled meanwhile,
        so is the entering; what had just been entered then is exited.

        Raises:
            TypeError: *manager* is no context manager.
            RuntimeError: the session is closed, or something in it was cancelled or failed.
        """
        if self._releases is None:
            self._refuse()
        kind = type(manager)
        if hasattr(kind, "__aenter__") and hasattr(kind, "__aexit__"):
            if self._owner is None:
                self._owner = _Owner(self._label())
            return cast("T", await self._owner.enter(manager, self._releases))
        if not (hasattr(kind, "__enter__") and hasattr(kind, "__exit__")):
            _refuse_manager(manager, "__aenter__", "")
        value = cast("Any", kind).__enter__(manager)
        self._releases.append((_Entered(manager, leased=False), (), None))
        return cast("T", value)

    def callback(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R]:
        """
        Call *function* with these arguments when the session is closed, and await what it returns if it can be.

        Returns:
            *function*, so that this is a decorator, too.

        Raises:
            TypeError: *function* is not callable.
            RuntimeError: the session is closed.
        """
        if self._releases is None:
            self._refuse()
        _check_callable(function)
        self._releases.append((function, args, kwargs))
        return function

    async def acquire(self, pool: _AsyncPool[T], timeout: Duration | None = None) -> T:
        """
        A resource of *pool*, which goes back when the session is closed.

        Args:
            pool: An `AsyncPool`, or what has such an ``acquire``.
            timeout: Seconds to wait for one; by default as long as the pool says.

        Raises:
            TypeError: *pool* is a `Pool`, which would block the event loop.
            RuntimeError: the session is closed.
        """
        if self._releases is None:
            self._refuse()
        acquiring = pool.acquire(timeout=timeout)
        if not hasattr(type(acquiring), "__aenter__"):
            _discard(acquiring)
            raise TypeError(
                f"wanted an AsyncPool; found {type(pool).__name__}, which would block the event loop. Use an AsyncPool"
            )
        return await self._enter_here(acquiring)

    @overload
    async def lease(self, registry: Registry[K, V], key: K) -> V: ...
    @overload
    async def lease(
        self, registry: Registry[K, V], key: K, create: Callable[[], Awaitable[V]] | Callable[[], V]
    ) -> V: ...
    async def lease(self, registry: Registry[K, V], key: K, create: Callable[[], Any] | None = None) -> V:
        """
        The value of *key*, which stays in *registry* until the session is closed. See `Registry.lease`.

        Raises:
            KeyError: there is no such entry, and nothing to create it with.
            RuntimeError: the session is closed.
        """
        if self._releases is None:
            self._refuse()
        return await self._enter_here(registry.lease(key, cast("Any", create)))

    async def _enter_here(self, manager: AbstractAsyncContextManager[T, Any]) -> T:
        """Enter what holds no scope, and so may be entered and exited by whom it likes."""
        value = await type(manager).__aenter__(manager)
        releases = self._releases
        if releases is None:
            await self._release_late(functools.partial(manager.__aexit__, None, None, None))
            self._refuse()
        releases.append((_Entered(manager, leased=True), (), None))
        return value

    async def _release_late(self, release: Callable[[], Any]) -> None:
        """Release what came when the session had been closed."""
        shield = Shield()
        try:
            result = release()
            if inspect.isawaitable(result):
                await shield.run(result, _described(release), self._timeout)
        except Exception:
            logger.exception(
                "releasing what came when %s had been closed failed: %s",
                self._label(),
                release,
                extra={"event_name": "session.release_failed", "session": self._label()},
            )
        shield.deliver()

    async def aclose(self) -> None:
        """
        Release everything, last opened first. Another call does nothing, and does not wait for the first.

        Raises:
            ExceptionGroup: releases failed; the others have run.
        """
        self._leave()
        await self._end(None)

    async def __aenter__(self) -> Self:
        self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool | None:  # not bool: a type checker would take every block for one that may swallow exceptions
        self._leave()
        return await self._end(error)

    async def _end(self, error: BaseException | None) -> bool:
        """Release everything; says whether what was entered has suppressed *error*."""
        releases, self._releases = self._releases, None
        if releases is None:
            return False
        if self._owner is not None:
            self._owner.shut()
        total = len(releases)
        body = error
        shield = Shield()
        if isinstance(error, asyncio.CancelledError):
            shield.begin_grace()  # or a release that hangs would keep a cancelled task for ever
        failures = _Failures(self._label(), total)
        try:
            while releases:
                release, args, kwargs = releases.pop()
                position = len(releases) + 1
                try:
                    if kwargs is None:
                        if await self._exit(release, error, shield):
                            error = None
                        continue
                    result = release(*args, **kwargs)
                    if result is not None and inspect.isawaitable(result):
                        await shield.run(result, _described(release), self._timeout)
                except asyncio.CancelledError as cancelled:
                    # Not ours, which the shield keeps: somebody cancelled the release itself.
                    failure = RuntimeError("it was cancelled before it had ended")
                    failure.__cause__ = cancelled
                    failures.add(failure, release, position, error)
                    del failure
                except BaseException as failure:
                    failures.add(failure, release, position, error)
            if self._owner is not None:
                await self._dismiss(self._owner, shield, failures, error)
            try:
                shield.deliver()
            except asyncio.CancelledError as cancelled:
                failures.tell(cancelled)
                if isinstance(error, asyncio.CancelledError):
                    return False  # the body's own goes on: one is as good as two
                raise
            failures.tell(error)
            return body is not None and error is None
        finally:
            del failures, body, error  # their tracebacks hold this frame

    async def _exit(self, entered: Any, error: BaseException | None, shield: Shield) -> bool:
        """Exit what was entered; says whether that suppressed *error*."""
        info = (None, None, None) if error is None else (type(error), error, error.__traceback__)
        if isinstance(entered, _Held):
            assert self._owner is not None
            exiting: Any = self._owner.exit(entered, error)
        elif not entered.leased:
            return bool(type(entered.manager).__exit__(entered.manager, *info))
        else:
            exiting = type(entered.manager).__aexit__(entered.manager, *info)
        return bool(await shield.run(exiting, _described(entered), self._timeout))

    async def _dismiss(self, owner: _Owner, shield: Shield, failures: _Failures, error: BaseException | None) -> None:
        """Let the owner go home, and hear what is left of a cancellation that nobody has caught."""
        if owner.free:
            await shield.run(owner.ended(), "the session's task", self._timeout)
            self._owner = None  # its task, and so its context, may know this session
        lost = owner.cancelled
        if lost is not None and not shield.cancelled and not isinstance(error, asyncio.CancelledError):
            failure = RuntimeError(f"what {self._label()} held was cancelled by somebody else")
            failure.__cause__ = lost
            failures.add_plain(failure)


class _Entered:
    """A context manager that is exited where the session is closed."""

    __slots__ = ("leased", "manager")

    def __init__(self, manager: Any, *, leased: bool) -> None:
        self.manager = manager
        self.leased = leased


class _Held:
    """An async context manager that is exited by the owner."""

    __slots__ = ("failure", "manager", "over")

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.over = False
        self.failure: BaseException | None = None


class _Failures:
    """What went wrong in one closing."""

    __slots__ = ("_found", "_interrupt", "_label", "_total")

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._found: list[BaseException] = []
        self._interrupt: BaseException | None = None

    def add(self, failure: BaseException, release: Any, position: int, error: BaseException | None) -> None:
        """One more, unless it is the body's own *error* that comes back, perhaps in the group of a task group."""
        if failure is error:
            return
        if error is not None and isinstance(failure, BaseExceptionGroup):
            rest = failure.split(lambda part: part is error)[1]
            if rest is None:
                return
            failure = rest
        note(failure, f"while releasing {_described(release)}, opened as {position} of {self._total} in {self._label}")
        if self._interrupt is None and not isinstance(failure, Exception):
            self._interrupt = failure
        else:
            self._found.append(failure)

    def add_plain(self, failure: Exception) -> None:
        """One more, of no single release."""
        self._found.append(failure)

    def tell(self, error: BaseException | None) -> None:
        """Raise what was found; if *error* or an interrupt is under way anyway, note it there and log it."""
        goes_on = error if self._interrupt is None else self._interrupt
        # Whoever closes a generator sees no note on its GeneratorExit, only what is raised in its place.
        if goes_on is None or (isinstance(goes_on, GeneratorExit) and self._interrupt is None):
            if self._found:
                count = f"{len(self._found)} of {self._total} releases"
                raise BaseExceptionGroup(f"{count} of {self._label} failed", self._found)
            return
        for failure in self._found:
            notes = "; ".join(getattr(failure, "__notes__", ()))
            note(goes_on, f"{type(failure).__name__}: {failure} ({notes})")
            logger.error(
                "a release of %s failed: %s",
                self._label,
                notes,
                exc_info=failure,
                extra={"event_name": "session.release_failed", "session": self._label},
            )
        self._found.clear()
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt


class _Job:
    """What the owner is asked to do: enter a manager, or exit one."""

    __slots__ = ("done", "error", "held", "interrupts", "manager", "refused", "releases")

    def __init__(self, done: asyncio.Future[Any]) -> None:
        self.done = done
        self.manager: Any = None  # to enter
        self.releases: list[_Release] = []  # where it goes then
        self.held: _Held | None = None  # to exit
        self.error: BaseException | None = None
        self.interrupts = 0
        self.refused = False


class _OwnerTask(asyncio.Task[None]):
    """Notices that somebody waits for its end: it is nobody's business, so somebody waits for all tasks."""

    awaited: Callable[[], None] | None = None

    def add_done_callback(self, function: Callable[[Any], object], /, *, context: Any = None) -> None:
        super().add_done_callback(function, context=context)
        if self.awaited is not None:
            self.awaited()


# The owners' tasks, which nobody else may hold, and which do not count as somebody who could close a session.
_owners: set[asyncio.Future[None]] = set()


class _Owner:
    """The one task of a session in which async context managers are entered and exited."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._loop = asyncio.get_running_loop()
        self._jobs: deque[_Job] = deque()
        self._running: _Job | None = None
        self._held: list[_Held] = []
        self._wake_up: asyncio.Future[None] | None = None
        self._shut = False
        self._broken: str | None = None
        self._going_down = False
        self._others = 0
        self._patience: asyncio.TimerHandle | None = None
        self._patient = True
        self.cancelled: asyncio.CancelledError | None = None
        self._task = _OwnerTask(self._run(), loop=self._loop, name=f"hygiene-{label}")
        self._task.add_done_callback(_owners.discard)
        self._task.awaited = self._notice_end_of_loop
        _owners.add(self._task)

    @property
    def free(self) -> bool:
        """Whether it holds nothing and does nothing, on the loop that runs here."""
        here = self._loop is asyncio.get_running_loop()
        return here and not self._held and not self._jobs and self._running is None

    async def ended(self) -> None:
        """Wait for the task to end."""
        await asyncio.wait([self._task])

    # Asked by whoever uses the session.

    async def enter(self, manager: Any, releases: list[_Release]) -> Any:
        """Enter *manager* over there and add it to *releases*."""
        self._check_loop()
        if self._broken is not None or self._task.done():
            raise self._refusal()
        job = _Job(self._loop.create_future())
        job.manager, job.releases = manager, releases
        cancelled: asyncio.CancelledError | None = None
        self._put(job)
        try:
            while not job.done.done():
                try:
                    await asyncio.wait([job.done])
                except asyncio.CancelledError as error:
                    cancelled = error
                    if job in self._jobs:
                        self._jobs.remove(job)
                        raise
                    self._interrupt(job)
            if cancelled is None:
                return job.done.result()
            failure = job.done.exception()
            if failure is None:
                await self._undo(job, cancelled)
            elif not isinstance(failure, asyncio.CancelledError):
                raise failure
            raise cancelled
        finally:
            cancelled = failure = None  # their tracebacks hold this frame
            del job

    async def exit(self, held: _Held, error: BaseException | None) -> bool:
        """Exit *held* over there; says whether that suppressed *error*."""
        if held.over:  # the owner was alone on its loop, and has let go
            if held.failure is not None:
                raise held.failure
            return False
        self._check_loop()
        job = _Job(self._loop.create_future())
        job.held, job.error = held, error
        self._put(job)
        while not job.done.done():
            try:
                await asyncio.wait([job.done])
            except asyncio.CancelledError:  # its time is over
                self._interrupt(job)
        try:
            return bool(job.done.result())
        finally:
            del job  # it holds the exception, whose traceback holds this frame

    def shut(self) -> None:
        """Take nothing more: what is being entered is interrupted and refused."""
        self._shut = True
        if self._loop is not asyncio.get_running_loop():
            return
        for job in list(self._jobs):
            if job.held is None:
                self._jobs.remove(job)
                job.done.set_exception(self._closed_meanwhile())
        if self._running is not None and self._running.held is None:
            self._running.refused = True
            self._interrupt(self._running)
        self._wake()

    async def _undo(self, job: _Job, cancelled: asyncio.CancelledError) -> None:
        """Exit what was entered in the very tick in which the caller was cancelled."""
        releases = job.releases
        entered = releases[-1][0] if releases else None
        if not isinstance(entered, _Held) or entered is not job.held:
            return  # no longer the last one: the session releases it in its turn
        releases.pop()
        shield = Shield()
        try:
            await shield.run(self.exit(entered, cancelled), _described(entered))
        except Exception as failure:
            note(cancelled, f"{type(failure).__name__}: {failure} (while releasing {_described(entered)})")
            logger.exception(
                "releasing what had just been entered in %s failed",
                self._label,
                extra={"event_name": "session.release_failed", "session": self._label},
            )

    def _check_loop(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(f"{self._label} belongs to another event loop; use and close it there")

    def _put(self, job: _Job) -> None:
        self._jobs.append(job)
        self._wake()

    def _interrupt(self, job: _Job) -> None:
        if self._running is job:  # so it is suspended in there, and that is where the cancellation arrives
            job.interrupts += 1
            self._task.cancel()

    def _wake(self, *_: object) -> None:
        if self._wake_up is not None and not self._wake_up.done():
            self._wake_up.set_result(None)

    def _refusal(self) -> RuntimeError:
        held = self._broken or "what it held"
        return RuntimeError(
            f"{self._label} takes no further context manager: a scope or task group in it was cancelled or failed "
            f"(it holds {held}). Close it to hear why, and open another"
        )

    def _closed_meanwhile(self) -> RuntimeError:
        return RuntimeError(f"{self._label} was closed while it entered this; open another with managed_session()")

    # The task.

    async def _run(self) -> None:
        while (job := await self._next()) is not None:
            self._running = job
            try:
                if job.held is not None:
                    result: Any = await self._leave(job.held, job)
                else:
                    result = await self._enter(job)
            except BaseException as failure:
                outcome = functools.partial(job.done.set_exception, failure)
            else:
                outcome = functools.partial(job.done.set_result, result)
            self._running = None
            for _ in range(job.interrupts):
                asyncio.current_task().uncancel()  # type: ignore[union-attr] # this is one
            outcome()
            del job, outcome  # they hold exceptions, whose tracebacks hold this frame
        await self._let_go()
        self._task.awaited = None  # or they would hold each other, and the session's context with it

    async def _next(self) -> _Job | None:
        """The next job; ``None`` when there will be none."""
        while not self._jobs:
            if (self._shut and not self._held) or self._is_forsaken():
                return None
            self._wake_up = self._loop.create_future()
            try:
                if self._broken is None:
                    await self._wake_up
                else:  # anyio would cancel this task in every step of the loop until it has left the scope
                    with anyio_shield():
                        await self._wake_up
            except asyncio.CancelledError as error:
                self._break(error)
        return self._jobs.popleft()

    def _break(self, error: asyncio.CancelledError) -> None:
        """A scope that is held here was cancelled, a group's child has failed, or the loop goes down."""
        if self.cancelled is None:
            self.cancelled = error
        self._broken = ", ".join(_described(held) for held in self._held) or "nothing"

    def _notice_end_of_loop(self) -> None:
        self._going_down = True
        self._wake()

    def _is_forsaken(self) -> bool:
        """Whether the loop goes down and nobody is left who might close the session; if not, look again later."""
        if self._broken is None or not self._going_down or not self._patient:
            return not self._patient
        if not self._others:
            others = [task for task in asyncio.all_tasks(self._loop) if task.cancelling() and task not in _owners]
            self._others = len(others)
            for task in others:
                task.add_done_callback(self._one_less)
        if self._others and self._patience is None:  # one of them may be the one who waits for us
            self._patience = self._loop.call_later(GRACE, self._lose_patience)
        return not self._others

    def _one_less(self, _: object) -> None:
        self._others -= 1
        if not self._others:
            self._wake()

    def _lose_patience(self) -> None:
        self._patient = False
        self._wake()

    async def _enter(self, job: _Job) -> Any:
        if self._broken is not None:
            raise self._refusal()
        manager = job.manager
        try:
            value = await type(manager).__aenter__(manager)
        except BaseException as error:
            if job.refused:
                raise self._closed_meanwhile() from error
            if isinstance(error, asyncio.CancelledError) and not job.interrupts:
                self._break(error)  # not by the caller, then by something that is held
                raise self._refusal() from error
            raise
        job.held = held = _Held(manager)
        self._held.append(held)
        if job.refused:
            await self._leave(held, job)
            raise self._closed_meanwhile()
        job.releases.append((held, (), None))
        return value

    async def _leave(self, held: _Held, job: _Job | None) -> bool:
        """Exit *held*; says whether that suppressed the body's exception."""
        # Before the body's exception comes the cancellation that arrived here: its scope waits to see it.
        passed = self.cancelled or (None if job is None else job.error)
        info = (None, None, None) if passed is None else (type(passed), passed, passed.__traceback__)
        held.over = True
        self._held.remove(held)
        try:
            suppressed = bool(await type(held.manager).__aexit__(held.manager, *info))
        except BaseException as error:
            if error is passed:
                return False
            if isinstance(error, asyncio.CancelledError) and not (job is not None and job.interrupts):
                self.cancelled = error  # not by who waits for this exit, so by a scope further out
                return False
            if passed is self.cancelled:
                self.cancelled = None  # turned into this
            raise
        else:
            if passed is None or passed is not self.cancelled:
                return suppressed
            if suppressed:
                self.cancelled = None
            return False
        finally:
            passed = info = job = None  # type: ignore[assignment] # their tracebacks hold this frame

    async def _let_go(self) -> None:
        """Exit what is left, when nobody else can."""
        if self._patience is not None:
            self._patience.cancel()
        for held in reversed(self._held.copy()):
            try:
                await self._leave(held, None)
            except BaseException as failure:
                held.failure = failure
                logger.exception(
                    "%s was not closed before its event loop; releasing %s failed",
                    self._label,
                    _described(held),
                    extra={"event_name": "session.release_failed", "session": self._label},
                )
        if not self._shut:
            self.cancelled = None  # that was the loop's end
        for job in self._jobs:  # of somebody who came too late
            outcome = self._refusal() if job.held is None else job.held.failure
            if outcome is None:
                job.done.set_result(False)
            else:
                job.done.set_exception(outcome)


class managed_session(Generic[S_co, A_co]):  # noqa: N801 - reads as the verb that it is, as contextlib.suppress does
    """
    A block that releases what was opened in it, in reverse order: ``with`` and ``async with``.

    Without *factory* it yields a `Session`, under ``async with`` an `AsyncSession`. With one it yields what that
    returns and releases it at the end. The object may be used again and again, once at a time; each use is a new
    session. It is a decorator, too, for functions, async functions, generators and async generators: each call is a
    session, which the code finds as `current_session`. The session of a generator lives until it is exhausted,
    closed or collected, and is current only while the generator's own code runs.

    Args:
        factory: Makes the resource; under ``async with`` it may be asynchronous.
        *args: For *factory*.
        close: How resources that are opened are released: a callable that takes one, the name of a method, or
            ``"auto"``: the first it has of ``close``, ``aclose``, ``__exit__``, ``__aexit__``, ``terminate``,
            ``shutdown`` (under ``async with`` the asynchronous ones come first).
        timeout: Seconds (or ``"5s"``) that each release may take. The default is none, which keeps the release in the
            calling thread; see `Session` and `AsyncSession`.
        name: What messages call the session.
        **kwargs: For *factory*.

    Raises:
        TypeError: *factory* or *close* is nothing of the kind; on entering: what *factory* made has nothing to
            release.
        ValueError: *timeout* is not positive.
        RuntimeError: (on entering) it is entered already.
        ExceptionGroup: (on leaving) releases failed.
    """

    __slots__ = ("_args", "_close", "_factory", "_kwargs", "_name", "_session", "_timeout")

    @overload
    def __init__(
        self: managed_session[Session, AsyncSession],
        factory: None = None,
        *,
        close: Closer = "auto",
        timeout: Duration | None = None,
        name: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: managed_session[T, T],
        factory: Callable[..., T],
        *args: Any,
        close: Closer = "auto",
        timeout: Duration | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None: ...
    def __init__(
        self,
        factory: Callable[..., Any] | None = None,
        *args: Any,
        close: Closer = "auto",
        timeout: Duration | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if factory is None:
            if args or kwargs:
                raise TypeError(f"wanted a factory for the arguments {args!r} {kwargs!r}; found None")
        elif not callable(factory):
            raise TypeError(f"factory must be callable; found {factory!r}")
        else:
            self._args = args
            self._kwargs = kwargs
        if close != "auto":
            _check_closer(close)
        self._timeout = None if timeout is None else seconds(timeout, "timeout")
        self._factory = factory
        self._close = close
        self._name = name
        self._session: Session | AsyncSession | None = None

    @overload
    def __enter__(self: managed_session[Awaitable[Any], Any]) -> NoReturn: ...
    @overload
    def __enter__(self) -> S_co: ...
    def __enter__(self) -> Any:
        if self._session is not None:
            self._refuse()
        # As Session() and its _begin, and below as its open: each call saved is a twentieth of an empty block.
        session = _new(Session)
        session._releases = []
        session._closer = self._close
        session._timeout = self._timeout
        session.name = self._name
        outer = _current_or_none()
        session._outer = outer if outer is None or outer._releases is not None else _live(outer)
        _make_current(session)
        self._session = session
        if self._factory is None:
            return session
        try:
            value = self._factory(*self._args, **self._kwargs)
            release: Any = None
            try:
                release = value.close
                plain = self._close == "auto" and not release.__func__.__code__.co_flags & _COROUTINE
            except AttributeError:
                plain = False
            releases: Any = session._releases
            if not plain or releases is None:
                session._keep(value)
            else:
                releases.append((release, (), _NO_KEYWORDS))
        except BaseException:
            self._session = None
            session.close()
            raise
        return value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool | None:  # not bool: a type checker would take every block for one that may swallow exceptions
        session = self._session
        if type(session) is not Session:
            raise RuntimeError(f"{self!r} was not entered with `with`")
        self._session = None
        if _current_or_none() is session:
            _make_current(session._outer)
        return session._end(error)

    @overload
    async def __aenter__(self: managed_session[Any, Awaitable[R]]) -> R: ...
    @overload
    async def __aenter__(self) -> A_co: ...
    async def __aenter__(self) -> Any:
        if self._session is not None:
            self._refuse()
        session = self._session = AsyncSession(close=self._close, timeout=self._timeout, name=self._name)
        session._begin()
        resource: Any = session
        if self._factory is not None:
            try:
                resource = await session.open(self._factory, *self._args, **self._kwargs)
            except BaseException:
                self._session = None
                await session.aclose()
                raise
        return resource

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool | None:  # not bool: a type checker would take every block for one that may swallow exceptions
        session = self._session
        if type(session) is not AsyncSession:
            raise RuntimeError(f"{self!r} was not entered with `async with`")
        self._session = None
        session._leave()
        return await session._end(error)

    def _refuse(self) -> NoReturn:
        raise RuntimeError(f"{self!r} is entered already; a session in a session needs a managed_session() of its own")

    def __repr__(self) -> str:
        inner = [] if self._factory is None else [_described(self._factory)]
        inner += [] if self._name is None else [f"name={self._name!r}"]
        return f"managed_session({', '.join(inner)})"

    def _again(self) -> managed_session[Any, Any]:
        """The same, for one call of a decorated function: calls may overlap."""
        how: dict[str, Any] = {"close": self._close, "timeout": self._timeout, "name": self._name}
        if self._factory is None:
            return managed_session(**how)
        return managed_session(self._factory, *self._args, **how, **self._kwargs)

    def __call__(self, function: Callable[P, R] = _NOTHING) -> Callable[P, R]:
        """*function*, each call of which is a session."""
        if isinstance(function, (classmethod, staticmethod)):
            return cast("Callable[P, R]", type(function)(self(function.__func__)))
        if not callable(function):
            raise TypeError(
                f"wanted a function to decorate; found {function!r}. Decorate with parentheses: @managed_session()"
            )
        if isinstance(function, type):
            raise TypeError(f"wanted a function to decorate; found the class {function.__name__}")
        wrapper: Any
        if inspect.isasyncgenfunction(function):
            wrapper = self._async_generator(function)
        elif inspect.isgeneratorfunction(function):
            wrapper = self._generator(function)
        elif is_async(function):
            wrapper = self._async_function(function)
        else:
            wrapper = self._function(function)
        return cast("Callable[P, R]", functools.wraps(function)(wrapper))

    def _function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def in_session(*args: Any, **kwargs: Any) -> Any:
            with self._again():
                return function(*args, **kwargs)

        return in_session

    def _async_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def in_session(*args: Any, **kwargs: Any) -> Any:
            async with self._again():
                return await function(*args, **kwargs)

        return in_session

    def _generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def in_session(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            managed = self._again()
            with managed:
                session = managed._session
                assert session is not None
                generator = function(*args, **kwargs)
                step: Callable[[Any], Any] = generator.send
                value: Any = None
                while True:
                    with _During(session):
                        try:
                            item = step(value)
                        except StopIteration as stop:
                            return stop.value
                    session._leave()  # the consumer's code runs now
                    try:
                        value = yield item
                        step = generator.send
                    except GeneratorExit:
                        with _During(session):
                            generator.close()
                        raise
                    except BaseException as error:
                        value, step = error, generator.throw

        return in_session

    def _async_generator(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def in_session(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            managed = self._again()
            async with managed:
                session = managed._session
                assert session is not None
                generator = function(*args, **kwargs)
                step: Callable[[Any], Awaitable[Any]] = generator.asend
                value: Any = None
                while True:
                    with _During(session):
                        try:
                            item = await step(value)
                        except StopAsyncIteration:
                            return
                    session._leave()  # the consumer's code runs now
                    try:
                        value = yield item
                        step = generator.asend
                    except GeneratorExit:
                        with _During(session):
                            await generator.aclose()
                        raise
                    except BaseException as error:
                        value, step = error, generator.athrow

        return in_session


class _During:
    """Makes a session the current one for one step of its generator."""

    __slots__ = ("_before", "_session")

    def __init__(self, session: Session | AsyncSession) -> None:
        self._session = session

    def __enter__(self) -> None:
        self._before = _current.get()
        _current.set(self._session)

    def __exit__(self, *exc_info: object) -> None:
        _current.set(self._before)


_new: Callable[[type[Session]], Session] = Session.__new__


def _release_of(value: Any, close: Closer, *, prefer_async: bool = False) -> Callable[[], Any]:
    """What releases *value*; a ``TypeError`` if there is nothing that could."""
    if isinstance(value, (_GeneratorContextManager, _AsyncGeneratorContextManager)):
        raise TypeError(
            f"wanted a resource; found the context manager {_described(value)}, which is not entered yet. "
            "Use session.enter() instead of open()"
        )
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError(f"{value.__qualname__} is asynchronous; use `async with managed_session()`")
    release = find_closer(value, close, prefer_async=prefer_async)
    kind = type(value).__name__
    if release is None:
        wanted = "close(), aclose(), terminate() or shutdown()" if close == "auto" else f"{close}()"
        raise TypeError(
            f"wanted something to release, with {wanted}; found a {kind}. Call it yourself, and say with "
            "session.callback() what undoes it"
        )
    if not prefer_async and is_async(release):
        raise TypeError(f"{kind} is released asynchronously; use `async with managed_session()`")
    return release


def _check_closer(close: object) -> None:
    if close is None:
        raise TypeError('close must be a callable, the name of a method, or "auto"; found None')
    check_closer(close)


def _check_callable(function: object) -> None:
    if not callable(function):
        raise TypeError(f"wanted a function to call when the session is closed; found {function!r}")


def _refuse_manager(manager: Any, other: str, remedy: str) -> NoReturn:
    kind = type(manager).__name__
    if remedy and hasattr(type(manager), other):
        raise TypeError(f"{_described(manager)} is an asynchronous context manager; {remedy}")
    raise TypeError(
        f"wanted a context manager; found a {kind}. Use open() with what makes a resource, callback() with a function"
    )


def _discard(acquiring: Any) -> None:
    """Drop a coroutine that will not be awaited without a warning, for an error follows."""
    if inspect.iscoroutine(acquiring):
        acquiring.close()


def _described(release: Any) -> str:
    """A release in words: ``Connection.close``, ``flush``."""
    if isinstance(release, (_Entered, _Held)):
        release = release.manager
    while isinstance(release, functools.partial):
        release = release.func
    if isinstance(release, (_GeneratorContextManager, _AsyncGeneratorContextManager)):
        return str(getattr(release.gen, "__qualname__", "generator"))
    owner = getattr(release, "__self__", None)
    name = getattr(release, "__name__", None)
    if isinstance(name, str) and owner is not None and not isinstance(owner, (types.ModuleType, type)):
        return f"{type(owner).__name__}.{name}"
    qualname = getattr(release, "__qualname__", None)
    return qualname if isinstance(qualname, str) else type(release).__name__
