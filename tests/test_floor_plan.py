"""The floor plan: imports point down, and only what is declared is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A module imports from the floors below its own. On an ordered floor it may also import those to its left.
# Nothing else: who imports sideways or up has put something on the wrong floor.
OWNERS = (
    "closing limits janitor waits cleanup pool stores writebehind journal views pins history compact tenure keeping "
    "registry adoption group session"
)
FLOORS = (
    ("ordered", "errors events names units text sizing references logs"),
    ("any order", "kernel recency leasing trend tail"),  # pure: no lock, no I/O, no thread
    ("ordered", OWNERS),
    ("ordered", "decorators guards listeners owning shared memory reporting exposing"),
    ("any order", "cli integrations testing"),  # edges: imported by nobody but the way in
    ("any order", "__main__"),
)
EDGE = 4
EXTRAS = {"stores/redis.py": "redis", "stores/postgres.py": "psycopg"}  # imported by `open_store` when asked for
PLACE = {
    module: (floor, place if order == "ordered" else 0)
    for floor, (order, names) in enumerate(FLOORS)
    for place, module in enumerate(names.split())
}


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of what the code below *node* imports when it runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import in line {child.lineno}: say where it comes from"
            # `from hygiene import units` names a module, `from hygiene.units import seconds` is in one.
            whole = child.module == "hygiene"
            yield from (f"hygiene.{a.name}" if whole else str(child.module) for a in child.names)
        yield from imports(child)


def modules(root: Path) -> Iterator[tuple[str, str, set[str]]]:
    """Path, top module name and imports of each file in the package."""
    for path in sorted((root / "hygiene").rglob("*.py")):
        inner = path.relative_to(root / "hygiene")
        yield str(inner), inner.parts[0].removesuffix(".py"), set(imports(ast.parse(path.read_text())))


@pytest.mark.slow
def test_each_module_stands_on_a_floor(project_root: Path) -> None:
    """A new module has to be given a place before it can be imported."""
    homeless = {module for _, module, _ in modules(project_root)} - {*PLACE, "__init__"}

    assert set() == homeless


@pytest.mark.slow
def test_imports_point_down(project_root: Path) -> None:
    """No module imports from its own floor (but where the order is given) or from one above."""
    wrong = []
    for path, module, names in modules(project_root):
        # The package itself re-exports everything below the edges.
        here = (EDGE, 0) if module == "__init__" else PLACE.get(module, (-1, 0))
        for name in names:
            top, _, inner = name.partition(".")
            target = inner.partition(".")[0]
            if top == "hygiene" and target != module and not PLACE.get(target, (EDGE, 0)) < here:
                wrong.append(f"{path} imports {name}")

    assert [] == wrong


@pytest.mark.slow
def test_the_core_imports_only_what_it_declares(project_root: Path) -> None:
    """An installation without extras can import everything below the edges."""
    declared = tomllib.loads((project_root / "pyproject.toml").read_text())["project"]["dependencies"]
    newer = {"annotationlib"}  # Python's own since 3.14
    allowed = {"hygiene", *sys.stdlib_module_names, *newer, *(re.split(r"\W", need)[0] for need in declared)}
    wrong = [
        f"{path} imports {name}"
        for path, module, names in modules(project_root)
        if PLACE.get(module, (0, 0)) < (EDGE, 0)
        for name in sorted(names)
        if name.partition(".")[0] not in {*allowed, EXTRAS.get(path)}
    ]

    assert [] == wrong


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import hygiene.cli", ["hygiene.cli"]),
        ("from hygiene import units", ["hygiene.units"]),
        ("def f():\n    from hygiene.units import seconds", ["hygiene.units"]),
        ("if TYPE_CHECKING:\n    import rich\nelse:\n    import psutil", []),
    ],
)
def test_imports_are_seen_wherever_they_stand(code: str, expected: list[str]) -> None:
    """An import inside a function counts, one for the type checker does not."""
    assert expected == list(imports(ast.parse(code)))
