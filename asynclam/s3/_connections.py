"""The connections of a client, of which none outlives it.

aiohttp forgets a connection whose request is broken off: it is closed when what it has to send is sent,
and over TLS when the other side has said farewell. A loop that is closed meanwhile leaks it; that of
uvloop raises ``OSError`` (EBUSY). So who leaves a client shuts down the sockets that are open, after
which the transports end by themselves.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

if TYPE_CHECKING:
    from types import TracebackType

SocketFactory: TypeAlias = Callable[[tuple[Any, ...]], socket.socket]

_TURNS = 100  # of the loop at most; a transport over TLS takes three


class Connections(AbstractAsyncContextManager[Any]):
    """Has the sockets of a client made, and closes them with it.

    Args:
        factory: what makes a socket for an address, if the user has one.

    Attributes:
        client: what makes the client, to be set before this is entered.
    """

    client: AbstractAsyncContextManager[Any]

    def __init__(self, factory: SocketFactory | None = None) -> None:
        self._factory = factory or _new_socket
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def open(self, address: tuple[Any, ...]) -> socket.socket:
        """For an address as ``getaddrinfo`` gives it; aiohttp calls it a socket factory."""
        made = self._factory(address)
        self._sockets.add(made)
        return made

    async def __aenter__(self) -> Any:
        return await self.client.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self.client.__aexit__(kind, error, traceback)
        finally:
            await self._end()

    async def _end(self) -> None:
        for one in self._open():
            with suppress(OSError):  # it is not connected yet, or no more
                one.shutdown(socket.SHUT_RDWR)
        for _ in range(_TURNS):
            if not self._open():
                return
            await asyncio.sleep(0)

    def _open(self) -> list[socket.socket]:
        return [one for one in self._sockets if one.fileno() >= 0]


def _new_socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, *_ = address
    return socket.socket(family, kind, protocol)
