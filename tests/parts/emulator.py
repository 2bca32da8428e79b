"""Runs a Lambda handler under the real runtime client, behind the real Runtime Interface Emulator.

    with emulator("echo.handler", cwd=FUNCTIONS, box=True) as function:
        assert function.invoke({"a": 1}) == {"a": 1}

The emulator is the static binary in the package ``aws-sam-cli``. It starts the runtime client,
``python -m awslambdaric``, at the first invocation and again whenever that has died, and takes one
event at a time. As on Managed Instances (``concurrency``) it takes some, and passes on trace ids.

No process is left behind, whatever the function did. A process group would not be enough, since a
function may call setsid(), and a box ends on its own time after a kill. So all of them inherit a
variable with a name of their own, and at the end every process with it in ``/proc/PID/environ`` is
killed and waited for, until there is none. (fork(2) and execve(2) both pass it on; only a process
that empties its environment on purpose could hide.)
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from asynclam._box import box as boxes
from asynclam._box.files import Shm

_ROOT = Path(__file__).resolve().parents[2]  # to be seen in a box, wherever it lies
_HOST = "127.0.0.1"
_MARK = "ASYNCLAM_EMULATOR"
_INVOCATIONS = "/2015-03-31/functions/function/invocations"
_UNAVAILABLE = '{"errorType":"Runtime.Unavailable"}'
_BINARIES = {"x86_64": "aws-lambda-rie-x86_64", "aarch64": "aws-lambda-rie-arm64"}

_SECONDS_TO_START = 20.0
_SECONDS_TO_STOP = 10.0
_SECONDS_BETWEEN_TRIES = 0.02
_SECONDS_OF_INIT = 10.0  # Lambda's own limit; the emulator adds it to the function's timeout


class EmulatorError(Exception):
    """The emulator did not come up, did not answer or could not be ended."""


class FunctionError(EmulatorError):
    """The function failed.

    Attributes:
        kind: The name of the exception, or of Lambda's own error.
        text: Its message.
    """

    def __init__(self, kind: str, text: str, log: str) -> None:
        super().__init__(f"the function failed with {kind}: {text}\n{_quoted(log)}")
        self.kind = kind
        self.text = text


class Function:
    """A function that is ready to be invoked."""

    def __init__(self, pidfd: int, port: int, log: IO[bytes], timeout: float) -> None:
        self._pidfd = pidfd  # of the emulator
        self._port = port
        self._log = log
        self._timeout = timeout

    @property
    def log(self) -> str:
        """What the emulator, the runtime client and the function have written so far."""
        descriptor = self._log.fileno()
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def invoke(self, event: object = None, trace: str | None = None) -> Any:
        """Invokes the function and returns its result.

        Args:
            event: What it is called with.
            trace: The X-Ray id of the invocation; the emulator passes it on as on Managed Instances.

        Raises:
            FunctionError: The handler raised, ran out of time or took the runtime with it.
            EmulatorError: No answer came.
        """
        headers = {} if trace is None else {"X-Amzn-Trace-Id": trace}
        deadline = time.monotonic() + _SECONDS_OF_INIT
        while (body := self._post(json.dumps(event), headers)) == _UNAVAILABLE:
            # As on Managed Instances, and the emulator does not say when a runtime is ready.
            if _ends_within(self._pidfd, _SECONDS_BETWEEN_TRIES) or time.monotonic() > deadline:
                raise EmulatorError(f"no runtime became ready\n{_quoted(self.log)}")
        return self._result(body)

    def _post(self, event: str, headers: dict[str, str]) -> str:
        connection = http.client.HTTPConnection(_HOST, self._port, timeout=self._timeout)
        with contextlib.closing(connection):
            try:
                connection.request("POST", _INVOCATIONS, event, headers)
                return connection.getresponse().read().decode()
            except (OSError, http.client.HTTPException) as error:
                raise EmulatorError(
                    f"the emulator did not answer: {error!r}\n{_quoted(self.log)}"
                ) from error

    def _result(self, body: str) -> Any:
        try:
            result = json.loads(body)
        except ValueError:
            # How the emulator says "Task timed out after 3.00 seconds".
            raise FunctionError("Sandbox.Failure", body, self.log) from None
        # The emulator sets no X-Amz-Function-Error, so what Lambda's errors look like has to do.
        if isinstance(result, dict) and {"errorType", "errorMessage"} <= result.keys():
            raise FunctionError(result["errorType"], result["errorMessage"], self.log)
        return result


def trace_id(number: int) -> str:
    """An X-Ray id, as it comes with an invocation."""
    return f"Root=1-67891233-{number:024x};Parent={number:016x};Sampled=1"


@contextlib.contextmanager
def emulator(
    handler: str,
    *,
    cwd: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    box: bool = False,
    shm: Shm = "missing",
    cpus: int | None = None,
    timeout: int = 30,
    memory: int = 1769,
    concurrency: int | None = None,
    bind: Iterable[str | os.PathLike[str]] = (),
) -> Iterator[Function]:
    """Yields the function whose handler is ``module.name`` in the directory ``cwd``.

    Args:
        handler: What Lambda's setting of that name would be.
        cwd: The directory of the function's code. In a box, others must be able to read it.
        env: Variables to add to those of this process.
        box: Whether everything, the emulator included, runs in a box.
        shm: The variant of the box.
        cpus: The number of CPUs of the box.
        timeout: Seconds that an invocation may take.
        memory: MB of memory that the function is told to have.
        concurrency: As on Managed Instances, so many invocations at once: see tests.parts.managed.
            For root, and for a function whose directory is not in a box.
        bind: What is to be seen in the box, wherever it lies.

    Raises:
        EmulatorError: It does not come up, or something of it cannot be ended.
    """
    mark = uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        api_port, port = _free_ports(2)
        argv = [
            stack.enter_context(_binary()),
            *("--runtime-api-address", f"{_HOST}:{api_port}"),
            *("--runtime-interface-emulator-address", f"{_HOST}:{port}"),
        ]
        runtime = [sys.executable, "-m", "awslambdaric", handler]
        settings = _settings(timeout, memory)
        if concurrency is None:
            argv += runtime
        else:
            start = [sys.executable, "-m", "tests.parts.managed", os.fspath(Path(cwd).absolute())]
            argv, cwd = [*start, *argv, "--", *runtime], _ROOT
            settings["AWS_LAMBDA_MAX_CONCURRENCY"] = str(concurrency)
        process = subprocess.Popen(
            boxes.command(argv, shm=shm, cpus=cpus, bind=[_ROOT, *bind]) if box else argv,
            cwd=cwd,
            env={**os.environ, **settings, **(env or {}), _MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.enter_context(process)
        stack.callback(_end_all, mark)
        pidfd = stack.enter_context(_pidfd(process.pid))
        function = Function(pidfd, port, log, timeout + _SECONDS_OF_INIT)
        _await_start(process, pidfd, function, port)
        yield function


def _settings(timeout: int, memory: int) -> dict[str, str]:
    return {
        "AWS_LAMBDA_FUNCTION_TIMEOUT": str(timeout),
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(memory),
    }


@contextlib.contextmanager
def _binary() -> Iterator[str]:
    """Yields the path of the emulator, or of a copy if an installer lost the execute permission."""
    spec = importlib.util.find_spec("samcli")
    if spec is None or spec.origin is None:
        raise EmulatorError("there is no emulator: install the package aws-sam-cli")
    path = Path(spec.origin).parent / "local" / "rapid" / _BINARIES[platform.machine()]
    if os.access(path, os.X_OK):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(shutil.copy(path, directory))
        for made in (copy, copy.parent):
            made.chmod(0o755)
        yield str(copy)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((_HOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]


def _await_start(
    process: subprocess.Popen[bytes], pidfd: int, function: Function, port: int
) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while not _is_listening(port):
        if _ends_within(pidfd, _SECONDS_BETWEEN_TRIES):
            raise EmulatorError(
                f"the emulator ended with status {process.wait()} before it listened\n"
                + _quoted(function.log)
            )
        if time.monotonic() > deadline:
            raise EmulatorError(
                f"the emulator did not listen within {_SECONDS_TO_START} seconds\n"
                + _quoted(function.log)
            )


def _is_listening(port: int) -> bool:
    try:
        socket.create_connection((_HOST, port), timeout=_SECONDS_TO_START).close()
    except OSError:
        return False
    return True


def _end_all(mark: str) -> None:
    """Kills every process that has inherited the mark, and returns when all have ended."""
    deadline = time.monotonic() + _SECONDS_TO_STOP
    # Again and again, for one of them may have forked in the meantime.
    while sum(_end(pid, mark, deadline) for pid in _all_pids()):
        if time.monotonic() > deadline:
            raise EmulatorError(
                f"processes of the emulator live on {_SECONDS_TO_STOP} s after a kill"
            )


def _end(pid: int, mark: str, deadline: float) -> bool:
    """Kills a process if it has the mark; says whether it had."""
    with contextlib.suppress(ProcessLookupError), _pidfd(pid) as descriptor:
        # Not before its descriptor is open: from here on the number cannot be another process.
        if not _has_mark(pid, mark):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        _ends_within(descriptor, max(0.0, deadline - time.monotonic()))
        return True
    return False


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _has_mark(pid: int, mark: str) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return False
    return f"{_MARK}={mark}".encode() in variables.split(b"\0")


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _ends_within(pidfd: int, seconds: float) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


def _quoted(log: str) -> str:
    return f"--- log of the function ---\n{log.rstrip()}\n--- end of the log ---"
