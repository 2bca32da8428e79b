"""A program with a worker, whose processes' descriptors are to be looked at.

    python -m tests.parts.open_files START_METHOD

It prints a JSON object: pids by role, and the descriptors that it had before. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

from asynclam import Executor, SharedBuffer, _forkserver
from tests import jobs

_programs: list[subprocess.Popen[bytes]] = []


def spawn() -> int:
    """A program that has each descriptor that exec does not close; its pid."""
    program = subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False, bufsize=0
    )
    program.stdin.write(b"x")
    program.stdout.read(1)  # it has been loaded
    _programs.append(program)  # it lives as long as this process
    return program.pid


async def main(method: str) -> None:
    before = [int(name) for name in os.listdir("/proc/self/fd")]
    async with Executor(1, start_method=method) as executor:
        with SharedBuffer(1 << 16) as buffer:
            await executor.run_cpu(jobs.fill, buffer, 1)  # memory that both have open
            large = await executor.run_cpu(jobs.echo, bytes(4 << 20))
            found = {
                "worker": await executor.run_cpu(jobs.pid),
                "a job's program": await executor.run_cpu(spawn),
                "fork server": _forkserver.ensure(method).pid,
                "loop process": os.getpid(),
                "its own program": spawn(),
            }
            print(json.dumps({"pids": found, "before": before}), flush=True)
            sys.stdin.read()
        del large


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
