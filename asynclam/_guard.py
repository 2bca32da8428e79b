"""In the worker: a job that may be told to end. JobCancelled is raised in it, and in no other.

Theory of operation. The loop process writes on the page of marks which job is *cancelled*, and then
has the fork server send SIGURG, which nobody uses and which does nothing by default: a signal that
comes too early or too late is harmless. Its handler raises only while the code of a job runs for
which it is armed, and only if the page names that very job. To be armed would not be enough: by the
time a signal arrives, the next job may be.

A signal that comes before the handler is armed is lost, so the page is read once more when it is. A
signal that comes just before the job enters a system call is noticed when that returns; and an
exception in a finaliser is swallowed, which the hook of unraisable exceptions sees, and arms again.
Therefore the loop process sends the signal until *heard* on the page says that the job has it.

The handler disarms itself: what the job does to clean up is not interrupted. The inner ``finally``
disarms when the job has returned; should the signal come in the moment before that is done, the
outer ``except`` has it. The frame between holds no loop: in CPython 3.13 the jump back of a loop at
the end of a ``try`` is outside of its exception table, and signals are handled at jumps back.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ._errors import JobCancelled

SIGNAL = signal.SIGURG


class Guard:
    """Runs jobs of one worker that may be told to end.

    Args:
        is_cancelled: whether the page of marks says that the job with this order is cancelled.
        hear: notes there that the job has been told; 0: it has not, after all.

    Attributes:
        cancelled: whether the last job was cancelled, so that nobody waits for its outcome.
        left_children: whether it has left processes behind then, which are to end with it.
    """

    def __init__(self, is_cancelled: Callable[[int], bool], hear: Callable[[int], object]) -> None:
        self._is_cancelled = is_cancelled
        self._hear = hear
        self.cancelled = self.left_children = False
        self._running = 0  # order of the job that runs; 0: none
        self._armed = 0  # the same, until it has been told
        self._handler = self._on_signal  # one object, to be compared by identity
        self._hook = self._on_unraisable
        self._next_hook = sys.unraisablehook

    def run(self, order: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls ``call``, in which JobCancelled may be raised, and returns or raises what it does.

        A job that was cancelled returns nothing; if it raises something else nevertheless, that
        goes to stderr.
        """
        self.cancelled = self.left_children = False
        had_children = _has_children()
        self._install()  # jobs may have installed others
        try:
            try:
                self._arm(order)
                result = call(*args, **kwargs)
            finally:
                self._disarm()
        except BaseException as error:
            self._disarm()
            self._look_at_the_end(order, had_children=had_children)
            if self.cancelled and not isinstance(error, JobCancelled):
                sys.excepthook(type(error), error, error.__traceback__)
            raise
        self._look_at_the_end(order, had_children=had_children)
        if self.cancelled:
            raise JobCancelled
        return result

    def _look_at_the_end(self, order: int, *, had_children: bool) -> None:
        self.cancelled = self._is_cancelled(order)
        self.left_children = self.cancelled and not had_children and _has_children()

    def _install(self) -> None:
        signal.signal(SIGNAL, self._handler)
        if sys.unraisablehook is not self._hook:
            self._next_hook, sys.unraisablehook = sys.unraisablehook, self._hook

    def _arm(self, order: int) -> None:
        self._running = self._armed = order
        self._raise_if_cancelled()

    def _disarm(self) -> None:
        self._running = 0  # first: from here on, the hook does not arm again
        self._armed = 0

    def _on_signal(self, _signal: int, _frame: object) -> None:
        self._raise_if_cancelled()

    def _raise_if_cancelled(self) -> None:
        order = self._armed
        if order and self._is_cancelled(order):
            self._armed = 0
            self._hear(order)
            raise JobCancelled

    def _on_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, JobCancelled) and self._running:
            self._armed = self._running
            self._hear(0)
        else:
            self._next_hook(unraisable)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
