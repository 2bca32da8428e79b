"""A program that uses everything once, in one of the ways in which loops and threads can be had.

    python -X dev -W error -m tests.parts.everything WAY

It prints ``done``; a warning or an error that anybody has would be on its standard error.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import asynclam
from asynclam import Executor, SharedBuffer, run_cpu
from tests import jobs


async def source() -> AsyncIterator[int]:
    for number in range(5):
        yield number


async def twice(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


def be_patient() -> None:
    asyncio.get_running_loop().slow_callback_duration = 1000  # a busy machine's own


async def use(executor: Executor | None = None) -> None:
    """Everything, on the default executor, or on another."""
    be_patient()
    where = executor or asynclam
    assert await where.run_cpu(jobs.echo, 1) == 1
    assert await where.run_cpu(lambda: 2) == 2
    assert await where.run_blocking(jobs.echo, 3) == 3
    assert await where.map_cpu(jobs.echo, where.map_io(twice, source(), ordered=True)) == [
        0, 2, 4, 6, 8,
    ]  # fmt: skip
    assert len(await where.run_cpu(jobs.echo, bytes(3 << 20))) == 3 << 20
    with SharedBuffer(10) as buffer:
        assert await where.run_cpu(jobs.fill, buffer, 7) == 10
    task = asyncio.ensure_future(where.run_cpu(jobs.spin, 1000))
    await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait([task])
    died = await asyncio.gather(where.run_cpu(jobs.hard_exit, 3), return_exceptions=True)
    assert isinstance(died[0], asynclam.WorkerDiedError)


async def use_own() -> None:
    """Executors with a block, without one, and without workers, side by side."""
    be_patient()
    async with Executor(1) as first, Executor(1, start_method="spawn") as second:
        inline = Executor(0)
        await asyncio.gather(use(first), use(second))
        assert await inline.run_cpu(jobs.echo, 1) == 1
        await Executor(1).run_cpu(jobs.echo, 1)  # and dropped
        gc.collect()
        await first.run_cpu(jobs.echo, 1)


def in_threads(*functions: Callable[[], None]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def by_hand() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    loop.run_until_complete(use_own())
    loop.close()


def with_uvloop() -> None:
    import uvloop

    loop = uvloop.new_event_loop()
    loop.set_debug(True)
    loop.run_until_complete(use())
    loop.run_until_complete(use_own())
    loop.close()


def in_turn() -> None:
    for _ in range(3):
        asyncio.run(use())
    asyncio.run(use_own())


def at_once() -> None:
    in_threads(lambda: asyncio.run(use()), lambda: asyncio.run(use()), with_uvloop)


async def cubes_of(number: int, executor: Executor) -> list[int]:
    be_patient()
    return await asyncio.gather(
        executor.run_cpu(pow, number, 3), run_cpu(pow, number, 3), run_cpu(pow, -number, 3)
    )


def many_loops() -> None:
    """Loops come and go in several threads, which change places wherever they can."""
    sys.setswitchinterval(1e-6)
    executor = Executor(2)

    def step(number: int) -> list[int]:
        return asyncio.run(cubes_of(number, executor))

    with ThreadPoolExecutor(8) as threads:
        cubes = list(threads.map(step, range(200), timeout=60))
    assert cubes == [[number**3, number**3, -(number**3)] for number in range(200)]
    executor.kill()


async def use_in_worker() -> None:
    be_patient()
    await run_cpu(in_turn)


def in_a_worker() -> None:
    asyncio.run(use_in_worker())


WAYS = {
    "by hand": by_hand,
    "with uvloop": with_uvloop,
    "in turn": in_turn,
    "in a thread": lambda: in_threads(in_turn),
    "at once": at_once,
    "many loops": many_loops,
    "in a worker": in_a_worker,
}


if __name__ == "__main__":
    WAYS[sys.argv[1]]()
    print("done")
