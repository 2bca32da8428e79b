"""Rows about jobs that work: two cores, and IO and CPU at the same time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

from . import jobs, limits, processes
from .contestants import NotPossibleError
from .figures import Line, Results, Samples
from .rows import CORES, LOOPS, MIB, Row, Task, everywhere, ours

_PROBE = 200_000  # iterations
_SPEED = "ASYNCLAM_BENCHMARK_SPEED"


def iterations_for(seconds: float) -> int:
    """How much of ``jobs.burn`` takes so long on this machine, when nothing disturbs it.

    That is measured once for a run: contestants are compared whose blocks are minutes apart.
    """
    if _SPEED not in os.environ:
        measure_speed()
    return max(1, int(float(os.environ[_SPEED]) * seconds))


def measure_speed() -> None:
    """Leaves the iterations a second in the environment, for this process and its children."""
    fastest = min(_time(partial(jobs.burn, _PROBE)) for _ in range(20))
    os.environ[_SPEED] = str(_PROBE / fastest)


def _time(work: Callable[[], object]) -> float:
    begun = perf_counter()
    work()
    return perf_counter() - begun


async def _timed(work: Awaitable[object]) -> float:
    begun = perf_counter()
    await work
    return perf_counter() - begun


# --- 12: two cores ---------------------------------------------------------------------------------


async def speed_up(task: Task) -> Samples:
    """In turn: all jobs in this process, half in each of two bare processes, all in two workers.

    The bare processes show how much of a second core the machine has to give.
    """
    iterations = iterations_for(0.05)
    count = task.size(20, 4)
    speed_ups: dict[str, list[float]] = {"speed-up": [], "two bare processes": []}
    with limits.child(limits.run_jobs) as one, limits.child(limits.run_jobs) as other:
        async with task.contestant() as contestant:
            await asyncio.gather(*(contestant.call(jobs.burn, 1000) for _ in range(CORES * 2)))
            for _ in range(task.size(4, 1)):
                serial = _time(partial(jobs.burn_each, iterations, count))
                bare = _time(partial(_halves, one, other, iterations, count // 2))
                work = asyncio.gather(
                    *(contestant.call(jobs.burn, iterations) for _ in range(count))
                )
                speed_ups["speed-up"].append(serial / await _timed(work))
                speed_ups["two bare processes"].append(serial / bare)
    return speed_ups


def _halves(one: limits.Child, other: limits.Child, iterations: int, count: int) -> None:
    for child in (one, other):
        child.connection.send((jobs.burn_each, (iterations, count)))
    for child in (one, other):
        child.connection.recv()


def _speed_up_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        what = "jobs of 50 ms on two cores: speed-up"
        yield Line(12, what, loop, "", results.figure("speed-up", place)).at_least(1.95)
        bound = results.figure("two bare processes", place)
        yield Line(12, "the same in two bare processes", loop, "", bound)


SPEED_UP = Row(
    12,
    "speed-up on two cores",
    speed_up,
    (*everywhere("asynclam"), *everywhere("ProcessPoolExecutor")),
    {"speed-up": "", "two bare processes": ""},
    _speed_up_lines,
    rounds=3,
)

# --- 13: S3 and CPU --------------------------------------------------------------------------------

_BUCKET = "benchmark"
_CONCURRENT = 8  # GETs at a time
NO_SETTINGS = {  # of the user's own
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "no_proxy": "127.0.0.1",
}


async def pipeline(task: Task) -> Samples:
    """In turn: downloads alone, CPU of equal length alone, and both through one pipeline."""
    try:
        from asynclam import s3
        from asynclam._demo.seaweedfs import ServerStartError, seaweedfs
    except ImportError as error:
        raise NotPossibleError(f"S3 needs the extras s3 and demo: {error}") from error
    try:
        with seaweedfs() as server:
            os.environ.update(server.environment(), **NO_SETTINGS)
            async with s3.client() as client:
                return await _measure_pipeline(task, client, server.pid)
    except ServerStartError as error:
        raise NotPossibleError(str(error).splitlines()[0]) from error


async def _measure_pipeline(task: Task, client: Any, server: int) -> Samples:
    from asynclam import Executor

    keys = await _upload(client, task.size(200, 10), task.size(2 * MIB, MIB))
    taken: dict[str, list[float]] = {name: [] for name in _PIPELINE}
    async with Executor(CORES) as executor:
        await executor.map_cpu(jobs.burn, [1000] * 10)
        seconds = min([await _timed(_download(client, keys)) for _ in range(2)])
        # As long as the downloads, when the workers have both cores for themselves.
        iterations = iterations_for(seconds * CORES / len(keys))
        iterations = int(
            iterations * seconds / await _timed(_compute(executor, iterations, len(keys)))
        )
        for _ in range(task.size(3, 1)):
            io = await _timed(_download(client, keys))
            cpu = await _timed(_compute(executor, iterations, len(keys)))
            used = processes.cpu_seconds(server)
            both = await _timed(_both(executor, client, keys, iterations))
            used = processes.cpu_seconds(server) - used
            bound = max(io, cpu, used / CORES)
            for name, value in zip(
                _PIPELINE, (io, cpu, used / CORES, both, both / bound), strict=True
            ):
                taken[name].append(value)
    return taken


_IO, _CPU, _ALL_CPU, _BOTH, _RATIO = _PIPELINE = (
    "S3 GETs alone",
    "CPU alone",
    "all CPU seconds ÷ cores",
    "both",
    "both ÷ bound",
)


async def _upload(client: Any, count: int, nbytes: int) -> list[str]:
    from asynclam import s3

    await client.create_bucket(Bucket=_BUCKET)
    keys = [f"{number:04}" for number in range(count)]
    for key in keys:
        await s3.upload(client, _BUCKET, key, bytes(nbytes))
    return keys


async def _download(client: Any, keys: list[str]) -> None:
    from asynclam import map_io

    async with map_io(_fetch(client), keys, limit=_CONCURRENT) as downloads:
        async for _, buffer in downloads:
            buffer.close()


def _fetch(client: Any) -> Callable[[str], Awaitable[tuple[str, Any]]]:
    from asynclam import s3

    async def fetch(key: str) -> tuple[str, Any]:
        return key, await s3.download(client, _BUCKET, key)

    return fetch


async def _compute(executor: Any, iterations: int, count: int) -> None:
    async with executor.map_cpu(jobs.burn, [iterations] * count, ordered=False) as results:
        async for _ in results:
            pass


async def _both(executor: Any, client: Any, keys: list[str], iterations: int) -> None:
    from asynclam import map_io

    job = partial(jobs.burn_downloaded, iterations)
    downloads = map_io(_fetch(client), keys, limit=_CONCURRENT)
    async with executor.map_cpu(job, downloads, ordered=False) as results:
        async for _ in results:
            pass


def _pipeline_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        what = "S3 GETs and equal CPU in one pipeline ÷ the largest of three bounds"
        yield Line(13, what, loop, "", results.figure(_RATIO, place)).at_most(1.1)
        for name in _PIPELINE[:-1]:
            yield Line(13, name, loop, "s", results.figure(name, place))


PIPELINE = Row(
    13,
    "IO and CPU in one pipeline",
    pipeline,
    (*everywhere("asynclam"),),
    {_IO: "s", _CPU: "s", _ALL_CPU: "s", _BOTH: "s", _RATIO: ""},
    _pipeline_lines,
    rounds=3,
)

ROWS = (SPEED_UP, PIPELINE)
