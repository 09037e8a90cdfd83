"""A lifespan for ASGI applications: what is opened at startup is closed at shutdown, in reverse order, in time.

For Starlette, FastAPI and what else takes a ``lifespan=`` that is called with the application. None of them is
imported here.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from hygiene.cleanup import ashutdown
from hygiene.session import AsyncSession
from hygiene.units import Duration, seconds

__all__ = ["lifespan"]

# The part of the time that is kept for `ashutdown`, so that one release that hangs does not take all of it.
_RESERVE = 0.2


class lifespan:  # noqa: N801, it is used as a function
    """
    What an application opens when it starts and closes when it stops: ``FastAPI(lifespan=lifespan(open_db))``.

    At startup one async session is opened and the *openers* are called in order. At shutdown, or when an opener raises,
    the session is closed, which releases what was opened in reverse order, and then `ashutdown` runs what was
    registered with `register_cleanup` and closes what is left of pools and shared resources, anywhere in the process.
    Both together have *timeout* seconds.

    A release that is awaited and hangs is cancelled at the deadline and named in the error. One that blocks the event
    loop's thread cannot be stopped from here: `install_signal_handlers` ends the process then.

    One `lifespan` may serve several applications, and each start is a new session.

    Args:
        *openers: Functions, or coroutine functions, that open something. Called with ``(app, session)``, ``(app)``,
            ``(session)`` or nothing, as they have parameters; a single parameter gets the session if it is called
            ``session``. They open with ``await session.open(...)``, so that it is closed; see `AsyncSession`. A mapping
            that they return becomes part of the lifespan's state (``request.state``). They may return an async context
            manager, as a function decorated with ``contextlib.asynccontextmanager`` does: it is entered, and what it
            yields is the mapping. As a decorator of one function it is the same.
        timeout: Seconds, or "10s", that shutdown may take. 10, a third of what an orchestrator usually gives a process
            to stop, since requests need time before that; ``None`` for no limit.

    Raises:
        TypeError: an opener is no function, or wants more than two arguments; at startup: it returned something else
            than a mapping or ``None``, which nobody would close.
        ValueError: *timeout* is not positive; at startup: two openers gave the same key.
        ExceptionGroup: at shutdown: releases failed; the others have run.
    """

    def __init__(self, *openers: Callable[..., Any], timeout: Duration | None = 10.0) -> None:
        self._timeout = None if timeout is None else seconds(timeout, "timeout")
        self._openers = tuple((opener, _wanted(opener)) for opener in openers)
        if len(openers) == 1:
            functools.update_wrapper(self, openers[0], updated=())

    def __call__(self, app: Any) -> AbstractAsyncContextManager[Any]:
        """One life of *app*: a context manager that opens and closes, and yields the state, if there is any."""
        if not self._openers and inspect.isroutine(app):
            raise TypeError(
                f"wanted an application; found the function {_name(app)}. If it opens something, say "
                f"lifespan({_name(app)}, timeout=...)"
            )
        return self._live(app)

    @asynccontextmanager
    async def _live(self, app: Any) -> AsyncIterator[Mapping[str, Any] | None]:
        session = _Session(name="lifespan")
        try:
            async with session:
                try:
                    state: dict[str, Any] = {}
                    for opener, wanted in self._openers:
                        await _open(opener, wanted, app, session, state)
                    # Not an empty mapping: a server that has no state refuses even that.
                    yield state or None
                finally:
                    session.hurry(self._timeout)
        finally:
            if self._timeout is None:
                await ashutdown(None)
            else:
                await ashutdown(max(session.left + self._timeout * _RESERVE, 0.001))

    def __repr__(self) -> str:
        return f"lifespan({', '.join(_name(opener) for opener, _ in self._openers)})"


class _Session(AsyncSession):
    """An async session that has one deadline for all of its releases together, once it is in a hurry."""

    __slots__ = ("_deadline",)

    _deadline: float

    def hurry(self, timeout: float | None) -> None:
        """Be closed in *timeout* seconds, less the reserve."""
        limit = math.inf if timeout is None else timeout * (1 - _RESERVE)
        self._deadline = asyncio.get_running_loop().time() + limit

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - asyncio.get_running_loop().time()

    @property
    def _timeout(self) -> float | None:
        # Each release is given what is left. Those that come too late are begun, and cancelled where they wait.
        left = getattr(self, "_deadline", math.inf) - asyncio.get_running_loop().time()
        return None if left == math.inf else left

    @_timeout.setter
    def _timeout(self, timeout: float | None) -> None:
        """Nobody else decides about it."""


def _wanted(opener: Any) -> tuple[str, ...]:
    """What *opener* is to be called with."""
    if not callable(opener):
        raise TypeError(f"an opener must be a function; found {opener!r}")
    if inspect.isasyncgenfunction(opener) or inspect.isgeneratorfunction(opener):
        raise TypeError(
            f"wanted a function that opens something; found the generator {_name(opener)}. "
            "Decorate it with contextlib.asynccontextmanager"
        )
    try:
        parameters = inspect.signature(opener).parameters.values()
    except ValueError:  # some of what is written in C
        raise TypeError(f"{_name(opener)} does not tell what it takes; call it in a function of your own") from None
    positional = [p for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    required = [p for p in parameters if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
    if len(required) > len(positional[:2]) or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise TypeError(
            f"an opener is called with (app, session), (app), (session) or nothing; found "
            f"{_name(opener)}{inspect.signature(opener)}"
        )
    if len(positional) == 1 and positional[0].name == "session":
        return ("session",)
    return ("app", "session")[: len(positional)]


async def _open(
    opener: Callable[..., Any], wanted: tuple[str, ...], app: Any, session: AsyncSession, state: dict[str, Any]
) -> None:
    """Call *opener* and add what it returns to *state*."""
    given = {"app": app, "session": session}
    opened = opener(*(given[name] for name in wanted))
    if inspect.isawaitable(opened):
        opened = await opened
    if hasattr(type(opened), "__aenter__"):
        opened = await session.enter(opened)
    if opened is None:
        return
    if not isinstance(opened, Mapping):
        raise TypeError(
            f"opener {_name(opener)} must return a mapping or nothing; found a {type(opened).__name__}, which nobody "
            "would close. Open it with `await session.open(...)`, and return {'its name': it}"
        )
    if twice := state.keys() & opened.keys():
        raise ValueError(f"opener {_name(opener)} gives {sorted(twice)} to the state, as an opener before it has")
    state.update(opened)


def _name(opener: Any) -> str:
    return str(getattr(opener, "__qualname__", None) or repr(opener))
