"""Everybody who reads S3 from an asyncio program, with the same few verbs.

Each is used as its documentation says: blocking ones in threads, as many as requests at once.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

CONCURRENT = 32  # requests at once, for everybody


class Peer:
    """Made for one bucket; where the server is, and its certificate, is in the environment."""

    name: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()

    async def start(self) -> None:
        """Makes the client; what ends it goes on the stack."""

    async def get(self, key: str) -> Any:
        """The object, as what is given to a worker."""
        raise NotImplementedError

    async def read_each(self, keys: Iterable[str], read: Callable[[Any], Any]) -> None:
        """Gets many, and reads each in this process: a gather with a limit."""
        waiting = iter(keys)

        async def take_turns() -> None:
            for key in waiting:
                read(await self.get(key))

        await asyncio.gather(*(take_turns() for _ in range(CONCURRENT)))


class Asynclam(Peer):
    name = "asynclam"
    package = "asynclam"

    async def start(self) -> None:
        from asynclam import s3

        self.client = await self.stack.enter_async_context(s3.client(max_concurrency=CONCURRENT))

    async def get(self, key: str) -> Any:
        from asynclam import s3

        return await s3.download(self.client, self.bucket, key)


class Aiobotocore(Peer):
    name = "aiobotocore, read()"
    package = "aiobotocore"

    async def start(self) -> None:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        config = AioConfig(max_pool_connections=CONCURRENT)
        client = get_session().create_client("s3", config=config)
        self._client = await self.stack.enter_async_context(client)

    async def get(self, key: str) -> Any:
        response = await self._client.get_object(Bucket=self.bucket, Key=key)
        async with response["Body"] as body:
            return await body.read()


class Boto3(Peer):
    name = "boto3 + threads"
    package = "boto3"

    async def start(self) -> None:
        import boto3
        from botocore.config import Config

        self._client = boto3.client("s3", config=Config(max_pool_connections=CONCURRENT))
        self._threads = self.stack.enter_context(ThreadPoolExecutor(CONCURRENT))

    async def get(self, key: str) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._get, key)

    def _get(self, key: str) -> Any:
        return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    async def read_each(self, keys: Iterable[str], read: Callable[[Any], Any]) -> None:
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._threads, lambda key=key: read(self._get(key)))
            for key in keys
        ]
        await asyncio.gather(*jobs)


class S3Transfer(Boto3):
    name = "s3transfer + threads"
    package = "s3transfer"

    def _get(self, key: str) -> Any:
        data = io.BytesIO()
        self._client.download_fileobj(self.bucket, key, data)
        return data.getvalue()


class S3fs(Peer):
    name = "s3fs"
    package = "s3fs"

    async def start(self) -> None:
        from s3fs import S3FileSystem

        self._files = S3FileSystem(
            asynchronous=True,
            config_kwargs={"max_pool_connections": CONCURRENT},
            endpoint_url=os.environ["AWS_ENDPOINT_URL_S3"],
            client_kwargs={"verify": os.environ["AWS_CA_BUNDLE"]},
            skip_instance_cache=True,
        )
        session = await self._files.set_session()
        self.stack.push_async_callback(session.close)

    async def get(self, key: str) -> Any:
        return await self._files._cat_file(f"{self.bucket}/{key}")


class Obstore(Peer):
    name = "obstore"
    package = "obstore"

    async def start(self) -> None:
        from obstore.store import S3Store

        certificate = Path(os.environ["AWS_CA_BUNDLE"]).read_bytes()  # noqa: ASYNC240 - once
        self._store = S3Store(
            self.bucket,
            endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
            access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
            secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            region=os.environ["AWS_DEFAULT_REGION"],
            client_options={"root_certificate": certificate},
        )

    async def get(self, key: str) -> Any:
        response = await self._store.get_async(key)
        return bytes(await response.bytes_async())


ALL: tuple[type[Peer], ...] = (Asynclam, Aiobotocore, Boto3, S3Transfer, S3fs, Obstore)
BY_NAME = {kind.name: kind for kind in ALL}


async def chunks(data: bytes, nbytes: int, length: int) -> AsyncIterator[bytes]:
    """So many bytes, piece by piece: what is uploaded need not be in memory."""
    for begin in range(0, nbytes, length):
        yield data[: min(length, nbytes - begin)]
