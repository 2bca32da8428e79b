"""Small HTTP requests to the ASGI example, while its workers wait and while all of them compute.

Server, workers and client share the cores of this machine, so the client's own wait for a core counts,
too. Idle and busy take turns in one block; the ratio is of those next to each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from .figures import Results, Samples
from .rows import CORES, LOOPS, Line, Row, Task, everywhere, ours

_EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_ENDLESS = 1_000_000_000  # iterations: minutes
_IDLE, _BUSY, _RATIO = "idle, p99", "all workers computing, p99", "busy ÷ idle"
_SERVE = """\
import socket, sys, uvicorn
_, descriptor, loop = sys.argv
# Not by --fd: uvicorn takes that for an AF_UNIX socket, and leaves Nagle's algorithm on.
listener = socket.socket(fileno=int(descriptor))
settings = {"access_log": False, "timeout_graceful_shutdown": 0}
uvicorn.Server(uvicorn.Config("asgi:app", loop=loop, **settings)).run(sockets=[listener])
"""
_SECONDS_BETWEEN = 0.002  # two requests: a load under which nobody waits for another


async def small_requests(task: Task) -> Samples:
    turns, count = task.size(3, 1), task.size(1000, 50)
    samples: dict[str, list[float]] = {_IDLE: [], _BUSY: [], _RATIO: []}
    for _ in range(turns):
        with _server(task.place.loop) as url:  # a new one: nothing but its end stops the long jobs
            idle = await _p99(url, count)
            async with _computing(url):
                busy = await _p99(url, count)
        for name, value in ((_IDLE, idle), (_BUSY, busy), (_RATIO, busy / idle)):
            samples[name].append(value)
    return samples


@contextlib.contextmanager
def _server(loop: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(listener.fileno()), loop],
            cwd=_EXAMPLES,
            env={**os.environ, "ASYNCLAM_MAX_WORKERS": str(CORES)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.terminate()
            process.wait()


@contextlib.asynccontextmanager
async def _computing(url: str) -> AsyncIterator[None]:
    """Keeps all workers busy, from here on."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        jobs = [asyncio.create_task(_ask(session, f"{url}/key/{_ENDLESS}")) for _ in range(CORES)]
        await asyncio.sleep(0.2)  # they are under way
        try:
            yield
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)


async def _p99(url: str, count: int) -> float:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        for _ in range(10):
            await _ask(session, f"{url}/health")
        seconds = []
        for _ in range(count):
            before = time.perf_counter()
            await _ask(session, f"{url}/health")
            seconds.append(time.perf_counter() - before)
            await asyncio.sleep(_SECONDS_BETWEEN)
    return statistics.quantiles(seconds, n=100)[98]


async def _ask(session: Any, url: str) -> None:
    async with session.get(url) as response:
        response.raise_for_status()
        await response.read()


def _lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        what = "p99 of small HTTP requests, all workers computing ÷ idle"
        yield Line(30, what, loop, "", results.figure(_RATIO, place)).at_most(2.0)
        for name in (_IDLE, _BUSY):
            yield Line(30, name, loop, "s", results.figure(name, place))


ROWS = (
    Row(
        30,
        "small HTTP requests while workers compute",
        small_requests,
        (*everywhere("asynclam"),),
        {_IDLE: "s", _BUSY: "s", _RATIO: ""},
        _lines,
        rounds=3,
    ),
)
