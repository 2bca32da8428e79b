"""Each kind of fault at each size, in the first answer, the second, or all: exact bytes or an error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from botocore.config import Config

import asynclam
from asynclam.s3 import _download, _parts
from tests.parts.s3_faults import Faults
from tests.parts.s3_objects import KIB, MIB

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Behind, MakeClient
    from tests.parts.s3_proxy import S3Proxy

SIZES = [1, 64 * KIB, 512 * KIB]
RANGE = 128 * KIB  # so that the largest is four ranges
PART = 5 * MIB  # the least that S3 takes
TRIES = {"total_max_attempts": 3}
IMPATIENT = Config(read_timeout=0.2, retries=TRIES)  # on a busy machine more of it are errors


@pytest.fixture
async def faults(
    behind: Behind,
    bucket: str,
    s3_client: Any,
    monkeypatch: pytest.MonkeyPatch,
    no_pauses: None,
) -> AsyncIterator[tuple[Faults, S3Proxy, Any]]:
    """They, with a patient client, short ranges and parts; nothing may be wrong."""
    monkeypatch.setattr(_download, "_ONE_STREAM", 2 * RANGE)
    monkeypatch.setattr(_download, "_RANGE", RANGE)
    monkeypatch.setattr(_parts, "PART", PART)
    async with behind(config=Config(retries=TRIES)) as (proxy, client):
        faults = Faults(proxy, s3_client, bucket)
        yield faults, proxy, client
    assert faults.findings.wrong == []
    assert faults.findings.errors
    assert sum(faults.findings.injected.values()) > 20


async def test_downloads(faults: Any, s3_client_with: MakeClient) -> None:
    """Lost answers are asked for again, wrong ones are errors."""
    faults, proxy, _ = faults
    async with s3_client_with(endpoint_url=proxy.endpoint_url, config=IMPATIENT) as client:
        await faults.downloads(client, SIZES)


async def test_workers(faults: Any, s3_settings: dict[str, Any]) -> None:
    """The same of what workers download for themselves."""
    faults, proxy, _ = faults
    settings = {**s3_settings, "endpoint_url": proxy.endpoint_url, "config": IMPATIENT}
    async with asynclam.Executor(2, start_method="fork") as executor:  # with what is patched here
        await faults.in_workers(executor, SIZES, **settings)


async def test_uploads(faults: Any) -> None:
    """An object is there or is not, and nothing is left open."""
    faults, _, client = faults
    await faults.uploads(client, [1, PART + 1000])
