"""Classes as people write them. Loaded anew for each test, because a decorator changes its class in place."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import attrs
import pydantic
import pydantic.dataclasses
import wrapt

T = TypeVar("T")


class Bot:
    """What most code looks like."""

    def __init__(self) -> None:
        self.name = "bot"
        self.conversations = {}

    def reset(self) -> None:
        self.conversations = {}


class Busy:
    """Assigns other attributes all the time."""

    def __init__(self) -> None:
        self.count = 0
        self.conversations = {}

    def remember(self, key, value):
        self.count += 1
        self.conversations[key] = value

    def reset(self) -> None:
        self.conversations = {}


class BusyChild(Busy):
    pass


class Inherits(Bot):
    pass


class Lazy:
    """Makes its dict when it is first needed, and asks first."""

    def remember(self, key, value):
        if not hasattr(self, "conversations"):
            self.conversations = {}
        self.conversations[key] = value


class LazyByDefault:
    conversations = None

    def remember(self, key, value):
        if self.conversations is None:
            self.conversations = {}
        self.conversations[key] = value


class LazyByError:
    def __init__(self):
        self.started = True

    def remember(self, key, value):
        try:
            self.conversations[key] = value
        except AttributeError:
            self.conversations = {key: value}


class Slotted:
    __slots__ = ("conversations", "view")

    def __init__(self):
        self.conversations = {}
        self.view = MappingProxyType(self.conversations)


class SlottedChild(Slotted):
    __slots__ = ("more",)


@dataclasses.dataclass
class Data:
    conversations: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class SlottedData:
    conversations: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FrozenData:
    conversations: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlottedData:
    conversations: dict = dataclasses.field(default_factory=dict)


@attrs.define
class Attrs:
    conversations: dict = attrs.field(factory=dict)


@attrs.define(slots=False)
class AttrsInDict:
    conversations: dict = attrs.field(factory=dict)


@attrs.frozen
class FrozenAttrs:
    conversations: dict = attrs.field(factory=dict)


@attrs.frozen(slots=False)
class FrozenAttrsInDict:
    conversations: dict = attrs.field(factory=dict)


@attrs.define
class ConvertingAttrs:
    conversations: dict = attrs.field(factory=dict, converter=dict)


class Model(pydantic.BaseModel):
    conversations: dict[int, str] = pydantic.Field(default_factory=dict)


class PlainDefaultModel(pydantic.BaseModel):
    conversations: dict[int, str] = {}


class ValidatingModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(validate_assignment=True)
    conversations: dict[int, str] = {}


class ModelWithHook(pydantic.BaseModel):
    conversations: dict[int, str] = {}
    seen: list[str] = []

    def model_post_init(self, context: Any, /) -> None:
        self.seen.append(type(self.conversations).__name__)


class PrivateModel(pydantic.BaseModel):
    _conversations: dict[int, str] = pydantic.PrivateAttr(default_factory=dict)

    @property
    def conversations(self):
        return self._conversations


@pydantic.dataclasses.dataclass
class PydanticData:
    conversations: dict[int, str] = pydantic.Field(default_factory=dict)


class OfType(Generic[T]):
    def __init__(self):
        self.conversations = {}


class Wrapped:
    """Its constructor is an object of its own, as wrapt makes them."""

    conversations = None

    @wrapt.decorator
    def _logged(wrapped, instance, args, kwargs):  # noqa: N805 - the order of wrapt
        return wrapped(*args, **kwargs)

    @_logged
    def __init__(self):
        self.conversations = {}


class Counting:
    """A constructor of the base, and attributes that come and go."""

    conversations = None

    def __init__(self, more=1):
        self.more = more
        self.conversations = {}


class CountingChild(Counting):
    pass


class Injected:
    def __init__(self, make=dict):
        self.conversations = make()


class OrEmpty:
    def __init__(self, data=None):
        self.conversations = data or {}


class ThroughDict:
    """Goes around every assignment there is."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def size(self):
        return len(self.conversations)


class Magic:
    """Stores what it likes, where it likes."""

    def __init__(self):
        object.__setattr__(self, "store", {})
        self.conversations = {}

    def __setattr__(self, name, value):
        self.store[name] = value

    def __getattr__(self, name):
        return self.store[name]


class Shared:
    """One dict for all instances, and an instance may have its own."""

    conversations = {}  # noqa: RUF012 - what people write

    def __init__(self, *, own=False):
        if own:
            self.conversations = {}
