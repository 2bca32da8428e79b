"""The parts of the box that need no box: its control groups, and what it makes of a function's end."""

import os
import socket

import pytest

from asynclam._box import cgroup, invocations, kernel


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
