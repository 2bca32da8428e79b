"""A channel on a real socketpair with tiny buffers: any size both ways, nothing blocks."""

import asyncio
import errno
import os
import signal
import socket
import threading

import pytest

from asynclam import _channel, _descriptors, _wire, _worker
from asynclam._channel import Channel


class Ends:
    """A channel, the other end as a blocking socket, and what came of both."""

    def __init__(self, buffer=None):
        ours, self.theirs = socket.socketpair()
        if buffer:
            for sock in (ours, self.theirs):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.frames = []
        self.reasons = []
        self.changed = asyncio.Event()
        self.channel = Channel(
            asyncio.get_running_loop(), ours, self.on_frames, self.on_end, thorough=True
        )

    def on_frames(self, frames):
        self.frames += frames
        self.changed.set()

    def on_end(self, reason):
        self.reasons.append(reason)
        self.changed.set()

    async def until(self, condition):
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    def close(self):
        self.channel.close()
        self.theirs.close()


@pytest.fixture
async def ends():
    ends = Ends()
    yield ends
    ends.close()


@pytest.fixture
async def narrow():
    ends = Ends(buffer=4096)
    yield ends
    ends.close()


def frame(number, body=b"", descriptors=0):
    return _wire.encode(_wire.JOB, number, [body], descriptors=descriptors)


async def test_any_size_both_ways_at_once(narrow):
    """Megabytes in both directions at once get through buffers of 4 KiB, and the loop stays free."""
    big = os.urandom(1 << 20)
    echoed = threading.Thread(target=echo, args=(narrow.theirs, 8))
    echoed.start()
    for number in range(8):
        narrow.channel.send(frame(number, big))
    turns = 0
    while len(narrow.frames) < 8:
        await asyncio.sleep(0)
        turns += 1
    echoed.join()
    assert turns > 8, "other callbacks ran in between"
    assert [frame.number for frame in narrow.frames] == list(range(8))
    assert all(frame.body == big for frame in narrow.frames)


def echo(sock, count):
    for number, received in zip(range(count), _worker.frames(sock), strict=False):
        assert number == received.number
        _worker.send_all(sock, _wire.encode(_wire.RESULT, number, [received.body]))
        if number == count - 1:
            return


async def test_a_close_between_two_turns_of_reading(ends, monkeypatch):
    """What has not been read by then is not read any more, and is no error."""
    monkeypatch.setattr(_channel, "_TURN", 1)
    _worker.send_all(ends.theirs, [*frame(1), *frame(2, bytes(100_000)), *frame(3)])
    await ends.until(lambda: ends.frames)
    ends.channel.close()
    await asyncio.sleep(0)
    assert [frame.number for frame in ends.frames] == [1, 2]
    assert ends.reasons == []


async def test_descriptors_both_ways(ends):
    """Descriptors arrive with their frame, in both directions, closed by exec."""
    with open(os.devnull, "rb") as file:
        ends.channel.send(frame(1, b"x", 1), [file.fileno()])
        received = next(_worker.frames(ends.theirs))
        _worker.send_all(ends.theirs, frame(2, b"y", 1), received.descriptors)
        await ends.until(lambda: ends.frames)
    (back,) = ends.frames[0].descriptors
    assert os.path.samestat(os.fstat(back), os.stat(os.devnull))
    assert not os.get_inheritable(back)
    received.close()
    ends.frames[0].close()


async def test_descriptors_wait_their_turn(narrow):
    """Behind a frame that is half sent, descriptors go with the first byte of their own frame."""
    sent = []
    with open(os.devnull, "rb") as file:
        narrow.channel.send(frame(1, bytes(100_000)))
        narrow.channel.send(frame(2, b"x", 1), [file.fileno()], lambda: sent.append(2))
        assert sent == []
        reader = threading.Thread(target=lambda: got.extend(take(narrow.theirs, 2)))
        got = []
        reader.start()
        while not sent:
            await asyncio.sleep(0)
        reader.join()
    assert [len(frame.descriptors) for frame in got] == [0, 1]
    got[1].close()


def take(sock, count):
    frames = _worker.frames(sock)
    return [next(frames) for _ in range(count)]


async def test_sent_is_called_for_what_is_never_sent(narrow):
    """Whoever lent descriptors gets them back when the channel is closed, or the peer is gone."""
    released = []
    with open(os.devnull, "rb") as file:
        narrow.channel.send(frame(1, bytes(100_000)))
        narrow.channel.send(frame(2, b"", 1), [file.fileno()], lambda: released.append("closed"))
        narrow.channel.close()
        narrow.channel.send(frame(3, b"", 1), [file.fileno()], lambda: released.append("late"))
    assert released == ["closed", "late"]


async def test_the_writer_is_registered_only_while_something_waits(narrow):
    """An idle channel costs the loop nothing: its writer callback is gone."""
    narrow.channel.send(frame(1, bytes(100_000)))
    assert narrow.channel._writing
    reader = threading.Thread(target=take, args=(narrow.theirs, 1))
    reader.start()
    while narrow.channel._writing:
        await asyncio.sleep(0)
    reader.join()


async def test_end_of_file_comes_after_the_last_frame(ends):
    """What was sent before the end is delivered, then the end is told, once."""
    for number in range(3):
        _worker.send_all(ends.theirs, frame(number, bytes(50_000)))
    ends.theirs.close()
    await ends.until(lambda: ends.reasons)
    assert [frame.number for frame in ends.frames] == [0, 1, 2]
    assert ends.reasons == [None]
    ends.channel.drain()
    assert ends.reasons == [None]


async def test_a_reset_is_an_end(ends):
    """A peer that dies with unread data resets the connection: an end like the other."""
    ends.channel.send(frame(1, b"never read"))
    _worker.send_all(ends.theirs, frame(2))
    ends.theirs.close()
    await ends.until(lambda: ends.reasons)
    assert [frame.number for frame in ends.frames] == [2]
    assert isinstance(ends.reasons[0], ConnectionResetError)


async def test_sending_to_the_dead(ends):
    """A send to a peer that is gone raises nothing: the end is told where it is read."""
    ends.theirs.close()
    for number in range(3):
        ends.channel.send(frame(number, bytes(1 << 20)))
    await ends.until(lambda: ends.reasons)
    assert len(ends.reasons) == 1


@pytest.mark.parametrize("descriptors", [(), (0,)], ids=["bytes", "descriptors"])
async def test_a_broken_pipe_is_no_signal(ends, descriptors):
    """SIGPIPE, which many programs set to its default, kills nobody who sends to the dead."""
    ends.theirs.close()
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        ends.channel.send(_wire.encode(_wire.KILL, 1, descriptors=len(descriptors)), descriptors)
        with pytest.raises(BrokenPipeError):
            _worker.send_all(ends.channel._sock, [b"a reply"], descriptors)
    finally:
        signal.signal(signal.SIGPIPE, before)


async def test_a_death_with_much_unread(ends):
    """Megabytes that arrive together with the end are read to the last frame (uvloop would stop)."""
    writer = threading.Thread(target=write_and_close, args=(ends.theirs, 12, bytes(1 << 20)))
    writer.start()
    await ends.until(lambda: ends.reasons)
    writer.join()
    assert [frame.number for frame in ends.frames] == list(range(12))


def write_and_close(sock, count, body):
    for number in range(count):
        _worker.send_all(sock, frame(number, body))
    sock.close()


async def test_a_send_that_cannot_be(ends, monkeypatch):
    """A send that fails for another reason than the peer's end is told as the end, with the reason."""
    monkeypatch.setattr(_descriptors, "send", refuse_to_send)
    ends.channel.send(frame(1))
    assert [error.errno for error in ends.reasons] == [errno.EINVAL]


def refuse_to_send(*args):
    raise OSError(errno.EINVAL, "Invalid argument")


async def test_garbage_ends_the_channel(ends):
    """What is no frame ends the channel, with the reason."""
    ends.theirs.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await ends.until(lambda: ends.reasons)
    assert isinstance(ends.reasons[0], _wire.ProtocolError)


async def test_close_in_the_middle_of_frames(ends):
    """A callback may close the channel: nothing more is told, nothing more is read."""
    ends.channel._on_frames = lambda frames: (ends.frames.extend(frames), ends.channel.close())
    for number in range(2):
        _worker.send_all(ends.theirs, frame(number))
    while not ends.frames:
        await asyncio.sleep(0)
    assert ends.channel.closed
    assert (len(ends.frames), ends.reasons) == (2, [])


async def test_close_twice(ends):
    """Closing twice does nothing; the other side reads end of file."""
    ends.channel.close()
    ends.channel.close()
    assert ends.theirs.recv(1) == b""


def test_the_next_loop(request):
    """A channel attaches to the next loop as it is, with what waits in both directions."""

    async def first():
        ends = Ends(buffer=4096)
        ends.channel.send(frame(1, bytes(100_000)))
        return ends

    async def second(ends):
        ends.changed = asyncio.Event()
        ends.channel.attach(asyncio.get_running_loop())
        echoed = threading.Thread(target=echo_one, args=(ends.theirs,))
        echoed.start()
        await ends.until(lambda: ends.frames)
        echoed.join()
        ends.close()

    ends = asyncio.run(first())
    asyncio.run(second(ends))
    assert len(ends.frames[0].body) == 100_000


def echo_one(sock):
    received = next(_worker.frames(sock))
    _worker.send_all(sock, _wire.encode(_wire.RESULT, 1, [received.body]))


@pytest.mark.parametrize("code", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
async def test_what_the_kernel_lacks_for_a_moment(ends, monkeypatch, code):
    """Too many descriptors in flight, or no memory for a buffer: the frame waits, and is not lost."""
    real, failures = _descriptors.send, [OSError(code, os.strerror(code))]

    def send(*args):
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(_descriptors, "send", send)
    with open(os.devnull, "rb") as file:
        ends.channel.send(frame(1, b"x", 1), [file.fileno()], ends.changed.set)
        await ends.changed.wait()
    received = next(_worker.frames(ends.theirs))
    assert len(received.descriptors) == 1
    received.close()


async def test_more_than_a_turn_is_drained(ends, monkeypatch):
    """A peer that is dead has all of its last words read at once, however many there are."""
    monkeypatch.setattr("asynclam._channel._TURN", 1)
    for number in range(3):
        ends.theirs.sendall(b"".join(_wire.encode(_wire.RESULT, number, [bytes(70_000)])))
    ends.theirs.close()
    ends.channel.drain()
    assert [frame.number for frame in ends.frames] == [0, 1, 2]
    assert ends.reasons == [None]


async def test_closed_before_the_retry(ends, monkeypatch):
    """What the kernel had no room for is not sent on a descriptor that is another's by now."""
    retries = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(ends.channel, "_loop", loop_that_collects(loop, retries))

    def lacks(*_):
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(_descriptors, "send", lacks)
    ends.channel.send(_wire.encode(_wire.JOB, 1, [b"body"]))
    assert ends.channel.is_sending
    ends.channel.close()
    monkeypatch.setattr(_descriptors, "send", lambda *_: pytest.fail("it is closed"))
    (retry,) = retries
    retry()


def loop_that_collects(loop, retries):
    """A loop whose timers the test calls."""

    class Loop:
        def __getattr__(self, name):
            return getattr(loop, name)

        def call_later(self, delay, callback):
            retries.append(callback)

    return Loop()


async def test_garbage_after_a_frame_that_has_closed_the_channel(ends):
    """Who has closed it because of that frame is told nothing more."""

    def on_frames(frames):
        ends.on_frames(frames)
        ends.channel.close()

    ends.channel._on_frames = on_frames
    frame = b"".join(_wire.encode(_wire.RESULT, 1, [b"body"]))
    ends.theirs.sendall(frame + b"this is no frame, but as long as the header of one")
    await ends.until(lambda: ends.channel.closed)
    assert [frame.number for frame in ends.frames] == [1]
    assert ends.reasons == []
