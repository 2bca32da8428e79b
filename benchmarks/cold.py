"""A row about cold starts: what a worker's result adds to the first invocation of a function.

Under the real runtime client and the real emulator, which starts it when the first event comes. What
these take is the same for all handlers, so the figures are of the differences between starts that
were next to each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from .figures import Line, Results, Samples
from .rows import CHART_LOOP, Row, Task, ours

_ROOT = Path(__file__).resolve().parent.parent
_PROGRAMS = _ROOT / "benchmarks" / "programs"

_BARE, _LOOP, _OURS = "bare_handler", "loop_handler", "asynclam_handler"
_ABOVE_BARE, _ABOVE_LOOP = "above a bare handler", "above a handler with a loop"


async def cold_starts(task: Task) -> Samples:
    """From the first event to its result, in turn, in a thread in which no loop runs."""
    return await asyncio.to_thread(_measure, task.size(15, 1))


def _measure(count: int) -> Samples:
    taken: dict[str, list[float]] = {name: [] for name in (_BARE, _LOOP, _OURS)}
    for name in taken:
        _cold_start(name)  # compiles what it imports, and brings the files into memory
    for _ in range(count):
        for name, samples in taken.items():
            samples.append(_cold_start(name))
    return {
        **taken,
        _ABOVE_BARE: _differences(taken[_OURS], taken[_BARE]),
        _ABOVE_LOOP: _differences(taken[_OURS], taken[_LOOP]),
    }


def _differences(above: list[float], below: list[float]) -> list[float]:
    return [ours - theirs for ours, theirs in zip(above, below, strict=True)]


def _cold_start(program: str) -> float:
    from tests.parts.emulator import emulator

    # As a package of the function is: compiled, whatever this environment says (empty is unset).
    settings = {"PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    with emulator(f"{program}.handler", cwd=_PROGRAMS, env=settings) as function:
        begun = perf_counter()
        result = function.invoke(12)
        taken = perf_counter() - begun
    assert result == 144, result
    return taken


def _lines(results: Results) -> Iterator[Line]:
    place = ours(CHART_LOOP)
    what = "cold start to a worker's result, above a handler that imports asyncio and uvloop"
    yield Line(32, what, CHART_LOOP, "s", results.figure(_ABOVE_BARE, place)).at_most(0.010)
    for name, text in (
        (_ABOVE_LOOP, "above a handler that runs a coroutine on uvloop, too"),
        (_OURS, "cold start to a worker's result"),
        (_BARE, "cold start of the handler that only imports"),
    ):
        yield Line(32, text, CHART_LOOP, "s", results.figure(name, place))


ROWS = (
    Row(
        32,
        "cold start of a function",
        cold_starts,
        (ours(CHART_LOOP),),
        dict.fromkeys((_BARE, _LOOP, _OURS, _ABOVE_BARE, _ABOVE_LOOP), "s"),
        _lines,
        rounds=5,
    ),
)
