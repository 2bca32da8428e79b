"""What runs out, and comes back: the executor says so, and goes on."""

import asyncio
import errno
import os
import resource
import signal

import pytest

from asynclam import Executor, PayloadError, SharedBuffer, WorkerStartError, _forkserver, _inline
from tests import coroutine_jobs, jobs
from tests.parts.gate import pass_through
from tests.parts.processes import stopped


@pytest.fixture
def descriptors():
    """Takes nearly all descriptors of a low limit; called again, gives them back."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []

    def toggle(left=0):
        if taken:
            while taken:
                os.close(taken.pop())
            return
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        for _ in range(left):
            os.close(taken.pop())

    yield toggle
    if taken:
        toggle()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("left", [0, 1, 5, 20])
async def test_no_descriptor_for_a_fork_server(descriptors, left):
    """A server that would inherit the shortage for good is not forked; the next job has one."""
    async with Executor(2, start_method="fork") as executor:
        descriptors(left)
        with pytest.raises(WorkerStartError, match="descriptors") as caught:
            await executor.run_cpu(jobs.echo, 1)
        assert caught.value.__cause__.errno == errno.EMFILE
        descriptors()
        assert await executor.run_cpu(jobs.echo, 2) == 2


_buffers: list[SharedBuffer] = []


def return_buffers():
    return _buffers


async def return_buffers_at_last():
    return _buffers


@pytest.fixture
def buffers():
    """Eight, which what returns them has already."""
    _buffers[:] = [SharedBuffer(1) for _ in range(8)]
    yield _buffers
    while _buffers:
        _buffers.pop().close()


@pytest.mark.parametrize("run", [Executor.run_cpu, Executor.run_async])
async def test_no_descriptor_inline(descriptors, buffers, run):
    """A result or argument that cannot be received here is lost as in a worker, and leaves nothing open."""
    is_plain = run is Executor.run_cpu
    returns = return_buffers if is_plain else return_buffers_at_last
    echo = (jobs if is_plain else coroutine_jobs).echo
    async with Executor(0) as executor:
        descriptors(12)
        for call in (run(executor, returns), run(executor, echo, buffers)):
            with pytest.raises(PayloadError, match="a SharedBuffer was lost"):
                await call
        descriptors()
        received = await run(executor, returns)
        assert len(received) == len(buffers)
        for buffer in received:
            buffer.close()


async def test_no_memory_inline(monkeypatch):
    """A coroutine whose reply cannot even be joined has that for its outcome."""

    def refuse(reply):
        raise MemoryError

    async with Executor(0) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(_inline, "_replied", refuse)
            with pytest.raises(MemoryError):
                await executor.run_async(coroutine_jobs.echo, 1)
        assert await executor.run_async(coroutine_jobs.echo, 2) == 2


def take_descriptors(then):
    """Keeps all that a low limit leaves to this worker."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    try:
        while True:
            jobs.keep(os.dup(0))
    except OSError:
        return then()


def a_large_result():
    return bytes(500_000)


def fail():
    raise KeyError("key")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("most", [None, 1 << 40], ids=["any memory", "limited memory"])
async def test_a_worker_at_its_limit(most, method):
    """What its job returns or raises is the outcome; who cannot tell what he has taken is replaced."""
    async with Executor(1, max_memory_per_child=most, start_method=method) as executor:
        first = await executor.run_cpu(jobs.pid)
        assert await executor.run_cpu(take_descriptors, a_large_result) == bytes(500_000)
        is_kept = most is None
        assert (await executor.run_cpu(jobs.pid) == first) == is_kept
        with pytest.raises(KeyError):
            await executor.run_cpu(take_descriptors, fail)
        now = executor.statistics()
    assert (now.worker_deaths, now.workers_grown) == (0, 0 if is_kept else 2)


async def test_a_stopped_worker_outlives_its_fork_server(gate):
    """The kernel hangs up on stopped children of a process that dies; a worker takes no notice."""
    async with Executor(1) as executor:
        job = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path, "done"))
        pid = await gate.entered()
        os.kill(pid, signal.SIGSTOP)
        await stopped(pid)
        (server,) = _forkserver._servers.values()
        os.kill(server.pid, signal.SIGKILL)
        gate.open()
        assert await job == "done"
        assert await executor.run_cpu(jobs.echo, 1) == 1
