"""Draws the document's figures as bars, for a light page and for a dark one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from .contestants import ALL
from .figures import show
from .rows import CHART_LOOP

_WIDTH = 860
_GAP = 40  # between the two columns of panels
_PANEL = (_WIDTH - _GAP) // 2
_LABEL = 172  # for names, to the left of the bars
_VALUE = 70  # for numbers, to the right of them
_BAR = _PANEL - _LABEL - _VALUE
_STEP = 21  # from one bar to the next
_THICK = 13
_HEAD = 52  # a panel's two lines of heading
_TOP = 8
_OUTLIER = 3.0  # times the median bar, where less is better: such a bar is cut, and looks it
_MARKS = {"blocking": " *", "asyncio": " †"}  # of those that are not on the chart's loop
_FONT = "-apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    name: str
    text: str
    soft: str  # second headings, whiskers
    ours: str
    library: str
    by_hand: str
    page: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#0969da", "#afb8c1", "#dde2e7", "#ffffff"),
    Theme("dark", "#e6edf3", "#9198a1", "#4493f8", "#5a636d", "#343b44", "#0d1117"),
)


@dataclass(frozen=True)
class Panel:
    heading: str
    hint: str
    row: int
    figure: str
    variant: str
    largest_first: bool = False


PANELS = (
    Panel("No-op jobs in one gather", "by two workers, more is better", 2, "jobs", "", True),
    Panel("No-op round trip", "less is better", 1, "round trip", "as placed"),
    Panel("64 MiB NumPy array, there and back", "less is better", 5, "transfer", ""),
    Panel(
        "Longest stall of the event loop", "256 MiB each way, less is better", 7, "echo", "bytes"
    ),
)


@dataclass(frozen=True)
class Bar:
    name: str
    loop: str
    median: float
    p25: float
    p75: float
    unit: str


def draw(found: Mapping[str, Any], theme: Theme) -> str:
    """An SVG of all panels for which there are figures, two a line."""
    panels = [(panel, bars) for panel in PANELS if (bars := _bars_of(found, panel))]
    parts: list[str] = []
    top = _TOP
    for pair in (panels[at : at + 2] for at in range(0, len(panels), 2)):
        for column, (panel, bars) in enumerate(pair):
            parts += _panel(panel, bars, column * (_PANEL + _GAP), top, theme)
        top += _HEAD + _STEP * max(len(bars) for _, bars in pair) + 18
    for line in _captions(found):
        parts.append(_text(0, top + 12, line, theme.soft, size=11))
        top += 16
    height = top + _TOP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" font-family="{_FONT}">\n'
        "<title>asynclam beside its peers</title>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bars_of(found: Mapping[str, Any], panel: Panel) -> list[Bar]:
    """One bar a contestant: on the chart's loop, or else on the one on which it could run."""
    figures: dict[str, Mapping[str, Any]] = {}
    for figure in found["figures"]:
        key = figure["row"], figure["figure"], figure["variant"]
        if key == (panel.row, panel.figure, panel.variant) and (
            figure["loop"] == CHART_LOOP or figure["contestant"] not in figures
        ):
            figures[figure["contestant"]] = figure
    bars = [
        Bar(name, *(figure[part] for part in ("loop", "median", "p25", "p75", "unit")))
        for name, figure in figures.items()
    ]
    return sorted(bars, key=lambda bar: bar.median, reverse=panel.largest_first)


def _panel(panel: Panel, bars: list[Bar], left: int, top: int, theme: Theme) -> Iterator[str]:
    yield _text(left, top + 14, panel.heading, theme.text, size=14, weight=600)
    yield _text(left, top + 31, panel.hint, theme.soft, size=11)
    longest = _longest(bars, cut=not panel.largest_first)
    for number, bar in enumerate(bars):
        yield from _bar(bar, left, top + _HEAD + number * _STEP, longest, theme)


def _longest(bars: list[Bar], *, cut: bool) -> float:
    """What the full width stands for: the longest bar that is not cut, with its whisker."""
    most = _OUTLIER * statistics.median(bar.median for bar in bars) if cut else math.inf
    return max(bar.p75 for bar in bars if bar.median <= most)


def _bar(bar: Bar, left: int, top: int, longest: float, theme: Theme) -> Iterator[str]:
    start = left + _LABEL
    middle = top + _THICK // 2
    cut = bar.median > longest
    length = max(1.5, _BAR * min(1.0, bar.median / longest))
    is_ours = bar.name == "asynclam"
    weight = 600 if is_ours else 400
    name = bar.name + _MARKS.get(bar.loop, "")
    yield _text(start - 8, middle + 4, name, theme.text, anchor="end", weight=weight)
    yield (
        f'<rect x="{start}" y="{top}" width="{length:.1f}" height="{_THICK}" rx="2" '
        f'fill="{_fill(bar.name, theme)}"/>'
    )
    if cut:
        yield _break(start + _BAR * 0.86, top, theme)
    elif bar.p75 > bar.p25:
        low, high = (start + _BAR * min(1.0, value / longest) for value in (bar.p25, bar.p75))
        length = max(length, high - start)
        yield (
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} '
            f'{middle - 3}v6" stroke="{theme.soft}" fill="none"/>'
        )
    value = show(bar.median, bar.unit)
    yield _text(start + length + 6, middle + 4, value, theme.text, weight=weight)


def _fill(name: str, theme: Theme) -> str:
    if name == "asynclam":
        return theme.ours
    by_hand = next(kind.by_hand for kind in ALL if kind.name == name)
    return theme.by_hand if by_hand else theme.library


def _break(left: float, top: int, theme: Theme) -> str:
    """A slanted gap: the bar goes on beyond the page."""
    return (
        f'<path d="M{left:.1f} {top + _THICK + 1}l6 -{_THICK + 2}" '
        f'stroke="{theme.page}" stroke-width="4"/>'
    )


def _captions(found: Mapping[str, Any]) -> Iterator[str]:
    facts = found["machine"]
    yield (
        f"{facts['python']}, {facts['cores']} cores, on {CHART_LOOP} "
        "(trio-parallel: on trio). Medians and quartiles. Pale: no library, written by hand."
    )
    yield "* blocks its caller: not awaited, no event loop.   † on asyncio's own loop."


def _text(
    left: float,
    baseline: float,
    content: str,
    colour: str,
    *,
    size: int = 12,
    weight: int = 400,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{left:.1f}" y="{baseline}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{escape(content)}</text>'
    )
