"""Many objects: as a stream, with no more of them in memory than a number of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Literal, overload

from .._chunks import FixedLength
from .._memory import SharedBuffer
from .._streams import Stream, at_least_one
from ._budget import Budget, default_budget
from ._client import Client
from ._download import Progress, fetch
from ._listing import Keys, names_of

_SHARE = 3  # of a client's connections that a stream may hold while it waits for its turn


@overload
def download_many(
    client: Client,
    bucket: str,
    keys: Keys,
    *,
    limit: int = 32,
    budget: int | None = None,
    ordered: bool = False,
    return_exceptions: Literal[False] = False,
    progress: Progress | None = None,
    on_object: Callable[[str, int], object] | None = None,
    **settings: Any,
) -> Stream[tuple[str, SharedBuffer]]: ...
@overload
def download_many(
    client: Client,
    bucket: str,
    keys: Keys,
    *,
    limit: int = 32,
    budget: int | None = None,
    ordered: bool = False,
    return_exceptions: bool,
    progress: Progress | None = None,
    on_object: Callable[[str, int], object] | None = None,
    **settings: Any,
) -> Stream[tuple[str, SharedBuffer] | BaseException]: ...
def download_many(
    client: Client,
    bucket: str,
    keys: Keys,
    *,
    limit: int = 32,
    budget: int | None = None,
    ordered: bool = False,
    return_exceptions: bool = False,
    progress: Progress | None = None,
    on_object: Callable[[str, int], object] | None = None,
    **settings: Any,
) -> Stream[Any]:
    """Many objects as a stream of ``(key, buffer)``, as :func:`asynclam.map_io` gives them.

    ``map_cpu(parse, download_many(client, bucket, keys))`` parses some while it downloads others.
    An object counts against the budget from before its memory is taken until no process has it any
    more: drop the buffers, or close them, or the stream waits (a RuntimeWarning tells). Nor may
    ``map_cpu`` be told to wait for more of them (``chunksize``) than the budget holds. Only a list,
    which keeps all objects (``await download_many(...)``), is made without a budget.

    Args:
        client: an S3 client of aiobotocore, made for at least ``limit`` requests at once.
        bucket: the name of the bucket.
        keys: the names of the objects, or what ``list_objects`` gives; read no further ahead than
            ``limit``.
        limit: how many are downloaded, or wait to be taken, at once.
        budget: how many bytes of objects there may be at once, in all processes. ``None``: a
            quarter of the memory (on Lambda: of the function's). A larger object comes alone.
        ordered: whether they come in the order of ``keys`` or as they are complete.
        return_exceptions: whether an error takes the place of its object; if not, the first one
            ends the stream.
        progress: called on the loop with the number of bytes that have come since the last call.
        on_object: called on the loop with the key and the length of each object that is complete.
        **settings: of each request, as :func:`download` takes them.

    Raises:
        ValueError: ``limit`` or ``budget`` is less than 1.
        TypeError: ``keys`` is one name.

    Leaving the stream, or cancelling what reads it, closes the connections and frees the memory.
    """
    if budget is not None:
        at_least_one("budget", budget)

    async def download(turn: int, key: str, budget: Budget) -> list[tuple[str, SharedBuffer]]:
        await budget.begin(turn)
        memory_for = partial(budget.buffer, turn)
        buffer = await fetch(
            client, bucket, key, settings, memory_for=memory_for, progress=progress
        )
        if on_object:
            on_object(key, buffer.nbytes)
        return [(key, buffer)]

    if budget is None:
        budget = default_budget()
    downloads = _Downloads(keys, download, client, budget, ordered=ordered)
    return _DownloadStream(downloads, at_least_one("limit", limit), ordered, return_exceptions)


class _Downloads:
    """Those of one stream, and the budget that they share for as long as any is under way."""

    def __init__(
        self,
        keys: Keys,
        download: Callable[..., Any],
        client: Client,
        budget: int | None,
        *,
        ordered: bool,
    ) -> None:
        self._names = names_of(keys)
        self._download = download
        self._client = client
        self._limit = budget
        self._ordered = ordered
        self._budget: Budget | None = None  # made on the loop
        self._source_ended = False
        self._running = 0

    def lift_budget(self) -> None:
        self._limit = None

    async def keys(self) -> AsyncGenerator[str]:
        try:
            async with aclosing(self._names) as names:
                async for name in names:
                    yield name
        finally:
            self._source_ended = True
            self._close_if_done()

    def start(self, chunk: Any, turn: int) -> asyncio.Future[list[Any]]:
        if self._budget is None:
            held = self._client.meta.config.max_pool_connections // _SHARE
            self._budget = Budget(self._limit, in_order=self._ordered, most_held=held)
        self._running += 1
        task = asyncio.get_running_loop().create_task(self._download(turn, chunk[0], self._budget))
        task.add_done_callback(partial(self._done, turn))
        return task

    def _done(self, turn: int, _: object) -> None:
        assert self._budget is not None
        self._budget.pass_turn(turn)
        self._running -= 1
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._source_ended and not self._running and self._budget is not None:
            self._budget.close()


class _DownloadStream(Stream[Any]):
    def __init__(
        self, downloads: _Downloads, limit: int, ordered: bool, return_exceptions: bool
    ) -> None:
        super().__init__(
            "download_many",
            (downloads.keys(),),
            downloads.start,
            FixedLength(1, limit),
            ordered=ordered,
            return_exceptions=return_exceptions,
        )
        self._downloads = downloads

    async def list(self) -> list[Any]:
        """All of them, without a budget: a list keeps what it has."""
        self._downloads.lift_budget()
        return await super().list()
