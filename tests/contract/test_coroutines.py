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
        self.replies, self.bodies, self.still_there = [], [], []
        self.coroutines = _coroutines.Coroutines(self.theirs.fileno(), self.reply)

    def reply(self, reply):
        self.replies.append(reply[:2])
        self.bodies.append(b"".join(reply[2]))
        self.still_there.append([watched() is not None for watched in jobs.watched])
        if reply[4] is not None:
            reply[4].close()
        self.ours.send(b".")

    def begin(self, number, fn, *args):
        call = _call.Call(fn, args, {}, flags=_wire.COROUTINE)
        frame = _wire.decode(b"".join(call.frame(number)), [])
        self.coroutines.begin(frame, 10 + number, None)

    def wait(self):
        self.coroutines.wait()
        return self.theirs.recv(100)

    def wait_for(self, replies):
        while len(self.replies) < replies:
            self.wait()

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


def test_memory_that_several_return(actor):
    """Each is replied to before the next one runs, which writes to the same memory."""
    for number in (1, 2, 3):
        actor.begin(number, jobs.fill, number)
    actor.wait_for(3)
    contents = [body[-1] for body in actor.bodies]
    assert [number for _, number in actor.replies] == contents == [1, 2, 3]


def test_what_it_was_given(actor):
    """It is let go before the reply, which tells which segments nothing looks into."""
    actor.begin(1, jobs.watch, jobs.Watched())
    actor.wait_for(1)
    (kind, _), (still_there,) = actor.replies[0], actor.still_there
    assert (kind, still_there) == (_wire.RESULT, [False])


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_cancel_that_comes_late(actor, turns):
    """The one reply is its result, and what that has as descriptors is closed once it is sent."""
    actor.begin(1, jobs.return_a_buffer)
    actor.begin(2, jobs.echo, 2)
    for _ in range(turns):
        actor.coroutines._loop.stop()
        actor.coroutines.wait()
    actor.coroutines.cancel(1)
    actor.wait_for(2)
    assert min(actor.replies) == ((_wire.RESULT, 1) if turns else (_wire.RESULT, 2))
    assert len(actor.replies) == 2


def test_a_cancel_that_is_swallowed(actor):
    """The buffer that is returned nevertheless is not sent, and its descriptor is closed."""
    actor.begin(1, jobs.return_a_buffer_when_cancelled)
    actor.begin(2, jobs.echo, 2)
    actor.wait_for(1)
    actor.coroutines.cancel(1)
    actor.wait_for(2)
    assert actor.replies == [(_wire.RESULT, 2), (_wire.SKIPPED, 11)]


@pytest.mark.parametrize("fn", [jobs.cancel_itself, jobs.cancel_itself_with_a_buffer])
def test_one_that_cancels_itself(actor, fn):
    """That is its outcome, as in asyncio; what it returns nevertheless is closed."""
    actor.begin(1, fn)
    actor.wait_for(1)
    assert actor.replies == [(_wire.RAISED, 1)]
    assert b"CancelledError" in actor.bodies[0]


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
