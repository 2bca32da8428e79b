"""Jobs: a call, the future of its one outcome, and what becomes of the reply."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from . import _payload, _raised, _wire
from ._errors import JobExitError, PayloadError

if TYPE_CHECKING:
    from asyncio import Future

    from ._call import Call

_numbers = itertools.count(1)  # 0 means none, on the page of marks


class Job:
    """One call of a function in a worker.

    Attributes:
        call: what is called.
        future: its outcome.
        number: names it on the channel and on the page of marks.
        worker: who has it; ``None`` while it waits, and once it has ended.
        losses: how many workers have died with it before it had begun.
    """

    __slots__ = ("call", "future", "losses", "number", "worker")

    def __init__(self, call: Call, future: Future[Any]) -> None:
        self.call = call
        self.future = future
        self.number = next(_numbers)
        self.worker: Any = None
        self.losses = 0

    @property
    def name(self) -> str:
        """The function's name."""
        return self.call.name

    def receive(self, frame: _wire.Frame, pid: int | None) -> None:
        """Settles the job with a worker's reply."""
        try:
            if frame.kind == _wire.RESULT:
                self.succeed(self._result(frame, pid))
            else:
                self.fail(_raised.loads(frame.body, self.name, pid))
        except BaseException as error:
            # Unpickling runs users' code, which may do anything but leave the job unsettled.
            self.fail(self._unreadable(error))
            if isinstance(error, KeyboardInterrupt):
                raise  # as likely to be Ctrl-C
        finally:
            frame.close()

    def succeed(self, result: object) -> None:
        """Gives the result, unless there is an outcome already (a cancel)."""
        self.call.close()
        if self._wanted():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Gives the error, unless there is an outcome already."""
        self.call.close()
        if self._wanted():
            self.future.set_exception(self._harmless(error))

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

    def _result(self, frame: _wire.Frame, pid: int | None) -> Any:
        result = _payload.loads(frame.body, frame.flags, frame.descriptors)
        if self.call.keeps_errors:
            return [self._item(ok, value, pid) for ok, value in result]
        return result

    def _item(self, ok: bool, value: Any, pid: int | None) -> Any:
        return value if ok else self._harmless(_raised.loads(value, self.name, pid))

    def _unreadable(self, error: BaseException) -> PayloadError:
        unreadable = PayloadError(
            f"the result of {self.name} could not be unpickled here: "
            f"{type(error).__name__}: {error}; its type must be importable in this process, too"
        )
        unreadable.__cause__ = error
        return unreadable
