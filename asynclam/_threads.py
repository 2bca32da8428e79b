"""Threads for blocking IO: bounded, and abandoned by a cancel, since nothing can stop them."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")

LIMIT = 32  # threads at once on one loop: they wait for IO, so more than there are CPUs


class Threads:
    """Counts the threads of an executor, and bounds them, the abandoned ones included."""

    def __init__(self) -> None:
        self.busy = self.abandoned = 0
        self._slots: dict[asyncio.AbstractEventLoop, _Slots] = {}

    async def run(self, fn: Callable[[], T]) -> T:
        """Runs ``fn`` in a thread as soon as there is one; a cancel abandons it."""
        import anyio.to_thread  # its backend takes 24 ms at a cold start, which run_cpu can do without

        loop = asyncio.get_running_loop()
        slots = self._slots_of(loop)
        await slots.acquire()
        self.busy += 1
        borrowing = _Borrowing(self, slots)  # of the thread: it outlives a call that is abandoned

        def call() -> T | None:
            if not borrowing.claim():
                return None  # abandoned before it ran: nobody waits for a result
            try:
                return fn()
            finally:
                try:
                    loop.call_soon_threadsafe(borrowing.end)
                except RuntimeError:  # the loop is closed
                    borrowing.end()

        try:
            result = await anyio.to_thread.run_sync(
                call, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1)
            )
        except BaseException:
            borrowing.abandon()
            raise
        return cast("T", result)

    def _slots_of(self, loop: asyncio.AbstractEventLoop) -> _Slots:
        if loop not in self._slots:
            for known in [known for known in self._slots if known.is_closed()]:
                del self._slots[known]
            self._slots[loop] = _Slots(LIMIT)
        return self._slots[loop]


class _Slots:
    """The threads that one loop may have at once; who waits for one has it in his turn.

    Not anyio's CapacityLimiter: in older versions a cancel can leave a slot taken, and a turn unused.
    """

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    async def acquire(self) -> None:
        """Waits for a slot."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            await turn
        except BaseException:
            self._waiting.pop(turn, None)
            if turn.done() and not turn.cancelled():  # it and the cancel came in the same moment
                self.release()
            raise

    def release(self) -> None:
        """Gives the slot to who has waited longest."""
        while self._waiting:
            turn, _ = self._waiting.popitem(last=False)
            if not turn.done():  # else it is cancelled, and its task has not run since
                turn.set_result(None)
                return
        self._free += 1


class _Borrowing:
    """One thread that is busy, and whether anybody waits for it."""

    def __init__(self, threads: Threads, slots: _Slots) -> None:
        self._slots = slots
        self._threads = threads
        self._claim = (
            threading.Lock()
        )  # taken by the thread that runs, or by who gives it up before
        self._ended = self._abandoned = False

    def claim(self) -> bool:
        """Whether the function is still to be run, and by whoever asks."""
        return self._claim.acquire(blocking=False)

    def abandon(self) -> None:
        """Nobody waits any more: the thread runs on, unless it has not begun or has ended."""
        if self.claim():
            self.end()
        elif not self._ended:
            self._abandoned = True
            self._threads.abandoned += 1

    def end(self) -> None:
        """The thread is free again."""
        self._ended = True
        self._threads.busy -= 1
        self._threads.abandoned -= self._abandoned
        self._slots.release()
