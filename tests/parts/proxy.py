"""A TCP proxy that spoils one answer: cut off, reset, altered or held back after some bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Literal

from typing_extensions import Self

Fault = Literal["cut", "reset", "alter", "hold"]

_CHUNK = 64 * 1024
_LINGER_NOT = struct.pack("ii", 1, 0)  # closing then sends a reset, see socket(7)


class FaultyProxy:
    """Passes bytes on, until an answer (heads included) is ``after`` bytes long; then the fault.

    Used with ``async with``, on the loop of the test.

    Attributes:
        struck: set once the fault has happened.
        deserted: set once a client has closed its connection, or lost it.
        accepted: how many connections have been made to it.
    """

    def __init__(self, target: str, fault: Fault, *, after: int) -> None:
        self._scheme, _, address = target.partition("://")
        host, _, port = address.partition(":")
        self._target = host, int(port)
        self._fault = fault
        self._after = after
        self._connections: set[asyncio.Task[None]] = set()
        self.struck = asyncio.Event()
        self.deserted = asyncio.Event()
        self.accepted = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def endpoint_url(self) -> str:
        host, port = self._server.sockets[0].getsockname()
        return f"{self._scheme}://{host}:{port}"

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._target)
        answers = asyncio.ensure_future(self._answer(server_reader, writer))
        try:
            await self._ask(reader, server_writer)
            self.deserted.set()
        finally:
            answers.cancel()
            server_writer.close()
            writer.close()
            await asyncio.gather(
                answers, server_writer.wait_closed(), writer.wait_closed(), return_exceptions=True
            )

    async def _ask(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(_CHUNK):
                server.write(chunk)
                await server.drain()
        except ConnectionError:
            pass

    async def _answer(self, server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while chunk := await server.read(_CHUNK):
            if passed <= self._after < passed + len(chunk) and not self.struck.is_set():
                await self._strike(writer, chunk, self._after - passed)
            else:
                writer.write(chunk)
            passed += len(chunk)
            await writer.drain()
        writer.close()

    async def _strike(self, writer: asyncio.StreamWriter, chunk: bytes, at: int) -> None:
        writer.write(chunk[:at])
        await writer.drain()
        self.struck.set()
        if self._fault == "alter":
            writer.write(bytes([chunk[at] ^ 1]) + chunk[at + 1 :])
        elif self._fault == "hold":
            await asyncio.Event().wait()  # until the connection is given up
        else:
            if self._fault == "reset":
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            writer.transport.abort()
