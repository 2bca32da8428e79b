"""Many objects: never more bytes of them than the budget, in whatever process they are."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import asynclam
from asynclam import SharedBuffer, s3
from asynclam.s3 import _budget, _many
from asynclam.s3._budget import Budget
from tests.end_to_end import s3_jobs
from tests.parts.s3_objects import KIB, MIB, PATIENCE, content, held_segments, is_get, until
from tests.parts.s3_proxy import Seen, Spoilt

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Behind, MakeClient
    from tests.parts.gate import Gate

NBYTES = 64 * KIB


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[Budget]:
    """Those that the streams of a test have made."""
    made: list[Budget] = []

    def make(*args: Any, **kwargs: Any) -> Budget:
        made.append(Budget(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(_many, "Budget", make)
    return made


@pytest.fixture
async def keys(s3_client: Any, bucket: str) -> list[str]:
    """Twenty objects of 64 KiB."""
    names = [f"budget/{number:02}" for number in range(20)]
    await asyncio.gather(*(s3.upload(s3_client, bucket, key, content(NBYTES)) for key in names))
    return names


def segments_of(nbytes: int) -> int:
    """How many descriptors of segments of that length this process has."""
    paths = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum("asynclam" in os.readlink(path) and path.stat().st_size == nbytes for path in paths)


def open_descriptors(*, without: str) -> int:
    """How many this process has, but for those of a kind."""
    paths = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(not os.readlink(path).startswith(without) for path in paths)


async def some_turns() -> None:
    """Lets the loop run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_pipeline_keeps_to_its_budget(
    s3_client: Any, bucket: str, keys: list[str], budgets: list[Budget]
) -> None:
    """Workers included; and at its end nothing is held."""
    before = held_segments()
    async with asynclam.Executor(2) as executor:
        downloads = s3.download_many(s3_client, bucket, keys, budget=4 * NBYTES)
        digests = await executor.map_cpu(s3_jobs.named_digest, downloads)
    assert sorted(key for key, _ in digests) == keys
    (budget,) = budgets
    assert NBYTES < budget.peak <= 4 * NBYTES
    gc.collect()
    assert held_segments() == before


async def test_what_a_worker_keeps_counts(
    s3_client: Any, bucket: str, keys: list[str], budgets: list[Budget]
) -> None:
    """The job is done, the loop process has nothing of it, and the memory is not free yet."""
    async with asynclam.Executor(1) as executor:
        downloads = s3.download_many(s3_client, bucket, keys[:2], budget=NBYTES)
        async with executor.map_cpu(s3_jobs.keep, downloads, chunksize=1) as lengths:
            assert await anext(lengths) == NBYTES
            second = asyncio.ensure_future(anext(lengths))
            await until(lambda: budgets[0]._waiting and not segments_of(NBYTES))
            assert budgets[0].used == NBYTES
            assert await executor.run_cpu(s3_jobs.forget) == 1
            assert await second == NBYTES
    assert budgets[0].peak == NBYTES


@pytest.mark.parametrize("chunksize", [None, 1])
async def test_a_pipeline_of_one_object_at_a_time(
    s3_client: Any, bucket: str, budgets: list[Budget], chunksize: int | None
) -> None:
    """Nothing on the way from the download to the worker keeps what the next one waits for.

    Nor where objects are so small that ``map_cpu`` wants more of them for one job.
    """
    keys = [f"tiny/{number:02}" for number in range(40)]
    await asyncio.gather(*(s3.upload(s3_client, bucket, key, b"tiny") for key in keys))
    async with asynclam.Executor(2) as executor:
        downloads = s3.download_many(s3_client, bucket, keys, budget=4)
        digests = await asyncio.wait_for(
            executor.map_cpu(s3_jobs.named_digest, downloads, chunksize=chunksize).list(), PATIENCE
        )
    assert sorted(key for key, _ in digests) == keys
    assert budgets[0].peak == len(b"tiny")


async def test_a_stream_keeps_no_item_while_it_waits_for_the_next() -> None:
    """A source may wait until the memory of the one before is free."""
    things = []

    def thing() -> s3_jobs.Thing:
        made = s3_jobs.Thing()
        things.append(weakref.ref(made))
        return made

    async def source() -> AsyncIterator[Any]:
        for number in range(500):  # so that it is measured, and several are read at once
            yield number
        yield thing()
        while things[0]() is not None:
            await asyncio.sleep(0)
        yield "end"

    async with asynclam.Executor(1) as executor:
        names = executor.map_cpu(s3_jobs.type_name, source())
        assert (await asyncio.wait_for(names.list(), PATIENCE))[-2:] == ["Thing", "str"]


async def test_what_a_dead_worker_held_is_free(
    s3_client: Any, bucket: str, keys: list[str], budgets: list[Budget], gate: Gate
) -> None:
    """The kernel tells, not the worker."""
    async with asynclam.Executor(1) as executor:
        downloads = s3.download_many(s3_client, bucket, keys[:2], budget=NBYTES)
        results = executor.map_cpu(
            s3_jobs.hold(gate.path), downloads, chunksize=1, return_exceptions=True
        )
        async with results:
            first = asyncio.ensure_future(anext(results))
            os.kill(await gate.entered(), signal.SIGKILL)
            assert isinstance(await first, asynclam.WorkerDiedError)
            await gate.entered()
            gate.open()
            assert await anext(results) == NBYTES


async def test_a_view_keeps_memory_that_a_buffer_has_closed(
    s3_client: Any, bucket: str, keys: list[str], budgets: list[Budget]
) -> None:
    """Closing the buffer is not enough while an array looks into it."""
    async with s3.download_many(s3_client, bucket, keys[:2], budget=NBYTES) as downloads:
        _, buffer = await anext(downloads)
        view = buffer.view
        buffer.close()
        second = asyncio.ensure_future(anext(downloads))
        await until(lambda: budgets[0]._waiting)
        await asyncio.sleep(0)
        assert not second.done()
        assert view == content(NBYTES)
        del view, buffer
        (await second)[1].close()


async def test_an_object_above_the_budget_comes_alone(
    s3_client: Any, bucket: str, budgets: list[Budget]
) -> None:
    """Waiting would not make it smaller."""
    sizes = {"above/1": 100, "above/2": 5_000, "above/3": 200}
    for key, size in sizes.items():
        await s3.upload(s3_client, bucket, key, content(size))
    found = {}
    async for key, buffer in s3.download_many(s3_client, bucket, sizes, budget=1_000):
        found[key] = buffer.nbytes
        assert budgets[0].used <= 1_000 or budgets[0].used == 5_000
        buffer.close()
    assert found == sizes


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_slow_first_object_holds_nothing_up_for_ever(
    behind: Behind, bucket: str, keys: list[str], ordered: bool
) -> None:
    """Those behind it do not take the memory that it needs, if the order says it comes first."""
    others = 0
    go = asyncio.Event()

    def rule(request: Seen) -> Spoilt | None:
        nonlocal others
        if request.path.endswith(keys[0]):
            return Spoilt(before=go.wait)
        others += is_get(request)
        if others == 5:
            go.set()
        return None

    found = []
    async with behind(rule) as (_, client):
        downloads = s3.download_many(client, bucket, keys, budget=NBYTES, ordered=ordered, limit=8)
        async for key, buffer in downloads:
            found.append(key)
            buffer.close()
            del buffer
    assert sorted(found) == keys
    assert not ordered or found == keys


LARGE = 2 * MIB  # so that it is not all in the buffers while nobody reads it


@pytest.fixture
async def large_keys(s3_client: Any, bucket: str) -> list[str]:
    """Twelve objects that hold a connection until they are read."""
    names = [f"large/{number:02}" for number in range(12)]
    await asyncio.gather(*(s3.upload(s3_client, bucket, key, content(LARGE)) for key in names))
    return names


@pytest.mark.parametrize("ordered", [False, True])
async def test_what_waits_for_memory_has_no_connection(
    s3_client_with: MakeClient, bucket: str, large_keys: list[str], ordered: bool
) -> None:
    """Who has taken an object may use the client before the memory is free."""
    sizes = []
    async with s3_client_with(max_concurrency=3) as client:

        async def read() -> None:
            downloads = s3.download_many(
                client, bucket, large_keys, budget=LARGE, limit=12, ordered=ordered
            )
            async for key, buffer in downloads:
                with buffer:
                    assert buffer.view == content(LARGE)
                    head = await client.head_object(Bucket=bucket, Key=key)
                    sizes.append(head["ContentLength"])

        await asyncio.wait_for(read(), PATIENCE)
    assert sizes == [LARGE] * len(large_keys)


@pytest.mark.parametrize("ordered", [False, True])
async def test_two_streams_of_one_client(
    s3_client_with: MakeClient, bucket: str, large_keys: list[str], ordered: bool
) -> None:
    """Each has its budget, and leaves the other the connections that it needs."""
    settings: dict[str, Any] = {"budget": LARGE, "limit": 6, "ordered": ordered}
    async with s3_client_with(max_concurrency=4) as client:

        async def read() -> list[bool]:
            same = []
            others = s3.download_many(client, bucket, large_keys[6:], **settings)
            async with others, s3.download_many(client, bucket, large_keys[:6], **settings) as ours:
                async for _, buffer in ours:
                    _, other = await anext(others)
                    with buffer, other:
                        same.append(buffer.view == other.view)
            return same

        assert await asyncio.wait_for(read(), PATIENCE) == [True] * 6


async def test_objects_are_asked_for_when_there_is_room(
    behind: Behind, bucket: str, keys: list[str]
) -> None:
    """Once for each: but for those that were, before it was known how long objects are."""
    async with behind() as (proxy, client):
        downloads = s3.download_many(client, bucket, keys, budget=2 * NBYTES, limit=4)
        async for _, buffer in downloads:
            await some_turns()
            buffer.close()
            del buffer
        asked = sum(map(is_get, proxy.requests))
    assert len(keys) <= asked <= len(keys) + 4


async def test_a_list_has_no_budget(s3_client: Any, bucket: str, keys: list[str]) -> None:
    """It keeps everything, so waiting for memory would be waiting for ever.

    Nobody counts it, so each buffer has one descriptor, of which a function has 1,024.
    """
    before = open_descriptors(without="socket")
    downloads = await s3.download_many(s3_client, bucket, keys, budget=1)
    assert sum(buffer.nbytes for _, buffer in downloads) == len(keys) * NBYTES
    assert open_descriptors(without="socket") - before == len(keys)


async def test_a_stream_that_is_left_gives_everything_back(
    s3_client: Any, bucket: str, keys: list[str]
) -> None:
    """What waits for memory, too."""
    before = held_segments()
    async with s3.download_many(s3_client, bucket, keys, budget=2 * NBYTES) as downloads:
        await anext(downloads)
    gc.collect()
    assert held_segments() == before


async def test_buffers_outlive_their_stream(s3_client: Any, bucket: str, keys: list[str]) -> None:
    """At its end nobody waits for their memory, and they are as any other buffer."""
    kept = [pair async for pair in s3.download_many(s3_client, bucket, keys)]
    async with asynclam.Executor(1) as executor:
        (key, buffer), *_ = kept
        assert await executor.run_cpu(s3_jobs.named_digest, (key, buffer))
        assert await executor.run_cpu(s3_jobs.same, buffer)  # there and back
        assert buffer.view == content(NBYTES)


async def test_errors_use_no_budget(s3_client: Any, bucket: str, keys: list[str]) -> None:
    """A turn that fails is over, in order, too."""
    names = ["missing/1", keys[0], "missing/2", keys[1]]
    found = await asyncio.wait_for(
        _kinds(
            s3.download_many(
                s3_client, bucket, names, budget=NBYTES, ordered=True, return_exceptions=True
            )
        ),
        PATIENCE,
    )
    assert found == ["NoSuchKey", keys[0], "NoSuchKey", keys[1]]


async def _kinds(downloads: Any) -> list[str]:
    return [
        type(item).__name__ if isinstance(item, Exception) else item[0] async for item in downloads
    ]


async def test_progress_in_bytes_and_objects(s3_client: Any, bucket: str, keys: list[str]) -> None:
    """Callbacks on the loop: bytes as they come, objects as they are complete."""
    came: list[int] = []
    complete: dict[str, int] = {}
    async with s3.download_many(
        s3_client, bucket, keys, progress=came.append, on_object=complete.__setitem__
    ) as downloads:
        async for _, buffer in downloads:
            buffer.close()
    assert sum(came) == len(keys) * NBYTES
    assert complete == dict.fromkeys(keys, NBYTES)


@pytest.mark.parametrize("name", ["limit", "budget"])
async def test_less_than_one_is_refused(name: str) -> None:
    """It is a ValueError that names the argument."""
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        s3.download_many(None, "bucket", [], **{name: 0})


def test_the_budget_follows_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter: of the function's on Lambda, of the machine's elsewhere."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1024")
    assert _budget.default_budget() == 256 * KIB * KIB
    monkeypatch.delenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE")
    total = int(Path("/proc/meminfo").read_text().split()[1]) * KIB
    assert _budget.default_budget() == pytest.approx(total / 4, rel=0.01)


async def test_waiting_is_first_come_first_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small one does not overtake a large one, which would wait for ever; a cancel gives way."""
    budget = Budget(100, in_order=False)
    first = await budget.buffer(0, 60)
    large = asyncio.ensure_future(budget.buffer(1, 90))
    small = asyncio.ensure_future(budget.buffer(2, 30))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not large.done()
    assert not small.done()
    large.cancel()
    held = await small
    for buffer in (first, held):
        buffer.close()
    await until(lambda: not budget.used)
    budget.close()


async def test_waiting_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps a buffer while the next one needs its memory is told, and can still close it."""
    monkeypatch.setattr(_budget, "_LONG", 0)
    budget = Budget(100, in_order=False)
    first = await budget.buffer(0, 70)
    second = asyncio.ensure_future(budget.buffer(1, 80))
    with pytest.warns(RuntimeWarning, match=r"70 bytes.*next one has 80.*close the buffers"):
        await some_turns()
    first.close()
    (await second).close()
    await until(lambda: not budget.used)
    budget.close()


async def test_a_grant_that_nobody_takes_is_given_back() -> None:
    """Cancelled in the very turn in which there was room."""
    budget = Budget(100, in_order=False)
    first = await budget.buffer(0, 100)
    second = asyncio.ensure_future(budget.buffer(1, 60))
    await asyncio.sleep(0)
    budget.lift()
    assert budget.used == 160
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert budget.used == 100
    first.close()
    budget.close()


async def test_memory_that_cannot_be_had_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system leaves the budget as it was."""

    def fail(_: int) -> SharedBuffer:
        raise OSError("no descriptor is left")

    monkeypatch.setattr(_budget, "CountedBuffer", fail)
    budget = Budget(100, in_order=False)
    with pytest.raises(OSError, match="no descriptor"):
        await budget.buffer(0, 50)
    assert not budget.used


async def test_listing(s3_client: Any, bucket: str) -> None:
    """All objects under a prefix, in order, over several pages, with what S3 says of them."""
    names = [f"listed/{number}" for number in range(5)]
    for name in names:
        await s3.upload(s3_client, bucket, name, name.encode())
    pages = 0

    def small_pages(params: dict[str, Any], **_: Any) -> None:
        nonlocal pages
        pages += 1
        params["MaxKeys"] = 2

    s3_client.meta.events.register("provide-client-params.s3.ListObjectsV2", small_pages)
    found = [item async for item in s3.list_objects(s3_client, bucket, "listed/")]
    assert [item.key for item in found] == names
    assert {item.size for item in found} == {len(names[0])}
    assert pages == 3
    head = await s3_client.head_object(Bucket=bucket, Key=names[0])
    assert (found[0].etag, found[0].last_modified) == (head["ETag"], head["LastModified"])
    after = s3.list_objects(s3_client, bucket, "listed/", start_after=names[2])
    assert [item.key async for item in after] == names[3:]
    assert not [item async for item in s3.list_objects(s3_client, bucket, "nothing/")]


async def test_a_listing_feeds_downloads(s3_client: Any, bucket: str) -> None:
    """It is read as the downloads go on, and closed with them."""
    names = [f"fed/{number}" for number in range(3)]
    for name in names:
        await s3.upload(s3_client, bucket, name, name.encode())
    downloads = s3.download_many(s3_client, bucket, s3.list_objects(s3_client, bucket, "fed/"))
    found = {key: bytes(buffer.view) for key, buffer in await downloads}
    assert found == {name: name.encode() for name in names}


async def test_a_listing_of_a_missing_bucket(s3_client: Any) -> None:
    """The error is botocore's, and says where."""
    with pytest.raises(s3_client.exceptions.NoSuchBucket, match="s3://no-such-bucket/some/"):
        await anext(s3.list_objects(s3_client, "no-such-bucket", "some/"))
