"""``executor.options()``: the same executor on other terms."""

import asyncio
import gc

import pytest

from asynclam import Executor, WorkerDiedError
from tests import jobs


def die_until(path, times, result=None):
    """Dies, unless it was called so many times before."""
    with open(path, "a+") as calls:
        calls.write(".")
        calls.seek(0)
        so_far = len(calls.read())
    if so_far <= times:
        jobs.hard_exit(3)
    return result


async def test_a_retried_job(tmp_path):
    """A function that kills its worker twice is run a third time, and that result is the outcome."""
    path = tmp_path / "calls"
    async with Executor(2) as executor:
        patient = executor.options(retries=2)
        assert await patient.run_cpu(die_until, path, 2, "result") == "result"
        now = executor.statistics()
        assert (now.jobs_retried, now.worker_deaths, now.jobs_completed) == (2, 2, 1)
        path.unlink()
        with pytest.raises(WorkerDiedError, match="tried 2 times"):
            await executor.options(retries=1).run_cpu(die_until, path, 2)
        path.unlink()
        with pytest.raises(WorkerDiedError) as caught:
            await executor.run_cpu(die_until, path, 1)
        assert caught.value.tries == 1


async def test_a_retried_chunk(tmp_path):
    """A chunk of map_cpu is rerun as a whole: items of it that had run, run again."""
    path = tmp_path / "notes"
    path.touch()
    async with Executor(1) as executor:
        patient = executor.options(retries=1)
        stream = patient.map_cpu(note_and_die_once, [path] * 4, range(4), chunksize=2)
        assert await stream == [0, 1, 2, 3]
    assert path.read_text().split() == ["0", "1", "2", "2", "3"]


def note_and_die_once(path, number):
    first = str(number) not in path.read_text().split()
    jobs.note(path, number, deadly=2 if first else None)
    return number


async def test_a_view_is_the_executor():
    """What one is told, the other knows; dropping a view ends nothing."""
    async with Executor(1) as executor:
        view = executor.options(retries=1)
        pid = await view.run_cpu(jobs.pid)
        assert await executor.run_cpu(jobs.pid) == pid
        assert view.statistics() == executor.statistics()
        assert repr(view) == repr(executor)
        again = view.options()
        del view
        gc.collect()
        assert await again.run_cpu(jobs.pid) == pid
        assert (await again.run_blocking(jobs.pid)) != pid
    with pytest.raises(Exception, match="closed"):
        await again.run_cpu(jobs.pid)


async def test_a_view_keeps_the_executor():
    """An executor that is only known by a view lives as long as that."""
    view = Executor(1).options(retries=1)
    gc.collect()
    assert await view.run_cpu(jobs.echo, 1) == 1
    view.kill()


@pytest.mark.parametrize("retries", [1.0, "1", True, None])
def test_retries_that_are_no_number(retries):
    """``retries`` is an integer."""
    with pytest.raises(TypeError, match="retries is an integer"):
        Executor(1).options(retries=retries)


def test_negative_retries():
    """Less than one try is none."""
    with pytest.raises(ValueError, match="retries must not be negative"):
        Executor(1).options(retries=-1)


async def test_a_cancel_between_two_tries(tmp_path):
    """A cancel ends the tries."""
    async with Executor(1) as executor:
        task = asyncio.ensure_future(
            executor.options(retries=10**6).run_cpu(die_until, tmp_path / "calls", 10**6)
        )
        while executor.statistics().jobs_retried < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await executor.run_cpu(jobs.echo, 1) == 1
        assert executor.statistics().jobs_cancelled == 1
