"""``weak_listeners``: callbacks in a list, set or dict vanish with their owner; code that uses them goes on."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import gc
import inspect
import logging
import os
import pickle
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque

import pydantic
import pytest
import wrapt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hygiene import bounded_registry
from hygiene.listeners import Listener, ListenerDict, ListenerList, ListenerSet, weak_listeners


@weak_listeners("listeners", "handlers", "watchers")
class Bus:
    """Keeps callbacks in each of the three kinds of containers."""

    def __init__(self, listeners=(), handlers=()):
        self.listeners = list(listeners)
        self.handlers = dict(handlers)
        self.watchers = set()

    def emit(self, event):
        for listener in self.listeners:
            listener(event)


class Widget:
    """An owner of methods that are registered."""

    def __init__(self):
        self.seen = []

    def on(self, event):
        self.seen.append(event)

    async def on_async(self, event):
        self.seen.append(event)
        return event

    def __call__(self, event):
        self.seen.append(event)


@wrapt.decorator
def traced(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs)


class Traced(Widget):
    on = traced(Widget.on)


def module_level(event):
    """Held by its module."""


KINDS = [
    pytest.param(lambda widget: widget.on, id="bound method"),
    pytest.param(lambda widget: widget, id="callable instance"),
    pytest.param(lambda widget: functools.partial(widget.on), id="partial of a method"),
    pytest.param(lambda widget: functools.partial(functools.partial(widget.on)), id="partial of a partial"),
    pytest.param(lambda widget: widget.__call__, id="a callable instance's call"),
]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("cls", [Widget, Traced])
def test_a_listener_vanishes_with_its_owner_at_once(cls, make):
    bus, widget = Bus(), cls()
    bus.listeners.append(make(widget))
    bus.watchers.add(make(widget))
    bus.handlers["direct"] = make(widget)
    bus.handlers["list"] = [make(widget)]
    bus.emit("one")
    assert (1, 1, 2, ["one"]) == (len(bus.listeners), len(bus.watchers), len(bus.handlers), widget.seen)

    del widget

    assert ([], set(), {"list": []}) == (bus.listeners, bus.watchers, bus.handlers)


def test_an_owner_is_not_kept():
    bus, widget = Bus(), Widget()
    bus.listeners.append(widget.on)
    gone = weakref.ref(widget)
    del widget

    assert gone() is None


def test_an_owner_in_a_cycle_vanishes_with_the_collection():
    bus, widget = Bus(), Widget()
    widget.bus, widget.myself = bus, widget
    bus.listeners.append(widget.on)
    del widget
    gc.collect()

    assert [] == bus.listeners


def test_the_method_of_a_deque_vanishes_with_it():
    bus, inbox = Bus(), deque()
    bus.listeners.append(inbox.append)
    bus.emit("one")
    assert deque(["one"]) == inbox

    del inbox

    assert [] == bus.listeners


@pytest.mark.parametrize(
    "callback",
    [print, [].append, len, {}.update, functools.partial(print, "x")],
    ids=["print", "append", "len", "update", "partial"],  # the text of a method would have an address in it
)
def test_what_cannot_be_referred_to_weakly_is_kept(callback):
    bus = Bus([callback])
    gc.collect()

    assert [callback] == bus.listeners


def test_a_function_that_somebody_holds_stays():
    bus = Bus([module_level, functools.partial(module_level, 1), Widget])
    gc.collect()

    assert 3 == len(bus.listeners)


# --- Code that uses them goes on --------------------------------------------------------------------------------------


def test_a_list_is_used_as_before():
    one, two, three = Widget(), Widget(), Widget()
    bus = Bus()
    bus.listeners.append(one.on)
    bus.listeners.extend([two.on, three.on])
    bus.listeners += [one.on]
    bus.listeners.insert(0, three.on)

    assert isinstance(bus.listeners, list)
    assert [three.on, one.on, two.on, three.on, one.on] == bus.listeners
    assert two.on in bus.listeners
    assert Widget().on not in bus.listeners
    assert (1, 2) == (bus.listeners.index(one.on), bus.listeners.count(one.on))
    assert [one.on, two.on] == bus.listeners[1:3] == list(bus.listeners)[1:3]
    assert one.on == bus.listeners[-1]

    bus.listeners.remove(one.on)
    assert one.on == bus.listeners.pop()
    del bus.listeners[0]
    bus.listeners.reverse()
    assert [three.on, two.on] == bus.listeners

    rank = {id(two): 1, id(three): 2}
    bus.listeners.sort(key=lambda listener: rank[id(listener.__self__)])
    assert [two.on, three.on] == bus.listeners
    assert [three.on, two.on] == list(reversed(bus.listeners))

    bus.listeners[0] = one.on
    bus.listeners[1:] = (two.on,)
    bus.listeners *= 2
    assert [one.on, two.on, one.on, two.on] == bus.listeners == bus.listeners.copy() == bus.listeners[:]
    assert 8 == len(bus.listeners * 2) == len(2 * bus.listeners)

    with pytest.raises(ValueError, match=r"Bus\.listeners has no listener"):
        bus.listeners.remove(three.on)
    bus.listeners.clear()
    assert not bus.listeners


def test_a_set_is_used_as_before():
    one, two, three = Widget(), Widget(), Widget()
    bus = Bus()
    bus.watchers.add(one.on)
    bus.watchers.add(one.on)
    bus.watchers |= {two.on}
    bus.watchers.update([three.on], [one])

    assert isinstance(bus.watchers, set)
    assert {one.on, two.on, three.on, one} == bus.watchers
    assert three.on in bus.watchers
    assert bus.watchers >= {one.on}
    assert {two.on, three.on, one} == bus.watchers - {one.on}
    assert {one.on} == bus.watchers & {one.on, Widget().on} == {one.on} & bus.watchers

    bus.watchers.discard(one.on)
    bus.watchers.discard(one.on)
    bus.watchers.remove(one)
    with pytest.raises(KeyError):
        bus.watchers.remove(one)
    bus.watchers ^= {two.on, one.on}
    assert {one.on, three.on} == bus.watchers == bus.watchers.copy()
    bus.watchers &= {one.on, two.on}
    assert {one.on} == bus.watchers
    bus.watchers -= {one.on}
    assert not bus.watchers

    bus.watchers.add(two.on)
    assert two.on == bus.watchers.pop()
    bus.watchers.add(two.on)
    bus.watchers.clear()
    with pytest.raises(TypeError):
        bus.watchers |= [two.on]
    assert set() == bus.watchers


def test_a_dict_is_used_as_before():
    one, two = Widget(), Widget()
    bus = Bus(handlers={"start": one.on})
    bus.handlers.setdefault("message", []).append(two.on)
    bus.handlers.setdefault("message", []).append(one.on)
    bus.handlers["stop"] = bus.handlers.get("stop", []) + [one.on]  # noqa: RUF005 - as it is written out there
    bus.handlers.update(none=None, set={one.on}, inner={"a": two.on})
    bus.handlers |= {"or": two.on}

    assert isinstance(bus.handlers, dict)
    assert ["start", "message", "stop", "none", "set", "inner", "or"] == list(bus.handlers) == list(bus.handlers.keys())
    assert {"start": one.on, "message": [two.on, one.on], "stop": [one.on]} == {
        name: bus.handlers[name] for name in ("start", "message", "stop")
    }
    assert [one.on, [two.on, one.on], [one.on], None, {one.on}, {"a": two.on}, two.on] == list(bus.handlers.values())
    assert ("start", one.on) in bus.handlers.items()
    assert one.on in bus.handlers.values()
    assert ["or", "inner"] == list(reversed(bus.handlers))[:2]
    assert bus.handlers == dict(bus.handlers) == {**bus.handlers} == bus.handlers.copy() == dict(bus.handlers.items())
    assert {"x": 1, **bus.handlers} == {"x": 1} | bus.handlers
    assert one.on == bus.handlers.pop("start")
    assert None is bus.handlers.pop("start", None)
    assert ("or", two.on) == bus.handlers.popitem()
    del bus.handlers["inner"]

    del two
    assert {"message": [one.on], "stop": [one.on], "none": None, "set": {one.on}} == bus.handlers

    bus.handlers.clear()
    assert not bus.handlers


@pytest.mark.parametrize("factory", [list, set])
def test_a_defaultdict_gives_the_list_that_it_stores(factory):
    widget, bus = Widget(), Bus()
    bus.handlers = defaultdict(factory)
    getattr(bus.handlers["message"], "append" if factory is list else "add")(widget.on)

    assert {"message": factory([widget.on])} == bus.handlers
    assert isinstance(bus.handlers, defaultdict)
    assert bus.handlers["message"] is bus.handlers["message"]

    del widget

    assert {"message": factory()} == bus.handlers


def test_a_dict_s_views_and_texts_are_those_of_a_dict():
    one, two = Widget(), Widget()
    bus = Bus(handlers={"a": one.on, "b": [two.on]})
    bus.watchers.add(one.on)

    assert "{'a': <weak listener Widget.on>, 'b': [<weak listener Widget.on>]}" == repr(bus.handlers)
    assert "dict_keys(['a', 'b'])" == repr(bus.handlers.keys())
    assert "dict_values([<weak listener Widget.on>, [<weak listener Widget.on>]])" == repr(bus.handlers.values())
    assert repr(bus.handlers.items()).startswith("dict_items([('a', <weak listener Widget.on>), ")
    assert "{<weak listener Widget.on>}" == repr(bus.watchers)
    assert ["b", "a"] == list(reversed(bus.handlers.keys()))
    assert [[two.on], one.on] == list(reversed(bus.handlers.values()))
    assert [("b", [two.on]), ("a", one.on)] == list(reversed(bus.handlers.items()))
    assert {"a", "b"} == bus.handlers.keys() | set()
    with pytest.raises(TypeError):
        bus.handlers | 5
    with pytest.raises(TypeError):
        5 | bus.handlers


def test_a_value_that_is_replaced_in_a_loop_is_met_as_it_is():
    one, two = Widget(), Widget()
    bus = Bus(handlers={"a": one.on, "b": one.on})
    met = []
    for name, listener in bus.handlers.items():
        met.append((name, listener))
        bus.handlers["b"] = two.on

    assert [("a", one.on), ("b", two.on)] == met


def test_a_missing_name_gets_what_its_class_makes():
    class Handlers(dict):
        def __missing__(self, name):
            made = self[name] = []
            return made

        def emptied(self):
            return type(self)({name: [] for name in self})

    widget, bus = Widget(), Bus()
    bus.handlers = Handlers()
    bus.handlers["a"].append(widget.on)
    bus.handlers = bus.handlers.emptied() | {"b": [widget.on]}
    bus.handlers["a"].append(widget)
    assert {"a": [widget], "b": [widget.on]} == bus.handlers

    del widget

    assert {"a": [], "b": []} == bus.handlers


def test_an_instance_of_the_same_kind_holds_weakly_from_the_start():
    """Code such as ``type(self.listeners)(callbacks)`` works as with a list."""
    widget = Widget()
    bus = Bus([widget.on], {"a": widget.on})
    bus.watchers.add(widget.on)
    bus.handlers = defaultdict(list, a=widget.on)
    made = [
        type(bus.listeners)([widget.on]),
        type(bus.watchers)([widget.on]),
        type(bus.handlers)(list, {"a": widget.on}),
        bus.handlers.copy(),
    ]
    assert [[widget.on], {widget.on}, {"a": widget.on}, {"a": widget.on}] == made

    del widget

    assert [[], set(), {}] == made[:3]
    assert 1 == len(made[3])
    assert type(made[3]) is defaultdict


def test_an_ordered_dict_stays_one():
    one, two = Widget(), Widget()
    bus = Bus()
    bus.handlers = OrderedDict(a=one.on, b=[two.on])
    bus.handlers["c"] = two.on
    bus.handlers.setdefault("d", two.on)
    bus.handlers.move_to_end("a")

    assert isinstance(bus.handlers, OrderedDict)
    assert ["b", "c", "d", "a"] == list(bus.handlers) == list(bus.handlers.copy())
    assert ("b", [two.on]) == bus.handlers.popitem(last=False)

    del two

    assert [("a", one.on)] == list(bus.handlers.items())


class Signal(list):
    """Somebody's own list, with a method, an attribute and a way of its own to add."""

    __slots__ = ("name",)

    def __init__(self, name, items=()):
        super().__init__(items)
        self.name = name

    def connect(self, callback):
        super().append(callback)
        return callback

    def fire(self, event):
        for callback in self:
            callback(event)


class Events(defaultdict):
    """Somebody's own defaultdict."""


def test_a_subclass_keeps_its_behaviour():
    widget, bus = Widget(), Bus()
    bus.listeners = Signal("clicked")
    bus.listeners.connect(widget.on)
    bus.listeners.fire("one")
    bus.handlers = Events(list)
    bus.handlers["x"].append(widget.on)

    assert ["one"] == widget.seen
    assert "clicked" == bus.listeners.name
    assert isinstance(bus.listeners, Signal)
    assert isinstance(bus.handlers, Events)
    assert "clicked" == copy.copy(bus.listeners).name == pickle.loads(pickle.dumps(bus.listeners)).name
    assert type(bus.listeners) is type(copy.copy(bus.listeners))

    del widget

    assert ([], {"x": []}) == (bus.listeners, bus.handlers)


def test_a_callback_looks_like_itself():
    """Dispatchers look before they call."""
    widget = Widget()
    bus = Bus([widget.on_async, widget.on, functools.partial(widget.on_async, 1), widget])
    later, now, partial, instance = bus.listeners

    assert inspect.iscoroutinefunction(later)
    assert inspect.iscoroutinefunction(partial)
    assert not inspect.iscoroutinefunction(now)
    assert "(event)" == str(inspect.signature(now)) == str(inspect.signature(later))
    assert ("on", widget) == (now.__name__, now.__self__)
    assert isinstance(now, types.MethodType)
    assert isinstance(instance, Widget)
    assert instance.seen is widget.seen
    assert "<weak listener Widget.on>" == repr(now)
    assert "[<weak listener Widget.on_async>, <weak listener Widget.on>" == repr(bus.listeners)[:59]
    assert hash(widget.on) == hash(now)


def test_an_unhashable_callable_is_kept_in_a_list():
    @dataclasses.dataclass
    class Handler:
        name: str

        def __call__(self, event):
            return event

    handler, bus = Handler("a"), Bus()
    bus.listeners.append(handler)

    assert [Handler("a")] == bus.listeners
    with pytest.raises(TypeError, match="unhashable listener"):
        bus.watchers.add(handler)


def test_a_partial_is_found_by_its_identity():
    """That is how partial objects compare."""
    widget, bus = Widget(), Bus()
    one, other = functools.partial(widget.on, "one"), functools.partial(widget.on, "one")
    bus.listeners.append(one)

    assert one in bus.listeners
    assert other not in bus.listeners

    bus.listeners = bus.listeners[:]
    assert bus.listeners == copy.copy(bus.listeners) != Bus([other]).listeners
    bus.listeners.remove(one)
    assert [] == bus.listeners


async def test_a_listener_that_is_gone_does_nothing():
    """A copy that somebody took still holds it; to call it is harmless."""
    bus, widget = Bus(), Widget()
    bus.listeners.extend([widget.on, widget.on_async])
    now, later = bus.listeners[:]
    assert "event" == await later("event")

    del widget

    assert None is now("event")
    assert None is await later("event")
    assert now != later
    assert now == now  # noqa: PLR0124 - also when it is gone
    assert "<weak listener Widget.on, gone>" == repr(now)
    with pytest.raises(AttributeError, match=r"listener Widget\.on is gone, and '__self__' with it"):
        now.__self__  # noqa: B018


# --- Loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["listeners", "watchers", "handlers"])
def test_a_loop_goes_on_when_listeners_die_in_it(kind):
    """Each of those that live is called once, and none that is gone."""
    widgets = {number: Widget() for number in range(10)}
    bus = Bus()
    for number, widget in widgets.items():
        bus.listeners.append(widget.on)
        bus.watchers.add(widget.on)
        bus.handlers[number] = widget.on
    del widget
    called = []
    container = getattr(bus, kind)
    for listener in container.values() if kind == "handlers" else container:
        called.append(next(number for number, widget in widgets.items() if widget.on == listener))
        for number in (called[-1] + 1, called[-1] - 1):
            if number not in called:
                widgets.pop(number, None)

    assert set(widgets) == set(called)
    assert len(called) == len(set(called)) == len(container)


def test_a_listener_that_is_removed_in_a_loop_is_not_called_any_more():
    one, two, three = Widget(), Widget(), Widget()
    bus = Bus([one.on, two.on, three.on])
    for listener in bus.listeners:
        listener("event")
        if two.on in bus.listeners:
            bus.listeners.remove(two.on)

    assert ([["event"], [], ["event"]]) == [one.seen, two.seen, three.seen]


def test_one_that_removes_itself_does_not_make_the_next_be_skipped():
    """In a plain list it would."""
    bus, called = Bus(), []

    class Once:
        def on(self, event):
            called.append(self)
            bus.listeners.remove(self.on)

    owners = [Once(), Once(), Once()]
    bus.listeners.extend([owner.on for owner in owners])
    bus.emit("event")

    assert owners == called
    assert [] == bus.listeners


def test_a_loop_over_a_dict_survives_a_death():
    widgets = [Widget() for _ in range(4)]
    bus = Bus(handlers={number: widget.on for number, widget in enumerate(widgets)})
    names = []
    for name in bus.handlers:
        names.append(name)
        if name == 0:
            del widgets[1]

    assert [0, 2, 3] == names


def test_a_death_while_the_container_is_being_changed_is_swept_afterwards():
    """The weak reference calls back in the middle of a change by the same thread: it may neither wait nor interfere."""
    bus = Bus()
    owners = [Widget(), Widget()]
    bus.listeners.extend([owner.on for owner in owners])
    seen = []

    def change():
        owners.pop()
        seen.append(list.__len__(bus.listeners))

    bus.listeners._change(change)

    assert [2] == seen
    assert 1 == list.__len__(bus.listeners)


def test_a_death_while_another_thread_holds_the_container_does_not_wait():
    bus = Bus()
    owners = [Widget(), Widget()]
    bus.listeners.extend([owner.on for owner in owners])
    inside, go = threading.Event(), threading.Event()

    def hold():
        inside.set()
        go.wait(10)

    thread = threading.Thread(target=bus.listeners._change, args=(hold,))
    thread.start()
    assert inside.wait(10)
    owners.pop()
    go.set()
    thread.join(10)

    assert 1 == list.__len__(bus.listeners)


def test_many_that_die_in_one_collection_are_swept_at_once(monkeypatch):
    bus = Bus()
    owners = [Widget() for _ in range(500)]
    for owner in owners:
        owner.myself = owner
    bus.listeners.extend([owner.on for owner in owners])
    sweeps = []
    sweep = ListenerList._drop_dead
    monkeypatch.setattr(ListenerList, "_drop_dead", lambda listeners: sweeps.append(1) or sweep(listeners))
    del owners, owner
    gc.collect()

    assert [] == bus.listeners
    assert 1 == len(sweeps)


# --- What is lost is told ---------------------------------------------------------------------------------------------


def test_a_function_that_vanished_uncalled_is_told_once(caplog):
    """The usual mistake: a lambda that nobody else holds."""
    bus = Bus()
    bus.listeners.append(lambda event: None)
    bus.listeners.append(lambda event: event)
    bus.handlers["a"] = [lambda event: None]
    with caplog.at_level(logging.WARNING):
        bus.emit("event")
        bus.emit("event")
        assert not bus.handlers["a"]

    one, two = caplog.messages
    assert one.startswith(
        "Bus.listeners lost its listener test_a_function_that_vanished_uncalled_is_told_once.<locals>"
    )
    assert "Keep it in an attribute of what it belongs to, or register a bound method" in one
    assert two.startswith("Bus.handlers['a'] lost its listener")


def test_methods_and_functions_that_were_called_vanish_in_silence(caplog):
    def called(event):
        """Held by this test."""

    bus, widget = Bus(), Widget()
    bus.listeners.extend([called, widget.on])
    bus.emit("event")
    bus.listeners.append(widget.on)
    del called, widget

    assert 0 == len(bus.listeners)
    assert [] == caplog.messages


# --- Copies -----------------------------------------------------------------------------------------------------------


def test_a_copy_is_of_the_same_kind_and_weak():
    widget, bus = Widget(), Bus()
    bus.listeners.append(widget.on)
    bus.watchers.add(widget.on)
    bus.handlers = defaultdict(list, a=[widget.on])
    copies = [copy.copy(bus.listeners), copy.copy(bus.watchers), copy.copy(bus.handlers)]

    assert [bus.listeners, bus.watchers, bus.handlers] == copies
    assert [type(bus.listeners), type(bus.watchers), type(bus.handlers)] == [type(made) for made in copies]
    assert copies[2].default_factory is list

    copies[0].append(widget)
    assert 1 == len(bus.listeners)

    del widget

    assert [[], set(), {"a": []}] == copies


def test_a_deep_copy_follows_owners_that_are_copied_along():
    """As in a plain list: the copied bus calls the copied widget."""
    widget = Widget()
    widget.bus = Bus([widget.on], {"a": [widget.on]})
    twin = copy.deepcopy(widget)
    twin.bus.emit("event")

    assert ([], ["event"]) == (widget.seen, twin.seen)
    assert type(widget.bus.listeners) is type(twin.bus.listeners)
    assert [twin.on] == twin.bus.handlers["a"]


def test_pickle_takes_the_callbacks_along():
    """Of those whose owner nobody else refers to in the pickle nothing is left."""
    widget = Widget()
    widget.bus = Bus([widget.on, print], {"a": [widget.on], "b": widget.on})
    widget.bus.watchers.add(widget.on)
    twin = pickle.loads(pickle.dumps(widget))
    alone = pickle.loads(pickle.dumps(Bus([Widget().on, print])))

    assert [twin.on, print] == twin.bus.listeners
    assert {twin.on} == twin.bus.watchers
    assert {"a": [twin.on], "b": twin.on} == twin.bus.handlers
    assert isinstance(twin.bus.listeners, ListenerList)
    assert [print] == alone.listeners


def test_a_pickled_container_is_a_plain_one():
    """It needs nothing of this library to be read."""
    bus = Bus([print], {"a": [print]})
    bus.watchers.add(print)

    for container, kind in ((bus.listeners, list), (bus.handlers, dict), (bus.watchers, set)):
        made = pickle.loads(pickle.dumps(container))
        assert container == made
        assert type(made) is kind
        assert b"hygiene" not in pickle.dumps(container)
    assert [print] == pickle.loads(pickle.dumps(list(bus.listeners)))


# --- Kinds of classes, and mistakes -----------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("listeners",)

    def __init__(self):
        self.listeners = []


@dataclasses.dataclass
class Data:
    listeners: list = dataclasses.field(default_factory=list)


class Model(pydantic.BaseModel):
    listeners: list = []


class Lazy:
    listeners = None

    def __init__(self):
        self.listeners = self.listeners or []


class Shared:
    listeners = []  # noqa: RUF012 - that is the point


CLASSES = [Slotted, Data, Model, Lazy, Shared]
for cls in CLASSES:
    weak_listeners("listeners")(cls)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_kind_of_class_holds_weakly(cls):
    bus, widget = cls(), Widget()
    bus.listeners.append(widget.on)
    assert [widget.on] == bus.listeners
    assert isinstance(bus.listeners, ListenerList)

    del widget

    assert [] == bus.listeners


def test_a_container_of_the_class_can_be_copied_and_hidden_by_an_instance():
    bus, widget = Shared(), Widget()
    bus.listeners.append(widget.on)
    twin = copy.copy(bus.listeners)
    bus.listeners = [widget.on, widget.on]

    assert [widget.on] == twin == Shared.listeners
    assert type(twin) is ListenerList
    assert isinstance(bus.listeners, ListenerList)
    assert 2 == len(bus.listeners)

    Shared.listeners.clear()


def test_what_is_assigned_later_is_held_weakly():
    one, two = Widget(), Widget()
    bus = Bus([one.on, two.on])
    bus.listeners = [listener for listener in bus.listeners if listener != one.on]
    assert [two.on] == bus.listeners

    alias = bus.listeners
    bus.listeners = alias
    assert alias is bus.listeners

    del two

    assert [] == bus.listeners


def test_the_same_class_is_returned():
    assert Bus is weak_listeners("listeners")(Bus)


@pytest.mark.parametrize("value", [(), frozenset(), deque(), 5])
def test_something_else_than_a_container_is_refused(value):
    with pytest.raises(TypeError, match=r"Bus\.listeners must hold a list, set or dict of callbacks, or None; found"):
        Bus().listeners = value


@pytest.mark.parametrize("value", [5, (1, print), None])
def test_something_that_cannot_be_called_is_refused(value):
    bus = Bus()
    with pytest.raises(TypeError, match=r"Bus\.listeners takes callbacks; found .*, which cannot be called"):
        bus.listeners.append(value)
    with pytest.raises(TypeError, match=r"Bus\.handlers\['a'\] must be a callback, or a list, set or dict"):
        bus.handlers["a"] = value or 5
    with pytest.raises(TypeError, match=r"Bus\.handlers\['a'\]"):
        bus.handlers = Counter("a")

    assert ([], {}) == (bus.listeners, bus.handlers)


def test_a_wrong_name_is_refused_at_decoration():
    with pytest.raises(
        AttributeError, match=r"weak_listeners was asked to watch Bus\.listner, .*did you mean 'listeners'"
    ):
        weak_listeners("listner")(Bus)
    with pytest.raises(ValueError, match="weak_listeners needs the names of the attributes to watch"):
        weak_listeners()


def test_one_attribute_cannot_be_bounded_and_watched():
    with pytest.raises(TypeError, match="cannot be both"):
        bounded_registry("handlers", maxsize=3)(type("Sub", (Bus,), {}))


# --- Threads, forks, and all sequences --------------------------------------------------------------------------------


def test_many_threads_add_remove_and_let_go():
    bus, stays = Bus(), [Widget() for _ in range(4)]
    gate = threading.Barrier(4)
    failures = []

    def work(mine):
        try:
            gate.wait(10)
            for number in range(300):
                passing = Widget()
                bus.listeners.append(passing.on)
                bus.handlers.setdefault(number % 7, []).append(passing.on)
                bus.watchers.add(passing.on)
                bus.emit(number)
                if number == 100:
                    bus.listeners.append(mine.on)
                if number % 3 == 0:
                    bus.listeners.remove(passing.on)
                    bus.watchers.discard(passing.on)
                for listeners in bus.handlers.values():
                    for listener in listeners:
                        listener(number)
                del passing
        except BaseException as error:  # noqa: BLE001 - told by the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in stays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert [] == failures
    assert sorted(map(id, stays)) == sorted(id(listener.__self__) for listener in bus.listeners)
    assert set() == bus.watchers
    assert {number: [] for number in range(7)} == bus.handlers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_is_not_kept_out():
    """The thread that was inside the container at the fork does not exist in the child."""
    widget, bus = Widget(), Bus()
    bus.listeners.append(widget.on)
    inside, go = threading.Event(), threading.Event()

    def hold():
        inside.set()
        go.wait(10)

    thread = threading.Thread(target=bus.listeners._change, args=(hold,))
    thread.start()
    assert inside.wait(10)
    child = os.fork()
    if child == 0:
        try:
            bus.listeners.append(print)
            os._exit(len(bus.listeners))
        finally:
            os._exit(99)
    go.set()
    thread.join(10)

    assert 2 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Holding(RuleBasedStateMachine):
    """The container holds exactly the registered listeners whose owners live, in the order of a plain list."""

    def __init__(self):
        super().__init__()
        gc.freeze()  # all the modules need not be looked through at each collection
        self.bus = Bus()
        self.owners: dict[int, Widget] = {}
        self.model: list[int] = []
        self.count = 0

    def teardown(self):
        gc.unfreeze()

    def _listener(self, number):
        widget = self.owners[number]
        return [widget.on, widget, widget.on_async][number % 3]

    @rule()
    def register(self):
        self.owners[self.count] = Widget()
        self.bus.listeners.append(self._listener(self.count))
        self.bus.watchers.add(self._listener(self.count))
        self.bus.handlers[self.count] = self._listener(self.count)
        self.model.append(self.count)
        self.count += 1

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def unregister(self, data):
        number = data.draw(st.sampled_from(self.model))
        self.bus.listeners.remove(self._listener(number))
        self.bus.watchers.remove(self._listener(number))
        del self.bus.handlers[number]
        self.model.remove(number)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), cycle=st.booleans())
    def let_go(self, data, cycle):
        number = data.draw(st.sampled_from(list(self.owners)))
        if cycle:
            self.owners[number].myself = self.owners[number]
        del self.owners[number]
        if cycle:
            gc.collect()
        if number in self.model:
            self.model.remove(number)

    @rule()
    def reverse(self):
        self.bus.listeners.reverse()
        self.model.reverse()

    @rule(data=st.data())
    def insert(self, data):
        place = data.draw(st.integers(0, len(self.model)))
        self.owners[self.count] = Widget()
        self.bus.listeners.insert(place, self._listener(self.count))
        self.bus.watchers |= {self._listener(self.count)}
        self.bus.handlers.update({self.count: self._listener(self.count)})
        self.model.insert(place, self.count)
        self.count += 1

    @rule()
    def rebind(self):
        self.bus.listeners = list(self.bus.listeners)
        self.bus.watchers = self.bus.watchers | set()
        self.bus.handlers = {**self.bus.handlers}

    @invariant()
    def holds_the_living(self):
        expected = [self._listener(number) for number in self.model]
        assert expected == self.bus.listeners
        assert expected == list(self.bus.listeners)
        assert set(expected) == self.bus.watchers
        assert len(expected) == len(self.bus.watchers) == len(self.bus.handlers) == len(self.bus.listeners)
        assert {number: self._listener(number) for number in self.model} == self.bus.handlers


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_kinds_are_what_they_say():
    bus = Bus([print], {"a": print})
    bus.watchers.add(print)

    assert [ListenerList, ListenerSet, ListenerDict] == [type(bus.listeners), type(bus.watchers), type(bus.handlers)]
    assert type(bus.listeners[0]) is Listener


async def test_a_bus_that_awaits_works():
    """The usual asynchronous emitter."""
    widget = Widget()
    bus = Bus([widget.on, widget.on_async])
    for listener in bus.listeners:
        result = listener("event")
        if inspect.isawaitable(result):
            await result
    await asyncio.gather(*(listener("again") for listener in bus.listeners if inspect.iscoroutinefunction(listener)))

    assert ["event", "event", "again"] == widget.seen
