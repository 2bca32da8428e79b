"""Functions of the S3 tests that run in a worker."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

from asynclam import SharedBuffer
from tests.parts.gate import pass_through


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


def hold(gate: str) -> Callable[[tuple[str, SharedBuffer]], int]:
    """A job that has a buffer's memory until the gate lets it go."""
    return functools.partial(_hold, gate)


def _hold(gate: str, item: tuple[str, SharedBuffer]) -> int:
    buffer = item[1]
    length = len(buffer.view)
    pass_through(gate)
    return length


def same(buffer: SharedBuffer) -> SharedBuffer:
    """It goes back."""
    return buffer


_kept: list[SharedBuffer] = []


def keep(item: tuple[str, SharedBuffer]) -> int:
    """Keeps it in the worker."""
    _kept.append(item[1])
    return item[1].nbytes


def forget() -> int:
    """How many were kept, and are no more."""
    count = len(_kept)
    _kept.clear()
    return count


class Thing:
    """Something that a weak reference can watch."""


def type_name(thing: object) -> str:
    """What it is."""
    return type(thing).__name__


def count_clients() -> int:
    """How many clients this worker keeps."""
    from asynclam.s3 import _remote

    return len(_remote._clients)


def fails(item: tuple[str, SharedBuffer]) -> None:
    """Raises what names the object."""
    raise ValueError(item[0])
