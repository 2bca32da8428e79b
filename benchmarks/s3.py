"""Rows about S3: a large object to a worker, small ones in bulk, real ones, a budget, and faults."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from . import jobs, processes, s3_peers
from .contestants import NotPossibleError
from .figures import Line, Place, Results, Samples
from .large import watched
from .rows import CHART_LOOP, CORES, LOOPS, MIB, Row, Task, ours
from .work import NO_SETTINGS, iterations_for

if TYPE_CHECKING:
    from asynclam._demo.seaweedfs import Server

_BUCKET = "benchmark"
_AIOBOTOCORE = s3_peers.Aiobotocore.name
_BOTO3 = s3_peers.Boto3.name
_PEERS = tuple(
    Place(kind.name, CHART_LOOP) for kind in s3_peers.ALL if kind is not s3_peers.Asynclam
)


@asynccontextmanager
async def storage() -> AsyncGenerator[Server]:
    """A server with TLS and an empty bucket, which the environment names."""
    try:
        import trustme

        from asynclam import s3
        from asynclam._demo.seaweedfs import ServerStartError, seaweedfs
    except ImportError as error:
        raise NotPossibleError(f"S3 needs the extras s3 and demo, and trustme: {error}") from error
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        files = [str(Path(directory) / name) for name in ("ca", "chain", "key")]
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(files[0])
        certificate.cert_chain_pems[0].write_to_path(files[1])
        certificate.private_key_pem.write_to_path(files[2])
        try:
            with seaweedfs((files[1], files[2])) as server:
                os.environ.update(server.environment(), **NO_SETTINGS)
                os.environ["AWS_ENDPOINT_URL_S3"] = server.tls_endpoint_url
                os.environ["AWS_CA_BUNDLE"] = files[0]
                async with s3.client() as client:
                    await client.create_bucket(Bucket=_BUCKET)
                yield server
        except ServerStartError as error:
            raise NotPossibleError(str(error).splitlines()[0]) from error


# --- 40: a large object to a worker ----------------------------------------------------------------

_AGAIN = "into memory used again"
_LARGE = 512 * MIB
_LARGE_UNITS = {"seconds": "s", "longest gap": "s", "a bystander's": "s", "PSS added": ""}


async def large_object(task: Task) -> Samples:
    """From S3 over TLS into a worker that reads every page of it."""
    from asynclam import Executor, s3

    nbytes = task.size(_LARGE, 40 * MIB)
    taken: dict[str, list[float]] = {name: [] for name in _LARGE_UNITS}
    async with storage(), s3_peers.BY_NAME[task.place.contestant](_BUCKET) as peer:
        async with s3.client() as client:
            data = os.urandom(8 * MIB)
            await s3.upload(client, _BUCKET, "large", s3_peers.chunks(data, nbytes, len(data)))
            await s3.upload(client, _BUCKET, "small", data[:1000])
        del data
        get = partial(_get_again, peer, nbytes) if task.place.variant else partial(_get, peer)
        async with Executor(1) as executor:
            move = partial(_move, executor, get)
            await move("small")
            with processes.peak_watch() as watch:
                watch.ask()
                before, _ = watch.ask()
                await move("large")
                after, _ = watch.ask()
            taken["PSS added"].append((after - before) / nbytes)
            async with watched() as ticker:
                with processes.bystander() as bystander:
                    for _ in range(task.size(4, 1)):
                        bystander.ask()
                        begun = perf_counter()
                        gap, _ = await ticker.longest_of(partial(move, "large"))
                        taken["seconds"].append(perf_counter() - begun)
                        taken["longest gap"].append(gap)
                        taken["a bystander's"] += bystander.ask()
    return taken


async def _move(executor: Any, get: Callable[[str], Any], key: str) -> None:
    await executor.run_cpu(jobs.look, await get(key))


async def _get(peer: s3_peers.Peer, key: str) -> Any:
    return await peer.get(key)


_memory: list[Any] = []


async def _get_again(peer: s3_peers.Asynclam, nbytes: int, key: str) -> Any:
    from asynclam import SharedBuffer, s3

    if not _memory:
        _memory.append(SharedBuffer(nbytes))
    return await s3.download(peer.client, _BUCKET, key, into=_memory[0])


def _large_lines(results: Results) -> Iterator[Line]:
    theirs = Place(_AIOBOTOCORE, CHART_LOOP)
    for loop in LOOPS:
        place = ours(loop)
        what = "512 MiB from S3 into a worker: aiobotocore's read() and bytes ÷ download and buffer"
        time = results.ratio(("seconds", theirs), ("seconds", place))
        yield Line(40, what, loop, "", time).at_least(4)
        again = results.ratio(("seconds", theirs), ("seconds", ours(loop, _AGAIN)))
        yield Line(40, f"the same, {_AGAIN}", loop, "", again)
        memory = results.ratio(("PSS added", theirs), ("PSS added", place))
        yield Line(40, "the same of the peak memory added", loop, "", memory).at_least(1.9)
        gap = results.figure("longest gap", place)
        yield Line(40, "longest gap of a 1 ms ticker meanwhile", loop, "s", gap).at_most(0.005)
        gap = results.figure("a bystander's", place)
        yield Line(40, "that of a process that only ticks", loop, "s", gap)
        added = results.figure("PSS added", place)
        yield Line(40, "peak PSS added ÷ the object's size", loop, "", added).at_most(1.05)


LARGE = Row(
    40,
    "512 MiB from S3 into a worker",
    large_object,
    (
        *(ours(loop, variant) for variant in ("", _AGAIN) for loop in LOOPS),
        *_PEERS,
    ),
    _LARGE_UNITS,
    _large_lines,
    rounds=2,
)

# --- 41: small objects in bulk ---------------------------------------------------------------------

_PIPELINE = "map_cpu(download_many)"
# Seconds of work with each object, when nothing else runs. With two cores for client and server, whose
# requests cost 1.35 ms of CPU each, nobody gains more than a third in what takes 2.5 ms.
_PARSING = 0.008


async def small_objects(task: Task) -> Samples:
    """A thousand objects of 64 KiB, fetched and parsed; ours in workers, the others' here."""
    from asynclam import Executor, s3

    count = task.size(1000, 64)
    keys = [f"small/{number:04}" for number in range(count)]
    taken: dict[str, list[float]] = {name: [] for name in _SMALL_UNITS}
    iterations = iterations_for(_PARSING)
    async with storage() as server, s3_peers.BY_NAME[task.place.contestant](_BUCKET) as peer:
        pid = server.pid
        async with s3.client() as client:
            data = os.urandom(64 * 1024)
            upload = partial(s3.upload, client, _BUCKET, data=data)
            for begin in range(0, count, 32):
                await asyncio.gather(*(upload(key) for key in keys[begin : begin + 32]))
        async with Executor(CORES) as executor:
            run = partial(_run_small, task.place, peer, executor, iterations)
            await run(keys[:64])  # clients are made, connections opened
            for _ in range(task.size(3, 1)):
                cpu, served = processes.cpu_seconds(pid), processes.cpu_seconds_of(pid)
                begun = perf_counter()
                await run(keys)
                seconds = perf_counter() - begun
                served = processes.cpu_seconds_of(pid) - served
                cpu = processes.cpu_seconds(pid) - cpu
                values = (seconds, served, cpu / CORES, seconds / (cpu / CORES))
                for name, value in zip(_SMALL_UNITS, values, strict=True):
                    taken[name].append(value)
    return taken


async def _run_small(
    place: Place, peer: s3_peers.Peer, executor: Any, iterations: int, keys: list[str]
) -> None:
    from asynclam import s3

    parse = partial(jobs.burn_downloaded, iterations)
    if not isinstance(peer, s3_peers.Asynclam):
        await peer.read_each(keys, partial(jobs.burn, iterations))
        return
    if place.variant == _PIPELINE:
        results = executor.map_cpu(
            parse, s3.download_many(peer.client, _BUCKET, keys), ordered=False
        )
    else:
        results = s3.process_many(_BUCKET, keys, parse, executor=executor)
    async with results:
        async for _ in results:
            pass


_SMALL_UNITS = {
    "seconds": "s",
    "the server's CPU": "s",
    "all CPU ÷ cores": "s",
    "seconds ÷ all CPU ÷ cores": "",
}


def _small_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        seconds = ("seconds", place)
        for theirs, least in ((_AIOBOTOCORE, 1.6), (_BOTO3, 2)):
            ratio = results.ratio(("seconds", Place(theirs, CHART_LOOP)), seconds)
            what = f"1,000 objects of 64 KiB fetched, parsed for 8 ms: {theirs} ÷ process_many"
            yield Line(41, what, loop, "", ratio).at_least(least)
        own = results.figure("seconds ÷ all CPU ÷ cores", place)
        what = "process_many ÷ its own CPU seconds ÷ cores, the server's included"
        yield Line(41, what, loop, "", own).at_most(1.1)
        served = results.figure("the server's CPU", place)
        yield Line(41, "the server's CPU in it", loop, "s", served)
        pipeline = results.ratio(
            ("seconds", Place(_AIOBOTOCORE, CHART_LOOP)), ("seconds", ours(loop, _PIPELINE))
        )
        yield Line(41, f"{_AIOBOTOCORE} ÷ {_PIPELINE}", loop, "", pipeline)


SMALL = Row(
    41,
    "1,000 objects of 64 KiB from S3, fetched and parsed",
    small_objects,
    (*(ours(loop, variant) for variant in ("", _PIPELINE) for loop in LOOPS), *_PEERS),
    _SMALL_UNITS,
    _small_lines,
    rounds=2,
)

# --- 42: the demo's objects ------------------------------------------------------------------------


async def flights(task: Task) -> Samples:
    """In turn: the demo's days downloaded, parsed, and both in one pipeline."""
    from asynclam import Executor, s3

    try:
        from asynclam._demo import flights, stage

        objects = stage.read_days(task.size(stage.YEAR, 20), lambda: None)
    except (ImportError, AssertionError) as error:
        raise NotPossibleError(f"the data of the demo needs the extra demo: {error}") from error
    taken: dict[str, list[float]] = {name: [] for name in _FLIGHT_UNITS}
    async with storage() as server, s3.client() as client, Executor(CORES) as executor:
        for key, data in objects.items():
            await s3.upload(client, _BUCKET, key, data)
        days = await s3.download_many(client, _BUCKET, objects)
        await _drain(executor.map_cpu(flights.summarize, days[:20], ordered=False))
        for _ in range(task.size(3, 1)):
            io = await _drain(s3.download_many(client, _BUCKET, objects))
            parse = executor.map_cpu(flights.summarize, days, ordered=False)
            parsing = await _drain(parse)
            used = processes.cpu_seconds(server.pid)
            downloads = s3.download_many(client, _BUCKET, objects)
            both = await _drain(executor.map_cpu(flights.summarize, downloads, ordered=False))
            used = (processes.cpu_seconds(server.pid) - used) / CORES
            values = (io, parsing, used, both, both / max(io, parsing, used))
            for name, value in zip(_FLIGHT_UNITS, values, strict=True):
                taken[name].append(value)
    return taken


async def _drain(stream: Any) -> float:
    begun = perf_counter()
    async with stream:
        async for _ in stream:
            pass
    return perf_counter() - begun


_FLIGHT_UNITS = {
    "downloads alone": "s",
    "CPU alone": "s",
    "all CPU ÷ cores": "s",
    "end to end": "s",
    "end to end ÷ bound": "",
}


def _flight_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        place = ours(loop)
        what = "the demo's 365 objects, end to end ÷ the largest of three bounds"
        yield Line(42, what, loop, "", results.figure("end to end ÷ bound", place)).at_most(1.15)
        for name in list(_FLIGHT_UNITS)[:-1]:
            yield Line(42, f"the demo's objects: {name}", loop, "s", results.figure(name, place))


FLIGHTS = Row(
    42,
    "the demo's objects, end to end",
    flights,
    tuple(map(ours, LOOPS)),
    _FLIGHT_UNITS,
    _flight_lines,
    rounds=2,
)

# --- 43: a budget ----------------------------------------------------------------------------------


async def budget(task: Task) -> Samples:
    """10,000 objects through workers that are slower than the downloads: what they take at most."""
    from asynclam import Executor, s3

    allowed, nbytes = task.size(256, 8) * MIB, MIB
    count = task.size(10_000, 100)
    different = 50
    async with storage(), s3.client(max_concurrency=64) as client, Executor(CORES) as executor:
        for number in range(different):
            await s3.upload(client, _BUCKET, f"{number}", os.urandom(nbytes))
        keys = [f"{number % different}" for number in range(count)]
        job = partial(jobs.burn_downloaded, iterations_for(0.004))
        await executor.map_cpu(job, s3.download_many(client, _BUCKET, keys[:50]))
        with processes.peak_watch() as watch:
            watch.ask()
            _, before = watch.ask()
            downloads = s3.download_many(client, _BUCKET, keys, limit=1000, budget=allowed)
            await _drain(executor.map_cpu(job, downloads, ordered=False, limit=1000))
            _, after = watch.ask()
    return {"Shmem added ÷ budget": [(after - before) / allowed]}


def _budget_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        peak = results.figure("Shmem added ÷ budget", ours(loop))
        what = "10,000 objects under a budget of 256 MiB: the system's Shmem ÷ it"
        yield Line(43, what, loop, "", peak).at_most(1)


BUDGET = Row(
    43,
    "10,000 objects under a budget",
    budget,
    tuple(map(ours, LOOPS)),
    {"Shmem added ÷ budget": ""},
    _budget_lines,
    rounds=1,
)

# --- 44: faults ------------------------------------------------------------------------------------

_WRONG = "wrong bytes, uploads left open, hangs"
_SPOILT = "answers spoilt"


async def faults(task: Task) -> Samples:
    """Answers are cut off, late, wrong or missing: what uploads, downloads and workers make of it."""
    from botocore.config import Config

    from asynclam import Executor, s3
    from tests.parts.s3_faults import Faults
    from tests.parts.s3_proxy import S3Proxy

    in_ranges = task.size(33 * MIB, 10_000)  # which one stream does not take
    sizes = [1, 64 * 1024, task.size(MIB, 1000), in_ranges]
    retries = {"total_max_attempts": 3}
    async with storage() as server, S3Proxy(server.endpoint_url) as proxy, s3.client() as direct:
        url = proxy.endpoint_url
        impatient = Config(read_timeout=1, retries=retries)
        faults = Faults(proxy, direct, _BUCKET)
        async with s3.client(endpoint_url=url, config=impatient) as client:
            await faults.downloads(client, sizes)
        async with Executor(CORES) as executor:
            await faults.in_workers(executor, sizes, endpoint_url=url, config=impatient)
        async with s3.client(endpoint_url=url, config=Config(retries=retries)) as client:
            await faults.uploads(client, sizes)
    found = faults.findings
    return {_WRONG: [len(found.wrong)], _SPOILT: [sum(found.injected.values())]}


def _fault_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        what = f"S3 answers of eight kinds spoilt, at each size: {_WRONG}"
        yield Line(44, what, loop, "", results.worst(_WRONG, ours(loop))).at_most(0)
        yield Line(44, _SPOILT, loop, "", results.figure(_SPOILT, ours(loop)))


FAULTS = Row(
    44,
    "faults between S3 and us",
    faults,
    tuple(map(ours, LOOPS)),
    {_WRONG: "", _SPOILT: ""},
    _fault_lines,
    rounds=1,
)

ROWS = (LARGE, SMALL, FLIGHTS, BUDGET, FAULTS)
