"""The commands: what they take, what they print. Numbers go to standard output, all else to standard error."""

from __future__ import annotations

import os
import sys
import time
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
from hygiene.cli.kill import Demonstration, kill
from hygiene.cli.ledger import Kept, opened
from hygiene.cli.logs import InputError, Log
from hygiene.cli.replay import Comparison, Job, compare
from hygiene.cli.run import USAGE
from hygiene.cli.run import main as run_script
from hygiene.cli.watch import USAGE as WATCH_USAGE
from hygiene.cli.watch import main as watch_program
from hygiene.text import json_printable, plural, printable
from hygiene.units import seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hygiene.cli.contents import Contents

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
    store: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Keep what leaves in a store, such as sqlite:chats.db.")
    ] = None,
    as_json: AsJson = False,
    html: HtmlFile = None,
) -> None:
    """Replay a log through a chat bot, once as it is and once bounded, and compare their memory."""
    with _told():
        limit = _idle(idle)
        # Both are looked at now: nobody wants to hear about a typing error after a minute of work.
        Log(file, key=key)
        _check_writable(html)
        if store is not None:
            with opened(store):
                pass
        job = Job(path=str(Path(file).absolute()), key=key, maxsize=maxsize, idle=limit, history=history, store=store)
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
            _print_json(sizing)
        else:
            _print_sizing(sizing)
        _print_skipped(sizing)


@app.command()
def demo(as_json: AsJson = False, html: HtmlFile = None) -> None:
    """Replay a week of made-up traffic, then kill a bot in the middle of its work and look what its store has."""
    with _told():
        _check_writable(html)
        comparison = _compare(DEMO)
        with _progress() as progress:
            task = progress.add_task("killed  ", total=1.0)
            killed = kill(lambda done: progress.update(task, completed=done))
        shown = Demonstration(**msgspec.structs.asdict(comparison), killed=killed)
        _show(shown, as_json=as_json, html=html, source="a week of made-up traffic")
        if not killed.whole:
            raise typer.Exit(1)


@app.command()
def inspect(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="A file, or sqlite:FILE, redis://HOST, postgresql://HOST/DATABASE.")
    ],
    space: Annotated[str | None, typer.Option(help="Only this space.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Entries shown, the largest first.")] = 20,
    export: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write all entries to a new file, a line of JSON each.")
    ] = None,
    codec: Annotated[
        str, typer.Option(help="msgpack; or pickle, if you trust whoever can write to the store.")
    ] = "msgpack",
    as_json: AsJson = False,
) -> None:
    """Look into a store: conversations, sizes, ages, quarantine. A file is left as it is, whoever writes to it."""
    from hygiene.cli import contents

    with _told(), contents.opened(address, codec) as store:
        found = contents.look(store, space, limit)
        exported = None if export is None else contents.export(store, export, space)
        if as_json:
            _print_json(found)
        else:
            _print_contents(found)
        if exported is None:
            return
        _print_error(f"{plural(exported.entries, 'entry', 'entries')}: {export}")
        for why in exported.left_out:
            _print_error(f"  {why}")
        if exported.left_out:
            raise InputError(
                f"wanted every entry in '{export}', found {len(exported.left_out):,} that could not be written. "
                f"They are named above, and all others are in it"
            )


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


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    options_metavar="[--interval TIME] [--every TIME]",
    epilog=WATCH_USAGE,
)
def watch(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[SCRIPT | [-m] MODULE] [ARGS]...")] = None,
) -> None:
    """Run a program and name the containers in it that grow, with the line that would bound each."""
    raise typer.Exit(watch_program(arguments or []))


@app.command()
def top(
    process: Annotated[
        str | None, typer.Argument(metavar="[PID|PATH]", help="Its number, or its socket; nothing: list them.")
    ] = None,
    every: Annotated[str, typer.Option(help="Time between two looks: 500ms, 2s.")] = "1s",
    once: Annotated[bool, typer.Option("--once", help="Print one picture, and end.")] = False,
) -> None:
    """Watch what a running process holds; it has to call hygiene.expose()."""
    from hygiene.cli.top import main

    with _told():
        try:
            span = seconds(every, "--every")
        except ValueError as problem:
            raise InputError(str(problem)) from problem
        main(process, every=span, once=once)


@contextmanager
def _told() -> Iterator[None]:
    """What the user can mend is told in one sentence, with the exit code of a wrong call."""
    try:
        yield
    except InputError as problem:
        _print_error(f"hygiene: {problem}")
        raise typer.Exit(2) from None


def _print_error(text: str) -> None:
    print(printable(text, lines=True), file=sys.stderr)


def _print_json(value: object) -> None:
    print(json_printable(msgspec.json.encode(value).decode()))


def _cell(text: str) -> str:
    """Text from a store, a log or a file name, for a table or a line of rich: neither markup nor control characters."""
    return escape(printable(text))


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
        names = {"plain": "as it is", "bounded": "bounded "}
        if job.store is not None:
            names["kept"] = "reading the store back"
        tasks = {which: progress.add_task(name, total=1.0) for which, name in names.items()}

        def update(which: str, done: float) -> None:
            order = list(tasks)
            for before in order[: order.index(which)]:
                progress.update(tasks[before], completed=1.0)
            progress.update(tasks[which], completed=done)

        return compare(job, update)


def _show(comparison: Comparison, *, as_json: bool, html: str | None, source: str) -> None:
    rows = _rows(comparison)
    if html is not None:
        # Loaded only when asked for: drawing takes longer to import than everything else here together.
        from hygiene.cli.html import page

        Path(html).write_text(page(comparison, rows, source, _said(comparison)[1:]), encoding="utf-8")
    if as_json:
        _print_json(comparison)
    else:
        _print_comparison(comparison, rows, source)
    _print_skipped(comparison)
    if html is not None:
        _print_error(f"Both memory curves: {html}")


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
        *(_stored(comparison.kept) if comparison.kept is not None else ()),
        count("messages a second", "rate"),
    ]


def _stored(kept: Kept) -> list[tuple[str, str, str]]:
    return [
        ("came back from the store", "-", f"{kept.rehydrated:,}"),
        ("saved to the store", "-", f"{kept.saved:,}"),
        ("in transactions", "-", f"{kept.saves:,}"),
        ("size of the store", "-", f"{kept.size / 2**20:,.1f} MiB"),
    ]


_CAUSES = {"size": "beyond maxsize", "idle": "idle too long"}


def _print_decorator(maxsize: int, idle: float | None, history: int | None = None, store: str | None = None) -> None:
    """The lines to copy; not through rich, which would break them."""
    limits = [f"maxsize={maxsize}"]
    if idle is not None:
        limits.append(f'idle="{sizes.duration(idle)}"')
    if history is not None:
        limits.append(f"values=partial(History, maxlen={history})")
        print("  from functools import partial")
    if store is not None:
        limits.append(f'store="{printable(store)}"')
    print(f"  from hygiene import {'History, ' if history is not None else ''}bounded_registry\n")
    print(f'  @bounded_registry("conversations", {", ".join(limits)})')


def _print_comparison(comparison: Comparison, rows: list[tuple[str, str, str]], source: str) -> None:
    table = Table(title=f"{plural(comparison.messages, 'message')}: {_cell(source)}", title_justify="left")
    table.add_column("", overflow="fold")
    table.add_column("as it is", justify="right", style="red", overflow="fold")
    table.add_column("bounded", justify="right", style="green", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for line in (*_said(comparison), "To copy, above the class:"):
        console.print(printable(line), highlight=False, markup=False)
    kept = comparison.kept
    _print_decorator(
        comparison.maxsize, comparison.idle, comparison.history, kept.address if kept is not None else None
    )


def _said(comparison: Comparison) -> list[str]:
    """What the numbers mean, a sentence each."""
    plain, bounded, kept = comparison.plain, comparison.bounded, comparison.kept
    said = [
        (
            f"What to read in it: as it is, the bot grew from {_mib(plain.start_rss)} to {_mib(plain.peak_rss)}; "
            f"bounded, from {_mib(bounded.start_rss)} to {_mib(bounded.peak_rss)}."
        )
    ]
    if kept is None:
        lost = plain.hits - bounded.hits
        said.append(
            f"The price: {lost:,} of {comparison.messages:,} messages found their conversation gone and started a new "
            "one."
        )
    else:
        said += [
            (
                f"The price: {kept.rehydrated:,} of {comparison.messages:,} messages waited until their conversation "
                "was loaded from the store."
            ),
            f"Nothing is lost: {kept.sentence}",
        ]
    more = (bounded.seconds - plain.seconds) / max(comparison.messages, 1) * 1e6
    if more >= 0.5:  # noqa: PLR2004 - what is shown is at least 1
        said.append(f"And {more:,.0f} µs of time for each message.")
    if isinstance(comparison, Demonstration):
        said.append(f"With a store, kill -9 in the middle: a bot was {comparison.killed.sentence}")
    return said


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _print_skipped(reading: Comparison | sizes.Sizing) -> None:
    if reading.skipped:
        were = "line could not be used and was" if reading.skipped == 1 else "lines could not be used and were"
        _print_error(f"{reading.skipped:,} of {reading.lines:,} {were} left out:")
        for broken in reading.first_skipped:
            _print_error(f"  line {broken.line}: {broken.why}")
        if reading.skipped > len(reading.first_skipped):
            _print_error(f"  ... and {reading.skipped - len(reading.first_skipped):,} more")
    if reading.out_of_order:
        were = "message was" if reading.out_of_order == 1 else "messages were"
        _print_error(f"{reading.out_of_order:,} {were} older than one before and counted as just as late.")


_SHOWN_IDLES = 5
_OTHER_COLUMNS = 34  # characters that maxsize, memory and the ratio without an idle limit take
_IDLE_COLUMN = 8


def _print_sizing(sizing: sizes.Sizing) -> None:
    console = Console()
    best = sizing.recommended
    most = min(_SHOWN_IDLES, max(console.width - _OTHER_COLUMNS, 0) // _IDLE_COLUMN)
    idles = _shown({choice.idle for choice in sizing.choices if choice.idle is not None}, best.idle, most)
    console.print(
        f"{plural(sizing.accesses, 'access', 'accesses')}, {plural(sizing.keys, 'key')}: "
        f"at best {sizing.best_hit_ratio:.1%} can hit, because the first access to a key never does.",
        highlight=False,
    )
    table = Table(title="Hit ratio" + (", by idle limit" if idles else ""), title_justify="left")
    # Without "fold", a cell that does not fit ends in a character that an ASCII terminal does not have.
    table.add_column("maxsize", justify="right", overflow="fold")
    table.add_column("memory", justify="right", overflow="fold")
    table.add_column("no idle" if idles else "hit ratio", justify="right", overflow="fold")
    for idle in idles:
        table.add_column(sizes.duration(idle), justify="right", overflow="fold")
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
        f"Recommended: {limits}: {best.hit_ratio:.1%} hits with at most {plural(best.most_held, 'entry', 'entries')}, "
        f"{_amount(best.memory)}.",
        highlight=False,
    )
    console.print(f"The rule: {sizing.rule}.", highlight=False)
    _print_decorator(best.maxsize, best.idle)


_UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "m"), (0.0, "s"))


def _about(span: float) -> str:
    """Seconds, roughly, in the unit that people would use."""
    size, unit = next((size, unit) for size, unit in _UNITS if span >= size)
    return f"{span / (size or 1.0):,.0f} {unit}"


def _size(size: int) -> str:
    return _amount(size) if size >= 2**10 else plural(size, "byte")


def _print_contents(found: Contents) -> None:
    from hygiene.cli.contents import restored, shown

    console = Console()
    now = time.time()
    sums = Table(title=_cell(found.store), title_justify="left")
    for name in ("space", "entries", "items", "size"):
        sums.add_column(name, justify="left" if name == "space" else "right", overflow="fold")
    for space in found.spaces:
        sums.add_row(_cell(space.name), f"{space.entries:,}", f"{space.items:,}", _size(space.bytes))
    console.print(sums)
    if found.entries:
        table = Table(title="The largest", title_justify="left")
        for name in ("space", "key", "kind", "items", "size", "saved", "expires"):
            table.add_column(name, justify="left" if name in {"space", "key", "kind"} else "right", overflow="fold")
        for entry in found.entries:
            table.add_row(
                _cell(entry.space),
                _cell(shown(restored(entry.key))),
                entry.kind,
                f"{entry.items:,}",
                _size(entry.bytes),
                f"{_about(entry.age)} ago",
                "never" if entry.expire_at is None else f"in {_about(max(0.0, entry.expire_at - now))}",
            )
        console.print(table)
    rows = "1 row" if found.quarantined == 1 else f"{found.quarantined:,} rows"
    console.print(f"In quarantine: {rows if found.quarantined else 'nothing'}.", highlight=False)
    for row in found.quarantine[:_SHOWN_ROWS]:
        whose = "of nobody known" if row.space is None else f"of {shown(restored(row.key))} in {row.space!r}"
        item = "" if row.sequence is None else f", item {row.sequence}"
        when = _about(max(0.0, now - row.found_at))
        console.print(
            f"  {_cell(row.problem)}: {plural(row.bytes, 'byte')} {_cell(whose)}{item}, {when} ago", highlight=False
        )
    if found.damaged:
        told = f"Damaged, and not in quarantine yet: {len(found.damaged):,}. A program that opens the store sees to it."
        console.print(told, style="red", highlight=False)
        for line in found.damaged[:_SHOWN_ROWS]:
            console.print(f"  {_cell(line)}", highlight=False)


_SHOWN_ROWS = 5


def _shown(idles: set[float], recommended: float | None, most: int) -> list[float]:
    """At most *most* limits, which fit on the screen: evenly spread, the recommended one among them."""
    every = sorted(idles)
    if len(every) <= most:
        return every
    if most <= 2:  # noqa: PLR2004 - too few to spread
        return [] if recommended is None or not most else [recommended]
    spread = {every[round(index * (len(every) - 1) / (most - 2))] for index in range(most - 1)}
    return sorted(spread | ({recommended} if recommended is not None else {every[len(every) // 2]}))


def _amount(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
