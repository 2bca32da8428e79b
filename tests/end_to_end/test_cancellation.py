"""Cancelling an await stops the work, and nothing but that work."""

import asyncio
import os

import anyio
import pytest

from asynclam import Executor
from tests import jobs
from tests.parts.gate import pass_through
from tests.parts.processes import ended


@pytest.fixture
async def executor():
    async with Executor(2) as executor:
        yield executor


async def gone(pid: int) -> None:
    """Waits until a process is gone: the fork server has reaped it."""
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(0)


async def test_cancel(executor, gate):
    """A cancelled job's worker is killed, at once; the executor has another for the next job."""
    task = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path))
    pid = await gate.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(pid)
    assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_siblings_go_on(executor, gate):
    """Cancelling one job does not touch the others."""
    first = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "first"))
    await gate.entered()
    second = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "second"))
    await gate.entered()
    third = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "third"))
    first.cancel()
    await gate.entered()
    gate.open(2)
    assert await asyncio.gather(second, third) == ["second", "third"]
    assert first.cancelled()


async def test_a_job_that_waits_is_dropped(gate):
    """A job that no worker has is dropped: no worker is killed for it."""
    async with Executor(1) as executor:
        running = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "result"))
        pid = await gate.entered()
        waiting = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path))
        await asyncio.sleep(0)
        waiting.cancel()
        gate.open()
        assert await running == "result"
        assert waiting.cancelled()
        assert await executor.run_cpu(jobs.pid) == pid
        assert gate.nobody_entered()


@pytest.mark.parametrize("how", ["timeout", "wait_for", "fail_after", "move_on_after"])
async def test_timeouts(executor, gate, how):
    """The timeouts of asyncio and anyio stop the work."""

    async def wait():
        if how == "timeout":
            async with asyncio.timeout(0.05):
                await executor.run_cpu(pass_through, gate.path)
        elif how == "wait_for":
            await asyncio.wait_for(executor.run_cpu(pass_through, gate.path), 0.05)
        elif how == "fail_after":
            with anyio.fail_after(0.05):
                await executor.run_cpu(pass_through, gate.path)
        else:
            with anyio.move_on_after(0.05) as scope:
                await executor.run_cpu(pass_through, gate.path)
            if scope.cancelled_caught:
                raise TimeoutError

    if how == "timeout" and not hasattr(asyncio, "timeout"):
        pytest.skip("asyncio.timeout came with Python 3.11")
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        await wait()
    assert executor.statistics().workers_busy == 0
    assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_task_group(executor, gate):
    """An error in a task group cancels the jobs of its siblings."""

    async def fail():
        await gate.entered()
        raise KeyError("sibling")

    # anyio's group of one error, as asyncio's, is an exception group.
    with pytest.raises(BaseException) as caught:  # noqa: PT012
        async with anyio.create_task_group() as group:
            group.start_soon(executor.run_cpu, pass_through, gate.path)
            group.start_soon(fail)
    assert isinstance(caught.value.exceptions[0], KeyError)
    assert executor.statistics().workers_busy == 0


async def test_cancelling_a_map(executor, gate):
    """Cancelling whoever awaits a map cancels its jobs."""
    task = asyncio.ensure_future(executor.map_cpu(pass_through, [gate.path] * 10).list())
    pids = [await gate.entered(), await gate.entered()]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for pid in pids:
        await gone(pid)
    assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_leaving_a_stream_early(executor, gate):
    """Leaving ``async with`` kills what still runs."""
    async with executor.map_cpu(pass_through, [gate.path] * 10, ordered=False) as stream:
        pids = [await anext_entered(stream, gate), await gate.entered()]
    await gone(pids[1])
    assert await executor.run_cpu(jobs.echo, 1) == 1


async def anext_entered(stream, gate):
    """Starts the stream, lets the first job through, and takes its result."""
    first = asyncio.ensure_future(anext(stream))
    pid = await gate.entered()
    gate.open()
    await first
    return pid


async def test_cancelling_while_a_large_call_is_sent(executor):
    """A cancel while the call is still in the buffer stops it; the next job is whole."""
    big = bytes(64 << 20)
    task = asyncio.ensure_future(executor.run_cpu(len, big))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await executor.run_cpu(len, big) == 64 << 20


async def test_cancelling_close_kills(gate):
    """Whoever is cancelled while waiting for the jobs to end kills them."""
    executor = Executor(1)
    job = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path))
    pid = await gate.entered()
    closing = asyncio.ensure_future(executor.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(Exception, match="killed"):
        await job
    await gone(pid)


async def test_what_a_job_has_spawned_ends_with_it(executor, gate):
    """A cancelled job's own children are gone, too: a worker is a process group."""
    task = asyncio.ensure_future(executor.run_cpu(spawn_and_wait, gate.path))
    worker, child = await gate.entered(), await gate.entered()
    assert worker != child
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(worker)
    await ended(child)


async def test_a_job_that_has_left_its_group(executor, gate):
    """A job that has left its process group is killed all the same, and nothing else is."""
    server = await executor.run_cpu(jobs.parent_pid)
    task = asyncio.ensure_future(executor.run_cpu(jobs.leave_the_group, gate.path))
    pid = await gate.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(pid)
    assert await executor.run_cpu(jobs.parent_pid) == server


def spawn_and_wait(path):
    if os.fork() == 0:
        pass_through(path)
        os._exit(0)
    return pass_through(path)
