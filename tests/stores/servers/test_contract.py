"""A store on a server does what every store does: the tests of the embedded one, run again."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.once


_FILE = Path(__file__).resolve().parent.parent / "test_store.py"
_FIXTURES = {"store", "clock", "sequence", "key"}  # what does not ask for a path or for the inside of SQLite
# It looks at the order of keys, which no store promises; `test_a_loop_may_save_and_delete` is the same without that.
_ELSEWHERE = {"test_iteration_goes_over_everything_and_holds_nothing_meanwhile"}


def _contract() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("contract_of_stores", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: function
        for name, function in vars(module).items()
        if name.startswith("test_")
        and name not in _ELSEWHERE
        and {"store"} <= set(inspect.signature(function).parameters) <= _FIXTURES
    }


globals().update(_contract())


def test_the_contract_was_found() -> None:
    assert 20 < len(_contract())
