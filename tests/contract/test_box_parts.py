"""The parts of the box that need no box: its control groups, and what it makes of a function's end."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from asynclam._box import box, cgroup, files, invocations, kernel
from asynclam._box.__main__ import main
from tests.parts.processes import in_child


@pytest.fixture
def version_1(tmp_path):
    """A process's directory in procfs, on a machine that has a hierarchy for each controller."""
    lines = []
    for controller in ("cpu", "memory"):
        (tmp_path / controller / "user").mkdir(parents=True)
        lines.append(f"30 23 0:26 / {tmp_path}/{controller} rw - cgroup cgroup rw,{controller}\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "mountinfo").write_text("".join(lines))
    (tmp_path / "proc" / "cgroup").write_text("4:cpu,cpuacct:/user\n3:memory:/user\n")
    return tmp_path


def test_version_1(version_1):
    """The group is made in each hierarchy, below the box's own group, and limits are set there."""
    for controllers, parents in cgroup._places(str(version_1 / "proc")):
        (controller,) = controllers
        made = cgroup._first(parents, "box", controllers)
        assert made == version_1 / controller / "user" / "box"
        for name in ("cpu.cfs_period_us", "cpu.cfs_quota_us", "memory.limit_in_bytes"):
            (made / name).touch()  # as the kernel does
        cgroup._set(made, controller, 884)
    cpu, memory = (version_1 / name / "user" / "box" for name in ("cpu", "memory"))
    assert (cpu / "cpu.cfs_period_us").read_text() == "20000"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "9994"
    assert (memory / "memory.limit_in_bytes").read_text() == str(884 << 20)


def test_what_was_made_before_a_refusal(version_1):
    """It is removed again, and the complaint names the file that could not be written."""
    complaints = []
    group = cgroup.Group.of(512, complaints.append, str(version_1 / "proc"))
    group.remove()
    (complaint,) = complaints
    assert "No such file or directory" in complaint
    assert "cpu.cfs_period_us" in complaint
    assert not list((version_1 / "cpu" / "user").iterdir())


def test_a_limit_that_the_kernel_refuses(tmp_path):
    """The error names the file."""
    with pytest.raises(OSError, match="/dev/full"):
        cgroup._write(cgroup.Path("/dev/full"), "1")


def test_a_complaint_that_is_no_text(capfdbinary):
    """It is told all the same, be it about a path's bytes or by a function."""
    box.complain(os.fsdecode(b"caf\xe9") + " \ud800")
    assert capfdbinary.readouterr().err == b"box: caf\\udce9 \\ud800\n"


def test_entering_and_removing(tmp_path):
    """Processes move in by writing 0; the sweeper removes the group when the box has closed it."""
    (tmp_path / "group").mkdir()
    procs = tmp_path / "group" / "cgroup.procs"
    procs.touch()
    group = cgroup.Group([tmp_path / "group"])
    group.enter()
    assert procs.read_text() == "0"
    group._watch()
    procs.unlink()
    group.remove()
    assert not (tmp_path / "group").exists()
    group.remove()


def test_the_process_group_of_the_sweeper(tmp_path):
    """It is its own, before there is anything to sweep up: a kill of the box's does not reach it."""
    group = cgroup.Group([tmp_path / "none"])
    group._watch()
    sweeper, _ = group._sweeper
    try:
        assert os.getpgid(sweeper) == sweeper
    finally:
        group.remove()


def test_a_group_that_does_not_become_empty(tmp_path, monkeypatch):
    """The sweeper gives up on it after a while."""
    (tmp_path / "process").touch()
    deadlines = iter([0.0, 0.0, cgroup._SECONDS_TO_SWEEP + 1])
    monkeypatch.setattr(cgroup.time, "monotonic", lambda: next(deadlines))
    cgroup._sweep([tmp_path])
    assert tmp_path.exists()


def test_no_group():
    """Without a memory there is nothing to be held to."""
    group = cgroup.Group.of(None, pytest.fail)
    group.enter()
    group.remove()


def test_an_error_that_is_none_of_the_runtime_s():
    """What a function has reported in another form is told as it is."""
    assert invocations._error_of(b"\xff no json") == "\N{REPLACEMENT CHARACTER} no json"
    assert invocations._error_of(b"[]") == "[]"


def test_freezing_what_has_ended():
    """A box that is gone is not frozen, and its status says the rest."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours:
        invocations._freeze(ours, 0.0)


def test_a_box_that_does_not_end(monkeypatch):
    """It is killed: whoever ran a handler waits for no box for ever."""
    stubborn = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
    stubborn += "; print('blocked', flush=True); signal.pause()"
    monkeypatch.setattr(box, "command_line", lambda _: [sys.executable, "-c", stubborn])
    monkeypatch.setattr(invocations, "_SECONDS_OF_INIT", 0.01)
    reader, writer = os.pipe()
    with os.fdopen(reader) as printed, os.fdopen(writer, "w") as log:
        monkeypatch.setattr(invocations.sys, "stderr", log)
        with invocations._function(box.Options([]), {}) as (process, _):
            assert printed.readline() == "blocked\n"
    assert process.returncode == -signal.SIGKILL


def test_a_mount_that_is_refused(tmp_path):
    """The error says what was to be mounted where, and what to do about it."""
    missing = tmp_path / "missing"
    for refused in (
        lambda: kernel.mount("tmpfs", missing, 0),
        lambda: kernel.mount_bound(missing, missing),
        lambda: kernel.set_mount(missing, kernel.MOUNT_ATTR_RDONLY),
    ):
        with pytest.raises(kernel.BoxError, match=r"the kernel refuses .*missing.*Linux 5\.12"):
            refused()
    assert kernel.is_root() == (os.geteuid() == 0)


def test_the_group_of_a_box(version_1, monkeypatch):
    """It is in all hierarchies, until the box removes it."""
    monkeypatch.setattr(cgroup, "_set", lambda *_: None)  # what only the kernel has files for
    group = cgroup.Group.of(512, pytest.fail, str(version_1 / "proc"))
    made = [*version_1.glob("*/user/asynclam-box-*")]
    assert len(made) == 2
    group.remove()
    assert not any(directory.exists() for directory in made)


# --- what of the machine stays visible -----------------------------------------------------------


def test_what_a_command_needs(tmp_path):
    """The directories of the program and of this Python, the working directory, what was named."""
    paths = files.kept("sh", [str(tmp_path)])
    for needed in (tmp_path, files.Path.cwd(), files.Path(shutil.which("sh")).parent.parent):
        assert any(needed == path or path in needed.parents for path in paths)
    assert all(paths.count(path) == 1 for path in paths)
    assert files.kept("no such program", []) == files.kept("no such program", [])


def test_what_was_named_and_is_not_there(tmp_path):
    """It is told before there is a box."""
    with pytest.raises(kernel.BoxError, match="there is no such file or directory"):
        files.kept("sh", [str(tmp_path / "missing")])


def test_what_hides_a_path(tmp_path, monkeypatch):
    """``/tmp`` does, which is a fresh one; for root's, a directory above that is closed to others."""
    monkeypatch.setattr(files, "_TMP", tmp_path / "tmp")
    (tmp_path / "tmp" / "below").mkdir(parents=True)
    closed = tmp_path / "closed"
    (closed / "below").mkdir(parents=True)
    closed.chmod(0o700)
    assert files._cover_of(tmp_path / "tmp" / "below") == tmp_path / "tmp"
    monkeypatch.setattr(kernel, "is_root", lambda: False)
    assert files._cover_of(closed / "below") is None
    monkeypatch.setattr(kernel, "is_root", lambda: True)
    assert files._cover_of(closed / "below") in {closed, *closed.parents}


# --- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 0}, "--cpus 0: between 1 and"),
        ({"cpus": 10_000}, "--cpus 10000: between 1 and"),
    ],
)
def test_what_cannot_be_had(options, message):
    """It is refused before anything is made."""
    box._check(box.Options(["true"]))
    with pytest.raises(kernel.BoxError, match=message):
        box._check(box.Options(["true"], **options))


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("asynclam._box.box.sys.platform", "darwin", "Linux machine, or in a container"),
        ("asynclam._box.box.platform.machine", lambda: "s390x", "system calls of s390x, only of"),
    ],
)
def test_where_there_is_no_box(monkeypatch, where, value, message):
    """The message says what is needed."""
    with monkeypatch.context() as patched:
        patched.setattr(where, value)
        with pytest.raises(kernel.BoxError, match=message):
            box._check(box.Options(["true"]))


def test_the_cpus_of_a_box(monkeypatch, capfd):
    """They are what was asked for, or what the memory size gives; fewer are complained of."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2)))
    assert box._cpus(box.Options(["true"])) is None
    assert box._cpus(box.Options(["true"], cpus=1, memory=10_240)) == 1
    assert box._cpus(box.Options(["true"], memory=1_769)) == 2
    assert not capfd.readouterr().err
    assert box._cpus(box.Options(["true"], memory=10_240)) == 2
    assert "sees 6 CPUs; here are 2" in capfd.readouterr().err


def test_an_event_without_a_handler(capsys):
    """It is refused as a command line is."""
    with pytest.raises(SystemExit):
        main(["--freeze", "1", "--", "true"])
    assert "go with --handler" in capsys.readouterr().err


def test_run_by_its_path(tmp_path):
    """It finds its package, and no module of its directory by a bare name."""
    command = [sys.executable, box.PROGRAM, "--cpus", "0", "--", "true"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 125
    assert "--cpus 0: between 1 and" in ended.stderr


# --- how a command ends --------------------------------------------------------------------------


def test_what_a_box_awaits():
    """The end of init, and what can be passed on to the command; nobody can await SIGKILL."""
    assert {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT} < box._awaited()
    assert signal.SIGKILL not in box._awaited()


def test_exit_statuses():
    """A signal is 128 and its number, as shells have it."""
    assert (box._exit_status(3 << 8), box._exit_status(9)) == (3, 137)


def test_the_end_of_the_command():
    """What is orphaned in the box is reaped, and only the command's end is the box's."""

    def init():
        for _ in range(2):
            if not os.fork():
                os._exit(1)
        child = os.fork()
        if not child:
            os._exit(7)
        os._exit(box._reap_until(child))

    assert in_child(init) == 7


@pytest.mark.parametrize(("program", "status"), [("/missing", 127), (__file__, 126), ("true", 0)])
def test_executing(program, status, capfd):
    """A command that is not there, or cannot be executed, is told with a shell's status."""
    assert in_child(box._execute, [program], dict(os.environ)) == status
    assert ("cannot run" in capfd.readouterr().err) == bool(status)


def test_the_environment_of_a_command(monkeypatch):
    """It is without what leads out of the box, and with what makes semaphores fail."""
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = box._environment(box.Options(["true"], "enosys", memory=512))
    assert "TMPDIR" not in found
    assert found["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"] == "512"
    assert found["PYTHONPATH"] == f"{files.STUB.parent}:/mine"
    assert box._environment(box.Options(["true"]))["PYTHONPATH"] == "/mine"


def test_the_signals_of_a_command():
    """They are the default ones: what CPython ignores, and what it makes of Ctrl-C, is its own."""

    def command():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        box._restore_signals({signal.SIGUSR1})
        defaults = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)
        assert {signal.getsignal(number) for number in defaults} == {signal.SIG_DFL}
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR1}
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        box._restore_signals(())
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os._exit(0)

    assert in_child(command) == 0


def test_a_call_that_succeeds():
    """It says nothing."""
    assert kernel.call("getpid") is None
