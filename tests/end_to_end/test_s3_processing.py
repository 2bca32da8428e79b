"""Small objects in bulk: workers fetch what they process, with clients that they keep."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import asynclam
from asynclam import s3
from tests.end_to_end import s3_jobs
from tests.parts.s3_objects import KIB, PATIENCE, content

if TYPE_CHECKING:
    from tests.parts.gate import Gate


@pytest.fixture
async def objects(s3_client: Any, bucket: str) -> dict[str, bytes]:
    """Forty small ones."""
    made = {f"bulk/{number:02}": content(KIB + number) for number in range(40)}
    await asyncio.gather(*(s3.upload(s3_client, bucket, key, made[key]) for key in made))
    return made


async def test_every_object_is_processed_in_a_worker(
    s3_client: Any, bucket: str, objects: dict[str, bytes], s3_settings: dict[str, Any]
) -> None:
    """As ``map_cpu`` over downloads; in order where asked; with clients that workers keep."""
    async with asynclam.Executor(2) as executor:
        batches = partial(
            s3.process_many, bucket, fn=s3_jobs.named_digest, executor=executor, **s3_settings
        )
        expected = [(key, hashlib.sha256(data).hexdigest()) for key, data in objects.items()]
        assert await batches(keys=objects, chunksize=7) == expected
        listed = s3.list_objects(s3_client, bucket, "bulk/")
        found = [item async for item in batches(keys=listed, ordered=True, chunksize=3)]
        assert found == expected
        assert await executor.run_cpu(s3_jobs.count_clients) == 1


async def test_settings_of_the_requests(
    bucket: str, objects: dict[str, bytes], s3_settings: dict[str, Any]
) -> None:
    """They reach the requests of the workers."""
    async with asynclam.Executor(1) as executor:
        refused, *_ = await s3.process_many(
            bucket,
            ["bulk/00"],
            s3_jobs.named_digest,
            executor=executor,
            return_exceptions=True,
            get_object={"IfMatch": '"another"'},
            **s3_settings,
        )
    assert "PreconditionFailed" in str(refused)


async def test_other_settings_are_another_client(
    bucket: str, objects: dict[str, bytes], s3_settings: dict[str, Any]
) -> None:
    """It is made once, too."""
    async with asynclam.Executor(1) as executor:
        for concurrency in (3, 4, 3, 4):
            await s3.process_many(
                bucket,
                ["bulk/00"],
                s3_jobs.named_digest,
                executor=executor,
                max_concurrency=concurrency,
                **s3_settings,
            )
        assert await executor.run_cpu(s3_jobs.count_clients) == 2


async def test_errors_end_the_stream_or_take_their_places(
    bucket: str, objects: dict[str, bytes], s3_settings: dict[str, Any]
) -> None:
    """Those of S3 with their code and place, and those of the function."""
    names = ["bulk/00", "bulk/missing", "bulk/01"]
    async with asynclam.Executor(1) as executor:
        batches = partial(s3.process_many, bucket, names, executor=executor, **s3_settings)
        with pytest.raises(Exception, match=f"NoSuchKey.*s3://{bucket}/bulk/missing"):
            await batches(s3_jobs.named_digest)
        first, missing, last = await batches(s3_jobs.named_digest, return_exceptions=True)
        assert (first[0], last[0]) == ("bulk/00", "bulk/01")
        assert isinstance(missing, Exception)
        results = await batches(s3_jobs.fails, return_exceptions=True)
        assert (str(results[0]), str(results[2])) == ("bulk/00", "bulk/01")


async def test_a_function_that_exits(
    bucket: str, objects: dict[str, bytes], s3_settings: dict[str, Any]
) -> None:
    """It is the error of its object, and neither the end of the worker nor of what runs beside it."""
    async with asynclam.Executor(1) as executor:
        exits = partial(s3.process_many, bucket, list(objects)[:3], sys.exit, executor=executor)
        with pytest.raises(asynclam.JobExitError):
            await exits(**s3_settings)
        errors = await exits(return_exceptions=True, **s3_settings)
        assert [type(error) for error in errors] == 3 * [asynclam.JobExitError]
        assert executor.statistics().worker_deaths == 0


async def test_a_stream_that_is_left(
    bucket: str, objects: dict[str, bytes], s3_settings: dict[str, Any], gate: Gate
) -> None:
    """Leaving cancels the jobs, also if the function would never return; others run after them."""
    async with asynclam.Executor(1) as executor:
        batches = partial(
            s3.process_many, bucket, fn=s3_jobs.hold(gate.path), executor=executor, **s3_settings
        )
        async with batches(keys=objects) as stream:
            reading = asyncio.ensure_future(anext(stream))
            await gate.entered()
            reading.cancel()
            await asyncio.wait([reading])
        digests = s3.process_many(
            bucket, ["bulk/00"], s3_jobs.named_digest, executor=executor, **s3_settings
        )
        found = await asyncio.wait_for(digests.list(), PATIENCE)
    assert found == [("bulk/00", hashlib.sha256(objects["bulk/00"]).hexdigest())]


async def test_a_worker_that_dies(
    bucket: str, objects: dict[str, bytes], s3_settings: dict[str, Any], gate: Gate
) -> None:
    """It fails the objects that it had begun, and no others."""
    async with asynclam.Executor(2) as executor:
        batches = partial(
            s3.process_many, bucket, fn=s3_jobs.hold(gate.path), executor=executor, **s3_settings
        )
        async with batches(keys=list(objects)[:4], chunksize=2, return_exceptions=True) as stream:
            results = asyncio.ensure_future(stream.list())
            os.kill(await gate.entered(), signal.SIGKILL)
            gate.open(4)
            kinds = [type(result).__name__ for result in await asyncio.wait_for(results, PATIENCE)]
    assert sorted(kinds) == ["WorkerDiedError", "WorkerDiedError", "int", "int"]


async def test_without_workers_it_is_refused(bucket: str) -> None:
    """The message says what runs without."""
    async with asynclam.Executor(0) as executor:
        with pytest.raises(ValueError, match="download_many"):
            s3.process_many(bucket, [], s3_jobs.named_digest, executor=executor)


@pytest.mark.parametrize("name", ["chunksize", "concurrency"])
async def test_less_than_one_is_refused(bucket: str, name: str) -> None:
    """It is a ValueError that names the argument."""
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        s3.process_many(bucket, [], s3_jobs.named_digest, **{name: 0})
