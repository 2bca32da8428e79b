"""Content for S3 objects, what a test holds of it, waiting for it, and rules for the proxy."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.parts.s3_proxy import Rule, Seen, Spoilt

KIB = 1024
MIB = 1024 * KIB
PATIENCE = 30  # seconds, after which something hangs


@cache
def content(nbytes: int) -> bytes:
    """Bytes that nothing but their length decides."""
    return random.Random(nbytes).randbytes(nbytes)


def held_segments() -> int:
    """How many descriptors and mappings of segments this process has."""
    descriptors = (
        os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()
    )
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("asynclam" in name and "(deleted)" in name for name in [*descriptors, *maps])


async def until(condition: Callable[[], object]) -> None:
    """Lets the loop run until it is so."""

    async def turns() -> None:
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(turns(), PATIENCE)


def is_get(request: Seen) -> bool:
    return request.method == "GET"


def is_part(request: Seen) -> bool:
    """A part that is uploaded."""
    return request.method == "PUT" and "partNumber" in request.query


def nth(number: int, spoilt: Callable[[], Spoilt], of: Callable[[Seen], bool] = is_get) -> Rule:
    """Spoils the answer to one request of a kind, counted from 1."""
    seen = 0

    def rule(request: Seen) -> Spoilt | None:
        nonlocal seen
        seen += of(request)
        return spoilt() if of(request) and seen == number else None

    return rule


def every(spoilt: Callable[[], Spoilt], of: Callable[[Seen], bool] = is_get) -> Rule:
    """Spoils the answers to all requests of a kind."""
    return lambda request: spoilt() if of(request) else None
