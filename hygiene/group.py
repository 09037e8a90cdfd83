"""Several dicts that belong together: columns of one table, whose rows live and leave as a whole.

The rows are a registry of their own, which has all the limits and whose values nobody sees. A column is a registry
without limits, which tells the rows what is used and written; when a row leaves, its entries leave every column in the
same step, under the one lock that rows and columns share.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hygiene.adoption import fill, give_back, like
from hygiene.errors import HOOK_ERRORS
from hygiene.events import Cause, Entry, RegistryStats
from hygiene.keeping import Loading
from hygiene.kernel import MISSING, is_atomic, oldest, store, take
from hygiene.limits import Limits
from hygiene.registry import CLOSED, POLLS, Gone, Registry, Timed, _Offer, _Place, make

__all__ = ["Group"]

_look = dict.get  # a single C call


class Group:
    """
    Columns that share one life: a use of any is a use of the row, and a row is evicted from all of them together.

    A row is busy if any of its values is. The bound counts rows. Each value that leaves is told by itself.

    Args:
        limits: What the rows keep to; the hooks, *values* and *default_factory* apply to every column.
        columns: The names of the columns, each with a function that derives the row's key from the column's
            (``None``: they are the same).
        owner: The object whose attributes the columns are.
        name: What logs call the table.
    """

    def __init__(
        self,
        limits: Limits,
        columns: Mapping[str, Callable[[Any], Any] | None],
        *,
        owner: object | None = None,
        name: str | None = None,
    ) -> None:
        self._limits = limits
        self._derive = dict(columns)
        self.rows: _Rows = make(_Rows, limits, owner)
        self.rows._name = limits.name or name

    def adopt(self, column: str, source: dict[Any, Any]) -> Registry[Any, Any]:
        """The registry that takes the place of *source* as this column; it replaces an earlier one."""
        if column not in self._derive:
            raise ValueError(f"wanted one of the columns {', '.join(self._derive)}; found {column!r}")
        registry: _Column = like(source, self._limits, self.rows._owner(), column, _Column)
        if self._limits.name is not None:
            registry._name = f"{self._limits.name}.{column}"
        registry._join(self, self._derive[column])
        earlier = self.rows._columns.get(column, _no_column)()
        self.rows._replace_column(column, registry)
        try:
            registry._begin_keeping()
            fill(registry, source)
        except BaseException:
            if earlier is not None:
                earlier._sizes, earlier._lent = (None, None) if self.rows._sizes is None else ({}, {})
                self.rows._replace_column(column, earlier)
            give_back(registry, earlier)
            raise
        return registry

    @property
    def owner(self) -> Any:
        """The object whose attributes the columns are; ``None`` if there is none, or it is gone."""
        return self.rows.owner

    def holds(self, registry: Registry[Any, Any]) -> bool:
        """Whether *registry* is one of the columns now."""
        return any(reference() is registry for reference in list(self.rows._columns.values()))

    def stats(self) -> RegistryStats:
        """The numbers of the rows."""
        return self.rows.stats()

    def _set_limit(self, name: str, value: Any) -> None:
        """Change a limit of all columns, those to come included."""
        limits = self._limits.changed(name, value)
        rows = self.rows
        with rows._lock:
            self._limits = limits
            for column in rows._present():
                column._limits = column._limits.changed(name, getattr(limits, name))
        rows._set_limit(name, value)


def _no_column() -> None:
    return None


class _ColumnReference(weakref.ref["_Column"]):
    """A weak reference to a column, with the data that gives its weight back to the rows once it was collected."""

    __slots__ = ("derived", "sizes")
    sizes: dict[Any, int] | None
    derived: dict[Any, Any] | None


class _Rows(Registry[Any, None]):
    """The rows of a group: key, order, times, leases and weight of each; the values are in the columns."""

    __slots__ = ("_collected", "_columns")

    def _configure(self, limits: Limits, owner: object | None = None) -> None:
        self._columns: dict[str, _ColumnReference] = {}
        self._collected: list[_ColumnReference] = []  # columns that the garbage collector took before they were closed
        super()._configure(limits, owner)
        self._closings = None  # the values are in the columns
        # A row weighs what its columns say. It has no value that could be measured at the end of a lease.
        self._lent = None

    def _replace_column(self, name: str, column: _Column) -> None:
        """Let *column* stand for its attribute. The weight of an earlier column does not count beside it."""
        # A callback of a weak reference runs at any moment, in any thread, so it takes no lock: it only notes the fact.
        reference = _ColumnReference(column, self._collected.append)
        reference.sizes = column._sizes
        reference.derived = None if column._derive is None else column._derived
        with self._lock:
            earlier, self._columns[name] = self._columns.get(name), reference
            replaced = None if earlier is None else earlier()
            if earlier is not None:
                self._release_weight(earlier)
            if replaced is not None:
                replaced._sizes = replaced._lent = None

    def _release_weight(self, reference: _ColumnReference) -> None:
        """The bytes of this column no longer belong to the rows. The lock is held."""
        sizes, derived = reference.sizes, reference.derived
        reference.sizes = None
        for key, size in () if sizes is None else list(sizes.items()):
            row = key if derived is None else derived.get(key, key)
            if self._sizes is not None and row in self._sizes:
                self._resize(row, self._sizes[row] - size)

    def _settle_collected(self) -> None:
        """Forget columns that were collected: their bytes, and the rows that were theirs alone."""
        while self._collected:
            with self._lock:
                try:
                    reference = self._collected.pop()
                except IndexError:  # another thread was faster
                    return
                self._release_weight(reference)
                columns = self._present()
                for row in list(dict.keys(self)):
                    if not any(column._keys_of(row) for column in columns):
                        self._drop(row, Cause.CLOSED)

    def _measure_from_now_on(self, *, wanted: bool) -> None:
        super()._measure_from_now_on(wanted=wanted)
        self._lent = None
        for reference in self._columns.values():
            column = reference()
            if column is not None:
                column._measure_from_now_on(wanted=wanted)
                reference.sizes = column._sizes

    def _weigh_all(self) -> None:
        for column in self._present():
            column._weigh_all()

    def _over(self) -> bool:
        if self._collected:
            self._settle_collected()
        return super()._over()

    def stats(self) -> RegistryStats:
        """The numbers of the rows."""
        self._settle_collected()
        return super().stats()

    def _rerank(self, key: Any) -> None:
        """The column that was used asks for the importance; the row has no value to rank."""

    def _plain_writes(self) -> bool:
        return False

    def _present(self) -> Iterable[_Column]:
        return [column for reference in list(self._columns.values()) if (column := reference()) is not None]

    def _discard(self, key: Any, cause: Cause, gone: list[Gone]) -> bool:
        """The whole row leaves: each of its values is told as leaving its column."""
        try:
            self._discard_values(key, cause, gone)
            return self._drop(key, cause)
        except BaseException:  # a signal handler has raised: a row leaves as a whole
            self._discard_values(key, cause, gone)
            self._drop(key, cause)
            raise

    def _discard_values(self, key: Any, cause: Cause, gone: list[Gone]) -> None:
        for column in self._present():
            for name in column._keys_of(key):
                column._discard_alone(name, cause, gone)

    def _reconcile(self) -> None:
        columns = self._present()
        for column in columns:
            column._reconcile_values()
        rows: dict[Any, int] = {}
        for column in columns:
            for key in list(dict.keys(column)):
                row = column._row(key)
                rows[row] = rows.get(row, 0) + (0 if column._sizes is None else column._sizes.get(key, 0))
        for row in rows:
            if not dict.__contains__(self, row):
                store(self, row, None)
        for row in [row for row in list(dict.keys(self)) if row not in rows]:
            take(self, row, None)
        super()._reconcile()
        if self._sizes is not None:
            self._sizes.update(rows)
            self._bytes = sum(self._sizes.values())

    def _discard_oldest(self, cause: Cause, gone: list[Gone]) -> bool:
        key = oldest(self)
        return key is not MISSING and self._discard(key, cause, gone)

    def _drop(self, key: Any, cause: Cause) -> bool:
        """The row itself leaves; nobody is told, since its values were."""
        return super()._discard(key, cause, [])

    def _is_busy(self, entry: Entry[Any, Any]) -> bool:
        for column in self._present():
            for name in column._keys_of(entry.key):
                held: Entry[Any, Any] = Entry(name, _look(column, name, MISSING), self._owner())
                if held.value is not MISSING and column._is_busy_alone(held):
                    return True
        return False

    def _measure_lent(self, newest: Any = MISSING) -> None:
        """Measure the values that were read or leased in any column; evict if the rows exceed their bound."""
        for column in self._present():
            column._remeasure()
        if self._over():
            self._sweep(newest)

    def _may_leave(self, key: Any, value: Any) -> bool | None:  # noqa: ARG002 - the values are in the columns
        answers = [
            column._keeper.may_leave(name, _look(column, name, MISSING))
            for column in self._present()
            if column._keeper is not None
            for name in column._keys_of(key)
        ]
        return False if False in answers else None if None in answers else True

    def _is_unsaved(self, key: Any) -> bool:
        return any(
            name in column._keeper.writer
            for column in self._present()
            if column._keeper is not None
            for name in column._keys_of(key)
        )

    def _entries_of(self, gone: list[Gone]) -> int:
        return len({column._row(key) for column, key, *_ in gone if isinstance(column, _Column)})

    def _renew_locks(self) -> None:
        super()._renew_locks()
        for column in self._present():
            column._lock = self._lock

    def _after_fork(self) -> None:
        super()._after_fork()
        for column in self._present():  # whichever of them was given its new lock first, it is one lock
            column._lock = self._lock


class _Column(Timed[Any, Any]):
    """One dict of a group. It has no limits: what needs one is asked of the rows."""

    __slots__ = ("_derive", "_derived", "_group", "_members", "_rows")

    def __new__(cls, source: Any = (), /, **limits: Any) -> Any:
        # So does code that makes another dict of the same class (``dataclasses.asdict``): no column of ours.
        return cls._copies_as()(source, **limits)

    @classmethod
    def _copies_as(cls) -> type[Any]:
        return Registry

    def _configure(self, limits: Limits, owner: object | None = None) -> None:
        super()._configure(limits, owner)
        self._byte_bound = None
        self._order = None
        self._open(sys.maxsize, None, written=False, used=False)
        self._due = -math.inf
        self._clocked = True
        self._strict = False  # a name given for several columns applies to the values that have it

    def _join(self, group: Group, derive: Callable[[Any], Any] | None) -> None:
        self._group = group
        self._rows = group.rows
        self._lock = group.rows._lock
        self._asking = group.rows._asking
        self._derive = derive
        self._members: dict[Any, dict[Any, None]] | None = None if derive is None else {}
        self._derived: dict[Any, Any] = {}

    def _set_limit(self, name: str, value: Any) -> None:
        if name == "default_factory":  # of this column alone
            super()._set_limit(name, value)
        else:
            self._group._set_limit(name, value)

    @property
    def group(self) -> Group:
        """The group that this is a column of."""
        return self._group

    def _choose_paths(self) -> None:
        self._take_paths(reads=False, misses=False, writes=False, moves=False, uses_in_order=False)

    def _row(self, key: Any) -> Any:
        """The row that *key* belongs to; for what is here it was asked for before, without the lock."""
        if self._derive is None:
            return key
        row = self._derived.get(key, MISSING)
        return self._ask_row(key) if row is MISSING else row

    def _ask_row(self, key: Any) -> Any:
        assert self._derive is not None
        try:
            row = self._derive(key)
            hash(row)
        except HOOK_ERRORS as error:
            self._hook_failed("key", key, error)
            return key
        return row

    def _put(
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
        if self._derive is not None and key not in self._derived:
            self._derived[key] = self._ask_row(key)
        try:
            value = super()._put(key, value, keep=keep, back=back, loading=loading, ago=ago, offer=offer)
        finally:
            if not dict.__contains__(self, key):  # refused
                self._derived.pop(key, None)
        if self._rows._byte_bound is not None:  # a value in another column may have grown in place
            self._rows._measure_lent(self._row(key))
        return value

    def _keys_of(self, row: Any) -> list[Any]:
        if self._members is not None:
            return list(self._members.get(row, ()))
        return [row] if dict.__contains__(self, row) else []

    # What happens to an entry happens to its row.

    def _now(self) -> float:
        return 0.0 if self._rows._timer is None else self._rows._timer()

    def _settle(self, key: Any) -> None:
        if isinstance(self._rows, Timed):
            self._rows._settle(self._row(key))

    def _over_by(self, key: Any) -> Cause | None:
        return self._rows._over_by(self._row(key)) if isinstance(self._rows, Timed) else None

    def _expire_due(self, gone: list[Gone]) -> int:
        return self._rows._expire_due(gone)

    def _touch(self, key: Any) -> None:
        self._rows._touch(self._row(key))

    def _rerank(self, key: Any) -> None:
        if self._limits.importance is not None:
            value = _look(self, key, MISSING)
            rank = self._rank(key, value)
            with self._lock:
                self._rows._enter(self._row(key), None, rank)

    def _times(self, key: Any) -> tuple[float | None, float | None]:
        return self._rows._times(self._row(key))

    def _fits(self, key: Any, old: Any, size: int | None) -> bool:  # noqa: ARG002 - the row may be there without it
        rows, row = self._rows, self._row(key)
        if not dict.__contains__(rows, row) and len(rows) + rows._promised(row) >= rows._bound:
            return False
        if rows._byte_bound is None or size is None or self._sizes is None:
            return True
        return rows._bytes - self._sizes.get(key, 0) + size <= rows._byte_bound

    def _take_place(self, key: Any) -> _Place | None:
        return self._rows._take_place(self._row(key))

    def _give_place_back(self, place: _Place | None) -> None:
        self._rows._give_place_back(place)

    def _promised(self, key: Any) -> int:
        return self._rows._promised(self._row(key))

    def _may_fit(self, key: Any, size: int | None) -> bool:
        rows = self._rows
        if rows._byte_bound is None or self._sizes is None or size is None:
            return True
        return rows._may_free(rows._bytes - self._sizes.get(key, 0) + size - rows._byte_bound, self._row(key))

    def _make_room(self, key: Any, size: int, gone: list[Gone]) -> bool:
        return self._rows._make_room(self._row(key), size, gone)

    def _enter(self, key: Any, size: int | None, rank: float) -> None:
        rows, row = self._rows, self._row(key)
        if not rows._guarded and not is_atomic(row):
            rows._guard()
        if not dict.__contains__(rows, row):
            store(rows, row, None)
        if self._members is not None:
            self._members.setdefault(row, {})[key] = None
        super()._enter(key, size, rank)
        rows._enter(row, None, rank)

    def _resize(self, key: Any, size: int) -> None:
        rows = self._rows
        if self._sizes is not None and rows._sizes is not None:
            row = self._row(key)
            rows._resize(row, rows._sizes.get(row, 0) + size - self._sizes.get(key, 0))
        super()._resize(key, size)

    def _stamp_write(self, key: Any) -> float:  # noqa: ARG002 - a column has no times
        return 0.0

    def _written_ago(self, key: Any) -> float:
        return self._rows._written_ago(self._row(key))

    def _written_before(self, key: Any, ago: float) -> float | None:
        # Putting back is no write: the row was written when the last of its columns was.
        rows, row = self._rows, self._row(key)
        if rows._limits.ttl is None:
            return None
        if dict.__contains__(rows, row):
            ago = min(ago, rows._written_ago(row))
        return self._now() - ago

    def _backdate(self, key: Any, written: float) -> None:
        self._rows._backdate(self._row(key), written)

    def _stamp_use(self, key: Any) -> None: ...

    def _ages(
        self,
        key: Any,
        written: float | None,  # noqa: ARG002 - those of the row count
        used: float | None,  # noqa: ARG002
        now: float,  # noqa: ARG002
    ) -> tuple[float | None, float | None]:
        return self._times(key)

    def _over(self) -> bool:
        return self._rows._over()

    def _sweep(self, newest: Any = MISSING) -> None:
        self._rows._sweep(newest if newest is MISSING else self._row(newest))

    def _discard(self, key: Any, cause: Cause, gone: list[Gone]) -> bool:
        row = self._row(key)
        try:
            discarded = self._discard_alone(key, cause, gone)
            if discarded and not any(column._keys_of(row) for column in self._rows._present()):
                self._rows._drop(row, cause)
        except BaseException:
            self._repair()  # the row, if it is empty by now
            raise
        return discarded

    def _discard_alone(self, key: Any, cause: Cause, gone: list[Gone]) -> bool:
        discarded = super()._discard(key, cause, gone)
        if self._members is not None:
            row = self._row(key)
            keys = self._members.get(row)
            if keys is not None:
                keys.pop(key, None)
                if not keys:
                    del self._members[row]
            self._derived.pop(key, None)
        return discarded

    def _reconcile(self) -> None:
        self._rows._reconcile()

    def _reconcile_values(self) -> None:
        """As `_reconcile`, for this column alone."""
        super()._reconcile()
        if self._members is None:
            return
        derived = {key: self._row(key) for key in list(dict.keys(self))}
        members: dict[Any, dict[Any, None]] = {}
        for key, row in derived.items():
            members.setdefault(row, {})[key] = None
        for key in [key for key in list(self._derived) if key not in derived]:
            self._derived.pop(key, None)
        self._derived.update(derived)  # the same dict: a reference to this column has it
        self._members = members

    def _restamp(self, keys: list[Any]) -> None: ...

    def _is_busy_alone(self, entry: Entry[Any, Any]) -> bool:
        return super()._is_busy(entry)

    def _is_busy(self, entry: Entry[Any, Any]) -> bool:
        return self._rows._is_busy(Entry(self._row(entry.key), None, entry.owner))

    def _pin_row(self, key: Any, pins: list[Any]) -> None:
        self._rows._pin_row(self._row(key), pins)

    def _unpin_row(self, pins: list[Any]) -> bool:
        return self._rows._unpin_row(pins)

    def _unpin_now(self, key: Any, pins: list[Any]) -> None:
        if self._lent is not None:
            self._lent[key] = None
            self._measure_lent()
        self._rerank(key)
        row = self._row(key)
        self._rows._unpin(row, pins)
        value = _look(self, key, MISSING)
        if self._keeper is not None and value is not MISSING and row not in self._rows._leases:
            self._keeper.settle(key, value)
        if self._overtaken is not None and row not in self._rows._leases:
            self._check_overtaken(key)

    def _is_leased(self, key: Any) -> bool:
        return self._row(key) in self._rows._leases

    def _be_watched(self, *, anew: bool = False) -> None:
        if anew or not self._rows._watched:  # or each write would promise another visit
            self._rows._be_watched(anew=anew)

    def _note_overflow(self) -> None:
        self._rows._note_overflow()

    def _poll_parked(self, most: int = POLLS) -> None:
        self._rows._poll_parked(most)

    def _waits_for_saves(self) -> bool:
        return self._rows._waits_for_saves()

    def _sweep_saved(self) -> None:
        self._rows._sweep_saved()

    def evict(self, key: Any) -> bool:
        """Drop the row of *key* from every column, unless it is leased or busy; says whether it left."""
        return self._rows.evict(self._row(key))

    def expire(self) -> int:
        """Drop every row whose time is over; says how many rows left."""
        return self._rows.expire()

    def trim(self, to: int | str) -> int:
        """Evict rows down to *to*; says how many left."""
        return self._rows.trim(to)

    def stats(self) -> RegistryStats:
        """The numbers of this column; *leased* and *overflowing* count rows."""
        rows = self._rows.stats()
        return dataclasses.replace(super().stats(), leased=rows.leased, overflowing=rows.overflowing)

    def _renew_locks(self) -> None:
        super()._renew_locks()
        self._lock = self._rows._lock

    def _after_fork(self) -> None:
        super()._after_fork()
        self._lock = self._rows._lock


CLOSED.update((_Rows, _Column))
