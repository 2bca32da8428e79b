"""``python -m benchmarks --quick``: the table, the document and the charts come out of one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import report
from benchmarks.catalogue import ROWS

ROOT = Path(__file__).resolve().parent.parent.parent
CHOSEN = [5, 6, 10, 15, 50, 52]  # cheap, and all installations have what most compare with
PATIENCE = 100.0  # seconds, after which something hangs

pytestmark = pytest.mark.outside


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def written() -> dict[Path, bytes]:
    """What a whole run writes into the repository."""
    files = [*ROOT.glob("benchmarks/*.json"), *ROOT.glob("docs/*.svg")]
    return {file: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One quick run, and what it has written."""
    output = tmp_path_factory.mktemp("benchmarks")
    rows = ",".join(map(str, CHOSEN))
    run = benchmarks("--quick", "--rows", rows, "--output", str(output), "--date", "some day")
    assert run.returncode == 0, run.stderr
    found = json.loads((output / "results.json").read_text())
    return SimpleNamespace(output=output, table=run.stdout, found=found)


def test_there_is_a_row_for_every_goal() -> None:
    """Rows of the executor, numbered as its goals are; HTTP requests, invocations, cold starts, S3; lives and ends."""
    assert list(ROWS) == [*range(1, 17), 30, 31, 32, *range(40, 45), 50, 51, 52]


def test_every_goal_of_a_row_has_a_figure_and_a_verdict(finished: SimpleNamespace) -> None:
    """No chosen row is left unmeasured on either loop, and each says whether its goal is met."""
    goals = [line for line in finished.found["goals"] if line["goal"]]
    assert sorted({line["row"] for line in goals}) == CHOSEN
    for line in goals:
        assert isinstance(line["met"], bool), line
        assert line["figure"]["p25"] <= line["figure"]["median"] <= line["figure"]["p75"]
    assert {line["loop"] for line in goals} == {"asyncio", "uvloop", ""}


def test_the_table_shows_what_the_document_holds(finished: SimpleNamespace) -> None:
    """The table can be made again from the document, without measuring."""
    again = benchmarks("--show", str(finished.output / "results.json"))
    assert again.stdout == finished.table
    assert finished.table.count("\n| ") >= len(finished.found["goals"])


def test_the_document_says_what_was_measured_where(finished: SimpleNamespace) -> None:
    """Machine, date and versions are in it, and the figures of all who could run."""
    found = finished.found
    assert found["date"] == "some day"
    assert found["quick"] is True
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert "asynclam" in found["versions"]
    names = {figure["contestant"] for figure in found["figures"]}
    assert {"asynclam", "blocking Pipe", "multiprocessing.Pool", "ProcessPoolExecutor"} <= names


def test_who_could_not_run_is_named(finished: SimpleNamespace) -> None:
    """A peer that is not installed is not fatal, and not dropped without a word."""
    absent = {place["contestant"] for place in finished.found["not_run"]}
    measured = {figure["contestant"] for figure in finished.found["figures"] if figure["row"] == 5}
    assert {place.contestant for place in ROWS[5].places} <= measured | absent
    for name in absent:
        assert f"* {name} on " in finished.table


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_charts_are_drawn(finished: SimpleNamespace, theme: str) -> None:
    """Each is an SVG with a panel for the row that has one, and a bar of asynclam in it."""
    root = ET.parse(finished.output / f"bench-{theme}.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "64 MiB NumPy array, there and back" in texts
    assert "asynclam" in texts


def test_the_readme_shows_the_document() -> None:
    """Each figure in its tables comes from the last whole run, as does a row of one loop only."""
    readme = (ROOT / "README.md").read_text("utf-8")
    found = json.loads((ROOT / "benchmarks/results.json").read_bytes())
    assert found["complete"]
    assert report.in_readme(readme, found) == readme


def test_a_part_of_the_rows_does_not_replace_the_figures_of_all() -> None:
    """Without ``--output``, only a whole run writes into the repository."""
    before = written()
    run = benchmarks("--quick", "--rows", "10")
    assert "nothing is written" in run.stderr
    assert written() == before


def test_rows_that_are_measured_again() -> None:
    """They take the places of their rows in a whole run of the same day and machine; else nobody's."""
    whole = json.loads((ROOT / "benchmarks/results.json").read_bytes())
    again = [{**line, "what": "again"} for line in whole["goals"] if line["row"] == 41]
    part = {**whole, "goals": again, "figures": [], "not_run": [], "complete": False}
    merged = report.merged(whole, part)
    assert [line["row"] for line in merged["goals"]] == [line["row"] for line in whole["goals"]]
    assert {line["what"] == "again" for line in merged["goals"] if line["row"] == 41} == {True}
    assert {figure["row"] for figure in merged["figures"]} == set(ROWS) - {41}
    assert merged["complete"]
    with pytest.raises(ValueError, match="date"):
        report.merged(whole, {**part, "date": "another day"})
    refused = benchmarks("--rows", "41", "--again", "--date", "another day")
    assert "not to be put together" in refused.stderr
    assert "round" not in refused.stderr


@pytest.mark.parametrize("rows", ["0", "17", "two"])
def test_a_row_that_does_not_exist_is_a_usage_error(rows: str) -> None:
    """And measures nothing."""
    run = benchmarks("--rows", rows)
    assert run.returncode == 2
    assert "--rows" in run.stderr
