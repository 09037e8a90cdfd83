"""A list that trims itself: a sliding window over a conversation.

Theory of operation
===================

**Storage.** A `History` is a list by construction, and its own storage holds the items: C code that reads a
list directly (``json``, ``orjson``, ``msgspec``) sees the truth. Everything else it needs hangs on one
attribute (`_Window`), so that a user's subclass of list with attributes and slots of its own can be combined
with it.

**Weights.** Items do not say when they grow, and counting tokens is slow: each item is weighed once, before
it is put in and outside the lock, and its weight kept at the same index of a list beside (`_Scale`). Every
method that changes the items is applied to the weights with the same index or slice; a C function that writes
past the methods (``heapq``) shows in the lengths, and everything is weighed again.

**Concurrency.** Under the GIL growing at the end is one atomic step and cannot disturb a trim at the front,
so with *maxlen* alone ``append`` and ``extend`` take no lock. Who then finds the list too long takes the lock
only if it is free and trims; if it is taken, its holder looks again after letting go ("who holds the broom
sweeps"). So the bound holds at rest and may be exceeded for a moment by as many items as threads are
appending. All other changes, and all with weights, take the lock. It is reentrant because a garbage
collection may run a finalizer, which may use this list, between any two lines.

**Telling.** What fell out is collected in `_Window.untold` under the lock and told after it is released, by
one thread at a time, oldest first, each item once. What falls out because the hook itself wrote to the list
is told with the next trim: told at once, a hook that appends one item per call would never end. The same goes
for what a summary pushes out.

**Journal.** Who keeps a history in a store attaches a journal, which is told of each change under the lock and before
the change: it may refuse, and then nothing has changed. So what may fail is tried before it is told, on a copy if need
be. What comes in is encoded before the lock is taken, and what has to be on disk is waited for after it is released.
With a journal every change takes the lock: the order of the log is that of the list. A trim that is refused is not
made; the list stays too long until the next change, whose writer hears nothing of it.

**Compact.** Where a compact history, which keeps old items compressed, has to do something else there is a method to
override, which here does nothing or the obvious; no fast path calls one. Its theory is in `hygiene.compact`.

**Summary.** It stands behind the kept first items and is recognised by identity. It stays there until the
next one takes its place in one step, so that a reader never finds a conversation without it and a failing
summarizer does not lose it. If no summary comes of the trimmed items, they are put back (`_put_back_untold`), and the
sweep ends there: the next change trims, and summarizes, them again. A history that grows beyond `_CAP` windows that
way gives up the oldest items.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import os
import re
import sys
import threading
import types
import weakref
from dataclasses import dataclass, fields, replace
from itertools import islice
from opcode import opmap
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, SupportsIndex, TypeVar, overload

from hygiene.errors import HygieneError
from hygiene.janitor import survive_fork
from hygiene.logs import logger
from hygiene.names import suggests
from hygiene.sizing import sizeof
from hygiene.units import Size, nbytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

__all__ = ["History", "attach", "detach", "history_type"]

T = TypeVar("T")
R = TypeVar("R")

_ABSENT: Final = object()
# Items of an iterator taken at a time: an endless one cannot fill memory, and a hook is not called for each
# item.
_CHUNK = 1024
# Windows that a history may fill while its summaries fail. Some failures in a row are an outage of minutes; a
# conversation that nothing summarizes for longer would outgrow the memory and the model.
_CAP: Final = 4
_HOOKS = ("count_tokens", "getsizeof", "on_trim", "summarize")
_ALL: Final = slice(None)
_append = list.append
_pop = list.pop


@dataclass(frozen=True, slots=True)
class _Limits:
    """The keywords of a `History`, checked."""

    maxlen: int | None = None
    max_tokens: int | None = None
    count_tokens: Callable[[Any], float] | None = None
    max_bytes: Size | None = None
    keep_first: int = 0
    on_trim: Callable[[list[Any]], object] | None = None
    summarize: Callable[[list[Any]], Any] | None = None
    getsizeof: Callable[[Any], float] | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        if not isinstance(self.compact, bool):
            raise TypeError(f"compact must be True or False; found {self.compact!r}")
        self._check_hooks()
        if self.max_bytes is not None:
            object.__setattr__(self, "max_bytes", nbytes(self.max_bytes, "max_bytes"))
        # Beside the kept items there must be room for the newest, and for a summary if there is one.
        needed = self.keep_first + (1 if self.summarize is None else 2)
        if self.maxlen is not None and self.maxlen < needed:
            beside = "one more item" if self.summarize is None else "a summary and one more item"
            raise ValueError(
                f"maxlen must leave room for the keep_first={self.keep_first} kept items and {beside}, so be "
                f"at least {needed}; found {self.maxlen}"
            )

    def _check_numbers(self) -> None:
        for name, lowest in {"maxlen": 1, "max_tokens": 1, "keep_first": 0}.items():
            value = getattr(self, name)
            if value is None and name != "keep_first":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be a whole number; found {value!r}")
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}; found {value}. Leave it out if unwanted")

    def _check_hooks(self) -> None:
        for name in _HOOKS:
            hook = getattr(self, name)
            if hook is None:
                continue
            if not callable(hook):
                raise TypeError(f"{name} must be a function; found {hook!r}")
            if inspect.iscoroutinefunction(hook):
                raise TypeError(
                    f"{name} must be an ordinary function; found {hook!r}, which is async, and nothing would "
                    f"await it. Give a function that hands the work to a task of yours"
                )
        if (self.max_tokens is None) is not (self.count_tokens is None):
            raise ValueError(
                f"max_tokens and count_tokens go together: how many tokens to keep, and a function that counts "
                f"one item's; found max_tokens={self.max_tokens!r}, count_tokens={self.count_tokens!r}"
            )
        if self.getsizeof is not None and self.max_bytes is None:
            raise ValueError("getsizeof measures for max_bytes; found no max_bytes. Give both or none")

    def portable(self) -> _Limits:
        """What pickle can take along: functions that it can name, and limits that need no other."""
        gone = {name for name in _HOOKS if not _nameable(getattr(self, name))}
        if "count_tokens" in gone:
            gone.add("max_tokens")
        if "getsizeof" in gone:
            gone.add("max_bytes")
        nothing: dict[str, Any] = dict.fromkeys(gone)
        return replace(self, **nothing)

    def following(self, memo: dict[int, Any]) -> _Limits:
        """For a deep copy: a hook that is a method of something copied along becomes the copy's."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            hook = getattr(self, field.name)
            if isinstance(hook, types.MethodType) and id(hook.__self__) in memo:
                moved[field.name] = types.MethodType(hook.__func__, memo[id(hook.__self__)])
        return replace(self, **moved)


# The thousands of histories of one registry share one. Limits with hooks are not kept: that would keep alive whatever
# the hooks belong to.
@functools.lru_cache(maxsize=64, typed=True)
def _numbers(
    maxlen: int | None,
    max_tokens: int | None,
    max_bytes: Size | None,
    keep_first: int,
    compact: bool,  # noqa: FBT001 - as the others
) -> _Limits:
    return _Limits(maxlen=maxlen, max_tokens=max_tokens, max_bytes=max_bytes, keep_first=keep_first, compact=compact)


_NO_LIMITS = _Limits()
_KEYWORDS = frozenset(field.name for field in fields(_Limits))


def _nameable(hook: Any) -> bool:
    if hook is None:
        return True
    found: Any = sys.modules.get(getattr(hook, "__module__", None) or "")
    for part in getattr(hook, "__qualname__", "?").split("."):
        found = getattr(found, part, None)
    return found is hook


class _Scale:
    """One weight limit with each item's weight, at the item's index."""

    __slots__ = ("limit", "measure", "total", "weights", "what")

    def __init__(self, what: str, limit: int, measure: Callable[[Any], float]) -> None:
        self.what = what
        self.limit = limit
        self.measure = measure
        self.weights: list[int] = []
        self.total = 0


class _Journal(Protocol):
    """
    What is told of each change, under the lock and before it is made; what it raises prevents the change.

    `hygiene.journal.Journal` is the one there is.
    """

    key: Any
    encode: Callable[[Any, Any], bytes] | None
    """What makes one item and the key that which `added` takes; ``None``: it has to be prepared."""

    def added(self, history: list[Any], data: bytes, item: Any, /) -> bool:
        """One item comes at the end; false if that has to be told as `grown`."""
        ...

    def prepare(self, items: Sequence[Any], /) -> Any:
        """Make of *items*, which come in, what is needed to tell it; without the lock."""

    def grown(self, history: list[Any], prepared: Any, /) -> Any:
        """Items come at the end; returns what to `settle`."""

    def spliced(self, history: list[Any], start: int, stop: int, prepared: Any, /) -> Any:
        """Items come in the place of those from index *start* to before *stop*; returns what to `settle`."""

    def becomes(self, history: list[Any], after: list[Any], prepared: Any, /) -> Any:
        """Anything else; returns what to `settle`."""

    def trimmed(self, history: list[Any], cut: slice, /) -> None:
        """The window moves on."""

    def doubt(self) -> None:
        """A change may have been told and not made, or half: the whole list is told with the next change."""

    def settle(self, waiter: Any, /) -> None:
        """Wait, without the lock, for what a change has returned, if it is not ``None``."""


class _Window:
    """All that a `History` is beside its items. Changed under its lock, unless said otherwise."""

    __slots__ = (
        "era",
        "forks",
        "fresh",
        "given_up",
        "hook_errors",
        "journal",
        "limits",
        "lock",
        "most",
        "moved",
        "patience",
        "plain",
        "scales",
        "sealing",
        "slow",
        "stuck",
        "summary",
        "sweeping",
        "teller",
        "telling",
        "tried",
        "untold",
        "untried",
        "waiting",
        "walkers",
    )

    def __init__(self, limits: _Limits, summary: object = _ABSENT) -> None:
        self.limits = limits
        self.most = sys.maxsize if limits.maxlen is None else limits.maxlen
        self.scales: tuple[_Scale, ...] = ()
        if limits.max_tokens is not None and limits.count_tokens is not None:
            self.scales += (_Scale("tokens", limits.max_tokens, limits.count_tokens),)
        if limits.max_bytes is not None:
            self.scales += (_Scale("bytes", int(limits.max_bytes), limits.getsizeof or sizeof),)
        self.telling = not (limits.on_trim is limits.summarize is None)
        self.follow(None)
        self.summary = summary
        # Changes when the list is emptied: a summary of what was there before then comes too late.
        self.era = 0
        self.untold: list[Any] = []
        self.fresh = False  # something in `untold` may be told now
        self.hook_errors = 0
        self.given_up = 0
        self.walkers: set[object] | None = None  # iterators that have not ended, of a list that lends its items
        # Of `hygiene.compact`, which says what they mean.
        self.moved = self.tried = self.patience = self.waiting = 0
        self.untried = sys.maxsize
        self._renew()

    def _renew(self) -> None:
        self.lock = threading.RLock()
        self.teller: int | None = None
        self.sweeping = self.sealing = False
        self.forks = _forks

    def follow(self, journal: _Journal | None) -> None:
        """Tell *journal* of each change from now on."""
        self.journal = journal
        self.slow = bool(self.scales) or journal is not None or self.limits.compact
        self.plain = not self.telling and not self.slow
        self.stuck = False  # the last trim was refused

    def broom(self) -> threading.RLock:
        """The lock; a new one in a forked child, where its holder may be a thread that was left behind."""
        if self.forks != _forks:
            self._renew()
        return self.lock

    def heavy(self) -> bool:
        """Whether the items weigh too much; so it may stay, if the newest alone does."""
        for scale in self.scales:  # noqa: SIM110 - any() costs as much as the rest of an append
            if scale.total > scale.limit:
                return True
        return False

    def twin(self) -> _Window:
        """For a copy: the same limits and hooks, nothing to tell, and no journal: the log is the original's."""
        return _Window(self.limits, self.summary)

    def __reduce__(self) -> tuple[Any, ...]:
        known = () if self.summary is _ABSENT else (self.summary,)
        return _Window, (self.limits.portable(), *known)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Window:
        summary = _ABSENT if self.summary is _ABSENT else copy.deepcopy(self.summary, memo)
        return _Window(self.limits.following(memo), summary)


_forks = 0


def _after_fork_in_child() -> None:
    global _forks  # noqa: PLW0603 - one number for all histories is cheaper than knowing them all
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _Patched:
    """When gevent has patched `threading`, a history takes a new lock as it does in a forked child."""

    def _after_fork(self) -> None:
        """Nothing: see above."""

    _renew_locks = staticmethod(_after_fork_in_child)


_patched = _Patched()
survive_fork(_patched)


class History(list[T]):
    """
    A list that stays within its bounds by itself: the oldest items leave first.

    It is a true list to everybody (``isinstance``, ``==``, ``json``, ``orjson``, ``msgspec``, ``pickle``,
    ``copy``), and every method that makes it longer or heavier trims it in place. *Oldest* means lowest
    index, so what is inserted at the front of a full history leaves at once. As with any list, ``copy()``,
    slices, ``+`` and ``*`` give plain lists. With no limit it only trims when told to (`trim`).

    Limits combine. The *keep_first* items and the newest one always stay, even if they alone weigh more than
    allowed.

    Safe to share between threads: nothing is lost or told twice, and the bounds hold at rest. A loop over a
    history that others append to sees what a loop over a list sees that others delete from: loop over
    ``history[:]`` if it waits in between. Safe after ``fork``.

    A ``deque(maxlen=...)`` bounds itself; it needs none of this and is left alone.

    Args:
        source: The first items, oldest first; trimmed like all others.
        maxlen: Upper bound on ``len()``, counting the kept items and the summary. ``None`` means no bound.
        max_tokens: Upper bound on the sum of what *count_tokens* says of the items.
        count_tokens: Called once with each item that comes in; a fraction is rounded up. What it raises is
            logged, and the item counts as 0.
        max_bytes: Upper bound on the bytes of the items: a number, or text such as ``"64KiB"``.
        keep_first: How many items at the front (a system prompt) never leave by trimming.
        on_trim: Called with the list of what fell out, oldest first, after it left. With *summarize*: called with
            the items that were given up, because no summary could be made of them.
        summarize: Called instead of *on_trim*, with the earlier summary, if there is one, in front. The item
            that it returns takes the place behind the kept items, and counts against the limits; what it
            pushes out is handed over with the next trim. ``None`` leaves the earlier summary. One for which only
            the newest item leaves no room waits and is handed to the next. If the list is emptied meanwhile, it
            comes too late and is dropped. If *summarize* raises, or returns an item that cannot be stored or does
            not fit beside the kept items, no item is lost: the trimmed items are put back, and the next trim
            hands them over again. Beyond 4 times the limits the oldest are given up: they go to *on_trim*, are
            logged, and are counted in `given_up`.
        getsizeof: Bytes of one item, called once with each; an item that grows later is not measured again.
            By default `hygiene.sizing.sizeof`, an estimate, which counts all that an item refers to.
        compact: Keep the older items compressed, in about a tenth of the memory. An item that is read is unsealed,
            and sealed again when no other code refers to it. False unless asked for, because reading them takes
            longer. See `hygiene.compact.CompactHistory`.

    Hooks run in a thread that just wrote, one at a time, with no lock held. They may change the history; what
    falls out by that is told with the next trim. What they raise is logged and counted in `hook_errors`,
    never passed to the writer.

    Calling ``__init__`` again replaces the items, as for a list, and the limits if any are given.

    ``copy.copy`` and ``copy.deepcopy`` keep limits and hooks; a hook that is a method of an object copied
    along becomes the copy's. ``pickle`` takes along the functions that it can name; lambdas, local functions
    and methods stay behind, and so does the limit that needs them.

    Raises:
        ValueError: A limit is out of range, *maxlen* leaves no room beside the kept items, or *max_tokens*
            comes without *count_tokens*.
        TypeError: A limit is no number, a hook cannot be called or is a coroutine function, *compact* is no bool.
    """

    # Whether each read by which an item leaves is noted in the journal.
    _lends = False
    # The type of what `hygiene.compact` has in the place of items.
    _sealed: type | None = None
    # For what unpickling, or a subclass before its own ``super().__init__()``, appends: no limits yet.
    _hygiene: _Window = _Window(_NO_LIMITS)

    # Without items and hooks nothing says what comes in: it is anything, and not nothing.
    @overload
    def __init__(
        self: History[Any],
        source: tuple[()] = (),
        /,
        *,
        maxlen: int | None = None,
        max_bytes: Size | None = None,
        keep_first: int = 0,
        compact: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self,
        source: tuple[()] = (),
        /,
        *,
        maxlen: int | None = None,
        max_tokens: int | None = None,
        count_tokens: Callable[[T], float] | None = None,
        max_bytes: Size | None = None,
        keep_first: int = 0,
        on_trim: Callable[[list[T]], object] | None = None,
        summarize: Callable[[list[T]], T | None] | None = None,
        getsizeof: Callable[[T], float] | None = None,
        compact: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self,
        source: Iterable[T],
        /,
        *,
        maxlen: int | None = None,
        max_tokens: int | None = None,
        count_tokens: Callable[[T], float] | None = None,
        max_bytes: Size | None = None,
        keep_first: int = 0,
        on_trim: Callable[[list[T]], object] | None = None,
        summarize: Callable[[list[T]], T | None] | None = None,
        getsizeof: Callable[[T], float] | None = None,
        compact: bool = False,
    ) -> None: ...
    @suggests
    def __init__(
        self,
        source: Iterable[T] = (),
        /,
        *,
        maxlen: int | None = None,
        max_tokens: int | None = None,
        count_tokens: Callable[[T], float] | None = None,
        max_bytes: Size | None = None,
        keep_first: int = 0,
        on_trim: Callable[[list[T]], object] | None = None,
        summarize: Callable[[list[T]], T | None] | None = None,
        getsizeof: Callable[[T], float] | None = None,
        compact: bool = False,
    ) -> None:
        if count_tokens is on_trim is summarize is getsizeof is None:
            try:
                limits = _numbers(maxlen, max_tokens, max_bytes, keep_first, compact)
            except TypeError:  # also for what cannot be hashed; which is wrong is said below
                limits = _Limits(maxlen, max_tokens, None, max_bytes, keep_first, compact=compact)
        else:
            limits = _Limits(
                maxlen, max_tokens, count_tokens, max_bytes, keep_first, on_trim, summarize, getsizeof, compact
            )
        if compact and _compacted is not None:
            self.__class__ = _compacted(type(self))
        if self:
            History.clear(self)
        if limits != _NO_LIMITS:
            window = _Window(limits)
            if self._hygiene is not History._hygiene:
                with self._whole() as former:
                    window.follow(former.journal)
                    self._hygiene = window
            else:
                self._hygiene = window
        if compact:
            self._fill(source)
        else:
            History.extend(self, source)

    # Growing at the end: the paths that must be fast.

    def append(self, item: T, /) -> None:
        """Put *item* at the end; the oldest leave if need be."""
        window = self._hygiene
        if not window.slow:
            _append(self, item)
        elif (journal := window.journal) is None or window.scales or not self._append_told(window, journal, item):
            self._grow([item])
            return
        if len(self) > window.most:
            self._sweep()

    def _append_told(self, window: _Window, journal: _Journal, item: T) -> bool:
        """Put *item* at the end if that is as simple as it mostly is."""
        encode = journal.encode
        if encode is None:
            return False
        try:
            data = encode(item, journal.key)
        except Exception:
            return False  # the other way it is raised, unless the journal has just been closed
        with window.lock if window.forks == _forks else window.broom():
            try:
                told = window.journal is journal and self._hygiene is window and journal.added(self, data, item)
                if told:
                    _append(self, item)
            except BaseException as error:
                self._doubt(window, error)
                raise
        return told

    def extend(self, items: Iterable[T], /) -> None:
        """
        Put *items* at the end; the oldest leave if need be.

        An iterator is read a chunk at a time, so that a long one does not fill memory.
        """
        if hasattr(items, "__len__"):
            self._grow(items)
            return
        iterator = iter(items)
        chunk: list[T]
        while True:
            chunk = []
            try:
                chunk.extend(islice(iterator, _CHUNK))
            finally:  # as in a list, what came before an error stays
                self._grow(chunk)
            if len(chunk) < _CHUNK:
                return

    def __iadd__(self, items: Iterable[T], /) -> Self:  # type: ignore[misc,override]  # as list's own
        History.extend(self, items)
        return self

    def _grow(self, items: Iterable[T]) -> None:
        window = self._hygiene
        if not window.slow:
            list.extend(self, items)
            self._sweep()
            return
        items = list(items)
        weighed = self._weigh(items)
        journal = waiter = prepared = None
        try:
            while True:
                if window.journal is not None:
                    journal = window.journal
                    prepared = journal.prepare(items)
                with window.broom():
                    if self._hygiene is window and window.journal is journal:
                        try:
                            self._align()
                            if journal is not None:
                                waiter = journal.grown(self, prepared)
                            list.extend(self, items)
                            for scale, weights in zip(window.scales, weighed, strict=True):
                                scale.weights += weights
                                scale.total += sum(weights)
                        except BaseException as error:
                            self._doubt(window, error)
                            raise
                        break
                window, journal = self._hygiene, None  # attached or detached meanwhile
        finally:
            self._sweep()
        if waiter is not None and journal is not None:
            journal.settle(waiter)

    # All other changes.

    def insert(self, index: SupportsIndex, item: T, /) -> None:
        """Put *item* before *index*; in a full history what is put first leaves at once."""
        self._write(list.insert, index, item=item)

    @overload
    def __setitem__(self, index: SupportsIndex, value: T, /) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Iterable[T], /) -> None: ...
    def __setitem__(self, index: Any, value: Any, /) -> None:
        if isinstance(index, slice):
            self._write(list.__setitem__, index, items=list(value), over=index)
        else:
            self._write(list.__setitem__, index, item=value, over=index)

    def __delitem__(self, index: SupportsIndex | slice, /) -> None:
        self._write(list.__delitem__, index, over=index)

    def pop(self, index: SupportsIndex = -1, /) -> T:
        """Take out and return the item at *index*; it is the caller's now and no hook is told."""
        pop: Callable[..., T] = list.pop
        return self._write(pop, index)

    def remove(self, item: T, /) -> None:
        """
        Take out the first item equal to *item*.

        Raises:
            ValueError: There is none.
        """
        while True:
            # Comparing is the items' own code, so not under the lock; meanwhile the one found may move, or go.
            before = self._items(_ALL)
            found = before[before.index(item)]
            try:
                with self._whole():
                    for index, one in enumerate(list.__getitem__(self, _ALL)):
                        if one is found:
                            self._apply(list.pop, index)
                            return
            finally:
                self._sweep()

    def clear(self) -> None:
        """Take out all items, the kept ones too; no hook is told."""
        self._write(list.clear, over=slice(None))

    def __imul__(self, times: SupportsIndex, /) -> Self:
        self._write(list.__imul__, times)
        return self

    def reverse(self) -> None:
        """Turn the order around, in place: the newest become the oldest."""
        self._write(list.reverse)

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        """
        Sort in place; the lowest become the oldest.

        Raises:
            ValueError: The list was changed meanwhile; nothing was sorted.
        """
        # A key function may keep an item, and change it later.
        before = self._items(_ALL) if key is None else self[:]
        order = sorted(range(len(before)), key=_sort_key(before, key), reverse=reverse)
        try:
            with self._whole() as window:
                self._align()
                # Compared by identity: ``==`` may be the user's, and would run under the lock.
                if len(before) != len(self) or not all(map(_same, before, list.__getitem__(self, _ALL))):
                    raise ValueError("list modified during sort")
                window.moved += 1
                after = [before[place] for place in order]
                if window.journal is not None:
                    # What has to move is encoded here; nothing new comes in that might have to be waited for.
                    window.journal.becomes(self, after, window.journal.prepare([]))
                list.__setitem__(self, slice(None), after)
                for scale in window.scales:
                    scale.weights[:] = [scale.weights[place] for place in order]
        finally:
            self._sweep()

    def trim(self, to: int | str) -> int:
        """
        Drop the oldest until *to* are left, and say how many left; they are told like all others.

        The kept first items and a summary stay, whatever *to* says; the newest does not.

        Args:
            to: Items to leave, or a share of what is there: ``"50%"``.

        Raises:
            ValueError: *to* is negative, or text that is no share from 0 to 100 %.
            TypeError: *to* is neither.
        """
        most = _target(to, len(self))
        with self._whole():
            self._align()
            gone = self._trim(most, newest=0)
        return max(0, len(gone) - self._sweep())

    # What there is to know.

    @property
    def nbytes(self) -> int | None:
        """Bytes of the items, from a running sum; ``None`` without *max_bytes*."""
        return self._total("bytes")

    @property
    def tokens(self) -> int | None:
        """Tokens of the items, from a running sum; ``None`` without *max_tokens*."""
        return self._total("tokens")

    @property
    def hook_errors(self) -> int:
        """How often a hook, *count_tokens* or *getsizeof* failed; logged, of each once a minute."""
        return self._hygiene.hook_errors

    @property
    def given_up(self) -> int:
        """Number of items dropped without a summary, because *summarize* had failed for 4 windows of them."""
        return self._hygiene.given_up

    def _total(self, what: str) -> int | None:
        window = self._hygiene
        for scale in window.scales:
            if scale.what == what:
                if len(scale.weights) != len(self):
                    with window.broom():
                        self._align()
                    self._sweep()
                return scale.total
        return None

    def __getstate__(self) -> Any:
        # For copies and pickles. They need a window of their own: a shared one would trim by the other's
        # weights.
        state: Any = super().__getstate__()
        own, slots = state if isinstance(state, tuple) else (state, None)
        if own and "_hygiene" in own:
            own = {**own, "_hygiene": self._hygiene.twin()}
        return own if slots is None else (own, slots)

    # What `hygiene.compact` does in other ways, because there an item may not stand in its place itself.

    def _items(self, where: slice, /) -> list[T]:
        """The items at *where*, in whatever way a subclass reads them."""
        return list.__getitem__(self, where)

    def _fill(self, source: Iterable[T]) -> None:
        """Take the first items."""
        History.extend(self, source)

    def _rest(self) -> None:
        """A check for edits has ended: what was read may be put away again."""

    def _make_way(self, method: Callable[..., Any], where: tuple[Any, ...]) -> None:
        """A list's *method* is about to be done to the items, under the lock."""

    def _part(self, index: int) -> None:
        """What stands before *index* and what stands from there on are about to be parted, under the lock."""

    # How it is done.

    def _write(
        self,
        method: Callable[..., R],
        *where: Any,
        item: Any = _ABSENT,
        items: list[T] | None = None,
        over: Any = None,
    ) -> R:
        """
        Do *method* to the items, trim and tell.

        Args:
            method: The list's own, unbound.
            where: Its arguments but the last, which is:
            item: one item that comes in; or
            items: several.
            over: Where it deletes: the index or slice.
        """
        new: list[T] = [] if item is _ABSENT else [item]
        brought = new if items is None else items
        weighed = self._weigh(brought)
        journal = prepared = lost = None
        try:
            while True:
                window = self._hygiene
                journal = window.journal
                if journal is not None:
                    prepared = journal.prepare(brought)
                with window.broom():
                    if self._hygiene is not window or window.journal is not journal:
                        continue  # attached or detached meanwhile
                    # The last reference to an item must not die under the lock: its ``__del__`` is user code. A
                    # wrong index is for the list's own method to complain about.
                    if over is not None:
                        with contextlib.suppress(IndexError, TypeError):
                            lost = list.__getitem__(self, over)
                    if items is not None:
                        new, weighed = [items], [[weights] for weights in weighed]  # type: ignore[list-item]
                    try:
                        result, waiter = self._apply(method, *where, new=new, weighed=weighed, prepared=prepared)
                    except BaseException as error:
                        self._doubt(window, error)
                        raise
                    break
        finally:
            del lost
            self._sweep()  # also after an error: others may have left the sweeping to us
        if waiter is not None and journal is not None:
            journal.settle(waiter)
        return result

    def _apply(
        self,
        method: Callable[..., R],
        *where: Any,
        new: Sequence[Any] = (),
        weighed: Sequence[Any] = (),
        prepared: Any = None,
    ) -> tuple[R, Any]:
        """
        Do *method* to the items and, with their weights in their place, to every scale; under the lock.

        Returns also what the journal, which is told before, has to settle after it.
        """
        window = self._hygiene
        self._align()
        self._make_way(method, where)
        journal, waiter = window.journal, None
        if journal is None:
            result = method(self, *where, *new)
        else:
            if prepared is None:
                prepared = journal.prepare([])
            span = _span(method, where, len(self))
            if span is not None:
                waiter = journal.spliced(self, *span, prepared)
                result = method(self, *where, *new)
            else:
                # It may fail, or ask somebody's ``__index__``: so once, and before it is told.
                after = list.__getitem__(self, slice(None))
                result = method(after, *where, *new)
                waiter = journal.becomes(self, after, prepared)
                list.__setitem__(self, slice(None), after)
        # What takes in nothing has no weights.
        for scale, weights in zip(window.scales, weighed or [()] * len(window.scales), strict=True):
            method(scale.weights, *where, *weights)
            scale.total = sum(scale.weights)
        if not len(self) and window.limits.summarize is not None:
            # Emptied: another conversation begins. What was not yet summarized belongs to the last one.
            window.era, window.untold, window.fresh = window.era + 1, [], False
        return result, waiter

    @contextlib.contextmanager
    def _whole(self) -> Iterator[_Window]:
        """Hold the lock."""
        while True:
            window = self._hygiene
            with window.broom():
                if self._hygiene is window:
                    yield window
                    return

    def _weigh(self, items: Iterable[T]) -> list[list[int]]:
        """Each scale's weights of *items*. Asks user code."""
        return [[self._weight(scale, item) for item in items] for scale in self._hygiene.scales]

    def _weight(self, scale: _Scale, item: T) -> int:
        try:
            weight = math.ceil(scale.measure(item))
            if weight < 0:
                raise ValueError(f"it must return a number that is not negative; found {weight}")  # noqa: TRY301
        except Exception as error:
            self._failed("the %s of an item could not be counted, so it counts as 0", scale.what, error=error)
            return 0
        return weight

    def _align(self) -> None:
        # Only what wrote to the storage past our methods, and unpickling, lead here; weighing under the lock
        # is the price of not knowing what they did.
        for scale in self._hygiene.scales:
            if len(scale.weights) != len(self):
                scale.weights[:] = [self._weight(scale, item) for item in list.__getitem__(self, _ALL)]
                scale.total = sum(scale.weights)

    def _head(self) -> int:
        """Index of the first item that may leave: behind the kept ones and the summary."""
        window = self._hygiene
        head = window.limits.keep_first
        summary = window.summary
        if summary is not _ABSENT and len(self) > head and list.__getitem__(self, head) is summary:
            head += 1
        return head

    def _cut(self, most: int, newest: int) -> slice:
        """What has to leave, under the lock."""
        window = self._hygiene
        keep, head = window.limits.keep_first, self._head()
        room = len(self) - head - newest
        count = max(0, len(self) - most)
        if count and window.limits.summarize is not None and head == keep:
            count += 1  # there is no summary yet, and there will be one
        count = max(0, min(count, room))
        start = head
        for scale in window.scales:
            over = scale.total - scale.limit - sum(scale.weights[head : head + count])
            while over > 0 and count < room:
                over -= scale.weights[head + count]
                count += 1
            if over > 0 and room >= 0:
                start = keep  # nothing but the summary is left to give way; the next one will know it
        return slice(start, head + count)

    def _trim(self, most: int, *, newest: int = 1) -> list[T]:
        """Cut off what is too much, under the lock. The caller lets go of what is returned after it."""
        window = self._hygiene
        if window.sweeping:  # a finalizer that ran in the middle of this; we are about to look again
            return []
        window.sweeping = True
        try:
            cut = self._cut(most, newest)
            if cut.start == cut.stop:
                return []
            if window.journal is not None and not self._may_leave(window, cut):
                return []
            self._part(cut.start)
            gone = self._items(cut) if window.telling else list.__getitem__(self, cut)
            if window.telling:
                window.fresh = window.fresh or window.teller != threading.get_ident()
                window.untold += gone
            list.__delitem__(self, cut)  # no signal handler runs between these two lines
            for scale in window.scales:
                scale.total -= sum(scale.weights[cut])
                del scale.weights[cut]
        except BaseException as error:
            self._doubt(window, error)
            raise
        finally:
            window.sweeping = False
        return gone

    def _may_leave(self, window: _Window, cut: slice) -> bool:
        """Tell the journal of a trim; whether it agrees."""
        assert window.journal is not None
        try:
            window.journal.trimmed(self, cut)
        except Exception as error:
            if not window.stuck:  # each change tries again, and saying it once is enough
                logger.warning(
                    "a history is not trimmed, because what keeps it does not take it: %s",
                    error,
                    extra={"event_name": "history.not_trimmed"},
                )
            window.stuck = True
        else:
            window.stuck = False
        return not window.stuck

    def _sweep(self) -> int:
        """
        Trim and tell, unless somebody is at it: everyone who had the lock comes here afterwards.

        Returns how many items were put back, since there is no summary of them.
        """
        window = self._hygiene
        if window.plain and len(self) == window.most + 1:
            # By far the most frequent case, and a single step: one came, one leaves, nobody is to be told. Whoever has
            # the lock of such a history has it for a moment, so it is waited for.
            gone: Any = None
            with window.lock if window.forks == _forks else window.broom():
                if len(self) > window.most and not window.sweeping:
                    gone = _pop(self, window.limits.keep_first)
            del gone  # not under the lock: its ``__del__`` is user code
        while len(self) > window.most or window.fresh or window.heavy():
            lock = window.broom()
            me = threading.get_ident()
            acquired: list[bool] = []
            gone = []
            told: list[T] | None = None
            untold: list[list[T]] = []  # what was taken out of the window, and given to nobody yet
            era = 0
            try:
                try:
                    # A signal handler may raise right after a lock was acquired. This says whether it was.
                    acquired.extend(map(lock.acquire, (False,)))
                    if not acquired[0]:
                        return 0
                    if window.sweeping or self._hygiene is not window:  # it has other limits by now
                        return 0
                    gone = self._trim(window.most)
                    stuck = window.stuck
                    if window.fresh and window.teller is None:
                        untold = [window.untold]
                        told, window.untold, window.fresh = window.untold, [], False
                        era, window.teller = window.era, me
                finally:
                    if acquired and acquired[0]:
                        lock.release()
                gone = []
                if told is not None:
                    stayed = self._tell(told, era, untold)
                    if stayed:  # the next change tries again: a summarizer that fails would be called here for ever
                        return stayed
                elif stuck or len(self) <= window.most:
                    return 0
            except BaseException:
                if untold:
                    window.untold[:0] = untold[0]
                    window.fresh = True
                raise
            finally:
                if told is not None:
                    window.teller = None
        return 0

    def _doubt(self, window: _Window, error: BaseException) -> None:
        """A change may have been cut short: have the log and the weights agree with the items. The lock is held."""
        if isinstance(error, (HygieneError, IndexError, TypeError, ValueError)):
            return  # it was refused, before anything had changed
        if window.journal is not None:
            window.journal.doubt()
        for scale in window.scales:
            scale.weights, scale.total = [], 0
        self._align()

    def _tell(self, dropped: list[T], era: int, untold: list[list[T]]) -> int:
        """
        Pass on the trimmed items. Returns how many were put back.

        *untold* is emptied immediately before a hook is given them.
        """
        window = self._hygiene
        limits = window.limits
        if limits.summarize is None:
            self._hand_over(dropped, untold)
            return 0
        try:
            del untold[:]
            with window.broom():
                earlier = list.__getitem__(self, slice(limits.keep_first, self._head()))
            summary = limits.summarize(earlier + dropped)
            _not_awaitable("summarize", summary)
        except Exception as error:
            what = "summarize failed, and will be given %d of the oldest items again with the next trim"
            self._failed(what, len(dropped), error=error)
        except BaseException:
            self._put_back_untold(window, dropped, era)
            raise
        else:
            if summary is None or self._place(summary, era, dropped):
                return 0
        return self._put_back_untold(window, dropped, era)

    def _hand_over(self, dropped: list[T], untold: list[list[T]]) -> None:
        on_trim = self._hygiene.limits.on_trim
        if on_trim is None:
            return
        try:
            del untold[:]
            _not_awaitable("on_trim", on_trim(dropped))
        except Exception as error:
            what = "on_trim failed, and what it was handed is gone: %d of the oldest items"
            self._failed(what, len(dropped), error=error)

    def _put_back_untold(self, window: _Window, dropped: list[T], era: int) -> int:
        """Put the *dropped* items back, of which there is no summary. Returns how many."""
        while True:
            with window.broom():
                # Trimmed while the summarizer ran: newer than *dropped*, and older than all others.
                dropped += window.untold
                window.untold, window.fresh = [], False
                journal = window.journal
            weighed = self._weigh(dropped)
            first = self._excess(window, weighed, len(dropped))
            given_up, stay = dropped[:first], dropped[first:]
            try:
                prepared = None if journal is None else journal.prepare(stay)
            except Exception as error:  # an item that was changed in place to what cannot be stored
                prepared = error
            with window.broom():
                if self._hygiene is not window or window.era != era:
                    return 0  # emptied, or filled with others: these belong to the conversation before
                if window.journal is not journal or window.untold:
                    continue
                window.given_up += first
                stays = bool(stay) and self._may_return(window, stay, prepared, [part[first:] for part in weighed])
                if not stays:
                    window.untold = stay
                break
        if given_up:
            logger.error(
                "a history has outgrown %d times its limits, because no summary could be made: %d of the oldest items "
                "were dropped",
                _CAP,
                first,
                extra={"event_name": "history.given_up", "of": self},
            )
            self._hand_over(given_up, [])
        return len(stay) if stays else 0

    def _excess(self, window: _Window, weighed: list[list[int]], count: int) -> int:
        """How many of *count* items, the oldest, would be beyond the cap if all were put back."""
        first = max(0, min(count, len(self) + count - _CAP * window.most))
        for scale, weights in zip(window.scales, weighed, strict=True):
            over = scale.total + sum(weights[first:]) - _CAP * scale.limit
            while over > 0 and first < count:
                over -= weights[first]
                first += 1
        return first

    def _may_return(self, window: _Window, items: list[T], prepared: Any, weighed: list[list[int]]) -> bool:
        """Put *items* behind the kept ones and the summary, under the lock; whether the journal, if any, agrees."""
        self._align()
        head = self._head()
        try:
            if isinstance(prepared, Exception):
                raise prepared  # noqa: TRY301 - one of the reasons for which it is not taken
            if window.journal is not None:
                window.journal.spliced(self, head, head, prepared)
        except Exception as error:
            logger.warning(
                "%d items of which there is no summary are not put back, because what keeps the history does not take "
                "them (%s). They are given to the next summary",
                len(items),
                error,
                extra={"event_name": "history.summary_refused", "of": (self, "back")},
            )
            return False
        self._part(head)
        list.__setitem__(self, slice(head, head), items)
        for scale, weights in zip(window.scales, weighed, strict=True):
            scale.weights[head:head] = weights
            scale.total = sum(scale.weights)
        return True

    def _place(self, summary: T, era: int, dropped: list[T]) -> bool:
        """Put the *summary* of the *dropped* items in. False: there is no room for it, ever, and they must stay."""
        weighed = self._weigh([summary])
        while True:
            window = self._hygiene
            journal, prepared = window.journal, None
            if journal is not None:
                try:
                    prepared = journal.prepare([summary])
                except Exception as error:
                    self._failed("a summary of %d items cannot be kept, so it was left out", len(dropped), error=error)
                    return False
            with window.broom():
                if self._hygiene is not window or window.journal is not journal:
                    continue  # attached or detached meanwhile
                self._align()
                if window.era != era:
                    return True
                keep, head = window.limits.keep_first, self._head()
                hopeless, held = None, False
                for scale, [weight] in zip(window.scales, weighed, strict=True):
                    kept = sum(scale.weights[:keep])
                    if kept + weight > scale.limit:
                        hopeless = (weight, scale.what, scale.limit, kept)
                    elif kept + weight + sum(scale.weights[head:][-1:]) > scale.limit:
                        held = True
                replaced: list[T] = []
                place, new = slice(keep, head), [] if held else [summary]
                if hopeless is None and self._may_stand(window, place, prepared, held=held):
                    self._part(keep)
                    # In one step: a reader finds the earlier summary or this one.
                    replaced = list.__getitem__(self, place)
                    list.__setitem__(self, place, new)
                    for scale, weights in zip(window.scales, weighed, strict=True):
                        scale.weights[place] = weights[: len(new)]
                        scale.total = sum(scale.weights)
                    if held:
                        # Only the newest is in the way: the next summary will have room, and shall know this one.
                        window.untold.insert(0, summary)
                    else:
                        window.summary = summary
                    replaced += self._trim(window.most)
                elif hopeless is None:
                    window.untold[:0] = dropped  # summarized again with what falls out next
            break
        del replaced  # not under the lock
        if hopeless is not None:
            self._failed(
                "a summary of %d %s does not fit into %d beside %d of the kept items, so it was left out: "
                "let summarize return a shorter one",
                *hopeless,
            )
        return hopeless is None

    def _may_stand(self, window: _Window, place: slice, prepared: Any, *, held: bool) -> bool:
        """Tell the journal, if there is one, of a summary; whether it agrees."""
        journal = window.journal
        if journal is None:
            return True
        try:
            # Nobody waits for it if it is critical: the writer whose item came last has written something else.
            journal.spliced(self, place.start, place.stop, journal.prepare([]) if held else prepared)
        except Exception as error:
            logger.warning(
                "a summary is not put in now, because what keeps the history does not take it: %s",
                error,
                extra={"event_name": "history.summary_refused", "of": self},
            )
            return False
        return True

    def _failed(self, message: str, *arguments: object, error: Exception | None = None) -> None:
        with self._hygiene.broom():
            self._hygiene.hook_errors += 1
        extra = {"event_name": "history.hook_failed", "of": (self, message)}
        logger.error(message, *arguments, exc_info=error, extra=extra)


class _Lending(History[T]):
    """
    A history with a journal, which is notified of each item that is handed out: its holder may change it in place.

    An instance has this class for as long as a journal is attached, so that histories without a store read at the speed
    of a list. C code that reads a subclass of list through its iterator (``list()``, ``json``, ``sorted``) comes here.
    """

    __slots__ = ()
    _lends = True

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> T: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[T]: ...
    def __getitem__(self, index: Any, /) -> Any:
        journal: Any = self._hygiene.journal
        if type(index) is not int or journal is None:
            found: Any = list.__getitem__(self, index)
        else:
            moves, size = journal.moves, len(self)
            found = list.__getitem__(self, index)
            # A text is the most frequent item that cannot be changed.
            if type(found) is str or journal.is_lent(index if index >= 0 else index + size, size, moves):
                return found
        lend(self, index, found)
        return found

    def __iter__(self) -> Iterator[T]:
        return self._walk(list.__iter__)

    def __reversed__(self) -> Iterator[T]:
        return self._walk(list.__reversed__)

    def _walk(self, way: Callable[[list[T]], Iterator[T]]) -> Iterator[T]:
        token = walking(self)
        try:
            lend(self, _ALL, list.__getitem__(self, _ALL))
            yield from way(self)
        finally:
            walked(self, token)

    def copy(self) -> list[T]:
        return self[:]

    def __add__(self, other: Any, /) -> Any:
        return self[:] + other

    def __radd__(self, other: Any, /) -> Any:
        # Without this ``[prompt] + history`` would read the storage.
        if not isinstance(other, list):
            return NotImplemented
        if _is_augmented(sys._getframe(1)):
            other.extend(self)
            return other
        return other[:] + self[:]

    def __mul__(self, times: SupportsIndex, /) -> list[T]:
        return self[:] * times

    __rmul__ = __mul__


_READS: Final = ("__getitem__", "__iter__", "__reversed__", "copy", "__add__", "__radd__", "__mul__", "__rmul__")


def lend(history: History[Any], index: Any, found: Any) -> None:
    """Note in the journal of *history*, if it has one, that *found*, the item or items at *index*, is handed out."""
    note: Any = getattr(history._hygiene.journal, "lend", None)
    if note is not None:
        note(history, index, found)


def walking(history: History[Any]) -> object:
    """An iterator over *history* begins: until `walked` each item is taken for lent."""
    token = object()
    with history._whole() as window:
        if window.walkers is None:
            window.walkers = set()
        window.walkers.add(token)
    return token


def walked(history: History[Any], token: object) -> None:
    """The iterator that *token* stands for has ended. No lock is taken: the collector may end it anywhere."""
    if (walkers := history._hygiene.walkers) is not None:
        walkers.discard(token)


_BINARY_OP: Final = opmap.get("BINARY_OP", -1)
_INPLACE_ADD: Final = 13


def _is_augmented(frame: types.FrameType) -> bool:
    """
    Whether *frame* is in the middle of ``x += y``, and not of ``x + y``.

    A list has no method of its own that Python would ask before the ``__radd__`` of what is on the right, and
    ``messages += history`` has to change the list that others hold, too. Only the code of the caller tells.
    """
    code, place = frame.f_code.co_code, frame.f_lasti
    return code[place : place + 2] == bytes((_BINARY_OP, _INPLACE_ADD))


def attach(history: History[Any], journal: _Journal) -> None:
    """
    Tell *journal* of each change of *history* from now on, and no other; from any thread.

    A copy of the history has none. What is in the list already is not told.
    """
    _follow(history, journal)


def detach(history: History[Any]) -> None:
    """Tell nobody of the changes of *history* any more. When it returns, no change is being told."""
    _follow(history, None)


def _follow(history: History[Any], journal: _Journal | None) -> None:
    while True:  # as in `_whole`, at half its cost: it is done for each entry that comes or leaves
        window = history._hygiene
        with window.broom():
            if history._hygiene is not window:
                continue
            if window is not History._hygiene:
                window.follow(journal)
            elif journal is not None:
                # All histories without limits share that one. An append that is just under way without a lock goes
                # past the journal, which sees it in the length.
                own = window.twin()
                own.follow(journal)
                history._hygiene = own
            _lend_from_now(history, lends=hasattr(journal, "lend"))
            return


def _lend_from_now(history: History[Any], *, lends: bool) -> None:
    """Give *history* the class that notes what it hands out, or its own again."""
    kind: Any = type(history)
    if getattr(kind, "_lending_to", None) is not None:
        if not lends:
            history.__class__ = kind._lending_to
    elif lends and not kind._lends:
        # A class with an odd layout: then all its items are taken for lent.
        with contextlib.suppress(TypeError):
            history.__class__ = _lending(kind)


def _span(method: Callable[..., Any], where: tuple[Any, ...], size: int) -> tuple[int, int] | None:
    """From and to which index a list's *method* replaces items; ``None``: not known without doing it."""
    if method is list.clear:
        return 0, size
    place = where[0] if where else None
    if type(place) is int:
        if place < 0:
            place += size
        if method is list.insert:
            place = max(0, min(place, size))
            return place, place
        return (place, place + 1) if 0 <= place < size and method in _AT_ONE else None
    if type(place) is slice and place.step is None:
        ends = (place.start, place.stop)
        if all(end is None or type(end) is int for end in ends):
            start, stop, _ = place.indices(size)
            return start, max(start, stop)
    return None


_AT_ONE = (list.pop, list.__setitem__, list.__delitem__)


def _same(one: object, other: object) -> bool:
    return one is other


# Which class is the compact one of another: set by `hygiene.compact`, which stands on this module.
_compacted: Callable[[type[Any]], type[Any]] | None = None


def _sort_key(items: list[T], key: Callable[[T], Any] | None) -> Callable[[int], Any]:
    if key is None:
        return lambda place: items[place]
    return lambda place: key(items[place])


def _not_awaitable(what: str, result: object) -> None:
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # or it warns that it was never awaited, which is what we say ourselves
        raise TypeError(
            f"{what} must do its work when called; found that it returned {result!r}, which nothing would "
            f"await. Give an ordinary function, which may hand the work to a task of yours"
        )


def _target(to: object, size: int) -> int:
    wanted = 'to must be the number of items to leave, or a share of them such as "50%"'
    if isinstance(to, str):
        share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", to)
        if share is None or float(share[1]) > 100:  # noqa: PLR2004
            raise ValueError(f"{wanted}; found {to!r}")
        return int(size * float(share[1]) / 100)
    if not isinstance(to, int) or isinstance(to, bool):
        raise TypeError(f"{wanted}; found {to!r}")
    if to < 0:
        raise ValueError(f"{wanted}; found {to}")
    return to


_lending_types: weakref.WeakKeyDictionary[type[Any], weakref.ref[type[Any]]] = weakref.WeakKeyDictionary()


def _lending(base: type[Any]) -> type[Any]:
    """The class that is both *base*, a kind of `History`, and `_Lending`."""
    with _types_lock:
        known = _lending_types.get(base)
        made = known() if known is not None else None
        if made is None:
            made = _with_lending(base)
            _lending_types[base] = weakref.ref(made)
        return made


def _with_lending(base: type[Any]) -> type[Any]:
    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:  # noqa: N807
        # A copy or a pickle has no journal, so it is of the class without.
        made, arguments, *rest = super(kind, self).__reduce_ex__(max(2, int(protocol)))
        if not arguments or arguments[0] is not kind:
            return made, arguments, *rest
        return _remake, (made, base.__dict__.get("_made_of", base), *arguments[1:]), *rest

    namespace = {
        "__slots__": (),
        "__reduce_ex__": __reduce_ex__,
        "_lending_to": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    bases = (_Lending,) if base is History else (base, _Lending)
    kind: Any = types.new_class(base.__name__, bases, exec_body=lambda body: body.update(namespace))
    # A class of the user's that reads in a way of its own may not come by here.
    kind._lends = all(getattr(kind, name) is getattr(_Lending, name) for name in _READS)
    made: type[Any] = kind
    return made


# Both sides weak: a class is known here as long as somebody uses it, and no longer.
_types: weakref.WeakKeyDictionary[type[Any], weakref.ref[type[Any]]] = weakref.WeakKeyDictionary()
_types_lock = threading.Lock()


def history_type(base: type[list[Any]]) -> type[History[Any]]:
    """
    The class that is both *base*, somebody's subclass of list, and `History`.

    Called with limits, ``history_type(base)(source, **limits)`` takes over the items and, if *source* is a
    *base*, the attributes, without running *base*'s ``__init__``. Called without, it is *base*'s own
    constructor, which is what methods of *base* that make another of their kind expect. The methods of *base*
    come first; those that write with ``super()`` are bounded, those that call ``list.append(self, ...)`` go
    past and are caught up with at the next change.
    """
    if base is list:
        return History
    if issubclass(base, History):
        return base
    with _types_lock:
        known = _types.get(base)
        made = known() if known is not None else None
        if made is None:
            made = _combined(base)
            _types[base] = weakref.ref(made)
        return made


def _combined(base: type[list[Any]]) -> type[History[Any]]:
    def __init__(self: Any, *args: Any, **keywords: Any) -> None:  # noqa: N807
        if not keywords or keywords.keys() - _KEYWORDS:
            base.__init__(self, *args, **keywords)
            return
        if args and isinstance(args[0], base):
            _take_over(args[0], self)
        History.__init__(self, *args, **keywords)

    def __reduce_ex__(self: Any, protocol: SupportsIndex) -> Any:  # noqa: N807
        # This class has no name to be found by. From 2 on, what is made is said by a class and arguments.
        made, arguments, *rest = super(kind, self).__reduce_ex__(max(2, int(protocol)))
        if arguments and arguments[0] is kind:
            return _remake, (made, base, *arguments[1:]), *rest
        return made, arguments, *rest

    namespace: Mapping[str, Any] = {
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
        "_made_of": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    kind: Any = types.new_class(base.__name__, (base, History), exec_body=lambda body: body.update(namespace))
    made: type[History[Any]] = kind
    return made


def _remake(made: Callable[..., Any], base: type[list[Any]], *arguments: Any) -> Any:
    """Unpickle."""
    return made(history_type(base), *arguments)


def _take_over(source: list[Any], target: list[Any]) -> None:
    """Give *target* the attributes of *source*, whatever class they are in."""
    state: Any = object.__getstate__(source)
    for part in state if isinstance(state, tuple) else (state,):
        for name, value in (part or {}).items():
            if name != "_hygiene":
                object.__setattr__(target, name, value)
