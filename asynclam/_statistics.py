"""What an executor has under way, as numbers.

A room of its own because no job needs it: making a dataclass takes longer than importing a module.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """What an executor has under way.

    Attributes:
        max_workers: how many workers there may be; 0 runs jobs inline.
        workers_starting: workers that are being forked or run the initializer.
        workers_idle: workers that wait for a job.
        workers_busy: workers that run one.
        jobs_queued: jobs that no worker has yet.
        jobs_running: jobs that a worker has.
        jobs_completed: jobs that a worker has replied to, with a result or an exception.
        jobs_cancelled: jobs that were cancelled before they had ended.
        jobs_retried: how often a job was begun again (``options(retries=n)``).
        worker_deaths: workers that died while they had a job.
        workers_spent: workers that were replaced after ``max_tasks_per_child`` jobs.
        workers_grown: workers that were replaced because of ``max_memory_per_child``.
        threads_busy: threads of ``run_blocking``, abandoned ones among them.
        threads_abandoned: those whose caller was cancelled; they run until the function returns.
    """

    max_workers: int
    workers_starting: int
    workers_idle: int
    workers_busy: int
    jobs_queued: int
    jobs_running: int
    jobs_completed: int
    jobs_cancelled: int
    jobs_retried: int
    worker_deaths: int
    workers_spent: int
    workers_grown: int
    threads_busy: int
    threads_abandoned: int
