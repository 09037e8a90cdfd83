"""A signal handler raises in the middle of an operation of a registry: the bound holds, nothing is lost or poisoned."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable
from typing import Any

import cachetools
import pytest

import hygiene
from hygiene import Cause, Registry
from hygiene.kernel import by_recency
from hygiene.recency import CachetoolsOrder, ImportanceOrder
from hygiene.testing import ManualClock

SIZE = 6


@pytest.fixture(autouse=True)
def quiet():
    """A hook that fails says so in the log; here that is not what is looked at."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Value:
    """A value that knows how often it was told and closed."""

    def __init__(self) -> None:
        self.told = 0
        self.closed = 0
        self.busy = False

    def close(self) -> None:
        self.closed += 1


class Subject:
    """A registry, and everything that was put into it."""

    def __init__(self, limits: dict[str, Any], *, group: bool = False, tmp_path: Any = None) -> None:
        self.clock = ManualClock()
        self.values: list[Value] = []
        self.removals: collections.Counter[Cause] = collections.Counter()
        given = {
            name: value(self) if name in {"on_evict", "close"} and callable(value) else value
            for name, value in limits.items()
        }
        self.told = "on_evict" in given
        self.closes = "close" in given
        if "ttl" in given or "idle" in given:
            given["timer"] = self.clock
        if group:
            self.group = hygiene.group.Group(
                hygiene.limits.Limits.of(**given), {"first": None, "second": None}, name="group"
            )
            self.registry = self.group.adopt("first", {})
            self.second = self.group.adopt("second", {})
            self.rows = self.group.rows
        else:
            self.registry = self.rows = Registry(**given)
            self.second = None
        for number in range(SIZE):
            self.put(number)
            if self.second is not None:
                self.put(number, self.second)
        self.registry.stats()
        self.before = len(self.values)

    def value(self) -> Value:
        value = Value()
        self.values.append(value)
        return value

    def put(self, key: Any, registry: Any = None) -> None:
        (self.registry if registry is None else registry)[key] = self.value()

    def on_evict(self, removal: Any) -> None:
        removal.value.told += 1
        self.removals[removal.cause] += 1

    def close(self, value: Value) -> None:
        value.closed += 1


def policies() -> dict[str, dict[str, Any]]:
    hook = lambda subject: subject.on_evict  # noqa: E731
    close = lambda subject: subject.close  # noqa: E731
    return {
        "lru": {},
        "fifo": {"policy": "fifo"},
        "lfu": {"policy": "lfu"},
        "importance": {"policy": "importance", "importance": lambda entry: 1.0},
        "none": {"policy": "none", "overflow": "raise", "maxsize": 3 * SIZE},
        "lru_cache": {"policy": cachetools.LRUCache},
        "rr": {"policy": cachetools.RRCache},
        "busy": {"busy": "busy"},
        "busy_callable": {"busy": lambda entry: entry.value.busy, "policy": "fifo"},
        "busy_lfu": {"busy": "busy", "policy": "lfu"},
        "ttl": {"ttl": 60},
        "idle": {"idle": 60},
        "ttl_idle_busy": {"ttl": 60, "idle": 90, "busy": "busy"},
        "max_bytes": {"max_bytes": SIZE * 100, "getsizeof": lambda value: 100, "maxsize": None},
        "max_bytes_lfu": {"max_bytes": SIZE * 100, "getsizeof": lambda value: 100, "policy": "lfu"},
        "on_evict": {"on_evict": hook},
        "close": {"close": close},
        "close_named": {"close": "close", "on_evict": hook},
        "everything": {
            "on_evict": hook,
            "close": close,
            "busy": "busy",
            "ttl": 60,
            "idle": 90,
            "max_bytes": "1MiB",
            "values": lambda value: value,
        },
        "raise": {"overflow": "raise", "on_evict": hook},
        "no_revive": {"revive": False},
        "factory": {"default_factory": Value},
    }


KINDS = {name: {"maxsize": SIZE, **limits} for name, limits in policies().items()}


def check_structure(registry: Any) -> None:
    """Everything that a registry keeps beside its entries agrees with them."""
    keys = set(dict.keys(registry))
    order = registry._order
    assert set(by_recency(registry)) | set(registry._parked) | set(registry._leases) >= keys, "left the own order"
    if order is not None:
        if isinstance(order, (CachetoolsOrder, ImportanceOrder)):
            kept = set(order._cache) if isinstance(order, CachetoolsOrder) else set(order._ranks)
            assert kept <= keys, f"{kept - keys} stayed in the order"
        missing = {key for key in keys if key not in order} - set(registry._parked) - set(registry._leases)
        assert not missing, f"{missing} cannot be evicted any more"
        assert set(registry._parked) <= keys
    if registry._sizes is not None:
        assert set(registry._sizes) == keys
        assert registry._bytes == sum(registry._sizes.values())
    assert set(registry._loops) <= keys
    assert set(registry._held) <= keys
    if registry._limits.ttl is not None and registry._timer is not None:
        untimed = {key for key in keys if registry._written_at(key) is None} - set(registry._held)
        assert not untimed, f"{untimed} never expire"
    if registry._limits.idle is not None and registry._timer is not None:
        assert not {key for key in keys if registry._used_at(key) is None}


def check(subject: Subject, elsewhere: Any) -> None:
    registry, rows = subject.registry, subject.rows
    elsewhere(lambda: check_now(subject))
    elsewhere(lambda: check_afterwards(subject))
    assert len(rows) <= registry._limits.maxsize if registry._limits.maxsize else True


def check_now(subject: Subject) -> None:
    """What holds at once: nothing was evicted that cannot be found, no lease is left, no value was told twice."""
    registry, rows = subject.registry, subject.rows
    assert registry.stats().leased == 0, "it is leased by nobody"
    assert not rows._over(), f"{len(rows)} entries"
    for each in {id(r): r for r in (registry, rows, subject.second or registry)}.values():
        check_structure(each)
        assert not each._flights
    columns = [registry] if subject.second is None else [registry, subject.second]
    alive = {id(value) for column in columns for value in dict.values(column)}
    for value in subject.values:
        assert value.told <= 1, "told twice"
        assert value.closed <= 1, "closed twice"
        if id(value) in alive:
            assert not value.told
            assert not value.closed


def conserved(subject: Subject, maybe: int) -> None:
    """Puts = alive + removed, where it is not known of *maybe* values whether they were put."""
    registry = subject.registry
    columns = [registry] + ([] if subject.second is None else [subject.second])
    alive = sum(map(len, columns))
    removed = sum(sum(column._counts.values()) + column._counted()[2] - column._revived for column in columns)
    puts = len(subject.values)
    assert alive + removed <= puts
    if not registry._light:  # where nothing has to be told, what is overwritten or deleted is not counted
        assert puts - maybe <= alive + removed
    if subject.told:
        there = {id(value) for column in columns for value in dict.values(column)}
        silent = [value for value in subject.values if not value.told and id(value) not in there]
        assert len(silent) <= maybe, f"{len(silent)} left without a word"


def check_afterwards(subject: Subject) -> None:
    """Whoever comes next can do everything with every key."""
    registry, rows = subject.registry, subject.rows
    maybe = len(subject.values) - subject.before
    if subject.registry._limits.default_factory is None:
        conserved(subject, maybe)
    bounded = registry._limits.policy != "none"
    for key in ("new", 0, 1, SIZE - 1):
        value = subject.value()
        registry[key] = value
        assert registry[key] is value
        with registry.lease(key, create=subject.value) as leased:
            assert leased is value
        assert registry.stats().leased == 0
        assert registry.pop(key) is value
        with registry.lease(key, create=subject.value) as leased:
            pass
        assert registry[key] is leased
    if bounded:
        for number in range(100, 100 + 3 * SIZE):
            subject.put(number, registry)
        assert not rows._over()
        assert len(rows) <= SIZE
    if registry._limits.ttl is not None or registry._limits.idle is not None:
        subject.clock.advance(200)
        registry.expire()
        assert not len(rows)
        assert not len(registry)
    for each in {id(r): r for r in (registry, rows, subject.second or registry)}.values():
        check_structure(each)
    if subject.registry._limits.default_factory is None:
        conserved(subject, maybe)


def lease(subject: Subject, key: Any, **options: Any) -> None:
    with subject.registry.lease(key, **options) as value:
        assert isinstance(value, Value)


async def alease(subject: Subject, key: Any, **options: Any) -> None:
    async with subject.registry.lease(key, **options) as value:
        assert isinstance(value, Value)


def in_a_loop(subject: Subject, key: Any, **options: Any) -> None:
    coroutine = alease(subject, key, **options)
    try:
        coroutine.send(None)
    except StopIteration:
        return


def failing_lease(subject: Subject) -> None:
    def create() -> Any:
        raise LookupError("it cannot be made")

    try:
        lease(subject, "new", create=create)
    except LookupError:
        return


def busy_then_new(subject: Subject) -> None:
    for value in list(subject.registry.values())[:2]:
        value.busy = True
    subject.put("new")
    for value in subject.values:
        value.busy = False
    subject.put("newer")


def nested(subject: Subject) -> None:
    with subject.registry.lease(0), subject.registry.lease(0):
        subject.put("new")
        subject.put("newer")


def later(subject: Subject, action: Callable[[Subject], object]) -> None:
    subject.clock.advance(70)
    action(subject)


OPERATIONS: dict[str, Callable[[Subject], object]] = {
    "set_new": lambda subject: subject.put("new"),
    "set_again": lambda subject: subject.put(0),
    "set_two": lambda subject: (subject.put("new"), subject.put(2)),
    "setdefault": lambda subject: subject.registry.setdefault("new", subject.value()),
    "setdefault_hit": lambda subject: subject.registry.setdefault(0),
    "update": lambda subject: subject.registry.update({"a": subject.value(), 1: subject.value()}),
    "hit": lambda subject: subject.registry[0],
    "get": lambda subject: subject.registry.get(0),
    "miss": lambda subject: subject.registry.get("new"),
    "in": lambda subject: "new" in subject.registry,
    "del": lambda subject: subject.registry.pop(1),
    "popitem": lambda subject: subject.registry.popitem(),
    "clear": lambda subject: subject.registry.clear(),
    "touch": lambda subject: subject.registry.touch(0),
    "evict": lambda subject: subject.registry.evict(0),
    "trim": lambda subject: subject.registry.trim(2),
    "lease": lambda subject: lease(subject, 0),
    "lease_new": lambda subject: lease(subject, "new", create=subject.value),
    "lease_fails": failing_lease,
    "lease_nested": nested,
    "alease": lambda subject: in_a_loop(subject, 0),
    "alease_new": lambda subject: in_a_loop(subject, "new", create=subject.value),
    "busy": busy_then_new,
    "late_set": lambda subject: later(subject, lambda subject: subject.put("new")),
    "late_get": lambda subject: later(subject, lambda subject: subject.registry.get(0)),
    "late_lease": lambda subject: later(subject, lambda subject: lease(subject, 0, create=subject.value)),
    "late_expire": lambda subject: later(subject, lambda subject: subject.registry.expire()),
    "copy": lambda subject: dict(subject.registry),
    "walk": lambda subject: list(subject.registry.items()),
    "move": lambda subject: subject.registry.move_to_end(next(iter(subject.registry))),
    "close": lambda subject: subject.registry.close(),
}

QUICK_KINDS = ["lru", "lfu", "everything"]
QUICK = [
    *itertools.product(QUICK_KINDS, ["set_new", "set_again", "evict"]),
    ("lru", "lease_new"),
    ("lfu", "lease"),
    ("everything", "alease_new"),
]
ALL = [pair for pair in itertools.product(KINDS, OPERATIONS) if pair not in QUICK]


def try_all(kind: str, operation: str, elsewhere: Any, interrupted_at_each_moment: Any, *, group: bool = False) -> None:
    interrupted_at_each_moment(
        lambda: Subject(KINDS[kind], group=group),
        OPERATIONS[operation],
        lambda subject: check(subject, elsewhere),
    )


@pytest.mark.parametrize(("kind", "operation"), QUICK)
def test_an_interruption_leaves_a_registry_whole(kind, operation, elsewhere, interrupted_at_each_moment):
    """After an exception of a signal handler, at any moment, the bound holds and each key can be used by any thread."""
    try_all(kind, operation, elsewhere, interrupted_at_each_moment)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "operation"), ALL)
def test_an_interruption_leaves_every_kind_of_registry_whole(kind, operation, elsewhere, interrupted_at_each_moment):
    """After an exception of a signal handler, at any moment, the bound holds and each key can be used by any thread."""
    try_all(kind, operation, elsewhere, interrupted_at_each_moment)


GROUPS = ["lru", "fifo", "lfu", "importance", "busy", "ttl", "idle", "on_evict", "close", "max_bytes", "everything"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "operation"), list(itertools.product(GROUPS, OPERATIONS)))
def test_an_interruption_leaves_the_rows_of_a_group_whole(kind, operation, elsewhere, interrupted_at_each_moment):
    """Linked attributes stay linked after an exception of a signal handler at any moment."""
    try_all(kind, operation, elsewhere, interrupted_at_each_moment, group=True)


def test_an_interrupted_load_can_be_repeated_by_any_thread(tmp_path, elsewhere, interrupted_at_each_moment):
    """After an exception of a signal handler in the middle of a load, every thread finds what is stored."""
    registry = Registry(maxsize=3, store=f"sqlite:{tmp_path}/chats.db", name="chats")
    registry["ann"] = ["hello"]
    registry.flush()

    def evicted() -> Registry[Any, Any]:
        registry.trim(0)
        return registry

    def check(registry: Registry[Any, Any]) -> None:
        assert ["hello"] == elsewhere(lambda: list(registry["ann"]))
        assert not registry._keeper._loading

    interrupted_at_each_moment(evicted, lambda registry: registry.get("ann"), check)
    registry.close()


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["overwrite", "pop", "evict", "append", "extend"])
@pytest.mark.parametrize("value", [list, dict])
def test_what_is_acknowledged_after_an_interruption_is_saved(
    value, operation, tmp_path, elsewhere, interrupted_at_each_moment
):
    """An interrupted change is made in memory and in the store alike; what is acknowledged later is saved."""
    serial = itertools.count()

    def one(number: int) -> Any:
        return [number] if value is list else {"number": number}

    def make() -> Registry[Any, Any]:
        registry = Registry(maxsize=3, store=f"sqlite:{tmp_path}/{next(serial)}.db", name="chats")
        registry["ann"] = one(1)
        registry["bob"] = one(2)
        registry.flush()
        return registry

    def change(item: Any) -> None:
        item.append(7) if value is list else item.update(seven=7)

    def lease_and_change(registry: Registry[Any, Any]) -> None:
        with registry.lease("ann") as held:
            change(held)

    operations: dict[str, Callable[[Registry[Any, Any]], object]] = {
        "overwrite": lambda registry: registry.__setitem__("ann", one(3)),
        "pop": lambda registry: registry.pop("ann"),
        "append": lambda registry: change(registry["ann"]),
        "extend": lambda registry: registry["ann"].extend([3, 4]) if value is list else None,
        "setdefault": lambda registry: registry.setdefault("new", one(3)),
        "evict": lambda registry: registry.evict("ann"),
        "lease": lease_and_change,
        "flush": lambda registry: (change(registry["ann"]), registry.flush()),
    }

    def check(registry: Registry[Any, Any]) -> None:
        def use() -> Any:
            for key in ("ann", "bob", "new"):
                item = registry.setdefault(key, one(9))
                change(item)
            registry.flush()
            return {key: registry[key][:] if value is list else dict(registry[key]) for key in ("ann", "bob", "new")}

        expected = elsewhere(use)
        address = registry._keeper._where()
        elsewhere(registry.close)
        with Registry(maxsize=3, store=f"sqlite:{address}", name="chats") as again:
            assert expected == {key: again[key][:] if value is list else dict(again[key]) for key in expected}

    interrupted_at_each_moment(make, operations[operation], check)
