"""No orphans: however a program ends, so do its fork server, its workers, and what these spawned."""

import asyncio
import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import asynclam
from asynclam import Executor, WorkerDiedError, _forkserver
from tests import jobs
from tests.parts.gate import pass_through
from tests.parts.processes import ended

ROOT = Path(asynclam.__file__).parent.parent
PATIENCE = 30_000  # ms for what takes some 10, on a machine that is busy with something else
ROLES = ("worker", "leaver", "waiter", *3 * ("spawned",), "server", "loop")


def command(*arguments):
    return [sys.executable, "-m", "tests.parts.doomed", *arguments]


class Doomed:
    """A program of tests/parts/doomed.py: who is who in it, and who is left of it."""

    def __init__(self, output, given, sibling=""):
        self._output = output
        self._input = given
        self._watched = []  # role, pid, descriptor
        for _ in (*ROLES, *filter(None, [sibling])):
            role, number = output.readline().split()
            self._watched.append((role.decode(), int(number), os.pidfd_open(int(number))))

    def kill(self, *roles, number=signal.SIGKILL):
        for role, pid, _ in self._watched:
            if role in roles:
                os.kill(pid, number)

    def wait(self, role):
        for other, _, descriptor in self._watched:
            if other == role:
                assert _has_ended(descriptor, PATIENCE)

    def tell(self, order):
        self._input.write(order)

    def survivors(self, *expected):
        """Who lives once all but the ``expected`` have ended, or patience has."""
        waited = [watched for watched in self._watched if watched[0] not in expected]
        late = [role for role, _, descriptor in waited if not _has_ended(descriptor, PATIENCE)]
        rest = [watched for watched in self._watched if watched[0] in expected]
        return late + [role for role, _, descriptor in rest if not _has_ended(descriptor, 0)]

    def said(self):
        """What it has printed since."""
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open
            while more := self._output.read(1 << 16):
                said += more
        return said.decode()

    def hang_up(self):
        self._input.close()

    def close(self):
        for _, _, descriptor in self._watched:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)


def _has_ended(descriptor, patience):
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(patience))


@pytest.fixture
def start():
    """Starts a program whose input and output are pipes."""
    with contextlib.ExitStack() as stack:

        def start(method, sibling="", **environment):
            process = subprocess.Popen(
                command(method, sibling),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
                cwd=ROOT, env={**os.environ, **environment},
            )  # fmt: skip
            stack.enter_context(process)
            doomed = Doomed(process.stdout, process.stdin, sibling)
            stack.callback(doomed.close)
            return doomed

        yield start


@pytest.fixture
def in_terminal():
    """A program in a terminal of its own."""
    pid, terminal = pty.fork()
    if not pid:
        try:
            os.chdir(ROOT)
            colourless = {**os.environ, "PYTHON_COLORS": "0"}
            os.execve(sys.executable, command("fork"), colourless)
        finally:
            os._exit(3)
    with contextlib.ExitStack() as stack:
        stack.callback(os.waitpid, pid, 0)
        file = stack.enter_context(open(terminal, "r+b", buffering=0))
        doomed = Doomed(file, file)
        stack.callback(doomed.close)
        yield doomed


def by_signal(number):
    return lambda doomed: doomed.kill("loop", number=number)


def with_server(doomed):
    doomed.kill("server", "loop")


def while_stopped(doomed):
    doomed.kill("worker", "leaver", "waiter", "server", number=signal.SIGSTOP)
    doomed.kill("loop")


def by_itself(doomed):
    doomed.tell(b"os._exit")


def normally(doomed):
    doomed.tell(b"return")


ENDS = {
    "SIGKILL": by_signal(signal.SIGKILL),
    "SIGTERM": by_signal(signal.SIGTERM),
    "SIGKILL with the fork server": with_server,
    "SIGKILL, the others stopped": while_stopped,
    "os._exit": by_itself,
    "exit": normally,
}


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("end", ENDS)
def test_the_end_of_a_program(start, method, end):
    """However it ends, it leaves nobody behind: no worker in a C call or a coroutine, nor what one spawned."""
    doomed = start(method)
    ENDS[end](doomed)
    assert not doomed.survivors()


@pytest.mark.parametrize("kind", ["fork", "multiprocessing", "C"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_sibling_lives_on(start, method, kind):
    """A process that other code has forked keeps nobody alive, whatever descriptors it has inherited."""
    doomed = start(method, kind)
    doomed.kill("loop")
    assert doomed.survivors("sibling") == ["sibling"]


@pytest.mark.parametrize("kind", ["fork", "multiprocessing"])
def test_a_sibling_lives_on_and_the_fork_server_is_dead(start, kind):
    """Nor does it keep workers alive whose fork server was killed."""
    doomed = start("fork", kind)
    doomed.kill("server", "loop")
    assert doomed.survivors("sibling") == ["sibling"]


def test_a_sibling_where_pidfds_are_forbidden(start):
    """The fork server looks for its parent when it wakes, here for a worker that has died."""
    doomed = start("fork", "C", DOOMED_WITHOUT="pidfd")
    doomed.kill("loop")
    doomed.wait("loop")  # it dies when it is scheduled: the fork server might find it alive
    doomed.kill("worker")
    assert doomed.survivors("sibling") == ["sibling"]


@pytest.mark.parametrize("end", ["SIGKILL", "os._exit", "exit"])
def test_where_signals_at_end_of_file_are_forbidden(start, end):
    """The fork server, which nobody has killed, ends everybody."""
    doomed = start("fork", DOOMED_WITHOUT="F_SETSIG")
    ENDS[end](doomed)
    assert not doomed.survivors()


@pytest.mark.parametrize("bound", [True, False])
async def test_cancelled_when_the_fork_server_is_dead(monkeypatch, gate, bound):
    """The worker of a cancelled job ends, by its life pipe or where that is forbidden by a signal."""
    if not bound:
        monkeypatch.delattr("fcntl.F_SETSIG")
    executor = Executor(1, start_method="fork")
    task = asyncio.ensure_future(executor.run_cpu(hold, gate.path))
    worker = await gate.entered()
    os.kill(_forkserver.ensure("fork").pid, signal.SIGKILL)
    while executor._pool._control is not None:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await ended(worker)
    await executor.aclose()


async def test_a_death_when_the_fork_server_is_dead(gate):
    """What the jobs of the worker had spawned ends with it."""
    async with Executor(1, start_method="fork") as executor:
        spawned = await executor.run_cpu(jobs.spawn_forever)
        task = asyncio.ensure_future(executor.run_cpu(hold, gate.path))
        worker = await gate.entered()
        os.kill(_forkserver.ensure("fork").pid, signal.SIGKILL)
        while executor._pool._control is not None:
            await asyncio.sleep(0)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            await task
        await ended(spawned)


async def test_cancelled_while_the_fork_server_is_stopped(gate):
    """The worker of a cancelled job ends at once, not when the fork server goes on."""
    async with Executor(1, start_method="fork") as executor:
        task = asyncio.ensure_future(executor.run_cpu(hold, gate.path))
        worker = await gate.entered()
        server = _forkserver.ensure("fork").pid
        os.kill(server, signal.SIGSTOP)
        try:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await ended(worker)
        finally:
            os.kill(server, signal.SIGCONT)
        assert await executor.run_cpu(os.getpid) != worker


def hold(path):
    return pass_through(path)


@pytest.mark.outside  # a box has no terminals
def test_ctrl_c(in_terminal):
    """Ctrl-C interrupts the program, not its workers, and everybody ends with it."""
    in_terminal.tell(b"\x03")
    assert not in_terminal.survivors()
    said = in_terminal.said()
    assert said.count("\nKeyboardInterrupt") == 1, said


@pytest.mark.outside  # a box has no terminals
def test_the_terminal_is_closed(in_terminal):
    """The end of the terminal ends the program, and everybody with it."""
    in_terminal.hang_up()
    assert not in_terminal.survivors()


@pytest.mark.parametrize("ways", ["file", "memfd"])
def test_no_file_is_left(start, tmp_path, ways):
    """Temporary files have no name while they are used, so a killed program leaves none."""
    doomed = start("fork", TMPDIR=str(tmp_path), ASYNCLAM_SEGMENTS=ways)
    doomed.kill("loop", "server")
    assert not doomed.survivors()
    assert not list(tmp_path.iterdir())
