"""Workers' lives, and who gets the next job. Nothing here awaits: bookkeeping is never interrupted.

Theory of operation. A pool belongs to one event loop at a time. It owns one control connection to
the fork server, one channel a worker, and the page of marks.

    worker:  STARTING ──READY──► IDLE ◄──reply── BUSY ──channel ended──► DYING ──EXITED──► gone
                 └──FAILED, NOT_STARTED, death──► failed start           (killed: DYING at once)

A job is sent to an idle worker or waits in the queue; a worker has one job at a time. Workers are
started when jobs wait, up to ``max_workers``, and live on.

Death. Two messengers tell of it, the end of the channel and EXITED from the fork server, in any
order. The first to come drains the channel, so a result that was sent before the death counts. A
worker whose channel has ended is killed in any case: it may live on without it. Its job fails once
EXITED gives the reason; if the page of marks says that it had not begun, it runs again, elsewhere.

If the fork server dies, its control connection ends. Its workers go on until their job is done and
are replaced by workers of the next server; nobody can tell how such a worker ended.

Cancelling a job that a worker has is a KILL to that worker, which has no other.

The order of shutdown: no more jobs; the last ones end; channels are closed, so that workers read
end of file and exit; the EXITED of each is awaited; the control connection is closed. A kill closes
the control connection first, and the fork server kills the workers.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from . import _forkserver, _memory, _raised, _wire
from ._channel import Channel
from ._errors import AsynclamError, ExecutorClosedError, WorkerDiedError, WorkerStartError
from ._job import Job
from ._worker import Marks

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, TimerHandle

    from ._call import Call

_MOST_FAILED_STARTS = 3  # in a row, until the jobs that wait are failed
_MOST_LOSSES = 3  # workers that may die with a job before it has begun, until it fails
_PATIENCE = 1.0  # seconds in which an idle worker exits after end of file, before it is killed
_SLOTS = 512  # of the page of marks: one page of memory; workers that are dying have one, too

_STARTING, _IDLE, _BUSY, _DYING = "starting", "idle", "busy", "dying"

_worker_numbers = itertools.count(1)


class Plan(NamedTuple):
    """How a pool's workers are made."""

    start_method: _forkserver.StartMethod
    initializer: bytes
    limit: Callable[[Pool], int]  # how many this pool may have now


class _Worker:
    """What the pool knows of one worker."""

    __slots__ = ("cause", "channel", "job", "number", "orphan", "pid", "slot", "state", "status")

    def __init__(self, slot: int) -> None:
        self.number = next(_worker_numbers)
        self.slot = slot
        self.state = _STARTING
        self.channel: Channel
        self.job: Job | None = None
        self.pid: int | None = None
        self.status: int | None = None  # wait status, once the fork server has told it
        self.cause: BaseException | None = None  # what its initializer raised
        self.orphan = False  # its fork server is dead


class Pool:
    """The workers of one executor on one event loop."""

    def __init__(self, loop: AbstractEventLoop, plan: Plan) -> None:
        self.loop = loop
        self.deaths = 0
        self.completed = 0
        self._plan = plan
        self._queue: OrderedDict[int, Job] = OrderedDict()  # by number, in order
        self._workers: dict[int, _Worker] = {}  # all whose end has not been told
        self._idle: list[_Worker] = []
        self._failed_starts = 0
        self._start_cause: BaseException | None = None  # of the last failed start
        self._server: _forkserver.ForkServer | None = None
        self._control: Channel | None = None
        self._page = -1
        self._marks: Marks
        self._slots = list(range(_SLOTS))
        self._closing: Future[None] | None = None
        self._last_call: TimerHandle | None = None  # ends the patience of a close
        self._killed = False

    # --- what the executor asks ------------------------------------------------------------------

    def submit(self, call: Call) -> Job:
        """Hands a call to a worker, now or as soon as one is free."""
        job = Job(call, self.loop.create_future())
        if not self._queue or not self.alive:
            self._failed_starts = 0
        self._queue[job.number] = job
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """Stops the work on a job whose future is done: drops it, or kills the worker that has it."""
        self._queue.pop(job.number, None)
        worker = job.worker
        if worker is not None and worker.job is job:
            worker.job = None
            self._kill(worker)
        job.call.close()  # after its frame was dropped with the channel: it names the descriptors
        self._dispatch()

    def attach(self, loop: AbstractEventLoop) -> None:
        """Moves the idle workers to another loop; the one before is closed, and its jobs with it."""
        self.loop = loop
        self._closing = self._last_call = None
        for channel in self._channels():
            channel.attach(loop)
        for job in list(self._queue.values()):
            self.cancel(job)
        for worker in list(self._workers.values()):
            if worker.job is not None:
                self.cancel(worker.job)

    def close(self) -> Future[None]:
        """No more jobs from here on; the future is done when the last one is, and all workers gone."""
        if self._closing is None:
            self._closing = self.loop.create_future()
            self._advance_close()
        return self._closing

    def kill(self) -> None:
        """Ends all workers at once and fails their jobs. Nothing is waited for."""
        self._killed = True
        jobs = list(self._queue.values())
        jobs += [worker.job for worker in self._workers.values() if worker.job is not None]
        self._queue.clear()
        self._idle.clear()
        for channel in self._channels():
            channel.close()  # that of the control connection: the fork server kills them all
        for worker in self._workers.values():
            if worker.orphan:
                _kill_orphan(worker)
        self._workers.clear()
        self._close_page()
        if self._last_call is not None:
            self._last_call.cancel()
        for job in jobs:
            job.fail(ExecutorClosedError(f"the executor was killed before {job.name} had ended"))
        self._tell_closed()

    def count(self, state: str) -> int:
        """How many workers are ``starting``, ``idle``, ``busy`` or ``dying``."""
        return sum(worker.state == state for worker in self._workers.values())

    @property
    def queued(self) -> int:
        """How many jobs no worker has yet."""
        return len(self._queue)

    @property
    def alive(self) -> int:
        """How many workers can run jobs, now or soon."""
        return len(self._workers) - self.count(_DYING)

    def _channels(self) -> list[Channel]:
        channels = [worker.channel for worker in self._workers.values()]
        return [self._control, *channels] if self._control else channels

    # --- who gets the next job -------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self._idle and self._queue:
            _, job = self._queue.popitem(last=False)
            if not job.future.done():  # else it is cancelled, and cancel() is about to be called
                self._give(self._idle.pop(), job)
        while self._should_start():
            self._start_worker()
        if self._queue and not self.alive and self._failed_starts >= _MOST_FAILED_STARTS:
            self._fail_queue()
        self._advance_close()

    def _give(self, worker: _Worker, job: Job) -> None:
        worker.state, worker.job, job.worker = _BUSY, job, worker
        worker.channel.send(job.call.frame(job.number), job.call.descriptors)

    def _release(self, worker: _Worker) -> None:
        """Takes the job from a worker that has replied, and gives it the next one."""
        job, worker.job = worker.job, None
        if job is not None:
            job.worker = None
            self.completed += 1
        if worker.orphan:
            self._bury(worker)
            return
        worker.state = _IDLE
        self._idle.append(worker)
        self._dispatch()

    # --- starting workers ------------------------------------------------------------------------

    def _should_start(self) -> bool:
        if not self._queue or not self._slots or self._failed_starts >= _MOST_FAILED_STARTS:
            return False
        return self.count(_STARTING) < len(self._queue) and self.alive < self._plan.limit(self)

    def _start_worker(self) -> None:
        try:
            control = self._connect()
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._start_failed(error)
            return
        worker = _Worker(self._slots.pop())
        recipe = _forkserver.Recipe(worker.slot, self._plan.initializer, self._preload())
        start = _wire.encode(_wire.START, worker.number, [recipe.dumps()], descriptors=2)
        worker.channel = Channel(
            self.loop, ours, partial(self._on_frame, worker), partial(self._on_end, worker)
        )
        self._workers[worker.number] = worker
        self._marks.clear(worker.slot)
        control.send(start, [theirs.fileno(), self._page], theirs.close)

    def _preload(self) -> tuple[str, ...]:
        modules = {job.call.module for job in self._queue.values()} - {"__main__", ""}
        return tuple(sorted(modules))

    def _connect(self) -> Channel:
        if self._control is not None:
            return self._control
        self._make_page()
        server = _forkserver.ensure(self._plan.start_method)
        try:
            connection = server.connect()
        except ConnectionError:  # it died while no pool was connected
            _forkserver.discard(server)
            server = _forkserver.ensure(self._plan.start_method)
            connection = server.connect()
        self._server = server
        self._control = Channel(self.loop, connection, self._on_report, self._on_server_end)
        return self._control

    def _make_page(self) -> None:
        if self._page >= 0:
            return
        page = _memory.create_segment(8 * _SLOTS)
        try:
            self._marks = Marks(_memory.map_segment(page))
        except OSError:
            os.close(page)
            raise
        self._page = page

    def _start_failed(self, cause: BaseException) -> None:
        self._failed_starts += 1
        self._start_cause = cause

    def _fail_queue(self) -> None:
        cause, jobs = self._start_cause, list(self._queue.values())
        self._queue.clear()
        for job in jobs:
            error = WorkerStartError(
                f"no worker could be started for {job.name}, {self._failed_starts} times in a "
                f"row: {type(cause).__name__}: {cause}; {_advice(cause)}"
            )
            error.__cause__ = cause
            job.fail(error)

    # --- what workers say ------------------------------------------------------------------------

    def _on_frame(self, worker: _Worker, frame: _wire.Frame) -> None:
        if frame.kind == _wire.READY and worker.state == _STARTING:
            worker.pid = int.from_bytes(frame.body, "little")
            self._failed_starts = 0
            self._release(worker)
        elif frame.kind == _wire.FAILED and worker.state == _STARTING:
            worker.pid = frame.number
            worker.cause = _raised.loads(frame.body, "the initializer", worker.pid)
        elif worker.job is not None and worker.job.number == frame.number:
            self._on_reply(worker, worker.job, frame)
        else:
            frame.close()
            self._on_end(worker, _wire.ProtocolError(f"an unexpected frame of kind {frame.kind}"))

    def _on_reply(self, worker: _Worker, job: Job, frame: _wire.Frame) -> None:
        if frame.kind == _wire.REFUSED:
            try:
                job.call.turn_to_value(frame.body.decode())
            except AsynclamError as error:
                self._release(worker)
                job.fail(error)
            else:
                self._give(worker, job)
            return
        # The worker has its next job before this result is unpickled.
        pid = worker.pid
        self._release(worker)
        job.receive(frame, pid)

    # --- how workers end -------------------------------------------------------------------------

    def _on_end(self, worker: _Worker, reason: Exception | None) -> None:
        """The channel has ended, or cannot be trusted: the worker ends, too, if it has not."""
        if worker.number not in self._workers:
            return
        if worker.state == _IDLE:
            self._idle.remove(worker)
        if worker.state != _STARTING:
            worker.state = _DYING
        if isinstance(reason, _wire.ProtocolError):
            worker.cause = reason
            worker.channel.close()  # nothing more is believed
        if worker.orphan:
            _kill_orphan(worker)
        elif worker.status is None:
            self._tell_kill(worker)
            return
        self._bury(worker)

    def _on_report(self, frame: _wire.Frame) -> None:
        """The fork server tells how a worker ended, or that it could not be started."""
        worker = self._workers.get(frame.number)
        value = int.from_bytes(frame.body, "little", signed=True)
        if worker is None:
            return
        if frame.kind == _wire.NOT_STARTED:
            worker.cause = OSError(value, os.strerror(value))
        worker.status = value
        worker.channel.drain()  # a result that was sent before counts
        if worker.number in self._workers:
            # Its end was not seen: something that it has forked holds the channel open.
            self._bury(worker)

    def _on_server_end(self, _reason: Exception | None) -> None:
        """The fork server is dead. Who runs a job goes on; the others are given up."""
        assert self._control is not None
        assert self._server is not None
        self._control.close()
        self._control = None
        _forkserver.discard(self._server)
        self._idle.clear()
        for worker in list(self._workers.values()):
            worker.orphan = True
            worker.channel.drain()
            if worker.state != _BUSY and worker.number in self._workers:
                self._bury(worker)
        self._dispatch()

    def _bury(self, worker: _Worker) -> None:
        """Forgets a worker that is dead or given up, and settles the job that it had."""
        worker.channel.close()
        del self._workers[worker.number]
        if worker in self._idle:
            self._idle.remove(worker)
        begun = self._marks.begun(worker.slot)
        self._slots.append(worker.slot)
        job, worker.job = worker.job, None
        if worker.state == _STARTING:
            self._start_failed(worker.cause or _death("nothing yet", worker))
        elif job is not None:
            self.deaths += 1
            self._settle(job, begun, worker)
        self._dispatch()

    def _settle(self, job: Job, begun: int, worker: _Worker) -> None:
        job.losses += 1
        if begun == job.number or job.losses == _MOST_LOSSES:
            error = _death(job.name, worker)
            error.__cause__ = worker.cause
            job.fail(error)
        else:  # it had not begun: it runs elsewhere, and first
            job.worker = None
            self._queue[job.number] = job
            self._queue.move_to_end(job.number, last=False)

    def _kill(self, worker: _Worker) -> None:
        worker.state = _DYING
        worker.channel.close()
        if worker.orphan:
            _kill_orphan(worker)
            self._bury(worker)
        else:
            self._tell_kill(worker)

    def _tell_kill(self, worker: _Worker) -> None:
        if self._control is not None:
            self._control.send(_wire.encode(_wire.KILL, worker.number))

    # --- the end of the pool ---------------------------------------------------------------------

    def _advance_close(self) -> None:
        if self._closing is None or self._killed or self._queue or self.count(_BUSY):
            return
        if not self._workers:
            self.kill()  # nothing is left but the control connection
            return
        for worker in list(self._workers.values()):
            if worker.state in (_STARTING, _IDLE):
                worker.state = _DYING
                worker.channel.close()
        self._idle.clear()
        if self._last_call is None:
            self._last_call = self.loop.call_later(_PATIENCE, self.kill)

    def _close_page(self) -> None:
        if self._page >= 0:
            os.close(self._page)
            self._page = -1
            del self._marks

    def _tell_closed(self) -> None:
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)


def _kill_orphan(worker: _Worker) -> None:
    # Init reaps it, so its pid may be another's by now; that its channel was open just before
    # makes this as good as certain, and nobody else is left to do it.
    if worker.pid is not None:
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except OSError:
            pass


def _death(job: str, worker: _Worker) -> WorkerDiedError:
    status = worker.status
    if status is None:
        return WorkerDiedError(job, pid=worker.pid)
    if os.WIFSIGNALED(status):
        return WorkerDiedError(job, pid=worker.pid, signal=os.WTERMSIG(status))
    return WorkerDiedError(job, pid=worker.pid, exitcode=os.waitstatus_to_exitcode(status))


def _advice(cause: BaseException | None) -> str:
    if isinstance(cause, WorkerDiedError):
        return "it may lack memory; call the initializer and import the module alone to see"
    if isinstance(cause, OSError) and cause.errno in _LIMITS:
        return "lower max_workers, or raise the limit of processes, descriptors or memory"
    return "if the initializer raised it, correct that"


_LIMITS = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
