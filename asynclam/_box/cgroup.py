"""A control group that gives the box the memory and the time on CPUs of a Lambda function.

Theory of operation. The box makes the group before it leaves the machine's namespaces, and init
enters it: all that is in the box is then held to it, as a Lambda sandbox is, and the box itself is
not. Only an empty group can be removed, and only from outside the box, where the file system is not
read-only. So that is done by a *sweeper*, a child of the box that stays outside and waits for the
end of a pipe: the box closes its end when init is gone, and the kernel closes it if the box is killed.
The sweeper has a process group of its own: what kills the box may kill that of the box.

In version 1 each controller has a hierarchy of its own, and the group is made below the box's. In
version 2 a group that has processes cannot give controllers to others, so it is made beside the box's
or beside a group above that, the first where it is permitted (cgroups(7)): by root, or in what
systemd has delegated to the user.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from asynclam import _cgroup, _sizing

_PERIOD = 20_000  # microseconds: a small function's pauses last no longer
_CONTROLLERS = ("cpu", "memory")

_SECONDS_TO_SWEEP = 10.0  # after a kill of the box, whose processes end on their own time
_SECONDS_BETWEEN_TRIES = 0.01


class Group:
    """The control group of a box, or none.

    Args:
        directories: those that make it, one for each hierarchy.
    """

    def __init__(self, directories: list[Path]) -> None:
        self._directories = directories
        self._sweeper: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, memory: int | None, complain: Callable[[str], None], proc: str = "/proc/self"
    ) -> Group:
        """Makes the group of a function with ``memory`` MB; none, and a complaint, if it must not.

        Args:
            memory: ``None``: there is nothing to hold anybody to.
            complain: told why there is no group.
            proc: this process's directory in procfs.
        """
        if memory is None:
            return cls([])
        try:
            group = cls(_make(memory, proc))
        except OSError as error:
            complain(
                f"the time on CPUs and the memory are not held to those of {memory} MB, because no "
                f"control group can be made ({error.strerror}: {error.filename}): it takes root, "
                "or a group that systemd has delegated (systemd-run --user --scope)"
            )
            return cls([])
        group._watch()
        return group

    def enter(self) -> None:
        """Moves this process into the group."""
        for directory in self._directories:
            _write(directory / "cgroup.procs", "0")

    def remove(self) -> None:
        """Removes the group, in which no process is left."""
        if self._sweeper is not None:
            pid, pipe = self._sweeper
            self._sweeper = None
            os.close(pipe)
            os.waitpid(pid, 0)

    def _watch(self) -> None:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:  # pragma: no cover - in a frame that coverage has left
            try:
                os.close(write_end)
                # The box's end is what counts here.
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                os.read(read_end, 1)
                _sweep(self._directories)
            finally:
                os._exit(0)
        os.setpgid(pid, pid)  # here, so that it is done before the box goes on
        os.close(read_end)
        self._sweeper = pid, write_end


def _make(memory: int, proc: str) -> list[Path]:
    name = f"asynclam-box-{os.getpid()}"
    made: list[Path] = []
    try:
        for controllers, parents in _places(proc):
            made.append(_first(parents, name, controllers))
            for controller in controllers:
                _set(made[-1], controller, memory)
    except OSError:
        _sweep(made)
        raise
    return made


def _places(proc: str) -> Iterator[tuple[tuple[str, ...], Iterator[Path]]]:
    """The controllers of each hierarchy, and where in it the group may be made, best first."""
    if _cgroup.group(proc, "cpu")[0] == 1:
        for controller in _CONTROLLERS:
            yield (controller,), map(Path, _cgroup.directories(proc, controller))
    else:
        above = map(Path, _cgroup.directories(proc, "cpu"))
        first = next(above, None)
        beside = iter([first]) if first and not (first / "cgroup.type").exists() else above
        yield _CONTROLLERS, beside  # only the root of all has no type, and may have processes


def _first(parents: Iterator[Path], name: str, controllers: tuple[str, ...]) -> Path:
    refused: OSError = FileNotFoundError(2, "no control groups are mounted", "/sys/fs/cgroup")
    for parent in parents:
        try:
            if len(controllers) > 1:
                _enable(parent, controllers)
            (parent / name).mkdir()
        except OSError as error:
            refused = error  # perhaps the next one up is not
        else:
            return parent / name
    raise refused


def _enable(parent: Path, controllers: tuple[str, ...]) -> None:
    """Gives the children of a group of version 2 controllers, if they have them not."""
    file = parent / "cgroup.subtree_control"
    missing = set(controllers) - set(file.read_text(encoding="ascii").split())
    if missing:
        _write(file, " ".join(f"+{controller}" for controller in sorted(missing)))


def _set(directory: Path, controller: str, memory: int) -> None:
    quota = max(1000, round(memory / _sizing.MEGABYTES_PER_CPU * _PERIOD))  # the kernel's least
    limit = str(memory << 20)
    if controller == "cpu" and (directory / "cpu.max").exists():
        _write(directory / "cpu.max", f"{quota} {_PERIOD}")
    elif controller == "cpu":
        _write(directory / "cpu.cfs_period_us", str(_PERIOD))
        _write(directory / "cpu.cfs_quota_us", str(quota))
    elif (directory / "memory.max").exists():
        _write(directory / "memory.max", limit)
        _write_if_there(directory / "memory.swap.max", "0")
    else:
        _write(directory / "memory.limit_in_bytes", limit)
        _write_if_there(directory / "memory.memsw.limit_in_bytes", limit)


def _write(path: Path, text: str) -> None:
    # Not truncated, not created: these are no ordinary files.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _write_if_there(path: Path, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # a machine without swap accounting
        _write(path, text)


def _sweep(directories: list[Path]) -> None:
    """Removes groups, as soon as they are empty."""
    deadline = time.monotonic() + _SECONDS_TO_SWEEP
    for directory in directories:
        while directory.exists():
            try:
                directory.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    return
                select.select([], [], [], _SECONDS_BETWEEN_TRIES)  # no event tells it everywhere
