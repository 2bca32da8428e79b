"""Errors that say where: the bucket and the key, in whatever botocore and aiohttp raise."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def located(bucket: str, key: str) -> Generator[None]:
    """Puts the object's place into the errors of botocore."""
    try:
        yield
    except Exception as error:
        _add_place(error, f"s3://{bucket}/{key}")
        raise


def as_broken(error: Exception, url: str) -> Any:
    """The error of botocore for a body that broke off, ``None`` for what is no such error.

    The transport lets some through that are aiohttp's.
    """
    import aiohttp
    from botocore import exceptions

    if isinstance(error, exceptions.ReadTimeoutError | exceptions.IncompleteReadError):
        return error
    if isinstance(error, exceptions.ResponseStreamingError):
        return error
    if isinstance(error, asyncio.TimeoutError):
        return exceptions.ReadTimeoutError(endpoint_url=url, error=error)
    if isinstance(error, aiohttp.ClientError | OSError):
        return exceptions.ResponseStreamingError(error=error)
    return None


def explain(error: Exception, explanation: str) -> None:
    """Adds what it means here to the message of a ``ClientError``, also as it is unpickled."""
    from botocore.exceptions import ClientError

    assert isinstance(error, ClientError)
    details = error.response.setdefault("Error", {})
    details["Message"] = f"{details.get('Message', 'Unknown')} ({explanation})"
    # Again, so that the message is made of the response, as it is when the error is unpickled.
    ClientError.__init__(error, error.response, error.operation_name)


def _add_place(error: Any, place: str) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    if isinstance(error, ClientError):
        explain(error, place)
    elif isinstance(error, BotoCoreError):
        # Of some of these the message is made anew when the error is unpickled, likewise.
        for name in {"error", "error_msg"} & error.kwargs.keys():
            error.kwargs[name] = f"{error.kwargs[name]} ({place})"
        message = error.fmt.format(**error.kwargs)
        error.args = (message if place in message else f"{message} ({place})",)
