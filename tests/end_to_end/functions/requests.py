"""Handlers whose jobs log, in two ways to run a loop: one that is kept, and one an invocation."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

if os.environ.get("TESTS_LOOP") == "asyncio":
    sys.modules["uvloop"] = None  # type: ignore[assignment] - as if it were not installed

from aws_lambda_powertools import Logger

from asynclam import Executor, lambda_handler, prepare, run_cpu, state

logging.getLogger().setLevel(logging.INFO)
logger = logging.getLogger("function")
powertools = Logger(service="powertools")


def job(request: str) -> dict[str, Any]:
    """Says which request it believes to serve."""
    logger.info("job of %s", request)
    powertools.info("powertools of %s", request)
    return {"pid": os.getpid(), "trace": os.environ.get("_X_AMZN_TRACE_ID")}


async def main(context: Any) -> dict[str, Any]:
    """One invocation."""
    logger.info("handler of %s", context.aws_request_id)
    told = await run_cpu(job, context.aws_request_id)
    loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
    return {**told, "request": context.aws_request_id, "loop": loop}


@powertools.inject_lambda_context
@lambda_handler
async def kept(event: object, context: Any) -> dict[str, Any]:
    """Runs in the loop of the sandbox."""
    return await main(context)


@powertools.inject_lambda_context
def run(event: object, context: Any) -> dict[str, Any]:
    """Runs in a loop of its own, as it was written before there was asynclam."""
    return asyncio.run(main(context))


@asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """A server that accepts connections and never answers; its port."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1]


@lambda_handler(lifespan=silent_server, executor=Executor(2))
async def slow(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Downloads from a server that does not answer, and computes for ever, if the event says so."""
    if event.get("work"):
        reader, _ = await asyncio.open_connection("127.0.0.1", state())
        await asyncio.gather(reader.read(), run_cpu(spin))
    return {
        "loop": id(asyncio.get_running_loop()),
        "process": os.getpid(),
        "worker": await run_cpu(os.getpid),
    }


@asynccontextmanager
async def said() -> AsyncIterator[None]:
    """Says when it is entered and left, and has a worker until then."""
    print("enter", flush=True)
    yield
    await run_cpu(os.getpid)
    print("leave", flush=True)


@lambda_handler(lifespan=said)
async def polite(event: object, context: object) -> object:
    """Gives the event back."""
    return event


def spin() -> None:
    """Computes until somebody ends it."""
    while True:
        pass


if os.environ.get("_HANDLER", "").endswith(".run"):
    prepare()
elif os.environ.get("_HANDLER", "").endswith(".slow"):
    slow.start()
elif os.environ.get("_HANDLER", "").endswith(".polite"):
    polite.start()
else:
    kept.start()
