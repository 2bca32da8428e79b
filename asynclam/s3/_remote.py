"""In a worker: a client that is kept, and jobs that download objects and process them there.

Theory of operation. Such a job is a coroutine: it keeps some requests under way, and calls the function
on the worker's loop as objects arrive; meanwhile the kernel receives what comes for the others, and
those of the job beside it. The client belongs to that loop, so it is there for the next job, and ends
with the worker.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .._call import name_of
from .._errors import JobExitError
from .._memory import SharedBuffer
from ._client import Client, client
from ._download import download
from ._session import preload
from ._together import together

preload()  # in the fork server, which imports this module for the first job: its workers share it

_clients: dict[bytes, asyncio.Task[Client]] = {}  # by their settings, as they were sent


class Batch(NamedTuple):
    """What all jobs of one stream have in common.

    Attributes:
        settings: of the client, pickled once.
        bucket: where the objects are.
        get_object: settings of each request.
        function: called with each key and its buffer.
        concurrency: requests at once.
        return_exceptions: whether an error is the result of its object, or the job's.
    """

    settings: bytes
    bucket: str
    get_object: Mapping[str, Any]
    function: Callable[[tuple[str, SharedBuffer]], Any]
    concurrency: int
    return_exceptions: bool


async def process(batch: Batch, keys: Sequence[str]) -> list[Any]:
    """The results for these objects, in the order of their keys."""
    s3 = await _client(batch.settings)
    results: list[Any] = [None] * len(keys)
    turns = iter(enumerate(keys))  # that the tasks share
    await together(
        _take_turns(s3, batch, turns, results) for _ in range(min(batch.concurrency, len(keys)))
    )
    return results


async def _client(settings: bytes) -> Client:
    """The client with these settings; made once, also if several jobs ask for it meanwhile."""
    making = _clients.get(settings)
    if making is None or (making.done() and (making.cancelled() or making.exception())):
        entering = client(**pickle.loads(settings)).__aenter__()
        making = _clients[settings] = asyncio.ensure_future(entering)
    return await asyncio.shield(making)  # a job that is cancelled is not the only one


async def _take_turns(
    s3: Client, batch: Batch, turns: Iterator[tuple[int, str]], results: list[Any]
) -> None:
    for index, key in turns:
        try:
            buffer = await download(s3, batch.bucket, key, **batch.get_object)
            results[index] = batch.function((key, buffer))
        except Exception as error:
            if not batch.return_exceptions:
                raise
            results[index] = error
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            left = JobExitError(name_of(batch.function), error)
            if not batch.return_exceptions:
                raise left from error
            results[index] = left
