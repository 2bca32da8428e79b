"""The pool of ``max_workers=0``: jobs run in this process, with the same pickling.

For debuggers, coverage and in-process mocks, and where nothing can be forked. A job blocks the loop
as long as it runs; it cannot be cancelled, for it has ended before anybody could.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from . import _steps, _wire, _worker
from ._errors import PayloadError
from ._job import USUAL, Counts, Job, Terms
from ._turns import Rota

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

    from ._call import Call


class InlinePool:
    """Has the verbs of :class:`asynclam._pool.Pool`, and no workers."""

    alive = queued = running = segments = 0

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self.rota = Rota(loop)
        self.counts = Counts()

    def submit(self, call: Call, terms: Terms = USUAL) -> Job:
        """Runs the call and settles it, before it returns."""
        job = Job(call, self.loop.create_future(), terms)
        reply = self._run(job)
        if reply.kind == _wire.REFUSED:
            try:
                call.turn_to_value(bytes(reply.body).decode())
            except PayloadError as error:
                job.fail(error)
                return job
            reply = self._run(job)
        job.duration = reply.elapsed
        counts = self.counts
        counts.completed += 1
        counts.away += perf_counter() - job.made
        counts.ran += reply.elapsed
        if reply.flags & _wire.PIECES:
            _steps.run(job.receive_steps(reply, os.getpid()))
        else:
            job.receive(reply, os.getpid())
        return job

    def _run(self, job: Job) -> _wire.Frame:
        frame = _received(job.call.frame(job.number), job.call.descriptors)
        kind, number, parts, flags, payload = _worker.run(frame)
        frame.close()
        descriptors = payload.descriptors if payload else []
        buffers = _wire.encode(kind, number, parts, flags=flags, descriptors=len(descriptors))
        reply = _received(buffers, descriptors)
        if payload:
            payload.close()
        return reply

    def cancel(self, job: Job) -> None:
        """Does nothing: the job has ended."""

    hurry = cancel

    def under_way(self) -> list[tuple[str, float]]:
        """Nothing is, while somebody can ask."""
        return []

    def expect(self) -> None:
        """Does nothing: what is closed here still runs jobs."""

    expect_no_more = expect

    def attach(self, loop: AbstractEventLoop) -> None:
        """Moves to another loop."""
        self.loop = loop
        self.rota = Rota(loop)

    def close(self) -> Future[None]:
        """Nothing is left to wait for."""
        done = self.loop.create_future()
        done.set_result(None)
        return done

    def kill(self) -> None:
        """Nothing is left to kill."""

    def replace_workers(self) -> None:
        """There are no workers."""

    def count(self, state: str) -> int:  # noqa: ARG002
        """There are no workers."""
        return 0


def _received(buffers: Sequence[_wire.Part], descriptors: Sequence[int]) -> _wire.Frame:
    """The frame as a receiver would have it, with descriptors of its own."""
    copies = [os.dup(descriptor) for descriptor in descriptors]
    return _wire.decode(b"".join(buffers), copies)
