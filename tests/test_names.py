"""A name that does not exist is an error that suggests the one that is meant; help() lists all of them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import hygiene
from hygiene import decorators, guards
from hygiene.limits import KEYWORDS
from hygiene.names import closest, suggestion, suggests

CALLS: list[tuple[Any, str, str]] = [
    (hygiene.Registry, "max_size", "maxsize"),
    (hygiene.Registry, "maxlen", "maxsize"),
    (hygiene.Registry, "iddle", "idle"),
    (hygiene.History, "maxsize", "maxlen"),
    (lambda **options: hygiene.History([1], **options), "max_size", "maxlen"),
    (lambda **options: hygiene.Pool(dict, **options), "maxsize", "max_size"),
    (lambda **options: hygiene.AsyncPool(dict, **options), "maxlen", "max_size"),
    (lambda **options: hygiene.managed_pool(dict, **options), "maxsize", "max_size"),
    (lambda **options: hygiene.WriteBehind("memory", **options), "intervall", "interval"),
    (hygiene.MemoryMonitor, "intervall", "interval"),
    (lambda **options: hygiene.bounded_registry("a", **options), "max_size", "maxsize"),
    (lambda **options: hygiene.bounded_registry("a", depth=1, **options), "iddle", "idle"),
    (lambda **options: hygiene.ttl_registry("a", ttl=1, **options), "maxlen", "maxsize"),
    (lambda **options: hygiene.bounded_history("a", **options), "max_size", "maxlen"),
    (lambda **options: hygiene.guard("json", "a", **options), "iddle", "idle"),
    (lambda **options: hygiene.guard("json", "a", maxlen=3, **options), "keepfirst", "keep_first"),
]


@pytest.mark.parametrize(("call", "wrong", "right"), CALLS)
def test_an_unknown_keyword_is_an_error_that_suggests_the_right_one(call: Any, wrong: str, right: str) -> None:
    with pytest.raises(
        TypeError, match=rf"\(\) got an unexpected keyword argument '{wrong}'. Did you mean '{right}'\?"
    ):
        call(**{wrong: 1})


def test_other_errors_of_a_call_stay_as_they_are() -> None:
    """A missing argument, one too many, and what a function raises itself."""

    @suggests
    def resize(size: int, *, unit: str = "B") -> str:
        if unit == "?":
            raise TypeError("no such unit")
        return f"{size} {unit}"

    assert "(size: 'int', *, unit: 'str' = 'B') -> 'str'" == str(inspect.signature(resize))
    assert "5 B" == resize(5)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        resize()  # type: ignore[call-arg] # that is the point
    with pytest.raises(TypeError, match="no such unit"):
        resize(5, unit="?")
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'units'. Did you mean 'unit'\?"):
        resize(5, units="B")  # type: ignore[call-arg] # that is the point


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert ("", []) == (suggestion("colour", KEYWORDS), closest("colour", KEYWORDS))


def listed(function: Any) -> set[str]:
    """The keywords that the docstring of *function* has a line for."""
    arguments = inspect.getdoc(function).split("Args:")[1].split("\n\n")[0]  # type: ignore[union-attr] # it has one
    return set(re.findall(r"^    (\w+): ", arguments, re.MULTILINE))


@pytest.mark.parametrize(
    ("function", "options", "own"),
    [
        (hygiene.bounded_registry, decorators._BoundedOptions, {"attributes", "maxsize"}),
        (hygiene.ttl_registry, decorators._TtlOptions, {"attributes", "ttl", "idle"}),
        (hygiene.bounded_history, decorators._HistoryOptions, {"attributes"}),
        (hygiene.guard, guards._Options, {"target", "attributes"}),
    ],
)
def test_help_has_a_line_for_each_keyword(function: Any, options: Any, own: set[str]) -> None:
    """``help(bounded_registry)`` and the hover of an editor list every keyword, and no other."""
    assert options.__annotations__.keys() | own == listed(function)


def test_help_of_a_registry_has_a_line_for_each_keyword() -> None:
    assert KEYWORDS | {"source"} == listed(hygiene.Registry)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"there is no file 'guards.toml' here. .*\[\[guard\]\]"),
        ("", r"needs tables that begin with \[\[guard\]\]; found none. For example"),
        (
            '[[guard]]\ntarget = "json"\nattribute = "x"\nmax_size = 4',
            r"unknown key 'max_size' \(did you mean 'maxsize'",
        ),
        ('[[guard]]\nmodule = "json"\nattribute = "x"', r"unknown key 'module' \(did you mean 'target'"),
        ('[[guard]]\ntarget = "json"\nattributs = ["x"]', r"unknown key 'attributs' \(did you mean 'attributes'"),
    ],
)
def test_first_mistakes_with_run_say_what_to_write(
    content: str | None, expected: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from hygiene.cli import run  # noqa: PLC0415 - needs the command line's extra

    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "guards.toml").write_text(content)
    with pytest.raises(run.InputError, match=re.compile(expected, re.DOTALL)):
        run._load_guards("guards.toml")
