"""The loop process's handle of its fork server, and the two ways to start one.

A server is shared by all executors of the process; what it does is told in :mod:`._server`. A
connection to a pool is made by sending one end of a socketpair over the master, whose end of file
ends the server and all of its workers.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from . import _descriptors, _server
from ._life import Life
from ._worker import flush

if TYPE_CHECKING:
    import subprocess
    from typing import Literal

    StartMethod = Literal["auto", "fork", "spawn"]


class ForkServer:
    """The loop process's handle of its fork server.

    Args:
        master: the connection whose end of file ends it.
        life: of which it has the other end.
        process: its pid if it was forked from this process.
    """

    def __init__(
        self, master: socket.socket, life: Life, process: int | subprocess.Popen[bytes]
    ) -> None:
        self._master = master
        self._life = life
        self._process = process
        self._owner = os.getpid()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process if isinstance(self._process, int) else self._process.pid

    @property
    def forked(self) -> bool:
        """Whether it was forked from this process, and so knows its modules."""
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
        self._life.end()

    def failure(self) -> OSError | None:
        """Why there was no server, if what was spawned has exited by itself."""
        status = None if isinstance(self._process, int) else self._process.returncode
        if status is None or status < 0:  # a signal's, which says nothing of what was spawned
            return None
        return OSError(
            errno.ENOEXEC,
            f"the spawned fork server has exited with status {status}, for which the import of the "
            "job's module may be the reason",
            interpreter(),
        )

    def _reap(self) -> None:
        if not isinstance(self._process, int):
            self._process.wait()
            return
        try:
            os.waitpid(self._process, 0)
        except ChildProcessError:
            pass  # a waitpid(-1) of somebody else was quicker


_PATIENCE = 1000  # ms in which a server kills and reaps its workers; it takes some 2


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
    if _server.role == "fork server":
        raise RuntimeError(
            "a job was submitted while a module was imported in the fork server; submit it in a "
            "function that the program calls, not at the top level of a module"
        )
    with _lock:
        method = _resolved(method)
        server = _servers.get(method)
        if server is None:
            server = _servers[method] = _start(_fork if method == "fork" else _spawn)
        return server


def shares_main(method: StartMethod) -> bool:
    """Whether workers know the ``__main__`` of this process, now or once they are started.

    In a REPL or a notebook a name is defined again and again, so they do not count as knowing it.
    """
    return _resolved(method) == "fork" and hasattr(sys.modules.get("__main__"), "__file__")


def discard(server: ForkServer) -> OSError | None:
    """Forgets a server that has died; the next :func:`ensure` starts another.

    Loops in several threads may see the death at once. Who takes the server off the list ends it; the
    others need not wait for that. A lock held meanwhile might be met by a signal handler.

    Returns:
        why there was no server, if there was none.
    """
    with _lock:
        methods = [method for method, known in _servers.items() if known is server]
        for method in methods:
            del _servers[method]
    if methods:
        server.stop()
    return server.failure()


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
    return threads == 1 and resident < _MOST_RESIDENT and _free_descriptors() > _MOST_TAKEN


_MOST_TAKEN = 0.5  # part of the descriptors that a forked server may inherit, if it may be spawned
_LEAST_FREE = 0.1  # part of the descriptors without which a forked server could not work


def _free_descriptors() -> float:
    """Which part of the descriptors that this process may have is free.

    The numbers that a forked server inherits stay taken in all of its workers.
    """
    # The soft limit, -1 for none; the resource module costs an import.
    most = os.sysconf("SC_OPEN_MAX")
    if most < 0:
        return 1.0
    return 1 - len(_descriptors.open_descriptors()) / most


def _start(start: Callable[[socket.socket, int], int | subprocess.Popen[bytes]]) -> ForkServer:
    """Starts a server with its ends of the master connection and of a life pipe."""
    flush()
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            life = Life()
            try:
                process = start(theirs, life.given)
            finally:
                life.handed_over()
        except BaseException:
            ours.close()
            raise
    _descriptors.private(ours.fileno())
    return ForkServer(ours, life, process)


def _fork(master: socket.socket, life: int) -> int:
    if _free_descriptors() < _LEAST_FREE:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    # A signal between the fork and the reset of the handlers would run the parent's in the child.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    parent = os.getpid()
    try:
        pid = os.fork()
        if not pid:  # pragma: no cover - the child goes on in a frame that coverage has left
            _in_child(master, life, parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _in_child(master: socket.socket, life: int, parent: int) -> NoReturn:
    try:
        os.setsid()
        _descriptors.replace_inherited({master.fileno(), life, *_output_descriptors()})
        _forget_parent()
        _server.serve(master, life, parent, preload=False)
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


def interpreter() -> str:
    """What is spawned, by its path: in a frozen or embedded program it may be no interpreter."""
    return sys.executable or ""


def _spawn(master: socket.socket, life: int) -> subprocess.Popen[bytes]:
    import subprocess

    if not interpreter() or getattr(sys, "frozen", False):  # else it would be the program again
        raise OSError(
            errno.ENOEXEC,
            "sys.executable is no Python interpreter, so the fork server must be forked, not spawned",
            interpreter(),
        )
    descriptors = master.fileno(), life
    command = [
        interpreter(),
        *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
        "-c",
        _SPAWNED,
        *map(str, (*descriptors, os.getpid())),
        *sys.path,
    ]
    return subprocess.Popen(
        command, pass_fds=descriptors, stdin=subprocess.DEVNULL, start_new_session=True
    )


_SPAWNED = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from asynclam._server import serve_spawned; serve_spawned(*map(int, sys.argv[1:4]))"
)


def _reset_in_child() -> None:
    # Handles that a child inherits are the parent's; it may start a server of its own.
    global _lock
    _lock = threading.Lock()
    _servers.clear()


os.register_at_fork(after_in_child=_reset_in_child)
atexit.register(stop)
