"""What a worker says besides its replies: whole frames, in order, never blocking, within limits."""

import logging
import pickle
import signal
import socket
import threading

import pytest

from asynclam import _records, _wire, _worker


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
    with ours, theirs:
        yield ours, theirs


def received(sock):
    """The frames that are there."""
    decoder, frames = _wire.Decoder(), []
    while True:
        try:
            nbytes = sock.recv_into(decoder.buffer(), 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return frames
        frames += decoder.received(nbytes)


def test_a_body_is_a_frame_of_its_job(ends, clock):
    """A record is sent at once, under the number of the job that runs."""
    ours, theirs = ends
    outbox = _records.Outbox(ours, clock)
    outbox.job = 7
    outbox.put(b"body")
    (frame,) = received(theirs)
    assert (frame.kind, frame.number, frame.body, frame.dropped) == (_wire.RECORD, 7, b"body", 0)
    assert not outbox.is_full


def test_a_full_socket_does_not_block(ends, clock):
    """What finds no room is kept, torn frames go on where they were torn, and the order is kept."""
    ours, theirs = ends
    outbox = _records.Outbox(ours, clock)
    bodies = [bytes([number]) * 3000 for number in range(200)]
    for body in bodies:
        outbox.put(body)  # returns, or the test hangs
    assert outbox.is_full
    decoder, frames = _wire.Decoder(), []
    reader = threading.Thread(target=lambda: frames.extend(_read_all(theirs, decoder, 200)))
    reader.start()
    with outbox.turn:
        outbox.empty()
    reader.join()
    assert [bytes(frame.body) for frame in frames] == bodies
    assert not outbox.is_full


def _read_all(sock, decoder, count):
    frames = []
    while len(frames) < count:
        frames += decoder.received(sock.recv_into(decoder.buffer()))
    return frames


def test_who_finds_another_sending_leaves_it_to_that_one(ends, clock):
    """It does not wait for the turn, which this very thread may have; nothing is lost."""
    ours, theirs = ends
    outbox = _records.Outbox(ours, clock)
    with outbox.turn:
        outbox.put(b"first")
        assert received(theirs) == []
    outbox.put(b"second")
    assert [bytes(frame.body) for frame in received(theirs)] == [b"first", b"second"]


def test_a_reply_is_followed_by_a_look(ends):
    """What a thread has left to the reply that was being sent is sent, whether or not a job follows."""
    ours, theirs = ends

    class Channel:
        def sendall(self, data, flags):
            ours.sendall(data, flags)
            worker._outbox.put(b"of a thread")

        def send(self, data, flags):
            return ours.send(data, flags)

    worker = _worker.Worker(Channel(), lambda order: True, lambda: None, lambda *_: None)
    worker._reply(_wire.READY, 0, [b"pid"])
    reply, record = received(theirs)
    assert (reply.kind, record.kind, record.body) == (_wire.READY, _wire.RECORD, b"of a thread")


def test_the_allowance_of_a_job(ends, clock):
    """So many in a second are sent; the rest is counted, and told once. A second, or a job, later anew."""
    ours, theirs = ends
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    outbox = _records.Outbox(ours, clock)
    outbox.job = 1
    for _ in range(_records.MOST + 5):
        outbox.put(b"")
    frames = received(theirs)
    assert len(frames) == _records.MOST
    assert outbox.is_full
    with outbox.turn:
        outbox.empty()
    (told,) = received(theirs)
    kind, state, *_ = pickle.loads(told.body)
    assert (told.dropped, kind, state["args"][0]) == (5, "record", 5)
    outbox.put(b"too many")
    clock.now += 1
    outbox.put(b"a second later")
    assert [frame.body for frame in received(theirs)] == [b"a second later"]
    for _ in range(_records.MOST):
        outbox.put(b"")
    received(theirs)
    outbox.job = 2
    outbox.put(b"of the next job")
    assert [frame.body for frame in received(theirs)] == [b"of the next job"]


def test_the_bytes_of_a_job(ends, clock):
    """A few large ones are too many as well, and what is kept has a limit of its own."""
    ours, theirs = ends
    outbox = _records.Outbox(ours, clock)
    outbox.put(bytes(_records.MOST_BYTES + 1))
    assert received(theirs) == []
    for second in range(5):
        clock.now = 200.0 + second
        outbox.put(bytes(_records.MOST_BYTES // 2))
    assert outbox._kept <= _records.MOST_BYTES
    frames = []
    reader = threading.Thread(target=lambda: frames.extend(_read_all(theirs, _wire.Decoder(), 3)))
    reader.start()
    with outbox.turn:
        outbox.empty()
    reader.join()
    # The rest of the first one and the second one were kept; three more found no room.
    assert [len(frame.body) for frame in frames[:2]] == [_records.MOST_BYTES // 2] * 2
    assert [frame.dropped for frame in frames] == [0, 0, 1 + 3]


def test_a_loop_process_that_is_gone(ends, clock):
    """Nothing is raised in the job: the worker notices when it reads."""
    ours, theirs = ends
    theirs.close()
    outbox = _records.Outbox(ours, clock)
    outbox.put(b"to nobody")
    assert not outbox.is_full


def test_a_cancel_does_not_tear_a_frame(ends, clock):
    """SIGURG, which raises in a job, is blocked from before a send until it has been noted."""
    ours, theirs = ends

    class Channel:
        def send(self, data, flags):
            masks.append(signal.SIGURG in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            return ours.send(data, flags)

    masks = []
    outbox = _records.Outbox(Channel(), clock)
    outbox.put(b"body")
    assert masks == [True]
    assert signal.SIGURG not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert [frame.body for frame in received(theirs)] == [b"body"]


def test_levels_are_told_once():
    """They are one object until a level changes, whatever logger's; a new logger changes none."""
    logger = logging.getLogger("tests.levels")
    before = _records.levels()
    logging.getLogger("tests.levels.another").info("asked for")
    assert _records.levels() is before
    logger.setLevel(logging.DEBUG)
    try:
        after = _records.levels()
        assert after is not before
        assert pickle.loads(after)["tests.levels"] == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)
    assert _records.levels() == before


def test_a_traceback_of_frames():
    """A rebuilt traceback shows files, lines and functions as they were, innermost last."""
    frames = [("a.py", 3, "outer"), ("b.py", 70_000, "inner")]
    traceback = _records._traceback(frames)
    found = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append((code.co_filename, traceback.tb_lineno, code.co_name))
        traceback = traceback.tb_next
    assert found == frames


def test_attributes_of_a_record_factory():
    """What the user's factory adds is made anew in the loop process; what ``extra`` adds travels."""

    class Record(logging.LogRecord):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.request = "of the worker"

    record = Record("name", 30, "file", 1, "text", (), None)
    record.user = "extra"
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(Record)
    try:
        _, state, _, _ = pickle.loads(_records._dump_record(record))
    finally:
        logging.setLogRecordFactory(before)
    assert "request" not in state
    assert state["user"] == "extra"
