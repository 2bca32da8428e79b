"""Payloads: one object as bytes, its large buffers beside them, and the descriptors it owns.

Pickle protocol 5 (PEP 574) sets large buffers aside, so that an array is copied into the socket or
segment and out of it, not through a pickle. What pickle refuses is tried with cloudpickle, which is
imported only then: lambdas, closures, and what the other process knows under no name. This is for
what is dumped and loaded in one go; ``_steps`` does it piece by piece, in the same layout.
"""

from __future__ import annotations

import _pickle as pickle  # pickle.py has the same, and takes 2 ms to import
import errno
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import _wire
from ._memory import travel

ASIDE = 16 * 1024  # bytes: a smaller buffer costs less inside the pickle than beside it
LEAST_IN_SEGMENT = 128 * 1024  # bytes: a smaller payload is as fast in its frame, even at 64 KiB
ALIGNMENT = 16  # bytes: enough for every NumPy dtype, and what malloc gives the body
MOST_DESCRIPTORS = _wire.MAX_DESCRIPTORS - 1  # of a payload: a segment adds its own
_LEAST_SEGMENT = 4096  # bytes: what a segment weighs, however small; descriptors are few


_PLAIN = frozenset({type(None), bool, int, float})
_PLAIN_IF_SMALL = frozenset({str, bytes})
_SMALL = 4096  # characters or bytes


def is_plain(obj: object) -> bool:
    """Whether nothing but a small pickle can come of ``obj``: no buffer, no descriptor, no name."""
    kind = type(obj)
    return kind in _PLAIN or (kind in _PLAIN_IF_SMALL and len(obj) < _SMALL)  # type: ignore[arg-type]


class Payload:
    """An object that was pickled. Owns duplicates of the descriptors that travel with it."""

    __slots__ = ("descriptors", "flags", "parts")

    def __init__(self, parts: list[_wire.Part], flags: int, descriptors: list[int]) -> None:
        self.parts = parts
        self.flags = flags
        self.descriptors = descriptors

    def names_main(self) -> bool:
        """Whether it may name something in ``__main__``."""
        return any(b"__main__" in part for part in self.parts if isinstance(part, bytes))

    def close(self) -> None:
        """Closes its descriptors. Closing twice does nothing."""
        if self.descriptors:
            _wire.close_descriptors(self.descriptors)
            self.descriptors = []


def size_of(parts: Iterable[_wire.Part]) -> int:
    """How many bytes a payload has."""
    return sum(map(len, parts))


def weight(nbytes: int, descriptors: Sequence[int]) -> int:
    """The bytes that a payload keeps in memory: its own, and those of its segments."""
    sizes = [os.fstat(descriptor).st_size for descriptor in descriptors if descriptor >= 0]
    return nbytes + sum(max(size, _LEAST_SEGMENT) for size in sizes)


def dumps(obj: object, shares_main: Callable[[], bool] | None = None) -> Payload:
    """Pickles ``obj``: by reference what the other process can import, by value the rest.

    Args:
        obj: the object.
        shares_main: tells whether a name in ``__main__`` means the same in the other process;
            ``None`` if it does. Asked if there is one.

    Raises:
        Exception: whatever pickle raised, where cloudpickle failed too; nothing else is left.
    """
    try:
        payload = _dumps(obj, pickle.dumps)
        if shares_main and payload.names_main() and not shares_main():
            payload.close()
            raise _names_main()
    except Exception as refused:
        try:
            return dumps_by_value(obj)
        except Exception:
            raise refused from None
    return payload


def dumps_whole(obj: object) -> bytes:
    """Pickles ``obj`` for another program run: in one piece, nothing of ``__main__`` by reference.

    Raises:
        Exception: whatever pickle raised, or that a SharedBuffer is in it.
    """
    try:
        data = pickle.dumps(obj, protocol=5)
        if b"__main__" in data:
            raise _names_main()
    except Exception as refused:
        import cloudpickle

        try:
            data = cloudpickle.dumps(obj, protocol=5)
        except Exception:
            raise refused from None
    return data


def dumps_in_main(obj: object) -> bytes:
    """Pickles ``obj`` for a process with the same ``__main__``; empty if it has nothing of that."""
    try:
        data = pickle.dumps(obj, protocol=5)
    except Exception:
        return b""
    return data if b"__main__" in data else b""


def _names_main() -> pickle.PicklingError:
    return pickle.PicklingError("it names something in __main__")


def dumps_by_value(obj: object) -> Payload:
    """Pickles ``obj`` with cloudpickle: what is defined in ``__main__``, too, goes by value."""
    import cloudpickle

    return _dumps(obj, cloudpickle.dumps)


def _dumps(obj: object, dump: Callable[..., bytes]) -> Payload:
    buffers: list[memoryview] = []
    descriptors: list[int] = []

    def set_aside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < ASIDE:
            return True
        buffers.append(raw)
        return False

    travel.outgoing = descriptors
    try:
        data = dump(obj, protocol=5, buffer_callback=set_aside)
        if len(descriptors) > MOST_DESCRIPTORS:
            raise too_many(descriptors)
    except BaseException:
        _wire.close_descriptors(descriptors)
        raise
    finally:
        travel.outgoing = None
    if not buffers:
        return Payload([data], 0, descriptors)
    contents: Contents = [(PICKLE, [data])]
    contents += [(VIEW, [buffer]) for buffer in buffers]
    return Payload(lay_out(contents), _wire.BUFFERS, descriptors)


def too_many(descriptors: list[int]) -> pickle.PicklingError:
    """More descriptors than can travel with a payload."""
    return pickle.PicklingError(
        f"{len(descriptors)} SharedBuffers in one call or result; "
        f"{MOST_DESCRIPTORS} can travel at once"
    )


# What a piece of contents is, and what a buffer becomes where it is unpickled.
PICKLE, VIEW, BYTES, BYTEARRAY = range(4)
_KIND = 56  # bits of a length below its kind


Contents = list[tuple[int, list[_wire.Part]]]  # kinds and parts


def lay_out(contents: Contents) -> list[_wire.Part]:
    """Parts: how many contents, the kinds and lengths of the contents, and these, aligned."""
    lengths = [sum(map(len, parts)) for _, parts in contents]
    table = [kind << _KIND | length for (kind, _), length in zip(contents, lengths, strict=True)]
    laid_out: list[_wire.Part] = [struct.pack(f"<Q{len(table)}Q", len(table), *table)]
    position = len(laid_out[0])
    for (_, parts), length in zip(contents, lengths, strict=True):
        padding = -position % ALIGNMENT
        if padding:
            laid_out.append(bytes(padding))
        laid_out += parts
        position += padding + length
    return laid_out


def split(body: memoryview) -> list[tuple[int, memoryview]]:
    """The kinds and contents that were laid out.

    Raises:
        ValueError: it is no payload, or not all of it (struct.error where not even its table is).
    """
    (count,) = struct.unpack_from("<Q", body)
    position = 8 + 8 * count
    contents: list[tuple[int, memoryview]] = []
    for entry in struct.unpack_from(f"<{count}Q", body, 8):
        kind, length = entry >> _KIND, entry & ((1 << _KIND) - 1)
        position += -position % ALIGNMENT
        contents.append((kind, body[position : position + length]))
        position += length
    if position > len(body):
        raise ValueError(f"a payload of {position:,} bytes is cut off after {len(body):,}")
    return contents


def loads(body: bytearray | memoryview, flags: int, descriptors: list[int] | None) -> Any:
    """Unpickles a payload out of the body of a frame. Its buffers are views of the body.

    Descriptors that the object takes over are replaced by -1 in the list.

    Raises:
        BaseException: whatever unpickling raises; the caller expects anything.
    """
    if descriptors is None:
        raise lost()
    if not (descriptors or flags & _wire.BUFFERS):
        return pickle.loads(body)
    travel.incoming = descriptors
    try:
        if not flags & _wire.BUFFERS:
            return pickle.loads(body)
        (_, data), *buffers = split(memoryview(body))
        return pickle.loads(data, buffers=[buffer for _, buffer in buffers])
    finally:
        travel.incoming = None


def lost() -> OSError:
    """The descriptors of a payload could not be received."""
    return OSError(
        errno.EMFILE,
        "a SharedBuffer was lost, this process is at its limit of open descriptors; "
        "close() buffers when they are used up",
    )
