"""``bounded_history`` does for lists what ``bounded_registry`` does for dicts."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import deque
from functools import partial

import pydantic
import pytest

from hygiene import History, bounded_history, bounded_registry


class Bot:
    def __init__(self, make=list):
        self.messages = make()


class Slotted:
    __slots__ = ("messages",)

    def __init__(self):
        self.messages = []


@dataclasses.dataclass
class Data:
    messages: list = dataclasses.field(default_factory=list)


class Model(pydantic.BaseModel):
    messages: list[int] = []


class Lazy:
    messages = None

    def __init__(self):
        if self.messages is None:
            self.messages = []


KINDS = [Bot, Slotted, Data, Model, Lazy]
for kind in KINDS:
    bounded_history("messages", maxlen=3)(kind)


@pytest.mark.parametrize("cls", KINDS)
def test_a_list_is_bounded_in_every_kind_of_class(cls):
    """It trims itself in place, and still is a list."""
    bot = cls()
    for number in range(10):
        bot.messages.append(number)

    assert [7, 8, 9] == bot.messages
    assert isinstance(bot.messages, History)


@pytest.mark.parametrize("cls", KINDS)
def test_a_list_that_is_assigned_later_is_bounded(cls):
    bot = cls()
    bot.messages = list(range(10))
    bot.messages = bot.messages + [10]  # noqa: RUF005 - that makes a plain list

    assert [8, 9, 10] == bot.messages
    assert isinstance(bot.messages, History)


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda bot: pickle.loads(pickle.dumps(bot))])
@pytest.mark.parametrize("cls", [Slotted, Data])
def test_a_remade_object_is_bounded(cls, remake):
    bot = cls()
    bot.messages.extend([1, 2])
    twin = remake(bot)
    twin.messages.extend([3, 4])

    assert ([1, 2], [2, 3, 4]) == (bot.messages, twin.messages)


def test_a_deque_is_left_alone():
    """It has a bound of its own."""
    messages = Bot(lambda: deque(maxlen=5)).messages

    assert deque is type(messages)


def test_a_list_class_of_the_user_keeps_its_methods():
    class Joined(list):
        def joined(self):
            return "".join(self)

    messages = Bot(Joined).messages
    messages.extend("abcdef")

    assert "def" == messages.joined()
    assert isinstance(messages, Joined)


def test_none_is_accepted():
    bot = Bot()
    bot.messages = None

    assert bot.messages is None


def test_a_deleted_list_is_gone():
    bot = Bot()
    del bot.messages

    assert not hasattr(bot, "messages")


def test_a_dict_is_refused():
    with pytest.raises(
        TypeError, match=r"Bot.messages must hold a list, or None; found a dict. For a dict use bounded_registry"
    ):
        Bot(dict)


def test_a_list_of_the_class_is_bounded_for_all_instances():
    @bounded_history("messages", maxlen=3)
    class Shared:
        messages = [1, 2, 3, 4]  # noqa: RUF012 - what people write

    Shared().messages.append(5)
    own = Shared()
    own.messages = [1, 2, 3, 4]

    assert ([3, 4, 5], [2, 3, 4]) == (Shared.messages, own.messages)
    assert [3, 4, 5] == pickle.loads(pickle.dumps(Shared.messages)) == copy.deepcopy(Shared.messages)


def test_stacked_histories_merge():
    @bounded_history("messages", keep_first=1, maxlen=5)
    @bounded_history("messages", maxlen=4)
    class Chat:
        def __init__(self):
            self.messages = ["system"]

    chat = Chat()
    chat.messages.extend(range(10))

    assert ["system", 6, 7, 8, 9] == chat.messages


def test_several_lists_are_bounded_one_by_one():
    @bounded_history("questions", "answers", maxlen=2)
    class Chat:
        def __init__(self):
            self.questions, self.answers = [1, 2, 3], [1]

    chat = Chat()

    assert ([2, 3], [1]) == (chat.questions, chat.answers)


def test_a_registry_of_histories_is_bounded_both_ways():
    @bounded_registry("conversations", maxsize=2, values=partial(History, maxlen=3))
    class Chat:
        def __init__(self):
            self.conversations = {}

    chat = Chat()
    for user in "abc":
        for number in range(5):
            chat.conversations.setdefault(user, []).append(number)

    assert {"b": [2, 3, 4], "c": [2, 3, 4]} == chat.conversations
