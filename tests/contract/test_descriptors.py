"""Descriptors: replaced without closing their numbers, also when no other is left."""

import os
import resource

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
