"""The promises to callers: run this in a worker, in a thread, or on the loop, and await it."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from . import _call, _environment, _payload, _wire
from ._errors import ExecutorClosedError, PayloadError
from ._inline import InlinePool
from ._streams import AnyIterable, Batch, Stream, at_least_one, check_iterables, map_io
from ._threads import Threads

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from ._job import Job
    from ._pool import Pool

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Statistics:
    """What an executor has under way.

    Attributes:
        max_workers: how many workers there may be; 0 runs jobs inline.
        workers_starting: workers that are being forked or run the initializer.
        workers_idle: workers that wait for a job.
        workers_busy: workers that run one.
        jobs_queued: jobs that no worker has yet.
        jobs_running: jobs that a worker has.
        jobs_completed: jobs that a worker has replied to, with a result or an exception.
        worker_deaths: workers that died while they had a job.
        threads_busy: threads of ``run_blocking``, abandoned ones among them.
        threads_abandoned: those whose caller was cancelled; they run until the function returns.
    """

    max_workers: int
    workers_starting: int
    workers_idle: int
    workers_busy: int
    jobs_queued: int
    jobs_running: int
    jobs_completed: int
    worker_deaths: int
    threads_busy: int
    threads_abandoned: int


class Executor:
    """Runs functions in worker processes that are fed by the event loop.

    As an async context manager it belongs to the running loop: the normal end of the block waits
    for the jobs, an exception kills them. Without ``async with`` it serves one event loop after
    the other, as the default executor does, and its workers live on in between.

    Args:
        max_workers: the most worker processes at a time. ``None``: as many as make use of the
            machine. 0: jobs run in this process, pickled all the same, and block the loop.
        initializer: called in each worker before its first job.
        initargs: its arguments.
        start_method: how the fork server is started. ``"fork"``: from this process, so that what is
            imported here is there; safe only while this process has a single thread.
            ``"spawn"``: as a fresh interpreter. ``"auto"``: fork while that is safe and cheap.

    Raises:
        ValueError: ``max_workers`` is negative, or ``start_method`` is none of the three.
        TypeError: ``max_workers`` is no integer, or ``initializer`` cannot be called.
        PayloadError: the initializer or its arguments cannot be pickled.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[object, ...] = (),
        start_method: Literal["auto", "fork", "spawn"] = "auto",
    ) -> None:
        self._max_workers = _checked_workers(max_workers)
        if start_method not in ("auto", "fork", "spawn"):
            raise ValueError(f'start_method is "auto", "fork" or "spawn", not {start_method!r}')
        self._start_method = start_method
        self._initializer = _pickled_initializer(initializer, initargs)
        self._pools: list[Pool | InlinePool] = []
        self._pool: Pool | InlinePool | None = None  # that of the loop that asked last
        self._entered: asyncio.AbstractEventLoop | None = None
        self._closed: str = ""
        self._process = os.getpid()
        self._threads = Threads()

    # --- jobs ------------------------------------------------------------------------------------

    async def run_cpu(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs ``fn`` in a worker process and returns its result.

        Function, arguments and result are pickled (protocol 5; with cloudpickle where pickle refuses).
        A ``SharedBuffer`` travels without a copy. What the function raises is raised here, with
        the worker's traceback shown.

        A cancel stops the work: the worker that runs it is killed and replaced; a job that has not
        begun is dropped; no other job is harmed.

        Raises:
            TypeError: ``fn`` is no plain function.
            PayloadError: an argument or the result cannot be pickled.
            WorkerDiedError: the worker died while it ran the job.
            WorkerStartError: no worker could be started.
            JobExitError: the function raised ``SystemExit`` or its like.
            ExecutorClosedError: the executor is closed, or was killed meanwhile.
        """
        _call.check(fn, "run_cpu")
        pool, job = self._submit(fn, args, kwargs)
        try:
            return await job.future  # type: ignore[no-any-return]
        except BaseException:
            if job.future.cancel() or job.future.cancelled():
                pool.cancel(job)
            raise

    def _submit(
        self, fn: Callable[..., object], args: Any, kwargs: dict[str, Any], flags: int = 0
    ) -> tuple[Pool | InlinePool, Job]:
        pool = self._pool_here()
        call = _call.Call(fn, args, kwargs, flags=flags, main_is_shared=self._shares_main())
        return pool, pool.submit(call)

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

        Args:
            fn: called with one item of each iterable.
            iterables: sync or async, one or more; the shortest ends the stream. Async sources are
                closed at the end.
            limit: the most items that are read and whose result has not been taken. ``None``:
                twice what the workers can run.
            ordered: whether results come in the order of the input, or as they are done.
            chunksize: how many items make one job, which is the unit of death and of cancellation.
                ``None``: 1.
            return_exceptions: whether an item's exception is its result, or ends the stream.

        Raises:
            TypeError: ``fn`` is no plain function, or there is no iterable.
            ValueError: ``limit`` or ``chunksize`` is less than 1.
        """
        _call.check(fn, "map_cpu")
        check_iterables("map_cpu", iterables)
        size = at_least_one("chunksize", 1 if chunksize is None else chunksize)
        default = 2 * size * max(1, self._max_workers)
        limit = at_least_one("limit", default if limit is None else limit)
        flags = _wire.CHUNK | (_wire.KEEP_ERRORS if return_exceptions else 0)
        return Stream(
            "map_cpu",
            iterables,
            partial(self._start_chunk, fn, flags),
            limit,
            size=min(size, limit),
            ordered=ordered,
            return_exceptions=return_exceptions,
        )

    def _start_chunk(self, fn: Callable[..., Any], flags: int, batch: Batch) -> asyncio.Future[Any]:
        pool, job = self._submit(fn, batch, {}, flags)
        job.future.add_done_callback(partial(_cancel_if_cancelled, pool, job))
        return job.future

    map_io = staticmethod(map_io)  # needs no worker; here so that one object has it all

    # --- which pool ------------------------------------------------------------------------------

    def _pool_here(self) -> Pool | InlinePool:
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
            pool = self._pool = self._pool_of(loop)
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
        for pool in self._pools:
            if pool.loop is loop:
                return pool
        for pool in self._pools:
            if pool.loop.is_closed():
                pool.attach(loop)
                return pool
        self._pools.append(self._new_pool(loop))
        return self._pools[-1]

    def _new_pool(self, loop: asyncio.AbstractEventLoop) -> Pool | InlinePool:
        if self._max_workers == 0:
            return InlinePool(loop)
        from ._pool import Plan, Pool

        limit = partial(_limit, self._max_workers, self._pools)
        return Pool(loop, Plan(self._start_method, self._initializer, limit))

    def _require_open(self) -> None:
        if self._closed:
            raise ExecutorClosedError(
                f"this executor was {self._closed}; make another one, or leave the block later"
            )

    def prepare(self) -> None:
        """Starts the fork server now; see :func:`asynclam.prepare`."""
        from . import _forkserver

        if self._max_workers and _forkserver.role == "loop process":
            _forkserver.ensure(self._start_method)

    # --- its life --------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """What it has under way, over all event loops."""

        def workers(state: str) -> int:
            return sum(pool.count(state) for pool in self._pools)

        return Statistics(
            max_workers=self._max_workers,
            workers_starting=workers("starting"),
            workers_idle=workers("idle"),
            workers_busy=workers("busy"),
            jobs_queued=sum(pool.queued for pool in self._pools),
            jobs_running=workers("busy"),
            jobs_completed=sum(pool.completed for pool in self._pools),
            worker_deaths=sum(pool.deaths for pool in self._pools),
            threads_busy=self._threads.busy,
            threads_abandoned=self._threads.abandoned,
        )

    def __repr__(self) -> str:
        now = self.statistics()
        closed = f"{self._closed} | " if self._closed else ""
        return (
            f"<Executor [{closed}workers: {now.workers_busy} busy, {now.workers_idle} idle | "
            f"jobs: {now.jobs_running} running, {now.jobs_queued} queued]>"
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
            _kill_in_loop(pool)

    def kill(self) -> None:
        """Ends all workers at once; their jobs fail with ExecutorClosedError. Waits for nothing."""
        self._closed = "killed"
        for pool in self._pools:
            pool.kill()
        self._pools.clear()
        self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_pools", None) and not self._closed and self._process == os.getpid():
            if self._entered:
                message = f"{self!r} was dropped without being closed"
                warnings.warn(message, ResourceWarning, source=self, stacklevel=1)
            for pool in self._pools:
                _kill_in_loop(pool)


def _limit(max_workers: int, pools: list[Pool | InlinePool], pool: Pool) -> int:
    """How many workers ``pool`` may have: all share ``max_workers``, each has one at least.

    Not a method: pools live on in their loop's callbacks, and would keep the executor.
    """
    others = [other for other in pools if other is not pool]
    for other in others:
        if other.loop.is_closed():  # its workers would wait for a loop that may never come
            other.kill()
            pools.remove(other)
    return max(1, max_workers - sum(other.alive for other in others))


def _cancel_if_cancelled(pool: Pool | InlinePool, job: Job, future: asyncio.Future[Any]) -> None:
    if future.cancelled():
        pool.cancel(job)


def _kill_in_loop(pool: Pool | InlinePool) -> None:
    """Kills a pool from another thread, or from wherever the garbage collector runs."""
    if pool.loop.is_closed():
        pool.kill()
    else:
        pool.loop.call_soon_threadsafe(pool.kill)


def _pickled_initializer(
    initializer: Callable[..., object] | None, arguments: tuple[object, ...]
) -> bytes:
    if initializer is None:
        return b""
    if not callable(initializer) or _call.is_async(initializer):
        raise TypeError(
            f"initializer is a plain function, called with initargs, not {initializer!r}"
        )
    try:
        return _payload.dumps_whole((initializer, arguments))
    except Exception as error:
        raise PayloadError(
            f"the initializer {_call.name_of(initializer)} or its arguments cannot be sent to "
            f"a worker: {type(error).__name__}: {error}; pass plain data"
        ) from error


def _checked_workers(max_workers: int | None) -> int:
    if max_workers is None:
        return _environment.default_workers()
    if not isinstance(max_workers, int) or isinstance(max_workers, bool):
        raise TypeError(f"max_workers is an integer or None, not {max_workers!r}")
    if max_workers < 0:
        raise ValueError(
            f"max_workers must not be negative, got {max_workers}; 0 runs jobs in this process, "
            "None uses the whole machine"
        )
    return max_workers
