"""When the attribute is rebound, deleted, shared, copied, pickled, or assigned by two threads at once."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest

from hygiene import Cause, Registry, bounded_registry


class Session:
    """What has to be closed."""

    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


class Pickled:
    """Pickle wants its class at the top of a module."""

    def __init__(self):
        self.first, self.second = {}, {}


class PickledSlots:
    __slots__ = ("first",)

    def __init__(self):
        self.first = {}


bounded_registry("first", "second", maxsize=3)(Pickled)
bounded_registry("first", maxsize=3)(PickledSlots)


@pytest.fixture
def bot_class():
    class Bot:
        def __init__(self):
            self.sessions = {}

    return Bot


def test_rebinding_closes_the_old_registry(bot_class):
    """``self.sessions = {}`` drops the sessions, so they are released."""
    told = []
    bot = bounded_registry("sessions", close="close", on_evict=told.append)(bot_class)()
    session = bot.sessions["ann"] = Session()
    bot.sessions = {}

    assert session.closed
    assert [("ann", Cause.CLOSED, bot)] == [(r.key, r.cause, r.owner) for r in told]


def test_rebinding_leaves_what_somebody_took(bot_class):
    """``old, self.sessions = self.sessions, {}`` hands the content over."""
    bot = bounded_registry("sessions", close="close")(bot_class)()
    session = bot.sessions["ann"] = Session()
    old, bot.sessions = bot.sessions, {}

    assert {"ann": session} == old
    assert not session.closed
    assert {} == bot.sessions


def test_deleting_the_attribute_closes_the_registry(bot_class):
    bot = bounded_registry("sessions", close="close")(bot_class)()
    session = bot.sessions["ann"] = Session()
    del bot.sessions

    assert session.closed


def test_setting_none_closes_the_registry(bot_class):
    """``None`` is accepted, since people write it for "not now"."""
    bot = bounded_registry("sessions", close="close")(bot_class)()
    session = bot.sessions["ann"] = Session()
    bot.sessions = None

    assert session.closed
    assert bot.sessions is None


@pytest.mark.parametrize("slots", [False, True])
def test_rebinding_and_deleting_close_whatever_the_class_is_made_of(slots):
    namespace = {"__slots__": ("sessions",)} if slots else {"sessions": None}
    cls = bounded_registry("sessions", close="close")(type("Bot", (), namespace))
    bot, sessions = cls(), [Session(), Session()]
    bot.sessions = {"ann": sessions[0]}
    bot.sessions = {"bob": sessions[1]}
    del bot.sessions

    assert [True, True] == [session.closed for session in sessions]


def test_assigning_the_registry_to_itself_changes_nothing(bot_class):
    """``self.sessions |= more`` and ``self.sessions = self.sessions`` are assignments, too."""
    bot = bounded_registry("sessions", close="close")(bot_class)()
    session, registry = Session(), bot.sessions
    bot.sessions |= {"ann": session}
    bot.sessions = bot.sessions

    assert registry is bot.sessions
    assert not session.closed


def test_an_alias_in_another_object_stays_an_alias(bot_class):
    """``child.sessions = self.sessions`` shares one dict; it still does."""
    cls = bounded_registry("sessions", maxsize=3)(bot_class)
    parent, child = cls(), cls()
    child.sessions = parent.sessions
    child.sessions["ann"] = 1

    assert {"ann": 1} == parent.sessions


def test_swapping_two_attributes_loses_and_closes_nothing():
    """Double buffering: what moves from one name to the other is the same dict."""

    @bounded_registry("previous", close="close")
    @bounded_registry("current", close="close")
    class Buffers:
        def __init__(self):
            self.current, self.previous = {}, {}

        def turn(self):
            self.previous, self.current = self.current, {}

    buffers = Buffers()
    session = buffers.current["ann"] = Session()
    buffers.turn()

    assert {"ann": session} == buffers.previous
    assert not session.closed


def test_a_registry_of_the_users_own_gets_the_bound(bot_class):
    """One without an owner is a dict like any other."""
    bot = bounded_registry("sessions", maxsize=3)(bot_class)()
    bot.sessions = Registry({key: key for key in range(10)})

    assert {7: 7, 8: 8, 9: 9} == bot.sessions


def test_a_copy_shares_its_dicts_as_copies_do(bot_class):
    cls = bounded_registry("sessions", maxsize=3)(bot_class)
    bot = cls()
    twin = copy.copy(bot)

    assert twin.sessions is bot.sessions


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda bot: pickle.loads(pickle.dumps(bot))])
@pytest.mark.parametrize("cls", [Pickled, PickledSlots])
def test_a_deep_copy_and_an_unpickled_object_are_bounded(cls, remake):
    """With the content, and apart from the original."""
    bot = cls()
    bot.first.update({1: "one", 2: "two"})
    twin = remake(bot)
    for key in range(10):
        twin.first[key] = key

    assert {7: 7, 8: 8, 9: 9} == twin.first
    assert {1: "one", 2: "two"} == bot.first


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda bot: pickle.loads(pickle.dumps(bot))])
def test_the_columns_of_a_remade_object_share_one_life(remake):
    bot = Pickled()
    bot.first[1] = bot.second[1] = "one"
    twin = remake(bot)
    for key in range(2, 5):
        twin.first[key] = key

    assert ({2: 2, 3: 3, 4: 4}, {}) == (twin.first, twin.second)
    assert {1: "one"} == bot.second


def test_a_registry_keeps_no_owner_alive(bot_class):
    """The object dies when its last user drops it, without the collector."""
    cls = bounded_registry("sessions", maxsize=3)(bot_class)
    gc.disable()
    try:
        bot = cls()
        bot.sessions[1] = 1
        gone = weakref.ref(bot)
        del bot
    finally:
        gc.enable()

    assert gone() is None


def test_a_class_of_the_program_can_die(bot_class):
    """A decorated class that nobody uses is collected, as is one that is not decorated."""
    gone = weakref.ref(bounded_registry("sessions", maxsize=3)(type("Bot", (), {"sessions": None})))
    gc.collect()

    assert gone() is None


@pytest.mark.parametrize("names", [("sessions",), ("sessions", "locks")])
def test_threads_that_assign_at_once_leave_a_bounded_dict(names):
    """Whoever comes last, what is there is bounded, and a column is in its group."""

    @bounded_registry(*names, maxsize=3)
    class Bot:
        def __init__(self):
            self.sessions, self.locks = {}, {}

    bot, start = Bot(), threading.Barrier(8)

    def assign():
        start.wait(10)
        for _ in range(100):
            bot.sessions = {key: key for key in range(5)}

    threads = [threading.Thread(target=assign) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    bot.sessions["last"] = "x"

    assert [3, 4, "last"] == list(bot.sessions)
    assert isinstance(bot.sessions, Registry)


def test_two_threads_that_assign_two_columns_at_once_make_one_group():
    """The columns of one object always share one life."""

    @bounded_registry("sessions", "locks", maxsize=2)
    class Bot:
        def __init__(self):
            self.sessions = self.locks = None

    for _ in range(50):
        bot, start = Bot(), threading.Barrier(2)

        def assign(name, bot=bot, start=start):
            start.wait(10)
            setattr(bot, name, {})

        threads = [threading.Thread(target=assign, args=(name,)) for name in ("sessions", "locks")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        bot.sessions[1] = bot.locks[1] = bot.sessions[2] = bot.sessions[3] = "x"

        assert ([2, 3], []) == (list(bot.sessions), list(bot.locks))
