"""Calls: a function and its arguments, from the process that makes the call to the one that runs it.

A function goes by reference first, as pickle writes a global name. The worker keeps what a
reference led to, and refuses a call whose names it does not know before anything has run; the call
is then sent again by value. A function by value is never kept: its closure and globals may change.
"""

from __future__ import annotations

import _pickle as pickle
import functools
import itertools
import struct
import sys
import types
from collections.abc import Callable, Generator, Sequence
from typing import Any

from . import _payload, _steps, _wire
from ._errors import PayloadError, reason_of

_LENGTH = struct.Struct("<I")
_SMALL = 16 * 1024  # bytes of arguments that are sent in no time
_MOST_TRIED = 1000  # items of an argument, each by itself, to find which cannot be pickled: 3 ms
_MOST_IN_CHUNK = 64  # descriptors, of the 1,024 that both sides may have: several are on their way


_NONE: Sequence[Any] = ()
_NO_KWARGS: dict[str, object] = {}  # never added to; an empty one each would take 64 bytes a job
_NOT_YET = _payload.Payload([], 0, [])
_PECULIAR = _wire.CHUNK | _wire.COROUTINE  # what takes a time of its own


def _always() -> bool:
    return True


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
    if type(fn) in _HASHABLE and fn in _references:
        return  # it was checked when it was first seen
    if not callable(fn):
        raise TypeError(
            f"{user}() takes a function and its arguments, got {type(fn).__name__}; "
            f"write {user}(fn, x), not {user}(fn(x))"
        )
    if is_async(fn):
        name = getattr(fn, "__name__", "fn")
        here = f"map_io({name}, ...)" if user == "map_cpu" else f"await {name}(...)"
        raise TypeError(
            f"{user}() runs plain functions; {name} is a coroutine function, which runs on the event "
            f"loop: {here}; or on that of a worker: await run_async({name}, ...)"
        )


def check_coroutine_function(fn: object, user: str) -> None:
    """Refuses what gives no coroutine when it is called.

    Raises:
        TypeError: ``fn`` is no coroutine function.
    """
    if is_coroutine_function(fn):
        return
    if not callable(fn):
        close = getattr(fn, "close", None)  # a coroutine that nobody will await now
        if type(fn) is types.CoroutineType and close is not None:
            close()
        raise TypeError(
            f"{user}() takes a coroutine function and its arguments, got {type(fn).__name__}; "
            f"write {user}(fn, x), not {user}(fn(x))"
        )
    name = getattr(fn, "__name__", type(fn).__name__)
    raise TypeError(
        f"{user}() takes a coroutine function (async def), and {name} is none; plain functions are "
        f"for run_cpu({name}, ...)"
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
        args: its positional arguments; for a chunk, the list of the argument tuples of its calls,
            or of their single arguments.
        kwargs: its keyword arguments.
        flags: ``_wire.CHUNK``, ``_wire.ITEMS`` and ``_wire.KEEP_ERRORS``; or ``_wire.COROUTINE``.
        shares_main: tells whether workers have this process's ``__main__``; asked if it matters.
        first: the index of a chunk's first item, for messages.
        payload: the arguments, where :meth:`steps` has pickled them.

    Attributes:
        kind: what calls that are likely to take as long have in common: a function by reference,
            with small arguments. ``None``: nothing is known of it.

    Raises:
        PayloadError: the function or an argument cannot be pickled; it names which.
    """

    __slots__ = (
        "_args", "_carried", "_flags", "_fn", "_head", "_kwargs", "_payload", "_small", "kind",
    )  # fmt: skip

    def __init__(
        self,
        fn: Callable[..., object],
        args: Sequence[object],
        kwargs: dict[str, object],
        *,
        flags: int = 0,
        shares_main: Callable[[], bool] = _always,
        first: int = 0,
        payload: _payload.Payload | None = None,
    ) -> None:
        self._fn, self._args, self._kwargs = fn, args, kwargs or _NO_KWARGS
        self._flags, self._carried = flags, b""
        references = _coroutine_references if flags & _wire.COROUTINE else _references
        self._head = _head_of(fn, shares_main, references)
        self._payload = payload
        self._small: bytes | None = None  # the arguments, if they are small
        self.kind: bytes | None = None
        if payload is not None:
            return
        is_plain = not (kwargs or flags & _wire.CHUNK) and all(map(_payload.is_plain, args))
        if is_plain and self._head is not _BY_VALUE:
            self._small = pickle.dumps((args, kwargs), 5)
        else:
            try:
                self._payload = payload = _payload.dumps(self._contents(), shares_main)
            except KeyboardInterrupt:
                raise  # Ctrl-C, most likely
            except BaseException as error:  # SystemExit and CancelledError would end something else
                raise _steps.run(_blame(fn, args, kwargs, flags, error, first=first)) from error
            self._refuse_many()
            if len(payload.parts) > 1 or payload.descriptors or len(payload.parts[0]) > _SMALL:
                return
            self._small = bytes(payload.parts[0])
            self._payload = None
        if self._head is not _BY_VALUE and not flags & _PECULIAR:
            self.kind = self._head

    @classmethod
    def steps(
        cls,
        fn: Callable[..., object],
        args: Sequence[object],
        kwargs: dict[str, object],
        *,
        flags: int = 0,
        shares_main: Callable[[], bool] = _always,
        first: int = 0,
    ) -> Generator[None, None, Call]:
        """Makes a call with large arguments a millisecond at a time; it is the value returned."""
        call = cls(fn, (), {}, flags=flags, shares_main=shares_main, payload=_NOT_YET)
        call._args, call._kwargs = args, kwargs or _NO_KWARGS
        try:
            call._payload = yield from _steps.dump_steps(
                call._contents(), main_is_shared=shares_main()
            )
        except _steps.ChangedError as error:
            raise PayloadError(f"an argument of {name_of(fn)} cannot be sent: {error}") from error
        except (KeyboardInterrupt, GeneratorExit):
            raise  # Ctrl-C, most likely; given up
        except BaseException as error:
            raise (yield from _blame(fn, args, kwargs, flags, error, first=first)) from error
        call._refuse_many()
        return call

    def _refuse_many(self) -> None:
        """Refuses a chunk with many descriptors: it can be divided, a single call cannot."""
        if self.is_chunk and len(self._args) > 1 and len(self.descriptors) > _MOST_IN_CHUNK:
            refused = PayloadError(
                f"{len(self.descriptors)} SharedBuffers in a chunk of {self.name}; "
                f"{_MOST_IN_CHUNK} can travel at once: lower chunksize"
            )
            self.close()
            raise refused

    def _contents(self) -> tuple[object, ...]:
        if self._head is _BY_VALUE:
            return self._fn, self._args, self._kwargs
        return self._args, self._kwargs

    @property
    def is_chunk(self) -> bool:
        """Whether it is a list of calls."""
        return self._flags & _wire.CHUNK != 0

    @property
    def is_coroutine(self) -> bool:
        """Whether its function is a coroutine function."""
        return self._flags & _wire.COROUTINE != 0

    @property
    def keeps_errors(self) -> bool:
        """Whether its result says which of its items are exceptions."""
        return self._flags & _wire.KEEP_ERRORS != 0

    @property
    def name(self) -> str:
        """The function's name, for messages."""
        return name_of(self._fn)

    @property
    def module(self) -> str:
        """The module that a worker needs for it."""
        return getattr(self._fn, "__module__", None) or ""

    @property
    def weight(self) -> int:
        """Bytes that its arguments take."""
        if self._small is not None:
            return len(self._small)
        return _payload.weight(sum(map(len, self.parts)), self.descriptors)

    @property
    def descriptors(self) -> Sequence[int]:
        """The descriptors to send with it; they stay the call's."""
        return self._payload.descriptors if self._payload is not None else _NONE

    @property
    def parts(self) -> Sequence[_wire.Part]:
        """Its payload, where that is not small; empty where it is."""
        return self._payload.parts if self._payload is not None else _NONE

    def may_be_interrupted(self) -> None:
        """Lets JobCancelled be raised in it."""
        self._flags |= _wire.SOFT

    def carry(self, carried: bytes) -> None:
        """Gives it what the job carries; see :mod:`._context`."""
        self._carried = carried
        self._flags |= _wire.CARRIES

    def frame(
        self, number: int, notes: bytes = b"", record: bytes = b"", added: int = 0
    ) -> list[_wire.Part]:
        """The buffers of its frame.

        Args:
            number: that of the job.
            notes: on segments, for the worker.
            record: stands for the payload, which is in a segment.
            added: how many descriptors are sent besides its own.
        """
        head = self._carried + self._head if self._carried else self._head
        if self._small is not None:
            body = head + self._small
            if not notes:
                return [_wire.encode_small(_wire.JOB, number, body, self._flags)]
            return _wire.encode(
                _wire.JOB, number, [notes, body], flags=self._flags | _wire.RELEASES
            )
        payload = self._payload
        assert payload is not None, "the call was closed"
        flags = self._flags | payload.flags
        flags |= (_wire.RELEASES if notes else 0) | (_wire.SEGMENT if record else 0)
        parts = [record] if record else payload.parts
        return _wire.encode(
            _wire.JOB,
            number,
            [notes, head, *parts],
            flags=flags,
            descriptors=len(payload.descriptors) + added,
        )

    def turn_to_value(self, reason: str) -> None:
        """Pickles the call again, by value, after a worker refused the reference.

        Raises:
            PayloadError: it cannot go by value either.
        """
        if self._payload is not None:
            self._payload.close()
        self._flags |= _wire.BY_VALUE
        self._small = self.kind = None
        self._head = _BY_VALUE
        try:
            with _ByValue(self.module):
                contents = self._contents()
                self._payload = _payload.dumps_by_value(contents)
        except Exception as error:
            raise PayloadError(
                f"{self.name} is not known in a worker ({reason}) and cannot be sent by value "
                f"({reason_of(error)}); define it at the top level of a module that workers can import"
            ) from error

    def close(self) -> None:
        """Lets go of the arguments and the descriptors."""
        if self._payload is not None:
            self._payload.close()
            self._payload = None
        self._args, self._kwargs = (), _NO_KWARGS


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


# Strong references, to what its module holds anyway; a weak dictionary costs 1 µs a look.
_references: dict[Any, bytes] = {}
_coroutine_references: dict[Any, bytes] = {}  # apart: who is in the other is a plain function
_MOST_REFERENCES = 1024  # of functions that are defined again and again, until all are forgotten
_HASHABLE = (types.FunctionType, types.BuiltinFunctionType)


def _head_of(
    fn: Callable[..., object], shares_main: Callable[[], bool], references: dict[Any, bytes]
) -> bytes:
    """What a frame begins with: the pickle of a global name that leads to ``fn``, or none."""
    head = references.get(fn) if type(fn) in _HASHABLE else None
    if head is None:
        head = _new_head(fn)
        # Not what goes by value: a closure, or the method of a list, would be kept with all it holds.
        if head is not _BY_VALUE and type(fn) in _HASHABLE:
            if len(references) >= _MOST_REFERENCES:
                references.clear()
            references[fn] = head
    if b"__main__" in head and not shares_main():
        return _BY_VALUE
    return head


def _new_head(fn: Callable[..., object]) -> bytes:
    if not isinstance(fn, (types.FunctionType, type)) and not _is_builtin(fn):
        return _BY_VALUE  # a method, a partial, an instance: it has a state
    try:
        return _with_length(pickle.dumps(fn, protocol=4))
    except Exception:
        return _BY_VALUE  # a lambda, a closure


def _with_length(reference: bytes) -> bytes:
    head = _LENGTH.pack(len(reference)) + reference
    return head + bytes(-len(head) % _payload.ALIGNMENT)


_BY_VALUE = _with_length(b"")


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
    error: BaseException,
    *,
    first: int,
) -> Generator[None, None, PayloadError]:
    """Names the part of the call that cannot be pickled, which is tried in steps where it is large."""
    parts: list[tuple[str, object]] = [("the function itself", fn)]
    what = "item" if flags & _wire.CHUNK else "argument"
    parts += [(f"{what} {index}", value) for index, value in enumerate(args, first)]
    parts += [(f"argument {key}=", value) for key, value in kwargs.items()]
    for label, value in parts:
        reason = yield from _refusal(value)
        if reason is not None:
            return PayloadError(
                f"{label} of {name_of(fn)} ({_describe(value)}) cannot be sent to a worker: "
                f"{reason_of(reason)}; {_advice(value)}"
            )
    return PayloadError(f"the call of {name_of(fn)} cannot be sent to a worker: {reason_of(error)}")


def _refusal(value: object) -> Generator[None, None, BaseException | None]:
    in_steps = _steps.is_large(value)
    try:
        if in_steps:
            payload: _payload.Payload = yield from _steps.dump_steps(value)
        else:
            payload = _payload.dumps(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if in_steps and isinstance(error, GeneratorExit):
            raise  # given up between two steps; the user's own would be another error there
        return error
    payload.close()
    return None


def _describe(value: Any) -> str:
    kind = type(value)  # never isinstance(), which asks the value for its __class__
    if _steps.is_large(value):
        return f"of type {kind.__qualname__}"  # to try its items would take as long again
    if issubclass(kind, (tuple, list)):
        for index, item in enumerate(itertools.islice(value, _MOST_TRIED)):
            if _is_refused(item):
                return f"{kind.__name__}, its item {index} is of type {type(item).__qualname__}"
    if issubclass(kind, dict):
        for key, item in itertools.islice(value.items(), _MOST_TRIED):
            if _is_refused(item):
                return f"dict, its item {key!r} is of type {type(item).__qualname__}"
    return f"of type {kind.__qualname__}"


def _is_refused(item: object) -> bool:
    return _steps.run(_refusal(item)) is not None


def _advice(value: object) -> str:
    kind = type(value)
    if kind is types.CoroutineType:
        return "await it first, and pass its result"
    if kind is types.GeneratorType:
        return "pass list(...) of it, or feed it to map_cpu()"
    if kind in (types.FunctionType, types.MethodType):
        return (
            "define it at the top level of a module, without what cannot be pickled in its closure"
        )
    return "pass plain data (bytes, str, numbers, lists, dicts, arrays, SharedBuffer) and open the rest in the worker"


class UnknownNameError(Exception):
    """The call names something that this worker cannot find."""


_known: dict[bytes, Callable[..., Any]] = {}


Open = Callable[[_wire.Frame], None]  # puts the payload in the place of its record


def receive(
    frame: _wire.Frame, open_segment: Open | None = None
) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """In the worker: the function and the arguments of a JOB frame.

    Raises:
        UnknownNameError: send it by value.
        PayloadError: it cannot be unpickled here, in any way.
    """
    body = frame.body
    (length,) = _LENGTH.unpack_from(body)
    end = _LENGTH.size + length
    start = end + -end % _payload.ALIGNMENT
    reference = bytes(body[_LENGTH.size : end])
    # A copy of a small one costs less than a view of it.
    frame.body = body[start:] if len(body) <= _SMALL else memoryview(body)[start:]
    del body
    try:
        if open_segment is not None and frame.flags & _wire.SEGMENT:
            open_segment(frame)
        if not reference:
            fn, args, kwargs = _loads(frame)
            return fn, args, kwargs
        fn = _known.get(reference)
        if fn is None:
            fn = _known[reference] = _find(reference)
        args, kwargs = _loads(frame)
    except (AttributeError, ImportError) as error:
        if frame.flags & _wire.BY_VALUE:
            raise _unreadable(error) from error
        raise UnknownNameError(reason_of(error)) from None
    except _ImportFailedError as failed:
        raise PayloadError(str(failed)) from failed.__cause__
    except BaseException as error:
        raise _unreadable(error) from error
    return fn, args, kwargs


class _ImportFailedError(Exception):
    """The module of a function cannot be imported here, and says so by no ImportError."""


def _find(reference: bytes) -> Callable[..., Any]:
    try:
        fn: Callable[..., Any] = pickle.loads(reference)
    except (AttributeError, ImportError):
        raise
    except BaseException as error:
        raise _ImportFailedError(
            f"the module of the function could not be imported in the worker: {reason_of(error)}; "
            "what it does at its top level must work there"
        ) from error
    return fn


def _loads(frame: _wire.Frame) -> Any:
    if frame.descriptors == [] and not frame.flags & _PARTICULAR:
        return pickle.loads(frame.body)
    body, frame.body = frame.body, _EMPTY
    if frame.private or frame.flags & _wire.PIECES:
        return _steps.run(
            _steps.load_steps(body, frame.flags, frame.descriptors, private=frame.private)
        )
    return _payload.loads(body, frame.flags, frame.descriptors)


_EMPTY = bytearray()
_PARTICULAR = _wire.SEGMENT | _wire.BUFFERS | _wire.PIECES  # what more than pickle is needed for


def _unreadable(error: BaseException) -> PayloadError:
    return PayloadError(
        f"an argument could not be unpickled in the worker: {reason_of(error)}; "
        "the __reduce__, __setstate__ or __init__ of its type must work there"
    )
