"""The fork server: a small single-threaded process from which all workers are forked.

    loop process ── master ──► fork server            one a process; its end of file ends everything
                 ── control ─►                        one a pool; its end of file ends its workers
                 ── channel ─────────────────► worker

Theory of operation. A process that has threads, TLS pools or gigabytes cannot be forked quickly,
or at all; this one can, in about a millisecond, as long as it stays as small as it was. It receives
START (with the worker's end of a channel) and KILL on a pool's control connection and reports EXITED
and NOT_STARTED there. It blocks only in poll(2), and in writing these short reports, of which there
is at most one for each START. It alone signals workers, and only those that it has not reaped yet:
a pid that it names cannot have been given to another process.

A worker is told to end by closing its channel. KILL is SIGKILL to its process group, so that what
a job has spawned ends with it. When a control connection ends, the pool is gone: its workers are
killed. When the master ends, the loop process is gone: all are killed, and the server ends.

The parent's side, :class:`ForkServer`, is shared by all executors of the process. A connection to a
pool is made by sending one end of a socketpair over the master.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import pickle
import select
import signal
import socket
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from . import _descriptors, _wire
from ._memory import map_segment
from ._worker import Marks, Worker, after_fork, flush, send_all

if TYPE_CHECKING:
    import subprocess
    from typing import Literal

    StartMethod = Literal["auto", "fork", "spawn"]


class Recipe:
    """What a worker takes over from the loop process at the moment when it is started.

    Args:
        slot: where it marks what it has begun.
        initializer: pickled ``(function, arguments)`` to be called first; empty for none.
        preload: modules that a spawned server imports before it forks.
    """

    def __init__(self, slot: int, initializer: bytes, preload: tuple[str, ...]) -> None:
        self.slot = slot
        self.path = list(sys.path)
        self.directory = _working_directory()
        self.environment = dict(os.environ)
        self.initializer = initializer
        self.preload = preload

    def dumps(self) -> bytes:
        """As the body of a START frame."""
        return pickle.dumps(vars(self), 5)

    @classmethod
    def loads(cls, body: bytearray | memoryview) -> Recipe:
        """Out of the body of a START frame."""
        recipe = cls.__new__(cls)
        vars(recipe).update(pickle.loads(body))
        return recipe

    def initialize(self) -> None:
        """In the worker: takes the state over, then calls the initializer."""
        self.apply()
        if self.initializer:
            initializer, arguments = pickle.loads(self.initializer)
            initializer(*arguments)

    def apply(self) -> None:
        """Makes this process's path, directory and environment those of the loop process."""
        sys.path[:] = self.path
        if self.directory:
            os.chdir(self.directory)
        if self.environment != dict(os.environ):
            os.environ.clear()
            os.environ.update(self.environment)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return ""


# --- the parent's side ---------------------------------------------------------------------------


class ForkServer:
    """The loop process's handle of its fork server."""

    def __init__(self, master: socket.socket, process: int | subprocess.Popen[bytes]) -> None:
        self._master = master
        self._process = process
        self._owner = os.getpid()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process if isinstance(self._process, int) else self._process.pid

    @property
    def forked(self) -> bool:
        """Whether it was forked from this process, and so knows its ``__main__``."""
        return isinstance(self._process, int)

    def connect(self) -> socket.socket:
        """A control connection for a pool.

        Raises:
            OSError: the server is gone, or no descriptor is left.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                _descriptors.send(self._master, [b"\0"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        _descriptors.private(ours.fileno())
        return ours

    def stop(self) -> None:
        """Ends it and all of its workers, and waits until it is gone: it only kills and reaps."""
        if self._owner != os.getpid() or self._master.fileno() < 0:
            return
        with self._master as master:
            master.shutdown(socket.SHUT_WR)
            ended = select.poll()
            ended.register(master, select.POLLIN)
            if not ended.poll(_PATIENCE):
                os.kill(self.pid, signal.SIGKILL)  # stopped, or stuck in a preloaded module
            self._reap()
            _descriptors.unmark(master.fileno())

    def _reap(self) -> None:
        if not isinstance(self._process, int):
            self._process.wait()
            return
        try:
            os.waitpid(self._process, 0)
        except ChildProcessError:
            pass  # a waitpid(-1) of somebody else was quicker


_PATIENCE = 1000  # ms in which a server kills and reaps its workers; it takes some 2


# What this process is. Modules that a server or a worker imports may prepare() as the program does.
role: Literal["loop process", "fork server", "worker"] = "loop process"

_lock = threading.Lock()  # two loops in two threads may want the first server at once
_servers: dict[str, ForkServer] = {}  # by how they were started


def ensure(method: StartMethod) -> ForkServer:
    """The fork server of this process, started if there is none.

    Args:
        method: ``"fork"``, ``"spawn"``, or ``"auto"``: whichever exists, else what suits.

    Raises:
        OSError: it could not be started.
        RuntimeError: this is a fork server itself: a module that it preloads runs jobs on import.
    """
    if role == "fork server":
        raise RuntimeError(
            "a job was submitted while a module was imported in the fork server; submit it in a "
            "function that the program calls, not at the top level of a module"
        )
    with _lock:
        method = _resolved(method)
        server = _servers.get(method)
        if server is None:
            server = _servers[method] = _fork() if method == "fork" else _spawn()
        return server


def shares_main(method: StartMethod) -> bool:
    """Whether workers know the ``__main__`` of this process, now or once they are started.

    In a REPL or a notebook a name is defined again and again, so they do not count as knowing it.
    """
    return _resolved(method) == "fork" and hasattr(sys.modules.get("__main__"), "__file__")


def discard(server: ForkServer) -> None:
    """Forgets a server that has died; the next :func:`ensure` starts another."""
    with _lock:
        for method, known in list(_servers.items()):
            if known is server:
                del _servers[method]
    server.stop()


def stop() -> None:
    """Ends the fork servers of this process and their workers."""
    with _lock:
        servers = list(_servers.values())
        _servers.clear()
    for server in servers:
        server.stop()


def _resolved(method: StartMethod) -> Literal["fork", "spawn"]:
    if method != "auto":
        return method
    if "fork" in _servers:
        return "fork"
    if "spawn" in _servers:
        return "spawn"
    return "fork" if can_fork() else "spawn"


_MOST_RESIDENT = 256 << 20  # bytes: a fork copies page tables, some 23 ms a GiB, and pins the heap


def can_fork() -> bool:
    """Whether forking this process is safe and cheap: one native thread, and a small heap."""
    try:
        threads = len(os.listdir("/proc/self/task"))
        with open("/proc/self/statm", "rb") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # macOS: system frameworks do not survive a fork
        return False
    return threads == 1 and resident < _MOST_RESIDENT and _has_free_descriptors()


def _has_free_descriptors() -> bool:
    # The numbers that a forked server inherits stay taken in all of its workers.
    most = os.sysconf(
        "SC_OPEN_MAX"
    )  # the soft limit, -1 for none; the resource module costs an import
    return most < 0 or len(_descriptors.open_descriptors()) < most // 2


def _fork() -> ForkServer:
    flush()
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            pid = _fork_child(theirs)
        except BaseException:
            ours.close()
            raise
    _descriptors.private(ours.fileno())
    return ForkServer(ours, pid)


def _fork_child(master: socket.socket) -> int:
    # A signal between the fork and the reset of the handlers would run the parent's in the child.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if not pid:
            _in_child(master)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _in_child(master: socket.socket) -> NoReturn:
    try:
        os.setsid()
        _descriptors.replace_inherited({master.fileno(), *_output_descriptors()})
        _forget_parent()
        serve(master, preload=False)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _forget_parent() -> None:
    """Makes a forked process safe to live on: no loop of the parent, no server, no garbage."""
    gc.freeze()  # shared pages stay shared, and garbage of the parent is never finalised here
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None:
        asyncio._set_running_loop(None)


def _output_descriptors() -> set[int]:
    """Descriptors behind print and log handlers: what a job writes there must come out."""
    logging = sys.modules.get("logging")
    found = _descriptor_of(sys.stdout) | _descriptor_of(sys.stderr)
    for reference in list(getattr(logging, "_handlerList", ())):
        handler = reference()
        for value in list(vars(handler).values()) if handler else ():
            # The runtime client's handler holds a sink, which holds the file.
            for candidate in (value, *getattr(value, "__dict__", {}).values()):
                found |= _descriptor_of(candidate)
    return found


def _descriptor_of(file: Any) -> set[int]:
    try:
        return {file.fileno()}
    except Exception:  # no file, or one without a descriptor
        return set()


def _spawn() -> ForkServer:
    import subprocess

    flush()
    ours, theirs = socket.socketpair()
    command = [
        sys.executable,
        *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
        "-c",
        _SPAWNED,
        str(theirs.fileno()),
        *sys.path,
    ]
    with theirs:
        try:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    _descriptors.private(ours.fileno())
    return ForkServer(ours, process)


_SPAWNED = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from asynclam._forkserver import serve_spawned; serve_spawned(int(sys.argv[1]))"
)


def _reset_in_child() -> None:
    # Handles that a child inherits are the parent's; it may start a server of its own.
    global _lock
    _lock = threading.Lock()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
atexit.register(stop)


# --- the server's side ---------------------------------------------------------------------------


def serve_spawned(descriptor: int) -> NoReturn:
    """Entry point of a spawned fork server."""
    import warnings

    # A preloaded module may start threads (BLAS does), which Python 3.12 warns of at each fork.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    try:
        os.set_inheritable(descriptor, False)
        serve(socket.socket(fileno=descriptor), preload=True)
    finally:
        os._exit(1)


def serve(master: socket.socket, *, preload: bool) -> NoReturn:
    """Runs the fork server until the master connection ends."""
    global role
    role = "fork server"
    _detach_signals()
    try:
        _Server(master, preload=preload).run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _detach_signals() -> None:
    """Handlers back to default, SIGINT ignored (Ctrl-C is the loop process's), none blocked."""
    signal.set_wakeup_fd(-1)  # inherited, it is the parent's: 3.11 would run its handlers there
    for number in range(1, signal.NSIG):  # valid_signals() makes an enum of each, in 0.1 ms
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    def __init__(self, master: socket.socket, *, preload: bool) -> None:
        self._master = master
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

    def run(self) -> NoReturn:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._wakeup.fileno():
                    self._wakeup.recv(4096)
                    self._reap()
                elif descriptor == self._master.fileno():
                    self._accept()
                elif descriptor in self._clients:
                    self._read(self._clients[descriptor])

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

    def _start(self, client: _Client, frame: _wire.Frame) -> None:
        try:
            if frame.descriptors is None:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            recipe = Recipe.loads(frame.body)
            # Before the first worker only: meanwhile no worker can be killed.
            if self._preload and not self._owners:
                _import(recipe)
            flush()
            pid = os.fork()
        except OSError as error:
            client.report(_wire.NOT_STARTED, frame.number, error.errno or 0)
        else:
            if not pid:
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
            _kill_group(pid)
            _kill_process(pid)  # a job may have left the group

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
            _kill_group(pid)  # what its jobs have spawned; the zombie still holds the number
            _, status = os.waitpid(pid, 0)
            client, number = self._owners.pop(pid, (None, 0))
            if client is not None:
                del client.workers[number]
                client.report(_wire.EXITED, number, status)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except OSError:
        pass  # it is empty


def _kill_process(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
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
        channel, page = frame.descriptors
        _descriptors.private(channel)
        marks = Marks(map_segment(page))
        os.close(page)
        begin = partial(marks.begin, recipe.slot)
        Worker(socket.socket(fileno=channel), begin).serve(recipe.initialize)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)
