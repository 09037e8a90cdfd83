"""Which containers of the live process grow, by the path that leads to them.

Theory of operation
===================

**Roots, not the garbage collector's list.** CPython up to 3.13 does not track a dict of plain strings, and
``gc.get_objects()`` builds a list of everything at once. So a walk starts where names are: the globals of modules,
then the frames of threads and tasks. It goes through classes, instances, closures, caches and containers, breadth
first, so that a container is named by one of its shortest paths; the program's own modules come before libraries.

**Slices.** A walk goes on for about 1.5 ms, then stops and resumes where it was. Between slices nothing of the program
is held but weak references: what the walk must come back to (modules, classes, functions, instances) can be referred
to weakly, and what cannot (dicts, lists, objects without ``__weakref__``) is dealt with on the spot, within an
allowance. A container is one node whatever its length: of a large one the first and last items stand for the rest.

**Sites.** A container is known by its path, never by its identity, which is used anew when it dies. What sits in a
container, or is one of many instances, has no path of its own that lasts: it counts under its class and attribute
(``Session.events``), and the *mean* length of those seen is what is followed. More sessions are then no growth of
``Session.events``; the dict that holds them has a site of its own.

**No user code.** ``len(x)``, ``isinstance(x, C)``, ``x.attribute`` and even ``x.__dict__`` may all run code of the
program. So the kind of an object is read from its type's flags, its length by ``dict.__len__`` and the like, and its
attributes through the C descriptors of its class.

**When to speak.** One reading says nothing, and of many containers that go up and down by chance some always happen
to rise. So a site speaks when each of several readings in a row was a new high: three rises at least, more if they
were uneven, and more with each fall or change at the old end that was ever seen, since a leak does not let go of what
came first.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import re
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, Self

from hygiene.history import History
from hygiene.janitor import janitor, survive_fork
from hygiene.logs import logger
from hygiene.registry import Registry
from hygiene.text import per_time, plural
from hygiene.units import Duration, seconds

__all__ = ["Grower", "GrowthWatch", "watch_growth"]


# Seconds that a slice goes on before it stops. What is begun then is finished, and the garbage collector may come in
# between, which is why it is not 5 ms.
_SLICE = 0.0015
# Of one core at the default interval: 0.5 s a minute. Shorter intervals may use more, half of a core at the most.
_WORK = 0.5
_MOST = 0.5
# Readings that leave libraries out for one that does not, where a whole one takes too long for the interval.
_SKIPPED = 3
# Containers that may be looked into on the spot for one name: about 1 ms.
_ALLOWANCE = 200
_SHARE = 4
# Items that stand for the rest of a container, taken at both ends.
_SAMPLE = 128
# A dict with so few keys, all of them text, is a record: its keys are names.
_RECORD = 16
# Steps into containers from the last thing that had a name.
_DEPTH = 5
# Objects within objects that cannot be referred to weakly: a linked list is deeper than Python may recurse.
_NESTED = 20
# Shorter containers are not followed, unless there are many of them.
_SHORT = 8
# Sites that are followed, and objects that a walk visits: what bounds our own memory, at some 30 MB.
_SITES = 20_000
_VISITS = 300_000
_SITES_AT_ONCE = 50
# Items by which a site must have grown in all.
_RISE = 10

# --- Kinds ------------------------------------------------------------------------------------------------------------

_ATOM, _DICT, _LIST, _SET, _DEQUE, _TUPLE, _FROZENSET, _FUNCTION, _CLASS, _CACHE, _SUSPENDED, _OBJECT = range(12)
_LAST_CONTAINER = _FROZENSET
_NAMES = {_DICT: "dict", _LIST: "list", _SET: "set", _DEQUE: "deque", _CACHE: "cache"}
_Cache: Any = type(functools.lru_cache(maxsize=None)(lambda: None))


async def _async_generator() -> Any:  # only its type is of interest
    yield


# By identity: these types live as long as the process, and a type's hash may be a method of its metaclass.
_KINDS: dict[int, int] = {
    **{
        id(kind): _ATOM
        for kind in (
            *(int, float, complex, bool, str, bytes, bytearray, memoryview, range, slice, type(None), type(...)),
            *(type(NotImplemented), types.CodeType, types.ModuleType, types.FrameType, types.TracebackType),
            *(types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType),
            *(types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType),
            *(types.MemberDescriptorType, weakref.ref, weakref.ProxyType, weakref.CallableProxyType),
            *(types.GenericAlias, types.UnionType, re.Pattern, type(threading.Lock()), type(threading.RLock())),
        )
    },
    id(dict): _DICT,
    id(list): _LIST,
    id(set): _SET,
    id(deque): _DEQUE,
    id(tuple): _TUPLE,
    id(frozenset): _FROZENSET,
    id(types.FunctionType): _FUNCTION,
    id(type): _CLASS,
    id(_Cache): _CACHE,
    id(types.CoroutineType): _SUSPENDED,
    id(types.GeneratorType): _SUSPENDED,
    id(types.AsyncGeneratorType): _SUSPENDED,
}
_BY_BASE: tuple[tuple[Any, int], ...] = (
    (set, _SET),
    (deque, _DEQUE),
    (frozenset, _FROZENSET),
    (types.ModuleType, _ATOM),  # every one is a root
    (weakref.ref, _ATOM),
)
_LENGTHS: dict[int, Callable[[Any], int]] = {
    _DICT: dict.__len__,
    _LIST: list.__len__,
    _SET: set.__len__,
    _DEQUE: deque.__len__,
    _TUPLE: tuple.__len__,
    _FROZENSET: frozenset.__len__,
}
# As C reads them: a metaclass may have properties of these names.
_flags = type.__dict__["__flags__"].__get__
_mro = type.__dict__["__mro__"].__get__
_namespace = type.__dict__["__dict__"].__get__
_qualname = type.__dict__["__qualname__"].__get__
_globals_of = vars(types.ModuleType)["__dict__"].__get__
_maxlen = deque.maxlen.__get__
_attributes_of_cache = _Cache.__dict__["__dict__"].__get__
_limits_of = Registry.__dict__["_limits"].__get__
_HAS_GC = 1 << 14
_BY_FLAG = ((1 << 29, _DICT), (1 << 25, _LIST), (1 << 26, _TUPLE), (1 << 31, _CLASS))


def _kind(cls: Any) -> int:
    """The kind of the instances of a class that is none of the built-in ones; runs no code of its."""
    flags = _flags(cls)
    if not flags & _HAS_GC:
        return _ATOM
    for flag, kind in _BY_FLAG:
        if flags & flag:
            return kind
    # Of built-in classes `issubclass` asks no metaclass.
    for base, kind in _BY_BASE:
        if issubclass(cls, base):
            return kind
    return _OBJECT


class _Holder(NamedTuple):
    """Where the name stands in the source that a container is reached by: what a suggestion needs."""

    place: str  # "global", "attribute", "closure", "argument", "local", "cache"
    module: str
    owner: str  # the qualified name of the class or function
    name: str


class _Node(NamedTuple):
    """The way to something that has children."""

    label: str
    holder: _Holder
    depth: int = 0
    """Steps into containers from the holder's name."""
    weight: float = 1.0
    """How many of its like it stands for."""
    plural: bool = False
    """Whether it is one of many, so that its own path says nothing."""


class _Found:
    """What one walk has seen of one site."""

    __slots__ = ("calls", "count", "depth", "head", "holder", "kind", "library", "moment", "several", "total")

    def __init__(self, node: _Node, kind: int, head: int | None, moment: float, library: bool) -> None:  # noqa: FBT001
        self.count = 0.0
        self.total = 0.0
        self.kind = kind
        self.holder = node.holder
        self.depth = node.depth
        self.head = head
        self.moment = moment
        self.library = library
        """Whether it was reached by way of a library's globals only."""
        self.several = False
        self.calls = False


class _Shape(NamedTuple):
    """How to read the attributes of a class's instances without running its code."""

    namespace: Callable[[Any], Any] | None
    slots: tuple[tuple[str, Callable[[Any], Any]], ...]
    module: str
    name: str


def _shape(cls: Any) -> _Shape:
    namespace = None
    slots = []
    for base in _mro(cls):
        for name, value in list(_namespace(base).items()):
            if type(value) is types.MemberDescriptorType:
                slots.append((name, value.__get__))
            elif name == "__dict__" and namespace is None and type(value) is types.GetSetDescriptorType:
                # A class may have a property of this name, and then there is no way in.
                namespace = value.__get__
    module = _namespace(cls).get("__module__")
    if type(module) is not str:
        module = "builtins"
    return _Shape(namespace, tuple(slots), module, _qualname(cls))


def _dotted(module: str, name: str) -> str:
    """*name* as its reader would write it: what the program itself defines needs no module."""
    return name if module in {"__main__", "builtins"} else f"{module}.{name}"


_NOWHERE = _Holder("", "", "", "")
_OVER = object()  # what `next` returns at the end
_UNSEEN = frozenset(
    {"__annotations__", "__builtins__", "__cached__", "__doc__", "__loader__", "__path__", "__spec__", "__weakref__"}
)
# What an object calls the bound of a container beside it, with or without underscores and its class before.
_BOUND = re.compile(r"_?(?:\w+?__)?_?(?:maxsize|max_size|maxlen|max_len|capacity)")
_UNREACHABLE_SIZE = 2**40  # who says so means: no bound

# --- Frames -----------------------------------------------------------------------------------------------------------

# Since 3.13 `f_locals` of a function reads the variables themselves.
_PROXIED = sys.version_info >= (3, 13)
_OPTIMIZED = 1  # the flag of code whose variables are no dict
# A function that uses one of these may itself hold the dict that we would empty.
_LOOK = frozenset({"locals", "vars", "eval", "exec", "dir"})
_OTHERS = 2 + 1  # references to a snapshot that nobody else has: the frame's, our variable, the argument


def _locals_of(frame: types.FrameType) -> list[tuple[str, Any]]:
    """
    The variables of a function that runs or is suspended; of a module or class body, which are walked anyway, none.

    Before 3.13 the frame keeps the dict that is made for us, and with it all that the variables refer to now, until
    it ends. So it is emptied again, where nobody else can have it.
    """
    code = frame.f_code
    if not code.co_flags & _OPTIMIZED:
        return []
    if _PROXIED:
        return list(frame.f_locals.items())
    if _traced(frame) or _LOOK.intersection(code.co_names):
        return []  # a debugger writes the dict back into the variables
    snapshot = frame.f_locals
    found = list(snapshot.items())
    if sys.getrefcount(snapshot) == _OTHERS:
        snapshot.clear()
    return found


def _traced(frame: types.FrameType) -> bool:
    for trace in (frame.f_trace, sys.gettrace(), threading.gettrace()):
        # Coverage's tracer, and what starts it in threads, leave the variables alone: it is made of C.
        made_of_c = type(trace).__name__ == "CTracer" or getattr(trace, "__module__", None) == "coverage.collector"
        if trace is not None and not made_of_c:
            return True
    return False


def _thread_frame(ident: int) -> types.FrameType | None:
    return sys._current_frames().get(ident)


# --- The walk ---------------------------------------------------------------------------------------------------------

_Item = tuple[Callable[[], Any], _Node, int, int]  # what gives the object, its node, its kind, where to go on
_MODULE, _THREAD = 20, 21


class _Walk:
    """
    One pass over the process, in as many slices as it takes.

    Not thread-safe: its `GrowthWatch` lets one thread in at a time.
    """

    def __init__(self, *, libraries: bool = True) -> None:
        self.libraries = libraries
        self.found: dict[str, _Found] = {}
        self.spent = 0.0
        """Seconds of one core, all slices together."""
        self._seen: set[int] = set()
        self._frontier: deque[_Item] = deque()
        self._entering: Iterator[None] | None = None
        self._stages: list[Callable[[], Iterator[None]]] = [
            self._enter_running,
            functools.partial(self._enter_modules, 0),
        ]
        if libraries:
            self._stages[:0] = [functools.partial(self._enter_modules, 2), functools.partial(self._enter_modules, 1)]
        self._in_library = False
        self._shapes: dict[int, _Shape] = {}
        self._allowance = 0
        self._nested = 0
        self._deadline = 0.0
        self._now = 0.0

    def go_on(self, now: float, slice_: float) -> bool:
        """Walk for about *slice_* seconds; return whether everything has been visited."""
        began = time.thread_time()
        self._deadline = time.perf_counter() + slice_
        self._now = now
        try:
            while not self._late():
                # One library after another: what waits to be visited is made of objects that the collector looks at,
                # and few enough of them never make it start. The program's own modules are one: there, paths matter.
                if self._entering is not None and not (self._in_library and self._frontier):
                    if next(self._entering, _OVER) is _OVER:
                        self._entering = None
                elif self._frontier:
                    self._expand(*self._frontier.popleft())
                elif self._stages:
                    self._entering = self._stages.pop()()
                else:
                    return True
            return False
        finally:
            self._shapes.clear()  # they hold their classes
            self.spent += time.thread_time() - began

    def _late(self) -> bool:
        return time.perf_counter() >= self._deadline

    # --- Where it begins ---

    def _enter_modules(self, rank: int) -> Iterator[None]:
        self._in_library = rank > 0
        for name in list(sys.modules):
            module = sys.modules.get(name)
            if type(name) is str and _rank(name, module) == rank and not name.startswith("hygiene.memory."):
                label = "" if name == "__main__" else name
                node = _Node(label, _Holder("global", name, "", ""))
                kind = _MODULE if issubclass(type(module), types.ModuleType) else _OBJECT
                self._push(module, node, kind)
            del module
            yield

    def _enter_running(self) -> Iterator[None]:
        main = threading.main_thread().ident
        for ident in list(sys._current_frames()):
            label = "" if ident == main else "thread "
            self._frontier.append((functools.partial(_thread_frame, ident), _Node(label, _NOWHERE), _THREAD, 0))
        yield
        loops: dict[int, weakref.ref[Any]] = {}  # by identity: a loop may be a class with a hash of its own
        if _TASKS_BY_LOOP:
            for ident in list(sys._current_frames()):
                for loop in _loops_of(ident):
                    with contextlib.suppress(TypeError):  # of a class with slots, which takes no weak references
                        loops[id(loop)] = weakref.ref(loop)
                    del loop  # or this generator would keep it until the next slice
                yield
        for reference in _tasks([loop for each in loops.values() if (loop := each()) is not None]):
            running = _running(reference())
            if running is not None:
                name, coroutine = running
                label = f"task {coroutine.__name__ if name.startswith('Task-') else name}"
                self._push(coroutine, _Node(label, _Holder("local", "", label, "")), _SUSPENDED)
                del coroutine
            del running  # or this generator would keep it until the next slice
            yield

    # --- One thing after another ---

    def _push(self, value: Any, node: _Node, kind: int) -> None:
        """Come back to *value* later; now, if it cannot be referred to weakly."""
        if len(self._seen) >= _VISITS:
            return
        try:
            reference = weakref.ref(value)
        except TypeError:
            if self._nested < _NESTED and self._allowance > 0:
                self._nested += 1
                self._visit(value, node, kind, 0, resumable=False)
                self._nested -= 1
        else:
            self._frontier.append((reference, node, kind, 0))

    def _expand(self, reference: Callable[[], Any], node: _Node, kind: int, start: int) -> None:
        value = reference()
        if value is None:
            return  # it is no more
        self._allowance = _ALLOWANCE
        try:
            if kind == _THREAD:
                position = self._stack(value, node, start)
            else:
                position = self._visit(value, node, kind, start, resumable=True)
        except Exception:  # changed under us in a way that nobody thought of; the rest of the process goes on
            logger.debug(
                "%s could not be looked into",
                node.label,
                exc_info=True,
                extra={"event_name": "memory.not_looked_into"},
            )
            self._nested = 0
            return
        if position is not None:
            self._frontier.appendleft((reference, node, kind, position))

    def _visit(self, value: Any, node: _Node, kind: int, start: int, *, resumable: bool) -> int | None:
        """Look at the named parts of *value* from the one at *start*; return where to go on if it is late."""
        pairs: Iterable[tuple[Any, _Node]]
        if kind == _MODULE:
            pairs = self._of_module(value, node)
        elif kind == _CLASS:
            pairs = self._of_class(value)
        elif kind == _FUNCTION:
            pairs = self._of_function(value)
        elif kind == _SUSPENDED:
            pairs = self._of_suspended(value, node)
        elif kind == _CACHE:
            pairs = self._of_cache(value)
        else:
            pairs = self._of_object(value, node)
        last_allowance = self._allowance
        for position, (part, where) in enumerate(pairs):
            if position < start:
                continue
            self._look(part, where)
            if resumable and self._allowance != last_allowance:
                if self._late():
                    return position + 1
                last_allowance = self._allowance = _ALLOWANCE
        return None

    def _look(self, value: Any, node: _Node) -> None:
        cls = type(value)
        exact = _KINDS.get(id(cls))
        kind = _kind(cls) if exact is None else exact
        if kind == _ATOM or (kind == _FUNCTION and not _has_parts(value)):
            return
        if kind <= _LAST_CONTAINER:
            if self._container(value, kind, node) and exact is None:
                self._push(value, node, _OBJECT)  # a subclass: it may have attributes, too
        else:
            self._later(value, node, kind)

    def _later(self, value: Any, node: _Node, kind: int) -> None:
        self._allowance -= 1
        if id(value) not in self._seen:
            self._seen.add(id(value))
            self._push(value, node, kind)

    # --- Containers, on the spot ---

    def _container(self, value: Any, kind: int, node: _Node) -> bool:
        """Count *value* and look into it; return whether it was new."""
        size = _LENGTHS[kind](value)
        if id(value) in self._seen or len(self._seen) >= _VISITS:
            return False
        if (size == 0 and id(type(value)) in _PLAIN) or (kind == _TUPLE and not gc.is_tracked(value)):
            return False  # nothing in it but atoms: so the collector has found
        self._seen.add(id(value))
        self._allowance -= 1
        if size == 0:
            return True
        found = None
        if (size >= _SHORT or node.plural) and kind < _TUPLE and not _bounded(value, kind):
            found = self._record(value, kind, size, node)
        if kind == _DICT and not gc.is_tracked(value):
            return True
        if node.depth < _DEPTH and self._allowance > 0:
            with contextlib.suppress(RuntimeError):  # another thread changed it; the next walk comes by again
                self._children(value, kind, size, node, found)
        return True

    def _children(self, value: Any, kind: int, size: int, node: _Node, found: _Found | None) -> None:
        deeper = node.depth + 1
        if kind == _DICT and size <= _RECORD:
            items = list(dict.items(value))
            if all(type(key) is str for key, _ in items):
                for key, item in items:
                    if _KINDS.get(id(type(item))) != _ATOM:
                        self._look(item, node._replace(label=f"{node.label}[{key!r:.40}]", depth=deeper))
                return
        items = _sampled(value, kind, size)
        self._allowance -= len(items) >> 3  # to look at an atom is cheap
        if found is not None and items:
            found.calls = id(type(items[0])) in _CALLABLES
        if kind == _TUPLE and size <= _RECORD:
            for position, item in enumerate(items):
                if _KINDS.get(id(type(item))) != _ATOM:
                    self._look(item, node._replace(label=f"{node.label}[{position}]", depth=deeper))
            return
        weight = node.weight * size / max(len(items), 1)
        child = _Node(f"{node.label}[*]", node.holder, deeper, weight, plural=True)
        items = [item for item in items if _KINDS.get(id(type(item))) != _ATOM]
        for left in range(len(items), 0, -1):
            # To each its share, or the first would have all of it, and would stand for the rest.
            rest = self._allowance
            self._allowance = share = max(rest // left, _SHARE)
            self._look(items[-left], child)
            self._allowance += rest - share
            if self._allowance <= 0:
                return

    def _record(self, value: Any, kind: int, size: int, node: _Node) -> _Found | None:
        found = self.found.get(node.label)
        if found is None:
            if len(self.found) >= _SITES:
                return None
            found = self.found[node.label] = _Found(node, kind, _head(value, kind), self._now, self._in_library)
        else:
            found.several, found.head = True, None
        found.count += node.weight
        found.total += node.weight * size
        return found

    # --- What has named parts ---

    def _of_module(self, module: Any, node: _Node) -> Iterator[tuple[Any, _Node]]:
        own = _globals_of(module)
        if type(own) is not dict:
            return
        name_of_module = node.holder.module
        prefix = f"{node.label}." if node.label else ""
        for name, value in list(own.items()):
            if type(name) is not str or not _worth(value) or name in _UNSEEN or (name_of_module, name) in _WARM:
                continue
            yield value, _Node(prefix + name, _Holder("global", name_of_module, "", name))

    def _of_class(self, cls: Any) -> Iterator[tuple[Any, _Node]]:
        own = _namespace(cls)
        module = own.get("__module__")
        module = module if type(module) is str else "builtins"
        owner = _qualname(cls)
        label = _dotted(module, owner)
        for name, value in list(own.items()):
            if type(name) is str and _worth(value) and name not in _UNSEEN:
                yield value, _Node(f"{label}.{name}", _Holder("attribute", module, owner, name))

    def _of_function(self, function: Any) -> Iterator[tuple[Any, _Node]]:
        module = function.__module__ if type(function.__module__) is str else "builtins"
        owner = function.__qualname__
        label = _dotted(module, owner)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # not assigned yet
            yield value, _Node(f"{label}: {name}", _Holder("closure", module, owner, name))
        code = function.__code__
        defaults = function.__defaults__ or ()
        arguments = code.co_varnames[: code.co_argcount]
        named = [
            *zip(arguments[len(arguments) - len(defaults) :], defaults, strict=False),
            *(function.__kwdefaults__ or {}).items(),
        ]
        for name, value in named:
            yield value, _Node(f"{label}({name}=)", _Holder("argument", module, owner, name))
        if _has_attributes(function):
            for name, value in list(function.__dict__.items()):
                yield value, _Node(f"{label}.{name}", _Holder("global", module, owner, name))

    def _of_cache(self, cache: Any) -> Iterator[tuple[Any, _Node]]:
        own = _attributes_of_cache(cache)
        facts = [own.get(name) for name in ("__module__", "__qualname__", "__name__")]
        module, owner, name = (fact if type(fact) is str else "?" for fact in facts)
        holder = _Holder("cache", module, owner, name)
        if "__wrapped__" in own:
            yield own["__wrapped__"], _Node("", holder)
        info = _Cache.cache_info(cache)
        if info.maxsize is None and info.currsize >= _SHORT and len(self.found) < _SITES:
            node = _Node(_dotted(module, owner), holder)
            found = self.found.setdefault(node.label, _Found(node, _CACHE, None, self._now, self._in_library))
            found.count += 1.0
            found.total += info.currsize

    def _of_suspended(self, suspended: Any, node: _Node) -> Iterator[tuple[Any, _Node]]:
        kind = type(suspended)
        if kind is types.CoroutineType:
            frame, inner = suspended.cr_frame, suspended.cr_await
        elif kind is types.GeneratorType:
            frame, inner = suspended.gi_frame, suspended.gi_yieldfrom
        else:
            frame, inner = suspended.ag_frame, suspended.ag_await
        label = node.label
        if not label.startswith("task "):
            label = f"{'coroutine' if kind is types.CoroutineType else 'generator'} {suspended.__name__}"
        if frame is not None:
            for name, value in _locals_of(frame):
                holder = _Holder("local", "", label, name)
                yield value, _Node(f"{label}: {name}", holder, 0, node.weight, node.plural)
        if id(type(inner)) in _SUSPENDABLE:
            label = f"{label}: {inner.__name__}" if label.startswith("task ") else ""
            yield inner, node._replace(label=label)

    def _of_object(self, value: Any, node: _Node) -> Iterator[tuple[Any, _Node]]:
        cls = type(value)
        if id(cls) in _OURS or issubclass(cls, GrowthWatch) or _is_task(cls):
            return
        referents = gc.get_referents(value) if _kind(cls) > _LAST_CONTAINER else None
        if referents is not None:
            # Before its attributes are asked for, because that gives it a dict which it may not have yet.
            for part in referents:
                if part is not cls and _worth(part):
                    break
            else:
                return
        shape = self._shapes.get(id(cls))
        if shape is None:
            shape = self._shapes[id(cls)] = _shape(cls)
        label = node.label
        if node.plural or not label:
            label = _dotted(shape.module, shape.name)
        own = shape.namespace(value) if shape.namespace is not None else None
        named = self._attributes(value, own, shape, node._replace(label=label))
        bound = max((part for name, part in named if type(part) is int and _BOUND.fullmatch(name)), default=0)
        if bound >= _UNREACHABLE_SIZE:
            bound = 0
        for name, part in named:
            if not _worth(part) or _within(bound, part):
                continue
            holder = _Holder("attribute", shape.module, shape.name, name)
            yield part, _Node(f"{label}.{name}", holder, 0, node.weight, node.plural)
        # What C code holds has no name.
        if referents is not None:
            known = {id(part) for _, part in named} | {id(own), id(cls)}
            holder = _Holder("attribute", shape.module, shape.name, "")
            for part in referents:
                if id(part) not in known and _worth(part):
                    yield part, _Node(f"{label}.<inside>", holder, node.depth + 1, node.weight, node.plural)

    def _attributes(self, value: Any, own: Any, shape: _Shape, node: _Node) -> list[tuple[str, Any]]:
        """Names and values of what is in its dict, if it has one, and in its slots."""
        named = []
        if type(own) is dict:
            named = [(name, part) for name, part in list(own.items()) if type(name) is str]
            if len(named) > 4 * _SAMPLE:
                # A large object is visited in several slices, and its dict may be reached by another path as well.
                if id(own) not in self._seen:
                    self._seen.add(id(own))
                    holder = _Holder("attribute", shape.module, shape.name, "__dict__")
                    self._record(own, _DICT, len(named), node._replace(label=f"{node.label}.__dict__", holder=holder))
                named = named[: 4 * _SAMPLE]
        for name, get in shape.slots:
            with contextlib.suppress(AttributeError):  # not assigned yet
                named.append((name, get(value)))
        return named

    def _stack(self, frame: Any, node: _Node, start: int) -> int | None:
        """The variables of a thread's functions, from the *start*-th on; return where to go on if it is late."""
        depth = 0
        current: types.FrameType | None = frame
        while current is not None:
            if depth >= start and current.f_code.co_filename not in _OUR_FILES:
                self._allowance = _ALLOWANCE
                owner = f"{node.label}{current.f_code.co_name}"
                for name, value in _locals_of(current):
                    holder = _Holder("local", "", owner, name)
                    self._look(value, _Node(f"{owner}: {name}", holder))
                if self._late():
                    return depth + 1
            current = current.f_back
            depth += 1
        return None


# By identity, as above: a class whose metaclass defines ``__eq__`` may have no hash at all.
_PLAIN = frozenset(map(id, (dict, list, set, deque, tuple, frozenset)))
_CALLABLES = frozenset(map(id, (types.FunctionType, types.MethodType, functools.partial)))
_SUSPENDABLE = frozenset(map(id, (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)))
_OUR_FILES = frozenset({__file__})
# They fill up with what the program imports and shows, and no more.
_WARM = frozenset({("sys", "modules"), ("sys", "path_importer_cache"), ("linecache", "cache"), ("tokenize", "cache")})


def _rank(name: str, module: Any) -> int:
    """0: the program's own; 1: of an installed package; 2: of Python."""
    first = name.partition(".")[0]
    if first == "hygiene" or (first in sys.stdlib_module_names and name != "__main__"):
        return 2
    own = _globals_of(module) if issubclass(type(module), types.ModuleType) else {}
    file = own.get("__file__") if type(own) is dict else None
    return 1 if type(file) is str and ("site-packages" in file or "dist-packages" in file) else 0


def _tasks(loops: Iterable[Any]) -> list[weakref.ref[Any]]:
    """All tasks there are; *loops* are those that run, where each keeps its own."""
    tasks = sys.modules.get("asyncio.tasks")
    if tasks is None:
        return []
    # `all_tasks` takes one loop, and there may be many. The sets are those it reads; what they hold is copied by C.
    weak = [getattr(tasks, name, None) for name in ("_all_tasks", "_scheduled_tasks")]
    references = [reference for each in weak if each is not None for reference in _copied(each.data)]
    alive = [*_copied(getattr(tasks, "_eager_tasks", ())), *(task for loop in loops for task in tasks.all_tasks(loop))]
    return [*references, *map(weakref.ref, alive)]


# Since 3.14 the sets have only the tasks of other libraries.
_TASKS_BY_LOOP = sys.version_info >= (3, 14)


def _loops_of(ident: int) -> list[Any]:
    """The event loops that a thread runs, from the variables of whoever runs them: one made of C has no frame."""
    # They may be in the middle of being imported.
    loop_class = getattr(sys.modules.get("asyncio.events"), "AbstractEventLoop", None)
    runner_class = getattr(sys.modules.get("asyncio.runners"), "Runner", None)
    frame = _thread_frame(ident) if loop_class is not None else None
    found = []
    while frame is not None:
        for _, value in _locals_of(frame):
            if type(value) is runner_class:
                value = value._loop  # noqa: PLW2901 - get_loop() would make one
            if loop_class is not None and issubclass(type(value), loop_class):
                found.append(value)
        frame = frame.f_back
    return found


def _copied(items: Iterable[Any]) -> list[Any]:
    """The items of a set that other threads, or a collection meanwhile, may change."""
    for _ in range(10):
        with contextlib.suppress(RuntimeError):
            return list(items)
    return []


def _running(task: Any) -> tuple[str, Any] | None:
    """Name and coroutine of a task that is not done."""
    if task is None or not _is_task(type(task)):
        return None
    base = sys.modules["asyncio.tasks"].Task
    coroutine = base.get_coro(task)
    return (base.get_name(task), coroutine) if id(type(coroutine)) in _SUSPENDABLE and not base.done(task) else None


def _is_task(cls: Any) -> bool:
    """Whether its instances are tasks, which are roots by themselves."""
    tasks = sys.modules.get("asyncio.tasks")
    return tasks is not None and issubclass(cls, tasks.Task)


def _worth(value: Any) -> bool:
    """Whether there may be anything in it."""
    kind = _KINDS.get(id(type(value)))
    return kind != _ATOM and (kind != _FUNCTION or _has_parts(value))


def _has_attributes(function: Any) -> bool:
    """Whether it has a dict of its own; to ask for ``__dict__`` would make one."""
    globals_, builtins_, defaults = function.__globals__, function.__builtins__, function.__kwdefaults__
    for part in gc.get_referents(function):
        if type(part) is dict and part is not globals_ and part is not builtins_ and part is not defaults:
            return True
    return False


def _has_parts(function: Any) -> bool:
    if function.__closure__ is not None:
        return True
    for value in function.__defaults__ or ():
        if _KINDS.get(id(type(value))) != _ATOM:
            return True
    return function.__kwdefaults__ is not None or _has_attributes(function)


def _bounded(value: Any, kind: int) -> bool:
    """Whether it keeps a bound of its own."""
    if kind == _DEQUE:
        return _maxlen(value) is not None
    cls = type(value)
    if cls is dict or cls is list or kind not in {_DICT, _LIST}:
        return False
    if issubclass(cls, Registry):
        limits = _limits_of(value)
        return any(bound is not None for bound in (limits.maxsize, limits.max_bytes, limits.ttl, limits.idle))
    return issubclass(cls, History)


def _within(bound: int, value: Any) -> bool:
    """Whether it is a container that is no longer than what the object beside it calls its bound."""
    if not bound:
        return False
    length = _LENGTHS.get(_KINDS.get(id(type(value))) or _kind(type(value)))
    return length is not None and length(value) <= bound


def _head(value: Any, kind: int) -> int | None:
    """What tells whether the oldest item is still the same; a set has none."""
    try:
        if kind == _DICT:
            return id(next(iter(dict.keys(value))))
        if kind == _LIST:
            return id(list.__getitem__(value, 0))
        if kind == _DEQUE:
            return id(deque.__getitem__(value, 0))
    except (IndexError, StopIteration, RuntimeError):
        return None  # another thread emptied it
    return None


def _sampled(value: Any, kind: int, size: int) -> list[Any]:
    """The first and the last items, or all; of a dict the values."""
    half = _SAMPLE // 2
    if kind in {_LIST, _TUPLE}:
        take = list.__getitem__ if kind == _LIST else tuple.__getitem__
        if size <= _SAMPLE:
            return list(take(value, slice(None)))
        return [*take(value, slice(half)), *take(value, slice(-half, None))]
    if kind == _DICT:
        values = dict.values(value)
        if size <= _SAMPLE:
            return list(values)
        return [*itertools.islice(values, half), *itertools.islice(reversed(values), half)]
    if kind == _DEQUE:
        forwards = itertools.islice(deque.__iter__(value), _SAMPLE if size <= _SAMPLE else half)
        return [*forwards, *(itertools.islice(deque.__reversed__(value), half) if size > _SAMPLE else ())]
    walk = set.__iter__ if kind == _SET else frozenset.__iter__
    return list(itertools.islice(walk(value), _SAMPLE))


# --- Sites over time --------------------------------------------------------------------------------------------------


class _Site:
    """The readings of one path: as few numbers as tell whether it grows."""

    __slots__ = (
        "base",
        "base_moment",
        "base_total",
        "count",
        "fast",
        "flat",
        "found",
        "head",
        "high",
        "last",
        "moment",
        "rises",
        "shaken",
        "slow",
        "step_moment",
        "total",
    )

    def __init__(self, found: _Found) -> None:
        self.found = found
        self.shaken = 0
        self.high = self.last = found.total / found.count
        self.head = found.head
        self.moment = found.moment
        self._begin(found)

    def _begin(self, found: _Found) -> None:
        """Count rises from here."""
        self.base = self.last
        self.base_total = self.total = found.total
        self.base_moment = self.step_moment = self.moment
        self.rises = self.flat = 0
        self.slow, self.fast = math.inf, 0.0

    def read(self, found: _Found) -> None:
        """One reading more."""
        self.found = found
        mean = found.total / found.count
        self.total = found.total
        before, self.last, self.moment = self.last, mean, found.moment
        if found.head != self.head:
            # What came first has left: so things do leave.
            self.shaken += self.head is not None and found.head is not None
            self.head = found.head
        if mean > before:
            self.flat = 0
            if mean > self.high:
                pace = (mean - before) / max(self.moment - self.step_moment, 1e-9)
                self.slow, self.fast = min(self.slow, pace), max(self.fast, pace)
                self.rises += 1
            self.step_moment = self.moment
        elif mean == before:
            self.flat += 1
            if self.flat >= _QUIET:
                self._begin(found)
        else:
            self.shaken += 1
            # A leak under traffic dips now and then; what gives back more than a quarter of it is no leak.
            if not self.growing or mean < self.base + 0.75 * (before - self.base):
                self._begin(found)
        self.high = max(self.high, mean)

    @property
    def growing(self) -> bool:
        """Whether it has risen often enough, and by enough."""
        even = self.fast <= 3 * self.slow
        # Nobody can see what leaves a set; and a mean of many moves by chance, when another few are seen.
        unsure = 2 * self.found.several + (self.found.kind == _SET)
        needed = (3 if even else 5) + unsure + 3 * min(self.shaken, 4)
        return (
            self.rises >= needed
            and self.flat < _PAUSE
            and (self.last - self.base) * self.found.count >= _RISE
            and self.total > self.base_total
        )

    @property
    def rate(self) -> float:
        """Items a second since it began to grow, all its instances together."""
        return (self.last - self.base) * self.found.count / max(self.moment - self.base_moment, 1e-9)

    def grower(self, path: str) -> Grower:
        """The site at *path* as it is reported."""
        found = self.found
        instances = max(round(found.count), 1)
        return Grower(
            path=f"{path} (over {instances:,} instances)" if instances > 1 else path,
            size=round(found.total),
            rate=self.rate,
            suggestion=_suggestion(path, self),
            kind=_NAMES[found.kind],
            instances=instances,
        )


# Readings without growth after which a site is quiet, and after which its growth is over.
_PAUSE = 4
_QUIET = 10


@dataclass(frozen=True, slots=True)
class Grower:
    """One container, or one attribute of many instances, that grows."""

    path: str
    """
    Where it is: ``bot.state.conversations``, ``shop.Bot.sessions``, ``Session.events (over 1,200 instances)``,
    ``make.<locals>.handler: seen`` (a closure), ``task worker: pending`` (a local variable).
    """
    size: int
    """Items in it now; an estimate where there are many instances."""
    rate: float
    """Items a second since it began to grow."""
    suggestion: str
    """The line that would bound it."""
    kind: str
    """``"dict"``, ``"list"``, ``"set"``, ``"deque"`` or ``"cache"``."""
    instances: int = 1
    """How many of them there are; an estimate."""

    def __str__(self) -> str:
        return f"{self.path}: {plural(self.size, 'item')}, {per_time(self.rate)}; {self.suggestion}"


class GrowthWatch:
    """
    Names what grows, while it is open. Made by `watch_growth`.

    The janitor, the one background thread of this library, does the reading: a walk over the process in slices of
    about 1.5 ms. Safe to use from any thread. It costs memory for the paths it follows, 20,000 at the most.
    """

    def __init__(self, interval: Duration = 60.0, *, timer: Callable[[], float] = time.monotonic) -> None:
        self.interval = seconds(interval, "interval")
        """Seconds between two readings, at the least."""
        self.readings = 0
        """Readings that are complete."""
        self.longest_slice = 0.0
        """Seconds of one core that the longest slice has taken so far: no thread was held up for longer."""
        self.spent = 0.0
        """Seconds of one core that it has taken so far."""
        self._timer = timer
        self._sites: dict[str, _Site] = {}
        self._growers: tuple[Grower, ...] = ()
        self._began = -math.inf
        self._skip = 0  # readings to come that leave libraries out
        self._closed = False
        self._after_fork()
        survive_fork(self)
        if not getattr(timer, "manual", False):
            janitor.watch(self, 0.0)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        # Begun anew: a slice that was under way belongs to a thread that does not exist in a child.
        self._walk: _Walk | None = None
        self._notes: Iterator[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether it has stopped reading."""
        return self._closed

    def growers(self) -> list[Grower]:
        """
        What grew at the last readings, the fastest first.

        Nothing is named before its fourth reading, and what goes up and down needs more. Still there after `close`.
        """
        return list(self._growers)

    def read(self, now: float | None = None, *, libraries: bool = True) -> list[Grower]:
        """
        Take a whole reading at once, in this thread, and return the `growers`.

        Args:
            now: The time to note for it, in seconds of the *timer*; by default it is asked.
            libraries: Whether to begin at the globals of Python's own modules and of installed packages, too.

        Raises:
            ValueError: it was closed.
        """
        with self._lock:
            if self._closed:
                raise ValueError("wanted a reading, found that watching has ended. Read before close()")
            walk = self._walk = _Walk(libraries=libraries)
            self._notes = None
            moment = self._timer() if now is None else now
            while not self._slice(walk, moment):
                pass
            return self.growers()

    def finish(self, timeout: Duration = 2.0) -> list[Grower]:
        """
        Take a last reading in this thread, close, and return the `growers` with their sizes as they are now.

        A container that an earlier reading named is still named, with its last size, if this reading no longer finds
        it: at the exit of a program the variables of its functions are gone, and some programs clear their containers.

        Args:
            timeout: Seconds, or text, after which the reading is given up and the last complete one counts. 2: a walk
                over a million objects takes less.
        """
        limit = time.perf_counter() + seconds(timeout, "timeout")
        with self._lock:
            if self._closed:
                return self.growers()
            before = {path: site.grower(path) for path, site in self._sites.items() if site.growing}
            walk = self._walk = _Walk(libraries=False)
            self._notes = None
            moment = self._timer()
            while not (done := self._slice(walk, moment)) and time.perf_counter() < limit:
                pass
            if done:
                now = {path: site.grower(path) for path, site in self._sites.items() if site.growing}
                self._growers = _fastest_first({**before, **now}.values())
            self.close()
            return self.growers()

    def close(self) -> None:
        """Stop reading; what was found stays. Closing twice does no harm."""
        with self._lock:
            self._closed = True
            self._walk = self._notes = None
            self._sites = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"every {self.interval:g} s"
        return f"<watch_growth {state}, {self.readings} readings, {len(self._growers)} growers>"

    def _visit(self) -> float | None:
        """One slice, for the janitor."""
        # Who reads in the foreground has just begun a new walk, and the janitor has others to look after.
        if not self._lock.acquire(blocking=False):
            return _SLICE
        try:
            if self._closed:
                return None
            now = self._timer()
            walk = self._walk
            if walk is None:
                walk = self._walk = _Walk(libraries=self._skip == 0)
                self._began = now
            before = walk.spent
            done = self._slice(walk, now)
            # A slower pace than the interval asks for, where the process is so large that it would cost too much.
            share = min(_MOST, _WORK / self.interval)
            pause = (walk.spent - before) * (1.0 / share - 1.0)
            if done:
                # Most of what there is to walk over is libraries, and few of them leak by a global of their own.
                slow = walk.spent > share * self.interval / 2 or self._timer() - self._began > self.interval / 2
                self._skip = max(self._skip - 1, 0) if not walk.libraries else _SKIPPED * slow
            return max(pause, self._began + self.interval - now) if done else pause
        finally:
            self._lock.release()

    def _slice(self, walk: _Walk, now: float) -> bool:
        before = walk.spent
        if self._notes is None and walk.go_on(now, _SLICE):
            self._notes = self._noted(walk)
        done = False
        if self._notes is not None:
            began = time.thread_time()
            while not done and walk.spent - before + time.thread_time() - began < _SLICE:
                done = next(self._notes, _OVER) is _OVER
            walk.spent += time.thread_time() - began
            if done:
                self._notes = self._walk = None
        took = walk.spent - before
        self.spent += took
        self.longest_slice = max(self.longest_slice, took)
        return done

    def _noted(self, walk: _Walk) -> Iterator[None]:
        """A walk is complete: one reading more of each site, some sites at a time."""
        known, sites = self._sites, dict[str, _Site]()
        growing: list[Grower] = []
        for place, (path, found) in enumerate(walk.found.items()):
            site = known.get(path)
            if site is None or site.found.kind != found.kind:
                site = _Site(found)
            else:
                site.read(found)
            sites[path] = site
            if site.growing:
                growing.append(site.grower(path))
            if place % _SITES_AT_ONCE == 0:
                yield
        for path, site in known.items() if not walk.libraries else ():
            if site.found.library and path not in sites:
                sites[path] = site
                if site.growing:
                    growing.append(site.grower(path))
        self._note(sites, growing)

    def _note(self, sites: dict[str, _Site], growing: list[Grower]) -> None:
        self._sites = sites
        self._growers = _fastest_first(growing)
        self.readings += 1


def _fastest_first(growers: Iterable[Grower]) -> tuple[Grower, ...]:
    return tuple(sorted(growers, key=attrgetter("rate"), reverse=True))


_OURS = frozenset({id(_Walk), id(_Site), id(_Found)})


def watch_growth(interval: Duration = 60.0, *, timer: Callable[[], float] = time.monotonic) -> GrowthWatch:
    """
    Find out which containers of this process grow, while it runs.

    ```python
    with watch_growth(interval=1.0) as growth:
        serve()
        for grower in growth.growers():
            print(grower.path, grower.size, grower.rate, grower.suggestion)
    ```

    It watches until it is closed, left or collected. Bounded containers (a `Registry` or `History`, a deque with
    ``maxlen``, an ``lru_cache`` with ``maxsize``) are never named. No method of the program's objects is called.

    Args:
        interval: Time between two readings, such as ``1.0`` or ``"30s"``. The default of a minute costs less than
            1 % of one core, however large the process is: there, a reading takes longer. Shorter intervals cost more,
            half of one core at the most.
        timer: Returns monotonic seconds. With a `hygiene.testing.ManualClock` nothing is read in the background; call
            ``read()``.

    Returns:
        A `GrowthWatch`, which is a context manager.

    Raises:
        ValueError: *interval* is not positive.
        TypeError: *interval* is no duration.
    """
    return GrowthWatch(interval, timer=timer)


# --- What would bound it ----------------------------------------------------------------------------------------------

_LISTENERS = re.compile(r"listener|callback|handler|subscriber|observer|hook|watcher", re.IGNORECASE)


def _suggestion(path: str, site: _Site) -> str:
    found = site.found
    place, module, owner, name = found.holder
    most = _round(site.base)
    calls = found.calls or (found.depth == 0 and found.kind in {_LIST, _SET} and _LISTENERS.search(name))
    if place == "cache":
        return f"@lru_cache(maxsize={most})  # on {owner}"
    if place == "attribute" and owner.endswith("Queue") and name in {"queue", "_queue"}:
        return f"{owner}(maxsize={most})"
    if place == "attribute" and calls:
        return f'@weak_listeners("{name}")  # {_above(owner)}'
    named = place == "attribute" or (place == "global" and not owner)
    if not named or calls or found.kind in {_SET, _DEQUE} or found.depth > 1 or name in {"", "__dict__"}:
        return _replaced(path, found, most)
    limits = f"maxsize={most}"
    if found.depth == 1:
        limits += ", depth=1" if found.kind == _DICT else f", values=partial(History, maxlen={most})"
    elif found.kind == _LIST:
        limits = f"maxlen={most}"
    if place == "global" or ("<locals>" not in owner and _rank(module, sys.modules.get(module)) > 0):
        return f'guard("{f"{module}:{owner}" if owner else module}", "{name}", {limits})'
    decorator = "bounded_history" if limits.startswith("maxlen") else "bounded_registry"
    return f'@{decorator}("{name}", {limits})  # {_above(owner)}'


def _above(owner: str) -> str:
    return f"above class {owner.rpartition('.')[2]}"


def _replaced(path: str, found: _Found, most: int) -> str:
    """No decorator reaches it: what to write in its place."""
    if found.holder.name == "__dict__":
        return f"self.items = Registry(maxsize={most})  # in place of attributes that are set by name"
    name = found.holder.name if found.depth == 0 and found.holder.name.isidentifier() else path
    if found.holder.place == "attribute" and found.depth == 0:
        name = f"self.{name}"
    if found.kind == _SET:
        return f"{name} = Registry(maxsize={most})  # in place of the set: {name}[item] = True"
    if found.kind == _DEQUE:
        return f"{name} = deque(maxlen={most})"
    return f"{name} = {'Registry(maxsize' if found.kind == _DICT else 'History(maxlen'}={most})"


def _round(size: float) -> int:
    """A round number that leaves room for what was there before it grew; 1,000 at the least."""
    power = 1_000
    while power < size:
        power *= 10
    return next(choice for choice in (power // 5, power // 2, power) if choice >= max(size, 1_000))
