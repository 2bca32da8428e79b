"""An asyncio program whose one job runs in a worker of asynclam."""

import asyncio

from asynclam import run_cpu


def job(number: int) -> int:
    return number * number


async def main() -> None:
    print(await run_cpu(job, 12), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
