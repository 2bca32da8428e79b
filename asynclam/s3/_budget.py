"""How much memory downloads may take, all of them together, until nobody has it any more."""

from __future__ import annotations

import asyncio
import heapq
import os
import warnings
from functools import partial

from .._memory import SharedBuffer
from .._sizing import memory
from ._counted import CountedBuffer

_LONG = 30  # seconds without anything given back, after which it is said
_SHARE = 4  # a quarter of the memory; the other three are for what is made of the objects


def default_budget() -> int:
    """A quarter of what this process may use, in bytes; on Lambda, of the memory of the function."""
    return memory() // _SHARE


class Budget:
    """Gives memory, and counts it until the last process has let go of it.

    What does not fit waits, first come first served, or ``in_order`` of the turns: who takes results
    in an order waits for the first, and would hold the memory that the first waits for. What is
    larger than the whole budget is given when nothing else is held.

    Args:
        limit: the most bytes at a time; ``None``: any number.
        in_order: whether the turns are strictly one after the other, from 0.

    Attributes:
        used: bytes that are held, in whatever process.
        peak: the most that were.
    """

    def __init__(self, limit: int | None, *, in_order: bool) -> None:
        self.used = self.peak = 0
        self._limit = limit
        self._in_order = in_order
        self._turn = 0  # the next one, if they are in order
        self._over: set[int] = set()  # turns that are over, before their time
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._arrivals = 0
        self._readers: dict[int, int] = {}  # what is held, by the end of its pipe
        self._loop = asyncio.get_running_loop()
        self._complaint: asyncio.TimerHandle | None = None

    async def buffer(self, turn: int, nbytes: int) -> SharedBuffer:
        """New memory, as soon as there is room for it."""
        if not nbytes:
            return SharedBuffer(0)
        granted: asyncio.Future[None] = self._loop.create_future()
        self._arrivals += 1
        rank = turn if self._in_order else self._arrivals
        heapq.heappush(self._waiting, (rank, nbytes, granted))
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._release(nbytes)  # granted, and nobody there to take it
            raise
        finally:
            self.pass_turn(turn)
        return self._counted(nbytes)

    def _counted(self, nbytes: int) -> SharedBuffer:
        try:
            buffer = CountedBuffer(nbytes)
        except BaseException:
            self._release(nbytes)
            raise
        if self._limit is None:
            os.close(buffer.reader)
        else:
            self._readers[buffer.reader] = nbytes
            self._loop.add_reader(buffer.reader, partial(self._dropped, buffer.reader))
        return buffer

    def _dropped(self, reader: int) -> None:
        self._loop.remove_reader(reader)
        os.close(reader)
        self._release(self._readers.pop(reader))

    def _release(self, nbytes: int) -> None:
        self.used -= nbytes
        self._grant()

    def pass_turn(self, turn: int) -> None:
        """That turn has what it needs, or needs nothing."""
        self._over.add(turn)
        while self._turn in self._over:
            self._over.remove(self._turn)
            self._turn += 1
        self._grant()

    def _grant(self) -> None:
        if self._complaint is not None:
            self._complaint.cancel()
            self._complaint = None
        while self._waiting:
            rank, nbytes, granted = self._waiting[0]
            if not granted.done():
                fits = self._limit is None or not self.used or self.used + nbytes <= self._limit
                if not fits:
                    self._complaint = self._loop.call_later(_LONG, self._complain, nbytes)
                    return
                if self._in_order and rank != self._turn:
                    return
                self.used += nbytes
                self.peak = max(self.peak, self.used)
                granted.set_result(None)
            heapq.heappop(self._waiting)

    def _complain(self, nbytes: int) -> None:
        warnings.warn(
            f"download_many() has waited {_LONG} s for memory: {self.used:,} bytes of objects are "
            f"held, the next one has {nbytes:,}, and the budget is {self._limit:,}; close the "
            "buffers that you are done with (with buffer: ...), also the last one of a loop, or "
            "give it a larger budget",
            RuntimeWarning,
            stacklevel=1,
        )

    def lift(self) -> None:
        """From here on everything fits."""
        self._limit = None
        self._grant()

    def close(self) -> None:
        """Nobody asks any more: what is still held is not watched."""
        self.lift()
        for reader in self._readers:
            self._loop.remove_reader(reader)
            os.close(reader)
        self._readers.clear()
