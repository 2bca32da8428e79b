"""Sessions of aiobotocore: what clients share, and requests that take less CPU.

Theory of operation. A request of botocore is some two milliseconds of Python, which is what bounds small
objects. A sixth of it says the same each time, and is told so here by settings that botocore has for it:
the User-Agent is put together anew for every request, unless it is given; dates are parsed by dateutil,
which finds out what format they have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any


def aiobotocore() -> tuple[Any, Any]:
    """The configuration class, and a session: its credentials have locks, which belong to a loop.

    Raises:
        ImportError: aiobotocore is not installed.
    """
    try:
        config, session = (import_module(f"aiobotocore.{name}") for name in ("config", "session"))
    except ModuleNotFoundError as error:
        raise ImportError('asynclam.s3 needs aiobotocore: pip install "asynclam[s3]"') from error
    new = session.get_session()
    new.register_component("data_loader", _loader())
    parsers = new.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=_timestamp_parser())
    return config.AioConfig, new


def user_agent(session: Any, config: Any) -> str | None:
    """What clients of that session may always say, if it need not be made for each request.

    It does not count which features of botocore are used, as its own does.
    """
    if config.user_agent is not None or config.user_agent_appid is not None:
        return None
    if session.get_config_variable("user_agent_appid") is not None:
        return None
    whole: str = session.user_agent()
    return whole.removesuffix(f" {session.user_agent_extra}")  # which botocore appends to it


def preload() -> None:
    """What makes a first client slow, before the processes are forked that make one each."""
    try:
        loader = _loader()
    except ModuleNotFoundError:
        return  # who makes a client is told
    for kind in ("service-2", "endpoint-rule-set-1"):
        loader.load_service_model("s3", kind, api_version=None)


@functools.cache
def _loader() -> Any:
    """What all sessions share: the service descriptions that were loaded, some 60 ms of JSON."""
    return import_module("aiobotocore.session").get_session().get_component("data_loader")


def _timestamp_parser() -> Callable[[Any], datetime]:
    """Parses what botocore's own does, to the same; that is asked where S3 would not say it so."""
    utc = import_module("dateutil.tz").tzutc()
    ask: Callable[[Any], datetime] = import_module("botocore.utils").parse_timestamp

    def parse(value: Any) -> datetime:
        try:
            if value.endswith("GMT"):  # of headers: Sun, 29 Nov 2026 23:38:15 GMT (RFC 9110)
                return parsedate_to_datetime(value).replace(tzinfo=utc)
            if value.endswith("Z"):  # of listings: 2026-11-29T23:38:15.000Z (ISO 8601)
                parsed = datetime.fromisoformat(value[:-1])
                if parsed.tzinfo is None:
                    return parsed.replace(tzinfo=utc)
        except (AttributeError, TypeError, ValueError):
            pass
        return ask(value)

    return parse
