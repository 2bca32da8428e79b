"""What the processes of a block use, seen from outside, in /proc.

Not by parentage: a fork server's workers, or what has been orphaned, would be missed. A block's
processes have its mark in the environment with which they, or those they were forked from, started.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import IO

MARK = "ASYNCLAM_BENCHMARK_BLOCK"
_PACE = 0.002  # seconds between two samples
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


class Asked:
    """The other end of a process that measures all the time, and tells when it is asked."""

    def __init__(self, asking: IO[str], answering: IO[str]) -> None:
        self._asking, self._answering = asking, answering

    def ask(self) -> list[str]:
        self._asking.write("\n")
        self._asking.flush()
        return self._answering.readline().split()


class PeakWatch:
    """What adds up the memory of this block's processes."""

    def __init__(self, process: Asked) -> None:
        self._process = process

    def ask(self) -> tuple[int, int]:
        """The highest PSS sum and system-wide Shmem since the last question, in bytes."""
        pss, shmem = self._process.ask()
        return int(pss), int(shmem)


class Bystander:
    """What only wants to run every millisecond, and so tells how busy the machine is."""

    def __init__(self, process: Asked) -> None:
        self._process = process

    def ask(self) -> float:
        """The longest time that it did not run since the last question, in seconds."""
        (longest,) = self._process.ask()
        return float(longest)


@contextmanager
def peak_watch() -> Generator[PeakWatch]:
    with _asked("watch", os.environ[MARK]) as process:
        yield PeakWatch(process)


@contextmanager
def bystander() -> Generator[Bystander]:
    with _asked("stand_by") as process:
        yield Bystander(process)


@contextmanager
def _asked(*arguments: str) -> Generator[Asked]:
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
        yield Asked(process.stdin, process.stdout)
        process.kill()


def stand_by() -> None:
    """Ticks until the end of stdin, and answers each line with the longest gap since the last one."""
    last, longest = perf_counter(), 0.0
    while True:
        asked = bool(select.select([0], [], [], 0.001)[0])
        now = perf_counter()
        last, longest = now, max(longest, now - last)
        if asked:
            if not os.read(0, 1):
                return
            print(longest, flush=True)
            longest = 0.0


def watch() -> None:
    """Samples until the end of stdin, and answers each line with the peaks since the last one."""
    while True:
        pss, shmem = 0, 0
        while not select.select([0], [], [], _PACE)[0]:
            pss, shmem = max(pss, sum(map(_pss, marked()))), max(shmem, _shmem())
        if not os.read(0, 1):
            return
        pss, shmem = max(pss, sum(map(_pss, marked()))), max(shmem, _shmem())
        print(pss, shmem, flush=True)


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
    if sys.argv[1] == "watch":
        os.environ[MARK] = sys.argv[2]
        watch()
    else:
        stand_by()
