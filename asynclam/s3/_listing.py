"""Which objects a bucket has, page by page."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from datetime import datetime
from typing import Any, NamedTuple

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


def names_of(keys: Keys) -> AsyncGenerator[str]:
    """The names alone; closes what they come from.

    Raises:
        TypeError: it is one name, which would be taken for as many as it has characters.
    """
    if isinstance(keys, str | ObjectSummary):
        raise TypeError(f"keys is an iterable of names, and this is one name; give it [{keys!r}]")
    return _names(keys)


async def _names(keys: Keys) -> AsyncGenerator[str]:
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
    client: Client, bucket: str, prefix: str = "", *, start_after: str = "", **settings: Any
) -> AsyncGenerator[ObjectSummary]:
    """The objects whose names begin with ``prefix``, in the order of their names.

    (A directory bucket, of S3 Express One Zone, gives them in no order, and knows no ``start_after``.) A page of up to 1,000 is asked for when the one before has been read:
    ``download_many(client, bucket, list_objects(client, bucket, "2013/"))`` lists as it downloads.

    Args:
        client: an S3 client of aiobotocore.
        bucket: the name of the bucket.
        prefix: of the names; all, if it is empty.
        start_after: only names behind this one, to go on where an earlier listing ended.
        **settings: what ``list_objects_v2`` takes, such as ``RequestPayer``.

    Raises:
        botocore.exceptions.ClientError: S3 refused, as with ``NoSuchBucket``.
        botocore.exceptions.BotoCoreError: the connection failed.
    """
    if start_after:
        settings["StartAfter"] = start_after
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix=prefix, **settings
    )
    iterator = aiter(pages)
    while True:
        with located(bucket, prefix):
            page = await anext(iterator, None)
        if page is None:
            return
        for item in page.get("Contents", ()):
            yield ObjectSummary(item["Key"], item["Size"], item["ETag"], item["LastModified"])
