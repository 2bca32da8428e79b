"""Jobs in this process (``max_workers=0``): what has no workers keeps the promises all the same."""

import asyncio
import sys
import types

import pytest

from asynclam import Executor, PayloadError, _call
from tests import coroutine_jobs, jobs
from tests.bad_jobs import Unreduces


def test_one_loop_after_the_other():
    """It serves each loop that asks, and has nothing under way when somebody can ask."""
    executor = Executor(0)
    assert asyncio.run(executor.run_cpu(jobs.echo, 1)) == 1
    assert asyncio.run(executor.run_cpu(jobs.echo, 2)) == 2
    assert executor.under_way() == ([], 0)
    asyncio.run(executor.aclose())


@pytest.fixture
def vanishing():
    """Functions that are known under a name as long as the module is, which it is not for long."""
    module = types.ModuleType("tests_vanishing_inline")
    sys.modules[module.__name__] = module
    exec("import threading\nlock = threading.Lock()", vars(module))
    exec("def fn(value):\n    return value\ndef locked(value):\n    return lock", vars(module))
    _call._head_of(module.fn, lambda: True, _call._references)
    _call._head_of(module.locked, lambda: True, _call._references)
    del sys.modules[module.__name__]
    yield module
    _call._references.clear()


async def test_a_function_that_is_known_under_no_name(vanishing):
    """It is run by value, as in a worker; where it cannot be, the error says why."""
    async with Executor(0) as executor:
        assert await executor.run_cpu(vanishing.fn, "value") == "value"
        with pytest.raises(PayloadError, match="cannot be sent by value"):
            await executor.run_cpu(vanishing.locked, "value")
        assert await executor.run_cpu(jobs.echo, "next") == "next"


async def test_a_coroutine_that_cannot_be_begun():
    """Arguments that do not unpickle fail it, as they do in a worker."""
    async with Executor(0) as executor:
        with pytest.raises(PayloadError):
            await executor.run_async(coroutine_jobs.echo, Unreduces("ValueError"))
        assert await executor.run_async(coroutine_jobs.echo, "next") == "next"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no task is eager")
def test_eager_tasks():
    """A coroutine that has ended before its task is known has its outcome all the same."""

    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with Executor(0) as executor:
            jobs = [executor.run_async(coroutine_jobs.fill, number) for number in range(3)]
            return [result[0] for result in await asyncio.gather(*jobs)]

    assert asyncio.run(main()) == [0, 1, 2]


async def test_cancelled_as_it_ends():
    """A cancel that is heard of after the end of the coroutine has nothing to cancel."""
    async with Executor(0) as executor:
        _waiting.append(asyncio.ensure_future(executor.run_async(end_and_cancel)))
        with pytest.raises(asyncio.CancelledError):
            await _waiting[0]
        _waiting.clear()
        now = executor.statistics()
        assert (now.jobs_running, now.jobs_cancelled) == (0, 0)


_waiting: list[asyncio.Task] = []


async def end_and_cancel():
    """Ends, and has its caller cancelled before he has heard of it."""
    asyncio.get_running_loop().call_soon(_waiting[0].cancel)


async def test_closed_by_two(gate):
    """Both wait for the last coroutine."""
    executor = Executor(0)
    task = asyncio.ensure_future(executor.run_async(coroutine_jobs.through, gate.path, "done"))
    await gate.entered()
    closes = [asyncio.ensure_future(executor.aclose()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not any(close.done() for close in closes)
    gate.open()
    await asyncio.gather(*closes)
    assert await task == "done"


def test_killed_when_the_loop_is_closed(gate):
    """What was under way is failed; a loop that is closed cancels nothing."""
    executor, loop = Executor(0), asyncio.new_event_loop()
    task = loop.create_task(executor.run_async(coroutine_jobs.through, gate.path))
    loop.run_until_complete(gate.entered())
    others = asyncio.all_tasks(loop)
    loop.close()
    executor.kill()
    for other in others:
        other._log_destroy_pending = False  # as it is for whoever closes a loop under its tasks
    assert not task.done()
