"""Which body is taken, and that it makes no difference to what was written under the other."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hygiene

WHICH = "import hygiene; from hygiene.kernel import Kernel; print(hygiene.compiled, Kernel.__module__)"
WITH_GIL = pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="no extension is tried there")
LOGGED = """
import logging, sys

class Seen(logging.Handler):
    def emit(self, record):
        print(record.levelname, record.event_name)

logging.getLogger("hygiene").addHandler(Seen())
"""


@pytest.mark.slow
def test_python_can_be_asked_for(run: Callable[..., str]) -> None:
    """``HYGIENE_PURE=1`` gives Python, and `hygiene.compiled` says so."""
    assert "False hygiene.kernel.pure\n" == run(WHICH, pure=True)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["", "0"])
def test_it_is_compiled_where_it_was_built(run: Callable[..., str], compiled: ModuleType, value: str) -> None:
    """Without that, or with 0, it is the compiled body."""
    assert "True hygiene.kernel.compiled\n" == run(WHICH, env={"HYGIENE_PURE": value})


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without any extension."""
    source = Path(hygiene.__file__).parent
    shutil.copytree(source, tmp_path / "hygiene", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


@pytest.mark.slow
@WITH_GIL
def test_without_an_extension_it_is_python_and_nothing_is_said(run: Callable[..., str], package: Path) -> None:
    """Who has no compiler has registries."""
    assert "False hygiene.kernel.pure\n" == run(LOGGED + WHICH, env={"PYTHONPATH": str(package)})


@pytest.mark.slow
def test_without_the_gil_it_is_python_and_one_line(run: Callable[..., str]) -> None:
    """What relies on the GIL is named where there is none."""
    output = run(LOGGED + "sys._is_gil_enabled = lambda: False\n" + WHICH)

    assert "WARNING kernel.no_gil\nFalse hygiene.kernel.pure\n" == output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="an extension has another name there")
@WITH_GIL
def test_an_extension_that_cannot_be_loaded_gives_python_and_one_line(run: Callable[..., str], package: Path) -> None:
    """A broken file is told of once, as ``kernel.not_loaded``, and stands in nobody's way."""
    (package / "hygiene" / "kernel" / "compiled.so").write_bytes(b"no extension at all")

    output = run(LOGGED + WHICH, env={"PYTHONPATH": str(package)})

    assert "WARNING kernel.not_loaded\nFalse hygiene.kernel.pure\n" == output


@pytest.mark.skipif(sys.version_info < (3, 14), reason="dicts had versions before Python 3.14")
def test_without_a_watcher_of_dicts_it_is_python_and_one_line(run: Callable[..., str], compiled: ModuleType) -> None:
    """CPython has a few: where others took them all, that is told of, and registries run in Python."""
    pytest.importorskip("_testcapi", reason="this Python came without its own tests")
    taken = """
import _testcapi
while True:
    try:
        _testcapi.add_dict_watcher(0)
    except RuntimeError:
        break
"""

    assert "WARNING kernel.not_loaded\nFalse hygiene.kernel.pure\n" == run(taken + LOGGED + WHICH)


def test_an_entry_takes_eighty_bytes_beside_the_dict(compiled: ModuleType, build: Callable[..., Any]) -> None:
    """``sys.getsizeof`` counts what the kernel has beside a dict's own table, and that is little."""
    for times in ({}, {"timer": float, "written": True}):
        kernel = build(compiled, **times)
        for number in range(10_000):
            kernel[number] = None
        beside = sys.getsizeof(kernel) - sys.getsizeof(dict.copy(kernel))

        assert 40 * 10_000 < beside <= 80 * 10_000 + 500


WRITE = """
import pickle, sys, hygiene
r = hygiene.Registry({1: 'a', (2, 'x'): 'b', 'c': [3]}, maxsize=3, name='chats')
r.get(1)
with open(sys.argv[1], 'wb') as file:
    pickle.dump(r, file, int(sys.argv[2]))
print(hygiene.compiled)
"""
READ = """
import copy, pickle, sys, hygiene
with open(sys.argv[1], 'rb') as file:
    r = pickle.load(file)
print(hygiene.compiled, type(r).__name__, r)
for one in (r, copy.copy(r), copy.deepcopy(r), r.copy()):
    one['d'] = one['e'] = 4
    assert len(one) == 3 and one['d'] == 4, one
    one.trim(0)
    assert not one
"""


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("written_by_pure", [False, True])
def test_a_pickle_of_one_body_is_read_by_the_other(
    run: Callable[..., str], compiled: ModuleType, tmp_path: Path, protocol: int, written_by_pure: bool
) -> None:
    """Entries, limits and bound survive a change of the body, and copies keep theirs."""
    file = tmp_path / "registry.pickle"

    assert f"{not written_by_pure}\n" == run(WRITE, file, protocol, pure=written_by_pure)
    output = run(READ, file, pure=not written_by_pure)

    assert f"{written_by_pure} Registry {{1: 'a', (2, 'x'): 'b', 'c': [3]}}\n" == output


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_a_registry_of_its_own(run: Callable[..., str], pure: bool) -> None:
    """Both go on with the same entries, and neither sees what the other does."""
    output = run(
        "import os, hygiene\n"
        "r = hygiene.Registry({n: n for n in range(1000)}, maxsize=1000)\n"
        "child = os.fork()\n"
        "for n in range(2000 if child else 3000):\n"
        "    r[str(n)] = n\n"
        "assert len(r) == 1000\n"
        "r.trim(0)\n"
        "if not child:\n"
        "    os._exit(len(r))\n"
        "print(os.waitpid(child, 0)[1], len(r))\n",
        pure=pure,
    )

    assert "0 0\n" == output
