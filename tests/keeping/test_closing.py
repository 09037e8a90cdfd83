"""A registry that is closed while others use it: each change is saved, or refused where it is made."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hygiene import History, Registry, StoreError, WriteBehind, bounded_registry, open_store
from hygiene.stores import SQLiteStore

PATIENCE = 20.0


class Gated(SQLiteStore):
    """A real store whose saves can be made to stop before they have saved."""

    def __init__(self, path: Path, codec: str = "msgpack") -> None:
        super().__init__(path, codec=codec)
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()

    def save(self, changes: Any, *, sync: bool = False) -> Any:
        self.asked.set()
        assert self.gate.wait(PATIENCE)
        return super().save(changes, sync=sync)

    def hang(self) -> None:
        """The next save stops before it has saved."""
        self.gate.clear()
        self.asked.clear()


@pytest.fixture
def store(path: Path) -> Iterator[Gated]:
    """An empty store that can be made to hang."""
    with Gated(path) as opened:
        yield opened
        opened.gate.set()


@pytest.fixture
def pickling(path: Path) -> Iterator[Gated]:
    """The same, for values that the usual codec does not take, such as sets."""
    with Gated(path.with_name("pickled.db"), "pickle") as opened:
        yield opened
        opened.gate.set()


def _close(chats: Registry[Any, Any]) -> None:
    chats.close()


def _aclose(chats: Registry[Any, Any]) -> None:
    asyncio.run(chats.aclose())


closers = pytest.mark.parametrize("close", [_close, _aclose])


@contextlib.contextmanager
def closing(chats: Registry[Any, Any], store: Gated, close: Callable[[Any], None]) -> Iterator[None]:
    """A block while which *chats* is in the middle of its last save."""
    errors = []

    def end() -> None:
        try:
            close(chats)
        except Exception as error:  # noqa: BLE001 - the assertion below shows it
            errors.append(error)

    store.hang()
    thread = threading.Thread(target=end)
    thread.start()
    try:
        assert store.asked.wait(PATIENCE)
        yield
    finally:
        store.gate.set()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert [] == errors


def _union(chats: Any, _: Any) -> None:
    chats |= {"bob": ["hi"]}


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "append": lambda _, log: log.append("late"),
    "extend": lambda _, log: log.extend(["late", "later"]),
    "insert": lambda _, log: log.insert(0, "late"),
    "set an item": lambda _, log: log.__setitem__(0, "late"),
    "set a slice": lambda _, log: log.__setitem__(slice(None), ["late"]),
    "del an item": lambda _, log: log.__delitem__(0),
    "pop an item": lambda _, log: log.pop(),
    "clear a list": lambda _, log: log.clear(),
    "+=": lambda _, log: log.__iadd__(["late"]),
    "append to what is looked up": lambda chats, _: chats["log"].append("late"),
    "set": lambda chats, _: chats.__setitem__("log", ["late"]),
    "set a new key": lambda chats, _: chats.__setitem__("bob", ["late"]),
    "setdefault": lambda chats, _: chats.setdefault("bob", ["late"]),
    "update": lambda chats, _: chats.update(log=["late"]),
    "union": _union,
    "pop": lambda chats, _: chats.pop("log"),
    "del": lambda chats, _: chats.__delitem__("log"),
    "clear": lambda chats, _: chats.clear(),
    "changed": lambda chats, _: chats.changed("log"),
    "lease": lambda chats, _: chats.lease("log").__enter__(),
    "lease with create": lambda chats, _: chats.lease("bob", create=list).__enter__(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@closers
def test_what_comes_while_the_registry_is_closed_is_refused(change: Any, close: Any, store: Gated) -> None:
    """From the beginning of the call on, in every thread; and then for ever."""
    chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
    log = chats["log"] = History(["one"])
    refused = (StoreError, KeyError) if change is CHANGES["changed"] else StoreError  # it is not in memory any more
    with closing(chats, store, close), pytest.raises(refused):
        change(chats, log)
    with pytest.raises(refused):
        change(chats, log)

    assert ["one"] == log
    assert {"log": ["one"]} == dict(store.items("chats"))


@closers
def test_what_is_changed_in_place_while_the_registry_is_closed_is_saved(close: Any, pickling: Gated) -> None:
    """Nobody can refuse a change of a plain dict or set, so it is looked for once more after the save."""
    store = pickling
    chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
    chats["x"], chats["y"] = {"v": 1}, {1, 2}
    chats.flush()
    held, numbers = chats["x"], chats["y"]
    chats["z"] = "something to save"
    with closing(chats, store, close):
        held["v"] = 2
        numbers.add(3)

    assert {"x": {"v": 2}, "y": {1, 2, 3}, "z": "something to save"} == dict(store.items("chats"))


@closers
def test_what_is_found_last_ends_when_it_would_have_ended(close: Any, store: Gated) -> None:
    """`ttl` counts from the last write, and the change in place is none."""
    chats: Registry[str, Any] = Registry(maxsize=10, ttl=3600, store=store, name="chats")
    chats["x"] = {"v": 1}
    chats.flush()
    before = next(store.heads("chats")).expire_at
    held = chats["x"]
    chats["z"] = "something to save"
    with closing(chats, store, close):
        held["v"] = 2

    after = next(head for head in store.heads("chats") if head.key == "x").expire_at
    assert before is not None
    assert after == pytest.approx(before, abs=1.0)


@closers
def test_a_lease_that_ends_while_the_registry_is_closed_is_saved(close: Any, store: Gated) -> None:
    """Its changes are found, as at the end of any other lease."""
    chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
    chats["x"] = {"v": 1}
    with chats.lease("x") as held, closing(chats, store, close):
        held["v"] = 2
    assert {"x": {"v": 2}} == dict(store.items("chats"))

    chats = Registry(maxsize=10, store=store, name="chats")
    chats["y"] = "something to save"
    lease = chats.lease("x")
    held = lease.__enter__()
    with closing(chats, store, close):
        held["v"] = 3
        lease.__exit__(None, None, None)
    assert {"v": 3} == dict(store.items("chats"))["x"]


@pytest.mark.parametrize(
    ("create", "change"),
    [
        (dict, lambda value: value.update(v=2)),
        (set, lambda value: value.add(2)),
        (lambda: ["one"], lambda value: value.append("late")),
        (lambda: [{"v": 1}], lambda value: value[0].update(v=2)),
    ],
    ids=["dict", "set", "list", "inside a list"],
)
def test_a_lease_that_a_close_overtakes_is_an_error_if_it_has_changed_something(
    create: Any, change: Any, pickling: Gated
) -> None:
    """What was changed before is saved, and what comes later is refused, or an error at the end of the lease."""
    store = pickling

    def leased(act: Callable[[Any], object]) -> None:
        chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
        with chats.lease("x", create=create) as value:
            chats.close()
            act(value)

    async def aleased(act: Callable[[Any], object]) -> None:
        chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
        async with chats.lease("x", create=create) as value:
            await chats.aclose()
            act(value)

    for run in (leased, lambda act: asyncio.run(aleased(act))):
        with pytest.raises(StoreError, match="closed"):
            run(change)
        assert {"x": create()} == dict(store.items("chats"))
        run(lambda _: None)

        def failing(value: Any) -> None:
            with contextlib.suppress(StoreError):  # a list refuses at once
                change(value)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run(failing)


def test_of_leases_that_overlap_the_last_one_tells(store: Gated) -> None:
    """As they save once, at the end of the last."""
    chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
    outer = chats.lease("x", create=dict)
    value = outer.__enter__()
    with chats.lease("x"):
        chats.close()
        value["v"] = 1
    with pytest.raises(StoreError):
        outer.__exit__(None, None, None)


def test_what_is_the_callers_own_is_never_refused(store: Gated) -> None:
    """What was popped, deleted, replaced, cleared or copied before is a list like any other."""
    with Registry[str, Any](maxsize=10, store=store, name="chats") as chats:
        for key in "abcde":
            chats[key] = ["one"]
        held = {key: chats[key] for key in "bcd"}
        mine = [chats.pop("a"), held["b"], held["c"], chats["e"].copy(), chats["e"][:]]
        del chats["b"]
        chats["c"] = ["two"]
        chats.clear()
        mine.append(held["d"])
    for log in mine:
        log.append("two")
        assert ["one", "two"] == log


def test_a_list_of_a_closed_registry_may_move_into_another_one(store: Gated) -> None:
    """There it is kept, and takes changes again."""
    with Registry[str, Any](maxsize=10, store=store, name="chats") as chats:
        log = chats["log"] = History(["one"])
    with Registry[str, Any](maxsize=10, store=store, name="others") as others:
        others["log"] = log
        others["log"].append("two")

    assert {"log": ["one", "two"]} == dict(store.items("others"))
    assert {"log": ["one"]} == dict(store.items("chats"))


def test_a_new_registry_may_be_opened_while_the_old_one_is_closed(store: Gated) -> None:
    """It waits until everything is saved, and misses nothing."""
    chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
    chats["x"] = {"v": 1}
    held = chats["x"]
    found = []

    def open_again() -> None:
        with Registry[str, Any](maxsize=10, store=store, name="chats") as again:
            found.append(again["x"])
            again["y"] = 1

    opening = threading.Thread(target=open_again)
    with closing(chats, store, _close):
        held["v"] = 2
        opening.start()
    opening.join(PATIENCE)

    assert [{"v": 2}] == found
    assert {"x": {"v": 2}, "y": 1} == dict(store.items("chats"))


def test_a_writer_that_threads_use_saves_what_it_has_accepted(store: Gated) -> None:
    """`WriteBehind.close` refuses each change from its first moment on."""
    writer = WriteBehind(store, space="chats")
    accepted: list[list[int]] = [[], []]
    begun = threading.Barrier(3, timeout=PATIENCE)

    def work(me: int) -> None:
        writer.append(me, -1)
        begun.wait()
        for number in range(100_000):
            try:
                writer.append(me, number)
            except StoreError:
                return
            accepted[me].append(number)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    writer.close()
    for thread in threads:
        thread.join(PATIENCE)

    assert {me: [-1, *accepted[me]] for me in range(2)} == dict(store.items("chats"))


def test_the_columns_of_a_group_and_decorated_attributes_are_no_exception(path: Path) -> None:
    """Each column refuses what comes after its close; the others go on."""

    @bounded_registry("chats", "notes", maxsize=5, store=f"sqlite:{path}", name="bot")
    class Bot:
        def __init__(self) -> None:
            self.chats: Any = {}
            self.notes: Any = {}

    bot = Bot()
    log = bot.chats.setdefault("ann", [])
    bot.notes["ann"] = {"v": 1}
    with pytest.raises(StoreError, match="lease"), bot.notes.lease("ann") as note:  # noqa: PT012 - its end raises
        bot.notes.close()
        note["v"] = 2
    log.append("one")
    with bot.chats.lease("ann") as chat:
        chat.append("two")
    bot.chats.close()
    for change in (lambda: log.append("late"), lambda: bot.chats.update(bob=[]), lambda: bot.notes.update(bob=1)):
        with pytest.raises(StoreError, match="closed"):
            change()
    with open_store(f"sqlite:{path}") as store:
        assert ["one", "two"] == dict(store.items("bot.chats"))["ann"]
        assert {"v": 1} == dict(store.items("bot.notes"))["ann"]


def test_an_attribute_that_is_assigned_again_leaves_the_old_registry_to_its_holder(path: Path) -> None:
    """Its lists take changes, which nobody saves; a lease that was under way says so, if it has changed something."""

    @bounded_registry("chats", maxsize=5, store=f"sqlite:{path}", name="bot")
    class Bot:
        def __init__(self) -> None:
            self.chats: Any = {}

    changes: list[tuple[Any, Callable[[Any], Any]]] = [
        (["one"], lambda log: log.append("late")),
        ({"v": 1}, lambda held: held.update(v=2)),
    ]
    for value, change in changes:
        bot = Bot()
        bot.chats["ann"] = copy.deepcopy(value)
        with (  # noqa: PT012 - the end of the lease raises
            pytest.raises(StoreError, match="was changed in its lease"),
            bot.chats.lease("ann") as held,
        ):
            bot.chats = {}
            change(held)
        with bot.chats.lease("ann") as held:
            assert value == held
            bot.chats = {}
        old, bot.chats = bot.chats, {}
        old["bob"] = ["mine"]
        old["bob"].append("still mine")
        bot.chats.close()


def test_an_assignment_that_would_lose_a_change_is_refused(path: Path) -> None:
    """What was changed in place into something that cannot be stored is an error there, and nothing has changed."""

    @bounded_registry("chats", maxsize=5, store=f"sqlite:{path}", name="bot")
    class Bot:
        def __init__(self) -> None:
            self.chats: Any = {}

    bot = Bot()
    chats = bot.chats
    chats["ann"] = {"v": 1}
    chats["ann"]["v"] = object()
    with pytest.raises(TypeError, match="object"):
        bot.chats = {}

    assert bot.chats is chats
    chats["ann"]["v"] = 2
    chats["bob"] = ["one"]
    chats.close()
    with open_store(f"sqlite:{path}") as store:
        assert {"ann": {"v": 2}, "bob": ["one"]} == dict(store.items("bot"))


def test_a_writer_that_is_closed_by_itself_refuses_through_its_registry(store: Gated) -> None:
    """So does a registry on a writer of yours that it was given, once the registry is closed."""
    writer = WriteBehind(store, space="chats")
    chats: Registry[str, Any] = Registry(maxsize=10, store=writer, name="chats")
    chats["log"], chats["x"] = ["one"], {"v": 1}
    log = chats["log"]
    chats.close()
    with pytest.raises(StoreError, match="closed"):
        log.append("late")

    again: Registry[str, Any] = Registry(maxsize=10, store=writer, name="chats")
    log = again["log"]
    lease = again.lease("x")
    lease.__enter__()["v"] = 2
    again.flush()
    writer.close()
    for change in (lambda: log.append("late"), lambda: again.update(bob=1), lambda: again.pop("log")):
        with pytest.raises(StoreError, match="closed"):
            change()
    again["x"]["v"] = 3
    with pytest.raises(StoreError, match="closed"):
        lease.__exit__(None, None, None)
    with pytest.raises(StoreError, match="closed"):
        again.flush()
    with pytest.raises(StoreError, match="closed"):
        again.close()

    assert {"log": ["one"], "x": {"v": 2}} == dict(store.items("chats"))


@pytest.mark.parametrize("kind", ["append", "lease of a list", "lease of a dict", "set", "async"])
@pytest.mark.parametrize("end", ["close", "aclose"])
def test_everything_that_threads_were_not_refused_is_stored(kind: str, end: str, path: Path) -> None:
    """Three threads write until they are refused; what they were not refused is what a new registry finds."""
    chats: Registry[str, Any] = Registry(maxsize=10, store=f"sqlite:{path}", name="chats")
    accepted: list[list[int]] = [[], [], []]
    begun = threading.Barrier(4, timeout=PATIENCE)
    wrote = [threading.Event(), threading.Event(), threading.Event()]

    def step(me: int, number: int) -> None:
        key = str(me)
        if kind == "append":
            chats.setdefault(key, []).append(number)
        elif kind == "set":
            chats[key] = number
        else:
            with chats.lease(key, create=dict if "dict" in kind else list) as value:
                value.update(n=number) if isinstance(value, dict) else value.append(number)

    async def steps(me: int) -> None:
        with contextlib.suppress(StoreError):
            for number in range(100_000):
                async with chats.lease(str(me), create=list) as value:
                    value.append(number)
                accepted[me].append(number)
                wrote[me].set()
                await asyncio.sleep(0)

    def work(me: int) -> None:
        step(me, -1) if kind != "async" else None
        begun.wait()
        if kind == "async":
            asyncio.run(steps(me))
            return
        for number in range(100_000):
            try:
                step(me, number)
            except StoreError:
                return
            accepted[me].append(number)
            wrote[me].set()

    threads = [threading.Thread(target=work, args=(me,)) for me in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    assert all(event.wait(PATIENCE) for event in wrote)
    _close(chats) if end == "close" else _aclose(chats)
    for thread in threads:
        thread.join(PATIENCE)

    with Registry[str, Any](maxsize=10, store=f"sqlite:{path}", name="chats") as again:
        for me, numbers in enumerate(accepted):
            found = again[str(me)]
            if isinstance(found, dict):
                found = found["n"]
            if isinstance(found, int):  # the last one that was not refused, or one that was, but was saved
                assert numbers[-1] <= found <= numbers[-1] + 1
            else:
                assert [number for number in numbers if number not in set(found)] == []


_PROGRAM = """
    import asyncio, sys, threading
    import hygiene
    from hygiene import Registry, StoreError

    chats = Registry(maxsize=10, store="sqlite:" + sys.argv[1], name="chats")
    ready = threading.Barrier(3)
    wrote = {"plain": threading.Event(), "leased": threading.Event()}

    def append(key):
        with open(f"{sys.argv[1]}.{key}", "a") as file:
            chats.setdefault(key, []).append(-1)
            ready.wait()
            for number in range(1_000_000):
                try:
                    if key == "leased":
                        with chats.lease(key) as log:
                            log.append(number)
                    else:
                        chats[key].append(number)
                except StoreError:
                    return
                file.write(f"{number}\\n")
                file.flush()
                if number == 20:
                    wrote[key].set()

    for key in ("plain", "leased"):
        threading.Thread(target=append, args=(key,), daemon=True).start()
    ready.wait()
    for event in wrote.values():
        assert event.wait(30)
    how = sys.argv[2]
    if how == "shutdown":
        assert hygiene.shutdown().ok
    elif how == "ashutdown":
        assert asyncio.run(hygiene.ashutdown()).ok
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shutdown", "ashutdown", "exit"])
def test_daemon_threads_that_write_until_the_end_lose_nothing(how: str, path: Path) -> None:
    """`shutdown`, `ashutdown` and the exit of the interpreter close the registry under their hands."""
    program = textwrap.dedent(_PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), how], timeout=60, capture_output=True, text=True, check=False
    )

    assert 0 == done.returncode, done.stderr
    with open_store(f"sqlite:{path}") as store:
        found = dict(store.items("chats"))
    for key in ("plain", "leased"):
        accepted = list(map(int, path.with_name(f"{path.name}.{key}").read_text().split()))
        assert accepted
        assert not {*accepted} - {*found[key]}


@pytest.mark.parametrize("names", [("chats",), ("chats", "notes")])
def test_an_assignment_that_fails_leaves_the_attribute_and_its_store_as_they_were(
    names: tuple[str, ...], path: Path
) -> None:
    """What is written to it afterwards is saved, as before."""

    @bounded_registry(*names, maxsize=5, max_bytes="1MiB", store=f"sqlite:{path}", name="bot")
    class Bot:
        def __init__(self) -> None:
            self.chats: Any = {}
            self.notes: Any = {}

    bot = Bot()
    chats = bot.chats
    chats["ann"], chats["bob"] = ["one"], {"v": 1}
    log = chats["ann"]
    for bad in ({"ann": ["new"], "x": object()}, {"x": object()}, {"new": 1, "x": {1, 2}}):
        with pytest.raises(TypeError):
            bot.chats = bad

        assert bot.chats is chats
        assert chats["ann"] is log
    log.append("two")
    chats["bob"]["v"] = 2
    chats["eve"] = 3
    for number in range(10):
        chats[f"more {number}"] = number

    assert 5 == len(chats)
    chats.close()
    with open_store(f"sqlite:{path}") as store:
        found = dict(store.items("bot" if names == ("chats",) else "bot.chats"))
    assert [["one", "two"], {"v": 2}, 3] == [found["ann"], found["bob"], found["eve"]]
    if bot.notes:
        bot.notes.close()


def test_an_assignment_to_an_attribute_that_is_only_read_changes_nothing(path: Path) -> None:
    """It is refused, and the attribute goes on reading."""
    with Registry({"colour": "red", "log": ["one"]}, store=f"sqlite:{path}", name="settings"):
        pass
    with SQLiteStore(path, read_only=True) as store:

        @bounded_registry("settings", maxsize=5, store=store, name="settings")
        class Bot:
            def __init__(self) -> None:
                self.settings: Any = {}

        bot = Bot()
        log = bot.settings["log"]
        with pytest.raises(StoreError, match="read_only"):
            bot.settings = {"colour": "blue"}

        assert "red" == bot.settings["colour"]
        for change in (lambda: log.append("late"), lambda: bot.settings["log"].append("late")):
            with pytest.raises(StoreError, match="read_only"):
                change()
        bot.settings.close()


def test_a_list_whose_registry_was_collected_refuses_each_change(store: Gated) -> None:
    """What was appended before is saved; a later change would be saved over what the next registry has."""
    chats: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
    log = chats["log"] = History(["one"])
    log.append("two")
    del chats
    gc.collect()
    again: Registry[str, Any] = Registry(maxsize=10, store=store, name="chats")
    again["log"].append("three")
    for change in (lambda: log.append("late"), lambda: log.extend(["late"]), log.pop, log.clear):
        with pytest.raises(StoreError):
            change()

    assert ["one", "two"] == log
    assert ["one", "two", "three"] == again["log"]
    again.close()
    assert {"log": ["one", "two", "three"]} == dict(store.items("chats"))
