"""Everybody who runs a function in a process, with the same few verbs.

Each is used as its documentation says, with its own defaults, but for the number of workers.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

from . import jobs, limits

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from typing_extensions import Self

Function = Callable[..., Any]

BOTH = ("asyncio", "uvloop")
BLOCKING = ("blocking",)  # it has no loop, and would block one


class NotPossibleError(Exception):
    """A contestant, or this machine, cannot do what a row asks for; the message says why."""


class Contestant:
    """Makes workers when it is entered, and calls functions in them."""

    name: ClassVar[str]
    package: ClassVar[str] = ""  # where it is not in the standard library
    loops: ClassVar[tuple[str, ...]] = BOTH
    by_hand: ClassVar[bool] = False  # no library

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    async def start(self) -> None:
        """Makes the pool; what ends it goes on the stack."""

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        raise NotImplementedError

    def run_async(self, _function: jobs.CoroutineFunction, *_: Any) -> Awaitable[Any]:
        raise NotPossibleError(f"{self.name} runs no coroutine functions")

    async def gather(self, function: Function, count: int) -> None:
        """Calls a function often, and awaits one by one where that is possible."""
        await asyncio.gather(*(self.call(function) for _ in range(count)))

    async def map(self, _function: Function, _items: Iterable[Any]) -> list[Any]:
        raise NotPossibleError(f"{self.name} has no map of its own")


class Asynclam(Contestant):
    name = "asynclam"
    package = "asynclam"

    async def start(self) -> None:
        from asynclam import Executor

        self.executor = await self.stack.enter_async_context(Executor(self.workers))
        self.call = self.executor.run_cpu  # type: ignore[method-assign, assignment]
        self.run_async = self.executor.run_async  # type: ignore[method-assign, assignment]

    async def map(self, function: Function, items: Iterable[Any]) -> list[Any]:
        return await self.executor.map_cpu(function, items)


class AnyioToProcess(Contestant):
    name = "anyio.to_process"
    package = "anyio"

    async def start(self) -> None:
        from anyio import CapacityLimiter, to_process

        self._run, self._limiter = to_process.run_sync, CapacityLimiter(self.workers)

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        return self._run(function, *args, limiter=self._limiter)


class ProcessPool(Contestant):
    name = "ProcessPoolExecutor"

    async def start(self) -> None:
        self._pool = self.stack.enter_context(ProcessPoolExecutor(self.workers))
        self._loop = asyncio.get_running_loop()

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        return self._loop.run_in_executor(self._pool, function, *args)


class Loky(Contestant):
    name = "loky"
    package = "loky"

    async def start(self) -> None:
        from loky import ProcessPoolExecutor as Pool

        self._pool = self.stack.enter_context(Pool(self.workers))

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        return asyncio.wrap_future(self._pool.submit(function, *args))


class Pebble(Contestant):
    name = "pebble"
    package = "pebble"

    async def start(self) -> None:
        from pebble import ProcessPool as Pool

        self._pool = self.stack.enter_context(Pool(self.workers))

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        return asyncio.wrap_future(self._pool.schedule(function, args=args))


class Aiomisc(Contestant):
    name = "aiomisc.WorkerPool"
    package = "aiomisc"

    async def start(self) -> None:
        from aiomisc import WorkerPool

        pool: Any = WorkerPool(self.workers)
        self._pool: Any = await self.stack.enter_async_context(pool)

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        result: Awaitable[Any] = self._pool.create_task(function, *args)
        return result


class Aiomultiprocess(Contestant):
    name = "aiomultiprocess"
    package = "aiomultiprocess"

    async def start(self) -> None:
        from aiomultiprocess import Pool

        self._pool = await self.stack.enter_async_context(Pool(self.workers))

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        return self.run_async(jobs.awaited, function, *args)

    def run_async(self, function: jobs.CoroutineFunction, *args: Any) -> Awaitable[Any]:
        result: Awaitable[Any] = self._pool.apply(function, args)
        return result


class TrioParallel(Contestant):
    name = "trio-parallel"
    package = "trio-parallel"
    loops = ("trio",)

    async def start(self) -> None:
        import trio
        import trio_parallel

        self._limiter = trio.CapacityLimiter(self.workers)
        context = await self.stack.enter_async_context(trio_parallel.open_worker_context())
        self._run = context.run_sync

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        result: Awaitable[Any] = self._run(function, *args, limiter=self._limiter)
        return result

    async def gather(self, function: Function, count: int) -> None:
        import trio

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(self.call, function)


class MultiprocessingPool(Contestant):
    name = "multiprocessing.Pool"
    loops = BLOCKING

    async def start(self) -> None:
        self._pool = self.stack.enter_context(multiprocessing.Pool(self.workers))

    async def call(self, function: Function, *args: Any) -> Any:
        return self._pool.apply(function, args)

    async def gather(self, function: Function, count: int) -> None:
        self._pool.map(function, range(count), chunksize=1)

    async def map(self, function: Function, items: Iterable[Any]) -> list[Any]:
        return self._pool.map(function, items)


class LambdaMultiprocessing(Contestant):
    name = "lambda_multiprocessing"
    package = "lambda-multiprocessing"
    loops = BLOCKING

    async def start(self) -> None:
        from lambda_multiprocessing import Pool

        pool: Any = Pool
        self._pool: Any = self.stack.enter_context(pool(self.workers))

    async def call(self, function: Function, *args: Any) -> Any:
        return self._pool.apply(function, args)

    async def gather(self, function: Function, count: int) -> None:
        for result in [self._pool.apply_async(function) for _ in range(count)]:
            result.get()

    async def map(self, function: Function, items: Iterable[Any]) -> list[Any]:
        return list(self._pool.map(function, items))


class ProcessPerTask(Contestant):
    """A Process and a Pipe a task, as the blog post about Lambda has it."""

    name = "Process + Pipe a task"
    loops = BLOCKING
    by_hand = True

    async def call(self, function: Function, *args: Any) -> Any:
        with limits.child(limits.run_jobs) as child:
            return child.exchange((function, args))

    async def gather(self, function: Function, count: int) -> None:
        for _ in range(0, count, self.workers):
            children = [limits.Child(limits.run_jobs) for _ in range(self.workers)]
            for child in children:
                child.connection.send((function, ()))
            for child in children:
                child.connection.recv()
                child.close()


class BlockingPipe(Contestant):
    """One worker at a Pipe, one job at a time, no loop: what all the others add to."""

    name = "blocking Pipe"
    loops = BLOCKING
    by_hand = True

    async def start(self) -> None:
        self._child = self.stack.enter_context(limits.child(limits.run_jobs))

    async def call(self, function: Function, *args: Any) -> Any:
        return self._child.exchange((function, args))

    async def gather(self, function: Function, count: int) -> None:
        for _ in range(count):
            self._child.exchange((function, ()))


class NaiveReader(Contestant):
    """``add_reader`` and ``Connection.recv()``: short, and blocks the loop for each large message.

    On uvloop, large messages are errors: it makes the descriptor non-blocking, under Connection.
    """

    name = "add_reader + recv()"
    by_hand = True

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[asyncio.Future[Any], Function, tuple[Any, ...]]] = deque()
        self._running: dict[Connection, asyncio.Future[Any]] = {}
        self._idle: list[Connection] = []
        for _ in range(self.workers):
            connection = self.stack.enter_context(limits.child(limits.run_jobs)).connection
            self._idle.append(connection)
            self._loop.add_reader(connection.fileno(), self._receive, connection)
            self.stack.callback(self._loop.remove_reader, connection.fileno())

    def call(self, function: Function, *args: Any) -> Awaitable[Any]:
        future = self._loop.create_future()
        self._queue.append((future, function, args))
        self._send()
        return future

    def _send(self) -> None:
        while self._idle and self._queue:
            connection = self._idle.pop()
            self._running[connection], *job = self._queue.popleft()
            connection.send(job)

    def _receive(self, connection: Connection) -> None:
        result = connection.recv()
        self._idle.append(connection)
        self._running.pop(connection).set_result(result)
        self._send()


ALL: tuple[type[Contestant], ...] = (
    BlockingPipe,
    Asynclam,
    AnyioToProcess,
    LambdaMultiprocessing,
    MultiprocessingPool,
    TrioParallel,
    Pebble,
    ProcessPool,
    Loky,
    Aiomisc,
    Aiomultiprocess,
    ProcessPerTask,
    NaiveReader,
)
BY_NAME = {kind.name: kind for kind in ALL}


def versions() -> dict[str, str | None]:
    """What is installed of each contestant's package; ``None``: it is not."""
    return {kind.package: version(kind.package) for kind in ALL if kind.package}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
