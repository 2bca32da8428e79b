"""The promises to callers: run this in a worker, in a thread, or on the loop, and await it."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextvars import Context, ContextVar, copy_context
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

# What a job does not need is imported where it is used: a program waits for its first result.
from . import _call, _context, _payload, _sizing, _steps, _wire
from ._errors import ExecutorClosedError, PayloadError
from ._job import USUAL, Terms
from ._pools import Pools, kill_in_loop

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from ._chunks import Lengths
    from ._inline import InlinePool
    from ._job import Job
    from ._pool import Pool
    from ._sources import AnyIterable
    from ._statistics import Statistics
    from ._streams import Chunk, Stream, map_io
    from ._threads import Threads

_FEW = 64  # items of a chunk among which large ones are looked for: there are none among many

P = ParamSpec("P")
T = TypeVar("T")


class _MapIO:
    """Executor.map_io, until it is first looked up."""

    def __get__(self, executor: object, owner: type[Executor]) -> Any:
        from ._streams import map_io

        owner.map_io = staticmethod(map_io)
        return map_io


class Executor:
    """Runs functions in worker processes that are fed by the event loop.

    As an async context manager it belongs to the running loop: the normal end of the block waits
    for the jobs, an exception kills them. Without ``async with`` it serves one event loop after
    the other, as the default executor does, and its workers live on in between.

    Args:
        max_workers: the most worker processes at a time. ``None``: as many as make use of the
            machine (:func:`asynclam.environment`), or ``ASYNCLAM_MAX_WORKERS``. 0: jobs run in this process, pickled all the same, and block the loop.
        initializer: called in each worker before its first job. A coroutine function runs on the loop
            that :meth:`run_async` uses.
        initargs: its arguments.
        max_tasks_per_child: how many jobs a worker runs before it is replaced; a chunk of
            ``map_cpu`` counts as one. ``None``: as many as come.
        max_memory_per_child: bytes of memory that a worker may have taken when a job has ended;
            one that has more is replaced. What it has inherited, and shared memory, do not count; the
            job's result does. Looking takes 6 µs a job. ``None``: as much as there is.
        start_method: how the fork server is started. ``"fork"``: from this process, so that what is
            imported here is there; safe only while this process has a single thread.
            ``"spawn"``: as a fresh interpreter. ``"auto"``: fork while that is safe and cheap.
        context_vars: context variables whose values jobs have, as they are where the call is made
            (of ``map_cpu``: where the stream is made). They must be at the top level of a module.

    Raises:
        ValueError: ``max_workers`` is negative, ``start_method`` is none of the three, a limit is
            less than 1, memory cannot be measured on this system, or one of ``context_vars`` is in
            no module.
        TypeError: ``max_workers`` or a limit is no integer, or ``initializer`` cannot be called.
        PayloadError: the initializer or its arguments cannot be pickled.
    """

    _terms: Terms = USUAL  # of its jobs; a view has its own
    _flags = 0  # of their calls

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[object, ...] = (),
        max_tasks_per_child: int | None = None,
        max_memory_per_child: int | None = None,
        start_method: Literal["auto", "fork", "spawn"] = "auto",
        context_vars: Iterable[ContextVar[Any]] = (),
    ) -> None:
        self._max_workers = _checked_workers(max_workers)
        if start_method not in ("auto", "fork", "spawn"):
            raise ValueError(f'start_method is "auto", "fork" or "spawn", not {start_method!r}')
        self._start_method = start_method
        self._max_tasks = _checked_limit("max_tasks_per_child", max_tasks_per_child)
        self._max_memory = _checked_limit("max_memory_per_child", max_memory_per_child)
        self._initializer = _pickled_initializer(initializer, initargs)
        self._in_main = _payload.dumps_in_main((initializer, initargs))
        self._variables = _context.Variables(context_vars) if context_vars else None
        self._pools = Pools(self._max_workers)
        self._pool: Pool | InlinePool | None = None  # that of the loop that asked last
        self._entered: asyncio.AbstractEventLoop | None = None
        self._closed: str = ""
        self._process = os.getpid()

    @cached_property
    def _threads(self) -> Threads:
        from ._threads import Threads

        return Threads()

    # --- jobs ------------------------------------------------------------------------------------

    async def run_cpu(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs ``fn`` in a worker process and returns its result.

        Function, arguments and result are pickled (protocol 5; with cloudpickle where pickle refuses).
        A ``SharedBuffer`` travels without a copy. What the function raises is raised here, with
        the worker's traceback shown.

        A cancel stops the work: the worker that runs it is killed and replaced; a job that has not
        begun is dropped; no other job is harmed. :meth:`options` can give the job time to clean up.

        Raises:
            TypeError: ``fn`` is no plain function.
            PayloadError: an argument, the result or a context variable cannot be pickled.
            WorkerDiedError: the worker died while it ran the job.
            WorkerStartError: no worker could be started.
            JobExitError: the function raised ``SystemExit`` or its like.
            ExecutorClosedError: the executor is closed, or was killed meanwhile.
        """
        if not self._flags:
            _call.check(fn, "run_cpu")
        carried = _context.carried(self._variables)
        pool = self._pool
        if pool is None or self._closed or pool.loop is not asyncio._get_running_loop():
            pool = self._pool_here()
        if (args or kwargs) and _steps.is_large(*args, *kwargs.values()):
            steps = self._new_call_in_steps(fn, args, kwargs)
            pool.expect()
            try:
                call = await pool.rota.run(steps, _call.Call.close)
            finally:
                pool.expect_no_more()
        else:
            call = self._new_call(fn, args, kwargs)
        if carried:
            call.carry(carried)
        del fn, args, kwargs, carried  # the call has them, and 100,000 coroutines may wait here
        job = pool.submit(call, self._terms)
        del call
        try:
            return await job.future  # type: ignore[no-any-return]
        except BaseException as error:
            if _is_given_up(job):
                pool.cancel(job)
            if not self._terms.cancel_grace or job.grace is None:
                raise
            if not isinstance(error, asyncio.CancelledError):
                raise
            cancelled = error
        # Not in the except block: anyio takes a second cancel in whose context its own is for that.
        await _end_of(pool, job)
        raise cancelled

    # Apart from run_cpu, whose frame is kept while it waits: it would have two places more.
    def _new_call(self, fn: Any, args: Any, kwargs: Any) -> _call.Call:
        return _call.Call(fn, args, kwargs, flags=self._flags, shares_main=self._shares_main)

    def _new_call_in_steps(
        self, fn: Any, args: Any, kwargs: Any
    ) -> Generator[None, None, _call.Call]:
        return _call.Call.steps(fn, args, kwargs, flags=self._flags, shares_main=self._shares_main)

    async def run_async(
        self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs the coroutine function ``fn`` in a worker process and returns its result.

            executor = Executor(initializer=make_client)  # may be a coroutine function, too
            rows = await executor.run_async(fetch_and_parse, key)

        For jobs that wait and compute: the requests of thousands of small objects, whose signing and
        parsing would keep the loop here busy. A worker runs up to 64 of them at once, on a loop of
        its own (uvloop where it is installed) which lives as long as the worker. So what the
        initializer makes there, a client say, is for all of them; what they leave there, like tasks
        in the background, goes on. They are spread evenly over the workers; a worker that has
        coroutines is given no plain job. Jobs of both sorts wait in one queue.

        A coroutine that computes holds up the others of its worker, as on any loop. Everything travels
        as with :meth:`run_cpu`, and the errors are the same. If a worker dies, all the coroutines
        that it had begun fail with WorkerDiedError.

        A cancel raises ``asyncio.CancelledError`` in the coroutine, and does not wait for it to end,
        unless ``options(cancel_grace=…)`` says how long to wait. One that has not ended in that time
        (1 second without) keeps its worker from being given more, and the worker is killed as soon as
        it has no others. No other job is harmed.

        Raises:
            TypeError: ``fn`` is no coroutine function.
            PayloadError: an argument, the result or a context variable cannot be pickled.
            WorkerDiedError: the worker died while it ran the job.
            WorkerStartError: no worker could be started.
            JobExitError: the function raised ``SystemExit`` or its like.
            ExecutorClosedError: the executor is closed, or was killed meanwhile.
        """
        _call.check_coroutine_function(fn, "run_async")
        jobs: Any = _View(self, self._terms, _wire.COROUTINE)  # its results are awaited there
        result: T = await jobs.run_cpu(fn, *args, **kwargs)
        return result

    def _shares_main(self) -> bool:
        if self._max_workers == 0:
            return True
        from . import _forkserver

        return _forkserver.shares_main(self._start_method)

    async def run_blocking(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a blocking function in a thread and returns its result.

        At most 32 at once, whatever ``asyncio.to_thread`` is limited to (6 threads on a machine of
        two CPUs); the others wait. Context variables are those of the caller.

        A cancel abandons the thread: nothing can stop it, its result is dropped, and it counts
        against the limit until it returns (``statistics().threads_abandoned``).

        Raises:
            TypeError: ``fn`` is no plain function.
            ExecutorClosedError: the executor is closed.
        """
        _call.check(fn, "run_blocking")
        self._require_open()
        return await self._threads.run(partial(fn, *args, **kwargs))

    @overload
    def map_cpu(
        self,
        fn: Callable[..., T],
        /,
        *iterables: AnyIterable,
        limit: int | None = None,
        ordered: bool = True,
        chunksize: int | None = None,
        return_exceptions: Literal[False] = False,
    ) -> Stream[T]: ...
    @overload
    def map_cpu(
        self,
        fn: Callable[..., T],
        /,
        *iterables: AnyIterable,
        limit: int | None = None,
        ordered: bool = True,
        chunksize: int | None = None,
        return_exceptions: bool,
    ) -> Stream[T | BaseException]: ...
    def map_cpu(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: AnyIterable,
        limit: int | None = None,
        ordered: bool = True,
        chunksize: int | None = None,
        return_exceptions: bool = False,
    ) -> Stream[Any]:
        """Runs ``fn`` in workers for the items of the iterables, as ``map`` does: a :class:`Stream`.

        An item is pickled in one go, which holds up the loop for 0.3 s if it has a million objects: it
        is better given to :meth:`run_cpu`, which does it in turns.

        Args:
            fn: called with one item of each iterable.
            iterables: sync or async, one or more; the shortest ends the stream. Async sources are
                closed at the end.
            limit: the most items that are read and whose result has not been taken. ``None``:
                twice the jobs that the workers can run; with measured chunks that grows with them.
            ordered: whether results come in the order of the input, or as they are done.
            chunksize: how many items make one job, which is the unit of death, of cancellation,
                and of what cannot be unpickled. ``None``: measured. The first items are jobs of
                their own; as long as items turn out to be short, more of them go together, so that
                a job runs 50 ms at most, and its items take 64 KiB. A long item after many short
                ones shares its job with these: where that matters, say 1.
            return_exceptions: whether an item's exception is its result, or ends the stream.

        Raises:
            TypeError: ``fn`` is no plain function, or there is no iterable.
            ValueError: ``limit`` or ``chunksize`` is less than 1.
            PayloadError: a context variable cannot be pickled.
        """
        from ._streams import Stream, check_iterables

        _call.check(fn, "map_cpu")
        check_iterables("map_cpu", iterables)
        lengths = self._lengths(chunksize, limit)
        flags = _wire.CHUNK
        if len(iterables) == 1:
            flags |= _wire.ITEMS
        if return_exceptions:
            flags |= _wire.KEEP_ERRORS
        return Stream(
            "map_cpu",
            iterables,
            partial(
                self._start_chunk,
                fn,
                flags,
                lengths,
                carried=_context.carried(self._variables),
                caller=copy_context(),
            ),
            lengths,
            ordered=ordered,
            return_exceptions=return_exceptions,
        )

    def _lengths(self, chunksize: int | None, limit: int | None) -> Lengths:
        from ._chunks import AIM, INLINE_AIM, FixedLength, MeasuredLength
        from ._streams import at_least_one

        workers = max(1, self._max_workers)
        if limit is not None:
            at_least_one("limit", limit)
        if chunksize is None:
            return MeasuredLength(workers, limit, aim=AIM if self._max_workers else INLINE_AIM)
        at_least_one("chunksize", chunksize)
        return FixedLength(chunksize, 2 * workers * chunksize if limit is None else limit)

    def _start_chunk(
        self,
        fn: Callable[..., Any],
        flags: int,
        lengths: Lengths,
        chunk: Chunk,
        first: int,
        *,
        carried: bytes,
        caller: Context,
    ) -> asyncio.Future[Any]:
        pool, shares_main = self._pool_here(), self._shares_main
        if len(chunk) <= _FEW and _steps.is_large(chunk):
            call = _steps.run(
                _call.Call.steps(fn, chunk, {}, flags=flags, shares_main=shares_main, first=first)
            )
        else:
            call = _call.Call(fn, chunk, {}, flags=flags, shares_main=shares_main, first=first)
        weight = call.weight  # before it is sent, and gone
        if carried:
            call.carry(carried)
        job = pool.submit(call, self._terms)
        job.future.add_done_callback(
            partial(_chunk_done, pool, job, weight, partial(lengths.measured, len(chunk))),
            context=caller,
        )
        if not self._terms.cancel_grace:
            return job.future
        outcome = _Outcome(pool, job)
        task = pool.loop.create_task(_see_to(pool, job))
        task.add_done_callback(lambda _: job.future.cancel())  # if it has not even begun
        return outcome

    # Needs no worker; here so that one object has it all.
    if TYPE_CHECKING:
        map_io = staticmethod(map_io)
    else:
        map_io = _MapIO()

    def options(self, *, retries: int = 0, cancel_grace: float = 0.0) -> Executor:
        """This executor, with other terms for the jobs that are given to it here.

            await executor.options(retries=2).run_cpu(resize, image)

        It has the same workers, limits and life: closing one closes the other. Making it costs
        nothing to speak of.

        Args:
            retries: how often a job is begun again, in another worker, that had begun in a worker
                that died; for functions that may run twice. The error of the last try says how
                many there were. A chunk of ``map_cpu`` is begun again as a whole. A job that had
                not begun is not lost with its worker anyway, and what a function raises is its
                outcome: neither counts.
            cancel_grace: seconds that a cancelled job has to end. :class:`JobCancelled` is raised
                in it, so that its ``finally`` blocks run, and its worker is kept; after that time
                the worker is killed. Whoever was cancelled waits until the job has ended, so that
                what the two share may be released then; a second cancel does not wait, but kills.
                Closing the executor waits for the job, killing it does not. 0: killed at once.

        Neither means anything with ``max_workers=0``: there, a job cannot be cancelled.

        Raises:
            TypeError: ``retries`` is no integer, or ``cancel_grace`` no number.
            ValueError: one of them is negative, or ``cancel_grace`` is not finite.
        """
        return _View(self, Terms(_checked_retries(retries), _checked_grace(cancel_grace)))

    # --- which pool ------------------------------------------------------------------------------

    def _pool_here(self) -> Pool | InlinePool:
        if self._closed:
            self._require_open()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "run_cpu() and map_cpu() need a running asyncio event loop: call them in an "
                "async function that asyncio.run() or lambda_handler runs"
            ) from None
        pool = self._pool
        if pool is None or pool.loop is not loop:
            self._start_server()
            pool = self._pool = self._pool_of(loop)
            self._require_open()  # still: who closes it in another thread may not know this pool
        return pool

    def _pool_of(self, loop: asyncio.AbstractEventLoop) -> Pool | InlinePool:
        if self._process != os.getpid():
            raise RuntimeError(
                f"this executor belongs to process {self._process}, from which process "
                f"{os.getpid()} was forked; make an Executor here"
            )
        if self._entered not in (None, loop):
            raise RuntimeError(
                "this executor was entered (async with) in another event loop; use it there, or "
                "leave out the async with: it then serves each loop with workers of its own"
            )
        return self._pools.of(loop, self._new_pool)

    def _new_pool(self, loop: asyncio.AbstractEventLoop) -> Pool | InlinePool:
        if self._max_workers == 0:
            from ._inline import InlinePool

            return InlinePool(loop)
        from ._pool import Plan, Pool

        plan = Plan(
            self._start_method,
            self._initializer,
            self._pools.limit,
            in_main=self._in_main,
            threads=_sizing.threads_for(self._max_workers),
            max_tasks=self._max_tasks,
            max_memory=self._max_memory,
        )
        return Pool(loop, plan)

    def _start_server(self) -> None:
        """Before the first call is made: whether it goes by reference depends on how it is started."""
        if self._max_workers and self._process == os.getpid():
            from . import _forkserver, _pool  # noqa: F401 - a page written after a fork is copied

            try:
                _forkserver.ensure(self._start_method)
            except OSError:
                pass  # the pool tries again, and tells who waits for a job

    def _require_open(self) -> None:
        if self._closed:
            raise ExecutorClosedError(
                f"this executor was {self._closed}; make another one, or leave the block later"
            )

    def prepare(self) -> None:
        """Starts the fork server now; see :func:`asynclam.prepare`."""
        from . import _forkserver, _server

        if self._max_workers and _server.role == "loop process":
            from . import _pool  # noqa: F401 - else the first job would wait for it

            _forkserver.ensure(self._start_method)

    def prestart(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts a worker for a loop that need not run yet: its first job finds it there."""
        from . import _server

        if not self._max_workers or _server.role != "loop process":
            return
        if self._process == os.getpid() and self._entered in (None, loop) and not self._closed:
            self._pool_of(loop).prestart()  # type: ignore[union-attr]

    # --- its life --------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """What it has under way and has done, over all event loops; counts end with a kill."""
        from ._statistics import Statistics

        counted = self._pools.counted
        ran = counted("ran") / 1e6
        return Statistics(
            max_workers=self._max_workers,
            workers_starting=self._count("starting"),
            workers_idle=self._count("idle"),
            workers_busy=self._count("busy"),
            jobs_queued=self._queued(),
            jobs_running=self._running(),
            jobs_completed=counted("completed"),
            jobs_cancelled=counted("cancelled"),
            jobs_retried=counted("retries"),
            worker_deaths=counted("deaths"),
            workers_spent=counted("spent"),
            workers_grown=counted("grown"),
            queue_seconds=counted("waited"),
            transport_seconds=counted("away") - ran,
            run_seconds=ran,
            segments_in_use=sum(pool.segments for pool in self._pools),
            log_records_dropped=counted("dropped"),
            threads_busy=self._threads.busy,
            threads_abandoned=self._threads.abandoned,
        )

    def under_way(self) -> tuple[list[tuple[str, float]], int]:
        """What its workers run, by name and seconds, the longest first; and how many jobs wait."""
        running = [entry for pool in self._pools for entry in pool.under_way()]
        return sorted(running, key=lambda entry: -entry[1]), self._queued()

    def _count(self, state: str) -> int:
        return sum(pool.count(state) for pool in self._pools)

    def _queued(self) -> int:
        return sum(pool.queued for pool in self._pools)

    def _running(self) -> int:
        return sum(pool.running for pool in self._pools)

    def __repr__(self) -> str:  # imports nothing: __del__ may ask at the interpreter's end
        busy, idle = self._count("busy"), self._count("idle")
        closed = f"{self._closed} | " if self._closed else ""
        return (
            f"<Executor [{closed}workers: {busy} busy, {idle} idle | "
            f"jobs: {self._running()} running, {self._queued()} queued]>"
        )

    async def __aenter__(self) -> Self:
        self._require_open()
        loop = asyncio.get_running_loop()
        self._pool_of(loop)
        self._entered = loop
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None:
            self.kill()
        await self.aclose()

    async def aclose(self) -> None:
        """Waits for the jobs, then ends the workers. New jobs are refused from its start.

        A cancel kills instead.
        """
        self._closed = self._closed or "closed"
        try:
            await asyncio.gather(*(self._close_pool(pool) for pool in self._pools))
        except asyncio.CancelledError:
            self.kill()
            raise

    async def _close_pool(self, pool: Pool | InlinePool) -> None:
        loop = asyncio.get_running_loop()
        if pool.loop is loop:
            # Shielded: a second close awaits the same future, and nobody has cancelled that one.
            await asyncio.shield(pool.close())
        else:
            kill_in_loop(pool)

    def replace_workers(self) -> None:
        """Has each worker end as soon as it has no job; new ones take their places when jobs come.

        For what a worker has from its start: random state (that of ``random`` and of NumPy's
        functions is new in each worker), environment, working directory, ``sys.path``. Call it when
        this machine has been restored from a snapshot, which has given each of its copies workers
        with the same random numbers to come. No job is harmed. It may be called from any thread, and
        while no loop runs.
        """
        here = asyncio._get_running_loop()
        for pool in self._pools:
            if pool.loop is here or pool.loop.is_closed():
                pool.replace_workers()
            else:
                pool.loop.call_soon_threadsafe(pool.replace_workers)

    def kill(self) -> None:
        """Ends all workers at once; their jobs fail with ExecutorClosedError. Waits for nothing.

        It may be called from any thread, and while no loop runs. Jobs of a loop that runs in another
        thread fail in that thread, at the loop's next turn.
        """
        self._closed = "killed"
        self._end_workers()

    def _end_workers(self) -> None:
        """Ends all workers; unless it is closed, the next job starts others."""
        self._pools.kill()
        self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid() and any(self._pools) and not self._closed:
            if self._entered:
                message = f"{self!r} was dropped without being closed"
                warnings.warn(message, ResourceWarning, source=self, stacklevel=1)
            # At the interpreter's end, what a kill needs may be gone; the fork servers are, too.
            if not sys.is_finalizing():
                for pool in self._pools:
                    kill_in_loop(pool)


class _View(Executor):
    """An executor with terms of its own, and all the rest in common with another."""

    __slots__ = ("_executor", "_flags", "_terms")

    def __init__(self, executor: Executor, terms: Terms, flags: int = 0) -> None:
        self.__dict__ = executor.__dict__
        self._executor = executor  # lives as long: it kills its workers when it is dropped
        self._terms = terms
        self._flags = flags

    def __del__(self) -> None:
        pass  # nothing is its own


def _chunk_done(
    pool: Pool | InlinePool,
    job: Job,
    weight: int,
    measured: Callable[[int, int], None],
    future: asyncio.Future[Any],
) -> None:
    if future.cancelled():
        pool.cancel(job)
    elif job.weight:  # it has a result, not only an error
        measured(job.duration, max(weight, job.weight))


def _is_given_up(job: Job) -> bool:
    """Whether whoever awaited the job gives it up, and not the job itself has ended so."""
    if job.future.get_loop().is_closed():  # a coroutine that is dropped; its pool sees to the job
        return False
    return job.future.cancel() or job.future.cancelled()


class _Outcome(asyncio.Future[Any]):
    """The outcome of a job; cancelled, it is done when the job has ended. A second cancel ends it.

    No task: one that is cancelled before it has begun would wait for nothing.
    """

    def __init__(self, pool: Pool | InlinePool, job: Job) -> None:
        super().__init__(loop=pool.loop)
        self._pool = pool
        self._job = job
        self._is_given_up = False
        job.future.add_done_callback(self._take)  # after _chunk_done, which cancels the job

    def cancel(self, msg: Any = None) -> bool:
        if self._is_given_up:
            self._pool.hurry(self._job)
            return super().cancel(msg)
        self._is_given_up = True
        self._job.future.cancel(msg)  # _see_to may have done so
        return self._job.future.cancelled() or super().cancel(msg)

    def _take(self, future: asyncio.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()  # seen: nothing is logged of it
        if self.done():
            self._pool.hurry(self._job)  # cancelled twice before the job was
        elif future.cancelled():
            grace = self._job.grace
            if grace is None:
                self._end()
            else:
                grace.ended.add_done_callback(self._end)
        elif error is None:
            self.set_result(future.result())
        else:
            self.set_exception(error)

    def _end(self, _: object = None) -> None:
        super().cancel()


async def _see_to(pool: Pool | InlinePool, job: Job) -> None:
    """Whoever cancels all tasks, as ``asyncio.run()`` at its end, cancels and awaits the job, too."""
    try:
        await job.future
    except asyncio.CancelledError:
        # _chunk_done has cancelled the job: its callback is older than this task's.
        if job.grace is not None:
            await _end_of(pool, job)
        raise
    except Exception:
        pass  # _Outcome has it


async def _end_of(pool: Pool | InlinePool, job: Job) -> None:
    """Waits until a cancelled job has ended; a second cancel ends it."""
    from ._grace import shield

    assert job.grace is not None
    with shield():
        try:
            await job.grace.ended
        except BaseException:
            pool.hurry(job)
            raise


def _pickled_initializer(
    initializer: Callable[..., object] | None, arguments: tuple[object, ...]
) -> bytes:
    if initializer is None:
        return b""
    is_generator = _call.is_async(initializer) and not _call.is_coroutine_function(initializer)
    if not callable(initializer) or is_generator:
        raise TypeError(
            "initializer is a function or a coroutine function, called with initargs, not "
            f"{initializer!r}"
        )
    try:
        return _payload.dumps_whole((initializer, arguments))
    except Exception as error:
        raise PayloadError(
            f"the initializer {_call.name_of(initializer)} or its arguments cannot be sent to "
            f"a worker: {type(error).__name__}: {error}; pass plain data"
        ) from error


def _checked_retries(retries: int) -> int:
    if not isinstance(retries, int) or isinstance(retries, bool):
        raise TypeError(f"retries is an integer, not {retries!r}")
    if retries < 0:
        raise ValueError(f"retries must not be negative, got {retries}; 0 tries once")
    return retries


def _checked_limit(name: str, limit: int | None) -> int | None:
    if limit is None:
        return None
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"{name} is an integer or None, not {limit!r}")
    if limit < 1:
        raise ValueError(f"{name} must be at least 1, got {limit}; None means no limit")
    if name == "max_memory_per_child":
        from . import _limits

        if not _limits.can_measure():
            raise ValueError(
                f"{name} needs /proc/self/statm, which is not here; max_tasks_per_child does not"
            )
    return limit


def _checked_grace(cancel_grace: float) -> float:
    if not isinstance(cancel_grace, (int, float)) or isinstance(cancel_grace, bool):
        raise TypeError(f"cancel_grace is a number of seconds, not {cancel_grace!r}")
    if not 0 <= cancel_grace < float("inf"):
        raise ValueError(
            f"cancel_grace is 0 seconds or more, and finite, got {cancel_grace}; 0 kills at once"
        )
    return float(cancel_grace)


def _checked_workers(max_workers: int | None) -> int:
    if max_workers is None:
        return _sizing.default_workers()
    if not isinstance(max_workers, int) or isinstance(max_workers, bool):
        raise TypeError(f"max_workers is an integer or None, not {max_workers!r}")
    if max_workers < 0:
        raise ValueError(
            f"max_workers must not be negative, got {max_workers}; 0 runs jobs in this process, "
            "None uses the whole machine"
        )
    return max_workers
