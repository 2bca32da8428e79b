"""A pool, and the fork server and workers that the test plays for it."""

from __future__ import annotations

import asyncio

from asynclam import _call
from asynclam._pool import Plan, Pool
from tests import jobs
from tests.parts.actors import FakeServer


class Stage:
    """A pool of two workers, and the server that it talks to."""

    def __init__(self, limit=2):
        self.servers = [FakeServer()]
        self.jobs = []
        self.pool = Pool(asyncio.get_running_loop(), Plan("fork", b"", lambda pool: limit))

    @property
    def server(self):
        return self.servers[-1]

    def submit(self, value=1, *terms):
        return self.submit_call(_call.Call(jobs.echo, (value,), {}), *terms)

    def submit_call(self, call, *terms):
        self.jobs.append(self.pool.submit(call, *terms))
        return self.jobs[-1]

    async def ready_worker(self, pid=4711):
        worker = await self.server.worker()
        worker.ready(pid)
        return worker

    async def busy(self, value=1, *terms):
        """A job, the worker that has read it, and the frame."""
        job = self.submit(value, *terms)
        worker = await self.ready_worker()
        return job, worker, await worker.job()

    async def told_to_end(self, job, worker, frame):
        """Cancels a job that has begun, and plays that its worker ends it."""
        job.future.cancel()
        self.pool.cancel(job)
        assert await self.server.interrupted() == worker.number
        worker.hear(frame.number)
        worker.skip(frame)
        await job.grace.ended


async def idle():
    for _ in range(20):
        await asyncio.sleep(0)
