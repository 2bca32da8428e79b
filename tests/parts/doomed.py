"""A program with busy workers, which says who is who, then does what it is told on its input.

    python -m tests.parts.doomed START_METHOD [SIBLING]

Two of its workers are in the middle of a C call that does not end, and one waits in a coroutine; each
has spawned a process, and one has left its process group. With SIBLING the program forks a process that
lives on: ``fork`` or ``multiprocessing``, as Python does it, or ``C``, behind Python's back. The
environment variable DOOMED_WITHOUT names what it is to do without: ``pidfd``, or ``F_SETSIG``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

from asynclam import Executor, _forkserver


def tell(role: str, pid: int) -> None:
    os.write(1, f"{role} {pid}\n".encode())


def spawn() -> None:
    tell("spawned", subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL).pid)


async def wait(role: str) -> None:
    """In a worker: spawns a process, then waits for ever, whoever cancels it."""
    spawn()
    tell(role, os.getpid())
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()


def work(role: str) -> None:
    """In a worker: spawns a process, then a C call for ever."""
    spawn()
    if role == "leaver":
        os.setpgid(0, os.getpgid(os.getppid()))
    tell(role, os.getpid())
    sum(range(1 << 60))


def wait_for_ever() -> None:
    tell("sibling", os.getpid())
    while True:
        signal.pause()


def fork_sibling(kind: str) -> None:
    if kind == "fork":
        if not os.fork():
            wait_for_ever()
    elif kind == "multiprocessing":
        import multiprocessing

        multiprocessing.get_context("fork").Process(target=wait_for_ever).start()
    elif kind == "C":
        import ctypes

        if not ctypes.CDLL(None).fork():
            wait_for_ever()


async def order() -> str:
    loop = asyncio.get_running_loop()
    given = loop.create_future()
    loop.add_reader(0, lambda: given.set_result(os.read(0, 1000)))
    try:
        return (await given).decode()
    finally:
        loop.remove_reader(0)


def do_without(what: str) -> None:
    if what == "pidfd":
        del os.pidfd_open
    elif what == "F_SETSIG":
        import fcntl

        del fcntl.F_SETSIG


async def main(method: str, sibling: str = "") -> None:
    do_without(os.environ.get("DOOMED_WITHOUT", ""))
    executor = Executor(3, start_method=method)
    tasks = [asyncio.ensure_future(executor.run_cpu(work, role)) for role in ("worker", "leaver")]
    tasks.append(asyncio.ensure_future(executor.run_async(wait, "waiter")))
    while executor.statistics().workers_busy < 3:
        await asyncio.sleep(0)
    tell("server", _forkserver.ensure(method).pid)
    fork_sibling(sibling)
    tell("loop", os.getpid())
    if await order() == "os._exit":
        os._exit(1)
    del tasks  # asyncio.run() cancels them


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
