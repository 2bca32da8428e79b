"""Who had which outcome, and whether it may have been."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from pathlib import Path
from time import perf_counter_ns

from asynclam import WorkerDiedError
from tests.soak.work import MARK

NONE, VALUE, OWN_ERROR, DIED, CANCELLED, REFUSED, NOT_STARTED = range(7)
NAMES = (
    "no outcome", "result", "its own error", "WorkerDiedError", "cancelled",
    "PayloadError", "WorkerStartError",
)  # fmt: skip


class Ledger:
    """The outcomes of jobs by number, and the page on which jobs mark that they begin."""

    def __init__(self, directory: str, jobs: int) -> None:
        self.path = Path(directory, "begun")
        self.path.write_bytes(bytes(max(jobs, 1) * MARK.size))
        with self.path.open("r+b") as file:
            self._begun = mmap.mmap(file.fileno(), 0)
        self._outcomes = bytearray(jobs)
        self.kinds = [""] * jobs
        self.retries = bytearray(jobs)  # that each may have
        self.tries = bytearray(jobs)  # after which there was no worker for another one
        self._history: list[tuple[int, str]] = []  # what was done to the executor, and when
        self.settled = 0
        self.kills: Counter[int] = Counter()  # deaths that were caused, by pid
        self.deaths: dict[int, list[str]] = {}  # jobs that died, by the pid of their worker
        self._with_coroutines: set[int] = set()  # workers that died when they had some
        self.wrong: list[str] = []

    def settle(self, number: int, outcome: int) -> None:
        """Notes an outcome; there may be one. Of those that a future hides second_outcomes tells."""
        if self._outcomes[number] != NONE:
            self.complain(f"job {number} has two outcomes")
        self._outcomes[number] = outcome
        self.settled += 1

    def died(self, number: int, error: WorkerDiedError) -> None:
        """Notes that a job has died with its worker; of coroutines, which share one, the first."""
        pid = error.pid or 0
        if self.kinds[number] == "coroutine":
            if pid in self._with_coroutines:
                return
            self._with_coroutines.add(pid)
        text = f"job {number} ({self.kinds[number]}): {error} {self._near(perf_counter_ns())}"
        self.deaths.setdefault(pid, []).append(text)

    def _near(self, first: int, last: int | None = None) -> list[str]:
        return [
            f"{(when - first) / 1e6:+.1f} ms {what}"
            for when, what in self._history[-200:]
            if first - 100e6 < when < (last or first) + 100e6
        ]

    def note(self, what: str) -> None:
        """Remembers what was done to the executor."""
        self._history.append((perf_counter_ns(), what))

    def complain(self, text: str) -> None:
        """Notes what is wrong; the first of it is enough to see."""
        if len(self.wrong) < 20:
            self.wrong.append(text)

    def check(self) -> None:
        """Compares outcomes with beginnings, and deaths with kills."""
        for number, outcome in enumerate(self._outcomes):
            begun = MARK.unpack_from(self._begun, number * MARK.size)
            if outcome == NONE:
                self.complain(f"job {number} ({self.kinds[number]}) has no outcome")
            if begun[0] > 1 + self.retries[number]:
                self._complain_of_two(number, *begun)
            elif outcome in (VALUE, OWN_ERROR) and not begun[0]:
                self.complain(f"job {number} ({self.kinds[number]}) has an outcome, and not begun")
            if outcome == NOT_STARTED and begun[0] > self.tries[number]:
                self.complain(f"job {number} ({self.kinds[number]}) was not started, and has begun")
        for pid, deaths in self.deaths.items():
            if len(deaths) > self.kills[pid]:
                self.complain(f"jobs failed by {self.kills[pid]} deaths of worker {pid}: {deaths}")

    def _complain_of_two(
        self, number: int, count: int, first: int, last: int, one: int, other: int
    ) -> None:
        self.complain(
            f"job {number} ({self.kinds[number]}, {NAMES[self._outcomes[number]]}) has begun {count} "
            f"times, in worker {one} and {(last - first) / 1e6:.1f} ms later in {other}; {self._near(first, last)}"
        )

    def counts(self) -> dict[str, int]:
        """How many had which outcome."""
        counted = Counter(self._outcomes)
        return {name: counted[outcome] for outcome, name in enumerate(NAMES)}

    def close(self) -> None:
        """Lets go of the page."""
        self._begun.close()
        os.unlink(self.path)
