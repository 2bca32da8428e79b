"""What every test is run on and held to: both event loops, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import threadpoolctl  # noqa: F401 - here, once, and not in each fork server: NumPy is loaded
import uvloop

from asynclam import _default, _descriptors, _forkserver, _memory
from tests.parts.gate import Gate
from tests.parts.processes import descendants, state_of

# No test asserts a time: neither that of an example, nor of making one.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")

# libuv makes the pipe for its signals with its first loop, and keeps it.
uvloop.new_event_loop().close()

_SECONDS_TO_END = 10.0

_unhandled: list[dict[str, object]] = []


def _watched(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> asyncio.AbstractEventLoop:
    loop = new_loop()
    loop.set_exception_handler(_note_unhandled)
    return loop


def _note_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """But not what uvloop 0.23 says if a connection over TLS is cancelled as it is made.

    When its handshake is done in that turn, it is still read from in the next one, closed as it is.
    """
    broken_off = "TCPTransport closed=True" in str(context.get("exception"))
    if not (broken_off and context["message"] == "Fatal error on SSL protocol"):
        _unhandled.append(context)


def _stock_loop() -> asyncio.AbstractEventLoop:
    return _watched(asyncio.new_event_loop)


def _uvloop() -> asyncio.AbstractEventLoop:
    return _watched(uvloop.new_event_loop)


SCHEMES = ["http", "https"]
_LOOPS = {"asyncio": _stock_loop, "uvloop": _uvloop}


def pytest_addoption(parser):
    parser.addoption("--loop", choices=list(_LOOPS), help="the only loop for tests that have one")
    parser.addoption("--scheme", choices=SCHEMES, help="the only way to S3 for tests that need it")


def pytest_asyncio_loop_factories(config, item):
    only = config.getoption("--loop")
    return _LOOPS if only is None else {only: _LOOPS[only]}


def pytest_generate_tests(metafunc):
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "scheme" in metafunc.fixturenames and "scheme" not in chosen:
        only = metafunc.config.getoption("--scheme")
        metafunc.parametrize("scheme", SCHEMES if only is None else [only])


@pytest.fixture(scope="session", autouse=True)
def no_fork_server_left_behind() -> Iterator[None]:
    """That which tests share ends with the last of them."""
    yield
    _forkserver.stop()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No descriptor, no process and no unhandled exception of a loop outlives its test.

    But for a fork server, which serves all tests, as that of a program serves all its executors: to
    start one takes 0.1 s of CPU. A test that wants its own stops it, or starts one by fork.
    """
    shared = _forkserver.ensure("spawn")
    _unhandled.clear()
    gc.freeze()  # so that the collection below looks at what this test has made, not at all modules
    before = _held()
    yield
    if _default._executor is not None:
        _default._executor.kill()
        _default.set_default_executor(None)
    if list(_forkserver._servers.values()) != [shared] or state_of(shared.pid) in {"Z", ""}:
        _forkserver.stop()
    gc.collect()
    with _memory._dropping:  # by the thread in which large mappings end
        pass
    _memory.drop_in_place()  # as before any pool has had a large payload
    assert not _unhandled
    assert _left_beside(before) == {}


def _held() -> dict[str, set[Any]]:
    """What this process has; a mark that outlives its descriptor hits the next of that number."""
    return {
        "processes": set(descendants(os.getpid())),
        "descriptors": set(_open_files().items()),
        "marks of descriptors": set(_descriptors._private),
    }


def _left_beside(before: dict[str, set[Any]]) -> dict[str, set[Any]]:
    """What it has now and had not before; workers that were killed, and threads, may be about to end."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while True:
        left = {name: now - before[name] for name, now in _held().items() if now - before[name]}
        if not left or time.monotonic() > deadline:
            return left
        os.sched_yield()


def _open_files() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            file = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of the listing itself
            continue
        found[int(name)] = file
    return found


@pytest.fixture
def gate() -> Iterator[Gate]:
    with tempfile.TemporaryDirectory(prefix="gate-") as directory:
        gate = Gate(directory)
        yield gate
        gate.close()
