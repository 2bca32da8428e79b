"""The fork server: a small single-threaded process from which all workers are forked.

    loop process ── master ──► fork server            one a process; its end of file ends everything
                 ── control ─►                        one a pool; its end of file ends its workers
                 ── channel ─────────────────► worker

Theory of operation. A process that has threads, TLS pools or gigabytes cannot be forked quickly,
or at all; this one can, in about a millisecond, as long as it stays as small as it was. It receives
START (with the worker's end of a channel), KILL and INTERRUPT on a pool's control connection and
reports EXITED and NOT_STARTED there. It blocks only in poll(2), and in writing these short reports, of which there
is at most one for each START. It alone signals workers, and only those that it has not reaped yet:
a pid that it names cannot have been given to another process.

A worker is told to end by closing its channel. KILL is SIGKILL to its process group, so that what
a job has spawned ends with it. When a control connection ends, the pool is gone: its workers are
killed. When the master ends, the loop process is gone: all are killed, and the server ends.

Both are ends of file, which a process that was forked behind Python's back (by a C library, without
an exec) would delay as long as it lives: so the server watches its parent, too. And both need a
server that runs: if it is stopped, or was killed with the loop process, the life pipes remain
(:mod:`._life`), of which the server has one and each worker has one.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from . import _descriptors, _life, _limits, _wire
from ._memory import map_segment
from ._recipe import Recipe
from ._worker import Marks, Worker, after_fork, flush, kill_group, send_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from ._guard import Guard
    from ._worker import Coroutines, Reply

# What this process is. Modules that a server or a worker imports may prepare() as the program does.
role: Literal["loop process", "fork server", "worker"] = "loop process"


def serve_spawned(master: int, life: int, parent: int) -> NoReturn:
    """Entry point of a spawned fork server; its arguments are those of :func:`serve`."""
    import warnings

    # A preloaded module may start threads (BLAS does), which Python 3.12 warns of at each fork.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    try:
        for descriptor in (master, life):
            os.set_inheritable(descriptor, False)
        serve(socket.socket(fileno=master), life, parent, preload=True)
    finally:
        os._exit(1)


def serve(master: socket.socket, life: int, parent: int, *, preload: bool) -> NoReturn:
    """Runs the fork server until the master connection ends.

    Args:
        master: the connection to the loop process.
        life: its end of the life pipe.
        parent: the pid of the loop process.
        preload: whether it imports what its first worker needs.
    """
    global role
    role = "fork server"
    _detach_signals()
    try:
        _life.depend_on(life)
        _Server(master, parent, preload=preload).run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _detach_signals() -> None:
    """Handlers back to default, SIGINT and SIGHUP ignored, none blocked."""
    signal.set_wakeup_fd(-1)  # inherited, it is the parent's: 3.11 would run its handlers there
    for number in range(1, signal.NSIG):  # valid_signals() makes an enum of each, in 0.1 ms
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the loop process's
    # A worker that is stopped when the fork server dies is in an orphaned process group, to which
    # the kernel sends SIGHUP (setpgid(2)): its job would fail.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


class _Client:
    """One pool's control connection, and its living workers by number."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.decoder = _wire.Decoder()
        self.workers: dict[int, int] = {}  # number -> pid

    def report(self, kind: int, number: int, value: int) -> None:
        body = value.to_bytes(8, "little", signed=True)
        try:
            send_all(self.control, _wire.encode(kind, number, [body]))
        except OSError:
            pass  # the pool is gone; the end of file is on its way


class _Server:
    def __init__(self, master: socket.socket, parent: int, *, preload: bool) -> None:
        self._master = master
        self._parent = parent
        self._preload = preload
        self._clients: dict[int, _Client] = {}  # by descriptor of the control connection
        self._owners: dict[int, tuple[_Client, int]] = {}  # pid -> whose worker, which number
        self._wakeup, wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup.setblocking(False)
        signal.set_wakeup_fd(_descriptors.private(wakeup.detach()), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._poll = select.poll()
        for sock in (self._master, self._wakeup):
            self._poll.register(_descriptors.private(sock.fileno()), select.POLLIN)
        self._parent_watch = _watch(parent)
        if self._parent_watch >= 0:
            self._poll.register(self._parent_watch, select.POLLIN)

    def run(self) -> NoReturn:
        while True:
            if os.getppid() != self._parent:
                self._end()
            for descriptor, _ in self._poll.poll():
                if descriptor == self._wakeup.fileno():
                    self._wakeup.recv(4096)
                    self._reap()
                elif descriptor == self._master.fileno():
                    self._accept()
                elif descriptor in self._clients:
                    self._read(self._clients[descriptor])
                # else the parent has ended, which the next turn finds

    def _accept(self) -> None:
        nbytes, descriptors, _ = _descriptors.receive(self._master, memoryview(bytearray(1)))
        if not nbytes:
            self._end()
        if not descriptors:  # lost at the limit of descriptors; the other end reads end of file
            return
        control = socket.socket(fileno=descriptors[0])
        self._clients[_descriptors.private(control.fileno())] = _Client(control)
        self._poll.register(control, select.POLLIN)

    def _end(self) -> NoReturn:
        for client in list(self._clients.values()):
            self._drop(client)
        while self._owners:
            self._owners.pop(os.waitpid(-1, 0)[0], None)
        os._exit(0)

    def _read(self, client: _Client) -> None:
        try:
            nbytes, descriptors, truncated = _descriptors.receive(
                client.control, client.decoder.buffer(), socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        except ConnectionError:
            nbytes = 0
        if not nbytes:
            self._drop(client)
            return
        for frame in client.decoder.received(nbytes, descriptors, truncated=truncated):
            if frame.kind == _wire.START:
                self._start(client, frame)
            elif frame.kind == _wire.KILL:
                self._kill(client, frame.number)
            elif frame.kind == _wire.INTERRUPT:
                _signal_process(client.workers.get(frame.number), signal.SIGURG)

    def _start(self, client: _Client, frame: _wire.Frame) -> None:
        try:
            if frame.descriptors is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            recipe = Recipe.loads(frame.body)
            # Before the first worker only: meanwhile no worker can be killed.
            if not self._owners:
                if self._preload:
                    _import(recipe)
                _limits.prepare()
            flush()
            pid = os.fork()
        except OSError as error:
            client.report(_wire.NOT_STARTED, frame.number, error.errno or 0)
        else:
            if not pid:  # pragma: no cover - the child goes on in a frame that coverage has left
                for other in self._clients.values():
                    other.decoder.close()  # else a half-read START would hold a sibling's channel
                _become_worker(recipe, frame)
            _set_group(pid)
            client.workers[frame.number] = pid
            self._owners[pid] = client, frame.number
        finally:
            frame.close()

    def _kill(self, client: _Client, number: int) -> None:
        pid = client.workers.get(number)
        if pid is not None:  # else its EXITED is on its way
            kill_group(pid)
            _signal_process(pid, signal.SIGKILL)  # a job may have left the group

    def _drop(self, client: _Client) -> None:
        for number in client.workers:
            self._kill(client, number)
        del self._clients[client.control.fileno()]
        self._poll.unregister(client.control)
        _descriptors.unmark(client.control.fileno())
        client.decoder.close()
        client.control.close()

    def _reap(self) -> None:
        while self._owners:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            pid = ended.si_pid
            kill_group(pid)  # what its jobs have spawned; the zombie still holds the number
            _, status = os.waitpid(pid, 0)
            client, number = self._owners.pop(pid, (None, 0))
            if client is not None:
                del client.workers[number]
                client.report(_wire.EXITED, number, status)


def _watch(parent: int) -> int:
    """A descriptor that is readable when the parent has ended; -1 where there is none."""
    try:
        return _descriptors.private(os.pidfd_open(parent))
    except (AttributeError, OSError):  # not on macOS; forbidden; or it has ended already
        return -1


def _signal_process(pid: int | None, number: int) -> None:
    if pid is None:
        return  # its EXITED is on its way
    try:
        os.kill(pid, number)
    except OSError:
        pass  # not ours to signal any more: it runs as somebody else


def _import(recipe: Recipe) -> None:
    """Loads what the first job needs here, once, instead of in every worker."""
    try:
        recipe.apply()
        for name in recipe.preload:
            if name not in sys.modules:
                __import__(name)
                gc.freeze()
    except BaseException:
        pass  # the worker meets it again and reports it


def _set_group(pid: int) -> None:
    # Both sides do it, so that neither a kill nor the worker's own children come too early.
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # it has done so and is gone already


def _become_worker(recipe: Recipe, frame: _wire.Frame) -> NoReturn:
    global role
    role = "worker"
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        after_fork()
        assert frame.descriptors
        channel, page, life = frame.descriptors
        bound = _life.depend_on(life, group=True)
        _descriptors.private(channel)
        marks = Marks(map_segment(page))
        os.close(page)
        begin = partial(marks.begin, recipe.slot)
        guard = partial(_guard_of, marks, recipe.slot)
        growth = _limits.Growth(recipe.max_memory) if recipe.max_memory else None
        worker = Worker(socket.socket(fileno=channel), begin, guard, _coroutines_of, growth)
        worker.serve(recipe.initialize, bound=bound)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _coroutines_of(channel: int, reply: Callable[[Reply], None]) -> Coroutines:
    from . import _coroutines  # when the first job comes that is one

    return _coroutines.Coroutines(channel, reply)


def _guard_of(marks: Marks, slot: int) -> Guard:
    from ._guard import Guard  # when the first job comes that may be told to end

    return Guard(partial(marks.is_cancelled, slot), partial(marks.hear, slot))
