"""What is wrong is told at the earliest moment, with the class, the attribute, and what to do."""

from __future__ import annotations

import array
import dataclasses
import functools
import re
import sys
from collections import deque
from types import MappingProxyType, ModuleType
from typing import NamedTuple, TypedDict

import attrs
import msgspec
import pytest

from hygiene import Removal, bounded_history, bounded_registry, ttl_registry


class Bot:
    def __init__(self):
        self.conversations = {}
        self.messages = []


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    return str(error.value)


@pytest.mark.parametrize("decorate", [bounded_registry, ttl_registry, bounded_history])
def test_a_wrong_name_is_told_at_decoration(decorate):
    """With the class, and with what may have been meant."""
    limits = {bounded_registry: {}, ttl_registry: {"ttl": 60}, bounded_history: {"maxlen": 5}}[decorate]

    with pytest.raises(AttributeError, match=r"Bot.conversation,.*did you mean 'conversations'"):
        decorate("conversation", **limits)(Bot)


def test_a_wrong_name_changes_nothing():
    """One attribute right, one wrong: the right one is not bounded either."""

    class Twin(Bot):
        def __init__(self):
            super().__init__()

    before = dict(vars(Twin))
    with pytest.raises(AttributeError):
        bounded_registry("conversations", "sesions")(Twin)

    assert before == dict(vars(Twin))


@pytest.mark.parametrize(
    "make",
    [
        lambda: type("Annotated", (), {"__annotations__": {"found": dict}}),
        lambda: _annotated_later(found=dict),
        lambda: type("InSlots", (), {"__slots__": ("found", "__dict__")}),
        lambda: type("BySetattr", (), {"__init__": lambda self: setattr(self, "found", {})}),
        lambda: type("Dynamic", (), {"__getattr__": lambda self, name: {}}),
        lambda: type("InProperty", (), {"view": property(lambda self: self.found)}),
        lambda: type("InStatic", (), {"view": staticmethod(lambda bot: bot.found)}),
        lambda: type("InPartial", (), {"view": functools.partialmethod(lambda self, _: self.found, 1)}),
        lambda: type("InCached", (), {"view": functools.cached_property(lambda self: self.found)}),
        lambda: type("InNested", (), {"view": lambda self: [key for part in self for key in part.found]}),
        lambda: type("InWrapped", (), {"view": functools.lru_cache(lambda self: self.found)}),
        lambda: type("InClosure", (), {"view": _logged(lambda self: self.found)}),
    ],
)
def test_a_name_is_found_wherever_the_class_mentions_it(make):
    cls = make()

    assert cls is bounded_registry("found")(cls)


def _annotated_later(**annotations):
    class Annotated:
        here: dict

    Annotated.__annotations__.update(annotations)
    return Annotated


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated where they stand")
def test_annotations_are_not_evaluated():
    """They may name what is not defined yet, and their names are all that is asked for."""
    asked = []

    class Bot:
        found: asked.append("found")
        other: undefined  # noqa: F821

    assert Bot is bounded_registry("found", "other")(Bot)
    assert [] == asked


def _logged(function):
    def logged(*args):
        return function(*args)

    return logged


def test_a_name_in_compiled_code_is_believed():
    """There is no source to look it up in."""

    class Numbers(array.array):
        pass

    assert Numbers is bounded_registry("whatever")(Numbers)


def test_a_builtin_base_does_not_make_any_name_right():
    """``dict`` and ``Exception`` add no attributes of their own."""

    class Failure(Exception):
        def __init__(self):
            self.details = {}

    with pytest.raises(AttributeError, match="did you mean 'details'"):
        bounded_registry("detail")(Failure)


@pytest.mark.parametrize("thing", [lambda: None, Bot(), ModuleType("bots"), 5])
@pytest.mark.parametrize("decorate", [bounded_registry("conversations"), bounded_history("messages", maxlen=5)])
def test_what_is_no_class_is_refused(decorate, thing):
    """Functions, instances and modules; the last two have ``guard``."""
    with pytest.raises(TypeError, match=r"decorates a class; found .*use hygiene.guard"):
        decorate(thing)


def test_forgetting_the_call_is_told():
    with pytest.raises(TypeError, match=r'takes names of attributes; found .*Call it: @bounded_registry\("sessions"\)'):

        @bounded_registry
        class Forgotten:
            pass


@pytest.mark.parametrize(
    ("names", "error", "expected"),
    [
        ((), ValueError, "needs the names of the attributes"),
        ((5,), TypeError, "takes names of attributes; found 5"),
        (("not a name",), ValueError, "takes names of attributes; found 'not a name'"),
    ],
)
def test_names_are_names(names, error, expected):
    with pytest.raises(error, match=expected):
        bounded_registry(*names)


@pytest.mark.parametrize(
    ("limits", "error", "expected"),
    [
        ({"maxsize": 0}, ValueError, "maxsize must be at least 1"),
        ({"maxsize": "many"}, TypeError, "maxsize must be a whole number"),
        ({"ttl": -1}, ValueError, "ttl must be positive"),
        ({"idle": "5 parsecs"}, ValueError, "found '5 parsecs'"),
        (
            {"max_size": 5},
            TypeError,
            r"bounded_registry\(\) got an unexpected keyword argument 'max_size'. Did you mean 'maxsize'",
        ),
        ({"depth": 2}, ValueError, "depth must be 0 .* or 1"),
        ({"depth": True}, ValueError, "depth must be 0 .* or 1"),
        ({"key": {"other": len}}, ValueError, "key names 'other', which is not among the attributes"),
        ({"key": {"conversations": "first"}}, TypeError, "key must map attributes to callables"),
        ({"key": len}, TypeError, "key must map attributes to callables"),
    ],
)
def test_a_wrong_limit_is_told_before_there_is_a_class(limits, error, expected):
    with pytest.raises(error, match=expected):
        bounded_registry("conversations", **limits)


def test_depth_takes_one_attribute():
    with pytest.raises(ValueError, match=r"depth=1 bounds each inner dict by itself.*Write one decorator for each"):
        bounded_registry("a", "b", depth=1)


def test_a_group_does_not_get_a_depth_later():
    class Pair:
        def __init__(self):
            self.a, self.b = {}, {}

    bounded_registry("a", "b")(Pair)

    with pytest.raises(ValueError, match="a, b share one life"):
        bounded_registry("a", depth=1)(Pair)


def test_a_ttl_registry_needs_a_time():
    with pytest.raises(ValueError, match="found neither ttl nor idle"):
        ttl_registry("conversations", maxsize=5)


def test_a_history_needs_a_limit():
    with pytest.raises(ValueError, match="at least one of maxlen, max_tokens, max_bytes"):
        bounded_history("messages", keep_first=1)


def test_a_history_limit_is_checked_before_there_is_a_class():
    with pytest.raises(ValueError, match="maxlen"):
        bounded_history("messages", maxlen=0)


@pytest.mark.parametrize("value", [[], set(), (), "text", 5, MappingProxyType({}), deque()])
@pytest.mark.parametrize("lazy", [False, True])
def test_an_attribute_that_holds_no_dict_is_told_when_it_is_assigned(value, lazy):
    """With class and attribute; nothing is changed."""
    cls = type("Bot", (Bot,), {"conversations": None} if lazy else {})
    bot = bounded_registry("conversations")(cls)()
    bot.conversations[1] = 1

    with pytest.raises(TypeError, match=r"Bot.conversations must hold a dict, or None; found"):
        bot.conversations = value

    assert {1: 1} == bot.conversations


def test_an_attribute_that_holds_a_list_names_the_decorator_for_lists():
    cls = bounded_registry("messages")(type("Bot", (Bot,), {}))

    with pytest.raises(
        TypeError, match=r"Bot.messages must hold a dict, or None; found a list. For a list use bounded_history"
    ):
        cls()


def test_a_constructor_that_goes_around_assignments_is_caught_too():
    @bounded_registry("messages")
    @dataclasses.dataclass(frozen=True, slots=True)
    class Frozen:
        messages: list = dataclasses.field(default_factory=list)

    with pytest.raises(TypeError, match=r"Frozen.messages must hold a dict, or None; found a list"):
        Frozen()


@pytest.mark.parametrize("value", [[], set(), deque()])
def test_a_container_of_the_class_that_is_no_dict_is_told_at_decoration(value):
    with pytest.raises(TypeError, match=r"Bot.shared must hold a dict, or None; found"):
        bounded_registry("shared")(type("Bot", (), {"shared": value}))


@pytest.mark.parametrize(
    "member", [property(lambda self: {}), functools.cached_property(lambda self: {}), lambda self: {}]
)
def test_a_computed_attribute_is_told_at_decoration(member):
    """Name the attribute behind it."""
    cls = type("Bot", (), {"sessions": member, "__init__": lambda self: setattr(self, "_sessions", {})})

    with pytest.raises(TypeError, match=r"Bot.sessions is computed by .*did you mean '_sessions'"):
        bounded_registry("sessions")(cls)


def test_dicts_of_the_class_and_of_the_instance_do_not_mix():
    """They cannot share one life: one lives as long as the class."""

    class Mixed:
        shared = {}  # noqa: RUF012 - what people write

        def __init__(self):
            self.own = {}

    with pytest.raises(TypeError, match="shared belongs to the class and own to each instance"):
        bounded_registry("shared", "own")(Mixed)


def test_an_attribute_cannot_be_a_dict_and_a_list():
    cls = bounded_registry("conversations")(type("Bot", (Bot,), {}))

    with pytest.raises(TypeError, match="conversations cannot be both a dict and a list"):
        bounded_history("conversations", maxlen=5)(cls)


def test_a_struct_is_refused():
    """Its fields are written from C, also by the decoder."""

    class Struct(msgspec.Struct):
        sessions: dict

    with pytest.raises(TypeError, match=r"Struct.sessions is a field of a msgspec.Struct"):
        bounded_registry("sessions")(Struct)


def test_a_named_tuple_is_refused():
    class Pair(NamedTuple):
        sessions: dict

    with pytest.raises(TypeError, match=r"Pair.sessions is computed"):
        bounded_registry("sessions")(Pair)


@pytest.mark.parametrize(
    "cls",
    [TypedDict("Typed", {"sessions": dict}), type("Bare", (), {"__slots__": (), "f": lambda self: self.sessions})],
)
def test_a_class_without_a_place_is_refused(cls):
    with pytest.raises(TypeError, match=r"sessions cannot be bounded: instances of .* have no __dict__ and no slot"):
        bounded_registry("sessions")(cls)


@pytest.mark.parametrize("cls", [array.array, functools.partial])
def test_a_compiled_class_is_refused(cls):
    """Nothing can be put into a class of C, or into a ``cdef class`` of Cython."""
    with pytest.raises(TypeError, match=rf"{cls.__name__}.sessions cannot be bounded: .* compiled class"):
        bounded_registry("sessions")(cls)


def test_a_subclass_of_a_compiled_class_is_bounded():
    """It is a Python class, whatever it inherits."""

    @bounded_registry("sessions", maxsize=2)
    class Failure(RuntimeError):
        def __init__(self):
            self.sessions = {1: 1, 2: 2, 3: 3}

    assert {2: 2, 3: 3} == Failure().sessions


@pytest.mark.parametrize("make", [dataclasses.dataclass, attrs.define])
def test_a_decorator_below_the_one_that_makes_the_fields_is_told(make):
    """A field's declaration is no value yet."""
    field = dataclasses.field(default_factory=dict) if make is dataclasses.dataclass else attrs.field(factory=dict)

    with pytest.raises(TypeError, match=re.escape("found the declaration of a field in Bot.sessions")):
        make(bounded_registry("sessions")(type("Bot", (), {"sessions": field, "__annotations__": {"sessions": dict}})))


def test_a_slotless_instance_cannot_shadow_a_dict_of_the_class():
    """As without the decorator: there is no place for it."""

    @bounded_registry("shared")
    class Slim:
        __slots__ = ()
        shared = {}  # noqa: RUF012 - what people write

    with pytest.raises(AttributeError, match="Slim' object attribute 'shared' is read-only"):
        Slim().shared = {}


def test_a_hook_that_the_class_does_not_have_is_refused() -> None:
    """A misspelled name is said at decoration, not in a log at the first removal."""

    class Bot:
        def __init__(self) -> None:
            self.sessions: dict[str, int] = {}

        def left(self, removal: Removal[str, int]) -> None: ...

    with pytest.raises(AttributeError, match=r"on_evict='lef' must be .*Bot, .* \(did you mean 'left'\?\)"):
        bounded_registry("sessions", on_evict="lef")(Bot)

    assert type(Bot().sessions) is dict


def test_a_hook_that_is_asynchronous_is_refused() -> None:
    """Nothing would await it."""

    class Bot:
        def __init__(self) -> None:
            self.sessions: dict[str, int] = {}

        async def left(self, removal: Removal[str, int]) -> None: ...

    with pytest.raises(TypeError, match=r"ordinary method; found .*Bot\.left, which is async"):
        bounded_registry("sessions", on_evict="left")(Bot)
