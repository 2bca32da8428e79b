"""A pipeline: ``map_io`` reads, ``map_cpu`` parses, and neither runs far ahead of the other."""

import ast
import asyncio
import json
from pathlib import Path

from asynclam import map_cpu, map_io, run_blocking


async def read(path):
    return await run_blocking(path.read_bytes)


def count_nodes(source):
    return sum(1 for _ in ast.walk(ast.parse(source)))


async def main():
    paths = sorted(Path(json.__file__).parent.glob("*.py"))
    counts = await map_cpu(count_nodes, map_io(read, paths, ordered=True))
    for path, count in zip(paths, counts, strict=True):
        print(f"{path.name:12} {count:6,} nodes")


if __name__ == "__main__":
    asyncio.run(main())
