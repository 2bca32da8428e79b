"""Frames and descriptors over one socketpair, without ever blocking the event loop.

Theory of operation. The channel owns its end of the socketpair; the loop knows it by number only
(uvloop keeps a socket object alive, and the peer would see no end of file). Both directions are
non-blocking: what cannot be sent at once waits in order, and the loop's writer callback is
registered just as long as something waits. Descriptors go with the first byte of their frame.

The reader callback reads until nothing is left. uvloop does not report a death that arrives together
with the last bytes: libuv stops polling a descriptor once epoll has said EPOLLERR. So after a
megabyte the reading goes on by ``call_soon``, with other callbacks in between, and not by hoping to
be called again. End of file and reset both mean that no more will come; they are told once, after
every frame that came before. The parser's and the output's state live here, not in the loop: an
idle channel attaches to the next loop as it is.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from . import _descriptors, _wire
from ._worker import after

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_TURN = 1 << 20  # bytes read or sent before other callbacks of the loop have their turn
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
        on_frame: called with each frame, oldest first.
        on_end: called once, when no more frames will come, with the reason: ``None`` for end of
            file, else what was wrong.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        sock: socket.socket,
        on_frame: Callable[[_wire.Frame], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._descriptor = _descriptors.private(sock.fileno())
        self._on_frame = on_frame
        self._on_end = on_end
        self._decoder = _wire.Decoder()
        self._output: deque[_Output] = deque()
        self._writing = False  # whether the writer callback is registered
        self._broken = False  # whether the peer reads no more
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
        output = _Output([memoryview(buffer) for buffer in buffers], descriptors, sent)
        if self._broken or self.closed:
            output.release()
            return
        self._output.append(output)
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        room = _TURN
        try:
            while self._output and room > 0:
                room -= self._send_some(self._output[0])
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            if error.errno in _LACKS:
                self._watch_writable(False)
                self._loop.call_later(_RETRY, self._retry)
                return
            self._break(error)
        self._watch_writable(bool(self._output))

    def _send_some(self, output: _Output) -> int:
        count = _descriptors.send(self._sock, output.buffers, output.descriptors)
        output.release()
        output.buffers = after(output.buffers, count)
        if not output.buffers:
            self._output.popleft()
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
        if not self._read(_TURN):
            self._loop.call_soon(self._readable)

    def drain(self) -> None:
        """Reads all that has arrived, now: the peer is dead and nothing else will report it."""
        while not self._read(_TURN):
            pass

    def _read(self, room: int) -> bool:
        """Reads until nothing is left (then true), or as much as ``room`` bytes (then false)."""
        while room > 0:
            if self.ended:
                return True
            try:
                nbytes, descriptors, truncated = _descriptors.receive(
                    self._sock, self._decoder.buffer()
                )
            except (BlockingIOError, InterruptedError):
                return True
            except OSError as error:
                self._end(error)
                return True
            if not nbytes:
                self._end(None)
                return True
            room -= nbytes
            try:
                frames = self._decoder.received(nbytes, descriptors, truncated=truncated)
            except _wire.ProtocolError as error:
                self._deliver(error.frames)
                if not self.ended:
                    self._end(error)
                return True
            self._deliver(frames)
        return False

    def _deliver(self, frames: Iterable[_wire.Frame]) -> None:
        for frame in frames:
            if self.closed:  # by the callback of the frame before
                frame.close()
            else:
                self._on_frame(frame)

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
