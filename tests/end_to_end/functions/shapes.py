"""Functions for the shapes of Lambda in which asynclam has to be at home."""

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import asynclam
from asynclam import lambda_handler, run_cpu, state

_lives: list[str] = []


@asynccontextmanager
async def lifespan() -> AsyncIterator[int]:
    _lives.append("entered")
    yield await run_cpu(os.getpid)
    _lives.append("left")


def look(_: int) -> tuple[int, float]:
    """What a worker is: its pid, and the next number of its random state."""
    return os.getpid(), random.random()


@lambda_handler(lifespan=lifespan)
async def handler(event: Any, context: Any) -> dict[str, Any]:
    """Returns what this sandbox has been through."""
    del event, context
    pid, number = await run_cpu(look, 0)
    return {
        "lives": list(_lives),
        "at the start": state(),
        "worker": pid,
        "random": [random.random(), number],
        "pid": os.getpid(),
        "workers": asynclam.environment().max_workers,
        "thread": threading.current_thread() is threading.main_thread(),
    }


def look_at_trace() -> tuple[int, str | None]:
    """Which worker this is, and what it believes to be traced."""
    return os.getpid(), os.environ.get("_X_AMZN_TRACE_ID")


@lambda_handler
async def meet(event: int, context: Any) -> dict[str, Any]:
    """Ends when who listens at that port of this machine lets it go."""
    reader, writer = await asyncio.open_connection("127.0.0.1", event)
    await reader.read()
    writer.close()
    worker, trace = await run_cpu(look_at_trace)
    request = context.aws_request_id
    return {"pid": os.getpid(), "worker": worker, "trace": trace, "request": request}


random.seed(1)  # what the snapshot has, and every sandbox that is restored from it
handler.start()


def in_a_thread(event: Any, context: Any) -> Any:
    """The handler in a thread that is not the main one, as durable functions call it."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(handler, event, context).result()


def steps_in_threads(event: int, context: Any) -> list[int]:
    """Steps in threads, each with an event loop of its own that awaits CPU work."""
    del context

    def step(number: int) -> int:
        return asyncio.run(run_cpu(pow, number, 2))

    with ThreadPoolExecutor(4) as executor:
        return list(executor.map(step, range(event)))
