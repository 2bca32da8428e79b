"""The pool against a fork server and workers that the test plays: one outcome for every job."""

import asyncio
import errno
import os
import pickle
import signal
import socket

import pytest

from asynclam import (
    ExecutorClosedError,
    PayloadError,
    WorkerDiedError,
    WorkerStartError,
    _call,
    _memory,
    _pool,
    _steps,
    _wire,
)
from asynclam._job import Terms
from asynclam._pool import Pool
from tests import jobs
from tests.parts.actors import call_of, result_body
from tests.parts.stage import idle

# --- the normal way ------------------------------------------------------------------------------


async def test_a_job_and_its_result(stage):
    """A call arrives as it was made, its result is the outcome, the worker is kept."""
    job, worker, frame = await stage.busy("value")
    fn, args = call_of(frame)
    assert (fn, args) == (jobs.echo, ("value",))
    worker.reply(frame, "result")
    assert await job.future == "result"
    assert (stage.pool.count("idle"), stage.pool.counts.completed) == (1, 1)


async def test_a_worker_has_one_job_at_a_time(stage):
    """The second job goes to a second worker, the third waits for whoever is free first."""
    first, one, frame_one = await stage.busy(1)
    second, two, frame_two = await stage.busy(2)
    third = stage.submit(3)
    await idle()
    assert stage.pool.queued == 1
    two.reply(frame_two, "two")
    frame_three = await two.job()
    assert call_of(frame_three)[1] == (3,)
    two.reply(frame_three, "three")
    one.reply(frame_one, "one")
    assert [await job.future for job in (first, second, third)] == ["one", "two", "three"]


async def test_an_exception_is_the_outcome(stage):
    """What the job raised is raised; the worker is kept."""
    job, worker, frame = await stage.busy()
    worker.raise_(frame, KeyError("key"))
    with pytest.raises(KeyError):
        await job.future
    assert stage.pool.count("idle") == 1


async def test_no_more_workers_than_jobs(stage):
    """A worker is started for a job that waits, not ahead of it."""
    job, worker, frame = await stage.busy()
    await idle()
    assert stage.pool.alive == 1
    worker.reply(frame, None)
    await job.future


# --- several jobs in a channel ----------------------------------------------------------------------


SHORT = 3 << 8  # the flags of a reply: 3 microseconds


async def pipelined(stage, count=3):
    """Two workers, one with a job of unknown length, the other with ``count`` short ones."""
    slow, one, frame_one = await stage.busy("slow")
    first, two, frame_two = await stage.busy("short")
    two.send(_wire.RESULT, frame_two.number, result_body(None), SHORT)
    await first.future
    jobs = [stage.submit(number) for number in range(count)]
    frames = [await two.job() for _ in jobs]
    return slow, one, frame_one, two, jobs, frames


async def test_short_jobs_share_a_channel(stage):
    """What is known to take microseconds is sent to a busy worker, if there can be no other."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    assert [call_of(frame)[1] for frame in frames] == [(0,), (1,), (2,)]
    assert (stage.pool.running, stage.pool.queued, stage.pool.count("busy")) == (4, 0, 2)
    for frame in frames:
        two.reply(frame, "done")
    assert [await job.future for job in jobs] == ["done"] * 3
    one.reply(frame_one, "slow")
    await slow.future


async def test_a_channel_has_room_for_so_much(stage):
    """No more is sent ahead than is expected to be done in no time; the rest waits."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage, 32)
    waiting = stage.submit("waits")
    await idle()
    assert stage.pool.queued == 1
    two.send(_wire.RESULT, frames[0].number, result_body(None), SHORT)
    assert call_of(await two.job())[1] == ("waits",)
    assert not waiting.future.done()


async def test_a_job_of_unknown_length_has_a_worker_for_itself(stage):
    """Nothing is sent behind a job of which no run time is known, nor is it sent behind another."""
    slow, one, frame_one, two, jobs_, frames = await pipelined(stage)
    unknown = stage.submit_call(_call.Call(jobs.add, (1,), {}))
    short = stage.submit("behind it")
    await idle()
    assert stage.pool.queued == 2
    for frame in frames:
        two.send(_wire.RESULT, frame.number, result_body(None), SHORT)
    assert call_of(await two.job())[0] is jobs.add
    await idle()
    assert (unknown.worker.number, stage.pool.queued) == (two.number, 1)
    one.reply(frame_one, "slow")
    one.reply(await one.job(), "done")
    assert await short.future == "done"


async def test_replies_that_arrive_together(stage, monkeypatch):
    """They are delivered in one callback, and what is sent for them goes in one send."""
    delivered, sends = [], []
    on_frames = Pool._on_frames

    def spy(pool, worker, frames):
        delivered.append(len(frames))
        on_frames(pool, worker, frames)

    monkeypatch.setattr(Pool, "_on_frames", spy)
    slow, one, frame_one, two, first, frames = await pipelined(stage, 32)
    second = [stage.submit(number) for number in range(32)]
    await idle()
    delivered.clear()
    for name in ("send", "sendmsg"):
        monkeypatch.setattr(socket.socket, name, counting(sends, getattr(socket.socket, name)))
    replies = [
        b"".join(_wire.encode(_wire.RESULT, frame.number, [result_body(None)], flags=SHORT))
        for frame in frames
    ]
    two.sock.sendall(b"".join(replies))
    await asyncio.gather(*(job.future for job in first))
    assert (delivered, sum(sends)) == ([32], 1)
    assert (stage.pool.queued, stage.pool.running) == (0, 33)
    for _ in second:
        two.reply(await two.job(), None)
    await asyncio.gather(*(job.future for job in second))


def counting(calls, call):
    def counted(*args):
        calls.append(1)
        return call(*args)

    return counted


async def test_a_job_that_took_long_once_has_a_worker_for_itself(stage):
    """One long run is enough to expect another: nothing is sent behind it."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage, 2)
    two.reply(frames[0], None)
    two.send(_wire.RESULT, frames[1].number, result_body(None), 1_000_000 << 8)
    await jobs[1].future
    first, second = stage.submit("long"), stage.submit("behind it")
    await idle()
    assert (first.worker.number, stage.pool.queued) == (two.number, 1)
    assert not second.future.done()


async def test_what_waits_behind_a_stuck_job_goes_elsewhere(stage, monkeypatch):
    """A short job that runs long is noticed: those behind it are given to the worker that is free."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    assert two.begin(frames[0].number)
    monkeypatch.setattr(_pool, "_OVERDUE", 0.001)  # not before it has begun, however slow this is
    stage.pool._watch.cancel()
    stage.pool._look_for_overdue()
    one.reply(frame_one, "slow")
    await slow.future
    while jobs[1].worker.number != one.number:
        await asyncio.sleep(0)
    monkeypatch.setattr(_pool, "_OVERDUE", 3600)
    again = [await one.job() for _ in range(2)]
    assert [frame.number for frame in again] == [frame.number for frame in frames[1:]]
    for frame in again:
        one.reply(frame, "elsewhere")
    assert [await job.future for job in jobs[1:]] == ["elsewhere"] * 2
    two.reply(frames[0], "at last")
    assert await jobs[0].future == "at last"
    assert not two.begin(frames[1].number), "it is told to skip them"
    two.skip(frames[1])
    assert not two.begin(frames[2].number)
    two.skip(frames[2])
    last = [stage.submit(number) for number in range(2)]
    one.reply(await one.job(), "one")
    two.reply(await two.job(), "two")
    assert sorted([await job.future for job in last]) == ["one", "two"]


async def test_a_job_is_skipped_that_was_believed_to_have_begun(stage, monkeypatch):
    """A worker that has read the revocation at the last moment says so; what came later it runs."""
    monkeypatch.setattr(_pool, "_OVERDUE", 3600)  # however long this process is held up
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    two.begin(frames[0].number)
    stage.pool._revoke(jobs[0].worker)
    while stage.pool.queued != 2:  # jobs 1 and 2 are taken back: the worker has begun job 0
        await asyncio.sleep(0)
    two.skip(frames[0])
    again = [await two.job()]
    assert call_of(again[0])[1] == (0,)
    two.send(_wire.RESULT, again[0].number, result_body("again"), SHORT)
    assert await jobs[0].future == "again"
    for _ in range(2):
        frame = await two.job()
        two.send(_wire.RESULT, frame.number, result_body("again"), SHORT)
    assert [await job.future for job in jobs[1:]] == ["again"] * 2


async def test_a_death_after_a_job_was_skipped(stage):
    """A worker that dies before it could say that it has skipped a job has not begun that."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage, 2)
    stage.pool._revoke(jobs[0].worker)
    assert not two.begin(frames[0].number)
    two.close()
    stage.server.exited(two)
    third = await stage.ready_worker()
    for job in jobs:
        frame = await third.job()
        third.send(_wire.RESULT, frame.number, result_body("elsewhere"), SHORT)
        assert await job.future == "elsewhere"


async def test_a_death_after_several_were_skipped(stage):
    """Nor those before it: what the page says is still the job that it runs."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    assert two.begin(frames[0].number)
    stage.pool._revoke(jobs[0].worker)
    assert not two.begin(frames[1].number)
    assert not two.begin(frames[2].number)
    stage.server.exited(two)
    with pytest.raises(WorkerDiedError):
        await jobs[0].future
    one.reply(frame_one, "slow")
    for job in jobs[1:]:
        one.reply(await one.job(), "elsewhere")
        assert await job.future == "elsewhere"
    assert await slow.future == "slow"


async def test_a_reply_in_the_moment_of_the_taking_back(stage):
    """A reply that is read just then makes no room: what a worker is given then is not revoked."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage, 32)
    stage.submit("waits")
    worker = jobs[0].worker
    for frame in frames[:2]:
        two.begin(frame.number)
    stage.pool._revoke(worker)
    worker.revoking.cancel()
    two.send(_wire.RESULT, frames[0].number, result_body(None), SHORT)
    stage.pool._take_back(worker, 0.0)
    assert ([job.order for job in worker.jobs], stage.pool.queued) == ([3], 31)
    with pytest.raises(BlockingIOError):
        two.sock.recv(1)


async def test_a_stopped_worker_is_sent_nothing_more(stage, monkeypatch):
    """A worker that has begun none of its jobs gets no others before it has skipped these."""
    monkeypatch.setattr(_pool, "_OVERDUE", 0.001)
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    while stage.pool.queued != 3:
        await asyncio.sleep(0)
    for _ in range(3):
        stage.pool._look_for_overdue()
        await idle()
    assert (stage.pool.queued, stage.pool.running) == (3, 1)
    for frame in frames:
        assert not two.begin(frame.number)
        two.skip(frame)
    monkeypatch.setattr(_pool, "_OVERDUE", 3600)
    for frame in [await two.job() for _ in frames]:
        two.send(_wire.RESULT, frame.number, result_body("again"), SHORT)
    assert [await job.future for job in jobs] == ["again"] * 3
    one.reply(frame_one, "slow")
    await slow.future


async def test_what_a_stopped_worker_had_runs_elsewhere(stage, monkeypatch):
    """Its jobs go to the worker that is free, and a close does not wait for it."""
    monkeypatch.setattr(_pool, "_OVERDUE", 0.001)
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    while stage.pool.queued != 3:
        await asyncio.sleep(0)
    monkeypatch.setattr(_pool, "_OVERDUE", 3600)
    one.reply(frame_one, "slow")
    for _ in frames:
        one.send(_wire.RESULT, (await one.job()).number, result_body("elsewhere"), SHORT)
    assert [await job.future for job in jobs] == ["elsewhere"] * 3
    closing = stage.pool.close()
    for worker in (one, two):
        while await worker.frame() is not None:
            pass
        stage.server.exited(worker)
    await asyncio.wait_for(closing, 0.5)


async def test_cancelling_a_job_behind_another(stage):
    """A job in the channel that has not begun is dropped; its worker and the others are unharmed."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    two.begin(frames[0].number)
    jobs[1].future.cancel()
    stage.pool.cancel(jobs[1])
    while stage.pool.queued != 1:
        await asyncio.sleep(0)
    two.reply(frames[0], "unharmed")
    assert await jobs[0].future == "unharmed"
    for frame in frames[1:]:
        assert not two.begin(frame.number)
        two.skip(frame)
    again = await two.job()
    assert call_of(again)[1] == (2,)
    two.reply(again, "unharmed, too")
    assert await jobs[2].future == "unharmed, too"
    assert stage.pool.count("idle") == 1


async def test_replies_that_arrive_while_jobs_are_taken_back(stage, monkeypatch):
    """What is sent because of them is not taken back with the others: each job begins once."""
    monkeypatch.setattr(_pool, "_SEEN", 3600)  # the test says when
    slow, one, frame_one, two, jobs, frames = await pipelined(stage, 32)
    jobs.append(stage.submit("waits"))
    assert two.begin(frames[0].number)
    jobs[31].future.cancel()
    stage.pool.cancel(jobs.pop(31))
    worker = stage.pool._workers[two.number]
    two.send(_wire.RESULT, frames[0].number, result_body("done"), SHORT)
    worker.revoking.cancel()
    stage.pool._take_back(worker, 0.0)  # finds the reply
    for frame in frames[1:]:
        assert not two.begin(frame.number)
        two.skip(frame)
    for _ in jobs[1:]:
        frame = await two.job()
        assert two.begin(frame.number)
        two.send(_wire.RESULT, frame.number, result_body("done"), SHORT)
    await idle()
    assert stage.pool.count("dying") == 0, "it has kept to the protocol"
    assert [job.future.result() for job in jobs] == ["done"] * 32


async def test_cancelling_a_job_before_others(stage):
    """The worker that runs it is killed once those behind it are safe, and those run elsewhere."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    two.begin(frames[0].number)
    jobs[0].future.cancel()
    stage.pool.cancel(jobs[0])
    assert await stage.server.killed() == two.number
    stage.server.exited(two)
    one.reply(frame_one, "slow")
    for _ in range(2):
        one.reply(await one.job(), "elsewhere")
    assert [await job.future for job in jobs[1:]] == ["elsewhere"] * 2


async def test_a_death_with_several_jobs_in_the_channel(stage):
    """The job that had begun fails, the one before it has its result, those behind it run elsewhere."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    two.begin(frames[0].number)
    two.reply(frames[0], "before")
    two.begin(frames[1].number)
    two.close()
    stage.server.exited(two)
    assert await jobs[0].future == "before"
    with pytest.raises(WorkerDiedError):
        await jobs[1].future
    one.reply(frame_one, "slow")
    again = await one.job()
    assert call_of(again)[1] == (2,)
    one.reply(again, "elsewhere")
    assert await jobs[2].future == "elsewhere"


# --- deaths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["report", "end of file"])
async def test_death_of_a_begun_job(stage, first):
    """A job that had begun fails with the way of the death, whichever messenger is first."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    if first == "report":
        stage.server.exited(worker, signal.SIGKILL)
        await idle()
        worker.close()
    else:
        worker.close()
        assert await stage.server.killed() == worker.number
        stage.server.exited(worker, signal.SIGKILL)
    with pytest.raises(WorkerDiedError) as caught:
        await job.future
    assert (caught.value.signal, caught.value.pid, caught.value.job) == (9, 4711, "tests.jobs.echo")


async def test_death_before_the_job_began(stage):
    """A job that had not begun runs in another worker, ahead of those that wait."""
    job, worker, frame = await stage.busy("first")
    later = [stage.submit(f"later {index}") for index in range(3)]
    worker.close()
    stage.server.exited(worker)
    other = await stage.ready_worker()
    again = await other.job()
    while call_of(again)[1] != ("first",):  # the second worker may have had a later one already
        other = await stage.ready_worker()
        again = await other.job()
    other.reply(again, "done")
    assert await job.future == "done"
    assert all(not job.future.done() for job in later)


async def test_a_job_that_keeps_killing_workers_before_it_begins(stage):
    """A call that no worker lives long enough to begin fails after three of them."""
    job = stage.submit(1)
    for _ in range(3):
        worker = await stage.ready_worker()
        await worker.job()
        worker.close()
        stage.server.exited(worker)
    with pytest.raises(WorkerDiedError):
        await job.future


async def test_a_result_and_a_death_together(stage):
    """A result that was sent before the death counts, if the two arrive together."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    worker.reply(frame, "just in time")
    worker.close()
    stage.server.exited(worker)
    assert await job.future == "just in time"
    await idle()
    assert stage.pool.alive == 0


async def test_a_report_before_the_result_is_read(stage):
    """The report of the death drains the channel before it fails the job."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    stage.server.exited(worker)
    worker.reply(frame, "drained")
    assert await job.future == "drained"


async def test_a_death_in_the_middle_of_a_result(stage):
    """Half a result is none."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    whole = b"".join(_wire.encode(_wire.RESULT, frame.number, [b"x" * 100_000]))
    worker.sock.sendall(whole[:50_000])
    worker.close()
    stage.server.exited(worker)
    with pytest.raises(WorkerDiedError):
        await job.future


async def test_segments_cannot_be_had_at_the_limit_of_descriptors(stage, monkeypatch):
    """A call goes in its frame then; a result that came in a segment is lost, and says so."""

    def none_left(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Pool, "_segments_of", none_left)
    large = bytes(1 << 20)
    job = stage.submit_call(_call.Call(jobs.echo, (large,), {}))
    worker = await stage.ready_worker()
    frame = await worker.job()
    assert not frame.flags & _wire.SEGMENT
    assert call_of(frame)[1] == (large,)
    worker.send(_wire.RESULT, frame.number, bytes(24), _wire.SEGMENT)
    with pytest.raises(PayloadError, match="limit of open descriptors"):
        await job.future
    assert stage.pool.count("idle") == 1


async def test_an_idle_worker_dies(stage):
    """The death of an idle worker harms nobody; the next job has another one."""
    job, worker, frame = await stage.busy()
    worker.reply(frame, None)
    await job.future
    worker.close()
    stage.server.exited(worker)
    await idle()
    assert stage.pool.alive == 0
    job, worker, frame = await stage.busy()
    worker.reply(frame, "again")
    assert await job.future == "again"


async def test_siblings_are_unharmed(stage):
    """The death of one worker does not touch the job of another."""
    first, one, frame_one = await stage.busy(1)
    second, two, frame_two = await stage.busy(2)
    one.begin(frame_one.number)
    one.close()
    stage.server.exited(one)
    with pytest.raises(WorkerDiedError):
        await first.future
    two.reply(frame_two, "unharmed")
    assert await second.future == "unharmed"


async def test_the_channel_is_held_open_by_another(stage):
    """A process that the job has forked may hold the channel: the report alone suffices."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    stage.server.exited(worker, 3 << 8)
    with pytest.raises(WorkerDiedError) as caught:
        await job.future
    assert caught.value.exitcode == 3


async def test_garbage(stage):
    """A worker that writes garbage is killed, its job fails and says why, others go on."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    worker.sock.sendall(b"this is no frame, but as long as the header of one")
    assert await stage.server.killed() == worker.number
    stage.server.exited(worker)
    with pytest.raises(WorkerDiedError) as caught:
        await job.future
    assert isinstance(caught.value.__cause__, _wire.ProtocolError)


@pytest.mark.parametrize("kind", [_wire.READY, _wire.RESULT, _wire.JOB, _wire.RECORD])
async def test_a_frame_out_of_turn(stage, kind):
    """A frame that answers nothing is garbage, too."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    worker.send(kind, frame.number + 1, bytes(8))
    assert await stage.server.killed() == worker.number
    stage.server.exited(worker)
    with pytest.raises(WorkerDiedError):
        await job.future


# --- refusals and payloads -----------------------------------------------------------------------


async def test_a_refused_call_goes_by_value(stage):
    """A worker that does not know the function is sent it by value."""
    job, worker, frame = await stage.busy("value")
    worker.send(_wire.REFUSED, frame.number, b"ModuleNotFoundError: tests")
    again = await worker.job()
    assert again.number == frame.number
    assert again.flags & _wire.BY_VALUE
    fn, args = call_of(again)
    assert fn is not jobs.echo
    assert (fn(*args), args) == ("value", ("value",))
    worker.reply(again, "done")
    assert await job.future == "done"


async def test_a_result_that_cannot_be_unpickled(stage):
    """The error names the function; the worker is kept."""
    job, worker, frame = await stage.busy()
    worker.reply(frame, jobs.BreaksInParent())
    with pytest.raises(PayloadError, match=r"tests\.jobs\.echo.*in the unpickling"):
        await job.future
    assert stage.pool.count("idle") == 1


# --- cancellation --------------------------------------------------------------------------------


async def test_cancelling_a_running_job_kills_its_worker(stage):
    """The worker that has the job is killed and replaced; nothing else is."""
    first, one, frame_one = await stage.busy(1)
    second, two, frame_two = await stage.busy(2)
    third = stage.submit(3)
    first.future.cancel()
    stage.pool.cancel(first)
    assert await stage.server.killed() == one.number
    assert await one.frame() is None, "its channel is closed"
    stage.server.exited(one)
    three = await stage.ready_worker()
    three.reply(await three.job(), "three")
    two.reply(frame_two, "two")
    assert [await second.future, await third.future] == ["two", "three"]


async def test_cancelling_a_waiting_job_drops_it(stage):
    """A job that no worker has is dropped, and no worker killed."""
    first, one, frame_one = await stage.busy(1)
    second, two, frame_two = await stage.busy(2)
    third = stage.submit(3)
    third.future.cancel()
    stage.pool.cancel(third)
    assert stage.pool.queued == 0
    one.reply(frame_one, "one")
    two.reply(frame_two, "two")
    await first.future
    await second.future
    await idle()
    assert stage.pool.count("idle") == 2


async def test_a_worker_is_free_before_the_cancel_is_told(stage):
    """A job whose future is cancelled already is not given to a worker that becomes free."""
    first, one, frame_one = await stage.busy(1)
    second, two, frame_two = await stage.busy(2)
    third = stage.submit(3)
    third.future.cancel()
    one.reply(frame_one, "one")
    assert await first.future == "one"
    stage.pool.cancel(third)
    assert stage.pool.count("idle") == 1
    two.reply(frame_two, "two")
    assert await second.future == "two"


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelling_while_the_call_is_being_sent(stage, monkeypatch, streamed):
    """A call that is half in the buffer, or in its segment, is gone with the channel."""
    if streamed:
        monkeypatch.setattr(_memory, "are_payloads_streamed", lambda: True)
    job = stage.submit(bytes(8 << 20))
    worker = await stage.ready_worker()
    await idle()
    job.future.cancel()
    stage.pool.cancel(job)
    assert await stage.server.killed() == worker.number
    stage.server.exited(worker)
    await idle()
    assert stage.pool.alive == 0


async def test_cancelling_twice(stage):
    """A second cancel of the same job does nothing, not even to the worker's next job."""
    job, worker, frame = await stage.busy(1)
    worker.reply(frame, "done")
    assert await job.future == "done"
    second = stage.submit(2)
    frame = await worker.job()
    stage.pool.cancel(job)
    worker.reply(frame, "unharmed")
    assert await second.future == "unharmed"


# --- starts --------------------------------------------------------------------------------------


async def fail_starts(stage, error):
    """Of as many workers in a row as a pool tries."""
    for _ in range(3):
        worker = await stage.server.worker()
        stage.server.not_started(worker.number, error)
        worker.close()


async def test_three_failed_starts(stage):
    """Three failed starts in a row fail the jobs that wait, with the cause."""
    job = stage.submit()
    await fail_starts(stage, errno.EAGAIN)
    with pytest.raises(WorkerStartError, match="3 times") as caught:
        await job.future
    assert caught.value.__cause__.errno == errno.EAGAIN
    assert caught.value.tries == 0
    job, worker, frame = await stage.busy()
    worker.reply(frame, "the next job tries again")
    assert await job.future == "the next job tries again"


async def test_no_worker_for_a_retry(stage):
    """The error says that the job has begun, and how often."""
    job, worker, frame = await stage.busy(1, Terms(retries=2))
    worker.begin(frame.number)
    worker.close()
    stage.server.exited(worker)
    await fail_starts(stage, errno.ENOMEM)
    with pytest.raises(WorkerStartError, match="has begun before: 1 of its workers died") as caught:
        await job.future
    assert pickle.loads(pickle.dumps(caught.value)).tries == 1


async def test_a_death_before_ready_is_a_failed_start(stage):
    """A worker that dies before it is ready is replaced; the job did not notice."""
    job = stage.submit()
    worker = await stage.server.worker()
    worker.close()
    stage.server.exited(worker)
    other = await stage.ready_worker()
    other.reply(await other.job(), "done")
    assert await job.future == "done"


async def test_segments_that_make_no_sense(stage, monkeypatch):
    """Nothing is left waiting where the environment names no way to share memory."""

    def refuse(nbytes):
        raise ValueError("ASYNCLAM_SEGMENTS=bogus")

    monkeypatch.setattr(_memory, "create_segment", refuse)
    with pytest.raises(WorkerStartError, match="bogus"):
        await stage.submit().future
    await stage.pool.close()


async def test_failed_starts_while_another_worker_lives(stage):
    """Jobs wait for the workers that live, if no more can be started."""
    first, one, frame_one = await stage.busy(1)
    second = stage.submit(2)
    await fail_starts(stage, errno.ENOMEM)
    await idle()
    assert not second.future.done()
    one.reply(frame_one, "one")
    one.reply(await one.job(), "two")
    assert [await first.future, await second.future] == ["one", "two"]


async def test_the_last_worker_dies_when_no_other_can_be_started(stage):
    """Jobs that waited for the last worker fail with the cause of the failed starts."""
    first, one, frame_one = await stage.busy(1)
    second = stage.submit(2)
    await fail_starts(stage, errno.ENOMEM)
    await idle()
    one.begin(frame_one.number)
    one.close()
    stage.server.exited(one)
    with pytest.raises(WorkerDiedError):
        await first.future
    with pytest.raises(WorkerStartError):
        await second.future
    third, worker, frame = await stage.busy(3)
    worker.reply(frame, "the next job tries again")
    assert await third.future == "the next job tries again"


async def test_cancelling_all_that_waits_starts_no_worker(stage):
    """A cancelled job is no reason to start a worker."""
    running = [await stage.busy(number) for number in range(2)]
    waiting = [stage.submit(number) for number in range(5)]
    for job in [*waiting, *(job for job, _, _ in running)]:
        job.future.cancel()
        stage.pool.cancel(job)
    assert (stage.pool.queued, stage.pool.alive) == (0, 0)
    assert {await stage.server.killed(), await stage.server.killed()} == {
        worker.number for _, worker, _ in running
    }


# --- the fork server dies ------------------------------------------------------------------------


async def test_the_fork_server_dies(stage):
    """Running jobs finish, their workers are then replaced by those of the next server."""
    job, worker, frame = await stage.busy(1)
    stage.server.stop()
    await idle()
    worker.reply(frame, "finished")
    assert await job.future == "finished"
    assert await worker.frame() is None, "it is given up"
    job, worker, frame = await stage.busy(2)
    worker.reply(frame, "next")
    assert await job.future == "next"
    assert len(stage.servers) == 2


async def test_an_orphan_runs_no_revoked_job(stage):
    """What a worker without a fork server still has to skip when it is given up, it never runs."""
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    assert two.begin(frames[0].number)
    worker = jobs[0].worker
    stage.pool._revoke(worker)
    worker.revoking.cancel()
    stage.pool._take_back(worker, 0.0)
    stage.server.stop()
    await idle()
    two.reply(frames[0], "done")
    assert await jobs[0].future == "done"
    one.reply(frame_one, "done")
    await slow.future
    for frame in frames[1:]:  # it has read them long ago, or reads them now
        assert not two.begin(frame.number)
    third = await stage.ready_worker()
    for frame in frames[1:]:
        assert not two.begin(frame.number), "its slot is not another's yet"
        again = await third.job()
        assert third.begin(again.number)
        third.send(_wire.RESULT, again.number, result_body("elsewhere"), SHORT)
    assert [await job.future for job in jobs[1:]] == ["elsewhere"] * 2


async def test_closing_with_an_orphan_that_has_nothing_left(stage, monkeypatch):
    """A stopped worker without jobs and without a fork server does not hold up a close."""
    monkeypatch.setattr(_pool, "_PATIENCE", 3600)
    slow, one, frame_one, two, jobs, frames = await pipelined(stage)
    worker = jobs[0].worker
    stage.pool._revoke(worker)
    worker.revoking.cancel()
    stage.pool._take_back(worker, 0.0)
    stage.server.stop()
    await idle()
    one.reply(frame_one, "done")
    assert await slow.future == "done"
    third = await stage.ready_worker()
    closing = stage.pool.close()
    for job in jobs:
        third.send(_wire.RESULT, (await third.job()).number, result_body("elsewhere"), SHORT)
        assert await job.future == "elsewhere"
    while await third.frame() is not None:
        pass
    stage.server.exited(third)
    await closing


async def test_a_worker_dies_after_its_fork_server(stage, monkeypatch):
    """Nobody can tell how it ended; the job fails all the same."""
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    stage.server.stop()
    await idle()
    worker.close()
    with pytest.raises(WorkerDiedError, match="unknown way"):
        await job.future


async def test_a_cancelled_job_outlives_the_fork_server(stage, monkeypatch):
    """A KILL that the fork server did not live to read is carried out by the loop process."""
    killed = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: killed.append((pid, number)))
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    job.future.cancel()
    stage.pool.cancel(job)
    stage.server.stop()
    while stage.pool.alive or stage.pool.count("dying"):
        await asyncio.sleep(0)
    assert killed == [(4711, signal.SIGKILL)]


# --- the end -------------------------------------------------------------------------------------


async def test_close_waits_for_the_jobs(stage):
    """A close lets running and waiting jobs end, then closes the channels and awaits the exits."""
    first, one, frame_one = await stage.busy(1)
    closing = stage.pool.close()
    one.reply(frame_one, "one")
    assert await first.future == "one"
    assert await one.frame() is None
    await idle()
    assert not closing.done()
    stage.server.exited(one, 0)
    await closing


async def test_close_waits_for_a_result_that_is_being_unpickled(stage, monkeypatch):
    """However long that takes, and however impatient the close is with workers."""
    monkeypatch.setattr(_pool, "_PATIENCE", 0)
    job, worker, frame = await stage.busy()
    closing = stage.pool.close()
    payload = _steps.run(_steps.dump_steps([str(number) for number in range(300_000)]))
    body = b"".join(payload.parts)
    await asyncio.gather(
        asyncio.to_thread(worker_sends, worker, frame, body, payload.flags), closing
    )
    assert len(await job.future) == 300_000


def worker_sends(worker, frame, body, flags):
    worker.sock.setblocking(True)
    worker.send(_wire.RESULT, frame.number, body, flags)


async def test_close_waits_for_a_call_that_is_being_pickled(stage):
    """A call that was made before the close is one of its jobs."""
    job, worker, frame = await stage.busy()
    stage.pool.expect()
    closing = stage.pool.close()
    worker.reply(frame, None)
    await job.future
    await idle()
    stage.pool.expect_no_more()
    late = stage.submit("late")
    worker.reply(await worker.job(), "late")
    assert await late.future == "late"
    assert await worker.frame() is None
    stage.server.exited(worker, 0)
    await closing


async def test_a_call_that_was_expected_and_does_not_come(stage):
    """The close goes on without it."""
    stage.pool.expect()
    closing = stage.pool.close()
    assert not closing.done()
    stage.pool.expect_no_more()
    await closing


async def test_workers_that_are_killed_first(stage):
    """From another thread, which may touch no more than processes: their jobs wait for the kill."""
    job, worker, _ = await stage.busy(1, Terms(retries=1))
    stage.pool.kill_workers()
    worker.close()
    stage.server.exited(worker)
    await idle()
    assert not job.future.done()
    stage.pool.kill()
    with pytest.raises(ExecutorClosedError):
        await job.future


async def test_kill_fails_the_jobs(stage):
    """A kill fails running and waiting jobs at once, and closes everything."""
    running, one, frame = await stage.busy(1)
    await stage.busy(2)
    waiting = stage.submit(3)
    stage.pool.kill()
    for job in (running, waiting):
        with pytest.raises(ExecutorClosedError, match=r"tests\.jobs\.echo"):
            await job.future
    assert await one.frame() is None
    assert await stage.server.control.frame() is None
