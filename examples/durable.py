"""A durable function: what its steps have computed is kept while it waits, for up to a year.

Its context is made for sync code, and blocks: an async handler calls it in threads. Wants
aws-durable-execution-sdk-python.
"""

import asyncio
import hashlib

from aws_durable_execution_sdk_python.config import Duration
from aws_durable_execution_sdk_python.execution import durable_execution

import asynclam
from asynclam import lambda_handler, map_cpu, run_blocking


def digest(text):
    return hashlib.pbkdf2_hmac("sha256", text.encode(), b"salt", 10_000).hex()


async def step(context, name, work):
    """Awaits the work, in the first invocation that comes here; later ones have its result."""
    loop = asyncio.get_running_loop()

    def wait(_):
        return asyncio.run_coroutine_threadsafe(work(), loop).result()

    return await run_blocking(context.step, wait, name)


@durable_execution
@lambda_handler
async def handler(event, context):
    async def digests():
        return await map_cpu(digest, event["texts"])

    found = await step(context, "digests", digests)
    await run_blocking(context.wait, Duration.from_seconds(event["seconds"]))
    return dict(zip(event["texts"], found, strict=True))


asynclam.prepare()
