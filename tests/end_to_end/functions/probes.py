"""Looks at the machine that it runs on. As a program it prints what it has seen as JSON."""

import concurrent.futures
import ctypes
import json
import multiprocessing
import multiprocessing.pool
import os
import resource
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_FORK = multiprocessing.get_context("fork")


def machine() -> dict[str, Any]:
    """What the kernel shows to this process."""
    tmp = os.listdir("/tmp")  # before a probe puts something there
    return {
        "dev": {entry.name: _kind(entry) for entry in os.scandir("/dev")},
        "tmp": tmp,
        "tmp_bytes": (found := os.statvfs("/tmp")).f_blocks * found.f_frsize,
        "cgroup": os.path.lexists("/sys/fs/cgroup"),
        "uids": os.getresuid(),
        "gids": os.getresgid(),
        "groups": os.getgroups(),
        "home": os.path.lexists(os.path.expanduser("~")),
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE),
        "processes": resource.getrlimit(resource.RLIMIT_NPROC),
        "cpus": [len(os.sched_getaffinity(0)), os.cpu_count()],
        "status": _status("CapPrm", "CapEff", "CapBnd", "NoNewPrivs"),
        "prctl": {_prctl(option) for option in range(1, 70)},
        "write": {path: _errno(partial(_write, path)) for path in _PLACES},
    }


_PLACES = (".", "/", "/etc", "/var/tmp", "/dev", "/tmp")


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return os.readlink(entry.path)
    found = entry.stat()
    if not stat.S_ISCHR(found.st_mode):
        return stat.filemode(found.st_mode)
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def _status(*names: str) -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1], 16) for line in lines if line[0][:-1] in names}


def _prctl(option: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.prctl(option, 0, 0, 0, 0) == -1 else 0


def _write(directory: str) -> None:
    path = Path(directory, "written-by-a-probe")
    path.touch()
    path.unlink()


def _errno(attempt: Callable[[], object]) -> int | None:
    """The errno of the OSError with which the attempt fails; None if it succeeds."""
    try:
        attempt()
    except OSError as error:
        return error.errno
    return None


def libraries() -> dict[str, Any]:
    """How those that create semaphores fail (None: they work), and what a bare pipe brings."""
    attempts = (_lock, _executor, _pool, _thread_pool, _multiprocess, _loky)
    failures = {attempt.__name__.strip("_"): _errno(attempt) for attempt in attempts}
    return {"failures": failures, "pipe": _pipe()}


def _lock() -> None:
    _FORK.Lock()


def _executor() -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=_FORK) as executor:
        executor.submit(abs, -1).result()


def _pool() -> None:
    with _FORK.Pool(1) as pool:
        pool.map(abs, [-1])


def _thread_pool() -> None:
    with multiprocessing.pool.ThreadPool(1) as pool:
        pool.map(abs, [-1])


def _multiprocess() -> None:
    import multiprocess

    with multiprocess.get_context("fork").Pool(1) as pool:
        pool.map(abs, [-1])


def _loky() -> None:
    import loky

    executor = loky.ProcessPoolExecutor(1)
    try:
        executor.submit(abs, -1).result()
    finally:
        executor.shutdown()


def _pipe() -> Any:
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=theirs.send, args=("sent by a child",))
    process.start()
    received = ours.recv()
    process.join()
    return received


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](), default=list))
