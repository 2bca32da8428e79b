"""A short soak in every run of the suite, each with another seed; ``make soak`` is the long one."""

import asyncio
import subprocess
import sys

import pytest

from asynclam._call import Call
from asynclam._job import Job
from tests.parts.outcomes import second_outcomes
from tests.soak import ledger, report
from tests.soak.round import Settings


@pytest.mark.alone
def test_a_short_soak(tmp_path):
    """Jobs of all kinds among deaths, stops, cancels and shortages: each has its one outcome."""
    page = tmp_path / "soak.md"
    soak = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--jobs", "3600", "--report", str(page)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert "| jobs with no outcome | 0 | 0 |" in page.read_text()
    assert "3,600 jobs in 6 rounds" in page.read_text()


@pytest.fixture
def book(tmp_path):
    book = ledger.Ledger(str(tmp_path), 4)
    yield book
    book.close()


def test_the_ledger_finds_what_is_wrong(book):
    """A job without outcome, one with two, one that begins twice, one that never has: each is told."""
    from tests.soak import work

    work.initialize(str(book.path), 0)
    for number in (0, 1, 1, 2):
        work.echo(number)
    book.settle(0, ledger.VALUE)
    book.settle(0, ledger.CANCELLED)
    book.settle(1, ledger.VALUE)
    book.settle(3, ledger.VALUE)
    book.check()
    assert [text.split(", in worker")[0] for text in book.wrong] == [
        "job 0 has two outcomes",
        "job 1 (, result) has begun 2 times",
        "job 2 () has no outcome",
        "job 3 () has an outcome, and not begun",
    ]
    work._page.close()
    work._page = None


async def test_a_second_outcome_is_seen():
    """That of a job that has one, but not that of a job that was cancelled."""
    wrong = []
    with second_outcomes(wrong.append):
        for give in (Job.succeed, Job.fail):
            twice, cancelled = (
                Job(Call(int, (), {}), asyncio.get_running_loop().create_future()) for _ in range(2)
            )
            twice.succeed(1)
            assert wrong == []
            give(twice, ValueError())
            cancelled.future.cancel()
            give(cancelled, ValueError())
            assert wrong.pop().startswith(f"job {twice.number} has two outcomes")


def test_the_report_tells_what_is_wrong():
    """It counts each thing beside its goal, and lists all of it."""
    done = report.Round(Settings(seed=1, jobs=10), "memfd")
    done.findings = {"outcomes": {"no outcome": 1, "result": 9}, "memory": [1, 1, 1], "seconds": 1}
    done.findings |= {"disturbances": {}, "kinds": {}}
    done.wrong = ["job 1 (echo) has no outcome", "process 3 is left"]
    page = report.page([done], 10, 1)
    assert "| jobs with no outcome | 1 | 0 |" in page
    assert "| descriptors, segments, files, processes left | 1 | 0 |" in page
    assert "* job 1 (echo) has no outcome" in page
