"""An HTTP proxy in front of S3 that answers wrongly: what it spoils, a test says by a function.

It passes on what it gets as it gets it, signatures and ``Host`` included, so S3 still verifies them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from typing_extensions import Self

_CHUNK = 64 * 1024
_DROPPED = {"Connection", "Transfer-Encoding", "Date", "Server"}
_FOR_EVER = aiohttp.ClientTimeout(total=None)


@dataclass
class Spoilt:
    """What is wrong with one answer.

    Attributes:
        status: instead of S3's, which is not asked, with ``code`` in an error document.
        headers: that replace those of S3.
        cut: after so many bytes of the body the connection is closed.
        flip: the bits of the byte at this place of the body.
        hold: stops after so many bytes of the body, until the client gives up.
        meanwhile: awaited after the first bytes of the body.
        before: awaited before the request is passed on.
        lost: S3 gets the request, and the client no answer.
    """

    status: int = 0
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1
    flip: int = -1
    hold: int = -1
    meanwhile: Callable[[], Awaitable[object]] | None = None
    before: Callable[[], Awaitable[object]] | None = None
    lost: bool = False


@dataclass(frozen=True)
class Seen:
    """A request, as far as tests look at it."""

    method: str
    path: str
    query: str
    headers: dict[str, str]


Rule = Callable[[Seen], Spoilt | None]


class S3Proxy:
    """Used with ``async with``, on the loop of the test.

    Attributes:
        requests: those that have come, in their order.
        held: set once an answer is held back.
        deserted: set once a client has closed the connection of an answer that was held back.
        rule: says what is wrong with the answer to a request; ``None``: nothing.
    """

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._tls = tls
        self.rule: Rule = lambda _: None
        self.requests: list[Seen] = []
        self.held = asyncio.Event()
        self.deserted = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            timeout=_FOR_EVER,
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )
        server = web.Server(
            self._handle, access_log=None, keepalive_timeout=3600, handler_cancellation=True
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=0.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._session.close()

    @property
    def endpoint_url(self) -> str:
        host, port = self._runner.addresses[0][:2]
        return f"{'https' if self._tls else 'http'}://{host}:{port}"

    def drop_connections(self) -> None:
        """Closes all that clients have open, at once."""
        server = self._runner.server
        assert server is not None
        for connection in list(server.connections):
            connection.transport.abort()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        headers = dict(request.headers)
        seen = Seen(request.method, request.path, request.query_string, headers)
        self.requests.append(seen)
        spoilt = self.rule(seen) or Spoilt()
        if headers.pop("Expect", None):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = await request.content.read()
        if headers.pop("Transfer-Encoding", None):  # what came in chunks goes on as a whole
            headers["Content-Length"] = str(len(body))
        if spoilt.before:
            await spoilt.before()
        if spoilt.status:
            text = f"<Error><Code>{spoilt.code}</Code><Message>spoilt</Message></Error>"
            return web.Response(status=spoilt.status, text=text, content_type="application/xml")
        async with self._session.request(
            request.method,
            aiohttp.client.URL(self._target + request.raw_path, encoded=True),
            headers=headers,
            data=_in_chunks(body) if body else None,
            skip_auto_headers={"Content-Type", "Accept", "User-Agent", "Accept-Encoding"},
        ) as answer:
            if spoilt.lost:
                await answer.read()
                request.transport.abort()
                return web.Response()
            return await self._pass_on(request, answer, spoilt)

    async def _pass_on(self, request, answer, spoilt) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers.items():
            if name.title() not in _DROPPED:
                response.headers[name] = value
        response.headers.update(spoilt.headers)
        await response.prepare(request)
        passed = 0
        async for chunk in answer.content.iter_chunked(_CHUNK):
            data = bytearray(chunk)
            if 0 <= spoilt.flip - passed < len(data):
                data[spoilt.flip - passed] ^= 1
            for limit in (spoilt.cut, spoilt.hold):
                if 0 <= limit - passed < len(data):
                    await response.write(bytes(data[: limit - passed]))
                    return await self._break_off(request, response, spoilt)
            await response.write(bytes(data))
            passed += len(data)
            if spoilt.meanwhile:
                meanwhile, spoilt.meanwhile = spoilt.meanwhile, None
                await meanwhile()
        await response.write_eof()
        return response

    async def _break_off(self, request, response, spoilt) -> web.StreamResponse:
        if spoilt.hold >= 0:
            self.held.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.deserted.set()
        request.transport.abort()
        return response


async def _in_chunks(body: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), _CHUNK):
        yield body[begin : begin + _CHUNK]
