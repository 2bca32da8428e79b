"""The file system of the box: what of the machine stays visible, and what takes the place of the rest."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from . import kernel
from .kernel import BoxError

Shm = Literal["missing", "forbidden", "enosys"]

TMP_MEGABYTES = 512

_TMP = Path("/tmp")  # noqa: S108 - the one that it covers
_DEV = Path("/dev")
_DEVICES = tuple(_DEV / name for name in ("null", "zero", "full", "random", "urandom"))
_STREAMS = tuple(_DEV / name for name in ("stdin", "stdout", "stderr"))
_CPU_LISTS = tuple(
    Path("/sys/devices/system/cpu", name) for name in ("online", "possible", "present")
)

# Holds cgroup, bpf and the like, none of which Lambda shows: the one directory that can be covered
# to hide them and that the box can put files of its own into.
_SYS_FS = Path("/sys/fs")
STUB = _SYS_FS / "box" / "sitecustomize.py"


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


# -- What must stay visible ------------------------------------------------------------------------


def kept(program: str, bind: Sequence[str]) -> list[Path]:
    """The paths without which the command could not run, none of them below another."""
    paths = {Path.cwd(), *_homes(sys.executable)}
    if found := shutil.which(program):
        paths.update(_homes(found))
    for name in bind:
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
    if not kernel.is_root():
        return None
    return next((p for p in reversed(path.parents) if not p.stat().st_mode & 0o001), None)


# -- The file system -------------------------------------------------------------------------------


def lay_out(
    shm: Shm, cpus: int | None, kept: Sequence[Path]
) -> None:  # pragma: no cover - in the box
    """Gives this mount namespace the file system of Lambda.

    What stays visible is opened before anything is mounted over it, and mounted again through its
    descriptor (as ``/proc/self/fd/N``, so ``/proc`` is replaced last).
    """
    os.umask(0o022)
    kernel.set_mount(Path("/"), kernel.MOUNT_ATTR_RDONLY, kernel.MS_PRIVATE, kernel.AT_RECURSIVE)
    below: dict[Path, list[Path]] = {_TMP: []}
    for path in kept:
        if (cover := _cover_of(path)) is not None:
            below.setdefault(cover, []).append(path)
    opened = {path: os.open(path, os.O_PATH) for path in chain(_DEVICES, *below.values())}
    for directory, paths in below.items():
        with _fresh_tmp() if directory == _TMP else _covered(directory):
            for path in paths:
                _mount_again(opened[path], path)
    _lay_out_dev(shm, opened)
    _lay_out_sys(shm, cpus)
    for descriptor in opened.values():
        os.close(descriptor)
    # It has to be that of the PID namespace: /proc/self is another process in the machine's.
    kernel.mount("proc", Path("/proc"), kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)


def _lay_out_dev(shm: Shm, opened: dict[Path, int]) -> None:  # pragma: no cover - in the box
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
        mode = 0o755 if kernel.is_root() else 0o555
        kernel.mount(
            "tmpfs", directory, kernel.MS_NOSUID | kernel.MS_NODEV, f"mode={mode:o},size=4k"
        )


def _lay_out_sys(shm: Shm, cpus: int | None) -> None:  # pragma: no cover - in the box
    with _covered(_SYS_FS):
        if shm == "enosys":
            STUB.parent.mkdir()
            STUB.write_text(_STUB_SOURCE, encoding="utf-8")
        if cpus is not None:
            _show_cpus(cpus)


def _show_cpus(count: int) -> None:  # pragma: no cover - in the box
    """Makes ``os.cpu_count()`` say ``count``: glibc looks into /sys, not at the affinity."""
    file = _SYS_FS / "cpus"
    file.write_text(f"0-{count - 1}\n" if count > 1 else "0\n", encoding="ascii")
    for path in _CPU_LISTS:
        kernel.mount_bound(file, path)
    file.unlink()


@contextlib.contextmanager
def _covered(
    directory: Path, *, mode: int = 0o755, size: str = "64k", read_only: bool = True
) -> Iterator[None]:  # pragma: no cover - in the box
    """Mounts a small tmpfs over a directory, writable only until the block has filled it."""
    kernel.mount(
        "tmpfs", directory, kernel.MS_NOSUID | kernel.MS_NODEV, f"mode={mode:o},size={size}"
    )
    yield
    if read_only:
        kernel.set_mount(directory, kernel.MOUNT_ATTR_RDONLY)


def _fresh_tmp() -> contextlib.AbstractContextManager[None]:  # pragma: no cover - in the box
    return _covered(_TMP, mode=0o1777, size=f"{TMP_MEGABYTES}m", read_only=False)


def _mount_again(descriptor: int, path: Path) -> None:  # pragma: no cover - in the box
    """Mounts what a descriptor was opened for, where it was before it was covered."""
    source = Path(f"/proc/self/fd/{descriptor}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    kernel.mount_bound(source, path)
