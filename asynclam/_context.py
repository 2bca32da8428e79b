"""What a job carries besides its call: the invocation that it belongs to, and context variables.

Every job runs in a fresh :class:`contextvars.Context`: a worker that was forked while the first
request was served would keep the variables of that one. A ContextVar cannot be pickled, so it goes
by the names under which modules have it; its value is pickled when the call is made.

The deadline is a time of the wall clock. While a sandbox is frozen the monotonic clock stops, so a
job that is thawed in a later invocation would think that it had time left; and the wall clock is
what the runtime itself goes by (``context.get_remaining_time_in_millis``).
"""

from __future__ import annotations

import _pickle as pickle
import os
import struct
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from time import time
from typing import Any

from . import _payload
from ._errors import PayloadError

_LENGTH = struct.Struct("<I")
_TRACE = "_X_AMZN_TRACE_ID"
_UNSET = object()


class Invocation:
    """One invocation of a Lambda function.

    Args:
        request_id: names it in logs; empty where there is none.
        trace_id: the header of X-Ray; ``None`` if it is not traced.
        deadline: when the runtime would kill it, in seconds since the epoch.
    """

    __slots__ = ("_carried", "deadline", "request_id", "trace_id")

    def __init__(self, request_id: str, trace_id: str | None, deadline: float) -> None:
        self.request_id, self.trace_id, self.deadline = request_id, trace_id, deadline
        self._carried = b""

    @property
    def carried(self) -> bytes:
        """Itself, as what a job carries."""
        if not self._carried:  # once for all jobs of an invocation, if it has any
            self._carried = _laid_out(self.state, b"", b"")
        return self._carried

    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time()

    @property
    def state(self) -> tuple[str, str | None, float]:
        """Its arguments."""
        return self.request_id, self.trace_id, self.deadline


invocation: ContextVar[Invocation | None] = ContextVar("asynclam.invocation", default=None)


def remaining() -> float:
    """Seconds until the runtime would kill this invocation; ``inf`` outside of one.

    In a handler made with ``lambda_handler``, in what it awaits, in threads of ``run_blocking``, and
    in jobs in workers. Never negative. By the wall clock: a job that is left over from an invocation
    before, and was frozen meanwhile, has none.
    """
    current = invocation.get()
    return float("inf") if current is None else max(0.0, current.left())


class Variables:
    """The context variables that an executor was told to carry.

    Raises:
        TypeError: one is no ContextVar.
        ValueError: one is in no module, so that a worker could not find it.
    """

    def __init__(self, variables: Iterable[ContextVar[Any]]) -> None:
        self._variables = tuple(variables)
        for variable in self._variables:
            if not isinstance(variable, ContextVar):
                raise TypeError(f"context_vars are ContextVar objects, not {variable!r}")
        self._names = pickle.dumps(tuple(map(_names_of, self._variables)), 5)

    def carried(self, current: Invocation | None) -> bytes:
        """Those that are set here, and the invocation, as what a job carries.

        Raises:
            PayloadError: a value cannot be pickled; it names the variable.
        """
        values = {
            index: value
            for index, variable in enumerate(self._variables)
            if (value := variable.get(_UNSET)) is not _UNSET
        }
        if not values:
            return current.carried if current else b""
        try:
            pickled = _payload.dumps_whole(values)
        except Exception as error:
            raise self._blame(values, error) from error
        return _laid_out(current.state if current else None, self._names, pickled)

    def _blame(self, values: dict[int, object], error: Exception) -> PayloadError:
        for index, value in values.items():
            try:
                _payload.dumps_whole(value)
            except Exception as reason:
                return PayloadError(
                    f"the context variable {self._variables[index].name!r} cannot be carried to a "
                    f"worker, its value is of type {type(value).__qualname__}: "
                    f"{type(reason).__name__}: {reason}; carry plain data, or leave it out of "
                    "context_vars"
                )
        return PayloadError(
            f"the context variables cannot be carried: {type(error).__name__}: {error}"
        )


def _names_of(variable: ContextVar[Any]) -> list[tuple[str, str]]:
    """Under which names modules have a variable: each that imports it, and the one that defines it."""
    found = [
        (module, name)
        for module, loaded in list(sys.modules.items())
        for name, value in list(getattr(loaded, "__dict__", {}).items())
        if value is variable
    ]
    if not found:
        raise ValueError(
            f"the context variable {variable.name!r} is in no module, so a worker could not find "
            "it: assign it to a name at the top level of a module"
        )
    return found


def _laid_out(state: tuple[str, str | None, float] | None, names: bytes, values: bytes) -> bytes:
    data = pickle.dumps((state, names, values), 5)
    data = _LENGTH.pack(len(data)) + data
    return data + bytes(-len(data) % _payload.ALIGNMENT)


def carried(variables: Variables | None) -> bytes:
    """What a job carries that is submitted here; empty if nothing.

    Raises:
        PayloadError: the value of a context variable cannot be pickled.
    """
    current = invocation.get()
    if variables is not None:
        return variables.carried(current or _untold())
    if current is not None:
        return current.carried
    if _in_lambda and (current := _untold()) is not None:
        return current.carried
    return b""


_in_lambda = "AWS_LAMBDA_RUNTIME_API" in os.environ
_last_untold: Invocation | None = None


def _untold() -> Invocation | None:
    """The invocation that the environment tells of, where a handler runs its loop by itself."""
    global _last_untold
    trace_id = os.environ.get(_TRACE) if _in_lambda else None
    if trace_id is None:
        return None
    if _last_untold is None or _last_untold.trace_id != trace_id:
        _last_untold = Invocation("", trace_id, float("inf"))
    return _last_untold


# --- in the worker -------------------------------------------------------------------------------

_known: dict[bytes, list[ContextVar[Any]]] = {}
_is_worker = False  # inline, the environment is the loop process's
_trace_id: str | None = None  # what the last job has left in the environment


def taken(body: bytearray | memoryview) -> tuple[bytes, int]:
    """What a job carries, at the beginning of its frame, and how long that is."""
    (length,) = _LENGTH.unpack_from(body)
    end = _LENGTH.size + length
    return bytes(body[_LENGTH.size : end]), end + -end % _payload.ALIGNMENT


def enter(data: bytes) -> None:
    """Makes this context that of a job which carries ``data``; the environment, too.

    Raises:
        PayloadError: a variable is not known here, or its value cannot be unpickled.
    """
    try:
        state, names, values = pickle.loads(data)
        if state is not None:
            invocation.set(Invocation(*state))
        if names:
            variables = _known.get(names)
            if variables is None:
                variables = _known[names] = list(map(_find, pickle.loads(names)))
            for index, value in pickle.loads(values).items():
                variables[index].set(value)
    except Exception as error:
        raise PayloadError(
            f"a context variable could not be carried to the worker: {type(error).__name__}: "
            f"{error}; define it, and the type of its value, in a module that workers can import"
        ) from error
    set_trace_id(state[1] if state is not None else None)


def set_trace_id(trace_id: str | None) -> None:
    """The X-Ray SDK looks for it in the environment."""
    global _trace_id
    if trace_id == _trace_id or not _is_worker:
        return
    _trace_id = trace_id
    if trace_id is None:
        os.environ.pop(_TRACE, None)
    else:
        os.environ[_TRACE] = trace_id


def become_worker() -> None:
    """From here on the environment is that of the jobs of one worker."""
    global _is_worker, _trace_id
    _is_worker, _trace_id = True, os.environ.get(_TRACE)


def has_trace_id() -> bool:
    """Whether the job before has left one."""
    return _trace_id is not None


def _find(names: list[tuple[str, str]]) -> ContextVar[Any]:
    # A module that is loaded anyway first; importing another one may do more than is wanted.
    for module, name in sorted(names, key=lambda name: name[0] not in sys.modules):
        try:
            __import__(module)
            found = getattr(sys.modules[module], name)
        except (ImportError, AttributeError):
            continue
        if isinstance(found, ContextVar):
            return found
    raise LookupError(f"no module here has {' or '.join('.'.join(name) for name in names)}")
