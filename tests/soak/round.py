"""One round: some executors in turn, their jobs and disturbances, and what is left at the end.

    python -m tests.soak.round '{"seed": 1, "jobs": 1000, ...}'

Prints its findings as JSON; what jobs print goes nowhere. Ends with 3, and every stack on stderr, if no job has ended for a minute.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import itertools
import json
import os
import resource
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from time import perf_counter
from typing import Any

import uvloop

from asynclam import (
    Executor,
    PayloadError,
    WorkerDiedError,
    WorkerStartError,
    _forkserver,
    _memory,
    _streams,
)
from tests.parts.outcomes import second_outcomes
from tests.soak import kinds, ledger, work
from tests.soak.disturbances import Disturber

assert _streams  # imported while there are descriptors for that

_LIVES = 5  # executors, one after the other; the memory after the second is what the last may have
_CLIENTS = 48  # who have one job, or one map, under way each
_DESCRIPTORS = 400  # of the round and of its workers, so that they can run out of them
_STUCK = 60.0  # seconds without an outcome
STUCK = 3  # exit status

# What an outcome may be where something runs out: descriptors, disk, or a worker's memory.
_SHORT = (OSError, MemoryError)


@dataclass(frozen=True)
class Settings:
    """How a round is run."""

    seed: int
    jobs: int
    loop: str = "asyncio"
    start_method: str = "fork"
    workers: int = 2
    tasks: int | None = None  # jobs until a worker is replaced
    address_space: int = 0  # bytes that a worker may have beyond what it begins with; 0: all
    every: int = 150  # jobs between two disturbances
    spared: tuple[str, ...] = ()


@dataclass
class Findings:
    """What a round has seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    disturbances: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)  # after each executor
    memory: list[int] = field(default_factory=list)  # bytes of its own, after each executor
    seconds: float = 0.0


class Life:
    """One executor's life."""

    def __init__(self, settings: Settings, jobs: int, random: Random, book: ledger.Ledger) -> None:
        self._settings, self._random, self._book = settings, random, book
        self._numbers = iter(range(jobs))
        self._disturber = Disturber(random, book, tempfile.gettempdir(), set(settings.spared))
        self.kinds: Counter[str] = Counter()
        self._due = settings.every

    @property
    def disturbances(self) -> Counter[str]:
        return self._disturber.counts

    async def live(self) -> None:
        settings = self._settings
        executor = Executor(
            settings.workers,
            start_method=settings.start_method,  # type: ignore[arg-type]
            max_tasks_per_child=settings.tasks,
            initializer=work.initialize,
            initargs=(str(self._book.path), settings.address_space),
        )
        watchdog = asyncio.ensure_future(self._watch())
        try:
            async with executor:
                self._disturber.executor = executor
                await asyncio.gather(*(self._client(executor) for _ in range(_CLIENTS)))
                self._disturber.calm()
        finally:
            self._disturber.executor = None
            watchdog.cancel()

    async def _watch(self) -> None:
        while True:
            seen = self._book.settled
            await asyncio.sleep(_STUCK)
            if self._book.settled == seen:
                print(
                    f"no outcome for {_STUCK:.0f} s: {self._disturber.executor!r}", file=sys.stderr
                )
                for task in asyncio.all_tasks():
                    task.print_stack()
                faulthandler.dump_traceback()
                os._exit(STUCK)

    async def _client(self, executor: Executor) -> None:
        for number in self._numbers:
            if self._random.random() < 0.01:
                await self._map(executor, [number, *itertools.islice(self._numbers, 60)])
            else:
                await self._one(executor, number)
            if self._book.settled >= self._due:
                self._due = self._book.settled + self._settings.every
                self._disturber.disturb()

    async def _one(self, executor: Executor, number: int) -> None:
        while True:
            try:
                order = kinds.draw(self._random, number)
                break
            except OSError:  # no descriptor, or no disk, for the buffer of an argument
                await asyncio.sleep(0)
        self.kinds[order.kind] += 1
        self._book.kinds[number] = order.kind
        is_to_end = self._random.random() < 0.03
        if is_to_end and self._random.random() < 0.5:
            executor = executor.options(cancel_grace=self._random.choice([0.001, 0.02]))
        elif self._random.random() < 0.05:
            executor = executor.options(retries=1)
            self._book.retries[number] = 1
        run = executor.run_async if order.is_coroutine else executor.run_cpu
        job = asyncio.ensure_future(run(order.fn, *order.args))
        cancel = None
        if is_to_end:
            delay = self._random.choice([0, 0, 0.001, 0.003])
            cancel = asyncio.get_running_loop().call_later(delay, job.cancel)
        try:
            result = await job
        except BaseException as error:
            self._book.settle(
                number, self._classify(number, order, error, cancelled=cancel is not None)
            )
        else:
            if not await _is_right(order, result):
                self._book.complain(f"{order.kind} {number}: {result!r:.200} is wrong")
            self._book.settle(number, ledger.VALUE)
        finally:
            if cancel is not None:
                cancel.cancel()

    def _classify(
        self, number: int, order: kinds.Order, error: BaseException, *, cancelled: bool
    ) -> int:
        if isinstance(error, asyncio.CancelledError) and cancelled:
            return ledger.CANCELLED
        if isinstance(error, WorkerDiedError):
            self._book.died(number, error)
            if order.ends_its_worker:
                self._book.kills[error.pid or 0] += 1
            return ledger.DIED
        if isinstance(error, WorkerStartError) and isinstance(
            error.__cause__, (OSError, WorkerDiedError)
        ):
            self._book.tries[number] = error.tries
            return ledger.NOT_STARTED
        if isinstance(error, PayloadError) and _is_short(error):
            return ledger.REFUSED
        if isinstance(error, order.raises):
            return ledger.OWN_ERROR
        self._book.complain(f"{order.kind}: {error!r:.300} caused by {error.__cause__!r:.300}")
        return ledger.OWN_ERROR

    async def _map(self, executor: Executor, numbers: list[int]) -> None:
        """Items that share jobs: one death may take all of a job's."""
        self.kinds["map_cpu"] += len(numbers)
        chunksize = self._random.choice([None, 1, 7])
        for number in numbers:
            self._book.kinds[number] = f"map_cpu, chunksize {chunksize}"
        stream = executor.map_cpu(work.echo, numbers, chunksize=chunksize, return_exceptions=True)
        results = await stream.list()
        if len(results) != len(numbers):
            self._book.complain(f"{len(results)} results for {len(numbers)} items")
        died = set()
        for number, result in zip(numbers, results, strict=False):
            if result == (number, None):
                self._book.settle(number, ledger.VALUE)
            elif isinstance(result, WorkerDiedError):
                self._book.settle(number, ledger.DIED)
                if id(result) not in died:
                    self._book.died(number, result)
                died.add(id(result))
            elif isinstance(result, WorkerStartError):
                self._book.settle(number, ledger.NOT_STARTED)
            else:
                self._book.complain(f"item {number}: {result!r:.300} is wrong")
                self._book.settle(number, ledger.VALUE)


async def _is_right(order: kinds.Order, result: object) -> bool:
    while True:
        try:
            return order.is_right(result)
        except OSError:  # no descriptor is left to look into it, until some are given back
            await asyncio.sleep(0)


def _is_short(error: BaseException) -> bool:
    """Whether something ran out: here, as the cause tells, or in the worker, as the text does."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _SHORT):
            return True
        cause = cause.__cause__
    return any(kind.__name__ in str(error) for kind in _SHORT)


def run(settings: Settings) -> Findings:
    """Runs a round."""
    findings = Findings()
    random = Random(settings.seed)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, hard))
    uvloop.new_event_loop().close()  # whose pipe for signals stays
    _descriptors_now()
    before = _descriptors_now()
    begun = perf_counter()
    new_loop = uvloop.new_event_loop if settings.loop == "uvloop" else asyncio.new_event_loop
    for life_number in range(_LIVES):
        jobs = settings.jobs // _LIVES + (settings.jobs % _LIVES if not life_number else 0)
        with tempfile.TemporaryDirectory(prefix="soak-") as directory:
            book = ledger.Ledger(directory, jobs)
            life = Life(settings, jobs, random, book)
            with second_outcomes(book.complain):
                _run_until_complete(new_loop(), life, findings)
            book.check()
            findings.wrong += book.wrong
            findings.outcomes.update(book.counts())
            findings.disturbances.update(life.disturbances)
            findings.kinds.update(life.kinds)
            book.close()
            del book, life
        _settle_down()
        findings.descriptors.append(len(_descriptors_now()))
        findings.memory.append(_memory_now())
    findings.seconds = perf_counter() - begun
    left = {number: file for number, file in _descriptors_now().items() if number not in before}
    findings.wrong += [f"descriptor {number} is left: {file}" for number, file in left.items()]
    findings.wrong += [f"a segment is left: {line}" for line in _segments_now()]
    findings.wrong += [f"process {pid} is left" for pid in _children_now()]
    findings.wrong += [f"{name} is left in {tempfile.gettempdir()}" for name in _files_now()]
    return findings


def _run_until_complete(loop: asyncio.AbstractEventLoop, life: Life, findings: Findings) -> None:
    # Not asyncio.run(), which has no choice of the loop on 3.10.
    def complain(_loop: object, context: dict[str, Any]) -> None:
        findings.wrong.append(f"unhandled: {context['message']}: {context.get('exception')!r}")

    loop.set_exception_handler(complain)
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(life.live())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _settle_down() -> None:
    _forkserver.stop()
    gc.collect()
    with _memory._dropping:  # by the thread in which large mappings end
        pass


def _descriptors_now() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of the listing itself
            continue
    return found


def _segments_now() -> list[str]:
    with open("/proc/self/maps") as maps:
        return [line.strip() for line in maps if "asynclam" in line and "(deleted)" in line]


def _children_now() -> list[int]:
    """Processes in the sessions of fork servers cannot be told apart by now; children can."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:  # ended meanwhile
            continue
        if parent == os.getpid():
            found.append(int(name))
    return found


def _files_now() -> list[str]:
    return [
        name for name in os.listdir(tempfile.gettempdir()) if name.startswith(("asynclam", "soak"))
    ]


def _memory_now() -> int:
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":", 1) for line in status)
    return int(sizes["RssAnon"].split()[0]) * 1024


def main() -> None:
    report = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    settings = json.loads(sys.argv[1])
    findings = run(Settings(**{**settings, "spared": tuple(settings.get("spared", ()))}))
    with open(report, "w") as output:
        json.dump(vars(findings), output)


if __name__ == "__main__":
    main()
