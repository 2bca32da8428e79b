"""The decorators between ``lambda_handler`` and the coroutine function below it.

Theory of operation. A decorator that knows no coroutine functions does its work around a call that
returns at once: below ``lambda_handler`` it would end when the coroutine is made, before the handler
begins. (Powertools would send metrics with the next invocation, and keep a coroutine as the result of
an idempotent one.) Such a decorator must be above. It is put there: it has the function that it calls
in a cell of its closure, where ``functools.wraps`` tells what to look for, and in that cell it is given
the sync handler instead. So it calls that, as if it had been written above.

Which decorators are like that cannot be seen; those of Powertools are. All others stay where they are:
one that only looks at the event before it calls may return the coroutine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import _call

Function = Callable[[Any, Any], Any]

_SYNC_ONLY = "aws_lambda_powertools."


def layers(fn: Any) -> Iterator[Any]:
    """A function, and what its decorators have wrapped, outermost first."""
    seen = set()
    while fn is not None and id(fn) not in seen:
        seen.add(id(fn))
        yield fn
        fn = getattr(fn, "__wrapped__", None)


def split(all_layers: Sequence[Any]) -> tuple[Any, Any]:
    """What of a coroutine function runs in the loop, and the decorator around it that must be above.

    Args:
        all_layers: its own, outermost first.

    Returns:
        The outermost layer that runs in the loop, and the one that it is to be called by; ``None`` if
        all of them run in the loop.

    Raises:
        TypeError: what is above such a decorator would await its result.
    """
    places = [place for place, layer in enumerate(all_layers) if _is_sync_only(layer)]
    if not places:
        return all_layers[0], None
    lowest = places[-1]
    if any(map(_call.is_coroutine_function, all_layers[:lowest])):
        raise _refusal(all_layers[lowest])
    return all_layers[lowest + 1], all_layers[lowest]


def redirect(decorator: Any, fn: Function, handler: Function) -> None:
    """Has a decorator call the handler instead of the function that it has wrapped.

    Raises:
        TypeError: it keeps that function nowhere that is known.
    """
    for cell in decorator.__closure__ or ():
        if cell.cell_contents is fn:
            cell.cell_contents = handler  # since Python 3.7, says the reference of the data model
            return
    raise _refusal(decorator)


def _is_sync_only(layer: Any) -> bool:
    module = getattr(layer, "__globals__", {}).get("__name__", "")
    return module.startswith(_SYNC_ONLY) and not _call.is_coroutine_function(layer)


def _refusal(layer: Any) -> TypeError:
    module = layer.__globals__["__name__"]
    return TypeError(
        f"a decorator of {module} would end before the handler begins, for it knows no "
        "coroutine functions; write it above @lambda_handler"
    )
