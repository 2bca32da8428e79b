"""What examples/deploy has: checked, built, and run as Lambda would run it.

Needs tools that are large: ``make deploy`` installs them, runs this, and shows what is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

import asynclam
from asynclam import s3
from tests.parts.emulator import emulator

pytestmark = [pytest.mark.outside, pytest.mark.timeout(400)]

EXAMPLES = Path(asynclam.__file__).parent.parent / "examples"
DEPLOY = EXAMPLES / "deploy"
RUNTIME = f"python{sys.version_info.major}.{sys.version_info.minor}"
SECONDS_BETWEEN_TRIES = 0.05
PATIENCE = 200  # seconds
SANDBOXES = 3  # at once
OWN_CODE = 200_000  # bytes of asynclam's own code in the zip

WHERE = """\
def handler(event, context):
    import asyncio, aiobotocore, asynclam, botocore, uvloop
    modules = asyncio, aiobotocore, asynclam, botocore, uvloop
    return {module.__name__: [module.__file__, module.__cached__] for module in modules}
"""
MEET = """\
import asyncio, os
from asynclam import lambda_handler, run_cpu

@lambda_handler
async def handler(event, context):
    worker = await run_cpu(os.getpid)
    reader, writer = await asyncio.open_connection("127.0.0.1", event["port"])
    await reader.read()  # to its end: all are under way
    writer.close()
    await writer.wait_closed()
    return [os.getpid(), worker]
"""
BARE = """\
import asyncio, uvloop
def handler(event, context):
    return None
"""


@pytest.fixture(scope="session")
def tools():
    """The directory of the tools' commands."""
    if "ASYNCLAM_DEPLOY" not in os.environ:
        pytest.skip("its tools are large: make deploy")
    return Path(os.environ["ASYNCLAM_DEPLOY"])


def run(*command, **options):
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tools, tmp_path_factory):
    """The zip that the recipe makes, unpacked."""
    directory = tmp_path_factory.mktemp("package")
    archive = directory / "function.zip"
    sources = [EXAMPLES / "hello.py", EXAMPLES / "s3_to_s3.py"]
    said = run(sys.executable, DEPLOY / "package.py", "--output", archive, *sources)
    print(f"\n{said}")
    with zipfile.ZipFile(archive) as file:
        file.extractall(directory / "task")
    for path in [directory.parent, directory, *(directory / "task").rglob("*")]:
        path.chmod(path.stat().st_mode | 0o755 if path.is_dir() else 0o644)
    return directory


# --- checks --------------------------------------------------------------------------------------


def test_the_template_is_valid(tools):
    """cfn-lint has nothing to say of the template."""
    assert run(tools / "cfn-lint", DEPLOY / "template.yaml") == ""


def test_the_dockerfile_is_valid(tools):
    """Hadolint has nothing to say of the Dockerfile, and its sources are where it looks for them."""
    assert run(tools / "hadolint", DEPLOY / "Dockerfile") == ""
    for word in (DEPLOY / "Dockerfile").read_text().split():
        if word.startswith("/source/"):
            assert (EXAMPLES.parent / word.removeprefix("/source/")).is_file(), word


def test_sam_builds_it(tools, tmp_path):
    """``sam build`` makes by the recipe what the template tells of."""
    run(
        *(tools / "sam", "build", "S3ToS3", "--parameter-overrides", f"Runtime={RUNTIME}"),
        *("--build-dir", tmp_path / "build", "--cache-dir", tmp_path / "cache"),
        cwd=DEPLOY,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "SAM_CLI_TELEMETRY": "0",
            "HOME": str(tmp_path),
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    )
    built = {path.name for path in (tmp_path / "build" / "S3ToS3").iterdir()}
    assert {"s3_to_s3.py", "asynclam", "aiobotocore", "uvloop"} <= built
    assert not (DEPLOY / ".aws-sam").exists()


# --- the zip -------------------------------------------------------------------------------------


def test_what_is_in_it(package):
    """Trimmed and compiled: S3's description, Amazon's authorities, a .pyc for each module."""
    task = package / "task"
    services = {path.name for path in (task / "botocore" / "data").iterdir() if path.is_dir()}
    assert services == {"s3", "sts"}
    authorities = (task / "botocore" / "cacert.pem").read_text()
    assert "Amazon Root CA 1" in authorities
    assert authorities.count("BEGIN CERTIFICATE") <= 8
    for source in task.rglob("*.py"):
        assert list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc")), source
    with zipfile.ZipFile(package / "function.zip") as archive:
        own = [info for info in archive.infolist() if info.filename.startswith("asynclam/")]
    code = sum(info.compress_size for info in own if info.filename.endswith(".py"))
    assert 0 < code <= OWN_CODE


def test_the_same_input_makes_the_same_zip(package):
    """What is packed again is the same, byte by byte."""
    recipe = runpy.run_path(str(DEPLOY / "package.py"))
    recipe["pack"](package / "function", package / "again.zip")
    assert (package / "again.zip").read_bytes() == (package / "function.zip").read_bytes()


def test_it_runs_in_the_box(package):
    """Under the emulator everything comes from the package, compiled; cold starts are printed."""
    (package / "task" / "where.py").write_text(WHERE)
    (package / "task" / "bare.py").write_text(BARE)
    with emulator("where.handler", cwd=package / "task", box=True) as function:
        found = function.invoke()
    found.pop("asyncio")
    assert {
        Path(file).is_relative_to(package / "task") for pair in found.values() for file in pair
    } == {True}
    for name, event, result in (
        ("bare", None, None),
        ("hello", {"n": 10}, {"result": 55}),
    ):
        cold, warm = [], []
        for _ in range(3):
            with emulator(f"{name}.handler", cwd=package / "task", box=True) as function:
                for seconds in (cold, warm):
                    before = time.perf_counter()
                    assert function.invoke(event) == result
                    seconds.append(time.perf_counter() - before)
        print(f"{name}: cold {1000 * min(cold):.0f} ms, warm {1000 * min(warm):.1f} ms")


async def test_it_does_s3_in_the_box(package, s3_environment, authority, s3_client, bucket):
    """The trimmed package downloads, computes, and uploads."""
    for number in range(3):
        await s3.upload(s3_client, bucket, f"text-{number}", b"one two two ")
    keys = [f"text-{number}" for number in range(3)]
    event = {"bucket": bucket, "keys": keys, "report": "report.json"}
    with emulator(
        "s3_to_s3.handler",
        cwd=package / "task",
        box=True,
        env=s3_environment,
        bind=[authority.ca_file],
    ) as function:
        before = time.perf_counter()
        assert function.invoke(event) == {"words": 9, "different": 2}
        print(f"s3_to_s3: cold {1000 * (time.perf_counter() - before):.0f} ms")


# --- a real function -----------------------------------------------------------------------------


@pytest.fixture
def ministack(tools, tmp_path):
    """A local AWS that runs zips; all that it starts is ended."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    settings = {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "IOT_MTLS_ENABLED": "0",
        "LAMBDA_EXECUTOR": "local",
        "SERVICES": "lambda,s3",
        "TMPDIR": str(tmp_path),
    }
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [tools / "ministack"],
            cwd=tmp_path,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(tmp_path, ignore_errors=True)


async def test_invoked_as_a_real_function(package, ministack):
    """Deployed by the API, invoked at the same time: each sandbox has its own loop and workers.

    Each is of a function of its own, of the same code: this local AWS has one sandbox a function.
    """
    url = ministack
    settings = {
        "endpoint_url": url,
        "region_name": "us-east-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        # An invocation that is sent again would come to a meeting that is over.
        "config": AioConfig(read_timeout=PATIENCE, retries={"max_attempts": 0}),
    }
    await answers(url)
    session = get_session()
    async with (
        session.create_client("lambda", **settings) as functions,
        session.create_client("s3", **settings) as objects,
    ):
        await objects.create_bucket(Bucket="bucket")
        await objects.put_object(Bucket="bucket", Key="key", Body=b"one two two")
        shutil.copy(package / "function.zip", package / "more.zip")
        with zipfile.ZipFile(package / "more.zip", "a") as archive:
            archive.writestr("meet.py", MEET)
        with open(package / "more.zip", "rb") as body:
            await objects.put_object(Bucket="bucket", Key="function.zip", Body=body)
        guests = [f"meet-{number}" for number in range(SANDBOXES)]
        for name in (*guests, "s3_to_s3"):
            await functions.create_function(
                FunctionName=name,
                Runtime=RUNTIME,
                Role="arn:aws:iam::000000000000:role/any",
                Handler=f"{name.partition('-')[0]}.handler",
                MemorySize=3008,
                Timeout=60,
                Code={"S3Bucket": "bucket", "S3Key": "function.zip"},
                Environment={"Variables": {"AWS_ENDPOINT_URL": url}},
            )

        async def invoke(name, event):
            reply = await functions.invoke(FunctionName=name, Payload=json.dumps(event))
            return json.loads(await reply["Payload"].read())

        async with meeting(SANDBOXES) as port:
            meet = [invoke(name, {"port": port}) for name in guests]
            sandboxes = await asyncio.gather(*meet)
        assert len({pid for pids in sandboxes for pid in pids}) == 2 * SANDBOXES, sandboxes
        event = {"bucket": "bucket", "keys": ["key"], "report": "report"}
        assert await invoke("s3_to_s3", event) == {"words": 3, "different": 2}


@contextlib.asynccontextmanager
async def meeting(guests):
    """A server that lets its clients go when as many are there; its port."""
    waiting = []

    async def welcome(_, writer):
        waiting.append(writer)
        if len(waiting) == guests:
            for guest in waiting:
                guest.close()
                await guest.wait_closed()

    server = await asyncio.start_server(welcome, "127.0.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1]


async def answers(url):
    """Waits until the server does: it tells nobody when it is there."""
    host, _, port = url.removeprefix("http://").partition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            await asyncio.sleep(SECONDS_BETWEEN_TRIES)
        else:
            writer.close()
            await writer.wait_closed()
            return
