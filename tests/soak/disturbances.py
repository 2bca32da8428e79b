"""What is done to an executor while it has jobs: deaths, stops, and shortages of all kinds."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from asynclam import Executor, _forkserver
from tests.soak.kinds import scratch_is_small
from tests.soak.ledger import Ledger

_HELD = 0.03  # seconds that a process is stopped, or something short, at most


class Disturber:
    """Does something to the executor now and then, and takes back what it can.

    Args:
        spared: disturbances that there are none of in this round.
    """

    def __init__(self, random: Random, ledger: Ledger, scratch: str, spared: set[str]) -> None:
        self._random = random
        self._ledger = ledger
        self._scratch = Path(scratch, "filler")
        self._ways = {name: way for name, way in self._all().items() if name not in spared}
        self.executor: Executor | None = None
        self.counts: Counter[str] = Counter()
        self._pending: dict[asyncio.TimerHandle, Callable[[], None]] = {}

    def _all(self) -> dict[str, tuple[int, Callable[[], bool]]]:
        return {
            "worker killed": (8, lambda: self._kill(signal.SIGKILL)),
            "worker crashed": (4, lambda: self._kill(signal.SIGSEGV)),
            "worker terminated": (2, lambda: self._kill(signal.SIGTERM)),
            "worker stopped": (8, self._stop_worker),
            "fork server stopped": (3, self._stop_server),
            "fork server killed": (1, self._kill_server),
            "descriptors used up": (3, self._use_descriptors),
            "disk full": (3, self._fill_disk),
        }

    def disturb(self) -> None:
        """Does one thing, if there is something to do it to."""
        names = list(self._ways)
        (name,) = self._random.choices(names, [self._ways[name][0] for name in names])
        if self._ways[name][1]():
            self.counts[name] += 1

    def _worker(self) -> int | None:
        pool = self.executor._pool if self.executor else None
        pids = [worker.pid for worker in pool._workers.values() if worker.pid] if pool else []
        return self._random.choice(pids) if pids else None

    def _kill(self, number: int) -> bool:
        pid = self._worker()
        if pid is None or not _signal(pid, number):
            return False
        self._ledger.kills[pid] += 1
        self._ledger.note(f"worker {pid}: signal {number}")
        return True

    def _stop_worker(self) -> bool:
        pid = self._worker()
        return pid is not None and self._stop(pid)

    def _stop_server(self) -> bool:
        servers = list(_forkserver._servers.values())
        return bool(servers) and self._stop(servers[0].pid)

    def _kill_server(self) -> bool:
        # Not while it may not have forked anything yet: three failed starts are a right outcome.
        pool = self.executor._pool if self.executor else None
        servers = list(_forkserver._servers.values())
        if pool is None or pool.count("starting") or not servers:
            return False
        self._ledger.note(f"fork server {servers[0].pid} killed")
        return _signal(servers[0].pid, signal.SIGKILL)

    def _stop(self, pid: int) -> bool:
        if not _signal(pid, signal.SIGSTOP):
            return False
        self._ledger.note(f"process {pid} stopped")

        def go_on() -> None:
            self._ledger.note(f"process {pid} goes on")
            _signal(pid, signal.SIGCONT)

        self._later(go_on)
        return True

    def _use_descriptors(self) -> bool:
        if self.counts_pending("descriptors"):
            return False
        taken = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        for _ in range(self._random.randrange(3)):
            os.close(taken.pop())

        def release() -> None:
            for descriptor in taken:
                os.close(descriptor)

        release.__name__ = "descriptors"
        self._later(release)
        return True

    def _fill_disk(self) -> bool:
        directory = self._scratch.parent
        if not scratch_is_small(str(directory)) or self.counts_pending("disk"):
            return False
        free = os.statvfs(directory)
        leave = self._random.choice([0, 1, 50, 300])  # blocks
        try:
            with self._scratch.open("wb") as file:
                nbytes = max(free.f_bavail - leave, 1) * free.f_frsize
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError:  # somebody has taken it meanwhile: it is as full
            pass

        def release() -> None:
            self._scratch.unlink(missing_ok=True)

        release.__name__ = "disk"
        self._later(release)
        return True

    def counts_pending(self, name: str) -> bool:
        """Whether a shortage goes on."""
        return any(undo.__name__ == name for undo in self._pending.values())

    def _later(self, undo: Callable[[], object]) -> None:
        def run() -> None:
            del self._pending[handle]
            undo()

        delay = self._random.uniform(0, _HELD)
        handle = asyncio.get_running_loop().call_later(delay, run)
        self._pending[handle] = undo

    def calm(self) -> None:
        """Takes back what goes on."""
        for handle, undo in list(self._pending.items()):
            handle.cancel()
            undo()
        self._pending.clear()


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it is dead, and not yet told of
        return False
    return True
