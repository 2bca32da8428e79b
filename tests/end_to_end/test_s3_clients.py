"""Clients that are kept: connections that die in a freeze, credentials that expire, TLS once."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiobotocore
import botocore
import pytest
from aiobotocore.config import AioConfig
from aiohttp import web

from asynclam import s3
from tests.parts.s3_objects import KIB, MIB, PATIENCE, content, is_get, until

if TYPE_CHECKING:
    from asynclam._demo.seaweedfs import Server
    from tests.end_to_end.conftest import Authority, Behind, MakeClient


async def test_connections_that_died_in_a_freeze_are_replaced(behind: Behind, bucket: str) -> None:
    """The loop has had no turn to notice, as after a thaw; nobody sees an error, or waits."""
    keys = [f"thaw/{number}" for number in range(8)]
    async with behind() as (proxy, client):
        for key in keys:
            await s3.upload(client, bucket, key, content(KIB))
        for download in await asyncio.gather(*(s3.download(client, bucket, key) for key in keys)):
            download.close()
        proxy.requests.clear()
        proxy.drop_connections()  # and the downloads begin in the same turn of the loop
        downloads = [s3.download(client, bucket, key) for key in keys]
        for buffer in await asyncio.gather(*downloads):
            assert buffer.view == content(KIB)
        assert sum(map(is_get, proxy.requests)) == len(keys)
        proxy.drop_connections()
        await s3.upload(client, bucket, "thaw/0", content(KIB))


async def test_no_connection_outlives_its_client(
    s3_client_with: MakeClient, bucket: str, scheme: str, authority: Authority
) -> None:
    """Not even one to which a cancelled upload was writing, and from which nobody reads any more.

    A loop that is closed then leaks it; uvloop raises OSError (EBUSY).
    """
    reached = asyncio.Event()
    accepted: list[asyncio.StreamWriter] = []

    async def stop_reading(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reader.readexactly(1)
        reached.set()

    tls = authority.server_context() if scheme == "https" else None
    server = await asyncio.start_server(stop_reading, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    try:
        async with s3_client_with(endpoint_url=f"{scheme}://127.0.0.1:{port}") as client:
            upload = asyncio.ensure_future(s3.upload(client, bucket, "stuck", content(8 * MIB)))
            await asyncio.wait_for(reached.wait(), PATIENCE)
            upload.cancel()
            await asyncio.wait([upload])
            assert connected_to(port)
        assert not connected_to(port)
    finally:
        for writer in accepted:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()
        server.close()
        await server.wait_closed()


async def test_no_connection_outlives_its_client_that_has_stopped_reading(
    behind: Behind, bucket: str
) -> None:
    """As it does when a reply is longer than what is kept of it, and nobody takes it."""
    async with behind() as (proxy, client):
        port = urlsplit(proxy.endpoint_url).port
        assert port
        await s3.upload(client, bucket, "unread", content(8 * MIB))
        reply = await client.get_object(Bucket=bucket, Key="unread")
        protocol = reply["Body"].raw_stream.connection.protocol
        await until(lambda: protocol._reading_paused)
        reply["Body"].close()
    assert not connected_to(port)


def connected_to(port: int) -> list[int]:
    """The descriptors of this process whose other side has that port."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing itself, and sockets that are not connected
            if str(path.readlink()).startswith("socket:"):
                descriptor = int(path.name)
                with socket.socket(fileno=os.dup(descriptor)) as copy:
                    if copy.getpeername()[1:2] == (port,):
                        found.append(descriptor)
    return found


async def test_a_socket_factory_of_the_user_is_kept(
    s3_client_with: MakeClient, bucket: str
) -> None:
    """And every other setting of the connections; what it has made is closed with the client."""
    made: list[socket.socket] = []

    def factory(address: tuple[Any, ...]) -> socket.socket:
        made.append(socket.socket(*address[:3]))
        return made[-1]

    config = AioConfig(connector_args={"socket_factory": factory, "keepalive_timeout": 5})
    async with s3_client_with(config=config) as client:
        await s3.upload(client, bucket, "own", content(KIB))
        assert client.meta.config.connector_args["keepalive_timeout"] == 5
    assert made
    assert all(one.fileno() < 0 for one in made)


async def agent_of(client: Any, bucket: str) -> str:
    """The User-Agent of a request."""
    said: list[str] = []

    def see(request: Any, **_: Any) -> None:
        said.append(request.headers["User-Agent"].decode())

    client.meta.events.register("before-send.s3.HeadBucket", see)
    await client.head_bucket(Bucket=bucket)
    return said[0]


async def test_the_user_agent_says_what_is_used(s3_client_with: MakeClient, bucket: str) -> None:
    """Each of it once, and what the user adds; libraries that are loaded may add to it, too."""
    async with s3_client_with(config=AioConfig(user_agent_extra="more/1")) as client:
        said = (await agent_of(client, bucket)).split()
    assert said[0] == f"aiobotocore/{aiobotocore.__version__}"
    assert said.count(f"botocore/{botocore.__version__}") == said.count("more/1") == 1


async def test_a_user_agent_of_the_user_is_kept(s3_client_with: MakeClient, bucket: str) -> None:
    async with s3_client_with(config=AioConfig(user_agent="mine/1")) as client:
        assert (await agent_of(client, bucket)).startswith("mine/1 ")


@pytest.mark.parametrize("place", ["config", "environment"])
async def test_an_id_of_the_application_is_in_the_user_agent(
    s3_client_with: MakeClient, bucket: str, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """By which AWS's logs tell who has made a request."""
    config = AioConfig(user_agent_appid="my-app") if place == "config" else None
    if config is None:
        monkeypatch.setenv("AWS_SDK_UA_APP_ID", "my-app")
    async with s3_client_with(config=config) as client:
        assert "app/my-app" in (await agent_of(client, bucket)).split()


@asynccontextmanager
async def credentials_of(
    server: Server, lifetime: timedelta
) -> AsyncIterator[tuple[str, list[str]]]:
    """An endpoint for the credentials of a container; where it is, and what was asked of it."""
    asked: list[str] = []

    async def give(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        expiration = datetime.now(timezone.utc) + lifetime
        return web.Response(
            text=json.dumps(
                {
                    "AccessKeyId": server.access_key,
                    "SecretAccessKey": server.secret_key,
                    "Token": "",
                    "Expiration": expiration.strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            ),
            content_type="application/json",
        )

    runner = web.ServerRunner(web.Server(give, access_log=None), shutdown_timeout=0.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/credentials", asked
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("lifetime", "renewed"), [(timedelta(minutes=1), True), (timedelta(hours=6), False)]
)
async def test_credentials_are_renewed(
    s3_server: Server,
    s3_settings: dict[str, Any],
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    lifetime: timedelta,
    renewed: bool,
) -> None:
    """A kept client asks again when they are about to expire, and not before."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    async with credentials_of(s3_server, lifetime) as (url, asked):
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        for name in ("aws_access_key_id", "aws_secret_access_key"):
            del s3_settings[name]
        async with s3.client(**s3_settings) as client:
            await s3.upload(client, bucket, "renewed", b"renewed")
            (await s3.download(client, bucket, "renewed")).close()
        assert (len(asked) > 1) is renewed


@pytest.mark.parametrize("scheme", ["https"])
async def test_certificates_are_loaded_once(
    s3_client_with: MakeClient, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many connections there are: it takes tens of milliseconds with those of the system."""
    loaded: list[Any] = []
    load = ssl.SSLContext.load_verify_locations

    def spy(context: ssl.SSLContext, *args: Any, **kwargs: Any) -> None:
        loaded.append(args)
        load(context, *args, **kwargs)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", spy)
    async with s3_client_with() as client:
        await s3.upload(client, bucket, "secure", content(KIB))
        for buffer in await asyncio.gather(
            *(s3.download(client, bucket, "secure") for _ in range(8))
        ):
            assert buffer.view == content(KIB)
    assert len(loaded) == 1


@pytest.mark.parametrize("scheme", ["https"])
async def test_an_unknown_certificate_is_refused(
    s3_client_with: MakeClient, bucket: str, no_pauses: None
) -> None:
    """Certificates are verified, unless somebody says otherwise."""
    from botocore.exceptions import SSLError

    async with s3_client_with(verify=None) as client:
        with pytest.raises(SSLError, match=f"s3://{bucket}/secure"):
            await s3.download(client, bucket, "secure")
