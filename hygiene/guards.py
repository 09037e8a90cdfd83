"""Bounds for code that is not yours: classes, modules and objects, imported already or not.

`guard` does from outside what the decorators do in the source. What it cannot do is see an assignment to a module's
global, or to a class attribute through the class: Python offers no hook there. Such a dict is replaced once, where it
is.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import importlib.util
import sys
import threading
import tomllib
import weakref
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, TypedDict

import wrapt

from hygiene.decorators import Plan, Source, Table, can_change, check_attribute, find
from hygiene.names import did_you_mean, refuse_unknown
from hygiene.registry import referenced

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from hygiene.closing import Closer
    from hygiene.events import Entry, Removal
    from hygiene.limits import Busy, Overflow, Policy
    from hygiene.stores import Store
    from hygiene.units import Duration, Size
    from hygiene.writebehind import WriteBehind

__all__ = ["EXAMPLE", "Guard", "guard", "load_guards"]


class _Options(TypedDict, total=False):
    """The keywords of `Registry` and of `History`."""

    maxsize: int | None
    max_bytes: Size | None
    getsizeof: Callable[[Any], int] | None
    ttl: Duration | None
    idle: Duration | None
    policy: Policy
    importance: Callable[[Entry[Any, Any]], float] | None
    busy: Busy | None
    on_evict: Callable[[Removal[Any, Any]], Any] | str | None
    close: Closer | None
    overflow: Overflow
    revive: bool
    store: str | Store | WriteBehind | None
    values: Callable[[Any], Any] | None
    default_factory: Callable[[], Any] | None
    name: str | None
    timer: Callable[[], float]
    key: Mapping[str, Callable[[Any], Any]]
    depth: int
    maxlen: int | None
    max_tokens: int | None
    count_tokens: Callable[[Any], int] | None
    keep_first: int
    on_trim: Callable[[list[Any]], Any] | None
    summarize: Callable[[list[Any]], Any] | None
    compact: bool


_OF_BOTH = frozenset({"max_bytes", "getsizeof", "depth"})
_OF_HISTORIES = frozenset({"maxlen", "max_tokens", "count_tokens", "keep_first", "on_trim", "summarize", "compact"})
_OF_REGISTRIES = frozenset(_Options.__annotations__) - _OF_HISTORIES - _OF_BOTH
_BOUNDS = ("maxsize", "max_bytes", "ttl", "idle")


class Guard:
    """
    What `guard` was asked to do, and whether its target has been found yet.

    Attributes:
        target: The class, module, object, or the text that names one.
        attributes: The names of the bounded attributes.
        applied: Whether the bounds are in place; ``False`` while the target's module is not imported.
    """

    def __init__(self, target: object, attributes: tuple[str, ...], limits: Mapping[str, Any]) -> None:
        self.target = target
        self.applied = False
        self._plan = _plan(attributes, dict(limits))
        self.attributes = self._plan.names
        if isinstance(target, str):
            self._module, self._path = _parsed(target)

    def __repr__(self) -> str:
        target = (
            self.target if isinstance(self.target, str) else getattr(self.target, "__qualname__", repr(self.target))
        )
        return f"<guard on {', '.join(self.attributes)} of {target}, {'applied' if self.applied else 'waiting'}>"

    def _start(self) -> None:
        """Apply the bounds now, or as soon as the target is there."""
        if not isinstance(self.target, str):
            self._apply(self.target)
        elif self._module == "__main__":
            main = sys.modules["__main__"]
            if hasattr(main, (self._path or "__name__").partition(".")[0]):
                self._apply_in(main)
            else:
                _MAIN.wait_for(self)
        else:
            wrapt.register_post_import_hook(self._apply_in, self._module)

    def _apply_in(self, module: ModuleType) -> None:
        self._apply(_resolved(module, self._path))

    def _apply(self, target: Any) -> None:
        if isinstance(target, type):
            self._plan.decorate(target)
        elif isinstance(target, ModuleType):
            _bound_module(target, self._plan)
        else:
            _bound_object(target, self._plan)
        self.applied = True


def guard(target: object, *attributes: str, **limits: Unpack[_Options]) -> Guard:
    """
    Bound the dicts, or lists, in *attributes* of code that is not yours.

    Several attributes share one life, as in `bounded_registry`. What a dict holds stays, trimmed to the bound.

    Args:
        target: A **class**: as if it were decorated; instances made before are left alone.
            A **module**: its globals are replaced, and rebound in every module that imported the same dict by name; a
            later ``global`` assignment cannot be seen.
            Any other **object**: its attribute is replaced, and later assignments on this one object are bounded, too.
            **Text**, ``"package.module:Class"``, ``"package.module"`` or ``"package.module:object.path"``: whichever of
            these it names, now or as soon as the module is imported. ``"__main__:Class"`` waits for the class of the
            program that runs.
        attributes: Names of attributes that hold dicts; or lists, if *limits* are those of a `History`.
        maxsize: Upper bound on entries. 1,024 unless *maxsize*, *max_bytes*, *ttl* or *idle* is given; ``None``: no
            bound.
        max_bytes: Upper bound on the estimated bytes of the values: a number, or text such as ``"64MiB"``.
        getsizeof: Measures a value in bytes. The default estimates Python objects.
        ttl: How long an entry lives after it was last written: seconds, a ``timedelta``, or text such as ``"2h"``.
        idle: How long an entry lives after it was last used.
        policy: Which entry leaves first: ``"lru"`` (the default), ``"fifo"``, ``"lfu"``, ``"importance"``, ``"none"``,
            or a ``cachetools.Cache`` subclass.
        importance: For ``policy="importance"``: takes an `Entry`, returns a number. The lowest leaves first.
        busy: Whether an entry is in use, so that it neither evicts nor expires: a callable that takes an `Entry`, the
            name of an attribute or method of the value, or `referenced`.
        on_evict: Receives each `Removal`: a callable, or the name of a method of the owner.
        close: Closes a value that the registry drops by its own decision: a callable, a method's name, or ``"auto"``.
        overflow: If everything is in use: ``"grow"`` (the default) exceeds the bound, ``"raise"`` raises
            `RegistryFull`.
        revive: Whether an evicted value that the program still holds is found again. On by default.
        store: Where entries are saved that are not in memory: an address such as ``"sqlite:chats.db"``, a `Store`, or a
            `WriteBehind`.
        values: Converts each value that is put in.
        default_factory: As in ``defaultdict``. A ``defaultdict`` in the attribute keeps its own.
        name: Name used in logs, reports and metrics, and the space in the store.
        timer: Returns monotonic seconds. Tests pass a `hygiene.testing.ManualClock`.
        key: For linked attributes whose keys are not the shared ones, a function that derives the shared key:
            ``key={"blobs": lambda k: k[0]}``.
        depth: ``1`` bounds the dicts one level below, ``tasks[owner][task_id]``, each in its own right. A decorator
            without *depth*, stacked above or below it, bounds the outer dict.
        maxlen: Upper bound on the number of items.
        max_tokens: Upper bound on the tokens of the items together.
        count_tokens: Counts the tokens of an item. The default estimates four characters a token.
        keep_first: Number of items at the beginning that stay, such as a system prompt. 0 by default.
        on_trim: Receives the list of items that were trimmed.
        summarize: Receives the items that were trimmed, and returns an item that stands for them.
        compact: Whether older items are kept in compressed form. Off by default.

    Returns:
        A `Guard`, which says whether the target has been found.

    Raises:
        AttributeError: there is no such class, object or attribute; raised out of the ``import``, if that comes later.
        ModuleNotFoundError: there is no such package.
        TypeError: the attribute cannot be bounded.
        ValueError: a limit is out of its range, or *target* is no such text.
    """
    asked = Guard(target, attributes, limits)
    asked._start()
    return asked


def _plan(attributes: tuple[str, ...], limits: dict[str, Any]) -> Plan:
    refuse_unknown("guard", limits, _Options.__annotations__)
    asks_lists = sorted(_OF_HISTORIES & limits.keys())
    asks_dicts = sorted(_OF_REGISTRIES & limits.keys())
    if asks_lists and asks_dicts:
        raise ValueError(
            f"guard bounds either dicts or lists; found {asks_dicts[0]}, a limit of dicts, with {asks_lists[0]}, one "
            f"of lists. Write one guard for each"
        )
    if asks_lists:
        return Plan.of_history("guard", attributes, limits)
    if all(limits.get(bound) is None for bound in _BOUNDS) and "maxsize" not in limits:
        limits["maxsize"] = 1024  # as bounded_registry
    return Plan.of_registry("guard", attributes, limits)


# --- Finding the target -----------------------------------------------------------------------------------------------


def _parsed(target: str) -> tuple[str, str]:
    module, _, path = target.partition(":")
    if not all(part.isidentifier() for text in (module, path) if text or text is module for part in text.split(".")):
        raise ValueError(
            f'a guard\'s target is a class, a module, an object, or text such as "package.module:Class" or '
            f'"package.module"; found {target!r}'
        )
    top = module.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise ModuleNotFoundError(
            f"guard {target!r}: there is no package {top!r} to import. Install it, or correct the name", name=top
        )
    return module, path


def _resolved(module: ModuleType, path: str) -> Any:
    found: Any = module
    for part in filter(None, path.split(".")):
        try:
            found = getattr(found, part)
        except AttributeError:
            inside = getattr(found, "__name__", type(found).__name__)
            raise AttributeError(
                f"guard '{module.__name__}:{path}': {inside} has no {part!r}{did_you_mean(part, dir(found))}",
                name=part,
                obj=found,
            ) from None
    return found


class _Main:
    """
    Guards that wait for a class of the program itself, which no import announces.

    While there are any, ``class`` statements are watched (``builtins.__build_class__``). The class is bounded once its
    statement is over, after the decorators above it (``@dataclass``) have made it what it will be.
    """

    def __init__(self) -> None:
        self._waiting: list[Guard] = []
        self._lock = threading.Lock()
        self._build: Callable[..., Any] | None = None

    def wait_for(self, asked: Guard) -> None:
        with self._lock:
            self._waiting.append(asked)
            if self._build is None:
                self._build = builtins.__build_class__
                builtins.__build_class__ = self._build_class

    def _build_class(self, body: Any, name: str, /, *bases: Any, **keywords: Any) -> Any:
        build = self._build or _plain_build
        made = build(body, name, *bases, **keywords)
        if getattr(made, "__module__", None) == "__main__":
            for asked in [asked for asked in self._waiting if asked._path == made.__qualname__]:
                _at_end_of_statement(sys._getframe(1), name, functools.partial(self._found, asked))
        return made

    def _found(self, asked: Guard, made: Any) -> None:  # pragma: no cover - called by a tracer, which no tracer sees
        with self._lock:
            if asked not in self._waiting:
                return
            self._waiting.remove(asked)
            if not self._waiting and builtins.__build_class__ == self._build_class:
                builtins.__build_class__ = self._build or _plain_build
                self._build = None
        asked._apply(made)


_plain_build = builtins.__build_class__
_MAIN = _Main()


def _at_end_of_statement(frame: FrameType, name: str, then: Callable[[Any], None]) -> None:
    """Call *then* with the class, when the ``class`` statement in *frame* has stored what its decorators returned."""
    before, tracer = frame.f_locals.get(name), sys.gettrace()

    def trace(traced: FrameType, event: str, _: Any) -> Any:  # pragma: no cover - no tracer sees another
        made = traced.f_locals.get(name)
        if made is before and event == "line":
            return trace  # a decorator's line
        sys.settrace(tracer)
        traced.f_trace = None
        if made is not before:  # it is, if a decorator raised
            then(made)
        return None

    frame.f_trace = trace
    sys.settrace(lambda *_: None)


# --- Modules and objects ----------------------------------------------------------------------------------------------

_modules: weakref.WeakKeyDictionary[ModuleType, dict[str, Plan]] = weakref.WeakKeyDictionary()


def _bound_module(module: ModuleType, plan: Plan) -> None:
    known = _modules.setdefault(module, {})
    plan = plan.onto([known[name] for name in plan.names if name in known], module)
    found: dict[str, Any] = {}
    for name in plan.names:
        if name not in vars(module):
            raise AttributeError(
                f"guard was asked to bound {module.__name__}.{name}, but the module has no such global"
                f"{did_you_mean(name, vars(module))}"
            )
        found[name] = vars(module)[name]
        if not isinstance(found[name], plan.family.takes):
            raise plan.refusal(module, name, found[name])
        plan.check_content(found[name], module, name)
    group = plan.new_group(module) if plan.grouped else None
    for name, value in found.items():
        _rebind(value, plan.adopt(value, module, name, group))
        known[name] = plan


def _rebind(old: object, new: object) -> None:
    """Replace a container in every module that has it under any name."""
    for module in list(sys.modules.values()):
        try:
            names = object.__getattribute__(module, "__dict__")
        except AttributeError:  # anything may sit in sys.modules
            continue
        for name in [name for name, value in list(names.items()) if value is old]:
            names[name] = new


def _bound_object(obj: Any, plan: Plan) -> None:
    cls = type(obj)
    if not can_change(cls):
        raise TypeError(
            f"guard bounds the attributes of classes, modules and objects of Python classes; found {obj!r:.80}, "
            f"a {cls.__qualname__}. Name the object that holds it as an attribute"
        )
    source = Source(cls)
    own = getattr(obj, "__dict__", {})
    if any(name not in own and isinstance(find(cls, name)[1], plan.family.takes) for name in plan.names):
        plan.decorate(cls)  # the object has none of its own: it uses the dict of its class
        return
    for name in plan.names:
        if name in own:
            source.mentioned.add(name)
        check_attribute(cls, name, find(cls, name)[1], source, plan)
        value = getattr(obj, name, None)
        if value is not None and not isinstance(value, plan.family.takes) and not plan.bounds(value):
            raise plan.refusal(obj, name, value)
        plan.check_content(value, obj, name)
    Table.of(cls).add_for(obj, plan)


# --- Guards in a file -------------------------------------------------------------------------------------------------

_CALLABLES = frozenset(
    {"count_tokens", "default_factory", "getsizeof", "importance", "on_trim", "summarize", "timer", "values"}
)
_CALLABLES_OR_TEXT = frozenset({"busy", "close", "on_evict", "policy"})


def load_guards(path: str | os.PathLike[str] = "hygiene.toml") -> list[Guard]:
    """
    Apply the guards that a TOML file asks for.

    Each ``[[guard]]`` table has a *target*, one *attribute* or several *attributes*, and limits as in `guard`. Where a
    limit takes a callable, ``"package.module:function"`` names it; ``busy = "referenced"`` is `hygiene.referenced`.
    Every table is checked before the first is applied.

    Returns:
        The guards, in the order of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no TOML, has no guards, or a table is wrong; names the file, the table and the key.
        AttributeError, ModuleNotFoundError, TypeError: as `guard`, with a note that names the table.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    tables = content.get("guard")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(
            f"{file} needs tables that begin with [[guard]]; found {', '.join(map(repr, content)) or 'none'}. "
            f"For example:{EXAMPLE}"
        )
    if strangers := sorted(content.keys() - {"guard"}):
        raise ValueError(
            f"{file} may hold [[guard]] tables only; found {strangers[0]!r}{did_you_mean(strangers[0], ['guard'])}"
        )
    guards = [_read(table, f"{file}, guard {number}") for number, table in enumerate(tables, 1)]
    for number, asked in enumerate(guards, 1):
        try:
            asked._start()
        except Exception as error:
            error.add_note(f"asked for by {file}, guard {number}")
            raise
    return guards


EXAMPLE = """

[[guard]]
target = "package.module:Class"
attribute = "sessions"
maxsize = 1000
"""


def _read(table: dict[str, Any], where: str) -> Guard:
    limits = dict(table)
    for key in limits:
        _refuse_unknown_key(key, where)
    target, names = limits.pop("target", None), limits.pop("attributes", None)
    if "attribute" in limits:
        if names is not None:
            raise ValueError(f"{where}: wanted attribute or attributes; found both")
        names = [limits.pop("attribute")]
    if not isinstance(target, str):
        raise ValueError(  # noqa: TRY004 - the file's content is wrong, whatever is wrong about it
            f'{where}: target must be text such as "package.module:Class"; found {target!r}'
        )
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: attributes must be a list of names, as attributes = ["sessions"]; found {names!r}')
    try:
        return Guard(target, tuple(names), {key: _limit(key, value, where) for key, value in limits.items()})
    except _Wrong:
        raise
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"{where}: {error}") from error


class _Wrong(ValueError):
    """Says already which table is wrong."""


def _refuse_unknown_key(key: str, where: str) -> None:
    known = [*_Options.__annotations__, "target", "attribute", "attributes"]
    if key not in known:
        raise _Wrong(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")


def _limit(key: str, value: Any, where: str) -> Any:
    """What a limit's text in the file stands for."""
    if key == "key":
        if not isinstance(value, dict):
            raise _Wrong(f'{where}: key must be a table, as key.blobs = "package.module:function"; found {value!r}')
        return {column: _callable(text, f"{where}: key.{column}") for column, text in value.items()}
    if key in _CALLABLES or (key in _CALLABLES_OR_TEXT and isinstance(value, str) and ":" in value):
        return _callable(value, f"{where}: {key}")
    return referenced if (key, value) == ("busy", "referenced") else value


def _callable(text: object, where: str) -> Any:
    module, _, path = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not module or not path:
        raise _Wrong(f'{where} must name a callable as "package.module:function"; found {text!r}')
    try:
        found = _resolved(importlib.import_module(module), path)
    except (ImportError, AttributeError) as error:
        raise _Wrong(f"{where}: {text!r} cannot be imported: {error}") from error
    if not callable(found):
        raise _Wrong(f"{where} must name a callable; found {found!r} at {text!r}")
    return found
