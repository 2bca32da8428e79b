"""A real S3 server for the session, and clients of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import pytest
import pytest_asyncio

from asynclam import s3
from asynclam._demo.seaweedfs import Server, seaweedfs

BUCKET = "tests"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """SeaweedFS with one bucket, for the whole session."""
    with seaweedfs() as server:
        asyncio.run(_create_bucket(server))
        yield server


async def _create_bucket(server: Server) -> None:
    async with _client_of(server) as client:
        await client.create_bucket(Bucket=BUCKET)


def _client_of(server: Server, **settings: Any) -> AbstractAsyncContextManager[Any]:
    defaults = {
        "endpoint_url": server.endpoint_url,
        "aws_access_key_id": server.access_key,
        "aws_secret_access_key": server.secret_key,
        "region_name": server.region,
    }
    return s3.client(**{**defaults, **settings})


class MakeClient(Protocol):
    """Makes a client of the session's server, with other settings than the usual ones."""

    def __call__(self, **settings: Any) -> AbstractAsyncContextManager[Any]: ...


@pytest.fixture
def s3_client_with(s3_server: Server) -> MakeClient:
    """For clients with a wrong secret, behind a proxy, and the like."""

    def make(**settings: Any) -> AbstractAsyncContextManager[Any]:
        return _client_of(s3_server, **settings)

    return make


@pytest_asyncio.fixture
async def s3_client(s3_server: Server) -> AsyncIterator[Any]:
    """A client that is closed when the test ends."""
    async with _client_of(s3_server) as client:
        yield client


@pytest.fixture
def bucket() -> str:
    """The name of the bucket."""
    return BUCKET
