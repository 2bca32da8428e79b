"""How many items make one job. No IO, no clock: lengths and measured times in, the next length out.

Theory of operation. A job costs the loop some 50 to 100 µs whatever it does, so tiny items go
together. How many, only their run times tell: the first items go alone, so that the first results
of long jobs come at once and every worker has something to do. Each reply then allows chunks that
would run ``aim`` microseconds or weigh ``_MOST_BYTES`` at its own rate, and never more than
``_GROWTH`` times the items that were measured so far. When items take longer, the next chunk is
shorter, and what was measured before no longer counts.

The end of the input is shared, too: a chunk is at most a share of what is still to come, which is
taken to be as much as has come where nobody knows. Below ``_WORTHWHILE`` there is nothing to share.

What is inherent: a chunk that was measured by short items may hold a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AIM = 50_000  # microseconds: what dies or is cancelled together is no more work than that
INLINE_AIM = 1_000  # microseconds, in the loop's own process: it stands still as long
_WORTHWHILE = 1_000  # microseconds: what a job costs the loop is a tenth of that, or less
_GROWTH = 16
_MOST_BYTES = 64 * 1024  # pickled in one go: of dicts, that stops the loop for a millisecond or two
_SHARES = 4  # a worker, of what is still to come
_SAMPLES = 4  # items that are looked at when some are read


class FixedLength:
    """Chunks as long as the caller said, the last may be shorter.

    Args:
        length: items of a chunk.
        limit: the most items that are read and whose result has not been taken.
    """

    def __init__(self, length: int, limit: int) -> None:
        self._length = min(length, limit)
        self._limit = limit

    def next(self, read: int, remaining: int | None) -> int:  # noqa: ARG002
        """Items of the next chunk."""
        return self._length

    def limit(self, length: int) -> int:  # noqa: ARG002
        """The most items that are read and not taken."""
        return self._limit

    def share(self, collected: int, under_way: int) -> int:  # noqa: ARG002
        """No chunk goes before it is full."""
        return 0

    def shortened_by(self, items: Sequence[Any]) -> bool:  # noqa: ARG002
        """What they are does not matter."""
        return False

    def measured(self, length: int, microseconds: int, nbytes: int) -> None:
        """Nor does it matter what they took."""


class MeasuredLength:
    """Chunks whose length follows from how long those before them have run.

    Args:
        workers: how many work on them at a time.
        limit: the most items that are read and whose result has not been taken. ``None``: twice
            the chunks that the workers can run.
        aim: microseconds that a chunk runs at most, as far as that can be told.
    """

    def __init__(self, workers: int, limit: int | None = None, *, aim: int = AIM) -> None:
        self._workers = workers
        self._limit = limit
        self._aim = aim
        # Two chunks a worker fit into the limit: one that runs, and one to go on with.
        self._cap = max(1, limit // (2 * workers)) if limit is not None else None
        self._most = 1  # what the measures allow
        self._least = 1  # what is not worth sharing
        self._evidence = 0  # items that were measured, since they last took longer

    def measured(self, length: int, microseconds: int, nbytes: int) -> None:
        """Learns from a chunk that has run.

        Args:
            length: its items.
            microseconds: its run time, as the worker measured it.
            nbytes: what its arguments or its results weigh, whichever is more.
        """
        microseconds = max(1, microseconds)
        in_time = length * self._aim // microseconds
        in_weight = length * _MOST_BYTES // max(1, nbytes)
        allowed = min(in_time, in_weight)
        shorter = allowed < self._most
        self._evidence = min(length, allowed) if shorter else self._evidence + length
        self._most = max(1, min(allowed, _GROWTH * self._evidence))
        self._least = max(1, length * min(_WORTHWHILE, self._aim) // microseconds)

    def shortened_by(self, items: Sequence[Any]) -> bool:
        """Notices that items have become large, before they are pickled together."""
        if self._most == 1:
            return False
        step = max(1, len(items) // _SAMPLES)
        heaviest = max(map(_nbytes, items[::-step]), default=0)
        if heaviest * self._most < 4 * _MOST_BYTES:  # or about what the measure said
            return False
        self._most = max(1, _MOST_BYTES // heaviest)
        return True

    def next(self, read: int, remaining: int | None) -> int:
        """Items of the next chunk.

        Args:
            read: items that have come.
            remaining: items that are still to come; ``None`` if nobody knows.
        """
        horizon = read if remaining is None else remaining
        share = horizon // (_SHARES * self._workers)
        length = min(self._most, max(share, self._least))
        return max(1, length if self._cap is None else min(length, self._cap))

    def limit(self, length: int) -> int:
        """The most items that are read and not taken, while chunks have this length."""
        return 2 * self._workers * length if self._limit is None else self._limit

    def share(self, collected: int, under_way: int) -> int:
        """How many items go now, though their chunk is not full; 0 while no worker waits.

        Args:
            collected: items that wait for the chunk to be full.
            under_way: chunks that workers have, or will have before.
        """
        if under_way >= self._workers:
            return 0
        # The next worker to be free finds some, too, unless that is not worth a job.
        share = max(self._least, -(-collected // self._workers))
        if collected - share < self._least:
            share = collected
        return min(share, self._most, self._cap or share)


Lengths = FixedLength | MeasuredLength


def _nbytes(item: object, depth: int = 1) -> int:
    """What an item weighs, roughly: the bytes that are seen at a glance."""
    if isinstance(item, (bytes, bytearray, str)):
        return len(item)
    if depth and isinstance(item, (tuple, list, dict)):
        values = item.values() if isinstance(item, dict) else item
        return sum(_nbytes(value, 0) for value, _ in zip(values, range(8), strict=False))
    nbytes = getattr(item, "nbytes", 0)  # of an array, a memoryview, a SharedBuffer
    return nbytes if isinstance(nbytes, int) else 0
