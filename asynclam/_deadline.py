"""The deadline of an invocation: its handler is cancelled before the runtime would kill all.

The runtime kills the sandbox and reports nothing but "Task timed out", with the loop, the workers
and all connections. A cancel some time before says what was running, and keeps all warm but the
workers that are in the middle of a job. The timer is the loop's, and so goes by the monotonic clock;
the deadline is a time of the wall clock. So when the timer ends, the wall clock is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import _context
from ._errors import DeadlineExceededError

if TYPE_CHECKING:
    from ._executor import Executor

_SLACK = 0.005  # seconds that a timer may be early by the other clock
_LEAST = 0.01  # seconds to clean up, when there is no time


def half_of(left: float, most: float) -> float:
    """How long the next step of an end may take: half of the seconds that are left, if not less.

    So however many steps there are, the outcome is there in time.
    """
    return min(most, max(_LEAST, left / 2))


class Deadline:
    """Cancels a task in time.

    Args:
        loop: where the task runs.
        task: the task of the handler.
        invocation: knows the deadline.
        name: the handler's name.
        margin: seconds before the end of the invocation.
        executor: whose jobs are told.
        tasks: gives the tasks that are told.
        stops: whether the loop is stopped when the task does not end then.

    Attributes:
        error: what has been running then; ``None`` as long as there is time.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        task: asyncio.Task[Any],
        invocation: _context.Invocation,
        *,
        name: str,
        margin: float,
        executor: Executor,
        tasks: Callable[[], Iterable[asyncio.Task[Any]]],
        stops: bool,
    ) -> None:
        self.error: DeadlineExceededError | None = None
        self._loop, self._task, self._name, self._executor = loop, task, name, executor
        self._invocation, self._tasks = invocation, tasks
        self._margin, self._stops = margin, stops
        self._begun = perf_counter()
        self._timer = loop.call_later(max(0.0, self._left()), self._expire)

    def _left(self) -> float:
        return self._invocation.left() - self._margin

    def _expire(self) -> None:
        left = self._left()
        if left > _SLACK:
            self._timer = self._loop.call_later(left, self._expire)
            return
        running, queued = self._executor.under_way()
        self.error = DeadlineExceededError(
            self._name,
            seconds=perf_counter() - self._begun,
            margin=self._margin,
            running=running,
            queued=queued,
            waiting=sorted(map(_where, self._tasks())),
        )
        self._task.cancel()
        if not self._stops:
            return
        # Half of the margin is for the handler to end, half for what it has left. If the loop was
        # held up, less of it is left.
        seconds = half_of(self._invocation.left(), self._margin / 2)
        self._timer = self._loop.call_later(seconds, self._loop.stop)

    def end(self) -> None:
        """There is nothing left to be cancelled."""
        self._timer.cancel()


def _where(task: asyncio.Task[Any]) -> str:
    """The line at which the code of a task waits that is the user's."""
    coroutine: Any = task.get_coro()
    found = task.get_name()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE):
            return f"{code.co_name} ({code.co_filename}:{frame.f_lineno})"
        coroutine = coroutine.cr_await
    return found


_PACKAGE = __file__.removesuffix("_deadline.py")
