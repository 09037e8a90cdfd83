"""Every kind of class that holds a dict is bounded without a change to its code."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import json
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from hygiene import Registry, bounded_registry, ttl_registry

if TYPE_CHECKING:
    from types import ModuleType

NEWEST = [7, 8, 9]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The classes of kinds.py, as nobody has decorated them yet."""
    spec = importlib.util.spec_from_file_location("kinds", Path(__file__).with_name("kinds.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kinds", module)
    spec.loader.exec_module(module)
    return module


def fill(container: dict[int, Any]) -> list[int]:
    """Put ten keys in, one at a time, and say what stayed."""
    for key in range(10):
        container[key] = str(key)
    return list(container)


ASSIGNING = {
    "Bot": {},
    "Busy": {},
    "BusyChild": {},
    "Inherits": {},
    "Slotted": {},
    "SlottedChild": {},
    "Data": {},
    "SlottedData": {},
    "FrozenData": {},
    "FrozenSlottedData": {},
    "Attrs": {},
    "AttrsInDict": {},
    "FrozenAttrs": {},
    "FrozenAttrsInDict": {},
    "ConvertingAttrs": {},
    "Model": {},
    "PlainDefaultModel": {},
    "ValidatingModel": {},
    "ModelWithHook": {},
    "PydanticData": {},
    "OfType": {},
    "Wrapped": {},
    "CountingChild": {"more": 2},
    "Injected": {},
    "OrEmpty": {},
    "ThroughDict": {"conversations": {}},
    "Magic": {},
}
FROZEN = {"FrozenData", "FrozenSlottedData", "FrozenAttrs", "FrozenAttrsInDict"}


@pytest.mark.parametrize("name", ASSIGNING)
def test_the_dict_that_the_constructor_makes_is_bounded(kinds, name):
    """One decorator, whatever made the class."""
    cls = getattr(kinds, name)
    decorated = bounded_registry("conversations", maxsize=3)(cls)
    bot = cls(**ASSIGNING[name])

    assert cls is decorated
    assert isinstance(bot.conversations, Registry)
    assert NEWEST == fill(bot.conversations)


@pytest.mark.parametrize("name", sorted(ASSIGNING.keys() - FROZEN))
def test_a_dict_that_is_assigned_later_is_bounded(kinds, name):
    """``clear()`` that rebinds is code people write."""
    cls = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))
    bot = cls(**ASSIGNING[name])
    bot.conversations = {1: "one", 2: "two", 3: "three", 4: "four"}

    assert {2: "two", 3: "three", 4: "four"} == bot.conversations
    assert NEWEST == fill(bot.conversations)


@pytest.mark.parametrize("name", sorted(ASSIGNING))
def test_a_subclass_is_bounded_as_its_base(kinds, name):
    """Inheritance keeps the bound, also where the subclass has a constructor of its own."""
    cls = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))

    class Child(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert NEWEST == fill(Child(**ASSIGNING[name]).conversations)


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_a_frozen_object_stays_frozen(kinds, name):
    """The bound does not open a door."""
    bot = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))()

    with pytest.raises(AttributeError):  # FrozenInstanceError, of dataclasses or attrs
        bot.conversations = {}

    assert NEWEST == fill(bot.conversations)


@pytest.mark.parametrize("name", ["FrozenData", "FrozenSlottedData", "SlottedData"])
def test_a_dataclass_that_inherits_is_bounded(kinds, name):
    """Its constructor is generated anew and does not call the one of its base."""
    cls = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))
    options = {"frozen": "Frozen" in name, "slots": "Slotted" in name}
    child = dataclasses.make_dataclass("Child", [("more", int, 0)], bases=(cls,), **options)

    assert NEWEST == fill(child().conversations)


@pytest.mark.parametrize("name", ["Attrs", "FrozenAttrs", "FrozenAttrsInDict"])
def test_an_attrs_class_that_inherits_is_bounded(kinds, name):
    """Its constructor is generated anew and does not call the one of its base."""
    cls = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))

    @attrs.define(frozen="Frozen" in name, slots="InDict" not in name)
    class Child(cls):
        more: int = 0

    assert NEWEST == fill(Child().conversations)


@pytest.mark.parametrize("name", ["Lazy", "LazyByDefault", "LazyByError"])
def test_a_dict_that_is_made_when_first_needed_is_bounded(kinds, name):
    """Code may ask whether the attribute is there, and gets the answer that it got before."""
    bot = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))()
    for key in range(10):
        bot.remember(key, key)

    assert NEWEST == list(bot.conversations)


def test_a_missing_attribute_is_missing(kinds):
    """A bound does not make ``hasattr`` true."""
    bot = bounded_registry("conversations", maxsize=3)(kinds.Lazy)()

    assert not hasattr(bot, "conversations")


@pytest.mark.parametrize("name", ["Bot", "Busy"])
def test_a_deleted_attribute_is_missing(kinds, name):
    """``del`` does what it did."""

    @bounded_registry("conversations", maxsize=3)
    class Forgetful(getattr(kinds, name)):
        def forget(self):
            del self.conversations

    bot = Forgetful()
    bot.forget()

    assert not hasattr(bot, "conversations")
    with pytest.raises(AttributeError, match="conversations"):
        bot.forget()


@pytest.mark.parametrize("name", ["Bot", "Busy"])
def test_deleting_from_outside_twice_is_an_attribute_error(kinds, name):
    bot = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))()
    del bot.conversations

    with pytest.raises(AttributeError, match="conversations"):
        del bot.conversations


def test_an_alias_taken_right_after_the_assignment_sees_the_registry(kinds):
    """python-telegram-bot wraps its dict in a ``MappingProxyType`` in the next line."""
    bot = bounded_registry("conversations", maxsize=3)(kinds.Slotted)()
    fill(bot.conversations)

    assert NEWEST == list(bot.view)


@pytest.mark.parametrize("name", ["Data", "FrozenSlottedData", "SlottedData"])
def test_a_dataclass_still_converts_to_a_dict(kinds, name):
    bot = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))()
    bot.conversations[1] = "one"

    assert {"conversations": {1: "one"}} == dataclasses.asdict(bot)


def test_an_attrs_class_still_converts_to_a_dict(kinds):
    bot = bounded_registry("conversations", maxsize=3)(kinds.Attrs)()
    bot.conversations[1] = "one"

    assert {"conversations": {1: "one"}} == attrs.asdict(bot)


def test_an_attrs_class_keeps_no_trace_in_its_fields(kinds):
    cls = bounded_registry("conversations", maxsize=3)(kinds.Attrs)

    assert ["conversations"] == [field.name for field in attrs.fields(cls)]


# --- pydantic ---------------------------------------------------------------------------------------------------------


def made(cls: Any) -> dict[str, Any]:
    """A model, in each way that pydantic can make one."""
    given = {"conversations": {key: str(key) for key in range(10)}}
    return {
        "constructor": cls(**given),
        "model_validate": cls.model_validate(given),
        "model_validate_json": cls.model_validate_json(json.dumps(given)),
        "model_construct": cls.model_construct(**given),
        "model_copy": cls(**given).model_copy(),
        "model_copy deep": cls(**given).model_copy(deep=True),
        "copy": copy.copy(cls(**given)),
        "deepcopy": copy.deepcopy(cls(**given)),
        "pickle": pickle.loads(pickle.dumps(cls(**given))),
    }


@pytest.mark.parametrize("name", ["Model", "ValidatingModel", "ModelWithHook"])
def test_a_pydantic_model_is_bounded_however_it_is_made(kinds, name):
    """Pydantic's core fills the instance without an assignment."""
    cls = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))

    bots = made(cls)

    assert dict.fromkeys(bots, NEWEST) == {way: list(bot.conversations) for way, bot in bots.items()}
    assert dict.fromkeys(bots, NEWEST) == {way: fill(bot.conversations) for way, bot in bots.items()}


def test_a_pydantic_model_dumps_what_it_holds(kinds):
    bot = bounded_registry("conversations", maxsize=3)(kinds.Model)()
    fill(bot.conversations)

    assert {"conversations": {7: "7", 8: "8", 9: "9"}} == bot.model_dump()
    assert '{"conversations":{"7":"7","8":"8","9":"9"}}' == bot.model_dump_json()


def test_a_private_attribute_of_a_model_is_bounded(kinds):
    """It sits in a place of its own."""
    cls = bounded_registry("_conversations", maxsize=3)(kinds.PrivateModel)
    bot, twin = cls(), cls().model_copy(deep=True)

    assert NEWEST == fill(bot.conversations)
    assert NEWEST == fill(twin.conversations)

    bot._conversations = {}

    assert NEWEST == fill(bot.conversations)


def test_a_subclass_of_a_model_is_bounded(kinds):
    """With fields, private attributes and a hook of its own."""
    cls = bounded_registry("conversations", maxsize=3)(kinds.Model)

    class Child(cls):
        more: int = 0
        _secret: int = 1

        def model_post_init(self, context, /):
            super().model_post_init(context)
            self.more += 1

    child = Child()

    assert (1, 1, NEWEST) == (child.more, child._secret, fill(child.conversations))


def test_a_model_with_a_hook_still_runs_it(kinds):
    cls = bounded_registry("conversations", maxsize=3)(kinds.ModelWithHook)

    assert ["dict"] == cls().seen


# --- dicts of the class -----------------------------------------------------------------------------------------------


def test_a_dict_of_the_class_is_bounded_for_all_instances(kinds):
    """It is one registry, from the class and from each instance."""
    cls = bounded_registry("conversations", maxsize=3)(kinds.Shared)
    one, other = cls(), cls()

    assert NEWEST == fill(one.conversations)
    assert NEWEST == list(other.conversations)
    assert cls.conversations is one.conversations


def test_an_instance_may_still_have_its_own(kinds):
    """What an instance assigns under the name of a shared dict is bounded, and is its own."""
    cls = bounded_registry("conversations", maxsize=3)(kinds.Shared)
    shared, own = cls(), cls(own=True)

    assert NEWEST == fill(own.conversations)
    assert {} == shared.conversations

    del own.conversations

    assert own.conversations is cls.conversations
    with pytest.raises(AttributeError, match="'Shared' object has no attribute 'conversations'"):
        del own.conversations


def test_what_a_shared_dict_held_stays_up_to_the_bound(kinds):
    fill(kinds.Shared.conversations)
    bounded_registry("conversations", maxsize=3)(kinds.Shared)

    assert {7: "7", 8: "8", 9: "9"} == kinds.Shared.conversations


def test_a_dict_of_a_base_is_bounded_where_it_is(kinds):
    """The siblings share it, so they share the bound."""

    class Child(kinds.Shared):
        pass

    bounded_registry("conversations", maxsize=3)(Child)

    assert NEWEST == fill(kinds.Shared.conversations)
    assert NEWEST == fill(kinds.Shared(own=True).conversations)


def test_a_dict_of_the_class_can_be_copied_and_pickled(kinds):
    bounded_registry("conversations", maxsize=3)(kinds.Shared)
    kinds.Shared.conversations[1] = "one"

    assert {1: "one"} == copy.deepcopy(kinds.Shared.conversations)
    assert {1: "one"} == copy.copy(kinds.Shared.conversations)
    assert {1: "one"} == pickle.loads(pickle.dumps(kinds.Shared.conversations))


# --- dicts of other kinds ---------------------------------------------------------------------------------------------


class Shouting(dict):
    """A user's own dict."""

    def shout(self):
        return [str(key) + "!" for key in self]


def test_a_defaultdict_goes_on_making_values(kinds):
    bot = bounded_registry("conversations", maxsize=3)(kinds.Injected)(lambda: defaultdict(list))
    for key in range(10):
        bot.conversations[key].append(key)

    assert {7: [7], 8: [8], 9: [9]} == bot.conversations


def test_a_counter_goes_on_counting(kinds):
    bot = bounded_registry("conversations", maxsize=3)(kinds.Injected)(Counter)
    bot.conversations.update("aaabbcd")

    assert isinstance(bot.conversations, Counter)
    assert [("b", 2), ("c", 1), ("d", 1)] == bot.conversations.most_common()


def test_an_ordered_dict_goes_on_moving_entries(kinds):
    bot = bounded_registry("conversations", maxsize=3)(kinds.Injected)(OrderedDict)
    fill(bot.conversations)
    bot.conversations.move_to_end(9, last=False)

    assert isinstance(bot.conversations, OrderedDict)
    assert [9, 7, 8] == list(bot.conversations)


def test_a_dict_class_of_the_user_keeps_its_methods(kinds):
    bot = bounded_registry("conversations", maxsize=3)(kinds.Injected)(Shouting)
    fill(bot.conversations)

    assert isinstance(bot.conversations, Shouting)
    assert ["7!", "8!", "9!"] == bot.conversations.shout()


def test_what_was_passed_in_stays_up_to_the_bound(kinds):
    given = {key: str(key) for key in range(10)}
    bot = bounded_registry("conversations", maxsize=3)(kinds.OrEmpty)(given)

    assert {7: "7", 8: "8", 9: "9"} == bot.conversations
    assert 10 == len(given)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Bot", "Busy", "Lazy", "Slotted", "SlottedData", "Data", "Attrs", "Shared", "Model"])
def test_reading_the_attribute_runs_no_python_code(kinds, name):
    """Not one call, whatever the class is made of."""
    bot = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))()
    if name == "Lazy":
        bot.remember(1, 1)
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append((event, frame.f_code.co_name)))
    try:
        found = bot.conversations
    finally:
        sys.setprofile(None)

    assert isinstance(found, Registry)
    assert [] == [call for call in calls if call[0] == "call"]


@pytest.mark.parametrize("name", ["Bot", "Lazy", "Data", "AttrsInDict", "Model"])
def test_nothing_stands_in_the_class_that_a_read_would_have_to_pass(kinds, name):
    """So a read is as fast as before: the interpreter finds the attribute in the instance, as it did."""
    cls = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))

    assert not hasattr(cls, "conversations")


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("make", [dataclasses.dataclass, attrs.define])
def test_a_bare_annotation_is_bounded_below_the_decorator_that_makes_the_fields(make, slots):
    """Also where that one builds a new class, with slots."""

    @make(slots=slots)
    @ttl_registry("conversations", idle=60, maxsize=3)
    class Bot:
        conversations: dict

    assert NEWEST == fill(Bot({}).conversations)


@pytest.mark.parametrize("name", ["Counting", "Slotted"])
def test_other_attributes_are_set_and_deleted_as_ever(kinds, name):
    """Where every assignment is looked at, most are passed on."""
    bot = bounded_registry("conversations", maxsize=3)(getattr(kinds, name))()
    other = "more" if name == "Counting" else "view"
    setattr(bot, other, 5)

    assert 5 == getattr(bot, other)

    delattr(bot, other)

    assert not hasattr(bot, other)
    with pytest.raises(AttributeError, match=other):
        delattr(bot, other)


def test_the_signature_of_the_constructor_stays(kinds):
    """For ``help()``, editors, and frameworks that inject arguments."""
    before = inspect.signature(kinds.Counting)
    bounded_registry("conversations", maxsize=3)(kinds.Counting)

    assert before == inspect.signature(kinds.Counting)


def test_a_class_with_its_own_way_of_setting_keeps_it(kinds):
    """For the other attributes, and for the bounded one."""
    bot = bounded_registry("conversations", maxsize=3)(kinds.Magic)()
    bot.name = "magic"

    assert {"name": "magic", "conversations": {}} == bot.store
