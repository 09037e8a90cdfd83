"""How a value is released: which way, on which thread, and never lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hygiene.closing import Releases, check_closer, find_closer


def having(*names: str) -> Any:
    """A value with methods of these names, which write down how they were called."""
    calls: list[tuple[Any, ...]] = []
    namespace: dict[str, Any] = {name: lambda self, *args, name=name: calls.append((name, *args)) for name in names}
    namespace["calls"] = calls
    return type("Value", (), namespace)()


@pytest.mark.parametrize(
    ("names", "sync", "asynchronous"),
    [
        (("close",), "close", "close"),
        (("aclose", "close"), "close", "aclose"),
        (("aclose",), "aclose", "aclose"),
        (("__exit__", "__aexit__"), "__exit__", "__aexit__"),
        (("__exit__", "close"), "close", "close"),
        (("terminate",), "terminate", "terminate"),
        (("shutdown", "terminate"), "terminate", "terminate"),
        (("shutdown",), "shutdown", "shutdown"),
    ],
)
def test_auto_takes_whichever_way_there_is(names: tuple[str, ...], sync: str, asynchronous: str) -> None:
    for prefer_async, wanted in ((False, sync), (True, asynchronous)):
        value = having(*names)
        release = find_closer(value, "auto", prefer_async=prefer_async)
        assert release is not None
        release()
        arguments = (None, None, None) if wanted in {"__exit__", "__aexit__"} else ()

        assert [(wanted, *arguments)] == value.calls


def test_a_value_without_the_method_has_nothing_to_release() -> None:
    assert find_closer(3, "auto", prefer_async=False) is None
    assert find_closer(having("close"), "hang_up", prefer_async=False) is None


def test_a_callable_is_given_the_value() -> None:
    given: list[int] = []
    release = find_closer(3, given.append, prefer_async=False)
    assert release is not None
    release()

    assert [3] == given


@pytest.mark.parametrize("close", [3, "hang up", "", b"close"])
def test_what_is_no_closer_is_refused(close: Any) -> None:
    with pytest.raises(TypeError, match=r'close must be a callable, the name of a method, or "auto"; found'):
        check_closer(close)


async def test_drain_waits_for_releases_that_start_others() -> None:
    """It returns when nothing is left, also of what was started meanwhile."""
    failures: list[BaseException] = []
    releases = Releases(lambda value, error: failures.append(error))
    ended: list[int] = []

    async def close(value: int) -> None:
        await asyncio.sleep(0)
        ended.append(value)
        if value:
            releases.start(value - 1, close, asyncio.get_running_loop())

    releases.start(5, close, asyncio.get_running_loop())
    assert 1 == releases.unfinished
    async with asyncio.timeout(20):
        await releases.drain()

    assert [5, 4, 3, 2, 1, 0] == ended
    assert 0 == releases.unfinished
    assert [] == failures


async def test_a_release_that_is_cancelled_is_heard_of() -> None:
    """Its loop went down before it had ended: somebody is told."""
    failures: list[BaseException] = []
    releases = Releases(lambda value, error: failures.append(error))

    async def close(value: int) -> None:
        await asyncio.Event().wait()

    releases.start(1, close, asyncio.get_running_loop())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in list(releases._running):
        task.cancel()
    async with asyncio.timeout(20):
        await releases.drain()

    assert [asyncio.CancelledError] == [type(error) for error in failures]


def test_without_a_loop_an_asynchronous_release_waits() -> None:
    """It is not even called: nothing there could await what it returns."""
    called: list[int] = []

    async def close(value: int) -> None:
        called.append(value)

    class Closer:
        async def __call__(self, value: int) -> None:
            called.append(value)

    releases = Releases(lambda value, error: None)
    releases.start(1, close, None)
    releases.start(2, Closer(), None)
    releases.start(3, lambda value: close(value + 0), None)
    assert (3, []) == (releases.unfinished, called)
    asyncio.run(releases.drain())

    assert [1, 2, 3] == called


def test_a_failing_release_goes_to_whoever_asked_to_hear() -> None:
    failures: list[tuple[Any, BaseException]] = []
    releases = Releases(lambda value, error: failures.append((value, error)))

    def close(value: int) -> None:
        raise OSError("line is dead")

    releases.start(1, close, None)

    assert [(1, "line is dead")] == [(value, str(error)) for value, error in failures]
