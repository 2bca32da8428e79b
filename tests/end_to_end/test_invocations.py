"""One invocation after another: deadlines, what is left behind, exits, signals, decorators."""

import asyncio
import contextvars
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import types
from contextlib import asynccontextmanager, contextmanager, suppress

import anyio
import aws_xray_sdk.core
import pytest
import uvloop
from aws_lambda_powertools import Logger, Metrics, Tracer
from aws_lambda_powertools.middleware_factory import lambda_handler_decorator

from asynclam import (
    AsynclamError,
    DeadlineExceededError,
    Executor,
    JobExitError,
    WorkerDiedError,
    _context,
    _deadline,
    _default,
    _handler,
    _loops,
    _sandbox,
    lambda_handler,
    map_cpu,
    remaining,
    run_blocking,
    run_cpu,
    state,
)
from asynclam.testing import LambdaContext
from tests import jobs, logging_jobs
from tests.parts.gate import pass_through

aws_xray_sdk.core.xray_recorder.emitter._socket.close()  # which it opens when it is imported


@pytest.fixture
def in_lambda(monkeypatch):
    """Where nobody presses Ctrl-C."""
    monkeypatch.setenv("AWS_LAMBDA_RUNTIME_API", "nobody")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loops(request, monkeypatch):
    """Sandboxes have both kinds of loops."""
    monkeypatch.setattr(_loops, "_new_event_loop", request.param)


@pytest.fixture
def handlers():
    """Makes handlers, and closes them."""
    made = []

    def make(fn, **options):
        made.append(lambda_handler(**options)(fn))
        return made[-1]

    yield make
    for handler in made:
        handler.close()


class Counted:
    """A lifespan that counts how often it is entered and left."""

    def __init__(self):
        self.entered = self.left = 0

    @asynccontextmanager
    async def __call__(self):
        self.entered += 1
        yield self.entered
        self.left += 1


NOW = LambdaContext(0.0)  # its time is over


# --- the deadline --------------------------------------------------------------------------------


def test_remaining(handlers):
    """``remaining()`` is that of the context, also in a worker and a thread; ``inf`` without one."""

    async def handler(event, context):
        return [
            remaining(),
            await run_cpu(logging_jobs.left),
            await run_blocking(remaining),
            *await map_cpu(_left, [0]),
        ]

    handler = handlers(handler)
    assert all(900 < left <= 1000 for left in handler(None, LambdaContext(1000)))
    assert handler(None, None) == [float("inf")] * 4
    assert remaining() == float("inf")


def _left(_):
    return remaining()


def test_the_deadline(handlers, gate):
    """The handler is cancelled; the error says what ran, where, and what waited; workers stay warm."""
    lifespan = Counted()

    async def crunch(path):
        await run_cpu(pass_through, path)

    async def handler(event, context):
        if event is not None:
            return await run_cpu(jobs.pid)
        async with anyio.create_task_group() as group:
            group.start_soon(crunch, gate.path)
            await gate.entered()
            group.start_soon(run_cpu, pass_through, gate.path)
            group.start_soon(run_cpu, pass_through, gate.path)
        return None

    handler = handlers(handler, lifespan=lifespan, executor=Executor(2), margin=1.0)
    handler("first", LambdaContext(60))
    context = LambdaContext(1.05)  # so that it is over at once, or when the jobs run
    with pytest.raises(DeadlineExceededError) as caught:
        handler(None, context)
    error = caught.value
    assert isinstance(error, (AsynclamError, TimeoutError))
    assert isinstance(error.__cause__, (asyncio.CancelledError, type(None)))
    assert all(name.endswith("pass_through") for name, _ in error.running)
    assert any("test_invocations.py" in place for place in error.waiting)
    assert "before the runtime would have killed it" in str(error)
    assert isinstance(handler("next", LambdaContext(60)), int)
    assert lifespan.entered == 1


def test_what_is_told_at_the_deadline(handlers, gate):
    """Functions in workers, jobs in the queue, and the lines at which tasks wait."""

    async def handler(event, context):
        tasks = [asyncio.create_task(run_cpu(pass_through, gate.path)) for _ in range(3)]
        await gate.entered()
        asyncio.get_running_loop().call_soon(expire)
        await asyncio.gather(*tasks)

    handler = handlers(handler, executor=Executor(1), margin=0.2)
    expired = []

    def expire():
        # The clock, which the deadline asks, is at the end.
        deadline = expired[0]
        deadline._invocation.deadline = 0.0
        deadline._timer.cancel()
        deadline._expire()

    make = handler.deadline
    handler.deadline = lambda *args, **kwargs: expired.append(make(*args, **kwargs)) or expired[0]
    with pytest.raises(DeadlineExceededError) as caught:
        handler(None, LambdaContext(60))
    ((name, seconds),) = caught.value.running
    assert (name, caught.value.queued) == ("tests.parts.gate.pass_through", 2)
    assert seconds > 0
    assert any(place.startswith("handler (") for place in caught.value.waiting)
    assert "tests.parts.gate.pass_through (" in str(caught.value)
    assert "2 jobs queued" in str(caught.value)


def test_a_result_in_spite_of_the_deadline(handlers):
    """A handler that takes the cancel and returns has answered."""

    async def handler(event, context):
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            return event

    handler = handlers(handler)
    assert handler("partial", NOW) == "partial"
    assert handler(None, NOW) is None


def test_a_handler_that_ends_when_the_loop_is_stopped(handlers, loops):
    """What else would have stopped the loop, its end, does not stop the next invocation."""

    async def handler(event, context):
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            asyncio.get_running_loop().stop()  # as if its half of the margin was over now
            return event

    made = handlers(handler, executor=Executor(0))
    for number in range(3):
        assert made(number, NOW) == number


def test_an_error_after_the_deadline(handlers):
    """What the handler raises because it was cancelled is the cause, not the report."""

    async def handler(event, context):
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            raise KeyError("while cleaning up") from None

    with pytest.raises(DeadlineExceededError) as caught:
        handlers(handler)(None, NOW)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_handler_that_does_not_end(handlers, caplog):
    """One that ignores the cancel loses its loop; the next invocation has a new one, and lifespan."""
    lifespan = Counted()

    async def handler(event, context):
        if event is None:
            await never_ends()
        return state()

    handler = handlers(handler, lifespan=lifespan, margin=0.02)
    with pytest.raises(DeadlineExceededError):
        handler(None, NOW)
    assert "did not end" in caplog.text
    assert handler("next", None) == 2
    assert lifespan.entered == 2


class Patient(asyncio.SelectorEventLoop):
    """A loop whose clock passes only while it waits, and then at once."""

    def __init__(self):
        self.now = 1000.0
        super().__init__()
        self._select, self._selector.select = self._selector.select, self._wait

    def time(self):
        return self.now

    def _wait(self, seconds):
        ready = self._select(0)
        if not ready:
            assert seconds is not None, "nobody would ever wake it"
            self.now += seconds
        return ready


@pytest.fixture
def patient(monkeypatch):
    """The loop of the sandbox that is made next, by whose clock all go, and all that its users see."""
    loop = Patient()
    monkeypatch.setattr(_loops, "_new_event_loop", lambda: loop)
    monkeypatch.setattr(_context, "time", loop.time)
    monkeypatch.setattr(_handler, "time", types.SimpleNamespace(time=loop.time))
    monkeypatch.setattr(_sandbox, "monotonic", loop.time)
    return loop


async def never_ends():
    while True:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            continue


@asynccontextmanager
async def never_left():
    """A lifespan that takes whatever time it is given, and more."""
    task = asyncio.create_task(never_ends())
    yield
    await task


@pytest.mark.parametrize("margin", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("lifespan", [None, never_left])
@pytest.mark.parametrize("how", ["a result", "no end", "no end, and late"])
def test_all_is_over_before_the_deadline(handlers, patient, how, lifespan, margin):
    """Whatever does not end, the outcome is there before the runtime would have killed it."""

    class Context:
        deadline = patient.now + 2 * margin

        def get_remaining_time_in_millis(self):
            return (self.deadline - patient.now) * 1000

    async def handler(event, context):
        handler.task = asyncio.create_task(never_ends())
        await asyncio.sleep(0)
        if how == "a result":
            patient.now += margin  # it takes that long
            return "result"
        if how == "no end, and late":
            patient.now += 1.5 * margin  # in code that blocks the loop
        return await never_ends()

    made = handlers(handler, lifespan=lifespan, executor=Executor(0), margin=margin)
    if how == "a result":
        assert made(None, Context()) == "result"
    else:
        with pytest.raises(DeadlineExceededError):
            made(None, Context())
    assert patient.is_closed()
    assert patient.now < Context.deadline


def test_a_timer_that_is_early(handlers, monkeypatch):
    """The wall clock decides: while it says that there is time, the timer begins anew."""
    looked = []

    class Early(_context.Invocation):
        __slots__ = ()

        def left(self):
            looked.append(1)
            return -1.0 if len(looked) > 3 else 0.51  # of the margin of 0.5

    async def never():
        await asyncio.get_running_loop().create_future()

    async def main():
        loop = asyncio.get_running_loop()
        task = loop.create_task(never())
        deadline = _deadline.Deadline(
            loop,
            task,
            Early("", None, 1.0),
            name="handler",
            margin=0.5,
            executor=Executor(0),
            tasks=set,
            stops=False,
        )
        await asyncio.wait({task})
        return deadline

    deadline = asyncio.run(main())
    assert len(looked) == 4
    assert deadline.error is not None


@pytest.mark.parametrize(
    ("margin", "error"),
    [("1", TypeError), (True, TypeError), (-1, ValueError), (float("inf"), ValueError)],
)
def test_margins(margin, error):
    """A margin is a number of seconds, and no less than 0."""
    with pytest.raises(error, match="margin"):
        lambda_handler(margin=margin)


# --- what an invocation leaves -------------------------------------------------------------------


def test_tasks_that_are_left(handlers):
    """They are cancelled before the result is returned, and none runs in the next invocation."""
    ends = []

    async def forever(number):
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append(number)

    async def handler(event, context):
        tasks.append(asyncio.create_task(forever(event)))
        await asyncio.sleep(0)
        return event

    tasks = []
    handler = handlers(handler)
    for number in range(3):
        assert handler(number, None) == number
        assert ends == list(range(number + 1))


def test_jobs_that_are_left(handlers, gate):
    """The worker of a job that nobody awaits any more is replaced: the next invocation has all."""

    async def handler(event, context):
        if event is None:
            return await run_cpu(jobs.echo, "free")
        tasks.append(asyncio.create_task(run_cpu(pass_through, gate.path)))
        await gate.entered()
        return "left"

    tasks = []
    handler = handlers(handler, executor=Executor(1))
    assert handler("leave", None) == "left"
    assert tasks[0].cancelled()
    assert handler(None, None) == "free"


def test_a_task_of_the_lifespan(handlers):
    """What the lifespan has begun is no invocation's, and lives on."""
    ticks = []

    @asynccontextmanager
    async def lifespan():
        async with anyio.create_task_group() as group:
            group.start_soon(tick)
            yield
            group.cancel_scope.cancel()

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0)

    async def handler(event, context):
        count = len(ticks)
        while len(ticks) < count + 3:
            await asyncio.sleep(0)

    handler = handlers(handler, lifespan=lifespan)
    for _ in range(3):
        handler(None, None)


async def in_gather(coroutine):
    await asyncio.gather(coroutine)


async def in_wait_for(coroutine):
    await asyncio.wait_for(coroutine, 3600)


async def in_a_group(coroutine):
    async def wait():
        await coroutine

    async with anyio.create_task_group() as group:
        group.start_soon(wait)


async def in_a_context(coroutine):
    context = contextvars.copy_context()
    await asyncio.get_running_loop().create_task(coroutine, context=context)


async def at_once(coroutine):
    """As aiohttp makes tasks, past the loop."""
    await asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)


def users_factory(loop, coroutine, **options):
    return asyncio.Task(coroutine, loop=loop, **options)


WAYS = [in_gather, in_wait_for, in_a_group]
if sys.version_info >= (3, 11):
    WAYS.append(in_a_context)
if sys.version_info >= (3, 12):
    WAYS.append(at_once)


@pytest.mark.parametrize("factory", [None, users_factory])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_task_of_the_lifespan_begins(handlers, loops, way, factory):
    """It is the lifespan's, too, whenever it is begun, and lives on."""
    begun, rounds = [], []

    async def wait_for(event):
        begun.append(event)
        await event.wait()

    async def work():
        while True:
            await way(wait_for(asyncio.Event()))
            rounds.append(1)

    @asynccontextmanager
    async def lifespan():
        asyncio.get_running_loop().set_task_factory(factory)
        task = asyncio.create_task(work())
        while not begun:
            await asyncio.sleep(0)
        yield task
        task.cancel()

    async def handler(event, context):
        count = len(begun)
        begun[-1].set()
        while len(begun) == count:
            await asyncio.sleep(0)
        left = asyncio.create_task(asyncio.Event().wait())
        await asyncio.sleep(0)
        return state(), left

    handler = handlers(handler, lifespan=lifespan, executor=Executor(0))
    for _ in range(3):
        task, left = handler(None, None)
        assert left.cancelled()
        assert not task.done()
    assert len(rounds) == 3


@pytest.mark.parametrize("where", ["a thread", "a context"])
def test_a_task_with_an_empty_context(handlers, loops, where):
    """That does not say whose it is: it was begun while the invocation ran, and ends with it."""
    ends = []

    async def forever(begun):
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append("cancelled")

    async def handler(event, context):
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        if where == "a thread":
            submit = asyncio.run_coroutine_threadsafe
            thread = threading.Thread(target=submit, args=(forever(begun), loop))
            thread.start()
            thread.join()
        else:
            handler.task = contextvars.Context().run(loop.create_task, forever(begun))
        await begun.wait()

    handlers(handler, lifespan=Counted(), executor=Executor(0))(None, None)
    assert ends == ["cancelled"]


def test_a_task_that_does_not_end(handlers, caplog):
    """It takes the loop with it, which is said; the lifespan is left and entered anew."""
    lifespan = Counted()

    async def handler(event, context):
        if event is not None:
            handler.task = asyncio.create_task(never_ends(), name="stubborn one")
            await asyncio.sleep(0)
        return id(asyncio.get_running_loop()), state()

    made = handlers(handler, lifespan=lifespan)
    first = made("leave it", LambdaContext(0.6))
    assert "stubborn one" in caplog.text
    assert "event loop is closed" in caplog.text
    second = made(None, None)
    assert (first[1], second[1]) == (1, 2)
    assert (lifespan.entered, lifespan.left) == (2, 1)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_a_lifespan_that_fails_when_the_loop_is_retired(handlers, in_lambda, caplog, error):
    """It is told, and the invocation has its result all the same."""

    @asynccontextmanager
    async def lifespan():
        yield 1
        raise KeyError("in the lifespan")

    async def handler(event, context):
        async def exits():
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                raise error

        handler.task = asyncio.create_task(exits())
        await asyncio.sleep(0)
        return "result"

    made = lambda_handler(lifespan=lifespan)(handler)
    assert made(None, None) == "result"
    assert repr(error) in caplog.text
    assert "in the lifespan" in caplog.text


def test_a_thousand_invocations(handlers):
    """Crashes, deadlines, tasks that are left and workers that are frozen among them leak nothing."""

    async def handler(event, context):
        if event == "crash":
            await run_cpu(jobs.hard_exit, 3)
        if event == "deadline":
            await run_cpu(jobs.spin, 3600)
        if event == "leave":
            handler.task = asyncio.create_task(run_cpu(jobs.spin, 3600))
            await asyncio.sleep(0)
        return await run_cpu(jobs.pid), len(asyncio.all_tasks())

    made = handlers(handler, executor=Executor(2))
    tasks = made("first", None)[1]
    open_before = len(jobs.descriptors())
    pid = None
    for number in range(1000):
        if number % 100 == 7:
            with pytest.raises(WorkerDiedError):
                made("crash", None)
        elif number % 100 == 17:
            with pytest.raises(DeadlineExceededError):
                made("deadline", NOW)
        elif number % 100 == 27:
            made("leave", None)
        elif number % 100 == 37:
            os.kill(pid, signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)
            made(None, None)
        else:
            pid, count = made(None, LambdaContext(600))
            assert count == tasks
    executor = _default.default_executor()
    assert executor.statistics().worker_deaths == 10
    assert executor.statistics().jobs_running == executor.statistics().jobs_queued == 0
    assert len(jobs.descriptors()) <= open_before + 4  # a second worker's


# --- exits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
def test_exits(handlers, error):
    """What would end the runtime is an ordinary error, with the original; the loop lives on."""

    async def handler(event, context):
        if event is not None:
            raise error
        return id(asyncio.get_running_loop())

    handler = handlers(handler)
    loop = handler(None, None)
    with pytest.raises(JobExitError, match="end the Lambda runtime") as caught:
        handler("exit", None)
    assert caught.value.original is error
    assert caught.value.__cause__ is error
    assert handler(None, None) == loop


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_of_another_task(handlers, in_lambda, error):
    """What leaves a task stops the loop: it is the invocation's error all the same."""

    async def exits():
        raise error

    async def handler(event, context):
        if event is not None:
            handler.task = asyncio.create_task(exits())
            await asyncio.get_running_loop().create_future()
        return "next"

    made = handlers(handler)
    with pytest.raises(JobExitError, match="end the Lambda runtime") as caught:
        made("exit", None)
    assert caught.value.original is error
    assert made(None, None) == "next"
    with pytest.raises(type(error)):
        handler.task.result()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_exit_when_the_handler_has_ended(handlers, loops, in_lambda, error):
    """That of another task, in the turn in which the loop hears of its end: the next one runs."""

    async def exits():
        raise error

    async def handler(event, context):
        if event is not None:
            handler.task = asyncio.create_task(exits())
            return None
        for _ in range(3):
            await asyncio.sleep(0)
        return "next"

    made = handlers(handler, executor=Executor(0))
    with pytest.raises(JobExitError):
        made("exit", None)
    assert made(None, None) == "next"
    with pytest.raises(type(error)):
        handler.task.result()


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
def test_an_exit_of_the_lifespan(handlers, in_lambda, terminated, error):
    """As it is entered by an invocation, it is an ordinary error; at init it is raised as it is."""
    raised = []

    @asynccontextmanager
    async def lifespan():
        if len(raised) < 2:
            raised.append(1)
            raise error
        yield "third"

    async def handler(event, context):
        return state()

    handler = handlers(handler, lifespan=lifespan)
    with pytest.raises(JobExitError, match=r"^the lifespan of .*end the Lambda runtime") as caught:
        handler(None, None)
    assert isinstance(caught.value.original, type(error))
    with pytest.raises(type(error)):
        handler.start()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "nothing is left half-made"
    assert handler(None, None) == "third"


def test_a_lifespan_that_is_cancelled(handlers):
    """An invocation that cancels the lifespan's task is told at the next, and the one after runs."""
    tasks = []

    @asynccontextmanager
    async def lifespan():
        tasks.append(asyncio.current_task())
        yield len(tasks)

    async def handler(event, context):
        if event is not None:
            tasks[-1].cancel()
            await asyncio.wait(tasks)
        return state()

    handler = handlers(handler, lifespan=lifespan)
    assert handler("cancel", None) == 1
    with pytest.raises(JobExitError, match=r"the lifespan of .* raised CancelledError"):
        handler(None, None)
    assert handler(None, None) == 2


def test_a_loop_that_is_stopped(handlers):
    """A handler that stops the loop gets an error that says so."""

    async def handler(event, context):
        if event is not None:
            asyncio.get_running_loop().stop()
            await asyncio.get_running_loop().create_future()
        return "next"

    handler = handlers(handler)
    with pytest.raises(RuntimeError, match=r"loop\.stop"):
        handler("stop", None)
    assert handler(None, None) == "next"


# --- SIGTERM -------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
from contextlib import asynccontextmanager
from asynclam import lambda_handler, run_cpu
import asyncio

@asynccontextmanager
async def lifespan():
    print("enter", flush=True)
    yield
    print("leave", flush=True)

@lambda_handler(lifespan=lifespan)
async def handler(event, context):
    if event is not None:
        event()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            print("cancelled", flush=True)
    return await run_cpu(abs, -1)

def terminate():
    os.kill(os.getpid(), signal.SIGTERM)

handler.start()
"""


# From the main thread: on its way into a wait it could miss what comes from another.
IN_A_THREAD = """
import threading
begun = threading.Event()
threading.Thread(target=handler, args=(begun.set, None)).start()
begun.wait()
terminate()
"""


@pytest.mark.parametrize(
    ("end", "printed"),
    [
        (
            "print(handler(None, None)); terminate()",
            ["enter", "1", "leave"],
        ),
        ("handler(terminate, None)", ["enter", "cancelled", "leave"]),
        (IN_A_THREAD, ["enter", "cancelled", "leave"]),
    ],
    ids=["between invocations", "during one", "during one in a thread"],
)
def test_sigterm(end, printed):
    """The lifespan is left, and the process ends as by that signal, or with its status."""
    done = subprocess.run(
        [sys.executable, "-u", "-X", "dev", "-c", PROGRAM + end],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    status = 128 + signal.SIGTERM if end is IN_A_THREAD else -signal.SIGTERM
    assert (done.stdout.split(), done.returncode) == (printed, status), done.stderr


def test_sigterm_of_a_forked_child():
    """It ends the child, which has no lifespan to leave; its parent does not hear of it."""
    child = """
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(1)
print(os.WTERMSIG(os.waitpid(child, 0)[1]), handler(None, None))
"""
    done = subprocess.run(
        [sys.executable, "-u", "-c", PROGRAM + child],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "AWS_LAMBDA_RUNTIME_API": "nobody"},
    )
    assert (done.stdout.split(), done.returncode) == (["enter", "15", "1", "leave"], 0), done.stderr


@pytest.fixture
def terminated(monkeypatch):
    """SIGTERM is handled by nobody, and what a handler ends its process with is noted."""
    killed = []
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    yield killed
    signal.signal(signal.SIGTERM, before)


def test_sigterm_between_invocations(handlers, terminated):
    """The lifespan is left at once, then the signal is that of the process, as if unhandled."""
    lifespan = Counted()

    async def handler(event, context):
        pass

    handler = handlers(handler, lifespan=lifespan)
    handler.start()
    assert signal.getsignal(signal.SIGTERM) == handler._on_termination
    signal.raise_signal(signal.SIGTERM)
    assert (lifespan.entered, lifespan.left) == (1, 1)
    assert terminated == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_that_a_thread_hears(handlers, terminated, monkeypatch):
    """It leaves the lifespan, alone, and ends the process; an invocation that begins has to wait."""
    steps, leaving, asked = [], threading.Event(), threading.Event()
    monkeypatch.setattr(os, "_exit", steps.append)

    class Turn(type(threading.RLock())):
        def __enter__(self):
            if leaving.is_set():
                asked.set()
            return super().__enter__()

    @asynccontextmanager
    async def lifespan():
        steps.append("enter")
        yield
        leaving.set()
        asked.wait()
        steps.append("leave")

    async def handler(event, context):
        steps.append("invocation")

    handler = handlers(handler, lifespan=lifespan)
    handler._turn = Turn()
    handler.start()
    thread = threading.Thread(target=handler._on_unheard_termination)
    thread.start()
    leaving.wait()
    signal.raise_signal(signal.SIGTERM)  # which the main thread may hear, too
    assert (steps, terminated) == (["enter"], [])
    handler._is_terminated = False  # the process has not ended, so this is not its end
    handler(None, None)
    thread.join()
    assert steps == ["enter", "leave", 128 + signal.SIGTERM, "enter", "invocation"]


def test_sigterm_during_an_invocation(handlers, terminated):
    """The handler is cancelled and cleans up, then the lifespan is left, then the process ends."""
    lifespan, steps = Counted(), []

    async def handler(event, context):
        signal.raise_signal(signal.SIGTERM)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            steps.append(lifespan.left)

    handler = handlers(handler, lifespan=lifespan)
    with pytest.raises(JobExitError):
        handler(None, None)
    assert (steps, lifespan.left) == ([0], 1)
    assert terminated == [(os.getpid(), signal.SIGTERM)]


def test_sigterm_while_the_lifespan_is_entered(handlers, terminated):
    """It is entered to its end, and left: no invocation has begun that could be cancelled."""
    left = []

    @asynccontextmanager
    async def lifespan():
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        yield
        left.append(1)

    async def handler(event, context):
        pass

    handlers(handler, lifespan=lifespan).start()
    assert left == [1]
    assert terminated == [(os.getpid(), signal.SIGTERM)]


def test_sigterm_while_the_lifespan_fails(handlers, terminated):
    """The process ends, although there is nothing to be left."""

    @asynccontextmanager
    async def lifespan():
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        raise KeyError("in the lifespan")
        yield

    async def handler(event, context):
        pass

    with pytest.raises(KeyError):
        handlers(handler, lifespan=lifespan).start()
    assert terminated == [(os.getpid(), signal.SIGTERM)]


def test_no_handler_of_sigterm_stays(handlers, terminated):
    """A handler that is closed leaves the signal as it was."""

    async def handler(event, context):
        pass

    handler = handlers(handler)
    handler.start()
    handler.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    handler._on_unheard_termination()  # by a thread that has heard it a moment before
    assert not terminated


def test_where_sigterm_is_watched(handlers, terminated, monkeypatch):
    """Under a runtime client that may wait in C, by one thread, which ends with the sandbox."""

    async def handler(event, context):
        return [thread for thread in threading.enumerate() if thread.name == "asynclam SIGTERM"]

    monkeypatch.delenv("AWS_EXECUTION_ENV", raising=False)
    handler = handlers(handler)
    assert handler(None, None) == []
    handler.close()
    monkeypatch.setenv("AWS_LAMBDA_RUNTIME_API", "nobody")
    (thread,) = handler(None, None)
    assert handler(None, None) == [thread]
    handler.close()
    thread.join()
    monkeypatch.setenv("AWS_EXECUTION_ENV", "AWS_Lambda_python3.x")
    threads = handler(None, None)
    assert len(threads) == (sys.version_info < (3, 12))
    handler.close()
    for thread in threads:
        thread.join()


def test_a_signal_handler_of_the_user_s():
    """It stays: whoever handles SIGTERM ends the process himself, which leaves the lifespan."""
    code = PROGRAM.replace(
        "handler.start()",
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); handler.start()",
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "os.kill(os.getpid(), signal.SIGTERM)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.split(), done.returncode) == (["enter", "leave"], 7), done.stderr


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """Has a method of sandboxes raise Ctrl-C once it has done its work."""

    def interrupt(name):
        method = getattr(_sandbox.Sandbox, name)

        def and_then(*args):
            method(*args)
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(_sandbox.Sandbox, name, and_then)

    return interrupt


async def stubborn():
    with suppress(asyncio.CancelledError):
        await asyncio.get_running_loop().create_future()
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("when", ["run", "cancel_left", "retire"])
def test_ctrl_c_during_an_invocation(handlers, interrupted, when, caplog):
    """It ends the program, whatever of the invocation is being done; the next one runs."""

    async def handler(event, context):
        if event is not None:
            event.append(asyncio.create_task(stubborn()))
            await asyncio.sleep(0)
        return "next"

    handler = handlers(handler, margin=0)
    interrupted(when)
    with pytest.raises(KeyboardInterrupt):
        handler([], LambdaContext(0.2))
    assert handler(None, None) == "next"


def test_an_error_of_the_loop():
    """One that comes when the handler has ended is not taken for the stop of the loop."""

    async def handler():
        pass

    sandbox = _sandbox.Sandbox(None)
    run = sandbox.loop.run_until_complete

    def run_and_fail(task):
        run(task)
        raise RuntimeError("of the loop")

    sandbox.loop.run_until_complete = run_and_fail
    with pytest.raises(RuntimeError, match="of the loop"):
        sandbox.run(sandbox.begin(handler()))
    sandbox.loop.run_until_complete = run
    assert sandbox.cancel_left(0) == set(), "nothing is left"
    sandbox.close()


def test_a_lifespan_that_does_not_end_in_time():
    """A loop that is given up does not wait for it, and cancels it."""
    ends = []

    @asynccontextmanager
    async def lifespan():
        yield
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append("cancelled")

    sandbox = _sandbox.Sandbox(lifespan)
    sandbox.retire(0.001)
    assert ends == ["cancelled"]
    assert sandbox.loop.is_closed()


def test_one_deadline_for_all_steps(patient):
    """A lifespan, its tasks and generators, of which none ends, have together what one of them has."""
    generators = []

    async def endless():
        try:
            yield
        finally:
            await never_ends()

    @asynccontextmanager
    async def lifespan():
        generators.append(endless())
        await anext(generators[0])
        async with never_left():
            yield

    sandbox = _sandbox.Sandbox(lifespan)
    before = patient.now
    sandbox.retire(10.0)
    assert patient.now == pytest.approx(before + 10.0)
    assert patient.is_closed()


def test_a_task_that_is_known_not_to_end(patient):
    """It is cancelled once more, and not waited for once more."""
    cancels = []

    async def stays():
        while True:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                cancels.append(patient.now)

    async def handler():
        tasks.append(asyncio.create_task(stays()))
        await asyncio.sleep(0)

    tasks = []
    sandbox = _sandbox.Sandbox(None)
    before = patient.now
    sandbox.run(sandbox.begin(handler()))
    assert sandbox.cancel_left(2.0) == set(tasks)
    sandbox.retire(10.0)
    assert cancels == [before, before + 2.0]
    assert patient.now == before + 2.0


def test_without_uvloop(monkeypatch):
    """The loop is asyncio's own."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.delitem(sys.modules, "asynclam._loops", raising=False)
    sandbox = _sandbox.Sandbox(None)
    assert type(sandbox.loop).__module__.startswith("asyncio.")
    sandbox.close()


# --- a thread, as Durable functions have it ------------------------------------------------------


def test_the_context_of_a_durable_function(handlers):
    """It has that of the runtime, and with it the time that is left."""

    class DurableContext:
        lambda_context = LambdaContext(60)

    async def handler(event, context):
        return remaining()

    assert 50 < handlers(handler)(None, DurableContext()) <= 60


def test_in_a_thread(handlers):
    """A handler may be called in a thread that is not the main one."""

    async def handler(event, context):
        return await run_cpu(jobs.echo, event)

    handler = handlers(handler)
    results = []

    def call():
        results.append(handler(1, LambdaContext()))
        handler.close()

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert results == [1]


# --- decorators ----------------------------------------------------------------------------------


@pytest.fixture
def powertools(monkeypatch):
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "tests")
    monkeypatch.setenv("POWERTOOLS_METRICS_NAMESPACE", "tests")
    monkeypatch.setenv("POWERTOOLS_TRACE_DISABLED", "true")


def test_powertools_above(handlers, powertools, capsys):
    """Logger, Tracer and Metrics above: keys, metrics and results are those of the invocation."""
    logger, tracer, metrics = Logger(service="above"), Tracer(service="above"), Metrics()

    async def handler(event, context):
        metrics.add_metric("Items", unit="Count", value=event)
        logger.info("in the handler")
        await run_cpu(_log, "above", "in a job")
        return event

    inner = handlers(handler)
    outer = logger.inject_lambda_context(
        tracer.capture_lambda_handler(metrics.log_metrics(inner)), clear_state=True
    )
    outer.start()  # a decorator keeps it
    for number in range(3):
        context = LambdaContext(function_name="decorated", aws_request_id=f"request-{number}")
        assert outer(number, context) == number
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    logged = [line for line in lines if "message" in line]
    assert [(line["message"], line["function_request_id"]) for line in logged] == [
        (message, f"request-{number}")
        for number in range(3)
        for message in ("in the handler", "in a job")
    ]
    assert [line["Items"] for line in lines if "_aws" in line] == [[0.0], [1.0], [2.0]]
    assert outer.__name__ == "handler"


def _log(service, message):
    logging.getLogger(service).info(message)


def test_powertools_below(handlers, powertools, capsys):
    """Below it is as good: they work around the invocation, not around the making of a coroutine."""
    logger, tracer, metrics = Logger(service="below"), Tracer(service="below"), Metrics()
    loops = []

    def before(fn):
        """A decorator that may be anywhere: it returns the coroutine."""

        @functools.wraps(fn)
        def decorated(event, context):
            loops.append(asyncio.get_running_loop())
            return fn(event, context)

        return decorated

    @logger.inject_lambda_context(clear_state=True)
    @tracer.capture_lambda_handler
    @metrics.log_metrics(capture_cold_start_metric=True)
    @before
    async def handler(event, context):
        loops.append(asyncio.get_running_loop())
        metrics.add_metric("Items", unit="Count", value=event)
        await run_cpu(_log, "below", "in a job")
        return event

    made = handlers(handler)
    made.start()
    for number in range(3):
        context = LambdaContext(function_name="decorated", aws_request_id=f"request-{number}")
        assert made(number, context) == number
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    logged = [line["function_request_id"] for line in lines if "message" in line]
    assert logged == [f"request-{number}" for number in range(3)]
    assert [line["Items"] for line in lines if "Items" in line] == [[0.0], [1.0], [2.0]]
    assert [line["ColdStart"] for line in lines if "ColdStart" in line] == [[1.0]]
    assert len(loops) == 6
    assert len(set(loops)) == 1
    assert made.__name__ == "handler"


class Segments:
    """What the tracer traces with."""

    def __init__(self):
        self.said = []

    @contextmanager
    def in_subsegment(self, name):
        self.said.append(f"{name} begins")
        try:
            yield self
        finally:
            self.said.append(f"{name} ends")

    def put_annotation(self, key, value):
        pass

    def put_metadata(self, key, value, namespace):
        self.said.append(f"{key}: {value}")

    def add_exception(self, *_args):
        pass


@pytest.mark.parametrize("above", [True, False])
def test_what_a_tracer_sees(handlers, monkeypatch, above):
    """Above and below, its segment is as long as the invocation, with its result or its error."""
    monkeypatch.setenv("POWERTOOLS_TRACE_DISABLED", "false")
    segments = Segments()
    tracer = Tracer(service="tests", provider=segments, auto_patch=False)
    tracer.disabled, tracer.provider = False, segments

    async def handler(event, context):
        await asyncio.sleep(0)
        segments.said.append("in the handler")
        return 1 / event

    trace = tracer.capture_lambda_handler
    made = trace(handlers(handler)) if above else handlers(trace(handler))
    assert made(1, None) == 1
    with pytest.raises(ZeroDivisionError):
        made(0, None)
    assert segments.said == [
        "## handler begins", "in the handler", "handler response: 1.0", "## handler ends",
        "## handler begins", "in the handler", "handler error: division by zero", "## handler ends",
    ]  # fmt: skip


def test_a_middleware_below(handlers, powertools):
    """What Powertools makes decorators of (validation, idempotency) has the result, not a coroutine."""
    results = []

    @lambda_handler_decorator(trace_execution=False)
    def keep(fn, event, context):
        results.append(fn(event, context))
        return results[-1]

    @keep
    async def handler(event, context):
        return await run_cpu(abs, event)

    assert handlers(handler)(-3, LambdaContext()) == 3
    assert results == [3]


@pytest.mark.parametrize("how", ["awaited", "twice"])
def test_powertools_that_cannot_be_put_above(powertools, how):
    """What cannot be called at the right moment is refused, with what to write."""

    @Metrics().log_metrics
    async def handler(event, context):
        return event

    @functools.wraps(handler)
    async def awaiting(event, context):
        return await handler(event, context)

    if how == "twice":  # the decorator calls the first
        lambda_handler(handler)
    with pytest.raises(TypeError, match=r"powertools\.metrics.*above @lambda_handler"):
        lambda_handler(awaiting if how == "awaited" else handler)


def test_a_decorator_that_answers(handlers):
    """A decorator below may answer without calling the coroutine function."""

    async def handler(event, context):
        return event

    @functools.wraps(handler)
    def checked(event, context):
        return handler(event, context) if event else "no event"

    made = handlers(checked)
    assert (made(1, None), made(None, None)) == (1, "no event")


def test_the_trace_id_of_the_runtime():
    """What the runtime client has put into the environment is in that of the job."""
    os.environ["_X_AMZN_TRACE_ID"] = "Root=1"
    try:

        @lambda_handler
        async def handler(event, context):
            return await run_cpu(logging_jobs.trace_id)

        assert handler(None, None) == "Root=1"
        os.environ["_X_AMZN_TRACE_ID"] = "Root=2"
        assert handler(None, None) == "Root=2"
        del os.environ["_X_AMZN_TRACE_ID"]
        assert handler(None, None) is None
    finally:
        os.environ.pop("_X_AMZN_TRACE_ID", None)
        handler.close()
