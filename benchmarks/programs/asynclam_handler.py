"""The same handler with a job in a worker of asynclam."""

import asyncio  # noqa: F401
from typing import Any

import uvloop  # noqa: F401

from asynclam import lambda_handler, run_cpu


def job(number: int) -> int:
    return number * number


@lambda_handler
async def handler(event: int, _context: Any) -> int:
    return await run_cpu(job, event)


handler.start()
