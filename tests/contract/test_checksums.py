"""Checksums: known values, whatever pieces they are computed in, beside the loop or on it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import sys
import threading
import zlib
from typing import Any

import pytest
from botocore.exceptions import FlexibleChecksumError

from asynclam import SharedBuffer
from asynclam._memory import mapped, write_at
from asynclam.s3 import _checksums
from asynclam.s3._checksums import Expected, Verification, computation_of, expected_of, in_base64
from tests.parts.s3_objects import MIB, content

# Of "123456789", as catalogues of them have it.
KNOWN = {
    "crc32": "cbf43926",
    "crc32c": "e3069283",
    "crc64nvme": "ae8b14860a799888",
    "sha1": hashlib.sha1(b"123456789").hexdigest(),
    "sha256": hashlib.sha256(b"123456789").hexdigest(),
}


def value_of(algorithm: str, *parts: bytes) -> str:
    """The checksum in base64; composite, if there are several parts."""
    new = computation_of(algorithm)
    assert new is not None
    digests = []
    for part in parts:
        digest = new()
        digest.update(memoryview(part))
        digests.append(digest)
    if len(digests) == 1:
        return in_base64(digests[0])
    whole = new()
    whole.update(memoryview(b"".join(digest.digest() for digest in digests)))
    return in_base64(whole)


@pytest.mark.parametrize("algorithm", KNOWN)
def test_known_values(algorithm: str) -> None:
    """Each algorithm is the one that it is called, in any pieces."""
    digest = computation_of(algorithm)()
    for piece in (b"1", b"", b"2345", b"6789"):
        digest.update(memoryview(piece))
    assert digest.digest().hex() == KNOWN[algorithm]


def test_crc32_without_zlib_ng(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what makes it fast, and nothing else."""
    data, fast = content(MIB + 1), value_of("crc32", content(MIB + 1))
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    _checksums._crc32.cache_clear()
    try:
        assert _checksums._crc32() is zlib.crc32
        assert value_of("crc32", data) == fast
    finally:
        _checksums._crc32.cache_clear()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"etag": '"x"'}, None),
        ({"x-amz-checksum-crc32": "AAAAAA=="}, Expected("crc32", "AAAAAA==")),
        (
            {"x-amz-checksum-sha1": "abc=-12", "x-amz-checksum-type": "COMPOSITE"},
            Expected("sha1", "abc=", 12),
        ),
    ],
)
def test_headers(headers: dict[str, str], expected: Expected | None) -> None:
    """The name is in the header's, and the number of parts at the value's end."""
    assert expected_of(headers) == expected


@pytest.mark.parametrize("algorithm", ["crc32c", "crc64nvme"])
def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    """Without awscrt its checksums are not verified, and a warning says what to install."""
    monkeypatch.setitem(sys.modules, "awscrt", None)
    with pytest.warns(RuntimeWarning, match=rf"{algorithm.upper()}.*asynclam\[crt\]"):
        assert expected_of({f"x-amz-checksum-{algorithm}": "AAAAAA=="}) is None


def test_what_is_not_known_is_said() -> None:
    """A checksum that S3 may invent tomorrow is told, not passed over."""
    with pytest.warns(RuntimeWarning, match="XXHASH3.*not verified|not verified.*XXHASH3"):
        assert expected_of({"x-amz-checksum-xxhash3": "AAAA"}) is None


async def mismatch(
    data: bytes, expected: Expected, ends: list[int], arrivals: list[int]
) -> Exception | None:
    for fill in (write_at, _store):  # not mapped, and mapped
        with SharedBuffer(len(data)) as buffer:
            fill(buffer, 0, data)
            found = await _mismatch(buffer, expected, ends, arrivals)
            assert (mapped(buffer) is None) is (fill is write_at)
    return found


def _store(buffer: SharedBuffer, _: int, data: bytes) -> None:
    buffer.view[:] = data


async def _mismatch(
    buffer: SharedBuffer, expected: Expected, ends: list[int], arrivals: list[int]
) -> Exception | None:
    async with Verification(expected, buffer, ends) as verification:
        for arrival in arrivals:
            verification.reached(arrival)
            await asyncio.sleep(0)
        return await verification.mismatch()


@pytest.mark.parametrize("algorithm", KNOWN)
@pytest.mark.parametrize("nbytes", [0, 1, 600_000, 9 * MIB])
async def test_a_whole_object(algorithm: str, nbytes: int) -> None:
    """It matches however it arrives, and not if it is another one."""
    data = content(nbytes)
    right = Expected(algorithm, value_of(algorithm, data))
    arrivals = [nbytes // 3, nbytes // 2, nbytes]
    assert await mismatch(data, right, [], arrivals) is None
    wrong = Expected(algorithm, value_of(algorithm, data + b"x"))
    assert isinstance(await mismatch(data, wrong, [], arrivals), FlexibleChecksumError)


@pytest.mark.parametrize("lengths", [[5], [0], [1, 2, 3], [MIB, MIB, 1], [600_000, 1, 5 * MIB]])
async def test_a_composite(lengths: list[int]) -> None:
    """It is the checksum of the parts' checksums, wherever the parts end."""
    parts = [content(length) for length in lengths]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    value = base64.b64encode(hashlib.sha256(digests).digest()).decode()
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    data = b"".join(parts)
    expected = Expected("sha256", value, len(parts))
    assert await mismatch(data, expected, ends, [len(data) // 2, len(data)]) is None
    if len(data) > 1:
        other = [1, *ends[1:]] if len(ends) > 1 else [1, len(data)]
        if other != ends:
            assert await mismatch(data, expected, other, []) is not None


async def test_large_pieces_are_hashed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on its thread; and the thread has ended soon after."""
    threads = set()

    class Digest:
        def update(self, data: memoryview) -> None:
            threads.add(threading.current_thread())

        def digest(self) -> bytes:
            return b""

    monkeypatch.setattr(_checksums, "computation_of", lambda _: Digest)
    data = content(9 * MIB)
    assert await mismatch(data, Expected("any", ""), [], [len(data)]) is None
    threads.discard(threading.main_thread())
    assert threads
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


async def test_a_cancel_waits_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is not given up while a thread looks at it."""
    entered, leave = threading.Event(), threading.Event()
    seen: list[Any] = []

    class Digest:
        def update(self, data: memoryview) -> None:
            entered.set()
            leave.wait(30)
            seen.append(len(data))

    monkeypatch.setattr(_checksums, "computation_of", lambda _: Digest)

    async def verify() -> None:
        with SharedBuffer(5 * MIB) as buffer:
            async with Verification(Expected("any", ""), buffer, []) as verification:
                verification.reached(5 * MIB)
                await verification.mismatch()

    verifying = asyncio.ensure_future(verify())
    while not entered.is_set():
        await asyncio.sleep(0)
    for _ in range(3):
        verifying.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not verifying.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await verifying
    assert sum(seen) == 5 * MIB
