"""Coroutines in workers: each worker has a client of its own, and dozens of requests under way.

    python s3_in_workers.py BUCKET PREFIX

The loop here only hands out names. Signing, receiving and counting is done on all cores, and a worker
that waits for one object counts the words of another.
"""

import asyncio
import sys

from asynclam import Executor, map_io, s3

client = None  # of this worker


async def make_client():
    """The initializer: runs once in each worker, on the loop on which its coroutines run."""
    global client
    client = await s3.client().__aenter__()  # ends with the worker


async def words(bucket, key):
    with await s3.download(client, bucket, key) as buffer:
        return len(bytes(buffer.view).split())


async def main(bucket, prefix):
    async with s3.client() as lister, Executor(initializer=make_client) as executor:

        async def count(listed):
            return await executor.run_async(words, bucket, listed.key)

        listing = s3.list_objects(lister, bucket, prefix)
        print(sum([number async for number in map_io(count, listing, limit=64)]), "words")


if __name__ == "__main__":
    import s3_in_workers  # under its own name: each worker imports it, and has one `client`

    asyncio.run(s3_in_workers.main(*sys.argv[1:]))
