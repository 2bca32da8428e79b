"""Every example runs, and every Python block of the README is in one of them."""

import doctest
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import asynclam
from asynclam import s3

ROOT = Path(asynclam.__file__).parent.parent
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=EXAMPLES,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def invoke(module: str, event: object, **environment: str) -> object:
    """The result of a handler in a fresh process, as the runtime client calls it."""
    code = (
        f"import json, {module}\n"
        f"print(json.dumps({module}.handler(json.loads({json.dumps(event)!r}), None)))"
    )
    return json.loads(run("-c", code, **environment))


def test_hello():
    """The smallest handler returns what the function returns."""
    assert invoke("hello", {"n": 10}) == {"result": 55}


async def test_s3_to_s3(s3_environment, s3_client, bucket):
    """Objects are downloaded, counted, and the report is in S3."""
    texts = {f"text-{number}": b"one two two " * number for number in range(1, 6)}
    for key, text in texts.items():
        await s3.upload(s3_client, bucket, key, text)
    event = {"bucket": bucket, "keys": list(texts), "report": "report.json"}
    assert invoke("s3_to_s3", event, **s3_environment) == {"words": 45, "different": 2}
    report = await s3.download(s3_client, bucket, "report.json")
    assert json.loads(bytes(report.view)) == {"one": 15, "two": 30}


@pytest.mark.skipif(
    find_spec("aws_durable_execution_sdk_python_testing") is None,
    reason="its SDK is installed on one of the Pythons",
)
def test_durable():
    """Suspended and replayed by the real SDK: its step has run once, in the invocation before."""
    event = {"texts": ["one", "two"], "seconds": 1}
    code = (
        "import durable, json\n"
        "from aws_durable_execution_sdk_python_testing.runner import DurableFunctionTestRunner\n"
        "with DurableFunctionTestRunner(handler=durable.handler) as runner:\n"
        f"    result = runner.run(input=json.dumps({event}), execution_timeout=60)\n"
        "print(json.dumps([result.status.name, result.result, result.get_step('digests').result]))"
    )
    status, result, digests = json.loads(run("-c", code))
    assert status == "SUCCEEDED"
    assert list(json.loads(result)) == ["one", "two"]
    assert list(json.loads(result).values()) == json.loads(digests)


def test_gather():
    """One gather awaits a worker, a thread and the loop."""
    key, names, kernel = run("gather.py").split()
    assert (len(key), int(names) > 0, kernel) == (16, True, os.uname().release)


def test_pipeline():
    """The pipeline's results are those of a loop."""
    assert "decoder.py" in run("pipeline.py")


def test_sqs_batch():
    """What failed, or was late, comes again; what was done does not."""
    code = (
        "import json, sqs_batch\n"
        "from asynclam.testing import LambdaContext, sqs_event\n"
        "for seconds in 60, 0.99:\n"
        "    result = sqs_batch.handler(sqs_event('one', '', 'three'), LambdaContext(seconds))\n"
        "    print(json.dumps(result))\n"
    )
    *printed, first, second = run("-c", code).splitlines()
    assert sorted(line.split()[0] for line in printed) == ["message-0", "message-2"]
    failed = [item["itemIdentifier"] for item in json.loads(first)["batchItemFailures"]]
    assert failed == ["message-1"]
    late = [item["itemIdentifier"] for item in json.loads(second)["batchItemFailures"]]
    assert late == ["message-0", "message-1", "message-2"]


async def test_s3_progress(s3_environment, s3_client, bucket):
    """Bars of rich and of tqdm go along with downloads."""
    for number in range(3):
        await s3.upload(s3_client, bucket, f"progress/{number}", b"one two three")
    printed = run("s3_progress.py", bucket, "progress/", **s3_environment)
    assert "9 words" in printed
    assert "13 bytes" in printed or "tqdm is not installed" in printed


async def test_s3_in_workers(s3_environment, s3_client, bucket):
    """Workers have clients of their own, which their initializer has made."""
    for number in range(20):
        await s3.upload(s3_client, bucket, f"workers/{number}", b"one two three " * number)
    printed = run("s3_in_workers.py", bucket, "workers/", **s3_environment)
    assert printed == f"{3 * sum(range(20))} words\n"


def test_every_example_is_tested():
    """No example goes without a test."""
    tested = {
        "asgi", "durable", "hello", "s3_to_s3", "s3_in_workers", "gather", "pipeline", "sqs_batch",
        "s3_progress", "s3_formats",  # this one in a module of its own
    }  # fmt: skip
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
def test_readme(block):
    """What the README shows is what runs."""
    assert any(block in path.read_text() for path in EXAMPLES.glob("*.py"))


@pytest.mark.outside
def test_readme_console():
    """Its commands print what it says they do; the machine's own is left out, as ``...``."""
    (block,) = re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL)
    entered, *commands = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", block, re.MULTILINE)
    assert entered == ("cd examples", "")
    for shown, expected in commands:
        # As in a checkout, which may lie where the box hides it.
        command = shown.replace("asynclam box", f"asynclam box --bind {ROOT}")
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=EXAMPLES,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        seen = doctest.OutputChecker().check_output(expected, done.stdout, doctest.ELLIPSIS)
        assert seen, done.stdout
    assert len(commands) == 2
