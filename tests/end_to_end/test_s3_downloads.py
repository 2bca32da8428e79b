"""Downloads when the network and S3 misbehave: exact bytes or an error, and nothing kept."""

from __future__ import annotations

import asyncio
import pickle
import uuid
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    FlexibleChecksumError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from asynclam import SharedBuffer, s3
from asynclam.s3 import _download
from tests.parts.s3_objects import (
    KIB,
    MIB,
    PATIENCE,
    content,
    every,
    held_segments,
    nth,
)  # fmt: skip
from tests.parts.s3_proxy import Spoilt

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Behind

SIZES = [1, 64 * KIB, MIB]
RANGE = 128 * KIB  # so that a megabyte is eight ranges


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> None:
    """What is larger than a quarter of a megabyte is read in parallel."""
    monkeypatch.setattr(_download, "_ONE_STREAM", 2 * RANGE)
    monkeypatch.setattr(_download, "_RANGE", RANGE)


async def try_each(
    behind: Behind,
    bucket: str,
    spoilt: Callable[[int], Spoilt],
    rule: Callable[..., Any],
    error: type[Exception] | None,
    **settings: Any,
) -> None:
    """Downloads each size with that fault; expects the error, or exact bytes."""
    async with behind(**settings) as (proxy, client):
        for size in SIZES:
            key = f"faulty-{size}"
            proxy.rule = lambda _: None
            await s3.upload(client, bucket, key, content(size))
            before = held_segments()
            proxy.rule = rule(partial(spoilt, size))
            download = asyncio.wait_for(s3.download(client, bucket, key), PATIENCE)
            if error is None:
                with await download as buffer:
                    assert buffer.view == content(size)
            else:
                with pytest.raises(error, match=f"s3://{bucket}/{key}") as caught:
                    await download
                assert f"{bucket}/{key}" in str(pickle.loads(pickle.dumps(caught.value)))
                assert held_segments() == before  # with the traceback still there


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_what_breaks_off_is_read_on(behind: Behind, bucket: str, number: int) -> None:
    """A connection that is lost in the middle of any answer costs the rest of that range."""
    cut = lambda size: Spoilt(cut=min(size, RANGE) // 2)
    await try_each(behind, bucket, cut, partial(nth, number), None)


async def test_only_the_rest_of_the_range_is_asked_for_again(behind: Behind, bucket: str) -> None:
    """Bytes that have come do not come twice, and are reported once."""
    seen = []
    async with behind() as (proxy, client):
        await s3.upload(client, bucket, "rest", content(MIB))
        proxy.requests.clear()
        proxy.rule = nth(2, lambda: Spoilt(cut=100))
        buffer = await s3.download(client, bucket, "rest", progress=seen.append)
    assert buffer.view == content(MIB)
    ranges = [request.headers.get("Range") for request in proxy.requests]
    first = next(wanted for wanted in ranges if wanted)
    begin, end = map(int, first.removeprefix("bytes=").split("-"))
    assert f"bytes={begin + 100}-{end}" in ranges
    assert len(ranges) == MIB // RANGE + 1
    assert sum(seen) == MIB


@pytest.mark.parametrize(("least", "requests"), [(128, 8), (32, 16), (16, 16), (4, 64)])
async def test_ranges_grow_with_the_object(
    behind: Behind, bucket: str, monkeypatch: pytest.MonkeyPatch, least: int, requests: int
) -> None:
    """A large object takes sixteen requests, and more where ranges would be too long."""
    monkeypatch.setattr(_download, "_RANGE", least * KIB)
    async with behind() as (proxy, client):
        await s3.upload(client, bucket, "grown", content(MIB))
        proxy.requests.clear()
        buffer = await s3.download(client, bucket, "grown")
    assert buffer.view == content(MIB)
    assert len(proxy.requests) == requests


async def test_settings_reach_every_request(behind: Behind, bucket: str) -> None:
    """Also those for further ranges, for where parts end, of a listing, and of many downloads."""
    async with behind() as (proxy, client):
        await s3.upload(client, bucket, "settings/small", content(KIB))
        in_parts = content(9 * MIB)  # with a checksum of the parts' checksums
        await s3.upload(client, bucket, "settings/parts", in_parts, ChecksumAlgorithm="SHA256")
        proxy.requests.clear()
        payer = {"RequestPayer": "requester"}
        listing = s3.list_objects(client, bucket, "settings/", **payer)
        downloads = await s3.download_many(client, bucket, listing, **payer)
        assert {buffer.nbytes for _, buffer in downloads} == {KIB, len(in_parts)}
        await s3.download(client, bucket, "settings/small", **payer)
        assert {request.method for request in proxy.requests} == {"GET", "HEAD"}
        assert any(request.headers.get("Range") for request in proxy.requests)
        for request in proxy.requests:
            assert request.headers["x-amz-request-payer"] == "requester"


async def test_a_version_of_an_object(s3_client: Any) -> None:
    """Every version can be had, also when another has replaced it."""
    bucket = f"versions-{uuid.uuid4()}"
    await s3_client.create_bucket(Bucket=bucket)
    await s3_client.put_bucket_versioning(
        Bucket=bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    for size in (MIB, KIB):
        await s3.upload(s3_client, bucket, "key", content(size))
    found = await s3_client.list_object_versions(Bucket=bucket)
    for version in found["Versions"]:
        download = s3.download(s3_client, bucket, "key", VersionId=version["VersionId"])
        assert (await download).view == content(version["Size"])
    assert {version["Size"] for version in found["Versions"]} == {KIB, MIB}


async def test_an_error_of_a_callback(s3_client: Any, bucket: str) -> None:
    """It is raised, also if it looks like a broken connection, and nothing is tried again."""
    await s3.upload(s3_client, bucket, "callback", content(1))  # which comes in one piece
    calls: list[int] = []

    def fail(nbytes: int) -> None:
        calls.append(nbytes)
        raise ConnectionResetError("the user's")

    with pytest.raises(ConnectionResetError, match="the user's"):
        await s3.download(s3_client, bucket, "callback", progress=fail)
    assert calls == [1]


async def test_what_breaks_off_always_is_an_error(behind: Behind, bucket: str) -> None:
    """After as many tries as the client is configured to make, and never part of an object."""
    cut = lambda size: Spoilt(cut=min(size - 1, 10))
    await try_each(behind, bucket, cut, every, ResponseStreamingError)


async def test_the_clients_number_of_tries_holds(behind: Behind, bucket: str) -> None:
    """``total_max_attempts=1`` is no second try."""
    config = Config(retries={"total_max_attempts": 1})
    async with behind(config=config) as (proxy, client):
        await s3.upload(client, bucket, "once", content(KIB))
        proxy.requests.clear()
        proxy.rule = nth(1, lambda: Spoilt(cut=100))
        with pytest.raises(ResponseStreamingError):
            await s3.download(client, bucket, "once")
        assert len(proxy.requests) == 1


async def test_a_server_that_is_busy_is_asked_again(behind: Behind, bucket: str) -> None:
    """503 SlowDown, at first or in the middle, is botocore's to retry."""
    busy = lambda _: Spoilt(503, "SlowDown")
    for number in (1, 2):
        await try_each(behind, bucket, busy, partial(nth, number), None)


async def test_a_server_that_stays_busy_is_an_error(behind: Behind, bucket: str) -> None:
    """It is botocore's ClientError with S3's code."""
    await try_each(behind, bucket, lambda _: Spoilt(503, "SlowDown"), every, ClientError)


@pytest.mark.parametrize("number", [1, 2])
async def test_a_wrong_bit_is_an_error(behind: Behind, bucket: str, number: int) -> None:
    """Wherever it is: the checksum of the whole object is verified however it was read."""
    flip = lambda size: Spoilt(flip=min(size, RANGE) // 2)
    if number == 2:  # there is no second answer for a small object
        flip = lambda size: Spoilt(flip=7)
        async with behind() as (proxy, client):
            await s3.upload(client, bucket, "sound", content(MIB))
            proxy.rule = nth(2, partial(flip, MIB))
            with pytest.raises(FlexibleChecksumError, match="CRC32"):
                await s3.download(client, bucket, "sound")
    else:
        await try_each(behind, bucket, flip, partial(nth, 1), FlexibleChecksumError)


async def test_a_wrong_checksum_is_an_error(behind: Behind, bucket: str) -> None:
    """What S3 says is compared with, not what it has."""
    wrong = lambda _: Spoilt(headers={"x-amz-checksum-crc32": "AAAAAA=="})
    await try_each(behind, bucket, wrong, every, FlexibleChecksumError)


async def test_a_silent_server_is_read_on(behind: Behind, bucket: str) -> None:
    """A body that stops coming is asked for again after the client's read timeout."""
    hold = lambda size: Spoilt(hold=min(size, RANGE) // 2)
    # So many tries, because a busy machine may be silent, too.
    config = Config(read_timeout=0.15, retries={"total_max_attempts": 20})
    await try_each(behind, bucket, hold, partial(nth, 1), None, config=config)


async def test_a_server_that_stays_silent_is_given_up(behind: Behind, bucket: str) -> None:
    """The error is botocore's ReadTimeoutError."""
    config = Config(read_timeout=0.1, retries={"total_max_attempts": 2})
    hold = lambda size: Spoilt(hold=min(size - 1, 10))
    await try_each(behind, bucket, hold, every, ReadTimeoutError, config=config)


async def test_an_object_that_is_replaced_meanwhile_is_an_error(
    behind: Behind, s3_client: Any, bucket: str
) -> None:
    """Never a mixture of two versions: the ranges are of the one that the first answer had."""

    async def replace() -> None:
        await s3.upload(s3_client, bucket, "replaced", content(MIB)[::-1])

    async with behind() as (proxy, client):
        await s3.upload(client, bucket, "replaced", content(MIB))
        proxy.rule = nth(1, lambda: Spoilt(cut=RANGE // 2, meanwhile=replace))
        with pytest.raises(ClientError, match=r"was replaced.*download it again") as caught:
            await s3.download(client, bucket, "replaced")
        assert caught.value.response["Error"]["Code"] == "PreconditionFailed"


async def test_another_version_is_noticed_where_the_server_ignores_conditions(
    behind: Behind, bucket: str
) -> None:
    """The ETag of every answer is compared, too."""
    other = lambda: Spoilt(headers={"ETag": '"other"'})
    async with behind() as (proxy, client):
        await s3.upload(client, bucket, "etag", content(MIB))
        proxy.rule = nth(3, other)
        with pytest.raises(ResponseStreamingError, match="was replaced"):
            await s3.download(client, bucket, "etag")


async def test_other_bytes_than_asked_for_are_an_error(behind: Behind, bucket: str) -> None:
    """A server that answers a range with another one is not believed."""
    other = lambda: Spoilt(headers={"Content-Range": f"bytes 5-{RANGE + 4}/{MIB}"})
    async with behind() as (proxy, client):
        await s3.upload(client, bucket, "ranges", content(MIB))
        proxy.rule = nth(2, other)
        with pytest.raises(ResponseStreamingError, match="other bytes"):
            await s3.download(client, bucket, "ranges")


async def test_a_cancelled_download_closes_its_connections_and_frees_its_memory(
    behind: Behind, bucket: str
) -> None:
    """A cancel in the middle of the ranges leaves neither a connection nor a segment."""
    async with behind() as (proxy, client):
        await s3.upload(client, bucket, "slow", content(MIB))
        before = held_segments()
        proxy.rule = every(lambda: Spoilt(hold=100))
        came = asyncio.Event()
        download = asyncio.ensure_future(
            s3.download(client, bucket, "slow", progress=lambda _: came.set())
        )
        await asyncio.wait_for(came.wait(), PATIENCE)
        await asyncio.wait_for(proxy.held.wait(), PATIENCE)
        assert held_segments() > before
        download.cancel()
        with pytest.raises(asyncio.CancelledError):
            await download
        assert held_segments() == before
        await asyncio.wait_for(proxy.deserted.wait(), PATIENCE)  # while the client is open


@pytest.mark.parametrize(
    ("byte_range", "expected"),
    [
        ((0, 1), slice(0, 1)),
        ((10, 20), slice(10, 20)),
        ((100, None), slice(100, None)),
        ((-100, None), slice(-100, None)),
        ((10, MIB - 10), slice(10, MIB - 10)),
        ((MIB - 5, MIB + 100), slice(MIB - 5, None)),
        ((0, MIB), slice(None)),
    ],
)
async def test_a_range_is_downloaded(
    s3_client: Any, bucket: str, byte_range: tuple[int, int | None], expected: slice
) -> None:
    """It is what the slice of the object is, small or in parallel, and ends where the object does."""
    await s3.upload(s3_client, bucket, "ranged", content(MIB))
    with await s3.download(s3_client, bucket, "ranged", byte_range=byte_range) as buffer:
        assert buffer.view == content(MIB)[expected]


@pytest.mark.parametrize("byte_range", [(5, 5), (6, 5), (-5, 7), (-5, -2)])
async def test_a_range_that_is_none_is_refused(byte_range: tuple[int, int]) -> None:
    """It is a ValueError that says what a range is, before the client is asked."""
    meta = SimpleNamespace(endpoint_url="http://s3", config=SimpleNamespace(retries=None))
    with pytest.raises(ValueError, match=r"\(start, stop\)"):
        await s3.download(SimpleNamespace(meta=meta), "bucket", "key", byte_range=byte_range)


async def test_a_range_behind_the_end_is_s3s_error(s3_client: Any, bucket: str) -> None:
    """There are no such bytes."""
    await s3.upload(s3_client, bucket, "short", b"short")
    with pytest.raises(ClientError, match="InvalidRange"):
        await s3.download(s3_client, bucket, "short", byte_range=(10, 20))


@pytest.mark.parametrize("nbytes", [0, 1000, MIB])
async def test_memory_is_used_again(s3_client: Any, bucket: str, nbytes: int) -> None:
    """The result shares the memory it was given, is as long as the object, and closes by itself."""
    await s3.upload(s3_client, bucket, "again", content(nbytes))
    with SharedBuffer(MIB + 5) as memory:
        memory.view[nbytes:] = bytes([7]) * (MIB + 5 - nbytes)
        with await s3.download(s3_client, bucket, "again", into=memory) as buffer:
            assert buffer.view == content(nbytes)
        assert memory.view[:nbytes] == content(nbytes)
        assert set(memory.view[nbytes:]) == {7}


async def test_memory_that_is_too_short_is_refused(s3_client: Any, bucket: str) -> None:
    """It is a ValueError with both lengths, and the memory is as it was."""
    await s3.upload(s3_client, bucket, "long", content(KIB))
    with SharedBuffer(100) as memory:
        with pytest.raises(ValueError, match=r"100 bytes, and 1,024"):
            await s3.download(s3_client, bucket, "long", into=memory)
        assert not any(memory.view)
