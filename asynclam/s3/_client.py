"""Clients of aiobotocore with settings for many requests at once, made quickly and kept."""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

from ._connections import Connections
from ._session import aiobotocore, user_agent

Client: TypeAlias = Any  # aiobotocore makes the classes of its clients and bodies as it runs

_CONNECT_TIMEOUT = 5  # seconds; the 60 of botocore outlast most Lambda functions
_READ_TIMEOUT = 30  # seconds without a byte


def client(*, max_concurrency: int = 32, **kwargs: Any) -> AbstractAsyncContextManager[Client]:
    """An S3 client for many requests at once: use it with ``async with``, best in a ``lifespan``.

    It retries in the standard mode, gives up on a connection after 5 seconds and on a silent server
    after 30. Making it blocks the loop for tens of milliseconds: make one, and keep it. It renews
    credentials that expire, and replaces connections that have died while a sandbox was frozen. When
    it is left, its connections are closed, also those of requests that were cancelled (with
    aiobotocore 3).

    Args:
        max_concurrency: connections that it may have open, so requests that really run at once.
        **kwargs: what aiobotocore's ``create_client`` takes, such as ``endpoint_url`` or
            ``region_name``; the settings in ``config`` win over those made here.

    Raises:
        ImportError: aiobotocore is not installed.
    """
    config_class, session = aiobotocore()
    config = config_class(**_settings(config_class, max_concurrency))
    if (users := kwargs.pop("config", None)) is not None:
        config = config.merge(users)
    if agent := user_agent(session, config):
        config = config.merge(config_class(user_agent=agent))
    connections = Connections(config.connector_args.get("socket_factory"))
    config = _with_sockets_of(connections, config)
    connections.client = session.create_client("s3", config=config, **kwargs)
    return connections


def _with_sockets_of(connections: Connections, config: Any) -> Any:
    from botocore.exceptions import ParamValidationError

    wanted: dict[str, Any] = {
        "connector_args": {**config.connector_args, "socket_factory": connections.open}
    }
    if sys.version_info < (3, 11):  # pragma: no cover - an earlier Python
        wanted["http_session_cls"] = _impatient(config.http_session_cls)
    try:
        return config.merge(type(config)(**wanted))
    except ParamValidationError:  # of an older aiobotocore, or of the httpx transport
        return config


def _impatient(session: type) -> type:  # pragma: no cover - an earlier Python
    """A session of aiohttp that closes connections over TLS without the farewell of the other side.

    CPython 3.10 waits for it even where it has stopped reading, which is for ever; 3.11 for 30 seconds.
    """

    def init(self: Any, *args: Any, connector_args: dict[str, Any], **kwargs: Any) -> None:
        args_of_connector = {**connector_args, "enable_cleanup_closed": True}
        session.__init__(self, *args, connector_args=args_of_connector, **kwargs)  # type: ignore[misc]

    return type(session.__name__, (session,), {"__init__": init})


def _settings(config_class: Any, max_concurrency: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_pool_connections": max_concurrency,
        "retries": {"mode": "standard"},
        "connect_timeout": _CONNECT_TIMEOUT,
        "read_timeout": _READ_TIMEOUT,
    }
    if "warm_up_loader_caches" in inspect.signature(config_class).parameters:
        settings["warm_up_loader_caches"] = True  # in a thread, so the loop is blocked for less
    return settings
