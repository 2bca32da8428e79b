"""Two workers, idle or in a C call without end; prints who is who, and ends with its input."""

import asyncio
import json
import os
import sys
from collections.abc import Callable

from asynclam import Executor


def pids() -> tuple[int, int]:
    sum(range(5_000_000))  # so that the second job has the second worker
    return os.getpid(), os.getppid()


def begin() -> None:
    os.write(1, f"{os.getpid()}\n".encode())
    sum(range(1 << 60))


def end_with_input(end: Callable[[], object]) -> None:
    if not os.read(0, 1):
        end()


async def main(state: str) -> None:
    ended = asyncio.Event()
    executor = Executor(2)
    found = await asyncio.gather(*(executor.run_cpu(pids) for _ in range(2)))
    print(json.dumps([found[0][1], os.getpid()]), flush=True)
    tasks = []
    if state == "busy":
        tasks = [asyncio.ensure_future(executor.run_cpu(begin)) for _ in range(2)]
    else:
        workers = {worker for worker, _ in found}
        print(*sorted(workers), sep="\n", flush=True)
    asyncio.get_running_loop().add_reader(0, end_with_input, ended.set)
    await ended.wait()
    del tasks
    executor.kill()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
