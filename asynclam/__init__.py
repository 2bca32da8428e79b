"""CPU work from async Python where multiprocessing does not work, first of all in AWS Lambda."""

# The door is lazy: a name is loaded at its first use (PEP 562), because handlers pay for imports
# at a cold start, and workers walk through here too.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import doctor as doctor
    from . import s3 as s3
    from . import testing as testing
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

__version__ = "0.1.0.dev0"  # here, and not in its metadata alone: those are often left behind

_MODULES = ("doctor", "s3", "testing")
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


if not TYPE_CHECKING:  # pragma: no branch - a checker would take any name for one that there is

    def __getattr__(name: str) -> object:
        if name not in _HOMES and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name != "doctor":  # which says what does not work
            _require_fork()
        from importlib import import_module

        if name in _MODULES:
            return import_module(f".{name}", __name__)
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value


def _require_fork() -> None:
    import os

    if not hasattr(os, "fork"):  # else an import would fail without a word of that
        import sys

        raise ImportError(
            f"asynclam needs os.fork(), which there is not on {sys.platform}: run it on Linux, which "
            "on Windows is WSL or a container"
        )


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
