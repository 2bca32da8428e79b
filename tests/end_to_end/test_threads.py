"""Blocking functions in threads: their limit, and what a cancel leaves behind."""

import asyncio
import contextvars
import threading

import pytest

from asynclam import Executor, _threads, run_blocking
from tests import jobs

variable = contextvars.ContextVar("variable", default="unset")


async def test_result_and_exception():
    """A blocking function runs in another thread; its result or exception is its own."""
    assert await run_blocking(threading.get_ident) != threading.get_ident()
    with pytest.raises(KeyError):
        await run_blocking(jobs.raise_, KeyError("key"))


async def test_context():
    """Context variables are those of the caller."""
    variable.set("callers")
    assert await run_blocking(variable.get) == "callers"


async def test_a_coroutine_function_is_refused():
    """A coroutine function would return a coroutine that nobody awaits."""

    async def download():
        pass

    with pytest.raises(TypeError, match=r"await download\(\.\.\.\)"):
        await run_blocking(download)


async def test_limit(monkeypatch):
    """No more threads run at once than the limit; the others wait."""
    monkeypatch.setattr(_threads, "LIMIT", 2)
    executor = Executor(1)
    release, entered = threading.Event(), asyncio.Queue()
    loop = asyncio.get_running_loop()

    def block():
        loop.call_soon_threadsafe(entered.put_nowait, threading.get_ident())
        release.wait()

    tasks = [asyncio.ensure_future(executor.run_blocking(block)) for _ in range(4)]
    assert await entered.get() != await entered.get()
    for _ in range(20):
        await asyncio.sleep(0)
    assert (entered.qsize(), executor.statistics().threads_busy) == (0, 2)
    release.set()
    await asyncio.gather(*tasks)
    assert executor.statistics().threads_busy == 0


async def test_a_cancel_abandons_the_thread(monkeypatch):
    """A cancel returns at once; the thread counts against the limit until it ends, and is told of."""
    monkeypatch.setattr(_threads, "LIMIT", 1)
    executor = Executor(1)
    release, entered, ended = threading.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def block():
        loop.call_soon_threadsafe(entered.set)
        release.wait()
        loop.call_soon_threadsafe(loop.call_soon, ended.set)

    task = asyncio.ensure_future(executor.run_blocking(block))
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    now = executor.statistics()
    assert (now.threads_busy, now.threads_abandoned) == (1, 1)
    waiting = asyncio.ensure_future(executor.run_blocking(threading.get_ident))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    release.set()
    await waiting
    now = executor.statistics()
    assert (now.threads_busy, now.threads_abandoned) == (0, 0)


async def test_cancelling_before_the_thread_runs():
    """However early a call is cancelled, that is its outcome, and its slot is free again."""
    executor = Executor(1)
    for ticks in range(8 * (_threads.LIMIT + 1)):
        task = asyncio.ensure_future(executor.run_blocking(threading.get_ident))
        for _ in range(ticks % 8):
            await asyncio.sleep(0)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError | int)
    results = [executor.run_blocking(threading.get_ident) for _ in range(40)]
    await asyncio.gather(*results)
    while executor.statistics().threads_busy:
        await asyncio.sleep(0)
    assert executor.statistics().threads_abandoned == 0


@pytest.mark.parametrize("first", ["cancel", "release"])
async def test_cancelling_one_that_waits(first):
    """Its turn, if it has had it in that moment, is the next one's."""
    slots = _threads._Slots(1)
    await slots.acquire()
    tasks = [asyncio.ensure_future(slots.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    for step in (tasks[0].cancel, slots.release)[:: 1 if first == "cancel" else -1]:
        step()
    outcomes = await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, type(None)]
    await asyncio.sleep(0)
    assert not tasks[2].done()
    slots.release()
    await tasks[2]
    slots.release()
    await slots.acquire()


async def test_dropping_one_that_waits():
    """A call whose loop is closed under it gives back no slot that it has not had."""
    slots = _threads._Slots(1)
    await slots.acquire()
    waiting = slots.acquire()
    waiting.send(None)
    waiting.close()
    another = asyncio.ensure_future(slots.acquire())
    await asyncio.sleep(0)
    assert not another.done()
    slots.release()
    await another


def test_a_thread_outlives_its_loop():
    """A thread that ends after its loop has closed does no harm, and is counted out."""
    executor = Executor(1)
    release, entered = threading.Event(), threading.Event()
    threads = []

    def block():
        threads.append(threading.current_thread())
        entered.set()
        release.wait()

    async def abandon():
        task = asyncio.ensure_future(executor.run_blocking(block))
        while not entered.is_set():
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(abandon())
    assert executor.statistics().threads_abandoned == 1
    release.set()
    threads[0].join()
    assert executor.statistics().threads_busy == 0


async def test_a_thread_that_is_late(monkeypatch):
    """A call that was given up before its thread came to it is not run."""
    monkeypatch.setattr(_threads._Borrowing, "claim", lambda borrowing: False)
    ran = []
    assert await Executor(1).run_blocking(ran.append, 1) is None
    assert not ran
