"""S3 objects to where a worker sees them, and back, over aiobotocore.

A download goes from the socket into a :class:`~asynclam.SharedBuffer`, so a worker that is given it
reads it without a copy::

    async with s3.client() as client:
        buffer = await s3.download(client, "my-bucket", "my-key")
        result = await run_cpu(parse, buffer)

Every function takes any S3 client of aiobotocore. What fails raises the error of botocore, with the
bucket and the key in its message.
"""

# Lazy, as the door of the package is: workers that unpickle a counted buffer walk through here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._client import client
    from ._download import download
    from ._listing import ObjectSummary, list_objects
    from ._many import download_many
    from ._processing import process_many
    from ._upload import upload

_HOMES = {
    "ObjectSummary": "_listing",
    "client": "_client",
    "download": "_download",
    "download_many": "_many",
    "list_objects": "_listing",
    "process_many": "_processing",
    "upload": "_upload",
}

__all__ = [
    "ObjectSummary",
    "client",
    "download",
    "download_many",
    "list_objects",
    "process_many",
    "upload",
]


if not TYPE_CHECKING:  # pragma: no branch - a checker would take any name for one that there is

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
