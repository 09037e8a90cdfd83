"""The page that shows a replay: both memory curves, readable on a phone, in one file that needs no other."""

from __future__ import annotations

import sys
from bisect import bisect_left
from datetime import UTC, datetime
from functools import partial
from html import escape
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any, cast

import pygal
from pygal.style import Style

from hygiene.cli.sizes import duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from hygiene.cli.replay import Comparison, Sample

__all__ = ["page"]

# Importing pygal leaves an import hook for its plugins behind, of a kind that Python 3.12 has removed and 3.11 warns
# about at each import that nobody else answers. We use no plugins.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "pygal"]

_LABELS = 4
"""Names below a chart: more would touch each other on a phone."""
_DAY = 86_400.0


def page(comparison: Comparison, rows: list[tuple[str, str, str]], source: str, said: list[str]) -> str:
    """
    A whole HTML document: it loads nothing from elsewhere, runs no script, follows the reader's light or dark theme.

    Args:
        comparison: What to show.
        rows: The table: a name, the bot as it is, the bounded bot.
        source: What was replayed, for the reader.
        said: What the numbers mean, a sentence each.
    """
    plain, bounded = comparison.plain, comparison.bounded
    limits = [f"at most {comparison.maxsize:,} conversations"]
    if comparison.history is not None:
        limits.append(f"at most {comparison.history:,} messages in each")
    if comparison.idle is not None:
        limits.append(f"none unused for {duration(comparison.idle)}")
    if comparison.kept is not None:
        limits.append(f"and everything in {comparison.kept.address}")
    body = "\n".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(left)}</td><td>{escape(right)}</td></tr>"
        for name, left, right in rows
    )
    return _PAGE.format(
        messages=f"{comparison.messages:,}",
        source=escape(source),
        missed="any other starts a new one" if comparison.kept is None else "any other starts or loads one",
        limits=escape(", ".join(limits)),
        peak_plain=_mib(plain.peak_rss),
        peak_bounded=_mib(bounded.peak_rss),
        memory=_chart(comparison, lambda sample: sample.rss / 2**20, "MiB of memory"),
        held=_chart(comparison, lambda sample: float(sample.held), "conversations held"),
        axis="the log's own dates" if comparison.has_time else "the number of messages so far",
        rows=body,
        said="\n".join(f"<p>{escape(sentence)}</p>" for sentence in said),
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}\N{NO-BREAK SPACE}MiB"


def _chart(comparison: Comparison, height: Callable[[Sample], float], title: str) -> str:
    # 400 units wide: on a phone a unit is about a pixel, so 14 units are letters one can read.
    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground="currentColor",
        foreground_strong="currentColor",
        foreground_subtle="currentColor",
        guide_stroke_color="currentColor",
        major_guide_stroke_color="currentColor",
        font_family="system-ui, sans-serif",
        label_font_size=14,
        major_label_font_size=14,
        opacity=".1",
        colors=("var(--plain)", "var(--bounded)"),
        stroke_width="3",
    )
    chart = pygal.XY(
        width=400,
        height=260,
        explicit_size=False,
        style=style,
        js=[],
        show_legend=False,
        show_dots=False,
        include_x_axis=True,
        margin=4,
        margin_right=34,  # half of the last name below the chart
        y_labels=_heights(max(height(sample) for sample in (*comparison.plain.curve, *comparison.bounded.curve))),
        x_labels=_places(comparison),
        x_value_formatter=_namer(comparison),
        value_formatter=lambda value: f"{value:,.0f}",
        truncate_label=-1,
    )
    chart.add("as it is", [(sample.messages, height(sample)) for sample in comparison.plain.curve])
    chart.add("bounded", [(sample.messages, height(sample)) for sample in comparison.bounded.curve])
    chart.add_xml_filter(partial(_quiet, title))
    return cast("str", chart.render(is_unicode=True, disable_xml_declaration=True))


def _quiet(title: str, svg: Any) -> Any:
    """A picture and nothing else: pygal's script and its links go, and a screen reader is told what it shows."""
    for parent in list(svg.iter()):
        for child in list(parent):
            if child.tag == "script" or not isinstance(child.tag, str):
                parent.remove(child)
    svg.set("role", "img")
    svg.set("aria-label", title)
    return svg


def _places(comparison: Comparison) -> list[int]:
    """Messages at which the axis is named: evenly spread, first and last among them."""
    return [round(comparison.messages * index / (_LABELS - 1)) for index in range(_LABELS)]


def _heights(most: float) -> list[float]:
    """Round numbers from 0 to just above *most*, about five."""
    step = 10.0 ** floor(log10(max(most, 1) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 5 >= most)
    return [step * index for index in range(ceil(most / step) + 1)]


def _namer(comparison: Comparison) -> Callable[[float], str]:
    if not comparison.has_time:
        return lambda messages: f"{messages:,.0f}"
    curve = comparison.plain.curve
    # The curve starts before the first message, when the log has no time yet.
    times = [(sample.messages, sample.when) for sample in curve[1:]] or [(0, 0.0)]
    span = times[-1][1] - times[0][1]
    form = "%H:%M" if span < _DAY else "%d %b" if span < 200 * _DAY else "%b %Y"

    def name(messages: float) -> str:
        index = min(bisect_left(times, (messages, 0.0)), len(times) - 1)
        return datetime.fromtimestamp(times[index][1], UTC).strftime(form)

    return name


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The same bot, as it is and bounded</title>
<style>
:root {{ color-scheme: light dark; --plain: #c2410c; --bounded: #0f766e; --quiet: #6b7280; --line: #8884; }}
@media (prefers-color-scheme: dark) {{ :root {{ --plain: #fb923c; --bounded: #2dd4bf; --quiet: #9ca3af; }} }}
body {{ max-width: 40rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; line-height: 1.25; }}
h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .3rem; }}
svg {{ display: block; width: 100%; height: auto; }}
table {{ width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem 0 .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }}
th:first-child {{ text-align: left; font-weight: normal; padding-left: 0; }}
.plain {{ color: var(--plain); font-weight: 600; }}
.bounded {{ color: var(--bounded); font-weight: 600; }}
small {{ color: var(--quiet); }}
</style>
</head>
<body>
<h1>{messages} messages: <span class="plain">{peak_plain}</span> as it is,
<span class="bounded">{peak_bounded}</span> bounded</h1>
<p>A chat bot keeps what each person wrote, so that it can answer in context.
The <span class="plain">bot as it is</span> never forgets anybody.
The <span class="bounded">bounded bot</span> is the same code with one line added: it keeps {limits}.
What was unused for the longest time leaves first.
Both were given the same messages, each in a process of its own.</p>
<h2>Memory, in MiB</h2>
{memory}
<h2>Conversations held</h2>
{held}
<p><small>From left to right: message after message; below stands {axis}.</small></p>
<h2>In numbers</h2>
<table>
<thead><tr><th></th><th class="plain">as it is</th><th class="bounded">bounded</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
{said}
<p><small>A hit is a message whose conversation was still held in memory; {missed}.
Memory is what the system counts for the whole process (resident memory); Python itself takes some of it from the start.
Replayed: {source}.</small></p>
</body>
</html>
"""
