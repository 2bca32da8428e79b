"""What the soak runs in workers. Each job marks on a page that it begins: none may begin twice."""

import mmap
import os
import resource
import signal
import struct
import sys
import zlib
from time import perf_counter, perf_counter_ns

from tests.parts.processes import leave_memory

MARK = struct.Struct("<3Q2I")  # how often it began; when first and last, in ns; who, first and last
_page = None


class OwnError(Exception):
    """What a job raises that is to fail."""


def initialize(path, address_space):
    """Maps the page of marks; bounds the memory of this worker, if it is to run out of it."""
    global _page
    with open(path, "r+b") as file:
        _page = mmap.mmap(file.fileno(), 0)
    if address_space:
        leave_memory(address_space)


def _begin(number):
    count, first, _, pid, _ = MARK.unpack_from(_page, number * MARK.size)
    now, me = perf_counter_ns(), os.getpid()
    MARK.pack_into(_page, number * MARK.size, count + 1, first or now, now, pid or me, me)


def echo(number, value=None):
    _begin(number)
    return number, value


async def wait(number, seconds):
    """A coroutine, beside others."""
    import asyncio

    _begin(number)
    await asyncio.sleep(seconds)
    return number


def spin(number, seconds):
    _begin(number)
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass
    return number


def fail(number):
    _begin(number)
    raise OwnError(number)


def leave(number):
    """Ends the worker, without a word."""
    _begin(number)
    os._exit(3)


def crash(number):
    """Ends the worker as a bug in a C extension does."""
    _begin(number)
    os.kill(os.getpid(), signal.SIGSEGV)


def check(number, data):
    """The checksum of what has arrived."""
    _begin(number)
    return number, zlib.crc32(data)


def blow(number, nbytes):
    """Many bytes out of nothing."""
    _begin(number)
    return number, pattern(number, nbytes)


def exhaust(number):
    """Asks for more memory than there is; where that is not bounded, says so."""
    _begin(number)
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        raise MemoryError("there is no bound")
    kept = []
    while True:
        kept.append(bytes(16 << 20))


def fill(number, buffer):
    """Writes into the caller's buffer."""
    _begin(number)
    buffer.view[:] = pattern(number, buffer.nbytes)
    buffer.close()
    return number


def make(number, nbytes):
    """A buffer, made here."""
    from asynclam import SharedBuffer

    _begin(number)
    buffer = SharedBuffer(nbytes)
    buffer.view[:] = pattern(number, nbytes)
    return buffer


def fork(number):
    """A child that returns, too, and is none of the loop process's business."""
    _begin(number)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return number


def chatter(number):
    """Prints, where nobody reads."""
    _begin(number)
    print("x" * 100, file=sys.stdout)
    return number


def pattern(number, nbytes):
    """Bytes that belong to this job."""
    unit = number.to_bytes(8, "little")
    return unit * (nbytes // 8) + unit[: nbytes % 8]
