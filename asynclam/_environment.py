"""What this machine can do, found out by trying things, not by guessing."""

from __future__ import annotations

import math
import os

MEGABYTES_PER_CPU = 1769  # of a Lambda function's memory: its share of the CPUs grows with it


def default_workers() -> int:
    """How many workers make use of this machine.

    On Lambda, ``max(1, min(visible CPUs, ceil(memory / 1769 MB)))``: a function of 512 MB sees two
    CPUs and is given less than a third of one. Elsewhere, the CPUs that this process may use.
    """
    return workers_for(visible_cpus(), lambda_memory())


def workers_for(cpus: int, memory: int | None) -> int:
    """How many workers suit a number of CPUs and a function's memory in MB (``None``: no limit)."""
    if memory is None:
        return max(1, cpus)
    return max(1, min(cpus, math.ceil(memory / MEGABYTES_PER_CPU)))


def visible_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lambda_memory() -> int | None:
    """The memory of the Lambda function in MB; ``None`` outside Lambda."""
    value = os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "")
    return int(value) if value.isdecimal() else None
