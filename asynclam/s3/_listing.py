"""Which objects a bucket has, page by page."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from datetime import datetime
from typing import NamedTuple

from ._client import Client
from ._places import located


class ObjectSummary(NamedTuple):
    """What S3 says of an object in a listing.

    Attributes:
        key: its name.
        size: its length in bytes.
        etag: which version it is, in quotes as S3 writes it.
        last_modified: when it was made.
    """

    key: str
    size: int
    etag: str
    last_modified: datetime


Keys = Iterable[str | ObjectSummary] | AsyncIterable[str | ObjectSummary]


async def names_of(keys: Keys) -> AsyncGenerator[str]:
    """The names alone; closes what they come from."""
    if not isinstance(keys, AsyncIterable):
        for item in keys:
            yield item if isinstance(item, str) else item.key
        return
    try:
        async for item in keys:
            yield item if isinstance(item, str) else item.key
    finally:
        if (close := getattr(keys, "aclose", None)) is not None:
            await close()


async def list_objects(
    client: Client, bucket: str, prefix: str = "", *, start_after: str = ""
) -> AsyncGenerator[ObjectSummary]:
    """The objects whose names begin with ``prefix``, in the order of their names.

    A page of up to 1,000 is asked for when the one before has been read:
    ``download_many(client, bucket, list_objects(client, bucket, "2013/"))`` lists as it downloads.

    Args:
        client: an S3 client of aiobotocore.
        bucket: the name of the bucket.
        prefix: of the names; all, if it is empty.
        start_after: only names behind this one, to go on where an earlier listing ended.

    Raises:
        botocore.exceptions.ClientError: S3 refused, as with ``NoSuchBucket``.
        botocore.exceptions.BotoCoreError: the connection failed.
    """
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=prefix, StartAfter=start_after
    )
    iterator = aiter(pages)
    while True:
        with located(bucket, prefix):
            page = await anext(iterator, None)
        if page is None:
            return
        for item in page.get("Contents", ()):
            yield ObjectSummary(item["Key"], item["Size"], item["ETag"], item["LastModified"])
