"""A job that may be rerun, against workers that the test plays: how often, where, and what ends it."""

import asyncio

import pytest

from asynclam import WorkerDiedError, _wire
from asynclam._job import Terms
from tests.parts.actors import call_of, result_body
from tests.parts.stage import idle


async def die_of(stage, worker, frame):
    """The worker begins the job and dies."""
    worker.begin(frame.number)
    worker.close()
    stage.server.exited(worker, 9)


async def test_a_begun_job_runs_elsewhere(stage):
    """It is given to another worker, ahead of those that wait, and has one outcome."""
    job, one, frame = await stage.busy("again", Terms(1))
    await die_of(stage, one, frame)
    two = await stage.ready_worker()
    frame = await two.job()
    assert call_of(frame)[1] == ("again",)
    two.begin(frame.number)
    two.reply(frame, "result")
    assert await job.future == "result"
    assert (stage.pool.counts.retries, stage.pool.counts.deaths) == (1, 1)


async def test_no_more_often_than_was_granted(stage):
    """After so many tries it fails, and the error says how many there were."""
    job, worker, frame = await stage.busy("deadly", Terms(2))
    for _ in range(2):
        await die_of(stage, worker, frame)
        worker = await stage.ready_worker()
        frame = await worker.job()
    await die_of(stage, worker, frame)
    with pytest.raises(WorkerDiedError, match="tried 3 times") as caught:
        await job.future
    assert (caught.value.tries, stage.pool.counts.retries) == (3, 2)


async def test_a_death_before_the_job_began_is_no_try(stage):
    """A worker that dies before it begins the job takes none of its tries."""
    job, worker, _ = await stage.busy("value", Terms(1))
    for _ in range(2):
        worker.close()
        stage.server.exited(worker)
        worker = await stage.ready_worker()
        frame = await worker.job()
    assert job.tries == 0
    await die_of(stage, worker, frame)
    worker = await stage.ready_worker()
    worker.reply(await worker.job(), "result")
    assert await job.future == "result"


async def test_what_it_raises_is_its_outcome(stage):
    """An exception is an outcome: it is not tried again."""
    job, worker, frame = await stage.busy("value", Terms(5))
    worker.begin(frame.number)
    worker.raise_(frame, KeyError("key"))
    with pytest.raises(KeyError):
        await job.future
    assert stage.pool.counts.retries == 0


async def test_others_in_the_channel(stage):
    """Those that had not begun run elsewhere in their order, behind it, and keep all of their tries."""
    slow, _, _ = await stage.busy("slow")
    first, worker, frame = await stage.busy("first")
    worker.send(_wire.RESULT, frame.number, result_body(None), 3 << 8)  # it took 3 microseconds
    await first.future
    several = [stage.submit(number, Terms(1)) for number in range(3)]
    frames = [await worker.job() for _ in several]
    await die_of(stage, worker, frames[0])
    worker = await stage.ready_worker()
    for number in range(3):
        frame = await worker.job()
        assert call_of(frame)[1] == (number,)
        worker.send(_wire.RESULT, frame.number, result_body("done"), 3 << 8)
    assert [await job.future for job in several] == ["done"] * 3
    assert [job.tries for job in several] == [1, 0, 0]
    assert not slow.future.done()


async def test_a_cancel_while_it_waits_for_another_worker(stage):
    """A cancel between two tries ends them: no other worker sees the job."""
    stage.pool._plan.limit = lambda pool: 1
    job, worker, frame = await stage.busy("cancelled", Terms(5))
    later = stage.submit("later")
    await die_of(stage, worker, frame)
    while stage.pool.counts.retries == 0:
        await asyncio.sleep(0)
    job.future.cancel()
    stage.pool.cancel(job)
    worker = await stage.ready_worker()
    frame = await worker.job()
    assert call_of(frame)[1] == ("later",)
    worker.reply(frame, None)
    await later.future


async def test_a_cancel_before_the_death(stage):
    """A job that is cancelled already is not tried again."""
    job, worker, frame = await stage.busy("cancelled", Terms(5))
    worker.begin(frame.number)
    job.future.cancel()
    worker.close()
    stage.server.exited(worker)
    await idle()
    stage.pool.cancel(job)
    assert (stage.pool.queued, stage.pool.counts.retries) == (0, 0)


async def test_a_close_waits_for_the_tries(stage):
    """A close waits for a job that is being tried again, as for any other."""
    job, worker, frame = await stage.busy("value", Terms(1))
    closing = stage.pool.close()
    await die_of(stage, worker, frame)
    worker = await stage.ready_worker()
    frame = await worker.job()
    assert not closing.done()
    worker.reply(frame, "result")
    assert await job.future == "result"
    assert await worker.frame() is None
    stage.server.exited(worker, 0)
    await closing
