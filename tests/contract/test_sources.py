"""Sources: what is read of iterables, how much at once, and what is closed."""

import itertools

import pytest

from asynclam import _sources
from asynclam._sources import Source


def opened(*iterables):
    source = Source(iterables)
    source.open()
    return source


def read_all(source, most=10):
    pieces = []
    while not source.exhausted:
        pieces.append(source.items(most))
        assert len(pieces[-1]) <= most
    return pieces


@pytest.mark.parametrize(
    "iterable",
    [list(range(25)), tuple(range(25)), range(25), dict.fromkeys(range(25)), iter(range(25))],
    ids=lambda iterable: type(iterable).__name__,
)
def test_one_iterable(iterable):
    """Its items come in pieces of at most the wanted length, in order."""
    pieces = read_all(opened(iterable))
    assert [item for piece in pieces for item in piece] == list(range(25))


def test_pieces_of_their_own_kind():
    """A range is cut into ranges: three numbers, however many items they stand for."""
    assert opened(range(10)).items(4) == range(4)
    assert opened((1, 2)).items(4) == (1, 2)


def test_subclasses_are_iterated():
    """What a subclass of list does when it is iterated is its own affair."""

    class Reversed(list):
        def __iter__(self):
            return reversed(self[:])

    assert [*itertools.chain(*read_all(opened(Reversed([1, 2, 3]))))] == [3, 2, 1]


def test_several_iterables():
    """Tuples of one item of each, until the shortest ends."""
    pieces = read_all(opened([1, 2, 3], "ab", itertools.count()), 2)
    assert [*itertools.chain(*pieces)] == [(1, "a", 0), (2, "b", 1)]


async def test_async_iterables():
    """An async iterable is awaited; beside sync ones, too."""

    async def numbers():
        yield 1
        yield 2

    source = opened(numbers())
    assert source.is_async
    assert await source.next() == 1
    source = opened(numbers(), "ab")
    assert [await source.next(), await source.next()] == [(1, "a"), (2, "b")]
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await source.next()
    source = opened("a", numbers())
    assert await source.next() == ("a", 1)
    with pytest.raises(StopAsyncIteration):  # the sync one has ended
        await source.next()
    await source.aclose()


@pytest.mark.parametrize(
    ("iterables", "length"),
    [
        (([1, 2, 3],), 3),
        ((range(5), "abc"), 3),
        ((iter([1, 2, 3]),), 3),
        ((itertools.count(), [1, 2]), 2),
        ((itertools.count(),), None),
        (((x for x in "ab"),), None),
    ],
)
def test_how_many_remain(iterables, length):
    """The length is known where all iterables, or the shortest, tell it; reading counts it down."""
    source = opened(*iterables)
    assert source.remaining == length
    source.items(1)
    assert source.remaining == (None if length is None else length - 1)


def test_a_length_that_raises():
    """A ``__len__`` that fails is an unknown length: it is only a hint."""

    class Odd:
        def __iter__(self):
            return iter("abc")

        def __len__(self):
            raise RuntimeError("not now")

    assert opened(Odd()).remaining is None


def test_a_length_that_is_wrong():
    """An iterable that has more than its length says is read to its end."""

    class Longer:
        def __iter__(self):
            return iter(range(100))

        def __len__(self):
            return 3

    source = opened(Longer())
    assert sum(map(len, read_all(source))) == 100
    assert source.remaining == 0


def test_a_slow_iterable(monkeypatch):
    """Between two turns of the loop no more is read than fits, however much is wanted."""
    now = 0.0
    monkeypatch.setattr(_sources, "perf_counter", lambda: now)

    def slow(seconds):
        nonlocal now
        for number in itertools.count():
            now += seconds
            yield number

    assert len(opened(slow(0.010)).items(1000)) == 1
    endless = opened(slow(0.0001))
    pieces = [len(endless.items(1000)) for _ in range(5)]
    assert max(pieces) <= 16
    assert len(opened(slow(0)).items(1000)) == 1000


def test_an_iterable_that_becomes_slow(monkeypatch):
    """Users' code makes so few items between two looks at the clock, however fast it was."""
    now = 0.0
    monkeypatch.setattr(_sources, "perf_counter", lambda: now)

    def becomes_slow():
        nonlocal now
        for number in itertools.count():
            now += 0.010 if number >= 500 else 0
            yield number

    source = opened(becomes_slow())
    assert len(source.items(500)) == 500
    assert len(source.items(500)) <= 32
    assert len(source.items(500)) == 1


@pytest.mark.usefixtures("no_turns")
def test_an_error():
    """What an iterable raises comes out, when it is made an iterator or when it is read."""

    def fails():
        yield 1
        raise KeyError("in the source")

    source = opened(fails())
    with pytest.raises(KeyError, match="in the source"):
        source.items(10)


async def test_closing():
    """Generators are closed, the last first, whatever the others raise; closing twice does nothing."""
    closed = []

    def sync(name):
        try:
            yield 1
        finally:
            closed.append(name)

    async def fails():
        try:
            yield 1
        finally:
            closed.append("async")
            raise KeyError("cleanup")

    source = opened(sync("first"), fails(), sync("last"))
    await source.next()
    with pytest.raises(KeyError, match="cleanup"):
        await source.aclose()
    assert closed == ["last", "async", "first"]
    await source.aclose()


async def test_an_iterable_that_cannot_begin():
    """If the second of two iterables cannot be iterated, the first is closed all the same."""
    closed = []

    async def first():
        try:
            yield 1
        finally:
            closed.append("first")

    class Broken:
        def __iter__(self):
            raise KeyError("no iterator")

    iterator = first()
    await anext(iterator)
    source = Source((iterator, Broken()))
    with pytest.raises(KeyError, match="no iterator"):
        source.open()
    await source.aclose()
    assert closed == ["first"]
