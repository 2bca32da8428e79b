"""What Lambda SnapStart needs: nothing that must differ between sandboxes is in the snapshot.

Lambda takes the snapshot when the init is over, and restores any number of sandboxes from it, later
and elsewhere. Connections are dead then, credentials may have expired, and all sandboxes begin with
the same random state. So before the snapshot the lifespan is left, the loop is closed, and the
workers end; after it the process is reseeded, and everything is started anew: workers are forked, and
seeded, in each sandbox. The fork server stays. What was imported, which is most of the init, is in the
snapshot, in the fork server's memory, too.

The hooks are called by the runtime client, through the package snapshot_restore_py, which is in every
runtime that has SnapStart.
"""

from __future__ import annotations

import random
import sys
from typing import Protocol

from ._default import default_executor


class Handler(Protocol):
    """What ``lambda_handler`` makes."""

    def start(self) -> None:
        """Enters the lifespan."""

    def close(self) -> None:
        """Leaves it."""


def register(handler: Handler) -> None:
    """Has a handler closed before the snapshot, and started again after each restore."""
    from snapshot_restore_py import register_after_restore, register_before_snapshot

    register_before_snapshot(_before_snapshot, handler)
    register_after_restore(_after_restore, handler)


def _before_snapshot(handler: Handler) -> None:
    handler.close()
    default_executor()._end_workers()


def _after_restore(handler: Handler) -> None:
    random.seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    handler.start()
