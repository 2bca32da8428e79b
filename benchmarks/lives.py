"""Rows about ends: of the loop process, of a worker, and about an executor that has nothing to do."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from . import jobs
from .figures import Line, Place, Results, Samples
from .rows import LOOPS, Row, Task, everywhere, ours

_PROGRAM = Path(__file__).parent / "programs" / "workers.py"
_PLACE = Place("programs", "asyncio")
_WORKERS = 2


@contextmanager
def _program(state: str) -> Generator[list[int]]:
    """The pids of a program with two workers: workers, fork server, loop process."""
    with subprocess.Popen(
        [sys.executable, str(_PROGRAM), state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        bufsize=0,
    ) as process:
        assert process.stdout is not None
        others = json.loads(process.stdout.readline())
        yield [*(int(process.stdout.readline()) for _ in range(_WORKERS)), *others]
        process.kill()


# --- 50: what outlives the loop process ------------------------------------------------------------

_LATE = 0.1  # seconds after which nobody may be alive


async def ends(task: Task) -> Samples:
    """From SIGKILL until workers in a C call and the fork server are gone."""
    found: dict[str, list[float]] = {"gone": [], "gone with server": [], "alive": []}
    for _ in range(task.size(10, 1)):
        for name, victims in ("gone", 1), ("gone with server", 2):
            with _program("busy") as pids:
                watched = [os.pidfd_open(pid) for pid in pids]
                begun = perf_counter()
                for pid in pids[-victims:]:
                    os.kill(pid, signal.SIGKILL)
                found["alive"].append(float(_alive(watched, begun + _LATE)))
                _alive(watched, begun + 10)
                found[name].append(perf_counter() - begun)
                for descriptor in watched:
                    os.close(descriptor)
    return found


def _alive(watched: list[int], until: float) -> int:
    """How many have not ended by then; returns when all have."""
    alive = 0
    for descriptor in watched:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        alive += not poll.poll(max(0, until - perf_counter()) * 1000)
    return alive


def _end_lines(results: Results) -> Iterator[Line]:
    alive = results.worst("alive", _PLACE)
    what = "processes alive 100 ms after the loop process was SIGKILLed"
    yield Line(50, what, "", "", alive).at_most(0)
    for name, text in ("gone", "alone"), ("gone with server", "with the fork server"):
        figure = results.figure(name, _PLACE)
        yield Line(50, f"until the last of them is gone, killed {text}", "", "s", figure)


# --- 51: an idle executor --------------------------------------------------------------------------


async def idle(task: Task) -> Samples:
    """What the processes of an executor without a job do in 10 s."""
    with _program("idle") as pids:
        await asyncio.sleep(0.2)  # what they do last
        before = [_used(pid) for pid in pids]
        await asyncio.sleep(task.size(100, 2) / 10)
        after = [_used(pid) for pid in pids]
    spent = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]
    return {
        "wake-ups": [sum(wakeups for wakeups, _ in spent)],
        "cpu": [sum(seconds for _, seconds in spent)],
    }


def _used(pid: int) -> tuple[float, float]:
    """How often a process has gone to sleep, and its CPU time in seconds, of all its threads."""
    wakeups = seconds = 0.0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        status = (thread / "status").read_text(encoding="ascii")
        wakeups += float(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
        seconds += int((thread / "schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    return wakeups, seconds


def _idle_lines(results: Results) -> Iterator[Line]:
    wakeups = results.worst("wake-ups", _PLACE)
    yield Line(51, "wake-ups of an idle executor in 10 s, all processes", "", "", wakeups).at_most(
        0
    )
    yield Line(51, "CPU time of it", "", "s", results.worst("cpu", _PLACE)).at_most(0)


# --- 52: a dead worker -----------------------------------------------------------------------------


async def deaths(task: Task) -> Samples:
    """From the call of a job that kills its worker to its error, and to the next job's result."""
    from asynclam import WorkerDiedError

    failed, replaced = [], []
    async with task.contestant(workers=1) as contestant:
        await contestant.call(jobs.noop)
        for _ in range(task.size(50, 3)):
            begun = perf_counter()
            try:
                await contestant.call(signal.raise_signal, signal.SIGKILL)
            except WorkerDiedError:
                failed.append(perf_counter() - begun)
            await contestant.call(jobs.noop)
            replaced.append(perf_counter() - begun)
    return {"failed": failed, "replaced": replaced}


def _death_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        figure = results.figure("replaced", ours(loop))
        what = "a dead worker noticed, its job failed, the next one done in a new worker"
        yield Line(52, what, loop, "s", figure).at_most(0.005)
        figure = results.figure("failed", ours(loop))
        yield Line(52, "a dead worker noticed, its job failed", loop, "s", figure)


ROWS = (
    Row(
        50,
        "what outlives the loop process",
        ends,
        (_PLACE,),
        {"gone": "s", "gone with server": "s", "alive": ""},
        _end_lines,
        rounds=3,
    ),
    Row(
        51,
        "an idle executor",
        idle,
        (_PLACE,),
        {"wake-ups": "", "cpu": "s"},
        _idle_lines,
        rounds=2,
    ),
    Row(
        52,
        "a dead worker",
        deaths,
        everywhere("asynclam"),
        {"failed": "s", "replaced": "s"},
        _death_lines,
    ),
)
