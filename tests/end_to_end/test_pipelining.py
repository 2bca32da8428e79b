"""Several short jobs in a worker's channel: all cores work, and nothing waits for, dies or is cancelled with another."""

import asyncio
from collections import Counter

import pytest

from asynclam import Executor, WorkerDiedError
from tests import jobs
from tests.parts.gate import pass_through


@pytest.fixture
async def executor(gate):
    """Two workers, both of which are there."""
    async with Executor(2) as executor:
        tasks = [asyncio.ensure_future(executor.run_cpu(pass_through, gate.path)) for _ in "12"]
        assert await gate.entered() != await gate.entered()
        gate.open(2)
        await asyncio.gather(*tasks)
        yield executor
        gate.open(2)  # for what a test that has failed leaves inside: the block waits for it


@pytest.fixture
def notes(tmp_path):
    """A file in which each run of a job leaves its number."""
    path = tmp_path / "notes"
    path.touch()
    return path


def runs(notes):
    """How often each job has run."""
    return Counter(map(int, notes.read_text().split()))


async def test_many_short_jobs(executor):
    """3,000 short jobs at once are done by both workers, several to a channel."""
    most = 0

    def look(_):
        nonlocal most
        most = max(most, executor.statistics().jobs_running)

    tasks = [asyncio.ensure_future(executor.run_cpu(jobs.pid)) for _ in range(3000)]
    for task in tasks:
        task.add_done_callback(look)
    assert len(set(await asyncio.gather(*tasks))) == 2
    assert 2 < most <= 2 * 32


async def test_short_jobs_behind_a_long_one(executor, gate):
    """Twenty short jobs that are submitted behind a long one are all done before it."""
    done = []

    async def one(name, fn, *args):
        await executor.run_cpu(fn, *args)
        done.append(name)

    long = asyncio.ensure_future(one("long", pass_through, gate.path))
    short = [asyncio.ensure_future(one(number, jobs.spin, 0.001)) for number in range(20)]
    await gate.entered()
    await asyncio.gather(*short)
    assert sorted(done) == list(range(20))
    gate.open()
    await long


@pytest.mark.parametrize("place", [0, 1, 7, 150])
async def test_a_short_function_that_once_runs_long(executor, gate, place):
    """What is held up behind it in the channel goes to the other worker, and is done meanwhile."""
    for _ in range(3):
        await asyncio.gather(*(executor.run_cpu(jobs.wait_if, None, n) for n in range(20)))
    paths = [gate.path if number == place else None for number in range(300)]
    tasks = [
        asyncio.ensure_future(executor.run_cpu(jobs.wait_if, path, number))
        for number, path in enumerate(paths)
    ]
    held = tasks.pop(place)
    assert await asyncio.gather(*tasks) == [number for number in range(300) if number != place]
    assert not held.done()
    gate.open()
    assert await held == place


async def test_both_workers_are_held(executor, gate):
    """Jobs behind two that run long wait for the first of them, and harm none."""
    await asyncio.gather(*(executor.run_cpu(jobs.wait_if, None, n) for n in range(50)))
    held = [asyncio.ensure_future(executor.run_cpu(jobs.wait_if, gate.path, n)) for n in (1, 2)]
    assert await gate.entered() != await gate.entered()
    short = [asyncio.ensure_future(executor.run_cpu(jobs.wait_if, None, n)) for n in range(50)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in (*held, *short))
    gate.open()
    assert await asyncio.gather(*short) == list(range(50))
    gate.open()
    assert await asyncio.gather(*held) == [1, 2]


@pytest.mark.parametrize("victims", [[100], [0, 1], range(0, 300, 7), range(150, 300)], ids=str)
async def test_cancelling_some_of_many(executor, notes, victims):
    """All but the cancelled jobs have their result, and have run exactly once."""
    tasks = [
        asyncio.ensure_future(executor.run_cpu(jobs.note, notes, number)) for number in range(300)
    ]
    others = set(range(300)) - set(victims)
    await tasks[min(others)]
    for number in victims:
        tasks[number].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {number for number in others if results[number] != number} == set()
    ran = runs(notes)
    assert {number for number in others if ran[number] != 1} == set()
    assert {number for number in victims if ran[number] > 1} == set()


async def test_cancelling_the_one_that_runs(executor, gate):
    """The worker that runs it is replaced; the jobs behind it in its channel are done elsewhere."""
    await asyncio.gather(*(executor.run_cpu(jobs.wait_if, None, n) for n in range(50)))
    running = asyncio.ensure_future(executor.run_cpu(jobs.wait_if, gate.path, -1))
    short = [asyncio.ensure_future(executor.run_cpu(jobs.wait_if, None, n)) for n in range(100)]
    pid = await gate.entered()
    running.cancel()
    assert await asyncio.gather(*short) == list(range(100))
    assert running.cancelled()
    pids = await asyncio.gather(*(executor.run_cpu(jobs.pid) for _ in range(100)))
    assert pid not in pids


@pytest.mark.parametrize("victim", [0, 1, 100, 299])
async def test_one_of_many_kills_its_worker(executor, notes, victim):
    """It fails, and it alone: all others have their result, and have run exactly once."""
    tasks = [
        asyncio.ensure_future(executor.run_cpu(jobs.note, notes, number, victim))
        for number in range(300)
    ]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[victim], WorkerDiedError)
    assert results[victim].exitcode == 3
    results[victim] = victim
    assert results == list(range(300))
    assert runs(notes) == Counter(range(300))


async def test_each_of_many_is_told_its_own_error(executor):
    """Exceptions and results of short jobs are not mixed up."""
    results = await asyncio.gather(
        *(executor.run_cpu(jobs.fail_on_odd, number) for number in range(500)),
        return_exceptions=True,
    )
    assert results[::2] == list(range(0, 500, 2))
    assert [error.args for error in results[1::2]] == [(number,) for number in range(1, 500, 2)]


async def test_large_jobs_between_short_ones(executor):
    """Large payloads and short jobs share the workers: each has its own result."""
    tasks = [
        executor.run_cpu(jobs.echo, bytes([number]) * (300_000 if number % 10 == 0 else 3))
        for number in range(200)
    ]
    results = await asyncio.gather(*tasks)
    assert all(set(result) == {number} for number, result in enumerate(results))


async def test_leaving_a_block_with_many_short_jobs(notes):
    """A close waits for all of them."""
    async with Executor(2) as executor:
        tasks = [asyncio.ensure_future(executor.run_cpu(jobs.note, notes, n)) for n in range(300)]
        await tasks[0]
    assert [task.result() for task in tasks] == list(range(300))
    assert runs(notes) == Counter(range(300))
