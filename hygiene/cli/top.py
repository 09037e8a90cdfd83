"""A live view of a process that has called `hygiene.expose`: what it holds, and how that changes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hygiene.cli.logs import InputError
from hygiene.exposing import TRIMMING, Frame, Request, Trimmed, ask, exposed
from hygiene.reporting import PoolReport, RegistryReport, Report, WriteBehindReport, _registry_name, _size, _span
from hygiene.text import printable

__all__ = ["View", "main", "sparkline"]

_SAMPLES = 40  # of memory, in the header
_OTHERS = 5  # pools, and stores, that are shown while the registries need the room
_LEAST = 3  # registries that are shown before there is room for anything else
_WIDE = 100  # columns from which on there is room for more of them
_TIMEOUT = 2.0  # seconds in which keys do nothing, if the process does not answer
_NOISE = 0.02  # a row of bars spans this part of its largest value at least, or noise would look like growth
_BARS = "▁▂▃▄▅▆▇█"
_ENTER, _ESCAPE, _BACKSPACE = "\r", "\x1b", "\x7f"
_KEYS = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
_UP, _DOWN = ("\x1b[A", "\x1bOA", "k"), ("\x1b[B", "\x1bOB", "j")

_Row = tuple[RegistryReport, int]

_SORTS: dict[str, Callable[[RegistryReport], Any]] = {
    "entries": lambda one: one.stats.entries,
    "bytes": lambda one: one.stats.bytes or 0,
    "hits": lambda one: one.stats.hits / max(one.stats.hits + one.stats.misses, 1),
    "evicted": lambda one: sum(one.stats.evictions.values()),
    "leased": lambda one: one.stats.leased,
    "name": lambda one: _registry_name(one).lower(),
}


class View:
    """
    What is shown, and what the keys do to it. Draws; asks nobody.

    Args:
        live: Whether somebody sits there: only then is one registry marked, and the keys are told.
    """

    def __init__(self, *, live: bool = True) -> None:
        self._live = live
        self._frame: Frame | None = None
        self._memory: deque[int] = deque(maxlen=_SAMPLES)
        self._before: tuple[float, dict[int, int]] = (0.0, {})
        self._rates: dict[int, float] = {}
        self._sort = "entries"
        self._descending = True
        self._filter = ""
        self._selected: int | None = None
        self._mode = "browse"
        self.message = ""
        """Told in the last line until the next key."""
        self.trouble = ""
        """Told there until the process answers again."""
        self.over = False
        """Whether the user has had enough."""
        self.wanted: tuple[int, str] | None = None
        """The number of a registry that is to be trimmed, and its name: the user has said yes."""

    def show(self, frame: Frame) -> None:
        """Take in what the process has answered."""
        self._frame, self.trouble = frame, ""
        self._memory.append(frame.report.rss)
        then, before = self._before
        evicted = {number: sum(one.stats.evictions.values()) for one, number in _rows(frame)}
        if then:
            span = max(frame.report.at - then, 1e-3)
            self._rates = {
                number: max(count - before[number], 0) / span for number, count in evicted.items() if number in before
            }
        self._before = frame.report.at, evicted

    # Keys

    def press(self, key: str) -> None:
        """Do what *key* means now."""
        self.message = ""
        getattr(self, f"_in_{self._mode}")(key)

    def _in_browse(self, key: str) -> None:
        match key:
            case "q" | "Q":
                self.over = True
            case "s" | "S":
                names = list(_SORTS)
                step = 1 if key == "s" else -1
                self._sort = names[(names.index(self._sort) + step) % len(names)]
                self._descending = self._sort != "name"
            case "r":
                self._descending = not self._descending
            case "/":
                self._mode, self._filter = "filter", ""
            case "\x1b":
                self._filter = ""
            case "t":
                self._ask_to_trim()
            case _ if key in _UP or key in _DOWN:
                self._move(-1 if key in _UP else 1)

    def _in_filter(self, key: str) -> None:
        match key:
            case "\r" | "\n":
                self._mode = "browse"
            case "\x1b":
                self._mode, self._filter = "browse", ""
            case "\x7f" | "\b":
                self._filter = self._filter[:-1]
            case _ if key.isprintable() and len(key) == 1:
                self._filter += key

    def _in_question(self, key: str) -> None:
        self._mode = "browse"
        chosen = self._asked()
        if key in {"y", "Y"} and chosen is not None:
            self.wanted = chosen[1], _clean(_registry_name(chosen[0]))
        else:
            self.message = "nothing was trimmed"

    def _move(self, step: int) -> None:
        numbers = [number for _, number in self._sorted()]
        if numbers:
            place = numbers.index(self._selected) if self._selected in numbers else 0
            self._selected = numbers[min(max(place + step, 0), len(numbers) - 1)]

    def _ask_to_trim(self) -> None:
        if self._frame is None or not self._frame.may_trim:
            self.message = "this process lets nobody trim: it would have to call expose(trim=True)"
        elif self._chosen() is None:
            self.message = "there is no registry to trim"
        else:
            self._selected = self._chosen()[1]  # type: ignore[index]  # and that one it stays, whatever the order
            self._mode = "question"

    def _sorted(self) -> list[_Row]:
        if self._frame is None:
            return []
        wanted = self._filter.lower()
        rows = [row for row in _rows(self._frame) if wanted in f"{_registry_name(row[0])} {row[0].store or ''}".lower()]
        return sorted(rows, key=lambda row: _SORTS[self._sort](row[0]), reverse=self._descending)

    def _asked(self) -> _Row | None:
        """The registry that the question is about, and no other one: it may be gone by now."""
        return next((row for row in self._sorted() if row[1] == self._selected), None)

    def _chosen(self) -> _Row | None:
        rows = self._sorted()
        return next((row for row in rows if row[1] == self._selected), rows[0] if rows else None)

    # Drawing

    def draw(self, width: int, height: int | None) -> RenderableType:
        """
        The whole picture.

        Args:
            width: Columns.
            height: Lines; ``None``: as many as it takes.
        """
        frame = self._frame
        if frame is None:
            return Text("waiting for the process", style="dim")
        report = frame.report
        parts: list[RenderableType] = [self._head(report, frame.started), self._memory_line(report), Text()]
        below = [table for table in (self._pools(report, height), self._writers(report, width, height)) if table]
        rest = [Text(), self._rest(report)] + ([Text(), self._last_line(width)] if self._live else [])
        room = None
        if height is not None:
            room = height - len(parts) - len(rest) - 1
            while below and room - sum(table.row_count + 2 for table in below) < _LEAST:
                below.pop()
            room = max(room - sum(table.row_count + 2 for table in below), 1)
        parts.append(self._registries(width, room))
        for table in below:
            parts += [Text(), table]
        return Group(*parts, *rest)

    def _head(self, report: Report, started: float) -> Text:
        up = _span(max(report.at - started, 0.0))
        return _line(
            (_clean(report.program), "bold"),
            (f"  process {report.pid}, Python {_clean(report.python)}, {report.threads} threads, seen for {up}", ""),
        )

    def _memory_line(self, report: Report) -> Text:
        told = [(f"memory {_size(report.rss)} ", "bold"), (sparkline(self._memory), "cyan")]
        least, most = _size(min(self._memory)), _size(max(self._memory))
        if least != most:
            told.append((f" {least} to {most}", "dim"))
        for monitor in report.monitors[:1]:
            style = {"normal": "green", "warn": "yellow"}.get(monitor.level, "bold red")
            told.append((f"  {_clean(monitor.level)}", style))
            limit = None if monitor.reading is None else monitor.reading.limit
            if limit is not None and monitor.reading is not None:
                told.append((f" {limit.share:.0%} of {_size(limit.size)}, growth {monitor.reading.growth}", ""))
        return _line(*told)

    def _registries(self, width: int, room: int | None) -> Table:
        rows = self._sorted()
        table = _table("registry")
        wide = width >= _WIDE
        marks = {
            name: (" ▼" if self._descending else " ▲") if name == self._sort and self._live else "" for name in _SORTS
        }
        table.columns[0].header = f"registry{marks['name']}"
        names = [
            "entries",
            "bound",
            "bytes",
            "hits",
            "evicted",
            *(("a second", "leased", "store") if wide else ("leased",)),
        ]
        for name in names:
            left = name == "store"
            table.add_column(
                name + marks.get(name, ""),
                justify="left" if left else "right",
                no_wrap=True,
                max_width=24 if left else None,
            )
        chosen = self._chosen()
        shown = rows if room is None else _window(rows, rows.index(chosen) if chosen in rows else 0, room)
        for one, number in shown:
            stats = one.stats
            lookups = stats.hits + stats.misses
            evicted = sum(stats.evictions.values())
            full = one.maxsize is not None and stats.entries >= one.maxsize
            cells: list[str | Text] = [
                Text(_clean(_registry_name(one))),
                Text(f"{stats.entries:,}", style="red" if stats.overflowing else "yellow" if full else ""),
                "-" if one.maxsize is None else f"{one.maxsize:,}",
                "-" if stats.bytes is None else _size(stats.bytes),
                f"{stats.hits / lookups:.1%}" if lookups else "-",
                f"{evicted:,}" if evicted else "-",
            ]
            if wide:
                rate = self._rates.get(number)
                cells.append("-" if not rate else f"{rate:,.1f}")
            cells.append(f"{stats.leased:,}" if stats.leased else "-")
            if wide:
                cells.append(Text(_end(_clean(one.store or "-"), 24)))
            marked = self._live and chosen is not None and number == chosen[1]
            table.add_row(*cells, style="reverse" if marked else None)
        if not rows:
            table.add_row(Text("none of that name" if self._filter else "none", style="dim"))
        return table

    def _pools(self, report: Report, height: int | None) -> Table | None:
        if not report.pools:
            return None
        table = _table("pool")
        for name in ("in use", "idle", "waiting", "timeouts", "dropped", "held"):
            table.add_column(name, justify="right", no_wrap=True)
        pools = sorted(report.pools, key=_busiest, reverse=True)
        for one in pools if height is None else pools[:_OTHERS]:
            stats = one.stats
            ages = [holder.age for holder in one.holders if holder.age is not None]
            full = stats.in_use >= stats.max_size
            table.add_row(
                Text(_clean(one.name) + (" (closed)" if one.closed else "")),
                Text(f"{stats.in_use}/{stats.max_size}", style="red" if full and stats.waiting else ""),
                str(stats.idle),
                Text(f"{stats.waiting:,}", style="yellow" if stats.waiting else ""),
                f"{stats.timeouts:,}",
                f"{stats.dropped:,}",
                _span(max(ages)) if ages else "-",
            )
        return table

    def _writers(self, report: Report, width: int, height: int | None) -> Table | None:
        if not report.stores:
            return None
        table = _table("store")
        for name in ("saved by", "pending", "saved", "failed", "rejected", "state"):
            table.add_column(name, justify="left" if name == "saved by" else "right", no_wrap=True)
        table.columns[1].max_width = 16
        rows: list[tuple[str, WriteBehindReport | None, str]] = []
        for store in report.stores:
            name = _end(_clean(store.address), max(width - 56, 14))
            found = [one for one in report.writers if one.store == store.address]
            state = "closed" if store.closed else "open"
            rows += [(name, one, state) for one in found] or [(name, None, state)]
        for name, writer, state in rows if height is None else rows[:_OTHERS]:
            if writer is None:
                table.add_row(Text(name), "-", "-", "-", "-", "-", state)
                continue
            stats = writer.stats
            table.add_row(
                Text(name),
                Text(_clean(writer.name)),
                f"{stats.pending:,}",
                f"{stats.saved:,}",
                f"{stats.failures:,}",
                f"{stats.rejected:,}",
                Text("does not save", style="bold red") if stats.outage else state,
            )
        return table

    def _rest(self, report: Report) -> Text:
        registered = [one for one in report.cleanups if one.registered]
        failed = sum(one.errors for one in registered)
        parts = [
            f"sessions {len(report.sessions or ()):,}",
            f"shared {sum(one.open for one in report.shared)}",
            f"cleanups {len(registered)}" + (f" ({failed:,} failed)" if failed else ""),
            f"janitor {'looks after ' + str(report.janitor.charges) if report.janitor.running else 'not running'}",
        ]
        if self._frame is not None and self._frame.unseen:
            parts.append(f"{self._frame.unseen:,} smaller registries left out")
        if report.problems:
            parts.append(f"{len(report.problems)} could not be looked at")
        return _line(("   ".join(parts), "dim"))

    def _last_line(self, width: int) -> Text:
        if self._mode == "question" and (chosen := self._asked()) is not None:
            one = chosen[0]
            question = f"Trim {_clean(_registry_name(one))} to half of its {one.stats.entries:,} entries? y/N"
            return _line((question, "bold yellow"))
        if self._mode == "filter":
            return _line((f"/{self._filter}▏", "bold"), ("  Enter keeps it, Esc drops it", "dim"))
        if said := self.message or self.trouble:
            return _line((_clean(said), "yellow"))
        keys = [("q", "quit"), ("s", "sort"), ("r", "reverse"), ("/", "filter"), ("↑↓", "choose")]
        if self._frame is not None and self._frame.may_trim:
            keys.append(("t", "trim"))
        told = [part for key, what in keys for part in ((key, "bold"), (f" {what}   ", "dim"))]
        if self._filter:
            told.append((f"only /{self._filter}", "cyan"))
        line = _line(*told)
        line.truncate(width)
        return line


def sparkline(values: Any) -> str:
    """*values*, none of them negative, as a row of bars."""
    found = list(values)
    if not found:
        return ""
    low, high = min(found), max(found)
    span = max(high - low, high * _NOISE)
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in found)


def _rows(frame: Frame) -> list[_Row]:
    return list(zip(frame.report.registries, frame.numbers, strict=False))


def _window(rows: list[_Row], chosen: int, room: int) -> list[_Row]:
    """As many as there is room for, the chosen one among them."""
    first = min(max(chosen - room // 2, 0), max(len(rows) - room, 0))
    return rows[first : first + room]


def _busiest(one: PoolReport) -> tuple[int, int]:
    return one.stats.waiting, one.stats.in_use


def _table(first: str) -> Table:
    table = Table(box=None, expand=True, header_style="bold underline", pad_edge=False)
    table.add_column(first, no_wrap=True, ratio=1, min_width=10)
    return table


def _line(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _end(text: str, most: int) -> str:
    """The end of *text*: of a path it is the name of the file that tells."""
    text = _clean(text)
    return text if len(text) <= most else f"…{text[-most + 1 :]}"


def _clean(text: str) -> str:
    """Return *text* without the characters that would change the terminal: names come from another process."""
    return printable(text)


# The command


def main(process: str | None, *, every: float, once: bool) -> None:
    """
    List the processes that can be seen, or watch one.

    Args:
        process: Its number, or the path of its socket; ``None``: list them.
        every: Seconds between two looks.
        once: Print one picture and end. So it is without a terminal, too.

    Raises:
        InputError: there is no such process, or it does not answer.
    """
    console = Console()
    if process is None:
        _list()
        return
    path = _path_of(process)
    with _told(path):
        frame = _frame(path)
    if once or not (sys.stdin.isatty() and console.is_terminal):
        view = View(live=False)
        view.show(frame)
        console.print(view.draw(console.width, None))
        return
    _watch(console, path, frame, every)


def _list() -> None:
    table = Table(box=None, header_style="bold underline", pad_edge=False)
    for name in ("process", "program", "memory", "registries", "pools", "socket"):
        table.add_column(name, justify="left" if name in {"program", "socket"} else "right", no_wrap=True)
    for path in exposed():
        try:
            report = _frame(path).report
        except (OSError, ValueError) as problem:
            table.add_row("?", "?", "?", "?", "?", Text(f"{path}: {_clean(str(problem))}"))
            continue
        table.add_row(
            str(report.pid),
            Text(_clean(report.program)),
            _size(report.rss),
            f"{len(report.registries):,}",
            f"{len(report.pools):,}",
            Text(_clean(path)),
        )
    if table.row_count:
        Console(width=1_000).print(table)  # a path in two pieces could not be copied
    else:
        print("No process of yours can be seen: one has to call hygiene.expose().")


def _path_of(process: str) -> str:
    if not process.isdecimal():
        return process
    found = [path for path in exposed() if re.search(rf"-{process}(-\d+)?\.sock\Z", path)]
    if not found:
        raise InputError(
            f"wanted process {process}, found that it cannot be seen. It has to call hygiene.expose(), and be yours; "
            "`hygiene top` lists those that can be seen"
        )
    return found[0]


def _frame(path: str, timeout: float = 5.0) -> Frame:
    found = ask(path, Request("frame"), timeout)
    if not isinstance(found, Frame) or len(found.numbers) != len(found.report.registries):
        raise ValueError("what came back does not fit together")
    return found


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as problem:
        why = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise InputError(f"wanted a process that is exposed at '{path}', found: {_clean(why)}") from problem


def _watch(console: Console, path: str, frame: Frame, every: float) -> None:
    view = View()
    view.show(frame)
    ended = None
    with _keys() as read, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + every
        while not view.over:
            live.update(view.draw(console.width, console.height), refresh=True)
            for key in read(max(due - time.monotonic(), 0.0)):
                view.press(key)
                if view.wanted is not None:
                    _trim(view, path)
                    due = 0.0
            if time.monotonic() < due:
                continue
            due = time.monotonic() + every
            try:
                view.show(_frame(path, _TIMEOUT))
            except (FileNotFoundError, ConnectionError):
                ended = f"process {frame.report.pid} has ended, or is exposed no more"
                break
            except (OSError, ValueError) as problem:
                view.trouble = f"no answer: {problem}"
    if ended:
        print(f"hygiene: {printable(str(ended), lines=True)}", file=sys.stderr)


def _trim(view: View, path: str) -> None:
    wanted, view.wanted = view.wanted, None
    assert wanted is not None
    number, name = wanted
    try:
        done = ask(path, Request("trim", number, "50%"), TRIMMING)
    except (OSError, ValueError) as problem:
        view.message = f"{name} was not trimmed: {problem}"
        return
    left = done.entries if isinstance(done, Trimmed) else 0
    view.message = f"{left:,} entries have left {name}" if left else f"nothing could leave {name}: in use, or unsaved"


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], list[str]]]:
    """A block in which keys come as they are pressed. Yields what waits for some, at most so many seconds."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def read(seconds: float) -> list[str]:
        ready, _, _ = select.select([terminal], [], [], seconds)
        if not ready:
            return []
        pressed = os.read(terminal, 1024)
        if not pressed:
            return ["q"]  # the terminal is gone
        return _KEYS.findall(pressed.decode(errors="ignore").replace("\n", "\r"))

    try:
        tty.setcbreak(terminal)
        yield read
    except KeyboardInterrupt:
        pass  # another way to say that it is enough
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
