"""Runs a command as AWS Lambda would run it, on an ordinary Linux machine.

    python box.py [--cpus N] [--shm missing|forbidden|enosys] [--bind PATH]... [--memory MB]
                  -- COMMAND...

Inside the box there is no ``/dev/shm``, and ``/dev`` holds the eight nodes of Lambda only; all is
read-only but a fresh ``/tmp``; the user is 993:990 without capabilities and without a home;
``prctl`` answers EPERM; 1,024 descriptors and as many processes are the limit. The network is the
machine's own. It needs nothing but the standard library of CPython 3.10.

Theory of operation::

    box ──fork──► init, pid 1 of a PID namespace ──fork──► the command
     └── lifeline ──►┘

* The *box* waits for init and ends with the exit status of the command: 128 + n for signal n, as
  shells have it; 125 when the box failed, 126 and 127 when the command could not be executed.
* *init* lays out the file system in a mount namespace, starts the command and reaps what is
  orphaned in the box, as Lambda's pid 1 does: children that outlive a runtime live on for as long
  as the command does. When the command ends, init ends, and then the kernel kills whatever is left
  in the PID namespace, processes that called setsid() included (pid_namespaces(7)).
* The *lifeline* is a pipe whose write end only the box has. A byte in it is a signal to pass on to
  the command. Its end means that the box is gone, however it died, and init follows.
* All three are in one process group. The signals of a terminal's Ctrl-C reach the command without
  help, so the box passes on only those that a process sent to it.

Root needs CAP_SYS_ADMIN. Any other user gets a user namespace, and is user 993 in it; the kernel
does not let that user drop supplementary groups, so they stay (user_namespaces(7)).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import functools
import os
import platform
import shutil
import signal
import struct
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, get_args

Shm = Literal["missing", "forbidden", "enosys"]

UID = 993
GID = 990
HOME = "/home/sbx_user1051"  # of Lambda's user, in whose sandbox it does not exist either
MAX_DESCRIPTORS = 1024
MAX_PROCESSES = 1024
TMP_MEGABYTES = 512

BOX_FAILED = 125
NOT_EXECUTABLE = 126
NOT_FOUND = 127

_TMP = Path("/tmp")
_DEV = Path("/dev")
_DEVICES = tuple(_DEV / name for name in ("null", "zero", "full", "random", "urandom"))
_STREAMS = tuple(_DEV / name for name in ("stdin", "stdout", "stderr"))
_CPU_LISTS = tuple(
    Path("/sys/devices/system/cpu", name) for name in ("online", "possible", "present")
)

# Holds cgroup, bpf and the like, none of which Lambda shows: the one directory that can be covered
# to hide them and that the box can put files of its own into.
_SYS_FS = Path("/sys/fs")
_STUB = _SYS_FS / "box" / "sitecustomize.py"

# They lead out of /tmp, or to somebody's home.
_FOREIGN_VARIABLES = frozenset(
    {"LOGNAME", "TEMP", "TMP", "TMPDIR", "USER", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"}
)

# Amazon Linux 2 has glibc 2.26, whose sem_open fails with ENOSYS. That of glibc 2.34 and later
# never does, whatever is mounted. The stub then makes way for a sitecustomize of the machine's own.
_STUB_SOURCE = """\
import _multiprocessing
import errno
import os
import sys


class SemLock:
    SEM_VALUE_MAX = _multiprocessing.SemLock.SEM_VALUE_MAX

    def __new__(cls, *args, **kwargs):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    _rebuild = __new__


_multiprocessing.SemLock = SemLock

stub = sys.modules.pop("sitecustomize")
sys.path.remove(os.path.dirname(__file__))
try:
    import sitecustomize
except ImportError:
    sys.modules["sitecustomize"] = stub
"""


class BoxError(Exception):
    """The box could not be made. The message says why, and what to do."""


@dataclass(frozen=True)
class Options:
    """The command, and what its box is to be like."""

    argv: list[str]
    shm: Shm = "missing"
    cpus: int | None = None
    memory: int | None = None
    bind: Sequence[str] = ()


def command(
    argv: Sequence[str | os.PathLike[str]],
    *,
    shm: Shm = "missing",
    cpus: int | None = None,
    memory: int | None = None,
    bind: Iterable[str | os.PathLike[str]] = (),
) -> list[str]:
    """Returns the command line that runs ``argv`` in a box.

    Args:
        argv: The command and its arguments.
        shm: How semaphores fail: with ENOENT, for there is no ``/dev/shm``; with EACCES, for it is
            not writable; with ENOSYS, in Python code only, by a stub.
        cpus: On how many CPUs the command may run, which is also what ``os.cpu_count()`` says
            there. None for all that there are.
        memory: MB that the command is told to have (``AWS_LAMBDA_FUNCTION_MEMORY_SIZE``). Nothing
            holds it to them.
        bind: Files and directories to be seen in the box although they lie below ``/tmp`` or below
            a directory that is closed to others. The working directory, the running interpreter
            and that of the command need not be named.
    """
    # -S -E: the box needs neither packages nor variables, and starts in half the time.
    line = [sys.executable, "-S", "-E", os.path.abspath(__file__), "--shm", shm]
    if cpus is not None:
        line += ["--cpus", str(cpus)]
    if memory is not None:
        line += ["--memory", str(memory)]
    for path in bind:
        line += ["--bind", os.fspath(path)]
    return [*line, "--", *(os.fspath(argument) for argument in argv)]


# -- The box ---------------------------------------------------------------------------------------


def _run(options: Options) -> int:
    """Runs a command in a box and returns its exit status.

    Afterwards this process is good for nothing else: its children would be born into the box.
    """
    _check(options)
    kept = _kept(options)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Ignored, it would discard the exit status.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _awaited())
    _unshare()
    read_end, write_end = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(write_end)
        _be_init(options, kept, read_end, before)
    os.close(read_end)
    return _wait(init, write_end)


def _check(options: Options) -> None:
    if sys.platform != "linux":
        raise BoxError(f"needs the namespaces of Linux, and this is {sys.platform}")
    if platform.machine() not in _MACHINES:
        known = " and ".join(_MACHINES)
        raise BoxError(f"does not know the system calls of {platform.machine()}, only of {known}")
    available = len(os.sched_getaffinity(0))
    if options.cpus is not None and not 1 <= options.cpus <= available:
        raise BoxError(f"--cpus {options.cpus}: between 1 and {available} can be had here")
    if options.memory is not None and options.memory < 1:
        raise BoxError(f"--memory {options.memory}: not a number of MB that a function can have")


def _unshare() -> None:
    uid, gid = os.getuid(), os.getgid()
    flags = _CLONE_NEWNS | _CLONE_NEWPID | (0 if _is_root() else _CLONE_NEWUSER)
    try:
        _call("unshare", flags)
    except OSError as error:
        raise BoxError(
            f"the kernel refuses new namespaces ({error.strerror}): "
            + (_NO_CAPABILITY if flags & _CLONE_NEWUSER == 0 else _NO_USER_NAMESPACES)
        ) from error
    if flags & _CLONE_NEWUSER:
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


def _wait(init: int, lifeline: int) -> int:
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
    options: Options, kept: Sequence[Path], lifeline: int, mask: Iterable[int]
) -> NoReturn:
    try:
        _lay_out(options, kept)
        child = os.fork()
        if child == 0:
            _become(options, mask)
        threading.Thread(target=_follow, args=(lifeline, child), daemon=True).start()
        os._exit(_reap_until(child))
    except BaseException as error:  # Must not return into the frames of the box
        _complain(error)
        os._exit(BOX_FAILED)


def _follow(lifeline: int, child: int) -> NoReturn:
    while received := os.read(lifeline, 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, received[0])
    os._exit(_exit_status(signal.SIGKILL))


def _reap_until(child: int) -> int:
    while True:
        pid, status = os.wait()
        if pid == child:
            return _exit_status(status)


# -- The command -----------------------------------------------------------------------------------


def _become(options: Options, mask: Iterable[int]) -> NoReturn:
    """Turns this process into the command."""
    try:
        _limit(options.cpus)
        _drop_privileges()
        _enter(os.getcwd())
        _refuse_prctl()
        _restore_signals(mask)
        _execute(options.argv, _environment(options))
    except BaseException as error:  # Must not return into the frames of init
        _complain(error)
        os._exit(BOX_FAILED)


def _limit(cpus: int | None) -> None:
    import resource  # not on Windows, where the message of _check() is to be seen

    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_DESCRIPTORS, MAX_DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
    if cpus is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])


def _drop_privileges() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
    for capability in range(last + 1):
        _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    if _is_root():
        os.setgroups([])
        os.setresgid(GID, GID, GID)
        os.setresuid(UID, UID, UID)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _enter(directory: str) -> None:
    # By its name: the inherited one may be that below a mount.
    try:
        os.chdir(directory)
    except OSError as error:
        raise BoxError(
            f"user {UID} cannot enter the working directory {directory} ({error.strerror}): "
            "let others read it (chmod o+rx), or start from another one"
        ) from error


def _refuse_prctl() -> None:
    """Makes prctl(2) fail with EPERM whatever its arguments, by a filter of seccomp(2)."""
    machine = _MACHINES[platform.machine()]
    # A jump counts from the next instruction: true first, then false.
    instructions = (
        (_BPF_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_BPF_JUMP_IF_EQUAL, 0, 3, machine.audit_arch),
        (_BPF_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_BPF_JUMP_IF_EQUAL, 1, 0, machine.prctl),
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
        (_BPF_RETURN, 0, 0, _SECCOMP_RET_ERRNO | errno.EPERM),
    )
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    _system_call(machine.seccomp, _SECCOMP_SET_MODE_FILTER, 0, header)


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
        path = [str(_STUB.parent), variables.get("PYTHONPATH", "")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return variables


def _execute(argv: list[str], variables: dict[str, str]) -> NoReturn:
    try:
        os.execvpe(argv[0], argv, variables)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        _complain(
            BoxError(
                f"cannot run {argv[0]} ({error.strerror}): user {UID} must be able to read and "
                "execute it; --bind PATH shows what lies below a closed directory or /tmp"
            )
        )
        os._exit(NOT_FOUND if missing else NOT_EXECUTABLE)


# -- What must stay visible ------------------------------------------------------------------------


def _kept(options: Options) -> list[Path]:
    """The paths without which the command could not run, none of them below another."""
    paths = {Path.cwd(), *_homes(sys.executable)}
    if found := shutil.which(options.argv[0]):
        paths.update(_homes(found))
    for name in options.bind:
        path = Path(name).absolute()
        if not path.exists():
            raise BoxError(f"--bind {name}: there is no such file or directory")
        paths |= {path, path.resolve()}
    return [path for path in sorted(paths) if paths.isdisjoint(path.parents)]


def _homes(executable: str) -> Iterator[Path]:
    """The directories that an executable needs, for every link on the way to it.

    The ``python`` of a virtual environment is a link, and so may be the directory that it leads to.
    """
    path = Path(executable).absolute()
    yield _home(path.resolve())
    yield _home(path)
    while path.is_symlink():
        path = path.parent.resolve() / path.readlink()
        yield _home(path)


def _home(executable: Path) -> Path:
    directory = Path(os.path.normpath(executable)).parent
    return directory.parent if directory.name == "bin" else directory


def _cover_of(path: Path) -> Path | None:
    """The directory above a path that has to be replaced for user 993 to get through, if any."""
    if _TMP in path.parents:
        return _TMP
    if not _is_root():
        return None
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


# -- The file system -------------------------------------------------------------------------------


def _lay_out(options: Options, kept: Sequence[Path]) -> None:
    """Gives this mount namespace the file system of Lambda.

    What stays visible is opened before anything is mounted over it, and mounted again through its
    descriptor (as ``/proc/self/fd/N``, so ``/proc`` is replaced last).
    """
    os.umask(0o022)
    _set_mount(Path("/"), _MOUNT_ATTR_RDONLY, _MS_PRIVATE, _AT_RECURSIVE)
    below: dict[Path, list[Path]] = {_TMP: []}
    for path in kept:
        if (cover := _cover_of(path)) is not None:
            below.setdefault(cover, []).append(path)
    opened = {path: os.open(path, os.O_PATH) for path in chain(_DEVICES, *below.values())}
    for directory, paths in below.items():
        with _fresh_tmp() if directory == _TMP else _covered(directory):
            for path in paths:
                _mount_again(opened[path], path)
    _lay_out_dev(options.shm, opened)
    _lay_out_sys(options)
    for descriptor in opened.values():
        os.close(descriptor)
    # It has to be that of the PID namespace: /proc/self is another process in the machine's.
    _mount("proc", Path("/proc"), _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)


def _lay_out_dev(shm: Shm, opened: dict[Path, int]) -> None:
    directory = _DEV / "shm"
    with _covered(_DEV):
        for device in _DEVICES:
            _mount_again(opened[device], device)
        for number, stream in enumerate(_STREAMS):
            stream.symlink_to(f"/proc/self/fd/{number}")
        if shm == "forbidden":
            directory.mkdir()
    if shm == "forbidden":
        # A mount that is not read-only: the error would be EROFS. Without root, 993 owns it.
        mode = 0o755 if _is_root() else 0o555
        _mount("tmpfs", directory, _MS_NOSUID | _MS_NODEV, f"mode={mode:o},size=4k")


def _lay_out_sys(options: Options) -> None:
    with _covered(_SYS_FS):
        if options.shm == "enosys":
            _STUB.parent.mkdir()
            _STUB.write_text(_STUB_SOURCE, encoding="utf-8")
        if options.cpus is not None:
            _show_cpus(options.cpus)


def _show_cpus(count: int) -> None:
    """Makes ``os.cpu_count()`` say ``count``: glibc looks into /sys, not at the affinity."""
    file = _SYS_FS / "cpus"
    file.write_text(f"0-{count - 1}\n" if count > 1 else "0\n", encoding="ascii")
    for path in _CPU_LISTS:
        _mount_bound(file, path)
    file.unlink()


@contextlib.contextmanager
def _covered(
    directory: Path, *, mode: int = 0o755, size: str = "64k", read_only: bool = True
) -> Iterator[None]:
    """Mounts a small tmpfs over a directory, writable only until the block has filled it."""
    _mount("tmpfs", directory, _MS_NOSUID | _MS_NODEV, f"mode={mode:o},size={size}")
    yield
    if read_only:
        _set_mount(directory, _MOUNT_ATTR_RDONLY)


def _fresh_tmp() -> contextlib.AbstractContextManager[None]:
    return _covered(_TMP, mode=0o1777, size=f"{TMP_MEGABYTES}m", read_only=False)


def _mount_again(descriptor: int, path: Path) -> None:
    """Mounts what a descriptor was opened for, where it was before it was covered."""
    source = Path(f"/proc/self/fd/{descriptor}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    _mount_bound(source, path)


# -- The kernel ------------------------------------------------------------------------------------


class _Machine(NamedTuple):
    audit_arch: int  # AUDIT_ARCH_* of linux/audit.h
    prctl: int
    seccomp: int


_MACHINES = {
    "x86_64": _Machine(audit_arch=0xC000003E, prctl=157, seccomp=317),
    "aarch64": _Machine(audit_arch=0xC00000B7, prctl=167, seccomp=277),
}

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000

_MS_NOSUID = 1 << 1
_MS_NODEV = 1 << 2
_MS_NOEXEC = 1 << 3
_MS_BIND = 1 << 12
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18

_SYS_MOUNT_SETATTR = 442  # on every architecture; Linux 5.12
_MOUNT_ATTR_RDONLY = 0x00000001
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000

_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_RET_ALLOW = 0x7FFF0000
_SECCOMP_RET_ERRNO = 0x00050000
_BPF_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_BPF_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_BPF_RETURN = 0x06  # BPF_RET | BPF_K


@functools.cache
def _is_root() -> bool:
    """Whether the box was started by root. Asked first, and kept, before anything changes."""
    return os.geteuid() == 0


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    libc.syscall.restype = ctypes.c_long
    return libc


def _call(name: str, *arguments: int | bytes | ctypes.c_long) -> None:
    if getattr(_libc(), name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _system_call(number: int, *arguments: int | bytes) -> None:
    # Variadic: as plain int, which ctypes passes, the upper halves of registers are undefined.
    _call("syscall", *(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))


def _mount(kind: str, target: Path, flags: int, data: str = "") -> None:
    _do_mount(kind, target, kind, flags, data)


def _mount_bound(source: Path, target: Path) -> None:
    _do_mount(str(source), target, "", _MS_BIND | _MS_REC, "")


def _do_mount(source: str, target: Path, kind: str, flags: int, data: str) -> None:
    try:
        _call(
            "mount", os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode()
        )
    except OSError as error:
        raise BoxError(
            f"the kernel refuses to mount {source} on {target} ({error.strerror}): {_NO_MOUNT}"
        ) from error


def _set_mount(path: Path, attributes: int, propagation: int = 0, flags: int = 0) -> None:
    """Calls mount_setattr(2), for which glibc has no wrapper before 2.36."""
    attr = struct.pack("=4Q", attributes, 0, propagation, 0)
    number, where = _SYS_MOUNT_SETATTR, os.fsencode(path)
    try:
        _system_call(number, _AT_FDCWD, where, flags, attr, len(attr))
    except OSError as error:
        raise BoxError(
            f"the kernel refuses to make {path} read-only ({error.strerror}): {_NO_MOUNT}"
        ) from error


_NO_MOUNT = (
    "it must be Linux 5.12 or later, and no container or security module in the way; "
    "run this as root of the machine itself"
)


# -- The command line ------------------------------------------------------------------------------


def _complain(error: BaseException) -> None:
    text = str(error) if isinstance(error, BoxError) else f"{type(error).__name__}: {error}"
    os.write(2, f"box: {text}\n".encode())


def _parse(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="box",
        usage="%(prog)s [options] -- COMMAND...",
        description="Runs a command as AWS Lambda would run it.",
    )
    add = parser.add_argument
    add("--shm", choices=get_args(Shm), default="missing", help="why semaphores fail")
    add("--cpus", type=int, metavar="N", help="how many CPUs there are")
    add("--memory", type=int, metavar="MB", help="value of AWS_LAMBDA_FUNCTION_MEMORY_SIZE")
    add(
        "--bind",
        action="append",
        default=[],
        metavar="PATH",
        help="show PATH although it lies below /tmp or a directory that is closed to others",
    )
    # Not by argparse, which would take a second "--" out of the command's own arguments.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    argv = list(arguments[end + 1 :])
    if not argv:
        parser.error("there is no command; give it after --")
    return Options(argv, options.shm, options.cpus, options.memory, options.bind)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(options)
    except (BoxError, OSError) as error:
        _complain(error)
        return BOX_FAILED


if __name__ == "__main__":
    sys.exit(main())
