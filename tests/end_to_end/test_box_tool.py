"""The box as a tool: control groups, freezes, and handlers with events; what it says when it cannot."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import asynclam
from asynclam import _cgroup, _cli
from asynclam._box import __main__ as program
from asynclam._box import box, cgroup, invocations, kernel
from asynclam._box.kernel import BoxError
from tests.parts.processes import children, descendants, state_of

pytestmark = pytest.mark.outside

ROOT = Path(asynclam.__file__).parent.parent
FUNCTIONS = Path(__file__).parent / "functions"
ASYNCLAM = [sys.executable, "-m", "asynclam", "box"]
SECONDS = 60.0  # none of them takes more than two; a machine may be busy
PAUSED = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"


def run(argv, **options):
    options = {"cwd": FUNCTIONS, **options}
    return subprocess.run(  # noqa: PLW1510 - for the caller to say
        argv, capture_output=True, text=True, timeout=SECONDS, **options
    )


@contextlib.contextmanager
def paused(*argv, **options):
    """A box whose command has started and waits for the end of its input."""
    with subprocess.Popen(
        argv, cwd=FUNCTIONS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    ) as process:
        assert process.stdout.readline()
        yield process


# --- control groups ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def groups_permitted():
    """Whether this machine lets this user make control groups; asked of the box itself."""
    done = run(box.command(["true"], memory=512))
    if "no control group can be made" in done.stderr:
        pytest.skip(done.stderr)


def test_memory_brings_its_share_of_the_cpus(groups_permitted):
    """All in the box has the memory, and the time on CPUs, of a function of that size."""
    with paused(*box.command([sys.executable, "-c", PAUSED], memory=1769)) as process:
        directories = groups_of(process.pid)
        limits = {name: limit for directory in directories for name, limit in read(directory)}
        process.communicate()
    quota = limits.get("cpu.max") or (f"{limits['cpu.cfs_quota_us']} {limits['cpu.cfs_period_us']}")
    assert quota == "20000 20000"
    assert (limits.get("memory.max") or limits["memory.limit_in_bytes"]) == str(1769 << 20)
    assert not any(directory.exists() for directory in directories)


def groups_of(pid):
    """The directories of the group that a box has made."""
    found = {
        Path(directory, f"asynclam-box-{pid}")
        for controller in ("cpu", "memory")
        for directory in _cgroup.directories("/proc/self", controller)
    }
    return [directory for directory in found if directory.exists()]


def read(directory):
    for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.max"):
        if (directory / name).exists():
            yield name, (directory / name).read_text().strip()
    if (directory / "memory.limit_in_bytes").exists():
        yield "memory.limit_in_bytes", (directory / "memory.limit_in_bytes").read_text().strip()


def test_too_much_memory_is_the_end(groups_permitted):
    """A command that takes more memory than its function has is killed."""
    script = "view = bytearray(400 << 20); view[:] = b'x' * len(view)"
    assert run(box.command([sys.executable, "-c", script], memory=256)).returncode == 137


@pytest.mark.parametrize("kill", [os.kill, os.killpg])
def test_the_group_of_a_killed_box_is_removed(groups_permitted, kill):
    """However the box ends, the group goes when the last process in it has gone."""
    argv = box.command([sys.executable, "-c", PAUSED], memory=512)
    with paused(*argv, start_new_session=True) as process:
        directories = groups_of(process.pid)
        assert directories
        kill(process.pid, signal.SIGKILL)
        process.stdout.read()
    while any(directory.exists() for directory in directories):
        pass


def test_without_permission_it_says_so(tmp_path):
    """A user who may not make groups is told that nothing is held to the memory, and why."""
    complaints = []
    group = cgroup.Group.of(512, complaints.append, str(tmp_path))
    (complaint,) = complaints
    assert "not held to those of 512 MB" in complaint
    assert "no control groups are mounted" in complaint
    group.enter()
    group.remove()


def test_version_2(tmp_path):
    """In version 2 the group is made beside the box's own, where controllers may be given on."""
    (tmp_path / "proc").mkdir()
    mount = tmp_path / "mount"
    own = mount / "app.slice" / "term.scope"
    own.mkdir(parents=True)
    (tmp_path / "proc" / "cgroup").write_text("0::/app.slice/term.scope\n")
    (tmp_path / "proc" / "mountinfo").write_text(
        f"30 23 0:26 / {mount} rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    for directory in (own, own.parent):
        (directory / "cgroup.type").write_text("domain\n")
    (own.parent / "cgroup.subtree_control").write_text("memory\n")
    proc = str(tmp_path / "proc")
    controllers, parents = next(cgroup._places(proc))
    parents = list(parents)
    assert controllers == ("cpu", "memory")
    assert parents == [own.parent, mount]
    made = cgroup._first(iter(parents), "box", controllers)
    assert made == own.parent / "box"
    assert (own.parent / "cgroup.subtree_control").read_text().startswith("+cpu")
    for name in ("cpu.max", "memory.max", "memory.swap.max"):
        (made / name).touch()  # as the kernel does
    for controller in controllers:
        cgroup._set(made, controller, 884)
    assert (made / "cpu.max").read_text() == "9994 20000"
    assert (made / "memory.max").read_text() == str(884 << 20)
    assert (made / "memory.swap.max").read_text() == "0"


def test_version_2_next_one_up(tmp_path):
    """Where one group may not give controllers on, that above it may."""
    (tmp_path / "a").mkdir()
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    made = cgroup._first(iter([tmp_path / "a", tmp_path]), "box", ("cpu", "memory"))
    assert made == tmp_path / "box"


@pytest.mark.parametrize(("memory", "cpus"), [(128, 2), (1769, 2), (10240, 6)])
def test_memory_brings_its_cpus(memory, cpus):
    """A command sees as many CPUs as a function of its memory does, or as there are: it is told."""
    available = len(os.sched_getaffinity(0))
    done = run(box.command(["nproc"], memory=memory))
    assert done.stdout == f"{min(cpus, available)}\n"
    told = f"box: a function of {memory} MB sees {cpus} CPUs; here are {available}\n"
    assert (told in done.stderr) == (cpus > available)


# --- freezes -------------------------------------------------------------------------------------


def test_a_freeze_stops_everything():
    """Every process in the box is stopped, sessions of their own included, and runs on after it."""
    script = f"setsid sleep 600 & exec {sys.executable} -c '{PAUSED}'"
    ours, theirs = socket.socketpair()
    with ours:
        argv = box.command(["sh", "-c", script], control=theirs.fileno())
        with paused(*argv, pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            inside = descendants(init_of(process.pid))
            assert len(inside) == 2
            for order, state in ((box.FREEZE, {"T"}), (box.THAW, {"S", "R"})):
                ours.sendall(order)
                assert ours.recv(1) == order
                while not {state_of(pid) for pid in inside} <= state:
                    pass
            process.communicate()
            assert process.returncode == 0


def init_of(pid):
    (init,) = children(pid)
    return init


# --- a handler with events -----------------------------------------------------------------------


def invoke(handler, *events, directory, options=(), **settings):
    arguments = []
    for number, event in enumerate(events):
        (directory / f"{number}.json").write_text(json.dumps(event))
        arguments += ["--event", str(directory / f"{number}.json")]
    line = [*ASYNCLAM, "--bind", str(ROOT), *options, "--handler", handler, *arguments]
    return run(line, **settings)


def results_of(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_handler_is_invoked(tmp_path):
    """Results are on stdout, one a line; the log is on stderr; one process serves all events."""
    done = invoke("sandboxed.handler", {"n": 1}, {"n": 2}, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    results = results_of(done)
    assert [result["event"] for result in results] == [{"n": 1}, {"n": 2}]
    assert len({result["pid"] for result in results}) == 1
    assert len({result["request"] for result in results}) == 2
    assert {result["uid"] for result in results} == {box.UID}
    assert {result["memory"] for result in results} == {1769}
    assert all(result["left"] for result in results)
    assert [result["thaws"] for result in results] == [0, 0]
    assert "told to {'n': 2}" in done.stderr


def test_frozen_between_invocations(tmp_path):
    """With --freeze the sandbox is stopped between two invocations, and only there."""
    events = [{"n": number} for number in range(3)]
    done = invoke("sandboxed.handler", *events, directory=tmp_path, options=["--freeze", "0.01"])
    assert [result["thaws"] for result in results_of(done)] == [0, 1, 2]


def test_an_event_from_stdin():
    """``--event -`` is read from standard input; without an event it is {}."""
    line = [*ASYNCLAM, "--bind", str(ROOT), "--memory", "3008", "--handler", "sandboxed.handler"]
    (result,) = results_of(run([*line, "--event", "-"], input='{"from": "stdin"}'))
    assert (result["event"], result["memory"]) == ({"from": "stdin"}, 3008)
    (result,) = results_of(run(line))
    assert result["event"] == {}


@pytest.mark.parametrize(
    ("handler", "events", "options", "message", "results"),
    [
        (
            "sandboxed.handler",
            [{"raise": "x"}, {}],
            [],
            "invocation 1 has failed: ValueError: x",
            2,
        ),
        ("sandboxed.handler", [{"exit": 3}, {}], [], "Runtime exited: exit status 3", 0),
        (
            "sandboxed.handler",
            [{"hang": 1}],
            ["--timeout", "0.5"],
            "timed out after 0.50 seconds",
            0,
        ),
        ("missing.handler", [{}], [], "the init of the function has failed: Runtime.Import", 0),
    ],
)
def test_a_handler_that_fails(tmp_path, handler, events, options, message, results):
    """What fails is told in a line; after an exception the runtime goes on, else it ends."""
    done = invoke(handler, *events, directory=tmp_path, options=options)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(results_of(done)) == results


def test_asynclam_in_the_box(tmp_path):
    """A handler made by ``lambda_handler`` finds its workers again after a freeze."""
    done = invoke(
        "hello.handler", {"n": 10}, {"n": 20}, directory=tmp_path, options=["--freeze", "0.01"],
        cwd=ROOT / "examples",
    )  # fmt: skip
    assert results_of(done) == [{"result": 55}, {"result": 6765}], done.stderr


# --- what it says when it cannot -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give either a command after --, or --handler"),
        (["--handler", "a.b", "--", "true"], 2, "give either a command"),
        (["--freeze", "--", "true"], 2, "--freeze and --snapstart go with --handler"),
        (["--timeout", "1", "--", "true"], 2, "--timeout and --concurrency go with --handler"),
        (["--concurrency", "1", "--", "true"], 2, "--concurrency go with --handler"),
        (["--handler", "a.b", "--event", "/missing"], 125, "--event /missing: [Errno 2]"),
        (["--handler", "a.b", "--event", __file__], 125, "Extra data"),
    ],
)
def test_usage(arguments, status, message, capfd):
    """What makes no sense is told, before anything is started."""
    try:
        found = _cli.main(["box", *arguments])
    except SystemExit as error:
        found = error.code
    assert found == status
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "values", "instead"),
    [
        ("--freeze", ["-1", "nan", "inf", "1e10", "long"], "must be 0 to 86400 seconds"),
        ("--timeout", ["0", "-1", "nan", "inf", "long"], "must be more than 0 seconds, at most"),
        ("--concurrency", ["0", "-1", "1.5", "many"], "must be a whole number, at least 1"),
        ("--memory", ["0", "-1", "1.5", "much"], "must be a whole number, at least 1"),
    ],
)
def test_values(monkeypatch, capfd, option, values, instead):
    """One that makes no sense is told with what does, before anything is started."""
    monkeypatch.setattr(program, "_invoke", pytest.fail)
    for value in values:
        with pytest.raises(SystemExit) as caught:
            program.main(["--handler", "a.b", option, value])
        assert caught.value.code == 2
        told = capfd.readouterr().err
        assert f"argument {option}: {instead}" in told
        assert told.endswith(f", not {value}\n")


def test_values_at_the_edge(monkeypatch):
    """The least and the most that make sense are taken, and defaults where there is none."""
    seen = []
    monkeypatch.setattr(invocations, "run", lambda *arguments: seen.append(arguments[2:]) or 0)
    least = ["--freeze", "0", "--timeout", "0.1", "--concurrency", "1", "--memory", "1"]
    most = ["--freeze", "86400", "--timeout", "86400"]
    for words in (least, most, []):
        assert program.main(["--handler", "a.b", *words]) == 0
    assert [(how, options.memory) for how, options in seen] == [
        (invocations.How(0.1, freeze=0.0, concurrency=1), 1),
        (invocations.How(86_400.0, freeze=86_400.0), 1769),
        (invocations.How(30.0), 1769),
    ]


def test_without_the_runtime_client(monkeypatch, capfd):
    """A handler needs the runtime client, and it is said how to come by it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert program.main(["--handler", "a.b"]) == box.BOX_FAILED
    assert "-m pip install awslambdaric" in capfd.readouterr().err


def test_another_system(monkeypatch):
    """Where there are no namespaces, it is said where there are."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BoxError, match="this is darwin; run it in a Linux machine"):
        box.run(box.Options(["true"]))


@pytest.mark.parametrize(("root", "advice"), [(True, "--privileged"), (False, "sysctl")])
def test_a_kernel_that_refuses(monkeypatch, root, advice):
    """Where the kernel refuses namespaces, it is said what to allow."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(kernel, "call", refuse)
    monkeypatch.setattr(kernel, "is_root", lambda: root)
    with pytest.raises(BoxError, match="the kernel refuses new namespaces") as caught:
        box._unshare()
    assert advice in str(caught.value)


def test_help(capsys):
    """The command is in the list of commands, and tells how it is used."""
    with pytest.raises(SystemExit):
        _cli.main(["--help"])
    assert "box" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        _cli.main(["box", "--help"])
    assert "asynclam box [options] -- COMMAND..." in capsys.readouterr().out
