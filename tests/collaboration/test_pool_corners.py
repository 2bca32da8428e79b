"""The pool where things meet that rarely do: late reports, orphans with work left, Ctrl-C."""

import asyncio
import errno
import os
import signal
import socket
import sys
import types

import pytest

from asynclam import PayloadError, SharedBuffer, WorkerDiedError, _call, _forkserver, _pool, _wire
from asynclam._channel import Channel
from asynclam._job import Terms
from tests import coroutine_jobs, jobs
from tests.collaboration.test_pool import SHORT, pipelined
from tests.parts.actors import result_body
from tests.parts.stage import idle


async def test_hurrying_a_job_that_has_ended(stage):
    """It is too late for that: the worker, and what it runs now, are unharmed."""
    job, worker, frame = await stage.busy("value", Terms(cancel_grace=3600))
    worker.begin(frame.number)
    await stage.told_to_end(job, worker, frame)
    second = stage.submit("second")
    frame = await worker.job()
    stage.pool.hurry(job)
    worker.reply(frame, "unharmed")
    assert await second.future == "unharmed"


async def test_cancelling_a_coroutine_of_a_dying_worker(stage):
    """It is cancelled, and no worker is told: its death settles the rest."""
    job = stage.submit_call(_call.Call(coroutine_jobs.echo, (1,), {}, flags=_wire.COROUTINE))
    worker = await stage.ready_worker()
    await worker.job()
    worker.sock.close()
    while not stage.pool.count(_pool._DYING):
        await asyncio.sleep(0)
    job.future.cancel()
    stage.pool.cancel(job)
    assert job.grace is None
    stage.server.exited(worker)
    other, _, frame = await stage.busy("other")
    assert _call.receive(frame)[1] == ("other",)


async def test_an_outcome_of_none_of_the_coroutines_in_a_worker(stage):
    """It is garbage as any other: all of them had begun, and fail."""
    stage.pool._plan.limit = lambda pool: 1
    calls = [_call.Call(coroutine_jobs.echo, (n,), {}, flags=_wire.COROUTINE) for n in range(2)]
    coroutines = [stage.submit_call(call) for call in calls]
    worker = await stage.ready_worker()
    frames = [await worker.job() for _ in calls]
    for frame in frames:
        worker.begin(frame.number)
    worker.send(_wire.RESULT, max(frame.number for frame in frames) + 1, result_body("whose?"))
    assert await stage.server.killed() == worker.number
    stage.server.exited(worker)
    for job in coroutines:
        with pytest.raises(WorkerDiedError) as caught:
            await job.future
        assert isinstance(caught.value.__cause__, _wire.ProtocolError)


async def test_no_descriptor_is_left_for_a_worker_ahead_of_the_first_job(stage, monkeypatch):
    """There is none then; the job tries again, and starts one."""

    def refuse(_method):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(_forkserver, "ensure", refuse)
        stage.pool.prestart()
    assert stage.pool.alive == 0
    await stage.busy()
    assert stage.pool.alive == 1


async def test_closing_twice(stage):
    """Both wait for the same end."""
    closing = stage.pool.close()
    assert stage.pool.close() is closing
    await closing


async def test_what_waited_in_a_closed_loop(stage):
    """It is dropped, with the descriptors of its arguments, when another loop has the pool."""
    running, worker, frame = await stage.busy(1)
    await stage.busy(2)
    with SharedBuffer(1) as buffer:
        waiting = stage.submit(buffer)
    assert list(waiting.call.descriptors)
    stage.pool.attach(asyncio.get_running_loop())
    assert (stage.pool.queued, list(waiting.call.descriptors)) == (0, [])
    assert await worker.frame() is None, "nobody waits for what it runs"
    for job in stage.jobs:
        job.future.cancel()


async def test_cancelled_together(stage):
    """A job whose cancel is about to be told is given to nobody when that of another is told."""
    slow, one, frame_one, two, several, frames = await pipelined(stage, 1)
    long = stage.submit_call(_call.Call(jobs.add, (1,), {}))
    short = stage.submit("short")
    await idle()
    assert stage.pool.queued == 2, "one has no room, the other is behind it"
    for job in (long, short):
        job.future.cancel()
    for job in (long, short):
        stage.pool.cancel(job)
    assert (stage.pool.queued, stage.pool.running) == (0, 2)
    two.reply(frames[0], "done")
    assert await several[0].future == "done"


async def test_run_times_are_forgotten(stage, monkeypatch):
    """However many functions there are, what is known of them is bounded."""
    monkeypatch.setattr(_pool, "_MOST_KINDS", 2)
    job, worker, frame = await stage.busy()
    for fn in (jobs.add, jobs.type_name, jobs.pid):
        worker.send(_wire.RESULT, frame.number, result_body(None), SHORT)
        await job.future
        job = stage.submit_call(_call.Call(fn, (1,), {}))
        frame = await worker.job()
    assert len(stage.pool._times) <= 2


async def test_nothing_is_taken_back_while_a_large_result_is_coming(stage, monkeypatch):
    """The loop has other things to do meanwhile, and looks again."""
    slow, one, frame_one, two, several, frames = await pipelined(stage)
    two.begin(frames[0].number)
    worker = several[0].worker
    stage.pool._revoke(worker)
    worker.revoking.cancel()
    monkeypatch.setattr(Channel, "catch_up", lambda channel: False)
    stage.pool._take_back(worker, 0.0)
    assert (len(worker.jobs), stage.pool.queued) == (3, 0)
    monkeypatch.undo()
    while stage.pool.queued != 2:
        await asyncio.sleep(0)


# --- orphans -------------------------------------------------------------------------------------


async def test_an_orphan_runs_what_it_has(stage):
    """A worker whose fork server is dead is given up when it has run all of its jobs, not before."""
    slow, one, frame_one, two, several, frames = await pipelined(stage, 2)
    stage.server.stop()
    await idle()
    for job, frame in zip(several, frames, strict=True):
        assert two.begin(frame.number)
        two.reply(frame, "done")
        assert await job.future == "done"
    assert await two.frame() is None


async def test_a_kill_reaches_orphans(stage, monkeypatch):
    """Nobody else would end them where the kernel does not."""
    killed = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: killed.append((pid, number)))
    job, worker, frame = await stage.busy()
    stage.server.stop()
    await idle()
    stage.pool.kill()
    assert killed == [(4711, signal.SIGKILL)]


async def test_no_signal_for_an_orphan_that_may_be_gone(stage, monkeypatch):
    """Once its channel has ended, its pid may be another's."""
    signalled = []
    monkeypatch.setattr(os, "kill", lambda *arguments: signalled.append(arguments))
    job, worker, frame = await stage.busy()
    known = job.worker
    _pool._signal_orphan(known, signal.SIGURG)
    known.channel.close()
    _pool._signal_orphan(known, signal.SIGURG)
    assert signalled == [(4711, signal.SIGURG)]


# --- workers that are replaced --------------------------------------------------------------------


async def test_told_to_end_in_a_worker_that_is_to_be_replaced(stage):
    """The job ends, and its worker with it."""
    job, worker, frame = await stage.busy("value", Terms(cancel_grace=3600))
    worker.begin(frame.number)
    stage.pool.replace_workers()
    await stage.told_to_end(job, worker, frame)
    while await worker.frame() is not None:
        pass
    stage.server.exited(worker, 0)
    assert stage.pool.counts.spent == 0


async def test_a_worker_that_has_grown_and_has_notes(stage):
    """What a reply says of segments is heeded, though the worker is sent no more."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    body = bytes(16) + result_body("done")  # no notes, and what they are filled up with
    worker.send(_wire.RESULT, frame.number, body, _wire.GROWN | _wire.RELEASES)
    assert await job.future == "done"
    assert await worker.frame() is None
    stage.server.exited(worker, 0)


# --- what workers say ----------------------------------------------------------------------------


async def test_notes_that_make_no_sense(stage):
    """A worker whose refusal begins with such is not to be believed."""
    job, worker, frame = await stage.busy()
    worker.begin(frame.number)
    worker.send(_wire.REFUSED, frame.number, b"", _wire.RELEASES)
    assert await stage.server.killed() == worker.number
    stage.server.exited(worker)
    with pytest.raises(WorkerDiedError) as caught:
        await job.future
    assert isinstance(caught.value.__cause__, _wire.ProtocolError)


async def test_a_refused_call_that_cannot_go_by_value(stage):
    """It fails and says why; the worker is kept, and has the next job."""
    module = types.ModuleType("tests_locked")
    sys.modules[module.__name__] = module
    exec("import threading; lock = threading.Lock()\ndef locked():\n    return lock", vars(module))
    try:
        job = stage.submit_call(_call.Call(module.locked, (), {}))
        worker = await stage.ready_worker()
        frame = await worker.job()
        worker.send(_wire.REFUSED, frame.number, b"no such module")
        with pytest.raises(PayloadError, match="cannot be sent by value"):
            await job.future
    finally:
        del sys.modules[module.__name__]
        _call._references.clear()
    second = stage.submit("second")
    worker.reply(await worker.job(), "done")
    assert await second.future == "done"


def interrupt():
    raise KeyboardInterrupt


class InterruptsWhoUnpickles:
    def __reduce__(self):
        return interrupt, ()


async def test_ctrl_c_among_several_results(stage):
    """It is raised, its job has an outcome, and the results that came with it are not lost."""
    slow, one, frame_one, two, several, frames = await pipelined(stage)
    results = [InterruptsWhoUnpickles(), "second", "third"]
    replies = [
        (
            job,
            _wire.decode(
                b"".join(_wire.encode(_wire.RESULT, job.number, [result_body(result)])), []
            ),
        )
        for job, result in zip(several, results, strict=True)
    ]
    with pytest.raises(KeyboardInterrupt):
        stage.pool._settle_all(replies, 4711)
    with pytest.raises(PayloadError, match="KeyboardInterrupt"):
        await several[0].future
    assert [await job.future for job in several[1:]] == ["second", "third"]


async def test_a_report_of_a_worker_that_nobody_knows(stage):
    """It is passed over: it may be of one that was given up."""
    job, worker, frame = await stage.busy()
    stage.server.control.send(_wire.EXITED, worker.number + 1_000_000, bytes(8))
    await idle()
    worker.reply(frame, "unharmed")
    assert await job.future == "unharmed"


async def test_an_idle_worker_whose_channel_is_held_open(stage):
    """The report of its death suffices: it is given no other job."""
    job, worker, frame = await stage.busy()
    worker.reply(frame, None)
    await job.future
    stage.server.exited(worker)
    await idle()
    assert (stage.pool.alive, stage.pool.count("idle")) == (0, 0)
    job, other, frame = await stage.busy("next")
    other.reply(frame, "done")
    assert await job.future == "done"


async def test_no_descriptor_is_left_for_a_channel(monkeypatch):
    """The life pipe that was made before is closed with the error."""

    def none_left():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socketpair", none_left)
    with pytest.raises(OSError, match="Too many open files"):
        _pool._connections()
