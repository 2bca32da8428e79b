"""Cancelling an await stops the work, and nothing but that work."""

import asyncio
import os
import subprocess
import sys

import anyio
import pytest

from asynclam import Executor, _job
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


# --- whoever cancels -------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(asyncio, "TaskGroup"), reason="came with Python 3.11")
async def test_asyncio_task_group(executor, gate):
    """An error in asyncio's own task group stops the jobs of its siblings, too."""

    async def fail():
        pids.append(await gate.entered())
        raise KeyError("sibling")

    pids = []
    with pytest.raises(BaseException) as caught:  # noqa: PT012 - a group of one error
        async with asyncio.TaskGroup() as group:
            group.create_task(executor.run_cpu(pass_through, gate.path))
            group.create_task(fail())
    assert isinstance(caught.value.exceptions[0], KeyError)
    await gone(pids[0])


async def test_a_native_cancel_passes_an_anyio_shield(executor, gate):
    """Anyio's shield keeps out anyio's cancels; a cancel of the task stops the work."""

    async def run():
        with anyio.CancelScope(shield=True):
            await executor.run_cpu(pass_through, gate.path)

    task = asyncio.ensure_future(run())
    pid = await gate.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(pid)


@pytest.mark.parametrize("which", ["anyio", "asyncio"])
async def test_a_shielded_job_goes_on(executor, gate, which):
    """What is shielded is not cancelled: the job runs to its end, in its worker."""

    async def shielded():
        if which == "anyio":
            with anyio.CancelScope(shield=True):
                results.append(await executor.run_cpu(pass_through, gate.path, "result"))
        else:
            inner.append(asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "result")))
            await asyncio.shield(inner[0])

    results, inner = [], []
    scope = anyio.CancelScope()

    async def run():
        with scope:
            await shielded()

    task = asyncio.ensure_future(run())
    await gate.entered()
    scope.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    gate.open()
    await task
    for shielded_task in inner:
        results.append(await shielded_task)
    assert results == ["result"]
    assert executor.statistics().jobs_cancelled == 0


async def test_cancelled_twice(executor, gate):
    """Two cancels in one turn, and one after the end, are one cancel: one worker is killed."""
    task = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path))
    killed = await gate.entered()
    other = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "other"))
    kept = await gate.entered()
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not task.cancel()
    assert executor.statistics().jobs_cancelled == 1
    await gone(killed)
    gate.open()
    assert await other == "other"
    assert await executor.run_cpu(jobs.pid) == kept


async def test_cancelled_before_it_has_begun(executor):
    """A task that is cancelled before its first turn starts no worker."""
    task = asyncio.ensure_future(executor.run_cpu(jobs.pid))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    now = executor.statistics()
    assert (now.workers_starting, now.jobs_cancelled) == (0, 0)


async def test_cancelled_while_its_worker_starts(executor):
    """The worker that was started for it serves the next job."""
    task = asyncio.ensure_future(executor.run_cpu(jobs.pid))
    while not executor.statistics().workers_starting:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await executor.run_cpu(jobs.echo, 1) == 1
    now = executor.statistics()
    assert (now.workers_idle, now.jobs_cancelled, now.jobs_completed) == (1, 1, 1)


async def test_cancelled_when_the_result_is_there(executor, gate, monkeypatch):
    """A cancel in the turn in which the result arrives is a cancel, and harms no worker."""
    succeed = _job.Job.succeed

    def succeed_and_cancel(job, result):
        succeed(job, result)
        task.cancel()

    task = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "result"))
    pid = await gate.entered()
    monkeypatch.setattr(_job.Job, "succeed", succeed_and_cancel)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await executor.run_cpu(jobs.pid) == pid
    assert executor.statistics().jobs_cancelled == 0


@pytest.mark.skipif(not hasattr(asyncio, "timeout"), reason="came with Python 3.11")
async def test_the_outer_timeout_of_two(executor, gate):
    """The timeout that has expired is the one that is raised; the job is stopped."""

    async def run():
        async with asyncio.timeout(None) as outer:
            async with asyncio.timeout(3600):
                timeouts.append(outer)
                await executor.run_cpu(pass_through, gate.path)

    timeouts = []
    task = asyncio.ensure_future(run())
    pid = await gate.entered()
    timeouts[0].reschedule(asyncio.get_running_loop().time())
    with pytest.raises(TimeoutError):
        await task
    await gone(pid)


async def test_many_at_once(executor):
    """Of a thousand short jobs, those that are cancelled are, and the others have their results."""
    tasks = [asyncio.ensure_future(executor.run_cpu(jobs.echo, number)) for number in range(1000)]
    while executor.statistics().jobs_completed < 100:
        await asyncio.sleep(0)
    for task in tasks[::3]:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for number, outcome in enumerate(outcomes):
        assert outcome == number or (
            number % 3 == 0 and isinstance(outcome, asyncio.CancelledError)
        )
    now = executor.statistics()
    assert now.jobs_completed + now.jobs_cancelled >= 1000
    assert (now.jobs_queued, now.worker_deaths) == (0, 0)


# --- the end of the loop ---------------------------------------------------------------------------


def test_at_the_end_of_the_program(gate):
    """``asyncio.run`` cancels what is left: its workers are gone, and the executor serves the next loop."""
    executor = Executor(2)

    async def leave():
        leave.tasks = [
            asyncio.ensure_future(executor.run_cpu(pass_through, gate.path)) for _ in range(3)
        ]
        return await gate.entered(), await gate.entered()

    async def go_on(pids):
        assert await executor.run_cpu(jobs.echo, 1) == 1
        for pid in pids:
            await gone(pid)
        await executor.aclose()

    pids = asyncio.run(leave())
    assert all(task.cancelled() for task in leave.tasks)
    asyncio.run(go_on(pids))


def test_a_loop_that_is_closed_without_a_word(gate):
    """A loop that is closed with jobs under way takes them along; the next one has other workers."""
    executor = Executor(1)

    async def start():
        start.task = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path))
        return await gate.entered()

    async def go_on(pid):
        assert await executor.run_cpu(jobs.pid) != pid
        await gone(pid)
        await executor.aclose()

    loop = asyncio.new_event_loop()
    pid = loop.run_until_complete(start())
    loop.close()
    asyncio.run(go_on(pid))
    start.task._log_destroy_pending = False  # nobody can end it any more


# --- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wait_for", "fail_after"])
async def test_a_timeout_of_a_stream(executor, gate, how):
    """A timeout stops all chunks of a map, and closes its source."""
    closed = []

    async def source():
        try:
            for _ in range(10):
                yield gate.path
        finally:
            closed.append(True)

    async def wait():
        if how == "wait_for":
            await asyncio.wait_for(executor.map_cpu(pass_through, source()).list(), 0.05)
        else:
            with anyio.fail_after(0.05):
                await executor.map_cpu(pass_through, source())

    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        await wait()
    assert closed == [True]
    assert executor.statistics().workers_busy == 0
    assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_a_cancel_in_the_body_of_the_loop(executor, gate):
    """A task that is cancelled while it does something else with a result stops the rest."""

    async def consume():
        async with executor.map_cpu(pass_through, [gate.path] * 10, chunksize=1) as stream:
            async for _ in stream:
                await asyncio.Event().wait()

    task = asyncio.ensure_future(consume())
    first, second = await gate.entered(), await gate.entered()
    gate.open()
    last = await gate.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for pid in {first, second, last}:
        await gone(pid)


async def test_a_cancel_while_the_source_is_awaited(executor, gate):
    """A task that waits for the source's next item is cancelled at once, and the job with it."""

    async def source():
        yield gate.path
        await asyncio.Event().wait()

    task = asyncio.ensure_future(executor.map_cpu(pass_through, source()).list())
    pid = await gate.entered()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(pid)


# --- what a job has spawned ------------------------------------------------------------------------


async def test_a_family_of_processes(executor, gate):
    """Children and their children end with the job, whatever they were started with."""
    task = asyncio.ensure_future(executor.run_cpu(spawn_a_family, gate.path))
    pids = {await gate.entered() for _ in range(3)}
    assert len(pids) == 3
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for pid in pids:
        await ended(pid)


def spawn_a_family(path):
    """Runs a shell, which runs a Python, which forks."""
    program = (
        f"import os, sys; sys.path.insert(0, {os.getcwd()!r})\n"
        "from tests.parts.gate import pass_through\n"
        f"os.fork(); pass_through({path!r})"
    )
    child = subprocess.Popen(["sh", "-c", f'{sys.executable} -c "$0"; true', program])
    pass_through(path)
    child.wait()
