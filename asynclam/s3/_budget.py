"""How much memory downloads may take, all of them together, until nobody has it any more."""

from __future__ import annotations

import asyncio
import heapq
import os
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial

from .._memory import SharedBuffer
from .._sizing import memory
from ._counted import CountedBuffer

_LONG = 30  # seconds without anything given back, after which it is said
_FIRST = 8  # objects that are asked for before it is known how long any is
_SHARE = 4  # a quarter of the memory; the other three are for what is made of the objects


def default_budget() -> int:
    """A quarter of what this process may use, in bytes; on Lambda, of the memory of the function."""
    return memory() // _SHARE


class Budget:
    """Gives memory, and counts it until the last process has let go of it.

    What does not fit waits, first come first served, or ``in_order`` of the turns: who takes results
    in an order waits for the first, and would hold the memory that the first waits for. What is
    larger than the whole budget is given when nothing else is held.

    Nobody waits for memory with a connection that somebody may need who has memory: it is given back,
    and the object asked for once more. That is the exception, since an object is asked for at all only
    when one of the usual length would have room.

    Args:
        limit: the most bytes at a time; ``None``: any number.
        in_order: whether the turns are strictly one after the other, from 0.
        most_held: connections that may be kept while only turns before are waited for.

    Attributes:
        used: bytes that are held, in whatever process.
        peak: the most that were.
    """

    def __init__(self, limit: int | None, *, in_order: bool, most_held: int = 0) -> None:
        self.used = self.peak = 0
        self._limit = limit
        self._in_order = in_order
        self._turn = 0  # the next one, if they are in order
        self._over: set[int] = set()  # turns that are over, before their time
        self._most_held = most_held
        self._objects = self._bytes = 0  # that have said how long they are
        self._begun: set[int] = set()  # turns whose objects have been asked for, and have not
        self._to_begin: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._asked = 0  # bytes, by these
        self._held: dict[asyncio.Future[None], Callable[[], object]] = {}  # what gives them back
        self._arrivals = 0
        self._readers: dict[int, int] = {}  # what is held, by the end of its pipe
        self._loop = asyncio.get_running_loop()
        self._complaint: asyncio.TimerHandle | None = None

    async def begin(self, turn: int) -> None:
        """Waits until an object of the usual length would have room; it may be asked for then."""
        if self._may_begin() and not self._to_begin:
            self._begun.add(turn)
            return
        begun: asyncio.Future[None] = self._loop.create_future()
        self._to_begin.append((turn, begun))
        self._grant()
        await begun

    def _may_begin(self) -> bool:
        if self._limit is None or not (self.used or self._asked or self._begun):
            return True
        if not self._objects:
            return len(self._begun) < _FIRST
        return self.used + self._asked + (len(self._begun) + 1) * self._usual() <= self._limit

    def _usual(self) -> int:
        return self._bytes // self._objects if self._objects else 0

    async def buffer(
        self, turn: int, nbytes: int, give_back: Callable[[], object] = bool
    ) -> SharedBuffer:
        """New memory, as soon as there is room for it.

        Args:
            turn: whose it is.
            nbytes: how long.
            give_back: called, at most once, if that may take until others have gone on.
        """
        self._begun.discard(turn)
        if not nbytes:
            return SharedBuffer(0)
        self._objects += 1
        self._bytes += nbytes
        granted: asyncio.Future[None] = self._loop.create_future()
        self._arrivals += 1
        rank = turn if self._in_order else self._arrivals
        heapq.heappush(self._waiting, (rank, nbytes, granted))
        self._asked += nbytes
        self._held[granted] = give_back
        self._grant()
        if granted in self._held and len(self._held) > self._most_held:
            self._held.pop(granted)()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._release(nbytes)  # granted, and nobody there to take it
            raise
        finally:
            self._held.pop(granted, None)
            self.pass_turn(turn)
        return self._counted(nbytes)

    def _counted(self, nbytes: int) -> SharedBuffer:
        if self._limit is None:
            self.used -= nbytes
            return SharedBuffer(nbytes)
        try:
            buffer = CountedBuffer(nbytes)
        except BaseException:
            self._release(nbytes)
            raise
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
        """That turn has what it needs, or needs nothing. Calling it twice does nothing."""
        self._begun.discard(turn)
        if turn >= self._turn:
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
                if self.used and self._limit is not None and self.used + nbytes > self._limit:
                    self._wait_for_memory(nbytes)
                    break
                if self._in_order and rank != self._turn:
                    break
                self.used += nbytes
                self.peak = max(self.peak, self.used)
                granted.set_result(None)
            self._held.pop(granted, None)
            self._asked -= nbytes
            heapq.heappop(self._waiting)
        while self._to_begin and self._may_begin():
            turn, begun = self._to_begin.popleft()
            if not begun.done():
                self._begun.add(turn)
                begun.set_result(None)
        if self._to_begin and not (self._waiting or self._begun):
            self._wait_for_memory(self._usual())

    def _wait_for_memory(self, nbytes: int) -> None:
        self._complaint = self._loop.call_later(_LONG, self._complain, nbytes)
        while self._held:
            self._held.popitem()[1]()

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
