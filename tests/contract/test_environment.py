"""How many workers suit the machine, and what `environment()` says of it."""

import dataclasses
import os
import re
from pathlib import Path

import pytest

import asynclam
from asynclam import Executor, _cgroup, _memory, _sizing, environment

DOCS = Path(asynclam.__file__).parent.parent / "docs" / "lambda.md"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """Nothing of Lambda, no override, no quota: tests say what there is."""
    for name in [name for name in os.environ if name.startswith("AWS_LAMBDA_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv(_sizing.VARIABLE, raising=False)
    monkeypatch.setattr(_cgroup, "cpu_quota", lambda: None)
    monkeypatch.setattr(_cgroup, "memory_limit", lambda: None)


# --- how many workers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "share", "processes", "workers"),
    [
        (2, 128 / 1769, 1, 1),
        (2, 1769 / 1769, 1, 1),
        (2, 1770 / 1769, 1, 2),
        (2, 3008 / 1769, 1, 2),
        (3, 3009 / 1769, 1, 2),
        (6, 10240 / 1769, 1, 6),
        (1, 10240 / 1769, 1, 1),
        (8, None, 1, 8),
        (0, None, 1, 1),
        (8, 0.5, 1, 1),
        (8, 2.5, 1, 3),
        (8, None, 3, 3),
        (8, 4.0, 2, 2),
        (2, None, 32, 1),
    ],
)
def test_workers_for(cpus, share, processes, workers):
    """As many as the CPUs' time suffices for, rounded up, in equal parts; at least one."""
    assert _sizing.workers_for(cpus, share, processes) == workers


@pytest.mark.parametrize(("value", "memory"), [("512", 512), ("", None), ("lots", None)])
def test_lambda_memory(monkeypatch, value, memory):
    """The memory is what the runtime says; nothing else counts as Lambda."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", value)
    assert _sizing.lambda_memory() == memory


def test_a_small_function(monkeypatch):
    """A small function has one worker, however many CPUs it sees, and no quota is looked for."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "512")
    monkeypatch.setattr(_sizing, "usable_cpus", lambda: 6)
    monkeypatch.setattr(_cgroup, "cpu_quota", lambda: 5.0)
    assert _sizing.default_workers() == 1


def test_managed_instances(monkeypatch):
    """The processes of Managed Instances share the vCPUs that their memory comes with at most."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "16384")
    monkeypatch.setenv("AWS_LAMBDA_MAX_CONCURRENCY", "4")
    monkeypatch.setattr(_sizing, "usable_cpus", lambda: 64)
    assert _sizing.default_workers() == 2
    found = environment()
    assert (found.place, found.processes, found.cpu_share) == ("Lambda Managed Instances", 4, 8.0)
    assert "shared by 4 processes" in found.why


def test_a_quota_elsewhere(monkeypatch):
    """The quota of a container counts, not the CPUs of the machine that it is on."""
    monkeypatch.setattr(_sizing, "usable_cpus", lambda: 64)
    monkeypatch.setattr(_cgroup, "cpu_quota", lambda: 1.5)
    assert _sizing.default_workers() == 2
    assert environment().why == (
        "2 workers: 64 usable CPUs, the control group may use the time of 1.50 CPUs"
    )


@pytest.mark.parametrize(
    ("cpus", "share", "processes", "workers", "threads"),
    [
        (8, None, 1, 1, 8),
        (8, None, 1, 3, 2),
        (8, None, 1, 16, 1),
        (64, 2.0, 1, 2, 1),
        (64, 2.0, 1, 1, 2),
        (2, 0.3, 1, 1, 1),
        (64, 32.0, 16, 1, 2),
    ],
)
def test_threads_for(monkeypatch, cpus, share, processes, workers, threads):
    """All workers together have as many threads as CPUs' time suffices for, as with workers."""
    monkeypatch.setattr(_sizing, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(_sizing, "cpu_share", lambda: share)
    monkeypatch.setattr(_sizing, "processes", lambda: processes)
    assert _sizing.threads_for(workers) == threads


@pytest.mark.parametrize("value", [0, 1, 7])
def test_the_override(monkeypatch, value):
    """ASYNCLAM_MAX_WORKERS is the default of max_workers; an argument is stronger."""
    monkeypatch.setenv("ASYNCLAM_MAX_WORKERS", str(value))
    assert Executor().statistics().max_workers == value
    assert Executor(max_workers=3).statistics().max_workers == 3
    assert environment().max_workers == value
    assert "ASYNCLAM_MAX_WORKERS says so" in environment().why


@pytest.mark.parametrize("value", ["-1", "many", "1.5", " "])
def test_an_override_that_is_no_number(monkeypatch, value):
    """A value that means nothing is an error, not the default."""
    monkeypatch.setenv("ASYNCLAM_MAX_WORKERS", value)
    with pytest.raises(ValueError, match=f"ASYNCLAM_MAX_WORKERS={value} is no number of workers"):
        Executor()


# --- Environment ---------------------------------------------------------------------------------


def test_environment_elsewhere(monkeypatch):
    """Outside Lambda: the CPUs that this process may run on, and the machine's memory."""
    monkeypatch.setattr(_sizing, "usable_cpus", lambda: 1)
    found = environment()
    assert (found.place, found.initialization, found.lambda_memory) == ("elsewhere", None, None)
    assert (found.max_workers, found.why) == (1, "1 worker: 1 usable CPU")
    assert found.memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.max_workers = 2  # type: ignore[misc]


def test_environment_on_lambda(monkeypatch):
    """On Lambda the memory size tells the rest, and how the sandbox was made is said, too."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "3538")
    monkeypatch.setenv("AWS_LAMBDA_INITIALIZATION_TYPE", "snap-start")
    monkeypatch.setattr(_sizing, "usable_cpus", lambda: 3)
    found = environment()
    assert (found.place, found.initialization) == ("Lambda", "snap-start")
    assert (found.memory, found.cpu_share) == (3538 << 20, 2.0)
    assert found.why == (
        "2 workers: 3 usable CPUs, 3538 MB of memory are given the time of 2.00 CPUs"
    )


@pytest.mark.parametrize("way", ["memfd", "syscall", "file", "stream"])
def test_how_payloads_travel(monkeypatch, way):
    """What is said of segments has been tried."""
    monkeypatch.setenv("ASYNCLAM_SEGMENTS", way)
    monkeypatch.setattr(_memory, "_chosen", None)
    monkeypatch.setattr(_memory, "_streamed", None)
    assert environment().segments == way


# --- control groups ------------------------------------------------------------------------------


def test_memory_is_that_of_the_group(monkeypatch):
    """A container's limit counts, where it is less than what the machine has."""
    monkeypatch.setattr(_cgroup, "memory_limit", lambda: 512 << 20)
    assert _sizing.memory() == 512 << 20


class Proc:
    """A procfs and mounts of cgroup file systems that a test has laid out."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.proc = str(directory / "proc")
        Path(self.proc).mkdir()
        self.mounts: list[str] = []

    def group(self, *lines: str) -> None:
        Path(self.proc, "cgroup").write_bytes(os.fsencode("".join(f"{line}\n" for line in lines)))

    def mount(self, kind: str, options: str, root: str = "/", at: Path | None = None) -> Path:
        mount = at or self.directory / f"mount {len(self.mounts)}"
        mount.mkdir(exist_ok=True)
        escaped = str(mount).replace(" ", r"\040")
        self.mounts.append(f"30 23 0:26 {root} {escaped} rw shared:9 - {kind} {kind} {options}\n")
        other = "22 1 8:1 / / rw - ext4 /dev/cpu rw,cpu\n"
        Path(self.proc, "mountinfo").write_bytes(os.fsencode("".join([other, *self.mounts])))
        return mount


@pytest.fixture
def proc(tmp_path, monkeypatch) -> Proc:
    monkeypatch.undo()
    return Proc(tmp_path)


def files(directory: Path, **contents: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (directory / name.replace("__", ".")).write_text(content)
    return directory


def test_version_2(proc):
    """The least quota and limit on the way up to the root count."""
    proc.group("0::/a/b")
    mount = proc.mount("cgroup2", "rw,nsdelegate")
    files(mount / "a", cpu__max="150000 100000\n", memory__max="max\n")
    files(mount / "a" / "b", cpu__max="max 100000\n", memory__max="1048576\n")
    assert _cgroup.cpu_quota(proc.proc) == 1.5
    assert _cgroup.memory_limit(proc.proc) == 1 << 20


def test_version_1(proc):
    """Each controller has a mount of its own, and -1 is no quota."""
    proc.group("4:memory:/m", "3:cpu,cpuacct:/c/d", "0::/elsewhere")
    cpu = proc.mount("cgroup", "rw,cpu,cpuacct")
    memory = proc.mount("cgroup", "rw,memory")
    unified = proc.mount("cgroup2", "rw")
    files(cpu / "c" / "d", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    files(cpu / "c", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    files(memory / "m", memory__limit_in_bytes="4096\n")
    files(unified / "elsewhere", cpu__max="10000 100000\n", memory__max="1\n")
    assert _cgroup.cpu_quota(proc.proc) == 0.5
    assert _cgroup.memory_limit(proc.proc) == 4096


@pytest.mark.parametrize(
    ("group", "root"),
    [
        ("/docker/1234", "/docker/1234"),  # version 1: the mount begins at the container's group
        ("/docker/1234/below", "/docker/1234"),
        ("/../../elsewhere", "/"),  # a path that this namespace cannot see
        ("/", "/"),
    ],
)
def test_in_a_container(proc, group, root):
    """The root of a container's mount is its own group, whatever the machine calls that."""
    proc.group(f"3:cpu:{group}")
    mount = proc.mount("cgroup", "rw,cpu", root)
    files(mount, cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    assert _cgroup.cpu_quota(proc.proc) == 2.0


def test_a_path_is_not_a_prefix(proc):
    """/docker/12 does not lie below /docker/1."""
    proc.group("3:cpu:/docker/12")
    mount = proc.mount("cgroup", "rw,cpu", "/docker/1")
    files(mount / "2", cpu__cfs_quota_us="1\n", cpu__cfs_period_us="1\n")
    assert _cgroup.cpu_quota(proc.proc) is None


def test_paths_that_are_no_text(proc):
    """What is mounted where, and under which name, are bytes; a line ends with a newline only."""
    odd = os.fsdecode(b"caf\xe9\x0c") + "\u0142 \u2028"
    proc.group(f"1:name={odd}:/", f"0::/{odd}")
    mount = proc.mount("cgroup2", "rw", at=proc.directory / odd)
    files(mount / odd, cpu__max="50000 100000\n", memory__max="4096\n")
    assert _cgroup.cpu_quota(proc.proc) == 0.5
    assert _cgroup.memory_limit(proc.proc) == 4096


@pytest.mark.parametrize(
    ("group", "roots", "best", "way_up"),
    [
        ("/k/p", ["/other", "/"], 1, ["k/p", "k", ""]),
        ("/k/p", ["/k/p", "/k", "/other"], 1, ["p", ""]),  # more of the way up is seen there
        ("/../x/p", ["/", "/../x", "/.."], 2, ["x/p", "x", ""]),  # above this namespace's root
        ("/k", ["/other", "/more"], 0, [""]),
    ],
)
def test_several_mounts(proc, group, roots, best, way_up):
    """That counts which shows this process's group, and most of those above it."""
    proc.group(f"0::{group}")
    mounts = [proc.mount("cgroup2", "rw", root) for root in roots]
    assert list(_cgroup.directories(proc.proc, "cpu")) == [
        os.path.join(mounts[best], below) if below else str(mounts[best]) for below in way_up
    ]


def test_a_mount_that_is_hidden(proc):
    """What is mounted over another mount is what is seen there."""
    proc.group("0::/k/p")
    mount = proc.mount("cgroup2", "rw", "/")
    proc.mount("cgroup2", "rw", "/k", mount)
    files(mount / "p", cpu__max="50000 100000\n")
    assert _cgroup.cpu_quota(proc.proc) == 0.5


def test_no_groups(proc):
    """Without procfs, without mounts, or without limits there is none."""
    assert _cgroup.cpu_quota(proc.proc) is None
    proc.group("0::/")
    assert _cgroup.memory_limit(proc.proc) is None
    proc.mount("cgroup2", "rw")
    assert _cgroup.cpu_quota(proc.proc) is None
    assert _cgroup.memory_limit(proc.proc) is None


def test_on_this_machine(monkeypatch):
    """What this machine says can be read, and limits nothing to nothing."""
    monkeypatch.undo()
    assert (_cgroup.cpu_quota() or 1) > 0
    assert (_cgroup.memory_limit() or 1) > 0


# --- Lambda's sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "cpus"), [(128, 2), (3008, 2), (3009, 3), (7076, 4), (10240, 6), (99999, 6)]
)
def test_visible_on_lambda(memory, cpus):
    """The table of sizes says how many CPUs a function sees."""
    assert _sizing.visible_on_lambda(memory) == cpus


def test_the_table_in_the_docs():
    """docs/lambda.md has the sizes that the code has."""
    rows = re.findall(
        r"^\| ([\d,]+) MB \| (\d) \| ([\d.]+) \| (\d) \|$", DOCS.read_text(), re.MULTILINE
    )
    assert rows == [
        (f"{memory:,}", str(cpus), f"{memory / _sizing.MEGABYTES_PER_CPU:.2f}", str(workers))
        for memory, cpus in _sizing.SIZES
        for workers in [_sizing.workers_for(cpus, memory / _sizing.MEGABYTES_PER_CPU)]
    ]


def test_a_system_that_does_not_say_where_a_process_may_run(monkeypatch):
    """There, all CPUs that there are count."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert _sizing.usable_cpus() == 7
