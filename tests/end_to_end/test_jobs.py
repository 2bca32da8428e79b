"""Jobs in real workers: what goes in, what comes back, and every way in which it goes wrong."""

import asyncio
import contextlib
import functools
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import traceback

import numpy as np
import pytest

from asynclam import (
    AsynclamError,
    Executor,
    ExecutorClosedError,
    JobExitError,
    PayloadError,
    SharedBuffer,
    WorkerDiedError,
    WorkerStartError,
    _forkserver,
    map_cpu,
    map_io,
    run_cpu,
)
from tests import jobs
from tests.parts.processes import ended


@pytest.fixture(params=["fork", "spawn", "inline"])
def how(request):
    """The ways in which jobs are run, as arguments of an Executor."""
    if request.param == "inline":
        return {"max_workers": 0}
    return {"max_workers": 2, "start_method": request.param}


@pytest.fixture
async def executor(how):
    async with Executor(**how) as executor:
        yield executor


# --- what goes in and comes back -----------------------------------------------------------------


async def test_calls(executor):
    """Functions of all kinds run with their arguments, and their result comes back."""
    offset = 10
    assert await executor.run_cpu(jobs.add, 1, b=2) == 3
    assert await executor.run_cpu(math.sqrt, 4) == 2
    assert await executor.run_cpu(lambda x: x + offset, 1) == 11
    assert await executor.run_cpu(functools.partial(jobs.add, 1), b=5) == 6
    assert await executor.run_cpu("abc".upper) == "ABC"
    assert await executor.run_cpu(dict, a=1) == {"a": 1}


@pytest.mark.parametrize("value", [None, b"", b"x" * 200_000, "ü" * 70_000, [1.5, {"a": ()}]])
async def test_values(executor, value):
    """Values come back equal, small and large."""
    assert await executor.run_cpu(jobs.echo, value) == value


async def test_arrays(executor):
    """An array goes there and back, and can be written to."""
    array = np.arange(1_000_000).reshape(1000, 1000)
    back = await executor.run_cpu(jobs.echo, array)
    assert np.array_equal(array, back)
    back[0, 0] = 1


async def test_shared_buffer(executor):
    """A job writes into the caller's buffer; a buffer that a job makes comes back."""
    with SharedBuffer(1_000_000) as buffer:
        assert await executor.run_cpu(jobs.fill, buffer, 1) == 1_000_000
        assert await executor.run_cpu(jobs.total, buffer) == 1_000_000
        assert buffer.view[999_999] == 1
    with await executor.run_cpu(jobs.make_buffer, b"made there") as made:
        assert bytes(made.view) == b"made there"


async def test_buffers_leave_nothing_in_the_worker(executor):
    """A worker lets go of a buffer when the job is done."""
    before = await executor.run_cpu(jobs.descriptors)
    for _ in range(10):
        with SharedBuffer(10) as buffer:
            await executor.run_cpu(jobs.fill, buffer, 1)
    after = await executor.run_cpu(jobs.descriptors)
    assert len(after) <= len(before) + 1


# --- what a job raises ---------------------------------------------------------------------------


async def test_exceptions(executor):
    """An exception comes back as itself, with the worker's traceback shown below it."""
    with pytest.raises(jobs.OddError) as caught:
        await executor.run_cpu(jobs.raise_odd, "one", "two")
    assert caught.value.second == "two"
    text = "".join(traceback.format_exception(caught.value))
    assert "in raise_odd" in text
    assert "_worker.py" not in text


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        StopIteration(1),
        StopAsyncIteration(),
        BaseException("plain"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_would_stop_the_loop(executor, error):
    """What would stop or confuse the loop comes back as JobExitError, and the loop lives."""
    with pytest.raises(JobExitError) as caught:
        await executor.run_cpu(jobs.raise_, error)
    assert type(caught.value.original) is type(error)
    assert caught.value.original.args == error.args
    assert await executor.run_cpu(jobs.echo, 1) == 1


@pytest.mark.parametrize("how", [{"max_workers": 1}], ids=["worker"], indirect=False)
@pytest.mark.parametrize(
    ("fn", "args", "attribute", "value"),
    [
        (jobs.hard_exit, (7,), "exitcode", 7),
        (jobs.hard_exit, (0,), "exitcode", 0),
        (jobs.kill_self, (signal.SIGKILL,), "signal", signal.SIGKILL),
        (jobs.kill_self, (signal.SIGSEGV,), "signal", signal.SIGSEGV),
        (jobs.kill_self, (signal.SIGTERM,), "signal", signal.SIGTERM),
    ],
)
async def test_deaths(executor, fn, args, attribute, value):
    """A worker that dies fails its own job, with the way of the death; another takes its place."""
    with pytest.raises(WorkerDiedError) as caught:
        await executor.run_cpu(fn, *args)
    assert getattr(caught.value, attribute) == value
    assert caught.value.job == f"tests.jobs.{fn.__name__}"
    assert await executor.run_cpu(jobs.echo, 1) == 1


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (jobs.echo, (threading.Lock(),), "argument 0 .*lock"),
        (jobs.unpicklable, (), r"the result of tests\.jobs\.unpicklable \(of type lock\)"),
        (jobs.breaks_in_parent, (), "could not be unpickled here.*in the unpickling"),
        (jobs.echo, (jobs.BreaksInParent(),), "could not be unpickled in the worker"),
    ],
    ids=["argument", "result", "result in the caller", "argument in the worker"],
)
async def test_payloads_that_cannot_travel(executor, fn, args, message):
    """What cannot be pickled or unpickled is an error that names it; the worker is unharmed."""
    before = await executor.run_cpu(jobs.pid)
    with pytest.raises(PayloadError, match=message):
        await executor.run_cpu(fn, *args)
    assert await executor.run_cpu(jobs.pid) == before


async def test_a_coroutine_function(executor):
    """A coroutine function is refused with the right call, before anything is started."""

    async def download(key):
        pass

    with pytest.raises(TypeError, match=r"await download\(\.\.\.\)"):
        await executor.run_cpu(download, "key")
    with pytest.raises(TypeError, match=r"map_io\(download"):
        executor.map_cpu(download, ["key"])


async def test_a_job_that_prints(executor, capfd):
    """What a job prints, without a newline, is out before its result is in."""
    _forkserver.stop()  # whose output is that of tests before this one
    await executor.run_cpu(jobs.print_twice, "printed")
    out, err = capfd.readouterr()
    assert (out, err) == ("printed", "printed")


@pytest.mark.parametrize("how", [{"max_workers": 1}], ids=["worker"], indirect=False)
async def test_a_job_that_closes_its_stdout(executor):
    """A job that closes its stdout has its result, and so has the next one."""
    assert await executor.run_cpu(jobs.close_stdout) == "closed"
    assert await executor.run_cpu(jobs.echo, 1) == 1


@pytest.mark.parametrize("how", [{"max_workers": 1}], ids=["worker"], indirect=False)
async def test_a_job_that_forks(executor):
    """A job that returns in a forked child, too, has one result, that of the worker."""
    assert await executor.run_cpu(jobs.fork_and_return) > 0
    assert await executor.run_cpu(jobs.echo, 1) == 1


# --- sizes and numbers ---------------------------------------------------------------------------


async def test_large_arguments_and_results_at_once():
    """8 MB both ways, 12 at a time, on one worker: no deadlock (lambda_multiprocessing 1.1 hangs)."""
    big = os.urandom(8 << 20)
    async with Executor(1) as executor:
        results = await asyncio.gather(*(executor.run_cpu(jobs.echo, big) for _ in range(12)))
    assert all(result == big for result in results)


async def test_random_deaths_lose_no_job():
    """Workers are killed 20 times under load: each job has one outcome, only begun ones fail."""
    outcomes: list[object] = []
    numbers = itertools.count()
    kills = 0
    async with Executor(2) as executor:
        pids = {await executor.run_cpu(jobs.pid)}

        async def ask():
            while kills < 20:
                try:
                    outcomes.append(await executor.run_cpu(jobs.echo, next(numbers)))
                except WorkerDiedError as error:
                    outcomes.append(error)

        tasks = [asyncio.ensure_future(ask()) for _ in range(200)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            for worker in list(executor._pool._workers.values()):
                # Every so many replies, whichever worker it is, in whatever state it is.
                if worker.pid and len(outcomes) >= 40 * (kills + 1):
                    with contextlib.suppress(ProcessLookupError):  # it is dead, and not yet told of
                        os.kill(worker.pid, signal.SIGKILL)
                        kills += 1
                        pids.add(worker.pid)
        await asyncio.gather(*tasks)
        deaths = [error for error in outcomes if isinstance(error, WorkerDiedError)]
        assert len(outcomes) == next(numbers)
        assert len(deaths) <= kills
        assert {error.pid for error in deaths} <= pids
        done = [number for number in outcomes if not isinstance(number, WorkerDiedError)]
        assert len(set(done)) == len(outcomes) - len(deaths)


async def test_a_death_together_with_the_last_result():
    """A worker that dies right after its last result: the result counts, the death is noticed."""
    async with Executor(1) as executor:
        for number in range(40):
            assert await executor.run_cpu(jobs.echo, number) == number
            (worker,) = executor._pool._workers.values()
            os.kill(worker.pid, signal.SIGKILL)
            assert await executor.run_cpu(jobs.echo, -number) == -number


@pytest.mark.parametrize("fn", [jobs.bad_notes, jobs.bad_exit, jobs.frozen])
async def test_exceptions_that_fight_back(executor, fn):
    """Whatever an exception is made of, the job has an outcome."""
    with pytest.raises((ValueError, JobExitError, jobs.FrozenError)):
        await executor.run_cpu(fn)
    assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_an_argument_whose_unpickling_kills_the_worker():
    """An argument that kills whoever unpickles it fails its job; it is not tried for ever."""
    async with Executor(2) as executor:
        with pytest.raises(WorkerDiedError) as caught:
            await executor.run_cpu(jobs.echo, jobs.KillsWhoUnpickles())
        assert caught.value.exitcode == 3
        assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_what_a_job_has_spawned_ends_with_its_worker():
    """A worker that exits, or is closed, takes along what its jobs have spawned."""
    async with Executor(1) as executor:
        pid = await executor.run_cpu(jobs.spawn_forever)
    await ended(pid)


async def test_initializer_with_arguments_of_all_kinds():
    """Arrays, lambdas and functions of __main__ are fine for an initializer."""
    async with Executor(
        1, initializer=lambda array: jobs.initialize(int(array.sum())), initargs=(np.ones(50_000),)
    ) as executor:
        assert await executor.run_cpu(jobs.initialized) == [50_000]


@pytest.mark.parametrize(
    ("prepared", "seen"),
    [
        ("", "['made']"),
        ("asynclam.prepare()", "[]"),
    ],  # the second was forked before it had the names
    ids=["", "prepared"],
)
def test_an_initializer_of_a_script(tmp_path, prepared, seen):
    """What it sets in ``__main__``, functions of ``__main__`` see, where workers are forked with that."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import asyncio, asynclam
made = []
{prepared}
async def make(): made.append("made")
def look(): return made
async def main():
    async with asynclam.Executor(1, initializer=make, start_method="fork") as executor:
        print(await executor.run_cpu(look))
asyncio.run(main())
""")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (seen, "")


async def test_failed_initializer():
    """An initializer that raises fails the jobs, with its exception as the cause."""
    async with Executor(1, initializer=jobs.fail_to_initialize) as executor:
        with pytest.raises(WorkerStartError, match="initializer") as caught:
            await executor.run_cpu(jobs.echo, 1)
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_initializer():
    """An initializer runs once in each worker, before its first job."""
    async with Executor(1, initializer=jobs.initialize, initargs=(1, 2)) as executor:
        assert await executor.run_cpu(jobs.initialized) == [1, 2]
        assert await executor.run_cpu(jobs.initialized) == [1, 2]


# --- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [None, 1, 3, 100])
async def test_map(executor, chunksize):
    """``map_cpu`` is the built-in map, whatever the chunks."""
    assert await executor.map_cpu(jobs.add, range(20), range(20, 40), chunksize=chunksize) == [
        a + b for a, b in zip(range(20), range(20, 40), strict=True)
    ]


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        lambda: range(5000),
        lambda: list(range(5000)),
        lambda: tuple(range(5000)),
        lambda: iter(range(5000)),
        lambda: dict.fromkeys(range(5000)),
        lambda: map_io(an_echo, range(5000), ordered=True),
    ],
    ids=["range", "list", "tuple", "iterator", "dict", "async"],
)
async def test_map_in_measured_chunks(executor, shape, return_exceptions):
    """Many short items come back complete and in order, from every kind of source."""
    results = await executor.map_cpu(jobs.add, shape(), return_exceptions=return_exceptions)
    assert results == list(range(5000))
    stream = executor.map_cpu(jobs.add, shape(), shape(), return_exceptions=return_exceptions)
    assert [result async for result in stream] == list(range(0, 10_000, 2))


async def an_echo(value):
    return value


async def test_short_items_share_jobs(executor):
    """100,000 tiny items are some dozens of jobs, not 100,000."""
    assert await executor.map_cpu(abs, range(100_000)) == list(range(100_000))
    assert executor.statistics().jobs_completed < 1000


async def test_long_items_are_jobs_of_their_own(executor):
    """Ten items that take long are ten jobs."""
    assert await executor.map_cpu(jobs.spin, [0.05] * 10) == [None] * 10
    assert executor.statistics().jobs_completed == 10


async def test_items_of_a_slow_source_do_not_wait_for_each_other(executor):
    """What a source gives while workers are hungry is sent, before it gives more."""
    more = asyncio.Event()

    async def source():
        for number in range(1000):
            yield number
        await more.wait()  # is set once the last of these has its result
        yield 1000

    results = []
    async with executor.map_cpu(jobs.echo, source()) as stream:
        async for result in stream:
            results.append(result)
            if result == 999:
                more.set()
    assert results == list(range(1001))


async def test_map_of_large_items(executor):
    """Large items are not put together, however fast they are done."""
    items = [bytes([number]) * 1_000_000 for number in range(20)]
    before = executor.statistics().jobs_completed
    assert await executor.map_cpu(jobs.echo, items) == items
    assert executor.statistics().jobs_completed - before == 20


async def test_map_of_many_buffers(executor):
    """More buffers than a call can take travel in several, whether items or results are that."""
    made = await executor.map_cpu(jobs.make_buffer, [b"%d" % number for number in range(300)])
    try:
        assert await executor.map_cpu(jobs.total, made) == [sum(made[n].view) for n in range(300)]
        small = [None] * 2000  # so that chunks are long when the buffers come
        kinds = await executor.map_cpu(jobs.type_name, [*small, *made], limit=100_000)
        assert kinds == ["NoneType"] * 2000 + ["SharedBuffer"] * 300
    finally:
        for buffer in made:
            buffer.close()


async def test_map_stream(executor):
    """A stream gives all results, in order."""
    stream = executor.map_cpu(jobs.echo, range(20), limit=3)
    assert [result async for result in stream] == list(range(20))


async def test_map_first_error(executor):
    """The first error of an item ends the map, as itself."""
    with pytest.raises(ValueError, match=r"^[13579]\b"):
        await executor.map_cpu(jobs.fail_on_odd, range(10), chunksize=2)


async def test_map_return_exceptions(executor):
    """With ``return_exceptions`` each item has its own result or exception, in chunks, too."""
    results = await executor.map_cpu(
        jobs.fail_on_odd, range(6), chunksize=4, return_exceptions=True
    )
    assert results[::2] == [0, 2, 4]
    assert [error.args for error in results[1::2]] == [(1,), (3,), (5,)]


async def test_map_results_that_cannot_be_pickled(executor):
    """With ``return_exceptions`` a result that cannot travel does not take its chunk along."""
    good, bad = await executor.map_cpu(
        jobs.lock_if, [False, True], chunksize=2, return_exceptions=True
    )
    assert good is None
    assert isinstance(bad, PayloadError)


async def test_map_an_item_that_cannot_be_pickled(executor):
    """An item that cannot travel ends the map and is named, by its index in the input."""
    with pytest.raises(PayloadError, match=r"item 0 of .*\(of type lock\)"):
        await executor.map_cpu(jobs.echo, [threading.Lock()])
    items = [*range(1000), threading.Lock()]
    for chunksize in (None, 1, 100):
        with pytest.raises(PayloadError, match="item 1000"):
            await executor.map_cpu(jobs.echo, items, chunksize=chunksize)


@pytest.mark.parametrize("chunksize", [None, 1, 100])
async def test_map_return_exceptions_of_items_that_cannot_be_pickled(executor, chunksize):
    """With ``return_exceptions`` it alone has the error, and not its chunk."""
    items = [threading.Lock() if number in (7, 900) else number for number in range(1000)]
    results = await executor.map_cpu(jobs.echo, items, chunksize=chunksize, return_exceptions=True)
    bad = {index: result for index, result in enumerate(results) if result != items[index]}
    assert sorted(bad) == [7, 900]
    assert all(f"item {index} of" in str(error) for index, error in bad.items())


async def test_map_stop_iteration(executor):
    """A StopIteration of an item is its error; it ends nothing silently."""
    stop = [StopIteration(1)]
    with pytest.raises(JobExitError):
        await executor.map_cpu(jobs.raise_, stop, chunksize=3)
    results = await executor.map_cpu(jobs.raise_, stop * 3, chunksize=3, return_exceptions=True)
    assert [type(error) for error in results] == [JobExitError] * 3


@pytest.mark.parametrize("return_exceptions", [False, True])
@pytest.mark.parametrize(
    ("fn", "iterables", "error"),
    [(jobs.fail_on_odd, ([1],), ValueError), (jobs.add, ([1], ["a"]), TypeError)],
    ids=["items", "tuples"],
)
async def test_the_traceback_of_a_chunk(executor, fn, iterables, error, return_exceptions):
    """The traceback of an item's error begins with the user's function."""
    stream = executor.map_cpu(fn, *iterables, return_exceptions=return_exceptions)
    try:
        (raised,) = await stream
    except error as caught:
        raised = caught
    text = "".join(traceback.format_exception(raised))
    assert f"in {fn.__name__}" in text
    assert "_worker.py" not in text


async def test_pipeline(executor):
    """Results of ``map_io`` feed ``map_cpu``: a pipeline."""

    async def download(key):
        await asyncio.sleep(0)
        return key * 2

    stream = executor.map_cpu(jobs.add, map_io(download, range(50), ordered=True))
    assert await stream == [key * 2 for key in range(50)]


async def test_gather_over_both_kinds():
    """``asyncio.gather`` awaits IO and CPU work together."""

    async def io():
        await asyncio.sleep(0)
        return "io"

    assert await asyncio.gather(run_cpu(jobs.echo, "cpu"), io(), map_cpu(abs, [-1])) == [
        "cpu",
        "io",
        [1],
    ]


# --- arguments and life of an executor -----------------------------------------------------------


async def an_async_generator():
    yield


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_workers": -1}, ValueError, "must not be negative, got -1"),
        ({"max_workers": 1.5}, TypeError, "integer"),
        ({"max_workers": True}, TypeError, "integer"),
        ({"start_method": "forkserver"}, ValueError, "start_method"),
        ({"initializer": 5}, TypeError, "a function or a coroutine function"),
        ({"initializer": an_async_generator}, TypeError, "a function or a coroutine function"),
        ({"initializer": print, "initargs": (threading.Lock(),)}, PayloadError, "initializer"),
        ({"initializer": print, "initargs": (SharedBuffer(0),)}, PayloadError, "SharedBuffer"),
    ],
)
def test_bad_settings(arguments, error, message):
    """Bad settings are refused by the constructor."""
    with pytest.raises(error, match=message):
        Executor(**arguments)


async def test_bad_arguments_of_map(executor):
    """Bad arguments of a map are refused at the call."""
    with pytest.raises(ValueError, match="chunksize"):
        executor.map_cpu(abs, [1], chunksize=0)
    with pytest.raises(ValueError, match="limit"):
        executor.map_cpu(abs, [1], limit=0)
    with pytest.raises(TypeError, match="iterable"):
        executor.map_cpu(abs)


def test_no_running_loop():
    """Outside of a running loop the error says what to do, and nothing is forked."""
    coroutine = Executor(1).run_cpu(jobs.echo, 1)
    with pytest.raises(RuntimeError, match="running asyncio event loop"):
        coroutine.send(None)


async def test_closed(how):
    """A closed executor refuses; what ran before its end has its result."""
    async with Executor(**how) as executor:
        job = asyncio.ensure_future(executor.run_cpu(jobs.echo, 1))
        await asyncio.sleep(0)
    assert await job == 1
    for use in (executor.run_cpu(jobs.echo, 1), executor.run_blocking(jobs.echo, 1)):
        with pytest.raises(ExecutorClosedError, match="closed"):
            await use
    with pytest.raises(ExecutorClosedError):
        await executor.map_cpu(jobs.echo, [1])


async def test_closing_twice(gate):
    """A close that is cancelled kills; another close is not cancelled with it."""
    executor = Executor(1)
    job = asyncio.ensure_future(executor.run_cpu(gate_job, gate.path))
    await gate.entered()
    first, second = (asyncio.ensure_future(executor.aclose()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, second, job, return_exceptions=True)
    assert first.cancelled()
    assert second.exception() is None


async def test_an_exception_in_the_block_kills(gate):
    """A block that is left by an exception does not wait for its jobs: they fail."""

    async def block():
        nonlocal job
        async with Executor(1) as executor:
            job = asyncio.ensure_future(executor.run_cpu(gate_job, gate.path))
            await gate.entered()
            raise KeyError("left")

    job = None
    with pytest.raises(KeyError):
        await block()
    with pytest.raises(ExecutorClosedError, match="killed"):
        await job


def gate_job(path):
    from tests.parts.gate import pass_through

    return pass_through(path)


def test_an_entered_executor_in_another_loop():
    """An executor that was entered serves its own loop only."""

    async def enter():
        return await Executor(1).__aenter__()

    executor = asyncio.run(enter())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(executor.run_cpu(jobs.echo, 1))
    executor.kill()


async def test_dropped_without_close():
    """An executor that is dropped without being closed warns, and its workers end."""
    executor = await Executor(1).__aenter__()
    await executor.run_cpu(jobs.pid)
    control = executor._pool._control
    with pytest.warns(ResourceWarning, match="without being closed"):
        del executor
    await asyncio.sleep(0)
    assert control.closed, "the fork server kills the workers of a control connection that ends"


async def test_statistics_and_repr(gate):
    """``statistics()`` and ``repr`` tell what is under way."""
    async with Executor(1) as executor:
        first = asyncio.ensure_future(executor.run_cpu(gate_job, gate.path))
        second = asyncio.ensure_future(executor.run_cpu(gate_job, gate.path))
        await gate.entered()
        now = executor.statistics()
        assert (now.workers_busy, now.jobs_running, now.jobs_queued) == (1, 1, 1)
        assert repr(executor) == "<Executor [workers: 1 busy, 0 idle | jobs: 1 running, 1 queued]>"
        gate.open(2)
        await asyncio.gather(first, second)
        assert executor.statistics().jobs_completed == 2


def test_every_error_is_documented():
    """All errors that users meet are of one small tree."""
    for error in (
        PayloadError,
        WorkerDiedError,
        WorkerStartError,
        ExecutorClosedError,
        JobExitError,
    ):
        assert issubclass(error, AsynclamError)
    assert sys.modules["asynclam._errors"]


async def test_the_end_of_the_block_waits_for_large_arguments():
    """A call whose arguments are still being pickled is one of its jobs."""
    async with Executor(1) as executor:
        task = asyncio.ensure_future(executor.run_cpu(len, [str(n) for n in range(100_000)]))
        await asyncio.sleep(0)
    assert await task == 100_000


@pytest.mark.parametrize("max_workers", [0, 1])
@pytest.mark.parametrize("is_first", [False, True])
async def test_killed_by_what_is_pickled(max_workers, is_first):
    """Whatever the caller's code has done meanwhile: nothing is run, nor is a worker started."""

    class Killing:
        def __reduce__(self):
            executor.kill()
            return int, ()

    executor = Executor(max_workers)
    if not is_first:
        await executor.run_cpu(len, ())
    with pytest.raises(ExecutorClosedError):
        await executor.run_cpu(pytest.fail, Killing())
    with SharedBuffer(4096) as buffer:
        executor = Executor(max_workers)
        with pytest.raises(ExecutorClosedError):
            await anext(executor.map_cpu(pytest.fail, [(buffer, Killing())]))


async def test_killed_while_large_arguments_are_pickled():
    """The call is refused, and the descriptors that it would have sent are closed."""
    with SharedBuffer(4096) as buffer:
        executor = Executor(1)
        await executor.run_cpu(len, ())
        before = len(os.listdir("/proc/self/fd"))
        arguments = buffer, [str(n) for n in range(100_000)]
        task = asyncio.ensure_future(executor.run_cpu(len, arguments))
        await asyncio.sleep(0)
        executor.kill()
        with pytest.raises(ExecutorClosedError):
            await task
        assert len(os.listdir("/proc/self/fd")) <= before
