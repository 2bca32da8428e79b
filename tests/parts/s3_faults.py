"""Every kind of fault for every size of object: what uploads, downloads and workers make of each.

Used by a test, with short ranges and parts, and by the benchmarks, with the real ones.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from botocore.exceptions import ClientError

from asynclam import Executor, SharedBuffer, map_io, s3
from tests.parts.s3_objects import KIB, PATIENCE, content, every, is_get, nth
from tests.parts.s3_proxy import Rule, S3Proxy, Seen, Spoilt

_AT_ONCE = 16

_LOST: dict[str, Callable[[int], Spoilt]] = {
    "cut off": lambda place: Spoilt(cut=place),
    "silent": lambda place: Spoilt(hold=place),
    "no answer": lambda _: Spoilt(lost=True),
}
_WRONG: dict[str, Callable[[int], Spoilt]] = {
    "truncated": lambda place: Spoilt(headers={"Content-Length": str(place)}),
    "a wrong bit": lambda place: Spoilt(flip=place),
    "a wrong checksum": lambda _: Spoilt(headers={"x-amz-checksum-crc32": "AAAAAA=="}),
    "another ETag": lambda _: Spoilt(headers={"ETag": '"other"'}),
}
_BUSY: dict[str, Callable[[int], Spoilt]] = {"503": lambda _: Spoilt(503, "SlowDown")}

# Which answers of a kind: the first of them, the second, all.
_TURNS: dict[str, Callable[..., Rule]] = {
    "first": partial(nth, 1),
    "second": partial(nth, 2),
    "every": every,
}


@dataclass
class Findings:
    """What was injected, and what came of it.

    Attributes:
        injected: answers that were spoilt, by what was done with the object.
        whole: operations that gave all bytes.
        errors: those that raised, by the name of the error.
        wrong: wrong bytes, uploads that are left open or lost, and what did not end.
    """

    injected: Counter[str] = field(default_factory=Counter)
    whole: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Case:
    operation: str
    kind: str
    turn: str
    size: int

    @property
    def key(self) -> str:
        return "-".join(map(str, (self.operation, self.kind, self.turn, self.size))).replace(
            " ", "_"
        )


def _cases(operation: str, kinds: Iterable[str], sizes: Iterable[int]) -> Iterator[_Case]:
    for size in sizes:
        for kind in kinds:
            for turn in _TURNS:
                yield _Case(operation, kind, turn, size)


class Faults:
    """All of them, through one proxy.

    Args:
        proxy: between clients and the server.
        direct: a client of the server.
        bucket: where the objects are.
    """

    def __init__(self, proxy: S3Proxy, direct: Any, bucket: str) -> None:
        self._direct, self._bucket = direct, bucket
        self._rules: dict[str, Rule] = {}
        self.findings = Findings()
        proxy.rule = self._rule

    def _rule(self, request: Seen) -> Spoilt | None:
        key = request.path.rpartition("/")[2]
        spoilt = self._rules[key](request) if key in self._rules else None
        if spoilt is not None:
            self.findings.injected[key.partition("-")[0]] += 1
        return spoilt

    async def downloads(self, client: Any, sizes: Iterable[int]) -> None:
        """Into this process, by an impatient client."""
        cases = list(_cases("download", _LOST | _WRONG | _BUSY, sizes))
        await self._each(self._prepare, cases)
        await self._each(partial(self._download, client), cases)

    async def in_workers(self, executor: Executor, sizes: Iterable[int], **settings: Any) -> None:
        """Into workers, which process them, by impatient clients with these settings."""
        cases = list(_cases("worker", _LOST | _WRONG | _BUSY, sizes))
        await self._each(self._prepare, cases)
        results = s3.process_many(
            self._bucket,
            [case.key for case in cases],
            checksum,
            chunksize=8,
            concurrency=8,
            ordered=True,
            return_exceptions=True,
            executor=executor,
            **settings,
        )
        found = await self._ended(results.list(), "process_many") or []
        for case, result in zip(cases, found, strict=True):
            if isinstance(result, BaseException):
                self._failed(result)
            else:
                self._compare(case, right=result == zlib.crc32(content(case.size)))

    async def uploads(self, client: Any, sizes: Iterable[int]) -> None:
        """In one request, or in parts, by a patient client.

        Who does not hear of an upload that he has created cannot end it. So the answer to that is not
        lost; nor may the client give it up where the machine is busy, so no answer is silent.
        """
        kinds = [kind for kind in _LOST | _BUSY if kind != "silent"]
        await self._each(partial(self._upload, client), list(_cases("upload", kinds, sizes)))
        found = await self._direct.list_multipart_uploads(Bucket=self._bucket)
        self.findings.wrong += [f"{upload['Key']} is open" for upload in found.get("Uploads", ())]

    async def _each(self, do: Callable[[_Case], Awaitable[None]], cases: list[_Case]) -> None:
        await map_io(do, cases, limit=_AT_ONCE)

    async def _prepare(self, case: _Case) -> None:
        await s3.upload(self._direct, self._bucket, case.key, content(case.size))
        self._spoil(case, is_get)

    def _spoil(self, case: _Case, of: Callable[[Seen], bool]) -> None:
        spoilt = partial((_LOST | _WRONG | _BUSY)[case.kind], min(case.size, 64 * KIB) // 2)
        self._rules[case.key] = _TURNS[case.turn](spoilt, of)

    async def _download(self, client: Any, case: _Case) -> None:
        try:
            buffer = await self._ended(s3.download(client, self._bucket, case.key), case.key)
        except Exception as error:
            self._failed(error)
            return
        if buffer is not None:
            self._compare(case, right=_is_whole(buffer, case))

    async def _upload(self, client: Any, case: _Case) -> None:
        self._spoil(case, _is_part_of_upload if case.kind in _LOST else _is_of_upload)
        failed = False
        try:
            await self._ended(
                s3.upload(client, self._bucket, case.key, content(case.size)), case.key
            )
        except Exception as error:
            self._failed(error)
            failed = True
        try:
            buffer = await s3.download(self._direct, self._bucket, case.key)
        except ClientError:
            if not failed:
                self.findings.wrong.append(f"{case.key} was uploaded, and is not there")
            return
        self._compare(case, right=_is_whole(buffer, case))

    def _compare(self, case: _Case, *, right: bool) -> None:
        if right:
            self.findings.whole += 1
        else:
            self.findings.wrong.append(f"{case.key}: wrong bytes")

    def _failed(self, error: BaseException) -> None:
        self.findings.errors[type(error).__name__] += 1

    async def _ended(self, operation: Awaitable[Any], what: str) -> Any:
        done, _ = await asyncio.wait([asyncio.ensure_future(operation)], timeout=PATIENCE)
        if not done:
            self.findings.wrong.append(f"{what} hangs")
            return None
        return done.pop().result()


def checksum(download: tuple[str, SharedBuffer]) -> int:
    """In a worker: of what it was given."""
    with download[1] as buffer:
        return zlib.crc32(buffer.view)


def _is_whole(buffer: SharedBuffer, case: _Case) -> bool:
    with buffer:
        return buffer.view == content(case.size)


def _is_of_upload(request: Seen) -> bool:
    return request.method in {"PUT", "POST"}


def _is_part_of_upload(request: Seen) -> bool:
    return _is_of_upload(request) and not request.query.startswith("uploads")
