"""Runs the rounds, one after the other, and writes the report.

python -m tests.soak [--jobs N] [--seconds S] [--seed X] [--report FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from random import Random, SystemRandom
from time import monotonic
from typing import Any

from asynclam._box import box
from tests.run import marked
from tests.soak import report
from tests.soak.round import Settings

_LARGEST = 40_000  # jobs of a round
_PATIENCE = 1800  # seconds in which a round ends, or is stuck

# How rounds differ: settings, the way of the segments, and whether it is in a box. The disk can be
# filled in a box only, whose /tmp is small, and matters where segments are files.
_WAYS: tuple[tuple[dict[str, Any], str, bool], ...] = (
    ({"loop": "asyncio", "start_method": "fork", "workers": 2}, "", False),
    ({"loop": "uvloop", "start_method": "fork", "workers": 3, "tasks": 100}, "file", True),
    ({"loop": "uvloop", "start_method": "spawn", "workers": 2, "address_space": 64 << 20}, "", False),
    ({"loop": "asyncio", "start_method": "fork", "workers": 1, "every": 60, "tasks": 300}, "stream", False),
    ({"loop": "asyncio", "start_method": "fork", "workers": 4, "every": 60}, "file", True),
    ({"loop": "uvloop", "start_method": "fork", "workers": 2, "address_space": 64 << 20}, "syscall", False),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="of all rounds together")
    parser.add_argument("--seconds", type=float, help="no round begins after so many")
    parser.add_argument("--seed", type=int, help="of jobs and disturbances; printed if it is drawn")
    parser.add_argument("--report", help="file to write the report to")
    options = parser.parse_args()
    seed = SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"soak: {options.jobs:,} jobs, seed {seed}", flush=True)
    end = monotonic() + (options.seconds or float("inf"))
    rounds: list[report.Round] = []
    for settings, way, is_boxed in _plan(options.jobs, seed):
        if monotonic() > end:
            break
        rounds.append(_run(settings, way, is_boxed=is_boxed and _can_box()))
        print("\n".join([report.line(rounds[-1]), *rounds[-1].wrong]), flush=True)
    wrong = [text for done in rounds for text in done.wrong]
    print(f"{len(wrong)} things are wrong" if wrong else "nothing is wrong")
    if options.report:
        Path(options.report).write_text(report.page(rounds, options.jobs, seed))
        print(f"written: {options.report}")
    return bool(wrong)


def _plan(jobs: int, seed: int) -> Iterator[tuple[Settings, str, bool]]:
    random = Random(seed)
    each = min(_LARGEST, max(1, jobs // len(_WAYS)))
    for settings, way, is_boxed in cycle(_WAYS):
        if jobs <= 0:
            return
        count = jobs if jobs < 2 * each else each  # no crumb at the end
        yield Settings(random.randrange(1 << 32), count, **settings), way, is_boxed
        jobs -= count


def _can_box() -> bool:
    """Not in a box itself, nor where the kernel refuses one."""
    return subprocess.run(box.command(["true"]), capture_output=True, check=False).returncode == 0


def _run(settings: Settings, way: str, *, is_boxed: bool) -> report.Round:
    command = [sys.executable, "-m", "tests.soak.round", json.dumps(asdict(settings))]
    mark = f"soak-{os.getpid()}-{settings.seed}"
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        environment = {**os.environ, "ASYNCLAM_TEST_RUN": mark, "ASYNCLAM_SEGMENTS": way}
        if not is_boxed:
            environment["TMPDIR"] = directory
        process = subprocess.run(
            box.command(command) if is_boxed else command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
    done = report.Round(settings, way or "memfd", is_boxed=is_boxed)
    if process.returncode:
        done.wrong.append(f"the round ended with {process.returncode}: {process.stderr[-4000:]}")
    else:
        done.findings = json.loads(process.stdout)
        done.wrong += [f"seed {settings.seed}: {text}" for text in done.findings["wrong"]]
        done.wrong += report.growth(done)
    unexpected = [
        line for line in process.stderr.splitlines() if "Error" in line or "ignored" in line
    ]
    done.wrong += [f"said on stderr: {line}" for line in unexpected[:20] if not process.returncode]
    done.wrong += [f"process {pid} has survived its round" for pid in marked(mark)]
    return done


if __name__ == "__main__":
    sys.exit(main())
