"""Several of everything: loops, threads, executors, in turn and at once, and executors in workers."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvloop

import asynclam
from asynclam import Executor, ExecutorClosedError, SharedBuffer, _call, _default, run_cpu
from tests import coroutine_jobs, jobs
from tests.parts.everything import WAYS
from tests.parts.gate import pass_through
from tests.parts.processes import ended

ROOT = Path(asynclam.__file__).parent.parent

both_loops = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])


async def in_thread(new_loop, coroutine):
    """What a coroutine returns or raises on a loop in another thread, whose calls that loop checks."""

    def run():
        loop = new_loop()
        loop.set_debug(True)
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.close()

    return await asyncio.to_thread(run)


@pytest.mark.parametrize("way", WAYS)
def test_a_program(way):
    """Each says nothing but that it is done, in development mode, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-m", "tests.parts.everything", way],
        capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
    )  # fmt: skip
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_pytest_asyncio(tmp_path):
    """With a loop for each test, the default executor serves all of them, with the same workers."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from asynclam import run_cpu\n"
        "from tests import jobs\n"
        "pids = set()\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "async def test_it(number):\n"
        "    pids.add(await run_cpu(jobs.pid))\n"
        "    assert len(pids) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider",
         "-o", "asyncio_mode=auto",
         "-o", "asyncio_default_fixture_loop_scope=function", "--rootdir", tmp_path, tmp_path],
        capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "4 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_the_default_executor_is_made_once(monkeypatch):
    """A thread that asks while another is making it gets the same one."""
    asked = threading.Event()
    lock, made, found = threading.Lock(), [], []

    class Making:
        def __enter__(self):
            if lock.locked():
                asked.set()
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    class Slow(Executor):
        def __init__(self):
            super().__init__(1)
            made.append(self)
            if len(made) == 1:
                thread.start()
                asked.wait()
            asked.set()

    thread = threading.Thread(target=lambda: found.append(_default.default_executor()))
    monkeypatch.setattr(_default, "_making", Making())
    monkeypatch.setattr(_default, "Executor", Slow)
    found.append(_default.default_executor())
    thread.join()
    assert len(made) == 1
    assert found == made * 2


async def test_executors_are_strangers(gate):
    """One that is killed, and workers that die, harm no job of another one on the same loop."""
    async with Executor(1) as kept:
        running = asyncio.ensure_future(kept.run_cpu(pass_through, gate.path, "unharmed"))
        await gate.entered()
        other = Executor(1)
        task = asyncio.ensure_future(other.run_cpu(jobs.spin, 1000))
        await asyncio.sleep(0)
        other.kill()
        with pytest.raises(asynclam.ExecutorClosedError):
            await task
        async with Executor(1) as third:
            with pytest.raises(asynclam.WorkerDiedError):
                await third.run_cpu(jobs.hard_exit, 1)
        gate.open()
        assert await running == "unharmed"


def use_here(path):
    """In a worker: an executor of its own, whose worker enters the gate."""
    return asyncio.run(run_cpu(pass_through, path, os.getpid()))


async def test_an_executor_in_a_worker(gate):
    """A job may have workers of its own; they are those of the worker's own fork server."""
    async with Executor(1) as executor:
        task = asyncio.ensure_future(executor.run_cpu(use_here, gate.path))
        inner = await gate.entered()
        gate.open()
        outer = await task
        assert len({inner, outer, os.getpid()}) == 3


async def test_the_workers_of_a_worker_end_with_it(gate):
    """A worker that is killed leaves no fork server of its own, nor the workers of that."""
    async with Executor(1) as executor:
        task = asyncio.ensure_future(executor.run_cpu(use_here, gate.path))
        inner = await gate.entered()
        server = parent_of(inner)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await ended(inner)
        await ended(server)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_loop_that_is_closed_with_a_job_running(gate):
    """Its worker lives until the executor has another loop, or is dropped."""

    async def submit(executor):
        executor._pool_here().submit(_call.Call(pass_through, (gate.path,), {}))
        return await gate.entered()

    executor = Executor(1)
    loop = asyncio.new_event_loop()
    pid = loop.run_until_complete(submit(executor))
    loop.close()
    assert Path(f"/proc/{pid}").exists()
    del executor
    gc.collect()
    asyncio.run(ended(pid))


async def test_closing_an_executor_that_another_loop_uses(gate):
    """Its workers there are killed; what was under way there says so."""
    executor = Executor(1)
    failed = []

    async def elsewhere():
        try:
            await executor.run_cpu(pass_through, gate.path)
        except ExecutorClosedError as error:
            failed.append(error)

    thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
    thread.start()
    pid = await gate.entered()
    await executor.aclose()
    await asyncio.to_thread(thread.join)
    assert len(failed) == 1
    await ended(pid)


@both_loops
async def test_killing_an_executor_that_another_loop_uses(gate, new_loop):
    """What was under way there fails in its own thread, whose loop would wait for it."""
    executor = Executor(1)
    job = executor.run_cpu(pass_through, gate.path)
    there = asyncio.ensure_future(in_thread(new_loop, job))
    pid = await gate.entered()
    executor.kill()
    with pytest.raises(ExecutorClosedError):
        await there
    await ended(pid)


@pytest.mark.parametrize("max_workers", [0, 1])
async def test_killed_elsewhere_before_there_is_a_pool(monkeypatch, max_workers):
    """The first call of a loop, which has found the executor open, starts no worker after that."""

    def pool_of(loop, new):
        thread = threading.Thread(target=executor.kill)
        thread.start()
        thread.join()
        return of(loop, new)

    executor = Executor(max_workers)
    of = executor._pools.of
    monkeypatch.setattr(executor._pools, "of", pool_of)
    with pytest.raises(ExecutorClosedError):
        await executor.run_cpu(pytest.fail)


@both_loops
async def test_killing_while_another_loop_is_busy(gate, new_loop):
    """The worker there ends at once; the job is told so in the loop's next turn, and nothing else."""
    busy, go_on = threading.Event(), threading.Event()

    def keep_busy():
        busy.set()
        go_on.wait()

    executor = Executor(1)
    job = executor.options(retries=1).run_cpu(pass_through, gate.path)
    there = asyncio.ensure_future(in_thread(new_loop, job))
    pid = await gate.entered()
    (pool,) = executor._pools
    pool.loop.call_soon_threadsafe(keep_busy)
    await asyncio.to_thread(busy.wait)
    executor.kill()
    await ended(pid)
    go_on.set()
    with pytest.raises(ExecutorClosedError):
        await there


@both_loops
async def test_killing_coroutines_of_another_loop(gate, new_loop):
    """Inline they are tasks of that loop, and are cancelled in its thread."""
    executor = Executor(0)
    job = executor.run_async(coroutine_jobs.through, gate.path)
    there = asyncio.ensure_future(in_thread(new_loop, job))
    await gate.entered()
    executor.kill()
    with pytest.raises(ExecutorClosedError):
        await there


@both_loops
def test_killed_for_a_loop_that_is_closed_before_its_turn(new_loop):
    """Nothing of the pool is left there, though the loop calls nobody any more."""
    executor = Executor(1)
    loop = new_loop()
    pid = loop.run_until_complete(executor.run_cpu(jobs.pid))
    (pool,) = executor._pools
    asyncio.run(executor.aclose())
    loop.close()
    assert pool.alive == 0
    asyncio.run(ended(pid))


@both_loops
@pytest.mark.parametrize("max_workers", [0, 1])
@pytest.mark.parametrize("is_first", [False, True])
async def test_closing_while_another_loop_pickles(new_loop, max_workers, is_first):
    """The call there is refused, and the descriptors that it would have sent are closed."""
    pickling, closed = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self):
            pickling.set()
            closed.wait()
            return int, ()

    async def elsewhere():
        if not is_first:
            await executor.run_cpu(len, ())
        with SharedBuffer(4096) as buffer:
            arguments = [buffer, Slow(), *map(str, range(100_000))]
            with pytest.raises(ExecutorClosedError):
                await executor.run_cpu(len, arguments)

    executor = Executor(max_workers)
    there = asyncio.ensure_future(in_thread(new_loop, elsewhere()))
    await asyncio.to_thread(pickling.wait)
    await executor.aclose()
    closed.set()
    await there


async def test_dropped_at_the_end_of_the_interpreter(monkeypatch):
    """An executor that is dropped then touches nothing: what it would need may be gone."""
    executor = Executor(1)
    pid = await executor.run_cpu(jobs.pid)
    (pool,) = executor._pools
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    del executor
    gc.collect()
    monkeypatch.undo()
    await asyncio.sleep(0)
    assert pool.alive == 1
    pool.kill()
    await ended(pid)


def test_no_executor():
    """The default executor is one."""
    with pytest.raises(TypeError, match="takes an Executor, got int"):
        _default.set_default_executor(2)
