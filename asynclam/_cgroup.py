"""The limits that control groups set for this process, in version 1 and 2 (cgroups(7)).

A group's limit holds for all below it, so the least one on the way up to the root of the mount
counts. In a container ``/proc/self/cgroup`` may name a path of the machine that the container
does not see; the root of its mount is its own group then. A hierarchy may have several mounts, of
parts of it: that counts which shows this process's group, and most of the way up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

_PROC = "/proc/self"


def cpu_quota(proc: str = _PROC) -> float | None:
    """How many CPUs' time this process may use; ``None``: as much as there is.

    Args:
        proc: the directory of a process in procfs.
    """
    quotas = []
    for directory in directories(proc, "cpu"):
        words = _read(directory, "cpu.max").split()  # "max 100000" or "50000 100000"
        if not words:
            words = [
                *_read(directory, "cpu.cfs_quota_us").split(),  # -1: none
                *_read(directory, "cpu.cfs_period_us").split(),
            ]
        if len(words) == 2 and words[0].isdecimal() and int(words[1]) > 0:  # noqa: PLR2004 - a pair
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit(proc: str = _PROC) -> int | None:
    """How many bytes of memory the group of this process may use; ``None``: no limit is known.

    Version 1 tells that there is none by a number near 2**63.

    Args:
        proc: the directory of a process in procfs.
    """
    limits = []
    for directory in directories(proc, "memory"):
        text = _read(directory, "memory.max") or _read(directory, "memory.limit_in_bytes")
        if text.strip().isdecimal():  # else "max"
            limits.append(int(text))
    return min(limits, default=None)


def directories(proc: str, controller: str) -> Iterator[str]:
    """The directory of this process's group for a controller, and those above it."""
    version, path = group(proc, controller)
    belows = {
        mount: _below(path, root)  # what is mounted over another mount is listed after it
        for root, mount in _mounts(proc, controller, version)
    }
    if belows:
        best = max(belows, key=lambda mount: len(belows[mount]))
        below = belows[best].strip("/")
        while below:
            yield os.path.join(best, below)
            below = os.path.dirname(below)
        yield best


def _below(path: str, root: str) -> str:
    """What leads from a root to a path, with a slash at both ends; empty if nothing does."""
    whole, start = f"{path.rstrip('/')}/", root.rstrip("/")
    below = whole[len(start) :] if whole.startswith(f"{start}/") else ""
    return "" if below.startswith("/../") else below  # it is not seen from this namespace


def group(proc: str, controller: str) -> tuple[int, str]:
    """The version of the hierarchy that has a controller, and this process's path in it."""
    unified = ""
    for line in _lines(proc, "cgroup"):
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return 1, path
        if number == "0":
            unified = path
    return 2, unified


def _mounts(proc: str, controller: str, version: int) -> Iterator[tuple[str, str]]:
    """The root and the mount point of each mount of a hierarchy (proc_pid_mountinfo(5))."""
    for line in _lines(proc, "mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if (kind == "cgroup" and version == 1 and controller in options.split(",")) or (
            kind == "cgroup2" and version != 1
        ):
            root, mount = before.split(" ")[3:5]
            yield _unescaped(root), _unescaped(mount)


def _unescaped(path: str) -> str:
    return path.encode("latin-1", "backslashreplace").decode("unicode_escape")  # a space is \040


def _lines(directory: str, name: str) -> list[str]:
    return _read(directory, name).split("\n")[:-1]  # no other character of a path ends a line


def _read(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), "rb", buffering=0) as file:
            return os.fsdecode(file.read())  # with paths in it, which may be any bytes
    except OSError:  # no procfs, no such controller: no limit is known
        return ""
