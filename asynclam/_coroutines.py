"""In a worker: jobs that are coroutines, many at once, on a loop of its own.

Theory of operation. A worker that has been given a coroutine has a loop from there on, and waits for
its channel in that loop, which stops as soon as there is something to read. So frames are read, and
plain jobs run, outside of the running loop, as in a worker without one; a plain job may have a loop of
its own meanwhile, and that of the coroutines stands still. The pool sends no plain job to a worker that
has coroutines. What these leave on the loop (a client, a task) is there for the next; it ends with the
worker, without being closed.

Coroutines begin in the order in which they came, at once, so *begun* on the page of marks is the last
of them. They end in any order, and each replies when it has. A reply may block: the loop process never
does, so that is for a moment. A CANCEL names a job; it is raised in the coroutine as asyncio does it,
and whatever comes of that, the reply is SKIPPED: nobody waits for the outcome any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from functools import partial
from time import perf_counter_ns
from typing import Any

from . import _call, _raised, _records, _wire, _worker
from ._errors import PayloadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task


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
        self._tasks: dict[int, Task[_worker.Reply]] = {}  # by the number of their job
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
        begun = start(frame, open_segment, self._loop)
        if isinstance(begun, tuple):
            self._reply(begun)
            return
        self._tasks[number] = begun
        begun.add_done_callback(partial(self._ended, number, order))

    def cancel(self, number: int) -> None:
        """Cancels a job; nothing happens if it has ended."""
        task = self._tasks.get(number)
        if task is not None:
            self._cancelled.add(number)
            task.cancel()

    def _ended(self, number: int, order: int, task: Task[_worker.Reply]) -> None:
        del self._tasks[number]
        try:
            if number in self._cancelled:
                self._cancelled.remove(number)
                self._reply((_wire.SKIPPED, order, (), 0, None))
            else:
                self._reply(outcome(task, number))
        except Exception as error:  # which the loop would only log
            self._failure = error
            self._loop.stop()


def start(
    frame: _wire.Frame, open_segment: _call.Open | None, loop: AbstractEventLoop
) -> Task[_worker.Reply] | _worker.Reply:
    """Begins a job that is a coroutine; the task returns the reply, whatever happens in it.

    Args:
        frame: the job; closed here.
        open_segment: puts its payload in the place of its record.
        loop: where it runs.

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
    return context.run(loop.create_task, _run(frame, begun, fn, args, kwargs))


def outcome(task: Task[_worker.Reply], number: int) -> _worker.Reply:
    """The reply of a job whose task is done."""
    try:
        return task.result()
    except BaseException as error:  # somebody has cancelled all tasks before this one had begun
        return _wire.RAISED, number, [_raised.dumps(error)], 0, None


async def _run(
    frame: _wire.Frame,
    begun: int,
    fn: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
) -> _worker.Reply:
    try:
        try:
            result = await fn(*args, **kwargs)
        finally:
            _worker.exit_if_forked()  # at once: the loop is not its own
    except BaseException as error:
        return _worker.raised(frame, error, begun, skip=1)
    return _worker.returned(frame, result, fn, begun)
