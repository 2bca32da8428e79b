"""Managed Instances, durable functions' threads, SnapStart: a handler is at home in each."""

import json
import os
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

import asynclam
from asynclam import Executor, _snapstart
from tests.parts.emulator import emulator, trace_id

ROOT = Path(asynclam.__file__).parent.parent
FUNCTIONS = Path(__file__).parent / "functions"
PATH = {"PYTHONPATH": str(ROOT)}


@pytest.mark.outside
def test_managed_instances(tmp_path, run_in_box):
    """Each process of Managed Instances has a loop and workers of its own, and its part of them."""
    (tmp_path / "event.json").write_text("{}")
    events = ["--event", str(tmp_path / "event.json")] * 8
    settings = ["--memory", "4096", "--concurrency", "2"]
    done = run_in_box(*settings, "--handler", "shapes.handler", *events)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 8
    assert {result["workers"] for result in results} == {1}  # half of two
    assert {tuple(result["lives"]) for result in results} == {("entered",)}
    workers = {result["pid"]: set() for result in results}
    for result in results:
        workers[result["pid"]].add(result["worker"])
    assert len(workers) == 2
    assert all(len(own) == 1 for own in workers.values())
    assert len(set.union(*workers.values())) == 2


@pytest.mark.outside
@pytest.mark.skipif(os.getuid() != 0, reason="for root: see tests.parts.managed")
def test_managed_instances_in_the_emulator():
    """Invocations at once, each with its own ids, in processes that have their own workers."""
    traces = [trace_id(number) for number in range(9)]
    with (
        emulator("shapes.meet", cwd=FUNCTIONS, env=PATH, memory=4096, concurrency=3) as function,
        socket.create_server(("127.0.0.1", 0)) as meeting,
        ThreadPoolExecutor(3) as threads,
    ):
        results = threads.map(function.invoke, [meeting.getsockname()[1]] * 9, traces)
        for _ in range(3):
            three = [meeting.accept()[0] for _ in range(3)]
            for invocation in three:
                invocation.close()
        results = list(results)
    assert [result["trace"] for result in results] == traces
    assert len({result["request"] for result in results}) == 9
    homes = {(result["pid"], result["worker"]) for result in results}
    assert len(homes) == len(dict(homes)) == 3


@pytest.mark.outside
def test_a_handler_in_a_thread():
    """Started in the main thread, called in others: loop, lifespan and workers are kept."""
    with emulator("shapes.in_a_thread", cwd=FUNCTIONS, box=True, env=PATH) as function:
        first, second = function.invoke(), function.invoke()
    assert (first["thread"], second["thread"]) == (False, False)
    assert first["worker"] == second["worker"] == first["at the start"]
    assert second["lives"] == ["entered"]


@pytest.mark.outside
def test_steps_in_threads():
    """Event loops of several threads share the executor, invocation after invocation."""
    with emulator("shapes.steps_in_threads", cwd=FUNCTIONS, box=True, env=PATH) as function:
        for _ in range(2):
            assert function.invoke(20) == [number**2 for number in range(20)]


@pytest.mark.outside
def test_snapstart(tmp_path, run_in_box):
    """The runtime client's hooks renew lifespan, workers and random state after a restore."""
    (tmp_path / "event.json").write_text("{}")
    event = ["--event", str(tmp_path / "event.json")]
    done = run_in_box("--snapstart", "--handler", "shapes.handler", *event, *event)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["lives"] == ["entered", "left", "entered"]
    assert first["worker"] == second["worker"] == first["at the start"]
    assert second["lives"] == first["lives"]
    unchanged = random.Random(1).random()
    assert unchanged not in [*first["random"], *second["random"]]


@pytest.fixture
def run_in_box():
    import subprocess

    def run(*arguments):
        line = [sys.executable, "-m", "asynclam", "box", "--bind", str(ROOT), *arguments]
        return subprocess.run(
            line,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=FUNCTIONS,
            env={**os.environ, **PATH},
        )

    return run


# --- the hooks themselves ------------------------------------------------------------------------


class Spy:
    """A handler that tells what is asked of it."""

    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def close(self):
        self.calls.append("close")


@pytest.fixture
def hooks(monkeypatch):
    """The package's registries, emptied for this test."""
    import snapshot_restore_py as package

    monkeypatch.setattr(package, "_before_snapshot_registry", [])
    monkeypatch.setattr(package, "_after_restore_registry", [])
    return package


def call_all(registry):
    for fn, args, kwargs in registry:
        fn(*args, **kwargs)


async def test_what_the_hooks_do(hooks):
    """Before: handler closed, workers gone. After: handler started, and jobs find new workers."""
    spy = Spy()
    _snapstart.register(spy)
    executor = Executor(max_workers=1)
    asynclam.set_default_executor(executor)
    before = await asynclam.run_cpu(os.getpid)
    call_all(hooks.get_before_snapshot())
    assert spy.calls == ["close"]
    assert executor.statistics().workers_idle == 0
    random.seed(1)
    call_all(hooks.get_after_restore())
    assert spy.calls == ["close", "start"]
    assert random.random() != random.Random(1).random()
    assert await asynclam.run_cpu(os.getpid) != before


def test_numpy_is_reseeded(hooks, monkeypatch):
    """NumPy's random state is renewed where it is loaded."""
    seeded = []
    numpy_random = ModuleType("numpy.random")
    numpy_random.seed = lambda: seeded.append(True)
    monkeypatch.setitem(sys.modules, "numpy.random", numpy_random)
    _snapstart.register(Spy())
    call_all(hooks.get_after_restore())
    assert seeded


@pytest.mark.parametrize(("kind", "hooked"), [("snap-start", 1), ("on-demand", 0)])
def test_registered_once(hooks, monkeypatch, kind, hooked):
    """start() registers under SnapStart only, and once, although the hooks call it, too."""
    monkeypatch.setenv("AWS_LAMBDA_INITIALIZATION_TYPE", kind)

    @asynclam.lambda_handler
    async def handler(event, context):
        return event

    for _ in range(2):
        handler.start()
    assert len(hooks.get_before_snapshot()) == len(hooks.get_after_restore()) == hooked
    handler.close()


def test_without_numpy(hooks, monkeypatch):
    """Nothing is imported for it: the handler is started, and random numbers are renewed."""
    monkeypatch.delitem(sys.modules, "numpy.random", raising=False)
    spy = Spy()
    _snapstart.register(spy)
    random.seed(1)
    call_all(hooks.get_after_restore())
    assert spy.calls == ["start"]
    assert random.random() != random.Random(1).random()
    assert "numpy.random" not in sys.modules
