"""The fork server, one frame at a time, in this process; and how it ends where it cannot begin."""

import errno
import os
import select
import signal
import socket
import sys
import threading

import pytest

from asynclam import _descriptors, _forkserver, _recipe, _server, _wire
from tests.parts.processes import in_child


class Played:
    """A fork server of this process, and the other ends of its connections."""

    def __init__(self):
        self.master, theirs = socket.socketpair()
        self.server = _server._Server(theirs, os.getppid(), preload=True)
        self.theirs = theirs
        self.control, control = socket.socketpair()
        with control:
            _descriptors.send(self.master, [b"\0"], [control.fileno()])
        self.server._accept()
        (self.client,) = self.server._clients.values()

    def send(self, kind, number):
        self.control.sendall(b"".join(_wire.encode(kind, number)))
        self.server._read(self.client)

    def reports(self):
        """Kinds, numbers and values of the reports that have come."""
        decoder, found = _wire.Decoder(), []
        while True:
            try:
                nbytes = self.control.recv_into(decoder.buffer(), 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            found += [
                (frame.kind, frame.number, int.from_bytes(frame.body, "little", signed=True))
                for frame in decoder.received(nbytes)
            ]

    def close(self):
        for client in list(self.server._clients.values()):
            self.server._drop(client)
        for sock in (self.master, self.theirs, self.control, self.server._wakeup):
            _descriptors.unmark(sock.fileno())
            sock.close()
        for descriptor in (signal.set_wakeup_fd(-1), self.server._parent_watch):
            _descriptors.unmark(descriptor)
            os.close(descriptor)


@pytest.fixture
def played():
    wakeup, handler = signal.set_wakeup_fd(-1), signal.getsignal(signal.SIGCHLD)
    played = Played()
    yield played
    played.close()
    signal.signal(signal.SIGCHLD, handler)
    signal.set_wakeup_fd(wakeup)


# --- what it is told -----------------------------------------------------------------------------


def test_a_connection_whose_descriptor_was_lost(played):
    """It is nobody's: who has sent it reads end of file, and the others are served."""
    played.master.sendall(b"\0")
    played.server._accept()
    assert list(played.server._clients.values()) == [played.client]


def test_nothing_has_come(played):
    """A connection that is read for nothing stays."""
    played.server._read(played.client)
    assert played.client in played.server._clients.values()


def test_a_connection_that_is_reset(played):
    """It has ended as by its end of file: its pool is gone."""
    played.client.report(_wire.EXITED, 1, 0)
    played.control.close()  # with the report unread
    played.server._read(played.client)
    assert not played.server._clients


def test_a_start_whose_descriptors_were_lost(played):
    """It is told as the limit of descriptors that it is."""
    frame = _wire.decode(b"".join(_wire.encode(_wire.START, 7)), [])
    frame.descriptors = None
    played.server._start(played.client, frame)
    assert played.reports() == [(_wire.NOT_STARTED, 7, errno.EMFILE)]


def test_signals_for_a_worker_that_is_gone(played):
    """They reach nobody, whatever process has its pid now; a frame of no meaning is passed over."""
    for kind in (_wire.KILL, _wire.INTERRUPT, _wire.RECORD):
        played.send(kind, 7)
    assert played.reports() == []
    assert played.client in played.server._clients.values()


def test_a_child_that_is_no_worker(played):
    """What a preloaded module has forked is reaped, and told to nobody."""
    read_end, write_end = os.pipe()
    worker = os.fork()
    if not worker:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(3)
    stranger = os.fork()
    if not stranger:
        os._exit(0)
    os.waitid(os.P_PID, stranger, os.WEXITED | os.WNOWAIT)
    played.client.workers[7] = worker
    played.server._owners[worker] = played.client, 7
    played.server._reap()
    assert played.reports() == []
    with pytest.raises(ChildProcessError):
        os.waitpid(stranger, 0)
    os.close(write_end)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    played.server._reap()
    assert played.reports() == [(_wire.EXITED, 7, 3 << 8)]
    os.close(read_end)


def test_a_process_that_is_gone():
    """To signal it, or to make it lead a group, does nothing."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    _server._signal_process(pid, signal.SIGKILL)
    _server._signal_process(None, signal.SIGKILL)
    _server._set_group(pid)


def test_a_preloaded_module_that_fails(monkeypatch, tmp_path):
    """The server lives: a worker meets the error again, and tells it."""
    (tmp_path / "tests_failing.py").write_text("raise SystemExit('at import')")
    monkeypatch.syspath_prepend(tmp_path)
    _server._import(_recipe.Recipe(0, b"", ("tests_failing",)))
    assert "tests_failing" not in sys.modules


# --- where it cannot begin -----------------------------------------------------------------------


def test_a_server_that_cannot_begin(capfd):
    """It says why, and never returns into the frames of the process that it was forked from."""
    closed = socket.socket()
    closed.close()
    read_end, write_end = os.pipe()

    def serve():
        _server.serve(closed, read_end, os.getppid(), preload=False)

    assert in_child(serve) == 1
    assert "ValueError" in capfd.readouterr().err
    assert in_child(_server.serve_spawned, -1, -1, 0) == 1
    os.close(read_end)
    os.close(write_end)


def test_a_worker_that_cannot_begin(capfd):
    """It says why, and never returns into the frames of the fork server."""
    frame = _wire.decode(b"".join(_wire.encode(_wire.START, 7)), [])
    assert in_child(_server._become_worker, _recipe.Recipe(0, b"", ()), frame) == 1
    assert "AssertionError" in capfd.readouterr().err


def test_a_forked_server_that_cannot_begin(monkeypatch, capfd):
    """It says why; who connects finds it gone."""
    monkeypatch.setattr(_descriptors, "replace_inherited", lambda keep: 1 / 0)
    server = _forkserver._start(_forkserver._fork)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        server.connect()
    server.stop()
    assert "ZeroDivisionError" in capfd.readouterr().err


# --- the handle of it ----------------------------------------------------------------------------


def test_stopping_twice():
    """The second time does nothing, nor does it in a process that has inherited the handle."""
    server = _forkserver._start(_forkserver._fork)

    def stop_and_end():
        server.stop()
        os._exit(7)

    assert in_child(stop_and_end) == 7
    connection = server.connect()  # it lives
    _descriptors.unmark(connection.fileno())
    connection.close()
    server.stop()
    server.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_server_that_somebody_else_has_reaped():
    """A program that reaps all of its children does no harm."""
    server = _forkserver._start(_forkserver._fork)
    os.kill(server.pid, signal.SIGKILL)
    os.waitpid(server.pid, 0)
    server.stop()


def test_one_of_two_servers_is_discarded():
    """The other one stays."""
    forked, spawned = _forkserver.ensure("fork"), _forkserver.ensure("spawn")
    _forkserver.discard(forked)
    assert _forkserver.ensure("auto") is spawned


def test_two_loops_discard_one_server(monkeypatch):
    """Both have seen its death at once: one ends it, and the other goes on."""
    server = _forkserver.ensure("fork")
    connections = []

    def discarded_elsewhere():
        monkeypatch.undo()
        thread = threading.Thread(target=_forkserver.discard, args=(server,))
        thread.start()
        thread.join()
        connections.append(server._master.fileno())
        return select.poll()

    monkeypatch.setattr(select, "poll", discarded_elsewhere)
    _forkserver.discard(server)
    assert connections[0] >= 0, "it is still being ended here"
    assert server._master.fileno() < 0
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_job_at_the_top_level_of_a_module(monkeypatch):
    """A module that runs jobs when it is imported is told so, where the fork server imports it."""
    monkeypatch.setattr(_server, "role", "fork server")
    with pytest.raises(RuntimeError, match="not at the top level of a module"):
        _forkserver.ensure("auto")


def test_a_system_without_proc(monkeypatch):
    """Whether a fork is safe cannot be told there, so it is not."""

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "listdir", missing)
    assert not _forkserver.can_fork()


def test_no_limit_of_descriptors(monkeypatch):
    """However many are open, all are free."""
    monkeypatch.setattr(os, "sysconf", lambda name: -1)
    assert _forkserver._free_descriptors() == 1.0


def test_a_process_without_asyncio(monkeypatch):
    """There is no running loop to forget, and asyncio is not imported for it."""
    monkeypatch.delitem(sys.modules, "asyncio")
    _forkserver._forget_parent()
    assert "asyncio" not in sys.modules
