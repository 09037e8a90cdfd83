"""What is changed inside a stored value, without a word, is found and saved: at any depth, in any item."""

from __future__ import annotations

import copy
import gc
import json
import operator
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from hygiene import History, Registry, bounded_registry
from hygiene.errors import NotStorable, StoreUnavailable
from hygiene.history import history_type
from hygiene.journal import Journal
from hygiene.stores import SQLiteStore
from hygiene.stores.codec import MessagePack
from hygiene.writebehind import WriteBehind

PATIENCE = 20.0


def message(text: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text, "calls": [{"name": "search", "arguments": []}]}


def stream(chat: Any) -> None:
    """An answer that comes in pieces, as each chat server writes it."""
    for chunk in ("Hel", "lo"):
        chat[-1]["content"] += chunk


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    with SQLiteStore(path) as opened:
        yield opened


@pytest.fixture
def chats(store: SQLiteStore) -> Iterator[Registry[Any, Any]]:
    """A registry that saves when it is told to, and then alone."""
    with Registry(maxsize=100, store=WriteBehind(store, space="chats", every=10**6, interval=10**6)) as registry:
        yield registry


def stored(registry: Registry[Any, Any], key: Any = "k") -> Any:
    """What another process would load."""
    assert registry._keeper is not None
    record = registry._keeper.store.load(registry._keeper.space, key)
    return None if record is None else record.value


def filled(registry: Registry[Any, Any], count: int = 5, key: Any = "k") -> Any:
    """A conversation that is saved, and of which no item is held by anybody."""
    registry[key] = [message(str(number)) for number in range(count)]
    registry.flush()
    registry.flush()
    history = registry[key]
    assert 1 not in cast("Any", history)._hygiene.journal._lent
    return history


# When it is found.


def end_a_lease(registry: Registry[Any, Any]) -> None:
    with registry.lease("k"):
        pass
    assert registry._keeper is not None
    registry._keeper.writer.flush()


@pytest.mark.parametrize(
    "when",
    [
        lambda registry: registry.flush(),
        lambda registry: registry.evict("k"),
        end_a_lease,
        lambda registry: registry.close(),
    ],
    ids=["flush", "evict", "lease", "close"],
)
@pytest.mark.parametrize("reloaded", [False, True])
def test_an_edit_of_an_item_is_found(chats: Registry[Any, Any], when: Callable[[Any], Any], reloaded: bool) -> None:
    """At ``flush``, at eviction, at the end of a lease, and at ``close``; also in what came back from the store."""
    filled(chats)
    if reloaded:
        chats.evict("k")
        gc.collect()
    stream(chats["k"])
    keeper = chats._keeper
    assert keeper is not None

    when(chats)

    record = keeper.store.load(keeper.space, "k")
    assert record is not None
    assert "4Hello" == record.value[-1]["content"]
    assert ["0", "1", "2", "3"] == [item["content"] for item in record.value[:-1]]


async def test_an_edit_is_found_on_a_loop(chats: Registry[Any, Any]) -> None:
    """At the end of an async lease, with ``aflush`` and with ``aclose``."""
    filled(chats)
    keeper = chats._keeper
    assert keeper is not None

    async with chats.lease("k") as chat:
        stream(chat)
    await keeper.writer.aflush()
    leased = stored(chats)[-1]["content"]
    chats["k"][-1]["calls"][0]["arguments"].append("x")
    await chats.aflush()
    flushed = stored(chats)[-1]["calls"][0]["arguments"]
    stream(chats["k"])
    await chats.aclose()

    assert ("4Hello", ["x"]) == (leased, flushed)
    record = keeper.store.load(keeper.space, "k")
    assert record is not None
    assert "4HelloHello" == record.value[-1]["content"]


def test_an_edit_writes_one_row(chats: Registry[Any, Any]) -> None:
    """And nothing is told where nothing was changed."""
    history = filled(chats, 100)
    before = list(history)
    chats.flush()
    keeper = chats._keeper
    assert keeper is not None
    untouched = len(keeper.writer._pending)

    before[40]["content"] = "edited"
    keeper.settle_all()
    [entry] = keeper.writer._pending.values()

    assert 0 == untouched
    assert 1 == entry.count
    chats.flush()
    assert "edited" == stored(chats)[40]["content"]


def test_an_edit_by_a_holder_is_found_again_and_again(chats: Registry[Any, Any]) -> None:
    """Whoever holds an item may change it after it was looked at: it stays under observation until it is let go."""
    history = filled(chats)
    item = history[2]
    inner = history[3]["calls"][0]
    seen = []

    for number in range(3):
        item["content"] = f"item {number}"
        inner["name"] = f"call {number}"
        chats.flush()
        value = stored(chats)
        seen.append((value[2]["content"], value[3]["calls"][0]["name"]))
    journal = history._hygiene.journal
    held = journal._lent.count(1)
    del item, inner
    chats.flush()

    assert [(f"item {number}", f"call {number}") for number in range(3)] == seen
    assert 2 == held
    assert 0 == journal._lent.count(1)


def test_a_message_that_was_put_in_and_is_still_held_is_found(chats: Registry[Any, Any]) -> None:
    """However it came in; this is how most programs stream."""
    ways: dict[str, Callable[[Any, Any], Any]] = {
        "append": lambda history, item: history.append(item),
        "extend": lambda history, item: history.extend([item]),
        "iadd": lambda history, item: operator.iadd(history, [item]),
        "insert": lambda history, item: history.insert(1, item),
        "setitem": lambda history, item: history.__setitem__(1, item),
        "slice": lambda history, item: history.__setitem__(slice(1, 2), [item, message("another")]),
        "put": lambda history, item: chats.__setitem__("put", [item]),
    }
    for way, put in ways.items():
        history = filled(chats, key=way)
        item = message()
        put(history, item)
        chats.flush()
        item["content"] += "Hello"
        item["calls"].append({"name": "late"})
        chats.flush()

        assert item in stored(chats, way), way


def third(*items: Any) -> Any:
    return items[2]


def unpacked(history: Any) -> Any:
    _, _, item, *_ = history
    return item


def matched(history: Any) -> Any:
    match history:
        case [_, _, item, *_]:
            return item
    return None


def augmented(history: Any) -> Any:
    plain = ["system"]
    plain += history
    return plain


def sort_key(history: Any) -> Any:
    seen = []
    history.sort(key=lambda item: seen.append(item) or item["content"])
    return seen[2]


def json_default(history: Any) -> Any:
    seen: list[Any] = []
    json.dumps([{"history": history}], default=seen.append)
    return history[2]


def extended(history: Any) -> Any:
    plain: list[Any] = []
    plain.extend(history)
    return plain


def assigned(history: Any) -> Any:
    plain: list[Any] = []
    plain[:] = history
    return plain


def iterated(history: Any) -> Any:
    iterator = iter(history)
    next(iterator)
    next(iterator)
    return next(iterator)


READS: dict[str, Callable[[Any], Any]] = {
    "index": lambda history: history[2],
    "index from the end": lambda history: history[-3],
    "slice": lambda history: history[1:4][1],
    "strided slice": lambda history: history[::2][1],
    "loop": lambda history: next(item for item in history if item["content"] == "2"),
    "enumerate": lambda history: dict(enumerate(history))[2],
    "reversed": lambda history: list(reversed(history))[2],
    "list": lambda history: list(history)[2],
    "tuple": lambda history: tuple(history)[2],
    "unpacking": lambda history: [*history][2],
    "star": lambda history: third(*history),
    "assignment": unpacked,
    "pattern": matched,
    "copy()": lambda history: history.copy()[2],
    "copy.copy": lambda history: copy.copy(history)[2],
    "sum": lambda history: operator.add(history, [])[2],
    "prompt": lambda history: operator.add(["system"], history)[3],
    "augmented": lambda history: augmented(history)[3],
    "product": lambda history: (history * 2)[7],
    "reflected product": lambda history: (2 * history)[7],
    "sorted": lambda history: sorted(history, key=lambda item: item["content"])[2],
    "sort key": sort_key,
    "max": lambda history: max(history, key=lambda item: item["content"] == "2"),
    "zip": lambda history: list(zip(history, range(5), strict=True))[2][0],
    "map": lambda history: list(map(third, history, history, history))[2],
    "filter": lambda history: next(filter(lambda item: item["content"] == "2", history)),
    "itemgetter": operator.itemgetter(2),
    "json default": json_default,
    "extending": lambda history: extended(history)[2],
    "slice assignment": lambda history: assigned(history)[2],
    "iterator": iterated,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("limits", [{}, {"maxlen": 50}, {"compact": True}], ids=["plain", "maxlen", "compact"])
def test_an_item_may_be_read_in_any_way(store: SQLiteStore, read: Callable[[Any], Any], limits: dict[str, Any]) -> None:
    """A change inside of it is found, whoever has read it how; also by C code that reads a list's items."""
    writer = WriteBehind(store, space="chats", every=10**6, interval=10**6)
    with Registry(maxsize=3, store=writer, values=partial(History, **limits)) as chats:
        filled(chats)
        read(chats["k"])["content"] = "edited"
        chats.flush()

        assert ["0", "1", "edited", "3", "4"] == [item["content"] for item in stored(chats)]
        assert chats["k"] == stored(chats)


def test_a_loop_that_goes_on_after_a_flush_lends_what_it_reads(chats: Registry[Any, Any]) -> None:
    """The items that it comes to later are found to be changed at the next flush."""
    history = filled(chats)

    for item in history:
        item["content"] += "!"
        chats.flush()
    del item
    chats.flush()
    chats.flush()

    assert [f"{number}!" for number in range(5)] == [item["content"] for item in stored(chats)]
    assert not history._hygiene.walkers


def test_an_abandoned_loop_ends_with_its_iterator(chats: Registry[Any, Any]) -> None:
    """Until then each item is taken for lent."""
    history = filled(chats)
    iterator = iter(history)
    next(iterator)
    chats.flush()
    during = history._hygiene.journal._lent.count(1)
    del iterator
    gc.collect()
    chats.flush()

    assert 5 == during
    assert 0 == history._hygiene.journal._lent.count(1)


class Odd(list[Any]):
    """A list that reads in a way of its own."""

    def last(self) -> Any:
        return list.__getitem__(self, -1)

    def __iter__(self) -> Iterator[Any]:
        return list.__iter__(self)


def test_a_class_that_reads_in_a_way_of_its_own_is_looked_at_whole(store: SQLiteStore) -> None:
    """What it hands out is not known, so each flush encodes all of its items."""
    with Registry(maxsize=3, store=WriteBehind(store, space="chats", every=10**6, interval=10**6)) as chats:
        chats["k"] = Odd([message(), message()])
        chats.flush()
        chats.flush()
        next(iter(chats["k"]))["content"] = "first"
        chats.flush()
        chats["k"].last()["content"] = "last"
        chats.flush()

        assert ["first", "last"] == [item["content"] for item in stored(chats)]
        assert isinstance(chats["k"], Odd)


def test_a_change_inside_a_sealed_item_is_saved(store: SQLiteStore) -> None:
    """A compact history unseals what it hands out, and the flush that has saved a change seals it again."""
    writer = WriteBehind(store, space="chats", every=10**6, interval=10**6)
    with Registry(maxsize=3, store=writer, values=partial(History, compact=True)) as chats:
        history = filled(chats, 300)
        journal, kinds = history._hygiene.journal, lambda: list(map(type, list.__getitem__(history, slice(None))))
        before = kinds().count(dict)
        history[3]["content"] = "edited"
        next(item for item in history if item["content"] == "70")["calls"].append("late")
        held = history[140]
        during = kinds().count(dict)
        chats.flush()
        once = stored(chats)
        held["content"] = "held"
        chats.flush()
        twice = stored(chats)[140]["content"]
        del held
        for _ in range(10):
            chats.flush()

        assert before < during
        assert ("edited", ["late"]) == (once[3]["content"], once[70]["calls"][1:])
        assert "held" == twice
        assert before >= kinds().count(dict)
        assert 0 == journal._lent.count(1)
        assert history == stored(chats)


# What it is.


@pytest.mark.parametrize("base", [list, Odd])
def test_a_history_in_a_store_is_of_its_class(chats: Registry[Any, Any], base: type[list[Any]]) -> None:
    """By name, for ``isinstance``, and as what copies and pickles are made of; and without a store it is that class."""
    kind = history_type(base)
    chats["k"] = kind([message()], maxlen=5)
    history = chats["k"]
    copies = [copy.copy(history), copy.deepcopy(history), pickle.loads(pickle.dumps(history))]
    names = type(history).__name__, type(history).__qualname__, type(history).__module__
    chats.pop("k")

    assert isinstance(history, kind)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == names
    assert [kind] * 4 == [type(one) for one in (history, *copies)]
    assert [[message()]] * 3 == copies


def test_a_history_without_a_store_reads_as_a_list_does() -> None:
    """What reads of a stored one cost, others do not pay."""
    assert [list.__getitem__, list.__iter__, list.__add__] == [History.__getitem__, History.__iter__, History.__add__]


def test_items_that_cannot_be_changed_are_not_looked_at(chats: Registry[Any, Any]) -> None:
    """Texts and numbers cost a flush nothing."""
    chats["k"] = ["a", 1, 2.5, None, b"x"]
    history = chats["k"]
    history.append("b")
    history.extend([1, "c"])
    list(history)
    journal = history._hygiene.journal
    journal._hash_fresh()

    assert bytes(8) == journal._lent


# Where it is.


@pytest.mark.parametrize(
    ("value", "edit"),
    [
        ({"a": {"b": [1]}}, lambda value: value["a"]["b"].append(2)),
        ({"turns": [message()]}, lambda value: value["turns"][-1]["calls"][0]["arguments"].append("x")),
        ([[1], [2, [3]]], lambda value: value[1][1].append(4)),
        ([{"a": {"b": {"c": []}}}], lambda value: value[0]["a"]["b"]["c"].append({"d": 1})),
        ([[message()]], lambda value: stream(value[0])),
    ],
    ids=["dict in a dict", "list in a dict", "lists in a list", "deep in an item", "list of lists"],
)
@pytest.mark.parametrize("when", ["flush", "evict", "close"])
def test_the_depth_of_an_edit_does_not_matter(
    chats: Registry[Any, Any], value: Any, edit: Callable[[Any], Any], when: str
) -> None:
    """Values and items are compared as a whole."""
    expected = copy.deepcopy(value)
    edit(expected)
    chats["k"] = copy.deepcopy(value)
    chats.flush()
    chats.flush()
    keeper = chats._keeper
    assert keeper is not None

    edit(chats["k"])
    getattr(chats, when)(*(["k"] if when == "evict" else []))
    record = keeper.store.load(keeper.space, "k")

    assert record is not None
    assert expected == record.value


def test_an_edit_in_a_linked_attribute_is_found(path: Path) -> None:
    """Each column of a group has a store of its own."""

    @bounded_registry("chats", "moods", maxsize=10, store=f"sqlite:{path}")
    class Bot:
        def __init__(self) -> None:
            self.chats: dict[str, list[Any]] = {}
            self.moods: dict[str, dict[str, Any]] = {}

    bot = Bot()
    bot.chats["k"], bot.moods["k"] = [message()], {"is": ["good"]}
    chats, moods = cast("Any", bot.chats), cast("Any", bot.moods)
    chats.flush()
    moods.flush()

    stream(bot.chats["k"])
    bot.moods["k"]["is"].append("better")
    chats.flush()
    moods.flush()

    assert "Hello" == stored(chats)[0]["content"]
    assert {"is": ["good", "better"]} == stored(moods)
    chats.close()
    moods.close()


def test_an_item_that_is_there_twice_is_saved_twice(chats: Registry[Any, Any]) -> None:
    """Whichever of the two is read."""
    item = message()
    chats["k"] = [item, message("between"), item]
    history = chats["k"]
    history *= 2
    del item
    chats.flush()
    chats.flush()

    history[3]["content"] = "edited"
    chats.flush()

    assert ["edited", "between", "edited"] * 2 == [one["content"] for one in stored(chats)]


def test_edits_follow_their_items_when_these_move(chats: Registry[Any, Any]) -> None:
    """Whatever happens to the list between the read and the flush."""
    moves: list[Callable[[Any], Any]] = [
        lambda history: history.pop(0),
        lambda history: history.insert(0, message("new")),
        lambda history: history.reverse(),
        lambda history: history.sort(key=lambda item: item["content"], reverse=True),
        lambda history: history.__delitem__(slice(0, 2)),
        lambda history: history.__setitem__(slice(0, 1), [message("a"), message("b"), message("c")]),
        lambda history: history.trim(to=4),
        lambda history: history.remove(message("0")),
        lambda history: list.append(history, message("past the methods")),
        lambda history: history.extend(message(str(number)) for number in range(100)),
    ]
    for number, move in enumerate(moves):
        history = filled(chats, 8, number)
        items = history[4:6]
        move(history)
        items[0]["content"], items[1]["calls"] = "edited", []
        chats.flush()

        assert list(history) == stored(chats, number), number


def test_an_edited_value_that_was_evicted_and_is_still_held_is_saved(chats: Registry[Any, Any]) -> None:
    """At the next flush, as if it had never left."""
    history = filled(chats)
    chats.evict("k")
    assert "k" not in list(chats)

    stream(history)
    chats.flush()
    alone = stored(chats)[-1]["content"]
    again = chats["k"]
    stream(again)
    chats.flush()

    assert again is history
    assert "4Hello" == alone
    assert "4HelloHello" == stored(chats)[-1]["content"]


def test_a_window_trims_what_was_edited(store: SQLiteStore) -> None:
    """And of what is left nothing is mixed up."""
    writer = WriteBehind(store, space="chats", every=10**6, interval=10**6)
    with Registry(maxsize=3, store=writer, values=partial(History, maxlen=4)) as chats:
        chats["k"] = []
        for number in range(20):
            item = message(str(number))
            chats["k"].append(item)
            item["content"] += "!"
            if number % 3 == 0:
                chats.flush()
        chats.flush()

        assert ["16!", "17!", "18!", "19!"] == [one["content"] for one in stored(chats)]


# What goes wrong.


def test_an_edit_that_cannot_be_stored_is_named_and_the_others_are_saved(chats: Registry[Any, Any]) -> None:
    """The flush raises, with the key and the index; when it is mended, it is saved."""
    history = filled(chats)
    history[1]["content"] = {1, 2}
    history[3]["content"] = "fine"

    with pytest.raises(NotStorable, match=r"item 1 of 'k' was changed in place and cannot be stored.*\['content'\]"):
        chats.flush()
    with pytest.raises(NotStorable):
        chats.flush()
    assert chats._keeper is not None
    chats._keeper.writer.flush()
    between = [item["content"] for item in stored(chats)]
    history[1]["content"] = "mended"
    chats.flush()

    assert ["0", "1", "2", "fine", "4"] == between
    assert ["0", "mended", "2", "fine", "4"] == [item["content"] for item in stored(chats)]


def test_an_entry_with_an_edit_that_cannot_be_stored_stays(chats: Registry[Any, Any], caplog: Any) -> None:
    """It is not evicted, or the edit would be lost without an error."""
    filled(chats)[1]["content"] = {1, 2}

    chats.evict("k")

    assert "k" in list(chats)
    assert "cannot be saved, so it stays in memory" in caplog.text
    chats["k"][1]["content"] = "mended"


def test_an_edit_that_the_writer_has_no_room_for_is_found_again(store: SQLiteStore) -> None:
    """It is not taken for told."""
    with Registry(maxsize=3, store=WriteBehind(store, space="chats", every=10**6, interval=10**6)) as chats:
        history = filled(chats)
        history[1]["content"] = "edited"
        journal = history._hygiene.journal
        writer, failing = journal._writer, [True]
        revise = writer._revise

        def full(*arguments: Any, **keywords: Any) -> Any:
            if failing:
                failing.clear()
                raise StoreUnavailable("no room")
            return revise(*arguments, **keywords)

        writer._revise = full
        with pytest.raises(StoreUnavailable):
            chats.flush()
        chats.flush()

        assert "edited" == stored(chats)[1]["content"]


def test_a_dict_that_another_thread_changes_at_this_moment_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of an error from the depths of a flush that has nothing to do with it."""
    value = {str(number): [number] for number in range(10)}
    codec, scan = MessagePack(), __import__("hygiene.stores.codec").stores.codec._scan

    def changing(found: Any, depth: int) -> bool:
        if depth == 1 and "late" not in value:
            value["late"] = [1]
        return bool(scan(found, depth))

    monkeypatch.setattr("hygiene.stores.codec._scan", changing)

    assert [value] == codec.decode_rows([(0, codec.encode(value))])


def test_edits_and_appends_of_other_threads_during_flushes_are_all_saved(chats: Registry[Any, Any]) -> None:
    """Each thread streams into messages of its own, while the main one flushes."""
    chats["k"] = []
    history = chats["k"]
    done = threading.Event()

    def write(name: str) -> None:
        for number in range(30):
            item = message()
            history.append(item)
            for chunk in (name, "-", str(number)):
                item["content"] += chunk
            if number % 10 == 9:
                history[-1]["calls"].append({"name": name})

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    flusher = threading.Thread(target=lambda: [chats.flush() for _ in iter(done.is_set, True)])
    flusher.start()
    for thread in threads:
        thread.join(PATIENCE)
    done.set()
    flusher.join(PATIENCE)
    chats.flush()

    assert sorted(f"{name}-{number}" for name in "abc" for number in range(30)) == sorted(
        item["content"] for item in stored(chats)
    )
    assert list(history) == stored(chats)


def test_what_is_lent_while_a_check_runs_stays_lent(chats: Registry[Any, Any]) -> None:
    """Or the reader's change would be missed by the next check."""
    history = filled(chats)
    journal = cast("Journal", history._hygiene.journal)
    list(history)
    encode, taken = journal._writer._encode, []

    def reading(item: Any, key: Any) -> bytes:
        if not taken:
            taken.append(history[3])
        return encode(item, key)

    journal._writer._encode = reading  # type: ignore[method-assign]
    journal.find_edits(history)
    journal._writer._encode = encode  # type: ignore[method-assign]
    taken[0]["content"] = "edited"
    chats.flush()

    assert "edited" == stored(chats)[3]["content"]


def test_what_moves_while_a_check_runs_is_looked_at_again(chats: Registry[Any, Any]) -> None:
    """However often that happens: at last the others have to wait."""
    history = filled(chats)
    journal = cast("Journal", history._hygiene.journal)
    items = list(history)
    encode, times = journal._writer._encode, []

    def moving(item: Any, key: Any) -> bytes:
        data = encode(item, key)
        if len(times) < 10 and item is not times:
            times.append(1)
            history.insert(0, "new")
        return data

    items[2]["content"] = "edited"
    journal._writer._encode = moving  # type: ignore[method-assign]
    journal.find_edits(history)
    journal._writer._encode = encode  # type: ignore[method-assign]
    chats.flush()

    assert list(history) == stored(chats)
    assert "edited" in [item["content"] for item in stored(chats) if item != "new"]
