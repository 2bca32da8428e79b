"""Uploads: whole or not at all, in one request or in parts, and never an upload left open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError

from asynclam import SharedBuffer, s3
from asynclam.s3 import _parts
from tests.parts.s3_objects import KIB, MIB, PATIENCE, content, every, is_part, nth
from tests.parts.s3_proxy import Seen, Spoilt

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Behind

PART = 5 * MIB  # the least that S3 takes
LARGE = PART + 1000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """A little more than five megabytes are two parts."""
    monkeypatch.setattr(_parts, "PART", PART)


async def pieces(data: bytes, length: int) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), length):
        yield data[begin : begin + length]


async def open_uploads(client: Any, bucket: str) -> list[str]:
    found = await client.list_multipart_uploads(Bucket=bucket)
    return [upload["Key"] for upload in found.get("Uploads", ())]


async def is_there(client: Any, bucket: str, key: str, data: bytes) -> bool:
    with await s3.download(client, bucket, key) as buffer:
        return buffer.view == data


def is_creation(request: Seen) -> bool:
    return request.method == "POST" and request.query.startswith("uploads")


def is_completion(request: Seen) -> bool:
    return request.method == "POST" and "uploadId" in request.query


def is_abort(request: Seen) -> bool:
    return request.method == "DELETE"


@pytest.mark.parametrize("nbytes", [0, PART, LARGE])
async def test_all_sizes_in_all_ways(behind: Behind, bucket: str, nbytes: int) -> None:
    """Bytes, a buffer, and an async iterable of odd pieces make the same object."""
    data = content(nbytes)
    async with behind() as (proxy, client):
        with SharedBuffer(nbytes) as buffer:
            if nbytes:
                buffer.view[:] = data
            for number, source in enumerate((data, buffer, pieces(data, 700_001))):
                proxy.requests.clear()
                seen: list[int] = []
                key = f"upload-{nbytes}-{number}"
                await s3.upload(client, bucket, key, source, progress=seen.append)
                parts = sum(map(is_part, proxy.requests))
                assert parts == (0 if nbytes <= PART else -(-nbytes // PART))
                assert sum(seen) == nbytes
                assert await is_there(client, bucket, key, data)


async def test_checksums_are_sent(behind: Behind, bucket: str) -> None:
    """With one request and with parts: S3 verifies, and keeps one of the whole object."""
    async with behind() as (_, client):
        for nbytes in (KIB, LARGE):
            await s3.upload(client, bucket, "sent", content(nbytes))
            head = await client.head_object(Bucket=bucket, Key="sent", ChecksumMode="ENABLED")
            assert head["ChecksumCRC32"]
            assert "-" not in head["ChecksumCRC32"]


async def test_settings_reach_the_object(s3_client: Any, bucket: str) -> None:
    """What ``put_object`` takes is taken, with one request and with parts."""
    for nbytes in (KIB, LARGE):
        settings = {"ContentType": "text/csv", "Metadata": {"year": "2013"}}
        await s3.upload(s3_client, bucket, "typed", content(nbytes), **settings)
        head = await s3_client.head_object(Bucket=bucket, Key="typed")
        assert (head["ContentType"], head["Metadata"]) == ("text/csv", {"year": "2013"})


@pytest.mark.parametrize("nbytes", [KIB, LARGE])
async def test_conditions(s3_client: Any, bucket: str, nbytes: int) -> None:
    """An object that is there is kept, and one that has changed is not replaced."""
    key = f"conditional-{nbytes}"
    await s3.upload(s3_client, bucket, key, content(nbytes), if_none_match="*")
    with pytest.raises(ClientError, match=f"PreconditionFailed.*s3://{bucket}/{key}"):
        await s3.upload(s3_client, bucket, key, b"x" * nbytes, if_none_match="*")
    assert await is_there(s3_client, bucket, key, content(nbytes))
    etag = (await s3_client.head_object(Bucket=bucket, Key=key))["ETag"]
    await s3.upload(s3_client, bucket, key, b"y" * nbytes, if_match=etag)
    with pytest.raises(ClientError, match="PreconditionFailed"):
        await s3.upload(s3_client, bucket, key, b"z" * nbytes, if_match=etag)
    assert await is_there(s3_client, bucket, key, b"y" * nbytes)
    assert not await open_uploads(s3_client, bucket)
    await s3_client.delete_object(Bucket=bucket, Key=key)  # for the other loop


@pytest.mark.parametrize(
    "spoilt", [Spoilt(503, "SlowDown"), Spoilt(lost=True)], ids=["503", "lost"]
)
async def test_a_part_is_sent_again(behind: Behind, bucket: str, spoilt: Spoilt) -> None:
    """Only that part, and from its beginning."""
    async with behind(nth(2, lambda: spoilt, is_part)) as (proxy, client):
        await s3.upload(client, bucket, "again", content(LARGE))
        assert sum(map(is_part, proxy.requests)) == 3
        assert await is_there(client, bucket, "again", content(LARGE))
        assert not await open_uploads(client, bucket)


@pytest.mark.parametrize("source", ["view", "iterable"])
@pytest.mark.parametrize(
    ("spoilt", "of", "error"),
    [
        (Spoilt(503, "SlowDown"), is_creation, ClientError),
        (Spoilt(403, "AccessDenied"), is_part, ClientError),
        (Spoilt(lost=True), is_part, ConnectionClosedError),
        (Spoilt(400, "BadDigest"), is_part, ClientError),
        (Spoilt(403, "AccessDenied"), is_completion, ClientError),
    ],
    ids=["creation", "refused", "lost", "digest", "completion"],
)
async def test_an_error_leaves_nothing_open(
    behind: Behind, bucket: str, source: str, spoilt: Spoilt, of: Any, error: type[Exception]
) -> None:
    """Whichever request fails for good, the upload is aborted before the error is raised."""
    data = content(LARGE)
    async with behind(every(lambda: spoilt, of)) as (_, client):
        with pytest.raises(error):
            await s3.upload(
                client, bucket, "failed", data if source == "view" else pieces(data, MIB)
            )
        assert not await open_uploads(client, bucket)
        with pytest.raises(client.exceptions.NoSuchKey):
            await s3.download(client, bucket, "failed")


async def test_a_source_that_fails_leaves_nothing_open(s3_client: Any, bucket: str) -> None:
    """Its error is raised as itself, after the upload was aborted and the source closed."""
    closed = []

    async def source() -> AsyncIterator[bytes]:
        try:
            yield content(PART)
            yield content(MIB)
            raise LookupError("the source")
        finally:
            closed.append(True)

    with pytest.raises(LookupError, match="the source"):
        await s3.upload(s3_client, bucket, "failed-source", source())
    assert closed
    assert not await open_uploads(s3_client, bucket)


async def test_a_source_of_text_is_refused(s3_client: Any, bucket: str) -> None:
    """With the remedy in the message; and nothing is left open."""

    async def source() -> AsyncIterator[Any]:
        yield content(PART + 1)
        yield "text"

    with pytest.raises(TypeError, match=r"data\.encode\(\)"):
        await s3.upload(s3_client, bucket, "text", source())
    assert not await open_uploads(s3_client, bucket)


@pytest.mark.parametrize("of", [is_creation, is_part], ids=["creation", "part"])
async def test_a_cancel_leaves_nothing_open(behind: Behind, bucket: str, of: Any) -> None:
    """Also one that comes while the upload is being created, whose answer it waits for."""
    reached, go = asyncio.Event(), asyncio.Event()

    def rule(request: Seen) -> Spoilt | None:
        if of(request):
            reached.set()
            return Spoilt(before=go.wait)
        return None

    async with behind(rule) as (_, client):
        upload = asyncio.ensure_future(s3.upload(client, bucket, "cancelled", content(LARGE)))
        await asyncio.wait_for(reached.wait(), PATIENCE)
        for _ in range(3):
            upload.cancel()
            await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.wait([upload]), PATIENCE) and upload.result()
        assert not await open_uploads(client, bucket)


async def test_a_cancel_waits_for_the_completion(behind: Behind, bucket: str) -> None:
    """Nobody could tell otherwise what became of the object."""
    reached, go = asyncio.Event(), asyncio.Event()

    def rule(request: Seen) -> Spoilt | None:
        if is_completion(request):
            reached.set()
            return Spoilt(before=go.wait)
        return None

    async with behind(rule) as (_, client):
        upload = asyncio.ensure_future(s3.upload(client, bucket, "completed", content(LARGE)))
        await asyncio.wait_for(reached.wait(), PATIENCE)
        upload.cancel()
        await asyncio.sleep(0)
        assert not upload.done()
        go.set()
        await asyncio.wait_for(asyncio.wait([upload]), PATIENCE)
        assert upload.cancelled()
        assert await is_there(client, bucket, "completed", content(LARGE))
        assert not await open_uploads(client, bucket)


async def test_an_abort_that_fails_is_told(behind: Behind, s3_client: Any, bucket: str) -> None:
    """With the upload's identifier, because only that can end it; the error is the first one."""

    def rule(request: Seen) -> Spoilt | None:
        refused = is_part(request) or is_abort(request)
        return Spoilt(403, "AccessDenied") if refused else None

    async with behind(rule) as (_, client):
        with (
            pytest.warns(RuntimeWarning, match=f"s3://{bucket}/stuck could not be aborted"),
            pytest.raises(ClientError, match="UploadPart"),
        ):
            await s3.upload(client, bucket, "stuck", content(LARGE))
    found = await s3_client.list_multipart_uploads(Bucket=bucket)
    (upload,) = found["Uploads"]
    await s3_client.abort_multipart_upload(Bucket=bucket, Key="stuck", UploadId=upload["UploadId"])


async def test_a_source_is_read_no_further_than_it_is_sent(behind: Behind, bucket: str) -> None:
    """While no part gets through, no more than those under way are taken from the source."""
    go = asyncio.Event()
    taken = 0
    waiting = asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(7):
            taken += 1
            yield content(PART)

    def rule(request: Seen) -> Spoilt | None:
        if is_part(request):
            if sum(map(is_part, proxy.requests)) == 4:
                waiting.set()
            return Spoilt(before=go.wait)
        return None

    async with behind(rule) as (proxy, client):
        upload = asyncio.ensure_future(s3.upload(client, bucket, "bounded", source()))
        await asyncio.wait_for(waiting.wait(), PATIENCE)
        for _ in range(20):
            await asyncio.sleep(0)
        assert taken <= 5
        go.set()
        await upload
        assert await is_there(client, bucket, "bounded", content(PART) * 7)


async def test_parts_grow_where_the_end_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand parts of one length would end at 80 GiB."""
    monkeypatch.setattr(_parts, "_DOUBLED", 2)
    monkeypatch.setattr(_parts, "PART", 10)
    parts = _parts.SourceParts(pieces(bytes(100), 7))
    lengths = []
    while not await parts.exhausted():
        lengths.append(len((await parts.next()).data))
    assert lengths == [10, 10, 20, 20, 40]


def test_parts_are_as_long_as_their_number_allows() -> None:
    """What is known to be huge has ten thousand parts, not more."""
    parts = _parts.ViewParts(memoryview(bytes(1)))
    assert parts._length == _parts.PART
    length = 10_000 * PART + 1

    class Huge:
        def cast(self, _: str) -> Huge:
            return self

        def __len__(self) -> int:
            return length

    buffer = SharedBuffer(0)
    buffer._view = Huge()  # type: ignore[assignment]
    assert _parts.ViewParts(buffer)._length * 10_000 >= length
