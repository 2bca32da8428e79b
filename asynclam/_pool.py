"""Workers' lives, and who gets the next job. Nothing here awaits: bookkeeping is never interrupted.

Theory of operation. A pool belongs to one event loop at a time. It owns one control connection to
the fork server, one channel a worker, and the page of marks.

    worker:  STARTING ──READY──► IDLE ◄──reply── BUSY ──channel ended──► DYING ──EXITED──► gone
                 └──FAILED, NOT_STARTED, death──► failed start  (killed or retired: DYING at once)

A job is sent to an idle worker or waits in the queue. Workers are started when jobs wait, up to
``max_workers``, and live on; the first of a Lambda handler is started before there is a job.

Pipelining. A job that takes microseconds would wait longer for its turn than it runs. So once all
workers are there, a job may be sent to a busy one, as long as all that the worker has is expected,
by the run times of the same functions before, to be done within ``_MOST_WAIT``. The jobs in a
channel have their order, and are run and replied to in that order.

Coroutines. A worker has plain jobs or coroutines, never both. Of the latter it runs many at once, and
its replies may come in any order. They begin as they are read, so none is ever revoked. A job that is
cancelled is told so by a CANCEL, and its worker is sent no more until it has ended. If it goes on
nevertheless it is left alone as long as the worker has others; when all that it has is overdue, the
worker is killed.

Revoking. An expectation may be wrong. A timer, which runs only while some worker has more than one
job, notices a worker that has not replied for a while; its jobs are revoked on the page of marks.
Once that has certainly been seen, *begun* on the page tells which job the worker runs; those after
it go back to the head of the queue.

Death. Two messengers tell of it, the end of the channel and EXITED from the fork server, in any
order. The first to come drains the channel, so a result that was sent before the death counts. A
worker whose channel has ended is killed in any case: it may live on without it. Its job fails once
EXITED gives the reason; jobs that had not begun, by the page of marks, run again, elsewhere.

If the fork server dies, its control connection ends. Its workers go on until their job is done and
are replaced by workers of the next server; nobody can tell how such a worker ended.

Cancelling a job that a worker has is a KILL to that worker, once it has no other: the others are
revoked before, which takes a millisecond. A job whose terms give it time to end is revoked itself:
if it has begun, it is told to end by an INTERRUPT to that worker, which is killed only when the time
is over.

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
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from contextvars import Context
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

from . import _forkserver, _memory, _payload, _raised, _records, _wire
from ._channel import Channel
from ._errors import AsynclamError, WorkerDiedError, WorkerStartError
from ._job import USUAL, Counts, Job, Terms
from ._life import Life
from ._recipe import Recipe
from ._turns import Rota, Work
from ._worker import Marks, kill_group

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, TimerHandle

    from . import _segments
    from ._call import Call

_MOST_FAILED_STARTS = 3  # in a row, until the jobs that wait are failed
_MOST_LOSSES = 3  # workers that may die with a job before it has begun, until it fails
# Seconds in which an idle worker exits after end of file, and a cancelled coroutine ends, before the
# worker is killed.
_PATIENCE = 1.0
_SLOTS = 512  # of the page of marks: two pages of memory; workers that are dying have one, too

_MOST_WAIT = 500  # microseconds that the jobs in a channel are expected to run, all together
_MOST_IN_CHANNEL = 32  # jobs in a channel, however short they are
_MOST_COROUTINES = 64  # that a worker runs at once
_LONG = 1 << 32  # microseconds that a job is expected to run of which nothing is known
_MOST_KINDS = 4096  # of jobs whose run time is remembered, until all are forgotten
_OVERDUE = (
    0.001  # seconds without a reply, twice in a row, until what waits in a channel is revoked
)
_SEEN = 0.001  # seconds after which a store has certainly been seen by a process that runs

_STARTING, _IDLE, _BUSY, _DYING = "starting", "idle", "busy", "dying"

_NO_LAST = 1 << 62  # a worker may be sent any number of jobs

_IN_MEMORY = _wire.SEGMENT | _wire.RELEASES
_UNUSUAL = _IN_MEMORY | _wire.GROWN
_OUTCOMES = (_wire.RESULT, _wire.RAISED)

_worker_numbers = itertools.count(1)


class Plan:
    """How a pool's workers are made."""  # no NamedTuple, which takes longer than a module to make

    __slots__ = (
        "in_main", "initializer", "limit", "max_memory", "max_tasks", "start_method", "threads",
    )  # fmt: skip

    def __init__(
        self,
        start_method: _forkserver.StartMethod,
        initializer: bytes,
        limit: Callable[[Pool], int],  # how many this pool may have now
        *,
        in_main: bytes = b"",  # the initializer, for workers that have this process's __main__
        threads: int = 0,  # of numeric libraries in each; 0: as many as they like
        max_tasks: int | None = None,  # that each may run
        max_memory: int | None = None,  # bytes that each may take between two jobs
    ) -> None:
        self.start_method, self.initializer, self.limit = start_method, initializer, limit
        self.threads, self.max_tasks, self.max_memory = threads, max_tasks, max_memory
        self.in_main = in_main


class _Worker:
    """What the pool knows of one worker."""

    __slots__ = (
        "bound",
        "cause",
        "channel",
        "expected",
        "jobs",
        "last",
        "levels",
        "life",
        "number",
        "orphan",
        "pid",
        "revoking",
        "segments",
        "sent",
        "since",
        "slot",
        "state",
        "status",
        "transfer",
        "watched",
    )  # fmt: skip

    def __init__(self, slot: int, last: int) -> None:
        self.number = next(_worker_numbers)
        self.slot = slot
        self.state = _STARTING
        self.channel: Channel
        self.jobs: deque[Job] = deque()  # sent and not replied to, in order
        self.levels = _records.levels()  # of loggers, as it has been told
        self.sent = 0  # how many jobs, which gives each its order
        self.last = last  # the order of the last one that it may be sent; -1: it is to end
        self.since = 0.0  # when the first of its jobs had nothing before it any more
        self.expected = 0  # microseconds that its jobs are expected to run
        self.watched: Job | None = None  # its first job when it was looked at last
        self.revoking: TimerHandle | None = None  # until what waits in its channel is taken back
        self.transfer: Work | None = None  # of its job's payload into a segment, before it is sent
        self.segments: _segments.End | None = None  # once there is one
        self.pid: int | None = None
        self.status: int | None = None  # wait status, once the fork server has told it
        self.cause: BaseException | None = None  # what its initializer raised
        self.orphan = False  # its fork server is dead
        self.life: Life
        self.bound = False  # whether the end of that ends it

    @property
    def has_coroutines(self) -> bool:
        return bool(self.jobs) and self.jobs[0].call.is_coroutine


class Pool:
    """The workers of one executor on one event loop."""

    def __init__(self, loop: AbstractEventLoop, plan: Plan) -> None:
        self.loop = loop
        self.rota = Rota(loop)  # of the large payloads
        self.counts = Counts()
        self._plan = plan
        self._queue: OrderedDict[int, Job] = OrderedDict()  # by number, in order
        self._workers: dict[int, _Worker] = {}  # all whose end has not been told
        self._idle: list[_Worker] = []
        self._expected = 0  # calls that are being pickled
        self._arriving: dict[int, tuple[Job, Work]] = {}  # large results that are being unpickled
        self._share: _segments.Share | None = None
        self._times: dict[bytes, int] = {}  # microseconds, by kind of call
        self._watch: TimerHandle | None = None  # while a worker has more than one job
        self._may_grow = True  # whether there may be more workers, as far as is known
        self._failed_starts = 0
        self._start_cause: BaseException | None = None  # of the last failed start
        self._server: _forkserver.ForkServer | None = None
        self._control: Channel | None = None
        self._page = -1
        self._marks: Marks
        # That longest unused first: a worker that was given up may not have ended yet.
        self._slots = deque(range(_SLOTS))
        self._closing: Future[None] | None = None
        self._last_call: TimerHandle | None = None  # ends the patience of a close
        self._killed = False

    # --- what the executor asks ------------------------------------------------------------------

    def submit(self, call: Call, terms: Terms = USUAL) -> Job:
        """Hands a call to a worker, now or as soon as one is free."""
        job = Job(call, self.loop.create_future(), terms)
        if self._queue:  # so nobody has room for another
            self._queue[job.number] = job
            if self._may_grow:
                self._start_workers()
            return job
        worker = self._idle.pop() if self._idle else self._with_room(job)
        if worker is not None:
            if not worker.jobs:
                worker.since = job.made
            self._give(worker, job)
        elif self._killed:  # while the call was being pickled
            job.fail_as_killed()
        else:
            self._failed_starts = 0
            self._queue[job.number] = job
            self._start_workers()
        return job

    def prestart(self) -> None:
        """Starts a worker ahead of the first job, where a fork is all that it takes.

        A spawned server had better know what the job needs: it imports that once, for all workers.
        """
        try:
            forked = _forkserver.ensure(self._plan.start_method).forked
        except OSError:  # the first job tries again, and tells who waits for it
            return
        if forked and not self.alive:
            self._start_worker()

    def expect(self) -> None:
        """A call is about to come: a close waits for it, as for the jobs."""
        self._expected += 1

    def expect_no_more(self) -> None:
        """That call comes now, in this turn of the loop, or never."""
        self._expected -= 1
        if self._closing is not None and not self.loop.is_closed():
            self.loop.call_soon(self._advance_close)

    def cancel(self, job: Job) -> None:
        """Stops the work on a job whose future is done: drops it, or kills the worker that has it.

        If the terms of the job give it time to end, and a worker has it, it has a ``grace`` then.
        """
        self.counts.cancelled += 1
        self._queue.pop(job.number, None)
        worker = job.worker
        if job.number in self._arriving:
            self._arriving.pop(job.number)[1].cancel()
        elif worker is not None and job.call.is_coroutine and not _is_in_transfer(worker, job):
            self._cancel_coroutine(worker, job)
            return
        elif worker is not None and not job.call.is_coroutine and len(worker.jobs) > 1:
            self._give_time(job)
            self._revoke(worker)  # and sees to the cancelled jobs when the others are safe
            return
        elif worker is not None and worker.transfer is not None:
            self._stop_transfer(worker)  # it has not heard of the job yet
            worker.sent -= 1
            worker.last -= 1
            worker.since = perf_counter()
            self._requeue(worker, worker.jobs.pop())
            self._refill(worker)
        elif worker is not None and self._may_have_begun(worker) and self._give_time(job):
            self._revoke(worker)  # and sees to it if it has begun
            return
        elif worker is not None:
            self._kill(worker)
        job.call.close()  # after its frame was dropped with the channel: it names the descriptors
        self._dispatch()

    def hurry(self, job: Job) -> None:
        """Ends the time that a cancelled job has; the worker that runs it is killed."""
        worker, grace = job.worker, job.grace
        if worker is None or grace is None:
            return
        grace.is_over = True
        if job.call.is_coroutine:
            worker.last = -1
            self._kill_if_overdue(worker)
        elif worker.revoking is None and worker.state is _BUSY:
            self._kill(worker)
            self._dispatch()

    def attach(self, loop: AbstractEventLoop) -> None:
        """Moves the idle workers to another loop; the one before is closed, and its jobs with it."""
        self.loop = loop
        self._closing = self._last_call = self._watch = None
        for _, work in list(self._arriving.values()):
            work.cancel()
        self.rota = Rota(loop)
        self._arriving.clear()
        for channel in self._channels():
            channel.attach(loop)
        for job in self._queue.values():
            job.call.close()
        self._queue.clear()
        for worker in list(self._workers.values()):
            if worker.jobs or worker.revoking:
                self._kill(worker)

    def close(self) -> Future[None]:
        """No more jobs from here on; the future is done when the last one is, and all workers gone."""
        if self._closing is None:
            self._closing = self.loop.create_future()
            self._advance_close()
        return self._closing

    def kill_workers(self) -> None:
        """Ends the workers' processes at once, from any thread; :meth:`kill` is to follow in the loop's.

        Those that no life pipe binds end with that.
        """
        self._killed = True
        for worker in list(self._workers.values()):
            worker.life.end()

    def kill(self) -> None:
        """Ends all workers at once and fails their jobs. Nothing is waited for."""
        self._killed = True
        jobs = list(self._queue.values())
        for worker in self._workers.values():
            jobs += worker.jobs
        for job, work in list(self._arriving.values()):
            work.cancel()
            jobs.append(job)
        self._arriving.clear()
        self._queue.clear()
        self._idle.clear()
        for channel in self._channels():
            channel.close()  # that of the control connection: the fork server kills them all
        for worker in self._workers.values():
            if worker.orphan:
                _kill_orphan(worker)
            self._stop_timers(worker)
            worker.life.end()
        self._workers.clear()
        self._close_page()
        for timer in (self._last_call, self._watch):
            if timer is not None:
                timer.cancel()
        for job in jobs:
            job.worker = None  # who has cancelled it in this turn, too, finds nothing left to end
            job.fail_as_killed()
        self._tell_closed()

    def count(self, state: str) -> int:
        """How many workers are ``starting``, ``idle``, ``busy`` or ``dying``."""
        return sum(worker.state == state for worker in list(self._workers.values()))

    def under_way(self) -> list[tuple[str, float]]:
        """What workers run, by name, and for how many seconds."""
        now = perf_counter()
        found = []
        for worker in list(self._workers.values()):
            for job in tuple(worker.jobs):
                since = job.made if job.call.is_coroutine else worker.since
                found.append((job.name, now - since))
                if not job.call.is_coroutine:
                    break  # the others wait behind it
        return found

    @property
    def queued(self) -> int:
        """How many jobs no worker has yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """How many jobs workers have."""
        return sum(len(worker.jobs) for worker in list(self._workers.values()))

    @property
    def alive(self) -> int:
        """How many workers can run jobs, now or soon."""
        return len(self._workers) - self.count(_DYING)

    @property
    def segments(self) -> int:
        """How many segments objects look into, on either side, as far as is known."""
        ends = [worker.segments for worker in list(self._workers.values())]
        return sum(end.in_use for end in ends if end is not None)

    def _channels(self) -> list[Channel]:
        channels = [worker.channel for worker in self._workers.values()]
        return [self._control, *channels] if self._control else channels

    # --- who gets the next job -------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Gives jobs to idle workers, and starts workers for those that still wait."""
        while self._queue:
            job = next(iter(self._queue.values()))
            worker = self._idle.pop() if self._idle else self._with_room(job)
            if worker is None:
                break
            del self._queue[job.number]
            if not job.future.done():  # else it is cancelled, and cancel() is about to be called
                if not worker.jobs:
                    worker.since = perf_counter()
                self._give(worker, job)
            elif not worker.jobs:  # pragma: no cover - has not been seen: nobody is idle then
                self._idle.append(worker)
        self._start_workers()
        self._advance_close()

    def _give(self, worker: _Worker, job: Job) -> None:
        if worker.levels is not (levels := _records.levels()):
            worker.levels = levels
            worker.channel.send(_wire.encode(_wire.LEVELS, 0, [levels]))
        worker.sent = job.order = worker.sent + 1
        worker.state, job.worker = _BUSY, worker
        kind = job.call.kind
        job.duration = _LONG if kind is None else self._times.get(kind, _LONG)
        worker.expected += job.duration
        worker.jobs.append(job)
        if len(worker.jobs) > 1 and self._watch is None and not job.call.is_coroutine:
            self._watch = self.loop.call_later(_OVERDUE, self._look_for_overdue)
        size = _payload.size_of(job.call.parts) if kind is None else 0
        if size >= _payload.LEAST_IN_SEGMENT:
            lease = self._lease(worker, size)
            if lease is not None:
                transfer = self.rota.begin(self._send_in_segment(worker, job, lease))
                worker.transfer = None if transfer.ended else transfer
                return
        self._send(worker, job)

    def _send(self, worker: _Worker, job: Job) -> None:
        """Sends a job in its frame."""
        notes = worker.segments.notes() if worker.segments is not None else b""
        worker.channel.send(job.call.frame(job.number, notes), job.call.descriptors)

    def _send_in_segment(
        self, worker: _Worker, job: Job, lease: _segments.Lease
    ) -> Generator[None, None, None]:
        """Copies the payload slice by slice, then sends the job. Closed, it has done nothing."""
        from . import _segments

        segments = self._segments_of(worker)
        try:
            yield
            yield from _segments.copy_in(lease.view, job.call.parts)
        except BaseException as error:
            segments.outgoing.cancel(lease)
            if not isinstance(error, GeneratorExit):  # Ctrl-C, and the loop may go on
                worker.transfer = None
                self._send(worker, job)
            raise
        worker.transfer = None
        notes, added = segments.notes(), lease.descriptors
        worker.channel.send(
            job.call.frame(job.number, notes, lease.record, len(added)),
            [*job.call.descriptors, *added],
            partial(segments.outgoing.sent, lease),
        )
        if job.call.is_coroutine and self._queue:  # the worker has room for others again
            self.loop.call_soon(self._dispatch)

    def _lease(self, worker: _Worker, nbytes: int) -> _segments.Lease | None:
        try:
            return self._segments_of(worker).outgoing.acquire(nbytes)
        except OSError:  # at the limit of descriptors not even the module can be imported
            return None

    def _segments_of(self, worker: _Worker) -> _segments.End:
        from . import _segments

        if self._share is None:
            self._share = _segments.Share()
        if worker.segments is None:
            worker.segments = _segments.End(self._share)
        return worker.segments

    def _refill(self, worker: _Worker) -> None:
        """Gives a worker that has replied more to do, as much as fits in its channel."""
        if worker.state is _DYING or worker.status is not None:
            return  # its last words
        if worker.orphan:
            if not worker.jobs:
                self._bury(worker)
            return
        while self._queue and worker.revoking is None and worker.sent < worker.last:
            job = next(iter(self._queue.values()))
            taker = self._taker(worker, job)
            if taker is None:
                break
            del self._queue[job.number]
            if not job.future.done():
                self._give(taker, job)
        if not worker.jobs and worker.revoking is None:
            self._rest(worker)
        elif worker.last < 0 and worker.has_coroutines:
            self._kill_if_overdue(worker)

    def _rest(self, worker: _Worker) -> None:
        """Lets a worker wait that has no job; or end, if it is to have no other."""
        if worker.sent >= worker.last:
            self._retire(worker)
            return
        worker.state = _IDLE
        self._idle.append(worker)
        if self._closing is not None:
            self._advance_close()

    def _taker(self, worker: _Worker, job: Job) -> _Worker | None:
        """Who gets the next job when this worker has replied; ``None``: nobody yet."""
        if not worker.jobs:
            return worker
        if not self._fits(worker, job):
            return None
        if job.call.is_coroutine:
            return self._with_room(job)  # that which has the fewest
        return worker

    def _retire(self, worker: _Worker) -> None:
        """Ends a worker without a job, which is to have no other."""
        if worker.last >= 0:
            self.counts.spent += 1
        worker.state = _DYING
        worker.channel.close()
        self._dispatch()

    def replace_workers(self) -> None:
        """Ends each worker that there is as soon as it has no job; others are started for the next."""
        for worker in list(self._workers.values()):
            worker.last = -1
            if worker.state is _IDLE:
                self._idle.remove(worker)
                self._retire(worker)

    # --- pipelining ------------------------------------------------------------------------------

    def _with_room(self, job: Job) -> _Worker | None:
        """A busy worker that is expected to be done soon, if no other can be had."""
        found = None
        for worker in self._workers.values():
            if worker.state is _STARTING:
                return None
            if (
                worker.state is _BUSY
                and self._fits(worker, job)
                and (found is None or worker.expected < found.expected)
            ):
                found = worker
        if found is not None and self.alive < self._plan.limit(self):
            return None
        return found

    def _fits(self, worker: _Worker, job: Job) -> bool:
        kind = job.call.kind
        if kind is None:
            return job.call.is_coroutine and self._fits_beside(worker)
        if worker.revoking or worker.orphan:
            return False
        if not 0 < len(worker.jobs) < _MOST_IN_CHANNEL:  # 0: it has jobs to skip, and to say so
            return False
        if worker.sent >= worker.last:
            return False
        return worker.expected + self._times.get(kind, _LONG) <= _MOST_WAIT

    def _fits_beside(self, worker: _Worker) -> bool:
        """Whether a coroutine may be sent to a worker that runs others."""
        return (
            worker.has_coroutines
            and len(worker.jobs) < _MOST_COROUTINES
            and worker.sent < worker.last
            and worker.transfer is None  # of the one before
            and not worker.orphan
            and all(job.grace is None for job in worker.jobs)  # else one may be holding up the rest
        )

    def _learn(self, kind: bytes, elapsed: int) -> None:
        """Takes note of a run time: at once if it was longer than expected, else bit by bit."""
        known = self._times.get(kind)
        if known is None:
            if len(self._times) >= _MOST_KINDS:
                self._times.clear()
            self._times[kind] = elapsed
        elif elapsed != known:
            self._times[kind] = elapsed if elapsed > known else known - (known - elapsed + 7) // 8

    def _look_for_overdue(self) -> None:
        self._watch = None
        more = False
        for worker in list(self._workers.values()):
            if self._is_overdue(worker):
                self._revoke(worker)
            several = len(worker.jobs) > 1 and not worker.has_coroutines
            worker.watched = worker.jobs[0] if several else None
            more = more or several
        if more and self._watch is None:
            self._watch = self.loop.call_later(_OVERDUE, self._look_for_overdue)

    def _is_overdue(self, worker: _Worker) -> bool:
        """Whether its first job is the same as when it was looked at last, and others wait."""
        first = worker.watched
        if first is None or not worker.jobs or worker.jobs[0] is not first:
            return False
        # The loop may have been busy with something else, and replies may be here.
        here = worker.channel.catch_up()
        return here and len(worker.jobs) > 1 and worker.jobs[0] is first

    def _revoke(self, worker: _Worker) -> None:
        """Lets the worker begin no more of the jobs that it has."""
        if worker.revoking is None and worker.state is _BUSY:
            self._marks.revoke(worker.slot, worker.sent)
            seen = perf_counter() + _SEEN
            worker.revoking = self.loop.call_later(_SEEN, self._take_back, worker, seen)

    def _take_back(self, worker: _Worker, seen: float) -> None:
        """Queues again what the worker has not begun, and now never will."""
        if perf_counter() < seen:  # uvloop counts from the beginning of this turn of the loop
            worker.revoking = self.loop.call_later(_SEEN, self._take_back, worker, seen)
            return
        begun = self._marks.begun(worker.slot)
        if not worker.channel.catch_up():  # a large result is coming; those behind it can wait
            worker.revoking = self.loop.call_later(_SEEN, self._take_back, worker, seen)
            return
        worker.since = perf_counter()
        worker.revoking = None  # not before: a reply would bring jobs that *begun* says nothing of
        if worker.state is not _BUSY or worker.number not in self._workers:
            return  # it is dead, dying or given up, which settles its jobs
        if self._queue_again(worker, begun) and not worker.jobs:
            pass  # it is stopped, or has no CPU: until it has skipped the last, it gets no other
        else:
            for job in worker.jobs:  # one at most
                worker.expected += _LONG - job.duration
                job.duration = _LONG
            if worker.jobs and worker.jobs[0].future.done():  # cancelled, and runs
                self._end_job(worker, worker.jobs[0])
            else:
                self._refill(worker)
        self._dispatch()

    # --- cancelled jobs that have time to end -----------------------------------------------------

    def _may_have_begun(self, worker: _Worker) -> bool:
        # A job that is not sent has not; it would go on being sent while its descriptors are closed.
        return worker.state is _BUSY and not worker.channel.is_sending

    def _give_time(self, job: Job) -> bool:
        """Whether the job has time to end; it begins once it is known to have begun."""
        if not job.terms.cancel_grace:
            return False
        from ._grace import Grace

        job.grace = Grace(self.loop)
        return True

    def _end_job(self, worker: _Worker, job: Job) -> None:
        """Tells a cancelled job to end, which the worker runs and nothing else; or kills it."""
        if job.grace is None or job.grace.is_over:
            self._kill(worker)
            return
        self._marks.cancel(worker.slot, job.order)
        if worker.last > 0:
            worker.last -= 1  # it has run, though that will be told as if it had not
        job.grace.begin(
            job.terms.cancel_grace,
            partial(self._interrupt, worker),
            partial(self._marks.has_heard, worker.slot, job.order),
            partial(self.hurry, job),
        )

    def _cancel_coroutine(self, worker: _Worker, job: Job) -> None:
        """Has CancelledError raised in a job, and does what there is to do if it goes on."""
        if worker.state is not _BUSY:
            return  # its end settles the job
        from ._grace import Grace

        job.grace = Grace(self.loop)
        job.grace.begin(
            job.terms.cancel_grace or _PATIENCE,
            partial(worker.channel.send, _wire.encode(_wire.CANCEL, job.number)),
            _yes,  # a frame is not lost
            partial(self.hurry, job),
        )

    def _kill_if_overdue(self, worker: _Worker) -> None:
        """Kills a worker whose coroutines were all cancelled, and have not ended in time."""
        if worker.state is _BUSY and all(
            job.grace is not None and job.grace.is_over for job in worker.jobs
        ):
            self._kill(worker)
            self._dispatch()

    def _interrupt(self, worker: _Worker) -> None:
        if worker.orphan:
            _signal_orphan(worker, signal.SIGURG)
        elif self._control is not None:  # pragma: no branch - without it all are orphans
            self._control.send(_wire.encode(_wire.INTERRUPT, worker.number))

    def _queue_again(self, worker: _Worker, begun: int) -> int:
        """Puts the jobs that the worker has not begun at the head of the queue; how many."""
        before = len(worker.jobs)
        while worker.jobs and worker.jobs[-1].order > begun:
            self._requeue(worker, worker.jobs.pop())
        return before - len(worker.jobs)

    def _requeue(self, worker: _Worker, job: Job) -> None:
        """Puts a job at the head of the queue that was the worker's."""
        worker.expected -= job.duration
        if worker.last >= 0:
            worker.last += 1
        job.worker = None
        if job.future.done():
            job.drop()
        else:
            self._queue[job.number] = job
            self._queue.move_to_end(job.number, last=False)

    def _stop_timers(self, worker: _Worker) -> None:
        """Nothing of the worker goes on by itself any more."""
        if worker.revoking is not None:
            worker.revoking.cancel()
            worker.revoking = None
        self._stop_transfer(worker)
        if worker.segments is not None:
            worker.segments.close()

    def _stop_transfer(self, worker: _Worker) -> None:
        if worker.transfer is not None:
            worker.transfer.cancel()
            worker.transfer = None

    # --- starting workers ------------------------------------------------------------------------

    def _start_workers(self) -> None:
        """Starts as many as there are jobs that wait, and may be."""
        self._may_grow = True
        while self._queue and self._failed_starts < _MOST_FAILED_STARTS:
            if self.alive >= self._plan.limit(self) or not self._slots:
                self._may_grow = False  # until a worker ends, or nothing waits
                return
            if self.count(_STARTING) >= len(self._queue):
                return
            self._start_worker()
        if self._queue and not self.alive:
            self._fail_queue()

    def _start_worker(self) -> None:
        try:
            control = self._connect()
            ours, theirs, life = _connections()
        except (OSError, ValueError) as error:  # ValueError: ASYNCLAM_SEGMENTS makes no sense
            self._start_failed(error)
            return
        worker = _Worker(self._slots.popleft(), self._plan.max_tasks or _NO_LAST)
        recipe = Recipe(
            worker.slot,
            self._plan.initializer,
            self._preload(),
            in_main=self._plan.in_main if self._server is not None and self._server.forked else b"",
            threads=self._plan.threads,
            max_memory=self._plan.max_memory or 0,
        )
        start = _wire.encode(_wire.START, worker.number, [recipe.dumps()], descriptors=3)
        worker.life = life
        worker.channel = Channel(
            self.loop, ours, partial(self._on_frames, worker), partial(self._on_end, worker)
        )
        self._workers[worker.number] = worker
        self._marks.clear(worker.slot)
        descriptors = [theirs.fileno(), self._page, life.given]
        control.send(start, descriptors, partial(_handed_over, theirs, life))

    def _preload(self) -> tuple[str, ...]:
        modules = {job.call.module for job in self._queue.values()} - {""}
        if any(job.call.is_coroutine for job in self._queue.values()):
            modules |= {f"{__package__}._coroutines", f"{__package__}._loops"}
        if "__main__" in modules:  # by value, and each worker would import this for itself
            modules = modules - {"__main__"} | {"cloudpickle"}
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
        self._control = Channel(
            self.loop, connection, self._on_reports, self._on_server_end, thorough=True
        )
        return self._control

    def _make_page(self) -> None:
        if self._page >= 0:
            return
        _memory.are_payloads_streamed()  # reads the environment, once, where an error is expected
        page = _memory.create_segment(Marks.SLOT * _SLOTS)
        try:
            self._marks = Marks(_memory.map_segment(page))
        except OSError:
            os.close(page)
            raise
        self._page = page
        _memory.drop_in_thread()  # what jobs and their callers have shared

    def _start_failed(self, cause: BaseException) -> None:
        self._failed_starts += 1
        self._start_cause = cause

    def _fail_queue(self) -> None:
        cause, jobs = self._start_cause, list(self._queue.values())
        self._queue.clear()
        for job in jobs:
            error = WorkerStartError(
                f"no worker could be started for {job.name}, {self._failed_starts} times in a "
                f"row: {type(cause).__name__}: {cause}; {_advice(cause)}{_tries(job)}"
            )
            error.tries, error.__cause__ = job.tries, cause
            job.fail(error)

    # --- what workers say ------------------------------------------------------------------------

    def _on_frames(self, worker: _Worker, frames: list[_wire.Frame]) -> None:
        # The worker has its next jobs before these results are unpickled.
        if len(frames) == 1:
            frame = frames[0]
            job = self._take(worker, frame)
            if job is None:
                return
            if frame.private or frame.flags & _wire.PIECES:
                self._receive(job, frame, worker.pid)
            else:
                job.receive(frame, worker.pid)
            return
        replies = []
        worker.channel.hold()
        for frame in frames:
            if worker.channel.closed:  # because of the frame before
                frame.close()
                continue
            job = self._take(worker, frame)
            if job is not None:
                replies.append((job, frame))
        worker.channel.unhold()
        self._settle_all(replies, worker.pid)

    def _receive(self, job: Job, frame: _wire.Frame, pid: int | None) -> None:
        if not (frame.private or frame.flags & _wire.PIECES):
            job.receive(frame, pid)
            return
        work = self.rota.begin(self._receive_in_turns(job, frame, pid))
        if not work.ended:
            self._arriving[job.number] = job, work

    def _receive_in_turns(
        self, job: Job, frame: _wire.Frame, pid: int | None
    ) -> Generator[None, None, None]:
        try:
            yield
            yield from job.receive_steps(frame, pid)
        finally:
            frame.close()
            self._arriving.pop(job.number, None)
            self._advance_close()

    def _take(self, worker: _Worker, frame: _wire.Frame) -> Job | None:
        """The job that a frame is the outcome of; the worker has more to do then."""
        jobs = worker.jobs
        if len(jobs) > 1 and frame.kind != _wire.RECORD and jobs[0].call.is_coroutine:
            _bring_forward(jobs, frame)
        if not jobs or jobs[0].number != frame.number or frame.kind not in _OUTCOMES:
            self._on_other(worker, frame)
            return None
        if frame.flags & _UNUSUAL and not self._open(worker, frame):
            return None
        job = jobs.popleft()
        job.worker = None
        worker.expected -= job.duration
        elapsed = job.duration = frame.elapsed
        self._count_reply(worker, job, elapsed)
        if job.call.kind is not None:
            self._learn(job.call.kind, elapsed)
        self._refill(worker)
        return job

    def _count_reply(self, worker: _Worker, job: Job, elapsed: int) -> None:
        now, counts = perf_counter(), self.counts
        away = now - worker.since
        if job.call.is_coroutine:  # what it did not run, it has waited, somewhere
            away = elapsed / 1e6 if elapsed < _wire.MOST_ELAPSED else now - job.made
        counts.completed += 1
        counts.waited += now - away - job.made
        counts.away += away
        counts.ran += elapsed if elapsed < _wire.MOST_ELAPSED else int(away * 1e6)
        worker.since = now  # of its next job

    def _settle_all(self, replies: list[tuple[Job, _wire.Frame]], pid: int | None) -> None:
        replies.reverse()
        try:
            while replies:
                job, frame = replies.pop()
                self._receive(job, frame, pid)
        finally:
            if replies:  # unpickling raised KeyboardInterrupt, which ends this callback
                replies.reverse()
                self.loop.call_soon(self._settle_all, replies, pid)

    def _open(self, worker: _Worker, frame: _wire.Frame) -> bool:
        """Puts the payload in the place of its record; false if the worker is not to be believed."""
        if frame.flags & _wire.GROWN:
            self.counts.grown += worker.last >= 0
            worker.last = -1  # it is sent no more, and retires when it has no job
            if len(worker.jobs) > 1 and not worker.has_coroutines:
                self._revoke(worker)
            if not frame.flags & _IN_MEMORY:
                return True
        try:
            segments = self._segments_of(worker)
            if frame.flags & _wire.RELEASES:
                frame.body = segments.noted(frame.body)
            if frame.flags & _wire.SEGMENT:
                opened = segments.incoming.open(frame.body, frame.descriptors)
                frame.body, frame.private = opened
        except _wire.ProtocolError as error:
            frame.close()
            self._on_end(worker, error)
            return False
        except OSError:  # at the limit of descriptors: this result is lost, and says so
            frame.close()
            frame.descriptors = None
        return True

    def _on_other(self, worker: _Worker, frame: _wire.Frame) -> None:
        """All that is no result: beginnings, refusals, and what makes no sense."""
        if frame.kind == _wire.RECORD:
            self._relay(worker, frame)
            return
        worker.since = perf_counter()
        job = worker.jobs[0] if worker.jobs else None
        if frame.flags & _UNUSUAL and not self._open(worker, frame):
            return
        if frame.kind == _wire.READY and worker.state is _STARTING:
            worker.pid = int.from_bytes(frame.body, "little")
            worker.bound = bool(frame.flags & _wire.BOUND)
            self._failed_starts = 0
            self._refill(worker)
            self._dispatch()
        elif frame.kind == _wire.FAILED and worker.state is _STARTING:
            worker.pid = frame.number
            worker.cause = _raised.loads(frame.body, "the initializer", worker.pid)
        elif frame.kind == _wire.SKIPPED and frame.number <= worker.sent:
            if job is not None and job.order == frame.number:  # else it was taken back before
                self._requeue(worker, worker.jobs.popleft())
            elif job is not None or frame.number < worker.sent:
                return
            if worker.state is _BUSY:
                self._refill(worker)
                self._dispatch()
        elif frame.kind == _wire.REFUSED and job is not None and job.number == frame.number:
            self._on_refused(worker, job, bytes(frame.body).decode(errors="replace"))
        else:
            frame.close()
            self._on_end(worker, _wire.ProtocolError(f"an unexpected frame of kind {frame.kind}"))

    def _relay(self, worker: _Worker, frame: _wire.Frame) -> None:
        """Has a log record or a warning of a worker handled: before its job is settled."""
        frame.close()  # it has no descriptors, if it is one
        try:
            handle = _records.received(frame.body)
        except _wire.ProtocolError as error:
            self._on_end(worker, error)
            return
        self.counts.dropped += frame.dropped
        contexts = (job.context for job in worker.jobs if job.number == frame.number)
        # Of no job, as that of a thread that was left running: it is nobody's. Without a context
        # of its own the callback would have that of whoever has started the worker.
        context = next(contexts, None) or Context()
        self.loop.call_soon(handle, context=context)

    def _on_refused(self, worker: _Worker, job: Job, reason: str) -> None:
        try:
            job.call.turn_to_value(reason)
        except AsynclamError as error:
            job.fail(error)
        self._requeue(worker, worker.jobs.popleft())
        self._refill(worker)
        self._dispatch()

    # --- how workers end -------------------------------------------------------------------------

    def _on_end(self, worker: _Worker, reason: Exception | None) -> None:
        """The channel has ended, or cannot be trusted: the worker ends, too, if it has not."""
        if worker.number not in self._workers:
            return  # pragma: no cover - it was buried, and its closed channel tells of no end
        if worker.state is _IDLE:
            self._idle.remove(worker)
        if worker.state is not _STARTING:
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

    def _on_reports(self, frames: list[_wire.Frame]) -> None:
        for frame in frames:
            self._on_report(frame)

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
        failure = _forkserver.discard(self._server)
        self._idle.clear()
        for worker in list(self._workers.values()):
            if worker.state is _STARTING:
                worker.cause = worker.cause or failure
            worker.orphan = worker.channel.thorough = True  # nobody else tells of its death now
            worker.channel.drain()
            if worker.state is not _BUSY and worker.number in self._workers:
                if worker.state is _DYING:  # the KILL may not have been read
                    _kill_orphan(worker)
                self._bury(worker)
        self._dispatch()

    def _bury(self, worker: _Worker) -> None:
        """Forgets a worker that is dead or given up, and settles the job that it had."""
        if self._killed:  # from another thread: kill(), which is about to come, settles all jobs
            return
        worker.channel.close()
        del self._workers[worker.number]
        if worker in self._idle:
            self._idle.remove(worker)
        self._stop_timers(worker)
        worker.life.end()
        # An orphan may live on for a moment, with jobs in its channel.
        self._marks.revoke(worker.slot, Marks.ALL)
        begun = self._marks.begun(worker.slot)
        self._slots.append(worker.slot)
        if worker.state is _STARTING:
            self._start_failed(worker.cause or _death("nothing yet", worker))
        elif worker.jobs:
            self.counts.deaths += any(not job.future.done() for job in worker.jobs)
            self._settle(worker, begun)
        self._dispatch()

    def _settle(self, worker: _Worker, begun: int) -> None:
        """Fails the job that a dead worker had begun, or retries it; those after it run elsewhere."""
        first = worker.jobs[0]
        if first.order > begun:  # it had begun none of them
            first.losses += 1
            if first.losses == _MOST_LOSSES:
                begun = first.order
        self._queue_again(worker, begun)
        while worker.jobs:
            job = worker.jobs.pop()
            job.tries += 1
            if job.tries <= job.terms.retries and not job.future.done():
                self.counts.retries += 1
                job.losses = 0
                self._requeue(worker, job)
                continue
            error = _death(job.name, worker, job.tries)
            error.__cause__ = worker.cause
            job.fail(error)

    def _kill(self, worker: _Worker) -> None:
        worker.state = _DYING
        self._stop_timers(worker)
        worker.channel.close()  # before the calls: frames in its buffer name their descriptors
        for job in worker.jobs:
            job.drop()
        worker.jobs.clear()
        if worker.orphan:
            _kill_orphan(worker)
            self._bury(worker)
        else:
            self._tell_kill(worker)

    def _tell_kill(self, worker: _Worker) -> None:
        worker.life.end()  # at once, while the fork server may be busy, or stopped
        if self._control is not None:  # pragma: no branch - without it all are orphans
            self._control.send(_wire.encode(_wire.KILL, worker.number))

    # --- the end of the pool ---------------------------------------------------------------------

    def _advance_close(self) -> None:
        if self._closing is None or self._killed or self._expected:
            return
        if self._queue or self._arriving or self.running:
            return
        if not self._workers:
            self.kill()  # nothing is left but the control connection
            return
        for worker in self._workers.values():
            if worker.orphan:  # all that it had was taken back; nobody would tell of its end
                _kill_orphan(worker)
                self._bury(worker)  # and comes back here
                return
        for worker in list(self._workers.values()):
            if worker.state is not _DYING:
                worker.state = _DYING
                worker.channel.close()
        self._idle.clear()
        if self._last_call is None:
            self._last_call = self.loop.call_later(_PATIENCE, self._lose_patience)

    def _lose_patience(self) -> None:
        """Kills the workers that are still there, but no job whose result is being unpickled."""
        self._last_call = None
        if not self._arriving:  # else its end begins another second
            self.kill()

    def _close_page(self) -> None:
        if self._page >= 0:
            os.close(self._page)
            self._page = -1
            del self._marks

    def _tell_closed(self) -> None:
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)


def _is_in_transfer(worker: _Worker, job: Job) -> bool:
    return worker.transfer is not None and worker.jobs[-1] is job


def _tries(job: Job) -> str:
    if not job.tries:
        return ""
    return f" (it has begun before: {job.tries} of its workers died while they ran it)"


def _bring_forward(jobs: deque[Job], frame: _wire.Frame) -> None:
    """Makes that coroutine the first which a frame is about, if there is one."""
    for job in jobs:
        if frame.number == (job.order if frame.kind == _wire.SKIPPED else job.number):
            jobs.remove(job)
            jobs.appendleft(job)
            return


def _yes() -> bool:
    return True


def _connections() -> tuple[socket.socket, socket.socket, Life]:
    """For a worker: our end of its channel, its own, and its life pipe.

    Raises:
        OSError: no descriptor is left.
    """
    life = Life()
    try:
        return *socket.socketpair(), life
    except OSError:
        life.handed_over()
        raise


def _handed_over(channel: socket.socket, life: Life) -> None:
    channel.close()
    life.handed_over()


def _signal_orphan(worker: _Worker, number: int) -> None:
    # As below; that its channel is open makes it certain.
    if worker.pid is not None and not worker.channel.ended:
        try:
            os.kill(worker.pid, number)
        except OSError:
            pass


def _kill_orphan(worker: _Worker) -> None:
    # Where the end of its life does not: that reaches no group whose worker is dead. Init reaps it, so
    # its pid may be another's by now; that its channel was open just before makes this as good as
    # certain, and nobody else is left to do it.
    if worker.pid is not None and (worker.channel.ended or not worker.bound):
        kill_group(worker.pid)


def _death(job: str, worker: _Worker, tries: int = 1) -> WorkerDiedError:
    garbage = str(worker.cause) if isinstance(worker.cause, _wire.ProtocolError) else ""
    end: dict[str, int] = {}
    if worker.status is not None and os.WIFSIGNALED(worker.status):
        end["signal"] = os.WTERMSIG(worker.status)
    elif worker.status is not None:
        end["exitcode"] = os.waitstatus_to_exitcode(worker.status)
    return WorkerDiedError(job, pid=worker.pid, tries=tries, garbage=garbage, **end)


def _advice(cause: BaseException | None) -> str:
    if isinstance(cause, WorkerDiedError):
        return "it may lack memory; call the initializer and import the module alone to see"
    if isinstance(cause, OSError) and cause.filename == _forkserver.interpreter():
        return (
            "if that is no Python interpreter, call asynclam.prepare() before there are threads, or "
            'give Executor start_method="fork"'
        )
    if isinstance(cause, OSError) and cause.errno in _LIMITS:
        return "lower max_workers, or raise the limit of processes, descriptors or memory"
    return "if the initializer raised it, correct that"


_LIMITS = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
