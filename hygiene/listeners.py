"""Callbacks that are held weakly, in a list, set or dict that ordinary code keeps using as one.

Theory of operation
-------------------
**What is stored** is a `Listener`: it compares, hashes and calls as its callback does, and refers to it weakly. A bound
method is weak in its object, since the method itself is made anew by each access and would be dead at once.
``wrapt.WeakFunctionProxy`` does not serve: it cannot be hashed, does not equal the bound method it was made of, and
raises when it is called too late.

**Vanishing.** A weak reference's callback comes in any thread and between any two steps, also while its own thread is
inside the same list. So it never waits: it notes that something is dead, and sweeps if nobody is changing the
container. Otherwise whoever is at it sweeps when done.

**Loops** run over a snapshot and skip what has left meanwhile. Whatever dies between the step of the loop and the call
is called in vain.

**Concurrency.** Every change takes the container's lock, which is reentrant because a garbage collection may run a
finalizer that removes its own listener from here. No code of the user's runs under it, with one exception: the
``__eq__`` of callable instances, where a set or a dict compares.
"""

# ruff: noqa: D102 - what a method of a list, set or dict does is known; what differs is said in the class

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
import threading
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, Self, SupportsIndex, TypeVar, cast

from hygiene.decorators import Plan, _new
from hygiene.history import _take_over
from hygiene.janitor import survive_fork
from hygiene.logs import logger

__all__ = ["Listener", "ListenerDict", "ListenerList", "ListenerSet", "weak_listeners"]

C = TypeVar("C", bound=type)


def weak_listeners(*attributes: str) -> Callable[[C], C]:
    """
    Hold the callbacks in each of *attributes* weakly: a class decorator that returns the same class.

    From now on every list, set or dict assigned to the attribute is one whose callbacks vanish by themselves when their
    owner is collected: the object of a bound method, also inside a `functools.partial`, or the callable instance. In a
    dict the values are callbacks, or lists, sets or dicts of them.

    Code that adds, removes, compares, counts, loops and calls stays as it is. A loop never raises because a listener
    left meanwhile, and never skips one that is alive. Calling a listener whose owner is gone does nothing and gives
    ``None``, or something to await if the callback was a coroutine function.

    A plain function is held weakly, too: a lambda or nested function that nobody else holds is gone at once. The first
    that a container loses without ever having called it is logged as a warning. What cannot be referred to weakly, such
    as ``print`` or the ``append`` of a list, is kept.

    The containers may be changed from several threads.

    Args:
        attributes: Names of attributes that hold lists, sets or dicts of callbacks, of instances or of the class.

    Raises:
        AttributeError: at decoration, the class never mentions an attribute of this name.
        TypeError: at decoration, this is no class, or the attribute cannot be watched; at the assignment, it was given
            something that is neither a list, a set, a dict nor ``None``; later, something that cannot be called is
            put in.
        ValueError: no attribute is named.
    """
    return Plan.of_family("weak_listeners", attributes, _CALLBACKS, _adopt).decorate


class _Callbacks:
    """What `weak_listeners` takes for the containers of an attribute."""

    takes: type | tuple[type, ...] = (list, set, dict)
    wanted = "a list, set or dict of callbacks"
    other = "A tuple or a frozenset cannot let anything go; make it a list or a set"
    verb = "watch"

    def bounded(self, value: object) -> bool:
        """Whether its callbacks are held weakly already."""
        return isinstance(value, _Listeners)


_CALLBACKS = _Callbacks()


# --- One callback -----------------------------------------------------------------------------------------------------


class Listener:
    """
    A callback that is referred to weakly. Equal to it, hashed as it is, and callable in its place.

    Attributes are those of the callback, so that `inspect` sees a method as a method and a coroutine function as one.
    Copied or pickled it is the callback itself.
    """

    # As in wrapt: what belongs to the proxy, not to what it stands for, begins with `_self_`.
    __slots__ = (
        "__weakref__",
        "_self_arguments",
        "_self_asynchronous",
        "_self_called",
        "_self_gone",
        "_self_hash",
        "_self_kept",
        "_self_make",
        "_self_name",
        "_self_owner",
        "_self_plain",
        "_self_whole",
    )
    _self_owner: weakref.ref[Any] | None
    _self_kept: Any
    _self_make: Callable[[Any], Any] | None
    _self_arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    _self_whole: weakref.ref[Any] | None

    def __init__(self, callback: Callable[..., Any], died: Callable[[weakref.ref[Any]], object] | None = None) -> None:
        self._self_called = self._self_gone = False
        if type(callback) is Listener:
            self._self_follow(callback, died)  # pyright: ignore[reportArgumentType]
            return
        self._self_asynchronous = inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(
            type(callback).__call__
        )
        self._self_name = getattr(callback, "__qualname__", None) or f"{type(callback).__qualname__} object"
        try:
            self._self_hash: int | None = hash(callback)
        except TypeError:
            self._self_hash = None
        self._self_arguments = self._self_whole = None
        inner: Any = callback
        if isinstance(callback, functools.partial):
            # Nobody else holds the partial object as a rule, so it is taken apart. Its identity is all it compares by.
            inner = callback.func
            self._self_arguments = callback.args, callback.keywords
            self._self_whole = weakref.ref(callback)
            self._self_name = f"partial of {getattr(inner, '__qualname__', type(inner).__qualname__)}"
        owner, self._self_make = _taken_apart(inner)
        self._self_plain = type(owner) is types.FunctionType and owner is inner
        try:
            if owner is None:
                raise TypeError  # noqa: TRY301 - it goes the way of what refuses by itself
            self._self_owner = weakref.ref(owner) if died is None else _Reference(owner, died)
            self._self_kept = None
        except TypeError:
            self._self_owner = self._self_make = self._self_arguments = self._self_whole = None
            self._self_kept = callback

    def _self_follow(self, other: Listener, died: Callable[[weakref.ref[Any]], object] | None) -> None:
        """Become a second listener of the same callback, told of its end on its own."""
        for name in ("asynchronous", "name", "hash", "arguments", "whole", "make", "plain", "kept"):
            setattr(self, f"_self_{name}", getattr(other, f"_self_{name}"))
        self._self_called = other._self_called
        self._self_owner = reference = other._self_owner
        owner = None if reference is None else reference()
        if owner is not None and died is not None:
            self._self_owner = _Reference(owner, died)

    def _self_alive(self) -> bool:
        return self._self_owner is None or self._self_owner() is not None

    def _self_resolve(self) -> Any:
        """The callback, or ``None`` if its owner is gone."""
        if self._self_owner is None:
            return self._self_kept
        owner = self._self_owner()
        if owner is None:
            return None
        target = owner if self._self_make is None else self._self_make(owner)
        if self._self_arguments is not None:
            whole = None if self._self_whole is None else self._self_whole()
            return whole or functools.partial(target, *self._self_arguments[0], **self._self_arguments[1])
        return target

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        target = self._self_resolve()
        if target is None:
            return _nothing_to_await() if self._self_asynchronous else None
        self._self_called = True
        return target(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is Listener:
            if self._self_whole is not None:
                return self._self_whole is other._self_whole and self._self_alive()
            other = other._self_resolve()
        mine = self._self_resolve()
        return mine is not None and other is not None and bool(mine == other)

    def __hash__(self) -> int:
        if self._self_hash is None:
            raise TypeError(f"unhashable listener: {self._self_name} cannot be hashed, so keep it in a list")
        return self._self_hash

    def __getattr__(self, name: str) -> Any:
        target = self._self_resolve()
        if target is None:
            raise AttributeError(f"the listener {self._self_name} is gone, and {name!r} with it")
        return getattr(target, name)

    @property  # type: ignore[misc] # as in wrapt: isinstance() asks for it, type() tells the truth
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        target = self._self_resolve()
        return Listener if target is None else target.__class__

    def __repr__(self) -> str:
        return f"<weak listener {self._self_name}{'' if self._self_alive() else ', gone'}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        target = self._self_resolve()
        return _itself, (_nothing if target is None else target,)


class _Reference(weakref.ref[Any]):
    """A weak reference that knows whether its listener has been swept out already."""

    __slots__ = ("swept",)
    swept: bool

    def __new__(cls, owner: Any, callback: Callable[[weakref.ref[Any]], object]) -> Self:
        made = super().__new__(cls, owner, callback)
        made.swept = False
        return made


def _taken_apart(callback: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """Whom *callback* belongs to and how it is made again from its owner; nobody, if it has to be kept."""
    if type(callback) is types.MethodType:
        return callback.__self__, functools.partial(types.MethodType, callback.__func__)
    # Bound by something else than Python's own methods: wrapt's decorators, Cython, the methods of a deque.
    owner, name = getattr(callback, "__self__", None), getattr(callback, "__name__", None)
    if owner is not None and isinstance(name, str) and not isinstance(owner, types.ModuleType):
        with contextlib.suppress(Exception):  # any object may say that it is bound
            if getattr(owner, name) == callback:
                return owner, operator.attrgetter(name)
    return (None if isinstance(callback, types.BuiltinFunctionType) else callback), None


def _itself(target: Any) -> Any:
    return target


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Stand where a callback was that is gone."""


async def _nothing_to_await() -> None:
    """As `_nothing`."""


# --- The containers ---------------------------------------------------------------------------------------------------


class _Home:
    """What a container of listeners is beside its items."""

    __slots__ = ("__weakref__", "container", "dead", "depth", "label", "lock", "lost", "told")

    def __init__(self, container: _Listeners) -> None:
        self.container = weakref.ref(container)
        self.label = f"a {type(container).__name__}"
        self.depth = 0  # how many changes are under way, all of one thread
        self.dead = False
        self.lost: str | None = None
        self.told = False
        self.lock = threading.RLock()
        survive_fork(self)

    def _after_fork(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0

    def died(self, reference: weakref.ref[Any]) -> None:
        # When hundreds die in one collection, the first call sweeps them all out.
        if not cast("_Reference", reference).swept:
            self.dead = True
            self.sweep()

    def sweep(self) -> None:
        while self.dead and self.lock.acquire(blocking=False):
            gone: list[Listener] = []
            try:
                if self.depth:
                    return  # in the middle of a change by this very thread, which sweeps when it is done
                self.depth += 1
                try:
                    self.dead = False
                    container = self.container()
                    if container is not None:
                        gone = container._drop_dead()
                finally:
                    self.depth -= 1
            finally:
                self.lock.release()
            for listener in gone:
                listener._self_gone = True
                if listener._self_plain and not listener._self_called:
                    self.lost = listener._self_name

    def settle(self) -> None:
        """Sweep what could not be swept in time, and tell what was lost."""
        if self.dead:
            self.sweep()
        # Not told by sweep(), which may run inside somebody's log handler: a handler's queue has a lock, too.
        if self.lost is not None and not self.told:
            self.told = True
            logger.warning(
                "%s lost its listener %s before it was ever called: listeners are held weakly, and nothing else refers "
                "to that function. Keep it in an attribute of what it belongs to, or register a bound method",
                self.label,
                self.lost,
                extra={"event_name": "listeners.lost", "listeners": self.label},
            )


class _Listeners:
    """What the three kinds of containers have in common."""

    _hygiene: _Home
    _hygiene_base: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls, *args, **kwargs)
        made._hygiene = _Home(made)
        return made

    def _change(self, operation: Callable[..., Any], /, *args: Any) -> Any:
        """What *operation* returns: a single step for everybody else."""
        home = self._hygiene
        try:
            with home.lock:
                home.depth += 1
                try:
                    return operation(*args)
                finally:
                    home.depth -= 1
        finally:
            if home.dead or home.lost is not None:
                home.settle()

    def _listener(self, callback: Any) -> Listener:
        if not callable(callback):
            raise TypeError(f"{self._hygiene.label} takes callbacks; found {callback!r:.60}, which cannot be called")
        if type(callback) is Listener:
            self._hygiene.dead = True  # it may die before it is in its place, so there has to be a look afterwards
        return Listener(callback, self._hygiene.died)

    def _named(self, label: str) -> Self:
        self._hygiene.label = label
        return self

    def _settled(self) -> None:
        home = self._hygiene
        if home.dead or home.lost is not None:
            home.settle()

    def _drop_dead(self) -> list[Listener]:
        """Take out the listeners that are gone, and return them; called under the lock."""
        raise NotImplementedError

    def _strong(self, value: Any) -> Any:
        """*value* with the callback in place of each listener, dead ones left out."""
        if type(value) is Listener:
            return value._self_resolve()
        return value._twin() if isinstance(value, _Listeners) else value

    def _reduced(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """What `pickle` shall make of this: the container that it was before, with the callbacks themselves."""
        made, arguments, state, *items = cast("tuple[Any, ...]", super().__reduce_ex__(max(2, int(protocol))))
        base = self._hygiene_base
        if made is type(self):
            made = base
        elif getattr(made, "__name__", "") == "__newobj__":
            # pickle insists on that function being given the class of the object itself.
            made, arguments = (base, ()) if base in _PLAIN else (_new, (base, *arguments[1:]))
        attributes, slots = state if isinstance(state, tuple) else (state, None)
        attributes = {name: value for name, value in (attributes or {}).items() if name != "_hygiene"} or None
        return made, arguments, (attributes, slots) if slots else attributes, *items

    def _twin(self, memo: dict[int, Any] | None = None) -> Any:
        """The container that this was before, with the callbacks themselves, copied deeply if there is a *memo*."""
        made, arguments, state, *items = cast("tuple[Any, ...]", self.__reduce_ex__(4))
        follow: Callable[[Any], Any] = (lambda part: part) if memo is None else (lambda p: copy.deepcopy(p, memo))
        twin = made(*(follow(argument) for argument in arguments))
        if state:
            attributes, slots = state if isinstance(state, tuple) else (state, None)
            for name, value in {**(attributes or {}), **(slots or {})}.items():
                setattr(twin, name, follow(value))
        listed, keyed = (*items, None, None)[:2]
        if listed is not None:
            list.extend(twin, [follow(item) for item in listed])
        for key, value in keyed or ():
            twin[follow(key)] = follow(value)
        return twin

    def __copy__(self) -> Any:
        return _adopt(self._twin(), self._hygiene.label)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _adopt(self._twin(memo), self._hygiene.label)


class ListenerList(_Listeners, list[Any]):
    """A list of callbacks that are held weakly; see `weak_listeners`."""

    _hygiene_base: type = list

    def __init__(self, source: Iterable[Any] = (), /) -> None:
        super().__init__()
        self.extend(source)

    def _fill(self, source: list[Any]) -> None:
        list.extend(self, [self._listener(callback) for callback in list.__iter__(source)])

    def _drop_dead(self) -> list[Listener]:
        held = list.copy(self)
        gone = [item for item in held if not item._self_alive()]
        for item in gone:
            cast("_Reference", item._self_owner).swept = True
        if gone:
            leaving = set(map(id, gone))
            list.__setitem__(self, slice(None), [item for item in held if id(item) not in leaving])
        return gone

    def _replace(self, operation: Callable[..., Any], /, *args: Any) -> Any:
        """As `_change`, for what takes items out: loops under way are not to meet them any more."""
        left: list[Listener] = []

        def replaced() -> Any:
            before = list.copy(self)
            result = operation(*args)
            stay = set(map(id, list.copy(self)))
            left.extend(item for item in before if id(item) not in stay)
            for item in left:
                item._self_gone = True
            return result

        return self._change(replaced)

    def _snapshot(self) -> list[Listener]:
        return cast("list[Listener]", self._change(list.copy, self))

    def _walk(self, snapshot: Iterable[Listener]) -> Iterator[Listener]:
        return (item for item in snapshot if not item._self_gone and item._self_alive())

    def __len__(self) -> int:
        self._settled()
        return list.__len__(self)

    def __iter__(self) -> Iterator[Any]:
        return self._walk(self._snapshot())

    def __reversed__(self) -> Iterator[Any]:
        return self._walk(reversed(self._snapshot()))

    def append(self, callback: Any, /) -> None:
        self._change(super().append, self._listener(callback))

    def extend(self, callbacks: Iterable[Any], /) -> None:
        self._change(super().extend, [self._listener(callback) for callback in callbacks])

    def insert(self, index: SupportsIndex, callback: Any, /) -> None:
        self._change(super().insert, index, self._listener(callback))

    def remove(self, callback: Any, /) -> None:
        # Compared outside the lock, taken out by identity inside it; whoever was faster, took it.
        for item in self._snapshot():
            if item == callback and self._replace(self._take, item):
                return
        raise ValueError(f"{self._hygiene.label} has no listener {callback!r}")

    def _take(self, item: Listener) -> bool:
        for place, held in enumerate(list.copy(self)):
            if held is item:
                list.__delitem__(self, place)
                return True
        return False

    def pop(self, index: SupportsIndex = -1, /) -> Any:
        return self._replace(super().pop, index)

    def clear(self) -> None:
        self._replace(super().clear)

    def sort(self, *, key: Callable[[Any], Any] | None = None, reverse: bool = False) -> None:
        # Not in place: while a list is being sorted it is empty for everybody else.
        ordered = sorted(cast("list[Any]", self._snapshot()), key=key, reverse=reverse)
        rank = {id(item): place for place, item in enumerate(ordered)}

        def arrange() -> None:
            items = sorted(list.copy(self), key=lambda item: rank.get(id(item), len(rank)))
            list.__setitem__(self, slice(None), items)

        self._change(arrange)

    def reverse(self) -> None:
        self._change(super().reverse)

    def copy(self) -> list[Any]:
        """A plain list of the listeners, which are weak but do not vanish from it."""
        return list(self)

    def __getitem__(self, index: Any, /) -> Any:
        # What makes a new list reads a snapshot: making it may start a collection that shortens this one meanwhile.
        return self._snapshot()[index] if isinstance(index, slice) else list.__getitem__(self, index)

    def __setitem__(self, index: Any, value: Any, /) -> None:
        new = [self._listener(item) for item in value] if isinstance(index, slice) else self._listener(value)
        self._replace(super().__setitem__, index, new)

    def __delitem__(self, index: Any, /) -> None:
        self._replace(super().__delitem__, index)

    def __add__(self, other: Any, /) -> list[Any]:
        return self._snapshot() + (list(other) if isinstance(other, ListenerList) else other)

    def __iadd__(self, other: Iterable[Any], /) -> Self:  # type: ignore[misc] # any iterable, as a list
        self.extend(other)
        return self

    def __mul__(self, times: SupportsIndex, /) -> list[Any]:
        return self._snapshot() * times

    __rmul__ = __mul__

    def __imul__(self, times: SupportsIndex, /) -> Self:
        self[:] = self._snapshot() * times
        return self

    def __repr__(self) -> str:
        return repr(self._snapshot())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        made, arguments, state, _, *rest = self._reduced(protocol)
        targets = [self._strong(item) for item in self._snapshot()]
        return made, arguments, state, iter([target for target in targets if target is not None]), *rest


class ListenerSet(_Listeners, set[Any]):
    """A set of callbacks that are held weakly; see `weak_listeners`."""

    _hygiene_base: type = set

    def __init__(self, source: Iterable[Any] = (), /) -> None:
        super().__init__()
        self.update(source)

    def _fill(self, source: set[Any]) -> None:
        set.update(self, [self._listener(callback) for callback in set.__iter__(source)])

    def _drop_dead(self) -> list[Listener]:
        gone = [item for item in frozenset(self) if not item._self_alive()]
        for item in gone:
            cast("_Reference", item._self_owner).swept = True
            set.discard(self, item)
        return gone

    def _snapshot(self) -> list[Listener]:
        # frozenset() reads the storage in one step, without a loop that could be disturbed.
        return list(self._change(frozenset, self))

    def __len__(self) -> int:
        self._settled()
        return set.__len__(self)

    def __iter__(self) -> Iterator[Any]:
        return (item for item in self._snapshot() if item._self_alive() and set.__contains__(self, item))

    def add(self, callback: Any, /) -> None:
        self._change(super().add, self._listener(callback))

    def discard(self, callback: Any, /) -> None:
        self._change(super().discard, callback)

    def remove(self, callback: Any, /) -> None:
        self._change(super().remove, callback)

    def pop(self) -> Any:
        return self._change(super().pop)

    def clear(self) -> None:
        held = self._snapshot()
        self._change(super().clear)
        del held  # only now: what dies with a listener that was kept is not to die under the lock

    def copy(self) -> set[Any]:
        """A plain set of the listeners, which are weak but do not vanish from it."""
        return set(self)

    def update(self, *others: Iterable[Any]) -> None:
        for other in others:
            self._change(super().update, [self._listener(callback) for callback in other])

    def difference_update(self, *others: Iterable[Any]) -> None:
        for other in others:
            for callback in list(other):
                self.discard(callback)

    def intersection_update(self, *others: Iterable[Any]) -> None:
        self.difference_update(set(self).difference(set(self).intersection(*others)))

    def symmetric_difference_update(self, other: Iterable[Any], /) -> None:
        theirs = set(other)
        both = set(self) & theirs
        self.update(theirs - both)
        self.difference_update(both)

    def __ior__(self, other: Any, /) -> Self:  # type: ignore[misc] # any set, as a set
        return self._in_place(self.update, other)

    def __iand__(self, other: Any, /) -> Self:  # type: ignore[misc] # any set, as a set
        return self._in_place(self.intersection_update, other)

    def __isub__(self, other: Any, /) -> Self:  # type: ignore[misc] # any set, as a set
        return self._in_place(self.difference_update, other)

    def __ixor__(self, other: Any, /) -> Self:  # type: ignore[misc] # any set, as a set
        return self._in_place(self.symmetric_difference_update, other)

    def _in_place(self, change: Callable[[Any], None], other: object) -> Self:
        if not isinstance(other, (set, frozenset, KeysView, ItemsView, type({}.keys()))):
            return cast("Self", NotImplemented)
        change(other)
        return self

    def __repr__(self) -> str:
        return repr(set(self))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        made, _, state, *rest = self._reduced(protocol)
        targets = [self._strong(item) for item in self._snapshot()]
        return made, ([target for target in targets if target is not None],), state, *rest


class ListenerDict(_Listeners, dict[Any, Any]):
    """A dict whose values are callbacks that are held weakly, or containers of such; see `weak_listeners`."""

    _hygiene_base: type = dict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, value in self._entries():
            self[name] = value  # the constructors of C have put it in as it was

    def _fill(self, source: dict[Any, Any]) -> None:
        for name, value in list(source.items()):
            super().__setitem__(name, self._value(name, value))

    def _value(self, name: object, value: Any) -> Any:
        """*value* as it may stand under *name*."""
        if value is None or isinstance(value, _Listeners):
            return value
        if type(value) is not Listener and isinstance(value, (list, set, dict)):
            return _adopt(value, f"{self._hygiene.label}[{name!r}]")
        if not callable(value):
            raise TypeError(
                f"{self._hygiene.label}[{name!r}] must be a callback, or a list, set or dict of callbacks; found "
                f"{value!r:.60}"
            )
        return self._listener(value)

    def _drop_dead(self) -> list[Listener]:
        dead = [(name, item) for name, item in self._items() if type(item) is Listener and not item._self_alive()]
        for name, item in dead:
            cast("_Reference", item._self_owner).swept = True
            super().__delitem__(name)
        return [item for _, item in dead]

    def _items(self) -> list[tuple[Any, Any]]:
        return list(super().items())

    def _entries(self) -> list[tuple[Any, Any]]:
        return cast("list[tuple[Any, Any]]", self._change(self._items))

    def _walk(self, *, backwards: bool = False) -> Iterator[tuple[Any, Any]]:
        entries = self._entries()
        for name, value in reversed(entries) if backwards else entries:
            held = dict.get(self, name, _ABSENT)
            if held is value and (type(value) is not Listener or value._self_alive()):
                yield name, value
            elif held is not _ABSENT and held is not value:
                yield name, held

    def __len__(self) -> int:
        self._settled()
        return dict.__len__(self)

    def __iter__(self) -> Iterator[Any]:
        return (name for name, _ in self._walk())

    def __reversed__(self) -> Iterator[Any]:
        return (name for name, _ in self._walk(backwards=True))

    def keys(self) -> Any:
        return _Keys(self)

    def values(self) -> Any:
        return _Values(self)

    def items(self) -> Any:
        return _Items(self)

    def __setitem__(self, name: Any, value: Any, /) -> None:
        new = self._value(name, value)
        held = self.get(name)
        self._change(super().__setitem__, name, new)
        del held  # not under the lock

    def __delitem__(self, name: Any, /) -> None:
        held = self.get(name)
        self._change(super().__delitem__, name)
        del held

    def setdefault(self, name: Any, value: Any = None, /) -> Any:
        held = self.get(name, _ABSENT)
        return held if held is not _ABSENT else self._change(super().setdefault, name, self._value(name, value))

    def pop(self, name: Any, /, *default: Any) -> Any:
        return self._change(super().pop, name, *default)

    def popitem(self, *last: bool, **keyword: bool) -> tuple[Any, Any]:
        return cast("tuple[Any, Any]", self._change(functools.partial(super().popitem, *last, **keyword)))

    def clear(self) -> None:
        held = self._entries()
        self._change(super().clear)
        del held

    def copy(self) -> dict[Any, Any]:
        """A dict of the kind that this was before, of the listeners, which are weak but do not vanish from it."""
        this: Any = self
        if isinstance(this, defaultdict):
            return defaultdict(this.default_factory, self._walk())
        return OrderedDict(self._walk()) if isinstance(this, OrderedDict) else dict(self._walk())

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        source = [arg.copy() if isinstance(arg, ListenerDict) else arg for arg in args]
        for name, value in dict(*source, **kwargs).items():
            self[name] = value

    def __or__(self, other: Any, /) -> Any:
        return self.copy() | other if isinstance(other, dict) else NotImplemented

    def __ror__(self, other: Any, /) -> Any:
        return other | self.copy() if isinstance(other, dict) else NotImplemented

    def __ior__(self, other: Any, /) -> Self:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(self.copy())

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        made, arguments, state, listed, _, *rest = self._reduced(protocol)
        entries = [(name, self._strong(value), value) for name, value in self._entries()]
        alive = [(name, strong) for name, strong, value in entries if strong is not None or value is None]
        return made, arguments, state, listed, iter(alive), *rest


_ABSENT: Any = object()


class _Keys(KeysView[Any]):
    """The names in a `ListenerDict`; live, and walked over a snapshot."""

    __slots__ = ()
    _mapping: ListenerDict

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self._mapping)

    def __repr__(self) -> str:
        return f"dict_keys({list(self)!r})"


class _Values(ValuesView[Any]):
    """The listeners in a `ListenerDict`; live, and walked over a snapshot."""

    __slots__ = ()
    _mapping: ListenerDict

    def __contains__(self, value: object) -> bool:
        return any(held is value or held == value for held in self)

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self._mapping._walk())

    def __reversed__(self) -> Iterator[Any]:
        return (value for _, value in self._mapping._walk(backwards=True))

    def __repr__(self) -> str:
        return f"dict_values({list(self)!r})"


class _Items(ItemsView[Any, Any]):
    """The entries of a `ListenerDict`; live, and walked over a snapshot."""

    __slots__ = ()
    _mapping: ListenerDict

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._mapping._walk()

    def __reversed__(self) -> Iterator[tuple[Any, Any]]:
        return self._mapping._walk(backwards=True)

    def __repr__(self) -> str:
        return f"dict_items({list(self)!r})"


# --- The container that ordinary code had -----------------------------------------------------------------------------


def _adopt(value: Any, label: str) -> Any:
    """A container of weak listeners with the content and the behaviour of *value*."""
    kind: Any = _kind_of(value._hygiene_base if isinstance(value, _Listeners) else type(value))
    made = kind.__new__(kind)
    if isinstance(value, defaultdict):
        defaultdict.__init__(made, value.default_factory)
    elif isinstance(value, OrderedDict):
        OrderedDict.__init__(made)
    _take_over(cast("Any", value), made)
    made._named(label)._fill(value)
    return made


# Both sides weak: a class is known here as long as somebody uses it, and no longer.
_kinds: weakref.WeakKeyDictionary[type, weakref.ref[type[Any]]] = weakref.WeakKeyDictionary()
_kinds_lock = threading.Lock()
_PLAIN: Mapping[type, type[Any]] = {list: ListenerList, set: ListenerSet, dict: ListenerDict}
_IN_C = frozenset({OrderedDict, defaultdict})  # their methods write to their storage directly, so ours come first


def _kind_of(base: type) -> type[Any]:
    """The class that is both *base*, a list, set or dict of somebody's, and one of ours."""
    if base in _PLAIN:
        return _PLAIN[base]
    with _kinds_lock:
        known = _kinds.get(base)
        made = known() if known is not None else None
        if made is None:
            made = _combined(base)
            _kinds[base] = weakref.ref(made)
        return made


def _combined(base: type) -> type[Any]:
    if base in _IN_C:
        bases: tuple[type, ...] = (ListenerDict, base)
    else:
        # Its methods come first, and what they hand on with super() goes to ours.
        native = next(kind for kind in base.__mro__[1:] if kind in _PLAIN or kind in _IN_C)
        bases = (base, _PLAIN.get(native) or _combined(native))
    namespace: dict[str, Any] = {
        "_hygiene_base": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    missing = getattr(base, "__missing__", None)
    if missing is not None:

        def __missing__(self: Any, name: Any) -> Any:  # noqa: N807 - becomes that method
            factory = getattr(self, "default_factory", None)
            if factory is not None:
                return self.setdefault(name, factory())  # one list for all who ask at once
            made = missing(self, name)
            return self.get(name, made)  # what is stored is not what it made, but a container of ours

        namespace["__missing__"] = __missing__
    return types.new_class(base.__name__, bases, exec_body=lambda body: body.update(namespace))
