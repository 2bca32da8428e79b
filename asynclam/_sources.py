"""Sources: the items of iterables side by side, read no faster than they come.

Sync iterables are read at the speed of C, in slices that are short enough to look at the clock in
between: an iterable that turns out to be slow, or to have no end, must not hold up the loop. Lists,
tuples and ranges are cut into pieces of their own kind; that of a range is three numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import (
    AsyncIterable,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import AsyncExitStack
from itertools import islice
from operator import length_hint
from time import perf_counter
from typing import Any, cast

AnyIterable = Iterable[Any] | AsyncIterable[Any]

TURN = 0.001  # seconds, after which the loop's other callbacks have a turn
_SLICE = 32  # items that users' code may make between two looks at the clock
_INSTANT_SLICE = 1024  # items, where no users' code runs
_CUT = frozenset({list, tuple, range})
_INSTANT = frozenset({list, tuple, range, str, bytes, bytearray, dict, set, frozenset, deque})


class Source:
    """The items of one iterable, or tuples of one item of each of several, until the shortest ends.

    Attributes:
        read: how many items have been read.
        exhausted: whether there are no more, or nobody wants them.
        is_async: whether one of the iterables is, so that items are awaited, by :meth:`next`;
            else they are there, in :meth:`items`.
        next: gives an awaitable of the next item; raises StopAsyncIteration after the last.
    """

    def __init__(self, iterables: tuple[AnyIterable, ...]) -> None:
        self.read = 0
        self.exhausted = False
        self._iterables = iterables
        self.is_async = False
        self.next: Callable[[], Awaitable[Any]] = self._next_row
        self._nexts: list[Callable[[], Awaitable[Any]]] = []
        self._rows: Iterator[Any] = iter(())  # if none is
        self._whole: Sequence[Any] | None = None  # if it can be cut
        self._length: int | None = None
        self._slice = 1
        self._most = _SLICE
        self._iterators = AsyncExitStack()  # closes those that can be closed, whatever they raise

    def open(self) -> None:
        """Makes the iterators, which runs users' code."""
        if len(self._iterables) == 1 and type(self._iterables[0]) in _CUT:
            self._whole = cast("Sequence[Any]", self._iterables[0])
            return
        iterators = []
        for iterable in self._iterables:
            iterators.append(_iterator(iterable))
            self._iterators.push_async_callback(_close, iterators[-1])
        if any(isinstance(iterable, AsyncIterable) for iterable in self._iterables):
            self._nexts = [
                iterator.__anext__ if isinstance(iterable, AsyncIterable) else _Next(iterator)
                for iterable, iterator in zip(self._iterables, iterators, strict=True)
            ]
            self.is_async = True
            if len(self._nexts) == 1:
                self.next = self._nexts[0]
            return
        self._rows = iterators[0] if len(iterators) == 1 else zip(*iterators, strict=False)
        lengths = [_length(iterable) for iterable in self._iterables]
        self._length = min((length for length in lengths if length is not None), default=None)
        if all(type(iterable) in _INSTANT for iterable in self._iterables):
            self._most = _INSTANT_SLICE
        self._iterables = ()  # the iterators know what they still need

    @property
    def remaining(self) -> int | None:
        """How many items are still to come; ``None`` if nobody knows."""
        length = self._length if self._whole is None else len(self._whole)
        return None if length is None else max(0, length - self.read)

    def items(self, most: int) -> Sequence[Any]:
        """The next items, ``most`` or as many as come within a turn; none at all only at the end."""
        if self._whole is not None:
            items = self._whole[self.read : self.read + most]
            self.exhausted = len(items) < most
        else:
            items = self._sliced(most)
        self.read += len(items)
        return items

    async def _next_row(self) -> tuple[Any, ...]:
        # Nobody may want the rest of a row any more: one that was awaited may have kept a cancel.
        return tuple([await next_() for next_ in self._nexts if not self.exhausted])

    def _sliced(self, most: int) -> list[Any]:
        items: list[Any] = []
        end = perf_counter() + TURN
        while not self.exhausted and len(items) < most:
            wanted = min(len(items) + self._slice, most)
            begun = len(items)
            items.extend(islice(self._rows, wanted - begun))
            self.exhausted = len(items) < wanted
            if perf_counter() > end:
                self._slice = 1
                break
            self._slice = min(2 * self._slice, self._most)
        return items

    async def aclose(self) -> None:
        """Closes generators, and whatever has an ``aclose``.

        Raises:
            Exception: what they raise.
        """
        self._nexts, self._rows, self._whole, self.exhausted = [], iter(()), (), True
        self.next, self._iterables = self._next_row, ()
        await self._iterators.aclose()


class _Next:
    """What ``__anext__`` is, for a sync iterator."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator

    async def __call__(self) -> Any:
        for item in self._iterator:  # a StopIteration cannot leave a coroutine
            return item
        raise StopAsyncIteration


def _iterator(iterable: AnyIterable) -> Any:
    return aiter(iterable) if isinstance(iterable, AsyncIterable) else iter(iterable)


def _length(iterable: object) -> int | None:
    try:
        length = length_hint(iterable, -1)
    except Exception:  # users' code, and only a hint
        return None
    return length if length >= 0 else None


async def _close(iterator: Any) -> None:
    if hasattr(iterator, "aclose"):
        await iterator.aclose()
    elif isinstance(iterator, Generator):
        iterator.close()
