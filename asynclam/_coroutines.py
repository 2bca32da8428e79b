"""In a worker: jobs that are coroutines, many at once, on a loop of its own.

Theory of operation. A worker that has been given a coroutine has a loop from there on, and waits for
its channel in that loop, which stops as soon as there is something to read. So frames are read, and
plain jobs run, outside of the running loop, as in a worker without one; a plain job may have a loop of
its own meanwhile, and that of the coroutines stands still. The pool sends no plain job to a worker that
has coroutines. What these leave on the loop (a client, a task) is there for the next; it ends with the
worker, without being closed.

Coroutines begin in the order in which they came, at once, so *begun* on the page of marks is the last
of them. They end in any order, and each replies in the very step in which it has: a pickled result has
views of memory that the next coroutine may write to. A reply may block: the loop process never does, so
that is for a moment. A CANCEL names a job; it is raised in the coroutine as asyncio does it, and whatever
comes of that, the reply is SKIPPED: nobody waits for the outcome any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from functools import partial
from time import perf_counter_ns
from typing import Any, TypeVar

from . import _call, _raised, _records, _wire, _worker
from ._errors import PayloadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task


T = TypeVar("T")

_EMPTY = bytearray()


class Coroutines:
    """The coroutines of one worker.

    Args:
        channel: the descriptor of the worker's end of its channel.
        reply: sends the reply of a job.
    """

    def __init__(self, channel: int, reply: Callable[[_worker.Reply], None]) -> None:
        from ._loops import new_event_loop

        self._loop = new_event_loop()
        self._channel = channel
        self._reply = reply
        self._tasks: dict[int, Task[None]] = {}  # by the number of their job, until they are done
        self._orders: dict[int, int] = {}  # of jobs that are not replied to, by their number
        self._cancelled: set[int] = set()
        self._failure: Exception | None = None
        self._listen()

    def _listen(self) -> None:
        self._loop.add_reader(self._channel, self._loop.stop)
        os.set_blocking(self._channel, True)  # libuv has made it non-blocking, and does not need it

    def complete(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Runs the initializer.

        Raises:
            BaseException: what it raises.
        """
        self._loop.remove_reader(self._channel)  # there is no job yet, at most an end of file
        self._loop.run_until_complete(coroutine)
        self._listen()

    def wait(self) -> None:
        """Runs the coroutines until the channel can be read.

        Raises:
            Exception: what has become of a reply that could not be sent.
        """
        while True:
            try:
                self._loop.run_forever()
                break
            except (SystemExit, KeyboardInterrupt):  # of a task, whose exception it also is
                continue
        if self._failure is not None:
            raise self._failure

    def begin(self, frame: _wire.Frame, order: int, open_segment: _call.Open) -> None:
        """Begins a job, or replies that it cannot be begun."""
        number = frame.number
        begun = start(frame, open_segment, self._loop, partial(self._end, number))
        if isinstance(begun, tuple):
            self._reply(begun)
            return
        self._orders[number] = order  # before its first step: no task is eager outside of the loop
        self._tasks[number] = begun
        begun.add_done_callback(partial(self._ended, number))

    def cancel(self, number: int) -> None:
        """Cancels a job; nothing happens if it has ended."""
        if number in self._orders:
            self._cancelled.add(number)
            self._tasks[number].cancel()

    def _end(self, number: int, reply: _worker.Reply) -> None:
        """Replies to a job, once."""
        order = self._orders.pop(number)
        try:
            if number in self._cancelled:
                self._cancelled.remove(number)
                drop(reply)
                reply = _wire.SKIPPED, order, (), 0, None
            self._reply(reply)
        except Exception as error:  # which the loop would only log
            self._failure = error
            self._loop.stop()

    def _ended(self, number: int, task: Task[None]) -> None:
        del self._tasks[number]
        if number in self._orders:
            self._end(number, unended(task, number))


def start(
    frame: _wire.Frame,
    open_segment: _call.Open | None,
    loop: AbstractEventLoop,
    end: Callable[[_worker.Reply], T],
) -> Task[T] | _worker.Reply:
    """Begins a job that is a coroutine; the task ends with the reply, whatever happens in it.

    Args:
        frame: the job; closed here.
        open_segment: puts its payload in the place of its record.
        loop: where it runs.
        end: takes the reply, whose payload may be in use again at the loop's next turn; the task
            returns what it does. Not called for a task that is cancelled (:func:`unended`).

    Returns:
        The reply itself if the job cannot be begun.
    """
    begun = perf_counter_ns()
    try:
        context, fn, args, kwargs = _worker.received(frame, open_segment)
    except (_call.UnknownNameError, PayloadError) as error:
        return _worker.refusal(frame, error, begun)
    finally:
        frame.close()
    frame.body = _EMPTY  # it may be large, and the coroutine may wait long
    context.run(_records.coroutine.set, frame.number)
    return context.run(loop.create_task, _run(frame, begun, fn, args, kwargs, end=end))


def unended(task: Task[Any], number: int) -> _worker.Reply:
    """The reply of a job whose task is done and has not ended with one.

    Somebody had cancelled all tasks before this one had begun, or it has cancelled itself.
    """
    from asyncio import CancelledError

    error = CancelledError() if task.cancelled() else task.exception()
    assert error is not None
    return _wire.RAISED, number, [_raised.dumps(error)], 0, None


def drop(reply: _worker.Reply) -> None:
    """Closes what would have gone with a reply that is not sent."""
    payload = reply[4]
    if payload is not None:
        payload.close()


async def _run(
    frame: _wire.Frame,
    begun: int,
    fn: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
    *,
    end: Callable[[_worker.Reply], T],
) -> T:
    from asyncio import CancelledError, current_task

    task = current_task()
    try:
        try:
            result = await fn(*args, **kwargs)
        finally:
            _worker.exit_if_forked()  # at once: the loop is not its own
    except BaseException as error:
        reply = _worker.raised(frame, error, begun, skip=1)
    else:
        reply = _worker.returned(frame, result, fn, begun)
        del result
    del fn, args, kwargs  # the reply tells which segments nothing looks into any more
    if getattr(task, "_must_cancel", False):  # asyncio takes no result of it any more
        drop(reply)
        raise CancelledError
    return end(reply)
