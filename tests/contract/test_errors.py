"""Errors of the infrastructure say what happened, the likely cause and the next step."""

import pickle
import signal

import pytest

from asynclam import AsynclamError, JobExitError, PayloadError, WorkerDiedError


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"signal": signal.SIGKILL}, ["SIGKILL", "out of memory", "lower max_workers"]),
        ({"signal": signal.SIGSEGV}, ["SIGSEGV", "C extension", "faulthandler"]),
        ({"signal": signal.SIGTERM}, ["SIGTERM"]),
        ({"signal": 99}, ["signal 99"]),
        ({"exitcode": 3}, ["exited with code 3", "os._exit"]),
        ({}, ["unknown way"]),
    ],
)
def test_a_death_is_explained(how, words):
    """The message has the pid, the way of the death, the function and a hint that fits."""
    error = WorkerDiedError("module.fn", pid=4711, **how)
    for word in ["4711", "module.fn", *words]:
        assert word in str(error)
    assert (error.job, error.pid) == ("module.fn", 4711)
    assert (error.signal, error.exitcode) == (how.get("signal"), how.get("exitcode"))


def test_an_exit_with_a_broken_repr():
    """The repr of what a job raised may fail: the error says what it can."""

    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert "raised SystemExit, which" in str(JobExitError("fn", SystemExit(Broken())))


@pytest.mark.parametrize(
    "error",
    [
        WorkerDiedError("fn", pid=1, signal=9),
        JobExitError("fn", SystemExit(3)),
        PayloadError("text"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error):
    """They pass through a worker of an executor in a worker, attributes included."""
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived).keys() == vars(error).keys()
    assert isinstance(arrived, AsynclamError)
