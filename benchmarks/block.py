"""One block: measures one place of one row, in a process of its own. ``run`` starts it.

Some contestants run this file again in each worker, as multiprocessing's spawn does, and without
its package; so nothing of the benchmarks is imported at the top.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.figures import Samples
    from benchmarks.rows import Task


def main() -> None:
    from benchmarks.figures import Place
    from benchmarks.rows import Task

    spec = json.loads(sys.argv[1])
    task = Task(Place(**spec["place"]), quick=spec["quick"])
    outcome = _outcome(spec["row"], task)
    Path(spec["output"]).write_text(json.dumps(outcome), encoding="utf-8")


def _outcome(number: int, task: Task) -> dict[str, Any]:
    from benchmarks.catalogue import ROWS
    from benchmarks.contestants import NotPossibleError

    try:
        return {"samples": _run(task.place.loop, ROWS[number].measure, task)}
    except (ImportError, NotPossibleError) as error:
        return {"failure": str(error)}
    except KeyboardInterrupt:  # given up, which is told by who has done so
        raise
    except BaseException as error:
        traceback.print_exc()
        return {"failure": f"{type(error).__name__}: {error}"}


def _run(loop: str, measure: Callable[[Task], Any], task: Task) -> Samples:
    if loop == "trio":
        import trio

        samples: Samples = trio.run(measure, task)
        return samples
    main: Coroutine[Any, Any, Samples] = measure(task)
    if loop == "uvloop":
        try:
            import uvloop
        except ImportError:
            main.close()
            raise
        return uvloop.run(main)
    return asyncio.run(main)


if __name__ == "__main__":
    main()
