"""From samples to figures: the median of blocks, and how far they are apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

Samples = Mapping[str, Sequence[float]]  # what one block measured, by the name of the figure


@dataclass(frozen=True)
class Place:
    """Who is measured, on which loop, and under which circumstances."""

    contestant: str
    loop: str
    variant: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.contestant, self.loop, self.variant)))


@dataclass(frozen=True)
class Figure:
    """The median of the medians of all blocks, and their quartiles."""

    median: float
    p25: float
    p75: float
    blocks: int
    samples: int


@dataclass(frozen=True)
class Line:
    """A figure beside its goal; without a goal it is there to compare."""

    row: int
    what: str
    loop: str
    unit: str
    figure: Figure | None
    goal: str = ""
    met: bool | None = None
    note: str = ""

    def at_most(self, most: float) -> Line:
        met = None if self.figure is None else self.figure.median <= most
        return replace(self, goal=f"≤ {show(most, self.unit)}" if most else "0", met=met)

    def at_least(self, least: float) -> Line:
        met = None if self.figure is None else self.figure.median >= least
        return replace(self, goal=f"≥ {show(least, self.unit)}", met=met)


@dataclass
class Results:
    """What the blocks of one row have measured, and what could not be."""

    blocks: dict[tuple[str, Place], dict[int, list[float]]] = field(default_factory=dict)
    failures: dict[Place, str] = field(default_factory=dict)

    def add(self, turn: int, place: Place, samples: Samples) -> None:
        for name, values in samples.items():
            self.blocks.setdefault((name, place), {})[turn] = list(values)

    def figure(self, name: str, place: Place) -> Figure | None:
        blocks = self.blocks.get((name, place), {}).values()
        return summary((statistics.median(block) for block in blocks), sum(map(len, blocks)))

    def worst(self, name: str, place: Place) -> Figure | None:
        """The largest sample of all, where a single one too many is a failure."""
        blocks = self.blocks.get((name, place), {}).values()
        samples = [sample for block in blocks for sample in block]
        return summary([max(samples)], len(samples)) if samples else None

    def ratio(self, above: tuple[str, Place], below: tuple[str, Place]) -> Figure | None:
        """Of the blocks of the same round, which were next to each other in time."""
        ours, theirs = self.blocks.get(above, {}), self.blocks.get(below, {})
        turns = sorted(ours.keys() & theirs.keys())
        ratios = [statistics.median(ours[t]) / statistics.median(theirs[t]) for t in turns]
        return summary(ratios, sum(len(ours[turn]) for turn in turns))

    def as_dicts(self, units: Mapping[str, str]) -> list[dict[str, Any]]:
        found = []
        for name, place in self.blocks:
            figure = self.figure(name, place)
            assert figure is not None
            found.append({"figure": name, "unit": units[name], **asdict(place), **asdict(figure)})
        return found


def summary(values: Iterable[float], samples: int) -> Figure | None:
    """The median and the quartiles of what may be few values, or none."""
    kept = sorted(values)
    if not kept:
        return None
    low, _, high = (
        statistics.quantiles(kept, n=4, method="inclusive") if len(kept) > 1 else kept * 3
    )
    return Figure(statistics.median(kept), low, high, len(kept), samples)


def show(value: float, unit: str) -> str:
    """A number as people write it: ``18.4 µs``, ``1.31``, ``92,700/s``."""
    if value < 0:
        return f"-{show(-value, unit)}"
    if unit == "s":
        factor, name = next((f, n) for f, n in _SECONDS if value * f >= 1 or n == "ns")
        return f"{_digits(value * factor)} {name}"
    if unit == "B":
        return f"{_digits(value / 1024)} KiB"
    if unit == "1/s":
        return f"{_digits(value)}/s"
    return _digits(value)


_SECONDS = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"), (1e9, "ns"))


def _digits(value: float) -> str:
    if value >= 1000:
        return f"{round(value, 3 - len(str(int(value)))):,.0f}" if value >= 1e4 else f"{value:,.0f}"
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"
