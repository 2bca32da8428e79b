"""Jobs: a call, its terms, the future of its one outcome, what becomes of the reply, and counts of these."""

from __future__ import annotations

import itertools
from contextvars import Context
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import _payload, _raised, _steps, _wire
from ._errors import ExecutorClosedError, JobExitError, PayloadError, reason_of

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Generator

    from ._call import Call
    from ._grace import Grace

_EMPTY = bytearray()
_numbers = itertools.count(1)  # 0 means none, on the page of marks


class Terms:
    """What a caller has said of his jobs; see :meth:`asynclam.Executor.options`."""

    __slots__ = ("cancel_grace", "retries")

    def __init__(self, retries: int = 0, cancel_grace: float = 0.0) -> None:
        self.retries = retries
        self.cancel_grace = cancel_grace


USUAL = Terms()


class Counts:
    """What has become of a pool's jobs and workers, since it was made.

    Times are of jobs that were replied to: *waited* until nothing was before them in a worker,
    *away* from then until the reply was read, *ran* as the worker measured it.

    Attributes:
        completed: jobs that were replied to.
        cancelled: jobs that were cancelled before they had ended.
        retries: how often a job was begun again.
        deaths: workers that died while they had a job.
        dropped: log records of jobs that were dropped.
        spent: workers that were replaced because they had run as many jobs as they may.
        grown: workers that were replaced because of the memory that they had taken.
        waited: seconds.
        away: seconds.
        ran: microseconds.
    """

    __slots__ = (
        "away", "cancelled", "completed", "deaths", "dropped", "grown", "ran", "retries", "spent",
        "waited",
    )  # fmt: skip

    def __init__(self) -> None:
        self.cancelled = self.completed = self.deaths = self.dropped = self.retries = 0
        self.spent = self.grown = self.ran = 0
        self.waited = self.away = 0.0

    def add(self, other: Counts) -> None:
        """Counts what another has counted, too."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Job:
    """One call of a function in a worker.

    Attributes:
        call: what is called.
        terms: what the caller has said of it.
        future: its outcome.
        made: when it was, by the monotonic clock.
        number: names it on the channel and on the page of marks.
        worker: who has it; ``None`` while it waits, and once it has ended.
        order: its place among the jobs that the worker was sent.
        duration: how long it runs, in microseconds: as expected, and once it has ended as measured.
        losses: how many workers have died with it next in turn.
        tries: how many have died while they ran it.
        grace: the time that it has to end, once it is cancelled, if its terms give it any.
        weight: bytes that the reply to a chunk takes.
    """

    __slots__ = (
        "call", "duration", "future", "grace", "losses", "made", "number", "order", "terms",
        "tries", "weight", "worker",
    )  # fmt: skip

    def __init__(self, call: Call, future: Future[Any], terms: Terms = USUAL) -> None:
        self.call = call
        self.terms = terms
        if terms.cancel_grace:
            call.may_be_interrupted()
        self.grace: Grace | None = None
        self.future = future
        self.made = perf_counter()
        self.number = next(_numbers)
        self.worker: Any = None
        self.order = self.duration = self.losses = self.tries = self.weight = 0

    @property
    def name(self) -> str:
        """The function's name."""
        return self.call.name

    @property
    def context(self) -> Context:
        """The context of its caller."""
        if self.grace is not None:  # it is cancelled, and nobody awaits its future any more
            return self.grace.caller
        # The task that awaits a future has left its own context there, with its callback. To copy it
        # for each job, for the few that log, would cost 72 bytes of each that waits.
        for _, context in self.future._callbacks or ():
            return context
        return Context()

    def receive(self, frame: _wire.Frame, pid: int | None) -> None:
        """Settles the job with a worker's reply."""
        try:
            if frame.kind == _wire.RESULT:
                call = self.call
                if call.is_chunk:
                    self._weigh(frame)
                result = _payload.loads(frame.body, frame.flags, frame.descriptors)
                self.succeed(self._results(result, pid) if call.keeps_errors else result)
            else:
                self.fail(_raised.loads(frame.body, self.name, pid))
        except BaseException as error:
            self._fail_unreadable(error)
        finally:
            if frame.descriptors:
                frame.close()

    def receive_steps(self, frame: _wire.Frame, pid: int | None) -> Generator[None, None, None]:
        """Settles the job with a large result, a millisecond at a time."""
        if self.call.is_chunk:
            self._weigh(frame)
        body, frame.body = frame.body, _EMPTY
        steps = _steps.load_steps(body, frame.flags, frame.descriptors, private=frame.private)
        del body  # a segment is free once nothing looks into it
        try:
            result = yield from steps
            self.succeed(self._results(result, pid) if self.call.keeps_errors else result)
        except GeneratorExit:
            raise  # given up
        except BaseException as error:
            self._fail_unreadable(error)
        finally:
            frame.close()

    def _fail_unreadable(self, error: BaseException) -> None:
        # Unpickling runs users' code, which may do anything but leave the job unsettled.
        self.fail(self._unreadable(error))
        if isinstance(error, KeyboardInterrupt):
            raise error  # as likely to be Ctrl-C

    def succeed(self, result: object) -> None:
        """Gives the result, unless there is an outcome already (a cancel)."""
        if self.future.done():
            self.drop()
            return
        if self.call.kind is None:
            self.call.close()
        self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Gives the error, unless there is an outcome already."""
        self.drop()
        if self._wanted():
            self.future.set_exception(self._harmless(error))

    def fail_as_killed(self) -> None:
        """Says that its pool was killed."""
        self.fail(ExecutorClosedError(f"the executor was killed before {self.name} had ended"))

    def drop(self) -> None:
        """No worker has the job, or will have it."""
        self.call.close()
        if self.grace is not None:
            self.grace.end()

    def _wanted(self) -> bool:
        # A future of a closed loop cannot call back, and nobody waits for it.
        return not self.future.done() and not self.future.get_loop().is_closed()

    def _harmless(self, error: BaseException) -> Exception:
        if isinstance(error, Exception) and not isinstance(
            error, StopIteration | StopAsyncIteration
        ):
            return error
        exit_error = JobExitError(self.name, error)
        exit_error.__cause__ = error
        return exit_error

    def _weigh(self, frame: _wire.Frame) -> None:
        self.weight = _payload.weight(len(frame.body), frame.descriptors or ())

    def _results(self, results: Any, pid: int | None) -> Any:
        results, errors = results
        for index, raised in errors.items():
            results[index] = self._harmless(_raised.loads(raised, self.name, pid))
        return results

    def _unreadable(self, error: BaseException) -> PayloadError:
        unreadable = PayloadError(
            f"the result of {self.name} could not be unpickled here: "
            f"{reason_of(error)}; its type must be importable in this process, too"
        )
        unreadable.__cause__ = error
        return unreadable
