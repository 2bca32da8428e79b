"""What lives as long as a sandbox: an event loop, and in it the lifespan of a handler.

Theory of operation. Between two invocations the loop does not run, and the process is frozen. The
lifespan is entered and left in one task of its own, as cancel scopes in it require; that task waits
in between. Whatever task an invocation has begun and left is cancelled at its end, and has a moment to
end: else it would go on in the next invocation, with connections that are dead by then and the request
id of another. One that does not end takes the loop with it: the lifespan is left, the loop is closed,
and the next invocation begins with new ones. Nothing here waits longer than it is told to, but
:meth:`Sandbox.close`, which waits for the lifespan.

The tasks of the lifespan begin others while an invocation runs. They are known by a context variable,
which a task has from what has begun it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any
from weakref import WeakSet

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]
Task = asyncio.Task[Any]

# The tasks of the lifespan whose code runs here; in that of an invocation it is not set.
_tasks: ContextVar[WeakSet[Task] | None] = ContextVar("asynclam.tasks", default=None)

# Tasks that would not end, and whose loop is closed. If they were finalised, their code would run
# once more, without a loop, to swallow one exception more.
_abandoned: list[Task] = []


class Sandbox:
    """A loop in which a lifespan was entered.

    Args:
        lifespan: the context manager function; ``None`` for none.

    Raises:
        BaseException: what the lifespan raises when it is entered.
    """

    def __init__(self, lifespan: Lifespan | None) -> None:
        from ._loops import new_event_loop  # at the first invocation: workers import handlers, too

        self.loop = new_event_loop()
        self._resources = Resources(lifespan or _no_lifespan)
        self._before: set[Task] = set()
        self._stubborn: set[Task] = set()  # they were cancelled, and have not ended in time
        try:
            self.loop.run_until_complete(self._resources.enter())
        except BaseException:
            _close_loop(self.loop)
            raise

    @property
    def state(self) -> Any:
        """What the lifespan has yielded."""
        return self._resources.state

    @property
    def ended(self) -> bool:
        """Whether the lifespan has ended by itself: something in it has failed."""
        return self._resources.ended

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> Task:
        """Makes the task of an invocation."""
        self._before = asyncio.all_tasks(self.loop)
        return self.loop.create_task(coroutine)

    def run(self, task: Task) -> None:
        """Runs the loop until the task is done, or the loop was stopped.

        Raises:
            BaseException: what has left another task, or a callback, and would end the process.
        """
        try:
            self.loop.run_until_complete(task)
        except RuntimeError:
            if task.done():
                raise
            # stopped, because the task has had its time
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Has the loop forget that it is to stop.

        It was stopped in the turn in which the task has ended: its end, which is told in the next
        one, would stop what runs then. uvloop needs a turn to hear of it, and another to stop.
        """
        for _ in range(2):
            self.loop.stop()
            self.loop.run_forever()

    def left(self) -> set[Task]:
        """The tasks that the invocation has begun, and that have not ended.

        One of which nothing says whose it is counts, too: begun in a thread that has no context.
        """
        begun = asyncio.all_tasks(self.loop) - self._before
        return {task for task in begun if not self._resources.has(task)}

    def cancel_left(self, seconds: float) -> set[Task]:
        """Cancels what the invocation has left; those tasks that have not ended in time."""
        left = self.left()
        if left:
            self.loop.run_until_complete(_cancel(left, left, seconds))
        self._stubborn = {task for task in left if not task.done()}
        return self._stubborn

    def close(self) -> None:
        """Leaves the lifespan, cancels what still runs, and closes the loop.

        Raises:
            BaseException: what the lifespan raises.
        """
        try:
            self.loop.run_until_complete(self._resources.leave())
        finally:
            _close_loop(self.loop)

    def retire(self, seconds: float) -> None:
        """The same, all of it in so many seconds: what has not ended then is abandoned.

        Tasks that :meth:`cancel_left` has waited for in vain are not waited for again.

        Raises:
            BaseException: what the lifespan raises.
        """
        until = monotonic() + seconds
        try:
            self.loop.run_until_complete(self._resources.leave(seconds))
        finally:
            _close_loop(self.loop, until, self._stubborn)


class Resources:
    """The lifespan: entered and left in a task of its own, in which it waits in between."""

    def __init__(self, lifespan: Lifespan) -> None:
        self._lifespan = lifespan
        self.state: Any = None
        self._tasks: WeakSet[Task] = WeakSet()  # from Python 3.12 on it is a mark, and empty
        self._task: asyncio.Task[None]
        self._entered: asyncio.Future[None]
        self._leave: asyncio.Event

    async def enter(self) -> None:
        """Enters it.

        Raises:
            BaseException: what it raises.
        """
        self._leave = asyncio.Event()
        loop = asyncio.get_running_loop()
        _note_tasks(loop)
        self._entered = loop.create_future()
        self._task = asyncio.create_task(self._live())
        await asyncio.wait({self._task, self._entered}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            await self._task  # raises what the lifespan has raised

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self._task.done()

    def has(self, task: Task) -> bool:
        """Whether a task was begun by the lifespan, or by one of its tasks."""
        if sys.version_info >= (3, 12):  # pragma: no cover - a later Python
            return task.get_context().get(_tasks) is self._tasks
        return task in self._tasks

    async def _live(self) -> None:
        _tasks.set(self._tasks)
        async with self._lifespan() as self.state:
            self._entered.set_result(None)
            await self._leave.wait()

    async def leave(self, seconds: float | None = None) -> None:
        """Leaves it; what has not ended in so many seconds is left to be cancelled."""
        self._leave.set()
        await asyncio.wait({self._task}, timeout=seconds)
        if self._task.done():
            await self._task


def _note_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Has the tasks of lifespans noted when they are begun: until Python 3.11 none tells its context.

    Not by a task factory: users set their own.
    """
    if sys.version_info >= (3, 12):  # pragma: no cover - a later Python
        return
    create_task = loop.create_task

    def create_and_note(coroutine: Coroutine[Any, Any, Any], **options: Any) -> Task:
        task = create_task(coroutine, **options)
        context = options.get("context")
        tasks = _tasks.get() if context is None else context.get(_tasks)
        if tasks is not None:
            tasks.add(task)
        return task

    loop.create_task = create_and_note  # type: ignore[method-assign, assignment]


@asynccontextmanager
async def _no_lifespan() -> AsyncIterator[None]:
    yield None


def _close_loop(
    loop: asyncio.AbstractEventLoop,
    until: float | None = None,
    stubborn: Iterable[Task] = (),
) -> None:
    """Cancels what still runs on the loop, as ``asyncio.run()`` does, and closes it.

    Args:
        loop: does not run.
        until: when to wait no longer, by the monotonic clock.
        stubborn: the tasks that are not waited for.
    """
    try:
        loop.run_until_complete(_end_all(loop, until, stubborn))
    finally:
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _abandoned.append(task)
        loop.close()


async def _end_all(
    loop: asyncio.AbstractEventLoop, until: float | None, stubborn: Iterable[Task]
) -> None:
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
    await _cancel(tasks, tasks.difference(stubborn), _left(until))
    generators = asyncio.ensure_future(loop.shutdown_asyncgens())
    await asyncio.wait({generators}, timeout=_left(until))


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - monotonic())


async def _cancel(tasks: set[Task], awaited: set[Task], seconds: float | None) -> None:
    """Cancels tasks, and waits until some of them have ended, or so many seconds."""
    for task in tasks:
        task.cancel()
    if awaited:
        await asyncio.wait(awaited, timeout=seconds)
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            context = {"message": "a task failed while it was cancelled", "task": task}
            asyncio.get_running_loop().call_exception_handler({**context, "exception": error})
