"""What the pool counts of its jobs, by a clock that the test sets."""

import pytest

from asynclam import _job, _pool, _wire
from tests.parts.actors import result_body
from tests.parts.stage import idle

SECOND = 1_000_000  # microseconds


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_pool, "perf_counter", clock)
    monkeypatch.setattr(_job, "perf_counter", clock)
    return clock


def reply(worker, frame, microseconds, kind=_wire.RESULT, body=None):
    worker.begin(frame.number)
    body = result_body("done") if body is None else body
    worker.send(kind, frame.number, body, microseconds << 8)


def times(stage):
    """Seconds that jobs have waited, been away, and run."""
    counts = stage.pool.counts
    return counts.waited, counts.away, counts.ran / 1e6


async def test_a_job_that_starts_its_worker(stage, clock):
    """It waits until the worker is ready; what it takes from then on is run time, or transport."""
    job = stage.submit()
    worker = await stage.server.worker()
    clock.now += 2
    worker.ready()
    frame = await worker.job()
    clock.now += 4
    reply(worker, frame, SECOND)
    await job.future
    assert times(stage) == (2, 4, 1)


async def test_a_job_that_finds_an_idle_worker(stage, clock):
    """It does not wait at all."""
    job, worker, frame = await stage.busy()
    reply(worker, frame, SECOND)
    await job.future
    stage.pool.counts = _job.Counts()
    clock.now += 10
    job = stage.submit()
    frame = await worker.job()
    clock.now += 3
    reply(worker, frame, 2 * SECOND)
    await job.future
    assert times(stage) == (0, 3, 2)


async def test_a_job_that_waits_in_the_queue(stage, clock):
    """It waits until the job before it was replied to."""
    stage.pool._plan.limit = lambda pool: 1
    first, worker, frame = await stage.busy("first")
    second = stage.submit("second")
    clock.now += 5
    reply(worker, frame, SECOND)
    await first.future
    stage.pool.counts = _job.Counts()
    frame = await worker.job()
    clock.now += 3
    reply(worker, frame, SECOND)
    await second.future
    assert times(stage) == (5, 3, 1)


async def test_jobs_that_share_a_channel(stage, clock):
    """Those behind another wait for it, though their worker has them already."""
    slow, _, _ = await stage.busy("slow")
    first, worker, frame = await stage.busy("first")
    reply(worker, frame, 3)
    await first.future
    stage.pool.counts = _job.Counts()
    several = [stage.submit(number) for number in range(3)]
    frames = [await worker.job() for _ in several]
    for frame in frames:
        clock.now += 1
        reply(worker, frame, SECOND // 4)
        await several[frames.index(frame)].future
    assert times(stage) == (0 + 1 + 2, 3, 0.75)
    assert not slow.future.done()


async def test_replies_that_are_read_together(stage, clock):
    """They add up to the same: what the first seems to take longer, the others take less."""
    slow, _, _ = await stage.busy("slow")
    first, worker, frame = await stage.busy("first")
    reply(worker, frame, 3)
    await first.future
    stage.pool.counts = _job.Counts()
    several = [stage.submit(number) for number in range(3)]
    frames = [await worker.job() for _ in several]
    clock.now += 3
    parts = [
        part
        for frame in frames
        for part in _wire.encode(
            _wire.RESULT, frame.number, [result_body("done")], flags=SECOND // 4 << 8
        )
    ]
    worker.sock.sendall(b"".join(parts))
    for job in several:
        await job.future
    assert times(stage)[1:] == (3, 0.75)
    assert not slow.future.done()


async def test_a_job_that_runs_longer_than_a_reply_can_tell(stage, clock):
    """A reply tells 16.8 seconds at most: all the time that it was away counts as run time then."""
    job, worker, frame = await stage.busy()
    clock.now += 60
    reply(worker, frame, _wire.MOST_ELAPSED)
    await job.future
    assert times(stage) == (0, 60, 60)


async def test_what_is_told_to_be_no_outcome(stage, clock):
    """A call that is sent again by value waits until then; only the second time counts."""
    job, worker, frame = await stage.busy()
    clock.now += 2
    reply(worker, frame, 0, _wire.REFUSED, b"no such name")
    frame = await worker.job()
    clock.now += 3
    reply(worker, frame, SECOND)
    await job.future
    assert times(stage) == (2, 3, 1)


async def test_cancelled_jobs(stage, clock):
    """Those that waited and those that ran are counted, and have no times."""
    stage.pool._plan.limit = lambda pool: 1
    running, _, _ = await stage.busy("running")
    waiting = stage.submit("waiting")
    for job in (waiting, running):
        job.future.cancel()
        stage.pool.cancel(job)
    await idle()
    assert stage.pool.counts.cancelled == 2
    assert times(stage) == (0, 0, 0)
