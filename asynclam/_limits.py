"""What a worker may take of the machine: threads for arithmetic, and memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

_COMMON = "OMP_NUM_THREADS"  # what all of them but Numba read, too, if their own is not set
_OWN = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
_NUMERIC = ("numpy", "scipy", "torch")  # have such a library loaded once they are imported

_threads = 0  # what the libraries of this process were told; 0: nothing


def thread_variables(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """What makes numeric libraries start no more than ``threads``; empty if the user has said.

    N workers would start N times as many threads as there are CPUs. A variable of the user's is
    left alone, and ``OMP_NUM_THREADS`` stands for all of them.
    """
    if _COMMON in environment:
        return {}
    return {name: str(threads) for name in (_COMMON, *_OWN) if name not in environment}


def are_threads_chosen(environment: Mapping[str, str]) -> bool:
    """Whether the user has said how many threads numeric libraries start."""
    return any(name in environment for name in (_COMMON, *_OWN))


def limit_threads(threads: int) -> None:
    """Tells numeric libraries that have been loaded, and have not read the variables, the same.

    With threadpoolctl, where it is installed. 0 does nothing.
    """
    global _threads
    if threads in {0, _threads}:
        return
    _threads = threads
    if prepare():
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)  # holds until it is told otherwise


def prepare() -> bool:
    """Loads what :func:`limit_threads` needs; whether it has something to do, and can."""
    if not any(name in sys.modules for name in _NUMERIC):
        return False
    try:
        import threadpoolctl  # noqa: F401 - 9 ms: once in the fork server, not in each worker
    except Exception:  # not installed, or broken: the variables still hold for what is loaded later
        return False
    return True


class Growth:
    """Whether this process has taken more memory than it may, since this object was made.

    What a worker has inherited does not count: it is there only once, however often a worker writes
    to it; nor does shared memory. In Linux, this is *resident* less *shared* of proc_pid_statm(5),
    and what it was at the fork is subtracted.
    """

    def __init__(self, most: int) -> None:
        self._most = most // os.sysconf("SC_PAGE_SIZE") + _anonymous_pages()

    def is_over(self) -> bool:
        """Whether it has, now, or cannot tell. Takes 6 µs."""
        try:
            return _anonymous_pages() > self._most
        except OSError:  # no descriptor is left, which the next job would miss, too
            return True


def can_measure() -> bool:
    """Whether the memory of a process can be told here."""
    return os.path.exists(_STATM)


_STATM = "/proc/self/statm"


def _anonymous_pages() -> int:
    descriptor = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fields = os.read(descriptor, 256).split()
    finally:
        os.close(descriptor)
    return int(fields[1]) - int(fields[2])
