"""Bad input of every kind: a clear error, nothing hangs, and the next job has its result.

A worker is kept where the job alone was bad, and replaced where the job has ended it or taken its
channel. What a job leaves changed in its worker (working directory, environment, signal handlers,
streams, limits) stays so for the jobs that follow there, as in every process pool.
"""

import asyncio
import importlib
import os
import re
import signal
import socket
import struct
import sys

import pytest

from asynclam import Executor, JobExitError, PayloadError, WorkerDiedError, _forkserver, _wire
from tests import bad_jobs as bad
from tests import jobs
from tests.bad_jobs import (
    BecomesAnother,
    EndsInWorkers,
    EndsWherePickled,
    LiesAboutItsClass,
    NeedsKeyword,
    NeedsLock,
    NewFails,
    NoAttributes,
    OddState,
    OddStream,
    Recursion,
    Reduces,
    ReducesAndEnds,
    ReducesOddly,
    Returns,
    SetsState,
    SetsStateOddly,
    StrFails,
    Unhashable,
    Unreduces,
    UnreducesOddly,
    UnreducesOddlyElsewhere,
    WrongArguments,
    make,
    raise_made,
    write_to_channel,
)  # fmt: skip
from tests.jobs import echo
from tests.parts.processes import ended

KEPT, REPLACED = {True}, {False}
EITHER = KEPT | REPLACED  # as the next job comes early or late
_NAME = 0x8000_0000  # no job has such a number


def frame(kind, number, body=b"", **fields):
    return b"".join(_wire.encode(kind, number, [body], **fields))


def header(kind, length, *, descriptors=0, number=1):
    return _wire.HEADER.pack(_wire.MAGIC, kind, descriptors, 0, length, number)


# What is called, with what; the error (or result), the words in it; whether the worker is kept.
TABLE = [
    # --- an argument, where it is pickled: refused at the door, no worker has heard of it
    (echo, [Reduces("StopIteration")], PayloadError, "argument 0 of .*Reduces.*StopIteration", KEPT),
    (echo, [Reduces("StopAsyncIteration")], PayloadError, "Reduces.*StopAsyncIteration", KEPT),
    (echo, [Reduces("CancelledError")], PayloadError, "Reduces.*CancelledError", KEPT),
    (echo, [Reduces("SystemExit")], PayloadError, "Reduces.*SystemExit", KEPT),
    (echo, [Reduces("GeneratorExit")], PayloadError, "Reduces.*GeneratorExit", KEPT),
    (echo, [Reduces("BaseException")], PayloadError, "Reduces.*BaseException", KEPT),
    (echo, [[1] * 200_000 + [Reduces("SystemExit")]], PayloadError, "SystemExit", KEPT),
    (echo, [[1] * 200_000 + [Reduces("GeneratorExit")]], PayloadError, "GeneratorExit", KEPT),
    (echo, [Returns("no name")], PayloadError, "attribute lookup no name", KEPT),
    (echo, [Returns(())], PayloadError, "returned by .*reduce", KEPT),
    (echo, [Returns((1, 2))], PayloadError, "callable", KEPT),
    (echo, [Returns(None)], PayloadError, "must (return|be) a string or tuple", KEPT),
    (echo, [LiesAboutItsClass()], PayloadError, "wrong class", KEPT),
    (echo, [NoAttributes()], PayloadError, "NoAttributes.*RuntimeError", KEPT),
    (echo, [Recursion()], PayloadError, "RecursionError", KEPT),
    (echo, [bad.nested(100_000)], PayloadError, "RecursionError", KEPT),
    (echo, [bad.generator()], PayloadError, r"pass list\(", KEPT),
    (echo, [bad.make_coroutine()], PayloadError, "await it first", KEPT),
    (echo, [{"key": bad.thread_lock()}], PayloadError, "item 'key' is of type lock", KEPT),
    (echo, [sys._getframe()], PayloadError, "frame", KEPT),
    (bad.with_closure(bad.thread_lock()), [], PayloadError, "the function itself.*closure", KEPT),
    # --- an argument, where it is unpickled
    (echo, [Unreduces("StopIteration")], PayloadError, "in the worker: StopIteration", KEPT),
    (echo, [Unreduces("StopAsyncIteration")], PayloadError, "StopAsyncIteration", KEPT),
    (echo, [Unreduces("CancelledError")], PayloadError, "in the worker: CancelledError", KEPT),
    (echo, [Unreduces("SystemExit")], PayloadError, "in the worker: SystemExit", KEPT),
    (echo, [Unreduces("KeyboardInterrupt")], PayloadError, "worker: KeyboardInterrupt", KEPT),
    (echo, [Unreduces("GeneratorExit")], PayloadError, "in the worker: GeneratorExit", KEPT),
    (echo, [SetsState("SystemExit")], PayloadError, "in the worker: SystemExit", KEPT),
    (echo, [SetsState("KeyboardInterrupt")], PayloadError, "worker: KeyboardInterrupt", KEPT),
    (echo, [[1] * 200_000 + [Unreduces("GeneratorExit")]], PayloadError, "GeneratorExit", KEPT),
    (echo, [Returns((int, (), object()))], PayloadError, "in the worker: UnpicklingError", KEPT),
    (echo, [EndsInWorkers()], WorkerDiedError, "exited with code 5", REPLACED),
    # --- a result, where it is pickled
    (make, [Reduces, "StopIteration"], PayloadError, "cannot be sent back: StopIteration", KEPT),
    (make, [Reduces, "CancelledError"], PayloadError, "cannot be sent back: CancelledError", KEPT),
    (make, [Reduces, "SystemExit"], PayloadError, "cannot be sent back: SystemExit", KEPT),
    (make, [Reduces, "KeyboardInterrupt"], PayloadError, "sent back: KeyboardInterrupt", KEPT),
    (make, [Reduces, "GeneratorExit"], PayloadError, "cannot be sent back: GeneratorExit", KEPT),
    (make, [Returns, None], PayloadError, "must (return|be) a string or tuple", KEPT),
    (make, [NoAttributes], PayloadError, "cannot be sent back: RuntimeError", KEPT),
    (make, [EndsWherePickled], WorkerDiedError, "exited with code 4", REPLACED),
    (bad.nested, [100_000], PayloadError, "cannot be sent back: RecursionError", KEPT),
    (bad.generator, [], PayloadError, "of type generator.*cannot be sent back", KEPT),
    (bad.thread_lock, [], PayloadError, "of type lock.*cannot be sent back", KEPT),
    (bad.frame, [], PayloadError, "of type frame.*cannot be sent back", KEPT),
    (bad.make_coroutine, [], PayloadError, "of type coroutine.*cannot be sent back", KEPT),
    # --- a result, where it is unpickled
    (make, [Unreduces, "StopIteration"], PayloadError, "unpickled here: StopIteration", KEPT),
    (make, [Unreduces, "CancelledError"], PayloadError, "unpickled here: CancelledError", KEPT),
    (make, [Unreduces, "SystemExit"], PayloadError, "unpickled here: SystemExit", KEPT),
    (make, [Unreduces, "GeneratorExit"], PayloadError, "unpickled here: GeneratorExit", KEPT),
    (bad.large, [Unreduces("GeneratorExit")], PayloadError, "GeneratorExit", KEPT),
    (bad.large, [Unreduces("SystemExit")], PayloadError, "SystemExit", KEPT),
    (make, [OddState], PayloadError, "unpickled here: UnpicklingError", KEPT),
    # --- what breaks asyncio itself, out of the job
    (bad.raise_odd, ["StopIteration"], JobExitError, "StopIteration", KEPT),
    (bad.raise_odd, ["StopAsyncIteration"], JobExitError, "StopAsyncIteration", KEPT),
    (bad.raise_odd, ["CancelledError"], JobExitError, "CancelledError", KEPT),
    (bad.raise_odd, ["SystemExit"], JobExitError, "SystemExit", KEPT),
    (bad.raise_odd, ["KeyboardInterrupt"], JobExitError, "KeyboardInterrupt", KEPT),
    (bad.raise_odd, ["GeneratorExit"], JobExitError, "GeneratorExit", KEPT),
    (bad.raise_odd, ["BaseException"], JobExitError, "BaseException", KEPT),
    (bad.exit_with_bad_repr, [], JobExitError, "raised SystemExit, which", KEPT),
    # --- an exception, on its way
    (raise_made, [WrongArguments, 1, 2], WrongArguments, "one text", KEPT),
    (bad.raise_needs_keyword, [], NeedsKeyword, "text", KEPT),
    (raise_made, [ReducesOddly, "SystemExit"], ReducesOddly, "SystemExit", KEPT),
    (raise_made, [ReducesOddly, "KeyboardInterrupt"], ReducesOddly, "KeyboardInterrupt", KEPT),
    (raise_made, [ReducesAndEnds], WorkerDiedError, "exited with code 4", REPLACED),
    (raise_made, [SetsStateOddly, "SystemExit"], SetsStateOddly, "SystemExit", KEPT),
    (raise_made, [SetsStateOddly, "CancelledError"], SetsStateOddly, "CancelledError", KEPT),
    (raise_made, [SetsStateOddly, "GeneratorExit"], SetsStateOddly, "GeneratorExit", KEPT),
    (raise_made, [UnreducesOddly, "SystemExit"], UnreducesOddly, "SystemExit", KEPT),
    (raise_made, [UnreducesOddlyElsewhere, "SystemExit"], PayloadError, "SystemExit: odd", KEPT),
    (raise_made, [UnreducesOddlyElsewhere, "CancelledError"], PayloadError, "Cancelled", KEPT),
    (raise_made, [UnreducesOddlyElsewhere, "GeneratorExit"], PayloadError, "Generator", KEPT),
    (raise_made, [UnreducesOddlyElsewhere, "StopIteration"], PayloadError, "StopIteration", KEPT),
    (raise_made, [BecomesAnother], BecomesAnother, "", KEPT),
    (bad.raise_new_fails, [], NewFails, "[1-9]", KEPT),
    (raise_made, [StrFails], StrFails, None, KEPT),
    (bad.raise_bad_args, [], ValueError, None, KEPT),
    (raise_made, [Unhashable, "text"], Unhashable, "text", KEPT),
    (raise_made, [NeedsLock], NeedsLock, "with a lock", KEPT),
    (bad.raise_its_own_cause, [], ValueError, "its own cause", KEPT),
    (bad.raise_with_itself, [], ValueError, "ValueError", KEPT),
    (bad.raise_endless_causes, [2000], ValueError, "1999", KEPT),
    (bad.raise_surrogates, [], ValueError, "\udcff", KEPT),
    (bad.raise_long, [3_000_000], ValueError, "x" * 100, KEPT),
    (bad.raise_deep, [500], ValueError, "deep", KEPT),
    (bad.recurse, [], RecursionError, "maximum recursion", KEPT),
    (bad.raise_with_broken_traceback, [], "Broken", "broken", KEPT),
    (bad.raise_with_bad_notes, [], ValueError, "notes", KEPT),
    # --- garbage on the channel
    (write_to_channel, [b"garbage" * 10], WorkerDiedError, "none of asynclam's messages", REPLACED),
    (write_to_channel, [b"g"], WorkerDiedError, "none of asynclam's messages", REPLACED),
    (write_to_channel, [header(_wire.RESULT, 1 << 50)], WorkerDiedError, "messages", REPLACED),
    (write_to_channel, [header(_wire.RESULT, 0, descriptors=3)], WorkerDiedError, "3 descrip", REPLACED),
    (write_to_channel, [header(99, 0)], WorkerDiedError, "messages", REPLACED),
    (write_to_channel, [frame(_wire.READY, 0, b"12345678")], WorkerDiedError, "kind 2", REPLACED),
    (write_to_channel, [frame(_wire.RESULT, _NAME, b"N.")], WorkerDiedError, "kind 3", REPLACED),
    (write_to_channel, [frame(_wire.REFUSED, _NAME)], WorkerDiedError, "kind 5", REPLACED),
    (write_to_channel, [frame(_wire.SKIPPED, _NAME)], WorkerDiedError, "kind 6", REPLACED),
    (write_to_channel, [frame(_wire.JOB, 1)], WorkerDiedError, "kind 1", REPLACED),
    (write_to_channel, [frame(_wire.RAISED, _NAME)], WorkerDiedError, "kind 4", REPLACED),
    (bad.reply_with, [b"garbage"], PayloadError, "could not be unpickled here", REPLACED),
    (bad.reply_with, [b"N.", _wire.RELEASES], WorkerDiedError, "notes .* cut off", REPLACED),
    (bad.reply_with, [struct.pack("<IIQQ", 1, 0, 1, 1), _wire.SEGMENT], WorkerDiedError, "segment 1", REPLACED),
    (bad.reply_with, [b"short", _wire.SEGMENT], WorkerDiedError, "no record", REPLACED),
    (bad.reply_with, [bytes(3), _wire.BUFFERS], PayloadError, "struct.error|error:", REPLACED),
    # --- descriptors (a worker whose channel has ended is killed, if it does not end first)
    (bad.close_channel, [], WorkerDiedError, "not its own|SIGKILL", REPLACED),
    (bad.replace_channel, [], WorkerDiedError, "not its own|SIGKILL", REPLACED),
    (bad.close_range, [3], WorkerDiedError, "not its own|SIGKILL", REPLACED),
    (bad.close_range, [0], WorkerDiedError, "not its own|SIGKILL", REPLACED),
    (bad.shut_channel_down, [socket.SHUT_WR], WorkerDiedError, "", REPLACED),
    (bad.shut_channel_down, [socket.SHUT_RD], "result", "shut down", REPLACED),
    (bad.channel_without_blocking, [], "result", "done", EITHER),
    (bad.close_descriptor, [0], "result", None, KEPT),
    (bad.close_descriptor, [1], "result", None, KEPT),
    (bad.close_descriptor, [2], "result", None, KEPT),
    (bad.use_up_descriptors, [], "result", None, KEPT),
    # --- processes and threads
    (bad.fork_and_raise, [], ValueError, "[1-9]", KEPT),
    (bad.fork_and_exit, [], "result", "parent", KEPT),
    (bad.raise_in_thread, [], "result", "joined", KEPT),
    (bad.exit_in_thread, [], WorkerDiedError, "exited with code 9", REPLACED),
    (bad.set_session, [], PermissionError, "", KEPT),
    (bad.leave_group, [], "result", "left", KEPT),
    (bad.execute, [], WorkerDiedError, "", REPLACED),
    (bad.kill_group, [], WorkerDiedError, "SIGKILL", REPLACED),
    (bad.kill_parent, [signal.SIGINT], "result", "done", KEPT),
    (bad.kill_parent, [signal.SIGHUP], "result", "done", KEPT),
    (bad.hard_exit, [0], WorkerDiedError, r"code 0.*os\._exit", REPLACED),
    # --- signals
    (bad.handle_signals, [], "result", "handled", KEPT),
    (bad.block_signals, [], "result", 0, KEPT),
    (bad.alarm, [], WorkerDiedError, "SIGALRM.*an alarm", REPLACED),
    (bad.kill_self, [signal.SIGTERM], WorkerDiedError, "SIGTERM.*sent it", REPLACED),
    (bad.kill_self, [signal.SIGXCPU], WorkerDiedError, "SIGXCPU", REPLACED),
    (bad.kill_self, [signal.SIGSEGV], WorkerDiedError, "SIGSEGV.*faulthandler", REPLACED),
    (bad.dereference_null, [], WorkerDiedError, "SIGSEGV.*faulthandler", REPLACED),
    (bad.abort, [], WorkerDiedError, "SIGABRT.*faulthandler", REPLACED),
    # --- the state of the process
    (bad.change_directory, ["/"], "result", None, KEPT),
    (bad.clear_environment, [], "result", None, KEPT),
    (bad.set_umask, [], "result", None, KEPT),
    (bad.disable_gc, [], "result", None, KEPT),
    (bad.set_recursion_limit, [200], "result", None, KEPT),
    (bad.use_up_memory, [], MemoryError, "", KEPT),
    (bad.use_up_memory_in_small_pieces, [], MemoryError, "", KEPT),
    (bad.explain_used_up_memory, [], ValueError, "too much", KEPT),
    (bad.replace_stdout, [None], "result", None, KEPT),
    (bad.replace_stdout, [OddStream("StopIteration")], "result", None, KEPT),
    (bad.replace_stdout, [OddStream("SystemExit")], "result", None, KEPT),
    (bad.replace_stdout, [OddStream("GeneratorExit")], "result", None, KEPT),
    (bad.delete_stdout, [], "result", None, KEPT),
    (bad.break_excepthook, [], ValueError, "without a hook", KEPT),
    (bad.break_pickle, [], WorkerDiedError, "code 70", REPLACED),
    (bad.forget_modules, [], "result", None, KEPT),
]  # fmt: skip


# Coverage takes memory, too, where none is left; the worker may then have none to tell with.
USE_UP_MEMORY = {
    bad.use_up_memory, bad.use_up_memory_in_small_pieces, bad.explain_used_up_memory,
}  # fmt: skip


def numbered(number):
    """A row by its number: pytest is not to look at its arguments."""
    fn, _, _, words, _ = TABLE[number]
    name = f"{fn.__name__}: {words:.40}".replace("\\", "") if words else fn.__name__
    return pytest.param(number, id=name, marks=[pytest.mark.alone] if fn in USE_UP_MEMORY else [])


@pytest.mark.parametrize("number", [numbered(number) for number in range(len(TABLE))])
async def test_bad_input(number):
    """The outcome is the one in the table, the next job has its result, and the worker is as said."""
    fn, args, expected, words, kept = TABLE[number]
    async with Executor(1) as executor:
        worker = await executor.run_cpu(jobs.pid)
        try:
            outcome, kind = await executor.run_cpu(fn, *args), "result"
        except BaseException as error:
            outcome = error
            kind = type(error).__name__ if isinstance(expected, str) else type(error)
        assert kind == expected, outcome
        if kind == "result":
            assert outcome == words
        elif words is not None:
            assert re.search(words, str(outcome), re.DOTALL)
        assert await executor.run_cpu(echo, "next") == "next"
        assert (await executor.run_cpu(jobs.pid) == worker) in kept


@pytest.mark.parametrize(
    "call",
    [
        lambda path: (echo, bad.HangsWhereUnpickled(path)),
        lambda path: (make, bad.HangsWherePickled, path),
        lambda path: (raise_made, bad.ReducesAndHangs, path),
        lambda path: (bad.half_a_frame, frame(_wire.RESULT, _NAME, bytes(100_000))[:50], path),
        lambda path: (bad.half_a_frame, header(_wire.RESULT, 1 << 39), path),
        lambda path: (bad.half_a_frame, b"", path),
    ],
    ids=["argument", "result", "exception", "half a frame", "half a terabyte", "channel"],
)
async def test_what_hangs(gate, call):
    """Nothing can be known of it but that it has not ended: a cancel frees it, and the executor."""
    async with Executor(1) as executor:
        worker = await executor.run_cpu(jobs.pid)
        job = asyncio.ensure_future(executor.run_cpu(*call(gate.path)))
        assert await gate.entered() == worker
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert await executor.run_cpu(echo, "next") == "next"
        assert await executor.run_cpu(jobs.pid) != worker


async def test_an_argument_whose_unpickling_hangs_does_not_hold_up_others(gate):
    """The jobs behind it and beside it are done meanwhile."""
    async with Executor(2) as executor:
        job = asyncio.ensure_future(executor.run_cpu(echo, bad.HangsWhereUnpickled(gate.path)))
        await gate.entered()
        assert await asyncio.gather(*(executor.run_cpu(echo, n) for n in range(50))) == [*range(50)]
        gate.open()
        assert await job is None


MODULES = {
    "ImportError": "raise ImportError('not there')",
    "ValueError": "raise ValueError('at the top level')",
    "SystemExit": "raise SystemExit('at the top level')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "SyntaxError": "exec('1 +')",
    "another function": "del function",
}


@pytest.mark.parametrize("failure", list(MODULES))
async def test_a_module_that_fails_in_the_worker(failure, tmp_path, monkeypatch, request):
    """What is not there goes by value; what fails in another way is an error that says so."""
    name = f"fails_in_worker_{failure.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(
        f"import os\n\n\ndef function():\n    return os.getpid()\n\n\n"
        f"if os.getpid() != {os.getpid()}:\n    {MODULES[failure]}\n"
    )
    _forkserver.ensure("fork")  # before it is imported here
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)
    request.addfinalizer(lambda: sys.modules.pop(name))
    async with Executor(1, start_method="fork") as executor:
        if failure in ("ImportError", "another function"):
            assert await executor.run_cpu(module.function) == await executor.run_cpu(jobs.pid)
        else:
            with pytest.raises(PayloadError, match=f"could not be imported .*{failure}"):
                await executor.run_cpu(module.function)
        assert await executor.run_cpu(echo, "next") == "next"


@pytest.mark.parametrize("what", ["Value", "OddError"])
async def test_a_module_that_only_the_worker_has(what, tmp_path):
    """A result or an exception of a class that cannot be found here is an error that names it."""
    async with Executor(1) as executor:
        worker = await executor.run_cpu(jobs.pid)
        with pytest.raises(PayloadError, match="only_in_worker"):
            await executor.run_cpu(bad.only_here, str(tmp_path), what)
        assert await executor.run_cpu(jobs.pid) == worker


async def test_what_jobs_leave_behind(tmp_path):
    """A worker's directory, environment and streams stay as a job has left them, in that worker."""
    async with Executor(1) as executor:
        await executor.run_cpu(bad.change_directory, str(tmp_path))
        await executor.run_cpu(bad.clear_environment)
        await executor.run_cpu(bad.replace_stdout, None)
        assert await executor.run_cpu(bad.state) == (str(tmp_path), {}, None)
        with pytest.raises(WorkerDiedError):
            await executor.run_cpu(bad.hard_exit, 1)
        directory, environment, stdout = await executor.run_cpu(bad.state)
        assert directory == os.getcwd()
        assert environment.items() >= os.environ.items(), "and what limits numeric libraries"
        assert stdout is not None


async def test_a_thread_that_a_job_leaves_running(gate):
    """It goes on beside the next jobs, and ends with its worker: a close does not wait for it."""
    async with Executor(1) as executor:
        await executor.run_cpu(bad.leave_thread, gate.path)
        worker = await gate.entered()
        assert await executor.run_cpu(jobs.pid) == worker


async def test_a_process_that_a_job_leaves_running(gate):
    """It has no copy of the channel, and ends with the worker's group."""
    async with Executor(1) as executor:
        child = await executor.run_cpu(bad.fork_and_live_on, gate.path)
        assert await gate.entered() == child
        assert await executor.run_cpu(echo, "next") == "next"
    await ended(child)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_job_that_kills_the_fork_server(number):
    """Its own result comes back; the next job has another fork server."""
    async with Executor(1) as executor:
        server = await executor.run_cpu(jobs.parent_pid)
        assert await executor.run_cpu(bad.kill_parent, number) == "done"
        while server in {known.pid for known in _forkserver._servers.values()}:
            await asyncio.sleep(0)
        assert await executor.run_cpu(echo, "next") == "next"
        assert await executor.run_cpu(jobs.parent_pid) != server
