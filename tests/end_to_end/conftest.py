"""Real S3 servers, and clients of them."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import pytest_asyncio
import trustme
from botocore.retries import standard

from asynclam import s3
from asynclam._demo.seaweedfs import Server, seaweedfs
from asynclam.s3 import _download
from tests.parts.s3_proxy import Rule, S3Proxy

BUCKET = "tests"
_ROOM = 256 << 20  # bytes, more than any test writes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """CPython 3.10 does not mark a TLS transport as closed that the other side has cut off; 3.11 does."""
    if sys.version_info < (3, 11):
        text = "ignore:.*_SSLProtocolTransport.__del__:pytest.PytestWarning"
        for item in items:
            if "scheme" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.filterwarnings(text))


@dataclass(frozen=True)
class Authority:
    """A certificate authority that exists for the session, and its certificate for 127.0.0.1."""

    ca_file: str
    chain_file: str
    key_file: str

    def server_context(self) -> ssl.SSLContext:
        """For a server that answers with the certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.chain_file, self.key_file)
        return context


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Made by trustme; no client knows it that is not told."""
    directory = tmp_path_factory.mktemp("certificates")
    ca = trustme.CA()
    certificate = ca.issue_cert("127.0.0.1")
    files = [directory / name for name in ("ca.pem", "chain.pem", "key.pem")]
    ca.cert_pem.write_to_path(str(files[0]))
    certificate.cert_chain_pems[0].write_to_path(str(files[1]))
    certificate.private_key_pem.write_to_path(str(files[2]))
    return Authority(*map(str, files))


class Servers:
    """A server with one bucket, with and without TLS, and another one when there is little room.

    A box has 512 MB in ``/tmp``, and SeaweedFS needs more for what is deleted than a module has to write.
    """

    def __init__(self, authority: Authority) -> None:
        self._certificate = (authority.chain_file, authority.key_file)
        self._running = ExitStack()
        self._server: Server | None = None

    def with_room(self) -> Server:
        """One that has at least half of a box's room; it is empty if it is another one."""
        if shutil.disk_usage(tempfile.gettempdir()).free < _ROOM:
            self.close()
        if self._server is None:
            self._server = self._running.enter_context(seaweedfs(self._certificate))
            asyncio.run(_create_bucket(_settings_of(self._server)))
        return self._server

    def close(self) -> None:
        """Ends it; its data are thrown away."""
        self._server = None
        self._running.close()


@pytest.fixture(scope="module")
def s3_servers(authority: Authority) -> Iterator[Servers]:
    """For a module, whose tests share a server as long as it has room."""
    servers = Servers(authority)
    yield servers
    servers.close()


@pytest.fixture(scope="class")  # set up before it is looked at what each test leaves behind
def s3_server(s3_servers: Servers) -> Server:
    """SeaweedFS with a bucket, in which may be what the tests before have left."""
    return s3_servers.with_room()


async def _create_bucket(settings: dict[str, Any]) -> None:
    async with s3.client(**settings) as client:
        await client.create_bucket(Bucket=BUCKET)


def _settings_of(server: Server) -> dict[str, Any]:
    return {
        "endpoint_url": server.endpoint_url,
        "aws_access_key_id": server.access_key,
        "aws_secret_access_key": server.secret_key,
        "region_name": server.region,
    }


@pytest.fixture
def s3_settings(s3_server: Server, scheme: str, authority: Authority) -> dict[str, Any]:
    """What a client is made with; every test that uses it runs over HTTP and over TLS."""
    settings = _settings_of(s3_server)
    if scheme == "https":
        settings |= {"endpoint_url": s3_server.tls_endpoint_url, "verify": authority.ca_file}
    return settings


@pytest.fixture
def s3_environment(s3_server: Server, s3_settings: dict[str, Any]) -> dict[str, str]:
    """The environment variables by which a process finds the server."""
    variables = {"AWS_ENDPOINT_URL_S3": s3_settings["endpoint_url"]}
    if "verify" in s3_settings:
        variables["AWS_CA_BUNDLE"] = s3_settings["verify"]
    return {**s3_server.environment(), **variables}


class Behind(Protocol):
    """A client behind a proxy whose rule says what it spoils."""

    def __call__(
        self, rule: Rule | None = None, **settings: Any
    ) -> AbstractAsyncContextManager[tuple[S3Proxy, Any]]: ...


@pytest.fixture
def behind(
    s3_server: Server, s3_client_with: MakeClient, authority: Authority, scheme: str
) -> Behind:
    """The proxy, and a client of the server behind it."""
    context = authority.server_context() if scheme == "https" else None

    @asynccontextmanager
    async def connect(rule: Rule | None = None, **settings: Any):
        async with S3Proxy(s3_server.endpoint_url, context) as proxy:
            if rule is not None:
                proxy.rule = rule
            async with s3_client_with(endpoint_url=proxy.endpoint_url, **settings) as client:
                yield proxy, client

    return connect


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither botocore nor asynclam waits before it tries again."""
    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0)
    monkeypatch.setattr(_download, "_PAUSE", 0)


class MakeClient(Protocol):
    """Makes a client of the server, with other settings than the usual ones."""

    def __call__(self, **settings: Any) -> AbstractAsyncContextManager[Any]: ...


@pytest.fixture
def s3_client_with(s3_settings: dict[str, Any]) -> MakeClient:
    """For clients with a wrong secret, behind a proxy, and the like."""

    def make(**settings: Any) -> AbstractAsyncContextManager[Any]:
        return s3.client(**{**s3_settings, **settings})

    return make


@pytest_asyncio.fixture
async def s3_client(s3_settings: dict[str, Any]) -> AsyncIterator[Any]:
    """A client that is closed when the test ends."""
    async with s3.client(**s3_settings) as client:
        yield client


@pytest.fixture
def bucket() -> str:
    """The name of the bucket."""
    return BUCKET
