"""What the box asks of the Linux kernel: system calls that Python has no functions for."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path
from typing import NamedTuple


class BoxError(Exception):
    """The box could not be made. The message says why, and what to do."""


class Machine(NamedTuple):
    audit_arch: int  # AUDIT_ARCH_* of linux/audit.h
    prctl: int
    seccomp: int


MACHINES = {
    "x86_64": Machine(audit_arch=0xC000003E, prctl=157, seccomp=317),
    "aarch64": Machine(audit_arch=0xC00000B7, prctl=167, seccomp=277),
}

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18

_SYS_MOUNT_SETATTR = 442  # on every architecture; Linux 5.12
MOUNT_ATTR_RDONLY = 0x00000001
_AT_FDCWD = -100
AT_RECURSIVE = 0x8000

PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
BPF_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
BPF_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
BPF_RETURN = 0x06  # BPF_RET | BPF_K


@functools.cache
def is_root() -> bool:
    """Whether the box was started by root. Asked first, and kept, before anything changes."""
    return os.geteuid() == 0


@functools.cache
def libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    libc.syscall.restype = ctypes.c_long
    return libc


def call(name: str, *arguments: int | bytes | ctypes.c_long) -> None:
    if getattr(libc(), name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def system_call(number: int, *arguments: int | bytes) -> None:
    # Variadic: as plain int, which ctypes passes, the upper halves of registers are undefined.
    call("syscall", *(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))


def mount(kind: str, target: Path, flags: int, data: str = "") -> None:
    _do_mount(kind, target, kind, flags, data)


def mount_bound(source: Path, target: Path) -> None:
    _do_mount(str(source), target, "", MS_BIND | MS_REC, "")


def _do_mount(source: str, target: Path, kind: str, flags: int, data: str) -> None:
    try:
        call("mount", os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode())
    except OSError as error:
        raise BoxError(
            f"the kernel refuses to mount {source} on {target} ({error.strerror}): {_NO_MOUNT}"
        ) from error


def set_mount(path: Path, attributes: int, propagation: int = 0, flags: int = 0) -> None:
    """Calls mount_setattr(2), for which glibc has no wrapper before 2.36."""
    attr = struct.pack("=4Q", attributes, 0, propagation, 0)
    number, where = _SYS_MOUNT_SETATTR, os.fsencode(path)
    try:
        system_call(number, _AT_FDCWD, where, flags, attr, len(attr))
    except OSError as error:
        raise BoxError(
            f"the kernel refuses to make {path} read-only ({error.strerror}): {_NO_MOUNT}"
        ) from error


_NO_MOUNT = (
    "it must be Linux 5.12 or later, and no container or security module in the way; "
    "run this as root of the machine itself"
)
