"""Sees a job that is settled twice, which its future does not show: it takes one outcome, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from unittest import mock

from asynclam._job import Job


@contextmanager
def second_outcomes(complain: Callable[[str], object]) -> Iterator[None]:
    """Complains of each result or error for a job that has an outcome; a cancel may come before it."""

    def watched(settle: Callable[[Job, object], None]) -> Callable[[Job, object], None]:
        @wraps(settle)
        def check(job: Job, outcome: object) -> None:
            if job.future.done() and not job.future.cancelled():
                complain(f"job {job.number} has two outcomes: {job.future!r}, and {outcome!r:.200}")
            settle(job, outcome)

        return check

    with (
        mock.patch.object(Job, "succeed", watched(Job.succeed)),
        mock.patch.object(Job, "fail", watched(Job.fail)),
    ):
        yield
