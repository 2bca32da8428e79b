"""Payloads, calls and exceptions: there and back, without a process in between."""

import asyncio
import builtins
import dataclasses
import functools
import math
import pickle
import sys
import threading
import traceback
import types
import unittest.mock
import weakref

import numpy as np
import pytest

from asynclam import PayloadError, SharedBuffer, _call, _errors, _payload, _raised, _steps, _wire
from asynclam._descriptors import open_descriptors
from asynclam._job import Job
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


# --- what is odd about a call ----------------------------------------------------------------------


class Interrupted:
    """Pickled for the n-th time, it is Ctrl-C; before that it cannot be pickled."""

    def __init__(self, at):
        self._left = at

    def __reduce__(self):
        self._left -= 1
        if self._left <= 0:
            raise KeyboardInterrupt
        raise TypeError("not picklable")


# Refused by pickle, by cloudpickle, and then Ctrl-C while it is found out which argument it was.
@pytest.mark.parametrize("at", [1, 3])
def test_ctrl_c_while_a_call_is_pickled(at):
    """It is raised as it is, also while the culprit is looked for: it says nothing of the call."""
    with pytest.raises(KeyboardInterrupt):
        _call.Call(jobs.echo, (Interrupted(at),), {})


class OddList(list):
    def __reduce_ex__(self, protocol):
        raise TypeError("not as a whole")


class OddDict(dict):
    def __reduce_ex__(self, protocol):
        raise TypeError("not as a whole")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (OddList([1, 2]), "of type OddList"),
        (OddDict(a=1), "of type OddDict"),
        ({"good": 1, "bad": threading.Lock()}, "dict, its item 'bad' is of type lock"),
    ],
)
def test_which_item_is_to_blame(value, said):
    """Of a container the item is named that cannot be pickled; if all can, it is the container."""
    with pytest.raises(PayloadError) as caught:
        _call.Call(jobs.echo, (value,), {})
    assert said in str(caught.value)


def test_a_large_argument_that_is_to_blame(monkeypatch):
    """It is found in steps, too, and named without a look at its items; that can be given up."""
    at_once = []
    dumps = _payload.dumps
    monkeypatch.setattr(_payload, "dumps", lambda value: (at_once.append(value), dumps(value))[1])
    large = [*range(30_000), threading.Lock()]
    with SharedBuffer(1) as buffer:
        args = ([*range(30_000), buffer], 1, large)
        refused = r"argument 2 of tests.jobs.echo \(of type list\) cannot .*lock"
        with pytest.raises(PayloadError, match=refused):
            _steps.run(_call.Call.steps(jobs.echo, args, {}))
        assert at_once == [jobs.echo, 1]

        before = open_descriptors()
        steps = _call.Call.steps(jobs.echo, args, {})
        at_once.clear()
        while not at_once:  # until it looks for who is to blame, and begins with the function
            next(steps)
        while open_descriptors() == before:
            next(steps)
        steps.close()
        assert open_descriptors() == before


def test_how_many_items_are_tried(monkeypatch):
    """It is not worth much time to say which item cannot be pickled."""
    monkeypatch.setattr(_call, "_MOST_TRIED", 2)
    for value in ([1, 2, threading.Lock()], {1: 1, 2: 2, 3: threading.Lock()}):
        with pytest.raises(PayloadError, match=rf"of type {type(value).__name__}\) cannot be sent"):
            _call.Call(jobs.echo, (value,), {})


def test_functions_that_are_defined_again_and_again(monkeypatch):
    """What is remembered of functions is bounded, and forgotten ones still go by reference."""
    monkeypatch.setattr(_call, "_references", {})
    monkeypatch.setattr(_call, "_MOST_REFERENCES", 2)
    for fn in (jobs.echo, jobs.add, jobs.pid, jobs.echo):
        assert received(_call.Call(fn, (), {}))[0] is fn
        assert len(_call._references) <= 2


class Captured:
    pass


@pytest.mark.parametrize("make", [lambda held: lambda: held, lambda held: [held].append])
def test_functions_by_value_are_not_kept(make):
    """Neither a closure, with all that it captures, nor a method of a list is remembered."""
    captured = Captured()
    gone = weakref.ref(captured)
    call = _call.Call(make(captured), (), {})
    call.close()
    del call, captured
    assert gone() is None


def test_references_that_are_forgotten_meanwhile(monkeypatch):
    """Another thread may forget them all, right after one was added."""

    class Forgetful(dict):
        def __setitem__(self, fn, head):
            super().__setitem__(fn, head)
            self.clear()

    monkeypatch.setattr(_call, "_references", Forgetful())
    assert received(_call.Call(jobs.echo, (), {}))[0] is jobs.echo


@pytest.fixture
def vanishing():
    """A module that a worker will not find."""
    module = types.ModuleType("tests_vanishing")
    sys.modules[module.__name__] = module
    exec("def fn(*args):\n    return args", vars(module))
    exec("import threading; lock = threading.Lock()\ndef locked():\n    return lock", vars(module))
    yield module
    sys.modules.pop(module.__name__, None)
    _call._references.clear()


def test_by_value_after_a_refusal(vanishing):
    """A refused call goes by value with all its arguments, and needs the module no more."""
    array = np.arange(10_000)
    call = _call.Call(vanishing.fn, (array,), {})
    assert call.parts, "a payload of its own"
    call.turn_to_value("ModuleNotFoundError")
    del sys.modules[vanishing.__name__]
    fn, args, _ = received(call)
    assert fn is not vanishing.fn
    assert np.array_equal(fn(*args)[0], array)


def test_the_users_own_registration_stays(vanishing):
    """What a user has told cloudpickle of a module holds after a call has gone by value."""
    import cloudpickle

    cloudpickle.register_pickle_by_value(vanishing)
    _call.Call(vanishing.fn, (1,), {}).turn_to_value("refused")
    assert vanishing.__name__ in cloudpickle.list_registry_pickle_by_value()
    cloudpickle.unregister_pickle_by_value(vanishing)


def test_by_value_where_the_module_is_gone(vanishing):
    """A function goes by value though its module was unloaded since the call was made."""
    call = _call.Call(vanishing.fn, (1,), {})
    del sys.modules[vanishing.__name__]
    call.turn_to_value("refused")
    fn, args, _ = received(call)
    assert fn(*args) == (1,)


def test_neither_by_reference_nor_by_value(vanishing):
    """The error says what the worker has refused, and what stands in the way of the function."""
    call = _call.Call(vanishing.locked, (), {})
    with pytest.raises(PayloadError, match=r"tests_vanishing\.locked .*\(no such module\).*lock"):
        call.turn_to_value("no such module")


def vanished():
    raise AttributeError("no such attribute here")


class Vanished:
    def __reduce__(self):
        return vanished, ()


def test_a_name_that_is_missing_by_value():
    """A call by value cannot be sent in another way: what it lacks is its error, not a refusal."""
    call = _call.Call(jobs.echo, (Vanished(),), {})
    with pytest.raises(_call.UnknownNameError):
        received(call)
    call.turn_to_value("refused")
    with pytest.raises(PayloadError, match="no such attribute here"):
        received(call)


def test_a_payload_that_is_cut_off():
    """Less than its table says is an error, never a shorter object."""
    body = b"".join(_payload.dumps(np.arange(10_000)).parts)
    with pytest.raises(ValueError, match="cut off"):
        _payload.loads(bytearray(body[:-1]), _wire.BUFFERS, [])


def test_what_another_program_run_is_given(monkeypatch):
    """What is defined in ``__main__`` goes by value: another run may know another, or none."""

    def scale(value):
        return 3 * value

    scale.__module__, scale.__qualname__ = "__main__", "scale"
    monkeypatch.setattr(sys.modules["__main__"], "scale", scale, raising=False)
    data = _payload.dumps_whole(scale)
    monkeypatch.delattr(sys.modules["__main__"], "scale")
    assert pickle.loads(data)(2) == 6


# --- what is odd about an exception ----------------------------------------------------------------


class NoText(Exception):
    def __str__(self):
        raise SystemExit("no text")


def test_the_reason_of_an_error_without_a_text():
    """An exception whose text cannot be had is named all the same."""
    assert _errors.reason_of(NoText()) == "NoText: <its __str__ raised SystemExit>"


class Impatient(Exception):
    def __init__(self, *args):
        super().__init__(*args)

    def __str__(self):
        raise KeyboardInterrupt

    def __repr__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "told", [_errors.reason_of, lambda error: _errors._shown(Exception(error))]
)
def test_ctrl_c_while_an_error_is_told(told):
    """It is not taken for an error of the error."""
    with pytest.raises(KeyboardInterrupt):
        told(Impatient())


def test_a_traceback_that_cannot_be_formatted(monkeypatch):
    """The exception arrives without it, and says so."""
    monkeypatch.setattr(traceback, "format_exception", unittest.mock.Mock(side_effect=OSError))
    error = _raised.loads(_raised.dumps(KeyError("key")), "a job", 1)
    monkeypatch.undo()
    assert isinstance(error, KeyError)
    assert "(no traceback: OSError)" in "".join(traceback.format_exception(error))


def test_a_traceback_that_nothing_can_format(monkeypatch):
    """The same where the module for it cannot be imported, as at the limit of descriptors."""
    monkeypatch.setitem(sys.modules, "traceback", None)
    error = _raised.loads(_raised.dumps(KeyError("key")), "a job", 1)
    monkeypatch.undo()
    assert isinstance(error, KeyError)
    assert "(no traceback: ModuleNotFoundError)" in "".join(traceback.format_exception(error))


class Unnameable(Exception):
    """What not even its class can be pickled of."""


def test_an_exception_of_which_nothing_can_be_pickled(monkeypatch):
    """It is told by its name and text, and by what stands in the way."""
    monkeypatch.setattr(_raised, "_dump", unittest.mock.Mock(side_effect=RecursionError))
    body = _raised.dumps(Unnameable("why"))
    error = _raised.loads(body, "tests.job", 1)
    assert isinstance(error, PayloadError)
    assert "tests.job raised" in str(error)
    assert "Unnameable: why" in str(error)
    assert "its class cannot be pickled" in str(error)


def keeps(piece):
    raise MemoryError


def keeps_and_explains(piece):
    try:
        keeps(piece)
    except MemoryError as error:
        raise KeyError("too much") from error


@pytest.mark.parametrize(("job", "kind"), [(keeps, MemoryError), (keeps_and_explains, KeyError)])
def test_memory_that_the_job_has_kept(job, kind):
    """It is free before the MemoryError is told: else there would be none to tell of it."""
    piece = threading.Event()
    kept = weakref.ref(piece)
    try:
        job(piece)
    except Exception as error:
        del piece
        body = _raised.dumps(error)  # the frame of this test, which still runs, is left alone
        assert kept() is None
    assert type(_raised.loads(body, "tests.job", 1)) is kind


def test_no_memory_to_pickle_an_exception(monkeypatch):
    """It arrives as a MemoryError all the same."""
    monkeypatch.setattr(_raised, "_dump", unittest.mock.Mock(side_effect=MemoryError))
    error = _raised.loads(_raised.dumps(MemoryError("of a job")), "tests.job", 1)
    assert type(error) is MemoryError


def interrupting():
    raise KeyboardInterrupt


class InterruptsWhoUnpickles(Exception):
    def __reduce__(self):
        return interrupting, ()


class BecomesText(Exception):
    def __reduce__(self):
        return str, ("text",)


def body_of(error):
    """A RAISED frame's body, whatever the exception's own reduction says of it."""
    summary = pickle.dumps(("Name", "text", "traceback"))
    return _raised._LENGTH.pack(len(summary)) + summary + pickle.dumps(error)


def test_ctrl_c_while_an_exception_is_unpickled():
    """It is raised: as likely as not it is no part of the exception."""
    with pytest.raises(KeyboardInterrupt):
        _raised.loads(body_of(InterruptsWhoUnpickles()), "a job", 1)


def test_an_exception_that_becomes_something_else():
    """What is no exception when it arrives cannot be raised, and the error says so."""
    error = _raised.loads(body_of(BecomesText()), "a job", 1)
    assert isinstance(error, PayloadError)
    assert "it became a str" in str(error)


def test_the_traceback_where_exceptions_have_no_notes(monkeypatch):
    """It is the last of the causes, also where these run in a circle."""
    monkeypatch.setattr(_raised, "sys", types.SimpleNamespace(version_info=(3, 10)))
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    _raised._show(first, "In worker 1:\nthe traceback")
    assert first.__cause__ is second
    assert isinstance(second.__cause__, _raised.WorkerTraceback)
    assert str(second.__cause__) == "\nIn worker 1:\nthe traceback"


def test_the_context_of_who_waits_for_nothing():
    """A job whose future nobody awaits has an empty one, for what it logs."""
    loop = asyncio.new_event_loop()
    job = Job(_call.Call(jobs.echo, (1,), {}), loop.create_future())
    assert len(job.context) == 0
    loop.close()
