"""The pool of ``max_workers=0``: jobs run in this process, with the same pickling.

For debuggers, coverage and in-process mocks, and where nothing can be forked. A job blocks the loop
as long as it runs; it cannot be cancelled, for it has ended before anybody could. One that is a
coroutine runs as a task of the loop, and a cancel is raised in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

from . import _call, _coroutines, _steps, _wire, _worker
from ._errors import PayloadError
from ._job import USUAL, Counts, Job, Terms
from ._turns import Rota

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, Task


class InlinePool:
    """Has the verbs of :class:`asynclam._pool.Pool`, and no workers."""

    alive = queued = segments = 0

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self.rota = Rota(loop)
        self.counts = Counts()
        self._tasks: dict[int, tuple[Job, Task[_wire.Frame]]] = {}  # of coroutines, by number
        self._closing: Future[None] | None = None
        self._killed = False

    def submit(self, call: _call.Call, terms: Terms = USUAL) -> Job:
        """Runs the call and settles it, before it returns; a coroutine is begun."""
        job = Job(call, self.loop.create_future(), terms)
        if self._killed:  # while the call was being pickled
            job.fail_as_killed()
            return job
        run = self._begin if call.is_coroutine else self._run
        reply = run(job)
        if reply is not None and reply.kind == _wire.REFUSED:
            reply = run(job) if self._turns_to_value(job, reply) else None
        if reply is not None:
            self._settle(job, reply)
        return job

    def _turns_to_value(self, job: Job, refusal: _wire.Frame) -> bool:
        try:
            job.call.turn_to_value(bytes(refusal.body).decode())
        except PayloadError as error:
            job.fail(error)
            return False
        return True

    def _settle(self, job: Job, reply: _wire.Frame) -> None:
        job.duration = reply.elapsed
        counts = self.counts
        counts.completed += 1
        counts.away += perf_counter() - job.made
        counts.ran += reply.elapsed
        if reply.flags & _wire.PIECES:
            _steps.run(job.receive_steps(reply, os.getpid()))
        else:
            job.receive(reply, os.getpid())

    def _run(self, job: Job) -> _wire.Frame:
        frame = _sent(job)
        reply = _worker.run(frame)
        frame.close()
        return _replied(reply)

    def _begin(self, job: Job) -> _wire.Frame | None:
        begun = _coroutines.start(_sent(job), None, self.loop, _replied)
        if isinstance(begun, tuple):
            return _replied(begun)
        self._tasks[job.number] = job, begun
        begun.add_done_callback(partial(self._ended, job))
        return None

    def _ended(self, job: Job, task: Task[_wire.Frame]) -> None:
        del self._tasks[job.number]
        try:
            if task.cancelled():
                reply = _replied(_coroutines.unended(task, job.number))
            else:
                reply = task.result()
        except Exception as error:  # no memory for the reply; the loop would only log it
            job.fail(error)
        else:
            self._receive(job, reply)
        self._advance_close()

    def _receive(self, job: Job, reply: _wire.Frame) -> None:
        if job.future.done():  # cancelled, or killed
            reply.close()
            job.drop()
        else:
            self._settle(job, reply)

    def cancel(self, job: Job) -> None:
        """Cancels a coroutine; any other job has ended."""
        if job.number in self._tasks:
            self.counts.cancelled += 1
            self._tasks[job.number][1].cancel()

    hurry = cancel

    def under_way(self) -> list[tuple[str, float]]:
        """Coroutines: of another job nobody can ask."""
        now = perf_counter()
        return [(job.name, now - job.made) for job, _ in list(self._tasks.values())]

    @property
    def running(self) -> int:
        """How many coroutines there are."""
        return len(self._tasks)

    def expect(self) -> None:
        """Does nothing: what is closed here still runs jobs."""

    expect_no_more = expect

    def attach(self, loop: AbstractEventLoop) -> None:
        """Moves to another loop."""
        self.loop = loop
        self.rota = Rota(loop)
        self._tasks.clear()  # of the loop before, which is closed
        self._closing = None

    def close(self) -> Future[None]:
        """The future is done when the last coroutine is."""
        if self._closing is None:
            self._closing = self.loop.create_future()
            self._advance_close()
        return self._closing

    def _advance_close(self) -> None:
        if self._closing is not None and not self._tasks and not self._closing.done():
            self._closing.set_result(None)

    def kill_workers(self) -> None:
        """There are none."""

    def kill(self) -> None:
        """Cancels the coroutines and fails their jobs."""
        self._killed = True
        for job, task in list(self._tasks.values()):
            job.fail_as_killed()
            if not self.loop.is_closed():
                task.cancel()

    def replace_workers(self) -> None:
        """There are no workers."""

    def count(self, state: str) -> int:  # noqa: ARG002
        """There are no workers."""
        return 0


def _sent(job: Job) -> _wire.Frame:
    return _received(job.call.frame(job.number), job.call.descriptors)


def _replied(reply: _worker.Reply) -> _wire.Frame:
    kind, number, parts, flags, payload = reply
    descriptors = payload.descriptors if payload else []
    try:
        buffers = _wire.encode(kind, number, parts, flags=flags, descriptors=len(descriptors))
        return _received(buffers, descriptors)
    finally:
        _coroutines.drop(reply)


def _received(buffers: Sequence[_wire.Part], descriptors: Sequence[int]) -> _wire.Frame:
    """The frame as a receiver would have it, with descriptors of its own if there is room for them."""
    data = b"".join(buffers)
    copies: list[int] = []
    try:
        for descriptor in descriptors:
            copies.append(os.dup(descriptor))  # noqa: PERF401 - those before one that fails are closed
    except OSError:
        _wire.close_descriptors(copies)
        return _wire.decode(data, None)
    return _wire.decode(data, copies)
