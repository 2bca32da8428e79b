"""Rows about large arguments and results: copies, memory, and whether the loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any

from . import jobs, limits, processes
from .contestants import NotPossibleError
from .figures import Line, Place, Results, Samples
from .rows import CHART_LOOP, LOOPS, MIB, Row, Task, everybody, everywhere, ours

_WARM = 2  # transfers before the first that counts: segments and buffers are faulted in


def array_of(nbytes: int) -> Any:
    try:
        import numpy as np
    except ImportError as error:
        raise NotPossibleError("NumPy is not installed") from error
    return np.random.default_rng(1).integers(0, 255, nbytes, np.uint8)


def _on_chart(*, asyncio_only: bool = False) -> tuple[Place, ...]:
    """All contestants, but asynclam alone on both loops: a block takes seconds here."""
    chosen = [place for place in everybody([CHART_LOOP]) if place.contestant != "asynclam"]
    if asyncio_only:
        chosen = [place for place in chosen if place.loop == CHART_LOOP]
    naive = Place("add_reader + recv()", "asyncio")  # on uvloop it fails with large messages
    return (*everywhere("asynclam"), *chosen, naive)


# --- 4 and 5: an array to a worker, and back -------------------------------------------------------


async def argument(task: Task) -> Samples:
    return await _transfers(task, jobs.noop, limits.swallow)


async def echo(task: Task) -> Samples:
    return await _transfers(task, jobs.identity, limits.echo)


async def _transfers(
    task: Task, function: Callable[..., Any], serve: Callable[[Any], None]
) -> Samples:
    """In turn: an array through the contestant, the same over a bare Pipe, and a warm memcpy."""
    array = array_of(task.size(64, 4) * MIB)
    copy = array.copy()
    taken: dict[str, list[float]] = {"transfer": [], "Pipe": [], "memcpy": []}
    with limits.child(serve) as pipe:
        async with task.contestant(workers=1) as contestant:
            for _ in range(_WARM):
                await contestant.call(function, array)
                pipe.exchange(array)
            for _ in range(task.size(5, 2)):
                begun = perf_counter()
                result = await contestant.call(function, array)
                taken["transfer"].append(perf_counter() - begun)
                del result
                begun = perf_counter()
                pipe.exchange(array)
                taken["Pipe"].append(perf_counter() - begun)
                copy[:] = array  # the transfers have evicted both: this one warms the caches
                begun = perf_counter()
                copy[:] = array
                taken["memcpy"].append(perf_counter() - begun)
    return taken


_UNITS = {"transfer": "s", "Pipe": "s", "memcpy": "s"}


def _argument_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        what = "64 MiB NumPy argument, warm ÷ memcpy"
        ratio = results.ratio(("transfer", place), ("memcpy", place))
        yield Line(4, what, loop, "", ratio).at_most(1.5)
        pipe = results.ratio(("Pipe", place), ("transfer", place))
        yield Line(4, "Pipe ÷ 64 MiB NumPy argument", loop, "", pipe).at_least(25)
        for name in _UNITS:
            yield Line(4, f"64 MiB argument: {name}", loop, "s", results.figure(name, place))


def _echo_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        ratio = results.ratio(("Pipe", place), ("transfer", place))
        yield Line(5, "Pipe ÷ 64 MiB NumPy echo, warm", loop, "", ratio).at_least(20)
        for name in _UNITS:
            yield Line(5, f"64 MiB echo: {name}", loop, "s", results.figure(name, place))


# With asynclam, those that send large arguments in the most usual ways.
_OF_INTEREST = (
    *everywhere("asynclam"),
    Place("ProcessPoolExecutor", CHART_LOOP),
    Place("multiprocessing.Pool", "blocking"),
    Place("anyio.to_process", CHART_LOOP),
    Place("loky", CHART_LOOP),
)

ARGUMENT = Row(
    4, "64 MiB NumPy argument", argument, _OF_INTEREST, _UNITS, _argument_lines, rounds=3
)
ECHO = Row(5, "64 MiB NumPy echo", echo, _on_chart(), _UNITS, _echo_lines, rounds=2)

# --- 6: SharedBuffer -------------------------------------------------------------------------------


async def shared(task: Task) -> Samples:
    """In turn: a no-op, a buffer there and back, and one that both sides look into."""
    from asynclam import SharedBuffer

    taken: dict[str, list[float]] = {"no-op": [], "buffer": [], "buffer, written and read": []}
    async with task.contestant(workers=1) as contestant:
        with SharedBuffer(task.size(1024, 64) * MIB) as buffer:
            for _ in range(task.size(500, 20)):
                begun = perf_counter()
                await contestant.call(jobs.noop)
                taken["no-op"].append(perf_counter() - begun)

                begun = perf_counter()
                back = await contestant.call(jobs.identity, buffer)
                taken["buffer"].append(perf_counter() - begun)
                back.close()

                begun = perf_counter()
                back = await contestant.call(jobs.stamp, buffer)
                assert back.view[buffer.nbytes // 2] == 1
                taken["buffer, written and read"].append(perf_counter() - begun)
                back.close()
                buffer.view[buffer.nbytes // 2] = 0
    return taken


def _shared_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        noop = ("no-op", place)
        ratio = results.ratio(("buffer", place), noop)
        what = "1 GiB SharedBuffer to a worker and back ÷ a no-op"
        yield Line(6, what, loop, "", ratio).at_most(5)
        used = results.ratio(("buffer, written and read", place), noop)
        yield Line(6, "the same, written there and read here", loop, "", used)
        yield Line(6, "1 GiB there and back", loop, "s", results.figure("buffer", place))


SHARED = Row(
    6,
    "1 GiB SharedBuffer",
    shared,
    everywhere("asynclam"),
    {"no-op": "s", "buffer": "s", "buffer, written and read": "s"},
    _shared_lines,
    rounds=3,
)

# --- 7: is the loop free? --------------------------------------------------------------------------

_BYTES, _NUMPY, _GRAPH = "bytes", "NumPy", "a million objects"


class Ticker:
    """Wants to run every millisecond, and knows the longest time that it did not."""

    def __init__(self) -> None:
        self._last = perf_counter()
        self._longest = 0.0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            self._tick()

    def _tick(self) -> None:
        now = perf_counter()
        self._longest = max(self._longest, now - self._last)
        self._last = now

    async def longest_of(self, work: Callable[[], Awaitable[object]]) -> tuple[float, object]:
        """The longest gap while ``work`` is awaited, and what it returned."""
        await asyncio.sleep(0.005)
        self._longest = 0.0
        result = await work()
        self._tick()  # a gap that has not ended is one, too
        return self._longest, result


@asynccontextmanager
async def watched() -> AsyncGenerator[Ticker]:
    ticker = Ticker()
    task = asyncio.ensure_future(ticker.run())
    yield ticker
    task.cancel()


async def stalls(task: Task) -> Samples:
    """The ticker's longest gap with nothing else on the loop, during an echo, and while it is freed."""
    payload = _payload(task)
    gaps: dict[str, list[float]] = {"idle": [], "echo": [], "release": []}
    async with task.contestant(workers=1) as contestant, watched() as ticker:

        async def send() -> object:
            return await contestant.call(jobs.identity, payload)

        held: list[object] = []

        async def release() -> None:
            held.clear()

        await send()
        for _ in range(task.size(3, 1)):
            begun = perf_counter()
            gap, result = await ticker.longest_of(send)
            taken = perf_counter() - begun
            gaps["echo"].append(gap)
            held.append(result)
            del result
            gaps["release"].append((await ticker.longest_of(release))[0])
            gaps["idle"].append((await ticker.longest_of(partial(asyncio.sleep, taken)))[0])
    return gaps


def _payload(task: Task) -> Any:
    nbytes = task.size(256, 8) * MIB
    if task.place.variant == _NUMPY:
        return array_of(nbytes)
    if task.place.variant == _GRAPH:
        # A list of pairs of an int and a string, three objects each.
        return [(number, str(number)) for number in range(1000, task.size(334_333, 10_000))]
    return b"\1" * nbytes  # bytes(nbytes) would be the same page of zeros all over


def _stall_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop, _BYTES)
        longest = results.figure("echo", place)
        what = "longest gap of a 1 ms ticker while 256 MiB of bytes goes each way"
        yield Line(7, what, loop, "s", longest).at_most(0.005)
        for name, text in (("idle", "without it"), ("release", "while the result is freed")):
            yield Line(
                7, f"the ticker's longest gap {text}", loop, "s", results.figure(name, place)
            )
        for variant, text in ((_NUMPY, "256 MiB of NumPy"), (_GRAPH, "a million objects")):
            figure = results.figure("echo", ours(loop, variant))
            yield Line(7, f"with {text} each way", loop, "s", figure)


STALL = Row(
    7,
    "longest stall of the loop",
    stalls,
    (
        *everywhere("asynclam", (_BYTES, _NUMPY, _GRAPH)),
        *(
            Place(place.contestant, place.loop, _BYTES)
            for place in _on_chart(asyncio_only=True)
            if place.contestant != "asynclam"
        ),
    ),
    {"idle": "s", "echo": "s", "release": "s"},
    _stall_lines,
    rounds=2,
)

# --- 8: memory -------------------------------------------------------------------------------------


async def peak_memory(task: Task) -> Samples:
    """What a first large argument adds to the memory of all processes, while a worker reads it."""
    array = array_of(task.size(256, 64) * MIB)
    with processes.peak_watch() as watch:
        async with task.contestant(workers=1) as contestant:
            await contestant.call(jobs.read_all, array[:1000])  # NumPy is imported there
            watch.ask()
            before = watch.ask()
            await contestant.call(jobs.read_all, array)
            after = watch.ask()
    pss, shmem = ((high - low) / array.nbytes for high, low in zip(after, before, strict=True))
    return {"PSS added": [pss], "Shmem added": [shmem]}


def _memory_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        added = results.figure("PSS added", ours(loop))
        what = "peak PSS that a 256 MiB NumPy argument adds ÷ its size"
        yield Line(8, what, loop, "", added).at_most(1.2)
        shmem = results.figure("Shmem added", ours(loop))
        yield Line(8, "the same of the system's Shmem, mapped or not", loop, "", shmem)


MEMORY = Row(
    8,
    "peak memory of an argument",
    peak_memory,
    _OF_INTEREST,
    {"PSS added": "", "Shmem added": ""},
    _memory_lines,
    rounds=3,
)

ROWS = (ARGUMENT, ECHO, SHARED, STALL, MEMORY)
