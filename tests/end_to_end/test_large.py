"""Large arguments and results in real workers: what arrives, what is used again, what is interrupted."""

import array
import asyncio
import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import uvloop

from asynclam import (
    Executor,
    ExecutorClosedError,
    PayloadError,
    SharedBuffer,
    WorkerDiedError,
    _call,
    _memory,
)
from tests import jobs

MIB = 1 << 20
STREAMED = os.environ.get("ASYNCLAM_SEGMENTS") == "stream"
not_streamed = pytest.mark.skipif(STREAMED, reason="about segments, and payloads are in frames")


@pytest.fixture(params=[1, 0], ids=["worker", "inline"])
async def executor(request):
    """One worker at most, so that jobs meet what earlier ones have left."""
    async with Executor(request.param, start_method="fork") as executor:
        yield executor


@pytest.fixture
async def one_worker():
    async with Executor(1, start_method="fork") as executor:
        yield executor


def worker_of(executor):
    (worker,) = executor._pool._workers.values()
    return worker


# --- what arrives --------------------------------------------------------------------------------


def counted(count):
    return np.arange(count, dtype=np.int64)


def read_only():
    array = counted(200_000)
    array.flags.writeable = False
    return array


ARRAYS = {
    "matrix": lambda: counted(1_000_000).reshape(1000, 1000),
    "fortran": lambda: np.asfortranarray(counted(1_000_000).reshape(500, 2000)),
    "strided": lambda: counted(1_000_000)[::3],
    "transposed": lambda: counted(1_000_000).reshape(500, 2000).T,
    "structured": lambda: np.zeros(100_000, dtype=[("a", "i4"), ("b", "f8")]),
    "bool": lambda: counted(1_000_000) % 3 == 0,
    "of objects": lambda: np.array([{"a": number} for number in range(50_000)]),
}


async def test_arrays(executor):
    """An array arrives as it is, and comes back so; both sides may write to theirs, alone."""
    for name, make in ARRAYS.items():
        sent = make()
        before = sent.copy()
        kind, back = await executor.run_cpu(jobs.describe, sent)
        assert kind == "ndarray", name
        assert type(back) is np.ndarray, name
        assert (back.dtype, back.shape) == (sent.dtype, sent.shape), name
        assert back.flags.f_contiguous == sent.flags.f_contiguous or name == "strided", name
        assert np.array_equal(back, sent), name
        assert back.flags.writeable, name
        back[0] = back[1]
        assert np.array_equal(sent, before), name


async def test_a_job_writes_into_its_argument(executor):
    """A job may change an array that it was given; the caller's own stays as it was."""
    sent = counted(500_000)
    assert np.array_equal(await executor.run_cpu(jobs.halve, sent), counted(500_000) // 2)
    assert np.array_equal(sent, counted(500_000))


async def test_a_read_only_array(executor):
    """An array that may not be written to stays so on its way."""
    back = await executor.run_cpu(jobs.echo, read_only())
    assert np.array_equal(back, counted(200_000))
    assert not back.flags.writeable


BYTES = {
    "bytes": lambda: os.urandom(3 * MIB),
    "bytearray": lambda: bytearray(os.urandom(3 * MIB)),
    "str": lambda: "aü€" * MIB,
    "array": lambda: array.array("d", range(300_000)),
    "bytes above the limit of a slice": lambda: os.urandom(MIB + 1),
    "bytes that just need a segment": lambda: os.urandom(128 * 1024),
}


async def test_bytes(executor):
    """Bytes and their like come back equal, and of their own type."""
    for name, make in BYTES.items():
        sent = make()
        kind, back = await executor.run_cpu(jobs.describe, sent)
        assert kind == type(sent).__name__, name
        assert type(back) is type(sent), name
        assert back == sent, name


async def test_a_bytearray_can_grow(executor):
    """A bytearray is one in every respect: it can be changed, and change its length."""
    sent = bytearray(2 * MIB)
    back = await executor.run_cpu(jobs.echo, sent)
    back[0] = 1
    back += b"more"
    assert (len(back), len(sent), sent[0]) == (2 * MIB + 4, 2 * MIB, 0)


async def test_a_memoryview(executor):
    """A memoryview arrives as bytes."""
    content = os.urandom(2 * MIB)
    assert await executor.run_cpu(jobs.echo, memoryview(content)) == content
    assert await executor.run_cpu(jobs.type_name, memoryview(content)) == "bytes"


def records(count):
    return [{"id": number, "name": f"name {number}", "tags": (number,)} for number in range(count)]


def shared_and_cyclic():
    leaf = ["shared"]
    tree = {number: [leaf, number] for number in range(30_000)}
    tree["self"] = tree
    return tree


GRAPHS = {
    "records": lambda: records(35_000),
    "dict": lambda: {f"key {number}": {number} for number in range(50_000)},
    "ordered dict": lambda: OrderedDict((number, [number]) for number in range(50_000)),
    "set": lambda: set(map(str, range(100_000))),
    "frozenset": lambda: frozenset(map(str, range(100_000))),
    "tuple": lambda: tuple((number, str(number)) for number in range(50_000)),
    "nested": lambda: [[[number] * 10 for number in range(100)] for _ in range(100)],
    "with bytes": lambda: {"records": records(9_000), "blob": os.urandom(MIB), "n": counted(99_999)},
}  # fmt: skip


def is_equal(one, other):
    if isinstance(one, dict) and "n" in one:
        return np.array_equal(one.pop("n"), other.pop("n")) and one == other
    return one == other


async def test_graphs(executor):
    """A graph of 100,000 objects comes back equal, and of the same types."""
    for name, make in GRAPHS.items():
        sent = make()
        kind, back = await executor.run_cpu(jobs.describe, sent)
        assert kind == type(sent).__name__, name
        assert type(back) is type(sent), name
        assert is_equal(back, sent), name


async def test_identity(executor):
    """What is shared or refers to itself in a large graph does so on the other side."""
    back = await executor.run_cpu(jobs.echo, shared_and_cyclic())
    assert back["self"] is back
    assert len({id(back[number][0]) for number in range(30_000)}) == 1
    blob = os.urandom(MIB)
    one, two, other = await executor.run_cpu(jobs.echo, [blob, blob, bytearray(blob)])
    assert one is two
    assert one == other == blob


async def test_workers_of_a_fresh_interpreter():
    """Large payloads do not depend on what a worker has inherited."""
    async with Executor(2, start_method="spawn") as executor:
        array, blob, graph = counted(500_000), os.urandom(MIB), records(10_000)
        back = await asyncio.gather(
            *(executor.run_cpu(jobs.echo, value) for value in (array, blob, graph))
        )
    assert np.array_equal(back[0], array)
    assert back[1:] == [blob, graph]


async def test_keyword_arguments(executor):
    """Large arguments by keyword arrive as well as the others."""
    one, two = counted(100_000), os.urandom(MIB)
    assert np.array_equal(await executor.run_cpu(jobs.add, one, b=one), one * 2)
    assert await executor.run_cpu(jobs.add, two, b=two) == two * 2


@pytest.mark.parametrize("chunksize", [None, 1, 3])
async def test_a_map_of_large_items(executor, chunksize):
    """Large items of a map come back complete and in order, however many make a chunk."""
    items = [np.full(100_000, number) for number in range(12)]
    results = await executor.map_cpu(jobs.halve, items, chunksize=chunksize)
    assert [int(result.max()) for result in results] == [number // 2 for number in range(12)]
    blobs = [bytes([number]) * 300_000 for number in range(12)]
    assert await executor.map_cpu(jobs.echo, blobs, chunksize=chunksize) == blobs


async def test_results_grow_large(executor):
    """Small items may have large results."""
    results = await executor.map_cpu(jobs.blank_bytes, [number * MIB for number in range(6)])
    assert results == [bytes(number * MIB) for number in range(6)]


async def test_shared_buffers_beside_large_arrays(executor):
    """Descriptors and segments travel in the same frame, in both directions."""
    content = np.frombuffer(os.urandom(MIB), dtype=np.uint8)
    with SharedBuffer(MIB) as buffer:
        for _ in range(3):
            back, echoed = await executor.run_cpu(jobs.fill_from, buffer, content)
            with back:
                assert bytes(buffer.view) == bytes(back.view) == content.tobytes()
                assert np.array_equal(echoed, content)
            content = content[::-1].copy()


async def test_what_goes_by_value(executor):
    """A lambda takes large arguments, and a closure holds them."""
    held, blob = counted(500_000), os.urandom(MIB)
    assert np.array_equal(await executor.run_cpu(lambda given: given + held, held), held * 2)
    assert await executor.run_cpu(lambda: blob) == blob
    graph = records(20_000)
    assert await executor.run_cpu(lambda given: given == graph, graph)


async def test_an_exception_with_a_large_array(executor):
    """What an exception carries comes along, however large."""
    with pytest.raises(ValueError) as caught:
        await executor.run_cpu(jobs.raise_, ValueError("too large", counted(500_000)))
    assert caught.value.args[0] == "too large"
    assert np.array_equal(caught.value.args[1], counted(500_000))
    assert await executor.run_cpu(jobs.echo, 1) == 1


@pytest.mark.parametrize("kind", [list, dict, set])
async def test_a_graph_that_changes_meanwhile(executor, kind):
    """A container that another task changes while it is pickled is an error that says so."""
    graph = kind((number, str(number)) for number in range(50_000))
    job = asyncio.ensure_future(executor.run_cpu(len, graph))
    await asyncio.sleep(0)
    assert not job.done()
    for number in range(-1000, 0):
        if kind is dict:
            graph[number] = ""
        else:
            (graph.append if kind is list else graph.add)((number, ""))
    with pytest.raises(PayloadError, match=f"len cannot be sent: a {kind.__name__} changed"):
        await job
    assert await executor.run_cpu(len, graph) == 51_000


# --- what is used again --------------------------------------------------------------------------


async def test_segments_are_used_again(one_worker):
    """Echoes in a row take two segments, whatever their number, and both processes map just these."""
    await one_worker.run_cpu(jobs.echo, counted(1))  # imports what it needs
    before = jobs.mapped_segments(), await one_worker.run_cpu(jobs.mapped_segments)
    for number in range(60):
        assert (await one_worker.run_cpu(jobs.echo, np.full(200_000, number)) == number).all()
    after = jobs.mapped_segments(), await one_worker.run_cpu(jobs.mapped_segments)
    # Two each way, at most: the one that was released is told of with the next frame.
    assert [most - least for least, most in zip(before, after, strict=True)] == (
        [0, 0] if STREAMED else pytest.approx([3, 3], abs=1)
    )
    if not STREAMED:
        ends = worker_of(one_worker).segments
        assert len(ends.outgoing) == ends.outgoing._last <= 2
        assert len(ends.incoming) <= 2


async def test_growing_payloads(one_worker):
    """Segments of all sizes make way for each other: no more than sixteen are kept each way."""
    before = jobs.mapped_segments(), await one_worker.run_cpu(jobs.mapped_segments)
    for nbytes in range(200_000, 8_000_000, 200_000):
        content = np.full(nbytes, nbytes % 251, dtype=np.uint8)
        assert np.array_equal(await one_worker.run_cpu(jobs.echo, content), content)
    there = await one_worker.run_cpu(jobs.mapped_segments)
    with _memory._dropping:  # the thread in which large maps end
        after = jobs.mapped_segments(), there
    # And one or two more, that were given away for what did not fit beside those in use.
    assert [most - least <= 34 for least, most in zip(before, after, strict=True)] == [True] * 2


async def test_results_that_are_kept(executor):
    """A result that is kept alive does not change with the jobs that follow."""
    kept = [await executor.run_cpu(jobs.echo, np.full(100_000, number)) for number in range(50)]
    views = [result[10:20] for result in kept[:10]]
    assert [result.min() == number == result.max() for number, result in enumerate(kept)] == [
        True
    ] * 50
    del kept
    for number in range(20):
        await executor.run_cpu(jobs.echo, np.full(100_000, -number))
    assert [view.tolist() for view in views] == [[number] * 10 for number in range(10)]


async def test_an_argument_that_is_kept_in_the_worker(executor):
    """What a worker's globals keep of its arguments does not change with the jobs that follow."""
    first = len(await executor.run_cpu(jobs.kept))
    for number in range(5):
        await executor.run_cpu(jobs.keep, np.full(100_000, number))
        await executor.run_cpu(jobs.echo, np.full(100_000, -1))
    kept = (await executor.run_cpu(jobs.kept))[first:]
    assert [(array.min(), array.max()) for array in kept] == [(n, n) for n in range(5)]
    jobs._kept.clear()  # of this process, where jobs run inline


def test_many_results_and_few_descriptors(tmp_path):
    """300 results of 1 MiB can be kept at a limit of 256 open descriptors."""
    code = (
        "import asyncio, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "import numpy as np\n"
        "from asynclam import Executor\n"
        "from tests import jobs\n"
        "async def main():\n"
        "    async with Executor(2) as executor:\n"
        "        kept = [await executor.run_cpu(jobs.echo, np.full(1 << 20, n % 256, np.uint8))\n"
        "                for n in range(300)]\n"
        "        for n in range(300):\n"
        "            await executor.run_cpu(jobs.keep, np.full(1 << 17, n % 256, np.uint8))\n"
        "        print(sum(int(array.min()) == n % 256 == int(array.max())\n"
        "                  for n, array in enumerate(kept)))\n"
        "asyncio.run(main())\n"
    )
    root = Path(jobs.__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (ran.stdout, ran.stderr) == ("300\n", "")


# --- what is interrupted -------------------------------------------------------------------------


async def until(condition):
    """Lets the loop run until something is so."""
    while not condition():
        await asyncio.sleep(0)


async def cancelled(job):
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job


async def test_cancelling_while_an_argument_is_pickled(one_worker):
    """Who cancels while a graph is pickled costs no worker: it has not heard of the job."""
    before = await one_worker.run_cpu(jobs.pid)
    graph = records(100_000)
    job = asyncio.ensure_future(one_worker.run_cpu(len, graph))
    for _ in range(3):
        await asyncio.sleep(0)
    assert one_worker.statistics().jobs_running == 0
    await cancelled(job)
    assert await one_worker.run_cpu(jobs.pid) == before


@not_streamed
@pytest.mark.parametrize("make", [np.ones, jobs.blank_bytes], ids=["array", "bytes"])
async def test_cancelling_while_an_argument_is_copied(one_worker, make):
    """Who cancels while a large argument is copied costs no worker, nor the segment."""
    before = await one_worker.run_cpu(jobs.pid)
    big = make(16 * MIB)
    worker = worker_of(one_worker)
    job = asyncio.ensure_future(one_worker.run_cpu(jobs.type_name, big))
    await until(lambda: worker.transfer is not None)
    waiting = asyncio.ensure_future(one_worker.run_cpu(jobs.echo, "waiting"))
    await asyncio.sleep(0)
    await cancelled(job)
    assert await waiting == "waiting"
    assert await one_worker.run_cpu(jobs.pid) == before
    assert await one_worker.run_cpu(jobs.type_name, big) == type(big).__name__
    assert worker.segments.outgoing._last == 1


async def test_cancelling_while_a_result_is_read(one_worker):
    """Who cancels while a large result is read costs no worker: it has done its job."""
    before = await one_worker.run_cpu(jobs.pid)
    job = asyncio.ensure_future(one_worker.run_cpu(jobs.blank_bytes, 64 * MIB))
    await until(lambda: one_worker._pool._arriving)
    await cancelled(job)
    assert not one_worker._pool._arriving
    assert await one_worker.run_cpu(jobs.pid) == before
    assert len(await one_worker.run_cpu(jobs.blank_bytes, 64 * MIB)) == 64 * MIB


async def test_cancelling_one_of_many_large_jobs(one_worker):
    """Large jobs beside a cancelled one have their results, whole."""
    big = [np.full(MIB, number) for number in range(6)]
    tasks = [asyncio.ensure_future(one_worker.run_cpu(jobs.echo, array)) for array in big]
    await tasks[0]
    tasks[3].cancel()
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [
        False, True, False, True, False, False,
    ]  # fmt: skip
    assert all(np.array_equal(results[n], big[n]) for n in (0, 2, 4, 5))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("direction", ["argument", "result"])
def test_a_loop_closed_with_transfers_in_flight(new_loop, direction):
    """A loop that is closed while large payloads travel leaves an executor that serves the next."""
    executor = Executor(1, start_method="fork")

    async def abandon():
        await executor.run_cpu(jobs.pid)
        pool, worker = executor._pool, worker_of(executor)
        if direction == "argument":
            pool.submit(_call.Call(jobs.echo, (np.ones(8 * MIB),), {}))
            await until(lambda: worker.transfer is not None or STREAMED)
        else:
            pool.submit(_call.Call(jobs.blank_bytes, (64 * MIB,), {}))
            await until(lambda: pool._arriving)

    async def use():
        array = counted(500_000)
        assert np.array_equal(await executor.run_cpu(jobs.echo, array), array)
        assert await executor.run_cpu(jobs.blank_bytes, 2 * MIB) == bytes(2 * MIB)
        await executor.aclose()

    for run in (abandon, use):
        loop = new_loop()
        loop.run_until_complete(run())
        loop.close()


async def test_killing_with_transfers_in_flight():
    """A kill while large payloads travel both ways fails their jobs, and leaves nothing."""
    executor = await Executor(2, start_method="fork").__aenter__()
    tasks = [asyncio.ensure_future(executor.run_cpu(jobs.echo, bytes(16 * MIB))) for _ in range(6)]
    await until(lambda: executor._pool and executor._pool._arriving)
    executor.kill()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [error for error in results if isinstance(error, ExecutorClosedError)]
    assert failed
    assert len(failed) + results.count(bytes(16 * MIB)) == 6


@not_streamed
async def test_a_death_while_an_argument_is_copied(one_worker):
    """A job whose argument was being copied when the worker died runs in another worker."""
    before = await one_worker.run_cpu(jobs.pid)
    big = counted(4 * MIB)
    worker = worker_of(one_worker)
    job = asyncio.ensure_future(one_worker.run_cpu(jobs.echo, big))
    await until(lambda: worker.transfer is not None)
    os.kill(before, signal.SIGKILL)
    assert np.array_equal(await job, big)
    assert await one_worker.run_cpu(jobs.pid) != before


async def test_a_death_while_a_result_is_read(one_worker):
    """A large result that was sent before the death counts."""
    before = await one_worker.run_cpu(jobs.pid)
    job = asyncio.ensure_future(one_worker.run_cpu(jobs.blank_bytes, 64 * MIB))
    await until(lambda: one_worker._pool._arriving)
    os.kill(before, signal.SIGKILL)
    assert await job == bytes(64 * MIB)
    assert await one_worker.run_cpu(jobs.pid) != before


async def test_random_deaths():
    """Workers killed while large payloads travel: each job has one outcome, and no result is torn."""
    outcomes = []
    numbers = itertools.count()
    kills = 0
    async with Executor(2, start_method="fork") as executor:

        async def ask():
            while kills < 8:
                number = next(numbers)
                try:
                    result = await executor.run_cpu(jobs.echo, np.full(100_000, number))
                    assert (result == number).all()
                    outcomes.append(number)
                except WorkerDiedError:
                    outcomes.append(None)

        tasks = [asyncio.ensure_future(ask()) for _ in range(20)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            for worker in list(executor._pool._workers.values()):
                if worker.pid and len(outcomes) >= 6 * (kills + 1):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(worker.pid, signal.SIGKILL)
                        kills += 1
        await asyncio.gather(*tasks)
    assert len(outcomes) == next(numbers)
    assert outcomes.count(None) <= kills


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def full_tmp(monkeypatch):
    """A temporary directory with 1 MB left, and segments that are files there."""
    if "ASYNCLAM_BOX" not in os.environ:
        pytest.skip("only the box has a small /tmp that can be filled")
    monkeypatch.setenv("ASYNCLAM_SEGMENTS", "file")
    monkeypatch.setattr(_memory, "_chosen", None)  # to be chosen anew
    monkeypatch.setattr(_memory, "_streamed", None)
    left = os.statvfs("/tmp")
    with open("/tmp/filling", "wb") as filling:
        os.posix_fallocate(filling.fileno(), 0, left.f_bavail * left.f_frsize - MIB)
    try:
        yield Path(filling.name)
    finally:
        Path(filling.name).unlink(missing_ok=True)


async def test_a_full_disk(full_tmp):
    """With a full /tmp large payloads go through the stream; a SharedBuffer says what is lacking."""
    array, blob = counted(2_000_000), os.urandom(3 * MIB)
    async with Executor(2) as executor:
        assert np.array_equal(await executor.run_cpu(jobs.echo, array), array)
        assert await executor.run_cpu(jobs.echo, blob) == blob
        assert len(worker_of(executor).segments.outgoing) == 0
        with pytest.raises(OSError, match="No space left on device") as caught:
            SharedBuffer(4 * MIB)
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space left on device"):
            await executor.run_cpu(jobs.make_buffer, bytes(4 * MIB))
        assert os.statvfs("/tmp").f_bavail > 0, "what did not fit has left nothing"
        full_tmp.unlink()
        assert np.array_equal(await executor.run_cpu(jobs.echo, array), array)
        assert len(worker_of(executor).segments.outgoing) == 1
