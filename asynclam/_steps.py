"""Large payloads, dumped and loaded in steps between which the event loop has its turn.

Theory of operation. A pickler, and its memo, persists over several dumps, and an unpickler over as
many loads. First comes a list of placeholders: for each large list, dictionary and set an empty one,
for each large bytes and bytearray a buffer that is set aside. Then the memo is told that these
placeholders *are* the large objects, so wherever one of them is met from here on it is a reference.
Then come the items of the large containers, piece by piece, which the other side adds to the
placeholder; last the object itself. Identity, sharing and cycles survive, as in one pickle. Bytes,
which pickle would copy into the pickle and out again, are copied once on each side.

Its limits. Large objects are found in a bounded walk through exact lists, tuples, dictionaries and
sets: what is only reached through an instance's attributes, a large tuple, and what a single
``__reduce__`` gives, goes in one go. A container that changes its size while it is dumped is an error;
one that changes otherwise is dumped as it is found. The memo cannot be divided: it holds what may be
shared (no numbers), grows by doubling, and is dropped at once; steps of 50 ms for a million objects.
So grows a dictionary or set that is loaded.
"""

from __future__ import annotations

import _pickle as pickle
import gc
import itertools
from collections.abc import Callable, Generator, Iterator
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
        containers: those to divide, outer ones first, each with the most items to dump at once.
        blobs: large bytes and bytearrays.
    """

    __slots__ = ("_above", "_found", "_most", "_seen", "blobs", "containers")

    def __init__(self, root: Any, most: int, items: int, looks: int) -> None:
        self.containers: list[tuple[Any, int]] = []
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
        for container, weight in zip(self._found, weights, strict=True):
            if type(container) in _DIVISIBLE and weight > _LARGE_CONTAINER:
                most = max(1, int(_PIECE_GRAPH * len(container) / weight))
                self.containers.append((container, most))

    def __bool__(self) -> bool:
        return bool(self.containers or self.blobs)


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
            return (yield from _dump_steps(obj, pickle.Pickler, main_is_shared=main_is_shared))
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


class _Dump:
    """A pickler that persists, and what it has written and set aside."""

    def __init__(self, make: Callable[..., pickle.Pickler], *, main_is_shared: bool) -> None:
        self.descriptors: list[int] = []
        self.sections: list[tuple[int, list[_wire.Part]]] = []
        self.buffers: list[memoryview] = []
        self._main_is_shared = main_is_shared
        self.pickler = make(self, protocol=5, buffer_callback=self._set_aside)

    def write(self, part: Any) -> None:
        """What the pickler calls: a frame of 64 KiB, or the very object where that is larger."""
        # As a memoryview a bytearray keeps the length that the pickler has written down.
        self.sections[-1][1].append(part if type(part) is bytes else memoryview(part))

    def _set_aside(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _payload.ASIDE:
            return True
        self.buffers.append(raw)
        return False

    def dump(self, obj: object) -> int:
        """Dumps one more object; returns how many bytes that took."""
        parts: list[_wire.Part] = []
        self.sections.append((_payload.PICKLE, parts))
        aside = len(self.buffers)
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
        if not self._main_is_shared and any(
            type(part) is bytes and b"__main__" in part for part in parts
        ):
            raise pickle.PicklingError("it names something in __main__")
        return sum(map(len, parts)) + sum(map(len, self.buffers[aside:]))

    def place(self, survey: _Survey) -> None:
        """Dumps placeholders, and makes all references to what they stand for references to them."""
        containers = [container for container, _ in survey.containers]
        originals = [*containers, *survey.blobs]
        placeholders: list[Any] = [type(container)() for container in containers]
        placeholders += map(_Blob, survey.blobs)
        self.dump(placeholders)
        memo = self.pickler.memo.copy()
        for placeholder, original in zip(placeholders, originals, strict=True):
            index, _ = memo.pop(id(placeholder))
            memo[id(original)] = index, original
        self.pickler.memo = memo

    def payload(self, blobs: list[bytes | bytearray]) -> _payload.Payload:
        """All of it, when the last object was dumped."""
        contents = self.sections
        for index, buffer in enumerate(self.buffers):
            # Those of the placeholders were set aside first, all of them: LARGE_BYTES > ASIDE.
            kind = _payload.VIEW
            if index < len(blobs):
                kind = _payload.BYTES if type(blobs[index]) is bytes else _payload.BYTEARRAY
            contents.append((kind, [buffer]))
        return _payload.Payload(
            _payload.lay_out(contents), _wire.BUFFERS | _wire.PIECES, self.descriptors
        )


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
        dump.place(survey)
        pace = _Pace()
        # Inner ones first: where a key's hash depends on one, it is full by then.
        for index in range(len(survey.containers) - 1, -1, -1):
            for piece in _pieces(*survey.containers[index], pace):
                pace.begin()
                if pace.end(dump.dump((index, piece)), len(piece)):
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
        # Not more than double: one cheap piece says little about the next.
        self.items = max(1, min(int(items * _PIECE / spent), 2 * items))
        self._spent += spent
        if self._spent < 1 - _PIECE:
            return False
        self._spent = 0.0
        return True


def _pieces(container: Any, most: int, pace: _Pace) -> Iterator[Any]:
    """The items of a container, ``most`` at a time, or as many as the pace says."""
    if type(container) is list:
        yield from _slices(container, most, pace)
        return
    source = iter(container.items() if type(container) is dict else container)
    kind = dict if type(container) is dict else list
    while True:
        try:
            piece: Any = kind(itertools.islice(source, min(most, pace.items)))
        except RuntimeError as error:  # what iterators of dictionaries and sets say
            raise _changed(container) from error
        if not piece:
            return
        yield piece


def _slices(items: list[Any], most: int, pace: _Pace) -> Iterator[list[Any]]:
    length, start = len(items), 0
    while start < length:
        piece = items[start : start + min(most, pace.items)]
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
    sections: list[memoryview] = []
    buffers: list[Any] = []
    contents = _payload.split(memoryview(body))
    while contents:
        kind, view = contents.pop(0)
        if kind == _payload.PICKLE:
            sections.append(view)
        elif kind == _payload.VIEW and not private:
            buffers.append(view)
        else:
            buffers.append(
                (yield from _copied(bytes if kind == _payload.BYTES else bytearray, view))
            )
    del view
    return (yield from _load_sections(sections, buffers, descriptors))


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


class _Sections:
    """The file from which the unpickler reads one section after the other."""

    __slots__ = ("_position", "_view")

    def open(self, view: memoryview) -> None:
        self._view, self._position = view, 0

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


def _load_sections(
    sections: list[memoryview], buffers: list[Any], descriptors: list[int]
) -> Generator[None, None, Any]:
    source = _Sections()
    unpickler = pickle.Unpickler(source, buffers=buffers)

    def load(section: memoryview) -> Any:
        source.open(section)
        travel.incoming = descriptors
        try:
            return unpickler.load()
        except GeneratorExit as error:  # the user's: that of a cancel comes between the steps
            raise pickle.UnpicklingError("it raised GeneratorExit") from error
        finally:
            travel.incoming = None

    sections.reverse()
    if len(sections) == 1:
        return load(sections.pop())
    placeholders = load(sections.pop())
    no_collection = _NoCollection()
    while len(sections) > 1:
        with no_collection:
            end = perf_counter() + _STEP
            while True:
                _fill(placeholders, *load(sections.pop()))
                if len(sections) == 1 or perf_counter() > end:
                    break
        yield
    return load(sections.pop())


def _fill(placeholders: list[Any], index: int, items: Any) -> None:
    placeholder = placeholders[index]
    if type(placeholder) is list:
        placeholder.extend(items)
    else:
        placeholder.update(items)


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
