"""``lambda_handler``: a sync handler out of an async one, its loop, lifespan and workers."""

import asyncio
import ctypes
import gc
import os
import subprocess
import sys
from contextlib import asynccontextmanager

import anyio
import pytest

from asynclam import Executor, _default, lambda_handler, run_cpu, state
from tests import jobs


class Lifespan:
    """Counts how often it was entered and left, and in which tasks."""

    def __init__(self):
        self.events = []
        self.tasks = []

    @asynccontextmanager
    async def __call__(self):
        self.events.append("enter")
        self.tasks.append(asyncio.current_task())
        async with anyio.create_task_group():  # must be left in the task that entered it
            yield {"client": "resource"}
        self.tasks.append(asyncio.current_task())
        self.events.append("leave")


@pytest.fixture
def handlers():
    """Makes handlers, and closes them."""
    made = []

    def make(fn, **options):
        made.append(lambda_handler(fn) if not options else lambda_handler(**options)(fn))
        return made[-1]

    yield make
    for handler in made:
        handler.close()


async def echo(event, context):
    """The handler of the tests."""
    return {"event": event, "context": context}


def test_a_sync_handler(handlers):
    """The runtime calls it as any sync handler."""
    assert handlers(echo)("event", "context") == {"event": "event", "context": "context"}


def test_it_wraps(handlers):
    """Name, docstring and the coroutine function itself are kept."""
    handler = handlers(echo)
    assert (handler.__name__, handler.__doc__) == ("echo", "The handler of the tests.")
    assert handler.__wrapped__ is echo


def test_one_loop_and_warm_workers(handlers):
    """Loop and workers live across invocations."""

    async def handler(event, context):
        return id(asyncio.get_running_loop()), await run_cpu(jobs.pid)

    handler = handlers(handler)
    assert len({handler(None, None) for _ in range(3)}) == 1


def test_uvloop_where_it_is_installed(handlers):
    """The loop is uvloop's."""

    async def handler(event, context):
        return type(asyncio.get_running_loop()).__module__

    assert handlers(handler)(None, None) == "uvloop"


def test_lifespan(handlers):
    """Resources are entered once, reached by ``state()``, and left in the task that entered them."""
    lifespan = Lifespan()

    async def handler(event, context):
        async def deeper():
            return state()["client"]

        return await asyncio.create_task(deeper())

    handler = handlers(handler, lifespan=lifespan)
    assert [handler(None, None) for _ in range(3)] == ["resource"] * 3
    assert lifespan.events == ["enter"]
    handler.close()
    assert lifespan.events == ["enter", "leave"]
    assert lifespan.tasks[0] is lifespan.tasks[1]


def test_start_at_init(handlers):
    """``handler.start()`` enters the lifespan at init; a second start does nothing."""
    lifespan = Lifespan()
    handler = handlers(echo, lifespan=lifespan)
    handler.start()
    handler.start()
    assert lifespan.events == ["enter"]
    handler(1, 2)
    assert lifespan.events == ["enter"]


def test_a_worker_is_started_at_init(handlers, monkeypatch):
    """The first job finds a worker that has the environment of the end of the init, and starts none."""
    monkeypatch.setenv("OF_THE_LIFESPAN", "not yet")

    @asynccontextmanager
    async def lifespan():
        os.environ["OF_THE_LIFESPAN"] = "here"
        yield

    async def handler(event, context):
        return await run_cpu(os.getenv, "OF_THE_LIFESPAN"), executor.statistics()

    executor = Executor(2, start_method="fork")
    handler = handlers(handler, lifespan=lifespan, executor=executor)
    handler.start()
    assert alive(executor.statistics()) == 1
    value, statistics = handler(None, None)
    assert (value, alive(statistics)) == ("here", 1)
    executor.kill()


@pytest.mark.parametrize("how", [{"start_method": "spawn"}, {"max_workers": 0}], ids=str)
def test_no_worker_is_started_at_init(handlers, how):
    """A spawned server is to know first what the job imports; without workers there is none."""
    executor = Executor(**how)
    handler = handlers(echo, executor=executor)
    handler.start()
    assert alive(executor.statistics()) == 0
    executor.kill()
    assert handler(1, 2) == {"event": 1, "context": 2}  # who needs no job needs no executor
    handler.close()
    handler.start()
    assert alive(executor.statistics()) == 0


def alive(statistics):
    """How many workers there are, ready or not."""
    return statistics.workers_starting + statistics.workers_idle + statistics.workers_busy


def test_a_lifespan_that_fails(handlers):
    """What the lifespan raises is raised at the start, and at the next invocation it is tried again."""
    attempts = []

    @asynccontextmanager
    async def lifespan():
        attempts.append(1)
        if len(attempts) == 1:
            raise KeyError("not yet")
        yield "second"

    async def handler(event, context):
        return state()

    handler = handlers(handler, lifespan=lifespan)
    with pytest.raises(KeyError, match="not yet"):
        handler(None, None)
    assert handler(None, None) == "second"


def test_an_error_of_the_handler(handlers):
    """An error is the runtime's to report; the next invocation is as good as any."""

    async def handler(event, context):
        if event == "bad":
            raise ValueError("bad event")
        return event

    handler = handlers(handler)
    with pytest.raises(ValueError, match="bad event"):
        handler("bad", None)
    assert handler("good", None) == "good"


def test_an_executor_of_its_own(handlers):
    """The executor that it is given is the default one from then on."""
    executor = Executor(1)

    async def handler(event, context):
        await run_cpu(jobs.pid)
        return _default.default_executor() is executor

    assert handlers(handler, executor=executor)(None, None)


def test_the_memory_size_gives_the_workers(handlers, monkeypatch):
    """A function of 512 MB has one worker, whatever CPUs it sees."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "512")

    async def handler(event, context):
        return _default.default_executor().statistics().max_workers

    assert handlers(handler)(None, None) == 1


def test_state_outside_of_a_handler():
    """``state()`` without a handler says where to call it."""
    with pytest.raises(RuntimeError, match="lifespan"):
        state()


async def test_inside_a_running_loop(handlers):
    """Called in a running loop, as in an async test, it says what to write instead."""
    handler = handlers(echo)
    with pytest.raises(
        RuntimeError, match=r"await asynclam\.testing\.invoke\(echo, event, context\)"
    ):
        handler(1, 2)
    assert await handler.__wrapped__(1, 2) == {"event": 1, "context": 2}


def test_a_lifespan_that_dies(handlers):
    """A lifespan that fails between invocations is told at the next one, and entered anew."""
    entered = []

    @asynccontextmanager
    async def lifespan():
        entered.append(1)
        async with anyio.create_task_group() as group:
            if len(entered) == 1:
                group.start_soon(fail)
            yield len(entered)

    async def fail():
        raise KeyError("in the background")

    async def handler(event, context):
        await asyncio.sleep(0)
        return state()

    handler = handlers(handler, lifespan=lifespan)
    assert handler(None, None) == 1
    with pytest.raises(BaseException, match=r"unhandled errors|background"):
        handler(None, None)
    assert handler(None, None) == 2


def test_close_cancels_what_still_runs(handlers):
    """Tasks that an invocation has left are cancelled when the handler is closed."""
    ends = []

    async def forever():
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append("cancelled")

    async def handler(event, context):
        handler.task = asyncio.ensure_future(forever())
        await asyncio.sleep(0)

    made = handlers(handler)
    made(None, None)
    made.close()
    assert ends == ["cancelled"]


async def _generator(event, context):
    yield


@pytest.mark.parametrize("fn", [lambda event, context: None, 5, jobs.echo, _generator])
def test_no_coroutine_function(fn):
    """A plain function is refused with what to write."""
    with pytest.raises(TypeError, match="async def"):
        lambda_handler(fn)


def test_closed_at_exit():
    """At interpreter exit the lifespan is left, and no process stays."""
    code = (
        "from contextlib import asynccontextmanager\n"
        "from asynclam import lambda_handler, run_cpu\n"
        "@asynccontextmanager\n"
        "async def lifespan():\n"
        "    print('enter', flush=True)\n"
        "    yield\n"
        "    print('leave', flush=True)\n"
        "@lambda_handler(lifespan=lifespan)\n"
        "async def handler(event, context):\n"
        "    return await run_cpu(abs, event)\n"
        "handler.start()\n"
        "print(handler(-1, None), flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ),
    )
    assert (done.stdout.split(), done.stderr) == (["enter", "1", "leave"], "")
    gc.collect()


_FORKED = """
import os, sys
from contextlib import asynccontextmanager
if sys.argv[1] == "asyncio":
    sys.modules["uvloop"] = None
from asynclam import lambda_handler, run_blocking, run_cpu

def say(what):
    print("parent" if os.getpid() == parent else "child", what, flush=True)

@asynccontextmanager
async def lifespan():
    say("enters")
    yield
    say("leaves")

@lambda_handler(lifespan=lifespan)
async def handler(event, context):
    assert await run_blocking(os.getpid) == os.getpid()
    return await run_cpu(abs, event)

parent = os.getpid()
say(handler(-1, None))
if os.fork() == 0:
    if sys.argv[2] == "uses":
        say(handler(-2, None))
    sys.exit(0)
assert os.wait()[1] == 0
say(handler(-3, None))
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("child", ["ends", "uses"])
def test_a_forked_child(loop, child):
    """It has a sandbox of its own, if any: it neither leaves its parent's, nor touches its loop."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORKED, loop, child],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    uses = ["child enters", "child 2", "child leaves"] if child == "uses" else []
    expected = ["parent enters", "parent 1", *uses, "parent 3", "parent leaves"]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


def test_what_is_the_parents(handlers, monkeypatch):
    """It is not closed, and kept: what a forked child does first with a handler forgets it."""
    lifespan = Lifespan()
    kept = []
    monkeypatch.setattr(ctypes.pythonapi, "Py_IncRef", lambda what: kept.append(what.value))

    async def echo(event, context):
        return event

    handler = handlers(echo, lifespan=lifespan)
    assert handler(1, None) == 1
    parents = handler._sandbox
    handler._process = -1
    handler.close()
    assert lifespan.events == ["enter"]
    assert kept[0][0] is parents
    assert handler(2, None) == 2
    assert lifespan.events == ["enter", "enter"]
    parents.close()
