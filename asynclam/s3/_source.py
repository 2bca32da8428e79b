"""One version of an object: responses that are certain to be of it, and where its bytes are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from ._client import Client
from ._places import explain
from ._together import together

Body = Any  # of aiobotocore
Response = Mapping[str, Any]

_CHUNK = 256 * 1024  # bytes; 1 KiB, the default of aiobotocore, is 6 to 10 times slower
_TRIES = 3  # of botocore's standard mode
_HEADS = 8  # requests at once

CHANGED = "it was replaced by another object while it was downloaded; download it again"


def _refusal(message: str) -> Exception:
    from botocore.exceptions import ResponseStreamingError

    error: Exception = ResponseStreamingError(error=message)
    return error


@dataclass(frozen=True)
class Extent:
    """Which bytes of an object a response has, or is asked for.

    Attributes:
        start: the first byte's place in the object.
        nbytes: how many they are.
        whole: whether that is the whole object.
    """

    start: int
    nbytes: int
    whole: bool


def extent_of(response: Response) -> Extent:
    """Which bytes it has, as its headers say.

    Raises:
        botocore.exceptions.ResponseStreamingError: they do not say how many.
    """
    if (length := response.get("ContentLength")) is None:
        raise _refusal("the server did not say how long the object is")
    nbytes = int(length)
    content_range = response.get("ContentRange")  # such as "bytes 0-99/1234"
    if content_range is None:
        return Extent(0, nbytes, whole=True)
    first, _, total = content_range.removeprefix("bytes ").partition("/")
    start = int(first.partition("-")[0])
    return Extent(start, nbytes, whole=total == str(nbytes))


class Source:
    """An object, and after the first response the version of it.

    Attributes:
        tries: how often a read may be tried that breaks off, as the client is configured.
        url: where it is, as errors say it.
    """

    def __init__(self, client: Client, bucket: str, key: str) -> None:
        self._client = client
        self._object = {"Bucket": bucket, "Key": key}
        self._pin: dict[str, str] = {}
        self._opened = False
        self.url = f"{client.meta.endpoint_url}/{bucket}/{key}"
        self.tries: int = (client.meta.config.retries or {}).get("total_max_attempts", _TRIES)

    async def open(self, byte_range: str | None) -> Response:
        """The first response, to which all others are pinned; its body is the caller's to close."""
        more = {"Range": byte_range} if byte_range else {}
        response: Response = await self._client.get_object(
            **self._object, ChecksumMode="ENABLED", **more
        )
        if etag := response.get("ETag"):
            self._pin = {"IfMatch": etag}
        return response

    async def read(self, start: int, stop: int) -> Body:
        """The body of a response that has exactly these bytes of that version."""
        response = await self._pinned("get_object", Range=f"bytes={start}-{stop - 1}")
        extent = extent_of(response)
        if (extent.start, extent.nbytes) != (start, stop - start) or "ContentRange" not in response:
            response["Body"].close()
            raise _refusal(f"the server sent other bytes than it was asked for: {extent}")
        return response["Body"]

    async def _pinned(self, operation: str, **more: Any) -> Response:
        from botocore.exceptions import ClientError

        try:
            response: Response = await getattr(self._client, operation)(
                **self._object, **self._pin, **more
            )
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in {"PreconditionFailed", "412"}:
                explain(error, CHANGED)
            raise
        if response.get("ETag") != self._pin.get("IfMatch"):  # the server does not know If-Match
            if (body := response.get("Body")) is not None:
                body.close()
            raise _refusal(CHANGED)
        return response

    async def likely_part_ends(self, parts: int, nbytes: int) -> tuple[list[int], bool]:
        """Where its parts end, and whether that is certain.

        It is asked for the first; mostly all but the last are as long as that.
        """
        first = await self._part_length(1)
        if parts == 1 or not (parts - 1) * first < nbytes <= parts * first:
            return await self.part_ends(parts, nbytes), True
        return [*range(first, nbytes, first), nbytes], parts == 2  # noqa: PLR2004

    async def part_ends(self, parts: int, nbytes: int) -> list[int]:
        """Where its parts end, which takes a request for each of them."""
        lengths = [0] * parts
        waiting = iter(range(parts))

        async def ask() -> None:
            for index in waiting:
                lengths[index] = await self._part_length(index + 1)

        await together(ask() for _ in range(min(_HEADS, parts)))
        ends = list(accumulate(lengths))
        if ends[-1] != nbytes:
            raise _refusal(f"its parts have {ends[-1]:,} bytes, and it has {nbytes:,}")
        return ends

    async def _part_length(self, number: int) -> int:
        response = await self._pinned("head_object", PartNumber=number)
        return int(response["ContentLength"])


def reader_of(body: Body) -> Callable[[], Awaitable[bytes]]:
    """What returns the next bytes of a body, as they come, and ``b""`` at its end.

    What aiohttp has is taken as it is: the body's own ``read`` would copy it once more, and compute
    a checksum on the loop that is computed beside it.
    """
    content: Any = getattr(getattr(body, "raw_stream", body), "content", None)
    if hasattr(content, "readany"):
        return content.readany  # type: ignore[no-any-return]
    return partial(body.read, _CHUNK)  # it is not aiohttp's
