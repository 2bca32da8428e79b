"""The README shows what was measured, and nothing else."""

import json
from pathlib import Path

from benchmarks import report
from benchmarks.catalogue import ROWS

ROOT = Path(__file__).resolve().parent.parent.parent


def test_figures_come_from_the_document():
    """Each figure of the tables is that of benchmarks/results.json, written as ``make bench`` does."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results.json").read_bytes())
    assert report.in_readme(readme, found) == readme


def test_all_goals_are_shown():
    """There is a line for every row of the benchmarks."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"\n| {number} " in readme for number in ROWS)
