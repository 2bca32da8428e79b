"""What a worker takes over from the loop process: path, directory, environment, initializer."""

from __future__ import annotations

import os
import pickle
import sys


class Recipe:
    """What a worker takes over from the loop process at the moment when it is started.

    Args:
        slot: where it marks what it has begun.
        initializer: pickled ``(function, arguments)`` to be called first; empty for none.
        preload: modules that a spawned server imports before it forks.
    """

    def __init__(self, slot: int, initializer: bytes, preload: tuple[str, ...]) -> None:
        self.slot = slot
        self.path = list(sys.path)
        self.directory = _working_directory()
        self.environment = dict(os.environ)
        self.initializer = initializer
        self.preload = preload

    def dumps(self) -> bytes:
        """As the body of a START frame."""
        return pickle.dumps(vars(self), 5)

    @classmethod
    def loads(cls, body: bytearray | memoryview) -> Recipe:
        """Out of the body of a START frame."""
        recipe = cls.__new__(cls)
        vars(recipe).update(pickle.loads(body))
        return recipe

    def initialize(self) -> None:
        """In the worker: takes the state over, then calls the initializer."""
        self.apply()
        if self.initializer:
            initializer, arguments = pickle.loads(self.initializer)
            initializer(*arguments)

    def apply(self) -> None:
        """Makes this process's path, directory and environment those of the loop process."""
        sys.path[:] = self.path
        if self.directory:
            os.chdir(self.directory)
        if self.environment != dict(os.environ):
            os.environ.clear()
            os.environ.update(self.environment)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return ""
