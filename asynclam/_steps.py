"""Large payloads, dumped and loaded in steps between which the event loop has its turn.

Theory of operation. A pickler, and its memo, persists over many dumps, and an unpickler over as many
loads; the pickles lie one behind the other. They are what one pickle would have been, cut into pieces
and in the same order, because what is unpickled may look at what it is given (``__setstate__``,
``__hash__``, what ``__reduce__`` names) and must find it as full as pickle would have it: a large list,
dictionary or set is made empty; then come its items, piece by piece, which are added to it by the
thousand, as pickle does; where one of them is itself to be divided, it is made and filled before the
next item comes; last comes the object itself. The memo knows a container from the moment at which it
is made, so wherever it is met after that it is a reference. What is met before, in an instance's
attribute say, is dumped whole there, and is a reference afterwards. Identity, sharing and cycles
survive, as in one pickle. Bytes, which pickle would copy into the pickle and out again, are set aside
and copied once on each side; they come first of all, since they cannot be half full.

Its limits. Large objects are found in a bounded walk through exact lists, tuples, dictionaries and
sets: what is first met in an instance's attributes, a large tuple, and what a single ``__reduce__``
gives, goes in one go. A container that changes its size while it is dumped is an error; one that
changes otherwise is dumped as it is found. The memo cannot be divided: it holds what may be shared (no
numbers), grows by doubling, and is dropped at once; steps of 50 ms for a million objects. So grows a
dictionary or set that is loaded.
"""

from __future__ import annotations

import _pickle as pickle
import collections
import gc
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from time import perf_counter
from typing import Any

from . import _memory, _payload, _wire
from ._memory import travel


def run(steps: Generator[None, None, Any]) -> Any:
    """Takes all steps at once: a worker has nothing else to do."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


# --- what is large -------------------------------------------------------------------------------

LARGE_BYTES = 256 * 1024  # what is longer is set aside: the C pickler would copy it, twice
_LARGE_GRAPH = 20_000  # objects, some 5 ms
_LARGE_CONTAINER = 1_000  # objects under one container, which is divided above this
_PIECE_GRAPH = 10_000  # objects, by that estimate, that are dumped in one piece at most
# How many containers are looked into, how many items of each, and how many in all.
_GLANCE = (6, 4, 20)  # some 5 us, for a call that has containers in containers
_LOOK = (300, 256, 10_000)  # 1 ms

_BLOBS = frozenset((bytes, bytearray))
_CONTAINERS = frozenset((list, tuple, dict, set, frozenset))
_WATCHED = _BLOBS | _CONTAINERS
_DIVISIBLE = frozenset((list, dict, set))


def is_large(*values: Any) -> bool:
    """Whether to dump these in steps: it takes more than some milliseconds, or there are large bytes.

    As fast as can be where the values are neither bytes nor containers: 0.1 us, some 0.5 us for a
    container of plain values. It looks at samples, and may be wrong about mixed contents.
    """
    for value in values:
        kind = type(value)
        if kind in _WATCHED and len(value) and _is_large(kind, value):
            return True
    return False


def _is_large(kind: type, value: Any) -> bool:
    if kind in _BLOBS:
        return len(value) >= LARGE_BYTES
    if len(value) > _LARGE_GRAPH:
        return True
    some = itertools.islice(value.values() if kind is dict else value, _GLANCE[1])
    return not _WATCHED.isdisjoint(map(type, some)) and bool(_Survey(value, *_GLANCE))


class _Survey:
    """What is large in an object, as far as it was looked at.

    Args:
        root: the object.
        most: how many containers to look into.
        items: at how many items of each.
        looks: and at how many in all.

    Attributes:
        divided: by their ids, the containers to divide, each with the most items to dump at once; and
            the tuples on the way to them.
        blobs: large bytes and bytearrays.
    """

    __slots__ = ("_above", "_found", "_most", "_seen", "blobs", "divided")

    def __init__(self, root: Any, most: int, items: int, looks: int) -> None:
        self.divided: dict[int, tuple[Any, int]] = {}
        self.blobs: list[bytes | bytearray] = []
        self._most = most
        self._seen: set[int] = set()
        self._found: list[Any] = []
        self._above: list[int] = []  # for each container found, the index of that which it is in
        self._look_at(root, 0)
        looked: list[int] = []  # at so many items of each
        for index, container in enumerate(self._found):
            values = container.values() if type(container) is dict else container
            # As a list, at once: other threads may change the container.
            some = list(itertools.islice(values, min(items, looks)))
            looks -= len(some)
            looked.append(len(some))
            for item in some:
                if type(item) in _WATCHED:
                    self._look_at(item, index)
        if self._found:
            self._divide(_weigh(self._found, self._above, looked))

    def _look_at(self, item: Any, index: int) -> None:
        if id(item) in self._seen:
            return
        if type(item) in _BLOBS:
            if len(item) >= LARGE_BYTES:
                self._seen.add(id(item))
                self.blobs.append(item)
        elif type(item) in _CONTAINERS and item and len(self._found) < self._most:
            self._seen.add(id(item))
            self._found.append(item)
            self._above.append(index)

    def _divide(self, weights: list[float]) -> None:
        if weights[0] <= _LARGE_GRAPH:
            return
        on_the_way = set()
        for index in range(len(weights) - 1, -1, -1):  # inner ones first
            container, weight = self._found[index], weights[index]
            is_divisible = type(container) in _DIVISIBLE and weight > _LARGE_CONTAINER
            if is_divisible or index in on_the_way:
                most = max(1, int(_PIECE_GRAPH * len(container) / weight))
                self.divided[id(container)] = container, most
                on_the_way.add(self._above[index])

    def __bool__(self) -> bool:
        return bool(self.divided or self.blobs)


def _weigh(found: list[Any], above: list[int], looked: list[int]) -> list[float]:
    """How many objects there are in each container, by those of its items that were looked at."""
    below = [0.0] * len(found)
    weights = [0.0] * len(found)
    for index in range(len(found) - 1, -1, -1):
        length = len(found[index])
        weights[index] = length + below[index] * length / max(1, looked[index])
        if index:
            below[above[index]] += weights[index]
    return weights


# --- dumping in steps ----------------------------------------------------------------------------

_STEP = 0.001  # seconds that a step aims at
_PIECE = 0.3  # of a step is a piece: to load one takes up to three times as long as to dump it
_STEP_BYTES = 1 << 20  # and what it may dump: loading copies large bytes, dumping does not
_FIRST = 64  # items of the first piece
_BATCH = 1_000  # items that pickle adds to a container together: what is unpickled may see it grow
# Pickles of an empty container that is in the memo, and of None.
_MADE: dict[type, bytes] = {
    list: b"\x80\x05]\x94.",
    dict: b"\x80\x05}\x94.",
    set: b"\x80\x05\x8f\x94.",
}
_FILLED = b"\x80\x05N."
_SMALL_MEMO = 16 * 1024  # bytes of pickles, whose memo is copied in 1 ms at most


class ChangedError(RuntimeError):
    """A container changed its size while it was dumped, between two steps."""


def dump_steps(
    obj: object, *, main_is_shared: bool = True, by_value: bool = False
) -> Generator[None, None, _payload.Payload]:
    """Pickles ``obj`` as :func:`dumps` does, 1 ms or so at a time; the payload is the value returned.

    Until it has ended, ``obj`` should not be changed.

    Args:
        obj: the object.
        main_is_shared: whether a name in ``__main__`` means the same in the other process.
        by_value: whether to begin with cloudpickle, as :func:`dumps_by_value` does.

    Raises:
        ChangedError: a container changed its size meanwhile.
        Exception: whatever pickle raised, where cloudpickle failed too; nothing else is left.
    """
    refused: Exception | None = None
    if not by_value:
        try:
            return (yield from _dump_steps(obj, _Pickler, main_is_shared=main_is_shared))
        except ChangedError:
            raise
        except Exception as error:
            refused = error
    import cloudpickle

    try:
        return (yield from _dump_steps(obj, cloudpickle.Pickler, main_is_shared=True))
    except ChangedError:
        raise
    except Exception:
        if refused is None:
            raise
        raise refused from None


class _Pickler(pickle.Pickler):
    """One whose ``persistent_id`` can be set, in all versions of Python."""


class _MetError(Exception):
    """A container was not in the memo: the pickler has come to its items."""


class _Dump:
    """A pickler that persists, and what it has written and set aside."""

    def __init__(self, make: Callable[..., pickle.Pickler], *, main_is_shared: bool) -> None:
        self.descriptors: list[int] = []
        self.parts: list[_wire.Part] = []
        self.buffers: list[memoryview] = []
        self._main_is_shared = main_is_shared
        self._pickled = 0  # bytes
        self.pickler: Any = make(self, protocol=5, buffer_callback=self._set_aside)

    def write(self, part: Any) -> None:
        """What the pickler calls: a frame of 64 KiB, or the very object where that is larger."""
        # As a memoryview a bytearray keeps the length that the pickler has written down.
        self.parts.append(part if type(part) is bytes else memoryview(part))

    def _set_aside(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _payload.ASIDE:
            return True
        self.buffers.append(raw)
        return False

    def dump(self, obj: object) -> int:
        """Dumps one more object; returns how many bytes that took."""
        written, aside = len(self.parts), len(self.buffers)
        # Only now: between the steps, this thread may pickle something else.
        travel.outgoing = self.descriptors
        try:
            self.pickler.dump(obj)
        except GeneratorExit as error:  # the user's: that of a cancel comes between the steps
            raise pickle.PicklingError("it raised GeneratorExit") from error
        finally:
            travel.outgoing = None
        if len(self.descriptors) > _payload.MOST_DESCRIPTORS:
            raise _payload.too_many(self.descriptors)
        parts = self.parts[written:]
        if not self._main_is_shared and any(
            type(part) is bytes and b"__main__" in part for part in parts
        ):
            raise pickle.PicklingError("it names something in __main__")
        nbytes = sum(map(len, parts))
        self._pickled += nbytes
        return nbytes + sum(map(len, self.buffers[aside:]))

    def place(self, blobs: list[bytes | bytearray]) -> None:
        """Dumps large bytes: all references to them are to what is first in the payload."""
        placeholders = list(map(_Blob, blobs))
        self.dump(placeholders)
        memo = self.pickler.memo.copy()
        for placeholder, blob in zip(placeholders, blobs, strict=True):
            index, _ = memo.pop(id(placeholder))
            memo[id(blob)] = index, blob
        self.pickler.memo = memo

    def make(self, container: Any) -> bool:
        """Lets it be made, empty, unless the memo knows it already; returns whether it did."""
        enter = self._enter if self._pickled < _SMALL_MEMO else self._enter_large
        if not enter(container):
            return False
        self.parts.append(_MADE[type(container)])
        return True

    def _enter(self, container: Any) -> bool:
        memo = self.pickler.memo.copy()
        if id(container) in memo:
            return False
        memo[id(container)] = len(memo), container
        self.pickler.memo = memo
        return True

    def _enter_large(self, container: Any) -> bool:
        """To copy a large memo would take long, so the pickler is stopped once it has made its entry.

        From then on it asks a function for each object, which makes it slower by a fifth.
        """
        calls = iter((1, 2))  # for the tuple, and the container

        def twice(_: object) -> None:
            if not next(calls, 0):
                raise _MetError

        self.pickler.persistent_id = twice
        try:
            self.dump((container,))  # as a tuple, of which there may be too many
        except _MetError:
            return True
        finally:
            self.pickler.persistent_id = _nothing
        return False

    def filled(self) -> None:
        """That which was made last has all its items."""
        self.parts.append(_FILLED)

    def payload(self, blobs: list[bytes | bytearray]) -> _payload.Payload:
        """All of it, when the last object was dumped."""
        contents: _payload.Contents = [(_payload.PICKLE, self.parts)]
        for index, buffer in enumerate(self.buffers):
            # Those of the placeholders were set aside first, all of them: LARGE_BYTES > ASIDE.
            kind = _payload.VIEW
            if index < len(blobs):
                kind = _payload.BYTES if type(blobs[index]) is bytes else _payload.BYTEARRAY
            contents.append((kind, [buffer]))
        return _payload.Payload(
            _payload.lay_out(contents), _wire.BUFFERS | _wire.PIECES, self.descriptors
        )


_nothing = collections.deque[object](maxlen=0).append  # the fastest function that returns None


class _Blob:
    """Stands for large bytes: pickled, it is the buffer of them, which is set aside."""

    __slots__ = ("_blob",)

    def __init__(self, blob: bytes | bytearray) -> None:
        self._blob = blob

    def __reduce__(self) -> tuple[object, ...]:
        return _same, (pickle.PickleBuffer(self._blob),)


def _same(blob: object) -> object:
    # A buffer alone has no entry in the memo, what a function returned has.
    return blob


def _dump_steps(
    obj: object, make: Callable[..., pickle.Pickler], *, main_is_shared: bool
) -> Generator[None, None, _payload.Payload]:
    survey = _Survey(obj, *_LOOK)
    dump = _Dump(make, main_is_shared=main_is_shared)
    try:
        dump.place(survey.blobs)
        pace = _Pace()
        for piece in _pieces(obj, survey.divided, pace, dump):
            pace.begin()
            nbytes, items = dump.dump(piece), len(piece)
            if type(piece) is list:
                piece.clear()  # the memo keeps it
            if pace.end(nbytes, items):
                yield
        yield
        dump.dump(obj)
        return dump.payload(survey.blobs)
    except BaseException:
        _wire.close_descriptors(dump.descriptors)
        raise
    finally:
        del dump.pickler  # it refers to the dump, and its memo to all that was dumped


class _Pace:
    """How many items make a step."""

    __slots__ = ("_begun", "_spent", "items")

    def __init__(self) -> None:
        self.items = _FIRST
        self._spent = 0.0  # fraction of a step, since the last one

    def begin(self) -> None:
        self._begun = perf_counter()

    def end(self, nbytes: int, items: int) -> bool:
        """Learns from a piece; returns whether the step is over."""
        spent = max((perf_counter() - self._begun) / _STEP, nbytes / _STEP_BYTES, 1e-3)
        fitting = max(1, int(items * _PIECE / spent))
        if fitting > items:
            # Not more than double: one cheap piece says little about the next, and nothing if short.
            fitting = max(self.items, min(fitting, 2 * items))
        self.items = fitting
        self._spent += spent
        if self._spent < 1 - _PIECE:
            return False
        self._spent = 0.0
        return True


def _pieces(
    obj: Any, divided: dict[int, tuple[Any, int]], pace: _Pace, dump: _Dump
) -> Iterator[Sequence[Any]]:
    """What is to be dumped before ``obj``: pieces, in the order in which pickle would come to them.

    Those of a tuple are tuples: it can only be made when all is there, so they are for the memo.
    """
    filling: list[tuple[Any, Iterator[_Cut]]] = []  # each of them in the one before
    inner = divided.pop(id(obj), None)
    while filling or inner:
        if inner:
            container, most = inner
            if type(container) is tuple or dump.make(container):
                filling.append((container, _cut(_slices(container, most, pace), divided)))
        container, cuts = filling[-1]
        piece, inner = next(cuts, _END)
        if piece:
            yield piece
        elif piece is None:
            filling.pop()
            if type(container) is not tuple:
                dump.filled()


_Cut = tuple[Sequence[Any] | None, tuple[Any, int] | None]
_END: _Cut = (None, None)


def _cut(slices: Iterator[Sequence[Any]], divided: dict[int, tuple[Any, int]]) -> Iterator[_Cut]:
    """The slices of a container, and those of its items that are to be divided, each before it comes."""
    looked = 0
    for piece in slices:
        start = 0
        if (
            divided and looked < 2 * _LOOK[1]
        ):  # those that were found, with the keys of dictionaries
            for index, item in enumerate(piece):
                inner = divided.pop(id(item), None)
                if inner:
                    yield piece[start:index], inner
                    start = index
            looked += len(piece)
        yield piece[start:] if start else piece, None


def _slices(container: Any, most: int, pace: _Pace) -> Iterator[Sequence[Any]]:
    """The items of a container, ``most`` at a time, or as many as the pace says; never of two batches.

    Those of a dictionary are keys and values by turns.
    """
    if type(container) is dict:
        source = itertools.chain.from_iterable(container.items())
        yield from _taken(container, source, 2 * most, 2 * _BATCH, pace)
    elif type(container) is set:
        yield from _taken(container, iter(container), most, _BATCH, pace)
    else:
        yield from _sliced(container, most, pace)


def _taken(
    container: Any, source: Iterator[Any], most: int, batch: int, pace: _Pace
) -> Iterator[list[Any]]:
    taken = 0
    while True:
        try:
            piece = list(itertools.islice(source, min(most, pace.items, batch - taken % batch)))
        except RuntimeError as error:  # what iterators of dictionaries and sets say
            raise _changed(container) from error
        if not piece:
            return
        taken += len(piece)
        yield piece


def _sliced(items: Sequence[Any], most: int, pace: _Pace) -> Iterator[Sequence[Any]]:
    length, start = len(items), 0
    while start < length:
        piece = items[start : start + min(most, pace.items, _BATCH - start % _BATCH)]
        start += len(piece)
        yield piece
        if len(items) != length:
            raise _changed(items)


def _changed(container: object) -> ChangedError:
    return ChangedError(
        f"a {type(container).__name__} changed its size while it was pickled; a large object that "
        "is given away must be left alone until the call has begun: pass a copy"
    )


# --- loading in steps ----------------------------------------------------------------------------

_SLICE = 1 << 20  # bytes that are copied in one go


def load_steps(
    body: bytearray | memoryview,
    flags: int,
    descriptors: list[int] | None,
    *,
    private: bool = False,
) -> Generator[None, None, Any]:
    """Unpickles a payload as :func:`loads` does, 1 ms or so at a time; the object is the value returned.

    Args:
        body: the payload, in the body of a frame or in a segment.
        flags: those of the frame.
        descriptors: those of the payload; what the object takes over is replaced by -1.
        private: whether nothing of the object may look into ``body``: buffers are copied out.

    Raises:
        BaseException: whatever unpickling raises; the caller expects anything.
    """
    if descriptors is None:
        raise _payload.lost()
    if not flags & _wire.BUFFERS:
        return _payload.loads(body, flags, descriptors)
    buffers: list[Any] = []
    (_, pickles), *contents = _payload.split(memoryview(body))
    for kind, view in contents:
        if kind == _payload.VIEW and not private:
            buffers.append(view)
        else:
            buffers.append(
                (yield from _copied(bytes if kind == _payload.BYTES else bytearray, view))
            )
    del contents
    return (yield from _load_pieces(_Source(pickles), buffers, descriptors))


def _copied(
    kind: type[bytes | bytearray], view: memoryview
) -> Generator[None, None, bytes | bytearray]:
    """A private copy, made slice by slice."""
    if len(view) <= _SLICE:
        return kind(view)
    try:
        blank, target = _memory.blank(kind, len(view))
    except ImportError:  # a Python without ctypes
        return kind(view)
    for start in range(0, len(view), _SLICE):
        target[start : start + _SLICE] = view[start : start + _SLICE]
        yield
    return blank


class _Source:
    """The file from which the unpickler reads one pickle after the other."""

    __slots__ = ("_position", "_view")

    def __init__(self, view: memoryview) -> None:
        self._view, self._position = view, 0

    def is_read(self) -> bool:
        """Whether nothing is left."""
        return self._position >= len(self._view)

    def read(self, nbytes: int) -> bytes:
        start = self._position
        self._position = start + nbytes
        return bytes(self._view[start : start + nbytes])

    def readinto(self, buffer: memoryview) -> int:
        start = self._position
        self._position = start + len(buffer)
        rest = self._view[start : start + len(buffer)]
        buffer[: len(rest)] = rest
        return len(rest)

    def readline(self) -> bytes:
        # Of protocol 5, only the names of classes that no module has are lines, in old reduces.
        rest = bytes(self._view[self._position :])
        end = rest.find(b"\n") + 1 or len(rest)
        self._position += end
        return rest[:end]


def _load_pieces(
    source: _Source, buffers: list[Any], descriptors: list[int]
) -> Generator[None, None, Any]:
    unpickler = pickle.Unpickler(source, buffers=buffers)

    def load() -> Any:
        travel.incoming = descriptors
        try:
            return unpickler.load()
        except GeneratorExit as error:  # the user's: that of a cancel comes between the steps
            raise pickle.UnpicklingError("it raised GeneratorExit") from error
        finally:
            travel.incoming = None

    loaded = load()
    if source.is_read():
        return loaded
    no_collection = _NoCollection()
    filling: list[tuple[Any, list[Any]]] = []
    while True:
        with no_collection:
            end = perf_counter() + _STEP
            while True:
                loaded = load()
                if source.is_read():
                    return loaded
                _fill(filling, loaded)
                if perf_counter() > end:
                    break
        yield


def _fill(filling: list[tuple[Any, list[Any]]], loaded: Any) -> None:
    """Does with what was loaded what :func:`_pieces` means by it.

    Args:
        filling: the containers that are being filled, each in the one before, and the items that are
            still to be added, a whole batch of them at once.
        loaded: the next piece.
    """
    if type(loaded) is tuple:
        return  # for the memo
    if loaded is None:
        _add(*filling.pop())
    elif not loaded:
        filling.append((loaded, []))
    else:
        container, items = filling[-1]
        items += loaded
        loaded.clear()  # the memo keeps it
        if len(items) == (2 * _BATCH if type(container) is dict else _BATCH):
            _add(container, items)
            items.clear()


def _add(container: Any, items: list[Any]) -> None:
    if type(container) is list:
        container.extend(items)
    elif type(container) is set:
        container.update(items)
    else:
        container.update(zip(items[::2], items[1::2], strict=True))


class _NoCollection:
    """Keeps the garbage collector from walking, again and again, through what is being loaded.

    Of a million dictionaries that is half of the time of loading, with pauses of 60 ms. What is alive
    at the end counts as old, as if it had been collected (freeze and unfreeze take no time).
    """

    __slots__ = ("_ages", "_enabled")

    def __init__(self) -> None:
        # What the user has frozen stays so. Counted once: that takes time for each frozen object.
        self._ages = gc.get_freeze_count() == 0

    def __enter__(self) -> None:
        self._enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._ages:
            gc.freeze()
            gc.unfreeze()
        if self._enabled:
            gc.enable()
