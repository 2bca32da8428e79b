"""Segments: both ends of a channel in one process, with what a channel carries between them."""

import errno
import gc
import os
import struct
import sys
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from asynclam import _memory, _segments, _wire
from tests.jobs import mapped_segments as mapped

pytestmark = pytest.mark.usefixtures("segments_in_use")

MIB = 1 << 20


class Pair:
    """A channel: what ``here`` sends, ``there`` receives."""

    def __init__(self, nbytes=64 * MIB, most_maps=100):
        self.share = _segments.Share()
        self.share.nbytes, self.share.most_maps = nbytes, most_maps
        self.here, self.there = _segments.End(self.share), _segments.End(self.share)
        self.made = 0

    def lease(self, content):
        lease = self.here.outgoing.acquire(len(content))
        for _ in _segments.copy_in(lease.view, [content]):
            pass
        return lease

    def deliver(self, lease, *, lost=False):
        """The frame of a lease, there: the view, and whether it must be copied."""
        descriptors = [os.dup(descriptor) for descriptor in lease.descriptors]
        self.made += len(descriptors)
        record = lease.record
        self.here.outgoing.sent(lease)
        if lost:
            _wire.close_descriptors(descriptors)
        try:
            return self.there.incoming.open(record, None if lost and descriptors else descriptors)
        finally:
            assert lost or not descriptors, "taken over"

    def send(self, content):
        return self.deliver(self.lease(content))[0]

    def exchange_notes(self):
        for one, other in ((self.here, self.there), (self.there, self.here)):
            notes = one.notes()
            if notes:
                assert other.noted(notes + b"rest") == b"rest"

    def close(self):
        self.here.close()
        self.there.close()


@pytest.fixture
def pair():
    before = descriptors(), mapped()
    pair = Pair()
    yield pair
    pair.close()
    gc.collect()
    assert (descriptors(), mapped()) == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_is_sent_arrives(pair):
    """The view is exactly the payload, and writable."""
    view = pair.send(b"x" * 3_000_001)
    assert (len(view), view.readonly) == (3_000_001, False)
    assert view == b"x" * 3_000_001


def test_segments_are_used_again(pair):
    """The second payload of a size needs no new segment, and no descriptor."""
    for content in (b"a" * MIB, b"b" * (MIB - 5000), b"c" * MIB):
        assert pair.send(content) == content
        pair.exchange_notes()
    assert pair.made == 1
    assert mapped() == 2, "each end keeps it mapped"


def test_what_is_looked_into_is_not_written_to(pair):
    """As long as an array lives, however it was made, its memory is its own."""
    array = np.frombuffer(pair.send(b"a" * MIB), np.uint8).reshape(1024, -1)[5:7]
    pair.exchange_notes()
    assert pair.send(b"b" * MIB) == b"b" * MIB
    assert pair.made == 2
    assert (array == ord("a")).all()
    del array
    pair.exchange_notes()
    pair.send(b"c" * MIB)
    assert pair.made == 2


def test_a_release_is_told_once(pair):
    """There is nothing to tell as long as nothing has changed."""
    view = pair.send(b"a" * MIB)
    assert pair.there.notes() == b""
    del view
    assert pair.there.notes()
    assert pair.there.notes() == b""


def test_what_a_channel_keeps_is_bounded(pair):
    """Beyond the bounds segments are given away: only the receiver has them, while it looks."""
    views = [pair.send(bytes([number]) * MIB) for number in range(100)]
    assert len(pair.here.outgoing) == len(pair.there.incoming) == 16
    assert pair.here.outgoing.nbytes <= pair.share.nbytes
    assert mapped() == 100 + 16
    assert [view[-1] for view in views] == list(range(100))
    views.clear()
    pair.exchange_notes()
    assert mapped() == 2 * 16


def test_bytes_that_are_kept_are_bounded():
    """A payload that is larger than all that may be kept is given away, and evicts nothing."""
    pair = Pair(nbytes=4 * MIB)
    pair.send(b"a" * MIB)
    pair.exchange_notes()
    pair.send(b"b" * 5 * MIB)
    pair.exchange_notes()
    assert (len(pair.here.outgoing), mapped()) == (1, 2)
    pair.close()


def test_free_segments_make_way():
    """Segments that nobody uses are dropped, on both sides, for one that is needed."""
    pair = Pair(nbytes=4 * MIB)
    views = [pair.send(b"a" * MIB) for _ in range(4)]
    views.clear()
    pair.exchange_notes()
    assert pair.send(b"b" * 3 * MIB) == b"b" * 3 * MIB
    pair.exchange_notes()
    assert pair.here.outgoing.nbytes == 4 * MIB
    assert mapped() == 2 * 2
    pair.close()


def test_ends_of_a_process_share_the_bound():
    """What one channel keeps, another cannot."""
    one, other = Pair(), Pair()
    other.here.outgoing._share = one.share
    one.share.nbytes = 2 * MIB
    other.share.join(one.here.outgoing)
    view = one.send(b"a" * 2 * MIB)
    other.share = one.share
    given = other.send(b"b" * MIB)
    assert (len(one.here.outgoing), len(other.here.outgoing)) == (1, 0)
    del view, given
    one.close()
    other.close()


def test_too_many_maps():
    """Above the limit the receiver is told to copy, and what it has copied it does not keep."""
    pair = Pair(most_maps=20)
    held = []
    for number in range(200):
        view, must_copy = pair.deliver(pair.lease(bytes([number]) * 5000))
        held.append(bytearray(view) if must_copy else view)
        del view
        pair.exchange_notes()
    assert pair.share.maps == 20
    assert [bytes(item) for item in held] == [bytes([number]) * 5000 for number in range(200)]
    del held[:15]
    pair.exchange_notes()
    assert not pair.deliver(pair.lease(b"a" * 5000))[1], "there is room again"
    held.clear()
    pair.close()


def test_a_frame_that_is_not_sent(pair):
    """A lease that is cancelled is free again, with its descriptor; nothing has gone wrong."""
    lease = pair.lease(b"a" * MIB)
    pair.here.outgoing.cancel(lease)
    again = pair.lease(b"b" * MIB)
    assert again.segment is lease.segment
    assert pair.deliver(again)[0] == b"b" * MIB


def test_leases_in_another_order(pair):
    """What was leased first may be sent last."""
    first, second = pair.lease(b"a" * MIB), pair.lease(b"b" * MIB)
    assert pair.deliver(second)[0] == b"b" * MIB
    assert pair.deliver(first)[0] == b"a" * MIB


def test_a_given_frame_that_is_not_sent():
    """A segment that was to be given away is gone with the cancel."""
    pair = Pair(nbytes=0)
    before = descriptors()
    lease = pair.lease(b"a" * MIB)
    pair.here.outgoing.cancel(lease)
    del lease
    assert (descriptors(), mapped()) == (before, 0)
    pair.close()


def test_a_lost_descriptor(pair):
    """Where the kernel could not deliver it, that payload fails, and the sender drops the segment."""
    with pytest.raises(OSError, match="limit of open descriptors"):
        pair.deliver(pair.lease(b"a" * MIB), lost=True)
    pair.exchange_notes()
    assert len(pair.here.outgoing) == 0
    assert pair.send(b"b" * MIB) == b"b" * MIB


def test_no_map_is_left(pair, monkeypatch):
    """Where a segment cannot be mapped, the same; no descriptor is left."""
    lease = pair.lease(b"a" * MIB)

    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(_memory, "map_descriptor", refuse)
        with pytest.raises(OSError, match="allocate"):
            pair.deliver(lease)
        assert pair.here.outgoing.acquire(5 * MIB) is None, "streamed"
    del lease
    pair.exchange_notes()
    assert pair.send(b"b" * MIB) == b"b" * MIB


@pytest.mark.parametrize("reason", ["EMFILE", "ENOSPC"])
def test_no_segment_is_to_be_had(pair, monkeypatch, reason):
    """Without a descriptor or room on the disk, the payload is streamed."""

    def refuse(nbytes):
        raise OSError(getattr(errno, reason), reason)

    monkeypatch.setattr(_memory, "create_segment", refuse)
    assert pair.here.outgoing.acquire(MIB) is None


@pytest.mark.parametrize("way", ["memfd", "syscall", "file", "stream"])
def test_every_way(way, monkeypatch):
    """Payloads travel in segments of every kind; ``stream`` keeps them out."""
    monkeypatch.setenv("ASYNCLAM_SEGMENTS", way)
    _memory._forget()
    pair = Pair()
    try:
        if way == "stream":
            assert pair.here.outgoing.acquire(MIB) is None
        else:
            assert pair.send(b"a" * MIB) == b"a" * MIB
    finally:
        pair.close()
        monkeypatch.undo()
        _memory._forget()


def test_closing_pulls_no_memory(pair):
    """When the channel is gone, what was received stays readable until it is dropped."""
    view = pair.send(b"a" * MIB)
    pair.close()
    pair.close()
    assert view == b"a" * MIB
    view[:1] = b"b"


def test_closing_before_the_send(pair):
    """A lease that was never sent leaves nothing."""
    pair.lease(b"a" * MIB)


RECORD = struct.Struct("<IIQQ")


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"x" * 25,
        RECORD.pack(5, 0, 10, 4096),  # not known
        RECORD.pack(1, 0, 10, MIB),  # looked into
        RECORD.pack(1, 1, 10, MIB),  # known, but said to be new
        RECORD.pack(2, 0, 10, 4096),  # known with another capacity
        RECORD.pack(2, 0, MIB + 1, MIB),  # too long
        RECORD.pack(2, 0, 0, MIB),  # empty
        RECORD.pack(3, 1, 10, 4096),  # new, without a descriptor
        RECORD.pack(3, 2, 10, 4096),  # given, and not new
        RECORD.pack(2, 4, 10, MIB),  # unknown flag
    ],
)
def test_records_without_sense(pair, record):
    """What the peer says is checked before memory is touched."""
    view = pair.send(b"a" * MIB)
    pair.send(b"b" * MIB)
    pair.exchange_notes()
    with pytest.raises(_wire.ProtocolError):
        pair.there.incoming.open(record, [])
    assert view == b"a" * MIB


def test_a_segment_that_is_too_small(pair):
    """To look behind the end of a file would be SIGBUS: it is refused, and closed."""
    descriptor = _memory.create_segment(4096)
    with pytest.raises(_wire.ProtocolError, match="smaller"):
        pair.there.incoming.open(RECORD.pack(1, 1, 5000, 8192), [descriptor])


@pytest.mark.parametrize(
    "note", [1, 7, 1 | 1 << 30, 1 | 2 << 30, 7 | 2 << 30], ids=["free", "unknown", *"abc"]
)
def test_notes_without_sense(pair, note):
    """Releasing what is not in use, or dropping what is, is garbage."""
    view = pair.send(b"a" * MIB)
    del view
    pair.exchange_notes()
    with pytest.raises(_wire.ProtocolError):
        pair.here.noted(struct.pack("<II", 1, note))


def test_notes_that_are_cut_off(pair):
    """A count that is larger than the frame is garbage."""
    for body in (b"", b"\x01\0\0\0", b"\xff\xff\xff\xff" + bytes(100)):
        with pytest.raises(_wire.ProtocolError):
            pair.here.noted(body)


def test_copying_in_takes_turns():
    """A slice is 1 MiB at most, whatever the parts are."""
    parts = [b"a" * 10, b"b" * (2 * MIB), memoryview(b"c" * MIB), bytearray(b"d" * 10)]
    view = memoryview(bytearray(sum(map(len, parts))))
    steps = _segments.copy_in(view, parts)
    next(steps)
    assert view[: MIB + 1] == b"a" * 10 + b"b" * (MIB - 10) + b"\0"
    assert sum(1 for _ in steps) == 2
    assert view == b"".join(parts)


def test_size_classes():
    """A segment is a quarter larger than what it is made for, at most, and never smaller."""
    for nbytes in [*range(1, 70_000, 77), MIB, MIB + 1, 10 * MIB + 1]:
        capacity = _segments._size_class(nbytes)
        assert nbytes <= capacity <= max(nbytes * 1.25, nbytes + 4096)
        assert capacity % os.sysconf("SC_PAGE_SIZE") == 0
        assert _segments._size_class(capacity) == capacity


def test_the_share_of_lambda(monkeypatch):
    """What is kept follows the memory of the function; the maps follow the limit of descriptors."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1600")
    assert _segments.Share().nbytes == 100 * MIB
    assert _segments.Share(parts=2).nbytes == 50 * MIB
    monkeypatch.delenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE")
    assert 0 < _segments.Share().nbytes <= os.sysconf("SC_PHYS_PAGES") * 4096 // 16
    if sys.version_info < (3, 13):
        monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
        assert _segments.Share().most_maps == 256


class Traffic(RuleBasedStateMachine):
    """Whatever is sent, held, dropped and lost: no view changes, and everything stays bounded."""

    held = Bundle("held")

    def __init__(self):
        super().__init__()
        self.before = descriptors(), mapped()
        self.pair = Pair(nbytes=200_000, most_maps=12)
        self.views = {}
        self.count = 0

    def content(self, nbytes):
        self.count += 1
        return struct.pack("<I", self.count) * (nbytes // 4 + 1)

    @rule(target=held, nbytes=st.integers(0, 100_000))
    def send(self, nbytes):
        content = self.content(nbytes)
        view, must_copy = self.pair.deliver(self.pair.lease(content))
        self.views[self.count] = bytearray(view) if must_copy else view, content
        return self.count

    @rule(nbytes=st.integers(0, 100_000))
    def lose(self, nbytes):
        try:
            self.pair.deliver(self.pair.lease(self.content(nbytes)), lost=True)
        except OSError:
            return

    @rule(nbytes=st.integers(0, 100_000))
    def cancel(self, nbytes):
        self.pair.here.outgoing.cancel(self.pair.lease(self.content(nbytes)))

    @rule(name=consumes(held))
    def drop(self, name):
        self.views.pop(name, None)

    @rule()
    def exchange(self):
        self.pair.exchange_notes()

    @rule()
    def reconnect(self):
        self.pair.close()
        self.pair.here, self.pair.there = (_segments.End(self.pair.share) for _ in range(2))

    @invariant()
    def nothing_changes(self):
        for view, content in self.views.values():
            assert view == content

    @invariant()
    def bounded(self):
        outgoing = self.pair.here.outgoing
        assert len(outgoing) <= 16
        assert outgoing.nbytes <= 200_000
        kept = [*outgoing._free.values(), *outgoing._out.values()]
        assert outgoing.nbytes == sum(segment.capacity for segment in kept)
        assert self.pair.share.maps <= 12 + 1 + 16
        # What is cancelled before it was ever sent keeps its descriptor, for the next.
        assert descriptors() - self.before[0] <= self.pair.share.maps + 2 * len(kept)

    def teardown(self):
        self.pair.close()
        self.views.clear()
        gc.collect()
        assert (descriptors(), mapped()) == self.before


Traffic.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_traffic = Traffic.TestCase


def test_a_fork_may_look_for_longer(pair):
    """What was out when the process forked is dropped, not used again: the child may look into it."""
    view = pair.send(b"x" * (MIB // 2))
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    del view
    pair.exchange_notes()
    assert (len(pair.there.incoming), len(pair.here.outgoing)) == (0, 0)
    pair.send(b"y" * (MIB // 2))
    pair.exchange_notes()
    assert (len(pair.there.incoming), len(pair.here.outgoing)) == (1, 1), "as always"


def test_a_quarter_of_the_maps_where_they_cost_no_descriptor(monkeypatch):
    """From Python 3.13 it is the system's limit of maps that counts, not that of descriptors."""
    monkeypatch.setattr(_segments, "sys", types.SimpleNamespace(version_info=(3, 13)))
    assert _segments._most_maps() == 65_530 // 4


def test_a_lease_that_is_cancelled_after_the_end_is_closed(pair):
    """The segment is gone already, and does not come back."""
    lease = pair.lease(b"x" * MIB)
    pair.here.close()
    pair.here.outgoing.cancel(lease)
    assert len(pair.here.outgoing) == 0
