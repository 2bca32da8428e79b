"""A function that tells what its sandbox is, and has been through."""

import os
import signal
import threading
from typing import Any

_thaws = 0


def _thawed(*_: object) -> None:
    global _thaws
    _thaws += 1


signal.signal(signal.SIGCONT, _thawed)


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Does what the event says, and returns what there is to see."""
    print("told to", event)
    if "raise" in event:
        raise ValueError(event["raise"])
    if "exit" in event:
        os._exit(event["exit"])
    if "hang" in event:
        threading.Event().wait()
    return {
        "event": event,
        "pid": os.getpid(),
        "uid": os.getuid(),
        "cpus": os.cpu_count(),
        "thaws": _thaws,
        "memory": int(context.memory_limit_in_mb),
        "left": 0 < context.get_remaining_time_in_millis() <= 30_000,
        "request": context.aws_request_id,
    }
