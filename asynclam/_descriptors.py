"""Descriptors: received beside bytes, kept out of forked children, replaced in our own.

Python objects that a child inherits still own the numbers of their descriptors: a finaliser that
runs late would close whatever has been opened under that number since. So an inherited descriptor
is never closed but overwritten with ``/dev/null`` by ``dup2``: its number stays taken and harmless.
"""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import Iterable, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._wire import Part

_STANDARD = (0, 1, 2)

_private: set[int] = set()


def private(descriptor: int) -> int:
    """Marks a descriptor as one that a process forked by other code must not keep; returns it.

    A sibling that holds a copy of a channel delays its end of file by as long as it lives.
    """
    _private.add(descriptor)
    return descriptor


def unmark(descriptor: int) -> None:
    """Takes the mark off, before the descriptor is closed and its number given to another file."""
    _private.discard(descriptor)


def replace(descriptors: Iterable[int]) -> None:
    """Overwrites descriptors with ``/dev/null``, so that their numbers stay taken."""
    descriptors = list(descriptors)
    null = _open_null(descriptors)
    try:
        for descriptor in descriptors:
            if descriptor != null:
                _overwrite(descriptor, null)
    finally:
        if null not in descriptors:
            os.close(null)


def _open_null(spare: Sequence[int]) -> int:
    try:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EMFILE or not spare:
            raise
        # One of those to be overwritten makes room, and gets its number back: no other is free.
        os.close(spare[0])
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _overwrite(descriptor: int, null: int) -> None:
    try:
        os.dup2(null, descriptor, inheritable=descriptor in _STANDARD)
    except OSError:  # EBADF above a limit that was lowered: nobody can be given that number again
        os.close(descriptor)


def replace_inherited(keep: Iterable[int]) -> None:
    """Overwrites every open descriptor but 1, 2 and those to ``keep``."""
    kept = {*_STANDARD[1:], *keep}
    replace([descriptor for descriptor in open_descriptors() if descriptor not in kept])
    _private.clear()


def open_descriptors() -> list[int]:
    """The numbers of the descriptors that this process has open, in order."""
    listed = sorted(int(name) for name in os.listdir(_LISTING))
    return [descriptor for descriptor in listed if _is_open(descriptor)]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False  # the one with which the directory was listed
    return True


# Lambda has no /dev/fd (a link that distributions make), macOS has no /proc.
_LISTING = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


def receive(
    sock: socket.socket, buffer: memoryview, flags: int = 0
) -> tuple[int, Sequence[int], bool]:
    """Receives bytes and the descriptors beside them; plain ``recv`` would discard those silently.

    Returns:
        How many bytes (0 at end of file), the descriptors (closed by exec), and whether the
        kernel dropped some of them because this process may open no more (MSG_CTRUNC).

    Raises:
        OSError: what recvmsg(2) raises.
    """
    nbytes, ancillary, got, _ = sock.recvmsg_into((buffer,), _ANCILLARY, flags | _CLOEXEC)
    truncated = bool(got & _TRUNCATED)
    if not ancillary:
        return nbytes, (), truncated
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if not _CLOEXEC:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
    return nbytes, descriptors.tolist(), truncated


_ANCILLARY = socket.CMSG_SPACE(253 * array.array("i").itemsize)  # SCM_MAX_FD of them
# As plain integers: IntFlag arithmetic costs 5 µs a message.
_CLOEXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))  # not on macOS
_TRUNCATED = int(socket.MSG_CTRUNC)


def send(
    sock: socket.socket, parts: Sequence[Part], descriptors: Sequence[int], flags: int = 0
) -> int:
    """Sends as much of ``parts`` as there is room for, the descriptors with the first byte of it.

    Raises:
        OSError: what sendmsg(2) raises; EPIPE as an error, never as a signal.
    """
    if not descriptors and len(parts) == 1:
        return sock.send(parts[0], flags | NOSIGNAL)
    ancillary = (
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        if descriptors
        else ()
    )
    return sock.sendmsg(parts[:_MOST_BUFFERS], ancillary, flags | NOSIGNAL)


_MOST_BUFFERS = 1024  # of one send: IOV_MAX
NOSIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))  # not on macOS, where Python ignores SIGPIPE


def _replace_private_in_child() -> None:
    if _private:
        replace(_private)
        _private.clear()


os.register_at_fork(after_in_child=_replace_private_in_child)
