"""A fork server and workers that the test plays, over the real wire: deaths at any line of the protocol."""

from __future__ import annotations

import asyncio
import signal
import socket

from asynclam import _call, _descriptors, _payload, _raised, _wire


class Peer:
    """The other end of a connection: frames in, frames out, as the test says."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._decoder = _wire.Decoder()
        self._frames: list[_wire.Frame] = []

    async def frame(self) -> _wire.Frame | None:
        """The next frame; ``None`` at end of file."""
        loop = asyncio.get_running_loop()
        while not self._frames:
            try:
                nbytes, descriptors, _ = _descriptors.receive(self.sock, self._decoder.buffer())
            except BlockingIOError:
                readable = asyncio.Event()
                loop.add_reader(self.sock.fileno(), readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self.sock.fileno())
                continue
            except ConnectionResetError:
                nbytes = 0
            if not nbytes:
                return None
            self._frames += self._decoder.received(nbytes, descriptors)
        return self._frames.pop(0)

    def send(self, kind: int, number: int, body: bytes = b"", flags: int = 0) -> None:
        self.sock.sendall(b"".join(_wire.encode(kind, number, [body], flags=flags)))

    def close(self) -> None:
        self.sock.close()
        self._decoder.close()
        for frame in self._frames:
            frame.close()


class FakeWorker(Peer):
    """A worker whose death, replies and marks are the test's."""

    def __init__(self, number: int, sock: socket.socket, marks, slot: int) -> None:
        super().__init__(sock)
        self.number = number
        self._marks, self._slot = marks, slot
        self._received = 0  # jobs
        self._orders: dict[int, int] = {}  # of jobs, by number

    def close(self) -> None:
        super().close()
        self._marks = None  # lets go of the page, which tracebacks would keep

    def ready(self, pid: int = 4711) -> None:
        self.send(_wire.READY, 0, pid.to_bytes(8, "little"))

    async def job(self) -> _wire.Frame:
        frame = await self.frame()
        assert frame is not None
        assert frame.kind == _wire.JOB
        self._received += 1
        self._orders[frame.number] = self._received  # anew, if it was taken back and sent again
        return frame

    def begin(self, number: int) -> bool:
        """Marks that a job begins; whether it may."""
        return self._marks.begin(self._slot, self._orders[number])

    def is_cancelled(self, number: int) -> bool:
        """Whether the page says that a job is to end."""
        return self._marks.is_cancelled(self._slot, self._orders[number])

    def hear(self, number: int) -> None:
        """Marks that a job has been told to end."""
        self._marks.hear(self._slot, self._orders[number])

    def skip(self, frame: _wire.Frame) -> None:
        """Replies that the job was revoked before it began."""
        self.send(_wire.SKIPPED, self._orders[frame.number])

    def reply(self, frame: _wire.Frame, result: object) -> None:
        self.send(_wire.RESULT, frame.number, result_body(result))

    def reply_alone(self, frame: _wire.Frame, result: object) -> None:
        """Replies in a way that one receive does not join to what comes after it."""
        data = b"".join(
            _wire.encode(_wire.RESULT, frame.number, [result_body(result)], descriptors=1)
        )
        assert _descriptors.send(self.sock, [data], [self.sock.fileno()]) == len(data)

    def raise_(self, frame: _wire.Frame, error: BaseException) -> None:
        self.send(_wire.RAISED, frame.number, _raised.dumps(error))


def result_body(result: object) -> bytes:
    return b"".join(_payload.dumps(result).parts)


def call_of(frame: _wire.Frame):
    """The function and the arguments that a worker was sent."""
    fn, args, kwargs = _call.receive(frame)
    return fn, args


class FakeServer:
    """Takes the place of :class:`asynclam._forkserver.ForkServer`; its children are FakeWorkers."""

    forked = True

    def __init__(self) -> None:
        self.controls: list[Peer] = []
        self.marks = None

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.controls.append(Peer(theirs))
        return ours

    @property
    def control(self) -> Peer:
        return self.controls[-1]

    async def worker(self) -> FakeWorker:
        """Waits until the pool asks for a worker, and is it."""
        from asynclam import _memory, _recipe, _worker

        frame = await self.control.frame()
        while frame is not None and frame.kind != _wire.START:  # of one that has died by itself
            frame = await self.control.frame()
        assert frame is not None
        recipe = _recipe.Recipe.loads(frame.body)
        channel, page, life = frame.descriptors
        marks = _worker.Marks(_memory.map_segment(page))
        frame.descriptors = [page, life]
        frame.close()
        return FakeWorker(frame.number, socket.socket(fileno=channel), marks, recipe.slot)

    async def killed(self) -> int:
        """Waits until the pool wants a worker killed; its number."""
        frame = await self.control.frame()
        assert frame is not None
        assert frame.kind == _wire.KILL
        return frame.number

    async def interrupted(self) -> int:
        """Waits until the pool wants a worker interrupted; its number."""
        frame = await self.control.frame()
        assert frame is not None
        assert frame.kind == _wire.INTERRUPT
        return frame.number

    def exited(self, worker: FakeWorker, status: int = signal.SIGKILL) -> None:
        """Reports a worker's wait status."""
        self.control.send(_wire.EXITED, worker.number, status.to_bytes(8, "little", signed=True))

    def not_started(self, number: int, errno: int) -> None:
        self.control.send(_wire.NOT_STARTED, number, errno.to_bytes(8, "little", signed=True))

    def stop(self) -> None:
        for control in self.controls:
            control.close()
