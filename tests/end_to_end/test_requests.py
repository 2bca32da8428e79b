"""Three invocations under the real runtime client: each line of the log has its own request's id."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asynclam._box import invocations
from tests.parts.emulator import Function, FunctionError, emulator, trace_id

FUNCTIONS = Path(__file__).parent / "functions"


# Without a trace, and one at a time with one: what the emulator can do. Both kinds are in a box.
EMULATORS = [
    pytest.param(None, id="box"),
    pytest.param(
        1,
        id="managed",
        marks=pytest.mark.skipif(os.getuid() != 0, reason="for root: see tests.parts.managed"),
    ),
]


@pytest.mark.outside
@pytest.mark.parametrize("concurrency", EMULATORS)
@pytest.mark.parametrize("log_format", ["Text", "JSON"])
@pytest.mark.parametrize(
    ("handler", "loop"), [("kept", "uvloop"), ("kept", "asyncio"), ("run", "asyncio")]
)
def test_three_invocations(
    handler: str, loop: str, log_format: str, concurrency: int | None
) -> None:
    """The same worker serves them; its lines have the request id, its environment the trace id."""
    environment = {
        "TESTS_LOOP": loop,
        "AWS_LAMBDA_LOG_FORMAT": log_format,
        "AWS_LAMBDA_LOG_LEVEL": "INFO",
    }
    traces = [trace_id(number) for number in range(3)]
    with emulator(
        f"requests.{handler}",
        cwd=FUNCTIONS,
        env=environment,
        box=concurrency is None,
        concurrency=concurrency,
    ) as function:
        results = [function.invoke({}, trace) for trace in traces]
        lines = lines_of(function, 9)
    requests = [result["request"] for result in results]
    assert len(set(requests)) == 3
    assert {result["loop"] for result in results} == {loop}
    assert len({result["pid"] for result in results}) == 1
    expected = [None] * 3 if concurrency is None else traces
    assert [result["trace"] for result in results] == expected
    assert sorted(map(told_of(log_format), lines)) == sorted(
        (request, f"{who} of {request}")
        for request in requests
        for who in ("handler", "job", "powertools")
    )


def lines_of(function: Function, most: int) -> list[str]:
    """What was logged: on Managed Instances the emulator passes that on, and answers before it has."""
    deadline = time.monotonic() + 10
    while True:
        lines = [line for line in function.log.splitlines() if " of " in line]
        if len(lines) >= most or time.monotonic() > deadline:
            return lines
        os.sched_yield()


def told_of(log_format: str) -> Any:
    """Gives the request id that is stamped on a line, and its message."""

    def of(line: str) -> tuple[str, str]:
        if line.startswith("{"):
            record = json.loads(line)
            return record.get("requestId") or record["function_request_id"], record["message"]
        assert log_format == "Text"
        *_, request, message = line.split("\t")
        return request, message

    return of


@pytest.mark.outside
@pytest.mark.parametrize("box", [False, True], ids=["plain", "box"])
def test_a_deadline(box: bool) -> None:
    """With a download and a CPU job running it is we who report, and all is warm afterwards."""
    with emulator("requests.slow", cwd=FUNCTIONS, timeout=2, box=box) as function:
        before = function.invoke({})
        for _ in range(2):
            with pytest.raises(FunctionError) as caught:
                function.invoke({"work": True})
            assert caught.value.kind == "DeadlineExceededError"
            assert "in workers: requests.spin (" in caught.value.text
            after = function.invoke({})
            assert (after["loop"], after["process"]) == (before["loop"], before["process"])


@pytest.mark.parametrize("image", [False, True], ids=["managed runtime", "image"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_sigterm_to_an_idle_sandbox(loop: str, image: bool) -> None:
    """While the runtime client waits for an event, in C on some Pythons, the lifespan is left."""
    told: queue.SimpleQueue[invocations.Told] = queue.SimpleQueue()
    with invocations._served(told) as address:
        variables = invocations._variables("requests.polite", address, invocations.How(timeout=30))
        if image:  # where the base image is not AWS's, the runtime client knows no version
            del variables["AWS_EXECUTION_ENV"]
        with subprocess.Popen(
            [sys.executable, "-m", "awslambdaric", "requests.polite"],
            cwd=FUNCTIONS,
            env={**os.environ, **variables, "TESTS_LOOP": loop},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            for event in ("first", "second"):
                request = told.get(timeout=_SECONDS)
                assert request.kind == "next"
                request.answer.put(invocations.Invocation(event, time.time() + 30))
                assert json.loads(told.get(timeout=_SECONDS).body) == event
            waiting = told.get(timeout=_SECONDS)
            process.terminate()
            try:
                log, _ = process.communicate(timeout=_SECONDS)
            finally:
                process.kill()
                waiting.answer.put(None)
    assert log.split() == ["enter", "leave"]
    assert process.returncode in {-signal.SIGTERM, 128 + signal.SIGTERM}


_SECONDS = 20.0  # none of it takes more than one; a machine may be busy

FRAMED = """
import logging, os, sys
from awslambdaric import bootstrap
from asynclam import lambda_handler, run_cpu
from asynclam.testing import LambdaContext

def job(request):
    logging.getLogger("job").warning("job of %s", request)
    try:
        1 / 0
    except ZeroDivisionError:
        logging.getLogger("job").exception("failed in %s", request)

def main(descriptor):
    with bootstrap.FramedTelemetryLogSink(descriptor) as sink:
        bootstrap._setup_logging(bootstrap._AWS_LAMBDA_LOG_FORMAT, "", sink)

        @lambda_handler
        async def handler(event, context):
            await run_cpu(job, context.aws_request_id)

        for number in range(3):
            context = LambdaContext(aws_request_id=f"request-{number}")
            bootstrap._GLOBAL_AWS_REQUEST_ID = context.aws_request_id
            handler(None, context)
        handler.close()

if __name__ == "__main__":
    main(int(sys.argv[1]))
"""


@pytest.mark.parametrize("log_format", ["TEXT", "JSON"])
def test_the_frames_of_the_runtime_client(tmp_path: Path, log_format: str) -> None:
    """Records of workers go through its own sink: a frame each, with level, request id and error."""
    program = tmp_path / "framed.py"
    program.write_text(FRAMED)
    reader, writer = os.pipe()
    subprocess.run(
        [sys.executable, program, str(writer)],
        check=True,
        timeout=60,
        pass_fds=[writer],
        env={**os.environ, "AWS_LAMBDA_LOG_FORMAT": log_format},
    )
    os.close(writer)
    with open(reader, "rb") as pipe:
        messages = list(frames(pipe.read()))
    assert len(messages) == 6
    for index, message in enumerate(messages):
        request = f"request-{index // 2}"
        if log_format == "JSON":
            record = json.loads(message)
            assert record["requestId"] == request
            assert record["message"] == f"{('job of', 'failed in')[index % 2]} {request}"
            if index % 2:
                assert (record["errorType"], record["errorMessage"]) == (
                    "ZeroDivisionError",
                    "division by zero",
                )
                assert "1 / 0" in record["stackTrace"][-1]
        else:
            assert f"\t{request}\t" in message
            assert ("1 / 0" in message) == bool(index % 2)


def frames(data: bytes) -> Any:
    """The messages of telemetry frames: type, length, and time before each."""
    while data:
        assert data[:2] == b"\xa5\x5a"
        length = int.from_bytes(data[4:8], "big")
        yield data[16 : 16 + length].decode()
        data = data[16 + length :]
