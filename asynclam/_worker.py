"""The child's side: receive a job, run it, reply, until end of file.

Theory of operation. A worker owns one descriptor, its end of the channel, and may block on it in
both directions: the loop process never blocks, so a full buffer always drains. It writes nothing
but replies, in the order of the jobs, of which several may wait in the channel, and ahead of them
what the jobs log (:mod:`._records`). Before a job's own code runs, its place in that order goes to
the shared page of marks: whoever finds the worker dead reads there whether that job had begun. A
job that was revoked on that page is skipped. A job that may be told to end runs under a guard
(:mod:`._guard`). Jobs that are coroutines begin in their order, too, but run beside each other, on a
loop (:mod:`._coroutines`).

End of file means that the loop process has closed the channel or is gone: the worker ends at once,
with ``os._exit``, so that nothing of what it inherited is finalised twice, and takes its process group
along. A broken pipe while it replies means the same.
"""

from __future__ import annotations

import _pickle as pickle
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from contextvars import Context
from functools import partial
from time import perf_counter_ns
from typing import Any, NoReturn

from . import _call, _context, _descriptors, _payload, _raised, _records, _steps, _wire
from ._errors import (
    CHANNEL_LOST,
    INTERNAL_ERROR,
    OUT_OF_MEMORY,
    JobCancelled,
    PayloadError,
    reason_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from . import _segments  # imported where it is used: most jobs do not need it
    from ._guard import Guard
    from ._limits import Growth

    class Coroutines(Protocol):
        """What a worker asks of its loop: :class:`asynclam._coroutines.Coroutines`."""

        def complete(self, coroutine: Coroutine[Any, Any, object]) -> None: ...
        def wait(self) -> None: ...
        def begin(self, frame: _wire.Frame, order: int, open_segment: _call.Open) -> None: ...
        def cancel(self, number: int) -> None: ...


class Marks:
    """The page that a pool shares with its workers: which job each has begun, and which it must not.

    Jobs are named by their order on the worker's channel, from 1; 0 is none. A worker has four
    numbers of 8 bytes: *begun*, written by it and read by the loop process, also when the worker is
    dead; *revoked*, the other way round: no job up to that one may begin any more; *cancelled*,
    written by the loop process: that job, which has begun, is to end; and *heard*, by the worker:
    it has been told so. A store takes some 80 ns; a frame that said the same would take a system
    call.

    A worker writes *begun* before it reads *revoked*, the loop process reads *begun* long after it
    has written *revoked* (a store is visible to the other core within a microsecond). So when the
    loop process finds that a job has not begun, it never will; when it finds that it has, the
    worker's reply says whether it was run or skipped.
    """

    SLOT = 32  # bytes of the page for each worker
    ALL = (1 << 64) - 1  # revokes whatever there may be

    def __init__(self, memory: memoryview) -> None:
        self._numbers = memory.cast("Q")

    def begin(self, slot: int, order: int) -> bool:
        """Notes that the job's code runs from here on; false if it must not."""
        numbers, slot = self._numbers, 4 * slot
        before = numbers[slot]
        numbers[slot] = order
        if order > numbers[slot + 1]:
            return True
        numbers[slot] = before  # it runs elsewhere, also if this worker dies before it says so
        return False

    def begun(self, slot: int) -> int:
        """The job that was begun last, or is just about to be begun or skipped; 0 if there was none."""
        return self._numbers[4 * slot]

    def revoke(self, slot: int, order: int) -> None:
        """Forbids the worker to begin the jobs up to this one; that it has begun goes on."""
        self._numbers[4 * slot + 1] = order

    def cancel(self, slot: int, order: int) -> None:
        """Says that a job is to end which has begun."""
        self._numbers[4 * slot + 2] = order

    def is_cancelled(self, slot: int, order: int) -> bool:
        """Whether this job is to end."""
        return self._numbers[4 * slot + 2] == order

    def hear(self, slot: int, order: int) -> None:
        """Notes that the job has been told to end; 0: nobody has."""
        self._numbers[4 * slot + 3] = order

    def has_heard(self, slot: int, order: int) -> bool:
        """Whether this job has been told to end."""
        return self._numbers[4 * slot + 3] == order

    def clear(self, slot: int) -> None:
        """Prepares the slot for another worker."""
        for number in range(4 * slot, 4 * slot + 4):
            self._numbers[number] = 0


class Worker:
    """The loop of one worker process.

    Args:
        channel: its end of the channel, blocking.
        begin: notes that a job begins, given its order; says whether it may.
        new_guard: makes what jobs run under that may be told to end.
        new_coroutines: makes the loop of those jobs that are coroutines, given the descriptor of the
            channel and what sends a reply.
        growth: tells whether this process has taken more memory than it may; ``None``: it may.
    """

    def __init__(
        self,
        channel: socket.socket,
        begin: Callable[[int], bool],
        new_guard: Callable[[], Guard],
        new_coroutines: Callable[[int, Callable[[Reply], None]], Coroutines],
        growth: Growth | None = None,
    ) -> None:
        self._channel = channel
        self._new_guard = new_guard
        self._new_coroutines = new_coroutines
        self._coroutines: Coroutines | None = None  # once there is one
        self._growth = growth
        self._guard: Guard | None = None  # once there is such a job
        self._outbox = _records.Outbox(channel)
        self._segments: _segments.End | None = None  # once there is one
        self._begin = begin
        self._pid = os.getpid()

    def serve(self, initializer: Callable[[], object], *, bound: bool) -> NoReturn:
        """Runs jobs until end of file. Never returns: the frames below are the fork server's.

        Args:
            initializer: called first.
            bound: whether the life pipe ends this process, which the loop process is told.
        """
        code = 0
        try:
            note_forks()
            _records.install(self._outbox)
            if self._initialize(initializer):
                pid, flags = self._pid.to_bytes(8, "little"), _wire.BOUND if bound else 0
                self._reply(_wire.READY, 0, [pid], flags)
                self._serve()
        except ConnectionError:
            pass  # the loop process is gone
        except OSError:
            code = CHANNEL_LOST
        except MemoryError:
            code = OUT_OF_MEMORY
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = INTERNAL_ERROR
        finally:
            flush()
            if not code and not _is_forked:
                end_group()
            os._exit(code)

    def _initialize(self, initializer: Callable[[], object]) -> bool:
        try:
            initializing = initializer()
            if isinstance(initializing, Coroutine):
                self._loop().complete(initializing)
        except BaseException as error:
            self._reply(_wire.FAILED, self._pid, [_raised.dumps(error, skip=1)])
            return False
        exit_if_forked()
        _context.become_worker()
        return True

    def _serve(self) -> None:
        order = 0
        for frame in frames(self._channel, self._wait):
            if frame.kind == _wire.LEVELS:
                _records.set_levels(bytes(frame.body))
                continue
            if frame.kind == _wire.CANCEL:
                self._loop().cancel(frame.number)
                continue
            order += 1
            if frame.flags & _wire.RELEASES:
                frame.body = self._end().noted(frame.body)
            if not self._begin(order):  # before unpickling: that is users' code, too
                take_segment(frame, self._open)
                frame.close()
                self._reply(_wire.SKIPPED, order, ())
                continue
            if frame.flags & _wire.COROUTINE:
                self._loop().begin(frame, order, self._open)
                del frame
                continue
            self._outbox.job = frame.number
            if frame.flags & _wire.SOFT:
                self._guard = self._guard or self._new_guard()
                reply = run(frame, self._open, self._guard, order)
                if self._guard.left_children:
                    return  # they are in the worker's process group, which is killed after it
            else:
                reply = run(frame, self._open)
            if frame.descriptors:
                frame.close()
            # A late result would hold the memory of this job while the next one is waited for.
            del frame
            self._end_job(reply)
            self._outbox.job = 0  # a thread of the job may still log
            del reply

    def _wait(self) -> int:
        if self._coroutines is None:
            return 0
        self._coroutines.wait()
        return socket.MSG_DONTWAIT  # loops may stop once more than they were told to

    def _loop(self) -> Coroutines:
        if self._coroutines is None:
            self._coroutines = self._new_coroutines(self._channel.fileno(), self._end_job)
        return self._coroutines

    def _end_job(self, reply: Reply) -> None:
        if _is_forked:
            exit_if_forked()  # pragma: no cover - in a frame that coverage has left at the fork
        flush()
        if self._growth is not None and self._growth.is_over():
            reply = (*reply[:3], reply[3] | _wire.GROWN, reply[4])
        self._reply(*reply)

    def _reply(
        self,
        kind: int,
        number: int,
        parts: Sequence[_wire.Part],
        flags: int = 0,
        payload: _payload.Payload | None = None,
    ) -> None:
        with self._outbox.turn:
            if self._outbox.is_full:
                self._outbox.empty()
            if self._segments is None and payload is None and len(parts) == 1:
                data = _wire.encode_small(kind, number, parts[0], flags)  # type: ignore[arg-type]
                self._channel.sendall(data, _descriptors.NOSIGNAL)
            else:
                self._send(kind, number, parts, flags, payload)
        if self._outbox.is_full:  # a thread has left its record to who had the turn
            self._outbox.look_again()

    def _send(
        self,
        kind: int,
        number: int,
        parts: Sequence[_wire.Part],
        flags: int,
        payload: _payload.Payload | None,
    ) -> None:
        lease, descriptors = None, payload.descriptors if payload else []
        if payload and (size := _payload.size_of(payload.parts)) >= _payload.LEAST_IN_SEGMENT:
            lease = self._lease(size)
        if payload and lease:
            from . import _segments

            for _ in _segments.copy_in(lease.view, payload.parts):
                pass  # a worker may take its time
            payload.parts.clear()  # they may look into the segment of the arguments
            parts, flags = [lease.record], flags | _wire.SEGMENT
            descriptors = descriptors + lease.descriptors
        notes = self._segments.notes() if self._segments else b""
        if notes:
            parts, flags = [notes, *parts], flags | _wire.RELEASES
        buffers = _wire.encode(kind, number, parts, flags=flags, descriptors=len(descriptors))
        send_all(self._channel, buffers, descriptors)
        if lease:
            self._end().outgoing.sent(lease)
        if payload:
            payload.close()

    def _lease(self, nbytes: int) -> _segments.Lease | None:
        try:
            return self._end().outgoing.acquire(nbytes)
        except OSError:  # at the limit of descriptors not even the module can be imported
            return None

    def _end(self) -> _segments.End:
        from . import _segments

        if self._segments is None:
            self._segments = _segments.End(_segments.Share(parts=os.cpu_count() or 1))
        return self._segments

    def _open(self, frame: _wire.Frame) -> None:
        """Puts the payload in the place of its record."""
        opened = self._end().incoming.open(frame.body, frame.descriptors)
        frame.body, frame.private = opened


_is_forked = False  # in a worker: whether this process was forked from a worker by what it ran


def note_forks() -> None:
    """From here on, a process that is forked from this one is told apart from it."""
    global _is_forked
    _is_forked = False  # set where this is the worker of an executor in a worker
    os.register_at_fork(after_in_child=_set_forked)


def _set_forked() -> None:
    global _is_forked
    _is_forked = True


def end_group() -> None:
    """Kills what jobs have spawned, and where this process cannot leave its group, this process, too.

    The fork server does so after a worker has ended, but may have been killed with the loop process;
    and the life pipe, which would do it then, reaches no group whose worker has ended before it.
    """
    group = os.getpid()
    try:
        os.setpgid(0, os.getpgid(os.getppid()))  # leaves it, so that the exit status is its own
    except OSError:  # pragma: no cover - killed below; its parent is not the fork server any more
        pass
    kill_group(group)


def kill_group(pid: int) -> None:
    """Kills whoever is in the process group of a worker."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass  # it is empty


def exit_if_forked() -> None:
    """Ends a child whose code called os.fork() and returned in both processes: it is no worker."""
    if _is_forked:
        flush()
        os._exit(0)


def frames(channel: socket.socket, wait: Callable[[], int] = int) -> Iterator[_wire.Frame]:
    """What is received on a blocking socket, until end of file.

    Args:
        channel: the socket.
        wait: called before each receive, whose flags it returns (recvmsg(2)).

    Raises:
        OSError: the connection was reset.
        ProtocolError: what came is no frame.
    """
    decoder = _wire.Decoder()
    while True:
        flags = wait()
        try:
            nbytes, descriptors, truncated = _descriptors.receive(channel, decoder.buffer(), flags)
        except BlockingIOError:
            continue
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
    if len(buffers) == 1 and not descriptors:
        channel.sendall(buffers[0], _descriptors.NOSIGNAL)
        return
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

# run(), _run_chunk(), and its comprehension where that has a frame (PEP 709 has inlined it)
_FRAMES_OF_A_CHUNK = 2 if sys.version_info >= (3, 12) else 3


def run(
    frame: _wire.Frame,
    open_segment: _call.Open | None = None,
    guard: Guard | None = None,
    order: int = 0,
) -> Reply:
    """Runs one job; whatever happens in it becomes the reply.

    Args:
        frame: the job.
        open_segment: puts its payload in the place of its record.
        guard: what it runs under, if it may be told to end.
        order: its place in the order of jobs.
    """
    begun = perf_counter_ns()
    try:
        context, fn, args, kwargs = received(frame, open_segment)
    except (_call.UnknownNameError, PayloadError) as error:
        return refusal(frame, error, begun)
    enter = context.run if guard is None else partial(guard.run, order, context.run)
    try:
        if frame.flags & _wire.CHUNK:
            result = enter(_run_chunk, fn, args, frame.flags)
        else:
            result = enter(fn, *args, **kwargs)
    except BaseException as error:
        if guard is not None and guard.cancelled:
            return _wire.SKIPPED, order, (), 0, None
        skip = (_FRAMES_OF_A_CHUNK if frame.flags & _wire.CHUNK else 1) + (guard is not None)
        return raised(frame, error, begun, skip=skip)
    return returned(frame, result, fn, begun)


def received(
    frame: _wire.Frame, open_segment: _call.Open | None
) -> tuple[Context, Callable[..., Any], Any, dict[str, Any]]:
    """The context of a job, its function, and its arguments.

    Raises:
        UnknownNameError: send it by value.
        PayloadError: it cannot be unpickled here, in any way.
    """
    context = Context()
    if frame.flags & _wire.CARRIES:
        carried, length = _context.taken(frame.body)
        frame.body = memoryview(frame.body)[length:]
        try:
            context.run(_context.enter, carried)
        except BaseException:
            take_segment(frame, open_segment)
            raise
    elif _context.has_trace_id():
        _context.set_trace_id(None)
    fn, args, kwargs = _call.receive(frame, open_segment)
    return context, fn, args, kwargs


def take_segment(frame: _wire.Frame, open_segment: _call.Open | None) -> None:
    """Takes the segment of a job that will not be received: who has sent it waits for its release."""
    if open_segment is not None and frame.flags & _wire.SEGMENT:
        from ._segments import RECORD_SIZE

        frame.body = memoryview(frame.body)[-RECORD_SIZE:]
        with suppress(OSError):  # it is lost, which will be told
            open_segment(frame)
        frame.body = bytearray()


def refusal(frame: _wire.Frame, error: Exception, begun: int) -> Reply:
    """The reply to a call that could not be received."""
    if isinstance(error, PayloadError):
        return raised(frame, error, begun, skip=0)
    return _wire.REFUSED, frame.number, [str(error).encode()], 0, None


def raised(frame: _wire.Frame, error: BaseException, begun: int, *, skip: int) -> Reply:
    """The reply of a job that has raised; so many frames of its traceback are ours."""
    body = _raised.dumps(error, skip=skip)
    return _wire.RAISED, frame.number, [body], _elapsed_since(begun), None


def returned(frame: _wire.Frame, result: Any, fn: Callable[..., object], begun: int) -> Reply:
    """The reply of a job that has returned."""
    elapsed = _elapsed_since(begun)
    if _payload.is_plain(result):
        return _wire.RESULT, frame.number, (pickle.dumps(result, 5),), elapsed, None
    return _result(frame, result, fn, elapsed)


def _elapsed_since(begun: int) -> int:
    return _wire.elapsed_flags(perf_counter_ns() - begun)


def _run_chunk(fn: Callable[..., object], calls: Sequence[Any], flags: int) -> object:
    """The results of a chunk; with KEEP_ERRORS, these and the exceptions by their index."""
    if flags & _wire.KEEP_ERRORS:
        return _run_each(fn, calls, flags)
    # Not map(): a StopIteration of fn would end it, and the rest would be missing.
    if flags & _wire.ITEMS:
        return [fn(item) for item in calls]
    return [fn(*args) for args in calls]


def _run_each(
    fn: Callable[..., object], calls: Sequence[Any], flags: int
) -> tuple[list[object], dict[int, bytes]]:
    results: list[object] = []
    errors: dict[int, bytes] = {}
    for call in calls:
        try:
            result = fn(call) if flags & _wire.ITEMS else fn(*call)
        except JobCancelled:
            raise  # of the chunk, not of the item
        except BaseException as error:
            result, errors[len(results)] = None, _raised.dumps(error, skip=1)
        results.append(result)
    return results, errors


def _result(frame: _wire.Frame, result: Any, fn: Callable[..., object], elapsed: int) -> Reply:
    try:
        payload = _dumps(frame, result, fn)
    except BaseException as error:
        refused = _raised.dumps(_refused(fn, result, error))
        return _wire.RAISED, frame.number, [refused], elapsed, None
    return _wire.RESULT, frame.number, payload.parts, payload.flags | elapsed, payload


def _dumps(frame: _wire.Frame, result: Any, fn: Callable[..., object]) -> _payload.Payload:
    try:
        if _steps.is_large(result):
            payload: _payload.Payload = _steps.run(_steps.dump_steps(result))
            return payload
        return _payload.dumps(result)
    except BaseException:
        if not frame.flags & _wire.KEEP_ERRORS:
            raise
    _set_apart(fn, *result)
    return _payload.dumps(result)


def _set_apart(fn: Callable[..., object], results: list[object], errors: dict[int, bytes]) -> None:
    """Puts errors in the place of results of a chunk that cannot be sent back; the others can."""
    for index, result in enumerate(results):
        try:
            _payload.dumps(result).close()
        except BaseException as error:
            results[index], errors[index] = None, _raised.dumps(_refused(fn, result, error))


def _refused(fn: Callable[..., object], result: object, error: BaseException) -> PayloadError:
    return PayloadError(
        f"the result of {_call.name_of(fn)} (of type {type(result).__qualname__}) cannot be "
        f"sent back: {reason_of(error)}; return plain data instead"
    )


def flush() -> None:
    """Flushes what was printed, so that it is out before the result is in; keeps still if it cannot."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except KeyboardInterrupt:
            raise
        except BaseException:  # closed, gone, or anything at all: the job's outcome is what counts
            continue


def after_fork() -> None:
    """Gives this process random numbers of its own: forked siblings would all draw the same.

    The random module does so by itself at every fork (``os.register_at_fork``), NumPy does not.
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
