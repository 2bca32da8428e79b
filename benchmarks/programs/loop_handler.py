"""The same handler with a loop, made at init, in which a coroutine runs."""

import asyncio  # noqa: F401
from typing import Any

import uvloop

_loop = uvloop.new_event_loop()


async def _job(number: int) -> int:
    return number * number


def handler(event: int, _context: Any) -> int:
    return _loop.run_until_complete(_job(event))
