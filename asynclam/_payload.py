"""Payloads: one object as bytes, its large buffers beside them, and the descriptors it owns.

Pickle protocol 5 (PEP 574) sets large buffers aside, so that an array is copied into the socket
and out of it, not through a pickle. What pickle refuses is tried with cloudpickle, which is
imported only then: lambdas, closures, and what the other process knows under no name.
"""

from __future__ import annotations

import errno
import pickle
import struct
from collections.abc import Callable
from typing import Any

from . import _wire
from ._memory import travel

_ASIDE = 16 * 1024  # bytes: a smaller buffer costs less inside the pickle than beside it
ALIGNMENT = 16  # bytes: enough for every NumPy dtype, and what malloc gives the body


class Payload:
    """An object that was pickled. Owns duplicates of the descriptors that travel with it."""

    __slots__ = ("descriptors", "flags", "parts")

    def __init__(self, parts: list[_wire.Part], flags: int, descriptors: list[int]) -> None:
        self.parts = parts
        self.flags = flags
        self.descriptors = descriptors

    def close(self) -> None:
        """Closes its descriptors. Closing twice does nothing."""
        _wire.close_descriptors(self.descriptors)
        self.descriptors = []


def dumps(obj: object, *, main_is_shared: bool = True) -> Payload:
    """Pickles ``obj``: by reference what the other process can import, by value the rest.

    Args:
        obj: the object.
        main_is_shared: whether a name in ``__main__`` means the same in the other process.

    Raises:
        Exception: whatever pickle raised, where cloudpickle failed too; nothing else is left.
    """
    try:
        return _dumps(obj, pickle.dumps if main_is_shared else _dump_without_main)
    except Exception as refused:
        try:
            return dumps_by_value(obj)
        except Exception:
            raise refused from None


def dumps_whole(obj: object) -> bytes:
    """Pickles ``obj`` for another program run: in one piece, nothing of ``__main__`` by reference.

    Raises:
        Exception: whatever pickle raised, or that a SharedBuffer is in it.
    """
    try:
        return _dump_without_main(obj, protocol=5)
    except Exception as refused:
        import cloudpickle

        try:
            data: bytes = cloudpickle.dumps(obj, protocol=5)
        except Exception:
            raise refused from None
        return data


def _dump_without_main(obj: object, **options: Any) -> bytes:
    data = pickle.dumps(obj, **options)
    if b"__main__" in data:
        raise pickle.PicklingError("it names something in __main__")
    return data


def dumps_by_value(obj: object) -> Payload:
    """Pickles ``obj`` with cloudpickle: what is defined in ``__main__``, too, goes by value."""
    import cloudpickle

    return _dumps(obj, cloudpickle.dumps)


def _dumps(obj: object, dump: Callable[..., bytes]) -> Payload:
    buffers: list[memoryview] = []
    descriptors: list[int] = []

    def set_aside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _ASIDE:
            return True
        buffers.append(raw)
        return False

    travel.outgoing = descriptors
    try:
        data = dump(obj, protocol=5, buffer_callback=set_aside)
        if len(descriptors) > _wire.MAX_DESCRIPTORS:
            raise pickle.PicklingError(
                f"{len(descriptors)} SharedBuffers in one call or result; "
                f"{_wire.MAX_DESCRIPTORS} can travel at once"
            )
    except BaseException:
        _wire.close_descriptors(descriptors)
        raise
    finally:
        travel.outgoing = None
    if not buffers:
        return Payload([data], 0, descriptors)
    return Payload(_lay_out(data, buffers), _wire.BUFFERS, descriptors)


def _lay_out(data: bytes, buffers: list[memoryview]) -> list[_wire.Part]:
    """Parts: how many lengths, the lengths of the pickle and the buffers, and these, aligned."""
    contents: list[_wire.Part] = [data, *buffers]
    lengths = list(map(len, contents))
    parts: list[_wire.Part] = [struct.pack(f"<Q{len(lengths)}Q", len(lengths), *lengths)]
    position = len(parts[0])
    for part in contents:
        padding = -position % ALIGNMENT
        if padding:
            parts.append(bytes(padding))
        parts.append(part)
        position += padding + len(part)
    return parts


def _split(body: memoryview) -> list[memoryview]:
    (count,) = struct.unpack_from("<Q", body)
    lengths = struct.unpack_from(f"<{count}Q", body, 8)
    position = 8 + 8 * count
    parts: list[memoryview] = []
    for length in lengths:
        position += -position % ALIGNMENT
        parts.append(body[position : position + length])
        position += length
    return parts


def loads(body: bytearray | memoryview, flags: int, descriptors: list[int] | None) -> Any:
    """Unpickles a payload out of the body of a frame. Its buffers are views of the body.

    Descriptors that the object takes over are replaced by -1 in the list.

    Raises:
        BaseException: whatever unpickling raises; the caller expects anything.
    """
    if descriptors is None:
        raise OSError(
            errno.EMFILE,
            "a SharedBuffer was lost, this process is at its limit of open descriptors; "
            "close() buffers when they are used up",
        )
    travel.incoming = descriptors
    try:
        if not flags & _wire.BUFFERS:
            return pickle.loads(body)
        data, *buffers = _split(memoryview(body))
        return pickle.loads(data, buffers=buffers)
    finally:
        travel.incoming = None
