"""Log records and warnings of workers: taken there, handled in the loop process.

Theory of operation. A forked worker inherits loggers, handlers and the descriptors behind them: what
they wrote would have the request id of the day when the server was forked, and could interleave with
what the loop process writes. So a worker calls no handler that it has inherited. It sends the record
as a frame, ahead of the reply of its job, and the loop process gives it to the logger of that name:
levels, filters, handlers and formats are those of the program. Handlers that the worker's own code
has made (in the initializer or in a job) are called there as ever. Warnings that would be shown are
sent the same way, and issued again by the loop process.

Who may block: not the job. A record is sent if the socket has room for it, else kept; what is kept
is sent with the next one, at the latest before the reply, which may block. Rate and memory have
limits; what is above them is dropped, counted, and told. Threads of a job log, too: one of them
sends at a time, and whoever finds another one sending leaves its record to that one, which therefore
looks again when it has let go. A reply is sent under the same lock, since half a frame of one and
half of another are none, and is followed by the same look.

Levels. The loop process tells each worker its levels when it starts, and again ahead of a job when
they have changed: so that what nobody wants is not even sent. A level that the worker's own code has
set stays until the loop process changes that of the same logger.
"""

from __future__ import annotations

import _pickle as pickle
import os
import signal
import socket
import sys
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from time import monotonic
from types import CodeType, ModuleType, TracebackType
from typing import Any

from . import _descriptors, _raised, _wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging

MOST = 1000  # records of a job in a second
MOST_BYTES = 1 << 20  # of them in a second; and of those of a worker that are kept
_MOST_FRAMES = 64  # of a traceback
_NOW = socket.MSG_DONTWAIT
_SOFT_CANCEL = (signal.SIGURG,)  # raises in a job wherever it is

_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_RECORD, _WARNING = "record", "warning"


# --- in the worker -------------------------------------------------------------------------------

coroutine: ContextVar[int] = ContextVar("asynclam.coroutine", default=0)  # the number of its job


class Outbox:
    """What a worker says besides its replies.

    Args:
        channel: the worker's, blocking.
        clock: seconds.

    Attributes:
        job: the number of the job that runs; 0: none, but a thread of one may, or coroutines, which
            share a rate.
        turn: held by whoever sends on the channel.
        is_full: whether something waits to be sent, or to be told.
    """

    def __init__(self, channel: socket.socket, clock: Callable[[], float] = monotonic) -> None:
        self.job = 0
        self.turn = allocate_lock()
        self.is_full = False
        self._channel = channel
        self._clock = clock
        self._frames: deque[bytes] = deque()
        self._kept = 0  # bytes of them
        self._rest = b""  # of a frame of which the beginning is sent
        self._counted = 0  # the job for which these count
        self._since = 0.0  # and when its second began
        self._count = self._bytes = 0
        self._dropped = 0

    def put(self, body: bytes) -> None:
        """Sends a body, or keeps it to be sent, or counts it as dropped. Never blocks."""
        if not self._admits(len(body)):
            self._dropped += 1
            self.is_full = True
            return
        self._append(body, 0)
        self.look_again()

    def _admits(self, nbytes: int) -> bool:
        now = self._clock()
        if self._counted != self.job or not 0 <= now - self._since < 1:
            self._counted, self._since = self.job, now
            self._count = self._bytes = 0
        self._count += 1
        self._bytes += nbytes
        return self._count <= MOST and self._bytes <= MOST_BYTES >= self._kept + nbytes

    def _append(self, body: bytes, dropped: int) -> None:
        number = self.job or coroutine.get()
        frame = _wire.encode_small(_wire.RECORD, number, body, _wire.dropped_flags(dropped))
        nbytes = len(frame)
        self._kept += nbytes  # without a call in it, at which threads may change
        self._frames.append(frame)
        self.is_full = True

    def look_again(self) -> None:
        """Sends what is kept, as far as there is room; never blocks. For whoever had the turn.

        Where the socket is full, what is left waits for the next record or reply.
        """
        # A cancel that is raised between the send and the line that takes note of it would tear a frame,
        # and one between the lock and the try would keep the turn. Blocking looks for signals that have
        # come before: it may raise when it has blocked, so what was is asked for first.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SOFT_CANCEL)
            while self._frames or self._rest:
                # Never waits for the turn: it may be this very thread that has it, in a finaliser.
                if not self.turn.acquire(blocking=False):
                    return
                try:
                    if not self._send(_NOW):
                        return
                finally:
                    self.turn.release()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _send(self, flags: int) -> bool:
        """Sends until nothing is left (then true), or there is no room. Has the turn.

        No cancel comes meanwhile: none is raised in it, or there is no job.
        """
        self.is_full = self._dropped > 0  # before the look: who puts something later says so
        try:
            while self._rest or self._frames:
                rest = self._rest or self._frames.popleft()
                self._rest = rest
                sent = self._channel.send(rest, flags | _descriptors.NOSIGNAL)
                self._rest = rest[sent:]
                self._kept -= sent
        except BlockingIOError:
            self.is_full = True
            return False
        except OSError:  # the loop process is gone, which the worker will notice when it reads
            self._frames.clear()
            self._rest, self._kept = b"", 0
        return True

    def empty(self) -> None:
        """Sends all that is kept, and how many were dropped; may block. Has the turn."""
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._append(_dropped_body(dropped), dropped)
        self._send(0)


def _dropped_body(dropped: int) -> bytes:
    state = {
        "name": "asynclam",
        "levelno": 30,
        "levelname": "WARNING",
        "msg": (
            "%d log records of worker %d were dropped: of a job at most %d and %d bytes are sent in "
            "a second; raise a logger's level, or add a handler to it in the worker"
        ),
        "args": (dropped, os.getpid(), MOST, MOST_BYTES),
        "process": os.getpid(),
    }
    return pickle.dumps((_RECORD, state, b"", None), 5)


class _Taken:
    """What is done to this process, a worker, and undone in a process that its jobs fork."""

    def __init__(self) -> None:
        self.outbox: Outbox
        self.inherited: dict[int, object] = {}  # handlers by their id
        self.placeholder: logging.Handler | None = None
        self.handle_here: Callable[..., object] | None = None
        self.show_here: Any
        self.levels: dict[str, int] = {}  # as the loop process told them last
        self.untold: bytes = b""  # levels that wait for logging to be imported


_taken = _Taken()


def install(outbox: Outbox) -> None:
    """From here on, what this worker logs and warns of goes to the loop process."""
    import warnings

    _taken.outbox = outbox
    logging = sys.modules.get("logging")
    if logging is None:
        sys.meta_path.insert(0, _Watch())
    else:
        _take_over(logging)
    _taken.show_here = warnings.showwarning
    warnings.showwarning = _show_warning
    os.register_at_fork(after_in_child=_give_back)


class _Watch:
    """Notices that logging is imported; a worker that needs none does not pay for it."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> Any:
        if name != "logging":
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                execute(module)
                _take_over(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _take_over(logging: Any) -> None:
    handlers = [reference() for reference in list(logging._handlerList)]
    if not logging.root.handlers:
        # logging.warning() and its like would call basicConfig(), as would many an initializer.
        _taken.placeholder = logging.NullHandler()
        logging.root.addHandler(_taken.placeholder)
        handlers.append(_taken.placeholder)
    _taken.inherited = {id(handler): handler for handler in handlers}
    _taken.handle_here, logging.Logger.handle = logging.Logger.handle, _handle
    _taken.levels = _levels_of(logging)
    if _taken.untold:
        set_levels(_taken.untold)


def _give_back() -> None:
    """In a process that a job has forked: it has no channel, and its handlers are all there is."""
    logging = sys.modules.get("logging")
    if logging is not None and _taken.handle_here is not None:
        logging.Logger.handle = _taken.handle_here
        _taken.handle_here = None
        if _taken.placeholder is not None:
            logging.root.removeHandler(_taken.placeholder)
    import warnings

    if warnings.showwarning is _show_warning:
        warnings.showwarning = _taken.show_here


def _handle(logger: logging.Logger, record: logging.LogRecord) -> None:
    """In the place of ``Logger.handle``."""
    made_here, goes_on = _handlers_of(logger)
    if goes_on:
        _taken.outbox.put(_dump_record(record))
    if made_here and (filtered := logger.filter(record)):
        if filtered is not True and not isinstance(filtered, int):
            record = filtered  # since Python 3.12
        for handler in made_here:
            if record.levelno >= handler.level:
                handler.handle(record)


def _handlers_of(logger: logging.Logger) -> tuple[list[logging.Handler], bool]:
    """The handlers that were made here, and whether those of the loop process have a say.

    They have not if code of this worker has taken the logger away from them, as
    ``unittest.TestCase.assertLogs`` does.
    """
    made_here: list[logging.Handler] = []
    goes_on = False
    current: logging.Logger | None = logger
    while current is not None:
        for handler in current.handlers:
            if id(handler) in _taken.inherited:
                goes_on = True
            else:
                made_here.append(handler)
        if not current.propagate:
            return made_here, goes_on or not made_here
        current = current.parent
    return made_here, True


def _dump_record(record: logging.LogRecord) -> bytes:
    """A record as a body: plain values, pickled objects, and what there is of an exception.

    An object may fail to unpickle in the loop process. So next to it there is a text of it.
    """
    state = dict(vars(record))
    for name in _made_by_factory():
        state.pop(name, None)
    if isinstance(record.exc_info, tuple):  # else it is a value that formatters ignore
        state.pop("exc_info")
    odd = {name: value for name, value in state.items() if not _is_plain(value)}
    error = _dump_error(record)
    if not odd:
        return pickle.dumps((_RECORD, state, b"", error), 5)
    if "msg" in odd or "args" in odd:
        odd["msg"], odd["args"] = state["msg"], state["args"]
        state["msg"], state["args"] = _message(record), None
    for name in odd.keys() - {"msg", "args"}:
        state[name] = _text(odd[name])
    return pickle.dumps((_RECORD, state, _dump_objects(odd), error), 5)


def _is_plain(value: object) -> bool:
    kind = type(value)
    if kind is tuple:
        return all(type(item) in _PLAIN for item in value)  # type: ignore[attr-defined]
    return kind in _PLAIN


def _made_by_factory() -> set[str]:
    """Attributes that a record factory of the user adds: the loop process has it, too."""
    import logging

    factory = logging.getLogRecordFactory()
    if factory is logging.LogRecord:
        return set()
    try:
        blank = factory("", 0, "", 0, "", (), None)
    except Exception:  # it wants more; what it adds travels
        return set()
    return set(vars(blank)) - set(vars(logging.LogRecord("", 0, "", 0, "", (), None)))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:
        return f"{_text(record.msg)} {_text(record.args)} (cannot be formatted: {error!r})"


def _text(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__qualname__}, its __repr__ raised {type(error).__name__}>"


def _dump_objects(objects: dict[str, object]) -> bytes:
    try:
        return pickle.dumps(objects, 5)
    except Exception:
        pass
    kept = {name: value for name, value in objects.items() if _can_be_pickled(value)}
    if not {"msg", "args"} <= kept.keys():  # one is nothing without the other
        kept.pop("msg", None)
        kept.pop("args", None)
    return pickle.dumps(kept, 5)


def _can_be_pickled(value: object) -> bool:
    try:
        pickle.dumps(value, 5)
    except Exception:
        return False
    return True


Frames = list[tuple[str, int, str]]  # file, line and function
Error = tuple[str, str, str, Frames, bytes]  # type, text, traceback as text, frames, the object


def _dump_error(record: logging.LogRecord) -> Error | None:
    info = record.exc_info
    if not isinstance(info, tuple) or info[1] is None:
        return None
    kind, error, traceback = info
    import logging

    text = record.exc_text or logging.Formatter().formatException(info)
    frames: Frames = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append((code.co_filename, traceback.tb_lineno, code.co_name))
        traceback = traceback.tb_next
    name = kind.__name__
    return name, _raised._text(error), text, frames[-_MOST_FRAMES:], _raised._pickled(error)


def _show_warning(  # noqa: PLR0917 - the signature is that of the hook
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """In the place of ``warnings.showwarning``."""
    if file is not None:
        _taken.show_here(message, category, filename, lineno, file, line)
        return
    builtin = next(kind for kind in category.__mro__ if kind.__module__ == "builtins")
    try:
        pickled = pickle.dumps((message, category), 5)
    except Exception:
        pickled = b""
    place = filename, lineno, _module_of(filename)
    _taken.outbox.put(pickle.dumps((_WARNING, place, pickled, (str(message), builtin.__name__)), 5))


def _module_of(filename: str) -> str | None:
    """The name of the module that warns: it is running, and filters go by it."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == filename:
            name = frame.f_globals.get("__name__")
            return name if isinstance(name, str) else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def set_levels(levels: bytes) -> None:
    """Takes over the levels of the loop process."""
    logging = sys.modules.get("logging")
    if logging is None or _taken.handle_here is None:
        _taken.untold = levels
        return
    told: dict[str, int] = pickle.loads(levels)
    before, _taken.levels = _taken.levels, told
    for name in told.keys() | before.keys():
        level = told.get(name, 0)
        if level == before.get(name, 0):
            continue
        if name == _DISABLED:
            logging.disable(level)
        else:
            logging.getLogger(name).setLevel(level)


# --- in the loop process -------------------------------------------------------------------------

_DISABLED = "\0"  # in the place of a logger's name: logging.disable()

# Logger.isEnabledFor() caches by level, and whatever changes any level empties all caches. So the
# cache of a logger of ours tells that something has changed, for the price of one look.
_canary: Any = None
_levels = b""


def levels() -> bytes:
    """The levels of all loggers: the same object as long as none has changed."""
    if _canary is None or not _canary._cache:
        _look_at_levels()
    return _levels


def _look_at_levels() -> None:
    global _canary, _levels
    import logging  # asyncio has imported it

    if _canary is None:
        _canary = logging.getLogger("asynclam")
    _canary._cache[logging.NOTSET] = True
    current = pickle.dumps(_levels_of(logging), 5)
    if current != _levels:
        _levels = current


def _levels_of(logging: Any) -> dict[str, int]:
    manager = logging.root.manager
    found = {
        name: logger.level
        for name, logger in list(manager.loggerDict.items())
        if getattr(logger, "level", 0)  # a PlaceHolder has none
    }
    found[""] = logging.root.level
    if manager.disable:
        found[_DISABLED] = manager.disable
    return found


def received(body: bytearray | memoryview) -> Callable[[], None]:
    """What gives to who handles it here what a worker has sent; it raises what users' handlers raise.

    Raises:
        ProtocolError: it makes no sense.
    """
    try:
        # Plain objects; those of users are pickled apart.
        kind, first, second, third = pickle.loads(body)
        return partial(_HANDLERS[kind], first, second, third)
    except Exception as error:
        raise _wire.ProtocolError("what was sent is neither a log record nor a warning") from error


def _handle_record(state: dict[str, Any], objects: bytes, error: Error | None) -> None:
    import logging

    logger = logging.getLogger(state["name"])
    if not logger.isEnabledFor(state["levelno"]):
        return  # the level was raised meanwhile
    if objects:
        try:
            state.update(pickle.loads(objects))
        except Exception:
            pass  # a class that is not known here; the texts are in the state
    record = logging.makeLogRecord(state)
    if error is not None:
        record.exc_info, record.exc_text = _load_error(error)
    logger.handle(record)


def _load_error(error: Error) -> tuple[Any, str]:
    name, text, traceback, frames, pickled = error
    try:
        rebuilt = _raised._rebuild(pickled)
    except Exception:  # one of the same name says the same in a log
        rebuilt = type(name, (Exception,), {})(text)
    BaseException.with_traceback(rebuilt, _traceback(frames))
    return (type(rebuilt), rebuilt, rebuilt.__traceback__), traceback


class _Stop(Exception):  # noqa: N818 - it is not told to anybody
    pass


_raising: CodeType = compile("raise stop", "", "exec")


def _traceback(frames: Frames) -> TracebackType | None:
    """A traceback that shows the same lines: JSON formats are made of it, not of the text."""
    found: TracebackType | None = None
    for filename, line, name in reversed(frames):
        code = _raising.replace(co_filename=filename, co_name=name, co_firstlineno=line)
        try:
            exec(code, {"stop": _Stop})  # noqa: S102 - one line of our own
        except _Stop as stop:
            traceback = stop.__traceback__
        assert traceback is not None
        assert traceback.tb_next is not None
        # No last instruction: its columns would be underlined.
        found = TracebackType(found, traceback.tb_next.tb_frame, -1, line)
    return found


_registries: dict[str, dict[Any, Any]] = {}  # by file, as modules have one each


def _warn(place: tuple[str, int, str | None], pickled: bytes, text: tuple[str, str]) -> None:
    import builtins
    import warnings

    filename, line, module = place
    message, category = text[0], getattr(builtins, text[1])
    if pickled:
        try:
            message, category = pickle.loads(pickled)
        except Exception:
            pass  # a class that is not known here
    registry = _registries.setdefault(filename, {})
    # Of code that is compiled there is none; given as None, the warning would be passed over.
    named: dict[str, Any] = {} if module is None else {"module": module}
    warnings.warn_explicit(message, category, filename, line, registry=registry, **named)


_HANDLERS: dict[str, Callable[..., None]] = {_RECORD: _handle_record, _WARNING: _warn}
