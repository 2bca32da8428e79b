"""Streams: many calls with bounded read-ahead, ordered or not, over any kind of future.

A stream knows how to start the work on one batch of items: ``start(batch)`` returns a future, and
cancelling that future cancels the work. What stands behind it, a worker or a coroutine, it does not
know.

Theory of operation. One task, the pump, reads the source and starts work while fewer than ``limit``
items are between the source and the consumer; so nothing is read that could not be delivered, and a
slow consumer slows the source. The consumer takes futures as they are done, in the order asked for.
The first error ends the stream: the pump and what is under way are cancelled and awaited, the source
is closed, then the error is raised. The engine knows nothing of the handle that the user has, so
that a handle that is dropped is noticed and the rest cancelled.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
)
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from . import _call
from ._errors import JobExitError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

T = TypeVar("T")
AnyIterable = Iterable[Any] | AsyncIterable[Any]
Batch = list[tuple[Any, ...]]
Future = asyncio.Future[list[Any]]  # of the results of one batch
Start = Callable[[Batch], Future]


async def batched(iterables: tuple[AnyIterable, ...], size: int) -> AsyncGenerator[Batch, None]:
    """Lists of ``size`` argument tuples (the last may be shorter), one item of each iterable a tuple."""
    source = zipped(iterables)
    batch: Batch = []
    try:
        async for items in source:
            batch.append(items)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch
    finally:
        await source.aclose()


async def zipped(iterables: tuple[AnyIterable, ...]) -> AsyncGenerator[tuple[Any, ...], None]:
    """Tuples of one item of each iterable, until the shortest ends; closes those that can be closed."""
    async with AsyncExitStack() as stack:
        iterators = []
        for iterable in iterables:
            iterators.append(_iterator(iterable))
            stack.push_async_callback(_close, iterators[-1])
        while True:
            try:
                items = tuple([await _next(iterator) for iterator in iterators])
            except StopAsyncIteration:
                return
            yield items


async def _next(iterator: Any) -> Any:
    if isinstance(iterator, AsyncIterator):
        return await anext(iterator)
    for item in iterator:  # a StopIteration cannot leave a coroutine
        return item
    raise StopAsyncIteration


def _iterator(iterable: AnyIterable) -> Any:
    return aiter(iterable) if isinstance(iterable, AsyncIterable) else iter(iterable)


async def _close(iterator: Any) -> None:
    if hasattr(iterator, "aclose"):
        await iterator.aclose()
    elif isinstance(iterator, Generator):
        iterator.close()


class Stream(Generic[T]):
    """Results of many calls. Nothing is started before it is used, and it is used once.

    * ``await stream`` is a list of all results in the order of the input; ``stream.list()`` is the
      same as a coroutine, for task groups.
    * ``async for result in stream`` takes them one by one, reading on as they are taken.
    * ``async with stream:`` leaves early: what is not done at the end of the block is cancelled.

    The first error cancels the rest and is raised. So does a cancel of whoever waits for it. A
    stream that is dropped unfinished is cancelled, with a ResourceWarning.
    """

    def __init__(
        self,
        name: str,
        iterables: tuple[AnyIterable, ...],
        start: Start,
        limit: int,
        *,
        size: int = 1,
        ordered: bool,
        return_exceptions: bool,
    ) -> None:
        self._name = name
        self._ordered = ordered
        self._new_engine = partial(
            _Engine, iterables, start, limit, size=size, return_exceptions=return_exceptions
        )
        self._engine: _Engine | None = None
        self._closed = False
        self._results: deque[T] = deque()  # of the batch that is being delivered

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._closed:
            raise StopAsyncIteration
        engine = self._engine or self._begin(ordered=self._ordered)
        while not self._results:
            batch = await engine.next()
            if batch is None:
                raise StopAsyncIteration
            self._results.extend(batch[1])
        result = self._results.popleft()
        engine.delivered()
        return result

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self.list().__await__()

    async def list(self) -> list[T]:
        """All results, in the order of the input."""
        if self._engine or self._closed:
            raise RuntimeError(f"this {self._name}() stream was used already; make another one")
        engine = self._begin(ordered=False)
        batches: dict[int, list[T]] = {}
        try:
            while (batch := await engine.next()) is not None:
                batches[batch[0]] = batch[1]
                engine.delivered(len(batch[1]))
        finally:
            await engine.close()
        return [result for index in sorted(batches) for result in batches[index]]

    def _begin(self, *, ordered: bool) -> _Engine:
        self._engine = self._new_engine(ordered=ordered)
        return self._engine

    async def aclose(self) -> None:
        """Cancels what is not done, waits until it is gone, and closes the source."""
        self._closed = True
        self._results.clear()
        if self._engine:
            await self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine and not engine.ended:
            warnings.warn(
                f"a {self._name}() stream was dropped unfinished, and the rest of its work is "
                f"cancelled; to leave early, write: async with {self._name}(...) as stream",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
            engine.abandon()


def _error_of(future: Future) -> BaseException | None:
    if future.cancelled():  # by itself: CancelledError raised here would cancel the wrong task
        return JobExitError("a call", asyncio.CancelledError())
    return future.exception()


class _Engine:
    """The pump, what is under way, and the one consumer that waits."""

    def __init__(
        self,
        iterables: tuple[AnyIterable, ...],
        start: Start,
        limit: int,
        *,
        size: int,
        ordered: bool,
        return_exceptions: bool,
    ) -> None:
        self._source = batched(iterables, size)
        self._start = start
        self._most_open = limit - size  # before another batch is read
        self._ordered = ordered
        self._return_exceptions = return_exceptions
        self._loop = asyncio.get_running_loop()
        self._open = 0  # items read and not delivered
        self._room = asyncio.Event()
        self._running: dict[Future, tuple[int, int]] = {}  # index and length of the batch, in order
        self._done: deque[Future] = deque()  # as they ended, if that is the order wanted
        self._exhausted = False
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._cleanup_error: BaseException | None = None
        self.ended = False
        self._pump = self._loop.create_task(self._read_source())

    async def _read_source(self) -> None:
        try:
            try:
                await self._start_all()
            finally:
                await self._source.aclose()
        except asyncio.CancelledError as error:
            if self.ended:
                raise
            self._fail(JobExitError("the source", error))  # it was cancelled, and we were not
        except Exception as error:
            self._fail(error)
        except BaseException as error:
            self._fail(JobExitError("the source", error))
            raise
        finally:
            self._exhausted = True
            self._wake()

    async def _start_all(self) -> None:
        index = 0
        await self._wait_for_room()
        async for batch in self._source:
            future = self._started(batch)
            self._open += len(batch)
            self._running[future] = index, len(batch)
            future.add_done_callback(self._on_done)
            index += 1
            await self._wait_for_room()

    def _started(self, batch: Batch) -> Future:
        try:
            return self._start(batch)
        except Exception as error:  # an item that cannot be pickled
            if not self._return_exceptions:
                raise
            future = self._loop.create_future()
            future.set_exception(error)
            return future

    async def _wait_for_room(self) -> None:
        while self._open > self._most_open:
            self._room.clear()
            await self._room.wait()

    def _on_done(self, future: Future) -> None:
        error = _error_of(future)  # seen, so that nothing is logged of it
        if self.ended:
            return
        if error is not None and not self._return_exceptions:
            self._fail(error)
        if not self._ordered:
            self._done.append(future)
        self._wake()

    def _fail(self, error: BaseException) -> None:
        if self.ended:
            self._cleanup_error = error
        elif self._failure is None:
            self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> tuple[int, list[Any]] | None:
        """The next batch with its index, or ``None`` after the last."""
        if self._waiter is not None:
            raise RuntimeError("two tasks read one stream; give each a stream of its own")
        if self.ended:
            return None
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this stream belongs to another event loop; make another one here")
        try:
            while self._failure is None and (self._running or not self._exhausted):
                future = self._ready()
                if future is not None:
                    return self._outcome(future)
                await self._wait()
            if self._failure is not None:
                raise self._failure
        except BaseException:
            await self.close()
            raise
        await self.close()
        return None

    def _outcome(self, future: Future) -> tuple[int, list[Any]]:
        index, length = self._running.pop(future)
        error = _error_of(future)
        return index, future.result() if error is None else [error] * length

    def _ready(self) -> Future | None:
        if self._ordered:
            first = next(iter(self._running), None)
            return first if first is not None and first.done() else None
        return self._done.popleft() if self._done else None

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self.ended:
            raise RuntimeError("this stream was closed while it was read")

    def delivered(self, count: int = 1) -> None:
        """Makes room: the consumer has taken so many results."""
        self._open -= count
        self._room.set()

    async def close(self) -> None:
        """Cancels the pump and what is under way, and waits until they have ended.

        Raises:
            Exception: what the source raised when it was closed.
        """
        self._end()
        under_way = self._under_way()
        if under_way:
            await asyncio.wait(under_way)
        self._running.clear()
        self._done.clear()
        error, self._cleanup_error = self._cleanup_error, None
        if error is not None:
            raise error

    def _end(self) -> None:
        if self.ended:
            return  # cancelled once is enough: the source may await in its finally block
        self.ended = True
        self._wake()
        for future in self._under_way():
            future.cancel()

    def _under_way(self) -> list[asyncio.Future[Any]]:
        candidates: list[asyncio.Future[Any]] = [self._pump, *self._running]
        return [future for future in candidates if not future.done()]

    def abandon(self) -> None:
        """Cancels the same from wherever the garbage collector runs; nobody waits for it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end)


def at_least_one(name: str, value: int) -> int:
    """The value, or a ValueError that names it."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_iterables(user: str, iterables: tuple[AnyIterable, ...]) -> None:
    """Refuses what cannot be iterated, with a TypeError."""
    if not iterables:
        raise TypeError(f"{user}() needs an iterable: {user}(fn, items)")
    for iterable in iterables:
        if not isinstance(iterable, Iterable | AsyncIterable):
            raise TypeError(
                f"{user}() takes iterables after the function, got {type(iterable).__name__}"
            )


@overload
def map_io(
    fn: Callable[..., Awaitable[T]],
    /,
    *iterables: AnyIterable,
    limit: int = 32,
    ordered: bool = False,
    return_exceptions: Literal[False] = False,
) -> Stream[T]: ...
@overload
def map_io(
    fn: Callable[..., Awaitable[T]],
    /,
    *iterables: AnyIterable,
    limit: int = 32,
    ordered: bool = False,
    return_exceptions: bool,
) -> Stream[T | BaseException]: ...
def map_io(
    fn: Callable[..., Awaitable[Any]],
    /,
    *iterables: AnyIterable,
    limit: int = 32,
    ordered: bool = False,
    return_exceptions: bool = False,
) -> Stream[Any]:
    """Runs a coroutine function on the loop for the items of the iterables: a :class:`Stream`.

    ``map_cpu(parse, map_io(download, keys))`` is a pipeline: downloads go on while workers compute,
    and stop when ``map_cpu`` has enough to do.

    Args:
        fn: called with one item of each iterable; what it returns is awaited in a task.
        iterables: sync or async, one or more; the shortest ends the stream.
        limit: the most items that are read and whose result has not been taken, and so the most
            tasks at a time.
        ordered: whether results come in the order of the input, or as they are done.
        return_exceptions: whether an item's exception is its result, or ends the stream.

    Raises:
        TypeError: ``fn`` is no coroutine function, or there is no iterable.
        ValueError: ``limit`` is less than 1.
    """
    check_iterables("map_io", iterables)
    if not callable(fn):
        raise TypeError(f"map_io() takes a coroutine function, got {type(fn).__name__}")
    return Stream(
        "map_io",
        iterables,
        partial(_start_task, fn),
        at_least_one("limit", limit),
        ordered=ordered,
        return_exceptions=return_exceptions,
    )


def _start_task(fn: Callable[..., Awaitable[Any]], batch: Batch) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_task(_await_all(fn, batch))


async def _await_all(fn: Callable[..., Awaitable[Any]], batch: Batch) -> list[Any]:
    return [await _awaitable(fn, args) for args in batch]


def _awaitable(fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Awaitable[Any]:
    awaitable = fn(*args)
    if not isinstance(awaitable, Awaitable):
        name = _call.name_of(fn)
        raise TypeError(
            f"map_io() runs coroutine functions, but {name} returned {type(awaitable).__name__}; "
            f"map_cpu({name}, ...) runs it in workers, and run_blocking({name}, ...) in a thread"
        )
    return awaitable
