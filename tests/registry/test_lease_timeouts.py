"""How long a lease waits for other callers and other processes, and what it says if that was too long."""

from __future__ import annotations

import asyncio
import datetime as dt
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import hygiene
from hygiene.errors import HygieneError, LeaseTimeout
from hygiene.registry import Registry
from hygiene.tenure import Tenures
from hygiene.waits import Deadline

PATIENCE = 20.0


@pytest.mark.parametrize("timeout", [0, 0.02, "20ms", dt.timedelta(milliseconds=20)])
def test_a_thread_waits_for_another_factory_no_longer_than_its_timeout(
    timeout: Any, together: Callable[..., None]
) -> None:
    registry: Registry[str, Any] = Registry()
    begun, go = threading.Event(), threading.Event()

    def create() -> str:
        begun.set()
        assert go.wait(PATIENCE)
        return "made"

    def first() -> None:
        with registry.lease("a", create, timeout=timeout) as value:  # the time of its own factory does not count
            assert "made" == value

    def second() -> None:
        assert begun.wait(PATIENCE)
        try:
            with (
                pytest.raises(LeaseTimeout, match=r"the lease of 'a' timed out after 0(\.02)? s: another caller is"),
                registry.lease("a", create, timeout=timeout),
            ):
                pass
        finally:
            go.set()
        with registry.lease("a", create, timeout=PATIENCE) as value:
            assert "made" == value

    together(first, second)

    assert 0 == registry.stats().leased


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_a_task_waits_for_another_factory_no_longer_than_its_timeout(timeout: float) -> None:
    """The one who gives up disturbs neither the creator nor those who wait longer."""
    registry: Registry[str, Any] = Registry()
    go = asyncio.Event()

    async def create() -> str:
        await go.wait()
        return "made"

    async def use(timeout: float | None) -> Any:
        async with registry.lease("a", create, timeout=timeout) as value:
            return value

    async with asyncio.timeout(PATIENCE):
        tasks = [asyncio.create_task(use(limit)) for limit in (timeout, None, PATIENCE)]
        await asyncio.sleep(0)
        with pytest.raises(LeaseTimeout):
            await use(timeout)
        go.set()

        assert ["made"] * 3 == await asyncio.gather(*tasks)


def test_what_is_there_needs_no_time() -> None:
    registry: Registry[str, int] = Registry({"a": 1})
    with registry.lease("a", timeout=0) as value:
        assert 1 == value


def test_the_error_is_a_timeout_and_one_of_ours() -> None:
    error = Deadline(0.5).missed("a", "another caller is still creating it")

    assert isinstance(error, TimeoutError)
    assert isinstance(error, HygieneError)
    assert hygiene.LeaseTimeout is LeaseTimeout
    assert str(error) == str(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), ("soon", ValueError), (True, TypeError), (object(), TypeError)]
)
def test_a_bad_timeout_is_refused_at_the_call(timeout: Any, error: type[Exception]) -> None:
    registry: Registry[str, int] = Registry()
    with pytest.raises(error, match="timeout must be positive"):
        registry.lease("a", dict, timeout=timeout)


def test_an_unknown_keyword_is_refused() -> None:
    registry: Any = Registry()
    with pytest.raises(TypeError, match="exclusive"):
        registry.lease("a", dict, exclusive=True)


class Store:
    """A store whose lease another process has."""

    def lease(self, space: str, key: Any, *, ttl: float) -> int | None:
        return None

    def versions(self, space: str, keys: list[Any]) -> list[int]:
        return [0] * len(keys)


def tenures() -> Tenures:
    writer = SimpleNamespace(fence=lambda key, token: None, _fences={})
    keeper: Any = SimpleNamespace(store=Store(), space="chats", writer=writer, _check_open=lambda: None)
    return Tenures(keeper)


@pytest.mark.parametrize("timeout", [0.0, 0.02])
def test_another_process_is_waited_for_no_longer_than_the_timeout(timeout: float) -> None:
    with pytest.raises(LeaseTimeout, match="another process holds it"):
        tenures().enter("a", Deadline(timeout))


@pytest.mark.parametrize("timeout", [0.0, 0.02])
async def test_a_task_waits_for_another_process_no_longer_than_its_timeout(timeout: float) -> None:
    leased = tenures()
    async with asyncio.timeout(PATIENCE):
        first = asyncio.create_task(leased.aenter("a"))
        await asyncio.sleep(0)
        with pytest.raises(LeaseTimeout, match="another caller still acquires it"):
            await leased.aenter("a", Deadline(timeout))
        first.cancel()
        await asyncio.wait([first])
        with pytest.raises(LeaseTimeout, match="another process holds it"):
            await leased.aenter("a", Deadline(timeout))


def test_a_lease_used_without_with_says_what_to_do() -> None:
    registry: Registry[str, Any] = Registry()
    lease: Any = registry.lease("ann", list)

    with pytest.raises(AttributeError, match=r"no attribute 'append'.*`with registry.lease\('ann'\) as value:`"):
        lease.append(1)
    with pytest.raises(TypeError, match=r"a lease is not called.*`with registry.lease\('ann'\) as value:`"):
        lease()
    assert not hasattr(lease, "append")
    with lease as value:
        value.append(1)

    assert {"ann": [1]} == registry
