"""Segments: memory that two processes see, with no name in any file system and no /dev/shm.

A segment is a descriptor: a memfd, or an unlinked temporary file where the system has none. It
travels between processes with SCM_RIGHTS (unix(7)), which gives the receiver a descriptor of its
own, so either side may close first; the kernel frees the memory with the last descriptor or mapping.
"""

from __future__ import annotations

import mmap
import os
import pickle
import threading

TYPE_CHECKING = False  # as typing's, without its import: a worker imports this module
if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


def create_segment(nbytes: int) -> int:
    """A new segment of ``nbytes`` zeros, as a descriptor that is closed by exec.

    Raises:
        OSError: the descriptor limit is reached (EMFILE), or the disk is full where it is a file.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("asynclam", os.MFD_CLOEXEC)
        reserve = os.ftruncate
    else:  # macOS
        descriptor = _unlinked_file()
        reserve = _fallocate
    try:
        reserve(descriptor, nbytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def map_segment(descriptor: int) -> memoryview:
    """All of a segment, which must not be empty, as writable shared memory.

    The map holds a duplicate of the descriptor (``trackfd=False`` avoids it from Python 3.13).
    """
    return memoryview(mmap.mmap(descriptor, 0))


def _unlinked_file() -> int:
    import tempfile

    descriptor, path = tempfile.mkstemp(prefix="asynclam-")
    os.unlink(path)
    return descriptor


def _fallocate(descriptor: int, nbytes: int) -> None:
    # A store into a sparse file on a full disk is SIGBUS; this is ENOSPC now instead.
    os.ftruncate(descriptor, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)


class _Travel(threading.local):
    """Which descriptors accompany the payload that this thread is pickling or unpickling."""

    outgoing: list[int] | None = None
    incoming: list[int] | None = None


travel = _Travel()


class SharedBuffer:
    """Memory that a worker sees without a copy, without /dev/shm.

    Give it to ``run_cpu`` as an argument, or return it from the function: what travels is a
    descriptor, however large the buffer is, and both processes see the same bytes. Nothing orders
    their accesses; a job should have the buffer for itself until it has returned.

    The memory is freed when every process has dropped its buffer and the views of it. It starts
    as zeros.

    Args:
        nbytes: its length in bytes; 0 is allowed.

    Raises:
        ValueError: ``nbytes`` is negative.
        OSError: no descriptor is left (EMFILE).
    """

    __slots__ = ("__weakref__", "_descriptor", "_map", "_nbytes", "_view")

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"nbytes must not be negative, got {nbytes}")
        self._adopt(create_segment(nbytes), nbytes)

    def _adopt(self, descriptor: int, nbytes: int) -> None:
        self._descriptor = descriptor
        self._nbytes = nbytes
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self._nbytes

    @property
    def closed(self) -> bool:
        """Whether this process has let go of it."""
        return self._descriptor < 0

    @property
    def view(self) -> memoryview:
        """A writable memoryview of all its bytes (format ``"B"``), for ``numpy.frombuffer`` and the like.

        Raises:
            ValueError: the buffer is closed.
        """
        if self._view is None:
            self._view = self._open_view()
        return self._view

    def _open_view(self) -> memoryview:
        self._require_open()
        if not self._nbytes:
            return memoryview(bytearray())  # mmap(2) refuses a length of 0
        self._map = mmap.mmap(self._descriptor, self._nbytes)
        return memoryview(self._map)

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("this SharedBuffer is closed")

    def close(self) -> None:
        """Lets go of the memory in this process; views taken from it stay valid until they are dropped.

        A process that was given the buffer keeps it. Closing twice does nothing.
        """
        descriptor, self._descriptor = self._descriptor, -1
        # Not mmap.close(): it fails while anything (an array, say) still looks into the map, and
        # dropping the references does the same as soon as nothing does.
        self._view = self._map = None
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._nbytes

    def __repr__(self) -> str:
        return f"<SharedBuffer [{self._nbytes:,} bytes{', closed' if self.closed else ''}]>"

    def __reduce__(self) -> tuple[object, ...]:
        if travel.outgoing is None:
            raise pickle.PicklingError(
                "a SharedBuffer is a descriptor and travels only to a worker and back: give it to "
                "run_cpu() as an argument, or return it; pickle bytes(buffer.view) to store it"
            )
        self._require_open()
        # A duplicate: the payload may wait for its turn while this buffer is closed by its owner
        # and the number is given to another file.
        travel.outgoing.append(os.dup(self._descriptor))
        return _receive, (len(travel.outgoing) - 1, self._nbytes)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def _receive(index: int, nbytes: int) -> SharedBuffer:
    if travel.incoming is None:
        raise pickle.UnpicklingError("a SharedBuffer cannot be unpickled without its descriptor")
    buffer = SharedBuffer.__new__(SharedBuffer)
    buffer._adopt(travel.incoming[index], nbytes)
    travel.incoming[index] = -1  # it is the buffer's now
    return buffer
