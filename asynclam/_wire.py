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
MAGIC = 0xA57C
MAX_DESCRIPTORS = 250  # of a frame; the kernel takes 253 a send (SCM_MAX_FD)
MAX_LENGTH = 1 << 40  # bytes of a body: what is longer is garbage, not a frame

# Kinds, loop process to worker
JOB = 1  # run this call
# worker to loop process
READY = 2  # initialised; the body is its pid
RESULT = 3  # the job returned
RAISED = 4  # the job raised, or its call or result could not be (un)pickled
REFUSED = 5  # the call names something that this worker does not know; nothing has run
FAILED = 6  # the initializer raised; the worker ends
# loop process to fork server
START = 7  # fork a worker; descriptors: its end of the channel, the page of marks
KILL = 8  # SIGKILL to the worker and its process group
# fork server to loop process
EXITED = 9  # the worker ended; the body is its wait status
NOT_STARTED = 10  # fork failed; the body is errno

_KINDS = range(JOB, NOT_STARTED + 1)

# Flags of a JOB
CHUNK = 1  # the arguments are a list of calls, the result is the list of their results
KEEP_ERRORS = 2  # in a chunk, an exception is the result of its item
BY_VALUE = 4  # the second try of a refused call: nothing is left to fall back on
# Flags of any frame with a payload
BUFFERS = 8  # the payload has out-of-band buffers

Part = bytes | bytearray | memoryview


class ProtocolError(Exception):
    """What was received is no frame: the peer, or something in its process, wrote garbage.

    Attributes:
        frames: those that came before it.
    """

    frames: tuple[Frame, ...] = ()


class Frame:
    """One message. ``descriptors`` is ``None`` if the kernel could not deliver them."""

    __slots__ = ("body", "descriptors", "flags", "kind", "number")

    def __init__(
        self, kind: int, flags: int, number: int, body: bytearray, descriptors: list[int] | None
    ) -> None:
        self.kind, self.flags, self.number = kind, flags, number
        self.body = body
        self.descriptors = descriptors

    def close(self) -> None:
        """Closes the descriptors that nobody has taken over (those that are not -1)."""
        close_descriptors(self.descriptors or ())
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
    head = [HEADER.pack(MAGIC, kind, descriptors, flags, length, number)]
    if length <= _JOIN:
        return [b"".join([*head, *parts])]
    return [*head, *parts]


_JOIN = 64 * 1024  # bytes: below it one copy is cheaper than another buffer in the send


def decode(data: bytes, descriptors: list[int]) -> Frame:
    """The frame that ``data`` is, as a whole; takes the descriptors over."""
    _, kind, _, flags, _, number = HEADER.unpack_from(data)
    return Frame(kind, flags, number, bytearray(memoryview(data)[HEADER.size :]), descriptors)


class Decoder:
    """Received bytes and descriptors in, frames out.

    Bytes are received into :meth:`buffer` and told with :meth:`received`. The body of a large
    frame is received straight into memory of its own.
    """

    def __init__(self) -> None:
        self._scratch = bytearray(_JOIN + HEADER.size)
        self._view = memoryview(self._scratch)
        self._start = self._end = 0  # what is received and not yet parsed, in the scratch
        self._large: Frame | None = None  # the frame whose body is being received
        self._filled = 0  # bytes of that body that are here
        self._position = 0  # of the stream: bytes received so far
        self._descriptors: deque[int] = deque()
        self._lost = range(0)  # positions of the receive that lost descriptors

    def buffer(self) -> memoryview:
        """Where the next bytes are to be received; never empty (a read of 0 means end of file)."""
        if self._large is not None:
            return memoryview(self._large.body)[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._scratch):
            self._compact()
        return self._view[self._end :]

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
            if self._filled == len(self._large.body):
                frames.append(self._large)
                self._large = None
            return frames
        self._end += nbytes
        try:
            while (frame := self._next_small()) is not None:
                frames.append(frame)
        except ProtocolError as error:
            error.frames = tuple(frames)
            raise
        return frames

    def _next_small(self) -> Frame | None:
        available = self._end - self._start
        if self._large is not None or available < HEADER.size:
            return None
        magic, kind, count, flags, length, number = HEADER.unpack_from(self._scratch, self._start)
        if magic != MAGIC or kind not in _KINDS or length > MAX_LENGTH or count > MAX_DESCRIPTORS:
            raise ProtocolError(
                f"{bytes(self._view[self._start : self._start + 16])!r} is not the start of a frame"
            )
        body_start = self._start + HEADER.size
        if available < HEADER.size + length:
            if length > _JOIN:
                self._begin_large(Frame(kind, flags, number, bytearray(), None), length, count)
            return None
        descriptors = self._take_descriptors(count)
        self._start = body_start + length
        body = self._scratch[body_start : self._start]
        return Frame(kind, flags, number, body, descriptors)

    def _begin_large(self, frame: Frame, length: int, count: int) -> None:
        try:
            frame.body = bytearray(length)
        except MemoryError:
            raise ProtocolError(f"no memory for a frame of {length:,} bytes") from None
        frame.descriptors = self._take_descriptors(count)
        here = self._view[self._start + HEADER.size : self._end]
        frame.body[: len(here)] = here
        self._filled = len(here)
        self._start = self._end = 0
        self._large = frame

    def _take_descriptors(self, count: int) -> list[int] | None:
        if not count:
            return []
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
