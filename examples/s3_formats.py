"""Objects as people have them: compressed CSV and NDJSON, Parquet, images, arrays.

Each is decompressed and read in a worker, out of the memory into which it was downloaded, while the
next ones are downloaded. Needs pyarrow, pillow, numpy, and backports.zstd below Python 3.14.
"""

import csv
import gzip
import io
import json
import sys
from contextlib import asynccontextmanager

from asynclam import lambda_handler, map_cpu, s3, state


def read(download):
    key, buffer = download
    suffix = next(suffix for suffix in READERS if key.endswith(suffix))
    with buffer:
        return key, READERS[suffix](buffer.view)


def csv_gz(view):
    # Decompressed line by line, so never as a whole.
    with gzip.open(io.BytesIO(view), "rt", newline="") as lines:
        delays = [
            int(row["dep_delay"]) for row in csv.DictReader(lines) if row["dep_delay"] != "NA"
        ]
    return {"departures": len(delays), "mean_delay": sum(delays) / len(delays)}


def ndjson_zst(view):
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    with zstd.open(io.BytesIO(view), "rt") as lines:
        highest = max(map(json.loads, lines), key=lambda airport: airport["alt"])
    return {"highest": highest["name"], "feet": highest["alt"]}


def parquet(view):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # Of the columns that are wanted only; the file itself is not copied.
    table = pq.read_table(pa.py_buffer(view), columns=["manufacturer", "seats"])
    return {"planes": table.num_rows, "seats": pc.sum(table["seats"]).as_py()}


def image(view):
    from PIL import Image

    with Image.open(io.BytesIO(view)) as picture:
        picture.thumbnail((128, 128))
        thumbnail = io.BytesIO()
        picture.save(thumbnail, "JPEG")
    return {"width": picture.width, "height": picture.height, "bytes": len(thumbnail.getvalue())}


def array(view):
    import numpy as np

    temperatures = np.frombuffer(view, dtype="<f8")  # no copy: the array is the buffer
    return {"hours": len(temperatures), "coldest": float(np.nanmin(temperatures))}


READERS = {
    ".csv.gz": csv_gz,
    ".ndjson.zst": ndjson_zst,
    ".parquet": parquet,
    ".jpg": image,
    ".f8": array,
}


@asynccontextmanager
async def lifespan():
    async with s3.client() as client:
        yield client


@lambda_handler(lifespan=lifespan)
async def handler(event, context):
    client, bucket = state(), event["bucket"]
    objects = s3.list_objects(client, bucket, event["prefix"])
    return dict(await map_cpu(read, s3.download_many(client, bucket, objects)))


handler.start()  # at init, where Lambda does not throttle the CPU
