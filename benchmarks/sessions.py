"""Sessions beside ``contextlib``: what it costs to release something at the end of a block.

Each loop opens a session, gives it so much to release, and leaves. `ExitStack` is written in Python, too.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import AsyncExitStack, ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import own
from benchmarks.registries import Report, Row, interleave, measure, ratio
from hygiene.session import managed_session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["FULL", "QUICK", "Sizes", "run"]

STACK, OURS = "ExitStack", "managed_session()"
LIMIT = 1.2


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    rounds: int = 101
    operations: int = 1_000  # a round takes a few milliseconds
    async_rounds: int = 21


FULL = Sizes()
QUICK = Sizes(rounds=25, operations=300, async_rounds=7)


class Resource:
    """Something to be closed."""

    def close(self) -> None:
        """Nothing is open."""


class AsyncResource:
    """Something to be closed on a loop."""

    async def aclose(self) -> None:
        """Nothing is open."""


def release() -> None:
    """The least that a callback can do."""


async def arelease() -> None:
    """The same, to be awaited."""


def stack_callback(times: Iterable[int]) -> None:
    """``ExitStack``, one callback."""
    for _ in times:
        with ExitStack() as stack:
            stack.callback(release)


def session_callback(times: Iterable[int]) -> None:
    """A session, one callback."""
    for _ in times:
        with managed_session() as session:
            session.callback(release)


def stack_close(times: Iterable[int]) -> None:
    """``ExitStack``, the ``close`` of a new resource."""
    for _ in times:
        with ExitStack() as stack:
            resource = Resource()
            stack.callback(resource.close)


def stack_closing(times: Iterable[int]) -> None:
    """``ExitStack``, a new resource entered with ``closing``."""
    for _ in times:
        with ExitStack() as stack:
            stack.enter_context(closing(Resource()))


def session_open(times: Iterable[int]) -> None:
    """A session, a new resource."""
    for _ in times:
        with managed_session() as session:
            session.open(Resource)


def session_of(times: Iterable[int]) -> None:
    """A session that is for one resource only."""
    for _ in times:
        with managed_session(Resource):
            pass


def just_closing(times: Iterable[int]) -> None:
    """``contextlib.closing`` by itself."""
    for _ in times:
        with closing(Resource()):
            pass


def stack_callbacks(count: int, times: Iterable[int]) -> None:
    """``ExitStack``, several callbacks."""
    some = range(count)
    for _ in times:
        with ExitStack() as stack:
            for _ in some:
                stack.callback(release)


def session_callbacks(count: int, times: Iterable[int]) -> None:
    """A session, several callbacks."""
    some = range(count)
    for _ in times:
        with managed_session() as session:
            for _ in some:
                session.callback(release)


async def async_stack_callback(times: Iterable[int]) -> None:
    """``AsyncExitStack``, one callback."""
    for _ in times:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(arelease)


async def async_session_callback(times: Iterable[int]) -> None:
    """An async session, one callback."""
    for _ in times:
        async with managed_session() as session:
            session.callback(arelease)


async def async_stack_close(times: Iterable[int]) -> None:
    """``AsyncExitStack``, the ``aclose`` of a new resource."""
    for _ in times:
        async with AsyncExitStack() as stack:
            resource = AsyncResource()
            stack.push_async_callback(resource.aclose)


async def async_session_open(times: Iterable[int]) -> None:
    """An async session, a new resource."""
    for _ in times:
        async with managed_session() as session:
            await session.open(AsyncResource)


def run(sizes: Sizes, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything; *progress* is told what comes next."""
    return measure([one, several, on_a_loop], sizes, Report(absent={}, base=STACK), progress)


def one(sizes: Sizes, report: Report) -> None:
    """One release at the end of a block."""
    # All in one turn, since a session that opens a resource is held against a stack with one callback, too.
    loops: dict[str, Callable[..., Any]] = {
        STACK: stack_callback,
        OURS: session_callback,
        "ExitStack, a new resource's close": stack_close,
        "ExitStack, closing(a new resource)": stack_closing,
        "managed_session(), opening a resource": session_open,
        "managed_session(factory)": session_of,
        "contextlib.closing": just_closing,
    }
    passes = itertools.repeat((range(sizes.operations),)).__next__
    turns = {name: own(loop) for name, loop in loops.items()}
    series = interleave(turns, passes, sizes.rounds, sizes.operations)
    report.note_times("one release", series)

    def beside(name: str) -> str:
        closes, enters = (ratio(series, name, other) for other in list(loops)[2:4])
        return f"against one with the close of a new resource {closes:.2f}, with closing() entered {enters:.2f}"

    report.rows += [
        Row("one callback, against ExitStack with one", ratio(series, OURS, STACK), "x", LIMIT),
        *(
            Row(
                f"{name}, against ExitStack with one callback",
                ratio(series, name, STACK),
                "x",
                LIMIT,
                note=beside(name),
            )
            for name in ("managed_session(), opening a resource", "managed_session(factory)")
        ),
        Row(
            "managed_session(factory), against contextlib.closing",
            ratio(series, "managed_session(factory)", "contextlib.closing"),
            "x",
        ),
    ]


def several(sizes: Sizes, report: Report) -> None:
    """Several releases at the end of a block."""
    operations = max(1, sizes.operations // 3)
    for count in (3, 10):
        turns: dict[str, Callable[..., Any]] = {
            STACK: partial(own(stack_callbacks), count),
            OURS: partial(own(session_callbacks), count),
        }
        series = interleave(turns, itertools.repeat((range(operations),)).__next__, sizes.rounds, operations)
        report.note_times(f"{count} callbacks", series)
        report.rows.append(Row(f"{count} callbacks, against ExitStack with {count}", ratio(series, OURS, STACK), "x"))


def on_a_loop(sizes: Sizes, report: Report) -> None:
    """One asynchronous release at the end of a block."""
    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "one async callback": (async_stack_callback, async_session_callback),
        "one async resource": (async_stack_close, async_session_open),
    }
    passes = itertools.repeat((range(sizes.operations),)).__next__
    with asyncio.Runner() as runner:
        loop = runner.get_loop()

        def turn(coroutine: Callable[..., Any]) -> Callable[..., Any]:
            coroutine = own(coroutine)
            return lambda times: loop.run_until_complete(coroutine(times))

        for what, (theirs, ours) in pairs.items():
            series = interleave({STACK: turn(theirs), OURS: turn(ours)}, passes, sizes.async_rounds, sizes.operations)
            report.note_times(what, series)
            report.rows.append(
                Row(
                    f"{what}, against AsyncExitStack with one",
                    ratio(series, OURS, STACK),
                    "x",
                    note="a session shields its releases from cancellation, in a task of their own",
                )
            )
