"""Frames: what travels on a channel, as bytes in and frames out. No IO, no pickling.

A frame is a header of 24 bytes and a body:

    magic  kind  descriptors  flags  length  number
    u16    u8    u8           u32    u64     u64        little endian

``number`` names the job (or, between the loop process and the fork server, the worker).
``descriptors`` counts the file descriptors that belong to the frame. They travel beside the bytes
(SCM_RIGHTS, unix(7)) with the first byte of the send that carries them. One receive may join bytes
of earlier frames, which carried none, to them, and ends after that send. So the receiver keeps a
queue of descriptors, and each frame takes as many from it as its header counts, in order.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Sequence

HEADER = struct.Struct("<HBBIQQ")
_HEADER_SIZE, _unpack = HEADER.size, HEADER.unpack_from  # names that are looked up once a frame
MAGIC = 0xA57C
MAX_DESCRIPTORS = 251  # of a frame; the kernel takes 253 a send (SCM_MAX_FD)
MAX_LENGTH = 1 << 40  # bytes of a body: what is longer is garbage, not a frame

# Kinds, loop process to worker
JOB = 1  # run this call
# worker to loop process
READY = 2  # initialised; the body is its pid
RESULT = 3  # the job returned
RAISED = 4  # the job raised, or its call or result could not be (un)pickled
REFUSED = 5  # the call names something that this worker does not know; nothing has run
SKIPPED = 6  # the job was revoked before it began, or was cancelled; number: its place in the order
FAILED = 7  # the initializer raised; the worker ends
# loop process to fork server
START = 8  # fork a worker; descriptors: its ends of the channel and of the life pipe, the page
KILL = 9  # SIGKILL to the worker and its process group
# fork server to loop process
EXITED = 10  # the worker ended; the body is its wait status
NOT_STARTED = 11  # fork failed; the body is errno
# loop process to fork server
INTERRUPT = 12  # SIGURG to the worker: its job is cancelled, says the page of marks
# worker to loop process
RECORD = 13  # a log record, or a warning; number: the job that it is of, 0 for none
# loop process to worker
LEVELS = 14  # the levels of loggers have changed
CANCEL = 15  # a coroutine; number: its job

_KINDS = range(JOB, CANCEL + 1)

# Flags of a JOB
CHUNK = 1  # the arguments are a list of calls, the result is the list of their results
KEEP_ERRORS = 2  # in a chunk, an exception is the result of its item
ITEMS = 16  # in a chunk, calls have one argument each: they are a list of these
BY_VALUE = 4  # the second try of a refused call: nothing is left to fall back on
CARRIES = 256  # the body (behind notes) begins with the context of the job
SOFT = 512  # JobCancelled may be raised in the job
COROUTINE = 1024  # the function is a coroutine function
# A flag of a reply
GROWN = 4  # the worker has taken more memory than it may
# A flag of READY
BOUND = 1  # the life pipe ends this worker; without it, only a signal to its pid does
# Flags of any frame with a payload
BUFFERS = 8  # the payload has out-of-band buffers
SEGMENT = 32  # the payload is in a segment, and a record in its place says in which
RELEASES = 64  # the body begins with notes on segments
PIECES = 128  # the payload is pickled in pieces, and out-of-band buffers may be objects
# Above the flags, a reply says how long the job has run, in microseconds; the field is u32.
_ELAPSED = 8  # bits of flags below it
MOST_ELAPSED = (1 << 32 - _ELAPSED) - 1  # microseconds, 16.8 seconds: what is longer says so much


def dropped_flags(count: int) -> int:
    """The flags of a RECORD that tell how many were dropped before it."""
    return min(count, MOST_ELAPSED) << _ELAPSED


def elapsed_flags(nanoseconds: int) -> int:
    """The flags that tell a run time."""
    return min(nanoseconds // 1000, MOST_ELAPSED) << _ELAPSED


Part = bytes | bytearray | memoryview


class ProtocolError(Exception):
    """What was received is no frame: the peer, or something in its process, wrote garbage.

    Attributes:
        frames: those that came before it.
    """

    frames: tuple[Frame, ...] = ()


class Frame:
    """One message.

    Attributes:
        descriptors: those that belong to it; ``None`` if the kernel could not deliver them.
        private: whether nothing that is unpickled may look into the body.
    """

    __slots__ = ("body", "descriptors", "flags", "kind", "number", "private")

    def __init__(
        self,
        kind: int,
        flags: int,
        number: int,
        body: bytearray | memoryview,
        descriptors: list[int] | None,
    ) -> None:
        self.kind, self.flags, self.number = kind, flags, number
        self.body = body
        self.descriptors = descriptors
        self.private = False

    @property
    def elapsed(self) -> int:
        """How long the job of this reply has run, in microseconds (16.8 seconds at most)."""
        return self.flags >> _ELAPSED

    @property
    def dropped(self) -> int:
        """How many log records were dropped before this one."""
        return self.flags >> _ELAPSED

    def close(self) -> None:
        """Closes the descriptors that nobody has taken over (those that are not -1)."""
        if self.descriptors:
            close_descriptors(self.descriptors)
            self.descriptors = []


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Closes those of the descriptors that are not -1."""
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def encode(
    kind: int, number: int, parts: Sequence[Part] = (), *, flags: int = 0, descriptors: int = 0
) -> list[Part]:
    """The buffers to send, in order, for one frame whose body is ``parts`` joined.

    Small parts are joined to the header, so that a small frame is a single buffer.
    """
    if descriptors > MAX_DESCRIPTORS:
        raise ValueError(
            f"a frame carries {MAX_DESCRIPTORS} descriptors at most, not {descriptors}"
        )
    length = sum(map(len, parts))
    head = HEADER.pack(MAGIC, kind, descriptors, flags, length, number)
    if length <= _JOIN:
        return [b"".join((head, *parts))]
    return [head, *parts]


def encode_small(kind: int, number: int, body: bytes, flags: int) -> bytes:
    """The same for a body in one piece that is small, without descriptors, as one buffer."""
    return HEADER.pack(MAGIC, kind, 0, flags, len(body), number) + body


_ROOM = bytes(1 << 20)  # by which the body of a large frame grows
_JOIN = 64 * 1024  # bytes: below it one copy is cheaper than another buffer in the send


def decode(data: bytes, descriptors: list[int] | None) -> Frame:
    """The frame that ``data`` is, as a whole; takes the descriptors over (``None``: they are lost)."""
    _, kind, _, flags, _, number = HEADER.unpack_from(data)
    return Frame(kind, flags, number, bytearray(memoryview(data)[HEADER.size :]), descriptors)


class Decoder:
    """Received bytes and descriptors in, frames out.

    Bytes are received into :meth:`buffer` and told with :meth:`received`. The body of a large
    frame is received straight into memory of its own, which grows as they come: a length that is
    garbage takes no memory, and one that is not does not hold up the loop to clear it all.
    """

    def __init__(self) -> None:
        self._scratch = bytearray(_JOIN + HEADER.size)
        self._view = memoryview(self._scratch)
        self._start = self._end = 0  # what is received and not yet parsed, in the scratch
        self._large: Frame | None = None  # the frame whose body is being received
        self._body = bytearray()  # as much of that as there is room for
        self._filled = 0  # bytes of that body that are here
        self._length = 0  # and that it will have
        self._position = 0  # of the stream: bytes received so far
        self._descriptors: deque[int] = deque()
        self._lost = range(0)  # positions of the receive that lost descriptors

    def buffer(self) -> memoryview:
        """Where the next bytes are to be received; never empty (a read of 0 means end of file).

        No view of it may be left when it is called again: what is looked into cannot grow.

        Raises:
            ProtocolError: there is not so much memory.
        """
        if self._large is not None:
            if self._filled == len(self._body):
                self._grow()
            return memoryview(self._body)[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
            return self._view
        if self._end == len(self._scratch):
            self._compact()
        return self._view[self._end :]

    def _grow(self) -> None:
        try:
            self._body += _ROOM[: self._length - self._filled]
        except MemoryError:
            raise ProtocolError(f"no memory for a frame of {self._length:,} bytes") from None

    def _compact(self) -> None:
        # What is left unparsed is less than a frame that fits, so there is room after it.
        rest = self._scratch[self._start : self._end]
        self._view[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    def received(
        self, nbytes: int, descriptors: Sequence[int] = (), *, truncated: bool = False
    ) -> list[Frame]:
        """Takes note of bytes that were written into :meth:`buffer`, and what came with them.

        Args:
            nbytes: how many, more than 0.
            descriptors: those that came in the same receive; they belong to the decoder now.
            truncated: whether the kernel dropped some of them (MSG_CTRUNC).

        Returns:
            The frames that are complete now, oldest first.

        Raises:
            ProtocolError: the bytes are no frame.
        """
        if truncated:
            self._lost = range(self._position, self._position + nbytes)
            close_descriptors(descriptors)
        else:
            self._descriptors.extend(descriptors)
        self._position += nbytes
        frames: list[Frame] = []
        if self._large is not None:
            self._filled += nbytes
            if self._filled == self._length:
                self._large.body, self._body = self._body, bytearray()
                frames.append(self._large)
                self._large = None
            return frames
        if self._end == 0 and nbytes >= _HEADER_SIZE:
            # Nearly always: one small frame, and nothing else.
            magic, kind, count, flags, length, number = _unpack(self._scratch)
            if length == nbytes - _HEADER_SIZE and not count and magic == MAGIC and kind in _KINDS:
                return [Frame(kind, flags, number, self._scratch[_HEADER_SIZE:nbytes], [])]
        self._end += nbytes
        try:
            self._parse(frames)
        except ProtocolError as error:
            error.frames = tuple(frames)
            raise
        return frames

    def _parse(self, frames: list[Frame]) -> None:
        scratch, start, end = self._scratch, self._start, self._end
        while end - start >= _HEADER_SIZE:
            magic, kind, count, flags, length, number = _unpack(scratch, start)
            if magic != MAGIC or kind not in _KINDS or length > MAX_LENGTH:
                raise ProtocolError(
                    f"{bytes(scratch[start : start + 16])!r} is not the start of a frame"
                )
            body = start + _HEADER_SIZE
            if body + length > end:
                if length > _JOIN:
                    self._begin_large(Frame(kind, flags, number, bytearray(), None), length, count)
                return
            descriptors = self._take_descriptors(count) if count else []
            self._start = start = body + length
            frames.append(Frame(kind, flags, number, scratch[body:start], descriptors))

    def _begin_large(self, frame: Frame, length: int, count: int) -> None:
        frame.descriptors = self._take_descriptors(count) if count else []
        self._body = self._scratch[self._start + HEADER.size : self._end]
        self._length, self._filled = length, len(self._body)
        self._start = self._end = 0
        self._large = frame

    def _take_descriptors(self, count: int) -> list[int] | None:
        frame_start = self._position - (self._end - self._start)
        if frame_start in self._lost:
            return None
        if len(self._descriptors) < count:
            raise ProtocolError(f"a frame counts {count} descriptors that did not come with it")
        return [self._descriptors.popleft() for _ in range(count)]

    def close(self) -> None:
        """Closes the descriptors of frames that will never be complete."""
        close_descriptors(self._descriptors)
        self._descriptors.clear()
        if self._large is not None:
            self._large.close()
            self._large = None
            self._body = bytearray()
