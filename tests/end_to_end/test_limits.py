"""Limits of workers: how many jobs they run, how much memory they take, how many threads they start."""

import asyncio
import json
import os
import subprocess
import sys

import pytest

from asynclam import Executor, _limits, _sizing
from tests import jobs

MIB = 1 << 20


async def test_max_tasks_per_child():
    """A worker runs so many jobs, then another one does; none is lost, none runs twice."""
    async with Executor(1, max_tasks_per_child=3) as executor:
        pids = [await executor.run_cpu(jobs.pid) for _ in range(9)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]
        now = executor.statistics()
        assert (now.workers_spent, now.worker_deaths) == (3, 0)


async def test_max_tasks_with_many_jobs_at_once():
    """The same holds for jobs that share channels, and for the chunks of a map."""
    async with Executor(2, max_tasks_per_child=7) as executor:
        pids = await asyncio.gather(*(executor.run_cpu(jobs.pid) for _ in range(200)))
        assert max(pids.count(pid) for pid in set(pids)) <= 7
        chunks = await executor.map_cpu(pid_of, range(100), chunksize=5)
        assert chunks.count(chunks[0]) <= 7 * 5
        assert executor.statistics().worker_deaths == 0


def pid_of(_):
    return os.getpid()


async def test_max_memory_per_child():
    """A worker that keeps more than it may is replaced after that job; the others stay."""
    async with Executor(1, max_memory_per_child=32 * MIB) as executor:
        first = await executor.run_cpu(jobs.pid)
        await executor.run_cpu(keep_bytes, MIB)
        assert await executor.run_cpu(jobs.pid) == first
        assert await executor.run_cpu(keep_bytes, 64 * MIB) == first
        assert await executor.run_cpu(jobs.pid) != first
        now = executor.statistics()
        assert (now.workers_grown, now.worker_deaths, now.jobs_completed) == (1, 0, 5)


def keep_bytes(nbytes):
    jobs.keep(bytearray(b"x") * nbytes)
    return os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_inherited_memory_does_not_count(method):
    """What a worker has from its fork is there once, whoever writes to it."""
    heap = bytearray(b"x") * (64 * MIB)
    async with Executor(1, max_memory_per_child=32 * MIB, start_method=method) as executor:
        pids = {await executor.run_cpu(jobs.pid) for _ in range(3)}
    assert len(pids) == 1
    del heap


@pytest.mark.skipif(
    os.environ.get("ASYNCLAM_SEGMENTS") == "stream", reason="about segments; payloads are in frames"
)
async def test_shared_memory_does_not_count():
    """What travels in shared memory is not the worker's."""
    import numpy as np

    array = np.ones(64 * MIB, dtype=np.uint8)
    async with Executor(1, max_memory_per_child=32 * MIB) as executor:
        await executor.run_cpu(numpy_is_here)  # its import is the worker's
        first = await executor.run_cpu(jobs.pid)
        assert await executor.run_cpu(jobs.type_name, array) == "ndarray"
        assert await executor.run_cpu(jobs.pid) == first


def numpy_is_here():
    import numpy as np

    return np.__name__


@pytest.mark.parametrize("name", ["max_tasks_per_child", "max_memory_per_child"])
def test_limits_that_make_no_sense(name):
    """A limit is an integer, and at least 1."""
    with pytest.raises(TypeError, match=f"{name} is an integer or None"):
        Executor(1, **{name: 1.5})
    with pytest.raises(TypeError, match=f"{name} is an integer or None"):
        Executor(1, **{name: True})
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        Executor(1, **{name: 0})


def test_memory_that_cannot_be_measured(monkeypatch):
    """Where there is no /proc, the limit is refused, and says what to do instead."""
    monkeypatch.setattr(_limits, "_STATM", "/no/such/file")
    with pytest.raises(ValueError, match="max_tasks_per_child does not"):
        Executor(1, max_memory_per_child=MIB)


# --- threads -------------------------------------------------------------------------------------


def threads_of_blas():
    """What the libraries of this process would start, once one has worked."""
    import numpy as np
    import threadpoolctl

    np.ones((64, 64)) @ np.ones((64, 64))
    return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]


PROGRAM = """
import asyncio, json, os, sys
sys.path.insert(0, sys.argv[1])
{before}
from asynclam import Executor
from tests.end_to_end.test_limits import threads_of_blas
from asynclam import _sizing

_sizing.usable_cpus = lambda: 8
_sizing.cpu_share = lambda: None
_sizing.processes = lambda: 1

async def main():
    async with Executor({workers}, start_method={method!r}) as executor:
        print(json.dumps(await executor.run_cpu(threads_of_blas)))

if __name__ == "__main__":
    asyncio.run(main())
"""


def threads(workers, method, before="", **variables):
    """The numbers of threads in a worker of a fresh program, on eight CPUs."""
    environment = {key: value for key, value in os.environ.items() if "_THREADS" not in key}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    program = PROGRAM.format(before=before, workers=workers, method=method)
    done = subprocess.run(
        [sys.executable, "-c", program, root],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(("workers", "expected"), [(16, 1), (3, 2)])
def test_threads_of_numeric_libraries(method, workers, expected):
    """All workers together start about as many threads as there are CPUs."""
    most = os.cpu_count() or 1  # OpenBLAS starts no more, whatever it is told
    assert threads(workers, method) == {min(expected, most)}


async def test_threads_heed_what_workers_heed(monkeypatch):
    """Quotas, and other processes that share the CPUs, leave less for threads, too."""
    monkeypatch.setattr(_sizing, "usable_cpus", lambda: 64)
    monkeypatch.setattr(_sizing, "cpu_share", lambda: 8.0)
    monkeypatch.setattr(_sizing, "processes", lambda: 2)
    monkeypatch.delenv("ASYNCLAM_MAX_WORKERS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for workers, threads in ((None, "1"), (2, "2")):
        async with Executor(workers) as executor:
            assert await executor.run_cpu(os.getenv, "OMP_NUM_THREADS") == threads


def test_a_library_that_was_loaded_before_the_fork():
    """It has read the variables already: threadpoolctl tells it."""
    assert threads(8, "fork", before="import numpy") == {1}


@pytest.mark.parametrize("before", ["", "import numpy"])
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_what_the_user_has_said_holds(before, name):
    """A variable that is set is left alone, before the fork and after it."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one CPU makes one thread, whatever is said")
    assert threads(8, "fork", before, **{name: "2"}) == {2}


async def test_an_initializer_has_the_last_word():
    """What an initializer sets is not changed again."""
    async with Executor(2, initializer=set_variable) as executor:
        assert await executor.run_cpu(os.getenv, "OMP_NUM_THREADS") == "5"


def set_variable():
    os.environ["OMP_NUM_THREADS"] = "5"
