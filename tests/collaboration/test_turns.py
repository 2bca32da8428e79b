"""Long work in turns: who has the next one, and how it ends."""

import asyncio
import itertools

import pytest

from asynclam import _turns
from asynclam._turns import Rota


@pytest.fixture
async def rota(monkeypatch):
    """A rota whose turns are one step long."""
    monkeypatch.setattr("asynclam._turns._TURN", 1)
    monkeypatch.setattr("asynclam._turns.perf_counter", itertools.count().__next__)
    return Rota(asyncio.get_running_loop())


def work(steps, name, count, also=lambda number: None):
    """Notes its steps, as many as ``count``, and its end."""
    try:
        yield
        for number in range(count):
            steps.append(f"{name}{number}")
            also(number)
            yield
    finally:
        steps.append(f"{name} closed")


async def until_ended(*works):
    while not all(one.ended for one in works):
        await asyncio.sleep(0)


async def test_a_turn_is_shared(rota):
    """What begins while something is under way waits for the next turn; then all have one each."""
    steps = []
    first, second = rota.begin(work(steps, "a", 3)), rota.begin(work(steps, "b", 3))
    assert steps == ["a0"]
    await until_ended(first, second)
    assert steps == ["a0", "a1", "b0", "a2", "b1", "a closed", "b2", "b closed"]


async def test_a_turn_without_time(rota, monkeypatch):
    """However little time there is, a turn takes a step: the first one is taken at once."""
    monkeypatch.setattr("asynclam._turns._TURN", 0)
    steps = []
    only = rota.begin(work(steps, "a", 1))
    assert steps == ["a0"]
    await until_ended(only)


async def test_cancelled_between_its_steps(rota):
    """A cancelled work is closed at once, also one that has not had a turn; the others go on."""
    steps = []
    first, second = rota.begin(work(steps, "a", 2)), rota.begin(work(steps, "b", 2))
    second.cancel()
    assert steps == ["a0", "b closed"]
    await until_ended(first)
    assert steps == ["a0", "b closed", "a1", "a closed"]


async def test_cancelled_by_one_of_its_own_steps(rota):
    """As by a signal handler that kills the executor: the step ends, and no other is taken."""
    steps = []

    def cancel(number):
        if number == 1:
            works[0].cancel()

    works = [rota.begin(work(steps, "a", 3, cancel))]
    await until_ended(*works)
    assert steps == ["a0", "a1", "a closed"]


async def test_interrupted(rota):
    """Ctrl-C in a step is raised; what begins later has its turns."""
    steps = []

    def interrupt(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rota.begin(work(steps, "a", 3, interrupt))
    await until_ended(rota.begin(work(steps, "b", 1)))
    assert steps == ["a0", "a closed", "b0", "b closed"]


async def test_awaited(rota):
    """The result of the generator is returned, its exception raised; a cancel closes it."""
    steps = []

    def returns():
        yield from work(steps, "a", 2)
        return "result"

    assert await rota.run(returns(), pytest.fail) == "result"

    def fail(number):
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        await rota.run(work(steps, "b", 2, fail), pytest.fail)
    task = asyncio.ensure_future(rota.run(work(steps, "c", 1000), pytest.fail))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["a0", "a1", "a closed", "b0", "b closed", "c0", "c closed"]


@pytest.mark.parametrize("when", ["before its end", "after its end"])
@pytest.mark.parametrize("error", [None, ValueError("late")])
async def test_cancelled_in_the_turn_of_its_end(rota, when, error):
    """What a work has made, or raised, for a task that cannot take it any more is dropped."""
    dropped = []

    def made():
        yield
        if when == "before its end":
            task.cancel()
        else:  # but before the task has its next turn
            asyncio.get_running_loop().call_soon(task.cancel)
        if error is not None:
            raise error
        return "made"

    task = asyncio.ensure_future(rota.run(made(), dropped.append))
    while not task.done():
        await asyncio.sleep(0)
    assert (task.cancelled(), dropped) == (True, ["made"] if error is None else [])


async def test_interrupted_while_it_is_awaited(rota):
    """Ctrl-C in a step is raised where the step is taken, and in the task that awaits it."""
    steps = []

    def interrupt(number):
        raise KeyboardInterrupt

    work_ = _turns._settle(
        future := asyncio.get_running_loop().create_future(),
        work(steps, "a", 3, interrupt),
        pytest.fail,
    )
    next(work_)
    next(work_)
    with pytest.raises(KeyboardInterrupt):
        next(work_)
    assert isinstance(future.exception(), KeyboardInterrupt)
    assert steps == ["a0", "a closed"]
