"""Each kind of fault at each size, in the first answer, the second, or all: exact bytes or an error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from botocore.config import Config

import asynclam
from asynclam.s3 import _download, _parts
from tests.parts.s3_faults import Faults
from tests.parts.s3_objects import CUT_TLS, KIB, MIB

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Behind

pytestmark = CUT_TLS

SIZES = [1, 64 * KIB, 512 * KIB]
RANGE = 128 * KIB  # so that the largest is four ranges
PART = 5 * MIB  # the least that S3 takes
CONFIG = Config(read_timeout=0.2, retries={"total_max_attempts": 3})


@pytest.fixture
async def faults(
    behind: Behind,
    bucket: str,
    s3_client: Any,
    s3_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    no_pauses: None,
) -> AsyncIterator[Faults]:
    """They and what came of them; nothing may be wrong. On a busy machine more of it are errors."""
    monkeypatch.setattr(_download, "_ONE_STREAM", 2 * RANGE)
    monkeypatch.setattr(_download, "_RANGE", RANGE)
    monkeypatch.setattr(_parts, "PART", PART)
    async with behind(config=CONFIG) as (proxy, client):
        settings = {**s3_settings, "endpoint_url": proxy.endpoint_url, "config": CONFIG}
        faults = Faults(proxy, client, s3_client, bucket, settings)
        yield faults
    assert faults.findings.wrong == []
    assert faults.findings.errors
    assert sum(faults.findings.injected.values()) > 20


async def test_downloads(faults: Faults) -> None:
    """Lost answers are asked for again, wrong ones are errors."""
    await faults.downloads(SIZES)


async def test_workers(faults: Faults) -> None:
    """The same of what workers download for themselves."""
    async with asynclam.Executor(2, start_method="fork") as executor:  # with what is patched here
        await faults.in_workers(SIZES, executor)


async def test_uploads(faults: Faults) -> None:
    """An object is there or is not, and nothing is left open."""
    await faults.uploads([1, PART + 1000])
