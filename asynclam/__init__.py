"""CPU work from async Python where multiprocessing does not work, first of all in AWS Lambda."""

# The door is lazy: a name is loaded at its first use (PEP 562), because handlers pay for imports
# at a cold start, and workers walk through here too.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._context import remaining
    from ._default import (
        map_cpu,
        prepare,
        run_async,
        run_blocking,
        run_cpu,
        set_default_executor,
    )
    from ._environment import Environment, environment
    from ._errors import (
        AsynclamError,
        DeadlineExceededError,
        ExecutorClosedError,
        JobCancelled,
        JobExitError,
        PayloadError,
        WorkerDiedError,
        WorkerStartError,
    )
    from ._executor import Executor
    from ._handler import lambda_handler, state
    from ._memory import SharedBuffer
    from ._statistics import Statistics
    from ._streams import Stream, map_io

_HOMES = {
    "AsynclamError": "_errors",
    "Environment": "_environment",
    "DeadlineExceededError": "_errors",
    "Executor": "_executor",
    "ExecutorClosedError": "_errors",
    "JobCancelled": "_errors",
    "JobExitError": "_errors",
    "PayloadError": "_errors",
    "SharedBuffer": "_memory",
    "Statistics": "_statistics",
    "Stream": "_streams",
    "WorkerDiedError": "_errors",
    "WorkerStartError": "_errors",
    "environment": "_environment",
    "lambda_handler": "_handler",
    "map_cpu": "_default",
    "map_io": "_streams",
    "prepare": "_default",
    "remaining": "_context",
    "run_async": "_default",
    "run_blocking": "_default",
    "run_cpu": "_default",
    "set_default_executor": "_default",
    "state": "_handler",
}

__all__ = [
    "AsynclamError",
    "DeadlineExceededError",
    "Environment",
    "Executor",
    "ExecutorClosedError",
    "JobCancelled",
    "JobExitError",
    "PayloadError",
    "SharedBuffer",
    "Statistics",
    "Stream",
    "WorkerDiedError",
    "WorkerStartError",
    "environment",
    "lambda_handler",
    "map_cpu",
    "map_io",
    "prepare",
    "remaining",
    "run_async",
    "run_blocking",
    "run_cpu",
    "set_default_executor",
    "state",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("asynclam")
    if name in ("s3", "testing"):
        from importlib import import_module

        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "s3", "testing"])
