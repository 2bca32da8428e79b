"""Large payloads in steps: what arrives is what one pickle would have given, and nothing is copied twice."""

import gc
import os
import pickle
import sys
import threading
import types
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynclam import SharedBuffer, _memory, _payload, _segments, _steps, _wire
from asynclam._descriptors import open_descriptors
from asynclam._steps import dump_steps, is_large, load_steps, run

MIB = 1 << 20


def there_and_back(value, **options):
    payload = run(dump_steps(value, **options))
    body = bytearray(b"".join(payload.parts))
    return run(load_steps(body, payload.flags, payload.descriptors))


@pytest.fixture
def small(monkeypatch):
    """Everything counts as large, and a piece is one or two items."""
    make_small(monkeypatch)


def make_small(monkeypatch):
    monkeypatch.setattr(_steps, "_LARGE_GRAPH", 0)
    monkeypatch.setattr(_steps, "_LARGE_CONTAINER", 0)
    monkeypatch.setattr(_steps, "LARGE_BYTES", 8)
    monkeypatch.setattr(_steps, "_PIECE_GRAPH", 2)
    monkeypatch.setattr(_steps, "_STEP", 1e-9)
    monkeypatch.setattr(_payload, "ASIDE", 8)


# --- what is large -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"x" * (1 << 18),
        bytearray(1 << 18),
        list(range(20_001)),
        dict.fromkeys(range(20_001)),
        set(range(20_001)),
        [1, {"key": [b"x" * (1 << 18)]}],
        [[0] * 100] * 5 + [[0] * 100 for _ in range(1000)],
        {"rows": [{"a": 1, "b": 2, "c": 3} for _ in range(10_000)]},
    ],
    ids=["bytes", "bytearray", "list", "dict", "set", "nested bytes", "rows", "dicts"],
)
def test_what_is_large(value):
    """Large bytes and graphs are seen wherever a few steps down lead to them."""
    assert is_large(1, value)


@pytest.mark.parametrize(
    "value",
    [None, 1, "x" * MIB, b"", [], (), {}, b"x" * 1000, [[1] * 100] * 100, np.zeros(MIB)],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_large(value):
    """What takes less than some milliseconds, or what pickle sets aside by itself, is dumped in one go."""
    assert not is_large(value, 2)
    assert not is_large()


# --- graphs --------------------------------------------------------------------------------------

scalars = st.none() | st.integers(-3, 3) | st.text(max_size=2) | st.binary(max_size=12)
nodes = st.lists(
    st.tuples(
        st.sampled_from([list, dict, set, tuple, bytearray]),
        st.lists(st.integers(0, 12) | scalars, max_size=7),
    ),
    min_size=1,
    max_size=12,
)


def graph(description):
    """Containers that refer to each other, in cycles, too; a tuple only to those before it."""
    built = [kind() for kind, _ in description]
    for index, (kind, contents) in enumerate(description):
        known = index if kind is tuple else len(built)
        items = [
            built[item] if isinstance(item, int) and 0 <= item < known else item
            for item in contents
        ]
        if kind is list:
            built[index].extend(items)
        elif kind is dict:
            built[index].update(enumerate(items))
        elif kind is set:
            built[index].update(item for item in contents if not isinstance(item, bytearray))
        elif kind is bytearray:
            built[index].extend(b"x" * len(items) * 2)
        else:
            built[index] = tuple(items)
    return built[-1]


def drawing(root):
    """The graph as nested tuples, in which what was met before is its number."""
    numbers = {}

    def draw(item):
        if not isinstance(item, (list, dict, set, tuple, bytearray)):
            return type(item).__name__, item
        if not item and isinstance(item, tuple):
            return ()
        if id(item) in numbers:
            return numbers[id(item)]
        numbers[id(item)] = len(numbers)
        name = type(item).__name__
        if isinstance(item, dict):
            return name, tuple((key, draw(value)) for key, value in item.items())
        if isinstance(item, set):
            return name, frozenset(item)
        if isinstance(item, bytearray):
            return name, bytes(item)
        return name, tuple(map(draw, item))

    return draw(root)


@given(nodes)
def test_graphs(description):
    """Identity, sharing and cycles are those that one pickle keeps."""
    root = graph(description)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        arrived = there_and_back(root)
    assert drawing(arrived) == drawing(pickle.loads(pickle.dumps(root, protocol=5)))


# --- objects that look at what they hold ------------------------------------------------------------

events = []  # what they have seen, in the order in which they were dumped or loaded


def look(item, depth=2):
    """How full a container is, and the first of what is in it."""
    if not isinstance(item, (list, dict, set, tuple)):
        return type(item).__name__
    inner = item.values() if isinstance(item, dict) else () if isinstance(item, set) else item
    return type(item).__name__, len(item), [look(item, depth - 1) for item in list(inner)[:depth]]


class Looks:
    """It looks in ``__setstate__``; and where its hash is needed, which may be before that."""

    held: object = None

    def __getstate__(self):
        events.append("dumped")
        return {"held": self.held}

    def __setstate__(self, state):
        self.held = state["held"]
        events.append(look(self.held, 3))

    def __hash__(self):
        events.append(("hash", look(self.held)))
        return hash(str(look(self.held)))


class Built(Looks):
    """It looks when it is built, by the function that ``__reduce__`` names."""

    def __init__(self, held):
        self.held = held
        events.append(("built", look(held, 3)))

    def __reduce__(self):
        events.append("reduced")
        return Built, (self.held,)


looking_nodes = st.lists(
    st.tuples(
        st.sampled_from([list, list, dict, set, tuple, Looks, Built]),
        st.lists(st.integers(0, 15), max_size=7),
    ),
    min_size=2,
    max_size=16,
)


def looking_graph(description):
    """Like the other one; a tuple and what is built hold only what is before them."""
    built = [Looks() if kind is Built else kind() for kind, _ in description]
    for index, (kind, contents) in enumerate(description):
        known = index if kind in (tuple, Built) else len(built)
        items = [built[item] for item in contents if item < known]
        keys = [item for item in items if isinstance(item, Looks)]
        if kind is list:
            built[index].extend(items)
        elif kind is dict:
            built[index].update(enumerate(items))
            built[index].update(zip(keys, items, strict=False))
        elif kind is set:
            built[index].update(keys)
        elif kind is tuple:
            built[index] = tuple(items)
        elif kind is Looks:
            built[index].held = items[0] if len(items) == 1 else items
        else:
            built[index] = Built(tuple(items))
    return built


def seen_by(transport, value):
    """The events of a journey, and the graph that arrived."""
    events.clear()
    arrived = transport(value)
    seen = list(events)
    return seen, look(arrived, 5)


def with_pickle(value):
    return pickle.loads(pickle.dumps(value, protocol=5))


@given(
    looking_nodes,
    st.sampled_from([0, 3, 6]),
    st.sampled_from([(300, 256, 10_000), (5, 2, 8)]),
    st.sampled_from([0, 100, 1 << 14]),
    st.booleans(),
)
def test_objects_that_look(description, large, glance, small_memo, by_value):
    """All that looks into a container while it is unpickled sees there what it would in one pickle."""
    root = looking_graph(description)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        monkeypatch.setattr(_steps, "_LARGE_CONTAINER", large)
        monkeypatch.setattr(_steps, "_LOOK", glance)
        monkeypatch.setattr(_steps, "_SMALL_MEMO", small_memo)
        in_steps = seen_by(lambda value: there_and_back(value, by_value=by_value), root)
    assert in_steps == seen_by(with_pickle, root)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", [list, dict, set])
def test_objects_that_look_at_where_they_are(kind):
    """They see it grow as pickle lets it grow, by the thousand."""
    items = [Looks() for _ in range(2500)]
    container = dict(zip(items, items, strict=True)) if kind is dict else kind(items)
    for item in items:
        item.held = container
    in_steps = seen_by(there_and_back, [container, 1])
    assert in_steps == seen_by(with_pickle, [container, 1])
    assert ("list", 2000, ["Looks"] * 3) in in_steps[0] or kind is not list


@pytest.mark.parametrize("rows_first", [True, False])
def test_large_arguments_that_share_one(rows_first):
    """A large list is full before what holds it in an attribute is made, whichever comes first."""
    rows = [(number, str(number)) for number in range(30_000)]
    views = [Looks() for _ in range(2000)]
    for view in views:
        view.held = rows
    value = (rows, views) if rows_first else (views, rows)
    seen, _ = seen_by(there_and_back, (value, {}))
    assert seen == ["dumped"] * 2000 + [look(rows, 3)] * 2000
    arrived = there_and_back((value, {}))[0]
    views, rows = reversed(arrived) if rows_first else arrived
    assert all(view.held is rows for view in views)


# --- in steps -------------------------------------------------------------------------------------


def counted(steps):
    """What the steps come to, and how many there are."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, count
        count += 1


def test_it_is_done_in_steps():
    """A large graph takes many steps on both sides, and the order of dictionaries is kept."""
    value = {"list": list(range(200_000)), "dict": {str(i): i for i in range(50_000, 0, -1)}}
    payload, steps = counted(dump_steps(value))
    assert steps > 5
    assert payload.flags == _wire.BUFFERS | _wire.PIECES
    arrived, steps = counted(load_steps(b"".join(payload.parts), payload.flags, []))
    assert steps > 5
    assert arrived == value
    assert list(arrived["dict"]) == list(value["dict"])


def test_what_is_small_arrives_too():
    """A value that need not have gone in steps is none the worse for it."""
    for value in (None, 1, "text", (), [], [1, [2]], {"a": {1, 2}}):
        assert there_and_back(value) == value


@pytest.mark.usefixtures("small")
def test_buffers_and_shared_buffers():
    """Arrays stay beside the pickle, and SharedBuffers are descriptors, also in pieces."""
    arrays = [np.full(5000, number, np.float64) for number in range(5)]
    with SharedBuffer(1) as buffer:
        buffer.view[0] = 7
        value = {"a": [*arrays, b"x" * 100, arrays[0], buffer], "b": [buffer]}
        arrived = there_and_back(value)
    assert all(map(np.array_equal, arrived["a"][:5], arrays))
    assert arrived["a"][6] is arrived["a"][0]
    assert arrived["a"][5] == b"x" * 100
    assert arrived["b"][0] is arrived["a"][7]
    assert arrived["b"][0].view[0] == 7
    arrived["b"][0].close()


class Node:
    def __init__(self):
        self.children = []


@pytest.mark.usefixtures("small")
def test_instances():
    """What an instance holds is dumped with it; a large container that is also elsewhere is shared."""
    node = Node()
    node.children += [node, node.children]
    arrived = there_and_back([node, node.children, {1: node}])
    assert arrived[0].children is arrived[1]
    assert arrived[1] == [arrived[0], arrived[1]]
    assert arrived[2][1] is arrived[0]


def test_subclasses_are_left_to_pickle():
    """What looks like a list may have a mind of its own."""

    class Own(list):
        pass

    assert not is_large(Own(range(30_000)))


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("nbytes", [1 << 18, 3 * MIB + 1])
@pytest.mark.parametrize("without_ctypes", [False, True])
def test_large_bytes(kind, nbytes, without_ctypes, monkeypatch):
    """They arrive as what they were, are not copied to be sent, and the same twice is the same."""
    if without_ctypes:

        def refuse(*_):
            raise ImportError("No module named '_ctypes'")

        monkeypatch.setattr(_memory, "blank", refuse)
    blob = kind(b"ab" * nbytes)[:nbytes]
    value = (blob, 1, [blob]), {"key": blob}
    payload = run(dump_steps(value))
    assert [part.obj for part in payload.parts if isinstance(part, memoryview)] == [blob]
    assert any(part.obj is blob for part in payload.parts if isinstance(part, memoryview))
    (first, _, (second,)), options = there_and_back(value)
    assert first is second is options["key"]
    assert type(first) is kind
    assert first == blob
    if kind is bytearray:
        first.append(1)


def test_bytes_by_value():
    """Beside what goes by value, too."""
    offset = 3
    fn, blob = there_and_back((lambda x: x + offset, b"x" * MIB), by_value=True)
    assert fn(1) == 4
    assert blob == b"x" * MIB


def test_a_bytearray_cannot_change_its_length():
    """As long as it waits to be sent, it has the length that was written down."""
    blob = bytearray(MIB)
    payload = run(dump_steps([blob]))
    with pytest.raises(BufferError):
        blob.append(1)
    payload.parts.clear()
    del payload
    blob.append(1)


# --- what may go wrong ---------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", [list, set, dict.fromkeys])
def test_a_container_that_changes_its_size(kind):
    """It is an error that says so, whichever it is; and no descriptor is left."""
    container = kind(range(100))
    steps = dump_steps(container)
    next(steps)
    getattr(container, "pop" if not isinstance(container, dict) else "popitem")()
    with pytest.raises(_steps.ChangedError, match="pass a copy"):
        run(steps)


@pytest.mark.usefixtures("small")
def test_other_pickling_between_steps():
    """What the thread pickles between two steps has its own descriptors, or is refused as ever."""
    with SharedBuffer(1) as buffer:
        steps = dump_steps([buffer, *range(100)])
        next(steps)
        with pytest.raises(pickle.PicklingError, match="run_cpu"):
            pickle.dumps(buffer)
        other = _payload.dumps(buffer)
        assert len(other.descriptors) == 1
        other.close()
        payload = run(steps)
        assert len(payload.descriptors) == 1
        loading = load_steps(b"".join(payload.parts), payload.flags, payload.descriptors)
        next(loading)
        with pytest.raises(pickle.UnpicklingError, match="without its descriptor"):
            _memory._receive(0, 1)
        run(loading)[0].close()


@pytest.mark.usefixtures("small")
def test_a_dump_that_is_given_up():
    """Leaving in the middle closes the descriptors."""
    with SharedBuffer(1) as buffer:
        steps = dump_steps([*range(50), buffer, *range(100)])
        before = open_descriptors()
        while open_descriptors() == before:
            next(steps)
        steps.close()
        assert open_descriptors() == before


@pytest.mark.usefixtures("small")
def test_what_pickle_refuses():
    """A lambda goes by value; what cannot go in any way is refused with pickle's reason."""
    assert there_and_back([1, 2, lambda: 5])[2]() == 5
    with SharedBuffer(1) as buffer, pytest.raises(TypeError, match="lock"):
        run(dump_steps([buffer, 1, threading.Lock()]))
    with pytest.raises(TypeError, match="lock"):
        run(dump_steps([threading.Lock()], by_value=True))


@pytest.mark.usefixtures("small")
def test_too_many_descriptors():
    """The limit of one payload holds over all of its pieces."""
    buffers = [SharedBuffer(0) for _ in range(251)]
    with pytest.raises(pickle.PicklingError, match="250"):
        run(dump_steps(buffers))


@pytest.mark.usefixtures("small")
def test_main_that_is_not_shared(monkeypatch):
    """Where the worker has another __main__, what is defined there goes by value."""
    main = types.ModuleType("__main__")
    exec("def f(x): return x * factor\nfactor = 3", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    payload = run(dump_steps([1, main.f], main_is_shared=False))
    monkeypatch.undo()
    arrived = run(load_steps(b"".join(payload.parts), payload.flags, []))
    assert arrived[1] is not main.f
    assert arrived[1](2) == 6


@pytest.mark.usefixtures("small")
def test_nothing_is_kept():
    """The pickler and its memo are gone with the dump, without the garbage collector."""
    node = Node()
    gone = weakref.ref(node)
    gc.disable()
    try:
        payload = run(dump_steps([node, 1]))
        arrived = run(load_steps(b"".join(payload.parts), payload.flags, []))
        received = weakref.ref(arrived[0])
        del node, arrived
        assert gone() is received() is None
    finally:
        gc.enable()


def test_a_lost_descriptor():
    """As in one go, it is an error that names the limit."""
    with pytest.raises(OSError, match="limit of open descriptors"):
        run(load_steps(b"", _wire.BUFFERS, None))


def test_a_payload_of_one_go():
    """Whatever was dumped in one go can be loaded in steps, with and without buffers."""
    for value in ("text", np.arange(5000)):
        payload = _payload.dumps(value)
        body = bytearray(b"".join(payload.parts))
        assert np.array_equal(run(load_steps(body, payload.flags, [])), value)


@pytest.mark.usefixtures("small")
def test_private():
    """Nothing of a private object looks into the body; of another, what was a buffer does."""
    value = [np.arange(300_000), b"x" * 100, list(range(100))]
    payload = run(dump_steps(value))
    for private in (True, False):
        body = bytearray(b"".join(payload.parts))
        arrived = run(load_steps(body, payload.flags, [], private=private))
        assert np.array_equal(arrived[0], value[0])
        assert arrived[0].flags.writeable
        assert arrived[1:] == value[1:]
        if private:
            body.clear()
        else:
            with pytest.raises(BufferError):
                body.clear()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.usefixtures("small")
def test_the_garbage_collector_is_as_before(enabled, frozen):
    """Loading leaves it on or off, and what was frozen frozen."""
    if frozen:
        gc.freeze()
    if not enabled:
        gc.disable()
    count = gc.get_freeze_count()
    try:
        there_and_back([[number] for number in range(100)])
        assert gc.isenabled() == enabled
        assert bool(gc.get_freeze_count()) == bool(count)
    finally:
        gc.enable()
        gc.unfreeze()


# --- through a segment ---------------------------------------------------------------------------


@pytest.mark.usefixtures("segments_in_use")
def test_through_a_segment():
    """Arrays look into the segment, which is released with them; bytes are the receiver's own."""
    share = _segments.Share()
    here, there = _segments.End(share), _segments.End(share)
    value = {"array": np.arange(100_000), "blob": b"x" * MIB, "list": list(range(100_000))}
    payload = run(dump_steps(value))
    for _ in range(2):
        lease = here.outgoing.acquire(_payload.size_of(payload.parts))
        run(_segments.copy_in(lease.view, payload.parts))
        descriptors = [os.dup(descriptor) for descriptor in lease.descriptors]
        record = lease.record
        here.outgoing.sent(lease)
        view, private = there.incoming.open(record, descriptors)
        arrived = run(load_steps(view, payload.flags, descriptors, private=private))
        del view
        assert np.array_equal(arrived.pop("array"), value["array"])
        assert arrived == {"blob": value["blob"], "list": value["list"]}
        here.noted(there.notes())
    assert len(here.outgoing) == 1
    here.close()
    there.close()


class Small:
    """It sets a small buffer aside, which is not worth a part of its own."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return bytes, (pickle.PickleBuffer(self.data),)


def test_small_buffers_are_in_the_pickle(small):
    """A buffer that costs less inside the pickle than beside it stays inside, and arrives."""
    payload = run(dump_steps([Small(b"abc")]))
    assert there_and_back([Small(b"abc")]) == [b"abc"]
    contents = _payload.split(memoryview(b"".join(payload.parts)))
    assert {kind for kind, _ in contents} == {_payload.PICKLE}


def test_a_change_while_cloudpickle_dumps(small):
    """It is told as such, not as what pickle had refused before."""
    items = [lambda: 1, 2, 3, 4]
    steps = dump_steps(items, by_value=True)
    next(steps)
    items.append(5)
    with pytest.raises(_steps.ChangedError, match="list changed its size"):
        run(steps)


def test_the_file_of_an_unpickler():
    """Pickles are read as a file is: into memory, in lines, and no further than its end."""
    source = _steps._Source(memoryview(b"abc\ndef"))
    into = bytearray(2)
    assert (source.readinto(memoryview(into)), into) == (2, b"ab")
    assert (source.readline(), source.readline()) == (b"c\n", b"def")
    source = _steps._Source(memoryview(b"x"))
    into = bytearray(b"....")
    assert (source.readinto(memoryview(into)), into) == (1, b"x...")
