"""Streams: order, read-ahead, errors and ends, over futures that the test settles itself."""

import asyncio
import contextlib
import gc
import itertools
import weakref
from random import Random

import anyio
import pytest

from asynclam import JobExitError, PayloadError, _streams, map_io
from asynclam._chunks import FixedLength, MeasuredLength
from asynclam._streams import Stream


class Work:
    """Starts nothing: the test settles each call by its items, when it likes."""

    def __init__(self):
        self.futures = {}
        self.most = 0

    def start(self, chunk, first):
        future = asyncio.get_running_loop().create_future()
        self.futures[tuple(chunk)] = future
        self.most = max(self.most, sum(not future.done() for future in self.futures.values()))
        return future

    def stream(self, *iterables, limit=4, size=1, ordered=True, return_exceptions=False):
        return Stream(
            "map_cpu",
            iterables,
            self.start,
            FixedLength(size, limit),
            ordered=ordered,
            return_exceptions=return_exceptions,
        )

    async def started(self, *items):
        while items not in self.futures:
            await asyncio.sleep(0)
        return self.futures[items]

    async def finish(self, *items):
        (await self.started(*items)).set_result([f"r{item}" for item in items])


async def idle():
    """Lets everything run that can run."""
    for _ in range(20):
        await asyncio.sleep(0)


class Source:
    """An async iterable that knows how far it was read and whether it was closed."""

    def __init__(self, count, error=None):
        self.count, self.error = count, error
        self.read = 0
        self.closed = False

    async def __aiter__(self):
        try:
            while self.read < self.count:
                self.read += 1
                yield self.read
            if self.error:
                raise self.error
        finally:
            self.closed = True


async def test_await_is_a_list_in_input_order():
    """``await`` gives a list in the order of the input, however the work ends."""
    work = Work()
    task = asyncio.ensure_future(work.stream([1, 2, 3], ordered=False).list())
    for item in (3, 1, 2):
        await work.finish(item)
    assert await task == ["r1", "r2", "r3"]


async def test_ordered_stream():
    """An ordered stream waits for the first."""
    work = Work()
    stream = work.stream([1, 2])
    first = asyncio.ensure_future(anext(stream))
    await work.finish(2)
    await idle()
    assert not first.done()
    await work.finish(1)
    assert await first == "r1"
    assert await anext(stream) == "r2"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_unordered_stream():
    """An unordered stream gives what is done."""
    work = Work()
    stream = work.stream([1, 2], ordered=False)
    first = asyncio.ensure_future(anext(stream))
    await work.finish(2)
    assert await first == "r2"
    await work.finish(1)
    assert [result async for result in stream] == ["r1"]


async def test_nothing_starts_before_it_is_used():
    """Making a stream reads nothing and starts nothing."""
    work, source = Work(), Source(3)
    stream = work.stream(source)
    await idle()
    assert (source.read, work.futures) == (0, {})
    await stream.aclose()


@pytest.mark.parametrize(("limit", "size"), [(1, 1), (3, 1), (4, 2), (5, 2)])
async def test_never_reads_further_ahead_than_limit(limit, size):
    """Items read and not delivered are never more than ``limit``, batches included."""
    work, source = Work(), Source(20)
    stream = work.stream(source, limit=limit, size=size, ordered=False)
    first = asyncio.ensure_future(anext(stream))
    await idle()
    ahead = limit // size * size
    assert source.read == ahead
    for future, items in [(future, items) for items, future in work.futures.items()]:
        future.set_result([f"r{item}" for item in items])
    await first
    await idle()
    # One is delivered: there is room for another batch as soon as a whole one was taken.
    assert source.read == ahead + (1 if size == 1 else 0 if limit % size == 0 else 2)
    await stream.aclose()
    assert source.closed


async def test_the_first_error_cancels_the_rest():
    """The first error is raised at once; what is under way is cancelled, the source closed."""
    work, source = Work(), Source(10)
    stream = work.stream(source)
    first = asyncio.ensure_future(anext(stream))
    (await work.started(3)).set_exception(ValueError("third"))
    with pytest.raises(ValueError, match="third"):
        await first
    assert all(future.cancelled() for items, future in work.futures.items() if items != (3,))
    assert source.closed
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_return_exceptions():
    """With ``return_exceptions`` an error is the result of its item, and nothing is cancelled."""
    work = Work()
    task = asyncio.ensure_future(work.stream([1, 2], return_exceptions=True).list())
    error = ValueError("first")
    (await work.started(1)).set_exception(error)
    await work.finish(2)
    assert await task == [error, "r2"]


async def test_an_error_of_a_batch_is_that_of_each_item():
    """A batch that fails as a whole gives its error for each of its items."""
    work = Work()
    task = asyncio.ensure_future(work.stream([1, 2, 3], size=2, return_exceptions=True).list())
    error = ValueError("both")
    (await work.started(1, 2)).set_exception(error)
    await work.finish(3)
    assert await task == [error, error, "r3"]


async def test_an_error_of_the_source():
    """What the source raises is raised, and what is under way cancelled."""
    work = Work()
    stream = work.stream(Source(1, RuntimeError("source")))
    with pytest.raises(RuntimeError, match="source"):
        await stream
    assert all(future.cancelled() for future in work.futures.values())


async def test_an_error_of_the_start():
    """What cannot be started (an unpicklable item) ends the stream as an error does."""

    def start(chunk, first):
        raise ValueError("cannot start")

    source = Source(3)
    stream = Stream(
        "map_cpu", (source,), start, FixedLength(1, 4), ordered=True, return_exceptions=False
    )
    with pytest.raises(ValueError, match="cannot start"):
        await stream
    assert source.closed


async def test_leaving_early():
    """``async with`` cancels what is not done, and closes the source."""
    work, source = Work(), Source(10)
    async with work.stream(source) as stream:
        first = asyncio.ensure_future(anext(stream))
        await work.finish(1)
        assert await first == "r1"
    assert source.closed
    assert all(future.done() for future in work.futures.values())


async def test_cancelling_the_consumer():
    """A cancel of whoever waits cancels the work, and is a cancel."""
    work, source = Work(), Source(10)
    task = asyncio.ensure_future(work.stream(source).list())
    await work.started(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed
    assert all(future.cancelled() for future in work.futures.values())


async def test_work_that_cancels_itself():
    """A call that ends cancelled by itself is an error of the call, not a cancel of the consumer."""
    work = Work()
    task = asyncio.ensure_future(work.stream([1]).list())
    (await work.started(1)).cancel()
    with pytest.raises(JobExitError):
        await task


async def test_dropped_unfinished():
    """A stream that is dropped is cancelled, with a ResourceWarning that says what to write."""
    work, source = Work(), Source(10)
    stream = work.stream(source)
    first = asyncio.ensure_future(anext(stream))
    await work.finish(1)
    await first
    with pytest.warns(ResourceWarning, match="async with map_cpu"):
        del stream, first
    await idle()
    assert source.closed
    assert all(future.done() for future in work.futures.values())


async def test_finished_is_not_dropped():
    """A stream that was read to its end warns of nothing."""
    work = Work()
    stream = work.stream([])
    assert await stream.list() == []
    del stream
    gc.collect()


async def test_used_twice():
    """A stream is used once: the second use says so."""
    stream = Work().stream([])
    await stream
    with pytest.raises(RuntimeError, match="used already"):
        await stream


async def test_two_readers():
    """A second task that reads the same stream is refused; the first is unharmed."""
    work = Work()
    stream = work.stream([1])
    first = asyncio.ensure_future(anext(stream))
    await idle()
    with pytest.raises(RuntimeError, match="two tasks"):
        await anext(stream)
    await work.finish(1)
    assert await first == "r1"
    await stream.aclose()


async def test_closing_under_a_reader():
    """Who reads a stream that another task closes is told so, and not that it has ended."""
    stream = Work().stream([1])
    first = asyncio.ensure_future(anext(stream))
    await idle()
    await stream.aclose()
    with pytest.raises(RuntimeError, match="closed while it was read"):
        await first


async def test_closed_before_use():
    """A stream that was closed gives nothing, and starts nothing."""
    work = Work()
    stream = work.stream([1])
    await stream.aclose()
    assert [result async for result in stream] == []
    with pytest.raises(RuntimeError, match="used already"):
        await stream
    assert work.futures == {}


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), BaseException("plain")], ids=["cancelled", "base"]
)
async def test_a_source_that_is_cancelled(error):
    """A source that ends cancelled by itself is an error: the stream is not cut short silently."""

    async def source():
        yield 1
        raise error

    work = Work()
    task = asyncio.ensure_future(work.stream(source()).list())
    await work.started(1)
    with pytest.raises(JobExitError):
        await task
    _unraised(asyncio.all_tasks())


def _unraised(tasks):
    """A BaseException of the source is its task's, too; asyncio would log that nobody saw it."""
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()


async def test_an_error_in_the_sources_cleanup():
    """What the source raises when it is closed early is raised by the close."""

    async def source():
        try:
            yield 1
            yield 2
        finally:
            raise KeyError("cleanup")

    work = Work()
    stream = work.stream(source(), limit=1)
    first = asyncio.ensure_future(anext(stream))
    await work.finish(1)
    await first
    with pytest.raises(KeyError, match="cleanup"):
        await stream.aclose()
    await stream.aclose()


async def test_a_source_may_await_in_its_cleanup():
    """The source is cancelled once: what it awaits in its finally block is not interrupted."""
    events = []

    async def source():
        try:
            yield 1
            await asyncio.get_running_loop().create_future()
        finally:
            events.append("begin")
            for _ in range(5):
                await asyncio.sleep(0)
            events.append("end")

    work = Work()
    task = asyncio.ensure_future(work.stream(source()).list())
    await work.started(1)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle()
    assert events == ["begin", "end"]


async def test_a_source_that_keeps_the_cancel_to_itself():
    """Then it is read no further, nothing is started of what it gives, and the close returns."""

    class Item:
        pass

    items = []

    async def source():
        yield 1
        with contextlib.suppress(asyncio.CancelledError):  # as wait_for() does before Python 3.12
            await asyncio.get_running_loop().create_future()
        while True:
            item = Item()
            items.append(weakref.ref(item))
            yield item
            del item

    work = Work()
    stream = work.stream(source(), size=1, limit=2)
    first = asyncio.ensure_future(anext(stream))
    await work.finish(1)
    await first
    await idle()
    closing = asyncio.ensure_future(stream.aclose())
    await idle()
    assert closing.done()
    assert list(work.futures) == [(1,)]
    assert [item() for item in items] == [None], "one was read, and nobody has it"


async def test_one_of_several_sources_that_keeps_the_cancel_to_itself():
    """Those beside it are not awaited any more."""

    async def keeps_it():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        yield 1

    async def never():
        await asyncio.get_running_loop().create_future()
        yield 2

    work = Work()
    task = asyncio.ensure_future(work.stream(keeps_it(), never()).list())
    await idle()
    task.cancel()
    await idle()
    assert task.cancelled()
    assert work.futures == {}


@pytest.fixture
def long_turns(monkeypatch):
    """Whenever somebody looks at the clock, others are due."""
    seconds = itertools.count()
    monkeypatch.setattr(_streams, "perf_counter", lambda: float(next(seconds)))


async def taken_before_others_are_let_run(stream, work):
    """The first results of a chunk of 20: the next one is taken just before others have a turn."""
    first = asyncio.ensure_future(anext(stream))
    await work.finish(*range(1, 21))
    return [await first, await anext(stream), await anext(stream)]


def results(first, last):
    return [f"r{number}" for number in range(first, last + 1)]


@pytest.mark.parametrize("how", ["task", "scope"])
async def test_a_cancel_as_others_are_let_run(long_turns, how):
    """It cancels the rest as any other does; what has come by then still comes, and once."""
    work, source = Work(), Source(40)
    stream = work.stream(source, size=20, limit=40)
    assert await taken_before_others_are_let_run(stream, work) == results(1, 3)
    under_way = await work.started(*range(21, 41))
    scope = anyio.CancelScope()

    async def read():
        with scope:
            return await anext(stream)
        raise asyncio.CancelledError

    task = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    (task if how == "task" else scope).cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert under_way.cancelled()
    assert source.closed
    assert [result async for result in stream] == results(4, 20)


async def test_closing_as_others_are_let_run(long_turns):
    """A stream that was closed gives nothing, nor what its reader has been cancelled with."""
    work = Work()
    stream = work.stream(range(1, 41), size=20, limit=40)
    await taken_before_others_are_let_run(stream, work)
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    task.cancel()
    await stream.aclose()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [result async for result in stream] == []


@pytest.mark.parametrize("turns", range(1, 6))
@pytest.mark.parametrize("bounded", [False, True])
async def test_no_result_is_lost_to_a_cancel(long_turns, bounded, turns):
    """Whenever it comes, and whatever becomes of it: each result comes once, in order."""
    work = Work()
    stream = work.stream(range(1, 21), size=20, limit=20)
    taken = await taken_before_others_are_let_run(stream, work)
    reading = anext(stream)
    task = asyncio.ensure_future(asyncio.wait_for(reading, 3600) if bounded else reading)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        taken.append(task.result())
    assert taken + [result async for result in stream] == results(1, 20)


async def test_an_item_that_cannot_be_started():
    """With ``return_exceptions`` an item that cannot be sent has its error as its result."""
    work = Work()
    refusal = ValueError("cannot be pickled")

    def start(chunk, first):
        if chunk == [2]:
            raise refusal
        return work.start(chunk, first)

    stream = Stream(
        "map_cpu", ([1, 2],), start, FixedLength(1, 4), ordered=True, return_exceptions=True
    )
    task = asyncio.ensure_future(stream.list())
    await work.finish(1)
    assert await task == ["r1", refusal]


def test_another_loop():
    """A stream is read in one loop: another is told so, and does not wait for ever."""
    loop, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    work = Work()

    async def begin():
        stream = work.stream([1, 2], limit=1)
        first = asyncio.ensure_future(anext(stream))
        await work.finish(1)
        await first
        return stream

    async def read(stream):
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(stream)

    stream = loop.run_until_complete(begin())
    other.run_until_complete(read(stream))
    loop.run_until_complete(stream.aclose())
    loop.close()
    other.close()


async def test_sync_and_async_sources_are_zipped():
    """Several iterables of both kinds go side by side, until the shortest ends."""

    async def join(a, b, c):
        return f"{a}{b}{c}"

    source = Source(3)
    assert await map_io(join, [1, 2], source, "abc", ordered=True) == ["11a", "22b"]
    assert source.closed


@pytest.mark.usefixtures("no_turns")
async def test_the_limit_of_map_io():
    """``map_io`` runs at most ``limit`` coroutines at a time."""
    running = most = 0

    async def call(item):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return item

    assert await map_io(call, range(20), limit=3) == list(range(20))
    assert most == 3


async def test_a_plain_function_for_map_io():
    """A function that returns no awaitable is refused, with what runs it instead."""
    with pytest.raises(TypeError, match=r"map_cpu\(builtins.abs"):
        await map_io(abs, [1])


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((abs,), {}, TypeError, "needs an iterable"),
        ((abs, 5), {}, TypeError, "takes iterables"),
        ((5, [1]), {}, TypeError, "coroutine function"),
        ((abs, [1]), {"limit": 0}, ValueError, "limit must be at least 1"),
    ],
)
def test_bad_arguments(args, options, error, message):
    """Bad arguments are refused at the call, before anything runs."""
    with pytest.raises(error, match=message):
        map_io(*args, **options)


# --- chunks that are measured --------------------------------------------------------------------


class Measured(Work):
    """Work whose chunks have lengths that the test tells by what it lets them measure."""

    def __init__(self, workers=2, limit=None):
        super().__init__()
        self.lengths = MeasuredLength(workers, limit)

    def measure(self, microseconds, items=10_000):
        """As if so many items had run, so long each."""
        self.lengths.measured(items, items * microseconds, 1)

    def stream(self, *iterables, ordered=True, return_exceptions=False):
        return Stream(
            "map_cpu",
            iterables,
            self.start,
            self.lengths,
            ordered=ordered,
            return_exceptions=return_exceptions,
        )


class Feed:
    """An async source that has what the test puts into it, and makes the reader wait for the rest."""

    def __init__(self):
        self.queue = asyncio.Queue()

    def put(self, *items):
        for item in items:
            self.queue.put_nowait(item)

    async def __aiter__(self):
        while (item := await self.queue.get()) is not None:
            yield item


async def test_all_workers_have_single_items_first():
    """The first items go alone, two for each worker, and no more is read."""
    work, source = Measured(), Source(100)
    task = asyncio.ensure_future(work.stream(source).list())
    await idle()
    assert list(work.futures) == [(1,), (2,), (3,), (4,)]
    assert source.read == 4
    task.cancel()
    await asyncio.wait([task])


async def test_what_comes_while_workers_are_hungry():
    """An item of a source that makes us wait goes at once, though its chunk could be longer."""
    work, source = Measured(), Feed()
    work.measure(100)  # ten are worth a chunk
    task = asyncio.ensure_future(work.stream(source).list())
    for number in range(2):
        source.put(number)
        await work.started(number)
    source.put(2, 3, 4)
    await idle()
    assert len(work.futures) == 2  # both workers have enough to do
    await work.finish(0)
    await work.finish(2, 3, 4)
    source.put(None)
    await work.finish(1)
    assert await task == ["r0", "r1", "r2", "r3", "r4"]


async def test_what_comes_at_once_goes_together(monkeypatch):
    """Items that a source has ready are one chunk, not one each, also while workers are hungry."""
    monkeypatch.setattr(
        _streams, "perf_counter", lambda: 0.0
    )  # nothing takes long, whatever it takes
    work = Measured()
    work.measure(1)
    task = asyncio.ensure_future(work.stream(Source(500)).list())
    await work.finish(*range(1, 501))
    assert len(await task) == 500


async def test_a_source_is_not_interrupted():
    """Items are sent while the source is awaited; its ``__anext__`` is neither cancelled nor run twice."""
    events = []

    async def source():
        yield 1
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    work = Measured()
    work.measure(1)
    async with work.stream(source()) as stream:
        first = asyncio.ensure_future(anext(stream))
        await work.finish(1)
        assert await first == "r1"
        assert events == []
    assert events == ["cancelled"]


@pytest.mark.usefixtures("no_turns")
async def test_a_given_limit_holds():
    """With a limit, no more is read, whatever the chunks are; all workers find some in it."""
    work, source = Measured(limit=20), Source(1000)
    work.measure(1)
    stream = work.stream(source)
    first = asyncio.ensure_future(anext(stream))
    await idle()
    assert source.read == 20
    assert [len(items) for items in work.futures] == [5, 5, 5, 5]
    await work.finish(1, 2, 3, 4, 5)
    await first
    await idle()
    assert source.read == 20  # of the first chunk, four are still to be taken
    for _ in range(4):
        await anext(stream)
    await idle()
    assert source.read == 25
    await stream.aclose()


@pytest.mark.usefixtures("no_turns")
async def test_a_slow_consumer_slows_the_source():
    """Without a limit, twice the chunks that the workers can run are read, and not more."""
    work = Measured()
    work.measure(100)  # 500 items in the aim
    stream = work.stream(iter(range(1_000_000)))
    first = asyncio.ensure_future(anext(stream))
    await work.started(*range(500))
    await idle()
    assert [len(items) for items in work.futures] == [500] * 4
    await work.finish(*range(500))
    await first
    await idle()
    assert len(work.futures) == 4
    for _ in range(499):
        await anext(stream)
    await idle()
    assert len(work.futures) == 5
    await stream.aclose()


async def test_an_endless_source():
    """A source that never ends and never awaits does not hold up the loop, nor do its results."""

    async def endless():
        while True:
            yield 1

    for source in (itertools.repeat(1), iter(int, 1), endless()):
        work = Measured()
        work.measure(1)
        async with work.stream(source, ordered=False) as stream:
            first = asyncio.ensure_future(anext(stream))
            await idle()
            items, future = next(iter(work.futures.items()))
            future.set_result(list(items))
            assert await first in (0, 1)


async def test_an_item_of_a_chunk_that_cannot_be_started():
    """With ``return_exceptions`` it alone has the error: its neighbours are started without it."""
    work = Measured()
    work.measure(1)

    def start(chunk, first):
        if 5 in chunk:
            raise PayloadError(f"{first}")
        future = work.start(chunk, first)
        future.set_result([f"r{item}" for item in chunk])
        return future

    stream = Stream(
        "map_cpu", (range(8),), start, work.lengths, ordered=True, return_exceptions=True
    )
    results = await stream
    assert results[:5] + results[6:] == [f"r{item}" for item in (0, 1, 2, 3, 4, 6, 7)]
    assert results[5].args == ("5",)  # by its index in the input
    stream = Stream(
        "map_cpu", (range(8),), start, work.lengths, ordered=True, return_exceptions=False
    )
    with pytest.raises(PayloadError, match="5"):
        await stream


async def test_nothing_is_started_after_an_error():
    """Once a chunk has failed, what is collected is not sent any more."""
    work, source = Measured(), Feed()
    work.measure(100)  # ten are worth a chunk
    stream = work.stream(source)
    first = asyncio.ensure_future(anext(stream))
    for number in range(2):
        source.put(number)
        await work.started(number)
    source.put(2, 3)
    await idle()
    work.futures[1,].set_exception(ValueError("second"))
    with pytest.raises(ValueError, match="second"):
        await first
    assert list(work.futures) == [(0,), (1,)]


@pytest.mark.parametrize("ordered", [True, False])
async def test_chunks_of_any_length(ordered):
    """All items come once, in order where that is asked for, however long the chunks are."""
    lengths = MeasuredLength(2)
    random = Random(1)

    def start(chunk, first):
        future = asyncio.get_running_loop().create_future()
        lengths.measured(len(chunk), random.choice([1, 1000, 100_000]), 10)
        asyncio.get_running_loop().call_soon(future.set_result, list(chunk))
        return future

    async def async_source():
        for number in range(3000):
            if not random.randrange(50):
                await asyncio.sleep(0)
            yield number

    for source in (range(3000), list(range(3000)), iter(range(3000)), async_source()):
        stream = Stream(
            "map_cpu", (source,), start, lengths, ordered=ordered, return_exceptions=False
        )
        results = [result async for result in stream]
        assert (results if ordered else sorted(results)) == list(range(3000))


async def test_room_that_comes_while_it_is_sought():
    """What is collected may be sent, and done, before the pump would wait: then it does not."""
    work = Work()
    lengths = Growing()
    stream = Stream(
        "map_cpu", ([1, 2, 3],), work.start, lengths, ordered=True, return_exceptions=False
    )
    first = asyncio.ensure_future(anext(stream))
    await work.finish(1)
    await work.finish(2)
    await work.finish(3)
    assert [await first, await anext(stream), await anext(stream)] == ["r1", "r2", "r3"]
    await stream.aclose()


class Growing(FixedLength):
    """A limit that is larger the second time that it is asked for, and from then on."""

    def __init__(self):
        super().__init__(1, 1)
        self._asked = 0

    def limit(self, length):
        self._asked += 1
        return 3 if self._asked > 1 else 0


async def test_the_first_error_counts():
    """What fails after it, and what the source raises meanwhile, is not raised."""
    work = Work()
    stream = work.stream([1, 2])
    task = asyncio.ensure_future(stream.list())
    first, second = await work.started(1), await work.started(2)
    first.set_exception(ValueError("first"))
    second.set_exception(ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        await task


def test_dropped_when_its_loop_is_closed():
    """There is nothing to cancel any more, and nobody to do it; the warning is the same."""
    loop = asyncio.new_event_loop()
    work = Work()
    streams = [work.stream(range(10))]

    async def begin():
        task = asyncio.ensure_future(anext(streams[0]))
        await work.finish(0)
        result = await task
        pump = streams[0]._engine._pump
        pump.cancel()  # as asyncio.run() does at its end
        await asyncio.wait([pump])
        return result

    assert loop.run_until_complete(begin()) == "r0"
    loop.close()
    with pytest.warns(ResourceWarning, match="async with map_cpu"):
        streams.clear()
