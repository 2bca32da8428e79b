"""One target under atheris; the other arguments are libFuzzer's.

python -m tests.fuzz.target NAME CORPUS_OR_FILE...
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["asynclam"]):
    from asynclam import _memory, _payload, _raised, _segments, _wire  # noqa: F401

from tests.fuzz.targets import TARGETS


def main() -> None:
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
