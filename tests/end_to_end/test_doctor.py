"""`asynclam doctor` on this machine, in each kind of box, and as a handler under the emulator."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import asynclam
from asynclam._box import box
from tests.parts.emulator import emulator

ROOT = Path(asynclam.__file__).parent.parent
COMMAND = [sys.executable, "-m", "asynclam", "doctor", "--json"]
SEMAPHORES = {
    "ProcessPoolExecutor", "multiprocessing.Pool", "multiprocessing.pool.ThreadPool",
    "multiprocessing.Queue", "multiprocess.Pool", "loky", "semaphore",
}  # fmt: skip
NAMES = {"missing": "ENOENT", "forbidden": "EACCES", "enosys": "ENOSYS"}


def report_of(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def statuses(report):
    return {trial["name"]: trial["status"] for trial in report["trials"]}


def check_box(report, shm):
    """All that makes a semaphore fails as it does in that box, and all else works but prctl."""
    for trial in report["trials"]:
        if trial["name"] in SEMAPHORES:
            assert (trial["status"], trial["errno"]) == ("fails", NAMES[shm]), trial
            assert "/dev/shm" in trial["meaning"]
            assert "a semaphore" in trial["meaning"]
        elif trial["name"] == "SharedMemory":
            assert trial["status"] == "fails"
            assert "/dev/shm" in trial["meaning"]
            assert "shared memory" in trial["meaning"]
    others = {k: v for k, v in statuses(report).items() if k not in {*SEMAPHORES, "SharedMemory"}}
    assert others.pop("prctl") == "fails"
    assert set(others.values()) == {"works"}, others


def test_this_machine():
    """On whatever this is, a box or not, asynclam works, and the doctor leaves no process."""
    mark = f"ASYNCLAM_DOCTOR_TEST={uuid.uuid4().hex}"
    report = report_of(["env", mark, *COMMAND])
    assert report["works"]
    assert report["asynclam"] == asynclam.__version__
    assert report["environment"]["max_workers"] == asynclam.environment().max_workers
    found = statuses(report)
    assert {found["fork"], found["SCM_RIGHTS"], found["Process + Pipe"]} == {"works"}
    if shm := os.environ.get("ASYNCLAM_BOX"):
        check_box(report, shm)
    assert not [path for path in Path("/proc").glob("[0-9]*/environ") if mark in text_of(path)]


def text_of(path):
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


@pytest.mark.outside
@pytest.mark.alone
@pytest.mark.parametrize("shm", NAMES)
def test_in_a_box(shm):
    """In each kind of box, the report has the errno of that box, and what it means."""
    report = report_of(box.command(COMMAND, shm=shm, memory=1024, bind=[ROOT]))
    assert report["works"]
    check_box(report, shm)
    assert report["environment"]["place"] == "Lambda"
    assert report["environment"]["max_workers"] == 1


@pytest.mark.outside
def test_as_a_handler():
    """Deployed as it is, the handler prints the report into the log, and returns it."""
    with emulator("asynclam.doctor.handler", cwd=ROOT, box=True, memory=3008) as function:
        report = function.invoke({"any": "event"})
        assert "fails         multiprocessing.Pool" in function.log
        assert "<- this function" in function.log
    assert report["works"]
    check_box(report, "missing")
