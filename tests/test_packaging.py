"""The compiled kernel is in a wheel where it can be compiled, and its absence never keeps anybody from installing.

What is compiled here is a kernel of one line: it takes a second, and the build does not know the difference.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ONE_LINE = "ANSWER = 6 * 7\n"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LIBRARY = f"hygiene/kernel/compiled{SUFFIX}"


@pytest.fixture(scope="module")
def hook(project_root: Path) -> ModuleType:
    """The build hook, imported as hatchling does it: from its path."""
    spec = importlib.util.spec_from_file_location("hatch_build", project_root / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(project_root: Path, tmp_path: Path) -> Path:
    """The project's files that a build reads, with a kernel that is quick to compile."""
    tree = tmp_path / "tree"
    shutil.copytree(
        project_root / "hygiene",
        tree / "hygiene",
        ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.pyd"),
    )
    for name in (".gitignore", "LICENSE", "README.md", "hatch_build.py", "pyproject.toml", "pytest_hygiene.py"):
        shutil.copy(project_root / name, tree)
    (tree / "hygiene/kernel/compiled.pyx").write_text(ONE_LINE)
    return tree


@pytest.fixture
def compiler(hook: ModuleType) -> None:
    """Skips a test on a machine that cannot compile."""
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if reason := hook.unsupported(sys.implementation.name, sys.version_info[:2], free_threaded=free_threaded):
        pytest.skip(reason)
    if reason := hook.missing():
        pytest.skip(reason)


def build(tree: Path, what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a "wheel", an "editable" or an "sdist" from *tree* as pip does, into its folder ``dist``."""
    clean = {name: value for name, value in os.environ.items() if name not in {"HYGIENE_PURE", "HYGIENE_COMPILED"}}
    return subprocess.run(
        [sys.executable, "-c", f"import hatchling.build; hatchling.build.build_{what}('dist')"],
        cwd=tree,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def built(tree: Path) -> tuple[str, set[str]]:
    """Name and content of the one wheel that was built."""
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of a build's output that are ours."""
    return [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("hygiene: ")]


def libraries(tree: Path) -> list[str]:
    """What a compiler left in *tree*: libraries, and C of our own."""
    return sorted(str(path.relative_to(tree)) for end in ("so", "pyd", "c", "o") for path in tree.rglob(f"*.{end}"))


def imported(library: str) -> str:
    """What the kernel of one line says, in a process of its own: this one may have the real kernel."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('hygiene.kernel.compiled', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.ANSWER)\n"
    )
    return subprocess.check_output([sys.executable, "-c", code, library], text=True, timeout=30).strip()


# What keeps the kernel from being compiled, and what is said about it.
OBSTACLES = [
    pytest.param({"CC": "no-such-compiler"}, "no C compiler was found (no-such-compiler)", id="no compiler"),
    pytest.param({"CC": "false"}, "it could not be compiled (the C compiler failed", id="one that fails"),
    pytest.param({"HYGIENE_PURE": "1"}, "HYGIENE_PURE=1 asks for that", id="not wanted"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "reason"), OBSTACLES)
def test_what_cannot_be_compiled_is_one_line_and_a_pure_wheel(
    tree: Path, compiler: None, environment: dict[str, str], reason: str
) -> None:
    """No compiler, a failing one, or the wish for none: the installation succeeds, for any Python."""
    result = build(tree, "wheel", **environment)
    name, content = built(tree)

    assert 0 == result.returncode, result.stderr
    assert "hygiene-0.1.0-py3-none-any.whl" == name
    assert [] == [path for path in content if path.endswith((".so", ".pyd"))]
    assert {"hygiene/registry.py", "hygiene/kernel/__init__.py", "pytest_hygiene.py"} <= content
    (line,) = said(result)
    assert line.startswith(f"hygiene: built without its compiled kernel: {reason}")
    assert line.endswith("; everything works, reads are slower")


@pytest.mark.slow
@pytest.mark.once
def test_a_kernel_that_does_not_compile_is_no_failure(tree: Path, compiler: None) -> None:
    """Not even a mistake in the kernel keeps anybody from installing."""
    (tree / "hygiene/kernel/compiled.pyx").write_text("def broken(:\n")

    result = build(tree, "wheel")

    assert 0 == result.returncode, result.stderr
    assert "hygiene-0.1.0-py3-none-any.whl" == built(tree)[0]
    assert "it could not be compiled (Cython refused it" in said(result)[0]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize(("environment", "reason"), OBSTACLES)
def test_who_builds_for_others_is_told_by_a_failure(
    tree: Path, compiler: None, environment: dict[str, str], reason: str
) -> None:
    """With HYGIENE_COMPILED=1 there is a compiled wheel or none."""
    result = build(tree, "wheel", HYGIENE_COMPILED="1", **environment)

    assert 0 != result.returncode
    assert not list((tree / "dist").glob("*.whl"))
    assert reason.removeprefix("it could not be compiled (") in result.stderr


@pytest.mark.slow
def test_a_compiler_makes_a_wheel_for_this_python(tree: Path, compiler: None, tmp_path: Path) -> None:
    """The wheel has the library, it can be imported, and the tree is as it was."""
    before = sorted(tree.rglob("*"))

    result = build(tree, "wheel", HYGIENE_COMPILED="1")
    name, content = built(tree)
    with zipfile.ZipFile(tree / "dist" / name) as archive:
        library = archive.extract(LIBRARY, tmp_path / "unpacked")
    shutil.rmtree(tree / "dist")
    after = sorted(tree.rglob("*"))

    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert ["hygiene: built with its compiled kernel"] == said(result)
    assert name.startswith(f"hygiene-0.1.0-{version}-{version}-")
    assert {LIBRARY} == {path for path in content if path.endswith((".so", ".pyd"))}
    assert "42" == imported(library)
    assert before == after


@pytest.mark.slow
def test_an_editable_installation_compiles_beside_the_source(tree: Path, compiler: None) -> None:
    """The library lies where Python looks for it, and a build without one takes the old one away."""
    first = build(tree, "editable")
    compiled = libraries(tree)
    second = build(tree, "editable", HYGIENE_PURE="1")

    assert (0, 0) == (first.returncode, second.returncode)
    assert [LIBRARY] == compiled
    assert [] == libraries(tree)


@pytest.mark.slow
def test_a_pure_wheel_leaves_out_what_an_editable_installation_compiled(tree: Path) -> None:
    """A library that lies in the checkout fits one Python, and the wheel is for all."""
    (tree / LIBRARY).write_bytes(b"of another day")

    result = build(tree, "wheel", HYGIENE_PURE="1")

    assert 0 == result.returncode, result.stderr
    assert LIBRARY not in built(tree)[1]


@pytest.mark.slow
def test_a_source_distribution_has_what_it_takes_to_compile_and_nothing_compiled(tree: Path) -> None:
    """Who builds from it compiles the kernel there."""
    (tree / LIBRARY).write_bytes(b"of another day")
    (tree / "hygiene/kernel/compiled.c").write_text("/* generated */")

    result = build(tree, "sdist")
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        content = {name.partition("/")[2] for name in opened.getnames()}

    assert 0 == result.returncode, result.stderr
    assert [] == said(result)
    assert {"hatch_build.py", "hygiene/kernel/compiled.pyx", "pyproject.toml"} <= content
    assert set() == {path for path in content if path.endswith((".so", ".pyd", ".c"))}


@pytest.mark.parametrize(
    ("implementation", "version", "free_threaded", "expected"),
    [
        ("cpython", (3, 11), False, None),
        ("cpython", (3, 15), False, None),
        ("cpython", (3, 15), True, "it relies on the GIL, and this Python has none"),
        ("cpython", (3, 16), False, "it is for Python 3.11 to 3.15, and this is 3.16"),
        ("pypy", (3, 11), False, "it is for CPython, and this is pypy"),
    ],
)
def test_a_python_that_the_kernel_does_not_fit_is_named(
    hook: ModuleType, implementation: str, version: tuple[int, int], free_threaded: bool, expected: str | None
) -> None:
    """The kernel knows the insides of some Pythons; on the others it is not tried."""
    assert expected == hook.unsupported(implementation, version, free_threaded=free_threaded)
