"""What a type checker says of the public surface. Checked by pyright (strict), never run."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from typing_extensions import assert_type

import asynclam
from asynclam import (
    Environment,
    Executor,
    SharedBuffer,
    Statistics,
    Stream,
    environment,
    lambda_handler,
    map_cpu,
    map_io,
    prepare,
    remaining,
    run_async,
    run_blocking,
    run_cpu,
    s3,
    set_default_executor,
)
from asynclam.testing import LambdaContext, inline_jobs, invoke, sqs_event

request: ContextVar[str] = ContextVar("request")


def parse(data: bytes, *, strict: bool = False) -> int:
    return len(data) if strict else 0


async def download(key: str) -> bytes:
    return key.encode()


def machine() -> None:
    found = environment()
    assert_type(found, Environment)
    assert_type(found.cpu_share, float | None)
    assert_type(found.max_workers, int)
    found.max_workers = 2  # pyright: ignore[reportAttributeAccessIssue]


async def calls() -> None:
    assert_type(await run_cpu(parse, b""), int)
    assert_type(await run_cpu(parse, b"", strict=True), int)
    assert_type(await run_blocking(parse, b""), int)
    assert_type(await run_async(download, "key"), bytes)
    await run_async(download, 5)  # pyright: ignore[reportArgumentType]
    await run_async(parse, b"")  # pyright: ignore[reportArgumentType]
    await run_cpu(parse, "text")  # pyright: ignore[reportArgumentType]
    await run_cpu(parse)  # pyright: ignore[reportCallIssue]
    await run_cpu(parse, b"", loose=True)  # pyright: ignore[reportCallIssue]


async def streams() -> None:
    assert_type(map_cpu(parse, [b""]), Stream[int])
    assert_type(await map_cpu(parse, [b""]), list[int])
    assert_type(await map_cpu(parse, [b""], return_exceptions=True), list[int | BaseException])
    assert_type(await map_io(download, ["key"]), list[bytes])
    assert_type(
        await map_io(download, ["key"], return_exceptions=True), list[bytes | BaseException]
    )
    assert_type(await map_cpu(parse, map_io(download, ["key"])), list[int])
    async for size in map_cpu(parse, [b""]):
        assert_type(size, int)
    async with map_io(download, ["key"]) as bodies:
        assert_type(bodies, Stream[bytes])


def words(download: tuple[str, SharedBuffer]) -> int:
    return len(bytes(download[1].view).split())


async def storage(keys: list[str]) -> None:
    async with s3.client(max_concurrency=8, region_name="eu-central-1") as client:
        buffer = await s3.download(client, "bucket", "key", byte_range=(0, None))
        assert_type(buffer, SharedBuffer)
        assert_type(await s3.download(client, "bucket", "key", into=buffer), SharedBuffer)
        await s3.upload(client, "bucket", "key", b"data", if_none_match="*", ContentType="text/csv")
        await s3.upload(client, "bucket", "key", map_io(download, keys), progress=print)
        await s3.upload(client, "bucket", "key", "text")  # pyright: ignore[reportArgumentType]
        downloads = s3.download_many(client, "bucket", keys, budget=1 << 28)
        assert_type(downloads, Stream[tuple[str, SharedBuffer]])
        assert_type(await map_cpu(words, downloads), list[int])
        async for summary in s3.list_objects(client, "bucket", "prefix/"):
            assert_type(summary, s3.ObjectSummary)
            assert_type(summary.size, int)
        listing = s3.list_objects(client, "bucket")
        assert_type(s3.process_many("bucket", listing, words), Stream[int])
    await s3.process_many("bucket", keys, parse)  # pyright: ignore[reportArgumentType]


def modules() -> None:
    """The doors are lazy, and a checker sees what is behind them, and nothing else."""
    assert_type(asynclam.__version__, str)
    assert_type(asynclam.testing.LambdaContext(1.0), LambdaContext)
    asynclam.s3.client(max_concurrency="8")  # pyright: ignore[reportArgumentType]
    assert_type(asynclam.doctor.main(as_json=True), int)
    asynclam.run_cup()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    asynclam.s3.cleint()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


async def executors() -> None:
    prepare()
    set_default_executor(None)
    async with Executor(2, start_method="spawn", context_vars=[request]) as executor:
        assert_type(await executor.run_cpu(parse, b""), int)
        assert_type(await executor.map_cpu(parse, [b""]), list[int])
        assert_type(await executor.map_io(download, ["key"]), list[bytes])
        assert_type(executor.statistics(), Statistics)
        assert_type(executor.statistics().processes_pay, bool | None)
        patient = executor.options(retries=2, cancel_grace=0.5)
        assert_type(await patient.run_cpu(parse, b""), int)
        assert_type(await patient.map_cpu(parse, [b""]), list[int])
        executor.options(retries="2")  # pyright: ignore[reportArgumentType]
        Executor(1, max_tasks_per_child=10, max_memory_per_child=1 << 30)
    Executor(start_method="forkserver")  # pyright: ignore[reportArgumentType]


def buffers() -> None:
    with SharedBuffer(10) as buffer:
        assert_type(buffer.view, memoryview)
        assert_type(buffer.nbytes, int)


@asynccontextmanager
async def lifespan() -> AsyncGenerator[str]:
    yield "resource"


@lambda_handler
async def plain(event: dict[str, str], context: object) -> int:
    return len(event)


@lambda_handler(lifespan=lifespan)
async def with_lifespan(event: dict[str, str], context: object) -> int:
    return len(event)


@lambda_handler(margin=1.0)
async def with_margin(event: dict[str, str], context: LambdaContext) -> int:
    assert_type(remaining(), float)
    return len(event)


async def tests() -> None:
    with inline_jobs() as executor:
        assert_type(executor, Executor)
    await invoke(with_margin, sqs_event("body"), LambdaContext(1.0))


def handlers() -> None:
    assert_type(with_margin({}, LambdaContext()), int)
    assert_type(plain({}, None), int)
    assert_type(with_lifespan({}, None), int)
    plain.start()
    plain(5, None)  # pyright: ignore[reportArgumentType]
