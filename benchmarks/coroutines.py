"""Row about coroutine functions in workers: how many a second, and what they leave to plain jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from time import perf_counter

from . import jobs
from .contestants import Contestant
from .figures import Line, Place, Results, Samples
from .rows import LOOPS, Row, Task, everywhere, ours
from .small import trip_seconds

_PEER = "aiomultiprocess"
_WAIT = 0.01  # seconds
_UNITS = {"no-op": "1/s", "waiting": "1/s", "trip before": "s", "trip after": "s"}


async def coroutines(task: Task) -> Samples:
    """Gathers of coroutines that do nothing, and of those that wait; ours, also plain jobs around them."""
    taken: dict[str, list[float]] = {name: [] for name in _UNITS}
    async with task.contestant() as contestant:
        await _rate(contestant, 100, jobs.nothing)
        for _ in range(task.size(5, 1)):
            taken["no-op"].append(await _rate(contestant, task.size(4000, 50), jobs.nothing))
            waiting = partial(asyncio.sleep, _WAIT)
            taken["waiting"].append(await _rate(contestant, task.size(4000, 50), waiting))
    if task.place.contestant == "asynclam":
        for _ in range(task.size(5, 1)):
            async with task.contestant(workers=1) as contestant:
                await contestant.call(jobs.noop)
                taken["trip before"] += await trip_seconds(contestant, task.size(1000, 20))
                await contestant.run_async(jobs.nothing)
                await contestant.call(jobs.noop)
                taken["trip after"] += await trip_seconds(contestant, task.size(1000, 20))
    return {name: values for name, values in taken.items() if values}


async def _rate(contestant: Contestant, count: int, function: jobs.CoroutineFunction) -> float:
    begun = perf_counter()
    await asyncio.gather(*(contestant.run_async(function) for _ in range(count)))
    return count / (perf_counter() - begun)


def _lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        for name, doing in (("no-op", "do nothing"), ("waiting", "wait for 10 ms")):
            ratio = results.ratio((name, place), (name, Place(_PEER, loop)))
            what = f"4,000 coroutines in workers that {doing}, in a gather ÷ {_PEER}"
            yield Line(16, what, loop, "", ratio).at_least(1)
            yield Line(16, "of these", loop, "1/s", results.figure(name, place))
        ratio = results.ratio(("trip after", place), ("trip before", place))
        what = "no-op round trip of a worker that has had a coroutine ÷ before"
        yield Line(16, what, loop, "", ratio)


ROW = Row(
    16,
    "coroutines in workers",
    coroutines,
    (*everywhere("asynclam"), *everywhere(_PEER)),
    _UNITS,
    _lines,
    rounds=3,
)
