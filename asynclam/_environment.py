"""What this machine can do, as one object: sizes and limits, and how many workers follow from them.

A room of its own because no job needs it: making a dataclass takes longer than importing a module.
What only a trial can tell, and a trial may take long or hang, is for ``asynclam doctor``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from . import _memory, _sizing

Place = Literal["Lambda", "Lambda Managed Instances", "elsewhere"]


@dataclass(frozen=True)
class Environment:
    """What this machine can do for an executor with the default number of workers.

    Attributes:
        place: where this runs, by the variables that the Lambda runtime sets.
        initialization: how the sandbox was made, as Lambda names it in
            ``AWS_LAMBDA_INITIALIZATION_TYPE`` (``"on-demand"``, ``"snap-start"``, ...); ``None``
            elsewhere.
        lambda_memory: MB of memory that the function was given; ``None`` outside Lambda.
        memory: bytes of memory that this process and its workers may use together.
        visible_cpus: how many CPUs there seem to be.
        usable_cpus: on how many of them this process may run (its affinity).
        cpu_share: how many CPUs' time they amount to: by the memory size on Lambda, elsewhere by the
            quota of the control group; ``None`` for all of it.
        processes: how many processes share that, each with workers of its own: more than one on
            Managed Instances.
        max_workers: the default of ``Executor``.
        why: how ``max_workers`` follows from the rest, in a sentence.
        segments: how large payloads travel: ``"memfd"``, ``"syscall"``, ``"file"`` or ``"stream"``.
    """

    place: Place
    initialization: str | None
    lambda_memory: int | None
    memory: int
    visible_cpus: int
    usable_cpus: int
    cpu_share: float | None
    processes: int
    max_workers: int
    why: str
    segments: str


def environment() -> Environment:
    """Looks at the machine: CPUs, memory, what share of them is ours, and what follows.

    Raises:
        ValueError: ``ASYNCLAM_MAX_WORKERS`` or ``ASYNCLAM_SEGMENTS`` has a value that it cannot have.
        OSError: no segment can be made, not even a file: it is what stands in the way of one.
    """
    return Environment(
        place=_place(),
        initialization=os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE"),
        lambda_memory=_sizing.lambda_memory(),
        memory=_sizing.memory(),
        visible_cpus=_sizing.visible_cpus(),
        usable_cpus=_sizing.usable_cpus(),
        cpu_share=_sizing.cpu_share(),
        processes=_sizing.processes(),
        max_workers=_sizing.default_workers(),
        why=_why(),
        segments=_memory.way(),
    )


def _place() -> Place:
    if _sizing.is_managed():
        return "Lambda Managed Instances"
    return "elsewhere" if _sizing.lambda_memory() is None else "Lambda"


def _why() -> str:
    workers = _sizing.default_workers()
    number = f"{workers} worker" + ("" if workers == 1 else "s")
    if _sizing.override() is not None:
        return f"{number}: {_sizing.VARIABLE} says so"
    reasons = [_counted(_sizing.usable_cpus(), "usable CPU"), *_shares()]
    return f"{number}: {', '.join(reasons)}"


def _shares() -> list[str]:
    """What makes less of the CPUs than there are of them."""
    reasons = []
    share, memory, processes = _sizing.cpu_share(), _sizing.lambda_memory(), _sizing.processes()
    if memory is not None:
        reasons.append(f"{memory} MB of memory are given the time of {share:.2f} CPUs")
    elif share is not None:
        reasons.append(f"the control group may use the time of {share:.2f} CPUs")
    if processes > 1:
        reasons.append(f"shared by {processes} processes, each with workers of its own")
    return reasons


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
