"""The targets: each takes any bytes, and raises only if something is wrong."""

from __future__ import annotations

import os
import struct

from asynclam import _memory, _payload, _raised, _segments, _wire
from asynclam._errors import PayloadError

_MOST = 2 << 20  # bytes that a decoder may have beyond what it was given


class Source:
    """Decisions out of bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def number(self, below: int) -> int:
        """A number, 0 at the end of the bytes."""
        width = 1 if below <= 1 << 8 else 4
        found = self.take(width)
        return int.from_bytes(found, "little") % below

    def take(self, count: int) -> bytes:
        found = self._data[self._position : self._position + count]
        self._position += count
        return found

    def rest(self) -> bytes:
        return self._data[self._position :]

    @property
    def is_empty(self) -> bool:
        return self._position >= len(self._data)


def decoder(data: bytes) -> None:
    """Any bytes in any pieces: frames or a ProtocolError, and no memory for what has not come."""
    source = Source(data)
    parser = _wire.Decoder()
    given = got = 0
    try:
        while not source.is_empty:
            descriptors = [-1] * source.number(3)  # -1: those that need not be closed
            truncated = source.number(8) == 7
            piece = source.take(1 + source.number(300))
            while piece:
                buffer = parser.buffer()
                assert len(buffer), "it would read as the end of file"
                count = min(len(buffer), len(piece))
                buffer[:count] = piece[:count]
                del buffer
                given += count
                for frame in parser.received(count, descriptors, truncated=truncated):
                    got += len(frame.body) + _wire.HEADER.size
                    assert frame.descriptors is None or len(frame.descriptors) <= 255
                piece, descriptors, truncated = piece[count:], [], False
                assert got <= given
                assert len(parser._body) <= given + _MOST
    except _wire.ProtocolError:
        pass
    finally:
        parser.close()


def frames(data: bytes) -> None:
    """Frames that were encoded, torn anywhere: the same frames."""
    source = Source(data)
    sent: list[tuple[int, int, int, bytes, int]] = []
    stream: list[tuple[bytes, int]] = []  # bytes, and how many descriptors come with the first
    while not source.is_empty and len(sent) < 20:
        kind = _wire.JOB + source.number(_wire.NOT_STARTED)
        flags, number, count = source.number(1 << 32), source.number(1 << 32), source.number(4)
        body = source.take(source.number(300)) * (1 + source.number(4) * source.number(400))
        sent.append((kind, flags, number, body, count))
        parts = _wire.encode(kind, number, [body], flags=flags, descriptors=count)
        stream.append((b"".join(parts), count))
    parser, got = _wire.Decoder(), []
    for encoded, count in stream:
        whole, descriptors = encoded, [-1] * count
        while whole:
            buffer = parser.buffer()
            size = min(len(buffer), 1 + source.number(1 << 16), len(whole))
            buffer[:size] = whole[:size]
            del buffer
            got += parser.received(size, descriptors)
            whole, descriptors = whole[size:], []
    seen = [
        (frame.kind, frame.flags, frame.number, bytes(frame.body), len(frame.descriptors or ()))
        for frame in got
    ]
    assert seen == sent


def segments(data: bytes) -> None:
    """Any notes and records, with and without a descriptor: a ProtocolError or an OSError, or sense."""
    source = Source(data)
    share = _segments.Share()
    end = _segments.End(share)
    try:
        while not source.is_empty:
            if source.number(3) == 0:
                lease = end.outgoing.acquire(1 + source.number(9000))
                if lease is not None:
                    end.outgoing.sent(lease)
            elif source.number(2):
                _note(end, source)
            else:
                _open(end, source)
            end.notes()
    finally:
        end.close()


def _note(end: _segments.End, source: Source) -> None:
    count = source.number(4)
    notes = source.take(4 * count) if source.number(2) else _small_ids(source, count)
    head = struct.pack("<I", count if source.number(8) else source.number(1 << 32))
    try:
        left = end.noted(head + notes + bytes(source.number(40)))
    except _wire.ProtocolError:
        return
    assert len(left) < 60


def _small_ids(source: Source, count: int) -> bytes:
    ids = (source.number(4) << 30 | source.number(6) for _ in range(count))
    return b"".join(number.to_bytes(4, "little") for number in ids)


def _open(end: _segments.End, source: Source) -> None:
    record = source.take(24)
    if source.number(4):
        record = struct.pack(
            "<IIQQ", source.number(6), source.number(4), source.number(9000), source.number(9000)
        )
    descriptors: list[int] | None = None
    if source.number(3):
        descriptors = [
            _memory.create_segment(1 + source.number(9000)) for _ in range(source.number(2))
        ]
    before = list(descriptors or ())
    try:
        view, _ = end.incoming.open(record, descriptors)
        _, _, length, capacity = struct.unpack("<IIQQ", record)
        assert len(view) == length <= capacity
        bytes(view)  # all of it is there: else this is SIGBUS
    except (_wire.ProtocolError, OSError):
        pass
    finally:
        _wire.close_descriptors(descriptors or ())
    for descriptor in before:
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        raise AssertionError("a descriptor is left open")


def payload(data: bytes) -> None:
    """Any layout: contents that lie within the body, or an error."""
    body = memoryview(data)
    try:
        contents = _payload.split(body)
    except (struct.error, ValueError):
        return
    assert sum(len(view) for _, view in contents) <= len(data)
    assert len(contents) <= len(data) // 8


def layout(data: bytes) -> None:
    """What is laid out is split into the same."""
    source = Source(data)
    contents: _payload.Contents = []
    while not source.is_empty:
        kind = source.number(4)
        contents.append((kind, [source.take(source.number(40)) for _ in range(source.number(4))]))
    joined = b"".join(bytes(part) for part in _payload.lay_out(contents))
    got = [(kind, bytes(view)) for kind, view in _payload.split(memoryview(joined))]
    assert got == [(kind, b"".join(map(bytes, parts))) for kind, parts in contents]


def raised(data: bytes) -> None:
    """The body of a RAISED frame that is cut off, or whose length is wrong: an error that says so."""
    source = Source(data)
    whole = _raised.dumps(ValueError("text"))
    cut = whole[: source.number(len(whole) + 1)]
    wrong = source.take(4)
    if len(wrong) == 4 and source.number(2):
        cut = wrong + cut[4:]
    error = _raised.loads(bytearray(cut), "job", 1)
    assert isinstance(error, (PayloadError, ValueError))


TARGETS = {
    target.__name__: target for target in (decoder, frames, segments, payload, layout, raised)
}
