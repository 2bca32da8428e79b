"""Exceptions: from the process in which one was raised to the one that awaits it, as themselves.

Pickle rebuilds an exception by calling its class with ``args``, which fails, or silently changes
the message, for every class whose ``__init__`` takes something else (cpython #80041, open since
2019). Here the object is rebuilt without the ``__init__`` of Python classes: ``args``, attributes
and ``__notes__`` are what they were. A class that defines its own ``__reduce__`` is left to it.
"""

from __future__ import annotations

import _pickle as pickle
import io
import struct
import sys
from typing import Any

from ._errors import PayloadError, reason_of

_LENGTH = struct.Struct("<I")
_MOST_CAUSES = 8  # of a chain that travel as objects; the traceback shows them all
_OUT_OF_MEMORY = pickle.dumps(MemoryError())  # in advance


def dumps(error: BaseException, *, skip: int = 0) -> bytes:
    """In the worker: the body of a RAISED frame. Never raises what comes of the exception.

    Args:
        error: what was raised.
        skip: how many frames of its traceback are ours, not the user's.
    """
    traceback = error.__traceback__
    for _ in range(skip):
        traceback = traceback and traceback.tb_next
    error = BaseException.with_traceback(
        error, traceback
    )  # even where the class sets no attributes
    context = error.__context__
    if isinstance(error, MemoryError) or isinstance(context, MemoryError):
        _let_go(error)
        _let_go(context)
    summary = pickle.dumps((_type_name(error), _text(error), _format(error)))
    return b"".join([_LENGTH.pack(len(summary)), summary, _pickled(error)])


def _let_go(error: BaseException | None) -> None:
    """Drops what the job has kept, without which there may be no memory to tell of it.

    As ``traceback.clear_frames`` does, which there may be no memory to import.
    """
    traceback = None if error is None else error.__traceback__
    while traceback is not None:
        try:
            traceback.tb_frame.clear()
        except RuntimeError:
            pass  # it still runs
        traceback = traceback.tb_next


def _type_name(error: BaseException) -> str:
    kind = type(error)
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as broken:
        return f"<its __str__ raised {type(broken).__name__}>"


def _format(error: BaseException) -> str:
    try:
        import traceback  # only now: few jobs raise

        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except BaseException as broken:
        return f"{_type_name(error)}: {_text(error)} (no traceback: {type(broken).__name__})\n"


def _pickled(error: BaseException) -> bytes:
    """The exception, or what can be kept of it; empty where not even its class can be named."""
    try:
        return _dump(error, whole=True)
    except BaseException:
        pass  # something in it cannot be pickled, or it is its own argument
    try:
        return _dump(error, whole=False)
    except BaseException:
        return _OUT_OF_MEMORY if isinstance(error, MemoryError) else b""


def _dump(obj: object, *, whole: bool) -> bytes:
    try:
        return _dump_with(pickle.Pickler, obj, whole=whole)
    except Exception as refused:
        import cloudpickle

        try:
            return _dump_with(cloudpickle.Pickler, obj, whole=whole)
        except Exception:
            raise refused from None


def _dump_with(pickler: Any, obj: object, *, whole: bool) -> bytes:
    class Pickler(pickler):  # type: ignore[misc]
        causes = 0

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, BaseException):
                self.causes += 1
                return _reduce(obj, whole=whole, with_cause=self.causes <= _MOST_CAUSES)
            inherited = getattr(super(), "reducer_override", None)
            return inherited(obj) if inherited else NotImplemented

    file = io.BytesIO()
    Pickler(file, 5).dump(obj)
    return file.getvalue()


def _reduce(error: BaseException, *, whole: bool, with_cause: bool) -> Any:
    kind = type(error)
    if _reduces_itself(kind) and _survives(error):
        return NotImplemented
    base = _builtin_base(kind)
    reduced: tuple[Any, ...] = base.__reduce__(error)  # type: ignore[assignment]
    _, args, *state = reduced
    attributes = dict((state and state[0]) or {})
    if not whole:
        args = tuple(map(_keepable, args))
        attributes = {name: value for name, value in attributes.items() if _is_keepable(value)}
    attributes["__cause__"] = error.__cause__ if whole and with_cause else None
    attributes["__suppress_context__"] = error.__suppress_context__
    # What is set after it was created may refer to the exception itself.
    return _create, (kind, base, args), attributes, None, None, _set_attributes


def _reduces_itself(kind: type[BaseException]) -> bool:
    return any(
        name in vars(ancestor)
        for ancestor in kind.__mro__
        if not _is_builtin(ancestor)
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    )


def _survives(error: BaseException) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except BaseException:  # whatever its methods do, SystemExit included
        return False


def _builtin_base(kind: type[BaseException]) -> type[BaseException]:
    return next(
        ancestor
        for ancestor in kind.__mro__
        if _is_builtin(ancestor) and issubclass(ancestor, BaseException)
    )


def _is_builtin(kind: type) -> bool:
    return kind.__module__ == "builtins"


def _is_keepable(value: object) -> bool:
    try:
        _dump(value, whole=True)
    except BaseException:
        return False
    return True


def _keepable(value: object) -> object:
    if _is_keepable(value):
        return value
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__qualname__}>"


def loads(body: bytearray | memoryview, job: str, pid: int | None) -> BaseException:
    """In the loop process: the exception of a RAISED frame, with the worker's traceback shown.

    Where it cannot be rebuilt here, a PayloadError that names it. Never raises what comes of it.
    """
    try:
        (length,) = _LENGTH.unpack_from(body)
        kind, text, formatted = pickle.loads(body[_LENGTH.size : _LENGTH.size + length])
    except Exception as reason:
        return PayloadError(f"what {job} raised could not be read: {reason_of(reason)}")
    data = body[_LENGTH.size + length :]
    try:
        if not data:
            raise pickle.PicklingError("its class cannot be pickled")
        error = _rebuild(data)
    except KeyboardInterrupt:
        raise  # as likely to be Ctrl-C
    except BaseException as reason:
        error = PayloadError(
            f"{job} raised {kind}: {text}; the exception itself could not be sent back "
            f"({reason_of(reason)}); define its class at the top level of a module "
            "that both processes can import"
        )
    _show(error, f"In worker {pid}:\n{formatted.rstrip()}")
    return error


def _rebuild(data: bytes | bytearray | memoryview) -> BaseException:
    error = pickle.loads(data)
    if not isinstance(error, BaseException):
        raise pickle.UnpicklingError(f"it became a {type(error).__name__}")
    return error


def _create(kind: Any, base: Any, args: tuple[Any, ...]) -> BaseException:
    error: BaseException = base.__new__(kind, *args)
    base.__init__(error, *args)  # fills the C fields: code, value, errno, start, end, ...
    return error


def _set_attributes(error: BaseException, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        BaseException.__setattr__(error, name, value)  # even where the class is frozen


class WorkerTraceback(Exception):  # noqa: N818 - it is shown, never caught
    """Carries the worker's traceback as a cause, where exceptions have no notes (Python 3.10)."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _show(error: BaseException, text: str) -> None:
    if sys.version_info >= (3, 11):
        notes = getattr(error, "__notes__", None)
        # Not add_note(), which fails where a job has set __notes__ to anything but a list.
        shown = [*notes, text] if isinstance(notes, list) else [text]
        BaseException.__setattr__(error, "__notes__", shown)
        return
    last, seen = error, {id(error)}
    while last.__cause__ is not None and id(last.__cause__) not in seen:  # it may be its own
        last = last.__cause__
        seen.add(id(last))
    BaseException.__setattr__(last, "__cause__", WorkerTraceback(text))
