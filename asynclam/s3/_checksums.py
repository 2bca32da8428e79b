"""Checksums of S3 objects: which one an object has, computed as it arrives, beside the event loop.

S3 keeps one checksum with an object. That of an object that was uploaded in parts may be
*composite*: the checksum of its parts' checksums, with their number at its end (``…==-3``), which
only who knows where the parts end can compute.

Theory of operation. A :class:`Verification` looks at memory that others fill. They say how much of
its beginning is there (``reached``), on the loop, and never wait. Whenever a piece is there and none
is being computed, one thread takes all that is there; it runs without the GIL. So the order in which
ranges arrive does not matter, no byte is hashed twice, and the loop hashes only what is too small
to be worth a thread. The memory must stay until ``aclose`` has returned.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

from .._memory import SharedBuffer, mapped, read_at

if TYPE_CHECKING:
    from typing_extensions import Self

_HEADER = "x-amz-checksum-"
_HASHES = {"sha1": hashlib.sha1, "sha256": hashlib.sha256, "sha512": hashlib.sha512}
_AWSCRT = ("crc32c", "crc64nvme")
_INLINE = 512 * 1024  # bytes; SHA-256 of these takes 0.3 ms, a thread to start 0.1
_SCRATCH = 1 << 20  # bytes that are read at a time
_PIECE = 4 << 20  # bytes that are worth a hand-over to the thread, 2 ms of SHA-256


class Digest(Protocol):
    """What ``hashlib`` calls a hash object, as far as it is used here."""

    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc:
    def __init__(self, function: Callable[[memoryview, int], int], nbytes: int) -> None:
        self._function = function
        self._nbytes = nbytes
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._nbytes, "big")


class _Composite:
    """The checksum of the parts' checksums."""

    def __init__(self, new: Callable[[], Digest], ends: Iterable[int]) -> None:
        self._new = new
        self._ends = iter(ends)
        self._end = next(self._ends)
        self._position = 0
        self._part = new()
        self._whole = new()
        self._fold()

    def _fold(self) -> None:
        while self._position == self._end:  # a part may be empty, if it is the only one
            self._whole.update(memoryview(self._part.digest()))
            self._part, self._end = self._new(), next(self._ends, -1)

    def update(self, data: memoryview, /) -> None:
        while len(data):
            piece = data[: self._end - self._position]
            self._part.update(piece)
            self._position += len(piece)
            data = data[len(piece) :]
            self._fold()

    def digest(self) -> bytes:
        return self._whole.digest()


@dataclass(frozen=True)
class Expected:
    """The checksum that S3 has for an object.

    Attributes:
        algorithm: its name in lower case, as in the header.
        value: in base64, without the number of parts.
        parts: of how many parts it is composed; 0 if it is that of all bytes.
    """

    algorithm: str
    value: str
    parts: int = 0

    @property
    def new(self) -> Callable[[], Digest] | None:
        """Makes what computes the algorithm; ``None`` if nothing here can."""
        return computation_of(self.algorithm)


def expected_of(headers: Mapping[str, str]) -> Expected | None:
    """The checksum that came with a response, if any did that can be computed here.

    One that cannot is told by a RuntimeWarning with what to install.
    """
    found = {
        name.removeprefix(_HEADER): value
        for name, value in headers.items()
        if name.startswith(_HEADER) and name != f"{_HEADER}type"
    }
    for algorithm, text in found.items():
        value, _, parts = text.partition("-")
        expected = Expected(algorithm, value, int(parts or 0))
        if expected.new:
            return expected
    if found:
        _warn_not_verified(" and ".join(found))
    return None


def _warn_not_verified(algorithms: str) -> None:
    hint = (
        'pip install "asynclam[crt]"'
        if algorithms in _AWSCRT
        else "upload with ChecksumAlgorithm='CRC32'"
    )
    warnings.warn(
        f"S3 objects are not verified: their checksum is {algorithms.upper()}, which nothing that "
        f"is installed computes; {hint} (their length is checked)",
        RuntimeWarning,
        stacklevel=3,
    )


def computation_of(algorithm: str) -> Callable[[], Digest] | None:
    """Makes what computes an algorithm; ``None`` if nothing here can."""
    if algorithm == "crc32":
        return partial(_Crc, _crc32(), 4)
    if algorithm in _AWSCRT:
        return _awscrt(algorithm)
    return _HASHES.get(algorithm)


@cache
def _crc32() -> Callable[[memoryview, int], int]:
    """The one of zlib-ng takes a quarter of the time; both run without the GIL."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib.crc32
    return zlib_ng.crc32


def _awscrt(algorithm: str) -> Callable[[], Digest] | None:
    try:
        from awscrt import checksums
    except ImportError:
        return None
    function = getattr(checksums, algorithm, None)  # crc64nvme came later
    return function and partial(_Crc, function, 4 if algorithm == "crc32c" else 8)


def in_base64(digest: Digest) -> str:
    """As S3 writes it."""
    return base64.b64encode(digest.digest()).decode()


class Verification:
    """Computes the checksum of memory as it is filled. Used with ``async with``.

    Args:
        expected: what it has to be.
        buffer: the memory of the whole object.
        part_ends: where its parts end, if the checksum is composite.
    """

    def __init__(self, expected: Expected, buffer: SharedBuffer, part_ends: Sequence[int]) -> None:
        assert expected.new is not None
        self._expected = expected
        self._buffer = buffer
        self._end = buffer.nbytes
        self._digest = _Composite(expected.new, part_ends) if part_ends else expected.new()
        self._reached = self._hashed = 0
        self._job: asyncio.Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def reached(self, end: int) -> None:
        """The first ``end`` bytes are there."""
        self._reached = end
        if self._job is None and end - self._hashed >= _PIECE:
            self._start()

    def _start(self) -> None:
        if self._thread is None:  # one of its own: the loop's may all wait for this very download
            self._thread = ThreadPoolExecutor(1, "asynclam-checksum")
        begin, self._hashed = self._hashed, self._reached
        loop = asyncio.get_running_loop()
        self._job = loop.run_in_executor(self._thread, self._hash, begin, self._hashed)
        self._job.add_done_callback(self._done)

    def _hash(self, begin: int, end: int) -> None:
        if (view := mapped(self._buffer)) is not None:
            with view[begin:end] as piece:
                self._digest.update(piece)
            return
        # To map it would take faults, and count the memory for this process, which has no need of it.
        scratch = memoryview(bytearray(min(_SCRATCH, end - begin)))
        while begin < end:
            piece = scratch[: end - begin]
            read_at(self._buffer, begin, piece)
            self._digest.update(piece)
            begin += len(piece)

    def _done(self, job: asyncio.Future[None]) -> None:
        if self._job is job:
            self._job = None
        if self._job is None and self._reached - self._hashed >= _PIECE:
            self._start()

    async def mismatch(self) -> Exception | None:
        """All is there: botocore's ``FlexibleChecksumError`` if it has another checksum."""
        self._reached = self._end
        while self._job is not None or self._reached - self._hashed > _INLINE:
            if self._job is None:
                self._start()
            job = self._job
            assert job is not None
            await asyncio.shield(job)  # nothing can stop the thread
            self._done(job)  # if it was done before, its callback has had no turn
        self._hash(self._hashed, self._reached)
        self._hashed = self._reached
        actual = in_base64(self._digest)
        if actual == self._expected.value:
            return None
        from botocore.exceptions import FlexibleChecksumError

        error: Exception = FlexibleChecksumError(
            error_msg=f"its {self._expected.algorithm.upper()} is {actual}, and S3 has "
            f"{self._expected.value}"
        )
        return error

    async def aclose(self) -> None:
        """Nothing looks at the memory any more."""
        self._reached = self._hashed  # so that nothing is started again
        try:
            if self._job is not None:
                from ._together import ended

                await ended([self._job])
        finally:
            if self._thread is not None:
                self._thread.shutdown(wait=False)
