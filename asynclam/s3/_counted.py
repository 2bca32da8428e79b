"""Shared memory that tells when nobody has it any more, in whatever process that was.

Theory of operation. Beside its segment, a counted buffer has the write end of a pipe, to which
nobody writes. Both travel to a worker, and back; whoever maps the memory keeps the end with the
mapping. So the pipe ends (end of file) when the last process has dropped the last buffer and view,
or has died: the loop, which has the read end, learns it from the kernel.
"""

from __future__ import annotations

import os
import pickle

from .._memory import SharedBuffer, travel


class _End:
    """The write end of a pipe; closed when it is dropped."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class CountedBuffer(SharedBuffer):
    """A SharedBuffer that holds the write end of a pipe for as long as its memory is held.

    Args:
        nbytes: its length in bytes, more than 0.

    Attributes:
        reader: the read end, in the process that made it; the caller's to close.

    Raises:
        OSError: no descriptor is left (EMFILE).
    """

    __slots__ = ("_end", "reader")

    def __init__(self, nbytes: int) -> None:
        self._end: _End | None = None
        super().__init__(nbytes)
        try:
            self.reader, writer = os.pipe()
        except OSError:
            self.close()
            raise
        self._end = _End(writer)

    def _open_view(self) -> memoryview:
        view = super()._open_view()
        assert self._map is not None
        self._map.companion = self._end
        return view

    def _companion(self) -> object:
        return self._end

    def close(self) -> None:
        """As that of SharedBuffer; views keep the memory, and with it the end of the pipe."""
        super().close()
        self._end = None

    def __reduce__(self) -> tuple[object, ...]:
        index, nbytes = self._send()
        assert travel.outgoing is not None
        assert self._end is not None
        travel.outgoing.append(os.dup(self._end.descriptor))
        return _receive, (index, len(travel.outgoing) - 1, nbytes)


def _receive(index: int, end: int, nbytes: int) -> CountedBuffer:
    if travel.incoming is None:
        raise pickle.UnpicklingError("a SharedBuffer cannot be unpickled without its descriptor")
    buffer = CountedBuffer.__new__(CountedBuffer)
    buffer._adopt(travel.incoming[index], nbytes)
    buffer._end = _End(travel.incoming[end])
    travel.incoming[index] = travel.incoming[end] = -1  # they are the buffer's now
    return buffer
