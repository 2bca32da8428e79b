"""A function that needs nothing but Python."""

import os
import subprocess
import sys
import threading
from typing import Any


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Does what the event says, and returns the event with what there is to see."""
    del context
    print("told to", event)
    if "raise" in event:
        raise ValueError(event["raise"])
    if "exit" in event:
        os._exit(event["exit"])
    if "hang" in event:
        threading.Event().wait()
    if "leave" in event:
        leave_a_process()
    return {"event": event, "pid": os.getpid(), "uid": os.getuid()}


def variables(event: list[str], context: object) -> dict[str, str | None]:
    """Returns the environment variables that the event names."""
    del context
    return {name: os.environ.get(name) for name in event}


def leave_a_process() -> None:
    """Starts a process that a kill of the runtime's process group would miss."""
    argv = [sys.executable, "-c", "import signal; signal.pause()", "asynclam-left"]
    subprocess.Popen(argv, start_new_session=True)
