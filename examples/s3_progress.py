"""Progress of downloads, in bytes and in objects: with rich, and with tqdm where that is installed.

    python s3_progress.py BUCKET PREFIX

``progress`` is called on the loop with the number of bytes that have come since the last call, which
is what bars want; ``on_object`` with the key and the length of each object that is complete.
"""

import asyncio
import sys
from functools import partial

from rich.progress import Progress

from asynclam import map_cpu, s3


def words(download):
    _, buffer = download
    with buffer:
        return len(bytes(buffer.view).split())


async def with_rich(client, bucket, objects):
    with Progress() as progress:
        # No total: it is not known while the listing goes on.
        nbytes, count = (progress.add_task(name, total=None) for name in ("bytes", "objects"))
        downloads = s3.download_many(
            client,
            bucket,
            objects,
            progress=partial(progress.advance, nbytes),
            on_object=lambda _key, _length: progress.advance(count),
        )
        return sum(await map_cpu(words, downloads))


async def with_tqdm(client, bucket, key):
    from tqdm import tqdm

    size = (await client.head_object(Bucket=bucket, Key=key))["ContentLength"]
    with tqdm(total=size, unit="B", unit_scale=True, file=sys.stdout) as bar:
        return await s3.download(client, bucket, key, progress=bar.update)


async def main(bucket, prefix):
    async with s3.client() as client:
        print(await with_rich(client, bucket, s3.list_objects(client, bucket, prefix)), "words")
        first = await anext(s3.list_objects(client, bucket, prefix))
        try:
            print(await with_tqdm(client, bucket, first.key))
        except ImportError:
            print("tqdm is not installed")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
