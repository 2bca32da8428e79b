"""Functions of the S3 tests that run in a worker."""

from __future__ import annotations

import hashlib

from asynclam import SharedBuffer


def digest(buffer: SharedBuffer) -> str:
    """SHA-256 of what is in the buffer."""
    with buffer:
        return hashlib.sha256(buffer.view).hexdigest()


def named_digest(item: tuple[str, SharedBuffer]) -> tuple[str, str]:
    """The same for one item of ``download_many``."""
    key, buffer = item
    return key, digest(buffer)


def fill(nbytes: int) -> SharedBuffer:
    """A buffer made in the worker, of bytes that count up."""
    buffer = SharedBuffer(nbytes)
    buffer.view[:] = (bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]
    return buffer
