"""An upload in parts, from its creation to its completion, or to nothing at all.

Theory of operation. S3 keeps the parts of an upload, and bills them, until it is completed or
aborted; who does not know its identifier can do neither. So the request that creates it is not cut
off by a cancel, nor is the one that completes it, nor the one that aborts it; the parts are. Their
connections are closed before the upload is aborted, since a part that arrives later would be kept.

Who cancels every task of a loop, as ``asyncio.run()`` does at its end, cuts these requests off, too. The
abort is made anew then, by a task that was not there; of a creation without an answer nobody knows
whether there is an upload, so that is told.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ._client import Client
from ._parts import Part, Parts, body_of
from ._together import ended, together

_STREAMS = 4  # parts at once
_PATIENCE = 10  # seconds for the abort: a cancel waits for it
_ABORTS = 2  # the second one if the first was cancelled


class Multipart:
    """One upload in parts, to be run once.

    Args:
        client: an S3 client of aiobotocore.
        target: what ``create_multipart_upload`` takes: where it goes, and its settings.
        conditions: under which it may be completed.
        progress: called with the length of each part that S3 has.
    """

    def __init__(
        self,
        client: Client,
        target: Mapping[str, Any],
        conditions: Mapping[str, str],
        progress: Callable[[int], object] | None,
    ) -> None:
        self._client = client
        self._target = dict(target)
        self._conditions = dict(conditions)
        # Of all bytes, where S3 can tell that from those of the parts.
        is_crc = target.get("ChecksumAlgorithm", "CRC32").startswith("CRC")
        self._checksum = {"ChecksumType": "FULL_OBJECT" if is_crc else "COMPOSITE"}
        self._progress = progress
        self._parts: list[dict[str, Any]] = []
        self._asking = asyncio.Lock()

    async def run(self, first: Part, parts: Parts) -> None:
        """Uploads the first part and all others."""
        creating = asyncio.ensure_future(
            self._client.create_multipart_upload(**self._checksum, **self._target)
        )
        try:
            upload = (await asyncio.shield(creating))["UploadId"]
            await together(
                self._stream(upload, None if number else first, parts) for number in range(_STREAMS)
            )
            await self._complete(upload)
        except BaseException:
            await self._undo(creating)
            raise

    async def _stream(self, upload: str, part: Part | None, parts: Parts) -> None:
        while part := part or await self._next(parts):
            await self._send(upload, part)
            part = None

    async def _next(self, parts: Parts) -> Part | None:
        async with self._asking:
            return None if await parts.exhausted() else await parts.next()

    async def _send(self, upload: str, part: Part) -> None:
        sent = await self._client.upload_part(
            UploadId=upload,
            PartNumber=part.number,
            Body=body_of(part.data),
            **self._accepted("UploadPart"),
        )
        checksums = {name: value for name, value in sent.items() if name.startswith("Checksum")}
        checksums.pop("ChecksumType", None)
        self._parts.append({"PartNumber": part.number, "ETag": sent["ETag"], **checksums})
        if self._progress:
            self._progress(len(part.data))

    async def _complete(self, upload: str) -> None:
        completing = asyncio.ensure_future(
            self._client.complete_multipart_upload(
                UploadId=upload,
                MultipartUpload={"Parts": sorted(self._parts, key=lambda part: part["PartNumber"])},
                **self._checksum,
                **self._accepted("CompleteMultipartUpload"),
                **self._conditions,
            )
        )
        await ended([completing])
        completing.result()

    async def _undo(self, creating: asyncio.Task[Any]) -> None:
        cancel: asyncio.CancelledError | None = None
        for _ in range(_ABORTS):
            aborting = asyncio.ensure_future(self._abort(creating))
            try:
                await ended([aborting])
            except asyncio.CancelledError as error:
                cancel = error
            if not aborting.cancelled():
                break
        else:
            self._warn("an upload", "every request to abort it was cancelled")
        if cancel is not None:
            raise cancel

    async def _abort(self, creating: asyncio.Task[Any]) -> None:
        await asyncio.wait([creating])
        if creating.cancelled():
            self._warn("an upload that may have been created", "its creation was cancelled")
            return
        if creating.exception() is not None:
            return  # there is none
        upload = creating.result()["UploadId"]
        accepted = self._accepted("AbortMultipartUpload")
        try:
            await asyncio.wait_for(
                self._client.abort_multipart_upload(UploadId=upload, **accepted), _PATIENCE
            )
        except Exception as error:
            if getattr(error, "response", {}).get("Error", {}).get("Code") == "NoSuchUpload":
                return  # it was completed, and the answer lost
            self._warn(f"the upload {upload}", repr(error))

    def _warn(self, what: str, why: str) -> None:
        place = f"s3://{self._target['Bucket']}/{self._target['Key']}"
        warnings.warn(
            f"{what} of {place} could not be aborted, and what it has uploaded is kept and billed "
            f"({why}); abort it, or give the bucket a lifecycle rule that aborts incomplete uploads",
            RuntimeWarning,
            stacklevel=3,
        )

    def _accepted(self, operation: str) -> dict[str, Any]:
        """Of the settings those that the operation takes, too, such as the key of an encryption."""
        model = self._client.meta.service_model.operation_model(operation)
        members = model.input_shape.members.keys() - {"ChecksumType"}
        return {name: value for name, value in self._target.items() if name in members}
