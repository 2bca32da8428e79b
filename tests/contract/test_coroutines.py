"""Coroutines of a worker: begun in order, replied to as they end, on a loop that stops for the channel."""

import os
import socket

import pytest

from asynclam import _call, _coroutines, _wire
from tests import coroutine_jobs as jobs


class Actor:
    """The rest of a worker: its channel, and what it replies."""

    def __init__(self):
        self.ours, self.theirs = socket.socketpair()
        self.replies = []
        self.coroutines = _coroutines.Coroutines(self.theirs.fileno(), self.reply)

    def reply(self, reply):
        self.replies.append(reply[:2])
        self.ours.send(b".")

    def begin(self, number, fn, *args):
        call = _call.Call(fn, args, {}, flags=_wire.COROUTINE)
        frame = _wire.decode(b"".join(call.frame(number)), [])
        self.coroutines.begin(frame, 10 + number, None)

    def wait(self):
        self.coroutines.wait()
        return self.theirs.recv(100)

    def close(self):
        self.coroutines._loop.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def actor():
    actor = Actor()
    yield actor
    actor.close()


def test_it_waits_for_the_channel(actor):
    """Coroutines run meanwhile, and what is there to be read ends it."""
    for number in (1, 2, 3):
        actor.begin(number, jobs.echo, number)
    received = b""
    while len(received) < 3:
        received += actor.wait()
    assert sorted(actor.replies) == [(_wire.RESULT, number) for number in (1, 2, 3)]
    actor.ours.send(b"!")
    assert actor.wait() == b"!"


def test_its_channel_blocks(actor):
    """Libuv makes what it polls non-blocking; replies need it otherwise."""
    assert os.get_blocking(actor.theirs.fileno())
    actor.coroutines.complete(jobs.echo(1))
    assert os.get_blocking(actor.theirs.fileno())
    actor.ours.send(b"!")
    assert actor.wait() == b"!"


def test_a_cancel(actor):
    """The reply says that the job was skipped, by its place in the order; also if it never began."""
    actor.begin(1, jobs.echo, "long")
    actor.begin(2, jobs.echo, "other")
    actor.coroutines.cancel(1)
    actor.coroutines.cancel(99)  # it has ended, or is none
    while len(actor.replies) < 2:
        actor.wait()
    assert sorted(actor.replies) == [(_wire.RESULT, 2), (_wire.SKIPPED, 11)]


def test_a_call_that_is_refused(actor):
    """The reply is there at once, and no task was made."""
    reference = _call.Call(jobs.echo, (1,), {}, flags=_wire.COROUTINE).frame(1)
    body = b"".join(reference).replace(b"echo", b"ohce")
    actor.coroutines.begin(_wire.decode(body, []), 1, None)
    assert actor.replies == [(_wire.REFUSED, 1)]


def test_a_reply_that_cannot_be_sent(actor):
    """That leaves ``wait``, as it leaves a plain job: the worker ends."""

    def broken(_reply):
        raise BrokenPipeError

    actor.coroutines._reply = broken
    actor.begin(1, jobs.echo, 1)
    with pytest.raises(BrokenPipeError):
        actor.coroutines.wait()
