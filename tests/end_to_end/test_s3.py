"""``asynclam.s3`` against a real S3 server that enforces signatures and keeps checksums."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    IncompleteReadError,
    ResponseStreamingError,
)

import asynclam
from asynclam import SharedBuffer, s3
from tests.end_to_end import s3_jobs
from tests.parts.proxy import Fault, FaultyProxy
from tests.parts.s3_objects import MIB, content, held_segments

if TYPE_CHECKING:
    from typing_extensions import Self

    from tests.end_to_end.conftest import MakeClient

SIZES = [0, 1, MIB + 1, 20 * MIB]
NEVER = 1 << 60  # bytes


@pytest.mark.parametrize("nbytes", SIZES)
async def test_what_is_uploaded_is_downloaded(s3_client: Any, bucket: str, nbytes: int) -> None:
    """Every size makes the round trip, an empty object and one byte included."""
    data = content(nbytes)
    await s3.upload(s3_client, bucket, f"size-{nbytes}", data)
    with await s3.download(s3_client, bucket, f"size-{nbytes}") as buffer:
        assert buffer.nbytes == nbytes
        assert buffer.view == data


@pytest.mark.parametrize("nbytes", SIZES)
async def test_everything_bytes_like_is_uploaded(s3_client: Any, bucket: str, nbytes: int) -> None:
    """A SharedBuffer, a bytearray and a view of another format are uploaded as their bytes."""
    data = content(nbytes)
    with SharedBuffer(nbytes) as source:
        source.view[:] = data
        for kind in (source, bytearray(data), memoryview(data).cast("c")):
            await s3.upload(s3_client, bucket, "bytes-like", kind)
            with await s3.download(s3_client, bucket, "bytes-like") as buffer:
                assert buffer.view == data


async def test_a_view_of_wide_items_is_uploaded_as_its_bytes(s3_client: Any, bucket: str) -> None:
    """The format and the shape of a buffer do not matter, only its bytes."""
    data = content(2 * MIB)
    await s3.upload(s3_client, bucket, "wide", memoryview(data).cast("d", [512, 512]))
    with await s3.download(s3_client, bucket, "wide") as buffer:
        assert buffer.view == data


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        ("text", r"not str; encode it first: data\.encode\(\)"),
        (None, "not NoneType"),
        (memoryview(b"abcd")[::2], r"contiguous; copy it first: bytes\(data\)"),
    ],
)
async def test_what_is_not_bytes_is_refused(data: Any, hint: str) -> None:
    """Wrong data is a TypeError with the remedy, before the client is asked for anything."""
    with pytest.raises(TypeError, match=hint):
        await s3.upload(None, "bucket", "key", data)


async def test_a_missing_key_is_named(s3_client: Any, bucket: str) -> None:
    """The error is botocore's NoSuchKey, and its message says where."""
    with pytest.raises(s3_client.exceptions.NoSuchKey, match=f"s3://{bucket}/missing") as caught:
        await s3.download(s3_client, bucket, "missing")
    assert caught.value.response["Error"]["Code"] == "NoSuchKey"


async def test_a_missing_bucket_is_named(s3_client: Any) -> None:
    """Both ways, the error is botocore's NoSuchBucket, and its message says where."""
    with pytest.raises(s3_client.exceptions.NoSuchBucket, match="s3://no-such-bucket/key"):
        await s3.download(s3_client, "no-such-bucket", "key")
    with pytest.raises(s3_client.exceptions.NoSuchBucket, match="s3://no-such-bucket/key"):
        await s3.upload(s3_client, "no-such-bucket", "key", b"data")


async def test_a_wrong_secret_is_refused(s3_client_with: MakeClient, bucket: str) -> None:
    """The error is botocore's ClientError with S3's code, and its message says where."""
    async with s3_client_with(aws_secret_access_key="wrong") as client:
        with pytest.raises(ClientError, match=f"SignatureDoesNotMatch.*s3://{bucket}/key"):
            await s3.download(client, bucket, "key")


async def test_a_server_that_is_not_there_is_named(s3_client_with: MakeClient, bucket: str) -> None:
    """The error is botocore's EndpointConnectionError, and its message says what for."""
    config = Config(retries={"total_max_attempts": 1})
    async with s3_client_with(endpoint_url="http://127.0.0.1:1", config=config) as client:
        with pytest.raises(EndpointConnectionError, match=f"s3://{bucket}/key"):
            await s3.download(client, bucket, "key")


class Behind(Protocol):
    """A client behind a proxy that spoils one answer."""

    def __call__(
        self, fault: Fault, *, after: int, **settings: Any
    ) -> AbstractAsyncContextManager[tuple[FaultyProxy, Any]]: ...


@pytest.fixture
def behind(s3_settings: dict[str, Any], s3_client_with: MakeClient) -> Behind:
    """The proxy, and a client of the server behind it. TLS goes through the proxy as it is."""

    @asynccontextmanager
    async def connect(fault: Fault, *, after: int, **settings: Any):
        async with (
            FaultyProxy(s3_settings["endpoint_url"], fault, after=after) as proxy,
            s3_client_with(endpoint_url=proxy.endpoint_url, **settings) as client,
        ):
            yield proxy, client

    return connect


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_lost_connection_is_an_error_where_nothing_is_tried_again(
    behind: Behind, bucket: str, fault: Fault
) -> None:
    """Never part of an object as if it were whole, and nothing of it is kept."""
    before = held_segments()
    config = Config(retries={"total_max_attempts": 1})
    async with behind(fault, after=300_000, config=config) as (_, client):
        await s3.upload(client, bucket, "whole", content(MIB))
        with pytest.raises(ResponseStreamingError, match=f"s3://{bucket}/whole") as caught:
            await s3.download(client, bucket, "whole")
    assert held_segments() == before  # with the traceback still there
    assert f"s3://{bucket}/whole" in str(pickle.loads(pickle.dumps(caught.value)))


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_a_lost_connection_is_replaced(
    behind: Behind, bucket: str, fault: Fault, no_pauses: None
) -> None:
    """However it was lost, what was missing is read over another one."""
    async with behind(fault, after=300_000) as (proxy, client):
        await s3.upload(client, bucket, "whole", content(MIB))
        with await s3.download(client, bucket, "whole") as buffer:
            assert buffer.view == content(MIB)
        assert proxy.struck.is_set()


async def test_connections_are_used_again(behind: Behind, bucket: str) -> None:
    """A download that was read to its end gives its connection back to the pool."""
    async with behind("cut", after=NEVER) as (proxy, client):
        await s3.upload(client, bucket, "small", b"small")
        (await s3.download(client, bucket, "small")).close()
        accepted = proxy.accepted  # over TLS SeaweedFS closes that of an upload
        for _ in range(5):
            (await s3.download(client, bucket, "small")).close()
        assert proxy.accepted == accepted


async def test_a_large_upload_is_sent_again_after_a_lost_connection(
    behind: Behind, bucket: str
) -> None:
    """A retry sends a view from its beginning."""
    data = bytearray(content(3 * MIB))
    async with behind("reset", after=0) as (proxy, client):
        await s3.upload(client, bucket, "retried", data)
        assert proxy.struck.is_set()
        with await s3.download(client, bucket, "retried") as buffer:
            assert buffer.view == data


class Body:
    """A response body that gives the chunks, or raises the errors, that it was made of."""

    def __init__(self, *chunks: bytes | Exception) -> None:
        self._chunks = [*chunks, b""]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def read(self, _: int) -> bytes:
        chunk = self._chunks.pop(0)
        if isinstance(chunk, Exception):
            raise chunk
        return chunk


class ClientOf:
    """A client whose every object is one response, and that tries once."""

    meta = SimpleNamespace(
        endpoint_url="http://nowhere",
        config=SimpleNamespace(retries={"total_max_attempts": 1}),
    )

    def __init__(self, **response: Any) -> None:
        self._response = {"ResponseMetadata": {"HTTPHeaders": {}}, **response}

    async def get_object(self, **_: Any) -> dict[str, Any]:
        return self._response


@pytest.mark.parametrize("chunks", [(b"abc",), (b"abc", b"def")], ids=["short", "long"])
async def test_a_body_of_another_length_is_an_error(chunks: tuple[bytes, ...]) -> None:
    """Whatever the transport let through, the buffer is exactly the object or there is none."""
    before = held_segments()
    client = ClientOf(Body=Body(*chunks), ContentLength=5)
    with pytest.raises(IncompleteReadError, match=r"expected is 5.*s3://bucket/key"):
        await s3.download(client, "bucket", "key")
    assert held_segments() == before


async def test_a_body_of_unknown_length_is_an_error() -> None:
    """No memory is taken for an object whose length the server does not give."""
    with pytest.raises(ResponseStreamingError, match=r"how long.*s3://bucket/key"):
        await s3.download(ClientOf(Body=Body(b"abc")), "bucket", "key")


async def test_what_is_no_broken_connection_is_not_tried_again() -> None:
    """It is raised as itself: another try would hide it."""
    client = ClientOf(Body=Body(LookupError("a bug")), ContentLength=5)
    with pytest.raises(LookupError, match="a bug"):
        await s3.download(client, "bucket", "key")


async def test_many_are_downloaded_as_a_stream(s3_client: Any, bucket: str) -> None:
    """Each comes with its key; in the order of the keys if that is asked for."""
    objects = {f"many/{n}": content(n * 1000) for n in range(40)}
    for key, data in objects.items():
        await s3.upload(s3_client, bucket, key, data)
    downloads = await s3.download_many(s3_client, bucket, objects, limit=8, ordered=True)
    assert [key for key, _ in downloads] == list(objects)
    assert all(buffer.view == objects[key] for key, buffer in downloads)


async def test_the_keys_may_come_from_an_async_iterable(s3_client: Any, bucket: str) -> None:
    """A listing that is itself read from S3 feeds the downloads."""

    async def keys() -> AsyncIterator[str]:
        for n in range(5):
            yield f"listed/{n}"

    async for key in keys():
        await s3.upload(s3_client, bucket, key, key.encode())
    found = {
        key: bytes(buffer.view) async for key, buffer in s3.download_many(s3_client, bucket, keys())
    }
    assert found == {f"listed/{n}": f"listed/{n}".encode() for n in range(5)}


async def test_one_of_many_that_is_missing_ends_the_stream_or_takes_its_place(
    s3_client: Any, bucket: str
) -> None:
    """The first error ends the stream, unless errors are asked for as results."""
    await s3.upload(s3_client, bucket, "there", b"there")
    keys = ["there", "missing"]
    with pytest.raises(s3_client.exceptions.NoSuchKey, match=f"s3://{bucket}/missing"):
        await s3.download_many(s3_client, bucket, keys)
    found, missing = await s3.download_many(
        s3_client, bucket, keys, ordered=True, return_exceptions=True
    )
    assert found[0] == "there"
    assert isinstance(missing, s3_client.exceptions.NoSuchKey)


async def test_a_worker_reads_what_was_downloaded(s3_client: Any, bucket: str) -> None:
    """The worker sees the object's bytes in the buffer that it is given."""
    data = content(5 * MIB)
    await s3.upload(s3_client, bucket, "for-a-worker", data)
    async with asynclam.Executor(1) as executor:
        with await s3.download(s3_client, bucket, "for-a-worker") as buffer:
            seen = await executor.run_cpu(s3_jobs.digest, buffer)
    assert seen == hashlib.sha256(data).hexdigest()


async def test_what_a_worker_made_is_uploaded(s3_client: Any, bucket: str) -> None:
    """A buffer that a worker returns is uploaded as it is."""
    async with asynclam.Executor(1) as executor:
        with await executor.run_cpu(s3_jobs.fill, 3 * MIB + 7) as buffer:
            await s3.upload(s3_client, bucket, "by-a-worker", buffer)
            with await s3.download(s3_client, bucket, "by-a-worker") as again:
                assert again.view == buffer.view


async def test_downloads_feed_workers(s3_client: Any, bucket: str) -> None:
    """``map_cpu(parse, download_many(…))`` is the pipeline, and it frees what it has passed on."""
    objects = {f"piped/{n}": content(10_000 + n) for n in range(30)}
    for key, data in objects.items():
        await s3.upload(s3_client, bucket, key, data)
    before = held_segments()
    async with asynclam.Executor(2) as executor:
        downloads = s3.download_many(s3_client, bucket, objects, limit=8)
        digests = dict(await executor.map_cpu(s3_jobs.named_digest, downloads))
    assert digests == {key: hashlib.sha256(data).hexdigest() for key, data in objects.items()}
    assert held_segments() == before


async def test_the_users_settings_win(s3_client_with: MakeClient) -> None:
    """A ``config`` is laid over ours, and what it leaves out stays ours."""
    async with s3_client_with(config=Config(read_timeout=7), max_concurrency=50) as client:
        config = client.meta.config
        assert config.read_timeout == 7
        assert config.connect_timeout == 5
        assert config.max_pool_connections == 50
        assert config.retries["mode"] == "standard"


def test_importing_it_does_not_import_aiobotocore() -> None:
    """The 190 ms of that import are spent when a client is made, and only then."""
    program = (
        "import sys, asynclam.s3; "
        "print(sorted({'aiobotocore', 'botocore', 'aiohttp'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert run.stdout == b"[]\n"


def test_without_aiobotocore_the_message_says_what_to_install() -> None:
    """The ImportError names the extra."""
    program = (
        "import sys; sys.modules['aiobotocore.config'] = None; import asynclam.s3 as s; s.client()"
    )
    run = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert b'ImportError: asynclam.s3 needs aiobotocore: pip install "asynclam[s3]"' in run.stderr
