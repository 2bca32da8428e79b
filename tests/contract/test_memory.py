"""SharedBuffer: memory by descriptor, and what happens to it when handles are closed."""

import os
import pickle

import pytest

from asynclam import SharedBuffer, _memory, _payload


def travel(buffer: SharedBuffer) -> SharedBuffer:
    """To another process and back, without the process."""
    payload = _payload.dumps(buffer)
    body = b"".join(payload.parts)
    descriptors = [os.dup(descriptor) for descriptor in payload.descriptors]
    payload.close()
    return _payload.loads(bytearray(body), payload.flags, descriptors)


def test_zeros():
    """A new buffer is writable and all zeros."""
    with SharedBuffer(10) as buffer:
        assert bytes(buffer.view) == bytes(10)
        assert (buffer.nbytes, len(buffer), buffer.view.format) == (10, 10, "B")
        assert not buffer.view.readonly


def test_both_sides_see_the_same_bytes():
    """What travels is the memory, not a copy of it."""
    with SharedBuffer(4) as here, travel(here) as there:
        here.view[:] = b"abcd"
        assert bytes(there.view) == b"abcd"
        there.view[0] = 120
        assert bytes(here.view) == b"xbcd"


def test_empty():
    """A buffer of no bytes is a buffer (mmap(2) would refuse it)."""
    with SharedBuffer(0) as here, travel(here) as there:
        assert bytes(here.view) == bytes(there.view) == b""


def test_negative_length():
    """A negative length is refused before anything is created."""
    with pytest.raises(ValueError, match="-1"):
        SharedBuffer(-1)


def test_close():
    """A closed buffer gives no view and does not travel; closing twice does nothing."""
    buffer = SharedBuffer(4)
    buffer.close()
    buffer.close()
    assert buffer.closed
    for use in (lambda: buffer.view, lambda: _payload.dumps(buffer), buffer.__enter__):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_views_outlive_close():
    """A view that was taken stays valid after close(): nothing is unmapped under it."""
    buffer = SharedBuffer(4)
    view = buffer.view
    buffer.close()
    view[:] = b"abcd"
    assert bytes(view) == b"abcd"


def test_the_payload_owns_its_descriptor():
    """A buffer that is closed while its payload waits to be sent still arrives."""
    buffer = SharedBuffer(1)
    buffer.view[0] = 7
    payload = _payload.dumps(buffer)
    buffer.close()
    received = _payload.loads(bytearray(payload.parts[0]), 0, payload.descriptors)
    assert received.view[0] == 7
    assert payload.descriptors == [-1], "taken over by the received buffer"
    received.close()


def test_many_in_one_payload():
    """Several buffers keep their order, and one that occurs twice arrives as one."""
    buffers = [SharedBuffer(1) for _ in range(3)]
    for index, buffer in enumerate(buffers):
        buffer.view[0] = index
    payload = _payload.dumps([buffers[2], buffers[0], buffers[2], buffers[1]])
    assert len(payload.descriptors) == 3
    received = _payload.loads(bytearray(payload.parts[0]), 0, payload.descriptors)
    assert [buffer.view[0] for buffer in received] == [2, 0, 2, 1]
    assert received[0] is received[2]


def test_too_many_in_one_payload():
    """More buffers than descriptors can travel are refused, and none of them is left open."""
    with SharedBuffer(1) as original:
        copies = [travel(original) for _ in range(251)]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(pickle.PicklingError, match="250"):
            _payload.dumps(copies)
        assert len(os.listdir("/proc/self/fd")) == before


def test_plain_pickle_is_refused():
    """A buffer is a descriptor: pickling it for anything but a worker says what to do instead."""
    with SharedBuffer(1) as buffer, pytest.raises(pickle.PicklingError, match="run_cpu"):
        pickle.dumps(buffer)


def test_lost_descriptor():
    """A buffer whose descriptor could not be received is an error that names the limit."""
    with SharedBuffer(1) as buffer:
        payload = _payload.dumps(buffer)
        payload.close()
        with pytest.raises(OSError, match="limit of open descriptors"):
            _payload.loads(bytearray(payload.parts[0]), 0, None)


def test_unlinked_file(tmp_path, monkeypatch):
    """Without memfd a segment is a file that no directory names."""
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with SharedBuffer(100_000) as here, travel(here) as there:
        here.view[99_999] = 1
        assert there.view[99_999] == 1
        assert list(tmp_path.iterdir()) == []


def test_failed_segment_leaves_nothing(monkeypatch):
    """If the memory cannot be had the descriptor is closed."""

    def full(descriptor, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_memory.os, "ftruncate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        SharedBuffer(1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_repr():
    """The repr is a status line."""
    buffer = SharedBuffer(1_000_000)
    assert repr(buffer) == "<SharedBuffer [1,000,000 bytes]>"
    buffer.close()
    assert repr(buffer) == "<SharedBuffer [1,000,000 bytes, closed]>"
