"""Large payloads in shared memory: which segments each end of a channel has, and who may write to them.

Theory of operation. Fresh memory is the cost, not the copy: the first write to a new segment takes
eight times as long as the second. So a segment is used again, and both ends keep it mapped.

    sender:    free ──acquire──► out ──RELEASED──► free        given: sent, and forgotten
    receiver:             open ──► looked into ──► idle (and the RELEASED is due)

A segment belongs to the end that made it, the *outgoing* one; only that writes into it, and only
between :meth:`Outgoing.acquire` and the send. Its descriptor goes with the first frame that names it
and is closed here then; later frames name its id. The *incoming* end maps it, and unpickled objects
look into it, for as long as the user keeps them. That nothing does any more is read from the
reference count of the map when the next frame is about to be sent, and told in it. A frame that
needs no segment takes these notes along, too. So there is no message for a release, and no finaliser.

Ends are bounded in number and bytes of the segments that they make. What would exceed the bounds is
*given away*: the receiver alone has it, and it is gone with the last view there. The receiver, too,
is bounded, in the maps that users' objects keep alive: above that, :meth:`Incoming.open` says that
the contents are to be copied out, which the loader of the payload does.

Ids are never used again, so that no note can mean another segment than it was written for; they may
arrive in another order than they were given, as some payloads take longer to copy. A note or record that makes no sense is a ProtocolError: the peer is not to be believed.

When the channel is gone, both ends drop what they have. Memory stays where something looks into it.
A process that is forked from either end looks into what is out at that moment, for as long as it
likes; so what was out at a fork is never written again, but dropped (LOST) when it is released.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import weakref
from collections.abc import Iterator, Sequence

from . import _memory, _sizing, _wire

_MOST = 16  # segments that one end keeps; more than a channel ever has on their way
_SLICE = 1 << 20  # bytes that are copied before others have a turn: 0.1 to 0.5 ms

_RECORD = struct.Struct("<IIQQ")  # id, flags, length, capacity
RECORD_SIZE = _RECORD.size
_NEW = 1  # its descriptor is the last one of this frame
_GIVEN = 2  # the receiver alone has it

# Notes are ids with a meaning in the highest bits.
_RELEASED = 0  # nothing looks into your segment any more
_LOST = 1 << 30  # I do not have your segment: drop it
_FORGET = 2 << 30  # I have dropped my segment
_MEANING = 3 << 30
_ALIGNMENT = 16  # bytes; what follows the notes may be arrays


class Share:
    """What the ends of one process may keep, together.

    Args:
        parts: by how many processes the memory for it is divided.
    """

    def __init__(self, parts: int = 1) -> None:
        # A sixteenth of the memory for the loop process, and one for all workers together.
        self.nbytes = _sizing.memory() // 16 // parts
        self.most_maps = _most_maps()
        self._maps: set[weakref.ref[_memory.Map]] = set()
        self._ends: weakref.WeakSet[Outgoing] = weakref.WeakSet()

    @property
    def retained(self) -> int:
        """Bytes of the segments that the outgoing ends keep."""
        return sum(end.nbytes for end in self._ends)

    @property
    def maps(self) -> int:
        """How many received segments are mapped."""
        return len(self._maps)

    def count(self, received: _memory.Map) -> None:
        """Counts a map for as long as it lives."""
        # The callback may run in any thread; discard is atomic there, a counter would not be.
        self._maps.add(weakref.ref(received, self._maps.discard))

    def join(self, end: Outgoing) -> None:
        """Counts what an outgoing end retains."""
        self._ends.add(end)


def _most_maps() -> int:
    """How many received segments may be mapped: a quarter of what the system allows."""
    if sys.version_info >= (3, 13):
        return 65_530 // 4  # vm.max_map_count; a map needs no descriptor
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 65_530 // 4 if soft == resource.RLIM_INFINITY else min(soft, 65_530) // 4


class Lease:
    """A segment of this end, for one payload.

    Attributes:
        view: where the payload goes, exactly as long as it is.
        record: what the frame says in its place.
        descriptors: what travels with the frame, after the descriptors of the payload.
    """

    __slots__ = ("descriptors", "record", "segment", "view")

    def __init__(self, segment: _Segment, nbytes: int) -> None:
        self.segment = segment
        self.view = memoryview(segment.map)[:nbytes]
        flags = (_NEW if segment.descriptor >= 0 else 0) | (_GIVEN if segment.given else 0)
        self.record = _RECORD.pack(segment.id, flags, nbytes, segment.capacity)
        self.descriptors = [segment.descriptor] if segment.descriptor >= 0 else []


class _Segment:
    """A segment that this end has made. The descriptor is -1 once the peer has it."""

    __slots__ = ("capacity", "descriptor", "given", "id", "map")

    def __init__(self, number: int, descriptor: int, capacity: int, *, given: bool) -> None:
        self.id, self.descriptor, self.capacity, self.given = number, descriptor, capacity, given
        self.map = _memory.map_descriptor(descriptor, capacity)

    def close_descriptor(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Outgoing:
    """The segments that this end has made."""

    def __init__(self, share: Share) -> None:
        self.nbytes = 0  # of those that are kept
        self._share = share
        self._free: dict[int, _Segment] = {}  # by id, that longest unused first
        self._out: dict[int, _Segment] = {}  # leased, or the peer may look into them
        self._leased: dict[int, _Segment] = {}  # given ones, until they are sent
        self._forgotten: list[int] = []  # notes that are due
        self._last = 0  # id
        share.join(self)

    def __len__(self) -> int:
        """How many segments it keeps."""
        return len(self._free) + len(self._out)

    @property
    def in_use(self) -> int:
        """How many are on their way, or the peer may look into."""
        return len(self._out) + len(self._leased)

    def acquire(self, nbytes: int) -> Lease | None:
        """A segment for a payload of ``nbytes``, more than 0; ``None``: send it in the frame.

        To be followed by :meth:`sent` or :meth:`cancel`.

        Raises:
            ValueError: ``ASYNCLAM_SEGMENTS`` names no way that there is.
        """
        if _memory.are_payloads_streamed():
            return None
        capacity = _size_class(nbytes)
        segment = self._fitting(nbytes, 2 * capacity)
        if segment is None:
            try:
                segment = self._create(nbytes, capacity)
            except OSError:  # no descriptor, disk or memory map is left: the stream needs none
                return None
        else:
            del self._free[segment.id]
        (self._leased if segment.given else self._out)[segment.id] = segment
        return Lease(segment, nbytes)

    def _fitting(self, least: int, most: int) -> _Segment | None:
        fitting = [free for free in self._free.values() if least <= free.capacity <= most]
        return min(fitting, key=lambda free: free.capacity, default=None)

    def _create(self, nbytes: int, capacity: int) -> _Segment:
        given = not self._make_room(capacity)
        if given:
            capacity = -(-nbytes // _PAGE) * _PAGE
        descriptor = _memory.create_segment(capacity)
        try:
            segment = _Segment(self._last + 1, descriptor, capacity, given=given)
        except OSError:
            os.close(descriptor)
            raise
        self._last += 1
        if not given:
            self.nbytes += capacity
        return segment

    def _make_room(self, capacity: int) -> bool:
        """Whether the bounds allow another segment, now that free ones have made way for it."""
        others = self._share.retained - self.nbytes
        in_use = sum(segment.capacity for segment in self._out.values())
        if len(self._out) >= _MOST or others + in_use + capacity > self._share.nbytes:
            return False
        while len(self) >= _MOST or others + self.nbytes + capacity > self._share.nbytes:
            self._discard(self._free.pop(next(iter(self._free))))
        return True

    def _discard(self, segment: _Segment) -> None:
        self.nbytes -= segment.capacity
        if segment.descriptor < 0:
            self._forgotten.append(segment.id | _FORGET)
        segment.close_descriptor()

    def sent(self, lease: Lease) -> None:
        """The frame has been handed over to the kernel, at least its first byte."""
        lease.view = _NOTHING  # the map must be able to die
        lease.descriptors = []
        lease.segment.close_descriptor()
        self._leased.pop(lease.segment.id, None)

    def cancel(self, lease: Lease) -> None:
        """Nothing of the frame was sent, and nothing of it will be."""
        segment = lease.segment
        lease.view = _NOTHING
        lease.descriptors = []
        if self._leased.pop(segment.id, None):
            segment.close_descriptor()
        elif self._out.pop(segment.id, None):
            self._free[segment.id] = segment

    def reclaim(self, number: int, *, lost: bool) -> None:
        """The peer does not look into this segment any more, or has never had it.

        Raises:
            ProtocolError: it is not out.
        """
        segment = self._out.get(number)
        if segment is None or segment.descriptor >= 0:
            raise _wire.ProtocolError(f"segment {number} is released, and was not in use")
        del self._out[number]
        if lost:
            self.nbytes -= segment.capacity
        else:
            self._free[number] = segment

    def forgotten(self) -> list[int]:
        """Notes: which segments are no more. They are due once."""
        notes, self._forgotten = self._forgotten, []
        return notes

    def close(self) -> None:
        """Drops all segments; where the peer looks into them, they live on."""
        for segments in (self._free, self._out, self._leased):
            for segment in segments.values():
                segment.close_descriptor()
            segments.clear()
        self._forgotten = []
        self.nbytes = 0


_PAGE = os.sysconf("SC_PAGE_SIZE")
_NOTHING = memoryview(b"")


def _size_class(nbytes: int) -> int:
    """The least capacity of a segment for so much: four classes between powers of two, in pages."""
    step = max(_PAGE, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return -(-nbytes // step) * step


class Incoming:
    """The segments of the peer that are mapped here."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._out: dict[int, _memory.Map] = {}  # by id: something may look into them
        self._forks: dict[int, int] = {}  # of this process, until each of these came
        self._idle: dict[int, _memory.Map] = {}  # released
        self._lost: list[int] = []  # notes that are due

    def __len__(self) -> int:
        """How many segments it keeps."""
        return len(self._out) + len(self._idle)

    @property
    def in_use(self) -> int:
        """How many something looked into when that was last to be told."""
        return len(self._out)

    def open(self, record: _wire.Part, descriptors: list[int] | None) -> tuple[memoryview, bool]:
        """The payload that a record names.

        Args:
            record: what the frame says in the payload's place.
            descriptors: those of the frame; that of the segment is taken off the list and closed.

        Returns:
            Exactly the payload, writable, and whether it must be copied out before it is given to
            the user, because this process has too many segments mapped.

        Raises:
            ProtocolError: the record makes no sense.
            OSError: the segment could not be received or mapped, the limit of open descriptors is
                the usual reason. It is lost; what follows is unharmed.
        """
        number, flags, length, capacity = _unpack(record)
        if flags & _NEW:
            received = self._receive(number, flags, capacity, descriptors)
        elif number in self._idle and length <= len(self._idle[number]) == capacity:
            received = self._idle.pop(number)
        else:
            raise _wire.ProtocolError(f"segment {number} is not one that can be written to")
        if not flags & _GIVEN:
            self._out[number] = received
            self._forks[number] = _forks
        return memoryview(received)[:length], self._share.maps > self._share.most_maps

    def _receive(
        self, number: int, flags: int, capacity: int, descriptors: list[int] | None
    ) -> _memory.Map:
        if number in self._out or number in self._idle or descriptors == []:
            raise _wire.ProtocolError(f"segment {number} is not new, or came without descriptor")
        try:
            if descriptors is None:
                raise OSError(
                    errno.EMFILE,
                    "a payload was lost, this process is at its limit of open descriptors; "
                    "raise it (ulimit -n), or keep less open",
                )
            received = _map(descriptors.pop(), capacity)
        except OSError:
            if not flags & _GIVEN:
                self._lost.append(number | _LOST)
            raise
        self._share.count(received)
        return received

    def released(self) -> list[int]:
        """Notes: into which segments nothing looks any more. They are due once."""
        notes, self._lost = self._lost, []
        if not self._out:
            return notes
        unseen = [number for number in self._out if not _is_looked_into(self._out, number)]
        for number in unseen:
            received = self._out.pop(number)
            is_inherited = self._forks.pop(number) != _forks  # a child may look into it
            if is_inherited or self._share.maps > self._share.most_maps:
                notes.append(number | _LOST)
            else:
                self._idle[number] = received
                notes.append(number | _RELEASED)
        return notes

    def forget(self, number: int) -> None:
        """The peer has dropped this segment.

        Raises:
            ProtocolError: it was not released.
        """
        if self._idle.pop(number, None) is None:
            raise _wire.ProtocolError(f"segment {number} is dropped, and was not released")

    def close(self) -> None:
        """Drops all maps; those that something looks into live on until nothing does."""
        self._out.clear()
        self._forks.clear()
        self._idle.clear()
        self._lost = []


def _unpack(record: _wire.Part) -> tuple[int, int, int, int]:
    try:
        number, flags, length, capacity = _RECORD.unpack(record)
    except struct.error:
        raise _wire.ProtocolError(f"{len(record)} bytes are no record of a segment") from None
    if not 0 < length <= capacity or flags & ~(_NEW | _GIVEN) or flags == _GIVEN:
        raise _wire.ProtocolError(f"segment {number}: {length} bytes of {capacity}, flags {flags}")
    return number, flags, length, capacity


def _map(descriptor: int, capacity: int) -> _memory.Map:
    try:
        # To look behind the end of a file is SIGBUS.
        if os.fstat(descriptor).st_size < capacity:
            raise _wire.ProtocolError("a segment is smaller than its record says")
        return _memory.map_descriptor(descriptor, capacity)
    finally:
        os.close(descriptor)


def _is_looked_into(maps: dict[int, _memory.Map], number: int) -> bool:
    # Every view of a map, through whatever object, ends at one reference to the map. A weak
    # reference to a view would not do: NumPy drops the view, and keeps what is behind it.
    return sys.getrefcount(maps[number]) > _UNSEEN


_probe = {0: object()}
_UNSEEN = sys.getrefcount(_probe[0])  # that of the dictionary, and what the call itself adds


_forks = 0  # how often this process has forked


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_parent=_count_fork)


class End:
    """Both directions of one end of a channel, and the notes between them."""

    __slots__ = ("incoming", "outgoing")

    def __init__(self, share: Share) -> None:
        self.outgoing = Outgoing(share)
        self.incoming = Incoming(share)

    @property
    def in_use(self) -> int:
        """How many segments something looks into, on either side, as far as this end was told."""
        return self.outgoing.in_use + self.incoming.in_use

    def notes(self) -> bytes:
        """What the next frame has to begin with, flagged ``_wire.RELEASES``; empty if nothing is due.

        Only for a frame that will be sent: a note is given once.
        """
        notes = self.incoming.released() + self.outgoing.forgotten()
        if not notes:
            return b""
        packed = struct.pack(f"<I{len(notes)}I", len(notes), *notes)
        return packed + bytes(-len(packed) % _ALIGNMENT)

    def noted(self, body: _wire.Part) -> memoryview:
        """Acts on the notes at the beginning of a received body; returns what follows them.

        Raises:
            ProtocolError: they make no sense.
        """
        try:
            (count,) = struct.unpack_from("<I", body)
            notes = struct.unpack_from(f"<{count}I", body, 4)
        except struct.error:
            raise _wire.ProtocolError("the notes of a frame are cut off") from None
        for note in notes:
            number, meaning = note & ~_MEANING, note & _MEANING
            if meaning == _FORGET:
                self.incoming.forget(number)
            else:
                self.outgoing.reclaim(number, lost=meaning == _LOST)
        end = 4 + 4 * count
        return memoryview(body)[end + -end % _ALIGNMENT :]

    def close(self) -> None:
        """Drops everything, and pulls no memory from under a view. Closing twice does nothing."""
        self.outgoing.close()
        self.incoming.close()


def copy_in(view: memoryview, parts: Sequence[_wire.Part]) -> Iterator[None]:
    """Copies the parts of a payload into a segment, 1 MiB between one ``next()`` and the following.

    The parts must be as long, together, as the view.
    """
    position, room = 0, _SLICE
    for part in parts:
        source = memoryview(part)
        start = 0
        while start < len(source):
            end = min(len(source), start + room)
            view[position : position + end - start] = source[start:end]
            position += end - start
            room -= end - start
            start = end
            if not room:
                yield
                room = _SLICE
