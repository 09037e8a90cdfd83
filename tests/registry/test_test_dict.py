"""CPython's own tests of dict, with registries in the place of dicts.

Every ``dict``, ``{...}`` and dict comprehension in ``test.test_dict`` becomes a registry. The tests that fail then are
the differences that the guarantees list, each with its reason.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest

from hygiene.registry import Registry, Timed

test_dict = pytest.importorskip("test.test_dict", reason="this Python came without its own tests")

GUARANTEES = Path(__file__).parents[2] / "docs" / "guarantees.md"

# Test, and the words of the guarantees under which its difference is listed.
DIFFERENCES = {
    # loops
    "test_merge_and_mutate": "never raise because a dict changed",
    "test_mutating_iteration": "never raise because a dict changed",
    "test_mutating_iteration_delete": "never raise because a dict changed",
    "test_mutating_iteration_delete_over_items": "never raise because a dict changed",
    "test_mutating_iteration_delete_over_values": "never raise because a dict changed",
    "test_oob_indexing_dictiter_iternextitem": "never raise because a dict changed",
    # iterators
    "test_itemiterator_pickling": "iterators cannot be pickled",
    "test_free_after_iterating": "iterators cannot be pickled",
    "test_iterator_pickling": "iterators cannot be pickled",
    "test_reverseitemiterator_pickling": "iterators cannot be pickled",
    "test_reverseiterator_pickling": "iterators cannot be pickled",
    "test_reversevaluesiterator_pickling": "iterators cannot be pickled",
    "test_valuesiterator_pickling": "iterators cannot be pickled",
    # the class
    "test_missing": "has a `__missing__`",
    # keys
    "test_setdefault_atomic": "hashes and compares a key more than once",
    "test_setitem_atomic_at_resize": "hashes and compares a key more than once",
    "test_resize2": "`__eq__` clears the registry",
    # the garbage collector
    "test_track_dynamic": "always tracked by the garbage collector",
    "test_track_literals": "always tracked by the garbage collector",
}


class PlainDict(Registry[Any, Any]):
    def __init__(self, *args: Any, **entries: Any) -> None:
        super().__init__(dict(*args, **entries))


class BoundedDict(Registry[Any, Any]):
    def __init__(self, *args: Any, **entries: Any) -> None:
        super().__init__(dict(*args, **entries), maxsize=1_000_000)


class TimedDict(Timed[Any, Any]):
    def __init__(self, *args: Any, **entries: Any) -> None:
        super().__init__(dict(*args, **entries), ttl=3600, idle=3600)


class _Swap(ast.NodeTransformer):
    """Call the class of the test on each dict that is written out."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        node = super().generic_visit(node)
        if isinstance(node, (ast.Dict, ast.DictComp)):
            node = ast.copy_location(ast.Call(ast.Name("dict", ast.Load()), [node], []), node)
        return node


def run(kind: type[Any], names: set[str] | None = None) -> dict[str, str]:
    """The tests of CPython that fail for this class, with what they said."""
    source = Path(test_dict.__file__).read_text(encoding="utf-8")
    tree = ast.fix_missing_locations(_Swap().visit(ast.parse(source)))
    module = types.ModuleType("swapped_test_dict")
    vars(module).update({"dict": kind, "__file__": test_dict.__file__})
    sys.modules["swapped_test_dict"] = module
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # finalizers that these tests let fail
    try:
        exec(compile(tree, test_dict.__file__, "exec"), vars(module))
        result = unittest.TestResult()
        for test in _flat(unittest.defaultTestLoader.loadTestsFromTestCase(module.DictTest)):
            if names is None or test._testMethodName in names:
                test.run(result)
        if names is None:
            assert result.testsRun > 70, "CPython's tests were not found"
        return {
            getattr(test, "test_case", test)._testMethodName: text for test, text in result.failures + result.errors
        }
    finally:
        sys.unraisablehook = hook
        del sys.modules["swapped_test_dict"]


def _flat(suite: Any) -> list[Any]:
    return [test for part in suite for test in (_flat(part) if isinstance(part, unittest.TestSuite) else [part])]


@pytest.mark.parametrize("kind", [PlainDict, BoundedDict, TimedDict])
@pytest.mark.slow
def test_cpythons_tests_fail_only_where_the_guarantees_say_so(kind: type[Any]) -> None:
    """No other difference to a dict is known, on either kernel."""
    unexpected = {name: text for name, text in run(kind).items() if name not in DIFFERENCES}

    assert {} == unexpected


def test_some_of_cpythons_tests_pass() -> None:
    """Those for repr, views, keys that misbehave, and the union of dicts, among others."""
    heavy = {
        "test_copy_fuzz",
        "test_container_iterator",
        "test_copy_maintains_tracking",
        "test_reverse_iterator_pickling",
    }
    names = {name for name in vars(test_dict.DictTest) if name.startswith("test_")} - DIFFERENCES.keys() - heavy
    assert len(names) > 50

    assert {} == run(TimedDict, names)


def test_each_difference_is_listed_in_the_guarantees() -> None:
    page = GUARANTEES.read_text(encoding="utf-8")

    assert [] == [words for words in DIFFERENCES.values() if words not in page]


@pytest.mark.slow
@pytest.mark.timeout(310)
def test_cpythons_tests_on_the_kernel_in_python() -> None:
    """The same list holds where no kernel was compiled."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", "", __file__]
    finished = subprocess.run(
        [*command, "-k", "only_where"],
        env={**os.environ, "HYGIENE_PURE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert 0 == finished.returncode, finished.stdout
