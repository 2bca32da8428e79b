"""What tests ask of processes."""

from __future__ import annotations

import asyncio
import os
import resource


async def ended(pid: int) -> None:
    """Waits until a process is gone or a zombie that init has not reaped."""
    while state_of(pid) not in {"Z", ""}:
        await asyncio.sleep(0)


async def stopped(pid: int) -> None:
    """Waits until a process that was sent SIGSTOP has been scheduled, and has stopped."""
    while state_of(pid) != "T":
        await asyncio.sleep(0)


def state_of(pid: int) -> str:
    """One letter, as in proc(5); empty where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int) -> list[int]:
    """Those of all its threads; none if it has ended."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    found: list[int] = []
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
        except OSError:  # it has ended meanwhile
            continue
    return found


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    return [found for child in children(pid) for found in [child, *descendants(child)]]


def in_child(call, *args):
    """The exit status of a forked process that calls something which may never return."""
    pid = os.fork()
    if not pid:
        try:
            call(*args)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def leave_memory(nbytes: int) -> None:
    """From here on this process has so much address space more than it takes now, and no more."""
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (taken + nbytes, hard))
