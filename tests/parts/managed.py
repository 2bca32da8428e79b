"""Starts the Runtime Interface Emulator as it is on Managed Instances, with a runtime.

    python -m tests.parts.managed CODE EMULATOR [ARGUMENT...] -- RUNTIME [ARGUMENT...]

With ``AWS_LAMBDA_MAX_CONCURRENCY`` in its environment the emulator takes that many events at once, and
passes on the ``X-Amzn-Trace-Id`` of each. It then takes its runtime from ``/var/runtime/bootstrap``,
and runs it as user 993 in ``/var/task``. So it gets a file system that has these, and is otherwise the
box's. The emulator itself stays root, as which it becomes that user.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from asynclam._box import files, kernel

_ROOT = Path(__file__).resolve().parents[2]  # to be seen, wherever it lies
_VAR = Path("/var")


def main() -> NoReturn:
    end = sys.argv.index("--")
    code, *emulator = sys.argv[1:end]
    runtime = sys.argv[end + 1 :]
    kept = files.kept(runtime[0], [code, emulator[0], str(_ROOT)])
    kernel.call("unshare", kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    task = os.open(code, os.O_PATH)  # before it may be covered
    files.lay_out("missing", None, kept)
    with files._covered(_VAR):
        for name in ("runtime", "task"):
            (_VAR / name).mkdir()
        bootstrap = _VAR / "runtime" / "bootstrap"
        bootstrap.write_text(f"#!/bin/sh\nexec {shlex.join(runtime)}\n", encoding="utf-8")
        bootstrap.chmod(0o755)
        kernel.mount_bound(Path(f"/proc/self/fd/{task}"), _VAR / "task")
    os.execv(emulator[0], emulator)


if __name__ == "__main__":
    main()
