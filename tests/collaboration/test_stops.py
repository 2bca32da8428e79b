"""Revoking against a worker that may be stopped at any line: each job runs once, and no more.

The worker's lines are those of ``Worker._serve`` and ``Marks.begin``, the pool's those of
``Pool._revoke`` and ``Pool._take_back``. A stop, or a freeze of both with whatever clock, is an
order in which they come: all orders are played.
"""

import asyncio
from collections import Counter
from itertools import combinations_with_replacement

from asynclam import _forkserver, _pool, _wire, _worker
from tests.parts.actors import call_of, result_body
from tests.parts.stage import Stage, idle

SHORT = 3 << 8  # the flags of a reply: 3 microseconds
JOBS = 3
LINES = 5  # of a worker for each job, at most
NUMBERS = _worker.Marks.SLOT // 8  # of a worker on the page of marks


class Lines:
    """What a worker does with the jobs that it has received, line by line."""

    def __init__(self, worker, frames, ran):
        self._worker, self._frames, self._ran = worker, frames, ran
        self._steps = self._work()

    def advance(self, count):
        for _ in range(count):
            next(self._steps, None)

    def finish(self):
        for _ in self._steps:
            pass

    def _work(self):
        numbers, begun = self._worker._marks._numbers, NUMBERS * self._worker._slot
        for frame in self._frames:
            order = self._worker._orders[frame.number]
            numbers[begun] = order
            yield
            may = order > numbers[begun + 1]
            yield
            if not may:
                numbers[begun] = order - 1
            yield
            if may:
                self._ran[call_of(frame)[1][0]] += 1
            yield
            if may:
                self._worker.send(_wire.RESULT, frame.number, result_body(None), SHORT)
            else:
                self._worker.skip(frame)
            yield


async def serve(worker, ran):
    """A worker that nobody stops."""
    while True:
        frame = await worker.job()
        if worker.begin(frame.number):
            ran[call_of(frame)[1][0]] += 1
            worker.send(_wire.RESULT, frame.number, result_body(None), SHORT)
        else:
            worker.skip(frame)


async def play(monkeypatch, before_revoke, before_look, before_drain):
    """Each is how many lines the worker has done when the pool comes to its next one.

    Returns:
        How often each job ran, and how many workers have died or are to.
    """
    stage, ran, tasks, workers = Stage(), Counter(), [], []
    monkeypatch.setattr(_forkserver, "ensure", lambda method: stage.server)
    pool = stage.pool
    try:
        slow, other, slow_frame = await stage.busy("slow")
        workers.append(other)
        first, worker, frame = await stage.busy("first")
        workers.append(worker)
        worker.send(_wire.RESULT, frame.number, result_body(None), SHORT)
        await first.future
        submitted = [stage.submit(number) for number in range(JOBS)]
        lines = Lines(worker, [await worker.job() for _ in submitted], ran)
        known = pool._workers[worker.number]

        lines.advance(before_revoke)
        pool._revoke(known)
        known.revoking.cancel()
        lines.advance(before_look - before_revoke)
        begun = _worker.Marks.begun

        def look(marks, slot):
            found = begun(marks, slot)
            lines.advance(before_drain - before_look)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(_worker.Marks, "begun", look)
            pool._take_back(known, 0.0)
        other.send(_wire.RESULT, slow_frame.number, result_body(None), SHORT)
        tasks.append(asyncio.ensure_future(serve(other, ran)))  # takes what was taken back
        await idle()
        lines.finish()  # thawed
        tasks.append(asyncio.ensure_future(serve(worker, ran)))
        await asyncio.gather(slow.future, *(job.future for job in submitted))
        return ran, pool.counts.deaths + pool.count("dying")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pool.kill()
        for actor in workers:
            actor.close()
        stage.server.stop()


async def test_a_worker_stopped_at_any_line(monkeypatch):
    """Whatever the worker has read when it is stopped, and for how long: no job is lost or run twice."""
    monkeypatch.setattr(_pool, "_OVERDUE", 3600)
    everything = Counter(range(JOBS))
    for order in combinations_with_replacement(range(JOBS * LINES + 1), 3):
        ran, deaths = await play(monkeypatch, *order)
        assert (ran, deaths) == (everything, 0), order


def test_the_order_of_the_two_lines():
    """A worker marks a job as begun before it reads what is revoked, never after."""
    touched = []

    class Numbers(list):
        def __setitem__(self, index, value):
            touched.append(("write", index))
            super().__setitem__(index, value)

        def __getitem__(self, index):
            touched.append(("read", index))
            return super().__getitem__(index)

    marks = _worker.Marks(memoryview(bytearray(_worker.Marks.SLOT)))
    marks._numbers = Numbers([0, 7])
    assert marks.begin(0, 8)
    assert touched == [("read", 0), ("write", 0), ("read", 1)]
    touched.clear()
    assert not marks.begin(0, 7)
    assert touched == [("read", 0), ("write", 0), ("read", 1), ("write", 0)]
    assert marks.begun(0) == 8


async def test_replaced_while_it_starts(stage):
    """A worker that was asked for before, and is ready after, has no job: it is one of the old."""
    job = stage.submit("value")
    old = await stage.server.worker()
    stage.pool.replace_workers()
    old.ready()
    assert await old.frame() is None
    new = await stage.ready_worker()
    new.reply(await new.job(), "done")
    assert await job.future == "done"
    stage.server.exited(old, 0)


async def test_replaced_with_several_jobs(stage):
    """What is in its channel a worker still does; then its channel is closed."""
    slow, one, frame_one = await stage.busy("slow")
    first, two, frame_two = await stage.busy("first")
    two.send(_wire.RESULT, frame_two.number, result_body(None), SHORT)
    await first.future
    short = [stage.submit(number) for number in range(JOBS)]
    frames = [await two.job() for _ in short]
    stage.pool.replace_workers()
    waiting = stage.submit("waits")
    for frame in frames:
        two.send(_wire.RESULT, frame.number, result_body("done"), SHORT)
    assert [await job.future for job in short] == ["done"] * JOBS
    assert await two.frame() is None
    stage.server.exited(two, 0)
    three = await stage.ready_worker()
    three.reply(await three.job(), "new")
    assert await waiting.future == "new"
    one.reply(frame_one, "slow")
    assert await slow.future == "slow"
