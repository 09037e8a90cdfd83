"""Leases: "I am using this", and one creation for all who ask at once."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from hygiene.closing import Closing, note, running_loop
from hygiene.errors import HygieneError, LeaseTimeout
from hygiene.janitor import aside
from hygiene.kernel import MISSING
from hygiene.waits import Deadline, wait_here, wait_in_task, works_on

if TYPE_CHECKING:
    from hygiene.registry import Registry
    from hygiene.tenure import Tenure

__all__ = ["Flight", "Lease"]

V = TypeVar("V")


class Lease(Generic[V]):
    """
    "I am using this": while one is entered, its entry neither evicts nor expires. See `Registry.lease`.

    Where the registry's store is shared by several processes, its lease on the entry is taken, too: see `Tenures`.

    Good for one ``with`` or ``async with``; another use needs another lease.
    """

    # A signal handler may raise at the entry of any function, and so of `__exit__`, before there is anything to catch
    # it. So a lease knows what it holds (`_pins`, `_flight`), each noted in the step that takes it. `_release` gives
    # all of it back; it is called again by whoever sees an exception, and by the finalizer of `_Entered` in the end.
    __slots__ = ("_create", "_flight", "_key", "_pins", "_registry", "_state", "_tenure", "_tenures", "_timeout")

    def __init__(
        self, registry: Registry[Any, V], key: Any, create: Callable[[], Any] | None, timeout: float | None
    ) -> None:
        self._registry = registry
        self._key = key
        self._create = create
        self._timeout = timeout
        self._state = "new"
        self._pins: list[Any] = []  # a key for each time that it is counted in the registry's leases
        self._flight: Flight | None = None  # in the registry's table, by this
        keeper = registry._keeper
        self._tenures = None if keeper is None else keeper.tenures
        self._tenure: Tenure | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(
                name if name.startswith("_") else f"a lease has no attribute {name!r}. {self._advice()}"
            )

        def __call__(self, *_: object, **__: object) -> Any:
            """Say how a lease is used."""
            raise TypeError(f"a lease is not called. {self._advice()}")

    def _advice(self) -> str:
        return f"Enter it, and use what it gives: `with registry.lease({self._key!r}) as value:`, or `async with`"

    def __enter__(self) -> V:
        deadline = self._begin()
        tenures = self._tenures
        try:
            if tenures is None:
                return self._enter(deadline)
            self._await_close(deadline)
            with self._pinned():
                tenure = self._tenure = tenures.enter(self._key, deadline)
                try:
                    return self._enter(deadline)
                except BaseException as error:
                    tenures.leave(self._key, tenure, error)
                    raise
        except BaseException:
            self._release()
            raise

    def _enter(self, deadline: Deadline | None) -> V:
        registry, key = self._registry, self._key
        while True:
            if registry._closings:
                self._await_close(deadline)
            value = registry._pin(key, self._pins)
            if value is not MISSING:
                break
            create, ours = self._creator()
            flight, mine = self._board(sync=True)
            if flight is None:
                continue
            try:
                if not mine:
                    flight.wait_here(deadline)
                    continue
                with flight.flown_by(registry):
                    place = registry._take_place(key) if ours else None
                    try:
                        made = create()
                        if isinstance(made, Awaitable):
                            if isinstance(made, Coroutine):
                                made.close()
                            raise TypeError(f"create for key {key!r} is asynchronous: use `async with` for the lease")
                        value = registry._pin_new(key, made, self._pins)
                    finally:
                        registry._give_place_back(place)
            finally:
                del flight  # it holds the exception, whose traceback holds this frame
            self._flight = None
            break
        self._state = "held"
        return cast("V", value)

    def __exit__(self, *exc_info: object) -> None:
        try:
            error = _error_in(exc_info)
            try:
                self._end(error)
            finally:
                if self._tenures is not None and self._state == "over":
                    self._state = "given back"
                    assert self._tenure is not None
                    self._tenures.leave(self._key, self._tenure, error)
        except BaseException:
            self._release()
            raise
        self.__class__ = Lease  # pyright: ignore[reportAttributeAccessIssue] # of the same layout

    async def __aenter__(self) -> V:
        deadline = self._begin()
        tenures = self._tenures
        try:
            if tenures is None:
                return await self._aenter(deadline)
            await self._aawait_close(deadline)
            with self._pinned():
                tenure = self._tenure = await tenures.aenter(self._key, deadline)
                try:
                    return await self._aenter(deadline)
                except BaseException as error:
                    await tenures.aleave(self._key, tenure, error)
                    raise
        except BaseException:
            self._release()
            raise

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[None]:
        """A block in which the entry stays, once it has come."""
        registry, key = self._registry, self._key
        registry._settle(key)  # a leased entry does not expire
        with registry._lock:
            registry._pin_row(key, self._pins)
        try:
            yield
        finally:
            registry._unpin(key, self._pins)

    async def _aenter(self, deadline: Deadline | None) -> V:
        registry, key = self._registry, self._key
        while True:
            if registry._closings:
                await self._aawait_close(deadline)
            value = registry._pin(key, self._pins)
            if value is not MISSING:
                break
            create, ours = self._creator()
            flight, mine = self._board(sync=False)
            if flight is None:
                continue
            try:
                if not mine:
                    await flight.wait(deadline)
                    continue
                with flight.flown_by(registry):
                    place = registry._take_place(key) if ours else None
                    try:
                        made = create()
                        if isinstance(made, Awaitable):
                            made = await made
                        value = registry._pin_new(key, made, self._pins)
                    finally:
                        registry._give_place_back(place)
            finally:
                del flight  # it holds the exception, whose traceback holds this frame
            self._flight = None
            break
        self._state = "held"
        return cast("V", value)

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            error = _error_in(exc_info)
            try:
                self._end(error)
            finally:
                if self._tenures is not None and self._state == "over":
                    self._state = "given back"
                    assert self._tenure is not None
                    await self._tenures.aleave(self._key, self._tenure, error)
        except BaseException:
            self._release()
            raise
        self.__class__ = Lease  # pyright: ignore[reportAttributeAccessIssue] # of the same layout

    def _begin(self) -> Deadline | None:
        if self._state != "new":
            raise RuntimeError(f"the lease on {self._key!r} was used already; ask the registry for another one")
        self._state = "entering"
        self.__class__ = _Entered  # pyright: ignore[reportAttributeAccessIssue] # of the same layout
        return None if self._timeout is None else Deadline(self._timeout)

    def _end(self, error: BaseException | None = None) -> None:
        if self._state == "held":
            self._state = "over"
            try:
                self._registry._unpin(self._key, self._pins)
            except HygieneError as failed:  # what was changed inside cannot be saved
                if error is None:
                    raise
                note(error, f"while the lease of {self._key!r} ended: {failed}")

    def _release(self) -> None:
        """Give back what this still holds: nothing, unless a signal handler has raised in the middle of it."""
        registry, flight = self._registry, self._flight
        while self._pins:
            with contextlib.suppress(HygieneError):  # another exception is on its way
                registry._unpin(self._key, self._pins)
        if flight is not None:
            self._flight = None
            with registry._lock:
                if registry._flights.get(flight.key) is flight:
                    del registry._flights[flight.key]
            if not flight.ended:
                flight.land(None)
        self.__class__ = Lease  # pyright: ignore[reportAttributeAccessIssue] # of the same layout

    def _creator(self) -> tuple[Callable[[], Any], bool]:
        """
        How to make the value; and whether that is a factory, which is not called before there is room.

        A user's own ``__missing__`` may raise KeyError, and no entry must leave for that.
        """
        registry, key = self._registry, self._key
        factory = registry._factory() if self._create is None else self._create
        if factory is not None:
            return factory, True
        return lambda: registry.__missing__(key), False  # raises KeyError if there is no way to make one

    def _closing(self) -> Closing | None:
        """The close of an earlier value that a new one must wait for, if this lease can make or load one."""
        registry = self._registry
        closing = registry._closing_of(self._key)
        if closing is None or registry._saves or self._create is not None or registry._factory() is not None:
            return closing
        return None

    def _await_close(self, deadline: Deadline | None) -> None:
        while (closing := self._closing()) is not None:
            if not wait_here(closing, closing.promise, deadline, closing.assist):
                raise self._too_late(deadline)

    async def _aawait_close(self, deadline: Deadline | None) -> None:
        while (closing := self._closing()) is not None:
            if not await wait_in_task(closing, closing.promise, deadline, closing.assist):
                raise self._too_late(deadline)

    def _too_late(self, deadline: Deadline | None) -> LeaseTimeout:
        assert deadline is not None
        return deadline.missed(self._key, "its previous value is still being closed")

    def _board(self, *, sync: bool) -> tuple[Flight | None, bool]:
        """The creation of the value, and whether it is this lease's; none if an earlier value is being closed."""
        registry = self._registry
        with registry._lock:
            flight = registry._flights.get(self._key)
            if flight is not None:
                return flight, False
            if registry._closings and self._closing() is not None:
                return None, False
            flight = Flight(self._key, registry._name, sync=sync)
            registry._flights[self._key] = self._flight = flight  # one step: no signal handler runs in between
            return flight, True


class _Entered(Lease[V]):
    """
    A lease from when it is entered until it has given everything back.

    A class of its own, because the exception of a signal handler that arrives in a finalizer is lost. So no finalizer
    runs for a lease that ended as it should.
    """

    __slots__ = ()

    def __del__(self) -> None:
        if not self._pins and self._flight is None:
            return
        # Interrupted where nothing could catch it. The lock is not waited for: a finalizer runs at any moment.
        lock = self._registry._lock
        if lock.acquire(blocking=False):
            try:
                self._release()
            finally:
                lock.release()
        else:
            registry, key, pins = self._registry, self._key, self._pins
            aside(lambda: registry._unpin(key, pins) if pins else None, "lease-release")


def _error_in(exc_info: tuple[object, ...]) -> BaseException | None:
    return next((part for part in exc_info if isinstance(part, BaseException)), None)


class Flight:
    """One creation in progress, which others wait for instead of creating too: a `hygiene.waits.Target`."""

    __slots__ = ("__weakref__", "_done", "key", "loop", "name", "sync", "task", "thread")

    doing = "creating"

    def __init__(self, key: Any, name: str | None, *, sync: bool) -> None:
        self.key = key
        self.name = name
        self.sync = sync
        self.thread = threading.get_ident()
        self.loop = loop = running_loop()
        self.task = None if loop is None else asyncio.current_task(loop)
        self._done: futures.Future[None] = futures.Future()
        self._done.set_running_or_notify_cancel()  # so that a cancelled waiter cannot cancel it for the others

    @property
    def ended(self) -> bool:
        """True if it has landed."""
        return self._done.done()

    def wait_here(self, deadline: Deadline | None) -> None:
        """Wait in this thread."""
        try:
            if not wait_here(self, self._done, deadline):
                raise self._late(deadline)
            self._done.result()
        finally:
            del self  # as in `Lease.__enter__`

    async def wait(self, deadline: Deadline | None) -> None:
        """Wait in this task."""
        try:
            if not await wait_in_task(self, self._done, deadline):
                raise self._late(deadline)
            self._done.result()
        finally:
            del self  # as in `Lease.__enter__`

    def _late(self, deadline: Deadline | None) -> LeaseTimeout:
        assert deadline is not None
        return deadline.missed(self.key, "another caller is still creating it")

    def flown_by(self, registry: Registry[Any, Any]) -> _Landing:
        """A block in which this flight ends."""
        return _Landing(self, registry)

    def land(self, error: BaseException | None) -> None:
        """Let those who wait go on."""
        if isinstance(error, Exception):
            self._done.set_exception(error)
        else:
            # Cancelled or interrupted is the creator's own fate: somebody who waits tries in its place.
            self._done.set_result(None)


class _Landing:
    """Ends a flight, however it ends."""

    __slots__ = ("_flight", "_outer", "_registry")

    def __init__(self, flight: Flight, registry: Registry[Any, Any]) -> None:
        self._flight = flight
        self._registry = registry

    def __enter__(self) -> None:
        self._outer = works_on.set(weakref.ref(self._flight))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        flight = self._flight
        try:
            with self._registry._lock:
                if self._registry._flights.get(flight.key) is flight:
                    del self._registry._flights[flight.key]
            if not flight.ended:
                flight.land(error)
        finally:
            with contextlib.suppress(ValueError):  # a coroutine that was dropped is closed in another context
                works_on.reset(self._outer)
