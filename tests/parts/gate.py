"""A gate for jobs: a test sees who has entered, and says when they may leave. No clocks."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

_PID = struct.Struct("<q")


class Gate:
    """Two FIFOs. ``Gate.pass_through`` is what jobs call, with the gate's ``path``."""

    def __init__(self, directory: str) -> None:
        self.path = directory
        for name in ("entered", "leave"):
            os.mkfifo(Path(directory, name))
            Path(directory, name).chmod(0o666)
        # Read and write (Linux, fifo(7)), so that neither end ever sees the other missing.
        self._entered = os.open(Path(directory, "entered"), os.O_RDWR | os.O_NONBLOCK)
        self._leave = os.open(Path(directory, "leave"), os.O_RDWR | os.O_NONBLOCK)

    async def entered(self) -> int:
        """Waits until the next job has entered; its pid."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._entered, ready.set)
        try:
            while True:
                ready.clear()
                try:
                    return _PID.unpack(os.read(self._entered, _PID.size))[0]
                except BlockingIOError:
                    await ready.wait()
        finally:
            loop.remove_reader(self._entered)

    def nobody_entered(self) -> bool:
        """Whether no job is inside that :meth:`entered` has not told of."""
        try:
            os.read(self._entered, _PID.size)
        except BlockingIOError:
            return True
        return False

    def open(self, jobs: int = 1) -> None:
        """Lets so many jobs leave."""
        os.write(self._leave, bytes(jobs))

    def close(self) -> None:
        os.close(self._entered)
        os.close(self._leave)


def pass_through(path: str, result: object = None) -> object:
    """In a job: enter, wait to be let go, return ``result``."""
    with open(Path(path, "entered"), "wb", buffering=0) as entered:
        entered.write(_PID.pack(os.getpid()))
    with open(Path(path, "leave"), "rb", buffering=0) as leave:
        leave.read(1)
    return result
