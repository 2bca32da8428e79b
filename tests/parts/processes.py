"""What tests ask of processes that are not theirs to wait for."""

from __future__ import annotations

import asyncio


async def ended(pid: int) -> None:
    """Waits until a process is gone or a zombie that init has not reaped."""
    while True:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (FileNotFoundError, ProcessLookupError):
            return
        await asyncio.sleep(0)
