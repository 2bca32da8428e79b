"""What is uploaded, cut into parts: a view into slices, an async iterable as its pieces come."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .._memory import SharedBuffer

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

PART = 8 << 20  # bytes; S3 takes no less than 5 MiB, but for the last one
_MOST_PARTS = 10_000  # of S3
_DOUBLED = 1_000  # parts, after which the next ones are twice as long, where the end is not known
_WHOLE = 1 << 20  # bytes; up to here a body is simply copied
_CHUNK = 256 * 1024  # bytes that are given to aiohttp at a time


@dataclass(frozen=True)
class Part:
    """A part, with the number that S3 sorts it by (from 1)."""

    number: int
    data: memoryview


class Parts(Protocol):
    """Where parts come from; several tasks may ask."""

    async def next(self) -> Part: ...

    async def exhausted(self) -> bool: ...

    async def aclose(self) -> None: ...


class ViewParts:
    """Slices of what is in memory: no copy."""

    def __init__(self, data: Buffer | SharedBuffer) -> None:
        view = data.view if isinstance(data, SharedBuffer) else _view_of(data)
        self._view = view.cast("B")
        self._length = max(PART, -(-len(self._view) // _MOST_PARTS))
        self._number = 0

    async def next(self) -> Part:
        """The next one; the first may be empty."""
        begin = self._number * self._length
        self._number += 1
        return Part(self._number, self._view[begin : begin + self._length])

    async def exhausted(self) -> bool:
        """Whether there is no further one."""
        return self._number * self._length >= len(self._view)

    async def aclose(self) -> None:
        """Nothing to close."""


class SourceParts:
    """What an async iterable gives, collected until it makes a part."""

    def __init__(self, source: AsyncIterable[Buffer]) -> None:
        self._source = source
        self._items = aiter(source)
        self._rest = memoryview(b"")  # of the last item, which went beyond its part
        self._ended = False
        self._number = 0

    async def next(self) -> Part:
        """The next one; the first may be empty."""
        length = PART << (self._number // _DOUBLED)
        self._number += 1
        collected = bytearray(self._rest[:length])
        self._rest = self._rest[length:]
        while len(collected) < length and await self._read():
            missing = length - len(collected)
            collected += self._rest[:missing]
            self._rest = self._rest[missing:]
        return Part(self._number, memoryview(collected))

    async def exhausted(self) -> bool:
        """Whether there is no further one."""
        while not self._rest and await self._read():
            pass
        return not self._rest

    async def _read(self) -> bool:
        if not self._ended:
            try:
                self._rest = _view_of(await anext(self._items)).cast("B")
            except StopAsyncIteration:
                self._ended = True
        return not self._ended

    async def aclose(self) -> None:
        """Ends the iterable where it is, if it is a generator."""
        if (close := getattr(self._items, "aclose", None)) is not None:
            await close()


def _view_of(data: Buffer) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        hint = "; encode it first: data.encode()" if isinstance(data, str) else ""
        raise TypeError(
            f"data must be bytes-like, a SharedBuffer or an async iterable of bytes-like, "
            f"not {type(data).__name__}{hint}"
        ) from None
    if not view.c_contiguous:
        raise TypeError("data must be contiguous; copy it first: bytes(data)")
    return view


def body_of(view: memoryview) -> bytes | Reader:
    """What botocore takes: no memoryview, and a bytes object would be all of it once more."""
    return view.tobytes() if len(view) <= _WHOLE else Reader(view)


class Reader:
    """A file over a view: botocore reads and seeks (to sign, to retry), aiohttp iterates.

    Not an ``io.IOBase``: aiohttp would read that in threads, 64 KiB each time.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def read(self, size: int | None = None) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._position + size
        chunk = self._view[self._position : end].tobytes()
        self._position += len(chunk)
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, len(self._view))[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if chunk := self.read(_CHUNK):
            return chunk
        raise StopAsyncIteration
