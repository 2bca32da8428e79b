"""For tests of handlers: a context, events, and jobs that run in the test's own process.

    async def test_handler():
        with inline_jobs():
            assert await invoke(app.handler, sqs_event("one", "two")) == {"batchItemFailures": []}

A test that is no coroutine can call the handler as Lambda does: ``app.handler(event, LambdaContext())``.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from time import monotonic
from typing import Any

from . import _default
from ._decorators import layers
from ._executor import Executor
from ._handler import Handler, invocation_of, outcome_of

_REGION = "eu-central-1"
_ACCOUNT = "123456789012"


class LambdaContext:
    """The second argument of a handler, as the Python runtime makes it.

    Args:
        seconds: how long the invocation may take.
        function_name: the function's.
        memory_limit_in_mb: its memory.
        aws_request_id: the invocation's; ``None`` for a new one.
    """

    function_version = "$LATEST"
    identity = None
    client_context = None
    tenant_id = None

    def __init__(
        self,
        seconds: float = 3.0,
        *,
        function_name: str = "function",
        memory_limit_in_mb: int = 1769,
        aws_request_id: str | None = None,
    ) -> None:
        self.function_name = function_name
        self.memory_limit_in_mb = str(memory_limit_in_mb)  # so it is in Lambda
        self.aws_request_id = str(uuid.uuid4()) if aws_request_id is None else aws_request_id
        self.invoked_function_arn = f"arn:aws:lambda:{_REGION}:{_ACCOUNT}:function:{function_name}"
        self.log_group_name = f"/aws/lambda/{function_name}"
        self.log_stream_name = "2026/01/01/[$LATEST]" + "0" * 32
        self._end = monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the function times out, never negative."""
        return max(0, int((self._end - monotonic()) * 1000))


def sqs_event(*bodies: object, queue: str = "queue") -> dict[str, Any]:
    """A batch of messages of an SQS queue; a body that is no string is sent as JSON.

    Their ``messageId`` are ``message-0``, ``message-1``, and so on.
    """
    return {
        "Records": [
            {
                "messageId": f"message-{number}",
                "receiptHandle": f"receipt-{number}",
                "body": _text(body),
                "attributes": {"ApproximateReceiveCount": "1"},
                "messageAttributes": {},
                "eventSource": "aws:sqs",
                "eventSourceARN": f"arn:aws:sqs:{_REGION}:{_ACCOUNT}:{queue}",
                "awsRegion": _REGION,
            }
            for number, body in enumerate(bodies)
        ]
    }


def s3_event(bucket: str, *keys: str, event_name: str = "ObjectCreated:Put") -> dict[str, Any]:
    """A notification of S3 that objects were created; keys are quoted, as S3 does."""
    from urllib.parse import quote_plus

    return {
        "Records": [
            {
                "eventVersion": "2.1",
                "eventSource": "aws:s3",
                "awsRegion": _REGION,
                "eventName": event_name,
                "s3": {
                    "bucket": {"name": bucket, "arn": f"arn:aws:s3:::{bucket}"},
                    "object": {"key": quote_plus(key, safe="/")},
                },
            }
            for key in keys
        ]
    }


def http_event(
    method: str = "GET",
    path: str = "/",
    *,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    query: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A request of a function URL or an HTTP API (payload format 2.0)."""
    from urllib.parse import urlencode

    event = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": urlencode(query or {}),
        "headers": {name.lower(): value for name, value in (headers or {}).items()},
        "requestContext": {
            "accountId": _ACCOUNT,
            "http": {"method": method, "path": path, "protocol": "HTTP/1.1"},
            "stage": "$default",
        },
        "isBase64Encoded": False,
    }
    if query:
        event["queryStringParameters"] = dict(query)
    if body is not None:
        event["body"] = _text(body)
    return event


def _text(body: object) -> str:
    return body if isinstance(body, str) else json.dumps(body)


@contextmanager
def inline_jobs() -> Iterator[Executor]:
    """Jobs of the default executor run in this process, pickled all the same, until the block ends.

    So debuggers stop in them, coverage sees them, and mocks of this process hold in them. It goes before
    what ``set_default_executor()`` or the executor of a handler make the default one; that is it when the
    block has ended.
    """
    executor = Executor(0)
    before = _default.use_instead(executor)
    try:
        yield executor
    finally:
        _default.use_instead(before)


_ENTER: Any = object()


async def invoke(
    handler: Callable[[Any, Any], Any],
    event: object = None,
    context: object = None,
    *,
    state: object = _ENTER,
) -> Any:
    """Runs one invocation of a handler in the loop of the test, and returns its result.

    With the deadline of the context, errors as they would be reported, and the handler's executor as the
    default one from here on. Decorators above ``lambda_handler`` are left out, for they call a sync
    function. Tasks that the handler has begun and not awaited go on, as the loop is the test's; Lambda's
    are cancelled (call the handler itself to see that).

    Args:
        handler: what ``lambda_handler`` has made.
        event: its first argument.
        context: its second; ``None`` for a :class:`LambdaContext` of 3 seconds.
        state: what ``state()`` is. Without it the handler's lifespan is entered, and left afterwards.

    Raises:
        TypeError: no ``lambda_handler`` has made it.
        DeadlineExceededError: the time of the context was nearly over.
        JobExitError: it raised ``SystemExit`` or its like.
    """
    made = next((layer for layer in layers(handler) if isinstance(layer, Handler)), None)
    if made is None:
        raise TypeError(f"invoke() takes what @lambda_handler has made, not {handler!r}")
    made.set_executor()
    context = LambdaContext() if context is None else context
    async with _resources(made, state) as current:
        loop, invocation = asyncio.get_running_loop(), invocation_of(context)
        before = asyncio.all_tasks(loop)
        coroutine = outcome_of(
            made.__wrapped__, event, context, invocation=invocation, state=current
        )
        task = loop.create_task(coroutine)
        deadline = made.deadline(
            loop, task, invocation, lambda: asyncio.all_tasks(loop) - before, stops=False
        )
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:  # of the test, not of the handler
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            if deadline is not None:
                deadline.end()
        if task.cancelled():  # before it had begun
            return made.returned((None, asyncio.CancelledError()), deadline)
        return made.returned(task.result(), deadline)


def _resources(made: Handler[Any, Any, Any], state: object) -> AbstractAsyncContextManager[Any]:
    if state is not _ENTER:
        return nullcontext(state)
    return nullcontext() if made.lifespan is None else made.lifespan()
