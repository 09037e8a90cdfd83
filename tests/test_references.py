"""References that a value holds to itself are told from those of the rest of the program."""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hygiene import Registry, referenced, shared_resource
from hygiene.references import MOST, own_references
from hygiene.testing import ManualClock


class Node:
    """Has attributes, and a method."""

    def act(self) -> Node:
        return self


class Slotted:
    """Has attributes without a dict, and cannot be weakly referenced."""

    __slots__ = ("handler", "parts")

    def act(self) -> Slotted:
        return self


class Tree(list[Any]):
    """A list with attributes."""


def with_parent_links() -> Any:
    top = Node()
    top.children = [Node(), Node()]  # type: ignore[attr-defined]
    for child in top.children:  # type: ignore[attr-defined]
        child.parent = top
        child.siblings = top.children  # type: ignore[attr-defined]
        child.leaf = Node()
        child.leaf.parent = child
        child.leaf.top = top
    return top


def with_handlers() -> Any:
    client = Node()
    client.on_message = client.act  # type: ignore[attr-defined]
    client.handlers = {"close": [client.act], "open": functools.partial(Node.act, client)}  # type: ignore[attr-defined]
    return client


def with_closure() -> Any:
    client = Node()
    client.on_message = lambda: (client, client.act())  # type: ignore[attr-defined]
    client.on_error = lambda by=client: by  # type: ignore[attr-defined]
    return client


def with_generator() -> Any:
    def steps(node: Node) -> Iterator[Node]:
        while True:
            yield node

    node = Node()
    node.steps = steps(node)  # type: ignore[attr-defined]
    next(node.steps)  # type: ignore[attr-defined]
    return node


def with_slots() -> Any:
    value = Slotted()
    value.handler = value.act
    value.parts = (value, {"self": value})
    return value


def with_its_class() -> Any:
    class Local:
        """A class that leads to the rest of the program."""

        def __init__(self) -> None:
            self.thread = threading.Thread(target=self.run)

        def run(self) -> None: ...

    return Local()


def list_in_itself() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def dict_in_itself() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


def set_of_methods() -> Any:
    node = Node()
    node.handlers = {node.act}  # type: ignore[attr-defined]
    return node


def tree() -> Any:
    top = Tree()
    top.append(Tree())
    top[0].parent = top
    return top


def deque_in_itself() -> Any:
    value: deque[Any] = deque()
    value.append((value,))
    return value


VALUES: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        with_parent_links,
        with_handlers,
        with_closure,
        with_generator,
        with_slots,
        with_its_class,
        list_in_itself,
        dict_in_itself,
        set_of_methods,
        tree,
        deque_in_itself,
    )
}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=VALUES)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return VALUES[request.param]


@pytest.mark.parametrize("limits", [{}, {"ttl": 60}, {"policy": "lfu"}, {"on_evict": lambda removal: None}])
def test_values_that_refer_to_themselves_are_evicted(make: Callable[[], Any], limits: dict[str, Any]) -> None:
    """With ``busy=referenced`` a reference from the value's own parts does not keep the value."""
    registry: Registry[int, Any] = Registry(maxsize=5, busy=referenced, **limits)
    for number in range(30):
        registry[number] = make()

    assert 5 == len(registry)


def test_values_that_refer_to_themselves_expire(make: Callable[[], Any], clock: ManualClock) -> None:
    """The same for a time limit, and for `evict`."""
    registry: Registry[int, Any] = Registry(ttl=10, timer=clock, busy=referenced)
    registry[1], registry[2] = make(), make()
    assert registry.evict(1)
    clock.advance(10)

    assert registry.get(2) is None


def test_values_that_refer_to_themselves_and_are_in_use_stay(make: Callable[[], Any]) -> None:
    """A reference from a variable, a container or a bound method elsewhere keeps the value."""
    registry: Registry[str, Any] = Registry(maxsize=1, busy=referenced)
    held = registry["held"] = make()
    elsewhere = [registry.setdefault("in a list", make())]
    registry["free"] = make()
    registry["another"] = make()

    assert {"held", "in a list", "another"} == set(registry)
    assert held is registry["held"]
    assert elsewhere[0] is registry["in a list"]


def test_a_part_in_use_keeps_the_value() -> None:
    """Who works with ``client.chat``, which refers to its client, uses the client."""
    registry: Registry[str, Any] = Registry(maxsize=1, busy=referenced)
    registry["tree"] = with_parent_links()
    leaf = registry["tree"].children[0].leaf
    method = registry.setdefault("handler", with_handlers()).on_message
    registry["free"] = Node()
    registry["another"] = Node()
    assert ["tree", "handler", "another"] == list(registry)
    del leaf, method
    registry["last"] = Node()

    assert ["last"] == list(registry)


def test_an_owner_that_refers_to_the_registry_does_not_keep_a_value() -> None:
    """A parent link to the object that has the registry leads back to the value by way of the registry."""

    class Bot:
        def __init__(self) -> None:
            self.sessions: Registry[int, Node] = Registry(maxsize=2, busy=referenced)
            self.current: Node | None = None

        def open(self, number: int) -> None:
            session = self.sessions[number] = Node()
            session.bot = self  # type: ignore[attr-defined]
            session.act_again = session.act  # type: ignore[attr-defined]

    bot = Bot()
    for number in range(20):
        bot.open(number)
    assert [18, 19] == list(bot.sessions)
    bot.current = bot.sessions[18]
    for number in range(20, 40):
        bot.open(number)

    assert [18, 39] == list(bot.sessions)


def test_the_walk_is_bounded_and_calls_no_code_of_the_program() -> None:
    """A value that refers to itself from behind more objects than the bound counts as referenced."""

    class Trap(Node):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

        def __len__(self) -> int:
            raise AssertionError

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError

        def __eq__(self, other: object) -> bool:
            raise AssertionError

        __hash__ = None  # type: ignore[assignment]

    trap: list[Any] = [Trap()]
    trap.append((trap,))
    large: list[Any] = [[] for _ in range(2 * MOST)]
    large.append(large)
    chain: list[Any] = []
    end = chain
    for _ in range(2 * MOST):
        end.append([])
        end = end[0]
    end.append(chain)

    assert [1, 0, 0] == [own_references(value) for value in (trap, large, chain)]
    large.pop()
    end.pop()


def test_the_walk_keeps_nothing_that_it_visited(make: Callable[[], Any]) -> None:
    """The reference counts are as before."""
    value = make()
    parts = gc.get_referents(value)
    before = [sys.getrefcount(part) for part in (value, *parts)]
    own_references(value)

    assert before == [sys.getrefcount(part) for part in (value, *parts)]


def test_a_shared_resource_with_new_parts_is_closed_when_idle(clock: ManualClock) -> None:
    """A part that is made on first use, and refers to the resource, does not keep it open."""
    closed: list[int] = []

    class Client:
        @functools.cached_property
        def chat(self) -> Any:
            part = Node()
            part.client = self  # type: ignore[attr-defined]
            return part

        def close(self) -> None:
            closed.append(1)

    make = shared_resource(idle=10, timer=clock)(Client)
    part = make().chat
    clock.advance(10)
    assert 0 == make.expire()
    del part
    clock.advance(10)

    assert 1 == make.expire()
    assert [1] == closed


def test_a_shared_resource_that_a_thread_serves_is_closed_when_idle(clock: ManualClock) -> None:
    """References that the factory has put elsewhere are no use of the resource."""
    closed: list[int] = []
    threads: list[Any] = []

    class Client:
        def __init__(self) -> None:
            threads.append(self.close)
            self.handler = self.close

        def close(self) -> None:
            closed.append(1)

    make = shared_resource(idle=10, timer=clock)(Client)
    make().more = make().close  # type: ignore[attr-defined]
    clock.advance(10)

    assert 1 == make.expire()
    assert [1] == closed
