"""Ctrl-C in the middle of a large transfer, and a loop that runs again after it."""

import asyncio
import os
import signal

import pytest

from asynclam import Executor, ExecutorClosedError, PayloadError, _segments
from tests import jobs
from tests.parts.gate import pass_through


def test_interrupted_while_a_payload_is_copied(monkeypatch):
    """Ctrl-C ends the loop; if that runs again, the job has its outcome all the same."""
    copy_in, interrupts, here = _segments.copy_in, [KeyboardInterrupt()], os.getpid()

    def interrupted(view, parts):
        yield
        if interrupts and os.getpid() == here:  # and not in the worker, which is forked
            raise interrupts.pop()
        yield from copy_in(view, parts)

    monkeypatch.setattr(_segments, "copy_in", interrupted)
    loop = asyncio.new_event_loop()
    executor = Executor(1)
    try:
        task = loop.create_task(executor.run_cpu(jobs.echo, bytes(1 << 20)))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        assert len(loop.run_until_complete(asyncio.wait_for(task, 5))) == 1 << 20
        loop.run_until_complete(executor.aclose())
    finally:
        executor.kill()
        loop.close()


def test_interrupted_while_a_result_is_unpickled():
    """The result is lost, and says so; a close does not wait for it."""
    loop = asyncio.new_event_loop()
    executor = Executor(1)
    try:
        task = loop.create_task(executor.run_cpu(interrupting, 100_000))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        with pytest.raises(PayloadError):
            loop.run_until_complete(task)
        loop.run_until_complete(asyncio.wait_for(executor.aclose(), 5))
    finally:
        executor.kill()
        loop.close()


def test_killed_by_a_signal_handler(gate, monkeypatch):
    """The loop that waits for the job, and is interrupted there, waits no longer."""

    def interrupted(timeout):
        if timeout is not None:
            return select(timeout)
        monkeypatch.undo()
        signal.raise_signal(signal.SIGUSR1)
        woken.append(bool(ready := select(0)))
        return ready

    async def use():
        task = asyncio.ensure_future(executor.run_cpu(pass_through, gate.path))
        await gate.entered()
        monkeypatch.setattr(selector, "select", interrupted)
        with pytest.raises(ExecutorClosedError):
            await task

    woken = []
    executor = Executor(1)
    handler = signal.signal(signal.SIGUSR1, lambda *_: executor.kill())
    loop = asyncio.new_event_loop()
    selector = loop._selector
    select = selector.select
    try:
        loop.run_until_complete(use())
    finally:
        signal.signal(signal.SIGUSR1, handler)
        loop.close()
    assert woken == [True]


class Interrupting:
    def __reduce__(self):
        return interrupt, ()


def interrupt():
    raise KeyboardInterrupt


def interrupting(count):
    return [[str(number) for number in range(count)], Interrupting()]
