"""Segments: memory that two processes see, with no name in any file system and no /dev/shm.

Theory of operation. A segment is a descriptor. It travels between processes with SCM_RIGHTS
(unix(7)), which gives the receiver a descriptor of its own, so either side may close first; the
kernel frees the memory with the last descriptor or mapping. The first way that works makes them:

* ``memfd``: ``os.memfd_create``;
* ``syscall``: the system call of that name, for a Python that was built without the function;
* ``file``: a file without a name in the temporary directory, its blocks reserved before it is mapped.

The environment variable ``ASYNCLAM_SEGMENTS`` names the only one to use, or ``stream``: payloads
travel in frames alone then (what must be shared memory still takes the first way that works). Each
process reads it once, when it makes its first segment: workers have the environment of the loop
process, which comes with the recipe of their start, after the import of this module.

The end of a large mapping takes long (60 ms for 256 MiB on the machine where it was measured), and
comes where the last view of it is dropped, which may be a ``del`` on the event loop. So a
:class:`Map` that dies is revived, and handed to a thread that lets it die again, there: the thread
runs without the GIL meanwhile, and ends when nothing is left. So is the descriptor of memory that is
not mapped, which the last close frees. The loop process asks for that with :func:`drop_in_thread`;
everywhere else, and in a process that it forks, they die in place.
"""

from __future__ import annotations

import _pickle as pickle
import _thread
import errno
import mmap
import os
import sys
import threading
from collections import deque
from collections.abc import Callable

TYPE_CHECKING = False  # as typing's, without its import: a worker imports this module
if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer, Self

VARIABLE = "ASYNCLAM_SEGMENTS"
_STREAM = "stream"

_LARGE = 1 << 20  # bytes: to unmap less than this takes less time than to wake a thread


# --- ways to make one ----------------------------------------------------------------------------


def create_segment(nbytes: int) -> int:
    """A new segment of ``nbytes`` zeros, as a descriptor that is closed by exec.

    Raises:
        OSError: the descriptor limit is reached (EMFILE), or the disk is full where it is a file.
        ValueError: ``ASYNCLAM_SEGMENTS`` names no way that there is.
    """
    global _chosen
    if _chosen is None:
        wanted = _wanted()
        if wanted not in _WAYS:
            _chosen, descriptor = _first_that_works(nbytes)
            return descriptor
        _chosen = _WAYS[wanted]
    return _chosen(nbytes)


def are_payloads_streamed() -> bool:
    """Whether ``ASYNCLAM_SEGMENTS`` keeps payloads out of segments.

    Raises:
        ValueError: it names no way that there is.
    """
    global _streamed
    if _streamed is None:
        _streamed = _wanted() == _STREAM
    return _streamed


def way() -> str:
    """The name of the way in which payloads travel here, found out by making a segment.

    Raises:
        OSError: no segment can be made now.
        ValueError: ``ASYNCLAM_SEGMENTS`` names no way that there is.
    """
    if are_payloads_streamed():
        return _STREAM
    os.close(create_segment(0))
    return next(name for name, make in _WAYS.items() if make is _chosen)


def _wanted() -> str:
    wanted = os.environ.get(VARIABLE, "")
    allowed = [*_WAYS, _STREAM]
    if wanted and wanted not in allowed:
        raise ValueError(
            f"{VARIABLE}={wanted} is none of {', '.join(allowed)}; "
            "unset it to use the first of them that works"
        )
    return wanted


def _first_that_works(nbytes: int) -> tuple[_Way, int]:
    """A way, and the segment that it made."""
    for way in _WAYS.values():
        try:
            return way, way(nbytes)
        except OSError as error:
            if error.errno not in _IMPOSSIBLE or way is _file:
                raise
    raise AssertionError(
        "the last way gives a descriptor or raises"
    )  # pragma: no cover - unreachable


# What says that the system, or its sandbox, lacks the call; other errors say what it ran out of.
_IMPOSSIBLE = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL)


def _memfd(nbytes: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, "this Python has no os.memfd_create")
    return _reserved(os.memfd_create("asynclam", os.MFD_CLOEXEC), nbytes, os.ftruncate)


def _syscall(nbytes: int) -> int:
    number = _SYSCALLS.get(os.uname().machine) if sys.platform == "linux" else None
    if number is None:
        raise OSError(errno.ENOSYS, "the number of the system call memfd_create is not known here")
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):
        raise OSError(errno.ENOSYS, "this Python has no ctypes") from None
    descriptor: int = libc.syscall(ctypes.c_long(number), b"asynclam", ctypes.c_uint(1))  # CLOEXEC
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"memfd_create: {os.strerror(code)}")
    return _reserved(descriptor, nbytes, os.ftruncate)


_SYSCALLS = {"x86_64": 319, "aarch64": 279}


def _file(nbytes: int) -> int:
    return _reserved(_nameless(os.environ.get("TMPDIR") or _TMP), nbytes, _fallocate)


_TMP = "/tmp"  # noqa: S108 - nothing in it gets a name


def _nameless(directory: str) -> int:
    try:
        # It never has a name, which a process that is killed just then would leave behind.
        return os.open(directory, os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (AttributeError, OSError):  # not every system has such files, nor every file system
        import tempfile

        descriptor, path = tempfile.mkstemp(prefix="asynclam-")
        os.unlink(path)
        return descriptor


def _fallocate(descriptor: int, nbytes: int) -> None:
    # A store into a sparse file on a full disk is SIGBUS; this is ENOSPC now instead.
    os.ftruncate(descriptor, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)


def _reserved(descriptor: int, nbytes: int, reserve: Callable[[int, int], None]) -> int:
    try:
        reserve(descriptor, nbytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


_Way = Callable[[int], int]
_WAYS: dict[str, _Way] = {"memfd": _memfd, "syscall": _syscall, "file": _file}
_chosen: _Way | None = None
_streamed: bool | None = None


# --- maps, and how they end ----------------------------------------------------------------------


class Map(mmap.mmap):
    """A mapping of a segment. Whoever looks into it, through however many views, keeps it alive."""

    __slots__ = ("companion",)

    companion: object  # what ends after the mapping has

    def __del__(self) -> None:
        if self.closed:  # it could not be made, and has no length
            return
        # This revives the object: the queue has a reference. Its second death is the thread's, and
        # runs no __del__ (PEP 442).
        if _dropped is not None and len(self) >= _LARGE:
            _drop(self)
        else:
            self.end()

    def end(self) -> None:
        """Unmaps it before its companion ends, which is dropped before what it is a slot of."""
        if hasattr(self, "companion"):
            try:
                self.close()
            except BufferError:
                pass  # garbage in a cycle with a view, which is cleared after this has run (PEP 442)


def map_descriptor(descriptor: int, nbytes: int) -> Map:
    """Maps the first ``nbytes`` of a segment, more than 0, writable. The descriptor stays the caller's.

    Until Python 3.12 the map holds a duplicate of the descriptor.

    Raises:
        OSError: no memory map, or no descriptor, is left.
    """
    if sys.version_info >= (3, 13):
        return Map(descriptor, nbytes, trackfd=False)  # pragma: no cover - a later Python
    return Map(descriptor, nbytes)


def map_segment(descriptor: int) -> memoryview:
    """All of a segment, which must not be empty, as writable shared memory.

    Raises:
        OSError: no memory map, or no descriptor, is left.
    """
    return memoryview(map_descriptor(descriptor, os.fstat(descriptor).st_size))


class _Closing:
    """A descriptor of a segment that nobody has mapped here. Its death closes it."""

    __slots__ = ("companion", "descriptor")

    def __init__(self, descriptor: int, companion: object) -> None:
        self.descriptor, self.companion = descriptor, companion

    def __del__(self) -> None:
        os.close(self.descriptor)


def drop_in_thread() -> None:
    """From here on, large mappings of this process, and memory that is not mapped, end in a thread."""
    global _dropped
    if _dropped is None:
        _dropped = deque()


def drop_in_place() -> None:
    """From here on, mappings of this process end where the last view of them is dropped."""
    global _dropped
    _dropped = None


_dropped: deque[object] | None = None  # what waits for the thread
_dropping = _thread.allocate_lock()  # held by the thread, as long as there is one


def _drop(what: object) -> None:
    """Lets something die in the thread. Safe in a finaliser, in which threading's own locks are not."""
    if _dropped is None:
        return
    _dropped.append(what)
    # Whoever gets the lock starts the thread; who does not leaves it to the thread that runs.
    if _dropping.acquire(blocking=False):
        try:
            _thread.start_new_thread(_drop_all, (_dropped,))
        except RuntimeError:  # no thread is to be had, or the interpreter ends
            _dropping.release()
            _dropped.clear()


def _drop_all(dropped: deque[object]) -> None:
    while True:
        while dropped:
            what = dropped.popleft()
            if isinstance(what, Map):
                what.end()  # without the GIL
            del what
        _dropping.release()
        # What came after the last look, before the release, has started no thread.
        if not dropped or not _dropping.acquire(blocking=False):
            return


def _forget() -> None:
    """What a forked process does not have of its parent's: the thread, and what its environment said."""
    global _dropping, _chosen, _streamed
    drop_in_place()
    _dropping = _thread.allocate_lock()
    _chosen = _streamed = None


os.register_at_fork(after_in_child=_forget)


# --- blank objects -------------------------------------------------------------------------------


def blank(kind: type[bytes | bytearray], nbytes: int) -> tuple[bytes | bytearray, memoryview]:
    """A new object of ``nbytes`` that nobody has written to, and the view with which to fill it.

    ``bytes(n)`` and ``bytearray(n)`` touch all of their memory before they return; this touches
    none, so that it can be filled slice by slice. Drop the view before the object is given away.

    Raises:
        ImportError: there is no ctypes.
        MemoryError: there is not so much memory.
    """
    import ctypes

    api = ctypes.pythonapi
    name = "Bytes" if kind is bytes else "ByteArray"
    create, address_of = api[f"Py{name}_FromStringAndSize"], api[f"Py{name}_AsString"]
    create.restype, create.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_ssize_t]
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object]
    new: bytes | bytearray = create(None, nbytes)
    address: int = address_of(new)
    if nbytes >= _OWN_MAPPING:
        _advise_huge_pages(address, nbytes)
    return new, memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


# Bytes: malloc gives what is at least so large (glibc's greatest M_MMAP_THRESHOLD) a mapping of its
# own. Advice on less would stay with the heap.
_OWN_MAPPING = 32 << 20


def _advise_huge_pages(address: int, nbytes: int) -> None:
    """Of 256 MiB: a quarter of the time to fill it, and 1 ms instead of 25 to free it."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    import ctypes

    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advise(start, length, mmap.MADV_HUGEPAGE)  # advice: a kernel without them may refuse


# --- SharedBuffer --------------------------------------------------------------------------------


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
        self._map: Map | None = None
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
        self._map = map_descriptor(self._descriptor, self._nbytes)
        return memoryview(self._map)

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("this SharedBuffer is closed")

    def close(self) -> None:
        """Lets go of the memory in this process; views taken from it stay valid until they are dropped.

        A process that was given the buffer keeps it. Closing twice does nothing.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            if self._map is None and self._nbytes >= _LARGE:
                _drop(_Closing(descriptor, self._companion()))  # it may free the memory
            else:
                os.close(descriptor)  # before the map is dropped, which does
        # Not mmap.close(): it fails while anything (an array, say) still looks into the map, and
        # dropping the references does the same as soon as nothing does.
        self._view = self._map = None

    def _companion(self) -> object:
        """What lives as long as the memory is held here."""
        return None

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
        return _receive, self._send()

    def _send(self) -> tuple[int, int]:
        """What its descriptor is among those of the payload that is being pickled, and its length."""
        if travel.outgoing is None:
            raise pickle.PicklingError(
                "a SharedBuffer is a descriptor and travels only to a worker and back: give it to "
                "run_cpu() as an argument, or return it; pickle bytes(buffer.view) to store it"
            )
        self._require_open()
        # A duplicate: the payload may wait for its turn while this buffer is closed by its owner
        # and the number is given to another file.
        travel.outgoing.append(os.dup(self._descriptor))
        return len(travel.outgoing) - 1, self._nbytes

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def mapped(buffer: SharedBuffer) -> memoryview | None:
    """All of a buffer, if this process has mapped it."""
    return buffer._view


def write_at(buffer: SharedBuffer, position: int, data: Buffer) -> None:
    """Writes into a buffer's memory, without a mapping: half the time, where it is fresh.

    The caller makes sure that it fits. (A store to a page that is not there takes a fault, which
    costs as much as to make the page; the system call makes the page and copies.)

    Raises:
        ValueError: the buffer is closed.
    """
    buffer._require_open()
    with memoryview(data) as view:
        written = 0
        while written < len(view):
            written += os.pwrite(buffer._descriptor, view[written:], position + written)


def read_at(buffer: SharedBuffer, position: int, into: memoryview) -> None:
    """Fills ``into`` with a buffer's bytes, without a mapping.

    Raises:
        ValueError: the buffer is closed.
        EOFError: it has not so many.
    """
    buffer._require_open()
    read = 0
    while read < len(into):
        more = os.preadv(buffer._descriptor, [into[read:]], position + read)
        if not more:
            raise EOFError(f"the buffer ends before byte {position + len(into):,}")
        read += more


def share_first(buffer: SharedBuffer, nbytes: int) -> SharedBuffer:
    """A buffer of the first ``nbytes`` of another's memory. Either may be closed first.

    Raises:
        ValueError: the other is closed.
        OSError: no descriptor is left (EMFILE).
    """
    view = buffer.view[:nbytes]
    shared = SharedBuffer.__new__(SharedBuffer)
    shared._adopt(os.dup(buffer._descriptor), nbytes)
    shared._view = view  # of the same mapping, whose pages are there
    return shared


def _receive(index: int, nbytes: int) -> SharedBuffer:
    if travel.incoming is None:
        raise pickle.UnpicklingError("a SharedBuffer cannot be unpickled without its descriptor")
    buffer = SharedBuffer.__new__(SharedBuffer)
    buffer._adopt(travel.incoming[index], nbytes)
    travel.incoming[index] = -1  # it is the buffer's now
    return buffer
