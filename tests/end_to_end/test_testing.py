"""``asynclam.testing``: handlers under test, in the loop of the test."""

import asyncio
import os
from contextlib import asynccontextmanager

import pytest

from asynclam import (
    DeadlineExceededError,
    Executor,
    JobExitError,
    _default,
    lambda_handler,
    remaining,
    run_cpu,
    state,
)
from asynclam.testing import (
    LambdaContext,
    http_event,
    inline_jobs,
    invoke,
    s3_event,
    sqs_event,
)
from tests import jobs


@asynccontextmanager
async def lifespan():
    events.append("enter")
    yield "resource"
    events.append("leave")


events: list[str] = []


@lambda_handler(lifespan=lifespan)
async def handler(event, context):
    return event, state(), context.function_name, remaining() > 0, await run_cpu(jobs.pid)


async def test_invoke():
    """An invocation in the test's own loop: lifespan, state, context, and jobs in this process."""
    events.clear()
    with inline_jobs():
        result = await invoke(handler, "event")
    assert result == ("event", "resource", "function", True, os.getpid())
    assert events == ["enter", "leave"]


async def test_invoke_with_a_state():
    """With a state of the test's own, the lifespan is left alone."""
    events.clear()
    with inline_jobs() as executor:
        assert _default.default_executor() is executor
        assert (await invoke(handler, 1, LambdaContext(function_name="f"), state="fake"))[1:3] == (
            "fake",
            "f",
        )
    assert _default._executor is not executor
    assert events == []


def test_as_lambda_calls_it():
    """In a test that is no coroutine, the handler is called as it is."""
    try:
        with inline_jobs():
            assert handler("event", LambdaContext())[0] == "event"
    finally:
        handler.close()


def test_inline_jobs_go_before_the_executor_of_a_handler():
    """Which is the default one afterwards, also if the handler was started within the block."""
    executor = Executor(1)

    @lambda_handler(executor=executor)
    async def where(event, context):
        return await run_cpu(jobs.pid)

    try:
        with inline_jobs():
            assert where(None, LambdaContext()) == os.getpid()
        assert _default.default_executor() is executor
        assert where(None, LambdaContext()) != os.getpid()
    finally:
        where.close()


async def test_the_executor_of_a_handler():
    """A test runs jobs as Lambda does."""
    executor = Executor(1)

    @lambda_handler(executor=executor)
    async def where(event, context):
        return await run_cpu(jobs.pid)

    assert await invoke(where) != os.getpid()
    assert executor.statistics().jobs_completed == 1


async def test_inline_jobs_in_inline_jobs():
    """The inner block ends, and the outer one holds."""
    with inline_jobs() as outer:
        with inline_jobs() as inner:
            assert _default.default_executor() is inner
        assert _default.default_executor() is outer


async def test_the_deadline_in_a_test():
    """A context that has no time left: the error that the runtime would report."""

    @lambda_handler
    async def slow(event, context):
        await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlineExceededError, match="slow was cancelled"):
        await invoke(slow, context=LambdaContext(0))


async def test_an_exit_in_a_test():
    """SystemExit is reported as in Lambda, and does not end the test run."""

    @lambda_handler
    async def exits(event, context):
        raise SystemExit(1)

    with pytest.raises(JobExitError):
        await invoke(exits)


async def test_a_cancelled_test():
    """A cancel of the test is the test's: it ends the handler, and goes through."""
    ends = []

    @lambda_handler
    async def slow(event, context):
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append("ended")

    task = asyncio.create_task(invoke(slow))
    while not ends:
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends == ["ended"]


async def test_no_handler():
    """Something else is refused."""
    with pytest.raises(TypeError, match="lambda_handler"):
        await invoke(jobs.echo)


def test_a_context():
    """It has what the runtime's has; its time passes, and is never negative."""
    context = LambdaContext(1000, memory_limit_in_mb=512)
    assert 900_000 < context.get_remaining_time_in_millis() <= 1_000_000
    assert LambdaContext(0).get_remaining_time_in_millis() == 0
    assert context.memory_limit_in_mb == "512"
    assert context.aws_request_id != LambdaContext().aws_request_id
    from awslambdaric.lambda_context import LambdaContext as Real

    real = {name for name in vars(Real("id", None, None, 0)) if not name.startswith("_")}
    assert all(hasattr(context, name) for name in real)


def test_events():
    """Events are what Powertools' models of them take."""
    from aws_lambda_powertools.utilities.data_classes import (
        APIGatewayProxyEventV2,
        S3Event,
        SQSEvent,
    )

    sqs = SQSEvent(sqs_event("text", {"a": 1}))
    assert [record.message_id for record in sqs.records] == ["message-0", "message-1"]
    assert [record.body for record in sqs.records] == ["text", '{"a": 1}']
    s3 = S3Event(s3_event("bucket", "a key/with spaces"))
    assert (s3.bucket_name, s3.object_key) == ("bucket", "a key/with spaces")
    http = APIGatewayProxyEventV2(
        http_event("POST", "/path", body={"a": 1}, headers={"X-Mine": "1"}, query={"q": "a b"})
    )
    assert (http.http_method, http.path, http.json_body) == ("POST", "/path", {"a": 1})
    assert (http.headers["x-mine"], http.query_string_parameters) == ("1", {"q": "a b"})


async def test_cancelled_before_it_has_begun():
    """A handler that is cancelled then ends as one that is cancelled later."""

    @lambda_handler
    async def never(event, context):
        pytest.fail("it was cancelled")

    before = asyncio.all_tasks()

    def cancel():
        for task in asyncio.all_tasks() - before:
            task.cancel()

    class Context(LambdaContext):
        def get_remaining_time_in_millis(self):
            asyncio.get_running_loop().call_soon(cancel)  # ahead of the task that is made now
            return super().get_remaining_time_in_millis()

    with pytest.raises(JobExitError):
        await invoke(never, None, Context())


async def test_a_context_without_an_end():
    """There is no deadline, neither for the handler nor for a test that is cancelled."""

    @lambda_handler
    async def unlimited(event, context):
        return remaining()

    assert await invoke(unlimited, None, object()) == float("inf")


def test_an_event_without_query_and_body():
    """What a request has not is not in its event."""
    event = http_event()
    assert not {"queryStringParameters", "body"} & event.keys()


async def test_a_test_that_is_cancelled_once():
    """The handler ends before the cancel goes through, however long its end takes."""
    steps = []

    @lambda_handler
    async def slow(event, context):
        steps.append("begun")
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            steps.append("ended")

    task = asyncio.create_task(invoke(slow))
    while not steps:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["begun", "ended"]
