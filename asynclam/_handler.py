"""An ``async def`` handler as the sync handler that the Lambda runtime calls.

The fork server is forked before there is a loop: at that moment the process is small and has one
thread. What lives on across invocations is in :mod:`._sandbox`. An invocation is one task; whatever it
has left when it ends is cancelled before its outcome is returned.

The runtime client catches ``Exception`` and nothing else: what else leaves a handler ends the process,
and the next invocation waits for a new one. So it becomes an ``Exception`` here.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from . import _call, _context, _server
from ._deadline import Deadline, half_of
from ._default import default_executor, set_default_executor
from ._errors import JobExitError
from ._executor import Executor
from ._sandbox import Lifespan, Sandbox

if TYPE_CHECKING:
    from ._termination import Watch

Event = TypeVar("Event")
Context = TypeVar("Context")
Result = TypeVar("Result")
AsyncHandler = Callable[[Event, Context], Coroutine[Any, Any, Result]]
Outcome = tuple[Any, BaseException | None]  # of a handler: its result, or what it has raised

_UNLIMITED = float("inf")
_MOST_CLEANING = 1.0  # seconds that what an invocation has left has to end; then, its loop
_WOULD = "end the Lambda runtime"
_RUNTIME = "AWS_LAMBDA_RUNTIME_API"  # the variable that says where it is
# What suspends a durable function is no Exception; the decorator above, which has called, waits for it.
_DURABLE = "aws_durable_execution_sdk_python."

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


def invocation_of(context: object) -> _context.Invocation:
    """The invocation that the second argument of a handler tells of."""
    context = getattr(context, "lambda_context", None) or context  # a durable function's has it
    remaining = getattr(context, "get_remaining_time_in_millis", None)
    deadline = time.time() + remaining() / 1000 if remaining is not None else _UNLIMITED
    request_id = getattr(context, "aws_request_id", None) or ""
    return _context.Invocation(request_id, os.environ.get("_X_AMZN_TRACE_ID"), deadline)


async def outcome_of(
    fn: Callable[[Any, Any], Any],
    event: object,
    context: object,
    *,
    invocation: _context.Invocation,
    state: object,
) -> Outcome:
    """What becomes of an invocation. Raises nothing.

    SystemExit that leaves a task leaves the loop, too, with all else in the middle of something.
    """
    _state.set(state)
    _context.invocation.set(invocation)
    try:
        result = fn(event, context)
        # A decorator below lambda_handler may have answered without calling the coroutine function.
        return await result if hasattr(result, "__await__") else result, None
    except BaseException as error:
        return None, error


class Handler(Generic[Event, Context, Result]):
    """What ``lambda_handler`` makes of a coroutine function.

    Attributes:
        __wrapped__: the coroutine function itself, for tests: ``await handler.__wrapped__(event, context)``.
        outermost: what an invocation begins with: ``invoke``, or a decorator that calls it.
    """

    __wrapped__: AsyncHandler[Event, Context, Result]

    def __init__(
        self,
        fn: AsyncHandler[Event, Context, Result],
        lifespan: Lifespan | None,
        executor: Executor | None,
        margin: float,
    ) -> None:
        functools.update_wrapper(self, fn)
        self.lifespan, self.margin = lifespan, margin
        self.outermost: Callable[[Event, Context], Result] = self.invoke
        self._executor = executor
        self._sandbox: Sandbox | None = None
        self._task: asyncio.Task[Outcome] | None = None  # of the invocation that runs
        # Whose turn it is: an invocation's, or that of who leaves the lifespan, in whatever thread.
        self._turn = threading.RLock()
        self._is_terminated = False  # SIGTERM came while the loop was running
        self._process = 0  # whose sandbox, and whose signals
        self._watch: Watch | None = None  # has SIGTERM heard while the main thread waits in C
        self._is_registered = False  # at the hooks of SnapStart
        # So that what functools.wraps() makes of it, a decorator above, can be started, too.
        vars(self).update(start=self.start, close=self.close)

    # --- one invocation --------------------------------------------------------------------------

    def __call__(self, event: Event, context: Context) -> Result:
        """Runs one invocation; everything is started at the first, unless ``start()`` was called.

        Raises:
            DeadlineExceededError: it was cancelled, for the runtime would have killed it.
            JobExitError: it raised ``SystemExit``, or another exception that is no ``Exception``;
                or its lifespan did.
            RuntimeError: an event loop runs already in this thread.
        """
        self._refuse_running_loop()
        self._forget_parents()
        with self._turn:
            return self.outermost(event, context)

    def invoke(self, event: Event, context: Context) -> Result:
        """The same, without the decorators that know no coroutine functions."""
        sandbox = self._ready()
        invocation = invocation_of(context)
        coroutine = outcome_of(
            self.__wrapped__, event, context, invocation=invocation, state=sandbox.state
        )
        self._task = sandbox.begin(coroutine)
        deadline = self.deadline(sandbox.loop, self._task, invocation, sandbox.left)
        try:
            outcome = self._run(sandbox, self._task, deadline)
        finally:
            self._task = None
            if deadline is not None:
                deadline.end()
            self._clear(sandbox, invocation)
            if self._is_terminated:
                self._end_by_signal()
        return self.returned(outcome, deadline)  # type: ignore[no-any-return]

    def _ready(self) -> Sandbox:
        """What an invocation runs in. What the lifespan raises is for the runtime to report."""
        try:
            if self._sandbox is not None and self._sandbox.ended:
                self._close()  # raises why; the next invocation starts anew
            return self._started()
        except BaseException as error:
            if isinstance(error, Exception) or _is_ctrl_c(error):
                raise
            name = f"the lifespan of {_call.name_of(self.__wrapped__)}"
            raise JobExitError(name, error, _WOULD) from error

    def deadline(
        self,
        loop: asyncio.AbstractEventLoop,
        task: asyncio.Task[Any],
        invocation: _context.Invocation,
        tasks: Callable[[], set[asyncio.Task[Any]]],
        *,
        stops: bool = True,
    ) -> Deadline | None:
        """Has the task cancelled in time; ``None`` if it has no end. See :class:`Deadline`."""
        if invocation.deadline == _UNLIMITED:
            return None
        return Deadline(
            loop,
            task,
            invocation,
            name=_call.name_of(self.__wrapped__),
            margin=self.margin,
            executor=default_executor(),
            tasks=tasks,
            stops=stops,
        )

    def _run(
        self, sandbox: Sandbox, task: asyncio.Task[Outcome], deadline: Deadline | None
    ) -> Outcome | None:
        try:
            sandbox.run(task)
            if deadline is not None and deadline.error is not None:
                deadline.end()
                sandbox.settle()
        except BaseException as error:  # of another task, or it was cancelled before it began
            if _is_ctrl_c(error):
                raise
            return None, error
        return task.result() if task.done() else None

    def returned(self, outcome: Outcome | None, deadline: Deadline | None) -> Any:
        """The result of an invocation.

        Args:
            outcome: that of its task; ``None`` if that has not ended.
            deadline: what may have cancelled it.

        Raises:
            Exception: what the runtime is to report.
        """
        result, error = outcome if outcome is not None else (None, None)
        if deadline is not None and deadline.error is not None:
            if outcome is None or error is not None:
                raise deadline.error from error
        elif outcome is None:
            raise RuntimeError(
                f"the event loop was stopped before {_call.name_of(self.__wrapped__)} had ended; "
                "return from the handler instead of calling loop.stop()"
            )
        if error is None:
            return result
        if isinstance(error, Exception) or type(error).__module__.startswith(_DURABLE):
            raise error
        raise JobExitError(_call.name_of(self.__wrapped__), error, _WOULD) from error

    def _clear(self, sandbox: Sandbox, invocation: _context.Invocation) -> None:
        """Cancels what the invocation has left; what does not end takes the loop with it."""
        if not sandbox.left():
            return
        seconds = half_of(invocation.left(), _MOST_CLEANING)
        try:
            stubborn = sandbox.cancel_left(seconds)
        except BaseException as error:  # one of them has raised SystemExit
            if _is_ctrl_c(error):
                raise
            self._retire(sandbox, invocation, f"one raised {error!r}")
            return
        if stubborn:
            names = ", ".join(sorted(task.get_name() for task in stubborn))
            reason = f"{len(stubborn)} did not end in {seconds:.2g} s: {names}"
            self._retire(sandbox, invocation, reason)

    def _retire(self, sandbox: Sandbox, invocation: _context.Invocation, reason: str) -> None:
        import logging

        logger = logging.getLogger("asynclam")
        logger.error(
            "tasks that %s has left were cancelled, and %s; the event loop is closed, and the "
            "lifespan is entered anew at the next invocation: await the tasks, or let CancelledError "
            "pass",
            _call.name_of(self.__wrapped__),
            reason,
        )
        self._forget()
        try:
            sandbox.retire(half_of(invocation.left(), _MOST_CLEANING))
        except BaseException as error:
            if _is_ctrl_c(error):
                raise
            logger.exception("the lifespan failed when it was left")

    # --- its life --------------------------------------------------------------------------------

    def start(self) -> None:
        """Forks the fork server, makes the loop, enters the lifespan and starts a worker; once.

        As the last line of the module it does so at init, where Lambda does not throttle the CPU.
        In a worker or in the fork server, which import the same module, it does nothing.

        Raises:
            Exception: what the lifespan raises.
        """
        if _server.role == "loop process":
            self._refuse_running_loop()
            self._forget_parents()
            with self._turn:
                self._started()
            if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start":
                self._register()

    def _register(self) -> None:
        """Has all that must differ between sandboxes renewed after each restore of the snapshot."""
        if not self._is_registered:
            from . import _snapstart

            self._is_registered = True
            _snapstart.register(self)

    def _started(self) -> Sandbox:
        if self._sandbox is not None:
            return self._sandbox
        self.set_executor()
        default_executor().prepare()
        self._process = os.getpid()
        self._watch_termination()
        try:
            self._sandbox = Sandbox(self.lifespan)
        except BaseException:
            self._forget()
            if self._is_terminated:
                self._end_by_signal()
            raise
        default_executor().prestart(self._sandbox.loop)
        atexit.register(self.close)
        if self._is_terminated:
            self._end_by_signal()
        return self._sandbox

    def set_executor(self) -> None:
        """Makes the executor that it was given, if any, the default one."""
        if self._executor is not None:
            set_default_executor(self._executor)

    def close(self) -> None:
        """Leaves the lifespan and closes the loop; the next invocation starts anew. Runs at exit."""
        self._forget_parents()
        with self._turn:
            self._close()

    def _close(self) -> None:
        sandbox = self._sandbox
        if sandbox is not None:
            self._forget()
            sandbox.close()

    def _forget_parents(self) -> None:
        """In a forked child: starts anew. To leave the lifespan, or close the loop, would end its parent's.

        Connections and epoll instances are one for both.
        """
        if self._sandbox is None or self._process == os.getpid():
            return
        from ctypes import py_object, pythonapi

        # For ever, as its loop would be closed when it is finalised, at the end at the latest.
        pythonapi.Py_IncRef(py_object((self._sandbox, self._watch)))
        self._watch = None  # its thread is not here
        self._turn = threading.RLock()  # a thread may have had it that is not here
        self._forget()

    def _forget(self) -> None:
        self._sandbox = None
        atexit.unregister(self.close)
        if not _is_main_thread():
            return
        if signal.getsignal(signal.SIGTERM) == self._on_termination:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    # --- SIGTERM, which Lambda sends to a sandbox that has an extension ----------------------------

    def _watch_termination(self) -> None:
        if _is_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_termination)
            if _waits_in_c():
                from ._termination import Watch  # after the fork server was forked: it is a thread

                self._watch = Watch(self._on_unheard_termination)

    def _on_termination(self, _signal: int, _frame: object) -> None:
        if os.getpid() != self._process:  # of a forked child, whose lifespan is its parent's
            _die_of_sigterm()  # pragma: no cover - at once, with what was covered
        if asyncio._get_running_loop() is None and self._turn.acquire(blocking=False):
            try:
                self._end_by_signal()
            finally:
                self._turn.release()
            return
        # Else an invocation runs, here or in another thread, or the lifespan is being left there.
        self._is_terminated = True
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    def _on_unheard_termination(self) -> None:
        """Called in a thread: the main one may wait in C, and not hear of it."""
        with self._turn:
            if signal.getsignal(signal.SIGTERM) == self._on_termination:
                self._end_by_signal()

    def _end_by_signal(self) -> None:
        """Closes, and ends as if nobody had handled the signal."""
        try:
            self.close()
        finally:
            if _is_main_thread():
                _die_of_sigterm()
            else:  # where no handler can be set back
                os._exit(128 + signal.SIGTERM)

    def _refuse_running_loop(self) -> None:
        if asyncio._get_running_loop() is not None:
            name = _call.name_of(self.__wrapped__).rpartition(".")[2]
            raise RuntimeError(
                f"{name} runs an event loop of its own, and one is running here; write: "
                f"await asynclam.testing.invoke({name}, event, context), and {name}.start() where none is"
            )


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether it is to end the program: nobody presses Ctrl-C in Lambda, so there it is an error."""
    return isinstance(error, KeyboardInterrupt) and _RUNTIME not in os.environ


def _die_of_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _waits_in_c() -> bool:
    """Whether the runtime client waits for events in C, in the main thread.

    From Python 3.12 on it does so in a thread, where AWS_EXECUTION_ENV says so (awslambdaric,
    lambda_config.py).
    """
    return _RUNTIME in os.environ and (
        sys.version_info < (3, 12) or "AWS_EXECUTION_ENV" not in os.environ
    )


@overload
def lambda_handler(
    fn: AsyncHandler[Event, Context, Result], /
) -> Handler[Event, Context, Result]: ...
@overload
def lambda_handler(
    *, lifespan: Lifespan | None = None, executor: Executor | None = None, margin: float = 0.5
) -> Callable[[AsyncHandler[Event, Context, Result]], Handler[Event, Context, Result]]: ...
def lambda_handler(
    fn: AsyncHandler[Any, Any, Any] | None = None,
    /,
    *,
    lifespan: Lifespan | None = None,
    executor: Executor | None = None,
    margin: float = 0.5,
) -> Any:
    """Turns ``async def handler(event, context)`` into the sync handler that Lambda calls.

    Loop, workers and the resources of the lifespan live across invocations, as long as the sandbox.
    As many workers are started as the function's memory gives CPUs for. ``handler.start()``, as the
    last line of the module, does at init what else the first invocation does.

    Tasks that an invocation has begun and not awaited are cancelled when it ends. ``margin`` seconds
    before the runtime would kill the sandbox the handler is cancelled, and DeadlineExceededError, which
    says what was running, is reported: the loop and idle workers stay warm. What the handler returns in
    spite of the cancel counts. Code that blocks the loop is not interrupted.

    Args:
        fn: the coroutine function, where it is used as plain ``@lambda_handler``.
        lifespan: an async context manager function without arguments, as ASGI frameworks have it;
            :func:`state` is what it yields. It is left at SIGTERM and at the interpreter's exit.
        executor: the default executor from then on; ``None`` for one that suits the memory size.
        margin: seconds. Half of it is for the handler to end, the rest for what it has left.

    Raises:
        TypeError: ``fn`` is no coroutine function, or ``margin`` no number; or a decorator is below
            this one that must be above.
        ValueError: ``margin`` is negative.
    """
    if not isinstance(margin, (int, float)) or isinstance(margin, bool):
        raise TypeError(f"margin is a number of seconds, not {margin!r}")
    if not 0 <= margin < _UNLIMITED:
        raise ValueError(f"margin is 0 seconds or more, and finite, got {margin}")
    make = functools.partial(_make, lifespan=lifespan, executor=executor, margin=margin)
    return make if fn is None else make(fn)


def _make(
    fn: AsyncHandler[Any, Any, Any],
    *,
    lifespan: Lifespan | None,
    executor: Executor | None,
    margin: float,
) -> Handler[Any, Any, Any]:
    layers = [fn]
    if hasattr(fn, "__wrapped__"):
        from . import _decorators

        layers = list(_decorators.layers(fn))
    if not _call.is_coroutine_function(layers[-1]):
        name = getattr(fn, "__name__", type(fn).__name__)
        raise TypeError(
            f"@lambda_handler takes an async def handler(event, context); {name} is none: write "
            f"async def {name}(event, context), or give it to Lambda as it is"
        )
    inner, decorator = _decorators.split(layers) if len(layers) > 1 else (fn, None)
    handler = Handler(inner, lifespan, executor, margin)
    if decorator is not None:
        _decorators.redirect(decorator, inner, handler.invoke)
        handler.outermost = fn
    return handler
