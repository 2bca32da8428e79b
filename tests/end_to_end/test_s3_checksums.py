"""Each kind of checksum that S3 keeps is verified, also of objects that were uploaded in parts."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import pytest
from botocore.config import Config
from botocore.exceptions import FlexibleChecksumError, ResponseStreamingError

from asynclam import s3
from tests.parts.s3_objects import MIB, PATIENCE, content, every, is_get
from tests.parts.s3_proxy import Seen, Spoilt

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Behind, MakeClient

ALGORITHMS = ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"]
LEAST = 5 * MIB  # of a part, for S3


async def in_parts(client: Any, bucket: str, key: str, kind: str, **settings: Any) -> bytes:
    """An object of parts of unequal lengths, as other clients may upload them."""
    data = [content(LEAST), content(LEAST + 1000), content(77)]
    kinds = {"ChecksumType": kind} if kind else {}
    created = await client.create_multipart_upload(Bucket=bucket, Key=key, **kinds, **settings)
    target = {"Bucket": bucket, "Key": key, "UploadId": created["UploadId"]}
    parts = []
    for number, part in enumerate(data, 1):
        sent = await client.upload_part(PartNumber=number, Body=part, **target, **settings)
        checksums = {
            name: value
            for name, value in sent.items()
            if name.startswith("Checksum") and name != "ChecksumType"
        }
        parts.append({"PartNumber": number, "ETag": sent["ETag"], **checksums})
    await client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **kinds, **target)
    return b"".join(data)


async def verified(behind: Behind, bucket: str, key: str, data: bytes) -> None:
    """It is downloaded; and not when a bit is wrong, so somebody has looked."""
    async with behind() as (proxy, client):
        with await s3.download(client, bucket, key) as buffer:
            assert buffer.view == data
        proxy.rule = every(lambda: Spoilt(flip=len(data) - 1), is_get)
        with pytest.raises(FlexibleChecksumError, match=f"s3://{bucket}/{key}"):
            await s3.download(client, bucket, key)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_of_an_object_in_one_piece(
    behind: Behind, s3_client: Any, bucket: str, algorithm: str
) -> None:
    """Whichever algorithm the object was uploaded with."""
    data = content(700_000)
    settings = {"Bucket": bucket, "Key": algorithm, "ChecksumAlgorithm": algorithm}
    await s3_client.put_object(Body=data, **settings)
    await verified(behind, bucket, algorithm, data)


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        ("CRC32", "COMPOSITE"),
        ("SHA256", "COMPOSITE"),
        ("CRC32C", "COMPOSITE"),
        ("CRC32", "FULL_OBJECT"),
        ("CRC64NVME", "FULL_OBJECT"),
    ],
)
async def test_of_an_object_in_unequal_parts(
    behind: Behind, s3_client: Any, bucket: str, algorithm: str, kind: str
) -> None:
    """A composite one, too, wherever the parts end."""
    key = f"parts-{algorithm}-{kind}"
    data = await in_parts(s3_client, bucket, key, kind, ChecksumAlgorithm=algorithm)
    await verified(behind, bucket, key, data)


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA256"])
async def test_of_what_was_uploaded_in_parts(
    behind: Behind, s3_client: Any, bucket: str, algorithm: str
) -> None:
    """A CRC is of all bytes; of the others S3 has only those of the parts."""
    data, key = content(9 * MIB), f"uploaded-{algorithm}"
    await s3.upload(s3_client, bucket, key, data, ChecksumAlgorithm=algorithm)
    head = await s3_client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    assert head[f"Checksum{algorithm}"].endswith("-2") == (algorithm == "SHA256")
    await verified(behind, bucket, key, data)


async def test_as_many_downloads_as_connections(s3_client_with: MakeClient, bucket: str) -> None:
    """Those of objects in parts ask for the parts: with connections that others have done with."""
    keys = [f"together-{number}" for number in range(3)]
    async with s3_client_with(max_concurrency=len(keys)) as client:
        objects = {
            key: await in_parts(client, bucket, key, "COMPOSITE", ChecksumAlgorithm="CRC32")
            for key in keys
        }
        downloads = asyncio.gather(*(s3.download(client, bucket, key) for key in keys))
        for data, buffer in zip(
            objects.values(), await asyncio.wait_for(downloads, PATIENCE), strict=True
        ):
            with buffer:
                assert buffer.view == data


async def test_a_download_that_fails_asks_for_no_parts(
    behind: Behind, s3_client: Any, bucket: str
) -> None:
    """What asks where the parts end is given up with it, whose error is raised at once."""
    key = "given-up"
    await in_parts(s3_client, bucket, key, "COMPOSITE", ChecksumAlgorithm="CRC32")
    asked = asyncio.Event()

    async def never() -> None:
        asked.set()
        await asyncio.Event().wait()

    def rule(request: Seen) -> Spoilt | None:
        if request.method == "HEAD":
            return Spoilt(before=never)
        return Spoilt(cut=100_000, meanwhile=asked.wait)  # after a first piece

    config = Config(retries={"total_max_attempts": 1})
    async with behind(rule, config=config) as (_, client):
        before = asyncio.all_tasks()
        with pytest.raises(ResponseStreamingError, match=key):
            await asyncio.wait_for(s3.download(client, bucket, key), PATIENCE)
        left = [task for task in asyncio.all_tasks() - before if "asynclam" in repr(task)]
        assert left == []


async def test_an_object_without_a_checksum(s3_client: Any, bucket: str) -> None:
    """There is nothing to verify but its length."""
    key = "without-checksum"
    data = await in_parts(s3_client, bucket, key, "")
    head = await s3_client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    assert not [name for name in head if name.startswith("Checksum")]
    with await s3.download(s3_client, bucket, key) as buffer:
        assert buffer.view == data


async def test_without_awscrt_it_is_said(
    s3_client: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object comes, and a warning says that nobody has verified it, and how to."""
    await s3_client.put_object(
        Bucket=bucket, Key="crc32c", Body=b"data", ChecksumAlgorithm="CRC32C"
    )
    monkeypatch.setitem(sys.modules, "awscrt", None)
    with pytest.warns(RuntimeWarning, match=r"not verified.*CRC32C.*asynclam\[crt\]"):
        buffer = await s3.download(s3_client, bucket, "crc32c")
    assert buffer.view == b"data"
