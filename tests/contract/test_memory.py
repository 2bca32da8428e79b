"""SharedBuffer: memory by descriptor, and what happens to it when handles are closed."""

import errno
import gc
import os
import pickle
import subprocess
import sys
from collections import deque

import pytest

from asynclam import PayloadError, SharedBuffer, _call, _memory, _payload, _steps, _wire
from asynclam.s3._counted import CountedBuffer
from tests.jobs import mapped_segments as mapped


def travel(buffer: SharedBuffer) -> SharedBuffer:
    """To another process and back, without the process."""
    payload = _payload.dumps(buffer)
    body = b"".join(payload.parts)
    descriptors = [os.dup(descriptor) for descriptor in payload.descriptors]
    payload.close()
    return _payload.loads(bytearray(body), payload.flags, descriptors)


def test_zeros():
    """A new buffer is writable and all zeros."""
    with SharedBuffer(10) as buffer:
        assert bytes(buffer.view) == bytes(10)
        assert (buffer.nbytes, len(buffer), buffer.view.format) == (10, 10, "B")
        assert not buffer.view.readonly


def test_both_sides_see_the_same_bytes():
    """What travels is the memory, not a copy of it."""
    with SharedBuffer(4) as here, travel(here) as there:
        here.view[:] = b"abcd"
        assert bytes(there.view) == b"abcd"
        there.view[0] = 120
        assert bytes(here.view) == b"xbcd"


def test_empty():
    """A buffer of no bytes is a buffer (mmap(2) would refuse it)."""
    with SharedBuffer(0) as here, travel(here) as there:
        assert bytes(here.view) == bytes(there.view) == b""


def test_negative_length():
    """A negative length is refused before anything is created."""
    with pytest.raises(ValueError, match="-1"):
        SharedBuffer(-1)


def test_close():
    """A closed buffer gives no view and does not travel; closing twice does nothing."""
    buffer = SharedBuffer(4)
    buffer.close()
    buffer.close()
    assert buffer.closed
    for use in (lambda: buffer.view, lambda: _payload.dumps(buffer), buffer.__enter__):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_views_outlive_close():
    """A view that was taken stays valid after close(): nothing is unmapped under it."""
    buffer = SharedBuffer(4)
    view = buffer.view
    buffer.close()
    view[:] = b"abcd"
    assert bytes(view) == b"abcd"


def test_the_payload_owns_its_descriptor():
    """A buffer that is closed while its payload waits to be sent still arrives."""
    buffer = SharedBuffer(1)
    buffer.view[0] = 7
    payload = _payload.dumps(buffer)
    buffer.close()
    received = _payload.loads(bytearray(payload.parts[0]), 0, payload.descriptors)
    assert received.view[0] == 7
    assert payload.descriptors == [-1], "taken over by the received buffer"
    received.close()


def test_many_in_one_payload():
    """Several buffers keep their order, and one that occurs twice arrives as one."""
    buffers = [SharedBuffer(1) for _ in range(3)]
    for index, buffer in enumerate(buffers):
        buffer.view[0] = index
    payload = _payload.dumps([buffers[2], buffers[0], buffers[2], buffers[1]])
    assert len(payload.descriptors) == 3
    received = _payload.loads(bytearray(payload.parts[0]), 0, payload.descriptors)
    assert [buffer.view[0] for buffer in received] == [2, 0, 2, 1]
    assert received[0] is received[2]


def test_too_many_in_one_payload():
    """More buffers than descriptors can travel are refused, and none of them is left open."""
    with SharedBuffer(1) as original:
        copies = [travel(original) for _ in range(251)]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(pickle.PicklingError, match="250"):
            _payload.dumps(copies)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("in_steps", [False, True], ids=["at once", "in steps"])
def test_too_many_in_one_chunk(in_steps):
    """A chunk takes fewer, because it can be divided; one item may have as many as can travel."""

    def call(items):
        if in_steps:
            return _steps.run(_call.Call.steps(len, items, {}, flags=_wire.CHUNK | _wire.ITEMS))
        return _call.Call(len, items, {}, flags=_wire.CHUNK | _wire.ITEMS)

    with SharedBuffer(1) as original:
        copies = [travel(original) for _ in range(65)]
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(PayloadError, match="65 SharedBuffers in a chunk"):
            call(copies)
        assert len(os.listdir("/proc/self/fd")) == before
        for items in (copies[1:], [copies]):
            accepted = call(items)
            assert len(accepted.descriptors) >= 64
            accepted.close()


def test_plain_pickle_is_refused():
    """A buffer is a descriptor: pickling it for anything but a worker says what to do instead."""
    with SharedBuffer(1) as buffer, pytest.raises(pickle.PicklingError, match="run_cpu"):
        pickle.dumps(buffer)


def test_lost_descriptor():
    """A buffer whose descriptor could not be received is an error that names the limit."""
    with SharedBuffer(1) as buffer:
        payload = _payload.dumps(buffer)
        payload.close()
        with pytest.raises(OSError, match="limit of open descriptors"):
            _payload.loads(bytearray(payload.parts[0]), 0, None)


@pytest.fixture
def segments(monkeypatch):
    """Says which way of making segments to use, as the environment would."""

    def use(way):
        monkeypatch.setenv("ASYNCLAM_SEGMENTS", way)
        _memory._forget()

    yield use
    monkeypatch.undo()
    _memory._forget()


@pytest.mark.parametrize("way", ["memfd", "syscall", "file", "stream", ""])
def test_every_way(way, segments, tmp_path, monkeypatch):
    """Whichever way a segment is made, both sides see it, and no directory names it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    segments(way)
    with SharedBuffer(100_000) as here, travel(here) as there:
        here.view[99_999] = 1
        assert there.view[99_999] == 1
        assert list(tmp_path.iterdir()) == []
        assert not os.get_inheritable(here._descriptor)
    assert _memory.are_payloads_streamed() == (way == "stream")


def test_an_unknown_way(segments):
    """A value that means nothing is refused, with those that do."""
    segments("shm")
    for use in (lambda: SharedBuffer(1), _memory.are_payloads_streamed):
        with pytest.raises(ValueError, match="shm is none of memfd, syscall, file, stream"):
            use()


def test_the_first_way_that_works(segments, monkeypatch):
    """What the system refuses is passed over, once; the file is the last way."""
    segments("")
    tried = []

    def refuse(nbytes):
        tried.append(nbytes)
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setitem(_memory._WAYS, "memfd", refuse)
    monkeypatch.setitem(_memory._WAYS, "syscall", refuse)
    for _ in range(2):
        with SharedBuffer(1) as buffer:
            assert os.readlink(f"/proc/self/fd/{buffer._descriptor}").endswith("(deleted)")
    assert tried == [1, 1], "of the second buffer none was tried"


def test_running_out_is_no_reason_for_another_way(segments, monkeypatch):
    """At the limit of descriptors the error is that one, and nothing is chosen for good."""
    segments("")

    def run_out(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", run_out)
        with pytest.raises(OSError, match="Too many open files"):
            SharedBuffer(1)
    SharedBuffer(1).close()
    assert _memory._chosen is _memory._memfd


def test_a_python_without_the_function(segments, monkeypatch):
    """Where os.memfd_create is missing, the system call is made through ctypes."""
    segments("")
    monkeypatch.delattr(os, "memfd_create")
    SharedBuffer(1).close()
    assert _memory._chosen is _memory._syscall


def test_a_full_disk(segments):
    """A file that the disk has no room for is an OSError at once, not a signal at the first write."""
    segments("file")
    code = (
        "import os, resource, signal, sys\n"
        "from asynclam import SharedBuffer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "before = os.listdir('/proc/self/fd')\n"
        "try: SharedBuffer(2 << 20)\n"
        "except OSError: print(len(os.listdir('/proc/self/fd')) - len(before))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "0\n"


@pytest.mark.parametrize("has_such", [True, False])
def test_a_file_has_no_name(segments, tmp_path, monkeypatch, has_such):
    """Never where the system has such files; else it is unlinked at once."""
    segments("file")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if has_such:
        monkeypatch.setattr("tempfile.mkstemp", pytest.fail)
    else:
        monkeypatch.delattr(os, "O_TMPFILE")
    with SharedBuffer(1) as buffer:
        path = os.readlink(f"/proc/self/fd/{buffer._descriptor}")
    assert (path.startswith(str(tmp_path)), path.endswith(" (deleted)")) == (True, True)
    assert not os.listdir(tmp_path)


def test_blocks_are_reserved(segments, tmp_path, monkeypatch):
    """The blocks of a file are its own before it is mapped; if there are none, nothing is left."""
    segments("file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with SharedBuffer(1 << 20) as buffer:
        assert os.fstat(buffer._descriptor).st_blocks * 512 >= 1 << 20

    def full(descriptor, offset, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        SharedBuffer(1)
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_read_anew_after_a_fork(segments):
    """A worker has the environment of the loop process, not the choice of who forked it."""
    segments("file")
    SharedBuffer(1).close()
    pid = os.fork()
    if not pid:
        os.environ["ASYNCLAM_SEGMENTS"] = "memfd"
        SharedBuffer(1).close()
        os._exit(_memory._chosen is _memory._memfd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


# --- how maps end --------------------------------------------------------------------------------


@pytest.fixture
def in_thread():
    """Large maps end in a thread; calling it waits until that has ended."""
    _memory.drop_in_thread()

    def wait():
        with _memory._dropping:
            pass

    yield wait
    _memory.drop_in_place()


@pytest.mark.parametrize("nbytes", [1, 1 << 22])
def test_a_map_ends_with_its_last_view(nbytes, in_thread):
    """In the thread or in place, the memory is gone once nothing looks into it, and not before."""
    before = mapped()
    descriptor = _memory.create_segment(nbytes)
    view = _memory.map_segment(descriptor)
    os.close(descriptor)
    part = view[:1]
    del view
    in_thread()
    part[0] = 1
    assert mapped() == before + 1
    del part
    in_thread()
    assert mapped() == before
    assert not _memory._dropped


def test_large_maps_end_elsewhere(in_thread, monkeypatch):
    """A large map is handed over where its last view is dropped; a small one is not worth it."""
    started = []
    monkeypatch.setattr(_memory._thread, "start_new_thread", lambda *a: started.append(a))
    SharedBuffer(1 << 16).view[0] = 1
    assert not started
    for _ in range(3):
        SharedBuffer(1 << 22).view[0] = 1
    assert len(started) == 1, "one thread, however many maps wait for it"
    assert len(_memory._dropped) == 3
    run, args = started[0]
    run(*args)
    assert not _memory._dropped


@pytest.mark.parametrize("nbytes", [1 << 16, 1 << 22])
@pytest.mark.parametrize("counted", [False, True])
def test_memory_that_is_not_mapped_ends_elsewhere(in_thread, monkeypatch, nbytes, counted):
    """Its last close frees it, which takes as long; what waits for its end waits for that, too."""
    started, closed, close = [], [], os.close
    monkeypatch.setattr(_memory._thread, "start_new_thread", lambda *a: started.append(a))
    buffer = CountedBuffer(nbytes) if counted else SharedBuffer(nbytes)
    monkeypatch.setattr(_memory.os, "close", lambda number: (closed.append(number), close(number)))
    descriptor = buffer._descriptor
    buffer.close()
    assert buffer.closed
    if nbytes > 1 << 20:
        assert not closed
        ((run, args),) = started
        started.clear()
        run(*args)
    assert not started
    assert closed[0] == descriptor
    if counted:
        assert os.read(buffer.reader, 1) == b"", "its pipe was closed"
        assert len(closed) == 2, "after it"
        close(buffer.reader)


@pytest.mark.parametrize("nbytes", [1 << 16, 1 << 22])
@pytest.mark.parametrize("how", ["in place", "in the thread"])
def test_the_companion_of_a_map(how, nbytes, request):
    """It ends after the map has, so whoever waits for it finds the memory free."""
    if how == "in the thread":
        request.getfixturevalue("in_thread")
    before, found = mapped(), []

    class Companion:
        def __del__(self):
            found.append(mapped())

    descriptor = _memory.create_segment(nbytes)
    segment = _memory.map_descriptor(descriptor, nbytes)
    os.close(descriptor)
    segment.companion = Companion()
    assert mapped() == before + 1
    del segment
    with _memory._dropping:  # by the thread, if there is one
        assert found == [before]


@pytest.mark.parametrize("nbytes", [1 << 16, 1 << 22])
@pytest.mark.parametrize("how", ["in place", "in the thread"])
def test_a_counted_map_in_a_cycle(how, nbytes, request):
    """The collector finalises it while a view looks into it: it ends with the view, and so does its pipe."""
    if how == "in the thread":
        request.getfixturevalue("in_thread")
    before = mapped()
    buffer = CountedBuffer(nbytes)
    reader = buffer.reader
    cycle = [buffer.view]
    cycle.append(cycle)
    del buffer
    assert mapped() == before + 1
    del cycle
    gc.collect()
    with _memory._dropping:  # by the thread, if there is one
        assert mapped() == before
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_no_thread_is_to_be_had(in_thread, monkeypatch):
    """At the end of the interpreter, a map ends in place."""

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_memory._thread, "start_new_thread", refuse)
    before = mapped()
    SharedBuffer(1 << 22).view[0] = 1
    assert mapped() == before


def test_a_map_that_could_not_be_made(in_thread):
    """It has no length to be asked for when it dies: the error is told, and nothing else is."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        _memory.map_descriptor(1 << 20, 1 << 20)


def test_maps_cost_no_descriptor():
    """From Python 3.13 a view of a segment needs no descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    descriptor = _memory.create_segment(1)
    view = _memory.map_segment(descriptor)
    os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) - before == (sys.version_info < (3, 13))
    view[0] = 1


# --- blank objects -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize("nbytes", [2, 5000, 33 << 20])
def test_blank_objects(kind, nbytes):
    """A blank object that was filled is one like any other."""
    blank, view = _memory.blank(kind, nbytes)
    view[:] = b"ab" * (nbytes // 2)
    del view
    assert type(blank) is kind
    assert blank == kind(b"ab" * (nbytes // 2))
    if kind is bytearray:
        blank.append(1)
    plain = kind(bytearray(b"abc"))
    assert sys.getrefcount(blank) == sys.getrefcount(plain)


def test_failed_segment_leaves_nothing(monkeypatch):
    """If the memory cannot be had the descriptor is closed."""

    def full(descriptor, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_memory.os, "ftruncate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        SharedBuffer(1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_repr():
    """The repr is a status line."""
    buffer = SharedBuffer(1_000_000)
    assert repr(buffer) == "<SharedBuffer [1,000,000 bytes]>"
    buffer.close()
    assert repr(buffer) == "<SharedBuffer [1,000,000 bytes, closed]>"


# --- ways that are not there ---------------------------------------------------------------------


def test_a_machine_whose_system_calls_are_not_known(monkeypatch):
    """There the call cannot be made without its number, and the next way is tried."""
    monkeypatch.setattr(_memory, "_SYSCALLS", {})
    with pytest.raises(OSError, match="not known here") as caught:
        _memory._syscall(1)
    assert caught.value.errno in _memory._IMPOSSIBLE


def test_a_python_without_ctypes(monkeypatch):
    """There the next way is tried."""
    monkeypatch.setitem(sys.modules, "ctypes", None)
    with pytest.raises(OSError, match="no ctypes") as caught:
        _memory._syscall(1)
    assert caught.value.errno in _memory._IMPOSSIBLE


def test_a_system_call_that_fails(monkeypatch):
    """Its error is the one of the kernel."""
    monkeypatch.setattr(_memory, "_SYSCALLS", dict.fromkeys(_memory._SYSCALLS, -1))
    with pytest.raises(OSError, match="memfd_create: ") as caught:
        _memory._syscall(1)
    assert caught.value.errno == errno.ENOSYS


def test_a_system_without_huge_pages(monkeypatch):
    """Large blank objects are made without that advice."""
    monkeypatch.delattr(_memory.mmap, "MADV_HUGEPAGE")
    blank, view = _memory.blank(bytearray, _memory._OWN_MAPPING)
    view[-1] = 1
    assert blank[-1] == 1
    del view


def test_reading_behind_the_end():
    """A buffer that has less than is wanted says so, instead of waiting for more."""
    with SharedBuffer(4) as buffer, pytest.raises(EOFError, match="before byte 6"):
        _memory.read_at(buffer, 2, memoryview(bytearray(4)))


def test_a_map_that_dies_when_none_are_dropped_in_a_thread_any_more(in_thread):
    """It dies in place, and leaves no thread behind."""
    _memory.drop_in_place()
    _memory._drop(object())
    assert _memory._dropped is None
    assert not _memory._dropping.locked()


class ArrivesLate(deque):
    """What is given to the thread between its last look and its end."""

    def __bool__(self):
        if not len(self) and not _memory._dropping.locked() and self.late:
            self.append(self.late.pop())
        return len(self) > 0


def test_what_arrives_after_the_last_look(in_thread):
    """The thread that is about to end takes it, for nobody else has been started."""
    dropped = ArrivesLate()
    dropped.late = ["late"]
    assert _memory._dropping.acquire(blocking=False)
    _memory._drop_all(dropped)
    assert not dropped.late
    assert not len(dropped)
    assert not _memory._dropping.locked()
