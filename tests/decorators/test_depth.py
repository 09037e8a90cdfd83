"""Two levels, ``members[guild][user]``: each has the bounds that were asked for it, or the program is told."""

from __future__ import annotations

import functools
from collections import OrderedDict, UserDict, defaultdict, deque

import pytest

from hygiene import History, Registry, bounded_history, bounded_registry, guard, load_guards, ttl_registry
from hygiene.testing import ManualClock


def made(*decorators, source=dict):
    """An object whose *members* are under these decorators, the last of which is applied first."""

    class Guilds:
        def __init__(self):
            self.members = source()

    for decorate in reversed(decorators):
        decorate(Guilds)
    return Guilds()


def shape(members):
    return len(members), max(map(len, members.values()))


def fill(members, guilds=20, users=20):
    for number in range(guilds):
        for user in range(users):
            members.setdefault(number, {})[user] = 1


OUTER = bounded_registry("members", maxsize=10)
INNER = bounded_registry("members", maxsize=5, depth=1)


@pytest.mark.parametrize("decorators", [(OUTER, INNER), (INNER, OUTER)])
@pytest.mark.parametrize("source", [dict, OrderedDict, lambda: defaultdict(dict)])
def test_stacked_bounds_hold_each_on_its_level(decorators, source):
    """Ten guilds with five users each, whichever decorator is on top."""
    owner = made(*decorators, source=source)
    fill(owner.members)

    assert (10, 5) == shape(owner.members)
    assert {Registry} == {type(inner) for inner in owner.members.values()}


@pytest.mark.parametrize("upside_down", [False, True])
def test_a_time_for_one_level_and_a_number_for_the_other(upside_down):
    """Each decorator keeps its own limits; none of them reaches the other level."""
    clock = ManualClock()
    decorators = [ttl_registry("members", idle=60, timer=clock), INNER]
    owner = made(*(reversed(decorators) if upside_down else decorators))
    fill(owner.members)
    assert (20, 5) == shape(owner.members)
    clock.advance(61)

    assert {} == dict(owner.members.items())


def test_a_time_for_the_inner_level():
    clock = ManualClock()
    owner = made(OUTER, ttl_registry("members", ttl=60, timer=clock, depth=1))
    fill(owner.members)
    assert (10, 20) == shape(owner.members)
    clock.advance(61)

    assert [[]] * 10 == [list(inner) for inner in owner.members.values()]


def test_the_same_level_merges_and_the_upper_decorator_wins():
    owner = made(bounded_registry("members", maxsize=3, depth=1), OUTER, INNER, bounded_registry("members", maxsize=7))
    fill(owner.members)

    assert (10, 3) == shape(owner.members)


def test_without_a_number_the_default_is_for_the_level_of_the_decorator():
    owner = made(bounded_registry("members", depth=1))
    fill(owner.members, guilds=1100, users=1)
    fill(owner.members, guilds=1, users=1100)

    assert (1100, 1024) == shape(owner.members)


def test_hooks_and_closers_are_called_for_their_level():
    """A guild that leaves is reported by the outer hook, a user by the inner one."""
    told = []
    owner = made(
        bounded_registry("members", maxsize=1, on_evict=lambda removal: told.append(("guild", removal.key))),
        bounded_registry("members", maxsize=1, depth=1, on_evict=lambda removal: told.append(("user", removal.key))),
    )
    fill(owner.members, guilds=2, users=2)

    assert [("user", 0), ("guild", 0), ("user", 0)] == told


def test_a_converter_of_the_outer_level_comes_first():
    owner = made(bounded_registry("members", maxsize=10, values=dict.fromkeys), INNER)
    owner.members["a"] = range(8)

    assert {"a": dict.fromkeys(range(3, 8))} == owner.members


def test_lists_in_a_dict_have_a_bound_of_their_own():
    """``bounded_history`` with depth=1 bounds ``chats[user]``; the dict itself has the other decorator."""
    chats = made(OUTER, bounded_history("members", maxlen=3, depth=1), source=lambda: defaultdict(list)).members
    for user in range(20):
        for number in range(5):
            chats[user].append(number)

    assert {user: [2, 3, 4] for user in range(10, 20)} == chats
    assert {History} == {type(inner) for inner in chats.values()}


def test_lists_and_dicts_side_by_side():
    owner = made(INNER, bounded_history("members", maxlen=3, depth=1))
    owner.members["list"] = list(range(9))
    owner.members["dict"] = dict.fromkeys(range(9))

    assert {"list": [6, 7, 8], "dict": dict.fromkeys(range(4, 9))} == owner.members


@pytest.mark.parametrize("kind", [set, list, deque, UserDict])
def test_a_container_that_cannot_be_bounded_is_refused(kind):
    """Where the value shows it, at the write; where the factory or the content shows it, at the assignment."""
    owner = made(INNER)
    owner.members["a"] = {1: 1}
    for write in (
        lambda: owner.members.__setitem__("a", kind()),
        lambda: owner.members.setdefault("b", kind()),
        lambda: owner.members.update(b=kind()),
        lambda: setattr(owner, "members", {"b": kind()}),
        lambda: setattr(owner, "members", defaultdict(kind)),
    ):
        with pytest.raises(
            TypeError, match=rf"depth=1 bounds the dicts in .*Guilds.members, .* a {kind.__name__}. \w+"
        ):
            write()

    assert {"a": {1: 1}} == owner.members


def test_a_factory_that_hides_its_kind_is_refused_at_the_lookup():
    owner = made(INNER, source=lambda: defaultdict(lambda: set()))  # noqa: PLW0108 - no class that could be looked at
    with pytest.raises(TypeError, match=r"cannot bound a set\. Bound each set where it is made"):
        owner.members["a"].add(1)

    assert {} == owner.members


def test_a_dict_where_only_lists_are_bounded_is_refused():
    owner = made(bounded_history("members", maxlen=3, depth=1))
    with pytest.raises(TypeError, match=r"bounds the lists in .* cannot bound a dict. For dicts add bounded_registry"):
        owner.members["a"] = {}


def test_containers_with_a_bound_of_their_own_are_accepted():
    owner = made(INNER)
    owner.members |= {"deque": deque(maxlen=3), "history": History(maxlen=3), "registry": Registry(maxsize=3)}

    assert [deque, History, Registry] == [type(value) for value in owner.members.values()]


def test_a_dict_of_the_class_is_refused_before_the_class_has_changed():
    class Guilds:
        members = {"a": set()}  # noqa: RUF012 - what people write

    with pytest.raises(TypeError, match=r"in .*Guilds.members, and cannot bound a set"):
        INNER(Guilds)

    assert dict is type(Guilds.members)


def test_a_store_is_for_one_level():
    for inner, outer in (({"store": "memory"}, {}), ({}, {"store": "memory"})):
        with pytest.raises(ValueError, match="depth=1 bounds many dicts"):
            made(bounded_registry("members", **outer), bounded_registry("members", depth=1, **inner))


def test_a_dict_is_not_a_list_without_depth():
    with pytest.raises(TypeError, match="For the lists in a dict give bounded_history depth=1"):
        made(bounded_history("members", maxlen=3), OUTER)


@pytest.mark.parametrize("target", ["class", "object"])
def test_guards_bound_two_levels(target):
    class Guilds:
        def __init__(self):
            self.members = {}

    owner = Guilds()
    guard(Guilds if target == "class" else owner, "members", maxsize=10)
    guard(Guilds if target == "class" else owner, "members", maxsize=5, depth=1)
    owner = Guilds() if target == "class" else owner
    fill(owner.members)

    assert (10, 5) == shape(owner.members)


def test_a_guard_refuses_an_object_with_sets_and_changes_nothing():
    class Topics:
        def __init__(self):
            self.topics = {"news": set()}

    owner = Topics()
    with pytest.raises(TypeError, match="cannot bound a set"):
        guard(owner, "topics", maxsize=5, depth=1)

    assert dict is type(owner.topics)


def test_a_file_of_guards_bounds_two_levels(tmp_path, monkeypatch):
    (tmp_path / "two_levels.py").write_text("members = {}\nchats = {}\n")
    (tmp_path / "hygiene.toml").write_text(
        "".join(
            f'[[guard]]\ntarget = "two_levels"\nattribute = "{name}"\n{limits}\n'
            for name, limits in (
                ("members", "maxsize = 5\ndepth = 1"),
                ("members", "maxsize = 10"),
                ("chats", "maxlen = 3\ndepth = 1"),
            )
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    load_guards(tmp_path / "hygiene.toml")
    import two_levels  # noqa: PLC0415 - made above

    fill(two_levels.members)
    two_levels.chats["a"] = list(range(9))

    assert (10, 5) == shape(two_levels.members)
    assert {"a": [6, 7, 8]} == two_levels.chats


def test_a_converter_that_makes_histories_satisfies_depth():
    """``values=partial(History, ...)`` on the same level turns lists into values with a bound."""
    owner = made(bounded_registry("members", values=functools.partial(History, maxlen=3)), INNER)
    owner.members["a"] = [1, 2, 3, 4]

    assert {"a": [2, 3, 4]} == owner.members
