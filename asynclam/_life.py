"""A process whose life depends on another's: it is killed when that ends, whatever it is doing.

Theory of operation. End of file tells an idle process that its peer is gone; one that is in the
middle of a C call, or stopped, reads nothing. ``prctl(PR_SET_PDEATHSIG)`` would do, and is forbidden
in Lambda. So the process that others depend on keeps the write end of a pipe for each, a *life pipe*,
and nobody else has it: it is closed by exec, and overwritten in what other code forks. The one that
depends has the read end, with ``O_ASYNC``: when the last write end is closed, by :meth:`Life.end` or by
the kernel because its owner is dead, the kernel signals the owner of the read end (``F_SETOWN``),
with SIGKILL (``F_SETSIG``). That takes a millisecond, reaches stopped processes, and cannot hit the
wrong one: the kernel holds the process, not its number.

The owner belongs to the open file description, so one pipe for all would not do. Nothing is ever
written. Without ``F_SETSIG`` (macOS) or where it is forbidden, ends of file have to suffice.
"""

from __future__ import annotations

import os
import select
import signal

from . import _descriptors


class Life:
    """A life pipe: the end that is kept, and until it is handed over, the one for who depends on it.

    Attributes:
        given: the end to hand over; -1 once that is done.

    Raises:
        OSError: no descriptor is left.
    """

    __slots__ = ("_kept", "given")

    def __init__(self) -> None:
        self._kept = -1
        self.given, self._kept = os.pipe()
        _descriptors.private(self._kept)

    def handed_over(self) -> None:
        """Lets go of the other end; doing so twice does nothing."""
        if self.given >= 0:
            os.close(self.given)
            self.given = -1

    def end(self) -> None:
        """Kills who depends on it, if that lives; doing so twice does nothing, in whatever threads."""
        kept, self._kept = self._kept, -1  # without a call in it, at which threads may change
        if kept >= 0:
            _descriptors.unmark(kept)
            os.close(kept)

    def __del__(self) -> None:
        self.end()


def depend_on(theirs: int, *, group: bool = False) -> bool:
    """From here on this process is killed when the other end is closed; at once if it is already.

    Args:
        theirs: the read end; this process's from here on.
        group: whether its process group, which it leads, is killed with it.

    Returns:
        Whether the kernel has agreed.
    """
    _descriptors.private(theirs)
    try:
        _kill_at_end(theirs, os.getpid())
        if group:
            # An owner each, as a job may leave the group: so another open file description.
            again = os.open(f"/proc/self/fd/{theirs}", os.O_RDONLY | os.O_CLOEXEC)
            _kill_at_end(_descriptors.private(again), -os.getpgrp())
    except (ImportError, AttributeError, OSError):
        return False
    _die_if_ended(theirs)
    return True


def _kill_at_end(descriptor: int, owner: int) -> None:
    import fcntl  # with asyncio it is loaded already

    fcntl.fcntl(descriptor, fcntl.F_SETOWN, owner)
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC)


def _die_if_ended(descriptor: int) -> None:
    # What ended before O_ASYNC was set was not signalled.
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLHUP is always told
    if poll.poll(0):
        os._exit(1)
