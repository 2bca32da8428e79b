"""The same program with the executor of the standard library."""

import asyncio
from concurrent.futures import ProcessPoolExecutor


def job(number: int) -> int:
    return number * number


async def main() -> None:
    with ProcessPoolExecutor(1) as pool:
        print(await asyncio.get_running_loop().run_in_executor(pool, job, 12), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
