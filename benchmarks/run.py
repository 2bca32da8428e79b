"""Runs the blocks of the rows: everybody's first, everybody's second, and so on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from .figures import Place, Results
from .processes import MARK
from .rows import Row

_ROOT = Path(__file__).parent.parent
_PATIENCE = {False: 180.0, True: 30.0}  # seconds for a block, which takes about 20, or 2 if quick
_FAREWELL = 10.0  # seconds for a block that was not, to end what it has started
_KEPT = ("PYTHONHOME", "PYTHONPATH")

Tell = Callable[[str], None]


def run(
    rows: Sequence[Row], results: dict[int, Results], tell: Tell, *, quick: bool, seconds: float
) -> None:
    """Adds what each row's blocks measure to ``results``: all rows once, then all again.

    A place that has failed once is left out from then on. After so many seconds no row is begun but
    those that have not been measured at all.
    """
    end = perf_counter() + seconds
    for turn in range(1 if quick else max(row.rounds for row in rows)):
        for row in rows:
            if turn < row.rounds and (not turn or perf_counter() < end):
                _run_round(row, turn, results.setdefault(row.number, Results()), tell, quick=quick)


def _run_round(row: Row, turn: int, results: Results, tell: Tell, *, quick: bool) -> None:
    for place in row.places:
        if place in results.failures:
            continue
        tell(f"row {row.number}, {row.title}: round {turn + 1} of {row.rounds}, {place}")
        outcome = _run_block(row.number, place, quick=quick)
        if "failure" in outcome:
            results.failures[place] = outcome["failure"]
            tell(f"row {row.number}: {place} could not run: {outcome['failure']}")
        else:
            results.add(turn, place, outcome["samples"])


def _run_block(row: int, place: Place, *, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        output = Path(directory) / "outcome.json"
        spec = {"row": row, "place": asdict(place), "quick": quick, "output": str(output)}
        with (Path(directory) / "stderr").open("w+b") as stderr:
            end = _run_process(json.dumps(spec), directory, stderr.fileno(), _PATIENCE[quick])
            if output.exists():
                outcome: dict[str, Any] = json.loads(output.read_bytes())
                return outcome
            stderr.seek(0)
            last = stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    return {"failure": " ".join([end, *last])}


def _environment(mark: str) -> dict[str, str]:
    # No settings of the interpreter: one that may not write bytecode measures the compiler.
    names = (name for name in os.environ if not name.startswith("PYTHON") or name in _KEPT)
    return {**{name: os.environ[name] for name in names}, MARK: mark}


def _run_process(spec: str, mark: str, stderr: int, patience: float) -> str:
    """Runs a block to its end, with all that it leaves behind, and says what that end was."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.block", spec],
        cwd=_ROOT,
        env=_environment(mark),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    ) as process:
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that it ends its S3 server, which has a session
            with suppress(subprocess.TimeoutExpired):
                process.wait(_FAREWELL)
            return f"it was not done after {patience:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return f"its process ended with status {status}"
