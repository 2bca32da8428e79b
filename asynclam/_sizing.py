"""How many workers make use of this machine: CPUs, what share of them is ours, who shares it.

Every program's first executor asks, so this imports next to nothing, and :mod:`._environment` has
the same as an object. The table of Lambda's sizes is here and nowhere else.
"""

from __future__ import annotations

import math
import os

VARIABLE = "ASYNCLAM_MAX_WORKERS"
_CONCURRENCY = "AWS_LAMBDA_MAX_CONCURRENCY"

MEGABYTES_PER_CPU = 1769
"""Of a Lambda function's memory: the time that it gets on CPUs grows with it (AWS documents that)."""

MEGABYTES_PER_MANAGED_CPU = 2048
"""The least memory of a vCPU of Managed Instances; a function may be given more for each."""

SIZES = ((3008, 2), (5307, 3), (7076, 4), (8845, 5), (10240, 6))
"""Up to so many MB of memory a Lambda function sees so many CPUs (measured by its users)."""


def default_workers() -> int:
    """How many workers make use of this machine, or as many as ``ASYNCLAM_MAX_WORKERS`` says.

    On Lambda, ``max(1, min(visible CPUs, ceil(memory / 1769 MB)))``: a function of 512 MB sees two
    CPUs and is given less than a third of one. Elsewhere, the CPUs that this process may use, and
    no more than the quota of its control group.

    Raises:
        ValueError: ``ASYNCLAM_MAX_WORKERS`` is no number of workers.
    """
    wanted = override()
    if wanted is not None:
        return wanted
    return workers_for(usable_cpus(), cpu_share(), processes())


def workers_for(cpus: int, share: float | None = None, processes: int = 1) -> int:
    """How many workers suit each of some processes that share CPUs.

    Args:
        cpus: how many CPUs they see.
        share: how many CPUs' time they get, all together; ``None``: that of all they see.
        processes: how many processes have workers of their own.
    """
    most = cpus if share is None else min(cpus, share)
    return max(1, math.ceil(most / processes))


def threads_for(workers: int) -> int:
    """How many threads suit each of some workers of this process, at least 1.

    Args:
        workers: how many there may be.
    """
    cpus = usable_cpus()
    if workers < cpus:  # else the share, which may be files to read, changes nothing
        cpus = workers_for(cpus, cpu_share(), processes())
    return max(1, cpus // workers)


def override() -> int | None:
    """What ``ASYNCLAM_MAX_WORKERS`` says; ``None`` where it says nothing.

    Raises:
        ValueError: it is no number of workers.
    """
    value = os.environ.get(VARIABLE, "")
    if value and not value.isdecimal():
        raise ValueError(
            f"{VARIABLE}={value} is no number of workers: give it a whole number (0 runs jobs in "
            "this process), or unset it to use the whole machine"
        )
    return int(value) if value else None


def visible_cpus() -> int:
    """How many CPUs there seem to be."""
    return os.cpu_count() or 1


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return visible_cpus()


def cpu_share() -> float | None:
    """How many CPUs' time this sandbox, container or program gets; ``None``: that of all it sees."""
    memory = lambda_memory()
    if memory is None:
        from . import _cgroup  # what runs on Lambda does not pay for it

        return _cgroup.cpu_quota()
    return memory / (MEGABYTES_PER_MANAGED_CPU if is_managed() else MEGABYTES_PER_CPU)


def is_managed() -> bool:
    """Whether this is a process of Lambda Managed Instances: the runtime client asks the same."""
    return _CONCURRENCY in os.environ


def processes() -> int:
    """How many processes of the same function share the CPUs.

    More than one only on Lambda Managed Instances, whose runtime client forks one for each
    invocation that may run at the same time. Everywhere else a sandbox is all ours.
    """
    return max(1, _number(_CONCURRENCY) or 1)


def lambda_memory() -> int | None:
    """The memory of the Lambda function in MB; ``None`` outside Lambda."""
    return _number("AWS_LAMBDA_FUNCTION_MEMORY_SIZE")


def _number(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else None


def memory() -> int:
    """Bytes of memory that this process may use, as far as it is told."""
    megabytes = lambda_memory()
    if megabytes is not None:
        return megabytes << 20
    from . import _cgroup

    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(size, _cgroup.memory_limit() or size)


def visible_on_lambda(megabytes: int) -> int:
    """How many CPUs a Lambda function of that memory sees."""
    return next((cpus for most, cpus in SIZES if megabytes <= most), SIZES[-1][1])
