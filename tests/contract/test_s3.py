"""S3 where servers and users are odd: answers that do not fit, and what has no end to be closed."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import socket
import sys
import warnings
from contextlib import nullcontext
from datetime import datetime, timezone
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from aiobotocore.config import AioConfig
from botocore import exceptions
from botocore.utils import parse_timestamp
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import Self

from asynclam import Executor, s3
from asynclam.s3 import (
    _client,
    _connections,
    _counted,
    _download,
    _listing,
    _multipart,
    _parts,
    _places,
    _session,
    _source,
    _together,
)  # fmt: skip
from tests.parts.s3_objects import MIB, held_segments


class Broken:
    """A body that breaks off at once."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self, _: int) -> bytes:
        raise ConnectionResetError


class Client:
    """Answers as the test says, one request after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.meta = SimpleNamespace(
            endpoint_url="http://s3", config=SimpleNamespace(retries=None), service_model=Model()
        )

    def __getattr__(self, name: str) -> Any:
        async def request(**_: Any) -> Any:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return request


class Model:
    def operation_model(self, name: str) -> Any:
        return SimpleNamespace(input_shape=SimpleNamespace(members={}))


def source(*answers: Any) -> _source.Source:
    return _source.Source(Client(*answers), "bucket", "key", {})


def lengths(*parts: int) -> list[dict[str, int]]:
    return [{"ContentLength": length} for length in parts]


def refused(code: str) -> exceptions.ClientError:
    return exceptions.ClientError({"Error": {"Code": code}}, "Operation")


class OneByOne:
    """An async iterable that is no generator: it has nothing to be closed by."""

    def __init__(self, *items: Any) -> None:
        self.items = list(items)

    def __aiter__(self) -> OneByOne:
        return self

    async def __anext__(self) -> Any:
        if not self.items:
            raise StopAsyncIteration
        return self.items.pop(0)


# --- one version of an object --------------------------------------------------------------------


async def test_another_error_than_that_it_was_replaced() -> None:
    """It is the server's own, without an explanation that would be wrong."""
    with pytest.raises(exceptions.ClientError) as caught:
        await source(refused("SlowDown")).read(0, 1)
    assert _source.CHANGED not in str(caught.value)


async def test_a_head_of_another_version() -> None:
    """An answer without a body that is of another version is refused like one with a body."""
    with pytest.raises(exceptions.ResponseStreamingError, match="replaced by another"):
        await source({"ETag": "another", "ContentLength": 1}).part_ends(1, 1)


async def test_parts_that_are_not_as_long_as_the_first() -> None:
    """Where that can be seen by the length of the whole, all are asked for."""
    ends, certain = await source(*lengths(1, 1, 5, 1)).likely_part_ends(3, 7)
    assert (ends, certain) == ([1, 6, 7], True)


async def test_parts_that_are_not_the_whole() -> None:
    """A server whose parts make another length cannot be believed."""
    with pytest.raises(exceptions.ResponseStreamingError, match="parts have 3 bytes, and it has 4"):
        await source(*lengths(1, 2)).part_ends(2, 4)


async def test_more_than_was_asked_for() -> None:
    """A body that goes on after its last byte is refused, however little that is."""
    chunks = [b"abc", b"d"]

    async def read() -> bytes:
        return chunks.pop(0)

    written: list[bytes] = []
    transfer = _download._Transfer(
        source(), _source.Extent(0, 3, 3), lambda _, data: written.append(data), None
    )
    with pytest.raises(_download._BrokenError):
        await transfer._receive(0, read, exact=True)
    assert written == [b"abc"]


@pytest.mark.parametrize(
    ("wanted", "answer", "right"),
    [
        ((10, 20), (10, 10, 100), True),
        ((10, 200), (10, 90, 100), True),  # it ends at the object's end
        ((10, None), (10, 90, 100), True),
        ((-10, None), (90, 10, 100), True),
        ((-200, None), (0, 100, 100), True),
        ((0, 200), (0, 100, 100), True),  # the whole object, which it is
        ((10, 20), (10, 10, None), True),  # of a length that is not known
        ((10, 20), (0, 100, 100), False),  # the whole object, which it is not
        ((10, 20), (11, 10, 100), False),
        ((10, 20), (10, 9, 100), False),
        ((10, None), (10, 80, 100), False),
        ((-10, None), (80, 10, 100), False),
        ((10, 20), (0, 10, None), False),
    ],
)
async def test_a_range_is_what_was_asked_for(
    wanted: Any, answer: tuple[int, int, int | None], right: bool
) -> None:
    """Anything else that a server or a proxy answers is refused: it is other bytes."""
    start, nbytes, total = answer
    end = f"bytes {start}-{start + nbytes - 1}/{'*' if total is None else total}"
    closed: list[bool] = []
    response: dict[str, Any] = {
        "ContentLength": nbytes,
        "Body": SimpleNamespace(close=lambda: closed.append(True)),
    }
    if total != nbytes:
        response["ContentRange"] = end
    if right:
        assert await source(response).open(wanted) is response
        assert not closed
    else:
        with pytest.raises(exceptions.ResponseStreamingError, match="other bytes"):
            await source(response).open(wanted)
        assert closed


async def test_settings_that_would_change_which_bytes_come() -> None:
    """They are refused before any request, with what to give instead."""
    with pytest.raises(TypeError, match="PartNumber is no setting of a download; give it a byte_"):
        await s3.download(Client(), "bucket", "key", PartNumber=1)


async def test_another_transport() -> None:
    """A client that has httpx instead of aiohttp is refused before any request, with the remedy."""
    from aiobotocore.httpxsession import HttpxSession

    client = Client()
    client.meta.config.http_session_cls = HttpxSession
    with pytest.raises(TypeError, match="http_session_cls=HttpxSession; make one without"):
        await s3.download(client, "bucket", "key")


@pytest.mark.parametrize("one", ["key", _listing.ObjectSummary("key", 1, "", datetime.min)])
def test_one_name_is_not_many(one: Any) -> None:
    """It would be taken for as many names as it has characters, or for its fields."""
    with pytest.raises(TypeError, match=r"this is one name; give it \["):
        s3.download_many(Client(), "bucket", one)
    executor = Executor(1)
    with pytest.raises(TypeError, match="this is one name"):
        s3.process_many("bucket", one, len, executor=executor)
    executor.kill()


# --- connections ---------------------------------------------------------------------------------


async def test_a_socket_that_nobody_closes() -> None:
    """Its client can be left: it is shut down, and waited for no longer than some turns of the loop."""
    connections = _connections.Connections()
    connections.client = nullcontext("client")  # type: ignore[assignment]
    async with connections as client:
        assert client == "client"
        one = connections.open((socket.AF_INET, socket.SOCK_STREAM, 0, "", ()))
    assert one.fileno() >= 0
    one.close()


async def test_a_transport_that_has_no_sockets_of_its_own() -> None:
    """That of httpx takes no factory for them, and its clients can be made and left all the same."""
    from aiobotocore.httpxsession import HttpxSession

    config = AioConfig(http_session_cls=HttpxSession)
    wanted = _client._with_sockets_of(_connections.Connections(), config)
    assert wanted is config


# --- uploads that are cut off --------------------------------------------------------------------


class Stuck:
    """A client whose creation, or whose first aborts, are under way until they are cancelled."""

    def __init__(self, *, creation: bool = False, aborts: int = 0) -> None:
        self.aborts = aborts
        self.stuck = asyncio.Event()
        self.aborted = False
        self._creation = creation
        self.meta = SimpleNamespace(service_model=Model())

    async def create_multipart_upload(self, **_: Any) -> dict[str, str]:
        if self._creation:
            await self._wait()
        return {"UploadId": "1"}

    async def upload_part(self, **_: Any) -> None:
        raise LookupError("the first error")

    async def abort_multipart_upload(self, **_: Any) -> None:
        if self.aborts:
            self.aborts -= 1
            await self._wait()
        self.aborted = True

    async def _wait(self) -> None:
        self.stuck.set()
        await asyncio.get_running_loop().create_future()


async def cut_off(client: Stuck, times: int) -> asyncio.Task[None]:
    """An upload in parts on a loop all of whose tasks are cancelled as often as a request is stuck."""
    data = bytes(_parts.PART + 1)
    me = asyncio.current_task()
    upload = asyncio.ensure_future(s3.upload(client, "bucket", "key", data))
    for _ in range(times):
        await client.stuck.wait()
        client.stuck.clear()
        for task in asyncio.all_tasks() - {me}:
            task.cancel()
    await asyncio.wait([upload])
    return upload


async def test_an_abort_that_is_cancelled_is_made_anew() -> None:
    """As by ``asyncio.run()``, which cancels every task at its end, or a handler at its deadline."""
    client = Stuck(aborts=1)
    upload = await cut_off(client, 1)
    assert upload.cancelled()
    assert client.aborted


async def test_an_abort_that_is_cancelled_again_is_told() -> None:
    """It cannot go on for ever; who is left with an open upload hears of it."""
    client = Stuck(aborts=2)
    with pytest.warns(RuntimeWarning, match="an upload of s3://bucket/key could not be aborted"):
        upload = await cut_off(client, 2)
    assert upload.cancelled()
    assert not client.aborted


async def test_a_creation_that_is_cancelled_is_told() -> None:
    """Nobody knows whether there is an upload, nor how it is called."""
    client = Stuck(creation=True)
    with pytest.warns(RuntimeWarning, match="may have been created of s3://bucket/key"):
        upload = await cut_off(client, 1)
    assert upload.cancelled()


async def test_a_wait_within_a_cancelled_scope() -> None:
    """A scope of anyio cancels again at each turn of the loop, which must not turn for that."""
    done = asyncio.get_running_loop().create_future()
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        if turns < 100:
            asyncio.get_running_loop().call_soon(turn)
        else:
            done.set_result(None)

    waits = 0
    wait = asyncio.wait

    async def counted(*args: Any) -> Any:
        nonlocal waits
        waits += 1
        return await wait(*args)

    with anyio.CancelScope() as scope, pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "wait", counted)
        scope.cancel()
        turn()
        await _together.ended([done])
    assert done.done()
    assert waits == 1


# --- errors --------------------------------------------------------------------------------------


def test_which_errors_are_of_a_body_that_broke_off() -> None:
    """Those of botocore are as they are, those below it become such, others are none."""
    for broken in (
        exceptions.ResponseStreamingError(error="why"),
        exceptions.ReadTimeoutError(endpoint_url="url"),
        exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ):
        assert _places.as_broken(broken, "url") is broken
    assert isinstance(_places.as_broken(asyncio.TimeoutError(), "url"), exceptions.ReadTimeoutError)
    assert isinstance(
        _places.as_broken(ConnectionResetError(), "url"), exceptions.ResponseStreamingError
    )
    assert _places.as_broken(ValueError(), "url") is None


async def test_pauses_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """They double from one try to the next, up to 20 seconds, and each is a random part of that."""
    bounds: list[float] = []

    def draw(least: float, most: float) -> float:
        bounds.append(most)
        return least

    monkeypatch.setattr(_download.random, "uniform", draw)
    answer = {
        "Body": Broken(),
        "ContentLength": 5,
        "ContentRange": "bytes 0-4/5",
        "ResponseMetadata": {"HTTPHeaders": {}},
    }
    client = Client(*[answer] * 12)
    client.meta.config.retries = {"total_max_attempts": 12}
    with pytest.raises(exceptions.ResponseStreamingError):
        await s3.download(client, "bucket", "key")
    assert client.answers == []
    assert bounds == [min(0.1 * 2**number, 20) for number in range(11)]


async def test_an_upload_that_was_completed_after_all() -> None:
    """There is nothing to abort then, and nothing to warn of: only the answer was lost."""
    upload = _multipart.Multipart(
        Client(refused("NoSuchUpload")), {"Bucket": "bucket", "Key": "key"}, {}, None
    )

    async def created() -> dict[str, str]:
        return {"UploadId": "1"}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await upload._abort(asyncio.ensure_future(created()))


# --- what has no end to be closed ----------------------------------------------------------------


async def test_names_from_what_is_no_generator() -> None:
    """All come, and nothing is closed that cannot be."""
    assert [name async for name in _listing.names_of(OneByOne("a", "b"))] == ["a", "b"]


async def test_data_from_what_is_no_generator() -> None:
    """The same for what is uploaded."""
    parts = _parts.SourceParts(OneByOne(b"ab", b"c"))
    assert bytes((await parts.next()).data) == b"abc"
    assert await parts.exhausted()
    await parts.aclose()


# --- doors ---------------------------------------------------------------------------------------


def test_what_the_module_has() -> None:
    """All that it exports is listed, though it is imported only when it is used."""
    assert dir(s3) == sorted(s3.__all__)


def test_a_counted_buffer_without_its_descriptors() -> None:
    """It travels only to a worker and back, as every SharedBuffer."""
    with pytest.raises(pickle.UnpicklingError, match="without its descriptor"):
        _counted._receive(0, 1, 10)


@pytest.mark.filterwarnings("error")  # of what is raised while it is dropped
def test_a_counted_buffer_without_its_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of descriptors its memory is freed, and the error raised."""
    before = held_segments()
    monkeypatch.setattr(_counted, "os", SimpleNamespace(pipe=_no_descriptor))
    with pytest.raises(OSError, match="Too many"):
        _counted.CountedBuffer(MIB)
    while held_segments() > before:  # a thread frees it
        pass


def _no_descriptor() -> tuple[int, int]:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_preloading_without_aiobotocore(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does nothing: who makes a client is told what to install."""
    _session._loader.cache_clear()
    monkeypatch.setitem(sys.modules, "aiobotocore.session", None)
    _session.preload()
    monkeypatch.undo()
    _session._loader.cache_clear()


@pytest.mark.parametrize("known", [True, False])
def test_settings_of_an_aiobotocore_that_does_not_know_them_all(known: bool) -> None:
    """Caches are warmed in a thread where that can be asked for; the others are set in any case."""

    def old(**_: Any) -> None:
        pass

    def new(warm_up_loader_caches: bool = False) -> None:
        pass

    settings = _client._settings(new if known else old, 7)
    assert settings["max_pool_connections"] == 7
    assert ("warm_up_loader_caches" in settings) == known


@given(st.datetimes(min_value=datetime(1000, 1, 1), timezones=st.just(timezone.utc)))
def test_times_are_those_of_botocore(moment: datetime) -> None:
    """As headers have them, and as listings do, with and without fractions of a second."""
    parse = _session._timestamp_parser()
    for text in (
        format_datetime(moment, usegmt=True),
        f"{moment:%Y-%m-%dT%H:%M:%S}Z",
        f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z",
        f"{moment:%Y-%m-%dT%H:%M:%S.%f}Z",
    ):
        parsed, theirs = parse(text), parse_timestamp(text)
        assert (parsed, parsed.tzinfo) == (theirs, theirs.tzinfo)


@pytest.mark.parametrize(
    "value",
    [0, 1.5, "1700000000", "2026-11-29", "2026-11-29T10:00:00+02:00", "Sun, 29 Nov 2026 10:00 GMT"],
)  # fmt: skip
def test_other_times_are_left_to_botocore(value: Any) -> None:
    assert _session._timestamp_parser()(value) == parse_timestamp(value)


@pytest.mark.parametrize(
    "value",
    [None, "", "GMT", "Z", "never", "Sun, 31 Feb 2026 10:00:00 GMT", "2026-13-01T10:00:00Z", "2026-11-29T10:00:00+02:00Z"],
)  # fmt: skip
def test_what_is_no_time_fails_as_in_botocore(value: Any) -> None:
    with pytest.raises(Exception) as theirs:
        parse_timestamp(value)
    with pytest.raises(type(theirs.value)) as ours:
        _session._timestamp_parser()(value)
    assert str(ours.value) == str(theirs.value)
