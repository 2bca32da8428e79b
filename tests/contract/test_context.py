"""What a job carries: variables that cannot be found, and values that cannot travel."""

import contextvars
import threading
import types

import pytest

from asynclam import PayloadError, _context

variable = contextvars.ContextVar("variable")
another = contextvars.ContextVar("another")


class OnceOnly:
    """It cannot be pickled together with others, but alone."""

    def __init__(self):
        self.refusals = 2  # by pickle, and by cloudpickle

    def __reduce__(self):
        if self.refusals:
            self.refusals -= 1
            raise TypeError("not together")
        return OnceOnly, ()


def test_values_of_which_none_is_to_blame():
    """The error says what it is of all of them, where each can travel alone."""

    def carry():
        variable.set(OnceOnly())
        _context.Variables([variable]).carried(None)

    with pytest.raises(PayloadError, match=r"the context variables cannot be carried.*together"):
        contextvars.copy_context().run(carry)


def test_a_value_that_is_to_blame():
    """Its variable is named."""

    def carry():
        variable.set(1)
        another.set(threading.Lock())
        _context.Variables([variable, another]).carried(None)

    with pytest.raises(PayloadError, match=r"'another'.*type lock"):
        contextvars.copy_context().run(carry)


def test_a_variable_is_found_under_any_of_its_names():
    """A name that leads nowhere here, or to something else, is passed over for the next."""
    names = [
        ("tests.no_such_module", "variable"),
        (__name__, "no_such_name"),
        (__name__, "threading"),
        (__name__, "variable"),
    ]
    module = types.ModuleType(__name__)
    vars(module).update(variable=variable, threading=threading)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_context.sys.modules, __name__, module)
        assert _context._find(names) is variable
        with pytest.raises(LookupError, match=r"no_such_module\.variable or .*no_such_name"):
            _context._find(names[:3])


def test_the_same_invocation_of_a_loop_of_ones_own(monkeypatch):
    """Jobs of one trace carry the same; the next invocation has another."""
    monkeypatch.setattr(_context, "_in_lambda", True)
    monkeypatch.setattr(_context, "_last_untold", None)
    monkeypatch.setenv(_context._TRACE, "Root=1")
    first = _context._untold()
    assert _context._untold() is first
    monkeypatch.setenv(_context._TRACE, "Root=2")
    assert _context._untold().trace_id == "Root=2"
