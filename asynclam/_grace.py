"""The time that a cancelled job has to end: it is told, again until it has heard, and killed after it.

Theory of operation. One timer, while a cancelled job has time. The job may miss a signal (see
:mod:`._guard`), so it is sent again at growing intervals until the page of marks says that it was
heard. When the time is over, or whoever waits is cancelled once more, the worker is killed. Time in
which this process was stopped does not count: its worker may have been, too. Whatever ends the job,
:meth:`Grace.end` is called where it is known to be gone.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, TimerHandle
    from collections.abc import Callable

_FIRST = 0.001  # seconds until the job is told again; doubled each time
_LONGEST = 0.05
_nothing = bool  # called, it does nothing


class Grace:
    """The time of one job, which begins when it is known to run.

    Attributes:
        caller: the context of who was cancelled, for what the job logs.
        ended: done once the job is gone.
        is_over: whether nobody wants to wait for it any more.
    """

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.caller = copy_context()
        self.ended: Future[None] = loop.create_future()
        self.is_over = False
        self._loop = loop
        self._timer: TimerHandle | None = None
        self._deadline = self._interval = self._next = 0.0
        self._tell: Callable[[], object] = _nothing
        self._has_heard: Callable[[], bool] = _nothing
        self._kill: Callable[[], object] = _nothing

    def begin(
        self,
        seconds: float,
        tell: Callable[[], object],
        has_heard: Callable[[], bool],
        kill: Callable[[], object],
    ) -> None:
        """Tells the job to end, and kills it if it has not in so many seconds."""
        self._tell, self._has_heard, self._kill = tell, has_heard, kill
        self._deadline = self._loop.time() + seconds
        self._interval = _FIRST / 2
        tell()
        self._wait()

    def _wait(self) -> None:
        left = self._deadline - self._loop.time()
        if left <= 0:
            self.is_over, self._timer = True, None
            self._kill()
            return
        self._interval = min(2 * self._interval, _LONGEST)
        seconds = min(self._interval, left)
        self._next = self._loop.time() + seconds
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        late = self._loop.time() - self._next
        if late > _LONGEST:
            self._deadline += late
        if not self._has_heard():
            self._tell()
        self._wait()

    def end(self) -> None:
        """The job is gone. Calling it twice does nothing."""
        self._tell = self._has_heard = self._kill = _nothing  # they hold the worker, and the page
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.ended.done() and not self._loop.is_closed():
            self.ended.set_result(None)


def shield() -> AbstractContextManager[Any]:
    """Within it, anyio does not cancel again what waits in a scope that is cancelled already.

    It does so at each turn of the loop. A cancel of asyncio's goes through.
    """
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return nullcontext()
    scope: AbstractContextManager[Any] = anyio.CancelScope(shield=True)
    return scope
