"""Runs trials, each in a process of its own that ends with all that it has started.

Theory of operation::

    doctor ──exec──► ward ──fork──► one trial after the other
      ◄── stdout ─────┘ ◄── pipe ───┘

The *ward* is a fresh interpreter with one thread: whatever the doctor's process is (a Lambda runtime,
a shell, a server with threads), a fork here is a clean one. Each *trial* leads a process group. It
sends one line; the group is killed after that, or when the time is over, so a Pool that hangs costs
its time and nothing else. (Its own children may hold the pipe open for longer, so its end is not
waited for.) The ward's own end is that of its last trial: a doctor that dies leaves it no more to do
than the trials that it was given the time for.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NoReturn

from .trials import TRIALS, Trial, in_turn, meaning

LIMIT = 10.0  # seconds for one trial: the slowest takes one on a function of 128 MB

Status = Literal["works", "fails", "hangs", "not installed", "not tried"]


@dataclass(frozen=True)
class Outcome:
    """What has become of a trial.

    Attributes:
        name: that of the trial.
        group: the heading that it stands under.
        status: one word for it.
        detail: what there is to say, or the error.
        errno: the symbolic name of the error's number, such as ``"ENOENT"``.
        meaning: what that error means here.
        milliseconds: how long it took.
    """

    name: str
    group: str
    status: Status
    detail: str = ""
    errno: str | None = None
    meaning: str = ""
    milliseconds: float = 0.0


def main() -> None:
    """Tries everything within ``argv[1]`` seconds; prints places and outcomes as JSON, one a line."""
    end = time.monotonic() + float(sys.argv[1])
    for place, trial in in_turn(TRIALS):
        outcome = _tried(trial, end - time.monotonic())
        print(json.dumps([place, asdict(outcome)]), flush=True)


def _tried(trial: Trial, left: float) -> Outcome:
    """What has become of a trial, for which, as for all that follow it, so many seconds are left."""
    if left <= 0:
        return Outcome(trial.name, trial.group, "not tried", "no time was left")
    outcome = run(trial, min(LIMIT, left))
    if outcome.status == "hangs" and left < LIMIT:  # it might have ended within its own time
        detail = f"cut off after {left:.1f} s, when no time was left"
        return replace(outcome, status="not tried", detail=detail)
    return outcome


def run(trial: Trial, limit: float) -> Outcome:
    """Runs one trial.

    Args:
        trial: what to try.
        limit: seconds that it may take.
    """
    before = time.monotonic()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_trial(trial, write_end)  # pragma: no cover - in a frame that coverage has left
    os.close(write_end)
    try:
        line = _line(read_end, before + limit)
    finally:
        os.close(read_end)
        _kill_group(pid)
        _, status = os.waitpid(pid, 0)
    found = json.loads(line) if line else _without_a_word(line, status, limit)
    milliseconds = round(1000 * (time.monotonic() - before), 1)
    return Outcome(trial.name, trial.group, milliseconds=milliseconds, **found)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to lead a group yet
        os.kill(pid, signal.SIGKILL)


def _line(descriptor: int, end: float) -> bytes | None:
    """What the trial has sent: empty if it has ended without, ``None`` if the time is over."""
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        if not readable:
            return None
        chunk = os.read(descriptor, 1 << 16)
        if not chunk:
            return b""
        line += chunk
    return line


def _without_a_word(line: bytes | None, status: int, limit: float) -> dict[str, Any]:
    if line is None:
        return {"status": "hangs", "detail": f"nothing has come within {limit:.1f} s"}
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    return {"status": "fails", "detail": f"the process {how}"}


def _be_trial(trial: Trial, write_end: int) -> NoReturn:
    try:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):  # what a library prints on its way out says less than its error
            os.dup2(null, stream)
        os.write(write_end, json.dumps(_found(trial)).encode() + b"\n")
    finally:
        os._exit(0)  # pragma: no cover - killed after its line; never into the frames of the ward


def _found(trial: Trial) -> dict[str, Any]:
    try:
        return {"status": "works", "detail": trial.attempt()}
    except ModuleNotFoundError as error:
        return {"status": "not installed", "detail": str(error)}
    except BaseException as error:
        return {
            "status": "fails",
            "detail": _told(error),
            "errno": errno.errorcode.get(getattr(error, "errno", None) or 0),
            "meaning": meaning(trial, error),
        }


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
