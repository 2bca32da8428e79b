"""What a job costs, counted: calls of the kernel, copies and callbacks instead of times."""

import asyncio
import os
import socket

import numpy as np
import pytest

from asynclam import Executor, SharedBuffer, _memory
from tests import jobs

pytestmark = pytest.mark.alone

MIB = 1 << 20
WAY = os.environ.get("ASYNCLAM_SEGMENTS", "")
_CALLS = ("send", "sendall", "sendmsg", "recv", "recv_into", "recvmsg", "recvmsg_into")


class Spy:
    """Counts calls, by the name of what is called."""

    def __init__(self, monkeypatch):
        self.calls = {}
        self._monkeypatch = monkeypatch

    def watch(self, thing, *names):
        for name in names:
            self._monkeypatch.setattr(thing, name, self._counting(name, getattr(thing, name)))

    def _counting(self, name, call):
        def counted(*args, **kwargs):
            self.calls[name] = self.calls.get(name, 0) + 1
            return call(*args, **kwargs)

        return counted


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


async def test_calls_in_the_loop_process(spy):
    """A small job is one send and one receive; the loop waits once, and polls once to go on."""
    async with Executor(1) as executor:
        for number in range(3):
            await executor.run_cpu(jobs.echo, number)
        spy.watch(socket.socket, *_CALLS)
        selector = getattr(asyncio.get_running_loop(), "_selector", None)  # uvloop has none
        if selector is not None:
            spy.watch(selector, "select", "register", "modify", "unregister")
        for number in range(100):
            await executor.run_cpu(jobs.echo, number)
        calls = dict(spy.calls)
    selects = {} if selector is None else {"select": 200}
    assert calls == {"send": 100, "recvmsg_into": 100, **selects}


async def test_calls_in_the_worker():
    """A small job is one receive and one send."""
    async with Executor(1, initializer=jobs.count_calls) as executor:
        before = await executor.run_cpu(jobs.calls)
        for number in range(100):
            await executor.run_cpu(jobs.echo, number)
        after = await executor.run_cpu(jobs.calls)
    assert {name: after[name] - before.get(name, 0) for name in after} == {
        "sendall": 101,
        "recvmsg_into": 101,
    }


@pytest.mark.skipif(WAY == "stream", reason="about segments, and payloads are in frames")
async def test_calls_for_a_large_payload(spy):
    """A large payload takes no more calls than a small one, once there are segments for it."""
    array = np.ones(4 * MIB, dtype=np.uint8)
    async with Executor(1) as executor:
        # Two segments take turns, or three: a result is held until the task has gone on.
        held = [await executor.run_cpu(jobs.echo, array) for _ in range(4)]
        del held
        spy.watch(socket.socket, *_CALLS)
        spy.watch(_memory, "create_segment", "map_descriptor")
        for _ in range(20):
            await executor.run_cpu(jobs.echo, array)
        calls = dict(spy.calls)
    assert calls.pop("send", 0) + calls.pop("sendmsg", 0) == 20
    assert calls == {"recvmsg_into": 20}


async def test_a_shared_buffer_is_not_copied():
    """However large it is, a buffer goes to a worker and back without a copy, or being touched."""
    nbytes = 128 * MIB if WAY == "file" else 1024 * MIB  # blocks of a file are reserved
    async with Executor(1) as executor:
        with SharedBuffer(nbytes) as buffer:
            await executor.run_cpu(jobs.touch, buffer)
            before = jobs.memory(), await executor.run_cpu(jobs.memory)
            for _ in range(3):
                await executor.run_cpu(jobs.touch, buffer)
                (await executor.run_cpu(jobs.echo, buffer)).close()
            after = jobs.memory(), await executor.run_cpu(jobs.memory, buffer)
            assert [buffer.view[n] for n in (0, nbytes // 2, nbytes - 1)] == [7, 7, 7]
    for (_, least), (_, most) in zip(before, after, strict=True):
        assert most - least < 16 * MIB


@pytest.mark.skipif(WAY == "stream", reason="about segments, and payloads are in frames")
async def test_an_array_is_copied_once():
    """An array that a job has looks into the segment: the worker has no memory of its own for it."""
    array = np.ones(64 * MIB, dtype=np.uint8)
    async with Executor(1) as executor:
        private, _ = await executor.run_cpu(jobs.memory, np.ones(MIB))
        here, _ = jobs.memory()
        most, everything = await executor.run_cpu(jobs.touched_memory, array)
        assert most - private < 16 * MIB
        assert everything - most > 64 * MIB
        assert jobs.memory()[0] - here < 16 * MIB, "it is not pickled either"
        result = await executor.run_cpu(jobs.ones, 64 * MIB)
        assert jobs.memory()[0] - here < 16 * MIB
        assert result.sum() == 64 * MIB
