"""New event loops: uvloop's where that is installed, else asyncio's own."""

from asyncio import AbstractEventLoop


def new_event_loop() -> AbstractEventLoop:
    """A loop that does not run yet."""
    return _new_event_loop()


try:
    from uvloop import new_event_loop as _new_event_loop
except ImportError:
    from asyncio import new_event_loop as _new_event_loop  # type: ignore[assignment]
