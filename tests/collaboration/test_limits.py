"""Workers that are replaced after so many jobs, or because of their memory: no job is lost."""

import asyncio

import pytest

from asynclam import _pool, _wire
from asynclam._job import Terms
from tests.parts.actors import call_of, result_body
from tests.parts.stage import idle

SHORT = 3 << 8  # the flags of a reply: 3 microseconds


async def reply_short(worker, frame, flags=0):
    worker.begin(frame.number)
    worker.send(_wire.RESULT, frame.number, result_body("done"), SHORT | flags)


async def retired(stage, worker):
    """The worker reads end of file, and exits."""
    assert await worker.frame() is None
    stage.server.exited(worker, 0)


async def test_a_worker_has_so_many_jobs(stage):
    """After the last one it is ended, not killed, and the next job has another."""
    stage.pool._plan.max_tasks = 2
    stage.pool._plan.limit = lambda pool: 1
    several = [stage.submit(number) for number in range(5)]
    for jobs in (2, 2, 1):
        worker = await stage.ready_worker()
        for _ in range(jobs):
            await reply_short(worker, await worker.job())
        if jobs == 2:
            await retired(stage, worker)
    assert [await job.future for job in several] == ["done"] * 5
    counts = stage.pool.counts
    assert (counts.spent, counts.deaths, stage.pool.count("idle")) == (2, 0, 1)


async def test_no_more_is_sent_ahead(stage):
    """Short jobs share a channel no further than the worker may run them."""
    stage.pool._plan.max_tasks = 4
    slow, _, _ = await stage.busy("slow")
    first, worker, frame = await stage.busy("first")
    await reply_short(worker, frame)
    await first.future
    several = [stage.submit(number) for number in range(10)]
    frames = [await worker.job() for _ in range(3)]
    await idle()
    assert (stage.pool.queued, stage.pool.running) == (7, 4)
    for frame in frames:
        await reply_short(worker, frame)
    await retired(stage, worker)
    for _ in range(2):
        worker = await stage.ready_worker()
        for _ in range(4 if stage.pool.queued > 3 else 3):
            await reply_short(worker, await worker.job())
    assert [await job.future for job in several] == ["done"] * 10
    assert not slow.future.done()


async def test_what_was_taken_back_does_not_count(stage, monkeypatch):
    """A job that the worker was sent and has not run leaves it room for another."""
    stage.pool._plan.max_tasks = 4
    slow, one, frame_one = await stage.busy("slow")
    first, two, frame = await stage.busy("first")
    await reply_short(two, frame)
    await first.future
    several = [stage.submit(number) for number in range(3)]
    frames = [await two.job() for _ in several]
    two.begin(frames[0].number)
    monkeypatch.setattr(_pool, "_OVERDUE", 3600)
    stage.pool._revoke(several[0].worker)
    while stage.pool.queued != 2:
        await asyncio.sleep(0)
    two.send(_wire.RESULT, frames[0].number, result_body("done"), SHORT)
    for frame in frames[1:]:
        assert not two.begin(frame.number)
        two.skip(frame)
    for _ in range(2):
        await reply_short(two, await two.job())
    assert [await job.future for job in several] == ["done"] * 3
    await retired(stage, two)
    one.reply(frame_one, "slow")
    await slow.future
    assert stage.pool.counts.spent == 1


async def test_a_job_that_was_told_to_end_counts(stage):
    """It has run, though its worker has no outcome of it."""
    stage.pool._plan.max_tasks = 1
    job, worker, frame = await stage.busy("value", Terms(cancel_grace=3600))
    worker.begin(frame.number)
    await stage.told_to_end(job, worker, frame)
    while (await worker.frame()) is not None:
        pass
    stage.server.exited(worker, 0)
    assert stage.pool.counts.spent == 1


async def test_a_large_call_that_is_cancelled_while_it_is_copied(stage):
    """The worker has not heard of it: it may run as many jobs as before."""
    stage.pool._plan.max_tasks = 2
    first, worker, frame = await stage.busy("first")
    await reply_short(worker, frame)
    await first.future
    large = stage.submit(bytes(64 << 20))
    if large.worker.transfer is None:
        pytest.skip("payloads are in frames")
    large.future.cancel()
    stage.pool.cancel(large)
    second = stage.submit("second")
    await reply_short(worker, await worker.job())
    await second.future
    await retired(stage, worker)


async def test_a_worker_has_taken_too_much_memory(stage):
    """Its last result counts, it is ended, and the next job has another."""
    stage.pool._plan.limit = lambda pool: 1
    first, worker, frame = await stage.busy("first")
    second = stage.submit("second")
    await reply_short(worker, frame, _wire.GROWN)
    assert await first.future == "done"
    await retired(stage, worker)
    worker = await stage.ready_worker()
    await reply_short(worker, await worker.job())
    assert await second.future == "done"
    assert (stage.pool.counts.grown, stage.pool.counts.spent) == (1, 0)


async def test_jobs_behind_it_in_the_channel(stage):
    """They run elsewhere, unless they have begun; each runs once."""
    slow, one, frame_one = await stage.busy("slow")
    first, two, frame = await stage.busy("first")
    await reply_short(two, frame)
    await first.future
    several = [stage.submit(number) for number in range(3)]
    frames = [await two.job() for _ in several]
    await reply_short(two, frames[0], _wire.GROWN)
    two.begin(frames[1].number)
    assert await several[0].future == "done"
    one.reply(frame_one, "slow")
    frame = await one.job()
    assert call_of(frame)[1] == (2,)
    await reply_short(one, frame)
    two.reply(frames[1], "begun")
    assert [await job.future for job in several[1:]] == ["begun", "done"]
    await retired(stage, two)
    assert stage.pool.counts.grown == 1


async def test_an_exception_and_a_refusal_tell_it_too(stage):
    """Whatever the worker replies, it may say that it has grown."""
    job, worker, frame = await stage.busy("first")
    worker.begin(frame.number)
    worker.send(_wire.REFUSED, frame.number, b"no such name", _wire.GROWN)
    await retired(stage, worker)
    worker = await stage.ready_worker()
    await reply_short(worker, await worker.job())
    assert await job.future == "done"


async def test_a_close_while_one_is_ending(stage):
    """A close waits until the worker that was replaced is gone."""
    stage.pool._plan.max_tasks = 1
    job, worker, frame = await stage.busy("first")
    closing = stage.pool.close()
    await reply_short(worker, frame)
    await job.future
    await idle()
    assert not closing.done()
    await retired(stage, worker)
    await closing
