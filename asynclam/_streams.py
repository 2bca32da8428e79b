"""Streams: many calls with bounded read-ahead, ordered or not, over any kind of future.

A stream knows how to start the work on one chunk of items: ``start(chunk, first)`` returns a
future, and cancelling that future cancels the work. What stands behind it, a worker or a coroutine,
it does not know. How long the chunks are, others decide (``_chunks``).

Theory of operation. One task, the pump, reads the source and starts chunks while there is room
between the source and the consumer; so nothing is read that could not be delivered, and a slow
consumer slows the source. What is read is collected until it makes a chunk. A source that makes the
pump wait does not make workers wait: while some are hungry, what is collected goes at the next turn
of the loop, and when a chunk is done. So it is never the pump alone that starts work, and nobody
has to interrupt it while it awaits the source.

The consumer takes futures as they are done, in the order asked for. The first error ends the
stream: the pump and what is under way are cancelled and awaited, the source is closed, then the
error is raised. The engine knows nothing of the handle that the user has, so that a handle that is
dropped is noticed and the rest cancelled. They share the results that are there and not yet taken:
they count as read.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable, Sequence
from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from . import _call
from ._chunks import FixedLength, Lengths
from ._errors import JobExitError, PayloadError
from ._sources import TURN, AnyIterable, Source

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

T = TypeVar("T")
Chunk = Sequence[Any]  # of items; of several iterables, of tuples of one item of each
Future = asyncio.Future[list[Any]]  # of the results of one chunk
Start = Callable[[Chunk, int], Future]  # given the chunk, and the index of its first item

_GLANCE = 16  # results that are taken between two looks at the clock


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
        lengths: Lengths,
        *,
        ordered: bool,
        return_exceptions: bool,
    ) -> None:
        self._name = name
        self._ordered = ordered
        self._results: deque[T] = deque()  # of the chunk that is being delivered
        self._new_engine = partial(
            _Engine, iterables, start, lengths, self._results, return_exceptions=return_exceptions
        )
        self._engine: _Engine | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        results = self._results
        if not results:
            await self._refill()
        result = results.popleft()
        left = len(results)
        # Per item no more than this: neither a call nor the clock.
        if left <= self._engine.room_at or not left % _GLANCE:  # type: ignore[union-attr]
            try:
                await self._engine.taken()  # type: ignore[union-attr]
            except asyncio.CancelledError:
                if not self._closed:
                    results.appendleft(result)  # nobody has it
                await self._engine.close()  # type: ignore[union-attr]
                raise
        return result

    async def _refill(self) -> None:
        if self._closed:
            raise StopAsyncIteration
        engine = self._engine or self._begin(ordered=self._ordered)
        while not self._results:
            chunk = await engine.next()
            if chunk is None:
                raise StopAsyncIteration
            self._results.extend(chunk[1])

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self.list().__await__()

    async def list(self) -> list[T]:
        """All results, in the order of the input."""
        if self._engine or self._closed:
            raise RuntimeError(f"this {self._name}() stream was used already; make another one")
        engine = self._begin(ordered=False)
        chunks: dict[int, list[T]] = {}
        try:
            while (chunk := await engine.next()) is not None:
                chunks[chunk[0]] = chunk[1]
        finally:
            await engine.close()
        return list(chain.from_iterable(chunks[first] for first in sorted(chunks)))

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
        lengths: Lengths,
        results: deque[Any],
        *,
        ordered: bool,
        return_exceptions: bool,
    ) -> None:
        self._source = Source(iterables)
        self._start = start
        self._lengths = lengths
        self._ordered = ordered
        self._return_exceptions = return_exceptions
        self._loop = asyncio.get_running_loop()
        self._collected: list[Any] = []  # items read and not started
        self._started = 0  # items, since the beginning
        self._open = 0  # of those, items whose chunk the consumer does not have
        self._results = results  # the rest of a chunk that it has
        self.room_at = -1  # how few of these make the room that the pump waits for
        self._room = asyncio.Event()
        self._flush_is_due = False
        self._under_way = 0  # chunks that have not ended
        self._running: dict[Future, tuple[int, int]] = {}  # first item and length, in order
        self._done: deque[Future] = deque()  # as they ended, if that is the order wanted
        self._exhausted = False
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._cleanup_error: BaseException | None = None
        self._turn = perf_counter()  # when the consumer last let others run
        self.ended = False
        self._pump = self._loop.create_task(self._read_source())

    # --- from the source to work -----------------------------------------------------------------

    async def _read_source(self) -> None:
        try:
            try:
                self._source.open()
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
        source, lengths = self._source, self._lengths
        turn = perf_counter()
        while self._failure is None and not self.ended:  # a source may keep the cancel to itself
            if perf_counter() - turn > TURN:
                self._flush()
                await asyncio.sleep(0)
                turn = perf_counter()
            length = lengths.next(source.read, source.remaining)
            if source.exhausted:
                length = min(length, len(self._collected))
                if not length:
                    return
            if not self._has_room(length):
                await self._wait_for_room(length)
            elif len(self._collected) >= length:
                self._send(length)
            elif source.is_async:
                await self._read_on(length - len(self._collected))
                self._flush_soon()
            else:
                items = source.items(length - len(self._collected))
                if not lengths.shortened_by(items) and len(items) == length:
                    self._launch(items)  # as it is
                else:
                    self._collected += items
                    self._flush_soon()

    async def _read_on(self, most: int) -> None:
        """Collects what an async source has, until it makes us wait: then others may be hungry."""
        source = self._source
        end = perf_counter() + TURN
        self._flush_at_the_next_turn()
        for _ in range(most):
            try:
                item = await source.next()
            except StopAsyncIteration:
                source.exhausted = True
                break
            if self.ended:
                return  # pragma: no cover - in a frame that throw() goes on with, unseen by coverage
            source.read += 1
            self._collected.append(item)  # there meanwhile may be another list
            del item  # the next one may wait for the memory of this one
            if not self._flush_is_due or perf_counter() > end:
                break
        self._lengths.shortened_by(self._collected)

    def _has_room(self, length: int) -> bool:
        return len(self._results) <= self._room_for(length)

    def _room_for(self, length: int) -> int:
        """How few results the consumer may have left, so that a chunk of that length may start."""
        return self._lengths.limit(length) - length - self._open

    async def _wait_for_room(self, length: int) -> None:
        self._flush()  # there is room for what is collected
        if not self._has_room(length):
            self.room_at = self._room_for(length)
            self._room.clear()
            await self._room.wait()
            self.room_at = -1

    def _flush_soon(self) -> None:
        """Sends what is collected while somebody is hungry, if the source makes us wait."""
        if self._lengths.share(len(self._collected), self._under_way):
            self._flush_at_the_next_turn()

    def _flush_at_the_next_turn(self) -> None:
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush_is_due = False
        self._flush()

    def _flush(self) -> None:
        """Sends what is collected while workers are hungry, though it makes no whole chunk."""
        try:
            while self._failure is None and not self.ended:
                length = self._lengths.share(len(self._collected), self._under_way)
                if not length:
                    return
                self._send(length)
        except Exception as error:
            self._fail(error)

    def _send(self, length: int) -> None:
        chunk, self._collected = self._collected, []
        if length < len(chunk):
            chunk, self._collected = chunk[:length], chunk[length:]
        self._launch(chunk)

    def _launch(self, chunk: Chunk) -> None:
        try:
            future = self._start(chunk, self._started)
        except Exception as error:
            if isinstance(error, PayloadError) and len(chunk) > 1:
                # One item, or too much of them together: its neighbours can be sent.
                middle = len(chunk) // 2
                self._launch(chunk[:middle])
                self._launch(chunk[middle:])
                return
            if not self._return_exceptions:
                raise
            future = self._loop.create_future()
            future.set_exception(error)
        self._running[future] = self._started, len(chunk)
        self._started += len(chunk)
        self._open += len(chunk)
        self._under_way += 1
        future.add_done_callback(self._on_done)

    def _on_done(self, future: Future) -> None:
        error = _error_of(future)  # seen, so that nothing is logged of it
        if self.ended:
            return
        self._under_way -= 1
        if error is not None and not self._return_exceptions:
            self._fail(error)
        if not self._ordered:
            self._done.append(future)
        self._flush()
        self._room.set()  # chunks may be longer now
        self._wake()

    def _fail(self, error: BaseException) -> None:
        if self.ended:
            self._cleanup_error = error
        elif self._failure is None:
            self._failure = error
        self._wake()

    # --- from work to the consumer ---------------------------------------------------------------

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> tuple[int, list[Any]] | None:
        """The next chunk of results with the index of its first, or ``None`` after the last."""
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
        first, length = self._running.pop(future)
        self._open -= length
        self._room.set()  # in case that nobody puts them into the results
        error = _error_of(future)
        return first, future.result() if error is None else [error] * length

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
            self._turn = perf_counter()
        if self.ended:
            raise RuntimeError("this stream was closed while it was read")

    async def taken(self) -> None:
        """The consumer has taken results: makes room, and lets others run after a while."""
        if len(self._results) <= self.room_at:
            self._room.set()
        if perf_counter() - self._turn > TURN:
            await asyncio.sleep(0)
            self._turn = perf_counter()

    async def close(self) -> None:
        """Cancels the pump and what is under way, and waits until they have ended.

        A cancel meanwhile cancels once more what is under way, and waits no longer.

        Raises:
            Exception: what the source raised when it was closed.
        """
        self._end()
        pending = self._pending()
        if pending:
            from ._grace import shield

            try:
                with shield():
                    await asyncio.wait(pending)
            except BaseException:
                for future in self._running:
                    future.cancel()
                raise
        self._running.clear()
        self._done.clear()
        error, self._cleanup_error = self._cleanup_error, None
        if error is not None:
            raise error

    def _end(self) -> None:
        if self.ended:
            return  # cancelled once is enough: the source may await in its finally block
        self.ended = self._source.exhausted = True
        self._collected = []
        self._wake()
        for future in self._pending():
            future.cancel()

    def _pending(self) -> list[asyncio.Future[Any]]:
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
        partial(_start_task, fn if len(iterables) == 1 else partial(_spread, fn)),
        FixedLength(1, at_least_one("limit", limit)),
        ordered=ordered,
        return_exceptions=return_exceptions,
    )


def _spread(fn: Callable[..., T], items: tuple[Any, ...]) -> T:
    return fn(*items)


def _start_task(fn: Callable[[Any], Awaitable[Any]], chunk: Chunk, _: int) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_task(_await_all(fn, chunk))


async def _await_all(fn: Callable[[Any], Awaitable[Any]], chunk: Chunk) -> list[Any]:
    return [await _awaitable(fn, item) for item in chunk]


def _awaitable(fn: Callable[[Any], Awaitable[Any]], item: Any) -> Awaitable[Any]:
    awaitable = fn(item)
    if not isinstance(awaitable, Awaitable):
        name = _call.name_of(fn)
        raise TypeError(
            f"map_io() runs coroutine functions, but {name} returned {type(awaitable).__name__}; "
            f"map_cpu({name}, ...) runs it in workers, and run_blocking({name}, ...) in a thread"
        )
    return awaitable
