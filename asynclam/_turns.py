"""Long work on the event loop, in turns of half a millisecond, with other callbacks in between.

The work is a generator that yields between its steps; how long a step takes is its own business. All
the work of a rota shares the turns, one step each in a round, so the loop is held up no longer by a
hundred works than by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

T = TypeVar("T")

_TURN = 0.0005  # seconds: some turns together, and a step that takes long, stay below 5 ms


class Work:
    """A generator whose steps are taken until it ends or is cancelled.

    Args:
        steps: the first one, taken at once, does nothing but enter what ``close()`` is to leave: a
            generator that has not begun would just be dropped.
    """

    __slots__ = ("_running", "_steps", "ended")

    def __init__(self, steps: Generator[None, None, None]) -> None:
        self._steps = steps
        self._running = False
        self.ended = False
        next(steps)

    def step(self) -> None:
        """Takes one step. What the generator raises, it has ended with."""
        self._running = True
        try:
            next(self._steps)
        except StopIteration:
            self.ended = True
        except BaseException:
            self.ended = True
            raise
        finally:
            self._running = False
        if self.ended:  # cancelled by what the step has called, or by a signal handler
            self._steps.close()

    def cancel(self) -> None:
        """No more steps are taken: the generator is closed, at once or after the step that runs."""
        self.ended = True
        if not self._running:
            self._steps.close()


class Rota:
    """Whose turn it is, on one loop."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._works: deque[Work] = deque()
        self._scheduled = False

    def begin(self, steps: Generator[None, None, None]) -> Work:
        """Takes all steps, the first of them at once if nothing else is under way."""
        work = Work(steps)
        self._works.append(work)
        if not self._scheduled:
            self._turn()
        return work

    async def run(self, steps: Generator[None, None, T], drop: Callable[[T], object]) -> T:
        """Takes all steps; returns what the generator returns. A cancel closes the generator.

        Args:
            steps: the work.
            drop: lets go of what the generator has returned, if the cancel came too late for it.
        """
        future: Future[T] = self._loop.create_future()
        work = self.begin(_settle(future, steps, drop))
        try:
            return await future
        except BaseException:
            # The task is cancelled in the turn in which the work has ended: it never saw the result.
            if future.done() and not future.cancelled() and future.exception() is None:
                drop(future.result())
            raise
        finally:
            work.cancel()

    def _turn(self) -> None:
        self._scheduled = True  # nobody else begins a turn within this one
        end = perf_counter() + _TURN
        works = self._works
        try:
            while works:
                work = works.popleft()
                if not work.ended:
                    works.append(work)
                    work.step()
                if perf_counter() >= end:  # after a step: a turn without one would do nothing
                    break
        finally:
            self._scheduled = bool(works)
            if works:
                self._loop.call_soon(self._turn)


def _settle(
    future: Future[T], steps: Generator[None, None, T], drop: Callable[[T], object]
) -> Generator[None, None, None]:
    try:
        yield
        result = yield from steps
    except GeneratorExit:
        raise
    except BaseException as error:
        if not future.done():
            future.set_exception(error)
        if not isinstance(error, Exception):
            raise  # as a task does with Ctrl-C
    else:
        if future.done():  # cancelled, and who awaits it has not had a turn since
            drop(result)
        else:
            future.set_result(result)
