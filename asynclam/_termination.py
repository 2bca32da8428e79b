"""SIGTERM that comes while the main thread waits in C: a thread hears it.

Theory of operation. Python runs the handler of a signal between two instructions of the main thread.
The runtime client of Python 3.10 and 3.11 waits for the next event in C, in the main thread: there the
handler would run when an event comes, and SIGKILL comes earlier. But the part of it that is in C runs
at once, and writes the number of the signal to a descriptor (signal.set_wakeup_fd).

That is the writing end of a pipe, which belongs to the main thread: it puts it in place and closes it.
It never blocks: what finds no room is not needed, since only the first SIGTERM counts. The thread owns
the reading end, blocks in read(2) there, and ends with the end of file. A loop that runs in the main
thread may put a descriptor of its own in place: it restores this one, and meanwhile the handler is
heard. Who leaves the lifespan, the handler or this thread, is decided by the lock that an invocation
holds, too; nobody waits for this thread, which may be waiting for that lock.

A forked child has the handler, and the descriptor: there it is /dev/null (:mod:`._descriptors`), else
a SIGTERM of the child's would end its parent.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from . import _descriptors


class Watch:
    """Has a function called in a thread whenever SIGTERM comes, until it is ended.

    To be made, and ended, in the main thread, when SIGTERM has a handler.
    """

    def __init__(self, hear: Callable[[], None]) -> None:
        self._hear = hear
        self._reader, self._writer = map(_descriptors.private, os.pipe())
        os.set_blocking(self._writer, False)
        before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if before != -1:  # somebody else listens already: he stays
            signal.set_wakeup_fd(before)
        threading.Thread(target=self._listen, name="asynclam SIGTERM", daemon=True).start()

    def end(self) -> None:
        """Gives the descriptor back; the thread ends a moment later."""
        before = signal.set_wakeup_fd(-1)
        if before != self._writer:
            signal.set_wakeup_fd(before)
        _descriptors.unmark(self._writer)
        os.close(self._writer)

    def _listen(self) -> None:
        while received := os.read(self._reader, 64):
            if signal.SIGTERM in received:
                self._hear()
        _descriptors.unmark(self._reader)
        os.close(self._reader)
