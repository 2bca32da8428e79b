"""In a worker: a client that is kept, and jobs that download objects and process them there.

Theory of operation. A worker runs one job at a time, in its main thread, and has no event loop. Such
a job runs one until it is done: it keeps some requests under way, and calls the function on the loop
as objects arrive; meanwhile the kernel receives what comes for the others. Loop and client stay, for
the next job, and end with the worker. What interrupts a job other than by an exception of its own
(a soft cancel) leaves the loop in an unknown state, so both are given up then.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .._memory import SharedBuffer
from ._client import Client, client, preload
from ._download import download
from ._together import together

preload()  # in the fork server, which imports this module for the first job: its workers share it


class _Site(NamedTuple):
    loop: asyncio.AbstractEventLoop
    client: Client


_sites: dict[bytes, _Site] = {}  # by the settings of their clients, as they were sent


class Batch(NamedTuple):
    """What all jobs of one stream have in common.

    Attributes:
        settings: of the client, pickled once.
        bucket: where the objects are.
        function: called with each key and its buffer.
        concurrency: requests at once.
        return_exceptions: whether an error is the result of its object, or the job's.
    """

    settings: bytes
    bucket: str
    function: Callable[[tuple[str, SharedBuffer]], Any]
    concurrency: int
    return_exceptions: bool


def process(batch: Batch, keys: Sequence[str]) -> list[Any]:
    """The results for these objects, in the order of their keys."""
    site = _site(batch.settings)
    results: list[Any] = [None] * len(keys)
    turns = iter(enumerate(keys))  # that the tasks share
    try:
        site.loop.run_until_complete(
            together(
                _take_turns(site.client, batch, turns, results)
                for _ in range(min(batch.concurrency, len(keys)))
            )
        )
    except Exception:
        raise
    except BaseException:
        del _sites[batch.settings]
        raise
    return results


def _site(settings: bytes) -> _Site:
    if settings not in _sites:
        loop = asyncio.new_event_loop()
        entering = client(**pickle.loads(settings)).__aenter__()
        _sites[settings] = _Site(loop, loop.run_until_complete(entering))
    return _sites[settings]


async def _take_turns(
    s3: Client, batch: Batch, turns: Iterator[tuple[int, str]], results: list[Any]
) -> None:
    for index, key in turns:
        try:
            buffer = await download(s3, batch.bucket, key)
            results[index] = batch.function((key, buffer))
        except Exception as error:
            if not batch.return_exceptions:
                raise
            results[index] = error
