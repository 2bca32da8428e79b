"""Calls: a function and its arguments, from the process that makes the call to the one that runs it.

A function goes by reference first, as pickle writes a global name. The worker keeps what a
reference led to, and refuses a call whose names it does not know before anything has run; the call
is then sent again by value. A function by value is never kept: its closure and globals may change.
"""

from __future__ import annotations

import functools
import pickle
import struct
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from . import _payload, _wire
from ._errors import PayloadError

_LENGTH = struct.Struct("<I")


def name_of(fn: object) -> str:
    """How messages name a function: ``module.qualname``."""
    fn = _unwrapped(fn)
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    module = getattr(fn, "__module__", None) or type(fn).__module__
    return f"{module}.{name}"


def check(fn: object, user: str) -> None:
    """Refuses what cannot be run in a worker, with the right call in the message.

    Raises:
        TypeError: ``fn`` is no callable, or a coroutine or async generator function.
    """
    if not callable(fn):
        raise TypeError(
            f"{user}() takes a function and its arguments, got {type(fn).__name__}; "
            f"write {user}(fn, x), not {user}(fn(x))"
        )
    if is_async(fn):
        name = getattr(fn, "__name__", "fn")
        instead = f"map_io({name}, ...)" if user == "map_cpu" else f"await {name}(...)"
        raise TypeError(
            f"{user}() runs plain functions in other processes; {name} is a coroutine function, "
            f"which runs on the event loop: {instead}"
        )


def is_async(fn: object) -> bool:
    """Whether ``fn`` is declared with ``async def``, as a coroutine function or a generator."""
    return bool(_flags(fn) & (_COROUTINE | _ASYNC_GENERATOR))


def is_coroutine_function(fn: object) -> bool:
    """Whether calling ``fn`` gives a coroutine."""
    return bool(_flags(fn) & _COROUTINE)


_COROUTINE, _ASYNC_GENERATOR = 0x80, 0x200  # of the inspect module, without its import


def _flags(fn: object) -> int:
    fn = _unwrapped(fn)
    if not hasattr(fn, "__code__"):
        fn = type(fn).__call__ if callable(fn) else None  # an instance with an async __call__
    flags = getattr(getattr(fn, "__code__", None), "co_flags", 0)
    return flags if isinstance(flags, int) else 0


def _unwrapped(fn: object) -> object:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


class Call:
    """A call on its way: pickled at the door, so that what cannot travel is refused at once.

    Args:
        fn: the function.
        args: its positional arguments; for a chunk, the list of the argument tuples of its calls.
        kwargs: its keyword arguments.
        flags: ``_wire.CHUNK`` and ``_wire.KEEP_ERRORS``.
        main_is_shared: whether workers have this process's ``__main__``.

    Raises:
        PayloadError: the function or an argument cannot be pickled; it names which.
    """

    __slots__ = ("_args", "_flags", "_fn", "_kwargs", "_payload", "_reference")

    def __init__(
        self,
        fn: Callable[..., object],
        args: Sequence[object],
        kwargs: dict[str, object],
        *,
        flags: int = 0,
        main_is_shared: bool = True,
    ) -> None:
        self._fn, self._args, self._kwargs = fn, args, kwargs
        self._flags = flags
        self._reference = _reference_to(fn)
        if not main_is_shared and b"__main__" in self._reference:
            self._reference = b""
        try:
            self._payload = _payload.dumps(self._contents(), main_is_shared=main_is_shared)
        except Exception as error:
            raise _blame(fn, args, kwargs, flags, error) from error

    def _contents(self) -> tuple[object, ...]:
        if self._reference:
            return self._args, self._kwargs
        return self._fn, self._args, self._kwargs

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return name_of(self._fn)

    @property
    def module(self) -> str:
        """The module that a worker needs for it."""
        return getattr(self._fn, "__module__", None) or ""

    @property
    def keeps_errors(self) -> bool:
        """Whether its result says of each item whether it is a value or an exception."""
        return bool(self._flags & _wire.KEEP_ERRORS)

    @property
    def descriptors(self) -> list[int]:
        """The descriptors to send with it; they stay the call's."""
        return self._payload.descriptors

    def frame(self, number: int) -> list[_wire.Part]:
        """The buffers of its frame."""
        head = _LENGTH.pack(len(self._reference)) + self._reference
        parts = [head + bytes(-len(head) % _payload.ALIGNMENT), *self._payload.parts]
        return _wire.encode(
            _wire.JOB,
            number,
            parts,
            flags=self._flags | self._payload.flags,
            descriptors=len(self._payload.descriptors),
        )

    def turn_to_value(self, reason: str) -> None:
        """Pickles the call again, by value, after a worker refused the reference.

        Raises:
            PayloadError: it cannot go by value either.
        """
        self._payload.close()
        self._flags |= _wire.BY_VALUE
        self._reference = b""
        try:
            with _ByValue(self.module):
                self._payload = _payload.dumps_by_value(self._contents())
        except Exception as error:
            raise PayloadError(
                f"{self.name} is not known in a worker ({reason}) and cannot be sent by value "
                f"({_reason(error)}); define it at the top level of a module that workers can import"
            ) from error

    def close(self) -> None:
        """Lets go of the arguments and the descriptors."""
        self._payload.close()
        self._payload.parts = []
        self._args, self._kwargs = (), {}


class _ByValue:
    """Makes cloudpickle take a module's functions by value, as if it could not be imported."""

    def __init__(self, name: str) -> None:
        self._module = sys.modules.get(name) if name != "__main__" else None

    def __enter__(self) -> None:
        import cloudpickle

        if (
            self._module is not None
            and self._module.__name__ in cloudpickle.list_registry_pickle_by_value()
        ):
            self._module = None  # the user's own registration stays
        if self._module is not None:
            cloudpickle.register_pickle_by_value(self._module)

    def __exit__(self, *_: object) -> None:
        import cloudpickle

        if self._module is not None:
            cloudpickle.unregister_pickle_by_value(self._module)


_references: weakref.WeakKeyDictionary[Callable[..., object], bytes] = weakref.WeakKeyDictionary()


def _reference_to(fn: Callable[..., object]) -> bytes:
    """The pickle of a global name that leads to ``fn``; empty if there is none."""
    if not isinstance(fn, (types.FunctionType, type)) and not _is_builtin(fn):
        return b""  # a method, a partial, an instance: it has a state, which goes by value
    reference = _references.get(fn)
    if reference is None:
        try:
            reference = pickle.dumps(fn, protocol=4)
        except Exception:
            reference = b""  # a lambda, a closure
        _references[fn] = reference
    return reference


def _is_builtin(fn: object) -> bool:
    # The __self__ of len is its module, that of [].append the list.
    return isinstance(fn, types.BuiltinFunctionType) and isinstance(
        fn.__self__, (types.ModuleType, type(None))
    )


def _blame(
    fn: Callable[..., object],
    args: Sequence[object],
    kwargs: dict[str, object],
    flags: int,
    error: Exception,
) -> PayloadError:
    """Names the part of the call that cannot be pickled."""
    parts: list[tuple[str, object]] = [("the function itself", fn)]
    what = "item" if flags & _wire.CHUNK else "argument"
    parts += [(f"{what} {index}", value) for index, value in enumerate(args)]
    parts += [(f"argument {key}=", value) for key, value in kwargs.items()]
    for label, value in parts:
        reason = _refusal(value)
        if reason is not None:
            return PayloadError(
                f"{label} of {name_of(fn)} ({_describe(value)}) cannot be sent to a worker: "
                f"{_reason(reason)}; {_advice(value)}"
            )
    return PayloadError(f"the call of {name_of(fn)} cannot be sent to a worker: {_reason(error)}")


def _refusal(value: object) -> Exception | None:
    try:
        _payload.dumps(value).close()
    except Exception as error:
        return error
    return None


def _describe(value: object) -> str:
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            if _refusal(item) is not None:
                return (
                    f"{type(value).__name__}, its item {index} is of type {type(item).__qualname__}"
                )
    if isinstance(value, dict):
        for key, item in value.items():
            if _refusal(item) is not None:
                return f"dict, its item {key!r} is of type {type(item).__qualname__}"
    return f"of type {type(value).__qualname__}"


def _advice(value: object) -> str:
    if isinstance(value, types.CoroutineType):
        return "await it first, and pass its result"
    if isinstance(value, types.GeneratorType):
        return "pass list(...) of it, or feed it to map_cpu()"
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return (
            "define it at the top level of a module, without what cannot be pickled in its closure"
        )
    return "pass plain data (bytes, str, numbers, lists, dicts, arrays, SharedBuffer) and open the rest in the worker"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class UnknownNameError(Exception):
    """The call names something that this worker cannot find."""


_known: dict[bytes, Callable[..., Any]] = {}


def receive(frame: _wire.Frame) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """In the worker: the function and the arguments of a JOB frame.

    Raises:
        UnknownNameError: send it by value.
        PayloadError: it cannot be unpickled here, in any way.
    """
    try:
        return _receive(frame)
    except (AttributeError, ImportError) as error:
        if frame.flags & _wire.BY_VALUE:
            raise _unreadable(error) from error
        raise UnknownNameError(_reason(error)) from None
    except BaseException as error:
        raise _unreadable(error) from error


def _receive(frame: _wire.Frame) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    (length,) = _LENGTH.unpack_from(frame.body)
    end = _LENGTH.size + length
    reference = bytes(frame.body[_LENGTH.size : end])
    payload = memoryview(frame.body)[end + -end % _payload.ALIGNMENT :]
    if not reference:
        fn, args, kwargs = _payload.loads(payload, frame.flags, frame.descriptors)
        return fn, args, kwargs
    fn = _known.get(reference)
    if fn is None:
        fn = _known[reference] = pickle.loads(reference)
    args, kwargs = _payload.loads(payload, frame.flags, frame.descriptors)
    return fn, args, kwargs


def _unreadable(error: BaseException) -> PayloadError:
    return PayloadError(
        f"an argument could not be unpickled in the worker: {_reason(error)}; "
        "the __reduce__, __setstate__ or __init__ of its type must work there"
    )
