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
Range = tuple[int, int | None]  # as in a slice

_CHUNK = 256 * 1024  # bytes; 1 KiB, the default of aiobotocore, is 6 to 10 times slower
_TRIES = 3  # of botocore's standard mode
_HEADS = 8  # requests at once
_TAKEN = {"Bucket", "Key", "Range", "PartNumber", "ChecksumMode"}  # of the settings of a request
_INSTEAD = "give it a byte_range, or nothing for the whole object, which is verified"

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
        total: how many the object has, if the server says so.
    """

    start: int
    nbytes: int
    total: int | None

    @property
    def whole(self) -> bool:
        """Whether these are all bytes of the object."""
        return self.nbytes == self.total

    def is_of(self, wanted: Range) -> bool:
        """Whether it has what was asked for: a server may answer with the whole object (RFC 9110)."""
        end = self.start + self.nbytes
        total = end if self.total is None else self.total
        return slice(*wanted).indices(total)[:2] == (self.start, end)


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
        return Extent(0, nbytes, nbytes)
    first, _, total = content_range.removeprefix("bytes ").partition("/")
    start = int(first.partition("-")[0])
    return Extent(start, nbytes, None if total == "*" else int(total))


def _header_of(wanted: Range) -> str:
    start, stop = wanted
    if start < 0 and stop is None:
        return f"bytes={start}"
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(
            f"byte_range is (start, stop) with 0 <= start < stop, or (start, None), or "
            f"(-length, None) for the end; got {wanted}"
        )
    return f"bytes={start}-{'' if stop is None else stop - 1}"


def _require_aiohttp(client: Client) -> None:
    from aiobotocore.httpsession import AIOHTTPSession

    transport = getattr(client.meta.config, "http_session_cls", AIOHTTPSession)
    if not issubclass(transport, AIOHTTPSession):
        raise TypeError(
            f"downloads need the aiohttp transport of aiobotocore, and this client was made with "
            f"http_session_cls={transport.__name__}; make one without, as s3.client() does"
        )


def _require(response: Response, are_asked_for: bool) -> None:
    if not are_asked_for:
        response["Body"].close()
        raise _refusal(f"the server sent other bytes than it was asked for: {extent_of(response)}")


class Source:
    """An object, and after the first response the version of it.

    Args:
        client: an S3 client of aiobotocore.
        bucket: the name of the bucket.
        key: the name of the object.
        settings: of all requests.

    Attributes:
        tries: how often a read may be tried that breaks off, as the client is configured.
        url: where it is, as errors say it.
    """

    def __init__(self, client: Client, bucket: str, key: str, settings: Mapping[str, Any]) -> None:
        _require_aiohttp(client)
        if taken := settings.keys() & _TAKEN:
            raise TypeError(f"{min(taken)} is no setting of a download; {_INSTEAD}")
        self._client = client
        self._object = {**settings, "Bucket": bucket, "Key": key}
        self._pin: dict[str, str] = {}
        self.url = f"{client.meta.endpoint_url}/{bucket}/{key}"
        self.tries: int = (client.meta.config.retries or {}).get("total_max_attempts", _TRIES)

    async def open(self, wanted: Range | None) -> Response:
        """The first response, to which all others are pinned; its body is the caller's to close."""
        more = {} if wanted is None else {"Range": _header_of(wanted)}
        response: Response = await self._client.get_object(
            **self._object, ChecksumMode="ENABLED", **more
        )
        if etag := response.get("ETag"):
            self._pin = {"IfMatch": etag}
        if wanted is not None:
            _require(response, extent_of(response).is_of(wanted))
        return response

    async def read(self, start: int, stop: int) -> Body:
        """The body of a response that has exactly these bytes of that version."""
        response = await self._pinned("get_object", Range=f"bytes={start}-{stop - 1}")
        extent = extent_of(response)
        asked = (extent.start, extent.nbytes) == (start, stop - start)
        _require(response, asked and "ContentRange" in response)
        return response["Body"]

    async def _pinned(self, operation: str, **more: Any) -> Response:
        from botocore.exceptions import ClientError

        try:
            response: Response = await getattr(self._client, operation)(
                **{**self._object, **self._pin, **more}
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
