"""A model of the contract: every job has one outcome, whatever dies at whatever line of the protocol.

Hypothesis plays the fork server and the workers, the caller, and the clock, in any order it can think
of, against the real pool. What is seen of the pool is compared with what was done. A failure prints
the shortest play that leads to it. ``ASYNCLAM_MODEL=5000`` plays so many, instead of a few.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
from functools import partial
from unittest import mock

import pytest
import uvloop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from asynclam import (
    ExecutorClosedError,
    PayloadError,
    WorkerDiedError,
    WorkerStartError,
    _call,
    _descriptors,
    _forkserver,
    _memory,
    _pool,
    _raised,
    _recipe,
    _wire,
    _worker,
)
from asynclam._job import Terms
from asynclam._pool import Plan, Pool
from tests import jobs
from tests.parts.actors import result_body
from tests.parts.outcomes import second_outcomes

_EXAMPLES = int(os.environ.get("ASYNCLAM_MODEL", "50"))
_STEPS = 50
_SHORT = 3 << 8  # the flags of a reply: 3 microseconds
_LONG = 1_000_000 << 8
_FLAGS = [0, 0, _wire.SEGMENT, _wire.RELEASES, _wire.SEGMENT | _wire.RELEASES, _wire.PIECES]
_BODIES = st.sampled_from([b"", b"N.", bytes(8), bytes(24), b"\1" + bytes(7), b"\xff" * 40])


class Stream:
    """The other end of a connection, without blocking: what has come so far."""

    def __init__(self, sock):
        sock.setblocking(False)
        self.sock = sock
        self.decoder = _wire.Decoder()
        self.inbox = []
        self.ended = False

    def read(self):
        """Takes in what has come; returns the frames that nobody has taken yet."""
        while not self.ended:
            try:
                nbytes, descriptors, _ = _descriptors.receive(self.sock, self.decoder.buffer())
            except BlockingIOError:
                break
            except OSError:
                nbytes = 0
            if not nbytes:
                self.ended = True
                break
            self.inbox += self.decoder.received(nbytes, descriptors)
        return self.inbox

    def write(self, data):
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(data)

    def send(self, kind, number, body=b"", flags=0):
        self.write(b"".join(_wire.encode(kind, number, [body], flags=flags)))

    def close(self):
        self.sock.close()
        self.decoder.close()
        for frame in self.inbox:
            frame.close()


class Process:
    """A worker: what it has read, begun, and not yet said."""

    def __init__(self, frame, control, pid):
        recipe = _recipe.Recipe.loads(frame.body)
        channel, page, self.life = frame.descriptors
        self.marks = _worker.Marks(_memory.map_segment(page))
        os.close(page)
        frame.descriptors = []
        self.number, self.slot, self.control, self.pid = frame.number, recipe.slot, control, pid
        self.channel = Stream(socket.socket(fileno=channel))
        self.alive, self.ready, self.told = True, False, False
        self.order = 0  # of the last job that it has read
        self.job = None  # the frame of that which it runs
        self.coroutines = {}  # those that it runs: the order of each, by number
        self.cancelled = set()  # numbers of these
        self.rest = b""  # of a reply that it has half written

    @property
    def is_condemned(self):
        """Whether the loop process has ended its life: it may do something yet, but not much."""
        poll = select.poll()
        poll.register(self.life, 0)
        return bool(poll.poll(0))

    def die(self):
        self.alive = False
        self.channel.close()
        os.close(self.life)
        del self.marks


class Model(RuleBasedStateMachine):
    """Plays all but the pool."""

    new_loop = staticmethod(asyncio.new_event_loop)

    def __init__(self):
        super().__init__()
        self.before = len(os.listdir("/proc/self/fd"))
        self.loop = self.new_loop()
        self.unhandled = []
        self.loop.set_exception_handler(lambda _, context: self.unhandled.append(context))
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(
            mock.patch.multiple(_pool, _OVERDUE=3600, _SEEN=3600, _PATIENCE=3600)
        )
        self.patches.enter_context(
            mock.patch.multiple(_forkserver, ensure=lambda _: self, discard=lambda _: None)
        )
        self.patches.enter_context(mock.patch.object(os, "killpg", self.killpg))
        self.patches.enter_context(second_outcomes(self.unhandled.append))
        self.controls = []  # of all fork servers; the last one lives
        self.processes = []
        self.jobs = {}  # by number
        self.values = {}  # what the result of each will be
        self.runs = {}  # how often each has run
        self.replies = {}  # what workers have said of each: the kinds of it
        self.begun = {}  # who had them: their code, or that of their arguments, may have run
        self.harmed = set()  # processes that were killed, not by the pool, or have written garbage
        self.cancelled = set()
        self.outcomes = {}  # how often each future has called back
        self.closing = None
        self.killed = False
        self.next_pid = 1 << 22  # above what the kernel gives
        self.server_alive = True

    # --- the place of ForkServer ---------------------------------------------------------------

    forked = True

    def connect(self):
        ours, theirs = socket.socketpair()
        self.controls.append(Stream(theirs))
        self.server_alive = True
        return ours

    def killpg(self, pid, number):
        assert number == signal.SIGKILL
        for process in self.processes:
            if process.pid == pid and process.alive:
                process.die()

    # --- the caller ------------------------------------------------------------------------------

    @initialize(limit=st.sampled_from([1, 2, 2, 3]))
    def begin(self, limit):
        self.pool = Pool(self.loop, Plan("fork", b"", lambda _: limit))
        self.pool._times[_call.Call(jobs.echo, (0,), {}).kind] = 3  # known to be short

    def turn(self):
        """Lets the loop run until nothing happens by itself."""

        async def some():
            for _ in range(6):
                await asyncio.sleep(0)

        self.loop.run_until_complete(some())

    @property
    def is_open(self):
        return not self.killed and self.closing is None

    @precondition(lambda self: self.is_open)
    @rule(
        count=st.integers(1, 4),
        fn=st.sampled_from([jobs.echo, jobs.add, jobs.echo_later]),
        retries=st.sampled_from([0, 0, 1]),
        grace=st.sampled_from([0.0, 0.0, 3600.0]),
    )
    def submit(self, count, fn, retries, grace):
        is_coroutine = fn is jobs.echo_later
        flags = _wire.COROUTINE if is_coroutine else 0
        terms = Terms(retries, grace if is_coroutine else 0.0)

        def submit():
            for _ in range(count):
                value = len(self.values)
                job = self.pool.submit(_call.Call(fn, (value,), {}, flags=flags), terms)
                self.jobs[job.number], self.values[job.number] = job, value
                job.future.add_done_callback(
                    lambda _, number=job.number: self.outcomes.update(
                        {number: self.outcomes.get(number, 0) + 1}
                    )
                )

        self.loop.call_soon(submit)
        self.turn()

    def undone(self):
        return [job for job in self.jobs.values() if not job.future.done()]

    @precondition(lambda self: self.undone())
    @rule(data=st.data(), late=st.booleans())
    def cancel(self, data, late):
        job = data.draw(st.sampled_from(self.undone()), "job")
        self.cancelled.add(job.number)

        def tell():
            if job.future.cancel() or job.future.cancelled():
                self.pool.cancel(job)

        if late:  # something happens between the cancel of the future and the turn of its task
            self.loop.call_soon(job.future.cancel)
            self.loop.call_soon(self.pool._dispatch)
        self.loop.call_soon(tell)
        self.turn()

    def ending(self):
        """Coroutines that are cancelled, and have not ended."""
        return [
            job for job in self.jobs.values() if job.worker is not None and job.grace is not None
        ]

    @precondition(lambda self: not self.killed and self.ending())
    @rule(data=st.data())
    def lose_patience(self, data):
        """The time of a cancelled coroutine is over."""
        job = data.draw(st.sampled_from(self.ending()), "job")
        self.loop.call_soon(self.pool.hurry, job)
        self.turn()

    @precondition(lambda self: self.is_open and len(self.jobs) > 2)
    @rule(sure=st.sampled_from([False] * 9 + [True]))
    def close(self, sure=True):
        if not sure:
            return
        self.loop.call_soon(lambda: setattr(self, "closing", self.pool.close()))
        self.turn()

    @precondition(lambda self: not self.killed and len(self.jobs) > 2)
    @rule(sure=st.sampled_from([False] * 14 + [True]))
    def kill(self, sure):
        if sure:
            self.killed = True
            self.loop.call_soon(self.pool.kill)
            self.turn()

    @precondition(lambda self: not self.is_open)
    @rule()
    def wait(self):
        """When all is over, nothing else may be left to do."""
        self.turn()

    # --- the clock -------------------------------------------------------------------------------

    @precondition(lambda self: self.pool._watch is not None)
    @rule()
    def look_for_overdue(self):
        self.loop.call_soon(self.pool._look_for_overdue)
        self.turn()

    def revoking(self):
        return [worker for worker in self.pool._workers.values() if worker.revoking]

    @precondition(lambda self: not self.killed and self.revoking())
    @rule()
    def take_back(self):
        for worker in self.revoking():
            worker.revoking.cancel()
            self.loop.call_soon(self.pool._take_back, worker, 0.0)
        self.turn()

    # --- the fork server -------------------------------------------------------------------------

    def orders(self):
        """What the living fork server was told, and has not done."""
        return self.controls[-1].read() if self.controls and self.server_alive else []

    @precondition(lambda self: self.orders())
    @rule(fails=st.sampled_from([False] * 4 + [True]))
    def obey(self, fails):
        self.obey_one(fails=fails)
        self.turn()

    def obey_one(self, *, fails):
        frame = self.orders().pop(0)
        control = self.controls[-1]
        if frame.kind == _wire.KILL:
            for process in self.processes:
                if process.number == frame.number and process.alive:
                    process.die()
        elif fails:
            frame.close()
            body = errno.EAGAIN.to_bytes(8, "little", signed=True)
            control.send(_wire.NOT_STARTED, frame.number, body)
        else:
            self.processes.append(Process(frame, control, self.next_pid))
            self.next_pid += 1

    @precondition(lambda self: self.untold())
    @rule(data=st.data())
    def report(self, data):
        self.tell(data.draw(st.sampled_from(self.untold()), "process"))
        self.turn()

    def untold(self):
        return [
            process
            for process in self.processes
            if not (process.alive or process.told) and process.control is self.controls[-1]
        ] if self.server_alive else []  # fmt: skip

    def tell(self, process):
        process.told = True
        status = int(signal.SIGKILL).to_bytes(8, "little", signed=True)
        process.control.send(_wire.EXITED, process.number, status)

    @precondition(lambda self: self.controls and self.server_alive and not self.killed)
    @rule(sure=st.sampled_from([False] * 3 + [True]))
    def server_dies(self, sure):
        if sure:
            self.server_alive = False
            self.harmed.update(self.living())  # the pool gives up those that run nothing
            self.controls[-1].close()
            self.turn()

    # --- the workers -------------------------------------------------------------------------------

    def living(self, **wanted):
        return [
            process
            for process in self.processes
            if process.alive and all(getattr(process, name) is is_ for name, is_ in wanted.items())
        ]

    def able(self, *, idle):
        return [p for p in self.living(ready=True) if (p.job is None) is idle and not p.rest]

    @precondition(lambda self: self.living(ready=False))
    @rule(data=st.data(), bound=st.booleans())
    def get_ready(self, data, bound):
        process = data.draw(st.sampled_from(self.living(ready=False)), "process")
        self.become_ready(process, _wire.BOUND if bound else 0)
        self.turn()

    def become_ready(self, process, flags=0):
        process.ready = True
        process.channel.send(_wire.READY, 0, process.pid.to_bytes(8, "little"), flags)

    @precondition(lambda self: self.living(ready=False))
    @rule(data=st.data())
    def initializer_fails(self, data):
        process = data.draw(st.sampled_from(self.living(ready=False)), "process")
        process.channel.send(_wire.FAILED, process.pid, _raised.dumps(ValueError("initializer")))
        process.die()
        self.turn()

    def readers(self):
        return [p for p in self.able(idle=True) if p.channel.read() or p.channel.ended]

    @precondition(lambda self: self.readers())
    @rule(data=st.data(), refuses=st.sampled_from([False] * 5 + [True]))
    def read(self, data, refuses):
        """The next job: marks it as begun, then runs it, skips it, or does not know its function."""
        process = data.draw(st.sampled_from(self.readers()), "process")
        self.read_one(process, refuses=refuses)
        self.turn()

    def read_one(self, process, *, refuses=False):
        if process.channel.inbox:
            self.take(process, refuses=refuses)
        else:  # end of file
            process.die()

    def take(self, process, *, refuses=False):
        frame = process.channel.inbox.pop(0)
        if frame.kind == _wire.CANCEL:
            assert frame.number in self.cancelled
            process.cancelled |= {frame.number} & process.coroutines.keys()
            return
        process.order += 1
        if not process.marks.begin(process.slot, process.order):
            process.channel.send(_wire.SKIPPED, process.order)
            return
        self.begun.setdefault(frame.number, []).append(process)
        if refuses and not frame.flags & _wire.BY_VALUE:
            process.channel.send(_wire.REFUSED, frame.number, b"no such name")
            return
        self.runs[frame.number] = self.runs.get(frame.number, 0) + 1
        if frame.flags & _wire.COROUTINE:
            process.coroutines[frame.number] = process.order
        else:
            assert not process.coroutines, "a plain job would hold them up"
            process.job = frame

    def with_coroutines(self):
        return [p for p in self.living(ready=True) if p.coroutines and not p.rest]

    @precondition(lambda self: self.with_coroutines())
    @rule(data=st.data(), raises=st.booleans())
    def end_coroutine(self, data, raises):
        process = data.draw(st.sampled_from(self.with_coroutines()), "process")
        number = data.draw(st.sampled_from(sorted(process.coroutines)), "number")
        self.end(process, number, raises=raises)
        self.turn()

    def end(self, process, number, *, raises=False):
        order = process.coroutines.pop(number)
        if number in process.cancelled:
            process.channel.send(_wire.SKIPPED, order)
            return
        self.replies.setdefault(number, set()).add("raises" if raises else "result")
        if raises:
            process.channel.send(_wire.RAISED, number, _raised.dumps(KeyError(self.values[number])))
        else:
            process.channel.send(_wire.RESULT, number, result_body(self.values[number]), _SHORT)

    @precondition(lambda self: self.able(idle=False))
    @rule(
        data=st.data(),
        flags=st.sampled_from([_SHORT, _SHORT, _LONG]),
        also=st.sampled_from(["", "", "", "dies", "half", "half, dies", "raises", "unreadable"]),
    )
    def reply(self, data, flags, also):
        process = data.draw(st.sampled_from(self.able(idle=False)), "process")
        self.answer(process, flags, also)
        self.turn()

    def answer(self, process, flags, also=""):
        frame, process.job = process.job, None
        reply = also if also in {"raises", "unreadable"} else "result"
        self.replies.setdefault(frame.number, set()).add(reply)
        kind, body = _wire.RESULT, result_body(self.values[frame.number])
        if also == "raises":
            kind, body = _wire.RAISED, _raised.dumps(KeyError(self.values[frame.number]))
        elif also == "unreadable":
            body = b"no pickle"
        data = b"".join(_wire.encode(kind, frame.number, [body], flags=flags))
        if also.startswith("half"):
            process.rest = data[-7:]
            data = data[:-7]
        process.channel.write(data)
        if also.endswith("dies"):
            self.harm(process)

    @precondition(lambda self: [p for p in self.living() if p.rest])
    @rule(data=st.data())
    def other_half(self, data):
        process = data.draw(st.sampled_from([p for p in self.living() if p.rest]), "process")
        process.channel.write(process.rest)
        process.rest = b""
        self.turn()

    @precondition(lambda self: self.living())
    @rule(data=st.data(), report=st.booleans())
    def die(self, data, report):
        process = data.draw(st.sampled_from(self.living()), "process")
        self.harm(process)
        if report and process in self.untold():
            self.tell(process)
        self.turn()

    def harm(self, process):
        self.harmed.add(process)
        process.die()

    @precondition(lambda self: self.living(ready=True))
    @rule(data=st.data(), kind=st.integers(0, 13), flags=st.sampled_from(_FLAGS), body=_BODIES)
    def write_garbage(self, data, kind, flags, body):
        """A frame that answers nothing, or (kind 0) no frame at all."""
        process = data.draw(st.sampled_from(self.living(ready=True)), "process")
        self.harmed.add(process)
        if kind:
            process.channel.send(kind, 1 << 40, body, flags)
        else:
            process.channel.write(b"garbage" * 10)
        self.turn()

    # --- all of them -------------------------------------------------------------------------------

    # The rules above are what goes wrong, too, each for itself. Hypothesis leaves out some of them in
    # each play, and it takes five that go right until one job is done.
    @precondition(lambda self: self.duties())
    @rule(data=st.data(), count=st.integers(1, 8))
    def work(self, data, count):
        """Some of those who have something to do, do it as they should."""
        for _ in range(count):
            duties = self.duties()
            if duties:
                data.draw(st.sampled_from(duties), "duty")()
                self.turn()

    def duties(self):
        """What each could do next."""
        return [
            *[partial(self.obey_one, fails=False) for _ in self.orders()[:1]],
            *[partial(self.become_ready, process) for process in self.living(ready=False)],
            *[partial(self.read_one, process) for process in self.readers()],
            *[partial(self.answer, process, _SHORT) for process in self.able(idle=False)],
            *[
                partial(self.end, process, number)
                for process in self.with_coroutines()
                for number in process.coroutines
            ],
            *[partial(self.tell, process) for process in self.untold()],
        ]

    # --- what always holds -------------------------------------------------------------------------

    @invariant()
    def no_job_runs_twice(self):
        for number, runs in self.runs.items():
            allowed = 1 + self.jobs[number].terms.retries
            assert runs <= allowed, f"job {number} has run {runs} times"

    @invariant()
    def outcomes_are_right(self):
        assert not self.unhandled, self.unhandled
        for number, job in self.jobs.items():
            future = job.future
            if future.done():
                self.check(number, future)

    def check(self, number, future):
        assert self.outcomes[number] == 1
        if future.cancelled():
            assert number in self.cancelled
            return
        error = future.exception()
        replies = self.replies.get(number, ())
        if error is None:
            assert future.result() == self.values[number]
            assert "result" in replies
        elif isinstance(error, WorkerDiedError):
            # It had begun in a worker that died by itself, or was next when three had died.
            had_begun = self.harmed.intersection(self.begun.get(number, ()))
            assert had_begun or self.jobs[number].losses == _pool._MOST_LOSSES
        elif isinstance(error, ExecutorClosedError):
            assert self.killed
        elif isinstance(error, WorkerStartError):
            assert self.runs.get(number, 0) <= error.tries
        elif isinstance(error, PayloadError):
            assert "unreadable" in replies
        else:
            assert (type(error), error.args) == (KeyError, (self.values[number],))
            assert "raises" in replies

    @invariant()
    def the_pool_is_consistent(self):
        pool = getattr(self, "pool", None)
        if pool is None or self.killed:
            return
        workers = list(pool._workers.values())
        slots = [*pool._slots, *(worker.slot for worker in workers)]
        assert sorted(slots) == list(range(_pool._SLOTS))
        for worker in workers:
            if worker.state is not _pool._DYING:
                assert worker.expected == sum(job.duration for job in worker.jobs)
            assert all(job.worker is worker for job in worker.jobs)
            assert [job.order for job in worker.jobs] == sorted(job.order for job in worker.jobs)
            assert (worker in pool._idle) is (worker.state is _pool._IDLE)
        assert not (pool._queue and pool._idle), "somebody is idle while a job waits"
        fresh = [number for number, job in pool._queue.items() if not job.order]
        assert fresh == sorted(fresh), "jobs wait in the order in which they came"
        homes = [*pool._queue, *(job.number for worker in workers for job in worker.jobs)]
        assert len(homes) == len(set(homes)), "a job is in one place"
        for job in self.undone():
            assert job.number in homes, f"job {job.number} is nowhere"

    # --- the end -------------------------------------------------------------------------------------

    def teardown(self):
        try:
            if getattr(self, "pool", None) is not None:
                self.finish()
        finally:
            self.clean_up()

    def finish(self):
        """Everybody does his duty from here on: then all jobs have an outcome, and the pool ends."""
        if self.is_open:
            self.close()
        for _ in range(1000):
            if self.killed or self.closing.done():
                break
            self.play_on()
        else:
            pytest.fail(f"the pool hangs: {self.pool.queued} queued, {self.pool.running} running")
        self.turn()
        self.outcomes_are_right()
        self.no_job_runs_twice()
        assert not self.undone()
        assert not self.pool._workers

    def play_on(self):
        while self.orders():
            self.obey_one(fails=False)
            self.turn()
        for process in self.living():
            if not process.ready:
                self.become_ready(process)
            elif process.is_condemned:
                process.die()
            elif process.rest:
                process.channel.write(process.rest)
                process.rest = b""
            elif process.job is not None:
                self.answer(process, _SHORT)
            elif process.coroutines and not process.channel.read():
                self.end(process, min(process.coroutines))
            elif process.channel.read():
                self.take(process)
            elif process.channel.ended:
                process.die()
            self.turn()
        for process in self.untold():
            self.tell(process)
        if self.revoking():
            self.take_back()
        self.turn()

    def clean_up(self):
        if getattr(self, "pool", None) is not None:
            self.pool.kill()
        for process in self.living():
            process.die()
        for control in self.controls:
            control.close()
        for job in self.jobs.values():
            if job.future.done() and not job.future.cancelled():
                job.future.exception()
        self.turn()
        self.loop.close()
        self.patches.close()
        self.pool = None
        assert len(os.listdir("/proc/self/fd")) == self.before


class UvloopModel(Model):
    new_loop = staticmethod(uvloop.new_event_loop)


@pytest.mark.parametrize("model", [Model, UvloopModel], ids=["asyncio", "uvloop"])
def test_every_job_has_one_outcome(model):
    """Whatever happens in whatever order: one outcome, that of the job; nothing hangs, nothing is left."""
    run_state_machine_as_test(
        model,
        settings=settings(
            max_examples=_EXAMPLES,
            stateful_step_count=_STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
