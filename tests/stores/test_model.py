"""A store against plain dicts, reopened at random."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hygiene.errors import VersionConflict
from hygiene.stores import Change, Delete, SaveLog, SaveValue, SQLiteStore
from hygiene.testing import ManualClock

SPACES = st.sampled_from(["s", "t"])
KEYS = st.sampled_from(["a", "b", ("c", 1)])
ITEMS = st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=5), st.just("x" * 3000)), max_size=4)
RANGES = st.lists(st.tuples(st.integers(-1, 8), st.integers(-1, 8)), max_size=2)
BASES = st.sampled_from(["current", "current", "whatever", "wrong"])
ENDS = st.one_of(st.none(), st.integers(1, 5))


class Entry:
    """What the model knows of an entry; a log is a dict by sequence number."""

    def __init__(self, value: Any, version: int, end: float | None, following: int = 1) -> None:
        self.value, self.version, self.end, self.next = value, version, end, following

    @property
    def seen(self) -> Any:
        return [self.value[n] for n in sorted(self.value)] if isinstance(self.value, dict) else self.value


class Stored(RuleBasedStateMachine):
    """What was saved is what is loaded, with its version and its sequence numbers; what conflicts changes nothing."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.clock = ManualClock()
        self.model: dict[tuple[str, Any], Entry] = {}
        self.highest: dict[tuple[str, Any], int] = {}
        self.store = SQLiteStore(self.folder / "chats.db", timer=self.clock)

    def live(self, place: tuple[str, Any]) -> Entry | None:
        entry = self.model.get(place)
        return entry if entry is not None and (entry.end is None or entry.end > self.clock()) else None

    def save(
        self, changes: list[Change], entries: dict[tuple[str, Any], Entry | None], *, fits: bool, sync: bool
    ) -> None:
        if not fits:
            try:
                self.store.save(changes, sync=sync)
            except VersionConflict:
                return
            raise AssertionError("a save that builds on another version went through")
        heads = self.store.save(changes, sync=sync)
        for (place, entry), head in zip(entries.items(), heads, strict=True):
            if entry is None:
                self.model.pop(place, None)
                assert head is None
                continue
            assert head is not None
            assert head.version > self.highest.get(place, 0)
            assert not (old := self.live(place)) or head.version == old.version + 1
            entry.version = self.highest[place] = head.version
            self.model[place] = entry
            sequences = sorted(entry.value) if isinstance(entry.value, dict) else [0]
            assert (sequences, entry.next) == (list(head.sequences), head.next)

    def base(self, place: tuple[str, Any], wanted: str) -> tuple[int | None, bool]:
        found = entry.version if (entry := self.live(place)) else 0
        return {"current": (found, True), "whatever": (None, True), "wrong": (found + 1, False)}[wanted]

    @rule(space=SPACES, key=KEYS, value=ITEMS, base=BASES, end=ENDS, sync=st.booleans())
    def save_value(self, space: str, key: Any, value: list[Any], base: str, end: int | None, sync: bool) -> None:
        number, fits = self.base((space, key), base)
        over = None if end is None else self.clock() + end
        data = self.store.encode(value, key)
        self.save(
            [SaveValue(space, key, data, number, over)], {(space, key): Entry(value, 0, over)}, fits=fits, sync=sync
        )

    @rule(
        space=SPACES,
        key=KEYS,
        items=ITEMS,
        drop=RANGES,
        put=st.dictionaries(st.integers(0, 8), st.integers(-9, 9), max_size=2),
        replace=st.booleans(),
        base=BASES,
        end=ENDS,
    )
    def save_log(
        self,
        space: str,
        key: Any,
        items: list[Any],
        drop: list[tuple[int, int]],
        put: dict[int, int],
        replace: bool,
        base: str,
        end: int | None,
    ) -> None:
        place = (space, key)
        old = self.live(place)
        replace = replace or (old is not None and not isinstance(old.value, dict))
        number, fits = self.base(place, base)
        over = None if end is None else self.clock() + end
        log, following = (dict(old.value), old.next) if old is not None and not replace else ({}, 0)
        log = {n: item for n, item in log.items() if not any(low <= n < high for low, high in drop)}
        put = {n: item for n, item in put.items() if n < following}
        log |= put
        log |= {following + n: item for n, item in enumerate(items)}
        encode = self.store.encode
        change = SaveLog(
            space,
            key,
            number,
            [encode(item) for item in items],
            drop,
            {n: encode(item) for n, item in put.items()},
            replace,
            over,
        )
        self.save([change], {place: Entry(log, 0, over, following + len(items))}, fits=fits, sync=False)

    @rule(space=SPACES, base=BASES)
    def delete(self, space: str, base: str) -> None:
        """One of each key of a space, all together or none."""
        bases = {key: self.base((space, key), base) for key in ("a", "b")}
        changes: list[Change] = [Delete(space, key, number) for key, (number, _) in bases.items()]
        self.save(changes, dict.fromkeys((space, key) for key in bases), fits=base != "wrong", sync=False)

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        over = [place for place in self.model if self.live(place) is None]
        assert len(over) == self.store.expire()
        for place in over:
            del self.model[place]

    @rule(check=st.booleans())
    def reopen(self, check: bool) -> None:
        self.store.close()
        self.store = SQLiteStore(self.folder / "chats.db", timer=self.clock, check=check)
        assert self.store.report.clean

    @rule()
    def crash(self) -> None:
        """Go on with the files as they are now, as after a kill."""
        copy = Path(tempfile.mkdtemp())
        for end in ("", "-wal"):
            shutil.copy(self.folder / f"chats.db{end}", copy / f"chats.db{end}")
        self.teardown()
        self.folder = copy
        self.store = SQLiteStore(self.folder / "chats.db", timer=self.clock)
        assert self.store.report.clean

    @invariant()
    def everything_is_there(self) -> None:
        for space in ("s", "t"):
            expected = {
                key: entry for (where, key), entry in self.model.items() if where == space and self.live((where, key))
            }
            assert {key: entry.seen for key, entry in expected.items()} == dict(self.store.items(space))
            assert len(expected) == self.store.count(space)
            heads = {head.key: head for head in self.store.heads(space)}
            assert {key: entry.version for key, entry in expected.items()} == {
                key: h.version for key, h in heads.items()
            }
            assert sum(head.bytes for head in heads.values()) == self.store.nbytes(space)
            for key, entry in expected.items():
                items = list(entry.value.values()) if isinstance(entry.value, dict) else [entry.value]
                assert sum(len(self.store.encode(item)) for item in items) == heads[key].bytes
                assert self.store.contains(space, key)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


TestStored = Stored.TestCase
TestStored.settings = settings(max_examples=20, stateful_step_count=25)
