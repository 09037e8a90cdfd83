"""The commands: what they take, what they print. Numbers go to standard output, all else to standard error."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hygiene.cli import sizes
from hygiene.cli.logs import InputError, Log
from hygiene.cli.replay import Comparison, Job, compare
from hygiene.cli.run import USAGE
from hygiene.cli.run import main as run_script
from hygiene.units import seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DEMO", "app"]

DEMO = Job(path=None, maxsize=500, idle=8 * 3_600.0, history=50)
"""Limits that all have a part in it: by day more people come than 500, at night those of the day go idle."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="See what a bound does to real traffic, choose its numbers, apply it to a script.",
)

LogFile = Annotated[str, typer.Argument(metavar="FILE", help="A log of messages: JSON lines, plain or gzip.")]
Key = Annotated[str, typer.Option(help="The field that tells conversations apart.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
HtmlFile = Annotated[str | None, typer.Option(metavar="FILE", help="Write a page with both memory curves.")]


@app.command()
def replay(
    file: LogFile,
    key: Key = "user",
    maxsize: Annotated[int, typer.Option(min=1, help="Conversations held at most.")] = 500,
    idle: Annotated[
        str | None, typer.Option(help="Drop a conversation unused for so long in the log's own time: 90s, 30m, 2h, 1d.")
    ] = None,
    history: Annotated[int | None, typer.Option(min=1, help="Messages held of each conversation at most.")] = None,
    as_json: AsJson = False,
    html: HtmlFile = None,
) -> None:
    """Replay a log through a chat bot, once as it is and once bounded, and compare their memory."""
    with _told():
        limit = _idle(idle)
        # Both are looked at now: nobody wants to hear about a typing error after a minute of work.
        Log(file, key=key)
        _check_writable(html)
        job = Job(path=str(Path(file).absolute()), key=key, maxsize=maxsize, idle=limit, history=history)
        comparison = _compare(job)
        _show(comparison, as_json=as_json, html=html, source=Path(file).name)


@app.command()
def size(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A log of messages, or a trace with one key a line; plain or gzip.")
    ],
    key: Key = "user",
    as_json: AsJson = False,
) -> None:
    """Read a log once, print hit ratio and memory for a range of limits, and recommend: how to choose the numbers."""
    with _told():
        log = Log(file, key=key, allow_trace=True)
        with _progress() as progress:
            task = progress.add_task("reading", total=1.0)
            sizing = sizes.choose(log, lambda done: progress.update(task, completed=done))
        if as_json:
            print(msgspec.json.encode(sizing).decode())
        else:
            _print_sizing(sizing)
        _print_skipped(sizing)


@app.command()
def demo(as_json: AsJson = False, html: HtmlFile = None) -> None:
    """Replay a week of made-up traffic, no log needed: more and more users, most of whom never come back."""
    with _told():
        _check_writable(html)
        comparison = _compare(DEMO)
        _show(comparison, as_json=as_json, html=html, source="a week of made-up traffic")


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="[--config FILE]",
    epilog=USAGE,
)
def run(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[-m MODULE | SCRIPT] [ARGS]...")] = None,
) -> None:
    """Run a script with the guards of a TOML file, without changing it."""
    raise typer.Exit(run_script(arguments or []))


@contextmanager
def _told() -> Iterator[None]:
    """What the user can mend is told in one sentence, with the exit code of a wrong call."""
    try:
        yield
    except InputError as problem:
        print(f"hygiene: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None


def _idle(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return seconds(text, "--idle")
    except ValueError as problem:
        raise InputError(str(problem)) from problem


def _check_writable(html: str | None) -> None:
    if html is None:
        return
    page = Path(html)
    if page.is_dir() or not os.access(page if page.exists() else page.absolute().parent, os.W_OK):
        raise InputError(
            f"wanted a place for the page, found that '{html}' cannot be written. Name a file in a folder that exists"
        )


def _progress() -> Progress:
    # On standard error, and only for eyes: standard output is for the numbers.
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _compare(job: Job) -> Comparison:
    with _progress() as progress:
        tasks = {"plain": progress.add_task("as it is", total=1.0), "bounded": progress.add_task("bounded ", total=1.0)}

        def update(which: str, done: float) -> None:
            if which == "bounded":
                progress.update(tasks["plain"], completed=1.0)
            progress.update(tasks[which], completed=done)

        return compare(job, update)


def _show(comparison: Comparison, *, as_json: bool, html: str | None, source: str) -> None:
    rows = _rows(comparison)
    if html is not None:
        # Loaded only when asked for: drawing takes longer to import than everything else here together.
        from hygiene.cli.html import page

        Path(html).write_text(page(comparison, rows, source), encoding="utf-8")
    if as_json:
        print(msgspec.json.encode(comparison).decode())
    else:
        _print_comparison(comparison, rows, source)
    _print_skipped(comparison)
    if html is not None:
        print(f"Both memory curves: {html}", file=sys.stderr)


def _rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    plain, bounded = comparison.plain, comparison.bounded

    def count(name: str, read: str) -> tuple[str, str, str]:
        return name, f"{getattr(plain, read):,.0f}", f"{getattr(bounded, read):,.0f}"

    def memory(name: str, read: str) -> tuple[str, str, str]:
        return name, f"{getattr(plain, read) / 2**20:,.1f} MiB", f"{getattr(bounded, read) / 2**20:,.1f} MiB"

    return [
        count("conversations held", "held"),
        count("most held at once", "max_held"),
        memory("memory at the start", "start_rss"),
        memory("peak memory", "peak_rss"),
        memory("memory at the end", "final_rss"),
        count("hits", "hits"),
        count("misses", "misses"),
        *((f"left: {_CAUSES.get(cause, cause)}", "-", f"{left:,}") for cause, left in bounded.evictions.items()),
        count("messages a second", "rate"),
    ]


_CAUSES = {"size": "beyond maxsize", "idle": "idle too long"}


def _print_decorator(maxsize: int, idle: float | None, history: int | None = None) -> None:
    """The lines to copy; not through rich, which would break them."""
    limits = [f"maxsize={maxsize}"]
    if idle is not None:
        limits.append(f'idle="{sizes.duration(idle)}"')
    if history is not None:
        limits.append(f"values=partial(History, maxlen={history})")
        print("  from functools import partial")
    print(f"  from hygiene import {'History, ' if history is not None else ''}bounded_registry\n")
    print(f'  @bounded_registry("conversations", {", ".join(limits)})')


def _print_comparison(comparison: Comparison, rows: list[tuple[str, str, str]], source: str) -> None:
    table = Table(title=f"{comparison.messages:,} messages: {escape(source)}", title_justify="left")
    table.add_column("")
    table.add_column("as it is", justify="right", style="red")
    table.add_column("bounded", justify="right", style="green")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    plain, bounded = comparison.plain, comparison.bounded
    lost = plain.hits - bounded.hits
    for line in (
        (
            f"What to read in it: as it is, the bot grew from {_mib(plain.start_rss)} to {_mib(plain.peak_rss)}; "
            f"bounded, from {_mib(bounded.start_rss)} to {_mib(bounded.peak_rss)}."
        ),
        f"The price: {lost:,} of {comparison.messages:,} messages found their conversation gone and started a new one.",
        "To copy, above the class:",
    ):
        console.print(line, highlight=False)
    _print_decorator(comparison.maxsize, comparison.idle, comparison.history)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _print_skipped(reading: Comparison | sizes.Sizing) -> None:
    if reading.skipped:
        print(f"{reading.skipped:,} of {reading.lines:,} lines could not be used and were left out:", file=sys.stderr)
        for broken in reading.first_skipped:
            print(f"  line {broken.line}: {broken.why}", file=sys.stderr)
        if reading.skipped > len(reading.first_skipped):
            print(f"  ... and {reading.skipped - len(reading.first_skipped):,} more", file=sys.stderr)
    if reading.out_of_order:
        late = f"{reading.out_of_order:,} messages were older than one before them and counted as just as late."
        print(late, file=sys.stderr)


_SHOWN_IDLES = 5


def _print_sizing(sizing: sizes.Sizing) -> None:
    console = Console()
    best = sizing.recommended
    idles = _shown({choice.idle for choice in sizing.choices if choice.idle is not None}, best.idle)
    console.print(
        f"{sizing.accesses:,} accesses, {sizing.keys:,} keys: at best {sizing.best_hit_ratio:.1%} can hit, "
        "because the first access to a key never does.",
        highlight=False,
    )
    table = Table(title="Hit ratio" + (", by idle limit" if idles else ""), title_justify="left")
    table.add_column("maxsize", justify="right")
    table.add_column("memory", justify="right")
    table.add_column("no idle" if idles else "hit ratio", justify="right")
    for idle in idles:
        table.add_column(sizes.duration(idle), justify="right")
    ratios = {(choice.maxsize, choice.idle): choice for choice in sizing.choices}
    for maxsize in sorted({choice.maxsize for choice in sizing.choices}):
        row = [ratios[maxsize, idle] for idle in (None, *idles)]
        cells = [
            f"[bold green]{choice.hit_ratio:.1%}[/]" if choice == best else f"{choice.hit_ratio:.1%}" for choice in row
        ]
        name = f"[bold green]{maxsize:,}[/]" if maxsize == best.maxsize else f"{maxsize:,}"
        table.add_row(name, _amount(row[0].memory), *cells)
    console.print(table)
    console.print(f"Memory: {sizing.bytes_an_entry:,} bytes an entry, estimated: {sizing.measured}.", highlight=False)
    if not sizing.has_time:
        console.print("The log has no time, so nothing can be said about idle limits.", highlight=False)
    limits = f"maxsize={best.maxsize}" + (f', idle="{sizes.duration(best.idle)}"' if best.idle is not None else "")
    console.print(
        f"Recommended: {limits}: {best.hit_ratio:.1%} hits with at most {best.most_held:,} entries, "
        f"{_amount(best.memory)}.",
        highlight=False,
    )
    console.print(f"The rule: {sizing.rule}.", highlight=False)
    _print_decorator(best.maxsize, best.idle)


def _shown(idles: set[float], recommended: float | None) -> list[float]:
    """As many limits as fit beside each other: evenly spread, the recommended one among them."""
    every = sorted(idles)
    if len(every) <= _SHOWN_IDLES:
        return every
    spread = {every[round(index * (len(every) - 1) / (_SHOWN_IDLES - 2))] for index in range(_SHOWN_IDLES - 1)}
    return sorted(spread | ({recommended} if recommended is not None else {every[len(every) // 2]}))


def _amount(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
