"""A program with all kinds of work under way, which is frozen again and again, and what comes of it.

    python -m tests.parts.frozen START_METHOD FILE

It says ``beat`` every few milliseconds that it runs. At the end of its input it lets the work end,
and says how many jobs there were, and what was wrong. FILE is where jobs note that they have run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

from asynclam import Executor, _forkserver
from tests import coroutine_jobs, jobs

BEAT = 0.005  # seconds
LARGE = 3 << 20  # bytes: a segment, or several turns of the loop in a frame


class Frozen:
    def __init__(self, method: str, path: str) -> None:
        self.executor = Executor(2, start_method=method)
        self.path = path
        self.method = method
        self.submitted = 0
        self.noted = 0
        self.wrong: list[str] = []
        self.over = asyncio.Event()

    def expect(self, found: object, expected: object) -> None:
        if found != expected:
            self.wrong.append(f"{str(found)[:80]} is not {str(expected)[:80]}")

    async def short(self) -> None:
        """More than the workers run at once: they go ahead in their channels, and may be revoked."""
        numbers = range(self.noted, self.noted + 60)
        self.noted += 60
        await asyncio.gather(*(self.executor.run_cpu(jobs.echo, n) for n in numbers))
        noting = (self.executor.run_cpu(jobs.note, self.path, n) for n in numbers)
        self.expect(await asyncio.gather(*noting), list(numbers))

    async def large(self) -> None:
        value = random.randbytes(64) * (LARGE // 64)
        self.expect(await self.executor.run_cpu(jobs.echo, value) == value, True)

    async def cancel(self) -> None:
        task = asyncio.ensure_future(self.executor.run_cpu(jobs.spin, 1000))
        await asyncio.sleep(random.random() * BEAT)
        task.cancel()
        await asyncio.wait([task])
        self.expect(task.cancelled(), True)

    async def start(self) -> None:
        """A worker's start and its end."""
        async with Executor(1, start_method=self.method) as executor:
            self.expect(await executor.run_cpu(jobs.echo, "started"), "started")

    async def coroutines(self) -> None:
        """Many in a worker; one of them is cancelled while it waits, and is seen to its end."""
        numbers = range(self.noted, self.noted + 60)
        self.noted += 60
        patient = self.executor.options(cancel_grace=3600)
        cancelled = asyncio.ensure_future(patient.run_async(coroutine_jobs.echo, 0, after=3600))
        noting = (self.executor.run_async(coroutine_jobs.note, self.path, n) for n in numbers)
        done = asyncio.gather(*noting)
        await asyncio.sleep(random.random() * BEAT)
        cancelled.cancel()
        self.expect(await done, list(numbers))
        await asyncio.wait([cancelled])
        self.expect(cancelled.cancelled(), True)

    async def again_and_again(self, work: Callable[[], Awaitable[None]]) -> None:
        while not self.over.is_set():
            await work()
            self.submitted += 1

    def beat(self) -> None:
        os.write(1, b"beat\n")
        asyncio.get_running_loop().call_later(BEAT, self.beat)

    async def main(self) -> None:
        await self.executor.run_cpu(jobs.pid)
        os.write(1, b"%d\n" % _forkserver.ensure(self.method).pid)
        self.beat()
        asyncio.get_running_loop().add_reader(0, self.over.set)
        kinds = (self.short, self.short, self.large, self.cancel, self.coroutines, self.start)
        await asyncio.gather(*map(self.again_and_again, kinds))
        deaths = self.executor.statistics().worker_deaths
        await self.executor.aclose()
        with open(self.path) as file:
            noted = Counter(map(int, file.read().split()))
        self.expect(noted, Counter(range(self.noted)))  # nothing lost, nothing run twice
        self.expect(deaths, 0)
        self.expect(self.executor.statistics().jobs_running, 0)
        outcome = json.dumps({"rounds": self.submitted, "wrong": self.wrong})
        os.write(1, f"{outcome}\n".encode())


if __name__ == "__main__":
    asyncio.run(Frozen(*sys.argv[1:]).main())
