"""The kinds of jobs, how often each comes, and which outcome of each is right."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from asynclam import SharedBuffer
from tests.soak import work


class Order(NamedTuple):
    """One job to be given to an executor."""

    kind: str
    fn: Callable[..., Any]
    args: tuple[object, ...]
    is_right: Callable[[object], bool]
    raises: tuple[type[BaseException], ...] = ()  # its own errors
    ends_its_worker: bool = False
    is_coroutine: bool = False


def echo(random: Random, number: int) -> Order:
    value = random.choice([None, number, "text" * random.randrange(50), [number] * 20, {"a": 1.5}])
    right = (number, value)
    return Order("echo", work.echo, right, right.__eq__)


def by_value(random: Random, number: int) -> Order:
    summand = random.randrange(1000)
    echo = work.echo
    return Order(
        "lambda",
        lambda first, second: echo(first, second + summand),
        (number, 1),
        (number, 1 + summand).__eq__,
    )


def spin(random: Random, number: int) -> Order:
    seconds = random.choice([0.0001, 0.0005, 0.002, 0.02])
    return Order("spin", work.spin, (number, seconds), number.__eq__)


def wait(random: Random, number: int) -> Order:
    seconds = random.choice([0.0, 0.0001, 0.002, 0.02])
    return Order("coroutine", work.wait, (number, seconds), number.__eq__, is_coroutine=True)


def fail(_random: Random, number: int) -> Order:
    return Order("fail", work.fail, (number,), lambda _: False, (work.OwnError,))


def leave(_random: Random, number: int) -> Order:
    return Order("exit", work.leave, (number,), lambda _: False, (), ends_its_worker=True)


def crash(_random: Random, number: int) -> Order:
    return Order("SIGSEGV", work.crash, (number,), lambda _: False, (), ends_its_worker=True)


def check(random: Random, number: int) -> Order:
    data = work.pattern(number, size(random))
    right = (number, zlib.crc32(data))
    return Order("bytes there", work.check, (number, data), right.__eq__, (MemoryError,))


def blow(random: Random, number: int) -> Order:
    nbytes = size(random)
    return Order(
        "bytes back",
        work.blow,
        (number, nbytes),
        lambda result: result == (number, work.pattern(number, nbytes)),
        (MemoryError,),
    )


def bounce(random: Random, number: int) -> Order:
    data = bytearray(work.pattern(number, size(random)))
    right = (number, data)
    return Order("bytes both ways", work.echo, right, right.__eq__, (MemoryError,))


def exhaust(_random: Random, number: int) -> Order:
    return Order("out of memory", work.exhaust, (number,), lambda _: False, (MemoryError,))


def fill(random: Random, number: int) -> Order:
    nbytes = random.choice([1, 100, 5000, 300_000])
    buffer = SharedBuffer(nbytes)

    def is_right(result: object) -> bool:
        return result == number and buffer.view == work.pattern(number, nbytes)

    return Order("buffer there", work.fill, (number, buffer), is_right, (MemoryError, OSError))


def make(random: Random, number: int) -> Order:
    nbytes = random.choice([1, 100, 5000, 300_000])

    def is_right(result: object) -> bool:
        assert isinstance(result, SharedBuffer)
        right = result.view == work.pattern(number, nbytes)
        result.close()
        return right

    return Order("buffer back", work.make, (number, nbytes), is_right, (MemoryError, OSError))


def fork(_random: Random, number: int) -> Order:
    return Order("fork", work.fork, (number,), number.__eq__, (OSError,))


def chatter(_random: Random, number: int) -> Order:
    return Order("print", work.chatter, (number,), number.__eq__)


def size(random: Random) -> int:
    """From bytes to megabytes, the small ones more often; some just beside a bound."""
    return random.choice(_BOUNDS) if random.random() < 0.2 else int(2 ** random.uniform(0, 20))


_BOUNDS = (0, 1, 16_383, 16_384, 65_512, 65_536, 131_071, 131_072, 1 << 20, 3 << 20)

_SHARES = {
    echo: 600, wait: 100, spin: 60, fail: 40, by_value: 20, check: 50, blow: 50, bounce: 50, fill: 20, make: 20,
    chatter: 20, fork: 2, leave: 2, crash: 2, exhaust: 2,
}  # fmt: skip
_MAKERS, _WEIGHTS = list(_SHARES), list(_SHARES.values())


def draw(random: Random, number: int) -> Order:
    """The job of this number.

    Raises:
        OSError: it is one with a buffer, and nothing is left to make that of.
    """
    (maker,) = random.choices(_MAKERS, _WEIGHTS)
    return maker(random, number)


def scratch_is_small(directory: str) -> bool:
    """Whether all of the file system may be filled: it is a small one, of the box."""
    found = os.statvfs(directory)
    return found.f_blocks * found.f_frsize <= 1 << 30
