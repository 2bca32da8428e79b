"""The pools of an executor: one for each event loop that asks, and the workers that they share.

Loops may run in several threads at once. Who looks for a pool, takes over that of a closed loop, or
ends it, does so with the lock: a pool has one loop. What a loop does with its own pool needs none.
While a loop runs, nobody else touches what its pool watches there, nor its futures: it would not wake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from threading import RLock  # a finaliser may end pools wherever this thread is
from typing import TYPE_CHECKING, Any, TypeAlias

from ._job import Counts

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from ._inline import InlinePool
    from ._pool import Pool

    AnyPool: TypeAlias = Pool | InlinePool


class Pools:
    """Pools, and the limit of the workers of all.

    Not the executor, nor does it know that: pools live on in the callbacks of their loops, and would
    keep it.
    """

    def __init__(self, max_workers: int) -> None:
        self._max_workers = max_workers
        self._all: list[AnyPool] = []
        self._ended = Counts()  # of pools whose loop was closed, and whose workers others have now
        self._lock = RLock()

    def __iter__(self) -> Iterator[AnyPool]:
        return iter(tuple(self._all))  # other threads add and remove some

    def of(self, loop: AbstractEventLoop, new: Callable[[AbstractEventLoop], AnyPool]) -> AnyPool:
        """The pool of a loop: its own, or that of a closed one, whose workers are warm, or a new one."""
        with self._lock:
            for pool in self._all:
                if pool.loop is loop:
                    return pool
            for pool in self._all:
                if pool.loop.is_closed():
                    pool.attach(loop)
                    return pool
            pool = new(loop)
            self._all.append(pool)
            return pool

    def limit(self, pool: AnyPool) -> int:
        """How many workers ``pool`` may have: all share the limit, each has one at least."""
        if len(self._all) > 1:
            with self._lock:
                for other in self:
                    if other is not pool and other.loop.is_closed():
                        self._all.remove(other)
                        self._ended.add(other.counts)
                        other.kill()  # its workers would wait for a loop that may never come
        return max(1, self._max_workers - sum(other.alive for other in self if other is not pool))

    def counted(self, what: str) -> Any:
        """One of the :class:`Counts`, of all loops."""
        with self._lock:
            return sum(getattr(pool.counts, what) for pool in self) + getattr(self._ended, what)

    def kill(self) -> None:
        """Ends all workers at once, and forgets the pools."""
        here = asyncio._get_running_loop()
        with self._lock:
            self._ended = Counts()
            for pool in self:
                if pool.loop is not here and pool.loop.is_running():
                    pool.kill_workers()
                    kill_in_loop(pool)
                    continue
                pool.kill()
                if pool.loop is here:  # which a signal handler may have interrupted while it waits
                    here.call_soon_threadsafe(_wake)
            self._all.clear()


def kill_in_loop(pool: AnyPool) -> None:
    """Kills a pool from another thread, or from wherever the garbage collector runs."""
    try:
        pool.loop.call_soon_threadsafe(_Kill(pool))
    except RuntimeError:
        pass  # the loop is closed, and this was its drop


class _Kill:
    """Kills a pool when its loop calls it, or is closed and drops it."""

    __slots__ = ("_pool",)

    def __init__(self, pool: AnyPool) -> None:
        self._pool = pool

    def __call__(self) -> None:
        self._pool.kill()

    def __del__(self) -> None:
        if self._pool.loop.is_closed():
            self._pool.kill()


def _wake() -> None:
    pass
