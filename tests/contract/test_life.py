"""Life pipes: who depends on one ends with its other end, whatever it is doing."""

import os
import signal

import pytest

from asynclam import _descriptors
from asynclam._life import Life, depend_on


def child_of(life, *, group=False, then=signal.pause):
    """Forks a process that depends on ``life``, and waits until it does; its pid."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            os.write(tell, b"%d" % depend_on(life.given, group=group))
            then()
        finally:
            os._exit(3)
    os.close(tell)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    life.handed_over()
    return pid


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def spin():
    while True:
        pass


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("then", [signal.pause, spin, stop])
def test_who_depends_is_killed(then):
    """Whether it waits, computes, or is stopped."""
    life = Life()
    pid = child_of(life, then=then)
    life.end()
    assert status_of(pid) == -signal.SIGKILL


def test_the_end_of_the_other_process_is_the_end_of_its_pipes():
    """Who keeps the other end need not close it: its own death does."""
    read, write = os.pipe()
    until, begin = os.pipe()
    keeper = os.fork()
    if not keeper:
        try:
            os.close(begin)
            os.write(write, b"%d\n" % child_of(Life()))
            os.read(until, 1)
        finally:
            os._exit(0)
    os.close(until)
    os.close(write)
    with open(read) as file:
        watched = os.pidfd_open(int(file.readline()))
    os.close(begin)
    os.waitpid(keeper, 0)
    wait_for_end(watched)


def wait_for_end(watched):
    import select

    poll = select.poll()
    poll.register(watched, select.POLLIN)
    assert poll.poll(30_000)
    os.close(watched)


def test_too_late():
    """Who comes to depend on what has ended already ends at once."""
    life = Life()
    life.end()
    pid = os.fork()
    if not pid:
        depend_on(life.given)
        os._exit(3)
    life.handed_over()
    assert status_of(pid) == 1


@pytest.mark.parametrize("leave", [False, True])
def test_a_group(leave):
    """The group ends with who leads it, and who has left it ends, too."""
    read, write = os.pipe()

    def fork_and_leave():
        if not os.fork():
            os.write(write, b"%d\n" % os.getpid())
            spin()
        if leave:
            os.setpgid(0, os.getpgid(os.getppid()))
        os.write(write, b"%d\n" % os.getpid())
        signal.pause()

    life = Life()
    pid = child_of(life, group=True, then=fork_and_leave)
    os.close(write)
    with open(read) as file:
        watched = [os.pidfd_open(int(file.readline())) for _ in range(2)]
    life.end()
    for descriptor in watched:
        wait_for_end(descriptor)
    assert status_of(pid) == -signal.SIGKILL


def test_a_forked_process_keeps_nobody_alive():
    """A process that other code forks has neither end."""
    life = Life()
    pid = child_of(life)
    read, write = os.pipe()
    sibling = os.fork()
    if not sibling:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    life.end()
    assert status_of(pid) == -signal.SIGKILL
    os.close(write)
    os.close(read)
    assert status_of(sibling) == 0


def test_letting_go_twice():
    """What is closed is not closed again: its number may be another file's."""
    life = Life()
    descriptors = life.given, life._kept
    for _ in range(2):
        life.handed_over()
        life.end()
    assert (life.given, life._kept) == (-1, -1)
    for descriptor in descriptors:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_ended_by_two_threads(monkeypatch):
    """While one closes it, another finds nothing to close."""
    life = Life()
    life.handed_over()
    close, closed = os.close, []

    def ended_elsewhere(descriptor):
        closed.append(descriptor)
        if len(closed) == 1:
            life.end()
        close(descriptor)

    monkeypatch.setattr(os, "close", ended_elsewhere)
    life.end()
    assert len(closed) == 1


def test_a_life_that_is_dropped_ends():
    """Nothing is left open by who forgets to end it."""
    life = Life()
    pid = child_of(life)
    del life
    assert status_of(pid) == -signal.SIGKILL


def test_where_the_kernel_refuses(monkeypatch):
    """It is said; nothing fails."""

    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    life = Life()
    assert not depend_on(life.given)
    _descriptors.unmark(life.given)  # this process lives on, and its next file may get the number
    life.handed_over()


def test_closed_by_exec():
    """Neither end is a program's that is started meanwhile."""
    life = Life()
    assert not os.get_inheritable(life.given)
    assert not os.get_inheritable(life._kept)
    life.handed_over()
