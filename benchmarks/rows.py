"""What a row is: who is measured where, how, and what is made of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from .contestants import ALL, BY_NAME, Contestant
from .figures import Line, Place, Results, Samples

LOOPS = ("asyncio", "uvloop")
CHART_LOOP = "uvloop"  # the one on which peers are measured where one has to do
CORES = 2  # the goals are for two cores, so everybody has two workers
MIB = 1024 * 1024


@dataclass(frozen=True)
class Task:
    """One block's part of a row."""

    place: Place
    quick: bool

    def size(self, full: int, quick: int) -> int:
        """A number of jobs or bytes: the real one, or one that is over in no time."""
        return quick if self.quick else full

    def contestant(self, workers: int = CORES) -> Contestant:
        return BY_NAME[self.place.contestant](workers)


@dataclass(frozen=True)
class Row:
    number: int
    title: str
    measure: Callable[[Task], Awaitable[Samples]]
    places: tuple[Place, ...]
    units: Mapping[str, str]  # of each figure that ``measure`` returns
    lines: Callable[[Results], Iterable[Line]]
    rounds: int = 5


def everywhere(name: str, variants: Iterable[str] = ("",)) -> tuple[Place, ...]:
    """A contestant on all its loops."""
    return tuple(Place(name, loop, v) for v in variants for loop in BY_NAME[name].loops)


def everybody(loops: Iterable[str] = LOOPS) -> tuple[Place, ...]:
    """All contestants, those that have asyncio loops on ``loops`` only."""
    wanted = {*loops, "trio", "blocking"}
    return tuple(place for kind in ALL for place in everywhere(kind.name) if place.loop in wanted)


def peers_on(loop: str) -> Iterator[Place]:
    """The libraries that can be awaited, on one kind of asyncio loop."""
    for kind in ALL:
        if loop in kind.loops and kind.name != "asynclam" and not kind.by_hand:
            yield Place(kind.name, loop)


def ours(loop: str, variant: str = "") -> Place:
    return Place("asynclam", loop, variant)
