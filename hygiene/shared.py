"""One resource for many: loaded once and shared by all, or one for each thread and task.

Both close what they opened: `shared_resource` when nobody has used it for a while, `managed_local` when its thread or
task ends, and `shutdown` what is left.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from sys import getrefcount
from typing import Any, Generic, ParamSpec, TypeVar, cast

from cachetools.keys import hashkey

from hygiene.cleanup import close_at_shutdown
from hygiene.closing import Closer, Releases, check_closer, find_closer, is_async, running_loop
from hygiene.events import Entry
from hygiene.janitor import leave_alone, survive_fork
from hygiene.logs import logger
from hygiene.pins import Lease
from hygiene.references import own_references
from hygiene.registry import Registry
from hygiene.units import Duration, seconds

__all__ = ["ManagedLocal", "SharedLease", "SharedResource", "managed_local", "shared_resource"]


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class SharedResource(Generic[P, R]):
    """
    A factory whose result is shared: the first call makes it, the others get it. See `shared_resource`.

    Called with other arguments it makes another one, as ``functools.cache`` would; all arguments must be hashable.
    """

    def __init__(
        self,
        factory: Callable[P, R],
        *,
        idle: Duration | None,
        close: Closer,
        timer: Callable[[], float],
    ) -> None:
        functools.update_wrapper(self, factory, updated=())  # the factory may be a class, with a `close` of its own
        self._factory = factory
        self._async = inspect.iscoroutinefunction(factory)
        self._name = getattr(factory, "__qualname__", type(factory).__name__)
        self._known = False
        self._end = _AsyncEnd(self)
        self._resources: Registry[Any, _Shared] = Registry(
            idle=idle,
            close=functools.partial(_close_shared, close),
            busy=_in_use if idle is not None else None,
            name=self._name,
            timer=timer,
        )
        self._resources._known = True  # it is this that the shutdown closes
        survive_fork(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """
        The resource for these arguments, made now if there is none.

        An asynchronous factory gives an awaitable, and one resource for each event loop. However many threads or tasks
        ask at once, the factory is called once; if it raises, all of them get the error, and the next call tries again.
        """
        if self._async:
            return cast("R", self._acall(args, kwargs))
        key = hashkey(*args, **cast("dict[str, Any]", kwargs))
        shared = self._resources.get(key)
        if shared is None:
            with self._lease(key, args, kwargs) as shared:
                pass
        return cast("R", shared.resource)

    async def _acall(self, args: Any, kwargs: Any) -> Any:
        key = self._key_here(args, kwargs)
        shared = self._resources.get(key)
        if shared is None:
            async with self._lease(key, args, kwargs) as shared:
                pass
        return shared.resource

    def lease(self, *args: P.args, **kwargs: P.kwargs) -> SharedLease[Any]:
        """
        The resource for the time of a ``with`` (or ``async with``) block, in which it is not closed.

        Calling is enough where the resource is referred to for as long as it is used. A lease is for those who keep
        only something made from it, such as a cursor.
        """
        key = self._key_here(args, kwargs) if self._async else hashkey(*args, **cast("dict[str, Any]", kwargs))
        return SharedLease(self._lease(key, args, kwargs))

    def expire(self) -> int:
        """Close what has been idle for long enough; the janitor does this by itself. Returns how many."""
        return self._resources.expire()

    def close(self) -> None:
        """
        Close what was made; the next call makes another one.

        What is closed asynchronously is so on its event loop: `aclose` waits for that.
        """
        self._resources.close()

    async def aclose(self) -> None:
        """`close`, and wait until everything is closed."""
        await self._resources.aclose()

    def __repr__(self) -> str:
        return f"<shared_resource {self._name!r}: {len(self._resources)} open>"

    def _key_here(self, args: Any, kwargs: Any) -> Any:
        loop = asyncio.get_running_loop()
        for key in list(self._resources):
            if key[0] is not loop and key[0].is_closed():
                self._resources.evict(key)  # nobody can use it any more
        return (loop, hashkey(*args, **kwargs))

    def _lease(self, key: Any, args: Any, kwargs: Any) -> Lease[_Shared]:
        create: Callable[..., Any] = self._amake if self._async else self._make
        return self._resources.lease(key, functools.partial(create, args, kwargs))

    def _make(self, args: Any, kwargs: Any) -> _Shared:
        factory: Callable[..., Any] = self._factory
        return self._made(_Shared(factory(*args, **kwargs)))

    async def _amake(self, args: Any, kwargs: Any) -> _Shared:
        factory: Callable[..., Awaitable[Any]] = cast("Any", self._factory)
        return self._made(_Shared(await factory(*args, **kwargs)))

    def _made(self, shared: _Shared) -> _Shared:
        # Parts of a resource may refer back to it, and its factory may have passed it on, to a thread, say.
        # These references are counted now, while no caller has one.
        shared.alone = getrefcount(shared.resource)
        shared.own = own_references(shared.resource)
        if not self._known:
            self._known = True
            self._end._home = running_loop() if self._async else None
            close_at_shutdown(self._end if self._async else self, f"shared resource {self._name!r}")
        return shared

    def _after_fork(self) -> None:
        # What the parent opened stays its own: it is not closed here, nor collected, which may close it, too.
        resources = self._resources
        resources._after_fork()
        leave_alone(list(resources.values()))
        resources.clear()
        self._known = False


class _AsyncEnd:
    """The end of an asynchronous shared resource, as `shutdown` sees it: it needs an event loop."""

    def __init__(self, shared: SharedResource[Any, Any]) -> None:
        self._shared = weakref.ref(shared)
        self._home: asyncio.AbstractEventLoop | None = None

    @property
    def _known(self) -> bool:
        shared = self._shared()
        return shared is not None and shared._known

    @_known.setter
    def _known(self, known: bool) -> None:
        shared = self._shared()
        if shared is not None:
            shared._known = known

    async def aclose(self) -> None:
        shared = self._shared()
        if shared is not None:
            await shared.aclose()


class _Later:
    """An asynchronous release that is called when it is awaited: until then there may be no loop to await it on."""

    __slots__ = ("_release",)

    def __init__(self, release: Callable[[], Any]) -> None:
        self._release = release

    def __await__(self) -> Any:
        return self._release().__await__()


class _Shared:
    """One shared resource, and the references to it when it was made: all, and those from its own parts."""

    __slots__ = ("alone", "own", "resource")

    def __init__(self, resource: Any) -> None:
        self.resource = resource
        self.alone = self.own = 0


class SharedLease(Generic[T]):
    """Keeps a shared resource open for the time of one block. See `SharedResource.lease`."""

    __slots__ = ("_lease",)

    def __init__(self, lease: Lease[_Shared]) -> None:
        self._lease = lease

    def __enter__(self) -> T:
        return cast("T", self._lease.__enter__().resource)

    def __exit__(self, *exc_info: object) -> None:
        self._lease.__exit__(*exc_info)

    async def __aenter__(self) -> T:
        return cast("T", (await self._lease.__aenter__()).resource)

    async def __aexit__(self, *exc_info: object) -> None:
        await self._lease.__aexit__(*exc_info)


def _in_use(entry: Entry[Any, _Shared]) -> bool:
    """True if another part of the program refers to the resource, which may have got more parts since it was made."""
    shared = entry.value
    count = getrefcount(shared.resource)
    return count > shared.alone and count - own_references(shared.resource) > shared.alone - shared.own


def _close_shared(close: Closer, shared: _Shared) -> Any:
    # Called on the loop that the resource was made on, or where there is none, on the thread that lets go of it.
    release = find_closer(shared.resource, close, prefer_async=running_loop() is not None)
    if release is not None:
        return _Later(release) if running_loop() is None and is_async(release) else release()
    if close != "auto":
        raise AttributeError(f"{type(shared.resource).__name__!r} object has no method {close!r}")
    return None


def shared_resource(
    idle: Duration | None = None, close: Closer = "auto", *, timer: Callable[[], float] = time.monotonic
) -> Callable[[Callable[P, R]], SharedResource[P, R]]:
    """
    Make a factory give one resource to all: the client of a service, a loaded model, an index.

    Safe to call from any thread and task. The factory runs in the thread or task that asks first, and the others wait
    for it. It is closed when nobody has asked for it for *idle*, and nobody refers to it, or at `shutdown`. The next
    call waits until it is closed. After ``fork`` the child makes its own.

    Args:
        idle: Seconds (or "10m", a ``timedelta``) without a call after which it is closed; the next call makes another
            one. Who still refers to the resource then, keeps it open. ``None``, the default: until `shutdown`.
        close: How it is closed: a callable, the name of a method, or "auto" (``close``, ``aclose``, ``__exit__``, ...).
        timer: Returns monotonic seconds. Tests pass a `testing.ManualClock`, and call ``expire()``.

    Raises:
        TypeError: *close* is none of these.
        ValueError: *idle* is not positive.
    """
    if callable(cast("object", idle)):
        raise TypeError("shared_resource takes its arguments first: write @shared_resource() above the factory")
    check_closer(close, required=True)
    if idle is not None:
        seconds(idle, "idle")
    return functools.partial(SharedResource, idle=idle, close=close, timer=timer)


class ManagedLocal(Generic[T]):
    """A value for each thread, or for each task where one runs. See `managed_local`."""

    def __init__(self, factory: Callable[[], T], close: Closer) -> None:
        functools.update_wrapper(self, factory, updated=())  # the factory may be a class, with a `close` of its own
        self._factory = factory
        self._async = inspect.iscoroutinefunction(factory)
        self._close = close
        self._name = getattr(factory, "__qualname__", type(factory).__name__)
        self._releases = Releases(functools.partial(_closing_failed, self._name))
        self._known = False
        self._start()
        survive_fork(self)

    def _start(self) -> None:
        self._threads = threading.local()
        self._tasks: weakref.WeakKeyDictionary[asyncio.Task[Any], _Keeper] = weakref.WeakKeyDictionary()
        self._keepers: dict[int, weakref.ref[_Keeper]] = {}

    def __call__(self) -> T:
        """This thread's or task's value, made now if there is none; an awaitable if the factory is asynchronous."""
        if self._async:
            return cast("T", self._acall())
        task = self._task()
        keeper = self._find(task)
        return cast("T", (keeper or self._keep(task, self._factory())).value)

    async def _acall(self) -> Any:
        task = self._task()
        keeper = self._find(task)
        return (keeper or self._keep(task, await cast("Awaitable[Any]", self._factory()))).value

    def close(self) -> None:
        """Close every thread's and task's value now; the next call of each makes another one."""
        for reference in list(self._keepers.values()):
            keeper = reference()
            if keeper is not None:
                keeper.release()

    async def aclose(self) -> None:
        """`close`, and wait until everything is closed."""
        self.close()
        await self._releases.drain()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._keepers)

    def __repr__(self) -> str:
        return f"<managed_local {self._name!r}: {len(self)} open>"

    def _task(self) -> asyncio.Task[Any] | None:
        loop = running_loop()
        return None if loop is None else asyncio.current_task(loop)

    def _find(self, task: asyncio.Task[Any] | None) -> _Keeper | None:
        keeper: _Keeper | None = getattr(self._threads, "keeper", None) if task is None else self._tasks.get(task)
        return None if keeper is None or not keeper.held else keeper

    def _keep(self, task: asyncio.Task[Any] | None, value: Any) -> _Keeper:
        keeper = _Keeper(value, self._close, running_loop(), self._releases, self._keepers)
        if task is None:
            self._threads.keeper = keeper
        else:
            self._tasks[task] = keeper
            task.add_done_callback(lambda _: keeper.release())
        if not self._known:
            self._known = True
            close_at_shutdown(self, repr(self._name))
        return keeper

    def _after_fork(self) -> None:
        # As for shared resources: what the parent's threads opened is theirs.
        for reference in list(self._keepers.values()):
            keeper = reference()
            if keeper is not None:
                leave_alone(list(keeper.held))
                keeper.held.clear()
        self._releases._after_fork()
        self._start()
        self._known = False


class _Keeper:
    """
    Holds a value for as long as its thread or task lives, and releases it once.

    Its finalizer does work, which is the exception in this library: a thread's locals are collected when it ends, in
    the thread itself, and there is no other sign of that.
    """

    __slots__ = ("__weakref__", "_close", "_keepers", "_loop", "_releases", "held")

    def __init__(
        self,
        value: Any,
        close: Closer,
        loop: asyncio.AbstractEventLoop | None,
        releases: Releases,
        keepers: dict[int, weakref.ref[_Keeper]],
    ) -> None:
        self.held = [value]  # who takes it out releases it
        self._close = close
        self._loop = loop
        self._releases = releases
        self._keepers = keepers
        keepers[id(self)] = weakref.ref(self)

    @property
    def value(self) -> Any:
        return self.held[0]

    def release(self) -> None:
        try:
            value = self.held.pop()
        except IndexError:
            return
        self._keepers.pop(id(self), None)
        self._releases.start(value, self._close, self._loop)

    def __del__(self) -> None:
        self.release()


def managed_local(factory: Callable[[], T], close: Closer = "auto") -> ManagedLocal[T]:
    """
    One value for each thread (or task, where one runs), which is closed when the thread or task ends.

    What ``threading.local`` leaves to the collector, and what a pool would be too much for: a connection, a parser, a
    buffer. Usable as a decorator of the factory. Call the result to get the value. `shutdown` closes what is left.

    Args:
        factory: Makes a value; called in the thread or task that asks. If it is asynchronous, await the result of the
            call.
        close: How a value is closed: a callable, the name of a method, or "auto" (``close``, ``aclose``, ``__exit__``,
            ...). It is called in the thread that ends, or on the loop of the task that ended. What it raises is logged.

    Raises:
        TypeError: *factory* is not callable, or *close* is none of these.
    """
    if not callable(factory):
        raise TypeError(f"managed_local needs a factory, a callable without arguments; found {factory!r}")
    check_closer(close, required=True)
    return ManagedLocal(factory, close)


def _closing_failed(name: str, value: Any, error: BaseException) -> None:
    logger.error(
        "closing a %r of managed_local %r failed",
        type(value).__name__,
        name,
        exc_info=error,
        extra={"event_name": "local.close_failed", "local": name},
    )
