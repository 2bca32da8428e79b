"""An ASGI application under a real server and a real client: quick while the workers compute."""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

import asynclam
from tests.parts.processes import children

EXAMPLES = Path(asynclam.__file__).parent.parent / "examples"
REQUESTS = 200
CONNECTIONS = 20  # at once
LONG = 1_000_000_000  # iterations: takes minutes
WORKERS = 2


SERVE = """\
import socket, sys, uvicorn
# Not by --fd: uvicorn takes that for an AF_UNIX socket, and leaves Nagle's algorithm on.
listener = socket.socket(fileno=int(sys.argv[1]))
uvicorn.Server(uvicorn.Config("asgi:app", timeout_graceful_shutdown=0)).run(sockets=[listener])
"""


class Server(NamedTuple):
    url: str
    pid: int


@pytest.fixture
def server(tmp_path):
    """The example under uvicorn, on a port that is open before it has started; ended by SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as listener, open(tmp_path / "log", "w+b") as log:
        with subprocess.Popen(
            [sys.executable, "-c", SERVE, str(listener.fileno())],
            cwd=EXAMPLES,
            env={**os.environ, "ASYNCLAM_MAX_WORKERS": str(WORKERS)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
        ) as process:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", process.pid)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        log.seek(0)
        text = log.read().decode()
        assert "Application shutdown complete" in text, text  # its lifespan has closed the executor


async def ask(session, url, status=200):
    async with session.get(url) as response:
        assert response.status == status
        return await response.text()


async def test_requests_are_answered_while_all_workers_compute(server):
    """While every worker has minutes of work, hundreds of small requests are answered."""
    connector = aiohttp.TCPConnector(limit=CONNECTIONS + WORKERS)
    async with aiohttp.ClientSession(connector=connector) as session:
        key = hashlib.pbkdf2_hmac("sha256", b"secret", b"salt", 10).hex()
        assert await ask(session, f"{server.url}/key/10") == f'"{key}"'
        long = [
            asyncio.create_task(ask(session, f"{server.url}/key/{LONG}")) for _ in range(WORKERS)
        ]
        answers = await asyncio.gather(
            *(ask(session, f"{server.url}/health") for _ in range(REQUESTS))
        )
        assert answers == ["ok"] * REQUESTS
        assert not any(task.done() for task in long)
        for task in long:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_workers_give_way(server):
    """The loop and the clients have the CPU before them, also where each session has its share."""
    async with aiohttp.ClientSession() as session:
        long = [asyncio.create_task(ask(session, f"{server.url}/key/{LONG}")) for _ in range(2)]
        while (
            len(workers := [pid for server in children(server.pid) for pid in children(server)]) < 2
        ):
            await asyncio.sleep(0)
        while not all(map(gives_way, workers)):
            await asyncio.sleep(0)
        assert os.getpriority(os.PRIO_PROCESS, server.pid) == 0
        for task in long:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def gives_way(pid):
    session = Path(f"/proc/{pid}/autogroup")  # some kernels have none
    given = session.read_text().endswith("nice 19\n") if session.exists() else True
    return given and os.getpriority(os.PRIO_PROCESS, pid) == 19
