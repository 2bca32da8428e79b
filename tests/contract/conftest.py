"""What neither the machine, nor the environment, nor earlier tests are to decide."""

import pytest

from asynclam import _memory, _sources, _streams


@pytest.fixture
def segments_in_use(monkeypatch):
    """Payloads are not streamed, and maps end at once, even if a loop has run in this process."""
    _memory.drop_in_place()
    monkeypatch.setattr(_memory, "_streamed", False)


@pytest.fixture
def no_turns(monkeypatch):
    """What can be read in one go is, also where the machine stalls meanwhile."""
    for module in (_sources, _streams):
        monkeypatch.setattr(module, "TURN", float("inf"))
