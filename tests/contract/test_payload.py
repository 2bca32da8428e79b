"""Payloads, calls and exceptions: there and back, without a process in between."""

import builtins
import dataclasses
import functools
import math
import sys
import threading
import traceback
import types
import unittest.mock

import numpy as np
import pytest

from asynclam import PayloadError, _call, _payload, _raised, _wire
from tests import jobs


def there_and_back(value):
    payload = _payload.dumps(value)
    return _payload.loads(bytearray(b"".join(payload.parts)), payload.flags, [])


def received(call: _call.Call):
    """What a worker makes of the call."""
    data = b"".join(call.frame(1))
    return _call.receive(_wire.decode(data, []))


# --- payloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "text", b"x" * 100_000, {"a": [1, (2, 3)]}, math.sqrt])
def test_plain_values(value):
    """What pickle can do arrives equal."""
    assert there_and_back(value) == value


def test_large_buffers_travel_beside_the_pickle():
    """An array is not copied into the pickle, and arrives aligned and writable."""
    array = np.arange(100_000, dtype=np.float64)
    payload = _payload.dumps({"odd": b"x" * 3, "array": array})
    assert payload.flags == _wire.BUFFERS
    assert max(len(part) for part in payload.parts if not isinstance(part, memoryview)) < 1000
    arrived = there_and_back({"odd": b"x" * 3, "array": array})["array"]
    assert np.array_equal(arrived, array)
    assert arrived.flags.aligned
    assert arrived.flags.writeable


def test_small_buffers_travel_in_the_pickle():
    """A small array is not worth a part of its own."""
    assert len(_payload.dumps(np.arange(10)).parts) == 1


def test_what_pickle_refuses_goes_by_value():
    """A lambda arrives as a function that does the same."""
    offset = 5
    assert there_and_back(lambda x: x + offset)(2) == 7


def test_the_reason_is_pickles():
    """Where cloudpickle fails, too, the error is the one of pickle."""
    with pytest.raises(TypeError, match="lock"):
        _payload.dumps(threading.Lock())


# --- calls ---------------------------------------------------------------------------------------


def test_a_function_goes_by_reference():
    """A global function is sent as its name: the other side has the very same one."""
    fn, args, kwargs = received(_call.Call(jobs.add, (1,), {"b": 2}))
    assert fn is jobs.add
    assert (args, kwargs) == ((1,), {"b": 2})


@pytest.mark.parametrize("fn", [len, math.sqrt, dict, jobs.OddError, "abc".upper, [].append])
def test_callables_of_all_kinds(fn):
    """Built-in functions, classes and bound methods can be called there."""
    arrived, _, _ = received(_call.Call(fn, (), {}))
    assert arrived == fn or type(arrived) is type(fn)


def test_partial_and_closure():
    """A partial and a closure carry what they hold."""
    fn, args, _ = received(_call.Call(functools.partial(jobs.add, 1), (2,), {}))
    assert fn(*args) == 3
    offset = 10
    fn, args, _ = received(_call.Call(lambda x: x + offset, (1,), {}))
    assert fn(*args) == 11


def test_a_closure_is_never_kept():
    """A function by value is taken anew each time: its closure may have changed."""
    cell = [1]
    fn = lambda: cell[0]
    assert received(_call.Call(fn, (), {}))[0]() == 1
    cell[0] = 2
    assert received(_call.Call(fn, (), {}))[0]() == 2


def test_main_that_is_not_shared():
    """Where the worker has another __main__, what is defined there goes by value."""
    source = "def f(x): return x * factor\nfactor = 3"
    main = types.ModuleType("__main__")
    exec(source, main.__dict__)
    before, sys.modules["__main__"] = sys.modules["__main__"], main
    try:
        call = _call.Call(main.f, (2,), {}, shares_main=lambda: False)
    finally:
        sys.modules["__main__"] = before
    fn, args, _ = received(call)
    assert fn is not main.f
    assert fn(*args) == 6


def test_an_unknown_name_is_refused_and_sent_by_value():
    """A worker that cannot find the function says so, and the call can be turned to a value."""
    module = types.ModuleType("made_at_run_time")
    exec("def f(x): return x + offset\noffset = 4", module.__dict__)
    sys.modules["made_at_run_time"] = module
    try:
        call = _call.Call(module.f, (1,), {})
        data = b"".join(call.frame(1))
        del sys.modules["made_at_run_time"]
        with pytest.raises(_call.UnknownNameError, match="made_at_run_time"):
            _call.receive(_wire.decode(data, []))
        sys.modules["made_at_run_time"] = module
        call.turn_to_value("unknown")
    finally:
        del sys.modules["made_at_run_time"]
    fn, args, _ = received(call)
    assert fn(*args) == 5


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, threading.Lock()), {}, r"argument 1 of tests.jobs.echo \(of type lock\)"),
        ((), {"value": threading.Lock()}, r"argument value= of tests.jobs.echo \(of type lock\)"),
        (([1, threading.Lock()],), {}, r"argument 0 .*\(list, its item 1 is of type lock\)"),
        (({"key": threading.Lock()},), {}, r"argument 0 .*\(dict, its item 'key' is of type lock"),
        (((n for n in ()),), {}, r"generator.*list\(\.\.\.\)"),
    ],
    ids=["positional", "keyword", "in a list", "in a dict", "generator"],
)
def test_an_argument_that_cannot_be_pickled_is_named(args, kwargs, message):
    """The error names the argument and what to do."""
    with pytest.raises(PayloadError, match=message) as caught:
        _call.Call(jobs.echo, args, kwargs)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_coroutine_as_argument():
    """Passing a coroutine object says: await it first."""

    async def download():
        pass

    coroutine = download()
    with pytest.raises(PayloadError, match="await it first"):
        _call.Call(jobs.echo, (coroutine,), {})
    coroutine.close()


def test_an_unpicklable_function_is_named():
    """A closure over a lock names the function."""
    lock = threading.Lock()
    with pytest.raises(PayloadError, match="the function itself"):
        _call.Call(lambda: lock, (), {})


async def _coroutine_function():
    pass


async def _async_generator():
    yield


def test_a_mock():
    """A callable that has every attribute is a callable like any other."""
    _call.check(unittest.mock.Mock(), "run_cpu")


@pytest.mark.parametrize(
    "fn", [_coroutine_function, _async_generator, functools.partial(_coroutine_function)]
)
def test_coroutine_functions_are_refused(fn):
    """A coroutine function is for the loop: the message has the right call in it."""
    with pytest.raises(TypeError, match=r"await .*\(\.\.\.\)"):
        _call.check(fn, "run_cpu")
    with pytest.raises(TypeError, match=r"map_io\("):
        _call.check(fn, "map_cpu")


def test_a_result_in_place_of_a_function():
    """run_cpu(fn(x)) is a common slip: the message has the right call in it."""
    with pytest.raises(TypeError, match=r"write run_cpu\(fn, x\), not run_cpu\(fn\(x\)\)"):
        _call.check(5, "run_cpu")


# --- exceptions ----------------------------------------------------------------------------------


def raised_by(fn, *args) -> BaseException:
    """What the caller sees of an exception that ``fn`` raised in a worker."""
    try:
        fn(*args)
    except BaseException as error:
        body = _raised.dumps(error, skip=1)
    return _raised.loads(bytearray(body), "tests.jobs.fn", 4711)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("text", 1),
        KeyError("key"),
        FileNotFoundError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        SystemExit(3),
        StopIteration("value"),
        ImportError("no", name="module", path="path"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_builtin_exceptions(error):
    """Built-in exceptions arrive with their args and the fields behind them."""
    arrived = raised_by(jobs.raise_, error)
    assert type(arrived) is type(error)
    assert arrived.args == error.args
    for field in ("errno", "filename", "start", "reason", "code", "value", "name", "path"):
        assert getattr(arrived, field, None) == getattr(error, field, None)


def test_an_init_with_other_arguments():
    """An exception that pickle could not rebuild arrives as itself (cpython #80041)."""
    arrived = raised_by(jobs.raise_odd, "one", "two")
    assert type(arrived) is jobs.OddError
    assert (str(arrived), arrived.second) == ("one and two", "two")


def test_notes_and_traceback():
    """Notes arrive, and the worker's traceback is shown below."""
    arrived = raised_by(jobs.raise_odd, "one", "two")
    shown = "".join(traceback.format_exception(arrived))
    assert "In worker 4711:" in shown
    assert "in raise_odd" in shown
    assert "in raised_by" not in shown.partition("In worker")[2], "who ran the job says nothing"
    if sys.version_info >= (3, 11):
        assert arrived.__notes__[0] == "a note of the job"


def test_causes():
    """``raise ... from`` arrives with its cause."""
    arrived = raised_by(jobs.raise_from_cause)
    assert type(arrived.__cause__) is KeyError
    assert arrived.__cause__.args == ("key",)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with 3.11")
def test_groups():
    """The members of a group arrive as themselves, too."""
    group = builtins.ExceptionGroup("group", [jobs.OddError("one", second="two"), KeyError("key")])
    arrived = raised_by(jobs.raise_, group)
    assert type(arrived) is builtins.ExceptionGroup
    assert type(arrived.exceptions[0]) is jobs.OddError


def test_what_cannot_be_pickled_is_dropped():
    """An attribute that cannot travel is left out; an argument becomes its repr."""
    error = ValueError("text", threading.Lock())
    error.lock = threading.Lock()
    error.kept = 1
    arrived = raised_by(jobs.raise_, error)
    assert type(arrived) is ValueError
    assert arrived.args[0] == "text"
    assert arrived.args[1].startswith("<unlocked _thread.lock")
    assert not hasattr(arrived, "lock")
    assert arrived.kept == 1


def test_a_class_that_nobody_else_knows():
    """A local class goes by value; its name is kept."""
    assert type(raised_by(jobs.raise_local)).__name__ == "LocalError"


def test_a_reduce_that_exits():
    """Whatever the methods of an exception do, they do not hurt the worker."""
    arrived = raised_by(jobs.raise_exits)
    assert type(arrived) is jobs.Exits
    assert arrived.args == ("reduce me",)


def test_an_exception_that_refers_to_itself():
    """A cycle through an attribute arrives as one."""
    error = ValueError("text")
    error.me = error
    arrived = raised_by(jobs.raise_, error)
    assert arrived.me is arrived


def test_an_exception_that_is_its_own_argument():
    """A cycle through the arguments becomes a repr."""
    error = ValueError("text")
    error.args = ("text", error)
    arrived = raised_by(jobs.raise_, error)
    assert type(arrived) is ValueError
    assert arrived.args[0] == "text"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with 3.11")
def test_deep_groups_cost_no_more_than_their_size():
    """Groups in groups arrive whole; what is pickled does not double with each level."""
    group = error = ValueError("innermost")
    error.lock = threading.Lock()
    for _ in range(30):
        group = builtins.ExceptionGroup("group", [group])
    arrived = raised_by(jobs.raise_, group)
    assert "group" in str(arrived)


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


def test_a_frozen_exception():
    """A class that lets nobody set its attributes arrives as itself, with its traceback shown."""
    arrived = raised_by(jobs.raise_, FrozenError(3))
    assert arrived == FrozenError(3)
    assert "In worker 4711" in "".join(traceback.format_exception(arrived))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with 3.11")
def test_notes_that_are_none():
    """A job that has made __notes__ something else than a list still has its exception."""
    error = ValueError("text")
    error.__notes__ = "abc"
    assert type(raised_by(jobs.raise_, error)) is ValueError


class BadStr(Exception):
    def __str__(self):
        raise SystemExit("in __str__")


def test_a_str_that_exits():
    """Whatever its __str__ does, the exception arrives."""
    assert type(raised_by(jobs.raise_, BadStr("text"))) is BadStr


def test_a_class_that_the_caller_lacks():
    """Where the class cannot be had, the error names it, its text and its traceback."""
    module = types.ModuleType("only_in_the_worker")
    exec("class Special(Exception): pass", module.__dict__)
    sys.modules["only_in_the_worker"] = module
    try:
        try:
            raise module.Special("text")
        except Exception as error:
            body = _raised.dumps(error)
    finally:
        del sys.modules["only_in_the_worker"]
    arrived = _raised.loads(bytearray(body), "tests.jobs.fn", 4711)
    assert type(arrived) is PayloadError
    assert "only_in_the_worker.Special: text" in str(arrived)
    assert "In worker 4711" in "".join(traceback.format_exception(arrived))
