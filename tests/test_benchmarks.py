"""The benchmark runs and says what it is asked for; what it measures is no test's business."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# What was promised: the start of each row that has a limit, in order.
PROMISES = [
    "read hit, against cachetools LRU without a lock",
    "read hit, against it with the lock it needs",
    "ttl read hit",
    "set with eviction, against",
    "set with eviction of objects",
    "Registry: its ratio to a dict",
    "Registry: slowest operation",
    "- without the sets at which a plain dict stalls too",
    "Registry: beyond a dict's own",
    "Registry(ttl): 400 entries expire at once",
    "- with the janitor at work",
    "Registry: 4 threads together",
    "reading an attribute: decorated",
]


@pytest.fixture
def benchmarks(project_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The package, which is beside the library and not installed with it."""
    monkeypatch.syspath_prepend(str(project_root))
    import benchmarks.__main__  # noqa: PLC0415 - not on the path before
    import benchmarks.registries  # noqa: PLC0415

    return benchmarks


@pytest.fixture
def tiny(benchmarks, monkeypatch: pytest.MonkeyPatch):
    """Sizes that take a second; without the contenders that are measured in processes of their own."""
    contenders = benchmarks.contenders.CONTENDERS
    for name in [name for name, contender in contenders.items() if contender.native]:
        monkeypatch.delitem(contenders, name)
    return benchmarks.registries.Sizes(
        rounds=2,
        operations=50,
        small=100,
        large=200,
        single=100,
        repeats=1,
        memory=(100,),
        expiring=400,
        shared=400,
        shared_rounds=1,
        trace_rounds=1,
        trace_requests=200,
    )


def test_every_promise_has_a_row(benchmarks, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A promise is measured and printed, and the same stands in the JSON."""
    file = tmp_path / "found.json"

    code = benchmarks.__main__.main(["registries", "--json", str(file)], tiny)

    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    promises = [row for row in rows if row["limit"] is not None and "difference in hits" not in row["what"]]
    assert 0 == code
    assert len(PROMISES) == len(promises)
    for start, row in zip(PROMISES, promises, strict=True):
        assert row["what"].startswith(start)
        assert row["value"] is not None
        assert row["what"] in printed


def test_the_registry_hits_what_an_exact_lru_hits(benchmarks, tiny, real_data: Path) -> None:
    """On the real traces not one hit is lost or won against cachetools' LRU."""
    report = benchmarks.registries.Report()

    benchmarks.registries.traces(tiny, report)

    differences = [row.value for row in report.rows if "difference in hits" in row.what]
    assert [0] * len(list(real_data.glob("trace_*.txt.gz"))) == differences


def test_the_markdown_table_has_as_many_columns_in_each_line(
    benchmarks, tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--markdown` prints can be pasted into the documentation as it is."""
    benchmarks.__main__.main(["registries", "--markdown"], tiny)

    rows, times = capsys.readouterr().out.strip().split("\n\n")
    for table in (rows, times):
        assert 1 == len({line.count("|") for line in table.splitlines()})


def test_a_contender_that_is_absent_is_named(benchmarks) -> None:
    """A missing package is said, and is no error."""
    report = benchmarks.registries.Report(ratios={"read": {"dict": 1.0}}, absent={"theine": "not there"})

    text = list(benchmarks.__main__.text(report))
    table = list(benchmarks.__main__.markdown(report))

    assert "\nnot measured: theine (not there)" in text
    assert "| theine | not installed |" in table


def test_a_suite_that_does_not_exist_is_refused(benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names what there is."""
    with pytest.raises(SystemExit) as caught:
        benchmarks.__main__.main(["pools"])

    assert 2 == caught.value.code
    assert "'registries'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(0.5, False, True), (1.5, False, False), (0.5, True, False), (1.0, True, True)]
)
def test_a_limit_is_met_from_its_own_side(benchmarks, value: float, at_least: bool, met: bool) -> None:
    """Times have an upper limit, rates a lower one; the limit itself is met."""
    row = benchmarks.registries.Row("what", value, "x", 1.0, at_least=at_least)

    assert met is row.met
