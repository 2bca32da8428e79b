"""The child's side: receive a job, run it, reply, until end of file.

Theory of operation. A worker owns one descriptor, its end of the channel, and may block on it in
both directions: the loop process never blocks, so a full buffer always drains. It writes nothing
but replies, in the order of the jobs. Before a job's own code runs, its number goes to the shared
page of marks: whoever finds the worker dead reads there whether that job had begun.

End of file means that the loop process has closed the channel or is gone: the worker ends at once,
with ``os._exit``, so that nothing of what it inherited is finalised twice. A broken pipe while it
replies means the same.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from typing import Any, NoReturn

from . import _call, _descriptors, _payload, _raised, _wire
from ._errors import INTERNAL_ERROR, PayloadError


class Marks:
    """The page that a pool shares with its workers: which job each of them has begun last.

    One slot of 8 bytes a worker, written by it and read by the loop process, also when the worker
    is dead. A store takes some 80 ns; a frame that said the same would take a system call.
    """

    def __init__(self, memory: memoryview) -> None:
        self._slots = memory.cast("Q")

    def begin(self, slot: int, number: int) -> None:
        """Notes that the job's code runs from here on."""
        self._slots[slot] = number

    def begun(self, slot: int) -> int:
        """Number of the job that was begun last; 0 if there was none."""
        return self._slots[slot]

    def clear(self, slot: int) -> None:
        """Prepares the slot for another worker."""
        self._slots[slot] = 0


class Worker:
    """The loop of one worker process.

    Args:
        channel: its end of the channel, blocking.
        begin: notes that a job begins, given its number.
    """

    def __init__(self, channel: socket.socket, begin: Callable[[int], None]) -> None:
        self._channel = channel
        self._begin = begin
        self._pid = os.getpid()

    def serve(self, initializer: Callable[[], object]) -> NoReturn:
        """Runs jobs until end of file. Never returns: the frames below are the fork server's."""
        code = 0
        try:
            if self._initialize(initializer):
                self._reply(_wire.READY, 0, [self._pid.to_bytes(8, "little")])
                self._serve()
        except OSError:
            pass  # the loop process is gone
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = INTERNAL_ERROR
        finally:
            flush()
            os._exit(code)

    def _initialize(self, initializer: Callable[[], object]) -> bool:
        try:
            initializer()
        except BaseException as error:
            self._reply(_wire.FAILED, self._pid, [_raised.dumps(error, skip=1)])
            return False
        return True

    def _serve(self) -> None:
        for frame in frames(self._channel):
            reply = run(frame, self._begin)
            frame.close()
            # A late result would hold the memory of this job while the next one is waited for.
            del frame
            self._exit_if_forked()
            flush()
            self._reply(*reply)
            del reply

    def _exit_if_forked(self) -> None:
        # A job called os.fork() and returned in both processes: the child is no worker.
        if os.getpid() != self._pid:
            flush()
            os._exit(0)

    def _reply(
        self,
        kind: int,
        number: int,
        parts: Sequence[_wire.Part],
        flags: int = 0,
        payload: _payload.Payload | None = None,
    ) -> None:
        descriptors = payload.descriptors if payload else []
        buffers = _wire.encode(kind, number, parts, flags=flags, descriptors=len(descriptors))
        send_all(self._channel, buffers, descriptors)
        if payload:
            payload.close()


def frames(channel: socket.socket) -> Iterator[_wire.Frame]:
    """What is received on a blocking socket, until end of file.

    Raises:
        OSError: the connection was reset.
        ProtocolError: what came is no frame.
    """
    decoder = _wire.Decoder()
    while True:
        nbytes, descriptors, truncated = _descriptors.receive(channel, decoder.buffer())
        if not nbytes:
            return
        complete = decoder.received(nbytes, descriptors, truncated=truncated)
        complete.reverse()
        while complete:
            yield complete.pop()  # keeps no reference to what the caller has dropped


def send_all(
    channel: socket.socket, buffers: Sequence[_wire.Part], descriptors: Sequence[int] = ()
) -> None:
    """Sends a whole frame on a blocking socket.

    Raises:
        OSError: nobody is there to read it.
    """
    rest = [memoryview(buffer) for buffer in buffers]
    while rest:
        sent = _descriptors.send(channel, rest, descriptors)
        descriptors = ()
        rest = after(rest, sent)


def after(buffers: list[memoryview], sent: int) -> list[memoryview]:
    """What is left to send of ``buffers`` when ``sent`` bytes of them are gone."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [buffer[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []


Reply = tuple[Any, ...]  # the arguments of Worker._reply


def run(frame: _wire.Frame, begin: Callable[[int], None]) -> Reply:
    """Runs one job; whatever happens in it becomes the reply."""
    number = frame.number
    begin(number)  # unpickling and importing are users' code, too
    try:
        fn, args, kwargs = _call.receive(frame)
    except _call.UnknownNameError as error:
        return _wire.REFUSED, number, [str(error).encode()]
    except PayloadError as error:
        return _wire.RAISED, number, [_raised.dumps(error)]
    try:
        if frame.flags & _wire.CHUNK:
            result = Context().run(_run_chunk, fn, args, bool(frame.flags & _wire.KEEP_ERRORS))
        else:
            result = Context().run(fn, *args, **kwargs)
    except BaseException as error:
        skip = 2 if frame.flags & _wire.CHUNK else 1
        return _wire.RAISED, number, [_raised.dumps(error, skip=skip)]
    return _result(frame, result, fn)


def _run_chunk(
    fn: Callable[..., object], calls: Sequence[tuple[object, ...]], keep_errors: bool
) -> list[object]:
    results: list[object] = []
    for args in calls:
        try:
            result = fn(*args)
        except BaseException as error:
            if not keep_errors:
                raise
            results.append((False, _raised.dumps(error, skip=1)))
        else:
            results.append((True, result) if keep_errors else result)
    return results


def _result(frame: _wire.Frame, result: Any, fn: Callable[..., object]) -> Reply:
    try:
        payload = _payload.dumps(result)
    except BaseException as error:
        if not frame.flags & _wire.KEEP_ERRORS:
            refused = _raised.dumps(_refused(fn, result, error))
            return _wire.RAISED, frame.number, [refused]
        payload = _payload.dumps([_sendable(item, fn) for item in result])
    return _wire.RESULT, frame.number, payload.parts, payload.flags, payload


def _sendable(item: tuple[bool, object], fn: Callable[..., object]) -> tuple[bool, object]:
    """The item of a chunk, or why it cannot be sent back; its siblings can."""
    try:
        _payload.dumps(item).close()
    except BaseException as error:
        return False, _raised.dumps(_refused(fn, item[1], error))
    return item


def _refused(fn: Callable[..., object], result: object, error: BaseException) -> PayloadError:
    return PayloadError(
        f"the result of {_call.name_of(fn)} (of type {type(result).__qualname__}) cannot be "
        f"sent back: {type(error).__name__}: {error}; return plain data instead"
    )


def flush() -> None:
    """Flushes what was printed, so that it is out before the result is in; keeps still if it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # closed, replaced, or nobody reads it: the job's outcome is what counts
            continue


def after_fork() -> None:
    """Gives this process random numbers of its own: forked siblings would all draw the same.

    The random module does so by itself at every fork (``os.register_at_fork``), NumPy does not.
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
