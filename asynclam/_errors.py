"""The failures of the infrastructure, each with what happened, the likely cause and the next step.

What the user's own function raises is not among them: it comes back as itself.
"""

from __future__ import annotations

import signal as _signal
from collections.abc import Sequence


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
        garbage: str = "",  # what it wrote to its channel, where it was ended for that
    ) -> None:
        self.job, self.pid, self.exitcode, self.signal = job, pid, exitcode, signal
        self.tries = tries
        end, advice = self._end(), self._advice()
        if garbage:
            end = "was ended, because it wrote to its channel what is none of asynclam's messages,"
            job, advice = f"{job} ({garbage})", _NOT_ITS_OWN
        again = f" (tried {tries} times)" if tries > 1 else ""
        super().__init__(
            f"worker {pid if pid is not None else '(pid unknown)'} {end} while it ran "
            f"{job}{again}; {advice}"
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
        if self.signal is not None:
            return "something sent it that signal: the function itself (an alarm, say), or a person"
        if self.exitcode is not None:
            return _EXITS.get(
                self.exitcode, "the function, or something that it called, used os._exit()"
            )
        return "the machine may be out of memory: raise it or lower max_workers"


_CRASHES = (_signal.SIGSEGV, _signal.SIGABRT, _signal.SIGBUS, _signal.SIGFPE, _signal.SIGILL)


# Exit codes of a worker, as in sysexits.h:
OUT_OF_MEMORY = 69  # it had too little to go on (EX_UNAVAILABLE)
INTERNAL_ERROR = 70  # it failed outside of a job (EX_SOFTWARE)
CHANNEL_LOST = 71  # its channel is of no use, and not for the loop process is gone (EX_OSERR)
_NOT_ITS_OWN = (
    "the function, or something that it called, has closed a descriptor that is not its own, or "
    "written to one: os.closerange(), say, or os.close() of a number twice"
)


_EXITS = {
    OUT_OF_MEMORY: (
        "it had no memory left to take the job, or to tell what came of it: raise its limit "
        "(RLIMIT_AS, ulimit -v), or let jobs hold and return less"
    ),
    INTERNAL_ERROR: "its traceback is on stderr: please report it as a bug of asynclam",
    CHANNEL_LOST: _NOT_ITS_OWN,
}


def _shown(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}({', '.join(map(repr, error.args))})"
    except KeyboardInterrupt:
        raise
    except BaseException:  # a repr of the user's
        return type(error).__name__


def reason_of(error: BaseException) -> str:
    """``ValueError: text``, also of a user's exception whose text cannot be had."""
    try:
        text = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as broken:
        text = f"<its __str__ raised {type(broken).__name__}>"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 99`` for one without a name."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class WorkerStartError(AsynclamError):
    """No worker could be started, several times in a row; its cause is the ``__cause__``.

    Attributes:
        tries: how many workers have died while they ran the job, which ``options(retries=n)`` was to
            begin again; 0 if it has not begun.
    """

    tries: int = 0


class PayloadError(AsynclamError):
    """An argument, function, result or exception could not be pickled, or not be unpickled.

    The worker is unharmed.
    """


class ExecutorClosedError(AsynclamError):
    """The executor was closed or killed, before the call or while the job was under way."""


class JobCancelled(BaseException):
    """Raised in a job whose caller was cancelled, where ``options(cancel_grace=…)`` gives it time.

    Like ``KeyboardInterrupt`` it may come at any line of the job, and passes ``except Exception``.
    Let it pass: what the job returns, or raises instead, reaches nobody any more.
    """


class JobExitError(AsynclamError):
    """The job raised something that would have stopped, or silently confused, the event loop.

    Or a handler made with ``lambda_handler`` did, which would have ended the Lambda runtime.

    ``SystemExit``, ``KeyboardInterrupt``, ``GeneratorExit``, ``CancelledError``, ``StopIteration``,
    ``StopAsyncIteration`` and every other exception that is not an ``Exception``.

    Attributes:
        original: the exception that the job raised.
    """

    def __init__(
        self, job: str, original: BaseException, would: str = "stop the event loop or vanish in it"
    ) -> None:
        self.original = original
        super().__init__(
            f"{job} raised {_shown(original)}, which would {would}; "
            "return a value or raise an Exception instead"
        )


class DeadlineExceededError(AsynclamError, TimeoutError):
    """The handler was cancelled, because the runtime would have killed it a moment later.

    Attributes:
        seconds: how long the invocation had run.
        running: the functions that workers ran for it, with the seconds that each had run.
        queued: how many jobs no worker had begun.
        waiting: where the tasks of the invocation waited: function, file and line.
    """

    def __init__(
        self,
        handler: str,
        *,
        seconds: float,
        margin: float,
        running: list[tuple[str, float]],
        queued: int,
        waiting: list[str],
    ) -> None:
        self.seconds, self.running, self.queued = seconds, running, queued
        self.waiting = waiting
        jobs = ", ".join(f"{name} ({ran:.1f} s)" for name, ran in running[:_FEW]) or "nothing"
        tasks = ", ".join(waiting[:_FEW]) or "nowhere"
        super().__init__(
            f"{handler} was cancelled after {seconds:.1f} s, {margin:g} s before the runtime would "
            f"have killed it; in workers: {_and_more(jobs, running)}, {queued} jobs queued; "
            f"waiting in: {_and_more(tasks, waiting)}; raise the function's timeout, give it less "
            "to do, or stop by asynclam.remaining() and return what there is"
        )


_FEW = 5  # of many that a message names


def _and_more(text: str, things: Sequence[object]) -> str:
    return text if len(things) <= _FEW else f"{text} and {len(things) - _FEW} more"
