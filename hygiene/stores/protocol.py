"""What every store does, and the records that go in and out of it."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self, runtime_checkable

__all__ = [
    "BadRow",
    "Change",
    "Delete",
    "Head",
    "Kind",
    "Record",
    "RecoveryReport",
    "SaveLog",
    "SaveValue",
    "Store",
]

Kind = Literal["value", "log"]
"""How an entry is kept: ``"value"``, whole; ``"log"``, one row an item."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a store knows of an entry without its content."""

    space: str
    key: Any
    kind: Kind
    version: int
    """Counts the saves of this key, also over deletions; at least 1."""
    bytes: int
    """Size of the encoded content."""
    saved_at: float
    """Seconds since 1970, by the clock of the machine that saved it."""
    expire_at: float | None
    """When it is over, in seconds since 1970; ``None``: never. What is over is absent in every method."""
    spans: tuple[tuple[int, int], ...] = ((0, 1),)
    """The sequence numbers that the log has, as ``(first, one behind the last)``, ascending. A value has the one 0."""
    next: int = 1
    """The sequence number that the next appended item gets."""

    @property
    def count(self) -> int:
        """Items of the log; 1 for a value."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def sequences(self) -> Iterator[int]:
        """The sequence number of each item, in order."""
        return itertools.chain.from_iterable(itertools.starmap(range, self.spans))


@dataclass(frozen=True, slots=True)
class Record:
    """An entry as it is stored: its head and its content."""

    head: Head
    value: Any
    """The decoded value; of a log, a new ``list`` of its decoded items, in the order of their sequence numbers."""


@dataclass(frozen=True, slots=True)
class SaveValue:
    """Save an entry whole; whatever was there before, a value or a log, is gone."""

    space: str
    key: Hashable
    data: bytes
    """The value, as `Store.encode` gave it."""
    base: int | None = None
    """The version that this builds on; 0: there must be none; ``None``: whatever is there."""
    expire_at: float | None = None
    """When it is over, in seconds since 1970. Each save sets it anew."""


@dataclass(frozen=True, slots=True)
class SaveLog:
    """
    Change a log: drop, then put, then append. It is created if it is not there.

    Sequence numbers start at 0 and are given to appended items in order, beginning with `Head.next`. Each is used once:
    an item that is dropped leaves a hole, and the others keep their numbers.
    """

    space: str
    key: Hashable
    base: int | None = None
    """The version that this builds on; 0: there must be none; ``None``: whatever is there."""
    append: Sequence[bytes] = ()
    """New items at the end, each as `Store.encode` gave it."""
    drop: Sequence[tuple[int, int]] = ()
    """Sequence numbers that leave, as ``(first, one behind the last)``; what the log does not have is ignored."""
    put: Mapping[int, bytes] = field(default_factory=dict)
    """Items by sequence number, below `Head.next`: in the place of one that is there, or in a hole."""
    replace: bool = False
    """Begin with an empty log, whatever was there, and count from 0 again."""
    expire_at: float | None = None
    """When it is over, in seconds since 1970. Each save sets it anew."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove an entry; with ``base=None`` or 0 it need not exist."""

    space: str
    key: Hashable
    base: int | None = None
    """The version that is meant; ``None``: whatever is there."""


Change = SaveValue | SaveLog | Delete


@dataclass(frozen=True, slots=True)
class BadRow:
    """One thing that recovery found wrong, and has put in order."""

    space: str | None
    """``None`` if it could not be made out."""
    key: Any
    sequence: int | None
    """The place in the log; ``None`` if it is about the entry itself."""
    problem: str
    quarantined: bool
    """Whether the row is kept in quarantine; ``False`` where there was no row left to keep."""


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What a look at everything in a store has found."""

    entries: int
    """Heads looked at."""
    items: int
    """Rows of content looked at."""
    bad: tuple[BadRow, ...] = ()
    """Rows that are not served any more, and rows that are missing."""
    repaired: tuple[str, ...] = ()
    """What was put right without a loss, such as an index that was built anew."""

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.bad and not self.repaired


@runtime_checkable
class Store(Protocol):
    """
    What keeps entries outside of memory.

    Every method may be called from any thread, at any time. All of them block: for as long as a read of a local file
    takes, or a round trip to a server. None calls back.

    Raises:
        StoreUnavailable: from any method: the store cannot be reached, or cannot be written to now (locked, disk
            full, read-only). Nothing was changed, and the same call may succeed later.
        StoreError: from any method: the store is closed, or what it holds is damaged.
    """

    def encode(self, value: Any, key: Hashable = None) -> bytes:
        """
        *value* as the bytes that `save` takes.

        Args:
            value: What comes back equal: ``None``, ``bool``, ``int`` (64 bit), ``float``, ``str``, ``bytes``,
                ``datetime``, and ``list`` and ``dict`` of these. With ``codec="pickle"``, what pickle takes.
            key: For the error.

        Raises:
            NotStorable: it would come back as something else, or not at all. The message names the key, the path
                inside the value and the type.
        """
        ...

    def decode(self, data: bytes) -> Any:
        """The value that `encode` made *data* of; raises `StoreError` if it is damaged."""
        ...

    def load(self, space: str, key: Hashable) -> Record | None:
        """The entry, or ``None`` if it is not there. A damaged item is put in quarantine, and the rest is returned."""
        ...

    def contains(self, space: str, key: Hashable) -> bool:
        """Whether the entry is there."""
        ...

    def save(self, changes: Sequence[Change], *, sync: bool = False) -> list[Head | None]:
        """
        Save all *changes*, in their order, or none of them.

        Args:
            changes: May be of several spaces, and may name a key twice.
            sync: Whether to return only when this, and everything saved before, is on disk and survives the loss of
                power. Otherwise it survives the end of the process. It is made so even if *changes* is empty.

        Returns:
            The new head for each change, ``None`` for a deletion. ``head.next`` tells the sequence numbers that the
            appended items have got: the last ones before it.

        Raises:
            VersionConflict: an entry has another version than a change builds on. Nothing was saved; the error lists
                all that conflict, so that the others can be saved without them.
            ValueError: a change asks for what cannot be, such as to put an item behind the end.
            NotStorable: a key, or an item that is too large.
        """
        ...

    def keys(self, space: str) -> Iterator[Any]:
        """
        Keys of *space*.

        In slices: no lock and no transaction is held while the caller has one. What is there from beginning to end
        comes exactly once; what is saved or deleted meanwhile may come or not.
        """
        ...

    def heads(self, space: str) -> Iterator[Head]:
        """Heads of *space*, in slices as in `keys`."""
        ...

    def items(self, space: str) -> Iterator[tuple[Any, Any]]:
        """Keys and values of *space*, in slices as in `keys`; one value at a time is in memory."""
        ...

    def spaces(self) -> list[str]:
        """Names of the spaces that have entries."""
        ...

    def count(self, space: str) -> int:
        """Number of entries in *space*; takes time in proportion to it."""
        ...

    def nbytes(self, space: str) -> int:
        """Encoded size of everything in *space*, without keys; takes time in proportion to the number of entries."""
        ...

    def expire(self, now: float | None = None) -> int:
        """
        Delete what is over at *now* (seconds since 1970; default: the store's clock), and return how many that were.

        What is over is absent for every other method even before; this gives the room back.
        """
        ...

    def recover(self) -> RecoveryReport:
        """Look at everything, put what does not fit in quarantine, and report it. Others may go on meanwhile."""
        ...

    def close(self) -> None:
        """Let go of files and connections. Calling it again does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
