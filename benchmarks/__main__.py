"""``python -m benchmarks``: measures, prints the tables, writes the JSON document, charts and README."""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import chart, report, run, work
from .catalogue import ROWS
from .figures import Results

_HERE = Path(__file__).resolve().parent
_CHARTS = _HERE.parent / "docs"
_DOCUMENT = "results.json"
_README = _HERE.parent / "README.md"


def main() -> int:
    options = _parser().parse_args()
    found = json.loads(options.show.read_bytes()) if options.show else _measure(options)
    print(report.tables(found))
    _write(found, options)
    return 130 if found["interrupted"] and not options.show else 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the rows; Ctrl-C ends that early, and what has been measured is shown."""
    results: dict[int, Results] = {}
    interrupted = False
    if options.again:  # is refused before it takes its time
        _merged(report.document({}, options.date, quick=options.quick))
    work.measure_speed()
    try:
        rows = [ROWS[number] for number in options.rows]
        run.run(rows, results, _tell, quick=options.quick, seconds=60 * options.minutes)
    except KeyboardInterrupt:
        _tell("interrupted")
        interrupted = True
    found = report.document(results, options.date, quick=options.quick)
    complete = set(results) == set(ROWS) and not (interrupted or options.quick)
    if options.again and not interrupted:
        return _merged(found)
    return {**found, "complete": complete, "interrupted": interrupted}


def _merged(found: report.Document) -> dict[str, Any]:
    return report.merged(json.loads((_HERE / _DOCUMENT).read_bytes()), found)


def _write(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Into ``--output``; without it into the repository, if these are the figures of a whole run."""
    if options.output is None and not found["complete"]:
        _tell("nothing is written: not a whole run, and no --output")
        return
    documents, charts = options.output or _HERE, options.output or _CHARTS
    documents.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (documents / _DOCUMENT).write_text(text + "\n", encoding="utf-8")
    if options.output is None:
        _README.write_text(report.in_readme(_README.read_text("utf-8"), found), "utf-8")
    for theme in chart.THEMES:
        path = charts / f"bench-{theme.name}.svg"
        path.write_text(chart.draw(found, theme), encoding="utf-8")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--rows", type=_rows, default=list(ROWS), help="such as 1,2,7 (default: all)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="N",
        help="measure everything once, and again for as long as that (default: all rounds)",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="put these rows into the document of a whole run of the same day and machine",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--output", type=Path, help="a directory for results.json and the charts")
    parser.add_argument("--show", type=Path, help="a results.json to show again; measures nothing")
    today = datetime.now(timezone.utc).date().isoformat()
    parser.add_argument("--date", default=today, help="written into the document as it is")
    return parser


def _rows(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if unknown := [number for number in numbers if number not in ROWS]:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]}")
    return sorted(set(numbers))


if __name__ == "__main__":
    sys.exit(main())
