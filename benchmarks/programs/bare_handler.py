"""A handler that imports what an asynchronous one needs, and uses none of it."""

import asyncio  # noqa: F401
from typing import Any

import uvloop  # noqa: F401


def handler(event: int, _context: Any) -> int:
    return event * event
