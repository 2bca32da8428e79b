"""Frames: bytes in, frames out, however the bytes are cut."""

import os
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynclam import _wire


def feed(decoder: _wire.Decoder, data: bytes, step: int, descriptors=()) -> list[_wire.Frame]:
    """Gives ``data`` to the decoder in pieces of at most ``step`` bytes."""
    frames: list[_wire.Frame] = []
    position = 0
    while position < len(data):
        buffer = decoder.buffer()
        assert len(buffer) > 0, "an empty buffer would read as end of file"
        count = min(step, len(buffer), len(data) - position)
        buffer[:count] = data[position : position + count]
        frames += decoder.received(count, descriptors if position == 0 else ())
        position += count
    return frames


def encoded(*bodies: bytes) -> bytes:
    return b"".join(
        b"".join(_wire.encode(_wire.JOB, number, [body])) for number, body in enumerate(bodies)
    )


BODIES = (b"", b"x", b"y" * 100, b"z" * 70_000, b"", b"w" * 65_536, b"v" * 65_537, b"u")


@pytest.mark.parametrize("step", [1, 7, 24, 25, 4096, 65_535, 1 << 20])
def test_any_cut(step):
    """Frames come out whole and in order, whatever pieces the bytes come in."""
    frames = feed(_wire.Decoder(), encoded(*BODIES), step)
    assert [bytes(frame.body) for frame in frames] == list(BODIES)
    assert [frame.number for frame in frames] == list(range(len(BODIES)))


@given(st.lists(st.binary(max_size=200), max_size=20), st.data())
def test_random_cuts(bodies, data):
    """The same for random bodies and a random cut at every step."""
    stream, decoder, frames = encoded(*bodies), _wire.Decoder(), []
    while stream:
        count = data.draw(st.integers(1, len(stream)))
        frames += feed(decoder, stream[:count], count)
        stream = stream[count:]
    assert [bytes(frame.body) for frame in frames] == bodies


def test_fields():
    """Kind, flags and number arrive as they were sent."""
    data = b"".join(_wire.encode(_wire.RESULT, 1 << 63, [b"a", b"bc"], flags=12))
    (frame,) = feed(_wire.Decoder(), data, len(data))
    assert (frame.kind, frame.flags, frame.number) == (_wire.RESULT, 12, 1 << 63)
    assert frame.body == b"abc"


@given(st.binary(min_size=24, max_size=300))
def test_garbage(data):
    """What is no frame is refused, at once or when it is complete, and never crashes."""
    try:
        feed(_wire.Decoder(), data, len(data))
    except _wire.ProtocolError:
        return
    assert data.startswith(_wire.MAGIC.to_bytes(2, "little"))


@pytest.mark.parametrize(
    "header",
    [
        (0, _wire.JOB, 0, 0, 0, 0),
        (_wire.MAGIC, 0, 0, 0, 0, 0),
        (_wire.MAGIC, 99, 0, 0, 0, 0),
        (_wire.MAGIC, _wire.JOB, 251, 0, 0, 0),
        (_wire.MAGIC, _wire.JOB, 0, 0, _wire.MAX_LENGTH + 1, 0),
        (_wire.MAGIC, _wire.JOB, 1, 0, 0, 0),
    ],
    ids=["magic", "kind 0", "kind 99", "too many descriptors", "too long", "missing descriptor"],
)
def test_impossible_headers(header):
    """Each field that cannot be is refused."""
    with pytest.raises(_wire.ProtocolError):
        feed(_wire.Decoder(), _wire.HEADER.pack(*header), 24)


@pytest.fixture
def four():
    descriptors = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    yield descriptors
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError:
            continue


def test_frames_before_garbage():
    """What came before the garbage is told with it."""
    with pytest.raises(_wire.ProtocolError) as caught:
        feed(_wire.Decoder(), encoded(b"first", b"second") + bytes(24), 10_000)
    assert [frame.number for frame in caught.value.frames] == [0, 1]


def test_descriptors_go_to_the_frames_that_count_them(four):
    """Each frame takes as many descriptors as its header counts, in the order of the frames."""
    decoder = _wire.Decoder()
    counts = [0, 1, 2, 0, 1]
    frames = []
    for number, count in enumerate(counts):
        mine = [four.pop(0) for _ in range(count)]
        data = b"".join(_wire.encode(_wire.JOB, number, [b"body"], descriptors=count))
        frames += feed(decoder, data, 5, mine)
        assert frames[-1].descriptors == mine
    for frame in frames:
        frame.close()


def test_descriptors_with_bytes_of_an_earlier_frame(four):
    """One receive may join an earlier frame to one with descriptors: they go to the later one."""
    earlier = b"".join(_wire.encode(_wire.JOB, 1, [b"earlier"]))
    later = b"".join(_wire.encode(_wire.JOB, 2, [b"later"], descriptors=1))
    decoder = _wire.Decoder()
    assert not feed(decoder, earlier[:10], 10)
    first, second = feed(decoder, earlier[10:] + later, 1000, [four[0]])
    assert (first.descriptors, second.descriptors) == ([], [four[0]])


def test_lost_descriptors(four):
    """A frame whose descriptors the kernel dropped says so; those before and after are unharmed."""
    decoder = _wire.Decoder()
    frames = []
    for number, truncated in enumerate([False, True, False]):
        data = b"".join(_wire.encode(_wire.JOB, number, [b"body"], descriptors=1))
        buffer = decoder.buffer()
        buffer[: len(data)] = data
        frames += decoder.received(len(data), [four[number]], truncated=truncated)
    assert [frame.descriptors for frame in frames] == [[four[0]], None, [four[2]]]
    with pytest.raises(OSError):
        os.fstat(four[1])  # what did arrive of them is closed


def test_closing_a_decoder_closes_what_nobody_took(four):
    """Descriptors of a frame that never became complete are not left open."""
    decoder = _wire.Decoder()
    data = b"".join(_wire.encode(_wire.JOB, 1, [b"x" * 100_000], descriptors=2))
    assert not feed(decoder, data[:50_000], 50_000, four[:2])
    decoder.close()
    for descriptor in four[:2]:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_a_small_frame_is_one_buffer():
    """A small frame is joined into a single buffer: one copy is cheaper than another iovec."""
    assert len(_wire.encode(_wire.JOB, 1, [b"a", b"b", b"c"])) == 1
    assert len(_wire.encode(_wire.JOB, 1, [b"a" * 100_000])) == 2


def test_too_many_descriptors():
    """A frame with more descriptors than one send carries is refused before it is sent."""
    with pytest.raises(ValueError, match="251"):
        _wire.encode(_wire.JOB, 1, [], descriptors=_wire.MAX_DESCRIPTORS + 1)


def test_a_length_that_is_garbage_takes_no_memory():
    """The body grows as it comes: what a header says alone costs nothing."""
    decoder = _wire.Decoder()
    header = _wire.HEADER.pack(_wire.MAGIC, _wire.RESULT, 0, 0, _wire.MAX_LENGTH, 1)
    tracemalloc.start()
    try:
        assert not feed(decoder, header + bytes(1000), 500)
        assert len(decoder.buffer()) <= 1 << 20
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_no_memory_for_a_body(monkeypatch):
    """A body for which there is no memory is an error of the connection."""

    class Room:
        def __getitem__(self, _):
            raise MemoryError

    monkeypatch.setattr(_wire, "_ROOM", Room())
    decoder = _wire.Decoder()
    feed(decoder, _wire.HEADER.pack(_wire.MAGIC, _wire.RESULT, 0, 0, 1 << 30, 1), 24)
    with pytest.raises(_wire.ProtocolError, match="no memory for a frame of 1,073,741,824 bytes"):
        decoder.buffer()
