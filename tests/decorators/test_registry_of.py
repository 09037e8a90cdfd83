"""What a decorated attribute really is, by name and for the type checker."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import pytest

from hygiene import History, Registry, bounded_history, bounded_registry, guard, registry_of


@bounded_registry("a", "b", maxsize=3)
@bounded_registry("chats", maxsize=3)
@bounded_registry("shared", maxsize=3)
@bounded_history("messages", maxlen=3)
class Bot:
    shared = {}  # noqa: RUF012 - what people write

    def __init__(self, make=dict):
        self.chats, self.a, self.b = make(), {}, {}
        self.messages, self.plain = [], {}


@pytest.mark.parametrize("make", [dict, OrderedDict, lambda: defaultdict(list)])
def test_it_is_the_attribute_itself(make):
    """The same object, with its limits and numbers."""
    bot = Bot(make)
    bot.chats["ann"] = []

    assert registry_of(bot.chats) is bot.chats
    assert 1 == registry_of(bot.chats).stats().entries
    assert 3 == registry_of(bot.chats).maxsize
    assert registry_of(bot.shared) is Bot.shared


def test_of_linked_attributes_it_is_the_one_that_was_named():
    bot = Bot()
    bot.a["x"] = bot.a["y"] = bot.b["x"] = 1

    assert (2, 1) == (registry_of(bot.a).stats().entries, registry_of(bot.b).stats().entries)
    assert registry_of(bot.a).group is registry_of(bot.b).group


def test_a_guarded_object_and_a_registry_made_by_hand():
    class Other:
        def __init__(self):
            self.states = {}

    other = Other()
    guard(other, "states", maxsize=3)
    registry = Registry(maxsize=3)

    assert registry_of(other.states) is other.states
    assert registry_of(registry) is registry


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, "got a plain dict. Decorate its class"),
        (OrderedDict(), "got a plain OrderedDict. Decorate its class"),
        ([], "got a list. A bounded list is a hygiene.History"),
        (History(maxlen=3), "got a History. A bounded list is a hygiene.History"),
        (set(), "got a set. A set cannot be bounded"),
        (None, "got a NoneType. Pass the attribute itself"),
        ("chats", "got a str. Pass the attribute itself"),
    ],
)
def test_anything_else_is_an_error_that_says_what_to_do(value, expected):
    with pytest.raises(TypeError, match=expected):
        registry_of(value)


def test_a_dict_from_before_the_decorator_is_not_bounded():
    class Late:
        def __init__(self):
            self.chats = {}

    late = Late()
    bounded_registry("chats", maxsize=3)(Late)
    with pytest.raises(TypeError, match="a dict from before the assignment stays unbounded"):
        registry_of(late.chats)
