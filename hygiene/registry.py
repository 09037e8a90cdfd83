"""A dict that stays within its bounds.

Theory of operation
===================

**Storage.** A `Registry` is a kernel by construction (see `hygiene.kernel`): a dict's own storage in insertion order,
which is what everybody sees, and beside it the order of recency, which nobody sees. Reads never change the iteration
order, and C code that reads the storage directly (``json``, ``orjson``, ``msgspec``) sees the true entries. The kernel
is the short way of reads and writes, in C where it is compiled; what is here is the long way, the same for both.

**Reads take no lock.** Under the GIL each word of the kernel's vocabulary is atomic. A read moves the key to the recent
end and fetches the value; if another thread removed the entry in between, the read goes the slow way.

**Keys that run code.** A word is atomic only as long as it does not compare keys in Python. The compiled kernel looks
again after each comparison. For the Python one the first key whose ``__eq__`` is Python code (a dataclass, a UUID)
makes the registry *guarded*: from then on whatever touches an order takes the lock.

**Writes.** With nothing but *maxsize* a write takes no lock either: it stores, looks at the length, and over the bound
takes the oldest out, each by one C call. Everybody who inserts looks, so at rest the bound holds. With anything that
must stay in step with the entries (hooks, times, bytes, busy, columns) writes take the lock, briefly; what is still
over then is swept by whoever gets the broom without waiting, and the others go on. (A lock that every writer waits for
is a convoy under the GIL: four threads reach a fifth of one thread's rate.)

**Interruptions.** A signal handler may raise at the entry of a function, at the return of a call, and at the back edge
of a loop; a key may raise when it is compared. So an exception may come between any two steps of a change. The entries
themselves change in one call of C, and what has to be reported of a removal is recorded in the same step. Everything
beside the entries (order, weights, times) can be derived from them: an operation that is cut short derives it again
(`_repair`), which costs nothing where no exception comes. A hook is called at most once for each removal. It is called
exactly once unless the interruption comes inside the hook itself.

**User code runs outside the lock.** ``busy``, ``importance`` and ``getsizeof`` are asked, hooks told and values
released with the lock free. An entry that is being asked about is taken out of the order first and looked at again
afterwards: if it was used, leased or written meanwhile, it stays. Removed values travel out in a list, so that the
last reference to a value (whose ``__del__`` is user code too) never dies inside. The lock is reentrant because a
garbage collection may run a finalizer, which may use this registry, between any two lines.

**Time.** Write times in write order, use times in order of use: whoever is first is due first. `_due` is a lower
bound of the next expiry, so a read compares the clock with one number. When something is due, each operation drops at
most a slice, and looks at its own entry by itself; the janitor does the rest.

**Busy and leased** entries leave the order (`LinkedOrder`). Where nobody can be busy there is none beside the kernel's
own, and what is leased is moved out of the way to the recent end, where the end of its lease will put it anyway; where
that happens too often in a row, there is one from then on. What was found busy counts as used at that moment.

**Classes.** Reading an entry that has times costs more than reading one that has none, so there are two classes; once
its limits are known, a registry that has times becomes the twin of its class. A column of a group (`hygiene.group`) and
what takes the place of a user's dict (`hygiene.adoption`) have classes of their own, which say what copies and pickles
of them are.

**Copies.** ``dict(r)`` and ``{**r}`` of a dict subclass with its own ``__iter__`` fetch ``keys()`` and then each
value through ``__getitem__``, from C. That must not count as use, and must not fail when an entry leaves halfway. See
`_begin_copy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import heapq
import itertools
import math
import sys
import threading
import time
import types
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from sys import getrefcount
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Self, TypeVar, cast, overload

from hygiene.cleanup import close_at_shutdown
from hygiene.closing import Closer, Closing, Releases, running_loop
from hygiene.errors import HOOK_ERRORS, HygieneError, OwnershipLost, RegistryFull, StoreError, VersionConflict
from hygiene.events import Cause, Entry, RegistryStats, Removal
from hygiene.janitor import janitor, survive_fork
from hygiene.keeping import TOO_MANY, Keeper, Loading, Overtaken, outdate
from hygiene.kernel import (
    ATOMIC,
    CROWDED,
    FRAMES,
    MISSING,
    PARKS,
    STATE,
    STRONG,
    Kernel,
    LinkedOrder,
    by_recency,
    contains_timed,
    get_timed,
    is_atomic,
    move,
    oldest,
    quicken,
    read_timed,
    store,
    take,
    take_oldest,
)
from hygiene.limits import LIVE, Busy, Limits, Overflow, Policy
from hygiene.logs import logger
from hygiene.names import suggestion, suggests
from hygiene.pins import Flight, Lease
from hygiene.recency import CachetoolsOrder, FrequencyOrder, ImportanceOrder, Order
from hygiene.references import own_references
from hygiene.sizing import sizeof
from hygiene.stores import Store
from hygiene.tail import FOREVER, Kept, Tail, is_constant
from hygiene.units import Duration, Size, nbytes, seconds
from hygiene.views import RegistryItems, RegistryKeys, RegistryValues
from hygiene.writebehind import WriteBehind

__all__ = ["CLOSED", "PASSED_ON", "POLLS", "Gone", "Lease", "Registry", "Timed", "converted", "make", "referenced"]


K = TypeVar("K")
V = TypeVar("V")
D = TypeVar("D")
T = TypeVar("T")  # as a limit is read
S = TypeVar("S")  # as it may be assigned

# What is read past the kernel: single C calls of any dict.
_fetch = dict.__getitem__
_look = dict.get
_has = dict.__contains__

_NEVER = math.inf
# In the place of the key in the record of a removal: its hook was called.
_TOLD: Any = object()
# In the place of a record of which nothing is left to do.
_DONE: Any = None
_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()

# What one call does at most of the work that others left behind: under 0.2 ms on a slow machine, for a promise of 1 ms.
_SLICE = 32
# Leased entries met in a row at the old end before the order is kept beside: fewer cost less than that order does.
_SKIPS = 64
# Busy entries asked again in one sweep whether they still are.
POLLS = 16
# Evicted values that are kept aside because they are still referenced: at most these, or *maxsize*.
_ASIDE = 1000
# Seconds between two looks at them by the janitor, which grow while they stay; and objects that are walked where the
# program waits for the answer (the janitor walks more, see `hygiene.references`).
_FIRST_LOOK, _LAST_LOOK = 1.0, 5.0
_FEW = 100
# An evicted value that nobody else holds is about to die, and need not be kept aside. What `getrefcount` says of an
# object that one local variable holds, and of one that was passed on from there: up to Python 3.13 an argument is a
# reference of its own, later it may be lent. Fewer would be safe, more would lose what somebody holds.
_LOCAL, PASSED_ON = (2, 3) if sys.version_info < (3, 14) else (1, 1)


# One entry on its way out: registry, key, value, cause, age, time idle, and the loop that it was put in from, or the
# `Closing` that knows it. A plain tuple, since one is made for every entry that leaves.
Gone = tuple[
    "Registry[Any, Any]", Any, Any, Cause, float | None, float | None, asyncio.AbstractEventLoop | Closing | None
]


class _Place:
    """
    Room for a new entry, kept free from before its factory is called until the entry is in.

    The registry holds it weakly, so it ends with the call that took it, however that call ends.
    """

    __slots__ = ("__weakref__", "key")

    def __init__(self, key: Any) -> None:
        self.key = key


class _Offer:
    """A value that a factory returned: the value as the registry would hold it, and whether the registry holds it."""

    __slots__ = ("taken", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.taken = False


class _Copy(NamedTuple):
    """A ``dict(r)`` in progress: the instruction that does it, and the entries as they stood when it began."""

    frame: int
    instruction: int
    entries: list[tuple[Any, Any]]  # last first


class _LiveLimit(Generic[T, S]):
    """A limit that may be assigned at any time: reads from the registry's limits, and changes what it bounds."""

    def __init__(self, name: str, doc: str) -> None:
        self._name = name
        self.__doc__ = doc

    @overload
    def __get__(self, registry: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, registry: Registry[Any, Any], owner: type[Any]) -> T: ...
    def __get__(self, registry: Registry[Any, Any] | None, owner: type[Any]) -> T | Self:
        if registry is None:
            return self._of_class(owner)
        return cast("T", getattr(registry._limits, self._name))

    def _of_class(self, owner: type[Any]) -> Self:  # noqa: ARG002 - another one looks
        return self

    def __set__(self, registry: Registry[Any, Any], value: S) -> None:
        if hasattr(registry, "_limits"):
            registry._set_limit(self._name, value)
        else:  # a subclass assigns before it calls our ``__init__``, which then finds it
            registry.__dict__[self._name] = value


class _DefaultFactory(_LiveLimit["Callable[[], Any] | None", "Callable[[], Any] | None"]):
    """The attribute of instances; the class has none, or ``dataclasses.asdict`` would take it for a defaultdict."""

    def _of_class(self, owner: type[Any]) -> Self:
        raise AttributeError(f"type object {owner.__name__!r} has no attribute 'default_factory'")


def referenced(entry: Entry[Any, Any]) -> bool:
    """
    True if another part of the program holds a reference to the entry's value: for ``busy=hygiene.referenced``.

    References from the value's own parts do not count: a bound method in one of its attributes, the parent links of
    its children, a list in itself. The parts are found by a walk over at most 1,000 objects, which calls no code of
    the program; a value that refers to itself from further away counts as referenced. Where another part of the
    program holds such a part, and the part refers to the value, the value is referenced.

    Works for values that cannot be weakly referenced (plain dicts and lists). CPython only. Values that CPython itself
    shares (``None``, small integers) do not count as referenced; other constants of the program do.
    """
    count = getrefcount(entry.value)
    return _ALONE < count < FOREVER and count - own_references(entry.value) > _ALONE


_ALONE = 3  # the registry's storage, the entry, the argument of getrefcount


@quicken
class Registry(Kernel[K, V]):
    """
    A dict that stays within its bounds: what is least recently used leaves first, what is in use stays.

    A true dict to everybody (``isinstance``, ``json``, ``orjson``, ``pickle``, ``copy``, ``==``, ``|``), iterated in
    insertion order. ``r[k]``, ``get`` and ``setdefault`` count as use; ``in``, ``len``, loops, views, ``repr``,
    ``==`` and copies do not. A loop over it or its views walks a snapshot, skips what has left, and never raises
    because something did. Limits combine.

    An expired entry is never returned by a lookup, and the janitor drops it without anyone having to read it; until
    then ``len`` and C code may still see it. Safe to share between threads and tasks, and after ``fork``. Hooks run
    in the thread that caused the removal, after the lock is released, so they may use the registry; what they raise
    is logged and counted in `stats`, not passed to the writer.

    Args:
        source: What ``dict`` takes: a mapping or pairs.
        maxsize: Upper bound on ``len``, at least 1. ``None``: no bound.
        max_bytes: Upper bound on the estimated bytes of the values: a number, or text such as ``"64MiB"``.
        getsizeof: Measures a value in bytes; the default is `hygiene.sizing.sizeof`. What was read or leased may have
            grown in place, and is measured again.
        ttl: How long an entry lives after it was last *written*: seconds, a ``timedelta``, or ``"90s"``, ``"30m"``,
            ``"2h"``, ``"1d"``.
        idle: How long it lives after it was last *used*.
        policy: Who leaves first: ``"lru"`` (exact; the default, since what is used goes on being used), ``"fifo"``
            (an overwrite keeps its place), ``"lfu"``, ``"importance"`` (lowest first), ``"none"`` (nobody; the new is
            refused), or a ``cachetools.Cache`` subclass.
        importance: For that policy: takes an `Entry`, returns a number; asked on each write, `touch` and lease exit.
        busy: Whether an entry is in use, so that it neither evicts nor expires: a callable that takes an `Entry`, the
            name of an attribute or method of the value (``"locked"``), or `referenced`.
        on_evict: Told each `Removal`: a callable, or the name of a method of the owner.
        close: Releases a value that leaves by the registry's own decision (not by ``del``, ``pop``, ``clear`` or
            overwriting): a callable, a method's name, or ``"auto"``. An asynchronous one runs on the event loop that
            the value was put in from.
        overflow: When everything is busy or leased: ``"grow"`` exceeds the bound and logs it, ``"raise"`` raises
            `RegistryFull`.
        revive: Whether an evicted value that another part of the program still references is found again, as the same
            object (off where *close* is given). At most 1,000 values, or *maxsize* if that is more, are kept for it.
        store: Where entries are kept that are not in memory: an address such as ``"sqlite:chats.db"``, a `Store`, or a
            `WriteBehind`. Then what leaves by itself is saved first and comes back when it is asked for; ``in``,
            ``del``, ``pop``, ``setdefault`` and ``clear`` mean memory and store together, ``len`` and loops memory;
            lists become a `History`. ``ttl`` ends an entry in the store, too, ``idle`` only its time in memory. The
            space in the store is *name*; one registry at a time keeps a space.
        values: Converts each value that is put in; a class (or a ``partial`` of one) converts only instances of its
            base, so that ``partial(History, maxlen=50)`` takes lists.
        default_factory: As in ``defaultdict``; concurrent lookups get one and the same value.
        name: What logs and reports call it.
        timer: Returns monotonic seconds. Tests pass a `hygiene.testing.ManualClock`.

    Raises:
        ValueError: a number is out of its range, text is not understood, or two arguments contradict each other.
        TypeError: an argument is of the wrong kind.
        StoreUnavailable, StoreError: the store cannot be opened, or another registry keeps the space; see `open_store`.
    """

    __slots__ = (
        "_bare",
        "_broom",
        "_byte_bound",
        "_bytes",
        "_closings",
        "_copies",
        "_counts",
        "_damaged",
        "_early",
        "_flights",
        "_forgotten",
        "_guarded",
        "_hits",
        "_hook_errors",
        "_known",
        "_left",
        "_lent",
        "_limits",
        "_lock",
        "_loops",
        "_misses",
        "_moves",
        "_name",
        "_order",
        "_overflowed",
        "_overtaken",
        "_owner",
        "_parked",
        "_places",
        "_reads",
        "_releases",
        "_revived",
        "_saves",
        "_sizes",
        "_strict",
    )

    @suggests
    def __init__(
        self,
        source: Mapping[K, V] | Iterable[tuple[K, V]] = (),
        /,
        *,
        maxsize: int | None = None,
        max_bytes: Size | None = None,
        getsizeof: Callable[[V], int] | None = None,
        ttl: Duration | None = None,
        idle: Duration | None = None,
        policy: Policy = "lru",
        importance: Callable[[Entry[K, V]], float] | None = None,
        busy: Busy | None = None,
        on_evict: Callable[[Removal[K, V]], Any] | str | None = None,
        close: Closer | None = None,
        overflow: Overflow = "grow",
        revive: bool = True,
        store: str | Store | WriteBehind | None = None,
        values: Callable[[Any], V] | None = None,
        default_factory: Callable[[], V] | None = None,
        name: str | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(on_evict, str):
            raise ValueError(  # noqa: TRY004 - a name is a right type, in the wrong place
                f"on_evict={on_evict!r} names a method of the owner, the object whose attribute a decorator bounds; "
                "a registry made by itself has none. Pass the method"
            )
        if not hasattr(self, "_limits"):  # called again on a living dict, ``__init__`` is an update
            self._configure(
                Limits.of(
                    maxsize=maxsize,
                    max_bytes=max_bytes,
                    getsizeof=getsizeof,
                    ttl=ttl,
                    idle=idle,
                    policy=policy,
                    importance=importance,
                    busy=busy,
                    on_evict=on_evict,
                    close=close,
                    overflow=overflow,
                    revive=revive,
                    store=store,
                    values=values,
                    default_factory=default_factory,
                    name=name,
                    timer=timer,
                )
            )
            self._begin_keeping()
            if type(self) not in CLOSED:
                self._take_assigned()
        self._fill(source)

    maxsize = _LiveLimit["int | None", "int | None"](
        "maxsize", "Upper bound on ``len``; ``None``: no bound. May be assigned, and then evicts at once."
    )
    max_bytes = _LiveLimit["int | None", "Size | None"](
        "max_bytes", "Upper bound on the estimated bytes of the values; ``None``: no bound. May be assigned."
    )
    ttl = _LiveLimit["float | None", "Duration | None"](
        "ttl", "Seconds that an entry lives after its last write; ``None``: no end. May be assigned."
    )
    idle = _LiveLimit["float | None", "Duration | None"](
        "idle", "Seconds that an entry lives after its last use; ``None``: no end. May be assigned."
    )
    default_factory = _DefaultFactory("default_factory", "Makes the value of a key that is not here. May be assigned.")

    def __setattr__(self, name: str, value: Any, /) -> None:
        # A setting that is misspelt must not go unseen in the ``__dict__`` that every OrderedDict has.
        if name not in _ATTRIBUTES and not _takes(self, name):
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r} to set.{suggestion(name, LIVE)} "
                "A subclass of Registry may have attributes of its own.",
                name=name,
                obj=self,
            )
        _assign(self, name, value)

    _keeper: Keeper | None
    _tail: Tail | None

    def _configure(self, limits: Limits, owner: object | None = None) -> None:
        self._limits = limits
        self._name = limits.name
        self._owner = _reference(owner)
        self._lock = threading.RLock()
        self._broom: dict[int, list[None]] = {}  # holds the mark of the call that sweeps; see `_sweep`
        self._damaged = False  # an exception cut a change short; see `_repair`
        self._byte_bound = limits.max_bytes
        self._bytes = 0
        self._sizes: dict[Any, int] | None = None if limits.max_bytes is None else {}
        self._lent: dict[Any, None] | None = None if limits.max_bytes is None else {}
        self._asking: set[int] = set()  # threads that are inside the user's *busy*
        self._flights: dict[Any, Flight] = {}
        self._places: weakref.WeakSet[_Place] | None = None
        self._copies: dict[int, _Copy] = {}
        self._releases = None if limits.close is None else Releases(self._release_failed_hook())
        self._closings: dict[Any, weakref.ref[Closing]] | None = None if limits.close is None else {}
        self._loops: dict[Any, asyncio.AbstractEventLoop] = {}
        self._known = False  # to `shutdown`, from the first value on that has to be closed
        self._counts: dict[Cause, int] = {}
        self._reads = self._hits = self._misses = self._revived = self._hook_errors = self._forgotten = 0
        self._overflowed = False
        self._overtaken: dict[Any, Overtaken] | None = None  # values that were leased when their registry was closed
        # The janitor lives in real time: a clock that a test turns by hand is none of its business.
        self._watched = bool(getattr(limits.timer, "manual", False))
        self._guarded = not _GIL
        self._saves = limits.store is not None  # what leaves is saved first
        self._strict = True  # a name given for *busy* or *close* that no value has must not go unseen
        self._parked: dict[Any, None] = {}  # an OrderedDict does not survive a comparison of keys that changes it
        timed = limits.ttl is not None or limits.idle is not None
        told = limits.on_evict is not None
        if (timed or told or self._saves) and not isinstance(self, Timed):
            # Reading an entry that has times costs more than reading one that has none, so there are two classes.
            # Which it is, is known only here: a subclass may give the limits in its own ``__init__``.
            self.__class__ = _timed(type(self))
        self._open(
            sys.maxsize if limits.maxsize is None else limits.maxsize,
            limits.timer if isinstance(self, Timed) else None,
            written=limits.ttl is not None or told,
            used=limits.idle is not None or told,
        )
        self._bare = False  # whether to take an entry out of the kernel is all that there is to do
        self._order: Order | None = None
        self._moves = limits.policy == "lru"
        if limits.policy == "lfu":
            self._order = FrequencyOrder()
        elif limits.policy == "importance":
            self._order = ImportanceOrder()
        elif not isinstance(limits.policy, str):
            self._order = CachetoolsOrder(limits.policy)
        elif limits.busy is not None:
            self._order = LinkedOrder(self, moves=self._moves)
        self._held: dict[
            Any, tuple[float, float]
        ] = {}  # in use when its time was over: when to look again, and its time
        self._left: dict[Any, tuple[float | None, float | None]] = {}
        self._early: list[tuple[float, int, Any, float]] = []
        self._choose_paths()
        survive_fork(self)

    def _begin_keeping(self) -> None:
        """Open the store, if there is to be one; the registry has its name and its owner by now."""
        if self._saves:
            self._keeper = Keeper(self, self._limits.store, self._name or "default")

    def _take_assigned(self) -> None:
        """Limits that a subclass assigned before it called ``__init__``; those passed to it win."""
        for name in LIVE:
            if name in self.__dict__:
                value = self.__dict__.pop(name)
                if getattr(self._limits, name) is None:
                    setattr(self, name, value)

    def _set_limit(self, name: str, value: Any) -> None:
        """Change a limit of a living registry: checked first, then in force at once."""
        limits = self._limits.changed(name, value)
        if name in ("ttl", "idle"):
            self.expire()  # a longer time brings nothing back that is over already
        with self._lock:
            self._limits = self._limits.changed(name, getattr(limits, name))
            if name == "maxsize":
                self._bound = sys.maxsize if limits.maxsize is None else limits.maxsize
            elif name == "max_bytes":
                self._byte_bound = limits.max_bytes
                self._measure_from_now_on(wanted=limits.max_bytes is not None)
            elif name in ("ttl", "idle"):
                self._change_times()
            self._choose_paths()
        self._keep_to_limits(name)

    def _keep_to_limits(self, name: str) -> None:
        """What is over a limit that has just changed leaves. No lock is held."""
        if name == "max_bytes":
            self._weigh_all()
        elif name == "ttl" and self._keeper is not None:
            self._save_ends()
        if name in ("ttl", "idle"):
            self.expire()
            if not getattr(self._limits.timer, "manual", False):  # those nobody watches
                self._watched = False
                self._be_watched(anew=True)
        if self._over():
            self._sweep()
        if not self._over():
            self._overflowed = False

    def _save_ends(self) -> None:
        """Save the entries in memory with their new ends. Entries that are only in the store keep theirs."""
        keeper = self._keeper
        assert keeper is not None
        for key, value in list(dict.items(self)):
            with contextlib.suppress(StoreError):  # it stays pending, or is told where the entry is used next
                keeper.changed(key, value)

    def _measure_from_now_on(self, *, wanted: bool) -> None:
        """Begin or end to keep the weights of values. The lock is held."""
        if not wanted:
            self._sizes = self._lent = None
            self._bytes = 0
        elif self._sizes is None:
            self._sizes, self._lent, self._bytes = {}, {}, 0

    def _weigh_all(self) -> None:
        """Weigh every entry that has no weight yet. No lock is held."""
        while (sizes := self._sizes) is not None:
            unknown = [key for key in list(dict.keys(self)) if key not in sizes]
            weighed = False
            for key in unknown:
                value = _look(self, key, MISSING)
                if value is MISSING:
                    continue
                size = self._weigh(key, value)
                with self._lock:
                    if self._sizes is sizes and key not in sizes and _look(self, key, MISSING) is value:
                        self._resize(key, size)
                        weighed = True
                del value
            if not weighed:
                return

    def _change_times(self) -> None:
        """Entries get the times that the limits need now; due is what the new limits say. The lock is held."""
        if not isinstance(self, Timed):
            if self._limits.ttl is self._limits.idle is None:
                return
            self.__class__ = _timed(type(self))
        cast("Timed[K, V]", self)._reconsider_times()

    def _choose_paths(self) -> None:
        """Decide which reads and writes may go the short way: those with nothing to keep in step."""
        limits = self._limits
        own_list = self._order is None or (PARKS and isinstance(self._order, LinkedOrder))
        reads = own_list and not self._guarded and self._sizes is None
        self._take_paths(
            reads=reads and not self._copies,
            misses=limits.default_factory is None
            and type(self).__missing__ is Registry.__missing__
            and not self._saves,
            writes=reads and self._order is None and limits.on_evict is None and self._plain_writes(),
            moves=self._moves,
            uses_in_order=self._order is not None or not self._moves,
        )
        self._bare = self._light and not self._clocked

    def _guard(self) -> None:
        """From now on every operation on an order takes the lock: a key whose comparison is Python code has come."""
        with self._lock:
            self._guarded = True
            self._choose_paths()

    def _plain_writes(self) -> bool:
        limits = self._limits
        return limits.close is None and limits.values is None and limits.overflow == "grow" and not self._saves

    @property
    def owner(self) -> Any:
        """The object whose attribute this is, held weakly where that can be; ``None`` if there is none now."""
        return self._owner()

    @property
    def group(self) -> Any:
        """The group that this is a column of, or ``None``."""
        return None

    # Reading: what the kernel does not know by itself.

    def _has_elsewhere(self, key: object) -> bool:
        # An evicted value that somebody holds is found by a lookup, so `if k not in locks: locks[k] = Lock()` must not
        # make a second one.
        if self._tail is not None and self._revive(key) is not MISSING:
            return True
        return self._keeper is not None and self._keeper.contains(key)

    def __missing__(self, key: K) -> V:
        factory = self._limits.default_factory
        if factory is None:
            raise KeyError(key)
        place = self._take_place(key)
        try:
            return cast("V", self._put_made(key, factory()))
        finally:
            self._give_place_back(place)

    def peek(self, key: K, default: Any = None) -> Any:
        """
        The value of *key*, or *default*, without counting as use; an expired entry is not there.

        What is only in the *store* comes as a copy, whose changes are nobody's business, and stays there.
        """
        value = _look(self, key, MISSING)
        if value is MISSING and self._tail is not None and not self._drop_ended(key):
            self._drop_unreferenced(key)
            value = self._in_tail(key, MISSING)
        if value is MISSING and self._keeper is not None:
            value = self._keeper.peek(key)
        return default if value is MISSING else value

    def _lookup(self, key: K) -> V:
        if self._copies and (copied := self._copied(key, sys._getframe(FRAMES))) is not MISSING:
            return cast("V", copied)
        value = self._find(key)
        # As in a dict: a ``__missing__`` of the instance has no effect.
        return type(self).__missing__(self, key) if value is MISSING else cast("V", value)

    def _find(self, key: Any) -> Any:
        """The value of *key*, counted as a hit and as used; or `MISSING`, counted as a miss."""
        if self._asking and threading.get_ident() in self._asking:
            return _look(self, key, MISSING)
        if self._clocked:
            self._settle(key)
        value = _look(self, key, MISSING)
        if value is MISSING:
            if (self._tail is None or (value := self._revive(key)) is MISSING) and (
                self._keeper is None or (value := self._keeper.fetch(key)) is MISSING
            ):
                _set_misses(self, self._misses + 1)
                return MISSING
        else:
            self._touch(key)
        _set_hits(self, self._hits + 1)
        if self._lent is not None:
            self._lend(key)
        return value

    def _touch(self, key: Any) -> None:
        """Count *key* as used, if it is here."""
        if self._guarded:
            with self._lock:
                self._use(key)
        else:
            self._use(key)

    def _use(self, key: Any) -> None:
        order = self._order
        if order is None:
            if self._moves:
                try:
                    move(self, key)
                except KeyError:  # another thread removed it: there is nothing to keep in order
                    return
        elif isinstance(order, LinkedOrder):
            if not order.touch(key):
                self._unpark(key)
        else:
            with self._lock:
                if not order.touch(key):
                    self._unpark(key)
                elif not _has(self, key):  # comparing keys has removed it
                    order.discard(key)
        if self._clocked:
            self._stamp_use(key)

    def _unpark(self, key: Any) -> None:
        """A busy or leased entry was used: it goes back into the order, where the sweep will meet it again."""
        order = self._order
        with self._lock:
            if order is not None and key not in self._leases and _has(self, key):
                order.add(key)  # first: no moment may come at which it is in neither
                self._parked.pop(key, None)

    # Walking.

    def __iter__(self) -> Iterator[K]:
        return self._walk_keys()

    def __reversed__(self) -> Iterator[K]:
        return self._walk_keys(backwards=True)

    def keys(self) -> RegistryKeys[K]:  # type: ignore[override] # a KeysView all right, but no subclass of the C one exists
        """A live view of the keys; walking it is walking a snapshot."""
        frame = sys._getframe(1)
        return RegistryKeys(self, (id(frame), frame.f_lasti))

    def values(self) -> RegistryValues[V]:  # type: ignore[override] # as in keys
        """A live view of the values; walking it is walking a snapshot, and no use."""
        return RegistryValues(self)

    def items(self) -> RegistryItems[K, V]:  # type: ignore[override] # as in keys
        """A live view of the entries; walking it is walking a snapshot, and no use."""
        return RegistryItems(self)

    def _walk_keys(self, *, backwards: bool = False) -> Iterator[K]:
        keys = list(dict.keys(self))
        if backwards:
            keys.reverse()
        for key in keys:
            if _has(self, key):
                yield key

    def _walk_items(self, *, backwards: bool = False) -> Iterator[tuple[K, V]]:
        keys = list(dict.keys(self))
        if backwards:
            keys.reverse()
        for key in keys:
            value = _look(self, key, MISSING)
            if value is not MISSING:
                yield key, value

    def _snapshot(self) -> dict[K, V]:
        """The entries as they stand, as a plain dict."""
        return dict(self._walk_items())

    def _begin_copy(self, frame: types.FrameType) -> list[K]:
        """
        Hand C code the keys, and remember the entries for its reads.

        The reads that follow come from the same instruction of the same frame, in the order of the keys; `_copied`
        answers them from here, whatever has left since, and without counting them as use. The first other read of
        this thread ends it.
        """
        entries = list(self._walk_items())
        keys = [key for key, _ in entries]
        if entries:
            entries.reverse()
            thread = threading.get_ident()
            # What is left of a copy that failed halfway may be the last reference to its values: not inside the lock.
            abandoned = self._copies.get(thread)
            with self._lock:
                self._copies[thread] = _Copy(id(frame), frame.f_lasti, entries)
                self._choose_paths()
            del abandoned
        return keys

    def _copied(self, key: Any, frame: types.FrameType) -> Any:
        thread = threading.get_ident()
        copying = self._copies.get(thread)
        if copying is None:
            return MISSING
        value: Any = MISSING
        if (copying.frame, copying.instruction) == (id(frame), frame.f_lasti) and copying.entries[-1][0] is key:
            value = copying.entries.pop()[1]
        if value is MISSING or not copying.entries:
            try:
                with self._lock:
                    self._copies.pop(thread, None)
                    self._choose_paths()
            except BaseException:
                self._choose_paths()  # or every read would take the long way
                raise
        return value

    # Writing.

    def _evict_into_tail(self) -> bool:
        """
        Evict the oldest where values may come back, if nobody is leased; says whether it did.

        Under the lock, or a look-up in between makes a second value.
        """
        with self._lock:
            if self._leases:
                return False
            key, evicted = take_oldest(self, last=False)
            held = type(evicted) not in STRONG and _LOCAL < getrefcount(evicted) < FOREVER
            if held:
                self._keep_tail(key, evicted)
        if held:
            del evicted
            self._tidy_tail()
        return True

    @overload
    def setdefault(self: Registry[K, D | None], key: K, default: None = None) -> D | None: ...
    @overload
    def setdefault(self, key: K, default: V) -> V: ...
    def setdefault(self, key: Any, default: Any = None) -> Any:
        """
        The value of *key*, after putting *default* in if it has none: atomic, and counted as use.

        If the registry is full and refuses *default* (`RegistryFull`), it closes *default* with *close*, because a
        *default* that was made for this call has no other owner.
        """
        value = self._find(key)
        if value is not MISSING:
            return value
        if self._releases is None:
            return self._put(key, default, keep=True)
        offer = _Offer(default)
        try:
            return self._put(key, default, keep=True, offer=offer)
        except RegistryFull:
            self._release_refused(key, offer.value)
            raise

    def update(self, source: Any = (), /, **kwargs: V) -> None:
        """As ``dict.update``; each entry is put in as by ``r[k] = v``."""
        self._fill(source)
        for name, value in kwargs.items():
            self[name] = value  # type: ignore[index] # as in dict: for keys that are strings

    def _fill(self, source: Any) -> None:
        """What the constructor, ``update`` and ``|=`` do: as in a dict, none of them calls an overridden ``update``."""
        if isinstance(source, Registry):
            entries = source._snapshot()
        else:
            entries = source if type(source) is dict else dict(source)
        for key, value in list(entries.items()):  # as it is now: a hook, or another thread, may change the source
            self[key] = value

    def __ior__(self, other: Any) -> Self:  # type: ignore[override] # typeshed spells out the overloads of dict
        self._fill(other)
        return self

    def _put(  # noqa: C901, PLR0912, PLR0915 - a critical section reads best in one piece
        self,
        key: Any,
        value: Any,
        *,
        keep: bool = False,
        back: bool = False,
        loading: Loading | None = None,
        ago: float | None = None,
        offer: _Offer | None = None,
    ) -> Any:
        """
        Write an entry, or with *keep* leave a living one as it is; return the value that is now held.

        With *back* the value was here before, or comes from the store, and has been converted; it was written *ago*
        seconds ago. With *loading* it is put in only if nothing has happened to the key since that began; if something
        has, `MISSING` is returned.
        *offer* records whether the value was put in.

        What user code may refuse comes first, then the change under the lock, then the news.
        """
        hash(key)  # an unhashable key is refused before anything has changed
        if keep and self._tail is not None:
            self._drop_ended(key)
        if not self._guarded and type(key) not in ATOMIC and not is_atomic(key):
            self._guard()
        if self._damaged:
            self._mend()
        if self._clocked:
            self._settle(key)
        limits = self._limits
        if limits.values is not None and not back:
            value = self._converted(value)
            if offer is not None:
                offer.value = value
        keeper, prepared, waiter = self._keeper, None, None
        if keeper is not None and not back:
            value, prepared = keeper.prepare(key, value)
        size = None if self._sizes is None else self._weigh(key, value)
        rank = self._rank(key, value) if limits.importance is not None else 0.0
        gone: list[Gone] = []
        old: Any = MISSING
        changing = entering = False
        try:
            while True:
                with self._lock:
                    if loading is not None and loading.stale:
                        return MISSING
                    old = _look(self, key, MISSING)
                    if keep and old is not MISSING:
                        return old
                    # Evicted since the caller looked, and still held by somebody: then that is the value.
                    evicted = self._in_tail(key, value) if keep and self._tail is not None else value
                    if back and loading is None and self._in_tail(key, MISSING) is not value:
                        return MISSING  # removed since
                    late = keeper is not None and not back and keeper.has_changed(key, value, prepared, keep=keep)
                    room = evicted is value and not late and (limits.overflow == "grow" or self._fits(key, old, size))
                    if room:
                        if keeper is not None:  # may refuse: nothing has changed yet
                            entering = True
                            waiter = keeper.entered(key, value, old, prepared, loading)
                        changing = True
                        store(self, key, value)
                        if offer is not None:
                            offer.taken = True
                        if old is not MISSING and old is not value:
                            self._note_replaced(key, old, gone)
                        written = None if ago is None else self._written_before(key, ago)
                        self._enter(key, size, rank)
                        if written is not None:
                            self._backdate(key, written)
                        if size is not None and not _has(self, key):
                            self._repair()  # comparing keys has removed it
                        if type(value) not in STRONG or self._tail is not None:
                            self._prepare_tail(key, value)
                        if len(self) > self._bound and (self._moves or old is MISSING) and self._in_line():
                            self._discard_oldest(Cause.SIZE, gone)
                        changing = entering = False
                        break
                if evicted is not value:
                    if (found := self._put(key, evicted, keep=True, back=True)) is not MISSING:
                        return found
                    continue
                if late and keeper is not None:
                    if keep and (found := keeper.fetch(key)) is not MISSING:
                        return found
                    value, prepared = keeper.prepare(key, value)
                    continue
                if not self._may_fit(key, size) or not self._make_room(key, size or 0, gone):
                    raise self._full(key)  # noqa: TRY301 - the handlers below are for other errors
        except (VersionConflict, OwnershipLost) as error:
            if keeper is not None:
                keeper.lost(key, error)
            raise
        except BaseException as error:
            if entering and not changing and keeper is not None and not isinstance(error, HygieneError):
                # The store was told, or half: what is in memory has to be the same.
                with self._lock, contextlib.suppress(HygieneError):
                    waiter = keeper.entered(key, value, old, prepared, loading)
                    store(self, key, value)
                    changing = True
                    if offer is not None:
                        offer.taken = True
            if changing:
                if old is not MISSING and old is not value and _look(self, key, MISSING) is value:
                    self._note_replaced(key, old, gone)
                self._repair()
            elif not isinstance(error, HygieneError) and self._over():
                self._sweep(key)  # interrupted right after the change
            raise
        finally:
            if gone:
                try:
                    self._tell(gone)
                except BaseException:
                    self._tell(gone)
                    self._repair()  # the bound, too
                    raise
                del gone
        try:
            if self._over():
                self._sweep(key)
            if self._tail is not None and self._tail.dropped:
                self._tidy_tail()
            if not self._watched:
                self._be_watched()
            if self._lent:
                self._measure_lent(key)
        except BaseException:
            self._repair()
            raise
        if prepared is not None and keeper is not None:
            keeper.settle_write(value, waiter)
        return value

    def _put_made(self, key: Any, value: Any) -> Any:
        """
        Put in what a factory returned, unless the key has a value by now; return the value that is now held.

        If the value is not put in, for whatever reason, it is released: only this call has it.
        """
        if self._releases is None:
            return self._put(key, value, keep=True)
        offer = _Offer(value)
        try:
            return self._put(key, value, keep=True, offer=offer)
        finally:
            if not offer.taken:
                self._release_refused(key, offer.value)

    def _release_refused(self, key: Any, value: Any) -> None:
        """Close a value that was made for *key* and not put in, unless it is the value of some key."""
        close, closings = self._limits.close, self._closings
        if self._releases is None or close is None or any(held is value for held in list(dict.values(self))):
            return
        home: asyncio.AbstractEventLoop | Closing | None = running_loop()
        if closings is not None:
            with self._lock:
                home = Closing(key, running_loop(), closings, self._lock, self._name)
        self._releases.start(value, close, home, required=self._strict)

    def _closing_of(self, key: Any) -> Closing | None:
        """The close of an earlier value of *key* that has not ended; none if the key has a value."""
        closings = self._closings
        if not closings or _has(self, key):
            return None
        with self._lock:
            reference = closings.get(key)
            newest = None if reference is None else reference()
            return None if newest is None else newest.unfinished

    def _full(self, key: Any) -> RegistryFull:
        stats = self.stats()
        being_made = self._promised(key)
        return RegistryFull(
            f"registry {self._label()} is full, so {key!r} was not added: {stats.entries} of {self._limits.maxsize} "
            f"entries, {stats.leased} leased{f', {being_made} being made' if being_made else ''}, and nothing may "
            f'leave. Release some, raise maxsize, or use overflow="grow"',
            stats,
        )

    # Places for entries that a factory is still making.

    def _take_place(self, key: Any) -> _Place | None:
        """
        Keep room for *key* until its factory has returned and its value is in; `None` where nothing is refused.

        Raises `RegistryFull` if there is no room and no other entry may leave, and `StoreError` if the store takes
        nothing.
        """
        if self._keeper is not None:
            self._keeper.check_writable(key)
        if self._limits.overflow == "grow":
            return None
        place = _Place(key)
        gone: list[Gone] = []
        try:
            while True:
                with self._lock:
                    if self._fits(key, _look(self, key, MISSING), None):
                        if self._places is None:
                            self._places = weakref.WeakSet()
                        self._places.add(place)
                        return place
                if not self._make_room(key, 0, gone):
                    raise self._full(key)
        finally:
            if gone:
                try:
                    self._tell(gone)
                except BaseException:  # a signal handler has raised
                    self._tell(gone)
                    raise
                del gone

    def _give_place_back(self, place: _Place | None) -> None:
        places = self._places
        if place is not None and places is not None:
            with self._lock:
                places.discard(place)

    def _promised(self, key: Any) -> int:
        """How many keys besides *key* have a place and no entry yet. The lock is held, or the number is for people."""
        if self._places is None:
            return 0
        promised = {place.key for place in self._places if not _has(self, place.key)}
        promised.discard(key)
        return len(promised)

    def _in_line(self) -> bool:
        """Whether the oldest may leave without more ado: nothing to ask or to step over, nothing due before it."""
        return self._order is None and not self._leases and len(self) > 1 and not self._saves

    def _fits(self, key: Any, old: Any, size: int | None) -> bool:
        """Whether writing *key* keeps the bounds. The lock is held."""
        if old is MISSING and len(self) + self._promised(key) >= self._bound:
            return False
        if self._byte_bound is None or size is None or self._sizes is None:
            return True
        return self._bytes - self._sizes.get(key, 0) + size <= self._byte_bound

    def _may_fit(self, key: Any, size: int | None) -> bool:
        """Whether enough bytes may leave for a new value: asked first, since a refusal must change nothing."""
        if self._byte_bound is None or self._sizes is None or size is None:
            return True
        return self._may_free(self._bytes - self._sizes.get(key, 0) + size - self._byte_bound, key)

    def _may_free(self, excess: int, newest: Any) -> bool:
        """Whether entries besides *newest* that may leave weigh *excess* together."""
        assert self._sizes is not None
        for key in list(dict.keys(self)) if excess > 0 else ():
            if key in self._leases or _same(key, newest):
                continue
            entry: Entry[Any, Any] = Entry(key, _look(self, key, MISSING), self._owner())
            if entry.value is MISSING or (self._limits.busy is not None and self._is_busy(entry)):
                continue
            excess -= self._sizes.get(key, 0)
            if excess <= 0:
                break
        return excess <= 0

    def _enter(self, key: Any, size: int | None, rank: float) -> None:
        """Give the entry that was just stored its place, its times and its weight. The lock is held."""
        order = self._order
        if order is None:
            if self._moves:
                try:  # noqa: SIM105 - a block that costs nothing where nothing is raised
                    move(self, key)
                except KeyError:  # removed already, by a write that takes no lock
                    pass
        elif key not in self._leases:
            self._parked.pop(key, None)
            if isinstance(order, ImportanceOrder):
                order.rank(key, rank)
            else:
                order.add(key)
            if not _has(self, key):  # comparing keys has removed it
                order.discard(key)
                return
        if size is not None:
            self._resize(key, size)
        if self._releases is not None:
            if not self._known:
                self._known = True
                close_at_shutdown(self, f"registry {self._name!r}" if self._name else "a registry")
            loop = running_loop()
            if loop is not None:
                self._loops[key] = loop
            else:
                self._loops.pop(key, None)
        if self._timer is not None:
            if self._held:
                self._held.pop(key, None)
            now = self._stamp_write(key)
            if self._due == _NEVER:  # otherwise what is due next was written or used before this
                limits = self._limits
                self._due = now + min(limits.ttl or _NEVER, limits.idle or _NEVER)

    def _written_ago(self, key: Any) -> float:  # noqa: ARG002 - a timed one looks
        """Seconds since *key* was written; 0 for one that is just being written."""
        return 0.0

    def _written_before(self, key: Any, ago: float) -> float | None:  # noqa: ARG002 - a timed one looks
        """Time at which *key*, which is about to be put back, was last written: *ago* seconds ago, or later."""
        return None

    def _backdate(self, key: Any, written: float) -> None:
        """Let *key*, which was just put back, have been written then. The lock is held."""

    def _note_replaced(self, key: Any, old: Any, gone: list[Gone]) -> None:
        """Count and record that *old* was overwritten, unless that is done already. The lock is held."""
        if gone and gone[-1][2] is old and gone[-1][3] is Cause.REPLACED:
            return
        age = idle_for = None
        if self._limits.on_evict is not None:  # nobody else is told
            age, idle_for = self._times(key)
        record = self, key, old, Cause.REPLACED, age, idle_for, self._loops.get(key)
        self._record(record, gone)

    def _record(self, record: Gone, gone: list[Gone]) -> None:
        """Count a removal, and have it told."""
        counts, cause = self._counts, record[3]
        count = counts.get(cause, 0)
        counts[cause] = count + 1
        gone.append(record)  # no signal handler runs between these two lines

    def _times(self, key: Any) -> tuple[float | None, float | None]:  # noqa: ARG002 - a timed one looks
        """Seconds since *key* was written and since it was used, where they are known."""
        return None, None

    def _converted(self, value: Any) -> Any:
        return converted(self._limits.values, value)

    # Removing.

    @overload
    def pop(self, key: K) -> V: ...
    @overload
    def pop(self, key: K, default: V) -> V: ...
    @overload
    def pop(self, key: K, default: D) -> V | D: ...
    def pop(self, key: K, default: Any = MISSING) -> Any:
        """Take *key* out and return its value; it is the caller's, so it is not closed."""
        try:
            return self._remove(key)
        except KeyError:
            if default is MISSING:
                raise
            return default

    def popitem(self, last: bool = True) -> tuple[K, V]:  # noqa: FBT001, FBT002 - as OrderedDict's
        """Take out the entry that was inserted last, as ``dict`` does, or first."""
        if last not in (True, False):
            raise TypeError(f"popitem() takes last=True or last=False; found {last!r}")
        while True:
            key: Any = next(dict.__reversed__(self) if last else dict.__iter__(self), MISSING)
            if key is MISSING:
                raise KeyError("popitem(): the registry is empty")
            try:
                return key, self._remove(key)
            except KeyError:  # another thread was faster
                continue

    def clear(self) -> None:
        """
        Remove everything, from the *store* too; the values are the caller's to release.

        With a *store* it waits for it, and for a save that is under way.
        """
        if self._keeper is None:
            self._empty(Cause.CLEARED)
        else:
            gone: list[Gone] = []
            try:
                try:
                    self._keeper.clear(gone)
                finally:
                    self._tell(gone)
            except BaseException:
                self._tell(gone)
                raise

    def _remove(self, key: Any) -> Any:
        value: Any
        if self._bare:
            value = take(self, key, MISSING)
            if value is MISSING:
                value = self._take_from_tail(key)
            return value
        if self._clocked:
            self._settle(key)
        gone: list[Gone] = []
        value = MISSING
        deleting = False
        try:
            with self._lock:
                value = _look(self, key, MISSING)
                if value is not MISSING:
                    if self._keeper is not None:
                        deleting = True
                        self._keeper.delete(key)
                    self._discard(key, Cause.DELETED, gone)
            return self._take_from_tail(key) if value is MISSING else value
        except (VersionConflict, OwnershipLost) as error:
            if self._keeper is not None:
                self._keeper.lost(key, error)
            raise
        except BaseException as error:
            if deleting and not isinstance(error, HygieneError):  # the store was told, or half
                with self._lock, contextlib.suppress(HygieneError):
                    if self._keeper is not None and _look(self, key, MISSING) is value:
                        self._keeper.delete(key)
                        self._discard(key, Cause.DELETED, gone)
            raise
        finally:
            if gone:
                try:
                    self._tell(gone)
                except BaseException:
                    self._tell(gone)
                    raise

    def _take_from_tail(self, key: Any) -> Any:
        if self._tail is not None and not self._drop_ended(key):
            self._drop_unreferenced(key)
        if self._keeper is None:
            value = MISSING if self._tail is None else self._tail.pop(key, MISSING)
        else:
            with self._lock:  # one step: who looks it up in between would load it again
                value = self._in_tail(key, MISSING)
                if value is not MISSING:
                    self._keeper.delete(key)
                    self._prepare_tail(key, value)
            if value is MISSING:
                value = self._keeper.take(key)
            elif self._tail is not None:
                self._tail.dropped.clear()
        if value is MISSING:
            raise KeyError(key)
        return value

    def _empty(self, cause: Cause) -> None:
        gone: list[Gone] = []
        tail = self._tail  # its values end when the lock is free
        try:
            try:
                self._take_everything(cause, gone)
            finally:
                del tail
                self._tell(gone)
        except BaseException:
            self._tell(gone)
            raise

    def _take_everything(self, cause: Cause, gone: list[Gone]) -> None:
        """Have every entry leave memory; the records go to *gone*, as in `_discard`."""
        with self._lock:
            self._tail = None
            for key in list(dict.keys(self)):
                self._discard(key, cause, gone)

    def _discard(self, key: Any, cause: Cause, gone: list[Gone]) -> bool:
        """
        The one way out: take *key* out of everything. The lock is held.

        Returns whether it was here. The record goes to *gone*, which is told, and dropped, when the lock is free.
        """
        value = _look(self, key, MISSING)
        if value is MISSING:
            return False
        try:
            if take(self, key, MISSING) is MISSING:  # a comparison of the key has removed it
                return False
            held = _LOCAL < getrefcount(value) < FOREVER  # here: an argument of the call would be one more
            self._forget(key, value, cause, gone, held=held)
        except BaseException:
            self._leave(key, value, cause, gone)
            raise
        return True

    def _leave(self, key: Any, value: Any, cause: Cause, gone: list[Gone]) -> None:
        """An exception came while *key* was taken out: record it if it is out, and forget all else of it."""
        if _look(self, key, MISSING) is not value and (not gone or gone[-1][2] is not value):
            if self._keeper is not None:
                kept = None if self._tail is None else self._tail.data.get(key)
                adrift = kept if kept is not None and kept() is value else None
                self._keeper.left(key, value, cause, adrift=adrift)
            self._record((self, key, value, cause, None, None, self._loops.get(key)), gone)
        self._repair()

    def _forget(
        self,
        key: Any,
        value: Any,
        cause: Cause,
        gone: list[Gone],
        age: float | None = None,
        idle_for: float | None = None,
        *,
        held: bool,
    ) -> None:
        """
        What `_discard` does once the entry is out of the dict. The lock is held.

        *held* says whether more than one variable references the value.
        """
        loop = None
        if self._order is not None:
            self._order.discard(key)
            self._parked.pop(key, None)
        if self._sizes is not None:
            self._resize(key, 0)
            self._sizes.pop(key, None)
        if self._loops:
            loop = self._loops.get(key)
        kept = None
        if held and self._is_revivable(cause) and type(value) not in STRONG:
            kept = self._keep_tail(key, value)
        if self._keeper is not None:
            self._keeper.left(key, value, cause, adrift=kept)
        place: asyncio.AbstractEventLoop | Closing | None = loop
        if self._closings is not None and cause in _OURS:
            place = Closing(key, loop, self._closings, self._lock, self._name)
        self._record((self, key, value, cause, age, idle_for, place), gone)
        if loop is not None:
            self._loops.pop(key, None)
        if _has(self, key):  # a finalizer has written it anew in the middle of this
            self._repair()

    def _is_revivable(self, cause: Cause) -> bool:
        # With a store, idle is no end: the entry is there as before, only not in memory.
        return cause in _REVIVABLE or (self._saves and cause is Cause.IDLE)

    def _tell(self, gone: list[Gone]) -> None:
        """Run the hooks for what left. No lock is held; what they raise is logged and counted."""
        aside: dict[int, Registry[Any, Any]] | None = None
        for index, record in enumerate(gone):
            if record is _DONE:
                continue  # told already, by a call that was interrupted later
            registry, key, value, cause, age, idle_for, loop = record
            if (tail := registry._tail) is not None and (tail.data or tail.dropped):
                aside = aside or {}
                aside[id(registry)] = registry
            limits = registry._limits
            hook = limits.on_evict
            releases = registry._releases if limits.close is not None and cause.ours else None
            if hook is not None and key is not _TOLD:
                owner = registry._owner()
                removal = Removal(key, value, cause, owner, age, idle_for, registry._name)
                left = (registry, _TOLD, value, cause, age, idle_for, loop) if releases is not None else _DONE
                try:
                    if isinstance(hook, str):
                        hook = getattr(owner, hook)
                    gone[index] = left  # immediately before the call: no signal handler runs between these lines
                    hook(removal)
                except HOOK_ERRORS as error:
                    gone[index] = left
                    registry._hook_failed("on_evict", key, error)
            if releases is not None and limits.close is not None:
                releases.start(value, limits.close, loop, required=registry._strict, claim=(gone, index))
            gone[index] = _DONE
        if aside is not None:
            for registry in aside.values():
                registry._tidy_tail()
        elif self._tail is not None and self._tail.dropped:
            self._tidy_tail()

    def _hook_failed(self, hook: str, key: Any, error: BaseException) -> None:
        self._hook_errors += 1
        logger.error(
            "%s of registry %s raised for key %r; the entry is treated as if it had not been asked",
            hook,
            self._label(),
            key,
            exc_info=error,
            extra={"event_name": "registry.hook_failed", "registry": self._label(), "hook": hook, "of": (self, hook)},
        )

    def _release_failed_hook(self) -> Callable[[Any, BaseException], None]:
        # Weakly: the releases outlive the registry while a loop works on them, and must not keep it alive.
        reference = weakref.ref(self)

        def failed(value: Any, error: BaseException) -> None:
            registry, label = reference(), None
            if registry is not None:
                registry._hook_errors += 1
                label = registry._label()
            logger.error(
                "closing %r failed",
                type(value).__name__,
                exc_info=error,
                extra={"event_name": "registry.close_failed", "registry": label, "of": registry},
            )

        return failed

    # Evicting.

    def _over(self) -> bool:
        return len(self) > self._bound or (self._byte_bound is not None and self._bytes > self._byte_bound)

    def _sweep(self, newest: Any = MISSING) -> None:
        """
        Evict until the bounds hold. *newest* was just put in and stays.

        One thread sweeps and nobody waits for it; looking again after letting go is for those who did not. The broom is
        no lock, because a signal handler that raises may run right after a lock was acquired. Whoever gets its mark
        into the dict has the broom, and to take the mark out again is no call.
        """
        mark: list[None] = []
        broom = self._broom
        try:
            while True:
                gone: list[Gone] = []
                try:
                    try:
                        if broom.setdefault(0, mark) is not mark:
                            return
                        kept = self._evict_to_bounds(newest, gone)
                    finally:
                        if 0 in broom and broom[0] is mark:
                            del broom[0]
                        if gone:
                            self._tell(gone)
                except BaseException:
                    self._tell(gone)
                    raise
                finally:
                    del gone
                if not kept:
                    if kept is not None:
                        self._note_overflow()
                    return
                if not self._over():
                    self._overflowed = False
                    return
        except BaseException:
            self._repair()
            raise

    def _evict_to_bounds(self, newest: Any, gone: list[Gone]) -> bool | None:
        """Whether the bounds hold now; ``None``: soon. What is over goes before what is alive."""
        if self._clocked:
            self._expire_due(gone)
        if self._parked:
            self._poll_parked()
        if self._limits.policy == "none":  # nothing leaves: it may be over a bound that was lowered
            return False
        bound, byte_bound = self._bound, self._byte_bound
        while (large := len(self) > bound) or (byte_bound is not None and self._bytes > byte_bound):
            if not (evicted := self._evict_one(Cause.SIZE if large else Cause.BYTES, newest, gone)):
                return evicted
        return True

    def _make_room(self, key: Any, size: int, gone: list[Gone]) -> bool:
        """Evict one for a new entry; ``False`` if nothing may leave, or it could never fit."""
        if self._limits.policy == "none" or (self._byte_bound is not None and size > self._byte_bound):
            return False
        self._poll_parked()
        with self._lock:
            full = len(self) + self._promised(key) >= self._bound
        return bool(self._evict_one(Cause.SIZE if full else Cause.BYTES, key, gone))

    def _evict_one(self, cause: Cause, newest: Any, gone: list[Gone]) -> bool | None:
        """
        Evict whoever leaves next; ``False`` if everybody is leased, busy, not to be saved, or *newest*.

        ``None``: who leaves next is being saved, and leaves then.
        """
        if self._order is not None:
            return self._evict_from(cause, newest, gone)
        return (self._evict_saved if self._saves else self._evict_from_own_list)(cause, newest, gone)

    def _evict_from_own_list(self, cause: Cause, newest: Any, gone: list[Gone]) -> bool | None:
        with self._lock:
            if not self._leases and newest is MISSING:
                return self._discard_oldest(cause, gone)
            key = self._step_to_free(newest, _SKIPS)
            if key is MISSING:
                return False
            if key is not CROWDED:
                return self._discard(key, cause, gone)
            self._keep_order_beside()
        return self._evict_from(cause, newest, gone)

    def _evict_saved(self, cause: Cause, newest: Any, gone: list[Gone]) -> bool | None:
        """As `_evict_from_own_list`, with a store: whether the oldest is saved is asked with the lock free."""
        skipped = 0
        for _ in range(_SKIPS):
            if skipped > len(self):
                return False
            with self._lock:
                key = oldest(self)
                if key is MISSING:
                    return False
                value = _look(self, key, MISSING)
                spared = key in self._leases or _same(key, newest)
            leaves = not spared and self._may_leave(key, value)
            if leaves is None:
                return None
            with self._lock:
                same = _look(self, key, MISSING) is value
                value = None
                if not leaves:
                    skipped += 1
                    if _has(self, key):
                        move(self, key)
                elif same and key not in self._leases and not self._is_unsaved(key) and _same(oldest(self), key):
                    return self._discard(key, cause, gone)
        with self._lock:
            self._keep_order_beside()
        return self._evict_from(cause, newest, gone)

    def _may_leave(self, key: Any, value: Any) -> bool | None:
        """Whether nothing of the entry is unsaved; ``None``: not yet, and the store will tell. No lock is held."""
        return True if self._keeper is None else self._keeper.may_leave(key, value)

    def _is_unsaved(self, key: Any) -> bool:
        """Whether something of the entry is not saved, as far as has been told."""
        return self._keeper is not None and key in self._keeper.writer

    def _waits_for_saves(self) -> bool:
        return self._over() or bool(self._parked)

    # Changes that were cut short.

    def _repair(self) -> None:
        """
        An exception came in the middle of a change: have all that is kept beside the entries agree with them again.

        If this is interrupted as well, or a key refuses to be compared, the next write does it.
        """
        if self._damaged:
            return
        self._damaged = True
        # Keys whose comparison uses the registry again have recursed to the limit, and comparing them here would do it
        # once more at each level that is left: the next operation repairs.
        if isinstance(sys.exc_info()[1], RecursionError):
            return
        with contextlib.suppress(Exception):
            with self._lock:
                self._reconcile()
            if self._lent:
                self._remeasure()
            if self._over():
                self._sweep()
            self._damaged = False

    def _mend(self) -> None:
        """Repair what an earlier operation could not."""
        self._damaged = False
        self._repair()

    def _reconcile(self) -> None:
        """Derive all that is kept beside the entries from them. The lock is held."""
        order, parked, leases = self._order, self._parked, self._leases
        if self._limits.busy is None and not self._saves:  # then only what is leased is set aside
            for key in [key for key in parked if key not in leases]:
                parked.pop(key, None)
        oldest(self)  # has a key that went past the registry take its place
        keys = list(dict.keys(self))
        for table in (parked, self._sizes, self._lent, self._loops, self._held):
            for key in [key for key in table or () if not _has(self, key)]:
                table.pop(key, None)  # type: ignore[union-attr] # there is one
        if order is None or not (PARKS and isinstance(order, LinkedOrder)):
            ordered = set(by_recency(self))
            for key in keys:
                if key not in ordered and _has(self, key):
                    move(self, key)
        if order is not None:
            order.reconcile({key for key in keys if key in order or not (key in parked or key in leases)})
        if self._sizes is not None:
            for key in keys:
                if key not in self._sizes:
                    self._sizes[key] = 0
                    if self._lent is not None:
                        self._lent[key] = None  # it is measured soon
            self._bytes = sum(self._sizes.values())
        if self._tail is not None:
            for key in [key for key in list(self._tail.data) if _has(self, key)]:
                self._tail.discard(key)
        self._restamp(keys)
        self._choose_paths()

    def _restamp(self, keys: list[Any]) -> None:
        """Give a time to each entry that has lost its own. The lock is held."""

    def _sweep_saved(self) -> None:
        """Something was saved: who had to stay for it may leave now."""
        self._poll_parked(len(self._parked))
        if self._over():
            self._sweep()

    def _discard_oldest(self, cause: Cause, gone: list[Gone]) -> bool:
        key = oldest(self)
        return key is not MISSING and self._discard(key, cause, gone)

    def _keep_order_beside(self) -> None:
        """So many are leased that stepping over them costs more than an order without them. The lock is held."""
        try:
            order = LinkedOrder(self, moves=self._moves)
            for key in list(by_recency(self)):
                if key in self._leases:
                    self._parked[key] = None
                    order.discard(key)
                else:
                    order.add(key)
            self._order_uses()
            self._order = order
            self._choose_paths()
        except BaseException:
            self._repair()
            raise

    def _evict_from(self, cause: Cause, newest: Any, gone: list[Gone]) -> bool | None:
        order = self._order
        assert order is not None
        spared: list[Any] = []
        try:
            while True:
                with self._lock:
                    key = self._next_in(order, spared)
                    if key is MISSING:
                        return False
                    if _same(key, newest):
                        spared.append(key)
                        continue
                    if key in self._leases:
                        self._parked[key] = None
                        continue
                    if self._limits.busy is None and not self._saves:
                        if self._discard(key, cause, gone):
                            return True
                        continue
                # Outside the lock: the answer is user code. The key is out of the order, so nobody else asks.
                entry: Entry[Any, Any] = Entry(key, _look(self, key, MISSING), self._owner())
                busy = self._limits.busy is not None and entry.value is not MISSING and self._is_busy(entry)
                leaves = not busy and (not self._saves or self._may_leave(key, entry.value))
                with self._lock:
                    same = _look(self, key, MISSING) is entry.value
                    del entry  # or the value would count as referenced
                    if not same or key in order or key in self._leases:
                        self._unpark(key)  # written, used or leased while we asked
                        if not _has(self, key):  # or deleted: then there is room already
                            return True
                    elif leaves is None:
                        order.put_back(key)
                        return None
                    elif not leaves or self._is_unsaved(key):
                        self._parked[key] = None
                        self._stamp_use(key)
                    elif self._discard(key, cause, gone):
                        return True
        except BaseException:
            self._repair()  # a key may be out of the order
            raise
        finally:
            if spared:
                with self._lock:
                    for key in spared:
                        if _has(self, key) and key not in order:
                            order.add(key)

    def _next_in(self, order: Order, spared: list[Any]) -> Any:
        try:
            return order.pop()
        except KeyError:
            if not isinstance(order, CachetoolsOrder):
                return MISSING
        # A cache of somebody else's may have dropped keys by itself; what it has forgotten leaves oldest first.
        for key in list(dict.keys(self)):
            if key not in self._parked and key not in self._leases and key not in spared:
                return key
        return MISSING

    def _poll_parked(self, most: int = POLLS) -> None:
        """Ask some of those that were busy whether they still are, oldest first, so that they can leave again."""
        order = self._order
        if order is None or (self._limits.busy is None and not self._saves):
            return
        with self._lock:  # at once: to find the first of a dict is a search where many others were first
            oldest_parked = list(itertools.islice(self._parked, most))
        for key in oldest_parked:
            try:
                with self._lock:
                    if self._parked.pop(key, MISSING) is MISSING:  # another thread asks about it, or it was used
                        continue
                    if key in self._leases:
                        self._parked[key] = None
                        continue
                entry: Entry[Any, Any] = Entry(key, _look(self, key, MISSING), self._owner())
                busy = self._limits.busy is not None and entry.value is not MISSING and self._is_busy(entry)
                with self._lock:
                    if not _has(self, key) or key in order:
                        continue
                    if busy or self._is_unsaved(key):
                        self._parked[key] = None
                    else:
                        order.add(key)
            except BaseException:
                self._repair()
                raise

    def _is_busy(self, entry: Entry[Any, Any]) -> bool:
        """Ask the user's *busy*. What cannot answer is treated as busy: nothing in use may be lost."""
        busy = self._limits.busy
        # It may look the entry up here, as ``e.owner.locks[e.key]``. That is no use, or everything asked about would be
        # in use for having been asked, and the sweep would never end; nor may it let the entry expire, which would ask
        # again.
        thread, asking = threading.get_ident(), self._asking
        outermost = thread not in asking
        try:
            asking.add(thread)
            if callable(busy):
                return bool(busy(entry))
            state = self._answer(entry.value, busy or "")
            return bool(state() if callable(state) else state)
        except HOOK_ERRORS as error:
            self._hook_failed("busy", entry.key, error)
            return True
        finally:
            if outermost:
                asking.discard(thread)

    def _answer(self, value: Any, name: str) -> Any:
        """The attribute of a value that says whether it is busy; a value that has none is not."""
        answer = getattr(value, name, MISSING)
        if answer is not MISSING:
            return answer
        if self._strict and value is not None:
            self._strict = False  # said once
            logger.warning(
                "busy=%r of registry %s: %r objects have no such attribute, so they are never busy",
                name,
                self._label(),
                type(value).__name__,
                extra={"event_name": "registry.never_busy", "registry": self._label(), "hook": "busy"},
            )
        return False

    def _rank(self, key: Any, value: Any) -> float:
        """Ask the user's *importance*. What cannot be ranked is not lost for it."""
        importance = self._limits.importance
        assert importance is not None
        try:
            return float(importance(Entry(key, value, self._owner())))
        except HOOK_ERRORS as error:
            self._hook_failed("importance", key, error)
            return math.inf

    def _note_overflow(self) -> None:
        if not self._overflowed and self._over():
            self._overflowed = True  # said once, until the bound holds again
            logger.warning(
                "registry %s exceeds its bound: %d entries, maxsize %s, and every one is busy or leased%s",
                self._label(),
                len(self),
                self._limits.maxsize,
                ", or cannot be saved" if self._saves else "",
                extra={
                    "event_name": "registry.overflow",
                    "registry": self._label(),
                    "entries": len(self),
                    "leased": len(self._leases),
                },
            )

    # Evicted values that somebody still holds.

    def _keep_tail(self, key: Any, value: Any) -> Kept | None:
        """Keep an evicted value aside for as long as others hold it. The lock is held, and no user code runs."""
        if not self._comes_back(value):
            return None
        if self._tail is None:
            self._tail = Tail(self)
        self._tail.keep(key, value)
        return self._tail.data[key]

    def _comes_back(self, value: Any) -> bool:
        """Whether *value*, once evicted, may be found again."""
        return self._limits.revive and self._limits.close is None and not is_constant(value)

    def _prepare_tail(self, key: Any, value: Any) -> None:
        """*value* was put in: from now on it is what *key* means, and one day it may come back. The lock is held."""
        self._mortal = True
        tail = self._tail
        if tail is None:
            if type(value) not in STRONG and self._comes_back(value):
                self._tail = Tail(self)
        elif tail.data:
            tail.discard(key)

    def _in_tail(self, key: Any, default: Any) -> Any:
        """The evicted value of *key* that somebody still holds, or *default*."""
        tail = self._tail
        return default if tail is None or not tail.data else tail.get(key, default)

    def _drop_unreferenced(self, key: Any) -> None:
        """Forget the evicted value of *key* if nothing else references it. With a store it may be found again."""
        tail = self._tail
        if tail is None or self._saves or (kept := tail.data.get(key)) is None:
            return
        count = tail.references(kept, _FEW)
        if count:
            with self._lock:
                tail.drop(key, kept, count)
            tail.dropped.clear()

    def _tidy_tail(self) -> None:
        """What is left to do with the evicted values that are kept aside, when no lock is held."""
        tail = self._tail
        if tail is None:
            return
        while tail.due:
            try:
                key = tail.due.pop()
            except IndexError:  # another thread was faster
                break
            found = tail.data.get(key)
            if found is not None and found.strong:
                self._check_aside(tail, key, found)
            del found
        if tail.fresh:
            tail.due, tail.fresh = tail.fresh, []
        most = max(self._limits.maxsize or 0, _ASIDE)
        while len(tail.data) > most:
            with self._lock:
                tail.bury()
                if len(tail.data) <= most:
                    break
                key, kept = next(iter(tail.data.items()))
            self._forget_aside(tail, key, kept)
        tail.dropped.clear()
        if tail.strong and not tail.watched and not getattr(self._limits.timer, "manual", False):
            tail.watched = True
            try:
                janitor.watch(tail, _FIRST_LOOK)
            except RuntimeError:  # as in `_be_watched`
                tail.watched = False

    def _check_aside(self, tail: Tail, key: Any, kept: Kept, referenced: set[int] | None = None) -> None:
        """
        Forget an evicted value if nothing else references it by now; its last changes are saved.

        With *referenced*, the ids of values that were found to be, the search is thorough, and any changes are saved.
        """
        if tail.data.get(key) is not kept or self._drop_ended(key):
            return
        if referenced is None:
            count = tail.references(kept, _FEW, hasty=True)
        elif (identity := id(kept())) in referenced:
            count = 0
        elif not (count := tail.references(kept)):
            referenced.add(identity)
        keeper = self._keeper
        if keeper is not None and (count or referenced is not None) and not keeper.settle_aside(key, kept):
            return
        if count:
            with self._lock:
                if tail.drop(key, kept, count) and keeper is not None:
                    keeper.forget_aside(key, kept)

    def _forget_aside(self, tail: Tail, key: Any, kept: Kept) -> None:
        """Forget an evicted value because there are too many: its changes until now are saved."""
        keeper = self._keeper
        if keeper is not None:
            keeper.settle_aside(key, kept)
        with self._lock:
            if tail.data.get(key) is not kept:
                return
            tail.discard(key)
            if keeper is not None:
                keeper.forget_aside(key, kept, TOO_MANY)
            self._forgotten += 1
            said = self._forgotten > 1
        if not said:
            logger.warning(
                "registry %s has evicted more than %d values that are still referenced: those evicted first are not "
                "found again. Raise maxsize, or lease entries for as long as they are used",
                self._label(),
                max(self._limits.maxsize or 0, _ASIDE),
                extra={"event_name": "registry.evicted_forgotten", "registry": self._label()},
            )

    def _check_tail(self) -> float | None:
        """Check the evicted values that are kept aside; returns seconds until the next time. Called by the janitor."""
        tail = self._tail
        if tail is None:
            return None
        tail.due.clear()
        tail.fresh.clear()
        referenced: set[int] = set()
        for key, kept in list(tail.data.items()):
            if kept.strong:
                self._check_aside(tail, key, kept, referenced)
        tail.dropped.clear()
        with self._lock:
            tail.bury()
            tail.strong = tail.watched = any(kept.strong for kept in tail.data.values())
            tail.pause = min(max(2 * tail.pause, _FIRST_LOOK), _LAST_LOOK)
            return tail.pause if tail.strong else None

    def _revive(self, key: Any) -> Any:
        """Put an evicted value that is still alive back in; `MISSING` if there is none."""
        if self._drop_ended(key):
            return MISSING
        self._drop_unreferenced(key)
        value = self._in_tail(key, MISSING)
        if value is not MISSING:
            try:
                found = self._put(key, value, keep=True, back=True, ago=self._evicted_ago(key))
            except BaseException:
                self._revived += _look(self, key, MISSING) is value  # a signal handler has raised after it was put
                raise
            _assign(self, "_revived", self._revived + (found is not MISSING))  # one call of C, as in `_resize`
            return found
        return value

    def _evicted_ago(self, key: Any) -> float | None:  # noqa: ARG002 - a timed one looks
        """Seconds since the evicted value of *key* was written, if entries have times."""
        return None

    def _drop_ended(self, key: Any) -> bool:  # noqa: ARG002 - a timed one looks
        """Forget the evicted value of *key* if it has expired; returns whether it had."""
        return False

    # Weight.

    def _weigh(self, key: Any, value: Any) -> int:
        """Ask the user's *getsizeof*; if it fails, the default estimate stands in."""
        measure = self._limits.getsizeof
        if measure is not None:
            try:
                size: object = measure(value)  # the hint says int; what comes back may be anything
                if isinstance(size, int) and size >= 0:
                    return size
                raise TypeError(f"getsizeof must return bytes, a whole number of at least 0; found {size!r}")
            except HOOK_ERRORS as error:
                self._hook_failed("getsizeof", key, error)
        return sizeof(value)

    def _resize(self, key: Any, size: int) -> None:
        """Note what *key* weighs now. The lock is held."""
        sizes = self._sizes
        if sizes is not None:
            more = size - sizes.get(key, 0)
            sizes[key] = size
            # One call of C, and not `__setattr__`: no signal handler runs between these two lines.
            _assign(self, "_bytes", self._bytes + more)

    def _lend(self, key: Any) -> None:
        """A value that was read may be changed in place by its reader: measure it again, soon."""
        lent = self._lent
        assert lent is not None
        lent[key] = None
        self._reads += 1
        if self._reads >= _SLICE:
            self._measure_lent()

    def _measure_lent(self, newest: Any = MISSING) -> None:
        """Measure what was read or leased since; evict if it has grown beyond the bound."""
        self._remeasure()
        if self._over():
            self._sweep(newest)

    def _remeasure(self) -> None:
        """Measure the values that were read or leased since, a slice of them."""
        lent, sizes = self._lent, self._sizes
        if lent is None or sizes is None:
            return
        self._reads = 0
        for _ in range(min(len(lent), 2 * _SLICE)):
            try:
                key = lent.popitem()[0]
            except KeyError:
                break
            value = _look(self, key, MISSING)
            if value is MISSING:
                continue
            size = self._weigh(key, value)
            with self._lock:
                if key in sizes and _look(self, key, MISSING) is value:
                    self._resize(key, size)
            value = None

    # Time. What a registry without times skips; `Timed` does it.

    def _settle(self, key: Any) -> None:
        """Before *key* is looked at: drop a slice of what is due, and *key* itself if its time is over."""

    def _expire_due(self, gone: list[Gone]) -> int:  # noqa: ARG002 - a timed one fills it
        """Drop a slice of what is due; says how many it looked at."""
        return 0

    def _be_watched(self, *, anew: bool = False) -> None:
        """Have the janitor come when something falls due, unless it comes anyway; *anew*: at another time."""

    # On request.

    def touch(self, key: K) -> bool:
        """Count *key* as used, if it is here; says whether it is."""
        if not _has(self, key):
            return False
        self._rerank(key)
        self._touch(key)
        return True

    def _rerank(self, key: Any) -> None:
        order = self._order
        if isinstance(order, ImportanceOrder):
            value = _look(self, key, MISSING)
            rank = self._rank(key, value)
            with self._lock:
                if _look(self, key, MISSING) is value and key not in self._leases:
                    order.rank(key, rank)
                    self._parked.pop(key, None)

    def evict(self, key: K) -> bool:
        """
        Drop *key* as if the bound had (cause ``PRESSURE``), unless it is leased or busy; says whether it left.

        With a *store* it is saved before; on an event loop it is not waited for, and what is not saved yet stays.
        """
        self._settle(key)
        value = _look(self, key, MISSING)
        if value is MISSING:
            return False
        entry: Entry[Any, Any] = Entry(key, value, self._owner())
        del value
        if self._limits.busy is not None and self._is_busy(entry):
            return False
        if self._saves and key not in self._leases and not self._may_leave(key, entry.value):
            return False
        gone: list[Gone] = []
        try:
            try:
                with self._lock:
                    evicted = (
                        key not in self._leases
                        and _look(self, key, MISSING) is entry.value
                        and not self._is_unsaved(key)
                    )
                    del entry  # or the value would count as referenced
                    return evicted and self._discard(key, Cause.PRESSURE, gone)
            finally:
                self._tell(gone)
        except BaseException:
            self._tell(gone)
            raise

    def expire(self) -> int:
        """Drop everything whose time is over, now; says how many left. The janitor does it by itself."""
        self._check_tail()
        return 0

    def trim(self, to: int | str) -> int:
        """
        Evict (cause ``PRESSURE``) down to *to*, busy and leased entries spared; says how many left.

        With a *store* they are saved before; on an event loop that is not waited for, and what is not saved stays.

        Args:
            to: Entries (a number), a share of the present entries (``"50%"``), or bytes (``"10MiB"``; needs
                *max_bytes*).

        Raises:
            ValueError: *to* is negative, not understood, or bytes are not measured here.
        """
        entries, size = self._target(to)
        gone: list[Gone] = []
        try:
            try:
                self._expire_due(gone)
                self._poll_parked(len(self))
                before = len(gone)
                while len(self) > entries or (size is not None and self._bytes > size):
                    if not self._evict_one(Cause.PRESSURE, MISSING, gone):
                        break
                return self._entries_of(gone[before:])
            finally:
                self._tell(gone)
        except BaseException:
            self._tell(gone)
            raise

    def _entries_of(self, gone: list[Gone]) -> int:
        """How many entries these removals were."""
        return len(gone)

    def _target(self, to: int | str) -> tuple[int, int | None]:
        wanted = 'trim(to=...) takes a number of entries, a share such as "50%", or bytes such as "10MiB"'
        if isinstance(to, bool) or not isinstance(to, (int, str)):
            raise TypeError(f"{wanted}; found {to!r}")
        if isinstance(to, int):
            if to < 0:
                raise ValueError(f"{wanted}; found {to!r}")
            return to, None
        if to.strip().endswith("%"):
            try:
                share = float(to.strip()[:-1]) / 100
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1:
                raise ValueError(f"{wanted}; found {to!r}")
            return int(len(self) * share), None
        if self._sizes is None:
            raise ValueError(f"{wanted}; found {to!r} for a registry without max_bytes, which does not measure bytes")
        return len(self), nbytes(to, "to")

    @overload
    def lease(self, key: K, create: None = None, *, timeout: Duration | None = None) -> Lease[V]: ...
    @overload
    def lease(
        self, key: K, create: Callable[[], Awaitable[V]] | Callable[[], V], *, timeout: Duration | None = None
    ) -> Lease[V]: ...
    def lease(self, key: K, create: Callable[[], Any] | None = None, *, timeout: Duration | None = None) -> Lease[V]:
        """
        Use *key* without fear that it is evicted or expires meanwhile: ``with r.lease(key, create=factory) as value``.

        Args:
            key: The entry to hold.
            create: Makes the value if there is none. Concurrent leases of one key call it once; if it raises, those
                who wait for it get the same exception. Under ``async with`` it may be asynchronous. Without it the
                registry's *default_factory* serves. With ``overflow="raise"`` it is called once there is room; a value
                that cannot be put in all the same is closed.
            timeout: Seconds (or ``"30s"``, a ``timedelta``) that this caller waits for another caller's factory of the
                same key, for the close of its previous value, and for another process that leases it; 0: not at all.
                ``None``, the default: no limit. The time that its own *create* takes is not part of it.

        Returns:
            A context manager, sync and async, good for one use. Leases of one key may overlap.

        Raises:
            KeyError: (on entering) there is no such entry and nothing to create it with.
            LeaseTimeout: (on entering) it was not acquired within *timeout*; it is a ``TimeoutError``, too.
            RegistryFull: (on entering) with ``overflow="raise"``, no other entry may leave. *create* is not called.
            RuntimeError: (on entering) *create* asks for the key that it is creating, or waits for another factory that
                does; or the previous value cannot be closed as long as this caller waits for it. The message says why.
            ValueError: *timeout* is negative, or not understood.
        """
        if timeout is not None:
            timeout = 0.0 if timeout == 0 else seconds(timeout, "timeout")
        return Lease(self, key, create, timeout)

    def _pin(self, key: Any, pins: list[Any]) -> Any:
        """Pin *key* if it is here, and count the lookup; `MISSING` if not. *pins* notes each pin."""
        while True:
            value = self._find(key)
            if value is MISSING:
                return MISSING
            with self._lock:
                self._pin_row(key, pins)
                # Looked at after it is pinned: a sweep without a lock may just have taken it.
                if _look(self, key, MISSING) is value:
                    return value
                self._unpin_row(pins)

    def _pin_row(self, key: Any, pins: list[Any]) -> None:
        """One more lease on *key*, which *pins* notes in the same step. The lock is held."""
        leases = self._leases
        count = leases.get(key, 0)
        leases[key] = count + 1
        pins.append(key)  # no signal handler runs between these two lines

    def _pin_new(self, key: Any, value: Any, pins: list[Any]) -> Any:
        self._settle(key)  # a leased entry does not expire
        with self._lock:
            self._pin_row(key, pins)  # before it is put in, so that there is no moment at which it could leave
        try:
            return self._put_made(key, value)
        except BaseException:
            if pins:
                self._unpin(key, pins)
            raise

    def _factory(self) -> Callable[[], Any] | None:
        """What makes a value for a lease that brings no factory, unless a subclass has its own ``__missing__``."""
        return self._limits.default_factory if type(self).__missing__ is Registry.__missing__ else None

    def _unpin_row(self, pins: list[Any]) -> bool:
        """One lease less on the last of *pins*; says whether it was the last one of its key. The lock is held."""
        leases, key = self._leases, pins[-1]
        count = leases.get(key, 0) - 1
        if count > 0:
            leases[key] = count
            pins.pop()  # no signal handler runs between these two lines
            return False
        if key in leases:
            del leases[key]
        pins.pop()
        return True

    def _unpin(self, key: Any, pins: list[Any]) -> None:
        count = len(pins)
        try:
            self._unpin_now(key, pins)
        except HygieneError:
            raise
        except BaseException:
            with contextlib.suppress(HygieneError):
                if len(pins) == count:
                    self._unpin_now(key, pins)
                self._repair()  # an entry that was leased may leave from now on
            raise

    def _unpin_now(self, key: Any, pins: list[Any]) -> None:
        with self._lock:
            if not pins:  # the finalizer of the lease was faster: a collection may run it before the end of a coroutine
                return
            # Used until now, and noted while the lease still protects it: held for longer than *idle*, it is fresh.
            if self._order is None:
                self._touch(key)
            else:
                self._stamp_use(key)
            last = self._unpin_row(pins)
        if last:
            self.touch(key)  # the end of a lease is the last moment of its use
            if self._order is not None and _has(self, key) and key not in self._order:
                self._unpark(key)
            if self._lent is not None:
                self._lent[key] = None
                self._measure_lent()
            if self._over():
                self._sweep()
            self._after_lease(key)
            if self._keeper is not None and (value := _look(self, key, MISSING)) is not MISSING:
                self._keeper.settle(key, value)
            if self._overtaken is not None:
                self._check_overtaken(key)

    def _is_leased(self, key: Any) -> bool:
        return key in self._leases

    def _check_overtaken(self, key: Any) -> None:
        """Raise if a lease has changed its value after the registry was closed, when nobody saved it any more."""
        overtaken = None if self._overtaken is None else self._overtaken.pop(key, None)
        if overtaken is not None:
            overtaken.check()

    def _after_lease(self, key: Any) -> None:
        """Drop what ran out of time while it was leased."""

    def stats(self) -> RegistryStats:
        """The numbers of this moment."""
        hits, misses, _ = self._counted()
        return RegistryStats(
            entries=len(self),
            bytes=None if self._sizes is None else self._bytes,
            hits=hits + self._hits,
            misses=misses + self._misses,
            rehydrated=self._revived + (0 if self._keeper is None else self._keeper.loads),
            evictions=MappingProxyType(self._evictions()),
            leased=len(self._leases),
            overflowing=max(0, len(self) - self._bound),
            hook_errors=self._hook_errors,
            forgotten=self._forgotten,
        )

    def _evictions(self) -> dict[Cause, int]:
        counts = {cause: n for cause, n in list(self._counts.items()) if cause in _DROPPED}
        swept = self._counted()[2]
        if swept:
            counts[Cause.SIZE] = counts.get(Cause.SIZE, 0) + swept
        return counts

    def close(self) -> None:
        """
        Remove everything (cause ``CLOSED``) and release the values; safe to call twice.

        Synchronous closers have run when it returns. Asynchronous ones run on their loops; where there is none to run
        on, they wait for `drain`, and a warning says so. The dict itself goes on working, within its bounds.

        With a *store* everything that was changed before is saved, and the store is closed if the registry has opened
        it. From the beginning of the call, each use of the registry and each change of its lists raises `StoreError`,
        in every thread. A lease that has not ended yet raises at its end if its value was changed after the save.

        Raises:
            StoreUnavailable: not everything could be saved. It stays pending for as long as the process lives.
            NotStorable, VersionConflict, StoreError: an entry could not be saved, and everything else was.
        """
        keeper, unsaved = self._keeper, None
        gone: list[Gone] = []
        try:
            if keeper is not None:  # before the hooks are told and the values released, as with an eviction
                unsaved = keeper.close(gone)
        finally:
            self._closed_down(gone)
        if unsaved is not None:
            raise unsaved

    def _closed_down(self, gone: list[Gone]) -> None:
        self._tell(gone)
        self._empty(Cause.CLOSED)
        waiting = 0 if self._releases is None else len(self._releases._waiting)
        if waiting:
            logger.warning(
                "registry %s was closed with %d asynchronous releases that have no loop to run on: "
                "await its aclose() or drain()",
                self._label(),
                waiting,
                extra={"event_name": "registry.releases_waiting", "registry": self._label()},
            )

    async def aclose(self) -> None:
        """`close`, and wait for every asynchronous release."""
        keeper, unsaved = self._keeper, None
        gone: list[Gone] = []
        try:
            if keeper is not None:
                unsaved = await keeper.aclose(gone)
        finally:
            self._tell(gone)
            self._empty(Cause.CLOSED)
            await self.drain()
        if unsaved is not None:
            raise unsaved

    # What a store adds.

    def flush(self, timeout: Duration | None = None) -> None:
        """
        Return when everything changed so far is saved: the acknowledgement.

        Changes in place, at any depth of a value or of an item of a list, are found and saved as well.

        Args:
            timeout: Seconds to go on trying; ``None``: one attempt, made at once.

        Raises:
            StoreUnavailable: not everything could be saved. It stays pending and is tried again.
            VersionConflict: somebody else was faster; everything else was saved. It is told once: *conflicts* lists
                the entries, and their next look-ups get what is stored.
            NotStorable, StoreError: an entry cannot be saved, and stays in memory; everything else was.
            ValueError: there is no *store*.
        """
        keeper = self._kept()
        unsaved = keeper.settle_all()
        try:
            keeper.writer.flush(timeout)
        except VersionConflict as error:
            keeper.told(error)
            raise
        if unsaved is not None:
            raise unsaved

    async def aflush(self, timeout: Duration | None = None) -> None:
        """As `flush`; for an event loop, which goes on meanwhile."""
        keeper = self._kept()
        unsaved = keeper.settle_all()
        try:
            await keeper.writer.aflush(timeout)
        except VersionConflict as error:
            keeper.told(error)
            raise
        if unsaved is not None:
            raise unsaved

    def changed(self, key: K) -> None:
        """
        Save the value of *key*, which is in memory and was changed in place, soon.

        A `History` tells its own changes; this is for an item that was edited inside, and for other values. Without it
        such changes are found at the end of a lease, at the eviction, at `flush` and at `close`.

        Raises:
            KeyError: it is not in memory, so what you have is not what the registry has. Put it in.
            NotStorable, StoreUnavailable, VersionConflict: as ``r[key] = value`` does.
            ValueError: there is no *store*.
        """
        self._settle(key)
        value = _look(self, key, MISSING)
        if value is MISSING and not self._drop_ended(key):
            value = self._in_tail(key, MISSING)
        if value is MISSING:
            raise KeyError(key)
        self._kept().changed(key, value)

    def stored_keys(self, prefix: str | None = None) -> Iterator[K]:
        """
        Return an iterator over the keys in the store and the keys that wait to be saved, each once.

        The values are not read. The time grows in proportion to the number of keys, and the call blocks while the store
        is read. The keys are read in slices, in no particular order: a key that is inserted or removed during the
        iteration may be returned or not.

        Args:
            prefix: Return only the keys that are text and start with *prefix*. ``None``, the default, returns all keys.

        Raises:
            TypeError: *prefix* is not text.
            ValueError: the registry has no *store*.
        """
        if prefix is not None and not isinstance(prefix, str):
            raise TypeError(f"`prefix` must be text or None, got {prefix!r}.")
        return self._kept().stored_keys(prefix)

    def stored(self, prefix: str | None = None) -> Iterator[K]:
        """Do the same as `stored_keys`; this is its old name."""
        return self.stored_keys(prefix)

    def _kept(self) -> Keeper:
        if self._keeper is None:
            raise ValueError(
                f"registry {self._label()} saves nothing: it was made without a store. "
                'Give it store="sqlite:chats.db", or another'
            )
        return self._keeper

    def _drop_stale(self, key: Any, error: StoreError) -> None:
        """Somebody else has saved *key*: what is in memory is out of date, and no look-up may find it any more."""
        gone: list[Gone] = []
        try:
            try:
                with self._lock:
                    self._let_stale_go(key, error, gone)
            finally:
                self._tell(gone)
        except BaseException:
            self._tell(gone)
            raise

    def _let_stale_go(self, key: Any, error: StoreError, gone: list[Gone]) -> None:
        """As `_drop_stale`; the lock is held, and *gone* is to be told when it is not."""
        for value in (_look(self, key, MISSING), self._in_tail(key, MISSING)):
            if value is not MISSING:
                outdate(key, value, error)
        del value
        if self._tail is not None:
            self._tail.discard(key)
        if self._keeper is not None:
            self._keeper.unlist(key)
        self._discard(key, Cause.REPLACED, gone)

    async def drain(self) -> None:
        """Wait until every asynchronous release that was started has ended; run here those that have no loop."""
        if self._releases is not None:
            await self._releases.drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    # A dict like any other.

    __eq__ = dict.__eq__
    __ne__ = dict.__ne__
    __hash__ = None  # type: ignore[assignment] # as in dict
    __repr__ = dict.__repr__

    def __str__(self) -> str:
        return dict.__repr__(self)

    def __or__(self, other: Any) -> dict[K, V]:  # type: ignore[override]
        # A plain dict: the union of two may exceed the bound.
        return self._snapshot() | dict(other) if isinstance(other, dict) else NotImplemented

    def __ror__(self, other: Any) -> dict[K, V]:  # type: ignore[override]
        return dict(other) | self._snapshot() if isinstance(other, dict) else NotImplemented

    def move_to_end(self, key: K, last: bool = True) -> None:  # noqa: FBT001, FBT002 - as OrderedDict's
        """As ``OrderedDict.move_to_end``: change the *iteration* order. Constant time, to the front linear."""
        self._settle(key)
        with self._lock:
            _fetch_raw(self, key)
            others = [] if last else [k for k in self._walk_keys() if not _same(k, key)]
            recency = list(by_recency(self)) if others else []
            for k in (key, *others):
                self._reinsert(k)
            for k in recency:
                move(self, k)
            if last and self._moves:
                move(self, key)

    @classmethod
    def fromkeys(cls, iterable: Iterable[Any], value: Any = None) -> Any:
        """As ``dict.fromkeys``: a registry without limits."""
        registry = cls()
        for key in iterable:
            registry[key] = value
        return registry

    def copy(self) -> Self:
        """A registry with the same entries and bounds, and none of the hooks: the values belong to this one."""
        return copy.copy(self)

    def __copy__(self) -> Self:
        limits = self._limits
        hookless = {name: getattr(limits, name) for name in limits.given - _HOOKS}
        twin: Self = make(type(self)._copies_as(), Limits.of(**hookless))
        twin.__dict__.update(self.__dict__)
        twin._fill(self)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        owner = self._owner()
        limits = self._limits.merge(store=None) if self._saves else self._limits  # one store, one registry
        twin: Self = make(type(self)._copies_as(), limits, memo.get(id(owner)))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for key, value in self._snapshot().items():
            twin[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Hooks are code: they stay behind. Plain settings travel, so that what is loaded is bounded too.
        limits = self._limits
        plain = {name: getattr(limits, name) for name in limits.given - _CODE}
        plain = {name: value for name, value in plain.items() if value is None or isinstance(value, (int, float, str))}
        if limits.importance is not None:
            plain.pop("policy", None)  # nobody could rank there
        load, kind = type(self)._copies_as()._pickles_as()
        return load, (kind, plain), self.__dict__ or None, None, iter(self._snapshot().items())

    # A class that was made at run time answers these two in another way.

    @classmethod
    def _copies_as(cls) -> type[Any]:
        """The class of a copy, which is a registry by itself."""
        return _plain_class(cls)

    @classmethod
    def _pickles_as(cls) -> tuple[Callable[[type[Any], dict[str, Any]], Any], type[Any]]:
        """What pickle calls for an empty one, and with which class: one that is found by its name."""
        return _load, cls

    def _label(self) -> str:
        return self._name or f"of {len(self)} entries"

    def _renew_locks(self) -> None:
        """`threading` was patched: see `janitor.renew_locks`."""
        with self._lock:
            self._lock = threading.RLock()
            self._choose_paths()

    def _after_fork(self) -> None:
        # Whoever held the locks, or was creating a value, is a thread that this process does not have.
        self._lock = threading.RLock()
        self._broom = {}
        self._flights = {}
        self._places = None
        if self._closings:
            for reference in self._closings.values():
                if (closing := reference()) is not None:
                    closing.forget()
            self._closings = {}
        self._copies = {}
        self._known = False
        self._loops.clear()  # none of them runs here
        if self._releases is not None:
            self._releases._after_fork()
        self._choose_paths()


@quicken
class Timed(Registry[K, V]):
    """A registry whose entries have times: a read compares the clock with the next expiry."""

    __slots__ = ()

    __getitem__ = read_timed
    get = get_timed
    __contains__ = contains_timed

    def peek(self, key: K, default: Any = None) -> Any:
        """The value of *key*, or *default*, without counting as use; an expired entry is not there."""
        self._settle(key)
        return super().peek(key, default)

    def _walk_keys(self, *, backwards: bool = False) -> Iterator[K]:
        for key in super()._walk_keys(backwards=backwards):
            if self._now() < self._due or self._over_by(key) is None:
                yield key

    def _walk_items(self, *, backwards: bool = False) -> Iterator[tuple[K, V]]:
        for key, value in super()._walk_items(backwards=backwards):
            if self._now() < self._due or self._over_by(key) is None:
                yield key, value

    def touch(self, key: K) -> bool:
        """Count *key* as used, if it is here; says whether it is."""
        self._settle(key)
        return super().touch(key)

    def _now(self) -> float:
        timer = self._timer
        assert timer is not None
        return timer()

    def _in_line(self) -> bool:
        return super()._in_line() and self._now() < self._due

    def _settle(self, key: Any) -> None:
        timer = self._timer
        assert timer is not None
        now = timer()
        if now < self._due or (self._asking and threading.get_ident() in self._asking):
            return
        gone: list[Gone] = []
        try:
            try:
                self._expire_due(gone)
                # Idle for too long, with a store: it would be saved, dropped and loaded again. It is just being used.
                late = None if now < self._due else self._over_by(key)
                if late is not None and not (self._saves and late is Cause.IDLE):
                    self._expire_one(key, late, gone)
            finally:
                self._tell(gone)
        except BaseException:
            self._tell(gone)
            raise

    def _over_by(self, key: Any) -> Cause | None:
        """Why the time of *key* is over, or ``None`` if it is not; what is leased has time."""
        if key in self._leases:
            return None
        now, limits = self._now(), self._limits
        if limits.ttl is not None:
            stamp = self._written_at(key)
            if stamp is None and key in self._held:
                stamp = self._held[key][1]
            if stamp is not None and now >= stamp + limits.ttl:
                return Cause.EXPIRED
        if limits.idle is not None:
            stamp = self._used_at(key)
            if stamp is not None and now >= stamp + limits.idle:
                return Cause.IDLE
        return None

    def _expire_one(self, key: Any, cause: Cause, gone: list[Gone]) -> bool:
        """Drop *key*, unless it is busy: then its time goes on. ``False``: it is being saved, and leaves then."""
        if self._saves and cause is Cause.IDLE:
            leaves = self._may_leave(key, _look(self, key, MISSING))
            if leaves is None:
                return False
            if not leaves:
                with self._lock:
                    self._hold(key, cause)
                return True
        if self._limits.busy is not None:
            entry: Entry[Any, Any] = Entry(key, _look(self, key, MISSING), self._owner())
            if entry.value is not MISSING and self._is_busy(entry):
                with self._lock:
                    self._hold(key, cause)
                return True
            del entry  # or the value would count as referenced
        with self._lock:
            if cause is Cause.IDLE and self._is_unsaved(key):
                return True  # changed since: the next look finds it used, or unsaved
            late = self._over_by(key)
            # Due for being idle, an entry may have expired as well: one that was busy when its ttl had elapsed.
            over = late is cause or late is Cause.EXPIRED
            if over and not self._discard(key, late or cause, gone):
                self._unstamp(key)  # or the stamp that a read left while it was removed would be due for ever
        return True

    def _expire_due(self, gone: list[Gone]) -> int:
        """Drop a slice of what is due; says how many it looked at."""
        if self._now() < self._due:
            return 0
        looked = 0
        if self._limits.busy is None and not self._saves:
            with self._lock:
                while looked < _SLICE and (due := self._next_due()) is not None:
                    looked += 1
                    self._expire_next(*due, gone)
        else:
            while looked < _SLICE:
                with self._lock:
                    due = self._next_due()
                if due is None:
                    break
                if not self._expire_next(*due, gone):
                    self._due = self._now() + self._slack()
                    break
                looked += 1
        return looked

    def _expire_next(self, key: Any, cause: Cause, gone: list[Gone]) -> bool:
        with self._lock:
            if key in self._leases:
                self._hold(key, cause)
                return True
        return self._expire_one(key, cause, gone)

    def _discard(self, key: Any, cause: Cause, gone: list[Gone]) -> bool:
        value = _look(self, key, MISSING)
        if value is MISSING:
            return False
        try:
            found = self._extract(key)
            if found is None:
                return False
            _, written, used = found
            del found, _  # or the value would count as referenced
            held = _LOCAL < getrefcount(value) < FOREVER
            self._forget_timed(key, cause, gone, value, written, used, held=held)
        except BaseException:
            self._leave(key, value, cause, gone)
            raise
        return True

    def _forget_timed(
        self,
        key: Any,
        cause: Cause,
        gone: list[Gone],
        value: Any,
        written: float | None,
        used: float | None,
        *,
        held: bool,
    ) -> None:
        """As `_forget`, for an entry with the times that it had."""
        if self._held and (stamps := self._held.pop(key, None)) is not None and written is None:
            written = stamps[1]
        revivable = held and type(value) not in STRONG and self._is_revivable(cause)
        if not revivable and self._limits.on_evict is None:
            self._forget(key, value, cause, gone, held=held)
            return
        now = self._now()
        age, idle_for = self._ages(key, written, used, now)
        self._forget(key, value, cause, gone, age, idle_for, held=held)
        tail = self._tail
        if revivable and tail is not None and tail.get(key) is value:
            # Evicted is not written: if it is found again, its time has gone on.
            used = None if idle_for is None or self._saves else now - idle_for
            self._left[key] = None if age is None else now - age, used
            if len(self._left) > 2 * len(tail.data) + _SLICE:
                self._left = {name: times for name, times in self._left.items() if name in tail.data}

    def _drop_ended(self, key: Any) -> bool:
        if not self._has_ended(key):
            return False
        value = None
        with self._lock:
            tail = self._tail
            if tail is None or (value := tail.get(key)) is None or not self._has_ended(key):
                return False
            tail.discard(key)
            if self._keeper is not None:
                self._keeper.left(key, value, Cause.EXPIRED, adrift=None)
        tail.dropped.clear()
        return True

    def _has_ended(self, key: Any) -> bool:
        """Whether the time of the evicted value of *key* is over."""
        written, used = self._left.get(key, (None, None))
        now, limits = self._now(), self._limits
        if limits.ttl is not None and written is not None and now >= written + limits.ttl:
            return True
        return limits.idle is not None and used is not None and now >= used + limits.idle

    def _evicted_ago(self, key: Any) -> float | None:
        written = self._left.get(key, (None, None))[0]
        return None if written is None else self._now() - written

    def _written_ago(self, key: Any) -> float:
        return self._times(key)[0] or 0.0

    def _written_before(self, key: Any, ago: float) -> float | None:  # noqa: ARG002 - it is not here
        return None if self._limits.ttl is None else self._now() - ago

    def _backdate(self, key: Any, written: float) -> None:
        # It was written earlier than its place in the order of writes says.
        ttl = self._limits.ttl
        if ttl is not None and self._written_at(key) is not None:
            self._write_as(key, written)
            heapq.heappush(self._early, (written + ttl, next(_serial), key, written))
            self._due = min(self._due, written + ttl)

    def _next_early(self) -> tuple[float, Any]:
        """Who came back is due first, and when. The lock is held."""
        while self._early:
            due, _, key, stamp = self._early[0]
            if self._written_at(key) == stamp:
                return due, key
            heapq.heappop(self._early)  # written again, or removed
        return _NEVER, MISSING

    def _next_due(self) -> tuple[Any, Cause] | None:
        """Who is due; or ``None``, and then `_due` says when somebody will be. The lock is held."""
        now, limits = self._now(), self._limits
        soonest = _NEVER
        if limits.ttl is not None and (first := self._first_written()) is not None:
            soonest = first[1] + limits.ttl
            if now >= soonest:
                return first[0], Cause.EXPIRED
        if self._early:
            due, key = self._next_early()
            if now >= due:
                return key, Cause.EXPIRED
            soonest = min(soonest, due)
        if self._held:
            key, (again, stamp) = next(iter(self._held.items()))
            if now >= again:
                self._write_first(key, stamp)  # its time is over already
                del self._held[key]  # last: no moment may come at which it has no time
                return self._next_due()
            soonest = min(soonest, again)
        if limits.idle is not None and (first := self._first_used()) is not None:
            due = first[1] + limits.idle
            if now >= due:
                return first[0], Cause.IDLE
            soonest = min(soonest, due)
        self._due = soonest
        return None

    def _hold(self, key: Any, cause: Cause) -> None:
        """What is in use when its time is over: look at it again later. The lock is held."""
        if cause is Cause.IDLE:
            self._touch(key)  # in use is used
        elif (stamp := self._written_at(key)) is not None:
            self._held[key] = (self._now() + self._slack(), stamp)
            self._unwrite(key)  # last: no moment may come at which it has no time

    def _restamp(self, keys: list[Any]) -> None:
        """Give a time to each entry that has lost its own. The lock is held."""
        limits = self._limits
        for key in keys:
            if (limits.ttl is not None and self._written_at(key) is None and key not in self._held) or (
                limits.idle is not None and self._used_at(key) is None
            ):
                self._stamp_write(key)
        self._due = min(self._due, self._now())  # looked up anew by the next operation
        self._watched = bool(getattr(limits.timer, "manual", False))

    def _slack(self) -> float:
        """How late the janitor may be: 5 % of the shortest limit or a second is promised, half of that is aimed for."""
        limits = self._limits
        return max(0.5, 0.025 * min(limits.ttl or _NEVER, limits.idle or _NEVER))

    def _times(self, key: Any) -> tuple[float | None, float | None]:
        return self._ages(key, self._written_at(key), self._used_at(key), self._now())

    def _ages(
        self, key: Any, written: float | None, used: float | None, now: float
    ) -> tuple[float | None, float | None]:
        if written is None and key in self._held:
            written = self._held[key][1]
        return None if written is None else now - written, None if used is None else now - used

    def _reconsider_times(self) -> None:
        """Keep the times that the limits need, and look again at what is due by them. The lock is held."""
        limits = self._limits
        told = limits.on_evict is not None
        self._keep_times(limits.timer, written=limits.ttl is not None or told, used=limits.idle is not None or told)
        # What was in use when its old time was over was written before all others: latest first, to keep that order.
        for key, (_, stamp) in sorted(self._held.items(), key=lambda one: -one[1][1]):
            self._write_first(key, stamp)
        self._held.clear()
        early, self._early = self._early, []
        if limits.ttl is not None:
            self._early = [(stamp + limits.ttl, serial, key, stamp) for _, serial, key, stamp in early]
            heapq.heapify(self._early)
        self._due = -_NEVER  # until the next look says when

    def _be_watched(self, *, anew: bool = False) -> None:
        if self._due < _NEVER:
            self._watched = True
            try:
                (janitor.watch_anew if anew else janitor.watch)(self, self._due - self._now())
            except RuntimeError:
                # No thread can be started: for the moment, or because the interpreter goes down. That is not the
                # fault of who writes; the next one tries again.
                self._watched = False
            except BaseException:  # a signal handler has raised: the next write tries again
                self._watched = False
                raise

    def _visit(self) -> float | None:
        """Drop what is due; say when the next is. Called by the janitor."""
        gone: list[Gone] = []
        while self._expire_due(gone) == _SLICE:
            self._tell(gone)
            gone.clear()
            time.sleep(0)  # hand over the GIL: others have waited for a slice, not for the whole backlog
        self._tell(gone)
        if self._over():  # what was busy when the bound was exceeded may be free by now
            self._sweep()
        with self._lock:
            self._watched = self._due < _NEVER
            return max(self._due - self._now(), self._slack()) if self._watched else None

    def _after_lease(self, key: Any) -> None:
        if self._over_by(key) is not None:
            self._settle_held(key)

    def _settle_held(self, key: Any) -> None:
        gone: list[Gone] = []
        try:
            try:
                if (cause := self._over_by(key)) is not None:
                    self._expire_one(key, cause, gone)
            finally:
                self._tell(gone)
        except BaseException:
            self._tell(gone)
            raise

    def expire(self) -> int:
        """Drop everything whose time is over, now; says how many left. The janitor does it by itself."""
        expired = 0
        self._check_tail()
        while True:
            gone: list[Gone] = []
            try:
                try:
                    looked = self._expire_due(gone)
                    expired += self._entries_of(gone)
                finally:
                    self._tell(gone)
            except BaseException:
                self._tell(gone)
                raise
            if not looked:
                return expired


def _same(key: Any, other: Any) -> bool:
    # As in a dict: keys are compared only where their hashes are equal.
    return key is other or (other is not MISSING and hash(key) == hash(other) and bool(key == other))


def converted(convert: Any, value: Any) -> Any:
    """A value as *values* makes it: a class, or a ``partial`` of one, converts only instances of its base."""
    kind = getattr(convert, "func", convert)
    if isinstance(kind, type):
        if isinstance(value, kind):
            return value
        for base in (list, dict, set):
            if issubclass(kind, base) and not isinstance(value, base):
                return value
    return convert(value)


def _fetch_raw(registry: Registry[K, V], key: K) -> V:
    value = _look(registry, key, MISSING)
    if value is MISSING:
        raise KeyError(key)
    return value  # type: ignore[no-any-return] # what dict.get returned is a V


def _reference(owner: object | None) -> Callable[[], Any]:
    """A weak reference where there can be one: the owner holds the registry, and a cycle would delay both ends."""
    if owner is None:
        return _nobody
    try:
        return weakref.ref(owner)
    except TypeError:
        return lambda: owner


def _nobody() -> None:
    return None


_OURS = frozenset(cause for cause in Cause if cause.ours)
_REVIVABLE = frozenset({Cause.SIZE, Cause.BYTES, Cause.PRESSURE})
_DROPPED = frozenset({Cause.SIZE, Cause.BYTES, Cause.EXPIRED, Cause.IDLE, Cause.PRESSURE})
_HOOKS = frozenset({"on_evict", "close", "store"})
_CODE = frozenset({"getsizeof", "importance", "values", "timer", "on_evict", "default_factory", "store"})
_assign = object.__setattr__
# Counters that each lookup on the long way sets: past ``__setattr__``, which is Python code.
_set_hits, _set_misses = Registry.__dict__["_hits"].__set__, Registry.__dict__["_misses"].__set__
CLOSED: set[type[Any]] = {Registry, Timed}
"""The classes whose instances have no attributes but those of the class."""
# What a registry sets of itself, all the time.
_ATTRIBUTES = STATE | frozenset(Registry.__slots__) | {*LIVE, "__class__"}
_serial = itertools.count()  # no two items of a heap are equal, so keys are never compared
_twins: dict[type[Any], type[Any]] = {}


def _timed(kind: type[Any]) -> type[Any]:
    """The timed twin of a registry class."""
    if kind is Registry:
        return Timed
    if kind not in _twins:
        namespace = {"__module__": kind.__module__, "__slots__": (), "_plain": kind}
        _twins[kind] = types.new_class(kind.__name__, (kind, Timed), exec_body=lambda ns: ns.update(namespace))
    return _twins[kind]


def _plain_class(kind: type[Any]) -> type[Any]:
    """The class that a registry of this kind is a variant of."""
    return Registry if kind is Timed else kind.__dict__.get("_plain", kind)


def _takes(registry: Registry[Any, Any], name: str) -> bool:
    """Whether an attribute of this name may be assigned: one of the class, or any where it is a subclass."""
    kind = type(registry)
    if hasattr(kind, name) or name == "__missing__":  # which has no effect there, as on an OrderedDict
        return True
    while (plain := _plain_class(kind)) is not kind:
        kind = plain
    return kind not in CLOSED


def make(kind: type[Any], limits: Limits, owner: object | None = None) -> Any:
    """An empty registry of this class, made without its ``__init__`` (a user's subclass may want arguments)."""
    timed = any(limit is not None for limit in (limits.ttl, limits.idle, limits.on_evict, limits.store))
    kind = _plain_class(kind)
    registry = Kernel.__new__(_timed(kind) if timed and not issubclass(kind, Timed) else kind)
    registry._configure(limits, owner)
    return registry


def _load(kind: type[Any], plain: dict[str, Any]) -> Any:
    """Unpickle."""
    return make(kind, Limits.of(**plain))
