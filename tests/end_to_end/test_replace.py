"""Workers that are replaced by request: after a restore from a snapshot, for one."""

import asyncio
import os
import random

import numpy as np
import numpy.random  # so that the workers' parent has it, and its state
import pytest

from asynclam import Executor
from tests import jobs
from tests.parts.gate import pass_through


@pytest.fixture(params=["fork", "spawn"])
async def executor(request):
    async with Executor(1, start_method=request.param) as executor:
        yield executor


def seed(value):
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the state that a fork copies


def draw():
    return random.random(), np.random.rand()  # noqa: NPY002


async def test_random_numbers(executor):
    """A new worker draws its own, whatever the state of the one before, or of what forks them."""
    drawn = []
    for replaced in False, True, True:
        await executor.run_cpu(seed, 1)
        if replaced:
            executor.replace_workers()
        drawn += await executor.run_cpu(draw)
    assert len(set(drawn)) == 6


async def test_state_is_that_of_the_moment(executor, monkeypatch):
    """A new worker has the environment of now."""
    pid = await executor.run_cpu(jobs.pid)
    monkeypatch.setenv("SET_LATER", "yes")
    assert await executor.run_cpu(os.getenv, "SET_LATER") is None
    executor.replace_workers()
    assert await executor.run_cpu(os.getenv, "SET_LATER") == "yes"
    assert await executor.run_cpu(jobs.pid) != pid


async def test_no_job_is_harmed(executor, gate):
    """What runs goes on to its end; what waits has the new worker."""
    running = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "done"))
    old = await gate.entered()
    waiting = asyncio.ensure_future(executor.run_cpu(jobs.pid))
    executor.replace_workers()
    gate.open()
    assert await running == "done"
    assert await waiting != old
    now = executor.statistics()
    assert (now.worker_deaths, now.workers_spent, now.workers_grown) == (0, 0, 0)


async def test_in_another_thread(executor):
    """It may be called from any thread, as signal handlers and hooks are."""
    pid = await executor.run_cpu(jobs.pid)
    await asyncio.to_thread(executor.replace_workers)
    assert await executor.run_cpu(jobs.pid) != pid


@pytest.mark.parametrize("closed", [True, False])
def test_between_two_turns_of_a_loop(closed):
    """While no loop runs, as in a hook of the Lambda runtime: the next job has another worker."""
    executor = Executor(1)
    loop = asyncio.new_event_loop()
    pid = loop.run_until_complete(executor.run_cpu(jobs.pid))
    if closed:
        loop.close()
    executor.replace_workers()
    if closed:
        loop = asyncio.new_event_loop()
    assert loop.run_until_complete(executor.run_cpu(jobs.pid)) != pid
    loop.run_until_complete(executor.aclose())
    loop.close()


async def test_without_workers():
    """Where there are no workers, and where there are none yet, it does nothing."""
    async with Executor(0) as inline, Executor(1) as executor:
        inline.replace_workers()
        executor.replace_workers()
        assert await inline.run_cpu(jobs.echo, 1) == await executor.run_cpu(jobs.echo, 1) == 1
        inline.replace_workers()
