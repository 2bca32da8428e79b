"""A web application whose requests stay quick while workers compute.

    uvicorn asgi:app

The same application is what a Lambda Web Function runs: its lifespan owns the workers.
"""

import hashlib
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from asynclam import Executor


def stretch(secret, iterations):
    return hashlib.pbkdf2_hmac("sha256", secret, b"salt", iterations).hex()


@asynccontextmanager
async def lifespan(app):
    async with Executor() as executor:
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
