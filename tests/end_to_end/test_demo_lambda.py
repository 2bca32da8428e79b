"""The demo's handler under the real runtime client and emulator, with a real S3 server."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from asynclam import map_io, s3
from asynclam._demo import stage
from tests.parts.emulator import FunctionError, emulator

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Authority, MakeClient

pytestmark = pytest.mark.outside

DAYS = 60
HANDLER = "asynclam._demo.flights.handler"
DIRECTORY = Path(__file__).parent
TWO_WORKERS = 3008  # MB, which have the CPU share for two


@pytest.fixture(scope="module")
def days() -> Mapping[str, bytes]:
    """The first days of the year by their keys."""
    return stage.read_days(DAYS, lambda: None)


@pytest.fixture(params=[False, True], ids=["plain", "box"])
def box(request: pytest.FixtureRequest) -> bool:
    """Whether everything but the S3 server is in a box."""
    inside: bool = request.param
    return inside


def flights_in(days: Mapping[str, bytes]) -> int:
    return sum(gzip.decompress(day).count(b"\n") - 1 for day in days.values())


async def upload(client_with: MakeClient, bucket: str, objects: Mapping[str, bytes]) -> None:
    async with client_with() as client:
        await map_io(lambda key: s3.upload(client, bucket, key, objects[key]), objects)


async def download(client_with: MakeClient, bucket: str, key: str) -> bytes:
    async with client_with() as client:
        with await s3.download(client, bucket, key) as buffer:
            return bytes(buffer.view)


def event_for(bucket: str) -> dict[str, Any]:
    return {"bucket": bucket, "prefix": stage.PREFIX, "report": stage.REPORT}


def test_three_invocations_are_served_by_the_same_workers(
    s3_environment: dict[str, str],
    authority: Authority,
    s3_client_with: MakeClient,
    bucket: str,
    days: Mapping[str, bytes],
    box: bool,
) -> None:
    """The first invocation starts everything; the second and the third find it warm."""
    asyncio.run(upload(s3_client_with, bucket, days))
    with emulator(
        HANDLER,
        cwd=DIRECTORY,
        env=s3_environment,
        box=box,
        bind=[authority.ca_file],
        cpus=2,
        memory=TWO_WORKERS,
    ) as function:
        reports = [function.invoke(event_for(bucket)) for _ in range(3)]
    workers = [report.pop("days_by_worker") for report in reports]
    assert [sum(by_worker.values()) for by_worker in workers] == [DAYS] * 3
    assert len(set().union(*workers)) <= 2  # new ones would have other process ids
    assert [report["flights"] for report in reports] == [flights_in(days)] * 3
    assert json.loads(asyncio.run(download(s3_client_with, bucket, stage.REPORT))) == reports[2]


def test_an_error_of_s3_is_that_of_the_function(
    s3_environment: dict[str, str], authority: Authority, box: bool
) -> None:
    """A bucket that is not there fails the invocation as botocore says it; the runtime lives on."""
    with emulator(
        HANDLER, cwd=DIRECTORY, env=s3_environment, box=box, bind=[authority.ca_file]
    ) as function:
        for _ in range(2):
            with pytest.raises(FunctionError, match="NoSuchBucket"):
                function.invoke(event_for("no-such-bucket"))
