"""The Lambda function of the demo, as its user would write it.

A year of flights is in S3, one gzip-compressed CSV object a day. The days are downloaded on the
loop, parsed and summed up in workers, and the report goes back to S3.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from asynclam import SharedBuffer, lambda_handler, map_cpu, s3, state

GROUPS = {"carrier": "carrier", "airport": "origin", "hour": "hour"}  # name to column

Count = list[int]  # flights, departures, minutes of delay of the departures
Summary = dict[str, dict[str, Count]]

on_day: Callable[[], object] | None = None  # called after each day, for a progress bar


@asynccontextmanager
async def lifespan() -> AsyncGenerator[Any]:
    """The S3 client, kept from one invocation to the next."""
    async with s3.client() as client:
        yield client


@lambda_handler(lifespan=lifespan)
async def handler(event: Mapping[str, str], context: object) -> dict[str, Any]:  # noqa: ARG001
    """Sums up the flights under ``event["prefix"]``; the report is uploaded as ``event["report"]``."""
    client, bucket = state(), event["bucket"]
    days = s3.download_many(client, bucket, s3.list_objects(client, bucket, event["prefix"]))
    total: Summary = {name: {} for name in GROUPS}
    workers: dict[int, int] = {}
    async with map_cpu(summarize, days, ordered=False) as summaries:
        async for pid, summary in summaries:
            workers[pid] = workers.get(pid, 0) + 1
            add(total, summary)
            if on_day:
                on_day()
    report = report_of(total)
    await s3.upload(client, bucket, event["report"], json.dumps(report).encode())
    return {**report, "days_by_worker": workers}


def summarize(day: tuple[str, SharedBuffer]) -> tuple[int, Summary]:
    """The worker's process id and the counts of one day; runs in a worker."""
    _, buffer = day
    with buffer:
        text = gzip.decompress(buffer.view).decode()
    summary: Summary = {name: {} for name in GROUPS}
    for flight in csv.DictReader(io.StringIO(text)):
        departed = flight["dep_delay"] != "NA"
        delay = int(flight["dep_delay"]) if departed else 0
        for name, column in GROUPS.items():
            count = summary[name].setdefault(flight[column], [0, 0, 0])
            count[0] += 1
            count[1] += departed
            count[2] += delay
    return os.getpid(), summary


def add(total: Summary, summary: Summary) -> None:
    """Adds the counts of one day to the total."""
    for name, counts in summary.items():
        for value, count in counts.items():
            sums = total[name].setdefault(value, [0, 0, 0])
            sums[:] = (a + b for a, b in zip(sums, count, strict=True))


def report_of(total: Summary) -> dict[str, Any]:
    """What is uploaded: the year's figures, and those of each carrier, airport and hour."""
    carriers = total["carrier"].values()
    return {
        **_figures([sum(column) for column in zip(*carriers, strict=True)] or [0, 0, 0]),
        **{
            f"by_{name}": {value: _figures(count) for value, count in sorted(counts.items())}
            for name, counts in total.items()
        },
    }


def _figures(count: Count) -> dict[str, Any]:
    flights, departures, delay = count
    return {
        "flights": flights,
        "without_departure": flights - departures,
        "mean_departure_delay": delay / departures if departures else None,
    }
