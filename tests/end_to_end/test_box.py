"""The control test: without it, a suite that passes in the box would prove nothing."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from asynclam._box import box
from asynclam._box.files import Shm

pytestmark = pytest.mark.outside

_HERE = Path(__file__).parent
_PROBES = _HERE / "functions" / "probes.py"
_SECONDS = 60.0  # none of them takes more than two; a machine may be busy

_ERRNO: dict[Shm, int] = {
    "missing": errno.ENOENT,
    "forbidden": errno.EACCES,
    "enosys": errno.ENOSYS,
}
_NODES = {
    "null": "1:3",
    "zero": "1:5",
    "full": "1:7",
    "random": "1:8",
    "urandom": "1:9",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


def run(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; what it leaves behind with an open stdout makes this fail."""
    options = {"cwd": _HERE, **options}
    return subprocess.run(  # noqa: PLW1510 - for the caller to say
        argv, capture_output=True, text=True, timeout=_SECONDS, **options
    )


def probe(name: str, **options: Any) -> Any:
    argv = [sys.executable, str(_PROBES), name]
    return json.loads(run(box.command(argv, **options) if options else argv, check=True).stdout)


@functools.cache
def machine(shm: Shm) -> dict[str, Any]:
    found: dict[str, Any] = probe("machine", shm=shm, cpus=1)
    return found


@functools.cache
def libraries(shm: Shm) -> dict[str, Any]:
    found: dict[str, Any] = probe("libraries", shm=shm)
    return found


@pytest.fixture(params=list(_ERRNO))
def shm(request: pytest.FixtureRequest) -> Shm:
    variant: Shm = request.param
    return variant


LIBRARIES = ("lock", "executor", "pool", "thread_pool", "multiprocess", "loky")


@pytest.mark.parametrize("library", LIBRARIES)
def test_whatever_needs_a_semaphore_fails(shm: Shm, library: str) -> None:
    """Pools, executors, multiprocess and loky fail, each with the errno of the variant."""
    assert libraries(shm)["failures"][library] == _ERRNO[shm]


def test_outside_they_work() -> None:
    """The same attempts succeed outside: it is the box that makes them fail."""
    assert probe("libraries")["failures"] == dict.fromkeys(LIBRARIES)


def test_process_and_pipe_work(shm: Shm) -> None:
    """A child process and a Pipe need no semaphore, so they work."""
    assert libraries(shm)["pipe"] == "sent by a child"


def test_dev_holds_the_nodes_of_lambda(shm: Shm) -> None:
    """/dev holds eight nodes; only in the variant "forbidden" there is a /dev/shm, closed to us."""
    expected = _NODES | ({"shm": "drwxr-xr-x"} if shm == "forbidden" else {})
    if os.geteuid() != 0 and shm == "forbidden":
        expected["shm"] = "dr-xr-xr-x"  # user 993 owns it, in a user namespace
    assert machine(shm)["dev"] == expected


def test_only_tmp_is_writable(shm: Shm) -> None:
    """Writing fails with EROFS everywhere, the working directory included, but in /tmp."""
    refused = {path: found for path, found in machine(shm)["write"].items() if path != "/tmp"}
    assert set(refused.values()) == {errno.EROFS}
    assert machine(shm)["write"]["/tmp"] is None


def test_tmp_is_fresh(shm: Shm) -> None:
    """/tmp has 512 MB, and nothing in it but what the command needs to run."""
    needed = {path.parts[2] for path in (_HERE, Path(sys.prefix)) if path.parts[1] == "tmp"}
    assert set(machine(shm)["tmp"]) <= needed
    assert machine(shm)["tmp_bytes"] == 512 << 20


def test_user_is_that_of_lambda(shm: Shm) -> None:
    """The user is 993:990 without capabilities, without a way to new ones, without a home."""
    found = machine(shm)
    assert found["uids"] == [993] * 3
    assert found["gids"] == [990] * 3
    assert os.geteuid() != 0 or found["groups"] == []
    assert found["status"] == {"CapPrm": 0, "CapEff": 0, "CapBnd": 0, "NoNewPrivs": 1}
    assert not found["home"]


def test_limits_are_those_of_lambda(shm: Shm) -> None:
    """1,024 descriptors and 1,024 processes are the limit, and cannot be raised."""
    assert machine(shm)["descriptors"] == [1024, 1024]
    assert machine(shm)["processes"] == [1024, 1024]


def test_prctl_is_refused(shm: Shm) -> None:
    """Whichever option it is asked for, prctl answers EPERM."""
    assert machine(shm)["prctl"] == [errno.EPERM]


def test_there_are_no_control_groups(shm: Shm) -> None:
    """/sys/fs/cgroup, from which others read the limits of a container, does not exist."""
    assert not machine(shm)["cgroup"]


@pytest.mark.parametrize("cpus", range(1, min(2, len(os.sched_getaffinity(0))) + 1))
def test_cpus_are_as_chosen(cpus: int) -> None:
    """The command may run on as many CPUs as were asked for, and counts as many."""
    assert probe("machine", cpus=cpus)["cpus"] == [cpus, cpus]


def test_memory_is_told() -> None:
    """The command is told how much memory it has, as Lambda tells a function."""
    argv = ["sh", "-c", "echo $AWS_LAMBDA_FUNCTION_MEMORY_SIZE"]
    assert run(box.command(argv, memory=3008)).stdout == "3008\n"


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill $$", 143)]
)
def test_exit_status_passes_through(script: str, status: int) -> None:
    """The box ends with the exit status of its command, or with 128 + n if signal n killed it."""
    assert run(box.command(["sh", "-c", script])).returncode == status


def test_streams_pass_through() -> None:
    """Standard input, output and error are those of the box, and the box adds nothing to them."""
    result = run(box.command(["sh", "-c", "cat; echo error >&2"]), input="input")
    assert (result.stdout, result.stderr) == ("input", "error\n")


def test_environment_passes_through_but_for_places() -> None:
    """Variables pass, but those that name a place which the box does not have."""
    variables = {"PATH": os.environ["PATH"], "HOME": "/home/me", "TMPDIR": "/var/tmp", "MINE": "1"}
    printed = run(box.command(["env"]), env=variables).stdout.split()
    assert {"MINE=1", f"HOME={box.HOME}"} <= set(printed)
    assert not [line for line in printed if line.startswith("TMPDIR=")]


def test_trees_below_tmp_stay_visible(tmp_path: Path) -> None:
    """A working directory and a named path below /tmp are seen in the box, read-only.

    So they are although /tmp is a fresh one, and although their parents are closed to others.
    """
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        directory.mkdir(mode=0o755)
        (directory / "file").write_text(directory.name)
    script = f"cat file {there}/file && ! touch {there}/new && ls {tmp_path}"
    result = run(box.command(["sh", "-c", script], bind=[there]), cwd=here)
    assert result.stdout == "heretherehere\nthere\n"
    assert result.returncode == 0


def test_stub_makes_way_for_another_sitecustomize(tmp_path: Path) -> None:
    """The stub of the variant "enosys" does not replace a sitecustomize that was there before."""
    tmp_path.chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.mine = 'mine'")
    argv = [sys.executable, "-c", "print(mine); import _multiprocessing as m; print(m.SemLock)"]
    result = run(
        box.command(argv, shm="enosys", bind=[tmp_path]),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.stdout.splitlines() == ["mine", "<class 'sitecustomize.SemLock'>"]


def test_nothing_outlives_the_command() -> None:
    """When the command ends, what it has started ends too, sessions of their own included."""
    result = run(box.command(["sh", "-c", "setsid sleep 600 & echo started"]))
    assert result.stdout == "started\n"


def test_nothing_outlives_a_killed_box() -> None:
    """When the box itself is killed, all that is in it ends."""
    script = "setsid sleep 600 & echo started; exec sleep 600"
    with start(["sh", "-c", script]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.kill()
        assert process.communicate(timeout=_SECONDS)[0] == ""


# It reads a byte for each signal: none that comes before it waits for it is lost.
_COUNTER = """\
import os, signal, sys
read_end, write_end = os.pipe()
os.set_blocking(write_end, False)
signal.set_wakeup_fd(write_end)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
print("started", flush=True)
count = 0
while os.read(read_end, 1)[0] == signal.SIGINT:
    count += 1
    print("interrupted", flush=True)
sys.exit(count)
"""


def start(argv: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        box.command(argv), cwd=_HERE, stdout=subprocess.PIPE, text=True, **options
    )


def test_signals_are_passed_on() -> None:
    """A signal that a process sends to the box reaches the command."""
    with start([sys.executable, "-c", _COUNTER]) as process:
        assert process.stdout is not None
        for number, line in ((signal.SIGINT, "started\n"), (signal.SIGTERM, "interrupted\n")):
            assert process.stdout.readline() == line
            process.send_signal(number)
        assert process.wait(_SECONDS) == 1


def test_terminal_interrupts_once() -> None:
    """Ctrl-C at a terminal reaches the command as one SIGINT, not as a second one by the box."""
    controller, terminal = os.openpty()

    def control() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    with start([sys.executable, "-c", _COUNTER], stdin=terminal, preexec_fn=control) as process:
        os.close(terminal)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        os.write(controller, b"\x03")
        assert process.stdout.readline() == "interrupted\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(_SECONDS) == 1
    os.close(controller)


def test_root_is_not_needed() -> None:
    """Without root the box makes a user namespace, and semaphores fail in it all the same."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root to become somebody else, and a Python that anybody may read")
    script = "import multiprocessing, os; print(os.getuid()); multiprocessing.Lock()"
    argv = [python, "-S", "-E", box.PROGRAM, "--shm", "forbidden", "--memory", "512"]
    argv += ["--", python, "-c", script]
    result = run(argv, user=1234, group=1234, extra_groups=[])
    if "refuses new namespaces" in result.stderr:
        pytest.skip("this kernel gives no namespaces to ordinary users")
    assert result.stdout == "993\n"
    assert "PermissionError" in result.stderr
    assert "box: the time on CPUs and the memory are not held to those of 512 MB" in result.stderr


@pytest.mark.alone
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--cpus", "4096", "--", "true"], 125, "--cpus 4096: between 1 and "),
        (["--memory", "0", "--", "true"], 2, "--memory: must be a whole number, at least 1, not 0"),
        (["--bind", "/missing", "--", "true"], 125, "--bind /missing: there is no such file"),
        (["--", "/missing"], 127, "cannot run /missing (No such file or directory)"),
        (
            ["--", __file__],
            126,
            "(Permission denied): user 993 must be able to read and execute it",
        ),
        ([], 2, "give either a command after --, or --handler"),
    ],
)
def test_failures_are_told_in_a_line(arguments: list[str], status: int, message: str) -> None:
    """What cannot be done is told in one line, with a status that no command's is likely to be."""
    result = run([sys.executable, box.PROGRAM, *arguments])
    assert result.returncode == status
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_closed_working_directory_is_named(tmp_path: Path) -> None:
    """A working directory that user 993 may not enter is named, with what to do about it."""
    if os.geteuid() != 0:
        pytest.skip("without root, user 993 is the one who owns the directory")
    tmp_path.chmod(0o700)
    result = run(box.command(["true"]), cwd=tmp_path)
    assert result.returncode == box.BOX_FAILED
    assert f"cannot enter the working directory {tmp_path}" in result.stderr
    assert "chmod" in result.stderr
