"""Several coroutines side by side: all of them, or the first error and none of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Iterable
from typing import Any

from .._grace import shield


async def together(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs them side by side until all are done.

    The first error, or a cancel, cancels the rest; it is raised when they have ended. (A task group
    would wrap it into an exception group.)
    """
    tasks = {asyncio.ensure_future(coroutine) for coroutine in coroutines}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await cancelled(tasks)


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended, however often that is cancelled itself."""
    every = set(tasks)
    for task in every:
        task.cancel()
    await ended(every)


async def ended(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Waits until all are done, whatever came of them; only then is a cancel of the wait raised."""
    waiting = {task for task in tasks if not task.done()}
    cancel: asyncio.CancelledError | None = None
    while waiting:
        try:
            with shield():
                _, waiting = await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancel = error
            waiting = {task for task in waiting if not task.done()}
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen, so that nothing is logged of it
    if cancel is not None:
        raise cancel
