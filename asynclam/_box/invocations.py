"""Runs a handler in a box as the Lambda service would: the Runtime API, and a freeze in between.

Theory of operation::

    this process: Runtime API ◄──── HTTP ────► the runtime client, in the box
         └── control ────────────► init of the box: FREEZE, THAW

The runtime client asks for the next event and is answered when there is one; it posts the result, or
the error, and asks again. That is when Lambda freezes the sandbox, and so does this, if it was told
to: the request for the next event is on its way then, and is answered after the thaw. The server has
a thread for each connection; what they tell goes through one queue to :func:`run`, which alone
decides what comes next.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from . import box
from .kernel import BoxError

_HOST = "127.0.0.1"
_API = "/2018-06-01/runtime"
_FAILED = 1
_SECONDS_OF_INIT = 10.0  # Lambda's own limit


@dataclass(frozen=True)
class Told:
    """What the runtime client has told, or its end.

    Attributes:
        kind: the request that it made; ``"end"``: its process has ended.
        body: what came with it.
        request_id: that of the invocation that it is about, if any.
        answer: where the answer to ``"next"`` and ``"restore"`` is awaited.
    """

    kind: Literal["restore", "next", "response", "error", "init error", "end"]
    body: bytes = b""
    request_id: str = ""
    answer: queue.SimpleQueue[Invocation | None] = field(default_factory=queue.SimpleQueue)


@dataclass(frozen=True)
class Invocation:
    """An event that is handed out, and until when."""

    event: Any
    deadline: float  # seconds since the epoch
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass(frozen=True)
class How:
    """What the sandbox goes through.

    Attributes:
        timeout: seconds that an invocation may take.
        freeze: seconds for which all processes are stopped between invocations; ``None``: not.
        snapstart: whether it is frozen between the hooks before a snapshot and those after it.
        concurrency: as on Managed Instances, how many processes the runtime client forks, for as
            many invocations at once; ``None``: one after the other in the one that there is.
    """

    timeout: float
    freeze: float | None = None
    snapstart: bool = False
    concurrency: int | None = None

    @property
    def processes(self) -> int:
        """How many of them ask for events."""
        return self.concurrency or 1

    @property
    def initialization(self) -> str:
        """What Lambda calls it."""
        if self.concurrency is not None:
            return "lambda-managed-instances"
        return "snap-start" if self.snapstart else "on-demand"


class _FunctionError(Exception):
    """The function has failed, as it was told."""


def run(
    handler: str,
    events: Sequence[str],
    how: How,
    options: box.Options,
) -> int:
    """Invokes a handler with events; prints the results; the exit status.

    Args:
        handler: ``module.name``, found in the working directory.
        events: files of JSON; ``-`` is standard input; none at all: ``{}``.
        how: what the sandbox goes through.
        options: what the box is to be like.

    Raises:
        BoxError: an event is no JSON, or there is no runtime client.
    """
    documents = [_document(name) for name in events] or [{}]
    if importlib.util.find_spec("awslambdaric") is None:
        raise BoxError(
            f"--handler needs the runtime client of AWS: {sys.executable} -m pip install awslambdaric"
        )
    told: queue.SimpleQueue[Told] = queue.SimpleQueue()
    options = replace(options, argv=[sys.executable, "-m", "awslambdaric", handler])
    with (
        _served(told) as address,
        _function(options, _variables(handler, address, how)) as (process, control),
    ):
        threading.Thread(target=_await_end, args=(process, told), daemon=True).start()
        try:
            return _Service(documents, told, control, how).run()
        except _FunctionError as failure:
            box.complain(str(failure))
            return box.BOX_FAILED if process.poll() == box.BOX_FAILED else _FAILED


def _document(name: str) -> Any:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise BoxError(f"--event {name}: {error}") from error


class _Service:
    """What hands out the events, and waits for what becomes of them."""

    def __init__(
        self,
        documents: list[Any],
        told: queue.SimpleQueue[Told],
        control: socket.socket,
        how: How,
    ) -> None:
        self._documents = list(enumerate(documents, 1))
        self._told = told
        self._control = control
        self._how = how
        self._waiting: list[Told] = []  # requests for the next event
        self._running: dict[str, tuple[int, Invocation]] = {}
        self._status = 0

    def run(self) -> int:
        """Invokes the function with all events; the exit status."""
        limit = _SECONDS_OF_INIT + self._how.timeout
        while len(self._waiting) < self._how.processes:
            self._take(limit, "the init of the function takes too long")
        while self._documents or self._running:
            self._hand_out()
            self._take(*self._patience())
        while len(self._waiting) < self._how.processes:  # else it has died of the last event
            self._take(limit, "the runtime client does not ask for the next event")
        return self._status

    def _hand_out(self) -> None:
        while self._documents and self._waiting:
            number, document = self._documents.pop(0)
            if number > 1 and self._how.freeze is not None and not self._running:
                _freeze(self._control, self._how.freeze)
            invocation = Invocation(document, time.time() + self._how.timeout)
            self._running[invocation.request_id] = number, invocation
            self._waiting.pop(0).answer.put(invocation)

    def _patience(self) -> tuple[float, str]:
        """For how many seconds to wait for what comes next, and what to say then."""
        timeout = self._how.timeout
        if not self._running:
            return timeout, "the runtime client does not ask for the next event"
        first = min(invocation.deadline for _, invocation in self._running.values())
        return max(0.0, first - time.time()), f"Task timed out after {timeout:.2f} seconds"

    def _take(self, seconds: float, late: str) -> None:
        """Waits for what the runtime client tells next."""
        try:
            what = self._told.get(timeout=seconds)
        except queue.Empty:
            raise _FunctionError(late) from None
        if what.kind == "end":
            raise _FunctionError(f"Runtime exited: {what.body.decode()}")
        if what.kind == "init error":
            raise _FunctionError(f"the init of the function has failed: {_error_of(what.body)}")
        if what.kind == "restore":
            _freeze(self._control, self._how.freeze or 0.0)
            what.answer.put(None)
        elif what.kind == "next":
            self._waiting.append(what)
        else:
            self._outcome(what)

    def _outcome(self, what: Told) -> None:
        number, _ = self._running.pop(what.request_id)
        print(what.body.decode(), flush=True)
        if what.kind == "error":
            self._status = _FAILED
            box.complain(f"invocation {number} has failed: {_error_of(what.body)}")


def _error_of(body: bytes) -> str:
    try:
        error = json.loads(body)
        return f"{error['errorType']}: {error['errorMessage']}"
    except (ValueError, KeyError, TypeError):  # not as the runtime client puts it
        return body.decode(errors="replace")


def _freeze(control: socket.socket, seconds: float) -> None:
    for order in (box.FREEZE, box.THAW):
        try:
            control.sendall(order)
            control.recv(1)  # it is done
        except OSError:  # the box has ended, which is told by its status
            return
        if order == box.FREEZE:
            select.select([], [], [], seconds)


# -- The function in its box -----------------------------------------------------------------------


@contextlib.contextmanager
def _function(
    options: box.Options, variables: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """The runtime client in a box, and what freezes it; ended in the end."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                box.command_line(replace(options, control=theirs.fileno())),
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),  # as what it prints is the log
                pass_fds=[theirs.fileno()],
            )
        try:
            yield process, ours
        finally:
            # By the box: it passes the signal on, and has a control group to remove.
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_SECONDS_OF_INIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _variables(handler: str, address: str, how: How) -> dict[str, str]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    variables = {
        "AWS_EXECUTION_ENV": f"AWS_Lambda_python{version}",
        "AWS_LAMBDA_FUNCTION_NAME": handler,
        "AWS_LAMBDA_FUNCTION_TIMEOUT": str(round(how.timeout)),
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_INITIALIZATION_TYPE": how.initialization,
        "AWS_LAMBDA_RUNTIME_API": address,
        "LAMBDA_TASK_ROOT": os.getcwd(),
        "TZ": ":UTC",
        "_HANDLER": handler,
    }
    if how.concurrency is not None:
        variables["AWS_LAMBDA_MAX_CONCURRENCY"] = str(how.concurrency)
    return variables


def _await_end(process: subprocess.Popen[bytes], told: queue.SimpleQueue[Told]) -> None:
    status = process.wait()
    told.put(Told("end", f"exit status {status}".encode()))


# -- The Runtime API -------------------------------------------------------------------------------


@contextlib.contextmanager
def _served(told: queue.SimpleQueue[Told]) -> Iterator[str]:
    """Serves the Runtime API; its address."""

    class Handler(_Handler):
        pass

    Handler.told = told
    with ThreadingHTTPServer((_HOST, 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"{_HOST}:{server.server_address[1]}"
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    """https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html."""

    told: queue.SimpleQueue[Told]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        request = Told("restore" if self.path == f"{_API}/restore/next" else "next")
        self.told.put(request)
        invocation = request.answer.get()
        if invocation is None:  # to be restored, that is all
            self._answer(200, b"", {})
            return
        self._answer(
            200,
            json.dumps(invocation.event).encode(),
            {
                "Lambda-Runtime-Aws-Request-Id": invocation.request_id,
                "Lambda-Runtime-Deadline-Ms": str(int(invocation.deadline * 1000)),
                "Lambda-Runtime-Invoked-Function-Arn": (
                    "arn:aws:lambda:us-east-1:012345678912:function:box"
                ),
                "Lambda-Runtime-Trace-Id": (
                    f"Root=1-{round(time.time()):08x}-{uuid.uuid4().hex[:24]};Sampled=0"
                ),
            },
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(202, b"{}", {})
        before, _, last = self.path.rpartition("/")
        if before == f"{_API}/invocation/{before.rpartition('/')[2]}":
            kind: Literal["response", "error"] = "response" if last == "response" else "error"
            self.told.put(Told(kind, body, before.rpartition("/")[2]))
        else:  # /init/error or /restore/error
            self.told.put(Told("init error", body))

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**_headers(body), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Says nothing: the log is the function's."""


def _headers(body: bytes) -> dict[str, str]:
    # Without a type the runtime client dies of SIGSEGV.
    return {"Content-Type": "application/json", "Content-Length": str(len(body))}
