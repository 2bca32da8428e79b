"""Coroutine functions that the tests run in workers."""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import weakref
from pathlib import Path

from asynclam import SharedBuffer, remaining
from tests import jobs
from tests.logging_jobs import NAME, request
from tests.parts.gate import pass_through

_made: list[object] = []  # by the initializer


async def echo(value, *, after=0):
    await asyncio.sleep(after)
    return value


_filled = bytearray(300_000)  # bytes: more than go into a pickle, or into a frame


async def fill(number):
    """The same memory each time, with other contents."""
    _filled[:] = bytes([number]) * len(_filled)
    return _filled


class Watched:
    """Has weak references."""


async def watch(value):
    """Returns its argument, and tells how to see whether it is still there."""
    watched[:] = [weakref.ref(value)]
    return value


watched: list[weakref.ref] = []


async def a_generator():
    return (number for number in range(3))


async def pid(_=None):
    await asyncio.sleep(0)
    return os.getpid()


async def take(nbytes):
    """Keeps so much memory, written to, in its worker."""
    _made.append(b"1" * nbytes)
    return os.getpid()


async def loop_name():
    return type(asyncio.get_running_loop()).__module__.split(".")[0]


async def fail(error):
    await asyncio.sleep(0)
    raise error


async def fail_in_task(error):
    """And awaits the task, which has the error, though it has left the loop, too."""
    await asyncio.create_task(fail(error))


async def through(path, result=None):
    """Enters the gate, and waits on the loop to be let go."""
    with open(Path(path, "entered"), "wb", buffering=0) as entered:
        entered.write(struct.pack("<q", os.getpid()))
    leave = os.open(Path(path, "leave"), os.O_RDONLY | os.O_NONBLOCK)
    loop = asyncio.get_running_loop()
    left = loop.create_future()

    def look():
        try:
            os.read(leave, 1)
        except BlockingIOError:
            return  # another one had it
        loop.remove_reader(leave)
        left.set_result(None)

    loop.add_reader(leave, look)
    try:
        await left
    finally:
        loop.remove_reader(leave)
        os.close(leave)
    return result


async def note(path, value):
    """Appends a line that says that this has run to its end."""
    await asyncio.sleep(0)
    return jobs.note(path, value)


async def note_the_end(path, note):
    """The same; a cancel is noted, and goes on."""
    try:
        await through(path)
    except asyncio.CancelledError:
        with open(note, "w") as file:
            file.write("cancelled")
        raise


async def ignore_a_cancel(path):
    """The same; a cancel is ignored."""
    while True:
        try:
            return await through(path)
        except asyncio.CancelledError:
            continue


async def return_a_buffer():
    return SharedBuffer(1)


async def return_a_buffer_when_cancelled():
    try:
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        return SharedBuffer(1)


async def cancel_itself(result=None):
    """As the last that it does, so that no await raises it."""
    asyncio.current_task().cancel()
    return result


async def cancel_itself_with_a_buffer():
    return await cancel_itself(SharedBuffer(1))


async def hold_up(path):
    """Holds up the loop until the gate lets it go."""
    return pass_through(path)


async def make(value):
    await asyncio.sleep(0)
    _made.append((asyncio.get_running_loop(), value))


async def made():
    """What the initializer has made, and whether its loop is this one."""
    return [(loop is asyncio.get_running_loop(), value) for loop, value in _made]


def made_here():
    return [value for _, value in _made]


_background: list[asyncio.Task] = []


async def leave_a_task(value):
    _background.append(asyncio.ensure_future(echo(value)))


async def result_of_the_task():
    return await _background.pop()


async def cancel_all():
    for task in asyncio.all_tasks():
        task.cancel()


async def say(message, path):
    await through(path)
    logging.getLogger(NAME).warning(message)
    return request.get(), remaining()


async def carried():
    value = request.get("unset")
    request.set("changed")
    await asyncio.sleep(0)
    return value


async def run_a_loop(value):
    coroutine = echo(value)
    try:
        return asyncio.run(coroutine)  # refused: a loop is running
    finally:
        coroutine.close()


def run_own_loop(value):
    return asyncio.run(echo(value))


async def die(code):
    os._exit(code)


async def fork():
    child = os.fork()
    return child and _exit_code_of(child)


def _exit_code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
