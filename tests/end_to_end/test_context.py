"""What a job carries: context variables, the invocation, log records and warnings back."""

import asyncio
import contextvars
import logging
import subprocess
import sys
import threading
import time
import warnings

import pytest

from asynclam import Executor, PayloadError, _context, _records, remaining
from tests import jobs, logging_jobs
from tests.logging_jobs import NAME, other, request


class Caught(logging.Handler):
    """What the loop process's handler was given, and in which context."""

    def __init__(self):
        super().__init__()
        self.records = []
        self.requests = []

    def emit(self, record):
        self.records.append(record)
        self.requests.append(request.get(None))

    @property
    def messages(self):
        return [record.getMessage() for record in self.records]


@pytest.fixture
def caught():
    handler = Caught()
    logger = logging.getLogger(NAME)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture(params=["fork", "spawn"])
def method(request):
    return request.param


# --- context variables ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_workers", [0, 1])
async def test_the_named_variables_travel(max_workers):
    """A job has the variables that the executor was told of, and no other; in a fresh context."""
    async with Executor(max_workers, context_vars=[request]) as executor:
        other.set("not named")
        assert await executor.run_cpu(logging_jobs.variables) == (None, "default")
        request.set({"id": 1})
        assert await executor.run_cpu(logging_jobs.variables) == ({"id": 1}, "default")
        assert await executor.run_cpu(logging_jobs.set_variable, "of the job") == "of the job"
        assert await executor.run_cpu(logging_jobs.variables) == ({"id": 1}, "default")
        assert await executor.options(retries=1).run_cpu(logging_jobs.variables) == (
            {"id": 1},
            "default",
        )


async def test_variables_of_concurrent_callers(method):
    """Each caller's jobs have his values, whatever worker they run in."""
    async with Executor(2, context_vars=[request, other], start_method=method) as executor:

        async def call(number):
            request.set(number)
            other.set(-number)
            return await executor.run_cpu(logging_jobs.variables)

        results = await asyncio.gather(*map(call, range(40)))
    assert results == [(number, -number) for number in range(40)]


async def test_variables_with_large_arguments():
    """They travel ahead of a payload that is large, or goes by value, too."""
    async with Executor(1, context_vars=[request]) as executor:
        request.set("here")
        data = bytes(1 << 20)
        assert await executor.run_cpu(
            lambda value: (logging_jobs.variables(), len(value)), data
        ) == (
            ("here", "default"),
            len(data),
        )
        assert await executor.run_cpu(jobs.echo, data) == data


async def test_variables_of_a_stream():
    """Jobs of map_cpu have the values of the moment at which the stream was made."""
    async with Executor(1, context_vars=[request]) as executor:
        request.set("made")
        stream = executor.map_cpu(lambda _: logging_jobs.variables()[0], range(5))
        request.set("used")
        assert await stream == ["made"] * 5


async def test_a_value_that_cannot_be_pickled():
    """It is refused at the door, with the name of the variable; the executor is unharmed."""
    async with Executor(1, context_vars=[other, request]) as executor:
        request.set(threading.Lock())
        with pytest.raises(PayloadError, match=r"context variable 'request' .* type lock"):
            await executor.run_cpu(logging_jobs.variables)
        with pytest.raises(PayloadError, match="context variable 'request'"):
            executor.map_cpu(logging_jobs.variables, [1])
        request.set(1)
        assert await executor.run_cpu(logging_jobs.variables) == (1, "default")


async def test_a_value_that_cannot_be_unpickled():
    """The job fails with a PayloadError that speaks of the variable; the worker lives on."""
    async with Executor(1, context_vars=[request]) as executor:
        pid = await executor.run_cpu(jobs.pid)
        request.set(jobs.BreaksInParent())
        with pytest.raises(PayloadError, match="context variable could not be carried"):
            await executor.run_cpu(logging_jobs.variables)
        request.set(2)
        assert await executor.run_cpu(jobs.pid) == pid


def test_variables_that_cannot_be_found():
    """What a worker could not find is refused when the executor is made."""
    with pytest.raises(ValueError, match="'nowhere' is in no module"):
        Executor(1, context_vars=[contextvars.ContextVar("nowhere")])
    with pytest.raises(TypeError, match="ContextVar objects"):
        Executor(1, context_vars=["request"])


# --- the invocation ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_workers", [0, 1])
async def test_the_deadline_travels(max_workers):
    """``remaining()`` is the same in a job, a thread and the caller; ``inf`` outside of invocations."""
    async with Executor(max_workers) as executor:
        assert remaining() == await executor.run_cpu(logging_jobs.left) == float("inf")
        token = _context.invocation.set(_context.Invocation("id", None, time.time() + 1000))
        assert remaining() >= await executor.run_cpu(logging_jobs.left) > 900
        assert remaining() >= await executor.run_blocking(remaining) > 900
        _context.invocation.set(_context.Invocation("id", None, time.time() - 5))
        assert remaining() == await executor.run_cpu(logging_jobs.left) == 0.0
        _context.invocation.reset(token)
        assert await executor.run_cpu(logging_jobs.left) == float("inf")


async def test_the_trace_id_is_in_the_environment(monkeypatch):
    """That of X-Ray is in the environment of the job, and of no job after it."""
    monkeypatch.setenv("_X_AMZN_TRACE_ID", "of the start")
    async with Executor(1) as executor:
        for trace_id in ("Root=1", "Root=2", None):
            _context.invocation.set(_context.Invocation("id", trace_id, float("inf")))
            assert await executor.run_cpu(logging_jobs.trace_id) == trace_id
        _context.invocation.set(_context.Invocation("id", "Root=3", float("inf")))
        assert await executor.run_cpu(logging_jobs.trace_id) == "Root=3"
        _context.invocation.set(None)
        assert await executor.run_cpu(logging_jobs.trace_id) is None


async def test_a_handler_that_runs_its_own_loop(monkeypatch):
    """In Lambda the trace id travels without ``lambda_handler``, too: it is in the environment."""
    monkeypatch.setattr(_context, "_in_lambda", True)
    async with Executor(1) as executor:
        for trace_id in ("Root=1", "Root=2"):
            monkeypatch.setenv("_X_AMZN_TRACE_ID", trace_id)
            assert await executor.run_cpu(logging_jobs.trace_id) == trace_id
        monkeypatch.delenv("_X_AMZN_TRACE_ID")
        assert await executor.run_cpu(logging_jobs.trace_id) is None


# --- log records ---------------------------------------------------------------------------------


async def test_records_come_back(caught, method):
    """They are handled here, in order, before the result is there, in the context of the caller."""
    async with Executor(1, start_method=method) as executor:
        request.set("first")
        pid = await executor.run_cpu(logging_jobs.say, "one", "two")
        assert caught.messages == ["one", "two"]
        request.set("second")
        with pytest.raises(ValueError, match="three"):
            await executor.run_cpu(logging_jobs.say_then_fail, "three")
    assert caught.messages == ["one", "two", "three"]
    assert caught.requests == ["first", "first", "second"]
    assert {record.process for record in caught.records} == {pid}
    assert caught.records[0].funcName == "say"


async def test_records_of_concurrent_callers(caught):
    """Each is handled in the context of its own caller, though short jobs share a channel."""
    async with Executor(2) as executor:

        async def call(number):
            request.set(number)
            await executor.run_cpu(logging_jobs.say, str(number))

        await asyncio.gather(*map(call, range(50)))
    assert sorted(caught.messages, key=int) == [str(number) for number in range(50)]
    assert caught.messages == [str(number) for number in caught.requests]


async def test_records_of_a_stream(caught):
    """They are handled in the context in which the stream was made."""
    async with Executor(1) as executor:
        request.set("made")
        stream = executor.map_cpu(logging_jobs.say, ["a", "b", "c"])
        request.set("used")
        await stream
    assert caught.messages == ["a", "b", "c"]
    assert caught.requests == ["made"] * 3


async def test_a_record_is_there_while_its_job_runs(caught, gate):
    """It does not wait for the job to end."""
    async with Executor(1) as executor:
        task = asyncio.create_task(executor.run_cpu(logging_jobs.say_then_wait, gate.path, "begun"))
        await gate.entered()
        while not caught.messages:
            await asyncio.sleep(0)
        assert caught.messages == ["begun"]
        gate.open()
        await task


async def test_records_of_a_cancelled_job(caught, gate):
    """What was there before the cancel was handled; a later job's records are its own."""
    async with Executor(1) as executor:
        request.set("cancelled")
        task = asyncio.create_task(
            executor.run_cpu(logging_jobs.say_then_wait, gate.path, "before")
        )
        await gate.entered()
        while not caught.messages:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        request.set("later")
        await executor.run_cpu(logging_jobs.say, "after")
    assert list(zip(caught.messages, caught.requests, strict=True)) == [
        ("before", "cancelled"),
        ("after", "later"),
    ]


async def test_records_of_the_initializer(caught):
    """They come back; no caller is theirs."""
    request.set("whoever came first")
    async with Executor(1, initializer=logging_jobs.say, initargs=("starting",)) as executor:
        await executor.run_cpu(jobs.pid)
    assert (caught.messages, caught.requests) == (["starting"], [None])


async def test_records_of_threads(caught, gate):
    """A thread of the job logs as the job does; one that is left running is nobody's."""
    request.set("here")
    async with Executor(1) as executor:
        await executor.run_cpu(logging_jobs.say_in_thread)
        await executor.run_cpu(logging_jobs.leave_thread, gate.path)
        await gate.entered()
        gate.open()
        while "late" not in caught.messages:
            await asyncio.sleep(0)
        await executor.run_cpu(logging_jobs.join_thread)
    assert list(zip(caught.messages, caught.requests, strict=True)) == [
        ("in a thread", "here"),
        ("after it", "here"),
        ("late", None),
    ]


async def test_what_a_record_has(caught):
    """Arguments, extra, exception with its traceback, and stack are those of the worker."""
    async with Executor(1) as executor:
        await executor.run_cpu(logging_jobs.say_args, "%s of %d", "one", 2, extra={"user": "u"})
        await executor.run_cpu(logging_jobs.say_args, "%(a)s", {"a": [1, 2]})
        await executor.run_cpu(logging_jobs.say_object)
        await executor.run_cpu(logging_jobs.say_exception)
    plain, mapping, object_, exception = caught.records
    assert (plain.args, plain.getMessage(), plain.user) == (("one", 2), "one of 2", "u")
    assert (mapping.args, mapping.getMessage()) == ({"a": [1, 2]}, "[1, 2]")
    assert (object_.args[0].number, object_.getMessage()) == (3, "see local 3")
    kind, error, traceback = exception.exc_info
    assert (kind, error.args) == (KeyError, ("key",))
    assert traceback.tb_frame.f_code.co_name == "say_exception"
    assert traceback.tb_frame.f_code.co_filename == logging_jobs.__file__
    assert "say_exception" in exception.stack_info
    text = logging.Formatter().format(exception)
    assert 'raise KeyError("key")' in text
    assert text.count("Traceback") == 1


async def test_what_cannot_be_pickled(caught, monkeypatch):
    """It comes as text: the message, extra values, an exception by its name."""
    monkeypatch.setattr(logging.getLogger(NAME), "propagate", False)  # pytest's handler raises
    async with Executor(1) as executor:
        for job in ("say_unpicklable", "say_what_breaks", "say_local_exception", "say_badly"):
            await executor.run_cpu(getattr(logging_jobs, job))
    unpicklable, broken, exception, bad = caught.records
    assert unpicklable.getMessage().startswith("lock <unlocked")
    assert (unpicklable.lock[:9], unpicklable.number) == ("<unlocked", 5)
    assert broken.getMessage() == "see as text"
    assert "BreaksInLoop" in broken.broken
    assert exception.exc_info[0].__name__ == "LocalError"
    assert "LocalError" in exception.exc_text
    with pytest.raises(TypeError):
        bad.getMessage()  # as in any process


async def test_levels_hold_in_workers(caught):
    """What no logger here wants is not even sent; a change reaches workers with their next job."""
    async with Executor(1) as executor:
        await executor.run_cpu(logging_jobs.say_at, logging.INFO, "too low")
        logging.getLogger(NAME).setLevel(logging.DEBUG)
        await executor.run_cpu(logging_jobs.say_at, logging.DEBUG, "wanted")
        assert await executor.run_cpu(logging_jobs.effective_level, NAME) == logging.DEBUG
        logging.disable(logging.INFO)
        try:
            await executor.run_cpu(logging_jobs.say_at, logging.INFO, "disabled")
        finally:
            logging.disable(logging.NOTSET)
        await executor.run_cpu(logging_jobs.say_at, logging.INFO, "enabled")
        logging.getLogger(NAME).setLevel(logging.NOTSET)
        assert await executor.run_cpu(logging_jobs.effective_level, NAME) == logging.WARNING
    assert caught.messages == ["wanted", "enabled"]


async def test_a_level_of_the_worker_s_own():
    """What a worker has set stays, until that logger's level is changed here."""
    async with Executor(1, initializer=logging_jobs.set_level, initargs=(NAME, 5)) as executor:
        assert await executor.run_cpu(logging_jobs.effective_level, NAME) == 5
        logging.getLogger("somebody.else").setLevel(logging.ERROR)
        assert await executor.run_cpu(logging_jobs.effective_level, NAME) == 5
        logging.getLogger(NAME).setLevel(7)
        try:
            assert await executor.run_cpu(logging_jobs.effective_level, NAME) == 7
        finally:
            logging.getLogger(NAME).setLevel(logging.NOTSET)
            logging.getLogger("somebody.else").setLevel(logging.NOTSET)


async def test_a_flood(caught):
    """Above its allowance a job's records are dropped, counted and told; the next job has its own."""
    async with Executor(1) as executor:
        notices = Caught()
        logging.getLogger("asynclam").addHandler(notices)
        try:
            await executor.run_cpu(logging_jobs.say, *map(str, range(_records.MOST + 500)))
            await executor.run_cpu(logging_jobs.say, "next")
        finally:
            logging.getLogger("asynclam").removeHandler(notices)
        dropped = executor.statistics().log_records_dropped
    # A job that took more than a second has had more.
    assert 0 < dropped <= 500
    assert len(caught.messages) == _records.MOST + 500 - dropped + 1
    assert caught.messages[-1] == "next"
    assert [str(dropped) in message for message in notices.messages] == [True]


async def test_a_busy_loop_does_not_block_a_job(caught, gate):
    """Records for which there is no room wait in the worker, and come when there is."""
    async with Executor(1) as executor:
        await executor.run_cpu(jobs.pid)
        texts = ["x" * 1000 + str(number) for number in range(500)]  # more than a socket holds
        task = asyncio.create_task(executor.run_cpu(_say_then_enter, gate.path, texts))
        await asyncio.sleep(0)
        # The loop does not run meanwhile: the job gets through all the same.
        with open(f"{gate.path}/entered", "rb", buffering=0) as entered:
            entered.read(8)
        gate.open()
        await task
        assert executor.statistics().log_records_dropped == 0
    assert caught.messages == texts


def _say_then_enter(path, texts):
    from tests.parts.gate import pass_through

    logging_jobs.say(*texts)
    pass_through(path)


async def test_handlers_of_the_worker_s_own(caught):
    """A handler that a job adds is called there; what it takes for itself is not sent."""
    async with Executor(1) as executor:
        assert await executor.run_cpu(logging_jobs.capture) == "collected\n"
        assert caught.messages == ["collected"]
        assert await executor.run_cpu(logging_jobs.assert_logs) == [f"WARNING:{NAME}:caught"]
        assert caught.messages == ["collected"]


async def test_a_child_of_a_job():
    """What a process logs that a job has forked goes to its own handlers, not into the channel."""
    async with Executor(1) as executor:
        assert await executor.run_cpu(logging_jobs.say_in_fork) == "in a child\n"
        assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_a_handler_that_fails(caught):
    """An exception of a handler or filter here is the loop's to tell; the job is unharmed."""
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    caught.addFilter(lambda record: 1 / 0)
    async with Executor(1) as executor:
        await executor.run_cpu(logging_jobs.say, "one", "two")
        assert await executor.run_cpu(jobs.echo, 1) == 1
    assert [type(context["exception"]) for context in told] == [ZeroDivisionError] * 2


def test_no_handler_writes_twice():
    """Handlers that a worker has inherited, the last resort among them, are not called in it."""
    code = (
        "import asyncio, logging, sys\n"
        "from asynclam import Executor\n"
        "from tests import logging_jobs\n"
        "async def main(method):\n"
        "    async with Executor(1, start_method=method) as executor:\n"
        "        await executor.run_cpu(logging_jobs.say, 'once')\n"
        "        print('printed', flush=True)\n"
        "for method in 'fork', 'spawn':\n"
        "    asyncio.run(main(method))\n"
        "logging.basicConfig(format='%(name)s %(message)s')\n"
        "from asynclam import _forkserver; _forkserver.stop()\n"
        "for method in 'fork', 'spawn':\n"
        "    asyncio.run(main(method))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.splitlines() == ["once"] * 2 + [f"{NAME} once"] * 2
    assert done.stdout.splitlines() == ["printed"] * 4


def test_a_worker_without_logging():
    """A spawned worker imports no logging for itself; what a job that imports it logs comes back."""
    code = (
        "import asyncio, sys, logging, textwrap\n"
        "from asynclam import Executor\n"
        "from tests import jobs\n"
        "logging.basicConfig(format='%(message)s', level=logging.INFO)\n"
        "async def main():\n"
        "    async with Executor(1, start_method='spawn') as executor:\n"
        "        assert await executor.run_cpu(jobs.imported, 'logging') == []\n"
        "        await executor.run_cpu(exec, \"import logging; logging.info('at once')\")\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.splitlines() == ["at once"]


# --- warnings ------------------------------------------------------------------------------------


async def test_warnings_are_issued_here(method):
    """What a job would show is issued in the loop process, by its filters, as if it were its own."""
    async with Executor(1, start_method=method) as executor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await executor.run_cpu(_warn_always, "careful", logging_jobs.OwnWarning)
        with warnings.catch_warnings(record=True) as ignored:
            warnings.simplefilter("ignore")
            await executor.run_cpu(_warn_always, "not wanted", logging_jobs.OwnWarning)
    # Python 3.12 and later may also warn of the fork, where the process has threads.
    (warning,) = [one for one in caught if "use of fork()" not in str(one.message)]
    assert (str(warning.message), warning.category) == ("careful", logging_jobs.OwnWarning)
    assert warning.filename == logging_jobs.__file__
    assert ignored == []


def _warn_always(message, category):
    warnings.simplefilter("always")  # pytest's filters, which are inherited, make them errors
    logging_jobs.warn(message, category)


async def test_warnings_of_a_child_of_a_job():
    """What a process warns of that a job has forked is shown there, and not in the channel."""
    async with Executor(1, start_method="spawn") as executor:  # pytest does not record its warnings
        assert "UserWarning: in a child\n" in await executor.run_cpu(logging_jobs.warn_in_fork)
        assert await executor.run_cpu(jobs.echo, 1) == 1


async def test_a_filter_by_module():
    """A filter that names the module that warns works, though it warns in a worker."""
    async with Executor(1) as executor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", module=r"tests\.logging_jobs")
            await executor.run_cpu(_warn_always, "not wanted", UserWarning)
    assert caught == []


async def test_a_warning_of_a_local_class():
    """It comes as the builtin class below it."""
    async with Executor(1) as executor:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await executor.run_cpu(_warn_local)
    assert [(str(w.message), w.category) for w in caught] == [("local", DeprecationWarning)]


def _warn_local():
    warnings.simplefilter("always")
    logging_jobs.warn_local()


async def test_a_job_that_catches_its_warnings():
    """``warnings.catch_warnings`` in a job is as in any process."""
    async with Executor(1) as executor:
        assert await executor.run_cpu(logging_jobs.catch_warning) == ["caught"]


async def test_a_warning_that_is_an_error_in_the_worker():
    """A filter that a worker has, "error" among them, works there: the job raises."""
    async with Executor(1, start_method="fork") as executor:
        with pytest.raises(UserWarning, match="as an error"):
            await executor.run_cpu(_warn_as_error, "as an error")


def _warn_as_error(message):
    warnings.simplefilter("error")
    logging_jobs.warn(message)


async def test_captured_warnings(caught):
    """``logging.captureWarnings`` here makes records of them, once each."""
    logger = logging.getLogger("py.warnings")
    logger.addHandler(caught)
    async with Executor(1) as executor:
        await executor.run_cpu(jobs.pid)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)
            try:
                await executor.run_cpu(_warn_always, "careful", UserWarning)
            finally:
                logging.captureWarnings(False)
                logger.removeHandler(caught)
    (record,) = caught.records
    assert "UserWarning: careful" in record.getMessage()


async def test_nothing_to_carry_costs_nothing():
    """Without variables and outside of an invocation, a frame is what it was, byte by byte."""
    assert _context.carried(None) == b""
    async with Executor(1, context_vars=[request]) as executor:
        assert _context.carried(executor._variables) == b""


async def test_records_of_a_job_that_ends_in_time(caught, gate):
    """What a cancelled job logs while it cleans up is handled, in the context of its caller."""
    async with Executor(1) as executor:
        request.set("cancelled")
        job = executor.options(cancel_grace=60).run_cpu(logging_jobs.clean_up, gate.path)
        task = asyncio.create_task(job)
        await gate.entered()
        request.set("another")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        request.set("stream")
        stream = executor.options(cancel_grace=60).map_cpu(logging_jobs.clean_up, [gate.path])
        request.set("another")
        task = asyncio.create_task(stream.list())
        await gate.entered()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert caught.messages == ["cleaning up"] * 2
    assert caught.requests == ["cancelled", "stream"]
