"""What grows is named by the path that leads to it, what does not is not, and nothing of the program is touched."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib.util
import itertools
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

import hygiene
from hygiene import History, Registry
from hygiene.janitor import janitor
from hygiene.memory import growth as growing
from hygiene.memory.growth import _ALLOWANCE, _SAMPLE, Grower, GrowthWatch, _locals_of, _sampled, _Walk, watch_growth
from hygiene.testing import ManualClock

PATIENCE = 20.0
rank = growing._rank
MINUTE = 60.0


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty module, which is the whole program: pytest and all that it has imported take half a second to walk."""
    monkeypatch.setattr(_Walk, "_enter_running", lambda _: iter(()))
    monkeypatch.setattr(growing, "_rank", lambda name, found: rank(name, found) if name in {"shop", "office"} else 9)
    module = types.ModuleType("shop")
    sys.modules["shop"] = module
    yield module
    del sys.modules["shop"]


def define(module: Any, source: str) -> None:
    exec(textwrap.dedent(source), vars(module))


def quiet() -> GrowthWatch:
    """One that reads when it is told to."""
    return watch_growth(timer=ManualClock())


def watch(grow: Callable[[int], object], readings: int = 6, steps: int = 20) -> list[Grower]:
    """What is named when *grow* is called *steps* times, with a new number each, between two readings."""
    numbers = itertools.count()
    with quiet() as growth:
        for minute in range(readings):
            for _ in range(steps):
                grow(next(numbers))
            growers = growth.read(now=minute * MINUTE, libraries=False)
    return growers


def named(growers: list[Grower], within: str = "shop") -> dict[str, str]:
    """Path and suggestion of what grows in the module, other programs' threads left aside."""
    return {grower.path: grower.suggestion for grower in growers if within in grower.path}


LEAKS = {
    "a module's dict": (
        "ORDERS = {}\ndef grow(n): ORDERS[n] = object()",
        "shop.ORDERS",
        'guard("shop", "ORDERS", maxsize=1000)',
    ),
    "a dict of plain strings": (
        "NAMES = {}\ndef grow(n): NAMES[str(n)] = str(n)",
        "shop.NAMES",
        'guard("shop", "NAMES", maxsize=1000)',
    ),
    "a module's list": (
        "LOG = []\ndef grow(n): LOG.append(n)",
        "shop.LOG",
        'guard("shop", "LOG", maxlen=1000)',
    ),
    "a set": (
        "SEEN = set()\ndef grow(n): SEEN.add(n)",
        "shop.SEEN",
        "SEEN = Registry(maxsize=1000)  # in place of the set: SEEN[item] = True",
    ),
    "a deque": (
        "from collections import deque\nLATE = deque()\ndef grow(n): LATE.append(n)",
        "shop.LATE",
        "LATE = deque(maxlen=1000)",
    ),
    "a dict of a class": (
        "class Bot:\n    sessions = {}\ndef grow(n): Bot.sessions[n] = []",
        "shop.Bot.sessions",
        '@bounded_registry("sessions", maxsize=1000)  # above class Bot',
    ),
    "an instance's dict, two objects away": (
        """
        class State:
            def __init__(self): self.conversations = {}
        class Bot:
            def __init__(self): self.state = State()
        bot = Bot()
        def grow(n): bot.state.conversations[n] = []
        """,
        "shop.bot.state.conversations",
        '@bounded_registry("conversations", maxsize=1000)  # above class State',
    ),
    "an instance's list, in slots": (
        """
        class Chat:
            __slots__ = ("messages",)
            def __init__(self): self.messages = []
        chat = Chat()
        def grow(n): chat.messages.append(n)
        """,
        "shop.chat.messages",
        '@bounded_history("messages", maxlen=1000)  # above class Chat',
    ),
    "one attribute of many instances": (
        """
        class Session:
            def __init__(self): self.events = []
        sessions = {n: Session() for n in range(1200)}
        def grow(n):
            for session in sessions.values(): session.events.append(n)
        """,
        "shop.Session.events (over 1,200 instances)",
        '@bounded_history("events", maxlen=1000)  # above class Session',
    ),
    "a closure": (
        """
        def make():
            seen = {}
            def handler(n): seen[n] = n
            return handler
        grow = make()
        """,
        "shop.make.<locals>.handler: seen",
        "seen = Registry(maxsize=1000)",
    ),
    "a default argument": (
        "def grow(n, found=[]): found.append(n)",
        "shop.grow(found=)",
        "found = History(maxlen=1000)",
    ),
    "a function's attribute": (
        "def grow(n): grow.cache[n] = n\ngrow.cache = {}",
        "shop.grow.cache",
        "cache = Registry(maxsize=1000)",
    ),
    "an unbounded cache": (
        "from functools import lru_cache\n@lru_cache(maxsize=None)\ndef grow(n): return n",
        "shop.grow",
        "@lru_cache(maxsize=1000)  # on grow",
    ),
    "a nested dict": (
        "STATE = {'rooms': {'members': {}}}\ndef grow(n): STATE['rooms']['members'][n] = n",
        "shop.STATE['rooms']['members']",
        "shop.STATE['rooms']['members'] = Registry(maxsize=1000)",
    ),
    "dicts in a dict": (
        "ROOMS = {n: {} for n in range(20)}\ndef grow(n): ROOMS[n % 20][n] = n",
        "shop.ROOMS[*] (over 20 instances)",
        'guard("shop", "ROOMS", maxsize=1000, depth=1)',
    ),
    "lists in a dict": (
        "from collections import defaultdict\nCHATS = defaultdict(list)\ndef grow(n): CHATS[n % 5].append(n)",
        "shop.CHATS[*] (over 5 instances)",
        'guard("shop", "CHATS", maxsize=1000, values=partial(History, maxlen=1000))',
    ),
    "listeners": (
        """
        class Bus:
            def __init__(self): self.listeners = []
        bus = Bus()
        def grow(n): bus.listeners.append(lambda: n)
        """,
        "shop.bus.listeners",
        '@weak_listeners("listeners")  # above class Bus',
    ),
    "callbacks under another name": (
        """
        class Bus:
            def __init__(self): self.interested = {}
        bus = Bus()
        def grow(n): bus.interested[n] = lambda: n
        """,
        "shop.bus.interested",
        '@weak_listeners("interested")  # above class Bus',
    ),
    "a queue that nobody empties": (
        "from queue import Queue\ntodo = Queue()\ndef grow(n): todo.put(n)",
        "shop.todo.queue",
        "Queue(maxsize=1000)",
    ),
    "a subclass of dict with attributes": (
        """
        class Store(dict):
            def __init__(self): self.index = {}
        store = Store()
        def grow(n): store.index[n] = n
        """,
        "shop.store.index",
        '@bounded_registry("index", maxsize=1000)  # above class Store',
    ),
    "what a bound method belongs to": (
        """
        class Collector:
            def __init__(self): self.rows = []
            def take(self, n): self.rows.append(n)
        grow = Collector().take
        """,
        "shop.grow.__self__.rows",
        '@bounded_history("rows", maxlen=1000)  # above class Collector',
    ),
    "attributes that are set by name": (
        """
        class Everything: pass
        everything = Everything()
        def grow(n):
            for step in range(50): setattr(everything, f"item{n * 50 + step}", [])
        """,
        "shop.everything.__dict__",
        "self.items = Registry(maxsize=1000)  # in place of attributes that are set by name",
    ),
}


@pytest.mark.parametrize(("source", "path", "suggestion"), LEAKS.values(), ids=LEAKS)
def test_a_planted_leak_is_named_by_its_path_with_the_line_that_bounds_it(
    shop: Any, source: str, path: str, suggestion: str
) -> None:
    """Wherever it is, it is the one thing that is named."""
    define(shop, source)

    growers = watch(shop.grow)

    assert {path: suggestion} == {name: re.sub("=[25]000", "=1000", line) for name, line in named(growers).items()}


def test_a_grower_tells_its_size_its_rate_and_its_kind(shop: Any) -> None:
    """Numbers are those of the last reading, the rate is in items a second, the fastest comes first."""
    define(shop, "SLOW, FAST = {}, []\ndef grow(n):\n    SLOW[n] = n\n    FAST.extend((n, n, n))")

    fast, slow = (grower for grower in watch(shop.grow, readings=5, steps=12) if grower.path.startswith("shop."))

    assert ("shop.FAST", 180, "list", 1) == (fast.path, fast.size, fast.kind, fast.instances)
    assert ("shop.SLOW", 60, "dict", 1) == (slow.path, slow.size, slow.kind, slow.instances)
    assert pytest.approx(36 / MINUTE) == fast.rate
    assert pytest.approx(12 / MINUTE) == slow.rate
    assert 'shop.SLOW: 60 items, +12 a minute; guard("shop", "SLOW", maxsize=1000)' == str(slow)


def test_the_suggestions_work(shop: Any) -> None:
    """What is suggested can be pasted."""
    define(shop, "ORDERS = {}\nLOG = []\nclass Bot:\n    def __init__(self): self.chats = {}\nbot = Bot()")
    define(shop, "def grow(n): ORDERS[n] = n; LOG.append(n); bot.chats[n] = n")
    suggestions = named(watch(shop.grow))

    exec(suggestions["shop.ORDERS"], dict(vars(hygiene)))
    exec(suggestions["shop.LOG"], dict(vars(hygiene)))
    decorate = eval(suggestions["shop.bot.chats"].removeprefix("@"), dict(vars(hygiene)))
    decorate(shop.Bot)

    assert isinstance(shop.ORDERS, Registry)
    assert isinstance(shop.LOG, History)
    assert isinstance(shop.Bot().chats, Registry)


def test_a_class_of_an_installed_package_is_guarded_from_outside(
    shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can put a decorator above somebody else's class."""
    shop.__file__ = str(tmp_path / "site-packages" / "shop.py")
    define(shop, "class Bot:\n    def __init__(self): self.chats = {}")
    monkeypatch.setitem(sys.modules, "office", office := types.ModuleType("office"))
    bot = vars(office)["bot"] = shop.Bot()

    growers = watch(lambda n: bot.chats.setdefault(n, n))

    assert {"office.bot.chats": 'guard("shop:Bot", "chats", maxsize=1000)'} == named(growers, "office")


@pytest.mark.slow
async def test_a_variable_of_a_task_is_named() -> None:
    """By the name that it was given, or else by that of its function."""

    async def collect(come: asyncio.Event, gone: asyncio.Event) -> None:
        pending = []
        while True:
            await come.wait()
            come.clear()
            pending.extend(range(20))
            gone.set()

    events = [(asyncio.Event(), asyncio.Event()) for _ in range(2)]
    tasks = [asyncio.create_task(collect(*events[0])), asyncio.create_task(collect(*events[1]), name="export 17")]
    with quiet() as growth:
        for minute in range(6):
            for come, gone in events:
                come.set()
                await gone.wait()
                gone.clear()
            growers = growth.read(now=minute * MINUTE, libraries=False)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

    found = {grower.path: grower.suggestion for grower in growers if "pending" in grower.path}
    assert (
        dict.fromkeys(["task collect: pending", "task export 17: pending"], "pending = History(maxlen=1000)") == found
    )


@pytest.mark.slow
async def test_what_a_task_awaits_has_variables_too() -> None:
    """A coroutine that is awaited is named after its task."""
    step = asyncio.Event()
    done = asyncio.Event()

    async def inner() -> None:
        rows = []
        while True:
            await step.wait()
            step.clear()
            rows.extend(range(20))
            done.set()

    async def outer() -> None:
        await inner()

    task = asyncio.create_task(outer(), name="loader")
    with quiet() as growth:
        for minute in range(6):
            step.set()
            await done.wait()
            done.clear()
            growers = growth.read(now=minute * MINUTE, libraries=False)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert ["task loader: inner: rows"] == [grower.path for grower in growers if "rows" in grower.path]


@pytest.mark.slow
def test_a_variable_of_a_thread_is_named() -> None:
    """A thread that never returns from its function leaks in a variable."""
    go, gone = threading.Semaphore(0), threading.Semaphore(0)
    over = threading.Event()

    def consume() -> None:
        handled = {}
        while go.acquire(timeout=PATIENCE) and not over.is_set():
            for _ in range(20):
                handled[len(handled)] = True
            gone.release()

    def grow(_: int) -> None:
        go.release()
        assert gone.acquire(timeout=PATIENCE)

    thread = threading.Thread(target=consume)
    thread.start()
    growers = watch(grow, steps=1)
    over.set()
    go.release()
    thread.join(PATIENCE)

    assert ["thread consume: handled"] == [grower.path for grower in growers if "handled" in grower.path]


@pytest.mark.slow
def test_a_variable_of_the_main_thread_is_named() -> None:
    """Most scripts keep their bot in a variable of main()."""

    class Bot:
        def __init__(self) -> None:
            self.chats: dict[int, int] = {}

    bot = Bot()

    growers = watch(lambda n: bot.chats.setdefault(n, n))

    assert [path for path in (grower.path for grower in growers) if path.endswith("bot.chats")]


# --- When it speaks ---------------------------------------------------------------------------------------------------


def readings_of(shop: Any, sizes: list[int]) -> list[bool]:
    """Whether a list of these lengths is named after each reading; what it holds first never changes."""
    shop.ITEMS = []
    said = []
    with quiet() as growth:
        for minute, size in enumerate(sizes):
            del shop.ITEMS[size:]
            shop.ITEMS.extend(range(len(shop.ITEMS), size))
            said.append("shop.ITEMS" in named(growth.read(now=minute * MINUTE, libraries=False)))
    return said


@pytest.mark.parametrize(
    ("sizes", "since"),
    [
        ([100, 110, 120, 130, 140], 3),  # three rises in a row
        ([100, 110, 150, 200, 210, 400, 420], 5),  # uneven ones: five
        ([100, 102, 104, 106, 108, 110, 112], 5),  # not before there are ten more
        ([100, 100, 110, 110, 120, 120, 130], 6),  # traffic comes and goes
        ([100, 130, *range(20, 280, 20)], 13),  # after a fall more, and each a new high
        ([3, 30, 60, 90, 120], 4),  # a short one is not followed yet
    ],
)
def test_it_speaks_after_enough_rises(shop: Any, sizes: list[int], since: int) -> None:
    """Three even rises, more of uneven ones, and more after a fall."""
    expected = [position >= since for position in range(len(sizes))]

    assert expected == readings_of(shop, sizes)


def test_what_stops_growing_is_no_longer_named(shop: Any) -> None:
    """A cache that is full, and a program that has warmed up, go quiet; what begins again is named again."""
    grown = [100, 110, 120, 130]

    said = readings_of(shop, [*grown, *[130] * 12, 140, 150, 160, 170])

    assert [False, False, False, True, True, True, True, False] == said[:8]
    assert [False, False, True, True] == said[-4:]
    assert not any(said[7:-2])


def test_a_dip_does_not_take_back_what_was_said(shop: Any) -> None:
    """A leak under traffic falls now and then; what is given back for the most part was none."""
    said = readings_of(shop, [100, 110, 120, 130, 140, 138, 145, 30, 40])

    assert [False, False, False, True, True] == said[:5]
    assert [False, False] == said[-2:]


def test_a_container_whose_oldest_items_leave_needs_longer(shop: Any) -> None:
    """What grows while its head changes is a window, or a crowd that comes and goes."""
    shop.ITEMS = deque(range(100))
    said = []
    with quiet() as growth:
        for minute in range(8):
            shop.ITEMS.popleft()
            shop.ITEMS.extend([object() for _ in range(11)])
            said.append("shop.ITEMS" in named(growth.read(now=minute * MINUTE, libraries=False)))

    assert not any(said)


def busy_program(seed: int) -> tuple[dict[str, Any], Callable[[int], None]]:
    """Containers as healthy programs have them, and one second of their life."""
    draw = random.Random(seed)
    numbers = itertools.count()
    recent: OrderedDict[int, int] = OrderedDict()
    flying: dict[int, int] = {}
    window: list[int] = []
    queue: deque[int] = deque()
    batch: list[int] = []
    timed: dict[int, int] = {}
    rooms: dict[int, list[int]] = {room: [] for room in range(30)}
    online = set(range(300))
    chats: dict[int, types.SimpleNamespace] = {}

    def second(now: int) -> None:
        for _ in range(draw.randrange(5, 30)):
            number, user = next(numbers), draw.randrange(2_000)
            recent[user] = number
            recent.move_to_end(user)
            while len(recent) > 500:
                recent.popitem(last=False)
            flying[number] = timed[number] = now
            for items in (window, queue, batch, rooms[user % 30]):
                items.append(number)
            del window[:-200]
            if len(batch) >= 500:
                batch.clear()
            if len(rooms[user % 30]) > 60:
                del rooms[user % 30][:30]
            chats.setdefault(user % 400, types.SimpleNamespace(events=[])).events.append(number)
        for number in [number for number in flying if draw.random() < 0.4]:
            del flying[number]
        for number in [number for number, since in timed.items() if since < now - 20]:
            del timed[number]
        for _ in range(min(draw.randrange(40), len(queue))):
            queue.popleft()
        for user in [user for user in chats if draw.random() < 0.02]:
            del chats[user]
        online.discard(draw.randrange(600))
        online.add(draw.randrange(600))

    parts = {
        "recent": recent,
        "flying": flying,
        "window": window,
        "queue": queue,
        "batch": batch,
        "timed": timed,
        "rooms": rooms,
        "online": online,
        "chats": chats,
    }
    return parts, second


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_healthy_busy_program_gets_no_report_in_ten_minutes(shop: Any, seed: int) -> None:
    """An LRU dict, requests under way, a window, a queue, a batch, sessions that end: all full of life, none grows."""
    parts, second = busy_program(seed)
    vars(shop).update(parts)
    said = []
    for now in range(180):  # until it is warm
        second(now)
    with quiet() as growth:
        for now in range(180, 780):
            second(now)
            if now % 30 == 0:
                said += named(growth.read(now=float(now), libraries=False), "shop")

    assert [] == said
    assert 20 == growth.readings


# --- What is left alone -----------------------------------------------------------------------------------------------


def test_what_keeps_a_bound_of_its_own_is_never_named(shop: Any) -> None:
    """A registry on its way to its maxsize, a deque with maxlen, a cache with maxsize and a bounded queue fill up."""
    shop.registry = Registry(maxsize=10_000)
    shop.history = History(maxlen=10_000)
    shop.window = deque(maxlen=10_000)
    shop.unbounded = Registry()
    define(
        shop,
        """
        from functools import lru_cache
        from queue import Queue
        from cachetools import LRUCache
        todo = Queue(maxsize=10_000)
        cache = LRUCache(maxsize=10_000)
        @lru_cache(maxsize=10_000)
        def look(n): return n
        def grow(n):
            registry[n] = unbounded[n] = n
            history.append(n)
            window.append(n)
            todo.put(n)
            cache[n] = n
            look(n)
        """,
    )

    assert ["shop.unbounded"] == list(named(watch(shop.grow)))


def test_it_does_not_name_itself(shop: Any) -> None:
    """What it keeps about a growing program grows; nobody wants to read about that."""
    growth = shop.growth = quiet()
    with growth:
        for minute in range(8):
            for n in range(30):
                setattr(shop, f"part{minute}_{n}", dict.fromkeys(range(10)))
            growers = growth.read(now=minute * MINUTE, libraries=False)
        sites = set(growth._sites)

    assert [] == [grower.path for grower in growers if "growth" in grower.path]
    assert {site for site in sites if site.startswith("shop.")} == {
        f"shop.part{minute}_{n}" for minute in range(8) for n in range(30)
    }


CALLED: list[str] = []


class _Meta(type):
    """A class of such classes is no better."""

    def __getattribute__(cls, name: str) -> Any:
        CALLED.append(f"type.{name}")
        return super().__getattribute__(name)

    def __hash__(cls) -> int:
        CALLED.append("type.__hash__")
        return 1

    def __eq__(cls, other: object) -> bool:
        CALLED.append("type.__eq__")
        return cls is other

    def __instancecheck__(cls, instance: object) -> bool:
        CALLED.append("__instancecheck__")
        return False

    def __subclasscheck__(cls, subclass: type) -> bool:
        CALLED.append("__subclasscheck__")
        return False


def _raising(name: str) -> Any:
    def method(self: object, *_: object) -> Any:
        CALLED.append(name)
        raise RuntimeError(name)

    return method


HOSTILE = (
    *("__len__", "__iter__", "__eq__", "__hash__", "__sizeof__", "__getattr__", "__getitem__", "__bool__", "__repr__"),
    *("__contains__", "__str__", "__reversed__", "__dir__", "__get__", "__length_hint__", "items", "keys", "values"),
)


def hostile(*bases: type, **more: object) -> Any:
    body = {name: _raising(name) for name in HOSTILE}
    body["__getattribute__"] = _raising("__getattribute__")
    body["broken"] = property(_raising("property"))
    body["__class__"] = property(_raising("__class__"))
    return _Meta("Hostile", bases, {**body, "__module__": "shop", **more})


def test_no_code_of_the_program_runs(shop: Any) -> None:
    """Methods and properties that raise are not called, and what hides behind them is named all the same."""
    kinds = {"thing": hostile(), "mapping": hostile(dict), "items": hostile(list), "group": hostile(set)}
    for name, cls in kinds.items():
        setattr(shop, name, cls.__new__(cls))
    masked = hostile(__dict__=property(_raising("__dict__")), __slots__=("rows",))
    shop.masked = masked.__new__(masked)
    masked.rows.__set__(shop.masked, rows := [])
    own: dict[str, Any] = {}
    object.__setattr__(shop.thing, "chats", own)
    shop.many = [shop.thing, shop.mapping, kinds]

    def grow(n: int) -> None:
        own[str(n)] = n
        rows.append(n)
        dict.__setitem__(shop.mapping, n, n)
        list.append(shop.items, n)
        set.add(shop.group, n)

    CALLED.clear()
    growers = watch(grow)
    called = CALLED.copy()

    assert [] == called
    assert {"shop.thing.chats", "shop.masked.rows", "shop.mapping", "shop.items", "shop.group"} == set(named(growers))


@pytest.mark.parametrize("method", ["__eq__", "__hash__"])
def test_a_metaclass_that_compares_by_itself_hides_nothing(shop: Any, method: str) -> None:
    """Classes of some frameworks have no hash, or one that runs code: a leak beside them is named all the same."""
    meta = type("Meta", (type,), {method: _raising(method)})
    things = [type.__call__(meta, "Thing", (), {}) for _ in range(3)]
    shop.kinds = things
    shop.plugins = [thing() for thing in things] * 10
    shop.listed = [list.__new__(type.__call__(meta, "Items", (list,), {}))]
    shop.calls = [type.__call__(meta, "Call", (), {"__call__": print})() for _ in range(20)]
    shop.leak = {}

    CALLED.clear()
    growers = watch(lambda n: shop.leak.setdefault(n, [n]))

    assert ([], ["shop.leak"]) == (CALLED, list(named(growers)))


def test_an_object_with_ever_more_attributes_is_counted_once(shop: Any) -> None:
    """Its dict is visited in several slices, and may be reached by another path as well."""
    shop.thing = types.SimpleNamespace()
    shop.also = vars(shop.thing)
    grown: list[int] = []

    def grow(n: int) -> None:
        setattr(shop.thing, f"channel_{n}", [n])
        grown.append(n)

    growers = watch(grow, readings=8, steps=200)

    assert [(1600, 1)] == [(one.size, one.instances) for one in growers]


def test_the_last_reading_is_that_of_the_end(shop: Any) -> None:
    """Sizes are those at the exit; a container that is gone by then, or cleared, is named with its last size."""
    shop.kept, shop.cleared, shop.dropped = [], [], []

    def grow() -> None:
        for one in (shop.kept, shop.cleared, shop.dropped):
            one.extend(range(20))

    clock = ManualClock()
    with watch_growth(timer=clock) as growth:
        for _ in range(6):
            grow()
            clock.advance(MINUTE)
            growth.read()
        grow()
        shop.cleared.clear()
        del shop.dropped

        found = {one.path: one.size for one in growth.finish()}

    assert {"shop.kept": 140, "shop.cleared": 120, "shop.dropped": 120} == found
    assert growth.closed


def test_to_finish_takes_no_longer_than_it_may(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk that is given up leaves what the last complete reading named."""
    shop.kept = []
    with watch_growth(timer=ManualClock()) as growth:
        for now in range(6):
            shop.kept.extend(range(20))
            growth.read(now=now * MINUTE)
        shop.kept.extend(range(20))

        monkeypatch.setattr(growing, "_SLICE", 0.0)  # no slice gets anywhere

        found = growth.finish(timeout=1e-9)

    assert [("shop.kept", 120)] == [(one.path, one.size) for one in found]
    assert found == growth.finish()


@pytest.mark.slow
def test_a_container_that_changes_while_it_is_walked_does_no_harm(shop: Any) -> None:
    """Other threads go on changing dicts, lists, sets and classes during a reading."""
    over = threading.Event()
    shop.table = {n: {} for n in range(50)}
    shop.group, shop.items = set(), []
    define(shop, "class Thing: pass\nthing = Thing()")

    def change() -> None:
        for n in itertools.count():
            if over.is_set():
                return
            shop.table[n % 97] = {n: [n]}
            shop.table.pop((n * 7) % 97, None)
            shop.group ^= {n % 61, (n % 61,)}
            shop.items[n % 17 :] = [[n]] * (n % 23)
            setattr(shop.Thing, f"part{n % 31}", [n])
            setattr(shop.thing, f"part{n % 31}", [n])
            setattr(shop, f"part{n % 31}", {n: n})
            if n % 3 == 0:
                delattr(shop, f"part{n % 31}")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with quiet() as growth:
            for minute in range(20):
                growth.read(now=minute * MINUTE, libraries=False)
    finally:
        over.set()
        thread.join(PATIENCE)

    assert 20 == growth.readings


class Thing:
    """Can be referred to weakly."""

    def __init__(self) -> None:
        self.parts: list[Any] = []


def test_nothing_is_kept_alive_between_slices(shop: Any) -> None:
    """Whatever the walk has to come back to may die meanwhile, by its last reference and at once."""
    shop.things = [Thing() for _ in range(40)]
    shop.loop = shop.things[0].parts
    shop.loop.append(shop.loop)
    dead = [weakref.ref(thing) for thing in shop.things]
    walk = _Walk(libraries=False)
    # As `go_on` with a deadline that has passed when the first step is done.
    while not any(node.label == "shop.things[*]" for _, node, _, _ in walk._frontier):
        if walk._frontier:
            walk._expand(*walk._frontier.popleft())
        else:
            list(walk._stages.pop()())

    del shop.things[:], shop.loop

    assert [None] * 40 == [reference() for reference in dead]
    while not walk.go_on(0.0, 1.0):
        pass
    assert not any(".parts" in path for path in walk.found)


def test_variables_are_not_kept_by_the_frame_that_was_read() -> None:
    """Before Python 3.13 a frame remembers what its variables were when somebody last looked."""

    def generate() -> Generator[int, None, None]:
        thing: Thing | None = Thing()
        other = thing
        yield id(other)
        other = thing = None
        yield id(other)

    generator = generate()
    next(generator)

    found = dict(_locals_of(generator.gi_frame))
    dead = weakref.ref(found.pop("thing"))
    del found
    next(generator)

    assert dead() is None
    generator.close()


def test_a_function_that_looks_at_its_own_variables_keeps_what_it_saw() -> None:
    """The dict that locals() has returned is not emptied under its owner."""
    seen: list[dict[str, Any]] = []

    def generate() -> Generator[None, None, None]:
        mark = "here"
        seen.append(locals())
        yield
        del mark

    generator = generate()
    next(generator)

    _locals_of(generator.gi_frame)

    assert "here" == seen[0]["mark"]
    generator.close()


@pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="variables are read where they are, and a debugger has none of it"
)
def test_the_variables_of_a_debugged_program_are_left_alone() -> None:
    """A debugger writes back what it has read, so that nobody else may touch it."""

    def generate() -> Generator[None, None, None]:
        kept = [1]
        yield
        kept.append(2)

    generator = generate()
    next(generator)
    before = threading.gettrace()
    threading.settrace(lambda *_: None)
    try:
        found = _locals_of(generator.gi_frame)
    finally:
        threading.settrace(before)  # type: ignore[arg-type] # None is what there was

    assert [] == found
    assert ["kept"] == [name for name, _ in _locals_of(generator.gi_frame)]
    generator.close()


def test_what_waits_to_go_on_keeps_its_variables(shop: Any) -> None:
    """A generator, and an asynchronous one, that nobody has finished."""
    define(
        shop,
        """
        def numbers():
            rows = []
            while True:
                rows.append((yield))
        async def events():
            heard = []
            while True:
                heard.append((yield))
        source, stream = numbers(), events()
        def unfinished():
            def inner(): return later
            return inner
            later = 1
        inner = unfinished()
        next(source)
        def step(coroutine):
            try: coroutine.send(None)
            except StopIteration: pass
        step(stream.asend(None))
        def grow(n):
            source.send(n)
            step(stream.asend(n))
        """,
    )

    found = named(watch(shop.grow), "generator")
    shop.source.close()
    shop.step(shop.stream.aclose())

    assert {
        "generator numbers: rows": "rows = History(maxlen=1000)",
        "generator events: heard": "heard = History(maxlen=1000)",
    } == found


def test_what_cannot_be_looked_into_is_passed_over(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One surprise does not end a reading."""
    define(shop, "class Odd:\n    def __init__(self): self.rows = []\nodd, ITEMS = Odd(), []")
    shape = growing._shape

    def surprised(cls: Any) -> Any:
        if cls.__name__ == "Odd":
            raise RuntimeError("dictionary changed size during iteration")
        return shape(cls)

    monkeypatch.setattr(growing, "_shape", surprised)

    assert ["shop.ITEMS"] == list(named(watch(lambda n: (shop.odd.rows.append(n), shop.ITEMS.append(n)))))


# --- Large processes --------------------------------------------------------------------------------------------------


def test_of_a_large_container_a_few_items_stand_for_the_rest() -> None:
    """A dict of a million is one node, and a walk looks at its two ends."""
    numbers = range(100_000)
    half = _SAMPLE // 2
    ends = [*range(half), *range(99_999, 99_999 - half, -1)]

    assert sorted(ends) == sorted(_sampled(list(numbers), 2, 100_000))
    assert sorted(ends) == sorted(_sampled(deque(numbers), 4, 100_000))
    assert sorted(ends) == sorted(_sampled(dict(zip(numbers, numbers, strict=True)), 1, 100_000))
    assert _SAMPLE == len(_sampled(set(numbers), 3, 100_000))


def test_what_is_done_at_once_is_limited(shop: Any) -> None:
    """However deep and wide the containers of one name are, the walk comes back for breath."""
    shop.deep = {n: {m: {k: [k] for k in range(30)} for m in range(30)} for n in range(30)}
    walk = _Walk(libraries=False)
    walk._allowance = _ALLOWANCE
    before = len(walk._seen)

    walk._visit(shop, type(_node())(label="shop", holder=_node().holder), 20, 0, resumable=True)

    assert 50 < len(walk._seen) - before < 2 * _ALLOWANCE
    assert {"shop.deep", "shop.deep[*]", "shop.deep[*][*]", "shop.deep[*][*][*]"} == set(walk.found)


def _node() -> Any:
    walk = _Walk(libraries=False)
    list(walk._stages.pop()())
    return walk._frontier[0][1]


@pytest.mark.slow
def test_a_long_chain_of_objects_that_cannot_be_weak_ends_somewhere(shop: Any) -> None:
    """A linked list of a hundred thousand does not overflow the stack."""
    define(
        shop,
        """
        class Link:
            __slots__ = ("next", "rows")
        first = None
        for _ in range(100_000):
            link = Link()
            link.next, link.rows = first, []
            first = link
        """,
    )
    with quiet() as growth:
        growth.read(libraries=False)

    while shop.first is not None:  # or its end would be recursive, too
        shop.first = shop.link = shop.first.next
    assert 1 == growth.readings


def test_what_is_followed_is_bounded(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with more containers than that is sampled."""
    monkeypatch.setattr("hygiene.memory.growth._SITES", 50)
    for n in range(200):
        setattr(shop, f"part{n}", dict.fromkeys(range(10)))
    with quiet() as growth:
        growth.read(libraries=False)

        assert 50 == len(growth._sites)


def test_libraries_are_read_less_often_where_reading_them_takes_too_long(
    shop: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was found in them is still there in between, and grows on at the next whole reading."""
    monkeypatch.setitem(sys.modules, "office", office := types.ModuleType("office"))
    office.__file__ = str(tmp_path / "site-packages" / "office.py")
    shop.items, vars(office)["rows"] = [1] * 100, [1] * 100
    # The first has a minute for 1 s of work, which is more than its share.
    whole: list[bool] = []
    monkeypatch.setattr(_Walk, "__init__", functools.partialmethod(_noting, _Walk.__init__, whole))
    clock = ManualClock()
    said = []
    with watch_growth(timer=clock) as growth:
        for _ in range(16):
            shop.items.append(1)
            office.rows.extend([1] * 10)
            growth._visit()
            while growth._walk is not None:
                growth._walk.spent += 1.0
                growth._visit()
            clock.advance(MINUTE)
            said.append(sorted(grower.path for grower in growth.growers()))

        assert {"shop.items", "office.rows"} == set(growth._sites)
    assert [True, False, False, False] * 4 == whole
    assert ["office.rows", "shop.items"] == said[-1]


def _noting(walk: _Walk, begin: Callable[..., None], whole: list[bool], *, libraries: bool = True) -> None:
    begin(walk, libraries=libraries)
    walk.spent = 1.0
    whole.append(libraries)


# --- Its own life -----------------------------------------------------------------------------------------------------


class _Telling(GrowthWatch):
    """Tells after each reading."""

    def __init__(self, interval: float) -> None:
        self.read_once = threading.Semaphore(0)
        super().__init__(interval)

    def _note(self, sites: Any, growing_: Any) -> None:
        super()._note(sites, growing_)
        self.read_once.release()


def test_it_reads_by_itself(shop: Any) -> None:
    """In the background, as long as it is open, until it knows."""
    shop.items = []
    with _Telling(0.01) as growth:
        for _ in range(200):
            shop.items.extend(range(20))
            assert growth.read_once.acquire(timeout=PATIENCE)
            if "shop.items" in named(growth.growers()):
                break

        assert "shop.items" in named(growth.growers())
        assert growth.readings >= 4
        assert growth.spent > 0
    assert growth.closed
    assert "shop.items" in named(growth.growers())


def test_after_close_nothing_is_read() -> None:
    """Closing twice does no harm, reading afterwards is an error, and the janitor forgets it."""
    growth = watch_growth(interval=3600)
    growth.close()
    growth.close()

    assert growth._visit() is None
    with pytest.raises(ValueError, match="watching has ended"):
        growth.read()
    assert "<watch_growth closed, " in repr(growth)


def test_one_that_nobody_has_any_more_stops() -> None:
    """The janitor holds it weakly."""
    growth = weakref.ref(_Telling(0.01))
    gc.collect()

    assert growth() is None


def test_it_is_quiet_while_somebody_reads_in_the_foreground() -> None:
    """The janitor does not wait for a reading that takes long."""
    growth = quiet()
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with growth._lock:
            held.set()
            over.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(PATIENCE)
    delay = growth._visit()
    over.set()
    thread.join(PATIENCE)

    assert delay is not None
    assert 0 < delay < 1
    assert 0 == growth.readings


def test_slices_take_turns_with_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the default interval less than 1 % of a core, at a second half of one at the most."""
    monkeypatch.setattr(_Walk, "go_on", functools.partialmethod(_spend, 0.002))

    def share(interval: float) -> float:
        growth = watch_growth(interval, timer=ManualClock())
        pause = growth._visit()
        assert pause is not None
        return 0.002 / (0.002 + pause)

    assert share(60.0) < 0.01
    assert pytest.approx(0.5) == share(1.0)
    assert pytest.approx(0.5) == share(0.01)


def _spend(walk: _Walk, spent: float, _now: float, _slice: float) -> bool:
    walk.spent += spent
    return False


@pytest.mark.parametrize(("interval", "error"), [(0, ValueError), (-1.0, ValueError), (None, TypeError)])
def test_an_interval_must_be_a_time(interval: Any, error: type[Exception]) -> None:
    """Nothing is started by a wrong call."""
    with pytest.raises(error, match="interval must be positive"):
        watch_growth(interval)


def test_the_interval_may_be_text() -> None:
    """As everywhere."""
    with watch_growth("90s", timer=ManualClock()) as growth:
        assert 90.0 == growth.interval
        assert "<watch_growth every 90 s, 0 readings, 0 growers>" == repr(growth)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_goes_on_watching() -> None:
    """Its janitor starts anew, whatever thread held the lock."""
    script = """
        import os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from hygiene.memory.growth import watch_growth
        growth = watch_growth(interval=3600)
        growth._lock.acquire()
        child = os.fork()
        if child == 0:
            import threading
            done = threading.Event()
            threading.Thread(target=lambda: (growth.read(), done.set()), daemon=True).start()
            os._exit(0 if done.wait(30) and growth.readings else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ("0\n", "") == (done.stdout, done.stderr)


def test_nothing_starts_at_import() -> None:
    """Importing it watches nothing."""
    assert not any(isinstance(charge[2](), GrowthWatch) for charge in janitor._agenda)


# --- Published packages -----------------------------------------------------------------------------------------------

SUBJECTS = [
    "aiodataloader_cache",
    "aiogram_memory_storage",
    "beaker_memory_sessions",
    "cachecontrol_dict_cache",
    "dogpile_memory",
    "huey_memory",
    "paho_offline_publish",
    "prometheus_labels",
    "starsessions_memory",
    "telebot_state_memory",
    "transitions_models",
]


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.filterwarnings("ignore")  # the packages' own
def test_a_published_package_that_leaks_is_named(project_root: Path, shop: Any, name: str) -> None:
    """Driven through its own public interface, it grows in one of the attributes that its driver lists."""
    path = project_root.parent / "shared" / "subjects" / f"{name}.py"
    if not path.is_file():
        pytest.skip("the published packages (../shared/subjects) are not on this machine")
    spec = importlib.util.spec_from_file_location("subject", path)
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    try:
        shop.instance = driver.make()
        driver.churn(shop.instance, 20)
        growers = watch(lambda _: driver.churn(shop.instance, 30), steps=1)
        driver.dispose(shop.instance)
    except ImportError as missing:
        pytest.skip(f"not installed: {missing.name}")
    finally:
        if hasattr(driver, "_run"):
            driver._run.__self__.close()  # the driver's own event loop

    attributes = {attribute for _, attribute in driver.holders(shop.instance)}
    assert [grower.path for grower in growers if any(attribute in grower.path for attribute in attributes)]
