"""What an executor has under way, as numbers.

A room of its own because no job needs it: making a dataclass takes longer than importing a module.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """What an executor has under way, and what has become of its jobs.

    Times are totals over the completed jobs; divided by ``jobs_completed``, they are means. A chunk
    of ``map_cpu`` is one job.

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
        queue_seconds: how long jobs have waited until a worker had nothing else to do.
        transport_seconds: how long they have been on their way from then until their reply was read,
            less the time that they ran: what it costs to run them in another process. A loop that
            is held up reads late.
        run_seconds: how long they have run in workers.
        segments_in_use: pieces of shared memory into which arguments or results still look, as far
            as is known here: a worker tells what it has released with its next reply.
        log_records_dropped: what jobs have logged above what a worker may send.
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
    queue_seconds: float
    transport_seconds: float
    run_seconds: float
    segments_in_use: int
    log_records_dropped: int
    threads_busy: int
    threads_abandoned: int

    @property
    def processes_pay(self) -> bool | None:
        """Whether jobs have run for longer than it took to send them there and back.

        If not, they are too short for a process: give more to each (``map_cpu`` does), or call the
        function where you are. ``None``: no job has been completed.
        """
        return self.run_seconds > self.transport_seconds if self.jobs_completed else None
