"""Jobs in this process (``max_workers=0``): what has no workers keeps the promises all the same."""

import asyncio
import sys
import types

import pytest

from asynclam import Executor, PayloadError, _call
from tests import jobs


def test_one_loop_after_the_other():
    """It serves each loop that asks, and has nothing under way when somebody can ask."""
    executor = Executor(0)
    assert asyncio.run(executor.run_cpu(jobs.echo, 1)) == 1
    assert asyncio.run(executor.run_cpu(jobs.echo, 2)) == 2
    assert executor.under_way() == ([], 0)
    asyncio.run(executor.aclose())


@pytest.fixture
def vanishing():
    """Functions that are known under a name as long as the module is, which it is not for long."""
    module = types.ModuleType("tests_vanishing_inline")
    sys.modules[module.__name__] = module
    exec("import threading\nlock = threading.Lock()", vars(module))
    exec("def fn(value):\n    return value\ndef locked(value):\n    return lock", vars(module))
    _call._head_of(module.fn, lambda: True, _call._references)
    _call._head_of(module.locked, lambda: True, _call._references)
    del sys.modules[module.__name__]
    yield module
    _call._references.clear()


async def test_a_function_that_is_known_under_no_name(vanishing):
    """It is run by value, as in a worker; where it cannot be, the error says why."""
    async with Executor(0) as executor:
        assert await executor.run_cpu(vanishing.fn, "value") == "value"
        with pytest.raises(PayloadError, match="cannot be sent by value"):
            await executor.run_cpu(vanishing.locked, "value")
        assert await executor.run_cpu(jobs.echo, "next") == "next"
