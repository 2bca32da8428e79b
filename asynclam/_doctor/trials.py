"""What is tried. A trial returns what it has seen, or raises what stands in the way.

Each runs in a process of its own (:mod:`.ward`), so this is the one place that may import
multiprocessing: what that does to a process ends with it. The report begins with what people try in
Lambda, in the order in which they come upon it; what asynclam needs follows.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Trial:
    """Something to try.

    Attributes:
        name: what people call it.
        group: the heading that it stands under.
        attempt: tries it; returns what there is to say, raises what stands in the way.
        in_shm: what it keeps in ``/dev/shm``, and so fails without; "" if nothing.
    """

    name: str
    group: str
    attempt: Callable[[], str]
    in_shm: str = ""


# --- what people try -----------------------------------------------------------------------------


def _thread_pool_executor() -> str:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor:
        _expect_one(executor.submit(abs, -1).result())
    return "for blocking IO: threads of Python share one CPU"


def _process_pool_executor() -> str:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=_context()) as executor:
        _expect_one(executor.submit(abs, -1).result())
    return ""


def _pool() -> str:
    with _context().Pool(1) as pool:
        _expect_one(*pool.map(abs, [-1]))
    return ""


def _thread_pool() -> str:
    from multiprocessing.pool import ThreadPool

    with ThreadPool(1) as pool:
        _expect_one(*pool.map(abs, [-1]))
    return ""


def _queue() -> str:
    _context().Queue().close()
    return ""


def _shared_memory() -> str:
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=1)
    memory.close()
    memory.unlink()
    return ""


def _multiprocess() -> str:
    import multiprocess

    with multiprocess.get_context("fork").Pool(1) as pool:
        _expect_one(*pool.map(abs, [-1]))
    return ""


def _loky() -> str:
    import loky

    executor = loky.ProcessPoolExecutor(1)
    try:
        _expect_one(executor.submit(abs, -1).result())
    finally:
        executor.shutdown()
    return ""


def _process_and_pipe() -> str:
    ours, theirs = _context().Pipe()
    process = _context().Process(target=theirs.send, args=(1,))
    process.start()
    _expect_one(ours.recv())
    process.join()
    return "a fork for each task, and recv() blocks the event loop"


def _wait_on_connections() -> str:
    from multiprocessing.connection import wait

    ours, theirs = _context().Pipe()
    process = _context().Process(target=theirs.send, args=(1,))
    process.start()
    theirs.close()
    while ours not in wait([ours, process.sentinel]):
        pass  # pragma: no cover - if that it has ended is told before what it has sent
    _expect_one(ours.recv())
    process.join()
    return "blocks the event loop"


def _context() -> Any:
    import multiprocessing

    return multiprocessing.get_context("fork")  # by name: the default differs between versions


def _expect_one(*results: object) -> None:
    if results != (1,):
        raise ValueError(f"the result is {results!r} instead of 1")


# --- what asynclam does without ------------------------------------------------------------------


def _semaphore() -> str:
    _context().Lock()
    return ""


def _prctl() -> str:
    import ctypes

    get_name = 16
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(get_name, ctypes.create_string_buffer(16), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return ""


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return ""


def _signal_at_end_of_file() -> str:
    """Tells a reader by a signal of its choice that the other end of its pipe is gone."""
    import fcntl
    import signal

    read, write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    fcntl.fcntl(read, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(read, fcntl.F_SETSIG, signal.SIGUSR1)
    fcntl.fcntl(read, fcntl.F_SETFL, fcntl.fcntl(read, fcntl.F_GETFL) | os.O_ASYNC)
    os.close(write)
    signal.sigwait([signal.SIGUSR1])
    os.close(read)
    return ""


# --- what asynclam needs -------------------------------------------------------------------------


def _fork() -> str:
    pid = os.fork()
    if pid == 0:
        os._exit(0)  # pragma: no cover - in a frame that coverage has left
    os.waitpid(pid, 0)
    return ""


def _interpreter() -> str:
    import subprocess

    subprocess.run([sys.executable, "-S", "-c", ""], check=True, stdin=subprocess.DEVNULL)
    return sys.executable


def _descriptors() -> str:
    import socket

    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    socket.send_fds(ours, [b"\0"], [read])
    _, (received,), _, _ = socket.recv_fds(theirs, 1, 1)
    os.write(write, b"\1")
    _expect_one(*os.read(received, 1))
    return ""


def _segment(way: str) -> Callable[[], str]:
    def attempt() -> str:
        from asynclam import _memory

        descriptor = _memory._WAYS[way](_MEBIBYTE)
        _memory.map_descriptor(descriptor, _MEBIBYTE)[:1] = b"\1"
        return ""

    return attempt


def _tmp() -> str:
    import tempfile

    directory = tempfile.gettempdir()
    with tempfile.TemporaryFile() as file:
        file.write(b"\0")
    found = os.statvfs(directory)
    return f"{found.f_bavail * found.f_frsize // _MEBIBYTE:,} MiB free in {directory}"


def _open_files() -> str:
    return _limit("RLIMIT_NOFILE", 64)


def _processes() -> str:
    return _limit("RLIMIT_NPROC", 16)


def _limit(name: str, least: int) -> str:
    import resource

    soft, _ = resource.getrlimit(getattr(resource, name))
    if soft == resource.RLIM_INFINITY:
        return "no limit"
    if soft < least:
        raise OSError(errno.EAGAIN, f"no more than {soft}: asynclam wants {least} at least")
    return f"{soft:,}"


def _run_cpu() -> str:
    import time

    before = time.monotonic()
    worker = _job(os.getpid)
    milliseconds = 1000 * (time.monotonic() - before)
    if worker == os.getpid():
        return f"inline, as ASYNCLAM_MAX_WORKERS says: first result after {milliseconds:.0f} ms"
    return f"first result after {milliseconds:.0f} ms"


def _large_payload() -> str:
    from asynclam import _memory

    payload = bytes(8 * _MEBIBYTE)
    if _job(bytes, payload) != payload:
        raise ValueError("a payload has come back as another one")
    return f"by {_memory.way()}"


def _job(fn: Callable[..., Any], *args: object) -> Any:
    import asyncio

    from asynclam import Executor, _forkserver

    async def result() -> Any:
        async with Executor() as executor:
            return await executor.run_cpu(fn, *args)

    try:
        return asyncio.run(result())
    finally:
        _forkserver.stop()  # it leads a session of its own, and would end after the trial


_PEOPLE = "What people try"
_WITHOUT = "What asynclam does without"
_NEEDS = "What asynclam needs"
_WAYS = "One of these, for large payloads"
_ASYNCLAM = "asynclam itself"

_SEMAPHORE = "a semaphore"

TRIALS = (
    Trial("ThreadPoolExecutor", _PEOPLE, _thread_pool_executor),
    Trial("ProcessPoolExecutor", _PEOPLE, _process_pool_executor, in_shm=_SEMAPHORE),
    Trial("multiprocessing.Pool", _PEOPLE, _pool, in_shm=_SEMAPHORE),
    Trial("multiprocessing.pool.ThreadPool", _PEOPLE, _thread_pool, in_shm=_SEMAPHORE),
    Trial("multiprocessing.Queue", _PEOPLE, _queue, in_shm=_SEMAPHORE),
    Trial("SharedMemory", _PEOPLE, _shared_memory, in_shm="shared memory"),
    Trial("multiprocess.Pool", _PEOPLE, _multiprocess, in_shm=_SEMAPHORE),
    Trial("loky", _PEOPLE, _loky, in_shm=_SEMAPHORE),
    Trial("Process + Pipe", _PEOPLE, _process_and_pipe),
    Trial("wait on connections", _PEOPLE, _wait_on_connections),
    Trial("semaphore", _WITHOUT, _semaphore, in_shm=_SEMAPHORE),
    Trial("prctl", _WITHOUT, _prctl),
    Trial("pidfd_open", _WITHOUT, _pidfd),
    Trial("signal at a pipe's end", _WITHOUT, _signal_at_end_of_file),
    Trial("fork", _NEEDS, _fork),
    Trial("fresh interpreter", _NEEDS, _interpreter),
    Trial("SCM_RIGHTS", _NEEDS, _descriptors),
    Trial("temporary files", _NEEDS, _tmp),
    Trial("open descriptors", _NEEDS, _open_files),
    Trial("processes", _NEEDS, _processes),
    Trial("os.memfd_create", _WAYS, _segment("memfd")),
    Trial("memfd_create by ctypes", _WAYS, _segment("syscall")),
    Trial("unlinked file", _WAYS, _segment("file")),
    Trial("run_cpu", _ASYNCLAM, _run_cpu),
    Trial("large payload", _ASYNCLAM, _large_payload),
)


def in_turn(trials: Sequence[Trial]) -> list[tuple[int, Trial]]:
    """Trials with their places in the report, in the order in which to try them.

    asynclam comes first, and what people try comes last: it may hang, and take all the time.
    """
    return sorted(
        enumerate(trials),
        key=lambda placed: (placed[1].group != _ASYNCLAM, placed[1].group == _PEOPLE),
    )


# --- what an error means -------------------------------------------------------------------------

_NO_SHM = {
    errno.ENOSYS: "there is no /dev/shm to keep {} in, says a C library before glibc 2.34",
    errno.ENOENT: "there is no /dev/shm to keep {} in",
    errno.EACCES: "this user may not write to /dev/shm, where {} is kept",
    errno.EROFS: "the file system of /dev/shm, where {} is kept, is read-only",
}
_MEANINGS = {
    errno.EPERM: "the sandbox does not allow it to anybody without more privileges",
    errno.ENOSYS: "the kernel, or this build of Python, does not have it",
    errno.EACCES: "this user may not do that",
    errno.EROFS: "that file system is read-only",
    errno.ENOSPC: "that file system is full",
    errno.ENOMEM: "there is not enough memory",
    errno.EMFILE: "this process has as many open descriptors as it may have",
    errno.EAGAIN: "a limit is reached, or set too low",
}


def meaning(trial: Trial, error: BaseException) -> str:
    """What an error of a trial means to somebody who wants to use it; "" if nobody knows."""
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    if trial.in_shm and error.errno in _NO_SHM:
        return _NO_SHM[error.errno].format(trial.in_shm)
    return _MEANINGS.get(error.errno, "")
