"""What bounds everybody: a child process at the other end of a blocking Pipe."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any


class Child:
    """A forked process that answers over a Pipe until it is closed."""

    def __init__(self, serve: Callable[[Connection], None]) -> None:
        # By name: from Python 3.14 on the default is another, and starts in tens of milliseconds.
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(serve, self.connection, theirs))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def exchange(self, message: Any) -> Any:
        self.connection.send(message)
        return self.connection.recv()

    def close(self) -> None:
        self._process.kill()  # not by end of file: a later sibling holds the other end open
        self._process.join()
        self.connection.close()


def _child(serve: Callable[[Connection], None], parents: Connection, own: Connection) -> None:
    parents.close()
    try:
        serve(own)
    except EOFError:
        pass


@contextmanager
def child(serve: Callable[[Connection], None]) -> Generator[Child]:
    made = Child(serve)
    try:
        yield made
    finally:
        made.close()


def echo(connection: Connection) -> None:
    """Sends back what comes: the ping-pong."""
    while True:
        connection.send(connection.recv())


def swallow(connection: Connection) -> None:
    """Receives, and says only that it has."""
    while True:
        connection.recv()
        connection.send(None)


def run_jobs(connection: Connection) -> None:
    """Runs a function with its arguments, and sends the result."""
    while True:
        function, args = connection.recv()
        connection.send(function(*args))
