"""A class gets ``close``, ``aclose`` and ``with`` that release what its attributes hold.

Theory of operation
-------------------
**The class's own methods run first.** Each method that closes is put in front of the class's own or inherited one. One
may call another, as ``__exit__`` calls ``close`` and that calls ``super().close()``: then the inner ones run only the
code that somebody wrote, and the outermost releases the attributes when that is done. Which objects are being closed is
in a context variable, so that threads and tasks do not take each other for inner ones.

**Once.** An attribute is claimed in a single step before it is released. What only an ``aclose`` can release stays
claimed for that, with what is left of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from hygiene.closing import GRACE, Shield, find_closer, is_async, note
from hygiene.decorators import _ABSENT, Source, can_change, checked_names, find
from hygiene.logs import logger
from hygiene.names import did_you_mean
from hygiene.registry import Registry

__all__ = ["owns"]

C = TypeVar("C", bound=type)

_OWNED = "__hygiene_owned__"
_ORIGINAL = "__hygiene_closes_for__"
_MEMBERS = (list, tuple, set, frozenset, deque)


def owns(*attributes: str) -> Callable[[C], C]:
    """
    Release what the *attributes* of an object hold when it is closed: a class decorator that returns the same class.

    The class gets ``close()``, ``aclose()``, ``with`` and ``async with``. They release the attributes in reverse order,
    each once, however often and in whichever way the object is closed, from whichever thread; who comes second does not
    wait for the first. A resource is released by the first it has of ``close``, ``aclose``, ``__exit__``,
    ``__aexit__``, ``terminate``, ``shutdown``; in ``aclose()`` and ``async with`` ``aclose`` comes first. Of a list,
    tuple, set, deque or dict each member is released, the last one first. An attribute that is ``None``, or was never
    set, is passed over: also an object whose ``__init__`` failed half-way can be closed.

    Methods of these names that the class or a base of it has keep working: their own code runs first. Leave out of it
    what is named here. Where a subclass is decorated, too, its attributes are released before those of the base.

    All releases run, whatever fails, and the failures come as one ``ExceptionGroup`` with notes. An exception from the
    body of a ``with`` is never masked: then they are logged, and noted on it. ``close()`` cannot release what has
    only an asynchronous closer; it says so among the failures, and ``aclose()`` can still be called for it. Nor can it
    run a class's own ``aclose``: such a class has no synchronous ``with``, and its ``close()`` only says so. Releases
    in ``aclose()`` go on although their task is cancelled, for at most 10 s from then; the cancellation arrives after
    them.

    An object may be opened again: what an attribute holds when it is closed the next time is released then.

    Args:
        attributes: Names of attributes, in the order in which they are set up.

    Raises:
        AttributeError: at decoration, the class never mentions an attribute of this name.
        TypeError: at decoration, this is no class, it cannot be changed, or its instances cannot be
            referred to weakly.
        ValueError: no attribute is named.
    """
    names = checked_names("owns", attributes, "release")

    def decorate(cls: C) -> C:
        if not isinstance(cls, type):
            raise TypeError(f"owns decorates a class; found {cls!r}, a {type(cls).__name__}")
        _check(cls, names)
        inherited = vars(cls).get(_OWNED)
        if isinstance(inherited, _Owned) and inherited.cls is cls:
            inherited.names = tuple(dict.fromkeys((*inherited.names, *names)))
        else:
            _Owned(cls, names)
        return cls

    return decorate


def _check(cls: type, names: tuple[str, ...]) -> None:
    """Refuse at decoration what could never work."""
    if not can_change(cls):
        raise TypeError(
            f"{cls.__qualname__} is a compiled class, which cannot be changed. Decorate a Python subclass of it"
        )
    source = Source(cls)
    for name in names:
        if find(cls, name)[1] is _ABSENT and name not in source.mentioned and not source.unreadable:
            raise AttributeError(
                f"owns was asked to release {cls.__qualname__}.{name}, but neither {cls.__qualname__} nor a base of it "
                f"mentions {name!r}{did_you_mean(name, source.mentioned)}. If it is set from outside, annotate it in "
                f"the class"
            )
    if not cls.__weakrefoffset__:
        raise TypeError(
            f"owns cannot keep account of what a {cls.__qualname__} has released: its instances cannot be referred to "
            f'weakly. Add "__weakref__" to its __slots__, or use @dataclass(slots=True, weakref_slot=True)'
        )


# --- What is put in front of the class's methods ----------------------------------------------------------------------


class _Owned:
    """The attributes that one class owns. Lives in the class, so that it goes where the class goes."""

    def __init__(self, cls: type, names: tuple[str, ...]) -> None:
        self.cls: Any = cls
        self.names = names
        type.__setattr__(cls, _OWNED, self)
        own = {name: _written(cls, name) for name in _METHODS}
        closes_later = inspect.iscoroutinefunction(own["close"]) or (own["aclose"] and not own["close"])
        enters_later = (own["__aenter__"] and not own["__enter__"]) or (own["__aexit__"] and not own["__exit__"])

        if inspect.iscoroutinefunction(own["close"]):
            self._put("close", self._closing_later(lambda obj, *args, **kw: self._next("close", obj)(*args, **kw)))
        elif closes_later:
            self._put("close", self._refuse)
        else:
            self._put("close", self._close)
        self._put("aclose", self._closing_later(self._call_aclose))
        if own["__exit__"] or not (closes_later or enters_later):
            self._put("__exit__", self._exit)
            if not own["__enter__"]:
                self._put("__enter__", _itself)
        self._put("__aexit__", self._aexit)
        if not own["__aenter__"]:
            self._put("__aenter__", _enter_later)

    def __set_name__(self, owner: type, name: str) -> None:
        # A class made again from this one's namespace: dataclass(slots=True) or attrs.define above the decorator.
        _check(owner, self.names)
        _Owned(owner, self.names)

    def _put(self, name: str, method: Callable[..., Any]) -> None:
        own = vars(self.cls).get(name)
        own = getattr(own, _ORIGINAL, own)
        shown = own or getattr(self.cls, name, None)

        def now(obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            return method(obj, *args, **kwargs)

        async def later(obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            return await method(obj, *args, **kwargs)

        put: Any = later if inspect.iscoroutinefunction(method) else now
        if shown is not None:
            functools.update_wrapper(put, shown)
        else:
            put.__name__, put.__qualname__, put.__doc__ = name, f"{self.cls.__qualname__}.{name}", _DOC.get(name)
            put.__module__ = self.cls.__module__
        setattr(put, _ORIGINAL, own)
        type.__setattr__(self.cls, name, put)

    def _next(self, name: str, obj: Any) -> Any:
        """The method that this class had before, or inherits; ``None`` if there is none."""
        own = getattr(vars(self.cls).get(name), _ORIGINAL, None)
        return getattr(super(self.cls, obj), name, None) if own is None else own.__get__(obj, type(obj))

    def _close(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        return _close_now(obj, _Failures(obj), self._next("close", obj) or _nothing, *args, **kwargs)

    def _refuse(self, _: Any) -> None:
        raise TypeError(
            f"{self.cls.__qualname__}.close() cannot run the class's own aclose(), so nothing was released. Use "
            f"`await aclose()` or `async with`"
        )

    def _exit(self, obj: Any, kind: Any, error: Any, traceback: Any) -> Any:
        if not _written(self.cls, "__exit__"):
            return _close_now(obj, _Failures(obj, error), lambda: obj.close())  # noqa: PLW0108 - looked up when it is its turn
        leave = self._next("__exit__", obj)
        return _close_now(obj, _Failures(obj, error, may_mask=True), leave, kind, error, traceback)

    def _closing_later(self, body: Callable[..., Any]) -> Callable[..., Any]:
        async def closing(obj: Any, *args: Any, **kwargs: Any) -> Any:
            return await _close_later(obj, _Failures(obj), body, obj, *args, **kwargs)

        return closing

    def _call_aclose(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        own = self._next("aclose", obj) if _written(self.cls, "aclose") else None
        return obj.close() if own is None else own(*args, **kwargs)

    async def _aexit(self, obj: Any, kind: Any, error: Any, traceback: Any) -> Any:
        written = {name: _written(self.cls, name) for name in _METHODS}
        if written["__aexit__"]:
            leave = self._next("__aexit__", obj)
        elif written["__exit__"] and not written["aclose"]:
            leave = obj.__exit__
        else:
            return await _close_later(obj, _Failures(obj, error), lambda: obj.aclose())  # noqa: PLW0108 - as above
        return await _close_later(obj, _Failures(obj, error, may_mask=True), leave, kind, error, traceback)


_METHODS = ("close", "aclose", "__enter__", "__exit__", "__aenter__", "__aexit__")
_DOC = {
    "close": "Release what this object owns; once.",
    "aclose": "Release what this object owns, also what takes an ``await``; once.",
}


def _written(cls: type, name: str) -> Any:
    """The method *name* that somebody wrote in *cls* or a base of it, or ``None``."""
    for base in cls.__mro__:
        member = vars(base).get(name)
        member = getattr(member, _ORIGINAL, member)
        if member is not None:
            return member
    return None


def _itself(obj: Any) -> Any:
    return obj


def _nothing() -> None:
    """Stand where a class has no ``close``."""


async def _enter_later(obj: Any) -> Any:
    return obj.__enter__() if _written(type(obj), "__enter__") else obj


# --- Closing an object ------------------------------------------------------------------------------------------------


# The objects that this thread or task is closing, by id.
_closing: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("hygiene_closing", default=frozenset())


def _close_now(obj: Any, failed: _Failures, body: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call *body*, then release what *obj* owns, unless a method further out does so."""
    if id(obj) in _closing.get():
        return body(*args, **kwargs)
    result = None
    _closing.set(_closing.get() | {id(obj)})
    try:
        with failed:
            result = body(*args, **kwargs)
    finally:
        _closing.set(_closing.get() - {id(obj)})
    _release_now(obj, failed)
    failed.raise_or_tell(suppressed=bool(result))
    return result


async def _close_later(obj: Any, failed: _Failures, body: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """As `_close_now`, for what may have to be awaited."""
    if id(obj) in _closing.get():
        return await _awaited(body(*args, **kwargs))
    result = None
    _closing.set(_closing.get() | {id(obj)})
    try:
        with failed:
            result = await _awaited(body(*args, **kwargs))
    finally:
        _closing.set(_closing.get() - {id(obj)})
    await _release_later(obj, failed)
    failed.raise_or_tell(suppressed=bool(result))
    return result


async def _awaited(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


class _Failures:
    """
    What goes wrong while an object is closed. As a context manager it takes what its body raises.

    Args:
        obj: What is closed.
        passing: The exception that is on its way through the ``with`` already.
        may_mask: Whether what the body raises takes the place of *passing*, as from somebody's own ``__exit__``.
    """

    def __init__(self, obj: object, passing: BaseException | None = None, *, may_mask: bool = False) -> None:
        self._what = type(obj).__qualname__
        self._passing = passing
        self._may_mask = may_mask
        self.body: BaseException | None = None
        self._releases: list[Exception] = []
        self._interrupt: BaseException | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self.body = error
        return not isinstance(error, GeneratorExit)  # a coroutine that is thrown away can await nothing more

    def add(self, error: BaseException, where: str) -> None:
        """Note what the release of *where* raised."""
        if isinstance(error, Exception):
            note(error, f"while releasing {where}")
            self._releases.append(error)
        else:
            self._interrupt = self._interrupt or error

    def raise_or_tell(self, *, suppressed: bool) -> None:
        """Raise it all as one, but mask neither what is on its way already, nor a cancellation or an interrupt."""
        passing = None if suppressed else self._passing
        first, errors = self.body or self._interrupt, self._releases
        try:
            if isinstance(first, Exception) and passing is not None and not self._may_mask:
                note(first, f"while closing {self._what}")
                errors.insert(0, first)
                first = None
            if isinstance(first, Exception) and errors:
                raise ExceptionGroup(
                    f"closing {self._what} failed, and {len(errors)} of its resources", [first, *errors]
                )
            passing = first or passing
            if errors and passing is None:
                raise ExceptionGroup(f"{len(errors)} of the resources of {self._what} could not be released", errors)
            for error in errors:
                logger.error(
                    "%s failed; the exception on its way goes on",
                    error.__notes__[-1],
                    exc_info=error,
                    extra={"event_name": "owner.release_failed", "owner": self._what},
                )
                if passing is not None:
                    passing.add_note(f"{error.__notes__[-1]}: {error!r}")
            if first is not None:
                raise first
        finally:
            del first, errors, passing  # an exception refers to this frame
            self.body = self._passing = self._interrupt = None
            self._releases = []


# --- Releasing what it owns -------------------------------------------------------------------------------------------


class _Record:
    """What one object has released."""

    __slots__ = ("released", "unfinished")

    def __init__(self) -> None:
        # By id: who claimed it, and how to find it, to tell it from a later one with the same id.
        self.released: dict[int, tuple[object, Callable[[], Any]]] = {}
        # What a synchronous closer returned to be awaited.
        self.unfinished: deque[tuple[str, Awaitable[Any]]] = deque()

    def claim(self, resource: Any) -> bool:
        """Whether *resource* is the caller's to release, in a single step."""
        found: Callable[[], Any]
        try:
            found = weakref.ref(resource)  # weakly: what is closed may go, although its owner stays
        except TypeError:
            found = functools.partial(_itself, resource)
        mine = object(), found
        held = self.released.setdefault(id(resource), mine)
        if held is not mine and held[1]() is not resource:
            self.released.pop(id(resource), None)
            return self.claim(resource)
        return held is mine


_records: dict[int, tuple[weakref.ref[Any], _Record]] = {}


def _record_of(obj: Any) -> _Record:
    key = id(obj)
    # No lock: of several threads one puts its record in, and all take that one.
    return _records.setdefault(key, (weakref.ref(obj, lambda _: _records.pop(key, None)), _Record()))[1]


def _claimed(obj: Any, record: _Record, failed: _Failures) -> Iterator[tuple[str, Any]]:
    """Where each resource of *obj* sits that nobody has released, and the resource: from now on the caller's."""
    present: set[int] = set()
    for where, resource in _resources(obj, failed):
        present.add(id(resource))
        if record.claim(resource):
            yield where, resource
    for key in record.released.keys() - present:
        record.released.pop(key, None)


def _resources(obj: Any, failed: _Failures) -> Iterator[tuple[str, Any]]:
    for base in type(obj).__mro__:
        owned = vars(base).get(_OWNED)
        for name in reversed(owned.names) if isinstance(owned, _Owned) else ():
            where = f"{type(obj).__qualname__}.{name}"
            try:
                value = _read(obj, name)
            except Exception as error:  # a property may raise anything
                failed.add(error, where)
            else:
                yield from _spread(where, value)


def _read(obj: Any, name: str) -> Any:
    """The attribute's value, or ``None``; without making what is made on its first use."""
    if isinstance(find(type(obj), name)[1], functools.cached_property):
        return vars(obj).get(name)
    try:
        return object.__getattribute__(obj, name)
    except AttributeError:
        return (getattr(obj, "__pydantic_private__", None) or {}).get(name)


def _spread(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """*value*, or what is in it if it is a container that cannot be closed itself."""
    if value is None:
        return
    # To close a registry that was not told how to close its values would only empty it.
    unclosed = isinstance(value, Registry) and value._limits.close is None
    if unclosed or find_closer(value, "auto", prefer_async=False) is None:
        if isinstance(value, Mapping):
            for key, member in reversed(list(value.items())):
                if not unclosed or find_closer(member, "auto", prefer_async=False) is not None:
                    yield from _spread(f"{where}[{key!r}]", member)
            if unclosed:
                yield where, value
            return
        if isinstance(value, _MEMBERS):
            for place, member in reversed(list(enumerate(value))):
                yield from _spread(f"{where}[{place}]", member)
            return
    yield where, value


def _closer(resource: Any, *, prefer_async: bool) -> Callable[[], Any]:
    closer = find_closer(resource, "auto", prefer_async=prefer_async)
    if closer is None:
        raise TypeError(
            f"a resource must have close(), aclose() or the like; found {resource!r:.60}, which has nothing to release "
            f"it by"
        )
    return closer


def _release_now(obj: Any, failed: _Failures) -> None:
    record = _record_of(obj)
    for where, resource in _claimed(obj, record, failed):
        try:
            closer = _closer(resource, prefer_async=False)
            result = None if is_async(closer) else closer()
            if inspect.iscoroutine(result):
                result.close()  # not begun, so aclose() can make it again
            if is_async(closer) or inspect.iscoroutine(result):
                record.released.pop(id(resource), None)
            elif inspect.isawaitable(result):
                record.unfinished.append((where, result))
            else:
                continue
            failed.add(_needs_await(obj, resource), where)
        except BaseException as error:
            failed.add(error, where)


def _needs_await(obj: Any, resource: Any) -> TypeError:
    return TypeError(
        f"{type(resource).__qualname__} can only be released asynchronously, so it is still open: use "
        f"`await {type(obj).__qualname__}.aclose()` or `async with`"
    )


async def _release_later(obj: Any, failed: _Failures) -> None:
    record, loop, shield = _record_of(obj), asyncio.get_running_loop(), Shield()
    # The body has met the cancellation already, so the shield will not.
    end = loop.time() + GRACE if isinstance(failed.body, asyncio.CancelledError) else None

    async def release(where: str, close: Callable[[], Any]) -> None:
        try:
            result = close()
            if inspect.isawaitable(result):
                await shield.run(result, where, None if end is None else max(end - loop.time(), 0.0))
        except asyncio.CancelledError:  # not this task, which the shield takes care of
            failed.add(RuntimeError(f"{where} was cancelled before it was released"), where)
        except BaseException as error:
            failed.add(error, where)

    for where, resource in _claimed(obj, record, failed):
        await release(where, functools.partial(_call_closer, resource))
    while record.unfinished:
        where, result = record.unfinished.popleft()
        await release(where, functools.partial(_itself, result))
    try:
        shield.deliver()
    except asyncio.CancelledError as error:
        failed.add(error, type(obj).__qualname__)


def _call_closer(resource: Any) -> Any:
    return _closer(resource, prefer_async=True)()
