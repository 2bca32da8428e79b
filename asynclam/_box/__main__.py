"""The command line of the box, also as a program that is run by its path."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by path with -S -E, which finds no package: see box.command()
    sys.path[:1] = []  # this directory: its modules are not to be found by bare names
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import argparse
import contextlib
from collections.abc import Sequence
from typing import get_args

from asynclam._box import box
from asynclam._box.files import Shm
from asynclam._box.kernel import BoxError

_DEFAULT_MEMORY = 1769  # MB, with --handler: one whole CPU
_DEFAULT_TIMEOUT = 30.0
_DEFAULT_FREEZE = 1.0
_DAY = 86_400.0  # seconds: longer than anybody waits, and no more than any wait of Python takes

_EPILOG = """\
Inside there is no /dev/shm, all is read-only but a fresh /tmp, the user is 993 without privileges,
prctl() is refused, and descriptors and processes are limited to 1,024 each. A handler is called by
the real runtime client (pip install awslambdaric), once for each event; its results are printed,
one a line, and the log is on stderr.

The exit status is the command's, 128 + N if signal N has killed it, 125 if there can be no box;
with --handler, 1 if an invocation has failed.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "box") -> int:
    """Runs the command line and returns the exit status.

    Args:
        arguments: ``None`` for those of this process.
        prog: what the usage calls it.
    """
    parser = _parser(prog)
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Not by argparse, which would take a second "--" out of the command's own arguments.
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    argv = words[end + 1 :]
    if (options.handler is None) == (not argv):
        parser.error("give either a command after --, or --handler")
    if options.handler is None and (
        options.event or options.snapstart or options.freeze is not None
    ):
        parser.error("--event, --freeze and --snapstart go with --handler")
    if options.handler is None and (options.timeout, options.concurrency) != (None, None):
        parser.error("--timeout and --concurrency go with --handler")
    try:
        if options.handler is not None:
            return _invoke(options)
        return box.run(
            box.Options(
                argv, options.shm, options.cpus, options.memory, options.bind, options.control
            )
        )
    except (BoxError, OSError) as error:
        box.complain(error)
        return box.BOX_FAILED


def _invoke(options: argparse.Namespace) -> int:
    from asynclam._box import invocations  # what the box itself does without

    return invocations.run(
        options.handler,
        options.event or [],
        invocations.How(
            options.timeout or _DEFAULT_TIMEOUT,
            options.freeze,
            options.snapstart,
            options.concurrency,
        ),
        box.Options([], options.shm, options.cpus, options.memory or _DEFAULT_MEMORY, options.bind),
    )


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (count := int(text)) >= 1:
            return count
    raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text}")


def _pause(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) <= _DAY:
            return seconds
    raise argparse.ArgumentTypeError(f"must be 0 to {_DAY:.0f} seconds, not {text}")


def _limit(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= _DAY:
            return seconds
    raise argparse.ArgumentTypeError(f"must be more than 0 seconds, at most {_DAY:.0f}, not {text}")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options] -- COMMAND...\n"
        "       %(prog)s [options] --handler MODULE.NAME [--event FILE]...",
        description="Runs a command, or a handler, as AWS Lambda would run it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shm", choices=get_args(Shm), default="missing", help="why semaphores fail")
    add("--cpus", type=int, metavar="N", help="how many CPUs there are")
    add(
        "--memory",
        type=_count,
        metavar="MB",
        help="the function's memory: as many CPUs as it sees with it, and, by a control group "
        "where that is permitted, no more memory, and the time on CPUs that comes with it",
    )
    add(
        "--bind",
        action="append",
        default=[],
        metavar="PATH",
        help="show PATH although it lies below /tmp or a directory that is closed to others",
    )
    add("--control", type=int, help=argparse.SUPPRESS)
    handler = parser.add_argument_group("a handler instead of a command")
    add = handler.add_argument
    add("--handler", metavar="MODULE.NAME", help="found in the working directory")
    add(
        "--event",
        action="append",
        metavar="FILE",
        help="JSON to invoke it with (- for stdin; repeat it for more invocations; default: {})",
    )
    add(
        "--freeze",
        type=_pause,
        nargs="?",
        const=_DEFAULT_FREEZE,
        metavar="SECONDS",
        help="stop every process for so long between two invocations (default: 1)",
    )
    add(
        "--snapstart",
        action="store_true",
        help="as with SnapStart: run the hooks before a snapshot, freeze, run those after a restore "
        "(random state and connections stay as they are)",
    )
    add(
        "--concurrency",
        type=_count,
        metavar="N",
        help="as on Managed Instances: N processes, and as many invocations at once",
    )
    add(
        "--timeout",
        type=_limit,
        metavar="SECONDS",
        help="of an invocation (default: 30)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
