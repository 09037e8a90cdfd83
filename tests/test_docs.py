"""Every code block of the README and of the documentation runs, top to bottom, as a reader would paste it.

Each document is a module of its own and starts in an empty working directory. A block that cannot run says
why, in a comment on the line above: `<!-- skip: next "needs a bot token" -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import SkipTest

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parent.parent
# They run commands and servers for seconds.
SLOW = {"docs/how-to/find-the-leak.md", "docs/tutorial.md", "docs/how-to/survive-a-restart.md"}
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


def run(path: Path, name: str) -> None:
    """Run the blocks of the document at *path* as the module *name*."""
    sybil = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(path.parent), pattern=path.name)
    document = sybil.parse(path)
    document.namespace = vars(sys.modules[name])
    for block in document.examples():
        try:
            block.evaluate()
        except SkipTest:
            continue  # says why, or the next test fails


def odd(text: str) -> list[str]:
    """Lines of *text* that keep Python code from running, or from being seen, without saying why."""
    python = re.compile(r"^[\s>]*(?:`{3,}|~{3,})\s*\{?\s*\.?py", re.IGNORECASE)
    skip = re.compile(r"^\s*<!--+\s*;?\s*skip\b")
    return [
        line
        for line in text.splitlines()
        if (python.match(line) and not re.fullmatch(r"\s*`{3,}python", line))
        or (skip.match(line) and not re.fullmatch(r'\s*<!-- skip: next "[^"]{8,}" -->', line))
    ]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of an empty module to run a document in; what it writes to its folder it can import, as a script can."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    document = ModuleType("document")
    del document.__spec__  # since 3.15 a traceback asks a module that has one for its loader
    monkeypatch.setitem(sys.modules, "document", document)
    yield "document"
    written = [name for name, found in sys.modules.items() if str(tmp_path) in (getattr(found, "__file__", "") or "")]
    for name in written:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in DOCUMENTS]
)
def test_each_block_runs(name: str, module: str) -> None:
    """What the documentation shows works."""
    run(ROOT / name, module)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_block_is_passed_over_in_silence(name: str) -> None:
    """A block is fenced as plain `python`, or it says why it does not run."""
    assert [] == odd((ROOT / name).read_text())


def test_each_page_with_a_store_shows_the_signal_handlers() -> None:
    """Without them SIGTERM, which stops every deployment, loses what is unsaved."""
    pages = [name for name in DOCUMENTS if "store=" in (ROOT / name).read_text()]
    explained = {"docs/design.md", "docs/performance.md"}  # how it works inside, and how it was measured

    assert {"README.md", "docs/tutorial.md", "docs/index.md"} < set(pages)
    assert [] == [
        name for name in pages if name not in explained and "install_signal_handlers" not in (ROOT / name).read_text()
    ]


def test_a_wrong_block_is_told_with_its_line(tmp_path: Path, module: str) -> None:
    """Blocks share one module, and the one that fails is named."""
    document = tmp_path / "wrong.md"
    document.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")

    with pytest.raises(AssertionError) as caught:
        run(document, module)

    assert 6 == caught.traceback[-1].lineno + 1


def test_a_skipped_block_does_not_run(tmp_path: Path, module: str) -> None:
    """Only the block right after the comment is skipped."""
    document = tmp_path / "skip.md"
    document.write_text(
        '<!-- skip: next "needs a token" -->\n```python\n1 / 0\n```\n\n```python\nran = __name__\n```\n'
    )

    run(document, module)

    assert "document" == sys.modules[module].ran  # type: ignore[attr-defined]  # the block set it


@pytest.mark.parametrize(
    "line",
    [
        "```py",
        "``` python",
        '```python title="bot.py"',
        "~~~python",
        "```pycon",
        "<!-- skip: next -->",
        "<!-- skip: start -->",
    ],
)
def test_a_block_that_nobody_would_run_is_refused(line: str) -> None:
    """A fence that is no plain `python`, and a skip without a reason, are found."""
    assert [line] == odd(f"Some text.\n\n{line}\n1 / 0\n```\n")
