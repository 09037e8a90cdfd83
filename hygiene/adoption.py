"""The dict of somebody else becomes a registry.

What a decorator finds in an attribute is a dict, or a subclass of it with methods and attributes of its own. The
registry that takes its place has to behave as it did, so its class is made at run time, of both: the user's comes first
and the registry's stands behind it, where its methods go when they call ``super()`` or ``self``. One class is made for
each pair, and reused.

Three things are in the way. Two owners of one attribute would overwrite each other, so a class that uses a name of the
registry's is refused. A dict whose attributes are its entries must not take the registry's state for such. And the
layout of ``defaultdict`` is C's, so that nothing can be it and a registry; a subclass of it is rebuilt.

A class made at run time is not found by its name. So what is adopted is pickled by the user's class, and made again
where it is loaded.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from sys import getrefcount
from typing import Any, TypeVar

from hygiene.kernel import STATE
from hygiene.limits import LIVE, Limits
from hygiene.registry import PASSED_ON, Registry, Timed, make

__all__ = ["adopt", "fill", "give_back", "like", "retire"]

K = TypeVar("K")
V = TypeVar("V")

_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def adopt(
    source: dict[K, V],
    limits: Limits,
    *,
    owner: object | None = None,
    name: str | None = None,
) -> Registry[K, V]:
    """
    A registry with the content and the behaviour of *source*: what a decorated attribute becomes.

    A ``defaultdict`` keeps its factory, a user's subclass of dict its methods and attributes, in a class that is both.

    Args:
        source: The dict to take over; it is not changed.
        limits: What the registry keeps to. Content beyond the bound leaves at once, oldest first.
        owner: The object whose attribute it is.
        name: What logs call it, unless *limits* name it.

    Raises:
        TypeError: the class of *source* cannot be extended.
    """
    registry: Registry[K, V] = like(source, limits, owner, name, Registry)
    registry._begin_keeping()
    try:
        filled: Registry[K, V] = fill(registry, source)
    except BaseException:
        give_back(registry)
        raise
    return filled


def like(source: dict[Any, Any], limits: Limits, owner: object | None, name: str | None, kind: type[Any]) -> Any:
    """An empty registry of *kind* that behaves as *source*."""
    # Not of any dict: where attributes are entries, asking for one may make it.
    factory = source.default_factory if isinstance(source, (defaultdict, Registry)) else None
    if factory is not None and limits.default_factory is None:
        limits = limits.merge(default_factory=factory)
    registry = make(_adopting(type(source), kind), limits, owner)
    registry._name = limits.name or name
    attributes = getattr(source, "__dict__", {})
    if attributes and not isinstance(source, Registry):
        _refuse_clash(type(source), attributes)
    registry.__dict__.update(attributes)
    return registry


def fill(registry: Any, source: dict[Any, Any]) -> Any:
    """Put the entries of *source* in; a user's own ``update`` (a Counter's) would do something else with them."""
    for key, value in source._walk_items() if isinstance(source, Registry) else list(dict.items(source)):
        registry[key] = value
    return registry


def give_back(registry: Registry[Any, Any], earlier: Registry[Any, Any] | None = None) -> None:
    """The attribute was not assigned after all: the registry that had its store before keeps it again."""
    if registry._keeper is not None:
        registry._keeper.hand_back()
    elif earlier is not None and earlier._sizes is not None:
        for key, value in list(dict.items(earlier)):  # to be weighed again
            earlier._put(key, value)


def retire(registry: Registry[Any, Any]) -> None:
    """
    Let go of a registry whose attribute was rebound or deleted: close it, unless somebody else has taken it.

    ``old, self.pending = self.pending, {}`` hands the content to whoever holds *old*; to empty it would lose what
    they took it for. The caller holds *registry* in one local variable, and nowhere else.
    """
    if getrefcount(registry) <= PASSED_ON:
        registry.close()


def _adopting(kind: type[Any], registry: type[Any]) -> type[Any]:
    """A class that is this subclass of dict, and a registry."""
    if kind in (dict, OrderedDict, defaultdict):
        return registry
    if issubclass(kind, Registry):
        kind = _adopted(kind) or kind._copies_as()
        if kind is Registry:
            return registry
        if registry is Registry and issubclass(kind, Registry):
            return kind
    if (kind, registry) not in _classes:
        _refuse_clash(kind, _names_of(kind))
        namespace: dict[str, Any] = {
            "__module__": kind.__module__,
            "_adopted": kind,
            "_copies_as": classmethod(lambda _: _adopting(kind, Registry)),
            "_pickles_as": classmethod(lambda _: (_load, kind)),
        }
        bases: tuple[type[Any], ...] = (kind, registry)
        if issubclass(kind, defaultdict):
            # A defaultdict is laid out as C sees fit and cannot be a registry too: its subclass is rebuilt on one.
            namespace |= {
                name: value
                for name, value in kind.__dict__.items()
                if name not in {"__dict__", "__weakref__", "__slots__"}
            }
            bases = tuple(_adopting(base, registry) if issubclass(base, dict) else base for base in kind.__bases__)
        namespace |= _own_state(kind)
        if not issubclass(kind, Registry):
            namespace |= _own_limits(kind)
        try:
            combined = types.new_class(kind.__name__, bases, exec_body=lambda ns: ns.update(namespace))
        except TypeError as error:
            raise TypeError(
                f"wanted a dict, or a subclass of it that can be extended; found {kind.__qualname__}: {error}"
            ) from error
        if issubclass(kind, defaultdict):
            for name, value in namespace.items():
                if isinstance(value, types.FunctionType):
                    setattr(combined, name, _rebound(value, combined))
        _classes[kind, registry] = combined
    return _classes[kind, registry]


def _names_of(kind: type[Any]) -> set[str]:
    """The attributes that a user's subclass of dict has, or that its methods speak of."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base.__module__ in {"builtins", "collections"}:
            continue
        names.update(vars(base))
        for member in vars(base).values():
            code = getattr(getattr(member, "__func__", member), "__code__", None)
            names.update(getattr(code, "co_names", ()))
    return names


def _refuse_clash(kind: type[Any], names: Iterable[str]) -> None:
    """Two owners of one attribute would overwrite each other without a word."""
    ours = {name for base in (Timed, Registry) for name in vars(base)} | _state_names()
    clash = sorted(name for name in names if name in ours and name[:2] != "__" and name.startswith("_"))
    if clash:
        raise TypeError(
            f"wanted a dict, or a subclass of it with attributes of its own; found {kind.__qualname__}, which uses "
            f"{', '.join(clash)}, as a registry does. Rename that there, or give the attribute a plain dict"
        )


def _own_state(kind: type[Any]) -> dict[str, Any]:
    """
    Attribute hooks for a *kind* that has its own (a dict whose attributes are its entries, as ``d.name``).

    They keep what the registry knows about itself out of the user's way: it is no entry, nor looked for among them.
    """
    hooks: dict[str, Any] = {}
    custom: Any = kind
    if custom.__setattr__ not in (object.__setattr__, Registry.__setattr__):
        # ``__setattr__ = dict.__setitem__`` is a common idiom, which would go past the bound.
        assign = Registry.__setitem__ if custom.__setattr__ is dict.__setitem__ else custom.__setattr__

        def __setattr__(self: Any, name: str, value: Any, /) -> None:  # noqa: N807 - becomes that method
            (object.__setattr__ if name in _state_names() else assign)(self, name, value)

        hooks["__setattr__"] = __setattr__
    if custom.__delattr__ is dict.__delitem__:
        hooks["__delattr__"] = Registry.__delitem__
    if hasattr(custom, "__getattr__"):

        def __getattr__(self: Any, name: str, /) -> Any:  # noqa: N807 - becomes that method
            if name in _state_names():  # asked for before it was set
                raise AttributeError(name)
            return custom.__getattr__(self, name)

        hooks["__getattr__"] = __getattr__
    return hooks


class _OwnAttribute:
    """An attribute of a user's dict that has the name of a limit: theirs, as it was before."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, held: Any, owner: type[Any]) -> Any:
        if held is None or self._name not in held.__dict__:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self._name!r}")
        return held.__dict__[self._name]

    def __set__(self, held: Any, value: Any) -> None:
        held.__dict__[self._name] = value

    def __delete__(self, held: Any) -> None:
        if self._name not in held.__dict__:
            raise AttributeError(self._name)
        del held.__dict__[self._name]


def _own_limits(kind: type[Any]) -> dict[str, Any]:
    """
    Attributes for the names of limits that a *kind* uses itself, such as ``self.maxsize``.

    A class with ``__getattr__`` may have any: where the attribute is missing, that is asked.
    """
    names = _names_of(kind)
    used = LIVE if hasattr(kind, "__getattr__") else [name for name in LIVE if name in names]
    return {name: _OwnAttribute(name) for name in used if not hasattr(kind, name)}


@functools.cache
def _state_names() -> frozenset[str]:
    kinds = [Registry]
    for kind in kinds:
        kinds += (below for below in type.__subclasses__(kind) if "_adopted" not in vars(below))
    return STATE | frozenset({"__class__", *(slot for kind in kinds for slot in vars(kind).get("__slots__", ()))})


def _rebound(function: types.FunctionType, owner: type[Any]) -> types.FunctionType:
    """A copy of a method whose ``super()`` means *owner*'s."""
    closure = function.__closure__
    if closure and "__class__" in function.__code__.co_freevars:
        index = function.__code__.co_freevars.index("__class__")
        closure = (*closure[:index], types.CellType(owner), *closure[index + 1 :])
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    return copied


def _adopted(kind: type[Any]) -> type[Any] | None:
    """The user's class that a registry class was made from."""
    return next((base.__dict__["_adopted"] for base in kind.__mro__ if "_adopted" in base.__dict__), None)


def _load(kind: type[Any], plain: dict[str, Any]) -> Any:
    """Unpickle."""
    return make(_adopting(kind, Registry), Limits.of(**plain))
