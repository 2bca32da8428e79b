"""Runs a command as AWS Lambda would run it, on an ordinary Linux machine.

Inside the box there is no ``/dev/shm``, and ``/dev`` holds the eight nodes of Lambda only; all is
read-only but a fresh ``/tmp``; the user is 993:990 without capabilities and without a home;
``prctl`` answers EPERM; 1,024 descriptors and as many processes are the limit. The network is the
machine's own. It needs nothing but the standard library.

Theory of operation::

    box ──fork──► init, pid 1 of a PID namespace ──fork──► the command
     ├── lifeline ──►┤
     │   control ◄──►┘
     └──fork──► sweeper, if there is a control group to remove

* The *box* waits for init and ends with the exit status of the command: 128 + n for signal n, as
  shells have it; 125 when the box failed, 126 and 127 when the command could not be executed.
* *init* lays out the file system in a mount namespace, starts the command and reaps what is
  orphaned in the box, as Lambda's pid 1 does: children that outlive a runtime live on for as long
  as the command does. When the command ends, init ends, and then the kernel kills whatever is left
  in the PID namespace, processes that called setsid() included (pid_namespaces(7)).
* The *lifeline* is a pipe whose write end only the box has. A byte in it is a signal to pass on to
  the command. Its end means that the box is gone, however it died, and init follows.
* *control* is a socket that the box's caller may give it: a byte freezes or thaws all that is in the
  box. It is signals to every process but init, which a namespace's init sends with one kill(-1).
* All but the sweeper are in one process group. The signals of a terminal's Ctrl-C reach the command
  without help, so the box passes on only those that a process sent to it.

Root needs CAP_SYS_ADMIN. Any other user gets a user namespace, and is user 993 in it; the kernel
does not let that user drop supplementary groups, so they stay (user_namespaces(7)).

Coverage sees neither what runs in the box, where nothing can be written for it, nor the box itself,
which runs under -S, without the package: tests see what these do, and lines say ``no cover``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from asynclam import _sizing

from . import cgroup, files, kernel
from .files import Shm
from .kernel import BoxError

UID = 993
GID = 990
HOME = "/home/sbx_user1051"  # of Lambda's user, in whose sandbox it does not exist either
MAX_DESCRIPTORS = 1024
MAX_PROCESSES = 1024

FREEZE = b"F"
THAW = b"T"

BOX_FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127

PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")

# They lead out of /tmp, or to somebody's home.
_FOREIGN_VARIABLES = frozenset(
    {"LOGNAME", "TEMP", "TMP", "TMPDIR", "USER", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"}
)


@dataclass(frozen=True)
class Options:
    """The command, and what its box is to be like: see :func:`command`."""

    argv: list[str]
    shm: Shm = "missing"
    cpus: int | None = None
    memory: int | None = None
    bind: Sequence[str] = ()
    control: int | None = None


def command(
    argv: Sequence[str | os.PathLike[str]],
    *,
    shm: Shm = "missing",
    cpus: int | None = None,
    memory: int | None = None,
    bind: Iterable[str | os.PathLike[str]] = (),
    control: int | None = None,
) -> list[str]:
    """Returns the command line that runs ``argv`` in a box.

    Args:
        argv: The command and its arguments.
        shm: How semaphores fail: with ENOENT, for there is no ``/dev/shm``; with EACCES, for it is
            not writable; with ENOSYS, in Python code only, by a stub.
        cpus: On how many CPUs the command may run, which is also what ``os.cpu_count()`` says
            there. None for all that there are.
        memory: MB of memory that the command has, and with them the time on CPUs, by a control
            group where that is permitted; the box says on stderr where it is not. None for the
            machine's.
        bind: Files and directories to be seen in the box although they lie below ``/tmp`` or below
            a directory that is closed to others. The working directory, the running interpreter
            and that of the command need not be named.
        control: A socket that the box inherits, for :data:`FREEZE` and :data:`THAW`.
    """
    words = [os.fspath(argument) for argument in argv]
    paths = [os.fspath(path) for path in bind]
    return command_line(Options(words, shm, cpus, memory, paths, control))


def command_line(options: Options) -> list[str]:
    """Returns the command line of the box that ``options`` tells of."""
    # -S -E: the box needs neither packages nor variables, and starts in half the time.
    line = [sys.executable, "-S", "-E", PROGRAM, "--shm", options.shm]
    for name in ("cpus", "memory", "control"):
        if (value := getattr(options, name)) is not None:
            line += [f"--{name}", str(value)]
    for path in options.bind:
        line += ["--bind", path]
    return [*line, "--", *options.argv]


# -- The box ---------------------------------------------------------------------------------------


def run(options: Options) -> int:  # pragma: no cover - under -S
    """Runs a command in a box and returns its exit status.

    Afterwards this process is good for nothing else: its children would be born into the box.

    Raises:
        BoxError: there cannot be such a box here.
    """
    _check(options)
    options = replace(options, cpus=_cpus(options))
    kept = files.kept(options.argv[0], options.bind)
    if options.control is not None:
        os.set_inheritable(options.control, False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Ignored, it would discard the exit status.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _awaited())
    group = cgroup.Group.of(options.memory, complain)
    try:
        _unshare()
        read_end, write_end = os.pipe()
        init = os.fork()
        if init == 0:
            os.close(write_end)
            _be_init(options, kept, group, read_end, before)
        os.close(read_end)
        return _wait(init, write_end)
    finally:
        group.remove()  # now that it is empty


def _cpus(options: Options) -> int | None:
    """On how many CPUs the command may run: as many as its memory makes a function see."""
    if options.cpus is not None or options.memory is None:
        return options.cpus
    visible, available = _sizing.visible_on_lambda(options.memory), len(os.sched_getaffinity(0))
    if visible > available:
        complain(f"a function of {options.memory} MB sees {visible} CPUs; here are {available}")
    return min(visible, available)


def _check(options: Options) -> None:
    if sys.platform != "linux":
        raise BoxError(
            f"needs the namespaces of Linux, and this is {sys.platform}; run it in a Linux machine, "
            "or in a container that is started with --privileged"
        )
    if platform.machine() not in kernel.MACHINES:
        known = " and ".join(kernel.MACHINES)
        raise BoxError(f"does not know the system calls of {platform.machine()}, only of {known}")
    available = len(os.sched_getaffinity(0))
    if options.cpus is not None and not 1 <= options.cpus <= available:
        raise BoxError(f"--cpus {options.cpus}: between 1 and {available} can be had here")


def _unshare() -> None:  # pragma: no cover - under -S
    uid, gid = os.getuid(), os.getgid()
    flags = (
        kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | (0 if kernel.is_root() else kernel.CLONE_NEWUSER)
    )
    try:
        kernel.call("unshare", flags)
    except OSError as error:
        raise BoxError(
            f"the kernel refuses new namespaces ({error.strerror}): "
            + (_NO_CAPABILITY if flags & kernel.CLONE_NEWUSER == 0 else _NO_USER_NAMESPACES)
        ) from error
    if flags & kernel.CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{UID} {uid} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{GID} {gid} 1", encoding="ascii")


_NO_CAPABILITY = (
    "root has no CAP_SYS_ADMIN, as in most containers; "
    "start the container with --privileged, or run this as an ordinary user of the machine"
)
_NO_USER_NAMESPACES = (
    "it may not give them to ordinary users; run this as root, or allow them with sysctl: "
    "kernel.unprivileged_userns_clone=1 (Debian), "
    "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), user.max_user_namespaces=10000"
)


def _awaited() -> set[signal.Signals]:
    return {
        signal.SIGCHLD,
        *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
        *(signal.SIGUSR1, signal.SIGUSR2),
    }


def _wait(init: int, lifeline: int) -> int:  # pragma: no cover - under -S
    while True:
        received = signal.sigwaitinfo(_awaited())
        if received.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(init, os.WNOHANG)
            if pid == init:
                return _exit_status(status)
        elif received.si_code <= 0:  # By a process, not by the terminal: sigaction(2), SI_USER.
            with contextlib.suppress(BrokenPipeError):
                os.write(lifeline, bytes([received.si_signo]))


def _exit_status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


# -- init ------------------------------------------------------------------------------------------


def _be_init(
    options: Options,
    kept: Sequence[Path],
    group: cgroup.Group,
    lifeline: int,
    mask: Iterable[int],
) -> NoReturn:  # pragma: no cover - in the box
    try:
        group.enter()
        files.lay_out(options.shm, options.cpus, kept)
        child = os.fork()
        if child == 0:
            _become(options, mask)
        threading.Thread(target=_follow, args=(lifeline, child), daemon=True).start()
        if options.control is not None:
            threading.Thread(target=_obey, args=(options.control,), daemon=True).start()
        os._exit(_reap_until(child))
    except BaseException as error:  # Must not return into the frames of the box
        complain(error)
        os._exit(BOX_FAILED)


def _follow(lifeline: int, child: int) -> NoReturn:  # pragma: no cover - in the box
    while received := os.read(lifeline, 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, received[0])
    os._exit(_exit_status(signal.SIGKILL))


def _obey(control: int) -> None:  # pragma: no cover - in the box
    """Freezes and thaws all that is in the box: a byte for each, sent back when it is done."""
    while order := os.read(control, 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGSTOP if order == FREEZE else signal.SIGCONT)
        os.write(control, order)


def _reap_until(child: int) -> int:
    while True:
        pid, status = os.wait()
        if pid == child:
            return _exit_status(status)


# -- The command -----------------------------------------------------------------------------------


def _become(options: Options, mask: Iterable[int]) -> NoReturn:  # pragma: no cover - in the box
    """Turns this process into the command."""
    try:
        _limit(options.cpus)
        _drop_privileges()
        _enter(os.getcwd())
        _refuse_prctl()
        _restore_signals(mask)
        _execute(options.argv, _environment(options))
    except BaseException as error:  # Must not return into the frames of init
        complain(error)
        os._exit(BOX_FAILED)


def _limit(cpus: int | None) -> None:  # pragma: no cover - in the box
    import resource  # not on Windows, where the message of _check() is to be seen

    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_DESCRIPTORS, MAX_DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
    if cpus is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])


def _drop_privileges() -> None:  # pragma: no cover - in the box
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    for capability in range(last + 1):
        kernel.call("prctl", kernel.PR_CAPBSET_DROP, capability, 0, 0, 0)
    if kernel.is_root():
        os.setgroups([])
        os.setresgid(GID, GID, GID)
        os.setresuid(UID, UID, UID)
    kernel.call("prctl", kernel.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _enter(directory: str) -> None:  # pragma: no cover - in the box
    # By its name: the inherited one may be that below a mount.
    try:
        os.chdir(directory)
    except OSError as error:
        raise BoxError(
            f"user {UID} cannot enter the working directory {directory} ({error.strerror}): "
            "let others read it (chmod o+rx), or start from another one"
        ) from error


def _refuse_prctl() -> None:  # pragma: no cover - in the box
    """Makes prctl(2) fail with EPERM whatever its arguments, by a filter of seccomp(2)."""
    machine = kernel.MACHINES[platform.machine()]
    # A jump counts from the next instruction: true first, then false.
    instructions = (
        (kernel.BPF_LOAD, 0, 0, 4),  # seccomp_data.arch
        (kernel.BPF_JUMP_IF_EQUAL, 0, 3, machine.audit_arch),
        (kernel.BPF_LOAD, 0, 0, 0),  # seccomp_data.nr
        (kernel.BPF_JUMP_IF_EQUAL, 1, 0, machine.prctl),
        (kernel.BPF_RETURN, 0, 0, kernel.SECCOMP_RET_ALLOW),
        (kernel.BPF_RETURN, 0, 0, kernel.SECCOMP_RET_ERRNO | errno.EPERM),
    )
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    kernel.system_call(machine.seccomp, kernel.SECCOMP_SET_MODE_FILTER, 0, header)


def _restore_signals(mask: Iterable[int]) -> None:
    # CPython ignores the first two, and what is ignored stays so across execve(2). The third would
    # run its handler, should it arrive before.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _environment(options: Options) -> dict[str, str]:
    variables = {k: v for k, v in os.environ.items() if k not in _FOREIGN_VARIABLES}
    variables |= {"HOME": HOME, "PYTHONDONTWRITEBYTECODE": "1", "ASYNCLAM_BOX": options.shm}
    if options.memory is not None:
        variables["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"] = str(options.memory)
    if options.shm == "enosys":
        path = [str(files.STUB.parent), variables.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return variables


def _execute(argv: list[str], variables: dict[str, str]) -> NoReturn:
    try:
        os.execvpe(argv[0], argv, variables)  # noqa: S606 - the command of the user
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        complain(
            BoxError(
                f"cannot run {argv[0]} ({error.strerror}): user {UID} must be able to read and "
                "execute it; --bind PATH shows what lies below a closed directory or /tmp"
            )
        )
        os._exit(NOT_FOUND if missing else NOT_EXECUTABLE)


def complain(error: BaseException | str) -> None:
    """Tells on stderr, in a line, what cannot be done."""
    known = isinstance(error, (BoxError, str))
    text = str(error) if known else f"{type(error).__name__}: {error}"
    os.write(2, f"box: {text}\n".encode(errors="backslashreplace"))
