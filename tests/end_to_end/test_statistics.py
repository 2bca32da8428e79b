"""What an executor tells of itself."""

import asyncio
import contextvars
import os
import signal

import numpy as np
import pytest
import uvloop

from asynclam import Executor, PayloadError
from tests import jobs
from tests.parts.gate import pass_through

variable = contextvars.ContextVar("variable", default=None)


async def test_times():
    """Run times are those of the functions; waiting and the way there and back are told apart."""
    async with Executor(1) as executor:
        assert executor.statistics().processes_pay is None
        await asyncio.gather(*(executor.run_cpu(jobs.spin, 0.02) for _ in range(5)))
        now = executor.statistics()
        assert now.jobs_completed == 5
        assert now.run_seconds >= 0.1
        assert now.queue_seconds >= 0.02 * (1 + 2 + 3 + 4)
        assert now.transport_seconds > 0
        assert now.processes_pay


async def test_jobs_that_are_too_short():
    """It says so when it takes longer to send jobs than to run them."""
    async with Executor(1) as executor:
        for _ in range(50):
            await executor.run_cpu(jobs.echo, 1)
        now = executor.statistics()
        assert now.processes_pay is False
        assert now.run_seconds < now.transport_seconds


async def test_inline():
    """Jobs of this process have run times, too; what remains is the pickling."""
    async with Executor(0) as executor:
        await executor.run_cpu(jobs.spin, 0.01)
        now = executor.statistics()
        assert now.run_seconds >= 0.01
        assert now.transport_seconds > 0
        assert (now.queue_seconds, now.segments_in_use, now.processes_pay) == (0, 0, True)


in_segments = pytest.mark.skipif(
    os.environ.get("ASYNCLAM_SEGMENTS") == "stream", reason="about segments; payloads are in frames"
)


@in_segments
async def test_segments_in_use():
    """Those count that an argument or a result looks into."""
    async with Executor(1) as executor:
        result = await executor.run_cpu(jobs.echo, np.ones(1 << 20))
        assert executor.statistics().segments_in_use == 1, "the argument's is released"
        del result
        for _ in range(2):  # the notes of one frame, and of its reply
            await executor.run_cpu(jobs.echo, 1)
        assert executor.statistics().segments_in_use == 0


@in_segments
async def test_the_segment_of_a_job_that_was_not_received():
    """Nothing looks into it, so it is released as any other, also if it has never been looked at."""
    async with Executor(1, context_vars=[variable]) as executor:
        variable.set(jobs.BreaksInParent())  # it cannot be unpickled
        for _ in range(3):
            with pytest.raises(PayloadError):
                await executor.run_cpu(len, bytes(1 << 20))
        variable.set(None)
        for _ in range(2):
            await executor.run_cpu(jobs.echo, 1)
        assert executor.statistics().segments_in_use == 0


@in_segments
async def test_the_segment_of_a_job_that_did_not_begin():
    """It was cancelled when it had been sent, while its worker stood still."""
    async with Executor(1) as executor:
        pid = await executor.run_cpu(jobs.pid)
        os.kill(pid, signal.SIGSTOP)
        job = asyncio.ensure_future(executor.options(cancel_grace=60).run_cpu(len, bytes(1 << 20)))
        while executor.statistics().segments_in_use == 0:
            await asyncio.sleep(0)
        job.cancel()
        await asyncio.wait([job])
        os.kill(pid, signal.SIGCONT)
        for _ in range(3):
            assert await executor.run_cpu(jobs.pid) == pid
        assert executor.statistics().segments_in_use == 0


async def test_the_status_line(gate):
    """The repr says how many workers and jobs there are, and whether it is closed."""
    async with Executor(1) as executor:
        assert repr(executor) == "<Executor [workers: 0 busy, 0 idle | jobs: 0 running, 0 queued]>"
        tasks = [asyncio.ensure_future(executor.run_cpu(pass_through, gate.path)) for _ in range(3)]
        await gate.entered()
        assert repr(executor) == "<Executor [workers: 1 busy, 0 idle | jobs: 1 running, 2 queued]>"
        gate.open(3)
        await asyncio.gather(*tasks)
        assert repr(executor) == "<Executor [workers: 0 busy, 1 idle | jobs: 0 running, 0 queued]>"
    assert repr(executor).startswith("<Executor [closed | workers: 0 busy, 0 idle")


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_counts_outlive_their_loop(new_loop):
    """What was counted on a loop that is closed stays, also when another has taken its workers' places."""
    one, other = new_loop(), new_loop()
    executor = Executor(1)
    for loop in (one, other):  # each has a pool, as both live
        assert loop.run_until_complete(executor.run_cpu(jobs.echo, 1)) == 1
    one.close()
    other.run_until_complete(_two(executor))  # looks how many workers there may be
    assert executor.statistics().jobs_completed == 4
    executor.kill()
    other.close()


async def _two(executor):
    executor.replace_workers()
    await asyncio.gather(executor.run_cpu(jobs.echo, 1), executor.run_cpu(jobs.echo, 2))
