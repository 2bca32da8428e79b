"""An ``async def`` handler as the sync handler that the Lambda runtime calls.

The event loop, the workers and what the lifespan has yielded live as long as the sandbox. The fork
server is forked before there is a loop: at that moment the process is small and has one thread. The
lifespan is entered and left in one task of its own, as cancel scopes in it require.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar, overload

from . import _call, _server
from ._default import default_executor, set_default_executor
from ._executor import Executor

Event = TypeVar("Event")
Context = TypeVar("Context")
Result = TypeVar("Result")
AsyncHandler = Callable[[Event, Context], Coroutine[Any, Any, Result]]
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

_state: ContextVar[Any] = ContextVar("asynclam.state")


def state() -> Any:
    """What the lifespan of the running handler has yielded.

    Raises:
        RuntimeError: no handler runs here.
    """
    try:
        return _state.get()
    except LookupError:
        raise RuntimeError(
            "state() is what the lifespan yielded, and there is none here: call it in a handler "
            "made with @lambda_handler(lifespan=...), or in what it awaits"
        ) from None


class Handler(Generic[Event, Context, Result]):
    """What ``lambda_handler`` makes of a coroutine function.

    Attributes:
        __wrapped__: the coroutine function itself, for tests: ``await handler.__wrapped__(event, context)``.
    """

    __wrapped__: AsyncHandler[Event, Context, Result]

    def __init__(
        self,
        fn: AsyncHandler[Event, Context, Result],
        lifespan: Lifespan | None,
        executor: Executor | None,
    ) -> None:
        functools.update_wrapper(self, fn)
        self._lifespan = lifespan or _no_lifespan
        self._executor = executor
        self._loop: asyncio.AbstractEventLoop | None = None
        self._resources: _Resources | None = None
        self._is_registered = False  # at the hooks of SnapStart

    def __call__(self, event: Event, context: Context) -> Result:
        """Runs one invocation; everything is started at the first, unless ``start()`` was called.

        Raises:
            RuntimeError: an event loop runs already in this thread.
        """
        self._refuse_running_loop()
        if self._resources is not None and self._resources.ended:
            self.close()  # raises why; the next invocation starts anew
        loop, resources = self._started()
        return loop.run_until_complete(self._invoke(resources, event, context))

    async def _invoke(self, resources: _Resources, event: Event, context: Context) -> Result:
        token = _state.set(resources.state)
        try:
            return await self.__wrapped__(event, context)
        finally:
            _state.reset(token)

    def start(self) -> None:
        """Forks the fork server, makes the loop and enters the lifespan; once.

        As the last line of the module it does so at init, where Lambda does not throttle the CPU.
        In a worker or in the fork server, which import the same module, it does nothing.

        Raises:
            Exception: what the lifespan raises.
        """
        if _server.role == "loop process":
            self._refuse_running_loop()
            self._started()
            if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start":
                self._register()

    def _register(self) -> None:
        """Has all that must differ between sandboxes renewed after each restore of the snapshot."""
        if not self._is_registered:
            from . import _snapstart

            self._is_registered = True
            _snapstart.register(self)

    def _started(self) -> tuple[asyncio.AbstractEventLoop, _Resources]:
        if self._loop is not None and self._resources is not None:
            return self._loop, self._resources
        if self._executor is not None:
            set_default_executor(self._executor)
        default_executor().prepare()
        loop = _new_loop()
        resources = _Resources(self._lifespan)
        try:
            loop.run_until_complete(resources.enter())
        except BaseException:
            _close_loop(loop)
            raise
        self._loop, self._resources = loop, resources
        atexit.register(self.close)
        return loop, resources

    def close(self) -> None:
        """Leaves the lifespan and closes the loop; the next invocation starts anew. Runs at exit."""
        loop, resources = self._loop, self._resources
        if loop is None or resources is None:
            return
        self._loop = self._resources = None
        atexit.unregister(self.close)
        try:
            loop.run_until_complete(resources.leave())
        finally:
            _close_loop(loop)

    def _refuse_running_loop(self) -> None:
        if asyncio._get_running_loop() is not None:
            name = _call.name_of(self.__wrapped__).rpartition(".")[2]
            raise RuntimeError(
                f"{name}(event, context) starts an event loop, and one is running here; "
                f"write: await {name}.__wrapped__(event, context)"
            )


class _Resources:
    """The lifespan: entered and left in a task of its own, in which it waits in between."""

    def __init__(self, lifespan: Lifespan) -> None:
        self._lifespan = lifespan
        self.state: Any = None
        self._task: asyncio.Task[None]
        self._entered: asyncio.Future[None]
        self._leave: asyncio.Event

    async def enter(self) -> None:
        self._leave = asyncio.Event()
        self._entered = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live())
        await asyncio.wait({self._task, self._entered}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            await self._task  # raises what the lifespan has raised

    @property
    def ended(self) -> bool:
        """Whether the lifespan has ended by itself: something in it has failed."""
        return self._task.done()

    async def _live(self) -> None:
        async with self._lifespan() as self.state:
            self._entered.set_result(None)
            await self._leave.wait()

    async def leave(self) -> None:
        self._leave.set()
        await self._task


@asynccontextmanager
async def _no_lifespan() -> AsyncIterator[None]:
    yield None


def _close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Cancels what still runs on the loop, as ``asyncio.run()`` does, and closes it."""
    try:
        loop.run_until_complete(_cancel(asyncio.all_tasks(loop)))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _new_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it is installed, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


@overload
def lambda_handler(
    fn: AsyncHandler[Event, Context, Result], /
) -> Handler[Event, Context, Result]: ...
@overload
def lambda_handler(
    *, lifespan: Lifespan | None = None, executor: Executor | None = None
) -> Callable[[AsyncHandler[Event, Context, Result]], Handler[Event, Context, Result]]: ...
def lambda_handler(
    fn: AsyncHandler[Any, Any, Any] | None = None,
    /,
    *,
    lifespan: Lifespan | None = None,
    executor: Executor | None = None,
) -> Any:
    """Turns ``async def handler(event, context)`` into the sync handler that Lambda calls.

    Loop, workers and the resources of the lifespan live across invocations, as long as the sandbox.
    As many workers are started as the function's memory gives CPUs for. ``handler.start()``, as the
    last line of the module, does at init what else the first invocation does.

    Args:
        fn: the coroutine function, where it is used as plain ``@lambda_handler``.
        lifespan: an async context manager function without arguments, as ASGI frameworks have it;
            :func:`state` is what it yields.
        executor: the default executor from then on; ``None`` for one that suits the memory size.

    Raises:
        TypeError: ``fn`` is no coroutine function.
    """
    if fn is None:
        return functools.partial(_make, lifespan=lifespan, executor=executor)
    return _make(fn, lifespan=lifespan, executor=executor)


def _make(
    fn: AsyncHandler[Any, Any, Any], *, lifespan: Lifespan | None, executor: Executor | None
) -> Handler[Any, Any, Any]:
    if not _call.is_coroutine_function(fn):
        name = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"@lambda_handler takes an async def handler(event, context); {name} is none: write "
            f"async def {name}(event, context), or give it to Lambda as it is"
        )
    return Handler(fn, lifespan, executor)
