"""What works on this machine, why not, and how many workers there would be: ``asynclam doctor``.

To see it in Lambda, deploy a zip that has asynclam in it, with ``asynclam.doctor.handler`` as the
handler, a timeout of 30 seconds, and any event. What it prints is in the log, what it returns is the
same as JSON::

    python -m asynclam doctor           # on this machine
    python -m asynclam doctor --json    # for a ticket
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from asynclam import __version__

from . import _sizing
from ._environment import environment

SECONDS = 60.0  # for all trials together, if nobody says otherwise
_MARGIN = 2.0  # of an invocation's time: for the report, and for a small function's slow start

_START = """\
import sys
sys.path[:] = {path!r}
from asynclam._doctor.ward import main
main()
"""


def handler(event: object, context: Any) -> dict[str, Any]:
    """A Lambda handler: prints the report, and returns it as JSON has it.

    Args:
        event: anything.
        context: that of the invocation, whose remaining time bounds the trials.
    """
    del event
    report = examine(max(1.0, context.get_remaining_time_in_millis() / 1000 - _MARGIN))
    print(text(report))
    return report


def examine(seconds: float = SECONDS) -> dict[str, Any]:
    """Tries what people try and what asynclam needs; a report of plain data.

    Everything runs in processes of its own; what hangs is killed, and nothing is left behind.
    ``"works"`` is whether asynclam does; ``None``: there was no time to try, or the doctor has failed.

    Args:
        seconds: how long it may take. What there is no time for is told as not tried; asynclam
            itself is tried first, and what people try last.
    """
    return {
        "asynclam": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "environment": _looked(),
        "trials": (trials := _tried(seconds)),
        "works": _works(trials),
    }


def _works(outcomes: list[dict[str, Any]]) -> bool | None:
    found = {outcome["name"]: outcome["status"] for outcome in outcomes}
    status = found.get("run_cpu", "not tried")
    return None if status == "not tried" else status == "works"


def _looked() -> dict[str, Any]:
    try:
        return asdict(environment())
    except (OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _tried(seconds: float) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", _START.format(path=sys.path), str(seconds)]
    # Each trial ends in time, and so does the ward; a ward that is stuck in itself is killed.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as ward:
        try:
            output, errors = ward.communicate(timeout=seconds + _MARGIN)
        except subprocess.TimeoutExpired:
            ward.kill()
            output, errors = ward.communicate()
    placed = sorted(map(json.loads, output.splitlines()), key=lambda found: found[0])
    outcomes: list[dict[str, Any]] = [outcome for _, outcome in placed]
    if ward.returncode != 0:
        how = errors.decode(errors="replace").strip()[-1000:] or f"status {ward.returncode}"
        outcomes.append(
            {"name": "trials", "group": "The doctor itself", "status": "fails", "detail": how}
        )
    return outcomes


# --- for people ----------------------------------------------------------------------------------


def text(report: dict[str, Any]) -> str:
    """A report as a person reads it."""
    head = (
        f"asynclam {report['asynclam']}, {report['python']}, {report['system']}, "
        f"{report['libc'] or 'unknown C library'}"
    )
    return "\n".join([head, *_trials(report["trials"]), *_machine(report["environment"])])


def _trials(outcomes: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    group = None
    for outcome in outcomes:
        if outcome["group"] != group:
            group = outcome["group"]
            lines += ["", f"{group}:"]
        lines.append(f"  {outcome['status']:<13} {outcome['name']:<32} {_said(outcome)}".rstrip())
    return lines


def _said(outcome: dict[str, Any]) -> str:
    meaning = outcome.get("meaning")
    if outcome["status"] == "not installed":
        return ""
    error = (
        f"{outcome['errno']}, {outcome['detail']}" if outcome.get("errno") else outcome["detail"]
    )
    return f"{error}: {meaning}" if meaning else error


def _machine(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return ["", f"The machine: {found['error']}"]
    share = found["cpu_share"]
    lines = [
        "",
        "The machine:",
        f"  {'place':<32} {found['place']}",
        f"  {'CPUs seen, usable':<32} {found['visible_cpus']}, {found['usable_cpus']}",
        f"  {'share of them':<32} " + ("all" if share is None else f"{share:.2f} CPUs' time"),
        f"  {'memory':<32} {found['memory'] >> 20:,} MiB",
        f"  {'processes that share it':<32} {found['processes']}",
        "",
        f"{found['why']}.",
    ]
    return lines if found["place"] == "Lambda Managed Instances" else [*lines, "", *_sizes(found)]


def _sizes(found: dict[str, Any]) -> list[str]:
    """The table of Lambda's sizes, with a mark at this function's."""
    memory = found["lambda_memory"]
    lines = ["Lambda's sizes:      memory up to   CPUs seen   CPUs' time   workers"]
    for most, cpus in _sizing.SIZES:
        share = most / _sizing.MEGABYTES_PER_CPU
        workers = _sizing.workers_for(cpus, share)
        here = memory is not None and memory <= most
        memory = None if here else memory
        mark = "   <- this function" if here else ""
        lines.append(f"{most:>30,} MB {cpus:>11} {share:>12.2f} {workers:>9}{mark}")
    return lines


def main(*, as_json: bool = False) -> int:
    """Prints a report; the status is 0 if asynclam works here, 1 if not or if nobody knows.

    Args:
        as_json: for a ticket or a program instead of a person.
    """
    report = examine()
    print(json.dumps(report, indent=2) if as_json else text(report))
    sys.stdout.flush()
    return 0 if report["works"] else 1
