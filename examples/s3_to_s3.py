"""S3 to CPU to S3: downloads on the loop, words counted in workers, one report uploaded."""

import json
from collections import Counter
from contextlib import asynccontextmanager

from asynclam import lambda_handler, map_cpu, s3, state


def count_words(download):
    key, buffer = download
    with buffer:  # shared memory: the object was never copied into this worker
        return Counter(bytes(buffer.view).decode().split())


@asynccontextmanager
async def lifespan():
    async with s3.client() as client:
        yield client


@lambda_handler(lifespan=lifespan)
async def handler(event, context):
    client, bucket = state(), event["bucket"]
    total = Counter()
    async for words in map_cpu(count_words, s3.download_many(client, bucket, event["keys"])):
        total += words
    await s3.upload(client, bucket, event["report"], json.dumps(total).encode())
    return {"words": total.total(), "different": len(total)}


handler.start()  # at init, where Lambda does not throttle the CPU
