"""
Between a registry and its store: what leaves is saved first, and what is asked for comes back.

Theory of operation
===================

**What is saved when.** A value goes to `WriteBehind` encoded, when it is put. From then on a list, which has become a
`History`, tells each change by itself. Of any other value that can change, the hash of its last encoding is kept, and
compared at the end of a lease, before it is evicted, and at ``flush`` and ``close``: what was changed in place and told
nobody is found there at the latest. The journal of a list does the same for each item (`Journal.find_edits`).

**Leaving.** An entry leaves memory when nothing of it is unsaved. If something is, plain code waits for the save, which
takes all that is pending along. An event loop, the janitor and the writer do not wait: the entry stays, the bound is
exceeded, and who saved it has the registry look again. While the store cannot save, what is unsaved is stepped over as
if it were leased.

**Coming back.** One thread loads a key, the others wait for it. What it brings is put in only if the key was neither
written nor removed meanwhile. With it comes the version that it has in the store, and all that is saved of the entry
builds on that version: what another process has saved is never overwritten.

**An evicted value that is still referenced** is the same object at the next lookup. A history continues to report its
changes. Other values are compared with their last encoding at ``flush``, at ``close``, when the janitor checks them and
before they are forgotten.

Locks are taken in this order: the writer's drive (around a save), the registry's, a history's, the writer's own.
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import functools
import gc
import inspect
import os
import random
import threading
import time
import weakref
from collections import OrderedDict, deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from hygiene.cleanup import close_at_shutdown
from hygiene.closing import GRACE, running_loop
from hygiene.errors import HygieneError, NotStorable, OwnershipLost, StoreError, StoreUnavailable, VersionConflict
from hygiene.events import Cause
from hygiene.history import History, attach, detach, history_type
from hygiene.janitor import aside, janitor, survive_fork
from hygiene.journal import Journal
from hygiene.kernel import MISSING
from hygiene.logs import logger
from hygiene.stores import SQLiteStore, open_store
from hygiene.tenure import FileTenures, Tenures
from hygiene.waits import Wait
from hygiene.writebehind import Rejected, WriteBehind, _Part, _shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hygiene.registry import Registry
    from hygiene.stores import Head, Record, Store
    from hygiene.tail import Kept

__all__ = ["TOO_MANY", "Keeper", "Loading", "Overtaken", "outdate"]


_KNOWN_ABSENT: Final = 1024  # keys looked up in vain whose absence is remembered, so that nobody's entry is overwritten
_PLAIN: Final = frozenset({str, int, float, bool, bytes, type(None), dt.datetime})  # cannot be changed in place
_ATTEMPTS: Final = 40  # to see that a registry is gone: 0.2 s in all
_TRIES: Final = 3  # looks at a key that others are writing
_FIRST_RETRY: Final = 0.1  # seconds until the store is asked again what has changed in it, growing ...
_LAST_RETRY: Final = 5.0  # ... up to this
_LAST_LOOK: Final = 0.001  # seconds for a second attempt to save, if the first has used up the time for the close
_AGAIN: Any = object()
_UNKNOWN: Any = object()
_DROPPED: Final = frozenset({Cause.DELETED, Cause.CLEARED})
TOO_MANY: Final = StoreError("too many values were evicted after it that are still referenced")


class _Opened:
    """A store that was opened by its address."""

    def __init__(self, address: str, store: Store) -> None:
        self.address = address
        self.store = store
        self.users = 0


class _Openings:
    """One store for all registries that name the same address: a file is looked at once, and has one writer."""

    def __init__(self) -> None:
        self._opened: dict[str, _Opened] = {}
        self._after_fork()
        survive_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    _renew_locks = _after_fork

    def take(self, address: str) -> _Opened:
        scheme, _, place = address.partition(":")
        shared = address
        if scheme.lower() == "sqlite" and place != ":memory:":
            shared = "sqlite:" + os.path.realpath(os.path.expanduser(place))  # noqa: PTH111 - as the store does
        with self._lock:
            opened = self._opened.get(shared)
            if opened is not None and getattr(opened.store, "replaced", False):
                # Its users get errors from now on, and whoever opens the path gets the file that is there. Both at once
                # would share an index of the log, of which SQLite believes that it belongs to one file.
                cast("Any", opened.store).abandon()
                opened = None
            if opened is None:
                opened = _Opened(shared, open_store(address))
                if place != ":memory:":
                    self._opened[shared] = opened
            opened.users += 1
            return opened

    def give_back(self, opened: _Opened) -> None:
        with self._lock:
            opened.users -= 1
            if opened.users:
                return
            if self._opened.get(opened.address) is opened:
                del self._opened[opened.address]
        opened.store.close()


_openings = _Openings()

# Who keeps which space of which store, and who still has something to save there. The store is held by the values.
_keepers: weakref.WeakValueDictionary[tuple[int, str], Keeper] = weakref.WeakValueDictionary()
_writers: weakref.WeakValueDictionary[tuple[int, str], WriteBehind] = weakref.WeakValueDictionary()


# Held while it is decided whether the writer of a registry that was collected is closed, or goes on for the next one.
_adopting = threading.Lock()


class Loading:
    """One load in progress, which others wait for instead of loading, too: a `hygiene.waits.Target`."""

    __slots__ = ("absent", "digest", "done", "head", "key", "loop", "name", "stale", "thread")

    doing, sync, task = "loading", True, None

    def __init__(self, key: Any, name: str | None) -> None:
        self.key = key
        self.name = name
        self.loop = running_loop()
        self.done: threading.Event | None = None  # made by the first who waits: mostly there is none
        self.stale = False  # the key was written or removed meanwhile
        self.absent = False  # there is no such entry
        self.digest: int | None = None  # of what comes, if it can be changed in place
        self.head: Head | None = None  # with which it comes
        self.thread = threading.get_ident()

    @property
    def ended(self) -> bool:
        """True if no caller has to wait for it any longer."""
        return self.done is not None and self.done.is_set()


class _Prepared:
    """A value as the writer takes it."""

    __slots__ = ("critical", "data", "items")

    def __init__(self, data: bytes | None, items: list[bytes] | None, *, critical: bool) -> None:
        self.data = data
        self.items = items
        self.critical = critical


class _Heir:
    """In a forked child: closes, at its exit, the keeper of a registry that the parent has opened."""

    _saves_in_child = True

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = weakref.ref(keeper)

    @property
    def closed(self) -> bool:
        keeper = self._keeper()
        return keeper is None or keeper.closed

    def close(self) -> None:
        """Save. The registry's values stay open: they are the parent's, too."""
        keeper = self._keeper()
        if keeper is None or keeper.closed:
            return
        unsaved = keeper.settle_all()
        if len(keeper.writer):  # else this child has not used it, and maybe could not: see `SQLiteStore`
            unsaved = keeper.close([]) or unsaved
        if unsaved is not None:
            raise unsaved


class Keeper:
    """
    Keeps the entries of one registry in one space of a store.

    Args:
        registry: Whose entries; held weakly.
        store: As `Registry` takes it.
        space: The space in the store, unless *store* is a `WriteBehind`, which has one.

    Raises:
        StoreUnavailable, StoreError: the store cannot be opened, or another registry keeps this space.
        ValueError, TypeError: *store* is not understood.
    """

    def __init__(self, registry: Registry[Any, Any], store: Any, space: str) -> None:
        self._registry = weakref.ref(registry)
        self._opened: _Opened | None = None
        self._predecessor: Callable[[], Registry[Any, Any] | None] = _nobody  # whose attribute was assigned anew
        self._mine = not isinstance(store, WriteBehind)
        if isinstance(store, WriteBehind):
            self.store = store._store
            space = store._space
        elif isinstance(store, str):
            self._opened = _openings.take(store)
            self.store = self._opened.store
        else:
            self.store = store
        self.space = space
        try:
            earlier = self._take_over(registry)
            if isinstance(store, WriteBehind):
                self.writer = store
            elif earlier is not None:
                self.writer = earlier
            else:
                self.writer = WriteBehind(self.store, space=space)
        except BaseException:
            if self._opened is not None:
                _openings.give_back(self._opened)
            raise
        self._encode = self.writer._encode
        self.read_only = bool(getattr(self.store, "read_only", False))
        # A file has leases, too, but no wait for its answers is so long that an event loop has to be spared.
        self.remote = callable(getattr(self.store, "lease", None)) and not hasattr(self.store, "owners")
        self.tenures = Tenures(self) if self.remote else FileTenures(self) if _leases_files(self.store) else None
        self._hashes: dict[Any, int] = {}  # of the last encoding of each value that can change in place
        self._loading: dict[Any, Loading] = {}
        self._absent: OrderedDict[Any, None] = OrderedDict()
        self._writes = 0  # counts them, for who looks whether there was one
        self._adrift: dict[Any, Callable[[], Any]] = {}  # evicted, still held by somebody, and still told of
        self._sunken: deque[tuple[Any, weakref.ref[Any]]] = deque()  # adrift until nobody held them any more
        self._expiring: set[Any] = set()  # deleted because their time was over
        self._awaited = False  # somebody was to leave, and waits for a save
        self._blocked: set[Any] = set()  # could not be saved when they were to leave, which has been said
        self._heir: tuple[_Heir, Any] | None = None  # in a forked child, and its place in the shutdown
        self.closed = False  # or about to be: each use is refused
        self._finished = False  # and nothing is saved any more
        self._gives_way = False  # to another one, which goes on with the writer
        self._stopping = threading.RLock()  # while it is stopped, or finished
        self._last: list[tuple[Any, Any]] = []  # entries that it had when it was stopped
        self._ends: dict[Any, float | None] = {}  # when they are over
        self._unsaved: HygieneError | None = None  # of the first of them that cannot be saved
        self.loads = 0
        """Entries that came back from the store."""
        _keepers[id(self.store), space] = self
        _writers[id(self.store), space] = self.writer
        self.writer._keeper = weakref.ref(self)
        close_at_shutdown(registry, f"registry {registry._label()}")
        self._abandon = weakref.finalize(registry, _abandoned, self.writer, self._opened, mine=self._mine)
        self._abandon.atexit = False
        survive_fork(self)
        reference: weakref.ref[Keeper] = weakref.ref(self)
        watch: Callable[..., Any] | None = getattr(self.store, "watch", None)
        self._hints = None if watch is None else watch(space, lambda keys: _hinted(reference, keys))

    def _take_over(self, registry: Registry[Any, Any]) -> WriteBehind | None:
        """The writer of who kept this space before; an error if somebody still does."""
        place = id(self.store), self.space
        closing = False
        for attempt in range(_ATTEMPTS):
            other = _keepers.get(place)
            if other is not None and other.closed:
                other._finish()  # another thread, or a task of this one, is closing it, and its writer with it
                closing = other._mine and not other._gives_way
            previous = None if other is None or other.closed else other._registry()
            if previous is None or other is None:
                break
            if registry.owner is not None and previous.owner is registry.owner:
                other.hand_over()  # the attribute is being assigned anew
                self._predecessor = weakref.ref(previous)
                break
            if attempt == _ATTEMPTS - 1:
                raise StoreError(
                    f"wanted the space {self.space!r} of {self._where()} for one registry; found that registry "
                    f"{previous._label()} keeps it. Give each a name= of its own, or close() that one first"
                )
            del previous, other
            if attempt:
                time.sleep(0.005)  # its writer may just be telling it that something was saved
            else:
                gc.collect()  # it may be garbage already
        writer = _writers.get(place)
        if writer is None or writer.closed:
            return None
        with _adopting:
            if not writer._closing and not closing:
                writer._keeper = weakref.ref(self)  # from now on it is ours, though its registry was collected
                return writer
        try:
            writer.close(GRACE)  # what it has would be missed here until it is saved
        except StoreUnavailable:
            raise
        except StoreError:  # an entry was rejected, which was logged, and is not ours
            pass
        return None

    def _where(self) -> str:
        return str(getattr(self.store, "address", None) or getattr(self.store, "path", None) or "the store")

    def _after_fork(self) -> None:
        self._loading = {}
        self._stopping = threading.RLock()
        # What was changed before the fork is the parent's to save, told or not: a change in place must not be found
        # here, too, nor the half of one that another thread was making. (The writer still knows what is unsaved: who
        # was made last is asked first.)
        registry = self._registry()
        found = [] if registry is None else list(dict.items(registry))
        for key, value in found + [(key, reference()) for key, reference in list(self._adrift.items())]:
            if isinstance(value, History):
                journal = value._hygiene.journal
                if isinstance(journal, Journal) and (len(value) != journal._count or key in self.writer):
                    journal.begin_anew(value)
                elif isinstance(journal, Journal):
                    journal.edited_elsewhere(value)
            elif key in self._hashes:
                with contextlib.suppress(Exception):  # it cannot be saved, which will be said when it is to be
                    self._hashes[key] = hash(self._encode(value, key))
        if registry is not None and not self.closed:
            self._enlist_heir()

    def _enlist_heir(self) -> None:
        """Have the end of this forked child save what it has changed, and leave the parent's values alone."""
        if self._heir is not None:
            self._heir[1].cancel()
        heir = _Heir(self)
        self._heir = heir, close_at_shutdown(heir, f"write-behind {self.writer.name!r}, in a forked process")

    def _stand_before_writer(self) -> None:
        if self._heir is not None:
            self._enlist_heir()  # of two, the last registered is closed first

    # Coming back

    def fetch(self, key: Any) -> Any:
        """Bring *key* back into the registry; its value, or `MISSING`. Counts nothing."""
        registry = self._registry()
        while registry is not None:
            if self.remote and self._surely_absent(key):
                break
            self._refuse_to_block(key)
            own = Loading(key, registry._name)
            value: Any = _AGAIN
            try:
                try:
                    loading = self._board(registry, key, own)
                    if loading is own:
                        value = self._fetch(registry, key, own)
                finally:
                    self._land(registry, key, own)
            except BaseException:
                self._land(registry, key, own)  # a signal handler may have raised at the entry of the first call
                raise
            if loading is not own:
                value = dict.get(registry, key, MISSING)
                if value is not MISSING:
                    return value
                if loading.absent:
                    break
                continue
            if value is not _AGAIN:
                return value
        return MISSING

    def _board(self, registry: Registry[Any, Any], key: Any, own: Loading) -> Loading:
        """Begin to load *key* with *own*, or wait until another load of it has ended; returns which load it was."""
        with registry._lock:
            loading = self._loading.get(key)
            if loading is None:
                self._loading[key] = own
                return own
            if loading.done is None:
                loading.done = threading.Event()
        with Wait(loading, sync=True):
            loading.done.wait()
        return loading

    def _land(self, registry: Registry[Any, Any], key: Any, loading: Loading) -> None:
        with registry._lock:
            if self._loading.get(key) is loading:
                del self._loading[key]
        if loading.done is not None:  # nobody can come any more
            loading.done.set()

    def _fetch(self, registry: Registry[Any, Any], key: Any, loading: Loading) -> Any:
        if self._sunken:
            self._forget_sunken()  # first: what is loaded now is tracked anew
        record = self._load(key)
        ago = 0.0 if record is None else self._age(record)
        if record is None or ago is None:
            with registry._lock:
                if loading.stale:
                    return _AGAIN
                self._note_absent(key)
                loading.absent = True
                return MISSING
        loading.head = record.head
        value = record.value if registry._limits.values is None else registry._converted(record.value)
        if isinstance(value, list):
            value = _as_history(value)
            spans = record.head.spans if record.head.kind == "log" else ()
            journal = Journal(self.writer, key, numbers=spans, expire_at=partial(self._end_of, key))
            if self.read_only:
                journal.only_read(value, lambda: self._only_looking(_shown(key)))
            attach(value, journal)
        elif type(value) not in _PLAIN:
            loading.digest = hash(self._encode(value, key))
        found = registry._put(key, value, keep=True, back=True, loading=loading, ago=ago)
        if found is not value:
            _silence(value)
            return _AGAIN if found is MISSING else found
        self.loads += 1
        # Its bounds may have changed since it was saved. Told only now that it is in: or a late load would be told
        # over what was written or removed meanwhile. If there is no room, then with the next change.
        with contextlib.suppress(StoreError):
            self.settle(key, value)
        return value

    def _age(self, record: Record) -> float | None:
        """Seconds since it was written, as far as that matters; ``None``: its time is over."""
        registry, head = self._registry(), record.head
        ttl = None if registry is None else registry._limits.ttl
        if ttl is None or not head.version:
            return 0.0
        ago = time.time() - (head.saved_at if head.expire_at is None else head.expire_at - ttl)
        return ago if ago < ttl else None

    def _load(self, key: Any) -> Record | None:
        try:
            return self.writer._load(key, track=True)
        except (VersionConflict, OwnershipLost):
            # Said once, to the first who asks; who asks again gets what is in the store.
            self.writer.discard(key)
            raise

    def peek(self, key: Any) -> Any:
        """A copy of what is stored of *key*, or `MISSING`."""
        self._refuse_to_block(key)
        record = self.writer.load(key)
        return MISSING if record is None or self._age(record) is None else record.value

    def contains(self, key: Any) -> bool:
        """Whether *key* is stored, or will be."""
        if self._surely_absent(key):
            return False
        self._refuse_to_block(key)
        registry = self._registry()
        for _ in range(_TRIES if registry is not None else 0):
            writes = self._writes
            if self.writer.contains(key):
                ttl = None if registry is None else registry._limits.ttl
                return ttl is None or self.peek(key) is not MISSING  # it may have been saved under another ttl
            with registry._lock:  # type: ignore[union-attr] # there is one
                if writes == self._writes:
                    self._note_absent(key)
                    break
        return False

    def _surely_absent(self, key: Any) -> bool:
        """Whether *key* is leased from all other processes, and not there."""
        if self.tenures is None or key not in self._absent or not self.tenures.has(key):
            return False
        # Known to be absent, and not only to have been deleted by us, in vain, when somebody else had changed it.
        return self.writer._heads.get(key, _UNKNOWN) is None and key not in self.writer

    def fetch_if_missing(self, key: Any) -> None:
        """Have *key* in memory, if it is stored."""
        registry = self._registry()
        if registry is not None and not dict.__contains__(registry, key) and registry._revive(key) is MISSING:
            self.fetch(key)

    def refresh(self, keys: Sequence[Any] | None) -> None:
        """Let go of those of *keys* (``None``: all) in memory whose version in the store is another one by now."""
        registry, writer = self._registry(), self.writer
        if registry is None or self.closed:
            return
        known = {}
        with writer._lock:
            for key in list(writer._heads) if keys is None else keys:
                head = writer._heads.get(key, _UNKNOWN)
                if head is not _UNKNOWN and key not in writer:
                    known[key] = 0 if head is None else getattr(head, "version", None)
        saves = writer._saves
        store: Any = self.store
        found = dict(zip(known, store.versions(self.space, list(known)), strict=True)) if known else {}
        for key, version in found.items():
            if version == known[key] or known[key] is None:
                continue
            if version < known[key] and (version or saves != writer._saves):
                continue  # this process has saved it meanwhile
            stale = StoreError(f"version {known[key]} was in memory, and another process has saved version {version}")
            gone: list[Any] = []
            with registry._lock:
                head = writer._heads.get(key)
                if key in writer or (0 if head is None else getattr(head, "version", None)) != known[key]:
                    continue
                # While it is tracked: what is changed in it until it is out of date is a conflict, and is not saved
                # over what the other one has saved. In one step, or what somebody loads anew would be dropped.
                registry._let_stale_go(key, stale, gone)
                writer.untrack(key)
                self._absent.pop(key, None)
                if (loading := self._loading.get(key)) is not None:
                    loading.stale = True
            registry._tell(gone)

    def _check_open(self) -> None:
        if self.closed:
            raise StoreError(
                f"Registry {self.space!r} was closed, and nothing would save a change of it. "
                f"Use it before close(), or open a new one on {self._where()}"
            )

    def check_writable(self, key: Any) -> None:
        """Raise if no change of *key* would be saved: the registry is closed, or its store is only read."""
        self._check_open()
        if self.read_only:
            raise self._only_looking(_shown(key))

    def _only_looking(self, what: str) -> StoreError:
        return StoreError(
            f"Cannot change {what} of registry {self.space!r}: its store {self._where()} was opened with "
            f"read_only=True. Nothing was changed. Open the store without read_only= to write"
        )

    def _refuse_to_block(self, key: Any) -> None:
        self._check_open()
        if self.remote and running_loop() is not None:
            if self.writer._knows(key) or self._surely_absent(key):
                return  # deleted a moment ago, say
            raise StoreError(
                f"{key!r} is not in memory, and reading it from {self._where()} would block the event loop. "
                f"Use `async with registry.lease({key!r})`, which loads it off the loop"
            )

    def _note_absent(self, key: Any) -> None:
        """Remember that *key* is not there: who puts it now creates it, and must not overwrite somebody else's."""
        writer, absent = self.writer, self._absent
        with writer._lock:
            if key not in writer:
                writer._heads.setdefault(key, None)
            absent[key] = None
            absent.move_to_end(key)
            if len(absent) > _KNOWN_ABSENT:
                oldest = absent.popitem(last=False)[0]
                registry = self._registry()
                if registry is None or not dict.__contains__(registry, oldest):
                    writer.untrack(oldest)

    def stored_keys(self, prefix: str | None) -> Iterator[Any]:
        """Return each key that is stored or waits to be saved, once; with *prefix*, only texts that start with it."""
        keys = self._stored_keys()
        if prefix is None:
            return keys
        return (key for key in keys if isinstance(key, str) and key.startswith(prefix))

    def _stored_keys(self) -> Iterator[Any]:
        writer = self.writer
        with writer._lock:
            unsaved = {key: writer.contains(key) for key in (*writer._saving, *writer._pending)}
        for key, there in unsaved.items():
            if there:
                yield key
        for key in self.store.keys(self.space):
            if key not in unsaved:
                yield key

    # Writing

    def prepare(self, key: Any, value: Any) -> tuple[Any, _Prepared | None]:
        """*value* as the registry is to hold it, and as the writer takes it; what cannot be stored is refused."""
        self.check_writable(key)
        try:
            return self._prepare(key, value)
        except NotStorable as error:
            raise self.explain(error) from None

    def explain(self, error: NotStorable) -> NotStorable:
        """*error*, with the name of the attribute and what to do if the registry is one of several linked ones."""
        registry = self._registry()
        if registry is None or getattr(registry, "_group", None) is None:
            return error
        label = registry._label()
        name = label.rpartition(".")[2]
        return NotStorable(
            f"Attribute {label!r} cannot be stored: {error}. The store of a decorator is for all of its attributes. To "
            f'keep this one in memory only, give it a decorator of its own without store=: @bounded_registry("{name}")'
        )

    def _prepare(self, key: Any, value: Any) -> tuple[Any, _Prepared | None]:
        critical = self.writer._critical
        if isinstance(value, list):
            if isinstance(value, History):
                journal = value._hygiene.journal
                if isinstance(journal, Journal) and not journal.closed:
                    if journal._writer is self.writer and journal.key == key and self.writer._is_tracked(key):
                        return value, None  # it tells its changes already
                    value = copy.copy(value)  # one list cannot be two logs
            else:
                value = _as_history(value)
            items = value._items(slice(None))
            datas = [self._encode(item, key) for item in items]
            urgent = critical is not None and any(critical(key, item) for item in items)
            return value, _Prepared(None, datas, critical=urgent)
        data = self._encode(value, key)
        return value, _Prepared(data, None, critical=critical is not None and bool(critical(key, value)))

    def has_changed(self, key: Any, value: Any, prepared: _Prepared | None, *, keep: bool) -> bool:
        """
        Whether what was true when *key* was looked up and *value* prepared is not so any more. The lock is held.

        An entry that another thread has put, and that was evicted since, is in the store: to put another one in its
        place because it was not there a moment ago would lose it.
        """
        if prepared is None and (not _tells(value) or not self.writer._is_tracked(key)):
            return True
        return keep and key not in self._absent

    def entered(
        self, key: Any, value: Any, old: Any, prepared: _Prepared | None, loading: Loading | None = None
    ) -> Any:
        """
        *value* is about to be put in the place of *old*; the registry's lock is held.

        Raises what the writer raises, and then nothing was changed. Returns what `settle_write` takes.
        """
        self._check_open()  # it may have been closed since the value was prepared, or loaded
        waiter = None
        if loading is not None:
            self._absent.pop(key, None)
            if loading.digest is not None:
                self._hashes[key] = loading.digest
        if self._hints is not None:
            head = self.writer.tracked(key)
            self._hints.add(key, None if head is None else head.version)
        adrift = self._adrift.get(key)
        evicted = None if adrift is None else adrift()
        others = [other for other in (old, evicted) if other is not value and other is not None]
        with self.writer._lock:  # one step: what is appended to another one meanwhile must not be told over this one
            if prepared is not None:
                waiter = self._write(key, value, prepared)
            for other in others:
                _hush(other)
            # In the same step, since a collection may end an evicted value, and its version with it, at any moment.
            self._adrift.pop(key, None)
            if loading is not None and loading.head is not None:
                self.writer._keep_head(key, loading.head)
        if prepared is not None and prepared.data is None:
            self._keep_log(key, value, prepared.items or ())
        for other in others:
            _silence(other)
        return waiter

    def _keep_log(self, key: Any, history: History[Any], datas: Sequence[bytes]) -> None:
        numbers = ((0, len(datas)),) if datas else ()
        encoded = history._items(slice(None)), datas
        attach(
            history,
            Journal(self.writer, key, numbers=numbers, encoded=encoded, expire_at=partial(self._end_of, key)),
        )

    def _write(self, key: Any, value: Any, prepared: _Prepared, *, anew: bool = True) -> Any:
        """Tell the writer; *anew*: it is written, and not only found to have been changed in place."""
        writer = self.writer
        if prepared.data is not None:
            part = _Part("value", prepared.data)
        else:
            part = _Part("log", items=list(prepared.items or ()), replace=True)
        with writer._lock:
            self._give_up_unsavable(key)
            writer._track_blindly(key)
            waiter = writer._become(key, part, self._end_of(key, anew=anew), critical=prepared.critical)
        self._writes += 1
        self._absent.pop(key, None)
        self._expiring.discard(key)
        if prepared.data is not None and type(value) not in _PLAIN:
            self._hashes[key] = hash(prepared.data)
        else:
            self._hashes.pop(key, None)  # of a value before this one: it would seem to have changed, at every look
        if (loading := self._loading.get(key)) is not None:
            loading.stale = True
        return waiter

    def _give_up_unsavable(self, key: Any) -> None:
        """Forget what the store will not take (too large, say): something else takes its place."""
        writer = self.writer
        found = writer._rejected.get(key)
        if found is None or isinstance(found[0].error, (VersionConflict, OwnershipLost)):
            return
        head = writer._heads.get(key, _UNKNOWN)
        writer.discard(key)
        if head is not _UNKNOWN:
            writer._heads[key] = head  # what is in the store is what it was

    def lost(self, key: Any, error: StoreError) -> None:
        """Somebody else's save was faster, and whoever wrote has been told: the next look-up gets what is stored."""
        if key not in self.writer._rejected:
            return  # somebody else was told before, and what is in memory by now may be what is stored
        if (registry := self._registry()) is not None:
            registry._drop_stale(key, error)  # first: what nobody tracks would be saved over anything
        self.writer.discard(key)

    def told(self, error: Exception) -> None:
        """Whoever asked for a save has been told of *error*: the next look-ups of what conflicts raise nothing more."""
        if isinstance(error, VersionConflict):
            for space, key, *_ in error.conflicts:
                # Still rejected: else somebody was told before, and what is in memory by now may be what is stored.
                if space == self.space and key in self.writer._rejected:
                    self.lost(key, error)

    def settle_write(self, value: Any, waiter: Any) -> None:
        """What is left to do for a write when the registry's lock is free: wait for a critical one."""
        if isinstance(value, History) and isinstance(journal := value._hygiene.journal, Journal):
            journal.check(value)  # another thread may have appended before it was watched
        try:
            self.writer._wait(waiter)
        except VersionConflict as error:
            self.told(error)
            raise

    def changed(self, key: Any, value: Any) -> None:
        """Save *value* anew: it was changed in place."""
        if isinstance(value, History) and isinstance(journal := value._hygiene.journal, Journal):
            journal.rewrite(value)
        else:
            self._save_if(key, value, always=True)

    def settle(self, key: Any, value: Any) -> None:
        """Find what was changed in place, if that is to be found."""
        if isinstance(value, History):
            if isinstance(journal := value._hygiene.journal, Journal):
                try:
                    journal.check(value)
                    journal.find_edits(value)
                    value._rest()
                except StoreError as error:
                    if self.read_only and (registry := self._registry()) is not None:
                        registry._drop_stale(key, error)  # as in `_save_if`
                    raise
        elif key in self._hashes:
            self._save_if(key, value)

    def _save_if(self, key: Any, value: Any, *, always: bool = False, late: bool = False) -> None:
        """Save *value* if it was changed in place; *late*: though it is not in memory any more."""
        registry = self._registry()
        try:
            data = self._encode(value, key)
        except NotStorable as error:
            raise self.explain(error) from None
        if registry is None or (not always and hash(data) == self._hashes.get(key)):
            return
        if self._finished:
            raise self._refuse_change(key)
        if self.read_only:  # what is in memory can never be saved, and the next look-up gets what is stored
            refusal = self._only_looking(_shown(key))
            registry._drop_stale(key, refusal)
            raise refusal
        critical = self.writer._critical
        prepared = _Prepared(data, None, critical=critical is not None and bool(critical(key, value)))
        try:
            with registry._lock:
                held = dict.get(registry, key, MISSING) is value or registry._in_tail(key, MISSING) is value
                if not held and not late:
                    return
                waiter = self._write(key, value, prepared, anew=False)
        except (VersionConflict, OwnershipLost) as error:
            self.lost(key, error)
            raise
        self.writer._wait(waiter)

    def _end_of(self, key: Any, *, anew: bool = False) -> float | None:
        """When *key* is over by the clock on the wall, in seconds since 1970."""
        registry = self._registry()
        if registry is None:
            # Another registry may have the space by now, with another list under this key.
            raise StoreError(
                f"Cannot change {_shown(key)} of registry {self.space!r}: the registry was collected, and nothing "
                f"would save the change. Keep the registry for as long as its values are in use"
            )
        if registry._limits.ttl is None:
            return None
        if key in self._ends and not anew:
            return self._ends[key]
        return time.time() + registry._limits.ttl - (0.0 if anew else registry._written_ago(key))

    # Leaving

    def may_leave(self, key: Any, value: Any) -> bool | None:
        """
        Whether nothing of *key* is unsaved; no lock is held.

        ``None``: not yet, but it is being saved, and the registry will be told.
        """
        writer = self.writer
        if self.closed:
            return False  # what is left is about to leave
        try:
            self.settle(key, value)
        except HygieneError as error:
            self._tell_blocked(key, error)
            return False
        if key not in writer:
            return True
        if self._may_wait() and not writer._outage and key not in writer._rejected:
            try:
                writer.flush()
            except HygieneError as error:
                if key in writer:  # if not, it is another entry that cannot be saved
                    self._tell_blocked(key, error)
                    self._awaited = True  # nobody may write again before it can be saved
            return key not in writer
        # Whoever saves it has the registry look again. Said before it is asked for, and looked at afterwards, or the
        # save might end in between.
        self._awaited = True
        if writer._outage or key in writer._rejected:
            return False
        writer._soon()
        return True if key not in writer else None

    def _tell_blocked(self, key: Any, error: HygieneError) -> None:
        if self.read_only:
            logger.warning(
                "%s was changed in place and leaves memory, so the change is lost: %s",
                _shown(key),
                error,
                extra={"event_name": "registry.entry_not_saved", "saver": self.writer.name, "of": self},
            )
        elif key not in self._blocked:
            self._blocked.add(key)
            logger.warning(
                "%s cannot be saved, so it stays in memory: %s",
                _shown(key),
                error,
                extra={"event_name": "registry.entry_not_saved", "saver": self.writer.name, "of": self},
            )

    def _may_wait(self) -> bool:
        thread = threading.current_thread()
        return running_loop() is None and thread is not janitor._thread and thread is not self.writer._thread

    def left(self, key: Any, value: Any, cause: Cause, *, adrift: Kept | None) -> None:
        """The entry is out of memory; *adrift* has its value if it may come back. The registry's lock is held."""
        if (loading := self._loading.get(key)) is not None:
            loading.stale = True
        if cause is Cause.CLOSED:
            return  # what is left to do with the value is done in `_finish`
        self._blocked.discard(key)
        if self._hints is not None and adrift is None:
            self._hints.discard(key)
        if self._sunken:
            self._forget_sunken()
        if adrift is not None:
            if adrift.strong:  # the registry has it looked at
                self._adrift[key] = adrift
            else:
                reference: weakref.ref[Keeper] = weakref.ref(self)
                self._adrift[key] = weakref.ref(value, lambda gone: _sunk(reference, key, gone))
            return
        self.unlist(key)
        _silence(value)
        if cause is Cause.EXPIRED and not self.read_only:
            with contextlib.suppress(StoreError):  # then it is over by the clock of the store
                self._expiring.add(key)
                self.writer.delete(key)
            self._note_absent(key)
        elif cause in _DROPPED:
            self._note_absent(key)
        elif cause is not Cause.REPLACED:
            self.writer.untrack(key)

    def unlist(self, key: Any) -> None:
        """No changes of *key* are looked for any more. The registry's lock is held."""
        self._adrift.pop(key, None)
        self._hashes.pop(key, None)

    def settle_aside(self, key: Any, kept: Kept) -> bool:
        """Find what was changed in an evicted value, if that is to be found; ``False``: it cannot be saved."""
        value = kept()
        if value is None or self.closed:
            return True
        try:
            self.settle(key, value)
        except HygieneError as error:
            self._tell_blocked(key, error)
            return False
        return True

    def forget_aside(self, key: Any, kept: Kept, error: StoreError | None = None) -> None:
        """
        Track an evicted value no longer; the registry's lock is held.

        With *error* it is still referenced, and whoever holds it would change it in vain: a history refuses to be.
        """
        value = kept()
        adrift = self._adrift.get(key)
        if value is None or adrift is None or adrift() is not value:
            return
        with self.writer._lock:
            del self._adrift[key]
            self._hashes.pop(key, None)
            self.writer.untrack(key)
        if error is not None:
            outdate(key, value, error)
        if self._hints is not None:
            self._hints.discard(key)

    def _forget_sunken(self) -> None:
        """What was evicted and is not held by anybody any more need not be tracked."""
        while self._sunken:
            try:
                key, gone = self._sunken.popleft()
            except IndexError:  # another thread was faster
                return
            with self.writer._lock:
                if self._adrift.get(key) is not gone:
                    continue
                del self._adrift[key]
                self._hashes.pop(key, None)
                self.writer.untrack(key)
            if self._hints is not None:
                self._hints.discard(key)

    def delete(self, key: Any) -> None:
        """Remove *key* from the store; the registry's lock is held, and the entry is still in memory, if it was."""
        self.check_writable(key)
        registry, adrift = self._registry(), self._adrift.get(key)
        values = None if registry is None else dict.get(registry, key), None if adrift is None else adrift()
        with self.writer._lock:  # one step, as in `entered`
            self._give_up_unsavable(key)
            self.writer._track_blindly(key)
            self.writer.delete(key)
            for value in values:
                _hush(value)
            self._adrift.pop(key, None)
        for value in values:
            _silence(value)
        if (loading := self._loading.get(key)) is not None:
            loading.stale = True

    def take(self, key: Any) -> Any:
        """Remove *key*, which is not in memory, from the store and return its value; `MISSING` if it is not there."""
        registry = self._registry()
        self._refuse_to_block(key)
        while registry is not None:
            own = Loading(key, registry._name)
            value = _AGAIN
            try:
                try:
                    loading = self._board(registry, key, own)
                    mine = loading is own
                    value = self._take(registry, key, own) if mine else MISSING if loading.absent else _AGAIN
                finally:
                    self._land(registry, key, own)
            except BaseException:
                self._land(registry, key, own)  # as in `fetch`
                raise
            if value is not _AGAIN:
                return value
            if dict.__contains__(registry, key):
                return registry._remove(key)
        return MISSING

    def _take(self, registry: Registry[Any, Any], key: Any, loading: Loading) -> Any:
        record = self._load(key)
        with registry._lock:
            # If it is stale, it may even have been put, appended to, saved and evicted since it was loaded.
            if loading.stale or dict.__contains__(registry, key):
                return _AGAIN
            if record is None or self._age(record) is None:
                self._note_absent(key)
                loading.absent = True
                return MISSING
            self.delete(key)
            self._note_absent(key)
        return record.value if registry._limits.values is None else registry._converted(record.value)

    # What the writer tells, in its own thread

    def _saved(self) -> None:
        registry = self._registry()
        self._forget_sunken()
        if self._expiring:
            for key in [key for key in list(self._expiring) if key not in self.writer]:
                self._expiring.discard(key)
        awaited, self._awaited = self._awaited, False
        if not awaited or self.closed or registry is None or not registry._waits_for_saves():
            return
        if getattr(registry._limits.timer, "manual", False):
            registry._sweep_saved()
        else:
            janitor.watch(self, 0.0)  # hooks run there, and not where the others wait to be saved

    def _visit(self) -> None:
        """Evict what is saved by now. Called by the janitor."""
        if (registry := self._registry()) is not None:
            registry._sweep_saved()

    def _refused(self, one: Rejected) -> None:
        key, writer, registry = one.key, self.writer, self._registry()
        if key in self._expiring:
            self._expiring.discard(key)  # somebody else has written it meanwhile: then it is not over
            self.writer.discard(key)
            return
        if key in writer._rejected:
            stale = isinstance(one.error, (VersionConflict, OwnershipLost))
        else:  # somebody has taken it (*on_conflict*, say); what he has put in its place, if anything, is tracked
            stale = not writer._is_tracked(key)
        if stale and registry is not None:
            registry._drop_stale(key, cast("StoreError", one.error))

    # The end

    def settle_all(self) -> HygieneError | None:
        """Find what was changed in place, in all of the registry; the first error of one that cannot be saved."""
        registry = self._registry()
        first = None
        found = [] if registry is None else list(dict.items(registry))
        # Also of values that were evicted and are still held: a log goes on telling.
        found += [(key, value) for key, reference in list(self._adrift.items()) if (value := reference()) is not None]
        for key, value in found:
            try:
                self.settle(key, value)
            except HygieneError as error:
                first = first or error
        return first

    def clear(self, gone: list[Any]) -> None:
        """
        Empty the store and the registry; what has left goes to *gone*, as in `Registry._discard`.

        If the store fails on the way, what it has deleted has left the registry, too, and the rest is as it was.
        """
        self._refuse_to_block("everything")
        self._check_open()
        if self.read_only:
            raise self._only_looking("the entries")
        registry, writer = self._registry(), self.writer
        assert registry is not None
        deleted: set[Any] = set()
        with writer._drive, registry._lock:
            try:
                writer._clear_store(deleted.update)
                with writer._lock:
                    deleted.update(writer._heads, writer._saving, writer._pending, writer._rejected)
                deleted.update(dict.keys(registry), self._adrift)
            finally:
                for key in deleted:
                    if (loading := self._loading.get(key)) is not None:
                        loading.stale = True
                    if (adrift := self._adrift.pop(key, None)) is not None:
                        _silence(adrift())
                    if registry._tail is not None:
                        registry._tail.discard(key)
                    # Before what is pending is forgotten: who holds the list may be appending to it at this moment.
                    _silence(dict.get(registry, key))
                writer._void(deleted)
                for key in [key for key in list(dict.keys(registry)) if key in deleted]:
                    registry._discard(key, Cause.CLEARED, gone)
                writer._answer({}, None)

    def hand_over(self) -> None:
        """Somebody else keeps the space from now on: save, and leave the registry what it has, as its own."""
        if (registry := self._registry()) is not None:
            with registry._lock:
                leased = [(key, value) for key, value in dict.items(registry) if registry._is_leased(key)]
            self._overtake(registry, leased, "replaced by another one in its attribute")
        if (error := self.settle_all()) is not None:
            if registry is not None:
                registry._overtaken = None
            raise error  # at the assignment: nobody else would hear of it, and the attribute stays as it is
        self._step_aside()
        self._give_back()

    def hand_back(self) -> None:
        """
        The assignment that this was made for has failed: the registry that had the space before keeps it again.

        Its entries in memory are saved anew, over what the assignment has put in their places.
        """
        self._step_aside()
        previous = self._predecessor()
        try:
            if previous is None or previous._keeper is not None:
                return
            previous._begin_keeping()
            previous._overtaken = None
            for key, value in list(dict.items(previous)):
                try:
                    previous._put(key, value)
                except HygieneError as error:  # as after any change that cannot be saved
                    previous._drop_stale(key, StoreError(str(error)))
        finally:
            self._give_back()

    def _step_aside(self) -> None:
        self._gives_way = True
        if isinstance(self.tenures, FileTenures):
            self.tenures.drop_kept()  # or the next one would wait for them
        self._let_go()
        self._abandon.detach()
        if (registry := self._registry()) is not None:
            registry._keeper = None

    def _let_go(self) -> None:
        """Leave the registry what it has, which is nobody's business any more."""
        registry = self._registry()
        self.closed = self._finished = True
        if self._hints is not None:
            self._hints.close()
        if registry is None:
            return
        with registry._lock:
            for key, value in list(dict.items(registry)):
                _silence(value)
                self.writer.untrack(key)
            for reference in self._adrift.values():
                _silence(reference())
            self._adrift.clear()
            for key in self._absent:
                self.writer.untrack(key)

    def close(self, gone: list[Any]) -> HygieneError | None:
        """
        Save everything, and let go. The store is closed if it was opened here.

        Args:
            gone: What leaves memory goes here, as in `Registry._discard`.

        Returns:
            The first error of an entry that cannot be saved.
        """
        self._stop(gone)
        deadline = time.monotonic() + GRACE
        if not self._finished:
            with contextlib.suppress(StoreError):  # it is tried once more below
                self.writer._flush(GRACE)
            self._finish()
        if self._mine:
            self.writer.close(max(deadline - time.monotonic(), _LAST_LOOK))
        else:
            self.writer._flush(max(deadline - time.monotonic(), _LAST_LOOK))
        if self.tenures is not None:
            self.tenures.end()
        if self._mine:
            self._give_back()
        error, self._unsaved = self._unsaved, None  # said once
        return error

    async def aclose(self, gone: list[Any]) -> HygieneError | None:
        """As `close`; for an event loop, which goes on meanwhile."""
        self._stop(gone)
        deadline = time.monotonic() + GRACE
        if not self._finished:
            try:
                with contextlib.suppress(StoreError):
                    await self.writer._aflush(GRACE)
            finally:  # also if it is cancelled: what is found is saved in the background
                self._finish()
        if self._mine:
            await self.writer.aclose(max(deadline - time.monotonic(), _LAST_LOOK))
        else:
            await self.writer._aflush(max(deadline - time.monotonic(), _LAST_LOOK))
        if self.tenures is not None:
            await self.tenures.aend()
        if self._mine:
            self._give_back()
        error, self._unsaved = self._unsaved, None  # said once
        return error

    def _stop(self, gone: list[Any]) -> None:
        """
        From now on refuse each use of the registry, and each change of its lists.

        What was changed before is told to the writer, which goes on: changes that other threads are just making are
        told, too, or refused. Dicts that are changed in place cannot be refused, so `_finish` looks at them once more.
        """
        registry = self._registry()
        with self._stopping:
            first, self.closed = not self.closed, True
            if not first or registry is None:
                return
            if self._hints is not None:
                self._hints.close()
            self._abandon.detach()
            self._unsaved = self.settle_all()
            with registry._lock:
                self._last = list(dict.items(registry))
                adrift = [(key, reference()) for key, reference in self._adrift.items()]
                self._last += [(key, value) for key, value in adrift if value is not None]
                if registry._limits.ttl is not None:
                    self._ends = {key: self._end_of(key) for key, _ in self._last}
                for key, value in self._last:
                    if isinstance(value, History) and isinstance(journal := value._hygiene.journal, Journal):
                        journal.refuse(functools.partial(self._refuse_change, key))
                registry._take_everything(Cause.CLOSED, gone)

    def _finish(self) -> None:
        """Find what was changed in place while the rest was saved; from now on nothing is saved any more."""
        registry = self._registry()
        with self._stopping:
            if self._finished or not self.closed:
                return
            if registry is not None:
                with registry._lock:
                    leased = [(key, value) for key, value in self._last if registry._is_leased(key)]
                # Before the last look: a change that comes between is saved, and an error at the end of the lease, too.
                self._overtake(registry, leased, "closed")
            for key, value in self._last:
                try:
                    if isinstance(value, History) or key not in self._hashes:
                        self.settle(key, value)
                    else:
                        self._save_if(key, value, late=True)
                except HygieneError as error:
                    self._unsaved = self._unsaved or error
            self._finished = True
            for key, value in self._last:
                _hush(value)
                self.writer.untrack(key)
            for key in self._absent:
                self.writer.untrack(key)
            self._last, self._ends = [], {}
            self._hashes.clear()
            self._adrift.clear()

    def _overtake(self, registry: Registry[Any, Any], leased: list[tuple[Any, Any]], what: str) -> None:
        """The registry was *what* under some leases: each raises at its end if its value has changed since."""
        for key, value in leased:
            if type(value) not in _PLAIN:
                if registry._overtaken is None:
                    registry._overtaken = {}
                registry._overtaken[key] = Overtaken(key, value, self._encode, f"registry {self.space!r} was {what}")

    def _refuse_change(self, key: Any) -> StoreError:
        return StoreError(
            f"Cannot change {_shown(key)} of registry {self.space!r}: the registry is closed, and nothing would save "
            f"the change. Change it before close(), or change a copy: list(...)"
        )

    def _give_back(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            _openings.give_back(opened)


def _leases_files(store: Any) -> bool:
    """Whether *store* has leases between processes, and its `save` takes their tokens: a subclass may replace it."""
    if not isinstance(store, SQLiteStore) or store.owners is None:
        return False
    parameters = inspect.signature(store.save).parameters.values()
    return any(parameter.name == "fence" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _nobody() -> None:
    return None


class Overtaken:
    """A value that was leased when its registry was closed."""

    __slots__ = ("_digest", "_encode", "_key", "_value", "_why")

    def __init__(self, key: Any, value: Any, encode: Callable[[Any, Any], bytes], why: str) -> None:
        self._key = key
        self._value = value
        self._encode = encode
        self._why = why
        self._digest = self._measure()

    def _measure(self) -> int | None:
        value = self._value
        try:
            return hash(self._encode(value[:] if isinstance(value, list) else value, self._key))
        except Exception:  # it cannot be saved, which was said when it was to be
            return None

    def check(self) -> None:
        """
        Raise if the value has changed since.

        Raises:
            StoreError: it has, and the change is not saved.
        """
        if self._digest is not None and self._measure() != self._digest:
            raise StoreError(
                f"The value of {_shown(self._key)} was changed in its lease after {self._why}, and that change is not "
                f"saved. End each lease before"
            )


def _abandoned(writer: WriteBehind, opened: _Opened | None, *, mine: bool) -> None:
    """A registry was collected without having been closed. Called by the collector, anywhere."""
    if mine and not writer.closed:
        aside(lambda: _wind_up(writer, opened), f"close-{writer.name}")


def _wind_up(writer: WriteBehind, opened: _Opened | None) -> None:
    with _adopting:
        keeper: Any = writer._keeper()
        adopted = keeper is not None and keeper._registry() is not None
        if not adopted:
            writer._closing = writer._refusing = True
    with contextlib.suppress(StoreError):
        if not adopted:
            writer.close(GRACE)
        if opened is not None:
            _openings.give_back(opened)


def _hinted(reference: weakref.ref[Keeper], keys: Sequence[Any] | None) -> None:
    """Other processes may have saved *keys*; ``None``: any. Called in the store's thread."""
    pause = _FIRST_RETRY
    while (keeper := reference()) is not None:
        try:
            keeper.refresh(keys)
        except StoreUnavailable:
            # Not to be missed: it may be the last that is said of a key. Nobody else waits in this thread, and what is
            # told meanwhile stays in the connection.
            del keeper
            time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            pause = min(2 * pause, _LAST_RETRY)
        except StoreError:
            if not keeper.closed and not getattr(keeper.store, "closed", False):
                raise
            return
        else:
            return


def _sunk(reference: weakref.ref[Keeper], key: Any, gone: weakref.ref[Any]) -> None:
    """Nobody holds the evicted value any more. Called by the collector, anywhere."""
    keeper = reference()
    if keeper is not None:
        keeper._sunken.append((key, gone))  # no lock may be taken here: whose it is may hold another one


def _hush(value: Any) -> None:
    """As `_silence`, where no lock may be waited for: it tells nothing any more."""
    if _tells(value):
        value._hygiene.journal.close()


def _silence(value: Any) -> None:
    """From now on the changes of *value* are nobody's business: it is the caller's, or gone."""
    if isinstance(value, History):
        journal = value._hygiene.journal
        if isinstance(journal, Journal):
            journal.close()
            detach(value)


def _tells(value: Any) -> bool:
    """Whether *value* is a history that tells its changes."""
    if not isinstance(value, History):
        return False
    journal = value._hygiene.journal
    return isinstance(journal, Journal) and not journal.closed


class _Outdated:
    """In the place of the journal of a history that somebody else's save has overtaken: refuses every change."""

    def __init__(self, key: Any, error: StoreError) -> None:
        self._message = f"this copy of {key!r} is out of date, and cannot be changed: {error}. Look it up again"

    def _refuse(self, *_: Any) -> Any:
        raise VersionConflict(self._message)

    encode = prepare = grown = spliced = becomes = trimmed = settle = _refuse

    def doubt(self) -> None: ...


def outdate(key: Any, value: Any, error: StoreError) -> None:
    """Refuse each further change of *value*, which whoever holds it would make in vain."""
    _silence(value)
    if isinstance(value, History):
        attach(value, cast("Any", _Outdated(key, error)))


def _as_history(value: list[Any]) -> History[Any]:
    if isinstance(value, History):
        return value
    return History(value) if type(value) is list else history_type(type(value))(value)
