"""The doctor's ward: every trial has an outcome, in time, and leaves nothing; and what is printed."""

import ctypes
import errno
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest

from asynclam import _cli, _worker, doctor
from asynclam._doctor import ward
from asynclam._doctor.trials import TRIALS, Trial, meaning
from tests.parts.processes import ended

LIMIT = 60.0  # seconds: never reached by a trial that ends


def try_out(attempt, limit=LIMIT):
    return ward.run(Trial("name", "group", attempt), limit)


def raiser(error):
    def attempt():
        raise error

    return attempt


def hang():
    threading.Event().wait()


def test_what_works():
    """A trial that returns works, and what it returns is told."""
    found = try_out(lambda: "as it should")
    assert (found.name, found.group, found.status) == ("name", "group", "works")
    assert (found.detail, found.errno, found.meaning) == ("as it should", None, "")


@pytest.mark.parametrize(
    ("error", "status", "detail", "name"),
    [
        (OSError(errno.EPERM, "no"), "fails", "no", "EPERM"),
        (FileNotFoundError(2, "gone", "/x"), "fails", "gone: '/x'", "ENOENT"),
        (OSError("without a number"), "fails", "OSError: without a number", None),
        (ValueError("other"), "fails", "ValueError: other", None),
        (SystemExit(3), "fails", "SystemExit: 3", None),
        (KeyboardInterrupt(), "fails", "KeyboardInterrupt: ", None),
        (ModuleNotFoundError("No module named 'x'"), "not installed", "No module named 'x'", None),
    ],
)
def test_what_fails(error, status, detail, name):
    """Whatever a trial raises is its outcome, an OSError by the name of its number."""
    found = try_out(raiser(error))
    assert (found.status, found.detail, found.errno) == (status, detail, name)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os._exit(7), "exited with 7"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
    ],
)
def test_what_dies(end, how):
    """A trial that takes its process with it has failed, and it is told how."""
    found = try_out(end)
    assert (found.status, found.detail) == ("fails", f"the process {how}")


def test_what_hangs():
    """A trial that does not come to an end is killed, in spite of the signals that it ignores."""

    def ignore():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        hang()

    found = try_out(ignore, 0.2)
    assert (found.status, found.detail) == ("hangs", "nothing has come within 0.2 s")


async def test_nothing_is_left():
    """What a trial has started ends with it, though it holds the trial's pipe open."""
    read, write = os.pipe()
    with closing(os.fdopen(read)) as lines:

        def leave():
            child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            if os.fork() == 0:
                signal.pause()
            os.write(write, f"{child.pid}\n".encode())
            return "left"

        assert try_out(leave).detail == "left"
        os.close(write)
        await ended(int(lines.readline()))
        assert lines.read() == ""  # the end of file: the forked one has gone, too


def test_a_trial_says_nothing(capfd):
    """What a library prints does not get into the report."""
    try_out(lambda: str(os.write(1, b"noise") + os.write(2, b"noise")))
    assert capfd.readouterr() == ("", "")


def test_a_long_answer():
    """An answer may be longer than a pipe holds."""
    assert len(try_out(lambda: "x" * 1_000_000).detail) == 1_000_000


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOENT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("kept", ["a semaphore", "shared memory"])
def test_what_an_errno_means(number, kept):
    """Each errno with which shm_open fails is told to be a matter of /dev/shm, and of what it keeps."""
    told = meaning(Trial("", "", str, in_shm=kept), OSError(number, ""))
    assert "/dev/shm" in told
    assert kept in told
    assert "/dev/shm" not in meaning(Trial("", "", str), OSError(number, ""))
    assert meaning(Trial("", "", str), ValueError()) == ""


def test_what_is_kept_in_shm():
    """Shared memory is no semaphore."""
    kept = {trial.name: trial.in_shm for trial in TRIALS}
    assert kept["SharedMemory"] == "shared memory"
    assert (kept["loky"], kept["semaphore"]) == ("a semaphore", "a semaphore")
    assert (kept["Process + Pipe"], kept["prctl"]) == ("", "")


def test_what_there_is_no_time_for():
    """Trials that there is no time for are told as such, not left out."""
    report = doctor.examine(seconds=0.0)
    assert [trial["status"] for trial in report["trials"]] == ["not tried"] * len(TRIALS)
    assert report["works"] is None


def test_what_the_time_for_all_cuts_off(monkeypatch):
    """It is not known whether that hangs: it had less than its own time, and is told as not tried."""
    trial = Trial("name", "group", hang)
    found = ward._tried(trial, 0.2)
    assert (found.name, found.group, found.status) == ("name", "group", "not tried")
    assert found.detail == "cut off after 0.2 s, when no time was left"
    monkeypatch.setattr(ward, "LIMIT", 0.2)
    assert ward._tried(trial, LIMIT).status == "hangs"


def test_what_ends_before_the_time_for_all(monkeypatch):
    """Its outcome is its own, however little was left for it."""
    monkeypatch.setattr(ward, "LIMIT", 2 * LIMIT)
    assert ward._tried(Trial("", "", str), LIMIT).status == "works"
    assert ward._tried(Trial("", "", raiser(ValueError())), LIMIT).status == "fails"


def test_what_is_tried_first(monkeypatch, capfd):
    """What is asynclam's, and last what people try, which may hang; each with its place in the report."""
    monkeypatch.setattr(ward, "run", lambda trial, limit: ward.Outcome(trial.name, "", "works"))
    monkeypatch.setattr(sys, "argv", ["ward", str(LIMIT)])
    ward.main()
    outcomes = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [TRIALS[place].name for place, _ in outcomes] == [found["name"] for _, found in outcomes]
    groups = list(dict.fromkeys(TRIALS[place].group for place, _ in outcomes))
    assert groups == [
        "asynclam itself",
        "What asynclam does without",
        "What asynclam needs",
        "One of these, for large payloads",
        "What people try",
    ]


def test_the_order_of_the_report():
    """It is that of the list, in whatever order the trials were made."""
    report = doctor.examine(seconds=0.0)
    assert [trial["name"] for trial in report["trials"]] == [trial.name for trial in TRIALS]


@pytest.mark.parametrize(
    ("status", "works"),
    [("works", True), ("fails", False), ("hangs", False), ("not tried", None), (None, None)],
)
def test_whether_it_works(monkeypatch, status, works):
    """It does if a job has had its result; it is not known where none was tried."""
    others = [{"name": "large payload", "status": "works"}]
    own = [{"name": "run_cpu", "status": status}] if status else []
    monkeypatch.setattr(doctor, "_tried", lambda _: others + own)
    assert doctor.examine()["works"] is works


def test_a_ward_that_does_not_start(monkeypatch):
    """If no fresh interpreter can be started, the report says so."""
    monkeypatch.setattr(doctor, "_START", "import sys; sys.exit('broken'); {path}")
    (trial,) = doctor.examine()["trials"]
    assert (trial["status"], trial["detail"]) == ("fails", "broken")


def test_a_setting_that_cannot_be(monkeypatch):
    """A setting that makes environment() fail is what the report tells about the machine."""
    monkeypatch.setenv("ASYNCLAM_MAX_WORKERS", "many")
    report = doctor.examine(seconds=0.0)
    assert "ASYNCLAM_MAX_WORKERS=many" in report["environment"]["error"]
    assert "The machine: ValueError: ASYNCLAM_MAX_WORKERS=many" in doctor.text(report)


@pytest.mark.parametrize(("memory", "line"), [("512", "3,008 MB"), ("5307", "5,307 MB")])
def test_the_sizes_are_printed(monkeypatch, memory, line):
    """The table of Lambda's sizes has a mark at the row of this function."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", memory)
    lines = doctor.text(doctor.examine(seconds=0.0)).splitlines()
    (marked,) = [line for line in lines if line.endswith("<- this function")]
    assert line in marked


@pytest.mark.parametrize(
    ("works", "status", "told"), [(True, 0, "true"), (False, 1, "false"), (None, 1, "null")]
)
def test_the_status_of_the_command(monkeypatch, capsys, works, status, told):
    """The command's status says whether asynclam works; what nobody has tried does not."""
    report = {**doctor.examine(seconds=0.0), "works": works}
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert _cli.main(["doctor"]) == status
    capsys.readouterr()
    assert _cli.main(["doctor", "--json"]) == status
    assert f'"works": {told}' in capsys.readouterr().out


def test_the_handler_keeps_its_time(monkeypatch, capsys):
    """As a handler it leaves a margin before the end of the invocation, and prints what it returns."""
    seen = []
    examine = doctor.examine
    monkeypatch.setattr(doctor, "examine", lambda seconds: seen.append(seconds) or examine(0.0))
    for left in (30_000, 100):
        context = SimpleNamespace(get_remaining_time_in_millis=lambda left=left: left)
        report = doctor.handler({}, context)
    assert seen == [28.0, 1.0]
    assert capsys.readouterr().out == 2 * (doctor.text(report) + "\n")


def test_a_ward_that_is_stuck(monkeypatch):
    """It is killed when the time is over, and the report says so."""
    monkeypatch.setattr(doctor, "_MARGIN", 0.0)
    monkeypatch.setattr(doctor, "_START", "import signal; signal.pause()  # {path}")
    (outcome,) = doctor._tried(0.0)
    assert (outcome["name"], outcome["status"]) == ("trials", "fails")
    assert outcome["detail"] == "status -9"


def test_what_is_said_of_a_package_that_is_not_installed():
    """Its status says it all."""
    outcome = {"status": "not installed", "detail": "No module named 'x'", "errno": None}
    assert doctor._said(outcome) == ""


def test_the_standard_streams_of_a_job_that_is_interrupted(monkeypatch):
    """Ctrl-C while they are flushed is not taken for one of their errors."""

    class Stream:
        def flush(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdout", Stream())
    with pytest.raises(KeyboardInterrupt):
        _worker.flush()


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_each_trial_ends_by_itself(trial):
    """It works, fails or is not installed; it hangs nowhere, and needs nobody to kill it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        for stream in range(3):
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        os.write(write_end, ward._found(trial)["status"].encode())
        os._exit(0)
    os.close(write_end)
    try:
        assert select.select([read_end], [], [], LIMIT)[0]
        status = os.read(read_end, 100).decode()
    finally:
        os.close(read_end)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        ward._kill_group(pid)  # what it has started, such as a tracker of resources
        os.waitpid(pid, 0)
    assert status in {"works", "fails", "not installed"}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("no x"), {"status": "not installed", "detail": "no x"}),
        (FileNotFoundError(2, "gone", "/x"), {"detail": "gone: '/x'", "errno": "ENOENT"}),
        (OSError(errno.EPERM, "no"), {"detail": "no", "errno": "EPERM"}),
        (ValueError("why"), {"status": "fails", "detail": "ValueError: why", "errno": None}),
    ],
)
def test_what_a_trial_has_found(error, told):
    """The error, by the name of its number if it has one, and what it means."""
    assert told.items() <= ward._found(Trial("name", "group", raiser(error))).items()


def test_a_trial_that_leads_no_group_yet():
    """It is killed by itself then."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    ward._kill_group(pid)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.close(read_end)
    os.close(write_end)


def test_what_a_trial_refuses(monkeypatch):
    """A result that is another one, a limit that is too low, and none at all."""
    from asynclam._doctor import trials

    with pytest.raises(ValueError, match="instead of 1"):
        trials._expect_one(2)
    limits = {"soft": 8}
    monkeypatch.setattr("resource.getrlimit", lambda _: (limits["soft"], 0))
    with pytest.raises(OSError, match="no more than 8"):
        trials._open_files()
    limits["soft"] = resource.RLIM_INFINITY
    assert trials._open_files() == "no limit"
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(prctl=lambda *_: -1))
    ctypes.set_errno(errno.EPERM)
    with pytest.raises(PermissionError):
        trials._prctl()
    monkeypatch.setattr(trials, "_job", lambda fn, *args: os.getpid())
    assert trials._run_cpu().startswith("inline")
    with pytest.raises(ValueError, match="another one"):
        trials._large_payload()
