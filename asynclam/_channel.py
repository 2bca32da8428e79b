"""Frames and descriptors over one socketpair, without ever blocking the event loop.

Theory of operation. The channel owns its end of the socketpair; the loop knows it by number only
(uvloop keeps a socket object alive, and the peer would see no end of file). Both directions are
non-blocking: what cannot be sent at once waits in order, and the loop's writer callback is
registered just as long as something waits. Descriptors go with the first byte of their frame.

The reader callback reads once, which has all that has arrived unless it has filled the buffer; the
loop calls again if there is more. A second read to see that nothing is left would cost each round
trip a tenth. There is one thing that it would see: uvloop does not report a death that arrives
together with the last bytes, for libuv stops polling a descriptor once epoll has said EPOLLERR. Who
has no other messenger of the peer's death has to be ``thorough``. After a megabyte the reading goes
on by ``call_soon``, with other callbacks in between.

End of file and reset both mean that no more will come; they are told once, after every frame that
came before. The parser's and the output's state live here, not in the loop: an idle channel attaches
to the next loop as it is.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING

from . import _descriptors, _wire
from ._worker import after

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_TURN = 1 << 20  # bytes read or sent before other callbacks of the loop have their turn
_TOGETHER = 64  # frames of one send
_RETRY = 0.01  # seconds until the kernel may have what it lacked
_LACKS = (  # what passes: too many descriptors in flight (unix(7)), no memory for the buffer
    errno.ETOOMANYREFS,
    errno.ENOBUFS,
    errno.ENOMEM,
)


class _Output:
    """A frame that is being sent. ``sent`` is called once its descriptors are no longer needed."""

    __slots__ = ("buffers", "descriptors", "sent")

    def __init__(
        self,
        buffers: list[memoryview],
        descriptors: Sequence[int],
        sent: Callable[[], object] | None,
    ) -> None:
        self.buffers, self.descriptors, self.sent = buffers, descriptors, sent

    def release(self) -> None:
        self.descriptors = ()
        if self.sent:
            self.sent()
            self.sent = None


class Channel:
    """One end of a socketpair on an event loop.

    Args:
        sock: the end; owned by the channel from here on.
        on_frames: called with the frames that have arrived together, oldest first.
        on_end: called once, when no more frames will come, with the reason: ``None`` for end of
            file, else what was wrong.
        thorough: whether the end must be seen here, because nothing else tells of it.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        sock: socket.socket,
        on_frames: Callable[[list[_wire.Frame]], None],
        on_end: Callable[[Exception | None], None],
        *,
        thorough: bool = False,
    ) -> None:
        sock.setblocking(False)
        self.thorough = thorough
        self._sock = sock
        self._descriptor = _descriptors.private(sock.fileno())
        self._on_frames = on_frames
        self._on_end = on_end
        self._decoder = _wire.Decoder()
        self._output: deque[_Output] = deque()
        self._held = False  # whether output is collected
        self._writing = False  # whether the writer callback is registered
        self._broken = False  # whether the peer reads no more
        self._filled = False  # whether the last receive has filled its buffer: there may be more
        self._ended = False  # whether on_end was called
        self._loop = loop
        loop.add_reader(self._descriptor, self._readable)

    @property
    def closed(self) -> bool:
        """Whether this end was closed."""
        return self._descriptor < 0

    @property
    def ended(self) -> bool:
        """Whether no more frames will come."""
        return self._ended or self.closed

    @property
    def is_sending(self) -> bool:
        """Whether something waits for room at the other end."""
        return bool(self._output)

    def attach(self, loop: AbstractEventLoop) -> None:
        """Moves to another loop; the one before is closed and has forgotten the descriptor."""
        self._loop = loop
        if not self.ended:
            loop.add_reader(self._descriptor, self._readable)
        self._writing = False
        if not self.closed:
            self._flush()  # what waits registers the writer callback, or a retry, on this loop

    # --- output ----------------------------------------------------------------------------------

    def send(
        self,
        buffers: Sequence[_wire.Part],
        descriptors: Sequence[int] = (),
        sent: Callable[[], object] | None = None,
    ) -> None:
        """Sends one frame: at once what there is room for, the rest as room comes.

        Args:
            buffers: the frame, as :func:`_wire.encode` gives it; not to be changed until sent.
            descriptors: those that its header counts; to be kept open until ``sent``.
            sent: called when the descriptors have been handed over, or never will be.
        """
        if not (self._output or self._held or descriptors or sent) and len(buffers) == 1:
            # Nearly always: one small frame, and room for it.
            try:
                count = _descriptors.send(self._sock, buffers, ())
            except OSError:
                count = 0  # tried again below, where each reason has its answer
            if count == len(buffers[0]):
                return
            buffers = [memoryview(buffers[0])[count:]]
        output = _Output([memoryview(buffer) for buffer in buffers], descriptors, sent)
        if self._broken or self.closed:
            output.release()
            return
        self._output.append(output)
        if not (self._writing or self._held):
            self._flush()

    def hold(self) -> None:
        """Collects what is sent from here on, until :meth:`unhold` sends it together."""
        self._held = True

    def unhold(self) -> None:
        """Sends what was collected."""
        self._held = False
        if self._output and not self._writing and not self.closed:
            self._flush()

    def _flush(self) -> None:
        room = _TURN
        try:
            while self._output and room > 0:
                room -= self._send_some()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno in _LACKS:
                self._watch_writable(False)
                self._loop.call_later(_RETRY, self._retry)
                return
            self._break(error)
        self._watch_writable(bool(self._output))

    def _send_some(self) -> int:
        first = self._output[0]
        buffers = first.buffers
        if not first.descriptors and len(self._output) > 1:
            plain = takewhile(lambda output: not output.descriptors, self._output)
            buffers = [buffer for output in islice(plain, _TOGETHER) for buffer in output.buffers]
        count = rest = _descriptors.send(self._sock, buffers, first.descriptors)
        while rest:
            output = self._output[0]
            output.release()
            length = sum(map(len, output.buffers))
            if rest < length:
                output.buffers = after(output.buffers, rest)
                break
            self._output.popleft()
            rest -= length
        return count

    def _retry(self) -> None:
        if not self.closed:
            self._flush()

    def _break(self, error: OSError) -> None:
        self._broken = True
        self._drop_output()
        # If the peer is gone, what it had sent before is still to be read, and the end is told there.
        if not isinstance(error, ConnectionError) and not self.ended:
            self._end(error)

    def _drop_output(self) -> None:
        for output in self._output:
            output.release()
        self._output.clear()

    def _watch_writable(self, wanted: bool) -> None:
        if wanted == self._writing:
            return
        self._writing = wanted
        if wanted:
            self._loop.add_writer(self._descriptor, self._flush)
        else:
            self._loop.remove_writer(self._descriptor)

    # --- input -----------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self.ended:
            return
        self._receive()
        if self.ended or not (self._filled or self.thorough):
            return
        if not self._read(_TURN):
            self._loop.call_soon(self._readable)

    def drain(self) -> None:
        """Reads all that has arrived, now: the peer is dead and nothing else will report it."""
        while not self.catch_up():
            pass

    def catch_up(self) -> bool:
        """Reads what has arrived, now; false if there may be more than a megabyte of it."""
        return self._read(_TURN)

    def _read(self, room: int) -> bool:
        """Reads until nothing is left (then true), or as much as ``room`` bytes (then false)."""
        while room > 0 and not self.ended:
            nbytes = self._receive()
            if not nbytes:
                return True
            room -= nbytes
        return self.ended

    def _receive(self) -> int:
        """Receives once, and delivers what is complete; 0 if there was nothing, or will be no more."""
        self._filled = False
        try:
            buffer = self._decoder.buffer()
            nbytes, descriptors, truncated = _descriptors.receive(self._sock, buffer)
            if not nbytes:
                self._end(None)
                return 0
            self._filled = nbytes == len(buffer)
            frames = self._decoder.received(nbytes, descriptors, truncated=truncated)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._end(error)
            return 0
        except _wire.ProtocolError as error:
            self._on_frames(list(error.frames))
            if not self.ended:
                self._end(error)
            return 0
        if frames:
            self._on_frames(frames)
        return nbytes

    def _end(self, reason: Exception | None) -> None:
        self._ended = True
        self._loop.remove_reader(self._descriptor)
        self._on_end(reason)

    def close(self) -> None:
        """Closes this end; the peer reads end of file. Closing twice does nothing."""
        if self.closed:
            return
        # Always before the close: a callback left on a number that is given to another file would
        # be called for that one, or silently keep it from being watched.
        if not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
            self._watch_writable(False)
        _descriptors.unmark(self._descriptor)
        self._descriptor = -1
        self._sock.close()
        self._drop_output()
        self._decoder.close()
