"""From results to the document that is kept, and from that to the tables that are read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from . import machine, s3_peers
from .catalogue import ROWS
from .contestants import ALL, Contestant
from .figures import Results, show

Document = Mapping[str, Any]
_Columns = Sequence[tuple[int, str, str, str]]
_Kinds = Sequence[type[Contestant] | type[s3_peers.Peer]]

_COLUMNS = (  # of the table of contestants: row, figure, variant, heading
    (1, "round trip", "as placed", "no-op round trip"),
    (2, "jobs", "", "no-op jobs in a gather"),
    (4, "transfer", "", "64 MiB NumPy argument"),
    (5, "transfer", "", "64 MiB NumPy echo"),
    (7, "echo", "bytes", "longest stall of the loop, 256 MiB each way"),
)
_S3_COLUMNS = (
    (40, "seconds", "", "512 MiB over TLS into a worker"),
    (40, "PSS added", "", "peak memory added ÷ its size"),
    (40, "longest gap", "", "longest stall of the loop meanwhile"),
    (41, "seconds", "", "1,000 objects of 64 KiB, fetched and parsed"),
)


def document(results: Mapping[int, Results], date: str, *, quick: bool) -> Document:
    """Everything that was measured, as JSON has it."""
    return {
        "date": date,
        "quick": quick,
        "machine": machine.facts(),
        "versions": machine.versions(),
        "goals": [
            asdict(line) for number in results for line in ROWS[number].lines(results[number])
        ],
        "figures": [
            {"row": number, **figure}
            for number, row in results.items()
            for figure in row.as_dicts(ROWS[number].units)
        ],
        "not_run": [
            {"row": number, **asdict(place), "reason": reason}
            for number, row in results.items()
            for place, reason in row.failures.items()
        ],
    }


def merged(whole: Document, part: Document) -> dict[str, Any]:
    """A whole run, with some of its rows measured again.

    Raises:
        ValueError: they are not of the same day, machine and versions, or one is a quick run.
    """
    for name in ("date", "machine", "versions", "quick"):
        if whole[name] != part[name]:
            raise ValueError(f"not to be put together: {name} {whole[name]} and {part[name]}")
    again = {line["row"] for line in part["goals"]}
    rows = {
        name: sorted(
            [item for item in whole[name] if item["row"] not in again] + list(part[name]),
            key=lambda item: item["row"],
        )
        for name in ("goals", "figures", "not_run")
    }
    return {**whole, **rows}


def tables(found: Document) -> str:
    """Markdown: the goals, the contestants, and who could not run."""
    parts = [_heading(found), _goals(found), *_comparisons(found), _notes(found), _not_run(found)]
    return "\n\n".join(filter(None, parts))


_BEGIN, _END = "<!-- make bench writes {} from here -->", "<!-- to here -->"
_LAMBDA, _S3 = range(30, 40), range(40, 50)  # rows; the README has these where it tells of them


def in_readme(readme: str, found: Document) -> str:
    """The README with what was measured in its places."""
    s3 = _contestants(found, _S3_COLUMNS, s3_peers.ALL)
    all_else = set(ROWS).difference(_LAMBDA, _S3)
    parts = {
        "Lambda": [_summary(found, _LAMBDA)],
        "S3": [_summary(found, _S3), s3],
        "all else": [
            _heading(found),
            _summary(found, all_else),
            _contestants(found, _COLUMNS, ALL),
        ],
    }
    for name, tables in parts.items():
        begin = _BEGIN.format(name)
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(_END)
        readme = before + "\n\n".join([begin, *tables, _END]) + after
    return readme


def _summary(found: Document, numbers: Container[int]) -> str:
    """The goals of some rows, both loops side by side."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for line in found["goals"]:
        if line["goal"] and line["row"] in numbers:
            cells = rows.setdefault((str(line["row"]), line["what"], line["goal"]), {})
            figure = line["figure"]
            text = show(figure["median"], line["unit"]) if figure else "-"
            cells[line["loop"]] = text if line["met"] else f"{text} (**not met**)"
    table = [
        (number, what, cells.get("asyncio") or cells.get("", ""), cells.get("uvloop", ""), goal)
        for (number, what, goal), cells in rows.items()
    ]
    return _markdown(("#", "figure", "asyncio", "uvloop", "goal"), table)


def _heading(found: Document) -> str:
    facts = found["machine"]
    text = (
        f"{facts['python']}, Linux {facts['kernel']}, {facts['cores']} cores ({facts['processor']}), "
        f"{facts['memory'] / 2**30:.0f} GiB, {found['date']}. Medians of blocks, and their quartiles."
    )
    if found["quick"]:
        text += (
            "\n\nA quick run, with small sizes and few samples: it shows that all works, no more."
        )
    return text


def _goals(found: Document) -> str:
    rows = [
        (
            str(line["row"]),
            line["what"],
            line["loop"],
            _measured(line["figure"], line["unit"]),
            line["goal"],
            _verdict(line),
        )
        for line in found["goals"]
    ]
    return _markdown(("#", "figure", "loop", "measured", "goal", ""), rows)


def _verdict(line: Mapping[str, Any]) -> str:
    if not line["goal"]:
        return ""
    return {True: "met", False: "**not met**", None: "not measured"}[line["met"]]


def _measured(figure: Mapping[str, Any] | None, unit: str) -> str:
    if figure is None:
        return "-"
    median, low, high = (show(figure[name], unit) for name in ("median", "p25", "p75"))
    return median if figure["blocks"] == 1 else f"{median} ({low} to {high})"


def _comparisons(found: Document) -> Iterator[str]:
    for columns, kinds in ((_COLUMNS, ALL), (_S3_COLUMNS, s3_peers.ALL)):
        if table := _contestants(found, columns, kinds):
            yield table


def _contestants(found: Document, wanted: _Columns, kinds: _Kinds) -> str:
    columns = [column for column in wanted if any(_of(found, column))]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for column in columns:
        for figure in _of(found, column):
            row = cells.setdefault((figure["contestant"], figure["loop"]), {})
            row[column[-1]] = _measured(figure, figure["unit"])
    if not cells:
        return ""
    order = [kind.name for kind in kinds]
    headings = [column[-1] for column in columns]
    rows = [
        (
            name,
            _version(found, name, kinds),
            loop,
            *(cells[name, loop].get(h, "") for h in headings),
        )
        for name, loop in sorted(cells, key=lambda key: (order.index(key[0]), key[1]))
    ]
    return _markdown(("", "version", "loop", *headings), rows)


def _of(found: Document, column: tuple[int, str, str, str]) -> Iterator[Mapping[str, Any]]:
    row, name, variant, _ = column
    for figure in found["figures"]:
        if (figure["row"], figure["figure"], figure["variant"]) == (row, name, variant):
            yield figure


def _version(found: Document, name: str, kinds: _Kinds) -> str:
    package = next(kind.package for kind in kinds if kind.name == name)
    return found["versions"].get(package) or ""


def _notes(found: Document) -> str:
    notes = (
        f"{line['row']}, {line['what']}: {line['note']}" for line in found["goals"] if line["note"]
    )
    return _list("Notes", notes)


def _not_run(found: Document) -> str:
    rows: dict[tuple[str, str, str], set[int]] = {}
    for place in found["not_run"]:
        key = (place["contestant"], place["loop"], place["reason"])
        rows.setdefault(key, set()).add(place["row"])
    return _list(
        "Could not run",
        (
            f"{name} on {loop}, row{'s'[: len(numbers) - 1]} {', '.join(map(str, sorted(numbers)))}: {reason}"
            for (name, loop, reason), numbers in rows.items()
        ),
    )


def _list(heading: str, items: Iterable[str]) -> str:
    lines = [f"* {item}" for item in items]
    return "\n".join([f"{heading}:", "", *lines]) if lines else ""


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(row, widths) for row in table]
    lines.insert(1, _line(["-" * width for width in widths], widths))
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"
