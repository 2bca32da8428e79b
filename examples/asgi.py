"""A web application whose requests stay quick while workers compute.

    uvicorn asgi:app

The same application is what a Lambda Web Function runs: its lifespan owns the workers.
"""

import hashlib
import os
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from asynclam import Executor


def stretch(secret, iterations):
    return hashlib.pbkdf2_hmac("sha256", secret, b"salt", iterations).hex()


def yield_to_requests():
    """In each worker: the loop and its clients have the CPU before it (sched(7), nice and autogroups)."""
    os.nice(19)
    with suppress(OSError), open("/proc/self/autogroup", "w") as autogroup:
        autogroup.write("19")


@asynccontextmanager
async def lifespan(app):
    async with Executor(initializer=yield_to_requests) as executor:
        yield {"executor": executor}


async def key(request):
    iterations = request.path_params["iterations"]
    return JSONResponse(await request.state.executor.run_cpu(stretch, b"secret", iterations))


async def health(request):
    return PlainTextResponse("ok")


app = Starlette(
    routes=[Route("/key/{iterations:int}", key), Route("/health", health)],
    lifespan=lifespan,
)
