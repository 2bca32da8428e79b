"""How many items make one job: scripted times in, lengths out."""

import numpy as np
import pytest

from asynclam._chunks import AIM, FixedLength, MeasuredLength

MIB = 1024 * 1024


def lengths_of_a_map(lengths, microseconds, total=None, *, items=100_000):
    """Runs a map on paper, a chunk at a time; the lengths of its chunks.

    ``microseconds`` tells the run time of an item by its index.
    """
    read, found = 0, []
    while read < items:
        length = min(lengths.next(read, None if total is None else total - read), items - read)
        elapsed = sum(microseconds(index) for index in range(read, read + length))
        lengths.measured(length, int(elapsed), 10 * length)
        read += length
        found.append(length)
    return found


def test_begins_with_single_items():
    """Nothing is known at first: items go alone, and two of them a worker fit into the limit."""
    lengths = MeasuredLength(2)
    assert lengths.next(0, 1_000_000) == 1
    assert lengths.limit(1) == 4


def test_short_items_go_together():
    """100,000 items of a tenth of a microsecond are a few dozen jobs, known or unknown in number."""
    assert len(lengths_of_a_map(MeasuredLength(2), lambda _: 0.1, 100_000)) < 30
    assert len(lengths_of_a_map(MeasuredLength(2), lambda _: 0.1)) < 30


def test_grows_by_a_factor_at_most():
    """No chunk is longer than sixteen times what was measured before."""
    found = lengths_of_a_map(MeasuredLength(2), lambda _: 0.1)
    for index, length in enumerate(found[1:], 1):
        assert length <= 16 * sum(found[:index])


def test_a_single_measure_at_the_clocks_resolution():
    """An item that took no measurable time allows sixteen, not all."""
    lengths = MeasuredLength(2)
    lengths.measured(1, 0, 10)
    assert lengths.next(1, 1_000_000) == 16


@pytest.mark.parametrize("microseconds", [10, 300, 5_000, 49_000, 51_000, 1_000_000])
def test_aims_at_50_ms(microseconds):
    """No chunk runs longer than the aim, but for an item that does so alone."""
    found = lengths_of_a_map(MeasuredLength(2), lambda _: microseconds, items=20_000)
    assert max(found) * microseconds <= max(AIM, microseconds)


def test_long_items_stay_alone():
    """Items that run longer than the aim are jobs of their own."""
    assert set(lengths_of_a_map(MeasuredLength(2), lambda _: 60_000, items=50)) == {1}


def test_shrinks_at_once():
    """When items take longer, the next chunk is shorter; it grows again by what it then measures."""
    lengths = MeasuredLength(2)
    lengths_of_a_map(lengths, lambda _: 10, items=10_000)
    lengths.measured(1000, 1000 * AIM, 10)
    assert lengths.next(10_000, None) == 1
    lengths.measured(1, 1, 10)
    assert lengths.next(10_000, None) == 2 * 16


def test_a_slow_first_call():
    """What a worker imports at its first item is forgotten with the second."""
    lengths = MeasuredLength(2)
    lengths.measured(1, 900_000, 10)
    assert lengths.next(1, 1_000_000) == 1
    lengths.measured(1, 1, 10)
    assert lengths.next(2, 1_000_000) == 16


@pytest.mark.parametrize("workers", [1, 2, 6])
def test_the_end_is_shared(workers):
    """No chunk is more than a share of what is to come, as long as sharing is worth a job."""
    lengths = MeasuredLength(workers)
    lengths.measured(1000, 100_000, 10)  # 100 µs each: 500 in the aim, 10 are worth a job
    for remaining in (4000, 1000, 500, 100):
        share = remaining // (4 * workers)
        assert lengths.next(0, remaining) == min(500, max(10, share))
    assert lengths.next(0, 0) == 10  # a length that was wrong


def test_the_unknown_end_is_as_far_as_the_beginning():
    """Where nobody knows what is to come, it is taken to be as much as has come."""
    lengths = MeasuredLength(2)
    lengths.measured(1000, 1_000_000, 10)  # 1 ms each
    assert [lengths.next(read, None) for read in (0, 8, 80, 4000)] == [1, 1, 10, 50]


def test_ten_short_items():
    """Ten items of a millisecond are ten jobs, ten of a microsecond are not."""
    assert lengths_of_a_map(MeasuredLength(2), lambda _: 1000, 10, items=10) == [1] * 10
    assert lengths_of_a_map(MeasuredLength(2), lambda _: 1, 10, items=10) == [1, 9]


def test_heavy_items():
    """A chunk weighs 64 KiB at most, by the measure of the one before."""
    lengths = MeasuredLength(2)
    lengths.measured(100, 100, 100 * 10_000)
    assert lengths.next(0, 1_000_000) == 6
    lengths.measured(6, 6, 6 * MIB)
    assert lengths.next(0, 1_000_000) == 1


@pytest.mark.parametrize(
    "heavy",
    [
        bytes(10 * MIB),
        "x" * 10 * MIB,
        np.zeros(10 * MIB, "u1"),
        memoryview(bytes(10 * MIB)),
        ("name", bytes(10 * MIB)),
        {"body": bytes(10 * MIB)},
    ],
    ids=lambda item: type(item).__name__,
)
def test_items_that_become_heavy(heavy):
    """Items of megabytes after small ones are noticed before they are pickled together."""
    lengths = MeasuredLength(2)
    lengths.measured(100, 100, 1000)
    assert not lengths.shortened_by([b"x"] * 100)
    assert lengths.next(0, 1_000_000) > 100
    assert lengths.shortened_by([b"x"] * 50 + [heavy] * 50)
    assert lengths.next(0, 1_000_000) == 1


@pytest.mark.parametrize("limit", [1, 3, 4, 10, 1000])
def test_a_limit(limit):
    """Within a limit that the caller gave, all workers have two chunks, if it is not too small."""
    lengths = MeasuredLength(2, limit)
    lengths.measured(1, 1, 10)
    lengths.measured(10_000, 1000, 10_000)
    length = lengths.next(0, 10_000_000)
    assert length == max(1, limit // 4)
    assert lengths.limit(length) == limit


def test_without_a_limit():
    """Twice the chunks that the workers can run are read ahead."""
    lengths = MeasuredLength(3)
    assert lengths.limit(100) == 600


def test_hungry_workers():
    """While fewer chunks are under way than there are workers, what is collected is sent."""
    lengths = MeasuredLength(2)
    lengths.measured(1, 1000, 10)
    assert lengths.share(0, 0) == 0
    assert lengths.share(1, 0) == 1
    assert lengths.share(5, 1) == 3  # the next worker finds some, too
    assert lengths.share(5, 2) == 0
    lengths.measured(1000, 1000, 10)
    assert lengths.share(5, 1) == 5  # not worth two jobs
    lengths.measured(1000, 1000 * AIM, 10)
    assert lengths.share(500, 1) == 1  # they were collected for a longer chunk


def test_lengths_that_the_caller_said():
    """An explicit length is kept, whatever is measured, and no chunk goes before it is full."""
    lengths = FixedLength(7, 20)
    lengths.measured(7, 10 * AIM, 10)
    assert lengths.next(0, 1) == 7
    assert lengths.limit(7) == 20
    assert lengths.share(6, 0) == 0
    assert FixedLength(7, 5).next(0, None) == 5
