"""How a worker's process ends by itself, and takes along what jobs have spawned."""

import errno
import os
import select
import signal
import socket
import subprocess
import threading
import unittest.mock

import pytest

from asynclam import WorkerDiedError, _payload, _wire, _worker
from asynclam._errors import CHANNEL_LOST, OUT_OF_MEMORY
from tests.parts.processes import in_child

PATIENCE = 5_000  # ms for what takes one


@pytest.fixture
def held():
    """Both ends of a pipe: as long as anybody has the second, the first is not at its end."""
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)


def serve(channel):
    """In a child: is a worker."""
    worker = _worker.Worker(channel, lambda order: True, lambda: None, lambda *_: None)
    worker.serve(lambda: None, bound=True)


def lead(begin, channel, spawned_with):
    """In a child: begins a process group, in which there is another process, and is a worker."""
    begin()
    subprocess.Popen(["sleep", "100"], pass_fds=[spawned_with])
    os.close(spawned_with)
    serve(channel)


def begin_group():
    os.setpgid(0, 0)


def under_fork_server(*args):
    """In a child: is the parent of a worker, and ends as that does."""
    os.setsid()  # a group that the worker can go to; that of the tests may be out of its sight
    os._exit(in_child(lead, *args) % 256)


@pytest.mark.parametrize(
    ("parent", "begin", "status"),
    [
        (under_fork_server, begin_group, 0),
        (lead, os.setsid, -signal.SIGKILL),  # nobody is there who has a group that it can go to
    ],
    ids=["under the fork server", "the fork server is dead"],
)
def test_end_of_file(held, parent, begin, status):
    """Nobody needs to kill the group after it: who would may have been killed with the loop process."""
    channel, theirs = socket.socketpair()
    theirs.shutdown(socket.SHUT_WR)
    with channel, theirs:
        assert in_child(parent, begin, channel, held[1]) == status
    os.close(held[1])
    assert ended(held[0])


def test_a_lost_channel():
    """A channel that is of no use is told apart from one that is at its end."""
    channel = socket.socket()
    channel.close()
    assert in_child(serve, channel) == CHANNEL_LOST


def test_no_memory(monkeypatch):
    """A worker that can neither take a job nor tell of one ends, and says why."""
    monkeypatch.setattr(_worker, "frames", unittest.mock.Mock(side_effect=MemoryError))
    channel, theirs = socket.socketpair()
    with channel, theirs:
        assert in_child(serve, channel) == OUT_OF_MEMORY
    error = WorkerDiedError("a job", pid=1, exitcode=OUT_OF_MEMORY)
    assert "no memory left" in str(error)


def test_no_descriptor_for_a_segment(monkeypatch):
    """A large result goes in its frame where not even the module of segments can be imported."""
    ours, theirs = socket.socketpair()
    worker = _worker.Worker(theirs, lambda order: True, lambda: None, lambda *_: None)
    monkeypatch.setattr(worker, "_end", no_descriptor)
    payload = _payload.dumps(bytes(_payload.LEAST_IN_SEGMENT))
    sender = threading.Thread(
        target=worker._reply, args=(_wire.RESULT, 1, payload.parts, payload.flags, payload)
    )
    with ours, theirs:
        sender.start()
        reply = next(_worker.frames(ours))
        sender.join()
    assert _payload.loads(reply.body, reply.flags, reply.descriptors) == bytes(
        _payload.LEAST_IN_SEGMENT
    )


def no_descriptor():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def ended(descriptor):
    """Whether all have ended that hold the other end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(PATIENCE))
