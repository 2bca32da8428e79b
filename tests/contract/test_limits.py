"""What a worker may take: which variables are set for it, and what its memory is."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asynclam import _limits

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """This process has not limited its threads, and the tests do not do so."""
    monkeypatch.setattr(_limits, "_threads", 0)
    told = []
    monkeypatch.setitem(sys.modules, "threadpoolctl", Told(told))
    return told


class Told:
    def __init__(self, told):
        self.threadpool_limits = told.append


def test_all_variables_are_set():
    """Each library has its own, and most read that of OpenMP."""
    variables = _limits.thread_variables({"PATH": "/bin"}, 2)
    assert set(variables.values()) == {"2"}
    assert {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"} <= variables.keys()
    assert not _limits.are_threads_chosen({"PATH": "/bin"})


def test_that_of_openmp_stands_for_all():
    """The others are not set then, for they would win over it."""
    assert _limits.thread_variables({"OMP_NUM_THREADS": "3"}, 1) == {}
    assert _limits.are_threads_chosen({"OMP_NUM_THREADS": "3"})


def test_one_that_is_set_is_left_alone():
    """The others are set all the same."""
    variables = _limits.thread_variables({"MKL_NUM_THREADS": "3"}, 1)
    assert "MKL_NUM_THREADS" not in variables
    assert variables["OPENBLAS_NUM_THREADS"] == "1"
    assert _limits.are_threads_chosen({"MKL_NUM_THREADS": "3"})


def test_loaded_libraries_are_told_once(untold, monkeypatch):
    """A process that has told them, or was forked from one that has, does not do so again."""
    monkeypatch.setitem(sys.modules, "numpy", object())
    for threads in (0, 2, 2, 1, 1):
        _limits.limit_threads(threads)
    assert untold == [2, 1]


def test_nothing_is_loaded(untold, monkeypatch):
    """Then the variables suffice, and threadpoolctl is not imported."""
    for name in _limits._NUMERIC:
        monkeypatch.delitem(sys.modules, name, raising=False)
    _limits.limit_threads(1)
    assert untold == []


def test_threadpoolctl_is_not_installed(untold, monkeypatch):
    """Then what was loaded before the fork stays as it is."""
    monkeypatch.setitem(sys.modules, "numpy", object())
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    _limits.limit_threads(1)
    assert untold == []


def test_growth():
    """What was there before does not count; what is taken since does, and what was given back does not."""
    command = [sys.executable, "-c", f"import {__name__} as it; it.grow()"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0b010


def grow():
    """In a new process: one with what other tests have left gives some of that back meanwhile."""
    gc.disable()
    before = bytearray(b"x") * (16 * MIB)
    growth = _limits.Growth(32 * MIB)
    over = growth.is_over()
    taken = bytearray(b"x") * (64 * MIB)
    over += growth.is_over() << 1
    del taken
    over += growth.is_over() << 2
    del before
    os._exit(over)


def test_memory_that_cannot_be_told(monkeypatch):
    """A process that has no descriptor left for it is over: whoever asks replaces it."""
    growth = _limits.Growth(1 << 40)
    assert not growth.is_over()
    monkeypatch.setattr(_limits, "_STATM", "/no/such/file")
    assert growth.is_over()
