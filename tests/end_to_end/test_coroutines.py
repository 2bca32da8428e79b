"""``run_async``: coroutine functions in workers, many at once, on a loop that lives as long as the worker."""

import asyncio
import contextvars
import inspect
import logging
import os
import signal

import anyio
import numpy as np
import pytest

import asynclam
from asynclam import (
    Executor,
    ExecutorClosedError,
    JobExitError,
    PayloadError,
    SharedBuffer,
    WorkerDiedError,
    WorkerStartError,
)
from tests import coroutine_jobs as jobs
from tests.logging_jobs import NAME, request

MANY = 50
MIB = 1 << 20


@pytest.fixture(params=[1, 0], ids=["worker", "inline"])
async def executor(request):
    async with Executor(request.param) as executor:
        yield executor


# --- what comes of them ------------------------------------------------------------------------------


async def test_a_result(executor):
    """It is what the coroutine returned; keyword arguments go as with ``run_cpu``."""
    assert await executor.run_async(jobs.echo, [1, {"two": 3}], after=0) == [1, {"two": 3}]
    assert await executor.run_async(jobs.echo, "value") == "value"


async def test_they_run_at_once(executor, gate):
    """Many wait side by side in one worker, none behind another."""
    tasks = [
        asyncio.ensure_future(executor.run_async(jobs.through, gate.path, number))
        for number in range(MANY)
    ]
    assert len({await gate.entered() for _ in tasks}) == 1
    assert executor.statistics().jobs_running == MANY
    assert [name for name, _ in executor.under_way()[0]] == ["tests.coroutine_jobs.through"] * MANY
    gate.open(MANY)
    assert await asyncio.gather(*tasks) == list(range(MANY))


async def test_they_are_spread_evenly(gate):
    """Each worker has its share, also of those that came before it had started."""
    async with Executor(2) as executor:
        tasks = [
            asyncio.ensure_future(executor.run_async(jobs.through, gate.path)) for _ in range(MANY)
        ]
        pids = [await gate.entered() for _ in tasks]
        gate.open(MANY)
        await asyncio.gather(*tasks)
    assert {pids.count(pid) for pid in pids} == {MANY // 2}


async def test_more_than_fit(gate):
    """A worker runs 64 at once; what is more waits, and runs as these end, each in its turn."""
    async with Executor(1) as executor:
        tasks = [
            asyncio.ensure_future(executor.run_async(jobs.through, gate.path, number))
            for number in range(100)
        ]
        for _ in range(64):
            await gate.entered()
        now = executor.statistics()
        assert (now.jobs_running, now.jobs_queued) == (64, 36)
        gate.open(10)
        for _ in range(10):
            await gate.entered()
        now = executor.statistics()
        assert (now.jobs_running, now.jobs_queued, now.jobs_completed) == (64, 26, 10)
        gate.open(90)
        assert await asyncio.gather(*tasks) == list(range(100))


async def test_an_exception(executor):
    """It is raised as itself, with the worker's traceback, which begins with the user's code."""
    with pytest.raises(KeyError, match="key") as caught:
        await executor.run_async(jobs.fail, KeyError("key"))
    if hasattr(caught.value, "__notes__"):
        assert "in fail" in caught.value.__notes__[0]
        assert "_coroutines.py" not in caught.value.__notes__[0]
    assert await executor.run_async(jobs.echo, 1) == 1


@pytest.mark.parametrize(
    "error", [SystemExit(1), asyncio.CancelledError(), KeyboardInterrupt(), GeneratorExit()]
)
async def test_an_exception_that_would_end_something_else(executor, error):
    """It is a JobExitError, and ends neither the worker nor its loop."""
    with pytest.raises(JobExitError) as caught:
        await executor.run_async(jobs.fail, error)
    assert type(caught.value.original) is type(error)
    assert await executor.run_async(jobs.echo, 1) == 1


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt()])
async def test_an_exit_of_a_task(error):
    """One that leaves the worker's loop by another task is for who awaits that, and for nobody beside it."""
    async with Executor(1) as executor:
        beside = asyncio.ensure_future(executor.run_async(jobs.echo, "beside", after=0.05))
        with pytest.raises(JobExitError) as caught:
            await executor.run_async(jobs.fail_in_task, error)
        assert type(caught.value.original) is type(error)
        assert await beside == "beside"


async def test_stop_iteration(executor):
    """A coroutine cannot raise it: Python has made a RuntimeError of it (PEP 479)."""
    with pytest.raises(RuntimeError, match="StopIteration"):
        await executor.run_async(jobs.fail, StopIteration())


async def test_by_value(executor):
    """A coroutine function that workers cannot import goes by value, with what it refers to."""
    number = 5

    async def local(other):
        await asyncio.sleep(0)
        return number + other

    assert await executor.run_async(local, 2) == 7


@pytest.mark.parametrize("nbytes", [100, 1 << 20, 8 << 20])
async def test_large_arguments_and_results(executor, nbytes):
    """Arrays, bytes and buffers travel as with ``run_cpu``, beside each other."""
    array = np.arange(nbytes // 8)
    data = bytes(nbytes)
    arrays = [executor.run_async(jobs.echo, array + number) for number in range(3)]
    found = await asyncio.gather(executor.run_async(jobs.echo, data), *arrays)
    assert found[0] == data
    assert all((found[1 + number] == array + number).all() for number in range(3))
    with SharedBuffer(nbytes) as buffer:
        buffer.view[:4] = b"here"
        there = await executor.run_async(jobs.echo, buffer)
        with there:
            there.view[:4] = b"back"
        assert bytes(buffer.view[:4]) == b"back"


async def test_memory_that_several_return(executor):
    """Each result is what its coroutine has left in it, not what the next one has written there."""
    found = await asyncio.gather(*(executor.run_async(jobs.fill, number) for number in range(8)))
    assert [set(result) for result in found] == [{number} for number in range(8)]


async def test_what_cannot_travel(executor):
    """Arguments are refused at the door, results in the worker; neither harms the others."""
    with pytest.raises(PayloadError, match=r"argument 0 of .*echo"):
        await executor.run_async(jobs.echo, (_ for _ in ()))
    with pytest.raises(PayloadError, match="result of"):
        await executor.run_async(jobs.a_generator)


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (len, r"run_cpu\(len, \.\.\.\)"),
        (jobs.made_here, "coroutine function"),
        (5, r"run_async\(fn, x\), not run_async\(fn\(x\)\)"),
    ],
)
async def test_no_coroutine_function(fn, message):
    """The message has the right call."""
    with pytest.raises(TypeError, match=message):
        await asynclam.run_async(fn)


async def test_a_coroutine():
    """A coroutine that was made already is refused, and is not left to warn that nobody awaited it."""
    coroutine = jobs.echo(1)
    with pytest.raises(TypeError, match="not run_async"):
        await asynclam.run_async(coroutine)
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


async def test_run_cpu_names_it():
    """A coroutine function given to ``run_cpu`` leads here."""
    with pytest.raises(TypeError, match=r"run_async\(echo, \.\.\.\)"):
        await asynclam.run_cpu(jobs.echo, 1)


# --- the loop of a worker ---------------------------------------------------------------------------


async def test_the_loop_lives_on():
    """One loop for all coroutines of a worker, uvloop's; what they leave there goes on."""
    async with Executor(1) as executor:
        assert await executor.run_async(jobs.loop_name) == "uvloop"
        await executor.run_async(jobs.leave_a_task, "left")
        assert await executor.run_async(jobs.result_of_the_task) == "left"


async def test_plain_jobs_run_outside_of_it():
    """They may have loops of their own; both sorts take turns in one worker."""
    async with Executor(1) as executor:
        for number in range(3):
            assert await executor.run_async(jobs.echo, number) == number
            assert await executor.run_cpu(jobs.run_own_loop, number) == number
        mixed = [
            executor.run_async(jobs.echo, number)
            if number % 3
            else executor.run_cpu(jobs.run_own_loop, number)
            for number in range(30)
        ]
        assert await asyncio.gather(*mixed) == list(range(30))


async def test_an_async_initializer():
    """It runs once in each worker, on the loop of the coroutines, before the first job of any sort."""
    async with Executor(1, initializer=jobs.make, initargs=("client",)) as executor:
        assert await executor.run_cpu(jobs.made_here) == ["client"]
        assert await executor.run_async(jobs.made) == [(True, "client")]


async def test_an_async_initializer_that_fails():
    """Jobs fail with WorkerStartError, as with a plain one."""
    async with Executor(1, initializer=jobs.fail, initargs=(ValueError("no"),)) as executor:
        with pytest.raises(WorkerStartError, match="ValueError: no"):
            await executor.run_async(jobs.echo, 1)


async def test_an_executor_that_is_left_while_the_initializer_waits(gate):
    """A worker that is still being initialised does not keep it."""
    executor = Executor(1, initializer=jobs.through, initargs=(gate.path,))
    task = asyncio.ensure_future(executor.run_async(jobs.echo, 1))
    await gate.entered()
    executor.kill()
    with pytest.raises(ExecutorClosedError):
        await task


async def test_uvloop_or_not(executor):
    """``asyncio.run`` in a coroutine is refused as everywhere, and harms nothing."""
    with pytest.raises(RuntimeError, match="running event loop"):
        await executor.run_async(jobs.run_a_loop, 1)


# --- what they carry -----------------------------------------------------------------------------------


async def test_each_has_its_own_context(gate):
    """Context variables are the caller's; log records come back in his context, in any order."""
    seen = []

    class Handler(logging.Handler):
        def emit(self, record):
            seen.append((record.getMessage(), request.get()))

    handler = Handler()
    logger = logging.getLogger(NAME)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        async with Executor(1, context_vars=[request]) as executor:

            async def call(name):
                request.set(name)
                return await executor.run_async(jobs.say, f"says {name}", gate.path)

            tasks = [asyncio.get_running_loop().create_task(call(name)) for name in ("a", "b", "c")]
            for _ in tasks:
                await gate.entered()
            gate.open(3)
            found = await asyncio.gather(*tasks)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    assert found == [(name, float("inf")) for name in "abc"]
    assert sorted(seen) == [(f"says {name}", name) for name in "abc"]


async def test_contexts_are_fresh(executor):
    """What one sets, the next does not see."""
    for _ in range(2):
        context = contextvars.copy_context()
        task = context.run(asyncio.ensure_future, executor.run_async(jobs.carried))
        assert await task == "unset"


# --- cancelled ---------------------------------------------------------------------------------------


async def test_a_cancel_is_raised_in_it(gate, tmp_path):
    """Its ``finally`` blocks run, its worker and the others there are kept."""
    note = tmp_path / "note"
    async with Executor(1) as executor:
        pid = await executor.run_async(jobs.pid)
        other = asyncio.ensure_future(executor.run_async(jobs.through, gate.path, "other"))
        await gate.entered()
        task = asyncio.ensure_future(
            executor.options(cancel_grace=60).run_async(jobs.note_the_end, gate.path, note)
        )
        await gate.entered()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert note.read_text() == "cancelled"  # he has waited for its end
        gate.open()
        assert await other == "other"
        assert await executor.run_async(jobs.pid) == pid
        now = executor.statistics()
    assert (now.jobs_cancelled, now.worker_deaths) == (1, 0)


async def test_a_cancel_does_not_wait(gate, monkeypatch):
    """Without a grace the caller goes on at once, whatever the coroutine does; the worker ends with it."""
    monkeypatch.setattr("asynclam._pool._PATIENCE", 0.05)
    async with Executor(1) as executor:
        pid = await executor.run_async(jobs.pid)
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0):
                await executor.run_async(jobs.ignore_a_cancel, gate.path)
        task = asyncio.ensure_future(executor.run_async(jobs.ignore_a_cancel, gate.path))
        assert await gate.entered() == pid
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await executor.run_async(jobs.pid) != pid


async def test_one_that_ignores_a_cancel_harms_no_other(gate, monkeypatch):
    """Its worker is sent no more, and ends when the others there have ended."""
    monkeypatch.setattr("asynclam._pool._PATIENCE", 0.05)
    async with Executor(2) as executor:
        ignoring = asyncio.ensure_future(executor.run_async(jobs.ignore_a_cancel, gate.path))
        first = await gate.entered()
        waiting = [
            asyncio.ensure_future(executor.run_async(jobs.through, gate.path, number))
            for number in range(3)
        ]
        pids = [await gate.entered() for _ in waiting]
        assert first in pids
        ignoring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ignoring
        others = await asyncio.gather(*(executor.run_async(jobs.pid) for _ in range(10)))
        assert first not in others
        gate.open(4)  # it takes one, too
        assert await asyncio.gather(*waiting) == [0, 1, 2]
        now = executor.statistics()
    assert now.worker_deaths == 0


async def test_one_that_holds_up_its_loop(gate, monkeypatch):
    """A cancel cannot reach it: the worker is killed."""
    monkeypatch.setattr("asynclam._pool._PATIENCE", 0.05)
    async with Executor(1) as executor:
        task = asyncio.ensure_future(executor.run_async(jobs.hold_up, gate.path))
        pid = await gate.entered()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await executor.run_async(jobs.pid) != pid


async def test_a_second_cancel(gate):
    """It ends the time that the coroutine had."""
    async with Executor(1) as executor:
        patient = executor.options(cancel_grace=3600)
        task = asyncio.ensure_future(patient.run_async(jobs.ignore_a_cancel, gate.path))
        pid = await gate.entered()
        task.cancel()
        assert await gate.entered() == pid  # it has had the first one
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await executor.run_async(jobs.pid) != pid


async def test_cancelled_before_it_begins(executor):
    """It never runs."""
    tasks = [asyncio.ensure_future(executor.run_async(jobs.echo, number)) for number in range(5)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in done)
    assert await executor.run_async(jobs.echo, 1) == 1


async def test_inline_it_is_cancelled_too(gate, tmp_path):
    """With ``max_workers=0`` the coroutine is a task of this loop."""
    note = tmp_path / "note"
    async with Executor(0) as executor:
        task = asyncio.ensure_future(executor.run_async(jobs.note_the_end, gate.path, note))
        await gate.entered()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert note.read_text() == "cancelled"


@pytest.mark.parametrize("fn", [jobs.cancel_itself, jobs.cancel_itself_with_a_buffer])
async def test_one_that_cancels_itself(executor, fn):
    """That is its outcome, as it is in asyncio, whatever it returns."""
    with pytest.raises(JobExitError) as caught:
        await executor.run_async(fn)
    assert isinstance(caught.value.original, asyncio.CancelledError)
    assert await executor.run_async(jobs.echo, 1) == 1


async def test_cancelled_by_another_of_its_worker(gate):
    """That is the outcome of what was cancelled there; nobody hangs."""
    async with Executor(1) as executor:
        task = asyncio.ensure_future(executor.run_async(jobs.through, gate.path))
        await gate.entered()
        with pytest.raises(JobExitError):
            await executor.run_async(jobs.cancel_all)
        with pytest.raises(JobExitError) as caught:
            await task
        assert isinstance(caught.value.original, asyncio.CancelledError)
        assert await executor.run_async(jobs.echo, 1) == 1


# --- deaths and ends -----------------------------------------------------------------------------------


async def test_a_worker_that_dies(gate):
    """All that it had begun fail; those of other workers go on; what may be retried is."""
    async with Executor(2) as executor:
        both = [
            asyncio.ensure_future(executor.run_async(jobs.through, gate.path, number))
            for number in range(2)
        ]
        pids = [await gate.entered() for _ in both]
        assert len(set(pids)) == 2
        os.kill(pids[0], signal.SIGKILL)
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        (failed,) = done
        assert isinstance(failed.exception(), WorkerDiedError)
        gate.open()
        (other,) = set(both) - done
        assert await other == both.index(other)
        with pytest.raises(WorkerDiedError, match="tried 3 times"):
            await executor.options(retries=2).run_async(jobs.die, 3)


async def test_a_fork(executor):
    """A process that a coroutine forks is no worker, and replies to nothing."""
    if executor.statistics().max_workers:
        assert await executor.run_async(jobs.fork) == 0
        assert await executor.run_async(jobs.echo, 1) == 1


async def test_the_end_of_the_block_waits(gate):
    """As for any job."""
    async with Executor(1) as executor:
        task = asyncio.ensure_future(executor.run_async(jobs.through, gate.path, "done"))
        await gate.entered()
        gate.open()
    assert await task == "done"


@pytest.mark.parametrize("max_workers", [0, 1])
async def test_a_kill_does_not(gate, max_workers):
    """The coroutines fail with ExecutorClosedError."""
    executor = Executor(max_workers)
    task = asyncio.ensure_future(executor.run_async(jobs.through, gate.path))
    await gate.entered()
    executor.kill()
    with pytest.raises(ExecutorClosedError):
        await task
    await executor.aclose()


async def test_limits(gate):
    """A worker that has run its share is replaced when it has no more; they count one each."""
    async with Executor(1, max_tasks_per_child=2) as executor:
        pids = [await executor.run_async(jobs.pid) for _ in range(4)]
        assert pids[0] == pids[1] != pids[2] == pids[3]
        assert executor.statistics().workers_spent == 2
    async with Executor(1, max_memory_per_child=32 * MIB) as executor:
        first = asyncio.ensure_future(executor.run_async(jobs.through, gate.path))
        pid = await gate.entered()
        assert await executor.run_async(jobs.take, 64 * MIB) == pid
        assert await asyncio.wait_for(_other_pid(executor, gate, first), 60) != pid
        assert executor.statistics().workers_grown


async def _other_pid(executor, gate, first):
    later = asyncio.ensure_future(executor.run_async(jobs.pid))
    gate.open()
    await first  # it was not harmed
    return await later


async def test_the_default_executor():
    """``asynclam.run_async`` is that of the default executor."""
    assert await asynclam.run_async(jobs.echo, "here") == "here"


async def test_map_io_over_it():
    """So a stream of them is made, as of all coroutine functions."""
    async with Executor(2) as executor:
        stream = asynclam.map_io(
            lambda n: executor.run_async(jobs.echo, n), range(20), ordered=True
        )
        assert await stream == list(range(20))
