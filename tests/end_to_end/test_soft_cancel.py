"""``options(cancel_grace=…)``: a cancelled job cleans up, its worker is kept, and nobody else notices."""

import asyncio
import contextlib
import os
import random
import signal
import sys
import threading
from pathlib import Path

import anyio
import pytest

from asynclam import Executor, ExecutorClosedError, JobCancelled, JobExitError
from tests import jobs
from tests.parts.gate import pass_through
from tests.parts.processes import ended

LONG = 60.0  # seconds: more than any test takes


@pytest.fixture
async def executor():
    async with Executor(2) as executor:
        yield executor


@pytest.fixture
async def single():
    """One worker, so that the next job shows whether it was kept."""
    async with Executor(1) as executor:
        yield executor


@pytest.fixture
def trace(tmp_path):
    """A file to which jobs append what they have come to."""
    path = tmp_path / "trace"
    path.touch()
    return path


# --- jobs ----------------------------------------------------------------------------------------


def leave_a_trace(path, word):
    with open(path, "a") as file:
        file.write(f"{word} ")


def compute(gate, trace):
    """Works in Python, and cleans up."""
    try:
        enter(gate)
        spin()
    finally:
        leave_a_trace(trace, "finally")


def block(gate, trace):
    """Waits in a system call, and cleans up."""
    try:
        pass_through(gate)
    finally:
        leave_a_trace(trace, "finally")


def spin():
    # Not in a try block itself: in CPython 3.13 the jump back of a loop at its end is not guarded.
    while True:
        pass


def enter(gate):
    with open(Path(gate, "entered"), "wb", buffering=0) as entered:
        entered.write(os.getpid().to_bytes(8, "little"))


def go_on(gate):
    """Takes no notice."""
    with contextlib.suppress(JobCancelled):
        enter(gate)
        spin()
    spin()


def return_nevertheless(gate, trace):
    try:
        pass_through(gate)
    except JobCancelled:
        leave_a_trace(trace, "caught")
        return "result"


def fail_while_cleaning_up(gate):
    try:
        pass_through(gate)
    finally:
        raise OSError("the disk is full")


class Finalised:
    def __init__(self, gate):
        self.gate = gate

    def __del__(self):
        pass_through(self.gate)


def swallow(gate, trace):
    """Is interrupted in a finaliser, where exceptions go nowhere."""
    try:
        thing = Finalised(gate)
        del thing
        spin()
    finally:
        leave_a_trace(trace, "finally")


def clean_up_slowly(gate, trace):
    """Cleans up for as long as it is held."""
    try:
        pass_through(gate)
    finally:
        pass_through(gate)
        leave_a_trace(trace, "finally")


def take_the_signal():
    signal.signal(signal.SIGURG, lambda *_: None)


def block_the_signal(gate):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
    pass_through(gate)


def have_threads(gate, trace):
    """Threads of the job do not get the signal in the main thread's place."""
    for _ in range(4):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    block(gate, trace)


def raise_job_cancelled():
    raise JobCancelled


async def started(executor, gate, fn, *args):
    """A task whose job has entered, and the pid of its worker."""
    task = asyncio.ensure_future(executor.run_cpu(fn, gate.path, *args))
    return task, await gate.entered()


async def cancelled(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- one job -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [compute, block, have_threads, swallow])
async def test_it_cleans_up(single, gate, trace, fn):
    """The job's ``finally`` blocks have run when the cancel is told, and its worker is kept."""
    task, pid = await started(single.options(cancel_grace=LONG), gate, fn, trace)
    await cancelled(task)
    assert trace.read_text() == "finally "
    assert await single.run_cpu(jobs.pid) == pid
    now = single.statistics()
    assert (now.jobs_cancelled, now.jobs_completed, now.worker_deaths) == (1, 1, 0)


@pytest.mark.parametrize("how", ["left", "ended", "not waited for"])
async def test_what_it_has_spawned(single, gate, how):
    """A job that leaves processes behind takes its worker along, and so them; else that is kept."""
    task, pid = await started(single.options(cancel_grace=LONG), gate, spawn, how)
    (child,) = {await gate.entered(), await gate.entered()} - {pid}
    await cancelled(task)
    await ended(child)
    assert (await single.run_cpu(jobs.pid) == pid) is (how == "ended")
    assert single.statistics().worker_deaths == 0


def spawn(gate, how):
    enter(gate)
    child = os.fork()
    if not child:
        pass_through(gate)
        os._exit(0)
    try:
        enter(gate)  # only now may it be cancelled
        os.waitpid(child, 0)
    finally:
        if how != "left":
            os.kill(child, signal.SIGKILL)
        if how == "ended":
            os.waitpid(child, 0)


async def test_what_jobs_before_it_have_spawned(single, gate, trace):
    """A child that was there before is none of this job's: its worker is kept, and that lives."""
    child = await single.run_cpu(jobs.spawn_forever)
    task, pid = await started(single.options(cancel_grace=LONG), gate, block, trace)
    await cancelled(task)
    assert await single.run_cpu(jobs.pid) == pid
    os.kill(child, 0)


@pytest.mark.parametrize("fn", [go_on, block_the_signal])
async def test_it_takes_no_notice(single, gate, fn):
    """When its time is over, its worker is killed, and replaced."""
    task, pid = await started(single.options(cancel_grace=0.02), gate, fn)
    await cancelled(task)
    assert await single.run_cpu(jobs.pid) != pid


async def test_it_returns_nevertheless(single, gate, trace):
    """Its caller is cancelled anyway; the worker is kept."""
    task, pid = await started(single.options(cancel_grace=LONG), gate, return_nevertheless, trace)
    await cancelled(task)
    assert trace.read_text() == "caught "
    assert await single.run_cpu(jobs.pid) == pid


async def test_it_fails_while_it_cleans_up(single, gate, tmp_path):
    """That error has nobody to go to: its traceback is on the worker's stderr."""
    await single.run_cpu(redirect_stderr, tmp_path / "stderr")
    task, pid = await started(single.options(cancel_grace=LONG), gate, fail_while_cleaning_up)
    await cancelled(task)
    assert await single.run_cpu(jobs.pid) == pid
    assert "OSError: the disk is full" in (tmp_path / "stderr").read_text()


def redirect_stderr(path):
    sys.stderr = open(path, "w")


async def test_a_handler_that_another_job_has_left(single, gate, trace):
    """A job may have taken the signal for itself; the next one is told all the same."""
    patient = single.options(cancel_grace=LONG)
    await patient.run_cpu(take_the_signal)
    task, pid = await started(patient, gate, block, trace)
    await cancelled(task)
    assert trace.read_text() == "finally "
    assert await single.run_cpu(jobs.pid) == pid


class SlowToUnpickle:
    def __init__(self, gate):
        self.gate = gate

    def __reduce__(self):
        return pass_through, (self.gate,)


async def test_a_cancel_while_the_arguments_are_unpickled(single, gate, trace):
    """The job itself does not begin."""
    patient = single.options(cancel_grace=LONG)
    task = asyncio.ensure_future(
        patient.run_cpu(leave_a_trace, trace, word=SlowToUnpickle(gate.path))
    )
    pid = await gate.entered()
    task.cancel()
    while single._pool._workers and not is_told(single):
        await asyncio.sleep(0)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trace.read_text() == ""
    assert await single.run_cpu(jobs.pid) == pid


def is_told(executor):
    """Whether the page of marks says to the only worker that its job is to end."""
    pool = executor._pool
    (worker,) = pool._workers.values()
    return pool._marks.is_cancelled(worker.slot, worker.sent)


@pytest.mark.parametrize("grace", [0, LONG])
async def test_a_job_that_raises_it_by_itself(single, grace):
    """JobCancelled out of a job that nobody has cancelled is an error of that job."""
    with pytest.raises(JobExitError, match="JobCancelled") as caught:
        await single.options(cancel_grace=grace).run_cpu(raise_job_cancelled)
    assert isinstance(caught.value.original, JobCancelled)


async def test_what_it_raises_shows_no_frames_of_ours(single):
    """A job that may be told to end has the same traceback as any other."""
    with pytest.raises(KeyError) as caught:
        await single.options(cancel_grace=LONG).run_cpu(jobs.raise_, KeyError("key"))
    shown = "\n".join(getattr(caught.value, "__notes__", ())) or str(caught.value.__cause__)
    assert "in raise_" in shown
    assert "_guard" not in shown


async def test_a_job_that_has_not_begun(single, gate, trace):
    """It is dropped at once, whatever time it has."""
    patient = single.options(cancel_grace=LONG)
    running, pid = await started(single, gate, pass_through)
    waiting = asyncio.ensure_future(patient.run_cpu(leave_a_trace, trace, "waiting"))
    await asyncio.sleep(0)
    await cancelled(waiting)
    gate.open()
    await running
    assert trace.read_text() == ""
    assert await single.run_cpu(jobs.pid) == pid


# --- who waits -----------------------------------------------------------------------------------


async def test_whoever_is_cancelled_waits(single, gate, trace):
    """The await ends when the job has: what the two share can be released then."""
    patient = single.options(cancel_grace=LONG)
    task, pid = await started(patient, gate, clean_up_slowly, trace)
    task.cancel()
    assert await gate.entered() == pid  # it cleans up
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trace.read_text() == "finally "


async def test_a_second_cancel_kills(single, gate, trace):
    """Whoever is cancelled again waits no longer: the worker is killed, and the cancel is told."""
    patient = single.options(cancel_grace=LONG)
    task, pid = await started(patient, gate, clean_up_slowly, trace)
    task.cancel()
    await gate.entered()
    await cancelled(task)
    assert trace.read_text() == ""
    assert await single.run_cpu(jobs.pid) != pid


async def test_a_coroutine_that_is_closed(single, gate, trace):
    """It cannot wait; the job is told to end, and its worker is kept."""
    coroutine = single.options(cancel_grace=LONG).run_cpu(block, gate.path, trace)
    coroutine.send(None)
    pid = await gate.entered()
    coroutine.close()
    assert await single.run_cpu(jobs.pid) == pid
    assert trace.read_text() == "finally "


@pytest.mark.parametrize("how", ["timeout", "wait_for", "fail_after", "task group"])
async def test_timeouts_and_groups(single, gate, trace, how):
    """They end when the job has cleaned up, and raise what they always do."""
    patient = single.options(cancel_grace=LONG)

    async def fail(pids):
        pids.append(await gate.entered())
        raise KeyError("sibling")

    async def wait(pids):
        if how == "timeout":
            async with asyncio.timeout(None) as timeout:
                task = asyncio.ensure_future(expire(timeout, pids))
                await patient.run_cpu(block, gate.path, trace)
            await task
        elif how == "wait_for":
            inner = patient.run_cpu(block, gate.path, trace)
            task = asyncio.ensure_future(asyncio.wait_for(inner, LONG))
            pids.append(await gate.entered())
            task.cancel()
            await task
        elif how == "fail_after":
            with anyio.fail_after(LONG) as scope:
                task = asyncio.ensure_future(expire(scope, pids))
                await patient.run_cpu(block, gate.path, trace)
            await task
        else:
            async with anyio.create_task_group() as group:
                group.start_soon(patient.run_cpu, block, gate.path, trace)
                group.start_soon(fail, pids)

    async def expire(scope, pids):
        pids.append(await gate.entered())
        if how == "timeout":
            scope.reschedule(asyncio.get_running_loop().time())
        else:
            scope.deadline = anyio.current_time()

    if how == "timeout" and not hasattr(asyncio, "timeout"):
        pytest.skip("asyncio.timeout came with Python 3.11")
    pids = []
    with pytest.raises(BaseException) as caught:
        await wait(pids)
    error = caught.value.exceptions[0] if how == "task group" else caught.value
    expected = {"wait_for": asyncio.CancelledError, "task group": KeyError}
    assert isinstance(error, expected.get(how, TimeoutError))
    assert trace.read_text() == "finally "
    assert await single.run_cpu(jobs.pid) == pids[0]


async def test_an_anyio_scope_does_not_hurry(single, gate, trace):
    """Anyio cancels again at each turn of the loop; that is no second cancel."""
    patient = single.options(cancel_grace=LONG)

    async def run(scope):
        with scope:
            await patient.run_cpu(clean_up_slowly, gate.path, trace)
        return scope.cancelled_caught

    scope = anyio.CancelScope()
    task = asyncio.ensure_future(run(scope))
    pid = await gate.entered()
    scope.cancel()
    await gate.entered()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    gate.open()
    assert await task
    assert trace.read_text() == "finally "
    assert await single.run_cpu(jobs.pid) == pid


async def test_a_native_cancel_in_an_anyio_scope(single, gate, trace):
    """A task that is cancelled after its scope was does not wait."""
    patient = single.options(cancel_grace=LONG)

    async def run(scope):
        with scope:
            await patient.run_cpu(clean_up_slowly, gate.path, trace)

    scope = anyio.CancelScope()
    task = asyncio.ensure_future(run(scope))
    await gate.entered()
    scope.cancel()
    await gate.entered()
    await cancelled(task)
    assert trace.read_text() == ""


# --- the end of the executor ---------------------------------------------------------------------


async def test_closing_waits(gate, trace):
    """A close waits for a job that cleans up, as for any job."""
    executor = Executor(1)
    task, _ = await started(executor.options(cancel_grace=LONG), gate, clean_up_slowly, trace)
    task.cancel()
    await gate.entered()
    closing = asyncio.ensure_future(executor.aclose())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()
    gate.open()
    await closing
    assert trace.read_text() == "finally "
    assert task.cancelled()


@pytest.mark.parametrize("how", ["kill", "error"])
async def test_killing_does_not_wait(gate, trace, how):
    """``kill()``, and a block that is left by an error, end it at once."""

    async def leave(executor):
        async with executor:
            raise KeyError("out of the block")

    executor = Executor(1)
    task, _ = await started(executor.options(cancel_grace=LONG), gate, clean_up_slowly, trace)
    task.cancel()
    await gate.entered()
    if how == "kill":
        executor.kill()
    else:
        with pytest.raises(KeyError):
            await leave(executor)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trace.read_text() == ""
    with pytest.raises(ExecutorClosedError):
        await executor.run_cpu(jobs.pid)


@pytest.mark.parametrize("others", [0, 3])
async def test_killing_in_the_turn_of_the_cancel(gate, trace, others):
    """The cancel has its outcome: there is nothing left to be told to end."""
    executor = Executor(1)
    for _ in range(3):
        await executor.run_cpu(jobs.echo, 1)
    task, _ = await started(executor.options(cancel_grace=LONG), gate, clean_up_slowly, trace)
    waiting = [asyncio.ensure_future(executor.run_cpu(jobs.echo, 1)) for _ in range(others)]
    await asyncio.sleep(0)
    task.cancel()
    executor.kill()
    with pytest.raises(asyncio.CancelledError):
        await task
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ExecutorClosedError] * others


def test_a_loop_that_is_closed_under_it(gate, trace):
    """The worker is killed when the next loop comes; that loop has others."""
    executor = Executor(1)

    async def abandon():
        task, pid = await started(executor.options(cancel_grace=LONG), gate, clean_up_slowly, trace)
        task.cancel()
        await gate.entered()
        task.cancel()  # asyncio.run() would: nothing outlives it
        await asyncio.gather(task, return_exceptions=True)
        return pid

    async def go_on_elsewhere():
        pid = await executor.run_cpu(jobs.pid)
        await executor.aclose()
        return pid

    assert asyncio.run(abandon()) != asyncio.run(go_on_elsewhere())


async def test_the_fork_server_is_dead(single, gate, trace):
    """The job of a worker that has outlived its fork server cleans up, too."""
    server = await single.run_cpu(jobs.parent_pid)
    task, _ = await started(single.options(cancel_grace=LONG), gate, block, trace)
    os.kill(server, signal.SIGKILL)
    pool = single._pool
    while pool._control is not None:
        await asyncio.sleep(0)
    await cancelled(task)
    assert trace.read_text() == "finally "
    assert await single.run_cpu(jobs.parent_pid) != server


# --- many jobs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("return_exceptions", [False, True])
async def test_a_stream(executor, gate, trace, return_exceptions):
    """Leaving a stream ends its chunks softly, and waits for them; a chunk ends as a whole."""
    patient = executor.options(cancel_grace=LONG)
    stream = patient.map_cpu(
        block, [gate.path] * 8, [trace] * 8, chunksize=2, return_exceptions=return_exceptions
    )
    task = asyncio.ensure_future(stream.list())
    pids = {await gate.entered(), await gate.entered()}
    await cancelled(task)
    assert trace.read_text() == "finally finally "
    assert {await executor.run_cpu(jobs.pid) for _ in range(4)} <= pids
    assert gate.nobody_entered()


async def test_a_stream_in_an_anyio_scope(executor, gate, trace):
    """It is waited for there, too."""
    patient = executor.options(cancel_grace=LONG)

    async def run(scope):
        with scope:
            await patient.map_cpu(clean_up_slowly, [gate.path] * 2, [trace] * 2, chunksize=1)

    scope = anyio.CancelScope()
    task = asyncio.ensure_future(run(scope))
    for _ in range(2):
        await gate.entered()
    scope.cancel()
    for _ in range(2):
        await gate.entered()
    assert not task.done()
    gate.open(2)
    await task
    assert trace.read_text() == "finally finally "


async def test_a_stream_that_is_cancelled_twice(executor, gate, trace):
    """The second cancel kills what is still there."""
    patient = executor.options(cancel_grace=LONG)
    stream = patient.map_cpu(clean_up_slowly, [gate.path] * 2, [trace] * 2, chunksize=1)
    task = asyncio.ensure_future(stream.list())
    pids = {await gate.entered(), await gate.entered()}
    task.cancel()
    for _ in range(2):
        await gate.entered()
    await cancelled(task)
    assert await executor.run_cpu(jobs.pid) not in pids
    assert trace.read_text() == ""


async def test_a_stream_that_is_left_as_a_chunk_is_sent(single, gate, trace):
    """That chunk is waited for as any other, though the loop has not turned since it was sent."""
    patient = single.options(cancel_grace=LONG)
    stream = patient.map_cpu(
        clean_up_from_the_second, range(3), [gate.path] * 3, [trace] * 3, chunksize=1, limit=1
    )

    async def leave():
        async with stream:
            assert await anext(stream) == 0  # which makes room for the next
            await asyncio.sleep(0)
            assert single.statistics().jobs_running == 1, "sent in this turn"
            while gate.nobody_entered():
                os.sched_yield()

    leaving = asyncio.ensure_future(leave())
    await gate.entered()  # it cleans up
    assert not leaving.done()
    gate.open()
    await leaving
    assert trace.read_text() == "finally "


def clean_up_from_the_second(number, gate, trace):
    if number:
        clean_up_slowly(gate, trace)
    return number


@pytest.mark.parametrize("is_read", [True, False])
async def test_a_stream_whose_loop_ends(executor, gate, trace, is_read):
    """Whoever cancels all tasks, as ``asyncio.run()`` does, waits for chunks, and cancels them once."""
    patient = executor.options(cancel_grace=LONG)
    stream = patient.map_cpu(
        clean_up_from_the_second, range(3), [gate.path] * 3, [trace] * 3, chunksize=1
    )
    assert await anext(stream) == 0
    reader = asyncio.ensure_future(anext(stream)) if is_read else None
    for _ in range(2):
        await gate.entered()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in sorted(tasks, key=lambda task: task is reader):
        task.cancel()
    for _ in range(2):
        await gate.entered()
    gate.open(2)
    await asyncio.wait(tasks)
    assert trace.read_text() == "finally finally "
    await stream.aclose()


async def test_a_stream_of_results(executor):
    """Streams give the same results on these terms."""
    patient = executor.options(cancel_grace=LONG)
    assert await patient.map_cpu(jobs.echo, range(1000)) == list(range(1000))
    with pytest.raises(ValueError):
        await patient.map_cpu(jobs.fail_on_odd, range(1000))
    async with patient.map_cpu(jobs.echo, range(1000)) as stream:
        assert await anext(stream) == 0


async def test_no_other_job_is_hit(single):
    """However cancels and signals fall, each job that was not cancelled has its own result."""
    dice = random.Random(4)
    patient = single.options(cancel_grace=LONG)
    pid = await single.run_cpu(jobs.pid)
    tasks = []
    for number in range(600):
        task = asyncio.ensure_future(patient.run_cpu(work_on, number))
        tasks.append(task)
        os.kill(pid, signal.SIGURG)  # as one that was sent for a job before, and comes late
        if len(tasks) > 2:
            await asyncio.wait(tasks[-3:-2])
        elif dice.random() < 0.5:
            await asyncio.sleep(0)
        if dice.random() < 0.4:
            asyncio.get_running_loop().call_later(dice.random() * 0.004, task.cancel)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    hit = [outcome for outcome in outcomes if isinstance(outcome, asyncio.CancelledError)]
    assert [
        outcome
        for number, outcome in enumerate(outcomes)
        if outcome != number and not isinstance(outcome, asyncio.CancelledError)
    ] == []
    assert 50 < len(hit) < 400
    assert await single.run_cpu(jobs.pid) == pid
    begun, ended = await single.run_cpu(counted)
    assert begun <= ended, "each job that has begun has cleaned up"
    assert len(begun) > 300


_begun, _ended = set(), set()


def work_on(number):
    try:
        _begun.add(number)
        jobs.spin(0.001)
    finally:
        _ended.add(number)
    return number


def counted():
    return _begun, _ended


# --- what is refused, and what has no meaning ----------------------------------------------------


@pytest.mark.parametrize("grace", ["1", None, True])
def test_a_grace_that_is_no_number(grace):
    """``cancel_grace`` is a number of seconds."""
    with pytest.raises(TypeError, match="cancel_grace is a number of seconds"):
        Executor(1).options(cancel_grace=grace)


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf")])
def test_a_grace_that_makes_no_sense(grace):
    """It is neither negative nor for ever."""
    with pytest.raises(ValueError, match="cancel_grace is 0 seconds or more, and finite"):
        Executor(1).options(cancel_grace=grace)


async def test_inline():
    """Jobs of this process cannot be cancelled; they run as they do without."""
    async with Executor(0) as executor:
        patient = executor.options(retries=1, cancel_grace=LONG)
        assert await patient.run_cpu(jobs.echo, 1) == 1
        assert await patient.map_cpu(jobs.echo, range(10)) == list(range(10))
        with pytest.raises(JobExitError):
            await patient.run_cpu(raise_job_cancelled)
