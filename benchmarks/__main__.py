"""``python -m benchmarks registries`` (or ``pools``, ``memory``, ...): measure, and say which promises hold."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.registries import Report, Row

__all__ = ["SUITES", "main"]

SUITES: dict[str, tuple[str, ...]] = {  # each a module here, and the packages whose versions matter to it
    "registries": ("cachetools", "cachebox", "lru-dict", "expiringdict", "theine"),
    "pools": ("SQLAlchemy", "psycopg", "psycopg-pool", "DBUtils", "asyncpg", "anyio"),
    "sessions": (),
    "stores": ("diskcache", "sqlitedict", "langgraph-checkpoint-sqlite", "redis", "msgspec"),
    "memory": ("psutil", "Pympler", "objgraph"),
    "soak": (),
}


def main(arguments: Sequence[str] | None = None, sizes: object = None) -> int:
    """
    Run what the command line asks for.

    Args:
        arguments: The command line without the program's name; ``sys.argv`` if not given.
        sizes: Measure this much (the suite's ``Sizes``), whatever the command line says.

    Returns:
        The exit code: 0 however the measurements came out; a busy machine is no error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure hygiene beside what others offer."
    )
    parser.add_argument("suite", choices=list(SUITES), help="what to measure")
    parser.add_argument("--quick", action="store_true", help="fewer of everything: registries take a minute, not ten")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown, with ratios only")
    parser.add_argument("--minutes", type=float, metavar="N", help="soak: for how long; 10, or with --quick 20 seconds")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="soak: draw the memory curves into FILE, an SVG")
    options = parser.parse_args(arguments)
    if options.suite != "soak" and (options.minutes is not None or options.chart is not None):
        parser.error(f"--minutes and --chart are for soak; {options.suite} takes as long as it takes")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be positive; found {options.minutes:g}")
    suite = importlib.import_module(f"benchmarks.{options.suite}")  # the contenders of the others stay outside
    chosen = sizes or (suite.QUICK if options.quick else suite.FULL)
    if options.minutes is not None:
        chosen = replace(cast("Any", chosen), seconds=options.minutes * 60)
    report = suite.run(chosen, lambda what: print(f"... {what}", file=sys.stderr))
    for line in markdown(report) if options.markdown else text(report):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(report, SUITES[options.suite]), indent=1) + "\n")
    if options.chart is not None:
        options.chart.write_text(suite.chart(report))
    return 0


def shown(row: Row) -> str:
    """The measured value, as far as it means something."""
    if row.value is None:
        return "-"
    digits = 2 if row.unit == "x" or (row.unit == "%" and abs(row.value) < 10) else 0  # noqa: PLR2004 - two figures
    return f"{row.value:,.{digits}f} {row.unit}".rstrip()


def promised(row: Row) -> str:
    """The limit, in words."""
    if row.limit is None:
        return ""
    return f"{'at least' if row.at_least else 'at most'} {row.limit:g}"


def verdict(row: Row) -> str:
    """Whether the limit is kept."""
    return {None: "", True: "met", False: "NOT MET"}[row.met]


def text(report: Report) -> Iterator[str]:
    """The report for a terminal."""
    for what, found in report.nanoseconds.items():
        yield f"\n{what} (ns an operation, and the ratio to {report.base})"
        for name, value in sorted(found.items(), key=lambda pair: pair[1]):
            compared = report.ratios.get(what, {}).get(name)
            yield f"  {name:36} {value:9.1f}" + ("" if compared is None else f" {compared:7.2f}")
    for name, reason in report.absent.items():
        yield f"\nnot measured: {name} ({reason})"
    yield ""
    for row in report.rows:
        limit = "" if row.limit is None else f" ({promised(row)})"
        yield f"{verdict(row):8} {row.what}: {shown(row)}{limit}"
        if row.note:
            yield f"{'':11}{row.note}"


def markdown(report: Report) -> Iterator[str]:
    """The report for the documentation."""
    yield "| what | measured | limit | kept | remarks |"
    yield "| --- | ---: | ---: | --- | --- |"
    for row in report.rows:
        yield f"| {row.what} | {shown(row)} | {promised(row)} | {verdict(row)} | {row.note} |"
    yield ""
    operations = list(report.ratios)
    yield f"| time against {report.base} | {' | '.join(operations)} |"
    yield f"| --- |{' ---: |' * len(operations)}"
    for name in dict.fromkeys(name for ratios in report.ratios.values() for name in ratios):
        cells = [report.ratios[what].get(name) for what in operations]
        yield f"| {name} | {' | '.join('' if cell is None else f'{cell:.2f}' for cell in cells)} |"
    for name in report.absent:
        yield f"| {name} |{' not installed |' * len(operations)}"


def as_json(report: Report, packages: Sequence[str]) -> dict[str, object]:
    """The report for programs, with the versions of *packages*."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions,
        "rows": [{**asdict(row), "met": row.met} for row in report.rows],
        "nanoseconds": report.nanoseconds,
        "ratios": report.ratios,
        "absent": report.absent,
        "curves": getattr(report, "curves", {}),
    }


if __name__ == "__main__":
    sys.exit(main())
