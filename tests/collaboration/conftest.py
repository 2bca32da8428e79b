"""The stage on which a test plays all but the pool."""

from __future__ import annotations

import asyncio
import os

import pytest

from asynclam import _forkserver, _pool
from tests.parts.actors import FakeServer, FakeWorker
from tests.parts.stage import Stage


@pytest.fixture
async def stage(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(os, "killpg", _killpg)
    monkeypatch.setattr(_pool, "_OVERDUE", 3600)  # nothing is, unless the test says so
    monkeypatch.setattr(_forkserver, "ensure", lambda method: stage.server)
    monkeypatch.setattr(_forkserver, "discard", lambda server: stage.servers.append(FakeServer()))
    opened = []
    monkeypatch.setattr("tests.parts.actors.FakeWorker.__init__", _recording(opened))
    yield stage
    stage.pool.kill()
    await asyncio.gather(*(job.future for job in stage.jobs), return_exceptions=True)
    for worker in opened:
        worker.close()
    for server in stage.servers:
        server.stop()


def _killpg(pid, number):
    # The pids of workers that a test plays may be those of processes that it knows nothing of.
    raise ProcessLookupError(pid)


def _recording(opened):
    original = FakeWorker.__init__

    def init(self, *args):
        original(self, *args)
        opened.append(self)

    return init
