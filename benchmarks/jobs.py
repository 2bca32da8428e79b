"""What workers run. Imports nothing, so that no worker pays for another's job."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any, TypeVar

T = TypeVar("T")
CoroutineFunction = Callable[..., Coroutine[Any, Any, Any]]


def noop(*_: object) -> None:
    return None


def identity(value: T) -> T:
    return value


def increment(number: int) -> int:
    return number + 1


def burn(iterations: int, *_: object) -> int:
    """A fixed amount of work, whatever the clock says: two of them on one core take twice as long."""
    total = 0
    for number in range(iterations):
        total ^= number
    return total


def spin(seconds: float) -> None:
    """Lasts for a time, whatever work that is."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def read_all(array: Any) -> float:
    """Reads every page of a NumPy array, and keeps it long enough to be seen."""
    total = float(array.sum())
    spin(0.05)
    return total


def burn_downloaded(iterations: int, download: tuple[str, Any]) -> int:
    _, buffer = download
    with buffer:
        return burn(iterations) ^ len(buffer)


def stamp(buffer: Any) -> Any:
    """Writes into the middle of a SharedBuffer and returns it."""
    buffer.view[len(buffer.view) // 2] = 1
    return buffer


def look(data: Any) -> int:
    """Reads a byte of every page of bytes, or of a SharedBuffer."""
    return sum(memoryview(getattr(data, "view", data))[::4096])


def burn_each(iterations: int, count: int) -> None:
    for _ in range(count):
        burn(iterations)


async def nothing() -> None:
    return None


async def awaited(function: Callable[..., T], *args: Any) -> T:
    """For those that run coroutine functions only."""
    return function(*args)
