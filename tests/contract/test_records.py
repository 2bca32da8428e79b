"""What a worker says besides its replies: whole frames, in order, never blocking, within limits."""

import io
import logging
import pickle
import signal
import socket
import sys
import threading
import types

import pytest

from asynclam import _raised, _records, _wire, _worker
from asynclam._errors import JobCancelled


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


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancel_in_the_moment_of_blocking(ends, clock, monkeypatch, when):
    """It is raised, by the very call that blocks the signal; nothing stays blocked, and no turn taken."""
    ours, theirs = ends
    block = signal.pthread_sigmask

    def cancelled(how, signals):
        if how == signal.SIG_BLOCK and signals:
            if when == "after":
                block(how, signals)
            monkeypatch.setattr(signal, "pthread_sigmask", block)
            raise JobCancelled
        return block(how, signals)

    outbox = _records.Outbox(ours, clock)
    monkeypatch.setattr(signal, "pthread_sigmask", cancelled)
    with pytest.raises(JobCancelled):
        outbox.put(b"body")
    assert signal.SIGURG not in block(signal.SIG_BLOCK, ())
    assert not outbox.turn.locked()
    outbox.look_again()
    assert [frame.body for frame in received(theirs)] == [b"body"]


def test_a_cancel_when_the_turn_was_taken(ends, clock, monkeypatch):
    """The signal is blocked by then, so that nothing is raised before the turn is sure to be given back."""
    ours, theirs = ends
    masks = []

    class Turn:
        def acquire(self, *, blocking):
            masks.append(signal.SIGURG in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            return True

        def release(self):
            masks.append(signal.SIGURG in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    outbox = _records.Outbox(ours, clock)
    outbox.turn = Turn()
    outbox.put(b"body")
    assert masks == [True, True]
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


# --- what is odd about a record, and a warning ---------------------------------------------------


class NoRepr:
    def __repr__(self):
        raise RecursionError

    def __reduce__(self):
        raise TypeError("not picklable")


def record_of(msg, *args, **extra):
    record = logging.LogRecord("tests.odd", logging.WARNING, "file", 1, msg, args, None)
    vars(record).update(extra)
    return record


@pytest.fixture
def handled(monkeypatch):
    """Dumps a record, and hands what arrives to a handler, which has it here."""
    arrived = []
    monkeypatch.setattr(logging.getLogger("tests.odd"), "handle", arrived.append)

    def there(record):
        _records.received(_records._dump_record(record))()
        return arrived[-1] if arrived else None

    return there


def test_an_extra_that_is_an_object(handled):
    """It travels beside the message, which stays one with arguments."""
    arrived = handled(record_of("%d bytes", 3, user=frozenset({1})))
    assert (arrived.msg, arrived.args, arrived.user) == ("%d bytes", (3,), frozenset({1}))


def test_a_message_that_cannot_be_formatted(handled):
    """The record arrives as text, and says why, even where an argument cannot be shown."""
    arrived = handled(record_of("%d and %s", "no number", NoRepr()))
    said = arrived.getMessage()
    assert said.startswith("'%d and %s'")
    assert "cannot be formatted: TypeError" in said


def test_an_extra_that_can_neither_be_pickled_nor_shown(handled):
    """Its type is told; the objects of the message arrive."""
    arrived = handled(record_of("%s", frozenset({1}), user=NoRepr()))
    assert arrived.user == "<NoRepr, its __repr__ raised RecursionError>"
    assert arrived.args == (frozenset({1}),)


def test_a_record_factory_that_wants_more(handled):
    """What it adds cannot be known, so it travels."""

    def factory(name, *args):
        raise LookupError(name)

    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(factory)
    try:
        body = _records._dump_record(record_of("text", request="1"))
    finally:
        logging.setLogRecordFactory(before)
    _, state, _, _ = pickle.loads(body)
    assert state["request"] == "1"


def test_a_level_that_was_raised_meanwhile(handled):
    """What the worker was told to send and nobody wants any more is not handled."""
    logger = logging.getLogger("tests.odd")
    logger.setLevel(logging.ERROR)
    try:
        assert handled(record_of("text")) is None
    finally:
        logger.setLevel(logging.NOTSET)


def test_an_exception_that_cannot_be_rebuilt(handled, monkeypatch):
    """A log shows one of the same name and text, with the frames in which it was raised."""
    monkeypatch.setattr(_raised, "_pickled", lambda error: b"")  # as where it has no other name
    record = record_of("failed")
    try:
        raise LookupError("why")
    except LookupError:
        record.exc_info = sys.exc_info()
    kind, error, traceback = handled(record).exc_info
    assert (kind.__name__, str(error)) == ("LookupError", "why")
    assert kind is not LookupError
    assert traceback.tb_frame.f_code.co_name == "test_an_exception_that_cannot_be_rebuilt"


def unknown_here():
    raise ImportError("unknown here")


class UnknownWarning(UserWarning):
    def __reduce__(self):
        return unknown_here, ()


@pytest.fixture
def taken(monkeypatch):
    """What is done to a worker, here, and the bodies that it sends."""
    taken = _records._Taken()
    taken.sent = []
    taken.outbox = types.SimpleNamespace(put=taken.sent.append)
    monkeypatch.setattr(_records, "_taken", taken)
    return taken


def test_a_warning_of_a_class_that_is_not_known_here(taken):
    """It is issued as one of the builtin class that it is one of, with its text."""
    _records._show_warning(UnknownWarning("text"), UnknownWarning, "no file of a module", 7)
    place = pickle.loads(taken.sent[0])[1]
    assert place == ("no file of a module", 7, None), "no module that runs has that file"
    with pytest.warns(UserWarning, match="^text$") as caught:
        _records.received(taken.sent[0])()
    assert type(caught[0].message) is UserWarning
    assert (caught[0].filename, caught[0].lineno) == ("no file of a module", 7)


def test_a_warning_for_a_file(taken):
    """What code of the worker wants to be written somewhere is written there, and not sent."""
    written = []
    taken.show_here = lambda *args: written.append(args)
    file = io.StringIO()
    _records._show_warning("text", UserWarning, "file.py", 7, file, "line")
    assert written == [("text", UserWarning, "file.py", 7, file, "line")]
    assert not taken.sent


class Keeps(logging.Handler):
    def __init__(self, level=logging.NOTSET):
        super().__init__(level)
        self.records = []

    def emit(self, record):
        self.records.append(record)


def test_handlers_that_the_worker_has_made(taken):
    """They have the records of their level, as the filters of the logger have made them."""
    all_of_them, errors = Keeps(), Keeps(logging.ERROR)
    logger = logging.Logger("made here")  # noqa: LOG001 - of no other's
    logger.handlers = [all_of_them, errors]
    other = record_of("filtered")
    logger.filter = lambda record: other  # since Python 3.12, a filter may give another record
    _records._handle(logger, record_of("text"))
    assert (all_of_them.records, errors.records) == ([other], [])


@pytest.mark.parametrize("has_handlers", [True, False])
def test_what_a_job_forks_has_its_logging_back(taken, monkeypatch, has_handlers):
    """There, loggers handle their records themselves, and nothing of ours is left on the root."""
    handle, handlers = logging.Logger.handle, list(logging.root.handlers)
    monkeypatch.setattr(logging.root, "handlers", [Keeps()] if has_handlers else [])
    before = list(logging.root.handlers)
    _records._take_over(logging)
    assert logging.Logger.handle is _records._handle
    assert len(logging.root.handlers) == 1
    _records._give_back()
    assert logging.Logger.handle is handle
    assert logging.root.handlers == before
    monkeypatch.undo()
    assert logging.root.handlers == handlers


def test_a_logging_that_cannot_be_found(taken, monkeypatch):
    """A worker that watches for its import leaves the error to the import."""
    watch = _records._Watch()
    monkeypatch.setattr(sys, "meta_path", [watch, *sys.meta_path])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert watch.find_spec("another") is None
    assert watch.find_spec("logging") is None
    assert watch not in sys.meta_path
