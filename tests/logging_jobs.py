"""Functions that the tests run in workers, which log, warn, and look at their context."""

import contextvars
import io
import logging
import os
import sys
import threading
import unittest
import warnings

from tests.parts.gate import pass_through

request: contextvars.ContextVar = contextvars.ContextVar("request")
other: contextvars.ContextVar = contextvars.ContextVar("other", default="default")
NAME = "tests.jobs"
log = logging.getLogger(NAME)


def variables():
    return request.get(None), other.get()


def set_variable(value):
    request.set(value)
    return request.get()


def say(*messages):
    for message in messages:
        log.warning(message)
    return os.getpid()


def say_at(level, *messages):
    for message in messages:
        log.log(level, message)


def say_then_fail(message):
    log.warning(message)
    raise ValueError(message)


def say_then_wait(path, message):
    log.warning(message)
    pass_through(path)


def say_args(message, *args, **kwargs):
    log.warning(message, *args, **kwargs)


def say_unpicklable():
    log.warning("lock %s", threading.Lock(), extra={"lock": threading.Lock(), "number": 5})


class Local:
    def __init__(self, number):
        self.number = number

    def __str__(self):
        return f"local {self.number}"


class BreaksInLoop:
    def __reduce__(self):
        return _break, ()

    def __str__(self):
        return "as text"


def _break():
    raise ImportError("not there")


def say_object():
    log.warning("see %s", Local(3))


def say_what_breaks():
    log.warning("see %s", BreaksInLoop(), extra={"broken": BreaksInLoop()})


def say_exception():
    try:
        raise KeyError("key")
    except KeyError:
        log.exception("failed", stack_info=True)


def say_local_exception():
    class LocalError(Exception):
        pass

    try:
        raise LocalError(threading.Lock())
    except LocalError:
        log.exception("failed")


def say_badly():
    log.warning("%d", "no number")


def say_in_thread():
    thread = threading.Thread(target=log.warning, args=("in a thread",))
    thread.start()
    thread.join()
    log.warning("after it")


_threads = []


def leave_thread(path):
    """Leaves a thread, which logs when it is let through the gate."""

    def late():
        pass_through(path)
        log.warning("late")

    _threads.append(threading.Thread(target=late, daemon=True))
    _threads[-1].start()


def join_thread():
    _threads.pop().join()


def say_in_fork():
    """What a child that the job forks has written to a handler of its own."""

    def say(pipe):
        log.addHandler(logging.StreamHandler(pipe))
        log.propagate = False
        log.warning("in a child")

    return _written_in_fork(say)


def warn_in_fork():
    """What a child that the job forks has shown of a warning."""

    def show(pipe):
        sys.stderr = pipe
        warnings.simplefilter("always")
        warn("in a child", UserWarning)

    return _written_in_fork(show)


def _written_in_fork(write):
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with open(theirs, "w") as pipe:
                write(pipe)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(theirs)
    with open(ours) as pipe:
        return pipe.read()


def capture():
    """A handler of the job's own, as one that collects what a library logs."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    try:
        log.warning("collected")
    finally:
        log.removeHandler(handler)
    return stream.getvalue()


def assert_logs():
    case = unittest.TestCase()
    with case.assertLogs(NAME) as caught:
        log.warning("caught")
    return caught.output


def warn(message, category=UserWarning):
    warnings.warn(message, category, stacklevel=1)


class OwnWarning(UserWarning):
    pass


def warn_local():
    class LocalWarning(DeprecationWarning):
        pass

    warnings.warn("local", LocalWarning, stacklevel=1)


def catch_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("caught")
    return [str(warning.message) for warning in caught]


def set_level(name, level):
    logging.getLogger(name).setLevel(level)


def effective_level(name):
    return logging.getLogger(name).getEffectiveLevel()


def trace_id():
    return os.environ.get("_X_AMZN_TRACE_ID")


def left():
    from asynclam import remaining

    return remaining()


def is_logging_loaded():
    return "logging" in sys.modules


def clean_up(path):
    try:
        pass_through(path)
    finally:
        log.warning("cleaning up")
