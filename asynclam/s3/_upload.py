"""Uploads: one request for what is small, parts side by side for what is large or unknown.

What a part is made of never changes while it is sent: botocore reads it once to compute the
checksum, once to send it, and again for each retry.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable
from typing import TYPE_CHECKING, Any

from .._memory import SharedBuffer
from ._client import Client
from ._multipart import Multipart
from ._parts import SourceParts, ViewParts, body_of
from ._places import located

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHECKSUM = "CRC32"  # of which every Python has a fast one


async def upload(
    client: Client,
    bucket: str,
    key: str,
    data: Buffer | SharedBuffer | AsyncIterable[Buffer],
    *,
    if_none_match: str | None = None,
    if_match: str | None = None,
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> None:
    """The object is there once this returns, and whole: S3 verifies lengths and checksums (CRC32).

    What is longer than 8 MiB is uploaded in parts, four at a time.

    Args:
        client: an S3 client of aiobotocore.
        bucket: the name of the bucket.
        key: the name of the object; one that exists is replaced.
        data: a buffer, anything bytes-like that is contiguous, or an async iterable of such, of
            which five parts at most are in memory. Not to be changed until this returns.
        if_none_match: ``"*"``: only if there is no such object yet.
        if_match: only if the object that is there has this ETag.
        progress: called on the loop with the number of bytes that S3 has got since the last call.
        **settings: what both ``put_object`` and ``create_multipart_upload`` take, such as
            ``ContentType`` or ``Metadata``.

    Raises:
        TypeError: ``data`` is not bytes-like, or gives what is not.
        botocore.exceptions.ClientError: S3 refused, as with ``NoSuchBucket``, or with
            ``PreconditionFailed`` where a condition was not met.
        botocore.exceptions.BotoCoreError: the connection failed.

    An upload in parts that fails, or is cancelled, leaves nothing behind: it is aborted first, which
    takes a request; a RuntimeWarning tells if that fails. When the last request of it is under way
    already, a cancel waits for that, and the object may be there. So it may after the cancel of an
    upload in one request, which does not wait. A request whose answer is lost is sent again, and then a
    condition may not be met because of the very object that it has made.
    """
    wanted = {"IfNoneMatch": if_none_match, "IfMatch": if_match}
    conditions = {name: value for name, value in wanted.items() if value is not None}
    target = {"Bucket": bucket, "Key": key, "ChecksumAlgorithm": _CHECKSUM, **settings}
    parts = SourceParts(data) if isinstance(data, AsyncIterable) else ViewParts(data)
    with located(bucket, key):
        try:
            first = await parts.next()
            if await parts.exhausted():
                await client.put_object(Body=body_of(first.data), **target, **conditions)
                if progress:
                    progress(len(first.data))
            else:
                await Multipart(client, target, conditions, progress).run(first, parts)
        finally:
            await parts.aclose()
