"""Whatever is asked of them, a store on a server and the one in a file say the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hygiene.errors import VersionConflict
from hygiene.stores import Change, Delete, SaveLog, SaveValue, SQLiteStore, Store
from hygiene.testing import ManualClock

_spaces = itertools.count()

items = st.lists(st.integers(0, 9) | st.text(max_size=5), max_size=3)
spans = st.lists(st.tuples(st.integers(-1, 8), st.integers(0, 9)), max_size=2)
bases = st.sampled_from([None, 0, "current", "wrong"])
ends = st.none() | st.integers(1, 20)
changes = st.one_of(
    st.tuples(st.just("value"), st.sampled_from("ab"), bases, items, ends),
    st.tuples(
        st.just("log"), st.sampled_from("ab"), bases, items, spans, st.sets(st.integers(0, 5)), st.booleans(), ends
    ),
    st.tuples(st.just("delete"), st.sampled_from("ab"), bases),
)  # fmt: skip
steps = st.lists(st.lists(changes, min_size=1, max_size=3) | st.integers(1, 15), min_size=1, max_size=10)


def made(store: Store, space: str, now: float, what: tuple[Any, ...]) -> Change:
    kind, key, base, *rest = what
    if kind == "delete":
        return Delete(space, key, base)
    end = None if rest[-1] is None else now + rest[-1]
    if kind == "value":
        return SaveValue(space, key, store.encode(rest[0]), base, end)
    append, drop, put, replace, _ = rest
    new = {sequence: store.encode(f"put {sequence}") for sequence in put}
    return SaveLog(space, key, base, [store.encode(item) for item in append], drop, new, replace, end)


def outcome(store: Store, batch: list[Change]) -> Any:
    try:
        return store.save(batch)
    except VersionConflict as error:
        return VersionConflict, [conflict[:2] for conflict in error.conflicts], error.unsaved
    except ValueError as error:
        return ValueError, str(error)


def without_version(result: Any) -> Any:
    """Versions may differ: where they begin after a deletion is up to the store."""
    if not isinstance(result, list):
        return result
    return [
        head and (head.kind, head.bytes, head.saved_at, head.expire_at, head.spans, head.next, head.count)
        for head in result
    ]


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_any_batches_do_the_same_as_in_a_file(store: Any, clock: ManualClock, steps: list[Any]) -> None:
    """Saved, refused and read back: values, logs with holes, ends, versions, deletions, several in one batch."""
    space = f"s{next(_spaces)}"
    store.expire(clock() + 1000)  # of the example before
    known: dict[tuple[Store, str], int] = {}
    with SQLiteStore(":memory:", timer=clock) as model:
        for step in steps:
            if isinstance(step, int):
                clock.advance(step)
                assert model.expire() == store.expire()
                continue
            results = []
            for each in (model, store):
                heads = {head.key: head.version for head in each.heads(space)}
                base = {None: None, 0: 0, "wrong": 10**9}
                batch = [
                    made(each, space, clock(), (kind, key, base.get(by, heads.get(key, 0)), *rest))
                    for kind, key, by, *rest in step
                ]
                results.append(without_version(outcome(each, batch)))
            assert results[0] == results[1]
            for key in "ab":
                records = [each.load(space, key) for each in (model, store)]
                values = [record and record.value for record in records]
                assert values[0] == values[1]
                for each, record in zip((model, store), records, strict=True):
                    if record is not None:
                        assert record.head.version >= known.get((each, key), 0)
                        known[each, key] = record.head.version
        assert model.count(space) == store.count(space)
        assert model.nbytes(space) == store.nbytes(space)
    assert store.recover().clean
