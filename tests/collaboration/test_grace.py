"""A cancelled job that has time to end, against workers that the test plays."""

import asyncio
import signal
import sys

import pytest

from asynclam import _executor, _grace, _memory, _wire
from asynclam._job import Terms
from tests.parts.actors import result_body
from tests.parts.stage import idle

PATIENT = Terms(cancel_grace=3600)


def cancel(stage, job):
    job.future.cancel()
    stage.pool.cancel(job)


async def test_told_and_gone(stage):
    """A job that has begun is told to end; once it has, its worker has the next job."""
    job, worker, frame = await stage.busy("value", PATIENT)
    assert frame.flags & _wire.SOFT
    worker.begin(frame.number)
    cancel(stage, job)
    assert await stage.server.interrupted() == worker.number
    assert worker.is_cancelled(frame.number)
    worker.hear(frame.number)
    assert (job.grace.ended.done(), stage.pool.running) == (False, 1)
    worker.skip(frame)
    await job.grace.ended
    assert (stage.pool.count("idle"), stage.pool.counts.completed) == (1, 0)


async def test_a_job_that_has_not_begun(stage):
    """It is dropped, and never begins; nothing is signalled, and its worker is kept."""
    job, worker, frame = await stage.busy("value", PATIENT)
    cancel(stage, job)
    await job.grace.ended
    assert not worker.begin(frame.number)
    worker.skip(frame)
    while not stage.pool.count("idle"):
        await asyncio.sleep(0)
    following = stage.submit("following")
    worker.reply(await worker.job(), "result")
    assert await following.future == "result"
    stage.pool.kill()
    assert await stage.server.control.frame() is None, "nothing was sent but START"


async def test_told_again_until_it_has_heard(stage):
    """A signal may be lost: it is sent until the page says that it was not, and not after."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    cancel(stage, job)
    for _ in range(4):
        assert await stage.server.interrupted() == worker.number
    worker.hear(frame.number)
    for _ in range(3):  # it goes on looking, for the job may not have heard after all
        timer = job.grace._timer
        while job.grace._timer is timer:
            await asyncio.sleep(0)
    worker.skip(frame)
    await job.grace.ended
    stage.pool.kill()
    rest = []
    while (sent := await stage.server.control.frame()) is not None:
        rest.append(sent.kind)
    assert len(rest) <= 1, "one may have been on its way when it was heard"


async def test_its_time_is_over(stage):
    """Then the worker is killed, and the next job runs in another."""
    job, worker, frame = await stage.busy("value", Terms(cancel_grace=0.001))
    worker.begin(frame.number)
    cancel(stage, job)
    later = [stage.submit("later") for _ in range(2)]
    other = await later_worker(stage)
    other.begin((await other.job()).number)
    while stage.pool.count("dying") == 0:
        await asyncio.sleep(0)
    assert job.grace.ended.done()
    assert await worker.frame() is None, "its channel is closed"
    stage.server.exited(worker, signal.SIGKILL)
    third = await later_worker(stage)
    third.reply(await third.job(), "done")
    assert await later[1].future == "done"


async def later_worker(stage):
    worker = await stage.server.worker()
    worker.ready()
    return worker


async def test_a_second_cancel(stage):
    """Whoever does not wait has the worker killed at once."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    cancel(stage, job)
    assert await stage.server.interrupted() == worker.number
    stage.pool.hurry(job)
    assert job.grace.ended.done()
    while (sent := await stage.server.control.frame()).kind == _wire.INTERRUPT:
        pass
    assert (sent.kind, sent.number) == (_wire.KILL, worker.number)
    stage.pool.hurry(job)  # once more does nothing
    stage.server.exited(worker)


async def test_a_second_cancel_before_it_is_told(stage):
    """It is killed as soon as it is known to have begun; nothing is told."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    cancel(stage, job)
    stage.pool.hurry(job)
    assert await stage.server.killed() == worker.number
    stage.server.exited(worker)
    await job.grace.ended


async def test_a_chunk_that_is_cancelled_twice_in_one_turn(stage):
    """That is a second cancel, though the pool has not heard of the first: nobody waits."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    job.future.add_done_callback(lambda _: stage.pool.cancel(job))
    outcome = _executor._Outcome(stage.pool, job)
    assert outcome.cancel()
    assert not outcome.done()
    assert outcome.cancel()
    assert outcome.cancelled()
    assert await stage.server.killed() == worker.number
    stage.server.exited(worker)
    await job.grace.ended


@pytest.mark.parametrize("result", ["value", ValueError("value")], ids=["result", "error"])
async def test_a_chunk_that_is_cancelled_when_it_has_ended(stage, result):
    """There is nothing to wait for, nor to log: its outcome is nobody's."""
    job, worker, frame = await stage.busy("value", PATIENT)
    outcome = _executor._Outcome(stage.pool, job)
    worker.reply(frame, "value")
    if isinstance(result, Exception):
        job.fail(result)
    while not job.future.done():
        await asyncio.sleep(0)
    assert outcome.cancel()
    assert outcome.cancelled()
    assert not outcome.cancel()


async def test_its_result_comes_meanwhile(stage):
    """A result that was on its way is nobody's: the wait is over, and the worker kept."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    cancel(stage, job)
    worker.reply(frame, "too late")
    await job.grace.ended
    while not stage.pool.count("idle"):
        await asyncio.sleep(0)
    assert job.future.cancelled()


async def test_its_worker_dies_meanwhile(stage):
    """The wait is over; nobody else is told, and it is not retried."""
    terms = Terms(retries=3, cancel_grace=3600)
    job, worker, frame = await stage.busy("value", terms)
    worker.begin(frame.number)
    cancel(stage, job)
    assert await stage.server.interrupted() == worker.number
    worker.close()
    stage.server.exited(worker)
    await job.grace.ended
    assert (stage.pool.counts.retries, stage.pool.queued) == (0, 0)


async def test_a_worker_that_is_dying_already(stage):
    """A cancel then waits for nothing."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    worker.close()
    assert await stage.server.killed() == worker.number
    cancel(stage, job)
    assert job.grace is None
    stage.server.exited(worker)


async def test_a_call_that_is_still_being_sent(stage, monkeypatch):
    """It has not begun, and the rest of it is not sent: the worker is killed at once."""
    monkeypatch.setattr(_memory, "are_payloads_streamed", lambda: True)
    job = stage.submit(bytes(8 << 20), PATIENT)
    worker = await stage.ready_worker()
    await idle()
    cancel(stage, job)
    assert await stage.server.killed() == worker.number
    assert job.grace is None
    stage.server.exited(worker)


async def test_a_job_among_others(stage):
    """Those behind it in the channel run elsewhere before it is told; nothing is given to its worker."""
    slow, one, frame_one = await stage.busy("slow")
    first, two, frame = await stage.busy("first")
    two.send(_wire.RESULT, frame.number, result_body(None), 3 << 8)
    await first.future
    several = [stage.submit(number, PATIENT) for number in range(3)]
    frames = [await two.job() for _ in several]
    two.begin(frames[0].number)
    cancel(stage, several[0])
    assert await stage.server.interrupted() == two.number
    assert stage.pool.queued == 2
    one.reply(frame_one, "slow")
    for _ in range(2):
        one.send(_wire.RESULT, (await one.job()).number, result_body("elsewhere"), 3 << 8)
    assert [await job.future for job in several[1:]] == ["elsewhere"] * 2
    assert stage.pool._workers[two.number].state == "busy"
    two.skip(frames[0])
    for frame in frames[1:]:
        assert not two.begin(frame.number)
        two.skip(frame)
    await several[0].grace.ended
    while stage.pool.count("idle") != 2:
        await asyncio.sleep(0)


async def test_the_fork_server_dies_meanwhile(stage, monkeypatch):
    """The loop process signals the worker itself then, whose channel shows that it lives."""
    sent = []
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append((pid, number)))
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    stage.server.control.close()
    await idle()
    cancel(stage, job)
    while not sent:
        await asyncio.sleep(0)
    assert set(sent) == {(4711, signal.SIGURG)}
    worker.hear(frame.number)
    worker.skip(frame)
    await job.grace.ended
    assert stage.pool.alive == 0


async def test_an_orphan_that_cannot_be_signalled(stage, monkeypatch):
    """A worker that runs as somebody else by now is let be until its time is over."""
    sent = []

    def forbidden(pid, number):
        sent.append(number)
        raise PermissionError

    monkeypatch.setattr("os.kill", forbidden)
    monkeypatch.setattr("os.killpg", forbidden)
    job, worker, frame = await stage.busy("value", Terms(cancel_grace=0.001))
    worker.begin(frame.number)
    stage.server.control.close()
    await idle()
    cancel(stage, job)
    while stage.pool.alive:
        await asyncio.sleep(0)
    assert job.grace.ended.done()
    assert (sent[0], sent[-1]) == (signal.SIGURG, signal.SIGKILL)


async def test_a_kill_of_the_pool(stage):
    """Nothing waits any more, and no timer is left."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    cancel(stage, job)
    assert await stage.server.interrupted() == worker.number
    stage.pool.kill()
    assert job.grace.ended.done()
    assert job.grace._timer is None


async def test_a_close_of_the_pool(stage):
    """A close waits for it, as for any job."""
    job, worker, frame = await stage.busy("value", PATIENT)
    worker.begin(frame.number)
    cancel(stage, job)
    assert await stage.server.interrupted() == worker.number
    closing = stage.pool.close()
    await idle()
    assert not closing.done()
    worker.skip(frame)
    assert await worker.frame() is None
    stage.server.exited(worker, 0)
    await closing


def test_a_shield_without_anyio(monkeypatch):
    """A program that has not loaded anyio has no scope to be shielded from, and need not load it."""
    monkeypatch.delitem(sys.modules, "anyio")
    with _grace.shield():
        assert "anyio" not in sys.modules


def test_time_in_which_the_process_is_stopped():
    """It does not count, whatever the clock says when it goes on: nobody has had it."""

    class Clock:
        now, timers = 0.0, []

        def create_future(self):
            return None

        def time(self):
            return self.now

        def call_later(self, seconds, callback):
            self.timers.append((self.now + seconds, callback))

        def go_on(self, *, stopped=0.0):
            due, callback = self.timers.pop()
            self.now = due + stopped
            callback()

    clock, killed = Clock(), []
    grace = _grace.Grace(clock)
    grace.begin(1.0, bool, lambda: True, lambda: killed.append(clock.now))
    for stopped in (0, 30, 0, 20):
        clock.go_on(stopped=stopped)
    assert not killed
    while clock.timers:
        clock.go_on()
    assert killed == [pytest.approx(51)]


def test_its_loop_is_closed():
    """The next loop does not hear of it, and nothing is called in the one that is closed."""
    loop = asyncio.new_event_loop()
    grace = _grace.Grace(loop)
    grace.begin(3600, lambda: None, lambda: True, lambda: pytest.fail("killed"))
    loop.close()
    grace.end()
    assert not grace.ended.done()
