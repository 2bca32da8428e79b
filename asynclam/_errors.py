"""The failures of the infrastructure, each with what happened, the likely cause and the next step.

What the user's own function raises is not among them: it comes back as itself.
"""

from __future__ import annotations

import signal as _signal


class AsynclamError(Exception):
    """Base of all failures of asynclam itself."""

    def __reduce__(self) -> tuple[object, ...]:
        # Not by calling the class again: its arguments differ from ``args`` (cpython #80041).
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    kind: type[AsynclamError], args: tuple[object, ...], attributes: dict[str, object]
) -> AsynclamError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class WorkerDiedError(AsynclamError):
    """The worker ended while it ran the job, or before its result was read.

    Attributes:
        job: the name of the function that ran.
        pid: process id of the worker; ``None`` where it is not known.
        exitcode: its exit code; ``None`` if a signal ended it or it is not known.
        signal: number of the signal that ended it; ``None`` if it exited.
        tries: how many workers have died while they ran it; more than 1 if it was retried.
    """

    def __init__(
        self,
        job: str,
        *,
        pid: int | None,
        exitcode: int | None = None,
        signal: int | None = None,
        tries: int = 1,
    ) -> None:
        self.job, self.pid, self.exitcode, self.signal = job, pid, exitcode, signal
        self.tries = tries
        again = f" (tried {tries} times)" if tries > 1 else ""
        super().__init__(
            f"worker {pid if pid is not None else '(pid unknown)'} {self._end()} while it ran "
            f"{job}{again}; {self._advice()}"
        )

    def _end(self) -> str:
        if self.signal is not None:
            return f"was killed by {signal_name(self.signal)}"
        if self.exitcode is not None:
            return f"exited with code {self.exitcode}"
        return "ended in an unknown way"

    def _advice(self) -> str:
        if self.signal == _signal.SIGKILL:
            return (
                "out of memory is the usual cause: raise the function's memory or lower max_workers"
            )
        if self.signal in _CRASHES:
            return (
                "a C extension crashed: run the function with python -X faulthandler to see where"
            )
        if self.exitcode == INTERNAL_ERROR:
            return "its traceback is on stderr: please report it as a bug of asynclam"
        if self.exitcode is not None:
            return "the function, or something that it called, used os._exit()"
        return "the machine may be out of memory: raise it or lower max_workers"


_CRASHES = (_signal.SIGSEGV, _signal.SIGABRT, _signal.SIGBUS, _signal.SIGFPE, _signal.SIGILL)


INTERNAL_ERROR = 70  # exit code of a worker that fails outside of a job (EX_SOFTWARE, sysexits.h)


def _shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}({', '.join(map(repr, error.args))})"
    except Exception:  # a repr of the user's
        return type(error).__name__


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 99`` for one without a name."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class WorkerStartError(AsynclamError):
    """No worker could be started, several times in a row; its cause is the ``__cause__``."""


class PayloadError(AsynclamError):
    """An argument, function, result or exception could not be pickled, or not be unpickled.

    The worker is unharmed.
    """


class ExecutorClosedError(AsynclamError):
    """The executor was closed or killed, before the call or while the job was under way."""


class JobExitError(AsynclamError):
    """The job raised something that would have stopped, or silently confused, the event loop.

    ``SystemExit``, ``KeyboardInterrupt``, ``GeneratorExit``, ``CancelledError``, ``StopIteration``,
    ``StopAsyncIteration`` and every other exception that is not an ``Exception``.

    Attributes:
        original: the exception that the job raised.
    """

    def __init__(self, job: str, original: BaseException) -> None:
        self.original = original
        super().__init__(
            f"{job} raised {_shown(original)}, which "
            "would stop the event loop or vanish in it; return a value or raise an Exception instead"
        )
