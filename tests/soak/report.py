"""The report of a soak, as the run itself writes it."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.soak.round import Settings

_GROWTH = 24 << 20  # bytes that the memory after the last executor may have above the second's


@dataclass
class Round:
    """A round that has ended."""

    settings: Settings
    way: str
    is_boxed: bool = False
    findings: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def growth(done: Round) -> list[str]:
    """What is wrong about its memory."""
    memory = done.findings["memory"]
    if memory[-1] - memory[1] > _GROWTH:
        return [f"seed {done.settings.seed}: memory grew over executors: {memory}"]
    return []


def line(done: Round) -> str:
    """One line about a round."""
    settings = done.settings
    how = f"{settings.loop}, {settings.start_method}, {settings.workers} workers, {done.way}"
    how += ", box" * done.is_boxed + ", little memory" * bool(settings.address_space)
    if not done.findings:
        return f"{how}: FAILED"
    disturbed = sum(done.findings["disturbances"].values())
    return (
        f"{how}: {settings.jobs:,} jobs, {disturbed} disturbances, {done.findings['seconds']:.0f} s"
        + f", WRONG: {len(done.wrong)}" * bool(done.wrong)
    )


def page(rounds: list[Round], jobs: int, seed: int) -> str:
    """The page, in Markdown."""
    outcomes = _sum(rounds, "outcomes")
    disturbances = _sum(rounds, "disturbances")
    kinds = _sum(rounds, "kinds")
    seconds = sum(done.findings.get("seconds", 0.0) for done in rounds)
    ran = sum(outcomes.values())
    wrong = [text for done in rounds for text in done.wrong]
    memory = [
        (done.findings["memory"][-1] - done.findings["memory"][1]) / 2**20
        for done in rounds
        if done.findings
    ]
    goals = [
        ("jobs with no outcome", outcomes["no outcome"], 0),
        ("jobs with two outcomes, or begun twice", _count(wrong, "two outcomes", "has begun"), 0),
        ("results or errors that are not the job's own", _count(wrong, "is wrong", "caused by"), 0),
        ("siblings failed by one worker's death", _count(wrong, "jobs failed by"), 0),
        ("descriptors, segments, files, processes left", _count(wrong, "left", "survived"), 0),
        ("exceptions that nobody handled", _count(wrong, "unhandled", "stderr"), 0),
        ("all that is wrong", len(wrong), 0),
    ]
    how = f'`make soak ARGS="--jobs {jobs} --seed {seed}"`'
    machine = (
        f"CPython {platform.python_version()}, Linux {platform.release().split('-')[0]}, "
        f"{os.cpu_count()} CPUs"
    )
    lines = [
        "# The soak report",
        "",
        f"Written by {how},",
        "which runs it again: the same jobs, the same disturbances after as many outcomes; when exactly",
        "they strike is the machine's affair. What is run, and how it is checked, is in `tests/soak`.",
        "",
        f"{ran:,} jobs in {len(rounds)} rounds, {sum(disturbances.values()):,} disturbances,",
        f"{seconds:,.0f} seconds; {machine}.",
        "",
        *_table(("figure", "seen", "goal"), goals),
        "",
        "Memory of the loop process after the last of a round's executors, above that after the",
        f"second: {min(memory, default=0):.1f} to {max(memory, default=0):.1f} MiB.",
        "",
        *_table(("outcome", "jobs"), _counted(outcomes)),
        "",
        *_table(("disturbance", "times"), _counted(disturbances)),
        "",
        *_table(("kind of job", "jobs"), _counted(kinds)),
        "",
        *_table(("round", "seed"), [(line(done), done.settings.seed) for done in rounds]),
    ]
    if wrong:
        lines += ["", "## Wrong", "", *(f"* {text}" for text in wrong)]
    return "\n".join([*lines, ""])


def _sum(rounds: list[Round], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for done in rounds:
        total.update(done.findings.get(name, {}))
    return total


def _count(wrong: list[str], *words: str) -> int:
    return sum(any(word in text for word in words) for text in wrong)


def _counted(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = (
            f"{cell:,}" if isinstance(cell, int) and head[-1] != "seed" else f"{cell}"
            for cell in row
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines
