"""A row about handlers: what ``lambda_handler`` adds to a warm invocation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from .figures import Line, Results, Samples
from .rows import CHART_LOOP, Row, Task, ours

_PLAIN, _OURS = "plain sync handler", "async handler made with lambda_handler"


async def warm_invocations(task: Task) -> Samples:
    """Handlers that return at once, called in turn, in a thread in which no loop runs."""
    return await asyncio.to_thread(_measure, task.size(2000, 20))


def _measure(count: int) -> Samples:
    from asynclam import lambda_handler
    from asynclam.testing import LambdaContext

    def plain(event: Any, context: Any) -> Any:  # noqa: ARG001 - as Lambda calls it
        return event

    async def returns_at_once(event: Any, context: Any) -> Any:  # noqa: ARG001 - the same
        return event

    made = lambda_handler(returns_at_once)
    context = LambdaContext(900.0)
    samples: dict[str, list[float]] = {_PLAIN: [], _OURS: []}
    try:
        made(None, context)
        for _ in range(count):
            for name, handler in ((_PLAIN, plain), (_OURS, made)):
                begun = perf_counter()
                handler(None, context)
                samples[name].append(perf_counter() - begun)
    finally:
        made.close()
    return samples


def _lines(results: Results) -> Iterator[Line]:
    place = ours(CHART_LOOP)
    what = "warm invocation of an async handler that returns at once"
    # The plain handler takes a hundredth of it, so the difference is as good as the whole.
    yield Line(31, what, CHART_LOOP, "s", results.figure(_OURS, place)).at_most(100e-6)
    yield Line(
        31, "the same of a plain sync handler", CHART_LOOP, "s", results.figure(_PLAIN, place)
    )


ROWS = (
    Row(
        31,
        "what lambda_handler adds to a warm invocation",
        warm_invocations,
        (ours(CHART_LOOP),),
        {_PLAIN: "s", _OURS: "s"},
        _lines,
        rounds=3,
    ),
)
