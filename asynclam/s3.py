"""S3 objects to where a worker sees them, and back, over aiobotocore.

A download goes from the socket into a :class:`~asynclam.SharedBuffer`, so a worker that is given it
reads it without a copy::

    async with s3.client() as client:
        buffer = await s3.download(client, "my-bucket", "my-key")
        result = await run_cpu(parse, buffer)

Every function takes any S3 client of aiobotocore. What fails raises the error of botocore, with the
bucket and the key in its message.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterable, Generator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from ._memory import SharedBuffer

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from ._streams import Stream

__all__ = ["client", "download", "download_many", "upload"]

Client: TypeAlias = Any  # aiobotocore makes the classes of its clients and bodies as it runs
Body: TypeAlias = Any

_CHUNK = 256 * 1024  # bytes; 1 KiB, the default of aiobotocore, is 6 to 10 times slower
_WHOLE = 1024 * 1024  # bytes; up to here an upload is simply copied
_CONNECT_TIMEOUT = 5  # seconds; the 60 of botocore outlast most Lambda functions
_READ_TIMEOUT = 30  # seconds without a byte


def client(*, max_concurrency: int = 32, **kwargs: Any) -> AbstractAsyncContextManager[Client]:
    """An S3 client for many requests at once: use it with ``async with``, best in a ``lifespan``.

    It retries in the standard mode, gives up on a connection after 5 seconds and on a silent server
    after 30. Making it blocks the loop for tens of milliseconds: make one, and keep it.

    Args:
        max_concurrency: connections that it may have open, so requests that really run at once.
        **kwargs: what aiobotocore's ``create_client`` takes, such as ``endpoint_url`` or
            ``region_name``; the settings in ``config`` win over those made here.

    Raises:
        ImportError: aiobotocore is not installed.
    """
    config_class, session = _aiobotocore()
    config = config_class(**_settings(config_class, max_concurrency))
    if (users := kwargs.pop("config", None)) is not None:
        config = config.merge(users)
    context: AbstractAsyncContextManager[Client] = session.create_client(
        "s3", config=config, **kwargs
    )
    return context


def _aiobotocore() -> tuple[Any, Any]:
    """The configuration class, and a session: its credentials have locks, which belong to a loop."""
    try:
        config, session = (import_module(f"aiobotocore.{name}") for name in ("config", "session"))
    except ModuleNotFoundError as error:
        raise ImportError('asynclam.s3 needs aiobotocore: pip install "asynclam[s3]"') from error
    new = session.get_session()
    new.register_component("data_loader", _loader())
    return config.AioConfig, new


@functools.cache
def _loader() -> Any:
    """What all sessions share: the service descriptions that were loaded, some 60 ms of JSON."""
    return import_module("aiobotocore.session").get_session().get_component("data_loader")


def _settings(config_class: Any, max_concurrency: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_pool_connections": max_concurrency,
        "retries": {"mode": "standard"},
        "connect_timeout": _CONNECT_TIMEOUT,
        "read_timeout": _READ_TIMEOUT,
    }
    if "warm_up_loader_caches" in inspect.signature(config_class).parameters:
        settings["warm_up_loader_caches"] = True  # in a thread, so the loop is blocked for less
    return settings


async def download(client: Client, bucket: str, key: str) -> SharedBuffer:
    """The whole object, in memory that a worker sees without a copy.

    Its length is always the one that S3 gave, and its checksum is verified where S3 sends one that
    botocore can compute (its ``response_checksum_validation``).

    Returns:
        a buffer of the object's size, the caller's to close or to drop.

    Raises:
        botocore.exceptions.ClientError: S3 refused, as with ``NoSuchKey``.
        botocore.exceptions.BotoCoreError: the connection failed, also in the middle
            (``ResponseStreamingError``, ``IncompleteReadError``), or the checksum does not match
            (``FlexibleChecksumError``).

    Cancelling it closes the connection and frees the memory.
    """
    with _located(bucket, key):
        response = await client.get_object(Bucket=bucket, Key=key)
        async with response["Body"]:
            return await _receive(response["Body"], _length_of(response))


def _length_of(response: Mapping[str, Any]) -> int:
    if (length := response.get("ContentLength")) is None:
        from botocore.exceptions import ResponseStreamingError

        raise ResponseStreamingError(error="the server did not say how long the object is")
    return int(length)


async def _receive(body: Body, nbytes: int) -> SharedBuffer:
    buffer = SharedBuffer(nbytes)
    try:
        # A view of its own, released: the traceback of an error would keep the memory otherwise.
        with memoryview(buffer.view) as view:
            await _fill(view, body)
    except BaseException:
        buffer.close()
        raise
    return buffer


async def _fill(view: memoryview, body: Body) -> None:
    filled = 0
    # Until it is empty: only then has the body compared its length and its checksum.
    while chunk := await body.read(_CHUNK):
        end = filled + len(chunk)
        if end > len(view):
            raise _wrong_length(end, len(view))
        view[filled:end] = chunk
        filled = end
    if filled != len(view):
        raise _wrong_length(filled, len(view))


def _wrong_length(actual: int, expected: int) -> Exception:
    from botocore.exceptions import IncompleteReadError

    error: Exception = IncompleteReadError(actual_bytes=actual, expected_bytes=expected)
    return error


async def upload(client: Client, bucket: str, key: str, data: Buffer | SharedBuffer) -> None:
    """The object is there once this returns, and whole: S3 verifies length and checksum.

    Args:
        client: an S3 client of aiobotocore.
        bucket: the name of the bucket.
        key: the name of the object; one that exists is replaced.
        data: a buffer, or anything bytes-like that is contiguous; not changed until this returns.

    Raises:
        TypeError: ``data`` is not bytes-like.
        botocore.exceptions.ClientError: S3 refused, as with ``NoSuchBucket``.
        botocore.exceptions.BotoCoreError: the connection failed.

    Cancelling it closes the connection; S3 keeps nothing of an object that is not complete.
    """
    body = _body_of(data)
    with _located(bucket, key):
        await client.put_object(Bucket=bucket, Key=key, Body=body)


def _body_of(data: Buffer | SharedBuffer) -> bytes | _Reader:
    if isinstance(data, bytes):
        return data
    view = data.view if isinstance(data, SharedBuffer) else _view_of(data)
    # botocore takes no memoryview, and a bytes object of it would be the whole object once more.
    return view.tobytes() if view.nbytes <= _WHOLE else _Reader(view.cast("B"))


def _view_of(data: Buffer) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        hint = "; encode it first: data.encode()" if isinstance(data, str) else ""
        raise TypeError(
            f"data must be bytes-like or a SharedBuffer, not {type(data).__name__}{hint}"
        ) from None
    if not view.c_contiguous:
        raise TypeError("data must be contiguous; copy it first: bytes(data)")
    return view


class _Reader:
    """A file over a view: botocore reads and seeks (to sign, to retry), aiohttp iterates.

    Not an ``io.IOBase``: aiohttp would read that in threads, 64 KiB each time.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def read(self, size: int | None = None) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._position + size
        chunk = self._view[self._position : end].tobytes()
        self._position += len(chunk)
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, len(self._view))[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if chunk := self.read(_CHUNK):
            return chunk
        raise StopAsyncIteration


@overload
def download_many(
    client: Client,
    bucket: str,
    keys: Iterable[str] | AsyncIterable[str],
    *,
    limit: int = 32,
    ordered: bool = False,
    return_exceptions: Literal[False] = False,
) -> Stream[tuple[str, SharedBuffer]]: ...
@overload
def download_many(
    client: Client,
    bucket: str,
    keys: Iterable[str] | AsyncIterable[str],
    *,
    limit: int = 32,
    ordered: bool = False,
    return_exceptions: bool,
) -> Stream[tuple[str, SharedBuffer] | BaseException]: ...
def download_many(
    client: Client,
    bucket: str,
    keys: Iterable[str] | AsyncIterable[str],
    *,
    limit: int = 32,
    ordered: bool = False,
    return_exceptions: bool = False,
) -> Stream[Any]:
    """Many objects as a stream of ``(key, buffer)``, as :func:`asynclam.map_io` gives them.

    ``map_cpu(parse, download_many(client, bucket, keys))`` parses some while it downloads others,
    and never has more than the two limits together in memory.

    Args:
        client: an S3 client of aiobotocore, made for at least ``limit`` requests at once.
        bucket: the name of the bucket.
        keys: the names of the objects; read no further ahead than ``limit``.
        limit: how many are downloaded, or wait to be taken, at once.
        ordered: whether they come in the order of ``keys`` or as they are complete.
        return_exceptions: whether an error takes the place of its object; if not, the first one
            ends the stream.

    Leaving the stream, or cancelling what reads it, closes the connections and frees the memory.
    """
    from ._streams import map_io

    async def fetch(key: str) -> tuple[str, SharedBuffer]:
        return key, await download(client, bucket, key)

    return map_io(fetch, keys, limit=limit, ordered=ordered, return_exceptions=return_exceptions)


@contextmanager
def _located(bucket: str, key: str) -> Generator[None]:
    """Puts the object's place into the errors of botocore, and those of aiohttp into botocore's."""
    try:
        yield
    except Exception as error:
        located = _with_place(error, f"s3://{bucket}/{key}")
        if located is error:
            raise
        raise located from error


def _with_place(error: Exception, place: str) -> Exception:
    from aiohttp import ClientPayloadError
    from botocore.exceptions import BotoCoreError, ClientError, ResponseStreamingError

    if isinstance(error, ClientPayloadError):  # a body cut off, which aiobotocore lets through
        cut_off: Exception = ResponseStreamingError(error=f"{error} ({place})")
        return cut_off
    if isinstance(error, ClientError):
        details = error.response.setdefault("Error", {})
        details["Message"] = f"{details.get('Message', 'Unknown')} ({place})"
        # Again, so that the message is made of the response, as it is when the error is unpickled.
        ClientError.__init__(error, error.response, error.operation_name)
    elif isinstance(error, BotoCoreError):
        _add_place(error, place)
    return error


def _add_place(error: Any, place: str) -> None:
    for name in {"error", "error_msg"} & error.kwargs.keys():  # of these it is made anew, likewise
        error.kwargs[name] = f"{error.kwargs[name]} ({place})"
    message = error.fmt.format(**error.kwargs)
    error.args = (message if place in message else f"{message} ({place})",)
