"""How many bytes a value holds: an estimate that is cheap enough to ask on every write.

Theory of operation
===================

**By levels, in C.** The usual walk calls a Python function for each object, and `sys.getsizeof` alone costs more than
looking at one. Here ``gc.get_referents`` lists what a whole level of objects refers to in one call, and each type's own
``__sizeof__`` is mapped over all objects of that type. That runs no code of the user's, sees slots and attributes
alike, and does not make an object build the ``__dict__`` it does without.

**Many of a kind.** A long container is not walked. A few of its items, a *pilot*, are measured in full and stand for
the others in all but the lengths of their texts, which differ by orders of magnitude (one tool result outweighs a
hundred greetings). So the items' referents are laid out as a table, and the columns with most of the bytes are summed
up over all items: what the sum says beyond the pilot's share corrects the estimate. Items of different shapes are
sorted by shape first; where that leads nowhere, a wider sample has to do. Samples are spread evenly and always alike,
so that the same value measures the same, but not at equal steps: a conversation has a rhythm, and every second message
would be the user's.

**Shared objects.** Whom an object belongs to cannot be told from a value, but how many hold it can: an object that more
than some sixteen others refer to, beside those found in the value, belongs to the program (a system prompt in every
entry, a key, a class, the client that all sessions talk through) and counts as nothing. The first entries to hold a
prompt count it in full until they are measured again.

**Bounds.** A call looks at some ten thousand objects at most, sixteen levels deep.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import logging
import sys
import threading
import types
import weakref
from collections import Counter, defaultdict, deque
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["sizeof"]

_DEPTH: Final = 16
_HANDFUL: Final = 8
_EXACT: Final = 24  # items of a container up to which all are walked
_PILOT: Final = 13
_SURVEY: Final = 2048  # of more, not even the columns are summed up over all
_BLOCK: Final = 16
_BROAD: Final = 250  # objects of a level, or items that are alike in nothing
_REACH: Final = 8192  # how far into a dict or set, which can only be walked in order
_SHAPES: Final = 8
_WIDTH: Final = 32  # columns
_KINDS: Final = 1024
_PARTS: Final = tuple(number * 0.6180339887498949 % 1 for number in range(1, _BROAD + 1))
_OBJECTS: Final = 10_000
_SHELL: Final = 64  # bytes of an object that cannot say
_ATTRIBUTES: Final = 96  # bytes of a small __dict__, for an object that keeps its attributes without one
_LARGE: Final = 2048
_SMALL: Final = 512  # what is shared and no larger is not worth a question

_refs = sys.getrefcount
_referents = gc.get_referents
# What `_refs` says, in a comprehension over a list, of what the list and one other hold.
_SOLE: Final = max([_refs(item) for item in [object()]]) + 1
_FEW: Final = _SOLE + 2 + 16  # two of ours more, where it is asked

_FLAT: Final[frozenset[type]] = frozenset({int, float, complex, bool, str, bytes, bytearray, type(None), range})
# Parts of the program, or what leads to all of it.
_FOREIGN: Final[tuple[type, ...]] = (
    *_FLAT,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.CodeType,
    types.FrameType,
    types.TracebackType,
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
    asyncio.Future,
    asyncio.AbstractEventLoop,
    enum.Enum,
    logging.Logger,
    threading.Thread,
)
_GC: Final = 16  # bytes before an object that the garbage collector knows; not in its own `__sizeof__`
_SIZES: Final[dict[type, tuple[Callable[[Any], int], int]]] = {
    str: (str.__sizeof__, 0),
    bytes: (bytes.__sizeof__, 0),
    int: (int.__sizeof__, 0),
    float: (float.__sizeof__, 0),
    dict: (dict.__sizeof__, _GC),
    list: (list.__sizeof__, _GC),
    tuple: (tuple.__sizeof__, _GC),
}
_SHORT: Final[dict[type, int]] = {dict: 1500, list: 400, tuple: 400}  # bytes with some thirty items
_HASHED: Final = (set, frozenset, deque)
_SIZED: Final[tuple[type, ...]] = (list, dict, tuple, *_HASHED)


def sizeof(value: Any) -> int:
    """
    Estimated bytes of *value* with everything it alone reaches.

    Within 15 % of a full walk for conversations and the like, in a small part of its time: long containers are
    sampled, and the lengths of their texts summed up. Items of containers, attributes in ``__dict__`` and
    ``__slots__``, and what extension types refer to are followed sixteen levels deep, up to some ten thousand objects;
    what is beyond counts as little or nothing. An object met twice counts once.

    *value* itself always counts. Of what it reaches, an object that more than some sixteen others hold beside it is
    shared (a system prompt in every entry, the keys of messages) and counts as nothing. So does what leads from a
    value to the rest of the program: functions, modules, methods, tasks, threads, event loops, loggers and members of
    enumerations count without what they refer to.

    A value that says its size in an ``nbytes`` attribute (an array, a `History` with *max_bytes*) is believed. That and
    a ``__sizeof__`` of its own are all the code of a value that runs. Never raises: what cannot be measured counts as
    its shell. Safe to call from any thread, also while others change the value.
    """
    kind = type(value)
    if kind is str:
        return str.__sizeof__(value)
    if kind in _FLAT:
        return sys.getsizeof(value)
    try:
        size = sys.getsizeof(value, _SHELL)
        within = _handful(value, kind)
        if within is None:
            within = round(_Walk({id(value)}, _OBJECTS).below([value], kind, 1.0, _DEPTH))
        return size + within
    except Exception:  # the value's own code, which is asked in passing; or another thread changed it
        return _shell(value)


def _handful(value: Any, kind: type) -> int | None:
    """What *value* refers to, if that is a few texts and numbers: the walk by levels costs more to set up."""
    own = 0
    if kind in _SHORT:
        if len(value) > _HANDFUL:
            return None
        found = [*value, *value.values()] if kind is dict else list(value)
    else:
        what = _kind(kind)
        if what.foreign or what.tells or what.base is not None:
            return None
        found = _referents(value)
        if not found or len(found) > _HANDFUL or found.pop() is not kind:
            return None
        if what.slots >= 0:
            own = _ATTRIBUTES
    if not _FLAT.issuperset(map(type, found)):
        return None
    return own + sum([_shell(item) for item in {id(item): item for item in found}.values() if _refs(item) <= _FEW + 1])


class _Walk:
    """One call of `sizeof`. A *weight* says how many objects of the value each that is looked at stands for."""

    __slots__ = ("left", "seen")

    def __init__(self, seen: set[int], left: int) -> None:
        self.seen = seen  # ids; of what has one holder only, there is no need to remember it
        self.left = left

    def below(self, level: list[Any], kind: type, weight: float, depth: int) -> float:
        """All that *level*, objects of one *kind*, refer to."""
        total = 0.0
        base: Any = kind
        if kind not in _SHORT:
            what = _kind(kind)
            base = what.base
            if what.foreign:
                return 0.0
            if what.tells:
                level, total = _told(level, weight)
                if not level:
                    return total
            if what.hides_dict(level[0]):
                total += weight * len(level) * _ATTRIBUTES
        if base is not None:
            length: Any = base.__len__
            if max(map(length, level)) > _EXACT:
                long = [item for item in level if length(item) > _EXACT]
                level = [item for item in level if length(item) <= _EXACT]
                # Long ones in long ones multiply: the deeper, the fewer are looked into.
                chosen = _some(long, 1 << max(0, depth // 2 - 4))
                part = weight * len(long) / len(chosen)
                for item in chosen:
                    total += part * self.long(item, base, length(item), depth - 1)
        if not level:
            return total
        if (count := len(level)) > _BROAD:
            level = _some(level, _BROAD)
            weight *= count / len(level)
        if base is not dict:
            return total + self.count(_referents(*level), weight, depth)
        # A dict does not refer to its keys, as the garbage collector sees it, if all are texts.
        found = list(chain.from_iterable(map(dict.values, level)))
        total += self.keys(level, len(found), weight)
        if kind is not dict:
            known = set(map(id, chain(found, *map(dict.keys, level))))
            found += [part for part in _referents(*level) if id(part) not in known]
        return total + self.count(found, weight, depth)

    def keys(self, level: list[dict[Any, Any]], number: int, weight: float) -> float:
        """The keys of short dicts: mostly the same objects, or at least of the same length."""
        if len(level) <= 4:  # noqa: PLR2004 - so few that each key may be another
            return self.count(list(chain.from_iterable(map(dict.keys, level))), weight, 2)
        keys = list(chain.from_iterable(map(dict.keys, _some(level, 4))))
        # One that some of the dicts share counts by its share.
        own = sum([_shell(key) / max(1, _refs(key) - _SOLE) for key in keys if _refs(key) < _FEW])
        return weight * own * number / max(1, len(keys))

    def count(self, found: list[Any], weight: float, depth: int) -> float:
        """*found* and all below, each object once."""
        total = 0.0
        self.left -= len(found)
        # What this list and one container hold is nobody else's. The others are picked first, since the list of those
        # counts as a holder, too.
        several = [item for item in found if _refs(item) > _SOLE]
        own = found
        if several:
            own = [item for item in found if _refs(item) <= _SOLE]
            distinct = dict(zip(map(id, several), several, strict=True))
            for known in distinct.keys() & self.seen:
                del distinct[known]
            shared = [item for item in distinct.values() if _refs(item) > _FEW]
            own += [item for item in distinct.values() if _refs(item) <= _FEW]
            for item in shared:
                del distinct[id(item)]
            self.seen.update(distinct)
            if shared:
                total += self.shared(shared, several, weight, depth)
        kinds = set(map(type, own))
        for kind in kinds:
            if kind not in _FLAT and issubclass(kind, type):
                continue
            alike = own if len(kinds) == 1 else [item for item in own if type(item) is kind]
            total += weight * _sizes(alike, kind)
            if kind not in _FLAT and depth and self.left > 0:
                total += self.below(alike, kind, weight, depth - 1)
        return total

    def shared(self, items: list[Any], found: list[Any], weight: float, depth: int) -> float:
        """What has many holders, unless they are all in here: then it counts, and only once."""
        total = 0.0
        hits: Counter[int] | None = None
        for item in items:
            kind = type(item)
            if kind in _FLAT:
                if _shell(item) < _SMALL:
                    continue
            elif _kind(kind).foreign:
                continue
            if hits is None:
                hits = Counter(map(id, found))
            here = hits[id(item)]
            # Each occurrence is held by its container, by the list of all found, and by that of those with several.
            if _refs(item) - here * (2 + weight) <= _FEW:
                self.seen.add(id(item))
                total += _shell(item)
                if kind not in _FLAT and depth and self.left > 0:
                    total += self.below([item], kind, 1.0, depth - 1)
        return total

    def long(self, container: Any, base: Any, length: int, depth: int) -> float:
        """What one container with many items refers to."""
        total = 0.0
        if base in _HASHED or base is dict:
            # These can only be walked in order.
            length = min(length, _REACH)
            items = dict.values(container) if base is dict else base.__iter__(container)
            every = _survey(list(islice(items, length)), list)
            if base is dict:
                keys = _some(list(islice(dict.keys(container), length)), _PILOT)
                total += self.count(keys, base.__len__(container) / len(keys), 2)
            length = base.__len__(container)
        else:
            every = _survey(container, base)
        if not every:
            return total
        return total + self.alike(every, length / len(every), depth)

    def alike(self, every: list[Any], weight: float, depth: int) -> float:
        """Many items, each standing for *weight*, measured by a pilot if they are of one kind, or of a few."""
        estimate = self.by_pilot(every, weight, depth)
        if estimate is not None:
            return estimate
        shapes: defaultdict[Any, list[Any]] = defaultdict(list)
        for item, shape in zip(every, _shapes(every), strict=True):
            shapes[shape].append(item)
        if len(shapes) > _SHAPES:
            return self.broadly(every, weight, depth)
        total = 0.0
        for group in shapes.values():
            estimate = None if len(group) <= _EXACT else self.by_pilot(group, weight, depth)
            total += self.broadly(group, weight, depth) if estimate is None else estimate
        return total

    def broadly(self, every: list[Any], weight: float, depth: int) -> float:
        """Many items that are alike in nothing."""
        if len(every) <= _EXACT:
            return self.count(every, weight, depth)
        # A conversation begins with what is unlike the rest.
        some = _some(every[2:], _BROAD)
        return self.count(every[:2], weight, depth) + self.count(some, weight * (len(every) - 2) / len(some), depth)

    def by_pilot(self, every: list[Any], weight: float, depth: int) -> float | None:
        """Many items, by some of them and the lengths of all; ``None`` if they are not alike."""
        count = len(every)
        pilot = _some(every, _PILOT)
        kinds = set(map(type, pilot))
        if kinds <= _FLAT:
            return None if max(map(_refs, pilot)) > _FEW else weight * _sizes_mixed(every)
        if len(kinds) > 1:
            return None
        excess = _excess(pilot, every, len(pilot) / count, 6)
        if excess is None:
            return None
        weight *= count / len(pilot)
        return max(0.0, self.count(pilot, weight, depth) + weight * excess)


def _excess(  # noqa: PLR0911 - many ways to be no table
    pilot: list[Any], every: list[Any], share: float, depth: int
) -> float | None:
    """
    How many bytes more the texts of *every* come to than those of *pilot*, which is a *share* of them, would have it.

    In bytes of the pilot. ``None`` if the objects do not refer to the same kinds of things in the same order.
    """
    kind = type(pilot[0])
    if kind in _SHORT:
        try:
            # Half the price of comparing types: whatever is of another kind cannot answer.
            if max(map(_SIZES[kind][0], every)) > _SHORT[kind]:
                return None
        except TypeError:
            return None
    else:
        what = _kind(kind)
        if what.foreign or what.base in _HASHED:
            return 0.0  # the pilot's stand for the others'
        if what.base is not None or what.tells or set(map(type, every)) != {kind}:
            return None
    rows = _referents(*pilot)
    width, left = divmod(len(rows), len(pilot))
    if width > _WIDTH:
        return None
    everything = _referents(*every)
    if left or len(everything) != width * len(every):
        width = 1  # no table; still good if all that is referred to is of one kind
        if not _FLAT.issuperset(map(type, everything)) and len(set(map(type, everything))) > 1:
            return None
    columns: list[tuple[int, int]] = []
    excess = 0.0
    for place in range(width if rows else 0):
        column = rows[place::width]
        if _FLAT.issuperset(map(type, column)):
            columns.append((_sizes_own(column), place))
        elif len(set(map(type, column))) > 1 or not depth:
            return None
        elif not issubclass(type(column[0]), type):
            nested = _excess(column, everything[place::width], share, depth - 1)
            if nested is None:
                return None
            excess += nested
    most = sum(size for size, _ in columns) / 4
    for size, place in columns:
        if size > most:
            excess += _sizes_own(everything[place::width]) * share - size
    return excess


class _Kind:
    """What there is to know of a class."""

    __slots__ = ("base", "foreign", "of", "slots", "tells")

    def __init__(self, kind: type) -> None:
        self.of = weakref.ref(kind)
        self.foreign = issubclass(kind, _FOREIGN)
        self.tells = not self.foreign and hasattr(kind, "nbytes")
        self.base: Any = next((base for base in _SIZED if issubclass(kind, base)), None)
        # How many attributes it has beside those in a ``__dict__``; -1 without one.
        self.slots = -1
        if self.base is None and kind.__dictoffset__:
            parts = chain.from_iterable(vars(base).values() for base in kind.__mro__)
            self.slots = sum(type(part) is types.MemberDescriptorType for part in parts)

    def hides_dict(self, item: Any) -> bool:
        """Whether *item* keeps attributes without a dict, or its referents do not show the dict."""
        if self.slots < 0:
            return False
        found = _referents(item)
        return dict not in map(type, found) or len(found) > self.slots + 2  # the dict and the class


# By id, since a class as a key would be kept alive; and its reference tells it from a later one at the same address.
_kinds: dict[int, _Kind] = {}


def _kind(kind: type) -> _Kind:
    known = _kinds.get(id(kind))
    if known is None or known.of() is not kind:
        if len(_kinds) >= _KINDS:
            _kinds.clear()
        known = _kinds[id(kind)] = _Kind(kind)
    return known


def _some(items: list[Any], wanted: int) -> list[Any]:
    """Up to *wanted* of *items*, spread evenly and in no rhythm: at multiples of the golden ratio."""
    count = len(items)
    return items if count <= wanted else [items[place] for place in {int(part * count) for part in _PARTS[:wanted]}]


def _survey(items: Any, base: Any) -> list[Any]:
    """All items of a list or tuple, or of a long one two thousand, in runs spread evenly."""
    count = base.__len__(items)
    if count <= _SURVEY:
        return list(base.__getitem__(items, slice(None)))
    starts = range(0, count - _BLOCK, count * _BLOCK // _SURVEY)
    return list(chain.from_iterable(base.__getitem__(items, slice(start, start + _BLOCK)) for start in starts))


def _shapes(items: Sequence[Any]) -> list[Any]:
    """What to sort *items* by: types, and for dicts and tuples what they hold."""
    if set(map(type, items)) == {dict} and max(map(len, items)) <= _WIDTH:
        return [tuple(map(type, dict.values(item))) for item in items]
    return list(map(type, items))


def _told(items: list[Any], weight: float) -> tuple[list[Any], float]:
    """Those that do not say their size, and the bytes of those that do, beyond their shells."""
    silent: list[Any] = []
    total = 0.0
    for item in items:
        told = _nbytes(item)
        if told is None:
            silent.append(item)
        else:
            total += weight * max(0, told - _shell(item))
    return silent, total


def _nbytes(item: Any) -> int | None:
    try:
        told = item.nbytes
    except Exception:  # the value's own code
        return None
    return told if isinstance(told, int) else None


def _shell(item: Any) -> int:
    try:
        return sys.getsizeof(item, _SHELL)
    except Exception:  # the value's own code
        return _SHELL


def _sizes(items: list[Any], kind: type) -> int:
    """The shells of *items*, all of one kind."""
    known = _SIZES.get(kind)
    if known is None:
        return sum(map(_shell, items))
    size, extra = known
    return sum(map(size, items)) + extra * len(items)


def _sizes_own(items: list[Any]) -> int:
    """The same for many texts, without the large ones that are shared: as elsewhere, each such counts as nothing."""
    try:
        sizes = list(map(str.__sizeof__, items))
    except TypeError:
        sizes = list(map(_shell, items))
    total = sum(sizes)
    if max(sizes) > _LARGE:
        total -= sum([size for item, size in zip(items, sizes, strict=True) if size > _SMALL and _refs(item) > _FEW])
    return total


def _sizes_mixed(items: list[Any]) -> int:
    """The same, whatever they are: mostly texts."""
    try:
        return sum(map(str.__sizeof__, items))
    except TypeError:
        return sum(map(_shell, items))
