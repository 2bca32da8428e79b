"""Messages of a queue: what was not done in time, or failed, comes again; nothing else does.

Lambda deletes the messages of a batch that are not in ``batchItemFailures`` (the event source needs
``FunctionResponseTypes: [ReportBatchItemFailures]``). So the handler stops by itself while there is
time to answer, instead of failing the batch as a whole at the deadline.
"""

import asyncio
import hashlib

from asynclam import lambda_handler, remaining, run_cpu

LAST_WORDS = 1.0  # seconds to answer in; more than the margin at which the handler is cancelled
LONGEST = 900.0  # seconds that Lambda gives an invocation at most


def digest(body):
    if not body:
        raise ValueError("an empty message")
    return hashlib.pbkdf2_hmac("sha256", body.encode(), b"salt", 20_000).hex()


async def work(message):
    print(message["messageId"], await run_cpu(digest, message["body"]))


@lambda_handler
async def handler(event, context):
    tasks = {asyncio.create_task(work(message)): message for message in event["Records"]}
    seconds = max(0.0, min(remaining() - LAST_WORDS, LONGEST))
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()  # stops the worker, too
    failed = [task for task in tasks if task in late or task.exception()]
    return {"batchItemFailures": [{"itemIdentifier": tasks[task]["messageId"]} for task in failed]}


handler.start()
