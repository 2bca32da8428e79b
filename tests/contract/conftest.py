"""What the environment and earlier tests say of segments does not reach the tests of these."""

import pytest

from asynclam import _memory


@pytest.fixture
def segments_in_use(monkeypatch):
    """Payloads are not streamed, and maps end at once, even if a loop has run in this process."""
    _memory.drop_in_place()
    monkeypatch.setattr(_memory, "_streamed", False)
