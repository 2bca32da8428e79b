"""What the processes hold: nothing that others can reach, and nothing that a program inherits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asynclam

ROOT = Path(asynclam.__file__).parent.parent
SEGMENT = re.compile(r"/memfd:asynclam \(deleted\)|.*/asynclam-\w+ \(deleted\)|.*/#\d+ \(deleted\)")
KINDS = {  # what each process may hold beside standard input and output
    "loop process": {"socket", "pipe", "segment"},
    "fork server": {"socket", "pipe", "pidfd", "nothing"},
    "worker": {"socket", "pipe", "segment", "nothing"},
    "a job's program": set(),
    "its own program": set(),
}


@pytest.fixture(scope="module", params=["fork", "spawn"])
def processes(request, tmp_path_factory):
    """The descriptors of each process, by role, and the directory for temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.parts.open_files", request.param],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:  # fmt: skip
        said = json.loads(process.stdout.readline())
        found = {role: descriptors(pid) for role, pid in said["pids"].items()}
        for number in said["before"]:
            found["loop process"].pop(number, None)
        left = list(temporary.iterdir())
        sockets = unix_sockets()
        process.stdin.close()
        assert process.wait() == 0
    return found, left, sockets


def descriptors(pid):
    """What a process has open above standard error, by number: the file, and whether exec closes it."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if int(entry.name) > 2:
            info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
            flags = int(re.search(r"flags:\s*(\d+)", info)[1], 8)
            found[int(entry.name)] = entry.readlink().as_posix(), bool(flags & os.O_CLOEXEC)
    return found


def unix_sockets():
    """All of this machine, by inode: whether they listen, and their names."""
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *name = line.split(maxsplit=7)
        found[inode] = bool(int(flags, 16)), name
    return found


def kind(file):
    if match := re.match(r"(socket|pipe):|anon_inode:\[(pidfd)\]", file):
        return match[1] or match[2]
    if SEGMENT.fullmatch(file):
        return "segment"
    return "nothing" if file == os.devnull else file


@pytest.mark.parametrize("role", KINDS)
def test_what_each_process_holds(processes, role):
    """No file of the loop process, no connection of a sibling; in programs nothing at all."""
    found, _, _ = processes
    assert {kind(file) for file, _ in found[role].values()} <= KINDS[role]


def test_everything_is_closed_by_exec(processes):
    """No program that anybody starts inherits a connection or a segment."""
    found, _, _ = processes
    kept = [(role, file) for role in found for file, closed in found[role].values() if not closed]
    assert not kept


def test_connections(processes):
    """Sockets are pairs without a name, that nobody can connect to: there is no network."""
    found, _, sockets = processes
    inodes = [
        re.search(r"\d+", file)[0]
        for held in found.values() for file, _ in held.values() if kind(file) == "socket"
    ]  # fmt: skip
    assert len(inodes) >= 6  # master, control and channel, at both ends
    assert [sockets.get(inode) for inode in inodes] == [(False, [])] * len(inodes)


def test_no_name_in_the_file_system(processes):
    """However memory is shared, it has no name that another process could open."""
    _, left, _ = processes
    assert not left
