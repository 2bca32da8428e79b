"""The thread that hears of SIGTERM: what it tells, whom it gives way to, what it leaves."""

import os
import queue
import select
import signal
import socket
import threading

import pytest

from asynclam._termination import Watch


@pytest.fixture
def handled():
    """SIGTERM and SIGUSR1 have handlers, as the descriptor is written to for no others."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def ended():
    """Waits until no such thread is left."""
    for thread in threading.enumerate():
        if thread.name == "asynclam SIGTERM":
            thread.join()


def test_sigterm_is_heard(handled):
    """It, and no other signal, is told in a thread, until the watch is ended."""
    heard = queue.SimpleQueue()
    watch = Watch(lambda: heard.put(threading.current_thread().name))
    signal.raise_signal(signal.SIGUSR1)
    while select.select([watch._reader], [], [], 0)[0]:
        os.sched_yield()  # the thread takes it alone, then the other one
    signal.raise_signal(signal.SIGTERM)
    assert heard.get() == "asynclam SIGTERM"
    watch.end()
    signal.raise_signal(signal.SIGTERM)
    ended()
    assert heard.empty()
    assert signal.set_wakeup_fd(-1) == -1


def test_who_listens_already_stays(handled):
    """A descriptor that somebody has put in place, before or after, is left there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno())
        before = Watch(pytest.fail)
        signal.raise_signal(signal.SIGTERM)
        assert ours.recv(64) == bytes([signal.SIGTERM])
        before.end()
        assert signal.set_wakeup_fd(-1) == theirs.fileno()
        after = Watch(pytest.fail)
        signal.set_wakeup_fd(theirs.fileno())
        after.end()
        assert signal.set_wakeup_fd(-1) == theirs.fileno()
    ended()


def test_a_forked_child_is_not_heard(handled):
    """A signal of its own is not told in its parent, whose descriptor it has."""
    heard = queue.SimpleQueue()
    watch = Watch(lambda: heard.put(os.getpid()))
    child = os.fork()
    if not child:
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    os.waitpid(child, 0)
    watch.end()
    ended()
    assert heard.empty()
