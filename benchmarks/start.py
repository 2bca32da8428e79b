"""Rows about beginnings: of a program, of an import, of a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from . import jobs
from .figures import Line, Place, Results, Samples
from .rows import LOOPS, Row, Task, everywhere, ours

_PROGRAMS = Path(__file__).parent / "programs"
_ALONE = "asyncio"  # the loop of a program that chooses none

# --- 9: a program's first result -------------------------------------------------------------------

_OURS, _BARE, _POOL = "asynclam_job", "bare_process_job", "process_pool_job"


async def first_results(task: Task) -> Samples:
    """From the start of the interpreter to the line that the program prints, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in (_OURS, _BARE, _POOL)}
    for name in taken:
        _first_result(name)  # compiles asynclam, and brings the files into memory
    for _ in range(task.size(8, 1)):
        for name, samples in taken.items():
            samples.append(_first_result(name))
    return taken


def _first_result(program: str) -> float:
    begun = perf_counter()
    with subprocess.Popen(
        [sys.executable, str(_PROGRAMS / f"{program}.py")],
        stdout=subprocess.PIPE,
        # As installed packages are: compiled, whatever this environment says (empty is unset).
        env={**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": ""},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken = perf_counter() - begun
    assert line == b"144\n", line
    return taken


def _first_result_lines(results: Results) -> Iterator[Line]:
    place = Place("programs", _ALONE)
    ratio = results.ratio((_OURS, place), (_BARE, place))
    what = "fresh interpreter to first result ÷ with a bare Process + Pipe"
    yield Line(9, what, _ALONE, "", ratio).at_most(1.0)
    for name, text in (
        (_OURS, "asynclam"),
        (_BARE, "a bare Process + Pipe"),
        (_POOL, "ProcessPoolExecutor"),
    ):
        what = f"fresh interpreter to first result, {text}"
        yield Line(9, what, _ALONE, "s", results.figure(name, place))


FIRST_RESULT = Row(
    9,
    "cold start of a program",
    first_results,
    (Place("programs", _ALONE),),
    {_OURS: "s", _BARE: "s", _POOL: "s"},
    _first_result_lines,
)

# --- 10: import ------------------------------------------------------------------------------------

_HEAVY = ("asyncio", "anyio", "aiobotocore", "multiprocessing")
_LIST = """
import sys
before = set(sys.modules)
{}
new, loaded = sorted(set(sys.modules) - before), sorted(sys.modules)
import json
print(json.dumps(dict(new=new, all=loaded)))
"""


async def imports(task: Task) -> Samples:
    """Interpreters that import asynclam and such that do nothing, in turn, from start to end."""
    bare: list[float] = []
    with_import: list[float] = []
    for _ in range(task.size(20, 3)):
        bare.append(_interpreter("pass"))
        with_import.append(_interpreter("import asynclam"))
    above = [ours - none for ours, none in zip(with_import, bare, strict=True)]
    modules = loaded_by("import asynclam")
    heavy = [name for name in modules["all"] if name.partition(".")[0] in _HEAVY]
    return {
        "above": above,
        "bare": bare,
        "heavy modules": [float(len(heavy))],
        "new modules": [float(len(modules["new"]))],
    }


def _interpreter(program: str) -> float:
    begun = perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return perf_counter() - begun


def loaded_by(statement: str) -> dict[str, list[str]]:
    """The modules that a statement loads, and all that are loaded then."""
    program = _LIST.format(statement)
    printed = subprocess.check_output([sys.executable, "-c", program])
    found: dict[str, list[str]] = json.loads(printed)
    return found


def _import_lines(results: Results) -> Iterator[Line]:
    place = Place("interpreters", _ALONE)
    above = results.figure("above", place)
    yield Line(10, "import asynclam above a bare interpreter", "", "s", above).at_most(0.005)
    heavy = results.figure("heavy modules", place)
    yield Line(10, f"modules of {', '.join(_HEAVY)} that it loads", "", "", heavy).at_most(0)
    new = ", ".join(loaded_by("import asynclam")["new"])
    count = results.figure("new modules", place)
    yield Line(10, "modules that it loads", "", "", count, note=new)
    yield Line(10, "a bare interpreter", "", "s", results.figure("bare", place))


IMPORT = Row(
    10,
    "import asynclam",
    imports,
    (Place("interpreters", _ALONE),),
    {"above": "s", "bare": "s", "heavy modules": "", "new modules": ""},
    _import_lines,
)

# --- 11: a replaced worker -------------------------------------------------------------------------


async def replaced(task: Task) -> Samples:
    """From a worker's death being known to the result of the next job, in a large process."""
    taken = []
    async with task.contestant(workers=1) as contestant:
        await contestant.call(jobs.noop)
        ballast = bytearray(b"\1") * (task.size(2048, 128) * 1024 * 1024)
        for _ in range(task.size(20, 3)):
            if task.place.contestant == "asynclam":
                await _kill_worker(contestant.call)
            begun = perf_counter()
            await contestant.call(jobs.noop)
            taken.append(perf_counter() - begun)
        del ballast
    return {"first job": taken}


async def _kill_worker(call: object) -> None:
    from asynclam import WorkerDiedError

    try:
        await call(signal.raise_signal, signal.SIGKILL)  # type: ignore[operator]
    except WorkerDiedError:
        return
    raise AssertionError("the worker survived SIGKILL")


def _replaced_lines(results: Results) -> Iterator[Line]:
    for loop in LOOPS:
        figure = results.figure("first job", ours(loop))
        what = "a replaced worker's first job, 2 GiB resident in the loop process"
        yield Line(11, what, loop, "s", figure).at_most(0.005)
    bare = results.figure("first job", Place("Process + Pipe a task", "blocking"))
    yield Line(11, "a Process + Pipe from the same process", "blocking", "s", bare)


REPLACED = Row(
    11,
    "a replaced worker in a large process",
    replaced,
    (*everywhere("asynclam"), *everywhere("Process + Pipe a task")),
    {"first job": "s"},
    _replaced_lines,
    rounds=5,
)

ROWS = (FIRST_RESULT, IMPORT, REPLACED)
