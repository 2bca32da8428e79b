"""How many workers suit the machine."""

import pytest

from asynclam import _environment


@pytest.mark.parametrize(
    ("cpus", "memory", "workers"),
    [
        (2, 128, 1),
        (2, 1769, 1),
        (2, 1770, 2),
        (2, 3008, 2),
        (3, 3009, 2),
        (6, 10240, 6),
        (1, 10240, 1),
        (8, None, 8),
        (0, None, 1),
    ],
)
def test_workers_for(cpus, memory, workers):
    """One worker for each 1769 MB begun, never more than the visible CPUs, at least one."""
    assert _environment.workers_for(cpus, memory) == workers


@pytest.mark.parametrize(("value", "memory"), [("512", 512), ("", None), ("lots", None)])
def test_lambda_memory(monkeypatch, value, memory):
    """The memory is what the runtime says; nothing else counts as Lambda."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", value)
    assert _environment.lambda_memory() == memory


def test_default_workers(monkeypatch):
    """A small function has one worker, however many CPUs it sees."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "512")
    monkeypatch.setattr(_environment, "visible_cpus", lambda: 6)
    assert _environment.default_workers() == 1
