"""Frozen and thawed, all together or some of them, at any point: nothing is lost, nothing run twice."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

import asynclam
from asynclam import Executor, _pool
from tests import jobs
from tests.parts.processes import children, state_of

ROOT = Path(asynclam.__file__).parent.parent
FREEZES = 25


class Frozen:
    """A program of tests/parts/frozen.py, and its processes."""

    def __init__(self, process):
        self.loop = process.pid
        self._output = process.stdout
        self.server = int(self._output.readline())

    def beats(self, count):
        """Waits until the loop has run on for a while."""
        for _ in range(count):
            assert self._output.readline() == b"beat\n"

    def workers(self):
        return children(self.server)

    def outcome(self):
        while (line := self._output.readline()) == b"beat\n":
            pass
        return json.loads(line)


@contextlib.contextmanager
def stopped(pids):
    """Stops processes, and waits until they do not run."""
    with contextlib.ExitStack() as stack:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # a worker that has ended
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                stack.callback(_signal, descriptor, signal.SIGCONT)
                _signal(descriptor, signal.SIGSTOP)
        for pid in pids:
            while _runs(pid):
                os.sched_yield()
        yield


def _signal(descriptor, number):
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


def _runs(pid):
    return state_of(pid) not in {"", "T", "Z", "X"}


def yield_for(turns):
    """Lets others run for a while that is never the same."""
    for _ in range(random.randrange(turns)):
        os.sched_yield()


def everybody(frozen):
    with stopped([frozen.loop, frozen.server, *frozen.workers()]):
        yield_for(100)


def the_loop(frozen):
    with stopped([frozen.loop]):
        yield_for(3000)


def a_worker(frozen):
    with stopped(random.sample(frozen.workers(), 1) if frozen.workers() else []):
        frozen.beats(random.randrange(4))


def all_workers(frozen):
    with stopped(frozen.workers()):
        frozen.beats(random.randrange(4))


def the_fork_server(frozen):
    with stopped([frozen.server]):
        frozen.beats(random.randrange(4))


@pytest.mark.alone
@pytest.mark.parametrize("freeze", [everybody, the_loop, a_worker, all_workers, the_fork_server])
def test_freeze(freeze, tmp_path):
    """In the middle of short jobs, a large result, a start, a cancel: each job has its one outcome."""
    path = tmp_path / "noted"
    path.touch()
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-m", "tests.parts.frozen", "fork", path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            frozen = Frozen(process)
            for _ in range(FREEZES):
                frozen.beats(1)
                yield_for(3000)
                freeze(frozen)
            process.stdin.close()
            outcome = frozen.outcome()
        finally:
            process.kill()
    assert outcome["wrong"] == []
    assert outcome["rounds"] > FREEZES


async def test_a_clock_that_jumps(monkeypatch):
    """Days that pass between two lines make nobody impatient with a job."""
    loop, days = asyncio.get_running_loop(), 0

    def jumping(clock):
        return lambda: clock() + days * 86_400

    monkeypatch.setattr(_pool, "perf_counter", jumping(perf_counter))
    if isinstance(loop, asyncio.BaseEventLoop):  # the clock of uvloop is its own
        monkeypatch.setattr(loop, "time", jumping(loop.time))
    async with Executor(2) as executor:
        for _ in range(10):
            tasks = [asyncio.ensure_future(executor.run_cpu(jobs.echo, n)) for n in range(100)]
            tasks.append(asyncio.ensure_future(executor.run_cpu(jobs.echo, bytes(3 << 20))))
            for _ in range(5):
                await asyncio.sleep(0)
                days += 1
            *numbers, large = await asyncio.gather(*tasks)
            assert (numbers, len(large)) == (list(range(100)), 3 << 20)
        assert executor.statistics().worker_deaths == 0
        assert executor.statistics().jobs_completed == 10 * 101
