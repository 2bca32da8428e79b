"""JobCancelled is raised in the job that is cancelled, once, and nowhere else."""

import os
import signal
import sys

import pytest

from asynclam import JobCancelled
from asynclam._guard import SIGNAL, Guard


class Page:
    """What the page of marks says to one worker."""

    def __init__(self):
        self.cancelled = self.heard = 0

    def is_cancelled(self, order):
        return self.cancelled == order

    def hear(self, order):
        self.heard = order


@pytest.fixture
def page():
    return Page()


@pytest.fixture
def guard(page):
    hook, handler = sys.unraisablehook, signal.getsignal(SIGNAL)
    yield Guard(page.is_cancelled, page.hear)
    signal.signal(SIGNAL, handler)
    sys.unraisablehook = hook


def interrupt():
    os.kill(os.getpid(), SIGNAL)


def test_the_signal_is_one_that_nobody_minds():
    """A signal for a job that has ended meets no handler, or none that is armed: it does nothing."""
    assert signal.getsignal(SIGNAL) in {signal.SIG_DFL, signal.SIG_IGN}
    interrupt()


def test_the_cancelled_job(guard, page):
    """The exception is raised in the job, whose ``finally`` blocks run, and heard is noted."""
    steps = []

    def job():
        try:
            page.cancelled = 7
            interrupt()
            steps.append("never")
        finally:
            steps.append("finally")

    with pytest.raises(JobCancelled):
        guard.run(7, job)
    assert (steps, guard.cancelled, page.heard) == (["finally"], True, 7)


@pytest.mark.parametrize("cancelled", [0, 6, 8])
def test_a_signal_for_another_job(guard, page, cancelled):
    """A signal that was sent for another job, or for none, changes nothing."""
    page.cancelled = cancelled

    def job():
        interrupt()
        return "result"

    assert guard.run(7, job) == "result"
    assert (guard.cancelled, page.heard) == (False, 0)


def test_a_signal_outside_of_jobs(guard, page):
    """Before and after it, and when it has ended, a job's signal does nothing."""
    page.cancelled = 7
    interrupt()
    assert guard.run(6, lambda: "another") == "another"
    interrupt()
    with pytest.raises(JobCancelled):
        guard.run(7, interrupt)
    interrupt()
    assert guard.run(8, lambda: "another") == "another"


def test_a_cancel_before_the_guard_is_there(guard, page):
    """A job that was cancelled while its arguments were unpickled does not begin."""
    page.cancelled = 7
    with pytest.raises(JobCancelled):
        guard.run(7, lambda: pytest.fail("it runs"))


def test_cleaning_up_is_not_interrupted(guard, page):
    """However often the signal comes, it is raised once."""
    page.cancelled = 0
    steps = []

    def job():
        try:
            page.cancelled = 7
            interrupt()
        finally:
            for step in range(5):
                interrupt()
                steps.append(step)

    with pytest.raises(JobCancelled):
        guard.run(7, job)
    assert steps == [0, 1, 2, 3, 4]


def test_a_job_that_returns_nevertheless(guard, page):
    """What it returns is nobody's outcome, and that is told."""

    def job():
        try:
            page.cancelled = 7
            interrupt()
        except JobCancelled:
            return "result"

    with pytest.raises(JobCancelled):
        guard.run(7, job)
    assert guard.cancelled


def test_a_job_that_raises_something_else(guard, page, capsys):
    """An error of the cleaning up reaches nobody, so it goes to stderr."""

    def job():
        try:
            page.cancelled = 7
            interrupt()
        finally:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        guard.run(7, job)
    assert guard.cancelled
    assert "OSError: the disk is full" in capsys.readouterr().err


def test_an_error_of_a_job_that_was_not_cancelled(guard, capsys):
    """It is the job's outcome, and nothing is printed."""
    with pytest.raises(KeyError):
        guard.run(7, lambda: {}["key"])
    assert not guard.cancelled
    assert capsys.readouterr().err == ""


class Finalised:
    def __init__(self, act):
        self._act = act

    def __del__(self):
        self._act()


def test_a_finaliser_swallows_it(guard, page, capsys):
    """What is raised in ``__del__`` goes nowhere: the next signal raises it again."""
    heard = []

    def job():
        page.cancelled = 7
        thing = Finalised(interrupt)
        del thing
        heard.append(page.heard)
        interrupt()
        pytest.fail("it goes on")

    with pytest.raises(JobCancelled):
        guard.run(7, job)
    assert (heard, page.heard) == ([0], 7)
    assert capsys.readouterr().err == ""


def test_other_unraisable_exceptions(guard, page, monkeypatch):
    """They go to the hook that was there, also to one that a job has set."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_type))

    def job():
        thing = Finalised(lambda: {}["key"])
        del thing

    guard.run(7, job)
    assert seen == [KeyError]
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append("another"))
    guard.run(8, job)
    assert seen == [KeyError, "another"]


def test_a_finaliser_after_the_job(guard, page):
    """A JobCancelled of users' own that is swallowed outside of a job arms nothing."""
    guard.run(6, lambda: None)

    def raise_one():
        raise JobCancelled

    thing = Finalised(raise_one)
    sys.unraisablehook, hook = guard._hook, sys.unraisablehook
    guard._next_hook = lambda _: None
    del thing
    sys.unraisablehook = hook
    page.cancelled = 6
    interrupt()  # is not armed


def test_a_job_that_takes_the_signal(guard, page):
    """A handler that a job has left behind is not there any more in the next job."""
    guard.run(6, lambda: signal.signal(SIGNAL, signal.SIG_IGN))

    def job():
        page.cancelled = 7
        interrupt()

    with pytest.raises(JobCancelled):
        guard.run(7, job)


def test_a_job_that_raises_it_by_itself(guard, page):
    """JobCancelled out of a job that nobody has cancelled is like any other exception."""

    def job():
        raise JobCancelled

    with pytest.raises(JobCancelled):
        guard.run(7, job)
    assert not guard.cancelled
