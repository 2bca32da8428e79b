"""The targets of ``make fuzz``, for a moment: bytes of another process are frames, or an error."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynclam import _wire
from tests.fuzz.targets import TARGETS

_HEADERS = st.builds(
    _wire.HEADER.pack,
    st.sampled_from([_wire.MAGIC, 0]),
    st.integers(0, 13),
    st.integers(0, 255) | st.just(0),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 300) | st.sampled_from([1 << 16, (1 << 16) + 1, 1 << 40, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
_SPRINKLED = st.lists(st.binary(max_size=200) | _HEADERS, max_size=12).map(b"".join)


@pytest.mark.parametrize("name", list(TARGETS))
def test_any_bytes(name):
    """No target finds anything wrong, whatever it is given."""

    @settings(max_examples=100)
    @given(_SPRINKLED)
    def run(data):
        TARGETS[name](data)

    run()
