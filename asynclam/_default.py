"""The process-wide default executor, and the functions that use it."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from ._executor import Executor

if TYPE_CHECKING:
    from ._sources import AnyIterable
    from ._streams import Stream

P = ParamSpec("P")
T = TypeVar("T")

_executor: Executor | None = None
_instead: Executor | None = None  # while a test has jobs run inline, whatever is set meanwhile
# Loops in several threads may ask at once. A child that is forked meanwhile must not find it locked.
_making = Lock()
os.register_at_fork(
    before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release
)


def default_executor() -> Executor:
    """The executor that the module-level functions use; made at the first call."""
    global _executor
    if (executor := _instead or _executor) is None:
        with _making:
            if (executor := _executor) is None:
                executor = _executor = Executor()
    return executor


def set_default_executor(executor: Executor | None) -> None:
    """Makes ``executor`` the one that ``run_cpu``, ``run_blocking`` and ``map_cpu`` use.

    The one before is neither closed nor killed. ``None``: a new one with default settings, at the
    next call.

    Raises:
        TypeError: it is no Executor.
    """
    if executor is not None and not isinstance(executor, Executor):
        raise TypeError(f"set_default_executor() takes an Executor, got {type(executor).__name__}")
    global _executor
    _executor = executor


def use_instead(executor: Executor | None) -> Executor | None:
    """Makes ``executor`` the default one, whatever is set, until ``None`` is; which was it before."""
    global _instead
    before, _instead = _instead, executor
    return before


def prepare() -> None:
    """Starts the fork server now, as long as this process is small and has a single thread.

    Call it at the end of the imports, before threads and connections are made: the workers then
    have all that is imported, and each starts in about a millisecond. Without it the first job
    does the same. Calling it again does nothing, nor does calling it in a worker or in the fork
    server, which import the same modules.

    Raises:
        OSError: it could not be started.
    """
    default_executor().prepare()


async def run_cpu(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs ``fn`` in a worker process and returns its result; see :meth:`Executor.run_cpu`.

    A cancel stops the work.
    """
    return await default_executor().run_cpu(fn, *args, **kwargs)


async def run_async(
    fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Runs a coroutine function in a worker process; see :meth:`Executor.run_async`.

    A cancel is raised in the coroutine.
    """
    return await default_executor().run_async(fn, *args, **kwargs)


async def run_blocking(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs a blocking function in a thread; see :meth:`Executor.run_blocking`.

    A cancel abandons the thread.
    """
    return await default_executor().run_blocking(fn, *args, **kwargs)


@overload
def map_cpu(
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
    fn: Callable[..., T],
    /,
    *iterables: AnyIterable,
    limit: int | None = None,
    ordered: bool = True,
    chunksize: int | None = None,
    return_exceptions: bool,
) -> Stream[T | BaseException]: ...
def map_cpu(
    fn: Callable[..., Any],
    /,
    *iterables: AnyIterable,
    limit: int | None = None,
    ordered: bool = True,
    chunksize: int | None = None,
    return_exceptions: bool = False,
) -> Stream[Any]:
    """Runs ``fn`` in workers for the items of the iterables; see :meth:`Executor.map_cpu`."""
    return default_executor().map_cpu(
        fn,
        *iterables,
        limit=limit,
        ordered=ordered,
        chunksize=chunksize,
        return_exceptions=return_exceptions,
    )


def _forget_in_child() -> None:
    global _executor, _instead
    _executor = _instead = None  # it is the parent's; a forked process makes one of its own


os.register_at_fork(after_in_child=_forget_in_child)
