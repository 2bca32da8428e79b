"""All rows, by their number in the table of goals."""

from __future__ import annotations

from . import cold, coroutines, invocation, large, lives, s3, small, start, web, work
from .rows import Row

ROWS: dict[int, Row] = {
    row.number: row
    for row in sorted(
        (
            *small.ROWS,
            coroutines.ROW,
            *large.ROWS,
            *start.ROWS,
            *work.ROWS,
            *web.ROWS,
            *invocation.ROWS,
            *cold.ROWS,
            *s3.ROWS,
            *lives.ROWS,
        ),
        key=lambda row: row.number,
    )
}
