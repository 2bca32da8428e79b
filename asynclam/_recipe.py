"""What a worker takes over from the loop process: path, directory, environment, initializer."""

from __future__ import annotations

import _pickle as pickle
import os
import sys
from typing import Any

from . import _limits, _records


class Recipe:
    """What a worker takes over from the loop process at the moment when it is started.

    Args:
        slot: where it marks what it has begun.
        initializer: pickled ``(function, arguments)`` to be called first; empty for none.
        in_main: the same with names of ``__main__``, where the worker has that of the loop process; for
            its globals are those of the jobs then.
        preload: modules that a spawned server imports before it forks.
        threads: how many threads numeric libraries may start; 0: as many as they like.
        max_memory: bytes that it may take between two jobs; 0: as much as there is.
    """

    def __init__(
        self,
        slot: int,
        initializer: bytes,
        preload: tuple[str, ...],
        *,
        in_main: bytes = b"",
        threads: int = 0,
        max_memory: int = 0,
    ) -> None:
        self.slot = slot
        self.path = list(sys.path)
        self.directory = _working_directory()
        self.environment = dict(os.environ)
        self.threads = 0 if _limits.are_threads_chosen(self.environment) else threads
        if threads:
            self.environment.update(_limits.thread_variables(self.environment, threads))
        self.max_memory = max_memory
        self.levels = _records.levels()
        self.initializer, self.in_main = initializer, in_main
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

    def initialize(self) -> object:
        """In the worker: takes the state over, then calls the initializer; what that returns."""
        self.apply()
        _records.set_levels(self.levels)
        if not self.initializer:
            return None
        initializer, arguments = self._find_initializer()
        return initializer(*arguments)

    def _find_initializer(self) -> Any:
        if self.in_main:
            try:
                return pickle.loads(self.in_main)
            except AttributeError:
                pass  # this was forked before __main__ had the name
        return pickle.loads(self.initializer)

    def apply(self) -> None:
        """Makes this process's path, directory and environment what they are to be."""
        sys.path[:] = self.path
        if self.directory:
            os.chdir(self.directory)
        wanted, current = self.environment, dict(os.environ)
        for name in current.keys() - wanted.keys():
            del os.environ[name]
        os.environ.update(wanted.items() - current.items())
        _limits.limit_threads(self.threads)


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return ""
