"""Downloads: from the socket into shared memory, in parallel where that is worth it.

Theory of operation. The first request is for all that is wanted: one round trip for a small object,
and its answer says how long it is, which version (ETag) and which checksum. Memory is taken then.
What is large is divided into ranges, which a few streams take one after the other; the first stream
begins with the body that is already there, and drops it after the first range. Every further
request carries ``If-Match``, so bytes of two versions never mix.

A range that breaks off is asked for again from where it broke off, as often as the client is
configured to try. Nothing else is: what S3 refuses is refused, and a wrong checksum is wrong.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

from .._memory import SharedBuffer, mapped, share_first, write_at
from ._checksums import Expected, Verification, expected_of
from ._client import Client
from ._places import as_broken, located
from ._source import Body, Extent, Range, Source, extent_of, reader_of
from ._together import together

_ONE_STREAM = 32 << 20  # bytes; up to here one stream is as fast
_STREAMS = 4  # at once, for one object
_RANGE = 8 << 20  # bytes, at least, that a stream takes one after the other
_RANGES = 16  # in an object, if they are not too long for it: each request costs both sides CPU
_LONGEST = 4  # times _RANGE: what comes last is waited for, and hashed, when all else is there
_PAUSE = 0.1  # seconds, at most, before the first try again; doubled for each further one, up to
_LONGEST_PAUSE = 20

Progress = Callable[[int], object]
MemoryFor = Callable[[int, Callable[[], None]], Awaitable[SharedBuffer]]
Write = Callable[[int, bytes], None]


async def download(
    client: Client,
    bucket: str,
    key: str,
    *,
    byte_range: Range | None = None,
    into: SharedBuffer | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> SharedBuffer:
    """The object, or a range of it, in memory that a worker sees without a copy.

    Its length is always the one that S3 gave. The checksum of a whole object is verified, also that
    of one uploaded in parts: CRC32 and SHA always, CRC32C and CRC64NVME where awscrt is installed (a
    RuntimeWarning says so where it is not). S3 has none for a range. An object above 32 MiB is read
    in parallel; if it is replaced meanwhile, that is an error. What breaks off is read on from there.

    Args:
        client: an S3 client of aiobotocore.
        bucket: the name of the bucket.
        key: the name of the object.
        byte_range: the first byte and the one behind the last, as in a slice: ``(100, 200)``,
            ``(100, None)``, and ``(-100, None)`` for the last 100. Ends at the object's end.
        into: memory to use again: to fill fresh memory takes five times as long. At least as long
            as what is downloaded; what is returned shares it, and either may be closed first. After
            an error its content is undefined.
        progress: called on the loop with the number of bytes that have come since the last call.
        **settings: what ``get_object`` and ``head_object`` take, such as ``VersionId``,
            ``RequestPayer`` or ``SSECustomerKey``.

    Returns:
        a buffer as long as the object or the range, the caller's to close or to drop.

    Raises:
        ValueError: ``byte_range`` is empty, or ``into`` is too short.
        TypeError: the client has not the aiohttp transport of aiobotocore, or a setting is an argument
            here (``Range``).
        botocore.exceptions.ClientError: S3 refused, as with ``NoSuchKey``, ``InvalidRange``, or
            ``PreconditionFailed`` when the object was replaced while it was read.
        botocore.exceptions.BotoCoreError: the connection failed, again and again
            (``ResponseStreamingError``, ``ReadTimeoutError``), or the checksum does not match
            (``FlexibleChecksumError``).

    Cancelling it closes its connections and frees the memory.
    """
    return await fetch(
        client,
        bucket,
        key,
        settings,
        wanted=byte_range,
        memory_for=partial(_memory_for, into),
        progress=progress,
    )


async def fetch(
    client: Client,
    bucket: str,
    key: str,
    settings: Mapping[str, Any],
    *,
    wanted: Range | None = None,
    memory_for: MemoryFor,
    progress: Progress | None,
) -> SharedBuffer:
    """The same, into memory that is asked for when its length is known.

    ``memory_for`` is given the length, and what gives the connection back: to be called before a wait for
    others, who may need one to go on. The body is asked for again then.
    """
    with located(bucket, key):
        source = Source(client, bucket, key, settings)
        response = await source.open(wanted)
        async with response["Body"] as opened:
            body: Body | None = opened

            def give_back() -> None:
                nonlocal body
                body = None
                opened.close()

            extent = extent_of(response)
            buffer = await memory_for(extent.nbytes, give_back)
            try:
                expected = None
                if extent.whole:
                    expected = expected_of(response["ResponseMetadata"]["HTTPHeaders"])
                transfer = _Transfer(source, extent, _writer(buffer), progress)
                await _verified(transfer, body, expected, buffer)
            except BaseException:
                buffer.close()
                raise
            return buffer


async def _memory_for(into: SharedBuffer | None, nbytes: int, _: object) -> SharedBuffer:
    if into is None:
        return SharedBuffer(nbytes)
    if into.nbytes < nbytes:
        raise ValueError(
            f"into has {into.nbytes:,} bytes, and {nbytes:,} are to be downloaded; nothing was written"
        )
    return share_first(into, nbytes)


def _writer(buffer: SharedBuffer) -> Write:
    if (view := mapped(buffer)) is None:
        return partial(write_at, buffer)

    def write(position: int, data: bytes) -> None:
        view[position : position + len(data)] = data

    return write


async def _verified(
    transfer: _Transfer, body: Body | None, expected: Expected | None, buffer: SharedBuffer
) -> None:
    if expected is None:
        await transfer.run(body)
        return
    if expected.parts:
        mismatch = await _mismatch_of_parts(transfer, body, expected, buffer)
    else:
        async with Verification(expected, buffer, ()) as verification:
            transfer.reached = verification.reached
            await transfer.run(body)
            mismatch = await verification.mismatch()
    if mismatch:
        raise mismatch


async def _mismatch_of_parts(
    transfer: _Transfer, body: Body | None, expected: Expected, buffer: SharedBuffer
) -> Exception | None:
    """Asks for the parts beside the transfer: their request may have to wait for its connections."""
    source = transfer.source
    complete = asyncio.Event()
    mismatch: Exception | None = None
    certain = True

    async def run() -> None:
        await transfer.run(body)
        complete.set()

    async def verify() -> None:
        nonlocal mismatch, certain
        ends, certain = await source.likely_part_ends(expected.parts, buffer.nbytes)
        async with Verification(expected, buffer, ends) as verification:
            transfer.tell(verification.reached)
            await complete.wait()
            mismatch = await verification.mismatch()

    await together((run(), verify()))
    if mismatch and not certain:
        ends = await source.part_ends(expected.parts, buffer.nbytes)
        async with Verification(expected, buffer, ends) as verification:
            mismatch = await verification.mismatch()
    return mismatch


class _Transfer:
    """The bytes of one download: which are there, and who reads the others.

    Attributes:
        reached: called with the number of bytes from the beginning that are there.
    """

    def __init__(
        self, source: Source, extent: Extent, write: Write, progress: Progress | None
    ) -> None:
        nbytes = extent.nbytes
        self.source = source
        self.reached: Callable[[int], object] = _nobody
        self._progress: Progress = progress or _nobody
        self._write = write
        self._start = extent.start
        length = nbytes if nbytes <= _ONE_STREAM else _range_length(nbytes)
        self._marks = list(range(0, nbytes, length or 1)) or [0]  # how far each range has come
        self._ends = [*self._marks[1:], nbytes]
        self._complete = 0  # ranges from the beginning that are
        self._waiting = deque(range(len(self._ends)))

    def tell(self, reached: Callable[[int], object]) -> None:
        """Has it called from here on, and at once for what is there."""
        self.reached = reached
        reached(self._marks[self._complete])

    async def run(self, body: Body | None) -> None:
        """Reads all, beginning with a body that has it all, if that is there."""
        if len(self._ends) == 1:
            await self._read(0, body)
        else:
            await together(
                self._stream(None if number else body)
                for number in range(min(_STREAMS, len(self._ends)))
            )

    async def _stream(self, body: Body | None) -> None:
        while self._waiting:
            await self._read(self._waiting.popleft(), body)
            body = None

    async def _read(self, number: int, body: Body | None) -> None:
        """One range, from the beginning of a body that may have more, or by its own requests."""
        exact = body is None or len(self._ends) == 1
        for attempt in count(1):  # pragma: no branch - which has no end
            if body is None:
                start, stop = self._marks[number], self._ends[number]
                body = await self.source.read(self._start + start, self._start + stop)
            try:
                async with body:
                    await self._receive(number, reader_of(body), exact=exact)
            except _BrokenError as error:
                if attempt >= self.source.tries:
                    raise error.reason from error.__cause__
            else:
                return
            body, exact = None, True
            pause = min(_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311

    async def _receive(
        self, number: int, read: Callable[[], Awaitable[bytes]], *, exact: bool
    ) -> None:
        position, end = self._marks[number], self._ends[number]
        while position < end:
            chunk = await self._next(read)
            if not chunk:
                raise _wrong_length(position, end)
            if exact and len(chunk) > end - position:
                raise _wrong_length(position + len(chunk), end)
            chunk = chunk[: end - position]
            self._write(position, chunk)
            position += len(chunk)
            self._mark(number, position)
            self._progress(len(chunk))
        if exact and (chunk := await self._next(read)):  # which also gives the connection back
            raise _wrong_length(end + len(chunk), end)

    async def _next(self, read: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            return await read()
        except Exception as error:
            if (broken := as_broken(error, self.source.url)) is None:
                raise
            raise _BrokenError(broken) from error

    def _mark(self, number: int, position: int) -> None:
        marks, ends = self._marks, self._ends
        marks[number] = position
        if number == self._complete:
            while self._complete < len(ends) - 1 and marks[self._complete] == ends[self._complete]:
                self._complete += 1
            self.reached(marks[self._complete])


def _range_length(nbytes: int) -> int:
    return _RANGE * min(max(nbytes // (_RANGES * _RANGE), 1), _LONGEST)


def _nobody(_: int) -> None:
    """Who does not want to know."""


class _BrokenError(Exception):
    """A body broke off, for that reason; may be tried again."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason


def _wrong_length(actual: int, expected: int) -> _BrokenError:
    from botocore.exceptions import IncompleteReadError

    return _BrokenError(IncompleteReadError(actual_bytes=actual, expected_bytes=expected))
