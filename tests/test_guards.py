"""Guards bound code that is not yours: classes, modules, objects, and what is not imported yet."""

from __future__ import annotations

import importlib
import runpy
import sys
import textwrap
import types
from collections import defaultdict, deque
from typing import TYPE_CHECKING

import pytest

from hygiene import History, Registry, guard, load_guards, referenced

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SOURCE = """
CACHE = {}
SEEN = {}
LOG = []
NOTHING = None
NUMBER = 5

class Bot:
    shared = {}

    def __init__(self):
        self.sessions = {}
        self.locks = {}
        self.messages = []

    def reset(self):
        self.sessions = {}

class Slim:
    __slots__ = ("sessions",)

    def __init__(self):
        self.sessions = {}

class Store:
    def __init__(self):
        self.bot = Bot()

bot = Bot()
slim = Slim()
store = Store()

def mark(removal):
    marked.append(removal.key)

def first(key):
    return key[0]

marked = []
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that nobody has imported, and gives its name; afterwards it was never there."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(source: str = SOURCE, name: str = "theirs") -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def theirs(package):
    """A module of somebody else, imported."""
    return importlib.import_module(package())


def fill(container):
    for key in range(10):
        container[key] = key
    return list(container)


NEWEST = [7, 8, 9]


# --- Classes ----------------------------------------------------------------------------------------------------------


def test_a_class_is_bounded_as_if_it_were_decorated(theirs):
    asked = guard(theirs.Bot, "sessions", maxsize=3)

    assert NEWEST == fill(theirs.Bot().sessions)
    assert asked.applied
    assert "<guard on sessions of Bot, applied>" == repr(asked)


def test_attributes_of_one_guard_share_one_life(theirs):
    guard(theirs.Bot, "sessions", "locks", maxsize=2)
    bot = theirs.Bot()
    bot.sessions[1] = bot.locks[1] = bot.locks[2] = bot.locks[3] = "x"

    assert ([], [2, 3]) == (list(bot.sessions), list(bot.locks))


def test_a_list_is_bounded_by_the_limits_of_a_history(theirs):
    guard(theirs.Bot, "messages", maxlen=3)
    bot = theirs.Bot()
    bot.messages.extend(range(10))

    assert NEWEST == bot.messages


@pytest.mark.parametrize(
    ("limits", "expected"), [({}, 1024), ({"maxsize": None}, 2000), ({"idle": 60}, 2000), ({"max_bytes": "1GiB"}, 2000)]
)
def test_a_guard_without_a_limit_bounds_at_1024_entries(theirs, limits, expected):
    guard(theirs, "CACHE", **limits)
    for key in range(2000):
        theirs.CACHE[key] = key

    assert expected == len(theirs.CACHE)


# --- Modules ----------------------------------------------------------------------------------------------------------


def test_a_global_is_bounded_wherever_it_was_imported_by_name(theirs, package):
    """``from theirs import CACHE`` is the same registry afterwards, under any name."""
    user = importlib.import_module(package("from theirs import CACHE\nfrom theirs import CACHE as known", "user"))
    theirs.CACHE.update(dict.fromkeys(range(10)))
    guard(theirs, "CACHE", maxsize=3)
    user.CACHE["new"] = 1

    assert theirs.CACHE is user.CACHE is user.known
    assert [8, 9, "new"] == list(theirs.CACHE)


def test_globals_of_one_guard_share_one_life(theirs):
    guard(theirs, "CACHE", "SEEN", maxsize=2)
    theirs.CACHE[1] = theirs.SEEN[1] = theirs.SEEN[2] = theirs.SEEN[3] = "x"

    assert ([], [2, 3]) == (list(theirs.CACHE), list(theirs.SEEN))


def test_guards_on_one_global_merge(theirs):
    """As stacked decorators do."""
    guard(theirs, "CACHE", maxsize=3)
    theirs.CACHE.update({1: 1, 2: 2})
    guard(theirs, "CACHE", idle=60)
    fill(theirs.CACHE)

    assert NEWEST == list(theirs.CACHE)


def test_a_global_list_is_bounded(theirs):
    guard(theirs, "LOG", maxlen=3)
    theirs.LOG.extend(range(10))

    assert NEWEST == theirs.LOG
    assert isinstance(theirs.LOG, History)


def test_the_hook_of_a_global_is_told_its_module(theirs):
    told = []
    guard(theirs, "CACHE", maxsize=1, on_evict=told.append)
    theirs.CACHE[1] = theirs.CACHE[2] = "x"

    assert [theirs] == [removal.owner for removal in told]


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("CACHES", AttributeError, "theirs.CACHES, but the module has no such global .did you mean 'CACHE'"),
        ("NOTHING", TypeError, "theirs.NOTHING must hold a dict"),
        ("NUMBER", TypeError, "theirs.NUMBER must hold a dict"),
        ("LOG", TypeError, "theirs.LOG must hold a dict, or None; found a list. For a list use bounded_history"),
    ],
)
def test_a_global_that_cannot_be_bounded_changes_nothing(theirs, name, error, expected):
    before = theirs.CACHE

    with pytest.raises(error, match=expected):
        guard(theirs, "CACHE", name)

    assert before is theirs.CACHE


# --- Objects ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bot", "slim"])
def test_one_object_is_bounded_and_others_of_its_class_are_not(theirs, name):
    """The dict that it has, and each that it is given later."""
    target = getattr(theirs, name)
    target.sessions.update(dict.fromkeys(range(10)))
    guard(target, "sessions", maxsize=3)

    assert NEWEST == list(target.sessions)

    target.sessions = {}
    other = type(target)()

    assert NEWEST == fill(target.sessions)
    assert dict is type(other.sessions)
    assert 10 == len(fill(other.sessions))


def test_an_object_may_have_a_bound_of_its_own(theirs):
    """Whatever its class is bounded to."""
    guard(theirs.Bot, "sessions", maxsize=5)
    one, other = theirs.Bot(), theirs.Bot()
    guard(one, "sessions", maxsize=3)

    assert (NEWEST, [5, 6, 7, 8, 9]) == (fill(one.sessions), fill(other.sessions))


def test_attributes_of_one_object_share_one_life(theirs):
    guard(theirs.bot, "sessions", "locks", maxsize=2)
    bot = theirs.bot
    bot.sessions[1] = bot.locks[1] = bot.locks[2] = bot.locks[3] = "x"
    bot.sessions = {2: "x"}
    bot.locks[4] = "x"

    assert ([2], [2, 4]) == (list(bot.sessions), list(bot.locks))


def test_an_attribute_that_was_set_from_outside_can_be_guarded(theirs):
    theirs.bot.extra = defaultdict(list)
    guard(theirs.bot, "extra", maxsize=3)
    for key in range(10):
        theirs.bot.extra[key].append(key)

    assert {7: [7], 8: [8], 9: [9]} == theirs.bot.extra


def test_an_object_that_uses_the_dict_of_its_class_bounds_that(theirs):
    guard(theirs.bot, "shared", maxsize=3)

    assert NEWEST == fill(theirs.Bot.shared)


def test_an_object_with_a_dict_of_its_own_bounds_that_one_only(theirs):
    theirs.bot.shared = {}
    guard(theirs.bot, "shared", maxsize=3)
    fill(theirs.bot.shared)
    theirs.bot.shared = {}

    assert NEWEST == fill(theirs.bot.shared)
    assert dict is type(theirs.Bot.shared)


def test_a_list_of_an_object_is_bounded(theirs):
    guard(theirs.bot, "messages", maxlen=3)
    theirs.bot.messages.extend(range(10))
    theirs.bot.messages = [*theirs.bot.messages, 10]

    assert [8, 9, 10] == theirs.bot.messages


def test_a_deque_of_an_object_is_left_alone(theirs):
    theirs.bot.messages = messages = deque(maxlen=5)
    guard(theirs.bot, "messages", maxlen=3)

    assert messages is theirs.bot.messages


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("session", AttributeError, "Bot.session,.*did you mean 'sessions'"),
        ("messages", TypeError, "Bot.messages must hold a dict, or None; found a list"),
        ("reset", TypeError, "Bot.reset is computed by 'function'"),
    ],
)
def test_an_attribute_that_cannot_be_bounded_changes_nothing(theirs, name, error, expected):
    before = theirs.bot.sessions

    with pytest.raises(error, match=expected):
        guard(theirs.bot, "sessions", name)

    assert before is theirs.bot.sessions


@pytest.mark.parametrize("target", [5, {}, [], None, object()])
def test_an_object_without_attributes_is_refused(target):
    with pytest.raises(TypeError, match="objects of Python classes; found"):
        guard(target, "sessions")


# --- By name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize(
    ("path", "attribute", "find"),
    [
        (":Bot", "sessions", lambda module: module.Bot().sessions),
        (":Bot", "shared", lambda module: module.Bot.shared),
        ("", "CACHE", lambda module: module.CACHE),
        (":bot", "sessions", lambda module: module.bot.sessions),
        (":store.bot", "sessions", lambda module: module.store.bot.sessions),
    ],
)
def test_a_target_named_by_text_is_bounded_now_or_when_it_is_imported(package, imported, path, attribute, find):
    name = package()
    if imported:
        importlib.import_module(name)
    asked = guard(name + path, attribute, maxsize=3)

    assert imported == asked.applied

    assert NEWEST == fill(find(importlib.import_module(name)))
    assert asked.applied


def test_a_guard_that_waits_says_so(package):
    assert "<guard on sessions of never:Bot, waiting>" == repr(guard(f"{package(name='never')}:Bot", "sessions"))


def test_a_package_that_does_not_exist_is_told_at_once():
    with pytest.raises(ModuleNotFoundError, match="there is no package 'no_such_package'") as caught:
        guard("no_such_package.module:Bot", "sessions")

    assert "no_such_package" == caught.value.name


def test_a_class_that_does_not_exist_is_told_at_once_where_the_module_is_imported(theirs):
    with pytest.raises(AttributeError, match=r"guard 'theirs:Bott': theirs has no 'Bott' .did you mean 'Bot'"):
        guard("theirs:Bott", "sessions")


def test_a_class_that_does_not_exist_is_told_by_the_import(package):
    name = package(name="lacking")
    guard(f"{name}:Bott", "sessions")

    with pytest.raises(AttributeError, match=r"lacking has no 'Bott' .did you mean 'Bot'"):
        importlib.import_module(name)


@pytest.mark.parametrize("target", ["", ":Bot", "a b", "theirs:Bot.", "theirs.py:Bot()", "-"])
def test_text_that_names_nothing_is_refused(target):
    with pytest.raises(ValueError, match="a guard's target is"):
        guard(target, "sessions")


def test_limits_of_dicts_and_of_lists_do_not_mix(theirs):
    with pytest.raises(ValueError, match="either dicts or lists; found maxsize, a limit of dicts, with maxlen"):
        guard(theirs.Bot, "sessions", maxsize=5, maxlen=5)


def test_a_wrong_limit_is_told(theirs):
    with pytest.raises(ValueError, match="maxsize must be at least 1"):
        guard(theirs.Bot, "sessions", maxsize=0)
    with pytest.raises(ValueError, match="needs the names of the attributes"):
        guard(theirs.Bot)


# --- The program itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decorated",
    [
        "class Bot:\n    def __init__(self):\n        self.sessions = {}",
        "@dataclass\nclass Bot:\n    sessions: dict = field(default_factory=dict)",
        "@dataclass(\n    slots=True,\n)\nclass Bot:\n    sessions: dict = field(default_factory=dict)",
        "@identity\n@dataclass(frozen=True)\nclass Bot:\n    sessions: dict = field(default_factory=dict)",
    ],
)
def test_a_class_of_the_program_that_runs_is_bounded_when_it_is_defined(tmp_path, decorated):
    """``__main__:Bot`` is finished by its own decorators first."""
    script = tmp_path / "app.py"
    script.write_text(
        "from dataclasses import dataclass, field\n"
        "def identity(cls):\n    return cls\n"
        f"class Other:\n    pass\n{decorated}\n"
        "bot = Bot()\n"
        "for key in range(10):\n    bot.sessions[key] = key\n"
    )
    build, tracer = __build_class__, sys.gettrace()
    asked = guard("__main__:Bot", "sessions", maxsize=3)
    bot = runpy.run_path(str(script), run_name="__main__")["bot"]

    assert NEWEST == list(bot.sessions)
    assert asked.applied
    assert (build, tracer) == (__build_class__, sys.gettrace())


def test_a_class_in_a_class_of_the_program_is_bounded(tmp_path):
    script = tmp_path / "app.py"
    script.write_text("class App:\n    class Bot:\n        def __init__(self):\n            self.sessions = {}\n")
    guard("__main__:App.Bot", "sessions", maxsize=3)
    app = runpy.run_path(str(script), run_name="__main__")["App"]

    assert NEWEST == fill(app.Bot().sessions)


def test_a_wrong_attribute_of_the_program_is_told_where_the_class_is_defined(tmp_path):
    script = tmp_path / "app.py"
    script.write_text("class Bot:\n    def __init__(self):\n        self.sessions = {}\nbot = Bot()\n")
    build, tracer = __build_class__, sys.gettrace()
    guard("__main__:Bot", "session")

    try:
        with pytest.raises(AttributeError, match="did you mean 'sessions'"):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.settrace(tracer)  # an error in a trace function turns tracing off, also that of a coverage run

    assert build is __build_class__


def test_a_class_whose_decorator_fails_is_waited_for(tmp_path):
    """The next one of that name is the one."""
    script = tmp_path / "app.py"
    script.write_text(
        "def fail(cls):\n    raise RuntimeError\n"
        "try:\n    @fail\n    class Bot:\n        pass\nexcept RuntimeError:\n    pass\n"
        "class Bot:\n    def __init__(self):\n        self.sessions = {}\n"
        "class Bot2(Bot):\n    pass\n"
    )
    asked = [guard("__main__:Bot", "sessions", maxsize=3), guard("__main__:Bot2", "sessions", maxsize=2)]
    found = runpy.run_path(str(script), run_name="__main__")

    assert [True, True] == [one.applied for one in asked]
    assert (NEWEST, [8, 9]) == (fill(found["Bot"]().sessions), fill(found["Bot2"]().sessions))


def test_a_global_of_the_program_cannot_be_waited_for():
    """There is nothing to watch: the class that holds it can be named, or the module it is imported from."""
    with pytest.raises(AttributeError, match="no such global"):
        guard("__main__", "no_such_global_anywhere")


def test_what_the_program_has_already_is_bounded_at_once(monkeypatch, theirs):
    monkeypatch.setitem(sys.modules, "__main__", theirs)
    guard("__main__:Bot", "sessions", maxsize=3)

    assert NEWEST == fill(theirs.Bot().sessions)


# --- In a file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Writes a file of guards and gives its path."""

    def write(text):
        path = tmp_path / "hygiene.toml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_a_file_bounds_what_it_names(config, theirs):
    """Numbers, times, sizes, names and callables."""
    guards = load_guards(
        config("""
            [[guard]]
            target = "theirs:Bot"
            attributes = ["sessions", "locks"]
            maxsize = 3
            idle = "2h"
            on_evict = "theirs:mark"
            busy = "referenced"
            close = "close"
            key.locks = "theirs:first"

            [[guard]]
            target = "theirs"
            attribute = "LOG"
            maxlen = 3
        """)
    )
    bot = theirs.Bot()
    for key in range(10):
        bot.sessions[str(key)], bot.locks[str(key), 1] = [key], [key]
    theirs.LOG.extend(range(10))

    assert [("sessions", "locks"), ("LOG",)] == [asked.attributes for asked in guards]
    assert [True, True] == [asked.applied for asked in guards]
    assert ["7", "8", "9"] == list(bot.sessions)
    assert [("7", 1), ("8", 1), ("9", 1)] == list(bot.locks)
    assert "0" in theirs.marked
    assert NEWEST == theirs.LOG


def test_a_name_stays_a_name(config, theirs, monkeypatch):
    """``busy = "locked"`` asks the value, and is no function to import."""
    asked = load_guards(config('[[guard]]\ntarget = "theirs:Bot"\nattribute = "sessions"\nbusy = "locked"'))[0]

    assert "locked" == asked._plan.limits.busy


def test_referenced_is_the_function_of_that_name(config, theirs):
    asked = load_guards(config('[[guard]]\ntarget = "theirs:Bot"\nattribute = "sessions"\nbusy = "referenced"'))[0]

    assert referenced is asked._plan.limits.busy


def test_the_file_is_hygiene_toml_if_none_is_named(config, theirs, monkeypatch):
    monkeypatch.chdir(config('[[guard]]\ntarget = "theirs:Bot"\nattribute = "sessions"').parent)

    assert 1 == len(load_guards())


GOOD = '[[guard]]\ntarget = "theirs:Bot"\nattribute = "sessions"\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[guard]\n", "hygiene.toml is no TOML"),
        ("", r"hygiene.toml needs tables that begin with \[\[guard\]\]; found none"),
        ("[guards]\n", r"needs tables that begin with \[\[guard\]\]; found 'guards'"),
        ("guard = 5\n", r"needs tables that begin with \[\[guard\]\]"),
        ("guard = []\n", r"needs tables that begin with \[\[guard\]\]"),
        ("gaurd = 1\n" + GOOD, r"may hold \[\[guard\]\] tables only; found 'gaurd' .did you mean 'guard'"),
        ('[[guard]]\nattribute = "x"\n', "guard 1: target must be text.*found None"),
        ('[[guard]]\ntarget = "theirs:Bot"\n', "guard 1: attributes must be a list of names.*found None"),
        ('[[guard]]\ntarget = "theirs:Bot"\nattributes = "x"\n', "guard 1: attributes must be a list.*found 'x'"),
        ('[[guard]]\ntarget = "theirs:Bot"\nattributes = [1]\n', "guard 1: attributes must be a list"),
        (GOOD + 'attributes = ["locks"]\n', "guard 1: wanted attribute or attributes; found both"),
        (GOOD + GOOD + "max_size = 5\n", "guard 2: unknown key 'max_size' .did you mean 'maxsize'"),
        (GOOD + "maxsize = 0\n", "guard 1: maxsize must be at least 1"),
        (GOOD + 'maxsize = "5"\n', "guard 1: maxsize must be a whole number"),
        (GOOD + 'idle = "5 parsecs"\n', "guard 1: idle must be positive.*found '5 parsecs'"),
        (GOOD + "maxlen = 5\nmaxsize = 5\n", "guard 1: guard bounds either dicts or lists"),
        (GOOD + 'values = "str"\n', "guard 1: values must name a callable as \"package.module:function\"; found 'str'"),
        (GOOD + "values = 5\n", "guard 1: values must name a callable as .*; found 5"),
        (GOOD + 'values = "theirs:nothing"\n', "guard 1: values: 'theirs:nothing' cannot be imported: .*no 'nothing'"),
        (GOOD + 'values = "nowhere:nothing"\n', "guard 1: values: 'nowhere:nothing' cannot be imported"),
        (GOOD + 'values = "theirs:NUMBER"\n', "guard 1: values must name a callable; found 5"),
        (GOOD + 'key = "theirs:first"\n', "guard 1: key must be a table"),
        (GOOD + 'key.other = "theirs:first"\n', "guard 1: guard: key names 'other'"),
        ('[[guard]]\ntarget = "no such"\nattribute = "x"\n', "guard 1: a guard's target is"),
        ('[[guard]]\ntarget = "no_such_package:Bot"\nattribute = "x"\n', "guard 1: .*there is no package"),
    ],
)
def test_a_wrong_file_says_where_and_what(config, theirs, text, expected):
    """And no guard of it is applied, the right ones neither."""
    with pytest.raises(ValueError, match=expected):
        load_guards(config(text))

    assert dict is type(theirs.Bot().sessions)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hygiene\.toml"):
        load_guards(tmp_path / "hygiene.toml")


def test_a_class_that_is_not_there_names_the_table(config, theirs):
    with pytest.raises(AttributeError, match="theirs has no 'Bott'") as caught:
        load_guards(config('[[guard]]\ntarget = "theirs:Bott"\nattribute = "x"\n'))

    assert [True] == ["hygiene.toml, guard 1" in note for note in caught.value.__notes__]


def test_odd_things_among_the_modules_are_passed_over(theirs, monkeypatch):
    """Anything may sit in ``sys.modules``."""
    monkeypatch.setitem(sys.modules, "odd", 5)
    monkeypatch.setitem(sys.modules, "lazy", types.SimpleNamespace(CACHE=theirs.CACHE))
    guard(theirs, "CACHE", maxsize=3)

    assert theirs.CACHE is sys.modules["lazy"].CACHE
    assert isinstance(theirs.CACHE, Registry)
