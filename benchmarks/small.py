"""Rows about jobs that do next to nothing: what a job costs, and who waits for whom."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter
from typing import Any

from . import jobs, limits, processes
from .contestants import Contestant, NotPossibleError
from .figures import Line, Place, Results, Samples
from .rows import CHART_LOOP, LOOPS, Row, Task, everybody, everywhere, ours, peers_on

_BURST = 200  # round trips in a row, before it is the other side's turn
_SLOW = 0.002  # seconds a trip, from which on bursts are short
_FEW = 5
_AIM = 0.2  # seconds that one gather should take

# --- 1: round trips --------------------------------------------------------------------------------

_ONE_CORE, _TWO_CORES, _KERNEL = "one core", "two cores", "as placed"


async def round_trips(task: Task) -> Samples:
    """One worker; bursts of trips and of bare ping-pongs over a Pipe, in turn."""
    with limits.child(limits.echo) as ping_pong:  # forked while this process has one thread
        async with task.contestant(workers=1) as contestant:
            await trip_seconds(contestant, _FEW)
            await _place(task.place.variant, contestant, ping_pong)
            slow = min(await trip_seconds(contestant, _FEW)) > _SLOW
            burst = _FEW if slow else _BURST
            trips: list[float] = []
            pipe: list[float] = []
            for _ in range(task.size(15, 3)):
                trips += await trip_seconds(contestant, burst)
                pipe += _ping_pongs(ping_pong, burst)
    return {"round trip": trips, "Pipe": pipe}


async def trip_seconds(contestant: Contestant, count: int) -> list[float]:
    """What no-op jobs take, one after the other."""
    call, noop = contestant.call, jobs.noop
    taken = []
    for _ in range(count):
        begun = perf_counter()
        await call(noop)
        taken.append(perf_counter() - begun)
    return taken


def _ping_pongs(child: limits.Child, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        begun = perf_counter()
        child.exchange(None)
        taken.append(perf_counter() - begun)
    return taken


async def _place(variant: str, contestant: Contestant, ping_pong: limits.Child) -> None:
    if variant == _KERNEL:
        return
    cpus = sorted(os.sched_getaffinity(0))
    if variant == _TWO_CORES and len(cpus) == 1:
        raise NotPossibleError("this machine has one core")
    # After the workers are there: they would inherit it.
    worker = await contestant.call(os.getpid)
    processes.pin(os.getpid(), cpus[0])
    for pid in (worker, ping_pong.pid):
        processes.pin(pid, cpus[0] if variant == _ONE_CORE else cpus[1])


def _round_trip_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        for variant, most in ((_ONE_CORE, 1.1), (_TWO_CORES, 1.8), (_KERNEL, 1.3)):
            place = ours(loop, variant)
            ratio = results.ratio(("round trip", place), ("Pipe", place))
            yield Line(1, f"no-op round trip ÷ Pipe ping-pong, {variant}", loop, "", ratio).at_most(
                most
            )
            for name in ("round trip", "Pipe"):
                what = f"{name}, {variant}"
                yield Line(1, what, loop, "s", results.figure(name, place))


def _placed(place: Place) -> tuple[Place, ...]:
    variants = (_ONE_CORE, _TWO_CORES, _KERNEL) if place.contestant == "asynclam" else (_KERNEL,)
    return tuple(Place(place.contestant, place.loop, variant) for variant in variants)


ROUND_TRIP = Row(
    1,
    "no-op round trip",
    round_trips,
    tuple(placed for place in everybody() for placed in _placed(place)),
    {"round trip": "s", "Pipe": "s"},
    _round_trip_lines,
    rounds=3,
)

# --- 2: gather -------------------------------------------------------------------------------------


async def gathered(task: Task) -> Samples:
    """As many no-op jobs in one gather as take about a third of a second."""
    async with task.contestant() as contestant:
        await contestant.gather(jobs.noop, 20)
        count = 20
        begun = perf_counter()
        await contestant.gather(jobs.noop, count)
        # Twice: the first count is so small that fixed costs rule it.
        for _ in range(2):
            rate = count / (perf_counter() - begun)
            count = int(min(20_000, max(20, rate * (0.05 if task.quick else _AIM))))
            begun = perf_counter()
            await contestant.gather(jobs.noop, count)
        rates = []
        for _ in range(task.size(4, 1)):
            begun = perf_counter()
            await contestant.gather(jobs.noop, count)
            rates.append(count / (perf_counter() - begun))
    return {"jobs": rates}


def _gather_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        us = ("jobs", ours(loop))
        pool = results.ratio(us, ("jobs", Place("ProcessPoolExecutor", loop)))
        yield Line(2, "no-op jobs in a gather ÷ ProcessPoolExecutor", loop, "", pool).at_least(6)
        best = _best_peer(results, loop)
        name = best.contestant if best else "none could run"
        ratio = results.ratio(us, ("jobs", best)) if best else None
        yield Line(2, f"÷ the best asyncio peer ({name})", loop, "", ratio).at_least(3)
        naive = results.ratio(us, ("jobs", Place("add_reader + recv()", loop)))
        yield Line(2, "÷ a naive add_reader + recv() loop", loop, "", naive)
        yield Line(2, "no-op jobs in a gather", loop, "1/s", results.figure("jobs", ours(loop)))


def _best_peer(results: Results, loop: str) -> Place | None:
    rates = {place: results.figure("jobs", place) for place in peers_on(loop)}
    measured = {place: figure.median for place, figure in rates.items() if figure}
    return max(measured, key=measured.__getitem__, default=None)


GATHER = Row(
    2, "no-op jobs in a gather", gathered, everybody(), {"jobs": "1/s"}, _gather_lines, rounds=3
)

# --- 3: map ----------------------------------------------------------------------------------------


async def mapped(task: Task) -> Samples:
    count = task.size(100_000, 2_000)
    async with task.contestant() as contestant:
        await contestant.map(jobs.increment, range(100))
        rates = []
        for _ in range(task.size(3, 1)):
            begun = perf_counter()
            results = await contestant.map(jobs.increment, range(count))
            rates.append(count / (perf_counter() - begun))
            assert results == list(range(1, count + 1))
    return {"items": rates}


def _map_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        theirs = Place("multiprocessing.Pool", "blocking")
        ratio = results.ratio(("items", ours(loop)), ("items", theirs))
        yield Line(
            3, "map_cpu over 100,000 tiny jobs ÷ multiprocessing.Pool.map", loop, "", ratio
        ).at_least(1)
        yield Line(3, "items of map_cpu", loop, "1/s", results.figure("items", ours(loop)))


MAP = Row(
    3,
    "map over tiny jobs",
    mapped,
    (*everywhere("asynclam"), *everywhere("multiprocessing.Pool")),
    {"items": "1/s"},
    _map_lines,
    rounds=3,
)

# --- 14: a long queue ------------------------------------------------------------------------------

_SHORT_QUEUE, _LONG_QUEUE, _TASKS = "10,000", "100,000", "100,000 tasks without a job"


async def queued(task: Task) -> Samples:
    """Memory when all jobs are queued and none is done, and the time until all are."""
    full, quick = (10_000, 500) if task.place.variant == _SHORT_QUEUE else (100_000, 5_000)
    count = task.size(full, quick)
    if task.place.variant == _TASKS:
        return {"memory a job": [await _memory_of_tasks(count)]}
    async with task.contestant() as contestant:
        await contestant.gather(jobs.noop, 100)
        gc.collect()
        before = processes.private_bytes()
        begun = perf_counter()
        tasks = [asyncio.ensure_future(contestant.call(jobs.noop)) for _ in range(count)]
        await asyncio.sleep(0)  # each has run up to where it waits
        memory = processes.private_bytes() - before
        await asyncio.gather(*tasks)
        taken = perf_counter() - begun
    return {"memory a job": [memory / count], "time a job": [taken / count]}


async def _memory_of_tasks(count: int) -> float:
    """What asyncio itself takes for a task that waits for a future of its own."""
    loop = asyncio.get_running_loop()

    async def wait_for(future: asyncio.Future[None]) -> None:
        await future

    gc.collect()
    before = processes.private_bytes()
    futures = [loop.create_future() for _ in range(count)]
    tasks = [asyncio.ensure_future(wait_for(future)) for future in futures]
    await asyncio.sleep(0)
    memory = processes.private_bytes() - before
    for future in futures:
        future.set_result(None)
    await asyncio.gather(*tasks)
    return memory / count


def _queue_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        long, short = ours(loop, _LONG_QUEUE), ours(loop, _SHORT_QUEUE)
        memory = results.figure("memory a job", long)
        what = "memory a queued job, its asyncio task included"
        yield Line(14, what, loop, "B", memory).at_most(1.5 * 1024)
        tasks = results.figure("memory a job", ours(loop, _TASKS))
        yield Line(14, "of which a task that waits for a future", loop, "B", tasks)
        growth = results.ratio(("time a job", long), ("time a job", short))
        # Linear, with room for the caches that 100,000 jobs overflow.
        yield Line(14, "time a job, of 100,000 ÷ of 10,000", loop, "", growth).at_most(1.25)
        yield Line(14, "time a job, of 100,000", loop, "s", results.figure("time a job", long))


QUEUE = Row(
    14,
    "100,000 jobs queued at once",
    queued,
    (
        *everywhere("asynclam", (_SHORT_QUEUE, _LONG_QUEUE, _TASKS)),
        Place("ProcessPoolExecutor", CHART_LOOP, _SHORT_QUEUE),  # the long one takes a minute
    ),
    {"memory a job": "B", "time a job": "s"},
    _queue_lines,
    rounds=3,
)

# --- 15: short jobs behind a long one --------------------------------------------------------------

_BEHIND = 20


async def behind(task: Task) -> Samples:
    """How many short jobs end after a long one that was handed in before them, or among them."""
    waited = []
    async with task.contestant() as contestant:
        call = contestant.call
        for ahead in (0, _BEHIND) * task.size(2, 1):
            # The very function that will run long has been seen to be short, hundreds of times.
            await asyncio.gather(*(call(jobs.spin, 0.0) for _ in range(500)))
            waited.append(float(await _count_waiting(call, ahead, task.size(1000, 200) / 1000)))
    return {"waited": waited}


async def _count_waiting(
    call: Callable[..., Awaitable[Any]], ahead: int, long_seconds: float
) -> int:
    ended: list[float] = []

    async def run(seconds: float) -> float:
        await call(jobs.spin, seconds)
        ended.append(perf_counter())
        return ended[-1]

    first = [asyncio.ensure_future(run(0.001)) for _ in range(ahead)]
    long = asyncio.ensure_future(run(long_seconds))
    rest = [asyncio.ensure_future(run(0.001)) for _ in range(_BEHIND)]
    end_of_long = await long
    await asyncio.gather(*first, *rest)
    return sum(end >= end_of_long for end in ended) - 1


def _behind_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        figure = results.worst("waited", ours(loop))
        what = "of 20 tasks of 1 ms behind one of 1 s, how many waited for it"
        yield Line(15, what, loop, "", figure).at_most(0)


BEHIND = Row(
    15,
    "short jobs behind a long one",
    behind,
    (
        *everywhere("asynclam"),
        *everywhere("ProcessPoolExecutor"),
        *everywhere("add_reader + recv()"),
    ),
    {"waited": ""},
    _behind_lines,
    rounds=3,
)

ROWS = (ROUND_TRIP, GATHER, MAP, QUEUE, BEHIND)
