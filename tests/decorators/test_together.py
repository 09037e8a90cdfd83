"""Several attributes with one life, stacked decorators, decorated subclasses, dicts in dicts."""

from __future__ import annotations

from collections import defaultdict

import pytest

from hygiene import Registry, bounded_registry, ttl_registry


class Clock:
    """Seconds, turned by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bot_class():
    class Bot:
        def __init__(self):
            self.sessions, self.locks, self.blobs = {}, {}, {}

    return Bot


def test_a_key_leaves_all_attributes_of_a_call_together(bot_class):
    """The bound counts keys, a use in any is a use."""
    bot = bounded_registry("sessions", "locks", maxsize=2)(bot_class)()
    for key in "ab":
        bot.sessions[key] = bot.locks[key] = key
    bot.locks["a"]
    bot.sessions["c"] = "c"

    assert (["a", "c"], ["a"]) == (list(bot.sessions), list(bot.locks))


def test_each_object_has_a_life_of_its_own(bot_class):
    cls = bounded_registry("sessions", "locks", maxsize=2)(bot_class)
    one, other = cls(), cls()
    for key in range(2):
        one.sessions[key] = other.locks[key] = key

    assert ([0, 1], [], [], [0, 1]) == tuple(map(list, (one.sessions, one.locks, other.sessions, other.locks)))


def test_a_column_that_is_rebound_stays_in_its_group(bot_class):
    bot = bounded_registry("sessions", "locks", maxsize=2)(bot_class)()
    bot.locks[1] = bot.locks[2] = "x"
    bot.sessions = {1: "one"}
    bot.sessions[3] = "three"

    assert ([1, 3], [1]) == (list(bot.sessions), list(bot.locks))


def test_a_column_that_comes_back_is_bounded_again(bot_class):
    """Taken out, and put back later."""
    bot = bounded_registry("sessions", "locks", maxsize=2)(bot_class)()
    old, bot.sessions = bot.sessions, {}
    old["kept"] = 1
    bot.sessions = old
    for key in range(3):
        bot.sessions[key] = bot.locks[key] = key

    assert ([1, 2], [1, 2]) == (list(bot.sessions), list(bot.locks))


def test_a_column_may_be_keyed_differently(bot_class):
    """``key=`` derives the shared key."""
    bot = bounded_registry("sessions", "blobs", maxsize=2, key={"blobs": lambda key: key[0]})(bot_class)()
    for thread in "abc":
        bot.sessions[thread] = thread
        bot.blobs[thread, 1] = bot.blobs[thread, 2] = thread

    assert ["b", "c"] == list(bot.sessions)
    assert [("b", 1), ("b", 2), ("c", 1), ("c", 2)] == list(bot.blobs)


def test_one_attribute_may_be_counted_by_a_derived_key(bot_class):
    bot = bounded_registry("blobs", maxsize=2, key={"blobs": lambda key: key[0]})(bot_class)()
    for thread in "abc":
        bot.blobs[thread, 1] = bot.blobs[thread, 2] = thread

    assert [("b", 1), ("b", 2), ("c", 1), ("c", 2)] == list(bot.blobs)


def test_dicts_of_the_class_may_share_one_life():
    """CherryPy: ``cache`` and ``locks`` in the class body."""

    class Sessions:
        cache, locks = {}, {}

    bounded_registry("cache", "locks", maxsize=2)(Sessions)
    for key in range(3):
        Sessions.cache[key] = Sessions.locks[key] = key

    assert ([1, 2], [1, 2]) == (list(Sessions.cache), list(Sessions.locks))


def test_busy_sees_the_class_as_the_owner_of_its_dicts():
    class Sessions:
        cache, locks = {}, {}

    bounded_registry("cache", "locks", maxsize=2, busy=lambda entry: entry.owner.locks.peek(entry.key) == "held")(
        Sessions
    )
    for key in range(5):
        Sessions.cache[key], Sessions.locks[key] = key, "held" if key == 0 else "free"

    assert [0, 4] == sorted(Sessions.cache)


# --- stacking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, -1])
def test_stacked_decorators_merge_into_one_registry(bot_class, clock, turn):
    """In any order, both limits hold."""
    decorators = [bounded_registry("sessions", maxsize=2), ttl_registry("sessions", ttl=60, timer=clock)]
    for decorate in decorators[::turn]:
        decorate(bot_class)
    bot = bot_class()
    for key in range(3):
        bot.sessions[key] = key

    assert [1, 2] == list(bot.sessions)

    clock.now = 60

    assert 2 == bot.sessions.expire()


@pytest.mark.parametrize("turn", [1, -1])
def test_a_default_bound_yields_to_a_chosen_one(bot_class, turn):
    """1,024 is what nobody chose."""
    decorators = [bounded_registry("sessions", revive=False), ttl_registry("sessions", idle=60, maxsize=2)]
    for decorate in decorators[::turn]:
        decorate(bot_class)
    bot = bot_class()
    for key in range(3):
        bot.sessions[key] = key

    assert [1, 2] == list(bot.sessions)


@pytest.mark.parametrize(
    ("decorate", "expected"),
    [
        (bounded_registry("sessions"), 1024),
        (bounded_registry("sessions", maxsize=None), 2000),
        (ttl_registry("sessions", ttl=60), 2000),
    ],
)
def test_the_default_bound_is_1024_entries(bot_class, decorate, expected):
    bot = decorate(bot_class)()
    for key in range(2000):
        bot.sessions[key] = key

    assert expected == len(bot.sessions)


def test_a_default_bound_is_a_number_like_any_other_when_passed(bot_class):
    """Passing the very number of the default is a choice."""
    bounded_registry("sessions", maxsize=2)(bot_class)
    bot = bounded_registry("sessions", maxsize=1024)(bot_class)()
    for key in range(3):
        bot.sessions[key] = key

    assert [0, 1, 2] == list(bot.sessions)


def test_stacking_on_a_dict_of_the_class_keeps_what_it_holds():
    class Sessions:
        cache = {1: "one"}  # noqa: RUF012 - what people write

    bounded_registry("cache", maxsize=3)(ttl_registry("cache", idle=60)(Sessions))
    for key in range(5):
        Sessions.cache[key] = key

    assert [2, 3, 4] == list(Sessions.cache)


def test_a_limit_on_one_column_is_a_limit_on_the_group(bot_class, clock):
    """They live one life, so the time of one is the time of all."""
    bounded_registry("sessions", "locks", maxsize=5)(bot_class)
    bot = ttl_registry("sessions", ttl=60, timer=clock)(bot_class)()
    bot.sessions[1] = bot.locks[1] = bot.locks[2] = "x"
    clock.now = 60
    bot.sessions.expire()

    assert ({}, {}) == (bot.sessions, bot.locks)


def test_attributes_bounded_one_by_one_may_be_put_together_later(bot_class):
    bounded_registry("sessions", maxsize=5)(bot_class)
    bot = bounded_registry("sessions", "locks", maxsize=2)(bot_class)()
    bot.locks[1] = bot.sessions[2] = bot.locks[3] = "x"

    assert ([2], [3]) == (list(bot.sessions), list(bot.locks))


def test_groups_that_overlap_are_refused(bot_class):
    """An attribute cannot live two lives."""
    bounded_registry("sessions", "locks")(bot_class)

    with pytest.raises(ValueError, match=r"sessions, locks share one life already.*Name them all in one call"):
        bounded_registry("locks", "blobs")(bot_class)


def test_a_decorated_subclass_changes_its_own_limits_only(bot_class):
    base = bounded_registry("sessions", maxsize=2, revive=False)(bot_class)
    child = bounded_registry("sessions", maxsize=4)(type("Child", (base,), {}))
    one, other = base(), child()
    for key in range(9):
        one.sessions[key] = other.sessions[key] = key

    assert ([7, 8], [5, 6, 7, 8]) == (list(one.sessions), list(other.sessions))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_decorated_subclass_may_differ_however_its_base_is_watched(lazy):
    class Base:
        if lazy:
            sessions = None

        def __init__(self):
            self.sessions = {}

    child = type("Child", (Base,), {})
    bounded_registry("sessions", maxsize=4)(child)
    bounded_registry("sessions", maxsize=2)(Base)
    one, other = Base(), child()
    for key in range(9):
        one.sessions[key] = other.sessions[key] = key

    assert ([7, 8], [5, 6, 7, 8]) == (list(one.sessions), list(other.sessions))


def test_a_second_base_still_sees_assignments():
    """A class between the decorated one and ``object`` keeps its ``__setattr__``."""
    seen = []

    class Watching:
        def __setattr__(self, name, value):
            seen.append(name)
            super().__setattr__(name, value)

    @bounded_registry("sessions", maxsize=2)
    class Bot:
        sessions = None

    class Both(Bot, Watching):
        pass

    both = Both()
    both.sessions = {}
    both.name = "both"

    assert ["sessions", "name"] == seen
    assert isinstance(both.sessions, Registry)


# --- dicts in dicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dict, lambda: defaultdict(dict)])
def test_depth_bounds_the_dicts_one_level_below(make):
    """``tasks[owner][task_id]``, each in its own right; a hook sees the object that owns them."""
    told = []

    @bounded_registry("tasks", maxsize=2, depth=1, on_evict=told.append)
    class Store:
        def __init__(self):
            self.tasks = make()

        def save(self, owner, task):
            self.tasks.setdefault(owner, {})[task] = task

    store = Store()
    for task in range(3):
        for owner in "abc":
            store.save(owner, task)

    assert {owner: {1: 1, 2: 2} for owner in "abc"} == store.tasks
    assert [(0, store)] * 3 == [(removal.key, removal.owner) for removal in told]


def test_depth_bounds_what_a_factory_makes():
    @bounded_registry("tasks", maxsize=2, depth=1)
    class Store:
        def __init__(self):
            self.tasks = defaultdict(dict)

    store = Store()
    for task in range(3):
        store.tasks["ann"][task] = task

    assert {"ann": {1: 1, 2: 2}} == store.tasks


def test_depth_leaves_values_that_are_no_containers():
    @bounded_registry("tasks", maxsize=2, depth=1)
    class Store:
        def __init__(self):
            self.tasks = {"a": 1, "b": None, "c": {1: 1, 2: 2, 3: 3}, "d": (1, 2, 3), "e": bytearray(3)}

    assert {"a": 1, "b": None, "c": {2: 2, 3: 3}, "d": (1, 2, 3), "e": bytearray(3)} == Store().tasks


def test_depth_works_for_objects_that_cannot_be_weakly_referenced():
    """``__slots__`` without ``__weakref__``."""

    @bounded_registry("tasks", maxsize=2, depth=1)
    class Slim:
        __slots__ = ("tasks",)

        def __init__(self):
            self.tasks = {"ann": {1: 1, 2: 2, 3: 3}}

    assert {"ann": {2: 2, 3: 3}} == Slim().tasks
