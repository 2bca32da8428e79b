"""Small objects in bulk: workers fetch what they process, so that all cores sign and parse."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar, overload

from .._chunks import FixedLength
from .._default import default_executor
from .._executor import Executor
from .._memory import SharedBuffer
from .._streams import Stream, at_least_one
from . import _remote
from ._listing import Keys, names_of

T = TypeVar("T")
Function = Callable[[tuple[str, SharedBuffer]], T]


@overload
def process_many(
    bucket: str,
    keys: Keys,
    fn: Function[T],
    *,
    chunksize: int = 32,
    concurrency: int = 8,
    ordered: bool = False,
    return_exceptions: Literal[False] = False,
    executor: Executor | None = None,
    get_object: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Stream[T]: ...
@overload
def process_many(
    bucket: str,
    keys: Keys,
    fn: Function[T],
    *,
    chunksize: int = 32,
    concurrency: int = 8,
    ordered: bool = False,
    return_exceptions: bool,
    executor: Executor | None = None,
    get_object: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Stream[T | BaseException]: ...
def process_many(
    bucket: str,
    keys: Keys,
    fn: Function[Any],
    *,
    chunksize: int = 32,
    concurrency: int = 8,
    ordered: bool = False,
    return_exceptions: bool = False,
    executor: Executor | None = None,
    get_object: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Stream[Any]:
    """The results of ``fn`` for many small objects, which workers download themselves: a stream.

    It gives what ``map_cpu(fn, download_many(client, bucket, keys))`` gives. There the loop signs,
    requests and receives every object, nearly a millisecond each; here all workers do, each with
    a client of its own that it makes for its first job and keeps. For large objects that one is
    better: it overlaps, and keeps to a budget; a worker that downloads does not compute.

    Args:
        bucket: the name of the bucket.
        keys: the names of the objects, or what ``list_objects`` gives.
        fn: called in a worker with a key and its buffer, which are a tuple. It runs on the loop that
            downloads, so what computes for seconds takes the others the time to connect (5 s).
        chunksize: how many objects make one job, the unit of death and of cancellation.
        concurrency: how many requests a worker has under way.
        ordered: whether results come in the order of ``keys`` or job by job as these are done.
        return_exceptions: whether an error is the result of its object, or ends the stream.
        executor: whose workers it runs in; ``None``: the default executor's.
        get_object: settings of each request, as :func:`download` takes them.
        **settings: of the clients, as :func:`client` takes them; they must be picklable.

    Raises:
        ValueError: ``chunksize`` or ``concurrency`` is less than 1, or the executor has no workers
            (``max_workers=0``).
        TypeError: ``keys`` is one name.

    Leaving the stream, or cancelling what reads it, cancels its jobs, and their requests with them.
    """
    workers = default_executor() if executor is None else executor
    count = workers.statistics().max_workers
    if not count:
        raise ValueError(
            "process_many() needs worker processes, and this executor has max_workers=0; "
            "map_cpu(fn, download_many(client, bucket, keys)) runs without"
        )
    at_least_one("concurrency", concurrency)
    batch = _remote.Batch(
        pickle.dumps(settings), bucket, get_object or {}, fn, concurrency, return_exceptions
    )
    return Stream(
        "process_many",
        (names_of(keys),),
        partial(_start, workers, batch),
        FixedLength(at_least_one("chunksize", chunksize), 2 * count * chunksize),
        ordered=ordered,
        return_exceptions=return_exceptions,
    )


def _start(
    executor: Executor, batch: _remote.Batch, chunk: Any, _: int
) -> asyncio.Future[list[Any]]:
    job = executor.run_async(_remote.process, batch, chunk)
    return asyncio.get_running_loop().create_task(job)
