"""Descriptors: replaced without closing their numbers, also when no other is left."""

import fcntl
import os
import resource
import socket

import pytest

from asynclam import _descriptors


@pytest.fixture
def none_left():
    """The descriptors that use up a low limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    taken = []
    try:
        while True:
            taken.append(os.open(os.curdir, os.O_RDONLY))
    except OSError:
        pass
    yield taken
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for descriptor in taken:
        os.close(descriptor)


def files(descriptors):
    return {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in descriptors}


def test_replace_at_the_limit(none_left):
    """One of those to be replaced makes room for /dev/null; all keep their numbers."""
    _descriptors.replace(none_left[1:])
    assert files(none_left[1:]) == {os.devnull}
    assert files(none_left[:1]) == {os.getcwd()}


def test_replace_nothing_at_the_limit(none_left):
    """Where there is nothing to make room with, the error is the system's."""
    with pytest.raises(OSError, match="Too many open files"):
        _descriptors.replace([])


def test_a_child_forked_at_the_limit(none_left):
    """A process that a user's code forks then keeps none of our connections either."""
    _descriptors.private(none_left[0])
    try:
        pid = os.fork()
        if not pid:
            os._exit(files(none_left[:1]) != {os.devnull})
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        _descriptors.unmark(none_left[0])


def test_replace_above_a_limit_that_was_lowered():
    """A number that nobody can be given again is closed: it cannot be overwritten."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    above = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        _descriptors.replace([above])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(above)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_else_comes_beside_the_bytes():
    """Only descriptors are taken for such: credentials, which a socket may be told to add, are not."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        _descriptors.send(ours, [b"x"], [ours.fileno()])
        nbytes, (received,), truncated = _descriptors.receive(theirs, memoryview(bytearray(1)))
        assert (nbytes, truncated) == (1, False)
        assert os.path.sameopenfile(received, ours.fileno())
        os.close(received)


def test_received_descriptors_are_closed_by_exec(monkeypatch):
    """Also where the kernel cannot be asked for that as it receives."""
    monkeypatch.setattr(_descriptors, "_CLOEXEC", 0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _descriptors.send(ours, [b"x"], [ours.fileno()])
        _, (received,), _ = _descriptors.receive(theirs, memoryview(bytearray(1)))
        assert not os.get_inheritable(received)
        os.close(received)
