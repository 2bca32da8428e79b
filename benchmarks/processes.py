"""What the processes of a block use, seen from outside, in /proc.

Not by parentage: a fork server's workers, or what has been orphaned, would be missed. A block's
processes have its mark in the environment with which they, or those they were forked from, started.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import IO

MARK = "ASYNCLAM_BENCHMARK_BLOCK"
_PACE = 0.002  # seconds between two samples of memory
_TICK = 0.001  # seconds
_TICKS = os.sysconf("SC_CLK_TCK")


def marked() -> Iterator[int]:
    """The processes of this process's block, this one among them."""
    mark = f"{MARK}={os.environ[MARK]}\0".encode()
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes():
                yield pid
        except OSError:  # another user's, or it has ended
            continue


def cpu_seconds(*others: int) -> float:
    """CPU time that the block's processes and ``others`` have used, threads and the kernel included."""
    return sum(map(cpu_seconds_of, {*marked(), *others}))


def cpu_seconds_of(pid: int) -> float:
    """That of one process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS  # with children that it has waited for


def private_bytes() -> int:
    """Resident memory of this process that it shares with nobody's file: the heap, mostly."""
    resident, shared = Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def pin(pid: int, cpu: int) -> None:
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {cpu})


class Watch:
    """The other end of a process that measures all the time."""

    def __init__(self, asking: IO[str], answering: IO[str]) -> None:
        self._asking, self._answering = asking, answering

    def ask(self) -> tuple[float, ...]:
        """The highest of each of its figures since the last question."""
        self._asking.write("\n")
        self._asking.flush()
        return tuple(map(float, self._answering.readline().split()))


def peak_watch() -> AbstractContextManager[Watch]:
    """Of the PSS of this block's processes, added up, and of the system's Shmem, in bytes."""
    return _watch("memory", os.environ[MARK])


def bystander() -> AbstractContextManager[Watch]:
    """Of the seconds for which a process did not run that wants to each millisecond."""
    return _watch("gaps")


@contextmanager
def _watch(*arguments: str) -> Generator[Watch]:
    unmarked = {name: value for name, value in os.environ.items() if name != MARK}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.processes", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=unmarked,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Watch(process.stdin, process.stdout)
        process.kill()


# --- in that process -------------------------------------------------------------------------------


def answer(pace: float, measure: Callable[[], tuple[float, ...]]) -> None:
    """Measures until the end of stdin, and answers each line with the highest since the last one."""
    highest = measure()
    while True:
        asked = select.select([0], [], [], pace)[0]
        highest = tuple(map(max, highest, measure()))
        if asked:
            if not os.read(0, 1):
                return
            print(*highest, flush=True)
            highest = tuple(0.0 for _ in highest)


def _memory() -> tuple[float, ...]:
    return sum(map(_pss, marked())), _shmem()


def _gaps() -> Callable[[], tuple[float, ...]]:
    last = perf_counter()

    def since_the_last() -> tuple[float, ...]:
        nonlocal last
        before, last = last, perf_counter()
        return (last - before,)

    return since_the_last


def _pss(pid: int) -> int:
    try:
        return _kilobytes(f"/proc/{pid}/smaps_rollup", "Pss:")
    except OSError:  # it has ended
        return 0


def _shmem() -> int:
    # Pages of a memfd that nobody has mapped are in nobody's PSS. The kernel counts them by processor,
    # and what it tells is off by up to 32 pages each until that is added up, which only root may have
    # done (sysctl/vm, stat_refresh).
    with suppress(PermissionError), open("/proc/sys/vm/stat_refresh", "rb") as refresh:
        refresh.read()
    return _kilobytes("/proc/meminfo", "Shmem:")


def _kilobytes(path: str, name: str) -> int:
    with open(path, encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        os.environ[MARK] = sys.argv[2]
        answer(_PACE, _memory)
    else:
        answer(_TICK, _gaps())
