"""Threads for blocking IO: bounded, and abandoned by a cancel, since nothing can stop them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from anyio import CapacityLimiter

T = TypeVar("T")

LIMIT = 32  # threads at once on one loop: they wait for IO, so more than there are CPUs


class Threads:
    """Counts the threads of an executor, and bounds them, the abandoned ones included."""

    def __init__(self) -> None:
        self.busy = self.abandoned = 0
        self._limiters: dict[asyncio.AbstractEventLoop, CapacityLimiter] = {}

    async def run(self, fn: Callable[[], T]) -> T:
        """Runs ``fn`` in a thread as soon as there is one; a cancel abandons it."""
        import anyio.to_thread  # its backend takes 24 ms at a cold start, which run_cpu can do without

        loop = asyncio.get_running_loop()
        borrowing = _Borrowing(self, self._limiter(loop))
        # On behalf of the thread, not of this task: it outlives a call that is abandoned.
        await borrowing.limiter.acquire_on_behalf_of(borrowing)
        self.busy += 1

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

    def _limiter(self, loop: asyncio.AbstractEventLoop) -> CapacityLimiter:
        import anyio

        if loop not in self._limiters:
            for known in [known for known in self._limiters if known.is_closed()]:
                del self._limiters[known]
            self._limiters[loop] = anyio.CapacityLimiter(LIMIT)
        return self._limiters[loop]


class _Borrowing:
    """One thread that is busy, and whether anybody waits for it."""

    def __init__(self, threads: Threads, limiter: CapacityLimiter) -> None:
        self.limiter = limiter
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
        self.limiter.release_on_behalf_of(self)
