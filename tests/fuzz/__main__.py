"""Runs each target under atheris, for so many seconds.

python -m tests.fuzz [--seconds S] [--target NAME]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import TARGETS

_CORPUS = Path(".fuzz")
_MEMORY = 1024  # MB, above which a target counts as failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--target", choices=list(TARGETS), help="only this one")
    options = parser.parse_args()
    failed = []
    for name in [options.target] if options.target else TARGETS:
        corpus = _CORPUS / name
        corpus.mkdir(parents=True, exist_ok=True)
        print(f"=== {name}, {options.seconds} s ===", flush=True)
        command = [
            sys.executable, "-m", "tests.fuzz.target", name, str(corpus),
            f"-max_total_time={options.seconds}", f"-rss_limit_mb={_MEMORY}", "-max_len=4096",
            f"-artifact_prefix={_CORPUS}/{name}-", "-verbosity=0", "-print_final_stats=1",
        ]  # fmt: skip
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
    for name in failed:
        print(f"{name} failed; again with: python -m tests.fuzz.target {name} .fuzz/{name}-…")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
